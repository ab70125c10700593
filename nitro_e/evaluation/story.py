"""The page and the table of `nitro-e demo`: what each stage did to the score, in words computed from the numbers.

All models drew the same prompts from the same noise, so differences are paired. Every image of the first prompt of each
task is shown, right or wrong; none is chosen by its looks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from nitro_e.data.prompts import Prompt
from nitro_e.evaluation import intervals, results
from nitro_e.evaluation.evaluate import Result
from nitro_e.evaluation.images import ScoredImage
from nitro_e.evaluation.intervals import Estimate
from nitro_e.evaluation.page import verdict as saw
from nitro_e.evaluation.results import Table, shown, signed, task_of
from nitro_e.record.charts import Chart, Series, line_chart
from nitro_e.record.pages import Record, Sheet, read_record, samples
from nitro_e.record.templating import data_url, duration, write_page

STRICT = "strict"
CHANGED = 2  # prompts shown that a stage got right, and as many that it got wrong


class Known(NamedTuple):
    """A drawn result with the name that readers know it by."""

    name: str
    result: Result

    @property
    def score(self) -> Estimate:
        return self.result.scores[STRICT].overall

    def score_of(self, tasks: Sequence[str]) -> Estimate:
        """The score of some tasks; of all of them if none is named."""
        if not tasks:
            return self.score
        of_tasks = self.result.scores[STRICT].tasks
        right = [round(of_tasks[task].value * of_tasks[task].num) for task in tasks]
        values = [[1.0] * hits + [0.0] * (of_tasks[task].num - hits) for task, hits in zip(tasks, right)]
        return intervals.score(values)


@dataclass(frozen=True)
class Stage:
    """What the page says of one stage. `before` is None for a training that starts from nothing."""

    key: str  # of its run and times
    title: str
    text: str
    measure: str
    before: Known | None
    after: Known
    metrics: tuple[str, ...]  # whose curves are shown
    tasks: tuple[str, ...] = ()  # that it is scored on; empty: all


class Picture(NamedTuple):
    """One image of a prompt."""

    name: str  # of the model and setting
    source: str
    right: bool
    note: str  # its scores and what was detected in it


TEXTS = {
    "1_pretrain": (
        "1. Pretraining",
        "A denoiser with random weights sees scenes mixed with noise and learns which way leads back to the scene (flow "
        "matching), while a vision encoder's features tell its middle layers what to look for (REPA). The shipped model "
        "had a hundred times as many samples, so this one is shown, and asked for, one object at a time.",
        "one object, guidance 3, 20 steps",
        ("eval/color", "eval/strict", "velocity_loss"),
    ),
    "2_finetune": (
        "2. Fine-tuning",
        "The shipped model goes on training at a lower rate and without REPA, and an average of its weights is kept. On "
        "data of your own this is the step that adapts it; on the scenes it knows it must keep what it can do.",
        "guidance 3, 20 steps",
        ("loss",),
    ),
    "3_grpo": (
        "3. GRPO",
        "The shipped model draws several images of each prompt, the judge scores them, and the weights move towards the "
        "images above their prompt's average. Here it draws in six steps without guidance, in training and after: six evaluations "
        "of the network instead of forty.",
        "without guidance, 6 steps",
        ("reward/mixed", "reward/strict", "kl"),
    ),
    "4_distill": (
        "4. Distillation",
        "A student learns to draw in four, two or one steps without guidance where the shipped model needs twenty guided ones: four "
        "evaluations of the network instead of forty. It sees prompts and no images: it imitates the teacher's guided velocity on "
        "its own paths, and moves from where a second network sees its images towards where the teacher would have them.",
        "without guidance, 4 steps",
        ("imitate", "score_distance"),
    ),
}


class Story:
    """The demo told from its scored images and its runs.

    drawn: all results, in any order; models are told apart by their source. runs: stage -> its run directory. times:
    part -> {"seconds", "cpu_seconds", "done"}, and "wall", the seconds of all.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        drawn: Sequence[Result],
        runs: Mapping[str, Path],
        times: Mapping[str, Any],
    ) -> None:
        self.prompts, self.drawn, self.runs, self.times = prompts, drawn, runs, times
        self.shipped = self._known("shapes", 3, 20, "shipped, guidance 3, 20 steps")
        self.unguided = {
            steps: self._known("shapes", 1, steps, f"shipped, no guidance, {steps} step{'s'[: steps > 1]}")
            for steps in (20, 6, 4, 2, 1)
        }
        self.student = {
            steps: self._known(runs["4_distill"], 1, steps, f"distilled, {steps} step{'s'[: steps > 1]}")
            for steps in (4, 2, 1)
        }
        begun = self._known(runs["1_pretrain"], 3, 20, "from nothing, guidance 3, 20 steps")
        tuned = self._known(runs["2_finetune"], 3, 20, "fine-tuned, guidance 3, 20 steps")
        rewarded = self._known(runs["3_grpo"], 1, 6, "after GRPO, no guidance, 6 steps")
        pairs = {
            "1_pretrain": (None, begun),
            "2_finetune": (self.shipped, tuned),
            "3_grpo": (self.unguided[6], rewarded),
            "4_distill": (self.unguided[4], self.student[4]),
        }
        self.stages = [
            Stage(key, title, text, measure, *pairs[key], curves)
            for key, (title, text, measure, curves) in TEXTS.items()
        ]
        self.models = [
            begun,
            self.shipped,
            tuned,
            self.unguided[6],
            rewarded,
            self.unguided[4],
            *self.student.values(),
        ]

    def _known(self, source: str | Path, guidance: float, steps: int, name: str) -> Known:
        for result in self.drawn:
            setting = (result.sampling.guidance_scale, result.sampling.steps)
            if result.checkpoint["source"] == str(source) and setting == (guidance, steps):
                return Known(name, result)
        raise LookupError(f"nothing was drawn with {source} at guidance {guidance}, {steps} steps")

    # ---- numbers

    def difference(self, stage: Stage) -> dict[str, Any] | None:
        """Compare a stage with what it started from, prompt by prompt."""
        if stage.before is None:
            return None
        return results.compare(self.prompts, stage.after.result.rows, stage.before.result.rows, STRICT)

    def verdict(self, stage: Stage) -> tuple[str, str]:
        """Say whether a stage improved what it is meant to improve, and how good that is."""
        found = self.difference(stage)
        if found is None:
            return self._climb(stage)
        change, num = found["overall"], len(self.prompts)
        counts = f"better on {found['better']} of {num} prompts, worse on {found['worse']}"
        if change.low > 0:
            return f"It improved the score by {signed(change)}: {counts}.", "good"
        if change.high < 0:
            return f"It did not improve the score but lowered it by {signed(change)}: {counts}.", "bad"
        return f"No improvement that {num} prompts can show: {signed(change)}, {counts}.", "fair"

    def _climb(self, stage: Stage) -> tuple[str, str]:
        """Say how far the scores of a training from nothing climbed."""
        record, climbed, risen = self._record(stage), [], False
        for name in ("color", "strict"):
            if points := record.points(f"eval/{name}"):
                (_, first), (step, last) = points[0], points[-1]
                climbed.append(f"{name} from {first:.3f} to {last:.3f}")
                risen = risen or last > first
        if not climbed:
            return "Its scores during training were not recorded.", "fair"
        start = "The score climbed during" if risen else "The score did not climb during"
        return f"{start} {step:,} steps: {', '.join(climbed)}.", "good" if risen else "bad"

    def _record(self, stage: Stage) -> Record:
        return read_record(self.runs[stage.key])

    def seconds(self, key: str) -> str:
        """The wall-clock and CPU time of a part."""
        found = self.times.get(key)
        return "–" if found is None else f"{found['seconds']:.0f} s, {found['cpu_seconds']:.0f} CPU-s"

    def table(self) -> Table:
        """A row per stage."""
        head = ["stage", "measured", "before", "after", "paired difference", "time"]
        rows = []
        for stage in self.stages:
            found = self.difference(stage)
            before = "–" if stage.before is None else shown(stage.before.score)
            change = "–" if found is None else signed(found["overall"])
            rows.append(
                [
                    stage.title,
                    stage.measure,
                    before,
                    shown(stage.after.score_of(stage.tasks)),
                    change,
                    self.seconds(stage.key),
                ]
            )
        return Table(f"Strict score over {len(self.prompts)} held-out prompts, 95 % intervals", head, rows)

    def few_steps(self) -> Table:
        """A row per number of steps: scores and the time of an image."""
        rows = []
        for known in (self.shipped, *self.unguided.values(), *self.student.values()):
            guided = known.result.sampling.guidance_scale != 1
            calls = known.result.sampling.steps * (2 if guided else 1)
            rate = known.result.images_per_second
            per_image = "–" if rate is None else f"{1000 / rate:.0f} ms"
            rows.append([known.name, str(calls), shown(known.score), per_image])
        return Table("20, 4 and 1 steps", ["model", "network evaluations", STRICT, "time per image"], rows)

    def as_text(self) -> str:
        """The tables and verdicts, for a terminal."""
        told = "\n".join(f"{stage.title}: {self.verdict(stage)[0]}" for stage in self.stages)
        return "\n\n".join([self.table().as_text(), told, self.few_steps().as_text()])

    # ---- the page

    def write(self, path: Path) -> Path:
        """Write the page."""
        return write_page(
            path,
            "demo.html",
            title="Four stages of a text-to-image model",
            table=self.table(),
            few_steps=self.few_steps(),
            steps_chart=self.steps_chart(),
            chapters=[self.chapter(stage) for stage in self.stages],
            prompts=self.side_by_side(),
            num=len(self.prompts),
            took=duration(self.times["wall"]),
            cpu=duration(
                sum(
                    each["cpu_seconds"]
                    for each in self.times.values()
                    if isinstance(each, dict) and "done" in each
                )
            ),
        )

    def chapter(self, stage: Stage) -> dict[str, Any]:
        """What the page shows of a stage."""
        words, colour = self.verdict(stage)
        return {
            "stage": stage,
            "before": None if stage.before is None else shown(stage.before.score),
            "after": shown(stage.after.score_of(stage.tasks)),
            "verdict": words,
            "colour": colour,
            "time": self.seconds(stage.key),
            "charts": self.charts(stage),
            "sheets": self.sheets(stage),
            "changed": self.changed(stage),
        }

    def charts(self, stage: Stage) -> list[Chart]:
        """The curves of a stage, as far as they were recorded."""
        record = self._record(stage)
        titles = {
            name: name.removeprefix("eval/").replace("/", ": ").replace("_", " ") for name in stage.metrics
        }
        return [
            line_chart(
                f"{titles[name]} by step", [Series(titles[name], points)], log=False, smooth="/" not in name
            )
            for name in stage.metrics
            if (points := record.points(name))
        ]

    def sheets(self, stage: Stage) -> list[Sheet]:
        """The images that a training from nothing drew on its way; other stages are shown beside what they began with."""
        return (
            []
            if stage.before
            else [each for group in samples(self._record(stage)) for each in group["sheets"]]
        )

    def steps_chart(self) -> Chart:
        """The score against the number of steps."""
        guided = [(float(20), self.shipped.score.value)]
        lines = {"shipped, no guidance": self.unguided, "distilled": self.student}
        series = [Series("shipped, guidance 3", guided)]
        for name, known in lines.items():
            series.append(Series(name, [(float(steps), known[steps].score.value) for steps in sorted(known)]))
        return line_chart("Strict score by number of steps", series, smooth=False, log=False, x_label="steps")

    def side_by_side(self) -> list[tuple[str, str, list[Picture]]]:
        """List task, prompt and the images of all models, for the first prompt of each task."""
        first: dict[str, int] = {}
        for index, prompt in enumerate(self.prompts):
            first.setdefault(task_of(prompt), index)
        return [
            (
                task.replace("_", " "),
                self.prompts[index].text,
                [self.picture(known, index) for known in self.models],
            )
            for task, index in first.items()
        ]

    def changed(self, stage: Stage) -> list[tuple[str, list[Picture]]]:
        """List the first prompts that a stage got right, and the first that it got wrong, with both images."""
        if stage.before is None:
            return []
        found = []
        for sign in (1, -1):
            pairs = zip(stage.after.result.rows, stage.before.result.rows)
            rows = [a.index for a, b in pairs if (a.scores[STRICT] - b.scores[STRICT]) * sign > 0]
            found += [
                (
                    self.prompts[index].text,
                    [self.picture(stage.before, index), self.picture(stage.after, index)],
                )
                for index in rows[:CHANGED]
            ]
        return found

    def picture(self, known: Known, index: int) -> Picture:
        """Read a model's image of a prompt."""
        row: ScoredImage = known.result.rows[index]
        with Image.open(known.result.folder / row.file) as image:
            return Picture(known.name, data_url(image), row.scores[STRICT] == 1, saw(row))
