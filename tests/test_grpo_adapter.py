"""LoRA on E-MMDiT: unchanged at the start, exact in files of ours and under the released names, on and off."""

import json

import peft
import pytest
import torch
from conftest import DATA
from torch import nn

from nitro_e.config import ConfigError, from_dict
from nitro_e.interfaces import TextEmbedding
from nitro_e.model import EMMDiT, ModelConfig
from nitro_e.model.lora import merge_lora
from nitro_e.model.released import from_released, to_released
from nitro_e.stages.adapter import (
    AdapterConfig,
    Stacked,
    add_adapter,
    dense,
    has_adapter,
    save_adapter,
    without_adapter,
)

CONFIG = ModelConfig(latent_channels=4, text_width=16, width=32, heads=2, groups=(1, 2, 1), mlp_ratio=2.0)
SMALL = AdapterConfig(rank=4, alpha=8.0)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = EMMDiT(CONFIG)
    nn.init.normal_(model.out.weight, std=0.1)
    return model


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(2, 16, 16, generator=generator)
    x = torch.randn(2, 4, 16, 16, generator=generator)
    return x, torch.tensor([0.3, 0.8]), TextEmbedding(tokens, torch.ones(2, 16, dtype=torch.bool))


@torch.no_grad()
def stir(model, std=0.1):
    """Give every B values, as training would."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("targets", ["attention", "blocks"])
def test_starts_as_the_model_and_returns_to_it_bit_for_bit(model, inputs, targets):
    before = model(*inputs)
    add_adapter(model, AdapterConfig(rank=4, alpha=8.0, targets=targets), seed=0)
    assert has_adapter(model) and torch.equal(model(*inputs), before)
    names = trainable(model)
    assert names and all("lora_" in name for name in names)
    stir(model)
    assert not torch.allclose(model(*inputs), before, atol=1e-3)
    with without_adapter(model) as base, torch.no_grad():
        assert torch.equal(base(*inputs), before)
    assert trainable(model) == names
    assert not torch.allclose(model(*inputs), before, atol=1e-3)


def test_size_of_the_published_recipe():
    with torch.device("meta"):
        model = EMMDiT(ModelConfig())
    add_adapter(model.to_empty(device="cpu"), AdapterConfig(), seed=0)
    layers = [name for name in trainable(model) if "lora_A" in name]
    assert len(layers) == 24 * 8 - 1
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 191 * 2 * 32 * 768


def test_init_is_gaussian_and_depends_on_the_seed_alone(model):
    import copy

    others = [copy.deepcopy(model) for _ in range(2)]
    torch.manual_seed(123)
    state = torch.get_rng_state()
    for net, seed in zip([model, *others], (0, 0, 1)):
        add_adapter(net, AdapterConfig(rank=8), seed)
        torch.rand(3)
    weights = [
        torch.cat([p.flatten() for name, p in net.named_parameters() if "lora_A" in name])
        for net in (model, *others)
    ]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert weights[0].std().item() == pytest.approx(1 / 8, rel=0.05)
    torch.set_rng_state(state)


@pytest.mark.parametrize("targets", ["attention", "blocks"])
def test_merged_weights_are_the_adapted_model(model, inputs, targets):
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    add_adapter(model, AdapterConfig(rank=4, alpha=8.0, targets=targets), seed=0)
    plain = dense(model)
    assert all(torch.equal(plain.state_dict()[name], tensor) for name, tensor in original.items())
    stir(model)
    merged = dense(model)
    assert type(merged) is EMMDiT and not any(isinstance(m, Stacked) for m in merged.modules())
    assert torch.allclose(merged(*inputs), model(*inputs), atol=2e-6)


class ReleasedNames(nn.Module):
    """Linear layers under the released names: what PEFT sees of the released implementation."""

    def __init__(self, state):
        super().__init__()
        self.config = {}
        for name, tensor in state.items():
            if name.endswith(".weight") and tensor.ndim == 2 and name[: -len("weight")] + "bias" in state:
                *parents, last = name.split(".")[:-1]
                module = self
                for part in parents:
                    if part not in module._modules:
                        module.add_module(part, nn.Module())
                    module = module._modules[part]
                layer = nn.Linear(tensor.shape[1], tensor.shape[0])
                layer.weight.data, layer.bias.data = tensor.clone(), state[name[:-6] + "bias"].clone()
                module.add_module(last, layer)

    def forward(self):
        raise NotImplementedError


@pytest.mark.parametrize("targets", ["attention", "blocks"])
def test_saved_adapter_merges_in_peft_and_here_to_the_same_weights(model, inputs, targets, tmp_path):
    base = to_released(model)
    add_adapter(model, AdapterConfig(rank=4, alpha=8.0, targets=targets), seed=0)
    stir(model)
    save_adapter(model, tmp_path / "lora", base="amd/Nitro-E")
    theirs = peft.PeftModel.from_pretrained(ReleasedNames(base), str(tmp_path / "lora")).merge_and_unload()
    ours = to_released(dense(model))
    changed = 0
    for name, tensor in theirs.state_dict().items():
        assert torch.allclose(tensor, ours[name], atol=1e-6), name
        changed += not torch.equal(tensor, base[name])
    layers_of_a_block = 8 if targets == "attention" else 12
    assert changed == CONFIG.depth * layers_of_a_block - (1 if targets == "attention" else 3)
    merged = merge_lora(base, tmp_path / "lora")
    again = EMMDiT(CONFIG)
    again.load_state_dict(from_released(merged, CONFIG))
    assert torch.allclose(again(*inputs), model(*inputs), atol=2e-6)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["lora_alpha"] == 8 and "attn.to_q" in config["target_modules"]
    files = [
        (tmp_path / "lora" / name).read_bytes()
        for name in ("adapter_config.json", "adapter_model.safetensors")
    ]
    save_adapter(model, tmp_path / "twice", base="amd/Nitro-E")
    assert files == [
        (tmp_path / "twice" / name).read_bytes()
        for name in ("adapter_config.json", "adapter_model.safetensors")
    ]


def test_going_on_from_a_saved_adapter(model, inputs, tmp_path):
    import copy

    other = copy.deepcopy(model)
    add_adapter(model, AdapterConfig(rank=4, alpha=8.0, targets="blocks"), seed=0)
    stir(model)
    save_adapter(model, tmp_path / "lora")
    add_adapter(other, AdapterConfig(init_from=str(tmp_path / "lora")), seed=5)  # its rank, alpha and targets
    assert torch.equal(other(*inputs), model(*inputs)) and trainable(other) == trainable(model)
    save_adapter(other, tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "lora" / name).read_bytes()
    small = EMMDiT(
        ModelConfig(
            latent_channels=4,
            text_width=16,
            width=32,
            heads=2,
            groups=(0, 0, 1),
            mlp_ratio=2.0,
            compression=(),
            position_reinforcement=False,
        )
    )
    with pytest.raises(ConfigError, match="block_groups"):
        add_adapter(small, AdapterConfig(init_from=str(tmp_path / "lora")), seed=0)
    with pytest.raises(ConfigError, match="adapter_config.json"):
        add_adapter(EMMDiT(CONFIG), AdapterConfig(init_from=str(tmp_path / "nothing")), seed=0)


def test_an_adapter_made_for_the_released_model_goes_on_here(reference_model, released_state):
    """The adapter of the tests' reference files, made by PEFT on the released names."""
    folder = DATA / "lora_tiny_512"
    add_adapter(reference_model, AdapterConfig(init_from=str(folder)), seed=0)
    expected = from_released(merge_lora(released_state, folder), reference_model.config)
    for name, tensor in dense(reference_model).state_dict().items():
        assert torch.allclose(tensor, expected[name], atol=1e-6), name


def test_models_without_a_released_format_have_adapters_too(tmp_path):
    """As `configs/shapes` do: their adapter goes on here, and is merged by hand from its file."""
    from safetensors.torch import load_file

    config = from_dict(ModelConfig, {"preset": "micro-8", "latent_channels": 8, "text_width": 16})
    model = EMMDiT(config)
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    add_adapter(model, SMALL, seed=0)
    stir(model)
    save_adapter(model, tmp_path / "lora")
    factors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    name = "base_model.model.block_groups.1.1.attn.to_k"
    update = 2 * factors[f"{name}.lora_B.weight"] @ factors[f"{name}.lora_A.weight"]
    merged, width = dense(model).state_dict()["blocks.2.image.attention.qkv.weight"], config.width
    expected = first["blocks.2.image.attention.qkv.weight"][width : 2 * width] + update
    assert torch.allclose(merged[width : 2 * width], expected, atol=1e-6)


def test_bad_adapters():
    for options in ({"rank": 0}, {"alpha": 0.0}):
        with pytest.raises(ConfigError, match="above 0|at least 1"):
            AdapterConfig(**options)
