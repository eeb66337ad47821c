"""Alternatives of ranks: which ranks every layer may have, what they cost, and the plain layers that they become.

Shared by all methods that truncate a singular value decomposition.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from espalier.carving import put_in_place
from espalier.costs import Cost, CostModel
from espalier.forms import (
    FORMS,
    LowRank,
    MatrixForm,
    Place,
    blank,
    cost_of,
    dense_sequence,
    find_places,
    sequence,
    sequential,
)
from espalier.forms.lowrank import BasisChange
from espalier.forms.table import ALWAYS, matrix_form
from espalier.forms.trial import refused
from espalier.graph import ConvSequence, Graph, with_alternatives
from espalier.graph.alternatives import alternatives_name
from espalier.methods.agreement import once
from espalier.methods.state import WEIGHT_FROZEN, is_frozen
from espalier.methods.units import Gate
from espalier.plan import Budget
from espalier.solver import BudgetError, solve
from espalier.surgery import put_layer
from espalier.timing.forms import measured
from espalier.timing.profile import Profile

AUTO = "auto"
LAYOUTS = (AUTO, *(name for name, form in FORMS.items() if isinstance(form, MatrixForm)))
COMPOSING = 0.06  # of the MACs of a layer that composing its weight may cost at full rank ...
USUAL_BATCH = 128  # ... and at this batch


@dataclass(frozen=True)
class RankAlternatives:
    """Layers that can be factorised; layer -> option ``k`` is rank ``ranks[layer][k - 1]``, the last the dense layer."""

    graph: Graph  # with a group of alternatives for every layer
    places: Mapping[str, Place]
    forms: Mapping[str, str]
    ranks: Mapping[str, tuple[int, ...]]
    skipped: Mapping[str, str]  # layers that stay dense, and why
    budget: Budget  # whose profile knows the times of the factorised layers

    def top(self, layer: str) -> int:
        """The dense option."""
        return len(self.ranks[layer]) + 1

    def option(self, layer: str, rank: int) -> int:
        """The lowest option that holds ``rank`` triplets."""
        return int(np.searchsorted(self.ranks[layer], rank)) + 1

    def options(self, ranks: Mapping[str, int]) -> dict[str, int]:
        """Alternatives -> option, as ``solve`` and ``Run.options`` take it."""
        return {alternatives_name(layer): self.option(layer, rank) for layer, rank in ranks.items()}

    def importance(self, scores: Mapping[str, np.ndarray], *, exponent: float = 1.0) -> dict[str, np.ndarray]:
        """What every option adds, from a score per triplet, largest singular value first.

        A option that holds the share ``h`` of its layer's total is worth ``total * h ** exponent``: below 1, what a layer loses
        last is dearest, so that none is emptied because its energy lies in few triplets.
        """
        found = {}
        for layer, values in scores.items():
            sums = np.concatenate([[0.0], np.cumsum(values)])
            if exponent != 1.0 and sums[-1] > 0:
                sums = sums[-1] * (sums / sums[-1]) ** exponent
            at = np.minimum([0, *self.ranks[layer], len(values)], len(values))
            found[alternatives_name(layer)] = np.diff(sums[at])
        return found

    def equal(self, limits: Mapping[str, float], *, share: float = 1.0) -> dict[str, int]:
        """Group -> ``share`` of its option where every layer has the same fraction of its factorised options.

        The largest fraction within ``limits``, by bisection; one option at least.
        """

        def options(fraction: float) -> dict[str, int]:
            return {alternatives_name(n): max(1, int(fraction * len(ranks))) for n, ranks in self.ranks.items()}

        return options(share * self._furthest(options, limits, good=0.0, bad=1.0, times=20))

    def on_the_way(
        self, ends: Mapping[str, int], left: float, limits: Mapping[str, float], dense: Cost
    ) -> dict[str, int]:
        """Options on the way from the dense layers to the ranks ``ends``, in all layers the same share of it.

        The least share at which the cost is down to what has ``left`` of its fall, from ``dense`` to that of ``ends``.
        """
        tops, end = {alternatives_name(n): self.top(n) for n in self.ranks}, self.options(ends)

        def options(share: float) -> dict[str, int]:
            return {n: top - math.floor(share * (top - end[n]) + 0.5) for n, top in tops.items()}

        last = self._cost(CostModel(self.graph), options(1.0))
        allowed = {m: getattr(last, m) + (getattr(dense, m) - getattr(last, m)) * left for m in limits}
        return options(self._furthest(options, allowed, good=1.0, bad=0.0, times=30))

    def _furthest(
        self,
        options: Callable[[float], dict[str, int]],
        limits: Mapping[str, float],
        *,
        good: float,
        bad: float,
        times: int,
    ) -> float:
        """The share nearest to ``bad`` at which ``options(share)`` costs no more than ``limits``, by bisection."""
        costs = CostModel(self.graph)
        for _ in range(times):
            middle = (good + bad) / 2
            cost = self._cost(costs, options(middle))
            fits = all(getattr(cost, metric) <= limit for metric, limit in limits.items())
            good, bad = (middle, bad) if fits else (good, middle)
        return good

    def _cost(self, costs: CostModel, at: Mapping[str, int]) -> Cost:
        return costs.cost(np.array([at.get(g.name, g.size) for g in self.graph.groups], dtype=np.int64))

    def rank(self, layer: str, option: int, *, whole: int) -> int:
        """Rank of an option; ``whole`` is that of the dense layer."""
        return whole if option == self.top(layer) else self.ranks[layer][option - 1]

    def put(self, model: nn.Module, options: Mapping[str, int]) -> None:
        """Give layers of ``model``, of any widths, the ranks of ``options``: the structure, of weights that mean nothing."""
        for name, place in self.places.items():
            option = options.get(alternatives_name(name), self.top(name))
            if option == self.top(name):
                continue
            row = sequence(place, self.forms[name], [self.ranks[name][option - 1]])
            put_layer(model, name, blank(place, row, model.get_submodule(name)))

    def plain(self, layer: str, factors: tuple[Tensor, Tensor, Tensor], *, bias: Tensor | None) -> nn.Sequential:
        """Two plain layers in a row; both take a square root of ``s``, so that further training treats them alike."""
        u, s, v = (f.detach() for f in factors)
        place, root = self.places[layer], s.abs().sqrt()
        weights = matrix_form(self.forms[layer]).stage_weights(u * root * s.sign(), v * root, place.weight_shape)
        return sequential(place, self.forms[layer], weights, bias)


def rank_alternatives(
    model: nn.Module, example: Any, *, graph: Graph, budget: Budget, form: str = "auto"
) -> RankAlternatives:
    """Find the layers of ``model``, a dense network with this ``graph``, that can be factorised, and their ranks.

    Ranks are multiples of ``budget.multiple_of`` at which both MACs and parameters are below the dense layer's; where time is
    limited, also of what the runtime likes, and factorised layers that were never measured are measured now.
    """
    multiple_of = budget.multiple_of if budget.latency is None else math.lcm(budget.multiple_of, graph.grain)
    if budget.activation_memory is not None:
        raise ValueError(
            "Budget(activation_memory=...): lower ranks do not lower the memory of activations; give macs or params"
        )
    places, left = find_places(model, example)
    left.update({n: WEIGHT_FROZEN for n in places if is_frozen(model, n)})
    places = {n: p for n, p in places.items() if n not in left}
    forms = {name: layout(place, form) for name, place in places.items()}
    left.update(refused(model, example, places, forms))
    places = {n: p for n, p in places.items() if n not in left}
    ranks: dict[str, tuple[int, ...]] = {}
    alternatives: dict[str, list[ConvSequence]] = {}
    for name, place in places.items():
        sequences = rank_options(place, forms[name], multiple_of)
        if not sequences:
            left[name] = f"too small: rank {multiple_of} costs as much as the layer itself"
            continue
        try:
            with_alternatives(graph, {name: [dense_sequence(place)]})
        except ValueError as error:
            left[name] = str(error)
            continue
        alternatives[name] = [*sequences, dense_sequence(place)]
        ranks[name] = tuple(c.widths[0] for c in sequences)
    whole = with_alternatives(graph, alternatives)
    for group, held in zip(whole.groups, budget.protected(whole), strict=True):
        if held and group.options:
            name = next(n for n in alternatives if alternatives_name(n) == group.name)
            left[name] = "protected by the budget"
            del alternatives[name], ranks[name]
    found = RankAlternatives(
        with_alternatives(graph, alternatives),
        {n: places[n] for n in alternatives},
        {n: forms[n] for n in alternatives},
        ranks,
        left,
        budget,
    )
    if isinstance(budget.profile, Profile):
        profile, offered = budget.profile, found
        known = replace(budget, profile=once(lambda: measured(profile, model, example, offered.graph, offered.put)))
        found = replace(found, graph=known.timed(found.graph), budget=known)
    try:  # unreachable budgets fail now
        even = {g.name: np.ones(g.size) for g in found.graph.groups if g.options}
        solve(found.graph, even, budget.limits(CostModel(graph).cost(graph.sizes)))
    except BudgetError as error:
        raise unreachable(error, left) from error
    return found


def unreachable(error: BudgetError, skipped: Mapping[str, str]) -> BudgetError:
    """The same error, with the layers that keep their form and why."""
    if not skipped:
        return error
    named = ", ".join(f"{name} ({why})" for name, why in list(skipped.items())[:SHOWN])
    more = f" and {len(skipped) - SHOWN} more" if len(skipped) > SHOWN else ""
    return BudgetError(f"{error}; these keep their form: {named}{more}", error.smallest)


SHOWN = 4  # layers that an error names


def layout(place: Place, form: str) -> str:
    """``form``, or for "auto" the one that runs faster: spatial, unless training at full rank would cost too much.

    A spatial matrix is nearly square, so of a 3 x 3 convolution it has three times the rank of the channel matrix; where the
    image is small, composing the weight would cost more than convolving with it.
    """
    if math.prod(place.kernel) == 1 or len(place.kernel) == 1:
        return ALWAYS.name
    if form != AUTO:
        return form
    most = COMPOSING * USUAL_BATCH * math.prod(place.output_size)
    full = {n: matrix_form(n).full_rank(place) for n in LAYOUTS[1:] if n != ALWAYS.name}
    return max((n for n in full if full[n] <= most), key=full.__getitem__, default=ALWAYS.name)


def rank_options(place: Place, form: str, multiple_of: int) -> list[ConvSequence]:
    """Ranks at which two layers cost less than one, rising."""
    macs, params = cost_of(place, dense_sequence(place))
    sequences = []
    for rank in range(multiple_of, matrix_form(form).full_rank(place) + 1, multiple_of):
        option = sequence(place, form, [rank])
        cost = cost_of(place, option)
        if cost[0] >= macs or cost[1] >= params:
            break
        sequences.append(option)
    return sequences


class Triplets:
    """The singular triplets of factorised layers as units, in one row, layer after layer, the largest value first.

    A gate on a triplet is on its singular value: ``dL/dg = s dL/ds``, and ``s u^T dL/dW v`` of a layer that is trained whole.
    """

    def __init__(self, layers: Mapping[str, LowRank], decomposed: Mapping[str, BasisChange]) -> None:
        """``decomposed``: of the layers that are whole."""
        self.layers, self.decomposed = layers, decomposed
        self.device = next((layer.s.device for layer in layers.values()), torch.device("cpu"))

    @property
    def count(self) -> int:
        return sum(layer.rank for layer in self.layers.values())

    def by_layer(self, row: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.layers, row.split([layer.rank for layer in self.layers.values()]), strict=True))

    def row(self, by_layer: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([by_layer[n] for n in self.layers]) if self.layers else torch.zeros(0)

    def sum(self, parts: Iterable[tuple[str, Tensor]]) -> Tensor:
        zeros = {n: torch.zeros_like(layer.s) for n, layer in self.layers.items()}
        return self.row({**zeros, **dict(parts)})

    def total(self, values: Tensor) -> Tensor:
        return torch.stack([v.sum() for v in self.by_layer(values).values()]).sum()

    def gates(self) -> dict[nn.Parameter, Gate]:
        return {layer.matrix if layer.whole else layer.s: self._gate(n) for n, layer in self.layers.items()}

    def _gate(self, name: str) -> Gate:
        layer = self.layers[name]
        if not layer.whole:
            return lambda s, gradient: [(name, s * gradient)]
        turn = self.decomposed[name]
        left, right = (turn.u * turn.s, turn.v) if layer.tall else (turn.v * turn.s, turn.u)
        left, right = left.to(self.device), right.to(self.device)
        return lambda _, gradient: [(name, ((gradient @ right) * left).sum(0))]


def dense_twin(model: nn.Module) -> nn.Module:
    """A copy with plain layers for the factorised ones: what a run that goes on began with."""
    twin = copy.deepcopy(model)
    for module in list(twin.modules()):
        if isinstance(module, LowRank):
            put_in_place(twin, module, module.dense())
    return twin


def energy(singular: Tensor) -> np.ndarray:
    """Share of the layer's energy that each triplet holds."""
    squares = singular.detach().double().square().cpu().numpy()
    return squares / max(squares.sum(), 1e-300)


def tails(singular: Tensor) -> Tensor:
    """``tails[r]``: the share of the energy that is lost at rank ``r``, for ``r`` from 0 to the full rank; float64."""
    squares = singular.detach().double().square()
    left = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
    return left / left[0].clamp_min(1e-300)
