"""What the page does, without the page: the bounds of its fields, the weights it offers, and drawing with times."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from PIL import Image

from nitro_e.config import Config, ConfigError, Ge, Le, check_characters, did_you_mean, from_dict
from nitro_e.record.run_folder import NAMED, latest
from nitro_e.sampling.pipeline import TextToImage

MAX_PROMPT = 1000  # characters
MAX_STEPS = 100
MAX_GUIDANCE = 20
MAX_IMAGES = 16
MAX_SIDE = 2048  # pixels
MAX_SIZES = 16  # offered; others can be typed
# JavaScript's largest exact whole number, less the images that count up from it
MAX_SEED = 2**53 - MAX_IMAGES
COMPARED = (20, 4, 1)  # steps

OnStep = Callable[[int, int], None]  # (steps done, steps in all); what it raises ends the drawing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request(Config):
    """The fields of the page when a button is pressed, within bounds whatever a browser sends."""

    prompt: str
    negative_prompt: str
    steps: Annotated[int, Ge(1), Le(MAX_STEPS)]
    guidance_scale: Annotated[float, Ge(0), Le(MAX_GUIDANCE)]
    seed: Annotated[int, Ge(0), Le(MAX_SEED)]  # of the first image; the next ones count up
    images: Annotated[int, Ge(1), Le(MAX_IMAGES)]
    size: str  # "HEIGHTxWIDTH" in pixels

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("prompt", "negative_prompt"):
            text = check_characters(getattr(self, key), key)
            if len(text) > MAX_PROMPT:
                raise ConfigError(f"{key} has {len(text)} characters; at most {MAX_PROMPT} are read")
        if not self.prompt.strip():
            raise ConfigError("prompt is empty; write what to draw")
        if max(self.height_width) > MAX_SIDE:
            raise ConfigError(f"size '{self.size}': at most {MAX_SIDE} px per side")

    @classmethod
    def of(cls, **fields: Any) -> Request:
        """Make a request of what a browser sent; ConfigError for a field that is empty or of a wrong kind."""
        for name, value in fields.items():
            if value is None:
                raise ConfigError(f"{name.replace('_', ' ')} is empty; give a value")
        return from_dict(cls, fields, "")

    @property
    def height_width(self) -> tuple[int, int]:
        """The size in pixels."""
        sides = self.size.split("x")
        if len(sides) != 2 or not all(side.strip().isdecimal() and len(side) < 8 for side in sides):
            raise ConfigError(f"size '{self.size}': give height x width in pixels, as in 64x64")
        return int(sides[0]), int(sides[1])

    @property
    def seeds(self) -> list[int]:
        return list(range(self.seed, self.seed + self.images))


class Shelf:
    """The weights that a page offers, by the names they were given on the command line; one of them is in memory."""

    def __init__(self, sources: Sequence[str], load: Callable[[str], TextToImage]) -> None:
        self.sources, self._load = list(dict.fromkeys(sources)), load
        self._name: str | None = None
        self._pipeline: TextToImage | None = None
        self._lock = threading.Lock()
        self.closed = threading.Event()

    @contextlib.contextmanager
    def use(self, name: str) -> Iterator[TextToImage]:
        """Lend the pipeline of these weights to one user at a time; other weights leave memory before it is loaded."""
        if name not in self.sources:
            raise ConfigError(f"weights '{name}' are not offered here{did_you_mean(str(name), self.sources)}")
        with self._lock:
            if self._pipeline is None or self._name != name:
                self._pipeline = None
                self._pipeline, self._name = self._load(name), name
            yield self._pipeline

    def close(self) -> None:
        """Tell who draws to end (`closed`), wait for that, and lend nothing any more.

        A process that ends while torch computes in another thread is aborted.
        """
        self.closed.set()
        self._lock.acquire()


def found_weights(runs: Path) -> list[str]:
    """List the shipped weights, and the runs in a folder that have a complete checkpoint, the newest first."""
    checkpoints = {str(run): latest(run) for run in runs.glob("*/")}
    written = {
        name: (checkpoint / "meta.json").stat().st_mtime
        for name, checkpoint in checkpoints.items()
        if checkpoint is not None
    }
    return [*NAMED, *sorted(written, key=lambda name: -written[name])]


class Drawn(NamedTuple):
    images: list[Image.Image]  # each carries its prompt and settings, for the text entries of its PNG
    seconds: float
    words: str  # weights, settings, seeds and time in one line


def draw(
    pipeline: TextToImage, name: str, request: Request, on_step: OnStep, force: bool | None = None
) -> Drawn:
    """Draw the images of a request. force: with distilled weights, also in counts that they were not trained for."""
    height, width = request.height_width
    settings = pipeline.settings(
        steps=request.steps, guidance_scale=request.guidance_scale, height=height, width=width, force=force
    )
    # large images in smaller batches: as many pixels at a time as 16 images of 512x512
    batch = max(1, min(request.images, MAX_IMAGES * 512**2 // (height * width)))
    total, done = request.steps * -(-request.images // batch), 0

    def stepped(_: TextToImage, step: int, t: float, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal done
        done += 1
        on_step(done, total)
        return tensors

    start = time.perf_counter()
    images = pipeline(
        request.prompt,
        negative_prompt=request.negative_prompt,
        num_images_per_prompt=request.images,
        seeds=request.seeds,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        height=height,
        width=width,
        force=force,
        batch_size=batch,
        callback_on_step_end=stepped,
    ).images
    seconds = time.perf_counter() - start
    details = {**dataclasses.asdict(settings), "negative_prompt": request.negative_prompt, "model": name}
    for image, seed in zip(images, request.seeds):
        image.info.update(prompt=request.prompt, settings=json.dumps({**details, "seed": seed}))
    first, last = request.seeds[0], request.seeds[-1]
    seeds = f"seed {first}" if first == last else f"seeds {first} to {last}"
    each = f", {seconds / len(images):.2f} s per image" if len(images) > 1 else ""
    return Drawn(images, seconds, f"{name}: {settings.in_words()}, {seeds}; drawn in {seconds:.2f} s{each}")


def sizes(pipeline: TextToImage) -> list[str]:
    """List sizes in pixels that the weights can draw, as HEIGHTxWIDTH, their own first."""
    return [f"{height}x{width}" for height, width in pipeline.sizes()[:MAX_SIZES]]


def draws_shapes(pipeline: TextToImage) -> bool:
    """Tell whether weights were trained on the offline domain, whose prompts are a small language of their own."""
    return pipeline.use is not None and pipeline.use.text.name.startswith("shapes")
