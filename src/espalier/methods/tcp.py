"""TCP, tailored channel pruning: train once, arrive at the budget, with nothing cut by force at the end.

Lee, Jeon, Lee, Kim: "Tailored Channel Pruning: Achieve Targeted Model Complexity Through Adaptive Sparsity
Regularization", IEEE Access 13, 2025.  The paper fixes the idea: while the network trains, a budget decides which channels
stay (the keep-set); a sparsity regularisation whose strength adapts presses only on the others, until removing them
changes nothing.  What follows is our reading, in the paper's order:

1. importance of every unit, smoothed over batches;
2. keep-set: the most important units inside the current budget, exactly (``solver``); the budget itself moves from the full
   cost to the target;
3. pressure: a proximal group-lasso step on everything that *reads* a unit outside the keep-set,
   ``w_c <- w_c * max(0, 1 - strength * r_c / |w_c|)`` with ``r_c`` the norm when the unit left the keep-set, so that all
   fade at the same relative pace and reach zero in finite time;
4. strength in closed loop on the remaining mass ``sum |w_c| / sum r_c`` against its schedule;
5. removal, in the middle of training, of what has reached exactly zero.  The logits do not change.

Why the readers' columns and not the BatchNorm scale of the maker: BatchNorm behind a convolution undoes a uniform shrinkage of
its inputs, a ReLU of a shifted channel emits a constant that survives a zero scale, and a channel that many layers read can
then go without folding anything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from espalier.carving import select
from espalier.costs import CostModel
from espalier.methods.base import Batches, Method, Process, Removed, Status
from espalier.methods.importance import BY_WEIGHT, SCORES, Moments, Sensitivity
from espalier.methods.units import Columns, Units
from espalier.plan import Budget
from espalier.solver import solve


@dataclass(frozen=True)
class TCP(Method):
    """Hyper-parameters of tailored channel pruning; every duration is a fraction of the whole run.

    ``importance``: a name in ``espalier.methods.importance.SCORES``; "taylor" is the sensitivity of the loss.
    ``start_at``/``reach``: the budget leaves the full cost at ``start_at``; at about ``reach`` everything outside is gone.
    ``fade``: how long a unit takes from leaving the keep-set to zero.
    ``every``: time between two decisions about the keep-set.
    ``chunk``: remove as soon as that share of the current MACs (or parameters) has faded; small values remove often.
    """

    name: ClassVar[str] = "tcp"
    trains: ClassVar[bool] = True
    importance: str = "taylor"
    start_at: float = 0.02
    reach: float = 0.5
    fade: float = 0.06
    every: float = 0.01
    chunk: float = 0.05
    smoothing: float = 0.97
    power: float = 3.0

    def __post_init__(self) -> None:
        if self.importance not in SCORES:
            raise ValueError(f"TCP(importance={self.importance!r}): choose one of {', '.join(SCORES)}")
        for name in ("start_at", "reach", "fade", "every", "chunk", "smoothing"):
            value = getattr(self, name)
            if not 0 <= value < 1 or not math.isfinite(value):
                raise ValueError(f"TCP({name}={value!r}): must be at least 0 and below 1")
        if self.fade <= 0 or self.every <= 0:
            raise ValueError("TCP(): fade and every must be above 0")
        if self.start_at + self.fade >= self.reach:
            raise ValueError(
                f"TCP(start_at={self.start_at}, fade={self.fade}, reach={self.reach}): the budget needs time to move; "
                "start_at + fade must be below reach"
            )

    def start(self, model: nn.Module, example: Any, budget: Budget, *, batches: Batches | None = None) -> Tailoring:
        return Tailoring(model, example, budget, self)


class Tailoring(Process):
    """One run of TCP."""

    def __init__(self, model: nn.Module, example: Any, budget: Budget, method: TCP) -> None:
        super().__init__(model, example, budget)
        self.method = method
        solve(self.graph, {g.name: np.ones(g.size) for g in self.graph.groups}, budget)  # unreachable budgets fail now
        self.bake()
        self.settled = False  # the keep-set is final
        self.done = False
        self.forced = False
        self.strength = 1.0
        self._last = self._decided = self._pressed_at = 0.0
        self._steps = 0
        self._mass = 1.0
        self._bind(Units(model, self.graph))
        count = self.units.count
        self.pressed = torch.zeros(count, dtype=torch.bool, device=self.units.device)
        self.reference = torch.ones(count, device=self.units.device)  # norm of the readers when pressing began
        self.since = torch.zeros(count, device=self.units.device)  # progress then

    def _bind(self, units: Units) -> None:
        """Tie hooks to the model's present parameters."""
        self.units = units
        self.sensitivity = Sensitivity(units, smoothing=self.method.smoothing)
        self.moments = Moments(self.model, units)
        if self.method.importance != "taylor":
            self.sensitivity.close()
        self._busy: list[Columns] = []

    # -- one step ------------------------------------------------------------------------------------------------------

    def step(self, *, progress: float, optimizer: torch.optim.Optimizer) -> Removed | None:
        if self.done:
            return None
        self._steps += 1
        self.sensitivity.batch_done()
        self.sensitivity.listening = self._steps % LISTEN_EVERY == 0
        soon = progress + LISTEN_EVERY * (progress - self._last) >= self._decided + self.method.every
        if self.method.importance == "share" and soon and not self.settled and not self.moments.active:
            self.moments.start()
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

    # -- 1. importance -------------------------------------------------------------------------------------------------

    def importance(self) -> Tensor:
        """Importance per unit as it is now.

        A fading unit counts for what is left of it: it comes back only if the loss asks for it strongly.  Undoing the fading
        here was tried and made the keep-set churn: every decision, a third of the pressed units came back.
        """
        if self.method.importance in BY_WEIGHT:
            return BY_WEIGHT[self.method.importance](self.model, self.units)
        if self.method.importance == "share":
            return self.moments.share() if self.moments.sums else torch.ones(self.units.count, device=self.units.device)
        return self.sensitivity.value

    def _norm(self) -> Tensor:
        return self.units.consumer_energy().sqrt()

    # -- 2. keep-set -----------------------------------------------------------------------------------------------

    def limits_at(self, progress: float) -> dict[str, int]:
        """The budget now: from the dense cost to the target, fast at first (cubic, Zhu & Gupta 2017)."""
        begin, end = self.method.start_at, self.method.reach - self.method.fade
        left = (1.0 - min(max((progress - begin) / (end - begin), 0.0), 1.0)) ** self.method.power
        return {m: math.floor(limit + (getattr(self.dense, m) - limit) * left) for m, limit in self.limits.items()}

    def _decide(self, progress: float) -> None:
        self._decided = progress
        self.settled = progress >= self.method.reach - self.method.fade
        plan = solve(
            self.graph,
            self.units.by_group(self.importance()),
            self.limits_at(progress),
            multiple_of=self.budget.multiple_of,
            protect=self.budget.protected(self.graph),
        )
        self.moments.stop()
        outside = self.units.outside(dict(plan.keep))
        fresh = outside & ~self.pressed
        if bool(fresh.any()):
            self.reference = torch.where(fresh, self._norm().clamp_min(1e-12), self.reference)
            self.since = torch.where(fresh, torch.full_like(self.since, progress), self.since)
        self.pressed = outside
        self._find_busy()

    def _find_busy(self) -> None:
        padded = torch.cat([self.pressed, self.pressed.new_zeros(1)])
        self._busy = [c for c in self.units.consumers if bool(padded[c.owner].any())]

    # -- 3. pressure ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _press(self, elapsed: float, optimizer: torch.optim.Optimizer) -> None:
        if not self._busy:
            return
        norm = self._norm()
        threshold = self.strength * elapsed / self.method.fade * self.reference
        factor = torch.where(self.pressed, (1.0 - threshold / norm.clamp_min(1e-30)).clamp_min(0.0), 1.0)
        factor = torch.cat([factor, factor.new_ones(1)])
        calm = torch.cat([(~self.pressed).float(), factor.new_ones(1)])
        for columns in self._busy:
            columns.parameter.mul_(columns.spread(factor))
            state = optimizer.state.get(columns.parameter, {})
            for key in MOMENTA:
                if isinstance(state.get(key), Tensor):
                    state[key].mul_(columns.spread(calm))

    # -- 4. strength -----------------------------------------------------------------------------------------------

    def _adapt(self, progress: float) -> None:
        """Multiplicative control on how far the remaining mass lags behind its schedule."""
        if not bool(self.pressed.any()):
            self._mass = 1.0 if not self.settled else 0.0
            return
        reference = self.reference[self.pressed]
        due = (1.0 - (progress - self.since[self.pressed]) / self.method.fade).clamp(0.0, 1.0)
        total = float(reference.sum())
        self._mass = float(self._norm()[self.pressed].sum()) / total
        lag = self._mass - float((due * reference).sum()) / total
        self.strength = min(max(self.strength * math.exp(GAIN * lag), WEAKEST), STRONGEST)

    # -- 5. removal ------------------------------------------------------------------------------------------------

    def _remove_faded(self, optimizer: torch.optim.Optimizer) -> Removed | None:
        """Remove what reads zero, group by group, once it is worth a surgery or nothing else is left to do."""
        if not bool(self.pressed.any()):
            if self.settled:
                self._finished()
            return None
        faded = (self._norm() == 0) & self.pressed
        group = self.units.group_of()
        waiting = torch.zeros(len(self.graph.groups), device=faded.device).index_add_(
            0, group, (self.pressed & ~faded).float()
        )
        ready = faded & (waiting[group] == 0)  # a group goes in one piece, so that widths keep their alignment
        if not bool(ready.any()):
            return None
        stay = {n: np.flatnonzero(~g.astype(bool)) for n, g in self.units.by_group(ready).items()}
        now = CostModel(self.graph)
        dense, then = now.cost(self.graph.sizes), now.cost(np.array([len(stay[g.name]) for g in self.graph.groups]))
        last = self.settled and bool((ready == self.pressed).all())
        saved = max(1 - then.macs / dense.macs, 1 - then.params / dense.params)
        if saved < self.method.chunk and not last:
            return None
        return self._carry_out(stay, optimizer)

    def _carry_out(self, stay: dict[str, np.ndarray], optimizer: torch.optim.Optimizer | None) -> Removed:
        survivors = torch.from_numpy(
            np.concatenate([self.units.offsets[i] + stay[g.name] for i, g in enumerate(self.graph.groups)])
        ).to(self.units.device)
        value, batches = self.sensitivity.value, self.sensitivity.batches
        gathering = self.moments.active  # what was gathered belongs to the old channels: gather anew
        self._silence()
        removed = self.remove(stay, optimizer)
        self._bind(Units(self.model, self.graph))
        self.sensitivity.value, self.sensitivity.batches = select(value, {0: survivors}), batches
        if gathering:
            self.moments.start()
        self.pressed, self.reference, self.since = (
            self.pressed[survivors],
            self.reference[survivors],
            self.since[survivors],
        )
        self._find_busy()
        if self.settled and not bool(self.pressed.any()):
            self._finished()
        return removed

    def _finished(self) -> None:
        self.done = True
        self._mass, self.strength = 0.0, 0.0
        self._silence()

    def _silence(self) -> None:
        self.sensitivity.close()
        self.moments.stop()

    def finish(self) -> nn.Module:
        """The small model.  If training stopped before everything had faded, the rest is cut here, and ``forced`` is true."""
        if not self.done:
            plan = solve(
                self.graph, self.units.by_group(self.importance()), self.limits,
                multiple_of=self.budget.multiple_of, protect=self.budget.protected(self.graph),
            )  # fmt: skip
            keep = dict(plan.keep)
            self.forced = any(len(k) < self.graph.group(n).size for n, k in keep.items())
            self._carry_out(keep, None)
            self._finished()
        return self.model

    @property
    def status(self) -> Status:
        return Status(self.cost, self.strength, self._mass)

    # -- resume --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        self.sensitivity.batch_done()
        rows = {
            "value": self.sensitivity.value,
            "pressed": self.pressed,
            "reference": self.reference,
            "since": self.since,
        }
        return {
            "numbers": {n: getattr(self, n) for n in _NUMBERS},
            "batches": self.sensitivity.batches,
            "listening": self.sensitivity.listening,
            "moments": dict(self.moments.sums) if self.moments.active else None,
            "dense": [self.dense.macs, self.dense.params, self.dense.activation_memory],
            "limits": dict(self.limits),
            "groups": {
                g.name: {k: v[a:b].clone() for k, v in rows.items()}
                for g, a, b in zip(self.graph.groups, self.units.offsets, self.units.offsets[1:], strict=False)
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own = {g.name: g.size for g in self.graph.groups}
        other = {n: len(g["value"]) for n, g in state["groups"].items()}
        if own != other:
            raise ValueError("TCP: the model does not have the structure it had when this state was saved")
        for name, value in state["numbers"].items():
            setattr(self, name, value)
        self.dense = type(self.dense)(*state["dense"])
        self.limits = dict(state["limits"])
        rows = [state["groups"][g.name] for g in self.graph.groups]
        device = self.units.device

        def row(key: str) -> Tensor:
            return torch.cat([r[key] for r in rows]).to(device) if rows else torch.zeros(0, device=device)

        self.sensitivity.value, self.sensitivity.batches = row("value"), state["batches"]
        self.sensitivity.listening = state["listening"]
        self.pressed, self.reference, self.since = row("pressed"), row("reference"), row("since")
        self._find_busy()
        if state["moments"] is not None:
            self.moments.start(state["moments"])
        if self.done:
            self._silence()


LISTEN_EVERY = 4  # batches between two readings of the gradients
PRESSES = 32  # proximal steps while one unit fades
GAIN, WEAKEST, STRONGEST = 0.5, 0.5, 20.0  # of the strength's control loop
MOMENTA = ("momentum_buffer", "exp_avg")
_NUMBERS = ("settled", "done", "forced", "strength", "_last", "_decided", "_pressed_at", "_steps", "_mass")
