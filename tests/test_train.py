"""The whole path through `train.py` and `sample.py` at toy size, and every kind of bad input."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from nitro_e.cli import sample, train
from nitro_e.config import ConfigError, TrainingError, load
from nitro_e.data.making import write_shard
from nitro_e.model import EMMDiT
from nitro_e.model.layers import sincos_table
from nitro_e.record import metrics, run_folder
from nitro_e.sampling.pipeline import TextToImage
from nitro_e.stages.first_weights import check_adopted
from nitro_e.stages.recipe import RunConfig
from nitro_e.training import checkpoint
from nitro_e.training.engine import Engine

ROOT = Path(__file__).parent.parent

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220)}
RECIPE = """
name: toy
model: {preset: micro-8}
stage: {kind: flow_matching, optim: {lr: 2e-3, warmup: 2}}
data: {shards: [SHARDS], resolution: 64, workers: 0}
batch: {global: 4}
components: {codec: dct-f8c24, text: hash}
engine: {steps: 6, save_every: 3, sample_every: 0, log_every: 1, precision: float32, tracker: none, ema: {beta: 0.9}}
sampling: {steps: 2, guidance_scale: 2.0}
"""


def code_of(main, arguments) -> int:
    """Of a command, however it ends: argparse leaves by SystemExit."""
    try:
        return main(arguments)
    except SystemExit as error:
        return error.code


def png(colour, size=64) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(buffer, "PNG")
    return buffer.getvalue()


def samples(count: int = 24):
    for index in range(count):
        name, colour = list(COLOURS.items())[index % 3]
        yield {"__key__": f"{index:04d}", "png": png(colour), "txt": f"a plain {name} square"}


@pytest.fixture
def recipe(tmp_path) -> Path:
    write_shard(tmp_path / "toy-000000.tar", samples())
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("SHARDS", f"{tmp_path}/toy-*.tar"))
    return path


def run_train(recipe: Path, run: Path, *overrides: str) -> int:
    return train.main([str(recipe), f"run={run}", *overrides])


def test_the_page_is_made_however_a_run_ends_and_never_decides_it(recipe, tmp_path, monkeypatch, caplog):
    def broken(*_):
        raise TrainingError("broken on purpose")

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("nitro_e.record.pages.write_report", broken)
        assert run_train(recipe, run, "engine.steps=1") == 0
    assert "no report.html: broken on purpose" in caplog.text and not (run / "report.html").exists()
    monkeypatch.setattr(Engine, "_loop", broken)
    assert run_train(recipe, run) == 3 and "broken on purpose" in (run / "report.html").read_text()


def test_changed_data_and_batch_are_continued_on_purpose_only(recipe, tmp_path, capsys):
    run = tmp_path / "run"
    assert run_train(recipe, run, "engine.steps=3") == 0
    write_shard(tmp_path / "toy-000001.tar", [{**s, "__key__": f"x{s['__key__']}"} for s in samples()])
    assert run_train(recipe, run) == 2
    error = capsys.readouterr().err
    assert (
        "data samples was" in error
        and "run=..., or continue with it on purpose: resume.allow=[data]" in error
    )
    assert run_train(recipe, run, "batch=8", "resume.allow=[data]") == 2
    error = capsys.readouterr().err
    assert "(global batch was 4, is 8)" in error and "resume.allow=[batch, data]" in error
    assert run_train(recipe, run, "seed=5", "resume.allow=[data, batch]") == 2
    assert "on purpose" not in capsys.readouterr().err  # another seed is another experiment
    assert run_train(recipe, run, "batch=8", "resume.allow=[data, batch]", "engine.steps=4") == 0
    assert "continued on purpose: global batch was 4, is 8" in capsys.readouterr().out
    assert [row["step"] for row in metrics.read(run)] == [1, 2, 3, 4]
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    (event,) = [line for line in lines if line.get("event") == "resume"]
    assert event["step"] == 3 and event["changed"]["global batch"] == [4, 8]
    assert {"data samples", "data content"} <= event["changed"].keys()
    # from then on the run is that of the new data, and continues without being told
    assert run_train(recipe, run, "batch=8") == 0
    # data that the recipe filters no longer are other data
    assert run_train(recipe, run, "batch=8", "engine.steps=7", "data.captions={txt: 1}") == 2


def test_train_resume_and_sample(recipe, tmp_path, capsys):
    run = tmp_path / "run"
    assert run_train(recipe, run, "engine.steps=3") == 0
    assert run_train(recipe, run, "engine.sample_every=3") == 0  # the same command goes on
    assert "resuming" in capsys.readouterr().out
    assert [row["step"] for row in metrics.read(run)] == [1, 2, 3, 4, 5, 6]
    sheet = Image.open(run / "samples" / "step-0000006-samples.png")
    captions = {f"a plain {name} square" for name in COLOURS}
    drawn = json.loads(sheet.text["prompts"])  # the recipe names none: captions of the first batch
    assert len(drawn) == 4 and set(drawn) <= captions and sheet.width == 4 * 64 + 3 * 2
    report = (run / "report.html").read_text()
    assert all(
        report.count(f"<figcaption>{caption}</figcaption>") >= drawn.count(caption) for caption in captions
    )
    assert (run / "config.yaml").is_file()
    assert run_train(recipe, run) == 0  # nothing left to do

    out = tmp_path / "out"
    arguments = ["--prompt", "a plain red square", "--num-images", "2", "--seed", "5", "--out", str(out)]
    assert sample.main([str(run), *arguments]) == 0
    images = sorted(out.glob("0*.png"))
    assert len(images) == 2 and (out / "grid.png").is_file()
    first = Image.open(images[0])
    assert first.size == (64, 64) and first.text["prompt"] == "a plain red square"
    assert json.loads(first.text["settings"])["seed"] == 5
    one = TextToImage.from_pretrained(f"{run}@ema")("a plain red square", seeds=6).images
    assert np.abs(np.asarray(one[0]).astype(int) - np.asarray(Image.open(images[1])).astype(int)).max() <= 1


def test_a_folder_may_have_an_at_sign_in_its_name(tmp_path):
    for folder in ("exp@2/checkpoints/step-0000001/ema", "exp@2/base"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "exp@2/base/config.json").touch()
    run, checkpoint = tmp_path / "exp@2", tmp_path / "exp@2/checkpoints/step-0000001"
    (checkpoint / "meta.json").write_text("{}")
    assert run_folder.model_folder(run / "base") == run / "base"
    assert run_folder.model_folder(f"{checkpoint}@ema") == checkpoint / "ema"
    assert run_folder.split_source(run) == (str(run), "")
    assert run_folder.split_source(f"{run}@best") == (str(run), "best")
    with pytest.raises(ConfigError, match="'@emma' is unknown, did you mean 'ema'"):
        run_folder.model_folder(f"{run}@emma")


def test_training_learns_the_colours(recipe, tmp_path):
    """After a minute's worth of toy steps the loss has fallen and prompts decide the colour."""
    run = tmp_path / "run"
    assert (
        run_train(
            recipe,
            run,
            "engine.steps=120",
            "engine.save_every=120",
            "engine.log_every=20",
            "engine.ema=null",
            "batch=12",
            "model.gate_init=one",
            "stage.optim.lr=4e-3",
        )
        == 0
    )
    losses = [row["loss"] for row in metrics.read(run)]
    assert losses[-1] < 0.5 * losses[0]
    prompts = [f"a plain {name} square" for name in COLOURS]
    settings = {"num_inference_steps": 10, "guidance_scale": 1.0, "output_type": "pixels"}
    pixels = TextToImage.from_pretrained(run)(prompts, **settings).images
    mean = pixels.mean(dim=(2, 3))  # (3 prompts, RGB)
    assert mean.argmax(dim=1).tolist() == [0, 1, 2]


def test_sigkill_and_the_same_command_again(recipe, tmp_path):
    """A killed run continues from its last checkpoint and ends with the losses of an undisturbed one."""
    clean, run = tmp_path / "clean", tmp_path / "run"
    options = ["engine.steps=40", "engine.save_every=5"]
    assert run_train(recipe, clean, *options) == 0
    command = [sys.executable, str(ROOT / "train.py"), str(recipe), f"run={run}", *options]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not run_folder.latest(run):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    reached = run_folder.read_meta(run_folder.latest(run))["step"]
    assert reached < 40, "the process ended before it could be killed"
    assert run_train(recipe, run, *options) == 0
    expected = {row["step"]: row["loss"] for row in metrics.read(clean)}
    assert {row["step"]: row["loss"] for row in metrics.read(run)} == expected


@pytest.mark.parametrize(
    ("number", "whole_group"), [(signal.SIGQUIT, False), (signal.SIGTERM, True), (signal.SIGHUP, True)]
)
def test_signals_save_and_end_well(recipe, tmp_path, number, whole_group):
    """Also when its data workers get the signal too, as from a job manager: their death ended the run unsaved.

    The log file of such a job has one plain line per report and no carriage returns.
    """
    run, log = tmp_path / "run", tmp_path / "log"
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        str(recipe),
        f"run={run}",
        "engine.steps=100000",
        "engine.save_every=100000",
        "data.workers=1",
    ]
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # a shell's background job ignores some, and so would its children
            preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
        )
    while process.poll() is None and not (run / "metrics.jsonl").exists():
        time.sleep(0.05)
    time.sleep(1)
    (os.killpg if whole_group else os.kill)(process.pid, number)
    process.wait(timeout=60)
    text, status = log.read_text(), run_folder.read_status(run)
    assert process.returncode == 0 and "stopped at step" in text and "\r" not in text
    assert run_folder.read_meta(checkpoint.latest_valid(run))["step"] == status["step"] > 0
    assert status["state"] == "preempted"
    reports = [line for line in text.splitlines() if line.startswith("flow_matching ")]
    form = r"flow_matching \d+/100000  loss \S+  grad_norm \S+  lr \S+  \S+ samples/s  \S+ GB  ETA .*"
    assert len(reports) == len(metrics.read(run)) and all(re.fullmatch(form, line) for line in reports)


def test_real_component_classes_and_repa(recipe, tmp_path):
    """DC-AE, Llama and DINOv2 of the real library classes, tiny and random, from local folders; REPA on."""
    tiny.save_autoencoder_dc(tmp_path / "dcae")
    tiny.save_llama(tmp_path / "llama")
    tiny.save_dinov2(tmp_path / "dino")
    run = tmp_path / "run"
    options = [
        f"components={{codec: dc-ae-f32c32={tmp_path}/dcae, "
        f"text: {{name: llama-3.2-1b, path: {tmp_path}/llama, length: 16}}, "
        f"vision: {{name: dinov2-b14, path: {tmp_path}/dino}}}}",
        "model.latent_channels=8",
        "model.text_width=32",
        "data.resolution=32",
        "stage.repa={taps: [1], width: 16}",
        "engine.ema=null",
    ]
    assert run_train(recipe, run, *options, "sampling.height=7") == 2  # the stride is in the codec's files
    assert not (run / "metrics.jsonl").exists()
    assert run_train(recipe, run, *options) == 0
    rows = metrics.read(run)
    assert all(-1 <= row["repa_loss"] <= 1 for row in rows)
    for row in rows:
        assert row["loss"] == pytest.approx(row["velocity_loss"] + 0.5 * row["repa_loss"], rel=1e-4)
    # a run that goes on after the end of REPA
    assert run_train(recipe, run, *options, "stage.repa.stop=0.5", "engine.steps=7") == 0
    assert "repa_loss" not in metrics.read(run)[-1]
    exported = EMMDiT.from_pretrained(run_folder.model_folder(run))
    assert not any("projector" in name for name in exported.state_dict())
    assert len(TextToImage.from_pretrained(run)("a red circle").images) == 1
    (tmp_path / "llama").rename(tmp_path / "moved")
    arguments = [str(run), "--prompt", "a red circle", "--out", str(tmp_path / "out")]
    assert sample.main(arguments) == 2
    for given in (f"{tmp_path}/moved", f"llama-3.2-1b={tmp_path}/moved"):
        assert sample.main([*arguments, "--text", given]) == 0
    assert sample.main([*arguments, "--text", "hash"]) == 2


def test_stored_latents_are_trained_on_without_images(recipe, tmp_path):
    """Training on `.npy` raw latents gives the losses of training on the images they come from."""
    from nitro_e.encoders.codec import DCT_SIZES, DCTCodec

    codec = DCTCodec(*DCT_SIZES["dct-f8c24"])
    stored = []
    for item in samples():
        array = np.asarray(Image.open(io.BytesIO(item["png"])))
        pixels = torch.from_numpy(array.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        latent = codec.encode_pixels(pixels)[0].numpy().astype(np.float16)
        stored.append({"__key__": item["__key__"], "npy": latent, "txt": item["txt"]})
    write_shard(tmp_path / "stored" / "toy-000000.tar", stored)
    assert run_train(recipe, tmp_path / "a") == 0
    assert run_train(recipe, tmp_path / "b", f"data.shards=[{tmp_path}/stored/*.tar]") == 0
    for a, b in zip(metrics.read(tmp_path / "a"), metrics.read(tmp_path / "b"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-2)


def test_pack_encode_verify_train(recipe, tmp_path, capsys):
    """The tools' own output, end to end; columns made by another encoder are refused."""
    from nitro_e.cli import data as tool

    columns = str(tmp_path / "columns")
    shards = str(tmp_path / "toy-*.tar")
    pack = ["pack", "webdataset", shards, "--out", columns, "--name", "toy", "--samples-per-shard", "12"]
    assert tool.main(pack) == 0
    images = f"{columns}/images-*.tar"
    encode = [
        "encode",
        images,
        "--out",
        columns,
        "--codec",
        "dct-f8c24",
        "--text",
        "hash",
        "--resolution",
        "64",
    ]
    assert tool.main(encode) == 0
    assert tool.main(["verify", f"{columns}/*.tar", "--deep"]) == 0
    stored = f"data.shards=[{columns}/latents-*.tar, {columns}/text-*.tar]"
    assert run_train(recipe, tmp_path / "stored", stored) == 0
    assert run_train(recipe, tmp_path / "online", f"data.shards=[{images}]") == 0
    for a, b in zip(metrics.read(tmp_path / "stored"), metrics.read(tmp_path / "online"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-2)
    (manifest,) = (tmp_path / "columns").glob("manifest-*latents*.jsonl")
    written = manifest.read_text()
    manifest.write_text(written.replace('"layers": "last"', '"layers": "normed_mean"'))
    capsys.readouterr()
    assert run_train(recipe, tmp_path / "layers", stored) == 2
    message = "components.text.layers is 'last', but the stored text was made with 'normed_mean'"
    assert message in capsys.readouterr().err
    # of one shard of a column, not the first
    first, *others = (line for line in written.splitlines() if '"text-' in line)
    assert others, "one shard of text: nothing to tell apart"
    last = others[-1].replace('"layers": "last"', '"layers": "normed_mean"')
    manifest.write_text(written.replace(others[-1], last))
    assert run_train(recipe, tmp_path / "mixed", stored) == 2
    assert f"{message} ({json.loads(last)['shard']})" in capsys.readouterr().err
    manifest.write_text(written.replace("dct-f8c24", "dct-of-old"))
    assert run_train(recipe, tmp_path / "other", stored) == 2
    assert "'dct-f8c24', but the stored latents were made with 'dct-of-old'" in capsys.readouterr().err


def test_init_from_starts_at_the_weights_of_another_run(recipe, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert run_train(recipe, first) == 0
    assert run_train(recipe, second, f"init_from={first}@ema", "engine.steps=1", "stage.optim.lr=0") == 0
    ours = EMMDiT.from_pretrained(run_folder.model_folder(f"{second}@model")).state_dict()
    theirs = EMMDiT.from_pretrained(run_folder.model_folder(f"{first}@ema")).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    first.rename(tmp_path / "gone")  # a resume does not look for it
    assert run_train(recipe, second, f"init_from={first}@ema", "engine.steps=2") == 0
    (tmp_path / "gone").rename(first)
    assert run_train(recipe, tmp_path / "third", f"init_from={first}", "model.heads=4") == 2
    assert "another architecture (model.heads was 2, is 4)" in capsys.readouterr().err


def test_a_run_goes_on_at_another_resolution(recipe, tmp_path):
    """The weights are those of the lower one; the released sizes share positions, and a smaller model is refused."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert run_train(recipe, first, "data.resolution=32", "model.attention=[full]", "engine.steps=1") == 0
    higher = [f"init_from={first}@model", "engine.steps=1", "stage.optim.lr=0"]
    assert run_train(recipe, second, *higher) == 0
    ours, theirs = (
        EMMDiT.from_pretrained(run_folder.model_folder(f"{run}@model")) for run in (second, first)
    )
    assert ours.config.attention != theirs.config.attention
    state = theirs.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())

    def model(name, *overrides):
        return load(RunConfig, ROOT / f"configs/{name}.yaml", overrides).model

    at_256 = model("nitro_e_512/1_pretrain", "data.resolution=256", "model.attention=[full]")
    at_512, at_1024 = model("nitro_e_512/2_finetune"), model("nitro_e_1024/2_finetune")
    for before, after in ((at_256, at_512), (at_512, at_1024)):
        check_adopted("before", before, after)
    tables = [
        sincos_table(config.position_table, 16, config.base_grid, config.interpolation)
        for config in (at_256, at_512, at_1024)
    ]
    assert torch.equal(tables[0], tables[1]) and torch.equal(tables[1], tables[2])
    with pytest.raises(ConfigError, match="'small' is of another architecture .model.width was 384, is 768"):
        check_adopted("small", model("nitro_e_256_small/2_finetune"), at_512)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(recipe, tmp_path, capsys, value):
    """Wherever weights are read: they were drawn from, trained on and merged without a word."""
    assert run_train(recipe, tmp_path / "run", "engine.steps=1") == 0
    broken = tmp_path / "broken"
    shutil.copytree(run_folder.model_folder(tmp_path / "run"), broken)
    state = load_file(broken / "model.safetensors")
    for name in ("blocks.0.image.attention.qkv.weight", "out.bias"):
        state[name].view(-1)[-1] = value
    save_file(state, broken / "model.safetensors")
    capsys.readouterr()
    second = ["init_from=" + str(broken)]
    teacher = [
        "stage={kind: distill, preset: ladd4, teacher: " + str(broken) + "}",
        "sampling.guidance_scale=1",
    ]
    sampled = sample.main([str(broken), "--prompt", "a plain red square", "--out", str(tmp_path / "out")])
    trained = run_train(recipe, tmp_path / "second", *second)
    distilled = run_train(recipe, tmp_path / "third", *teacher)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert (sampled, trained, distilled) == (2, 2, 2) and len(errors) == 3
    for error in errors:
        assert f"{broken}/model.safetensors: 2 of {len(state)} tensors are not finite" in error
        assert "give an earlier checkpoint" in error and not (tmp_path / "out").exists()


def break_captions(folder: Path) -> None:
    write_shard(
        folder / "toy-000000.tar", ({k: v for k, v in item.items() if k != "txt"} for item in samples())
    )


def break_images(folder: Path) -> None:
    write_shard(folder / "toy-000000.tar", ({**item, "png": b"not an image"} for item in samples()))


def truncate(folder: Path) -> None:
    path = folder / "toy-000000.tar"
    path.write_bytes(path.read_bytes()[:5000])


BAD = {
    "unknown key": (["stage.optim.lrr=1"], "unknown key 'stage.optim.lrr', did you mean 'stage.optim.lr'?"),
    "wrong type": (["engine.steps=many"], "engine.steps: expected int, got 'many'"),
    "no such recipe": (None, "does not exist"),
    "missing shards": (["data.shards=[nowhere/x-000.tar, nowhere/x-001.tar]"], "nowhere/x-000.tar"),
    "no captions": (break_captions, "caption"),
    "images that do not decode": (break_images, "image does not decode"),
    "truncated tar": (truncate, "toy-000000.tar"),
    "tokens and pattern": (
        ["components.text={name: hash, length: 18}"],
        "nearest text length that works: 16 or 20",
    ),
    "grid and compression": (["data.resolution=48"], "compression ratio 4"),
    "channels": (["model.latent_channels=32"], "model.latent_channels is 32, but 'dct-f8c24' has 24"),
    "text width": (["model.text_width=64"], "model.text_width is 64, but 'hash' gives 128"),
    "codec name": (["components.codec=dct-f8c42"], "did you mean 'dct-f8c24'?"),
    "REPA alone": (["stage.repa={taps: [1]}"], "REPA needs a vision encoder"),
    "REPA tap": (["stage.repa={taps: [2]}", "components.vision=dinov2-b14"], "choose from 1, 4"),
    "init_from": (["init_from=nowhere"], "'nowhere' does not exist"),
    "height of the images": (["sampling.height=7"], "sampling: 7x64 px: both sides must be multiples of 8"),
    "width of the images": (["sampling.width=72"], "sampling: 64x72 px: 8x9 tokens are not a multiple"),
    "images that are scored": (
        [
            "evaluation={prompts: shapes-heldout, rewards: [{name: shapes}], sampling: {resolution: 64, width: 7}}"
        ],
        "evaluation.sampling: 64x7 px",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, recipe, tmp_path, capsys):
    change, words = BAD[case]
    if change is None:
        recipe.unlink()
    elif callable(change):
        change(tmp_path)
    assert run_train(recipe, tmp_path / "run", *(change if isinstance(change, list) else [])) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and words in lines[0] and "Traceback" not in error


def test_one_image_that_does_not_decode_is_replaced_and_counted(recipe, tmp_path, caplog):
    items = list(samples())
    items[7]["png"] = b"not an image"
    write_shard(tmp_path / "toy-000000.tar", items)
    run = tmp_path / "run"
    assert run_train(recipe, run) == 0
    reports = [json.loads(line) for line in (run / "bad_samples.rank0.jsonl").read_text().splitlines()]
    assert [report["key"] for report in reports] == ["0007"]
    assert metrics.read(run)[-1]["bad_samples"] == 1


def test_a_checkpoint_of_another_architecture_is_refused(recipe, tmp_path, capsys):
    run = tmp_path / "run"
    assert run_train(recipe, run) == 0
    before = (run / "config.yaml").read_text()
    assert run_train(recipe, run, "model.groups=[1, 3, 1]", "engine.steps=9") == 2
    error = capsys.readouterr().err
    assert "model.groups was" in error and "is [1, 3, 1]" in error
    assert (run / "config.yaml").read_text() == before


def test_a_changed_config_is_told_recorded_and_the_old_one_kept(recipe, tmp_path, capsys):
    run = tmp_path / "run"
    assert run_train(recipe, run, "engine.steps=3") == 0
    before = (run / "config.yaml").read_text()
    capsys.readouterr()
    assert run_train(recipe, run, "stage.caption_dropout=0.4", "engine.ema={beta: 0.5}") == 0
    told = capsys.readouterr().out
    assert "stage.caption_dropout was 0.1, is 0.4" in told and "engine.ema.beta was 0.9, is 0.5" in told
    (event,) = [row for row in metrics.read_events(run) if row["event"] == "config"]
    assert event["step"] == 3 and event["changed"] == {
        "engine.steps": [3, 6],
        "engine.ema.beta": [0.9, 0.5],
        "stage.caption_dropout": [0.1, 0.4],
    }
    assert (run / "config.1.yaml").read_text() == before
    assert "caption_dropout: 0.4" in (run / "config.yaml").read_text()
    assert "stage.caption_dropout was 0.1, is 0.4" in (run / "report.html").read_text()
    assert (
        run_train(recipe, run, "engine.steps=7", "stage.caption_dropout=0.4", "engine.ema={beta: 0.5}") == 0
    )
    assert (run / "config.2.yaml").is_file() and not (run / "config.3.yaml").exists()


def test_published_weights_have_the_permissions_of_other_files(recipe, tmp_path):
    run = tmp_path / "run"
    assert run_train(recipe, run, "engine.steps=3") == 0
    folder = run_folder.model_folder(run)
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert modes == {(run / "config.yaml").stat().st_mode}


@pytest.mark.slow
def test_compiled_and_packed_sampling_draws_the_same(recipe, tmp_path):
    run = tmp_path / "run"
    assert run_train(recipe, run, "engine.steps=30", "model.gate_init=one") == 0
    for out, options in (("plain", []), ("compiled", ["--compile"])):
        arguments = [
            "--prompt",
            "a plain red square",
            "--dtype",
            "bfloat16",
            "--out",
            str(tmp_path / out),
            *options,
        ]
        assert sample.main([str(run), *arguments]) == 0
    ours, theirs = (
        np.asarray(Image.open(tmp_path / out / "grid.png")).astype(float) for out in ("plain", "compiled")
    )
    assert np.abs(ours - theirs).mean() < 3


def test_sample_refuses_what_it_cannot_draw(recipe, tmp_path, capsys):
    assert sample.main([str(tmp_path / "nowhere"), "--prompt", "x"]) == 2
    assert run_train(recipe, tmp_path / "run", "engine.steps=1") == 0
    for arguments, words in (
        ([], "nothing to draw"),
        (["--prompt", "x", "--steps", "0"], "steps must be at least 1"),
        (["--prompt", "x", "--sampler", "heunn"], "sampling.sampler: 'heunn' is not one of euler, heun"),
        (["--prompts-file", "missing.txt"], "does not exist"),
        (["--prompt", "x", "--num-images", "0"], "--num-images: must be at least 1, got 0"),
        (["--prompt", "x", "--guidance", "nan"], "sampling.guidance_scale must be a finite number, got nan"),
        (["--prompt", "x", "--seed", "1e30"], "--seed: must be at most 4.61169e+18, got 1e30"),
        (["--prompt", "x", "--device", "foo"], "--device: 'foo' is no device; use cpu, cuda, cuda:1 or mps"),
        (["--prompt", "x", "--device", "meta"], "--device: 'meta' is no device"),
        (["--prompt", "a \udcff circle"], "--prompt: text: '\\udcff' at character 2 is no character"),
    ):
        assert code_of(sample.main, [str(tmp_path / "run"), *arguments]) == 2
        assert words in capsys.readouterr().err


def test_dry_run_tells_what_would_be_trained(recipe, tmp_path, capsys):
    assert train.main([str(recipe), f"run={tmp_path}/run", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert (
        "blocks inside" in out
        and "global batch         4" in out
        and "toy-000000.tar:" in out
        and not (tmp_path / "run").exists()
    )


RECIPES = sorted((ROOT / "configs").glob("*/*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_dry_run_of_every_recipe_without_data_or_earlier_runs(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    grpo = "grpo" in path.stem
    override = "stage.prompts.num=50" if grpo else "batch=12"  # chains of four steps, three to a prompt
    optimizers = tiny.optimizers_of(path)
    assert train.main([str(path), override, "stage.optim.lr=1e-3", *optimizers, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "blocks inside" in told and "\ncodec  " in told and "\ncheckpoints  " in told
    assert ("FLOP for the model" in told) == (not grpo)
    no_images = path.stem in ("4_distill", "4_distill_second") and path.parent.name != "quick"
    assert ("missing shards: " in told) == (not grpo and not no_images)
    assert ("each of 50 prompts" in told) == grpo and "first sample" not in told
    assert ("runs/nitro" in told.partition("warning ")[2]) == (
        "nitro_e" in str(path) and "1_pre" not in path.name
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["init_from=runs/nothing"], "init_from: 'runs/nothing' does not exist"),
        (["init_from=shapes"], "'shapes' is of another architecture (model.latent_channels was 8, is 24"),
        (["data.shards=[nowhere/*.tar]"], "missing shards: nowhere/*.tar"),
        (
            ["data={sources: {a: {shards: [a.tar]}, b: {shards: [b.tar]}}, resolution: 64}"],
            "a.tar; check the path or the range; data.sources.b.shards: missing shards: b.tar",
        ),
        (
            ["components.codec={name: dc-ae-f32c32, path: ./gone}"],
            "components.codec.path: folder './gone' does not",
        ),
        (
            ["components.text={name: llama-3.2-1b, length: 16, path: ./gone}", "model.text_width=64"],
            "components.text.path: folder './gone' does not",
        ),
        (["engine.step=3"], "did you mean 'engine.steps'"),
    ],
)
def test_dry_run_refuses_what_is_asked_for_and_not_there(recipe, tmp_path, capsys, overrides, words):
    assert run_train(recipe, tmp_path / "run", *overrides, "--dry-run") == 2
    assert words in capsys.readouterr().err


def test_dry_run_refuses_a_missing_teacher_of_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = str(ROOT / "configs/nitro_e_512/4_ladd.yaml")
    assert train.main([recipe, "stage.teacher=runs/gone", "--dry-run"]) == 2
    assert "stage.teacher: 'runs/gone' does not exist" in capsys.readouterr().err
    assert train.main([recipe, "sampling.width=1000", "--dry-run"]) == 2
    assert "sampling: 512x1000 px: both sides must be multiples of 32" in capsys.readouterr().err
