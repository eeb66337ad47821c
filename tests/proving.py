"""Shared by the tests of the spine: make a network's outputs informative, prune it, and prove the result."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from espalier.graph import Graph, trace
from espalier.plan import Budget, Plan
from espalier.solver import BudgetError, solve
from espalier.surgery import shrink, verify


class Pruned(NamedTuple):
    graph: Graph
    plan: Plan
    small: nn.Module


def randomise(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """Draw every norm's scale, shift and statistics, and every bias, in place, so that no channel is idle by accident."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            key = name.rpartition(".")[2]
            if not tensor.is_floating_point():
                continue
            if key == "running_var" or (key == "weight" and tensor.ndim == 1):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.5 + 0.75)
            elif key in ("running_mean", "bias"):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return model


def random_importance(graph: Graph, *, seed: int = 0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {group.name: draw.random(group.size) for group in graph.groups}


def halve(graph: Graph, *, macs: float = 0.5, seed: int = 0) -> tuple[Plan, Budget]:
    """A random plan at ``macs``, or just above the smallest cost that this network can reach."""
    importance = random_importance(graph, seed=seed)
    budget = Budget(macs=macs)
    try:
        return solve(graph, importance, budget), budget
    except BudgetError as error:
        budget = Budget(macs=max(int(error.smallest.macs * 1.05), 2))
        return solve(graph, importance, budget), budget


def prove(model: nn.Module, example: Any, *, macs: float = 0.5) -> Pruned:
    """Trace, prune to ``macs`` with random scores, and require every proof obligation."""
    randomise(model).eval()
    graph = trace(model, example)
    plan, budget = halve(graph, macs=macs)
    verify(model, graph, plan, example, budget=budget).require()
    return Pruned(graph, plan, shrink(model, graph, plan))


def sizes(graph: Graph) -> dict[str, int]:
    return {group.name: group.size for group in graph.groups}


def reasons(graph: Graph) -> str:
    """Everything the graph says about what it froze, as one text to search in."""
    return "\n".join(
        [
            *(f"{f.tensor}[{f.dim}] x{f.count}: {f.reason}" for f in graph.frozen),
            *map(str, (*graph.notes, *graph.unknown)),
        ]
    )
