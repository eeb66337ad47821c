"""Tucker-2 and TT-Tucker: projections onto leading directions of the channels, and a smaller convolution between them.

A weight ``W`` of shape ``(O, I, kh, kw)`` is projected onto the ``b`` leading directions of its output unfolding and the ``a``
of its input unfolding (HOSVD, De Lathauwer et al. 2000), which alternate to a better pair where asked (HOOI):

- ``tucker``: ``W ~ G x_out B x_in A`` with ``B (O, b)``, ``A (I, a)`` orthonormal and the core ``G (b, a, kh, kw)``; stages
  1x1 (I -> a), kh x kw (a -> b), 1x1 (b -> O) (Kim et al. 2016);
- ``tt``: the core, read as ``(a*kh, kw*b)``, is split once more by a truncated SVD of rank ``t`` (TT-SVD, Oseledets 2011);
  stages 1x1 (I -> a), kh x 1 (a -> t), 1 x kw (t -> b), 1x1 (b -> O).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

import numpy as np
from torch import Tensor

from espalier.forms.form import (
    STEPS,
    Bases,
    Form,
    Offer,
    Offered,
    Stage,
    Wish,
    columns,
    cost_of,
    dense_sequence,
    folded_kernel,
    pointwise,
    rows,
    snap,
    whole,
)
from espalier.forms.places import Place
from espalier.forms.spectra import Spectra, has_core
from espalier.forms.tensors import split_core, tucker2


class Tucker(Form):
    """1x1: I -> a;  kh x kw: a -> b;  1x1: b -> O."""

    name: ClassVar[str] = "tucker"
    ranks: ClassVar[int] = 2

    def possible(self, shape: Sequence[int]) -> bool:
        return has_core(shape)

    def stages(self, place: Place) -> tuple[Stage, ...]:
        return pointwise(place), whole(place), pointwise(place)

    def full_rank(self, place: Place) -> int:
        """The lesser one of the two channel unfoldings."""
        return min(place.in_channels, place.out_channels)

    def decompose(
        self, weight: Tensor, ranks: Sequence[int], *, sweeps: int, start: Bases | None
    ) -> tuple[list[Tensor], Bases | None]:
        pair = None if start is None else (start[0], start[1])
        core, (inner, outer) = tucker2(weight, (ranks[0], ranks[-1]), sweeps=sweeps, start=pair)
        stages = [inner.mT[:, :, None, None], *self.middle(core, ranks), outer[:, :, None, None]]
        return stages, (inner, outer)

    def middle(self, core: Tensor, ranks: Sequence[int]) -> list[Tensor]:
        """The stages between the two projections."""
        return [core]

    def scaled(self, place: Place, rank: Callable[[int], int], wish: Wish) -> tuple[int, ...]:
        return self.between(place, rank(place.in_channels), rank(place.out_channels), wish)

    def between(self, place: Place, a: int, b: int, wish: Wish) -> tuple[int, ...]:
        """All ranks, from those of the two projections."""
        return a, b

    def offers(self, place: Place, spectra: Spectra, wish: Wish, *, known: Sequence[Offered]) -> Iterable[Offer]:
        for a, b in _pairs(place, wish):
            yield float(spectra.tucker[a, b]), (a, b)

    def held(self, spectra: Spectra, ranks: Sequence[int]) -> float:
        return float(spectra.tucker[ranks[0], ranks[-1]])


class TT(Tucker):
    """1x1: I -> a;  kh x 1: a -> t;  1 x kw: t -> b;  1x1: b -> O."""

    name: ClassVar[str] = "tt"
    ranks: ClassVar[int] = 3

    def possible(self, shape: Sequence[int]) -> bool:
        return min(shape[2:], default=1) > 1

    def stages(self, place: Place) -> tuple[Stage, ...]:
        return pointwise(place), columns(place), rows(place), pointwise(place)

    def middle(self, core: Tensor, ranks: Sequence[int]) -> list[Tensor]:
        return list(split_core(core, ranks[1]))

    def between(self, place: Place, a: int, b: int, wish: Wish) -> tuple[int, ...]:
        kh, kw = folded_kernel(place.kernel)
        full = min(a * kh, kw * b)
        return a, snap(wish.fraction * full, full, wish.multiple_of), b

    def offers(self, place: Place, spectra: Spectra, wish: Wish, *, known: Sequence[Offered]) -> Iterable[Offer]:
        dense = cost_of(place, dense_sequence(place))
        for a, b in _pairs(place, wish):
            ranks = self.between(place, a, b, wish)
            cost, hope = cost_of(place, self.sequence(place, ranks)), float(spectra.tucker[a, b])
            # A train holds no more than its Tucker: the spectrum is computed only where that could win.
            if below(cost, dense) and not any(held >= hope and below(other, cost) for other, held in known):
                yield self.held(spectra, ranks), ranks

    def held(self, spectra: Spectra, ranks: Sequence[int]) -> float:
        return float(spectra.tt(ranks[0], ranks[2])[ranks[1]])


def _pairs(place: Place, wish: Wish) -> list[tuple[int, int]]:
    """The proposed ranks, scaled up and down together."""
    wide, high = place.in_channels, place.out_channels
    least, most = 1.0 / max(wish.ranks), max(wide / wish.ranks[0], high / wish.ranks[1])
    scales = sorted({1.0, *np.geomspace(least, max(most, least), STEPS)})
    found = (
        (snap(s * wish.ranks[0], wide, wish.multiple_of), snap(s * wish.ranks[1], high, wish.multiple_of))
        for s in scales
    )
    return list(dict.fromkeys(found))


def below(one: Sequence[float], other: Sequence[float]) -> bool:
    """Less in everything."""
    return all(a < b for a, b in zip(one, other, strict=True))
