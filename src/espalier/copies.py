"""Copies of models, faster than Python's general ``deepcopy``: a module is a few dictionaries of plain values."""

from __future__ import annotations

import copy
import copyreg
import functools
import types
from collections import Counter, OrderedDict
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
    every = (*parameters.values(), *buffers.values())
    plain = [t for t in every if type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided]
    stored = Counter(t.untyped_storage()._cdata for t in plain)  # tensors of the model in every storage
    for tensor in every:
        if id(tensor) in memo:
            continue
        if type(tensor) is nn.Parameter:  # what deepcopy does, without its bookkeeping
            copied = tensor.detach().clone(memory_format=torch.preserve_format)
            memo[id(tensor)] = nn.Parameter(copied, requires_grad=tensor.requires_grad)
        elif _is_whole(tensor) and stored[tensor.untyped_storage()._cdata] == 1:
            memo[id(tensor)] = tensor.clone(memory_format=torch.preserve_format)
    return _copied_module(model, memo)


def copied(model: nn.Module, tensors: Mapping[int, Tensor]) -> nn.Module:
    """``copy_model`` where ``tensors`` names every parameter and buffer, or where Python's own copy of the rest will do."""
    return _copied_module(model, dict(tensors))


def _is_whole(tensor: Tensor) -> bool:
    """A plain buffer that fills its storage and carries nothing else: a clone is all there is to copy."""
    return (
        type(tensor) is Tensor
        and tensor.layout is torch.strided
        and not tensor.requires_grad
        and tensor.grad is None
        and not tensor.__dict__
        and not tensor.is_complex()
        and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    )


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
    return tensors_of_modules(named_modules(model))


def tensors_of_modules(modules: Mapping[str, nn.Module]) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
    """``named_tensors`` for whoever has the modules at hand."""
    parameters: dict[str, nn.Parameter] = {}
    buffers: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, module in modules.items():
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
        if type(value) in _ATOMS:
            state[key] = value
        elif type(value) in _CONTAINERS and not value:  # most of what a module holds is an empty list of hooks
            known = memo.get(id(value))
            state[key] = memo.setdefault(id(value), type(value)()) if known is None else known
        elif key != "_compiled_call_impl":  # as in ``nn.Module.__getstate__``
            state[key] = _copied(value, memo)
    state.pop("_compiled_call_impl", None)
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
