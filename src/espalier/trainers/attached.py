"""What the callbacks share: a run inside somebody's trainer, acting at optimiser steps, saved and taken up with its network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from espalier.costs import cost
from espalier.graph import trace
from espalier.methods.base import Method, Run, attach
from espalier.plan import Budget, Plan
from espalier.run.checkpoint import load_optimizer_state, optimizer_state
from espalier.surgery.files import rebuild, structure


def go_on(model: nn.Module, example: Any, *, budget: Budget | None, method: Method, saved: Mapping[str, Any]) -> Run:
    """Go on from ``saved``, what ``saved_run`` returned, on the dense ``model``: it gets the structure that it had then.

    Weights and the optimiser's state are the trainer's to load, into the parameters that are there afterwards; the optimiser's
    by ``restore_optimizer``, after the trainer's own.
    """
    if budget is not None:  # fractions are of the network that the run began with
        limits: dict[str, Any] = dict(budget.limits(cost(trace(model, example))))
        budget = replace(budget, **limits)
    rebuild(model, saved["structure"])
    run = attach(model, example, budget=budget, method=method)
    run.load_state_dict(saved["run"])
    run.plan, run.history = Plan.from_json(saved["plan"]), saved["history"]
    return run


def saved_run(run: Run, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Plain tensors, numbers and text: the run, the structure of its network, and the optimiser's state by name."""
    return {
        "structure": structure(run.model),
        "run": run.state_dict(),
        "plan": run.plan.to_json(),
        "history": run.history,
        "optimizer": {} if optimizer is None else optimizer_state(run.model, optimizer),
    }


def restore_optimizer(run: Run, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Trainers number parameters; after surgery their order may be another, so states go by name."""
    load_optimizer_state(run.model, optimizer, saved["optimizer"])


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
