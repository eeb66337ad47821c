"""An ordinary step of a method waits for the device once at most, so that it costs little on a GPU that is shared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import espalier as es
from espalier.methods.pressure import Fading, FadingMethod
from tests.steps import EXAMPLE, network, train_step
from tests.waits import Waits

STEPS = 150


@pytest.mark.parametrize(
    "ask",
    [
        lambda t: bool((t > 0).any()),
        lambda t: float(t[0]),
        lambda t: t[t > 0],
        lambda t: t.__setitem__(t > 0, t[:1]),
        lambda t: t.nonzero(),
        lambda t: t.tolist(),
        lambda t: t.cpu(),
        lambda t: t + torch.tensor([1.0]),
    ],
)
def test_waits_are_counted(ask: Callable[[Tensor], object], copied: Counter[str]) -> None:
    values, first = torch.ones(3), torch.zeros(1, dtype=torch.int64)
    with Waits(copied) as counted:
        values.mul_(2.0).index_add_(0, first, values[first])
    assert (counted.waits, counted.operations) == (0, 3)
    with Waits(copied) as counted:
        ask(values)
    assert counted.waits >= 1


@pytest.mark.parametrize("method", [es.TCP(), es.MGP()], ids=["TCP", "MGP"])
def test_an_ordinary_step_waits_once_at_most(method: FadingMethod, copied: Counter[str]) -> None:
    model = network()
    run = method.start(model, EXAMPLE, es.Budget(macs=0.5))
    assert isinstance(run, Fading)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    waits: dict[str, list[int]] = {}
    for step in range(STEPS):
        train_step_waits = _waits(copied, lambda step=step: train_step(run, optimizer, step))
        decided, done = run._decided, run.done
        with Waits(copied) as counted:
            removed = run.step(progress=(step + 1) / STEPS, optimizer=optimizer)
        event = removed is not None or run._decided != decided
        phase = "done" if done else "event" if event else "pressing" if run._busy else "before"
        waits.setdefault(phase, []).append(counted.waits + train_step_waits)
        if done:
            assert counted.operations == 0
            break
    assert len(waits["before"]) >= 2 and set(waits["before"]) == {0}
    assert len(waits["pressing"]) >= 8 and set(waits["pressing"]) == {1}
    assert waits["done"] == [0]
    assert len(waits["event"]) >= 10


def _waits(copied: Counter[str], act: Callable[[], None]) -> int:
    with Waits(copied) as counted:
        act()
    return counted.waits


def test_a_step_of_dprp_between_events_never_waits(copied: Counter[str]) -> None:
    model = network()
    run = es.DPRP().start(model, EXAMPLE, es.Budget(macs=0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    waits: dict[str, list[int]] = {}
    for step in range(STEPS):
        before = _waits(copied, lambda step=step: train_step(run, optimizer, step))
        done = run.done
        with Waits(copied) as counted:
            removed = run.step(progress=(step + 1) / STEPS, optimizer=optimizer)
        phase = "event" if removed is not None else "done" if done else "between"
        waits.setdefault(phase, []).append(counted.waits + before)
        if done:
            assert counted.operations == 0
    assert len(waits["between"]) >= 50 and set(waits["between"]) == {0}
    assert len(waits["done"]) >= 30 and set(waits["done"]) == {0}
    assert len(waits["event"]) >= 20
