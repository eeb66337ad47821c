"""BatchNorm over the batches of all processes, as one process on the whole batch has it, on any device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from espalier.methods.agreement import share


@contextmanager
def synchronised(model: nn.Module, *, wanted: bool = True) -> Iterator[None]:
    """Inside, every BatchNorm in train mode normalises by mean and variance over all processes; ``wanted=False``: nothing.

    Hooks replace what the layer returned: torch's ``SyncBatchNorm`` is another class, which surgery and files would have to
    know, and does not run on processors.  The layer's own forward is done in vain.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)] if wanted and share().world > 1 else []
    before: dict[nn.Module, list[Tensor]] = {}

    def shared(module: nn.Module) -> bool:
        """Not while one process does something for all, or in eval mode."""
        return module.training and share().world > 1

    def remember(module: nn.Module, inputs: Any) -> None:
        if shared(module) and isinstance(module.running_mean, Tensor) and isinstance(module.running_var, Tensor):
            before[module] = [module.running_mean.clone(), module.running_var.clone()]

    def replaced(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        return _normalised(module, inputs[0], before.pop(module, None)) if shared(module) else None  # type: ignore[arg-type]

    hooks = [norm.register_forward_pre_hook(remember) for norm in norms]
    hooks += [norm.register_forward_hook(replaced) for norm in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _normalised(norm: _BatchNorm, x: Tensor, running: list[Tensor] | None) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias``; ``running`` are the statistics from before, which are moved.

    Sums are taken around the running mean, which is near the mean: their difference loses no digits.
    """
    kind, shape = x.dtype, [1, -1, *[1] * (x.dim() - 2)]
    dims = [0, *range(2, x.dim())]
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    near = x.new_zeros(x.shape[1]) if running is None else running[0].to(x.dtype)
    off = x - near.view(shape)
    count = x.new_tensor([x.numel() / x.shape[1]])
    sums = _Summed.apply(torch.cat([off.sum(dims), off.square().sum(dims), count]))
    first, second, number = sums.split([x.shape[1], x.shape[1], 1])
    mean, number = first / number, number.detach()
    var = (second / number - mean.square()).clamp_min(0.0)
    if running is not None:
        with torch.no_grad():
            seen = norm.num_batches_tracked
            pace = norm.momentum if norm.momentum is not None or seen is None else 1.0 / seen
            now = (mean + near, var * number / (number - 1.0).clamp_min(1.0))
            for kept, old, new in zip((norm.running_mean, norm.running_var), running, now, strict=True):
                assert isinstance(kept, Tensor)
                kept.copy_(old + (new.to(old.dtype) - old) * pace)
    scale = (var + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight
    found = (off - mean.view(shape)) * scale.view(shape)
    return (found + norm.bias.view(shape) if norm.affine else found).to(kind)


class _Summed(torch.autograd.Function):
    """Summed over the processes; so is the gradient, as every process has a part of the loss."""

    @staticmethod
    def forward(context: Any, tensor: Tensor) -> Tensor:
        found = tensor.clone()
        dist.all_reduce(found)
        return found

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        found = gradient.clone()
        dist.all_reduce(found)
        return found
