"""A distillation stage of tiny models, batches for it, and the engine's loop without the engine."""

import copy
from dataclasses import replace
from functools import partial

import torch
from torch.nn.utils import clip_grad_norm_

from nitro_e.config import from_dict
from nitro_e.interfaces import TextEmbedding
from nitro_e.model import EMMDiT, ModelConfig
from nitro_e.randomness import SampleRandom
from nitro_e.stages.distill import Distill, DistillConfig
from nitro_e.stages.distill.heads import Backbone
from nitro_e.stages.distill.inputs import DistillBatch
from nitro_e.training.optim import build_optimizers, set_learning_rate

TINY = ModelConfig(
    latent_channels=4,
    text_width=8,
    width=64,
    heads=2,
    groups=(1, 2, 1),
    base_grid=16,
    attention=("full",),
    gate_init="one",
)
SHAPE = (4, 16, 16)
SMALLER = ModelConfig(
    latent_channels=4,
    text_width=8,
    width=32,
    heads=2,
    groups=(1, 2, 1),
    base_grid=8,
    attention=("full",),
    gate_init="one",
)


def tiny_model(seed=0, config=TINY):
    torch.manual_seed(seed)
    model = EMMDiT(config)
    torch.nn.init.normal_(model.out.weight, std=0.05)  # an untrained one predicts zero
    return model


def random_text(count, seed=0, length=16, width=8):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(length)[None] < torch.randint(2, length, (count, 1), generator=generator)
    return TextEmbedding(torch.randn(count, length, width, generator=generator), mask)


def random_batch(step=0, count=8, shape=SHAPE, prompts=None, **options):
    generator = torch.Generator().manual_seed(1000 + step)
    latents, noise = torch.randn(2, count, *shape, generator=generator)
    prompts = prompts or [f"prompt {step} {number}" for number in range(count)]
    return DistillBatch(step, latents, noise, random_text(count, step), prompts, prompts, **options)


def distill_config(preset, **overrides):
    return from_dict(DistillConfig, {"preset": preset, "teacher": "a folder", **overrides})


def tiny_stage(config, seed=0, model=None, policy=1):
    """The stage with phases that are ready to run."""
    teacher = model or tiny_model()
    if policy == 1:
        student = copy.deepcopy(teacher).requires_grad_(True)
    else:
        student = EMMDiT(replace(teacher.config, policy=policy))
        student.adopt(teacher)
    stage = Distill(
        config,
        student,
        teacher.requires_grad_(False),
        partial(Backbone, teacher),
        random_text(1, 99),
        seed,
        torch.device("cpu"),
    )
    for phase in stage.phases:
        phase.net = phase.module
    return stage


class Loop:
    """The engine's loop over a stage's phases, on one process."""

    def __init__(self, stage, steps):
        self.stage, self.steps = stage, steps
        self.optimizers = [build_optimizers(phase.module, phase.optim) for phase in stage.phases]

    def step(self, batch):
        """One step of every phase that is due; the logs."""
        logs = {}
        due = [
            (phase, optimizers, number)
            for phase, optimizers in zip(self.stage.phases, self.optimizers)
            if phase.due(batch.step)
            for number in range(phase.repeat)
        ]
        for phase, optimizers, number in due:
            updates = phase.updates(batch.step) + number
            set_learning_rate(optimizers, phase.optim.factor(updates, phase.updates(self.steps)))
            rng = SampleRandom(0, phase.name, batch.step, number, first=0, count=len(batch.prompts))
            loss, parts = phase.loss(phase.net, batch, rng)
            loss.backward()
            clip_grad_norm_(phase.module.parameters(), phase.optim.clip)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if phase.after_step is not None:
                phase.after_step(optimizers)
            logs |= {
                f"{phase.name}/{name}": value for name, value in {"loss": loss.detach(), **parts}.items()
            }
        return logs
