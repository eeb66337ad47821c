"""Cut a model's tensors down to kept indices and make its modules' own numbers agree.  The only code that changes shapes."""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from espalier.copies import copy_model, named_modules, tensors_of_modules

Kept = dict[str, dict[int, np.ndarray]]
"""Tensor name -> dimension -> sorted indices that stay.  A plain number of a module is named by ``number_name``."""


def number_name(module: str, key: str) -> str:
    """How the number ``key`` of ``module`` is named among tensors, as no tensor can be; ``key.1`` is the second of several."""
    return f"{module}..{key}"


def number_named(name: str) -> tuple[str, str] | None:
    """Module and key of a number; ``None`` of a tensor."""
    module, mark, key = name.partition("..")
    return (module, key) if mark else None


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
    with the parameters (one of other shapes, such as Adafactor's, begins anew), and its parameter lists point to the new ones,
    so that training simply goes on.
    """
    replaced: dict[int, Tensor] = {}
    modules = named_modules(model)
    for tensor, indices in _changes(modules, kept):
        small = replaced[id(tensor)] = _small(tensor, indices)
        if tensor.grad is not None:
            small.grad = select(tensor.grad, _on(tensor, indices))
        if optimizer is not None and tensor in optimizer.state:
            index, state = _on(tensor, indices), optimizer.state.pop(tensor)
            if not has_other_shapes(state, tensor):
                optimizer.state[small] = {
                    k: select(v, index) if isinstance(v, Tensor) and v.shape == tensor.shape else v
                    for k, v in state.items()
                }
    for module in modules.values():
        for slots in (module._parameters, module._buffers):
            for key, held in slots.items():
                if id(held) in replaced:
                    slots[key] = replaced[id(held)]  # type: ignore[assignment]
    if optimizer is not None:
        for group in optimizer.param_groups:
            group["params"] = [replaced.get(id(p), p) for p in group["params"]]
    _refresh_all(modules, kept, group_width, replaced.values())


def has_other_shapes(state: Mapping[str, Any], parameter: Tensor) -> bool:
    """Does an optimiser keep something that cannot be cut with ``parameter``?  Its state then begins anew."""
    return any(isinstance(v, Tensor) and v.ndim > 0 and v.shape != parameter.shape for v in state.values())


def carved(model: nn.Module, kept: Kept, *, group_width: dict[str, int] | None = None) -> nn.Module:
    """A copy of ``model`` that holds only ``kept`` of every tensor; what goes is never copied."""
    replaced = {id(t): _small(t, indices) for t, indices in _changes(named_modules(model), kept)}
    small = copy_model(model, replaced)
    _refresh_all(named_modules(small), kept, group_width, replaced.values())
    return small


def _changes(modules: dict[str, nn.Module], kept: Kept) -> Iterator[tuple[Tensor, dict[int, np.ndarray]]]:
    """Every tensor that loses something, with the indices that stay."""
    parameters, buffers = tensors_of_modules(modules)
    named: dict[str, Tensor] = {**parameters, **buffers}
    for name, by_dim in kept.items():
        if number_named(name):
            continue
        tensor = named[name]
        shape = tensor.shape
        indices = {d: i for d, i in by_dim.items() if len(i) != shape[d]}
        if indices:
            yield tensor, indices


def _on(tensor: Tensor, indices: dict[int, np.ndarray]) -> dict[int, Tensor]:
    """The same indices beside ``tensor``."""
    return {d: torch.from_numpy(i).to(tensor.device) for d, i in indices.items()}


def _small(tensor: Tensor, indices: dict[int, np.ndarray]) -> Tensor:
    if tensor.is_meta and tensor.is_contiguous():  # only its shape matters
        shape = [len(indices[d]) if d in indices else n for d, n in enumerate(tensor.shape)]
        small = torch.empty(tuple(shape), dtype=tensor.dtype, device=tensor.device)
    else:
        small = select(tensor.detach(), _on(tensor, indices))
    return nn.Parameter(small, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else small


def _refresh_all(
    modules: dict[str, nn.Module], kept: Kept, group_width: dict[str, int] | None, changed: Iterable[Tensor]
) -> None:
    """Refresh every module that holds one of the tensors ``changed``, be it a shared one, or that ``kept`` names itself.

    And every module around one of these, inner ones first: it may keep the width of a child as a number.
    """
    names = {found[0] for n in kept if (found := number_named(n))}
    new = {id(t) for t in changed}
    around: set[str] = set()
    for name, module in reversed(modules.items()):
        held = map(id, (*module._parameters.values(), *module._buffers.values()))
        if name in names or name in around or not new.isdisjoint(held):
            refresh(module, name, kept, (group_width or {}).get(name))
            around.add(name.rpartition(".")[0])
    for name, by_dim in kept.items():
        if found := number_named(name):
            _set_number(modules[found[0]], found[1], len(by_dim[0]))


_PIECE = 1 << 20  # elements that are cut at a time: more only makes the copy in between larger


def select(tensor: Tensor, index: dict[int, Tensor]) -> Tensor:
    """Keep ``index[dim]`` along every dimension given; the memory format stays."""
    channels_last = (
        tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
    )
    if len(index) > 1 and 0 in index and tensor.is_contiguous() and tensor.numel() > _PIECE:
        return _select_in_pieces(tensor, index)
    for dim, keep in index.items():
        tensor = tensor.index_select(dim, keep)
    return tensor.contiguous(memory_format=torch.channels_last) if channels_last else tensor.contiguous()


def _select_in_pieces(tensor: Tensor, index: dict[int, Tensor]) -> Tensor:
    """Rows by rows, so that what has lost its rows but not yet its columns never stands in memory as a whole."""
    small = tensor.new_empty([len(index[d]) if d in index else n for d, n in enumerate(tensor.shape)])
    rows = index[0].split(max(1, _PIECE * len(tensor) // tensor.numel()))
    for piece, some in zip(small.split([len(r) for r in rows]), rows, strict=True):
        piece.copy_(select(tensor.index_select(0, some), {d: i for d, i in index.items() if d}))
    return small


def put_in_place(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Let ``new`` take the place of ``old`` wherever ``model`` holds it: a shared module stays shared."""
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, key, new)


# -- weights that are computed ----------------------------------------------------------------------------------------

_PLAIN: tuple[type[Any], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_GEOMETRY = ("stride", "padding", "dilation", "groups", "padding_mode")


def computes_weight(module: nn.Module) -> bool:
    """Is it a layer whose weight a hook or a parametrisation of torch's computes anew for every call (weight norm)?"""
    if not isinstance(module, _PLAIN) or "weight" in module._parameters:
        return False
    held = module._parameters.keys() | module._modules.keys()
    return not held.isdisjoint(("weight_g", "weight_orig", "parametrizations")) and hasattr(module, "weight")


def plain_layer(module: Any) -> nn.Module:
    """A plain layer of the same kind with the weight that ``module`` computes at present."""
    _compute_weight(module)
    with torch.no_grad():
        weight, bias = module.weight, module.bias
        kind = next(k for k in type(module).__mro__ if k in _PLAIN)
        sizes = (module.in_features, module.out_features) if kind is nn.Linear else (
            module.in_channels, module.out_channels, module.kernel_size
        )  # fmt: skip
        geometry = {} if kind is nn.Linear else {k: getattr(module, k) for k in _GEOMETRY}
        plain = kind(*sizes, bias=bias is not None, device=weight.device, dtype=weight.dtype, **geometry)
        plain.weight.copy_(weight)
        if bias is not None:
            plain.bias.copy_(bias)
    return plain.train(module.training)


def _compute_weight(module: nn.Module) -> None:
    """Let hooks of torch's do what they do before every call."""
    hooks = [h for h in module._forward_pre_hooks.values() if type(h).__module__.startswith("torch.nn.utils.")]
    if not hooks:
        return
    training = module.training
    with torch.no_grad():
        module.eval()  # in training a spectral norm goes on estimating
        for hook in hooks:
            hook(module, ())
    module.train(training)


def make_plain(model: nn.Module, names: Iterable[str]) -> None:
    """Layers of these names, where they are and compute their weight, become plain ones."""
    modules = named_modules(model)
    for name in names:
        if name in modules and computes_weight(modules[name]):
            put_in_place(model, modules[name], plain_layer(modules[name]))


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


def _bilinear(module: nn.Bilinear, name: str, kept: Kept, width: int | None) -> None:
    module.out_features, module.in1_features, module.in2_features = module.weight.shape


def _batch_norm(module: _NormBase, name: str, kept: Kept, width: int | None) -> None:
    known = [
        t
        for t in (module.weight, module.running_mean, kept.get(number_name(name, "channels"), {}).get(0))
        if t is not None
    ]
    if known:
        module.num_features = known[0].shape[0]


def _layer_norm(module: nn.LayerNorm, name: str, kept: Kept, width: int | None) -> None:
    if module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)


def _group_norm(module: nn.GroupNorm, name: str, kept: Kept, width: int | None) -> None:
    stays = kept.get(number_name(name, "channels"), {}).get(0)
    channels = len(stays) if stays is not None else module.weight.shape[0] if module.weight is not None else None
    if channels is not None:
        module.num_channels = channels
        if width is not None:
            module.num_groups = channels // width


def _prelu(module: nn.PReLU, name: str, kept: Kept, width: int | None) -> None:
    module.num_parameters = module.weight.shape[0]


def _recurrent(module: Any, name: str, kept: Kept, width: int | None) -> None:
    module.input_size = module.weight_ih_l0.shape[1]
    module.hidden_size = module.weight_hh_l0.shape[0] // GATES.get(module.mode, 1)
    if module.proj_size:
        module.proj_size = module.weight_hr_l0.shape[0]
    module._init_flat_weights()  # it holds its parameters a second time


def _recurrent_cell(module: Any, name: str, kept: Kept, width: int | None) -> None:
    module.input_size, module.hidden_size = module.weight_ih.shape[1], module.weight_hh.shape[1]


GATES = {"LSTM": 4, "GRU": 3}

REFRESH: dict[type, Refresh] = {
    _ConvNd: _conv,
    nn.Linear: _linear,
    nn.Bilinear: _bilinear,
    _NormBase: _batch_norm,
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.PReLU: _prelu,
    nn.RNNBase: _recurrent,
    nn.RNNCellBase: _recurrent_cell,
}


def refresh(module: nn.Module, name: str, kept: Kept, width: int | None) -> None:
    """Bring ``in_channels`` and the like in line with the tensors; modules of other types hold no such numbers we know."""
    _compute_weight(module)
    for kind in type(module).__mro__:
        if kind in REFRESH:
            REFRESH[kind](module, name, kept, width)
            return


def _set_number(module: nn.Module, key: str, value: int) -> None:
    key, _, item = key.partition(".")
    held = vars(module).get(key)
    if item and isinstance(held, (list, tuple)):
        setattr(module, key, type(held)(value if str(i) == item else n for i, n in enumerate(held)))
    elif type(held) is int:
        setattr(module, key, value)


# -- numbers of code that is not ours ---------------------------------------------------------------------------------


def whole_numbers(module: nn.Module) -> dict[str, Any]:
    """Whole numbers, or several, that a module of somebody's own keeps: widths may be among them.

    Not what its forward writes: that counts calls or remembers them.
    """
    return {k: v for k, v in plain_settings(module) if _is_whole(v)} if is_own(type(module)) else {}


def plain_settings(module: nn.Module) -> list[tuple[str, Any]]:
    """What stands on the module itself and is a setting of it: not what its forward writes.

    What begins with "drop" is for training alone.
    """
    written = in_forward(type(module), "STORE_ATTR")  # type: ignore[arg-type]
    return [
        (k, v)
        for k, v in vars(module).items()
        if not k.startswith(("_", "drop")) and k not in _NEITHER and k not in written
    ]


_NEITHER = frozenset(["training", "inplace", "grad_checkpointing"])  # outputs do not depend on them


def is_own(kind: type) -> bool:
    """A module type that is neither PyTorch's nor ours."""
    return not kind.__module__.startswith(("torch.nn.", "espalier."))


def _is_whole(value: Any) -> bool:
    return type(value) is int or (type(value) in (tuple, list) and bool(value) and all(type(v) is int for v in value))


@functools.cache
def in_forward(kind: type, instruction: str) -> frozenset[str]:
    """Attributes that ``forward``, or a method that it calls, writes (``STORE_ATTR``) or reads (``LOAD_ATTR``)."""
    methods: dict[str, types.CodeType] = {}
    for base in reversed(kind.__mro__[: kind.__mro__.index(nn.Module)]):
        methods |= {k: v.__code__ for k, v in vars(base).items() if isinstance(v, types.FunctionType)}
    found: set[str] = set()
    waiting, seen = ["forward"], {"forward"}
    while waiting:
        code = methods.get(waiting.pop())
        if code is None:
            continue
        found |= {i.argval for i in dis.get_instructions(code) if i.opname == instruction}
        waiting += [n for n in code.co_names if n in methods and n not in seen]
        seen.update(code.co_names)
    return frozenset(found)
