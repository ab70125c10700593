import shutil

import pytest
import torch
from tiny import save_dinov2
from torchvision.transforms import v2 as transforms

from nitro_e.config import ConfigError
from nitro_e.encoders.components import ComponentConfig, build_vision_encoder, vision_width
from nitro_e.files import REVISIONS


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dinov2")
    return folder, save_dinov2(folder)


def images(height, width):
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("size, grid", [((56, 56), (4, 4)), ((64, 32), (5, 3)), ((28, 28), (6, 6))])
def test_features_equal_the_library(dinov2, size, grid):
    folder, reference = dinov2
    encoder = build_vision_encoder(ComponentConfig(name="dinov2-b14", path=str(folder)))
    assert encoder.width == 24
    pixels = images(*size)
    features = encoder.features(pixels, grid)
    assert features.shape == (2, grid[0] * grid[1], 24) and not features.requires_grad
    prepare = transforms.Compose(
        [
            transforms.Resize(
                (14 * grid[0], 14 * grid[1]), transforms.InterpolationMode.BICUBIC, antialias=True
            ),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    with torch.no_grad():
        expected = reference.forward_features(prepare((pixels + 1) / 2))
    assert expected.shape[1] == 3 + grid[0] * grid[1]  # a class token and two registers in front
    torch.testing.assert_close(features, expected[:, 3:], atol=1e-4, rtol=1e-4)


def test_only_safetensors_are_read(dinov2, tmp_path):
    shutil.copy(dinov2[0] / "config.json", tmp_path)
    torch.save(dinov2[1].state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="there is no model.safetensors"):
        build_vision_encoder(ComponentConfig(name="dinov2-b14", path=str(tmp_path)))


def test_rows_of_the_grid_follow_the_image(dinov2):
    """Changing the bottom right patch changes the last feature most."""
    encoder = build_vision_encoder(ComponentConfig(name="dinov2-b14", path=str(dinov2[0])))
    pixels = images(42, 28)
    changed = pixels.clone()
    changed[:, :, 28:, :14] *= -1  # third row, first column of a 3 x 2 grid
    difference = (encoder.features(changed, (3, 2)) - encoder.features(pixels, (3, 2))).norm(dim=-1)
    assert (difference.argmax(dim=1) == 4).all()


def test_bfloat16_weights_give_float32_features(dinov2):
    folder, _ = dinov2
    full = build_vision_encoder(ComponentConfig(name="dinov2-b14", path=str(folder))).features(
        images(56, 56), (4, 4)
    )
    encoder = build_vision_encoder(ComponentConfig(name="dinov2-b14", path=str(folder), dtype="bfloat16"))
    half = encoder.features(images(56, 56), (4, 4))
    assert half.dtype == torch.float32 and not torch.equal(half, full)
    assert torch.cosine_similarity(half, full, dim=-1).min() > 0.99


@pytest.mark.parametrize(
    "name, architecture, published",
    [
        ("dinov3-b16", "vit_base_patch16_dinov3", "vit_base_patch16_dinov3.lvd1689m"),
        ("siglip2-b16", "vit_base_patch16_siglip_224", "vit_base_patch16_siglip_224.v2_webli"),
        ("clip-b16", "vit_base_patch16_clip_224", "vit_base_patch16_clip_224.openai"),
    ],
)
def test_each_target_has_its_own_normalisation(tmp_path, name, architecture, published):
    """Features are timm's own, of images prepared as timm says that the published weights want them."""
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(0)
    sizes = {"img_size": 64, "embed_dim": 24, "depth": 1, "num_heads": 2}
    reference = timm.create_model(architecture, num_classes=0, dynamic_img_size=True, **sizes).eval()
    save_for_hf(reference, str(tmp_path), model_args=sizes, safe_serialization=True)
    encoder = build_vision_encoder(ComponentConfig(name=name, path=str(tmp_path)))
    cfg = timm.get_pretrained_cfg(published)
    assert f"timm/{published}" in REVISIONS and cfg.hf_hub_id == f"timm/{published}"
    pixels = images(48, 80)  # of the size that is wanted: nothing is resized
    with torch.no_grad():
        tokens = reference.forward_features(transforms.Normalize(cfg.mean, cfg.std)((pixels + 1) / 2))
    features = encoder.features(pixels, (3, 5))
    assert features.shape == (2, 15, 24)
    torch.testing.assert_close(features, tokens[:, -15:], atol=1e-4, rtol=1e-4)
    assert vision_width(ComponentConfig(name=name)) == 768


def test_errors(tmp_path):
    assert vision_width(ComponentConfig(name="dinov2-b14")) == 768
    assert vision_width(ComponentConfig(name="dinov2-b14", path=str(tmp_path))) is None
    with pytest.raises(ConfigError, match="components.vision.name: unknown 'dinov2'.*dinov2-b14"):
        build_vision_encoder(ComponentConfig(name="dinov2"))
    with pytest.raises(ConfigError, match="components.vision=dinov2-b14=FOLDER"):
        build_vision_encoder(ComponentConfig(name="dinov2-b14", path=str(tmp_path)))
    with pytest.raises(ConfigError, match="components.vision.length"):
        build_vision_encoder(ComponentConfig(name="dinov2-b14", length=4))
