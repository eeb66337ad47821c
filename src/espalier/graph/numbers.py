"""Whole numbers that modules keep, and what a forward computes of them: how a width reaches a split, a slice or a view.

In the private copy that is watched ``self.c`` is a ``Number``: an ``int`` that remembers which number of which module it is,
through ``//``, ``*``, ``+`` and ``-``.  A call that gets one says which of its sizes came from there, so that the number can be
as many as the channels that it counts, and follow when they go.  A rehearsal proves that it may.

``Sized`` numbers are sizes of tensors that say how large they are for any choice of widths.  Both kinds tell ``Comparing`` what
they are compared with in the user's code.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import FrameType
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import nn

from espalier.carving import number_name, whole_numbers
from espalier.graph.reasons import is_users


class Ties(Protocol):
    """What a number needs of the watch."""

    staying: set[str]  # names of numbers that do not follow

    def axis_labels(self, tensor: str, dim: int, size: int) -> np.ndarray: ...

    def tie(self, a: np.ndarray, b: np.ndarray) -> None: ...


Labels = Callable[[Ties], "np.ndarray | None"]
Note = Callable[[str, int, int, int], None]  # of which tensor and dimension, the number, and what it is not equal to
Count = Callable[[np.ndarray], int]  # of which labels are alive


class Side(NamedTuple):
    """One of two numbers that are compared: what it is for every choice of living labels, and which labels decide that."""

    count: Count
    labels: np.ndarray


class Comparison(NamedTuple):
    line: str  # ``file:number`` of the user's code
    op: Callable[[Any, Any], Any]
    left: Side
    right: Side


class Comparing:
    """While it is entered, comparisons of ``Compared`` numbers in the user's code are ``heard``.

    Given ``ties`` it is told what is compared, too: ``found``.  One inside of such a one changes nothing.
    """

    def __init__(self, ties: Ties | None = None) -> None:
        self.ties = ties
        self.heard = False
        self.found: list[Comparison] = []

    def __enter__(self) -> Comparing:
        outer = _comparing.get()
        self._token = _comparing.set(self if outer is None or self.ties is not None else outer)
        return self

    def __exit__(self, *_: Any) -> None:
        _comparing.reset(self._token)

    def hear(self, op: Callable[[Any, Any], Any], one: Compared, other: int, frame: FrameType) -> None:
        if not is_users(frame.f_code.co_filename):
            return
        self.heard = True
        if self.ties is None:
            return
        left, right = _side(one, self.ties), _side(other, self.ties)
        if left is not None and right is not None:
            self.found.append(Comparison(f"{frame.f_code.co_filename}:{frame.f_lineno}", op, left, right))


_comparing: ContextVar[Comparing | None] = ContextVar("comparing", default=None)


class Compared(int):
    """A number that may follow widths, and tells ``Comparing`` what it is compared with."""

    def side(self, ties: Ties) -> Side | None:
        raise NotImplementedError

    __hash__ = int.__hash__

    def __eq__(self, other: object) -> bool:
        return _compared(operator.eq, self, other)

    def __ne__(self, other: object) -> bool:
        return _compared(operator.ne, self, other)

    def __lt__(self, other: Any) -> bool:
        return _compared(operator.lt, self, other)

    def __le__(self, other: Any) -> bool:
        return _compared(operator.le, self, other)

    def __gt__(self, other: Any) -> bool:
        return _compared(operator.gt, self, other)

    def __ge__(self, other: Any) -> bool:
        return _compared(operator.ge, self, other)

    def __bool__(self) -> bool:
        return _compared(operator.ne, self, 0)


def _compared(op: Callable[[Any, Any], Any], one: Compared, other: Any) -> Any:
    if not isinstance(other, int):
        return op(int(one), other)
    comparing = _comparing.get()
    if comparing is not None:
        comparing.hear(op, one, other, sys._getframe(2))
    return op(int(one), int(other))


def _side(number: int, ties: Ties) -> Side | None:
    if isinstance(number, Compared):
        return number.side(ties)
    return Side(lambda _: int(number), np.zeros(0, dtype=np.int64))


class Sized(Compared):
    """The size of a tensor along a dimension that follows widths, and what is computed of it."""

    known: Side

    @staticmethod
    def of(value: int, side: Side) -> Sized:
        number = Sized(value)
        number.known = side
        return number

    def side(self, ties: Ties) -> Side:
        return self.known


def _computed(op: Callable[[Any, Any], Any], swapped: bool = False) -> Callable[[Sized, Any], Any]:
    def compute(self: Sized, other: Any) -> Any:
        one, two = (other, self) if swapped else (self, other)
        if not isinstance(other, int):
            return op(int(one) if one is self else one, int(two) if two is self else two)
        value = op(int(one), int(two))
        theirs = other.known if isinstance(other, Sized) else Side(lambda _: int(other), np.zeros(0, dtype=np.int64))
        left, right = (theirs, self.known) if swapped else (self.known, theirs)
        labels = np.union1d(left.labels, right.labels)
        return Sized.of(value, Side(lambda alive: op(left.count(alive), right.count(alive)), labels))

    return compute


for _name in ("add", "sub", "mul", "floordiv", "mod", "and", "rshift", "lshift"):
    _op = getattr(operator, f"__{_name}__")
    setattr(Sized, f"__{_name}__", _computed(_op))
    setattr(Sized, f"__r{_name}__", _computed(_op, swapped=True))


class Number(Compared):
    """A whole number that remembers where it came from; ``labels(watch)``, shape ``(abs(number),)``, are what it counts.

    They are ``None`` where it follows, and what it counts is not known.
    """

    labels: Labels
    leaf: str  # its name, if it was not computed
    note: Callable[[int], None] | None  # that it was compared with another, and is not that

    @staticmethod
    def of(value: int, labels: Labels, leaf: str = "", note: Callable[[int], None] | None = None) -> Number:
        number = Number(value)
        number.labels, number.leaf, number.note = labels, leaf, note
        return number

    def __eq__(self, other: object) -> bool:
        """``assert x.shape[1] == self.channels``: were it to follow, what it is compared with would say what it counts."""
        self._differs_from(other)
        return _compared(operator.eq, self, other)

    def __ne__(self, other: object) -> bool:
        self._differs_from(other)
        return _compared(operator.ne, self, other)

    __hash__ = int.__hash__

    def _differs_from(self, other: object) -> None:
        if self.note is not None and isinstance(other, int) and int(self) != int(other):
            self.note(int(other))

    def side(self, ties: Ties) -> Side | None:
        found = self.labels(ties)
        if found is None:
            return None
        sign = -1 if int(self) < 0 else 1
        return Side(lambda alive: sign * int(alive[found].sum()), found)

    def __mod__(self, other: Any) -> Any:
        """It counts nothing, but may decide which way the forward goes."""
        comparing = _comparing.get()
        side = None if comparing is None or comparing.ties is None else self.side(comparing.ties)
        return (int(self) if side is None else Sized.of(int(self), side)) % other

    def __floordiv__(self, parts: Any) -> Any:
        """One of several equal parts, which all lose the same."""
        whole = int(self) // parts
        if not isinstance(parts, int) or parts < 1 or whole * parts != int(self):
            return whole

        def labels(watch: Ties) -> np.ndarray | None:
            found = self.labels(watch)
            if found is None:
                return None
            rows = found.reshape(parts, whole)
            watch.tie(rows[1:], rows[:1])
            return rows[0]

        return Number.of(whole, labels)

    def __mul__(self, times: Any) -> Any:
        """As many parts, which all lose the same."""
        if not isinstance(times, int) or times < 1:
            return int(self) * times
        return Number.of(int(self) * int(times), lambda watch: _repeated(watch, self, times))

    __rmul__ = __mul__

    def __add__(self, other: Any) -> Any:
        return _joined(self, other) if isinstance(other, int) else int(self) + other

    def __radd__(self, other: Any) -> Any:
        return _joined(other, self) if isinstance(other, int) else other + int(self)

    def __sub__(self, other: Any) -> Any:
        """What is left after the first ``other`` of them."""
        if not isinstance(other, Number):
            return int(self) - other

        def labels(watch: Ties) -> np.ndarray | None:
            all_, gone = self.labels(watch), other.labels(watch)
            if all_ is None or gone is None or len(gone) > len(all_):
                return None
            watch.tie(all_[: len(gone)], gone)
            return all_[len(gone) :]

        return Number.of(int(self) - int(other), labels)

    def __rsub__(self, other: Any) -> Any:
        return Number.of(other - int(self), lambda _: None) if type(other) is int else other - int(self)

    def __neg__(self) -> Number:
        return Number.of(-int(self), self.labels)


def _repeated(watch: Ties, one: Number, other: int) -> np.ndarray | None:
    """Of two numbers that of which the watch knows that it stays says how often, else the smaller."""
    if isinstance(other, Number) and (one.leaf in watch.staying or (other.leaf not in watch.staying and other > one)):
        one, other = other, one
    if one.leaf in watch.staying:  # so it is the other that follows, a size of some tensor
        return None
    found = one.labels(watch)
    return None if found is None else np.tile(found, int(other))


def _joined(one: int, other: int) -> int:
    def labels(watch: Ties) -> np.ndarray | None:
        parts = [
            n.labels(watch) if isinstance(n, Number) else np.zeros(max(n, 0), dtype=np.int64) for n in (one, other)
        ]
        return None if any(p is None for p in parts) else np.concatenate(parts)  # type: ignore[arg-type]

    return Number.of(int(one) + int(other), labels)


OF_LAYERS = {"out_channels": 0, "in_channels": 1, "out_features": 0, "in_features": 1, "num_features": 0}
"""Numbers of torch's layers that repeat a dimension of their weight."""


def install(modules: dict[str, nn.Module], note: Note) -> None:
    """Let every number of ``modules``, private copies, remember what it is, and ``note`` what it is not equal to."""
    for name, module in modules.items():
        own = vars(module)
        for key, value in whole_numbers(module).items():
            if type(value) is int:
                own[key] = _kept(name, key, value, note)
            else:
                own[key] = type(value)(_kept(name, f"{key}.{i}", n, note) for i, n in enumerate(value))
        held = own.get("_parameters")
        weight = held.get("weight") if isinstance(held, dict) else None  # of a scripted module it is no dictionary
        for key, dim in OF_LAYERS.items():
            if weight is not None and type(own.get(key)) is int and dim < weight.ndim and weight.shape[dim] == own[key]:
                own[key] = _counting(f"{name}.weight", dim, own[key], note)


def _kept(module: str, key: str, value: int, note: Note) -> int:
    return _counting(number_name(module, key), 0, value, note)


def _counting(tensor: str, dim: int, value: int, note: Note) -> int:
    """A number that counts a dimension of ``tensor``; one is nobody's."""
    if value < 2:
        return value
    return Number.of(
        value,
        lambda watch: watch.axis_labels(tensor, dim, value),
        f"{tensor} {dim}",
        lambda other: note(tensor, dim, value, other),
    )


class Width(int):
    """The size of a tensor along its channels, in a watch: as many as ``labels``.

    What is left of it after that of another follows; what else is computed of it is any number.
    """

    labels: np.ndarray

    @staticmethod
    def of(value: int, labels: np.ndarray) -> Width:
        width = Width(value)
        width.labels = labels
        return width

    __hash__ = int.__hash__

    def __sub__(self, other: Any) -> Any:
        left = int(self) - other
        return Width.of(left, self.labels[other:]) if isinstance(other, Width) and left > 0 else left


def _as_int(op: Callable[[Any, Any], Any]) -> Callable[[Width, Any], Any]:
    """So that a ``Number`` on the other side is asked, as it would be by any ``int``: Python asks the left one first."""
    return lambda self, other: op(int(self), other)


for _name in ("add", "mul", "floordiv", "mod", "eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Width, f"__{_name}__", _as_int(getattr(operator, f"__{_name}__")))


def sizes_in(args: Any) -> list[int] | None:
    """The whole numbers among the arguments of a call of torch's, one after the other; none if nobody knows what they count."""
    found = [n for value in args for n in (value if isinstance(value, (tuple, list)) else (value,))]
    known = any(type(n) in (Number, Width) for n in found)
    return [n for n in found if type(n) in (int, Number, Width)] if known else None


def numbers_in(args: Any) -> Iterator[Number]:
    """The numbers among the arguments of a call of torch's, in slices and lists as well."""
    for value in args:
        if type(value) is Number:
            yield value
        elif type(value) in (tuple, list):
            yield from numbers_in(value)
        elif type(value) is slice:
            yield from numbers_in((value.start, value.stop, value.step))
