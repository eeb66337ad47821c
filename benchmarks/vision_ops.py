"""torchvision with ``nms`` and ``roi_align`` in plain PyTorch where its own do not load: a CUDA wheel beside a CPU torch."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from espalier.optional import import_torchvision

_libraries: list[torch.library.Library] = []


def torchvision() -> ModuleType:
    """torchvision; detectors run, slowly where the operators are ours."""
    found = import_torchvision()
    extension = importlib.import_module("torchvision.extension")
    if not extension._has_ops():
        _declare()
        for module in (extension, importlib.import_module("torchvision.ops.roi_align")):
            module._has_ops = there  # type: ignore[attr-defined]
    return found


def there() -> bool:
    """A function and no lambda: exporters script what calls it."""
    return True


def _declare() -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define(
        "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
        "int sampling_ratio, bool aligned) -> Tensor"
    )
    library.impl("nms", nms, "CPU")
    library.impl("roi_align", roi_align, "CPU")
    library.impl("roi_align", lambda x, rois, _, h, w, *rest: x.new_empty(len(rois), x.shape[1], h, w), "Meta")
    torch.library.register_autograd("torchvision::roi_align", _backward, setup_context=_keep, lib=library)
    _libraries.append(library)


def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Greedy suppression, best score first: indices of the boxes that stay."""
    area = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)
    order, kept = scores.argsort(descending=True), []
    while len(order):
        best, order = order[0], order[1:]
        kept.append(best)
        low, high = torch.maximum(boxes[best, :2], boxes[order, :2]), torch.minimum(boxes[best, 2:], boxes[order, 2:])
        shared = (high - low).clamp(min=0).prod(1)
        order = order[shared <= threshold * (area[best] + area[order] - shared)]
    return torch.stack(kept) if kept else order


def roi_align(x: Tensor, rois: Tensor, scale: float, height: int, width: int, ratio: int, aligned: bool) -> Tensor:
    """``ratio`` x ``ratio`` bilinear samples a bin, averaged, (rois, channels, height, width): a product along either side.

    With a ``ratio`` of 0 or less as many as a bin has positions.
    """
    begin, end = (rois[:, 1:] * scale - 0.5 * aligned).reshape(-1, 2, 2).unbind(1)  # (rois, xy)
    size = end - begin if aligned else (end - begin).clamp(min=1)
    samples = (size.detach() / size.new_tensor([width, height])).ceil().clamp(min=1).long()
    samples = samples if ratio <= 0 else torch.full_like(samples, ratio)
    made = x.new_empty(len(rois), x.shape[1], height, width)
    for image, wide, high in torch.cat([rois[:, :1].long(), samples], 1).unique(dim=0).tolist():
        alike = (rois[:, 0] == image) & (samples == samples.new_tensor([wide, high])).all(1)
        for some in alike.nonzero().flatten().split(64):
            across = _weights(begin[some, 0], size[some, 0], width, wide, x.shape[3])
            down = _weights(begin[some, 1], size[some, 1], height, high, x.shape[2])
            rows = torch.einsum("kph,chw->kcpw", down, x[image])
            made[some] = torch.einsum("kcpw,kqw->kcpq", rows, across)
    return made


def _weights(begin: Tensor, size: Tensor, bins: int, ratio: int, side: int) -> Tensor:
    """How much every position along a side has in every bin, (rois, bins, side)."""
    samples = (torch.arange(bins * ratio, dtype=begin.dtype, device=begin.device) + 0.5) / (bins * ratio)
    at = begin[:, None] + samples * size[:, None]
    inside = (at >= -1) & (at <= side)
    near = 1 - (at.clamp(0, side - 1)[..., None] - torch.arange(side, device=begin.device)).abs()
    return (near.clamp(min=0) * inside[..., None]).unflatten(1, (bins, ratio)).mean(2)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.options = inputs[2:]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, rois = ctx.saved_tensors
    if not len(rois):
        return (torch.zeros_like(x), *[None] * 6)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return (*torch.autograd.grad(roi_align(x, rois, *ctx.options), x, gradient), *[None] * 6)
