"""Merged text tokens give the velocities of all of them; which may be merged, by a real Llama's null prompt."""

import pytest
import tiny
import torch
import torch.nn.functional as F
from conftest import as_text
from torch import nn

from nitro_e.config import ConfigError
from nitro_e.encoders.components import ComponentConfig, build_text_encoder
from nitro_e.interfaces import TextEmbedding
from nitro_e.model import EMMDiT, ModelConfig, layers
from nitro_e.model.cpu import attention
from nitro_e.model.merging import equal_runs, merge_text
from nitro_e.sampling.caching import ReusedBlocks
from nitro_e.sampling.padding import merge_padding
from nitro_e.sampling.pipeline import TextToImage
from nitro_e.sampling.samplers import guide


def small(**choices) -> EMMDiT:
    """A model away from its zero-initialised parts."""
    torch.manual_seed(0)
    sizes = dict(latent_channels=3, text_width=24, width=48, heads=4, groups=(3, 4, 2), base_grid=16)
    model = EMMDiT(ModelConfig(**{**sizes, **choices}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.requires_grad_(False)


def prompts(length: int, real: list[int]) -> TextEmbedding:
    """Texts of which so many tokens differ and the others are one row again and again."""
    torch.manual_seed(1)
    text = as_text(torch.randn(len(real), length, 24))
    for row, count in enumerate(real):
        text.tokens[row, count:] = text.tokens[row, -1]
        text.mask[row, count:] = False
    return text


def seen_by_blocks(model: nn.Module) -> list[int]:
    """A list that grows by the number of text tokens which each call of the first block sees, of all rows."""
    seen: list[int] = []
    model.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1].shape[:2].numel()))
    return seen


@pytest.mark.parametrize(
    ("choices", "length", "kept"),
    [
        ({}, 64, 64 + 32),  # subregions: runs of 16
        ({"attention": ("full",)}, 64, 64 + 2),
        ({"attention": ("full", "4x1", "2x2")}, 64, 64 + 8),
        ({"attention": ("full", "4x1"), "text_compression": 2}, 64, 64 + 16),
        ({"value_residual": True, "modulation": "full"}, 64, 64 + 32),
        ({"prediction": "data", "compression": (2,)}, 64, 64 + 32),
    ],
    ids=str,
)
def test_merged_tokens_give_the_same_velocity(choices, length, kept):
    """In float64, so that only what is wrong shows; the null prompt has one real token."""
    model = small(**choices).double()
    text = prompts(length, [1, length])
    x, t = torch.randn(1, 3, 16, 16).double().expand(2, -1, -1, -1), torch.full((2,), 0.6).double()
    whole = model(x, t, text)
    seen = seen_by_blocks(model)
    torch.testing.assert_close(merge_padding(model, model.config)(x, t, text), whole, rtol=1e-6, atol=1e-6)
    assert seen == [kept]


def test_a_wrong_count_would_show():
    """The counts matter: with each run counted once the velocity is another one."""
    model = small().double()
    text = prompts(64, [1, 64])
    x, t = torch.randn(2, 3, 16, 16).double(), torch.full((1,), 0.6).double()
    short, order = merge_text(text, model.config.text_multiple)
    wrong = short._replace(groups=tuple(group._replace(copies=1) for group in short.groups))
    right, once = model(x[order], t, short), model(x[order], t, wrong)
    assert (right - once).abs().max() > 1e-3


def test_rows_of_several_lengths_keep_their_order():
    model = small(attention=("full", "4x1")).double()
    text = prompts(32, [9, 1, 32, 5, 1])
    assert equal_runs(text, 4).tolist() == [5, 7, 1, 6, 7]
    x, t = torch.randn(5, 3, 16, 16).double(), torch.full((5,), 0.3).double()
    seen = seen_by_blocks(model)
    merged = merge_padding(model, model.config)(x, t, text)
    torch.testing.assert_close(merged, model(x, t, text), rtol=1e-6, atol=1e-6)
    assert seen[0] == 16 + 8 + 32 + 12 + 8


def test_equal_tokens_of_which_some_are_real_are_not_merged():
    text = prompts(32, [1, 1])
    text.mask[1, 8:12] = True
    assert equal_runs(text, 4).tolist() == [7, 5]


def test_what_cannot_be_merged_is_computed_whole():
    """Rows of different times, texts without equal runs, and models that merging is not for."""
    model, text = small(), prompts(32, [1, 32])
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([0.2, 0.7])
    seen = seen_by_blocks(model)
    merged = merge_padding(model, model.config)
    assert torch.equal(merged(x, t, text), model(x, t, text))
    different, now = prompts(32, [32, 32]), t[:1].expand(2)
    assert torch.equal(merged(x, now, different), model(x, now, different))
    assert seen == [64] * 4
    with pytest.raises(ConfigError, match="the nearest text length that works: 16 or 32"):
        merged(x, now, prompts(20, [1, 20]))
    for choices in ({"text_mask": "real"}, {"path_drop": 0.1}):
        other = small(**choices)
        assert merge_padding(other, other.config) is other


def test_guidance_and_reused_blocks_merge_the_null_prompt():
    model = small().double()
    text, null = prompts(64, [64, 64]), prompts(64, [1])
    x, t = torch.randn(2, 3, 16, 16).double(), torch.full((2,), 0.5).double()
    seen = seen_by_blocks(model)
    for denoiser in (model, ReusedBlocks(model, 2)):
        ours = guide(merge_padding(denoiser, model.config), text, null, 3.0)(x, t)
        torch.testing.assert_close(ours, guide(model, text, null, 3.0)(x, t), rtol=1e-6, atol=1e-6)
    assert seen == [2 * (64 + 32), 4 * 64] * 2


def test_compiled_blocks_take_merged_text():
    model = small(groups=(1, 1, 1), attention=("4x1",)).eval()
    text = prompts(16, [1, 16])
    x, t = torch.randn(2, 3, 16, 16), torch.full((2,), 0.5)
    whole = model(x, t, text)
    model.compile_blocks(backend="aot_eager")
    with torch.no_grad():
        merged = merge_padding(model, model.config)(x, t, text)
    torch.testing.assert_close(merged, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_null_prompt_of_a_real_llama_is_mostly_one_row(tmp_path, dtype):
    """Padding of the null prompt is equal to the last bit; padding behind words is not."""
    tiny.save_llama(tmp_path)
    config = ComponentConfig(name="llama-3.2-1b", path=str(tmp_path), length=32, dtype=dtype)
    encoder = build_text_encoder(config)
    text = encoder.encode(["", "a red circle"])
    assert equal_runs(text, 1).tolist() == [31, 1]
    assert text.mask.sum(1).tolist()[0] == 1


def test_a_compiled_pipeline_merges():
    pipeline = TextToImage.from_pretrained("shapes")
    seen = seen_by_blocks(pipeline.model)
    draw = dict(prompt="a red circle", num_inference_steps=2, output_type="latent", guidance_scale=3.0)
    whole = pipeline(**draw).images
    pipeline.model.compile_blocks = lambda: None  # as it is: only what compile() sets besides
    pipeline.compile()
    torch.testing.assert_close(pipeline(**draw).images, whole, rtol=1e-4, atol=1e-4)
    assert seen == [32] * 2 + [16 + 8] * 2


# ---- attention with numbers added to the scores


@pytest.mark.parametrize("chunk", [1 << 20, 21 * 8], ids=["whole", "a query at a time"])
def test_added_scores(monkeypatch, chunk):
    """Values and gradients are those of scaled_dot_product_attention; log 3 counts a key three times."""
    monkeypatch.setattr(attention, "CHUNK_BYTES", chunk)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 21, 5, dtype=torch.float64, requires_grad=True) for _ in range(3))
    added = torch.randn(2, 21, dtype=torch.float64)
    out = layers.attend(q, k, v, added)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=added[:, None, None])
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad(result, (q, k, v), upstream) for result in (out, expected))
    torch.testing.assert_close(ours, theirs)

    three = torch.zeros(2, 21, dtype=torch.float64)
    three[:, -1] = torch.tensor(3.0).log()
    repeated = [torch.cat([x, x[:, :, -1:], x[:, :, -1:]], dim=2) for x in (k, v)]
    torch.testing.assert_close(
        layers.attend(q, k, v, three), F.scaled_dot_product_attention(q, *repeated), rtol=1e-6, atol=1e-6
    )
