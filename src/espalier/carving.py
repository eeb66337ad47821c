"""Cut a model's tensors down to kept indices and make its modules' own numbers agree.  The only code that changes shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from espalier.copies import copy_model, named_tensors
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
    replaced: dict[int, Tensor] = {}
    for tensor, index in _changes(model, kept):
        small = replaced[id(tensor)] = _small(tensor, index)
        if tensor.grad is not None:
            small.grad = select(tensor.grad, index)
        if optimizer is not None and tensor in optimizer.state:
            optimizer.state[small] = {
                k: select(v, index) if isinstance(v, Tensor) and v.shape == tensor.shape else v
                for k, v in optimizer.state.pop(tensor).items()
            }
    for module in model.modules():
        for slots in (module._parameters, module._buffers):
            for key, held in slots.items():
                if id(held) in replaced:
                    slots[key] = replaced[id(held)]  # type: ignore[assignment]
    if optimizer is not None:
        for group in optimizer.param_groups:
            group["params"] = [replaced.get(id(p), p) for p in group["params"]]
    _refresh_all(model, kept, group_width)


def carved(model: nn.Module, kept: Kept, *, group_width: dict[str, int] | None = None) -> nn.Module:
    """A copy of ``model`` that holds only ``kept`` of every tensor; what goes is never copied."""
    small = copy_model(model, {id(t): _small(t, index) for t, index in _changes(model, kept)})
    _refresh_all(small, kept, group_width)
    return small


def _changes(model: nn.Module, kept: Kept) -> Iterator[tuple[Tensor, dict[int, Tensor]]]:
    """Every tensor that loses something, with the indices that stay."""
    parameters, buffers = named_tensors(model)
    named: dict[str, Tensor] = {**parameters, **buffers}
    for name, by_dim in kept.items():
        if "#" in name:
            continue
        tensor = named[name]
        index = {d: torch.from_numpy(i).to(tensor.device) for d, i in by_dim.items() if len(i) != tensor.shape[d]}
        if index:
            yield tensor, index


def _small(tensor: Tensor, index: dict[int, Tensor]) -> Tensor:
    small = select(tensor.detach(), index)
    return nn.Parameter(small, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else small


def _refresh_all(model: nn.Module, kept: Kept, group_width: dict[str, int] | None) -> None:
    names = {n.split("#")[0] if "#" in n else n.rpartition(".")[0] for n in kept}
    held = {id(t) for n in kept if "#" not in n for t in [_held(model, n)]}
    for name, module in model.named_modules(remove_duplicate=False):
        if name in names or any(id(t) in held for s in (module._parameters, module._buffers) for t in s.values()):
            refresh(module, name, kept, (group_width or {}).get(name))


def _held(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer called ``name``; a module may share it with others."""
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    found = module._parameters[key] if key in module._parameters else module._buffers[key]
    assert found is not None, name
    return found


def select(tensor: Tensor, index: dict[int, Tensor]) -> Tensor:
    """Keep ``index[dim]`` along every dimension given; the memory format stays."""
    if tensor.is_meta and tensor.is_contiguous():
        shape = [len(index[d]) if d in index else n for d, n in enumerate(tensor.shape)]
        return torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
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
