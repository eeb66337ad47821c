"""Ranks that fall in the middle of training: cut triplets off, and turn factors with the optimiser's state."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from espalier.carving import Kept, carve
from espalier.forms.lowrank import LowRank, Turn, orthonormalise

FIRST = ("momentum_buffer", "exp_avg")
SECOND = ("exp_avg_sq", "max_exp_avg_sq")
Factors = tuple[Tensor, Tensor, Tensor]


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


@torch.no_grad()
def turn_factors(layer: LowRank, *, name: str, optimizer: torch.optim.Optimizer | None = None) -> Turn:
    """Make the factors of ``layer`` a singular value decomposition again; the weight stays, momentum and moments go along.

    SGD's momentum is a step of the factors, so it turns like one (``Turn.tangent``).  Adam steps by ``m / (sqrt(v) + eps)``:
    ``v`` is spread over the new basis, and ``m`` is set so that this very step, turned, is the next one.
    """
    found = orthonormalise(layer.u, layer.s, layer.v, name=name)
    parameters = (layer.u, layer.s, layer.v)
    if optimizer is not None:
        _turn_state(optimizer, parameters, found)
    for parameter, fresh in zip(parameters, (found.u, found.s, found.v), strict=True):
        parameter.copy_(fresh)
        parameter.grad = None
    return found


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
