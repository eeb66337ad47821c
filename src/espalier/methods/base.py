"""What every method is: hyper-parameters on a frozen ``Method``, the state of one run on a ``Run``."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from espalier.carving import Kept
from espalier.copies import check_sound, named_tensors, unwrapped
from espalier.costs import Cost, CostModel
from espalier.forms.lowrank import BasisChange
from espalier.graph import Graph, hold, trace
from espalier.plan import Budget, Plan, need_budget
from espalier.settings import Settings
from espalier.solver import solve
from espalier.surgery import shrink_
from espalier.surgery.shrink import bake
from espalier.timing.closing import settle
from espalier.timing.family import Family
from espalier.timing.making import batched
from espalier.timing.profile import Profile

FROZEN = "its weight is frozen"  # why a layer is left as it is


def is_frozen(model: nn.Module, layer: str) -> bool:
    """Is the weight of ``layer`` not to be trained?"""
    return not model.get_parameter(f"{layer}.weight").requires_grad


Batches = Iterable[tuple[Tensor, Tensor]]  # inputs and labels


@dataclass(frozen=True)
class Removed:
    """A process has changed the model during training; ``kept`` says what stayed, for whoever holds copies of weights.

    Tensors in ``renewed`` hold something else than before, though their shapes may be the same: copies begin anew.
    The factors of the layers in ``turned`` are in another basis, after what is cut has gone: copies follow.
    Unless ``rebuilt`` the model still computes the same on the same tensors.
    """

    kept: Kept
    cost: Cost
    renewed: frozenset[str] = frozenset()
    turned: Mapping[str, BasisChange] = field(default_factory=dict)
    rebuilt: bool = True


@dataclass(frozen=True)
class Status:
    """Where a process stands, for progress bars and logs."""

    cost: Cost  # of the network as it is executed now
    strength: float  # how hard the method presses at present, in its own unit; 0 when done
    remaining: float  # share of what is to go that is still felt, 1 at the start, 0 when it can be removed


@dataclass(frozen=True)
class Method(Settings, ABC):
    """A published method: its hyper-parameters, declared as ``Settings``.  ``start`` begins a run on one model."""

    name: ClassVar[str]
    trains: ClassVar[bool]  # False: one shot, needs no data

    @property
    def needs_budget(self) -> bool:
        """Whether the budget decides how much stays; a method that decides this itself may run without one."""
        return True

    @property
    def withholds(self) -> int:
        """Training images to keep out of training, for decisions on images that were not trained on; at most a tenth of all."""
        return 0

    @abstractmethod
    def start(self, model: nn.Module, example: Any, budget: Budget, *, batches: Batches | None = None) -> Run:
        """Begin on ``model``, which is trained and shrunk in place.

        ``example`` is what ``trace`` takes.  ``batches`` are a few training batches for methods that measure something
        before they begin; others ignore them.
        """


class Run(ABC):
    """One run of a method on one model.

    In a training loop: ``loss + process.penalty()``, ``optimizer.step()``, then ``process.step(...)``; at the end
    ``process.finish()`` returns the small model.
    """

    def __init__(self, model: nn.Module, example: Any, budget: Budget, *, dense: nn.Module | None = None) -> None:
        """``dense`` is the network that fractions of the budget are of, if ``model`` is no longer that one."""
        self.model = model
        self.example = example
        self.budget = budget
        self._reference: bytes | None = None  # the dense network to be timed against
        self.graph: Graph = budget.timed(trace(model if dense is None else dense, example))
        self.dense: Cost = CostModel(self.graph).cost(self.graph.sizes)
        self.limits: dict[str, float] = budget.limits(self.dense)
        self._so_far: Plan | None = None  # until something is removed
        self._dense_graph: Graph | None = None  # ``graph`` when the first removal began
        # alternatives of ``self.graph`` -> option that is executed now; the top without an entry
        self.taken: dict[str, int] = {}
        self.skipped: dict[str, str] = {}  # layer that the method leaves as it is -> why
        # what can be plotted, kind -> layer -> (progress, value): kept in checkpoints, written into the run's folder
        self.history: dict[str, dict[str, list[list[float]]]] = {}
        self.folder: Path | None = None  # of the run, for a process that stores something of its own on the way
        self.held_out: Batches | None = None  # training images that ``Method.withholds`` asked for, to go through again

    @property
    def plan(self) -> Plan:
        """What all removals so far add up to, in units of ``dense_graph``."""
        return Plan.dense(self.dense_graph) if self._so_far is None else self._so_far

    @plan.setter
    def plan(self, plan: Plan) -> None:
        self._so_far = plan

    @property
    def stayed(self) -> Plan:
        """Old name of ``plan``."""
        warnings.warn("run.stayed is called run.plan now", DeprecationWarning, stacklevel=2)
        return self.plan

    @property
    def left(self) -> dict[str, str]:
        """Old name of ``skipped``."""
        warnings.warn("run.left is called run.skipped now", DeprecationWarning, stacklevel=2)
        return self.skipped

    @property
    def dense_graph(self) -> Graph:
        """The graph of the network that the run began with, in whose units ``plan`` counts: ``es.verify`` takes both."""
        return self.graph if self._dense_graph is None else self._dense_graph

    @dense_graph.setter
    def dense_graph(self, graph: Graph) -> None:
        self._dense_graph = graph

    @property
    def cost(self) -> Cost:
        """Of the network as it is executed now."""
        keep = [self.taken.get(g.name, g.size) for g in self.graph.groups]
        return CostModel(self.graph).cost(np.array(keep, dtype=np.int64))

    @property
    def counted(self) -> Cost | None:
        """What a method that meets its budget by *counting* zeros counts now, beside ``cost``, which is what is executed."""
        return None

    def bake(self) -> None:
        """Make convolutions with computed weights plain: such a weight can neither fade nor be factorised."""
        if self.graph.baked:
            for name in self.graph.baked:
                bake(self.model, name)
            self.graph = self.budget.timed(trace(self.model, self.example))

    @property
    def widths(self) -> dict[str, int]:
        """Kept units of every group of the network as it is executed now; of a group of alternatives, its option."""
        return {g.name: self.taken.get(g.name, g.size) for g in self.graph.groups}

    def hold_frozen(self) -> None:
        """Channels that a frozen weight reads stay: it may not fade, and has no gradient that says what they are worth."""
        frozen = {n for n, p in named_tensors(self.model)[0].items() if not p.requires_grad}
        read = [g.name for g in self.graph.groups if any(s.tensor in frozen for s in g.consumers)]
        self.graph = hold(self.graph, read, "is read by frozen weights")

    def decide(
        self,
        importance: Mapping[str, np.ndarray],
        *,
        per_cost: bool = True,
        rules: Mapping[str, Any] | None = None,
    ) -> Plan:
        """The units to keep for good; ``rules`` are further options of ``solve``.

        Where time is limited, the plan is built and measured until its time is right.
        """
        rules = rules or {}
        if self.budget.latency is None:
            return solve(self.graph, importance, self.budget, per_cost=per_cost, **rules)
        assert isinstance(self.budget.profile, Profile)
        family = Family(self.model, self.graph, batched(self.example, self.budget.profile.setting.batch))
        if self._reference is None and self._dense_graph is None:  # nothing has gone yet
            self._reference = family.file(Plan.dense(self.graph))
        found = settle(family, self._reference, importance, self.budget, per_cost=per_cost, rules=rules)
        self.budget, self.graph = found.budget, found.budget.timed(self.graph)
        return found.plan

    def remove(self, units: Mapping[str, np.ndarray], optimizer: torch.optim.Optimizer | None) -> Removed:
        """Shrink the model to ``units`` in place and move on to the graph of what is left."""
        self._dense_graph = self.dense_graph
        kept = shrink_(self.model, self.graph, Plan(units), optimizer=optimizer)
        before = {n: self.plan.keep.get(n, np.arange(self.graph.group(n).size)) for n in units}
        self.plan = Plan(
            {**self.plan.keep, **{n: before[n][np.asarray(stay)] for n, stay in units.items()}},
            {**{n: self.graph.group(n).size for n in units}, **self.plan.sizes},
        )
        self.graph = self.graph.after(units)
        return Removed(kept, self.cost)

    def options_stay(self) -> None:
        """The plan of a method that gives layers other forms: of alternatives the options up to the one taken, all channels."""
        keep = {g.name: np.arange(self.taken.get(g.name, g.size)) for g in self.graph.groups}
        self.plan = Plan(keep, {g.name: g.size for g in self.graph.groups})

    def record(self, kind: str, values: Mapping[str, float], *, progress: float) -> None:
        """Add a point to ``history`` for every value that has changed."""
        series = self.history.setdefault(kind, {})
        for name, value in values.items():
            points = series.setdefault(name, [])
            if not points or points[-1][1] != value:
                points.append([progress, value])

    def penalty(self) -> Tensor | float:
        """What the method adds to the loss; 0.0 for methods that act after the optimiser."""
        return 0.0

    def rate(self, progress: float) -> float | None:
        """Share of the peak learning rate that the method wants now; ``None``: the loop's own schedule."""
        return None

    @abstractmethod
    def step(self, *, progress: float, optimizer: torch.optim.Optimizer) -> Removed | None:
        """After every optimiser step.  ``progress`` runs from 0 to 1; returns what was removed, if anything was.

        Raises: ValueError for another ``progress`` (``need_progress``).
        """

    @abstractmethod
    def finish(self) -> nn.Module:
        """Carry out what is left to do and return the model, a plain ``nn.Module`` that meets the budget."""

    @property
    @abstractmethod
    def status(self) -> Status: ...

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers; with the model's weights and structure enough to go on exactly."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict()``; the model must already have the structure it had then."""


Process = Run  # its old name, for methods written outside


def need_progress(progress: float) -> None:
    """Raises: ValueError unless ``progress`` is from 0 to 1, but for the rounding of sums."""
    if not -1e-6 <= progress <= 1.0 + 1e-6:
        raise ValueError(
            f"step(progress={progress!r}): must be the share of training that is done, from 0 to 1: (step + 1) / steps in all"
        )


class AtOnce(Run):
    """A run of a method that does everything when it starts; what follows is ordinary training of the small network."""

    def step(self, *, progress: float, optimizer: torch.optim.Optimizer) -> Removed | None:
        need_progress(progress)
        return None

    def finish(self) -> nn.Module:
        return self.model

    @property
    def status(self) -> Status:
        return Status(self.cost, 0.0, 0.0)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        del state


WHOLE = Budget(macs=1.0, params=1.0)
"""No budget: the network may cost what the dense one costs."""


def budget_for(method: Method, budget: Budget | None) -> Budget:
    """``budget``, or ``WHOLE`` for a method that can do without one.  Raises: ValueError for the others, and for no method."""
    if not isinstance(method, Method):
        name = method.__name__ if isinstance(method, type) else type(method).__name__
        raise ValueError(f"method: expected a method, for example es.TCP(), got {name}; a class has to be called")
    if budget is None and method.needs_budget:
        raise ValueError(f"{method.name} needs a budget: give Budget(macs=0.5), for example")
    if budget is None:
        return WHOLE
    need_budget(budget)
    return budget


def attach(model: nn.Module, example: Any, *, budget: Budget | None = None, method: Method) -> Run:
    """Compress ``model`` inside your own training loop; it is trained and shrunk in place.

    Methods that find the size by themselves take no ``budget``.

    Make the optimiser from ``run.model.parameters()`` after this call; removals carry its state along.

    >>> run = es.attach(model, example, budget=es.Budget(macs=0.5), method=es.TCP())   # doctest: +SKIP
    >>> for step, (x, y) in enumerate(loader):                                         # doctest: +SKIP
    ...     loss = criterion(run.model(x), y) + run.penalty()
    ...     loss.backward(); optimizer.step(); optimizer.zero_grad()
    ...     run.step(progress=(step + 1) / total, optimizer=optimizer)
    >>> small = run.finish()                                                           # doctest: +SKIP
    """
    model = unwrapped(model, who="attach", in_place=True)
    check_sound(model, who="attach")
    return method.start(model, example, budget_for(method, budget))
