"""What a trace knows: which channels go together, what is frozen and why, and what every layer costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from espalier.carving import Kept


@dataclass(frozen=True)
class Slice:
    """The part of one tensor that belongs to the units of a group.

    ``index[j]`` are the positions along ``dim`` that go when unit ``j`` goes; shape ``(units, positions per unit)``.
    ``consumed`` marks inputs of a convolution or linear layer: zeroing these removes the unit's effect.
    """

    tensor: str
    dim: int
    index: np.ndarray
    consumed: bool


@dataclass(frozen=True)
class Group:
    """Interchangeable units: each can be removed by itself, and all cost the same."""

    name: str
    size: int
    slices: tuple[Slice, ...]

    @property
    def consumers(self) -> tuple[Slice, ...]:
        return tuple(s for s in self.slices if s.consumed)

    @property
    def producers(self) -> tuple[Slice, ...]:
        return tuple(s for s in self.slices if not s.consumed)

    @property
    def width(self) -> int:
        """Channels that one unit holds at the layer that makes them."""
        return int(self.slices[0].index.shape[1])


@dataclass(frozen=True)
class Extent:
    """A length that depends on the plan: ``fixed + sum(each * kept units)`` over groups."""

    fixed: int
    each: tuple[tuple[int, int], ...]  # (group number, positions per unit)


@dataclass(frozen=True)
class Term:
    """``coefficient`` times the product of extents: the cost of one layer or one parameter."""

    name: str
    coefficient: float
    extents: tuple[int, ...]  # numbers into Graph.extents


@dataclass(frozen=True)
class Site:
    """One layer as the report shows it."""

    module: str
    kind: str
    term: Term


@dataclass(frozen=True)
class Frozen:
    """Channels that stay, and why."""

    tensor: str
    dim: int
    count: int
    reason: str


@dataclass(frozen=True)
class Graph:
    """The channel structure of one model at one input size.  Plain data: holds no tensor of the model."""

    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    extents: tuple[Extent, ...]
    sites: tuple[Site, ...]
    parameters: tuple[Term, ...]
    activations: tuple[tuple[tuple[float, int], ...], ...]  # per moment: (bytes per position, extent or -1 for bytes)
    shapes: dict[str, tuple[int, ...]]
    group_width: dict[str, int]
    baked: tuple[str, ...]  # convolutions with computed weights: plain ones take their place when anything is removed
    baked_away: tuple[str, ...]  # parameters that are gone then
    unknown: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())

    @cached_property
    def index(self) -> dict[str, int]:
        return {g.name: i for i, g in enumerate(self.groups)}

    def group(self, name: str) -> Group:
        """The group of that name; a ``ValueError`` lists what exists."""
        if name not in self.index:
            raise ValueError(f"no group {name!r} in this graph; groups: {', '.join(self.index) or 'none'}")
        return self.groups[self.index[name]]

    @property
    def sizes(self) -> np.ndarray:
        return np.array([g.size for g in self.groups], dtype=np.int64)

    def kept(self, units: dict[str, np.ndarray]) -> Kept:
        """Indices that stay in every tensor when ``units[group]`` (sorted unit numbers) stay."""
        gone: dict[tuple[str, int], list[np.ndarray]] = {}
        for name, stay in units.items():
            group = self.group(name)
            if len(stay) == group.size:
                continue
            lost = np.setdiff1d(np.arange(group.size), stay)
            for s in group.slices:
                gone.setdefault((s.tensor, s.dim), []).append(s.index[lost].reshape(-1))
        kept: Kept = {}
        for (tensor, dim), parts in gone.items():
            mask = np.ones(self.shapes[tensor][dim], dtype=bool)
            mask[np.concatenate(parts)] = False
            kept.setdefault(tensor, {})[dim] = np.flatnonzero(mask)
        return kept

    def after(self, units: Mapping[str, np.ndarray]) -> Graph:
        """The graph of the network that keeps only ``units``: what ``trace`` would find there, without tracing."""
        kept = self.kept(dict(units))
        moved: dict[tuple[str, int], np.ndarray] = {}
        shapes = dict(self.shapes)
        for tensor, by_dim in kept.items():
            for dim, stay in by_dim.items():
                place = np.full(self.shapes[tensor][dim], -1, dtype=np.int64)
                place[stay] = np.arange(len(stay))
                moved[tensor, dim] = place
                shapes[tensor] = tuple(len(stay) if d == dim else n for d, n in enumerate(shapes[tensor]))
        groups = []
        for group in self.groups:
            stay = np.asarray(units[group.name]) if group.name in units else np.arange(group.size)
            slices = []
            for s in group.slices:
                index = s.index[stay]
                move = moved.get((s.tensor, s.dim))
                slices.append(replace(s, index=index if move is None else move[index]))
            groups.append(replace(group, size=len(stay), slices=tuple(slices)))
        if not kept:
            return self
        gone = set(self.baked_away)
        return replace(
            self,
            groups=tuple(groups),
            shapes={n: v for n, v in shapes.items() if n not in gone},
            parameters=tuple(t for t in self.parameters if t.name not in gone),
            baked=(),
            baked_away=(),
        )

    def summary(self) -> str:
        """A table of groups, of layers with MACs and parameters, and of what is frozen and why."""
        from espalier.graph.summary import summarise

        return summarise(self)
