"""Shared by the tests of methods that train: a small network, batches that a number gives, one step, a recorder."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espalier.methods.base import Run
from espalier.run.checkpoint import all_tensors
from espalier.run.loop import History
from espalier.run.models import build_model
from espalier.run.onnx import _EXPORTERS
from espalier.run.replay import Computed

EXAMPLE = torch.zeros(1, 1, 8, 8)


def network(name: str = "resnet8a") -> nn.Module:
    """The same weights every time."""
    torch.manual_seed(0)
    return build_model(name, num_classes=10, in_channels=1, image_size=8)


def tiny(num_classes: int, in_channels: int) -> nn.Module:
    """In the place of a network that is known by name, where files are written: exporters take their time for every layer."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes),
    )  # fmt: skip


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Random images and labels, the same for the same ``step``."""
    random = torch.Generator().manual_seed(step)
    return torch.randn(16, 1, 8, 8, generator=random), torch.randint(0, 10, (16,), generator=random)


def train_step(run: Run, optimizer: torch.optim.Optimizer, step: int) -> None:
    """One step of the optimiser on ``batch(step)``; the run has not acted yet."""
    x, y = batch(step)
    (F.cross_entropy(run.model(x), y) + run.penalty()).backward()
    optimizer.step()
    optimizer.zero_grad()


def train_through(run: Run, optimizer: torch.optim.Optimizer, *, steps: int) -> None:
    """A whole run, ``finish`` excepted."""
    for step in range(steps):
        train_step(run, optimizer, step)
        run.step(progress=(step + 1) / steps, optimizer=optimizer)


def logits(model: nn.Module, x: Tensor) -> Tensor:
    """In eval mode; the model's mode is restored."""
    flags = [(m, m.training) for m in model.modules()]
    model.eval()
    with torch.no_grad():
        found = model(x)
    for module, flag in flags:
        module.training = flag
    return found


def measure_nothing(patch: pytest.MonkeyPatch) -> None:
    """Runs end without export and timing, which take seconds; ``unmeasured`` is the fixture of it."""

    def not_here(*arguments: Any, **options: Any) -> Any:
        raise ValueError("not in this test")

    for slow in ("latency", "export_onnx"):
        patch.setattr(f"espalier.run.report.{slow}", not_here)


def export_quickly(patch: pytest.MonkeyPatch) -> None:
    """The older exporter comes first, which takes a small part of the time: where a file is needed, but not how it is made."""
    patch.setattr("espalier.run.onnx._EXPORTERS", _EXPORTERS[::-1])


class Killed(Exception):
    """What ``killed_after`` raises."""


def killed_after(epoch: int) -> Callable[[History], None]:
    """For ``on_epoch``: the run ends there, after its checkpoint is written."""

    def on_epoch(history: History) -> None:
        if len(history.epochs) == epoch:
            raise Killed

    return on_epoch


def assert_same(one: nn.Module, other: nn.Module) -> None:
    """To the bit, buffers included."""
    ours, theirs = all_tensors(one), all_tensors(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


class Again:
    """A recorder without a GPU."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def running(self) -> Any:
        return nullcontext()

    def record(self, step: Callable[[], Computed], parameters: list[nn.Parameter]) -> Any:
        self.recorded += 1
        recorder = self

        class Recording:
            def replay(self) -> Computed:
                recorder.replayed += 1
                for parameter in parameters:
                    parameter.grad = None
                return step()

        return Recording()
