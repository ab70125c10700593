"""Rewards in another process, on another GPU or machine: the client, and the server that `nitro-e reward-server` runs.

    GET  /rewards   {"rewards": {TITLE: SOURCE}} as JSON
    POST /score     safetensors: `images` (B, H, W, 3) bytes, and `request`, the bytes of a JSON object with `reward`,
                    `prompts` and `info`; the answer is safetensors with `scores` (B,) float32, NaN where there is none

Images are rounded to 8 bits before any reward sees them, so a score is the same to the bit wherever it is computed.
Nothing is unpickled. There is no password: listen on addresses that only trusted machines reach.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from nitro_e.config import ConfigError, did_you_mean, parse_json
from nitro_e.interfaces import as_prompts

MAX_BYTES = 1 << 30  # of a request
BINARY = "application/octet-stream"

log = logging.getLogger(__name__)


class RemoteReward:
    """Asks a reward server. `url`: http://HOST:PORT; `reward`: its title there, None = the only one; `timeout`: seconds."""

    def __init__(self, url: str, reward: str | None = None, timeout: float = 300.0) -> None:
        self.url, self.timeout = url.rstrip("/"), timeout
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"reward 'remote': options.url '{url}': write http://HOST:PORT")
        # no proxies: a server of rewards stands beside the training
        self.open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        try:
            answer = parse_json(self._ask("/rewards").decode(), f"the answer of {self.url}")
        except OSError as error:
            raise ConfigError(
                f"reward 'remote': options.url {self.url} does not answer ({error}); start it: nitro-e reward-server"
            ) from error
        offered: dict[str, str] = answer["rewards"]
        if reward is None and len(offered) == 1:
            reward = next(iter(offered))
        if reward not in offered:
            raise ConfigError(
                f"reward 'remote': options.reward: {self.url} has no '{reward}'"
                + did_you_mean(str(reward), list(offered))
            )
        self.reward = reward
        self.source = f"{self.url} {reward} {offered[reward]}".strip()

    def __call__(self, pixels: Tensor, prompts: Sequence[str], info: Sequence[dict]) -> Tensor:
        images = (
            ((pixels / 2 + 0.5) * 255).round().byte().permute(0, 2, 3, 1).contiguous().cpu()
        )  # (B, H, W, 3)
        request = {"reward": self.reward, "prompts": list(prompts), "info": list(info)}
        text = torch.frombuffer(bytearray(json.dumps(request).encode()), dtype=torch.uint8)
        return load(self._ask("/score", save({"images": images, "request": text})))["scores"]

    def _ask(self, path: str, body: bytes | None = None) -> bytes:
        request = urllib.request.Request(self.url + path, body, {"Content-Type": BINARY})
        try:
            with self.open(request, timeout=self.timeout) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise OSError(f"{error.code}: {error.read(500).decode(errors='replace').strip()}") from None


class RewardServer(ThreadingHTTPServer):
    """Scores for several clients, one request at a time."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], scorers: dict[str, Any]) -> None:
        """scorers: title -> a loaded Scorer with this reward alone."""
        super().__init__(address, Handler)
        self.scorers = scorers
        self.turn = threading.Lock()

    def score(self, body: bytes) -> bytes:
        """Answer a request; ConfigError if it is none."""
        try:
            tensors = load(body)
            images, text = tensors["images"], tensors["request"].numpy().tobytes().decode()
        except (SafetensorError, KeyError, UnicodeDecodeError) as error:
            raise ConfigError(f"the body is no request: {type(error).__name__}: {error}") from None
        request = parse_json(text, "request")
        if not isinstance(request, dict) or not {"reward", "prompts", "info"} <= request.keys():
            raise ConfigError("request: expected reward, prompts and info")
        if request["reward"] not in self.scorers:
            raise ConfigError(
                f"no reward '{request['reward']}'" + did_you_mean(str(request["reward"]), list(self.scorers))
            )
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3 or not images.numel():
            raise ConfigError(
                f"images: expected (B, H, W, 3) bytes, got {images.dtype} {tuple(images.shape)}"
            )
        prompts, info = as_prompts(request["prompts"]), request["info"]
        if not isinstance(info, list) or not len(images) == len(prompts) == len(info):
            raise ConfigError(f"{len(images)} images need as many prompts and records of info")
        pixels = images.permute(0, 3, 1, 2).contiguous().float() / 255 * 2 - 1
        with self.turn:
            values = self.scorers[request["reward"]](pixels, prompts, info).values[:, 0]
        return save({"scores": values.float().cpu().contiguous()})


class Handler(BaseHTTPRequestHandler):
    """Speaks HTTP for a RewardServer."""

    server: RewardServer
    protocol_version = "HTTP/1.1"
    timeout = 600  # seconds that a silent client may hold a connection

    def do_GET(self) -> None:
        if self.path != "/rewards":
            return self._answer(404, b"there are GET /rewards and POST /score\n")
        sources = {title: scorer.sources().get(title, "") for title, scorer in self.server.scorers.items()}
        self._answer(200, json.dumps({"rewards": sources}).encode(), "application/json")

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if self.path != "/score" or self.headers.get("Content-Type") != BINARY:
            return self._refuse(404, f"POST /score takes {BINARY}")
        if not length.isdecimal() or int(length) > MAX_BYTES:
            return self._refuse(
                413, f"Content-Length: at most {MAX_BYTES} bytes; send fewer images at a time"
            )
        body = self.rfile.read(int(length))
        try:
            self._answer(200, self.server.score(body))
        except ConfigError as error:
            self._answer(400, f"{error}\n".encode())
        except Exception as error:  # a reward may be anybody's code; the client is told, and tries again
            log.exception("a request failed")
            self._answer(500, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}\n".encode())

    def _refuse(self, code: int, reason: str) -> None:
        """Answer without having read the body, which ends the connection."""
        self.close_connection = True
        self._answer(code, f"{reason}\n".encode())

    def _answer(self, code: int, body: bytes, kind: str = BINARY) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind if code == 200 else "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Keep quiet: a line per request says nothing."""


NEVER = sys.maxsize  # failures after which a server would give up
