"""Stage 4: a student that needs few steps, from a teacher that needs many. Each known method is a preset.

Every step runs the phases that the objectives bring (the discriminator's heads, the fake score) and then the student, if
it is due, on one forward pass of the student (Sauer et al., arXiv 2403.12015; order of phases as there). The student's
sigmas are part of the weights: they are stored with them and used as they are by every sampler.

To add an objective: a config class, a class of the form `objective.Objective`, a field of DistillConfig, and a line in
OBJECTIVES. Left out: FSDP (the 304M model does not need it) and fp16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from nitro_e.config import Config, ConfigError, Ge, Gt, Lt
from nitro_e.data.prompts import PromptsConfig
from nitro_e.interfaces import Model, Phase, TextEmbedding
from nitro_e.randomness import SampleRandom
from nitro_e.sampling.samplers import SAMPLER_ALIASES, SamplingConfig, scale_time
from nitro_e.stages.adapter import AdapterConfig, add_adapter, dense, has_adapter, save_adapter
from nitro_e.stages.distill import guards
from nitro_e.stages.distill.adversarial import Adversarial, AdversarialConfig
from nitro_e.stages.distill.flow_map import FlowMap, FlowMapConfig
from nitro_e.stages.distill.guards import GuardConfig, describe_prediction
from nitro_e.stages.distill.heads import Backbone
from nitro_e.stages.distill.imitate import Imitate, ImitateConfig
from nitro_e.stages.distill.inputs import DistillBatch, InputConfig, Prediction, Predictor, Sampler
from nitro_e.stages.distill.objective import Balance, Objective, Shared
from nitro_e.stages.distill.presets import PRESETS
from nitro_e.stages.distill.regression import Diffusion, DiffusionConfig, Reflow, ReflowConfig
from nitro_e.stages.distill.reward import Judge, PolicyGradientConfig, Reward
from nitro_e.stages.distill.score import Score, ScoreConfig
from nitro_e.stages.distill.sources import Source
from nitro_e.training.optim import OptimConfig
from nitro_e.training.parallel import sum_over_processes

OBJECTIVES: dict[str, Callable[[Any, Shared], Objective]] = {  # fields of DistillConfig
    "diffusion": Diffusion,
    "reflow": Reflow,
    "score": Score,
    "imitate": Imitate,
    "flow_map": FlowMap,
    "reward": Reward,
    "adversarial": Adversarial,
}
MEASUREMENTS = 16  # steps of the student over which the weight `auto` is measured


@dataclass(frozen=True, kw_only=True)
class DistillConfig(Config):
    PRESETS: ClassVar[dict[str, dict]] = PRESETS
    ALIASES: ClassVar[Mapping[str, Mapping[str, str]]] = SAMPLER_ALIASES

    kind: Literal["distill"] = "distill"  # stage 4
    teacher: str  # run, checkpoint or model folder; the student starts from it too, unless init_from names other weights
    # the noisy samples that the student is trained on
    inputs: InputConfig = field(default_factory=InputConfig)
    sampler: Sampler = "euler"  # how the student will be sampled
    time_scale: Annotated[float, Gt(0)] = 1.0  # the student's input is time_scale * t
    # numbers of steps to be offered; empty: those whose times are among the sigmas
    sample_steps: tuple[Annotated[int, Ge(1)], ...] = ()
    diffusion: DiffusionConfig | None = None
    reflow: ReflowConfig | None = None  # flow matching on stored pairs; null: off
    adversarial: AdversarialConfig | None = None  # discriminator heads on the teacher's features; null: off
    score: ScoreConfig | None = None  # distribution matching with a fake score; null: off
    imitate: ImitateConfig | None = None  # the teacher's velocity on the student's own states; null: off
    flow_map: FlowMapConfig | None = None  # the teacher's path in one jump (consistency, MeanFlow); null: off
    reward: PolicyGradientConfig | None = None  # the policy gradient of rewards (stage 3's); null: off
    # prompts alone instead of pairs, for objectives that need no images; leave `data` out then
    prompts: PromptsConfig | None = None
    # with prompts: sizes of the images, HEIGHTxWIDTH in pixels, of which a step has one; empty: the square of the recipe
    buckets: tuple[str, ...] = ()
    guards: GuardConfig | None = field(default_factory=GuardConfig)
    heldout: Annotated[float, Ge(0), Lt(1)] = (
        0.02  # share of the prompts that are monitored and never trained on
    )
    # steps from one in which the student learns to the next; networks beside it (heads, fake score) learn in all
    every: Annotated[int, Ge(1)] = 1
    start: Annotated[int, Ge(0)] = 0  # the first step in which the student learns
    adapter: AdapterConfig | None = None  # LoRA on the student; null: all its weights are trained
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

        if self.buckets and not self.prompts:
            raise ConfigError("buckets: stored pairs have their sizes; name them in data.buckets")
        if self.prompts and self.needs_pairs:
            raise ConfigError(
                f"prompts: {', '.join(self.needs_pairs)} read images of the teacher; give data, or leave them out"
            )
        if inputs.intervals is not None and self.flow_map is not None and self.flow_map.times is not None:
            raise ConfigError(
                "flow_map.times: only maps down to 0 are trained at images of their own; leave it or inputs.intervals out"
            )
        if inputs.intervals is not None:
            others = [name for name in OBJECTIVES if name != "flow_map" and getattr(self, name)]
            if self.flow_map is None or self.flow_map.kind == "discrete" or others or self.guards:
                raise ConfigError(
                    "inputs.intervals: average velocities predict no data; only flow_map of kind 'continuous' can be trained"
                )
        if inputs.noise == "chain" and diffusion and diffusion.target == "pair":
            raise ConfigError(
                "diffusion.target 'pair': the chains of inputs.noise begin with new noise, which no image belongs to; set "
                "target: teacher"
            )
        if inputs.noise == "chain" and self.sample_steps:
            raise ConfigError("sample_steps: inputs.counts says the steps of chains; leave it out")
        if self.reward and (inputs.noise != "chain" or self.sampler != "multistep" or inputs.group == 1):
            raise ConfigError(
                "reward compares images of one prompt that the sampler's noise tells apart: it needs inputs: {noise: chain, "
                "group: 2} or more, and sampler: multistep"
            )
        if inputs.noise != "chain":
            if self.imitate:
                raise ConfigError("imitate follows the student's own states: it needs inputs.noise: chain")
            if self.score and self.score.needs_chains:
                raise ConfigError(
                    f"{', '.join(self.score.needs_chains)}: the steps that are meant are those of inputs.noise: chain"
                )
        if (
            adversarial
            and adversarial.share_score
            and (self.score is None or self.score.form in ("sid", "sim"))
        ):
            raise ConfigError(
                "adversarial.share_score: there is no score of form 'dmd' or 'vsd' to share with"
            )
        if self.score and self.score.divergence != "reverse_kl":
            if adversarial is None or not adversarial.share_score or adversarial.loss != "non_saturating":
                raise ConfigError(
                    f"score.divergence '{self.score.divergence}' reads density ratios: it needs adversarial: "
                    "{loss: non_saturating, share_score: true}"
                )
        if self.sampler == "policy":
            others = [name for name in OBJECTIVES if name != "imitate" and getattr(self, name)]
            others += ["adapter"] if self.adapter else []  # it would leave the last layer as it is
            if others or self.imitate is None:
                wrong = f"leave out {', '.join(others)}" if others else "set imitate"
                raise ConfigError(
                    f"sampler 'policy': only imitate trains the several predictions of a step; {wrong}"
                )
        if self.score and self.score.noise == "trajectory" and self.sampler != "euler":
            raise ConfigError(
                f"score.noise 'trajectory' is Euler's, but stage.sampler is '{self.sampler}'; set noise: fresh"
            )

    @property
    def needs_pairs(self) -> list[str]:
        """List the keys of everything that reads images of the teacher."""
        reads = {
            "inputs.noise": self.inputs.noise != "chain",
            "diffusion": self.diffusion is not None and self.diffusion.target == "pair",
            "reflow": self.reflow is not None,
            "flow_map.times": self.flow_map is not None and self.flow_map.times is not None,
            "adversarial": self.adversarial is not None,
            "guards": self.guards is not None,
        }
        return [name for name, needed in reads.items() if needed]

    @property
    def schedules(self) -> tuple[tuple[float, ...], ...]:
        """The falling times of every number of steps on offer; none for a student of all times (reflow)."""
        sigmas, continuous = self.inputs.sigmas, self.inputs.continuous_times
        if continuous is not None and continuous.share == 1 and not self.sample_steps:
            return ()
        size = len(sigmas)
        counts = self.sample_steps or sorted(self.inputs.chain_counts)
        counts = counts or [count for count in range(1, size + 1) if size % count == 0]
        return tuple(
            self.inputs.times_of(count)
            if size % count == 0
            else tuple(1 - step / count for step in range(count))
            for count in counts
        )

    def sampling(self, config: SamplingConfig) -> SamplingConfig:
        """Add what the student was trained for to the sampling settings; refuse settings that differ from it."""
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
        self.ratios: Tensor  # of Distill.balance
        self.register_buffer("ratios", torch.full((MEASUREMENTS,), float("nan")))
        self.alarms: Tensor  # of guards.check
        self.register_buffer("alarms", torch.zeros(len(guards.NAMES), dtype=torch.int64))

    def forward(self, x: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
        return scale_time(self.model, self.time_scale)(x, t, text).float()


class Term(NamedTuple):
    """One objective in one step."""

    objective: Objective
    weight: float
    value: Tensor
    slope: Tensor  # (B, C, h, w), its gradient at the x0 prediction


class Distill:
    """The phases of the objectives and then the student's, without data of its own."""

    name = "distill"

    def __init__(
        self,
        config: DistillConfig,
        student: nn.Module,
        teacher: nn.Module,
        backbone: Callable[..., Backbone],
        null_text: TextEmbedding,
        seed: int,
        device: torch.device,
        judge: Judge | None = None,
    ) -> None:
        """student: trained in place; teacher: frozen; backbone(taps): the teacher's features for the discriminator."""
        if config.adapter is not None:
            assert isinstance(student, Model), "LoRA needs a model that names its layers"
            add_adapter(student, config.adapter, seed)
        self.config, self.model, self.device = config, student, device
        self.student = Student(student, config.time_scale).to(device)
        self.predictor = Predictor(config.inputs, config.sampler, seed)
        self.generator = Phase(
            "student", self.student, self.loss, config.optim, every=config.every, start=config.start
        )
        self.shared = Shared(
            teacher,
            backbone,
            null_text,
            self.predict,
            self.velocity,
            partial(Student.forward, self.student),  # accelerate puts autocast into `forward` of the instance
            config.heldout,
            seed,
            device,
            judge,
        )
        self.objectives: list[Objective] = [
            build(getattr(config, name), self.shared)
            for name, build in OBJECTIVES.items()
            if getattr(config, name)
        ]
        self.checked_step = -1  # the last step that guards have looked at
        self.phases = (
            *(phase for objective in self.objectives for phase in objective.phases),
            self.generator,
        )

    def predict(self, batch: DistillBatch, rng: SampleRandom, last: bool = False) -> Prediction:
        """Predict x0 with the student, once per step."""
        return self.predictor(self.velocity, batch, rng, last, self.generator.due(batch.step))

    def velocity(self, x: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
        """Run the student as the engine has wrapped it."""
        assert self.generator.net is not None, "the engine sets it before the first step"
        return self.generator.net(x, t, text)

    # ---- the student's loss

    def loss(
        self, net: nn.Module, batch: DistillBatch, rng: SampleRandom
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Add up the weighted objectives.

        Their gradients are taken at the x0 prediction, one by one, which balances and reports them at no cost, and
        frees their graphs before the student's own backward pass: d loss / d weights = sum of slopes * d data / d weights.
        """
        prediction = self.predict(batch, rng, last=True)
        keep, logs = (
            self.shared.training(batch),
            describe_prediction(prediction, batch, self.predictor.times[:-1]),
        )
        leaf = replace(prediction, data=prediction.data.detach().requires_grad_())
        terms: dict[str, Term] = {}
        total = torch.zeros((), device=leaf.data.device)
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
            terms[objective.name] = Term(objective, weight, value.detach(), slope)
        slope = torch.zeros_like(leaf.data)
        for name, scaled, term in self.balance(terms, batch.step):
            logs |= {f"{name}_weight": torch.as_tensor(scaled).float(), f"{name}_slope": term.slope.norm()}
            total, slope = total + scaled * term.value, slope + scaled * term.slope
        # with the first micro-batch of a step
        if self.config.guards is not None and batch.step != self.checked_step:
            self.checked_step = batch.step
            guards.check(self.config.guards, self.student.alarms, prediction, batch, self.config.every)
        through = (slope.detach() * prediction.data).sum()
        return total + through - through.detach(), logs

    def measurement(self, balance: Balance, step: int) -> int:
        """Number a step of the student, so that 0 to MEASUREMENTS - 1 are those before the objective begins.

        Where the student has fewer steps before, they are its first ones.
        """
        first = max(balance.start - MEASUREMENTS * self.config.every, 0)
        return self.generator.updates(step) - self.generator.updates(first)

    def measures(self, objective: Objective, step: int) -> bool:
        """Tell whether the weight `auto` of an objective is being measured."""
        return objective.balance is not None and 0 <= self.measurement(objective.balance, step) < MEASUREMENTS

    def balance(self, terms: dict[str, Term], step: int) -> Iterator[tuple[str, float | Tensor, Term]]:
        """Yield (name, weight, term) of every term; a balanced one is scaled to the slopes of the others.

        The scale is the median over MEASUREMENTS steps of the student and over all processes, and stays afterwards.
        """
        others = [term.weight * term.slope for term in terms.values() if term.objective.balance is None]
        for name, term in terms.items():
            balance, weight = term.objective.balance, term.weight
            if balance is None:
                yield name, weight, term
                continue
            if others and self.measures(term.objective, step):
                total = sum(others[1:], others[0])
                squares = torch.stack([total.square().sum(), term.slope.square().sum()]).double()
                there, here = sum_over_processes(squares).sqrt()
                place = self.measurement(balance, step)
                self.student.ratios[place] = (there / here.clamp(min=1e-20)).float()
            median = self.student.ratios.nanmedian()
            scale = torch.where(median.isnan(), torch.full_like(median, balance.fallback), median)
            yield name, weight * scale, term

    def export(self, model: Any) -> nn.Module:
        return dense(model) if has_adapter(model) else model

    def notes(self) -> dict[str, Any]:
        """Count what is trained beside the student, for the run's record."""
        beside = [phase.module for phase in self.phases if phase is not self.generator]
        weights = [weight for module in beside for weight in module.parameters() if weight.requires_grad]
        return {"trained_beside": sum(weight.numel() for weight in weights)}

    def write_extras(self, model: Model, folder: Path) -> None:
        """Write the adapter beside the merged weights, as a PEFT folder under the released names."""
        if has_adapter(model):
            save_adapter(model, folder / "adapter")


class DistillRun(Distill):
    """The stage with its batches, for the engine."""

    def __init__(
        self,
        config: DistillConfig,
        model: nn.Module,
        teacher: Model,
        source: Source,
        seed: int,
        device: torch.device,
        forward_flops: float,
        identity: str,
        judge: Judge | None = None,
    ) -> None:
        """identity: a hash of the teacher's weights; a resume with another teacher is refused."""
        self.source, self.batch_size, self.forward_flops = source, source.batch_size, forward_flops
        self.fingerprint = {**source.fingerprint, "teacher": identity}
        backbone = partial(Backbone, teacher)
        super().__init__(config, model, teacher, backbone, source.null_text, seed, device, judge)

    @property
    def bad_samples(self) -> int:
        return self.source.bad_samples

    def batches(self, step: int, rank: int, world: int, accumulate: int) -> Iterator[DistillBatch]:
        return self.source.batches(step, rank, world, accumulate)
