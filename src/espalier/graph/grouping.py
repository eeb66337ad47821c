"""Labels that live and die together become units, units that are alike become groups, and lengths become extents."""

from __future__ import annotations

from typing import Any

import numpy as np

from espalier.graph.graph import Extent, Frozen, Graph, Group, Site, Slice, Term
from espalier.graph.memory import moments
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


def build(watch: Watch, component: np.ndarray, notes: tuple[str, ...]) -> Graph:
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

    activations, inside, ran, spans = moments(watch, extent)
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


def _group_name(slices: list[Slice]) -> str:
    """The module that makes the channels; for a bare parameter its own name."""
    tensor = next((s.tensor for s in slices if "#" not in s.tensor and not s.tensor.endswith("bias")), slices[0].tensor)
    module, _, key = tensor.rpartition(".")
    return module if key in ("weight", "bias") and module else tensor.split("#")[0]
