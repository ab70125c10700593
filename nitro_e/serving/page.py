"""The page itself, of Gradio: fields, gallery, comparison. It loads nothing from other machines and takes no files."""

from __future__ import annotations

import contextlib
import dataclasses
import html
import os
import random
import re
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

# read when gradio is imported
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nitro_e.config import ConfigError
from nitro_e.record.environment import out_of_memory
from nitro_e.sampling.pipeline import TextToImage
from nitro_e.serving import drawing
from nitro_e.serving.drawing import COMPARED, Request, Shelf

# what a browser needs of the addresses that Gradio answers; the others (uploads, proxies, recordings, ...) are refused
PAGES = ("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt")
FOLDERS = ("/assets/", "/static/")
API = (
    "queue/",
    "run/",
    "call/",
    "file=",
    "heartbeat/",
    "startup-events",
    "info",
    "cancel",
    "reset",
    "theme.css",
    "app_id",
)
# bytes of one request; the fields at their bounds are 24 KB of JSON, which takes some 50 times its size when it is read
MAX_BODY = 2**17

PROMPTS = [
    "a photo of a red circle left of a blue square",
    "a photo of three green triangles",
    "a photo of a yellow star and a purple cross",
    "a photo of two orange circles",
]
# small images are enlarged by nearest neighbour, so that their pixels can be seen; files stay as they were drawn
CSS = """
.gradio-container {max-width: 1400px !important; margin: 0 auto}
#gallery .grid-wrap {max-height: none}
#gallery .grid-container {--least: 256px; grid-template-columns: repeat(auto-fill, minmax(min(var(--least), 100%), 1fr))}
#gallery .grid-container:has(> :nth-child(4):last-child) {--least: max(256px, 40%)}
.enlarged img {image-rendering: pixelated}
.compared img {width: 100% !important; height: auto !important; min-height: 256px; object-fit: contain !important}
.compared .image-frame {width: 100% !important}
"""


# Gradio fills it in where it is the default of an argument
PROGRESS = gr.Progress()


class Stopped(Exception):
    """Somebody pressed Stop."""


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Show on the page, as one readable line, what the user can mend; whatever else comes up is a bug."""
    try:
        yield
    except Stopped:
        gr.Info("Stopped", duration=3)
    except (ConfigError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not out_of_memory(error):
            raise
        raise gr.Error(html.escape(str(error)), duration=None, print_exception=False) from error


def build(shelf: Shelf, api: bool = False) -> gr.Blocks:
    """Make the page. The first weights are loaded for the fields' values. api: other programs may use it, too."""
    stopping: set[str | None] = set()  # sessions that want no more of what is being drawn for them
    first = shelf.sources[0]
    with shelf.use(first) as loaded:
        values = _fields(loaded)

    def watched(progress: gr.Progress, session: str | None) -> drawing.OnStep:
        stopping.discard(session)
        progress(0, desc="Loading")

        def on_step(done: int, total: int) -> None:
            if session in stopping or shelf.closed.is_set():
                raise Stopped
            progress((done, total), desc="Drawing", unit="steps")

        return on_step

    def choose(name: str) -> tuple[Any, ...]:
        with told(), shelf.use(name) as pipeline:
            return tuple(gr.update(**field) for field in _fields(pipeline))

    def draw(
        name: str,
        prompt: str,
        negative_prompt: str,
        steps: int,
        guidance_scale: float,
        seed: int,
        images: int,
        size: str,
        request: gr.Request,
        progress: gr.Progress = PROGRESS,
    ) -> tuple[Any, Any]:
        with told():
            wanted = Request.of(
                prompt=prompt,
                negative_prompt=negative_prompt,
                steps=steps,
                guidance_scale=guidance_scale,
                seed=seed,
                images=images,
                size=size,
            )
            on_step = watched(progress, request.session_hash)
            with shelf.use(name) as pipeline:
                drawn = drawing.draw(pipeline, name, wanted, on_step)
            return _gallery(drawn.images), _text(drawn.words)
        return gr.skip(), gr.skip()

    def compare(
        name: str,
        prompt: str,
        negative_prompt: str,
        guidance_scale: float,
        seed: int,
        size: str,
        request: gr.Request,
        progress: gr.Progress = PROGRESS,
    ) -> Iterator[list[Any]]:
        with told():
            wanted = Request.of(
                prompt=prompt,
                negative_prompt=negative_prompt,
                steps=1,
                guidance_scale=guidance_scale,
                seed=seed,
                images=1,
                size=size,
            )
            on_step = watched(progress, request.session_hash)
            done: list[drawing.Drawn] = []
            yield _columns(done)
            for steps in COMPARED:
                with shelf.use(name) as pipeline:
                    one = dataclasses.replace(wanted, steps=steps)
                    done.append(drawing.draw(pipeline, name, one, on_step, force=True))
                yield _columns(done)

    with gr.Blocks(title="Nitro-E", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown("# Nitro-E")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                name = gr.Dropdown(
                    shelf.sources, value=first, label="Weights", interactive=True, elem_id="weights"
                )
                prompt = gr.Textbox(
                    label="Prompt",
                    lines=2,
                    max_length=drawing.MAX_PROMPT,
                    placeholder="What to draw",
                    elem_id="prompt",
                )
                examples = gr.Dataset(
                    label="Examples", components=[prompt], samples=[[text] for text in PROMPTS], **values[3]
                )
                with gr.Accordion("Settings"):
                    negative = gr.Textbox(
                        label="Negative prompt", max_length=drawing.MAX_PROMPT, placeholder="What not to draw"
                    )
                    steps = gr.Slider(1, drawing.MAX_STEPS, step=1, label="Steps", **values[0])
                    guidance = gr.Slider(
                        0,
                        drawing.MAX_GUIDANCE,
                        step=0.1,
                        label="Guidance",
                        info="0 or 1: none, and the negative prompt has no effect",
                        **values[1],
                    )
                    images = gr.Slider(1, drawing.MAX_IMAGES, value=4, step=1, label="Images")
                    with gr.Row():
                        seed = gr.Number(
                            label="Seed",
                            info="of the first image",
                            value=0,
                            precision=0,
                            minimum=0,
                            maximum=drawing.MAX_SEED,
                            min_width=120,
                        )
                        size = gr.Dropdown(
                            label="Size",
                            info="height x width, pixels",
                            allow_custom_value=True,
                            min_width=120,
                            **values[2],
                        )
                    new_seed = gr.Button("Another seed", size="sm")
            with gr.Column(scale=5, min_width=320), gr.Tabs():
                with gr.Tab("Images"):
                    go, stop = _buttons("Draw", "draw")
                    gallery = gr.Gallery(
                        show_label=False,
                        format="png",
                        interactive=False,
                        height="auto",
                        object_fit="contain",
                        buttons=["download", "fullscreen"],
                        elem_id="gallery",
                    )
                    words = gr.Markdown(elem_id="words")
                with gr.Tab("20, 4 and 1 steps", elem_id="comparison"):
                    go_compare, stop_compare = _buttons("Draw the first image three times", "compare")
                    compared: list[Any] = []
                    with gr.Row():
                        for count in COMPARED:
                            with gr.Column(min_width=256):
                                gr.Markdown(f"{count} step" + "s" * (count != 1))
                                compared.append(_column(count))
                                compared.append(gr.Markdown())

        fields = [name, prompt, negative, steps, guidance, seed, images, size]
        # one drawing at a time, whoever asks
        alone: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model", "trigger_mode": "once"}
        hidden: dict[str, Any] = {"api_visibility": "private"}
        offered: dict[str, Any] = {"api_visibility": "public"} if api else hidden
        name.input(choose, name, [steps, guidance, size, examples], **alone, **hidden)
        examples.click(lambda row: row[0], examples, prompt, queue=False, **hidden)
        new_seed.click(lambda: random.randrange(2**32), None, seed, queue=False, **hidden)
        gr.on(
            [go.click, prompt.submit],
            draw,
            fields,
            [gallery, words],
            show_progress_on=gallery,
            api_name="draw",
            **alone,
            **offered,
        )
        go_compare.click(
            compare,
            [name, prompt, negative, guidance, seed, size],
            compared,
            show_progress_on=compared[::2],
            api_name="compare",
            **alone,
            **offered,
        )

        def halt(request: gr.Request) -> None:
            stopping.add(request.session_hash)

        gr.on([stop.click, stop_compare.click], halt, queue=False, **hidden)
        page.unload(halt)  # a closed tab
    page.queue(max_size=32, default_concurrency_limit=1, api_open=api)
    return page


def _fields(pipeline: TextToImage) -> list[dict[str, Any]]:
    """Say what steps, guidance, size and examples are with these weights, as arguments of the components."""
    defaults = pipeline.defaults
    trained = sorted(len(times) for times in defaults.sigmas)
    info = f"distilled for {' or '.join(map(str, trained))}" if trained else f"1 to {drawing.MAX_STEPS}"
    sizes = drawing.sizes(pipeline)
    return [
        {"value": defaults.steps, "info": info},
        {"value": defaults.guidance_scale},
        {"choices": sizes, "value": sizes[0]},
        {"visible": drawing.draws_shapes(pipeline)},
    ]


def _buttons(words: str, name: str) -> tuple[gr.Button, gr.Button]:
    with gr.Row():
        return gr.Button(words, variant="primary", scale=4, min_width=100, elem_id=name), gr.Button(
            "Stop", min_width=80, elem_id=f"{name}-stop"
        )


def _column(steps: int) -> gr.Image:
    return gr.Image(
        show_label=False,
        format="png",
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_id=f"steps-{steps}",
        elem_classes=["compared"],
    )


def _gallery(images: Sequence[Image.Image]) -> Any:
    return gr.update(value=list(images), elem_classes=_classes(images[0]))


def _columns(done: Sequence[drawing.Drawn]) -> list[Any]:
    """Image and words of each compared count of steps; empty where it is not drawn yet."""
    shown: list[Any] = []
    for drawn in done:
        image = drawn.images[0]
        shown += [gr.update(value=image, elem_classes=["compared", *_classes(image)]), _text(drawn.words)]
    return shown + [None, ""] * (len(COMPARED) - len(done))


def _classes(image: Image.Image) -> list[str]:
    return ["enlarged"] if image.width < 256 else []


def _text(words: str) -> str:
    """Escape what Markdown would read as markup."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$])", r"\\\1", words)


class OnlyThePage:
    """ASGI middleware that refuses what the page does not need: uploads, proxies and other addresses, and large bodies."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or _needed(scope["path"]):
            await self.app(scope, _bounded(receive), send)
        else:
            await PlainTextResponse("Not found", 404)(scope, receive, send)


def _bounded(receive: Receive) -> Receive:
    """Count the bytes of a request as they come, whatever its headers say; above MAX_BODY it is answered with 413."""
    received = 0

    async def counted() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > MAX_BODY:
            raise HTTPException(413, f"a request has at most {MAX_BODY} bytes")
        return message

    return counted


def _needed(path: str) -> bool:
    api = path.removeprefix("/gradio_api/")
    return path in PAGES or path.startswith(FOLDERS) or (api != path and api.startswith(API))


@contextlib.contextmanager
def running(shelf: Shelf, host: str, port: int, api: bool = False) -> Iterator[str]:
    """Serve the page in other threads; the value is its address."""
    # images that browsers fetch lie in a folder of their own, which goes with the server
    with tempfile.TemporaryDirectory(prefix="nitro-e-serve-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build(shelf, api)
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            inbrowser=False,
            prevent_thread_lock=True,
            quiet=True,
            show_error=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            footer_links=["api"] if api else [],
            allowed_paths=[],
            max_file_size=1,
            app_kwargs={"middleware": [Middleware(OnlyThePage)]},
            theme=gr.themes.Default(
                font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
            ),
            css=CSS,
        )
        try:
            yield f"http://{host}:{port}"
        finally:
            shelf.close()
            page.close(verbose=False)
