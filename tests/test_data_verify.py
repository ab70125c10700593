"""Every fault that can be put into a data set is found by `verify`, and named by shard and key."""

import json

import numpy as np
import pytest
from data_samples import flip_byte, latent, png

from nitro_e.data.catalog import expand_shards
from nitro_e.data.index import scan_tar, shard_index
from nitro_e.data.making import write_shard
from nitro_e.data.making.jobs import publish_entry
from nitro_e.data.making.stats import head, stats
from nitro_e.data.making.verify import verify

NAN, NARROW = np.full((4, 2, 2), np.nan, np.float16), np.zeros((4, 2, 1), np.float16)


@pytest.fixture
def folder(tmp_path):
    """Three shards with images, three with latents, indices and a manifest."""
    entries = []
    for shard in range(3):
        keys = [f"s{shard}_{i}" for i in range(6)]
        columns = {
            "images": [
                {"__key__": key, "png": png(i), "txt": f"caption {i}", "json": {}}
                for i, key in enumerate(keys)
            ],
            "latents": [{"__key__": key, "npy": latent(i), "txt": "c"} for i, key in enumerate(keys)],
        }
        for name, samples in columns.items():
            path = tmp_path / f"{name}-{shard}.tar"
            write_shard(path, samples)
            entries.append(publish_entry(path))
    (tmp_path / "manifest-all.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return tmp_path


def problems(folder, **kwargs):
    found = verify(expand_shards([str(folder / "*.tar")]), **kwargs)
    return [str(problem) for problem in found.problems]


def rewrite(path, change):
    content = path.read_bytes()
    samples = []
    for row in scan_tar(path).rows:
        sample = {"__key__": row["__key__"].decode()}
        for name in row.dtype.names[1:]:
            offset, size, _ = row[name].tolist()
            sample[name] = content[offset : offset + size]
        samples.append(sample)
    index = shard_index(path)
    write_shard(path, change(samples) or samples)
    return index


def test_good_data_has_no_problems(folder):
    report = verify(expand_shards([str(folder / "*.tar")]), deep=True, processes=2)
    assert report.problems == [] and (report.shards, report.samples, report.repeated) == (6, 36, 0)


def test_flipped_bits_are_named_by_member(folder):
    flip_byte(folder / "images-1.tar", "s1_2", "png")
    flip_byte(folder / "latents-2.tar", "s2_4", "npy")
    found = problems(folder)
    assert "images-1.tar:s1_2: png has changed (CRC differs)" in found
    assert "latents-2.tar:s2_4: npy has changed (CRC differs)" in found
    assert sum("manifest-all.jsonl says" in line for line in found) == 2 and len(found) == 4


def test_flipped_bits_are_found_without_an_index(folder):
    (folder / ".index" / "images-1.tar.npy").unlink()
    flip_byte(folder / "images-1.tar", "s1_2", "png")
    (line,) = problems(folder)
    assert line.startswith("images-1.tar:*: sha256 is")


def test_truncation_and_lost_shards(folder):
    path = folder / "images-0.tar"
    path.write_bytes(path.read_bytes()[:2048])
    (folder / "latents-1.tar").unlink()
    found = problems(folder)
    assert any("images-0.tar: damaged tar" in line for line in found)
    assert "latents-1.tar:*: is in manifest-all.jsonl but not on disk" in found
    assert "images-1.tar:*: has no 'latents' column, other shards do" in found


@pytest.mark.parametrize(
    "shard, change, expected",
    [
        ("images-0", lambda s: s[1].update(txt=b" "), "images-0.tar:s0_1: txt: empty caption"),
        ("images-0", lambda s: s[1].update(json=b"{"), "images-0.tar:s0_1: json: json does not parse"),
        ("images-0", lambda s: s[1].update(png=b"?"), "images-0.tar:s0_1: png: image does not decode"),
        ("latents-0", lambda s: s[1].update(npy=NAN), "latents-0.tar:s0_1: npy: array has NaN"),
        ("latents-0", lambda s: s[1].update(npy=NARROW), "latents-0.tar:s0_1: npy: [4, 2, 1, '<f2'], but"),
        ("latents-0", lambda s: s[:5], "latents-0.tar:s0_5: missing; images-0.tar has it"),
        ("images-0", lambda s: s[:5], "images-0.tar:s0_5: missing; latents-0.tar has it"),
        ("images-0", lambda s: s[1].pop("png") and None, "images-0.tar:s0_1: has no image"),
        (
            "images-0",
            lambda s: [s[1].pop(x) for x in ("txt", "json")] and None,
            "images-0.tar:s0_1: has no caption",
        ),
        ("latents-0", lambda s: s[1].pop("npy") and None, "latents-0.tar:s0_1: has no npy"),
    ],
)
def test_content(folder, shard, change, expected):
    rewrite(folder / f"{shard}.tar", change)
    assert any(line.startswith(expected) for line in problems(folder, deep=True)), problems(folder, deep=True)


def test_another_shape_in_a_whole_shard(folder):
    rewrite(
        folder / "latents-2.tar",
        lambda s: [x.update(npy=np.zeros((4, 3, 3), np.float16)) for x in s] and None,
    )
    assert any(
        "latents-2.tar:*: npy is [4, 3, 3, '<f2'], in latents-0.tar it is" in line
        for line in problems(folder)
    )


def test_replaced_shard(folder):
    index = (folder / ".index" / "images-0.tar.npy").read_bytes()
    rewrite(
        folder / "images-0.tar",
        lambda s: [x.update(__key__=x["__key__"].replace("s", "t")) for x in s] and None,
    )
    (folder / ".index" / "images-0.tar.npy").write_bytes(index)
    assert any("holds other keys or members than when it was indexed" in line for line in problems(folder))


def test_an_index_of_another_length_or_damaged_is_one_fault_of_many(folder):
    write_shard(folder / "longer.tar", [{"__key__": f"x{i}", "png": png(i), "txt": "c"} for i in range(40)])
    (folder / "longer.tar").replace(folder / "images-0.tar")  # past the index
    (folder / ".index/images-1.tar.npy").write_bytes(b"no index")
    flip_byte(folder / "latents-2.tar", "s2_4", "npy")
    found = problems(folder)
    assert any("images-0.tar:*: " in line and "but its index was made when" in line for line in found)
    assert any("images-1.tar:*: " in line and "is not an index of this version" in line for line in found)
    assert "latents-2.tar:s2_4: npy has changed (CRC differs)" in found


def test_repeated_keys_are_noted(folder):
    write_shard(folder / "images-3.tar", [{"__key__": "s0_1", "png": png(), "txt": "x"}])
    write_shard(folder / "latents-3.tar", [{"__key__": "s0_1", "npy": latent(0)}])
    report = verify(expand_shards([str(folder / "*.tar")]))
    assert report.repeated == 1
    assert [str(problem) for problem in report.problems] == [
        f"{name}-3.tar:*: is in no manifest of its folder: left over, or not finished"
        for name in ("images", "latents")
    ]


def test_stats_and_head(folder, tmp_path):
    found = stats(expand_shards([str(folder / "*.tar")]))
    assert (
        found["members"]["npy"] == {"count": 18, "mean_bytes": 128 + 32}
        and found["members"]["txt"]["count"] == 36
    )
    assert (
        found["kinds"] == {"PNG RGB": 18, "latent (4, 2, 2)": 18} and found["image_shorter_side"]["max"] == 8
    )
    values = np.stack([latent(i) for i in range(6)]).astype(float)
    assert found["latent_mean"] == pytest.approx(values.mean()) and 0.5 < found["latent_std"] < 1.5
    lines = head(expand_shards([str(folder / "images-*.tar")]), 8, tmp_path / "sheet.png")
    assert [line["sample"] for line in lines[5:]] == [
        "images-0.tar:s0_5",
        "images-1.tar:s1_0",
        "images-1.tar:s1_1",
    ]
    assert lines[0]["caption"] == "caption 0" and (tmp_path / "sheet.png").is_file()


def test_a_shard_without_any_caption(tmp_path):
    write_shard(tmp_path / "images-0.tar", [{"__key__": f"k{i}", "png": png(i)} for i in range(3)])
    assert problems(tmp_path) == ["images-0.tar:*: no column of this shard holds captions (txt or json)"]
    write_shard(
        tmp_path / "latents-0.tar", [{"__key__": f"k{i}", "npy": latent(i), "txt": "a"} for i in range(3)]
    )
    assert problems(tmp_path) == []
