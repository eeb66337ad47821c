"""What any plan would cost, exactly, without building it: MACs, parameters, peak activation memory.

Every cost is a sum of products of lengths; a length is linear in how many units each group keeps, or looked up in a table for
that number (``graph.ladders``).  So one evaluation is a few small matrix products.  One multiply-add is one MAC.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from espalier.graph import Graph, Term
from espalier.plan import Plan

METRICS = ("macs", "params", "activation_memory")


@dataclass(frozen=True)
class Cost:
    """Costs of one network at the traced input."""

    macs: int  # multiply-accumulates of one forward
    params: int  # elements of all parameters
    activation_memory: int  # peak bytes of live activations in an eval-mode forward, inputs included

    def fraction_of(self, dense: Cost) -> dict[str, float]:
        """This cost as fractions of ``dense``."""
        return {m: getattr(self, m) / max(getattr(dense, m), 1) for m in METRICS}


def cost(graph: Graph, plan: Plan | None = None) -> Cost:
    """Exact cost of the network that surgery would make of ``plan``; of the traced network without one.

    >>> import torch
    >>> from espalier import cost, trace
    >>> cost(trace(torch.nn.Linear(4, 3), torch.zeros(1, 4)))
    Cost(macs=12, params=15, activation_memory=28)
    """
    if plan is not None:
        plan.check(graph)
    return CostModel(graph).cost(graph.sizes if plan is None else plan.counts(graph))


class CostModel:
    """The cost of a graph as a function of ``keep``, the number of units each group keeps, shape ``(groups,)``."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        groups, extents = len(graph.groups), len(graph.extents)
        self._fixed = np.array([e.fixed for e in graph.extents] + [1.0])  # the last extent is the constant 1
        self._each = np.zeros((extents + 1, groups))
        for number, e in enumerate(graph.extents):
            for group, multiplicity in e.each:
                self._each[number, group] = multiplicity
        self._tables = self._pack_tables(extents + 1)
        stays = [t for t in graph.parameters if t.name not in graph.baked_away]
        self._baked_away = sum(int(np.prod(graph.shapes[n])) for n in graph.baked_away)
        self._terms = {"macs": self._pack([s.term for s in graph.sites]), "params": self._pack(stays)}
        self._touching = {m: [self._touched(p, g) for g in range(groups)] for m, p in self._terms.items()}
        moments = np.zeros((len(graph.activations), extents + 1))
        for row, moment in zip(moments, graph.activations, strict=True):
            for size, extent in moment:
                row[extent] += size
        self._live_fixed = moments @ self._fixed
        self._live_each = moments @ self._each  # bytes per kept unit at every moment, (moments, groups)
        self._live_tables = {g: moments @ table for g, table in self._tables.items()}  # (moments, size + 1)

    def _pack_tables(self, extents: int) -> dict[int, np.ndarray]:
        """Per group that has one: what every extent gains from it, shape ``(extents, size + 1)``."""
        tables: dict[int, np.ndarray] = {}
        for number, e in enumerate(self.graph.extents):
            for group, lengths in e.table:
                zeros = np.zeros((extents, self.graph.groups[group].size + 1))
                tables.setdefault(group, zeros)[number] += lengths
        return tables

    def lengths(self, keep: np.ndarray) -> np.ndarray:
        """Of every extent, the constant 1 last."""
        length = self._fixed + self._each @ keep
        for group, table in self._tables.items():
            length = length + table[:, keep[group]]
        return length

    def live(self, keep: np.ndarray) -> np.ndarray:
        """Bytes alive at every moment that could be the peak."""
        live = self._live_fixed + self._live_each @ keep
        for group, table in self._live_tables.items():
            live = live + table[:, keep[group]]
        return live

    def more_live(self, keep: np.ndarray, group: int, units: int) -> np.ndarray:
        """Bytes that every moment gains when ``group`` gains ``units``."""
        more = units * self._live_each[:, group]
        table = self._live_tables.get(group)
        return more if table is None else more + table[:, keep[group] + units] - table[:, keep[group]]

    def longer(self, keep: np.ndarray, group: int, units: int) -> np.ndarray:
        """What every extent gains when ``group`` gains ``units``."""
        more = units * self._each[:, group]
        table = self._tables.get(group)
        return more if table is None else more + table[:, keep[group] + units] - table[:, keep[group]]

    def _pack(self, terms: tuple[Term, ...] | list[Term]) -> tuple[np.ndarray, np.ndarray]:
        """Coefficients ``(terms,)`` and extent numbers ``(3, terms)``, equal products merged."""
        one = len(self._fixed) - 1
        merged: dict[tuple[int, ...], float] = {}
        for t in terms:
            key = tuple(sorted((*t.extents, *[one] * (3 - len(t.extents)))))
            merged[key] = merged.get(key, 0.0) + t.coefficient
        return np.array(list(merged.values())), np.array(list(merged), dtype=np.int64).reshape(-1, 3).T

    def _touched(self, packed: tuple[np.ndarray, np.ndarray], group: int) -> tuple[Any, ...]:
        coefficient, extents = packed
        moves = self._each[:, group] != 0
        table = self._tables.get(group)
        if table is not None:
            moves |= table.any(1)
        hit = np.flatnonzero(moves[extents].any(0))
        each = self._each[extents[:, hit], group]
        return coefficient[hit], extents[:, hit], each, None if table is None else table[extents[:, hit]]

    def cost(self, keep: np.ndarray) -> Cost:
        """Exact cost when group ``g`` keeps ``keep[g]`` units."""
        length = self.lengths(keep)
        amounts = {m: round(float((c * length[e].prod(0)).sum())) for m, (c, e) in self._terms.items()}
        if (keep == self.graph.sizes).all():  # what surgery would not touch keeps its computed weights
            amounts["params"] += self._baked_away
        return Cost(amounts["macs"], amounts["params"], round(float(self.live(keep).max(initial=0.0))))

    def at(self, keep: np.ndarray) -> CostState:
        """A state that can be moved unit by unit, cheaply."""
        return CostState(self, keep)


class CostState:
    """Costs at one ``keep``, updated as units come and go; every step costs only the terms it touches."""

    def __init__(self, model: CostModel, keep: np.ndarray) -> None:
        self._model = model
        self.keep = keep.astype(np.int64).copy()
        self._missing = int((model.graph.sizes - self.keep).sum())  # units that are gone
        self._length = model.lengths(self.keep)
        whole = model.cost(self.keep)
        self.amount = {"macs": float(whole.macs), "params": float(whole.params)}
        self._live = model.live(self.keep)

    @property
    def activation_memory(self) -> float:
        return float(self._live.max(initial=0.0))

    def value(self, metric: str) -> float:
        return self.activation_memory if metric == "activation_memory" else self.amount[metric]

    def change(self, metric: str, group: int, units: int) -> float:
        """How much ``macs`` or ``params`` grow when ``group`` gains ``units`` (negative: loses)."""
        coefficient, extents, each, table = self._model._touching[metric][group]
        before = self._length[extents]
        after = before + units * each
        if table is not None:
            after += table[..., self.keep[group] + units] - table[..., self.keep[group]]
        growth = float((coefficient * (after.prod(0) - before.prod(0))).sum())
        if metric == "params" and self._model._baked_away:  # there only while nothing at all is removed
            growth += self._model._baked_away * ((self._missing == units) - (self._missing == 0))
        return growth

    def peak_with(self, group: int, units: int) -> float:
        """Peak activation memory if ``group`` gained ``units``."""
        return float((self._live + self._model.more_live(self.keep, group, units)).max(initial=0.0))

    def excess_saved(self, group: int, units: int, limit: float) -> float:
        """Bytes above ``limit``, summed over all moments, that removing ``units`` of ``group`` would save."""
        over = np.maximum(self._live - limit, 0.0)
        return float(np.minimum(over, -self._model.more_live(self.keep, group, -units)).sum())

    def excess(self, limit: float) -> float:
        return float(np.maximum(self._live - limit, 0.0).sum())

    def move(self, group: int, units: int) -> None:
        """Let ``group`` gain ``units`` (negative: lose)."""
        for metric in self.amount:
            self.amount[metric] += self.change(metric, group, units)
        self._length += self._model.longer(self.keep, group, units)
        self._live += self._model.more_live(self.keep, group, units)
        self.keep[group] += units
        self._missing -= units
