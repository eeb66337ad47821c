"""Our own ``nn.Module`` classes: the lowest room. It imports nothing of ours, so any room may know it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map


class ChannelPad(nn.Module):
    """The parameter-free shortcut of CIFAR ResNets (option A): subsample, then pad with zero channels.

    Maps ``(n, c, h, w)`` to ``(n, before + c + after, ceil(h / stride), ceil(w / stride))``. The two paddings
    are plain integers on the module, so surgery can adjust them when channels of the residual stream go.
    Source: He et al., Deep Residual Learning for Image Recognition, 2016, section 3.3.
    """

    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        if before < 0 or after < 0 or stride < 1:
            raise ValueError(
                f"ChannelPad(before={before}, after={after}, stride={stride}): "
                "both paddings must be 0 or more and the stride 1 or more"
            )
        self.before = before
        self.after = after
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))

    def extra_repr(self) -> str:
        return f"before={self.before}, after={self.after}, stride={self.stride}"


class PaddedConv2d(nn.Conv2d):
    """A plain convolution whose zero padding follows TensorFlow's "same" rule, ``ceil(size / stride)`` outputs.

    Takes the place of weight-standardised convolutions with dynamic padding once their weights are baked.
    """

    def forward(self, x: Tensor) -> Tensor:
        (tall, wide), (down, right), (row, column) = self.kernel_size, self.stride, self.dilation
        pads = _same(x.shape[-1], wide, right, column) + _same(x.shape[-2], tall, down, row)
        return self._conv_forward(F.pad(x, pads), self.weight, self.bias)


def _same(size: int, kernel: int, stride: int, dilation: int) -> list[int]:
    total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return [total // 2, total - total // 2]


class OwnDecay(nn.Module):
    """A module that says itself which of its parameters weight decay is for; the number of dimensions does not tell there."""

    @property
    def decayed(self) -> tuple[str, ...]:
        raise NotImplementedError


class PartConv2d(nn.Conv2d):
    """A convolution that reads only some channels of its input, and whose kernel may sit off the centre.

    ``index`` names the channels it reads, shape ``(in_channels,)``, or is ``None``: all.  ``shift`` is padded with zeros
    (negative: cropped) before the convolution pads, as ``(left, right, top, bottom)``.  Part of a padded kernel is a smaller
    kernel with an uneven padding: this is how it is executed.
    """

    if TYPE_CHECKING:  # TorchScript cannot read it, and infers it
        index: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        *,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        padding_mode: Literal["zeros"] = "zeros",
        bias: bool = True,
        selects: bool = False,
        shift: tuple[int, int, int, int] = (0, 0, 0, 0),
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride=stride, padding=padding, dilation=dilation, groups=groups,
            bias=bias, padding_mode=padding_mode,
        )  # fmt: skip
        self.shift = shift
        self.register_buffer("index", torch.arange(in_channels) if selects else None)

    @classmethod
    def of(cls, module: nn.Conv2d) -> PartConv2d:
        """The same convolution, holding the very same parameters: an optimiser need not be told."""
        assert not isinstance(module.padding, str)
        own: Any = module
        with torch.device("meta"):
            part = cls(
                own.in_channels, own.out_channels, own.kernel_size, stride=own.stride, padding=own.padding,
                dilation=own.dilation, groups=own.groups, bias=own.bias is not None,
            )  # fmt: skip
        part.weight, part.bias = module.weight, module.bias
        return part.train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        index = self.index
        if index is not None:
            x = x.index_select(1, index)
        left, right, top, bottom = self.shift
        if left != 0 or right != 0 or top != 0 or bottom != 0:
            left, right = _within(left, right, x.shape[-1])
            top, bottom = _within(top, bottom, x.shape[-2])
            x = F.pad(x, [left, right, top, bottom])
        return self._conv_forward(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        selects = "" if self.index is None else ", selects its inputs"
        return f"{super().extra_repr()}{selects}" + (f", shift={self.shift}" if any(self.shift) else "")


def _within(first: int, second: int, size: int) -> tuple[int, int]:
    """Two paddings, where one would crop more than there is: the rest from the zeros of the other side, all the same."""
    if first < 0 and -first > size:
        first, second = -size, second + first + size
    if second < 0 and -second > size:
        first, second = first + second + size, -size
    return first, second


# -- factorised layers -------------------------------------------------------------------------------------------------


class _Row(nn.Sequential):
    """Small layers in a row that stand for one."""

    def composed(self) -> Tensor:
        """The weight, computed now."""
        return compose_row([self._end(i).weight for i in range(len(self))])

    def _end(self, number: int) -> Any:
        return self[number]


class FactorisedConv(_Row):
    """A row of small convolutions in place of one, which answers what that one answers.

    The forward around it may read ``stride``, ``padding``, ``in_channels``, ``bias`` and so on of the layer that was there:
    these are its own geometry.  ``weight`` is composed only where its values are used; its shape, dtype and device cost
    nothing.  It saves, exports and scripts as the plain ``nn.Sequential`` that it is.
    """

    def __init__(
        self,
        *stages: nn.Module,
        kernel_size: tuple[int, ...] = (1, 1),
        stride: tuple[int, ...] = (1, 1),
        padding: tuple[int, ...] = (0, 0),
        dilation: tuple[int, ...] = (1, 1),
    ) -> None:
        super().__init__(*stages)
        self.kernel_size, self.stride, self.padding, self.dilation = kernel_size, stride, padding, dilation
        self.groups, self.padding_mode = 1, "zeros"
        self.transposed, self.output_padding = False, (0,) * len(kernel_size)

    __jit_unused_properties__ = ("in_channels", "out_channels", "weight", "bias")

    @property
    def in_channels(self) -> int:
        return int(self._end(0).in_channels)

    @property
    def out_channels(self) -> int:
        return int(self._end(-1).out_channels)

    @property
    def weight(self) -> Tensor:
        """The composed weight, ``(O, I, *kernel)``, with gradients to the weights of the row; computed when it is used."""
        ends = (self.out_channels, self.in_channels, *self.kernel_size)
        return Composed.of(self, ends, self._end(-1).weight)

    @property
    def bias(self) -> Any:
        return self._end(-1).bias


class FactorisedLinear(_Row):
    """A row of linear layers in place of one, likewise."""

    __jit_unused_properties__ = ("in_features", "out_features", "weight", "bias")

    @property
    def in_features(self) -> int:
        return int(self._end(0).in_features)

    @property
    def out_features(self) -> int:
        return int(self._end(-1).out_features)

    @property
    def weight(self) -> Tensor:
        """The composed weight, ``(O, I)``; computed when it is used."""
        return Composed.of(self, (self.out_features, self.in_features), self._end(-1).weight)

    @property
    def bias(self) -> Any:
        return self._end(-1).bias


def compose_row(weights: Sequence[Tensor]) -> Tensor:
    """The weight that stages in a row amount to: each ``(out, in, *kernel)`` or ``(out, in)``, first to last.

    Along each axis of the kernels one stage at most is longer than 1, so that convolving them is an outer product.  A stage of
    ``(c, 1, *kernel)`` behind ``c`` channels works on each by itself.
    """
    whole, *rest = weights
    for stage in rest:
        if stage.ndim == 2:
            whole = stage @ whole
            continue
        kernel = [a * b for a, b in zip(stage.shape[2:], whole.shape[2:], strict=True)]
        axes = [i for n in range(len(kernel)) for i in (n, len(kernel) + n)]
        taps = (stage.shape[2:].numel(), whole.shape[2:].numel())
        if stage.shape[1] != whole.shape[0]:
            product = stage.reshape(-1, 1, taps[0], 1) * whole.reshape(*whole.shape[:2], 1, taps[1])
            outputs = whole.shape[0]
        else:
            outputs = stage.shape[0]
            left = stage.flatten(2).transpose(1, 2).reshape(-1, stage.shape[1])  # (o*K, c)
            product = (left @ whole.reshape(whole.shape[0], -1)).reshape(outputs, taps[0], whole.shape[1], taps[1])
            product = product.transpose(1, 2)
        shaped = product.reshape(outputs, whole.shape[1], *stage.shape[2:], *whole.shape[2:])
        whole = shaped.permute(0, 1, *(2 + i for i in axes)).reshape(outputs, whole.shape[1], *kernel)
    return whole


class Composed(Tensor):
    """A weight that is computed when its values are used, and not when only its shape, dtype or device is asked for."""

    _row: Any

    @staticmethod
    def of(row: Any, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """What ``row.composed()`` gives, of ``shape``, and otherwise like a tensor of it."""
        if torch.compiler.is_compiling():  # a compiler leaves out what nobody uses, and knows no tensors of this kind
            return row.composed()  # type: ignore[no-any-return]
        made: Any = Tensor._make_wrapper_subclass(
            Composed, shape, dtype=like.dtype, device=like.device, requires_grad=like.requires_grad
        )  # type: ignore[attr-defined]
        made._row = row
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in METADATA:
            args, kwargs = tree_map(_used, (tuple(args), kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """What comes past the functions of Python, as from compiled code."""
        args, kwargs = tree_map(_used, (tuple(args), kwargs or {}))
        return func(*args, **kwargs)


def _used(value: Any) -> Any:
    return value._row.composed() if isinstance(value, Composed) else value


def _getters(*names: str) -> frozenset[Any]:
    return frozenset(getattr(Tensor, n).__get__ for n in names)


METADATA: frozenset[Any] = _getters(
    "dtype", "device", "shape", "ndim", "requires_grad", "layout", "is_cuda", "is_meta", "is_sparse", "is_quantized", "is_leaf",
    "itemsize", "is_cpu", "is_nested", "is_mkldnn", "is_mps", "is_xpu",
) | {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.element_size, Tensor.is_floating_point, Tensor.is_complex, Tensor.__len__,
    Tensor.nelement, Tensor.ndimension, Tensor.get_device, torch.is_floating_point, torch.is_complex, torch.numel,
}  # fmt: skip
"""Questions to a tensor that its values do not answer."""
