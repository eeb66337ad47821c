"""The loop closed: what is planned is built, measured against the dense network, and planned anew until the time is right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from espalier.costs import CostModel
from espalier.graph import Graph
from espalier.plan import Budget, Plan, milliseconds_of
from espalier.solver import BudgetError, solve
from espalier.timing import on_device
from espalier.timing.family import Family
from espalier.timing.making import asked
from espalier.timing.profile import Profile

ROUNDS = 12  # networks measured, at most
SOLVES = 20  # plans made, at most
CLOSE = 0.96  # of the limit: a plan that is measured between here and the limit is left as it is
STEP = 0.003  # of the limit: predictions that differ by less lead to the same plan
SECONDS = 1.0  # of measuring one plan and the dense network in turns, at least


@dataclass(frozen=True)
class Settled:
    """A plan that was measured, and the budget whose profile has been put right by it."""

    plan: Plan
    budget: Budget
    limit: float  # milliseconds
    predicted: float  # by the profile as it was before
    measured: float  # milliseconds where the dense network takes what the profile says it takes
    rounds: int
    above: float | None = None  # milliseconds of the next larger plan that was measured, which is above the limit

    @property
    def fits(self) -> bool:
        return self.measured <= self.limit

    @property
    def is_close(self) -> bool:
        return self.fits and self.measured >= CLOSE * self.limit


def settle(
    family: Family,
    reference: bytes | None,
    importance: Mapping[str, np.ndarray],
    budget: Budget,
    *,
    per_cost: bool = True,
    rules: Mapping[str, Any] | None = None,
) -> Settled:
    """Plan by ``importance`` under a budget of latency, measure, and plan for another prediction until the time is right.

    Measured in turns with the file ``reference``, the dense network, so that only the ratio counts (without one, as times are
    now).  The prediction that leads to the limit is enclosed: what is tried next is the last one by what its plan took, inside
    of those that are known to be too small and too large; where a whole block is the step between them, once more with the
    blocks of the larger one.  The best plan within the limit is returned; where none is, the one that comes closest.

    Raises: BudgetError with the least reachable time where by the profile the limit is out of reach.
    """
    search = _Search(family, reference, importance, budget, per_cost)
    search.enclose(dict(rules or {}))
    best, above = search.best, search.above
    if not best.is_close and above is not None:
        search.enclose(_held(family.graph, above.plan, rules or {}), start=above)
        best, above = search.best, search.above
    right = replace(budget, profile=search.profile.corrected(best.measured / best.predicted))
    return replace(best, budget=right, rounds=len(search.tried), above=None if above is None else above.measured)


def calibrated(family: Family, reference: bytes | None, plan: Plan, budget: Budget) -> Budget:
    """``budget``, whose profile says of ``plan`` what it takes."""
    search = _Search(family, reference, {}, budget, per_cost=True)
    found = search.measured(plan)
    return replace(budget, profile=search.profile.corrected(found.measured / found.predicted))


class _Search:
    """The plans that were measured for one limit."""

    def __init__(
        self,
        family: Family,
        reference: bytes | None,
        importance: Mapping[str, np.ndarray],
        budget: Budget,
        per_cost: bool,
    ) -> None:
        assert isinstance(budget.profile, Profile) and budget.latency is not None
        self.family, self.reference, self.importance, self.budget = family, reference, importance, budget
        self.per_cost, self.profile = per_cost, budget.profile
        self.limit = milliseconds_of(budget.latency, self.profile.dense)
        self.timed = self.profile.on(family.graph)
        self.model = CostModel(self.timed)
        self.tried: list[Settled] = []

    @property
    def best(self) -> Settled:
        """The largest that fits, or the smallest that does not."""
        return max(self.tried, key=lambda s: s.measured if s.fits else -s.measured)

    @property
    def above(self) -> Settled | None:
        """The smallest that does not fit."""
        return min((s for s in self.tried if not s.fits), key=lambda s: s.measured, default=None)

    def enclose(self, rules: Mapping[str, Any], *, start: Settled | None = None) -> None:
        """Until a plan is close, or nothing lies between those that are too small and too large; from ``start`` downwards."""
        high = (start.predicted if start else self.model.cost(self.timed.sizes).latency) or self.limit
        aim = self.limit if start is None else start.predicted * BETWEEN * self.limit / start.measured
        low, last = (self.best.predicted, False) if start and self.best.fits else (0.0, None)
        for _ in range(SOLVES):
            wanted = replace(self.budget, latency=f"{aim:.9f} ms")
            try:
                plan = solve(self.timed, self.importance, wanted, per_cost=self.per_cost, **rules)
            except BudgetError:
                if self.tried:
                    return
                raise
            found = next((s for s in self.tried if _same(plan, s.plan)), None)
            if found is None:
                if len(self.tried) == ROUNDS:
                    return
                found = self.measured(plan)
                self.tried.append(found)
            low, high = (max(low, aim), high) if found.fits else (low, min(high, found.predicted))
            if found.is_close or high - low <= STEP * self.limit:
                return
            parts = 2 if found.fits == last else 4  # twice on one side: halves come to the other sooner
            margin = (high - low) / parts
            last = found.fits
            most = high if self.above is None else high - margin  # that all of it is too large has to be seen
            aim = min(max(found.predicted * BETWEEN * self.limit / found.measured, low + margin), most)

    def measured(self, plan: Plan) -> Settled:
        predicted = self.model.cost(plan.counts(self.timed)).latency or self.limit
        took = _measured(self.family.file(plan), self.reference, self.profile)
        return Settled(plan, self.budget, self.limit, predicted, took, len(self.tried) + 1)


BETWEEN = (1.0 + CLOSE) / 2


def _held(graph: Graph, plan: Plan, rules: Mapping[str, Any]) -> dict[str, Any]:
    """``rules`` under which the blocks that are in ``plan`` stay: narrower layers fill the step that a whole block is."""
    stay = {b.group: 2 for b in graph.blocks if len(plan.keep.get(b.group, (0, 1))) == 2}
    return {**rules, "floor": {**(rules.get("floor") or {}), **stay}}


def _measured(file: bytes, reference: bytes | None, profile: Profile) -> float:
    """Milliseconds of a network where the dense one takes what the profile says it takes."""
    if reference is None:
        return on_device.race([file], seconds=SECONDS, **asked(profile.setting))[0]
    dense, small = on_device.race([reference, file], seconds=SECONDS, pace=profile.dense, **asked(profile.setting))
    return small * profile.dense / dense


def _same(one: Plan, two: Plan) -> bool:
    return all(np.array_equal(one.keep[n], two.keep[n]) for n in one.keep)
