"""Choices among samples and captions: several captions with weights, conditions on json, stored text of 8 bits."""

import json
from itertools import islice

import numpy as np
import pytest
import torch
from data_samples import latent, png

from nitro_e.cli import data as tool
from nitro_e.config import ConfigError
from nitro_e.data import DataConfig, SourceConfig, open_data
from nitro_e.data.conditions import Condition, parse
from nitro_e.data.decode import BadSample, draw_caption
from nitro_e.data.making import write_shard, write_shards
from nitro_e.data.making.encode import EncodeConfig, Encoders, encode, quantize
from nitro_e.data.making.jobs import JobConfig
from nitro_e.encoders.components import ComponentConfig, build_text_encoder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NITRO_E_CACHE", str(tmp_path / "cache"))


def samples(n=40):
    """Sample i has a short caption (txt), a long one from i = 10 on, and a list of two or three."""
    for i in range(n):
        info = {"n": i, "score": f"{i / 4}", "meta": {"kind": "photo" if i % 3 else "art"}, "safe": i % 5 > 0}
        info |= {"long": f"long {i}"} if i >= 10 else {}
        info |= {"captions": [f"one {i}", f"two {i}", " "] + [f"three {i}"] * (i % 2)}
        yield {"__key__": f"s{i:03d}", "npy": latent(i), "txt": f"short {i}", "json": info}


def opened(*shards, stage="s", **options):
    settings = {"batch_size": 10, "workers": 0, **options}
    return open_data(DataConfig(shards=shards, **settings), need_pixels=False, seed=0, stage=stage)


def drawn(data, batches, step=0, **options):
    stream = data.records(step, **options)
    found = [
        (key, prompt)
        for records in islice(stream, batches)
        for key, prompt in zip(records.keys, records.prompts)
    ]
    stream.close()
    return found


# --- several captions -----------------------------------------------------------------------------


def test_captions_are_drawn_by_weight_and_follow_the_position(tmp_path):
    write_shards(samples(), str(tmp_path / "a-%03d.tar"), 9)
    weights = {"txt": 1.0, "long": 2.0, "captions": 1.0}
    data = opened(str(tmp_path / "*.tar"), captions=weights)
    whole = drawn(data, 400)  # 100 epochs
    kinds = {"short": 0, "long": 0, "one": 0, "two": 0, "three": 0}
    early = dict(kinds)
    for key, prompt in whole:
        kind, number = prompt.split()
        assert int(number) == int(key[-3:])
        (early if int(number) < 10 else kinds)[kind] += 1
    assert kinds["short"] / 3000 == pytest.approx(0.25, abs=0.03)
    assert kinds["long"] / 3000 == pytest.approx(0.5, abs=0.03)
    assert kinds["three"] / 3000 == pytest.approx(0.25 / 6, abs=0.02)
    assert early["long"] == 0 and early["short"] / 1000 == pytest.approx(0.5, abs=0.05)
    assert len({prompt for key, prompt in whole if key.endswith("s021")}) == 5
    # a pure function of the position: any start, worlds and workers
    assert drawn(opened(str(tmp_path / "*.tar"), captions=weights, workers=2), 5, step=3) == whole[30:80]
    halves = [opened(str(tmp_path / "*.tar"), captions=weights, batch_size=5) for _ in range(2)]
    parts = [drawn(half, 2, step=7, rank=rank, world=2) for rank, half in enumerate(halves)]
    assert parts[0][:5] + parts[1][:5] + parts[0][5:] + parts[1][5:] == whole[70:90]
    # the samples and their order are those without the choice; today's fingerprints stay
    plain = opened(str(tmp_path / "*.tar"))
    assert [key for key, _ in whole[:50]] == [key for key, _ in drawn(plain, 5)]
    assert plain.fingerprint() | {"captions": weights} == data.fingerprint()
    assert "captions" not in plain.fingerprint() and "where" not in plain.fingerprint()


def test_draw_caption():
    weights = (("txt", 1.0), ("many", 3.0))
    info = {"many": ["a", "", "b", 5, "c "]}
    got = [draw_caption(b"t", info, weights, draw)[1] for draw in (0, 0.24, 0.26, 0.51, 0.76, 0.999999)]
    assert got == ["t", "t", "a", "b", "c", "c"]
    assert draw_caption(None, info, weights, 0.0) == ("many", "a")
    assert draw_caption(None, info, weights, 0.99, first=True) == ("many", "a")
    assert draw_caption(b"t", {}, weights, 0.99) == ("txt", "t")
    for text, values in ((b" ", {}), (None, {"many": []}), (b"\xff", {}), (None, {"many": "\ud800"})):
        with pytest.raises(BadSample):
            draw_caption(text, values, weights, 0.5)


def test_bad_captions_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="captions: all weights are 0"):
        DataConfig(shards=("a.tar",), captions={"txt": 0.0})
    with pytest.raises(ConfigError, match="stream knows neither captions nor buckets nor where"):
        DataConfig(shards=("a.tar",), reader="stream", where={"a": "> 1"})
    write_shard(tmp_path / "a.tar", samples(12))
    with pytest.raises(ConfigError, match="has none of the captions lang"):
        drawn(opened(str(tmp_path / "a.tar"), captions={"lang": 1.0}), 1)


# --- conditions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, yes, no",
    [
        (">= 5.0", [5, 5.0, "5", 7.5], [4.9, "4", float("-inf")]),
        ("< 3", [2, "-1"], [3, 3.5]),
        ("== 2", [2, 2.0, "2.0"], [3]),
        ("!= 2", [3], [2]),
        ("== photo", ["photo"], ["art", "Photo"]),
        ("!= photo", ["art", 5], ["photo"]),
        ("== true", [True], [False]),
        ("!= true", [False], [True]),
    ],
)
def test_conditions(text, yes, no):
    (condition,) = parse({"k": text})
    assert [condition.holds({"k": value}) for value in yes] == [True] * len(yes)
    assert [condition.holds({"k": value}) for value in no] == [False] * len(no)
    assert condition.holds({}) is None and condition.holds({"k": None}) is None
    assert Condition("a.b", ">", 1.0).holds({"a": {"b": 2}}) and Condition("a.b", ">", 1.0).holds({"a.b": 2})


@pytest.mark.parametrize("text", ["5.0", ">=", "=> 5", "~ x", "", "> photo", ">= nan"])
def test_what_is_no_condition_is_refused(text):
    with pytest.raises(ConfigError, match="sources.a.where.score: "):
        DataConfig(sources={"a": SourceConfig(shards=("x.tar",), where={"score": text})})


def test_where_leaves_out_counts_and_reports(tmp_path, capsys, monkeypatch):
    write_shards(samples(), str(tmp_path / "a-%03d.tar"), 9)
    where = {"score": ">= 5.0", "meta.kind": "== photo", "long": "!= long 22"}
    data = opened(str(tmp_path / "*.tar"), where=where)
    kept = [i for i in range(40) if i >= 20 and i % 3 and i != 22]
    assert len(data) == len(kept)
    assert {key.split(":")[1] for key, _ in drawn(data, 2)} <= {f"s{i:03d}" for i in kept}
    assert len({key for key, _ in drawn(data, 9)}) == len(kept)
    line = (
        "data: 12 of 40 samples kept; 20 fail score >= 5.0; 7 fail meta.kind == photo; 1 fail long != long 22"
    )
    assert data.filtered == [line] and f"where: {line}" in capsys.readouterr().err
    assert not data.catalog.problems and len(data.bad) == 0
    fewer = {**where, "long": "!= long 23"}  # as many of every shard, but others
    other = opened(str(tmp_path / "*.tar"), where=fewer)
    assert [len(s) for s in other.catalog.sizes] == [len(s) for s in data.catalog.sizes]
    assert other.fingerprint() != data.fingerprint()
    monkeypatch.setattr("nitro_e.data.where.scan", None)  # what was found is kept
    assert opened(str(tmp_path / "*.tar"), where=where).fingerprint() == data.fingerprint()


def test_where_of_a_source(tmp_path):
    write_shard(tmp_path / "a.tar", samples())
    write_shard(tmp_path / "b.tar", ({k: v for k, v in s.items() if k != "json"} for s in samples(7)))
    sources = {
        "a": SourceConfig(shards=(str(tmp_path / "a.tar"),), where={"long": "!= x"}),
        "b": SourceConfig(shards=(str(tmp_path / "b.tar"),)),
    }
    data = open_data(DataConfig(sources=sources, workers=0), need_pixels=False, seed=0, stage="s")
    assert [int(sizes.sum()) for sizes in data.catalog.sizes] == [30, 7]
    assert data.filtered == ["a: 30 of 40 samples kept; 10 have no 'long'"]
    with pytest.raises(ConfigError, match="where: b: 0 of 7 samples kept; 7 have no 'score'; relax"):
        open_data(
            DataConfig(sources=sources, where={"score": "> 0"}, workers=0),
            need_pixels=False,
            seed=0,
            stage="s",
        )


def test_where_after_a_shard_went_to_another_source(tmp_path):
    for shard in range(3):
        chosen = [{**s, "__key__": f"{shard}-{s['__key__']}"} for s in samples(5)]
        write_shard(tmp_path / f"{shard}.tar", [{**s, "json": {"shard": shard}} for s in chosen])
    for a in (1, 2):  # shards of source a
        paths = [str(tmp_path / f"{shard}.tar") for shard in range(3)]
        sources = {
            "a": SourceConfig(shards=tuple(paths[:a]), where={"shard": ">= 0"}),
            "b": SourceConfig(shards=tuple(paths[a:]), where={"shard": ">= 2"}),
        }
        data = open_data(DataConfig(sources=sources, workers=0), need_pixels=False, seed=0, stage="s")
        assert [int(sizes.sum()) for sizes in data.catalog.sizes] == [5 * a, 5]


# --- stored text ----------------------------------------------------------------------------------


def packed(tmp_path):
    images = [
        {
            "__key__": f"k{i}",
            "png": png(i),
            "txt": f"a {i}",
            "json": {"long": "b " * i + f"{i}", "many": ["x", "y"]},
        }
        for i in range(8)
    ]
    write_shard(tmp_path / "images-0.tar", images)
    return [str(tmp_path / "images-0.tar")]


@pytest.mark.parametrize("text_format", ["padded", "ragged"])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_stored_text_of_several_captions(tmp_path, text_format, dtype):
    shards, text = packed(tmp_path), build_text_encoder(ComponentConfig(name="hash"))
    for caption in (None, "long"):
        config = EncodeConfig(workers=0, text_format=text_format, text_dtype=dtype, caption=caption)
        encode(shards, Encoders(text=text, caption=caption), config, JobConfig(out=tmp_path))
    assert tool.main(["verify", f"{tmp_path}/text*.tar"]) == 0
    config = DataConfig(
        shards=(str(tmp_path / "*.tar"),),
        captions={"txt": 1.0, "long": 1.0},
        batch_size=8,
        resolution=8,
        workers=0,
    )
    data = open_data(config, need_pixels=False, use_text=True, text_length=text.length, seed=0, stage="s")
    (made,) = data.encoders()["text_long"].values()
    assert data.text_format == text_format and made["name"] is None
    seen = set()
    for records in islice(data.records(), 6):
        tokens, mask = text.encode(records.prompts)
        assert records.text.tokens.dtype == torch.float16 and torch.equal(records.text.mask, mask)
        error = (records.text.tokens.float() - tokens)[mask].abs().max()
        assert error <= tokens.abs().max() * (1 / 240 if dtype == "int8" else 1 / 2000)
        seen |= {prompt[0] for prompt in records.prompts}
    assert {"a", "b"} <= seen
    config = DataConfig(shards=config.shards, captions={"many": 1.0, "txt": 1.0}, workers=0, resolution=8)
    with pytest.raises(ConfigError, match="not that of 'many'; encode it with --caption many"):
        open_data(config, need_pixels=False, use_text=True, text_length=text.length, seed=0, stage="s")


def test_text_of_8_bits_takes_half_and_errs_by_a_known_amount(tmp_path):
    tokens = (
        torch.randn(64, 2048, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 64)[:, None]
    )
    values, scale = quantize(tokens)
    assert values.dtype == torch.int8 and values.abs().amax(dim=1).eq(127).all()
    error = (values.float() * scale[:, None] - tokens).abs()
    assert (error <= scale[:, None] * 0.5001).all()  # half a step of every row's own scale
    assert quantize(torch.zeros(2, 4))[0].eq(0).all()

    shards, text = packed(tmp_path), build_text_encoder(ComponentConfig(name="hash"))
    sizes = []
    for dtype in ("float16", "int8"):
        config = EncodeConfig(workers=0, text_dtype=dtype)
        (entry,) = encode(shards, Encoders(text=text), config, JobConfig(out=tmp_path / dtype))
        assert ("dtype" in entry["encoder"]) is (dtype == "int8")
        sizes.append(sum(np.load(tmp_path / dtype / ".index/text-0.tar.npy")["text.npy"]["size"] - 128))
    assert sizes[0] == 2 * sizes[1]


def test_caption_flag(tmp_path, capsys):
    shards = packed(tmp_path)
    wrong = ["encode", *shards, "--out", str(tmp_path / "o"), "--caption", "long", "--codec", "dct-f8c24"]
    assert tool.main(wrong) == 2 and "--text alone" in capsys.readouterr().err
    right = [
        "encode",
        *shards,
        "--out",
        str(tmp_path),
        "--caption",
        "long",
        "--text",
        "hash",
        "--text-dtype",
        "int8",
    ]
    assert tool.main([*right, "--workers", "0"]) == 0
    (line,) = (tmp_path / "manifest-text_long.jsonl").read_text().splitlines()
    assert json.loads(line)["members"] == ["text_long.npy", "scale_long.npy", "mask_long.npy"]
