"""From stored records on the CPU to batches on the training device: what the shards do not hold is encoded here."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nitro_e.data import Data, Records
from nitro_e.interfaces import Batch, LatentCodec, TextEmbedding, TextEncoder, VisionEncoder


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
            prompts = [records.prompts[row] for row in rows.tolist()]
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
    return absent.nonzero().flatten().to(device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device as float32: all arithmetic around the model is in that precision."""
    return tensor.to(device, non_blocking=True).float()


def null_prompt(data: Data, text: TextEncoder, device: torch.device) -> TextEmbedding:
    """The null prompt of classifier-free guidance, (1, L, D): the one stored with the data, or encoded here."""
    return (data.null_text() or text.encode([""])).to(device, torch.float32)
