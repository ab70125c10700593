"""Stage 4: a student that needs few steps, from a teacher that needs many. Each known method is a preset.

Every step runs the phases that the objectives bring (the discriminator's heads) and then the student, on one forward
pass of the student (Sauer et al., arXiv 2403.12015; order of phases as there). The student's sigmas are part of the
weights: they are stored with them and used as they are by every sampler.

To add an objective (DMD, SiD, flow maps, ...): a config class, a class of the form `objective.Objective`, a field of
DistillConfig, and a line in OBJECTIVES. Left out: FSDP (the 304M model does not need it) and fp16.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from nitro_e.config import Config, ConfigError, Ge, Gt, Lt
from nitro_e.data import Data, Records
from nitro_e.interfaces import Denoiser, LatentCodec, Phase, TextEmbedding, TextEncoder
from nitro_e.randomness import SlotRandom
from nitro_e.sampling.samplers import SamplingConfig, scale_time
from nitro_e.stages.batches import encode, null_prompt, to_device
from nitro_e.stages.distill import guards
from nitro_e.stages.distill.adversarial import Adversarial, AdversarialConfig
from nitro_e.stages.distill.guards import (
    GuardConfig,
    describe_draft,
)
from nitro_e.stages.distill.heads import Backbone
from nitro_e.stages.distill.inputs import (
    DistillBatch,
    Draft,
    Drafts,
    InputConfig,
    Sampler,
)
from nitro_e.stages.distill.objective import Objective, Shared
from nitro_e.stages.distill.presets import PRESETS
from nitro_e.stages.distill.regression import (
    Diffusion,
    DiffusionConfig,
    Reflow,
    ReflowConfig,
)
from nitro_e.training.optim import OptimConfig
from nitro_e.training.parallel import sum_over_processes

OBJECTIVES: dict[str, Callable[[Any, Shared], Objective]] = {  # fields of DistillConfig
    "diffusion": Diffusion,
    "reflow": Reflow,
    "adversarial": Adversarial,
}
MEASUREMENTS = 16  # steps over which the weight `auto` is measured


@dataclass(frozen=True, kw_only=True)
class DistillConfig(Config):
    PRESETS: ClassVar[dict[str, dict]] = PRESETS

    kind: Literal["distill"] = "distill"
    teacher: str  # run, checkpoint or model folder; the student starts from it too, unless init_from names other weights
    inputs: InputConfig = field(default_factory=InputConfig)
    sampler: Sampler = "euler"
    time_scale: Annotated[float, Gt(0)] = 1.0  # the student is told time_scale * t
    # numbers of steps to be offered; empty: those whose times are among the sigmas
    sample_steps: tuple[Annotated[int, Ge(1)], ...] = ()
    diffusion: DiffusionConfig | None = None
    reflow: ReflowConfig | None = None
    adversarial: AdversarialConfig | None = None
    guards: GuardConfig | None = field(default_factory=GuardConfig)
    heldout: Annotated[float, Ge(0), Lt(1)] = 0.02  # share of the prompts that is only watched
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            lr=1e-5, betas=(0.0, 0.99), eps=1e-8, weight_decay=0.0, warmup=500, decay=0.2, clip=1.0
        )
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not any(getattr(self, name) for name in OBJECTIVES):
            raise ConfigError(f"nothing to learn from: set one of {', '.join(OBJECTIVES)}, or a preset")
        self.inputs.check_sampler(self.sampler)
        self._check_objectives()
        sigmas = len(self.inputs.sigmas)
        wrong = [count for count in self.sample_steps if sigmas > 1 and sigmas % count]
        if wrong:
            raise ConfigError(
                f"sample_steps: {wrong[0]} steps are not evenly spaced among the {sigmas} sigmas"
            )

    def _check_objectives(self) -> None:
        inputs, diffusion, adversarial = self.inputs, self.diffusion, self.adversarial
        if self.reflow and (inputs.noise != "pair" or inputs.rollout):
            raise ConfigError(
                "reflow is flow matching on the pairs: it needs inputs.noise: pair and no rollout"
            )
        if diffusion and diffusion.space == "velocity" and diffusion.on_rollout and inputs.rollout:
            raise ConfigError(
                "diffusion.space 'velocity' divides by t what a rollout has drifted; set diffusion.on_rollout: false"
            )
        if adversarial and adversarial.weight == "auto" and not (diffusion or self.reflow):
            raise ConfigError(
                "adversarial.weight 'auto' is measured against another objective, and there is none; set a number"
            )

    @property
    def schedules(self) -> tuple[tuple[float, ...], ...]:
        """The falling times of every number of steps on offer; none if the student knows all times (reflow)."""
        sigmas, anywhere = self.inputs.sigmas, self.inputs.anywhere
        if anywhere is not None and anywhere.share == 1:
            return ()
        size = len(sigmas)
        counts = self.sample_steps or [count for count in range(1, size + 1) if size % count == 0]
        return tuple(
            sigmas[:: size // count]
            if size % count == 0
            else tuple(1 - step / count for step in range(count))
            for count in counts
        )

    def sampling(self, config: SamplingConfig) -> SamplingConfig:
        """With what the student was trained for. Refuses settings that say otherwise."""
        if config.guidance_scale not in (0, 1):
            raise ConfigError(
                f"sampling.guidance_scale: {config.guidance_scale:g}, but a distilled model carries its guidance in it; "
                "set it to 1"
            )
        if config.sampler != self.sampler:
            raise ConfigError(
                f"sampling.sampler: '{config.sampler}', but stage.sampler is '{self.sampler}'; set them alike"
            )
        counts = [len(times) for times in self.schedules]
        if counts and config.steps not in counts:
            raise ConfigError(
                f"sampling.steps: {config.steps}, but the student is trained for {' or '.join(map(str, counts))}; set one "
                "of them"
            )
        if not counts:  # any number of equal steps; the released grid would waste its last one
            config = replace(config, grid="linear")
        return replace(config, sigmas=self.schedules, time_scale=self.time_scale)


class Student(nn.Module):
    """The model in training, and the numbers that a resume needs besides its weights."""

    def __init__(self, model: nn.Module, time_scale: float) -> None:
        super().__init__()
        self.model, self.time_scale = model, time_scale
        self.register_buffer("ratios", torch.full((MEASUREMENTS,), float("nan")))  # see Distill.balance
        self.register_buffer("alarms", torch.zeros(len(guards.NAMES), dtype=torch.int64))  # see guards.watch

    def forward(self, x: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
        return scale_time(self.model, self.time_scale)(x, t, text).float()


class Distill:
    """Batches of pairs; the phases of the objectives, then the student's."""

    name = "distill"

    def __init__(
        self, config: DistillConfig, student: nn.Module, teacher: Denoiser, backbone: Callable[..., Backbone],
        null_text: TextEmbedding, seed: int, device: torch.device,
    ) -> None:  # fmt: skip
        """student: trained in place; teacher: frozen; backbone(taps): the teacher as the discriminator sees it."""
        self.config, self.model, self.device = config, student, device
        self.student = Student(student, config.time_scale).to(device)
        self.drafts = Drafts(config.inputs, config.sampler, seed)
        answer = lambda x, t, text: self.generator.net(x, t, text)  # noqa: E731
        self.shared = Shared(teacher, backbone, null_text, self.draft, answer, config.heldout, seed, device)
        self.objectives: list[Objective] = [
            build(getattr(config, name), self.shared)
            for name, build in OBJECTIVES.items()
            if getattr(config, name)
        ]
        self.generator = Phase("student", self.student, self.loss, config.optim)
        self.watched = -1  # step
        self.phases = (
            *(phase for objective in self.objectives for phase in objective.phases),
            self.generator,
        )

    def draft(self, batch: DistillBatch, rng: SlotRandom, last: bool = False) -> Draft:
        """The student's answer to a batch, computed once per step."""
        return self.drafts(self.generator.net, batch, rng, last)

    # ---- the student's loss

    def loss(self, net: nn.Module, batch: DistillBatch, rng: SlotRandom) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted objectives.

        Their gradients are taken at the student's data, one by one, which balances and reports them at no cost, and
        frees what lies behind before the student's own backward pass: d loss / d weights = sum of slopes * d data / d weights.
        """
        draft = self.draft(batch, rng, last=True)
        keep, logs = self.shared.training(batch), describe_draft(draft, batch, self.drafts.times[:-1])
        leaf = replace(draft, data=draft.data.detach().requires_grad_())
        terms, total = {}, torch.zeros((), device=leaf.data.device)
        for objective in self.objectives:
            weight = objective.weight(batch.step)
            if weight == 0 and not self.measures(objective, batch.step):
                continue
            with torch.enable_grad():
                values, parts = objective.loss(leaf, batch, rng)  # (B,)
                value = (values * keep).mean()
            logs |= {f"{objective.name}_{name}": part for name, part in parts.items()}
            logs[objective.name] = value.detach()
            if objective.direct:
                total = total + weight * value
                continue
            (slope,) = torch.autograd.grad(value, leaf.data)
            terms[objective.name] = objective, weight, value.detach(), slope
        slope = torch.zeros_like(leaf.data)
        for name, weight, value, part in self.balance(terms, batch.step):
            logs |= {f"{name}_weight": torch.as_tensor(weight).float(), f"{name}_slope": part.norm()}
            total, slope = total + weight * value, slope + weight * part
        if self.config.guards is not None and batch.step != self.watched:  # the first micro-batch of a step
            self.watched = batch.step
            guards.watch(self.config.guards, self.student.alarms, draft, batch)
        through = (slope.detach() * draft.data).sum()
        return total + through - through.detach(), logs

    def measures(self, objective: Objective, step: int) -> bool:
        """Whether the weight `auto` of an objective is being measured: in the steps before it begins."""
        first = max(objective.start - MEASUREMENTS, 0) if objective.balanced else 0
        return objective.balanced and first <= step < first + MEASUREMENTS

    def balance(
        self, terms: dict[str, tuple[Objective, float, Tensor, Tensor]], step: int
    ) -> Iterator[tuple[str, float | Tensor, Tensor, Tensor]]:
        """(name, weight, value, slope) of every term; a balanced one is scaled to the slopes of the others.

        The scale is the median over MEASUREMENTS steps and over all processes, and stays as it is afterwards.
        """
        others = [weight * slope for objective, weight, _, slope in terms.values() if not objective.balanced]
        for name, (objective, weight, value, slope) in terms.items():
            if objective.balanced:
                if self.measures(objective, step) and others:
                    squares = torch.stack([sum(others).square().sum(), slope.square().sum()]).double()
                    there, here = sum_over_processes(squares).sqrt()
                    first = max(objective.start - MEASUREMENTS, 0)
                    self.student.ratios[step - first] = (there / here.clamp(min=1e-20)).float()
                median = self.student.ratios.nanmedian()
                weight = weight * torch.where(
                    median.isnan(), torch.full_like(median, objective.fallback), median
                )
            yield name, weight, value, slope

    def export(self, model: nn.Module) -> nn.Module:
        return model


class DistillRun(Distill):
    """The stage on stored pairs, for the engine."""

    def __init__(
        self, config: DistillConfig, model: nn.Module, teacher: nn.Module, data: Data, codec: LatentCodec,
        text: TextEncoder, seed: int, device: torch.device, forward_flops: float, identity: str,
    ) -> None:  # fmt: skip
        """identity: of the teacher's weights; a resume with another teacher is refused."""
        self.data, self.codec, self.text = data, codec, text
        self.batch_size, self.forward_flops = data.config.batch_size, forward_flops
        self.fingerprint = {**data.fingerprint(), "teacher": identity}
        null_text = null_prompt(data, text, device)
        super().__init__(config, model, teacher, partial(Backbone, teacher), null_text, seed, device)

    @property
    def bad_samples(self) -> int:
        return len(self.data.bad)

    def batches(self, step: int, rank: int, world: int, accumulate: int) -> Iterator[DistillBatch]:
        records = self.data.records(step, micro_batches_per_step=accumulate, rank=rank, world=world)
        with contextlib.closing(records):
            for number, record in enumerate(records):
                yield self.encode(record, step + number // accumulate, accumulate == 1)

    def encode(self, record: Records, step: int, alone: bool) -> DistillBatch:
        """Records on the CPU -> a batch on the device. The stored half-precision noise is what the teacher began with."""
        batch = encode(record, self.codec, self.text, self.device)
        noise = None
        if self.config.inputs.needs_noise:
            noise = to_device(record.extra["noise.npy"], self.device)
        return DistillBatch(step, batch.latents, noise, batch.text, batch.prompts, batch.keys, alone)
