"""The closing budget, which all methods share that train: from the full cost to the target, fast at first.

Zhu & Gupta, "To prune, or not to prune", arXiv 1710.01878: what is still to go is ``(1 - t) ** power``, with ``t`` from 0 to 1.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from espalier.costs import LATENCY, Cost
from espalier.methods.base import Method, Run
from espalier.methods.importance import Listener
from espalier.plan import Budget


class ClosingMethod(Method):
    """A method under whose budget the network comes little by little; times are fractions of the whole run."""

    start_at: float  # when the budget leaves the full cost
    power: float

    @property
    @abstractmethod
    def closed_at(self) -> float:
        """When the budget is what was asked for: what is decided from then on is final."""


class Closing(Run):
    """A run whose budget closes while it listens to what units are worth."""

    method: ClosingMethod
    score: Listener
    remembers: ClassVar[tuple[str, ...]] = ("settled", "done", "forced", "_last", "_steps", "score")

    def __init__(
        self, model: nn.Module, example: Any, budget: Budget, method: ClosingMethod, *, dense: nn.Module | None = None
    ) -> None:
        super().__init__(model, example, budget, dense=dense)
        self.method = method
        self.settled = False  # the last decision is taken
        self.done = False
        self.forced = False  # training stopped before everything had gone, and ``finish`` cut the rest
        self._last = 0.0  # progress at the last step
        self._steps = 0

    def left_at(self, progress: float) -> float:
        """Share of what the cost has to fall that is still to fall."""
        method = self.method
        return still_to_go(progress, begin=method.start_at, end=method.closed_at, power=method.power)

    def limits_at(self, progress: float) -> dict[str, float]:
        """The budget now."""
        return limits_on_the_way(self.limits, self.dense, self.left_at(progress))

    def averaged(self) -> None:
        self.score.averaged()

    def bind(self) -> None:
        self._silence()
        self._bind()

    @abstractmethod
    def _bind(self) -> None:
        """Make what listens to the model's present parameters."""

    def _finished(self) -> None:
        self.done = True
        self._silence()

    def _silence(self) -> None:
        """Take all hooks away."""
        self.score.close()


def still_to_go(progress: float, *, begin: float, end: float, power: float) -> float:
    """Share of the way from the full cost to the target that is ahead at ``progress``: 1 up to ``begin``, 0 from ``end`` on."""
    done = min(max((progress - begin) / (end - begin), 0.0), 1.0)
    left: float = (1.0 - done) ** power
    return left


def limits_on_the_way(limits: Mapping[str, float], dense: Cost, left: float) -> dict[str, float]:
    """What the network may cost while the share ``left`` of the way to ``limits`` is ahead; all but time in whole numbers.

    Time, which is predicted on the way, stays so far above its limit that the last decision, which is measured, has room.
    """
    now = {m: limit + (getattr(dense, m) - limit) * left for m, limit in limits.items()}
    if LATENCY in now and left > 0:
        now[LATENCY] = max(now[LATENCY], min(ROOM * limits[LATENCY], dense.latency or 0.0))
    return {m: limit if m == LATENCY else math.floor(limit) for m, limit in now.items()}


ROOM = 1.1  # of a limit on time
