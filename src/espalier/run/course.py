"""Figures of what a method recorded on its way (``history.json``), as SVG; for the report and as files in the run's folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from espalier.run.charts import Line, Pair, as_file, bundle, line_chart, pair_bars
from espalier.run.rundir import GAP, RANKS, SEARCH, write_file

Series = Mapping[str, list[list[float]]]
"""Layer, or another name, -> (progress or number, value) whenever the value changed."""

FACTORISED = 1  # tone of such layers


def write_figures(folder: Path, history: Mapping[str, Series]) -> None:
    """Write those for which there is something to draw; a method that records nothing of the kind writes none."""
    charts = {
        RANKS: rank_bars(history.get("rank", {}), history.get("full rank", {})),
        GAP: gap_curve(history.get("gap", {})),
        SEARCH: search_curve(history.get("search", {})),
    }
    for name, chart in charts.items():
        if chart:
            write_file(folder / name, as_file(chart).encode())


def rank_bars(ranks: Series, full: Series) -> str:
    """Of every layer the rank at the end as a share of the full rank of the form that it has."""
    pairs = []
    for layer, points in ranks.items():
        if layer in full:
            rank, whole = points[-1][1], full[layer][-1][1]
            low = rank < whole
            pairs.append(
                Pair(layer, 1.0, rank / whole, f"{rank:g} of {whole:g}" if low else "whole", FACTORISED if low else 0)
            )
    return pair_bars(pairs, title="Rank of every layer", unit="share of the full rank", head="rank") if pairs else ""


def rank_history(ranks: Series, *, epochs: int) -> str:
    """The rank of every layer by epoch; a rank holds until the next one."""
    stairs = {}
    for layer, points in ranks.items():
        corners = [(epochs * points[0][0], points[0][1])]
        for progress, rank in points[1:]:
            corners += [(epochs * progress, corners[-1][1]), (epochs * progress, rank)]
        stairs[layer] = (*corners, (float(epochs), points[-1][1]))
    return bundle(stairs, title="Ranks by epoch", y_label="rank", high=None)


def gap_curve(gap: Series) -> str:
    """``|w - D(theta)| / |w|`` after every C step."""
    points = tuple((float(n), value) for n, (_, value) in enumerate(gap.get("all", []), 1) if value > 0)
    if not points:
        return ""
    return line_chart(
        [Line("", points)], title="Penalty gap by LC iteration", x_label="LC iteration", y_label="|w − D(θ)| / |w|",
        logarithmic=True,
    )  # fmt: skip


def search_curve(search: Series) -> str:
    """The loss of every trial and the least so far; trials that failed stand at the top."""
    tried = [(n, loss) for n, loss in search.get("loss", [])]
    failed = [n for n, feasible in search.get("feasible", []) if not feasible]
    if not tried:
        return ""
    stairs: list[tuple[float, float]] = []
    for number, best in search["best"]:
        stairs += [(number, stairs[-1][1])] if stairs else []
        stairs.append((number, best))
    stairs.append((search["feasible"][-1][0], stairs[-1][1]))
    top = max(loss for _, loss in tried)
    lines = [
        Line("best", tuple(stairs), 0),
        Line("trial", tuple(tried), 5, apart=True),
        Line("failed", tuple((n, top) for n in failed), 1, apart=True),
    ]
    return line_chart(lines, title="Search for ranks by trial", x_label="trial", y_label="loss on held-out images")
