"""Which layers can take another form, with the numbers that a form needs; what cannot is listed with the reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from espalier.graph.tracing import call_arguments, mode, private_copy


@dataclass(frozen=True)
class Place:
    """A convolution or linear layer and where it stands.  A linear layer is a 1x1 convolution on a 1x1 image."""

    name: str
    out_channels: int
    in_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    input_size: tuple[int, int]  # height and width of its input
    positions: int  # images, times rows for a linear layer that sees sequences: everything that multiplies the cost
    itemsize: int  # bytes of one activation
    linear: bool = False

    @property
    def output_size(self) -> tuple[int, int]:
        return out_size(self.input_size, self.kernel, self.stride, self.padding, self.dilation)


def out_size(
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[int, int]:
    """Height and width after a convolution."""
    h, w = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    )
    return h, w


def find_places(model: nn.Module, example: Any) -> tuple[dict[str, Place], dict[str, str]]:
    """Layers of ``model`` that can take another form, and layer -> reason for those that stay as they are.

    One forward on meta copies (on the CPU where that fails) says where each layer stands.  Plain ``nn.Conv2d`` and
    ``nn.Linear`` that run exactly once qualify; grouped convolutions, other paddings than zeros, computed weights, and
    parameters that several modules share do not, nor does a layer that is called with ``input=x``.
    """
    for device in ("meta", "cpu"):
        private = private_copy(model, device)
        args, kwargs = call_arguments(example, device)
        layers = {n: m for n, m in private.named_modules() if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear))}
        calls: dict[str, list[Any]] = {name: [] for name in layers}
        for name, layer in layers.items():
            layer.register_forward_pre_hook(lambda _, args, seen=calls[name]: seen.append(args[0] if args else None))  # type: ignore[misc]
        try:
            with torch.no_grad(), mode(private, training=False):
                private(*args, **kwargs)
        except Exception:
            if device == "cpu":
                raise
            continue
        break
    owners: dict[int, int] = {}
    for module in private.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    places: dict[str, Place] = {}
    reasons: dict[str, str] = {}
    for name, layer in layers.items():
        reason = _unfit(layer, calls[name], owners)
        if reason:
            reasons[name] = reason
        else:
            places[name] = _place(name, layer, calls[name][0])
    return places, reasons


def _plain(module: nn.Module) -> bool:
    """Does it compute with its own weight and nothing else?"""
    if isinstance(module, nn.Conv2d):
        own = type(module).forward is nn.Conv2d.forward and type(module)._conv_forward is nn.Conv2d._conv_forward
    else:
        own = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return own and isinstance(module._parameters.get("weight"), nn.Parameter)


def _unfit(module: nn.Module, seen: list[Any], owners: dict[int, int]) -> str:
    """Why a layer stays as it is; empty if it can take another form.  ``owners``: modules per id of a parameter."""
    if not isinstance(module, (nn.Conv2d, nn.Linear)):
        return f"{type(module).__name__} has no other form yet"
    if not _plain(module):
        return "its weight is computed"
    if owners[id(module.weight)] > 1:
        return "its weight is shared with another module"
    if len(seen) != 1:
        return f"it runs {len(seen)} times in one forward"
    if seen[0] is None:
        return "its input is given by name (input=x), other forms take it by position"
    if isinstance(module, nn.Conv2d):
        if module.groups > 1:
            return "grouped convolution"
        if module.padding_mode != "zeros":
            return f"padding mode {module.padding_mode!r}"
        if isinstance(module.padding, str) and _numbers(module) is None:
            return "padding 'same' of an even kernel is uneven"
        if seen[0].ndim != 4:
            return "its input has no batch dimension"
    return ""


def _numbers(module: nn.Conv2d) -> tuple[int, int] | None:
    """Padding per dimension; ``None`` where it differs between the two ends."""
    if module.padding == "valid":
        return (0, 0)
    if module.padding == "same":
        reach = [d * (k - 1) for k, d in zip(module.kernel_size, module.dilation, strict=True)]
        return None if any(r % 2 for r in reach) else (reach[0] // 2, reach[1] // 2)
    return (int(module.padding[0]), int(module.padding[1]))


def _place(name: str, module: nn.Module, x: Tensor) -> Place:
    if isinstance(module, nn.Linear):
        one = (1, 1)
        rows = x.numel() // x.shape[-1]
        return Place(
            name, module.out_features, module.in_features, one, one, (0, 0), one, one, rows, x.element_size(), True
        )
    assert isinstance(module, nn.Conv2d)
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    padding, size = _numbers(module), (x.shape[2], x.shape[3])
    assert padding is not None and len(kernel) == len(stride) == len(dilation) == 2
    widths = (module.out_channels, module.in_channels)
    return Place(name, *widths, kernel, stride, padding, dilation, size, x.shape[0], x.element_size())
