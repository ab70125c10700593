"""The reward models, as tiny random instances of the real classes, against other implementations."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_rewards
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from nitro_e.config import ConfigError, from_dict
from nitro_e.encoders import clip as clip_module
from nitro_e.encoders.clip import MEAN, STD, fit_long_side, fit_short_side, load_clip
from nitro_e.files import REVISIONS
from nitro_e.rewards import RewardConfig, build_rewards, clip_scores
from nitro_e.rewards.geneval import detector as detector_module
from nitro_e.rewards.geneval.colors import ColorDetector, crop
from nitro_e.rewards.geneval.detector import Detector, Found, select
from nitro_e.rewards.geneval.rules import Detection
from nitro_e.rewards.geneval.tasks import CLASSES, COLORS
from nitro_e.rewards.scorer import quantize

PROMPTS = ["a red cat", "two dogs", "a red cat", "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of all reward models; `folder.models` holds what was saved."""
    folder = tmp_path_factory.mktemp("rewards")
    models["clip"] = tiny_rewards.save_clip(folder / "clip")
    models["hps"] = tiny_rewards.save_hps(folder / "hps", folder / "base")
    models["aesthetic"] = tiny_rewards.save_aesthetic(folder / "aesthetic")
    models["detector"] = tiny_rewards.save_mask2former(folder / "detector")
    models["imagereward"] = tiny_rewards.save_image_reward(folder / "imagereward")
    return folder


models: dict = {}


def pictures(num: int = 4, height: int = 40, width: int = 40, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    smooth = torch.rand(num, 3, 6, 6, generator=rng) * 2.4 - 1.2
    return quantize(F.interpolate(smooth, (height, width), mode="bicubic"))


def pil(pixels: torch.Tensor) -> Image.Image:
    """One picture (3, H, W) as PIL reads its PNG."""
    return Image.fromarray(((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


def normalized(images: torch.Tensor) -> torch.Tensor:
    return (images - torch.tensor(MEAN).reshape(3, 1, 1)) / torch.tensor(STD).reshape(3, 1, 1)


def score(config: dict, pixels: torch.Tensor, prompts=PROMPTS, info=None) -> torch.Tensor:
    scorer = build_rewards([from_dict(RewardConfig, config)])
    values, valid = scorer(pixels, prompts, info or [{}] * len(prompts))
    assert valid.all()
    return values[:, 0]


# --- fitting pictures to CLIP ---


@pytest.mark.parametrize("height, width", [(40, 40), (64, 40), (40, 61), (28, 28), (12, 17), (300, 200)])
def test_short_side_fit_is_pil(height, width):
    pixels = pictures(1, height, width)
    image = pil(pixels[0])
    short = min(height, width)
    new = [28 if side == short else int(28 * side / short) for side in (width, height)]
    image = image.resize(new, Image.Resampling.BICUBIC)
    left, top = (round((side - 28) / 2) for side in new)
    expected = np.asarray(image.crop((left, top, left + 28, top + 28))) / 255
    ours = fit_short_side(pixels, 28)[0].permute(1, 2, 0).numpy()
    assert ours.shape == (28, 28, 3)
    assert np.abs(ours - expected).max() < 1.01 / 255  # PIL's weights have 22 bits, which tips some roundings
    assert np.abs(ours - expected).mean() < 0.01 / 255


@pytest.mark.parametrize("height, width", [(40, 40), (64, 40), (40, 60), (20, 13)])
def test_long_side_fit_is_pil_on_floats_with_zeros_around(height, width):
    pixels = pictures(1, height, width)
    new = [round(side * 28 / max(height, width)) for side in (height, width)]
    expected = np.zeros((3, 28, 28), np.float32)
    top, left = (28 - new[0]) // 2, (28 - new[1]) // 2
    for channel, plane in enumerate(pixels[0].numpy() / 2 + 0.5):
        small = Image.fromarray(plane).resize(new[::-1], Image.Resampling.BICUBIC)
        expected[channel, top : top + new[0], left : left + new[1]] = small
    np.testing.assert_allclose(fit_long_side(pixels, 28)[0].numpy(), expected, atol=1e-5)
    assert (fit_long_side(pixels, 28, antialias=False) - fit_long_side(pixels, 28)).abs().max() > 1e-3


# --- CLIP and what is built on it ---


def features(model, images: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit features of a CLIPModel by its parts, without get_*_features."""
    seen = model.visual_projection(model.vision_model(pixel_values=images).pooler_output)
    read = model.text_projection(model.text_model(input_ids=tokens).pooler_output)
    return F.normalize(seen, dim=-1), F.normalize(read, dim=-1)


def tokens_of(folder, prompts) -> torch.Tensor:
    """(B, 77) written out: letters, the last of each word marked, begin and end, padded with the end."""
    vocabulary = json.loads((folder / "vocab.json").read_text())
    rows = []
    for prompt in prompts:
        words = [letter for word in prompt.split() for letter in [*word[:-1], word[-1] + "</w>"]]
        row = [vocabulary[word] for word in ["<|startoftext|>", *words, "<|endoftext|>"]]
        rows.append(row + [vocabulary["<|endoftext|>"]] * (77 - len(row)))
    return torch.tensor(rows)


@torch.no_grad()
def test_clipscore_and_pickscore(folder):
    pixels = pictures()
    images = normalized(fit_short_side(pixels, 28))
    seen, read = features(models["clip"], images, tokens_of(folder / "clip", PROMPTS))
    cosine = (seen @ read.T).diagonal()
    assert cosine.std() > 0.01
    clip = str(folder / "clip")
    torch.testing.assert_close(score({"name": "clipscore", "path": clip}, pixels), cosine, atol=1e-5, rtol=0)
    ours = score({"name": "pickscore", "path": clip, "options": {"tokenizer": clip}}, pixels)
    torch.testing.assert_close(ours, cosine * models["clip"].logit_scale.exp(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["clipscore", "hpsv2.1"])
def test_scores_have_gradients_for_those_who_want_them(folder, name):
    """As many as finite differences say, although CLIPScore rounds its images; the value is that of the score."""
    scorer = build_rewards([from_dict(RewardConfig, at(folder, name))])
    pixels = pictures(2, 28, 28).clone().requires_grad_()
    values = scorer.differentiate(pixels, PROMPTS[:2], [{}] * 2)
    (slope,) = torch.autograd.grad(values.sum(), pixels)
    torch.testing.assert_close(
        values, scorer(pixels.detach(), PROMPTS[:2], [{}] * 2).values[:, 0], atol=1e-5, rtol=0
    )
    step = 0.03 * slope / slope.abs().max()
    with torch.no_grad():
        ends = [
            scorer._columns[0].reward(pixels + end * step, PROMPTS[:2], [{}] * 2).sum() for end in (1, -1)
        ]
    assert (ends[0] - ends[1]).item() / 2 == pytest.approx((slope * step).sum().item(), rel=0.25)


@torch.no_grad()
def test_hps_weights_of_open_clip(folder):
    """T15 without the weights: features of our CLIPModel equal those of a plain open_clip to 1e-4."""
    pixels = pictures(4, 40, 30)
    images, tokens = normalized(fit_long_side(pixels, 28)), tokens_of(folder / "base", PROMPTS)
    end = tokens.max()
    padded = torch.where((tokens == end).cumsum(1) > 1, 0, tokens)  # open_clip pads with 0
    seen = F.normalize(models["hps"].visual(images), dim=-1)
    read = F.normalize(models["hps"].encode_text(padded), dim=-1)
    config = {"name": "hpsv2.1", "path": str(folder / "hps"), "options": {"base": str(folder / "base")}}
    torch.testing.assert_close(score(config, pixels), (seen * read).sum(-1), atol=1e-5, rtol=0)
    state = torch.load(folder / "hps" / "HPS_v2.1_compressed.pt", weights_only=True)["state_dict"]
    clip = clip_module.from_open_clip(state, str(folder / "base"), torch.float32)
    torch.testing.assert_close(clip.image_features(fit_long_side(pixels, 28)), seen, atol=1e-5, rtol=0)
    torch.testing.assert_close(clip.text_features(PROMPTS), read, atol=1e-5, rtol=0)
    assert clip.scale == pytest.approx(torch.tensor(4.6).exp().item())


def test_hps_reads_quotes_as_open_clip(folder, monkeypatch):
    from nitro_e.encoders.clip import CLIP

    seen = []
    encode = CLIP.text_features
    monkeypatch.setattr(CLIP, "text_features", lambda self, texts: seen.extend(texts) or encode(self, texts))
    prompts = ["a cat’s “hat”", "a", 'a cat\'s "hat"', "b"]
    values = score(at(folder, "hpsv2.1"), pictures(1).expand(4, -1, -1, -1), prompts)
    assert seen == ['a cat\'s "hat"', "a", "b"] and values[0] == values[2]
    # what ftfy and html.unescape make of it, written down
    for given, folded in {
        "ｆｕｌｌ　ｗｉｄｔｈ！": "full width!",
        "an oﬃcial ﬂag": "an official flag",
        "salt &amp;amp; pepper &lt;3": "salt & pepper <3",
        "  two\n spaces ": "two spaces",
        "½ m², a café": "½ m², a café",
        "‚low‘ „quotes‟": "'low' \"quotes\"",
    }.items():
        assert clip_scores.clean(given) == folded


def test_hps_from_a_folder_in_transformers_format(folder):
    pixels = pictures(4, 40, 40)
    clip = str(folder / "clip")
    ours = score({"name": "hpsv2.1", "path": clip, "options": {"base": clip, "antialias": False}}, pixels)
    model = load_clip(clip, torch.float32)
    images = fit_long_side(pixels, 28, antialias=False)
    expected = (model.image_features(images) * model.text_features(PROMPTS)).sum(-1)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_aesthetic(folder):
    pixels = pictures()
    seen, _ = features(
        models["clip"], normalized(fit_short_side(pixels, 28)), tokens_of(folder / "clip", ["a"])
    )
    config = {
        "name": "aesthetic",
        "path": str(folder / "aesthetic"),
        "options": {"clip": str(folder / "clip")},
    }
    torch.testing.assert_close(score(config, pixels), models["aesthetic"](seen)[:, 0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_image_reward_is_a_vision_transformer_read_by_bert(folder):
    prompts = ["a red cat", "a dog", "red " * 60, ""]
    pixels = pictures(4, 48, 40)
    vision, text, head = models["imagereward"]
    old = int(transformers.__version__.split(".")[0]) < 5
    seen = vision.forward_features(normalized(fit_short_side(pixels, 32)))  # (B, 5, 64)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat", "dog"]
    expected = []
    for i, prompt in enumerate(prompts):  # without padding, so without masks; cut at 35 tokens
        row = [2, *[words.index(word) for word in prompt.split()][:33], 3]
        # nothing is masked: not causal, as BLIP reads
        everything = torch.ones(1, len(row), len(row)) if old else torch.zeros(1, 1, len(row), len(row))
        read = text(
            input_ids=torch.tensor([row]), attention_mask=everything, encoder_hidden_states=seen[i : i + 1]
        )
        expected.append(
            (head(read.last_hidden_state[0, :1])[0, 0] - 0.16717362830052426) / 1.0333394966054072
        )
    options = {"tokenizer": str(folder / "imagereward" / "tokenizer")}
    config = {"name": "imagereward", "path": str(folder / "imagereward"), "options": options}
    torch.testing.assert_close(score(config, pixels, prompts), torch.stack(expected), atol=1e-5, rtol=1e-5)


ALL = {
    "clipscore": {"path": "clip"},
    "pickscore": {"path": "clip", "options": {"tokenizer": "clip"}},
    "hpsv2.1": {"path": "hps", "options": {"base": "base"}},
    "aesthetic": {"path": "aesthetic", "options": {"clip": "clip"}},
    "imagereward": {"path": "imagereward", "options": {"tokenizer": "imagereward/tokenizer"}},
}


def at(folder, name: str, **changes) -> dict:
    config = {"name": name, "path": str(folder / ALL[name]["path"])}
    options = {key: str(folder / value) for key, value in ALL[name].get("options", {}).items()}
    return config | {"options": options} | changes


@pytest.mark.parametrize("name", ALL)
def test_a_score_does_not_depend_on_the_batch(folder, name):
    pixels = pictures()
    together = score(at(folder, name), pixels)
    apart = score(at(folder, name, batch_size=1), pixels)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-4)
    half = score(at(folder, name, dtype="bfloat16", offload=True), pixels)
    torch.testing.assert_close(half, together, atol=0.05, rtol=0.05)
    assert half.dtype == torch.float32 and not torch.equal(half, together)


@pytest.mark.parametrize(
    "name, missing, message",
    [
        ("clipscore", "aesthetic", "reward 'clipscore': cannot load from folder .*; check path"),
        ("hpsv2.1", "aesthetic", "reward 'hpsv2.1': cannot load from folder"),
        ("aesthetic", "clip", "there is neither aesthetic-model.pth nor"),
        ("imagereward", "clip", "there must be ImageReward.pt and med_config.json"),
        ("clipscore", "nowhere", "reward 'clipscore': path: folder '.*nowhere' does not exist"),
        ("imagereward", "nowhere", "path: folder '.*nowhere' does not exist"),
    ],
)
def test_wrong_folders_are_one_line(folder, name, missing, message):
    scorer = build_rewards([from_dict(RewardConfig, at(folder, name, path=str(folder / missing)))])
    with pytest.raises(ConfigError, match=message) as error:
        scorer.load()
    assert "\n" not in str(error.value)


FROM_HUB = """
import torch
from nitro_e.config import ConfigError, from_dict
from nitro_e.rewards import RewardConfig, build_rewards, clip_scores

configs = [
    {"name": "clipscore"},
    {"name": "hpsv2.1"},
    {"name": "aesthetic"},
    {"name": "geneval"},
    {"name": "imagereward"},
]
scorer = build_rewards([from_dict(RewardConfig, config) for config in configs[:-1]])
scorer.load()
values = scorer(torch.zeros(1, 3, 32, 32), ["a cat"], [{}]).values[:, :3]  # the detector takes seconds
print("scores", values.isfinite().all().item(), tuple(values.shape))
try:
    build_rewards([from_dict(RewardConfig, configs[-1])]).load()
except ConfigError as error:
    print("error", error)
"""


def test_default_hub_ids_from_a_cache_without_network(folder, tmp_path):
    """The repositories and file names of the real weights, as `hf download` leaves them."""
    repositories = {
        "openai/clip-vit-large-patch14": "clip",
        "xswu/HPSv2": "hps",
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": "base",
        "trl-lib/ddpo-aesthetic-predictor": "aesthetic",
        "facebook/mask2former-swin-small-coco-instance": "detector",
    }
    for name, source in repositories.items():
        cached = tmp_path / f"models--{name.replace('/', '--')}"
        (cached / "refs").mkdir(parents=True)
        commit = REVISIONS[name] or "0" * 40
        (cached / "refs" / "main").write_text(commit)
        shutil.copytree(folder / source, cached / "snapshots" / commit)
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", FROM_HUB],
        cwd=Path(__file__).parent.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert "scores True (1, 3)" in done.stdout, done.stderr
    (error,) = [line for line in done.stdout.splitlines() if line.startswith("error")]
    assert "reward 'imagereward': cannot load from hub repository 'zai-org/ImageReward'" in error
    assert error.endswith(
        "download it with `hf download zai-org/ImageReward --revision 5736be03b2652728fb87788c9797b0570450ab72 "
        "--local-dir FOLDER` and set path: FOLDER"
    )


# --- the detector ---


def bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Corners not aligned, in double precision."""

    def weights(small: int, large: int) -> np.ndarray:
        place = ((np.arange(large) + 0.5) * small / large - 0.5).clip(0, small - 1)
        low = np.floor(place).astype(int)
        matrix = np.zeros((large, small))
        matrix[np.arange(large), low] += 1 - (place - low)
        matrix[np.arange(large), np.minimum(low + 1, small - 1)] += place - low
        return matrix

    return weights(image.shape[0], height) @ image @ weights(image.shape[1], width).T


def test_selection_is_mmdetections():
    """Against the plain algorithm over all queries x classes, thresholds last."""
    rng = np.random.default_rng(0)
    classes = rng.normal(size=(12, 81)) * 3
    masks = rng.normal(size=(12, 7, 9)) * 4
    padded, inner, size = (32, 64), (25, 60), (20, 48)
    classes[3, 5] = classes[4, 5] = 12.0  # two sure objects of one class, one of them twice a candidate
    masks[3] += 1
    classes[3, 7] = 11.5
    classes[6, 9], masks[6] = 12.0, -5.0  # sure, but nowhere
    exps = np.exp(classes)
    probabilities = (exps / exps.sum(1, keepdims=True))[:, :80]
    ranked = sorted(((p, q, k) for (q, k), p in np.ndenumerate(probabilities)), reverse=True)[:100]
    expected = []
    for p, q, k in ranked:
        logits = bilinear(bilinear(masks[q], *padded)[: inner[0], : inner[1]], *size)
        mask = logits > 0
        if mask.any():
            rows, columns = np.nonzero(mask)
            box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            expected.append((p * (1 / (1 + np.exp(-logits)))[mask].mean(), CLASSES[k], box, mask))
    expected = sorted((one for one in expected if one[0] > 0.05), key=lambda one: -one[0])
    arguments = torch.from_numpy(classes), torch.from_numpy(masks)
    found = select(*arguments, padded, inner, size, 0.05)
    assert len(found) == len(expected) > 8
    for (thing, mask), (probability, name, box, region) in zip(found, expected):
        assert (thing.name, thing.color, thing.box) == (name, None, box)
        assert thing.score == pytest.approx(probability, rel=1e-4)
        assert np.array_equal(mask.numpy(), region)
    assert sum(thing.name == CLASSES[5] for thing, _ in found) == 2  # overlapping objects stay
    assert not any(thing.name == CLASSES[9] for thing, _ in found)
    best = select(*arguments, padded, inner, size, 0.3)
    assert [one.thing for one in best] == [one.thing for one in found if one.thing.score > 0.3]


@pytest.fixture(scope="module")
def tiny_detector(folder) -> Detector:
    return detector_module.load_detector(str(folder / "detector"))


REFERENCE = Path(__file__).parent / "data" / "mask2former_mmdet_tiny.safetensors"  # made with mmdet 3.3.0


def old_names(key: str) -> str:
    """mmdetection 3's -> 2's."""
    key = re.sub(r"(pixel_decoder\.encoder\.layers\.\d+)\.self_attn\.", r"\1.attentions.0.", key)
    key = re.sub(r"(transformer_decoder\.layers\.\d+)\.cross_attn\.", r"\1.attentions.0.", key)
    key = re.sub(r"(transformer_decoder\.layers\.\d+)\.self_attn\.", r"\1.attentions.1.", key)
    return re.sub(r"^(panoptic_head.*)\.ffn\.", r"\1.ffns.0.", key)


@torch.no_grad()
@pytest.mark.parametrize("version", [2, 3])
def test_openmmlabs_weights_give_mmdetections_results(tmp_path, monkeypatch, version):
    """T15 without the real weights: logits and objects of mmdetection's own model and post-processing."""
    reference = load_file(REFERENCE)
    state = {key[6:]: value for key, value in reference.items() if key.startswith("state.")}
    if version == 2:
        state = {old_names(key): value for key, value in state.items()}
    file = tmp_path / f"mask2former_swin-tiny-{version}.pth"
    torch.save({"meta": {"epoch": 50, "CLASSES": ("person", "bicycle")}, "state_dict": state}, file)
    monkeypatch.setattr(detector_module, "SHORT_SIDE", 100)
    detector = detector_module.load_detector(str(tmp_path))
    assert detector.source == file.stem
    detector.padding = (
        detector.mean
    )  # mmdetection 3, which made the reference, pads with zeros after normalising
    images, size = detector.prepare(reference["pixels"])
    assert size == (100, 125) and images.shape == (1, 3, 128, 128)
    output = detector.model(pixel_values=images)
    torch.testing.assert_close(output.class_queries_logits, reference["classes"], atol=1e-4, rtol=0)
    torch.testing.assert_close(output.masks_queries_logits, reference["masks"], atol=1e-4, rtol=0)

    detector.min_score = 0.05
    (found,) = detector(reference["pixels"])
    num = int((reference["scores"] > 0.05).sum())
    regions = np.unpackbits(reference["regions"].numpy()).reshape(-1, 60, 75).astype(bool)
    assert len(found) == num > 20
    for i, (thing, mask) in enumerate(found):
        assert thing.score == pytest.approx(reference["scores"][i].item(), abs=1e-5)
        assert thing.name == CLASSES[reference["labels"][i]]
        assert list(thing.box) == reference["boxes"][i].tolist()
        assert np.array_equal(mask.numpy(), regions[i])


def test_weights_that_are_no_detector(tmp_path, folder):
    torch.save({"state_dict": {"backbone.x": torch.zeros(1)}}, tmp_path / "mask2former_swin-s.pth")
    config = {"name": "geneval", "path": str(tmp_path), "options": {"clip": str(folder / "clip")}}
    with pytest.raises(ConfigError, match="geneval's detector: cannot load from folder"):
        build_rewards([from_dict(RewardConfig, config)]).load()
    with pytest.raises(ConfigError, match="geneval's detector: cannot load from folder"):
        build_rewards([from_dict(RewardConfig, config | {"path": str(folder / "clip")})]).load()


def test_detector_without_what_is_not_used(folder, tmp_path):
    """Files of older transformers lack a norm that newer ones have and do not use."""
    weights = load_file(folder / "detector" / "model.safetensors")
    kept = {key: value for key, value in weights.items() if ".swin.layernorm." not in key}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "detector" / "config.json").read_text())
    detector_module.load_detector(str(tmp_path))
    del kept["class_predictor.bias"]
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 weights are missing"):
        detector_module.load_detector(str(tmp_path))


def test_detector_input(tiny_detector):
    pixels = pictures(1, 512, 512)
    images, size = tiny_detector.prepare(pixels)
    assert size == (800, 800) and images.shape == (1, 3, 800, 800)
    expected = np.asarray(pil(pixels[0]).resize((800, 800), Image.Resampling.BILINEAR), np.float32)
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])  # mmdetection's, RGB
    expected = (expected - mean) / std
    assert np.abs(images[0].permute(1, 2, 0).numpy() - expected).max() < 1.01 / 57
    for (height, width), inner in {(500, 1000): (667, 1333), (300, 400): (800, 1067)}.items():
        images, size = tiny_detector.prepare(pictures(1, height, width))
        assert size == inner
        assert images.shape[2:] == tuple(-(-side // 32) * 32 for side in inner)
        gray = (
            torch.from_numpy((128 - mean) / std).float().reshape(1, 3, 1, 1)
        )  # mmdetection 2: before normalising
        for outside in (images[..., size[1] :], images[..., size[0] :, :]):
            torch.testing.assert_close(outside, gray.expand_as(outside), atol=1e-5, rtol=0)


def test_channels_are_red_green_blue(tiny_detector, monkeypatch):
    monkeypatch.setattr(detector_module, "SHORT_SIDE", 64)
    red = torch.tensor([1.0, -1.0, -1.0]).reshape(1, 3, 1, 1).expand(1, 3, 64, 64)
    images, _ = tiny_detector.prepare(red)
    torch.testing.assert_close(
        images[0, :, 0, 0], torch.tensor([2.2489, -2.0357, -1.8044]), atol=1e-4, rtol=0
    )
    pixels = pictures(1, 64, 64)
    logits = [
        tiny_detector.model(tiny_detector.prepare(p)[0]).class_queries_logits
        for p in (pixels, pixels.flip(1))
    ]
    assert (logits[0] - logits[1]).abs().max() > 1e-4


@torch.no_grad()
def test_detector_end_to_end(tiny_detector, monkeypatch):
    """The tiny network is sure of nothing; with a threshold of 0 it finds something."""
    monkeypatch.setattr(detector_module, "SHORT_SIDE", 64)
    pixels = pictures(3, 48, 64)
    assert [len(found) for found in tiny_detector(pixels)] == [0, 0, 0]
    monkeypatch.setattr(tiny_detector, "min_score", 0.0)
    together = tiny_detector(pixels)
    for i, found in enumerate(together):
        assert found and all(one.mask.shape == (48, 64) for one in found)
        assert [one.thing.score for one in found] == sorted((one.thing.score for one in found), reverse=True)
        (alone,) = tiny_detector(pixels[i : i + 1])
        assert [one.thing.box for one in alone] == [one.thing.box for one in found]


def test_a_detector_of_other_classes_is_refused(folder):
    model = tiny_rewards.save_mask2former(folder / "detector2")
    model.config.id2label = {i: f"LABEL_{i}" for i in range(80)}
    with pytest.raises(ConfigError, match="it must have COCO's 80"):
        Detector(model, "x")


# --- colors and reward ---


class FakeDetector(torch.nn.Module):
    """Finds what it is told to."""

    def __init__(self, found: list[list[Found]]) -> None:
        super().__init__()
        self.found = found

    def forward(self, pixels):
        return self.found


def disc(x: int, y: int, radius: int, name: str, score: float) -> Found:
    rows, columns = np.mgrid[:64, :64]
    mask = (columns - x) ** 2 + (rows - y) ** 2 <= radius**2
    box = (x - radius, y - radius, x + radius + 1, y + radius + 1)
    return Found(Detection(name, None, box, score), torch.from_numpy(mask))


def test_crops_are_pils():
    image, found = pictures(1, 64, 64)[0], disc(20, 30, 9, "cup", 1.0)
    picture = pil(image)
    gray = Image.new("RGB", picture.size, "#999")
    expected = Image.composite(picture, gray, Image.fromarray(found.mask.numpy())).crop(found.thing.box)
    assert np.array_equal(np.asarray(pil(crop(image, found.mask, found.thing.box))), np.asarray(expected))


@torch.no_grad()
def test_colors_of_the_asked_objects(folder):
    clip = load_clip(str(folder / "clip"), torch.float32)
    found = [disc(16, 16, 10, "cup", 0.8), disc(46, 46, 12, "cup", 0.9), disc(40, 12, 8, "dog", 0.7)]
    found.append(disc(12, 48, 8, "cup", 0.25))  # below the threshold
    image = pictures(1, 64, 64, seed=3)
    look = ColorDetector(FakeDetector([sorted(found, key=lambda one: -one.thing.score)]), clip)
    record = {
        "tag": "color_attr",
        "include": [{"class": "cup", "count": 1, "color": "red"}, {"class": "dog", "count": 1}],
    }
    (things,) = look(image, [record])
    assert [(thing.name, thing.score) for thing in things] == [("cup", 0.9), ("cup", 0.8), ("dog", 0.7)]
    assert things[1].color is None and things[2].color is None  # only the best cup was asked for

    texts = []  # the classifier written out
    for color in COLORS:
        phrases = [
            f"a photo of a {color} cup",
            f"a photo of a {color}-colored cup",
            f"a photo of a {color} object",
        ]
        parts = features(models["clip"], torch.zeros(1, 3, 28, 28), tokens_of_phrases(folder, phrases))[1]
        texts.append(F.normalize(parts.mean(0), dim=0))
    small = pil(crop(image[0], found[1].mask, found[1].thing.box)).resize((28, 28), Image.Resampling.BICUBIC)
    seen = torch.from_numpy(np.array(small)).permute(2, 0, 1).float()[None] / 255
    seen, _ = features(models["clip"], normalized(seen), torch.tensor([[1] * 77]))
    similarity = seen @ torch.stack(texts).T
    assert things[0].color == COLORS[similarity.argmax()]
    torch.testing.assert_close(torch.stack(texts), look._color_features("cup"), atol=1e-5, rtol=0)
    (things,) = look(image, [{"tag": "colors", "include": [{"class": "cup", "count": 2, "color": "red"}]}])
    assert things[0].color and things[1].color and things[2].color is None


def tokens_of_phrases(folder, phrases) -> torch.Tensor:
    """The tokenizer splits at the hyphen."""
    return tokens_of(folder / "clip", [phrase.replace("-", " - ") for phrase in phrases])


def test_geneval_reward_modes(folder, monkeypatch):
    monkeypatch.setattr(detector_module, "SHORT_SIDE", 64)
    cups = {
        "tag": "counting",
        "include": [{"class": "cup", "count": 2}],
        "exclude": [{"class": "cup", "count": 3}],
    }
    info = [cups, {}, cups]
    pixels = pictures(3, 64, 64)
    found = [[disc(16, 16, 8, "cup", 0.95), disc(46, 46, 8, "cup", 0.85)], [disc(16, 16, 8, "cup", 0.95)] * 2]
    config = {"name": "geneval", "path": str(folder / "detector"), "options": {"clip": str(folder / "clip")}}
    for mode, expected in {"graded": [0.5, 1.0], "official": [0.0, 1.0]}.items():
        options = config["options"] | {"mode": mode}
        scorer = build_rewards([from_dict(RewardConfig, config | {"options": options})])
        # the tiny one finds nothing
        assert scorer(pixels, ["p"] * 3, info).values[:, 0].tolist()[::2] == [0, 0]
        scorer._columns[0].reward.color_detector.detector = FakeDetector(found)
        values, valid = scorer(pixels, ["p"] * 3, info)
        assert valid[:, 0].tolist() == [True, False, True]  # the second prompt has no metadata
        assert values[::2, 0].tolist() == pytest.approx(expected)  # .85 is not sure enough for counting
        assert scorer.tally["geneval"].skipped == 2
    with pytest.raises(ConfigError, match="unknown mode 'grade', did you mean 'graded'"):
        build_rewards([from_dict(RewardConfig, config | {"options": {"mode": "grade"}})]).load()
