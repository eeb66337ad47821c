"""Watch one forward pass and write down which channels must live or die together.

Every dimension of every parameter and buffer gets one integer *label* per index.  Labels flow beside the activations: a
tensor carries zero or more *layers*, integer arrays that broadcast to its shape and say to which index each element
belongs.  View-like operations are executed on the labels; element-wise operations merge them.  Nothing is computed: the
forward runs on the meta device, so shapes are all it produces.

Label 0 means "fixed": an element that nobody may remove (an image channel, a constant).
"""

from __future__ import annotations

import bisect
import functools
import math
import re
import sys
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode

from espalier.copies import named_modules, tensors_of_modules
from espalier.graph import shapes
from espalier.graph.call import Call, tensors_of
from espalier.graph.constants import (
    EMPTY,
    ITSELF,
    MAKERS,
    OVERWRITING,
    UNKNOWN,
    NumbersMadeTensors,
    Value,
    computed_values,
    copied_value,
    own_value,
)
from espalier.graph.numbers import Comparing, Number, Width, install
from espalier.graph.reasons import OUTPUT, WITH_FIXED, CallPlace, Reason, is_users
from espalier.graph.standins import stand_in

DETACH = torch.ops.aten.detach.default

Layer = np.ndarray  # int64, broadcastable to the tensor it describes; size 1 where the label does not change


Key = tuple[str, str]  # source line, operation


class TraceError(ValueError):
    """The model could not be traced; the message names the operation, its module and its source line."""


class TraceTimeout(TraceError):
    """Tracing took longer than its time limit; the message names the operation it was at."""


@dataclass(frozen=True)
class Axis:
    """One labelled dimension: labels ``start .. start+size-1`` belong to ``tensor`` along ``dim``."""

    tensor: str  # parameter or buffer name, or ``number_name`` of what a module counts
    dim: int
    start: int
    size: int


@dataclass
class RawSite:
    """One call of a convolution or matrix product: MACs are ``coefficient`` times the kept labels of each factor."""

    module: str
    kind: str
    weight: str | None
    coefficient: int
    factors: tuple[np.ndarray, ...]
    clock: int  # when, to find what was alive then
    baked: bool = False


class RawSpan(NamedTuple):
    """One call of a module, with modules inside, that gives the shape that it is given."""

    module: str
    begin: int  # clock before its first operation
    end: int  # and after its last
    labels: np.ndarray | None  # of its output
    bytes: float


RECENT = 4  # tensors whose width a number of a module may be compared with
PLAIN, COMPUTED = 1, 2  # made of parameters: zero wherever its parameter is zero, or not known to be
Origin = tuple[Any, int] | None  # where a tensor comes from: (number of the operation, of its output); None: nobody saw


ALL = slice(None)
LARGEST_KERNEL = 7  # positions of a weight that belongs to no convolution; dimensions that are longer have channels


class State:
    """What is known of one tensor: its label layers and, for what is made of parameters only, where it comes from."""

    __slots__ = ("derived", "differs", "layers", "origin", "pending", "source", "value")

    def __init__(
        self,
        layers: tuple[Layer, ...] = (),
        *,
        source: str | None = None,
        derived: int = 0,
        pending: tuple[tuple[np.ndarray, Reason], ...] = (),
        value: Value = None,
    ) -> None:
        self.layers = layers
        self.source = source  # parameter name while the tensor is a view of exactly one parameter
        self.derived = derived  # 0, or made of parameters and constants only: PLAIN or COMPUTED
        self.pending = pending  # labels mixed by a statistic of a weight: allowed if the weight can be baked
        self.origin: Origin = None
        self.value = value  # of a constant, see ``graph.constants``
        self.differs = False  # in a rehearsal: a constant that is another one than in the first watch


class Raw(State):
    """What is known of a parameter or buffer in a rehearsal, where hardly any is asked for its layers."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[[], tuple[Layer, ...]], source: str) -> None:
        self._make, self.source, self.derived, self.pending = make, source, PLAIN, ()
        self.value, self.differs = None, False

    @property
    def layers(self) -> tuple[Layer, ...]:  # type: ignore[override]
        return self._make()


NOTHING = State(value=UNKNOWN)  # what nobody saw being made is a constant


def value_of(tensor: Tensor) -> Value:
    """Of a constant its value, as far as it is known."""
    known = state(tensor)
    return own_value(tensor) if known is NOTHING or known.value is ITSELF else known.value


def _values_of(tensors: list[Tensor], *, overwritten: bool = False) -> tuple[Value, ...]:
    """Of each its value, which may still be written to; of none if none is a constant.

    Of the first it does not count if it is ``overwritten`` whole.
    """
    if all(state(t).value is None for t in tensors):
        return ()
    values = [copied_value(value_of(t)) for t in tensors]
    if overwritten and values[0] is not None:
        values[0] = UNKNOWN
    return tuple(values)


def state(tensor: Tensor) -> State:
    return getattr(tensor, "_espalier", NOTHING)


def parted(args: Any, kwargs: Any) -> tuple[list[Tensor], tuple[Any, ...]]:
    """The tensors among the arguments of an operation, and everything else."""
    tensors, rest = [], []
    for value in args:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, (list, tuple)) and (inside := [t for t in value if isinstance(t, Tensor)]):
            tensors += inside
        else:
            rest.append(value)
    if kwargs:
        tensors += tensors_of(tuple(kwargs.values()))
        rest += [(n, v) for n, v in kwargs.items() if not isinstance(v, Tensor)]
    return tensors, tuple(rest)


def narrowed(layer: Layer, dim: int, size: int = 1) -> Layer:
    """The first ``size`` positions along ``dim``, which stays."""
    return layer[(slice(None),) * dim + (slice(0, size),)]


def compact(layer: Layer) -> Layer:
    """Shrink every dimension along which the labels do not change to size 1."""
    for dim, stride in enumerate(layer.strides):  # what was only expanded first: the comparisons below stay small
        if stride == 0 and layer.shape[dim] > 1:
            layer = narrowed(layer, dim)
    if layer.size == max(layer.shape, default=1):  # one dimension left: differs along it, or is one channel
        if layer.size == 1 or np.count_nonzero(layer != layer.flat[0]):
            return layer
        return layer[(slice(0, 1),) * layer.ndim]
    for dim, size in enumerate(layer.shape):
        if size > 1:
            first = narrowed(layer, dim)
            if not np.count_nonzero(layer != first):
                layer = first
    return layer


def varying(layer: Layer) -> tuple[int, ...]:
    return tuple(d for d, size in enumerate(layer.shape) if size > 1)


def tensors_in(value: Any, _depth: int = 0) -> Iterator[Tensor]:
    """All tensors inside nested lists, tuples, dictionaries, dataclasses and plain objects."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item, _depth + 1)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from tensors_in(item, _depth + 1)
    elif hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)) and _depth < 8:
        for item in vars(value).values():
            yield from tensors_in(item, _depth + 1)


HARD_CODED = "sizes look hard-coded here"


class Mismatch(Exception):
    """In a rehearsal an operation did not do what the labels predicted.

    ``key`` names the line that can be frozen for it; ``None`` where no line is to blame, as where the forward takes another
    path.  ``reason`` is what to say of the channels that are frozen.
    """

    def __init__(self, key: Key | None, text: str, place: CallPlace, *, reason: str = HARD_CODED) -> None:
        super().__init__(text)
        self.key, self.text, self.place, self.reason = key, text, place, reason
        self.counted: dict[tuple[str, int], Axis] = {}  # numbers of modules that seem to count what does not stay


TensorPositions = tuple[str, int, np.ndarray]  # of a tensor along a dimension, ``(units, positions per unit)``


@dataclass
class Lessons:
    """What rehearsals have taught: which lines, parameters and modules do not follow when widths change."""

    lines: dict[Key, int] = field(default_factory=dict)  # how much of it is fixed
    reasons: dict[Key, str] = field(default_factory=dict)  # of the same, once all of it is fixed
    turned: set[Key] = field(default_factory=set)  # views of which another dimension shrinks than is guessed first
    channels: dict[tuple[str, int], tuple[np.ndarray, Reason]] = field(default_factory=dict)  # positions that stay
    ties: list[tuple[TensorPositions, TensorPositions]] = field(
        default_factory=list
    )  # as wide as each other, unit by unit
    modules: dict[str, Reason] = field(default_factory=dict)
    plain: dict[str, None] = field(default_factory=dict)  # layers that compute their weight: watched as plain ones
    every_value_passes: bool = True  # see ``graph.standins``; not where the forward fails so
    positions: set[str] = field(default_factory=set)  # grouped convolutions that lose the same positions in all groups


@dataclass(slots=True)
class Record:
    """One operation: from what it made what.  Its outputs are the prediction that a rehearsal is held against."""

    op: Any
    origins: tuple[Origin, ...]
    scalars: tuple[Any, ...]
    numbers: tuple[Any, ...]  # the scalars that are no sizes: what is computed with
    values: tuple[Value, ...]  # of its operands that are constants
    asked: tuple[str, str, int]  # module, source line and which call on it
    by_values: bool  # values of activations decide on the size of its result, or on what Python does next
    outputs: list[tuple[tuple[int, ...], State, Value]]


@dataclass
class Memory:
    """Live activation storages over time, as sizes in elements x label vectors."""

    births: list[tuple[int, int, np.ndarray | None, float]] = field(default_factory=list)  # time, key, labels, bytes
    deaths: dict[int, int] = field(default_factory=dict)  # birth index -> time


@dataclass
class Living:
    """A storage that is alive, born as number ``birth`` of ``memory``: of the forward that made it, which may be over."""

    memory: Memory
    birth: int
    references: int = 0


class Observer(Protocol):
    """Holds what a watch sees against what was predicted, and raises ``Mismatch`` (``graph.rehearsal``)."""

    position: int  # of the next operation
    whole_groups: dict[str, int]  # what the first watch decided for grouped convolutions

    def follows(self, watch: Watch, func: Any, origins: Any, scalars: tuple[Any, ...], outs: list[Tensor]) -> bool:
        """Is the result that which was predicted, so that no rule need be applied?"""

    def check(self, watch: Watch, record: Record, operands: list[State], outs: list[Tensor]) -> bool:
        """The rule was applied: is the result that which was predicted?  False where nothing was."""

    def left_out(self, op: Any) -> Key | None:
        """Where an operation is due that is not done, and ``op`` comes instead."""


class Watch(TorchDispatchMode):
    """One watched forward."""

    def __init__(
        self,
        model: nn.Module,
        *,
        rules: dict[Any, Callable[..., None]],
        lessons: Lessons,
        deadline: float,
        kept: dict[str, dict[int, np.ndarray]] | None = None,
        axes: list[Axis] | None = None,
        rehearsal: Observer | None = None,
    ) -> None:
        super().__init__()
        self.rules = rules
        self.lessons = lessons
        self.deadline = deadline
        self.rehearsal = rehearsal
        self.edges: list[tuple[np.ndarray, np.ndarray]] = []
        self.freezes: list[tuple[np.ndarray, Reason]] = []
        self.mixes: list[tuple[np.ndarray, slice, Reason]] = []
        self.consumers: list[np.ndarray] = []
        self.read_alike: list[tuple[np.ndarray, np.ndarray]] = []  # of weights that are added up before they are used
        self.sites: list[RawSite] = []
        self.records: list[Record] = []
        self.memory = Memory()
        self.whole_groups: dict[str, int] = {}  # module -> how many channels one of its groups holds
        self.spans: list[RawSpan] = []
        self.baked: dict[str, None] = {}  # modules whose weight is computed from statistics over its inputs
        self.normed: dict[str, None] = {}  # layers with weights that a hook or parametrisation makes of statistics
        self.told = False  # has Python been told of values?  Then a position may be another one for other inputs
        self.decided: list[
            tuple[np.ndarray, CallPlace]
        ] = []  # activations at hand where values decided on what Python does
        self.reads: Counter[str] = Counter()  # parameter -> operations that read it; to hand on a view is not to read
        self.unknown: dict[Reason, None] = {}  # operations without a rule
        self.at_hand: list[Layer] = []  # what reached an operation that raised
        self.clock = 0
        self._guesses: dict[bytes, tuple[Key, int]] = {}  # layer that a view split -> where, which dimension shrinks
        self._splits: dict[bytes, tuple[int, ...]] = {}  # of the same, its shape without the dimensions of size one
        self.wrong_guesses: dict[Key, set[int]] = {}  # and the axes whose channels were split
        self.shared: dict[
            Key, set[int]
        ] = {}  # slices whose pieces are taken to be shares of the width, and of which axes
        self.held: set[int] = set()  # axes of which some positions stay because others are counted from there
        self.divided: set[str] = set()  # convolutions that lose whole groups of several channels
        self.made = 0  # constants that this forward has made
        self.looks_at_sizes = False  # the user's code reads sizes, or compares numbers that count channels
        self.made_labels: set[int] = set()  # of their dimensions the last labels
        self.said: dict[
            int, list[Number]
        ] = {}  # size in the present call of torch's -> numbers of modules that it comes from
        self.said_sizes: list[
            int
        ] = []  # all numbers in a call of torch's that gets one that is known to count something
        self.staying: set[str] = set()  # such numbers that count what stays
        self.counted: dict[tuple[str, int], Axis] = {}  # number -> what it would count, see ``_note``
        self._recent: deque[Tensor] = deque(maxlen=RECENT)  # in a rehearsal
        self._live: dict[int, Living] = {}  # by storage
        self._vectors: dict[int, tuple[Layer, np.ndarray]] = {}  # layer -> itself (so that it stays alive), its labels
        self._references: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._func: Any = None
        self._taught = {op for _, op in lessons.lines}
        self._ruled: dict[Any, Callable[..., None]] = {}  # operation -> its rule
        self.axes: list[Axis] = [] if axes is None else list(axes)
        self._kept = kept or {}
        self._axis_of = {(a.tensor, a.dim): a for a in self.axes}
        self._next = 1
        self.look_at(model)
        for at, (positions, reason) in lessons.channels.items():
            if at in self._axis_of:
                self.freezes.append((self._axis_of[at].start + positions, reason))
        for pair in lessons.ties:
            for tensor, dim, index in pair:
                self.axis_labels(tensor, dim, index.size)  # of a number nobody has asked yet
            a, b = (self._axis_of[tensor, dim].start + index for tensor, dim, index in pair)
            self.tie(a[:, :1], b)
            self.tie(b[:, :1], a)

    def look_at(self, model: nn.Module) -> None:
        """Label the tensors of ``model``, which is the model or another private copy of it."""
        self._stack: list[nn.Module] = [model]
        self._modules = named_modules(model)
        self._names = {id(m): n for n, m in self._modules.items()}
        install(self._modules, self._note)
        self.parameters, self.buffers = tensors_of_modules(self._modules)
        for name, tensor in (*self.parameters.items(), *self.buffers.items()):
            shape = tuple(tensor.shape)
            if self.rehearsal is None:
                known = State(self._raw_layers(name, shape), source=name, derived=PLAIN)
            else:
                known = Raw(partial(self._raw_layers, name, shape), name)
            known.origin = (name, 0)
            tensor._espalier = known  # type: ignore[attr-defined]
        held = self.parameters.keys() | self.buffers.keys()
        self._made_from = max(
            (a.start + a.size for a in self.axes if a.tensor in held), default=1
        )  # to no weight belongs more

    @property
    def known(self) -> tuple[int, ...]:
        """How much was found out about labels so far; set to an earlier value, what came since is forgotten."""
        return len(self.edges), len(self.freezes), len(self.mixes), len(self.consumers)

    @known.setter
    def known(self, counts: tuple[int, ...]) -> None:
        for found, count in zip((self.edges, self.freezes, self.mixes, self.consumers), counts, strict=True):
            del found[count:]  # type: ignore[attr-defined]

    # -- labels ----------------------------------------------------------------------------------------------------

    def _raw_layers(self, name: str, shape: tuple[int, ...]) -> tuple[Layer, ...]:
        """Layers of a parameter or buffer: one per dimension that has channels."""
        layers = []
        least = [1] * len(shape)
        if len(shape) > 2 and min(shape[:2]) > 1:  # (O, I, ...): positions are no channels
            owner = self._modules.get(name.rpartition(".")[0])
            least[2:] = [shape[d] if isinstance(owner, _ConvNd) else LARGEST_KERNEL for d in range(2, len(shape))]
        for dim, size in enumerate(shape):
            if (name, dim) in self._axis_of if self.rehearsal is not None else size > least[dim]:
                labels = self.axis_labels(name, dim, size)
                layers.append(labels.reshape((1,) * dim + (len(labels),) + (1,) * (len(shape) - dim - 1)))
        return tuple(layers)

    def axis_labels(self, tensor: str, dim: int, size: int) -> np.ndarray:
        """Labels of one dimension: new ones at the first watch, the surviving ones in a rehearsal."""
        axis = self._axis_of.get((tensor, dim))
        if axis is None:
            axis = Axis(tensor, dim, self._next, size)
            self._next += size
            self.axes.append(axis)
            self._axis_of[tensor, dim] = axis
        kept = self._kept.get(tensor)
        if kept is None or dim not in kept:
            return np.arange(axis.start, axis.start + axis.size)
        return axis.start + kept[dim]

    def axis_at(self, label: int) -> int:
        """Number of the axis that a label is of; -1 of what is fixed."""
        return bisect.bisect_right(self.axes, label, key=lambda axis: axis.start) - 1

    def axes_in(self, labels: np.ndarray) -> set[int]:
        """Numbers of the axes that ``labels`` are of."""
        return {self.axis_at(int(n)) for n in np.unique(labels) if n}

    def axis_of(self, labels: np.ndarray) -> Axis | None:
        """The axis of which ``labels`` are all that there are; ``None`` where they are not those of one."""
        if not len(labels) or not labels.min():
            return None
        axis = self.axes[self.axis_at(int(labels.min()))]
        whole = len(labels) == axis.size and labels.min() == axis.start and labels.max() == axis.start + axis.size - 1
        return axis if whole else None

    @property
    def label_count(self) -> int:
        return self._next

    def tie(self, a: np.ndarray, b: np.ndarray) -> None:
        """Labels that must be equal element by element.  A partner that is fixed freezes the other."""
        if a is b:
            return
        if a.shape != b.shape:
            a, b = np.broadcast_arrays(a, b)
        left, right = a.reshape(-1), b.reshape(-1)
        if np.count_nonzero(left) < left.size or np.count_nonzero(right) < right.size:
            fixed = (left == 0) | (right == 0)
            self.freeze_labels(np.maximum(left, right)[fixed], WITH_FIXED)
            left, right = left[~fixed], right[~fixed]
        self.edges.append((left, right))

    def freeze_labels(self, labels: np.ndarray, text: str) -> None:
        labels = labels.reshape(-1)
        if np.count_nonzero(labels):
            self.freezes.append((labels, Reason(text, self.place())))

    def freeze(self, layers: Iterable[Layer], text: str) -> None:
        for layer in layers:
            self.freeze_labels(layer, text)

    def hold(self, layer: Layer, text: str) -> None:
        """What lies in ``layer`` stays, because others are counted from there."""
        self.held |= self.axes_in(layer)
        self.freeze([layer], text)

    def mix(self, layer: Layer, dims: Iterable[int], text: str, *, held: slice = ALL) -> None:
        """A statistic over ``dims``: harmless only if everything along them lives or dies together (judged at the end).

        Otherwise what lies at the positions ``held`` stays.
        """
        dims = [d for d in dims if layer.shape[d] > 1]
        if not dims:
            return
        guess = self.guessed(layer)
        if guess is not None and guess[1] in dims and len(dims) < len(varying(layer)):
            self.wrong_guesses.setdefault(guess[0], set()).update(self.axes_in(layer))
        held = ALL if self.told else held
        if held != ALL:
            self.held |= self.axes_in(layer)
        rest = [d for d in range(layer.ndim) if d not in dims]
        rows = layer.transpose(*rest, *dims).reshape(-1, math.prod([layer.shape[d] for d in dims]))
        self.mixes.append((rows, held, Reason(text, self.place())))

    def vector(self, tensor: Tensor, dim: int) -> np.ndarray:
        """Labels along one dimension, shape ``(size,)``; 0 where it is fixed.

        Of a layer that changes along other dimensions as well, what lies at one position of ``dim`` goes together.
        """
        shape = tensor.shape
        dim %= len(shape)
        size = shape[dim]
        found = None
        for layer in state(tensor).layers:
            along = layer.shape[dim]
            if along == 1 and not (size == 1 and layer.size == 1):
                continue
            if layer.size == along == size and found is None:
                found = layer.reshape(-1)
            elif along == size and layer.ndim == len(shape) and found is None:
                self._doubt_guesses(layer, dim)
                first = layer
                for other in varying(layer):
                    first = first if other == dim else narrowed(first, other)
                self.tie(layer, first)
                found = first.reshape(-1)
            else:
                self.freeze([layer], "its channels are entangled with another dimension")
        return np.zeros(size, dtype=np.int64) if found is None else found

    def guess(self, layer: Layer, shrinking: int) -> None:
        """A view has split the channels of ``layer``: all that lies at one position of the dimension ``shrinking`` goes."""
        self._guesses[layer.tobytes()] = self.key(), varying(layer).index(shrinking)
        self._splits[layer.tobytes()] = tuple([n for n in layer.shape if n > 1])
        for dim in varying(layer):
            if dim != shrinking:
                self.tie(layer, narrowed(layer, dim))

    def _doubt_guesses(self, layer: Layer, dim: int) -> None:
        """What lies at one position of ``dim`` goes together: a guess by which it would not was wrong."""
        rows = np.moveaxis(layer, dim, 0).reshape(layer.shape[dim], -1)
        for data, (key, number) in self._guesses.items():
            split = np.frombuffer(data, dtype=np.int64).reshape(self._splits[data])
            place = np.zeros(self.label_count, dtype=np.int64)
            place[split] = np.arange(1, split.shape[number] + 1).reshape(
                [-1 if d == number else 1 for d in range(split.ndim)]
            )
            found = place[rows]
            if (found != found[:, :1]).any():
                self.wrong_guesses.setdefault(key, set()).update(self.axes_in(rows[:, 0]))

    def guessed(self, layer: Layer) -> tuple[Key, int] | None:
        """Where ``layer``, which changes along several dimensions, was split, and the dimension that shrinks."""
        dims = varying(layer)
        found = self._guesses.get(layer.tobytes()) if len(dims) > 1 and self._guesses else None
        return None if found is None else (found[0], dims[found[1]])

    def put(
        self,
        tensor: Any,
        layers: Iterable[Layer] = (),
        *,
        source: str | None = None,
        derived: int = 0,
        pending: tuple[tuple[np.ndarray, Reason], ...] = (),
    ) -> None:
        if isinstance(tensor, Tensor):
            kept = tuple(layers)
            if len(kept) > 1 and not derived:
                # of a tensor that was made in the forward every dimension has labels: those of weights go first
                kept = tuple(sorted(kept, key=lambda m: self.is_made(m) and 1 + (varying(m) != (1,))))
                self.freeze(kept[1:], "two dimensions of one activation carry channels")
                kept = kept[:1]
            tensor._espalier = State(kept, source=source, derived=derived, pending=pending)  # type: ignore[attr-defined]

    def is_made(self, layer: Layer) -> bool:
        """Are its labels of something that was made in the forward, and of no weight?"""
        return int(layer.flat[-1]) >= self._made_from

    def put_all(self, tensor: Tensor, layers: Iterable[Layer]) -> None:
        """Every one of ``layers``, of a tensor that is no activation yet."""
        tensor._espalier = State(tuple(layers))  # type: ignore[attr-defined]

    def follow(self, size: int, labels: np.ndarray) -> bool:
        """Does ``size`` come from a number of a module in this call?  Then it counts ``labels``, and goes with them."""
        numbers = self.said.get(size)
        if not numbers or self.level():
            return False
        number = numbers.pop(0) if len(numbers) > 1 else numbers[0]  # of several of one size each in its turn
        if self.rehearsal is None:
            counted = number.labels(self)
            if counted is not None and len(counted) == len(labels):
                self.tie(_in_order_of(counted, labels), labels)
        return True

    def made_axis(self, name: str, out: Tensor, dim: int) -> np.ndarray:
        """Labels of a dimension that was made in the forward: tied to what its size counts, if the size of a tensor says that.

        Where nothing says what it counts, they are among ``made_labels``: in a rehearsal as in the first watch.
        """
        size = out.shape[dim]
        given = self.given_at(out, dim)
        alike = self.like_axis(name, given, size)
        if alike is not None:
            return alike
        labels = self.axis_labels(name, 0, size)
        if type(given) is int or not self.follow(size, labels):
            self.made_labels.update(labels[-1:].tolist())
        return labels

    def given_at(self, out: Tensor, dim: int) -> int | None:
        """What the call gives for the size of its result along ``dim``; ``None`` where it gives no sizes in order."""
        said = self.said_sizes[: out.ndim]
        in_order = dim < len(said) and all(n in (-1, m) for n, m in zip(said, out.shape, strict=False))
        return said[dim] if in_order else None

    def like_axis(self, name: str, given: int | None, size: int) -> np.ndarray | None:
        """Labels of a new dimension, if ``given`` is the size of a tensor that says what it counts."""
        like = f"{name}.like"
        counted = given.labels if isinstance(given, Width) else None
        if (like, 0) not in self._axis_of and (counted is None or counted[-1] in self.made_labels):
            return None
        labels = self.axis_labels(like, 0, size)
        if counted is not None:
            self.tie(counted, labels)
        return labels

    def _note(self, tensor: str, dim: int, value: int, other: int) -> None:
        """A number, of a module, is not as large as what it is compared with: does that belong to a tensor made just now?"""
        for made in reversed(self._recent):
            for layer in state(made).layers:
                if layer.size == max(layer.shape) == other:
                    axis = self.axes[self.axis_at(int(layer.min()))]
                    if axis.size == value and layer.min() >= axis.start and layer.max() < axis.start + value:
                        self.counted.setdefault((tensor, dim), axis)
                        return

    def stay(self, size: int) -> None:
        """If ``size`` comes from a number of a module, that stays."""
        if self.rehearsal is None:
            self.staying.update(number.leaf for number in self.said.get(size, ()))

    def _say(self, numbers: Iterable[Number], sizes: list[int] | None = None) -> None:
        self.said, self.said_sizes = {}, sizes or []
        for number in numbers:
            self.said.setdefault(abs(number), []).append(number)

    def _width(self, tensor: Tensor, dim: int, size: int) -> int:
        """``size`` of ``tensor`` along ``dim``, which knows the channels that it counts."""
        for layer in state(tensor).layers:
            if layer.ndim == tensor.ndim and layer.shape[dim] == layer.size == size > 1:
                return Width.of(size, layer.reshape(-1))
        return size

    def consume(self, labels: np.ndarray) -> None:
        self.consumers.append(labels.reshape(-1))

    # -- where we are ----------------------------------------------------------------------------------------------

    @property
    def module(self) -> nn.Module:
        return self._stack[-1]

    @property
    def module_name(self) -> str:
        return self._names.get(id(self._stack[-1]), "")

    def place(self) -> CallPlace:
        return CallPlace(self.module_name, type(self.module).__name__, user_line())

    def owner(self, tensor: str) -> CallPlace:
        """The module that holds a parameter or buffer."""
        name = tensor.rpartition(".")[0]
        return CallPlace(name, type(self._modules[name]).__name__, "")

    def key(self) -> tuple[str, str]:
        """What a rehearsal learns about: the operation, and the source line it is on or the layer of torch's it is in.

        A block of the user's is known by its line, wherever it is used.  Of torch's own layers the user's line says
        little: all layers of a ``Sequential`` are called from one.
        """
        torchs = type(self.module).__module__.startswith("torch.")
        return (self.module_name if torchs else user_line() or type(self.module).__name__, self._op_name())

    def level(self) -> int:
        if self._op_name() not in self._taught:  # to find the line takes longer
            return 0
        known = self.lessons.lines
        return max(known.get(self.key(), 0), known.get((user_line(), self._op_name()), 0))

    def reason(self) -> str:
        """Why this line is fixed."""
        known = self.lessons.reasons
        return known.get(self.key()) or known.get((user_line(), self._op_name())) or HARD_CODED

    def _op_name(self) -> str:
        return _name_of(self._func) if self._func is not None else "forward"

    # -- the run ---------------------------------------------------------------------------------------------------

    def run(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One forward of ``model`` under this watch; returns its output."""
        self.made = 0
        for number, tensor in enumerate(tensors_in((args, kwargs))):
            known = State()
            known.origin = ("input", number)
            tensor._espalier = known  # type: ignore[attr-defined]
            self._birth(tensor, known)
        # The model is a private copy: cheaper than hooks, which torch would call for every module there is.
        for module in self._modules.values():
            module.__dict__["_compiled_call_impl"] = partial(self._call, module)
        try:
            numbers = NumbersMadeTensors(_note_numbers, self._say, self._width if self.rehearsal is None else None)
            with torch.no_grad(), uncompiled(), self, numbers, Comparing() as comparing:
                output = model(*args, **kwargs)
            self.looks_at_sizes = numbers.sizes_read or comparing.heard
        finally:
            for module in self._modules.values():
                del module.__dict__["_compiled_call_impl"]
        for tensor in tensors_in(output):
            known, reason = state(tensor), Reason(OUTPUT, CallPlace("", type(model).__name__, ""))
            self.freezes += [(m.reshape(-1), reason) for m in (*known.layers, *(m for m, _ in known.pending))]
        return output

    def _call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Call ``module``, and know meanwhile that it runs."""
        self._stack.append(module)
        if self.lessons.modules and self.module_name in self.lessons.modules:
            reason = self.lessons.modules[self.module_name]
            self.freezes += [(m.reshape(-1), reason) for t in tensors_in(args) for m in state(t).layers]
        begin = self.clock
        try:
            result = module._call_impl(*args, **kwargs)
            if self.rehearsal is None and module._modules and args:
                self._note_span(begin, args[0], result)
            return result
        finally:
            self._stack.pop()

    def _note_span(self, begin: int, given: Any, result: Any) -> None:
        if isinstance(given, Tensor) and isinstance(result, Tensor) and given.shape == result.shape:
            vector = self._vector_of(state(result).layers)
            size = float(result.untyped_storage().nbytes())
            self.spans.append(RawSpan(self.module_name, begin, self.clock, vector, size))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Of torch's: its guard slows every operation down and imports all of dynamo; ``uncompiled`` does without."""
        return False

    def _is_fixed(self) -> bool:
        """Is this operation, or a module that it is part of, known to work for one size only?"""
        return self.level() >= FROZEN or self.in_fixed_module()

    def in_fixed_module(self) -> bool:
        modules = self.lessons.modules
        return bool(modules) and any(self._names.get(id(m), "") in modules for m in self._stack)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_composite(func):  # in inference mode, and with its tensors, these come by whole
            with self:
                return func.decompose(*args, **kwargs)
        self._func = func
        self.clock += 1
        tensors, scalars = parted(args, kwargs)
        writes = func._schema.is_mutable
        values = _values_of(tensors, overwritten=func._overloadpacket in OVERWRITING) if writes else None  # before it
        if time.thread_time() > self.deadline:
            raise TraceTimeout(
                f"tracing exceeded its time limit at {func} in {self.place()}; "
                "raise `time_limit`, or trace at a smaller input"
            )
        try:
            out = shapes.output(func, args, kwargs)
            if out is None and self.lessons.every_value_passes:
                out = stand_in(func, args, kwargs)
            if out is None:
                out = func(*args, **kwargs)
        except Exception as error:
            self.at_hand = [m for t in tensors_in((args, kwargs)) for m in state(t).layers]
            if self.rehearsal is None:
                raise
            key = self.rehearsal.left_out(func) or self.key()
            raise Mismatch(key, first_line(error), self.place()) from error
        if func is DETACH:  # torch calls it by itself, and not every time
            self._hand_on(args[0], out)
            return out
        outs = [t for t in tensors_of(out) if t.numel()]  # batch norm makes several tensors of no elements in eval mode
        if not tensors and not outs:
            return out
        operands = [state(t) for t in tensors]
        origins = tuple([known.origin for known in operands])
        rule = self._rule_of(func)
        rehearsal = self.rehearsal
        if rehearsal is not None and rule in FLOWING and rehearsal.follows(self, func, origins, scalars, outs):
            position = rehearsal.position - 1
        else:
            values = _values_of(tensors) if values is None else values
            constant = func._overloadpacket in MAKERS or (len(values) == len(tensors) and None not in values)
            # before the rule, which describes anew what is written in place
            computed = computed_values(func, args, kwargs, outs, value_of) if constant else [None] * len(outs)
            self._apply(rule, func, args, kwargs, out)
            made = [self._known(t) for t in outs]
            for tensor, known, value in zip(outs, made, computed, strict=True):
                if constant:
                    known.value = value
                elif writes and tensor._base is not None:  # so is what this is a view of
                    self._known(tensor._base).value = None
            empty = func._overloadpacket in EMPTY  # its values are whatever lay there
            states = [
                (tuple(t.shape), k, UNKNOWN if empty else copied_value(value_of(t)))
                for t, k in zip(outs, made, strict=True)
            ]
            asked = (self.module_name, *user_call())
            record = Record(
                func,
                origins,
                scalars,
                numbers_of(func, args, kwargs),
                values,
                asked,
                depends_on_values(func, tensors),
                states,
            )
            if rehearsal is not None:
                if not rehearsal.check(self, record, operands, outs):
                    return out
                position = rehearsal.position - 1
            else:
                for source in {known.source for known in operands} - {known.source for known in made}:
                    if source is not None:
                        self.reads[source] += 1
                for tensor, known in zip(outs, made, strict=True):
                    if not known.derived:
                        self._birth(tensor, known)
                position = len(self.records)
                self.records.append(record)
                if record.by_values and torch.Tag.data_dependent_output in func.tags:
                    self.told = True
                    self.decided += [(labels, self.place()) for labels in self._at_hand()]
        for number, tensor in enumerate(outs):
            known = state(tensor)
            if known is not NOTHING:
                known.origin = (position, number)
        if rehearsal is not None:
            self._recent.extend(outs)
        return out

    def _hand_on(self, tensor: Tensor, same: Tensor) -> None:
        """``same`` is ``tensor`` by another name."""
        known = state(tensor)
        if known is not NOTHING:
            same._espalier = known  # type: ignore[attr-defined]
            if self.rehearsal is None and not known.derived:
                self._birth(same, known)

    def _known(self, tensor: Tensor) -> State:
        """The state of what an operation made, whether its rule says something of it or not."""
        if state(tensor) is NOTHING:
            tensor._espalier = State()  # type: ignore[attr-defined]
        return state(tensor)

    def _rule_of(self, func: Any) -> Callable[..., None]:
        if (self.lessons.lines or self.lessons.modules) and self._is_fixed():
            return self.rules["fixed"]
        rule = self._ruled.get(func)
        if rule is None:
            default = "pointwise" if torch.Tag.pointwise in func.tags else "unknown"
            found = self.rules.get(func._overloadpacket) or self.rules.get(func._schema.name)
            rule = self._ruled[func] = found or self.rules[default]
        return rule

    def _apply(self, rule: Callable[..., None], func: Any, args: Any, kwargs: Any, out: Any) -> None:
        try:
            rule(self, Call(func, args, kwargs, out))
        except (Mismatch, TraceError):
            raise
        except Exception as error:  # a shape that the rule does not expect, or a rule that is wrong
            self.unknown[Reason(f"{func._overloadpacket}: its rule failed, {first_line(error)}", self.place())] = None
            self.rules["fixed"](self, Call(func, args, kwargs, out))

    def freeze_operands(self, args: Any, kwargs: Any, text: str) -> None:
        for tensor in tensors_in((args, kwargs)):
            known = state(tensor)
            self.freeze(known.layers, text)
            for labels, reason in known.pending:
                self.freezes.append((labels.reshape(-1), reason))

    # -- activation memory -----------------------------------------------------------------------------------------

    def _birth(self, tensor: Tensor, known: State) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        entry = self._live.get(key)
        if entry is None:
            bytes_ = storage.nbytes()
            self.memory.births.append((self.clock, key, self._vector_of(known.layers), float(bytes_)))
            entry = self._live[key] = Living(self.memory, len(self.memory.births) - 1)
        entry.references += 1
        reference = weakref.ref(tensor, self._release)
        self._references[id(reference)] = (reference, key)

    def _at_hand(self) -> Iterator[np.ndarray]:
        """Labels of the activations that are alive."""
        for entry in self._live.values():
            labels = entry.memory.births[entry.birth][2]
            if labels is not None:
                yield labels

    def _vector_of(self, layers: tuple[Layer, ...]) -> np.ndarray | None:
        """The first layer as a vector of labels, the same object for the same layer."""
        if not layers:
            return None
        found = self._vectors.get(id(layers[0]))
        if found is None:
            found = self._vectors[id(layers[0])] = (layers[0], layers[0].reshape(-1))
        return found[1]

    def _release(self, reference: weakref.ref[Tensor]) -> None:
        _, key = self._references.pop(id(reference))
        entry = self._live[key]
        entry.references -= 1
        if entry.references == 0:
            entry.memory.deaths[entry.birth] = self.clock
            del self._live[key]


def _note_numbers(tensor: Tensor, value: Value) -> None:
    if state(tensor) is NOTHING:
        tensor._espalier = State(value=value)  # type: ignore[attr-defined]


def _in_order_of(counted: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """What a multiple of a number counts: one part after the other, or with all positions of a channel in a row."""
    changes = np.flatnonzero(np.diff(labels))
    times = int(changes[0]) + 1 if len(changes) else len(labels)
    if len(labels) % times:
        return counted
    parts, rows = counted.reshape(times, -1), labels.reshape(-1, times)
    alike = (parts == parts[:1]).all() and (rows == rows[:, :1]).all()
    return parts[0].repeat(times) if alike else counted


@functools.cache
def _name_of(func: Any) -> str:
    return str(func)


@functools.cache
def _is_composite(func: Any) -> bool:
    """Is the operation made of others, by C++ code of torch's?"""
    return bool(
        torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), torch._C.DispatchKey.CompositeImplicitAutograd)
    )


@functools.cache
def _numbers_at(func: Any) -> tuple[tuple[int, ...], frozenset[str]]:
    """Positions and names of the arguments that an operation computes with; sizes (``SymInt``) show in shapes."""
    text = str(func._schema)
    named = {
        a.name: i
        for i, a in enumerate(func._schema.arguments)
        if a.name in COMPUTED_WITH
        or not (a.name in GROUP_COUNTS or re.search(rf"(SymInt|Generator)\S* {a.name}\b", text))
    }
    return tuple(named.values()), frozenset(named)


COMPUTED_WITH = {"stride", "padding", "dilation", "output_padding", "diagonal"}  # sizes that no shape need show
GROUP_COUNTS = {"group", "groups", "num_groups"}  # of channels: labels answer for them


def numbers_of(func: Any, args: Any, kwargs: Any) -> tuple[Any, ...]:
    """The scalar arguments that an operation computes with."""
    positions, names = _numbers_at(func)
    found = [args[i] for i in positions if i < len(args)] + [(n, v) for n, v in kwargs.items() if n in names]
    return tuple(
        [v for v in found if not isinstance(v, Tensor) and not (isinstance(v, (list, tuple)) and tensors_of(v))]
    )


DEPENDS_ON_VALUES = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


def depends_on_values(func: Any, tensors: list[Tensor]) -> bool:
    """Do values of activations decide on the size of the result (``nonzero``), or on what Python does next (``item``)?"""
    if DEPENDS_ON_VALUES.isdisjoint(func.tags) and "nms" not in func.name():
        return False
    if func._overloadpacket is torch.ops.aten.index and not any(t.dtype is torch.bool for t in tensors[1:]):
        return False
    return any(state(t).value is None for t in tensors)


def uncompiled() -> AbstractContextManager[Any]:
    """What ``torch.compile`` has wrapped runs as it was written, or dynamo would compile the watch along with it."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


FLOWING: set[Callable[..., None]] = set()
"""Rules under which the channels of the result follow from the operands alone: see ``Rehearsal.follows``."""

FROZEN = 99  # a lesson about a line: nothing that its operation touches may change


def first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def user_line() -> str:
    """``file:line`` of the innermost frame that is neither torch's nor ours."""
    return user_call()[0]


def user_call() -> tuple[str, int]:
    """The same, and which of the calls on this line it is."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if frame.f_code is Watch.run.__code__:
            return "", -1
        if is_users(name):
            return f"{name}:{frame.f_lineno}", frame.f_lasti
        frame = frame.f_back  # type: ignore[assignment]
    return "", -1
