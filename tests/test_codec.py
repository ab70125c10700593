import math

import numpy as np
import pytest
import torch
from tiny import save_autoencoder_dc

from nitro_e.config import ConfigError, from_dict
from nitro_e.encoders.codec import DCT_SIZES, DCTCodec, dct_matrix, dct_scale, kept_frequencies
from nitro_e.encoders.components import ComponentConfig, build_codec, codec_shape


def images(size, batch=2, seed=0):
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def dc_ae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dc_ae")
    return folder, save_autoencoder_dc(folder)


@pytest.mark.parametrize("stride", [2, 8])
def test_keeping_all_coefficients_loses_nothing(stride):
    codec = DCTCodec(stride, stride**2, stride**2)
    pixels = images((16, 32))
    raw = codec.encode_pixels(pixels)
    assert raw.shape == (2, 3 * stride**2, 16 // stride, 32 // stride)
    torch.testing.assert_close(codec.decode(codec.normalize(raw)), pixels, atol=2e-6, rtol=0)


def test_coefficients_match_the_cosine_sum():
    """JPEG's definition (ITU-T T.81, A.3.3), which for 8 x 8 blocks is 1/4 C(u) C(v) sum sum f cos cos."""
    pixels = images((8, 16), batch=1)
    raw = DCTCodec(8, 64, 64).encode_pixels(pixels)[0, :, 0, 1].numpy()
    red, green, blue = pixels[0, :, :, 8:].double().numpy()
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    planes = [luma, (blue - luma) / 1.772, (red - luma) / 1.402]
    for plane, values in enumerate(planes):
        for channel, (u, v) in list(enumerate(kept_frequencies(8, 64)))[:12]:
            total = 0.0
            for y in range(8):
                for x in range(8):
                    total += (
                        values[y, x]
                        * math.cos((2 * y + 1) * u * math.pi / 16)
                        * math.cos((2 * x + 1) * v * math.pi / 16)
                    )
            total *= 0.25 * (1 / math.sqrt(2) if u == 0 else 1) * (1 / math.sqrt(2) if v == 0 else 1)
            assert raw[plane * 64 + channel] == pytest.approx(total, abs=1e-5)


def test_transform_is_orthonormal_so_energy_is_kept():
    for n in (2, 8, 16):
        torch.testing.assert_close(dct_matrix(n) @ dct_matrix(n).T, torch.eye(n, dtype=torch.float64))
    grey = images((32, 32))[:, :1].expand(-1, 3, -1, -1)  # no chroma, luma = grey
    raw = DCTCodec(8, 64, 0).encode_pixels(grey)
    torch.testing.assert_close(raw.square().sum(), grey[:, 0].square().sum())


def test_frequencies_are_kept_from_low_to_high():
    assert kept_frequencies(8, 6) == [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0)]
    rows = torch.linspace(-1, 1, 8).reshape(1, 1, 8, 1).expand(1, 3, 8, 8)  # varies vertically: u, not v
    raw = DCTCodec(8, 4, 0).encode_pixels(rows)[0, :, 0, 0]
    assert raw[2].abs() > 1 and raw[[0, 1, 3]].abs().max() < 1e-5


@pytest.mark.parametrize("name", list(DCT_SIZES))
def test_named_dct_codecs(name):
    config = from_dict(ComponentConfig, name)
    codec = build_codec(config)
    stride, luma, chroma = DCT_SIZES[name]
    assert codec_shape(config) == (codec.channels, codec.stride) == (luma + 2 * chroma, stride)
    assert name == f"dct-f{codec.stride}c{codec.channels}"
    white = codec.normalize(codec.encode_pixels(torch.ones(1, 3, 2 * stride, stride)))
    assert white.shape == (1, codec.channels, 2, 1) and white.dtype == torch.float32
    torch.testing.assert_close(white[0, 0], torch.full((2, 1), 2.0))  # a uniform pixel p becomes 2 p
    assert white[0, 1:].abs().max() < 1e-5
    latents = torch.randn(2, codec.channels, 3, 2) * 3
    decoded = codec.decode(latents)
    assert decoded.shape == (2, 3, 3 * stride, 2 * stride) and decoded.abs().max() == 1  # clipped
    small = latents / 100  # not clipped: decode is a right inverse of encode + normalize
    torch.testing.assert_close(
        codec.normalize(codec.encode_pixels(codec.decode(small))), small, atol=1e-4, rtol=1e-4
    )


def test_half_precision_input_is_computed_in_float32():
    codec = DCTCodec(8, 12, 6)
    raw = codec.encode_pixels(images((16, 16)))
    stored = torch.from_numpy(raw.numpy().astype(np.float16))  # what shards hold
    assert codec.normalize(stored).dtype == codec.decode(stored).dtype == torch.float32


def test_scales_bring_a_power_law_image_near_unit_variance():
    """Images with the amplitude spectrum 1 / f of natural images: white noise shaped by an FFT."""
    size, noise = 128, torch.randn(64, 128, 128, generator=torch.Generator().manual_seed(0))
    f = torch.fft.fftfreq(size)
    radius = (f[:, None].square() + f.square()).sqrt().clamp(min=1 / size)
    grey = torch.fft.ifft2(torch.fft.fft2(noise) / radius).real
    grey = (grey / grey.std() * 0.45)[:, None].expand(-1, 3, -1, -1)
    for n in (8, 16):
        codec = DCTCodec(n, 12, 0)
        std = codec.normalize(codec.encode_pixels(grey)).std(dim=(0, 2, 3))
        assert 0.4 < std.min() and std.max() < 2.5
    assert dct_scale(8, 0, 1, 1) == dct_scale(8, 0, 1, 0) / 2


def test_autoencoder_dc_equals_the_library(dc_ae):
    folder, reference = dc_ae
    codec = build_codec(ComponentConfig(name="dc-ae-f32c32", path=str(folder)))
    assert (codec.channels, codec.stride, codec.scaling_factor) == (8, 4, 0.5)
    pixels = images((32, 16))
    with torch.no_grad():
        expected = reference.encode(pixels).latent
        decoded = reference.decode(expected).sample
    raw = codec.encode_pixels(pixels)
    assert raw.shape == (2, 8, 8, 4)
    torch.testing.assert_close(raw, expected)
    torch.testing.assert_close(codec.normalize(raw), expected * 0.5)
    torch.testing.assert_close(codec.decode(expected * 0.5), decoded.clamp(-1, 1))
    loud = codec.decode(torch.randn(1, 8, 4, 4) * 1000)
    assert loud.min() == -1 and loud.max() == 1
    assert not any(parameter.requires_grad for parameter in codec.autoencoder.parameters())


def test_autoencoder_dc_in_bfloat16_returns_float32(dc_ae):
    folder, reference = dc_ae
    codec = build_codec(ComponentConfig(name="dc-ae-f32c32", path=str(folder), dtype="bfloat16"))
    assert next(codec.autoencoder.parameters()).dtype == torch.bfloat16
    with torch.no_grad():
        expected = reference.encode(images((32, 16))).latent
    raw = codec.encode_pixels(images((32, 16)))
    assert raw.dtype == codec.decode(raw).dtype == torch.float32
    assert (raw - expected).norm() < 0.05 * expected.norm()


def test_large_images_are_decoded_in_tiles(dc_ae, monkeypatch):
    """Each tile is decoded alone, and blended with the one before over the overlap. Up to TILE nothing changes."""
    folder, reference = dc_ae
    codec = build_codec(ComponentConfig(name="dc-ae-f32c32", path=str(folder)))
    latents = torch.randn(2, 8, 24, 12, generator=torch.Generator().manual_seed(0)) / 20
    with torch.no_grad():
        whole, first, second = (
            reference.decode(part / 0.5).sample for part in (latents, latents[:, :, :16], latents[:, :, 12:])
        )
    assert torch.equal(codec.decode(latents), whole.clamp(-1, 1))
    monkeypatch.setattr("nitro_e.encoders.codec.TILE", 64)
    monkeypatch.setattr("nitro_e.encoders.codec.OVERLAP", 16)
    tiled = codec.decode(latents)  # 96 x 48 px in tiles of 64 and 48 rows
    share = (torch.arange(16) / 16)[:, None]
    between = (1 - share) * first[:, :, 48:] + share * second[:, :, :16]
    expected = torch.cat([first[:, :, :48], between, second[:, :, 16:]], dim=2).clamp(-1, 1)
    torch.testing.assert_close(tiled, expected)
    pixels = images((96, 48))
    with torch.no_grad():
        first, second = (reference.encode(part).latent for part in (pixels[:, :, :64], pixels[:, :, 48:]))
    share = (torch.arange(4) / 4)[:, None]
    between = (1 - share) * first[:, :, 12:] + share * second[:, :, :4]
    expected = torch.cat([first[:, :, :12], between, second[:, :, 4:]], dim=2)
    torch.testing.assert_close(codec.encode_pixels(pixels), expected)
    with torch.no_grad():  # the autoencoder itself is left without tiles
        whole = reference.encode(pixels).latent
        torch.testing.assert_close(codec.autoencoder.encode(pixels).latent, whole)


def test_large_batches_are_encoded_a_few_at_a_time(dc_ae, monkeypatch):
    codec = build_codec(ComponentConfig(name="dc-ae-f32c32", path=str(dc_ae[0])))
    pixels = images((16, 16)).repeat(3, 1, 1, 1)
    whole, encode, sizes = codec.encode_pixels(pixels), codec._encode, []
    monkeypatch.setattr("nitro_e.encoders.codec.AT_ONCE", 4 * 16 * 16)
    monkeypatch.setattr(codec, "_encode", lambda x: sizes.append(len(x)) or encode(x))
    torch.testing.assert_close(codec.encode_pixels(pixels), whole)
    assert sizes == [4, 2]


@pytest.mark.parametrize("place", ["", "vae"])
@pytest.mark.parametrize("shift", [None, 0.1159])
def test_autoencoder_kl_equals_the_library(tmp_path, place, shift):
    """Latents are (mode - shift) x scale, as diffusers' own pipelines compute them; a pipeline's folder will do."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    reference = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.3611,
        shift_factor=shift,
        sample_size=32,
    ).eval()
    reference.save_pretrained(tmp_path / place, safe_serialization=True)
    codec = build_codec(ComponentConfig(name="flux-f8c16", path=str(tmp_path)))
    assert (codec.channels, codec.stride) == (4, 2)
    pixels = images((32, 16))
    with torch.no_grad():
        mode = reference.encode(pixels).latent_dist.mode()
        decoded = reference.decode(mode).sample.clamp(-1, 1)
    raw = codec.encode_pixels(pixels)
    torch.testing.assert_close(raw, mode)
    latents = codec.normalize(raw)
    torch.testing.assert_close(latents, (mode - (shift or 0)) * 0.3611)
    torch.testing.assert_close(codec.decode(latents), decoded)


def test_other_autoencoders_by_name():
    shapes = {"dc-ae-f64c128": (128, 64), "sd-f8c4": (4, 8), "sdxl-f8c4": (4, 8), "flux-f8c16": (16, 8)}
    for name, (channels, stride) in shapes.items():
        assert codec_shape(ComponentConfig(name=name)) == (channels, stride)
        assert name.endswith(f"f{stride}c{channels}")


def test_bad_sizes_are_refused(dc_ae):
    for codec in (DCTCodec(8, 12, 6), build_codec(ComponentConfig(name="dc-ae-f32c32", path=str(dc_ae[0])))):
        with pytest.raises(ConfigError, match="18x32 is not a multiple"):
            codec.encode_pixels(images((32, 18)))
        with pytest.raises(ConfigError, match=r"\(B, 3, H, W\)"):
            codec.encode_pixels(torch.zeros(2, 1, 32, 32))


def test_errors_name_the_key_and_the_remedy(tmp_path, dc_ae):
    with pytest.raises(
        ConfigError, match="components.codec.name: unknown 'dct-f8c25', did you mean 'dct-f8c24'"
    ):
        build_codec(ComponentConfig(name="dct-f8c25"))
    with pytest.raises(ConfigError, match="components.codec.path: folder '/no/such/folder' does not exist"):
        build_codec(ComponentConfig(name="dc-ae-f32c32", path="/no/such/folder"))
    with pytest.raises(ConfigError, match="components.codec=dc-ae-f32c32=FOLDER") as error:
        build_codec(ComponentConfig(name="dc-ae-f32c32", path=str(tmp_path)))  # an empty folder
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="components.codec.revision"):
        build_codec(ComponentConfig(name="dc-ae-f32c32", path=str(dc_ae[0]), revision="main"))
    for key, value in {"path": "x", "dtype": "bfloat16", "length": 5, "clean_caption": True}.items():
        with pytest.raises(ConfigError, match=f"components.codec.{key}"):
            codec_shape(ComponentConfig(name="dct-f8c24", **{key: value}))


def test_unreachable_hub_is_one_line(monkeypatch, tmp_path):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="hf download mit-han-lab/dc-ae") as error:
        build_codec(ComponentConfig(name="dc-ae-f32c32", path="nobody/nothing-here"))
    assert "hub repository 'nobody/nothing-here'" in str(error.value) and "\n" not in str(error.value)


def test_missing_weights_are_an_error(tmp_path):
    from safetensors.torch import load_file, save_file

    save_autoencoder_dc(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    weights = load_file(file)
    del weights["decoder.conv_out.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="1 weights are missing"):
        build_codec(ComponentConfig(name="dc-ae-f32c32", path=str(tmp_path)))
