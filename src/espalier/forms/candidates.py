"""The forms of one layer as alternatives: which sizes are worth having, and the way from its weight to the stages of any."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from espalier.forms.form import Bases, Offered, Wish, cost_of, dense_sequence, shape_of, snap
from espalier.forms.places import Place
from espalier.forms.spectra import Spectra
from espalier.forms.table import FORMS, form_named, possible
from espalier.forms.tensors import folded
from espalier.forms.tucker import below
from espalier.graph import ConvSequence

Price = Callable[[Place, ConvSequence], tuple[float, ...]]
"""What a form costs at a place, one number for each kind of cost that counts: ``cost_of``, or its time."""


def options_at(
    place: Place, spectra: Spectra, wish: Wish, *, forms: Collection[str] | None = None, price: Price = cost_of
) -> tuple[list[ConvSequence], np.ndarray]:
    """Forms of ``place`` from cheap to dear, the dense layer last, and the share of energy each loses, falling.

    Only what is on the front stays: dearer in all that ``price`` says than all before it, and closer.  Only those of ``forms``
    (all without) are offered that are ``possible``.
    """
    allowed = possible(shape_of(place), forms)
    offers: list[tuple[float, ConvSequence]] = []
    for name, form in FORMS.items():
        if name in allowed:
            known: list[Offered] = [(cost_of(place, made), held) for held, made in offers]
            found = list(form.offers(place, spectra, wish, known=known))
            offers += [(held, form.sequence(place, ranks)) for held, ranks in found]
    return _front(place, offers, price)


def scaled(place: Place, form: str, fraction: float, wish: Wish, *, more: int = 0) -> ConvSequence:
    """``form`` at that fraction of its full rank, and ``more`` allowed ranks above; "channel" where it makes no sense."""
    of = form_named(possible(shape_of(place), (form,))[0])

    def rank(full: int) -> int:
        return min(snap(fraction * full, full, wish.multiple_of) + more * wish.multiple_of, full)

    return of.sequence(place, of.scaled(place, rank, wish))


def cheapest(
    place: Place, wish: Wish, *, forms: Collection[str] | None = None, price: Price = cost_of
) -> list[ConvSequence]:
    """The least that ``options_at`` can offer, and the dense layer; the latter alone if nothing is cheaper."""
    offers = [(0.0, scaled(place, name, 0.0, wish)) for name in possible(shape_of(place), forms)]
    options = _front(place, offers, price)[0]
    return options if len(options) == 1 else [options[0], options[-1]]


def full_rank(place: Place, form: str) -> int:
    """Of ``channel`` and ``spatial`` the rank of an exact row; of the others the lesser one of the two channel unfoldings."""
    return form_named(form).full_rank(place)


def ranks_of(place: Place, form: ConvSequence) -> tuple[int, ...]:
    """The ranks that a row was made with."""
    return form_named(form.name).ranks_of(form, place)


def held(place: Place, spectra: Spectra, form: ConvSequence) -> float:
    """Share of the energy that a row holds."""
    return form_named(form.name).held(spectra, ranks_of(place, form))


def _front(
    place: Place, offers: Sequence[tuple[float, ConvSequence]], price: Price
) -> tuple[list[ConvSequence], np.ndarray]:
    top = dense_sequence(place)
    dense = price(place, top)
    priced = [(price(place, form), share, form) for share, form in offers]
    priced.sort(key=lambda p: (sum(own / whole for own, whole in zip(p[0], dense, strict=True)), -p[1]))
    options: list[ConvSequence] = []
    kept: list[float] = []
    last: tuple[float, ...] = (0.0,) * len(dense)
    best = -1.0
    for cost, share, form in priced:
        if below(last, cost) and below(cost, dense) and share > best:
            options.append(form)
            kept.append(share)
            last, best = cost, share
    return [*options, top], 1.0 - np.array([*kept, 1.0])


# -- weights


@dataclass(frozen=True)
class Factors:
    """One layer in one form: the weights of its stages, and what a later fit may begin from."""

    form: str
    weights: tuple[Tensor, ...]  # one per stage, first to last, (out, in, kh, kw)
    shape: tuple[int, ...]  # of the weight of the layer
    bases: Bases | None = None


def factorise(
    weight: Tensor, form: str, ranks: Sequence[int], *, sweeps: int = 3, start: Bases | None = None
) -> Factors:
    """The stages of ``form`` with ``ranks`` that come close to ``weight``, of any layer; forms say how close.

    All stages have the same norm, so that one learning rate suits them.
    """
    work = weight.detach()
    if work.dtype not in (torch.float32, torch.float64):
        work = work.float()
    stages, bases = form_named(form).decompose(
        work if work.ndim == 2 else folded(work), ranks, sweeps=sweeps, start=start
    )
    return Factors(form, tuple(s.to(weight.dtype) for s in _balanced(stages)), tuple(weight.shape), bases)


def _balanced(stages: Sequence[Tensor]) -> list[Tensor]:
    norms = [float(torch.linalg.vector_norm(s)) for s in stages]
    if min(norms) == 0 or not all(map(math.isfinite, norms)):
        return [s.clone() for s in stages]
    mean = math.exp(math.fsum(map(math.log, norms)) / len(norms))
    return [s * (mean / n) for s, n in zip(stages, norms, strict=True)]


def compose(factors: Factors) -> Tensor:
    """The weight that the stages amount to, of the shape that the layer has."""
    return form_named(factors.form).compose(factors.weights).reshape(factors.shape)
