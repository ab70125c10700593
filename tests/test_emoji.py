"""The tool of configs/emoji on a few made pictures: components that train, resume and load; baselines; the grid."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nitro_e.config import ConfigError
from nitro_e.encoders.components import ComponentConfig, build_codec, build_vision_encoder
from nitro_e.files import EMOJI
from nitro_e.rewards.retrieval import Retrieval
from nitro_e.sampling.pipeline import TextToImage
from tools import emoji

STYLES = emoji.STYLES


def write_shard(path, cells):
    """One picture of noise in large squares per (concept, style, split)."""
    with tarfile.open(path, "w") as tar:
        for number, (concept, style, split) in enumerate(cells):
            squares = np.random.default_rng(number).integers(0, 256, (4, 4, 3), np.uint8)
            image, content = io.BytesIO(), {"concept": concept, "style": style, "split": split}
            Image.fromarray(squares.repeat(32, 0).repeat(32, 1)).save(image, "webp", lossless=True)
            for kind, data in (
                ("webp", image.getvalue()),
                ("txt", f"an emoji of {concept}, {style} style".encode()),
                ("json", json.dumps(content).encode()),
            ):
                member = tarfile.TarInfo(f"{number:06d}.{kind}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return str(path)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    cells = [
        (f"red thing {n}", style, "train") for n in range(3) for style in STYLES if (n, style) != (0, "flat")
    ]
    held = [("red thing 0", "flat", "unseen pair"), ("blue thing 9", "noto", "unseen concept")]
    return write_shard(folder / "train.tar", cells), write_shard(folder / "heldout.tar", held)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(emoji.PicturesCodec, "compiled", False)
    monkeypatch.setattr(emoji.PicturesCodec, "channels", (8, 8, 16, 16, 16))
    for task in emoji.COMPONENTS.values():
        monkeypatch.setattr(task, "batch", 4)


def run(name, shards, *more):
    return emoji.main([name, "--shards", shards[0], "--test-shards", shards[1], *map(str, more)])


@pytest.fixture(scope="module")
def style(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("style")
    assert run("style", shards, "--out", folder, "--steps", 1) == 0
    return folder


@pytest.mark.parametrize("name", ["codec", "vision", "style", "judge"])
def test_training_goes_on_where_it_was_stopped(name, shards, style, tmp_path, monkeypatch):
    """Two steps at once, and two commands of which the first is stopped after one: the same weights."""
    monkeypatch.setattr("nitro_e.training.components.SAVE_EVERY", 0)
    more = ("--style", style) if name == "judge" else ()
    assert run(name, shards, "--out", tmp_path / "whole", "--steps", 2, *more) == 0
    task = emoji.COMPONENTS[name]
    original = task.loss
    with monkeypatch.context() as patch:
        patch.setattr(
            task,
            "loss",
            lambda self, step: original(self, step) if step < 1 else (_ for _ in ()).throw(OSError),
        )
        assert run(name, shards, "--out", tmp_path / "parts", "--steps", 2, *more) != 0
    assert run(name, shards, "--out", tmp_path / "parts", "--steps", 2, *more) == 0
    file = "style.safetensors" if name == "style" else "*model.safetensors"
    whole, parts = (next((tmp_path / folder).glob(file)) for folder in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()
    assert json.loads((tmp_path / "whole/metrics.json").read_text())["command"].startswith(
        f"python tools/emoji.py {name} --seed 0 --steps 2"
    )


def test_the_judge_never_learns_from_held_out_pictures_but_knows_them(shards, style, tmp_path):
    """Its classes are those of training; its gallery holds the held-out pictures, marked as such."""
    assert run("judge", shards, "--out", tmp_path / "judge", "--steps", 1, "--style", style) == 0
    judge = Retrieval(str(tmp_path / "judge"))
    assert judge.is_train.tolist() == [True] * 14 + [False] * 2
    assert judge.names["concept"] == ["blue thing 9", "red thing 0", "red thing 1", "red thing 2"]
    task = emoji.PicturesJudge(0, [shards[0]], [shards[1]], str(style))
    assert task.concept_names == ["red thing 0", "red thing 1", "red thing 2"]


def test_baselines_copy_what_they_say(shards, style, tmp_path, capsys):
    """Real pictures have rank 1; another style is never the style asked for; the nearest words are found."""
    train, test = emoji.Pictures([shards[0]]), emoji.Pictures([shards[1]])
    other = emoji.nearest_words(train, test, same_style=False)
    same = emoji.nearest_words(train, test, same_style=True)
    assert train.concepts[other[0]] == "red thing 0" and train.styles[other[0]] != "flat"
    assert [train.styles[row] for row in same] == ["flat", "noto"]
    assert run("codec", shards, "--out", tmp_path / "codec", "--steps", 1) == 0
    assert run("judge", shards, "--out", tmp_path / "judge", "--steps", 1, "--style", style) == 0
    folders = ("--judge", tmp_path / "judge", "--codec", tmp_path / "codec", "--out", tmp_path / "found.json")
    assert run("baselines", shards, *folders) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == 5
    for split in ("unseen pair", "unseen concept"):
        assert found["the real pictures"][split]["first"] == 1
        assert found["training picture nearest to the true one"][split]["novelty"] == pytest.approx(
            0, abs=1e-3
        )


def test_pictures_without_a_concept_are_refused(tmp_path):
    path = write_shard(tmp_path / "bad.tar", [("x", "flat", "train")])
    with tarfile.open(path, "a") as tar:
        image = io.BytesIO()
        Image.new("RGB", (8, 8)).save(image, "png")
        member = tarfile.TarInfo("lonely.png")
        member.size = len(image.getvalue())
        image.seek(0)
        tar.addfile(member, image)
    with pytest.raises(ConfigError, match="sample lonely has no image or no concept and style"):
        emoji.Pictures([path])


def test_augmented_pictures_stay_on_white_and_are_a_function_of_the_seed():
    pixels = torch.ones(4, 3, 32, 32)
    first, second = (emoji.augment(pixels, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.mean() > 0.8 and first.std() < 0.2


def test_the_shipped_codec_draws_held_out_pictures_as_its_metrics_say():
    """Four pictures of Microsoft's Fluent Emoji (MIT) that training never saw: about the PSNR of metrics.json."""
    codec = build_codec(ComponentConfig(name="emoji-dc-ae"))
    pixels = emoji.Pictures([str(Path(__file__).parent / "data/emoji_heldout.tar")]).pixels(slice(None))
    latents = codec.normalize(codec.encode_pixels(pixels))
    assert latents.shape == (4, 32, 8, 8) and 0.7 < latents.std() < 1.3
    error = ((codec.decode(latents) - pixels) / 2).square().mean()
    metrics = json.loads((EMOJI / "codec/metrics.json").read_text())
    assert -10 * error.log10() > metrics["psnr_test"] - 2.5
    features = build_vision_encoder(ComponentConfig(name="emoji-vit")).features(pixels, (8, 8))
    assert features.shape == (4, 64, 128)


def test_the_shipped_weights_draw_on_white_what_the_style_says():
    """Outlined pictures have black lines, flat ones hardly any; the corners are white, as in training."""
    pipeline = TextToImage.from_pretrained("emoji")
    prompts = [f"an emoji of blue heart, {style} style" for style in ("outlined", "flat")]
    seeds = [torch.Generator().manual_seed(0) for _ in prompts]
    images = pipeline(prompts, num_inference_steps=8, generator=seeds).images
    outlined, flat = (np.asarray(image, np.float32) / 255 for image in images)
    for image in (outlined, flat):
        assert image[:6, :6].mean() > 0.9 and image[-6:, -6:].mean() > 0.9
    black = [(image.max(-1) < 0.25).mean() for image in (outlined, flat)]
    assert black[0] > 2 * black[1] + 0.005
    blue = flat[..., 2] - flat[..., 0]
    assert blue[40:80, 40:88].mean() > 0.2
