"""From stored records on the CPU to batches on the training device: what the shards do not hold is encoded here.

On a GPU batches are made a step ahead, on a stream of their own: copies and encoders run beside the training step.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from nitro_e.data import Data, Records
from nitro_e.interfaces import Batch, LatentCodec, TextEmbedding, TextEncoder, VisionEncoder

Made = TypeVar("Made")


def batches_ahead(
    data: Data,
    make: Callable[[Records, int], Made],
    device: torch.device,
    *,
    step: int,
    rank: int,
    world: int,
    accumulate: int,
) -> Iterator[Made]:
    """Yield `make(records, step)` of one process's micro-batches from optimiser step `step` on.

    For a GPU they are made a step ahead, of records in pinned memory, whose copies the host does not wait for.
    """
    records = data.records(
        step, micro_batches_per_step=accumulate, rank=rank, world=world, pin_memory=device.type == "cuda"
    )
    with contextlib.closing(records):
        making = (make(record, step + number // accumulate) for number, record in enumerate(records))
        # without a GPU there is nothing to run beside
        yield from ahead(making, accumulate if device.type == "cuda" else 0, device)


def ahead(making: Iterator[Made], count: int, device: torch.device) -> Iterator[Made]:
    """Yield what `making` makes, while the `count` items after it are made already. An error comes in its turn."""
    side = torch.cuda.Stream(device) if device.type == "cuda" else None
    if side is not None:  # the encoders' weights came on the stream of now
        side.wait_stream(torch.cuda.current_stream(device))
    ready: deque[tuple[Made | None, Exception | None, torch.cuda.Event | None]] = deque()
    while True:
        while len(ready) <= count and not (ready and ready[-1][1]):
            ready.append(_make(making, side))
        made, error, event = ready.popleft()
        if isinstance(error, StopIteration):
            return
        if error is not None:
            raise error
        assert made is not None
        if event is not None:
            current = torch.cuda.current_stream(device)
            current.wait_event(event)  # the GPU waits, not the host
            for tensor in tensors_of(made):
                tensor.record_stream(current)  # its memory is not given away while the training step reads it
        yield made


def _make(
    making: Iterator[Made], side: torch.cuda.Stream | None
) -> tuple[Made | None, Exception | None, torch.cuda.Event | None]:
    """Make the next item on the stream `side`, with the event of its end; or keep the error."""
    try:
        if side is None:
            return next(making), None, None
        with torch.cuda.stream(side):
            made = next(making)
            return made, None, side.record_event()
    except Exception as error:
        return None, error, None


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a batch: a dataclass, tuple, list or dict of such."""
    if isinstance(value, Tensor):
        yield value
        return
    parts: Any = ()
    if dataclasses.is_dataclass(value):
        parts = vars(value).values()
    elif isinstance(value, dict):
        parts = value.values()
    elif isinstance(value, tuple | list):
        parts = value
    for part in parts:
        yield from tensors_of(part)


def encode(
    records: Records,
    codec: LatentCodec,
    text: TextEncoder,
    device: torch.device,
    vision: VisionEncoder | None = None,
    latent_grid: Callable[[int, int], tuple[int, int]] | None = None,
) -> Batch:
    """Turn records into a batch: latents, text and, with a vision encoder, the features that REPA aligns to.

    latent_grid: (h, w) of the latents -> (rows, columns) of the model's image tokens, on which features lie.
    """
    pixels = None
    if records.pixels is not None:
        pixels = to_device(records.pixels, device) / 127.5 - 1  # (B, 3, H, W) in -1..1
    if records.latents is not None:
        raw = to_device(records.latents, device)
        if (rows := _absent(records, "latents", device)) is not None:
            assert pixels is not None, "records have pixels where they have no latents"
            raw[rows] = codec.encode_pixels(pixels[rows]).to(raw)
    else:
        assert pixels is not None, "records have pixels or latents"
        raw = codec.encode_pixels(pixels)
    latents = codec.normalize(raw)  # (B, C, h, w)
    if records.text is not None:
        embedding = records.text.to(device, torch.float32, non_blocking=True)
        if (rows := _absent(records, "text", device)) is not None:
            prompts = [
                prompt for prompt, absent in zip(records.prompts, records.absent["text"].tolist()) if absent
            ]
            for stored, computed in zip(embedding, text.encode(prompts)):
                stored[rows] = computed.to(stored)
    else:
        embedding = text.encode(records.prompts)
    features = None  # (B, rows * columns, F)
    if vision is not None and records.features is not None:
        features = to_device(records.features, device)
        if (rows := _absent(records, "features", device)) is not None:
            assert pixels is not None and latent_grid is not None
            features[rows] = vision.features(pixels[rows], latent_grid(*latents.shape[-2:])).to(features)
    elif vision is not None:
        assert pixels is not None and latent_grid is not None
        features = vision.features(pixels, latent_grid(*latents.shape[-2:]))
    return Batch(latents, embedding, records.prompts, records.keys, features, records.info)


def _absent(records: Records, name: str, device: torch.device) -> Tensor | None:
    """Return the rows of a batch that lack a column which others have; None if there are none."""
    absent = records.absent.get(name)
    if absent is None or not absent.any():
        return None
    return absent.nonzero().flatten().to(device, non_blocking=True)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device as float32: all arithmetic around the model is in that precision."""
    return tensor.to(device, non_blocking=True).float()


def null_prompt(data: Data, text: TextEncoder, device: torch.device) -> TextEmbedding:
    """The null prompt of classifier-free guidance, (1, L, D): the one stored with the data, or encoded here."""
    return (data.null_text() or text.encode([""])).to(device, torch.float32)
