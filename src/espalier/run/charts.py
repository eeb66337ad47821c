"""Charts as SVG text: lines, pairs of bars, bars against a limit, points, and a network's silhouette.

Every chart is 360 units wide, so that it stands at its natural size on a phone and three fit beside each other on a screen.
Colours, fonts and strokes are classes of ``figures.css``; tone ``n`` is the palette's colour ``n``.  All text is escaped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

WIDTH = 360
DRAWN = 60  # of a bundle: more curves than that are one grey smear
LETTER = 6.1  # units that a character of the labels takes, on average
Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A named curve; ``dashed`` for limits and schedules, ``apart`` for points that no line joins."""

    name: str
    points: tuple[Point, ...]
    tone: int = 0
    dashed: bool = False
    apart: bool = False


@dataclass(frozen=True)
class Pair:
    """A quantity before and after."""

    name: str
    before: float
    after: float
    text: str
    tone: int = 0


@dataclass(frozen=True)
class Limit:
    """What was asked and what was met, as shares of the dense network."""

    name: str
    share: float
    limit: float | None
    text: str


@dataclass(frozen=True)
class Dot:
    """A run among others; a hollow dot is a network that nothing was removed from."""

    name: str
    x: float
    y: float
    tone: int = 0
    hollow: bool = False


@dataclass(frozen=True)
class Level:
    """A layer in the silhouette: its outputs before, and the outputs of every stage that now stands there."""

    name: str
    before: int
    after: tuple[int, ...]
    text: str
    tone: int = 0


# -- scales


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers that cover ``low`` to ``high``, about ``wanted`` of them.

    >>> ticks(0, 1)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    span = high - low if high > low else max(abs(high), 1.0)
    rough = span / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil((low + span) / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten from just below ``low`` to just above ``high``; the powers alone if those are many.

    >>> decades(0.03, 0.4)
    [0.02, 0.05, 0.1, 0.2, 0.5]
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if math.log10(high / low) < 2.5 else (1,)
    marks = [round(m * 10.0**p, 12 - p) for p in powers for m in steps]
    first = max((i for i, m in enumerate(marks) if m <= low), default=0)
    last = min((i for i, m in enumerate(marks) if m >= high and i > first), default=len(marks) - 1)
    return marks[first : last + 1]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _logarithmic(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    scale = _scale(math.log(low), math.log(high), start, end)
    return lambda value: scale(math.log(value))


def _number(value: float) -> str:
    return f"{value:g}"


def spread_out(places: Sequence[float], *, apart: float, low: float, high: float) -> list[float]:
    """The same places, moved as little as keeps them ``apart`` and inside ``low`` to ``high``, in the same order."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = list(places)
    floor = low
    for i in order:
        moved[i] = floor = max(moved[i], floor)
        floor += apart
    ceiling = high
    for i in reversed(order):
        moved[i] = ceiling = min(moved[i], ceiling)
        ceiling -= apart
    return moved


# -- charts


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    low: float | None = None,
    high: float | None = None,
    logarithmic: bool = False,
) -> str:
    """Curves over a common axis, each with its name, if it has one, at its end; ``logarithmic`` upwards, of numbers above 0."""
    lines = [line for line in lines if line.points]
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    names = [line.name for line in lines]
    right = WIDTH - 14 - LETTER * max((len(n) for n in names), default=0)
    low, high = min(ys) if low is None else low, max(ys) if high is None else high
    y_ticks = decades(low, high) if logarithmic else ticks(low, high)
    # Epochs, iterations, trials: there is none between two of them.
    x_ticks = [t for t in ticks(min(xs), max(xs), 6) if min(xs) <= t <= max(xs) and t == round(t)] or [min(xs)]
    left, top, bottom = 14 + LETTER * max(len(_number(t)) for t in y_ticks), 24.0, 190.0
    x = _scale(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, left, right)
    y = (_logarithmic if logarithmic else _scale)(y_ticks[0], y_ticks[-1], bottom, top)
    parts = [_text(0, 11, y_label, "axis")]
    parts += _horizontal_grid(y_ticks, y, left, right)
    parts += [_text(x(t), bottom + 15, _number(t), "axis", "middle") for t in x_ticks]
    parts.append(_text((left + right) / 2, bottom + 31, x_label, "axis", "middle"))
    for line in lines:
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line.points)
        style = f"line t{line.tone}" + (" dashed" if line.dashed else "")
        if not line.apart:
            parts.append(f'<polyline class="{style}" points="{path}"/>')
        if line.apart or len(line.points) == 1:
            parts += [
                f'<circle class="dot t{line.tone} f{line.tone}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="3"/>'
                for a, b in line.points
            ]
    named = [line for line in lines if line.name]
    places = spread_out([y(line.points[-1][1]) for line in named], apart=13, low=top, high=bottom)
    for line, place in zip(named, places, strict=True):
        parts.append(_text(right + (10 if line.apart else 6), place + 4, line.name, f"label f{line.tone}"))
    return svg(parts, height=226, title=title)


def bundle(curves: Mapping[str, tuple[Point, ...]], *, title: str, y_label: str, high: float | None = 100) -> str:
    """Many curves by epoch in one chart; lowest, middle and highest at the end have their names there."""
    ordered = sorted(curves, key=lambda name: curves[name][-1][1])[:DRAWN]
    if not ordered:
        return ""
    named = {ordered[0], ordered[len(ordered) // 2], ordered[-1]}
    lines = [Line(n if n in named else "", curves[n], number % 6) for number, n in enumerate(ordered)]
    return line_chart(lines, title=title, x_label="epoch", y_label=y_label, low=0, high=high)


def pair_bars(pairs: Sequence[Pair], *, title: str, unit: str, head: str, row: float = 17.0) -> str:
    """For every name a wide pale bar, before, and a narrow strong one in it, after."""
    most = max((max(p.before, p.after) for p in pairs), default=0.0) or 1.0
    left = _label_room([p.name for p in pairs])
    right = WIDTH - 10 - LETTER * max((len(p.text) for p in pairs), default=0)
    x = _scale(0, most, left, right)
    top = 22.0
    parts = [_text(left, 11, unit, "axis"), _text(WIDTH, 11, head, "axis", "end")]
    for number, pair in enumerate(pairs):
        y = top + number * row
        parts.append(_name(pair.name, y + row / 2, left))
        before, after = max(x(pair.before) - left, 0.8), max(x(pair.after) - left, 0.8)
        parts.append(_box("before", left, y + 2, before, row - 4))
        parts.append(_box(f"after f{pair.tone}", left, y + 5, after, row - 10))
        parts.append(_text(WIDTH, y + row / 2 + 4, pair.text, "label", "end"))
    return svg(parts, height=top + len(pairs) * row + 4, title=title)


def limit_bars(limits: Sequence[Limit], *, title: str) -> str:
    """What is left of every cost, in per cent of the dense network, with a mark where the limit stands."""
    parts, row = [], 50.0
    x = _scale(0, max(1.0, *(b.share for b in limits)), 0.5, WIDTH - 0.5)
    for number, bar in enumerate(limits):
        y = number * row
        parts += [_text(0, y + 12, bar.name, "strong"), _text(WIDTH, y + 12, bar.text, "label", "end")]
        parts.append(_box("before", 0.5, y + 19, x(1.0) - 0.5, 14))
        parts.append(_box("after f0", 0.5, y + 19, max(x(bar.share) - 0.5, 0.8), 14))
        if bar.limit is not None:
            at = x(bar.limit)
            parts.append(f'<line class="limit" x1="{at:.1f}" x2="{at:.1f}" y1="{y + 15:.1f}" y2="{y + 37:.1f}"/>')
    return svg(parts, height=row * len(limits) - 8, title=title)


def dot_chart(dots: Sequence[Dot], *, title: str, x_label: str, y_label: str) -> str:
    """Points with their names, and the frontier: as cheap as it and better there is none."""
    xs, ys = [d.x for d in dots], [d.y for d in dots]
    x_ticks, y_ticks = ticks(0.0, max(*xs, 100.0)), ticks(min(ys) - 0.05, max(ys) + 0.05)
    left, right, top, bottom = 14 + LETTER * max(len(_number(t)) for t in y_ticks), WIDTH - 14.0, 24.0, 240.0
    x, y = _scale(x_ticks[0], x_ticks[-1], left, right), _scale(y_ticks[0], y_ticks[-1], bottom, top)
    parts = [_text(0, 11, y_label, "axis")]
    parts += _horizontal_grid(y_ticks, y, left, right)
    parts += [_text(x(t), bottom + 15, _number(t), "axis", "middle") for t in x_ticks]
    parts.append(_text((left + right) / 2, bottom + 31, x_label, "axis", "middle"))
    best = frontier([(d.x, d.y) for d in dots])
    corners = [best[0]]
    for point in best[1:]:
        corners += [(point[0], corners[-1][1]), point]
    steps = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in corners)
    parts.append(f'<polyline class="frontier" points="{steps}"/>')
    for at_right in (True, False):
        side = [d for d in dots if (x(d.x) + 10 + LETTER * len(d.name) <= WIDTH) is at_right]
        heights = spread_out([y(d.y) - 6 for d in side], apart=13, low=top - 8, high=bottom)
        for dot, height in zip(side, heights, strict=True):
            style = "dot hollow" if dot.hollow else f"dot f{dot.tone} t{dot.tone}"
            parts.append(f'<circle class="{style}" cx="{x(dot.x):.1f}" cy="{y(dot.y):.1f}" r="4.5"/>')
            place, anchor = (x(dot.x) + 8, "start") if at_right else (x(dot.x) - 8, "end")
            parts.append(_text(place, height + 3, dot.name, "label", anchor))
    return svg(parts, height=276, title=title)


def frontier(points: Iterable[Point]) -> list[Point]:
    """Of points (cost, worth) those that no cheaper one equals, cheapest first.

    >>> frontier([(3, 1), (1, 1), (2, 5), (4, 6)])
    [(1, 1), (2, 5), (4, 6)]
    """
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p[0], -p[1])):
        if not kept or point[1] > kept[-1][1]:
            kept.append(point)
    return kept


def silhouette(levels: Sequence[Level], *, title: str, row: float = 17.0) -> str:
    """The network from input to output: pale the outputs that a layer had, strong those it has, stage by stage."""
    most = max((n for lv in levels for n in (lv.before, *lv.after)), default=1)
    left = _label_room([lv.name for lv in levels])
    right = WIDTH - 10 - LETTER * max((len(lv.text) for lv in levels), default=0)
    middle, half = (left + right) / 2, (right - left) / 2
    top = 22.0
    parts = [_text(left, 11, "outputs", "axis"), _text(WIDTH, 11, "kept", "axis", "end")]
    parts.append(
        f'<line class="stem" x1="{middle:.1f}" x2="{middle:.1f}" y1="{top}" y2="{top + len(levels) * row:.1f}"/>'
    )
    for number, level in enumerate(levels):
        y = top + number * row
        parts.append(_name(level.name, y + row / 2, left))
        reach = max(half * level.before / most, 0.8)
        parts.append(_box("before", middle - reach, y + 1.5, 2 * reach, row - 3))
        strip = (row - 6) / max(len(level.after), 1)  # nothing stands where a block was left out
        for place, width in enumerate(level.after):
            reach = max(half * width / most, 0.8)
            gap = 0.7 if place else 0.0
            parts.append(
                _box(f"after f{level.tone}", middle - reach, y + 3 + place * strip + gap, 2 * reach, strip - gap)
            )
        parts.append(_text(WIDTH, y + row / 2 + 4, level.text, "label", "end"))
    return svg(parts, height=top + len(levels) * row + 4, title=title)


# -- parts


def svg(parts: Sequence[str], *, height: float, title: str) -> str:
    """One image with a title for those who cannot see it."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" xmlns="http://www.w3.org/2000/svg">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def figure_style() -> str:
    """The style of all charts, for a page that holds them."""
    return files("espalier.run").joinpath("figures.css").read_text(encoding="utf-8")


def as_file(chart: str) -> str:
    """The same chart as a file of its own: on white, its colours written out, as programs other than browsers need them."""
    style = figure_style()
    light = dict(re.findall(r"--(\w+):(#\w+)", style.partition("@media")[0]))
    rules = re.sub(r"var\(--(\w+)\)", lambda name: light[name[1]], style[style.index("svg {") :])
    head, mark, rest = chart.partition("</title>")
    wide, high = (int(n) + 2 * MARGIN for n in re.findall(r'viewBox="0 0 (\d+) (\d+)"', head)[0])
    frame = f'viewBox="{-MARGIN} {-MARGIN} {wide} {high}" width="{2 * wide}" height="{2 * high}"'
    head = re.sub(r'viewBox="[^"]*"', frame, head)
    ground = f'<rect x="{-MARGIN}" y="{-MARGIN}" width="{wide}" height="{high}" fill="{light["paper"]}"/>'
    return f"{head}{mark}<style>\n{rules}</style>{ground}{rest}\n"


MARGIN = 10


def _text(x: float, y: float, text: str, style: str, anchor: str = "start") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _box(style: str, x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="{style}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="1.5"/>'


LONGEST_NAME = 17


def _label_room(names: Sequence[str]) -> float:
    return 8 + LETTER * min(max((len(n) for n in names), default=0), LONGEST_NAME)


def _name(name: str, y: float, left: float) -> str:
    """A layer's name, its beginning cut off where it is long; the whole stands in its title."""
    short = name if len(name) <= LONGEST_NAME else f"…{name[-LONGEST_NAME + 1 :]}"
    return (
        f'<text class="label" x="{left - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">'
        f"<title>{escape(name)}</title>{escape(short)}</text>"
    )


def _horizontal_grid(values: Sequence[float], y: Callable[[float], float], left: float, right: float) -> list[str]:
    lines = []
    for value in values:
        at = y(value)
        lines.append(f'<line class="grid" x1="{left:.1f}" x2="{right:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>')
        lines.append(_text(left - 5, at + 4, _number(value), "axis", "end"))
    return lines
