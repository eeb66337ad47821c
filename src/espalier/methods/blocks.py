"""Residual blocks in methods: which may go, what they are worth beside channels, how narrow one that stays may become.

Two things were measured on trained networks (``benchmarks.block_importance``), and are the two constants below.  First-order
importance overstates what a block is worth: all channels inside add up to more than leaving the block out does to the loss.
And the last channels of a block are worth nothing: one channel wide it is no better than not there at all, and takes time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from torch import nn

from espalier.graph import Graph, find_blocks, with_blocks
from espalier.graph.graph import CHANNELS
from espalier.methods.state import WEIGHT_FROZEN
from espalier.plan import Budget
from espalier.settings import described
from espalier.solver import BudgetError, solve

WholeBlocks = Annotated[
    bool | None,
    described(
        "let residual blocks go as a whole, where that gives up less than their channels; by default where time is limited, "
        "or nothing else reaches the budget"
    ),
]

COMPARABLE = "taylor"
SHARE = 0.25  # what a channel counts when its block goes as a whole, relative to when it goes by itself
NARROWEST = 0.5  # of its inner widths, a block that stays


def offer_blocks(model: nn.Module, graph: Graph, example: Any) -> tuple[Graph, dict[str, str]]:
    """The graph with residual blocks that may go, and block -> why it may not; those that hold a frozen weight stay."""
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    found = find_blocks(model, example)
    free = [b for b in found.found if not any(b.holds(n) for n in frozen)]
    held = {b.module: WEIGHT_FROZEN for b in found.found if b not in free}
    return with_blocks(graph, free), {**found.left, **held}


def need_comparable(where: str, name: str, score: str, blocks: bool | None) -> None:
    """``ValueError`` for a score that is relative to the layer: it says nothing about whole blocks."""
    if blocks and score != COMPARABLE:
        raise ValueError(
            f"{where}(blocks=True, {name}={score!r}): this score is relative to each layer and cannot weigh whole blocks; "
            f"take {name}={COMPARABLE!r}, which is measured on data"
        )


def takes_blocks(wanted: bool | None, budget: Budget, graph: Graph, *, score: str = COMPARABLE) -> bool:
    """Whether blocks may go: as asked; else, if the score can tell, where time is limited - launching layers costs time -
    or what ``graph`` has without them is not enough."""
    if wanted is not None:
        return wanted
    return score == COMPARABLE and (budget.latency is not None or not _reaches(graph, budget))


def _reaches(graph: Graph, budget: Budget) -> bool:
    try:
        solve(graph, {g.name: np.ones(g.size) for g in graph.groups}, budget)
    except BudgetError:
        return False
    return True


def worth_of_blocks(graph: Graph, importance: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """``importance`` in which a block is worth nothing beyond what is inside it."""
    return {**importance, **{b.group: np.zeros(graph.group(b.group).size) for b in graph.blocks}}


def block_rules(graph: Graph) -> dict[str, Any]:
    """How ``solve`` weighs the blocks of ``graph``."""
    inner = {i for b in graph.blocks for i in graph.inner(b)}
    channels = [g for i, g in enumerate(graph.groups) if i in inner and g.kind == CHANNELS]
    return {"block_share": SHARE, "floor": {g.name: math.ceil(NARROWEST * g.size) for g in channels}}
