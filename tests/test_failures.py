"""The failure table: what goes wrong, and which test holds the answer. Tests that were missing are in this file.

    F1   kill -9 anywhere, in a save too    test_chaos::*, test_train::test_sigkill_and_the_same_command_again
    F2   kill between publish and prune     test_engine::test_a_kill_between_publishing_and_pruning_*, *_while_pruning_* here
    F3   checkpoint truncated or flipped    test_engine::test_a_damaged_checkpoint_is_skipped_and_named
    F4   disk full while saving             test_engine::test_a_full_disk_*, test_a_disk_that_stays_full_*, *_last_save_*,
                                            *_full_disk_on_one_process_* here
    F5   SIGTERM/SIGUSR1, one rank or agent test_distributed::test_two_processes_stopped_*, test_sharded_*, *_launcher_* here
    F6   save longer than the grace time    test_chaos (a cut save is harmless), test_slurm::test_what_is_launched (the flag)
    F7   NaN on one process                 test_distributed::test_nan_on_one_process_skips_the_step_on_both
    F8   NaN in one micro-batch             test_engine::test_a_nan_micro_batch_voids_the_whole_step
    F9   NaN again and again                test_engine::test_too_many_non_finite_steps_*, test_fp16_* here
    F10  a process dies                     test_distributed::test_a_process_that_dies_ends_the_job_with_an_error
    F11  tar cut at a member boundary       test_data_index::test_every_damage_is_found, test_train (truncated tar)
    F14  bits flipped in a payload          test_data_reader::test_bit_flips_*, test_bad_latents_*, *_flipped_bits_* here
    F18  other world, workers, accumulation test_distributed, test_data_reader::test_batches_do_not_depend_*, *_layout* here
    F19  data changed at resume             test_engine::test_resume_refuses_another_experiment, *_changed_data_* here
    F20  shard rewritten, same name         test_data_index::test_rewriting_*, test_data_verify::test_replaced_shard, here
    F24  tracker: no key, failing           test_metrics::*, *_tracker_* here
    F25  wrapped model given to the EMA     test_ema::test_wrapped_*, test_engine::test_averages_and_checkpoints_*
    F27  processes that see only themselves test_engine::test_processes_that_do_not_see_each_other_are_refused
    F28  parameters without gradient        test_engine::test_a_parameter_that_no_loss_reaches_*, *_ablation_* here
    F34  checkpoints cross-load             test_distributed::test_sharded_*, test_a_replicated_*, *_checkpoint_of_* here

All two-process runs of this file are made by one torchrun: `python test_failures.py FOLDER CASES` is its script.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from data_samples import flip_byte
from safetensors import safe_open
from test_ablations import CYCLE, MICRO
from test_engine import ToyStage, losses, train
from test_train import RECIPE, ROOT, run_train, samples
from tiny import SHARDS_ON_CPU

from nitro_e.cli import common as cli
from nitro_e.config import ConfigError, TrainingError, from_dict
from nitro_e.data.making import write_shard
from nitro_e.interfaces import Batch, TextEmbedding
from nitro_e.model import EMMDiT, ModelConfig
from nitro_e.model.cpu.packing import bfloat16_slowdown
from nitro_e.model.pretrained import load_pretrained
from nitro_e.record import metrics, run_folder
from nitro_e.sampling.pipeline import TextToImage
from nitro_e.stages.flow_matching import FlowMatching, FlowMatchingConfig
from nitro_e.training import checkpoint
from nitro_e.training import engine as engine_module
from nitro_e.training.engine import EMAConfig, Engine, EngineConfig, make_accelerator
from nitro_e.training.optim import OptimConfig
from nitro_e.training.state import TrainingState

# ---- the real stage on one and two processes ----------------------------------------------------------------------

# Name of the run: what differs from batch 8 on one process. All have global batch 8 and end at step 6.
LAYOUTS = {
    "two": ["batch=8"],
    "two-accumulate": ["batch={global: 8, per_device: 2}"],
    "grown": ["batch=8", "data.workers=1"],  # steps 1 to 3 on one process
    "shrunk": ["batch={global: 8, per_device: 2}", "engine.steps=3"],  # steps 4 to 6 on one process
    "sharded": ["batch=8", "engine.sharding=fsdp", "engine.steps=3"],  # so do these
    "full-disk": ["batch=8", "engine.save_every=2"],
    "flipped": ["batch=8", "data.shards=[SHARDS]", "data.max_bad_fraction=0.5"],
}
if not SHARDS_ON_CPU:
    del LAYOUTS["sharded"]
SHARDED = [name for name in ["sharded"] if name in LAYOUTS]


def two_processes(folder: Path) -> None:
    """Every layout in turn; what only this process knows goes to `RUN/rankN.json`."""
    rank = int(os.environ["RANK"])
    for name, options in json.loads((folder / "cases.json").read_text()).items():
        run, seen = folder / name, []
        with (
            watched_batches(seen),
            failing_save(step=2) if name == "full-disk" and rank == 0 else contextlib.nullcontext(),
        ):
            code = run_train(folder / "recipe.yaml", run, *options)
        if code:
            raise SystemExit(f"{name} ended with {code}")
        (run / f"rank{rank}.json").write_text(json.dumps(seen))


@contextlib.contextmanager
def watched_batches(seen: list):
    """Every batch that reaches the loss: its size and keys."""
    original = FlowMatching.loss

    def loss(self, net, batch, rng):
        seen.append([len(batch.latents), batch.keys])
        return original(self, net, batch, rng)

    FlowMatching.loss = loss
    try:
        yield
    finally:
        FlowMatching.loss = original


@contextlib.contextmanager
def failing_save(step: int):
    original = TrainingState.write

    def write(self, folder, *arguments):
        if self.step == step:
            (folder / "model").mkdir()
            raise OSError(28, "No space left on device")
        original(self, folder, *arguments)

    TrainingState.write = write
    try:
        yield
    finally:
        TrainingState.write = original


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with the run `one` (one process, batch 8) and one run for each of LAYOUTS, ended at step 6."""
    folder = tmp_path_factory.mktemp("layouts")
    for name in ("toy", "other"):
        write_shard(folder / f"{name}-000000.tar", samples())
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.replace("SHARDS", f"{folder}/toy-*.tar"))
    damaged = f"data.shards=[{folder}/other-*.tar]"
    assert run_train(recipe, folder / "one", "batch=8") == 0
    assert run_train(recipe, folder / "one-accumulate", "batch={global: 8, per_device: 4}") == 0
    assert run_train(recipe, folder / "grown", "batch=8", "engine.steps=3") == 0
    # indexes the shard
    assert run_train(recipe, folder / "flipped", "batch=8", "engine.steps=1", damaged) == 0
    for key in ("0003", "0010"):
        flip_byte(folder / "other-000000.tar", key, "png")
    cases = {
        name: [o.replace("[SHARDS]", f"[{folder}/other-*.tar]") for o in options]
        for name, options in LAYOUTS.items()
    }
    (folder / "cases.json").write_text(json.dumps(cases))
    done = torchrun(Path(__file__), str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("shrunk", *SHARDED):
        assert run_train(recipe, folder / name, "batch=8") == 0
    return folder


def torchrun(*command, start=subprocess.run, **options):
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "NITRO_E_TIMEOUT_MINUTES": "1",
        "HF_HUB_OFFLINE": "1",
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    limit = {"timeout": 200} if start is subprocess.run else {}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return start([*launcher, *map(str, command)], env=environment, **pipes, **limit, **options)


@pytest.mark.parametrize(
    "name", ["one-accumulate", "two", "two-accumulate", "grown", "shrunk", *SHARDED, "full-disk"]
)
def test_every_layout_gives_the_losses_of_one_process(runs, name):
    """accumulate {1, 2} x processes {1, 2}, changed in the middle of a run, sharded, and with a disk that was full once."""
    ours, theirs = losses(runs / name), losses(runs / "one")
    assert list(ours) == list(theirs) == [1, 2, 3, 4, 5, 6]
    for step in ours:
        assert ours[step] == pytest.approx(theirs[step], rel=1e-6), step


def test_a_full_disk_on_one_process_is_a_failed_save_on_both(runs):
    rows = metrics.read(runs / "full-disk")
    assert [row["failed_saves"] for row in rows] == [0, 0, 1, 0, 0, 0]  # tried again at half the interval
    assert not list((runs / "full-disk" / "checkpoints").glob("*.tmp"))
    assert [len(json.loads((runs / "full-disk" / f"rank{rank}.json").read_text())) for rank in (0, 1)] == [
        6,
        6,
    ]


def test_flipped_bits_are_replaced_and_counted_with_the_batch_size_kept(runs):
    """Two images of 24 are damaged after the index was made; every process still gets 4 samples at every step."""
    seen = [json.loads((runs / "flipped" / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert [[size for size, _ in batches] for batches in seen] == [
        [4] * 5
    ] * 2  # step 1 was before the damage
    keys = {key.split(":")[1] for batches in seen for _, names in batches for key in names}
    assert len(keys) > 15 and not keys & {"0003", "0010"}
    lines = [
        json.loads(line)
        for path in (runs / "flipped").glob("bad_samples.rank*.jsonl")
        for line in path.open()
    ]
    assert (
        lines
        and {line["key"] for line in lines} <= {"0003", "0010"}
        and all("CRC" in line["reason"] for line in lines)
    )


@pytest.mark.parametrize("name", ["one", "two", *SHARDED])
def test_a_checkpoint_of_any_layout_has_the_same_names_and_draws(runs, name):
    names = names_in(run_folder.latest(runs / name))
    assert names == names_in(run_folder.latest(runs / "one"))
    assert not any("module." in key or "_orig_mod" in key for keys in names.values() for key in keys)
    image = TextToImage.from_pretrained(runs / name)("a plain red square").images[0]
    reference = TextToImage.from_pretrained(runs / "one")("a plain red square").images[0]
    assert np.abs(np.asarray(image).astype(int) - np.asarray(reference).astype(int)).max() <= 1


def names_in(folder: Path) -> dict[str, list[str]]:
    """All tensor names of a checkpoint, by file."""
    found = {}
    for which in ("model", "ema"):
        with safe_open(folder / which / "model.safetensors", "pt") as file:
            found[which] = sorted(file.keys())
    for which in ("model", "ema"):
        found[f"trainer {which}"] = sorted(
            torch.load(folder / "trainer" / f"{which}.pt", weights_only=True)["module"]
        )
    (moments,) = torch.load(folder / "trainer" / "model.pt", weights_only=True)["optimizers"]
    return found | {"moments": sorted(moments)}


def test_a_compiled_checkpoint_continues_uncompiled(runs, tmp_path, monkeypatch):
    """Traced by torch.compile (its eager backend: nothing is generated) for 3 steps, plain afterwards."""
    torch._dynamo.reset()
    compile_module, compiled = torch.nn.Module.compile, []

    def compile(self, **options):
        compiled.append(type(self).__name__)
        compile_module(self, **options, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    recipe, run = runs / "recipe.yaml", tmp_path / "run"
    assert run_train(recipe, run, "batch=8", "engine.steps=3", "engine.compile=true") == 0 and compiled
    assert names_in(run_folder.latest(run)) == names_in(run_folder.latest(runs / "one"))
    assert run_train(recipe, run, "batch=8") == 0
    for step, loss in losses(run).items():
        assert loss == pytest.approx(losses(runs / "one")[step], rel=1e-6)


# ---- signals ------------------------------------------------------------------------------------------------------


def test_sigterm_to_the_launcher_stops_both_at_one_step(tmp_path):
    run = tmp_path / "run"
    options = json.dumps({"steps": 100_000, "save_every": 100_000, "pause": 0.02})
    process = torchrun(ROOT / "tests" / "toy_run.py", run, options, start=subprocess.Popen)
    # both have begun to train: a signal that comes before ends a process as it ends any other
    while process.poll() is None and len(list(run.glob("processes/rank-*.json"))) < 2:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    # torchrun's own code is 1 here, so job scripts read STATUS.json
    output, errors = process.communicate(timeout=60)
    ends = {line.split("step ")[1] for line in output.splitlines() if line.startswith("rank")}
    status = json.loads((run / "STATUS.json").read_text())
    assert len(ends) == 1 and status["state"] == "preempted", errors[-2000:]
    assert run_folder.read_meta(run_folder.latest(run))["step"] == status["step"]


# ---- files of a run -----------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def test_a_kill_while_pruning_leaves_no_half_checkpoint(run, monkeypatch):
    """Whatever is called a checkpoint is one, also when the kill comes after the first of an old one's files."""
    remove = shutil.rmtree

    def killed(path, *arguments, **options):
        if Path(path).is_dir() and (Path(path) / "meta.json").exists():
            next(p for p in Path(path).rglob("*") if p.is_file() and p.name != "meta.json").unlink()
            raise KeyboardInterrupt
        remove(path, *arguments, **options)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        train(run, steps=16)
    monkeypatch.undo()
    assert [checkpoint.damage(folder) for folder in run_folder.complete(run)] == [None] * 2
    train(run, steps=20)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-0000016", "step-0000020"]


def test_what_a_killed_save_left_is_removed(run):
    """Its step may never be saved again: after SIGTERM at an odd step, say."""
    train(run, steps=4)
    (run / "checkpoints" / "step-0000003.tmp" / "model").mkdir(parents=True)
    train(run, steps=12)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-0000008", "step-0000012"]


def test_a_last_save_that_fails_is_not_a_finished_run(run, monkeypatch):
    """Steps 9 to 12 exist in memory only: saying "done" would lose them silently."""
    write = TrainingState.write

    def fails_at_the_end(self, *arguments):
        if self.step == 12:
            raise OSError(28, "No space left on device")
        write(self, *arguments)

    monkeypatch.setattr(TrainingState, "write", fails_at_the_end)
    with pytest.raises(TrainingError, match="No space left on device"):
        train(run)
    assert json.loads((run / "STATUS.json").read_text())["state"] == "failed"
    monkeypatch.undo()
    assert train(run).step == 12 and run_folder.latest(run).name == "step-0000012"


# ---- data that changed --------------------------------------------------------------------------------------------


@pytest.fixture
def started(tmp_path) -> tuple[Path, Path]:
    """Recipe and run directory of a run at step 3 of 6."""
    write_shard(tmp_path / "toy-000000.tar", samples())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("SHARDS", f"{tmp_path}/toy-*.tar"))
    assert run_train(recipe, tmp_path / "run", "engine.steps=3") == 0
    return recipe, tmp_path / "run"


def refusal(capsys) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    return line


def test_changed_data_are_refused_with_the_difference(started, tmp_path, capsys):
    recipe, run = started
    for option, words in (("batch=8", "global batch was 4, is 8"), ("seed=1", "seed was 0, is 1")):
        assert run_train(recipe, run, option) == 2
        line = refusal(capsys)
        assert words in line and "step-0000003" in line and "run=" in line
    write_shard(tmp_path / "toy-000001.tar", samples(6))
    assert run_train(recipe, run) == 2
    assert "data samples was 24, is 30" in refusal(capsys)
    assert run_folder.latest(run).name == "step-0000003"


def test_a_changed_weight_of_a_source_is_refused(started, tmp_path, capsys):
    recipe, run = started[0], tmp_path / "mixture"
    write_shard(tmp_path / "more-000000.tar", samples())
    for weight, code in ((1.0, 0), (3.0, 2)):
        sources = f"a: {{shards: [{tmp_path}/toy-*.tar], weight: 1.0}}, b: {{shards: [{tmp_path}/more-*.tar], weight: {weight}}}"
        data = f"data={{sources: {{{sources}}}, resolution: 64, workers: 0}}"
        assert run_train(recipe, run, "engine.steps=1", data) == code
    assert "data quotas was [256, 256], is [128, 384]" in refusal(capsys)


def test_a_shard_rewritten_under_its_name_is_refused(started, tmp_path, capsys):
    """As many samples, as many bytes, other captions."""
    recipe, run = started
    path = tmp_path / "toy-000000.tar"
    size = path.stat().st_size
    write_shard(path, ({**item, "txt": item["txt"].replace("plain", "grand")} for item in samples()))
    assert path.stat().st_size == size
    assert run_train(recipe, run) == 2
    assert "data content was" in refusal(capsys)


# ---- trackers -----------------------------------------------------------------------------------------------------


class BrokenTracker:
    """Starts, then fails at everything."""

    started = []

    def __init__(self, run, config, *mode, **start_step):
        self.started.append(mode)

    def log(self, *_):
        raise RuntimeError("server error 500")

    log_image = close = log


@pytest.mark.parametrize("tracker", ["wandb", "wandb:offline", "tensorboard", "auto"])
def test_a_failing_tracker_changes_nothing(run, tmp_path, monkeypatch, tracker):
    """No key, then an error at every call: the losses and the end of an undisturbed run."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no netrc either
    for name in ("WandB", "TensorBoard"):
        monkeypatch.setattr(metrics, name, BrokenTracker)
    BrokenTracker.started.clear()
    assert train(run, tracker=tracker).step == 12
    assert BrokenTracker.started == [("offline",) if tracker.startswith("wandb") else ()]
    clean = tmp_path / "clean"
    clean.mkdir()
    train(clean)
    assert losses(run) == losses(clean) and json.loads((run / "STATUS.json").read_text())["state"] == "done"
    assert any("server error 500" in event.get("message", "") for event in metrics.read_events(run))


# ---- every choice of the model --------------------------------------------------------------------------------------

CHOICES = [
    {},
    dict(compression=[], position_reinforcement=False),
    dict(compression=[2]),
    dict(position_reinforcement=False),
    dict(modulation="single"),
    dict(modulation="full"),
    dict(attention=["full"]),
    dict(qk_norm=False),
    dict(text_mask="real"),
    dict(gate_init="zero"),
    dict(gate_init="one"),
    dict(patch_size=2),
    dict(groups=[1, 0, 1]),
]


class PremadeStage(FlowMatching):
    """The real stage on one fixed batch: no shards, no encoders."""

    def __init__(self, model: EMMDiT, batch_size: int = 2) -> None:
        config, generator = model.config, torch.Generator().manual_seed(0)
        side = config.base_grid * config.patch_size
        tokens = torch.randn(batch_size, 8, config.text_width, generator=generator)
        text = TextEmbedding(tokens, torch.arange(8) < torch.tensor([8, 3] * batch_size)[:batch_size, None])
        x = torch.randn(batch_size, config.latent_channels, side, side, generator=generator)
        self.batch = Batch(x, text, ["a"] * batch_size, ["x.tar:a"] * batch_size)
        data = SimpleNamespace(
            config=SimpleNamespace(batch_size=batch_size), fingerprint=dict, bad=(), null_text=lambda: None
        )
        encoder = SimpleNamespace(
            encode=lambda _: TextEmbedding(tokens[:1] * 0, torch.ones(1, 8, dtype=torch.bool))
        )
        super().__init__(
            FlowMatchingConfig(optim=OptimConfig(warmup=0)),
            model,
            data,
            None,
            encoder,
            None,
            0,
            torch.device("cpu"),
            1.0,
        )

    def batches(self, step, rank, world, accumulate):
        while True:
            yield self.batch


@pytest.mark.parametrize(
    "choices", CHOICES, ids=lambda choices: "-".join(f"{k}={v}" for k, v in choices.items()) or "default"
)
def test_every_ablation_trains_all_its_parameters(run, choices):
    torch.manual_seed(0)
    model = EMMDiT(from_dict(ModelConfig, {**MICRO, "attention": CYCLE, **choices}))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = train(run, PremadeStage(model), steps=2, save_every=2, ema=EMAConfig(beta=0.5))
    assert trainer.state.skipped == 0 and np.isfinite(list(losses(run).values())).all()
    assert any(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert load_pretrained(run_folder.latest(run) / "ema").config == model.config


# ---- a bare loop ----------------------------------------------------------------------------------------------------


def test_the_engine_trains_what_a_bare_loop_trains(monkeypatch, tmp_path, capsys):
    """The two sides of tools/benchmark_engine.py, without the noise: equal weights after some steps. Then its table."""
    from nitro_e.cli.benchmark import engine as benchmark_engine

    def loss(model, batch):
        return (model(batch.latents, torch.full((2,), 0.5), batch.text) - batch.latents).square().mean()

    config = from_dict(ModelConfig, {"preset": "micro-8", "latent_channels": 4, "text_width": 8})
    with monkeypatch.context() as patch:
        patch.setattr(benchmark_engine, "bare_loss", loss)
        trained = []
        for name in ("bare loop", "engine, the same loss"):
            torch.manual_seed(0)
            model = EMMDiT(config)
            assert len(benchmark_engine.VARIANTS[name](model, benchmark_engine.make_batch(config, 2), 4)) == 4
            trained.append(model.state_dict())
    assert all(torch.equal(trained[1][name], tensor) for name, tensor in trained[0].items())

    arguments = [
        "--presets",
        "micro-8",
        "--batch",
        "1",
        "--windows",
        "1",
        "--rounds",
        "1",
        "--json",
        str(tmp_path / "f.json"),
    ]
    assert benchmark_engine.main(arguments) == 0
    figures = json.loads((tmp_path / "f.json").read_text())["micro-8"]
    assert set(figures) == set(benchmark_engine.VARIANTS) and all(v["cpu"] > 0 for v in figures.values())
    assert "micro-8, engine, flow matching" in capsys.readouterr().out


# ---- half precision -------------------------------------------------------------------------------------------------


@pytest.fixture
def fp16(fresh_state, run):
    """Train in fp16 with a real loss scaler, which accelerate makes on GPUs only."""

    def start(stage, run=run, scale=2.0**8, **options) -> Engine:
        config = EngineConfig(
            **{"steps": 12, "save_every": 4, "log_every": 1, "tracker": "none", **options},
            precision="float16",
        )
        accelerator = Accelerator(cpu=True, mixed_precision="fp16")
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=scale)
        trainer = Engine(config, stage, accelerator, run=run, seed=1, use={}, record={})
        trainer.run()
        return trainer

    return start


def test_fp16_is_refused_without_a_loss_scaler(fresh_state):
    """accelerate silently trains in float32 on a CPU, without the check of the scaler."""
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match="float16"):
        make_accelerator(EngineConfig(steps=1, precision="float16"))


def test_slow_bfloat16_is_named(fresh_state, monkeypatch, caplog):
    """A processor that emulates bfloat16 trains faster in float32; the recipe is kept as it is."""
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("there is a GPU")
    assert 0 < bfloat16_slowdown() == bfloat16_slowdown()
    for slowdown, precision, warned in (
        (2.0, "bfloat16", True),
        (1.4, "bfloat16", False),
        (2.0, "float32", False),
    ):
        monkeypatch.setattr(engine_module, "bfloat16_slowdown", lambda slowdown=slowdown: slowdown)
        caplog.clear()
        make_accelerator(EngineConfig(steps=1, precision=precision))
        AcceleratorState._reset_state()
        assert ("products take 2.0 times" in caplog.text) == warned


def test_fp16_follows_float32(fp16, run, tmp_path):
    clean = tmp_path / "clean"
    clean.mkdir()
    fp16(ToyStage())
    AcceleratorState._reset_state()
    train(clean)
    assert losses(run) != losses(clean)
    for step, loss in losses(run).items():
        assert loss == pytest.approx(losses(clean)[step], rel=0.01)


def test_fp16_finds_its_scale_without_counting_skips(fp16):
    trainer = fp16(ToyStage(), scale=2.0**20, steps=30)
    assert trainer.accelerator.scaler.get_scale() < 2.0**20 and trainer.state.skipped == 0
    assert all(parameter.isfinite().all() for parameter in trainer.stage.model.parameters())


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
@pytest.mark.parametrize("name", ["blocks.0.image.attention.qkv.weight", "out.weight"])
def test_fp16_steps_with_all_optimisers_or_none(fp16, name, value=float("inf")):
    """What overflows in the matrices, which are Muon's, or in AdamW's weights: clipping brings it into both."""
    torch.manual_seed(0)
    model = EMMDiT(from_dict(ModelConfig, {**MICRO, "attention": CYCLE}))
    stage, before, seen = PremadeStage(model), {}, []
    stage.phases[0].optim.__dict__["kind"] = "muon"

    def overflow(gradient):
        seen.append({key: tensor.detach().clone() for key, tensor in model.named_parameters()})
        return torch.full_like(gradient, value) if len(seen) == 2 else gradient

    model.get_parameter(name).register_hook(overflow)
    trainer = fp16(stage, steps=4, save_every=4)
    before, after = seen[1], seen[2]
    assert all(torch.equal(before[key], tensor) for key, tensor in after.items())
    assert not torch.equal(before[name], seen[0][name]) and not torch.equal(after[name], seen[3][name])
    assert trainer.accelerator.scaler.get_scale() == 2.0**7 and trainer.state.skipped == 0


def test_fp16_stops_when_the_data_stay_bad(fp16):
    """NaN for ever halves the scale for ever; that is not a search any more."""
    with pytest.raises(TrainingError, match="key-"):
        fp16(ToyStage(poison=range(6, 200)), steps=100)


def test_fp16_resumes_with_its_scale(fp16, run, tmp_path):
    clean = tmp_path / "clean"
    clean.mkdir()
    options = {"scale": 2.0**20, "save_every": 2}
    fp16(ToyStage(), clean, steps=16, **options)
    fp16(ToyStage(), run, steps=8, **options)
    assert fp16(ToyStage(), run, steps=16, **options).step == 16
    ours, theirs = (
        [(row["step"], row.get("loss")) for row in metrics.read(folder)] for folder in (run, clean)
    )
    assert ours == theirs and len(ours) == 16
    assert theirs[0][1] is None and None not in dict(theirs[8:]).values()  # the search was before the resume


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_fp16_with_two_optimisers_scales_both_alike(fp16, tmp_path):
    """Moments hold gradients as they are: the same whatever the scale was."""
    moments = []
    for scale in (1.0, 2.0**8):
        torch.manual_seed(0)
        stage = PremadeStage(
            EMMDiT(from_dict(ModelConfig, {**MICRO, "attention": CYCLE, "gate_init": "one"}))
        )
        stage.phases[0].optim.__dict__["kind"] = "muon"
        folder = tmp_path / f"scale-{scale:g}"
        folder.mkdir()
        trainer = fp16(stage, folder, scale=scale, steps=1)
        (adamw,) = [
            o.optimizer for o in trainer.state.optimizers[0] if isinstance(o.optimizer, torch.optim.AdamW)
        ]
        moments.append(
            [adamw.state[p]["exp_avg"].norm().item() for group in adamw.param_groups for p in group["params"]]
        )
    assert max(moments[0]) > 0 and moments[1] == pytest.approx(moments[0], rel=0.05, abs=1e-6)


if __name__ == "__main__":
    cli.leave(cli.run(lambda: two_processes(Path(sys.argv[1]))))
