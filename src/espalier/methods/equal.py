"""Equal ranks: every layer in one form at the same fraction of its full rank.  The baseline of every choice of ranks.

The fraction is the largest that the budget allows, by bisection; the ranks that rounding has left a little low are then raised
by one step where the rest of the budget takes it, those first that win most.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from espalier.costs import CostModel
from espalier.forms import Place, Wish, cost_of, dense_sequence
from espalier.forms.candidates import held as held_by, scaled
from espalier.forms.spectra import Spectra
from espalier.forms.tucker import below
from espalier.graph import ConvSequence, Graph, with_alternatives
from espalier.graph.alternatives import alternatives_name
from espalier.solver import BudgetError, solve

BISECTIONS = 40


def equal_sequences(
    graph: Graph,
    places: Mapping[str, Place],
    spectra: Mapping[str, Spectra],
    limits: Mapping[str, float],
    *,
    forms: Collection[str],
    tt_fraction: float = 0.5,
    multiple_of: int = 1,
) -> dict[str, ConvSequence]:
    """Forms of all layers but those that stay dense, because a sequence at that fraction would be no cheaper.

    Of ``forms`` that one is taken which holds most energy at the budget, mean over layers; layers for which it makes no
    sense have ``channel``.  The core of ``tt`` is split at ``tt_fraction`` of its full rank.

    Raises: BudgetError if rank one everywhere is too dear.
    """
    dense = CostModel(graph).cost(graph.sizes)
    wish = Wish((1, 1), tt_fraction, multiple_of)
    found: list[tuple[float, dict[str, ConvSequence]]] = []
    failed: BudgetError | None = None
    for form in forms:

        def at(fraction: float, steps: int = 0, form: str = form) -> dict[str, ConvSequence]:
            return {n: _sequence(p, form, fraction, steps, wish) for n, p in places.items()}

        def fits(sequences: Mapping[str, ConvSequence]) -> bool:
            saved = [np.subtract(_dense(places[n]), cost_of(places[n], c)) for n, c in sequences.items()]
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
            sequences = _filled(graph, places, spectra, limits, at(low), at(low, 1))
        except BudgetError as error:
            failed = error
            continue
        held = [held_by(places[n], spectra[n], sequences[n]) if n in sequences else 1.0 for n in places]
        found.append((float(np.mean(held)) if held else 1.0, sequences))
    if not found:
        assert failed is not None
        raise failed
    return max(found, key=lambda f: f[0])[1]


def _sequence(place: Place, form: str, fraction: float, more: int, wish: Wish) -> ConvSequence:
    """At ``fraction`` of the full rank and ``more`` ranks above; the dense layer where that is not cheaper in everything."""
    made = scaled(place, form, fraction, wish, more=more)
    return made if below(cost_of(place, made), _dense(place)) else dense_sequence(place)


def _filled(
    graph: Graph,
    places: Mapping[str, Place],
    spectra: Mapping[str, Spectra],
    limits: Mapping[str, float],
    sequences: Mapping[str, ConvSequence],
    raised: Mapping[str, ConvSequence],
) -> dict[str, ConvSequence]:
    """``sequences``, or ``raised`` where the rest of the budget takes it."""
    alternatives: dict[str, list[ConvSequence]] = {}
    worth: dict[str, np.ndarray] = {}
    ceiling: dict[str, int] = {}
    for name, one in sequences.items():
        if not one.widths:
            continue
        costs = [cost_of(places[name], c) for c in (one, raised[name])]
        dearer = raised[name].widths and all(a < b for a, b in zip(*costs, strict=True))
        options = [one, raised[name]] if dearer else [one]
        held = np.maximum.accumulate([held_by(places[name], spectra[name], c) for c in options] + [1.0])
        alternatives[name] = [*options, dense_sequence(places[name])]
        worth[alternatives_name(name)] = np.diff(held, prepend=0.0)
        ceiling[alternatives_name(name)] = len(options)
    whole = with_alternatives(graph, alternatives)
    plan = solve(whole, worth, limits, multiple_of=1, ceiling=ceiling)
    return {n: options[len(plan.keep[alternatives_name(n)]) - 1] for n, options in alternatives.items()}


def _dense(place: Place) -> tuple[int, int]:
    return cost_of(place, dense_sequence(place))
