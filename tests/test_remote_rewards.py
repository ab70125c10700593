"""Rewards behind HTTP: the scores of here to the bit, and one line for whatever is wrong."""

import threading
import urllib.error
import urllib.request

import pytest
import torch
from safetensors.torch import save
from test_rewards import HERE, images, score

from nitro_e.config import ConfigError, from_dict
from nitro_e.rewards import RewardConfig, build_rewards
from nitro_e.rewards.remote import BINARY, NEVER, RewardServer

CONFIGS = [{"name": f"{HERE}:brightness", "label": "bright"}, {"name": f"{HERE}:failing", "options": {"every": 2}},
           {"name": f"{HERE}:counts_objects", "label": "counted"}]  # fmt: skip


@pytest.fixture(scope="module")
def url():
    configs = [from_dict(RewardConfig, each) for each in CONFIGS]
    scorers = {config.title: build_rewards([config], retries=0, max_failures=NEVER) for config in configs}
    with RewardServer(("127.0.0.1", 0), scorers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def remote(url, reward="bright", **keys):
    return build_rewards(
        [from_dict(RewardConfig, {"name": "remote", "options": {"url": url, "reward": reward}, **keys})]
    )


def test_scores_are_those_of_here(url):
    pixels, info = images(), [{"include": [{}] * number} for number in range(5)]
    here = build_rewards([from_dict(RewardConfig, CONFIGS[0])])
    assert torch.equal(score(remote(url, batch_size=2), pixels).values, score(here, pixels).values)
    assert score(remote(url, "counted"), pixels, info).values[:, 0].tolist() == [0, 1, 2, 3, 4]
    # the server's own failures and what its reward cannot score are NaN, never a number
    assert score(remote(url, "counted"), pixels).values.isnan().all()
    half = score(remote(url, f"{HERE}:failing", batch_size=1), pixels).values.isnan().sum()
    assert 2 <= half <= 3
    assert remote(url).sources() == {"remote": f"{url} bright"}


@pytest.mark.parametrize(
    "body, kind, path, code, message",
    [
        (b"x", BINARY, "/score", 400, "no request"),
        (b"x", "text/plain", "/score", 404, "takes application/octet-stream"),
        (b"x", BINARY, "/other", 404, "takes"),
        ({"images": torch.zeros(1, 4, 4, 3, dtype=torch.uint8)}, BINARY, "/score", 400, "KeyError"),
        ({"request": b"[]"}, BINARY, "/score", 400, "expected reward, prompts and info"),
        ({"request": b'{"reward": "brigt", "prompts": [], "info": []}'}, BINARY, "/score", 400, "did you mean 'bright'"),
        ({"request": b'{"reward": "bright", "prompts": "a", "info": [{}]}'}, BINARY, "/score", 400, "list of strings"),
        ({"request": b'{"reward": "bright", "prompts": ["a"], "info": []}'}, BINARY, "/score", 400, "as many"),
        ({"images": torch.zeros(1, 4, 4, 3)}, BINARY, "/score", 400, "expected (B, H, W, 3) bytes"),
    ],
)  # fmt: skip
def test_what_is_no_request_is_refused_in_one_line(url, body, kind, path, code, message):
    if isinstance(body, dict):
        body = {"images": torch.zeros(1, 4, 4, 3, dtype=torch.uint8), **body}
        text = body.pop("request", None) or (
            None if message == "KeyError" else b'{"reward": "bright", "prompts": [], "info": []}'
        )
        if text is not None:
            body["request"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        body = save(body)
    with pytest.raises(urllib.error.HTTPError) as found:
        urllib.request.urlopen(urllib.request.Request(url + path, body, {"Content-Type": kind}), timeout=30)
    said = found.value.read().decode()
    assert found.value.code == code and message in said and said.count("\n") == 1


def test_a_server_that_is_not_there_shows_before_training(url):
    with pytest.raises(ConfigError, match="does not answer .*; start it: nitro-e reward-server"):
        remote("http://127.0.0.1:9").load()
    with pytest.raises(ConfigError, match="has no 'brigt', did you mean 'bright'"):
        remote(url, "brigt").load()
    with pytest.raises(ConfigError, match="write http://HOST:PORT"):
        remote("localhost:80").load()


def test_too_long_a_request_is_refused_unread(url):
    import http.client

    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    connection.putrequest("POST", "/score")
    connection.putheader("Content-Type", BINARY)
    connection.putheader("Content-Length", str(1 << 40))
    connection.endheaders()
    answer = connection.getresponse()
    assert answer.status == 413 and b"fewer images" in answer.read()
