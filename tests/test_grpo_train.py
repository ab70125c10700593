"""GRPO through `train.py`: a small E-MMDiT with LoRA, with all weights, and with NFT; its files, resume, and a rising reward."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from nitro_e import config
from nitro_e.cli import train
from nitro_e.config import ConfigError
from nitro_e.model import EMMDiT, ModelConfig
from nitro_e.model.pretrained import load_pretrained, save_pretrained
from nitro_e.record import metrics, run_folder
from nitro_e.rewards import reward
from nitro_e.stages.adapter import AdapterConfig, add_adapter, dense, save_adapter
from nitro_e.stages.grpo import GRPO
from nitro_e.stages.recipe import RunConfig

ROOT = Path(__file__).parent.parent

RECIPE = """
name: toy
init_from: BASE
model: {preset: micro-8, gate_init: one}
stage:
  kind: grpo
  prompts: {source: shapes-train, num: 8}
  rewards: [{name: "test_grpo_train:greenness", label: green}, {name: shapes, weight: 0}, {name: "test_grpo_train:Taste", label: taste, weight: 0}]
  groups: 2
  group_size: 8
  updates: 2
  rollout: {steps: 6, guidance_scale: 2.0, window: {size: 3}}
  adapter: {rank: 4, alpha: 8}
  optim: {lr: 5e-3, warmup: 0, weight_decay: 0.0}
components: {codec: dct-f8c24, text: hash}
engine: {steps: 4, save_every: 2, sample_every: 4, log_every: 1, precision: float32, tracker: none, ema: {beta: 0.9}}
sampling: {resolution: 64, steps: 2, guidance_scale: 2.0}
"""


@reward
def greenness(pixels, prompts, info):
    """Mean green less mean red."""
    return (pixels[:, 1] - pixels[:, 0]).mean(dim=(1, 2))


@reward
class Taste(torch.nn.Module):
    """Has weights."""

    source = "taste-v1"

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))

    def forward(self, pixels, prompts, info):
        return pixels.mean(dim=(2, 3)) @ self.weight


@pytest.fixture
def recipe(tmp_path) -> Path:
    torch.manual_seed(0)
    model = EMMDiT(
        config.from_dict(ModelConfig, {"preset": "micro-8", "latent_channels": 24, "text_width": 128})
    )
    torch.nn.init.normal_(model.out.weight, std=0.02)
    save_pretrained(model, tmp_path / "base")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("BASE", str(tmp_path / "base")))
    return path


def run_train(recipe: Path, run: Path, *overrides: str) -> int:
    return train.main([str(recipe), f"run={run}", *overrides])


@pytest.mark.parametrize(
    "options", [["FIRST ADAPTER"], ["stage.adapter=null"], ["stage.algorithm={kind: nft, times: 3}"]]
)
def test_train_and_resume(recipe, tmp_path, options):
    clean, run = tmp_path / "clean", tmp_path / "run"
    if options == ["FIRST ADAPTER"]:  # of another rank than the recipe's
        first = load_pretrained(tmp_path / "base")
        add_adapter(first, AdapterConfig(rank=3, alpha=5.0), seed=0)
        save_adapter(first, tmp_path / "first")
        options = [f"stage.adapter.init_from={tmp_path / 'first'}"]
    assert run_train(recipe, clean, *options) == 0
    assert run_train(recipe, run, *options, "engine.steps=2") == 0
    recipe.write_text(recipe.read_text().replace("init_from", "# init_from"))  # a resume needs it no more
    shutil.rmtree(tmp_path / "first", ignore_errors=True)
    assert run_train(recipe, run, *options) == 0
    rows = [
        [
            {name: row.get(name) for name in ("step", "loss", "reward/green", "kl")}
            for row in metrics.read(folder)
        ]
        for folder in (clean, run)
    ]
    assert rows[0] == rows[1] and [row["step"] for row in rows[0]] == [1, 2, 3, 4]
    assert (run / "samples" / "step-0000004-samples.png").is_file()
    judges = [event["judges"] for event in metrics.read_events(run) if event["event"] == "notes"]
    assert len(judges) == 2 and judges[0] == judges[1] and judges[0]["taste"].startswith("taste-v1 ")

    for part in ("policy", "ema"):
        ours, theirs = (
            torch.load(run_folder.folder_of(folder, 4) / "trainer" / f"{part}.pt", weights_only=True)[
                "module"
            ]
            for folder in (clean, run)
        )
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)

    last = run_folder.latest(run)
    base, trained = load_pretrained(tmp_path / "base"), load_pretrained(last / "model")
    assert any(not torch.equal(a, b) for a, b in zip(base.parameters(), trained.parameters()))
    assert (
        (last / "ema" / "adapter").is_dir()
        == (last / "model" / "adapter").is_dir()
        == (options != ["stage.adapter=null"])
    )
    if options != ["stage.adapter=null"]:  # the adapter, put on the base, is the published model
        add_adapter(base, AdapterConfig(init_from=str(last / "model" / "adapter")), seed=3)
        for name, tensor in dense(base).state_dict().items():
            assert torch.allclose(tensor, trained.state_dict()[name], atol=1e-6), name


def test_rollouts_and_sample_grids_of_several_sizes(recipe, tmp_path, capsys):
    run, sizes = tmp_path / "run", "stage.buckets=[64x64, 32x128]"
    options = ["stage.updates=1", "stage.group_size=2", "engine.steps=2", "prompts=[a red circle]"]
    assert run_train(recipe, run, sizes, *options) == 0
    assert Image.open(run / "samples/step-0000002-samples-32x128.png").width >= 128
    assert len([row for row in metrics.read(run) if "reward/green" in row]) == 2
    assert run_train(recipe, tmp_path / "bad", "stage.buckets=[40x96]") == 2
    assert "stage.buckets: 40x96: " in capsys.readouterr().err


def test_a_checkpoint_of_an_adapter_holds_the_adapter_alone(recipe, tmp_path, monkeypatch, capsys):
    """What lies in the middle of a run is small and whole all the same; a run that kept everything goes on."""
    clean, old = tmp_path / "clean", tmp_path / "old"
    assert run_train(recipe, clean) == 0
    middle, last = (run_folder.folder_of(clean, step) for step in (2, 4))
    for name in ("policy", "ema"):
        state = torch.load(middle / "trainer" / f"{name}.pt", weights_only=True)["module"]
        assert state and all(".lora_" in key for key in state)
    assert not list(middle.rglob("model.safetensors")) and len(list(last.rglob("model.safetensors"))) == 2
    size = lambda folder: sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())  # noqa: E731
    assert size(middle) < size(last) / 3
    # merged on loading, with the sums of training
    base = load_pretrained(tmp_path / "base")
    for name in ("model", "ema"):
        found = load_pretrained(middle / name)
        other = load_pretrained(tmp_path / "base")
        add_adapter(other, AdapterConfig(init_from=str(middle / name / "adapter")), seed=3)
        for key, tensor in dense(other).state_dict().items():
            assert torch.equal(found.state_dict()[key], tensor), key
        assert any(not torch.equal(a, b) for a, b in zip(found.parameters(), base.parameters()))

    # checkpoints of before: everything in them, nothing in RUN/base
    with monkeypatch.context() as patch:
        patch.setattr(GRPO, "is_frozen", lambda stage, name: False)
        assert run_train(recipe, old, "engine.steps=2") == 0
    assert not (old / "base").exists() and size(run_folder.folder_of(old, 2)) > size(last)
    assert run_train(recipe, old) == 0
    ours, theirs = (
        torch.load(run_folder.folder_of(run, 4) / "trainer" / "policy.pt", weights_only=True)
        for run in (old, clean)
    )
    assert all(torch.equal(ours["module"][key], theirs["module"][key]) for key in theirs["module"])

    other = load_pretrained(tmp_path / "base")
    torch.nn.init.normal_(other.out.weight)
    save_pretrained(other, clean / "base")
    assert run_train(recipe, clean, "engine.steps=6") == 3
    assert "missing or not what was written" in capsys.readouterr().err
    shutil.rmtree(clean / "base")
    with pytest.raises(ConfigError, match="holds an adapter alone"):
        load_pretrained(middle / "model")


def test_dry_run_and_bad_input(recipe, tmp_path, capsys):
    assert train.main([str(recipe), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "2 of 2 prompts x 8 images, 2 updates each" in out and "24 rows" in out
    assert train.main([str(recipe), "stage.adapter.init_from=nowhere", "--dry-run"]) == 2
    assert "stage.adapter.init_from: folder 'nowhere' does not exist" in capsys.readouterr().err
    for overrides, message in [
        (["engine.steps=3"], "engine.steps"),
        (["engine.save_every=3"], "engine.save_every"),
        (["stage.updates=3", "engine.steps=3", "engine.save_every=3"], "stage.group_size"),
        (["data={shards: [a.tar], resolution: 64}"], "leave data out"),
        (["stage.kind=gpro"], "did you mean 'grpo'"),
        (["components.vision=dinov2-b14"], "components.vision"),
        (["stage.advantage.diversity=true"], "set components.vision, or diversity: false"),
        (
            ["batch.per_device=5"],
            "the batch of 24 rows is not a multiple of 5 x 1 processes; set batch.per_device to 4 or 6",
        ),
        (["engine.accumulate=5"], "engine.accumulate 5: recipes no longer"),
        (["batch=8"], "batch.global 8: stage.kind 'grpo'"),
        (["stage.rewards=[{name: shape}]"], "did you mean 'shapes'"),
        (["engine.posthoc_ema={}"], "posthoc"),
        (["stage.prompts=none.txt"], "none.txt"),
    ]:
        assert run_train(recipe, tmp_path / "bad", *overrides) == 2
        assert message in capsys.readouterr().err, message
    with pytest.raises(ConfigError, match="data"):
        config.from_dict(
            RunConfig, {**config.yaml.safe_load(recipe.read_text()), "stage": {"kind": "flow_matching"}}
        )


def test_a_vision_encoder_tells_how_different_images_are(recipe, tmp_path):
    """The option through the command, with the offline domain's encoder: the same images, other updates."""
    short = ["engine.steps=2", "engine.sample_every=0"]
    vision = ["stage.advantage.diversity=true", "components.vision=shapes-vit"]
    assert run_train(recipe, tmp_path / "plain", *short) == 0
    assert run_train(recipe, tmp_path / "diverse", *short, *vision) == 0
    (plain, *_), (diverse, *_) = (metrics.read(tmp_path / name) for name in ("plain", "diverse"))
    assert plain["reward/green"] == diverse["reward/green"] and plain["diversity"] == diverse["diversity"]
    assert plain["grad_norm"] != diverse["grad_norm"] and diverse["seconds/vision"] > 0


def test_held_out_scores_the_best_weights_and_what_the_report_shows(recipe, tmp_path, capsys):
    evaluation = (
        "evaluation={prompts: {source: shapes-heldout, num: 12}, rewards: [{name: 'test_grpo_train:greenness', "
        "label: green}], every: 2, best: green, guard: {green: 9}}"
    )
    run = tmp_path / "run"
    assert run_train(recipe, run, evaluation) == 0
    rows = {row["step"]: row for row in metrics.read(run) if "eval/green" in row}
    assert list(rows) == [0, 2, 4]
    assert all(row["eval/green/low"] <= row["eval/green"] <= row["eval/green/high"] for row in rows.values())
    best = max(rows, key=lambda step: rows[step]["eval/green"])
    kept = run_folder.model_folder(f"{run}@best")
    assert run_folder.step_of(kept) == best and run_folder.folder_of(run, best) in run_folder.complete(run)
    published = load_pretrained(run_folder.folder_of(run, best) / "ema").state_dict()
    assert all(
        torch.equal(tensor, published[name]) for name, tensor in load_pretrained(kept).state_dict().items()
    )
    # the rewards are what one sees: on the progress line, first in the report, and as images
    assert re.search(r"grpo 4/4  green -?0\.\d+  kl [\d.e-]+  grad_norm", capsys.readouterr().err)
    titles = re.findall(r'aria-label="([^"]*)"', (run / "report.html").read_text())
    assert titles[:7] == [
        "Score: green, by task",
        "Score: green, seen and unseen combinations",
        "Reward: green",
        "Reward: taste",
        "KL to the reference, of velocities",
        "Diversity of a prompt&#39;s images",
        "Loss",
    ]
    assert (
        "Never changed: " in (run / "report.html").read_text()
        and "zero_std_ratio" in (run / "report.html").read_text()
    )
    for name, sign in (("best", 1), ("worst", -1)):
        with Image.open(run / "samples" / f"step-0000004-rollout-{name}.png") as sheet:
            sheet.load()
            said = [text for _, text in metrics.cells(sheet)]
        greens = [sign * float(re.search(r"green (-?[\d.e-]+),", text)[1]) for text in said]
        assert len(said) == 8 and greens == sorted(greens, reverse=True)
    assert run_train(recipe, tmp_path / "bad", evaluation, "evaluation.every=3") == 2
    assert "evaluation.every 3 must be a multiple of 2" in capsys.readouterr().err


@pytest.mark.slow
def test_a_small_model_learns_to_be_green(recipe, tmp_path):
    """30 rollouts with LoRA, guidance and an average raise the reward by more than 2 within-group standard deviations."""
    options = ["engine.steps=60", "engine.save_every=60", "engine.sample_every=0", "stage.group_size=16"]
    assert run_train(recipe, tmp_path / "run", *options) == 0
    rows = [row for row in metrics.read(tmp_path / "run") if "reward/green" in row]
    assert rows[-1]["reward/green"] > rows[0]["reward/green"] + 2 * rows[0]["reward/green/within_std"]
