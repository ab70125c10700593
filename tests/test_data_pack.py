"""Packing: a 64-image sample of each source layout, resume, processes, and what is wrong with input."""

import csv
import gzip
import io
import json
import os
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageOps

from nitro_e.config import ConfigError
from nitro_e.data import DataConfig, open_data
from nitro_e.data.decode import BadSample
from nitro_e.data.index import read_members, scan_tar
from nitro_e.data.making.captions import CaptionTable, rows, stem
from nitro_e.data.making.jobs import JobConfig
from nitro_e.data.making.pack import (
    ArchiveUnit,
    CaptionSource,
    Item,
    PackConfig,
    archive_units,
    folder_units,
    journeydb_units,
    pack,
    prepare,
    prepare_image,
    read_parquet,
    read_sa1b,
    read_tgz,
    read_webdataset,
    readable,
    table_units,
)

N = 64
CONFIG = PackConfig(name="t", samples_per_shard=25, min_side=1)


def jpeg(i, size=(20, 16)):
    buffer = io.BytesIO()
    Image.fromarray(np.full((size[1], size[0], 3), (i * 3, 255 - i, 7), np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def add(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def images(root, pattern="{:02d}.jpg"):
    for i in range(N):
        path = root / pattern.format(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(i))


# One function per layout: make 64 samples as the source lays them out, return the units.


def folder_sidecar(root):
    images(root, "sub/{:02d}.jpg")
    for i in range(N):
        (root / f"sub/{i:02d}.txt").write_text(f"picture {i}\n")
    return folder_units(root, CONFIG, CaptionSource())


def folder_names(root):
    images(root, "picture_{}.jpg")
    return folder_units(root, CONFIG, CaptionSource(file_names=True))


def folder_csv(root):
    images(root)
    with open(root / "captions.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [["image", "caption"], *[[f"{i:02d}.jpg", f"picture {i}"] for i in range(N)]]
        )
    return folder_units(root, CONFIG, CaptionSource(root / "captions.csv"))


def jsonl(root):
    images(root, "x/{:02d}.jpg")
    lines = [json.dumps({"image": f"x/{i:02d}.jpg", "meta": {"text": f"picture {i}"}}) for i in range(N)]
    (root / "list.jsonl").write_text("\n".join(lines))
    return table_units(root / "list.jsonl", replace(CONFIG, caption_column="meta.text"), CaptionSource())


def parquet(root):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet  # noqa: F811

    for part in range(2):
        ids = range(part * 32, part * 32 + 32)
        table = pyarrow.table(
            {
                "image": [{"bytes": jpeg(i), "path": f"{i}.jpg"} for i in ids],
                "caption": [f"picture {i}" for i in ids],
            }
        )
        pyarrow.parquet.write_table(table, root / f"p{part}.parquet")
    return archive_units([str(root / "p*.parquet")], read_parquet, CONFIG)


def img2dataset(root):
    for part in range(2):
        with tarfile.open(root / f"{part:05d}.tar", "w") as tar:
            for i in range(part * 32, part * 32 + 32):
                key = f"{part:05d}{i:04d}"
                meta = {"key": key, "caption": f"picture {i}", "url": f"http://x/{i}", "status": "success"}
                for suffix, content in (
                    ("jpg", jpeg(i)),
                    ("txt", f"picture {i}".encode()),
                    ("json", json.dumps(meta).encode()),
                ):
                    add(tar, f"{key}.{suffix}", content)
        (root / f"{part:05d}_stats.json").write_text("{}")
    return archive_units([str(root / "*.tar")], read_webdataset, CONFIG)


def sa1b(root):
    for part in range(2):
        with tarfile.open(root / f"sa_{part:06d}.tar", "w") as tar:
            for i in range(part * 32, part * 32 + 32):
                add(tar, f"./sa_{i}.jpg", jpeg(i))
                add(tar, f"./sa_{i}.json", json.dumps({"annotations": ["mask"] * 2000}).encode())
    (root / "c.jsonl").write_text(
        "\n".join(json.dumps({"id": f"sa_{i}", "caption": f"picture {i}"}) for i in range(N))
    )
    table = CaptionTable.build(root / "c.jsonl", root / "tables", "id", "caption")
    return archive_units([str(root / "sa_*.tar")], read_sa1b, CONFIG, table)


def annotations(root):
    lines = [
        {"img_path": f"./{i // 32:03d}/im{i}.jpg", "prompt": "p", "Task2": {"Caption": f"picture {i}"}}
        for i in range(N)
    ]
    return "\n".join(map(json.dumps, lines)).encode()


def journeydb_archives(root):
    (root / "imgs").mkdir()
    for part in range(2):
        with tarfile.open(root / f"imgs/{part:03d}.tgz", "w:gz") as tar:
            for i in range(part * 32, part * 32 + 32):
                add(tar, f"{part:03d}/im{i}.jpg", jpeg(i))
    with tarfile.open(root / "train_anno_realease_repath.jsonl.tgz", "w:gz") as tar:
        add(tar, "train_anno_realease_repath.jsonl", annotations(root))
    return journeydb_units(
        root, replace(CONFIG, caption_column="Task2.Caption"), CaptionSource(folder=root / "tables")
    )


def journeydb_extracted(root):
    for i in range(N):
        path = root / f"imgs/{i // 32:03d}/im{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(i))
    (root / "train_anno.jsonl").write_bytes(annotations(root))
    return journeydb_units(
        root, replace(CONFIG, caption_column="Task2.Caption"), CaptionSource(folder=root / "tables")
    )


LAYOUTS = [
    folder_sidecar,
    folder_names,
    folder_csv,
    jsonl,
    parquet,
    img2dataset,
    sa1b,
    journeydb_archives,
    journeydb_extracted,
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(tmp_path, layout):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    entries = pack(layout(source), JobConfig(out=out))
    assert sum(entry["samples"] for entry in entries) == N and (out / "bad-images.jsonl").read_text() == ""
    data = open_data(
        DataConfig(shards=(str(out / "*.tar"),), batch_size=N, resolution=16, workers=0),
        need_pixels=True,
        seed=0,
        stage="s",
    )
    records = next(data.records())
    found = {int(prompt.removeprefix("picture ")): x for prompt, x in zip(records.prompts, records.pixels)}
    assert sorted(found) == list(range(N))
    for i, pixels in found.items():
        np.testing.assert_allclose(pixels[:, 8, 8].numpy(), [i * 3, 255 - i, 7], atol=4)
    assert records.info[0]["width"] == 20 and records.info[0]["source"]
    originals = {jpeg(i) for i in range(N)}
    for entry in entries:  # image bytes are copied
        with tarfile.open(out / entry["shard"]) as tar:
            assert {tar.extractfile(m).read() for m in tar if m.name.endswith("jpg")} <= originals


@pytest.mark.parametrize("layout", [folder_csv, img2dataset])
def test_same_bytes_for_any_number_of_processes(tmp_path, layout):
    source = tmp_path / "in"
    source.mkdir()
    units = layout(source)
    pack(units, JobConfig(out=tmp_path / "one"))
    pack(units, JobConfig(out=tmp_path / "pool", processes=3))
    for rank in (1, 0):
        pack(units, JobConfig(out=tmp_path / "ranks", rank=rank, world=2))
    one, pool, ranks = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("[!.]*")}
        for name in ("one", "pool", "ranks")
    )
    assert one == pool == ranks and len(one) >= 5 and "manifest-images.jsonl" in one


def test_second_run_only_does_what_is_missing(tmp_path):
    (tmp_path / "in").mkdir()
    units = folder_names(tmp_path / "in")
    job = JobConfig(out=tmp_path / "out")
    pack(units, job)
    shards = sorted((tmp_path / "out").glob("*.tar"))
    before = {path: path.read_bytes() for path in shards}
    shards[0].unlink()
    shards[1].write_bytes(b"short")
    kept = shards[2].stat().st_mtime_ns
    pack(units, job)
    assert {path: path.read_bytes() for path in shards} == before and shards[2].stat().st_mtime_ns == kept
    other = folder_units(tmp_path / "in", replace(CONFIG, name="other"), CaptionSource(file_names=True))
    with pytest.raises(ConfigError, match="other input or with other options"):
        pack(other, job)
    assert pack(other, JobConfig(out=tmp_path / "out", overwrite=True))[0]["first"].startswith("other_")


def test_overwriting_leaves_no_old_shards(tmp_path):
    (tmp_path / "in").mkdir()
    for layout, fewer in ((folder_names, 1), (img2dataset, 2)):
        out = tmp_path / layout.__name__
        units = layout(tmp_path / "in")
        pack(units, JobConfig(out=out))
        larger = [replace(unit, config=replace(CONFIG, samples_per_shard=99)) for unit in units[:fewer]]
        entries = pack(larger, JobConfig(out=out, overwrite=True))
        assert sorted(entry["shard"] for entry in entries) == sorted(path.name for path in out.glob("*.tar"))
        assert len(entries) == fewer and len(list(out.glob(".index/*"))) == fewer


def test_changed_captions_are_noticed(tmp_path):
    (tmp_path / "c.csv").write_text("id,caption\na,one\n")
    first = CaptionTable.build(tmp_path / "c.csv", tmp_path, "id", "caption")
    (tmp_path / "c.csv").write_text("\ufeffid,caption\na,two\n", encoding="utf-8")
    second = CaptionTable.build(tmp_path / "c.csv", tmp_path, "id", "caption")
    assert (first.get("a"), second.get("a")) == ("one", "two") and first.identity != second.identity
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a.txt").write_text("three")
    assert CaptionTable.build(tmp_path / "d", tmp_path, "file", "caption").get("a.jpg") == "three"


def test_changed_files_of_a_folder_are_refused_and_overwritten(tmp_path):
    folder, job = tmp_path / "in", JobConfig(out=tmp_path / "out")
    folder.mkdir()
    pack(folder_sidecar(folder), job)
    for path, content in ((folder / "sub/03.txt", b"Picture 3"), (folder / "sub/05.jpg", jpeg(99))):
        pack(folder_units(folder, CONFIG, CaptionSource()), job)  # nothing has changed
        path.write_bytes(content)
        units = folder_units(folder, CONFIG, CaptionSource())
        with pytest.raises(ConfigError, match="made from other input or with other options"):
            pack(units, job)
        pack(units, replace(job, overwrite=True))
        assert any(content in shard.read_bytes() for shard in job.out.glob("*.tar"))


def test_bad_input_is_left_out_and_reported(tmp_path):
    images(tmp_path / "in")
    with open(tmp_path / "list.csv", "w", newline="") as file:
        lines = [[f"{i:02d}.jpg", f"picture {i}"] for i in range(N)]
        lines[3][1] = " "
        csv.writer(file).writerows([["image", "caption"], *lines, ["missing.jpg", "gone"]])
    (tmp_path / "in/05.jpg").write_bytes(b"no image")
    (tmp_path / "in/07.jpg").write_bytes(jpeg(7)[:200])
    (tmp_path / "in/extra.png").write_bytes(jpeg(1))
    units = folder_units(tmp_path / "in", CONFIG, CaptionSource(tmp_path / "list.csv"))
    entries = pack(units, JobConfig(out=tmp_path / "out"))
    assert sum(entry["samples"] for entry in entries) == N - 3
    lines = [json.loads(line) for line in (tmp_path / "out/bad-images.jsonl").read_text().splitlines()]
    reasons = {line["key"].rsplit("/", 1)[-1]: line["reason"] for line in lines}
    assert reasons.keys() == {"03.jpg", "05.jpg", "07.jpg", "missing.jpg", "extra.png"}
    assert reasons["03.jpg"] == "empty caption" and reasons["missing.jpg"] == "image file is missing"
    assert "does not decode" in reasons["05.jpg"] and "does not decode" in reasons["07.jpg"]


def test_names_and_captions_that_are_no_utf8(tmp_path):
    """A Latin-1 file name keeps its picture if the caption is well; a broken caption leaves out its own sample only."""
    folder = tmp_path / "in"
    images(folder)
    odd = os.fsdecode(b"caf\xe9")
    (folder / f"{odd}.jpg").write_bytes(jpeg(1))
    rows = [{"image": f"{i:02d}.jpg", "caption": f"picture {i}"} for i in range(N)]
    rows[3]["caption"] = "half \ud800"
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (entry,) = pack(
        table_units(folder / "list.jsonl", replace(CONFIG, samples_per_shard=99), CaptionSource()),
        JobConfig(out=tmp_path / "a"),
    )
    assert entry["samples"] == N - 1
    (line,) = (tmp_path / "a/bad-images.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "caption is not UTF-8"

    for path in folder.glob("*.jpg"):
        path.with_suffix(".txt").write_text("a picture")
    units = folder_units(folder, replace(CONFIG, samples_per_shard=99), CaptionSource())
    assert pack(units, JobConfig(out=tmp_path / "b"))[0]["samples"] == N + 1
    by_name = folder_units(folder, replace(CONFIG, samples_per_shard=99), CaptionSource(file_names=True))
    assert pack(by_name, JobConfig(out=tmp_path / "c"))[0]["samples"] == N  # its name is no caption
    assert json.loads((tmp_path / "c/bad-images.jsonl").read_text())["key"].endswith(f"/{odd}.jpg")


def test_too_much_bad_input_stops(tmp_path):
    images(tmp_path / "in")
    units = folder_units(tmp_path / "in", CONFIG, CaptionSource())  # no caption anywhere
    with pytest.raises(ConfigError, match="25 bad samples of 25 so far.*no caption file"):
        pack(units, JobConfig(out=tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*.tar"))


def test_tables_are_checked(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("imag,caption\na.jpg,x\n")
    with pytest.raises(ConfigError, match="no column 'image', did you mean 'imag'"):
        table_units(path, CONFIG, CaptionSource())
    path.write_text("image,caption\na.jpg,x\na.jpg,y\n")
    with pytest.raises(ConfigError, match="1 images appear twice, the first is .*a.jpg"):
        table_units(path, CONFIG, CaptionSource())
    (tmp_path / "t.jsonl").write_text('{"image": 1\n')
    with pytest.raises(ConfigError, match="not a valid .jsonl table"):
        list(rows(tmp_path / "t.jsonl"))
    with pytest.raises(ConfigError, match="do not exist"):
        list(rows(tmp_path / "none.csv"))
    for name, content, words in (
        ("lists.jsonl", b"[1, 2]\n", "row 1 is '1', not an object with columns"),
        ("numbers.json", b"[1, 2]", "row 1 is '1', not an object"),
        ("deep.jsonl", b"[" * 100_000, "not a valid .jsonl table .nested too deeply"),
        ("latin.csv", "image\ncaf\xe9\n".encode("latin-1"), "not a valid .csv table"),
        ("table", b"x", "'' is not a table; use .csv"),
        ("cut.csv.gz", gzip.compress(b"image\na\n")[:-4], "not a valid .csv table"),
        ("not.jsonl.gz", b"plain", "not a valid .jsonl table"),
        ("not.tgz", b"plain", "damaged archive"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=words):
            list(rows(tmp_path / name))
    (tmp_path / "more.csv").write_text('image,caption\na.jpg,"a dog, on grass"\nb.jpg,a cat,\n')
    table = list(rows(tmp_path / "more.csv"))
    assert table == [{"image": "a.jpg", "caption": "a dog, on grass"}, {"image": "b.jpg", "caption": "a cat"}]
    (tmp_path / "more.csv").write_text("image,caption\na.jpg,a cat\nb.jpg,a dog, on grass\n")
    with pytest.raises(
        ConfigError, match=r"more.csv:3: more cells than columns .*; put quotes around a caption"
    ):
        list(rows(tmp_path / "more.csv"))
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    pytest.importorskip("pyarrow")
    with pytest.raises(ConfigError, match="not a readable parquet"):
        list(rows(tmp_path / "t.parquet"))


def test_caption_table(tmp_path, capsys):
    (tmp_path / "c.tsv").write_text("id\tcaption\n./0/a.jpg\tone\nb\ttwo\na\tthree\n")
    table = CaptionTable.build(tmp_path / "c.tsv", tmp_path, "id", "caption")
    assert (table.get("a"), table.get("x/b.png"), table.get("c")) == ("one", "two", None)
    assert "1 ids have several captions, the first is used: a\n" in capsys.readouterr().err
    assert stem("a.b c/v1.5 of it") == "v1.5 of it" and stem("x\\y.jpeg") == "y"


def test_damaged_archives(tmp_path):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for i in range(20):
            add(tar, f"{i}.jpg", np.random.default_rng(i).bytes(3000))
    content = bytearray(content.getvalue())
    content[-4000] ^= 255
    (tmp_path / "a.tgz").write_bytes(content)
    with pytest.raises(ConfigError, match="a.tgz: damaged archive"):
        list(read_tgz(tmp_path / "a.tgz", CONFIG))
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        add(tar, "a.jpg", jpeg(1))
    (tmp_path / "b.tar").write_bytes((tmp_path / "b.tar").read_bytes()[:1024])
    unit = ArchiveUnit("0", str(tmp_path / "b.tar"), read_webdataset, CONFIG)
    with pytest.raises(ConfigError, match="b.tar: damaged tar"):
        list(unit.read())


def test_images_are_copied_or_converted():
    content = jpeg(3, (40, 30))
    assert prepare_image(content, None, 1) == ("jpg", content, (40, 30))
    assert prepare_image(content, 30, 1)[1] is content
    extension, small, size = prepare_image(content, 15, 1)
    assert (extension, size) == ("jpg", (20, 15)) and Image.open(io.BytesIO(small)).size == (20, 15)
    buffer = io.BytesIO()
    Image.new("RGBA", (4, 4)).save(buffer, "TIFF")
    extension, converted, _ = prepare_image(buffer.getvalue(), None, 1)
    assert extension == "png" and Image.open(io.BytesIO(converted)).getpixel((0, 0)) == (255, 255, 255)
    buffer = io.BytesIO()
    Image.effect_noise((50, 50), 90).save(buffer, "PNG")
    flipped = bytearray(buffer.getvalue())
    flipped[-16] ^= 1  # the checksum of the pixel data
    with pytest.raises(BadSample, match="does not decode"):
        prepare_image(bytes(flipped), None, 1)
    with pytest.raises(BadSample, match="smaller than --min-side"):
        prepare_image(content, None, 31)
    assert prepare_image(jpeg(1, (40, 10)), None, 1, 4.0)[2] == (40, 10)
    with pytest.raises(BadSample, match="41x10 is longer than --max-aspect 4 allows"):
        prepare_image(jpeg(1, (41, 10)), None, 1, 4.0)


def test_width_and_height_are_those_that_are_seen():
    """A camera held upright stores rows that EXIF turns by a quarter."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind, extension in (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("TIFF", "png")):
        buffer = io.BytesIO()
        Image.effect_noise((40, 20), 90).save(buffer, kind, exif=exif)
        for resize, expected in ((None, (20, 40)), (10, (10, 20))):
            kept, content, size = prepare_image(buffer.getvalue(), resize, 1)
            assert size == expected and kept == ("jpg" if resize else extension), kind
            assert ImageOps.exif_transpose(Image.open(io.BytesIO(content))).size == expected, kind


def test_large_json_values_are_dropped():
    members = prepare(Item("k", jpeg(1), "c", {"url": "u"}), CONFIG)
    assert list(members) == ["jpg", "txt", "json"] and members["json"]["url"] == "u"


# --- captions as people have them -----------------------------------------------------------------


def members_of(out):
    found = {}
    for path in sorted(out.glob("images-*.tar")):
        for key, members in read_members(path, scan_tar(path), ("txt", "json")):
            found[key] = members["txt"].decode(), json.loads(members["json"])
    return found


def write_parquet(path, **columns):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet  # noqa: F811

    count = len(next(iter(columns.values())))
    pyarrow.parquet.write_table(pyarrow.table({"image": [jpeg(i) for i in range(count)], **columns}), path)
    return archive_units([str(path)], read_parquet, replace(CONFIG, caption_column=[*columns][0]))


@pytest.mark.parametrize("empty", [0, 5])
def test_a_null_caption_costs_one_sample_wherever_it_stands(tmp_path, empty):
    captions = [None if i == empty else f"a {i}" for i in range(8)]
    (entry,) = pack(write_parquet(tmp_path / "a.parquet", text=captions), JobConfig(out=tmp_path / "p"))
    assert entry["samples"] == 7
    (line,) = (tmp_path / "p/bad-images.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == f"a.parquet:{empty}" and "no caption" in json.loads(line)["reason"]

    lines = [json.dumps({"id": i} | ({"caption": c} if c else {})) for i, c in enumerate(captions)]
    (tmp_path / "sparse.jsonl").write_text("\n".join(lines))
    table = CaptionTable.build(tmp_path / "sparse.jsonl", tmp_path, "id", "caption")
    assert [table.get(str(i)) for i in range(8)] == captions
    with pytest.raises(ConfigError, match="no column 'captoin', did you mean 'caption'"):
        CaptionTable.build(tmp_path / "sparse.jsonl", tmp_path, "id", "captoin")


@pytest.mark.parametrize("layout", ["parquet", "table", "captions", "webdataset"])
def test_lists_of_captions_are_kept_as_such(tmp_path, layout):
    """The first caption is the sample's txt, all of them are in its json; one alone is only txt."""
    lists = [["first", "second"], ["only"], ["a", "b", "c"]]
    (tmp_path / "in").mkdir()
    lines = [{"image": f"{i}.jpg", "id": i, "caption": captions} for i, captions in enumerate(lists)]
    (tmp_path / "in/t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for i in range(3):
        (tmp_path / f"in/{i}.jpg").write_bytes(jpeg(i))
    if layout == "parquet":
        units = write_parquet(tmp_path / "a.parquet", text=lists)
    elif layout == "table":
        units = table_units(tmp_path / "in/t.jsonl", replace(CONFIG, shuffle=None), CaptionSource())
    else:
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            for i, line in enumerate(lines):
                add(tar, f"{i}.jpg", jpeg(i))
                if layout == "webdataset":
                    add(tar, f"{i}.json", json.dumps(line).encode())
        table = CaptionTable.build(tmp_path / "in/t.jsonl", tmp_path, "id", "caption")
        reader = {"captions": (read_sa1b, CONFIG, table), "webdataset": (read_webdataset, CONFIG)}[layout]
        units = archive_units([str(tmp_path / "a.tar")], *reader)
    pack(units, JobConfig(out=tmp_path / "out"))
    found = members_of(tmp_path / "out")
    assert [txt for txt, _ in found.values()] == ["first", "only", "a"]
    assert [info.get("captions") for _, info in found.values()] == [lists[0], None, lists[2]]


def test_captions_inside_objects(tmp_path):
    sentences = [[{"raw": "one", "id": 1}, {"raw": "two", "id": 2}], [{"raw": "three", "id": 3}]]
    units = write_parquet(tmp_path / "a.parquet", sentences=sentences)
    with pytest.raises(ConfigError, match="column 'sentences' holds objects.*'sentences.raw'"):
        pack(units, JobConfig(out=tmp_path / "bad"))
    units = [replace(unit, config=replace(unit.config, caption_column="sentences.raw")) for unit in units]
    pack(units, JobConfig(out=tmp_path / "good"))
    assert [txt for txt, _ in members_of(tmp_path / "good").values()] == ["one", "three"]
    with pytest.raises(ConfigError, match="no column 'sentences.row'"):
        list(rows(tmp_path / "a.parquet", ("sentences.row",)))


def test_kept_columns_go_into_json(tmp_path):
    units = write_parquet(
        tmp_path / "a.parquet", text=["x", "y"], aesthetic=[5.5, None], long=["x" * 9, "z" * 9000]
    )
    units = [replace(unit, config=replace(unit.config, keep=("aesthetic", "long"))) for unit in units]
    pack(units, JobConfig(out=tmp_path / "p"))
    (_, first), (_, second) = members_of(tmp_path / "p").values()
    assert (first["aesthetic"], first["long"]) == (5.5, "x" * 9)
    assert not {"aesthetic", "long"} & second.keys()
    lines = [{"id": "a", "caption": "short", "more": {"Caption": "a long one"}}]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    table = CaptionTable.build(tmp_path / "c.jsonl", tmp_path, "id", "caption", ("more.Caption",))
    assert table.find("x/a.jpg") == ("short", {"more.Caption": "a long one"})


def test_formats_that_pillow_cannot_read_are_skipped_and_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("nitro_e.data.making.pack.readable", lambda suffix: suffix not in (".heic", ".jxl"))
    images(tmp_path / "in")
    for name in ("a.heic", "b.HEIC", "c.jxl"):
        (tmp_path / "in" / name).write_bytes(b"?")
    units = folder_units(tmp_path / "in", CONFIG, CaptionSource(file_names=True))
    assert sum(len(unit.items) for unit in units) == N
    assert capsys.readouterr().err.splitlines() == [
        "skipped 2 times a .heic image, which Pillow cannot read here; convert it, or install a newer Pillow",
        "skipped 1 times a .jxl image, which Pillow cannot read here; convert it, or install a newer Pillow",
    ]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "k.heic", b"?")
        add(tar, "k.txt", b"a")
    (item,) = read_webdataset(tmp_path / "a.tar", CONFIG)
    assert item.problem.startswith("a .heic image, which Pillow cannot read")


@pytest.mark.skipif(not readable(".avif"), reason="this Pillow reads no AVIF")
def test_avif_is_packed_where_pillow_reads_it():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 40)).save(buffer, "AVIF", quality=100)
    extension, content, size = prepare_image(buffer.getvalue(), None, 1)
    assert (extension, size) == ("png", (8, 8))
    np.testing.assert_allclose(np.asarray(Image.open(io.BytesIO(content)))[4, 4], [200, 30, 40], atol=8)


def test_reasons_are_the_same_in_every_process():
    for _ in range(2):
        with pytest.raises(BadSample, match=r"^image does not decode \(it is of no format") as caught:
            prepare_image(b"<html>", None, 1)
    assert "0x" not in str(caught.value)
