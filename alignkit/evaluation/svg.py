"""Inline SVG charts: lines, bars and dots with intervals, histograms. Strings in, strings out.

Colours are CSS classes (`t-base`, `t-tuned`, `t-good`, `t-bad`, `t-quiet`) that the page defines for light and dark.
Every chart is drawn 330 units wide so that its text stays readable on a phone, and carries a text alternative.
Deliberately not here: interaction; hovering shows native <title> hints, nothing more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from alignkit.escape import to_html
from alignkit.evaluation.statistics import Interval

WIDTH = 330.0
_LEFT, _RIGHT = 48.0, 322.0
_ROW = 52.0  # a labelled row with two marks; both category charts share it, so their rows line up
_MOST_POINTS = 240  # a line of more points is drawn by bucket means; the page stays small after a long training

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Series:
    """One line: finite (x, y) points in order of x, its tone, and solid, dashed or dotted ("": faint)."""

    name: str
    points: Sequence[Point]
    tone: str = "tuned"
    dash: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One labelled row of a bar or dot chart with one mark a side: (tone, what it is, value)."""

    label: str
    marks: Sequence[tuple[str, str, Interval]]


@dataclass(frozen=True, slots=True)
class _Axis:
    """A linear map of [low, high] to drawing units [start, end] with round tick values."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int = 5) -> list[float]:
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= rough * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def compact(value: float, *, signed: bool = False) -> str:
    """A number in about three digits with a true minus sign; `signed` also writes the plus. Not finite: n/a."""
    if not math.isfinite(value):
        return "n/a"
    size = abs(value)
    if size and (size < 1e-5 or size >= 100_000):
        text = f"{size:.1e}"
    elif size < 0.001:
        text = f"{size:.2g}"
    else:
        text = f"{size:.3f}" if size < 10 else f"{size:.2f}" if size < 100 else f"{size:,.0f}"
    sign = "\N{MINUS SIGN}" if value < 0 else "+" if signed and value > 0 else ""
    return sign + text


def line_chart(
    series: Sequence[Series], *, alt: str, zero: bool = False, mark: float | None = None, height: float = 196.0
) -> str:
    """Lines over steps; noisy long ones show raw values faintly under their moving average.

    `zero` marks y = 0, `mark` a step.
    """
    points = [point for one in series for point in one.points]
    ys = [y for _, y in points] + ([0.0] if zero else [])
    x_axis = _axis(0, max(x for x, _ in points), _LEFT, _RIGHT, pad=0)
    y_axis = _axis(min(ys), max(ys), height - 26, 12)
    parts = [_grid(y_axis), *(_x_label(x_axis, tick, height) for tick in x_axis.ticks(4))]
    if zero:
        parts.append(_line((_LEFT, y_axis.at(0)), (_RIGHT, y_axis.at(0)), "zero"))
    if mark is not None:
        parts.append(_line((x_axis.at(mark), 12), (x_axis.at(mark), height - 26), "zero"))
    parts += [_curve(one, x_axis, y_axis) for one in series]
    return _svg(height, alt, parts)


def bar_chart(rows: Sequence[Row], *, alt: str, from_zero: bool = True) -> str:
    """Horizontal bars from zero with intervals, several marks a row; dots on a cropped axis when not from zero."""
    marks = [interval for row in rows for _, _, interval in row.marks]
    lows, highs = [_low(mark) for mark in marks], [_high(mark) for mark in marks]
    anchor = [0.0] if from_zero else []
    axis = _axis(min([*lows, *anchor]), max([*highs, *anchor]), 4, 272, pad=0 if from_zero else 0.06)
    parts, top = [], 4.0
    for row in rows:
        parts.append(_text(4, top + 11, row.label, "label"))
        top += 18
        for tone, name, interval in row.marks:
            parts.append(_mark(axis, top, (tone, f"{row.label}, {name}", interval), bar=from_zero))
            top += 13
        top += 8
    return _svg(top, alt, parts)


def gain_chart(rows: Sequence[tuple[str, Interval]], *, alt: str) -> str:
    """Dots with intervals around a zero line; green or red only where the interval excludes zero."""
    low = min([0.0, *(_low(interval) for _, interval in rows)])
    high = max([0.0, *(_high(interval) for _, interval in rows)])
    axis = _axis(low, high, 8, 262, pad=0.06)
    bottom = 4.0 + _ROW * len(rows)
    parts = [_line((axis.at(0), 2), (axis.at(0), bottom), "zero")]
    for number, (label, interval) in enumerate(rows):
        top = 4.0 + _ROW * number
        parts.append(_text(4, top + 11, label, "label"))
        parts.append(_mark(axis, top + 22, (tone(interval), label, interval), bar=False, signed=True))
    parts += [_text(axis.at(tick), bottom + 14, compact(tick, signed=True), "tick middle") for tick in axis.ticks(4)]
    return _svg(bottom + 20, alt, parts)


def win_strip(interval: Interval) -> str:
    """A tiny 0..1 strip with the win rate, its interval and the even line, for a table cell."""
    axis = _Axis(0, 1, 2, 88)
    hint = f"win rate {compact(interval.mean)}, interval {compact(_low(interval))} to {compact(_high(interval))}"
    marks = [_line((2, 8), (88, 8), "rail"), _line((45, 2), (45, 14), "zero")]
    shade = tone(Interval(interval.mean - 0.5, interval.low - 0.5, interval.high - 0.5))
    marks.append(_whisker(axis, 8, interval, shade))
    marks.append(f'<circle class="t-{shade} fill" cx="{axis.at(interval.mean):.1f}" cy="8" r="3.6"/>')
    return f'<svg class="strip" viewBox="0 0 90 16" role="img" aria-label="{to_html(hint)}">{"".join(marks)}</svg>'


def histogram(edges: Sequence[float], counts: Sequence[float], *, alt: str, height: float = 150.0) -> str:
    """Columns over len(counts) + 1 edges."""
    x_axis = _Axis(edges[0], edges[-1], _LEFT, _RIGHT)
    y_axis = _axis(0, max([*counts, 1]), height - 24, 10, pad=0)
    parts = [_grid(y_axis)]
    for left, right, count in zip(edges, edges[1:], counts, strict=False):
        x, y = x_axis.at(left) + 1, y_axis.at(count)
        size = f'width="{max(1.0, x_axis.at(right) - x - 1):.1f}" height="{y_axis.at(0) - y:.1f}"'
        hint = to_html(f"{compact(left)} to {compact(right)}: {count:g}")
        parts.append(f'<rect class="t-tuned fill" x="{x:.1f}" y="{y:.1f}" {size} rx="1.5"><title>{hint}</title></rect>')
    parts += [_x_label(x_axis, tick, height) for tick in x_axis.ticks(4)]
    return _svg(height, alt, parts)


def tone(interval: Interval) -> str:
    """good / bad where the whole interval is above / below zero, else quiet."""
    if not interval.excludes(0):
        return "quiet"
    return "good" if interval.mean > 0 else "bad"


def _axis(low: float, high: float, start: float, end: float, pad: float = 0.08) -> _Axis:
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    room = (high - low) * pad
    return _Axis(low - room, high + room, start, end)


def _low(interval: Interval) -> float:
    return interval.low if math.isfinite(interval.low) else interval.mean


def _high(interval: Interval) -> float:
    return interval.high if math.isfinite(interval.high) else interval.mean


def _grid(axis: _Axis) -> str:
    ticks = axis.ticks()
    lines = [_line((_LEFT, axis.at(tick)), (_RIGHT, axis.at(tick)), "grid") for tick in ticks]
    return "".join(lines + [_text(_LEFT - 6, axis.at(tick) + 4, tick_text(tick, ticks), "tick end") for tick in ticks])


def tick_text(tick: float, ticks: Sequence[float]) -> str:
    """As few decimals as tell neighbouring ticks apart."""
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(tick) or 1
    if max(map(abs, ticks)) >= 100_000 or step < 1e-4:
        return f"{tick:.1e}".replace("-", "\N{MINUS SIGN}")
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    decimals += round(step * 10**decimals, 6) % 1 > 0
    return f"{tick:.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def _x_label(axis: _Axis, tick: float, height: float) -> str:
    place = "start" if axis.at(tick) < _LEFT + 8 else "end" if axis.at(tick) > _RIGHT - 12 else "middle"
    return _text(axis.at(tick), height - 8, tick_text(tick, axis.ticks(4)), f"tick {place}")


def _curve(series: Series, x_axis: _Axis, y_axis: _Axis) -> str:
    points = _thin(series.points)
    smooth = _smooth(points) if len(points) > 40 else points
    raw = _path(points, x_axis, y_axis, f"t-{series.tone} raw") if smooth is not points else ""
    last_x, last_y = smooth[-1]
    end = f'<circle class="t-{series.tone} fill" cx="{x_axis.at(last_x):.1f}" cy="{y_axis.at(last_y):.1f}" r="3">'
    hint = to_html(f"{series.name}: {compact(last_y)} at {last_x:g}")
    return raw + _path(smooth, x_axis, y_axis, f"t-{series.tone} line") + end + f"<title>{hint}</title></circle>"


def _thin(points: Sequence[Point]) -> list[Point]:
    bucket = math.ceil(len(points) / _MOST_POINTS)
    groups = [points[start : start + bucket] for start in range(0, len(points), bucket)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _smooth(points: Sequence[Point]) -> list[Point]:
    """Centred moving average over a twelfth of the line; it lags behind nothing, unlike an exponential one."""
    reach = max(2, len(points) // 24)
    windows = [points[max(0, i - reach) : i + reach + 1] for i in range(len(points))]
    return [(x, sum(y for _, y in window) / len(window)) for (x, _), window in zip(points, windows, strict=True)]


def _path(points: Sequence[Point], x_axis: _Axis, y_axis: _Axis, css: str) -> str:
    steps = " L".join(f"{x_axis.at(x):.1f} {y_axis.at(y):.1f}" for x, y in points)
    return f'<path class="{css}" d="M{steps}"/>'


def _mark(axis: _Axis, top: float, mark: tuple[str, str, Interval], *, bar: bool, signed: bool = False) -> str:
    shade, name, interval = mark
    y, x = top + 5, axis.at(interval.mean)
    shown = compact(interval.mean, signed=signed)
    hint = f"{name}: {shown}, interval {compact(interval.low)} to {compact(interval.high)}"
    if bar:
        left, right = sorted((axis.at(0), x))
        shape = f'<rect class="t-{shade} fill" x="{left:.1f}" y="{top}" width="{right - left:.1f}" height="10" rx="2"/>'
    else:
        shape = f'<circle class="t-{shade} fill" cx="{x:.1f}" cy="{y}" r="4.2"/>'
    whisker = _whisker(axis, y, interval, "ink" if bar else shade)
    back = shape + whisker if bar else whisker + shape
    return f"<g><title>{to_html(hint)}</title>{back}{_text(326, y + 4, shown, 'value end')}</g>"


def _whisker(axis: _Axis, y: float, interval: Interval, shade: str) -> str:
    if _low(interval) == _high(interval):
        return ""
    return _line((axis.at(_low(interval)), y), (axis.at(_high(interval)), y), f"t-{shade} whisker")


def _line(start: Point, end: Point, css: str) -> str:
    return f'<line class="{css}" x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}"/>'


def _text(x: float, y: float, text: str, css: str) -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}">{to_html(text)}</text>'


def _svg(height: float, alt: str, parts: Sequence[str]) -> str:
    box = f'viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-label="{to_html(alt)}"'
    return f'<svg class="chart" {box}>{"".join(parts)}</svg>'


@dataclass(frozen=True, slots=True)
class Dot:
    """A point of a scatter chart with its intervals; `shape` is circle, square, diamond, triangle, ring or cross."""

    name: str
    x: Interval
    y: Interval
    shape: str = "circle"
    tone: str = "tuned"


_SHAPES = {  # outlines around (0, 0); none for a circle
    "square": "M-3.6 -3.6H3.6V3.6H-3.6Z",
    "diamond": "M0 -5L5 0L0 5L-5 0Z",
    "triangle": "M0 -4.8L4.6 3.6H-4.6Z",
    "ring": "M-9 0a9 9 0 1 0 18 0a9 9 0 1 0 -18 0M-7.2 0a7.2 7.2 0 1 1 14.4 0a7.2 7.2 0 1 1 -14.4 0Z",
    "cross": "M-1.2 -7.5H1.2V-1.2H7.5V1.2H1.2V7.5H-1.2V1.2H-7.5V-1.2H-1.2Z",
}


def scatter_chart(
    dots: Sequence[Dot], lines: Sequence[Series], *, alt: str, names: tuple[str, str], height: float = 270.0
) -> str:
    """Dots with intervals in two directions, lines behind them, and the lines of zero; `names` are of the two axes."""
    xs = [end for dot in dots for end in (_low(dot.x), _high(dot.x))] + [0.0]
    ys = [end for dot in dots for end in (_low(dot.y), _high(dot.y))] + [0.0]
    bottom = height - 40
    x_axis, y_axis = _axis(min(xs), max(xs), _LEFT, _RIGHT), _axis(min(ys), max(ys), bottom, 22)
    parts = [_grid(y_axis), *(_x_label(x_axis, tick, height - 14) for tick in x_axis.ticks(4))]
    parts.append(_line((x_axis.at(0), 22), (x_axis.at(0), bottom), "zero"))
    parts.append(_line((_LEFT, y_axis.at(0)), (_RIGHT, y_axis.at(0)), "zero"))
    parts.append(_text(_RIGHT, height - 4, f"{names[0]} \N{RIGHTWARDS ARROW}", "tick end"))
    parts.append(_text(4, 12, f"{names[1]} \N{UPWARDS ARROW}", "tick"))
    for line in lines:
        style = f"reach {line.dash}" if line.dash else "raw"
        parts.append(f"<g><title>{to_html(line.name)}</title>")
        parts.append(_path(line.points, x_axis, y_axis, f"t-{line.tone} {style}") + "</g>")
    return _svg(height, alt, [*parts, *(_dot(dot, x_axis, y_axis) for dot in dots)])


def _dot(dot: Dot, x_axis: _Axis, y_axis: _Axis) -> str:
    x, y = x_axis.at(dot.x.mean), y_axis.at(dot.y.mean)
    whiskers = _whisker(x_axis, y, dot.x, f"{dot.tone} thin")
    if _low(dot.y) != _high(dot.y):
        whiskers += _line((x, y_axis.at(_low(dot.y))), (x, y_axis.at(_high(dot.y))), f"t-{dot.tone} thin whisker")
    shape = f'<circle class="t-{dot.tone} fill" cx="{x:.1f}" cy="{y:.1f}" r="4.2"/>'
    if dot.shape in _SHAPES:
        shape = f'<path class="t-{dot.tone} fill" transform="translate({x:.1f} {y:.1f})" d="{_SHAPES[dot.shape]}"/>'
    return f"<g><title>{to_html(dot.name)}: {compact(dot.x.mean)}, {compact(dot.y.mean)}</title>{whiskers}{shape}</g>"
