"""The keep-set: the most important units that fit the budget.  Never above it, and nothing that still fits is left out."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping

import numpy as np

from espalier.costs import METRICS, Cost, CostModel, CostState
from espalier.graph import Graph
from espalier.plan import Budget, Plan


class BudgetError(ValueError):
    """The budget cannot be met; ``smallest`` is the smallest reachable cost."""

    def __init__(self, message: str, smallest: Cost) -> None:
        super().__init__(message)
        self.smallest = smallest


def solve(
    graph: Graph,
    importance: Mapping[str, np.ndarray],
    budget: Budget | Mapping[str, int],
    *,
    multiple_of: int | None = None,
    protect: np.ndarray | None = None,
    per_cost: bool = True,
) -> Plan:
    """Maximise kept importance subject to every limit of ``budget``; at least one unit per group stays.

    ``importance[group]`` has shape ``(units,)``, larger is more important, zero or more; a group without an entry is
    kept whole.  ``budget`` may also be absolute limits per metric.  With ``per_cost=False`` the least important unit goes
    first, whatever it saves.

    Greedy on importance per exact marginal cost with lazy updates (removing units only makes other units cheaper to keep,
    so an old key is a lower bound), then a fill pass that gives back, best first, every block that still fits.

    Raises ``BudgetError`` (a ``ValueError``) with the smallest reachable cost if the budget cannot be met.
    """
    model = CostModel(graph)
    sizes = graph.sizes
    dense = model.cost(sizes)
    if isinstance(budget, Budget):
        limits = budget.limits(dense)
        multiple_of = budget.multiple_of if multiple_of is None else multiple_of
        protect = budget.protected(graph) if protect is None else protect
    else:
        limits = dict(budget)
    values, orders = _sorted(graph, importance)
    steps = np.array([(multiple_of or 1) // math.gcd(multiple_of or 1, g.width) for g in graph.groups], dtype=np.int64)
    lowest = np.minimum(steps, sizes)
    for number, group in enumerate(graph.groups):
        if group.name not in importance or (protect is not None and protect[number]):
            lowest[number] = sizes[number]
    _check_reachable(model, lowest, limits, dense)

    state = model.at(sizes)
    _remove(state, values, lowest, steps, sizes, limits, per_cost)
    _fill(state, values, steps, sizes, limits)
    keep = {g.name: np.sort(orders[i][: state.keep[i]]) for i, g in enumerate(graph.groups)}
    return Plan(keep, {g.name: g.size for g in graph.groups})


def _sorted(graph: Graph, importance: Mapping[str, np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Per group: running sums of importance, best unit first, shape ``(units + 1,)``, and the units in that order."""
    sums, orders = [], []
    for group in graph.groups:
        scores = np.asarray(importance.get(group.name, np.ones(group.size)), dtype=np.float64)
        if scores.shape != (group.size,):
            raise ValueError(f"importance of {group.name!r} has shape {scores.shape}, expected ({group.size},)")
        if not np.isfinite(scores).all() or (scores < 0).any():
            raise ValueError(f"importance of {group.name!r} must be finite and not negative")
        order = np.argsort(-scores, kind="stable")
        orders.append(order)
        sums.append(np.concatenate([[0.0], np.cumsum(scores[order])]))
    for name in importance:
        graph.group(name)
    return sums, orders


def _check_reachable(model: CostModel, lowest: np.ndarray, limits: dict[str, int], dense: Cost) -> None:
    smallest = model.cost(lowest)
    for metric, limit in limits.items():
        reached = getattr(smallest, metric)
        if reached > limit:
            total = getattr(dense, metric)
            raise BudgetError(
                f"budget {metric}={limit:,} cannot be met: the smallest reachable is {reached:,} "
                f"({reached / total:.1%} of {total:,}); raise the budget, protect less, or lower multiple_of",
                smallest,
            )


def _down(keep: int, step: int, size: int) -> int:
    """The next allowed count below ``keep``: multiples of ``step``, and the whole ``size``."""
    return ((keep - 1) // step) * step


def _up(keep: int, step: int, size: int) -> int:
    return min((keep // step + 1) * step, size)


def _remove(
    state: CostState,
    sums: list[np.ndarray],
    lowest: np.ndarray,
    steps: np.ndarray,
    sizes: np.ndarray,
    limits: dict[str, int],
    per_cost: bool,
) -> None:
    violated = {m for m in METRICS if m in limits and state.value(m) > limits[m]}
    weights: dict[str, float] = {}

    def key(group: int) -> float:
        keep = int(state.keep[group])
        lower = max(_down(keep, int(steps[group]), int(sizes[group])), int(lowest[group]))
        saved = 0.0
        for metric, weight in weights.items():
            if metric == "activation_memory":
                saved += weight * state.excess_saved(group, keep - lower, limits[metric])
            else:
                saved -= weight * state.change(metric, group, lower - keep)
        worth = float(sums[group][keep] - sums[group][lower])
        if saved <= 0:
            return math.inf
        return worth / saved if per_cost else worth / (keep - lower)

    while violated:
        weights = {
            m: 1.0 / (state.excess(limits[m]) if m == "activation_memory" else state.value(m) - limits[m])
            for m in violated
        }
        heap = [(key(g), g) for g in range(len(sizes)) if state.keep[g] > lowest[g]]
        heapq.heapify(heap)
        now = set(violated)
        while heap and now == violated:
            stale, group = heapq.heappop(heap)
            fresh = key(group)
            if heap and fresh > heap[0][0] and fresh > stale:
                heapq.heappush(heap, (fresh, group))
                continue
            keep = int(state.keep[group])
            lower = max(_down(keep, int(steps[group]), int(sizes[group])), int(lowest[group]))
            state.move(group, lower - keep)
            if lower > lowest[group]:
                heapq.heappush(heap, (key(group), group))
            now = {m for m in violated if state.value(m) > limits[m]}
        violated = now


def _fill(
    state: CostState, sums: list[np.ndarray], steps: np.ndarray, sizes: np.ndarray, limits: dict[str, int]
) -> None:
    """Give back blocks, best importance per share of the limits first, until none fits.

    What does not fit now never fits later, because everything added makes it dearer.
    """

    def step(group: int) -> tuple[float, int]:
        keep = int(state.keep[group])
        upper = _up(keep, int(steps[group]), int(sizes[group]))
        growth = 0.0
        for metric, limit in limits.items():
            if metric == "activation_memory":
                added = state.peak_with(group, upper - keep) - state.activation_memory
            else:
                added = state.change(metric, group, upper - keep)
            if state.value(metric) + added > limit:
                return math.inf, 0
            growth += added / limit
        return -float(sums[group][upper] - sums[group][keep]) / max(growth, 1e-30), upper - keep

    heap = []
    for group in range(len(sizes)):
        if state.keep[group] < sizes[group]:
            worth, units = step(group)
            if units:
                heap.append((worth, group))
    heapq.heapify(heap)
    while heap:
        stale, group = heapq.heappop(heap)
        fresh, units = step(group)
        if not units:
            continue
        if heap and fresh > heap[0][0] and fresh > stale:
            heapq.heappush(heap, (fresh, group))
            continue
        state.move(group, units)
        if state.keep[group] < sizes[group]:
            heapq.heappush(heap, (fresh, group))


def unused_blocks(graph: Graph, plan: Plan, budget: Budget) -> list[str]:
    """Groups that could still take one more block without leaving ``budget``: empty for every plan of ``solve``."""
    model = CostModel(graph)
    limits = budget.limits(model.cost(graph.sizes))
    keep = plan.counts(graph)
    state = model.at(keep)
    found = []
    for number, group in enumerate(graph.groups):
        step = budget.multiple_of // math.gcd(budget.multiple_of, group.width)
        upper = _up(int(keep[number]), step, group.size)
        if upper == keep[number]:
            continue
        units = upper - int(keep[number])
        amounts = {m: state.value(m) + state.change(m, number, units) for m in limits if m != "activation_memory"}
        if "activation_memory" in limits:
            amounts["activation_memory"] = state.peak_with(number, units)
        if all(amounts[m] <= limits[m] for m in limits):
            found.append(group.name)
    return found
