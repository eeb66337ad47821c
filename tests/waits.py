"""Counts what would wait for a GPU: operations whose result the host needs before it can go on.  Counted on the CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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


def count_copies(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What counts copies between host and device as they are made; ``copied`` is the fixture of it."""
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
