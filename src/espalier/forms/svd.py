"""The two-stage forms, ``channel`` and ``spatial``, as a product of two matrices.

A weight ``W`` of shape ``(O, I, kh, kw)`` is read as a matrix ``M = L R^T``, one column of ``L`` and ``R`` per rank:

- ``channel``: ``L`` is ``(O, r)``, ``R`` is ``(I*kh*kw, r)``; stages kh x kw (I -> r), 1x1 (r -> O);
- ``spatial``: ``L`` is ``(O*kh, r)``, ``R`` is ``(I*kw, r)``; stages 1 x kw (I -> r), kh x 1 (r -> O).

A linear weight ``(O, I)`` is its own matrix and has the form ``channel``.  The error of the best rank-r matrix is the energy of
the singular values that are left out (Eckart & Young 1936).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_matrix(weight: Tensor, form: str) -> Tensor:
    """``(O, I, kh, kw)`` or ``(O, I)`` to ``(m, n)``; a view where the memory allows it."""
    if form == "channel":
        return weight.reshape(weight.shape[0], -1)
    outputs, inputs, height, width = weight.shape
    return weight.permute(0, 2, 1, 3).reshape(outputs * height, inputs * width)


def from_matrix(matrix: Tensor, shape: Sequence[int], form: str) -> Tensor:
    """Inverse of ``to_matrix``; ``shape`` is that of the weight."""
    if form == "channel":
        return matrix.reshape(tuple(shape))
    outputs, inputs, height, width = shape
    return matrix.view(outputs, height, inputs, width).permute(0, 2, 1, 3)


def stage_weights(left: Tensor, right: Tensor, shape: Sequence[int], form: str) -> list[Tensor]:
    """Weights of the two stages, first to last, for ``sequential``: ``left`` is ``(m, r)``, ``right`` is ``(n, r)``."""
    rank = left.shape[1]
    if len(shape) == 2:
        return [right.T, left]
    outputs, inputs, height, width = shape
    if form == "channel":
        turned = right.T.contiguous()  # as a matrix: copied by blocks, which a permuted weight would not be
        return [turned.view(rank, inputs, height, width), left.reshape(outputs, rank, 1, 1)]
    # The axis of length 1 comes in before the permutation: behind it, its stride would look like that of channels_last, which
    # the weight is not, and torch's plain convolution refuses gradients in such a layout.
    first = right.view(inputs, 1, width, rank).permute(3, 0, 1, 2)  # (r, I, 1, kw)
    second = left.view(outputs, height, 1, rank).permute(0, 3, 1, 2)  # (O, r, kh, 1)
    return [first, second]


def svd(matrix: Tensor, *, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """``U (m, k)``, ``s (k,)`` falling, ``V (n, k)`` with ``matrix = U diag(s) V^T``, in the dtype of ``matrix``.

    Computed on the CPU, which is faster with many small matrices, and returned to where ``matrix`` is.  Where float32 fails
    it is tried in float64.  ``ValueError`` naming the layer ``name`` if there is no finite result.
    """
    whole = matrix.cpu()
    for dtype in (torch.float32, torch.float64):
        if dtype.itemsize < matrix.dtype.itemsize:
            continue
        try:
            u, s, vh = torch.linalg.svd(whole.to(dtype), full_matrices=False)
        except RuntimeError:  # torch.linalg.LinAlgError is one: NaN or Inf inside, or no convergence
            continue
        if bool(torch.isfinite(s).all() and torch.isfinite(u).all() and torch.isfinite(vh).all()):
            return u.to(matrix), s.to(matrix), vh.mH.to(matrix)
    raise ValueError(
        f"{name}: its weight has no singular value decomposition; it holds NaN or infinite numbers "
        f"({int((~torch.isfinite(whole)).sum())} of {matrix.numel()}). "
        "Lower the learning rate, or go back to the last checkpoint"
    )
