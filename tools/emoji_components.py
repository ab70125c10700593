"""The networks that learn from captioned pictures of concepts in several styles (configs/emoji), as training tasks.

`tools/train_components.py emoji-codec|emoji-vision|emoji-judge --shards ...` trains them; what a task is stands there.
The shards hold `KEY.webp|png|jpg` and `KEY.json` with `concept` and `style`. Held-out shards are never given to training:
`--test-shards` are for the measurement at the end.

* `PicturesCodec`: diffusers' AutoencoderDC, 128 px -> 32 x 8 x 8, with noise on its latents as for `shapes`.
* `PicturesVision`: a timm vision transformer that tells concept and style of augmented pictures: the target of REPA.
* `PicturesJudge`: a convolutional network of its own seed and kind for evaluation (nitro_e/rewards/retrieval.py): an
  embedding in which pictures of one concept lie together, and a head that tells the style.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from nitro_e.config import ConfigError
from nitro_e.encoders.codec import AutoencoderDCCodec, load_autoencoder_dc
from nitro_e.encoders.vision import patch_tokens
from nitro_e.record import progress
from nitro_e.rewards.retrieval import GALLERY, JUDGE, Retrieval, embed

RESOLUTION = 128


class Pictures:
    """The pictures of some shards with their concept and style, held as uint8."""

    def __init__(self, shards: list[str], resolution: int = RESOLUTION) -> None:
        from webdataset import WebDataset

        images, self.concepts, self.styles, self.splits = [], [], [], []
        for sample in WebDataset(shards, shardshuffle=False).decode("rgb8"):
            image = next((sample[kind] for kind in ("webp", "png", "jpg") if kind in sample), None)
            info = sample.get("json")
            if image is None or not {"concept", "style"} <= set(info or ()):
                raise ConfigError(
                    f"--shards: sample {sample['__key__']} has no image or no concept and style in its json"
                )
            pixels = torch.tensor(image).permute(2, 0, 1)[None]
            if pixels.shape[-2:] != (resolution, resolution):
                pixels = F.interpolate(pixels, (resolution, resolution), mode="bilinear", antialias=True)
            images.append(pixels)
            self.concepts.append(info["concept"])
            self.styles.append(info["style"])
            self.splits.append(info.get("split", ""))
        if not images:
            raise ConfigError(f"--shards {' '.join(shards)}: hold no sample")
        self.images = torch.cat(images)  # (N, 3, H, W) uint8

    def __len__(self) -> int:
        return len(self.images)

    def pixels(self, indices: Tensor | slice) -> Tensor:
        """(B, 3, H, W) in -1..1."""
        return self.images[indices].float() / 127.5 - 1

    def draw(self, seed: int, step: int, count: int) -> tuple[Tensor, torch.Generator]:
        """Return the rows of a step and the generator of its other draws."""
        generator = torch.Generator().manual_seed(seed * 10**6 + step)
        return torch.randint(len(self), (count,), generator=generator), generator


class PicturesCodec:
    steps, lr, batch = 2400, 2e-3, 32
    noise = 0.1  # on latents of unit deviation

    def __init__(self, seed: int, shards: list[str], test_shards: list[str]) -> None:
        from diffusers import AutoencoderDC

        channels = (16, 16, 64, 128, 256)
        self.seed = seed
        self.module = self.shipped = AutoencoderDC(
            latent_channels=32,
            encoder_block_out_channels=channels,
            decoder_block_out_channels=channels,
            encoder_layers_per_block=(0, 1, 1, 1, 1),
            decoder_layers_per_block=(0, 1, 1, 2, 2),
            encoder_block_types="ResBlock",
            decoder_block_types="ResBlock",
            encoder_qkv_multiscales=((),) * 5,
            decoder_qkv_multiscales=((),) * 5,
            encoder_out_shortcut=False,
            decoder_in_shortcut=False,
            scaling_factor=1.0,
        )
        self.module.to(memory_format=torch.channels_last)
        self.data, self.test_shards = Pictures(shards), test_shards
        self.reconstruct = torch.compile(self._reconstruct)

    def _reconstruct(self, pixels: Tensor, noise: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            latents = self.module.encode(pixels).latent.float()  # (B, 32, 8, 8)
            deviation, mean = torch.std_mean(latents, dim=(0, 2, 3), keepdim=True)
            return self.module.decode((latents - mean) / deviation + self.noise * noise).sample.float()

    def loss(self, step: int) -> Tensor:
        """Squared plus 0.3 absolute error of what noisy latents decode to; shifted and mirrored pictures."""
        rows, generator = self.data.draw(self.seed, step, self.batch)
        pixels = self.data.pixels(rows)
        shift, mirror = torch.randint(-8, 9, (2,), generator=generator).tolist(), step % 2
        pixels = F.pad(pixels, (8,) * 4, value=1.0).roll(shift, (2, 3))[..., 8:-8, 8:-8]
        pixels = (pixels.flip(-1) if mirror else pixels).contiguous(memory_format=torch.channels_last)
        side = RESOLUTION // 16
        noise = torch.randn((self.batch, 32, side, side), generator=generator)
        error = self.reconstruct(pixels, noise) - pixels
        return error.square().mean() + 0.3 * error.abs().mean()

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        """Latents get mean 0 and deviation 1 per channel; the decoder was trained on just that."""
        latents = torch.cat(
            [
                self.module.encode(self.data.pixels(slice(start, start + 64))).latent
                for start in range(0, 2048, 64)
            ]
        )
        deviation, mean = torch.std_mean(latents, dim=(0, 2, 3))
        out = self.module.encoder.conv_out
        out.weight /= deviation[:, None, None, None]
        out.bias.sub_(mean).div_(deviation)
        self.shipped.half().save_pretrained(folder, safe_serialization=True)

    @torch.no_grad()
    def measure(self, folder: Path) -> dict:
        codec = AutoencoderDCCodec(load_autoencoder_dc(str(folder), torch.float32))
        results = {}
        for name, data in (("train", self.data), ("test", Pictures(self.test_shards))):
            pixels = data.pixels(slice(0, 463))
            latents = torch.cat([codec.normalize(codec.encode_pixels(part)) for part in pixels.split(50)])
            results |= {f"pictures_{name}": len(pixels), f"latent_std_{name}": round(latents.std().item(), 4)}
            for noise in (0.0, 0.1, 0.2):
                noisy = latents + noise * torch.randn(
                    latents.shape, generator=torch.Generator().manual_seed(0)
                )
                decoded = torch.cat([codec.decode(part) for part in noisy.split(50)])
                mse = ((decoded - pixels) / 2).square().mean(dim=(1, 2, 3))
                key = f"psnr_{name}" + (f"_noise{noise}" if noise else "")
                results[key] = round((-10 * mse.log10()).mean().item(), 2)
        return results


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, scale and shift each picture a little on white, soften every second one, and add noise; no mirroring,
    because arrows and letters mean something else in a mirror. (B, 3, H, W) in -1..1."""
    count = len(pixels)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    angle, scale = uniform(-0.15, 0.15), uniform(0.87, 1.15)
    matrix = torch.stack(
        [
            torch.stack([scale * angle.cos(), -scale * angle.sin(), uniform(-0.12, 0.12)], -1),
            torch.stack([scale * angle.sin(), scale * angle.cos(), uniform(-0.12, 0.12)], -1),
        ],
        dim=1,
    )  # (B, 2, 3)
    grid = F.affine_grid(matrix, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels - 1, grid, align_corners=False) + 1  # outside is white
    small = F.avg_pool2d(moved, 3, stride=1, padding=1, count_include_pad=False)
    softened = torch.where((uniform(0, 1) < 0.5)[:, None, None, None], small, moved)
    noise = torch.randn(pixels.shape, generator=generator)
    return softened * uniform(0.9, 1.1)[:, None, None, None] + 0.03 * noise


class ConceptTask:
    """What REPA's target and the judge share: concept and style of augmented pictures, told from an embedding."""

    batch: int
    temperature = 0.07  # of the cosine between an embedding and its concept's

    def __init__(self, seed: int, shards: list[str], test_shards: list[str]) -> None:
        self.seed, self.test_shards = seed, test_shards
        self.data = Pictures(shards)
        self.concept_names, self.style_names = sorted(set(self.data.concepts)), sorted(set(self.data.styles))
        self.concepts = torch.tensor([self.concept_names.index(name) for name in self.data.concepts])
        self.styles = torch.tensor([self.style_names.index(name) for name in self.data.styles])
        self.shipped, width = self.network()
        self.module = nn.ModuleDict(
            {
                "network": self.shipped,
                "concept": nn.Linear(width, len(self.concept_names), bias=False),
                "style": nn.Linear(width, len(self.style_names)),
            }
        )

    def network(self) -> tuple[nn.Module, int]:
        """Return the network and the width of its embedding."""
        raise NotImplementedError

    def embed(self, pixels: Tensor) -> Tensor:
        """(B, D) embeddings."""
        raise NotImplementedError

    def loss(self, step: int) -> Tensor:
        """Cross entropy of the concept (cosine classifier) and of the style."""
        rows, generator = self.data.draw(self.seed, step, self.batch)
        pixels = augment(self.data.pixels(rows), generator)
        with torch.autocast("cpu", torch.bfloat16):
            embedding = self.embed(pixels)
        embedding = embedding.float()
        cosine = F.normalize(embedding, dim=-1) @ F.normalize(self.module["concept"].weight, dim=-1).T
        concept = F.cross_entropy(cosine / self.temperature, self.concepts[rows])
        return concept + F.cross_entropy(self.module["style"](embedding), self.styles[rows])

    @torch.no_grad()
    def measure_heads(self) -> dict:
        """Share of the held-out pictures whose style is told right, and whose concept is among the first 10 of those
        the network knows (unseen pairs only)."""
        test = Pictures(self.test_shards)
        self.module.eval()
        embedding = torch.cat([self.embed(part) for part in test.pixels(slice(None)).split(100)]).float()
        styles = torch.tensor([self.style_names.index(name) for name in test.styles])
        right = self.module["style"].float()(embedding).argmax(-1) == styles
        known = torch.tensor([name in self.concept_names for name in test.concepts])
        concepts = torch.tensor(
            [self.concept_names.index(name) for name in test.concepts if name in self.concept_names]
        )
        weight = F.normalize(self.module["concept"].weight.float(), dim=-1)
        cosine = F.normalize(embedding[known], dim=-1) @ weight.T
        first = (cosine.topk(10).indices == concepts[:, None]).any(-1)
        return {
            "pictures": len(test),
            "style_right": round(right.float().mean().item(), 4),
            "concept_in_10": round(first.float().mean().item(), 4),
            "concept_right": round((cosine.argmax(-1) == concepts).float().mean().item(), 4),
        }


VIT = {"img_size": RESOLUTION, "patch_size": 16, "embed_dim": 128, "depth": 4, "num_heads": 4}


class PicturesVision(ConceptTask):
    steps, lr, batch = 1500, 1e-3, 64

    def network(self) -> tuple[nn.Module, int]:
        import timm

        return timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True, **VIT), 128

    def embed(self, pixels: Tensor) -> Tensor:
        side = RESOLUTION // VIT["patch_size"]
        return patch_tokens(self.shipped, pixels, (side, side)).mean(1)

    def export(self, folder: Path) -> None:
        from timm.models import save_for_hf

        save_for_hf(self.shipped.half(), folder, model_args=VIT, safe_serialization=True)

    def measure(self, folder: Path) -> dict:
        self.shipped.float()
        return self.measure_heads()


@torch.no_grad()
def reconstructions(folder: str, data: Pictures) -> Tensor:
    """(N, 3, H, W) uint8: the pictures encoded and decoded."""
    codec = AutoencoderDCCodec(load_autoencoder_dc(folder, torch.bfloat16))
    parts = [
        codec.decode(codec.normalize(codec.encode_pixels(data.pixels(rows))))
        for rows in progress.bar(torch.arange(len(data)).split(64), desc="reconstructions")
    ]
    return torch.cat([((part + 1) * 127.5).round().to(torch.uint8) for part in parts])


class PicturesJudge(ConceptTask):
    """The judge of generated pictures. The concepts and styles it learns are those of the training shards; the gallery
    it is shipped with holds all real pictures, held-out ones too, which it has not learnt from."""

    steps, lr, batch = 1600, 2e-3, 64
    size, width = 80, 128  # pixels a side it sees; of the embedding

    def __init__(
        self, seed: int, shards: list[str], test_shards: list[str], codec: str | None = None
    ) -> None:
        super().__init__(seed, shards, test_shards)
        # with a codec half of the pictures are seen as it renders them, as all drawn ones are
        self.rendered = None if codec is None else reconstructions(codec, self.data)

    def network(self) -> tuple[nn.Module, int]:
        import timm

        self.outputs = self.width + len(self.style_names)
        network = timm.create_model("resnet10t", num_classes=self.outputs)
        return network.to(memory_format=torch.channels_last), self.width

    def loss(self, step: int) -> Tensor:
        """Cross entropy of the concept (cosine classifier) and of the style, from one network's outputs."""
        rows, generator = self.data.draw(self.seed, step, self.batch)
        pixels = self.data.pixels(rows)
        if self.rendered is not None:
            half = torch.rand(self.batch, generator=generator) < 0.5
            pixels[half] = self.rendered[rows[half]].float() / 127.5 - 1
        pixels = augment(pixels, generator)
        with torch.autocast("cpu", torch.bfloat16):
            embedding, styles = embed(self.shipped, pixels, self.size, self.width)
        cosine = embedding.float() @ F.normalize(self.module["concept"].weight, dim=-1).T
        concept = F.cross_entropy(cosine / self.temperature, self.concepts[rows])
        return concept + F.nll_loss(styles.float(), self.styles[rows])

    def export(self, folder: Path) -> None:
        from timm.models import save_for_hf

        self.shipped.eval()
        test = Pictures(self.test_shards)
        concepts = sorted({*self.concept_names, *test.concepts})
        embeddings = []
        with torch.no_grad():
            for data in (self.data, test):
                for start in range(0, len(data), 100):
                    pixels = data.pixels(slice(start, start + 100))
                    embeddings.append(embed(self.shipped, pixels, self.size, self.width)[0])
        gallery = {
            "embeddings": torch.cat(embeddings).half(),
            "concept": torch.tensor([concepts.index(name) for name in self.data.concepts + test.concepts]),
            "style": torch.tensor([self.style_names.index(name) for name in self.data.styles + test.styles]),
            "is_train": torch.tensor([True] * len(self.data) + [False] * len(test)),
        }
        save_file(gallery, folder / GALLERY)
        names = {"size": self.size, "width": self.width, "style": self.style_names, "concept": concepts}
        (folder / JUDGE).write_text(json.dumps(names) + "\n")
        plain = self.shipped.half().to(memory_format=torch.contiguous_format)
        save_for_hf(plain, folder, safe_serialization=True)

    @torch.no_grad()
    def measure(self, folder: Path) -> dict:
        """On held-out pictures, moved and softened as in training: what is right, and the rank of the true picture."""
        judge, test = Retrieval(str(folder)), Pictures(self.test_shards)
        pixels = augment(test.pixels(slice(None)), torch.Generator().manual_seed(0))
        info = [dict(concept=concept, style=style) for concept, style in zip(test.concepts, test.styles)]
        verdicts = [
            verdict
            for rows in torch.arange(len(test)).split(100)
            for verdict in judge.judge(pixels[rows], [info[row] for row in rows])
        ]
        return {
            "pictures": len(test),
            "style_right": sum(v.style == style for v, style in zip(verdicts, test.styles)) / len(test),
            "rank_1": sum(v.rank == 1 for v in verdicts) / len(test),
            "rank_10": sum(v.rank <= 10 for v in verdicts) / len(test),
        }
