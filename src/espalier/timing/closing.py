"""The loop closed: what is planned is built, measured against the dense network, and planned anew until the time is right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from espalier.costs import CostModel
from espalier.plan import Budget, Plan, milliseconds_of
from espalier.solver import solve
from espalier.timing import on_device
from espalier.timing.family import Family
from espalier.timing.making import asked
from espalier.timing.profile import Profile

ROUNDS = 6  # of planning and measuring, at most
CLOSE = 0.97  # of the limit: a plan that is measured between here and the limit is left as it is
SECONDS = 1.0  # of measuring one plan and the dense network in turns


@dataclass(frozen=True)
class Settled:
    """A plan that was measured, and the budget whose profile has been put right by it."""

    plan: Plan
    budget: Budget
    limit: float  # milliseconds
    predicted: float  # by the profile as it was before
    measured: float  # milliseconds where the dense network takes what the profile says it takes
    rounds: int

    @property
    def fits(self) -> bool:
        return self.measured <= self.limit


def settle(
    family: Family,
    reference: bytes | None,
    importance: Mapping[str, np.ndarray],
    budget: Budget,
    *,
    per_cost: bool = True,
    rules: Mapping[str, Any] | None = None,
) -> Settled:
    """Plan by ``importance`` under a budget of latency, measure, correct the profile, and plan again.

    Measured in turns with the file ``reference``, the dense network, so that only the ratio counts (without one, as times are
    now).  The best plan within the limit is returned; where none is, the one that comes closest.

    Raises: BudgetError with the least reachable time where the limit is out of reach.
    """
    profile = budget.profile
    assert isinstance(profile, Profile) and budget.latency is not None
    limit = milliseconds_of(budget.latency, profile.dense)
    graph, aim, best = family.graph, limit, None
    for number in range(ROUNDS):
        timed = profile.on(graph)
        inner = replace(budget, latency=f"{aim:.9f} ms", profile=profile)
        plan = solve(timed, importance, inner, per_cost=per_cost, **(rules or {}))
        predicted = CostModel(timed).cost(plan.counts(graph)).latency
        assert predicted is not None
        if best is not None and _same(plan, best.plan):
            break
        files = [family.file(plan), *([] if reference is None else [reference])]
        small, *dense = on_device.race(files, seconds=SECONDS, **asked(profile.setting))
        measured = small * (profile.dense / dense[0] if dense else 1.0)
        profile = profile.corrected(measured / predicted)
        found = Settled(plan, replace(budget, profile=profile), limit, predicted, measured, number + 1)
        if best is None or _better(found, best):
            best = found
        if CLOSE * limit <= measured <= limit:
            break
        aim = limit * (1.0 if measured <= limit else 0.99)
    assert best is not None
    return replace(best, rounds=number + 1, budget=replace(budget, profile=profile))


def _same(one: Plan, two: Plan) -> bool:
    return all(np.array_equal(one.keep[n], two.keep[n]) for n in one.keep)


def _better(one: Settled, two: Settled) -> bool:
    if one.fits != two.fits:
        return one.fits
    return one.measured > two.measured if one.fits else one.measured < two.measured
