"""Line charts as inline SVG text: no library, no script, readable at any zoom. Hovering shows the values of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")
WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 10, 38
MAX_POINTS, HOVERS = 400, 80


class Series(NamedTuple):
    name: str
    points: list[tuple[float, float]]  # (step, value), by step; values may be non-finite


class Scale(NamedTuple):
    """From data to pixels along one axis."""

    low: float
    high: float
    start: float  # pixel of low
    end: float  # pixel of high
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, self.low / 10))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        if not self.log:
            return nice_ticks(self.low, self.high)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        steps = (1, 2, 5) if self.high / self.low < 200 else (1,)
        return [m * 10.0**e for e in decades for m in steps if self.low <= m * 10.0**e <= self.high]


def line_chart(
    title: str, series: Sequence[Series], *, smooth: bool = True, log: bool = True, x_label: str = "step"
) -> str:
    """A figure. Thin lines are the values, thick ones their running mean (if `smooth` and there are enough of them).

    log: the value axis may be logarithmic, which it is over a wide positive range.
    """
    finite = [Series(s.name, [point for point in s.points if math.isfinite(point[1])]) for s in series]
    broken = sum(len(s.points) for s in series) - sum(len(s.points) for s in finite)
    finite = [(COLOURS[i % len(COLOURS)], s) for i, s in enumerate(finite) if s.points]
    if not finite:
        return figure(title, '<p class="missing">no finite value</p>', "")
    x, y = x_scale(finite), y_scale([value for _, s in finite for _, value in s.points], log)
    parts = [grid(x, y, x_label)]
    for colour, s in finite:
        mean = running_mean(s.points) if smooth else []
        parts.append(path(s.points, x, y, colour, thin=bool(mean)))
        if mean:
            parts.append(path(mean, x, y, colour, thin=False))
    parts.append(hovers(finite, x))
    legend = " ".join(
        f'<span><i style="background:{colour}"></i>{escape(s.name)}</span>' for colour, s in finite
    )
    notes = [f"{broken} values not finite"] if broken else []
    notes += ["logarithmic"] if y.log else []
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )
    return figure(title, svg, legend if len(series) > 1 else "", ", ".join(notes))


def figure(title: str, body: str, legend: str, note: str = "") -> str:
    note = f" <small>{escape(note)}</small>" if note else ""
    legend = f'<div class="legend">{legend}</div>' if legend else ""
    return f'<figure class="chart"><figcaption>{escape(title)}{note}</figcaption>{legend}{body}</figure>'


def x_scale(series: Sequence[tuple[str, Series]]) -> Scale:
    steps = [step for _, s in series for step, _ in s.points]
    low, high = min(steps), max(steps)
    return Scale(low, high if high > low else low + 1, LEFT, WIDTH - RIGHT)


def y_scale(values: list[float], log: bool) -> Scale:
    """Logarithmic over a wide positive range, if it may be; rare peaks far outside the rest are cut off."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    if log and low > 0 and high / low > 30:
        return Scale(low / 1.1, high * 1.1, HEIGHT - BOTTOM, TOP, log=True)
    usual = ordered[int(0.99 * (len(ordered) - 1))]
    if len(ordered) > 100 and high - low > 4 * (usual - low) > 0:
        high = usual
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return Scale(low - margin, high + margin, HEIGHT - BOTTOM, TOP)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step)
    return [i * step for i in range(first, math.floor(high / step) + 1)]


def number(value: float) -> str:
    """Four digits at most, with k and M for large numbers."""
    if value == 0:
        return "0"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or (unit != "k" and abs(value) >= size):
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def running_mean(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The mean over a window of about 5 % of the points around each, smaller at the steep start; nothing for few points."""
    if len(points) < 40:
        return []
    half, sums = max(len(points) // 40, 1), [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    mean = []
    for i, (step, _) in enumerate(points):
        low, high = i - min(half, i), min(i + min(half, i), len(points) - 1)
        mean.append((step, (sums[high + 1] - sums[low]) / (high + 1 - low)))
    return mean


def thin_out(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS points that keep the lowest and highest of every stretch."""
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(2 * len(points) / MAX_POINTS)
    kept = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return kept


def path(points: list[tuple[float, float]], x: Scale, y: Scale, colour: str, thin: bool) -> str:
    if len(points) == 1:
        return f'<circle cx="{x(points[0][0]):.1f}" cy="{y(points[0][1]):.1f}" r="3" fill="{colour}"/>'
    limit = lambda pixel: min(max(pixel, TOP), HEIGHT - BOTTOM)  # noqa: E731
    line = " ".join(f"{x(step):.1f},{limit(y(value)):.1f}" for step, value in thin_out(points))
    style = 'stroke-width="1" opacity="0.35"' if thin else 'stroke-width="1.8"'
    return f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-linejoin="round" {style}/>'


def grid(x: Scale, y: Scale, x_label: str) -> str:
    bottom, parts = HEIGHT - BOTTOM, []
    for tick in y.ticks():
        at = y(tick)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in x.ticks():
        parts.append(
            f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{bottom}" y2="{bottom + 4}" class="axis"/>'
        )
        parts.append(f'<text x="{x(tick):.1f}" y="{bottom + 17}" text-anchor="middle">{number(tick)}</text>')
    parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}" class="axis"/>')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>'
    )
    return "".join(parts)


def hovers(series: Sequence[tuple[str, Series]], x: Scale) -> str:
    """Invisible bands over the plot; a band's tooltip has the last value of every series in it."""
    width = (WIDTH - RIGHT - LEFT) / HOVERS
    texts: dict[int, dict[str, str]] = {}
    for _, s in series:
        for step, value in s.points:
            band = min(int((x(step) - LEFT) / width), HOVERS - 1)
            texts.setdefault(band, {})[s.name] = f"{s.name}: {value:.5g} at {step:g}"
    return "".join(
        f'<rect class="hover" x="{LEFT + band * width:.1f}" y="{TOP}" width="{width:.1f}" height="{HEIGHT - TOP - BOTTOM}">'
        f"<title>{escape(chr(10).join(lines.values()))}</title></rect>"
        for band, lines in sorted(texts.items())
    )
