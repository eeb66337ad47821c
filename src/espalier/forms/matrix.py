"""The two-stage forms, ``channel`` and ``spatial``, as a product of two matrices.

A weight ``W`` of shape ``(O, I, kh, kw)`` is read as a matrix ``M = L R^T``, one column of ``L`` and ``R`` per rank:

- ``channel``: ``L`` is ``(O, r)``, ``R`` is ``(I*kh*kw, r)``; stages kh x kw (I -> r), 1x1 (r -> O);
- ``spatial``: ``L`` is ``(O*kh, r)``, ``R`` is ``(I*kw, r)``; stages 1 x kw (I -> r), kh x 1 (r -> O).

A linear weight ``(O, I)`` is its own matrix and has the form ``channel``.  The error of the best rank-r matrix is the energy of
the singular values that are left out (Eckart & Young 1936).  Sources: Zhang et al. 2016 (channel), Jaderberg et al. 2014
(spatial).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np
from torch import Tensor

from espalier.forms.form import (
    Bases,
    Form,
    Offer,
    Offered,
    Stage,
    Wish,
    columns,
    folded_kernel,
    pointwise,
    rows,
    shape_of,
    sizes,
    whole,
)
from espalier.forms.places import Place
from espalier.forms.spectra import Spectra, held_by_rank
from espalier.forms.tensors import rows_and_columns, spectrum, truncated


class MatrixForm(Form):
    """A form that is the product of two matrices: DPRP trains it as its singular value decomposition."""

    @abstractmethod
    def matrix(self, weight: Tensor) -> Tensor:
        """``(O, I, ...)`` to ``(m, n)``; a view where the memory allows it."""

    @abstractmethod
    def weight(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        """Inverse of ``matrix``; ``shape`` is that of the weight."""

    @abstractmethod
    def size(self, shape: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of the matrix of a weight of ``shape``."""

    @abstractmethod
    def stage_weights(self, left: Tensor, right: Tensor, shape: Sequence[int]) -> list[Tensor]:
        """Weights of the two stages, first to last, for ``sequential``: ``left`` is ``(m, r)``, ``right`` is ``(n, r)``."""

    def full_rank(self, place: Place) -> int:
        return min(self.size(shape_of(place)))

    def decompose(
        self, weight: Tensor, ranks: Sequence[int], *, sweeps: int, start: Bases | None
    ) -> tuple[list[Tensor], Bases | None]:
        left, right = truncated(self.matrix(weight), ranks[0])
        return self.stage_weights(left, right.mT.contiguous(), weight.shape), None

    def offers(self, place: Place, spectra: Spectra, wish: Wish, *, known: Sequence[Offered]) -> Iterable[Offer]:
        shares = self.shares(spectra)
        for rank in sizes(len(shares) - 1, wish.multiple_of):
            yield float(shares[rank]), (rank,)

    def held(self, spectra: Spectra, ranks: Sequence[int]) -> float:
        return float(self.shares(spectra)[ranks[0]])

    def shares(self, spectra: Spectra) -> np.ndarray:
        """Share of the energy held by every rank from 0 on."""
        return held_by_rank(spectrum(self.matrix(spectra.weight)).double().cpu().numpy(), spectra.energy)


class Channel(MatrixForm):
    """kh x kw: I -> r;  1x1: r -> O."""

    name: ClassVar[str] = "channel"
    linear: ClassVar[bool] = True

    def possible(self, shape: Sequence[int]) -> bool:
        return True

    def stages(self, place: Place) -> tuple[Stage, ...]:
        return whole(place), pointwise(place)

    def shares(self, spectra: Spectra) -> np.ndarray:
        return spectra.channel

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.reshape(weight.shape[0], -1)

    def weight(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        return matrix.reshape(tuple(shape))

    def size(self, shape: Sequence[int]) -> tuple[int, int]:
        return shape[0], math.prod(shape[1:])

    def stage_weights(self, left: Tensor, right: Tensor, shape: Sequence[int]) -> list[Tensor]:
        if len(shape) == 2:
            return [right.T, left]
        turned = right.T.contiguous()  # as a matrix: copied by blocks, which a permuted weight would not be
        ones = (1,) * (len(shape) - 2)
        return [turned.view(left.shape[1], *shape[1:]), left.reshape(*left.shape, *ones)]


class Spatial(MatrixForm):
    """1 x kw: I -> r;  kh x 1: r -> O."""

    name: ClassVar[str] = "spatial"

    def possible(self, shape: Sequence[int]) -> bool:
        return min(shape[2:], default=1) > 1

    def stages(self, place: Place) -> tuple[Stage, ...]:
        return rows(place), columns(place)

    def shares(self, spectra: Spectra) -> np.ndarray:
        return spectra.spatial

    def matrix(self, weight: Tensor) -> Tensor:
        return rows_and_columns(weight.flatten(3))

    def weight(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        outputs, inputs, height, width = (*shape[:2], *folded_kernel(tuple(shape[2:])))
        found = matrix.view(outputs, height, inputs, width).permute(0, 2, 1, 3)
        return found if len(shape) == 4 else found.reshape(tuple(shape))

    def size(self, shape: Sequence[int]) -> tuple[int, int]:
        height, width = folded_kernel(tuple(shape[2:]))
        return shape[0] * height, shape[1] * width

    def stage_weights(self, left: Tensor, right: Tensor, shape: Sequence[int]) -> list[Tensor]:
        (outputs, inputs), rank = shape[:2], left.shape[1]
        height, width = folded_kernel(tuple(shape[2:]))
        # The axis of length 1 comes in before the permutation: behind it, its stride would look like that of channels_last,
        # which the weight is not, and torch's plain convolution refuses gradients in such a layout.
        first = right.view(inputs, 1, width, rank).permute(3, 0, 1, 2)  # (r, I, 1, kw)
        second = left.view(outputs, height, 1, rank).permute(0, 3, 1, 2)  # (O, r, kh, 1)
        if len(shape) == 4:
            return [first, second]
        rest = (1,) * (len(shape) - 3)
        return [first.reshape(rank, inputs, 1, *shape[3:]), second.reshape(outputs, rank, height, *rest)]
