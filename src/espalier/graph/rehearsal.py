"""Hold smaller forwards against the first: every operation must give the shapes, channels and numbers that were predicted.

A rehearsal is an observer of a second watch.  What it predicts it takes from the records of the first one and from which
labels are alive; what it finds otherwise it raises as ``Mismatch``.  Which widths are tried decides what can be found:
``widths`` says which and why.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from espalier.graph.constants import Value, same_value
from espalier.graph.graph import Graph
from espalier.graph.watch import Key, Layer, Mismatch, Record, State, Watch, compact, state, varying

SLICE, ALIAS = torch.ops.aten.slice.Tensor, torch.ops.aten.alias.default
NUMBER = "is computed with a number that follows the widths"

StayingUnits = dict[str, np.ndarray]  # group -> units that stay


class Rehearsed(NamedTuple):
    """One choice of widths."""

    units: StayingUnits
    single: bool = False  # of some group one unit is left, which cannot say where it belongs
    every: bool = False  # of every group one unit is left


def widths(graph: Graph, stuck: Iterable[int] = ()) -> Iterator[Rehearsed]:
    """The widths to rehearse at, those that find most first.

    *All different*, primes where there are any near two thirds: a size that belongs to another tensor of equal width, or
    that is written down as a number, shows.  *Two units* each: widths that differed are equal, numbers that saturate
    (``min(c, 8)``) do not, and branches on a width turn.  Two of those for which there was *no number left*: so that of every
    group the last unit has gone while others stay.  *One unit* each: ``squeeze`` takes away what is no dimension of
    size one.  Where there are pairs, one unit of *every other group*, and then of the rest: a pair has no width between, and
    what holds for one unit of it has to hold for the other.  *As wide as what is fixed*: so that a shape may equal that of the
    input, or of channels that stay; ``stuck`` are widths that earlier rehearsals fixed.
    """
    different = np.array(distinct(graph.sizes), dtype=np.int64)
    yield Rehearsed(spread(graph, different))
    yield Rehearsed(spread(graph, np.minimum(graph.sizes, 2), from_the_end=True))
    whole = (different == graph.sizes) & (graph.sizes > 2)
    if whole.any():
        yield Rehearsed(spread(graph, np.where(whole, 2, different)))
    yield Rehearsed(spread(graph, np.ones_like(graph.sizes)), single=True, every=True)
    if (graph.sizes == 2).any():
        for rest in (1, 0):
            cut = np.arange(len(graph.sizes)) % 2 != rest
            counts = np.where(cut, np.minimum(graph.sizes, 1), different)
            yield Rehearsed(spread(graph, counts, from_the_end=True), single=True)
    for fixed in dict.fromkeys((*stuck, *_fixed_widths(graph))):
        yield Rehearsed(spread(graph, np.minimum(graph.sizes, fixed)))


def spread(graph: Graph, counts: Sequence[int] | np.ndarray, *, from_the_end: bool = False) -> StayingUnits:
    """``counts[g]`` units of group ``g``, unevenly, so that a wrong index cannot pass by accident.

    The first unit is one of them, or the last: at an end is what ``roll`` takes round it.
    """
    units = {}
    for number, (group, keep) in enumerate(zip(graph.groups, counts, strict=True)):
        if keep == 1:
            units[group.name] = np.array([(number + from_the_end) % group.size])
        else:
            stay = (np.arange(keep) * group.size) // keep
            units[group.name] = group.size - 1 - stay[::-1] if from_the_end else stay
    return units


def distinct(sizes: np.ndarray) -> list[int]:
    """About two thirds of every size (of a few, all but one), and as far as there is room no number twice, rather primes."""
    taken: set[int] = set()
    counts = []
    for size in sizes.tolist():
        target = max(size - 1, min(size, 2)) if size <= 6 else 2 * size // 3
        free = [n for n in range(2, size) if n not in taken]
        left = size if target in taken else target  # whole, rather than as many as in another group
        best = min(free, key=lambda n: (abs(n - target) > size // 4, not _is_prime(n), abs(n - target)), default=left)
        taken.add(best)
        counts.append(best)
    return counts


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, int(number**0.5) + 1))


MOST_FIXED = 2  # widths of fixed channels that are tried: each is one more rehearsal


def _fixed_widths(graph: Graph) -> list[int]:
    """Widths of weights' channels that stay, the smallest ones, to which some group could be cut."""
    found = {
        sum(f.count for f in graph.frozen if (f.tensor, f.dim) == at)
        for at in {(f.tensor, f.dim) for f in graph.frozen}
    }
    largest = max(graph.sizes.tolist(), default=0)
    return sorted(n for n in found if 2 < n < largest)[:MOST_FIXED]


class Prediction(NamedTuple):
    """What remains of a layer: its labels, and how long it is along every dimension in which they change."""

    whole: Layer
    layer: Layer
    sizes: tuple[tuple[int, int], ...]


@dataclass
class Rehearsal:
    """The observer: what the labels say of every output, against what it is."""

    records: list[Record]
    alive: np.ndarray  # label -> survives
    whole_groups: dict[str, int]
    single: bool = False  # of some group one unit is left, which cannot say where it belongs
    loose: bool = False  # an operation whose result's size depends on values has run: sizes and paths may be others
    stopped: bool = False
    position: int = 0
    astray: tuple[str, str, int] | None = None  # the call that is not followed
    _predictions: dict[int, Prediction] = field(default_factory=dict)

    def follows(self, watch: Watch, func: Any, origins: Any, scalars: tuple[Any, ...], outs: list[Tensor]) -> bool:
        """Is this the recorded operation on the recorded tensors, and are the shapes those predicted?

        If its operands have the channels that were predicted (by induction: each was checked when it was made) then so has
        its result, for a rule under which channels only flow.  So it is put, not derived.
        """
        if self.position >= len(self.records) or self.astray is not None or self.stopped:
            return False
        record = self.records[self.position]
        if record.op is not func or record.origins != origins or None in origins or record.values:
            return False
        if record.by_values:
            return False
        if len(record.outputs) != len(outs) or record.scalars != scalars:
            return False
        if any(value is not None for *_, value in record.outputs):  # a constant, which may be written to
            return False
        kept: list[tuple[Layer, ...]] = []
        for tensor, (was, known, _) in zip(outs, record.outputs, strict=True):
            if not known.layers:
                if tensor.shape != was:
                    return False
                kept.append(())
                continue
            predictions = self._predict_all(watch, known.layers)
            if tensor.shape != self._shape(was, predictions):
                return False
            kept.append(tuple([p.layer for p in predictions]))
        for tensor, layers, (_, known, _) in zip(outs, kept, record.outputs, strict=True):
            watch.put(tensor, layers, source=known.source, derived=known.derived, pending=known.pending)
        self.position += 1
        return True

    def check(self, watch: Watch, record: Record, operands: list[State], outs: list[Tensor]) -> bool:
        """The rule was applied anew: hold its result against the record."""
        if self.stopped:
            return False
        self.loose = self.loose or record.by_values
        expected = self._expected(record)
        if self.loose and (expected is None or len(expected.outputs) != len(outs)):
            self.stopped = True  # other values, another path: what comes now is not rehearsed
            return False
        if expected is None:
            if record.asked == self.astray:
                return False
            text = f"is followed by {record.op}: the forward takes another path"
            raise Mismatch(self.left_out(record.op), text, watch.place(), reason="decides which path the forward takes")
        if len(expected.outputs) != len(outs):
            raise Mismatch(watch.key(), f"gives {len(outs)} tensors instead of {len(expected.outputs)}", watch.place())
        differs = _another_number(expected, record, operands)
        if all(value is not None for _, _, value in (*expected.outputs, *record.outputs)):
            for (was, planned, before), (shape, known, now) in zip(expected.outputs, record.outputs, strict=True):
                known.differs = _another_value(before, now, differs)
                predicted = self._shape(was, self._predict_all(watch, planned.layers))
                if not self.loose and len(shape) == len(predicted) and any(map(operator.gt, shape, predicted)):
                    raise Mismatch(watch.key(), _unexpected(shape, predicted), watch.place())  # it costs more
            return True
        if differs:
            raise Mismatch(watch.key(), "computes with a number that is another one", watch.place(), reason=NUMBER)
        key = watch.key() if record.op is expected.op else (expected.asked[1], str(expected.op))
        for tensor, (was, known, _) in zip(outs, expected.outputs, strict=True):
            self._check_output(watch, tensor, was, known, key)
        return True

    def _expected(self, record: Record) -> Record | None:
        """The record that this operation is held against, and the next position.

        Torch itself takes other ways at some sizes and strides (what has one channel is contiguous): then the rest of this
        call goes its own way.
        """
        if self.astray is not None and record.asked != self.astray:
            self.astray = None
            asked = [r.asked for r in self.records[self.position :]]
            self.position += asked.index(record.asked) if record.asked in asked else len(asked)
        if self.astray is None and self.position < len(self.records):
            due = self.records[self.position]
            if due.op is record.op or (due.op is SLICE and record.op is ALIAS and due.asked == record.asked):
                self.position += 1  # a slice that takes everything is an alias
                return due
            if due.asked == record.asked:
                self.astray = record.asked
        return None

    def left_out(self, op: Any) -> Key | None:
        """Where a slice is due, and not ``op``: of a slice that takes everything torch makes no operation."""
        due = self.records[self.position] if self.position < len(self.records) else None
        if due is None or due.op is not SLICE or op is SLICE or not due.asked[1]:
            return None
        return due.asked[1], str(SLICE)

    def _check_output(self, watch: Watch, tensor: Tensor, was: tuple[int, ...], known: State, key: Key) -> None:
        shape, layers = tuple(tensor.shape), state(tensor).layers
        if not layers and not known.layers and (shape == was or self.loose):
            return
        layers = tuple(m for m in map(compact, layers) if m.size > 1)
        predictions = self._predict_all(watch, known.layers)
        survivors = [p.layer for p in predictions if p.layer.size > 1]
        predicted = self._shape(was, predictions)
        if predicted != shape:
            raise Mismatch(key, _unexpected(shape, predicted), watch.place())
        if self.single and (len(layers) != len(survivors) or any(m.size < 2 for m in layers)):
            return
        if len(layers) != len(survivors):
            raise Mismatch(key, "loses track of its channels", watch.place())
        for one, other in zip(layers, survivors, strict=True):
            if one.shape != other.shape:
                one, other = np.broadcast_arrays(one, other)
            elsewhere = one != other
            if self.single:
                elsewhere &= one != 0  # beside others, too, the last unit of a group does not say where it belongs
            if elsewhere.any():
                raise Mismatch(key, "arranges the remaining channels differently", watch.place())

    def ended(self, watch: Watch) -> None:
        """The forward is over: is everything there that was recorded?"""
        if self.position < len(self.records) and self.astray is None and not (self.loose or self.stopped):
            text = f"ends before {self.records[self.position].op}: the forward takes another path"
            raise Mismatch(None, text, watch.place(), reason="decides which path the forward takes")

    @staticmethod
    def _shape(was: tuple[int, ...], predictions: list[Prediction]) -> tuple[int, ...]:
        shape = list(was)
        for prediction in predictions:
            for dim, size in prediction.sizes:
                shape[dim] = size
        return tuple(shape)

    def _predict_all(self, watch: Watch, layers: tuple[Layer, ...]) -> list[Prediction]:
        """Of every layer what survives; of several along one dimension, as of a weight that was flattened, what does in all."""
        if len(layers) < 2 or sum(n > 1 for n in map(max, zip(*(m.shape for m in layers), strict=False))) == sum(
            n > 1 for m in layers for n in m.shape
        ):
            return [self._predict(watch, layer) for layer in layers]
        alive = np.ones((1,) * layers[0].ndim, dtype=bool)
        for layer in layers:
            alive = alive & self.alive[layer]
        kept = list(layers)
        for dim in range(alive.ndim):
            if alive.shape[dim] > 1:
                keep = np.flatnonzero(np.moveaxis(alive, dim, 0).reshape(alive.shape[dim], -1).any(1))
                alive = alive.take(keep, dim)
                kept = [m.take(keep, dim) if m.shape[dim] > 1 else m for m in kept]
        if not alive.all():
            raise Mismatch(watch.key(), "would leave a ragged set of channels", watch.place())
        sizes = [
            tuple((d, k.shape[d]) for d, n in enumerate(m.shape) if n > 1) for m, k in zip(layers, kept, strict=True)
        ]
        return [Prediction(m, compact(k), s) for m, k, s in zip(layers, kept, sizes, strict=True)]

    def _predict(self, watch: Watch, layer: Layer) -> Prediction:
        """What of a layer survives; remembered, since most operations hand on the layer they got."""
        found = self._predictions.get(id(layer))
        if found is None:
            kept = self._restrict(watch, layer)
            sizes = tuple([(dim, kept.shape[dim]) for dim, size in enumerate(layer.shape) if size > 1])
            found = self._predictions[id(layer)] = Prediction(layer, compact(kept), sizes)
        return found

    def _restrict(self, watch: Watch, layer: Layer) -> Layer:
        if layer.size == max(layer.shape, default=1):  # along one dimension, as nearly always
            labels = layer.reshape(-1)
            stays = labels[self.alive[labels]]
            if not len(stays) and len(labels) == 1:
                raise Mismatch(watch.key(), "would leave a ragged set of channels", watch.place())
            return stays.reshape(tuple([-1 if n > 1 else 1 for n in layer.shape]))
        alive = self.alive[layer]
        for dim in varying(layer):
            keep = np.flatnonzero(np.moveaxis(alive, dim, 0).reshape(layer.shape[dim], -1).any(1))
            layer, alive = layer.take(keep, dim), alive.take(keep, dim)
        if not alive.all():
            raise Mismatch(watch.key(), "would leave a ragged set of channels", watch.place())
        return layer


def _unexpected(shape: Sequence[int], predicted: Sequence[int]) -> str:
    return f"gives shape {list(shape)} where {list(predicted)} was expected"


def _another_number(expected: Record, record: Record, operands: list[State]) -> bool:
    """Does the operation compute with other numbers, be they scalars or constant tensors, than those recorded?"""
    if expected.numbers != record.numbers and repr(expected.numbers) != repr(record.numbers):
        return True
    if len(expected.values) != len(record.values):
        return any(known.differs for known in operands)
    return any(
        _another_value(was, now, known.differs)
        for was, now, known in zip(expected.values, record.values, operands, strict=False)
    )


def _another_value(was: Value, now: Value, differs: bool) -> bool:
    if isinstance(was, Tensor) and isinstance(now, Tensor):
        return not same_value(was, now)
    return differs


__all__ = ["Mismatch", "Rehearsal", "Rehearsed", "widths"]
