"""Residual blocks as units: what a network can do without, because its input takes the place of its output.

``y = act(x + branch(x))`` is ``act(x)`` once the branch is silent.  ``find_blocks`` looks for modules that do this, whatever
their code looks like: it runs each by itself on random data, with parameters at zero, and asks whether the output is the
input, bit for bit.  ``with_blocks`` then makes each a group ``MODULE:block`` of two options, *left out* and *whole*: a 0/1
extent that everything inside is multiplied by, so costs, solver and plan treat it like any other alternatives.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from espalier.carving import put_in_place
from espalier.copies import copy_model, device_of, named_modules
from espalier.graph.call import mapped
from espalier.graph.graph import BLOCK, Block, Extent, Graph, Group, Site, Term
from espalier.graph.tracing import call_arguments, mode
from espalier.graph.watch import first_line, tensors_in, tensors_of, uncompiled

LEFT: dict[str, type[nn.Module]] = {
    "Identity": nn.Identity,
    "ReLU": nn.ReLU,
    "ReLU6": nn.ReLU6,
    "SiLU": nn.SiLU,
    "GELU": nn.GELU,
    "Hardswish": nn.Hardswish,
    "ELU": nn.ELU,
    "LeakyReLU": nn.LeakyReLU,
    "Mish": nn.Mish,
    "Tanh": nn.Tanh,
    "Sigmoid": nn.Sigmoid,
}
"""What may be left of a block without its branch."""

OUT, WHOLE = "left out", "whole"  # the options of a block


@dataclass(frozen=True)
class Blocks:
    """What ``find_blocks`` has found: blocks in the order in which they run, and module -> why it is none after all."""

    found: tuple[Block, ...]
    left: dict[str, str] = field(default_factory=dict)


def find_blocks(model: nn.Module, example: Any) -> Blocks:
    """Modules of ``model`` that could be left out.  ``model`` is not touched; ``example`` is what ``trace`` takes.

    A block is called once, gives one tensor of the shape, dtype and device that it is given, shares no parameter with what is
    outside, and holds no further block.  Proof, on random data and random parameters: with ``Block.silent`` at zero its output
    is its input, or an activation of it, bit for bit; and the network with all blocks silent gives the same bits as the one
    with ``LEFT`` in their place.

    Raises: whatever the forward raises on ``example``.
    """
    private = copy_model(model, {})
    for parameter in private.parameters():
        parameter.requires_grad_(False)
    device = device_of(private)
    args, kwargs = call_arguments(example, str(device))
    generator = torch.Generator().manual_seed(0)
    found: list[Block] = []
    with mode(private, training=False), torch.no_grad(), uncompiled():
        calls = _calls(private, args, kwargs)
        for call in sorted(_candidates(private, calls), key=lambda c: -c.name.count(".")):
            if not any(b.module.startswith(f"{call.name}.") for b in found):
                block = _silenced(call, generator)
                found += [block] if block is not None else []
        order = {name: number for number, name in enumerate(calls.by_name)}
        found.sort(key=lambda b: order[b.module])
        noise = _noise((args, kwargs), generator)
        if _agree(private, found, noise) is None:
            return Blocks(tuple(found))
        left = {b.module: why for b in found if (why := _agree(private, [b], noise)) is not None}
        proven = [b for b in found if b.module not in left]
        together = _agree(private, proven, noise)
        if together is not None:
            left.update({b.module: together for b in proven})
        return Blocks(tuple(b for b in found if b.module not in left), left)


def with_blocks(graph: Graph, blocks: Iterable[Block]) -> Graph:
    """``graph`` in which every one of ``blocks`` may be left out; call it after ``with_alternatives`` and ``with_inputs``.

    Raises: ValueError for a block that the graph does not know as one: not called once in the watched forward, or there
    already.
    """
    groups, extents = list(graph.groups), list(graph.extents)
    activations = list(graph.activations)
    inside = [*graph.inside, *[""] * (len(activations) - len(graph.inside))]
    sites, parameters = list(graph.sites), list(graph.parameters)
    spans = {s.module: s for s in graph.spans}
    added: list[Block] = []
    for block in blocks:
        span = spans.get(block.module)
        if span is None or block.group in graph.index:
            raise ValueError(f"block {block.module!r}: the graph knows no such module, or has it already")
        present = len(extents)
        extents.append(Extent(0, (), ((len(groups), (0, 0, 1)),)))
        groups.append(Group(block.group, 2, (), (OUT, WHOLE), BLOCK, block.module))
        for number, site in enumerate(sites):
            if block.holds(site.module):
                sites[number] = _gated(site, present)
        for number, term in enumerate(parameters):
            if block.holds(term.name):
                parameters[number] = replace(term, extents=(*term.extents, present))
        if block.left != "Identity":  # what is left makes a tensor of its own
            activations.append((*span.live, span.made))
            inside.append("")
        added.append(block)
    return replace(
        graph, groups=tuple(groups), extents=tuple(extents), sites=tuple(sites), parameters=tuple(parameters),
        activations=tuple(activations), inside=tuple(inside), blocks=(*graph.blocks, *added),
    )  # fmt: skip


def _gated(site: Site, present: int) -> Site:
    return replace(site, term=Term(site.term.name, site.term.coefficient, (*site.term.extents, present)))


# -- which modules could be blocks -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """One call of a module: its arguments, the first a tensor, and what is known of it."""

    name: str
    module: nn.Module
    rest: tuple[Any, ...]  # arguments after the first
    kwargs: dict[str, Any]
    given: tuple[torch.Size, torch.dtype, torch.device]
    positive: bool  # nothing below zero can come in
    same: bool  # gives a tensor like the one it is given
    owners: tuple[str, ...]  # modules inside that hold parameters, in the order in which they ran


class _Calls:
    def __init__(self) -> None:
        self.by_name: dict[str, list[_Call]] = {}


def _calls(model: nn.Module, args: Any, kwargs: Any) -> _Calls:
    """All calls of modules in one forward."""
    calls, ran = _Calls(), list[str]()
    handles = []
    begun: list[tuple[int, bool]] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        positive = bool(args) and isinstance(args[0], Tensor) and getattr(args[0], "_positive", False)
        begun.append((len(ran), positive))

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            begin, positive = begun.pop()
            if module._parameters:
                ran.append(name)
            if not args or not isinstance(args[0], Tensor) or any(True for _ in tensors_in((args[1:], kwargs))):
                given, same = (torch.Size(), torch.float32, torch.device("cpu")), False
            else:
                given = (args[0].shape, args[0].dtype, args[0].device)
                same = isinstance(result, Tensor) and (result.shape, result.dtype, result.device) == given
            owners = tuple(dict.fromkeys(ran[begin:]))
            call = _Call(name, module, tuple(args[1:]), dict(kwargs), given, positive, same, owners)
            calls.by_name.setdefault(name, []).append(call)

        return hook

    for name, module in named_modules(model).items():
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after(name), with_kwargs=True))
    try:
        with _Signs():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _candidates(model: nn.Module, calls: _Calls) -> Iterator[_Call]:
    users: dict[int, list[str]] = {}
    for name, module in named_modules(model).items():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), []).append(name)
    for name, of_name in calls.by_name.items():
        call = of_name[0]
        if not name or len(of_name) > 1 or not call.same or not call.module._modules or not call.owners:
            continue
        if not call.given[1].is_floating_point:
            continue
        used = [users[id(p)] for p in call.module.parameters()]
        if all(n == name or n.startswith(f"{name}.") for names in used for n in names):
            yield call


class _Signs(TorchDispatchMode):
    """Mark the tensors that cannot hold anything below zero, whatever the input of the network is."""

    MAKES = frozenset(
        ("relu", "relu_", "sigmoid", "sigmoid_", "hardsigmoid", "hardsigmoid_", "abs", "softmax", "_softmax")
    )
    PASSES = frozenset(
        (
            "max_pool2d_with_indices", "max_pool2d", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_avg_pool2d", "mean",
            "view", "_unsafe_view", "reshape", "permute", "transpose", "slice", "select", "cat", "clone", "detach", "add",
            "add_", "mul", "mul_", "expand", "alias", "contiguous", "dropout", "constant_pad_nd", "split", "chunk",
            "upsample_nearest2d", "squeeze", "unsqueeze", "flatten",
        )
    )  # fmt: skip

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if name in ("hardtanh", "hardtanh_", "clamp", "clamp_", "clamp_min", "clamp_min_"):
            low = args[1] if len(args) > 1 else (kwargs or {}).get("min_val", -1.0)
            positive = isinstance(low, (int, float)) and low >= 0
        else:
            numbers = (
                [a for a in args[1:] if isinstance(a, (int, float))] if name in ("add", "add_", "mul", "mul_") else []
            )
            given = tensors_of(args, kwargs)
            passes = name in self.PASSES and bool(given) and all(getattr(t, "_positive", False) for t in given)
            positive = name in self.MAKES or (passes and all(n >= 0 for n in numbers))
        for tensor in tensors_of(result):
            tensor._positive = positive  # type: ignore[attr-defined]
        return result


# -- the proof ---------------------------------------------------------------------------------------------------------


def _silenced(call: _Call, generator: torch.Generator) -> Block | None:
    """The block, if it is one: everything inside at zero leaves its input, and the last layers alone suffice."""
    inside = [name.removeprefix(call.name).removeprefix(".") for name in call.owners]
    modules = dict(call.module.named_modules())
    parameters = dict(call.module.named_parameters())
    own = {o: [f"{o}.{k}" if o else k for k, p in modules[o]._parameters.items() if p is not None] for o in inside}
    own = {o: [n for n in names if n in parameters] for o, names in own.items()}
    if set(itertools.chain.from_iterable(own.values())) != set(parameters):
        return None  # a parameter whose module was not called: nobody knows what reads it
    try:
        drawn = {n: _drawn(p, generator) for n, p in parameters.items()}
        x = _input(call, generator)

        def output(silent: Iterable[str]) -> Tensor:
            given = {**drawn, **{n: torch.zeros_like(drawn[n]) for o in silent for n in own[o]}}
            result: Tensor = functional_call(call.module, given, (x.clone(), *call.rest), call.kwargs)
            return result

        left = _what_is_left(x, output(own))
        if left is None:
            return None
        expected = LEFT[left]()(x.clone())
        # a parameter of the module itself may be read anywhere: try it last, as a scale of the whole branch
        silent = [o for o in inside if own[o] and o] + [o for o in inside if own[o] and not o]
        if torch.equal(output(silent[-1:]), expected):
            silent = silent[-1:]
        else:
            for owner in list(silent):
                fewer = [o for o in silent if o != owner]
                if fewer and torch.equal(output(fewer), expected):
                    silent = fewer
        names = tuple(n for o in silent for n in own[o])
        again = {n: torch.zeros_like(p) if n in names else _drawn(p, generator) for n, p in parameters.items()}
        x = _input(call, generator)
        result = functional_call(call.module, again, (x.clone(), *call.rest), call.kwargs)
        if not torch.equal(result, LEFT[left]()(x.clone())):
            return None
    except Exception:
        return None  # what cannot run by itself is no block
    return Block(call.name, tuple(f"{call.name}.{n}" for n in names), left)


def _input(call: _Call, generator: torch.Generator) -> Tensor:
    shape, dtype, device = call.given
    x = torch.randn(shape, generator=generator)
    return (x.abs() if call.positive else x).to(device, dtype)


def _drawn(parameter: Tensor, generator: torch.Generator) -> Tensor:
    """Random, so that no weight is zero by accident: scales of branches begin there."""
    return (0.1 * torch.randn(parameter.shape, generator=generator) + 0.05).to(parameter.device, parameter.dtype)


def _what_is_left(x: Tensor, y: Tensor) -> str | None:
    return next((name for name, make in LEFT.items() if torch.equal(make()(x.clone()), y)), None)


def _noise(value: Any, generator: torch.Generator) -> Any:
    def noise(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return torch.randn(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)

    return mapped(value, noise)


def _agree(model: nn.Module, blocks: Sequence[Block], inputs: Any) -> str | None:
    """``None`` if ``model`` without ``blocks`` gives the same bits as with all of them silent, else what is wrong."""
    if not blocks:
        return None
    args, kwargs = inputs
    zeros = {n: torch.zeros_like(p) for n, p in model.named_parameters() if any(n in b.silent for b in blocks)}
    try:
        silent = functional_call(model, zeros, args, kwargs)
        with _without(model, blocks):
            shorter = model(*args, **kwargs)
    except Exception as error:
        return f"the network does not run without it: {first_line(error)}"
    pairs = list(zip(tensors_in(silent), tensors_in(shorter), strict=False))
    same = all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)
    return None if same and pairs else "the network computes something else without it"


@contextmanager
def _without(model: nn.Module, blocks: Sequence[Block]) -> Iterator[None]:
    swapped: list[tuple[nn.Module, nn.Module]] = []
    try:
        for block in blocks:
            old, new = model.get_submodule(block.module), LEFT[block.left]()
            put_in_place(model, old, new)
            swapped.append((old, new))
        yield
    finally:
        for old, new in reversed(swapped):
            put_in_place(model, new, old)
