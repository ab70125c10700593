"""What a step of each preset costs, counted by torch's own counter, is what docs/distill.md says."""

import re
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import pytest
import torch
from distill_tools import TINY, Loop, distill_config, random_batch, random_text, tiny_model, tiny_stage
from torch.utils.flop_counter import FlopCounterMode

from nitro_e.stages.distill.presets import PRESETS

DOCS = Path(__file__).parent.parent / "docs/distill.md"
SHAPE = (4, 8, 8)  # few tokens of some width: products of attention are next to nothing
MODEL = replace(TINY, base_grid=8, width=128, groups=(1, 1, 1))
LATE = 6000  # by then all terms have begun
SMALL = {"rank": 1, "targets": "blocks"}


def documented() -> dict[str, float]:
    """Read {preset: passes} from the table below 'Costs at full size'."""
    section = DOCS.read_text().split("## Costs at full size")[1].split("\n## ")[0]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")]
    return {name: float(passes) for names, passes in rows for name in re.findall(r"`(\w+)`", names)}


def small(preset: str) -> dict:
    """Heads and adapters of next to no size, no rollouts: the passes of the network are counted."""
    values, overrides = PRESETS[preset], {}
    if "adversarial" in values:
        size = "pool" if values["adversarial"].get("pool") else "heads"
        shrunk = {**values["adversarial"].get(size, {}), "width": 4}
        overrides["adversarial"] = {**values["adversarial"], size: shrunk}
    if "adapter" in values.get("score", {}).get("fake", {}):
        overrides["score"] = {**values["score"], "fake": {**values["score"]["fake"], "adapter": SMALL}}
    if preset == "dmdr":
        overrides |= {"reward": {**values["reward"], "rewards": ["shapes"]}, "adapter": SMALL}
    if preset == "ladd4":
        overrides["inputs"] = {**values["inputs"], "rollout": None}
    return overrides


def counted(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@lru_cache
def a_pass() -> int:
    model, text = tiny_model(config=MODEL), random_text(4)
    return counted(lambda: model(torch.randn(4, *SHAPE), torch.rand(4), text))


@pytest.mark.parametrize("preset", PRESETS)
def test_passes_of_a_step(preset):
    teacher = tiny_model(config=replace(MODEL, interval=preset == "mean_flow"))
    config = distill_config(preset, **small(preset))
    stage = tiny_stage(config, model=teacher, policy=10 if preset == "pi_flow" else 1)
    stage.shared.judge = lambda latents, prompts, info: latents.mean((1, 2, 3))
    loop = Loop(stage, 2 * LATE)
    # everything is due at LATE, and nothing that is not always due at the step after it
    batches = [random_batch(step, count=4, shape=SHAPE) for step in (LATE, LATE + 1)]
    due, others = (counted(partial(loop.step, batch)) for batch in batches)
    r1 = config.adversarial.r1 if config.adversarial else None
    period = max(config.every, r1.every if r1 else 1)
    passes = (due + (period - 1) * others) / period / a_pass()
    assert passes == pytest.approx(documented()[preset], abs=0.25)
