"""The domain of real pictures: concepts in several styles (configs/emoji, docs/emoji.md). One command for each part.

    python tools/emoji.py codec|vision|style|judge --out FOLDER      train a component; stopped, the same command goes on
    python tools/emoji.py baselines --judge FOLDER --codec FOLDER      what the scores are to be held against
    python tools/emoji.py grid WEIGHTS --out docs/img/emoji.png        concepts by styles

All take --shards (training) and --test-shards (held out: measured on, never learnt from): webdataset tars of
`KEY.webp|png|jpg` and `KEY.json` with `concept` and `style`.

* `PicturesCodec`: diffusers' AutoencoderDC, 128 px -> 32 x 8 x 8, with noise on its latents as for `shapes`.
* `PicturesVision`: a timm vision transformer that tells concept and style of augmented pictures: the target of REPA.
* `PicturesStyle`: a small convolutional network that tells the style, a part of the judge.
* `PicturesJudge`: a convolutional network of its own seed and kind for evaluation (nitro_e/rewards/retrieval.py): an
  embedding in which pictures of one concept lie together.

`baselines` scores pictures that need no generative model, against the same held-out captions: the real pictures; what
the codec makes of them; a training picture of the same concept in another style (of an unseen concept: the one with most
words in common); the training picture of the same style whose concept has most words in common; and the training
picture nearest to the true one by the judge, the best that copying could do.

`grid` draws the first concepts with a held-out style, a column each, in all styles from the same noise. Cells that training never
showed have a red frame.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from torch import Tensor, nn

from nitro_e.cli import common as cli
from nitro_e.config import ConfigError
from nitro_e.data.catalog import expand_shards
from nitro_e.encoders.codec import AutoencoderDCCodec, load_autoencoder_dc
from nitro_e.encoders.vision import patch_tokens
from nitro_e.record import progress
from nitro_e.rewards.retrieval import GALLERY, JUDGE, STYLE, Retrieval, StyleNetwork, embed
from nitro_e.sampling.pipeline import TextToImage
from nitro_e.sampling.sheets import wrap
from nitro_e.training.components import train_component

RESOLUTION = 128
STYLES = ("glossy", "flat", "noto", "twemoji", "outlined")
CELL, CONCEPTS, FRAME = 128, 8, "#d62728"


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
                    f"--shards: sample {Path(sample['__key__']).name} has no image or no concept and style in its json"
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
    channels = (16, 16, 64, 128, 256)
    compiled = True

    def __init__(self, seed: int, shards: list[str], test_shards: list[str]) -> None:
        from diffusers import AutoencoderDC

        self.seed = seed
        self.module = self.shipped = AutoencoderDC(
            latent_channels=32,
            encoder_block_out_channels=self.channels,
            decoder_block_out_channels=self.channels,
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
        self.reconstruct = torch.compile(self._reconstruct) if self.compiled else self._reconstruct

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
        pixels = self.data.pixels(slice(0, 2048))
        latents = torch.cat([self.module.encode(part).latent for part in pixels.split(64)])
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
        first = (cosine.topk(min(10, len(weight))).indices == concepts[:, None]).any(-1)
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


class Rendered:
    """Pictures of which half are seen as a codec renders them, as all drawn ones are."""

    batch: int
    data: Pictures

    def render(self, codec: str | None) -> None:
        self.rendered = None if codec is None else reconstructions(codec, self.data)

    def batch_of(self, seed: int, step: int) -> tuple[Tensor, Tensor, torch.Generator]:
        """Return rows and pixels of a step, and the generator of its other draws."""
        rows, generator = self.data.draw(seed, step, self.batch)
        pixels = self.data.pixels(rows)
        if self.rendered is not None:
            half = torch.rand(self.batch, generator=generator) < 0.5
            pixels[half] = self.rendered[rows[half]].float() / 127.5 - 1
        return rows, pixels, generator


class PicturesStyle(Rendered):
    """What tells the judge the style; moved and mirrored pictures with a little noise, colours as they are."""

    steps, lr, batch = 6000, 2e-3, 64
    smoothing = 0.05  # of the labels

    def __init__(
        self, seed: int, shards: list[str], test_shards: list[str], codec: str | None = None
    ) -> None:
        self.seed, self.data, self.test_shards = seed, Pictures(shards), test_shards
        self.render(codec)
        self.names = sorted(set(self.data.styles))
        self.styles = torch.tensor([self.names.index(name) for name in self.data.styles])
        self.module = self.shipped = StyleNetwork(len(self.names)).to(memory_format=torch.channels_last)

    def loss(self, step: int) -> Tensor:
        """Cross entropy of the style."""
        rows, pixels, generator = self.batch_of(self.seed, step)
        shift = torch.randint(-6, 7, (2,), generator=generator).tolist()
        pixels = F.pad(pixels, (8,) * 4, value=1.0).roll(shift, (2, 3))[..., 8:-8, 8:-8]
        pixels = (pixels.flip(-1) if step % 2 else pixels) + 0.02 * torch.randn(
            pixels.shape, generator=generator
        )
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.module(pixels.contiguous(memory_format=torch.channels_last))
        return F.cross_entropy(logits.float(), self.styles[rows], label_smoothing=self.smoothing)

    def export(self, folder: Path) -> None:
        plain = self.shipped.eval().to(memory_format=torch.contiguous_format)
        save_file(plain.state_dict(), folder / STYLE)

    @torch.no_grad()
    def measure(self, folder: Path) -> dict:
        """The share of held-out pictures whose style is told right, by whether other styles of the concept were seen."""
        test = Pictures(self.test_shards)
        found = torch.cat(
            [self.module(test.pixels(rows)) for rows in torch.arange(len(test)).split(100)]
        ).argmax(-1)
        right = [self.names[row] == style for row, style in zip(found.tolist(), test.styles)]
        shares = {"pictures": len(test), "style_right": sum(right) / len(test)}
        for split in sorted(set(test.splits)):
            of_split = [value for value, name in zip(right, test.splits) if name == split]
            shares[f"style_right_{split.replace(' ', '_')}"] = round(sum(of_split) / len(of_split), 4)
        return shares


class PicturesJudge(Rendered, ConceptTask):
    """The judge of generated pictures. The concepts and styles it learns are those of the training shards; the gallery
    it is shipped with holds all real pictures, held-out ones too, which it has not learnt from."""

    steps, lr, batch = 1600, 2e-3, 64
    size, width = 80, 128  # pixels a side it sees; of the embedding

    def __init__(
        self, seed: int, shards: list[str], test_shards: list[str], style: str, codec: str | None = None
    ) -> None:
        super().__init__(seed, shards, test_shards)
        self.render(codec)
        self.style = style

    def network(self) -> tuple[nn.Module, int]:
        import timm

        self.outputs = self.width + len(self.style_names)
        network = timm.create_model("resnet10t", num_classes=self.outputs)
        return network.to(memory_format=torch.channels_last), self.width

    def loss(self, step: int) -> Tensor:
        """Cross entropy of the concept (cosine classifier) and of the style, from one network's outputs."""
        rows, pixels, generator = self.batch_of(self.seed, step)
        pixels = augment(pixels, generator)
        with torch.autocast("cpu", torch.bfloat16):
            embedding, styles = embed(self.shipped, pixels, self.size, self.width)
        cosine = embedding.float() @ F.normalize(self.module["concept"].weight, dim=-1).T
        concept = F.cross_entropy(cosine / self.temperature, self.concepts[rows])
        return concept + F.cross_entropy(styles.float(), self.styles[rows])

    def export(self, folder: Path) -> None:
        from timm.models import save_for_hf

        self.shipped.eval()
        test = Pictures(self.test_shards)
        concepts = sorted({*self.concept_names, *test.concepts})
        embeddings = []
        with torch.no_grad():
            for data in (self.data, test):
                for rows in torch.arange(len(data)).split(100):
                    embeddings.append(embed(self.shipped, data.pixels(rows), self.size, self.width)[0])
        gallery = {
            "embeddings": torch.cat(embeddings).half(),
            "concept": torch.tensor([concepts.index(name) for name in self.data.concepts + test.concepts]),
            "style": torch.tensor([self.style_names.index(name) for name in self.data.styles + test.styles]),
            "is_train": torch.tensor([True] * len(self.data) + [False] * len(test)),
        }
        save_file(gallery, folder / GALLERY)
        shutil.copy(Path(self.style) / STYLE, folder / STYLE)
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


COMPONENTS = {
    "codec": PicturesCodec,
    "vision": PicturesVision,
    "style": PicturesStyle,
    "judge": PicturesJudge,
}


def main(argv: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    parsers = {name: commands.add_parser(name) for name in (*COMPONENTS, "baselines", "grid")}
    for name, command in parsers.items():
        command.add_argument("--shards", nargs="+", required=True, help="tars of training pictures")
        command.add_argument("--test-shards", nargs="+", required=True, help="tars of held-out pictures")
        command.add_argument("--out", type=Path, required=name in COMPONENTS)
        if name in COMPONENTS:
            command.add_argument("--steps", type=int, default=COMPONENTS[name].steps)
            command.add_argument("--seed", type=cli.seed, default=0, metavar="N")
    for name in ("style", "judge"):
        parsers[name].add_argument(
            "--codec", metavar="FOLDER", help="see half of the pictures through this codec"
        )
    parsers["judge"].add_argument("--style", required=True, metavar="FOLDER", help="what `style` has trained")
    parsers["baselines"].add_argument("--judge", required=True, metavar="FOLDER")
    parsers["baselines"].add_argument("--codec", required=True, metavar="FOLDER")
    parsers["grid"].add_argument("weights", help="as for nitro-e sample")
    parsers["grid"].add_argument("--steps", type=int, default=20)
    parsers["grid"].add_argument("--guidance", type=float, default=3.0)
    parsers["grid"].add_argument("--concepts", type=int, default=CONCEPTS)
    options = parser.parse_args(argv)
    work = {"baselines": write_baselines, "grid": write_grid}.get(options.command, train)
    return cli.run(lambda: work(options))


def train(options: argparse.Namespace) -> None:
    """Train the component, measure and export it."""
    torch.manual_seed(options.seed)
    shards = expand_shards(options.shards, "--shards"), expand_shards(options.test_shards, "--test-shards")
    more = {name: getattr(options, name) for name in ("codec", "style") if getattr(options, name, None)}
    command = f"python tools/emoji.py {options.command} --seed {options.seed} --steps {options.steps}"
    command += "".join(f" --{name} {name.upper()}" for name in more)
    train_component(
        lambda: COMPONENTS[options.command](options.seed, *shards, **more),
        options.out,
        options.steps,
        command,
    )


def write_baselines(options: argparse.Namespace) -> None:
    """Print and write the share of held-out pictures that each baseline gets right, by split."""
    train = Pictures(expand_shards(options.shards, "--shards"))
    test = Pictures(expand_shards(options.test_shards, "--test-shards"))
    judge = Retrieval(options.judge)
    codec = AutoencoderDCCodec(load_autoencoder_dc(options.codec, torch.float32))
    real = test.pixels(slice(None))
    with torch.no_grad():
        decoded = torch.cat(
            [codec.decode(codec.normalize(codec.encode_pixels(part))) for part in real.split(50)]
        )
        rows = {
            "the real pictures": real,
            "the real pictures through the codec": decoded,
            "same concept, another style": train.pixels(nearest_words(train, test, same_style=False)),
            "same style, nearest concept": train.pixels(nearest_words(train, test, same_style=True)),
            "training picture nearest to the true one": train.pixels(nearest_pictures(judge, train, real)),
        }
        results = {name: score(judge, pixels, test) for name, pixels in rows.items()}
    text = json.dumps(results, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def nearest_words(train: Pictures, test: Pictures, same_style: bool) -> Tensor:
    """For each held-out picture the training picture whose concept has the largest share of words in common."""
    words = [set(concept.split()) for concept in train.concepts]
    found = []
    for concept, style in zip(test.concepts, test.styles):
        wanted = set(concept.split())
        allowed = [row for row, other in enumerate(train.styles) if (other == style) == same_style]
        found.append(max(allowed, key=lambda row: len(wanted & words[row]) / len(wanted | words[row])))
    return torch.tensor(found)


def nearest_pictures(judge: Retrieval, train: Pictures, real: Tensor) -> Tensor:
    shown = torch.cat([judge.embed(train.pixels(rows))[0] for rows in torch.arange(len(train)).split(100)])
    true = torch.cat([judge.embed(part)[0] for part in real.split(100)])
    return (true @ shown.T).argmax(1)


def score(judge: Retrieval, pixels: Tensor, test: Pictures) -> dict:
    """Return shares by split: style right, true picture first, among the first ten, both; and the mean distance."""
    info = [dict(concept=concept, style=style) for concept, style in zip(test.concepts, test.styles)]
    verdicts = [
        verdict
        for rows in torch.arange(len(pixels)).split(100)
        for verdict in judge.judge(pixels[rows], [info[row] for row in rows])
    ]
    results = {}
    for split in sorted(set(test.splits)):
        pairs = [(verdict, record) for verdict, record, of in zip(verdicts, info, test.splits) if of == split]
        right = [verdict.style == record["style"] for verdict, record in pairs]
        first = [verdict.rank <= 10 for verdict, _ in pairs]
        columns = {
            "style": right,
            "first": [verdict.rank == 1 for verdict, _ in pairs],
            "first 10": first,
            "style and first 10": [a and b for a, b in zip(right, first)],
            "novelty": [verdict.distance for verdict, _ in pairs],
        }
        results[split] = {"pictures": len(pairs)} | {
            name: round(sum(values) / len(pairs), 3) for name, values in columns.items()
        }
    return results


def write_grid(options: argparse.Namespace) -> None:
    """Draw concepts by styles; red frames stand for what training never showed."""
    train = Pictures(expand_shards(options.shards, "--shards"))
    test = Pictures(expand_shards(options.test_shards, "--test-shards"))
    shown = set(zip(train.concepts, train.styles))
    concepts = list(
        dict.fromkeys(c for c, split in zip(test.concepts, test.splits) if split == "unseen pair")
    )
    concepts = concepts[: options.concepts]
    pipeline = TextToImage.from_pretrained(options.weights)
    left, top, cell = 80, 40, CELL + 8
    sheet = Image.new("RGB", (left + len(concepts) * cell, top + len(STYLES) * cell), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for row, style in enumerate(STYLES):
        draw.text((4, top + row * cell + CELL // 2 - 8), style, "black", font)
    for column, concept in enumerate(concepts):
        prompts = [f"an emoji of {concept}, {style} style" for style in STYLES]
        images = pipeline(
            prompts,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            generator=[torch.Generator().manual_seed(column) for _ in prompts],
        ).images
        x = left + column * cell
        draw.text((x + 4, 4), wrap(concept, font, CELL, 2), "black", font)
        for row, (style, image) in enumerate(zip(STYLES, images)):
            y = top + row * cell
            sheet.paste(image, (x + 4, y + 4))
            if (concept, style) not in shown:
                draw.rectangle((x + 1, y + 1, x + CELL + 6, y + CELL + 6), outline=FRAME, width=3)
    out = options.out or Path("outputs/emoji.png")
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(256).save(out, optimize=True)
    print(out)


if __name__ == "__main__":
    sys.exit(main())
