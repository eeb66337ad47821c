"""Ranks that fall in the middle of training: cut triplets off, and turn factors with the optimiser's state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from espalier.carving import Kept, carve, has_other_shapes
from espalier.forms.lowrank import DAMPING, BasisChange, LowRank, decompose_batch, orthonormalise_batch
from espalier.forms.transfer import moved

FIRST = ("momentum_buffer", "exp_avg")
SECOND = ("exp_avg_sq", "max_exp_avg_sq")


def cut_ranks(model: nn.Module, ranks: Mapping[str, int], *, optimizer: torch.optim.Optimizer | None = None) -> Kept:
    """Keep the first triplets of the ``LowRank`` layers named, in place, with gradients and optimiser state."""
    kept: Kept = {}
    for name, rank in ranks.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, LowRank), name
        if rank < layer.rank:
            stay = torch.arange(rank).numpy()
            kept.update({f"{name}.u": {1: stay}, f"{name}.s": {0: stay}, f"{name}.v": {1: stay}})
    if kept:
        carve(model, kept, optimizer=optimizer)
    return kept


def change_bases(
    layers: Mapping[str, LowRank], *, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, BasisChange]:
    """Make the factors of ``layers`` singular value decompositions again; the weights stay, momentum and moments go along.

    SGD's momentum is a step of the factors and turns as one (``BasisChange.tangent``).  Adam steps by ``m / (sqrt(v) + eps)``:
    ``v`` is spread over the new basis; ``m`` is set so that this very step, turned, is the next one.
    """
    assert not any(layer.whole for layer in layers.values()), "whole layers are split, not turned"
    turns = decompositions(layers)
    with _Transfer(layers, optimizer) as transfer:
        for name, layer in layers.items():
            transfer.carry(layer, turns[name].tangent, turns[name].spread)
            transfer.put(layer, turns[name])
    return turns


def split_layers(
    layers: Mapping[str, LowRank], turns: Mapping[str, BasisChange], *, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Write whole ``layers`` as their singular value decompositions, those of ``turns``; momentum and moments go along."""
    for name, layer in layers.items():
        assert layer.whole, name
        _rouse(optimizer, layer)
    with _Transfer(layers, optimizer) as transfer:
        for name, layer in layers.items():
            whole = _Whole(layer.tall, turns[name])
            transfer.carry(layer, whole.tangent, whole.spread)
            transfer.put(layer, turns[name])
            layer.whole = False


@torch.no_grad()
def decompositions(layers: Mapping[str, LowRank]) -> dict[str, BasisChange]:
    """The singular value decomposition of every layer, on the processor, whatever device the layers are on.

    A GPU is slower at many small ones.  Layers of one shape are decomposed in one batch; batches fit into the cache, and
    threads take turns at them: many small decompositions side by side are faster than one after the other with all threads.
    """
    shapes: dict[Any, list[str]] = {}
    for name, layer in layers.items():
        sides = (layer.u.shape, layer.v.shape)
        shapes.setdefault((*sides, layer.u.dtype, layer.whole), []).append(name)
    parts = []
    for (_, (_, rank), *_), names in shapes.items():
        size = max(1, CACHED // rank**2)
        parts += [names[i : i + size] for i in range(0, len(names), size)]
    parts.sort(key=lambda names: -len(names) * layers[names[0]].rank ** 3)  # the longest first
    fetched = moved({(n, i): f.detach() for n, layer in layers.items() for i, f in enumerate(_factors(layer))}, "cpu")
    threads = torch.get_num_threads()

    def decompose(names: list[str]) -> dict[str, BasisChange]:
        u, s, v = (torch.stack([fetched[n, i] for n in names]) for i in range(3))
        if not layers[names[0]].whole:
            return dict(zip(names, orthonormalise_batch(u, s, v, names=names).split(), strict=True))
        tall = layers[names[0]].tall
        factors = decompose_batch(u if tall else v, names=names)
        return {
            n: BasisChange.alone(*(f if tall else f[::-1]))
            for n, f in zip(names, zip(*factors, strict=True), strict=True)
        }

    if threads == 1 or len(parts) == 1:
        done = [decompose(names) for names in parts]
    else:
        with _single_thread(), ThreadPoolExecutor(threads) as pool:
            done = list(pool.map(decompose, parts))
    found = {name: one for part in done for name, one in part.items()}
    return {name: found[name] for name in layers}


CACHED = 40_000  # entries of the cores of a batch


@contextmanager
def _single_thread() -> Iterator[None]:
    """Threads that begin in here work alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _factors(layer: LowRank) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    return layer.u, layer.s, layer.v


Steps = tuple[Tensor, Tensor, Tensor]
ParameterState = dict[str, Any]


@dataclass(frozen=True)
class _Whole:
    """Steps of a whole layer, of ``u`` if it is ``tall`` and else of ``v``, as steps of its decomposition ``turn``."""

    tall: bool
    turn: BasisChange

    def tangent(self, du: Tensor, ds: Tensor, dv: Tensor) -> Steps:
        """To first order the same step, damped where singular values are small, as gradients are (``LowRank``)."""
        u, s, v = self.turn.u, self.turn.s, self.turn.v
        step = du if self.tall else dv.T
        squares = s.square()
        floor = DAMPING * squares.max().clamp_min(torch.finfo(s.dtype).tiny)
        core = u.T @ step @ v
        inner = (core - core.diagonal().diag()) / (squares[:, None] + squares + floor)
        weight = s / (squares + floor)
        return (
            u @ (inner * s) + (step @ v - u @ core) * weight,
            core.diagonal().clone(),
            v @ (inner * s[:, None]).T + (step.T @ u - v @ core.T) * weight,
        )

    def spread(self, du: Tensor, ds: Tensor, dv: Tensor) -> Steps:
        """Second moments, the entries of the matrix taken as uncorrelated."""
        u, s, v = self.turn.u, self.turn.s, self.turn.v
        moments = du if self.tall else dv.T
        squares = s.square()
        weight = (s / (squares + DAMPING * squares.max().clamp_min(torch.finfo(s.dtype).tiny))).square()
        right = moments @ v.square()
        return right * weight, (u.square() * right).sum(0), (moments.T @ u.square()) * weight


def _rouse(optimizer: torch.optim.Optimizer | None, layer: LowRank) -> None:
    """Give the factors that have rested the state that they would have, of no step yet; ``s`` takes weight decay over."""
    if optimizer is None:
        return
    if has_other_shapes(optimizer.state.get(layer.matrix, {}), layer.matrix):
        optimizer.state.pop(layer.matrix)
    rested = (layer.v if layer.tall else layer.u, layer.s)
    for key, value in optimizer.state.get(layer.matrix, {}).items():
        for parameter in rested:
            if key not in optimizer.state[parameter]:
                shaped = isinstance(value, Tensor) and value.shape == layer.matrix.shape
                optimizer.state[parameter][key] = torch.zeros_like(parameter) if shaped else copy.deepcopy(value)
    groups = {id(p): group["params"] for group in optimizer.param_groups for p in group["params"]}
    one, other = groups.get(id(layer.matrix)), groups.get(id(layer.s))
    if one is not None and other is not None and one is not other:
        one[_place(one, layer.matrix)], other[_place(other, layer.s)] = layer.s, layer.matrix


def _place(parameters: list[nn.Parameter], wanted: nn.Parameter) -> int:
    return next(i for i, parameter in enumerate(parameters) if parameter is wanted)


class _Transfer:
    """Factors and their optimiser's state, worked on by the processor: one copy there, and one back at the end."""

    def __init__(self, layers: Mapping[str, LowRank], optimizer: torch.optim.Optimizer | None) -> None:
        self.optimizer = optimizer
        tensors: dict[int, Tensor] = {}
        for layer in layers.values():
            for factor in _factors(layer):
                state = {} if optimizer is None else optimizer.state.get(factor, {})
                found = [factor.detach(), *(v for v in state.values() if isinstance(v, Tensor))]
                tensors.update(zip([id(factor), *(id(v) for v in found[1:])], found, strict=True))
        self.fetched = moved(tensors, "cpu")
        self.written: list[tuple[Tensor, Tensor]] = []  # where to, and what

    def __enter__(self) -> _Transfer:
        return self

    @torch.no_grad()
    def __exit__(self, failed: type[BaseException] | None, *rest: object) -> None:
        if failed is None and self.written:
            there = moved({i: value for i, (_, value) in enumerate(self.written)}, self.written[0][0].device)
            torch._foreach_copy_([place for place, _ in self.written], list(there.values()))

    def here(self, tensor: Tensor) -> Tensor:
        return self.fetched[id(tensor)]

    def put(self, layer: LowRank, turn: BasisChange) -> None:
        for parameter, fresh in zip(_factors(layer), (turn.u, turn.s, turn.v), strict=True):
            self.written.append((parameter, fresh))
            parameter.grad = None

    @torch.no_grad()
    def carry(
        self,
        layer: LowRank,
        tangent: Callable[[Tensor, Tensor, Tensor], Steps],
        spread: Callable[[Tensor, Tensor, Tensor], Steps],
    ) -> None:
        """Take the optimiser's state of the factors of ``layer`` along."""
        parameters, optimizer = _factors(layer), self.optimizer
        places: list[ParameterState] = [{} if optimizer is None else optimizer.state.get(p, {}) for p in parameters]
        if optimizer is None or not all(places):
            return
        if any(has_other_shapes(place, p) for place, p in zip(places, parameters, strict=True)):
            for parameter in parameters:
                optimizer.state.pop(parameter)
            return
        states: list[ParameterState] = [{k: self.fetched.get(id(v), v) for k, v in place.items()} for place in places]
        before = [dict(state) for state in states]
        known = all(k in FIRST + SECOND for s in states for k, v in s.items() if isinstance(v, Tensor) and v.ndim)
        for key in SECOND:
            if all(isinstance(s.get(key), Tensor) for s in states):
                moments = spread(*(s[key] for s in states))
                for state, fresh in zip(states, moments, strict=True):
                    state[key] = fresh
        scales = [_scale(optimizer, parameters, of) for of in (before, states)]
        for key in FIRST:
            if all(isinstance(s.get(key), Tensor) for s in states):
                steps = tangent(*(s[key] / scale for s, scale in zip(states, scales[0], strict=True)))
                for state, fresh, scale in zip(states, steps, scales[1], strict=True):
                    state[key] = fresh * scale
        for parameter, place, state in zip(parameters, places, states, strict=True):
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim:
                    # of optimisers we do not know: in the old basis it would mislead, and half of it more still
                    self.written.append((place[key], value if known else torch.zeros_like(value)))


def _scale(
    optimizer: torch.optim.Optimizer, parameters: tuple[nn.Parameter, ...], states: list[ParameterState]
) -> list[Tensor | float]:
    """What Adam divides its first moment by, up to a factor that is the same for all; 1 for SGD."""
    scales: list[Tensor | float] = []
    for parameter, state in zip(parameters, states, strict=True):
        second = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
        if second is None:
            scales.append(1.0)
            continue
        group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
        seen = 1.0 - group["betas"][1] ** float(state["step"])
        scales.append((second / seen).sqrt() + group["eps"])
    return scales
