"""What every method is: hyper-parameters on a frozen ``Method``, the state of one run on a ``Run``."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from espalier.carving import Kept, make_plain
from espalier.copies import check_free, check_sound, device_of, named_tensors, unwrapped
from espalier.costs import COUNTS, LATENCY, Cost, CostModel
from espalier.forms.lowrank import BasisChange
from espalier.graph import Graph, files, hold, trace
from espalier.methods.agreement import check_run, check_same, once, share, take_from_first
from espalier.methods.blocks import block_rules, offer_blocks, worth_of_blocks
from espalier.methods.state import plain, restored
from espalier.plan import Budget, Plan, need_budget
from espalier.settings import Settings
from espalier.solver import BudgetError, solve
from espalier.surgery import rebuild, shrink_, structure
from espalier.surgery.shrink import bake
from espalier.tasks import Task, TaskBatches, need_task
from espalier.timing.closing import calibrated, settle
from espalier.timing.family import Family
from espalier.timing.forms import measured as with_forms
from espalier.timing.making import batched, is_here, need_here
from espalier.timing.profile import Profile, from_json, to_json

Batches = Iterable[tuple[Any, Any]]  # inputs and targets; ``TaskBatches`` unless they are a classifier's


@dataclass(frozen=True)
class Removed:
    """A run has changed the model during training; ``kept`` says what stayed, for whoever holds copies of weights.

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
    """Where a run stands, for progress bars and logs."""

    cost: Cost  # of the network as it is executed now
    strength: float  # how hard the method presses at present, in its own unit; 0 when done
    remaining: float  # share of what is to go that is still felt, 1 at the start, 0 when it can be removed


@dataclass(frozen=True)
class Method(Settings, ABC):
    """A published method: its hyper-parameters, declared as ``Settings``.  ``start`` begins a run on one model.

    The docstring of each says what durations are fractions of, and ends in ``Source:`` with author, title and year.
    """

    name: ClassVar[str]
    trains: ClassVar[bool]  # False: one shot, needs no data
    formerly: ClassVar[Mapping[str, str]] = {
        "reach": "end_at",
        "returns": "share_exponent",
        "pull": "penalty_exponent",
        "settle": "finetune_lr",
        "rise": "finetune_warmup",
        "beyond": "noise_weight",
    }
    dropped: ClassVar[Mapping[str, Any]] = {"stripes": False, "workers": 1}

    @classmethod
    def as_of_now(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings as an older version wrote them down, by their present names; without dropped ones that did nothing."""
        there = {
            name: value for name, value in settings.items() if name not in cls.dropped or value != cls.dropped[name]
        }
        return {cls.formerly.get(name, name): value for name, value in there.items()}

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

    In a training loop: ``loss + run.penalty()``, ``optimizer.step()``, then ``run.step(...)``; at the end
    ``run.finish()`` returns the small model.  ``progress`` is the share of the training that is done,
    from 0 to 1.
    """

    def __init__(self, model: nn.Module, example: Any, budget: Budget, *, dense: nn.Module | None = None) -> None:
        """``dense`` is the network that fractions of the budget are of, if ``model`` is no longer that one."""
        self.model = model
        self.example = example
        self.budget = budget
        self._reference: bytes | None = None  # the dense network to be timed against
        self.graph: Graph = budget.timed(trace(model if dense is None else dense, example))
        make_plain(model, (n.rpartition(".")[0] for n in self.graph.baked_new))  # weight norm: what it computes fades
        self.dense: Cost = CostModel(self.graph).cost(self.graph.sizes)
        self.limits: dict[str, float] = budget.limits(self.dense)
        self._so_far: Plan | None = None  # until something is removed
        self._dense_graph: Graph | None = None  # ``graph`` when the first removal began
        # alternatives of ``self.graph`` -> option that is executed now; the top without an entry
        self.taken: dict[str, int] = {}
        self.skipped: dict[str, str] = {}  # layer that the method leaves as it is -> why
        # what can be plotted, kind -> layer -> (progress, value): kept in checkpoints, written into the run's folder
        self.history: dict[str, dict[str, list[list[float]]]] = {}
        self.folder: Path | None = None  # of the run, for one that stores something of its own on the way
        self._asked = False  # for the learning rate
        self._seen: int | None = None  # the optimiser that ``checked`` was called with
        self._known = math.inf  # milliseconds of the last plan that was measured on the way to a limit on time
        self.step_above: float | None = None  # milliseconds of the next larger plan, which is above a limit on time
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

    def bake(self) -> None:
        """Make convolutions with computed weights plain: such a weight can neither fade nor be factorised."""
        computed = [
            n for n in self.graph.baked if f"{n}.weight" not in self.graph.baked_new
        ]  # the others are plain already
        for name in computed:
            bake(self.model, name)
        if computed:
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
        limits: Mapping[str, float] | None = None,
        *,
        graph: Graph | None = None,
        per_cost: bool = True,
        measured: bool = True,
        floor: Mapping[str, int] | None = None,
        ceiling: Mapping[str, int] | None = None,
    ) -> Plan:
        """The most important units inside ``limits``, for good by default; ``graph`` where it is not the run's own.

        ``importance[group]`` has shape ``(units,)``, as in ``solve``; ``limits`` are absolute.

        ``floor`` and ``ceiling``: the fewest and the most that stay of a group.

        Where time is limited for good, the plan is built and measured until its time is right, unless not ``measured``; on the
        way, plans are measured when the limit is near; by prediction alone where the profile comes from another machine.
        """
        limits, now, profile = self.limits if limits is None else limits, graph or self.graph, self.budget.profile
        worth, rules = worth_of_blocks(now, importance), {**block_rules(now), "ceiling": ceiling}
        for name, count in (floor or {}).items():
            rules["floor"][name] = max(count, rules["floor"].get(name, 0))
        final = measured and LATENCY in limits and limits == self.limits
        near = measured and LATENCY in limits and limits[LATENCY] <= NEAR * self.limits[LATENCY]
        here = near and isinstance(profile, Profile) and once(lambda: is_here(profile.setting))
        if final and here:
            plan, self.budget = once(lambda: self._plan_by_clock(now, worth, per_cost, rules))  # clocks differ
            self.graph = self.budget.timed(self.graph)
            return plan
        rules |= {"multiple_of": self.budget.multiple_of, "protect": self.budget.protected(now), "per_cost": per_cost}
        plan = self._not_too_far(solve(now, worth, limits, **rules), now, worth, limits, rules)
        while here and _latency(now, plan) < FALLEN * self._known:  # what goes does not come back
            self.budget = once(partial(self._corrected, now, plan, worth, rules))
            self.graph, now = self.budget.timed(self.graph), self.budget.timed(now)
            self._known, plan = _latency(now, plan), solve(now, worth, limits, **rules)
            plan = self._not_too_far(plan, now, worth, limits, rules)
        return plan

    def _not_too_far(
        self,
        plan: Plan,
        graph: Graph,
        worth: Mapping[str, np.ndarray],
        limits: Mapping[str, float],
        rules: Mapping[str, Any],
    ) -> Plan:
        """``plan``; on the way to a limit on time, where it comes too near to that by one step, one by which less goes."""
        near = LEAST_ROOM * self.limits.get(LATENCY, 0.0)
        if LATENCY not in limits or limits[LATENCY] <= near:
            return plan
        now = dict(limits)
        for _ in range(MOST_WIDER):
            if _latency(graph, plan) >= near:
                break
            now[LATENCY] *= WIDER
            plan = solve(graph, worth, now, **rules)
        return plan

    def _family(self, graph: Graph) -> Family:
        """What plans make of the network of now, to be measured."""
        profile = self.budget.profile
        assert isinstance(profile, Profile)
        need_here(profile)
        inputs = batched(self.example, profile.setting.batch)
        return Family(self.plain_model(), graph, inputs, put=self.put, setting=profile.setting)

    def _corrected(self, graph: Graph, plan: Plan, worth: Mapping[str, np.ndarray], rules: Mapping[str, Any]) -> Budget:
        """The budget by what ``plan`` takes."""
        found = calibrated(self._family(graph), self._reference, plan, self.budget)
        try:
            solve(found.timed(graph), worth, self.limits, **rules)
        except BudgetError:  # by this the end is out of reach, as it was not when the run began
            return self.budget
        return found

    def _plan_by_clock(
        self, graph: Graph, worth: Mapping[str, np.ndarray], per_cost: bool, rules: Mapping[str, Any]
    ) -> tuple[Plan, Budget]:
        """A plan that was built and measured, and the budget with what was learnt on the way."""
        family = self._family(graph)
        begins = self._reference is None and self._dense_graph is None  # nothing has gone yet
        if begins:
            self._reference = family.file(Plan.dense(graph))
        found = settle(family, self._reference, worth, self.budget, per_cost=per_cost, rules=rules)
        self.step_above = found.above
        if begins and not found.fits:  # now it costs nothing to say that the limit is out of reach
            solve(found.budget.timed(graph), worth, found.budget, per_cost=per_cost, **rules)
        return found.plan, found.budget

    def know_forms(self) -> None:
        """Where time is limited: measure what the forms that ``graph`` offers take, as far as nobody has."""
        if isinstance(self.budget.profile, Profile):
            profile = self.budget.profile
            known = once(lambda: with_forms(profile, self.plain_model(), self.example, self.graph, self.put))
            self.budget = replace(self.budget, profile=known)
            self.graph = known.on(self.graph)

    def plain_model(self) -> nn.Module:
        """The network whose graph ``graph`` is, in layers that anybody can shrink and export."""
        return self.model

    def put(self, model: nn.Module, options: Mapping[str, int]) -> None:
        """Give layers of a copy of ``plain_model`` the forms of ``options``, by group of alternatives; weights mean nothing."""
        raise NotImplementedError(f"{type(self).__name__} offers no forms of layers")

    def remove(self, units: Mapping[str, np.ndarray], optimizer: torch.optim.Optimizer | None) -> Removed:
        """Shrink the model to ``units`` by group, each ``(kept,)``, in place and move on to the graph of what is left."""
        self._dense_graph = self.dense_graph
        kept = shrink_(self.model, self.graph, Plan(units), optimizer=optimizer)
        before = {n: self.plan.keep.get(n, np.arange(self.graph.group(n).size)) for n in units}
        self.plan = Plan(
            {**self.plan.keep, **{n: before[n][np.asarray(stay)] for n, stay in units.items()}},
            {**{n: self.graph.group(n).size for n in units}, **self.plan.sizes},
        )
        self.graph = self.graph.after(units)
        return Removed(kept, self.cost)

    def offer_blocks(self) -> None:
        """Let the residual blocks of the network be left out; those that hold a frozen weight stay."""
        self.graph, left = offer_blocks(self.model, self.graph, self.example)
        self.skipped.update(left)

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
        """What the method adds to the loss, a scalar; 0.0 for methods that act after the optimiser."""
        return 0.0

    def averaged(self) -> None:
        """The gradients are means over all processes now; a loop that says so saves ``step`` a message of its own."""
        return

    def schedule(self, progress: float) -> float | None:
        """The method's own learning rate at ``progress``, as a share of the peak; ``None``: it has none."""
        return None

    def rate(self, progress: float) -> float | None:
        """``schedule``, for a loop that asks: the share of the peak learning rate to train with, or ``None`` for its own."""
        self._asked = True
        return self.schedule(progress)

    def lr_scale(self, progress: float, *, default: float) -> float:
        """What to multiply the peak learning rate with at ``progress``: ``default``, the loop's schedule, or the method's own.

        Ask before every step: the rate is part of some methods (``TTLC``), which warn where nobody asked.

        >>> for group in optimizer.param_groups:                                        # doctest: +SKIP
        ...     group["lr"] = peak * run.lr_scale(step / total, default=cosine(step / total))
        """
        wanted = self.rate(progress)
        return default if wanted is None else wanted

    @abstractmethod
    def step(self, *, progress: float, optimizer: torch.optim.Optimizer) -> Removed | None:
        """After every optimiser step.  ``progress`` runs from 0 to 1; returns what was removed, if anything was.

        Raises: ValueError for another ``progress``, or an optimiser that does not train the model (``check_step``).
        """

    def check_step(self, progress: float, optimizer: torch.optim.Optimizer) -> None:
        """What every ``step`` begins with.

        Raises: ValueError unless ``progress`` is from 0 to 1, and for an optimiser that was made before the run began and holds
        parameters that are no longer the model's.  Warns once where the method has a learning rate and the loop did not ask.
        """
        need_progress(progress)
        if self._seen == id(optimizer):
            return
        self._seen = id(optimizer)
        check_free(self.model, who="step")
        own = {id(p) for p in self.model.parameters()}
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        lost = [n for n, p in self.model.named_parameters() if p.requires_grad and id(p) not in held]
        if lost and held - own:
            raise ValueError(
                f"step(optimizer=...): it does not train {lost[0]!r} and holds {len(held - own)} parameters that are not the "
                "model's; make the optimiser from run.model.parameters() after es.attach"
            )
        if not self._asked and self.schedule(progress) is not None:
            warnings.warn(
                f"{type(self).__name__}: its learning rate is part of the method, and the loop did not ask for it; "
                "before every step set the rate to peak * run.lr_scale(progress, default=...)",
                stacklevel=3,
            )

    @abstractmethod
    def finish(self) -> nn.Module:
        """Carry out what is left to do and return the model, a plain ``nn.Module`` that meets the budget."""

    @property
    @abstractmethod
    def status(self) -> Status:
        """Where the run stands now."""

    # -- state ---------------------------------------------------------------------------------------------------------

    remembers: ClassVar[tuple[str, ...]] = ("step_above", "_known")
    """Attributes that a run needs to go on exactly, beside what every run has; those of base classes are added.

    Plain values, tensors, arrays, and objects with a ``state_dict`` of their own.
    """
    per_unit: ClassVar[tuple[str, ...]] = ()
    """Attributes that are tensors with one value per unit, in the order of ``units``: remembered, and cut in ``follow``."""

    def bind(self) -> None:
        """Tie hooks, and all else that hangs on parameters or on ``graph``, to those of now; called before a state is read."""
        return

    def restored(self) -> None:
        """Set anew what follows from what is remembered; called after a state was read."""
        return

    def follow(self, survivors: np.ndarray) -> None:
        """Only the units ``survivors``, ``(kept,)``, are still there: everything with one value per unit is cut along."""
        for name in self._declared("per_unit"):
            rows: Tensor = getattr(self, name)
            setattr(self, name, rows[torch.from_numpy(survivors).to(rows.device, non_blocking=True)])

    @property
    def kind(self) -> str:
        """Whose state it is: a run reads only its own."""
        return type(self).__name__

    @classmethod
    def _declared(cls, table: str) -> list[str]:
        return [name for base in reversed(cls.__mro__) for name in vars(base).get(table, ())]

    def state_dict(self, *, model: bool = True) -> dict[str, Any]:
        """What the run goes on with, plan and history included, as plain values: ``es.attach(..., state=)`` takes it.

        Without ``model`` it leaves out structure and weights of the model, for who saves these beside it.
        """
        own = {n: getattr(self, n) for n in (*self._declared("remembers"), *self._declared("per_unit"))}
        state = {
            "format": STATE,
            "kind": self.kind,
            "shapes": {n: list(p.shape) for n, p in self.model.named_parameters()},
            "dense": asdict(self.dense),
            "limits": dict(self.limits),
            "plan": None if self._so_far is None else self._so_far.to_json(),
            "dense_graph": None if self._dense_graph is None else files.to_json(self._dense_graph),
            "graph": files.to_json(self.graph),
            "taken": dict(self.taken),
            "skipped": dict(self.skipped),
            # times that were measured on the way, and the file that they are measured against
            "profile": to_json(self.budget.profile) if isinstance(self.budget.profile, Profile) else None,
            "reference": None
            if self._reference is None
            else torch.frombuffer(bytearray(self._reference), dtype=torch.uint8),
            "history": plain(self.history, "history"),
            "own": {n: v.state_dict() if hasattr(v, "state_dict") else plain(v, n) for n, v in own.items()},
        }
        if model:
            weights = {n: t.detach().clone() for n, t in self.model.state_dict().items()}
            state["model"] = {"structure": structure(self.model), "weights": weights}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``; the model must have the structure and weights of then (``es.attach`` sees to it).

        Raises: ValueError for the state of another method or network, or of an older version.
        """
        name = self.kind
        if state.get("format") != STATE:
            raise ValueError(
                f"{name}: cannot resume: this state was saved by an older version, which kept less; begin the run anew"
            )
        if state["kind"] != name:
            raise ValueError(
                f"{name}: cannot resume: this is the state of a {state['kind']}; give the method that the run began with"
            )
        shapes = {n: list(p.shape) for n, p in self.model.named_parameters()}
        odd = sorted(n for n in {**shapes, **state["shapes"]} if shapes.get(n) != state["shapes"].get(n))
        if odd:
            raise ValueError(
                f"{name}: the model does not have the structure it had when this state was saved; it differs at {odd[0]!r}"
            )
        self.dense, self.limits = Cost(**state["dense"]), dict(state["limits"])
        self._so_far = None if state["plan"] is None else Plan.from_json(state["plan"])
        self._dense_graph = None if state["dense_graph"] is None else files.from_json(state["dense_graph"])
        if state.get("profile") is not None:
            self.budget = replace(self.budget, profile=from_json(state["profile"], anyway=True))
        reference = state.get("reference")
        self._reference = None if reference is None else reference.cpu().numpy().tobytes()
        # a new trace would not find a group of which one channel is left
        self.graph = self.budget.timed(files.from_json(state["graph"]))
        self.taken, self.skipped = dict(state["taken"]), dict(state["skipped"])
        device = device_of(self.model)
        self.history = restored(state["history"], device)
        names = (*self._declared("remembers"), *self._declared("per_unit"))  # an older version knew others
        own = {n: restored(state["own"][n], device) for n in names if n in state["own"]}
        stateful = {n for n in own if hasattr(getattr(self, n), "load_state_dict")}
        for n in own.keys() - stateful:
            setattr(self, n, own[n])
        self.bind()
        for n in stateful:
            getattr(self, n).load_state_dict(own[n])
        self.restored()


STATE = "espalier-run/2"
NEAR = 1.25  # of a limit on time: from here on plans are measured
FALLEN = 0.95  # of what the last one took: the next is measured
LEAST_ROOM = 1.05  # of a limit on time: what a plan on the way leaves by prediction, for the last one is measured
WIDER, MOST_WIDER = 1.04, 8  # so much, and so often, a limit is raised that a plan on the way has fallen too far below

Process = Run  # its old name, for methods written outside


def _latency(graph: Graph, plan: Plan) -> float:
    """Predicted milliseconds."""
    return CostModel(graph).cost(plan.counts(graph)).latency or 0.0


def need_progress(progress: float) -> None:
    """Raises: ValueError unless ``progress`` is from 0 to 1, but for the rounding of sums."""
    if not -1e-6 <= progress <= 1.0 + 1e-6:
        raise ValueError(
            f"step(progress={progress!r}): must be the share of training that is done, from 0 to 1: (step + 1) / steps in all"
        )


class AtOnce(Run):
    """A run of a method that does everything when it starts; what follows is ordinary training of the small network."""

    @property
    def kind(self) -> str:
        return "AtOnce"  # nothing is left to do but to remember what was done

    def step(self, *, progress: float, optimizer: torch.optim.Optimizer) -> Removed | None:
        self.check_step(progress, optimizer)
        return None

    def finish(self) -> nn.Module:
        return self.model

    @property
    def status(self) -> Status:
        return Status(self.cost, 0.0, 0.0)


NO_BUDGET = Budget(macs=1.0, params=1.0)
"""No budget: the network may cost what the dense one costs."""


def budget_for(method: Method, budget: Budget | None) -> Budget:
    """``budget``, or ``NO_BUDGET`` for a method that needs none.  Raises: ValueError for the others, and for no method."""
    need_method(method)
    if budget is None and method.needs_budget:
        raise ValueError(f"{method.name} needs a budget: give Budget(macs=0.5), for example")
    if budget is None:
        return NO_BUDGET
    need_budget(budget)
    return budget


def need_method(method: Any) -> None:
    """Raises: ValueError for what is no method, with the one that is likely to be meant."""
    if not isinstance(method, Method):
        said = method.__name__ if isinstance(method, type) else repr(method)[:80]
        raise ValueError(f"method={said}: give a method with its settings, for example es.{_meant(method)}()")


def _meant(method: Any) -> str:
    """The class that is, or has the name of, what was given for a method."""
    if isinstance(method, type) and issubclass(method, Method):
        return method.__name__
    named = {c.name: c.__name__ for c in Method.__subclasses__() if hasattr(c, "name")}
    return named.get(str(method).lower().replace("_", "-"), "TCP")


def attach(
    model: nn.Module,
    example: Any,
    *,
    budget: Budget | None = None,
    method: Method,
    batches: Batches | None = None,
    held_out: Batches | None = None,
    state: Mapping[str, Any] | None = None,
    task: Task | None = None,
) -> Run:
    """Compress ``model`` by ``method`` inside your own training loop; it is trained and shrunk in place.

    Methods that find the size by themselves take no ``budget``.  ``batches`` are a few training batches for methods that
    measure something before they begin or search (``Magnitude(score="taylor")``, ``TTLC``); ``held_out`` are batches that are
    not trained on, for methods that choose by them, to go through again and again.  ``task`` takes both apart and says what
    their loss is: ``Classification()`` unless given.

    To go on with an interrupted run give ``model`` as it was when the run began, or one like it, and ``run.state_dict()`` as
    ``state``: structure, weights, plan and history are those of then.  The loop itself saves its optimiser and where it was.

    Make the optimiser from ``run.model.parameters()`` after this call; removals carry its state along.

    Where several processes of torch.distributed train together, all call this, and every step, with the same arguments;
    weights are those of the first process, scores are averaged, plans compared.  Gradients are averaged by the loop:
    ``average_gradients`` (``run.averaged()`` after it saves messages), or DistributedDataParallel
    around ``run.model``, made anew after a step that returned something.

    >>> run = es.attach(model, example, budget=es.Budget(macs=0.5), method=es.TCP())   # doctest: +SKIP
    >>> for step, (x, y) in enumerate(loader):                                         # doctest: +SKIP
    ...     loss = criterion(run.model(x), y) + run.penalty()
    ...     loss.backward(); optimizer.step(); optimizer.zero_grad()
    ...     run.step(progress=(step + 1) / total, optimizer=optimizer)
    >>> small = run.finish()                                                           # doctest: +SKIP

    Raises: ValueError if the budget cannot be met, or ``state`` is of another method or network.
    """
    model = unwrapped(model, who="attach", in_place=True)
    check_sound(model, who="attach")
    take_from_first(model)
    wanted = budget_for(method, budget)
    task = need_task(task)
    given = None if batches is None else TaskBatches(list(batches), task)
    check_same("batches=", _digest(given))
    if state is None:
        run = method.start(model, example, wanted, batches=given)
    else:
        if "model" not in state:
            raise ValueError("attach(state=...): it has no model; save run.state_dict() as it is")
        rebuild(model, state["model"]["structure"])
        model.load_state_dict(state["model"]["weights"])
        # fractions were of the network that the run began with, not of what is left of it by now
        limits: dict[str, Any] = {m: n for m, n in state["limits"].items() if m in COUNTS}  # times are the profile's
        absolute = to_go_on(replace(wanted, **limits), state)
        run = (
            method.start(model, example, absolute, batches=given) if method.trains else AtOnce(model, example, absolute)
        )
        run.load_state_dict(state)
    run.held_out = None if held_out is None else TaskBatches(held_out, task)
    check_run(run)
    return run


def to_go_on(budget: Budget, state: Mapping[str, Any]) -> Budget:
    """``budget`` for ``Method.start`` on what is left of a network, before ``state`` is read: with the times that the run has
    measured, and by prediction alone, because what is left would be measured as if it were the whole network."""
    profile = state.get("profile")
    return budget if profile is None else replace(budget, profile=from_json(profile, anyway=True).elsewhere())


def _digest(batches: Batches | None) -> str:
    """What tells batches of one process from those of another."""
    if batches is None or share().world == 1:
        return ""
    return repr([[float(t.double().sum()) for t in batch if isinstance(t, Tensor)] for batch in batches])
