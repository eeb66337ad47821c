"""What a form is: one object that says where it is possible, what it costs, how a weight becomes it and is read back.

A form computes a layer as a row of smaller convolutions.  Its file defines one subclass of ``Form``; a row in ``forms.table``
makes it known, and nothing else has to hear of it.  Weights here have four dimensions, ``(O, I, kh, kw)``, whatever the layer:
of a convolution along a line ``kh = 1``, in space ``kw`` are the last two axes as one.  A form with
``linear = True`` is given the ``(O, I)`` of linear layers too.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from torch import Tensor

from espalier.forms.places import Place, Sizes, out_size
from espalier.graph import ConvSequence
from espalier.layers import compose_row

if TYPE_CHECKING:
    from espalier.forms.spectra import Spectra

Bases = tuple[Tensor, ...]
"""What a later fit of a similar weight may begin from; what it holds is the form's own business."""


@dataclass(frozen=True)
class Stage:
    """Geometry of one convolution of a row; how many channels it has is the row's business.

    A ``depthwise`` stage works on each channel by itself: as many come out as go in.
    """

    kernel: Sizes
    stride: Sizes
    padding: Sizes
    dilation: Sizes
    depthwise: bool = False


def pointwise(place: Place) -> Stage:
    """1 x 1."""
    ones = (1,) * len(place.kernel)
    return Stage(ones, ones, (0,) * len(ones), ones)


def whole(place: Place) -> Stage:
    """The kernel of the layer."""
    return Stage(place.kernel, place.stride, place.padding, place.dilation)


def columns(place: Place) -> Stage:
    """Along the first axis of the kernel only: kh x 1."""
    return _along(place, lambda axis: axis == 0)


def rows(place: Place) -> Stage:
    """Along all axes but the first: 1 x kw."""
    return _along(place, lambda axis: axis > 0)


def _along(place: Place, runs: Callable[[int], bool]) -> Stage:
    def kept(values: Sizes, still: int) -> Sizes:
        return tuple(v if runs(axis) else still for axis, v in enumerate(values))

    return Stage(kept(place.kernel, 1), kept(place.stride, 1), kept(place.padding, 0), kept(place.dilation, 1))


@dataclass(frozen=True)
class Wish:
    """Which sizes of a form are looked at.

    ``ranks``: proposed for the input and the output unfolding.  ``fraction``: of the full rank, where a form splits its core.
    """

    ranks: tuple[int, int]
    fraction: float = 0.5
    multiple_of: int = 1


Offer = tuple[float, tuple[int, ...]]
"""Share of the energy that is held, and the ranks."""


class Form(ABC):
    """One way to compute a layer as a row of smaller convolutions.  Abstract: ``name``, ``ranks`` and the first four methods.

    What the others do by default is right for any form, from fits of the weight itself; a form that knows its error from
    spectra says so, which saves the fits.
    """

    name: ClassVar[str]
    ranks: ClassVar[int] = 1  # how many numbers say how large it is: one less than it has stages, depthwise ones aside
    linear: ClassVar[bool] = False  # also of linear layers

    @abstractmethod
    def possible(self, shape: Sequence[int]) -> bool:
        """Does it make sense for a weight ``(O, I, kh, kw)``?"""

    @abstractmethod
    def stages(self, place: Place) -> tuple[Stage, ...]:
        """Geometry of its convolutions, first to last."""

    @abstractmethod
    def full_rank(self, place: Place) -> int:
        """The largest rank that is of any use."""

    @abstractmethod
    def decompose(
        self, weight: Tensor, ranks: Sequence[int], *, sweeps: int, start: Bases | None
    ) -> tuple[list[Tensor], Bases | None]:
        """Weights of all stages, ``(out, in, kh, kw)``, that come close to ``weight``, and what a later fit may start from.

        ``sweeps``: how often to improve, where a form is fitted by iteration; 0 is a first guess.
        """

    # -- defaults

    def compose(self, weights: Sequence[Tensor]) -> Tensor:
        """The weight that the stages amount to."""
        return compose_row(weights)

    def scaled(self, place: Place, rank: Callable[[int], int], wish: Wish) -> tuple[int, ...]:
        """Ranks where every full rank ``n`` becomes ``rank(n)``: the same fraction of a layer everywhere."""
        return (rank(self.full_rank(place)),) * self.ranks

    def offers(self, place: Place, spectra: Spectra, wish: Wish, *, known: Sequence[Offered]) -> Iterable[Offer]:
        """Sizes worth looking at, and what each holds.  ``known``: cost and share held of what other forms offer."""
        for rank in sizes(self.full_rank(place), wish.multiple_of):
            ranks = (rank,) * self.ranks
            yield self.held(spectra, ranks), ranks

    def held(self, spectra: Spectra, ranks: Sequence[int]) -> float:
        """Share of the energy of the weight that is left: by a fit, remembered with the spectra."""
        key = (self.name, tuple(ranks))
        if key not in spectra.fits:
            stages, _ = self.decompose(spectra.weight, ranks, sweeps=3, start=None)
            lost = float((spectra.weight - self.compose(stages).reshape(spectra.weight.shape)).double().square().sum())
            spectra.fits[key] = 1.0 if spectra.energy == 0 else max(0.0, 1.0 - lost / spectra.energy)
        return spectra.fits[key]

    # -- the same for every form

    def sequence(self, place: Place, ranks: Sequence[int]) -> ConvSequence:
        """What it costs at ``place`` with ``ranks``, for ``with_alternatives``."""
        if len(ranks) != self.ranks or min(ranks) < 1:
            raise ValueError(
                f"{place.name}: form {self.name!r} takes {self.ranks} ranks of 1 or more, got {list(ranks)}"
            )
        bare = _without_ranks(self, place)
        given = iter(int(r) for r in ranks)
        widths: list[int] = []
        for stage in self.stages(place)[:-1]:
            widths.append(widths[-1] if stage.depthwise and widths else next(given))
        return replace(bare, widths=tuple(widths))

    def ranks_of(self, form: ConvSequence, place: Place) -> tuple[int, ...]:
        """Inverse of ``sequence``."""
        kept = [w for w, s in zip(form.widths, self.stages(place)[:-1], strict=True) if not s.depthwise]
        return tuple(kept)


Offered = tuple[tuple[int, int], float]
"""MACs and weights, and the share of the energy that is held."""


@lru_cache(maxsize=1024)
def _without_ranks(form: Form, place: Place) -> ConvSequence:
    """What is the same at all ranks: alternatives are asked for by the dozen."""
    if place.linear and not form.linear:
        raise ValueError(f"{place.name}: a linear layer has no form {form.name!r}")
    row = form.stages(place)
    counts = []
    size = place.input_size
    for stage in row:
        size = out_size(size, stage.kernel, stage.stride, stage.padding, stage.dilation)
        counts.append(place.positions * math.prod(size))
    taps = [math.prod(s.kernel) for s in row]
    depthwise = tuple(s.depthwise for s in row)
    return ConvSequence(
        form.name,
        macs=tuple(n * k for n, k in zip(counts, taps, strict=True)),
        params=tuple(taps),
        bytes=tuple(n * place.itemsize for n in counts[:-1]),
        depthwise=depthwise if any(depthwise) else (),
    )


def dense_sequence(place: Place) -> ConvSequence:
    """The layer as it is: the last of all alternatives."""
    taps = math.prod(place.kernel)
    return ConvSequence("dense", macs=(place.positions * math.prod(place.output_size) * taps,), params=(taps,))


def cost_of(place: Place, form: ConvSequence) -> tuple[int, int]:
    """MACs and weights of a row between the layer's own widths."""
    ends = [place.in_channels, *form.widths, place.out_channels]
    alone = form.depthwise or (False,) * len(form.macs)
    pairs = [b if single else a * b for (a, b), single in zip(itertools.pairwise(ends), alone, strict=True)]
    return (
        sum(m * n for m, n in zip(form.macs, pairs, strict=True)),
        sum(p * n for p, n in zip(form.params, pairs, strict=True)),
    )


STEPS = 14  # sizes of each form that are looked at, in equal ratios from rank 1 to whole


def snap(rank: float, full: int, multiple_of: int) -> int:
    """The nearest allowed rank: a multiple, at least one of them, or everything."""
    return min(max(round(rank / multiple_of), 1) * multiple_of, full)


def sizes(full: int, multiple_of: int) -> list[int]:
    """Ranks from one to ``full``, rising."""
    return sorted({snap(r, full, multiple_of) for r in np.geomspace(1, full, STEPS)})


def folded_kernel(kernel: Sizes) -> tuple[int, int]:
    """The same of its kernel."""
    return (1, kernel[0]) if len(kernel) == 1 else (kernel[0], math.prod(kernel[1:]))


def shape_of(place: Place) -> tuple[int, int, int, int]:
    """Of the weight, folded."""
    return (place.out_channels, place.in_channels, *folded_kernel(place.kernel))
