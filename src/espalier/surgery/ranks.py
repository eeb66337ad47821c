"""Ranks that fall in the middle of training: cut triplets off, and turn factors with the optimiser's state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from espalier.carving import Kept, carve
from espalier.forms.lowrank import LowRank, Turn, orthonormalise_batch

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


def turn_factors(layers: Mapping[str, LowRank], *, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Turn]:
    """Make the factors of ``layers`` singular value decompositions again; the weights stay, momentum and moments go along.

    SGD's momentum is a step of the factors, so it turns like one (``Turn.tangent``).  Adam steps by ``m / (sqrt(v) + eps)``:
    ``v`` is spread over the new basis, and ``m`` is set so that this very step, turned, is the next one.

    Layers of one shape are decomposed in one batch.  On the CPU batches fit into the cache, and threads take turns at them:
    many small decompositions side by side are faster than one after the other with all threads.
    """
    shapes: dict[Any, list[str]] = {}
    for name, layer in layers.items():
        shapes.setdefault((layer.u.shape, layer.v.shape, layer.u.dtype, layer.u.device), []).append(name)
    parts = []
    for (_, (_, rank), _, device), names in shapes.items():
        size = max(1, CACHED // rank**2) if device.type == "cpu" else len(names)
        parts += [names[i : i + size] for i in range(0, len(names), size)]
    parts.sort(key=lambda names: -len(names) * layers[names[0]].rank ** 3)  # the longest first
    threads = torch.get_num_threads() if all(device.type == "cpu" for *_, device in shapes) else 1

    def turn(names: list[str]) -> dict[str, Turn]:
        return _turn([layers[n] for n in names], names, optimizer)

    if threads == 1 or len(parts) == 1:
        done = [turn(names) for names in parts]
    else:
        with _single_thread(), ThreadPoolExecutor(threads) as pool:
            done = list(pool.map(turn, parts))
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


@torch.no_grad()
def _turn(layers: list[LowRank], names: list[str], optimizer: torch.optim.Optimizer | None) -> dict[str, Turn]:
    """``turn_factors`` for layers of one shape."""
    batch = [torch.stack([getattr(layer, factor) for layer in layers]) for factor in ("u", "s", "v")]
    turns = orthonormalise_batch(*batch, names=names).split()
    for layer, turn in zip(layers, turns, strict=True):
        parameters = (layer.u, layer.s, layer.v)
        if optimizer is not None:
            _turn_state(optimizer, parameters, turn)
        for parameter, fresh in zip(parameters, (turn.u, turn.s, turn.v), strict=True):
            parameter.copy_(fresh)
            parameter.grad = None
    return dict(zip(names, turns, strict=True))


def _turn_state(optimizer: torch.optim.Optimizer, parameters: tuple[nn.Parameter, ...], found: Turn) -> None:
    states = [optimizer.state.get(p, {}) for p in parameters]
    if not all(states):
        return
    scale_before = _scale(optimizer, parameters, states)
    for key in SECOND:
        if all(isinstance(s.get(key), Tensor) for s in states):
            for state, fresh in zip(states, found.spread(*(s[key] for s in states)), strict=True):
                state[key].copy_(fresh)
    scale_after = _scale(optimizer, parameters, states)
    for key in FIRST:
        if all(isinstance(s.get(key), Tensor) for s in states):
            steps = [s[key] / scale for s, scale in zip(states, scale_before, strict=True)]
            for state, fresh, scale in zip(states, found.tangent(*steps), scale_after, strict=True):
                state[key].copy_(fresh * scale)
    for parameter, state in zip(parameters, states, strict=True):
        for key, value in state.items():  # of optimisers we do not know: in the old basis it would mislead
            if (
                key not in FIRST + SECOND
                and isinstance(value, Tensor)
                and value.shape == parameter.shape
                and value.ndim
            ):
                value.zero_()


def _scale(
    optimizer: torch.optim.Optimizer, parameters: tuple[nn.Parameter, ...], states: list[dict[str, Tensor]]
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
