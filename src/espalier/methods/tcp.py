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

Why the readers' columns and not the BatchNorm scale of the maker: BatchNorm behind a convolution undoes a uniform shrinkage of
its inputs, a ReLU of a shifted channel emits a constant that survives a zero scale, and a channel that many layers read can
then go without folding anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from espalier.costs import LATENCY
from espalier.methods.base import Batches, Removed
from espalier.methods.blocks import (
    WholeBlocks,
    block_rules,
    need_comparable,
    offer_blocks,
    takes_blocks,
    worth_of_blocks,
)
from espalier.methods.importance import BY_WEIGHT, Moments, Returns, ScoreName, Sensitivity, diminishing
from espalier.methods.pressure import LISTEN_EVERY, Fading, FadingMethod
from espalier.methods.units import Units, upload
from espalier.plan import Budget
from espalier.settings import described
from espalier.solver import solve


@dataclass(frozen=True)
class TCP(FadingMethod):
    """Hyper-parameters of tailored channel pruning; the pace is that of ``FadingMethod``."""

    name: ClassVar[str] = "tcp"
    trains: ClassVar[bool] = True
    importance: ScoreName = "taylor"
    per_cost: Annotated[bool, described("weigh importance by what a unit costs, or take it as it is")] = True
    returns: Returns = 1.0
    blocks: WholeBlocks = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_pace()
        need_comparable("TCP", "importance", self.importance, self.blocks)

    def start(self, model: nn.Module, example: Any, budget: Budget, *, batches: Batches | None = None) -> TCPRun:
        return TCPRun(model, example, budget, self)


class TCPRun(Fading):
    """One run of TCP.  Steps 3 and 4, pressure and strength, are in ``methods.pressure``."""

    method: TCP

    def __init__(self, model: nn.Module, example: Any, budget: Budget, method: TCP) -> None:
        super().__init__(model, example, budget, method)
        self.bake()
        self.hold_frozen()
        if takes_blocks(method.blocks, budget, score=method.importance):
            offer_blocks(self)
        self._solved({g.name: np.ones(g.size) for g in self.graph.groups}, self.limits)  # unreachable budgets fail now
        self._bind(Units(model, self.graph))
        self._begin()

    def _bind(self, units: Units) -> None:
        """Tie hooks to the model's present parameters."""
        self.units = units
        self.sensitivity = Sensitivity(units, smoothing=self.method.smoothing)
        self.moments = Moments(self.model, units)
        if self.method.importance != "taylor":
            self.sensitivity.close()

    # -- 1. importance -------------------------------------------------------------------------------------------------

    def importance(self) -> Tensor:
        """Importance per unit as it is now.

        A fading unit counts for what is left of it: it comes back only if the loss asks for it strongly.  Undoing the fading
        here was tried and made the keep-set churn: every decision, a third of the pressed units came back.
        """
        if self.method.importance in BY_WEIGHT:
            return BY_WEIGHT[self.method.importance](self.model, self.units)
        if self.method.importance == "share":
            return self.moments.share() if self.moments.sums else torch.ones(self.units.count, device=self.units.device)
        return self.sensitivity.value

    def _listen(self, progress: float) -> None:
        self._hear_every_fourth()
        soon = progress + LISTEN_EVERY * (progress - self._last) >= self._decided + self.method.every
        if self.method.importance == "share" and soon and not self.settled and not self.moments.active:
            self.moments.start()

    # -- 2. keep-set -----------------------------------------------------------------------------------------------

    def _keep_set(self, limits: Mapping[str, float]) -> Mapping[str, np.ndarray]:
        worth = self.units.by_group(self.importance())
        return self._solved({n: diminishing(w, self.method.returns) for n, w in worth.items()}, limits)

    def _solved(self, worth: Mapping[str, np.ndarray], limits: Mapping[str, float]) -> Mapping[str, np.ndarray]:
        if LATENCY in limits and limits == self.limits:  # at the start and for good: measured
            every = worth_of_blocks(self.graph, worth)
            return self.decide(every, per_cost=self.method.per_cost, rules=block_rules(self.graph)).keep
        return solve(
            self.graph,
            worth_of_blocks(self.graph, worth),
            limits,
            multiple_of=self.budget.multiple_of,
            protect=self.budget.protected(self.graph),
            per_cost=self.method.per_cost,
            **block_rules(self.graph),
        ).keep

    def _choose(self, progress: float) -> np.ndarray:
        keep = self._keep_set(self.limits_at(progress))
        self.moments.stop()
        return self.units.outside(dict(keep))

    # -- 5. removal ------------------------------------------------------------------------------------------------

    def _remove_faded(self, optimizer: torch.optim.Optimizer) -> Removed | None:
        """Remove what reads zero, group by group, once it is worth a surgery or nothing else is left to do."""
        if not self._outside.any():
            if self.settled:
                self._finished()
            return None
        ready = self._faded()
        if not ready.any():
            return None
        stay = {n: np.flatnonzero(~g) for n, g in self.units.split(ready).items()}
        if not self._worth_a_surgery(stay, last=bool((ready == self._outside).all())):
            return None
        return self._carry_out(stay, optimizer)

    def _carry_out(self, stay: dict[str, np.ndarray], optimizer: torch.optim.Optimizer | None) -> Removed:
        survivors = np.concatenate([self.units.offsets[i] + stay[g.name] for i, g in enumerate(self.graph.groups)])
        value, batches = self.sensitivity.value, self.sensitivity.batches
        gathering = self.moments.active  # what was gathered belongs to the old channels: gather anew
        self._silence()
        removed = self.remove(stay, optimizer)
        self._bind(Units(self.model, self.graph))
        self.sensitivity.value, self.sensitivity.batches = value[upload(survivors, self.units.device)], batches
        if gathering:
            self.moments.start()
        self._keep_rows(survivors)
        if self.settled and not self._outside.any():
            self._finished()
        return removed

    def _silence(self) -> None:
        self.sensitivity.close()
        self.moments.stop()

    def finish(self) -> nn.Module:
        """The small model.  If training stopped before everything had faded, the rest is cut here, and ``forced`` is true."""
        if not self.done:
            keep = dict(self._keep_set(self.limits))
            self.forced = any(len(k) < self.graph.group(n).size for n, k in keep.items())
            self._carry_out(keep, None)
            self._finished()
        return self.model

    remembers = ("moments",)

    def bind(self) -> None:
        self._silence()
        self._bind(Units(self.model, self.graph))
