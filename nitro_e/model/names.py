"""Names of an E-MMDiT's block parameters in the released format; adapter files use them too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

Names = dict[str, list[str]]  # ours -> released ones; several are concatenated along the first axis


class Stream(NamedTuple):
    """Released names of the parts of one stream, within a block."""

    suffix: str  # of the modulation tables
    norm: str
    qkv: tuple[str, str, str]
    q_norm: str
    k_norm: str
    out: str
    mlp: str


STREAMS = {
    "image": Stream("", "norm1", ("to_q", "to_k", "to_v"), "norm_q", "norm_k", "to_out.0", "ff"),
    "text": Stream(
        "_c",
        "norm1_context",
        ("add_q_proj", "add_k_proj", "add_v_proj"),
        "norm_added_q",
        "norm_added_k",
        "to_add_out",
        "ff_context",
    ),
}


def block_linears(groups: Sequence[int]) -> Names:
    """Map the linear layers inside blocks, except modulation, to released ones (three for each qkv)."""
    names: Names = {}
    for ours, theirs, stream, updated in _streams(groups):
        names[f"{_attention(ours, updated)}.qkv"] = [f"{theirs}.attn.{name}" for name in stream.qkv]
        if updated:
            names[f"{ours}.attention_out"] = [f"{theirs}.attn.{stream.out}"]
            names[f"{ours}.mlp.0"] = [f"{theirs}.{stream.mlp}.net.0.proj"]
            names[f"{ours}.mlp.2"] = [f"{theirs}.{stream.mlp}.net.2"]
    return names


def block_parameters(groups: Sequence[int]) -> Names:
    """Map all parameters inside blocks to the released ones."""
    layers, tables = block_linears(groups), Names()
    for ours, theirs, stream, updated in _streams(groups):
        attention = _attention(ours, updated)
        layers[f"{attention}.norm"] = [f"{theirs}.{stream.norm}"]
        tables[f"{attention}.q_norm.weight"] = [f"{theirs}.attn.{stream.q_norm}.weight"]
        tables[f"{attention}.k_norm.weight"] = [f"{theirs}.attn.{stream.k_norm}.weight"]
        if updated:
            tables[f"{ours}.modulation.bias"] = [f"{theirs}.scale_shift_bias{stream.suffix}"]
            tables[f"{ours}.modulation.scale"] = [f"{theirs}.scale_shift_scale{stream.suffix}"]
    return weights_and_biases(layers) | tables


def weights_and_biases(layers: Names) -> Names:
    """Map the two parameters of each layer, given the names of the layers."""
    return {
        f"{ours}.{kind}": [f"{name}.{kind}" for name in theirs]
        for ours, theirs in layers.items()
        for kind in ("weight", "bias")
    }


def _streams(groups: Sequence[int]) -> Iterator[tuple[str, str, Stream, bool]]:
    """Every stream of every block: our path, the block's released path, its names, and whether it is updated."""
    blocks = [f"block_groups.{group}.{index}" for group, count in enumerate(groups) for index in range(count)]
    for index, theirs in enumerate(blocks):
        for name, stream in STREAMS.items():
            yield f"blocks.{index}.{name}", theirs, stream, name == "image" or index < len(blocks) - 1


def _attention(ours: str, updated: bool) -> str:
    """Return the path of a stream's attention; the last block's text is nothing else."""
    return f"{ours}.attention" if updated else ours
