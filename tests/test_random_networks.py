"""Random networks, random budgets: trace, solve, shrink, prove."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from hypothesis import HealthCheck, given, settings, strategies as st
from networks import RIGID, Pick, Recipe, random_network
from proving import random_importance, randomise

from espalier.costs import COUNTS, Cost, cost
from espalier.graph import Graph, trace
from espalier.plan import Budget
from espalier.solver import BudgetError, solve
from espalier.surgery import shrink, verify


@dataclass(frozen=True)
class Case:
    """What is asked of one network; fractions of the way from its smallest reachable to its dense cost."""

    fractions: tuple[float | None, float | None, float | None]  # macs, params, activation_memory
    multiple_of: int
    seed: int  # of the importance

    def budget(self, graph: Graph, importance: dict[str, np.ndarray]) -> Budget:
        dense, least = cost(graph), smallest(graph, importance, self.multiple_of)
        limits = {
            metric: max(int(getattr(least, metric) + fraction * (getattr(dense, metric) - getattr(least, metric))), 2)
            for metric, fraction in zip(COUNTS, self.fractions, strict=True)
            if fraction is not None
        }
        return Budget(**limits, multiple_of=self.multiple_of)


def smallest(graph: Graph, importance: dict[str, np.ndarray], multiple_of: int) -> Cost:
    """The least this network can cost, as the error of an unreachable budget states it."""
    try:
        return cost(graph, solve(graph, importance, Budget(activation_memory=2, multiple_of=multiple_of)))
    except BudgetError as error:
        return error.smallest


def random_case(pick: Pick) -> Case:
    some = [0.9, 0.7, 0.5, 0.3, 0.1, 0.0]
    asked = pick([(1, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0), (0, 0, 1), (1, 1, 1)])
    return Case(tuple(pick(some) if a else None for a in asked), pick([1, 1, 1, 2, 4, 8]), pick(range(8)))


def prove_case(recipe: Recipe, case: Case) -> Counter[str]:
    """Raise what is wrong; return what kind of case this was."""
    seen: Counter[str] = Counter(networks=1)
    example = recipe.example()
    model = randomise(recipe.build()).eval()
    graph = trace(model, example)
    assert not graph.unknown, graph.unknown
    if not any(s.kind in RIGID for s in recipe.steps):
        seen["frozen by rehearsal"] += bool(graph.notes)
    seen["with groups"] += bool(graph.groups)
    importance = random_importance(graph, seed=case.seed)
    budget = case.budget(graph, importance)
    plan = solve(graph, importance, budget)
    verify(model, graph, plan, example, budget=budget).require()
    for group in graph.groups:
        kept = len(plan.keep[group.name])
        assert kept == group.size or kept * group.width % case.multiple_of == 0, (group.name, kept)
    planned, after = cost(graph, plan), graph.after(plan.keep)
    assert cost(after) == planned
    fresh = trace(shrink(model, graph, plan), example)
    if not any("shuffle" in s.kind for s in recipe.steps):
        assert cost(fresh) == planned
    seen["removed something"] += planned != cost(graph)
    a, b = sorted(g.size for g in after.groups if g.size > 1), sorted(g.size for g in fresh.groups if g.size > 1)
    seen["fresh trace has other groups"] += a != b
    return seen


@st.composite
def networks(draw):
    return random_network(lambda options: draw(st.sampled_from(options)))


@st.composite
def cases(draw):
    return random_case(lambda options: draw(st.sampled_from(options)))


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(networks(), cases())
def test_random_networks_fulfil_every_obligation(recipe, case):
    prove_case(recipe, case)
