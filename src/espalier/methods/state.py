"""State that saves itself: values of a run as plain tensors, numbers, strings, lists and dictionaries, and back.

``CODECS`` has one row for every other type that may be remembered; what has a ``state_dict`` of its own is asked for that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from espalier.forms.candidates import Factors
from espalier.forms.lowrank import BasisChange
from espalier.forms.shapes import Rectangle
from espalier.graph import ConvSequence
from espalier.methods.kernels import Kernels

WEIGHT_FROZEN = "its weight is frozen"  # why a layer is left as it is


def is_frozen(model: nn.Module, layer: str) -> bool:
    """Is the weight of ``layer`` not to be trained?"""
    return not model.get_parameter(f"{layer}.weight").requires_grad


KIND = "kind of value"  # the key that marks a value of another type


def _cpu(tensors: Any) -> Any:
    """Factors are made, and go on, on the CPU."""
    return tuple(t.cpu() for t in tensors)


CODECS: dict[type, tuple[Callable[[Any], dict[str, Any]], Callable[[dict[str, Any]], Any]]] = {
    np.ndarray: (lambda a: {"values": torch.from_numpy(a.copy())}, lambda s: s["values"].cpu().numpy()),
    Rectangle: (vars, lambda s: Rectangle(**s)),
    Kernels: (vars, lambda s: Kernels(**s)),
    ConvSequence: (vars, lambda s: ConvSequence(**s)),
    BasisChange: (lambda t: {"factors": (t.u, t.s, t.v)}, lambda s: BasisChange.alone(*_cpu(s["factors"]))),
    Factors: (
        vars,
        lambda s: Factors(**{**s, "weights": _cpu(s["weights"]), "bases": s["bases"] and _cpu(s["bases"])}),
    ),
}
"""Type -> to a dictionary of plain values, and back."""

_BY_NAME = {kind.__name__: back for kind, (_, back) in CODECS.items()} | {
    "Forms": CODECS[Kernels][1]
}  # its name before


def plain(value: Any, name: str) -> Any:
    """``value`` for a checkpoint: a copy that later steps do not change.

    Raises: ValueError that names what cannot be saved.
    """
    if isinstance(value, Tensor):
        return value.detach().clone()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {k: plain(v, f"{name}[{k!r}]") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        items = [plain(v, f"{name}[{i}]") for i, v in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    if type(value) in CODECS:
        there = CODECS[type(value)][0](value)
        return {KIND: type(value).__name__, **{k: plain(v, f"{name}.{k}") for k, v in there.items()}}
    raise ValueError(
        f"{name} is a {type(value).__name__}: a run can remember tensors, arrays, numbers, strings, lists, tuples, "
        "dictionaries, and what has state_dict() and load_state_dict()"
    )


def restored(saved: Any, device: torch.device) -> Any:
    """Inverse of ``plain``; tensors go to ``device``, those of factors to the CPU."""
    if isinstance(saved, Tensor):
        return saved.to(device)
    if isinstance(saved, dict):
        found = {k: restored(v, device) for k, v in saved.items() if k != KIND}
        return _BY_NAME[saved[KIND]](found) if KIND in saved else found
    if isinstance(saved, (list, tuple)):
        return type(saved)(restored(v, device) for v in saved)
    return saved
