"""Our own ``nn.Module`` classes: the lowest room, which imports nothing of ours, so any room may know them."""

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
