"""Kernel shapes: a layer whose kernel is one rectangle of its positions, the same for all filters.

A part of a padded kernel is a smaller kernel whose padding may differ between the two ends: rows ``a..b`` of ``k``, padded by
``p`` and spread by ``d``, see ``p - a*d`` rows before the image and ``p - (k - 1 - b)*d`` behind it.  The output keeps its
size, whatever the stride.  Where both ends agree the layer stays a plain convolution, and those rectangles are preferred.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from espalier.carving import Kept, carve, put_in_place
from espalier.forms.places import Place
from espalier.graph import ConvSequence
from espalier.layers import PartConv2d


@dataclass(frozen=True)
class Rectangle:
    """Rows ``top..bottom`` and columns ``left..right`` of a kernel, both ends included."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def size(self) -> tuple[int, int]:
        return self.bottom - self.top + 1, self.right - self.left + 1

    @property
    def area(self) -> int:
        return self.size[0] * self.size[1]

    def mask(self, kernel: tuple[int, int]) -> np.ndarray:
        """True inside, shape ``kernel``."""
        inside = np.zeros(kernel, dtype=bool)
        inside[self.top : self.bottom + 1, self.left : self.right + 1] = True
        return inside

    def __str__(self) -> str:
        return f"{self.size[0]}x{self.size[1]}"


def rectangles(kernel: tuple[int, int]) -> list[Rectangle]:
    """Every rectangle in a kernel."""
    spans = [[(a, b) for a in range(n) for b in range(a, n)] for n in kernel]
    return [Rectangle(*rows, *columns) for rows in spans[0] for columns in spans[1]]


def paddings(
    rectangle: Rectangle, kernel: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """What the convolution pads at both ends, and what is padded (or cropped) before: left, right, top, bottom."""
    spans = ((rectangle.top, rectangle.bottom), (rectangle.left, rectangle.right))
    ends = [
        (p - first * d, p - (k - 1 - last) * d)
        for (first, last), k, p, d in zip(spans, kernel, padding, dilation, strict=True)
    ]
    (above, below), (before, behind) = ends
    rows, columns = (max(0, min(pads)) for pads in ends)
    return (rows, columns), (before - columns, behind - columns, above - rows, below - rows)


def rectangle_of(small: nn.Conv2d, dense: nn.Conv2d) -> Rectangle:
    """The part of the kernel of ``dense`` that ``cut_kernel`` left in ``small``: the inverse of ``paddings``."""
    left, _, top, _ = small.shift if isinstance(small, PartConv2d) else (0, 0, 0, 0)
    ends = zip(padding_of(small), (top, left), padding_of(dense), pair(dense.dilation), strict=True)
    row, column = ((before - own - extra) // d for own, extra, before, d in ends)
    height, width = pair(small.kernel_size)
    return Rectangle(row, row + height - 1, column, column + width - 1)


def _paddings(rectangle: Rectangle, place: Place) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    return paddings(rectangle, pair(place.kernel), pair(place.padding), pair(place.dilation))


def shapes(place: Place) -> list[list[Rectangle]]:
    """Per option the rectangles it stands for: all of one area, only those that need no uneven padding if there
    are any; the whole kernel last."""
    by_area: dict[int, list[Rectangle]] = {}
    for rectangle in rectangles(pair(place.kernel)):
        by_area.setdefault(rectangle.area, []).append(rectangle)
    options = []
    for _, found in sorted(by_area.items()):
        even = [r for r in found if not any(_paddings(r, place)[1])]
        options.append(even or found)
    return options


def shape_sequence(place: Place, option: list[Rectangle]) -> ConvSequence:
    """What the rectangles of one option cost: all the same, but for the padded copy, of which the largest counts."""
    copies = 0
    for rectangle in option:
        left, right, top, bottom = _paddings(rectangle, place)[1]
        if left or right or top or bottom:
            h, w = place.input_size[0] + top + bottom, place.input_size[1] + left + right
            copies = max(copies, place.positions * h * w * place.itemsize)
    area = option[0].area
    outputs = place.positions * place.output_size[0] * place.output_size[1]
    name = "dense" if area == place.kernel[0] * place.kernel[1] else "/".join(sorted({str(r) for r in option}))
    return ConvSequence(name, macs=(outputs * area,), params=(area,), copies=copies)


def cut_kernel(
    model: nn.Module, name: str, rectangle: Rectangle, *, optimizer: torch.optim.Optimizer | None = None
) -> Kept:
    """Leave only ``rectangle`` of the kernel of ``name``, once, in place: the same function if the rest was zero.

    The state of ``optimizer`` is cut along.  Returns what stayed, as ``carve`` takes it.
    """
    conv = model.get_submodule(name)
    assert isinstance(conv, nn.Conv2d) and conv.groups == 1 and conv.padding_mode == "zeros", name
    kernel, padding = pair(conv.kernel_size), padding_of(conv)
    even, shift = paddings(rectangle, kernel, padding, pair(conv.dilation))
    assert not (isinstance(conv, PartConv2d) and any(conv.shift)), f"{name}: its kernel was cut before"
    conv.padding = even
    if any(shift) and not isinstance(conv, PartConv2d):
        part = PartConv2d.of(conv)
        put_in_place(model, conv, part)
        conv = part
    if isinstance(conv, PartConv2d):
        conv.shift = shift
    rows, columns = np.arange(rectangle.top, rectangle.bottom + 1), np.arange(rectangle.left, rectangle.right + 1)
    kept: Kept = {f"{name}.weight": {2: rows, 3: columns}}
    conv.kernel_size = rectangle.size
    carve(model, kept, optimizer=optimizer)
    return kept


def pair(value: tuple[int, ...]) -> tuple[int, int]:
    """Two numbers, for the type checker."""
    return int(value[0]), int(value[1])


def padding_of(conv: nn.Conv2d) -> tuple[int, int]:
    """Padding in numbers; ``find_places`` has seen to it that both ends agree."""
    if conv.padding == "valid":
        return 0, 0
    if conv.padding == "same":
        reach = [d * (k - 1) // 2 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
        return reach[0], reach[1]
    return int(conv.padding[0]), int(conv.padding[1])
