"""How good a network would be right now, on images: for methods that choose between candidates."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from espalier.copies import device_of
from espalier.forms.transfer import moved
from espalier.tasks import Task, called, image_count, task_of, to_device

Batch = tuple[Any, Any]
"""Inputs and targets; of classifiers normalised float32 images ``(n, c, h, w)`` and int64 labels ``(n,)``, on one device."""


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Give every module its train or eval flag back afterwards, each its own."""
    before = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def recalibrate_batchnorm(model: nn.Module, batches: Iterable[Batch], n: int) -> None:
    """Estimate the running statistics of every BatchNorm anew, as plain averages over the first ``n``
    batches.

    Only BatchNorm runs in train mode meanwhile: nothing else is changed, dropout is off.

    Raises: ValueError if there is no batch.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    device = device_of(model)
    momenta = [m.momentum for m in norms]
    seen: dict[nn.Module, int] = {}

    def count(norm: nn.Module, _: object) -> None:
        """A cumulative average: what ``momentum=None`` does too, but it asks the device how many there were."""
        seen[norm] = seen.get(norm, 0) + 1
        norm.momentum = 1.0 / seen[norm]  # type: ignore[assignment]

    chosen = islice(batches, n)
    first = next(chosen, None)
    if first is None:
        raise ValueError("recalibrate_batchnorm: there are no batches")
    hooks = [norm.register_forward_pre_hook(count) for norm in norms]
    with modes_kept(model), torch.no_grad():
        model.eval()
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.train()
            for x, _ in chain([first], chosen):
                called(model, to_device(x, device))
        finally:
            for hook in hooks:
                hook.remove()
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


@contextmanager
def batchnorm_settled(model: nn.Module, batches: Iterable[Batch] | None) -> Iterator[None]:
    """BatchNorm's statistics for what the block makes of ``model``: from all of ``batches``, freed of their own bias.

    A few images, not augmented as those of training were, give another mean and variance than training found, of the whole
    network too, and that alone cost a ResNet-20 three points.  So what the block changes is measured, on the same images
    before and after it: ``mean + (mean' - mean_0)`` and ``var * var' / var_0``, where ``'`` is measured behind the block, ``0``
    before it, and the rest is what the network came with.  A block that changes nothing leaves the statistics as they are.
    Meanwhile the buffers hold ``mean - mean_0`` and ``var / var_0``, so that whatever cuts channels cuts these as well.

    Without batches, or without BatchNorm, nothing.  The block must not run the network.
    """
    if batches is None or not _statistics(model):
        yield
        return
    with torch.no_grad():
        before = {norm: (mean.clone(), var.clone()) for norm, mean, var in _statistics(model)}
        recalibrate_batchnorm(model, batches, sys.maxsize)
        for norm, found_mean, found_var in _statistics(model):
            mean, var = before[norm]
            found_mean.neg_().add_(mean)
            found_var.copy_((var + norm.eps) / (found_var + norm.eps))
        try:
            yield
        except BaseException:
            for norm, (mean, var) in before.items():
                norm.running_mean, norm.running_var = mean, var
            raise
        apart = {norm: (shift.clone(), ratio.clone()) for norm, shift, ratio in _statistics(model)}
        recalibrate_batchnorm(model, batches, sys.maxsize)
        for norm, mean, var in _statistics(model):
            shift, ratio = apart[norm]
            mean.add_(shift)
            var.add_(norm.eps).mul_(ratio).sub_(norm.eps).clamp_(min=0)


def _statistics(model: nn.Module) -> list[tuple[_BatchNorm, Tensor, Tensor]]:
    """Every BatchNorm that keeps statistics, with its mean and its variance."""
    return [
        (m, m.running_mean, m.running_var)
        for m in model.modules()
        if isinstance(m, _BatchNorm) and m.running_mean is not None and m.running_var is not None
    ]


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Give every buffer its content back afterwards."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, content in before:
                buffer.copy_(content)


@contextmanager
def without_noise(model: nn.Module, task: Task) -> Iterator[None]:
    """Inside, the loss of ``task`` is the same every time: no dropout, no statistics of a batch, the same draws."""
    with modes_kept(model), torch.random.fork_rng():
        torch.manual_seed(0)
        task.quiet(model)
        yield


def training_loss(model: nn.Module, x: Any, y: Any, task: Task) -> Tensor:
    """Of one batch, mean over its images, where the model is."""
    x, y = to_device((x, y), device_of(model))
    return task.loss(task.forward(model, x, y), y)


@torch.no_grad()
def loss_on(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Mean over the images of what training minimises, without noise, where the model is.

    Raises: ValueError if there are no images, or the loss is not finite.
    """
    task = task_of(batches)
    losses: list[Tensor] = []
    images = 0
    with without_noise(model, task):
        for x, y in batches:
            count = image_count(x)
            losses.append(training_loss(model, x, y, task) * count)
            images += count
    if not images:
        raise ValueError("there are no images to score on")
    total = sum(torch.stack(losses).tolist())  # one wait for the device
    if not total < float("inf"):
        raise ValueError(f"the loss of the candidate is {total / images}")
    return total / images


@torch.no_grad()
def loss_with(
    model: nn.Module, weights: Mapping[str, Tensor], images: Iterable[Batch], *, batches: Iterable[Batch], n: int
) -> float:
    """Loss on ``images`` if layers had these ``weights``, BatchNorm estimated on ``n`` batches; nothing of it stays."""
    own = {name: model.get_parameter(f"{name}.weight") for name in weights}
    before = {name: weight.detach().clone() for name, weight in own.items()}
    with buffers_kept(model):
        try:
            for name, weight in moved(weights, device_of(model)).items():
                own[name].copy_(weight)
            recalibrate_batchnorm(model, batches, n)
            return loss_on(model, images)
        finally:
            for name, weight in before.items():
                own[name].copy_(weight)
