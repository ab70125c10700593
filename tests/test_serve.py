"""`nitro-e serve`: what is behind the page, what its server refuses, and the page itself in a real browser.

The screenshot in docs/serve.md comes from the slow test of the browser:

    SERVE_SCREENSHOT=docs/img/serve.png python -m pytest -m slow tests/test_serve.py -k browser
"""

import asyncio
import base64
import importlib.metadata
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from PIL import Image

from nitro_e.cli import serve as command
from nitro_e.config import ConfigError
from nitro_e.record.run_folder import NAMED
from nitro_e.sampling.pipeline import TextToImage
from nitro_e.serving import drawing
from nitro_e.serving.drawing import COMPARED, Request, Shelf

pytest.importorskip("gradio", reason="the page needs gradio")

ROOT = Path(__file__).parent.parent
PROMPT = "a photo of a red circle left of a blue square"
FIELDS = {
    "prompt": PROMPT,
    "negative_prompt": "",
    "steps": 3,
    "guidance_scale": 3.0,
    "seed": 5,
    "images": 2,
    "size": "64x64",
}


@pytest.fixture(scope="module")
def pipeline() -> TextToImage:
    return TextToImage.from_pretrained("shapes")


@pytest.fixture(scope="module")
def distilled(tmp_path_factory) -> Path:
    """The shipped weights with the settings of distilled ones."""
    folder = tmp_path_factory.mktemp("weights") / "distilled"
    shutil.copytree(NAMED["shapes"], folder)
    config = json.loads((folder / "config.json").read_text())
    times = {"sigmas": [[1.0, 0.75, 0.5, 0.25], [1.0, 0.5]], "steps": 4}
    config["use"]["sampling"].update(times, guidance_scale=0.0, sampler="multistep")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def same(image: Image.Image, expected: Image.Image) -> bool:
    return np.array_equal(np.asarray(image.convert("RGB")), np.asarray(expected))


# ---- behind the page


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": "x" * 1001}, "prompt has 1001 characters; at most 1000"),
        ({"prompt": 5}, "prompt: expected str"),
        ({"prompt": "\ud800"}, "is no character"),
        ({"negative_prompt": None}, "negative prompt is empty"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 101}, "steps must be at most 100, got 101"),
        ({"steps": 1.5}, "steps: expected int"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"guidance_scale": 21}, "guidance_scale must be at most 20"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"seed": 2**53}, "seed must be at most"),
        ({"seed": None}, "seed is empty; give a value"),
        ({"images": 17}, "images must be at most 16, got 17"),
        ({"size": "64"}, "size '64': give height x width"),
        ({"size": "64x-64"}, "size '64x-64': give height x width"),
        ({"size": "64x99999999999"}, "give height x width"),
        ({"size": "64x2049"}, "at most 2048 px per side"),
    ],
)
def test_every_field_has_bounds(wrong, message):
    with pytest.raises(ConfigError, match=message):
        Request.of(**{**FIELDS, **wrong})


def test_one_model_is_in_memory_and_lent_to_one():
    loaded = []

    def load(name):
        assert shelf._pipeline is None
        loaded.append(name)
        if name == "broken":
            raise ConfigError("broken")
        return name.upper()

    def take(name):
        with shelf.use(name) as pipeline:
            assert shelf._lock.locked()
            return pipeline

    shelf = Shelf(["a", "b", "broken", "a"], load)
    assert shelf.sources == ["a", "b", "broken"]
    assert [take(name) for name in "aaba"] == ["A", "A", "B", "A"]
    with pytest.raises(ConfigError, match="broken"):
        take("broken")
    assert take("b") == "B"
    assert loaded == ["a", "b", "a", "broken", "b"]
    for name in ("c", "../a", None):
        with pytest.raises(ConfigError, match="not offered here"):
            take(name)
    assert not shelf._lock.locked()


def test_runs_with_a_complete_checkpoint_are_found(tmp_path):
    for run, files, age in (("old", ["meta.json"], 9), ("new", ["meta.json"], 1), ("empty", [], 0)):
        folder = tmp_path / run / "checkpoints/step-0000002"
        folder.mkdir(parents=True)
        for name in files:
            (folder / name).write_text("{}")
            os.utime(folder / name, (time.time() - age, time.time() - age))
    assert drawing.found_weights(tmp_path) == [*NAMED, f"{tmp_path}/new", f"{tmp_path}/old"]
    assert drawing.found_weights(tmp_path / "none") == list(NAMED)


def test_images_are_those_of_the_pipeline(pipeline):
    counted = []
    drawn = drawing.draw(pipeline, "shapes", Request.of(**FIELDS), lambda *counts: counted.append(counts))
    expected = pipeline(PROMPT, num_images_per_prompt=2, seeds=[5, 6], num_inference_steps=3).images
    assert all(same(*pair) for pair in zip(drawn.images, expected, strict=True))
    assert counted == [(1, 3), (2, 3), (3, 3)]
    assert drawn.words.startswith("shapes: 3 steps of euler, guidance 3, 64x64 px, seeds 5 to 6; drawn in ")
    assert drawn.images[1].info["prompt"] == PROMPT
    assert json.loads(drawn.images[1].info["settings"])["seed"] == 6


def test_distilled_weights_draw_other_counts_only_where_they_are_compared(distilled):
    student = TextToImage.from_pretrained(distilled)
    request = Request.of(**FIELDS)
    with pytest.raises(ConfigError, match="distilled for 2 or 4 steps, not 3"):
        drawing.draw(student, "student", request, lambda *counts: None)
    drawn = drawing.draw(student, "student", request, lambda *counts: None, force=True)
    assert drawn.words.startswith("student: 3 steps of multistep")


def test_a_step_can_end_the_drawing(pipeline):
    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        drawing.draw(pipeline, "shapes", Request.of(**FIELDS), stop)


def test_fields_follow_the_weights(pipeline, distilled):
    from nitro_e.serving.page import _fields

    steps, guidance, size, examples = _fields(pipeline)
    assert (steps["value"], guidance["value"], size["value"], examples["visible"]) == (20, 3.0, "64x64", True)
    for offered in size["choices"]:
        sides = [int(side) for side in offered.split("x")]
        pipeline.latent_shape(*sides)
    steps, guidance, *_ = _fields(TextToImage.from_pretrained(distilled))
    assert (steps["value"], steps["info"], guidance["value"]) == (4, "distilled for 2 or 4", 0.0)


# ---- the server


@pytest.fixture(scope="module")
def url(pipeline) -> str:
    from nitro_e.serving.page import running

    def load(name: str) -> TextToImage:
        if name == "gone":
            raise ConfigError("'gone' <b>does</b> not exist")
        return pipeline

    with running(Shelf(["shapes", "gone"], load), "127.0.0.1", free_port(), api=True) as address:
        yield address


def answer(url: str, data: bytes | None = None, **headers: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=20) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def test_programs_get_the_same_images_and_messages(url, pipeline):
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    client = Client(url, verbose=False)
    gallery, words = client.predict("shapes", *FIELDS.values(), api_name="/draw")
    expected = pipeline(PROMPT, num_images_per_prompt=2, seeds=[5, 6], num_inference_steps=3).images
    drawn = [Image.open(item["image"]) for item in gallery["value"]]
    assert all(same(*pair) for pair in zip(drawn, expected, strict=True))
    assert json.loads(drawn[0].text["settings"])["seed"] == 5 and drawn[0].text["prompt"] == PROMPT
    assert "3 steps of euler, guidance 3, 64x64 px, seeds 5 to 6" in words
    compared = client.predict("shapes", PROMPT, "", 3.0, 5, "64x64", api_name="/compare")
    for shown, words, steps in zip(compared[::2], compared[1::2], COMPARED, strict=True):
        expected = pipeline(PROMPT, seeds=5, num_inference_steps=steps).images[0]
        assert same(Image.open(shown["value"]), expected) and f"{steps} step" in words
    for wrong, message in (
        ({"prompt": ""}, "prompt is empty; write what to draw"),
        ({"size": "63x64"}, "both sides must be multiples of 8"),
        ({"steps": 1000}, "100"),
        ({"images": 1000}, "16"),
        ({"seed": -1}, "0"),
    ):
        with pytest.raises(AppError, match=message):
            client.predict("shapes", *{**FIELDS, **wrong}.values(), api_name="/draw")
    for name in ("gone", "/etc", "somebody/model"):
        with pytest.raises(AppError) as caught:
            client.predict(name, *FIELDS.values(), api_name="/draw")
        assert "<b>" not in str(caught.value)


@pytest.mark.parametrize(
    "path",
    [
        "file=/etc/passwd",
        f"file={ROOT}/setup.py",
        "proxy=http://127.0.0.1/",
        "openapi.json",
        "upload_progress",
    ],
)
def test_no_files_and_no_other_addresses(url, path):
    assert answer(f"{url}/gradio_api/{path}") in (403, 404)


def test_no_uploads(url):
    form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\nabc\r\n--x--\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    for path in ("upload", "upload/", "process_recording"):
        assert answer(f"{url}/gradio_api/{path}", form, **headers) == 404
    assert answer(f"{url}/docs") == 404


def test_no_large_requests(url):
    """Refused before they are read as JSON; the prompts at their bounds pass."""
    from nitro_e.serving.page import MAX_BODY

    body = json.dumps({"data": ["\U0001f600" * 1000] * 2, "fn_index": 9999}).encode()
    headers = {"Content-Type": "application/json"}
    for path in ("queue/join", "run/predict"):
        assert answer(f"{url}/gradio_api/{path}", body, **headers) not in (404, 413)
        assert answer(f"{url}/gradio_api/{path}", body.ljust(MAX_BODY + 1), **headers) == 413


def test_requests_in_pieces_are_counted():
    """Without a content-length."""
    from starlette.exceptions import HTTPException

    from nitro_e.serving.page import MAX_BODY, OnlyThePage

    read = []

    async def piece() -> dict:
        return {"type": "http.request", "body": bytes(1024), "more_body": True}

    async def read_all(scope, receive, send) -> None:
        while True:
            read.append((await receive())["body"])

    scope = {"type": "http", "path": "/gradio_api/queue/join", "headers": []}
    with pytest.raises(HTTPException, match="413"):
        asyncio.run(OnlyThePage(read_all)(scope, piece, None))
    assert sum(map(len, read)) == MAX_BODY


def test_only_this_machine_reaches_it(url):
    port = int(url.rsplit(":", 1)[1])
    socket.create_connection(("127.0.0.1", port), timeout=5).close()
    others = ["127.0.0.2"]  # another address of the same machine
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outward:
        try:
            outward.connect(("192.0.2.1", 9))  # nothing is sent; it tells which address would be used
            others.append(outward.getsockname()[0])
        except OSError:  # no network
            pass
    for address in others:
        with pytest.raises(OSError):
            socket.create_connection((address, port), timeout=5).close()


def test_without_api_programs_find_nothing(pipeline):
    from nitro_e.serving.page import build

    shelf = Shelf(["shapes"], lambda name: pipeline)
    assert set(build(shelf, api=True).get_api_info()["named_endpoints"]) == {"/draw", "/compare"}
    assert not build(shelf).get_api_info()["named_endpoints"]


# ---- the command


def test_a_used_port_and_a_foreign_address_are_one_line(capsys):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        assert command.main(["--port", str(port)]) == 2
    said = capsys.readouterr().err
    assert (
        said
        == f"error: --host 127.0.0.1 --port {port}: Address already in use; choose another, as --port {port + 1}\n"
    )
    assert command.main(["--host", "192.0.2.1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_other_machines_are_let_in_with_a_warning_only(capsys, tmp_path):
    arguments = [str(tmp_path / "none"), "--port", str(free_port())]
    assert command.main([*arguments, "--host", "0.0.0.0"]) == 2
    warning, error = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: ") and "no password" in warning and "does not exist" in error
    assert command.main(arguments) == 2
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("found", [None, "5.50.0"])
def test_without_gradio_it_is_one_line(capsys, monkeypatch, found):
    def version(name):
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(command, "version", version)
    assert command.main([]) == 2
    said = capsys.readouterr().err
    assert said == f"error: the page needs gradio 6, found {found or 'none'}: pip install 'gradio>=6.0.1'\n"


# Writes every address that the process connects to, or asks a name server for, into a file.
AUDITED = """
import sys
def note(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        address = arguments[1] if event != "socket.getaddrinfo" else arguments[0]
        with open(sys.argv[-1], "a") as file:
            file.write(f"{event} {address[0] if isinstance(address, tuple) else address}\\n")
sys.addaudithook(note)
from nitro_e.cli import main
main(["serve", *sys.argv[1:-1]])
"""


@pytest.fixture
def process(tmp_path, distilled):
    """The command in a process of its own, serving the shipped and the distilled weights."""
    port = free_port()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    environment.pop("GRADIO_TEMP_DIR", None)
    arguments = ["shapes", str(distilled), "--port", str(port), str(tmp_path / "addresses")]
    with (tmp_path / "err").open("w") as errors:
        running = subprocess.Popen(
            [sys.executable, "-c", AUDITED, *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            cwd=tmp_path,
        )
    line = running.stdout.readline()
    assert line == f"shapes, {distilled}: http://127.0.0.1:{port} (Ctrl-C ends it)\n", (
        tmp_path / "err"
    ).read_text()
    running.url = f"http://127.0.0.1:{port}"
    yield running
    running.kill()
    running.wait()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_in_a_browser(process, pipeline, tmp_path):
    browser = Browser(tmp_path / "profile")
    try:
        look_at(browser, process.url, pipeline)
        # Ctrl-C in the middle of a drawing
        browser.write("input[aria-label='number input for Steps']", "100")
        browser.click("#draw")
        time.sleep(1)
        assert not browser.complaints
        asked = {
            url.split("/")[2] for url in browser.requests if not url.startswith(("data:", "blob:", "about:"))
        }
        assert asked == {process.url.removeprefix("http://")}
    finally:
        process.send_signal(signal.SIGINT)
        browser.close()
    assert process.wait(30) == 130
    said = (tmp_path / "err").read_text()
    assert (
        said.rstrip().endswith("interrupted; run the same command again to continue")
        and "Traceback" not in said
    )
    connected = set((tmp_path / "addresses").read_text().splitlines())
    assert {line.split()[1] for line in connected} <= {"127.0.0.1", "localhost", "None"}, connected


def visit(browser: Browser, url: str, *size: int, dark: bool = False) -> None:
    """Open the page and wait until it talks to its server."""
    before = len(browser.requests)
    browser.open(url, *size, dark=dark)
    browser.wait_for("document.querySelector('#draw')")
    while not any("/heartbeat/" in address for address in browser.requests[before:]):
        browser.evaluate("new Promise(done => setTimeout(done, 100))")


def look_at(browser: Browser, url: str, pipeline: TextToImage) -> None:
    visit(browser, url, 1280, 1130)
    browser.write("#prompt textarea", PROMPT)
    browser.click("#draw")
    check_images(browser, pipeline(PROMPT, num_images_per_prompt=4, seeds=0).images)
    browser.wait_for("document.querySelector('#words').innerText.includes('20 steps of euler, guidance 3')")
    if "SERVE_SCREENSHOT" in os.environ:
        browser.evaluate("document.activeElement.blur()")
        time.sleep(1)
        screenshot = Path(os.environ["SERVE_SCREENSHOT"])
        browser.screenshot(screenshot)
        Image.open(screenshot).convert("RGB").save(screenshot, optimize=True)

    # a message for a wrong field, and none of Python's
    browser.write("#prompt textarea", " ")
    browser.click("#draw")
    browser.wait_for("document.body.innerText.includes('prompt is empty; write what to draw')")

    # other weights: their settings in the fields
    browser.click("#weights input")
    browser.click("ul[role=listbox] li:nth-child(2)")
    browser.wait_for("document.body.innerText.includes('distilled for 2 or 4')")
    assert (
        browser.evaluate("document.querySelector('input[aria-label=\"number input for Steps\"]').value")
        == "4"
    )
    browser.click("#weights input")
    browser.click("ul[role=listbox] li:nth-child(1)")
    browser.wait_for("!document.body.innerText.includes('distilled for 2 or 4')")

    # a drawing that is not wanted any more
    browser.write("#prompt textarea", PROMPT)
    browser.write("input[aria-label='number input for Steps']", "100")
    browser.click("#draw")
    browser.wait_for("document.body.innerText.includes('Drawing')")
    browser.click("#draw-stop")
    browser.wait_for("document.body.innerText.includes('Stopped')")

    # a telephone: one column, nothing to scroll sideways; the second tab
    visit(browser, url, 390, 844, dark=True)
    assert browser.evaluate("document.documentElement.scrollWidth") == 390
    browser.write("#prompt textarea", PROMPT)
    browser.evaluate("document.querySelectorAll('button[role=tab]')[1].click()")
    browser.wait_for("document.querySelector('#compare')?.checkVisibility()")
    browser.click("#compare")
    browser.wait_for("document.querySelector('#steps-1 img')")
    expected = [pipeline(PROMPT, seeds=0, num_inference_steps=steps).images[0] for steps in COMPARED]
    check_images(browser, expected, ".compared img")
    browser.evaluate("document.querySelectorAll('button[role=tab]')[0].click()")
    browser.wait_for("document.querySelector('#draw').checkVisibility()")


def check_images(browser: Browser, expected: list[Image.Image], selector: str = "#gallery img") -> None:
    """Wait for so many images; their files must hold the expected pixels, and be shown large."""
    everything = f"[...document.querySelectorAll({json.dumps(selector)})]"
    browser.wait_for(f"{everything}.length == {len(expected)} && {everything}.every(e => e.naturalWidth)")
    for index, image in enumerate(expected):
        file = browser.evaluate(
            f"fetch({everything}[{index}].src).then(r => r.arrayBuffer())"
            ".then(b => btoa(String.fromCharCode(...new Uint8Array(b))))"
        )
        assert same(Image.open(io.BytesIO(base64.b64decode(file))), image)
    shown = browser.evaluate(
        f"{everything}.map(e => [e.getBoundingClientRect().width, getComputedStyle(e).imageRendering])"
    )
    assert all(width >= 256 and rendering == "pixelated" for width, rendering in shown), shown
