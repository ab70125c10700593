"""The engine on a two-layer net: resume, accumulation, averages, learning rate, non-finite steps."""

import json
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from nitro_e import checkpoint, engine, metrics
from nitro_e.config import ConfigError, TrainingError
from nitro_e.engine import EMAConfig, Engine, EngineConfig, make_accelerator
from nitro_e.interfaces import Phase
from nitro_e.model import EMMDiT, ModelConfig
from nitro_e.optim import OptimConfig, build_optimizers

MICRO = ModelConfig(
    latent_channels=2, text_width=4, width=16, heads=1, groups=(1, 1, 1), base_grid=4, compression=(2,), attention=("full",)
)


@dataclass
class ToyBatch:
    x: torch.Tensor
    keys: list[str] = field(default_factory=list)


class ToyStage:
    """Fit a linear map with noisy targets; the data are a function of the position, the noise of the slot."""

    name = "toy"
    fingerprint = {"shards": "toy"}

    def __init__(self, batch_size=8, optim=OptimConfig(lr=1e-2, warmup=2), poison=()):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
        self.batch_size, self.poison = batch_size, poison
        self.phases = (Phase("model", self.model, self.loss, optim),)

    def batches(self, step, rank, world, accumulate):
        while True:
            for micro in range(accumulate):
                first = ((step * world + rank) * accumulate + micro) * self.batch_size
                x = torch.stack([torch.sin(torch.arange(4.0) * (first + i + 1)) for i in range(self.batch_size)])
                yield ToyBatch(x * float("nan") if step in self.poison else x, [f"key-{step}"])
            step += 1

    def loss(self, net, batch, rng):
        return (net(batch.x) - batch.x.flip(1) - 0.1 * rng.normal(4)).square().mean(), {}

    def export(self, model):
        """The engine publishes EMMDiTs; this one carries the toy's weights in its output layer's bias."""
        published = EMMDiT(MICRO)
        published.out.bias.data.copy_(model[2].bias.data[:2])
        return published


def train(run, stage=None, stop=None, **options) -> Engine:
    options = {"steps": 12, "save_every": 4, "log_every": 1, "precision": "float32", "wandb": "disabled", **options}
    config = EngineConfig(**options)
    trainer = Engine(config, stage or ToyStage(), make_accelerator(config), run=run, seed=1, use={}, record={})
    if stop is not None:  # as if SIGTERM came during step `stop`
        original, trainer.update = trainer.update, None

        def update(index, batches):
            trainer.stop_requested = trainer.step + 1 >= stop
            return original(index, batches)

        trainer.update = update
    trainer.run()
    return trainer


def losses(run) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in metrics.read(run)}


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def _make_run(run):
    run.mkdir()


def test_resume_gives_the_losses_and_weights_of_an_uninterrupted_run(run, tmp_path):
    clean = tmp_path / "clean"
    clean.mkdir()
    ema = EMAConfig(beta=0.9)
    whole = train(clean, ema=ema)
    assert train(run, stop=6, ema=ema).step == 6
    resumed = train(run, ema=ema)
    assert losses(run) == losses(clean) and len(losses(clean)) == 12
    for ours, theirs in zip(resumed.stage.model.parameters(), whole.stage.model.parameters()):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(resumed.ema.ema_model.parameters(), whole.ema.ema_model.parameters()):
        assert torch.equal(ours, theirs)


def test_losses_past_the_checkpoint_are_superseded(run):
    """Killed after step 6 with a checkpoint at 4: steps 5 and 6 are done again and counted once."""
    train(run, steps=4)
    lines = [{"attempt": 1, "step": step, "loss": -1.0} for step in (5, 6)]
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
        file.write('{"attempt": 1, "step": 7, "lo')  # cut short by the kill
        file.write("\n")
    train(run)
    assert sorted(losses(run)) == list(range(1, 13)) and min(losses(run).values()) > 0


def test_accumulation_equals_one_large_batch(run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    train(run, ToyStage(batch_size=16))
    train(other, ToyStage(batch_size=4), accumulate=4)
    for step, loss in losses(run).items():
        assert losses(other)[step] == pytest.approx(loss, rel=1e-5)


def test_training_learns(run):
    train(run, steps=300, save_every=300, log_every=10)
    values = losses(run)
    assert values[300] < 0.5 * values[10]


def test_ema_follows_its_closed_form(run):
    stage = ToyStage()
    trainer = Engine(
        EngineConfig(steps=5, precision="float32", ema=EMAConfig(beta=0.5), wandb="disabled"), stage,
        make_accelerator(EngineConfig(steps=5, precision="float32")), run=run, seed=0, use={}, record={},
    )  # fmt: skip
    expected = stage.model[0].weight.detach().clone()
    for value in (1.0, 2.0, 3.0):
        stage.model[0].weight.data.fill_(value)
        trainer.ema.update()
        if value == 1.0:
            first = trainer.ema.ema_model[0].weight.detach().clone()
            expected = first  # ema-pytorch copies the weights at its first update
        else:
            expected = 0.5 * expected + 0.5 * value
    torch.testing.assert_close(trainer.ema.ema_model[0].weight, expected)


def test_non_finite_steps_are_skipped_and_counted(run):
    trainer = train(run, ToyStage(poison=(3, 7)))
    assert trainer.skipped == 2 and trainer.step == 12
    assert all(parameter.isfinite().all() for parameter in trainer.stage.model.parameters())


def test_too_many_non_finite_steps_stop_with_the_keys(run):
    with pytest.raises(TrainingError, match="key-8"):
        train(run, ToyStage(poison=range(6, 12)), max_skips=2)
    state = torch.load(checkpoint.latest(run) / "trainer" / "model.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in state["module"].values())


def test_only_the_newest_checkpoints_stay(run):
    train(run, steps=20, keep_last=2)
    assert [path.name for path in checkpoint.complete(run)] == ["step-0000016", "step-0000020"]


def test_a_half_written_checkpoint_is_not_one(run, monkeypatch):
    train(run, steps=4)

    def dies(self, folder):
        (folder / "model").mkdir()
        raise OSError("disk full")

    monkeypatch.setattr(engine.Engine, "_write", dies)
    with pytest.raises(OSError):
        train(run, steps=8)
    assert checkpoint.latest(run).name == "step-0000004"


def test_resume_refuses_another_experiment(run):
    train(run, steps=4)
    stage = ToyStage()
    stage.fingerprint = {"shards": "other"}
    with pytest.raises(ConfigError, match="data shards was 'toy', is 'other'"):
        train(run, stage)
    wider = ToyStage()
    wider.model[0] = nn.Linear(4, 9)
    with pytest.raises(ConfigError, match="another architecture"):
        train(run, wider)


def test_changed_learning_rate_applies_after_resume(run):
    train(run, steps=4)
    trainer = train(run, ToyStage(optim=OptimConfig(lr=5e-4, warmup=0)), steps=5)
    assert trainer.optimizers[0][0].param_groups[0]["lr"] == 5e-4


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.1), (9, 1.0), (50, 1.0), (79, 1.0), (80, 1.0), (90, 0.5), (99, 0.05), (100, 0.0)]
)
def test_learning_rate_is_a_function_of_the_step(step, expected):
    assert OptimConfig(warmup=10, decay=0.2).factor(step, 100) == pytest.approx(expected)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = EMMDiT(MICRO)
    muon, adamw = build_optimizers(model, OptimConfig(kind="muon"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    hidden = {names[id(parameter)] for group in muon.param_groups for parameter in group["params"]}
    rest = {names[id(parameter)] for group in adamw.param_groups for parameter in group["params"]}
    assert hidden | rest == set(names.values()) and not hidden & rest
    assert "blocks.0.image.attention.qkv.weight" in hidden and "out.weight" in rest and "patch.weight" in rest
