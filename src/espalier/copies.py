"""Copies of models, faster than Python's general ``deepcopy``: a module is a few dictionaries of plain values."""

from __future__ import annotations

import copy
import copyreg
import functools
import types
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

_ATOMS: frozenset[Any] = frozenset([
    bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device, torch.Size, types.FunctionType,
    types.BuiltinFunctionType,
])  # fmt: skip
_CONTAINERS: frozenset[Any] = frozenset([dict, OrderedDict, set, list])


def copy_model(model: nn.Module, tensors: Mapping[int, Tensor]) -> nn.Module:
    """What ``copy.deepcopy`` gives, except that ``tensors[id(t)]`` takes the place of every tensor ``t`` named there.

    Whatever is shared inside the model is shared inside the copy.
    """
    memo: dict[int, Any] = dict(tensors)
    parameters, buffers = named_tensors(model)
    for tensor in (*parameters.values(), *buffers.values()):
        if id(tensor) not in memo and type(tensor) is nn.Parameter:  # what deepcopy does, without its bookkeeping
            copied = tensor.detach().clone(memory_format=torch.preserve_format)
            memo[id(tensor)] = nn.Parameter(copied, requires_grad=tensor.requires_grad)
        elif id(tensor) not in memo and type(tensor) is Tensor and tensor.ndim == 0 and not tensor.requires_grad:
            memo[id(tensor)] = tensor.clone()
    return _copied_module(model, memo)


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """``dict(model.named_modules())`` in one pass."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def visit(module: nn.Module, name: str) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        found[name] = module
        for key, child in module._modules.items():
            if child is not None:
                visit(child, f"{name}.{key}" if name else key)

    visit(model, "")
    return found


def named_tensors(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
    """``dict(model.named_parameters())`` and ``dict(model.named_buffers())`` in one pass."""
    parameters: dict[str, nn.Parameter] = {}
    buffers: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, module in named_modules(model).items():
        for slots, into in ((module._parameters, parameters), (module._buffers, buffers)):
            for key, tensor in slots.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    into[f"{name}.{key}" if name else key] = tensor  # type: ignore[assignment]
    return parameters, buffers


def _copied_module(module: nn.Module, memo: dict[int, Any]) -> Any:
    known = memo.get(id(module))
    if known is not None:
        return known
    if not _is_plain(type(module)):  # type: ignore[arg-type]
        return copy.deepcopy(module, memo)
    new = memo[id(module)] = object.__new__(type(module))
    state = new.__dict__
    for key, value in module.__dict__.items():
        if key == "_compiled_call_impl":  # as in ``nn.Module.__getstate__``
            continue
        state[key] = value if type(value) in _ATOMS else _copied(value, memo)
    return new


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    known = memo.get(id(value))
    if known is not None:
        return known
    kind = type(value)
    if kind is tuple and _ATOMS.issuperset(map(type, value)):
        return value
    if kind in _CONTAINERS and (
        not value or (kind is not dict and kind is not OrderedDict and _ATOMS.issuperset(map(type, value)))
    ):
        new = memo[id(value)] = kind(value)
        return new
    if (kind is dict or kind is OrderedDict) and _ATOMS.issuperset(map(type, value)):
        new = memo[id(value)] = kind()
        for key, item in value.items():
            new[key] = item if type(item) in _ATOMS else _copied(item, memo)
        return new
    return _copied_module(value, memo) if isinstance(value, nn.Module) else copy.deepcopy(value, memo)


@functools.cache
def _is_plain(kind: type) -> bool:
    """Does ``deepcopy`` do no more for this module type than to copy its ``__dict__``?"""
    return (
        not hasattr(kind, "__deepcopy__")
        and not hasattr(kind, "__getnewargs__")
        and not hasattr(kind, "__getnewargs_ex__")
        and kind not in copyreg.dispatch_table
        and kind.__new__ is object.__new__
        and kind.__reduce__ is object.__reduce__
        and kind.__reduce_ex__ is object.__reduce_ex__
        and kind.__getstate__ is nn.Module.__getstate__  # type: ignore[attr-defined]
        and kind.__setstate__ in (nn.Module.__setstate__, _ConvNd.__setstate__)  # type: ignore[attr-defined]
        and not copyreg._slotnames(kind)  # type: ignore[attr-defined]
    )
