"""torchvision with ``nms`` and ``roi_align`` in plain PyTorch where its own do not load: a CUDA wheel beside a CPU torch."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from espalier.optional import import_torchvision

_libraries: list[torch.library.Library] = []


def torchvision() -> ModuleType:
    """torchvision; detectors run, slowly where the operators are ours."""
    found = import_torchvision()
    extension = __import__("importlib").import_module("torchvision.extension")
    if not extension._has_ops():
        _declare()
        extension._has_ops = lambda: True
    return found


def _declare() -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define(
        "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
        "int sampling_ratio, bool aligned) -> Tensor"
    )
    library.impl("nms", nms, "CPU")
    library.impl("roi_align", roi_align, "CPU")
    library.impl("roi_align", lambda x, rois, _, h, w, *rest: x.new_empty(len(rois), x.shape[1], h, w), "Meta")
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
    from torchvision.ops.roi_align import _roi_align

    made: Any = _roi_align.__wrapped__ if hasattr(_roi_align, "__wrapped__") else _roi_align
    return made(x, rois, scale, height, width, ratio, aligned)
