"""Charts as data: geometry and labels, which parts.html turns into SVG and text that follow the page's colours and width.

The plot itself is an SVG stretched over its box, strokes kept constant; ticks and labels are HTML placed in per cent. So a chart is as
readable on a phone as on a laptop, in light and dark, and needs neither a library in the page nor pictures of fixed size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

MAX_POINTS = 300
"""Points of a curve that are drawn; longer ones are averaged over stretches of equal length."""

LOG_RATIO = 60.0
"""A logarithmic axis where positive values span more than this."""

MAX_DOTS = 60
"""Values of a curve up to which each gets a dot, where dots are asked for."""

WIDTH, HEIGHT = 1000.0, 500.0
"""Of the plot, in SVG units."""


@dataclass(frozen=True)
class Series:
    """One curve: `steps` and `values` of equal length, `color` an index into the page's palette."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    color: int = 0
    dashed: bool = False
    points: bool = False
    """Draw a dot at every value, as for measurements that are few (no more than MAX_DOTS, categories apart)."""


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis, in per cent from the left or the top."""

    at: float
    text: str


@dataclass(frozen=True)
class Curve:
    """A series ready to be drawn: SVG paths of its line and of its dots, either may be empty."""

    name: str
    color: int
    dashed: bool
    line: str
    dots: str
    places: list[tuple[float, float, str, str]]
    """Of every point: left and top in per cent, step and value as text, for the tooltip."""


@dataclass(frozen=True)
class Style:
    """How a line chart is drawn beside its curves."""

    x_label: str = "optimizer step"
    marks: Sequence[tuple[float, str]] = ()
    """Vertical lines at a step, with a label."""
    names: Sequence[str] | None = None
    """Set where values are indices into these categories, which the y axis names."""
    may_be_log: bool = False
    """Begin with a logarithmic axis where the values span decades."""
    wide: bool = False


@dataclass(frozen=True)
class Chart:
    """A line chart ready to be drawn."""

    title: str
    unit: str
    x_label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    curves: list[Curve]
    marks: list[Tick] = field(default_factory=list)
    """Vertical lines with a label, in per cent from the left."""
    logarithmic: bool = False
    wide: bool = False
    other: Chart | None = None
    """The same on the other kind of axis, linear or logarithmic; None where values are not positive."""


def line_chart(title: str, unit: str, series: Sequence[Series], style: Style | None = None) -> Chart | None:
    """A chart of the series that have values, None where none has."""
    style, series = style or Style(), [s for s in series if len(s.values)]
    if not series:
        return None
    if style.names is not None or _extent([np.asarray(s.values, dtype=float) for s in series])[0] <= 0:
        return _drawn(title, unit, series, style, logarithmic=False)
    logarithmic = style.may_be_log and _spans_decades(series)
    chart, other = (_drawn(title, unit, series, style, kind) for kind in (logarithmic, not logarithmic))
    return replace(chart, other=other)


def _drawn(title: str, unit: str, series: Sequence[Series], style: Style, logarithmic: bool) -> Chart:
    scale = np.log10 if logarithmic else np.asarray
    y_low, y_high = _padded(*_extent([scale(np.asarray(s.values, dtype=float)) for s in series]), from_zero=not logarithmic)
    x_low, x_high = _extent([np.asarray(s.steps, dtype=float) for s in series])
    x_high = x_high if x_high > x_low else x_low + 1
    if style.names is not None:
        y_low, y_high = -0.5, len(style.names) - 0.5

    def left(step: float) -> float:
        return 100 * (step - x_low) / (x_high - x_low)

    def top(value: float) -> float:
        return 100 * (y_high - value) / (y_high - y_low)

    return Chart(
        title,
        unit,
        style.x_label,
        [Tick(left(v), number(v)) for v in nice_ticks(x_low, x_high, 5)],
        [Tick(top(v), text) for v, text in _y_ticks(y_low, y_high, style.names, logarithmic)],
        [_curve(s, left, lambda value: top(float(scale(np.asarray(value)))), style.names) for s in series],
        [Tick(left(step), text) for step, text in style.marks if x_low <= step <= x_high],
        logarithmic,
        style.wide,
    )


def _y_ticks(low: float, high: float, names: Sequence[str] | None, logarithmic: bool) -> list[tuple[float, str]]:
    """Places on the axis (logarithms on a logarithmic one) and their texts."""
    if names is not None:
        return [(float(i), name) for i, name in enumerate(names)]
    if not logarithmic:
        ticks = nice_ticks(low, high, 5)
        return list(zip(ticks, tick_texts(ticks)))
    decades = _decade_ticks(low, high)
    if len(decades) < 2:  # less than a decade: round numbers, unevenly far apart
        decades = [value for value in nice_ticks(10**low, 10**high, 5) if value > 0]
    return [(math.log10(v), text) for v, text in zip(decades, tick_texts(decades))]


def _curve(s: Series, left: Callable[[float], float], top: Callable[[float], float], names: Sequence[str] | None) -> Curve:
    steps, values = averaged(s.steps, s.values)
    percent = [(left(x), top(y)) for x, y in zip(steps, values)]
    texts = [names[round(y)] if names else number(y) for y in values]
    places = [(round(a, 2), round(b, 2), number(x), text) for (a, b), x, text in zip(percent, steps, texts)]
    spots = [f"{a * WIDTH / 100:.1f} {b * HEIGHT / 100:.1f}" for a, b in percent]
    dotted = (s.points and (names or len(spots) <= MAX_DOTS)) or len(spots) == 1
    return Curve(
        name=s.name,
        color=s.color,
        dashed=s.dashed,
        line="" if names else "M" + "L".join(spots),
        dots="".join(f"M{spot}h.01" for spot in spots) if dotted else "",
        places=places,
    )


def averaged(steps: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most MAX_POINTS points of a curve, each the mean over a stretch of equally many."""
    if len(values) <= MAX_POINTS:
        return list(steps), list(values)
    parts = np.array_split(np.arange(len(values)), MAX_POINTS)
    x, y = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
    return [float(x[part].mean()) for part in parts], [float(y[part].mean()) for part in parts]


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers within [low, high], about that many: steps of 1, 2, 2.5 or 5 times a power of ten."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A number for people: four significant digits, thousands separated, powers of ten where tiny."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    size = abs(value)
    if size >= 1e7 or size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{float(f'{value:.4g}'):g}"


def tick_texts(values: Sequence[float]) -> list[str]:
    """The ticks of one axis as text, all in one notation."""
    largest = max((abs(v) for v in values), default=0.0)
    if largest and (largest < 1e-2 or largest >= 1e6):
        return [number(v) if not v else f"{float(f'{v:.1e}'.split('e')[0]):g}e{int(f'{v:.1e}'.split('e')[1])}" for v in values]
    return [f"{round(v, 10):,g}" if abs(v) < 1e6 else number(v) for v in values]


def _extent(arrays: Sequence[np.ndarray]) -> tuple[float, float]:
    return min(float(a.min()) for a in arrays), max(float(a.max()) for a in arrays)


def _padded(low: float, high: float, from_zero: bool = True) -> tuple[float, float]:
    """The extent with a margin of 6 %; a flat one is opened, and one that begins near zero may begin at zero."""
    if high == low:
        return low - (abs(low) or 1) * 0.5, high + (abs(high) or 1) * 0.5
    margin = 0.06 * (high - low)
    bottom = 0.0 if from_zero and 0 <= low < 0.25 * (high - low) else low - margin
    return bottom, high + margin


def _spans_decades(series: Sequence[Series]) -> bool:
    low, high = _extent([np.asarray(s.values, dtype=float) for s in series])
    return low > 0 and high / low > LOG_RATIO


def _decade_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between two logarithms, thinned to six; with 2 and 5 between them where they are few."""
    exponents = range(math.floor(low), math.ceil(high) + 1)
    factors = (1, 2, 5) if high - low < 2.2 else (1,)
    values = [f * 10.0**e for e in exponents for f in factors if low <= math.log10(f * 10.0**e) <= high]
    return values[:: max(1, math.ceil(len(values) / 7))]


Measured = tuple[str, int | None, float, float | None, float | None]
"""A label, a color (None: grey), a value, and the ends of its interval."""


@dataclass(frozen=True)
class Span:
    """One line of an interval plot: a dot at `at` and a bar from `low` to `high`, in per cent from the left."""

    label: str
    color: int | None
    at: float
    low: float
    high: float
    text: str


@dataclass(frozen=True)
class Spans:
    """Measurements with intervals, one under the other on a common axis."""

    unit: str
    ticks: list[Tick]
    spans: list[Span]


def interval_plot(unit: str, rows: Sequence[Measured]) -> Spans | None:
    """An interval plot; None without rows."""
    if not rows:
        return None
    lows = [value if low is None else low for _, _, value, low, _ in rows]
    highs = [value if high is None else high for _, _, value, _, high in rows]
    bottom, top = _padded(min(lows), max(highs))
    ticks = nice_ticks(bottom, top, 4)

    def left(value: float) -> float:
        return round(100 * (value - bottom) / (top - bottom), 2)

    spans = [
        Span(text, color, left(value), left(low), left(high), f"{value:.3f}")
        for (text, color, value, _, _), low, high in zip(rows, lows, highs)
    ]
    return Spans(unit, [Tick(left(tick), text) for tick, text in zip(ticks, tick_texts(ticks))], spans)


@dataclass(frozen=True)
class Bar:
    """One bar: a label, its length in per cent of the longest, and its duration as text."""

    label: str
    length: float
    text: str
    note: str = ""
    pale: bool = False


def duration_bars(rows: Sequence[tuple[str, float, str]]) -> list[Bar]:
    """Bars of rows (label, seconds, note), on a common scale from zero."""
    longest = max((seconds for _, seconds, _ in rows), default=0.0)
    return [Bar(label, round(100 * seconds / longest, 2), duration(seconds), note) for label, seconds, note in rows]


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 05 s`, `2 h 07 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    if seconds < 3570:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"
