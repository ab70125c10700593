"""Line charts: from numbers to what `templates/chart.html` draws as inline SVG. Hovering shows the values of a step.

Our own SVG, because matplotlib's has no hover values and plotly brings a script of several megabytes into every page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")
MAX_POINTS, HOVERS = 400, 80

Points = list[tuple[float, float]]


class Area(NamedTuple):
    """Pixels of an image, and of the plot in it."""

    width: int = 560
    height: int = 250
    left: int = 62
    right: int = 546
    top: int = 10
    bottom: int = 212


AREA = Area()


class Series(NamedTuple):
    name: str
    points: Points  # (step, value), by step; values may be non-finite


class Line(NamedTuple):
    """A line in pixels; a thin one stands behind its running mean."""

    colour: str
    points: Points
    thin: bool


class Band(NamedTuple):
    """An upright stripe of the plot whose tooltip has the last value of every series in it."""

    left: float
    width: float
    text: str


@dataclass
class Chart:
    """Everything that the template draws; there are no lines if no value is finite."""

    area: ClassVar[Area] = AREA

    title: str
    notes: list[str] = field(default_factory=list)
    legend: list[tuple[str, str]] = field(default_factory=list)  # colour, name
    lines: list[Line] = field(default_factory=list)
    x_label: str = ""
    x_ticks: list[tuple[float, float]] = field(default_factory=list)  # pixel, value
    y_ticks: list[tuple[float, float]] = field(default_factory=list)
    hovers: list[Band] = field(default_factory=list)


class Scale(NamedTuple):
    """Maps data to pixels along one axis."""

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

    def ticks(self) -> list[tuple[float, float]]:
        """The pixel and the value of every tick."""
        return [(round(self(value), 1), value) for value in self.tick_values()]

    def tick_values(self) -> list[float]:
        if not self.log:
            return nice_ticks(self.low, self.high)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        steps = (1, 2, 5) if self.high / self.low < 200 else (1,)
        return [m * 10.0**e for e in decades for m in steps if self.low <= m * 10.0**e <= self.high]


def line_chart(
    title: str, series: Sequence[Series], *, smooth: bool = True, log: bool = True, x_label: str = "step"
) -> Chart:
    """Draw every series thin with its running mean thick, or thick alone where it is short or not to be smoothed.

    log: the value axis may be logarithmic, which it is over a wide positive range.
    """
    finite = [Series(s.name, [point for point in s.points if math.isfinite(point[1])]) for s in series]
    broken = sum(len(s.points) for s in series) - sum(len(s.points) for s in finite)
    coloured = [(COLOURS[i % len(COLOURS)], s) for i, s in enumerate(finite) if s.points]
    if not coloured:
        return Chart(title)
    x = x_scale([step for s in finite for step, _ in s.points])
    y = y_scale([value for s in finite for _, value in s.points], log)
    lines = []
    for colour, s in coloured:
        mean = running_mean(s.points) if smooth else []
        lines.append(Line(colour, in_pixels(s.points, x, y), thin=bool(mean)))
        if mean:
            lines.append(Line(colour, in_pixels(mean, x, y), thin=False))
    return Chart(
        title,
        notes=([f"{broken} values not finite"] if broken else []) + (["logarithmic"] if y.log else []),
        legend=[(colour, s.name) for colour, s in coloured] if len(series) > 1 else [],
        lines=lines,
        x_label=x_label,
        x_ticks=x.ticks(),
        y_ticks=y.ticks(),
        hovers=hovers(finite, x),
    )


def x_scale(steps: list[float]) -> Scale:
    low, high = min(steps), max(steps)
    return Scale(low, high if high > low else low + 1, AREA.left, AREA.right)


def y_scale(values: list[float], log: bool) -> Scale:
    """Logarithmic over a wide positive range, if it may be; rare peaks far outside the rest are cut off."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    if log and low > 0 and high / low > 30:
        return Scale(low / 1.1, high * 1.1, AREA.bottom, AREA.top, log=True)
    usual = ordered[int(0.99 * (len(ordered) - 1))]
    if len(ordered) > 100 and high - low > 4 * (usual - low) > 0:
        high = usual
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return Scale(low - margin, high + margin, AREA.bottom, AREA.top)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` multiples of 1, 2, 2.5 or 5 times a power of ten between two values."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step)
    return [i * step for i in range(first, math.floor(high / step) + 1)]


def running_mean(points: Points) -> Points:
    """The mean over a window of about 5 % of the points around each; the window shrinks towards both ends.

    Empty for fewer than 40 points.
    """
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


def thin_out(points: Points) -> Points:
    """At most MAX_POINTS points that keep the lowest and highest of every stretch."""
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(2 * len(points) / MAX_POINTS)
    kept = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return kept


def in_pixels(points: Points, x: Scale, y: Scale) -> Points:
    """A thinned-out line in pixels, to a tenth; values outside the plot lie on its edge."""
    return [
        (round(x(step), 1), round(min(max(y(value), AREA.top), AREA.bottom), 1))
        for step, value in thin_out(points)
    ]


def hovers(series: Sequence[Series], x: Scale) -> list[Band]:
    """The bands with tooltips; there is none where no series has a point."""
    width = (AREA.right - AREA.left) / HOVERS
    texts: dict[int, dict[str, str]] = {}
    for s in series:
        for step, value in s.points:
            band = min(int((x(step) - AREA.left) / width), HOVERS - 1)
            texts.setdefault(band, {})[s.name] = f"{s.name}: {value:.5g} at {step:g}"
    return [
        Band(round(AREA.left + band * width, 1), round(width, 1), "\n".join(lines.values()))
        for band, lines in sorted(texts.items())
    ]


# ---- values with intervals


class Interval(NamedTuple):
    """A value with its interval in pixels, on a row of its own; both ends are the value where nothing is known."""

    name: str
    y: float
    value: float
    low: float
    high: float
    text: str


@dataclass
class IntervalChart:
    """Everything that `templates/intervals.svg` draws: a row per value, and a line at zero."""

    title: str
    width: int
    height: int
    left: int
    bottom: int
    zero: float
    ticks: list[tuple[float, float]]  # pixel, value
    rows: list[Interval]


def interval_chart(title: str, estimates: Mapping[str, tuple[float, ...]]) -> IntervalChart:
    """Draw values with intervals, (value, low, high, ...) by name, from the smallest to the largest."""
    left, width, line = 30 + 7 * max(map(len, estimates)), 900, 22
    finite = [x for estimate in estimates.values() for x in estimate[:3] if math.isfinite(x)]
    low, high = min(*finite, 0.0), max(*finite, 0.0)
    margin = 0.05 * (high - low) or 1.0
    x = Scale(low - margin, high + margin, left, width - 20)
    rows = []
    for place, (name, estimate) in enumerate(sorted(estimates.items(), key=lambda item: item[1][0])):
        value, *ends = estimate[:3]
        first, last = (round(x(end if math.isfinite(end) else value), 1) for end in ends)
        text = f"{value:+.4f} [{ends[0]:+.4f}, {ends[1]:+.4f}]"
        rows.append(Interval(name, 50 + line * place, round(x(value), 1), first, last, text))
    bottom = 44 + line * len(rows)
    return IntervalChart(title, width, bottom + 30, left, bottom, round(x(0), 1), x.ticks(), rows)


# ---- few points per line, each line with its name beside it


class LabelledLine(NamedTuple):
    """A line in pixels with dots, and its name at the right edge, at height `y`."""

    name: str
    colour: str
    points: Points
    y: float
    texts: list[str]  # tooltips of the dots


@dataclass
class LabelledChart:
    """Everything that `templates/labelled.svg` draws."""

    title: str
    area: Area
    width: int
    x_label: str
    x_ticks: list[tuple[float, float]]  # pixel, value
    y_ticks: list[tuple[float, float]]
    lines: list[LabelledLine]


def labelled_chart(title: str, series: Sequence[Series], x_label: str) -> LabelledChart:
    """Draw lines of few points from 0 on, with x logarithmic; the names stand beside them in the order of their last values."""
    line, top = 15, 40
    bottom = max(330, top + line * len(series))
    area = Area(760, bottom + 40, 50, 500, top, bottom)
    places = [step for s in series for step, _ in s.points]
    x = Scale(0.9 * min(places), 1.1 * max(places), area.left, area.right, log=True)
    y = Scale(0.0, 1.05 * max(value for s in series for _, value in s.points) or 1.0, area.bottom, area.top)
    lines: list[LabelledLine] = []
    # from below: a name stands at its last value, or above the one below it
    for place, s in enumerate(sorted(series, key=lambda s: s.points[-1][1])):
        room = area.top + line * (len(series) - 1 - place)  # what the names above it need
        height = min(y(s.points[-1][1]), lines[-1].y - line if lines else area.bottom)
        points = [(round(x(step), 1), round(y(value), 1)) for step, value in s.points]
        texts = [f"{s.name}: {value:.3f} at {step:g}" for step, value in s.points]
        colour = COLOURS[place % len(COLOURS)]
        lines.append(LabelledLine(s.name, colour, points, round(max(height, room), 1), texts))
    return LabelledChart(title, area, area.width, x_label, x.ticks(), y.ticks(), lines)
