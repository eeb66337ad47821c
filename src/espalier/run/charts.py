"""Charts of a run as SVG, drawn by matplotlib: in the report, beside a run's other files, and on the pages of results.

Text stays text, so that it is searched, read aloud and shown in the reader's font.  Colours are those of ``COLOURS`` and no
others: the report replaces them by variables of its style sheet, and the charts follow it into the dark.
matplotlib is imported when the first chart is drawn.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "paper": "#fefefe", "ink": "#1b1f24", "soft": "#5b6570", "rule": "#d9dee3", "pale": "#dfe5ea", "c0": "#0072b2",
    "c1": "#c2510a", "c2": "#00805c", "c3": "#a3457d", "c4": "#8a6d00", "c5": "#4b5a66",
}  # fmt: skip
TONES = [COLOURS[f"c{number}"] for number in range(6)]
MARKS = "osD^vP"
WIDTH = 5.0  # inches, of 72 units each
DRAWN = 60  # of a bundle: more curves than that are one grey smear
LONGEST_NAME = 24
Point = tuple[float, float]
Series = Mapping[str, list[list[float]]]
"""Layer, or another name, -> (progress or number, value) whenever the value changed."""


@dataclass(frozen=True)
class Line:
    """A named curve; ``dashed`` for limits, ``apart`` for points that no line joins; ``around`` are (low, high) of a band."""

    name: str
    points: tuple[Point, ...]
    tone: int = 0
    dashed: bool = False
    apart: bool = False
    around: tuple[Point, ...] = ()


@dataclass(frozen=True)
class Dot:
    """A run among others, or the mean of some, with what they vary by; hollow: a network that nothing was removed from."""

    name: str
    x: float
    y: float
    tone: int = 0
    hollow: bool = False
    error: float = 0.0


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
    """Curves over a common axis of whole numbers; ``logarithmic`` upwards, of numbers above 0.  Empty without a point."""
    lines = [line for line in lines if line.points]

    def paint(axes: Axes) -> None:
        for line in lines:
            (x, y), tone, alone = (
                zip(*line.points, strict=True),
                TONES[line.tone % 6],
                line.apart or len(line.points) == 1,
            )
            style, marker, width = ("none", "o", 2.0) if alone else ("--", "", 1.3) if line.dashed else ("-", "", 2.0)
            axes.plot(x, y, color=tone, linestyle=style, marker=marker, label=line.name or "_", linewidth=width)
            if line.around:
                low_edge, high_edge = zip(*line.around, strict=True)
                axes.fill_between(x, low_edge, high_edge, color=tone, alpha=0.2, linewidth=0)
        _levels(axes, low, high, logarithmic)

    return drawn(paint, title=title, x_label=x_label, y_label=y_label) if lines else ""


def bundle(curves: Mapping[str, tuple[Point, ...]], *, title: str, y_label: str, high: float | None = None) -> str:
    """Many curves by epoch; those that end lowest, in the middle and highest have a colour and their names."""
    ordered = sorted(curves, key=lambda name: curves[name][-1][1])[:DRAWN]
    if not ordered:
        return ""
    named = list(dict.fromkeys((ordered[-1], ordered[len(ordered) // 2], ordered[0])))

    def paint(axes: Axes) -> None:
        for name in [n for n in ordered if n not in named]:
            axes.plot(*zip(*curves[name], strict=True), color=COLOURS["soft"], linewidth=0.8, alpha=0.6)
        for tone, name in enumerate(named):
            axes.plot(*zip(*curves[name], strict=True), color=TONES[tone], label=name, linewidth=2.0)
        _levels(axes, 0, high, False)

    return drawn(paint, title=title, x_label="epoch", y_label=y_label)


def dot_chart(dots: Sequence[Dot], *, title: str, x_label: str, y_label: str, higher_is_better: bool = True) -> str:
    """Points with their names, and the frontier: as cheap as it and better there is none."""
    sign = 1 if higher_is_better else -1

    def paint(axes: Axes) -> None:
        best = [(x, sign * y) for x, y in frontier((d.x, sign * d.y) for d in dots)]
        axes.step(*zip(*best, strict=True), where="post", color=COLOURS["soft"], linestyle="--", linewidth=1.2)
        for dot in dots:
            fill = COLOURS["paper"] if dot.hollow else TONES[dot.tone % 6]
            edge = COLOURS["soft"] if dot.hollow else TONES[dot.tone % 6]
            axes.errorbar(
                dot.x, dot.y, yerr=dot.error or None, color=edge, markerfacecolor=fill, label=dot.name or "_", capsize=3,
                marker=MARKS[(dot.tone + dot.tone // 6) % 6], markersize=7, linestyle="none",
            )  # fmt: skip
        axes.set_xlim(0, 1.05 * max(100.0, *(d.x for d in dots)))

    return drawn(paint, title=title, x_label=x_label, y_label=y_label, height=3.4) if dots else ""


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


# -- what a method recorded on its way


def rank_bars(ranks: Series, full: Series) -> str:
    """Of every layer the rank at the end as a share of the full rank of the form that it has."""
    pairs = [(layer, points[-1][1], full[layer][-1][1]) for layer, points in ranks.items() if layer in full]

    def paint(axes: Axes) -> None:
        rows = range(len(pairs))
        axes.barh(rows, [1.0] * len(pairs), height=0.75, color=COLOURS["pale"])
        axes.barh(
            rows, [r / whole for _, r, whole in pairs], height=0.4, color=[TONES[int(r < w)] for _, r, w in pairs]
        )
        axes.set_yticks(rows, [n if len(n) <= LONGEST_NAME else f"…{n[1 - LONGEST_NAME :]}" for n, *_ in pairs])
        axes.set(xlim=(0, 1), ylim=(len(pairs) - 0.4, -0.6))
        axes.grid(False)
        for row, (_, rank, whole) in enumerate(pairs):
            words = f"{rank:g} of {whole:g}" if rank < whole else "whole"
            axes.text(1.02, row, words, va="center", transform=axes.get_yaxis_transform())

    height = 0.8 + 0.22 * len(pairs)
    return drawn(paint, title="Rank of every layer", x_label="share of the full rank", height=height) if pairs else ""


def stairs(series: Series, epochs: int) -> dict[str, tuple[Point, ...]]:
    """By epoch; a value holds until the next one."""
    found = {}
    for layer, points in series.items():
        corners = [(epochs * points[0][0], points[0][1])]
        for progress, value in points[1:]:
            corners += [(epochs * progress, corners[-1][1]), (epochs * progress, value)]
        found[layer] = (*corners, (float(epochs), points[-1][1]))
    return found


def gap_curve(gap: Series) -> str:
    """``|w - D(theta)| / |w|`` after every C step."""
    points = tuple((float(n), value) for n, (_, value) in enumerate(gap.get("all", []), 1) if value > 0)
    title, label = "Penalty gap by LC iteration", "|w − D(θ)| / |w|"
    return line_chart([Line("", points)], title=title, x_label="LC iteration", y_label=label, logarithmic=True)


def search_curve(search: Series) -> str:
    """The loss of every trial and the least so far; trials that failed stand at the top."""
    tried = tuple((n, loss) for n, loss in search.get("loss", []))
    if not tried:
        return ""
    best = stairs({"best": search["best"]}, 1)["best"][:-1]
    failed = tuple((n, max(loss for _, loss in tried)) for n, feasible in search["feasible"] if not feasible)
    lines = [
        Line("best", (*best, (search["feasible"][-1][0], best[-1][1])), 0),
        Line("trial", tried, 5, apart=True),
        Line("failed", failed, 1, apart=True),
    ]
    return line_chart(lines, title="Search for ranks by trial", x_label="trial", y_label="loss on held-out images")


# -- parts


def drawn(
    paint: Callable[[Axes], None], *, title: str, x_label: str = "", y_label: str = "", height: float = 2.9
) -> str:
    """One image with a title for those who cannot see it.  The same input gives the same bytes."""
    import matplotlib.style
    from matplotlib.figure import Figure

    # Salted by the title: two charts on a page must not define a shape under one name.
    with matplotlib.style.context(["default", {**_STYLE, "svg.hashsalt": title}]):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        axes.set(xlabel=x_label)
        axes.set_title(y_label, loc="left", fontsize=10, color=COLOURS["soft"])
        paint(axes)
        axes.spines[["top", "right", "left"]].set_visible(False)
        names = axes.get_legend_handles_labels()[1]
        if names:
            columns = max(1, min(len(names), 60 // (4 + max(map(len, names)))))
            figure.legend(loc="outside lower left", ncols=columns, frameon=False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same in every chart, and a page holds several
    svg = re.sub(r"\s*\n\s*", "\n", svg.replace("'DejaVu Sans', ", "system-ui, "))
    return svg.replace("<svg ", '<svg role="img" ', 1).replace(">", f"><title>{escape(title)}</title>", 1)


def _levels(axes: Axes, low: float | None, high: float | None, logarithmic: bool) -> None:
    """Whole numbers along, round ones upwards."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if logarithmic:
        axes.set_yscale("log")
        bottom, top = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if top < 300 * bottom else (1,)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        margin = 0.05 * (high or 0)
        axes.set_ylim(low, None if high is None else high + margin)


_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["soft"],
    "axes.edgecolor": COLOURS["rule"],
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": COLOURS["rule"],
    "xtick.color": COLOURS["rule"],
    "ytick.color": COLOURS["rule"],
    "xtick.labelcolor": COLOURS["soft"],
    "ytick.labelcolor": COLOURS["ink"],
    "ytick.major.size": 0,
    "lines.markersize": 5,
    "figure.facecolor": COLOURS["paper"],
    "axes.facecolor": "none",
}
