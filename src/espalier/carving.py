"""Cut a model's tensors down to kept indices and make its modules' own numbers agree.  The only code that changes shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from espalier.layers import ChannelPad

Kept = dict[str, dict[int, np.ndarray]]
"""Tensor name -> dimension -> sorted indices that stay.  ``module#before``, ``#after`` and ``#channels`` name plain numbers."""


def carve(
    model: nn.Module,
    kept: Kept,
    *,
    group_width: dict[str, int] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Keep only ``kept`` of every tensor of ``model``, in place.

    ``group_width`` maps modules that lose whole groups (depthwise, ResNeXt, GroupNorm) to the output channels one group
    holds.  Shared parameters stay shared.  Gradients and the state of ``optimizer`` (momentum, second moments) are cut
    with the parameters, and its parameter lists point to the new ones, so that training simply goes on.
    """
    named: dict[str, Tensor] = dict(model.named_parameters())
    named.update(model.named_buffers())
    owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for module_name, module, key, tensor in _slots(model):
        owners.setdefault(id(tensor), []).append((module_name, module, key))
    replaced: dict[int, nn.Parameter] = {}
    touched: dict[str, nn.Module] = {}
    for name, by_dim in kept.items():
        if "#" in name:
            touched[name.split("#")[0]] = model.get_submodule(name.split("#")[0])
            continue
        tensor = named[name]
        index = {d: torch.from_numpy(i).to(tensor.device) for d, i in by_dim.items() if len(i) != tensor.shape[d]}
        if not index:
            continue
        small: Tensor = select(tensor.detach(), index)
        if isinstance(tensor, nn.Parameter):
            parameter = nn.Parameter(small, requires_grad=tensor.requires_grad)
            if tensor.grad is not None:
                parameter.grad = select(tensor.grad, index)
            if optimizer is not None and tensor in optimizer.state:
                optimizer.state[parameter] = {
                    k: select(v, index) if isinstance(v, Tensor) and v.shape == tensor.shape else v
                    for k, v in optimizer.state.pop(tensor).items()
                }
            replaced[id(tensor)] = small = parameter
        for module_name, module, key in owners[id(tensor)]:
            (module._parameters if key in module._parameters else module._buffers)[key] = small  # type: ignore[assignment]
            touched[module_name] = module
    if optimizer is not None:
        for group in optimizer.param_groups:
            group["params"] = [replaced.get(id(p), p) for p in group["params"]]
    for module_name, module in touched.items():
        refresh(module, module_name, kept, (group_width or {}).get(module_name))


def select(tensor: Tensor, index: dict[int, Tensor]) -> Tensor:
    """Keep ``index[dim]`` along every dimension given; the memory format stays."""
    channels_last = (
        tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
    )
    for dim, keep in index.items():
        tensor = tensor.index_select(dim, keep)
    return tensor.contiguous(memory_format=torch.channels_last) if channels_last else tensor.contiguous()


def put_in_place(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Let ``new`` take the place of ``old`` wherever ``model`` holds it: a shared module stays shared."""
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, key, new)


def _slots(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    for module_name, module in model.named_modules(remove_duplicate=False):
        for slots in (module._parameters, module._buffers):
            for key, tensor in slots.items():
                if tensor is not None:
                    yield module_name, module, key, tensor


# -- one row per module type: which of its numbers repeat a shape -----------------------------------------------------

Refresh = Callable[[Any, str, Kept, "int | None"], None]


def _conv(module: _ConvNd, name: str, kept: Kept, width: int | None) -> None:
    rows, cols = module.weight.shape[:2]
    if isinstance(module, _ConvTransposeNd):
        if width is not None:
            module.groups = module.groups * rows // module.in_channels
        module.in_channels, module.out_channels = rows, cols * module.groups
    else:
        if width is not None:
            module.groups = rows // width
        module.in_channels, module.out_channels = cols * module.groups, rows


def _linear(module: nn.Linear, name: str, kept: Kept, width: int | None) -> None:
    module.out_features, module.in_features = module.weight.shape


def _batch_norm(module: _NormBase, name: str, kept: Kept, width: int | None) -> None:
    known = [t for t in (module.weight, module.running_mean, kept.get(f"{name}#channels", {}).get(0)) if t is not None]
    if known:
        module.num_features = known[0].shape[0]


def _layer_norm(module: nn.LayerNorm, name: str, kept: Kept, width: int | None) -> None:
    if module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)


def _group_norm(module: nn.GroupNorm, name: str, kept: Kept, width: int | None) -> None:
    stays = kept.get(f"{name}#channels", {}).get(0)
    channels = len(stays) if stays is not None else module.weight.shape[0] if module.weight is not None else None
    if channels is not None:
        module.num_channels = channels
        if width is not None:
            module.num_groups = channels // width


def _prelu(module: nn.PReLU, name: str, kept: Kept, width: int | None) -> None:
    module.num_parameters = module.weight.shape[0]


def _pad(module: ChannelPad, name: str, kept: Kept, width: int | None) -> None:
    for side in ("before", "after"):
        stays = kept.get(f"{name}#{side}", {}).get(0)
        if stays is not None:
            setattr(module, side, len(stays))


REFRESH: dict[type, Refresh] = {
    _ConvNd: _conv,
    nn.Linear: _linear,
    _NormBase: _batch_norm,
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.PReLU: _prelu,
    ChannelPad: _pad,
}


def refresh(module: nn.Module, name: str, kept: Kept, width: int | None) -> None:
    """Bring ``in_channels`` and the like in line with the tensors; modules of other types hold no such numbers we know."""
    for kind in type(module).__mro__:
        if kind in REFRESH:
            REFRESH[kind](module, name, kept, width)
            return
