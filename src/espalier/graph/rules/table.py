"""The table of rules: one per ATen operation, and what several rules share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from espalier.graph.call import Call
from espalier.graph.reasons import Reason
from espalier.graph.watch import ALL, Layer, Watch, state

aten = torch.ops.aten
Rule = Callable[[Watch, Call], None]
RULES: dict[Any, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function for ATen operations by name; names this torch does not have are skipped.

    An operation of another library is named with its namespace, ``torchvision::roi_align``.
    """

    def register(function: Rule) -> Rule:
        for name in names:
            packet = name if "::" in name else getattr(aten, name, None)
            if packet is not None:
                RULES[packet] = function
        return function

    return register


def align(layer: Layer, ndim: int) -> Layer:
    return layer if layer.ndim == ndim else layer.reshape((1,) * (ndim - layer.ndim) + tuple(layer.shape))


def dims_of(dims: Any, ndim: int) -> list[int]:
    """Normalise a reduction's ``dim`` argument; ``None`` and ``[]`` mean all."""
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return list(range(ndim))
    if isinstance(dims, int):
        dims = [dims]
    return [d % ndim for d in dims] if ndim else []


def derived_from(operands: Sequence[Tensor]) -> int:
    """``State.derived`` of what is made of ``operands``; a tensor the watch has never seen is no parameter."""
    kinds = [state(t).derived for t in operands]
    return max(kinds) if kinds and 0 not in kinds else 0


def pending_of(operands: Sequence[Tensor]) -> tuple[tuple[np.ndarray, Reason], ...]:
    return tuple(p for t in operands for p in state(t).pending)


def settle(watch: Watch, operands: Sequence[Tensor]) -> None:
    """Weights whose inputs were mixed by a statistic meet an activation other than as a weight: freeze what was mixed."""
    for tensor in operands:
        for labels, reason in state(tensor).pending:
            watch.mixes.append((labels, ALL, reason))
