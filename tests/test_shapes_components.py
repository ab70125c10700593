"""The offline encoders: what the package ships does what its metrics say, and the tool that trained them works."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import OPTIMIZER

from nitro_e.encoders.components import ComponentConfig, build_codec, build_text_encoder, build_vision_encoder
from nitro_e.files import SHIPPED
from nitro_e.shapes.judge import judge
from nitro_e.shapes.scenes import COLORS, SHAPES, metadata, scene
from tools import train_components


@pytest.fixture(scope="module")
def held_out():
    return train_components.Scenes(240, seed=77, split="heldout")


def test_codec_keeps_what_the_judge_needs(held_out):
    """Images of combinations it has never seen, clean and after the errors a sampler makes."""
    codec = build_codec(ComponentConfig(name="shapes-dc-ae"))
    pixels = held_out.pixels(slice(None))
    latents = codec.normalize(codec.encode_pixels(pixels))
    assert latents.shape == (240, 8, 8, 8)
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(8), atol=0.1, rtol=0)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(8), atol=0.1, rtol=0)
    decoded = codec.decode(latents)
    psnr = -10 * ((decoded - pixels) / 2).square().mean(dim=(1, 2, 3)).log10()
    assert psnr.mean() >= 30
    noisy = codec.decode(
        latents + 0.2 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    )
    infos = [metadata(drawn.request) for drawn in held_out.scenes]
    for images in (decoded, noisy):
        assert np.mean([verdict.strict for verdict in judge(images, infos)]) >= 0.97


def ridge(features: torch.Tensor, classes: torch.Tensor, count: int) -> torch.Tensor:
    """Weights of a linear classifier by regularised least squares."""
    rows = torch.cat([features, torch.ones(len(features), 1)], dim=1).double()
    gram = rows.T @ rows + 1e-3 * len(rows) * torch.eye(rows.shape[1], dtype=torch.float64)
    return torch.linalg.solve(gram, rows.T @ torch.nn.functional.one_hot(classes, count).double())


def accuracy(weights: torch.Tensor, features: torch.Tensor, classes: torch.Tensor) -> float:
    rows = torch.cat([features, torch.ones(len(features), 1)], dim=1).double()
    return ((rows @ weights).argmax(1) == classes).double().mean().item()


def test_vision_features_tell_what_covers_a_cell(held_out):
    """By a linear probe fitted here on one half of the scenes: far above a probe of the pixels themselves."""
    encoder = build_vision_encoder(ComponentConfig(name="shapes-vit"))
    pixels = held_out.pixels(slice(None))
    features = encoder.features(pixels, (8, 8))  # (B, 64, 128)
    assert features.shape == (240, 64, 128)
    raw = torch.nn.functional.unfold(pixels, 8, stride=8).transpose(1, 2)  # (B, 64, 192)
    classes = np.stack([train_components.cell_targets(drawn)[0] for drawn in held_out.scenes]).reshape(-1, 2)
    covered = torch.from_numpy(classes[:, 0] < len(SHAPES))
    for column, names, least in ((0, SHAPES, 0.8), (1, COLORS, 0.85)):
        target = torch.from_numpy(classes[:, column])[covered]
        half = len(target) // 2
        scores = []
        for rows in (features, raw):
            rows = rows.flatten(0, 1)[covered]
            scores.append(accuracy(ridge(rows[:half], target[:half], len(names)), rows[half:], target[half:]))
        assert scores[0] >= least and scores[0] > scores[1]


def test_text_features_bind_words(held_out):
    """A linear probe of the last padded row, fitted on half of the captions, reads the color of the second thing; the mean of
    word vectors, which knows no order, cannot."""
    encoder = build_text_encoder(ComponentConfig(name="shapes-llama"))
    requests = [scene(5, "train", 6 * index + 5).request for index in range(600)]  # two colored things
    captions = [train_components.caption(request) for request in requests]
    embedding = encoder.encode(captions)
    assert embedding.tokens.shape == (600, 16, 128) and not embedding.mask[:, -1].any()
    target = torch.tensor([COLORS.index(request.things[1].color) for request in requests])
    words = encoder.model.embed_tokens(
        encoder.tokenizer(captions, return_tensors="pt", padding=True)["input_ids"]
    ).mean(1)
    scores = [
        accuracy(ridge(rows[:300], target[:300], 8), rows[300:], target[300:])
        for rows in (embedding.tokens[:, -1], words)
    ]
    assert scores[0] >= 0.98 and scores[1] <= 0.8
    assert encoder.encode([""]).mask.sum() == 1  # the begin token alone


@pytest.mark.parametrize("component", sorted(train_components.COMPONENTS))
def test_shipped_figures_are_there(component):
    """metrics.json: the command that reproduces the weights and what was measured."""
    metrics = json.loads((SHIPPED / component / "metrics.json").read_text())
    assert metrics["command"].startswith(f"python tools/train_components.py {component} ")
    weights = next((SHIPPED / component).glob("*.safetensors"))
    assert weights.stat().st_size < 2 * metrics["parameters"] + 20_000  # fp16


@pytest.mark.parametrize("component", sorted(train_components.COMPONENTS))
def test_training_goes_on_where_it_was_stopped(component, tmp_path, monkeypatch):
    """Three steps at once, and two commands of which the first is stopped after one: the same weights."""
    shrink(monkeypatch)
    train_components.train(component, tmp_path / "whole", steps=3)
    stop_after(monkeypatch, train_components.COMPONENTS[component], 1)
    with pytest.raises(KeyboardInterrupt):
        train_components.train(component, tmp_path / "parts", steps=3)
    monkeypatch.undo()
    shrink(monkeypatch)
    train_components.train(component, tmp_path / "parts", steps=3)
    whole, parts = (next((tmp_path / name).glob("*.safetensors")).read_bytes() for name in ("whole", "parts"))
    assert whole == parts
    assert not list(tmp_path.glob("*.training.pt"))
    if component == "text":  # names that transformers 4 and 5 both read
        for folder in (tmp_path / "whole", SHIPPED / "text"):
            tokenizer, model = (
                json.loads((folder / name).read_text()) for name in ("tokenizer_config.json", "config.json")
            )
            assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
            assert model["rope_theta"] == model.get("rope_parameters", model)["rope_theta"] == 1000


def test_shipped_components_give_the_same_numbers_with_every_version_of_the_libraries(held_out):
    """Libraries overlook settings that they do not know: the numbers are those of diffusers 0.42 and transformers 5.23."""
    expected = load_file(Path(__file__).parent / "data/shapes_components.safetensors")
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    codec = build_codec(ComponentConfig(name="shapes-dc-ae"))
    latents = codec.encode_pixels(pixels)
    text = build_text_encoder(ComponentConfig(name="shapes-llama"))
    tokens = text.encode(["a photo of a red circle", "two blue squares"]).tokens
    features = build_vision_encoder(ComponentConfig(name="shapes-vit")).features(pixels, (8, 8))
    found = {
        "latents": latents[:, :, ::4, ::4],
        "decoded": codec.decode(codec.normalize(latents))[:, :, ::16, ::16],
        "tokens": tokens[:, :, ::16],
        "features": features[:, ::8, ::16],
    }
    torch.testing.assert_close(
        {key: value.contiguous() for key, value in found.items()}, expected, rtol=1e-4, atol=1e-3
    )


def shrink(monkeypatch):
    monkeypatch.setattr(train_components, "TRAIN_SCENES", 64)
    monkeypatch.setattr(train_components, "TEST_SCENES", 16)
    monkeypatch.setattr(train_components.TextTask, "repeats", 4)
    monkeypatch.setattr("nitro_e.training.components.SAVE_EVERY", 0)


def stop_after(monkeypatch, task, steps):
    original = task.loss

    def loss(self, step):
        if step >= steps:
            raise KeyboardInterrupt
        return original(self, step)

    monkeypatch.setattr(task, "loss", loss)


def test_tool_refuses_an_unknown_component():
    command = [sys.executable, "tools/train_components.py", "sound"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "sound" in done.stderr


def test_a_dry_run_knows_the_length_of_stored_text(tmp_path, capsys):
    """It refused stored text of 16 tokens: 128 was taken for granted where no encoder had been loaded."""
    from nitro_e.cli.data import main as data_tool
    from nitro_e.cli.make_shapes import make_shards
    from nitro_e.cli.train import main as train

    make_shards(tmp_path, "train", 8)
    arguments = [
        "encode",
        f"{tmp_path}/shapes-train-*.tar",
        "--out",
        str(tmp_path),
        "--resolution",
        "64",
        "--workers",
        "0",
    ]
    assert data_tool([*arguments, "--codec", "shapes-dc-ae", "--text", "shapes-llama"]) == 0
    shards = f"data.shards=[{tmp_path}/latents-*.tar, {tmp_path}/text-*.tar]"
    assert (
        train(
            ["configs/shapes/2_finetune.yaml", shards, "init_from=null", "batch=4", *OPTIMIZER, "--dry-run"]
        )
        == 0
    )
    assert "latents 8x8x8, text 16x128" in capsys.readouterr().out


def test_a_training_begun_otherwise_is_not_continued(tmp_path, monkeypatch, capsys):
    """Its weights were mixed with those of another seed or rate schedule without a word."""
    shrink(monkeypatch)
    stop_after(monkeypatch, train_components.TextTask, 1)
    with pytest.raises(KeyboardInterrupt):
        train_components.train("text", tmp_path / "text", steps=3)
    out = ["text", "--out", str(tmp_path / "text")]
    assert train_components.main([*out, "--steps", "4"]) == 2
    assert "--steps 3" in capsys.readouterr().err
    assert train_components.main([*out, "--steps", "0"]) == 2
    assert "--steps 0" in capsys.readouterr().err
