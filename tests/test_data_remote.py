"""Shards behind URLs: a real HTTP server on this machine, with its faults."""

import http.server
import multiprocessing
import os
import re
import shutil
import threading
import time
from itertools import islice

import numpy as np
import pytest
from data_samples import latent_samples

from nitro_e.config import ConfigError
from nitro_e.data import DataConfig, open_data
from nitro_e.data.index import shard_index
from nitro_e.data.making import write_shard
from nitro_e.data.remote import ShardCache

pytest.importorskip("aiohttp")


@pytest.fixture
def server(tmp_path):
    """Serves tmp_path/www; `faults[path]` is a list of status codes or "cut" to answer with first.

    `faults["HEAD " + path]` is that of the requests that ask for the length.
    """

    class Handler(http.server.SimpleHTTPRequestHandler):
        faults: dict = {}
        log: list = []
        sent: list = []  # bytes of each answer to a request of a range
        ranges = False  # whether it does ranges; Python's server does not

        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path / "www"))

        def do_GET(self):
            self.log.append(self.path)
            if wanted := self.ranges and re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
                return self.send_range(*map(int, wanted.groups()))
            fault = self.faults.get(self.path, [])
            if fault and (code := fault.pop(0)) == "cut":
                content = (tmp_path / "www" / self.path[1:]).read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
            elif fault or "code" in locals():
                self.send_error(code)
            else:
                super().do_GET()

        def do_HEAD(self):
            if fault := self.faults.get(f"HEAD {self.path}"):
                self.send_error(fault.pop(0))
            else:
                super().do_HEAD()

        def send_range(self, first, last):
            content = (tmp_path / "www" / self.path[1:]).read_bytes()[first : last + 1]
            self.sent.append(len(content))
            self.send_response(206)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    (tmp_path / "www").mkdir()
    instance = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=instance.serve_forever, daemon=True).start()
    instance.url, instance.handler = f"http://127.0.0.1:{instance.server_port}", Handler
    Handler.faults, Handler.log, Handler.sent = {}, [], []
    yield instance
    instance.shutdown()
    instance.server_close()


def test_training_from_urls_equals_training_from_files(tmp_path, server):
    for source in ("a", "b"):  # equal file names in two folders
        samples = [{**s, "txt": f"{source} {s['txt']}"} for s in latent_samples(12)]
        for part in range(2):
            write_shard(tmp_path / f"www/{source}/{part:03d}.tar", samples[part * 6 : part * 6 + 6])

    def batches(root, workers):
        shards = tuple(f"{root}/{source}/{{000..001}}.tar" for source in "ab")
        config = DataConfig(shards=shards, batch_size=6, workers=workers, cache=str(tmp_path / "cache"))
        data = open_data(config, need_pixels=False, seed=0, stage="s")
        stream = data.records()
        got = [(records.keys, records.prompts) for records in islice(stream, 8)]
        stream.close()
        return got, data.fingerprint()

    local = batches(tmp_path / "www", 0)
    for workers in (0, 2):
        assert batches(server.url, workers) == local
    # each once: everything else came from the cache
    assert sorted(path for path in server.handler.log if path.endswith(".tar")) == [
        f"/{source}/{part:03d}.tar" for source in "ab" for part in range(2)
    ]
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_an_index_beside_the_shard_is_used(tmp_path, server):
    write_shard(tmp_path / "www/a.tar", latent_samples(5))
    index = shard_index(tmp_path / "www/a.tar")
    found = shard_index(server.url + "/a.tar", cache=ShardCache(tmp_path / "cache"))
    assert found.digest() == index.digest() and "/a.tar" not in server.handler.log


@pytest.mark.parametrize("ranges", [True, False])
def test_of_a_large_remote_shard_only_the_headers_are_read(tmp_path, server, ranges, monkeypatch):
    """With ranges its index has the same places and no CRCs; a server without them sends the shard."""
    server.handler.ranges = ranges
    samples = [
        {"__key__": f"k{i}", "jpg": np.random.default_rng(i).bytes(300_000), "txt": f"caption {i}"}
        for i in range(20)
    ]
    write_shard(tmp_path / "www/a.tar", samples)
    index = shard_index(tmp_path / "www/a.tar")
    shutil.rmtree(tmp_path / "www/.index")
    cache = ShardCache(tmp_path / "cache")
    found = shard_index(server.url + "/a.tar", cache=cache)
    assert cache.path(server.url + "/a.tar").is_file() is not ranges
    assert found.nbytes == index.nbytes and (found.rows["__key__"] == index.rows["__key__"]).all()
    for name in ("jpg", "txt"):
        for part in ("offset", "size"):
            assert (found.rows[name][part] == index.rows[name][part]).all()
        assert found.rows[name]["crc"].any() is np.bool_(not ranges)
    if ranges:
        assert sum(server.handler.sent) < index.nbytes / 10 and len(server.handler.sent) < 25
        server.handler.log.clear()
        assert shard_index(server.url + "/a.tar", cache=cache).digest() == found.digest()
        assert not server.handler.log  # it is kept
        config = DataConfig(
            shards=(server.url + "/a.tar",), batch_size=20, workers=0, cache=str(tmp_path / "cache")
        )
        monkeypatch.setattr("nitro_e.data.dataset.decode_image", lambda content, size: len(content) // 2000)
        records = next(open_data(config, need_pixels=True, seed=0, stage="s").records())
        assert sorted(records.prompts) == sorted(f"caption {i}" for i in range(20)) and not records.bad
        assert (records.pixels == 150).all()


def test_the_digest_of_a_large_remote_shard_does_not_depend_on_the_cache(tmp_path, server):
    server.handler.ranges, url = True, server.url + "/a.tar"
    samples = [{"__key__": f"k{i}", "jpg": bytes([i]) * 1_000_000} for i in range(5)]
    write_shard(tmp_path / "www/a.tar", samples)
    headers, whole = ShardCache(tmp_path / "headers"), ShardCache(tmp_path / "whole")
    whole.fetch(url)  # before there is an index
    found = [shard_index(url, cache=cache) for cache in (headers, whole, headers, whole)]
    assert [bool(index.rows["jpg"]["crc"].any()) for index in found] == [False, True, False, True]
    assert len({index.digest() for index in found}) == 1
    samples[4]["__key__"] = "k5"
    write_shard(tmp_path / "www/a.tar", samples)
    assert shard_index(url, cache=ShardCache(tmp_path / "other")).digest() != found[0].digest()


def test_small_members_are_read_through_in_runs(tmp_path, server):
    server.handler.ranges = True
    samples = [{"__key__": f"k{i}", "npy": np.zeros(9000, np.float16)} for i in range(300)]
    write_shard(tmp_path / "www/a.tar", samples)
    assert len(shard_index(server.url + "/a.tar", cache=ShardCache(tmp_path / "cache")).rows) == 300
    assert len(server.handler.sent) < 10  # of 5.5 MB


def test_damage_of_a_remote_shard_is_found_by_its_headers(tmp_path, server):
    server.handler.ranges = True
    samples = [{"__key__": f"k{i}", "npy": np.zeros(500_000, np.float16)} for i in range(6)]
    write_shard(tmp_path / "www/a.tar", samples)
    content = (tmp_path / "www/a.tar").read_bytes()
    (tmp_path / "www/a.tar").write_bytes(content[: -(1 << 20) // 512 * 512])
    with pytest.raises(ConfigError, match="a.tar: damaged tar at byte .*cut inside member"):
        shard_index(server.url + "/a.tar", cache=ShardCache(tmp_path / "cache"))


def test_faults_are_retried(tmp_path, server):
    (tmp_path / "www/a.tar").write_bytes(b"x" * 100_000)
    server.handler.faults["/a.tar"] = [503, "cut", 500]
    cache = ShardCache(tmp_path / "cache", backoff=0.001)
    path = cache.fetch(server.url + "/a.tar")
    assert path.read_bytes() == b"x" * 100_000 and len(server.handler.log) == 4
    server.handler.faults["/b.tar"] = [503] * 10
    (tmp_path / "www/b.tar").write_bytes(b"y")
    with pytest.raises(ConfigError, match=r"/b.tar: cannot be read after 5 attempts"):
        cache.fetch(server.url + "/b.tar")
    with pytest.raises(ConfigError, match=r"/none.tar: cannot be read .*FileNotFound"):
        cache.fetch(server.url + "/none.tar")
    with pytest.raises(ConfigError, match=r"nothing://x/a.tar"):
        cache.fetch("nothing://x/a.tar")
    assert [path.name[65:] for path in (tmp_path / "cache").rglob("*-?.tar")] == ["a.tar"]


def test_a_busy_server_is_not_taken_for_a_missing_file(tmp_path, server):
    cache, url = ShardCache(tmp_path / "cache", backoff=0.001), server.url + "/a.tar"
    write_shard(tmp_path / "www/a.tar", latent_samples(5))
    for name in ("/a.tar", "/.index/a.tar.npy"):
        server.handler.faults |= {name: [503, 429], f"HEAD {name}": [503, 429]}
    index = shard_index(tmp_path / "www/a.tar")
    assert shard_index(url, cache=cache).digest() == index.digest()  # by the index beside it
    assert cache.fetch(url).read_bytes() == (tmp_path / "www/a.tar").read_bytes()
    server.handler.log.clear()
    server.handler.faults |= {"/b.tar": [503] * 9, "HEAD /b.tar": [503] * 9}
    with pytest.raises(ConfigError, match="/b.tar: cannot be read after 5 attempts .*503"):
        cache.fetch(server.url + "/b.tar")
    assert server.handler.log == ["/b.tar"] * 5
    with pytest.raises(ConfigError, match="/none.tar: cannot be read .FileNotFound"):
        cache.fetch(server.url + "/none.tar")
    assert server.handler.log[5:] == ["/none.tar"] and cache.fetch_optional(server.url + "/none.tar") is None


def test_the_next_windows_are_fetched_in_order_before_they_are_read(tmp_path, server):
    for part in range(20):
        write_shard(
            tmp_path / f"www/{part:02d}.tar",
            [{**s, "__key__": f"k{part}_{i}"} for i, s in enumerate(latent_samples(4))],
        )
        shard_index(tmp_path / f"www/{part:02d}.tar")
    config = DataConfig(
        shards=(f"{server.url}/{{00..19}}.tar",), batch_size=4, workers=0, cache=str(tmp_path / "cache")
    )
    data = open_data(config, need_pixels=False, seed=0, stage="s")
    data.order.window = 3
    server.handler.log.clear()
    batches = data.records()
    next(batches)
    # read when data were opened
    wanted = {key.split(":")[0] for key in data.keys(range(4 + 2 * 3 * 4))} - {"00.tar"}
    deadline = time.monotonic() + 10
    while (got := {path[1:] for path in server.handler.log}) < wanted and time.monotonic() < deadline:
        time.sleep(0.01)
    assert got == wanted and len(server.handler.log) == len(got) and 5 <= len(got) <= 9
    batches.close()


def fetch(url, cache):
    ShardCache(cache).fetch(url)


def test_two_processes_download_once(tmp_path, server):
    (tmp_path / "www/a.tar").write_bytes(b"x" * 3_000_000)
    context = multiprocessing.get_context("fork")
    children = [
        context.Process(target=fetch, args=(server.url + "/a.tar", tmp_path / "cache")) for _ in range(3)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert server.handler.log == ["/a.tar"]


def test_least_recently_used_shards_are_deleted(tmp_path, server):
    for name in "abcd":
        (tmp_path / f"www/{name}").write_bytes(b"x" * 1000)
    cache = ShardCache(tmp_path / "cache", limit_bytes=3500)
    for age, name in enumerate("abcad"):
        os.utime(cache.fetch(f"{server.url}/{name}"), (age, age))
    (tmp_path / "www/e").write_bytes(b"x" * 1000)
    cache.fetch(f"{server.url}/e")
    left = [name for name in "abcde" if cache.path(f"{server.url}/{name}").is_file()]
    assert left == ["a", "d", "e"]


def test_patterns_over_memory_filesystem(tmp_path):
    import fsspec

    write_shard(tmp_path / "a-0.tar", latent_samples(5))
    memory = fsspec.filesystem("memory")
    memory.pipe("/data/a-0.tar", (tmp_path / "a-0.tar").read_bytes())
    memory.pipe("/data/a-1.tar", (tmp_path / "a-0.tar").read_bytes())
    (tmp_path / "list.txt").write_text("# shards\nmemory://data/a-*.tar\n")
    config = DataConfig(
        shards=(f"@{tmp_path / 'list.txt'}",), batch_size=10, workers=0, cache=str(tmp_path / "cache")
    )
    records = next(open_data(config, need_pixels=False, seed=0, stage="s").records())
    assert sorted(records.keys) == sorted(f"a-{part}.tar:s{i:03d}" for part in range(2) for i in range(5))
