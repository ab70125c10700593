"""The streaming reader: what it promises, and that damage is not taken for the end of a shard."""

import io
import json
import tarfile
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from data_samples import image_samples, latent, latent_samples

from nitro_e.config import ConfigError
from nitro_e.data import DataConfig, SourceConfig, open_data
from nitro_e.data.making import write_shard, write_shards
from nitro_e.data.making.encode import EncodeConfig, text_members


def opened(*shards, seed=0, **kwargs):
    names = ("need_pixels", "use_text", "text_length")
    wishes = {name: kwargs.pop(name) for name in names if name in kwargs}
    options = {"batch_size": 5, "resolution": 8, "workers": 0, "reader": "stream", **kwargs}
    return open_data(
        DataConfig(shards=shards, **options), **{"need_pixels": False, **wishes}, seed=seed, stage="s"
    )


@pytest.fixture
def shards(tmp_path):
    write_shards(latent_samples(30), str(tmp_path / "a-%03d.tar"), 7)
    return str(tmp_path / "a-*.tar")


def keys(data, count, **kwargs):
    batches = data.records(**kwargs)
    found = [records.keys for records in islice(batches, count)]
    batches.close()
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_are_those_of_the_indexed_reader(shards, workers):
    data = opened(shards, workers=workers)
    assert data.has_latents and data.latent_shape == (4, 2, 2) and len(data) == 35  # 5 shards like the first
    seen = Counter()
    for records in islice(data.records(), 40):
        seen.update(records.keys)
        for key, prompt, x in zip(records.keys, records.prompts, records.latents):
            assert prompt == f"caption {int(key[-3:])}" and np.array_equal(x.numpy(), latent(int(key[-3:])))
    assert len(seen) == 30 and sum(seen.values()) == 200


@pytest.mark.parametrize("workers", [0, 3])
def test_same_layout_and_step_same_batches(shards, workers):
    reference = keys(opened(shards, workers=workers), 25)
    assert keys(opened(shards, workers=workers), 12) == reference[:12]
    # resumed at a step: shuffled anew, the same way every time
    resumed = keys(opened(shards, workers=workers), 5, step=17)
    assert resumed == keys(opened(shards, workers=workers), 5, step=17) != reference[17:22]
    if workers == 0:
        assert keys(opened(shards, seed=1), 5) != reference[:5] != keys(opened(shards), 5, rank=1, world=2)


def test_ranks_share_an_epoch(tmp_path):
    write_shards(latent_samples(30), str(tmp_path / "a-%d.tar"), 5)
    by_rank = [keys(opened(str(tmp_path / "*.tar")), 9, rank=rank, world=2) for rank in (0, 1)]
    for epoch in range(3):  # 15 samples of each rank, in batches of 5
        seen = Counter(key for rank in by_rank for batch in rank[3 * epoch : 3 * epoch + 3] for key in batch)
        assert len(seen) == 30 and set(seen.values()) == {1}
    assert by_rank[0][:3] != by_rank[0][3:6]


def test_weights_of_sources_hold_on_average(tmp_path):
    sources = {}
    for name, weight in (("a", 2.0), ("b", 1.0), ("c", 0.0)):
        samples = [{**s, "__key__": f"{name}{i}"} for i, s in enumerate(latent_samples(9))]
        write_shards(samples, str(tmp_path / f"{name}-%d.tar"), 4)
        sources[name] = SourceConfig(shards=(str(tmp_path / f"{name}-*.tar"),), weight=weight)
    config = DataConfig(sources=sources, reader="stream", workers=0, batch_size=3000)
    data = open_data(config, need_pixels=False, seed=0, stage="s")
    names = Counter(key.split(":")[1][0] for key in next(data.records()).keys)
    # a binomial of 3000 and 2/3 has a standard deviation of 26
    assert names["c"] == 0 and abs(names["a"] - 2000) < 130
    assert next(data.records()).keys == next(data.records()).keys


def test_images_and_json(tmp_path):
    write_shards(image_samples(12), str(tmp_path / "a-%d.tar"), 6)
    indexed = open_data(
        DataConfig(shards=(str(tmp_path / "*.tar"),), batch_size=12, resolution=8, workers=0),
        need_pixels=True,
        seed=0,
        stage="s",
    )
    expected = next(indexed.records())
    expected = {
        key: (pixels, info) for key, pixels, info in zip(expected.keys, expected.pixels, expected.info)
    }
    for records in islice(opened(str(tmp_path / "*.tar")).records(), 5):
        for key, pixels, info in zip(records.keys, records.pixels, records.info):
            assert torch.equal(pixels, expected[key][0]) and info == expected[key][1]


@pytest.mark.parametrize("mask", [True, False])
def test_text(tmp_path, mask):
    rng = np.random.default_rng(0)
    samples = [
        {**s, "text.npy": rng.standard_normal((6 if mask else 2 + i % 4, 3)).astype(np.float16)}
        for i, s in enumerate(latent_samples(12))
    ]
    for i, sample in enumerate(samples):
        sample.update({"mask.npy": (np.arange(6) < 2 + i % 4).astype(np.uint8)} if mask else {})
    write_shard(tmp_path / "a.tar", samples)
    records = next(opened(str(tmp_path / "a.tar"), use_text=True, text_length=6).records())
    for key, tokens, real in zip(records.keys, *records.text):
        i = int(key[-3:])
        assert int(real.sum()) == 2 + i % 4 and tokens.shape == (6, 3)
        assert np.array_equal(tokens[real].numpy(), samples[i]["text.npy"][: 2 + i % 4])


@pytest.mark.parametrize("text_format", ["padded", "ragged"])
def test_text_of_8_bits(tmp_path, text_format):
    torch.manual_seed(0)
    tokens, mask = torch.randn(12, 6, 3), torch.arange(6) < 2 + torch.arange(12)[:, None] % 4
    config = EncodeConfig(text_format=text_format, text_dtype="int8")
    samples = [{**s, **text_members(x, m, config)} for s, x, m in zip(latent_samples(12), tokens, mask)]
    write_shard(tmp_path / "a.tar", samples)
    records = next(opened(str(tmp_path / "a.tar"), use_text=True, text_length=6).records())
    assert records.text.tokens.dtype == torch.float16 and not records.bad
    for key, ours, real in zip(records.keys, *records.text):
        want = tokens[int(key[-3:])]
        assert torch.equal(real, mask[int(key[-3:])])
        # half a step of the 8 bits, and the rounding to half precision
        largest = want.abs().amax(dim=1, keepdim=True)
        assert ((ours.float() - want).abs() <= largest / 253)[real].all()


def test_bad_samples_are_replaced_and_reported(tmp_path):
    samples = latent_samples(30)
    samples[4]["npy"] = np.full((4, 2, 2), np.inf, np.float16)
    samples[9]["txt"] = ""
    samples[20]["npy"] = np.zeros((4, 2, 1), np.float16)
    write_shards(samples, str(tmp_path / "a-%d.tar"), 30)
    data = opened(str(tmp_path / "a-*.tar"))
    data.bad.report_to(tmp_path / "bad.jsonl", 0)
    data.bad.fraction = 1.0
    seen = {key for records in islice(data.records(), 20) for key in records.keys}
    assert len(seen) == 27
    lines = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert {line["key"] for line in lines} == {"s004", "s009", "s020"}
    with pytest.raises(ConfigError, match="2 bad samples of 30"):
        list(islice(opened(str(tmp_path / "a-*.tar")).records(), 20))


@pytest.mark.parametrize("workers", [0, 1])
def test_truncated_shard_is_an_error(tmp_path, shards, workers):
    path = tmp_path / "a-003.tar"
    path.write_bytes(path.read_bytes()[: 512 * 8])
    with pytest.raises(ConfigError, match="a-003.tar: damaged tar"):
        list(islice(opened(shards, workers=workers).records(), 40))
    seen = {
        key
        for records in islice(opened(shards, workers=workers, tolerate_shards=1).records(), 40)
        for key in records.keys
    }
    assert len(seen) == 23


def test_what_a_stream_cannot_do(tmp_path, shards, caplog):
    data = opened(shards)
    assert "promises more" in caplog.text
    with pytest.raises(ConfigError, match="no positions"):
        data.keys(range(3))
    write_shard(tmp_path / "images-a-000.tar", image_samples(7))
    with pytest.raises(ConfigError, match="cannot join columns"):
        opened(str(tmp_path / "*.tar"))
    with tarfile.open(tmp_path / "twice.tar", "w") as tar:
        for _ in range(2):
            for member in ("k.txt", "k.npy"):
                tar.addfile(tarfile.TarInfo(member))
    with pytest.raises(ConfigError, match="duplicate|first npy"):
        next(opened(str(tmp_path / "twice.tar")).records())


def test_a_member_that_is_there_twice_is_reported(tmp_path):
    samples = latent_samples(6)
    write_shard(tmp_path / "a.tar", samples)
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        member = tarfile.TarInfo("s005.txt")
        member.size = 5
        tar.addfile(member, io.BytesIO(b"other"))
    data = opened(str(tmp_path / "a.tar"), max_bad_fraction=1.0)
    records = next(data.records())
    assert "caption 5" in {prompt for r in islice(data.records(), 3) for prompt in r.prompts}
    assert "other" not in records.prompts and len(data.bad) == 1 and ("a.tar", "s005") in data.bad.seen


@pytest.mark.parametrize("workers", [0, 1])
def test_no_usable_sample_is_an_error(tmp_path, workers):
    samples = [{**s, "txt": s["txt"] if i == 0 else ""} for i, s in enumerate(latent_samples(90))]
    write_shard(tmp_path / "a.tar", samples)
    data = opened(str(tmp_path / "a.tar"), workers=workers, max_bad_fraction=1.0)
    with pytest.raises(ConfigError, match="64 samples in a row cannot be used, .*: empty caption; look for"):
        list(islice(data.records(), 3))


def test_every_loader_process_needs_a_shard(shards):
    with pytest.raises(ConfigError, match=r"5 shards \(a-000.tar, ...\) for 6 loader processes"):
        next(opened(shards, workers=3).records(world=2))
