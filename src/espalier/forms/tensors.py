"""Tucker-2 and tensor trains of the weight of a convolution, through eigenvectors of Gram matrices.

The bases are eigenvectors of Gram matrices, never singular vectors of long unfoldings: for 64 filters of 576 weights that is
a 64 x 64 problem.  A projection onto an orthonormal basis is exact whatever the basis, so that squaring the spectrum costs
nothing but the order of directions that hardly matter.  Everything runs on the device and in the dtype of the weight.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
"""``A (I, a)`` and ``B (O, b)``, orthonormal columns."""


def leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``(..., rank)``, falling, of ``matrix matrix^T`` and their vectors ``(..., m, rank)``; batched."""
    values, vectors = torch.linalg.eigh(matrix @ matrix.mT)
    return values.flip(-1)[..., :rank].clamp_min(0), vectors.flip(-1)[..., :rank]


def spectrum(matrix: Tensor) -> Tensor:
    """Squared singular values ``(..., min(m, n))``, falling; batched."""
    short = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT
    return torch.linalg.eigvalsh(short @ short.mT).flip(-1).clamp_min(0)


def truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best ``L (m, r) R (r, n)`` of that rank; the orthonormal factor is on the shorter side."""
    if matrix.shape[0] <= matrix.shape[1]:
        basis = leading(matrix, rank)[1]
        return basis, basis.mT @ matrix
    basis = leading(matrix.mT, rank)[1]
    return matrix @ basis, basis.mT


def input_unfolding(weight: Tensor) -> Tensor:
    """``(..., O, I, kh, kw)`` to ``(..., I, O*kh*kw)``."""
    return weight.transpose(-4, -3).flatten(-3)


def output_unfolding(weight: Tensor) -> Tensor:
    """``(..., O, I, kh, kw)`` to ``(..., O, I*kh*kw)``."""
    return weight.flatten(-3)


def project_inputs(weight: Tensor, basis: Tensor) -> Tensor:
    """``(..., O, I, kh, kw)`` and ``(..., I, a)`` to ``(..., O, a, kh, kw)``."""
    return (basis.mT.unsqueeze(-3) @ weight.flatten(-2)).unflatten(-1, weight.shape[-2:])


def project_outputs(weight: Tensor, basis: Tensor) -> Tensor:
    """``(..., O, I, kh, kw)`` and ``(..., O, b)`` to ``(..., b, I, kh, kw)``."""
    return (basis.mT @ output_unfolding(weight)).unflatten(-1, weight.shape[-3:])


def tucker2(
    weight: Tensor, ranks: tuple[int, int], *, sweeps: int = 3, start: Pair | None = None
) -> tuple[Tensor, Pair]:
    """Core ``(b, a, kh, kw)`` and bases for ``ranks = (a, b)``.

    Without ``start`` the HOSVD, with it those bases (of an earlier, similar weight) are what HOOI begins from; it ends after
    ``sweeps``, or when a sweep adds less than 1e-5 of the energy.  ``sweeps=0`` is the plain HOSVD.
    """
    a, b = ranks
    if start is None or start[0].shape != (weight.shape[1], a) or start[1].shape != (weight.shape[0], b):
        inner = leading(input_unfolding(weight), a)[1]
        outer = leading(output_unfolding(weight), b)[1]
    else:
        inner, outer = start
    whole = (a, b) == (weight.shape[1], weight.shape[0])
    energy = -math.inf
    for _ in range(0 if whole else sweeps):
        inner = leading(input_unfolding(project_outputs(weight, outer)), a)[1]
        values, outer = leading(output_unfolding(project_inputs(weight, inner)), b)
        now = float(values.sum())
        if now - energy <= 1e-5 * now:
            break
        energy = now
    return project_outputs(project_inputs(weight, inner), outer), (inner, outer)


def split_core(core: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """TT-SVD of the core at the kh|kw cut: ``(t, a, kh, 1)`` and ``(b, t, 1, kw)``."""
    b, a, kh, kw = core.shape
    if not 1 <= rank <= min(a * kh, kw * b):
        raise ValueError(
            f"a core of shape {tuple(core.shape)} splits into ranks 1 to {min(a * kh, kw * b)}, not {rank}"
        )
    left, right = truncated(core.permute(1, 2, 3, 0).reshape(a * kh, kw * b), rank)
    first = left.reshape(a, kh, rank).permute(2, 0, 1).unsqueeze(3)
    return first, right.reshape(rank, kw, b).permute(2, 0, 1).unsqueeze(2)


def folded(weight: Tensor) -> Tensor:
    """``weight`` of any layer as ``(O, I, kh, kw)``."""
    if weight.ndim == 2:
        return weight[..., None, None]
    if weight.ndim == 3:
        return weight[:, :, None]
    return weight.flatten(3)


def rows_and_columns(weight: Tensor) -> Tensor:
    """``(O, I, kh, kw)`` to ``(O*kh, I*kw)``."""
    outputs, inputs, height, width = weight.shape
    return weight.permute(0, 2, 1, 3).reshape(outputs * height, inputs * width)
