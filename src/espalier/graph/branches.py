"""Which way a forward goes can hang on a comparison of sizes: the widths at which one turns out otherwise.

``y + x if y.shape == x.shape else y`` takes another path once ``x`` is as narrow as ``y``, and few widths would show it.  So
one more forward is watched in which sizes remember what they count.  Every comparison in the user's code says by which widths
it turns, and these are rehearsed like all others (``graph.rehearsal``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from espalier.graph.constants import SIZE_GETTERS
from espalier.graph.graph import Graph
from espalier.graph.numbers import Comparison, Side, Sized
from espalier.graph.rehearsal import Rehearsed, spread
from espalier.graph.watch import Watch, state, varying

MOST_TURNED = 16  # comparisons: each is one more rehearsal
RANDOM_WIDTHS = 200  # are tried of a side that several groups decide


class SizesRemember(TorchFunctionMode):
    """Sizes that follow widths are ``Sized`` numbers: those of ``tensor.shape``, ``tensor.size()`` and ``tensor.numel()``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func not in SIZE_GETTERS or not isinstance(args[0], Tensor):
            return out
        if func is Tensor.numel:
            return math.prod(_size(args[0], dim, size) for dim, size in enumerate(tuple(args[0].shape)))
        if isinstance(out, int):
            return _size(args[0], (kwargs or {}).get("dim", args[1] if len(args) > 1 else 0), out)
        return torch.Size(_size(args[0], dim, size) for dim, size in enumerate(out))


def _size(tensor: Tensor, dim: int, size: int) -> int:
    layers = [layer for layer in state(tensor).layers if layer.ndim == tensor.ndim]
    dim %= tensor.ndim
    rows = [np.moveaxis(m, dim, 0).reshape(size, -1) for m in layers if dim in varying(m)]
    if not rows:
        return size
    labels = np.unique(np.concatenate([r.reshape(-1) for r in rows]))
    return Sized.of(size, Side(lambda alive: int(np.all([alive[r].any(1) for r in rows], axis=0).sum()), labels))


class AsWatched:
    """What a number needs of a watch that is over."""

    def __init__(self, watch: Watch) -> None:
        self.staying, self.axis_labels = watch.staying, watch.axis_labels

    def tie(self, a: np.ndarray, b: np.ndarray) -> None:
        """Nothing: what belongs together was found out in the watch."""


def turned(graph: Graph, watch: Watch, comparisons: Iterable[Comparison]) -> Iterator[Rehearsed]:
    """For every comparison the widths, nearest to the whole network, at which it turns out otherwise, if there are any."""
    widths = _Widths(graph, watch)
    seen: set[Any] = set()
    for comparison in comparisons:
        counts = widths.that_turn(comparison)
        key = comparison.line, None if counts is None else tuple(counts.items())
        if counts is None or key in seen:
            continue
        seen.add(key)
        yield Rehearsed(spread(graph, [counts.get(number, g.size) for number, g in enumerate(graph.groups)]))
        if len(seen) == MOST_TURNED:
            return


class _Tried(NamedTuple):
    """Choices of widths for some groups, and what one side of a comparison is at each."""

    counts: list[dict[int, int]]  # group number -> units
    values: np.ndarray
    cut: np.ndarray  # how many groups are cut, and by which share


class _Widths:
    def __init__(self, graph: Graph, watch: Watch) -> None:
        start = {(a.tensor, a.dim): a.start for a in watch.axes}
        self.sizes = graph.sizes.tolist()
        self.alive = np.ones(watch.label_count, dtype=bool)
        self.owner = np.full(watch.label_count, -1)
        self.labels = []  # of every group, a row for each unit
        self.graph = graph
        for number, group in enumerate(graph.groups):
            rows = [start[s.tensor, s.dim] + s.index for s in group.slices if (s.tensor, s.dim) in start]
            self.labels.append(np.concatenate(rows, axis=1) if rows else np.zeros((group.size, 0), dtype=np.int64))
            self.owner[self.labels[-1]] = number

    def that_turn(self, comparison: Comparison) -> dict[int, int] | None:
        left, right = (self._groups(side) for side in (comparison.left, comparison.right))
        if not left and not right:
            return None
        if set(left) & set(right):
            one, two = (self._tried(sorted({*left, *right}), side) for side in (comparison.left, comparison.right))
            outcomes, cut = comparison.op(one.values, two.values), one.cut
        else:
            one, two = self._tried(left, comparison.left), self._tried(right, comparison.right)
            outcomes = comparison.op(one.values[:, None], two.values[None])
            cut = one.cut[:, None] + two.cut[None]
        turning = outcomes != outcomes.reshape(-1)[0]  # the first choice is the whole network
        if not turning.any():
            return None
        best = np.unravel_index(np.where(turning, cut, np.inf).argmin(), cut.shape)
        return one.counts[best[0]] | two.counts[best[-1]]

    def _groups(self, side: Side) -> list[int]:
        owners = np.unique(self.owner[side.labels]) if len(side.labels) else np.zeros(0, dtype=np.int64)
        return [int(n) for n in owners if n >= 0]

    def _tried(self, groups: list[int], side: Side) -> _Tried:
        counts = list(self._choices(groups))
        values = np.array([self._value(side, c) for c in counts])
        shares = [[1 - n / self.sizes[g] for g, n in c.items() if n < self.sizes[g]] for c in counts]
        return _Tried(counts, values, np.array([len(s) + sum(s) / (1 + len(s)) for s in shares]))

    def _choices(self, groups: list[int]) -> Iterator[dict[int, int]]:
        sizes = {g: self.sizes[g] for g in groups}
        yield sizes
        for g, size in sizes.items():
            yield from ({**sizes, g: n} for n in range(size - 1, 0, -1))
        if len(groups) > 1:
            yield from ({g: min(n, size) for g, size in sizes.items()} for n in range(1, max(sizes.values())))
            draw = np.random.default_rng(0)
            for _ in range(RANDOM_WIDTHS):
                yield {g: int(draw.integers(1, size + 1)) for g, size in sizes.items()}

    def _value(self, side: Side, counts: dict[int, int]) -> int:
        alive = self.alive.copy()
        for g, n in counts.items():
            gone = np.ones(self.sizes[g], dtype=bool)
            gone[(np.arange(n) * self.sizes[g]) // n if n > 1 else g % self.sizes[g]] = False
            alive[self.labels[g][gone]] = False
        return int(side.count(alive))
