"""Small samples for the data tests."""

import io

import numpy as np
from PIL import Image

from nitro_e.data.index import scan_tar


def png(i=0, size=(12, 8), mode="RGB"):
    pixels = np.random.default_rng(i).integers(0, 256, (size[1], size[0], len(mode)), np.uint8).squeeze()
    buffer = io.BytesIO()
    Image.fromarray(pixels, mode).save(buffer, "PNG")
    return buffer.getvalue()


def latent(i):
    return np.random.default_rng(i).standard_normal((4, 2, 2)).astype(np.float16)


def image_samples(n=30):
    return [
        {"__key__": f"s{i:03d}", "png": png(i), "txt": f"caption {i}", "json": {"n": i}} for i in range(n)
    ]


def latent_samples(n=30):
    return [{"__key__": f"s{i:03d}", "npy": latent(i), "txt": f"caption {i}"} for i in range(n)]


def flip_byte(path, key, extension):
    row = next(row for row in scan_tar(path).rows if row["__key__"].decode() == key)
    content = bytearray(path.read_bytes())
    content[int(row[extension]["offset"]) + int(row[extension]["size"]) - 2] ^= 0x10
    path.write_bytes(content)
