"""Save and load small networks: weights and structure in one safetensors file, nothing pickled.

The structure is a table of module name -> type and numbers, for the module types whose numbers surgery may change.  A fresh
dense model plus that table gives the small one, whatever made it small.  What else decides on outputs - an eps, a slope, a
stride - stands in the table to be compared: it must be the same in the fresh model.

A file may come from anywhere.  It sets numbers that the type of a module declares, and nothing else; nothing is allocated
before its sizes are those of the tensors in the file; and a model that it does not fit is left as it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import json
import os
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from espalier.carving import computes_weight, in_forward, is_own, plain_settings, put_in_place, refresh, whole_numbers
from espalier.copies import check_names, unwrapped
from espalier.forms import LowRank
from espalier.graph.blocks import LEFT
from espalier.graph.watch import first_line
from espalier.layers import ChannelPad, FactorisedConv, FactorisedLinear, PaddedConv2d, PartConv2d
from espalier.seals import DAMAGED, SEAL, seal
from espalier.surgery.writing import write_beside

FORMAT = "espalier/1"

ATTRIBUTES: dict[type, tuple[str, ...]] = {
    _ConvNd: ("in_channels", "out_channels", "groups", "kernel_size", "padding"),
    nn.Linear: ("in_features", "out_features"),
    nn.Bilinear: ("out_features", "in1_features", "in2_features"),
    _NormBase: ("num_features",),
    nn.GroupNorm: ("num_channels", "num_groups"),
    nn.LayerNorm: ("normalized_shape",),
    nn.PReLU: ("num_parameters",),
    nn.RNNBase: ("input_size", "hidden_size", "proj_size"),
    nn.RNNCellBase: ("input_size", "hidden_size"),
    ChannelPad: ("before", "after"),
}
"""Numbers that follow the widths, by module type (subclasses included)."""

_GEOMETRY = ("kernel_size", "stride", "padding", "dilation")
_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


def _conv_arguments(module: Any) -> dict[str, Any]:
    return {k: getattr(module, k) for k in _CONV} | {"bias": module.bias is not None}


_LOW_RANK = (
    "in_channels", "out_channels", "rank", "form", "kernel_size", "stride", "padding", "dilation", "linear", "whole",
)  # fmt: skip


def _low_rank_arguments(module: Any) -> dict[str, Any]:
    return {k: getattr(module, k) for k in _LOW_RANK} | {"bias": module.bias is not None}


BUILDERS: dict[str, tuple[type[nn.Module], Callable[[Any], dict[str, Any]]]] = {
    "Conv1d": (nn.Conv1d, _conv_arguments),
    "Conv2d": (nn.Conv2d, _conv_arguments),
    "Conv3d": (nn.Conv3d, _conv_arguments),
    "PaddedConv2d": (PaddedConv2d, _conv_arguments),
    "PartConv2d": (PartConv2d, lambda m: {**_conv_arguments(m), "selects": m.index is not None, "shift": m.shift}),
    "Linear": (
        nn.Linear,
        lambda m: {"in_features": m.in_features, "out_features": m.out_features, "bias": m.bias is not None},
    ),
    "Sequential": (nn.Sequential, lambda m: {}),
    "FactorisedConv": (FactorisedConv, lambda m: {k: getattr(m, k) for k in _GEOMETRY}),
    "FactorisedLinear": (FactorisedLinear, lambda m: {}),
    "LowRank": (LowRank, _low_rank_arguments),
    **{name: (kind, lambda m: {}) for name, kind in LEFT.items()},  # in place of blocks
}
"""Module types that surgery puts in place of others, and how to make them again."""


def structure(model: nn.Module) -> dict[str, Any]:
    """The table that ``rebuild`` needs: plain JSON data, without weights."""
    modules: dict[str, Any] = {}
    for name, module in model.named_modules():
        entry: dict[str, Any] = {"type": type(module).__name__}
        if numbers := {k: getattr(module, k) for k in _declared(module)}:
            entry["numbers"] = numbers
        made: dict[str, Any] = {}
        if entry["type"] in BUILDERS and type(module) is BUILDERS[entry["type"]][0]:
            made = entry["make"] = BUILDERS[entry["type"]][1](module)
            if frozen := [k for k, p in module.named_parameters(recurse=False) if not p.requires_grad]:
                entry["frozen"] = frozen
        if compared := {k: v for k, v in _compared(module).items() if k not in numbers and k not in made}:
            entry["settings"] = compared
        modules[name] = entry
    top = modules.pop("")
    shapes = {n: list(t.shape) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    return {
        "format": FORMAT,
        "class": type(model).__name__,
        "modules": modules,
        "shapes": shapes,
        "settings": top.get("settings", {}),
        "numbers": top.get("numbers", {}),
    }


# -- what a module says of itself -------------------------------------------------------------------------------------


def _declared(module: nn.Module) -> tuple[str, ...]:
    """Names of the numbers that follow the widths: those of its type, and the whole numbers that code of one's own keeps."""
    kind = next((k for k in type(module).__mro__ if k in ATTRIBUTES), None)
    if kind is not None:
        return tuple(k for k in ATTRIBUTES[kind] if hasattr(module, k))
    return tuple(whole_numbers(module))


def _compared(module: nn.Module) -> dict[str, Any]:
    """What decides on outputs and never follows the widths: numbers, words and functions that a module keeps."""
    unseen = next((names for kind, names in _TRAINING_ONLY.items() if isinstance(module, kind)), ())
    own = whole_numbers(module)
    reads = in_forward(type(module), "LOAD_ATTR")  # type: ignore[arg-type]
    settings = [(k, v) for k, v in plain_settings(module) if k not in unseen and k not in own]
    # a table may be about training, or where the weights came from
    found = {k: _said(v) for k, v in settings if k in reads or not _is_table(v)}
    return {k: v for k, v in found.items() if v is not _NOTHING}


_TRAINING_ONLY: dict[type, tuple[str, ...]] = {_DropoutNd: ("p",), _NormBase: ("momentum",)}
_NOTHING: Any = object()


def _said(value: Any) -> Any:
    """``value`` as JSON gives it back; ``_NOTHING`` where it is no plain value, or names a place on this machine."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return repr(value)  # also NaN, which is not equal to itself
    if isinstance(value, str):
        return _NOTHING if os.sep in value else value
    if isinstance(value, (list, tuple)):
        items = [_said(v) for v in value]
        return _NOTHING if any(i is _NOTHING for i in items) else items
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType, type)):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, functools.partial):
        return _said([value.func, value.args, value.keywords])
    if _is_table(value):
        value = value if isinstance(value, dict) else vars(value)
        named = {k: _said(v) for k, v in value.items() if isinstance(k, str)}
        return _NOTHING if len(named) < len(value) or any(v is _NOTHING for v in named.values()) else named
    return _NOTHING


def _is_table(value: Any) -> bool:
    kinds = (dict, types.SimpleNamespace, argparse.Namespace)
    return isinstance(value, kinds) or (dataclasses.is_dataclass(value) and not isinstance(value, type))


# -- onto a fresh model -----------------------------------------------------------------------------------------------

_LARGEST = 2**31  # of a size; a width, a stride or a padding above it is none


def rebuild(base: nn.Module, table: dict[str, Any]) -> nn.Module:
    """Give ``base``, a fresh dense model, the structure of ``table``, in place; weights are left undefined.

    New modules have the device and the dtype of what they replace, and of their parameters those are frozen that were.
    ``ValueError`` if ``base`` is another architecture, naming the first module that differs; ``base`` is as it was then.
    """
    with untouched_on_error(base):
        values = {}
        for name, device in _reshape(base, table).items():
            tensor = _tensor(base, name)
            if device.type != "meta":
                values[name] = torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
        _replace(base, values)
    return base


@contextmanager
def untouched_on_error(model: nn.Module) -> Iterator[None]:
    """Whatever is raised inside, ``model`` holds the modules, tensors and numbers that it held.

    Elements that were overwritten in place are not looked after.
    """
    own = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]  # these hold what they are made of
    before = [(m, dict(m.__dict__)) for m in own]
    values = [(t, t.data) for t in (*model.parameters(), *model.buffers())]
    slots = [(m, {k: dict(m.__dict__[k]) for k in _SLOTS}) for m, _ in before]
    try:
        yield
    except BaseException:
        for tensor, value in values:
            tensor.data = value
        for (module, state), (_, kept) in zip(before, slots, strict=True):
            module.__dict__.clear()
            module.__dict__.update(state)
            for key, entries in kept.items():
                state[key].clear()
                state[key].update(entries)
        raise


_SLOTS = ("_parameters", "_buffers", "_modules")


def _reshape(base: nn.Module, table: Mapping[str, Any]) -> dict[str, torch.device]:
    """``rebuild`` with new tensors on meta, which takes no memory; returns their names and where they belong."""
    _check_form(table)
    own = dict(base.named_modules())
    places: dict[str, Tensor] = {}  # module that was replaced -> a tensor of it
    made: dict[str, torch.device] = {}
    for name, entry in table["modules"].items():
        module = own.get(name)
        normed = module is not None and computes_weight(module) and f"{name}.weight" in table["shapes"]
        if module is None or normed or type(module).__name__ != entry["type"] or _is_another(module, entry):
            if "make" not in entry:
                found = "nothing" if module is None else type(module).__name__
                raise ValueError(
                    f"structure: the file has a {entry['type']} at {name!r}, the base model has {found}; "
                    f"give the {table.get('class')} the file was made from"
                )
            parent, _, key = name.rpartition(".")
            like = _first_weight(module) if module is not None else places.get(parent)
            like = like if like is not None else _first_weight(base)
            new = _made(entry, name)
            if (
                entry["type"] in LEFT
            ):  # made without arguments: right for what surgery left, not for an activation with its own
                _check_settings(new, entry.get("settings", {}), name, table)
            if like is not None:
                new.to(like.dtype)
                places[name] = like
            for frozen in entry.get("frozen", ()):
                if frozen not in new._parameters:
                    raise ValueError(f"structure: {name!r} has no parameter {frozen!r}")
                new.get_parameter(frozen).requires_grad_(False)
            parent_module = own.get(parent)
            if module is None and (parent_module is None or not (parent in made or key in parent_module._modules)):
                raise ValueError(f"structure: the base model has no place for {name!r}")
            if module is None:
                assert parent_module is not None
                parent_module.add_module(key, new)
            else:
                put_in_place(base, module, new)
            made[name] = torch.device("cpu") if like is None else like.device
            own = dict(base.named_modules())
            module = new
        else:
            _check_settings(module, entry.get("settings", {}), name, table)
        _set_numbers(module, entry.get("numbers", {}), name)
    _check_settings(base, table.get("settings", {}), "", table)
    _set_numbers(base, table.get("numbers", {}), "")
    extra = [n for n in dict(base.named_modules()) if n and n not in table["modules"]]
    if extra:
        raise ValueError(f"structure: the base model has modules the file does not know, for example {extra[0]!r}")
    fresh: dict[str, torch.device] = {}
    empty = {}
    for name, tensor in [*base.named_parameters(), *base.named_buffers()]:
        shape = table["shapes"].get(name)
        home = made.get(name.rpartition(".")[0])
        if shape is not None and list(tensor.shape) != shape:
            if home is not None:
                raise ValueError(f"structure: {name} is {shape} there, and its layer says {list(tensor.shape)}")
            if len(shape) != tensor.ndim:
                raise ValueError(
                    f"structure: {name} has {len(shape)} dimensions there and {tensor.ndim} in the base model"
                )
            fresh[name] = tensor.device
            empty[name] = torch.empty(shape, dtype=tensor.dtype, device="meta")
        elif home is not None:
            fresh[name] = home
    _replace(base, empty)
    _check_numbers(base)
    return fresh


def _check_form(table: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for what ``structure`` does not give."""
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        form = table.get("format") if isinstance(table, dict) else None
        raise ValueError(f"structure: format {form!r} is not {FORMAT!r}; the file was not written by es.save")
    for part in ("modules", "shapes"):
        if not isinstance(table.get(part), dict):
            raise ValueError(f"structure: damaged, it has no table of {part}")
    for name, entry in table["modules"].items():
        if not isinstance(entry, dict) or not isinstance(entry.get("type"), str):
            raise ValueError(f"structure: damaged, the entry of {name!r} has no type")
        for part in ("numbers", "make", "settings"):
            if not isinstance(entry.get(part, {}), dict):
                raise ValueError(f"structure: damaged, {part} of {name!r} is no table")
    for name, shape in table["shapes"].items():
        if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < _LARGEST for n in shape):
            raise ValueError(f"structure: damaged, the shape of {name!r} is {str(shape)[:50]}")


def _made(entry: Mapping[str, Any], name: str) -> nn.Module:
    """The module that the file wants at ``name``, on meta."""
    if entry["type"] not in BUILDERS:
        raise ValueError(f"structure: {name!r} is to be a {entry['type']}, which no file can make")
    kind, arguments = BUILDERS[entry["type"]][0], _tuples(entry["make"])
    known = inspect.signature(kind).parameters.keys() - {"device", "dtype"}
    for key, value in arguments.items():
        if key not in known or not _is_plain(value):
            raise ValueError(f"structure: {name!r}: a {entry['type']} cannot be made with {key}={str(value)[:50]}")
    try:
        with torch.device("meta"):
            return kind(**arguments)
    except Exception as error:  # whatever a constructor thinks of such arguments
        raise ValueError(f"structure: {name!r}: no such {entry['type']} can be made ({first_line(error)})") from error


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return len(value) < 16 and all(type(v) is int and abs(v) < _LARGEST for v in value)
    return value is None or isinstance(value, (bool, str)) or (type(value) is int and 0 <= value < _LARGEST)


def _check_settings(module: nn.Module, there: Mapping[str, Any], name: str, table: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` if ``module`` computes something else than the one that was saved."""
    here = _compared(module)
    for key, value in there.items():
        if key in here and here[key] != value:
            where = f"{name}.{key}" if name else key
            raise ValueError(
                f"structure: {where} is {_shown(value)} in the file and {_shown(here[key])} in the base model; "
                f"give the {table.get('class')} the file was made from, with the same settings"
            )


def _shown(value: Any) -> str:
    return str(value)[:60]


def _set_numbers(module: nn.Module, numbers: Mapping[str, Any], name: str) -> None:
    """Numbers that follow the widths, each of the kind that stands there."""
    declared = _declared(module)
    for key, value in numbers.items():
        if key not in declared:
            raise ValueError(f"structure: {key!r} of {name!r} is no number that a {type(module).__name__} declares")
        own, new = getattr(module, key), tuple(value) if isinstance(value, list) else value
        if not _same_kind(own, new, signed=is_own(type(module))):
            raise ValueError(f"structure: {key} of {name!r} cannot be {str(value)[:50]} where it was {own}")
        if own != new:
            setattr(module, key, list(new) if isinstance(own, list) else new)


def _same_kind(own: Any, new: Any, *, signed: bool) -> bool:
    if isinstance(new, str) or isinstance(own, str):
        return bool(own == new) or (isinstance(own, str) and isinstance(new, tuple))  # "same" may become numbers
    several = isinstance(own, (tuple, list))
    if several != isinstance(new, tuple):
        return False
    numbers = new if several else (new,)
    return all(type(n) is int and (-_LARGEST if signed else 0) <= n < _LARGEST for n in numbers)


def _check_numbers(model: nn.Module) -> None:
    """Numbers that repeat the shape of a tensor do repeat it."""
    for name, module in model.named_modules():
        before = {k: getattr(module, k) for k in _declared(module)}
        if isinstance(module, nn.GroupNorm) and (module.num_groups < 1 or module.num_channels % module.num_groups):
            raise ValueError(f"structure: {name!r} has {module.num_channels} channels in {module.num_groups} groups")
        if isinstance(module, _ConvNd) and tuple(module.kernel_size) != tuple(module.weight.shape[2:]):
            raise ValueError(
                f"structure: {name!r} has kernels of {list(module.weight.shape[2:])}, not {module.kernel_size}"
            )
        refresh(module, name, {}, None)
        for key, value in before.items():
            if getattr(module, key) != value:
                right = getattr(module, key)
                raise ValueError(f"structure: {key} of {name!r} is {value} there, and its tensors say {right}")


def _is_another(module: nn.Module, entry: dict[str, Any]) -> bool:
    """Was it made with other arguments than those that follow the widths: another stride, no bias?"""
    kind, arguments = BUILDERS.get(entry["type"], (None, None))
    if "make" not in entry or arguments is None or type(module) is not kind:
        return False
    own, numbers = arguments(module), entry.get("numbers", {})
    return any(k not in numbers and (k not in own or own[k] != v) for k, v in _tuples(entry["make"]).items())


def _first_weight(module: nn.Module) -> Tensor | None:
    return next((p for p in module.parameters() if p.is_floating_point()), None)


def _tuples(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, key = name.rpartition(".")
    module = dict(model.named_modules(remove_duplicate=False))[path]
    found: Tensor | None = module._parameters.get(key)
    found = module._buffers[key] if found is None else found
    assert found is not None
    return found


def _replace(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Put ``values`` in the place of parameters and buffers of these names, in one walk; shared parameters stay shared."""
    new: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    modules = dict(model.named_modules(remove_duplicate=False))  # a scripted model has no ``get_submodule``
    for name, value in values.items():
        path, _, key = name.rpartition(".")
        module = modules[path]
        if key in module._parameters:
            old = module._parameters[key]
            assert old is not None
            new[id(old)] = old, nn.Parameter(value, requires_grad=old.requires_grad)
        else:
            module._buffers[key] = value
    for module in model.modules():
        changed = {k: new[id(p)][1] for k, p in module._parameters.items() if id(p) in new}
        for key, parameter in changed.items():
            module._parameters[key] = parameter  # of a scripted module it is no dictionary
        if changed and isinstance(module, nn.RNNBase):
            module._init_flat_weights()  # it holds its parameters a second time


def save(model: nn.Module, path: str | os.PathLike[str], *, extra: dict[str, str] | None = None) -> None:
    """Write weights and structure of ``model`` to one safetensors file, with a checksum.

    Written beside and then renamed: a full disk leaves an existing file as it was.  ``extra`` are further metadata strings.

    Raises: ValueError for names that no file can hold; OSError if it cannot be written.
    """
    path, model = Path(path), unwrapped(model, who="save")
    check_names(model, who="save")
    tensors: dict[str, Tensor] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:  # shared ones once
        tensors[name] = tensor.detach().cpu().contiguous()
    seen = {t.data_ptr() for t in tensors.values() if t.numel()}
    if len(seen) < sum(1 for t in tensors.values() if t.numel()):
        tensors = {n: t.clone() for n, t in tensors.items()}
    metadata = {"espalier": json.dumps({**structure(model), "sealed": True}), **(extra or {})}
    metadata[SEAL] = seal([metadata, tensors])
    write_beside(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def load(path: str | os.PathLike[str], *, base: nn.Module | None = None) -> nn.Module:
    """Rebuild the small network of ``path`` on ``base``, a fresh model of the class that was compressed; returns ``base``.

    Device, dtype and memory format are those of ``base``; one on meta, which has no memory, gets the file's tensors on the CPU.

    Raises: FileNotFoundError if there is none; ValueError if the file is damaged, was not written by ``save``, or belongs to
    another architecture or to other settings of it, or without a ``base``.  ``base`` is as it was then.
    """
    table, tensors = _read(path)
    if base is None:
        raise ValueError(
            f"{path}: holds weights and structure, not the code of the network; give base=YOUR_MODEL(...), a fresh one of the "
            "class that was compressed"
        )
    given, base = base, unwrapped(base, who="load", in_place=True)
    try:
        with untouched_on_error(base):
            fresh = _reshape(base, table)
            own = dict([*base.named_parameters(), *base.named_buffers()])
            _check_tensors(own, tensors)
            values = {}
            for name, tensor in own.items():
                home = fresh.get(name, tensor.device)
                if tensor.is_meta:
                    where = "cpu" if home.type == "meta" else home
                    values[name] = tensors[name].to(where, tensor.dtype, copy=True)  # the file's are not aligned
            _replace(base, values)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{path}: {first_line(error)}") from error
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name not in fresh and not own[name].is_meta:
                own[name].copy_(tensor)
    return given


NOT_OURS = {
    ".onnx": "is an ONNX file, for a runtime",
    ".pt2": "is a program: torch.export.load(path).module()",
    ".pt": "is a checkpoint (es.load_weights(model, path)) or TorchScript (torch.jit.load(path))",
    ".pth": "is a checkpoint: es.load_weights(model, path)",
    ".ckpt": "is a checkpoint: es.load_weights(model, path)",
}


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Structure and tensors, as they were written."""
    if Path(path).is_dir():
        raise ValueError(
            f"{path}: is a folder; give es.load_run({os.fspath(path)!r}) if it is a run's, or the file in it"
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if "espalier" not in metadata:
                raise ValueError(f"{path}: holds weights but no Espalier structure; load it as an ordinary checkpoint")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        other = NOT_OURS.get(Path(path).suffix)
        what = (
            f"{other}; es.load reads the .safetensors that es.save wrote" if other else "not a whole safetensors file"
        )
        raise ValueError(f"{path}: {what} ({error})") from error
    try:
        table = json.loads(metadata["espalier"])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, its structure cannot be read ({first_line(error)})") from error
    written = metadata.pop(SEAL, None)
    # A file from before there were checksums has none.
    if (written is not None or (isinstance(table, dict) and "sealed" in table)) and written != seal(
        [metadata, tensors]
    ):
        raise ValueError(f"{path}: {DAMAGED}")
    return table, tensors


def _check_tensors(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Raise ``ValueError`` unless ``tensors`` fit, one by one."""
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or unexpected:
        raise ValueError(f"weights do not fit the base model; missing {missing[:5]}, unexpected {unexpected[:5]}")
    for name, tensor in own.items():
        there = tensors[name]
        if there.shape != tensor.shape:
            raise ValueError(f"{name} is {tuple(there.shape)} in the file, its structure says {tuple(tensor.shape)}")
        if there.is_floating_point() != tensor.is_floating_point() or there.is_complex() != tensor.is_complex():
            raise ValueError(f"{name} is {there.dtype} in the file and {tensor.dtype} in the base model")
