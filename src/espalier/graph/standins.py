"""Operations whose output has as many rows as values say: here as if every value passed.

A tracer knows no values, and in a smaller copy of a network they are others; so ``nonzero`` finds every position, a mask lets
everything through, ``nms`` keeps every box, and ``unique`` finds a single value (there is code that loops over them).  That is
the same on every device and at every width, and the most that what comes after can cost.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def _numbers(like: Tensor, count: int) -> Tensor:
    return torch.arange(count, device=like.device)


def _positions(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Of every element its position, shape ``(elements, dimensions)``."""
    if device.type == "meta":
        count = torch.Size(shape).numel()
        return torch.empty((count, len(shape)), dtype=torch.int64, device=device)
    return torch.ones(shape, dtype=torch.bool, device=device).nonzero()


def nonzero(x: Tensor) -> Tensor:
    return _positions(tuple(x.shape), x.device)


def masked_select(x: Tensor, mask: Tensor) -> Tensor:
    return torch.broadcast_tensors(x, mask)[0].reshape(-1)


def index(x: Tensor, indices: list[Tensor | None]) -> Tensor | None:
    """``x[mask]`` reads as many rows as the mask has elements."""
    if not any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices):
        return None
    whole: list[Tensor | None] = []
    for i in indices:
        masks = i is not None and i.dtype in (torch.bool, torch.uint8)
        whole += _positions(tuple(i.shape), i.device).unbind(1) if masks and i is not None else [i]
    return torch.ops.aten.index.Tensor(x, whole)


def unique(x: Tensor, *options: Any, **named: Any) -> tuple[Tensor, Tensor, Tensor]:
    flat = x.reshape(-1)
    return flat[:1], torch.zeros_like(x, dtype=torch.int64), _numbers(x, 1)


def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    return _numbers(scores, len(scores))


STAND_INS: dict[str, Callable[..., Any]] = {
    "aten::nonzero": nonzero,
    "aten::masked_select": masked_select,
    "aten::index": index,
    "aten::_unique2": unique,
    "torchvision::nms": nms,
}


@functools.cache
def _of(op: Any) -> Callable[..., Any] | None:
    return STAND_INS.get(op._schema.name) if op._overloadname != "out" else None


def stand_in(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What ``op`` returns if every value passes; ``None`` where its size does not depend on values."""
    found = _of(op)
    return None if found is None else found(*args, **kwargs)


class StandIns(TorchDispatchMode):
    """A forward in which every value passes: what costs are counted on."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        made = stand_in(op, args, kwargs or {})
        return op(*args, **(kwargs or {})) if made is None else made
