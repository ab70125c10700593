"""What TextToImage takes as prompts, negative prompts and seeds, and what it refuses."""

import numpy as np
import pytest
import torch

from nitro_e.config import ConfigError
from nitro_e.encoders.components import ComponentConfig, build_text_encoder
from nitro_e.rewards import RewardConfig, build_rewards
from nitro_e.sampling.pipeline import TextToImage

RED, BLUE = "a red circle", "a blue square"


@pytest.fixture(scope="module")
def pipeline() -> TextToImage:
    """The shipped model."""
    return TextToImage.from_pretrained("shapes")


@pytest.fixture(scope="module")
def draw(pipeline):
    def draw(*prompts, **options):
        return pipeline(*prompts, **{"num_inference_steps": 2, "output_type": "pixels", **options}).images

    return draw


def test_a_string_is_one_prompt(pipeline, draw):
    """It drew an image per character."""
    images = pipeline(RED, steps=2).images
    assert len(images) == 1 and np.array_equal(images[0], pipeline([RED], steps=2).images[0])
    assert torch.equal(draw(RED, seeds=7), draw([RED], seeds=[7]))
    assert torch.equal(draw((RED,), seeds=np.int64(7)), draw([RED], seeds=np.array([7])))


def test_a_negative_prompt_for_each(draw):
    """The list became one text pair, which all images got."""
    prompts, negatives, seeds = [RED, BLUE, RED], [BLUE, "", RED], [3, 4, 5]
    together = draw(prompts, negative_prompt=negatives, seeds=seeds)
    for index, one in enumerate(zip(prompts, negatives, seeds)):
        alone = draw(one[0], negative_prompt=one[1], seeds=one[2])
        torch.testing.assert_close(together[index : index + 1], alone, rtol=0, atol=1e-4)
    split = draw(prompts, negative_prompt=negatives, seeds=seeds, batch_size=2)
    torch.testing.assert_close(split, together, rtol=0, atol=1e-4)
    assert (together[0] - draw(RED, seeds=3)[0]).abs().max() > 1e-2


def test_one_negative_prompt_for_all(draw):
    expected = draw([RED, BLUE])
    assert torch.equal(draw([RED, BLUE], negative_prompt=None), expected)
    assert torch.equal(draw([RED, BLUE], negative_prompt=["", ""]), expected)
    same = draw([RED, BLUE], negative_prompt="a green star")
    assert torch.equal(draw([RED, BLUE], negative_prompt=["a green star"] * 2), same)
    assert not torch.equal(same, expected)


REFUSED = {
    "no prompts": ([[]], {}, "prompt: there is none"),
    "no prompts at all": ([None], {}, "prompt: there is none"),
    "a number": ([[RED, 3]], {}, r"prompt\[1\]: expected a string, got 3"),
    "nothing": ([[None]], {}, r"prompt\[0\]: expected a string, got None"),
    "too few negatives": (
        [[RED, BLUE, RED]],
        {"negative_prompt": ["", ""]},
        "3 prompts but 2 negative prompts",
    ),
    "negatives of a string": ([RED], {"negative_prompt": ["", ""]}, "1 prompts but 2 negative prompts"),
    "a negative number": (
        [[RED]],
        {"negative_prompt": [1]},
        r"negative_prompt\[0\]: expected a string, got 1",
    ),
    "one seed for two": ([[RED, BLUE]], {"seeds": [1]}, "2 images but 1 seeds"),
    "a seed in parts": ([RED], {"seeds": [0.5]}, "0.5 is no seed"),
    "a large seed": ([RED], {"seeds": 2**64}, "is no seed"),
    "no batch": ([RED], {"batch_size": 0}, "batch_size must be at least 1, got 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(draw, case):
    arguments, options, words = REFUSED[case]
    with pytest.raises(ConfigError, match=words):
        draw(*arguments, **options)


@pytest.mark.parametrize("name", ["hash", "shapes-llama"])
def test_text_encoders_take_lists_only(name):
    encoder = build_text_encoder(ComponentConfig(name=name))
    with pytest.raises(ConfigError, match="expected a list of strings, got 'a red circle'"):
        encoder.encode(RED)
    with pytest.raises(ConfigError, match=r"prompts\[1\]: expected a string"):
        encoder.encode([RED, None])
    assert len(encoder.encode((RED, "")).tokens) == 2


def test_scores_take_lists_only():
    """A string of as many characters as there are images would have passed for as many prompts."""
    scorer = build_rewards([RewardConfig(name="shapes")])
    with pytest.raises(ConfigError, match="expected a list of strings, got 'ab'"):
        scorer(torch.zeros(2, 3, 64, 64), "ab", [{}, {}])
