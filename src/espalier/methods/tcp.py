"""TCP, tailored channel pruning: train once, arrive at the budget, with nothing cut by force at the end.

Lee, Jeon, Lee, Kim: "Tailored Channel Pruning: Achieve Targeted Model Complexity Through Adaptive Sparsity
Regularization", IEEE Access 13, 2025.  The paper fixes the idea: while the network trains, a budget decides which channels
stay (the keep-set); a sparsity regularisation whose strength adapts presses only on the others, until removing them
changes nothing.  What follows is our reading, in the paper's order:

1. importance of every unit, smoothed over batches;
2. keep-set: the most important units inside the current budget, exactly (``solver``); the budget itself moves from the full
   cost to the target;
3. pressure: a proximal group-lasso step on everything that *reads* a unit outside the keep-set,
   ``w_c <- w_c * max(0, 1 - strength * r_c / |w_c|)`` with ``r_c`` the norm when the unit left the keep-set, so that all
   fade at the same relative pace and reach zero in finite time;
4. strength in closed loop on the remaining mass ``sum |w_c| / sum r_c`` against its schedule;
5. removal, in the middle of training, of what has reached exactly zero.  The logits do not change.

``early=True`` is another reading of 2 and 3, that of Ghimire et al., One-Cycle Structured Pruning, arXiv
2501.13439: the keep-set is for the final budget from the first decision on, is frozen when it no longer changes, and everything
outside fades slowly.

Why the readers' columns and not the BatchNorm scale of the maker: BatchNorm behind a convolution undoes a uniform shrinkage of
its inputs, a ReLU of a shifted channel emits a constant that survives a zero scale, and a channel that many layers read can
then go without folding anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import nn

from espalier.graph.graph import CHANNELS
from espalier.methods.base import Batches
from espalier.methods.blocks import WholeBlocks, need_comparable, takes_blocks
from espalier.methods.importance import ScoreName, ShareExponent, diminishing
from espalier.methods.pressure import Fading, FadingMethod
from espalier.methods.units import upload
from espalier.plan import Budget, Plan
from espalier.settings import Portion, described


@dataclass(frozen=True)
class TCP(FadingMethod):
    """Hyper-parameters of tailored channel pruning; every duration is a fraction of the whole run.

    Source: Lee, Jeon, Lee, Kim, Tailored Channel Pruning, IEEE Access 13, 2025; with ``early`` Ghimire et al., One-Cycle
    Structured Pruning, arXiv 2501.13439, 2025.  The module's docstring has the steps, and what of them is our reading.
    """

    name: ClassVar[str] = "tcp"
    trains: ClassVar[bool] = True
    importance: ScoreName = "taylor"
    per_cost: Annotated[bool, described("weigh importance by what a unit costs, or take it as it is")] = True
    share_exponent: ShareExponent = 1.0
    blocks: WholeBlocks = None
    early: Annotated[
        bool,
        described(
            "decide for the final budget from the start; all fade until end_at, and the keep-set is frozen once it stays"
        ),
    ] = False
    floor: Annotated[Portion, described("of its units that every group keeps at least")] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_pace()
        need_comparable("TCP", "importance", self.importance, self.blocks)

    @property
    def scored_by(self) -> str:
        return self.importance

    def start(self, model: nn.Module, example: Any, budget: Budget, *, batches: Batches | None = None) -> TCPRun:
        return TCPRun(model, example, budget, self)


class TCPRun(Fading):
    """One run of TCP: ``step`` goes through 1 to 5 and is that of ``Fading``, as are pressure, strength and removal."""

    method: TCP

    def __init__(self, model: nn.Module, example: Any, budget: Budget, method: TCP) -> None:
        super().__init__(model, example, budget, method)
        if takes_blocks(method.blocks, budget, self.graph, score=method.importance):
            self.offer_blocks()
        self.floor = {g.name: math.ceil(method.floor * g.size) for g in self.graph.groups if g.kind == CHANNELS}
        even = {g.name: np.ones(g.size) for g in self.graph.groups}
        self.decide(even, per_cost=method.per_cost, floor=self.floor)  # unreachable budgets fail now
        self._begin()

    def limits_at(self, progress: float) -> dict[str, float]:
        return dict(self.limits) if self.method.early else super().limits_at(progress)

    def keep_set(self, limits: Mapping[str, float], progress: float) -> Plan:
        """Steps 1 and 2: the most important units inside ``limits``.

        A fading unit counts for what is left of it: it comes back only if the loss asks for it strongly.  Undoing the fading
        here was tried and made the keep-set churn: every decision, a third of the pressed units came back.
        """
        worth = self.units.by_group(self.score.value)
        worth = {n: diminishing(w, self.method.share_exponent) for n, w in worth.items()}
        return self.decide(worth, limits, per_cost=self.method.per_cost, floor=self.floor)

    def stays(self, outside: np.ndarray) -> bool:
        """Early: what leaves is what left at the decision before, but for a few (Jaccard)."""
        return self.method.early and (outside & self._outside).sum() >= STABLE * max((outside | self._outside).sum(), 1)

    def _adapt_to(self, plan: Plan, outside: np.ndarray) -> None:
        """Early: whenever a unit leaves, it arrives at zero at ``end_at``."""
        if self.method.early:
            pace = self.method.fade / max(self.method.end_at - self._last, self.method.fade)
            self.pull = torch.where(upload(outside & ~self._outside, self.units.device), pace, self.pull)


STABLE = 0.99  # of the units that leave, at two decisions after each other
