"""``trace(model, example) -> Graph``: watch one forward, then rehearse smaller ones to prove that it was understood."""

from __future__ import annotations

import copy
import math
import operator
import random
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import GeneratorType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from espalier.carving import Kept, carve, computes_weight, make_plain, number_named
from espalier.copies import copied, named_modules, named_tensors, unwrapped
from espalier.graph.branches import AsWatched, SizesRemember, turned
from espalier.graph.call import mapped, tensors_of
from espalier.graph.constants import Value, same_value
from espalier.graph.graph import Graph, Group
from espalier.graph.grouping import build, components
from espalier.graph.numbers import Comparing, Comparison
from espalier.graph.reasons import CallPlace, Reason, is_users
from espalier.graph.rehearsal import NUMBER, Rehearsal, Rehearsed, StayingUnits, distinct, widths
from espalier.graph.rules import RULES
from espalier.graph.shapes import META
from espalier.graph.watch import (
    FROZEN,
    Axis,
    Lessons,
    Memory,
    Mismatch,
    Record,
    TensorPositions,
    TraceError,
    TraceTimeout,
    Watch,
    first_line,
    state,
    tensors_in,
    uncompiled,
)
from espalier.graph.watchdog import watchdog

MANY = 8  # layers found out one by one before all that are called from the same line are fixed
_TRIED_OUT = {"view": 2, "_unsafe_view": 2, "split": 2, "slice": 2, "chunk": 2, "roll": 1, "convolution": 1}
"""Operations of which something else is tried before all of it is fixed: how often."""


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

    The result is then proven by rehearsals, unless not ``rehearse``: smaller copies, at several widths
    (``graph.rehearsal.widths``), are watched in eval and in train mode; every operation must give the shapes, channels and
    numbers that were predicted.  What does not is frozen and listed: the line of the user's code, else the channels whose
    width it follows, else the module around.  Costs are the same without rehearsals.

    Raises: TraceError (a ValueError) naming operation, module and source line; TraceTimeout after
    ``time_limit`` seconds of processor time.
    """
    model = unwrapped(model, who="trace")
    check_example(example_inputs)
    deadline = time.thread_time() + time_limit
    with watchdog(deadline), torch.inference_mode(False):
        return _understood(model, example_inputs, deadline, rehearse).graph


def check_example(example: Any) -> None:
    """Raises: ValueError for the shape of an input in the place of one."""
    if isinstance(example, (tuple, list)) and example and all(type(size) is int for size in example):
        shape = ", ".join(map(str, example))
        raise ValueError(f"an example is an input, ({shape}) is its shape: give torch.zeros({shape})")


def observe(model: nn.Module, example: Any, *, taught_by: Graph | None = None, training: bool = True) -> Tracing:
    """Watch ``model`` in eval and in train mode without rehearsing, by what the rehearsals of ``taught_by`` have taught.

    It takes as long as it takes: what is proven was traced before, within a limit.
    """
    lessons = Lessons()
    lessons.plain = {n: None for n, m in named_modules(model).items() if computes_weight(m)}  # as it is planned
    if taught_by is not None:
        lessons.lines = {(line, op): level for line, op, level in taught_by.fixed_lines}
        lessons.turned = set(taught_by.turned_views)
        reason = Reason(
            "the module around these channels works for one size only", CallPlace("", type(model).__name__, "")
        )
        lessons.modules = dict.fromkeys(taught_by.fixed_modules, reason)
        lessons.plain = dict.fromkeys(n.rpartition(".")[0] for n in taught_by.baked_new)
        names = {*named_modules(model), *named_tensors(model)[0]}
        lessons.positions = names - taught_by.group_width.keys()
    with torch.inference_mode(False):
        return _watched(model, example, lessons, math.inf, "meta", {}, training=training)


def _understood(model: nn.Module, example: Any, deadline: float, rehearse: bool) -> Tracing:
    lessons = Lessons()
    notes: dict[Any, Reason] = {}
    device = "meta"
    first = 0  # the widths that found something are tried first
    stage: Tracing | None = None
    while True:
        stage = _watched(model, example, lessons, deadline, device, notes, before=stage)
        device = stage.device
        if _guesses_anew(lessons, stage):
            continue
        if not rehearse or not stage.graph.groups:
            return stage
        found, first = stage.first_mismatch(first)
        if found is None:
            return stage
        _learn(lessons, notes, found, stage)


def _guesses_anew(lessons: Lessons, stage: Tracing) -> bool:
    """Did a guess of the watch leave channels whole that another may set free?  Then that one is next, once each.

    A view may have split channels so that the dimension that shrinks is none that a layer takes for channels; pieces that a
    slice cuts off may be no shares of what stays; and where a channel shuffle lies between convolutions of many groups, whole
    groups hang together and only positions in all can go.
    """
    moving = {(s.tensor, s.dim) for g in stage.graph.groups if g.size > 1 for s in g.slices}

    def stay(axes: set[int]) -> bool:
        return moving.isdisjoint((stage.watch.axes[n].tensor, stage.watch.axes[n].dim) for n in axes)

    tried = {key: lessons.lines.get(key, 0) + (key in lessons.turned) for key in stage.watch.wrong_guesses}
    views = {key for key, times in tried.items() if times == 0}
    lessons.turned |= views
    # where the other guess was wrong too, the line is to be told
    told = {key: 2 for key, axes in stage.watch.wrong_guesses.items() if tried[key] == 1 and stay(axes)}
    told |= {
        key: lessons.lines.get(key, 0) + 1
        for key, axes in stage.watch.shared.items()
        if stay(axes) and axes & stage.watch.held
    }
    lessons.lines |= told
    normed = stage.watch.normed.keys() - lessons.plain.keys()
    lessons.plain |= dict.fromkeys(n for n in stage.watch.normed if n in normed)
    stuck = {n for n in stage.watch.divided if not moving & {(f"{n}.weight", 0), (n, 0)}} - lessons.positions
    lessons.positions |= stuck
    return bool(views or told or stuck or normed)


def _watched(
    model: nn.Module,
    example: Any,
    lessons: Lessons,
    deadline: float,
    device: str,
    notes: dict[Any, Reason],
    *,
    training: bool = True,
    before: Tracing | None = None,
) -> Tracing:
    """On ``device``, or on the CPU where the forward cannot run there, or there by the values that the example has."""
    try:
        return _watch(model, example, lessons, deadline, device, notes, training=training, before=before)
    except _Failed as failed:
        if device != "cpu" or lessons.every_value_passes:
            lessons.every_value_passes = device != "cpu"
            return _watched(model, example, lessons, deadline, "cpu", notes, training=training)
        error = failed.error
        text = f"trace: the forward failed on the example input: {first_line(error)}: {failed.place}"
        raise TraceError(text) from error


class _Failed(Exception):
    """The forward raised ``error`` in the watch."""

    def __init__(self, error: Exception, place: CallPlace) -> None:
        super().__init__(str(error))
        self.error, self.place = error, place


@dataclass(frozen=True)
class Found:
    """A mismatch, and the rehearsal that found it."""

    mismatch: Mismatch
    rehearsed: Rehearsed
    training: bool


@dataclass
class Tracing:
    """What was watched, and all it takes to rehearse it."""

    model: nn.Module
    example: Any
    device: str
    deadline: float
    watch: Watch
    graph: Graph
    forwards: tuple[Forward, ...]
    left: Left
    plain: frozenset[str]  # layers that compute their weight, and were watched as plain ones

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
        for forward in (f for f in self.forwards if f.looks_at_sizes):
            for rehearsed in turned(self.graph, self.watch, self._comparisons(forward)):
                mismatch = self.rehearse(rehearsed, forward)
                if mismatch is not None:
                    return Found(mismatch, rehearsed, forward.training), len(rehearsals)
        return None, 0

    def _comparisons(self, forward: Forward) -> list[Comparison]:
        """Of sizes that follow widths, in the forward of the whole network."""
        with SizesRemember(), Comparing(AsWatched(self.watch)) as comparing:
            self._compare(self._copy(self.model), {}, forward, single=False)
        return comparing.found

    def equal_numbers(self, forward: Forward) -> Iterator[tuple[tuple[str, int], Axis]]:
        """Numbers of modules that the user's code finds equal to a width, and the channels that this one counts."""
        for comparison in self._comparisons(forward):
            one, other = (self.watch.axis_of(side.labels) for side in (comparison.left, comparison.right))
            if one is None or other is None or one is other or one.size != other.size:
                continue
            number, counted = (one, other) if number_named(one.tensor) else (other, one)
            if number_named(number.tensor) and comparison.op in (operator.eq, operator.ne):
                yield (number.tensor, number.dim), counted

    @property
    def trains_alike(self) -> bool:
        """Does the train-mode forward run what the eval-mode forward runs, random numbers and batch statistics aside?"""
        return len(self.forwards) > 1 and self.forwards[1].alike

    def delivered(self, graph: Graph, units: StayingUnits, small: nn.Module) -> Mismatch | None:
        """What ``small``, the network that keeps ``units`` of ``graph``, does otherwise than predicted, in either mode."""
        single = any(len(u) == 1 < graph.group(n).size for n, u in units.items())
        kept = graph.kept(units)
        found = (self._compare(self._fresh(small), kept, forward, single) for forward in self.forwards)
        return next((m for m in found if m is not None), None)

    def _copy(self, model: nn.Module) -> nn.Module:
        return _plain_copy(model, self.device, self.watch.lessons)

    def _fresh(self, small: nn.Module) -> nn.Module:
        """A copy of ``small`` in which nothing is left of earlier forwards, as in what was watched."""
        private = self._copy(small)
        modules = named_modules(private)
        for (name, key), before in self.left.items():
            if name in modules:
                vars(modules[name]).pop(key, None)
                vars(modules[name]).update({k: copy.copy(v) for k, v in before.items()})
        return private

    def rehearse(self, rehearsed: Rehearsed, forward: Forward) -> Mismatch | None:
        """Watch a copy of these widths; what does not go as predicted."""
        kept = self.graph.kept(rehearsed.units)
        if not kept:
            return None
        smaller = self._copy(self.model)
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
                if (tensor, dim) not in start:  # a number that is only compared: a lesson of another watch
                    continue
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
            mismatch.counted = second.counted
            return mismatch
        except TraceError:
            raise
        except Exception as error:  # Python code of the forward itself
            failed = Mismatch(None, f"fails ({first_line(error)})", _blame(error, smaller))
            failed.counted = second.counted
            return failed
        shapes = [tuple(t.shape) for t in tensors_in(output)]
        if shapes != forward.shapes and not rehearsal.loose:
            place = CallPlace("", type(smaller).__name__, "")
            return Mismatch(None, f"gives outputs {shapes} instead of {forward.shapes}", place)
        return None


@dataclass(frozen=True)
class Forward:
    """One forward that was watched: what a rehearsal in the same mode is held against."""

    training: bool
    records: list[Record]
    shapes: list[tuple[int, ...]]  # of its outputs
    alike: bool = False  # it runs what the forward before it ran
    looks_at_sizes: bool = False  # and may go another way at others

    @classmethod
    def of(cls, watch: Watch, output: Any, *, training: bool, alike: bool = False) -> Forward:
        shapes = [tuple(t.shape) for t in tensors_in(output)]
        return cls(training, watch.records, shapes, alike, watch.looks_at_sizes)

    @property
    def rehearsals(self) -> slice:
        """Which of the widths are tried: of a train-mode forward the first, or two units, where branches turn."""
        return slice(1, 2) if self.alike else slice(3) if self.training else slice(None)


def _learn(lessons: Lessons, notes: dict[Any, Reason], found: Found, stage: Tracing) -> None:
    """What must stay for the rehearsal to pass: the line that did not follow; the channels that move it; the module around."""
    mismatch = found.mismatch
    if ties := _counted(found, stage) or _equal_widths(found, stage):
        lessons.ties += ties
        return
    text = f"{mismatch.text} when widths change, so its channels are frozen"
    key, level = mismatch.key, lessons.lines.get(mismatch.key, 0) if mismatch.key is not None else FROZEN
    culprits = _culprits(found, stage) if key is None or level >= FROZEN or mismatch.reason == NUMBER else []
    least = _least(culprits[0], found, stage) if len(culprits) == 1 and not found.rehearsed.every else None
    if least is None and key is not None and level < FROZEN and not found.rehearsed.every:
        tried = level < max((n for op, n in _TRIED_OUT.items() if f"aten.{op}." in key[1]), default=0)
        lessons.lines[key] = level + 1 if tried else FROZEN
        lessons.reasons[key] = mismatch.reason
        if sum(op == key[1] for _, op in lessons.lines) > MANY:  # one rehearsal each would take too long
            lessons.lines[mismatch.place.line, key[1]] = FROZEN
            lessons.reasons[mismatch.place.line, key[1]] = mismatch.reason
        if lessons.lines[key] >= 2 or "split" in key[1] or "slice" in key[1]:
            notes[key] = Reason(f"{key[1]} {text}", mismatch.place)
        return
    single = found.rehearsed.every
    culprits = culprits or _culprits(found, stage)
    if (
        len(culprits) > 1
    ):  # together they do it: of two widths that became equal, hold one where the other cannot reach it
        *others, largest = sorted(culprits, key=lambda g: g.size * g.width)
        beyond = others[-1].size * others[-1].width // largest.width + 1
        known = any((s.tensor, s.dim) in lessons.channels for s in largest.slices)
        culprits, least = [largest], beyond if beyond < largest.size and not known else None
    slices = [s for g in culprits for s in g.slices[:1] if not number_named(s.tensor)]
    slices = [s for s in slices if not (single and (s.tensor, s.dim) in lessons.channels)]
    for s in slices:
        positions = s.index[-1:] if single else s.index if least is None else s.index[1 - least :]
        before = lessons.channels.get((s.tensor, s.dim), (positions, None))[0]
        lessons.channels[s.tensor, s.dim] = np.union1d(before, positions), Reason(mismatch.reason, mismatch.place)
    if slices:
        if not single and least is None:
            notes[mismatch.place, mismatch.text] = Reason(f"the forward {text}", mismatch.place)
        return
    if key is not None and level < FROZEN:  # that two units stay of every group was no help
        lessons.lines[key], lessons.reasons[key] = FROZEN, mismatch.reason
        notes[key] = Reason(f"{key[1]} {text}", mismatch.place)
        return
    name = mismatch.place.module
    while name in lessons.modules and name:
        name = name.rpartition(".")[0]
    lessons.modules[name] = Reason("the module around these channels works for one size only", mismatch.place)
    text = f"does not follow when widths change, so it is frozen: {mismatch.text} when widths change"
    notes["module", name] = Reason(f"{name or 'the whole model'} {text}", mismatch.place)


def _least(group: Group, found: Found, stage: Tracing) -> int | None:
    """The smallest width at which ``group``, cut alone, brings no mismatch (``min(c, 8)``, ``if c > k``), if there is one."""
    forward = next(f for f in stage.forwards if f.training == found.training)
    whole = {g.name: np.arange(g.size) for g in stage.graph.groups}

    def passes(count: int) -> bool:
        return stage.rehearse(Rehearsed({**whole, group.name: np.arange(count)}, single=False), forward) is None

    low, high = len(found.rehearsed.units[group.name]), group.size - 1  # too few; enough, if anything is
    if high <= low or not passes(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    return high


def _culprits(found: Found, stage: Tracing) -> list[Group]:
    """Groups that, cut alone, bring a mismatch: as few as ``_fewest`` finds, those first that reach the module around it."""
    forward = next(f for f in stage.forwards if f.training == found.training)
    units = found.rehearsed.units
    known: dict[frozenset[str], bool] = {}
    inside = f"{found.mismatch.place.module}."

    def fails(some: list[Group]) -> bool:
        cut = frozenset(g.name for g in some)
        if cut not in known:
            tried = {g.name: units[g.name] if g.name in cut else np.arange(g.size) for g in stage.graph.groups}
            known[cut] = stage.rehearse(Rehearsed(tried, found.rehearsed.single), forward) is not None
        return known[cut]

    cut = [g for g in stage.graph.groups if len(units[g.name]) < g.size]
    return _fewest(sorted(cut, key=lambda g: not any(s.tensor.startswith(inside) for s in g.slices)), fails)


def _fewest(rest: list[Group], enough: Callable[[list[Group]], bool]) -> list[Group]:
    """Of ``rest`` as few as are ``enough``, as far as a search by halves finds them; none if it takes more than ``MANY``.

    The first of them are taken to be the likely ones.
    """
    chosen: list[Group] = []
    while len(chosen) < MANY and not (chosen and enough(chosen)):
        low, high = 0, min(1, len(rest))  # the shortest beginning of the rest that is enough together with the chosen
        while high < len(rest) and not enough([*chosen, *rest[:high]]):
            low, high = high + 1, min(4 * high, len(rest))
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if enough([*chosen, *rest[:middle]]) else (middle + 1, high)
        if low == 0 or low > len(rest):
            return chosen
        chosen, rest = [*chosen, rest[low - 1]], rest[: low - 1]
    return chosen


def _counted(found: Found, stage: Tracing) -> list[tuple[TensorPositions, TensorPositions]]:
    """Numbers of modules that were compared with a width that they seem to count: they go with it."""
    if found.mismatch.key is not None or found.rehearsed.every:
        return []
    known = {one[:2] for one, _ in stage.watch.lessons.ties}
    counted = {at: axis for at, axis in found.mismatch.counted.items() if at not in known}
    if counted:  # others wait for their turn: one more forward finds them all
        forward = next(f for f in stage.forwards if f.training == found.training)
        counted |= {at: axis for at, axis in stage.equal_numbers(forward) if at not in known}
    return [
        ((*at, rows), (a.tensor, a.dim, rows)) for at, a in counted.items() for rows in (np.arange(a.size)[:, None],)
    ]


def _equal_widths(found: Found, stage: Tracing) -> list[tuple[TensorPositions, TensorPositions]]:
    """What has to be as wide as each other: the mismatch is gone where all groups of one size keep the same units.

    So it is where a size comes from another tensor of the same width: ``y.view(b, c, h, w)`` with the ``c`` of ``x``.
    """
    groups, mismatch = stage.graph.groups, found.mismatch
    movable = [g for g in groups if g.slices[0].tensor in stage.watch.parameters]
    sizes = [g.size for g in movable]
    if found.rehearsed.every or mismatch.reason == NUMBER or len(set(sizes)) == len(sizes):
        return []
    forward = next(f for f in stage.forwards if f.training == found.training)
    number = {size: i for i, size in enumerate(dict.fromkeys(sizes))}
    counts = distinct(np.array(list(number)))

    def gone(cut: Sequence[Group]) -> bool:
        names = {g.name for g in cut}
        units = {g.name: np.arange(counts[number[g.size]] if g.name in names else g.size) for g in groups}
        left = stage.rehearse(Rehearsed(units), forward)
        return left is None or (left.key, left.place) != (mismatch.key, mismatch.place)

    if not gone(movable):
        return []
    for group in _fewest(movable, lambda some: not gone(some)):
        others = [g for g in movable if g.size == group.size and g is not group]
        if others and gone([group, *others]):
            fewest = _fewest(others, lambda some, first=group: gone([first, *some]))  # type: ignore[misc]
            return [(_positions(group), _positions(g)) for g in fewest]
    return []


def _positions(group: Group) -> TensorPositions:
    return group.slices[0].tensor, group.slices[0].dim, group.slices[0].index


def _blame(error: BaseException, model: nn.Module) -> CallPlace:
    """Where in the user's code ``error`` was raised."""
    names = {id(m): n for n, m in model.named_modules()}
    place = CallPlace("", type(model).__name__, "")
    for frame, number in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in names:
            place = CallPlace(names[id(owner)], type(owner).__name__, place.line)
        if is_users(frame.f_code.co_filename):
            place = replace(place, line=f"{frame.f_code.co_filename}:{number}")
    return place


# -- watching ----------------------------------------------------------------------------------------------------------


def _watch(
    model: nn.Module,
    example: Any,
    lessons: Lessons,
    deadline: float,
    device: str,
    notes: dict[Any, Reason],
    *,
    training: bool = True,
    before: Tracing | None = None,
) -> Tracing:
    """An eval-mode and, with ``training``, a train-mode forward on the same labels; costs are those of the first.

    Where both ran the same ``before``, by other lessons about labels, they do so again, and one is watched.
    """
    private, trained = (_plain_copy(model, device, lessons) for _ in range(2))  # a forward may leave caches in its copy
    watch = Watch(private, rules=RULES, lessons=lessons, deadline=deadline)
    try:
        output = _forward(watch, private, example, device, training=False)
    except TraceError:
        raise
    except Exception as error:
        raise _Failed(error, _blame(error, private)) from error
    if output is None or isinstance(output, GeneratorType):
        kind = type(model).__name__
        raise TraceError(
            f"trace: the forward of {kind} gives {type(output).__name__}; it has to return what it computes"
        )
    forwards = [Forward.of(watch, output, training=False)]
    left = _left(private, trained)
    for tensor in _read_again(private, left, example, device):
        watch.freeze(state(tensor).layers, "is computed once and kept by a module, which is not cut")
    plain = frozenset(lessons.plain)
    if training and before is not None and before.trains_alike and (before.device, before.plain) == (device, plain):
        forwards.append(replace(before.forwards[1], records=watch.records))
    elif training:
        seen = watch.sites, watch.memory, watch.spans, watch.reads
        forwards += _watch_training(watch, trained, example, device, forwards[0], notes)
        watch.sites, watch.memory, watch.spans, watch.reads = *seen[:3], seen[3] | watch.reads
    _hold_for_unseen(watch)
    component = components(watch)
    graph = _with_norms(build(watch, component, tuple(notes.values())), model, lessons)
    return Tracing(model, example, device, deadline, watch, graph, tuple(forwards), left, plain)


def _hold_for_unseen(watch: Watch) -> None:
    """Parameters that nothing has read may be read at other values: what was at hand where values decided has to stay."""
    unseen = [n for n in watch.parameters if n not in watch.reads]
    for labels, place in watch.decided if unseen else ():
        watch.freezes.append(
            (labels, Reason(f"may feed {unseen[0]}, which the values of the example have not reached", place))
        )


def _watch_training(
    watch: Watch, trained: nn.Module, example: Any, device: str, evaluated: Forward, notes: dict[Any, Reason]
) -> list[Forward]:
    """The train-mode forward of ``trained``, another copy; none if it fails."""
    known, unused = watch.known, [n for n in watch.parameters if n not in watch.reads]
    watch.sites, watch.memory, watch.spans, watch.records = [], Memory(), [], []
    watch.reads = Counter()
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
        text = f"the train-mode forward failed on the example input, {unseen}: {first_line(error)}"
        notes["training"] = Reason(text, place)
        return []
    alike = _alike(evaluated.records, watch.records)
    if alike:
        watch.known = known
    return [Forward.of(watch, output, training=True, alike=alike)]


Left = dict[tuple[str, str], dict[str, Any]]
"""Module and attribute in which a forward leaves tensors -> the attribute as it was before, nothing where there was none."""


def _left(private: nn.Module, fresh: nn.Module) -> Left:
    """What a forward of ``private`` has left in its modules, and ``fresh``, another copy, has not."""
    modules = named_modules(fresh)
    return {
        (name, key): {k: copy.copy(v) for k, v in vars(modules[name]).items() if k == key}
        for name, module in named_modules(private).items()
        for key, value in vars(module).items()
        if key not in ("_parameters", "_buffers")
        and _plain_tensors(value)
        and name in modules
        and not _plain_tensors(vars(modules[name]).get(key))
    }


def _plain_tensors(value: Any) -> list[Tensor]:
    """Tensors in an attribute of a module, in a list or a dictionary, that are no parameters."""
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
    return [t for t in values if isinstance(t, Tensor) and not isinstance(t, nn.Parameter)]


def _read_again(private: nn.Module, left: Left, example: Any, device: str) -> list[Tensor]:
    """Those of the tensors that a forward has ``left`` in ``private`` that hold channels, and that the next one reads."""
    modules = named_modules(private)
    tensors = [t for name, key in left for t in _plain_tensors(vars(modules[name])[key]) if state(t).layers]
    if not tensors:
        return []
    args, kwargs = call_arguments(example, device)
    with torch.no_grad(), mode(private, training=False), same_random_numbers(), uncompiled(), Reads() as reads:
        private(*args, **kwargs)
    return [t for t in tensors if id(t) in reads.found]


class Reads(TorchDispatchMode):
    """``found`` are the numbers (``id``) of all tensors that operations read."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[int] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.update(map(id, tensors_of(args, kwargs)))
        return op(*args, **(kwargs or {}))


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
    """Do two forwards run the same operations on the same tensors, with the same numbers and constants?"""
    return len(one) == len(other) and all(
        a.op is b.op
        and a.origins == b.origins
        and (a.scalars == b.scalars or repr(a.scalars) == repr(b.scalars))
        and [shape for shape, *_ in a.outputs] == [shape for shape, *_ in b.outputs]
        and all(map(_same_constant, _constants(a), _constants(b)))
        for a, b in zip(one, other, strict=True)
    )


def _constants(record: Record) -> list[Value]:
    return [*record.values, *(value for *_, value in record.outputs)]


def _same_constant(one: Value, other: Value) -> bool:
    return same_value(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else one is other


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


def _plain_copy(model: nn.Module, device: str, lessons: Lessons) -> nn.Module:
    """A private copy in which layers that compute their weight are plain, as far as they were found out."""
    private = private_copy(model, device)
    make_plain(private, lessons.plain)
    return private


def _with_norms(graph: Graph, model: nn.Module, lessons: Lessons) -> Graph:
    """``graph``, of the network whose layers are plain, as one of ``model``, where some compute their weight."""
    modules = {n: m for n, m in named_modules(model).items() if n in lessons.plain and computes_weight(m)}
    raw = {f"{n}.{k}": tuple(p.shape) for n, m in modules.items() for k, p in m.named_parameters() if k != "bias"}
    return replace(
        graph,
        shapes={**graph.shapes, **raw},
        baked=(*graph.baked, *modules),
        baked_away=(*graph.baked_away, *raw),
        baked_new=tuple(f"{n}.weight" for n in modules),
    )


def call_arguments(example: Any, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments with private tensors on ``device``."""

    def private(tensor: Tensor) -> Tensor:
        elsewhere = device == "meta" or tensor.device.type != device
        return tensor.detach().to(device) if elsewhere else tensor.detach().clone()

    if isinstance(example, dict):
        return (), mapped(example, private)
    if isinstance(example, (tuple, list)) and not hasattr(example, "_fields"):
        return tuple(mapped(v, private) for v in example), {}
    return (mapped(example, private),), {}


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


__all__ = ["trace"]
