import hashlib
import logging

import pytest
import torch
from tiny import save_llama

from nitro_e.config import ConfigError
from nitro_e.encoders.components import ComponentConfig, build_text_encoder, text_shape
from nitro_e.encoders.text import (
    HashText,
    clean_pixart_caption,
    gram_signs,
    normed_mean,
    split_words,
    word_features,
)

PROMPTS = ["a red circle", "", "the big cat left of a green square"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return folder, save_llama(folder)


def test_llama_equals_the_causal_model(llama):
    folder, reference = llama
    config = ComponentConfig(name="llama-3.2-1b", path=str(folder), length=12)
    encoder = build_text_encoder(config)
    assert (encoder.width, encoder.length) == (32, 12) and text_shape(config) == (None, 12)
    assert not hasattr(encoder.model, "lm_head")
    tokens, mask = encoder.encode(PROMPTS)
    # word ids count from 3 in the order of tiny.WORDS; 0 begins, 1 ends and pads
    ids = [[0, 3, 4, 6], [0], [0, 10, 11, 12, 8, 9, 3, 5, 7]]
    padded = torch.tensor([row + [1] * (12 - len(row)) for row in ids])
    attention = torch.tensor([[1] * len(row) + [0] * (12 - len(row)) for row in ids])
    assert mask.dtype == torch.bool and torch.equal(mask, attention.bool())
    with torch.no_grad():
        expected = reference(
            input_ids=padded, attention_mask=attention, output_hidden_states=True
        ).hidden_states[-1]
    assert tokens.shape == (3, 12, 32) and not tokens.requires_grad
    torch.testing.assert_close(tokens, expected)  # rows at padded positions included
    for row, words in enumerate(ids):  # causal: real rows do not depend on the padding
        with torch.no_grad():
            alone = reference(input_ids=torch.tensor([words]), output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(tokens[row, : len(words)], alone[0], atol=1e-5, rtol=1e-5)


def test_normed_mean_of_hand_made_states():
    states = [torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[0.0, 20.0]]])]
    expected = 2**0.5 * (torch.tensor([0.6, 0.8]) + torch.tensor([0.0, 1.0])) / 2
    torch.testing.assert_close(normed_mean(states)[0, 0], expected)


def test_normed_mean_reads_every_layer_and_is_the_last_one_of_one(llama):
    folder, reference = llama
    config = ComponentConfig(name="llama-3.2-1b", path=str(folder), length=8, layers="normed_mean")
    encoder, prompts = build_text_encoder(config), ["a red circle", "the big cat"]
    ids = encoder.tokenizer(prompts, padding="max_length", max_length=8, return_tensors="pt")
    raw = []
    handles = [
        layer.register_forward_hook(
            lambda _, given, out: raw.append(out[0] if isinstance(out, tuple) else out)
        )
        for layer in reference.model.layers
    ]
    with torch.no_grad():
        last = reference.model(**ids).last_hidden_state
    for handle in handles:
        handle.remove()
    unit = [state / state.square().mean(-1, keepdim=True).sqrt() for state in (raw[0], last)]
    torch.testing.assert_close(encoder.encode(prompts).tokens, sum(unit) / 2, rtol=1e-4, atol=1e-4)
    encoder.model.layers = encoder.model.layers[:1]  # the final norm has weight one
    encoder.model.config.num_hidden_layers = 1
    one = encoder.encode(prompts).tokens
    del encoder.layers
    # the model's norm adds 1e-6 to squares of 1e-4
    torch.testing.assert_close(one, encoder.encode(prompts).tokens, rtol=1e-2, atol=1e-2)


def test_only_llama_has_layers_to_choose():
    with pytest.raises(ConfigError, match=r"components.text.layers: 'hash' has no such option"):
        build_text_encoder(ComponentConfig(name="hash", layers="normed_mean"))


def test_llama_defaults_and_bfloat16(llama):
    encoder = build_text_encoder(ComponentConfig(name="llama-3.2-1b", path=str(llama[0]), dtype="bfloat16"))
    tokens, mask = encoder.encode(PROMPTS[:1])
    assert tokens.shape == (1, 128, 32) and tokens.dtype == torch.float32 and mask.sum() == 4
    assert next(encoder.model.parameters()).dtype == torch.bfloat16
    assert text_shape(ComponentConfig(name="llama-3.2-1b")) == (2048, 128)


def test_llama_cuts_long_prompts_and_says_so_once(llama, caplog):
    encoder = build_text_encoder(ComponentConfig(name="llama-3.2-1b", path=str(llama[0]), length=4))
    with caplog.at_level(logging.WARNING):
        exact = encoder.encode(["a red circle"])
        assert encoder.truncated == 0 and not caplog.records
        cut = encoder.encode(["a red circle left of the cat", "a cat", "a red circle of"])
        encoder.encode(["a red circle left of the cat"])
    assert encoder.truncated == 3 and len(caplog.records) == 1 and "a red circle left" in caplog.text
    torch.testing.assert_close(cut.tokens[0], exact.tokens[0])
    assert cut.mask.sum(dim=1).tolist() == [4, 3, 4]


def test_llama_errors(tmp_path):
    with pytest.raises(ConfigError, match="components.text.path: folder './nowhere' does not exist"):
        build_text_encoder(ComponentConfig(name="llama-3.2-1b", path="./nowhere"))
    with pytest.raises(ConfigError, match="hf download meta-llama/Llama-3.2-1B"):
        build_text_encoder(ComponentConfig(name="llama-3.2-1b", path=str(tmp_path)))
    with pytest.raises(ConfigError, match="did you mean 'llama-3.2-1b'"):
        text_shape(ComponentConfig(name="llama-3.2-1B"))
    with pytest.raises(ConfigError, match="components.text.clean_caption"):
        build_text_encoder(ComponentConfig(name="hash", clean_caption=True))
    with pytest.raises(ConfigError, match="length"):
        ComponentConfig(name="hash", length=1)


def test_caption_cleaner():
    pytest.importorskip("ftfy")
    pytest.importorskip("bs4")
    assert clean_pixart_caption("A <b>Red</b> Circle,  big http://a.com/x") == "a red circle, big"
    assert clean_pixart_caption("") == ""
    with pytest.raises(ConfigError, match="cannot read the markup in"):
        clean_pixart_caption("&lt;![<![]]!><![")


def test_caption_cleaner_names_what_to_install(llama, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install ftfy beautifulsoup4"):
        build_text_encoder(ComponentConfig(name="llama-3.2-1b", path=str(llama[0]), clean_caption=True))


def test_hash_shapes_and_mask():
    config = ComponentConfig(name="hash")
    encoder = build_text_encoder(config)
    assert text_shape(config) == (encoder.width, encoder.length) == (128, 16)
    tokens, mask = encoder.encode(["A red, circle!", "", "it's 3 t-shirts"])
    assert tokens.shape == (3, 16, 128) and tokens.dtype == torch.float32
    assert mask.sum(dim=1).tolist() == [4, 1, 5] and mask.dtype == torch.bool
    assert mask[:, :1].all() and (tokens[~mask] == 0).all()
    torch.testing.assert_close(tokens[mask].square().mean(dim=1), torch.ones(10), atol=1e-5, rtol=0)
    assert split_words("It's 3 T-shirts: été, ＲＥＤ_x") == ["it's", "3", "t", "shirts", "été", "red", "x"]
    assert torch.equal(tokens[1, 0, :96], tokens[0, 3, :96])  # the null prompt is the end row alone


def test_hash_rows_match_the_definition():
    """Sum of the signs of {<red>, <re, red, ed>, <red, red>}, bit by bit from SHAKE-256."""
    total = [0] * 20
    for gram in ("<red>", "<re", "red", "ed>", "<red", "red>"):
        number = int.from_bytes(hashlib.shake_256(gram.encode()).digest(3), "big")
        total = [value + (1 if number >> (23 - i) & 1 else -1) for i, value in enumerate(total)]
    expected = torch.tensor(total, dtype=torch.float32)
    torch.testing.assert_close(word_features("red", 20), expected / expected.square().mean().sqrt())
    positions = HashText().encode(["red " * 10]).tokens[0, :, 96:]
    assert positions[3, 0] == pytest.approx(2**0.5 * torch.tensor(3.0).sin().item(), abs=1e-6)
    assert positions[3, 17] == pytest.approx(
        2**0.5 * torch.tensor(3 * 100 ** (-1 / 16)).cos().item(), abs=1e-6
    )


def test_hash_is_the_same_on_every_machine():
    assert gram_signs("<red>", 12).tolist() == [-1, -1, -1, 1, -1, 1, 1, -1, -1, 1, 1, 1]
    torch.testing.assert_close(
        word_features("circle", 96)[:4],
        torch.tensor([-0.543493, -0.543493, -0.543493, -0.543493]),
        atol=1e-6,
        rtol=0,
    )


def test_related_words_are_closer():
    def cosine(a, b):
        return torch.cosine_similarity(word_features(a, 96), word_features(b, 96), dim=0).item()

    unrelated = [cosine(a, b) for a, b in [("circle", "green"), ("square", "robot"), ("cat", "umbrella")]]
    related = [cosine(a, b) for a, b in [("circle", "circles"), ("square", "squared"), ("smile", "smiling")]]
    assert min(related) > max(unrelated) + 0.1


def test_hash_sees_order_but_not_case():
    encode = HashText().encode
    a, b, c = encode(["red cube on green ball", "green cube on red ball", "Red cube, on GREEN ball."]).tokens
    assert torch.equal(a, c) and not torch.allclose(a, b)
    # attention without positions sees rows as a set; second moments of the rows tell the two sets apart
    assert not torch.allclose(a.T @ a, b.T @ b, atol=0.1)


def test_hash_cuts_long_prompts_and_says_so_once(caplog):
    encoder = build_text_encoder(ComponentConfig(name="hash", length=4))
    with caplog.at_level(logging.WARNING):
        exact = encoder.encode(["one two three"])
        assert encoder.truncated == 0
        cut = encoder.encode(["one two three four", "one two three four five", "one"])
    assert encoder.truncated == 2 and len(caplog.records) == 1
    assert torch.equal(cut.tokens[0], exact.tokens[0]) and cut.mask.sum(dim=1).tolist() == [4, 4, 2]
