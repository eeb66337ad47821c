"""What the callbacks share: a run inside somebody's trainer, acting at optimiser steps, saved and taken up with its network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from espalier.methods.base import Method, Removed, Run
from espalier.plan import Budget, Plan
from espalier.run.checkpoint import load_optimizer_state, optimizer_state


def add_penalty(run: Run) -> None:
    """Add the gradient of the run's penalty to gradients that are there, averaged over processes and unscaled.

    As good as adding the penalty to the loss, and it needs no change to a training step.
    """
    penalty = run.penalty()
    if not isinstance(penalty, Tensor) or not penalty.requires_grad:
        return
    parameters = [p for p in run.model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(penalty, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


class Attached:
    """A run of ``method`` inside a trainer: ``begin`` when its optimiser is there, ``before_step`` and ``after_step``."""

    def __init__(self, budget: Budget | None, method: Method, example: Any) -> None:
        self.budget, self.method, self.example = budget, method, example
        self.run: Run | None = None
        self.small: nn.Module | None = None
        self._saved: dict[str, Any] | None = None  # what ``saved`` gave, where a checkpoint is taken up
        self._peaks: list[float] = []

    @property
    def plan(self) -> Plan:
        """What stays of the dense network so far."""
        return self.running.plan

    @property
    def running(self) -> Run:
        assert self.run is not None, "training has not begun"
        return self.run

    def begin(self, optimizer: torch.optim.Optimizer, advice: str) -> None:
        """Raises: ValueError, with ``advice``, unless the optimiser trains all parameters of the network."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(id(p) not in held for p in self.running.model.parameters() if p.requires_grad):
            raise ValueError(f"Compression: the optimiser does not hold all parameters of the network; {advice}")
        if (
            self._saved is not None
        ):  # trainers number parameters; after surgery their order may be another: states go by name
            load_optimizer_state(self.running.model, optimizer, self._saved["optimizer"])
        self._peaks = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]

    def before_step(self, optimizer: torch.optim.Optimizer, progress: float) -> None:
        """Set the rate that the method wants, if it wants one, as a share of each group's peak; add the penalty's gradient."""
        wanted = self.running.rate(progress)
        if wanted is not None:
            for group, peak in zip(optimizer.param_groups, self._peaks, strict=True):
                group["lr"] = wanted * peak
        add_penalty(self.running)

    def after_step(self, optimizer: torch.optim.Optimizer, progress: float) -> Removed | None:
        return self.running.step(progress=min(progress, 1.0), optimizer=optimizer)

    def saved(self, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
        """Plain values: the state of the run, for ``es.attach(..., state=)``, and the optimiser's by name."""
        own = {} if optimizer is None else optimizer_state(self.running.model, optimizer)
        return {"run": self.running.state_dict(), "optimizer": own}
