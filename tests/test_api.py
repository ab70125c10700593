"""TextToImage as users of diffusers call it: arguments, starts, moving, saving, publishing."""

import json

import numpy as np
import pytest
import tiny
import torch
from conftest import DATA
from PIL import Image
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from nitro_e import TextToImage
from nitro_e.config import ConfigError
from nitro_e.interfaces import TextEmbedding
from nitro_e.model import EMMDiT, ModelConfig, released
from nitro_e.model.pretrained import load_pretrained
from nitro_e.sampling import publish
from nitro_e.sampling.pipeline import CACHED_PROMPTS

RED, BLUE = "a red circle", "a blue square"
SHAPE = (8, 8, 8)


@pytest.fixture(scope="module")
def pipe() -> TextToImage:
    return TextToImage.from_pretrained("shapes")


@pytest.fixture
def draw(pipe):
    """Draw with two steps; latents unless told otherwise."""

    def draw(*prompts, **options):
        return pipe(*prompts, **{"num_inference_steps": 2, "output_type": "latent", **options}).images

    return draw


def close(ours, theirs, bound=1e-4):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=bound)


def by_hand(pipe, x, times, prompt, scale, after=lambda x, t: x):
    """Euler with guidance, one row at a time."""
    text, null = pipe.text.encode([prompt]), pipe.text.encode([""])
    with torch.no_grad():
        for t, t_next in zip(times, times[1:]):
            at = torch.tensor([t])
            v, without = pipe.model(x, at, text), pipe.model(x, at, null)
            strength = scale(t) if callable(scale) else scale
            x = after(x + (t_next - t) * (without + strength * (v - without)), t_next)
    return x


# ---- noise, prompts, outputs


def test_several_images_per_prompt_count_up_their_seeds(draw):
    together = draw([RED, BLUE], num_images_per_prompt=2, seeds=5)
    for row, (prompt, seed) in enumerate([(RED, 5), (RED, 6), (BLUE, 7), (BLUE, 8)]):
        close(together[row : row + 1], draw(prompt, seeds=seed))
    close(draw([RED, BLUE], num_images_per_prompt=2, seeds=[5, 6, 7, 8], batch_size=3), together)


def test_generators_draw_as_in_diffusers(draw):
    """One for the batch or one per image; of a single image a generator is its seed."""
    one = draw(RED, generator=torch.Generator().manual_seed(3))
    assert torch.equal(one, draw(RED, seeds=3))
    both = draw([RED, BLUE], generator=[torch.Generator().manual_seed(seed) for seed in (3, 9)])
    close(both, draw([RED, BLUE], seeds=[3, 9]))
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(4))
    whole = draw([RED, BLUE], generator=torch.Generator().manual_seed(4))
    assert torch.equal(whole, draw([RED, BLUE], latents=noise))
    again = draw([RED, BLUE], generator=torch.Generator().manual_seed(4), sampler="multistep")
    assert not torch.equal(again, whole)
    assert torch.equal(
        again, draw([RED, BLUE], generator=torch.Generator().manual_seed(4), sampler="multistep")
    )


def test_types_of_output_agree(pipe, draw):
    pixels = draw([RED, BLUE], output_type="pixels")
    assert pixels.shape == (2, 3, 64, 64) and pixels.min() >= -1 and pixels.max() <= 1
    assert torch.equal(draw([RED, BLUE], output_type="pt"), (pixels + 1) / 2)
    array = draw([RED, BLUE], output_type="np")
    assert array.shape == (2, 64, 64, 3) and np.array_equal(array[1].transpose(2, 0, 1), (pixels[1] + 1) / 2)
    images = draw([RED, BLUE], output_type="pil")
    assert np.abs(np.asarray(images[0]) - 255 * array[0]).max() <= 0.51
    close(pipe.codec.decode(draw([RED, BLUE])), pixels)
    result = pipe(RED, num_inference_steps=1)
    assert result[0] is result.images and result.images[0].size == (64, 64)


def test_embeddings_stand_for_their_prompts(pipe, draw):
    embeds = pipe.encode_prompt([RED, BLUE])
    assert isinstance(embeds, TextEmbedding)
    given = draw(prompt_embeds=embeds, negative_prompt_embeds=pipe.encode_prompt(["a star"]), seeds=[1, 2])
    close(given, draw([RED, BLUE], negative_prompt="a star", seeds=[1, 2]))
    tokens = draw(prompt_embeds=embeds.tokens, num_images_per_prompt=2, seeds=[1, 2, 3, 4])
    assert tokens.shape == (4, *SHAPE)


def test_embeddings_come_to_the_device_of_the_pipeline(pipe):
    """Fake tensors stand for those of a GPU: operators refuse to mix them with the CPU's."""
    text = pipe.encode_prompt([RED])
    with FakeTensorMode(allow_non_fake_inputs=True):
        away = TextEmbedding(*(torch.zeros_like(part, device="cuda") for part in text))
        embeds = {"prompt_embeds": away, "negative_prompt_embeds": away, "guidance_scale": 2.0}
        drawn = pipe(**embeds, num_inference_steps=1, output_type="latent").images
    assert drawn.device.type == "cpu"


def test_a_prompt_is_encoded_once(pipe, monkeypatch):
    encoded, encode = [], pipe.text.encode
    monkeypatch.setattr(pipe.text, "encode", lambda prompts: encoded.extend(prompts) or encode(prompts))
    pipe._embeddings.clear()
    for _ in range(2):
        pipe([RED, BLUE], num_images_per_prompt=2, num_inference_steps=1, output_type="latent")
    assert sorted(encoded) == ["", BLUE, RED]
    many = [f"prompt {number}" for number in range(CACHED_PROMPTS + 5)]
    assert len(pipe.encode_prompt([RED, *many]).tokens) == len(many) + 1
    assert list(pipe._embeddings) == many[-CACHED_PROMPTS:]
    pipe(RED, guidance_scale=0, num_inference_steps=1, output_type="latent")
    assert encoded.count("") == 1  # without guidance it is not needed


def test_the_callback_sees_every_step_and_may_change_it(pipe, draw):
    seen = []

    def callback(pipeline, step, t, state):
        assert pipeline is pipe
        seen.append((step, t, state["latents"].clone()))
        return {"latents": state["latents"] * 0} if step == 1 else state

    end = draw(RED, num_inference_steps=4, grid="linear", callback_on_step_end=callback)
    assert [(step, t) for step, t, _ in seen] == [(0, 0.75), (1, 0.5), (2, 0.25), (3, 0.0)]
    assert torch.equal(end, seen[-1][2])
    start = by_hand(pipe, torch.zeros(1, *SHAPE), [0.5, 0.25, 0.0], RED, pipe.defaults.guidance_scale)
    close(end, start)


def test_after_is_a_hook_for_filters(pipe):
    pipe.after = lambda images: [Image.new("RGB", image.size, "black") for image in images]
    try:
        assert pipe(RED, num_inference_steps=1).images[0].getextrema() == ((0, 0),) * 3
    finally:
        pipe.after = None


def test_guidance_in_an_interval(pipe, draw, monkeypatch):
    """Outside of it there is one pass instead of two."""
    kind, rows = type(pipe.model), []
    forward = kind.forward
    monkeypatch.setattr(
        kind, "forward", lambda self, x, *rest: rows.append(len(x)) or forward(self, x, *rest)
    )
    ours = draw(RED, num_inference_steps=4, grid="linear", guidance_scale=3, guidance_interval=(0.4, 0.8))
    assert rows == [1, 2, 2, 1]
    noise = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    expected = by_hand(pipe, noise, [1, 0.75, 0.5, 0.25, 0], RED, lambda t: 3 if 0.4 <= t <= 0.8 else 1)
    close(ours, expected)
    assert pipe.settings(guidance_interval=(0, 0.5)).in_words().count("guidance 3 from t = 0 to 0.5") == 1


def test_blocks_are_reused_where_that_is_asked_for(draw):
    exact = draw(RED, num_inference_steps=4)
    assert torch.equal(draw(RED, num_inference_steps=4, reuse_blocks=1), exact)
    reused = draw(RED, num_inference_steps=4, reuse_blocks=2)
    assert not torch.equal(reused, exact) and (reused - exact).abs().mean() < 0.3
    with pytest.raises(ConfigError, match="n at least 1, not 0"):
        draw(RED, reuse_blocks=0)


# ---- images as a start


def given_image() -> Image.Image:
    array = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    return Image.fromarray(array)


def test_image_to_image_is_sampling_from_its_noised_latents(pipe, draw):
    image = given_image()
    ours = draw(RED, image=image, strength=0.5, num_inference_steps=4, grid="linear", seeds=3)
    pixels = torch.tensor(np.array(image), dtype=torch.float32).permute(2, 0, 1)[None] / 127.5 - 1
    data = pipe.codec.normalize(pipe.codec.encode_pixels(pixels))
    noise = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(3))
    start = (data + noise) / 2
    close(ours, by_hand(pipe, start, [0.5, 0.25, 0.0], RED, pipe.defaults.guidance_scale))
    tensor = (pixels[0] + 1) / 2
    close(draw(RED, image=tensor, strength=0.5, num_inference_steps=4, grid="linear", seeds=3), ours)
    several = draw([RED, BLUE], image=[image, image], num_images_per_prompt=2, seeds=3, batch_size=3)
    assert several.shape[0] == 4
    close(several[:1], draw(RED, image=image, seeds=3))


def test_inpainting_keeps_the_rest(pipe, draw):
    image, mask = given_image(), Image.new("L", (64, 64), 0)
    mask.paste(255, (10, 20, 30, 41))
    options = {"mask_image": mask, "num_inference_steps": 4, "grid": "linear", "seeds": 3}
    drawn = np.asarray(pipe(RED, image=image, **options).images[0])
    inside = np.asarray(mask) > 127
    assert np.array_equal(drawn[~inside], np.asarray(image)[~inside])
    assert (drawn[inside] != np.asarray(image)[inside]).mean() > 0.9
    # the latents: cells that the mask touches are drawn, the others are the image's with the noise of the time
    cells = torch.zeros(8, 8, dtype=torch.bool)
    cells[2:6, 1:4] = True
    pixels = torch.tensor(np.array(image), dtype=torch.float32).permute(2, 0, 1)[None] / 127.5 - 1
    data = pipe.codec.normalize(pipe.codec.encode_pixels(pixels))
    noise = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(3))
    grid = [1, 0.75, 0.5, 0.25, 0.0]
    expected = by_hand(
        pipe,
        noise,
        grid,
        RED,
        pipe.defaults.guidance_scale,
        lambda x, t: torch.where(cells, x, (1 - t) * data + t * noise),
    )
    close(draw(RED, image=image, **options), expected)


REFUSED = {
    "two kinds of prompts": ({"prompt": RED, "prompt_embeds": torch.zeros(1, 16, 128)}, "give one"),
    "flat embeddings": ({"prompt_embeds": torch.zeros(16, 128)}, "prompt_embeds: expected tokens"),
    "no prompt": ({}, "there is none"),
    "no image per prompt": ({"prompt": RED, "num_images_per_prompt": 0}, "num_images_per_prompt must be"),
    "seeds and generator": (
        {"prompt": RED, "seeds": 1, "generator": torch.Generator()},
        "seeds and generator are both",
    ),
    "too many generators": (
        {"prompt": RED, "generator": [torch.Generator()] * 2},
        "1 images but 2 generators",
    ),
    "latents of another shape": ({"prompt": RED, "latents": torch.zeros(1, 8, 4, 4)}, "latents: expected"),
    "a kind of output": ({"prompt": RED, "output_type": "jpg"}, "output_type 'jpg' is unknown"),
    "an interval": ({"prompt": RED, "guidance_interval": (0.5, 0.2)}, "guidance_interval: the first time"),
    "a mask alone": ({"prompt": RED, "mask_image": given_image()}, "belong to an image"),
    "strength": ({"prompt": RED, "image": given_image(), "strength": 0}, "strength must be above 0"),
    "proportions": ({"prompt": RED, "image": given_image().resize((64, 32))}, "crop it, or give height"),
    "too many images": ({"prompt": RED, "image": [given_image()] * 3}, "1 images are drawn but 3 given"),
    "an image of another kind": ({"prompt": RED, "image": [3]}, "expected a PIL image"),
    "an unknown argument": ({"prompt": RED, "num_steps": 3}, "num_steps"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(pipe, case):
    options, words = REFUSED[case]
    with pytest.raises(ConfigError, match=words):
        pipe(**options)


# ---- moving


def tensors_of(pipe):
    return [*pipe.model.state_dict().values(), *pipe.codec.autoencoder.state_dict().values(),
            *pipe.text.model.state_dict().values()]  # fmt: skip


def test_all_parts_move_and_are_cast():
    half = TextToImage.from_pretrained("shapes").to(dtype=torch.bfloat16)
    loaded = TextToImage.from_pretrained("shapes", dtype=torch.bfloat16)
    options = {"num_inference_steps": 2, "output_type": "latent"}
    assert torch.equal(half(RED, **options).images, loaded(RED, **options).images)
    assert all(tensor.device.type == "meta" for tensor in tensors_of(half.to("meta")))


def test_offloaded_parts_work_one_at_a_time(pipe, monkeypatch):
    """The device is a stand-in here: what counts is who is moved where and when."""
    expected = pipe(RED, num_inference_steps=2, output_type="pixels").images
    other, moves = TextToImage.from_pretrained("shapes"), []
    other.enable_model_cpu_offload("cpu:0")
    for name in ("model", "codec", "text"):
        part, to = getattr(other, name), getattr(other, name).to
        moved = lambda device, name=name, to=to: (moves.append((name, str(device))), to(device=device))  # noqa: E731
        monkeypatch.setattr(part, "to", moved)
    drawn = other(RED, num_inference_steps=2, output_type="pixels").images
    assert torch.equal(drawn, expected)
    pairs = list(zip(moves[::2], moves[1::2]))
    assert [(there[0], there[1], back[1]) for there, back in pairs] == [
        ("text", "cpu:0", "cpu"),
        ("text", "cpu:0", "cpu"),
        ("model", "cpu:0", "cpu"),
        ("codec", "cpu:0", "cpu"),
    ]
    assert all(there[0] == back[0] for there, back in pairs)


def test_weights_drawn_from_elsewhere_are_not_packed_for_a_cpu():
    """Offloaded weights lie on the CPU, but do not work there."""
    pipe = TextToImage.from_pretrained("shapes", dtype=torch.bfloat16)
    pipe.enable_model_cpu_offload("meta")
    with pytest.raises(ConfigError, match="images are drawn on meta; 8-bit products are for a CPU"):
        pipe.compile("int8")


# ---- files


@pytest.fixture
def released_file(tmp_path):
    """Weights in the released format that fit the tiny codec and text encoder, and the arguments that name those."""
    torch.manual_seed(0)
    config = ModelConfig(
        width=48, heads=2, groups=(1, 2, 1), latent_channels=8, text_width=32, position_table=32,
        attention=("full", "4x1", "4x4"), base_grid=16,
    )  # fmt: skip
    model = EMMDiT(config)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    path = tmp_path / "Tiny-512px.safetensors"
    save_file(released.to_released(model), path)
    tiny.save_autoencoder_dc(tmp_path / "codec")
    tiny.save_llama(tmp_path / "text")
    return path, {"codec": str(tmp_path / "codec"), "text": str(tmp_path / "text")}


SMALL = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent"}


def test_released_files_are_drawn_from_as_they_are(released_file, tmp_path):
    path, parts = released_file
    pipe = TextToImage.from_pretrained(path, **parts)
    assert pipe.defaults.in_words() == "20 steps of euler, guidance 4.5, 512x512 px"
    drawn = pipe("a red cat", **SMALL).images
    pipe.save_pretrained(tmp_path / "saved")
    saved = TextToImage.from_pretrained(tmp_path / "saved")  # it names the folders of the other parts
    assert torch.equal(saved("a red cat", **SMALL).images, drawn) and saved.defaults == pipe.defaults
    distilled = path.rename(tmp_path / "Tiny-512px-dist.safetensors")
    assert TextToImage.from_pretrained(distilled, **parts).defaults.steps == 4
    with pytest.raises(ConfigError, match="give resolution=512 or 1024"):
        TextToImage.from_pretrained(distilled.rename(tmp_path / "other.safetensors"), **parts)


def test_adapters_are_put_on_and_taken_off(released_file, released_state, tmp_path):
    pipe = TextToImage.from_pretrained(released_file[0], **released_file[1])
    save_file(released_state, tmp_path / "base-512px.safetensors")
    model = load_pretrained(tmp_path / "base-512px.safetensors")
    pipe.model, before = model, {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = load_pretrained(tmp_path / "base-512px.safetensors", lora=DATA / "lora_tiny_512").state_dict()
    pipe.load_lora(DATA / "lora_tiny_512")
    for name, tensor in pipe.model.state_dict().items():
        assert torch.equal(tensor, merged[name]), name
    pipe.load_lora(DATA / "lora_tiny_512", scale=-1)
    for name, tensor in pipe.model.state_dict().items():
        close(tensor, before[name], 1e-6)


def test_publishing_and_drawing_from_the_hub(hub, pipe, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    scores = tmp_path / "results.json"
    estimate = {"value": 0.885, "low": 0.858, "high": None}
    sampling = {"steps": 20, "sampler": "euler", "guidance_scale": 3.0}
    result = {"sampling": sampling, "scores": {"strict": {"overall": estimate}}}
    scores.write_text(json.dumps({"benchmark": {"name": "shapes"}, "prompts": 600, "results": [result]}))
    pipe.push_to_hub("me/shapes", prompts=[RED, BLUE], scores=scores, licence="mit")
    pipe.push_to_hub("me/shapes", licence="mit")  # again: the repository is there
    contents = hub.commits["me/shapes"][1][1]
    assert set(contents) == {"README.md", "config.json", "model.safetensors", "samples.png"}
    card = contents["README.md"].decode()
    parameters = sum(parameter.numel() for parameter in pipe.model.parameters())
    assert f"{parameters:,} parameters" in card
    assert card.startswith("---\nlicense: mit\n") and "0.885 [0.858, –]" in card
    assert (
        'from_pretrained("me/shapes")' in card
        and "| shapes, 600 prompts | 20 steps of euler, guidance 3 |" in card
    )
    drawn = TextToImage.from_pretrained("me/shapes")
    options = {"num_inference_steps": 2, "output_type": "latent"}
    # not equal to the bit: the shipped file is in float16, and so is the position table beside it
    close(drawn(RED, **options).images, pipe(RED, **options).images, 5e-3)
    with pytest.raises(ConfigError, match="cannot be a hub repository"):
        pipe.push_to_hub("a/b/c")
    scores.write_text("{}")
    with pytest.raises(ConfigError, match="is not the results.json of an evaluation"):
        publish.write_folder(pipe, tmp_path / "out", "me/x", scores=scores)


def test_names_that_are_not_there(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(ConfigError, match="'runs/absent' does not exist; give a run, a checkpoint"):
        TextToImage.from_pretrained("runs/absent")
    assert hub.asked == []  # a folder of that name is here: it is a path
    with pytest.raises(ConfigError, match="'some/one' is not here, and the hub gives no"):
        TextToImage.from_pretrained("some/one")
