"""The singular value decomposition of one matrix, with care."""

from __future__ import annotations

import torch
from torch import Tensor


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
