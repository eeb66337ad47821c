"""From runs to their charts: which numbers go where, in which unit.  An empty string where there are none of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from espalier.graph.alternatives import alternatives_name
from espalier.present.runs import FinishedRun
from espalier.run.charts import (
    Dot,
    Line,
    Point,
    bundle,
    dot_chart,
    gap_curve,
    line_chart,
    rank_bars,
    search_curve,
    stairs,
)
from espalier.run.report import places
from espalier.tasks import Metric

COST_WORDS = {"macs": "MACs", "params": "parameters", "activation_memory": "activation memory"}
AXES = {"macs": "MACs", "params": "parameters", "time": "time"}
Figure = tuple[str, str, str]
"""Title, caption, chart."""


@dataclass(frozen=True)
class Seeds:
    """Runs of one setting, which differ in their seeds."""

    name: str
    runs: tuple[FinishedRun, ...]

    @property
    def first(self) -> FinishedRun:
        return self.runs[0]

    def values(self, of: Callable[[FinishedRun], float | None]) -> list[float]:
        """Of all runs; empty where one has none."""
        found = [of(run) for run in self.runs]
        return [] if None in found else [value for value in found if value is not None]

    def mean(self, of: Callable[[FinishedRun], float | None]) -> float | None:
        values = self.values(of)
        return mean(values) if values else None

    def told(self, of: Callable[[FinishedRun], float | None]) -> str:
        """A score: mean ± standard deviation over seeds; of one run ± its binomial error, where it has one."""
        values = self.values(of)
        if not values:
            return "–"
        around = stdev(values) if len(values) > 1 else self.first.error(values[0])
        digits = places(self.first.metric)
        return f"{mean(values):.{digits}f}{'' if around is None else f' ± {around:.{digits}f}'}"


def unit_of(metric: Metric) -> str:
    """``accuracy, per cent``."""
    unit = {"%": "per cent"}.get(metric.unit, metric.unit)
    return f"{metric.words}, {unit}" if unit else metric.words


# -- one run

_KERNELS = "Positions that the keep-set leaves of a kernel, cut once it is final. Layers that keep all are not drawn."


def figures_of(run: FinishedRun) -> list[Figure]:
    """Those for which there is something to draw."""
    history, epochs = run.history, max(run.metrics["epochs"], 1)
    ranks, full, gap, search = (history.get(kind, {}) for kind in ("rank", "full rank", "gap", "search"))
    kernels = {n: p for n, p in history.get("kernel", {}).items() if len({v for _, v in p}) > 1}
    by_epoch = bundle(stairs(ranks, epochs), title="Ranks by epoch", y_label="rank")
    of_kernels = bundle(stairs(kernels, epochs), title="Kernel positions by epoch", y_label="positions")
    found = [
        (run.metric.words.capitalize(), "Training images are augmented, and seen before the step.", score_curves(run)),
        ("The budget closing in", "Cost of the network as it was executed; dashed: the limits.", cost_curves(run)),
        ("Pressure", "What is to go and is still felt, and how hard the method presses.", pressure_curves(run)),
        ("Loss", "Training: what was minimised, distillation and penalty included.", loss_curves(run)),
        ("Width of every group over time", "Kept units as a share of what the group had.", width_history(run)),
        ("Penalty gap", "How far the weights are from their compressed form.", gap_curve(gap)),
        ("Search for ranks", "Every trial is within the budget, or failed.", search_curve(search)),
        (
            "Rank of every layer",
            "Pale: full. Strong: kept; of several ranks of a form the least.",
            rank_bars(ranks, full),
        ),
        ("Rank of every layer over time", "Lowest, middle and highest have their names.", by_epoch),
        ("Kernel of every layer over time", _KERNELS, of_kernels),
    ]
    return [figure for figure in found if figure[2]]


def score_curves(run: FinishedRun) -> str:
    lines = [_curve(run, run.metric.name, "test", 0)]
    if run.metric.name == "accuracy":
        lines.append(_curve(run, "train_accuracy", "training", 1))
    if (dense := run.dense_score) is not None:
        lines.append(Line("dense", tuple((run.epochs[n]["epoch"], dense) for n in (0, -1)), 5, dashed=True))
    title = f"{run.metric.words.capitalize()} by epoch"
    return line_chart(lines, title=title, x_label="epoch", y_label=unit_of(run.metric))


def loss_curves(run: FinishedRun) -> str:
    lines = [_curve(run, "test_loss", "test", 0), _curve(run, "loss", "training", 1)]
    return line_chart(lines, title="Loss by epoch", x_label="epoch", y_label="loss", low=0)


def cost_curves(run: FinishedRun) -> str:
    """Every cost that has a limit, as a share of the dense network, from the dense network on."""
    lines = []
    for tone, (cost, name) in enumerate(COST_WORDS.items()):  # time is measured at the end
        points = _share(run, cost) if cost in run.metrics["limits"] else ()
        if points:
            limit = 100 * run.metrics["limits"][cost] / run.metrics["dense"][cost]
            lines.append(Line(name, points, tone))
            ends = tuple((epoch, limit) for epoch, _ in (points[0], points[-1]))
            lines.append(Line(f"limit {limit:.3g}", ends, tone, dashed=True))
    title = "Cost by epoch"
    return line_chart(lines, title=title, x_label="epoch", y_label="per cent of the dense network", low=0, high=100)


def pressure_curves(run: FinishedRun) -> str:
    lines = [_curve(run, "remaining", "remaining", 3), _curve(run, "strength", "strength", 4)]
    return line_chart(lines, title="Remaining mass and strength by epoch", x_label="epoch", y_label="share", low=0)


def width_history(run: FinishedRun) -> str:
    """The groups that changed, as shares of their widest."""
    changed = {g: points for g, points in run.widths.items() if len({n for _, n in points}) > 1}
    shares = {
        g.removesuffix(alternatives_name("")): tuple((float(e), 100 * n / max(m for _, m in points)) for e, n in points)
        for g, points in changed.items()
    }
    return bundle(shares, title="Kept units by epoch", y_label="per cent of the group", high=100)


def _curve(run: FinishedRun, column: str, name: str, tone: int) -> Line:
    return Line(name, tuple((e["epoch"], e[column]) for e in run.epochs if column in e), tone)


def _share(run: FinishedRun, cost: str) -> tuple[Point, ...]:
    whole = run.metrics["dense"][cost]
    points = [(e["epoch"], 100 * e[cost] / whole) for e in run.epochs if cost in e]
    return ((0.0, 100.0), *points) if points else ()


# -- several runs


def figures_of_all(groups: Sequence[Seeds], runtime: str | None) -> list[Figure]:
    """The metric against every cost, and curves over one another, means over seeds with the deviation around them."""
    metric = groups[0].first.metric
    name = metric.words.capitalize()
    hollow, band = "Hollow: dense. Dashed: the frontier.", "Means over seeds; the band is ± their standard deviation."
    found = [(f"{name} against {axis}", hollow, _trade_off(groups, cost, runtime)) for cost, axis in AXES.items()]
    curves: dict[str, tuple[str, Callable[[FinishedRun], Sequence[Point]]]] = {
        name: (unit_of(metric), lambda run: _curve(run, metric.name, "", 0).points),
        "Multiply-adds": ("per cent of the dense network", lambda run: _share(run, "macs")),
        "Test loss": ("loss", lambda run: _curve(run, "test_loss", "", 0).points),
    }
    for title, (label, points_of) in curves.items():
        lines = [_mean_line(g.name, [points_of(run) for run in g.runs], tone) for tone, g in enumerate(groups)]
        chart = line_chart(lines, title=f"{title} by epoch, all runs", x_label="epoch", y_label=label)
        found.append((f"{title} by epoch", band, chart))
    return [figure for figure in found if figure[2]]


def _mean_line(name: str, curves: Sequence[Sequence[Point]], tone: int) -> Line:
    """Over the epochs that all curves have."""
    by_epoch = [dict(points) for points in curves]
    values = {x: [points[x] for points in by_epoch] for x in by_epoch[0] if all(x in points for points in by_epoch)}
    around = tuple((mean(v) - stdev(v), mean(v) + stdev(v)) for v in values.values()) if len(curves) > 1 else ()
    return Line(name, tuple((x, mean(v)) for x, v in values.items()), tone, around=around)


def _trade_off(groups: Sequence[Seeds], cost: str, runtime: str | None) -> str:
    """The metric against what is left of ``cost``, or of the "time" in ``runtime`` at batch 1; ± over seeds."""
    metric = groups[0].first.metric
    dots = []
    for tone, group in enumerate(groups):
        left = group.mean(lambda r: time_left(r, runtime) if cost == "time" else r.metrics["fraction"][cost])
        scores = group.values(lambda r: r.score)
        if left is not None and scores:
            error = stdev(scores) if len(scores) > 1 else 0.0
            dots.append(Dot(group.name, 100 * left, mean(scores), tone, hollow=group.first.is_dense, error=error))
    if not any(group.first.is_dense for group in groups):
        known = {score for group in groups for run in group.runs if (score := run.dense_score) is not None}
        dots += [
            Dot("" if n else "dense", 100.0, score, 5, hollow=True) for n, score in enumerate(sorted(known)) if dots
        ]
    x_label = f"{AXES[cost]} left, per cent of the dense network"
    title, upwards = f"{metric.words.capitalize()} against {AXES[cost]}", metric.higher_is_better
    return dot_chart(dots, title=title, x_label=x_label, y_label=f"test {unit_of(metric)}", higher_is_better=upwards)


def time_left(run: FinishedRun, runtime: str | None) -> float | None:
    """Of the dense network's, at batch 1; a network that nothing was removed from takes all of it."""
    times = run.times(runtime or "")
    return 1.0 if run.is_dense else 1 / times[1][1]["speedup"] if 1 in times else None
