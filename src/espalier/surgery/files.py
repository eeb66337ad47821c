"""Save and load small networks: weights and structure in one safetensors file, nothing pickled.

The structure is a table of module name -> type and numbers, for the module types whose numbers surgery may change.  A fresh
dense model plus that table gives the small one, whatever made it small.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from espalier.carving import put_in_place
from espalier.forms import LowRank
from espalier.graph.blocks import LEFT
from espalier.layers import ChannelPad, PaddedConv2d, PartConv2d

FORMAT = "espalier/1"

ATTRIBUTES: dict[type, tuple[str, ...]] = {
    _ConvNd: ("in_channels", "out_channels", "groups", "kernel_size", "padding"),
    nn.Linear: ("in_features", "out_features"),
    _NormBase: ("num_features",),
    nn.GroupNorm: ("num_channels", "num_groups"),
    nn.LayerNorm: ("normalized_shape",),
    nn.PReLU: ("num_parameters",),
    ChannelPad: ("before", "after"),
}
"""Numbers that follow the widths, by module type (subclasses included)."""

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
    "LowRank": (LowRank, _low_rank_arguments),
    **{name: (kind, lambda m: {}) for name, kind in LEFT.items()},  # in place of blocks
}
"""Module types that surgery puts in place of others, and how to make them again."""


def structure(model: nn.Module) -> dict[str, Any]:
    """The table that ``rebuild`` needs: plain JSON data, without weights."""
    modules: dict[str, Any] = {}
    for name, module in model.named_modules():
        entry: dict[str, Any] = {"type": type(module).__name__}
        for kind in type(module).__mro__:
            if kind in ATTRIBUTES:
                entry["numbers"] = {k: getattr(module, k) for k in ATTRIBUTES[kind]}
                break
        if entry["type"] in BUILDERS and type(module) is BUILDERS[entry["type"]][0]:
            entry["make"] = BUILDERS[entry["type"]][1](module)
            if frozen := [k for k, p in module.named_parameters(recurse=False) if not p.requires_grad]:
                entry["frozen"] = frozen
        if name:
            modules[name] = entry
    shapes = {n: list(t.shape) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    return {"format": FORMAT, "class": type(model).__name__, "modules": modules, "shapes": shapes}


def rebuild(base: nn.Module, table: dict[str, Any]) -> nn.Module:
    """Give ``base``, a fresh dense model, the structure of ``table``, in place; weights are left undefined.

    New modules have the device and the dtype of what they replace, and of their parameters those are frozen that were.
    ``ValueError`` if ``base`` is another architecture, naming the first module that differs.
    """
    if table.get("format") != FORMAT:
        raise ValueError(
            f"structure: format {table.get('format')!r} is not {FORMAT!r}; the file was not written by es.save"
        )
    own = dict(base.named_modules())
    places: dict[str, Tensor] = {}  # module that was replaced -> a tensor of it
    for name, entry in table["modules"].items():
        module = own.get(name)
        if module is None or type(module).__name__ != entry["type"] or _is_another(module, entry):
            if "make" not in entry:
                found = "nothing" if module is None else type(module).__name__
                raise ValueError(
                    f"structure: the file has a {entry['type']} at {name!r}, the base model has {found}; "
                    f"give the {table.get('class')} the file was made from"
                )
            parent, _, key = name.rpartition(".")
            like = _first_weight(module) if module is not None else places.get(parent)
            like = like if like is not None else _first_weight(base)
            made = BUILDERS[entry["type"]][0](**_tuples(entry["make"]))
            if like is not None:
                made.to(like.device, like.dtype)
                places[name] = like
            for frozen in entry.get("frozen", ()):
                made.get_parameter(frozen).requires_grad_(False)
            parent_module = base.get_submodule(parent)
            if not isinstance(parent_module, nn.Sequential) and not hasattr(parent_module, key):
                raise ValueError(f"structure: the base model has no place for {name!r}")
            if module is None:
                parent_module.add_module(key, made)
            else:
                put_in_place(base, module, made)
            own = dict(base.named_modules())
            module = made
        for key, value in entry.get("numbers", {}).items():
            setattr(module, key, tuple(value) if isinstance(value, list) else value)
    extra = [n for n in dict(base.named_modules()) if n and n not in table["modules"]]
    if extra:
        raise ValueError(f"structure: the base model has modules the file does not know, for example {extra[0]!r}")
    for name, tensor in [*base.named_parameters(remove_duplicate=False), *base.named_buffers(remove_duplicate=False)]:
        shape = table["shapes"].get(name)
        if shape is not None and list(tensor.shape) != shape:
            _replace(base, name, torch.zeros(shape, dtype=tensor.dtype, device=tensor.device))
    return base


def _is_another(module: nn.Module, entry: dict[str, Any]) -> bool:
    """Was it made with other arguments than those that follow the widths: another stride, no bias?"""
    kind, arguments = BUILDERS.get(entry["type"], (None, None))
    if "make" not in entry or arguments is None or type(module) is not kind:
        return False
    own, numbers = arguments(module), entry.get("numbers", {})
    return any(k not in numbers and own[k] != v for k, v in _tuples(entry["make"]).items())


def _first_weight(module: nn.Module) -> Tensor | None:
    return next((p for p in module.parameters() if p.is_floating_point()), None)


def _tuples(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}


def _replace(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    if key in module._parameters:
        old = module._parameters[key]
        new = nn.Parameter(value, requires_grad=old.requires_grad if old is not None else True)
        for other in model.modules():  # shared parameters stay shared
            for slot, parameter in other._parameters.items():
                if parameter is old:
                    other._parameters[slot] = new
    else:
        module._buffers[key] = value


def save(model: nn.Module, path: str | os.PathLike[str], *, extra: dict[str, str] | None = None) -> None:
    """Write weights and structure of ``model`` to one safetensors file.

    Written beside and then renamed: a full disk leaves an existing file as it was.  ``extra`` are further metadata strings.
    """
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:  # shared ones once
        tensors[name] = tensor.detach().cpu().contiguous()
    seen = {t.data_ptr() for t in tensors.values() if t.numel()}
    if len(seen) < sum(1 for t in tensors.values() if t.numel()):
        tensors = {n: t.clone() for n, t in tensors.items()}
    metadata = {"espalier": json.dumps(structure(model)), **(extra or {})}
    write_beside(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def write_beside(path: Path, write: Callable[[str], None]) -> None:
    """Let ``write`` make a temporary file in the folder of ``path``, then rename it there; clean up after a failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        write(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        Path(temporary).unlink(missing_ok=True)
        before = "; what was there is untouched" if path.exists() else ""
        raise OSError(f"{path}: cannot be written ({error}){before}") from error
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def load(path: str | os.PathLike[str], *, base: nn.Module) -> nn.Module:
    """Rebuild the small network of ``path`` on ``base``, a fresh model of the class that was compressed; returns ``base``.

    Device, dtype and memory format are those of ``base``.

    ``FileNotFoundError`` if there is none; ``ValueError`` if the file is damaged, was not written by ``save``, or belongs to
    another architecture.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if "espalier" not in metadata:
                raise ValueError(f"{path}: holds weights but no Espalier structure; load it as an ordinary checkpoint")
            table = json.loads(metadata["espalier"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error
    rebuild(base, table)
    own = dict([*base.named_parameters(), *base.named_buffers()])
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or unexpected:
        raise ValueError(
            f"{path}: weights do not fit the base model; missing {missing[:5]}, unexpected {unexpected[:5]}"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    return base
