"""The released weight format in and out, LoRA adapters, and `tools/convert.py`."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import DATA, as_text
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import nitro_e.cli.convert
from nitro_e.config import ConfigError, from_dict
from nitro_e.model import EMMDiT, ModelConfig, released
from nitro_e.model.lora import merge_lora
from nitro_e.model.pretrained import load_pretrained, read_config, save_pretrained
from nitro_e.sampling.sources import Use

LORA = DATA / "lora_tiny_512"


@pytest.fixture
def convert():
    return nitro_e.cli.convert.main


@pytest.fixture
def released_file(released_state, tmp_path) -> Path:
    """The tiny reference weights in the released format, REPA projector included."""
    path = tmp_path / "tiny-512px.safetensors"
    save_file(released_state, path)
    return path


def without_projector(state: dict) -> dict:
    return {name: tensor for name, tensor in state.items() if not name.startswith("projectors.")}


def assert_equal_states(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]), name


# ---- names, shapes, positions


@pytest.mark.parametrize("resolution", [512, 1024])
def test_names_and_shapes_of_the_released_models(resolution):
    manifest = json.loads((DATA / "nitro_e_state_dict_manifest.json").read_text())[str(resolution)]
    config = from_dict(ModelConfig, {"preset": f"nitro-e-{resolution}"})
    assert released.released_shapes(config) == {name: tuple(shape) for name, (shape, _) in manifest.items()}
    with torch.device("meta"):
        model = EMMDiT(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 302_449_952
    assert {str(parameter.dtype) for parameter in model.parameters()} == {
        dtype for _, dtype in manifest.values()
    }
    state = {name: torch.empty(shape, device="meta") for name, (shape, _) in manifest.items()}
    assert released.infer_config(state, config.base_grid, config.attention) == config


@pytest.mark.parametrize("base_grid, grid", [(16, (16, 16)), (32, (24, 40)), (24, (11, 96))])
def test_position_table_is_that_of_diffusers(base_grid, grid):
    """Bit for bit, uncropped (what the released file stores) and cropped to a grid (what is added)."""
    from diffusers.models.embeddings import PatchEmbed

    config = ModelConfig(width=48, heads=2, base_grid=base_grid, attention=("full",))
    embed = PatchEmbed(
        height=base_grid,
        width=base_grid,
        patch_size=1,
        in_channels=4,
        embed_dim=48,
        interpolation_scale=max(base_grid // 16, 1),
        pos_embed_max_size=96,
    )
    position = EMMDiT(config).position
    assert torch.equal(position.table.reshape(1, -1, 48), embed.pos_embed)
    added = position(torch.zeros(1, grid[0] * grid[1], 48), grid)
    assert torch.equal(added, embed.cropped_pos_embed(*grid))


@pytest.mark.parametrize("width", [48, 96, 768])
def test_mlp_width_survives_its_ratio(width):
    for hidden in range(1, 4 * width, 7):
        assert (
            ModelConfig(width=width, heads=1, mlp_ratio=hidden / width, attention=("full",)).mlp_hidden
            == hidden
        )


# ---- round trips


def test_round_trip_is_exact(released_file, released_state, tmp_path, convert, capsys):
    """Released file -> our folder -> released file; and the folder loads as the file does."""
    folder, back = tmp_path / "ours", tmp_path / "back.safetensors"
    assert convert([str(released_file), str(folder)]) == 0
    assert "left out: 6 tensors of the REPA projector" in capsys.readouterr().out
    assert convert([str(folder), str(back), "--to-released"]) == 0
    assert_equal_states(load_file(back), without_projector(released_state))
    with safe_open(back, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    from_file, from_folder = EMMDiT.from_pretrained(released_file), EMMDiT.from_pretrained(folder)
    assert from_file.config == from_folder.config
    assert_equal_states(from_file.state_dict(), from_folder.state_dict())
    again = tmp_path / "again-512px.safetensors"
    save_file(without_projector(released_state), again)
    assert_equal_states(EMMDiT.from_pretrained(again).state_dict(), from_file.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_round_trip_keeps_half_precision(released_state, tmp_path, dtype):
    state = {name: tensor.to(dtype) for name, tensor in without_projector(released_state).items()}
    save_file(state, tmp_path / "half-512px.safetensors")
    assert_equal_states(released.to_released(load_pretrained(tmp_path / "half-512px.safetensors")), state)


def test_loaded_file_gives_the_reference_velocity(reference, released_file):
    model = EMMDiT.from_pretrained(released_file)
    assert not model.training
    with torch.no_grad():
        velocity = model(
            reference["in.latents"], reference["in.timesteps"] / 1000, as_text(reference["in.text"])
        )
    assert (velocity - reference["out.velocity"]).abs().max() < 1e-5


@pytest.mark.parametrize(
    "name, resolution, expected",
    [
        ("Nitro-E-512px.safetensors", None, (512, 20, 4.5)),
        ("Nitro-E-512px-dist.safetensors", None, (512, 4, 0.0)),
        ("Nitro-E-1024px-dist.safetensors", None, (1024, 4, 0.0)),
        ("other.safetensors", 1024, (1024, 20, 4.5)),
    ],
)
def test_folder_says_how_to_sample(tmp_path, convert, name, resolution, expected, capsys):
    preset = {
        "preset": f"nitro-e-{expected[0]}",
        "width": 16,
        "heads": 2,
        "groups": [1, 1, 1],
        "position_table": 32,
    }
    save_file(released.to_released(EMMDiT(from_dict(ModelConfig, preset))), tmp_path / name)
    options = ["--resolution", str(resolution)] if resolution else []
    assert convert([str(tmp_path / name), str(tmp_path / "ours"), *options]) == 0
    config = read_config(tmp_path / "ours")
    use = from_dict(Use, config["use"])
    assert (use.sampling.resolution, use.sampling.steps, use.sampling.guidance_scale) == expected
    assert use.sampling.grid == "released" and use.codec.name == "dc-ae-f32c32"
    assert use.text.name == "llama-3.2-1b" and use.text.clean_caption
    assert config["model"] == from_dict(ModelConfig, preset)
    size, steps, guidance = expected
    said, guided = capsys.readouterr().out, f"guidance {guidance}" if guidance else "no guidance"
    assert f"sampled in {steps} steps of euler, {guided}, {size}x{size} px" in said
    assert ("distilled weights have -dist" in said) == (steps == 20)

    # what the command line says about sampling is what the folder says
    given = [*options, "--steps", "3", "--guidance", "1.5", "--sampler", "heun"]
    assert convert([str(tmp_path / name), str(tmp_path / "set"), *given]) == 0
    use = from_dict(Use, read_config(tmp_path / "set")["use"])
    assert (use.sampling.steps, use.sampling.guidance_scale, use.sampling.sampler) == (3, 1.5, "heun")
    assert "sampled in 3 steps of heun, guidance 1.5" in capsys.readouterr().out


def test_what_the_released_format_cannot_say_is_told_or_refused(released_file, tmp_path, convert, capsys):
    model = EMMDiT.from_pretrained(released_file)
    for name, scale in (("four", 1.0), ("half", 0.5)):
        use = {"sampling": {"sigmas": [[1.0], [1.0, 0.5]], "sampler": "renoise", "time_scale": scale}}
        save_pretrained(model, tmp_path / name, use)
    assert convert([str(tmp_path / "four"), str(tmp_path / "four.safetensors"), "--to-released"]) == 0
    assert "times (1) or (1, 0.5), sampler renoise, guidance 1" in capsys.readouterr().out
    assert convert([str(tmp_path / "half"), str(tmp_path / "half.safetensors"), "--to-released"]) == 2
    assert "time_scale 0.5" in capsys.readouterr().err
    assert not (tmp_path / "half.safetensors").exists()


def test_run_directories_convert(released_file, released_state, tmp_path, convert):
    checkpoint = tmp_path / "run" / "checkpoints" / "step-0000010"
    save_pretrained(EMMDiT.from_pretrained(released_file), checkpoint / "model", {"sampling": {}})
    (checkpoint / "meta.json").write_text("{}")
    assert convert([str(tmp_path / "run@model"), str(tmp_path / "out.safetensors"), "--to-released"]) == 0
    assert_equal_states(load_file(tmp_path / "out.safetensors"), without_projector(released_state))
    assert convert([f"{checkpoint}@model", str(tmp_path / "out")]) == 0  # without its run's config.yaml


# ---- the hub


def test_hub_files_folders_and_adapters(hub, released_file, tmp_path, convert):
    folder = tmp_path / "hub"
    folder.mkdir()
    shutil.copy(released_file, folder / "Nitro-E-512px.safetensors")
    shutil.copytree(LORA, folder / "ckpt_grpo_512px")
    commit = hub.publish("amd/Nitro-E", folder)
    base = EMMDiT.from_pretrained("amd/Nitro-E", file="Nitro-E-512px.safetensors")
    assert not any("ckpt_grpo" in path for path in hub.asked)
    merged = EMMDiT.from_pretrained(released_file, lora=LORA).state_dict()
    from_hub = EMMDiT.from_pretrained("amd/Nitro-E", file="Nitro-E-512px.safetensors", lora="ckpt_grpo_512px")
    assert_equal_states(from_hub.state_dict(), merged)
    save_pretrained(base, tmp_path / "ours")
    hub.publish("me/mine", tmp_path / "ours")
    assert_equal_states(EMMDiT.from_pretrained("me/mine").state_dict(), base.state_dict())
    arguments = [
        "amd/Nitro-E",
        str(tmp_path / "out"),
        "--file",
        "Nitro-E-512px.safetensors",
        "--lora",
        "ckpt_grpo_512px",
    ]
    assert convert(arguments) == 0
    assert_equal_states(EMMDiT.from_pretrained(tmp_path / "out").state_dict(), merged)
    origin = json.loads((tmp_path / "out/config.json").read_text())["provenance"]
    assert (origin["repository"], origin["commit"]) == ("amd/Nitro-E", commit)
    hub.publish("amd/Nitro-E", {"Nitro-E-512px.safetensors": b"moved on"})
    assert convert(["amd/Nitro-E", str(tmp_path / "again"), *arguments[2:4], "--revision", commit]) == 0
    assert_equal_states(EMMDiT.from_pretrained(tmp_path / "again").state_dict(), base.state_dict())


def test_hub_errors_are_one_line(hub):
    with pytest.raises(ConfigError, match="hub gives no 'x.safetensors' of that repository: .*404") as error:
        EMMDiT.from_pretrained("amd/Nitro-E", file="x.safetensors")
    assert "\n" not in str(error.value)
    hub.publish("amd/Nitro-E", {"README.md": b""})
    with pytest.raises(ConfigError, match="hub gives no 'x.safetensors' .*: there is no x.safetensors$"):
        EMMDiT.from_pretrained("amd/Nitro-E", file="x.safetensors")
    with pytest.raises(ConfigError, match="'a/b/c' is neither a folder or file here nor a hub id"):
        EMMDiT.from_pretrained("a/b/c")


# ---- LoRA


def test_lora_reference(reference, released_file):
    """The released implementation with the adapter merged by PEFT; the base velocity is far from it."""
    expected = load_file(LORA / "expected.safetensors")["out.velocity"]
    with torch.no_grad():
        velocity = EMMDiT.from_pretrained(released_file, lora=LORA)(
            reference["in.latents"], reference["in.timesteps"] / 1000, as_text(reference["in.text"])
        )
    assert (velocity - expected).abs().max() < 1e-5
    assert (reference["out.velocity"] - expected).abs().max() > 1e-2


def test_lora_merges_into_our_folder_as_into_the_file(released_file, tmp_path):
    save_pretrained(EMMDiT.from_pretrained(released_file), tmp_path / "ours")
    ours, theirs = (
        EMMDiT.from_pretrained(source, lora=LORA).state_dict()
        for source in (tmp_path / "ours", released_file)
    )
    assert_equal_states(ours, theirs)


TARGETS = [
    "block_groups.0.0.attn.to_q",
    "block_groups.0.1.attn.to_q",
    "block_groups.1.10.attn.add_k_proj",
    "block_groups.1.1.ff.net.0.proj",
    "block_groups.2.3.attn.to_out.0",
    "adaln_single.linear",
    "tokencompressor.0.0.body4x.1",
    "pos_embed.proj",
]


class Skeleton(nn.Module):
    """Some linear and convolution layers of the released model under their names, for PEFT to adapt."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name in TARGETS:
            *parents, leaf = name.split(".")
            parent = self
            for part in parents:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent._modules[part]
            weight = state[f"{name}.weight"]
            layer = (
                nn.Linear(*weight.shape[::-1])
                if weight.ndim == 2
                else nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2])
            )
            layer.weight.data, layer.bias.data = weight.clone(), state[f"{name}.bias"].clone()
            parent.add_module(leaf, layer)


@pytest.mark.parametrize(
    "options",
    [
        dict(r=3, lora_alpha=7),
        dict(r=4, lora_alpha=8, use_rslora=True),
        dict(
            r=4,
            lora_alpha=6,
            rank_pattern={"to_q": 2, "block_groups.0.1.attn.to_q": 5, "3.attn.to_out.0": 9},
            alpha_pattern={r"block_groups\.0\..*to_q": 1, "add_k_proj": 32, "linear": 2.5},
        ),
        dict(r=2, lora_alpha=3, use_rslora=True, rank_pattern={"proj": 6}, alpha_pattern={"proj": 5}),
    ],
)
def test_lora_merge_is_that_of_peft(released_state, tmp_path, options):
    import peft

    torch.manual_seed(0)
    adapted = peft.get_peft_model(
        Skeleton(released_state), peft.LoraConfig(target_modules=TARGETS, init_lora_weights=False, **options)
    )
    adapted.save_pretrained(tmp_path)
    merged = merge_lora(released_state, tmp_path)
    theirs = adapted.merge_and_unload().state_dict()
    for name in TARGETS:
        assert (merged[f"{name}.weight"] - released_state[f"{name}.weight"]).abs().max() > 1e-3
        torch.testing.assert_close(merged[f"{name}.weight"], theirs[f"{name}.weight"], rtol=1e-5, atol=1e-6)
    for name in released_state.keys() - {f"{name}.weight" for name in TARGETS}:
        assert merged[name] is released_state[name]


# ---- refusals: one line that names what is wrong


def edited_lora(folder: Path, change=None, **config) -> Path:
    shutil.copytree(LORA, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    if change is not None:
        save_file(
            change(load_file(folder / "adapter_model.safetensors")), folder / "adapter_model.safetensors"
        )
    return folder


FIRST = "base_model.model.block_groups.0.0.attn.to_q"


@pytest.mark.parametrize(
    "message, config, change",
    [
        ("use_dora = True", dict(use_dora=True), None),
        ("bias = 'all'", dict(bias="all"), None),
        ("lora_bias = True", dict(lora_bias=True), None),
        (r"modules_to_save = \['proj_out'\]", dict(modules_to_save=["proj_out"]), None),
        ("target_parameters", dict(target_parameters=["x"]), None),
        ("fan_in_fan_out", dict(fan_in_fan_out=True), None),
        ("init_lora_weights = 'pissa'", dict(init_lora_weights="pissa"), None),
        ("some_future_option = 3", dict(some_future_option=3), None),
        ("peft_type is 'LOHA'", dict(peft_type="LOHA"), None),
        ("r = None in adapter_config.json", dict(r=None), None),
        ("has rank 4, adapter_config.json says 5", dict(r=5), None),
        (
            "target 'block_groups.0.0.attn.to_x' is not in the released model",
            {},
            lambda s: {n.replace("0.0.attn.to_q", "0.0.attn.to_x"): t for n, t in s.items()},
        ),
        (
            "tensor 'base_model.model.proj_out.weight' is not a LoRA factor",
            {},
            lambda s: {**s, "base_model.model.proj_out.weight": torch.zeros(2)},
        ),
        (
            "lora_magnitude_vector' is not a LoRA factor",
            {},
            lambda s: {**s, f"{FIRST}.lora_magnitude_vector": torch.zeros(2)},
        ),
        (
            "'block_groups.0.0.attn.to_q' lacks one of its two",
            {},
            lambda s: {n: t for n, t in s.items() if n != f"{FIRST}.lora_A.weight"},
        ),
        (
            r"LoRA factors \[32, 4\] x \[4, 8\] for a weight \[32, 32\]",
            {},
            lambda s: {**s, f"{FIRST}.lora_A.weight": torch.zeros(4, 8)},
        ),
        ("holds no lora_A / lora_B tensors", {}, lambda s: {}),
        (
            "1 of .* not finite, the first is '.*lora_A",
            {},
            lambda s: {**s, f"{FIRST}.lora_A.weight": torch.full((2, 32), torch.nan)},
        ),
    ],
)
def test_adapters_that_cannot_be_merged_exactly_are_refused(
    released_state, tmp_path, message, config, change
):
    with pytest.raises(ConfigError, match=message) as error:
        merge_lora(released_state, edited_lora(tmp_path / "lora", change, **config))
    assert "\n" not in str(error.value)


def test_alpha_that_two_patterns_disagree_on_is_refused(released_state, tmp_path):
    """PEFT takes the first match but saves the keys sorted: the order is lost."""
    with pytest.raises(ConfigError, match="alpha_pattern gives 'block_groups.0.0.attn.to_q' both 3 and 5"):
        merge_lora(released_state, edited_lora(tmp_path / "lora", alpha_pattern={"to_q": 3, "attn.to_q": 5}))


def test_adapter_folders_that_are_none(released_state, tmp_path):
    with pytest.raises(ConfigError, match="has no adapter_config.json"):
        merge_lora(released_state, tmp_path)
    folder = edited_lora(tmp_path / "lora")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match="adapter_model.safetensors does not exist"):
        merge_lora(released_state, folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        merge_lora(released_state, folder)


@pytest.mark.parametrize(
    "message, change",
    [
        ("1 missing, such as proj_out.bias", lambda s: {n: t for n, t in s.items() if n != "proj_out.bias"}),
        ("1 unknown, such as extra.weight", lambda s: {**s, "extra.weight": torch.zeros(1)}),
        (r"proj_out.bias \[9\] instead of \[8\]", lambda s: {**s, "proj_out.bias": torch.zeros(9)}),
        (
            "2-dimensional tensor 'context_embedder.weight'",
            lambda s: {n: t for n, t in s.items() if n != "context_embedder.weight"},
        ),
        (
            "4-dimensional tensor 'pos_embed.proj.weight'",
            lambda s: {**s, "pos_embed.proj.weight": torch.zeros(32, 8)},
        ),
        ("missing, such as tokencompressor", lambda s: {n: t for n, t in s.items() if "body2x" not in n}),
        (
            "not the table of base_grid 16",
            lambda s: {**s, "pos_embed.pos_embed": s["pos_embed.pos_embed"] + 1e-3},
        ),
        ("torch.int64; weights must be", lambda s: {**s, "proj_out.bias": torch.zeros(8, dtype=torch.long)}),
        ("not in the released format", lambda s: {"a": torch.zeros(1)}),
        (
            "no tensors under 'block_groups.'",
            lambda s: {n: t for n, t in s.items() if not n.startswith("block_groups")},
        ),
    ],
)
def test_files_of_another_format_are_refused(released_state, tmp_path, message, change):
    path = tmp_path / "bad-512px.safetensors"
    save_file(change(dict(released_state)), path)
    with pytest.raises(ConfigError, match=message) as error:
        load_pretrained(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "choice, named",
    [
        (dict(modulation="full"), "modulation affine only; this model has full"),
        (dict(qk_norm=False), "qk_norm True only"),
        (dict(text_mask="real"), "text_mask none only"),
        (dict(compression=(2,)), r"compression \[2, 4\] only; this model has \[2\]"),
        (dict(position_reinforcement=False), "position_reinforcement True only"),
        (dict(attention=("full", "4x1")), "attention"),
    ],
)
def test_models_that_the_released_format_cannot_hold_are_refused(choice, named, tmp_path, convert, capsys):
    model = EMMDiT(ModelConfig(width=16, heads=2, groups=(1, 1, 1), **choice))
    save_pretrained(model, tmp_path / "model")
    assert convert([str(tmp_path / "model"), str(tmp_path / "out.safetensors"), "--to-released"]) == 2
    assert capsys.readouterr().err.startswith("error: the released format has ")
    with pytest.raises(ConfigError, match=named):
        released.to_released(model)


def test_convert_reports_wrong_input_in_one_line(released_file, tmp_path, convert, capsys):
    truncated = tmp_path / "cut-512px.safetensors"
    truncated.write_bytes(released_file.read_bytes()[:5000])
    unnamed = tmp_path / "weights.safetensors"
    shutil.copy(released_file, unnamed)
    (tmp_path / "empty").mkdir()
    cases = {
        "does not exist": [tmp_path / "empty", tmp_path / "o", "--file", "x.safetensors"],
        "give resolution=512 or 1024": [unnamed, tmp_path / "o"],
        "not a readable safetensors file": [truncated, tmp_path / "o"],
        "holds no complete checkpoint": [tmp_path / "empty", tmp_path / "o"],
        "does not exist; give a run, a checkpoint": [tmp_path / "absent", tmp_path / "o"],
        "exists; remove it": [released_file, tmp_path / "empty"],
        "must end in .safetensors": [released_file, tmp_path / "o", "--to-released"],
        "add --to-released": [released_file, tmp_path / "o.safetensors"],
        "is not a folder": [released_file, tmp_path / "o", "--lora", tmp_path / "absent"],
    }
    for message, arguments in cases.items():
        assert convert([str(argument) for argument in arguments]) == 2, message
        error = capsys.readouterr().err
        assert message in error and error.startswith("error: ") and error.count("\n") == 1, error
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cut-512px.safetensors",
        "empty",
        "tiny-512px.safetensors",
        "weights.safetensors",
    ]


def test_folders_that_are_no_model_folders(released_file, tmp_path):
    with pytest.raises(ConfigError, match="has no config.json; of a checkpoint, give model/ or ema/"):
        EMMDiT.from_pretrained(tmp_path)
    save_pretrained(EMMDiT.from_pretrained(released_file), tmp_path / "ours")
    with pytest.raises(ConfigError, match="resolution and config are for files in the released format"):
        EMMDiT.from_pretrained(tmp_path / "ours", resolution=512)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    (tmp_path / "ours" / "config.json").write_text(
        json.dumps({**config, "model": {**config["model"], "width": 64}})
    )
    with pytest.raises(ConfigError, match=r"of another architecture: \d+ misshapen, such as .* instead of "):
        EMMDiT.from_pretrained(tmp_path / "ours")
    (tmp_path / "ours" / "config.json").write_text(json.dumps({**config, "format": 9}))
    with pytest.raises(ConfigError, match="format 9 is not 1"):
        EMMDiT.from_pretrained(tmp_path / "ours")


def test_parameter_count_of_the_tiny_reference(released_state):
    count = sum(
        math.prod(tensor.shape) for name, tensor in released_state.items() if name != "pos_embed.pos_embed"
    )
    assert count == 573_248
