"""A small method for tests of what surrounds methods: half of every group goes at one point of the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from espalier.methods.base import Method, Removed, Run, Status
from espalier.plan import Budget


@dataclass(frozen=True)
class Halving(Method):
    """Keeps the even units; the odd ones are removed when progress reaches ``at``."""

    at: float = 0.4
    name: ClassVar[str] = "halving"
    trains: ClassVar[bool] = True

    def start(self, model: nn.Module, example: Any, budget: Budget, *, batches: Any = None) -> HalvingRun:
        return HalvingRun(model, example, budget, self.at)


@dataclass(frozen=True)
class HalvingAtOnce(Method):
    """The same without training: everything happens in ``finish``."""

    name: ClassVar[str] = "halving-at-once"
    trains: ClassVar[bool] = False

    def start(self, model: nn.Module, example: Any, budget: Budget, *, batches: Any = None) -> HalvingRun:
        return HalvingRun(model, example, budget, 2.0)


class HalvingRun(Run):
    remembers = ("halved", "steps")

    def __init__(self, model: nn.Module, example: Any, budget: Budget, at: float) -> None:
        super().__init__(model, example, budget)
        self.at, self.halved, self.steps = at, False, 0

    def penalty(self) -> torch.Tensor:
        return 1e-3 * sum(p.square().sum() for p in self.model.parameters() if p.ndim == 1)

    def step(self, *, progress: float, optimizer: torch.optim.Optimizer) -> Removed | None:
        self.steps += 1
        if self.halved or progress < self.at:
            return None
        return self._halve(optimizer)

    def _halve(self, optimizer: torch.optim.Optimizer | None) -> Removed:
        self.halved = True
        return self.remove({g.name: np.arange(0, g.size, 2) for g in self.graph.groups}, optimizer)

    def finish(self) -> nn.Module:
        if not self.halved:
            self._halve(None)
        return self.model

    @property
    def status(self) -> Status:
        return Status(self.cost, 0.0 if self.halved else 1.0, 0.0 if self.halved else 1.0)
