"""Writing and indexing tars, against Python's tarfile and webdataset."""

import gzip
import io
import os
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset

from nitro_e.config import ConfigError
from nitro_e.data.index import DamagedTar, scan_tar, shard_index, split_name
from nitro_e.data.making.writer import write_shard, write_shards
from nitro_e.data.problems import Problem
from nitro_e.files import atomic_file


def samples(n=10, prefix="s"):
    rng = np.random.default_rng(0)
    for i in range(n):
        latent = rng.standard_normal((4, 3, 3)).astype(np.float16)
        yield {
            "__key__": f"{prefix}_{i:04d}",
            "npy": latent,
            "txt": f"caption {i}",
            "json": {"n": i, "ä": "é"},
        }


def test_written_shards_are_reproducible_and_readable_by_tarfile(tmp_path):
    first = write_shards(samples(), str(tmp_path / "a-%03d.tar"), 4)
    second = write_shards(samples(), str(tmp_path / "b-%03d.tar"), 4)
    assert [path.name for path in first] == ["a-000.tar", "a-001.tar", "a-002.tar"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    with tarfile.open(first[2]) as tar:
        members = tar.getmembers()
        assert [m.name for m in members][:3] == ["s_0008.npy", "s_0008.txt", "s_0008.json"] and len(
            members
        ) == 6
        assert all(m.mtime == 0 and not m.pax_headers for m in members)
        array = np.load(io.BytesIO(tar.extractfile("s_0008.npy").read()))
        np.testing.assert_array_equal(array, list(samples())[8]["npy"])
    assert not list(tmp_path.glob("*.tmp"))


def test_sample_size_in_the_tar(tmp_path):
    latent = np.zeros((32, 16, 16), np.float16)
    write_shard(
        tmp_path / "a.tar", ({"__key__": f"k{i}", "npy": latent, "txt": "a cat"} for i in range(1000))
    )
    assert (tmp_path / "a.tar").stat().st_size / 1000 == pytest.approx(18_442, abs=64)


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "a\n"])
def test_bad_keys_are_refused_and_nothing_is_left(tmp_path, key):
    with pytest.raises(ConfigError, match="key"):
        write_shard(tmp_path / "a.tar", [{"__key__": key, "txt": "x"}])
    assert not list(tmp_path.iterdir())


def test_duplicate_and_too_long_keys_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="twice"):
        write_shard(tmp_path / "a.tar", [{"__key__": "k", "txt": "x"}] * 2)
    with pytest.raises(ConfigError, match="USTAR"):
        write_shard(tmp_path / "a.tar", [{"__key__": "k" * 300, "txt": "x"}])


def test_failed_write_keeps_the_old_file(tmp_path):
    (tmp_path / "f").write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "f") as file:
        file.write(b"new")
        raise RuntimeError
    assert (tmp_path / "f").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_scan_agrees_with_tarfile(tmp_path, format):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=format) as tar:
        for i in range(6):
            folder = tarfile.TarInfo(f"dir{i}/" + "long" * 30)  # its record must not name the next file
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            stem = f"dir{i}/" + ("long" * 30 + "/" if i % 2 else "") + f"schlüssel{i}"
            for extension in ("jpg", "cap.txt", "JSON")[: 1 + i % 3]:
                info = tarfile.TarInfo(f"{stem}.{extension}")
                content = f"{stem} {extension} ".encode() * (i * 50)
                info.size, info.mtime = len(content), 1.5 if format == tarfile.PAX_FORMAT else 1
                tar.addfile(info, io.BytesIO(content))
    index = scan_tar(path)
    found = {}
    for row in index.rows:
        for extension in index.extensions:
            offset, size, crc = row[extension].tolist()
            if offset:
                content = path.read_bytes()[offset : offset + size]
                assert zlib.crc32(content) == crc
                found[row["__key__"].decode(), extension] = content
    expected = {}
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isfile():
                key, extension = webdataset.tariterators.base_plus_ext(member.name)
                expected[key, extension.lower()] = tar.extractfile(member).read()
    assert found == expected and len(found) == 12


def test_split_name_is_webdatasets_rule():
    for name in ("a.txt", "a/b.c.d", "a.b/c.d", "noext", "a.b/c", "ä/ü.JPG"):
        key, extension = webdataset.tariterators.base_plus_ext(name)
        assert split_name(name) == (key, extension.lower() if extension else "")


def damage(path, kind):
    content = bytearray(path.read_bytes())
    rows = scan_tar(path).rows
    header = int(rows["npy"]["offset"][5]) - 512
    if kind == "cut between members":
        del content[header:]
    elif kind == "cut inside a member":
        del content[header + 612 :]
    elif kind == "cut inside a member, whole blocks":
        del content[header + 512 :]
    elif kind == "random header":
        content[header : header + 512] = np.random.default_rng(1).bytes(512)
    elif kind == "zeroed header":
        content[header : header + 512] = bytes(512)
    elif kind == "one bit in a name":
        content[header] ^= 1
    elif kind == "one bit in a size":
        content[header + 130] ^= 1
    elif kind == "no end":
        content = content[: int(rows["json"]["offset"][-1]) + 512]
    path.write_bytes(content)


KINDS = [
    "cut between members",
    "cut inside a member",
    "cut inside a member, whole blocks",
    "random header",
    "zeroed header",
    "one bit in a name",
    "one bit in a size",
    "no end",
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_damage_is_found(tmp_path, kind):
    path = tmp_path / "a.tar"
    write_shard(path, samples())
    damage(path, kind)
    with pytest.raises(DamagedTar, match="a.tar: damaged tar at byte"):
        scan_tar(path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE])
def test_what_is_no_file_is_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("link.jpg")
        info.type, info.linkname = kind, "x.jpg"
        tar.addfile(info)
    with pytest.raises(DamagedTar, match="only files and folders are read, not member 'link.jpg'"):
        scan_tar(tmp_path / "a.tar")


def block(kind, name, content, size=None):
    """A member by hand, its size in base 256; `size` is what the header says instead of the truth."""
    header = bytearray(512)
    header[: len(name)], header[148:156], header[156:157] = name, b" " * 8, kind
    header[124:136] = b"\x80" + (len(content) if size is None else size).to_bytes(11, "big")
    header[257:263] = b"ustar\0"
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header) + content + bytes(-len(content) % 512)


def test_sizes_in_base_256_and_in_pax_records(tmp_path):
    parts = [
        block(b"0", b"k.jpg", b"picture"),
        block(b"x", b"record", b"9 size=5\n"),
        block(b"0", b"k.txt", b"hello", size=0),
        block(b"0", b"k.json", b"{}"),
        bytes(1024),
    ]
    (tmp_path / "a.tar").write_bytes(b"".join(parts))
    (row,) = scan_tar(tmp_path / "a.tar").rows
    found = {name: row[name].tolist()[1:] for name in row.dtype.names[1:]}
    assert found == {
        "jpg": (7, zlib.crc32(b"picture")),
        "txt": (5, zlib.crc32(b"hello")),
        "json": (2, zlib.crc32(b"{}")),
    }
    parts[1] = block(b"x", b"record", b"9 size=x\n")
    (tmp_path / "a.tar").write_bytes(b"".join(parts))
    with pytest.raises(DamagedTar, match="corrupt PAX record"):
        scan_tar(tmp_path / "a.tar")


def test_an_index_that_cannot_be_kept_is_no_obstacle(tmp_path, monkeypatch, caplog):
    write_shard(tmp_path / "a.tar", samples())
    monkeypatch.setattr("nitro_e.data.index.index_path", lambda path: Path("/proc/nowhere/a.npy"))
    assert len(shard_index(tmp_path / "a.tar").rows) == 10 and "set NITRO_E_CACHE" in caplog.text


def test_duplicate_members_are_reported(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in (("k.txt", b"one"), ("k.jpg", b"x"), ("k.txt", b"two"), ("readme", b"")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    index = scan_tar(path)
    assert [str(problem) for problem in index.problems] == [
        "a.tar:k: duplicate member 'txt'; the first one is used",
        "a.tar:readme: member name has no extension; it is not read",
    ]
    offset, size, _ = index.rows["txt"][0].tolist()
    assert path.read_bytes()[offset : offset + size] == b"one"


def test_odd_member_names_are_reported_and_kept_in_the_index(tmp_path):
    path, odd = tmp_path / "a.tar", os.fsdecode(b"caf\xe9")
    names = [
        "k.txt",
        "picture.",
        "no\next",
        odd,
        f"{odd}.txt",
        f"{odd}.txt",
        "line\nbreak.txt",
        "line\nbreak.txt",
    ]
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name))
    scanned, stored = shard_index(path), shard_index(path)
    assert stored.problems == scanned.problems and stored.digest() == scanned.digest()
    found = {(problem.key, problem.reason.split(";")[0]) for problem in stored.problems}
    twice, without = "duplicate member 'txt'", "member name has no extension"
    assert found == {("caf\ufffd", twice), ("line\nbreak", twice)} | {
        (name, without) for name in ("picture.", "no\next", "caf\ufffd")
    }
    assert scanned.rows["__key__"].tolist() == [b"k", b"caf\xe9", b"line\nbreak"]


def test_an_index_with_problems_of_an_earlier_version_is_read(tmp_path):
    write_shard(tmp_path / "a.tar", samples())
    shard_index(tmp_path / "a.tar")
    stored = tmp_path / ".index/a.tar.npy"
    with open(stored, "rb") as file:
        rows, lines = np.load(file), np.load(file)
    with open(stored, "wb") as file:
        np.save(file, rows)
        np.save(file, np.frombuffer(lines.tobytes() + b"\nkey\tits reason", np.uint8))
    assert shard_index(tmp_path / "a.tar").problems == (Problem("a.tar", "key", "its reason"),)


def test_dots_in_keys_are_explained(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(40):
            tar.addfile(tarfile.TarInfo(f"img.v2_{i}.jpg"))
    with pytest.raises(ConfigError, match="must not contain dots"):
        scan_tar(path)


def test_stored_index_is_equal_and_notices_another_length(tmp_path, monkeypatch):
    path = tmp_path / "a.tar"
    write_shard(path, samples())
    fresh = shard_index(path)
    stored = shard_index(path)
    assert (tmp_path / ".index" / "a.tar.npy").is_file()
    assert stored.rows.dtype == fresh.rows.dtype and (stored.rows == fresh.rows).all()
    assert stored.digest() == fresh.digest()
    with open(path, "ab") as file:
        file.write(bytes(10240))
    with pytest.raises(DamagedTar, match="cut short or replaced"):
        shard_index(path)
    assert len(shard_index(path, force=True).rows) == 10


def test_rewriting_a_shard_drops_its_index(tmp_path):
    path = tmp_path / "a.tar"
    write_shard(path, samples())
    before = shard_index(path).digest()
    write_shard(path, samples(prefix="t"))
    assert shard_index(path).digest() != before


def test_index_of_a_read_only_folder_goes_to_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NITRO_E_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "data" / "a.tar"
    write_shard(path, samples())
    path.parent.chmod(0o555)
    shard_index(path)
    path.parent.chmod(0o755)
    assert [p.name for p in path.parent.iterdir()] == ["a.tar"]
    assert len(list((tmp_path / "cache" / "index").glob("*-a.tar.npy"))) == 1


@pytest.mark.parametrize(
    "content, words",
    [
        (gzip.compress(bytes(4000), mtime=0), "is compressed with gzip; gunzip it"),
        (b"PK\x03\x04" + bytes(2000), "is a zip archive"),
        (b"\n<!DOCTYPE html><html>", "is a web page, not a tar; download it again"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
    ],
)
def test_what_is_often_taken_for_a_tar_is_named(tmp_path, content, words):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DamagedTar, match=f"a.tar: {words}"):
        scan_tar(tmp_path / "a.tar")
