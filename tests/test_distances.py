"""Distances between sets of images: against other implementations, and through the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import tiny_rewards
import torch
from PIL import Image
from test_evaluation import tiny_model

from nitro_e.cli import evaluate as tool
from nitro_e.config import ConfigError
from nitro_e.data.making import write_shard
from nitro_e.evaluation import distances, intervals
from nitro_e.evaluation.reference import Reference


def samples(num: int, width: int = 6, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(7 + seed).normal(size=(width, width)) / width**0.5
    return rng.normal(size=(num, width)) @ mix + shift


@pytest.mark.parametrize("num, width", [(200, 6), (5, 12)])  # the second has covariances without full rank
def test_frechet_distance_is_torch_fidelitys(num, width):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    drawn, real = samples(num, width, shift=0.3), samples(2 * num, width, seed=1)
    statistics = [fid_features_to_statistics(torch.from_numpy(each)) for each in (drawn, real)]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert distances.frechet(drawn, real).mean() == pytest.approx(theirs, rel=1e-6)


def weighted_frechet(drawn: np.ndarray, weights: np.ndarray, real: np.ndarray) -> float:
    """The distance of a weighted sample, by scipy's matrix square root; the real covariance has divisor M - 1."""
    mean = weights @ drawn
    covariance = (weights[:, None] * (drawn - mean)).T @ (drawn - mean) * len(drawn) / (len(drawn) - 1)
    real_mean, real_covariance = real.mean(0), np.cov(real, rowvar=False)
    root = scipy.linalg.sqrtm(covariance @ real_covariance)
    return float(((mean - real_mean) ** 2).sum() + np.trace(covariance + real_covariance - 2 * root.real))


def naive_mmd(drawn: np.ndarray, weights: np.ndarray, real: np.ndarray) -> float:
    def kernel(x, y):
        return np.exp(-((x - y) ** 2).sum() / (2 * 2.0**2))

    even = np.full(len(real), 1 / len(real))
    sets = ((drawn, weights), (real, even))
    within = sum(a * b * kernel(x, y) for xs, w in sets for x, a in zip(xs, w) for y, b in zip(xs, w))
    across = sum(a * b * kernel(x, y) for x, a in zip(drawn, weights) for y, b in zip(real, even))
    return 1000 * (within - 2 * across)


@pytest.mark.parametrize(
    "values, naive",
    [
        (distances.frechet, weighted_frechet),
        (lambda drawn, real: distances.mmd(drawn, real, bandwidth=2.0), naive_mmd),
    ],
)
def test_value_of_an_image_is_the_distance_plus_its_influence(values, naive):
    """The influence is the derivative in the image's weight: here a difference quotient of a slower implementation."""
    drawn, real = samples(30, 3, shift=0.4), samples(40, 3, seed=1)
    even, step = np.full(30, 1 / 30), 1e-5
    distance, found = naive(drawn, even, real), values(drawn, real)
    assert found.mean() == pytest.approx(distance, rel=1e-6)
    for place in (0, 11, 29):
        up, down = ((1 - e) * even + e * (np.arange(30) == place) for e in (step, -step))
        influence = (naive(drawn, up, real) - naive(drawn, down, real)) / (2 * step)
        assert found[place] - distance == pytest.approx(influence, rel=2e-4, abs=1e-5)


@pytest.mark.parametrize("values", [distances.frechet, distances.mmd])
def test_interval_has_the_width_of_the_distance_over_many_samples(values):
    real = samples(600, seed=1)
    drawn, rng = samples(200, shift=0.5), np.random.default_rng(0)
    resampled = [drawn[rng.integers(0, 200, 200)] for _ in range(40)]
    spread = np.std([values(each, real).mean() for each in resampled])
    found = intervals.score([values(drawn, real)])
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(spread, rel=0.35)


# ---- real images


def write_images(folder: Path, num: int, seed: int = 0) -> list[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(num):
        Image.fromarray(rng.integers(0, 255, (64, 80, 3), np.uint8)).save(folder / f"{i}.png")
    return [(folder / f"{i}.png").read_bytes() for i in range(num)]


def test_shards_and_a_folder_give_the_same_images(tmp_path):
    contents = write_images(tmp_path / "real", 5)
    rows = [{"__key__": str(i), "png": content, "txt": f"image {i}"} for i, content in enumerate(contents)]
    write_shard(tmp_path / "real.tar", rows)
    folder, shards = Reference(str(tmp_path / "real")), Reference(str(tmp_path / "*.tar"))
    ours, theirs = (torch.cat(list(each.images(48))) for each in (folder, shards))
    assert ours.shape == (5, 3, 48, 48) and torch.equal(ours, theirs)
    for each in (folder, shards):  # in parts, as features are computed
        parts = [torch.cat(list(each.images(48, start, start + 2))) for start in (0, 2, 4)]
        assert torch.equal(torch.cat(parts), ours) and len({str(one) for one in each.identities()}) == 5
    assert shards.prompts() == [f"image {i}" for i in range(5)]
    with pytest.raises(ConfigError, match="--prompts FILE"):
        folder.prompts()


def networks(folder: Path) -> dict[str, Path]:
    """Save tiny random instances of the classes behind cmmd and fd-dinov2."""
    import timm

    tiny_rewards.save_clip(folder / "clip")
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_base_patch16_224", num_classes=0, img_size=32, embed_dim=32, depth=1, num_heads=1
    )
    arguments = {"img_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 1}
    timm.models.save_for_hf(vit, folder / "dino", model_args=arguments, safe_serialization=True)
    return {"cmmd": folder / "clip", "fd-dinov2": folder / "dino"}


def random_inception(folder: Path) -> Path:
    """Save random weights of Inception, which has one size (90 MB), in the file that torch-fidelity releases."""
    from torch_fidelity import feature_extractor_inceptionv3 as inception

    cls, weights = inception.FeatureExtractorInceptionV3, folder / distances.INCEPTION
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(cls, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        torch.save(cls("inception-v3-compat", ["2048"]).state_dict(), weights)
    return weights


def test_distances_by_the_command(tmp_path, capsys):
    model, prompts = tiny_model(tmp_path / "model"), tmp_path / "mine.txt"
    other = tiny_model(tmp_path / "other", seed=1)
    prompts.write_text("\n".join(f"a thing of kind {i}" for i in range(6)))
    write_images(tmp_path / "real", 8)
    out = tmp_path / "out"
    for name, weights in networks(tmp_path).items():
        command = [name, str(model), "--prompts", str(prompts), "--reference", str(tmp_path / "real")]
        command += ["--reward-path", str(weights), "--out", str(out / name), "--dtype", "float32"]
        assert tool.main([*command, "--draw-only"]) == 0
        drawn = sorted(out.rglob(f"{name}/*/*.png"))
        assert len(drawn) == 6 and not (out / name / "results.json").exists()
        stamps = [path.stat().st_mtime_ns for path in drawn]
        assert tool.main([*command, "--against", str(other)]) == 0
        assert [path.stat().st_mtime_ns for path in drawn] == stamps
        record = json.loads((out / name / "results.json").read_text())
        scores = [result["scores"][name]["overall"] for result in record["results"]]
        extract = distances.DISTANCES[name].load(str(weights), "cpu")
        ours = [
            torch.cat([extract(batch) for batch in Reference(folder).images(64)]).double().numpy()
            for folder in (str(drawn[0].parent), str(tmp_path / "real"))
        ]
        assert scores[0]["value"] == pytest.approx(distances.DISTANCES[name].values(*ours).mean(), rel=1e-6)
        found = record["differences"][0]["scores"][name]["overall"]
        assert found["value"] == pytest.approx(scores[0]["value"] - scores[1]["value"], rel=1e-6)
        assert name in capsys.readouterr().out and "worst first" in (out / name / "report.html").read_text()


@pytest.mark.slow
def test_fid_by_the_command(tmp_path):
    weights = random_inception(tmp_path)
    write_images(tmp_path / "real", 4)
    prompts, out = tmp_path / "mine.txt", tmp_path / "out"
    prompts.write_text("a\nb\nc\n")
    command = ["fid", str(tiny_model(tmp_path / "model")), "--prompts", str(prompts), "--out", str(out)]
    command += ["--reference", str(tmp_path / "real"), "--reward-path", str(weights)]
    assert tool.main(command) == 0
    ours = json.loads((out / "results.json").read_text())["results"][0]["scores"]["fid"]["overall"]["value"]
    from torch_fidelity import calculate_metrics

    drawn = next(path.parent for path in out.rglob("*.png"))
    for path in (tmp_path / "real").iterdir():  # torch-fidelity does not crop
        with Image.open(path) as image:
            image.crop((8, 0, 72, 64)).save(path)
    theirs = calculate_metrics(
        input1=str(drawn), input2=str(tmp_path / "real"), fid=True, cuda=False, verbose=False,
        feature_extractor_weights_path=str(weights), save_cpu_ram=True, cache=False,
    )  # fmt: skip
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--reference"),
        (["--reference", "nowhere-*.tar"], "missing shards"),
        (["--reference", "EMPTY"], "holds 0 images"),
        (["--reference", "REAL"], "no captions"),
        (["--reference", "REAL", "--prompts", "none.txt"], "does not exist"),
        (["--reference", "REAL", "--reward", "hpsv2.1"], "own rewards"),
        (["--reference", "REAL", "--prompts", "MINE", "--reward-option", "a=1"], "no options"),
        (["--reference", "REAL", "--prompts", "MINE", "--reward-path", "nothing.pth"], "torch-fidelity's"),
        (["--reference", "REAL", "--prompts", "MINE", "--reward-path", "BAD"], "download it again"),
    ],
)
def test_bad_distances(tmp_path, capsys, arguments, message):
    write_images(tmp_path / "real", 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine.txt").write_text("a\nb\n")
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    names = {"EMPTY": "empty", "REAL": "real", "MINE": "mine.txt", "BAD": "bad.pth"}
    arguments = [str(tmp_path / names[each]) if each in names else each for each in arguments]
    model = tiny_model(tmp_path / "model")
    assert tool.main(["fid", str(model), *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
