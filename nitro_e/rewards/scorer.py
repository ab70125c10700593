"""Several rewards at once: configs -> Scorer, which gives a matrix of scores and says which of them are valid.

Images are rounded to 8 bits first, so that a score is the score of the saved PNG. A reward is loaded when it is first
used (or by `load`), gets images in batches of its own size, without gradients and autocast, on its own device, and can
be moved to the CPU between uses. Its `dtype` is what it computes in: float32 is that, without TF32. Rewards that read the
same weights in the same place have them in memory once.

Failures: a reward that raises is called again, `retries` times; then the rows of that batch are not valid. Neither are
NaN scores, nor images with a pixel that is not finite, which no reward gets to see. They are counted and never
replaced by a number. After `max_failures` batches of a reward in a row without any score the run stops.

A reward of weight 0 is monitored: scored and logged, never trained on.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from nitro_e.config import Config, ConfigError, Ge, Le, TrainingError
from nitro_e.files import weights_hash
from nitro_e.interfaces import as_prompts
from nitro_e.rewards import registry
from nitro_e.rewards.reuse import placed

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RewardConfig(Config):
    """One reward. A bare string in YAML is its name."""

    SHORTHAND: ClassVar[str] = "name"
    RENAMED: ClassVar[dict[str, str]] = {
        "timeout": "options.timeout (a reward that asks a server sets its own limit)"
    }

    name: str  # a built-in one, or "module:name"
    label: str | None = None  # in logs; None = the name. Two of the same name need one
    weight: float = 1.0  # of its advantages; 0 = monitored: scored and logged, never trained on
    transform: Literal["none", "rank"] = "none"  # rank: share of its group that an image beats (`win_rates`)
    path: str | None = None  # hub id or local folder of the weights; None = the default hub id
    revision: str | None = None  # of the hub repository
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # the reward model computes in
    device: str | None = None  # None = where training runs
    offload: bool = False  # keep the weights on the CPU between uses
    batch_size: Annotated[int, Ge(1), Le(65536)] = 16  # images at a time
    every: Annotated[int, Ge(1)] = 1  # monitored ones: rollouts from one in which it is scored to the next
    options: dict[str, bool | int | float | str] = field(default_factory=dict)  # of this reward

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device is not None:
            parse_device(self.device)
        if self.every > 1 and not self.monitored:
            raise ConfigError(
                f"every {self.every}: every rollout is trained on; only a reward of weight 0 may be scored less often"
            )
        given = {"path": self.path, "revision": self.revision}
        given |= {"dtype": self.dtype if self.dtype != "float32" else None}
        registry.check_options(self.name, self.options, {k: v for k, v in given.items() if v is not None})

    @property
    def title(self) -> str:
        return self.label or self.name

    @property
    def monitored(self) -> bool:
        return self.weight == 0


class Scores(NamedTuple):
    values: Tensor  # (B, R) float32; NaN where not valid
    valid: Tensor  # (B, R) bool


@dataclass
class Tally:
    """Counts of the images that one reward was given so far."""

    scored: int = 0
    unscored: int = 0  # failed, NaN, or an image that is not finite
    skipped: int = 0  # prompts without the metadata that the reward needs
    failures: int = 0  # calls that raised, retries included


def build_rewards(
    configs: Sequence[RewardConfig],
    device: torch.device | str = "cpu",
    retries: int = 2,
    max_failures: int = 10,
) -> Scorer:
    """Make a scorer with a column per config, in their order; nothing is loaded yet."""
    titles = [config.title for config in configs]
    for title in titles:
        if titles.count(title) > 1:
            raise ConfigError(f"rewards: two are called '{title}'; give one of them another label")
    return Scorer(
        [_Column(config, parse_device(config.device or device), retries, max_failures) for config in configs]
    )


def reward_of_prompts(
    config: RewardConfig, known: Mapping[str, dict], device: torch.device | str
) -> Callable[[Tensor, Sequence[str]], Tensor]:
    """Load one reward as a function (pixels, prompts) -> (B,), with a gradient wherever one is recorded.

    known: prompt -> what else is known of it, of every prompt that will be scored; ConfigError if the reward needs more.
    """
    scorer = build_rewards([config], device)
    scorer.check(list(known.values()))
    scorer.load()

    def reward(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        info = [known[prompt] for prompt in prompts]
        if torch.is_grad_enabled():
            return scorer.differentiate(pixels, prompts, info)
        return scorer(pixels, prompts, info).values[:, 0]

    return reward


class Scorer:
    """`scorer(pixels, prompts, info)` -> Scores, a column per reward; not for several threads."""

    def __init__(self, columns: Sequence[_Column]) -> None:
        self._columns = tuple(columns)
        self.configs = tuple(column.config for column in columns)
        self.names = tuple(config.title for config in self.configs)
        self.weights = torch.tensor([config.weight for config in self.configs])  # (R,); 0 = monitored

    @property
    def said(self) -> list[str]:
        """What rewards that explain themselves (`reward.said`) said of each image of the last call, in one line, once."""
        return [
            "; ".join(dict.fromkeys(filter(None, words)))
            for words in zip(*(column.said for column in self._columns))
        ]

    @property
    def counts(self) -> list[dict[str, dict]]:
        """What rewards that count something (`reward.counts`) counted in each image of the last call, by title."""
        titled = [
            [{column.config.title: each} if each else {} for each in column.counts]
            for column in self._columns
        ]
        return [{title: each for part in parts for title, each in part.items()} for parts in zip(*titled)]

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds that each reward has taken so far."""
        return {column.config.title: column.seconds for column in self._columns}

    @property
    def tally(self) -> dict[str, Tally]:
        return {column.config.title: column.tally for column in self._columns}

    def load(self) -> None:
        """Load every reward now, so that what is missing shows before training starts."""
        for column in self._columns:
            column.load()

    def sources(self) -> dict[str, str]:
        """Name the weights of every reward that has some: their name, where the reward knows it, and a hash."""
        return {column.config.title: column.source() for column in self._columns if column.source()}

    def applies(self, info: Sequence[dict], turn: int = 0) -> Tensor:
        """Return (B, R) bool: whether a reward can score images of such a prompt, and does at this turn."""
        rows = [[column.due(turn) and column.applies(record) for column in self._columns] for record in info]
        return torch.tensor(rows, dtype=torch.bool).reshape(len(info), len(self._columns))

    def check(self, info: Sequence[dict]) -> None:
        """ConfigError if some reward can score none of these prompts."""
        for column in self._columns:
            if not any(map(column.applies, info)):
                raise ConfigError(
                    f"rewards: '{column.config.title}' needs GenEval metadata, which no prompt has; give a "
                    ".jsonl file with it, or a source that makes it"
                )

    @torch.no_grad()
    def __call__(self, pixels: Tensor, prompts: Sequence[str], info: Sequence[dict], turn: int = 0) -> Scores:
        """Score pixels (B, 3, H, W) in -1..1; results are on their device. TrainingError: see above.

        turn: the number of the rollout; rewards that are not due at it give no scores.
        """
        prompts = as_prompts(prompts)
        if not len(pixels) == len(prompts) == len(info):
            raise ValueError(f"{len(pixels)} images, {len(prompts)} prompts and {len(info)} info records")
        whole = pixels.isfinite().flatten(1).all(dim=1).tolist()  # B
        pixels = quantize(pixels)
        with _exact(pixels.device):
            columns = [
                column.score(pixels, prompts, info, whole)
                if column.due(turn)
                else pixels.new_full((len(pixels),), math.nan)
                for column in self._columns
            ]
        values = torch.stack(columns, dim=1) if columns else pixels.new_zeros(len(pixels), 0)  # (B, R)
        return Scores(values, values.isfinite())

    def differentiate(self, pixels: Tensor, prompts: Sequence[str], info: Sequence[dict]) -> Tensor:
        """Return the weighted sum (B,) of the trained scores with its gradient; pixels (B, 3, H, W) are not rounded.

        A reward counts as 0 where it has no score. ConfigError for one that has no gradient.
        """
        total = pixels.new_zeros(len(pixels))
        with _exact(pixels.device):
            for column in self._columns:
                if not column.config.monitored:
                    total = total + column.config.weight * column.differentiate(pixels, prompts, info)
        return total

    def transform(self, scores: Scores, groups: Tensor) -> Scores:
        """Scores after each reward's transform; groups (B,): ints, one per prompt."""
        columns = [
            win_rates(values, valid, groups) if config.transform == "rank" else values
            for config, values, valid in zip(self.configs, scores.values.unbind(1), scores.valid.unbind(1))
        ]
        return Scores(torch.stack(columns, dim=1) if columns else scores.values, scores.valid)


def parse_device(name: torch.device | str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: '{name}' is no device; cpu, cuda or cuda:1 for example") from None


def quantize(pixels: Tensor) -> Tensor:
    """Round pixels in -1..1 to the grid of 8-bit images, as a saved PNG holds them; float32."""
    return ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round() / 255 * 2 - 1


def win_rates(values: Tensor, valid: Tensor, groups: Tensor) -> Tensor:
    """Return (B,): the share of the other valid images of its group that each one beats, ties counting half.

    This removes the scale of the scores, as in Pref-GRPO (arXiv:2508.20751), here with a pointwise reward.
    An image alone in its group gets one half, one without a valid score NaN."""
    rivals = (groups[:, None] == groups[None, :]) & valid[:, None] & valid[None, :]  # (B, B)
    rivals.fill_diagonal_(False)
    wins = (values[:, None] > values[None, :]).float() + 0.5 * (values[:, None] == values[None, :]).float()
    number = rivals.sum(1)
    rates = torch.where(number > 0, (wins * rivals).sum(1) / number.clamp(min=1), 0.5)
    return rates.masked_fill(~valid, math.nan)


class _Column:
    """One reward of a scorer: its config, the reward once it is loaded, and the counts of its images."""

    def __init__(self, config: RewardConfig, device: torch.device, retries: int, max_failures: int) -> None:
        self.config, self.device = config, device
        self.retries, self.max_failures = retries, max_failures
        self.tally = Tally()
        self.needs_info = getattr(registry.find(config.name), "needs_info", False)
        self.failed_batches = 0  # in a row
        self.seconds = 0.0
        self.said: list[str] = []  # of every image of the last call
        self.counts: list[dict] = []  # likewise
        self.reward: Callable[..., Tensor] | None = None
        self._source: str | None = None

    def due(self, turn: int) -> bool:
        return turn % self.config.every == 0

    def applies(self, record: dict) -> bool:
        return "include" in record or not self.needs_info

    def source(self) -> str:
        """Name and hash of the weights; empty if there are none."""
        self.load()
        if self._source is None:
            name = getattr(self.reward, "source", "")
            known = isinstance(self.reward, torch.nn.Module)
            self._source = f"{name} {weights_hash(self.reward)[:12]}".strip() if known else name
        return self._source

    def load(self) -> None:
        if self.reward is None:
            config = self.config
            reserved = {"path": config.path, "revision": config.revision, "device": self.device}
            reserved["dtype"] = getattr(torch, config.dtype)
            with placed((str(self.device), config.offload)):
                self.reward = registry.build(config.name, config.options, reserved)
            self._move("cpu" if config.offload else self.device)

    def score(
        self, pixels: Tensor, prompts: Sequence[str], info: Sequence[dict], whole: Sequence[bool]
    ) -> Tensor:
        """Return (B,) float32 on the device of the pixels, NaN where there is no score; whole: B, images to look at."""
        self.load()
        started = time.perf_counter()
        values = torch.full((len(pixels),), math.nan)  # (B,)
        self.said, self.counts = [""] * len(pixels), [{}] * len(pixels)
        applicable = [i for i, record in enumerate(info) if self.applies(record)]
        rows = [i for i in applicable if whole[i]]
        if self.config.offload and rows:
            self._move(self.device)
        for first in range(0, len(rows), self.config.batch_size):
            batch = rows[first : first + self.config.batch_size]
            values[batch] = self._score_batch(
                pixels[batch].to(self.device), [prompts[i] for i in batch], [info[i] for i in batch]
            )
            for i, words in zip(batch, getattr(self.reward, "said", [])):
                self.said[i] = words
            for i, counts in zip(batch, getattr(self.reward, "counts", [])):
                self.counts[i] = counts
        if self.config.offload and rows:
            self._move("cpu")
        self.seconds += time.perf_counter() - started
        scored = int(values.isfinite().sum())
        self.tally.scored += scored
        self.tally.unscored += len(applicable) - scored
        self.tally.skipped += len(pixels) - len(applicable)
        return values.masked_fill(~values.isfinite(), math.nan).to(pixels.device)

    def differentiate(self, pixels: Tensor, prompts: Sequence[str], info: Sequence[dict]) -> Tensor:
        """Return (B,) with gradients, 0 where there is no score.

        The backward pass needs the weights too, so that those of `offload` stay on the device until they have scored again.
        """
        self.load()
        assert self.reward is not None
        rows = [i for i, record in enumerate(info) if self.applies(record)]
        total = pixels.new_zeros(len(pixels))
        if not rows:
            return total
        if self.config.offload:
            self._move(self.device)
        values = self.reward(
            pixels[rows].to(self.device), [prompts[i] for i in rows], [info[i] for i in rows]
        )
        if not values.requires_grad:
            raise ConfigError(
                f"reward '{self.config.title}' has no gradient to follow; train on it with another stage.algorithm.kind "
                "than reward_gradient, or give it the weight 0; search noise with --noise-candidates"
            )
        values = values.float().to(pixels.device)
        return total.index_add(
            0, torch.tensor(rows, device=pixels.device), torch.where(values.isfinite(), values, 0.0)
        )

    def _score_batch(self, pixels: Tensor, prompts: list[str], info: list[dict]) -> Tensor:
        """Return (B,) on the CPU, NaN where there is no score; TrainingError after too many batches without any."""
        values, reason = self._call(pixels, prompts, info)
        if values.isfinite().any():
            self.failed_batches = 0
            return values
        self.failed_batches += 1
        if self.failed_batches >= self.max_failures:
            raise TrainingError(
                f"reward '{self.config.title}' scored nothing in {self.failed_batches} batches in a row, the "
                f"last time because of {reason}; mend it, then run the same command again"
            )
        return values

    def _call(self, pixels: Tensor, prompts: list[str], info: list[dict]) -> tuple[Tensor, str]:
        """The scores of the first call that does not raise, else NaN; and the reason if none of them is a number."""
        for attempt in range(1, 2 + self.retries):
            try:
                values = self.reward(pixels, prompts, info)
            except ConfigError:  # no retry will help
                raise
            except Exception as error:  # a reward may be anybody's code
                self.tally.failures += 1
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                attempts = f"attempt {attempt} of {1 + self.retries}"
                logger.warning("reward '%s' failed, %s (%s)", self.config.title, attempts, reason)
                continue
            if not isinstance(values, Tensor) or values.shape != (len(pixels),):
                got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise ConfigError(
                    f"reward '{self.config.title}' returned {got} for {len(pixels)} images; it must return "
                    f"a tensor of shape ({len(pixels)},)"
                )
            return values.float().cpu(), "NaN scores"
        return torch.full((len(pixels),), math.nan), reason

    def _move(self, device: torch.device | str) -> None:
        if isinstance(self.reward, torch.nn.Module):
            try:
                self.reward.to(device)
            except (RuntimeError, AssertionError) as error:
                reason = " ".join(str(error).split())[:200]
                raise ConfigError(
                    f"reward '{self.config.title}': its weights cannot go to device '{device}' ({reason}); "
                    "choose another device, or offload: true for the rewards"
                ) from error


@contextmanager
def _exact(device: torch.device) -> Iterator[None]:
    """Float32 means float32: no autocast, no TF32. The detector finds next to nothing in less."""
    precision, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = cudnn
