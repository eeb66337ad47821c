"""Our own ``nn.Module`` classes: the lowest room. It imports nothing of ours, so any room may know it."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        pads: list[int] = []
        for size, kernel, stride, dilation in zip(
            reversed(x.shape[-2:]),
            reversed(self.kernel_size),
            reversed(self.stride),
            reversed(self.dilation),
            strict=True,
        ):
            total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads))


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
        if self.index is not None:
            x = x.index_select(1, self.index)
        if any(self.shift):
            x = F.pad(x, self._within(x))
        return super().forward(x)

    def _within(self, x: Tensor) -> list[int]:
        """``shift``, where it would crop more than there is: the rest from the zeros of the other side, all the same."""
        shift = list(self.shift)
        for first, second, size in ((0, 1, x.shape[-1]), (2, 3, x.shape[-2])):
            for side, other in ((first, second), (second, first)):
                if shift[side] < 0 and -shift[side] > size:
                    shift[other] += shift[side] + size
                    shift[side] = -size
        return shift

    def extra_repr(self) -> str:
        selects = "" if self.index is None else ", selects its inputs"
        return f"{super().extra_repr()}{selects}" + (f", shift={self.shift}" if any(self.shift) else "")
