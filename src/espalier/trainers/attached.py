"""What the callbacks share: a run inside somebody's trainer, acting at optimiser steps, saved and taken up with its network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from espalier.methods.base import Run
from espalier.run.checkpoint import load_optimizer_state, optimizer_state


def saved_run(run: Run, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Plain values: the state of the run, for ``es.attach(..., state=)``, and the optimiser's by name."""
    return {"run": run.state_dict(), "optimizer": {} if optimizer is None else optimizer_state(run.model, optimizer)}


def restore_optimizer(run: Run, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Trainers number parameters; after surgery their order may be another, so states go by name."""
    load_optimizer_state(run.model, optimizer, saved["optimizer"])


def holds_all(run: Run, optimizer: torch.optim.Optimizer, advice: str) -> None:
    """Raises: ValueError unless the optimiser trains all parameters of the network."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if any(id(p) not in held for p in run.model.parameters() if p.requires_grad):
        raise ValueError(f"Compression: the optimiser does not hold all parameters of the network; {advice}")


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


def set_rate(run: Run, optimizer: torch.optim.Optimizer, peaks: list[float], progress: float) -> None:
    """The learning rate that the method wants now, if it wants one, as a share of each group's peak."""
    wanted = run.rate(progress)
    if wanted is not None:
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = wanted * peak
