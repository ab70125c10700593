"""A model that is not in the package goes through all four stages, sampling, counting and packing."""

import copy
import json
import sys

import pytest
import torch
import yaml
from plain_dit import PlainConfig, PlainDiT

from nitro_e.cli import describe, synthesize, train
from nitro_e.config import ConfigError, class_of_kind, from_dict
from nitro_e.data.making import write_shard
from nitro_e.interfaces import Architecture, TextEmbedding
from nitro_e.model import ModelConfig
from nitro_e.model.cpu.packing import pack_for_cpu
from nitro_e.model.pretrained import load_pretrained, save_pretrained
from nitro_e.record import metrics, run_folder
from nitro_e.rewards import reward
from nitro_e.sampling.pipeline import TextToImage

MODEL = {"kind": "plain_dit:PlainConfig", "width": 32, "latent_channels": 24, "text_width": 128}
DATA = {"resolution": 64, "workers": 0}
ENGINE = {
    "steps": 2,
    "save_every": 2,
    "sample_every": 0,
    "log_every": 1,
    "precision": "float32",
    "tracker": "none",
    "ema": None,
}
HEADS = {"start": 0, "ramp": 0, "heads": {"width": 16}, "r1": {"sigma": 0.05, "weight": 200}}


@reward
def greenness(pixels, prompts, info):
    """Mean green less mean red."""
    return (pixels[:, 1] - pixels[:, 0]).mean(dim=(1, 2))


def run_stage(folder, name, stage, **keys):
    """Train two steps; returns the run directory."""
    recipe = {
        "name": name,
        "run": str(folder / name),
        "model": MODEL,
        "stage": stage,
        "components": {"codec": "dct-f8c24", "text": "hash"},
        "engine": ENGINE,
        "sampling": {"resolution": 64, "steps": 1, "guidance_scale": 1},
        "prompts": ["a red square"],
        **({"batch": 4} if "data" in keys else {}),
        **keys,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert train.main([str(path)]) == 0
    assert [row["step"] for row in metrics.read(folder / name)] == [1, 2]
    return folder / name


def weights(run):
    model = load_pretrained(run_folder.model_folder(run))
    assert type(model) is PlainDiT
    return model.state_dict()


def test_all_stages_train_a_plain_dit(tmp_path, capsys):
    from test_train import samples

    write_shard(tmp_path / "toy-000000.tar", samples())
    data = {**DATA, "shards": [f"{tmp_path}/toy-*.tar"]}
    components = {"codec": "dct-f8c24", "text": "hash", "vision": "shapes-vit"}
    optim = {"lr": 2e-3, "warmup": 0}

    repa = {"kind": "flow_matching", "repa": {"taps": [2], "width": 16}, "optim": optim}
    first = run_stage(tmp_path, "pretrain", repa, data=data, components=components)
    finetune = {"kind": "flow_matching", "optim": optim}
    second = run_stage(tmp_path, "finetune", finetune, data=data, init_from=str(first))
    assert any(not torch.equal(a, b) for a, b in zip(weights(first).values(), weights(second).values()))

    (tmp_path / "prompts.txt").write_text("a red square\na blue square\n")
    grpo = {
        "kind": "grpo",
        "prompts": {"source": str(tmp_path / "prompts.txt")},
        "rewards": [{"name": "test_plain_dit:greenness"}],
        "groups": 1,
        "group_size": 4,
        "updates": 1,
        "rollout": {"steps": 3, "guidance_scale": 2.0, "window": {"size": 2}},
        "optim": optim,
    }
    for name, adapter in (("lora", {"rank": 2, "alpha": 4, "targets": "blocks"}), ("all", None)):
        third = run_stage(tmp_path, name, {**grpo, "adapter": adapter}, init_from=str(second))
        before, after = weights(second), weights(third)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert "blocks.0.cross_kv.weight" in changed
        assert all(name.startswith("blocks.") for name in changed) == (adapter is not None)

    command = [second, "--prompts", tmp_path / "prompts.txt", "--per-prompt", 4, "--grid", "linear"]
    assert synthesize.main([str(part) for part in [*command, "--steps", 2, "--out", tmp_path / "pairs"]]) == 0
    distill = {
        "kind": "distill",
        "preset": "ladd4",
        "teacher": str(second),
        "guards": None,
        "adversarial": HEADS,
    }
    optim = {"lr": 1e-3, "betas": [0, 0.99], "warmup": 0}
    pairs = {**DATA, "shards": [f"{tmp_path}/pairs/*.tar"]}
    fourth = run_stage(tmp_path, "distill", {**distill, "optim": optim}, data=pairs)
    assert (
        json.loads((run_folder.model_folder(fourth) / "config.json").read_text())["model"]["kind"]
        == MODEL["kind"]
    )

    images = TextToImage.from_pretrained(fourth)("a red square", seeds=1).images
    assert images[0].size == (64, 64)
    capsys.readouterr()
    assert describe.main([str(tmp_path / "finetune.yaml")]) == 0
    assert "| blocks" in capsys.readouterr().out
    assert train.main([str(tmp_path / "finetune.yaml"), "--dry-run"]) == 0
    assert "kind: plain_dit:PlainConfig" in capsys.readouterr().out


def plain():
    torch.manual_seed(0)
    return from_dict(Architecture, MODEL).build()


def inputs():
    text = TextEmbedding(torch.randn(2, 16, 128), torch.ones(2, 16, dtype=torch.bool))
    return torch.randn(2, 24, 8, 8), torch.rand(2), text


def test_it_is_packed_and_what_it_lacks_is_said():
    model = plain()
    with torch.no_grad():
        expected = model.bfloat16()(*inputs_of_seed())
        try:
            packed = pack_for_cpu(copy.deepcopy(model))
        except ConfigError as error:
            pytest.skip(str(error))
        torch.testing.assert_close(packed(*inputs_of_seed()), expected, rtol=0.1, atol=0.05)
    with pytest.raises(ConfigError, match="'plain_dit:PlainConfig' offers no compiled blocks"):
        model.compile_blocks()
    with pytest.raises(
        ConfigError, match="offers no gradient checkpointing; set engine.gradient_checkpointing"
    ):
        model.gradient_checkpointing = True
    model.gradient_checkpointing = False


def inputs_of_seed():
    torch.manual_seed(1)
    return inputs()


def test_kinds(tmp_path, monkeypatch):
    # recipes and weights from before there were kinds
    assert type(from_dict(Architecture, {})) is ModelConfig
    assert type(from_dict(Architecture, {"kind": "emmdit", "preset": "tiny-8"})) is ModelConfig
    assert type(from_dict(Architecture, MODEL)) is PlainConfig
    for kind, message in {
        "emdit": "model.kind: unknown kind 'emdit', did you mean 'emmdit'",
        "no_such:Thing": "cannot import 'no_such'",
        "plain_dit:PlainDiT": "is no subclass of nitro_e.interfaces.Architecture",
        "os:system": "is no subclass",
    }.items():
        with pytest.raises(ConfigError, match=message):
            from_dict(Architecture, {"kind": kind}, "model")
    with pytest.raises(ConfigError, match="unknown key 'model.groups'"):
        from_dict(Architecture, {**MODEL, "groups": [1, 2, 1]}, "model")

    # weights may be a stranger's: they import nothing
    save_pretrained(plain(), tmp_path / "mine")
    monkeypatch.delitem(sys.modules, "plain_dit")
    with pytest.raises(ConfigError, match="import plain_dit before"):
        load_pretrained(tmp_path / "mine")
    assert "plain_dit" not in sys.modules
    with pytest.raises(ConfigError, match="unknown kind 3"):
        class_of_kind(Architecture, 3)
