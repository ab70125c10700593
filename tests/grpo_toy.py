"""A toy world for the GRPO stage: 32 numbers per image, prompts are one-hot, a reward of patterns of signs.

Run as a script it trains in this process, or in each process of torchrun, one run after another:
    python grpo_toy.py '{"RUN": {"steps": 6, "stage": {...}}, ...}'
"""

import contextlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from nitro_e.cli import common as cli
from nitro_e.config import from_dict
from nitro_e.data.prompts import Prompt
from nitro_e.interfaces import TextEmbedding
from nitro_e.model import EMMDiT, ModelConfig
from nitro_e.rewards import build_rewards, reward
from nitro_e.sampling import flow
from nitro_e.stages.grpo import GRPO, GRPOConfig
from nitro_e.training.engine import EMAConfig, Engine, EngineConfig, make_accelerator

DIM, PROMPTS = 32, 4
POOL = [Prompt(f"prompt {index}", {"pattern": index}) for index in range(PROMPTS)]


LORA = {"adapter": {"rank": 2, "alpha": 4.0}}


@dataclass(frozen=True)
class NetConfig:
    width: int = 96
    layers: int = 2


class Net(nn.Module):
    """An MLP of x, t and the prompt's code."""

    def __init__(self, config=NetConfig()):
        super().__init__()
        self.config = config
        sizes = [DIM + 6 + PROMPTS, *[config.width] * config.layers]
        layers = [nn.Sequential(nn.Linear(a, b), nn.SiLU()) for a, b in zip(sizes, sizes[1:])]
        self.body, self.out = nn.Sequential(*layers), nn.Linear(config.width, DIM)

    def forward(self, x, t, text):
        angles = t[:, None] * torch.tensor([1.0, 3.0, 9.0])
        features = torch.cat([x.flatten(1), angles.sin(), angles.cos(), text.tokens[:, 0]], dim=1)
        return self.out(self.body(features)).view_as(x)


def make_emmdit() -> EMMDiT:
    """What an adapter can be put on: two blocks, on latents of one place."""
    torch.manual_seed(0)
    model = EMMDiT(
        ModelConfig(
            latent_channels=DIM,
            text_width=PROMPTS,
            width=16,
            heads=1,
            groups=(0, 0, 2),
            base_grid=1,
            compression=(),
            attention=("full",),
            position_reinforcement=False,
            gate_init="one",
        )
    )
    nn.init.normal_(model.out.weight, std=0.2)
    return model


@torch.no_grad()
def stir(model: nn.Module) -> None:
    """Give every B of an adapter values, as training would: where they are zero no A has a gradient."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


class OneHot:
    width, length = PROMPTS, 1

    def encode(self, prompts):
        codes = torch.zeros(len(prompts), 1, PROMPTS)
        for row, prompt in enumerate(prompts):
            if prompt:
                codes[row, 0, int(prompt.split()[1])] = 1
        return TextEmbedding(codes, torch.ones(len(prompts), 1, dtype=torch.bool))


class Identity:
    """Latents are pixels."""

    channels, stride = DIM, 1

    def decode(self, latents):
        return (latents / 4).clamp(-1, 1)


def patterns():
    return torch.randn(PROMPTS, DIM, generator=torch.Generator().manual_seed(7)).sign()


@reward
def signs(pixels, prompts, info):
    """Share of the numbers whose sign is the pattern's."""
    wanted = patterns()[[record["pattern"] for record in info]]
    return (pixels.flatten(1).sign() == wanted).float().mean(dim=1)


@reward
def brightness(pixels, prompts, info):
    return pixels.flatten(1).mean(dim=1)


@reward
def moody(pixels, prompts, info):
    """Cannot score images whose first number is negative."""
    return torch.where(pixels.flatten(1)[:, 0] < 0, torch.nan, pixels.flatten(1).mean(dim=1))


@reward(needs_info=True)
def counted(pixels, prompts, info):
    """Brightness, of prompts with metadata."""
    return pixels.flatten(1).mean(dim=1)


@reward
def constant(pixels, prompts, info):
    return torch.full((len(pixels),), 0.5)


@reward
def broken(pixels, prompts, info):
    raise RuntimeError("the reward server is down")


DEFAULTS = {
    "kind": "grpo",
    "prompts": "shapes-train",
    "rewards": [{"name": "grpo_toy:signs", "label": "signs"}],
    "groups": 4,
    "group_size": 8,
    "updates": 2,
    "adapter": None,
    "rollout": {"steps": 10, "guidance_scale": 2.0, "window": {"size": 3}},
    "optim": {"lr": 1e-3, "warmup": 0, "weight_decay": 0.0, "eps": 1e-10},
}


def merged(a, b):
    """Nested dicts, b's values first."""
    both = {
        key: merged(a[key], b[key]) if isinstance(a[key], dict) and isinstance(b[key], dict) else b[key]
        for key in a.keys() & b.keys()
    }
    return {**a, **b, **both}


def make_config(**options) -> GRPOConfig:
    return from_dict(GRPOConfig, merged(DEFAULTS, options))


def make_net(seed=0, config=NetConfig()) -> Net:
    torch.manual_seed(seed)
    return Net(config)


class ToyGRPO(GRPO):
    """What is published must be an EMMDiT; nobody looks at it here."""

    def export(self, model):
        from test_engine import MICRO

        from nitro_e.model import EMMDiT

        with torch.random.fork_rng():
            torch.manual_seed(0)
            return EMMDiT(MICRO)


def make_stage(
    net=None,
    world=1,
    accumulate=1,
    seed=0,
    max_failures=3,
    cls=ToyGRPO,
    shapes=((DIM, 1, 1),),
    autocast=contextlib.nullcontext,
    vision=None,
    **options,
):
    config = make_config(**options)
    net = net or (make_net() if config.adapter is None else make_emmdit())
    stage = cls(
        config,
        net,
        POOL,
        build_rewards(config.rewards, "cpu", retries=0, max_failures=max_failures),
        Identity(),
        OneHot(),
        latent_shapes=shapes,
        seed=seed,
        layout=config.layout(world, accumulate),
        device=torch.device("cpu"),
        autocast=autocast,
        forward_flops=1.0,
        vision=vision,
    )
    stir(stage.model)
    return stage


def pretrain(seed: int, steps: int = 800, net: Net | None = None, centres=None) -> Net:
    """Flow matching towards noisy patterns of another seed's signs: a base that is at chance with the reward."""
    net = net or make_net(seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    centres = torch.randn(PROMPTS, DIM, generator=generator) if centres is None else centres
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for _ in range(steps):
        prompt = torch.randint(PROMPTS, (128,), generator=generator)
        data = (0.3 * centres[prompt] + 0.4 * torch.randn(128, DIM, generator=generator))[..., None, None]
        noise, t = torch.randn(data.shape, generator=generator), torch.rand(128, generator=generator)
        codes = nn.functional.one_hot(prompt, PROMPTS).float()[:, None]
        codes[torch.rand(128, generator=generator) < 0.1] = 0
        text = TextEmbedding(codes, torch.ones(128, 1, dtype=torch.bool))
        target = flow.velocity_target(data, noise)
        loss = (net(flow.interpolate(data, noise, t), t, text) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def train(
    run: Path,
    stage_options: dict,
    net=None,
    stop=None,
    seed=1,
    cls=ToyGRPO,
    accumulate=1,
    hooks=lambda stage: (),
    selection=None,
    **options,
) -> Engine:
    options = {
        "steps": 8,
        "save_every": 4,
        "log_every": 1,
        "precision": "float32",
        "tracker": "none",
        **options,
    }
    config = EngineConfig(**{"ema": EMAConfig(beta=0.9), **options})
    accelerator = make_accelerator(config)
    if accelerator.is_main_process:
        run.mkdir(exist_ok=True, parents=True)
    accelerator.wait_for_everyone()
    stage = make_stage(
        net,
        accelerator.num_processes,
        accumulate,
        seed,
        cls=cls,
        autocast=accelerator.autocast,
        **stage_options,
    )
    trainer = Engine(
        config,
        stage,
        accelerator,
        run=run,
        seed=seed,
        use={},
        record={},
        accumulate=accumulate,
        hooks=hooks(stage),
        selection=selection,
    )
    if stop is not None:  # as if SIGTERM came during step `stop`
        original = trainer.update

        def update(*arguments):
            trainer.stop.requested = trainer.step + 1 >= stop
            return original(*arguments)

        trainer.update = update
    trainer.run()
    return trainer


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ.setdefault("WANDB_MODE", "disabled")
    sys.modules["grpo_toy"] = sys.modules["__main__"]
    runs = json.loads(sys.argv[1])
    cli.leave(
        cli.run(lambda: [train(Path(run), given.pop("stage", {}), **given) for run, given in runs.items()])
    )
