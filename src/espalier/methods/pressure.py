"""What fading methods share: units outside a keep-set shrink to exactly zero while the network trains, then they are removed.

A proximal group-lasso step on everything that owns a unit outside the keep-set, after the optimiser's step,
``w_c <- w_c * max(0, 1 - strength * r_c / |w_c|)`` with ``r_c`` the norm when the unit left the keep-set, so that all fade at
the same relative pace and reach zero in finite time.  The strength follows, in closed loop, the lag of the remaining mass
``sum |w_c| / sum r_c`` behind its schedule.  Which units are outside is the method's business.

The host knows which units are outside, because it decided so; what it has to ask the device it asks in one go per press.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espalier.costs import CostModel
from espalier.methods.agreement import check_run, check_soon
from espalier.methods.base import Removed, Status
from espalier.methods.importance import LISTEN_EVERY, TAYLOR, listener
from espalier.methods.pace import Closing, ClosingMethod
from espalier.methods.units import Positions, Units, upload
from espalier.plan import Budget, Plan
from espalier.settings import Portion, Positive, described


@dataclass(frozen=True, kw_only=True)
class FadingMethod(ClosingMethod):
    """The hyper-parameters that fading methods share; every duration is a fraction of the whole run."""

    start_at: Annotated[Portion, described("when the budget leaves the full cost")] = 0.02
    end_at: Annotated[Portion, described("when, about, everything outside is gone")] = 0.5
    fade: Annotated[float, described("how long a unit takes from leaving the keep-set to zero", gt=0, lt=1)] = 0.06
    every: Annotated[float, described("time between two decisions about the keep-set", gt=0, lt=1)] = 0.01
    chunk: Annotated[
        Portion,
        described(
            "remove as soon as that share of the current MACs (or parameters) has faded; small values remove often"
        ),
    ] = 0.05
    smoothing: Annotated[Portion, described("of the importance, over batches")] = 0.97
    power: Annotated[Positive, described("how fast the budget falls at first; 1 is a straight line")] = 3.0

    @property
    def closed_at(self) -> float:
        return self.end_at - self.fade

    @property
    def scored_by(self) -> str:
        """A name in ``methods.importance.SCORES``."""
        return TAYLOR

    def check_pace(self) -> None:
        """``ValueError`` unless the fractions make sense together."""
        if self.start_at + self.fade >= self.end_at:
            raise ValueError(
                f"{type(self).__name__}(start_at={self.start_at}, fade={self.fade}, end_at={self.end_at}): the budget needs "
                "time to move; start_at + fade must be below end_at"
            )


class Fading(Closing):
    """A run in which units fade.  A method says what is important, and what its keep-set is."""

    method: FadingMethod
    units: Units
    remembers: ClassVar[tuple[str, ...]] = ("strength", "_decided", "_pressed_at", "_mass")
    per_unit: ClassVar[tuple[str, ...]] = ("pressed", "reference", "since", "pull")

    def __init__(self, model: nn.Module, example: Any, budget: Budget, method: FadingMethod) -> None:
        super().__init__(model, example, budget, method)
        self.strength = 1.0
        self._decided = self._pressed_at = 0.0
        self._mass = 1.0
        self.bake()
        self.hold_frozen()

    def _begin(self) -> None:
        """Nothing is pressed yet; call once ``graph`` has all that may go."""
        self._bind()
        count = self.units.count
        self.pressed = torch.zeros(count, dtype=torch.bool, device=self.units.device)
        self.reference = torch.ones(count, device=self.units.device)  # norm of what owns a unit when pressing began
        self.since = torch.zeros(count, device=self.units.device)  # progress then
        self.pull = torch.ones(count, device=self.units.device)  # how fast a unit fades, relative to the others
        self._find_busy(np.zeros(count, dtype=bool))

    # -- what a method adds --------------------------------------------------------------------------------------------

    def _bind(self) -> None:
        self.units = self._units()
        self.score = listener(self.method.scored_by, self.model, self.units, smoothing=self.method.smoothing)

    def _units(self) -> Units:
        return Units(self.model, self.graph)

    @abstractmethod
    def keep_set(self, limits: Mapping[str, float], progress: float) -> Plan:
        """What stays inside ``limits``."""

    def _outside_of(self, plan: Plan) -> np.ndarray:
        """The units that ``plan`` leaves out; shape ``(count,)``."""
        return self.units.outside(plan.keep)

    def stays(self, outside: np.ndarray) -> bool:
        """Whether nothing need be decided any more, now that ``outside`` is to go."""
        return False

    def _adapt_to(self, plan: Plan, outside: np.ndarray) -> None:
        """Adapt ``pull`` to a new keep-set."""
        return

    # -- one step ------------------------------------------------------------------------------------------------------

    def step(self, *, progress: float, optimizer: torch.optim.Optimizer) -> Removed | None:
        self.check_step(progress, optimizer)
        if self.done:
            return None
        self._steps += 1
        method = self.method
        near = progress + LISTEN_EVERY * (progress - self._last) >= self._decided + method.every
        self.score.hear(self._steps, soon=near and not self.settled)
        self._last = progress
        if not self.settled and progress >= method.start_at and progress - self._decided >= method.every:
            plan = self.keep_set(self.limits_at(progress), progress)
            self._decided = progress
            self.settled = progress >= method.closed_at or self.stays(self._outside_of(plan))
            self._aim(plan, progress)
        if progress - self._pressed_at >= method.fade / PRESSES:
            self._press(progress - self._pressed_at, optimizer)
            self._adapt(progress)
            self._pressed_at = progress
            removed = self._remove_faded(optimizer)
            if removed is not None:
                check_run(self)
                return removed
        return self._go_on(progress, optimizer)

    def _go_on(self, progress: float, optimizer: torch.optim.Optimizer) -> Removed | None:
        """What a method does beside fading, in a step that removed nothing."""
        return None

    def _norm(self) -> Tensor:
        return self.units.consumer_energy().sqrt()

    # -- keep-set ------------------------------------------------------------------------------------------------------

    def _aim(self, plan: Plan, progress: float) -> None:
        """From now on press on what ``plan`` leaves out."""
        self.score.decided()
        outside = self._outside_of(plan)
        check_soon("the keep-set", outside.tobytes(), self.units.device)
        self._adapt_to(plan, outside)
        fresh = upload(outside & ~self._outside, self.units.device)
        self.reference = torch.where(fresh, self._norm().clamp_min(TINY), self.reference)
        self.since = self.since.masked_fill(fresh, progress)
        self.pressed = upload(outside, self.units.device)
        self._find_busy(outside)

    def _find_busy(self, outside: np.ndarray) -> None:
        """Note what follows from ``outside``, a copy of ``pressed`` on the host."""
        self._outside = outside
        self._zero = np.zeros(len(outside), dtype=bool)  # those outside whose norm was zero after the last press
        self._index = upload(np.flatnonzero(outside), self.units.device)
        padded = np.append(outside, False)
        busy = [n for n, owner in enumerate(self.units.read) if padded[owner].any()]
        self._busy: list[Positions] = [self.units.consumers[n] for n in busy]
        if busy:
            self._spots = upload(np.concatenate([self.units.read[n] for n in busy]), self.units.device)
            self._calm = self._spread((~self.pressed).float())

    def _spread(self, per_unit: Tensor) -> list[Tensor]:
        """Values per unit, for every busy consumer to be broadcast against its parameter; 1 where no unit owns it."""
        values = F.pad(per_unit, (0, 1), value=1.0)[self._spots]
        parts = values.split([len(c.owner) for c in self._busy])
        return [columns.shaped(part) for columns, part in zip(self._busy, parts, strict=True)]

    # -- pressure ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _press(self, elapsed: float, optimizer: torch.optim.Optimizer) -> None:
        if not self._busy:
            return
        norm = self._norm()
        threshold = self.strength * elapsed / self.method.fade * self.pull * self.reference
        factor = torch.where(self.pressed, (1.0 - threshold / norm.clamp_min(1e-30)).clamp_min(0.0), 1.0)
        values: list[Tensor] = [columns.parameter for columns in self._busy]
        factors = self._spread(factor)
        for key in MOMENTA:
            for columns, calm in zip(self._busy, self._calm, strict=True):
                moment = optimizer.state.get(columns.parameter, {}).get(key)
                if isinstance(moment, Tensor):
                    values.append(moment)
                    factors.append(calm)
        torch._foreach_mul_(values, factors)

    # -- strength ------------------------------------------------------------------------------------------------------

    def _adapt(self, progress: float) -> None:
        """Multiplicative control on how far the remaining mass lags behind its schedule."""
        if not self._outside.any():
            self._mass = 1.0 if not self.settled else 0.0
            return
        norm, reference, since, pull = (v[self._index] for v in (self._norm(), self.reference, self.since, self.pull))
        due = (1.0 - (progress - since) * pull / self.method.fade).clamp(0.0, 1.0)
        sums = torch.stack([reference.sum(), norm.sum(), (due * reference).sum()])
        found = torch.cat([sums, norm]).cpu().numpy()  # the only wait for the device
        total, left, planned = found[:3].tolist()
        self._zero[self._outside] = found[3:] == 0
        self._mass = left / total
        lag = self._mass - planned / total
        self.strength = min(max(self.strength * math.exp(min(GAIN * lag, 100.0)), WEAKEST), STRONGEST)

    # -- removal -------------------------------------------------------------------------------------------------------

    def _remove_faded(self, optimizer: torch.optim.Optimizer) -> Removed | None:
        """Remove what reads zero, group by group, once it is worth a surgery or nothing else is left to do."""
        if not self._outside.any():
            if self.settled:
                self._finished()
            return None
        ready, last = self._ready()
        if not ready.any():
            return None
        stay = self._stay(ready)
        if not self._worth_a_surgery(stay, last=last):
            return None
        return self.realise(stay, optimizer)

    def _ready(self) -> tuple[np.ndarray, bool]:
        """What can be removed, and whether it is all that is to go."""
        faded = self._faded()
        return faded, bool((faded == self._outside).all())

    def _stay(self, ready: np.ndarray) -> dict[str, np.ndarray]:
        """The units that stay when ``ready`` goes, by group."""
        return {n: np.flatnonzero(~gone) for n, gone in self.units.split(ready).items()}

    def _faded(self) -> np.ndarray:
        """Pressed units that read exactly zero and whose whole group is there: a group goes in one piece, so that widths
        keep their alignment."""
        group = self.units.group_of()
        waiting = np.bincount(group[self._outside & ~self._zero], minlength=self.units.groups)
        return self._zero & (waiting[group] == 0)

    def _worth_a_surgery(self, stay: Mapping[str, np.ndarray], *, last: bool) -> bool:
        """Would keeping ``stay`` save a ``chunk`` of what the network costs now, or is nothing else left to do?"""
        now = CostModel(self.graph)
        dense, then = now.cost(self.graph.sizes), now.cost(np.array([len(stay[g.name]) for g in self.graph.groups]))
        saved = max(1 - then.macs / dense.macs, 1 - then.params / dense.params)
        return saved >= self.method.chunk or (self.settled and last)

    def realise(self, stay: Mapping[str, np.ndarray], optimizer: torch.optim.Optimizer | None) -> Removed:
        """Cut the model to the units ``stay``, by group, and move on with what is left."""
        survivors, heard = self._survivors(stay), self.score
        self._silence()
        removed = self._cut(stay, optimizer)
        self._bind()
        self.score.follow(heard, survivors)
        self.follow(survivors)
        self._find_busy(self._outside[survivors])
        if self.settled and not self._outside.any():
            self._finished()
        return removed

    def _survivors(self, stay: Mapping[str, np.ndarray]) -> np.ndarray:
        """Numbers of the units that are there afterwards."""
        return np.concatenate([self.units.offsets[i] + stay[g.name] for i, g in enumerate(self.graph.groups)])

    def _cut(self, stay: Mapping[str, np.ndarray], optimizer: torch.optim.Optimizer | None) -> Removed:
        return self.remove(stay, optimizer)

    def finish(self) -> nn.Module:
        """The small model.  If training stopped before everything had faded, the rest is cut here, and ``forced`` is true."""
        if not self.done:
            plan = self.keep_set(self.limits, 1.0)
            stay = {g.name: np.asarray(plan.keep[g.name]) for g in self.graph.groups if g.name in plan.keep}
            less = any(len(units) < self.graph.group(n).size for n, units in stay.items())  # options too
            self.forced = less or bool(self._outside_of(plan).any())
            self.realise(stay, None)
            self._finished()
        return self.model

    def _finished(self) -> None:
        super()._finished()
        self._mass, self.strength = 0.0, 0.0

    @property
    def status(self) -> Status:
        return Status(self.cost, self.strength, self._mass)

    def restored(self) -> None:
        self._find_busy(self.pressed.cpu().numpy())
        if self.done:
            self._silence()


TINY = 1e-12  # norm of a unit that has none
PRESSES = 32  # proximal steps while one unit fades
GAIN, WEAKEST, STRONGEST = 0.5, 0.5, 20.0  # of the strength's control loop
MOMENTA = ("momentum_buffer", "exp_avg")
