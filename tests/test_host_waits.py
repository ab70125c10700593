"""No step of any stage makes the host wait for the device; a report does, once. Found without a GPU (host_waits.py)."""

from types import SimpleNamespace

import grpo_toy
import pytest
import torch
from distill_tools import SHAPE, distill_config, random_batch, random_text, tiny_model, tiny_stage
from host_waits import HostWaits
from test_engine import ToyStage

from nitro_e.config import from_dict
from nitro_e.interfaces import Batch
from nitro_e.randomness import SampleRandom
from nitro_e.stages.flow_matching import FlowMatching, FlowMatchingConfig
from nitro_e.training.ema import EMAConfig, PostHocEMAConfig
from nitro_e.training.engine import Engine, EngineConfig, make_accelerator
from nitro_e.training.optim import OptimConfig

STEPS, LOG_EVERY = 4, 2


def flow_matching(repa=True):
    """Stage 1, on one batch."""
    model, null = tiny_model(), random_text(1, 99)
    data = SimpleNamespace(
        config=SimpleNamespace(batch_size=2), fingerprint=dict, bad=(), null_text=lambda: null
    )
    config = from_dict(
        FlowMatchingConfig,
        {"repa": {"taps": [1], "width": 8}} if repa else {"guidance": {"scale": 3.0, "start": 0}},
    )
    vision = SimpleNamespace(width=6)
    stage = FlowMatching(config, model, data, None, None, vision, 0, torch.device("cpu"), 1.0, STEPS)
    batch = random_batch(0, 2)
    latents = Batch(
        batch.latents, batch.text, batch.prompts, batch.keys, torch.randn(2, SHAPE[1] * SHAPE[2], 6)
    )

    def batches(*_):
        while True:
            yield latents

    stage.batches = batches
    return stage


def distill(preset, **overrides):
    stage = tiny_stage(distill_config(preset, **overrides))
    stage.name, stage.batch_size, stage.forward_flops, stage.fingerprint = "distill", 4, 1.0, {}
    stage.bad_samples = 0

    def batches(step, *_):
        while True:
            yield random_batch(step, 4)
            step += 1

    stage.batches = batches
    return stage


def waits_of(stage, run, **options):
    """Train some steps; returns where the host would have waited. Rollouts, saving and hooks may wait."""
    run.mkdir()
    config = EngineConfig(
        steps=STEPS, log_every=LOG_EVERY, save_every=STEPS, sample_every=0, precision="float32", tracker="none",
        **options,
    )  # fmt: skip
    waits = HostWaits()
    engine = Engine(config, stage, make_accelerator(config), run=run, seed=1, use={}, record={})
    for phase in stage.phases:
        waits.put(phase.module)
    if engine.state.ema is not None:
        waits.put(engine.state.ema.ema_model)
        waits.put((engine.state.ema.step,))
    if engine.state.posthoc is not None:
        waits.put((engine.state.posthoc._step, engine.state.posthoc.averages))
    waits.put(getattr(stage, "null_text", None))
    waits.put(getattr(getattr(stage, "shared", None), "null_text", None))
    made = stage.batches

    def batches(*arguments):
        stream = made(*arguments)
        while True:
            yield waits.put(waits.pausing(next)(stream))

    stage.batches = batches
    drawn = SampleRandom._draw
    engine._save = waits.pausing(engine._save)
    engine.state.finish_averages = waits.pausing(engine.state.finish_averages)
    with pytest.MonkeyPatch.context() as patch, waits:
        patch.setattr(SampleRandom, "_draw", lambda self, *a: waits.put((drawn(self, *a),))[0])
        engine.run()
    return waits.found


AVERAGES = {"ema": EMAConfig(warmup_power=0.67), "posthoc_ema": PostHocEMAConfig(every=100)}


@pytest.mark.parametrize("repa", [True, False])
def test_stages_1_and_2_wait_once_per_report(tmp_path, repa):
    found = waits_of(flow_matching(repa), tmp_path / "run", **AVERAGES)
    assert len(found) == STEPS // LOG_EVERY, "\n".join(found)


def test_stage_3_waits_once_per_report_and_in_its_rollouts(tmp_path):
    found = waits_of(grpo_toy.make_stage(updates=4, **grpo_toy.LORA), tmp_path / "run", ema=EMAConfig())
    assert len(found) == STEPS // LOG_EVERY, "\n".join(found)


EVERYTHING = {"adversarial": {"start": 0, "misaligned": {"start": 0}}, "guards": {"start": 0}}


@pytest.mark.parametrize(("preset", "overrides"), [("ladd_guided", EVERYTHING), ("score_imitate", {})])
def test_stage_4_waits_once_per_report(tmp_path, preset, overrides):
    found = waits_of(distill(preset, **overrides), tmp_path / "run", ema=EMAConfig())
    assert len(found) == STEPS // LOG_EVERY, "\n".join(found)


def looks(value):
    assert value.isfinite()
    return value


def copies(value):
    return value * (value.new_tensor([1.0, 1.0]) * value).mean()


@pytest.mark.parametrize(
    ("careless", "what"), [(looks, "_local_scalar_dense"), (copies, "copy to the device")]
)
def test_what_waits_is_found(tmp_path, careless, what):
    """A loss that looks at its value, or copies numbers to the device."""
    stage = ToyStage()
    loss = stage.loss
    stage.phases[0].loss = lambda net, batch, rng: (careless(loss(net, batch, rng)[0]), {})
    found = waits_of(stage, tmp_path / "run")
    assert sum(what in line for line in found) == STEPS and len(found) == STEPS + STEPS // LOG_EVERY, found


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_waits_in_every_step(tmp_path):
    """It is not fused: the host decides whether to step."""
    stage = flow_matching()
    stage.phases[0].optim = OptimConfig(kind="muon")
    assert len(waits_of(stage, tmp_path / "run")) == STEPS + STEPS // LOG_EVERY
