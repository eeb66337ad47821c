"""Truncation that knows the data: directions of a weight count by how strongly the layer's inputs use them.

With ``C = E[x x^T]`` of the vectors ``x`` that a matrix ``M`` is applied to, ``E|M x - M' x|^2 = |(M - M') C^(1/2)|_F^2``, so
the best ``M'`` of rank ``r`` is the truncated singular value decomposition of ``M C^(1/2)`` times ``C^(-1/2)`` (Eckart & Young
1936).  Sources: the same idea in Zhang et al. 2016 (channel form), SVD-LLM (arXiv 2403.07378) and BALF (arXiv 2509.25136).

``x`` is what the first stage of the form reads at one position: a patch of ``I * kh * kw`` numbers for ``channel``, where the
formula is exact, and of ``I * kw`` for ``spatial``, where what two rows of the kernel make of neighbouring patches is taken as
uncorrelated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espalier.copies import device_of
from espalier.forms import Place
from espalier.forms.sequences import Stage, stages
from espalier.forms.svd import svd
from espalier.methods.scoring import modes_kept
from espalier.tasks import called, to_device


def input_moments(
    model: nn.Module, places: Mapping[str, Place], forms: Mapping[str, str], batches: Iterable[tuple[Tensor, Any]]
) -> dict[str, Tensor]:
    """``E[x x^T]``, float64 on the CPU, ``(n, n)`` for an ``(m, n)`` matrix, of every layer in ``places`` in its form.

    A running sum over batches, a few images at a time: no activation outlives the layer's call.  The model runs in eval mode.

    Raises: ValueError if there is no batch.
    """
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(places, 0)

    def listen(name: str) -> Any:
        stage, linear = stages(places[name], forms[name])[0], places[name].linear

        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().float()
            for part in (x.reshape(-1, x.shape[-1]),) if linear else x.split(_images_at_once(x, stage)):
                rows = part if linear else _patches(part, stage)
                gram = rows.T @ rows
                sums[name] = gram.double() + sums[name] if name in sums else gram.double()
                counts[name] += len(rows)

        return hook

    hooks = [model.get_submodule(n).register_forward_pre_hook(listen(n)) for n in places]
    device = device_of(model)
    try:
        with modes_kept(model), torch.no_grad():
            model.eval()
            for x, _ in batches:
                called(model, to_device(x, device))
    finally:
        for hook in hooks:
            hook.remove()
    if places and not sums:
        raise ValueError("there are no batches to measure the inputs of the layers with")
    return {n: (total / max(counts[n], 1)).cpu() for n, total in sums.items()}


def _patches(x: Tensor, stage: Stage) -> Tensor:
    """What the stage reads at every position of every image; rows of ``(I * kh * kw)`` in the order of its weight."""
    if len(stage.kernel) != 2:
        x = F.pad(x, [p for amount in reversed(stage.padding) for p in (amount, amount)])
        for axis, (k, s, d) in enumerate(zip(stage.kernel, stage.stride, stage.dilation, strict=True), 2):
            x = x.unfold(axis, (k - 1) * d + 1, s)[..., ::d]
        positions = range(2, 2 + len(stage.kernel))  # kernel positions are the axes behind them
        return x.movedim(1, 1 + len(positions)).flatten(0, len(positions)).flatten(1)
    unfolded = F.unfold(x, stage.kernel, dilation=stage.dilation, padding=stage.padding, stride=stage.stride)
    return unfolded.transpose(1, 2).reshape(-1, unfolded.shape[1])


def _images_at_once(x: Tensor, stage: Stage) -> int:
    numbers = x[0].numel() * math.prod(stage.kernel)
    return max(1, AT_ONCE // numbers)


def whitened_svd(matrix: Tensor, moment: Tensor, *, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """``U``, falling ``s`` and ``V`` with ``matrix = U diag(s) V^T``; the first ``r`` are the best for inputs of ``moment``.

    ``s_i^2`` is the energy that triplet ``i`` adds to the output.  ``U`` is orthonormal, ``V`` in the metric of ``moment``.
    Directions that the inputs never use are damped by ``DAMPING`` of the mean: their weight must not come back as a huge ``V``.

    Raises: ValueError naming the layer ``name`` if there is no finite result.
    """
    if not bool(moment.isfinite().all()):
        raise ValueError(
            f"{name}: its inputs are not finite on the calibration images; look at the images and the weights"
        )
    squares, basis = torch.linalg.eigh(moment.double().cpu())
    squares = squares.clamp_min(0.0)
    mean = float(squares.mean())
    roots = (squares + DAMPING * (mean if mean > 0 else 1.0)).sqrt()
    u, s, v = svd(matrix.double().cpu() @ basis * roots, name=name)
    v = basis @ (v / roots[:, None])
    return u.to(matrix), s.to(matrix), v.to(matrix)


AT_ONCE = 1 << 24  # numbers of unfolded patches that are held at a time
DAMPING = 1e-3
