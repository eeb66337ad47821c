"""Forms as rows of plain convolutions: their geometry, what they cost, and how to build them.

==============  =======================================================  ==========
form            stages of a (O, I, kh, kw) convolution                   ranks
==============  =======================================================  ==========
``channel``     kh x kw: I -> r;  1x1: r -> O                            r
``spatial``     1 x kw: I -> r;  kh x 1: r -> O                          r
``tucker``      1x1: I -> a;  kh x kw: a -> b;  1x1: b -> O              a, b
``tt``          1x1: I -> a;  kh x 1: a -> t;  1 x kw: t -> b;  1x1: b -> O   a, t, b
==============  =======================================================  ==========

A linear layer has ``channel`` only.  Sources: Zhang et al. 2016 (channel), Jaderberg et al. 2014 (spatial), Kim et al. 2016
(Tucker-2); TT-Tucker splits the core of Tucker-2 once more.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from espalier.forms.places import Place, out_size
from espalier.graph import ConvSequence

Pair = tuple[int, int]


@dataclass(frozen=True)
class Stage:
    """Geometry of one convolution of a sequence; how many channels it has is the sequence's business."""

    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)


def _one(place: Place) -> Stage:
    return Stage((1, 1))


def _whole(place: Place) -> Stage:
    return Stage(place.kernel, place.stride, place.padding, place.dilation)


def _rows(place: Place) -> Stage:
    """Along the width only: 1 x kw."""
    return Stage((1, place.kernel[1]), (1, place.stride[1]), (0, place.padding[1]), (1, place.dilation[1]))


def _columns(place: Place) -> Stage:
    """Along the height only: kh x 1."""
    return Stage((place.kernel[0], 1), (place.stride[0], 1), (place.padding[0], 0), (place.dilation[0], 1))


FORMS: dict[str, tuple[Callable[[Place], Stage], ...]] = {
    "channel": (_whole, _one),
    "spatial": (_rows, _columns),
    "tucker": (_one, _whole, _one),
    "tt": (_one, _columns, _rows, _one),
}
"""Form -> its stages, first to last."""


def stages(place: Place, form: str) -> tuple[Stage, ...]:
    """Geometry of every stage of ``form`` at ``place``."""
    if form not in FORMS:
        raise ValueError(f"form {form!r} does not exist; choose one of {', '.join(FORMS)}")
    if place.linear and form != "channel":
        raise ValueError(f"{place.name}: a linear layer has the form 'channel' only, not {form!r}")
    return tuple(make(place) for make in FORMS[form])


def sequence(place: Place, form: str, ranks: Sequence[int]) -> ConvSequence:
    """What ``form`` with ``ranks`` costs at ``place``, for ``with_alternatives``."""
    bare = _without_ranks(place, form)
    count = len(bare.macs) - 1
    if len(ranks) != count or min(ranks) < 1:
        raise ValueError(f"{place.name}: form {form!r} takes {count} ranks of 1 or more, got {list(ranks)}")
    return replace(bare, widths=tuple(int(r) for r in ranks))


@lru_cache(maxsize=1024)
def _without_ranks(place: Place, form: str) -> ConvSequence:
    """What is the same at all ranks: alternatives are asked for by the dozen."""
    row = stages(place, form)
    sizes = []
    size = place.input_size
    for stage in row:
        size = out_size(size, stage.kernel, stage.stride, stage.padding, stage.dilation)
        sizes.append(place.positions * math.prod(size))
    taps = [math.prod(s.kernel) for s in row]
    return ConvSequence(
        form,
        macs=tuple(n * k for n, k in zip(sizes, taps, strict=True)),
        params=tuple(taps),
        bytes=tuple(n * place.itemsize for n in sizes[:-1]),
    )


def dense_sequence(place: Place) -> ConvSequence:
    """The layer as it is: the last option of every group of alternatives."""
    taps = math.prod(place.kernel)
    return ConvSequence("dense", macs=(place.positions * math.prod(place.output_size) * taps,), params=(taps,))


def cost_of(place: Place, form: ConvSequence) -> tuple[int, int]:
    """MACs and weights of a sequence between the layer's own widths."""
    ends = [place.in_channels, *form.widths, place.out_channels]
    pairs = [a * b for a, b in itertools.pairwise(ends)]
    return (
        sum(m * n for m, n in zip(form.macs, pairs, strict=True)),
        sum(p * n for p, n in zip(form.params, pairs, strict=True)),
    )


def sequential(place: Place, form: str, weights: Sequence[Tensor], bias: Tensor | None) -> nn.Sequential:
    """Plain layers that compute ``form``: one weight per stage, ``(out, in, kh, kw)`` or ``(out, in)``; bias at the end."""
    layers: list[nn.Module] = []
    row = stages(place, form)
    for number, (stage, weight) in enumerate(zip(row, weights, strict=True)):
        last = number == len(row) - 1
        options = {"bias": last and bias is not None, "device": weight.device, "dtype": weight.dtype}
        layer: nn.Conv2d | nn.Linear
        if place.linear:
            layer = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], **options)
        else:
            layer = nn.utils.skip_init(
                nn.Conv2d, weight.shape[1], weight.shape[0], stage.kernel,
                stride=stage.stride, padding=stage.padding, dilation=stage.dilation, **options,
            )  # fmt: skip
        with torch.no_grad():
            layer.weight.copy_(weight.reshape(layer.weight.shape))
            if layer.bias is not None:
                assert bias is not None
                layer.bias.copy_(bias)
        layers.append(layer)
    return nn.Sequential(*layers)


@torch.no_grad()
def composed(row: nn.Sequential, like: nn.Conv2d | nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weight and bias, in float64, of the one layer of the geometry of ``like`` that computes what ``row`` computes.

    They are read from its answers to unit inputs, one per element of a filter: nothing is assumed about how ``row`` was made.
    """
    row = copy.deepcopy(row).double().cpu()
    if isinstance(like, nn.Linear):
        inputs = int(row[0].in_features)  # type: ignore[arg-type]
        units = torch.eye(inputs, dtype=torch.float64)
        bias = row(torch.zeros(1, inputs, dtype=torch.float64))[0]
        weight = (row(units) - bias).T
    else:
        for stage in row:
            stage.padding = (0, 0)  # type: ignore[assignment]
        (kh, kw), (dh, dw) = like.kernel_size, like.dilation
        size = ((kh - 1) * dh + 1, (kw - 1) * dw + 1)
        inputs, outputs = int(row[0].in_channels), int(row[-1].out_channels)  # type: ignore[arg-type]
        bias = row(torch.zeros(1, inputs, *size, dtype=torch.float64)).reshape(-1)
        weight = torch.empty(outputs, inputs, kh, kw, dtype=torch.float64)
        for channel in range(inputs):
            units = torch.zeros(kh, kw, inputs, *size, dtype=torch.float64)
            for i, j in itertools.product(range(kh), range(kw)):
                units[i, j, channel, i * dh, j * dw] = 1.0
            answers = row(units.flatten(0, 1)).reshape(kh, kw, outputs)
            weight[:, channel] = (answers - bias).permute(2, 0, 1)
    if like.bias is None and float(bias.abs().max()) != 0.0:
        raise ValueError("a row of layers adds a bias that the layer it stands for does not have")
    return weight, None if like.bias is None else bias
