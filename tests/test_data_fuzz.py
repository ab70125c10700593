"""Random damage: whatever byte is hit, it is found, and nothing but the promised exceptions comes out."""

import io

import numpy as np
import pytest
from data_samples import image_samples, latent_samples
from PIL import Image

from nitro_e.data.decode import BadSample, decode_array, decode_caption, decode_image, decode_info
from nitro_e.data.index import DamagedTar, scan_tar
from nitro_e.data.making import write_shard
from nitro_e.data.making.writer import field_bytes


@pytest.mark.parametrize("samples", [image_samples, latent_samples])
def test_every_flipped_bit_of_a_tar_is_found(tmp_path, samples):
    """In a header: the structure breaks. In a member: its CRC differs. Only padding may change unnoticed."""
    path, rng = tmp_path / "a.tar", np.random.default_rng(0)
    write_shard(path, samples(6))
    original, index = path.read_bytes(), scan_tar(path)
    used = np.zeros(len(original), bool)  # bytes of members
    for name in index.extensions:
        for offset, size, _ in index.rows[name].tolist():
            used[offset : offset + size] = True
    padding = np.zeros(len(original), bool)
    for name in index.extensions:
        for offset, size, _ in index.rows[name].tolist():
            padding[offset + size : offset + -(-size // 512) * 512] = True
    for position in rng.integers(0, len(original), 600).tolist():
        damaged = bytearray(original)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            found = scan_tar(path)
        except DamagedTar:
            assert not used[position] and not padding[position]
            continue
        assert used[position] or padding[position]
        assert (found.rows != index.rows).any() == used[position]


def test_every_cut_of_a_tar_is_found(tmp_path):
    path, rng = tmp_path / "a.tar", np.random.default_rng(0)
    write_shard(path, image_samples(6))
    original = path.read_bytes()
    end = int(max(scan_tar(path).rows["json"]["offset"])) + 512  # then the end marker and padding
    for length in [0, 1, 511, 512, end, end + 512, *rng.integers(0, end, 200).tolist()]:
        path.write_bytes(original[:length])
        with pytest.raises(DamagedTar):
            scan_tar(path)
    path.write_bytes(original[: end + 1024])  # nothing that matters is missing
    assert len(scan_tar(path).rows) == 6


def damaged_copies(content, count, rng):
    """Cut, bits flipped, bytes overwritten."""
    for _ in range(count):
        copy = bytearray(content)
        for _ in range(int(rng.integers(1, 4))):
            copy[int(rng.integers(len(copy)))] = int(rng.integers(256))
        yield bytes(copy[: int(rng.integers(1, len(copy) + 1))] if rng.random() < 0.5 else copy)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_images_decode_or_are_bad_samples(kind):
    rng, buffer = np.random.default_rng(0), io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (24, 30, 3), np.uint8)).save(buffer, kind)
    outcomes = set()
    for content in damaged_copies(buffer.getvalue(), 300, rng):
        try:
            outcomes.add(decode_image(content, 8).shape)
        except BadSample:
            outcomes.add("bad")
    assert outcomes <= {(3, 8, 8), "bad"} and "bad" in outcomes


def test_damaged_arrays_captions_and_json():
    rng = np.random.default_rng(0)
    array = field_bytes(rng.standard_normal((4, 3, 3)).astype(np.float16))
    bad = 0
    for content in damaged_copies(array, 1500, rng):
        try:
            assert np.isfinite(decode_array(content).astype(np.float64)).all()
        except BadSample:
            bad += 1
    assert bad > 500
    info = '{"caption": "ein schöner Hund", "n": [1, 2]}'.encode()
    for content in damaged_copies(info, 500, rng):
        try:
            assert decode_caption(content, {}, "caption").strip()
            assert decode_caption(None, decode_info(content), "caption").strip()
        except BadSample:
            bad += 1
