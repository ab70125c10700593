"""Reading shards: against webdataset's own pipeline, over worlds and workers, and with broken input."""

import io
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tarfile
from itertools import islice

import numpy as np
import pytest
import torch
import webdataset
from data_samples import flip_byte, image_samples, latent, latent_samples, png
from PIL import Image

from nitro_e.config import ConfigError
from nitro_e.data import BadDataError, DataConfig, SourceConfig, catalog, open_data
from nitro_e.data.catalog import expand_braces
from nitro_e.data.dataset import TarDataset
from nitro_e.data.decode import BadSample, decode_image
from nitro_e.data.making import write_shard, write_shards
from nitro_e.data.order import quotas
from nitro_e.data.problems import BadSamples


def make(tmp_path, samples, per_shard=7):
    write_shards(samples, str(tmp_path / "a-%03d.tar"), per_shard)
    return str(tmp_path / "a-*.tar")


def config(*shards, **kwargs):
    return DataConfig(shards=shards, **{"batch_size": 5, "resolution": 8, "workers": 0, **kwargs})


def opened(*shards, need_pixels=False, seed=0, use_latents=True, **kwargs):
    return open_data(
        config(*shards, **kwargs), need_pixels=need_pixels, use_latents=use_latents, seed=seed, stage="s"
    )


def test_same_samples_as_webdataset(tmp_path):
    shards = make(tmp_path, image_samples())
    data = opened(shards, batch_size=30)
    records = next(data.records())
    ours = {
        key.split(":")[1]: (prompt, info)
        for key, prompt, info in zip(records.keys, records.prompts, records.info)
    }
    theirs = {}
    for sample in webdataset.WebDataset(sorted(map(str, tmp_path.glob("a-*.tar"))), shardshuffle=False):
        theirs[sample["__key__"]] = (sample["txt"].decode(), json.loads(sample["json"]))
        pixels = records.pixels[[key.split(":")[1] for key in records.keys].index(sample["__key__"])]
        image = Image.open(io.BytesIO(sample["png"])).crop((2, 0, 10, 8))
        np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(image))
    assert ours == theirs and len(ours) == 30
    assert records.pixels.dtype == torch.uint8 and records.latents is None


def test_latents_are_read_as_stored_and_images_left_alone(tmp_path):
    samples = [image | sample for image, sample in zip(image_samples(), latent_samples())]
    shards = make(tmp_path, samples)
    data = opened(shards, batch_size=30)
    records = next(data.records())
    assert data.has_latents and data.latent_shape == (4, 2, 2) and records.pixels is None
    for key, x in zip(records.keys, records.latents):
        assert x.dtype == torch.float16
        np.testing.assert_array_equal(x.numpy(), latent(int(key[-3:])))
    both = next(opened(shards, batch_size=30, need_pixels=True).records())
    images = next(opened(shards, batch_size=30, use_latents=False).records())
    assert torch.equal(both.latents, records.latents) and torch.equal(both.pixels, images.pixels)
    assert both.keys == images.keys and images.latents is None


@pytest.mark.parametrize("kind", ["images", "latents"])
def test_batches_do_not_depend_on_world_workers_or_start(tmp_path, kind):
    shards = make(tmp_path, image_samples() if kind == "images" else latent_samples())
    reference = list(islice(opened(shards, batch_size=8).records(), 12))  # 12 steps of 8
    for world, workers, micro, step in [
        (1, 2, 1, 0),
        (2, 0, 1, 0),
        (2, 2, 2, 0),
        (1, 0, 4, 5),
        (2, 2, 1, 7),
        (4, 0, 2, 3),
    ]:
        data = opened(shards, batch_size=8 // world // micro, workers=workers)
        ranks = [
            data.records(step, micro_batches_per_step=micro, rank=rank, world=world) for rank in range(world)
        ]
        for want in reference[step : step + 3]:
            got = [next(records) for records in ranks for _ in range(micro)]
            assert sum((part.keys for part in got), []) == want.keys
            assert sum((part.prompts for part in got), []) == want.prompts
            for name in ("pixels", "latents"):
                if getattr(want, name) is not None:
                    assert torch.equal(torch.cat([getattr(part, name) for part in got]), getattr(want, name))
        for records in ranks:
            records.close()


def test_one_epoch_reads_everything_once_and_keys_are_known_in_advance(tmp_path):
    data = opened(make(tmp_path, latent_samples()))
    batches = list(islice(data.records(), 12))
    for epoch in (batches[:6], batches[6:]):
        assert len({key for records in epoch for key in records.keys}) == 30
    assert data.keys(range(60)) == [key for records in batches for key in records.keys]


@pytest.mark.parametrize("case", range(6))
def test_mixture_over_worlds_workers_and_resume_points(tmp_path, case):
    """Exact quotas and coverage, and the same global batches for worlds {1, 2, 4} x workers {0, 2} x any
    start.
    """
    rng = np.random.default_rng(case)
    sources, sizes = (
        {},
        {"a": rng.integers(1, 9, 5), "b": rng.integers(1, 20, 2), "c": rng.integers(1, 30, 1)},
    )
    for name, counts in sizes.items():
        for shard, count in enumerate(counts):
            samples = [{"__key__": f"{name}{shard}_{i}", "npy": latent(i), "txt": name} for i in range(count)]
            write_shard(tmp_path / f"{name}-{shard}.tar", samples)
        weight = [2.0, 1.0, 0.0 if case % 2 else 0.5]["abc".index(name)]
        sources[name] = SourceConfig(shards=(str(tmp_path / f"{name}-*.tar"),), weight=weight)

    def batches(world, workers, step, count):
        cfg = DataConfig(sources=sources, batch_size=128 // world, workers=workers)
        data = open_data(cfg, need_pixels=False, seed=case, stage="s")
        ranks = [data.records(step, rank=rank, world=world) for rank in range(world)]
        got = [sum((next(records).keys for records in ranks), []) for _ in range(count)]
        for records in ranks:
            records.close()
        return got

    reference = batches(1, 0, 0, 12)
    for start in (0, 4, 8):  # blocks of 512
        names = [key[0] for batch in reference[start : start + 4] for key in batch]
        expected = quotas([source.weight for source in sources.values()]).tolist()
        assert [names.count(name) for name in "abc"] == expected
    for name in "abc":
        seen = [key for batch in reference for key in batch if key[0] == name]
        total = int(sizes[name].sum())
        for epoch in range(len(seen) // total):
            assert len(set(seen[epoch * total : (epoch + 1) * total])) == total
    for world in (1, 2, 4):
        for workers in (0, 2) if case < 2 else (0,):
            step = int(rng.integers(0, 10))
            assert batches(world, workers, step, 2) == reference[step : step + 2]


def test_sources_without_weights_are_a_union(tmp_path):
    write_shard(tmp_path / "a.tar", latent_samples(5))
    write_shard(tmp_path / "b.tar", latent_samples(9))
    sources = {name: SourceConfig(shards=(str(tmp_path / f"{name}.tar"),)) for name in "ab"}
    data = open_data(
        DataConfig(sources=sources, batch_size=14, workers=0), need_pixels=False, seed=0, stage="s"
    )
    assert len(set(next(data.records()).keys)) == 14
    assert (
        len({json.dumps(opened(str(tmp_path / "*.tar")).fingerprint()), json.dumps(data.fingerprint())}) == 1
    )


def test_bad_sources(tmp_path):
    a = SourceConfig(shards=("x.tar",), weight=1.0)
    with pytest.raises(ConfigError, match="data.sources.b.weight: missing"):
        DataConfig(sources={"a": a, "b": SourceConfig(shards=("y.tar",))})
    with pytest.raises(ConfigError, match="both given"):
        DataConfig(shards=("y.tar",), sources={"a": a})
    with pytest.raises(ConfigError, match="data.sources.a.shards: missing shards: x.tar"):
        open_data(DataConfig(sources={"a": a}), need_pixels=False, seed=0, stage="s")


def test_global_rng_is_left_alone(tmp_path):
    data = opened(make(tmp_path, latent_samples()))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    next(data.records())
    assert torch.equal(state, torch.get_rng_state())


def test_dataset_can_be_pickled(tmp_path):
    data = opened(make(tmp_path, latent_samples()))
    dataset = TarDataset(data.catalog, data.order, data.spec)
    first = dataset.__getitems__(range(4))
    assert pickle.loads(pickle.dumps(dataset)).__getitems__(range(4)).keys == first.keys


def test_fingerprint_changes_with_content_seed_and_shards(tmp_path):
    shards = make(tmp_path, latent_samples())
    prints = [opened(shards).fingerprint(), opened(shards, seed=1).fingerprint()]
    prints.append(opened(str(tmp_path / "a-{000..002}.tar")).fingerprint())
    samples = latent_samples(7)
    samples[3]["txt"] = "caption x"  # as long as before
    write_shard(tmp_path / "a-000.tar", samples)
    prints.append(opened(shards).fingerprint())
    assert len({json.dumps(p) for p in prints}) == 4
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in tmp_path.glob("a-*.tar"):
        path.rename(moved / path.name)
    assert opened(str(moved / "a-*.tar")).fingerprint() == prints[3]


# --- columns --------------------------------------------------------------------------------------


def test_columns_are_joined_by_key(tmp_path):
    images, latents = image_samples(14), latent_samples(14)
    write_shards(images, str(tmp_path / "images-%03d.tar"), 7)
    for shard, part in enumerate((latents[:7], latents[7:])):
        order = np.random.default_rng(shard).permutation(7)
        column = [{"__key__": part[i]["__key__"], "npy": part[i]["npy"]} for i in order]
        write_shard(tmp_path / f"latents-{shard:03d}.tar", column)
    both = (str(tmp_path / "images-*.tar"), str(tmp_path / "latents-*.tar"))
    records = next(opened(*both, batch_size=14, need_pixels=True).records())
    reference = next(opened(both[0], batch_size=14).records())
    assert records.keys == reference.keys and torch.equal(records.pixels, reference.pixels)
    for key, prompt, x in zip(records.keys, records.prompts, records.latents):
        n = int(key[-3:])
        assert prompt == f"caption {n}" and np.array_equal(x.numpy(), latent(n))


def test_training_on_latents_does_not_open_images(tmp_path):
    write_shard(tmp_path / "images-0.tar", image_samples(7))
    write_shard(tmp_path / "latents-0.tar", latent_samples(7))
    data = opened(str(tmp_path / "*.tar"))
    (tmp_path / "images-0.tar").unlink()
    assert len(next(data.records())) == 5


def test_key_missing_in_a_column_is_reported(tmp_path):
    write_shard(tmp_path / "images-0.tar", image_samples(10))
    write_shard(
        tmp_path / "latents-0.tar", [sample for sample in latent_samples(10) if sample["__key__"] != "s004"]
    )
    data = opened(str(tmp_path / "*.tar"))
    assert len(data) == 9 and [str(p) for p in data.catalog.problems] == [
        "images-0.tar:s004: not in latents-0.tar"
    ]
    write_shard(tmp_path / "latents-0.tar", latent_samples(4))
    with pytest.raises(BadDataError, match="6 bad samples of 10 .*not in latents-0.tar"):
        opened(str(tmp_path / "*.tar"))


def test_column_without_its_shard(tmp_path):
    write_shards(image_samples(14), str(tmp_path / "images-%03d.tar"), 7)
    write_shard(tmp_path / "latents-000.tar", latent_samples(7))
    with pytest.raises(ConfigError, match="images-001.tar: no latents- shard of the same name"):
        opened(str(tmp_path / "*.tar"))


def test_merged_catalog_is_the_same_and_follows_changes(tmp_path, monkeypatch):
    samples = latent_samples(30)
    samples[5]["txt"] = ""
    shards = make(tmp_path, samples)
    plain, reference = opened(shards), list(islice(opened(shards).records(), 8))
    monkeypatch.setenv("NITRO_E_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(catalog, "MERGE_FROM", 2)
    for attempt in range(2):
        if attempt:  # nothing is built the second time
            monkeypatch.setattr(catalog, "_build_catalog", None)
        data = opened(shards, workers=attempt * 2)
        assert data.fingerprint() == plain.fingerprint() and data.catalog.columns[0].file is not None
        batches = data.records()
        for want, got in zip(reference, batches):
            assert got.keys == want.keys and torch.equal(got.latents, want.latents)
        batches.close()
        copy = pickle.loads(pickle.dumps(TarDataset(data.catalog, data.order, data.spec)))
        assert copy.__getitems__(range(5)).keys == reference[0].keys
        assert len(pickle.dumps(data.catalog)) < 3000
    monkeypatch.undo()
    monkeypatch.setenv("NITRO_E_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(catalog, "MERGE_FROM", 2)
    write_shard(tmp_path / "a-001.tar", samples[7:13])
    assert len(opened(shards)) == 29
    path = tmp_path / "a-002.tar"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ConfigError, match="a-002.tar: 5000 bytes, but its index was made when"):
        opened(shards)


@pytest.mark.parametrize("left", ["no catalog", "no rows", "cut rows", "a temporary folder"])
def test_merged_catalog_is_made_again_where_a_part_of_it_is_gone(tmp_path, monkeypatch, left):
    shards = make(tmp_path, latent_samples())
    plain = opened(shards).fingerprint()
    monkeypatch.setenv("NITRO_E_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(catalog, "MERGE_FROM", 2)
    folder = opened(shards).catalog.columns[0].file.parent
    if left == "no catalog":
        (folder / "catalog.json").unlink()
    elif left == "cut rows":
        (folder / "0.npy").write_bytes((folder / "0.npy").read_bytes()[:-9])
    else:
        (folder / "0.npy").unlink()
    if left == "a temporary folder":  # of a process that had this one's number
        shutil.rmtree(folder)
        folder.with_name(f"{folder.name}.{socket.gethostname()}.{os.getpid()}.tmp").mkdir()
    for _ in range(2):
        data = opened(shards)
        assert data.fingerprint() == plain and data.catalog.columns[0].file is not None
    assert len([path for path in folder.parent.iterdir() if path.is_dir()]) == 1


def test_leaving_out_a_sample_keeps_the_index_mapped(tmp_path, monkeypatch):
    """One sample without a caption costs its number, not a copy of the whole index in every process."""
    samples = latent_samples(300)
    for number in (4, 5, 299):
        del samples[number]["txt"]
    shards = make(tmp_path, samples, 100)
    plain = opened(shards, max_bad_fraction=0.1)
    monkeypatch.setenv("NITRO_E_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(catalog, "MERGE_FROM", 2)
    data = opened(shards, max_bad_fraction=0.1)
    assert data.catalog.columns[0].file is not None and len(pickle.dumps(data.catalog)) < 3000
    assert len(data) == 297 and data.catalog.problems == plain.catalog.problems
    got = [data.catalog.key(sample) for sample in range(297)]
    assert got == [s["__key__"] for s in samples if "txt" in s]
    for want, records in zip(islice(plain.records(), 60), data.records()):
        assert records.keys == want.keys and torch.equal(records.latents, want.latents)
        for key, x in zip(records.keys, records.latents):
            np.testing.assert_array_equal(x.numpy(), latent(int(key[-3:])))
    # what is left out twice, at any place, is what plain indexing leaves
    rng = np.random.default_rng(0)
    rows = np.delete(np.arange(300), [4, 5, 299])
    for _ in range(5):
        mask = rng.random(len(data.catalog)) > 0.3
        rows = rows[mask]
        data.catalog.keep(mask)
        np.testing.assert_array_equal(data.catalog.rows_of(np.arange(len(rows))), rows)
        assert data.catalog.has("npy").shape == (len(rows),)
        assert [int(x) for x in np.concatenate(data.catalog.sizes)] == np.bincount(
            rows // 100, minlength=3
        ).tolist()


def open_slowly(shards, cache, queue):
    import os
    import time

    os.environ["NITRO_E_CACHE"] = cache
    catalog.MERGE_FROM, build = 2, catalog._build_catalog

    def slow(*args):
        queue.put("built")
        time.sleep(0.5)
        return build(*args)

    catalog._build_catalog = slow
    queue.put(str(opened(shards).catalog.columns[0].file))


def test_one_process_of_a_machine_joins_the_index_for_all(tmp_path):
    import multiprocessing

    shards, context = make(tmp_path, latent_samples()), multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [
        context.Process(target=open_slowly, args=(shards, str(tmp_path / "cache"), queue)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    said = [queue.get(timeout=60) for _ in range(4)]
    for process in processes:
        process.join()
    assert said.count("built") == 1 and len(set(said)) == 2


# --- sources with columns of their own ------------------------------------------------------------


def mixed_sources(tmp_path):
    """Source a has latents and images, b images only, c latents and captions in one tar."""
    write_shards(image_samples(12), str(tmp_path / "a/images-%03d.tar"), 6)
    write_shards(latent_samples(12), str(tmp_path / "a/latents-%03d.tar"), 6)
    write_shard(tmp_path / "b/images-000.tar", image_samples(9))
    write_shard(tmp_path / "c/latents-000.tar", latent_samples(7))
    return {name: SourceConfig(shards=(str(tmp_path / name / "*.tar"),)) for name in "abc"}


@pytest.mark.parametrize("need_pixels", [False, True])
def test_sources_may_have_columns_of_their_own(tmp_path, need_pixels):
    sources = mixed_sources(tmp_path)
    if need_pixels:
        del sources["c"]
    total = 21 if need_pixels else 28

    def batches(workers):
        data = open_data(
            DataConfig(sources=sources, batch_size=7, resolution=8, workers=workers),
            need_pixels=need_pixels,
            seed=0,
            stage="s",
        )
        stream = data.records()
        found = list(islice(stream, total // 7))
        stream.close()
        return found

    seen = 0
    for records, again in zip(batches(0), batches(2)):
        assert records.keys == again.keys and torch.equal(records.latents, again.latents)
        without = {key for key in records.keys if records.absent["latents"][records.keys.index(key)]}
        seen += len(without)
        for row, key in enumerate(records.keys):
            number = int(key[-3:])
            assert records.prompts[row] == f"caption {number}"
            if records.absent["latents"][row]:
                assert not records.latents[row].any()
            else:
                np.testing.assert_array_equal(records.latents[row].numpy(), latent(number))
            if need_pixels or records.absent["latents"][row]:
                np.testing.assert_array_equal(records.pixels[row], decode_image(png(number), 8))
    assert seen == 9


def test_a_bad_sample_is_replaced_by_one_with_the_same_columns(tmp_path):
    bad = [{**s, "npy": np.full((4, 2, 2), np.nan, np.float16)} for s in latent_samples(12)[::2]]
    write_shard(tmp_path / "a.tar", [*bad, *latent_samples(12)[1::2]])
    write_shard(tmp_path / "b.tar", [{**s, "__key__": "b" + s["__key__"]} for s in image_samples(12)])
    sources = {name: SourceConfig(shards=(str(tmp_path / f"{name}.tar"),)) for name in "ab"}
    cfg = DataConfig(sources=sources, batch_size=24, resolution=8, workers=0, max_bad_fraction=1.0)
    for seed in range(4):
        records = next(open_data(cfg, need_pixels=False, seed=seed, stage="s").records())
        assert records.absent["latents"].sum() == 12 and len(set(records.bad)) == 6
        for row, key in enumerate(records.keys):
            number, absent = int(key[-3:]), key.startswith("b.tar")
            assert bool(records.absent["latents"][row]) == absent
            if not absent:
                np.testing.assert_array_equal(records.latents[row].numpy(), latent(number))
            else:
                np.testing.assert_array_equal(records.pixels[row], decode_image(png(number), 8))


def test_what_a_source_lacks_is_computed(tmp_path):
    from nitro_e.encoders.components import ComponentConfig, build_codec, build_text_encoder
    from nitro_e.stages.batches import encode

    codec, text = (
        build_codec(ComponentConfig(name="dct-f8c24")),
        build_text_encoder(ComponentConfig(name="hash")),
    )
    stored = [{**s, "npy": np.full((24, 1, 1), n, np.float16)} for n, s in enumerate(image_samples(6))]
    tokens = [np.full((text.length, text.width), n, np.float16) for n in range(6)]
    mask = np.ones(text.length, np.uint8)
    stored = [{**s, "text.npy": x, "mask.npy": mask} for s, x in zip(stored, tokens)]
    write_shard(tmp_path / "a.tar", stored)
    write_shard(tmp_path / "b.tar", [{**s, "__key__": "b" + s["__key__"]} for s in image_samples(8)])
    sources = {name: SourceConfig(shards=(str(tmp_path / f"{name}.tar"),)) for name in "ab"}
    cfg = DataConfig(sources=sources, batch_size=14, resolution=8, workers=0)
    data = open_data(cfg, need_pixels=False, use_text=True, text_length=text.length, seed=0, stage="s")
    records = next(data.records())
    batch = encode(records, codec, text, torch.device("cpu"))
    for row, key in enumerate(records.keys):
        number = int(key[-3:])
        if "b.tar" in key:
            pixels = torch.from_numpy(decode_image(png(number), 8).copy()).float()[None] / 127.5 - 1
            latents, embedding = (
                codec.normalize(codec.encode_pixels(pixels))[0],
                text.encode([f"caption {number}"]),
            )
            want = embedding.tokens[0]
        else:
            latents = codec.normalize(torch.full((1, 24, 1, 1), float(number)))[0]
            want = torch.full_like(batch.text.tokens[row], number)
        torch.testing.assert_close(batch.latents[row], latents)
        torch.testing.assert_close(batch.text.tokens[row], want)


def test_stream_wants_the_same_columns_everywhere(tmp_path):
    write_shard(tmp_path / "a.tar", [image | x for image, x in zip(image_samples(5), latent_samples(5))])
    write_shard(tmp_path / "b.tar", image_samples(5))
    sources = {name: SourceConfig(shards=(str(tmp_path / f"{name}.tar"),)) for name in "ab"}
    with pytest.raises(ConfigError, match="stream needs the same columns in every source"):
        open_data(DataConfig(sources=sources, reader="stream"), need_pixels=False, seed=0, stage="s")


# --- what is wrong at the start -------------------------------------------------------------------


def test_missing_shards_are_named(tmp_path):
    make(tmp_path, latent_samples(), 10)
    with pytest.raises(ConfigError, match=r"missing shards: .*a-003\.tar, .*a-007\.tar and 2 more"):
        opened(str(tmp_path / "a-{000..009}.tar"))
    with pytest.raises(ConfigError, match=r"nothing-\*\.tar"):
        opened(str(tmp_path / "nothing-*.tar"))
    with pytest.raises(ConfigError, match="listed twice"):
        opened(str(tmp_path / "a-*.tar"), str(tmp_path / "a-000.tar"))
    with pytest.raises(ConfigError, match="no shards"):
        opened()


def test_brace_ranges():
    assert expand_braces("a{08..11}{x,y}.tar")[:3] == ["a08x.tar", "a08y.tar", "a09x.tar"]
    assert len(expand_braces("{000000..000012}")) == 13
    # downwards as bash does
    assert expand_braces("{0002..0000}{b,a}") == ["0002b", "0002a", "0001b", "0001a", "0000b", "0000a"]
    assert expand_braces("{10..8}") == ["10", "9", "8"] and expand_braces("{3..3}") == ["3"]


def test_shard_without_captions(tmp_path):
    shards = make(tmp_path, image_samples())
    write_shard(tmp_path / "a-002.tar", [{"__key__": f"x{i}", "png": png(i)} for i in range(3)])
    with pytest.raises(
        ConfigError, match=r"a-002.tar has a caption .*a-002.tar:x0 \(members: png\); add captions"
    ):
        opened(shards)


def test_wrong_caption_key(tmp_path):
    shards = make(
        tmp_path, [{"__key__": f"x{i}", "png": png(i), "json": {"text": f"a {i}"}} for i in range(3)]
    )
    with pytest.raises(ConfigError, match=r"no caption under 'caption' \(keys: text\); set data.caption_key"):
        opened(shards)
    assert next(opened(shards, caption_key="text", batch_size=3).records()).prompts != []


def test_shard_without_images(tmp_path):
    shards = make(tmp_path, [{"__key__": f"x{i}", "txt": "a"} for i in range(3)])
    with pytest.raises(ConfigError, match=r"no sample of a-000.tar has a image .*members: txt"):
        opened(shards)


def test_latents_in_some_shards_only(tmp_path):
    shards = make(tmp_path, image_samples())
    write_shard(tmp_path / "a-001.tar", latent_samples(7))
    with pytest.raises(
        ConfigError, match=r"7 of 30 samples have latents: a-001.tar:s000 .*npy.*a-000.tar:s000 .*png"
    ):
        opened(shards)


def test_latents_of_another_shape(tmp_path):
    shards = make(tmp_path, latent_samples())
    with pytest.raises(
        ConfigError, match=r"latents are float16 \(4, 2, 2\), the model needs .*\(32, 16, 16\)"
    ):
        open_data(config(shards), need_pixels=False, seed=0, stage="s", latent_shape=(32, 16, 16))


def test_damaged_shard(tmp_path):
    shards = make(tmp_path, latent_samples())
    path = tmp_path / "a-001.tar"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ConfigError, match="a-001.tar: damaged tar"):
        opened(shards)
    data = opened(shards, tolerate_shards=1)
    assert len(data) == 23 and data.catalog.problems[0].shard == "a-001.tar"


@pytest.mark.parametrize("values", [{"batch_size": 0}, {"workers": -1}, {"max_bad_fraction": 2.0}])
def test_bad_config(values):
    with pytest.raises(ConfigError, match=f"{next(iter(values))} must be at"):
        config("a.tar", **values)


# --- what is wrong when it is read ----------------------------------------------------------------

BROKEN = {
    "undecodable image": ({"png": b"not an image"}, "image does not decode"),
    "cut image": ({"png": png(3)[:60]}, "image does not decode"),
    "empty caption": ({"txt": "  \n"}, "empty caption"),
    "not utf-8": ({"txt": b"\xff\xfe"}, "caption is not UTF-8"),
    "bad json": ({"json": b"{"}, "json does not parse"),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", BROKEN)
def test_bad_sample_is_replaced_counted_and_reported(tmp_path, name, workers):
    samples, (change, reason) = image_samples(), BROKEN[name]
    clean = [r.keys for r in islice(opened(make(tmp_path, samples)).records(), 6)]
    samples[12] |= change
    shards = make(tmp_path, samples)
    data = opened(shards, workers=workers)
    data.bad.report_to(tmp_path / "bad.jsonl", 0)
    got = [records.keys for records in islice(data.records(), 6)]
    bad = "a-001.tar:s012"
    order = sum(clean, []) + data.keys(range(30, 31))
    order[order.index(bad)] = order[order.index(bad) + 1]
    assert sum(got, []) == order[:30] and bad not in sum(got, [])
    (line,) = map(json.loads, (tmp_path / "bad.jsonl").read_text().splitlines())
    assert (line["shard"], line["key"]) == ("a-001.tar", "s012") and reason in line["reason"]
    assert len(data.bad) == 1


def test_bad_latents_are_replaced(tmp_path):
    samples = latent_samples()
    samples[3]["npy"] = np.full((4, 2, 2), np.nan, np.float16)
    samples[9]["npy"] = np.zeros((4, 2, 3), np.float16)
    samples[15]["npy"] = np.zeros((4, 2, 2), np.int16)
    shards = make(tmp_path, samples)
    data = opened(shards)
    flip_byte(tmp_path / "a-003.tar", "s022", "npy")
    data.bad.fraction = 1.0
    keys = [key for records in islice(data.records(), 6) for key in records.keys]
    assert (
        not {"a-000.tar:s003", "a-001.tar:s009", "a-002.tar:s015", "a-003.tar:s022"} & set(keys)
        and len(keys) == 30
    )
    reasons = {key: reason for (_, key), reason in data.bad.seen.items()}
    assert "NaN" in reasons["s003"] and "bytes" in reasons["s009"]
    assert "not a <f2 array" in reasons["s015"] and "CRC" in reasons["s022"]


def test_bit_flips_are_found_in_every_member(tmp_path):
    shards = make(tmp_path, image_samples())
    data = opened(shards)
    for key, extension in (("s000", "png"), ("s001", "txt"), ("s002", "json")):
        flip_byte(tmp_path / "a-000.tar", key, extension)
    data.bad.fraction = 1.0
    list(islice(data.records(), 6))
    assert {key: "CRC" in reason for (_, key), reason in data.bad.seen.items()} == {
        "s000": 1,
        "s001": 1,
        "s002": 1,
    }


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_samples_stop_the_run(tmp_path, workers):
    samples = image_samples()
    for i in (4, 9):
        samples[i]["txt"] = ""
    data = opened(make(tmp_path, samples), workers=workers)
    with pytest.raises(BadDataError, match=r"2 bad samples of 30 .*empty caption.*max_bad_fraction"):
        list(islice(data.records(), 7))


def test_nothing_but_bad_samples(tmp_path):
    samples = [sample | {"txt": ""} for sample in image_samples()]
    data = opened(make(tmp_path, samples), max_bad_fraction=1.0)
    with pytest.raises(ConfigError, match="64 samples in a row"):
        next(data.records())


def test_bad_sample_limits():
    class P:
        def __init__(self, key):
            self.shard, self.key, self.reason = "a.tar", key, "r"

    bad = BadSamples(100_000, 0.001, [])
    for i in range(8):
        bad.add([P(i), P(i)], read=10)  # the same one twice counts once
    with pytest.raises(BadDataError, match="9 bad samples of 100000 .90 read."):
        bad.add([P(8)], read=10)
    bad = BadSamples(100_000, 0.001, [])
    for i in range(100):
        bad.add([P(i)], read=1000)
    with pytest.raises(BadDataError, match="101 bad"):
        bad.add([P(100)], read=10**6)


def test_killed_worker_is_explained(tmp_path):
    """In a process of its own: torch raises from its SIGCHLD handler, wherever this process happens to be."""
    make(tmp_path, latent_samples())
    code = """if True:
        import multiprocessing, os, signal, sys
        from itertools import islice
        from nitro_e.config import TrainingError
        from nitro_e.data import DataConfig, open_data
        config = DataConfig(shards=(sys.argv[1],), batch_size=5, workers=1)
        batches = open_data(config, need_pixels=False, seed=0, stage="test").records()
        next(batches)
        (worker,) = multiprocessing.active_children()
        killed = False
        for _ in range(3):
            try:
                killed = killed or os.kill(worker.pid, signal.SIGKILL) is None
                list(islice(batches, 100))
            except TrainingError as error:
                print(error, flush=True)
                break
            except RuntimeError:  # torch's handler, outside of the loader
                killed = True
        os._exit(0)
    """
    command = [sys.executable, "-c", code, str(tmp_path / "*.tar")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "lower data.workers" in done.stdout, done.stderr


def test_samples_that_miss_something_are_left_out_and_counted(tmp_path):
    samples = image_samples(30)
    del samples[4]["txt"], samples[4]["json"], samples[20]["png"]
    shards = make(tmp_path, samples)
    with pytest.raises(BadDataError, match="2 bad samples of 30 .0 read.*s020: no image"):
        opened(shards)
    data = opened(shards, max_bad_fraction=0.1)
    assert {str(p).split(" (")[0] for p in data.catalog.problems} == {
        "a-000.tar:s004: no caption",
        "a-002.tar:s020: no image",
    }
    keys = [key for records in islice(data.records(), 28) for key in records.keys]
    assert len(set(keys)) == 28 and len(data) == 28 and len(keys) == 5 * 28


def test_what_is_bad_at_the_start_is_reported_and_counted_by_one_process(tmp_path):
    samples = image_samples(30)
    del samples[4]["txt"], samples[4]["json"]
    samples[20]["txt"] = ""  # found by both when they read it
    shards, lines, counts = make(tmp_path, samples), [], []
    for rank in range(2):
        data = opened(shards, max_bad_fraction=0.1)
        data.bad.report_to(tmp_path / f"bad.rank{rank}.jsonl", rank)
        known = len(data.bad)
        list(islice(data.records(rank=rank, world=2), 15))
        counts.append((known, len(data.bad)))
        path = tmp_path / f"bad.rank{rank}.jsonl"
        lines.append([json.loads(line)["key"] for line in path.read_text().splitlines()])
    assert counts == [(1, 2), (0, 1)] and lines == [["s004", "s020"], ["s020"]]


def test_duplicates_are_counted(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(40):
            for name, content in (
                (f"k{i}.txt", b"one"),
                (f"k{i}.png", png(i)),
                *([(f"k{i}.txt", b"two")] * (i == 7)),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    data = opened(str(tmp_path / "a.tar"), batch_size=40)
    assert len(data) == 40 and len(data.bad) == 1 and ("a.tar", "k7") in data.bad.seen
    assert set(next(data.records()).prompts) == {"one"}
    shutil.copy(tmp_path / "a.tar", tmp_path / "b.tar")
    with pytest.raises(BadDataError, match="2 bad samples of 8. .*duplicate member 'txt'"):
        opened(str(tmp_path / "?.tar"))


def test_shard_that_disappears(tmp_path):
    data = opened(make(tmp_path, latent_samples()), workers=1)
    for path in tmp_path.glob("*.tar"):
        path.unlink()
    with pytest.raises(ConfigError, match="No such file.*a-00"):
        next(data.records())


# --- images ---------------------------------------------------------------------------------------


def encoded(image, format="PNG", **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, format, **kwargs)
    return buffer.getvalue()


def test_transparency_becomes_white():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 255, 255))
    image.putpixel((1, 0), (0, 0, 0, 128))
    pixels = decode_image(encoded(image), 4)
    assert pixels[:, 0, 0].tolist() == [0, 0, 255] and pixels[:, 2, 2].tolist() == [255] * 3
    np.testing.assert_allclose(pixels[:, 0, 1], 127, atol=1)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert decode_image(encoded(palette, transparency=1), 4)[:, 0, 0].tolist() == [255] * 3
    assert decode_image(encoded(palette), 4)[:, 0, 0].tolist() == [255, 0, 0]


def test_gray_16_bit_and_webp():
    gray = Image.fromarray(np.full((4, 4), 0x8080, np.uint16))
    assert decode_image(encoded(gray), 4)[:, 0, 0].tolist() == [128] * 3
    image = Image.fromarray(np.full((6, 6, 3), 77, np.uint8))
    assert (decode_image(encoded(image, "WEBP", lossless=True), 6) == 77).all()


def test_exif_rotation():
    image = Image.fromarray(np.zeros((8, 16, 3), np.uint8))
    image.paste((255, 255, 255), (0, 0, 8, 8))  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated by 90 degrees: left becomes top
    pixels = decode_image(encoded(image, "JPEG", exif=exif, quality=95), 8)
    upright = Image.fromarray(np.rot90(np.asarray(image), -1)).resize((8, 16)).crop((0, 4, 8, 12))
    np.testing.assert_allclose(pixels.transpose(1, 2, 0), np.asarray(upright), atol=12)


@pytest.mark.parametrize("size", [(40, 30), (30, 47), (9, 200), (16, 16)])
def test_resize_and_crop_against_torchvision(size):
    from torchvision.transforms import v2

    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).resize(size)
    reference = v2.Compose([v2.Resize(16, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(16)])(
        image
    )
    pixels = decode_image(encoded(image), 16).transpose(1, 2, 0).astype(int)
    assert pixels.shape == (16, 16, 3)
    # torchvision truncates the longer side, this rounds it: at most a fraction of a pixel's shift
    if size[0] == size[1] or (16 * max(size)) % min(size) == 0:
        np.testing.assert_array_equal(pixels, np.asarray(reference))
    else:
        assert np.abs(pixels - np.asarray(reference)).mean() < 30


def test_bomb_is_a_bad_sample(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(BadSample, match="DecompressionBomb"):
        decode_image(png(), 8)
