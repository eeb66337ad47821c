"""The loop closed: what is planned is built, measured against the dense network, and planned anew until the time is right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from espalier.costs import CostModel
from espalier.plan import Budget, Plan, milliseconds_of
from espalier.solver import BudgetError, solve
from espalier.timing import on_device
from espalier.timing.family import Family
from espalier.timing.making import asked
from espalier.timing.profile import Profile

ROUNDS = 8  # networks measured, at most
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
    of those that are known to be too small and too large.  The best plan within the limit is returned; where none is, the one
    that comes closest.

    Raises: BudgetError with the least reachable time where by the profile the limit is out of reach.
    """
    profile = budget.profile
    assert isinstance(profile, Profile) and budget.latency is not None
    limit, timed = milliseconds_of(budget.latency, profile.dense), profile.on(family.graph)
    model = CostModel(timed)
    aim, low, high = limit, 0.0, model.cost(timed.sizes).latency or limit
    tried: list[Settled] = []
    for _ in range(SOLVES):
        wanted = replace(budget, latency=f"{aim:.9f} ms")
        try:
            plan = solve(timed, importance, wanted, per_cost=per_cost, **(rules or {}))
        except BudgetError:
            if tried:
                break
            raise
        found = next((s for s in tried if _same(plan, s.plan)), None)
        if found is None:
            if len(tried) == ROUNDS:
                break
            predicted = model.cost(plan.counts(timed)).latency or limit
            measured = _measured(family.file(plan), reference, profile)
            found = Settled(plan, budget, limit, predicted, measured, len(tried) + 1)
            tried.append(found)
        low, high = (max(low, aim), high) if found.fits else (low, min(high, found.predicted))
        if found.is_close or high - low <= STEP * limit:
            break
        margin = (high - low) / 4
        aim = min(max(found.predicted * BETWEEN * limit / found.measured, low + margin), high - margin)
    best = max(tried, key=lambda s: s.measured if s.fits else -s.measured)
    right = replace(budget, profile=profile.corrected(best.measured / best.predicted))
    above = min((s.measured for s in tried if not s.fits), default=None)
    return replace(best, budget=right, rounds=len(tried), above=above)


BETWEEN = (1.0 + CLOSE) / 2


def _measured(file: bytes, reference: bytes | None, profile: Profile) -> float:
    """Milliseconds of a network where the dense one takes what the profile says it takes."""
    files = [file, *([] if reference is None else [reference])]
    small, *dense = on_device.race(files, seconds=SECONDS, **asked(profile.setting))
    return small * (profile.dense / dense[0] if dense else 1.0)


def _same(one: Plan, two: Plan) -> bool:
    return all(np.array_equal(one.keep[n], two.keep[n]) for n in one.keep)
