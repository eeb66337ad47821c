"""Forms as rows of plain layers: how to build them, and what a row amounts to."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from espalier.forms.form import Stage
from espalier.forms.places import CONVOLUTIONS, Place
from espalier.forms.table import form_named
from espalier.graph import ConvSequence
from espalier.layers import FactorisedConv, FactorisedLinear


def stages(place: Place, form: str) -> tuple[Stage, ...]:
    """Geometry of every stage of ``form`` at ``place``."""
    return form_named(form).stages(place)


def sequence(place: Place, form: str, ranks: Sequence[int]) -> ConvSequence:
    """What ``form`` with ``ranks`` costs at ``place``, for ``with_alternatives``."""
    return form_named(form).sequence(place, ranks)


def sequential(place: Place, form: str, weights: Sequence[Tensor], bias: Tensor | None) -> nn.Sequential:
    """Plain layers that compute ``form``: one weight per stage, ``(out, in, ...)`` of any number of axes; bias at the end.

    The row answers for the layer in whose place it stands (``layers.FactorisedConv``).
    """
    made: list[nn.Module] = []
    row = stages(place, form)
    for number, (stage, weight) in enumerate(zip(row, weights, strict=True)):
        last = number == len(row) - 1
        options: dict[str, Any] = {
            "bias": last and bias is not None, "device": weight.device, "dtype": weight.dtype,
        }  # fmt: skip
        layer: Any
        if place.linear:
            layer = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], **options)
        else:
            layer = nn.utils.skip_init(
                CONVOLUTIONS[len(place.kernel)], weight.shape[0] if stage.depthwise else weight.shape[1], weight.shape[0],
                stage.kernel, stride=stage.stride, padding=stage.padding, dilation=stage.dilation,
                groups=weight.shape[0] if stage.depthwise else 1, **options,
            )  # fmt: skip
        with torch.no_grad():
            layer.weight.copy_(weight.reshape(layer.weight.shape))
            if layer.bias is not None:
                assert bias is not None
                layer.bias.copy_(bias)
        made.append(layer)
    if place.linear:
        return FactorisedLinear(*made)
    geometry = {
        "kernel_size": place.kernel, "stride": place.stride, "padding": place.padding, "dilation": place.dilation,
    }  # fmt: skip
    return FactorisedConv(*made, **geometry)


def blank(place: Place, form: ConvSequence, layer: Any) -> nn.Sequential:
    """The row that ``form`` is of ``layer``, which has the geometry of ``place`` and any widths: weights mean nothing."""
    ends = [layer.weight.shape[1], *form.widths, layer.weight.shape[0]]
    here = replace(place, in_channels=ends[0], out_channels=ends[-1])
    weights = [
        layer.weight.new_full((b, 1 if stage.depthwise else a, *(() if here.linear else stage.kernel)), BLANK)
        for stage, (a, b) in zip(stages(here, form.name), itertools.pairwise(ends), strict=True)
    ]
    return sequential(here, form.name, weights, layer.bias)


BLANK = 0.1  # zeros and numbers below the normal ones take another time


@torch.no_grad()
def composed(row: nn.Sequential, like: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias, in float64, of the one layer that computes what ``row`` computes: as wide, of the geometry of ``like``.

    They are read from its answers to unit inputs, one per element of a filter: nothing is assumed about how ``row`` was made.
    """
    row = copy.deepcopy(row).double().cpu()
    first: Any = row[0]
    if isinstance(like, nn.Linear):
        units = torch.eye(first.in_features, dtype=torch.float64)
        bias = row(torch.zeros(1, len(units), dtype=torch.float64))[0]
        weight = (row(units) - bias).T
    else:
        kernel, inputs = like.kernel_size, first.in_channels
        stage: Any
        for stage in row:
            stage.padding = (0,) * len(kernel)
        size = [(k - 1) * d + 1 for k, d in zip(kernel, like.dilation, strict=True)]
        bias = row(torch.zeros(1, inputs, *size, dtype=torch.float64)).reshape(-1)
        weight = torch.empty(len(bias), inputs, *kernel, dtype=torch.float64)
        taps = list(itertools.product(*map(range, kernel)))
        for channel in range(inputs):
            units = torch.zeros(len(taps), inputs, *size, dtype=torch.float64)
            for number, tap in enumerate(taps):
                units[(number, channel, *(t * d for t, d in zip(tap, like.dilation, strict=True)))] = 1.0
            answers = row(units).reshape(*kernel, len(bias))
            weight[:, channel] = (answers - bias).movedim(-1, 0)
    if like.bias is None and float(bias.abs().max()) != 0.0:
        raise ValueError("a row of layers adds a bias that the layer it stands for does not have")
    return weight, None if like.bias is None else bias
