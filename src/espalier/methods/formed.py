"""Layers that may become any of several forms: which they are, and whether a budget can be met with them."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from espalier.forms import Place, Wish, cost_of, dense_sequence, find_places
from espalier.forms.candidates import Price, cheapest
from espalier.forms.form import shape_of
from espalier.forms.table import possible
from espalier.forms.trial import refused
from espalier.graph import Graph, with_alternatives
from espalier.graph.alternatives import alternatives_name
from espalier.methods.ranks import unreachable
from espalier.methods.state import WEIGHT_FROZEN, is_frozen
from espalier.plan import Budget
from espalier.solver import BudgetError, solve


def places_for(
    model: nn.Module, example: Any, graph: Graph, budget: Budget, forms: Sequence[str]
) -> tuple[dict[str, Place], dict[str, str]]:
    """Layers that may take one of ``forms``, and layer -> why the others stay dense."""
    found, skipped = find_places(model, example)
    places: dict[str, Place] = {}
    for name, place in found.items():
        if any(fnmatch.fnmatch(name, pattern) for pattern in budget.protect):
            skipped[name] = "protected"
        elif is_frozen(model, name):
            skipped[name] = WEIGHT_FROZEN
        elif math.prod(place.kernel) == 1 and min(place.in_channels, place.out_channels) < 2:
            skipped[name] = "too small"
        else:
            try:
                with_alternatives(graph, {name: [dense_sequence(place)]})
                places[name] = place
            except ValueError as error:
                skipped[name] = str(error)
    for form in forms:
        wanted = {n: possible(shape_of(p), (form,))[0] for n, p in places.items()}
        for name, why in refused(model, example, places, wanted).items():
            skipped[name] = why
            del places[name]
    return places, skipped


def check_reachable(
    graph: Graph,
    places: Mapping[str, Place],
    limits: Mapping[str, float],
    budget: Budget,
    choices: Sequence[Sequence[str]],
    *,
    wish: Wish,
    skipped: Mapping[str, str],
    price: Price = cost_of,
) -> None:
    """Raises: BudgetError if the layers ``places`` in their cheapest forms of one of ``choices`` are above ``limits``."""
    failed: BudgetError | None = None
    for forms in choices:
        alternatives = {n: cheapest(p, wish, forms=forms, price=price) for n, p in places.items()}
        alternatives = {n: options for n, options in alternatives.items() if len(options) > 1}
        offered = budget.timed(with_alternatives(graph, alternatives))
        worth = {alternatives_name(n): np.ones(2) for n in alternatives}
        try:
            solve(offered, worth, limits, multiple_of=1, protect=budget.protected(offered))
        except BudgetError as error:
            failed = error
        else:
            return
    assert failed is not None
    raise unreachable(failed, skipped) from failed
