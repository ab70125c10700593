"""Templates to pages: a page is one HTML file with everything inline, so it can be mailed or archived as it is."""

from __future__ import annotations

import base64
import datetime
import io
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from nitro_e.files import write_text

MAX_BYTES, MAX_SIDE = 300_000, 2048  # of an image embedded as PNG; a larger one becomes a JPEG


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Write what a template of `templates/` makes of the values; an earlier file is replaced in one step."""
    write_text(path, TEMPLATES.get_template(template).render(**values))
    return path


def data_url(image: Image.Image, max_side: int = MAX_SIDE) -> str:
    """An image as the `src` of an HTML element: PNG, or JPEG of at most `max_side` pixels if it is larger."""
    buffer, kind = io.BytesIO(), "png"
    image.save(buffer, "PNG")
    if buffer.tell() > MAX_BYTES or max(image.size) > max_side:
        buffer, kind = io.BytesIO(), "jpeg"
        image = image.convert("RGB")
        image.thumbnail((max_side, max_side))
        image.save(buffer, "JPEG", quality=88)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def number(value: float | None) -> str:
    """Four digits at most, with k, M and G for large numbers; a dash for what is unknown."""
    if value is None or value != value:
        return "–"
    if value == 0:
        return "0"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or (unit != "k" and abs(value) >= size):
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def known(value: Any) -> str:
    """The value, or a dash for what is unknown."""
    return "–" if value is None else str(value)


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def duration(seconds: float) -> str:
    """The two largest units of a time: "1 d 2 h", "3 h 04 min", "5 min 06 s", "7 s"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def moment(seconds: float) -> str:
    """Seconds since 1970 as a date and a time."""
    return f"{datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc):%Y-%m-%d %H:%M} UTC"


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters.update(
    duration=duration, known=known, moment=moment, number=number, percent=percent, thousands="{:,}".format
)
