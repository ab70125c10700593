"""The engine on a two-layer net: resume, accumulation, averages, learning rate, non-finite steps."""

import contextlib
import json
import multiprocessing
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nitro_e.config import ConfigError, TrainingError
from nitro_e.files import save_object
from nitro_e.interfaces import Phase
from nitro_e.model import EMMDiT, ModelConfig
from nitro_e.record import metrics, run_folder
from nitro_e.training import checkpoint, engine
from nitro_e.training.engine import EMAConfig, Engine, EngineConfig, Hook, make_accelerator
from nitro_e.training.optim import OptimConfig, build_optimizers
from nitro_e.training.parallel import load_optimizer_state, optimizer_state
from nitro_e.training.state import TrainingState

MICRO = ModelConfig(
    latent_channels=2,
    text_width=4,
    width=16,
    heads=1,
    groups=(1, 1, 1),
    base_grid=4,
    compression=(2,),
    attention=("full",),
)


@dataclass
class ToyBatch:
    x: torch.Tensor
    keys: list[str] = field(default_factory=list)


class ToyStage:
    """Fit a linear map with noisy targets; the data are a function of the position, the noise of the slot."""

    name = "toy"
    fingerprint = {"shards": "toy"}
    forward_flops = 1.0
    bad_samples = 0

    def __init__(self, batch_size=8, optim=OptimConfig(lr=1e-2, warmup=2), poison=()):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
        self.batch_size, self.poison = batch_size, poison
        self.phases = (Phase("model", self.model, self.loss, optim),)

    def batches(self, step, rank, world, accumulate):
        while True:
            for micro in range(accumulate):
                first = ((step * world + rank) * accumulate + micro) * self.batch_size
                x = torch.stack(
                    [torch.sin(torch.arange(4.0) * (first + i + 1)) for i in range(self.batch_size)]
                )
                yield ToyBatch(x * float("nan") if step in self.poison else x, [f"key-{step}"])
            step += 1

    def loss(self, net, batch, rng):
        return (net(batch.x) - batch.x.flip(1) - 0.1 * rng.normal(4)).square().mean(), {}

    def export(self, model):
        """The engine publishes EMMDiTs; this one carries the toy's weights in its output layer's bias."""
        published = EMMDiT(MICRO)
        published.out.bias.data.copy_(model[2].bias.data[:2])
        return published


def train(run, stage=None, stop=None, hooks=(), accumulate=1, **options) -> Engine:
    options = {
        "steps": 12,
        "save_every": 4,
        "log_every": 1,
        "precision": "float32",
        "tracker": "none",
        **options,
    }
    config = EngineConfig(**options)
    trainer = Engine(
        config,
        stage or ToyStage(),
        make_accelerator(config),
        run=run,
        seed=1,
        use={},
        record={},
        accumulate=accumulate,
        hooks=hooks,
    )
    if stop is not None:  # as if SIGTERM came during step `stop`
        original, trainer.update = trainer.update, None

        def update(*arguments):
            trainer.stop.requested = trainer.step + 1 >= stop
            return original(*arguments)

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
    for ours, theirs in zip(resumed.state.ema.ema_model.parameters(), whole.state.ema.ema_model.parameters()):
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
        EngineConfig(steps=5, precision="float32", ema=EMAConfig(beta=0.5), tracker="none"),
        stage,
        make_accelerator(EngineConfig(steps=5, precision="float32")),
        run=run,
        seed=0,
        use={},
        record={},
    )
    expected = stage.model[0].weight.detach().clone()
    for value in (1.0, 2.0, 3.0):
        stage.model[0].weight.data.fill_(value)
        trainer.state.ema.update()
        if value == 1.0:
            first = trainer.state.ema.ema_model[0].weight.detach().clone()
            expected = first  # the first update copies the weights
        else:
            expected = 0.5 * expected + 0.5 * value
    torch.testing.assert_close(trainer.state.ema.ema_model[0].weight, expected)


def test_non_finite_steps_are_skipped_and_counted(run):
    trainer = train(run, ToyStage(poison=(3, 7)))
    assert trainer.state.skipped == 2 and trainer.step == 12
    assert all(parameter.isfinite().all() for parameter in trainer.stage.model.parameters())


def test_too_many_non_finite_steps_stop_with_the_keys(run):
    with pytest.raises(TrainingError, match="key-8"):
        train(run, ToyStage(poison=range(6, 12)), max_skips=2)
    state = torch.load(run_folder.latest(run) / "trainer" / "model.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in state["module"].values())


def test_an_explosion_leaves_the_checkpoints_before_it(run):
    """Weights of 1e37 end in skipped steps: what was kept stays as it was, and the same run goes on well from there."""
    train(run, steps=20, save_every=2)
    kept = {path: path.read_bytes() for path in run.glob("checkpoints/*/*/*")}
    with pytest.raises(TrainingError, match="steps in a row had a non-finite gradient"):
        stage = ToyStage()
        stage.phases[0].after_step = lambda optimizers: stage.model[2].weight.data.mul_(1e38)
        train(run, stage, steps=40, save_every=2)
    assert {path: path.read_bytes() for path in run.glob("checkpoints/*/*/*")} == kept
    assert train(run, steps=24, save_every=2).step == 24


def test_a_run_does_not_end_in_skipped_steps(run):
    with pytest.raises(TrainingError, match="the last 2 of 12 steps"):
        train(run, ToyStage(poison=(10, 11)))
    assert run_folder.latest(run).name == "step-0000008"
    assert json.loads((run / "STATUS.json").read_text())["state"] == "failed"


def test_a_save_that_falls_into_skipped_steps_comes_after_them(run):
    train(run, ToyStage(poison=(3, 4)), keep_last=9)
    assert [path.name[-2:] for path in run_folder.complete(run)] == ["06", "08", "12"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_never_saved(run, value):
    train(run, steps=4)
    stage = ToyStage()
    original = stage.loss

    def loss(net, batch, rng):
        if stage.steps == 7:
            # as a broken kernel would; the gradient of a zero loss stays finite
            stage.model[2].bias.data[0] = value
        stage.steps += 1
        return (
            original(net, batch, rng)[0] if stage.steps < 8 else sum(p.sum() for p in net.parameters()) * 0.0
        ), {}

    stage.steps = 4
    stage.loss = loss
    stage.phases = (Phase("model", stage.model, loss, OptimConfig(lr=1e-2, warmup=2)),)
    with pytest.raises(TrainingError, match="1 parameters are not finite after step 8, such as 2.bias"):
        train(run, stage, steps=8)
    assert run_folder.latest(run).name == "step-0000004"


def test_the_status_has_the_step_and_time_of_every_save(run):
    seen = []
    hook = Hook(1, lambda model: seen.append(json.loads((run / "STATUS.json").read_text())) or {})
    began = time.time()
    train(run, hooks=(hook,), save_every=4)
    assert [status["step"] for status in seen if status.get("hooks_due")] == [4, 8, 12]
    assert all(status["state"] == "running" and status["time"] >= began - 1 for status in seen)
    assert run_folder.read_status(run)["state"] == "done"


def test_images_come_after_the_save_and_again_if_they_failed(run):
    """What goes wrong while drawing costs no step; the same command draws what is missing, then goes on."""
    drawn = []

    def fails_once(model):
        drawn.append(run_folder.latest(run).name)
        if len(drawn) == 1:
            raise ConfigError("sampling.height 7")
        return {}

    for _ in range(2):
        with contextlib.suppress(ConfigError):
            train(run, hooks=(Hook(8, fails_once),))
    assert drawn == ["step-0000008", "step-0000008", "step-0000012"]
    assert sorted(losses(run)) == list(range(1, 13))
    train(run, hooks=(Hook(8, fails_once),))
    assert len(drawn) == 3  # nothing left to do


def test_a_run_directory_deleted_under_a_run_ends_it(run):
    def delete(model):
        shutil.rmtree(run)
        run.mkdir()
        return {}

    with pytest.raises(TrainingError, match="was deleted, moved or replaced"):
        train(run, hooks=(Hook(5, delete),))
    assert not list(run.glob("checkpoints/*"))


def test_only_the_newest_checkpoints_stay(run):
    train(run, steps=20, keep_last=2)
    assert [path.name for path in run_folder.complete(run)] == ["step-0000016", "step-0000020"]


@pytest.mark.parametrize("file", ["model.safetensors", "model.pt"])
def test_a_full_disk_does_not_stop_training_at_once(run, monkeypatch, disk_of, file):
    """Two saves that the system cuts short, each library in its own way, are counted and retried; then it works."""
    write, failures = TrainingState.write, []

    def fails_twice(self, folder, published, gathered, use):
        limit = contextlib.nullcontext()
        if self.step > 4 and len(failures) < 2:
            failures.append(run_folder.latest(run).name)
            limit = disk_of(1000)
            # the published weights are larger than those of the trainer: leave them out
            if file == "model.pt":
                (folder / "trainer").mkdir()
                with limit:
                    save_object(gathered, folder / "trainer" / file)
        with limit:
            write(self, folder, published, gathered, use)

    monkeypatch.setattr(TrainingState, "write", fails_twice)
    trainer = train(run, steps=16)
    assert failures == ["step-0000004"] * 2 and trainer.saver.failures == 0
    assert [path.name for path in run_folder.complete(run)] == ["step-0000012", "step-0000016"]
    assert not list((run / "checkpoints").glob("*.tmp"))
    assert max(row["failed_saves"] for row in metrics.read(run)) == 2


def test_a_disk_that_stays_full_stops_with_a_reason(run, disk_of):
    """The checkpoint before it stays whole, and STATUS.json tells the end although nothing new can be written."""
    train(run, steps=4)
    with disk_of(5000), pytest.raises(TrainingError, match="3 checkpoints in a row .* File too large"):
        train(run, steps=40)
    assert checkpoint.latest_valid(run).name == "step-0000004"
    assert not list((run / "checkpoints").glob("*.tmp"))
    assert json.loads((run / "STATUS.json").read_text())["state"] == "failed"
    train(run, steps=40)
    assert json.loads((run / "STATUS.json").read_text())["state"] == "done"


def test_a_damaged_checkpoint_is_skipped_and_named(run, tmp_path, caplog):
    clean = tmp_path / "clean"
    clean.mkdir()
    train(clean)
    train(run, steps=8)
    path = run / "checkpoints" / "step-0000008" / "trainer" / "model.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # one flipped bit
    path.write_bytes(content)
    train(run)
    assert "step-0000008" in caplog.text and "wrong sha256" in caplog.text
    assert (run / "checkpoints" / "bad-step-0000008").is_dir()
    assert losses(run) == losses(clean)


def test_a_checkpoint_without_its_record_is_damaged_and_not_overlooked(run, caplog):
    train(run, steps=8)
    (run / "checkpoints" / "step-0000008" / "meta.json").unlink()
    assert checkpoint.latest_valid(run).name == "step-0000004"
    assert "step-0000008 is damaged (meta.json" in caplog.text
    (run / "checkpoints" / "step-0000004" / "meta.json").unlink()
    with pytest.raises(TrainingError, match="every checkpoint of .* is damaged"):
        train(run)


def test_a_copy_under_another_step_is_damaged_and_training_ends(run, caplog):
    """It was resumed from, and then saved again and again for ever, because it stayed the newest."""
    train(run, steps=8)
    shutil.copytree(run / "checkpoints" / "step-0000008", run / "checkpoints" / "step-0000099")
    train(run)
    assert "step-0000099 is damaged (meta.json: is of step 8)" in caplog.text
    assert sorted(losses(run)) == list(range(1, 13))


@pytest.mark.parametrize("stride", [29, pytest.param(1, marks=pytest.mark.slow)])
def test_no_flipped_bit_of_the_record_goes_unnoticed(run, stride):
    """Each either makes the checkpoint a damaged one, or leaves every value of the record as it was."""
    train(run, steps=4)
    folder = run_folder.latest(run)
    path, bad = folder / "meta.json", folder.with_name(f"bad-{folder.name}")
    content, meta, found = path.read_bytes(), run_folder.read_meta(folder), 0
    for bit in range(0, 8 * len(content), stride):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        if checkpoint.latest_valid(run) is None:
            bad.rename(folder)
            found += 1
        else:
            now = run_folder.read_meta(folder)
            assert {key: now.get(key) for key in meta} == meta, bit
    checked = len(range(0, 8 * len(content), stride))
    print(f"{checked} flips: {found} damaged, {checked - found} harmless")
    assert found > 0.9 * checked


@pytest.mark.parametrize(
    "text", ["[]", "null", '{"files": []}', '{"step": 4, "files": 5}', "\xff", "[" * 10_000]
)
def test_a_record_that_is_none_is_damage(run, text):
    train(run, steps=4)
    (run_folder.latest(run) / "meta.json").write_bytes(text.encode("latin1"))
    with pytest.raises(TrainingError, match="every checkpoint of .* is damaged"):
        train(run)


def test_a_run_without_a_whole_checkpoint_does_not_begin_anew_unnoticed(run):
    train(run, steps=4)
    for path in (run / "checkpoints").glob("step-*/trainer/model.pt"):
        path.write_bytes(path.read_bytes()[:-1])
    for _ in range(2):
        with pytest.raises(TrainingError, match="every checkpoint of .* is damaged"):
            train(run, steps=8)


def test_a_kill_between_publishing_and_pruning_only_leaves_one_more(run, monkeypatch):
    monkeypatch.setattr(checkpoint, "prune", lambda *_: None)
    train(run, steps=12)
    assert len(run_folder.complete(run)) == 3
    monkeypatch.undo()
    train(run, steps=16)
    assert [path.name for path in run_folder.complete(run)] == ["step-0000012", "step-0000016"]


def test_milestones_stay(run):
    train(run, steps=24, keep_every=8)
    assert [path.name for path in run_folder.complete(run)] == [
        f"step-00000{step:02d}" for step in (8, 16, 20, 24)
    ]


def test_two_jobs_cannot_train_in_one_run_directory(run):
    """A second process is refused, until the first has ended; a child that it left behind does not hold the lock."""
    code = f"import pathlib; from nitro_e.record.run_folder import lock\nwith lock(pathlib.Path({str(run)!r})): pass"

    def other_job() -> str:
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr

    (run / "config.yaml").touch()
    with run_folder.lock(run):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        assert "another job is training" in other_job()
    try:
        assert child.is_alive() and other_job() == ""
    finally:
        child.kill()
        child.join()


def test_a_refused_config_leaves_no_run_directory(run):
    with pytest.raises(ConfigError), run_folder.lock(run):
        raise ConfigError("refused")
    assert not run.exists()
    with pytest.raises(ConfigError), run_folder.lock(run):
        (run / "metrics.jsonl").touch()
        raise ConfigError("refused")
    assert run.exists()


def test_a_parameter_that_no_loss_reaches_is_named(run):
    stage = ToyStage()
    stage.phases[0].module.register_parameter("unused", nn.Parameter(torch.zeros(3)))
    with pytest.raises(TrainingError, match="1 parameters .* such as unused"):
        train(run, stage)


def test_a_nan_micro_batch_voids_the_whole_step(run):
    """One bad micro-batch of two: the step is skipped and the optimiser's moments stay as they were."""

    class Half(ToyStage):
        def batches(self, step, rank, world, accumulate):
            for number, batch in enumerate(super().batches(step, rank, world, accumulate)):
                yield ToyBatch(batch.x * float("nan")) if number == 6 * accumulate else batch

    trainer = train(run, Half(batch_size=4), accumulate=2)
    assert trainer.state.skipped == 1
    moments = [state["step"].item() for state in trainer.state.optimizers[0][0].optimizer.state.values()]
    assert set(moments) == {11.0}
    assert all(parameter.isfinite().all() for parameter in trainer.stage.model.parameters())


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


@pytest.mark.parametrize("fused", [True, False])
def test_a_loaded_count_of_steps_lies_where_torchs_own_loader_puts_it(fused):
    """Fake tensors stand for a GPU's: its fused AdamW refuses a count of steps on the CPU, the others want it there."""

    def adamw(device):
        layer = nn.Linear(3, 3, device=device)
        optimizer = torch.optim.AdamW(layer.parameters())
        optimizer.param_groups[0]["fused"] = fused
        return layer, optimizer

    layer, optimizer = adamw("cpu")
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    saved = optimizer_state(layer, optimizer)
    with FakeTensorMode(allow_non_fake_inputs=True):
        (layer, ours), (other, theirs) = adamw("cuda"), adamw("cuda")
        load_optimizer_state(layer, ours, saved)
        groups = theirs.state_dict()["param_groups"]
        theirs.load_state_dict({"state": dict(enumerate(saved.values())), "param_groups": groups})
        devices = [
            {name: value.device.type for name, value in one.state[of.weight].items()}
            for one, of in ((ours, layer), (theirs, other))
        ]
    assert devices[0] == devices[1]
    assert devices[0]["step"] == ("cuda" if fused else "cpu")


def test_training_takes_the_cpu_where_the_gpu_lacks_float64(monkeypatch):
    """Apple's; only the choice is seen here, there is none."""
    asked, build = [], engine.Accelerator
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(
        engine, "Accelerator", lambda cpu, **rest: asked.append(cpu) or build(cpu=True, **rest)
    )
    make_accelerator(EngineConfig(steps=1, precision="float32"))
    assert asked == [True]


def test_changed_learning_rate_applies_after_resume(run):
    train(run, steps=4)
    trainer = train(run, ToyStage(optim=OptimConfig(lr=5e-4, warmup=0)), steps=5)
    assert trainer.state.optimizers[0][0].optimizer.param_groups[0]["lr"] == 5e-4


def test_processes_that_do_not_see_each_other_are_refused(monkeypatch):
    """accelerate can fall back to one process under a launcher: two runs would then train side by side."""

    class Alone:
        num_processes = 1

        def __init__(self, **_):
            pass

    monkeypatch.setattr(engine, "Accelerator", Alone)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="the launcher started 2 processes but accelerate sees 1"):
        make_accelerator(EngineConfig(steps=1))


def test_averages_and_checkpoints_are_of_the_raw_module(run):
    """No `module.` in any name (for `_orig_mod.` of compiled models see test_failures.py)."""
    trainer = train(run, ema=EMAConfig(beta=0.9), steps=2)
    names = set(ToyStage().model.state_dict())
    assert set(trainer.state.ema.ema_model.state_dict()) == names
    for which in ("model", "ema"):
        state = torch.load(run_folder.latest(run) / "trainer" / f"{which}.pt", weights_only=True)
        assert set(state["module"]) == names


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.1), (9, 1.0), (50, 1.0), (79, 1.0), (80, 1.0), (90, 0.5), (99, 0.05), (100, 0.0)],
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


def test_a_phase_that_is_not_due_stands_still_with_its_average(tmp_path):
    """Due in steps 1, 4 and 7, twice each with other noise; the rate follows these six updates alone."""
    stage, seen = ToyStage(), []

    def loss(net, batch, rng):
        seen.append(rng.normal(1).sum().item())
        return stage.loss(net, batch, rng)

    optim = OptimConfig(lr=1e-2, warmup=4, decay=0.5)
    stage.phases = (Phase("model", stage.model, loss, optim, every=3, repeat=2, start=1),)
    trainer = train(tmp_path / "run", stage, steps=8, save_every=8, ema=EMAConfig(beta=0.5))
    assert len(seen) == 6 and len(set(seen)) == 6
    assert trainer.state.ema.step == 3
    rates = {row["step"]: row["lr"] for row in metrics.read(tmp_path / "run") if "lr" in row}
    factors = [min(1, (update + 1) / 4, (6 - update) / 3) for update in range(6)]
    expected = {
        step + 1: 1e-2 * (factors[2 * n] + factors[2 * n + 1]) / 2 for n, step in enumerate((1, 4, 7))
    }
    assert rates == pytest.approx(expected)
