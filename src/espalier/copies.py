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


def unwrapped(model: nn.Module, *, who: str, in_place: bool = False) -> nn.Module:
    """The network inside ``torch.compile``, ``DataParallel``, ``DistributedDataParallel`` and averaged weights.

    Raises: ValueError for what is no module, for a wrapper that holds parts of the parameters only or, ``in_place``, would not
    notice that they change, and for layers that have not seen an input or whose weights are quantised.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"{who}: expected an nn.Module, got {type(model).__name__}")
    while (name := _wrapper(model)) is not None:
        check_free(model, who=who)
        if in_place and name == "DistributedDataParallel":
            raise ValueError(
                f"{who}: this is a {name}, which does not follow when parameters change; give the network before it is "
                "wrapped, and wrap what comes back"
            )
        model = getattr(model, _WRAPPERS[name])
    for path, module in named_modules(model).items():
        if any(isinstance(t, _Uninitialized) for t in (*module._parameters.values(), *module._buffers.values())):
            raise ValueError(
                f"{who}: {path or 'the model'} is a {type(module).__name__}, which has no weights before it has seen an input; "
                "run the model once on an example, and give it then"
            )
        kind: Any = type(module)
        if _is_quantised(kind):
            raise ValueError(
                f"{who}: {path or 'the model'} is a {kind.__name__} of {kind.__module__}, whose weights are "
                "quantised; give the network as it was before, and quantise what comes back"
            )
    return model


@functools.cache
def _is_quantised(kind: type) -> bool:
    """Its weights are packed, so that none is seen among the parameters; what only stands ready for that computes in floats."""
    return kind.__module__.startswith("torch.ao.nn.") and (
        "quantized" in kind.__module__ and "FloatFunctional" not in kind.__name__
    )


def check_free(model: nn.Module, *, who: str) -> None:
    """Raises: ValueError where FSDP, or FSDP2's ``fully_shard`` and ``replicate``, hold the parameters of ``model``."""
    if (name := _wrapper(model)) in _HOLDERS:
        raise ValueError(
            f"{who}: this is a {name} ({_HOLDERS[name]}), which holds the parameters of the network and does not follow when "
            "they change; leave it out and call es.average_gradients(model) after backward(), or use DistributedDataParallel"
        )


_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "AveragedModel": "module",
}
_HOLDERS = {"FullyShardedDataParallel": "FSDP", "FSDPModule": "fully_shard or replicate", "DDP": "replicate"}
_Uninitialized = (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)


def _wrapper(model: nn.Module) -> str | None:
    """By name: to import them all would take seconds."""
    kinds = [k.__name__ for k in type(model).__mro__ if k.__module__.startswith("torch.")]
    return next((k for k in kinds if k in _WRAPPERS or k in _HOLDERS), None)


def check_sound(model: nn.Module, *, who: str) -> None:
    """Whether training can come to anything: dense, finite weights, no layer of width zero, names that a file can hold.

    Raises: ValueError naming the first that is not so.
    """
    check_names(model, who=who)
    for name, tensor in named_tensors(model)[0].items():
        if 0 in tensor.shape:
            raise ValueError(
                f"{who}: {name} is of shape {tuple(tensor.shape)}; a layer of width zero computes nothing, leave it out"
            )
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            how = "on meta" if tensor.is_meta else "quantised" if tensor.is_quantized else "sparse"
            raise ValueError(f"{who}: {name} is {how}; give dense weights of floating point that hold values")
        _check_finite(name, tensor, who)
    for name, statistic in named_tensors(model)[1].items():
        if name.rpartition(".")[2] in ("running_mean", "running_var"):  # other buffers may hold infinity, as masks do
            _check_finite(name, statistic, who)


def _check_finite(name: str, tensor: Tensor, who: str) -> None:
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor.detach()).all()):
        raise ValueError(
            f"{who}: {name} has values that are NaN or infinite before anything is done; give sound weights"
        )


def check_names(model: nn.Module, *, who: str) -> None:
    """Raise ``ValueError`` for a module's name that no file can hold."""
    for name in named_modules(model):
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{who}: the module {name!r} has a name that is not UTF-8; call it otherwise") from error


def copy_model(model: nn.Module, tensors: Mapping[int, Tensor]) -> nn.Module:
    """What ``copy.deepcopy`` gives, except that ``tensors[id(t)]`` takes the place of every tensor ``t`` named there.

    Whatever is shared inside the model is shared inside the copy.  Hooks that are closures over modules of the model, or over
    tables that these keep, are closures over those of the copy.  Results that a module keeps are cut off their gradients.
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
            value = tensor.detach().clone(memory_format=torch.preserve_format)
            memo[id(tensor)] = nn.Parameter(value, requires_grad=tensor.requires_grad)
        elif _is_whole(tensor) and stored[tensor.untyped_storage()._cdata] == 1:
            memo[id(tensor)] = tensor.clone(memory_format=torch.preserve_format)
    return copied(model, memo)


def copied(model: nn.Module, tensors: Mapping[int, Tensor]) -> nn.Module:
    """``copy_model`` where ``tensors`` names every parameter and buffer, or where Python's own copy of the rest will do."""
    memo: dict[int, Any] = dict(tensors)
    memo[_TABLES] = {
        id(v)
        for m in named_modules(model).values()
        for k, v in vars(m).items()
        if not k.startswith("_") and isinstance(v, (dict, list))
    }
    return _copied_module(model, memo)


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


def device_of(model: nn.Module) -> torch.device:
    """Where the parameters are; of none, the CPU."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


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
    if isinstance(module, torch.jit.ScriptModule):
        return _copied_script(module, memo)
    if not _is_plain(type(module)):  # type: ignore[arg-type]
        return copy.deepcopy(module, memo)
    new = memo[id(module)] = object.__new__(type(module))
    state = new.__dict__
    for key, value in module.__dict__.items():
        if type(value) in _ATOMS:
            state[key] = _copied_function(value, memo) if type(value) is types.FunctionType else value
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
            plain = type(item) in _ATOMS and type(item) is not types.FunctionType
            new[key] = item if plain else _copied(item, memo)
        return new
    if kind is list:
        new = memo[id(value)] = []
        new.extend(_copied(item, memo) for item in value)
        return new
    if kind is types.FunctionType:
        return _copied_function(value, memo)
    if kind is types.MethodType:
        return types.MethodType(value.__func__, _copied(value.__self__, memo))
    if isinstance(value, Tensor) and not value.is_leaf:  # a result, which deepcopy refuses
        result = memo[id(value)] = value.detach().clone()
        return result
    return _copied_module(value, memo) if isinstance(value, nn.Module) else copy.deepcopy(value, memo)


def _copied_function(function: types.FunctionType, memo: dict[int, Any]) -> types.FunctionType:
    """The same code over the copies of what it closes over: modules, and tables that modules keep."""
    cells = function.__closure__
    if not cells:
        return function
    new = []
    for cell in cells:
        try:
            content = cell.cell_contents
        except ValueError:  # nothing in it yet
            return function
        owner = content.__self__ if type(content) is types.MethodType else content  # a forward before it was replaced
        ours = isinstance(owner, nn.Module) or id(content) in memo.get(_TABLES, ())
        new.append(types.CellType(_copied(content, memo)) if ours else cell)
    if all(a is b for a, b in zip(new, cells, strict=True)):
        return function
    made = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(new)
    )
    made.__kwdefaults__ = function.__kwdefaults__
    made.__dict__.update(function.__dict__)
    return made


_TABLES = -1  # of a memo: identities of the tables that the model's modules keep; no object has this identity


def _copied_script(module: Any, memo: dict[int, Any]) -> Any:
    """A scripted module copies itself in C++, which knows nothing of ``memo``."""
    new = copy.deepcopy(module, memo)
    made = dict(new.named_modules())
    for path, part in module.named_modules():
        for name, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
            if id(tensor) in memo:
                made[path]._c.setattr(name, memo[id(tensor)])
    memo[id(module)] = new
    return new


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
