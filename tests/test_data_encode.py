"""Encoding packed shards: equal to the encoders run directly, resumable under SIGKILL, strict."""

import json
import multiprocessing
import os
import signal
import threading
import time

import numpy as np
import pytest
import torch
from data_samples import png
from tiny import save_autoencoder_dc, save_dinov2, save_llama
from tqdm import tqdm

from nitro_e.cli import data as tool
from nitro_e.config import ConfigError
from nitro_e.data import DataConfig, open_data
from nitro_e.data.catalog import expand_shards
from nitro_e.data.decode import decode_array
from nitro_e.data.index import scan_tar
from nitro_e.data.making import write_shard
from nitro_e.data.making.encode import EncodeConfig, Encoders, encode, weights_digest
from nitro_e.data.making.jobs import JobConfig
from nitro_e.encoders.components import ComponentConfig, build_codec, build_text_encoder

CONFIG = EncodeConfig(resolution=16, batch_size=4, workers=0)


def codec():
    return build_codec(ComponentConfig(name="dct-f8c24"))


class Vision:
    """Mean color of each cell; 3 features."""

    width = 3

    def features(self, pixels, grid):
        return torch.nn.functional.adaptive_avg_pool2d(pixels, grid).flatten(2).transpose(1, 2)


@pytest.fixture
def images(tmp_path):
    """Four packed shards of 5, 6, 7, 8 samples."""
    for shard in range(4):
        samples = [
            {
                "__key__": f"s{shard}_{i}",
                "png": png(i + shard, (20, 16)),
                "txt": f"a b {'c ' * i}",
                "json": {"i": i},
            }
            for i in range(5 + shard)
        ]
        write_shard(tmp_path / f"images-{shard:03d}.tar", samples)
    return expand_shards([str(tmp_path / "images-*.tar")])


def tars(folder):
    return {
        path.name: path.read_bytes() for path in folder.glob("*.tar") if not path.name.startswith("images")
    }


def arrays(path, member):
    content = path.read_bytes()
    rows = scan_tar(path).rows
    return {
        row["__key__"].decode(): decode_array(content[row[member]["offset"] :][: row[member]["size"]])
        for row in rows
    }


def test_all_columns_equal_the_encoders(tmp_path, images):
    text = build_text_encoder(ComponentConfig(name="hash"))
    encoders = Encoders(codec=codec(), text=text, vision=Vision())
    entries = encode(images, encoders, CONFIG, JobConfig(out=tmp_path))
    assert [entry["shard"] for entry in entries[:3]] == [
        "latents-000.tar",
        "text-000.tar",
        "features-000.tar",
    ]
    assert all(len(entry["sha256"]) == 64 and entry["encoder"]["weights"] for entry in entries)
    data = open_data(
        DataConfig(
            shards=(str(tmp_path / "images-*.tar"), str(tmp_path / "latents-*.tar")),
            batch_size=26,
            resolution=16,
            workers=0,
        ),
        need_pixels=True,
        seed=0,
        stage="s",
    )
    records = next(data.records())
    pixels = records.pixels.float() / 127.5 - 1
    assert torch.equal(records.latents, codec().encode_pixels(pixels).half())
    tokens, mask = text.encode(records.prompts)
    features = Vision().features(pixels, (2, 2))
    for slot, key in enumerate(records.keys):
        shard, key = key.split(":")
        number = shard[-7:]
        np.testing.assert_array_equal(
            arrays(tmp_path / f"text-{number}", "text.npy")[key], tokens[slot].half()
        )
        np.testing.assert_array_equal(arrays(tmp_path / f"text-{number}", "mask.npy")[key], mask[slot])
        np.testing.assert_array_equal(
            arrays(tmp_path / f"features-{number}", "features.npy")[key], features[slot].half()
        )
    null = np.load(tmp_path / "null-text.npz")
    np.testing.assert_array_equal(null["tokens"], text.encode([""]).tokens[0].half())


def test_ragged_text_keeps_real_tokens(tmp_path, images):
    text = build_text_encoder(ComponentConfig(name="hash"))
    config = EncodeConfig(batch_size=4, workers=0, text_format="ragged")
    encode(images, Encoders(text=text), config, JobConfig(out=tmp_path))
    stored = arrays(tmp_path / "text-000.tar", "text.npy")
    assert len({len(x) for x in stored.values()}) > 1
    for i in range(5):
        tokens, mask = text.encode([("a b " + "c " * i).strip()])
        np.testing.assert_array_equal(stored[f"s0_{i}"], tokens[0][mask[0]].half())


@pytest.mark.parametrize("text_format", ["padded", "ragged"])
def test_stored_text_and_features_are_read(tmp_path, images, text_format):
    text = build_text_encoder(ComponentConfig(name="hash"))
    config = EncodeConfig(resolution=16, batch_size=4, workers=0, text_format=text_format)
    encode(images, Encoders(codec=codec(), text=text, vision=Vision()), config, JobConfig(out=tmp_path))

    def opened(**kwargs):
        return open_data(
            DataConfig(shards=(str(tmp_path / "*.tar"),), batch_size=26, resolution=16, workers=0),
            **{
                "need_pixels": True,
                "use_text": True,
                "use_features": True,
                "text_length": text.length,
                "seed": 0,
                "stage": "s",
                **kwargs,
            },
        )

    data = opened()
    records = next(data.records())
    assert (
        data.text_format == text_format
        and data.has_features
        and not data.has_pixels
        and records.pixels is None
    )
    tokens, mask = text.encode(records.prompts)
    assert torch.equal(records.text.mask, mask)
    assert torch.equal(records.text.tokens[mask], tokens.half()[mask])
    if text_format == "padded":
        assert torch.equal(records.text.tokens, tokens.half())
    pixels = next(opened(use_features=False).records()).pixels.float() / 127.5 - 1
    assert torch.equal(records.features, Vision().features(pixels, (2, 2)).half())
    assert torch.equal(data.null_text().tokens[0], text.encode([""]).tokens[0].half())
    made = {name: next(iter(shards.values())) for name, shards in data.encoders().items()}
    assert made["text"]["format"] == text_format and "weights" in made["latents"]
    assert opened(use_text=False).null_text() is None
    for damaged in (b"", b"PK\x03\x04 not a zip", (tmp_path / "null-text.npz").read_bytes()[:-30]):
        (tmp_path / "null-text.npz").write_bytes(damaged)
        with pytest.raises(ConfigError, match="null-text.npz is damaged"):
            data.null_text()
    if text_format == "padded":
        with pytest.raises(ConfigError, match=f"stored text has {text.length} tokens, the text encoder 99"):
            opened(text_length=99)
    else:
        # nearly all are longer
        with pytest.raises(ConfigError, match="bad samples of 26 .*expected up to 3 x"):
            next(opened(text_length=3).records())
    only = open_data(
        DataConfig(shards=(str(tmp_path / "latents-*.tar"),), workers=0),
        need_pixels=False,
        use_text=True,
        seed=0,
        stage="s",
    )
    assert not only.has_text and next(only.records()).text is None


def test_ranks_and_workers_give_the_same_bytes(tmp_path, images):
    encode(images, Encoders(codec=codec()), CONFIG, JobConfig(out=tmp_path / "one"))
    for rank in (2, 0, 1):
        config = EncodeConfig(resolution=16, batch_size=4, workers=rank % 2)
        encode(images, Encoders(codec=codec()), config, JobConfig(out=tmp_path / "three", rank=rank, world=3))
    assert tars(tmp_path / "one") == tars(tmp_path / "three") and len(tars(tmp_path / "one")) == 4
    manifests = [(tmp_path / name / "manifest-latents.jsonl").read_text() for name in ("one", "three")]
    assert manifests[0] == manifests[1]


class SlowCodec:
    """DCT that takes its time, so that a kill lands inside it."""

    def __init__(self):
        self.inner = codec()
        self.weights = self.inner.encoder

    def encode_pixels(self, pixels):
        time.sleep(0.01)
        return self.inner.encode_pixels(pixels)

    def normalize(self, raw):
        return self.inner.normalize(raw)

    def decode(self, latents):
        return self.inner.decode(latents)


def run_slowly(shards, out, rank, world):
    tqdm.set_lock(threading.RLock())  # the parent's is shared, and a killed process may hold it
    encode(shards, Encoders(codec=SlowCodec()), CONFIG, JobConfig(out=out, rank=rank, world=world))


def test_killed_ten_times_gives_the_same_bytes(tmp_path):
    for shard in range(14):
        samples = [
            {"__key__": f"s{shard}_{i}", "png": png(i + shard, (20, 16)), "txt": f"{i}"} for i in range(8)
        ]
        write_shard(tmp_path / f"images-{shard:03d}.tar", samples)
    shards = expand_shards([str(tmp_path / "images-*.tar")])
    encode(shards, Encoders(codec=SlowCodec()), CONFIG, JobConfig(out=tmp_path / "clean"))
    out, rng, kills = tmp_path / "killed", np.random.default_rng(0), 0
    context = multiprocessing.get_context("fork")
    while kills < 10:
        child = context.Process(target=run_slowly, args=(shards, out, 0, 1))
        child.start()
        while len(list(out.glob(".journal/latents/*.json"))) < kills and child.is_alive():
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.06))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode == -signal.SIGKILL
        kills += 1
    # 1 -> 3 processes
    children = [context.Process(target=run_slowly, args=(shards, out, rank, 3)) for rank in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert tars(out) == tars(tmp_path / "clean") and len(tars(out)) == 14
    lines = (out / "manifest-latents.jsonl").read_text()
    assert lines == (tmp_path / "clean/manifest-latents.jsonl").read_text()
    assert not [path for path in out.rglob("*.tmp") if f".{os.getpid()}." in path.name]


def test_finished_shards_are_kept_and_lost_ones_made_again(tmp_path, images):
    encode(images, Encoders(codec=codec()), CONFIG, JobConfig(out=tmp_path))
    first, second = tmp_path / "latents-000.tar", tmp_path / "latents-001.tar"
    before, kept = tars(tmp_path), first.stat().st_mtime_ns
    second.unlink()
    encode(images, Encoders(codec=codec()), CONFIG, JobConfig(out=tmp_path))
    assert tars(tmp_path) == before and first.stat().st_mtime_ns == kept


def test_other_encoder_resolution_or_input_is_refused(tmp_path, images):
    job = JobConfig(out=tmp_path)
    encode(images, Encoders(codec=codec()), CONFIG, job)
    other = codec()
    other.encoder[0, 0] += 0.001  # the same name, other weights
    for encoders, config in (
        (Encoders(codec=other), CONFIG),
        (Encoders(codec=codec()), EncodeConfig(resolution=32, workers=0)),
    ):
        with pytest.raises(ConfigError, match="unit '000' made from other input or with other options"):
            encode(images, encoders, config, job)
    write_shard(images[0], [{"__key__": "x", "png": png(), "txt": "new"}])
    with pytest.raises(ConfigError, match="unit '000' made from other input"):
        encode(images, Encoders(codec=codec()), CONFIG, job)
    encode(images, Encoders(codec=codec()), CONFIG, JobConfig(out=tmp_path, overwrite=True))
    assert list(arrays(tmp_path / "latents-000.tar", "npy")) == ["x"]


def test_a_refused_text_encoder_leaves_the_null_prompt_alone(tmp_path, images):
    def run(length, **job):
        text = build_text_encoder(ComponentConfig(name="hash", length=length))
        encode(images[:1], Encoders(text=text), CONFIG, JobConfig(out=tmp_path, **job))
        return text.encode([""]).tokens[0].half().numpy()

    null, path = run(8), tmp_path / "null-text.npz"
    with pytest.raises(ConfigError, match="unit '000' made from other input or with other options"):
        run(5)
    assert np.array_equal(np.load(path)["tokens"], null)
    path.unlink()
    run(8)  # nothing else is left to do
    assert np.array_equal(np.load(path)["tokens"], null)
    assert np.array_equal(run(5, overwrite=True), np.load(path)["tokens"])


def test_one_text_encoder_per_folder(tmp_path):
    """All text in a folder shares a null prompt, further captions and further shards too."""
    shards = [tmp_path / f"in/images-{name}.tar" for name in "ab"]
    shards[0].parent.mkdir()
    for shard in shards:
        write_shard(shard, [{"__key__": "x", "png": png(), "txt": "a cat", "json": {"short": "cat"}}])

    def run(length, part, caption=None, **job):
        text = build_text_encoder(ComponentConfig(name="hash", length=length))
        config = EncodeConfig(workers=0, caption=caption)
        encode(part, Encoders(text=text, caption=caption), config, JobConfig(out=tmp_path / "out", **job))

    run(8, shards[:1])
    run(8, shards[:1], "short")
    null = (tmp_path / "out/null-text.npz").read_bytes()
    for refused in ((5, shards[:1], "short"), (5, shards[1:])):
        with pytest.raises(
            ConfigError, match=r"encoded by another text encoder .*one null prompt.*another --out"
        ):
            run(*refused)
    with pytest.raises(ConfigError, match="text-a.tar .*another text encoder"):  # the plain captions stay
        run(5, shards[:1], "short", overwrite=True)
    assert (tmp_path / "out/null-text.npz").read_bytes() == null
    (tmp_path / "out/manifest-text_short.jsonl").unlink()
    run(5, shards[:1], overwrite=True)
    assert (tmp_path / "out/null-text.npz").read_bytes() != null


def test_weights_digest_sees_every_weight():
    module = torch.nn.Linear(2, 2)

    class Tokenizer:
        vocabulary = {"a": 0, "b": 1}

        def get_vocab(self):
            return self.vocabulary

    class Encoder:
        def __init__(self, length=3):
            self.model, self.tokenizer, self.length, self.truncated = module, Tokenizer(), length, 7

    before = weights_digest(Encoder())
    assert weights_digest(Encoder()) == before != weights_digest(Encoder(length=4))
    Tokenizer.vocabulary = {"a": 1, "b": 0}
    other = weights_digest(Encoder())
    assert other != before
    before = other
    with torch.no_grad():
        module.bias[1] += 1e-6
    assert weights_digest(Encoder()) != before


def test_bad_samples_are_left_out_and_reported(tmp_path):
    samples = [{"__key__": f"s{i}", "png": png(i), "txt": f"{i}"} for i in range(12)]
    samples[2]["png"] = b"no image"
    samples[5]["txt"] = " "
    samples[6]["png"] = png(6)[:100]
    write_shard(tmp_path / "images-0.tar", samples)

    class NanCodec(SlowCodec):
        def encode_pixels(self, pixels):
            raw = super().encode_pixels(pixels)
            if len(raw) == 4 and torch.equal(pixels[3], self.poison):
                raw[3, 0, 0, 0] = float("nan")
            return raw

    nan = NanCodec()
    data = open_data(
        DataConfig(shards=(str(tmp_path / "images-0.tar"),), resolution=16, workers=0),
        need_pixels=True,
        seed=0,
        stage="s",
    )
    from nitro_e.data.dataset import TarDataset

    nan.poison = (
        TarDataset(data.catalog, data.order, data.spec).load(np.array([11]))[0].pixels[0].float() / 127.5 - 1
    )
    encode([str(tmp_path / "images-0.tar")], Encoders(codec=nan), CONFIG, JobConfig(out=tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "bad-latents.jsonl").read_text().splitlines()]
    assert {line["key"] for line in lines} == {"s2", "s5", "s6", "s11"} and {
        line["shard"] for line in lines
    } == {"images-0.tar"}
    assert "not finite" in next(line["reason"] for line in lines if line["key"] == "s11")
    assert len(arrays(tmp_path / "latents-0.tar", "npy")) == 8


def test_too_many_bad_samples_stop_the_job(tmp_path):
    write_shard(
        tmp_path / "images-0.tar", [{"__key__": f"s{i}", "png": b"x", "txt": f"{i}"} for i in range(12)]
    )
    with pytest.raises(ConfigError, match="12 bad samples of 12"):
        encode([str(tmp_path / "images-0.tar")], Encoders(codec=codec()), CONFIG, JobConfig(out=tmp_path))


def test_damaged_input_and_equal_names(tmp_path, images):
    path = tmp_path / "images-001.tar"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ConfigError, match="images-001.tar: damaged tar"):
        encode(images, Encoders(codec=codec()), CONFIG, JobConfig(out=tmp_path / "o"))
    write_shard(tmp_path / "b" / "images-000.tar", [{"__key__": "x", "png": png(), "txt": "new"}])
    with pytest.raises(ConfigError, match="two input shards are called '000'"):
        encode(
            [images[0], str(tmp_path / "b/images-000.tar")],
            Encoders(codec=codec()),
            CONFIG,
            JobConfig(out=tmp_path),
        )
    with pytest.raises(ConfigError, match="nothing to encode"):
        Encoders()


def test_the_real_encoders_classes_through_the_command(tmp_path, images):
    """DC-AE, Llama and DINOv2 as tiny random instances of the library classes, loaded from folders."""
    save_autoencoder_dc(tmp_path / "dc-ae")
    save_llama(tmp_path / "llama")
    save_dinov2(tmp_path / "dinov2")
    command = ["encode", *images, "--out", str(tmp_path / "o"), "--resolution", "16", "--workers", "0"]
    command += ["--codec", f"dc-ae-f32c32={tmp_path}/dc-ae", "--text", f"llama-3.2-1b={tmp_path}/llama"]
    command += ["--vision", f"dinov2-b14={tmp_path}/dinov2"]
    assert tool.main([*command, "--text-length", "8"]) == 0
    data = open_data(
        DataConfig(shards=(str(tmp_path / "o/*.tar"),), batch_size=26, workers=0),
        need_pixels=True,
        use_text=True,
        use_features=True,
        text_length=8,
        seed=0,
        stage="s",
    )
    records = next(data.records())
    assert data.latent_shape == (8, 4, 4) and records.text.tokens.shape == (26, 8, 32)
    assert records.features.shape[:2] == (26, 16) and not data.has_pixels
    codec = build_codec(ComponentConfig(name="dc-ae-f32c32", path=str(tmp_path / "dc-ae")))
    originals = next(
        open_data(
            DataConfig(shards=(str(tmp_path / "images-*.tar"),), batch_size=26, resolution=16, workers=0),
            need_pixels=True,
            seed=0,
            stage="s",
        ).records()
    )
    expected = dict(zip(originals.prompts, codec.encode_pixels(originals.pixels.float() / 127.5 - 1)))
    (made,) = data.encoders()["features"].values()
    assert records.keys[0].startswith("latents-") and made["name"]["name"] == "dinov2-b14"
    assert len(expected) == 8  # captions repeat; compare the samples whose caption is unique
    longest = max(expected, key=len)
    torch.testing.assert_close(
        records.latents[records.prompts.index(longest)].float(), expected[longest], atol=2e-3, rtol=2e-3
    )
