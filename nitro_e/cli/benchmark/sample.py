"""Measure sampling, text, denoise loop and decode apart, each beside the same part driven plainly.

    nitro-e benchmark sample [--steps 20] [--batch 1] [--compile] [--text] [--json FILE]
    nitro-e benchmark sample --shapes [--compile]        the small weights that the package ships
    nitro-e benchmark sample --part denoise --compile    a part alone

Plainly means: the text of every prompt and the negative prompt are encoded every time, one by one; the plain
implementation of the model is driven by an Euler loop with guidance as a batch of two; the latents are decoded in
float32, one by one. Without --shapes all weights are random, of the sizes of the released ones; --text adds a text encoder
of 1.2 billion. Everything is measured in one process, in turn, round after round, and the best of the rounds counts.

The difference is the relative one from the plain way, of latents after the last step, of embeddings and of pixels. Ways
that are marked "approximate" compute something else on purpose: see docs/speed.md for what that costs on real weights.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from nitro_e.cli import common as cli
from nitro_e.cli.benchmark.model import plain_model
from nitro_e.cli.benchmark.report import finish
from nitro_e.cli.benchmark.report import flags as report_flags
from nitro_e.cli.benchmark.timing import interleave, relative
from nitro_e.config import ConfigError, from_dict
from nitro_e.encoders.random_weights import random_dc_ae, random_llama
from nitro_e.interfaces import Denoiser, LatentCodec, Model, TextEmbedding, TextEncoder
from nitro_e.model import EMMDiT, ModelConfig
from nitro_e.model.cpu.packing import fastest_weights, pack_for_cpu
from nitro_e.record.progress import bar
from nitro_e.sampling.caching import ReusedBlocks
from nitro_e.sampling.padding import merge_padding
from nitro_e.sampling.pipeline import TextToImage
from nitro_e.sampling.samplers import SamplingConfig, initial_noise, sample

# what the approximate ways do
INTERVAL, EVERY = (0.3, 1.0), 2
TEXT_LENGTH = 128
PARTS = ("text", "denoise", "decode")
MERGED = ", padding merged"

Call = Callable[[], Tensor]


@dataclasses.dataclass
class Row:
    """One measurement of one way of computing a part."""

    part: str
    batch: int
    way: str
    seconds: float
    times_as_fast_as_plain: float
    difference: float | None  # from plain, relative


@dataclasses.dataclass
class Parts:
    """What is measured; `text` is None where the embeddings are random."""

    model: EMMDiT
    codec: LatentCodec
    text: TextEncoder | None
    settings: SamplingConfig


def released_size(options: argparse.Namespace) -> Parts:
    """Make parts of random weights, with open residual gates, so that every block shows in the result."""
    config = from_dict(ModelConfig, {"preset": options.preset, "gate_init": "one"})
    torch.manual_seed(0)
    model = EMMDiT(config)
    torch.nn.init.normal_(model.out.weight, std=0.02)  # it starts at zero
    codec = random_dc_ae(options.device)
    text = random_llama(options.device, torch.bfloat16) if options.text else None
    resolution = config.base_grid * config.patch_size * codec.stride
    return Parts(model, codec, text, SamplingConfig(resolution=resolution))


def shapes(options: argparse.Namespace) -> Parts:
    pipeline = TextToImage.from_pretrained("shapes", options.device)
    assert isinstance(pipeline.model, EMMDiT)
    return Parts(pipeline.model, pipeline.codec, pipeline.text, pipeline.defaults)


class Bench:
    """The parts, and every way of computing each of them."""

    def __init__(self, parts: Parts, options: argparse.Namespace) -> None:
        self.parts, self.options, self.device = parts, options, options.device
        guidance = options.guidance or parts.settings.guidance_scale
        self.settings = dataclasses.replace(
            parts.settings, steps=options.steps, guidance_scale=guidance, sampler="euler"
        )
        self.model = parts.model.to(self.device, torch.bfloat16).eval().requires_grad_(False)
        self.denoisers, self.fastest, self.in_int8 = self._denoisers()

    def measure(self, batch: int) -> list[Row]:
        """Measure all parts at one batch size, and their sums."""
        prompts = [f"a photo of a red circle and {number} blue squares" for number in range(batch)]
        height, width = (side // self.parts.codec.stride for side in self.settings.size)
        noise = initial_noise(range(batch), (self.parts.codec.channels, height, width)).to(self.device)
        if self.parts.text is None:
            shape = (batch + 1, TEXT_LENGTH, self.model.config.text_width)
            tokens = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            mask = torch.ones(shape[:2], dtype=torch.bool)
            # the null prompt's padding is equal, as an encoder's
            tokens[-1, 1:], mask[-1, 1:] = tokens[-1, 1], False
            text = TextEmbedding(tokens, mask).to(self.device)
        else:
            text = self.parts.text.encode([*prompts, ""]).to(self.device)
        calls: dict[str, Callable[[], dict[str, Call]]] = {
            "text": lambda: {} if self.parts.text is None else self._texts(self.parts.text, prompts),
            "denoise": lambda: self._loops(text, noise),
            "decode": lambda: self._decodes(noise),
        }
        measured = [(part, calls[part]()) for part in PARTS if part in self.options.part]
        rows = [row for part, ways in measured if ways for row in self._rows(part, batch, ways)]
        return rows + (self._sums(rows, batch) if len(measured) == len(PARTS) else [])

    def _rows(self, part: str, batch: int, calls: dict[str, Call]) -> list[Row]:
        results = {
            name: call().float().clone()
            for name, call in bar(
                calls.items(), brief=True, desc=f"{part}, batch {batch}, first", leave=False
            )
        }
        title = f"{part}, batch {batch}"
        clock = time.process_time if self.options.cpu_time else time.perf_counter
        best = interleave(calls, self.device, self.options.seconds, self.options.rounds, title, clock)
        plain = best["plain"]
        return [
            Row(part, batch, name, best[name], plain / best[name], relative(results[name], results["plain"]))
            for name in calls
        ]

    def _sums(self, rows: list[Row], batch: int) -> list[Row]:
        """Add up all parts: plainly, in our best way that is no approximation, and with 8-bit weights."""
        seconds, best = {(row.part, row.way): row.seconds for row in rows}, self.fastest + MERGED
        decodes = [part for part in seconds if part[0] == "decode" and part[1] != "plain"]
        decode = min(decodes, key=lambda part: seconds[part])
        whole = {
            "plain": [("text", "plain"), ("denoise", "plain"), ("decode", "plain")],
            "ours": [("text", "ours, new prompts"), ("denoise", best), decode],
        }
        if self.in_int8 is not None:
            whole["ours, int8"] = [whole["ours"][0], ("denoise", self.in_int8 + MERGED), decode]
        totals = {way: sum(seconds.get(part, 0.0) for part in parts) for way, parts in whole.items()}
        return [Row("all", batch, way, total, totals["plain"] / total, None) for way, total in totals.items()]

    # ---- text

    def _texts(self, encoder: TextEncoder, prompts: Sequence[str]) -> dict[str, Call]:
        def pipeline() -> TextToImage:
            return TextToImage(self.model, self.parts.codec, encoder, self.settings)

        def plain() -> Tensor:
            rows = [encoder.encode([prompt]).tokens for prompt in prompts]
            return torch.cat([*rows, *(encoder.encode([""]).tokens for _ in prompts)])[: len(prompts) + 1]

        def ours(pipeline: TextToImage) -> Tensor:
            return pipeline.encode_prompt([*prompts, ""]).tokens

        known = pipeline()
        return {
            "plain": plain,
            "ours, new prompts": lambda: ours(pipeline()),
            "ours, seen before": lambda: ours(known),
        }

    # ---- the denoise loop

    def _denoisers(self) -> tuple[dict[str, Denoiser], str, str | None]:
        """List the ways of computing the model that this machine has; name the fastest that is no approximation, and
        the fastest in 8 bits, if there is one."""
        model, compiled = self.model, self.options.compile
        builders: dict[str, Callable[[], Denoiser]] = {"ours": lambda: model}
        if self.device == "cpu":
            builders["ours, packed"] = lambda: pack_for_cpu(model)
            builders["ours, int8"] = lambda: pack_for_cpu(model, "int8")
            try:
                in_float32 = fastest_weights() == "float32"
            except ConfigError:  # the packed ways say why, below
                in_float32 = False
            if in_float32:
                builders["ours, packed in float32"] = lambda: pack_for_cpu(model, "float32")
        if compiled and self.device == "cpu":
            builders["ours, int8 and compiled"] = lambda: _compiled(pack_for_cpu(model, "int8"))
            builders["ours, packed and compiled"] = lambda: _compiled(pack_for_cpu(model))
            if in_float32:
                builders["ours, packed in float32 and compiled"] = lambda: _compiled(
                    pack_for_cpu(model, "float32")
                )
        elif compiled:
            builders["ours, compiled"] = lambda: _compiled(copy.deepcopy(model))
            options: dict[str, Any] = dict(fullgraph=True, dynamic=False, mode="reduce-overhead")
            builders["ours, CUDA graph"] = lambda: torch.compile(copy.deepcopy(model), **options)
        found: dict[str, Denoiser] = {}
        for name, build in builders.items():
            try:
                found[name] = build()
            except ConfigError as error:
                print(f"{name}: not measured: {error}", file=sys.stderr)
        exact = [name for name in found if "int8" not in name]
        in_int8 = [name for name in found if "int8" in name]
        return found, exact[-1], in_int8[-1] if in_int8 else None

    @torch.no_grad()
    def _loops(self, text: TextEmbedding, noise: Tensor) -> dict[str, Call]:
        prompts, negative = text.take(slice(len(noise))), text.take(slice(len(noise), None))
        calls: dict[str, Call] = {"plain": self._plain_loop(prompts, negative, noise)}

        def add(name: str, denoiser: Denoiser, **overrides: Any) -> None:
            settings = dataclasses.replace(self.settings, **overrides)
            calls[name] = lambda: sample(denoiser, prompts, negative, settings, noise, lambda step: noise)

        for name, denoiser in self.denoisers.items():
            add(name, denoiser)
        for name in filter(None, (self.fastest, self.in_int8)):
            add(name + MERGED, merge_padding(self.denoisers[name], self.model.config))
        low, high = INTERVAL
        fastest = self.denoisers[self.fastest]
        merged = merge_padding(fastest, self.model.config)
        add(f"approximate: guidance from t = {low:g} to {high:g}", merged, guidance_interval=INTERVAL)
        if isinstance(fastest, EMMDiT):
            reused = merge_padding(ReusedBlocks(fastest, EVERY), self.model.config)
            add(f"approximate: blocks at every step of {EVERY}", reused)
        return {name: torch.no_grad()(call) for name, call in calls.items()}

    def _plain_loop(self, text: TextEmbedding, negative: TextEmbedding, noise: Tensor) -> Call:
        model, times = plain_model(self.model), self.settings.times().to(self.device)
        rows = negative.tokens.expand(len(noise), -1, -1)
        dtype = next(self.model.parameters()).dtype
        both = torch.cat([rows, text.tokens]).to(dtype)
        scale = self.settings.guidance_scale

        def loop() -> Tensor:
            x = noise
            for t, t_next in pairwise(times):
                velocity = model(torch.cat([x, x]).to(dtype), t.expand(2 * len(x)), both)
                without, with_text = velocity.float().chunk(2)
                x = x + (t_next - t) * (without + scale * (with_text - without))
            return x

        return loop

    # ---- decode

    def _decodes(self, latents: Tensor) -> dict[str, Call]:
        codec = self.parts.codec
        calls: dict[str, Call] = {
            "plain": lambda: torch.cat([codec.decode(latent[None]) for latent in latents]),
            "ours, float32": lambda: codec.decode(latents),
        }
        half = copy.deepcopy(codec)
        half.to(dtype=torch.bfloat16)
        calls["ours, bfloat16"] = lambda: half.decode(latents)
        return calls


def _compiled(model: Model) -> Model:
    model.compile_blocks()
    return model


def table(rows: list[Row]) -> str:
    """Write the rows as Markdown."""
    lines = ["| part | batch | | seconds | times plain | difference |", "|---|---|---|---|---|---|"]
    for row in rows:
        difference = "" if row.difference is None else f"{row.difference:.0e}"
        cells = (row.part, str(row.batch), row.way, f"{row.seconds:.3f}")
        lines.append(f"| {' | '.join(cells)} | {row.times_as_fast_as_plain:.2f} | {difference} |")
    return "\n".join(lines)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all batch sizes; tables are printed as they are there."""
    if options.threads or options.cpu_time:
        torch.set_num_threads(1 if options.cpu_time else options.threads)
    bench = Bench(shapes(options) if options.shapes else released_size(options), options)
    name = "shapes" if options.shapes else options.preset
    found: dict[str, Any] = {"model": name, "rows": []}
    found["settings"] = dataclasses.asdict(bench.settings)
    print(f"{name} in bfloat16: {bench.settings.in_words()}")
    for batch in options.batch:
        rows = bench.measure(batch)
        print(f"\n{table(rows)}", flush=True)
        found["rows"] += [dataclasses.asdict(row) for row in rows]
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmark.py sample", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--preset", choices=("nitro-e-512", "nitro-e-1024"), default="nitro-e-512")
    weights.add_argument("--shapes", action="store_true", help="the shipped weights instead of random ones")
    parser.add_argument("--text", action="store_true", help="a random text encoder too: 2.5 GB of memory")
    parser.add_argument(
        "--part", nargs="+", choices=PARTS, default=PARTS, help="measure these alone, without sums"
    )
    parser.add_argument("--steps", type=cli.whole(1, 10_000), default=20, metavar="N")
    parser.add_argument("--guidance", type=cli.real(1), metavar="SCALE", help="default: 4.5, for shapes 3")
    parser.add_argument("--batch", type=cli.whole(1, 65536), nargs="+", default=[1], metavar="N")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile too; on a CPU minutes of compiling"
    )
    parser.add_argument("--device", type=cli.device, help="default: cuda, mps or cpu, the first there is")
    parser.add_argument(
        "--threads", type=cli.whole(1, 1024), metavar="N", help="of the CPU (default: torch's choice)"
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="seconds of one CPU thread, not of the clock: for a machine with other work",
    )
    parser.add_argument("--rounds", type=cli.whole(1), default=3, metavar="N")
    parser.add_argument(
        "--seconds", type=cli.real(0), default=0.5, metavar="S", help="for each way in each round, at least"
    )
    report_flags(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)

    def command() -> None:
        from nitro_e.record.environment import default_device

        options.device = options.device or default_device()
        finish(measure(options), options, options.device)

    return cli.run(command)
