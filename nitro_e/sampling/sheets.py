"""Several images on one sheet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont


def image_grid(images: Sequence[Image.Image], columns: int, gap: int = 2) -> Image.Image:
    """Images of one size, row by row, `gap` pixels apart on white."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * (width + gap), index // columns * (height + gap)))
    return sheet


def sheet(
    images: Sequence[Image.Image], prompts: Sequence[str], columns: int, least: int = 256
) -> Image.Image:
    """Images of one size with their prompts under them; small ones are enlarged to at least `least` px per cell."""
    factor = max(1, -(-least // images[0].width))
    width, height = images[0].width * factor, images[0].height * factor
    font = ImageFont.load_default(14)
    captions = [wrap(prompt, font, width - 8, lines=3) for prompt in prompts]
    below = 6 + 17 * max(caption.count("\n") + 1 for caption in captions)
    rows = -(-len(images) // columns)
    whole = Image.new("RGB", (columns * (width + 8) - 8, rows * (height + below) - 2), "white")
    draw = ImageDraw.Draw(whole)
    for index, (image, caption) in enumerate(zip(images, captions)):
        left, top = index % columns * (width + 8), index // columns * (height + below)
        whole.paste(image.resize((width, height), Image.Resampling.NEAREST), (left, top))
        draw.multiline_text((left + 4, top + height + 2), caption, fill="black", font=font, spacing=3)
    return whole


def wrap(text: str, font: Any, width: int, lines: int) -> str:
    """`text` in lines of at most `width` px; what does not fit into so many lines ends in an ellipsis."""
    rows = [""]
    for word in text.split():
        longer = f"{rows[-1]} {word}".strip()
        if rows[-1] and font.getlength(longer) > width:
            rows.append(word)
        else:
            rows[-1] = longer
    if len(rows) > lines:
        rows = [*rows[: lines - 1], rows[lines - 1] + " ..."]
    for index, row in enumerate(rows):
        while len(row) > 1 and font.getlength(row) > width:  # a word longer than the cell
            row = row[:-4].rstrip(".") + "..." if len(row) > 4 else row[:-1]
        rows[index] = row
    return "\n".join(rows)
