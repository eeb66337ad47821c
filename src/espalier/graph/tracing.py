"""``trace(model, example) -> Graph``: watch one forward, then rehearse smaller ones to prove that it was understood."""

from __future__ import annotations

import random
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from espalier.carving import Kept, carve
from espalier.copies import copied, named_modules, named_tensors, unwrapped
from espalier.graph.graph import Extent, Frozen, Graph, Group, Site, Slice, Span, Term
from espalier.graph.rehearsal import Rehearsal, Rehearsed, Units, widths
from espalier.graph.rules import RULES
from espalier.graph.shapes import META
from espalier.graph.watch import (
    FROZEN,
    Axis,
    Lessons,
    Memory,
    Mismatch,
    Place,
    RawSpan,
    Reason,
    Record,
    TraceError,
    TraceTimeout,
    Watch,
    first_line,
    is_users,
    tensors_in,
)
from espalier.graph.watchdog import watchdog

MANY = 8  # layers found out one by one before all that are called from the same line are fixed
_TRIED_OUT = ("view", "_unsafe_view", "split", "slice", "chunk")


def trace(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | dict[str, Any],
    *,
    time_limit: float = 60.0,
    rehearse: bool = True,
) -> Graph:
    """Find which channels of ``model`` can be removed, which go together, and what everything costs.

    ``example_inputs`` is a tensor, a tuple of positional or a dictionary of keyword arguments; costs are counted for
    exactly this input, so give a batch of one.  The forward runs on meta copies: no arithmetic, no memory, the model is
    not touched.  If it cannot run there (data-dependent code), a private copy runs on the CPU instead.

    The result is then proven by rehearsals: smaller copies, at several widths (``graph.rehearsal.widths``), are watched in
    eval and in train mode; every operation must give the shapes, channels and numbers that were predicted.  What does not is
    frozen and listed: the line of the user's code, else the channels whose width it follows, else the module around.

    Raises ``TraceError`` (a ``ValueError``) naming operation, module and source line; ``TraceTimeout`` after
    ``time_limit`` seconds.
    """
    model = unwrapped(model, who="trace")
    deadline = time.monotonic() + time_limit
    with watchdog(deadline), torch.inference_mode(False):
        return _understood(model, example_inputs, deadline, rehearse).graph


def observe(model: nn.Module, example: Any, *, taught_by: Graph | None = None, time_limit: float = 60.0) -> Stage:
    """Watch ``model`` in eval and in train mode without rehearsing, by what the rehearsals of ``taught_by`` have taught."""
    lessons = Lessons()
    if taught_by is not None:
        lessons.lines = {(line, op): level for line, op, level in taught_by.fixed_lines}
        reason = Reason("the module around these channels works for one size only", Place("", type(model).__name__, ""))
        lessons.modules = dict.fromkeys(taught_by.fixed_modules, reason)
        lessons.positions = {n for n, _ in model.named_modules()} - taught_by.group_width.keys()
    deadline = time.monotonic() + time_limit
    with watchdog(deadline), torch.inference_mode(False):
        return _watched(model, example, lessons, deadline, "meta", {})


def _understood(model: nn.Module, example: Any, deadline: float, rehearse: bool) -> Stage:
    lessons = Lessons()
    notes: dict[Any, str] = {}
    device = "meta"
    first = 0  # the widths that found something are tried first
    while True:
        stage = _watched(model, example, lessons, deadline, device, notes)
        device = stage.device
        if _guesses_anew(lessons, stage):
            continue
        if not rehearse or not stage.graph.groups:
            return stage
        found, first = stage.first_mismatch(first)
        if found is None:
            return stage
        _learn(lessons, notes, found, stage)


def _guesses_anew(lessons: Lessons, stage: Stage) -> bool:
    """Did a guess of the watch leave channels whole that another may set free?  Then that one is next, once each.

    A view may have split channels so that the dimension that shrinks is none that a layer takes for channels; and where a
    channel shuffle lies between convolutions of many groups, whole groups hang together and only positions in all can go.
    """
    views = {key for key in stage.watch.wrong_guesses if not lessons.lines.get(key)}
    lessons.lines |= dict.fromkeys(views, 1)
    moving = {(s.tensor, s.dim) for g in stage.graph.groups if g.size > 1 for s in g.slices}
    stuck = {n for n in stage.watch.divided if (f"{n}.weight", 0) not in moving} - lessons.positions
    lessons.positions |= stuck
    return bool(views or stuck)


def _watched(
    model: nn.Module, example: Any, lessons: Lessons, deadline: float, device: str, notes: dict[Any, str]
) -> Stage:
    """On ``device``, or on the CPU where the forward cannot run there."""
    try:
        return _watch(model, example, lessons, deadline, device, notes)
    except _Failed as failed:
        if device != "cpu":
            return _watched(model, example, lessons, deadline, "cpu", notes)
        error = failed.error
        text = f"trace: the forward failed on the example input: {first_line(error)}: {failed.place}"
        raise TraceError(text) from error


class _Failed(Exception):
    """The forward raised ``error`` in the watch."""

    def __init__(self, error: Exception, place: Place) -> None:
        super().__init__(str(error))
        self.error, self.place = error, place


@dataclass(frozen=True)
class Found:
    """A mismatch, and the rehearsal that found it."""

    mismatch: Mismatch
    rehearsed: Rehearsed
    training: bool


@dataclass
class Stage:
    """What was watched, and all it takes to rehearse it."""

    model: nn.Module
    example: Any
    device: str
    deadline: float
    watch: Watch
    graph: Graph
    forwards: tuple[Forward, ...]

    def first_mismatch(self, first: int) -> tuple[Found | None, int]:
        """The first mismatch of all rehearsals, beginning with number ``first``, and the number of the one that found it."""
        stuck = [self.graph.shapes[tensor][dim] for tensor, dim in self.watch.lessons.channels]
        chosen = list(widths(self.graph, stuck))
        rehearsals = [(r, f) for f in self.forwards for r in chosen[f.rehearsals]]
        for number in (first, *(n for n in range(len(rehearsals)) if n != first)):
            if number < len(rehearsals):
                rehearsed, forward = rehearsals[number]
                mismatch = self.rehearse(rehearsed, forward)
                if mismatch is not None:
                    return Found(mismatch, rehearsed, forward.training), number
        return None, 0

    @property
    def trains_alike(self) -> bool:
        """Does the train-mode forward run what the eval-mode forward runs, random numbers and batch statistics aside?"""
        return len(self.forwards) > 1 and self.forwards[1].alike

    def delivered(self, graph: Graph, units: Units, small: nn.Module) -> Mismatch | None:
        """What ``small``, the network that keeps ``units`` of ``graph``, does otherwise than predicted, in either mode."""
        single = any(len(u) == 1 < graph.group(n).size for n, u in units.items())
        kept = graph.kept(units)
        found = (self._compare(private_copy(small, self.device), kept, forward, single) for forward in self.forwards)
        return next((m for m in found if m is not None), None)

    def rehearse(self, rehearsed: Rehearsed, forward: Forward) -> Mismatch | None:
        """Watch a copy of these widths; what does not go as predicted."""
        kept = self.graph.kept(rehearsed.units)
        if not kept:
            return None
        smaller = private_copy(self.model, self.device)
        try:
            carve(smaller, kept, group_width=self.graph.group_width)
        except Exception as error:
            return Mismatch(None, f"cannot be cut ({first_line(error)})", _blame(error, smaller))
        return self._compare(smaller, kept, forward, rehearsed.single)

    def _compare(self, smaller: nn.Module, kept: Kept, forward: Forward, single: bool) -> Mismatch | None:
        """Watch ``smaller``, which has only ``kept``, against the records of ``forward``."""
        watch = self.watch
        alive = np.ones(watch.label_count, dtype=bool)
        start = {(a.tensor, a.dim): a for a in watch.axes}
        for tensor, by_dim in kept.items():
            for dim, index in by_dim.items():
                axis = start[tensor, dim]
                of_axis = alive[axis.start : axis.start + axis.size]
                of_axis[:] = False
                of_axis[index] = True
        rehearsal = Rehearsal(forward.records, alive, self.graph.group_width, single)
        try:
            second = Watch(
                smaller, rules=RULES, lessons=watch.lessons, deadline=self.deadline, kept=kept, axes=watch.axes,
                rehearsal=rehearsal,
            )  # fmt: skip
            output = _forward(second, smaller, self.example, self.device, training=forward.training)
            rehearsal.ended(second)
        except Mismatch as mismatch:
            return mismatch
        except TraceError:
            raise
        except Exception as error:  # Python code of the forward itself
            return Mismatch(None, f"fails ({first_line(error)})", _blame(error, smaller))
        shapes = [tuple(t.shape) for t in tensors_in(output)]
        if shapes != forward.shapes and not rehearsal.loose:
            place = Place("", type(smaller).__name__, "")
            return Mismatch(None, f"gives outputs {shapes} instead of {forward.shapes}", place)
        return None


@dataclass(frozen=True)
class Forward:
    """One forward that was watched: what a rehearsal in the same mode is held against."""

    training: bool
    records: list[Record]
    shapes: list[tuple[int, ...]]  # of its outputs
    alike: bool = False  # it runs what the forward before it ran

    @property
    def rehearsals(self) -> slice:
        """Which of the widths are tried: of a train-mode forward the first, or two units, where branches turn."""
        return slice(1, 2) if self.alike else slice(3) if self.training else slice(None)


def _learn(lessons: Lessons, notes: dict[Any, str], found: Found, stage: Stage) -> None:
    """What must stay for the rehearsal to pass: the line that did not follow; the channels that move it; the module around."""
    mismatch = found.mismatch
    text = f"{mismatch.text} when widths change, so its channels are frozen: {mismatch.place}"
    key, level = mismatch.key, lessons.lines.get(mismatch.key, 0) if mismatch.key is not None else FROZEN
    if key is not None and level < FROZEN and not found.rehearsed.single:
        tried = any(f"aten.{op}." in key[1] for op in _TRIED_OUT) and level < 2
        lessons.lines[key] = level + 1 if tried else FROZEN
        lessons.reasons[key] = mismatch.reason
        if sum(op == key[1] for _, op in lessons.lines) > MANY:  # one rehearsal each would take too long
            lessons.lines[mismatch.place.line, key[1]] = FROZEN
            lessons.reasons[mismatch.place.line, key[1]] = mismatch.reason
        if lessons.lines[key] >= 2 or "split" in key[1] or "slice" in key[1]:
            notes[key] = f"{key[1]} {text}"
        return
    culprits = _culprits(found, stage)
    single = found.rehearsed.single
    if (
        len(culprits) > 1
    ):  # together they do it: of two widths that became equal, hold the one that the other cannot reach
        culprits = [max(culprits, key=lambda g: g.size * g.width)]
    slices = [s for g in culprits for s in g.slices[:1] if "#" not in s.tensor]
    slices = [s for s in slices if not (single and (s.tensor, s.dim) in lessons.channels)]
    for s in slices:
        positions = s.index[-1:] if single else s.index
        lessons.channels[s.tensor, s.dim] = positions.reshape(-1), Reason(mismatch.reason, mismatch.place)
    if slices:
        if not single:
            notes[mismatch.place, mismatch.text] = f"the forward {text}"
        return
    name = mismatch.place.module
    while name in lessons.modules and name:
        name = name.rpartition(".")[0]
    lessons.modules[name] = Reason("the module around these channels works for one size only", mismatch.place)
    notes["module", name] = (
        f"{name or 'the whole model'} does not follow when widths change, so it is frozen: {mismatch.text} when widths "
        f"change: {mismatch.place}"
    )


def _culprits(found: Found, stage: Stage) -> list[Group]:
    """Groups that, cut alone, bring a mismatch: as few as a search by halves finds, none if it takes more than ``MANY``."""
    forward = next(f for f in stage.forwards if f.training == found.training)
    units = found.rehearsed.units
    groups = [g for g in stage.graph.groups if len(units[g.name]) < g.size]

    def fails(some: list[Group]) -> bool:
        cut = {g.name for g in some}
        tried = {g.name: units[g.name] if g.name in cut else np.arange(g.size) for g in stage.graph.groups}
        return stage.rehearse(Rehearsed(tried, found.rehearsed.single), forward) is not None

    guilty: list[Group] = []
    rest = groups
    while len(guilty) < MANY and not (guilty and fails(guilty)):
        low, high = 0, len(rest)  # the shortest beginning of the rest that fails together with the guilty
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if fails([*guilty, *rest[:middle]]) else (middle + 1, high)
        if low == 0 or low > len(rest):
            return guilty
        guilty, rest = [*guilty, rest[low - 1]], rest[: low - 1]
    return guilty


def _blame(error: BaseException, model: nn.Module) -> Place:
    """Where in the user's code ``error`` was raised."""
    names = {id(m): n for n, m in model.named_modules()}
    place = Place("", type(model).__name__, "")
    for frame, number in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in names:
            place = Place(names[id(owner)], type(owner).__name__, place.line)
        if is_users(frame.f_code.co_filename):
            place = replace(place, line=f"{frame.f_code.co_filename}:{number}")
    return place


# -- watching ----------------------------------------------------------------------------------------------------------


def _watch(
    model: nn.Module, example: Any, lessons: Lessons, deadline: float, device: str, notes: dict[Any, str]
) -> Stage:
    """An eval-mode and a train-mode forward on the same labels; costs are those of the first."""
    private = private_copy(model, device)
    watch = Watch(private, rules=RULES, lessons=lessons, deadline=deadline)
    try:
        output = _forward(watch, private, example, device, training=False)
    except TraceError:
        raise
    except Exception as error:
        raise _Failed(error, _blame(error, private)) from error
    forwards = [Forward(False, watch.records, [tuple(t.shape) for t in tensors_in(output)])]
    sites, memory, spans, known = watch.sites, watch.memory, watch.spans, watch.known
    reads = watch.reads
    unused = [n for n in watch.parameters if n not in reads]
    watch.sites, watch.memory, watch.spans, watch.records = [], Memory(), [], []
    watch.reads = Counter()
    trained = private_copy(model, device)  # a forward may leave caches in its copy
    watch.look_at(trained)
    try:
        output = _forward(watch, trained, example, device, training=True)
    except TraceTimeout:
        raise
    except Exception as error:  # what only training runs may need another input
        place = _blame(error, trained)
        unseen = "what only training runs was not seen"
        if unused:
            watch.freeze(watch.at_hand, "feeds what only training runs, and that failed on the example input")
            unseen = (
                f"and {unused[0]} and {len(unused) - 1} other parameters have no part in the eval-mode forward, so what they "
                "need was not seen"
            )
        notes["training"] = (
            f"the train-mode forward failed on the example input, {unseen}: {first_line(error)}: {place}"
        )
    else:
        same = _alike(forwards[0].records, watch.records)
        if same:
            watch.known = known
        shapes_ = [tuple(t.shape) for t in tensors_in(output)]
        forwards.append(Forward(True, watch.records, shapes_, alike=same))
    watch.sites, watch.memory, watch.spans, watch.reads = sites, memory, spans, reads | watch.reads
    component = _components(watch)
    graph = _build(watch, component, tuple(notes.values()))
    return Stage(model, example, device, deadline, watch, graph, tuple(forwards))


def _forward(watch: Watch, private: nn.Module, example: Any, device: str, *, training: bool) -> Any:
    """One forward of ``private`` under ``watch``; all draw the same random numbers."""
    args, kwargs = call_arguments(example, device)
    with mode(private, training=training), same_random_numbers():
        return watch.run(private, args, kwargs)


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Python's, NumPy's and torch's generators begin at a fixed point, and go on afterwards as if nothing had been drawn."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def _alike(one: list[Record], other: list[Record]) -> bool:
    """Do two forwards run the same operations on the same tensors, with the same numbers?"""
    return len(one) == len(other) and all(
        a.op is b.op
        and a.origins == b.origins
        and (a.scalars == b.scalars or repr(a.scalars) == repr(b.scalars))
        and [shape for shape, *_ in a.outputs] == [shape for shape, *_ in b.outputs]
        for a, b in zip(one, other, strict=True)
    )


def private_copy(model: nn.Module, device: str) -> nn.Module:
    """A copy whose parameters and buffers live on ``device``; on meta nothing is copied but structure."""
    memo: dict[int, Any] = {}
    parameters, buffers = named_tensors(model)
    for tensor in (*parameters.values(), *buffers.values()):
        if device == "meta" and tensor.is_contiguous() and not tensor.is_meta:
            moved = torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device=META)
        else:
            moved = tensor.detach().to(device)
            moved = moved if device == "meta" else moved.clone()
        memo[id(tensor)] = nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved
    try:
        return copied(model, memo)
    except Exception as error:
        raise TraceError(f"trace: {type(model).__name__} cannot be copied: {first_line(error)}") from error


def call_arguments(example: Any, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments with private tensors on ``device``."""

    def private(tensor: Tensor) -> Tensor:
        elsewhere = device == "meta" or tensor.device.type != device
        return tensor.detach().to(device) if elsewhere else tensor.detach().clone()

    def move(value: Any) -> Any:
        return tree_map_only(Tensor, private, value)  # also inside named tuples

    if isinstance(example, dict):
        return (), move(example)
    if isinstance(example, (tuple, list)) and not hasattr(example, "_fields"):
        return tuple(move(v) for v in example), {}
    return (move(example),), {}


@contextmanager
def mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Every module in eval mode, or in train mode except for what draws random numbers or needs a real batch."""
    before = [(m, m.training) for m in named_modules(model).values()]
    quiet = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)
    for module, was in before:
        flag = training and not isinstance(module, quiet)
        if flag != was:  # to set an attribute of a module is slow
            module.training = flag
    try:
        yield
    finally:
        for module, was in before:
            if module.training != was:
                module.training = was


# -- components: labels that live and die together ---------------------------------------------------------------------


def _components(watch: Watch) -> np.ndarray:
    """Smallest label of each connected component, shape ``(labels,)``: repeated minimum over edges, with pointer jumping."""
    parent = np.arange(watch.label_count)
    if watch.edges:
        a = np.concatenate([e[0] for e in watch.edges])
        b = np.concatenate([e[1] for e in watch.edges])
        while True:
            low = np.minimum(parent[a], parent[b])
            before = parent.copy()
            np.minimum.at(parent, before[a], low)
            np.minimum.at(parent, before[b], low)
            parent = parent[parent]
            if (parent[a] == parent[b]).all() and (parent == parent[parent]).all():
                break
    return parent


def _frozen_components(watch: Watch, component: np.ndarray) -> dict[int, str]:
    """Component -> first reason for which it may not lose anything."""
    reasons: dict[int, str] = {}
    for labels, reason in watch.freezes:
        for root in np.unique(component[labels]):
            reasons.setdefault(int(root), str(reason))
    mixes = list(watch.mixes)
    for rows, reason in mixes:
        roots = component[rows]
        bad = (roots != roots[:, :1]).any(1)
        if bad.any():
            for root in np.unique(roots[bad]):
                reasons.setdefault(int(root), str(reason))
    reasons.setdefault(0, "is fixed")
    return reasons


def _build(watch: Watch, component: np.ndarray, notes: tuple[str, ...]) -> Graph:
    """Group the components."""
    reasons = _frozen_components(watch, component)
    axes = sorted(watch.axes, key=lambda a: a.start)
    starts = np.array([a.start for a in axes], dtype=np.int64)
    labels = np.arange(1, watch.label_count)
    axis_of = np.searchsorted(starts, labels, side="right") - 1
    position = labels - starts[axis_of] if len(axes) else labels
    root = component[1:]

    consumed = np.zeros(watch.label_count, dtype=bool)
    for vector in watch.consumers:
        consumed[vector] = True
    consumed[0] = False
    has_consumer = np.zeros(watch.label_count, dtype=bool)
    has_consumer[component[np.flatnonzero(consumed)]] = True
    free = has_consumer.copy()
    free[list(reasons)] = False

    # sort all labels of free components by (component, axis, position); cut into components; equal signatures make a group
    members = np.flatnonzero(free[root])
    order = members[np.argsort(root[members], kind="stable")]  # labels are numbered axis by axis, position by position
    groups: list[tuple[list[tuple[int, int, bool]], np.ndarray]] = []
    if len(order):
        where, whose = axis_of[order], root[order]
        run = np.flatnonzero(_starts(where) | _starts(whose))  # a run: one axis, one component
        count = np.diff(np.append(run, len(order)))
        rows = np.stack([where[run], count, consumed[order[run] + 1]], axis=1)
        begin = np.flatnonzero(_starts(whose[run]))  # first run of every component
        end = [*begin[1:].tolist(), len(run)]
        for units in _equal_components(rows, begin):
            first = begin[units]
            n = end[units[0]] - int(first[0])  # runs of one component
            signature = [(a, c, bool(u)) for a, c, u in rows[first[0] : first[0] + n].tolist()]
            of_each = rows[first[:, None] + np.arange(n)]
            assert not np.count_nonzero(of_each != of_each[:1])
            labels_each = sum(c for _, c, _ in signature)
            groups.append((signature, order[run[first][:, None] + np.arange(labels_each)]))

    made: list[Group] = []
    names: dict[str, int] = {}
    group_of_label = np.full(watch.label_count, -1, dtype=np.int64)
    for signature, stacked in groups:  # stacked: (units, labels per unit)
        group_of_label[stacked.reshape(-1) + 1] = len(made)
        slices, offset, positions = [], 0, position[stacked]
        for axis_number, length, used in signature:
            axis = axes[axis_number]
            slices.append(Slice(axis.tensor, axis.dim, positions[:, offset : offset + length], used))
            offset += length
        slices.sort(key=lambda s: (s.consumed, "#" in s.tensor))
        base = _group_name(slices)
        names[base] = names.get(base, 0) + 1
        made.append(Group(base if names[base] == 1 else f"{base}~{names[base]}", len(stacked), tuple(slices)))

    extents: list[Extent] = []
    known: dict[Any, int] = {}
    sized = [a for a in axes if a.size]  # of these the lowest and the highest group of each, one after the other
    limits = (
        [f.reduceat(group_of_label, [a.start for a in sized]).tolist() for f in (np.minimum, np.maximum)]
        if sized
        else []
    )
    span = {(a.tensor, a.dim): limit for a, *limit in zip(sized, *limits, strict=True)}

    unit_sizes = [g.size for g in made]
    asked: dict[int, tuple[np.ndarray, int]] = {}

    def extent(vector: np.ndarray) -> int:
        found = asked.get(id(vector))
        if found is None:
            found = asked[id(vector)] = (vector, extent_of(group_of_label[vector]))
        return found[1]

    def extent_of(owner: np.ndarray) -> int:
        first = int(owner[0]) if len(owner) else -1
        if not np.count_nonzero(owner != first):  # as nearly always
            return extent_like(first, len(owner))
        counts = np.bincount(owner + 1)  # 0: nobody's
        numbers = counts[1:].nonzero()[0].tolist()
        return number_of((int(counts[0]), tuple((g, int(counts[g + 1]) // unit_sizes[g]) for g in numbers)))

    def extent_like(group: int, length: int) -> int:
        """Of ``length`` positions that all belong to one group, or (-1) to nobody."""
        return number_of((length, ()) if group < 0 else (0, ((group, length // unit_sizes[group]),)))

    def number_of(key: tuple[int, tuple[tuple[int, int], ...]]) -> int:
        if key not in known:
            known[key] = len(extents)
            extents.append(Extent(*key))
        return known[key]

    activations, inside, ran, spans = _moments(watch, extent)
    sites = tuple(
        Site(
            s.module, s.kind, Term(s.module, s.coefficient, tuple(extent(f) for f in s.factors)), *ran.get(s.clock, ())
        )
        for s in watch.sites
    )
    by_tensor: dict[str, list[Axis]] = {}
    for axis in axes:
        by_tensor.setdefault(axis.tensor, []).append(axis)
    shapes = {n: tuple(t.shape) for n, t in (*watch.parameters.items(), *watch.buffers.items())}
    for axis in axes:
        if "#" in axis.tensor:
            shapes[axis.tensor] = (axis.size,)
    parameters = []
    for name, parameter in watch.parameters.items():
        rest, moving = parameter.numel(), []
        for a in by_tensor.get(name, []):
            low, high = span[a.tensor, a.dim]
            if high >= 0:
                owner = group_of_label[a.start : a.start + a.size]
                moving.append(extent_like(low, a.size) if low == high else extent_of(owner))
                rest //= a.size
        parameters.append(Term(name, rest, tuple(moving)))

    frozen = []
    for axis in axes:
        if axis.dim > 1 or "#" in axis.tensor or axis.tensor not in shapes:
            continue
        if span[axis.tensor, axis.dim][0] >= 0:
            continue
        owner = group_of_label[axis.start : axis.start + axis.size]
        stuck = axis.start + np.flatnonzero(owner < 0)
        texts: dict[str, int] = {}
        for r, n in zip(*np.unique(component[stuck], return_counts=True), strict=True):
            text = reasons.get(int(r), "nothing consumes these channels")
            texts[text] = texts.get(text, 0) + int(n)
        for text, n in texts.items():
            frozen.append(Frozen(axis.tensor, axis.dim, n, text))

    return Graph(
        groups=tuple(made),
        frozen=tuple(frozen),
        extents=tuple(extents),
        sites=sites,
        parameters=tuple(parameters),
        activations=activations,
        inside=inside,
        spans=spans,
        shapes=shapes,
        group_width=dict(watch.whole_groups),
        baked=tuple(watch.baked),
        baked_away=tuple(
            n
            for n in watch.parameters
            for b in watch.baked
            if n.startswith(f"{b}.") and n[len(b) + 1 :] not in ("weight", "bias")
        ),
        unknown=tuple(watch.unknown),
        notes=notes,
        fixed_lines=tuple((*key, level) for key, level in watch.lessons.lines.items()),
        fixed_modules=tuple(watch.lessons.modules),
        reread=tuple(name for name in watch.parameters if watch.reads[name] > 1),
    )


def _starts(values: np.ndarray) -> np.ndarray:
    """True where a value differs from the one before it, and at the first."""
    new = np.ones(len(values), dtype=bool)
    np.not_equal(values[1:], values[:-1], out=new[1:])
    return new


def _equal_components(rows: np.ndarray, begin: np.ndarray) -> list[np.ndarray]:
    """Numbers of the components whose runs ``rows[begin[i]:begin[i + 1]]`` are equal, by first appearance.

    Components are told apart by a 64-bit hash of their runs; whoever uses it checks that they are equal.
    """
    place = np.arange(len(rows)) - np.repeat(begin, np.diff(np.append(begin, len(rows))))
    code = np.zeros(len(rows), dtype=np.uint64)
    for column in (place, *rows.T):
        code = (code ^ column.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)  # wraps around
        code ^= code >> np.uint64(29)
    signature = np.add.reduceat(code * (code | np.uint64(1)), begin)
    first, kind = np.unique(signature, return_index=True, return_inverse=True)[1:]
    by_kind = np.split(np.argsort(kind, kind="stable"), np.cumsum(np.bincount(kind))[:-1])
    return [by_kind[i] for i in np.argsort(first)]


def _largest(table: np.ndarray, inside: Sequence[str]) -> list[int]:
    """Rows that no other row covers in every column: what only they can be is the peak.

    A row does not count for those outside of its span, which may be left out.
    """
    order = np.argsort(-table.sum(1), kind="stable")
    stays: list[int] = []
    by_span: dict[str, list[int]] = {}
    for number in order.tolist():
        row, name = table[number], inside[number]
        outer = [n for n in by_span if not n or n == name or name.startswith(f"{n}.")]
        if not any((table[by_span[n]] >= row).all(1).any() for n in outer):
            stays.append(number)
            by_span.setdefault(name, []).append(number)
    return sorted(stays)


def _group_name(slices: list[Slice]) -> str:
    """The module that makes the channels; for a bare parameter its own name."""
    tensor = next((s.tensor for s in slices if "#" not in s.tensor and not s.tensor.endswith("bias")), slices[0].tensor)
    module, _, key = tensor.rpartition(".")
    return module if key in ("weight", "bias") and module else tensor.split("#")[0]


Moment = tuple[tuple[float, int], ...]  # (bytes per position, extent, or -1 for plain bytes)


def _moments(
    watch: Watch, extent: Any
) -> tuple[tuple[Moment, ...], tuple[str, ...], dict[int, tuple[Moment, tuple[float, int]]], tuple[Span, ...]]:
    """Live bytes at every allocation, as linear forms of extents; moments that can never be the peak are dropped.

    And the span in which each happens; at the clock of every convolution and matrix product, what was alive and what was
    made; and every span, with what was alive when it was called.
    """
    births, deaths = watch.memory.births, watch.memory.deaths
    once = Counter(s.module for s in watch.spans)
    spans = sorted((s for s in watch.spans if once[s.module] == 1), key=lambda s: (s.begin, -s.end))
    events: list[tuple[int, int, int]] = []
    form: list[tuple[int, float]] = []

    def formed(vector: np.ndarray | None, size: float) -> tuple[int, float]:
        return (-1, size) if vector is None else (extent(vector), size / len(vector))

    for number, (at, _, vector, size) in enumerate(births):
        form.append(formed(vector, size))
        events.append((at, 0, number))
        if number in deaths:
            events.append((deaths[number], 1, number))
    # a tensor released while operation t runs its successor is released after t allocated: births of t come first
    events.sort(key=lambda e: (e[0], e[1]))
    where_at = _innermost(spans, [at for at, *_ in events])
    live: dict[int, float] = {}
    sites = {s.clock for s in watch.sites}
    ran: dict[int, tuple[Moment, tuple[float, int]]] = {}
    moments: dict[tuple[str, tuple[tuple[int, float], ...]], None] = {}
    called: list[Span] = []
    for position, (at, kind, number) in enumerate(events):
        while len(called) < len(spans) and spans[len(called)].begin < at:
            called.append(_span(spans[len(called)], live, formed))
        where, size = form[number]
        live[where] = live.get(where, 0.0) + (size if kind == 0 else -size)
        if kind == 0 and at in sites:
            ran[at] = tuple((v, k) for k, v in live.items() if v > 0), (size, where)
        ends = position + 1 == len(events)
        # where a span begins or ends there may be a peak of the network without it
        if kind == 0 and (ends or events[position + 1][1] == 1 or where_at[position] != where_at[position + 1]):
            moments[where_at[position], tuple(sorted((k, v) for k, v in live.items() if v > 0))] = None
    called += [_span(s, live, formed) for s in spans[len(called) :]]
    table = np.zeros((len(moments), max((k for _, m in moments for k, _ in m), default=-1) + 2))
    for row, (_, moment) in zip(table, moments, strict=True):
        for column, size in moment:
            row[column] += size  # -1, plain bytes, is the last column
    inside = [name for name, _ in moments]
    stays = _largest(table, inside)
    last = table.shape[1] - 1
    peaks = tuple(
        tuple((float(row[k]), -1 if k == last else k) for k in row.nonzero()[0].tolist()) for row in table[stays]
    )
    return peaks, tuple(inside[i] for i in stays), ran, tuple(called)


def _span(raw: RawSpan, live: dict[int, float], formed: Any) -> Span:
    where, size = formed(raw.labels, raw.bytes)
    return Span(raw.module, tuple((v, k) for k, v in live.items() if v > 0), (size, where))


def _innermost(spans: list[RawSpan], clocks: list[int]) -> list[str]:
    """For every clock, in order, the innermost of ``spans``, which are sorted and nested, or "" outside of all."""
    found, stack, coming = [], [], 0
    for at in clocks:
        while coming < len(spans) and spans[coming].begin < at:
            stack.append(spans[coming])
            coming += 1
        stack = [s for s in stack if s.end >= at]
        found.append(stack[-1].module if stack else "")
    return found


__all__ = ["trace"]
