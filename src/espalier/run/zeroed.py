"""Units and blocks that do nothing, as masks leave them: set to zero, still there, still computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from espalier.copies import copy_model, unwrapped
from espalier.graph import Graph, trace
from espalier.graph.graph import BLOCK, CHANNELS
from espalier.methods.blocks import offer_blocks
from espalier.methods.units import Positions, Units
from espalier.plan import Plan
from espalier.run.onnx import difference
from espalier.surgery import shrink

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TOLERANCE = 1e-5  # of the largest output: sums of fewer terms are rounded otherwise


def remove_zeroed(model: nn.Module, example: Any) -> nn.Module:
    """A copy of ``model`` without the channels and residual blocks that are zero, as masks leave them; its outputs stay.

    A channel goes if everything that reads it is zero, or if every filter that makes it is zero, or scaled by zero in the
    BatchNorm behind it, and what arrives at the layers behind is zero too: a bias makes a constant, which counts.  A residual
    block goes if what it adds is zero.  What goes may make more of it useless, so it is looked again until nothing is left to
    go; one channel of each group stays.  ``example`` is what ``trace`` takes.  Masks of ``torch.nn.utils.prune`` are made
    weights first: ``prune.remove(layer, "weight")``.

    Raises: TraceError if the network cannot be understood; ValueError if the smaller network computes something else.

    >>> import torch, espalier as es
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3))
    >>> _ = net[2].weight.data[:, 5:].zero_()
    >>> es.remove_zeroed(net, torch.zeros(1, 3, 8, 8))[0]
    Conv2d(3, 5, kernel_size=(3, 3), stride=(1, 1))
    """
    small = copy_model(unwrapped(model, who="remove_zeroed"), {})
    args = example if isinstance(example, tuple) else (example,)
    while True:
        graph, _ = offer_blocks(small, trace(small, example), example)
        plan = alive(small, graph, args)
        if all(len(units) == graph.group(name).size for name, units in plan.keep.items()):
            return small
        smaller = shrink(small, graph, plan)
        with _evaluating(small), _evaluating(smaller):
            apart = difference(small, smaller, [args])
        if not apart <= TOLERANCE:
            raise ValueError(
                f"remove_zeroed: without what is zero the outputs differ by {apart:.2g} of the largest, more than {TOLERANCE:g}"
            )
        small = smaller


def alive(model: nn.Module, graph: Graph, args: tuple[Any, ...]) -> Plan:
    """What is left of ``graph`` without what is zero in ``model``; at least one unit of every group."""
    units = Units(model, graph)
    dead = (units.consumer_energy() == 0) | _always_zero(model, units, args)
    keep = {}
    for group, gone in zip(graph.groups, units.split(dead.cpu().numpy()).values(), strict=False):
        if group.kind == BLOCK:
            keep[group.name] = np.arange(1 if gone[1] else 2)  # the first unit is what is left of a block
        elif group.kind == CHANNELS:
            stay = np.flatnonzero(~gone)
            keep[group.name] = stay if len(stay) else np.arange(1)
    return Plan(keep, {g.name: g.size for g in graph.groups})


def _always_zero(model: nn.Module, units: Units, args: tuple[Any, ...]) -> Tensor:
    """Units whose filters are all zero, so that what they give is the same for every input, and zero where it is read."""
    filters = [p for p in units.producers if p.parameter.dim() > 1]
    owned = units.sum([(p, torch.ones_like(p.owner)) for p in filters]) > 0
    if not any((p.energy() == 0).any() for p in units.producers):
        return torch.zeros_like(owned)
    scales, arriving = _looked_at(model, units.consumers, args)
    made = units.sum([(p, p.energy() * scales.get(p.tensor, 1.0)) for p in filters])
    return owned & (made == 0) & (units.sum(arriving) == 0)


def _looked_at(
    model: nn.Module, readers: list[Positions], args: tuple[Any, ...]
) -> tuple[dict[str, Tensor], list[tuple[Positions, Tensor]]]:
    """One forward: by filters that BatchNorm scales, its squared scales; and the largest value that reaches every position of
    the layers that read, infinite where nobody could look."""
    found: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    made: dict[
        int, tuple[str, Tensor]
    ] = {}  # by the convolution that has made it; kept, so that no other gets its number
    wanted = {r.tensor.removesuffix(".weight") for r in readers}

    def arrives(name: str, layer: nn.Module, given: tuple[Any, ...]) -> None:
        seen = given[0].detach().abs()
        others = [d for d in range(seen.dim()) if d != (seen.dim() - 1 if isinstance(layer, nn.Linear) else 1)]
        largest = seen.amax(others)
        found[name] = torch.maximum(found[name], largest) if name in found else largest

    def makes(name: str, layer: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
        made[id(output)] = name, output

    def scaled(norm: nn.Module, given: tuple[Any, ...]) -> None:
        if id(given[0]) in made and isinstance(norm.weight, Tensor):
            scales[f"{made[id(given[0])][0]}.weight"] = norm.weight.detach().square()

    hooks: list[Any] = []
    for name, layer in model.named_modules():
        if name in wanted and _reads_whole_channels(layer):
            hooks.append(layer.register_forward_pre_hook(partial(arrives, name)))
        if isinstance(layer, CONVOLUTIONS):
            hooks.append(layer.register_forward_hook(partial(makes, name)))
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            hooks.append(layer.register_forward_pre_hook(scaled))
    try:
        with _evaluating(model), torch.no_grad():
            model(*args)
    finally:
        for hook in hooks:
            hook.remove()
    nobody = {r.tensor: torch.full_like(r.owner, torch.inf, dtype=torch.float32) for r in readers}
    arriving = [
        (r, found.get(r.tensor.removesuffix(".weight"), nobody[r.tensor])) if r.dims == (1,) else (r, nobody[r.tensor])
        for r in readers
    ]
    return scales, arriving


def _reads_whole_channels(layer: nn.Module) -> bool:
    """Are the columns of its weight the channels that it is given?"""
    if isinstance(layer, nn.Linear):
        return True
    return isinstance(layer, CONVOLUTIONS) and layer.groups == 1


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
