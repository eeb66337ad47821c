"""What any plan would cost, exactly, without building it: MACs, parameters, peak activation memory.

Every cost is a sum of products of lengths; a length is linear in how many units each group keeps, or looked up in a table for
that number (``graph.alternatives``).  So one evaluation is a few small matrix products.  One multiply-add is one MAC.
Latency is a sum over tables of lengths, where the graph has them (``espalier.timing``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from espalier.graph import Graph, Term
from espalier.plan import Plan

COUNTS = ("macs", "params", "activation_memory")
LATENCY = "latency"

FACTORS = 4  # a term is a product of at most so many extents
Touched = tuple[float, int, int, int, int, float, float, float, float]
"""A term seen from one group: coefficient, its four extents, and how many positions each has per unit of the group."""


@dataclass(frozen=True)
class Cost:
    """Costs of one network at the traced input."""

    macs: int  # multiply-accumulates of one forward
    params: int  # elements of all parameters
    activation_memory: int  # peak bytes of live activations in an eval-mode forward, inputs included
    latency: float | None = field(default=None, repr=False)  # milliseconds as predicted from a profile, if there is one

    @property
    def counts(self) -> dict[str, int]:
        """What is counted, by name: everything but time."""
        return {m: getattr(self, m) for m in COUNTS}

    def fraction_of(self, dense: Cost) -> dict[str, float]:
        """This cost as fractions of ``dense``."""
        return {m: getattr(self, m) / max(getattr(dense, m), 1) for m in COUNTS}


def cost(graph: Graph, plan: Plan | None = None) -> Cost:
    """Exact cost of the network that surgery would make of ``plan``; of the traced network, whose ``graph`` it is, without one.

    Raises: ValueError for a plan of another graph.

    >>> import torch
    >>> from espalier import cost, trace
    >>> cost(trace(torch.nn.Linear(4, 3), torch.zeros(1, 4)))
    Cost(macs=12, params=15, activation_memory=28)
    """
    if not isinstance(graph, Graph):
        raise ValueError(
            f"cost: expected what es.trace returns, got a {type(graph).__name__}: es.cost(es.trace(model, x))"
        )
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
        self._looked_up: dict[int, list[tuple[int, np.ndarray]]] = {g: [] for g in self._tables}
        for number, e in enumerate(graph.extents):  # of a table most rows say nothing
            for group in dict.fromkeys(g for g, _ in e.table):
                lengths = self._tables[group][number]
                if lengths.any():
                    self._looked_up[group].append((number, lengths))
        stays = [t for t in graph.parameters if t.name not in graph.baked_away]
        elements = {n: int(np.prod(graph.shapes[n])) for n in (*graph.baked_away, *graph.baked_new)}
        self._baked_away = sum(elements[n] for n in graph.baked_away) - sum(elements[n] for n in graph.baked_new)
        self._terms = {"macs": self._pack([s.term for s in graph.sites]), "params": self._pack(stays)}
        self.touching = {m: self._touched(p) for m, p in self._terms.items()}
        self._times = [(s.time, s.term.extents) for s in graph.sites if s.time is not None]
        depends = [e.groups for e in graph.extents]
        self.timed: list[list[int]] = [[] for _ in range(groups)]  # per group: which of the times change with it
        for number, (_, own) in enumerate(self._times):
            for group in set().union(*(depends[e] for e in own)):
                self.timed[group].append(number)
        self.moving: list[list[tuple[int, float]]] = [
            [] for _ in range(groups)
        ]  # per group (extent, positions per unit)
        for number, e in enumerate(graph.extents):
            for group, multiplicity in e.each:
                self.moving[group].append((number, float(multiplicity)))
        gates = {b.module: graph.index[b.group] for b in graph.blocks}
        # per moment the group of the block without which it would not be, or -1
        self._gate = np.array(
            [_gate_of(n, gates) for n in (*graph.inside, *[""] * (len(graph.activations) - len(graph.inside)))],
            dtype=np.int64,
        )
        self._gated = {g: np.flatnonzero(self._gate == g) for g in gates.values()}
        moments = np.zeros((len(graph.activations), extents + 1))
        for row, moment in zip(moments, graph.activations, strict=True):
            for size, extent in moment:
                row[extent] += size
        self._live_fixed = moments @ self._fixed
        self._live_each = moments @ self._each  # bytes per kept unit at every moment, (moments, groups)
        self._live_of = np.ascontiguousarray(self._live_each.T)  # the same by group
        self._live_tables = {g: (moments @ table).T for g, table in self._tables.items()}  # (size + 1, moments)

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
        """Bytes alive at every moment that could be the peak; none at those inside of blocks that are left out."""
        live = self._live_fixed + self._live_each @ keep
        for group, table in self._live_tables.items():
            live = live + table[keep[group]]
        for group, rows in self._gated.items():
            if keep[group] < 2:
                live[rows] = 0.0
        return live

    def more_live(self, keep: np.ndarray, group: int, units: Any) -> np.ndarray:
        """Bytes that every moment gains when ``group`` gains ``units``, ``(moments,)``; ``(k, moments)`` for ``(k,)``."""
        more: np.ndarray = np.multiply.outer(units, self._live_of[group])
        table = self._live_tables.get(group)
        if table is not None:
            more = more + table[keep[group] + units] - table[keep[group]]
        for gate, rows in self._gated.items():
            if gate == group:
                there = keep.copy()
                there[gate] = 2
                whole = self.live(there)[rows]
                more[..., rows] = np.multiply.outer((keep[gate] + units > 1) * 1.0 - (keep[gate] > 1), whole)
            elif keep[gate] < 2:
                more[..., rows] = 0.0
        return more

    def longer(self, keep: np.ndarray, group: int, units: Any) -> dict[int, Any]:
        """What every extent that changes gains when ``group`` gains ``units``, a number or many, each by itself."""
        more = {extent: units * each for extent, each in self.moving[group]}
        for extent, lengths in self._looked_up.get(group, ()):
            more[extent] = more.get(extent, 0.0) + (lengths[keep[group] + units] - lengths[keep[group]])
        return more

    def has_table(self, group: int) -> bool:
        """Is it a group of alternatives, whose lengths are looked up?"""
        return group in self._tables

    def _pack(self, terms: tuple[Term, ...] | list[Term]) -> tuple[np.ndarray, np.ndarray]:
        """Coefficients ``(terms,)`` and extent numbers ``(FACTORS, terms)``, equal products merged."""
        one = len(self._fixed) - 1
        merged: dict[tuple[int, ...], float] = {}
        for t in terms:
            key = tuple(sorted((*t.extents, *[one] * (FACTORS - len(t.extents)))))
            merged[key] = merged.get(key, 0.0) + t.coefficient
        return np.array(list(merged.values())), np.array(list(merged), dtype=np.int64).reshape(-1, FACTORS).T

    def _touched(self, packed: tuple[np.ndarray, np.ndarray]) -> list[list[Touched]]:
        """Per group the terms that change with it."""
        touched: list[list[Touched]] = [[] for _ in self.graph.groups]
        depends = [e.groups for e in self.graph.extents] + [set()]
        each: list[dict[int, int]] = [dict(e.each) for e in self.graph.extents] + [{}]
        for coefficient, (a, b, c, d) in zip(packed[0].tolist(), packed[1].T.tolist(), strict=True):
            for group in depends[a] | depends[b] | depends[c] | depends[d]:
                w, x, y, z = (float(each[extent].get(group, 0)) for extent in (a, b, c, d))
                touched[group].append((coefficient, a, b, c, d, w, x, y, z))
        return touched

    def cost(self, keep: np.ndarray) -> Cost:
        """Exact cost when group ``g`` keeps ``keep[g]`` units."""
        length = self.lengths(keep)
        amounts = {m: round(float((c * length[e].prod(0)).sum())) for m, (c, e) in self._terms.items()}
        if (keep == self.graph.sizes).all():  # what surgery would not touch keeps its computed weights
            amounts["params"] += self._baked_away
        took = None if self.graph.overhead is None else self.graph.overhead + sum(self.times(length))
        return Cost(amounts["macs"], amounts["params"], round(float(self.live(keep).max(initial=0.0))), took)

    def times(self, length: Any) -> list[float]:
        """Milliseconds of every site that has a table, at these lengths of all extents."""
        return [float(table.at([length[e] for e in extents])) for table, extents in self._times]

    def time_at(self, number: int, length: Any, more: Mapping[int, Any]) -> Any:
        """Milliseconds of one of ``times`` where lengths have grown by ``more``, numbers or arrays."""
        table, extents = self._times[number]
        return table.at([length[e] + more.get(e, 0.0) for e in extents])

    def at(self, keep: np.ndarray, *, metrics: Collection[str] = COUNTS) -> CostState:
        """A state that can be moved unit by unit, cheaply, and knows ``metrics``."""
        return CostState(self, keep, metrics)


def _gate_of(name: str, gates: Mapping[str, int]) -> int:
    """Of a module inside of a block the group that says whether the block stays, else -1."""
    while name and name not in gates:
        name = name.rpartition(".")[0]
    return gates.get(name, -1)


class CostState:
    """Costs at one ``keep``, updated as units come and go; every step costs only the terms it touches."""

    def __init__(self, model: CostModel, keep: np.ndarray, metrics: Collection[str] = COUNTS) -> None:
        self._model = model
        self.keep = keep.astype(np.int64).copy()
        self._missing = int((model.graph.sizes - self.keep).sum())  # units that are gone
        self._length: list[float] = model.lengths(self.keep).tolist()
        whole = model.cost(self.keep)
        self.amount = {m: float(getattr(whole, m)) for m in ("macs", "params", LATENCY) if m in metrics}
        self._took = model.times(self._length) if LATENCY in metrics else []
        self._follows_live = "activation_memory" in metrics
        self._live = model.live(self.keep)

    @property
    def activation_memory(self) -> float:
        assert self._follows_live
        return float(self._live.max(initial=0.0))

    def value(self, metric: str) -> float:
        return self.activation_memory if metric == "activation_memory" else self.amount[metric]

    def change(self, metric: str, group: int, units: Any) -> Any:
        """How much ``macs``, ``params`` or ``latency`` grow when ``group`` gains ``units`` (negative: loses).

        Here and below: ``units`` may be an array ``(k,)``, and so is the answer, for each number by itself.
        """
        if metric == LATENCY:
            more = self._model.longer(self.keep, group, units)
            return sum(self._model.time_at(n, self._length, more) - self._took[n] for n in self._model.timed[group])
        length, growth = self._length, 0.0
        if self._model.has_table(group):
            more = self._model.longer(self.keep, group, units)
            for coefficient, a, b, c, d, *_ in self._model.touching[metric][group]:
                p, q, r, s = length[a], length[b], length[c], length[d]
                after = (
                    (p + more.get(a, 0.0)) * (q + more.get(b, 0.0)) * (r + more.get(c, 0.0)) * (s + more.get(d, 0.0))
                )
                growth += coefficient * (after - p * q * r * s)
        else:  # in plain Python: a group touches a few terms, and this is what a solver does all the time
            for coefficient, a, b, c, d, w, x, y, z in self._model.touching[metric][group]:
                p, q, r, s = length[a], length[b], length[c], length[d]
                after = (p + units * w) * (q + units * x) * (r + units * y) * (s + units * z)
                growth += coefficient * (after - p * q * r * s)
        if metric == "params" and self._model._baked_away:  # there only while nothing at all is removed
            growth += self._model._baked_away * (1.0 * (self._missing == units) - (self._missing == 0))
        return growth

    def peak_with(self, group: int, units: Any) -> Any:
        """Peak activation memory if ``group`` gained ``units``."""
        return (self._live + self._model.more_live(self.keep, group, units)).max(-1, initial=0.0)

    def excess_saved(self, group: int, units: Any, limit: float) -> Any:
        """Bytes above ``limit``, summed over all moments, that removing ``units`` of ``group`` would save."""
        over = np.maximum(self._live - limit, 0.0)
        return np.minimum(over, -self._model.more_live(self.keep, group, -units)).sum(-1)

    def excess(self, limit: float) -> float:
        return float(np.maximum(self._live - limit, 0.0).sum())

    def move(self, group: int, units: int) -> None:
        """Let ``group`` gain ``units`` (negative: lose)."""
        for metric in self.amount:
            self.amount[metric] += self.change(metric, group, units)
        for extent, more in self._model.longer(self.keep, group, units).items():
            self._length[extent] += float(more)
        if self._took:
            for number in self._model.timed[group]:
                self._took[number] = float(self._model.time_at(number, self._length, {}))
        if self._follows_live:
            self._live += self._model.more_live(self.keep, group, units)
        self.keep[group] += units
        self._missing -= units
