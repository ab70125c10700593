"""Rewards by name: configs, the scorer, failures, ranks, and the example of docs/rewards.md."""

from __future__ import annotations

import logging
import math
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml

from nitro_e.config import ConfigError, TrainingError, from_dict
from nitro_e.data.prompts import PromptsConfig, load_prompts
from nitro_e.rewards import RewardConfig, Scores, build_rewards, reward, win_rates
from nitro_e.rewards.scorer import quantize
from nitro_e.shapes.judge import ShapesReward
from nitro_e.shapes.render import render
from nitro_e.shapes.scenes import metadata, scene

HERE = "test_rewards"  # this module, as a user's
calls: list = []


@pytest.fixture(autouse=True)
def no_calls():
    calls.clear()


@reward
def brightness(pixels, prompts, info, *, factor: float = 1.0):
    calls.append(len(pixels))
    return factor * pixels.mean(dim=(1, 2, 3))


@reward
def failing(pixels, prompts, info, *, every: int = 1):
    """Raises at every n-th call."""
    calls.append(len(pixels))
    if len(calls) % every == 0:
        raise RuntimeError("server is\naway")
    return pixels.mean(dim=(1, 2, 3))


@reward
def half_known(pixels, prompts, info):
    scores = pixels.mean(dim=(1, 2, 3))
    scores[::2], scores[1:2] = math.nan, math.inf
    return scores


@reward
def misshapen(pixels, prompts, info):
    return pixels.mean(dim=1)


@reward(needs_info=True)
def counts_objects(pixels, prompts, info):
    calls.append(len(pixels))
    return torch.tensor([float(len(record["include"])) for record in info])


@reward
class Weighted(torch.nn.Module):
    def __init__(self, path: str | None, device: torch.device, dtype: torch.dtype, *, start: float) -> None:
        super().__init__()
        calls.append(("built", path, str(device), dtype))
        self.weight = torch.nn.Parameter(torch.tensor(start))

    def to(self, device):
        calls.append(("to", str(device)))
        return super().to(device)

    def forward(self, pixels, prompts, info):
        calls.append(("scored", torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return self.weight * pixels.mean(dim=(1, 2, 3))


def unmarked(pixels, prompts, info):
    return pixels.mean(dim=(1, 2, 3))


def config(name: str, **keys) -> RewardConfig:
    return from_dict(RewardConfig, {"name": f"{HERE}:{name}"} | keys, "rewards[0]")


def images(num: int = 5) -> torch.Tensor:
    return quantize(torch.rand(num, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1)


def score(scorer, pixels, info=None) -> Scores:
    return scorer(pixels, ["a"] * len(pixels), info or [{}] * len(pixels))


# --- scoring ---


def test_columns_follow_the_configs():
    scorer = build_rewards(
        [config("brightness"), config("brightness", label="dark", weight=0, options={"factor": -2.0})]
    )
    pixels = images()
    values, valid = score(scorer, pixels)
    mean = pixels.mean(dim=(1, 2, 3))
    torch.testing.assert_close(values, torch.stack([mean, -2 * mean], dim=1))
    assert values.dtype == torch.float32 and valid.all() and not values.requires_grad
    assert scorer.names == (f"{HERE}:brightness", "dark") and scorer.weights.tolist() == [1, 0]
    assert [one.monitored for one in scorer.configs] == [False, True]
    assert scorer.tally["dark"].scored == 5 and scorer.tally["dark"].unscored == 0


def test_scores_are_those_of_the_saved_png():
    rough = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 3 - 1.5
    scorer = build_rewards([config("brightness")])
    saved = ((rough / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    expected = (saved.float() / 127.5 - 1).mean(dim=(1, 2, 3))
    torch.testing.assert_close(score(scorer, rough).values[:, 0], expected)
    torch.testing.assert_close(score(scorer, rough.double()).values[:, 0], expected)


def test_images_come_in_batches():
    whole = score(build_rewards([config("brightness")]), images())
    parts = score(build_rewards([config("brightness", batch_size=2)]), images())
    assert calls == [5, 2, 2, 1]
    torch.testing.assert_close(parts.values, whole.values, rtol=0, atol=0)


def test_the_judge_of_the_offline_domain():
    drawn = [scene(4, "heldout", index) for index in range(12)]
    images = torch.stack([torch.from_numpy(render(one)) for one in drawn])
    pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    info = [metadata(one.request) for one in drawn]
    info[3], info[4] = {}, info[5]  # a prompt of another kind; the wrong prompt
    scorer = build_rewards([from_dict(RewardConfig, {"name": "shapes", "options": {"score": "partial"}})])
    values, valid = scorer(pixels, [""] * 12, info)
    assert valid[:, 0].tolist() == [index != 3 for index in range(12)] and values[3, 0].isnan()
    rows = [index for index in range(12) if index != 3]
    expected = ShapesReward("partial")(pixels[rows], [""] * 11, [info[index] for index in rows])
    assert values[rows, 0].tolist() == expected.tolist() and expected.min() < 1
    assert scorer.tally["shapes"].skipped == 1 and scorer.tally["shapes"].unscored == 0


def test_a_class_is_built_once_when_first_used_and_moved():
    scorer = build_rewards([config("Weighted", offload=True, dtype="bfloat16", options={"start": 3.0})])
    assert calls == []  # nothing is loaded yet
    scorer.load()
    assert calls == [("built", None, "cpu", torch.bfloat16), ("to", "cpu")]
    calls.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = score(scorer, images()).values
    assert calls == [("to", "cpu"), ("scored", False, False), ("to", "cpu")]
    torch.testing.assert_close(values[:, 0], 3 * images().mean(dim=(1, 2, 3)))
    calls.clear()
    scorer.load()
    assert calls == []


def test_a_reward_that_is_kept_elsewhere_has_gradients_where_it_is_asked():
    """Without autocast; its weights stay there for the backward pass."""
    scorer = build_rewards([config("Weighted", offload=True, options={"start": 3.0})])
    scorer.load()
    calls.clear()
    pixels = images(2).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scorer.differentiate(pixels, ["a"] * 2, [{}] * 2).sum().backward()
    assert calls == [("to", "cpu"), ("scored", True, False)]
    torch.testing.assert_close(pixels.grad, torch.full_like(pixels, 3 / pixels[0].numel()))


def test_metadata_where_it_is_needed():
    scorer = build_rewards([config("counts_objects", batch_size=2)])
    info = [{"include": [1]}, {}, {"include": [1, 2]}, {"prompt": "x"}, {"include": []}]
    values, valid = score(scorer, images(), info)
    assert valid[:, 0].tolist() == [True, False, True, False, True] and calls == [2, 1]
    assert values[[0, 2, 4], 0].tolist() == [1, 2, 0]
    assert vars(scorer.tally[f"{HERE}:counts_objects"]) == dict(scored=3, unscored=0, skipped=2, failures=0)
    scorer.check(info)
    with pytest.raises(ConfigError, match="needs GenEval metadata, which no prompt has"):
        scorer.check([{}, {"prompt": "x"}])
    build_rewards([config("brightness")]).check([{}])


def test_no_rewards_and_wrong_lengths():
    values, valid = score(build_rewards([]), images())
    assert values.shape == valid.shape == (5, 0)
    with pytest.raises(ValueError, match="5 images, 1 prompts"):
        build_rewards([])(images(), ["a"], [{}] * 5)


# --- failures (T16) ---


def test_a_failure_is_tried_again():
    scorer = build_rewards([config("failing", options={"every": 3})])
    calls[:] = [0, 0]  # the next call is the third: it fails, the fourth does not
    values, valid = score(scorer, images())
    assert valid.all() and calls[2:] == [5, 5] and scorer.tally[scorer.names[0]].failures == 1
    torch.testing.assert_close(values[:, 0], images().mean(dim=(1, 2, 3)))


def test_failures_are_masked_counted_and_end_the_run(caplog):
    scorer = build_rewards([config("brightness"), config("failing")], retries=1, max_failures=3)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            values, valid = score(scorer, images())
            assert valid[:, 0].all() and not valid[:, 1].any()
            assert values[:, 1].isnan().all()  # never a number
    assert "failed, attempt 2 of 2 (RuntimeError: server is away)" in caplog.text
    tally = scorer.tally[f"{HERE}:failing"]
    assert (tally.scored, tally.unscored, tally.failures) == (0, 10, 4)
    with pytest.raises(TrainingError, match="scored nothing in 3 batches in a row.*server is away") as error:
        score(scorer, images())
    assert "\n" not in str(error.value)


def test_only_failures_in_a_row_end_the_run():
    scorer = build_rewards([config("failing", options={"every": 2})], retries=0, max_failures=2)
    failed = [not score(scorer, images()).valid.any() for _ in range(6)]
    assert failed == [False, True] * 3


def test_one_batch_fails_alone():
    scorer = build_rewards([config("failing", batch_size=2, options={"every": 2})], retries=0)
    assert score(scorer, images()).valid[:, 0].tolist() == [True, True, False, False, True]


def test_nan_and_infinity_are_not_scores():
    scorer = build_rewards([config("half_known")])
    values, valid = score(scorer, images())
    assert valid[:, 0].tolist() == [False, False, False, True, False]
    assert values[:, 0].isnan().tolist() == [True, True, True, False, True]
    assert (scorer.tally[scorer.names[0]].scored, scorer.tally[scorer.names[0]].unscored) == (1, 4)


def test_broken_images_are_not_scored_by_any_reward():
    """`shapes` and others would make a number of them."""
    prompts = load_prompts(PromptsConfig(source="shapes-heldout", num=4))
    pixels = torch.ones(4, 3, 64, 64)
    pixels[1, 0, 5, 5], pixels[3, 2, 0, 0] = math.nan, math.inf
    scorer = build_rewards([RewardConfig(name="shapes"), config("brightness")])
    values, valid = scorer(pixels, *zip(*prompts))
    assert valid.tolist() == [[True, True], [False, False]] * 2 and values[~valid].isnan().all()
    assert [(tally.scored, tally.unscored, tally.skipped) for tally in scorer.tally.values()] == [
        (2, 2, 0)
    ] * 2
    assert not scorer(pixels[1::2], ["", ""], [prompts[0].info, {}]).valid.any()
    assert scorer.tally["shapes"].unscored == 3 and scorer.tally["shapes"].skipped == 1


def test_weights_that_judge_are_named():
    configs = [config("brightness"), config("Weighted", label="w", options={"start": 3.0})]
    scorer = build_rewards(configs)
    assert list(scorer.sources()) == ["w"]
    same, other = (build_rewards([config("Weighted", label="w", options={"start": s})]) for s in (3.0, 4.0))
    assert same.sources() == scorer.sources() != other.sources()


def test_endless_nan_ends_the_run():
    scorer = build_rewards([config("half_known")], max_failures=2)
    score(scorer, images(1))
    with pytest.raises(TrainingError, match="because of NaN scores"):
        score(scorer, images(1))


def test_a_wrong_shape_is_a_mistake_not_a_failure():
    with pytest.raises(ConfigError, match=r"returned \(5, 8, 8\) for 5 images.*shape \(5,\)"):
        score(build_rewards([config("misshapen")]), images())


# --- ranks ---


def plain_win_rates(values, valid, groups) -> list[float]:
    rates = []
    for i, value in enumerate(values):
        rivals = [values[j] for j in range(len(values)) if j != i and valid[j] and groups[j] == groups[i]]
        wins = sum(1.0 if value > rival else 0.5 if value == rival else 0.0 for rival in rivals)
        rates.append(math.nan if not valid[i] else wins / len(rivals) if rivals else 0.5)
    return rates


def test_win_rates():
    values = torch.tensor([3.0, 1.0, 2.0, 2.0, 9.0, math.nan, 4.0])
    groups = torch.tensor([0, 0, 0, 0, 1, 0, 1])
    expected = [1.0, 0.0, 0.5, 0.5, 1.0, math.nan, 0.0]
    torch.testing.assert_close(
        win_rates(values, values.isfinite(), groups), torch.tensor(expected), equal_nan=True
    )
    rng = torch.Generator().manual_seed(0)
    values = torch.randint(0, 4, (60,), generator=rng).float()
    groups, valid = torch.randint(0, 9, (60,), generator=rng), torch.rand(60, generator=rng) < 0.8
    rates = win_rates(values, valid, groups)
    plain = torch.tensor(plain_win_rates(values.tolist(), valid.tolist(), groups.tolist()))
    torch.testing.assert_close(rates, plain, equal_nan=True)
    for group in range(9):  # rates of a group are one half on average
        inside = valid & (groups == group)
        assert not inside.any() or rates[inside].mean() == pytest.approx(0.5)


def test_only_ranked_rewards_are_ranked():
    scorer = build_rewards([config("brightness"), config("brightness", label="ranked", transform="rank")])
    scores = score(scorer, images(4))
    values, valid = scorer.transform(scores, torch.tensor([7, 7, 8, 8]))
    torch.testing.assert_close(values[:, 0], scores.values[:, 0], rtol=0, atol=0)
    assert sorted(values[:2, 1].tolist()) == [0, 1] and sorted(values[2:, 1].tolist()) == [0, 1]
    assert valid.all()


# --- configs ---


@pytest.mark.parametrize(
    "data, message",
    [
        ("geneva", r"unknown reward 'geneva', did you mean 'geneval'\?; yours: 'module:name'"),
        ({"name": "shapes", "weight": math.inf}, "weight must be a finite number"),
        ({"name": "shapes", "batch_size": 0}, "batch_size must be at least 1"),
        ({"name": "shapes", "device": "gpu"}, "device: 'gpu' is no device"),
        ({"name": "shapes", "path": "x"}, "path: reward 'shapes' has no path"),
        ({"name": "shapes", "dtype": "float16"}, "dtype: reward 'shapes' has no dtype"),
        ({"name": "geneval", "dtype": "bfloat16"}, "dtype: reward 'geneval' has no dtype"),
        ({"name": "geneval", "options": {"mod": "x"}}, "options.mod: .* did you mean 'mode'"),
        ({"name": "geneval", "options": {"path": "x"}}, "options.path: reward 'geneval' has no such option"),
        ({"name": "nowhere_at_all:f"}, "cannot import 'nowhere_at_all'.*into the directory you start from"),
        ({"name": f"{HERE}:nothing"}, "module 'test_rewards' has no 'nothing'"),
        ({"name": f"{HERE}:unmarked"}, "is not marked as a reward; write @reward"),
        ({"name": "subprocess:Popen", "options": {"args": "true"}}, "is not marked as a reward"),
        ({"name": f"{HERE}:brightness", "options": {"prompts": 1}}, "options.prompts: .* no such option"),
        ({"name": f"{HERE}:Weighted"}, "options.start: reward .* needs it"),
        ({"name": "shapes", "transform": "ranks"}, "transform: 'ranks' is not one of"),
    ],
)
def test_mistakes_are_found_before_anything_is_loaded(data, message):
    with pytest.raises(ConfigError, match=message) as error:
        from_dict(RewardConfig, data, "rewards[0]")
    assert str(error.value).startswith("rewards[0]") and "\n" not in str(error.value)


def test_a_key_of_older_recipes_is_named():
    with pytest.raises(
        ConfigError, match=r"'rewards\[0\].timeout' is of an older version.*sets its own limit"
    ):
        config("brightness", timeout=5)


def test_equal_titles_need_labels():
    with pytest.raises(ConfigError, match="two are called 'shapes'; give one of them another label"):
        build_rewards([RewardConfig(name="shapes"), RewardConfig(name="shapes")])


def test_a_device_that_is_not_there():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match="its weights cannot go to device 'cuda:0'"):
        build_rewards([config("Weighted", device="cuda:0", options={"start": 1.0})]).load()


# --- documentation ---


def test_the_example_of_the_documentation_runs(tmp_path, monkeypatch):
    text = (Path(__file__).parent.parent / "docs" / "rewards.md").read_text()
    blocks = re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)
    (code,) = [block for kind, block in blocks if kind == "python"]
    first, _, example = [yaml.safe_load(block)["rewards"] for kind, block in blocks if kind == "yaml"]
    (tmp_path / "my_rewards.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    scorer = build_rewards([from_dict(RewardConfig, one) for one in example])
    colors = torch.tensor([[1.0, -1, -1], [-1, -1, 1], [1, 1, 1]])
    values, valid = score(scorer, colors[:, :, None, None].expand(3, 3, 8, 8))
    assert values.tolist() == [[2, -2], [-2, 2], [0, 0]] and valid.all()
    assert scorer.names == ("my_rewards:redness", "blueness")
    build_rewards([from_dict(RewardConfig, one) for one in first])


def test_documented_names_keys_and_sources_exist():
    from nitro_e.data.prompts import GENERATORS
    from nitro_e.rewards.registry import BUILT_IN

    text = (Path(__file__).parent.parent / "docs" / "rewards.md").read_text()
    tables = (
        text.split("## What there is")[1].split("## All keys")[0],
        text.split("## All keys")[1].split("## Your own")[0],
        text.split("## Prompts")[1],
    )
    what, keys, prompts = (
        {
            name
            for cell in re.findall(r"^\|([^|]*)\|", part, re.MULTILINE)
            for name in re.findall("`([^`]+)`", cell)
        }
        for part in tables
    )
    assert what == set(BUILT_IN)
    assert keys == {field.name for field in fields(RewardConfig)}
    assert prompts - {"FILE.txt", "FILE.jsonl", "FILE.tar"} == set(GENERATORS)


def test_prompts_and_rewards_fit_together():
    prompts = load_prompts(PromptsConfig(source="shapes-heldout", num=12))
    scorer = build_rewards([RewardConfig(name="shapes")])
    scorer.check([prompt.info for prompt in prompts])
    values, valid = scorer(torch.ones(12, 3, 64, 64), *zip(*prompts))
    assert valid.all() and (values == 0).all()  # empty images


# --- cheap scoring ---


def test_rewards_of_one_place_share_what_they_read(tmp_path):
    import tiny_rewards

    clip = str(tmp_path / "clip")
    tiny_rewards.save_clip(tmp_path / "clip")
    given = {"name": "clipscore", "path": clip}
    configs = [
        given,
        {**given, "label": "again"},
        {**given, "label": "low", "dtype": "bfloat16"},
        {**given, "label": "away", "offload": True},
    ]
    scorers = [build_rewards([from_dict(RewardConfig, each)]) for each in configs]
    alone = score(scorers[0], images()).values
    assert all(torch.equal(score(scorer, images()).values, alone) for scorer in (scorers[1], scorers[3]))
    scorers[2].load()
    clips = [scorer._columns[0].reward.clip for scorer in scorers]
    assert (
        clips[0] is clips[1] and len({id(each) for each in clips}) == 3
    )  # of other dtypes and places: their own
    assert (score(scorers[2], images()).values - alone).abs().max() < 0.02


def test_monitored_rewards_are_scored_every_so_many_rollouts():
    scorer = build_rewards([config("brightness"), config("counts_objects", label="rare", weight=0, every=3)])
    pixels, info = images(2), [{"include": []}] * 2
    valid = [scorer(pixels, ["a"] * 2, info, turn).valid[0].tolist() for turn in range(4)]
    assert valid == [[True, True], [True, False], [True, False], [True, True]]
    assert (
        scorer.tally["rare"].scored == 4
        and scorer.tally["rare"].unscored == scorer.tally["rare"].skipped == 0
    )
    assert scorer.applies(info, 1)[0].tolist() == [True, False]
    assert all(seconds > 0 for seconds in scorer.seconds.values())
    with pytest.raises(ConfigError, match="every 2: every rollout is trained on"):
        config("brightness", every=2)
