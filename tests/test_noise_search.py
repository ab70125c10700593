"""Search of the start noise for a reward: closed forms, a loop written out, the pipeline and the command."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from nitro_e.cli import evaluate, sample
from nitro_e.config import ConfigError
from nitro_e.rewards import reward
from nitro_e.sampling.noise_search import NoiseSearch, NoiseSearchConfig, candidate, length_penalty
from nitro_e.sampling.pipeline import TextToImage


@reward
def warmth(pixels, prompts, info):
    """Red less blue: (B,) with a gradient."""
    return (pixels[:, 0] - pixels[:, 2]).mean(dim=(1, 2))


def same(x):
    return x


def search(score, **config):
    return NoiseSearch(lambda pixels, prompts: score(pixels), NoiseSearchConfig(**config))


def noise(rows, seed=0, size=4):
    return torch.randn(rows, 2, size, size, generator=torch.Generator().manual_seed(seed)).double()


def test_ascent_reaches_the_top_of_a_quadratic():
    """The reward -|x - b|^2 / 2 has its top at b; each row has its own."""
    top = noise(3, 1)
    found = search(
        lambda x: -(x - top).square().flatten(1).sum(1) / 2,
        steps=80, rate=0.3, momentum=0.5, clip=1e9, length_weight=0.0,
    )(noise(3), [0, 1, 2], same, ["a", "b", "c"])  # fmt: skip
    torch.testing.assert_close(found, top, rtol=0, atol=1e-6)


def test_with_the_length_alone_the_noise_gets_a_normal_ones():
    """Nothing to gain: |x| goes to sqrt(d - 1), the likeliest length, whatever it was."""
    start = noise(2) * torch.tensor([0.3, 2.0]).double()[:, None, None, None]
    # the last noise counts, since the reward rises with the step
    steps = iter(range(1000))
    found = search(
        lambda x: 0 * x.flatten(1).sum(1) + next(steps),
        steps=200, rate=0.3, momentum=0.0, clip=1e9, length_weight=1.0,
    )(start, [0, 1], same, ["a", "b"])  # fmt: skip
    assert found.flatten(1).norm(dim=1).tolist() == pytest.approx([math.sqrt(31)] * 2)
    for after, before in zip(found, start):  # in the direction that it had
        torch.testing.assert_close(after / after.norm(), before / before.norm())


def test_the_length_penalty_is_the_density_of_a_normal_noise_s_length():
    scipy_stats = pytest.importorskip("scipy.stats")
    rows = noise(5) * torch.linspace(0.5, 2, 5).double()[:, None, None, None]
    density = [scipy_stats.chi(32).logpdf(float(length)) for length in rows.flatten(1).norm(dim=1)]
    difference = length_penalty(rows).numpy() + np.array(density)
    assert difference == pytest.approx([difference[0]] * 5)


def test_ascent_is_nesterovs_with_each_row_s_gradient_clipped():
    """Against the method written out in numpy, with the gradient of a cubic reward by hand."""
    start, config = noise(2), {"steps": 6, "rate": 5.0, "momentum": 0.9, "clip": 0.1, "length_weight": 0.01}
    ours = search(lambda x: (x**3).flatten(1).sum(1), **config)(start, [0, 1], same, ["a", "b"])
    for row in range(2):
        x, speed, best, highest = start[row].numpy().copy(), 0.0, None, -math.inf
        for _ in range(7):
            score = (x**3).sum()
            if score > highest:
                best, highest = x.copy(), score
            length = math.sqrt((x**2).sum())
            slope = 0.01 * x * (1 - 31 / length**2) - 3 * x**2
            slope *= min(1.0, 0.1 / math.sqrt((slope**2).sum()))
            speed = 0.9 * speed + slope
            x = x - 5.0 * (slope + 0.9 * speed)
        assert ours[row].numpy() == pytest.approx(best)


def test_the_best_candidate_is_taken_for_each_image():
    score = lambda x: x.flatten(1)[:, 3]  # noqa: E731
    seeds, start = [5, 6, 7], noise(3).float()
    found = search(score, steps=0, candidates=8)(start, seeds, same, ["a"] * 3)
    tried = torch.stack([start, *(candidate(start, seeds, number) for number in range(1, 8))])  # (8, 3, ...)
    best = tried.flatten(2)[:, :, 3].argmax(dim=0)
    assert torch.equal(found, torch.stack([tried[best[row], row] for row in range(3)]))
    assert best.tolist() != [0, 0, 0]
    # an image's candidates are its own
    alone = search(score, steps=0, candidates=8)(start[1:2], seeds[1:2], same, ["a"])
    assert torch.equal(alone, found[1:2])
    # images without a score keep their noise
    nothing = search(lambda x: torch.full((3,), math.nan), steps=0, candidates=3)(
        start, seeds, same, ["a"] * 3
    )
    assert torch.equal(nothing, start)


def test_rewards_without_gradient_and_empty_searches_are_refused():
    with pytest.raises(ConfigError, match="no gradient to follow"):
        search(lambda x: torch.zeros(len(x)), steps=1)(noise(1), [0], same, ["a"])
    with pytest.raises(ConfigError, match="search nothing"):
        NoiseSearchConfig(steps=0)


@pytest.fixture(scope="module")
def student():
    return TextToImage.from_pretrained("shapes-4step")


def test_images_drawn_from_the_found_noise_score_higher(student):
    prompts, options = ["a photo of a circle", "a photo of two stars"], {"output_type": "pixels", "steps": 2}
    score = lambda pixels: warmth(pixels, [], [])  # noqa: E731
    plain = score(student(prompts, **options).images)
    climb = search(score, steps=3)
    found = student(prompts, noise_search=climb, **options).images
    assert (score(found) > plain + 0.005).all()
    alone = student(prompts[1], seeds=1, noise_search=climb, **options).images
    torch.testing.assert_close(found[1:], alone, rtol=0, atol=2e-3)
    for given, message in (
        ({"generator": torch.Generator()}, "give seeds in place of a generator"),
        ({"image": torch.zeros(3, 64, 64)}, "leaves no noise to search"),
    ):
        with pytest.raises(ConfigError, match=message):
            student(prompts, noise_search=climb, **options, **given)


def test_the_command_searches_and_remembers_it(tmp_path, capsys):
    line = ["shapes-4step", "--prompt", "a photo of a circle", "--steps", "1", "--out", str(tmp_path)]
    assert sample.main(line) == 0
    plain = np.asarray(Image.open(next(tmp_path.glob("0000*.png")))).astype(float)
    wanted = ["--optimize-noise", "test_noise_search:warmth", "--noise-steps", "3"]
    assert sample.main([*line, *wanted]) == 0
    warmer = np.asarray(Image.open(next(tmp_path.glob("0000*.png")))).astype(float)
    assert (warmer[..., 0] - warmer[..., 2]).mean() > (plain[..., 0] - plain[..., 2]).mean()
    settings = [json.loads(path.read_text()) for path in tmp_path.glob("settings-*.json")]
    assert sorted(bool(each.get("noise_search")) for each in settings) == [False, True]
    assert sample.main([*line, *wanted]) == 0 and "0 images drawn, 1 were there" in capsys.readouterr().out
    assert sample.main([*line, "--negative-prompt", "a star"]) == 2
    assert "without guidance nothing is led away from" in capsys.readouterr().err
    aside = ["--guidance", "2", "--guidance-by", "path", "--force"]
    assert sample.main([*line, *aside, "--negative-prompt", "a star"]) == 2
    assert "guidance by the weak pass alone never looks at it" in capsys.readouterr().err
    assert sample.main([*line, "--noise-steps", "3"]) == 2
    assert "--noise-steps belongs to --optimize-noise" in capsys.readouterr().err
    assert sample.main([*line, "--optimize-noise", "shapes"]) == 2
    assert "needs GenEval metadata" in capsys.readouterr().err


def test_evaluation_draws_from_the_found_noise_and_says_so(tmp_path, capsys):
    line = "shapes shapes-4step --num 12 --steps 1 --processes 1 --out".split() + [str(tmp_path)]
    scores = []
    for more in ([], ["--optimize-noise", "shapes", "--noise-candidates", "4"]):
        assert evaluate.main([*line, *more]) == 0
        record = json.loads((tmp_path / "results.json").read_text())
        scores.append(record["results"][0]["scores"]["strict"]["overall"]["value"])
    assert scores[1] > scores[0] + 0.1
    assert record["options"]["noise_search"]["candidates"] == 4
    assert "noise best of 4 by shapes" in capsys.readouterr().out
    assert len(list(tmp_path.glob("*/settings.json"))) == 2  # neither takes the other's images for its own


def test_evaluation_follows_a_gradient_in_bfloat16(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a photo of a circle\na photo of two stars\n")
    line = [str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "out")]
    line += "shapes-4step --reward test_noise_search:warmth --steps 2 --processes 1".split()
    found = []
    for more in ([], ["--optimize-noise", "test_noise_search:warmth", "--noise-steps", "20"]):
        assert evaluate.main([*line, *more]) == 0
        rows = next(path for path in (tmp_path / "out").glob("*/scores-*.jsonl") if path not in found)
        found.append(rows)
    plain, warmer = (
        [next(iter(json.loads(row)["scores"].values())) for row in path.read_text().splitlines()]
        for path in found
    )
    assert all(after > before + 0.005 for before, after in zip(plain, warmer, strict=True))
    assert evaluate.main([*line, "--noise-candidates", "4"]) == 2
    assert evaluate.main([*line, "--optimize-noise", "foo"]) == 2
    assert "--optimize-noise foo: name: unknown reward 'foo' (known: shapes," in capsys.readouterr().err
