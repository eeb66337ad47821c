"""An ordinary step of a fading method waits for the device once at most, so that it costs little on a GPU that is shared.

Counted on the CPU: operations whose result the host needs before it can go on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import espalier as es
from espalier.methods.pressure import Fading, FadingMethod
from tests.steps import EXAMPLE, network, train_step

STEPS = 150
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "_unique2"}


class Waits(TorchDispatchMode):
    """Counts operations, and the waits among them; ``copied`` is for copies between host and device, which dispatch nothing
    on the CPU."""

    def __init__(self, copied: Counter[str]) -> None:
        super().__init__()
        self.copied, self.before = copied, copied.total()
        self.operations = self.asked = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.operations += 1
        self.asked += name in WAITING or masked
        return func(*args, **(kwargs or {}))

    @property
    def waits(self) -> int:
        return self.asked + self.copied.total() - self.before


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    counts: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    # ``numpy`` is not among them: on a GPU it fails without one of these
    for owner, name in ((Tensor, "cpu"), (Tensor, "tolist"), (torch, "tensor"), (torch, "from_numpy")):
        monkeypatch.setattr(owner, name, counted(name, getattr(owner, name)))
    return counts


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
    process = method.start(model, EXAMPLE, es.Budget(macs=0.5))
    assert isinstance(process, Fading)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    waits: dict[str, list[int]] = {}
    for step in range(STEPS):
        train_step_waits = _waits(copied, lambda step=step: train_step(process, optimizer, step))
        decided, done = process._decided, process.done
        with Waits(copied) as counted:
            removed = process.step(progress=(step + 1) / STEPS, optimizer=optimizer)
        event = removed is not None or process._decided != decided
        phase = "done" if done else "event" if event else "pressing" if process._busy else "before"
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
