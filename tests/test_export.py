"""`nitro-e export`: a folder for diffusers, ONNX files and programs of torch.export draw what TextToImage draws."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from tiny import save_autoencoder_dc, save_llama

import nitro_e.cli.export
from nitro_e.config import ConfigError
from nitro_e.encoders.codec import AutoencoderKLCodec
from nitro_e.encoders.components import ComponentConfig, build_codec, build_text_encoder
from nitro_e.model import ModelConfig
from nitro_e.sampling.pipeline import TextToImage
from nitro_e.sampling.samplers import SamplingConfig
from nitro_e.sharing import programs
from nitro_e.sharing.diffusers_pipeline import HEEDS_GENERATOR, EmmditPipeline

ROOT = Path(__file__).parent.parent
PROMPTS = ["a red circle", "the big cat"]
DISTILLED = ((1.0, 0.75, 0.5, 0.25), (1.0,))
# torch 2.6 cannot tell that it is exporting
can_trace = pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="torch 2.6")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> TextToImage:
    """A pipeline of the released kind with random weights, on 32 px."""
    folder = tmp_path_factory.mktemp("tiny")
    save_autoencoder_dc(folder / "codec")
    save_llama(folder / "text")
    torch.manual_seed(0)
    config = ModelConfig(
        latent_channels=8, text_width=32, width=48, heads=2, groups=(1, 1, 1), base_grid=8, text_mask="real"
    )
    model = config.build().eval()
    torch.nn.init.normal_(model.out.weight, std=0.2)
    return TextToImage(
        model,
        build_codec(ComponentConfig(name=f"dc-ae-f32c32={folder / 'codec'}")),
        build_text_encoder(ComponentConfig(name=f"llama-3.2-1b={folder / 'text'}", length=16)),
        SamplingConfig(resolution=32, steps=5, guidance_scale=3.0),
    )


def exported(source: TextToImage, **settings) -> EmmditPipeline:
    pipe = EmmditPipeline.of(with_defaults(source, **settings))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_defaults(source: TextToImage, **settings) -> TextToImage:
    return TextToImage(
        source.model, source.codec, source.text, dataclasses.replace(source.defaults, **settings)
    )


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# ---- diffusers

# settings of the weights, and how far the latents may differ; 0 is equal to the bit
SETTINGS = {
    "released grid": ({}, 0),
    "linear grid": ({"grid": "linear"}, 0),
    "no guidance": ({"guidance_scale": 0.0}, 0),
    "interval": ({"guidance_interval": (0.3, 0.8)}, 0),
    "shift": ({"shift": 3.0}, 1e-5),
    "distilled": ({"steps": 4, "sigmas": DISTILLED, "guidance_scale": 0.0, "shift": 3.0}, 0),
    "one step": ({"steps": 1, "sigmas": DISTILLED, "guidance_scale": 0.0}, 0),
    "multistep": ({"steps": 4, "sampler": "multistep", "guidance_scale": 1.0}, 0),
    "time_scale": ({"steps": 4, "sigmas": DISTILLED, "sampler": "multistep", "time_scale": 0.8}, 0),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_latents_equal_those_of_our_sampler(tiny, case):
    settings, bound = SETTINGS[case]
    ours = with_defaults(tiny, **settings)
    if settings.get("sampler") == "multistep" and not HEEDS_GENERATOR:
        with pytest.raises(ConfigError, match="generator: .* pip install 'diffusers>=0.39'"):
            exported(tiny, **settings)(PROMPTS, generator=generators(3, 4), output_type="latent")
        return
    theirs = exported(tiny, **settings)(PROMPTS, generator=generators(3, 4), output_type="latent").images
    expected = ours(PROMPTS, generator=generators(3, 4), output_type="latent").images
    assert expected.std() > 0.3
    assert (theirs - expected).abs().max() <= bound


def test_latents_of_the_shipped_model():
    source = TextToImage.from_pretrained("shapes")
    start = torch.randn(2, 8, 8, 8)
    for options in ({}, {"guidance_scale": 1.0, "num_inference_steps": 5}):
        theirs = exported(source)(PROMPTS, latents=start, output_type="latent", **options).images
        assert torch.equal(theirs, source(PROMPTS, latents=start, output_type="latent", **options).images)


def test_times_can_be_given(tiny):
    """`sigmas` replaces the grid; and the times of the released grid are what the scheduler itself would choose."""
    pipe, start = exported(tiny), torch.randn(1, 8, 8, 8)
    linear = np.linspace(1, 0, 7)[:-1]
    drawn = pipe(PROMPTS[0], latents=start, sigmas=linear.tolist(), output_type="latent").images
    expected = tiny(PROMPTS[0], latents=start, num_inference_steps=6, grid="linear", output_type="latent")
    torch.testing.assert_close(drawn, expected.images, rtol=0, atol=1e-5)
    pipe(PROMPTS[0], num_inference_steps=20, output_type="latent")
    ours = pipe.scheduler.sigmas
    pipe.scheduler.set_timesteps(20)
    torch.testing.assert_close(ours, pipe.scheduler.sigmas, rtol=0, atol=1e-7)


def test_arguments_of_diffusers(tiny):
    """Outputs, several images a prompt, embeddings, callbacks, offload: each against a plain call."""
    pipe = exported(tiny)
    options = {"generator": generators(1), "num_inference_steps": 2}
    plain = pipe(PROMPTS[0], **options, output_type="pt").images

    def again(prompt=PROMPTS[0], seed=1, **more):
        return pipe(prompt, **{**options, "generator": generators(seed), "output_type": "pt", **more}).images

    ours = tiny(PROMPTS[0], num_inference_steps=2, generator=generators(1), output_type="pt").images
    torch.testing.assert_close(plain, ours, rtol=0, atol=1e-6)
    assert again(output_type="pil")[0].size == (32, 32) and again(output_type="np").shape == (1, 32, 32, 3)
    both = pipe(PROMPTS[0], num_images_per_prompt=2, generator=generators(1, 2), num_inference_steps=2)
    assert len(both.images) == 2 and len(pipe(PROMPTS[0], num_inference_steps=1, return_dict=False)) == 1

    tokens, mask, negative, negative_mask = pipe.encode_prompt(PROMPTS[0], "the big cat")
    embedded = {"prompt_embeds": tokens, "prompt_attention_mask": mask}
    torch.testing.assert_close(again(None, **embedded), plain, rtol=0, atol=1e-5)
    embedded |= {"negative_prompt_embeds": negative, "negative_prompt_attention_mask": negative_mask}
    torch.testing.assert_close(again(None, **embedded), again(negative_prompt="the big cat"))

    seen = []

    def stop(pipe, step, time, values):
        seen.append((step, float(time), *values))
        pipe._interrupt = True
        return {"latents": values["latents"] * 0}

    assert not again(callback_on_step_end=stop, output_type="latent").any()
    assert seen == [(0, 1000.0, "latents")]

    pipe.enable_model_cpu_offload(device="cpu")  # with the hooks, though there is no other device
    assert torch.equal(again(), plain) and torch.equal(again(), plain)
    pipe.remove_all_hooks()  # the parts are those of the other tests


LOAD = """
import sys, torch
from diffusers import DiffusionPipeline
folder, out = sys.argv[1:]
code = {"custom_pipeline": folder, "trust_remote_code": True}
first = DiffusionPipeline.from_pretrained(folder, **code)
from nitro_e.sharing.diffusers_pipeline import EmmditPipeline
second = EmmditPipeline.from_pretrained(folder)
second.save_pretrained(out + "/again")
third = EmmditPipeline.from_pretrained(out + "/again")
def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    return pipe(["a red circle", "the big cat"], generator=generator, num_inference_steps=2, output_type="pt").images
images = [draw(pipe) for pipe in (first, second, third)]
assert all(torch.equal(images[0], other) for other in images[1:])
torch.save(images[0], out + "/images.pt")
"""


def test_folder_loads_in_another_process(tmp_path, capsys, monkeypatch):
    """By diffusers' own loader and by our class, from another working directory; and again after saving."""
    monkeypatch.chdir(tmp_path)
    assert nitro_e.cli.export.main(["shapes", "folder", "--diffusers"]) == 0
    assert "20 steps of euler, guidance 3, 64x64 px" in capsys.readouterr().out
    (tmp_path / "elsewhere").mkdir()
    arguments = [sys.executable, "-c", LOAD, str(tmp_path / "folder"), str(tmp_path)]
    environment = {
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run(arguments, cwd=tmp_path / "elsewhere", env=environment, check=True)
    source = TextToImage.from_pretrained("shapes")
    ours = source(PROMPTS, generator=generators(3, 4), num_inference_steps=2, output_type="pt").images
    theirs = torch.load(tmp_path / "images.pt", weights_only=True)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)


def test_folder_of_a_hub_repository(tiny, tmp_path, hub):
    exported(tiny).save_pretrained(tmp_path / "folder")
    hub.publish("someone/tiny", tmp_path / "folder")
    pipe = EmmditPipeline.from_pretrained("someone/tiny")
    assert pipe.defaults == tiny.defaults
    assert not any(path.endswith(".py") for path in hub.asked)


def test_what_diffusers_cannot_express(tiny):
    with pytest.raises(ConfigError, match="sampler 'heun'"):
        exported(tiny, sampler="heun")
    for part, name in (("codec", "dct-f8c24"), ("text", "hash")):
        build = build_codec if part == "codec" else build_text_encoder
        other = with_defaults(tiny)
        setattr(other, part, build(ComponentConfig(name=name)))
        with pytest.raises(ConfigError, match=f"{part}.*a diffusers folder holds"):
            EmmditPipeline.of(other)
    other = with_defaults(tiny)
    other.codec = AutoencoderKLCodec(AutoencoderKL(block_out_channels=(8,), norm_num_groups=4))
    with pytest.raises(ConfigError, match="codec AutoencoderKLCodec: a diffusers folder holds"):
        EmmditPipeline.of(other)
    with pytest.raises(ConfigError, match=r"unknown \['noise'\]"):
        exported(tiny)(PROMPTS[0], callback_on_step_end_tensor_inputs=["noise"])


# ---- programs


def compared(part, program) -> float:
    run = program.module()
    return programs.compare(part, lambda inputs: run(*inputs))


@can_trace
def test_programs_hold_no_operators_of_ours(tiny):
    """Traced with 2 images, run with 1 and 3; attention is torch's."""
    for part in programs.parts(tiny):
        program = programs.trace(part)
        assert compared(part, program) < 1e-5
        assert "nitro_e" not in str(program.graph)


@can_trace
@pytest.mark.slow
def test_onnx_draws_with_onnxruntime_alone(tiny, tmp_path):
    """The example of docs/export.md, run where the files are; no operator of ours, free batch, opset in the file."""
    onnx = pytest.importorskip("onnx")
    folder = tmp_path / "out"
    differences = programs.write_onnx(tiny, folder, ["a red circle"])
    assert differences.keys() == {"transformer", "decoder"} and max(differences.values()) < 1e-4
    for name in differences:
        model = onnx.load(folder / f"{name}.onnx")
        assert {entry.domain for entry in model.opset_import} <= {
            "",
            "pkg.torch.ops",
            "pkg.onnxscript.torch_lib",
        }
        assert {entry.key: entry.value for entry in model.metadata_props}["opset"] == "18"
        assert all(value.type.tensor_type.shape.dim[0].dim_param for value in model.graph.input)
    example = re.search(r"```python\n(import json.*?)```", (ROOT / "docs/export.md").read_text(), re.DOTALL)
    code = example[1] + "import sys\nassert 'torch' not in sys.modules\n"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
    noise = np.random.default_rng(0).standard_normal((1, 8, 8, 8), np.float32)
    expected = tiny("a red circle", latents=torch.from_numpy(noise)).images[0]
    drawn = np.asarray(Image.open(folder / "image.png"), int)
    assert drawn.std() > 10 and np.abs(drawn - np.asarray(expected, int)).max() <= 1


@can_trace
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_programs_of_the_shipped_model(kind, tmp_path, capsys):
    out = tmp_path / "out"
    assert nitro_e.cli.export.main(["shapes", str(out), f"--{kind}", "--prompt", "a red circle"]) == 0
    words = capsys.readouterr().out
    assert "transformer: largest difference" in words and "decoder: largest difference" in words
    about = json.loads((out / "export.json").read_text())
    assert about["prompts"] == ["", "a red circle"] and about["latents"] == [8, 8, 8]
    assert len(about["times"]) == 21 and max(about["differences"].values()) < 1e-3


@can_trace
@pytest.mark.slow
def test_programs_of_torch(tiny, tmp_path):
    differences = programs.write_torch(tiny, tmp_path / "out")
    assert max(differences.values()) < 1e-5
    program = torch.export.load(tmp_path / "out" / "decoder.pt2").module()
    latents = torch.randn(5, 8, 8, 8)
    torch.testing.assert_close(program(latents), tiny.codec.decode(latents), rtol=0, atol=1e-5)


def test_wrong_programs_are_noticed(tiny):
    part = programs.parts(tiny)[1]
    with pytest.raises(RuntimeError, match="decoder: the written program differs by nan at batch 1"):
        programs.compare(part, lambda inputs: part.module(*inputs) * float("nan"))
    with pytest.raises(RuntimeError, match="at batch 3"):
        programs.compare(part, lambda inputs: part.module(*inputs) + 0.01 * (len(inputs[0]) == 3))


@pytest.mark.parametrize("sampler", ["flow_map", "policy"])
def test_programs_of_steps_that_are_no_velocities_are_refused(tiny, tmp_path, sampler):
    with pytest.raises(ConfigError, match=f"sampler '{sampler}': programs predict the velocity"):
        programs.write_torch(with_defaults(tiny, sampler=sampler), tmp_path / "out")
    assert not (tmp_path / "out").exists()


REFUSED = {
    "--diffusers --prompt x": "--prompt is for --onnx and --torch",
    "--onnx --dtype float16": "programs are written in float32",
    "--torch --dtype bfloat16": "programs are written in float32",
}


@pytest.mark.parametrize("line", REFUSED)
def test_wrong_command_lines(tmp_path, capsys, line):
    assert nitro_e.cli.export.main(["shapes", str(tmp_path / "out"), *line.split()]) == 2
    assert REFUSED[line] in capsys.readouterr().err
    assert nitro_e.cli.export.main(["shapes", str(tmp_path), "--diffusers"]) == 2
    assert "exists; remove it" in capsys.readouterr().err
