"""Labels that live and die together become units, units that are alike become groups, and lengths become extents."""

from __future__ import annotations

import numpy as np

from espalier.carving import number_named
from espalier.graph.graph import Extent, Frozen, Graph, Group, Site, Slice, Term
from espalier.graph.memory import moments
from espalier.graph.reasons import FIXED, UNUSED, Reason
from espalier.graph.watch import Axis, Watch


def components(watch: Watch) -> np.ndarray:
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


def _frozen_components(watch: Watch, component: np.ndarray) -> dict[int, Reason]:
    """Component -> first reason for which it may not lose anything."""
    reasons: dict[int, Reason] = {}
    for labels, reason in watch.freezes:
        for root in np.unique(component[labels]):
            reasons.setdefault(int(root), reason)
    for rows, held, reason in watch.mixes:
        roots = component[rows]
        bad = (roots != roots[:, :1]).any(1)
        if bad.any():
            for root in np.unique(roots[bad][:, held]):
                reasons.setdefault(int(root), reason)
    reasons.setdefault(0, FIXED)
    return reasons


def build(watch: Watch, component: np.ndarray, notes: tuple[Reason, ...]) -> Graph:
    """Group the components."""
    reasons = _frozen_components(watch, component)
    axes = sorted(watch.axes, key=lambda a: a.start)
    groups, group_of_label = _groups(axes, _alike(watch, component, axes, reasons))
    shapes = {n: tuple(t.shape) for n, t in (*watch.parameters.items(), *watch.buffers.items())}
    shapes |= {a.tensor: (a.size,) for a in axes if number_named(a.tensor)}
    extents = _Extents(group_of_label, [g.size for g in groups])
    span = _limits(axes, group_of_label)
    activations, inside, ran, spans = moments(watch, extents.of)
    sites = tuple(
        Site(
            s.module,
            s.kind,
            Term(s.module, s.coefficient, tuple(extents.of(f) for f in s.factors)),
            *ran.get(s.clock, ()),
        )
        for s in watch.sites
    )
    own = {f"{b}.{kind}" for b in watch.baked for kind in ("weight", "bias")}
    return Graph(
        groups=groups,
        frozen=_frozen(watch, axes, shapes, span, component, group_of_label, reasons),
        sites=sites,
        parameters=_parameters(watch, axes, span, extents),
        activations=activations,
        inside=inside,
        spans=spans,
        extents=tuple(extents.found),
        shapes=shapes,
        group_width=dict(watch.whole_groups),
        baked=tuple(watch.baked),
        baked_away=tuple(n for n in watch.parameters for b in watch.baked if n.startswith(f"{b}.") and n not in own),
        unknown=tuple(watch.unknown),
        notes=notes,
        fixed_lines=tuple((*key, level) for key, level in watch.lessons.lines.items()),
        turned_views=tuple(sorted(watch.lessons.turned)),
        fixed_modules=tuple(watch.lessons.modules),
        reread=tuple(name for name in watch.parameters if watch.reads[name] > 1),
    )


Alike = tuple[list[tuple[int, int, bool]], np.ndarray]
"""Units that cost the same: (axis, labels on it, consumed) of one of them, and their labels' numbers, ``(units, labels)``."""


def _alike(watch: Watch, component: np.ndarray, axes: list[Axis], reasons: dict[int, Reason]) -> list[Alike]:
    """Free components that something consumes, those of equal signatures together.

    All labels are sorted by (component, axis, position) and cut into components.
    """
    root = component[1:]
    consumed = np.zeros(watch.label_count, dtype=bool)
    for vector in watch.consumers:
        consumed[vector] = True
    for _ in watch.read_alike:  # of sums of sums, too
        for one, other in watch.read_alike:
            consumed[one] = consumed[other] = consumed[one] | consumed[other]
    consumed[0] = False
    free = np.zeros(watch.label_count, dtype=bool)
    free[component[np.flatnonzero(consumed)]] = True
    free[list(reasons)] = False
    members = np.flatnonzero(free[root])
    order = members[np.argsort(root[members], kind="stable")]  # labels are numbered axis by axis, position by position
    if not len(order):
        return []
    starts = np.array([a.start for a in axes], dtype=np.int64)
    where, whose = np.searchsorted(starts, order + 1, side="right") - 1, root[order]
    run = np.flatnonzero(_starts(where) | _starts(whose))  # a run: one axis, one component
    count = np.diff(np.append(run, len(order)))
    rows = np.stack([where[run], count, consumed[order[run] + 1]], axis=1)
    begin = np.flatnonzero(_starts(whose[run]))  # first run of every component
    end = [*begin[1:].tolist(), len(run)]
    groups: list[Alike] = []
    for units in _equal_components(rows, begin):
        first = begin[units]
        n = end[units[0]] - int(first[0])  # runs of one component
        signature = [(a, c, bool(u)) for a, c, u in rows[first[0] : first[0] + n].tolist()]
        of_each = rows[first[:, None] + np.arange(n)]
        assert not np.count_nonzero(of_each != of_each[:1])
        labels_each = sum(c for _, c, _ in signature)
        groups.append((signature, order[run[first][:, None] + np.arange(labels_each)] + 1))
    return groups


def _groups(axes: list[Axis], alike: list[Alike]) -> tuple[tuple[Group, ...], np.ndarray]:
    """Groups with names of their own, and the number of the group that each label belongs to, or -1."""
    made: list[Group] = []
    names: dict[str, int] = {}
    last = axes[-1] if axes else None
    group_of_label = np.full(last.start + last.size if last else 1, -1, dtype=np.int64)
    for signature, labels in alike:
        group_of_label[labels.reshape(-1)] = len(made)
        slices, offset = [], 0
        for number, length, used in signature:
            axis = axes[number]
            slices.append(Slice(axis.tensor, axis.dim, labels[:, offset : offset + length] - axis.start, used))
            offset += length
        slices.sort(key=lambda s: (s.consumed, number_named(s.tensor) is not None))
        base = _group_name(slices)
        names[base] = names.get(base, 0) + 1
        made.append(Group(base if names[base] == 1 else f"{base}~{names[base]}", len(labels), tuple(slices)))
    return tuple(made), group_of_label


class _Extents:
    """Lengths as sums over groups, each written down once; ``of`` gives the number of that of a vector of labels."""

    def __init__(self, group_of_label: np.ndarray, unit_sizes: list[int]) -> None:
        self.group_of_label, self.unit_sizes = group_of_label, unit_sizes
        self.found: list[Extent] = []
        self._known: dict[tuple[int, tuple[tuple[int, int], ...]], int] = {}
        self._asked: dict[int, tuple[np.ndarray, int]] = {}

    def of(self, vector: np.ndarray) -> int:
        asked = self._asked.get(id(vector))
        if asked is None:
            asked = self._asked[id(vector)] = (vector, self.of_owners(self.group_of_label[vector]))
        return asked[1]

    def of_owners(self, owner: np.ndarray) -> int:
        first = int(owner[0]) if len(owner) else -1
        if not np.count_nonzero(owner != first):  # as nearly always
            return self.like(first, len(owner))
        counts = np.bincount(owner + 1)  # 0: nobody's
        numbers = counts[1:].nonzero()[0].tolist()
        return self._number(int(counts[0]), tuple((g, int(counts[g + 1]) // self.unit_sizes[g]) for g in numbers))

    def like(self, group: int, length: int) -> int:
        """Of ``length`` positions that all belong to one group, or (-1) to nobody."""
        return self._number(length, ()) if group < 0 else self._number(0, ((group, length // self.unit_sizes[group]),))

    def _number(self, fixed: int, each: tuple[tuple[int, int], ...]) -> int:
        if (fixed, each) not in self._known:
            self._known[fixed, each] = len(self.found)
            self.found.append(Extent(fixed, each))
        return self._known[fixed, each]


Limits = dict[tuple[str, int], tuple[int, int]]
"""Tensor and dimension -> lowest and highest group among its labels, -1 where nobody's."""


def _limits(axes: list[Axis], group_of_label: np.ndarray) -> Limits:
    sized = [a for a in axes if a.size]
    if not sized:
        return {}
    low, high = (f.reduceat(group_of_label, [a.start for a in sized]).tolist() for f in (np.minimum, np.maximum))
    return {(a.tensor, a.dim): limits for a, *limits in zip(sized, low, high, strict=True)}  # type: ignore[misc]


def _parameters(watch: Watch, axes: list[Axis], limits: Limits, extents: _Extents) -> tuple[Term, ...]:
    """How many elements every parameter has."""
    by_tensor: dict[str, list[Axis]] = {}
    for axis in axes:
        by_tensor.setdefault(axis.tensor, []).append(axis)
    terms = []
    for name, parameter in watch.parameters.items():
        rest, moving = parameter.numel(), []
        for a in by_tensor.get(name, []):
            low, high = limits[a.tensor, a.dim]
            if high >= 0:
                owner = extents.group_of_label[a.start : a.start + a.size]
                moving.append(extents.like(low, a.size) if low == high else extents.of_owners(owner))
                rest //= a.size
        terms.append(Term(name, rest, tuple(moving)))
    return tuple(terms)


def _frozen(
    watch: Watch,
    axes: list[Axis],
    shapes: dict[str, tuple[int, ...]],
    limits: Limits,
    component: np.ndarray,
    group_of_label: np.ndarray,
    reasons: dict[int, Reason],
) -> tuple[Frozen, ...]:
    """What stays of every weight, by reason."""
    frozen = []
    for axis in axes:
        if (
            axis.dim > 1
            or number_named(axis.tensor)
            or axis.tensor not in shapes
            or limits[axis.tensor, axis.dim][0] >= 0
        ):
            continue
        stuck = axis.start + np.flatnonzero(group_of_label[axis.start : axis.start + axis.size] < 0)
        counts: dict[Reason, int] = {}
        for root, n in zip(*np.unique(component[stuck], return_counts=True), strict=True):
            reason = reasons.get(int(root)) or Reason(UNUSED, watch.owner(axis.tensor))
            counts[reason] = counts.get(reason, 0) + int(n)
        frozen += [Frozen(axis.tensor, axis.dim, n, reason) for reason, n in counts.items()]
    return tuple(frozen)


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


def _group_name(slices: list[Slice]) -> str:
    """The module that makes the channels; for a bare parameter its own name."""
    tensors = [s.tensor for s in slices if not number_named(s.tensor)]
    tensor = next((t for t in tensors if not t.endswith("bias")), slices[0].tensor)
    if number := number_named(tensor):
        return number[0]
    module, _, key = tensor.rpartition(".")
    return module if key in ("weight", "bias") and module else tensor
