"""Our own ``nn.Module`` classes: the lowest room. It imports nothing of ours, so any room may know it."""

from typing import ClassVar

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

    decayed: ClassVar[tuple[str, ...]]
