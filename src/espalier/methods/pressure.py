"""What fading methods share: units outside a keep-set shrink to exactly zero while the network trains, then they are removed.

A proximal group-lasso step on everything that owns a unit outside the keep-set, after the optimiser's step,
``w_c <- w_c * max(0, 1 - strength * r_c / |w_c|)`` with ``r_c`` the norm when the unit left the keep-set, so that all fade at
the same relative pace and reach zero in finite time.  The strength follows, in closed loop, the lag of the remaining mass
``sum |w_c| / sum r_c`` behind its schedule.  Which units are outside, and how removal is carried out, is the method's business.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from espalier.methods.base import Method, Process, Removed, Status
from espalier.methods.importance import Sensitivity
from espalier.methods.units import Consumer, Units
from espalier.plan import Budget


@dataclass(frozen=True, kw_only=True)
class FadingMethod(Method):
    """The hyper-parameters that fading methods share; every duration is a fraction of the whole run.

    ``start_at``/``reach``: the budget leaves the full cost at ``start_at``; at about ``reach`` everything outside is gone.
    ``fade``: how long a unit takes from leaving the keep-set to zero.  ``every``: time between two decisions about it.
    ``chunk``: remove as soon as that share of the current MACs (or parameters) has faded; small values remove often.
    ``smoothing``: of the importance, over batches.  ``power``: how fast the budget falls at first; 1 is a straight line.
    """

    start_at: float = 0.02
    reach: float = 0.5
    fade: float = 0.06
    every: float = 0.01
    chunk: float = 0.05
    smoothing: float = 0.97
    power: float = 3.0

    def check_pace(self, *more: str) -> None:
        """``ValueError`` unless the fractions, those named in ``more`` as well, make sense together."""
        where = type(self).__name__
        for name in ("start_at", "reach", "fade", "every", "chunk", "smoothing", *more):
            value = getattr(self, name)
            if not 0 <= value < 1 or not math.isfinite(value):
                raise ValueError(f"{where}({name}={value!r}): must be at least 0 and below 1")
        if self.fade <= 0 or self.every <= 0:
            raise ValueError(f"{where}(): fade and every must be above 0")
        if self.start_at + self.fade >= self.reach:
            raise ValueError(
                f"{where}(start_at={self.start_at}, fade={self.fade}, reach={self.reach}): the budget needs time to "
                "move; start_at + fade must be below reach"
            )


class Fading(Process):
    """A run in which units fade.  A method says what it listens to, what is outside, and how to carry a removal out."""

    method: FadingMethod
    units: Units
    sensitivity: Sensitivity

    def __init__(self, model: nn.Module, example: Any, budget: Budget, method: FadingMethod) -> None:
        super().__init__(model, example, budget)
        self.method = method
        self.settled = False  # the keep-set is final
        self.done = False
        self.forced = False
        self.strength = 1.0
        self._last = self._decided = self._pressed_at = 0.0
        self._steps = 0
        self._mass = 1.0
        self._busy: list[Consumer] = []

    def _begin(self) -> None:
        """Nothing is pressed yet; call once ``units`` are there."""
        count = self.units.count
        self.pressed = torch.zeros(count, dtype=torch.bool, device=self.units.device)
        self.reference = torch.ones(count, device=self.units.device)  # norm of what owns a unit when pressing began
        self.since = torch.zeros(count, device=self.units.device)  # progress then
        self.pull = torch.ones(count, device=self.units.device)  # how fast a unit fades, relative to the others
        self.least = torch.full((count,), TINY, device=self.units.device)  # what a reference is at least

    # -- what a method adds --------------------------------------------------------------------------------------------

    @abstractmethod
    def _listen(self, progress: float) -> None:
        """After every step: take in what was heard, and say what to hear next."""

    @abstractmethod
    def _choose(self, progress: float) -> Tensor:
        """The units that are outside the keep-set from now on; shape ``(count,)``."""

    @abstractmethod
    def _remove_faded(self, optimizer: torch.optim.Optimizer) -> Removed | None:
        """Remove what reads zero, if it is worth a surgery."""

    @abstractmethod
    def _silence(self) -> None:
        """Take all hooks away."""

    def _hold(self, optimizer: torch.optim.Optimizer) -> None:
        """Put back to zero what stays zero without being removed; most methods have nothing of the kind."""
        return

    # -- one step ------------------------------------------------------------------------------------------------------

    def step(self, *, progress: float, optimizer: torch.optim.Optimizer) -> Removed | None:
        self._hold(optimizer)
        if self.done:
            return None
        self._steps += 1
        self._listen(progress)
        self._last = progress
        if progress - self._decided >= self.method.every and progress >= self.method.start_at and not self.settled:
            self._decide(progress)
        removed = None
        if progress - self._pressed_at >= self.method.fade / PRESSES:
            self._press(progress - self._pressed_at, optimizer)
            self._adapt(progress)
            self._pressed_at = progress
            removed = self._remove_faded(optimizer)
        return removed

    def _hear_every_fourth(self) -> None:
        self.sensitivity.batch_done()
        self.sensitivity.listening = self._steps % LISTEN_EVERY == 0

    def _norm(self) -> Tensor:
        return self.units.consumer_energy().sqrt()

    # -- keep-set ------------------------------------------------------------------------------------------------------

    def limits_at(self, progress: float) -> dict[str, int]:
        """The budget now: from the dense cost to the target, fast at first (cubic, Zhu & Gupta 2017)."""
        begin, end = self.method.start_at, self.method.reach - self.method.fade
        left = (1.0 - min(max((progress - begin) / (end - begin), 0.0), 1.0)) ** self.method.power
        return {m: math.floor(limit + (getattr(self.dense, m) - limit) * left) for m, limit in self.limits.items()}

    def _decide(self, progress: float) -> None:
        self._decided = progress
        self.settled = progress >= self.method.reach - self.method.fade
        outside = self._choose(progress)
        fresh = outside & ~self.pressed
        if bool(fresh.any()):
            self.reference = torch.where(fresh, torch.maximum(self._norm(), self.least), self.reference)
            self.since = torch.where(fresh, torch.full_like(self.since, progress), self.since)
        self.pressed = outside
        self._find_busy()

    def _find_busy(self) -> None:
        padded = torch.cat([self.pressed, self.pressed.new_zeros(1)])
        self._busy = [c for c in self.units.consumers if bool(padded[c.owner].any())]

    # -- pressure ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _press(self, elapsed: float, optimizer: torch.optim.Optimizer) -> None:
        if not self._busy:
            return
        norm = self._norm()
        threshold = self.strength * elapsed / self.method.fade * self.pull * self.reference
        factor = torch.where(self.pressed, (1.0 - threshold / norm.clamp_min(1e-30)).clamp_min(0.0), 1.0)
        factor = torch.cat([factor, factor.new_ones(1)])
        calm = torch.cat([(~self.pressed).float(), factor.new_ones(1)])
        for columns in self._busy:
            columns.parameter.mul_(columns.spread(factor))
            state = optimizer.state.get(columns.parameter, {})
            for key in MOMENTA:
                if isinstance(state.get(key), Tensor):
                    state[key].mul_(columns.spread(calm))

    # -- strength ------------------------------------------------------------------------------------------------------

    def _adapt(self, progress: float) -> None:
        """Multiplicative control on how far the remaining mass lags behind its schedule."""
        if not bool(self.pressed.any()):
            self._mass = 1.0 if not self.settled else 0.0
            return
        reference = self.reference[self.pressed]
        pull = self.pull[self.pressed]
        due = (1.0 - (progress - self.since[self.pressed]) * pull / self.method.fade).clamp(0.0, 1.0)
        total = float(reference.sum())
        self._mass = float(self._norm()[self.pressed].sum()) / total
        lag = self._mass - float((due * reference).sum()) / total
        self.strength = min(max(self.strength * math.exp(GAIN * lag), WEAKEST), STRONGEST)

    # -- removal -------------------------------------------------------------------------------------------------------

    def _faded(self) -> Tensor:
        """Pressed units that read exactly zero and whose whole group is there: a group goes in one piece, so that widths
        keep their alignment."""
        faded = (self._norm() == 0) & self.pressed
        group = self.units.group_of()
        waiting = torch.zeros(self.units.groups, device=faded.device).index_add_(
            0, group, (self.pressed & ~faded).float()
        )
        return faded & (waiting[group] == 0)

    def _keep_rows(self, survivors: Tensor) -> None:
        self.pressed, self.reference = self.pressed[survivors], self.reference[survivors]
        self.since, self.pull, self.least = self.since[survivors], self.pull[survivors], self.least[survivors]
        self._find_busy()

    def _finished(self) -> None:
        self.done = True
        self._mass, self.strength = 0.0, 0.0
        self._silence()

    @property
    def status(self) -> Status:
        return Status(self.cost, self.strength, self._mass)

    # -- resume --------------------------------------------------------------------------------------------------------

    def _numbers(self) -> dict[str, Any]:
        """Everything but rows, as plain values."""
        return {
            "numbers": {n: getattr(self, n) for n in _NUMBERS},
            "batches": self.sensitivity.batches,
            "listening": self.sensitivity.listening,
            "dense": [self.dense.macs, self.dense.params, self.dense.activation_memory],
            "limits": dict(self.limits),
        }

    def _rows(self) -> dict[str, Tensor]:
        """Everything with one value per unit."""
        return {
            "value": self.sensitivity.value,
            "pressed": self.pressed,
            "reference": self.reference,
            "since": self.since,
            "pull": self.pull,
        }

    def _restore(self, state: dict[str, Any], rows: dict[str, Tensor]) -> None:
        for name, value in state["numbers"].items():
            setattr(self, name, value)
        self.dense = type(self.dense)(*state["dense"])
        self.limits = dict(state["limits"])
        rows = {n: r.to(self.units.device) for n, r in rows.items()}
        self.sensitivity.value, self.sensitivity.batches = rows["value"], state["batches"]
        self.sensitivity.listening = state["listening"]
        self.pressed, self.reference, self.since = rows["pressed"], rows["reference"], rows["since"]
        self.pull = rows["pull"]
        self.least = torch.full_like(self.reference, TINY)
        self._find_busy()


LISTEN_EVERY = 4  # batches between two readings of the gradients
TINY = 1e-12  # norm of a unit that has none
PRESSES = 32  # proximal steps while one unit fades
GAIN, WEAKEST, STRONGEST = 0.5, 0.5, 20.0  # of the strength's control loop
MOMENTA = ("momentum_buffer", "exp_avg")
_NUMBERS = ("settled", "done", "forced", "strength", "_last", "_decided", "_pressed_at", "_steps", "_mass")
