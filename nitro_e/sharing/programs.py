"""The model and the codec's decoder as programs that run without this package: ONNX files and torch.export programs.

Each takes any number of images at once, of the size that the weights were trained for. They are compared with the model
after writing, read from their files.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from nitro_e import __version__
from nitro_e.config import ConfigError, to_dict
from nitro_e.interfaces import LatentCodec, Model, TextEmbedding
from nitro_e.sampling.pipeline import TextToImage
from nitro_e.sampling.samplers import scale_time

# torch writes its operators for this one without converting, and onnxruntime reads it since 1.14
OPSET = 18
# of the largest value; float32 results differ by the order of sums
TOLERANCE = 1e-4
# batch sizes: of the trace, and of the comparison
TRACED, COMPARED = 2, (1, 3)


class Velocity(nn.Module):
    """The model as a function of tensors."""

    def __init__(self, model: Model, time_scale: float) -> None:
        super().__init__()
        self.model, self.time_scale = model, time_scale

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Predict the velocity (B, C, h, w) of x (B, C, h, w) at t (B,) in 0..1, given text tokens (B, L, D), mask (B, L)."""
        return scale_time(self.model, self.time_scale)(x, t, TextEmbedding(tokens, mask))


class Decoder(nn.Module):
    """The codec's way back as a function of tensors."""

    def __init__(self, codec: LatentCodec) -> None:
        super().__init__()
        self.codec = codec

    def forward(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, h, w) to pixels (B, 3, H, W) in -1..1."""
        return self.codec.decode(latents)


class Part(NamedTuple):
    """What becomes one file."""

    name: str  # of the file, without its ending
    module: nn.Module
    inputs: dict[str, Tensor]  # by the names of forward; enough rows for every batch size
    output: str

    def rows(self, batch: int) -> tuple[Tensor, ...]:
        return tuple(tensor[:batch] for tensor in self.inputs.values())


Run = Callable[[tuple[Tensor, ...]], Tensor]


def write_onnx(pipeline: TextToImage, folder: Path, prompts: Sequence[str] = ()) -> dict[str, float]:
    """Write transformer.onnx, decoder.onnx, prompts.npz and export.json; return the largest difference of each program."""
    for library in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(library) is None:
            raise ConfigError(f"ONNX needs {library}: pip install onnx onnxscript onnxruntime")

    def write(part: Part) -> Run:
        import onnxruntime

        path = folder / f"{part.name}.onnx"
        program = torch.onnx.export(
            trace(part),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(part.inputs),
            output_names=[part.output],
            verbose=False,
            # onnxscript 0.7 takes an added 1e-15 for nothing, which keeps the codec's attention from 0 / 0
            optimize=False,
        )
        assert program is not None
        program.model.producer_name, program.model.producer_version = "nitro-e", __version__
        program.model.metadata_props["opset"] = str(program.model.opset_imports[""])
        program.save(path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda inputs: torch.from_numpy(
            session.run(None, {name: x.numpy() for name, x in zip(part.inputs, inputs)})[0]
        )

    return _write(pipeline, folder, prompts, write, {"opset": OPSET})


def write_torch(pipeline: TextToImage, folder: Path, prompts: Sequence[str] = ()) -> dict[str, float]:
    """Write transformer.pt2, decoder.pt2, prompts.npz and export.json; return the largest difference of each program."""

    def write(part: Part) -> Run:
        path = folder / f"{part.name}.pt2"
        torch.export.save(trace(part), path)
        program = torch.export.load(path).module()
        return lambda inputs: program(*inputs)

    return _write(pipeline, folder, prompts, write, {"torch": torch.__version__})


@torch.no_grad()
def _write(
    pipeline: TextToImage,
    folder: Path,
    prompts: Sequence[str],
    write: Callable[[Part], Run],
    about: Mapping[str, object],
) -> dict[str, float]:
    settings = pipeline.defaults
    if settings.guidance != "text":
        raise ConfigError(
            f"guidance '{settings.guidance}': programs hold no weak pass; store the weights with sampling.guidance: text"
        )
    if settings.sampler in ("flow_map", "policy"):
        raise ConfigError(
            f"sampler '{settings.sampler}': programs predict the velocity at one time, not such steps; use our pipeline"
        )
    text = pipeline.text.encode(["", *prompts])
    x = torch.randn(1, *pipeline.latent_shape(*settings.size))
    folder.mkdir(parents=True)
    differences = {part.name: compare(part, write(part)) for part in parts(pipeline)}
    np.savez(folder / "prompts.npz", tokens=text.tokens.numpy(), mask=text.mask.numpy())
    about = {
        **about,
        "nitro-e": __version__,
        "latents": list(x.shape[1:]),
        "times": settings.times().tolist(),
        "sampling": to_dict(settings),
        "prompts": ["", *prompts],
        "differences": differences,
    }
    (folder / "export.json").write_text(json.dumps(about, indent=1) + "\n")
    return differences


def parts(pipeline: TextToImage) -> list[Part]:
    """Return the model and the decoder with inputs to trace and compare them on."""
    settings, generator = pipeline.defaults, torch.Generator().manual_seed(0)
    rows = max(TRACED, *COMPARED)
    x = torch.randn(rows, *pipeline.latent_shape(*settings.size), generator=generator)
    t = torch.rand(rows, generator=generator)
    text = pipeline.text.encode(["", "a photo of a red circle", "a photo of two dogs"][:rows])
    velocity = Velocity(pipeline.model, settings.time_scale)
    return [
        Part("transformer", velocity.eval(), {"x": x, "t": t, **text._asdict()}, "velocity"),
        Part("decoder", Decoder(pipeline.codec).eval(), {"latents": x}, "pixels"),
    ]


def trace(part: Part) -> torch.export.ExportedProgram:
    """Trace a part for any batch size, into torch's own operators alone."""
    batch = torch.export.Dim("batch", min=1, max=4096)
    shapes = tuple({0: batch} for _ in part.inputs)
    program = torch.export.export(part.module, part.rows(TRACED), dynamic_shapes=shapes)
    foreign = {str(node.target) for node in program.graph.nodes if str(node.target).startswith("nitro_e.")}
    if foreign:
        raise ConfigError(
            f"torch {torch.__version__} puts {', '.join(foreign)} into programs; use torch 2.7 or newer"
        )
    return program


def compare(part: Part, run: Run) -> float:
    """Return the largest difference between a program and the model, over several batch sizes."""
    worst = 0.0
    for batch in COMPARED:
        wanted = part.module(*part.rows(batch))
        difference = (run(part.rows(batch)) - wanted).abs().max().item()
        if not difference <= TOLERANCE * wanted.abs().max().item():
            raise RuntimeError(
                f"{part.name}: the written program differs by {difference:.2g} at batch {batch}"
            )
        worst = max(worst, difference)
    return worst
