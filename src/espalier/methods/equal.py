"""Equal ranks: every layer in one form at the same fraction of its full rank.  The baseline of every choice of ranks.

The fraction is the largest that the budget allows, by bisection; the ranks that rounding has left a little low are then raised
by one step where the rest of the budget takes it, those first that win most.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from espalier.costs import CostModel
from espalier.forms import FORMS, Place, chain, dense_chain
from espalier.forms.candidates import Spectra, full_rank, possible, snap
from espalier.forms.chains import cost_of
from espalier.graph import Chain, Graph, with_ladders
from espalier.graph.ladders import ladder_name
from espalier.solver import BudgetError, solve

BISECTIONS = 40


def equal_chains(
    graph: Graph,
    places: Mapping[str, Place],
    spectra: Mapping[str, Spectra],
    limits: Mapping[str, int],
    *,
    forms: Collection[str] = tuple(FORMS),
    tt_fraction: float = 0.5,
    multiple_of: int = 1,
) -> dict[str, Chain]:
    """Forms of all layers but those that stay dense, because a chain at that fraction would be no cheaper.

    Of ``forms`` that one is taken which holds most energy at the budget, mean over layers; layers for which it makes no
    sense have ``channel``.  The core of ``tt`` is split at ``tt_fraction`` of its full rank.

    Raises: BudgetError if rank one everywhere is too dear.
    """
    dense = CostModel(graph).cost(graph.sizes)
    found: list[tuple[float, dict[str, Chain]]] = []
    failed: BudgetError | None = None
    for form in forms:

        def at(fraction: float, steps: int = 0, form: str = form) -> dict[str, Chain]:
            return {n: _chain(p, form, fraction, steps, tt_fraction, multiple_of) for n, p in places.items()}

        def fits(chains: Mapping[str, Chain]) -> bool:
            saved = [np.subtract(_dense(places[n]), cost_of(places[n], c)) for n, c in chains.items()]
            macs, params = np.sum(saved, axis=0) if saved else (0, 0)
            left = {"macs": dense.macs - macs, "params": dense.params - params}
            return all(left[m] <= limit for m, limit in limits.items())

        low, high = 0.0, 1.0
        if fits(at(high)):
            low = high
        else:
            for _ in range(BISECTIONS):
                middle = (low + high) / 2
                low, high = (middle, high) if fits(at(middle)) else (low, middle)
        try:
            chains = _filled(graph, places, spectra, limits, at(low), at(low, 1))
        except BudgetError as error:
            failed = error
            continue
        held = [spectra[n].held(chains[n]) if n in chains else 1.0 for n in places]
        found.append((float(np.mean(held)) if held else 1.0, chains))
    if not found:
        assert failed is not None
        raise failed
    return max(found, key=lambda f: f[0])[1]


def _chain(place: Place, form: str, fraction: float, steps: int, tt_fraction: float, multiple_of: int) -> Chain:
    """At ``fraction`` of the full rank and ``steps`` more; the dense layer where that is not cheaper in everything."""
    kh, kw = place.kernel
    inputs, outputs = place.in_channels, place.out_channels

    def rank(whole: int) -> int:
        return min(snap(fraction * whole, whole, multiple_of) + steps * multiple_of, whole)

    form = possible((outputs, inputs, kh, kw), (form,))[0]
    if form in ("channel", "spatial"):
        made = chain(place, form, [rank(full_rank(place, form))])
    else:
        a, b = rank(inputs), rank(outputs)
        whole = min(a * kh, kw * b)
        made = chain(place, form, [a, b] if form == "tucker" else [a, snap(tt_fraction * whole, whole, multiple_of), b])
    cheaper = all(one < other for one, other in zip(cost_of(place, made), _dense(place), strict=True))
    return made if cheaper else dense_chain(place)


def _filled(
    graph: Graph,
    places: Mapping[str, Place],
    spectra: Mapping[str, Spectra],
    limits: Mapping[str, int],
    chains: Mapping[str, Chain],
    raised: Mapping[str, Chain],
) -> dict[str, Chain]:
    """``chains``, or ``raised`` where the rest of the budget takes it."""
    ladders: dict[str, list[Chain]] = {}
    worth: dict[str, np.ndarray] = {}
    ceiling: dict[str, int] = {}
    for name, one in chains.items():
        if not one.widths:
            continue
        costs = [cost_of(places[name], c) for c in (one, raised[name])]
        dearer = raised[name].widths and all(a < b for a, b in zip(*costs, strict=True))
        rungs = [one, raised[name]] if dearer else [one]
        held = np.maximum.accumulate([spectra[name].held(c) for c in rungs] + [1.0])
        ladders[name] = [*rungs, dense_chain(places[name])]
        worth[ladder_name(name)] = np.diff(held, prepend=0.0)
        ceiling[ladder_name(name)] = len(rungs)
    whole = with_ladders(graph, ladders)
    plan = solve(whole, worth, limits, multiple_of=1, ceiling=ceiling)
    return {n: rungs[len(plan.keep[ladder_name(n)]) - 1] for n, rungs in ladders.items()}


def _dense(place: Place) -> tuple[int, int]:
    return cost_of(place, dense_chain(place))
