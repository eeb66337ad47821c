"""Tucker-2 and TT-Tucker of a convolution, and the one way from a weight to the stages of any form.

A weight ``W`` of shape ``(O, I, kh, kw)`` is projected onto the ``b`` leading directions of its output unfolding and the ``a``
of its input unfolding (HOSVD, De Lathauwer et al. 2000), which alternate to a better pair where asked (HOOI):

- ``tucker``: ``W ~ G x_out B x_in A`` with ``B (O, b)``, ``A (I, a)`` orthonormal and the core ``G (b, a, kh, kw)``;
- ``tt``: the core, read as ``(a*kh, kw*b)``, is split once more by a truncated SVD of rank ``t`` (TT-SVD, Oseledets 2011).

The bases are eigenvectors of Gram matrices, never singular vectors of long unfoldings: for 64 filters of 576 weights that is
a 64 x 64 problem.  A projection onto an orthonormal basis is exact whatever the basis, so that squaring the spectrum costs
nothing but the order of directions that hardly matter.  Everything runs on the device and in the dtype of the weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from espalier.forms.svd import stage_weights, to_matrix

Bases = tuple[Tensor, Tensor]
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
    weight: Tensor, ranks: tuple[int, int], *, sweeps: int = 3, start: Bases | None = None
) -> tuple[Tensor, Bases]:
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


def tt_svd(tensor: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """Tensor train of any tensor: cores ``(r_i, n_i, r_i+1)`` with ``r_0 = r_d = 1`` and ``ranks`` between (Oseledets 2011).

    A linear layer as two factors is the case of a matrix, ``tt_svd(weight, [r])``; a train of more cores is no row of plain
    layers, so no form is made of it.
    """
    if len(ranks) != tensor.ndim - 1 or min(ranks, default=1) < 1:
        raise ValueError(
            f"tt_svd: a tensor of {tensor.ndim} dimensions takes {tensor.ndim - 1} ranks, got {list(ranks)}"
        )
    cores, rest, before = [], tensor, 1
    for size, rank in zip(tensor.shape[:-1], ranks, strict=True):
        matrix = rest.reshape(before * size, -1)
        rank = min(rank, *matrix.shape)
        left, rest = truncated(matrix, rank)
        if matrix.shape[0] > matrix.shape[1]:  # the orthonormal factor goes left, whichever is shorter
            left, mix = torch.linalg.qr(left)
            rest = mix @ rest
        cores.append(left.reshape(before, size, rank))
        before = rank
    return [*cores, rest.reshape(before, tensor.shape[-1], 1)]


# -- any form


@dataclass(frozen=True)
class Factors:
    """One layer in one form: the weights of its stages, and what a later fit may begin from."""

    form: str
    weights: tuple[Tensor, ...]  # one per stage, first to last, (out, in, kh, kw) or (out, in)
    bases: Bases | None = None


def factorise(
    weight: Tensor, form: str, ranks: Sequence[int], *, sweeps: int = 3, start: Bases | None = None
) -> Factors:
    """The stages of ``form`` with ``ranks`` that come closest to ``weight``, ``(O, I, kh, kw)`` or ``(O, I)``.

    ``channel`` and ``spatial`` are best of all by Eckart and Young; the others as good as HOOI makes them.  All stages have
    the same norm, so that one learning rate suits them.
    """
    work = weight.detach()
    if work.dtype not in (torch.float32, torch.float64):
        work = work.float()
    if form in ("channel", "spatial"):
        left, right = truncated(to_matrix(work, form), ranks[0])
        stages, bases = stage_weights(left, right.mT.contiguous(), work.shape, form), None
    elif form in ("tucker", "tt"):
        core, bases = tucker2(work, (ranks[0], ranks[-1]), sweeps=sweeps, start=start)
        middle = [core] if form == "tucker" else list(split_core(core, ranks[1]))
        inner, outer = bases
        stages = [inner.mT[:, :, None, None], *middle, outer[:, :, None, None]]
    else:
        raise ValueError(f"form {form!r} has no factors; choose channel, spatial, tucker or tt")
    return Factors(form, tuple(s.to(weight.dtype) for s in _balanced(stages)), bases)


def _balanced(stages: Sequence[Tensor]) -> list[Tensor]:
    norms = [float(torch.linalg.vector_norm(s)) for s in stages]
    if min(norms) == 0 or not all(map(math.isfinite, norms)):
        return [s.clone() for s in stages]
    mean = math.exp(math.fsum(map(math.log, norms)) / len(norms))
    return [s * (mean / n) for s, n in zip(stages, norms, strict=True)]


def compose(factors: Factors) -> Tensor:
    """The weight that the stages amount to, ``(O, I, kh, kw)`` or ``(O, I)``."""
    whole, *rest = factors.weights
    for stage in rest:
        if stage.ndim == 2:
            whole = stage @ whole
            continue
        # Along each axis one of the two has length 1: convolving them is an outer product.
        outputs, (kh, kw) = stage.shape[0], (stage.shape[2] * whole.shape[2], stage.shape[3] * whole.shape[3])
        left = stage.permute(0, 2, 3, 1).reshape(-1, stage.shape[1])  # (o*H*W, c)
        product = (left @ whole.reshape(whole.shape[0], -1)).reshape(outputs, *stage.shape[2:], *whole.shape[1:])
        whole = product.permute(0, 3, 1, 4, 2, 5).reshape(outputs, whole.shape[1], kh, kw)
    return whole
