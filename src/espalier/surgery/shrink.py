"""Carry a plan out: a copy with smaller layers, or the model itself in the middle of training."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from espalier.carving import Kept, carve, carved, computes_weight, number_named, plain_layer, put_in_place
from espalier.copies import copy_model, named_tensors, unwrapped
from espalier.forms.shapes import padding_of
from espalier.graph import Graph
from espalier.graph.blocks import LEFT
from espalier.layers import PaddedConv2d, PartConv2d
from espalier.plan import Plan


def shrink(model: nn.Module, graph: Graph, plan: Plan) -> nn.Module:
    """A copy of ``model``, same class, that holds only what ``plan`` keeps.  ``model`` is not touched.

    Raises: ValueError if ``plan`` does not belong to ``graph``, or ``graph`` not to ``model``.
    """
    model = unwrapped(model, who="shrink")
    plan.check(graph)
    _check_same(model, graph)
    kept = graph.kept({n: np.asarray(u) for n, u in plan.keep.items()})
    selects = any(f"{n}.index" in kept for n in graph.selects)
    if selects or graph.absent(plan.keep) or (kept and graph.baked):  # what changes more than shapes is done on a copy
        return _shrunk_copy(model, graph, plan)
    return carved(model, kept, group_width=graph.group_width)


def _shrunk_copy(model: nn.Module, graph: Graph, plan: Plan) -> nn.Module:
    """Shrink a copy that borrows the memory of the parameters; what still borrows it afterwards is copied at last."""
    lent = {
        id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad)
        for p in named_tensors(model)[0].values()
        if type(p) is nn.Parameter
    }
    borrowed = {id(p) for p in lent.values()}
    small = copy_model(model, lent)
    shrink_(small, graph, plan)
    parameters, buffers = named_tensors(small)
    return copy_model(small, {id(t): t for t in (*parameters.values(), *buffers.values()) if id(t) not in borrowed})


def shrink_(model: nn.Module, graph: Graph, plan: Plan, *, optimizer: torch.optim.Optimizer | None = None) -> Kept:
    """Shrink ``model`` in place and return what stayed of every tensor that is still there.

    Blocks that the plan leaves out give way to what is left of them, ``graph.blocks.LEFT``.
    Gradients and the state of ``optimizer`` are cut along, its parameter lists are brought up to date; training goes on.
    The old ``graph`` no longer describes the model afterwards: trace again.
    """
    model = unwrapped(model, who="shrink_", in_place=True)
    plan.check(graph)
    _check_same(model, graph)
    absent = graph.absent(plan.keep)
    for block in absent:
        put_layer(model, block.module, LEFT[block.left](), optimizer=optimizer)
    kept = graph.kept({n: np.asarray(u) for n, u in plan.keep.items()})
    if absent:
        graph = graph.after({b.group: np.arange(1) for b in absent})
    if kept or absent:
        kept = {t: d for t, d in kept.items() if t not in graph.baked_away}
        rest = dict(kept)
        for name in graph.baked:
            bake(model, name, optimizer=optimizer)
            plain = {t: rest.pop(t) for t in (f"{name}.weight", f"{name}.bias") if t in rest}
            # cut at once: plain weights of all layers in full size would be as large as the model
            carve(model, plain, group_width=graph.group_width, optimizer=optimizer)
        for name in graph.selects:
            if f"{name}.index" in kept:
                _select_inputs(model, name)
        carve(model, rest, group_width=graph.group_width, optimizer=optimizer)
    return kept


def mask(model: nn.Module, graph: Graph, plan: Plan) -> nn.Module:
    """A copy of full size in which the removed units have no effect: their inputs to every consumer are zero.

    Blocks that are left out are silent.  This is what the small model must equal.  Zeroing at the consumers rather than at the
    producers matters: a BatchNorm bias would survive there.
    """
    model = unwrapped(model, who="mask")
    plan.check(graph)
    _check_same(model, graph)
    masked = copy_model(model, {})
    removed = {n: np.setdiff1d(np.arange(graph.group(n).size), u) for n, u in plan.keep.items()}
    if any(len(r) for r in removed.values()):
        for name in graph.baked:
            if not any(b.holds(name) for b in graph.absent(plan.keep)):
                bake(masked, name)
    tensors: dict[str, Tensor] = {**dict(masked.named_parameters()), **dict(masked.named_buffers())}
    with torch.no_grad():
        for name, units in removed.items():
            for s in graph.group(name).consumers if len(units) else ():
                rows = torch.from_numpy(s.index[units].reshape(-1)).to(tensors[s.tensor].device)
                tensors[s.tensor].index_fill_(s.dim, rows, 0.0)
        for block in graph.absent(plan.keep):
            for name in block.silent:
                tensors[name].zero_()
    return masked


def _check_same(model: nn.Module, graph: Graph) -> None:
    """Raise ``ValueError`` if ``graph`` was traced from a model with other channels; kernels may have become smaller since."""
    parameters, buffers = named_tensors(model)
    own = {n: tuple(t.shape) for n, t in (*parameters.items(), *buffers.items())}
    made_later = {f"{n}.{kind}" for n in graph.baked for kind in ("weight", "bias")} | {
        f"{n}.index" for n in graph.selects
    }
    made_later |= set(graph.baked_away)  # of a model that is plain already
    for name, shape in graph.shapes.items():
        if not number_named(name) and name not in made_later and own.get(name, ())[:2] != shape[:2]:
            found = f"has shape {own[name]}" if name in own else "is not there"
            raise ValueError(
                f"graph: of another model: {name!r} {found}, where it was traced it had {shape}; trace again"
            )


def _select_inputs(model: nn.Module, name: str) -> None:
    """Make convolution ``name`` one that selects its inputs, all of them to begin with."""
    conv = model.get_submodule(name)
    assert isinstance(conv, nn.Conv2d), name
    if not isinstance(conv, PartConv2d):
        if isinstance(conv.padding, str):
            conv.padding = padding_of(conv)
        conv = PartConv2d.of(conv)
        put_in_place(model, model.get_submodule(name), conv)
    if conv.index is None:
        conv.index = torch.arange(conv.in_channels, device=conv.weight.device)


class _Capture(TorchDispatchMode):
    """Remember the arguments of the one convolution that a module computes."""

    call: tuple[Any, ...] | None = None
    padded = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._overloadpacket is torch.ops.aten.constant_pad_nd:
            self.padded = True
        if func._overloadpacket is torch.ops.aten.convolution:
            self.call = args
        return func(*args, **(kwargs or {}))


def bake(model: nn.Module, name: str, *, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Replace a convolution that computes its weight (weight standardisation) by a plain one with that weight.

    A filter standardised over all its inputs is not standardised over some of them, so the exact small layer is plain.
    """
    module = model.get_submodule(name)
    if computes_weight(module):
        put_layer(model, name, plain_layer(module), optimizer=optimizer)
        return
    if type(module) in (nn.Conv1d, nn.Conv3d, nn.Linear):  # plain already
        return
    assert isinstance(module, nn.Conv2d), name
    reach = [2 * d * (k - 1) + 2 for k, d in zip(module.kernel_size, module.dilation, strict=True)]
    probe = torch.zeros(1, module.in_channels, *reach, device=module.weight.device, dtype=module.weight.dtype)
    capture = _Capture()
    with torch.no_grad(), capture:
        module(probe)
    assert capture.call is not None, name
    _, weight, bias, stride, padding, dilation, _, _, groups = capture.call
    kind: Any = PaddedConv2d if capture.padded else nn.Conv2d
    plain = kind(
        module.in_channels, module.out_channels, module.kernel_size, stride=tuple(stride), padding=tuple(padding),
        dilation=tuple(dilation), groups=groups, bias=bias is not None, device=weight.device, dtype=weight.dtype,
    )  # fmt: skip
    with torch.no_grad():
        plain.weight.copy_(weight)
        if bias is not None and plain.bias is not None:
            plain.bias.copy_(bias)
    put_layer(model, name, plain, optimizer=optimizer)


def put_layer(model: nn.Module, name: str, new: nn.Module, *, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Let ``new`` take the place of module ``name``, in the same mode, and let ``optimizer`` train it from now on.

    A parameter of ``new`` joins the group of the one of the same name that it replaces (the bias of a row that of the old
    bias), otherwise that of the old weight.
    What is gone leaves the optimiser's lists and its state; whoever can translate momentum does so afterwards.
    """
    old = model.get_submodule(name)
    new.train(old.training)
    if optimizer is not None:
        _hand_over(optimizer, old, new)
    put_in_place(model, old, new)


def _heir(name: str, old: Tensor, fresh: dict[str, nn.Parameter]) -> str | None:
    """The new parameter that stands for ``name``: of that name, or the only one inside that ends in it and fits its shape."""
    if name in fresh:
        return name
    alike = [n for n, p in fresh.items() if n.rpartition(".")[2] == name and p.shape == old.shape]
    return alike[0] if len(alike) == 1 else None


def _hand_over(optimizer: torch.optim.Optimizer, old: nn.Module, new: nn.Module) -> None:
    own = {id(p): n for n, p in old.named_parameters()}
    fresh = dict(new.named_parameters())
    taken = {n: heir for n, p in old.named_parameters() if (heir := _heir(n, p, fresh)) is not None}
    rest = [p for n, p in fresh.items() if n not in taken.values()]
    for group in optimizer.param_groups:
        params: list[Tensor] = []
        for parameter in group["params"]:
            key = own.get(id(parameter))
            if key is None:
                params.append(parameter)
            elif key in taken:
                params.append(fresh[taken[key]])
            if key is not None and (parameter.ndim > 1 or parameter.ndim == max(p.ndim for p in old.parameters())):
                params += rest
                rest = []
        group["params"] = params
    assert not rest, "the optimiser trains nothing of the module that is replaced"
    for parameter in old.parameters():
        optimizer.state.pop(parameter, None)
