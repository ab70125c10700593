"""Train the frozen encoders of the offline domain, which the package ships: one command each.

    python tools/train_components.py codec       # a small AutoencoderDC, f8c8
    python tools/train_components.py text        # a small Llama that reads captions
    python tools/train_components.py vision      # a small ViT, the target of REPA

Each trains on rendered scenes of the train split, measures itself on others (metrics.json: what and how many), and
writes a folder that the library class of the real component loads. Stopped, the same command goes on.

* `CodecTask`: diffusers' AutoencoderDC, 64 px -> 8 x 8 x 8. Noise is added to its normalised latents, so that what a
  diffusion model gets slightly wrong still decodes. The normalisation (mean 0, deviation 1 per channel over rendered
  scenes) is folded into the convolutions next to the latents; so the scaling factor is 1.
* `TextTask`: transformers' LlamaModel over the words of the captions. Next-word prediction, and linear probes that read
  the request off the padded rows, which the denoiser attends to: text features in which words are bound to each other.
* `VisionTask`: a timm vision transformer whose tokens tell, for each cell, which object covers it and where its centre
  is. A supervised stand-in for DINOv2.

Images are of the train split only. Captions are of both, as a real language
model has read of things no image of the training set shows: trained on those of the train split alone, the reader
misread a quarter of the held-out captions.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nitro_e.cli import common as cli
from nitro_e.encoders.vision import patch_tokens
from nitro_e.files import SHIPPED
from nitro_e.shapes.judge import judge
from nitro_e.shapes.render import render
from nitro_e.shapes.scenes import (
    COLORS,
    MAX_WORDS,
    OPPOSITE,
    RELATIONS,
    SHAPES,
    TASKS,
    WORDS,
    Request,
    Scene,
    caption,
    draw_request,
    metadata,
    scene,
)
from nitro_e.training.components import train_component

RESOLUTION = 64
GRID = 8  # cells per side
TRAIN_SCENES, TEST_SCENES = 32768, 1200
TEST_SEED = 10**6  # scenes no training run uses


class Scenes:
    """Rendered scenes of a split, made once and held as uint8."""

    def __init__(self, num: int, seed: int, split: str = "train") -> None:
        self.scenes: list[Scene] = [scene(seed, split, index) for index in range(num)]
        self.images = np.stack([render(drawn, RESOLUTION) for drawn in self.scenes])

    def pixels(self, indices: np.ndarray | slice) -> Tensor:
        """(B, 3, H, W) in -1..1."""
        return torch.from_numpy(self.images[indices]).permute(0, 3, 1, 2).float() / 127.5 - 1

    def cells(self) -> tuple[Tensor, Tensor]:
        """`cell_targets` of all scenes: (N, cells, 2) classes and places."""
        pairs = zip(*(cell_targets(drawn) for drawn in self.scenes))
        return tuple(torch.from_numpy(np.stack(parts)).flatten(1, 2) for parts in pairs)

    def draw(self, seed: int, step: int, count: int) -> np.ndarray:
        return np.random.default_rng([seed, step]).integers(len(self.scenes), size=count)


class CodecTask:
    steps, lr, batch = 2000, 2e-3, 32
    noise = 0.1  # on latents of unit deviation

    def __init__(self, seed: int) -> None:
        from diffusers import AutoencoderDC

        self.seed = seed
        self.module = self.shipped = AutoencoderDC(
            latent_channels=8,
            encoder_block_out_channels=(16, 32, 64, 128),
            decoder_block_out_channels=(16, 32, 64, 128),
            encoder_layers_per_block=(0, 1, 1, 1),
            decoder_layers_per_block=(0, 1, 2, 2),
            encoder_qkv_multiscales=((),) * 4,
            decoder_qkv_multiscales=((),) * 4,
            encoder_out_shortcut=False,
            decoder_in_shortcut=False,
            scaling_factor=1.0,
        )
        self.module.to(memory_format=torch.channels_last)
        self.data = Scenes(TRAIN_SCENES // 2, seed)

    def loss(self, step: int) -> Tensor:
        """Squared plus 0.3 absolute error of what noisy latents decode to."""
        pixels = self.data.pixels(self.data.draw(self.seed, step, self.batch))
        pixels = pixels.to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            latents = self.module.encode(pixels).latent.float()  # (B, 8, 8, 8)
            deviation, mean = torch.std_mean(latents, dim=(0, 2, 3), keepdim=True)
            noise = torch.randn(
                latents.shape, generator=torch.Generator().manual_seed(self.seed * 10**6 + step)
            )
            decoded = self.module.decode((latents - mean) / deviation + self.noise * noise).sample.float()
        error = decoded - pixels
        return error.square().mean() + 0.3 * error.abs().mean()

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        """Latents get mean 0 and deviation 1 per channel; the decoder was trained on just that."""
        latents = self.module.encode(self.data.pixels(slice(0, 2048))).latent
        deviation, mean = torch.std_mean(latents, dim=(0, 2, 3))
        out = self.module.encoder.conv_out
        out.weight /= deviation[:, None, None, None]
        out.bias.sub_(mean).div_(deviation)
        self.shipped.half().save_pretrained(folder, safe_serialization=True)

    def measure(self, folder: Path) -> dict:
        from nitro_e.encoders.codec import AutoencoderDCCodec, load_autoencoder_dc

        codec = AutoencoderDCCodec(load_autoencoder_dc(str(folder), torch.float32))
        data = Scenes(TEST_SCENES, TEST_SEED)
        pixels = data.pixels(slice(None))
        latents = torch.cat([codec.normalize(codec.encode_pixels(part)) for part in pixels.split(100)])
        infos = [metadata(drawn.request) for drawn in data.scenes]
        results = {"scenes": len(infos), "latent_std": round(latents.std().item(), 4)}
        for noise in (0.0, 0.1, 0.2, 0.3):
            noisy = latents + noise * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
            decoded = torch.cat([codec.decode(part) for part in noisy.split(100)])
            mse = ((decoded - pixels) / 2).square().mean(dim=(1, 2, 3))
            name = f"_noise{noise}" if noise else ""
            results[f"psnr{name}"] = round((-10 * mse.log10()).mean().item(), 2)
            results[f"strict{name}"] = float(np.mean([verdict.strict for verdict in judge(decoded, infos)]))
        return results


ATTRIBUTES = {  # what a caption says of its first and second thing; the last class is "nothing"
    "shape": [*SHAPES, None],
    "color": [*COLORS, None],
    "count": [1, 2, 3, 4, None],
    "relation": [*RELATIONS, None],  # of this thing to the other
}
LENGTH = MAX_WORDS + 5  # the begin token, the words, and four padded rows at least


ROPE_THETA = 1000.0  # of the text encoder


def add_keys(file: Path, **keys: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys, indent=2) + "\n")


def parse_targets(request: Request) -> list[int]:
    """The class of every attribute of the first, then of the second thing."""
    targets = []
    for place in range(2):
        thing = request.things[place] if place < len(request.things) else None
        relation = request.relation if place == 0 else OPPOSITE.get(request.relation)
        values = (thing.name, thing.color, thing.count, relation) if thing else (None, None, None, None)
        targets += [ATTRIBUTES[name].index(value) for name, value in zip(ATTRIBUTES, values)]
    return targets


def word_tokenizer():
    """A fast tokenizer of lower-cased words: begin token first; punctuation is split off and unknown."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(("<unk>", "<s>", "</s>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=LENGTH,
    )


class Reader(nn.Module):
    """A language model without head, the head, and the probes of its padded rows."""

    def __init__(self, vocabulary: int) -> None:
        from transformers import LlamaConfig, LlamaModel

        super().__init__()
        self.model = LlamaModel(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=128,
                intermediate_size=256,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=LENGTH,
                rope_theta=ROPE_THETA,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=2,
            )
        )
        self.words = nn.Linear(128, vocabulary)
        self.probes = nn.ModuleList(nn.Linear(128, len(values)) for values in 2 * list(ATTRIBUTES.values()))


class TextTask:
    steps, lr, batch = 300, 2e-3, 128
    repeats = 2000  # captions of each task, with and without colors

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.tokenizer = word_tokenizer()
        self.module = Reader(len(self.tokenizer))
        self.shipped = self.module.model
        rng = np.random.default_rng(seed)
        requests = [
            draw_request(rng, tag, colored)
            for _ in range(self.repeats)
            for tag in TASKS
            for colored in (False, True)
        ]
        self.captions = [caption(request) for request in requests]
        self.targets = torch.tensor([parse_targets(request) for request in requests])  # (N, 8)
        self.ids, self.mask = self._tokens([*self.captions, ""])  # (N + 1, L)

    def _tokens(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        self.tokenizer.pad_token = self.tokenizer.eos_token
        rows = self.tokenizer(captions, padding="max_length", max_length=LENGTH, return_tensors="pt")
        return rows["input_ids"], rows["attention_mask"]

    def loss(self, step: int) -> Tensor:
        """Next-word cross entropy, the end token included, plus that of the probes, averaged over padded rows."""
        rows = torch.from_numpy(
            np.random.default_rng([self.seed, step]).integers(len(self.captions), size=self.batch)
        )
        ids, mask = self.ids[rows], self.mask[rows]
        hidden = self.module.model(
            input_ids=ids, attention_mask=mask, use_cache=False
        ).last_hidden_state  # (B, L, D)
        counted = mask[:, :-1].bool()  # the last word predicts the first padding: the end token
        loss = F.cross_entropy(self.module.words(hidden[:, :-1])[counted], ids[:, 1:][counted])
        padded = mask == 0
        sentence = padded.nonzero()[:, 0]
        for probe, target in zip(self.module.probes, self.targets[rows].T):
            loss = loss + F.cross_entropy(probe(hidden[padded]), target[sentence]) / len(self.module.probes)
        return loss

    def export(self, folder: Path) -> None:
        self.shipped.half().save_pretrained(folder, safe_serialization=True)
        self.tokenizer.save_pretrained(folder)
        # Transformers 5 writes names that 4 does not know: it would refuse the one and overlook the other.
        add_keys(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
        add_keys(folder / "config.json", rope_theta=ROPE_THETA)

    @torch.no_grad()
    def measure(self, folder: Path) -> dict:
        """Share of captions of which the probes read every attribute right, from every padded row."""
        from nitro_e.encoders.text import LlamaText, load_llama

        encoder = LlamaText(*load_llama(str(folder), torch.float32), length=LENGTH)
        results = {}
        for name, seen in (("seen", True), ("unseen", False)):
            requests = {scene(TEST_SEED, "heldout", index).request for index in range(6000)}
            requests = sorted((r for r in requests if metadata(r)["seen"] == seen), key=str)
            embedding = encoder.encode([caption(request) for request in requests])
            targets = torch.tensor([parse_targets(request) for request in requests])
            right = torch.ones(len(requests), dtype=torch.bool)
            for column, probe in enumerate(self.module.probes.float()):
                classes = probe(embedding.tokens).argmax(-1)  # (B, L)
                right &= ((classes == targets[:, column, None]) | embedding.mask).all(dim=1)
            results |= {
                f"captions_{name}": len(requests),
                f"parsed_{name}": round(right.float().mean().item(), 4),
            }
        return results


def cell_targets(drawn: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Per cell: classes (GRID, GRID, 2) of shape and colour, the last meaning none; places (GRID, GRID, 2) of the
    object's centre from the cell's, in cells. An object covers the cells whose centre is within its radius."""
    axis = (np.arange(GRID) + 0.5) / GRID
    x, y = np.meshgrid(axis, axis)
    classes = np.stack([np.full((GRID, GRID), len(SHAPES)), np.full((GRID, GRID), len(COLORS))], axis=-1)
    places = np.zeros((GRID, GRID, 2), np.float32)
    for thing in drawn.objects:
        inside = np.hypot(x - thing.x, y - thing.y) < thing.radius
        classes[inside] = SHAPES.index(thing.shape), COLORS.index(thing.color)
        places[inside] = np.stack([thing.x - x, thing.y - y], axis=-1)[inside] * GRID
    return classes, places


class VisionTask:
    steps, lr, batch = 1300, 1e-3, 32

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.shipped = vision_transformer()
        self.module = nn.ModuleDict(
            {
                "vit": self.shipped,
                "shape": nn.Linear(128, len(SHAPES) + 1),
                "color": nn.Linear(128, len(COLORS) + 1),
                "place": nn.Linear(128, 2),
            }
        )
        self.data = Scenes(TRAIN_SCENES, seed)
        self.classes, self.places = self.data.cells()  # (N, cells, 2) each

    def loss(self, step: int) -> Tensor:
        """Cross entropy of shape and colour, plus the squared error of the centres where there is an object."""
        rows = self.data.draw(self.seed, step, self.batch)
        classes, places = self.classes[rows], self.places[rows]
        with torch.autocast("cpu", torch.bfloat16):
            tokens = patch_tokens(self.shipped, self.data.pixels(rows), (GRID, GRID))  # (B, cells, D)
        tokens = tokens.float()
        covered = classes[..., 0] < len(SHAPES)
        loss = F.mse_loss(self.module["place"](tokens)[covered], places[covered])
        for column, name in enumerate(("shape", "color")):
            loss = loss + F.cross_entropy(
                self.module[name](tokens).flatten(0, 1), classes[..., column].flatten()
            )
        return loss

    def export(self, folder: Path) -> None:
        from timm.models import save_for_hf

        save_for_hf(self.shipped.half(), folder, model_args=VIT, safe_serialization=True)

    @torch.no_grad()
    def measure(self, folder: Path) -> dict:
        from nitro_e.encoders.vision import DINOv2, load_vit

        encoder = DINOv2(load_vit(str(folder), torch.float32))
        data = Scenes(TEST_SCENES, TEST_SEED)
        tokens = torch.cat(
            [encoder.features(part, (GRID, GRID)) for part in data.pixels(slice(None)).split(100)]
        )
        classes, places = data.cells()
        covered = classes[..., 0] < len(SHAPES)
        results = {"scenes": len(data.scenes)}
        for column, name in enumerate(("shape", "color")):
            right = self.module[name](tokens).argmax(-1) == classes[..., column]
            results |= {
                name: round(right.float().mean().item(), 4),
                f"{name}_covered": round(right[covered].float().mean().item(), 4),
            }
        error = (self.module["place"](tokens) - places)[covered].square().mean().sqrt()
        return results | {"place_rmse_cells": round(error.item(), 3)}


VIT = {"img_size": RESOLUTION, "patch_size": RESOLUTION // GRID, "embed_dim": 128, "depth": 4, "num_heads": 4}


def vision_transformer() -> nn.Module:
    import timm

    return timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True, **VIT)


COMPONENTS = {"codec": CodecTask, "text": TextTask, "vision": VisionTask}


def main(argv: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("component", choices=sorted(COMPONENTS))
    parser.add_argument("--out", type=Path, help="folder of the result; default: the one in the package")
    parser.add_argument("--steps", type=int, help="default: as shipped")
    parser.add_argument("--seed", type=cli.seed, default=0, metavar="N")
    args = parser.parse_args(argv)
    return cli.run(lambda: train(args.component, args.out or SHIPPED / args.component, args.steps, args.seed))


def train(component: str, out: Path, steps: int | None = None, seed: int = 0) -> dict:
    """Train, measure, export; returns what metrics.json says."""
    torch.manual_seed(seed)
    steps = COMPONENTS[component].steps if steps is None else steps
    command = f"python tools/train_components.py {component} --seed {seed} --steps {steps}"
    return train_component(lambda: COMPONENTS[component](seed), out, steps, command)


if __name__ == "__main__":
    sys.exit(main())
