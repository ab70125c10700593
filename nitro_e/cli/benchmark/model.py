"""Measure a model's forward pass and training step, as shares of this machine's own matrix product rate.

    nitro-e benchmark model [--preset nitro-e-512] [--batch 1 8] [--train] [--compile] [--json FILE]

In one process, with the same weights and inputs: the plain implementation of the tests, ours as it is, packed for the
CPU, and compiled (on CUDA sampling with CUDA graphs too). All are measured in turn, round after round, and the best of
the rounds counts: a machine that is busy or changes its clock disturbs all alike. Shares are of the model's arithmetic
(`nitro-e describe`; three times that for forward and backward) over the best rate of one large matrix product.
Training is forward and backward in the dtype of the weights; the optimiser and the data are left out.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from nitro_e.cli import common as cli
from nitro_e.cli.benchmark.plain_emmdit import PlainEMMDiT
from nitro_e.cli.benchmark.report import finish
from nitro_e.cli.benchmark.report import flags as report_flags
from nitro_e.cli.benchmark.timing import interleave, relative
from nitro_e.config import ConfigError, from_dict
from nitro_e.interfaces import TextEmbedding
from nitro_e.model import EMMDiT, ModelConfig, describe, released
from nitro_e.model.cpu.packing import pack_for_cpu
from nitro_e.record.progress import bar
from nitro_e.training.meters import peak_teraflops

# the product whose rate counts as what is possible
MATMUL = {"cpu": (1664, 768, 2304), "cuda": (8192, 8192, 8192)}

Call = Callable[[], Tensor]


@dataclasses.dataclass
class Variant:
    """One way of computing the model: a denoiser, and what its backward pass gives gradients to."""

    velocity: Callable[[Tensor, Tensor, TextEmbedding], Tensor]
    parameters: list[Tensor]


@dataclasses.dataclass
class Row:
    """One measurement. Shares are fractions; `mfu` is of the data sheet's rate, where that is known."""

    task: str
    batch: int
    variant: str
    milliseconds: float
    gflop_per_s: float
    share_of_matmul: float
    mfu: float | None
    times_as_fast_as_plain: float | None
    difference: float  # of the velocity from ours in eager mode, relative


class Bench:
    """A model of random weights, and every way of computing it."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: str, text_length: int) -> None:
        self.config, self.dtype, self.device, self.text_length = config, dtype, device, text_length
        grid = (config.base_grid, config.base_grid)
        config.check_grid(*grid, text_length)
        self.flops = describe.total(config, grid, text_length).flops
        torch.manual_seed(0)
        self.model = EMMDiT(config)
        torch.nn.init.normal_(self.model.out.weight, std=0.02)  # it starts at zero
        self.model = self.model.to(device, dtype).eval()

    def copy(self) -> EMMDiT:
        with torch.device("meta"):
            other = EMMDiT(self.config)
        other.load_state_dict(self.model.state_dict(), assign=True)  # the same memory
        other.position.table = self.model.position.table
        return other.eval()

    def inputs(self, batch: int) -> tuple[Tensor, Tensor, TextEmbedding]:
        side = self.config.base_grid * self.config.patch_size
        options = dict(device=self.device, dtype=self.dtype)
        mask = torch.ones(batch, self.text_length, dtype=torch.bool, device=self.device)
        text = TextEmbedding(torch.randn(batch, self.text_length, self.config.text_width, **options), mask)
        x = torch.randn(batch, self.config.latent_channels, side, side, **options)
        return x, torch.rand(batch, device=self.device), text

    def plain(self) -> Variant:
        """Take the plain implementation; ConfigError where it does not have the config's choices."""
        model = plain_model(self.model)
        parameters = [tensor.requires_grad_() for tensor in model.state.values()]
        return Variant(lambda x, t, text: model(x, t, text.tokens), parameters)

    def variants(self, compiled: bool, train: bool) -> dict[str, Variant]:
        """List the ways of computing it that this machine has; the others are named and left out."""
        builders = {"plain": self.plain, "ours": lambda: _variant(self.model)}
        if self.device == "cpu" and not train:
            builders["ours, packed"] = lambda: _variant(pack_for_cpu(self.model))
        if compiled:
            builders["ours, compiled"] = lambda: _compiled_blocks(self.copy())
            if self.device == "cpu" and not train:
                builders["ours, packed and compiled"] = lambda: _compiled_blocks(pack_for_cpu(self.model))
            if self.device == "cuda" and not train:
                builders["ours, CUDA graph"] = lambda: _cuda_graph(self.copy())
        found = {}
        for name, build in builders.items():
            try:
                found[name] = build()
            except ConfigError as error:
                print(f"{name}: not measured: {error}", file=sys.stderr)
        return found

    def measure(
        self, variants: dict[str, Variant], batch: int, train: bool, seconds: float, rounds: int
    ) -> tuple[list[Row], float]:
        """Rows of one batch size, and the best rate of the matrix product meanwhile, in GFLOP/s."""
        task, passes = ("training", 3) if train else ("forward", 1)
        arguments = self.inputs(batch)
        calls = {name: _call(variant, arguments, train) for name, variant in variants.items()}
        first = bar(calls.items(), brief=True, desc=f"{task}, batch {batch}, first calls", leave=False)
        outputs = {name: call().float().clone() for name, call in first}
        product = _matmul(self.dtype, self.device)
        best = interleave(
            {"matmul": product, **calls}, self.device, seconds, rounds, f"{task}, batch {batch}"
        )
        m, k, n = MATMUL[self.device]
        rate = 2 * m * k * n / best["matmul"] / 1e9
        rows = []
        for name in calls:
            gflops = passes * self.flops * batch / best[name] / 1e9
            plain = best["plain"] / best[name] if "plain" in best else None
            difference = relative(outputs[name], outputs["ours"])
            peak = _peak(self.device, self.dtype)
            mfu = None if peak is None else gflops / peak / 1e3
            rows.append(
                Row(task, batch, name, best[name] * 1e3, gflops, gflops / rate, mfu, plain, difference)
            )
        return rows, rate


def plain_model(model: EMMDiT) -> PlainEMMDiT:
    """Make the plain implementation of the same weights; ConfigError where it does not have the config's choices."""
    config = model.config
    # released files have two cycles of attention only; their names are the same for any, and so is the plain way
    named = copy.copy(model)
    named.config = dataclasses.replace(config, attention=("full",))
    state = {name: tensor.detach() for name, tensor in released.to_released(named).items()}
    cycle = [tuple(region) for region in config.regions[: len(config.attention)]]
    return PlainEMMDiT(state, config.heads, config.groups, cycle)


def _variant(model: EMMDiT) -> Variant:
    return Variant(model, list(model.parameters()))


def _compiled_blocks(model: EMMDiT) -> Variant:
    model.compile_blocks()
    return _variant(model)


def _cuda_graph(model: EMMDiT) -> Variant:
    """The whole forward pass compiled and replayed as one CUDA graph."""
    return Variant(torch.compile(model, fullgraph=True, dynamic=False, mode="reduce-overhead"), [])


def _call(variant: Variant, arguments: tuple, train: bool) -> Call:
    """One forward pass, or one forward and backward pass."""
    if not train:
        return torch.no_grad()(lambda: variant.velocity(*arguments))

    def step() -> Tensor:
        for parameter in variant.parameters:
            parameter.grad = None
        velocity = variant.velocity(*arguments)
        velocity.float().square().mean().backward()
        return velocity.detach()

    return step


def _matmul(dtype: torch.dtype, device: str) -> Call:
    m, k, n = MATMUL[device]
    a, b = torch.randn(m, k, dtype=dtype, device=device), torch.randn(k, n, dtype=dtype, device=device)
    return lambda: a @ b


def _peak(device: str, dtype: torch.dtype) -> float | None:
    """Data sheet TFLOP/s, dense, of a 16-bit type on this GPU, or None."""
    if device == "cpu" or dtype == torch.float32:
        return None
    return peak_teraflops(torch.device(device))


def table(rows: list[Row]) -> str:
    """Markdown; MFU only where the data sheet's rate is known, the ratio only where the plain implementation ran."""
    columns = {
        "task": lambda row: row.task,
        "batch": lambda row: row.batch,
        "": lambda row: row.variant,
        "ms": lambda row: f"{row.milliseconds:.1f}",
        "GFLOP/s": lambda row: f"{row.gflop_per_s:,.0f}",
        "of matmul": lambda row: f"{row.share_of_matmul:.1%}",
        "MFU": lambda row: "" if row.mfu is None else f"{row.mfu:.1%}",
        "times plain": lambda row: (
            "" if row.times_as_fast_as_plain is None else f"{row.times_as_fast_as_plain:.2f}"
        ),
        "difference": lambda row: f"{row.difference:.0e}",
    }
    cells = {name: [str(value(row)) for row in rows] for name, value in columns.items()}
    cells = {name: values for name, values in cells.items() if any(values)}
    lines = ["| " + " | ".join(cells) + " |", "|---" * len(cells) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(values) + " |" for values in zip(*cells.values()))])


def measure(options: argparse.Namespace) -> dict:
    """All tables as plain data; printed as they are measured."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.threads:
        torch.set_num_threads(options.threads)
    config = from_dict(ModelConfig, {"preset": options.preset})
    bench = Bench(config, getattr(torch, options.dtype), device, options.text_length)
    found = {"preset": options.preset, "dtype": options.dtype, "rows": [], "matmul": []}
    print(f"{options.preset} in {options.dtype}: {bench.flops / 1e9:.2f} GFLOP per latent")
    for train in (False, True) if options.train else (False,):
        variants = bench.variants(options.compile, train)
        for batch in options.batch or ([1, 8] if device == "cpu" else [1, 8, 32, 256]):
            rows, rate = bench.measure(variants, batch, train, options.seconds, options.rounds)
            print(
                f"\nmatrix product {'x'.join(map(str, MATMUL[device]))}: {rate:,.0f} GFLOP/s\n{table(rows)}",
                flush=True,
            )
            found["rows"] += [dataclasses.asdict(row) for row in rows]
            found["matmul"].append(rate)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmark.py model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--preset", default="nitro-e-512", help=f"{', '.join(ModelConfig.PRESETS)} (default: %(default)s)"
    )
    parser.add_argument(
        "--batch",
        type=cli.whole(1, 65536),
        nargs="+",
        metavar="N",
        help="default: 1 8 on a CPU, 1 8 32 256 on a GPU",
    )
    cli.dtype_flag(parser, "of model and inputs (default: %(default)s)", default="bfloat16")
    parser.add_argument("--text-length", type=cli.whole(1, 8192), default=128, metavar="N")
    parser.add_argument("--train", action="store_true", help="the training step too")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile too; on a CPU minutes of compiling"
    )
    parser.add_argument(
        "--threads", type=cli.whole(1, 1024), metavar="N", help="of the CPU (default: torch's choice)"
    )
    parser.add_argument("--rounds", type=cli.whole(1), default=5, metavar="N")
    parser.add_argument(
        "--seconds", type=cli.real(0), default=0.5, metavar="S", help="for each variant in each round"
    )
    report_flags(parser)
    options = parser.parse_args(arguments)

    def command() -> None:
        found = measure(options)
        finish(found, options, "cuda" if torch.cuda.is_available() else "cpu")

    return cli.run(command)
