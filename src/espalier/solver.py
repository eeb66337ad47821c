"""The keep-set: the most important units that fit the budget.  Never above it, and nothing that still fits is left out."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.costs import COUNTS, LATENCY, Cost, CostModel, CostState
from espalier.graph import Frozen, Graph, Group
from espalier.graph.graph import CHANNELS
from espalier.graph.reasons import OUTPUT, WITH_FIXED, Reason
from espalier.plan import Budget, Plan


class BudgetError(ValueError):
    """The budget cannot be met; ``smallest`` is the smallest reachable cost."""

    def __init__(self, message: str, smallest: Cost) -> None:
        super().__init__(message)
        self.smallest = smallest


def solve(
    graph: Graph,
    importance: Mapping[str, np.ndarray],
    budget: Budget | Mapping[str, float],
    *,
    multiple_of: int | None = None,
    protect: np.ndarray | None = None,
    per_cost: bool = True,
    ceiling: Mapping[str, int] | None = None,
    floor: Mapping[str, int] | None = None,
    block_share: float = 1.0,
) -> Plan:
    """Maximise kept importance subject to every limit of ``budget``; at least one unit per group of ``graph`` stays.

    ``importance[group]`` has shape ``(units,)``, larger is more important, zero or more; a group without an entry is kept
    whole.  Of ``graph.alternatives`` it is what each option adds to the one below; options go from the top, and several at
    once where that gives up less per MAC saved than one by one (from dense to well below break-even rank). Of a block
    (``graph.blocks``) it is what the block is worth beyond its inner groups, whose units count only while it stays: leaving
    it out gives up ``block_share`` of all of them that are left, and saves what they cost by then. ``ceiling`` bounds the
    count of groups from above: what went in earlier decisions does not come back.  ``floor`` bounds it from below, inside of
    a block as long as the block stays. ``budget`` may also be absolute limits per metric.  ``multiple_of`` and ``protect``,
    boolean per group, are its own by default.  With ``per_cost=False`` the least important unit goes first, whatever it
    saves.  Time comes in steps: with a limit on latency a group gives up as many units at once as it takes to save some, and
    gets back what a step holds for nothing.

    Greedy on importance per exact marginal cost with lazy updates (removing units only makes other units cheaper to keep,
    so an old key is a lower bound), then a fill pass that gives back, best first, every block that still fits.  Where steps
    are large, as those of time, the last one may have saved far more than was needed: a step is taken back as long as others,
    which give up less in all, make room for it.

    Raises: BudgetError (a ValueError) with the smallest reachable cost if the budget cannot be met.
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
    if LATENCY in limits and dense.latency is None:
        raise ValueError(
            "no times are known of the forms that layers may take here: give a method that measures them (DPRP, SVDOneShot, "
            "TTLC, MGP, Joint) or needs none (TCP, Magnitude)"
        )
    values, orders = _sorted(graph, importance)
    steps = np.array([block_size(g, multiple_of or 1) for g in graph.groups], dtype=np.int64)
    timed = _all_timed(graph, multiple_of or 1, limits)
    lowest = np.array(
        [min(s, g.size) if t is None else t[0] for g, s, t in zip(graph.groups, steps, timed, strict=True)]
    )
    for number, group in enumerate(graph.groups):
        least, counts = (floor or {}).get(group.name, 0), timed[number]
        above = -(-least // steps[number]) * steps[number] if counts is None else _at_least(counts, least)
        lowest[number] = min(max(lowest[number], above), sizes[number])
        if group.name not in importance or (protect is not None and protect[number]):
            lowest[number] = sizes[number]
    blocks = _Inside(graph, block_share)
    for block, inner in blocks.inner.items():  # what has to stay keeps the block around it
        if protect is not None and any(protect[i] for i in inner):
            lowest[block] = sizes[block]
    highest = _highest(graph, ceiling)
    lowest = np.minimum(lowest, highest)
    advice = [
        "raise the budget",
        *(["protect less"] if protect is not None and protect.any() else []),
        *(["lower multiple_of"] if (multiple_of or 1) > 1 else []),
    ]
    _check_reachable(model, lowest, limits, dense, budget, " or ".join(advice))

    state = model.at(highest, metrics=limits)
    _remove(state, graph.groups, values, blocks, lowest, steps, limits, per_cost, timed)
    _fill(state, graph.groups, values, blocks, steps, highest, limits, timed)
    if LATENCY in limits and "activation_memory" not in limits:
        _exchange(state, graph.groups, values, blocks, lowest, steps, highest, limits, timed)
    for number in range(len(graph.groups)):
        if blocks.is_gone(number, state.keep):
            state.keep[number] = highest[number]  # gone with its block, and no decision
    keep = {g.name: np.sort(orders[i][: state.keep[i]]) for i, g in enumerate(graph.groups)}
    return Plan(keep, {g.name: g.size for g in graph.groups})


class _Inside:
    """Which groups are gone with which block."""

    def __init__(self, graph: Graph, share: float = 1.0) -> None:
        self.share = share
        self.inner = {graph.index[b.group]: graph.inner(b) for b in graph.blocks}
        # channels, selected inputs and kernel shapes are views of the same weights: one view is what they are worth
        own = {b: [i for i in inner if graph.groups[i].kind == CHANNELS] for b, inner in self.inner.items()}
        self.counted = {b: own[b] or inner for b, inner in self.inner.items()}
        self.around = {i: block for block, inner in self.inner.items() for i in inner}

    def is_gone(self, group: int, keep: np.ndarray) -> bool:
        """Is ``group`` inside of a block that is left out?"""
        return group in self.around and int(keep[self.around[group]]) < 2

    def worth(self, group: int, keep: np.ndarray, sums: list[np.ndarray]) -> float:
        """What a block is worth for its inner groups as they are at present; nothing for other groups."""
        return self.share * sum(float(sums[i][keep[i]]) for i in self.counted.get(group, ()))

    def units(self, group: int, keep: np.ndarray) -> int:
        """Of a block how many units there are in its inner groups, else none."""
        return sum(int(keep[i]) for i in self.counted.get(group, ()))


def _highest(graph: Graph, ceiling: Mapping[str, int] | None) -> np.ndarray:
    return np.array([min((ceiling or {}).get(g.name, g.size), g.size) for g in graph.groups], dtype=np.int64)


def _sorted(graph: Graph, importance: Mapping[str, np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Per group: running sums of importance, best unit first, shape ``(units + 1,)``, and the units in that order."""
    sums, orders = [], []
    for group in graph.groups:
        scores = np.asarray(importance.get(group.name, np.zeros(group.size)), dtype=np.float64)
        if scores.shape != (group.size,):
            raise ValueError(f"importance of {group.name!r} has shape {scores.shape}, expected ({group.size},)")
        if not np.isfinite(scores).all() or (scores < 0).any():
            raise ValueError(f"importance of {group.name!r} must be finite and not negative")
        order = np.arange(group.size) if group.options else np.argsort(-scores, kind="stable")
        orders.append(order)
        sums.append(np.concatenate([[0.0], np.cumsum(scores[order])]))
    for name in importance:
        graph.group(name)
    return sums, orders


def _check_reachable(
    model: CostModel,
    lowest: np.ndarray,
    limits: dict[str, float],
    dense: Cost,
    budget: Budget | Mapping[str, float],
    advice: str,
) -> None:
    smallest = model.cost(lowest)
    for metric, limit in limits.items():
        reached = getattr(smallest, metric)
        if reached > limit:
            total = getattr(dense, metric)
            if metric == LATENCY and isinstance(budget, Budget) and budget.profile is not None:
                total = (
                    budget.profile.dense
                )  # limits are shares of what was measured, predictions are put right by plans
            given = budget.get(metric) if isinstance(budget, Mapping) else getattr(budget, metric)
            count = type(given) is int and (
                isinstance(budget, Budget) or given < 0.01 * total
            )  # else it was a fraction
            is_share = count and 1 < limit <= 100  # is likely to be meant as one
            asked, least, whole = (f"{n:.3g} ms" if metric == LATENCY else f"{n:,}" for n in (limit, reached, total))
            raise BudgetError(
                f"budget {metric}={asked} cannot be met: the smallest reachable is {least} "
                f"({reached / total:.1%} of {whole}); {advice}"
                + ("; 1 is a count, a fraction is a float: 1.0 is the whole network" if count and limit == 1 else "")
                + (f'; {limit:g} is a count, for {limit:g} % give {limit / 100:g} or "{limit:g}%"' if is_share else "")
                + _frozen_too(model.graph.frozen),
                smallest,
            )


def _frozen_too(frozen: Sequence[Frozen]) -> str:
    """The reason that holds most channels, with where it lies in the model's code; outputs of the model are no news.

    Nor are inputs of layers that read what stays, as the image: where those channels are made, the reason is told.
    """
    frozen = [f for f in frozen if f.reason.text != OUTPUT and (f.dim != 1 or f.reason.text != WITH_FIXED)]
    if not frozen:
        return ""
    held: dict[Reason, int] = {}
    for channels in frozen:
        held[channels.reason] = held.get(channels.reason, 0) + channels.count
    most = max(held, key=lambda reason: held[reason])
    first = next(c.tensor for c in frozen if c.reason == most)
    held_in = len({c.tensor for c in frozen})
    return f". Channels of {held_in} tensors are frozen, most for this reason, {first} first: {most}"


def block_size(group: Group, multiple_of: int) -> int:
    """Units that come and go together so that widths stay multiples; alternatives are allowed options only."""
    return 1 if group.options else multiple_of // math.gcd(multiple_of, group.width)


def _lower(group: Group, keep: int, step: int, lowest: int, timed: np.ndarray | None) -> int | np.ndarray:
    """The next allowed count below ``keep``, a multiple of ``step``; of alternatives or ``timed`` counts all, from the top."""
    if timed is not None:
        return timed[(timed < keep) & (timed >= lowest)][::-1]
    return np.arange(keep - 1, lowest - 1, -1) if group.options else max(((keep - 1) // step) * step, lowest)


def _higher(group: Group, keep: int, step: int, highest: int, timed: np.ndarray | None) -> int | np.ndarray:
    """The next allowed count above ``keep``; of alternatives, or of ``timed`` counts: all of them, from the bottom."""
    if timed is not None:
        return np.append(timed[(timed > keep) & (timed < highest)], highest)
    return np.arange(keep + 1, highest + 1) if group.options else min((keep // step + 1) * step, highest)


def timed_counts(group: Group, grain: int, multiple_of: int = 1) -> np.ndarray:
    """Counts of a group at which times are known: multiples of ``grain`` channels, a half and a quarter of it, and all."""
    if group.options:
        return np.arange(1, group.size + 1)
    step, least = block_size(group, math.lcm(grain, multiple_of)), block_size(group, multiple_of)
    below = [step // n for n in (4, 2) if step % n == 0 and step // n % least == 0]
    counts = np.array([*below, *range(step, group.size + 1, step), group.size])
    return np.unique(counts[counts <= group.size])


def _at_least(counts: np.ndarray, least: int) -> int:
    return int(counts[min(int(np.searchsorted(counts, least)), len(counts) - 1)])


def _all_timed(graph: Graph, multiple_of: int, limits: Mapping[str, float]) -> Sequence[np.ndarray | None]:
    """Per group the counts that may be planned where time is limited; ``None`` where it is not."""
    if LATENCY not in limits:
        return [None] * len(graph.groups)
    return [timed_counts(g, graph.grain, multiple_of) for g in graph.groups]


def _remove(
    state: CostState,
    groups: Sequence[Group],
    sums: list[np.ndarray],
    blocks: _Inside,
    lowest: np.ndarray,
    steps: np.ndarray,
    limits: dict[str, float],
    per_cost: bool,
    timed: Sequence[np.ndarray | None],
) -> None:
    violated = {m for m in (*COUNTS, LATENCY) if m in limits and state.value(m) > limits[m]}
    weights: dict[str, float] = {}

    def saved(group: int, units: Any) -> Any:
        total = 0.0
        for metric, weight in weights.items():
            if metric == "activation_memory":
                total += weight * state.excess_saved(group, units, limits[metric])
            else:
                total -= weight * state.change(metric, group, -units)
        return total

    def offer(group: int) -> tuple[float, int]:
        """What the best step down gives up per cost saved, and the count it leads to."""
        keep = int(state.keep[group])
        lower = _lower(groups[group], keep, int(steps[group]), int(lowest[group]), timed[group])
        worth = sums[group][keep] - sums[group][lower] + blocks.worth(group, state.keep, sums)
        saving = saved(group, keep - lower)
        price = saving if per_cost else keep - lower + blocks.units(group, state.keep)
        if isinstance(lower, int):
            return (float(worth / price) if saving > 0 else math.inf), lower
        keys = np.divide(worth, price, out=np.full(len(lower), math.inf), where=saving > 0)
        best = int(keys.argmin())
        return float(keys[best]), int(lower[best])

    while violated:
        weights = {
            m: 1.0 / (state.excess(limits[m]) if m == "activation_memory" else state.value(m) - limits[m])
            for m in violated
        }
        heap = [
            (offer(g)[0], g)
            for g in range(len(groups))
            if state.keep[g] > lowest[g] and not blocks.is_gone(g, state.keep)
        ]
        heapq.heapify(heap)
        now = set(violated)
        while heap and now == violated:
            stale, group = heapq.heappop(heap)
            if state.keep[group] <= lowest[group] or blocks.is_gone(group, state.keep):
                continue
            fresh, lower = offer(group)
            if heap and fresh > heap[0][0] and fresh > stale:
                heapq.heappush(heap, (fresh, group))
                continue
            while True:  # as long as this group stays the best, it need not go through the heap
                state.move(group, lower - int(state.keep[group]))
                now = {m for m in violated if state.value(m) > limits[m]}
                if lower <= lowest[group]:
                    break
                fresh, lower = offer(group)
                if now != violated or (heap and (fresh, group) > heap[0]):
                    heapq.heappush(heap, (fresh, group))
                    break
            around = blocks.around.get(group)
            if around is not None and state.keep[around] > lowest[around]:
                heapq.heappush(heap, (offer(around)[0], around))  # worth less now: its old key is no lower bound
        violated = now


def _fill(
    state: CostState,
    groups: Sequence[Group],
    sums: list[np.ndarray],
    blocks: _Inside,
    steps: np.ndarray,
    highest: np.ndarray,
    limits: dict[str, float],
    timed: Sequence[np.ndarray | None],
) -> None:
    """Give back blocks, best importance per share of the limits first, until none fits.

    What does not fit now never fits later, because everything added makes it dearer.
    """

    def offer(group: int) -> tuple[float, int]:
        """The best step up that fits: minus its worth per cost, and its units; none is 0 units."""
        keep = int(state.keep[group])
        upper = _higher(groups[group], keep, int(steps[group]), int(highest[group]), timed[group])
        growth, fits = _growth(state, group, upper - keep, limits)
        worth = sums[group][upper] - sums[group][keep] + blocks.worth(group, state.keep, sums)
        if isinstance(upper, int):
            return (-float(worth / max(growth, TINY)), upper - keep) if fits else (math.inf, 0)
        keys = np.where(fits, -worth / np.maximum(growth, TINY), math.inf)
        best = int(keys.argmin())
        return float(keys[best]), int(upper[best]) - keep if keys[best] < math.inf else 0

    heap: list[tuple[float, int]] = []

    def consider(numbers: Iterable[int]) -> None:
        for number in numbers:
            if state.keep[number] < highest[number] and not blocks.is_gone(number, state.keep):
                worth, units = offer(number)
                if units:
                    heapq.heappush(heap, (worth, number))

    consider(range(len(groups)))
    while heap:
        stale, number = heapq.heappop(heap)
        fresh, units = offer(number)
        if not units:
            continue
        if heap and fresh > heap[0][0] and fresh > stale:
            heapq.heappush(heap, (fresh, number))
            continue
        state.move(number, units)
        consider(blocks.inner.get(number, ()))
        if state.keep[number] < highest[number]:
            heapq.heappush(heap, (fresh, number))


EXCHANGES = 16  # steps that are tried to take back, the best first
UNUSED = 0.01  # of the time: where less is left, nothing is exchanged


def _exchange(
    state: CostState,
    groups: Sequence[Group],
    sums: list[np.ndarray],
    blocks: _Inside,
    lowest: np.ndarray,
    steps: np.ndarray,
    highest: np.ndarray,
    limits: dict[str, float],
    timed: Sequence[np.ndarray | None],
) -> None:
    """Take a step back that does not fit, and make room with what gives up less, as long as there is such a step."""

    def gain(group: int) -> tuple[float, int]:
        """Importance by the next step up, and its units."""
        keep = int(state.keep[group])
        upper = int(np.min(_higher(groups[group], keep, int(steps[group]), int(highest[group]), timed[group])))
        return float(sums[group][upper] - sums[group][keep] + blocks.worth(group, state.keep, sums)), upper - keep

    def make_room(but: int, most: float) -> list[tuple[int, int]] | None:
        """Units of other groups that go for less than ``most`` importance; where that is too little, none, and ``None``."""
        moved: list[tuple[int, int]] = []
        while over := {m: state.value(m) - limit for m, limit in limits.items() if state.value(m) > limit}:
            best: tuple[float, float, int, int] = (math.inf, math.inf, 0, 0)
            for group in range(len(groups)):
                if group in kin[but] or state.keep[group] <= lowest[group] or blocks.is_gone(group, state.keep):
                    continue
                keep = int(state.keep[group])
                lower = np.atleast_1d(_lower(groups[group], keep, int(steps[group]), int(lowest[group]), timed[group]))
                worth = sums[group][keep] - sums[group][lower] + blocks.worth(group, state.keep, sums)
                useful = sum(np.minimum(-state.change(m, group, lower - keep), x) / x for m, x in over.items())
                keys = np.divide(worth, useful, out=np.full(len(lower), math.inf), where=useful > TINY)
                least = int(keys.argmin())
                best = min(best, (float(keys[least]), float(worth[least]), group, int(lower[least]) - keep))
            key, worth_of_best, group, units = best
            most -= worth_of_best
            if key == math.inf or most <= 0:
                for number, went in reversed(moved):
                    state.move(number, -went)
                return None
            state.move(group, units)
            moved.append((group, units))
        return moved

    kin = {g: {g, blocks.around.get(g, g), *blocks.inner.get(g, ())} for g in range(len(groups))}
    found = True
    while found and state.value(LATENCY) < (1.0 - UNUSED) * limits[LATENCY]:
        able = [g for g in range(len(groups)) if state.keep[g] < highest[g] and not blocks.is_gone(g, state.keep)]
        steps_up = sorted(((*gain(g), g) for g in able), reverse=True)
        found = False
        for worth, units, group in steps_up[:EXCHANGES]:
            state.move(group, units)
            if make_room(group, worth) is None:
                state.move(group, -units)
                continue
            _fill(state, groups, sums, blocks, steps, highest, limits, timed)
            found = True
            break


def _growth(state: CostState, group: int, units: Any, limits: Mapping[str, float]) -> tuple[Any, Any]:
    """Shares of the limits that ``units`` more of ``group`` would take, added up, and whether they fit."""
    growth, fits = 0.0, True
    for metric, limit in limits.items():
        if metric == "activation_memory":
            added = state.peak_with(group, units) - state.activation_memory
        else:
            added = state.change(metric, group, units)
        fits = fits & (state.value(metric) + added <= limit)
        growth += added / limit
    return growth, fits


TINY = 1e-30


def unused_blocks(graph: Graph, plan: Plan, budget: Budget, *, ceiling: Mapping[str, int] | None = None) -> list[str]:
    """Groups that could still take one more block without leaving ``budget``: empty for every plan of ``solve``."""
    highest = _highest(graph, ceiling)
    model = CostModel(graph)
    limits = budget.limits(model.cost(graph.sizes))
    state = model.at(plan.counts(graph), metrics=limits)
    blocks = _Inside(graph)
    timed = _all_timed(graph, budget.multiple_of, limits)
    return [
        group.name
        for number, group in enumerate(graph.groups)
        for keep in [int(state.keep[number])]
        if keep < highest[number] and not blocks.is_gone(number, state.keep)
        for step in [block_size(group, budget.multiple_of)]
        for more in [_higher(group, keep, step, int(highest[number]), timed[number]) - keep]
        if np.any(_growth(state, number, more, limits)[1])
    ]
