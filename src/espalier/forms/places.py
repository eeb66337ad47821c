"""Which layers can take another form, with the numbers that a form needs; what cannot is listed with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from espalier.graph.standins import StandIns
from espalier.graph.tracing import call_arguments, mode, private_copy
from espalier.layers import METADATA

Sizes = tuple[int, ...]
"""One number per axis behind the channels."""

CONVOLUTIONS: dict[int, type[nn.modules.conv._ConvNd]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
"""Number of axes -> type of layer."""


@dataclass(frozen=True)
class Place:
    """A convolution along one to three axes, or a linear layer, and where it stands.

    A linear layer is a 1x1 convolution on a 1x1 image.
    """

    name: str
    out_channels: int
    in_channels: int
    kernel: Sizes
    stride: Sizes
    padding: Sizes
    dilation: Sizes
    input_size: Sizes  # of the axes behind the channels
    positions: int  # images, times rows for a linear layer that sees sequences: everything that multiplies the cost
    itemsize: int  # bytes of one activation
    linear: bool = False

    @property
    def output_size(self) -> Sizes:
        return out_size(self.input_size, self.kernel, self.stride, self.padding, self.dilation)

    @property
    def weight_shape(self) -> Sizes:
        ends = (self.out_channels, self.in_channels)
        return ends if self.linear else (*ends, *self.kernel)


def out_size(size: Sizes, kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes) -> Sizes:
    """Size after a convolution, axis by axis."""
    return tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    )


def find_places(model: nn.Module, example: Any) -> tuple[dict[str, Place], dict[str, str]]:
    """Layers of ``model`` that can take another form, and layer -> reason for those that stay as they are.

    One forward on meta copies (on the CPU where that fails) says where each layer stands, and how often it runs if every value
    passes (``graph.standins``).  Plain convolutions along one to
    three axes and ``nn.Linear`` that run exactly once qualify; grouped convolutions, other paddings than zeros, computed
    weights, and parameters that several modules share do not, nor does a layer that is called with ``input=x``, or whose weight
    the forward uses elsewhere too.  Parameters that a forward convolves with by itself, as they are or with what it makes of
    them, are listed by their own names.
    """
    for device, passes in (("meta", True), ("cpu", True), ("cpu", False)):  # as a trace does
        private = private_copy(model, device)
        args, kwargs = call_arguments(example, device)
        layers = {n: m for n, m in private.named_modules() if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear))}
        seen = _Seen(private, layers)
        try:
            with torch.no_grad(), mode(private, training=False), seen, StandIns() if passes else nullcontext():
                private(*args, **kwargs)
        except Exception:
            if not passes:
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
        reason = _unfit(layer, seen.calls[name], owners, seen.reads.get(name))
        if reason:
            reasons[name] = reason
        else:
            places[name] = _place(name, layer, seen.calls[name][0])
    reasons.update(
        {
            n: f"{by} is called with this parameter or what is made of it, and no layer to put a form in"
            for n, by in seen.bare.items()
        }
    )
    return places, reasons


class _Seen(TorchFunctionMode):
    """What one forward does with layers: the inputs of each, and which functions use its weight outside of it."""

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.calls: dict[str, list[Any]] = {name: [] for name in layers}
        self.reads: dict[str, str] = {}  # layer -> function that uses its weight, while the layer itself does not run
        self.bare: dict[str, str] = {}  # parameter that is no layer's weight -> function that convolves with it
        self._inside: list[str] = []
        weights = {id(m._parameters.get("weight")): n for n, m in layers.items()}
        self._layers = {key: n for key, n in weights.items() if key != id(None)}
        self._others = {id(p): n for n, p in model.named_parameters() if id(p) not in self._layers}
        for name, layer in layers.items():
            layer.register_forward_pre_hook(self._enters(name))
            layer.register_forward_hook(self._leaves, always_call=True)

    def _enters(self, name: str) -> Any:
        def hook(_: nn.Module, args: Any) -> None:
            self.calls[name].append(args[0] if args else None)
            self._inside.append(name)

        return hook

    def _leaves(self, *_: Any) -> None:
        self._inside.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            return func(*args, **kwargs)
        tensors = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        sources = [self._others.get(id(t)) or getattr(t, "_made_of", None) for t in tensors]
        for value, source in zip(tensors, sources, strict=True):
            name = self._layers.get(id(value))
            if name is not None and name not in self._inside:
                self.reads.setdefault(name, _called(func))
            elif source and value.ndim > 1 and not self._inside and _called(func) in WEIGHING:
                self.bare.setdefault(source, _called(func))
        made = func(*args, **kwargs)
        if sources and all(sources) and isinstance(made, Tensor):  # a weight that is turned, scaled, added up
            made._made_of = max(zip(tensors, sources, strict=True), key=lambda pair: pair[0].numel())[1]  # type: ignore[attr-defined]
        return made


WEIGHING = frozenset(["linear", *(f"conv{'_transpose' * turned}{n}d" for turned in (0, 1) for n in (1, 2, 3))])
"""Functions that take a weight."""


def _called(func: Any) -> str:
    return str(getattr(func, "__name__", func))


def _plain(module: Any) -> bool:
    """Does it compute with its own weight and nothing else?"""
    kind: Any = next((k for k in (*CONVOLUTIONS.values(), nn.Linear) if isinstance(module, k)), None)
    own: Any = type(module)
    if kind is None or own.forward is not kind.forward:
        return False
    if kind is not nn.Linear and own._conv_forward is not kind._conv_forward:
        return False
    return isinstance(module._parameters.get("weight"), nn.Parameter)


def _unfit(module: Any, seen: list[Any], owners: dict[int, int], read: str | None) -> str:
    """Why a layer stays as it is; empty if it can take another form.

    ``owners``: modules per id of a parameter; ``read``: a function that uses its weight elsewhere.
    """
    if not any(isinstance(module, kind) for kind in (*CONVOLUTIONS.values(), nn.Linear)):
        return f"{type(module).__name__} has no other form yet"
    if not _plain(module):
        return "its weight is computed"
    if owners[id(module.weight)] > 1:
        return "its weight is shared with another module"
    if len(seen) != 1:
        return f"it runs {len(seen)} times in one forward" + (f", its weight in {read}" if read else "")
    if read:
        return f"the forward uses its weight a second time, in {read}"
    if seen[0] is None:
        return "its input is given by name (input=x), other forms take it by position"
    if not isinstance(module, nn.Linear):
        if module.groups > 1:
            return "grouped convolution"
        if module.padding_mode != "zeros":
            return f"padding mode {module.padding_mode!r}"
        if isinstance(module.padding, str) and _numbers(module) is None:
            return "padding 'same' of an even kernel is uneven"
        if seen[0].ndim != 2 + len(module.kernel_size):
            return "its input has no batch dimension"
    return ""


def _numbers(module: Any) -> Sizes | None:
    """Padding per axis; ``None`` where it differs between the two ends."""
    if module.padding == "valid":
        return (0,) * len(module.kernel_size)
    if module.padding == "same":
        reach = [d * (k - 1) for k, d in zip(module.kernel_size, module.dilation, strict=True)]
        return None if any(r % 2 for r in reach) else tuple(r // 2 for r in reach)
    return tuple(int(p) for p in module.padding)


def _place(name: str, module: Any, x: Tensor) -> Place:
    if isinstance(module, nn.Linear):
        one = (1, 1)
        rows = x.numel() // x.shape[-1]
        return Place(
            name, module.out_features, module.in_features, one, one, (0, 0), one, one, rows, x.element_size(), True
        )
    padding, widths = _numbers(module), (module.out_channels, module.in_channels)
    assert padding is not None
    return Place(
        name, *widths, module.kernel_size, module.stride, padding, module.dilation, tuple(x.shape[2:]), x.shape[0],
        x.element_size(),
    )  # fmt: skip
