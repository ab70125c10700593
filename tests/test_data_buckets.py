"""Aspect buckets: batches of one size in an exact order, from packing to training."""

import io
import json
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from nitro_e.cli import data as tool
from nitro_e.cli import sample, synthesize, train
from nitro_e.config import ConfigError, load, to_dict
from nitro_e.data import DataConfig, SourceConfig, open_data
from nitro_e.data.buckets import NO_SIZE, nearest
from nitro_e.data.decode import decode_image
from nitro_e.data.making import write_shard
from nitro_e.data.order import BucketOrder, quotas
from nitro_e.encoders.components import ComponentConfig, build_codec, build_text_encoder
from nitro_e.interfaces import DistContext
from nitro_e.model import EMMDiT, ModelConfig
from nitro_e.model.pretrained import load_pretrained, save_pretrained
from nitro_e.randomness import SampleRandom
from nitro_e.record import metrics, run_folder
from nitro_e.sampling.samplers import SamplingConfig
from nitro_e.sampling.sources import Use
from nitro_e.sizes import parse_sizes
from nitro_e.stages import validation
from nitro_e.stages.assembly import Parts
from nitro_e.stages.recipe import RunConfig
from nitro_e.training.batch import Split

BUCKETS = ("16x16", "8x24", "24x8")
SHAPES = [(20, 20), (12, 30), (33, 11), (40, 37)]  # width, height


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NITRO_E_CACHE", str(tmp_path / "cache"))


def image(i, scale=1):
    width, height = (side * scale for side in SHAPES[i % 4])
    pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    info = {"width": width, "height": height}
    return {"png": buffer.getvalue(), "txt": f"caption {i}", "json": info}


def write(tmp_path, count=60, per_shard=13, name="images", scale=1):
    for shard, start in enumerate(range(0, count, per_shard)):
        samples = [
            {"__key__": f"{name}{i:03d}", **image(i, scale)}
            for i in range(start, min(start + per_shard, count))
        ]
        write_shard(tmp_path / f"{name}-{shard:03d}.tar", samples)
    return str(tmp_path / f"{name}-*.tar")


def opened(*shards, batch_size=8, global_batch=8, seed=0, **options):
    config = DataConfig(
        shards=shards,
        batch_size=batch_size,
        global_batch=global_batch,
        buckets=BUCKETS,
        resolution=16,
        **{"workers": 0, **options},
    )
    return open_data(config, need_pixels=False, seed=seed, stage="s")


def bucket_of(key):
    return [0, 2, 1, 0][int(key[-3:]) % 4]


def test_an_image_belongs_to_the_nearest_aspect():
    sizes = parse_sizes(BUCKETS)
    assert sizes == ((16, 16), (8, 24), (24, 8))
    for info, bucket in (
        ({"width": 100, "height": 100}, 0),
        ({"width": 173, "height": 100}, 0),
        ({"width": 174, "height": 100}, 1),  # beyond the square root of 3
        ({"width": "10", "height": 40}, 2),
        ({"width": 10}, NO_SIZE),
        ({"width": 0, "height": 10}, NO_SIZE),
        ({}, NO_SIZE),
    ):
        assert nearest(sizes, info) == bucket
    for wrong in (["16"], ["16x"], ["0x16"], ["16x16", "16x16"], ["-8x8"]):
        with pytest.raises(ConfigError, match="data.buckets: "):
            parse_sizes(wrong)


def test_images_are_resized_to_cover_and_cropped_in_the_centre():
    ramp = np.broadcast_to(np.arange(40, dtype=np.uint8)[None, :, None] * 6, (20, 40, 3))
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(ramp)).save(buffer, "PNG")
    assert np.array_equal(decode_image(buffer.getvalue(), (20, 40)), ramp.transpose(2, 0, 1))
    assert np.array_equal(decode_image(buffer.getvalue(), (20, 30)), ramp.transpose(2, 0, 1)[:, :, 5:35])
    assert np.array_equal(decode_image(buffer.getvalue(), (10, 40)), ramp.transpose(2, 0, 1)[:, 5:15])
    half = decode_image(buffer.getvalue(), (10, 20))
    np.testing.assert_allclose(half[0, 4, 2:-2], ramp[0, :, 0].reshape(20, 2).mean(1)[2:-2], atol=1)


@pytest.mark.parametrize("weights", [None, [3.0, 1.0]])
def test_order_of_buckets(weights):
    """Every batch is of one group; every epoch of a group has each of its samples once; the mixture keeps its weights."""
    rng = np.random.default_rng(0)
    sizes = [rng.integers(5, 40, 6), rng.integers(5, 40, 4)]
    total = int(sum(map(sum, sizes)))
    first = int(sizes[0].sum())
    groups = rng.choice(3, total, p=[0.6, 0.3, 0.1])
    order = BucketOrder(sizes, weights, groups, 16, seed=1, stage="s")
    batches = order.ids(np.arange(16 * 512)).reshape(512, 16)
    assert (groups[batches] == groups[batches[:, :1]]).all()
    for number in (0, 5, 511):
        assert order.group(16 * number + 3) == groups[batches[number, 0]]
    share = [(groups == k).sum() for k in range(3)]
    if weights is not None:
        source = (np.arange(total) >= first).astype(int)
        per_sample = np.array([3.0 / first, 1.0 / (total - first)])[source]
        share = [per_sample[groups == k].sum() for k in range(3)]
        assert (batches < first).mean() == pytest.approx(0.75, abs=0.01)
    assert np.bincount(groups[batches[:, 0]]).tolist() == quotas(share).tolist()
    for group in range(3) if weights is None else ():
        seen = batches[groups[batches[:, 0]] == group].flatten()
        members = np.flatnonzero(groups == group)
        for epoch in range(len(seen) // len(members)):
            part = seen[epoch * len(members) : (epoch + 1) * len(members)]
            assert sorted(part.tolist()) == members.tolist()
    # any part of it, in any order
    assert (order.ids(np.arange(1000, 1100)) == batches.flatten()[1000:1100]).all()
    for position in (7, 4321):
        (part,), (counter,) = order.locate(np.array([position]))
        assert order.sample(int(part), np.array([counter]))[0] == batches.flatten()[position]
    assert order.fingerprint() != BucketOrder(sizes, weights, groups, 8, seed=1, stage="s").fingerprint()


def test_batches_do_not_depend_on_world_workers_or_start(tmp_path):
    shards = write(tmp_path)
    data = opened(shards)
    assert data.filtered == ["buckets: 16x16 30, 8x24 15, 24x8 15"]
    reference = list(islice(data.records(), 24))
    sizes = set()
    for records in reference:
        (bucket,) = {bucket_of(key) for key in records.keys}
        size = parse_sizes(BUCKETS)[bucket]
        sizes.add(size)
        assert records.pixels.shape == (8, 3, *size)
        for key, pixels in zip(records.keys, records.pixels):
            np.testing.assert_array_equal(pixels, decode_image(image(int(key[-3:]))["png"], size))
    assert len(sizes) == 3
    assert data.keys(range(24 * 8)) == [key for records in reference for key in records.keys]
    for world, workers, micro, step in [
        (1, 2, 1, 0),
        (2, 0, 1, 7),
        (2, 2, 2, 3),
        (4, 0, 2, 11),
        (1, 0, 4, 5),
    ]:
        part = opened(shards, batch_size=8 // world // micro, workers=workers)
        ranks = [
            part.records(step, micro_batches_per_step=micro, rank=rank, world=world) for rank in range(world)
        ]
        for want in reference[step : step + 3]:
            got = [next(records) for records in ranks for _ in range(micro)]
            assert sum((records.keys for records in got), []) == want.keys
            assert torch.equal(torch.cat([records.pixels for records in got]), want.pixels)
        for records in ranks:
            records.close()


def test_a_bad_sample_is_replaced_by_one_of_its_size(tmp_path):
    shards = write(tmp_path)
    clean = [records.keys for records in islice(opened(shards).records(), 30)]
    broken = [{"__key__": f"images{i:03d}", **image(i)} for i in range(13)]
    broken[5]["png"] = b"broken"
    write_shard(tmp_path / "images-000.tar", broken)
    data = opened(shards)
    for keys, records in zip(clean, data.records()):
        assert {bucket_of(key) for key in records.keys} == {bucket_of(keys[0])} and records.pixels.any(
            (1, 2, 3)
        ).all()
        assert not any(key.endswith("images005") for key in records.keys)
    assert len(data.bad) == 1


def test_mixtures_and_samples_without_a_size(tmp_path):
    write(tmp_path / "a"), write(tmp_path / "b", 40)
    write_shard(tmp_path / "b/images-009.tar", [{"__key__": "x000", **image(0), "json": {}}])
    sources = {
        name: SourceConfig(shards=(str(tmp_path / name / "*.tar"),), weight=weight)
        for name, weight in (("a", 1.0), ("b", 3.0))
    }
    config = DataConfig(sources=sources, buckets=BUCKETS, batch_size=4, resolution=16, workers=0)
    data = open_data(config, need_pixels=False, seed=0, stage="s")
    assert data.filtered[0] == "buckets: 1 of 101 samples have no width and height in their json"
    assert len(data) == 100 and not data.catalog.problems
    ids = data.order.ids(np.arange(4 * 512))
    assert (ids >= 60).mean() == pytest.approx(0.75, abs=0.01)
    config = DataConfig(shards=(str(tmp_path / "b/images-009.tar"),), buckets=BUCKETS, workers=0)
    with pytest.raises(ConfigError, match="buckets: 1 of 1 samples have no width and height.*data pack"):
        open_data(config, need_pixels=False, seed=0, stage="s")


def test_encoded_latents_of_buckets(tmp_path):
    """encode stores every image at its own size; training reads what the codec gives for the same pixels."""
    shards = write(tmp_path)
    encode = [
        "encode",
        shards,
        "--out",
        str(tmp_path),
        "--codec",
        "dct-f8c24",
        "--resolution",
        "16",
        "--workers",
        "0",
    ]
    assert tool.main([*encode, "--batch-size", "4", "--buckets", *BUCKETS]) == 0
    assert tool.main(["verify", str(tmp_path / "latents-*.tar")]) == 0
    (line, *_) = (tmp_path / "manifest-latents.jsonl").read_text().splitlines()
    assert json.loads(line)["encoder"]["buckets"] == list(BUCKETS)
    codec = build_codec(ComponentConfig(name="dct-f8c24"))
    stored, fresh = opened(str(tmp_path / "*.tar")), opened(shards)
    assert stored.has_latents and not stored.has_pixels
    for latents, images in islice(zip(stored.records(), fresh.records()), 12):
        pixels = images.pixels.float() / 127.5 - 1
        assert latents.keys == images.keys
        # encode computes them in batches, where sums may be rounded in another order
        torch.testing.assert_close(latents.latents, codec.encode_pixels(pixels).half(), rtol=1e-3, atol=1e-6)
    with pytest.raises(
        ConfigError, match=r"latents are float16 \(24, 1, 3\), the model needs .*\(24, 2, 3\)"
    ):
        config = DataConfig(
            shards=(str(tmp_path / "*.tar"),), buckets=("16x16", "24x8", "16x24"), resolution=16, workers=0
        )
        open_data(config, need_pixels=False, seed=0, stage="s", latent_shape=(24, 2, 2))


RECIPE = """
name: toy
model: {preset: micro-8}
stage: {kind: flow_matching, optim: {lr: 2e-3, warmup: 2}}
data: {shards: [SHARDS], resolution: 64, workers: 0, buckets: [64x64, 32x128, 128x32]}
batch: {global: 4}
components: {codec: dct-f8c24, text: hash}
engine: {steps: 6, save_every: 3, sample_every: 6, log_every: 1, precision: float32, tracker: none}
sampling: {steps: 1}
"""


def test_training_on_buckets_resumes_exactly_and_draws_them(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("SHARDS", write(tmp_path, 24, scale=4)))

    def run(name, *options):
        return train.main([str(recipe), f"run={tmp_path / name}", *options])

    assert run("dry", "--dry-run") == 0
    assert "data                 buckets: 64x64 12, 32x128 6, 128x32 6" in capsys.readouterr().out
    assert run("whole") == 0
    assert run("parts", "engine.steps=3") == 0 and run("parts") == 0
    losses = [[row["loss"] for row in metrics.read(tmp_path / name)] for name in ("whole", "parts")]
    assert len(losses[0]) == 6 and losses[0] == losses[1]
    sheet = Image.open(tmp_path / "whole/samples/step-0000006-samples-32x128.png")
    assert sheet.width >= 4 * 128
    assert "samples-32x128" in (tmp_path / "whole/report.html").read_text()
    draw = [str(tmp_path / "whole"), "--prompt", "a", "--device", "cpu", "--out", str(tmp_path / "drawn")]
    assert sample.main([*draw, "--aspect", "16:5"]) == 0
    assert Image.open(tmp_path / "drawn/grid.png").size[0] >= 128
    assert "128x32 px" not in (told := capsys.readouterr().out) and "32x128 px" in told
    assert sample.main([*draw, "--aspect", "1:1", "--height", "64"]) == 2
    assert run("bad", "data.buckets=[64x64, 40x96]") == 2
    error = capsys.readouterr().err
    assert "data.buckets: 40x96: " in error and "the nearest that work: " in error
    assert run("auto", "data.buckets=auto", "data.resolution='64'", "--dry-run") == 0
    found = capsys.readouterr().out.split("buckets:")[1]
    assert "64x64" in found and "32x128" in found


# ---- validation


def held_out(folder, **more):
    values = {"shards": [f"{folder}/held-*.tar"], "times": [0.25, 0.75], "samples": 9, "batch_size": 4}
    return f"validation={ {**values, 'every': 3, **more} }".replace("None", "null")


def validator_of(recipe, *options, rank=0, world=1):
    config = load(RunConfig, recipe, options)
    codec, text = build_codec(config.components.codec), build_text_encoder(config.components.text)
    parts = Parts(
        torch.device("cpu"), rank, world, Split(4, 1), torch.no_grad, codec, text, None, 0.0, (24, 8, 8)
    )
    return validation.open_validator(config, config.validation, parts, DistContext(rank, world))


def test_validation_sees_every_image_once_at_its_size(tmp_path):
    """The published weights, one image after the other; the same bits on any number of processes."""
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(RECIPE.replace("SHARDS", write(tmp_path, 24, scale=4)))
    write(tmp_path, 17, 6, "held", scale=4)
    assert train.main([str(recipe), f"run={run}", "engine.steps=3", held_out(tmp_path)]) == 0
    model = load_pretrained(run_folder.model_folder(run)).float().eval()
    found = validation.read(run)
    assert found.values.shape == (9, 2) and len(set(found.keys)) == 9
    validator = validator_of(recipe, held_out(tmp_path))
    codec, text, order = validator.parts.codec, validator.parts.text, validator.data.order
    assert (order.counted.sum(), len(order.counted) % 4) == (9, 0)
    rows = iter(range(9))
    for position in np.flatnonzero(order.counted).tolist():
        key = validator.data.keys(range(position, position + 1))[0]
        number, row = int(key[-3:]), next(rows)
        size = parse_sizes(["64x64", "32x128", "128x32"])[bucket_of(key)]
        pixels = torch.from_numpy(decode_image(image(number, 4)["png"], size)[None] / 127.5 - 1).float()
        x0 = codec.normalize(codec.encode_pixels(pixels))
        rng = SampleRandom(0, "validation", first=position, count=1)
        for column, time in enumerate((0.25, 0.75)):
            noise = rng.normal(*x0.shape[1:])
            with torch.no_grad():
                velocity = model(
                    (1 - time) * x0 + time * noise, torch.tensor([time]), text.encode([f"caption {number}"])
                )
            expected = (velocity - (noise - x0)).square().mean().item()
            assert found.keys[row] == key and found.values[row, column] == pytest.approx(expected, rel=2e-5)
    alone = validator_of(recipe, held_out(tmp_path, samples=None))
    losses = alone.losses(model)
    names = alone.data.keys(np.flatnonzero(alone.counted))
    assert losses.shape == (17, 2) and len(set(names)) == 17
    for world in (2, 3):
        shares = [
            validator_of(recipe, held_out(tmp_path, samples=None), rank=rank, world=world).losses(model)
            for rank in range(world)
        ]
        assert torch.equal(sum(shares), losses)


# ---- stage 4


def test_distillation_on_pairs_and_on_prompts_of_several_sizes(tmp_path, capsys):
    """Pairs are drawn size by size; training on them resumes exactly; the student's images are drawn at every size."""
    torch.manual_seed(0)
    teacher = EMMDiT(ModelConfig(**ModelConfig.PRESETS["micro-8"], latent_channels=24, text_width=128))
    torch.nn.init.normal_(teacher.out.weight, std=0.1)
    parts = {"codec": ComponentConfig(name="dct-f8c24"), "text": ComponentConfig(name="hash")}
    use = Use(**parts, sampling=SamplingConfig(resolution=64, steps=2))
    save_pretrained(teacher, tmp_path / "teacher", to_dict(use))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"a red circle number {number}" for number in range(12)))
    for size in ("64x64", "32x128"):
        height, width = size.split("x")
        command = [str(tmp_path / "teacher"), "--prompts", str(prompts), "--height", height, "--width", width]
        command += ["--grid", "linear", "--out", str(tmp_path / size), "--processes", "1"]
        assert synthesize.main(command) == 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(DISTILL.replace("TEACHER", str(tmp_path / "teacher")).replace("FOLDER", str(tmp_path)))
    alone = [
        "data=null",
        "stage.preset=pi_flow",
        "stage.sampler=euler",
        f"stage.prompts={prompts}",
        "stage.buckets=[64x64, 32x128]",
        "sampling.resolution=64",
    ]
    for name, options in (("pairs", []), ("prompts", alone)):

        def run(part, *more, options=options, name=name):
            return train.main([str(recipe), f"run={tmp_path / name / part}", *options, *more])

        assert run("parts", "engine.steps=1") == 0
        if name == "pairs":  # those of prompts alone: tests/test_distill_score.py
            assert run("parts") == 0 and run("whole") == 0
            losses = [
                [row["loss"] for row in metrics.read(tmp_path / name / part)] for part in ("whole", "parts")
            ]
            assert len(losses[0]) == 2 and losses[0] == losses[1]
        sheet = Image.open(tmp_path / name / "parts/samples/step-0000001-samples-32x128.png")
        assert sheet.width >= 2 * 128
        capsys.readouterr()
    assert run("dry", "--dry-run") == 0 and "64x64, 32x128; a step has one" in capsys.readouterr().out
    assert train.main([str(recipe), "stage.buckets=[64x64]"]) == 2
    assert "stored pairs have their sizes; name them in data.buckets" in capsys.readouterr().err
    assert train.main([str(recipe), *alone, "stage.buckets=[64x64, 40x96]"]) == 2
    assert "stage.buckets: 40x96: " in capsys.readouterr().err


DISTILL = """
name: toy
model: {preset: micro-8}
stage:
  kind: distill
  preset: ladd4
  teacher: TEACHER
  guards: null
  optim: {lr: 1e-3, betas: [0, 0.99], warmup: 2}
data: {shards: ["FOLDER/*/synth-*.tar"], resolution: 64, workers: 0, buckets: [64x64, 32x128]}
batch: 4
components: {codec: dct-f8c24, text: hash}
engine: {steps: 2, save_every: 1, sample_every: 2, log_every: 1, precision: float32, tracker: none}
sampling: {steps: 4, guidance_scale: 1}
prompts: [a red circle, a blue square]
"""
