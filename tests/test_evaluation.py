"""Scores, intervals, images kept and reused, pages, the command, and scores during training."""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny_rewards
import torch
from PIL import Image
from test_report import Page, assert_self_contained

from nitro_e.cli import evaluate as tool
from nitro_e.cli import train
from nitro_e.config import ConfigError, from_dict, to_dict
from nitro_e.data.making import write_shard
from nitro_e.data.prompts import Prompt, PromptsConfig, load_prompts
from nitro_e.evaluation import intervals, page, results
from nitro_e.evaluation.benchmarks import benchmark, describe
from nitro_e.evaluation.evaluator import EvaluationConfig, Evaluator
from nitro_e.evaluation.images import ImageGenerator, ScoredImage, collect, noise_seeds, read_rows
from nitro_e.files import weights_hash
from nitro_e.interfaces import DistContext
from nitro_e.model import EMMDiT, ModelConfig
from nitro_e.model.pretrained import save_pretrained
from nitro_e.record import metrics
from nitro_e.record.pages import write_report
from nitro_e.rewards import RewardConfig, build_rewards, reward
from nitro_e.rewards.geneval.rules import Detection
from nitro_e.sampling.pipeline import Images, TextToImage
from nitro_e.sampling.samplers import SamplingConfig
from nitro_e.shapes.render import render
from nitro_e.shapes.scenes import TASKS, scene

ROOT = Path(__file__).parent.parent

MODEL = {"preset": "micro-8", "latent_channels": 24, "text_width": 128, "gate_init": "one"}
SAMPLING = SamplingConfig(resolution=64, steps=2, guidance_scale=2.0, grid="linear")
USE = {"codec": {"name": "dct-f8c24"}, "text": {"name": "hash"}, "sampling": to_dict(SAMPLING)}


# --- intervals


@pytest.mark.parametrize(
    "right, num, low, high",  # Newcombe, Statistics in Medicine 17 (1998) 857, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_one_task_has_wilsons_interval(right, num, low, high):
    found = intervals.score([[1.0] * right + [0.0] * (num - right)])
    assert found.value == pytest.approx(right / num) and found.num == num
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


@pytest.fixture
def few_resamples(monkeypatch):
    """Enough for coverage, which is measured over many intervals."""
    monkeypatch.setattr(intervals, "RESAMPLES", 400)


def covered(draw, make, truth: float, repeats: int = 600) -> float:
    found = [make(draw()) for _ in range(repeats)]
    return np.mean([e.low <= truth <= e.high for e in found])


@pytest.mark.parametrize(
    "shares",
    [
        (0.95, 0.9, 0.5, 0.3, 0.1, 0.1),
        (0.99, 0.99, 0.95, 0.95, 0.9, 0.9),
        (0.02,) * 6,
        (1, 1, 1, 0.98, 0.95, 0.9),
    ],
)
def test_intervals_of_the_mean_of_tasks_cover_the_truth(shares, few_resamples):
    """95 % of the time; 600 draws have a standard error of 0.9 %."""
    rng = np.random.default_rng(0)
    draw = lambda: [(rng.random(100) < share).astype(float) for share in shares]  # noqa: E731
    assert 0.92 <= covered(draw, intervals.score, np.mean(shares)) <= 0.985


def test_interval_of_several_images_per_prompt_knows_that_they_are_alike(few_resamples):
    """Prompts differ in difficulty: 4 images of each say less than 4 times as many prompts."""
    rng = np.random.default_rng(1)

    def draw():
        hard = rng.beta(0.5, 0.5, (60, 1))  # mean 0.5
        return (rng.random((60, 4)) < hard).astype(float)

    assert 0.92 <= covered(lambda: [draw().mean(axis=1)], intervals.score, 0.5) <= 0.975
    assert covered(lambda: [draw().ravel()], intervals.score, 0.5) < 0.85  # what ignoring it would give


def test_scores_outside_0_to_1_have_nearly_the_normal_interval():
    values = np.random.default_rng(2).normal(20, 3, 200)
    found = intervals.score([values])
    half = 1.96 * values.std() / 200**0.5
    assert (found.low, found.high) == pytest.approx(
        (values.mean() - half, values.mean() + half), abs=0.05 * half
    )
    assert intervals.score([values]) == found  # the resamples have a fixed seed
    assert math.isinf(intervals.score([[20.0]]).high)  # one value says nothing of the spread


def test_scores_that_stay_away_from_the_ends_have_nearly_the_normal_interval():
    """Such as HPSv2.1, about .28: a spread that reaches to 0 and 1 would hide what is there."""
    rng = np.random.default_rng(4)
    theirs = [rng.normal(0.28, 0.02, 100) for _ in range(2)]
    ours = [values + rng.normal(0.004, 0.01, 100) for values in theirs]
    for found, values in (
        (intervals.score(ours), ours),
        (intervals.difference(ours, theirs), np.subtract(ours, theirs)),
    ):
        half = 1.96 * np.sqrt(np.var(values, axis=1).sum() / 100) / 2
        expected = np.mean(values) - half, np.mean(values) + half
        assert (found.low, found.high) == pytest.approx(expected, abs=0.1 * half)


def test_ratio_covers_the_truth_and_has_no_upper_limit_where_the_denominator_may_be_0(few_resamples):
    rng = np.random.default_rng(3)

    def draw():
        return [(rng.random((5, 50)) < share).astype(float) for share in (0.4, 0.6)]

    make = lambda parts: intervals.ratio(*map(list, parts))  # noqa: E731
    assert 0.925 <= covered(draw, make, 0.4 / 0.6) <= 0.975
    none, some = [[0.0] * 20], [[1.0, 0.0] * 10]
    assert math.isinf(intervals.ratio(some, none).high) and math.isnan(intervals.ratio(some, none).value)
    assert intervals.ratio(none, some).value == intervals.ratio(none, some).low == 0


@pytest.mark.parametrize("shares", [(0.5, 0.1, 0.05), (0.2, 0.3, 0.2), (0.9, 0.03, 0.0)])
def test_paired_difference_covers_the_truth_and_gains_by_pairing(shares, few_resamples):
    """shares: both right, only ours, only theirs."""
    rng = np.random.default_rng(4)
    both, ours, theirs = shares

    def draw():
        kind = rng.random((6, 100))
        a = kind < both + ours
        return a.astype(float), (
            (kind < both) | ((kind >= both + ours) & (kind < both + ours + theirs))
        ).astype(float)

    assert 0.93 <= covered(draw, lambda pair: intervals.difference(*pair), ours - theirs) <= 0.985
    a, b = draw()
    paired = intervals.difference(a, b)
    alone = [intervals.score(each) for each in (a, b)]
    unpaired = sum((each.high - each.low) ** 2 for each in alone) ** 0.5
    assert paired.value == pytest.approx(alone[0].value - alone[1].value)
    assert paired.high - paired.low < (1.1 if both < 0.3 else 0.8) * unpaired  # both = 0.2: independent


def test_unknown_scores_are_left_out():
    found = intervals.score([[1.0, math.nan, 0.0], [1.0, 1.0]])
    assert found.value == pytest.approx(0.75) and found.num == 4
    assert math.isnan(intervals.score([[math.nan], [1.0]]).value)
    assert intervals.difference([[1.0, math.nan, 0.0]], [[0.0, 1.0, 0.0]])[::3] == (0.5, 2)
    with pytest.raises(ConfigError, match="same tasks and prompts"):
        intervals.difference([[1.0]], [[1.0, 0.0]])


# --- images and scores


class Painter:
    """A pipeline whose images are the true scenes, rolled by `shift` prompts; counts what it draws."""

    def __init__(self, shift: int = 0, num: int = 120, stop_after: int | None = None) -> None:
        images = [render(scene(0, "heldout", (index + shift) % num), 64) for index in range(num)]
        self.pixels_of = dict(zip(noise_seeds(0, [(i, 0) for i in range(num)]), images))
        self.drawn, self.stop_after = Counter(), stop_after

    def __call__(self, prompts, *, seeds, batch_size, output_type, **_):
        assert output_type == "pixels"
        if self.stop_after is not None and len(self.drawn) >= self.stop_after:
            raise KeyboardInterrupt
        self.drawn.update(seeds)
        images = np.stack([self.pixels_of[seed] for seed in seeds])
        return Images(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1)


def run(pipeline, folder, *, num=120, batch_size=32, **options) -> tuple[list[Prompt], list[ScoredImage]]:
    chosen = benchmark("shapes", num)
    prompts = load_prompts(chosen.prompts)
    scorer = build_rewards(chosen.rewards)
    generate = ImageGenerator(pipeline, SAMPLING, seed=0, batch_size=batch_size)
    rows = collect(generate, chosen, prompts, scorer, folder, **options)
    return prompts, rows


def test_true_images_score_1_and_shuffled_ones_next_to_nothing(tmp_path):
    prompts, true = run(Painter(), tmp_path / "true")
    for title in ("strict", "GenEval"):
        score = results.summarize(prompts, true, title)
        assert score.overall.value == 1 and set(score.tasks) == set(TASKS) and score.overall.num == 120
        assert score.seen.value == score.unseen.value == 1 and score.unseen_to_seen.value == 1
        assert score.seen.num == score.unseen.num == 50 and set(score.unseen_tasks) == set(TASKS[1:])
    prompts, rows = run(Painter(shift=1), tmp_path / "shuffled")
    score = results.summarize(prompts, rows, "strict")
    assert score.overall.value < 0.1 and score.overall.high < 0.2
    assert [row.saw for row in rows] == [row.saw for row in true[1:] + true[:1]]


def test_overall_is_the_mean_of_the_tasks_not_of_the_prompts():
    prompts = [Prompt("a", {"tag": "x"})] * 3 + [Prompt("b", {"tag": "y"})]
    rows = [ScoredImage(i, 0, p.text, {"s": float(p.text == "b")}, "", 0.1) for i, p in enumerate(prompts)]
    score = results.summarize(prompts, rows, "s")
    assert score.overall.value == 0.5 and score.seen is None and score.tasks["y"].value == 1


def test_an_interrupted_evaluation_goes_on_and_draws_nothing_twice(tmp_path):
    whole = run(Painter(), tmp_path / "whole")[1]
    painter = Painter(stop_after=64)
    with pytest.raises(KeyboardInterrupt):
        run(painter, tmp_path / "cut")
    record = next((tmp_path / "cut").glob("scores-*.jsonl"))
    record.write_bytes(record.read_bytes()[:-20])  # killed while writing a line
    assert len(read_rows(record)) == 63
    painter.stop_after = None
    again = run(painter, tmp_path / "cut", batch_size=7)[1]
    assert [row[:5] for row in again] == [row[:5] for row in whole]
    assert len(painter.drawn) == 120 and set(painter.drawn.values()) == {1}
    assert len(read_rows(record)) == 120
    run(painter, tmp_path / "cut", num=24)
    record.write_text("")
    run(painter, tmp_path / "cut", num=120, rejudge=True)
    assert painter.drawn.total() == 120 and len(read_rows(record)) == 120


def test_processes_share_an_evaluation_that_one_then_finds(tmp_path):
    """Two with a part each, of which one is interrupted, and a single one for the rest: the rows of one alone."""
    whole = run(Painter(), tmp_path / "whole", batch_size=16)[1]
    painters = [Painter(), Painter(stop_after=32)]
    options = {"folder": tmp_path / "shared", "batch_size": 16}
    first = run(painters[0], **options, share=DistContext(0, 2))[1]
    assert [row.index // 16 % 2 for row in first] == [0] * 64
    with pytest.raises(KeyboardInterrupt):
        run(painters[1], **options, share=DistContext(1, 2))
    painters.append(Painter())
    assert [row[:5] for row in run(painters[2], **options)[1]] == [row[:5] for row in whole]
    assert [len(painter.drawn) for painter in painters] == [64, 32, 24]
    files = [sorted(folder.glob("scores-*")) for folder in (tmp_path / "whole", tmp_path / "shared")]
    assert [path.name for path in files[0]] == [path.name for path in files[1]]
    kept = [[row[:5] for row in read_rows(path).values()] for (path,) in files]
    assert sorted(kept[0]) == sorted(kept[1])


def test_the_command_as_one_of_several_processes(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    command = ["shapes", str(tiny_model(tmp_path / "m")), "--num", "12", "--steps", "1", "--batch-size", "4"]
    command += ["--out", str(out), "--dtype", "float32"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert tool.main(command) == 0
    assert capsys.readouterr().out.count("drawn, a part: ") == 2 and not (out / "results.json").exists()
    assert tool.main([*command, "--rejudge"]) == 2
    assert "--rejudge: one process scores again" in capsys.readouterr().err
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    monkeypatch.delenv("WORLD_SIZE")
    assert tool.main(command) == 0 and "strict" in capsys.readouterr().out
    assert len(stamps) == 12 and stamps == {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}


def test_other_words_at_the_same_place_are_drawn_anew(tmp_path):
    chosen, painter = benchmark("shapes", 4), Painter()
    prompts, scorer = load_prompts(chosen.prompts), build_rewards(chosen.rewards)
    generate = ImageGenerator(painter, SAMPLING, seed=0, batch_size=4)
    collect(generate, chosen, prompts, scorer, tmp_path)
    prompts[2] = Prompt("a photo of a blue cross", prompts[2].info)
    rows = collect(generate, chosen, prompts, scorer, tmp_path)
    assert painter.drawn.total() == 5 and rows[2].prompt == prompts[2].text
    assert len(list(tmp_path.glob("*.png"))) == 5


def test_another_record_of_the_same_words_is_judged_anew(tmp_path):
    chosen, painter = benchmark("shapes", 4), Painter()
    prompts, scorer = load_prompts(chosen.prompts), build_rewards(chosen.rewards)
    generate = ImageGenerator(painter, SAMPLING, seed=0, batch_size=4)

    def strict() -> list[float]:
        return [row.scores["strict"] for row in collect(generate, chosen, prompts, scorer, tmp_path)]

    assert strict() == [1, 1, 1, 1]
    wanted = {"class": "circle", "count": 9}
    prompts[2] = Prompt(prompts[2].text, {**prompts[2].info, "include": [wanted]})
    assert strict() == [1, 1, 0, 1]
    (file,) = tmp_path.glob("scores-*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["index"] for line in lines] == [0, 1, 2, 3, 2]
    for line in lines:  # as earlier versions wrote them
        line |= {"scores": {**line["scores"], "strict": 0.5}}
        del line["record"]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert strict() == [1, 1, 0, 1] and painter.drawn.total() == 4


@reward
def undecided(pixels, prompts, info):
    """Cannot tell for images of two objects."""
    return torch.tensor([math.nan if record["tag"] == "two_object" else 1.0 for record in info])


def test_images_without_a_score_are_counted_and_asked_about_again(tmp_path):
    chosen, painter = benchmark("shapes", 12), Painter()
    scorer = build_rewards([RewardConfig(name=f"{__name__}:undecided", label="s")])
    prompts = load_prompts(chosen.prompts)
    for _ in range(2):
        rows = collect(ImageGenerator(painter, SAMPLING, 0, batch_size=12), chosen, prompts, scorer, tmp_path)
    score = results.summarize(prompts, rows, "s")
    assert score.unscored == 2 and math.isnan(score.overall.value) and score.tasks["colors"].value == 1
    assert painter.drawn.total() == 12 and scorer.tally["s"].unscored == 4
    assert "2 images could not be scored" in results.note({"s": score})


def tiny_model(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    model = EMMDiT(from_dict(ModelConfig, MODEL))
    torch.nn.init.normal_(model.out.weight, std=0.1)  # it starts at zero
    save_pretrained(model, folder, USE)
    return folder


def test_images_do_not_depend_on_the_batch_or_on_how_many_there_are(tmp_path):
    pipeline = TextToImage.from_pretrained(tiny_model(tmp_path / "model"))
    _, rows = run(pipeline, tmp_path / "a", num=6, batch_size=6)
    run(pipeline, tmp_path / "b", num=12, batch_size=5)
    for row in rows:
        ours, theirs = (np.asarray(Image.open(tmp_path / name / row.file)).astype(int) for name in "ab")
        assert np.abs(ours - theirs).max() <= 1 and ours.std() > 5
    assert len({(tmp_path / "a" / row.file).read_bytes() for row in rows}) == 6


def test_weights_hash_sees_every_part(tmp_path):
    pipeline = TextToImage.from_pretrained(tiny_model(tmp_path / "model"))
    parts = (pipeline.model, pipeline.codec, pipeline.text)
    before = weights_hash(*parts)
    assert before == weights_hash(*parts)
    with torch.no_grad():
        pipeline.codec.decoder[0, 0] += 1
        changed = weights_hash(*parts)
        pipeline.codec.decoder[0, 0] -= 1
        pipeline.model.out.bias[0] += 1
    assert len({before, changed, weights_hash(*parts)}) == 3


# --- the page


def test_failures_come_first_and_some_successes_stay():
    rows = [ScoredImage(i, 0, "p", {"s": float(i % 3 != 0)}, "", 0.1) for i in range(300)]
    shown = page.failures_and_successes(rows, "s")
    assert len(shown) == page.PER_TASK and [row.scores["s"] for row in shown] == [0.0] * 36 + [1.0] * 12
    few = page.failures_and_successes(rows[:10], "s")
    assert len(few) == 10 and [row.scores["s"] for row in few] == [0.0] * 4 + [1.0] * 6
    good = [row._replace(scores={"s": 1.0}) for row in rows]
    assert len(page.failures_and_successes(good, "s")) == page.PER_TASK


def test_detected_objects_in_words():
    box = (0.0, 0.0, 1.0, 1.0)
    assert describe([Detection("circle", "red", box), Detection(None, "blue", box)]) == "red circle, blue ?"
    assert describe([]) == "nothing"


# --- the command


def test_settings_and_two_checkpoints_in_one_command(tmp_path, capsys):
    ours, theirs = tiny_model(tmp_path / "ours"), tiny_model(tmp_path / "theirs", seed=1)
    out = tmp_path / "out"
    command = [
        "shapes",
        str(ours),
        "--against",
        str(theirs),
        "--num",
        "12",
        "--steps",
        "1",
        "2",
        "--out",
        str(out),
    ]
    assert tool.main([*command, "--guidance", "1", "--dtype", "float32"]) == 0
    told = capsys.readouterr().out
    assert "4 settings" in told and told.count("minus") == 2 and "unseen / seen" in told
    record = json.loads((out / "results.json").read_text())
    assert [entry["sampling"]["steps"] for entry in record["results"]] == [1, 2, 1, 2]
    hashes = [entry["checkpoint"]["sha256"] for entry in record["results"]]
    assert hashes[0] == hashes[1] != hashes[2] == hashes[3]
    for entry in record["results"]:
        rows = read_rows(next((out / entry["folder"]).glob("scores-*.jsonl")))
        assert len(rows) == entry["images"] == 12
        strict = entry["scores"]["strict"]
        assert strict["overall"]["value"] == pytest.approx(
            np.mean([row.scores["strict"] for row in rows.values()])
        )
        assert set(strict["tasks"]) == set(TASKS)
    assert [d["scores"]["strict"]["overall"]["num"] for d in record["differences"]] == [12, 12]
    text = (out / "report.html").read_text()
    assert_self_contained(text)
    assert {image.size for image in Page(text).images()} == {(64, 64)}

    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    assert len(stamps) == 48 and tool.main([*command, "--guidance", "1", "--dtype", "float32"]) == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    tiny_model(ours, seed=5)  # other weights under the same name
    assert tool.main([*command, "--guidance", "1", "--dtype", "float32"]) == 0
    assert len(list(out.rglob("*.png"))) == 72


def test_low_precision_draws_the_same_images_nearly(tmp_path):
    model = tiny_model(tmp_path / "model")
    images = []
    for precision in ("float32", "bfloat16"):
        out = tmp_path / precision
        assert tool.main(["shapes", str(model), "--num", "6", "--dtype", precision, "--out", str(out)]) == 0
        images.append([np.asarray(Image.open(path)).astype(float) for path in sorted(out.rglob("*.png"))])
    difference = np.abs(np.subtract(*images)).mean()
    assert 0 < difference < 5  # of 255


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["shape", "MODEL"], "did you mean 'shapes'"),
        (["shapes", "nowhere"], "'nowhere' does not exist"),
        (["shapes", "MODEL", "--num", "0"], "num must be at least 1"),
        (["shapes", "MODEL", "--per-prompt", "0"], "--per-prompt must be at least 1"),
        (["shapes", "MODEL", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["shapes", "MODEL", "--steps", "0"], "steps must be at least 1"),
        (["shapes", "MODEL", "--sampler", "eular"], "sampler: 'eular' is not one of"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, arguments, message):
    model = tiny_model(tmp_path / "model")
    arguments = [str(model) if word == "MODEL" else word for word in arguments]
    assert tool.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


# --- during training

RECIPE = """
name: toy
model: {preset: micro-8, gate_init: one}
stage: {kind: flow_matching, optim: {lr: 2e-3, warmup: 2}}
data: {shards: [SHARDS], resolution: 64, workers: 0}
batch: {global: 4}
components: {codec: dct-f8c24, text: hash}
engine: {steps: 5, save_every: 3, sample_every: 0, log_every: 1, precision: float32, tracker: none, ema: {beta: 0.5}}
sampling: {steps: 2, guidance_scale: 2.0, grid: linear}
evaluation:
  prompts: {source: shapes-heldout, num: 12}
  rewards: [{name: shapes, label: partial, options: {score: partial}}, {name: shapes, options: {score: strict}}]
  every: 2
  batch_size: 5
"""


def test_scores_during_training_are_those_of_the_command(tmp_path):
    """At the start, every so many steps and at the end; of the average; the same prompts and noise as the command's."""
    samples = [{"__key__": f"{i:04d}", "png": png(i), "txt": "a photo of a square"} for i in range(8)]
    write_shard(tmp_path / "toy-000000.tar", iter(samples))
    recipe, folder = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(RECIPE.replace("SHARDS", f"{tmp_path}/toy-*.tar"))
    assert train.main([str(recipe), f"run={folder}"]) == 0
    rows = {row["step"]: row for row in metrics.read(folder) if "eval/partial" in row}
    assert list(rows) == [0, 2, 4, 5] and all("eval/shapes/color_attr" in row for row in rows.values())

    pipeline = TextToImage.from_pretrained(f"{folder}@ema")
    chosen = benchmark("shapes", 12)
    prompts = load_prompts(chosen.prompts)
    scorer = build_rewards([RewardConfig(name="shapes", label="partial", options={"score": "partial"})])
    generate = ImageGenerator(pipeline, pipeline.defaults, seed=0, batch_size=12)
    judged = collect(generate, chosen, prompts, scorer, tmp_path / "p")
    score = results.summarize(prompts, judged, "partial")
    assert rows[5]["eval/partial"] == pytest.approx(score.overall.value, abs=0.02)
    assert rows[5]["eval/partial/unseen"] == pytest.approx(score.unseen.value, abs=0.04)

    charts = Page(write_report(folder).read_text()).charts()
    assert charts[:3] == [
        "Score: partial, by task",
        "Score: partial, seen and unseen combinations",
        "Score: shapes, by task",
    ]
    assert "Loss" in charts


def test_processes_share_the_images(tmp_path):
    """What two processes score adds up to what one does, and each draws its own images only."""
    pipeline = TextToImage.from_pretrained(tiny_model(tmp_path / "model"))
    rewards = (
        RewardConfig(name=f"{__name__}:undecided", label="u"),
        RewardConfig(name=f"{__name__}:darkness", label="d"),
    )
    config = EvaluationConfig(
        prompts=PromptsConfig(source="shapes-heldout", num=11), rewards=rewards, batch_size=3
    )

    def evaluator(*share) -> Evaluator:
        parts = (pipeline.codec, pipeline.text, torch.device("cpu"), contextlib.nullcontext)
        return Evaluator(config, SAMPLING, *parts, DistContext(*share))

    shares = [evaluator(rank, 2).draw_and_score(pipeline) for rank in (0, 1)]
    whole = evaluator().draw_and_score(pipeline)
    assert torch.equal(shares[0][1::2], torch.zeros(5, 2)) and torch.equal(shares[1][0::2], torch.zeros(6, 2))
    torch.testing.assert_close(shares[0] + shares[1], whole, atol=2 / 255, rtol=0, equal_nan=True)
    logs = evaluator(0, 2, lambda values: values + shares[1])(pipeline.model)
    assert logs["eval/d"] == pytest.approx(evaluator()(pipeline.model)["eval/d"], abs=2 / 255)
    assert logs["eval/u/unscored"] == 2 and "eval/u/two_object" not in logs and logs["eval/u/colors"] == 1


def png(index: int) -> bytes:
    import io

    buffer = io.BytesIO()
    Image.fromarray(render(scene(0, "train", index), 64)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"every": 0}, "every must be at least 1"),
        ({"rewards": []}, "rewards is empty"),
        ({"rewards": ["shapes", "shapes"]}, "two are called 'shapes'"),
        ({"rewards": [{"name": "shapes", "options": {"scor": "strict"}}]}, "did you mean 'score'"),
        ({"prompts": "shapes-holdout"}, "did you mean 'shapes-heldout'"),
    ],
)
def test_wrong_evaluation_sections(change, message):
    section = {"prompts": "shapes-heldout", "rewards": ["shapes"], **change}
    with pytest.raises(ConfigError, match=message):
        from_dict(EvaluationConfig, section, "evaluation")


# --- other benchmarks


@reward
def darkness(pixels, prompts, info, *, scale: float = 1.0):
    """How dark an image is, in any unit."""
    return -scale * pixels.mean(dim=(1, 2, 3))


def test_a_file_of_prompts_with_any_reward(tmp_path, capsys):
    model, prompts = tiny_model(tmp_path / "model"), tmp_path / "mine.txt"
    prompts.write_text("a red cat\na blue dog\n")
    command = [str(prompts), str(model), "--reward", f"{__name__}:darkness", "--per-prompt", "3"]
    out = tmp_path / "out"
    assert tool.main([*command, "--reward-option", "scale=100", "--out", str(out)]) == 0
    assert "all" in capsys.readouterr().out
    record = json.loads((out / "results.json").read_text())["results"][0]
    pixels = {
        path.name: -100 * (np.asarray(Image.open(path)).astype(float) / 127.5 - 1).mean()
        for path in out.rglob("*.png")
    }
    means = [
        np.mean([value for name, value in pixels.items() if name.startswith(f"0000{i}")]) for i in (0, 1)
    ]
    found = record["scores"][f"{__name__}:darkness"]["overall"]
    assert (
        len(pixels) == 6 and found["value"] == pytest.approx(np.mean(means), rel=1e-4) and found["num"] == 2
    )
    # of two prompts
    assert (found["low"], found["high"]) == pytest.approx((min(means), max(means)), rel=1e-4)
    assert tool.main(command[:2]) == 2 and "--reward NAME" in capsys.readouterr().err
    assert tool.main([*command, "--reward-option", "scale"]) == 2 and "KEY=VALUE" in capsys.readouterr().err
    assert (
        tool.main(["shapes", str(model), "--reward", "hpsv2.1"]) == 2
        and "own rewards" in capsys.readouterr().err
    )


def test_geneval_by_its_own_judge(tmp_path, capsys):
    """Random weights: nothing is right, but all of it runs; the images are kept and the verdicts GenEval's."""
    tiny_rewards.save_mask2former(tmp_path / "detector")
    tiny_rewards.save_clip(tmp_path / "clip")
    out, model = tmp_path / "out", tiny_model(tmp_path / "model")
    command = ["geneval", str(model), "--num", "3", "--per-prompt", "2", "--out", str(out)]
    weights = ["--reward-path", str(tmp_path / "detector"), "--reward-option", f"clip={tmp_path / 'clip'}"]
    assert tool.main([*command, *weights]) == 0
    record = json.loads((out / "results.json").read_text())
    assert record["results"][0]["images"] == 6 and record["prompts"] == 3
    assert record["results"][0]["scores"]["GenEval"]["overall"]["num"] == 3
    assert len(list(out.rglob("*.png"))) == 6
    # the reason of every image, as GenEval's tool puts it
    shown = [
        value
        for tag, name, value in Page((out / "report.html").read_text()).attributes
        if (tag, name) == ("img", "title")
    ]
    assert len(shown) == 6 and all("GenEval 0; saw" in each and ">=1, found 0" in each for each in shown)
    judge = record["judges"]["GenEval"]
    assert judge.startswith(f"{tmp_path / 'detector'} ") and judge in capsys.readouterr().out
    tiny_rewards.save_mask2former(tmp_path / "detector", seed=1)  # other weights under the same name
    assert (
        tool.main(["geneval", str(model), "--num", "1", "--per-prompt", "1", "--out", str(out), *weights])
        == 0
    )
    assert json.loads((out / "results.json").read_text())["judges"]["GenEval"] != judge
    assert len(list(out.rglob("scores-*.jsonl"))) == 2
