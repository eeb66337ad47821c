"""What a trace knows: which channels go together, what is frozen and why, and what every layer costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from espalier.carving import Kept
from espalier.graph.reasons import Reason
from espalier.graph.times import Staircase


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


CHANNELS, FORM, INPUTS, BLOCK = "channels", "form", "inputs", "block"
"""What the units of a group are."""


def group_name(layer: str, kind: str) -> str:
    """The group of ``kind`` that belongs to one layer or block."""
    return f"{layer}:{kind}"


@dataclass(frozen=True)
class Group:
    """Interchangeable units: each can be removed by itself, and all cost the same.

    The units of a group of alternatives are ``options`` instead, from the cheapest form of a layer up to the dense one:
    they go from the last to the first, and what each saves is read from tables (``Extent.table``).
    """

    name: str
    size: int
    slices: tuple[Slice, ...]
    options: tuple[str, ...] = ()  # what each option is called, for people
    kind: str = CHANNELS  # or FORM, INPUTS, BLOCK
    layer: str = ""  # the one layer, or block, that a group of these kinds belongs to

    @property
    def consumers(self) -> tuple[Slice, ...]:
        return tuple(s for s in self.slices if s.consumed)

    @property
    def producers(self) -> tuple[Slice, ...]:
        return tuple(s for s in self.slices if not s.consumed)

    @property
    def width(self) -> int:
        """Channels that one unit holds at the layer that makes them."""
        return int(self.slices[0].index.shape[1]) if self.slices else 1


@dataclass(frozen=True)
class Extent:
    """A length that depends on the plan: ``fixed + sum(each * kept units) + sum(table[kept units])`` over groups."""

    fixed: int
    each: tuple[tuple[int, int], ...]  # (group number, positions per unit)
    table: tuple[tuple[int, tuple[int, ...]], ...] = ()  # (group number, length at 0, 1, ... kept units)

    def length(self, keep: Sequence[int] | np.ndarray) -> int:
        """The length when group ``g`` keeps ``keep[g]`` units."""
        looked_up = sum(lengths[keep[g]] for g, lengths in self.table)
        return int(self.fixed + sum(n * keep[g] for g, n in self.each) + looked_up)

    @property
    def groups(self) -> set[int]:
        """Numbers of the groups it depends on."""
        return {g for g, _ in (*self.each, *self.table)}


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
    live: tuple[
        tuple[float, int], ...
    ] = ()  # bytes alive when it ran, its output included: (bytes per position, extent)
    made: tuple[float, int] = (0.0, -1)  # its output: bytes per position, extent
    time: Staircase | None = None  # by the extents of the term; ``espalier.timing`` knows it
    form: str = ""  # the alternative that it belongs to; none of a layer as it is


@dataclass(frozen=True)
class Span:
    """One call of a module that gives the shape that it is given: what could be left out, as far as shapes tell."""

    module: str
    live: tuple[
        tuple[float, int], ...
    ]  # bytes alive when it was called, its input included: (bytes per position, extent)
    made: tuple[float, int]  # its output


@dataclass(frozen=True)
class Block:
    """A residual block that may be left out (``graph.blocks``).

    With the parameters ``silent`` at zero its branch adds nothing, and the block computes ``left``, a name in
    ``graph.blocks.LEFT``, of its input.
    """

    module: str
    silent: tuple[str, ...]
    left: str = "Identity"

    @property
    def group(self) -> str:
        """The group of the graph that says whether it stays."""
        return group_name(self.module, BLOCK)

    def holds(self, name: str) -> bool:
        """Is the module or tensor ``name`` part of it?"""
        return name == self.module or name.startswith(f"{self.module}.")


@dataclass(frozen=True)
class ConvSequence:
    """One way to compute a layer: one or more convolutions in a row.  Plain numbers, so that any form can be planned.

    Stage ``i`` maps ``widths[i - 1]`` channels (at the ends: those of the layer) to ``widths[i]``, for ``macs[i]``
    multiply-accumulates and ``params[i]`` weights per pair of channels; ``bytes[i]`` are held per channel in between.  One that
    ``copies`` its input is planned as if it read all channels: activation memory may then be less than planned.
    """

    name: str
    macs: tuple[int, ...]
    params: tuple[int, ...]
    widths: tuple[int, ...] = ()
    bytes: tuple[int, ...] = ()
    copies: int = 0  # bytes per input channel of a padded copy of the input
    depthwise: tuple[bool, ...] = ()  # stages that work on each channel by itself; none if empty

    def __str__(self) -> str:
        return f"{self.name} {'-'.join(map(str, self.widths))}".strip()


@dataclass(frozen=True)
class Frozen:
    """Channels that stay, and why."""

    tensor: str
    dim: int
    count: int
    reason: Reason


@dataclass(frozen=True)
class Graph:
    """The channel structure of one model at one input size.  Plain data: holds no tensor of the model."""

    groups: tuple[Group, ...]  # of channels that live or die together
    frozen: tuple[Frozen, ...]  # channels that stay, and why
    extents: tuple[Extent, ...]  # the lengths that costs are made of
    sites: tuple[Site, ...]  # the layers that multiply, in the order in which they ran
    parameters: tuple[Term, ...]  # elements of every parameter
    activations: tuple[tuple[tuple[float, int], ...], ...]  # per moment: (bytes per position, extent or -1 for bytes)
    shapes: dict[str, tuple[int, ...]]  # of every parameter and buffer
    group_width: dict[str, int]  # grouped layer -> channels of one of its groups
    baked: tuple[str, ...]  # convolutions with computed weights: plain ones take their place when anything is removed
    baked_away: tuple[str, ...]  # parameters that are gone then
    baked_new: tuple[str, ...] = field(default=(), kw_only=True)  # weights that are parameters only then
    unknown: tuple[Reason, ...]  # operations without a rule
    notes: tuple[Reason, ...] = ()  # what else to know
    selects: tuple[str, ...] = ()  # convolutions that may select their inputs (``graph.inputs``)
    inside: tuple[
        str, ...
    ] = ()  # per moment of ``activations``: the module without which it would not be; none further
    spans: tuple[Span, ...] = ()  # calls that could be left out, as far as shapes tell
    fixed_lines: tuple[tuple[str, str, int], ...] = ()  # source line, operation, how much of it rehearsals have fixed
    turned_views: tuple[
        tuple[str, str], ...
    ] = ()  # source line, operation: another dimension shrinks than is guessed first
    fixed_modules: tuple[str, ...] = ()  # whose channels all stay, because a rehearsal refuted them
    reread: tuple[str, ...] = ()  # parameters that one forward reads more than once: their layers take no other form
    blocks: tuple[Block, ...] = ()  # that may be left out (``graph.blocks``)
    overhead: float | None = None  # milliseconds beside those of the sites; ``None`` where nobody has measured
    grain: int = 1  # times are known where widths are multiples of this, or whole

    @cached_property
    def index(self) -> dict[str, int]:
        """Name of a group -> its number."""
        return {g.name: i for i, g in enumerate(self.groups)}

    def group(self, name: str) -> Group:
        """The group of that name; a ``ValueError`` lists what exists."""
        if name not in self.index:
            raise ValueError(f"no group {name!r} in this graph; groups: {', '.join(self.index) or 'none'}")
        return self.groups[self.index[name]]

    @property
    def sizes(self) -> np.ndarray:
        """Units of every group, ``(groups,)``."""
        return np.array([g.size for g in self.groups], dtype=np.int64)

    def absent(self, units: Mapping[str, np.ndarray]) -> tuple[Block, ...]:
        """The blocks that a plan which keeps ``units`` by group, each ``(kept,)``, leaves out."""
        return tuple(b for b in self.blocks if len(units.get(b.group, (0, 1))) == 1 < self.group(b.group).size)

    def inner(self, block: Block) -> list[int]:
        """Numbers of the groups that are gone with ``block``: nothing outside of it holds a part of them."""
        return [
            number
            for number, g in enumerate(self.groups)
            if g.name != block.group
            and (all(block.holds(s.tensor) for s in g.slices) if g.slices else block.holds(g.layer))
        ]

    def kept(self, units: dict[str, np.ndarray]) -> Kept:
        """Indices that stay in every tensor when ``units[group]``, sorted, ``(kept,)``, stay; none for what is left out."""
        gone: dict[tuple[str, int], np.ndarray] = {}
        for name, stay in units.items():
            group = self.group(name)
            if len(stay) == group.size:
                continue
            lost = np.ones(group.size, dtype=bool)
            lost[stay] = False
            for s in group.slices:
                mask = gone.get((s.tensor, s.dim))
                if mask is None:
                    mask = gone[s.tensor, s.dim] = np.zeros(self.shapes[s.tensor][s.dim], dtype=bool)
                mask[s.index[lost]] = True
        kept: Kept = {}
        absent = self.absent(units)
        for (tensor, dim), mask in gone.items():
            if any(b.holds(tensor) for b in absent):
                continue
            kept.setdefault(tensor, {})[dim] = (~mask).nonzero()[0]
        return kept

    def after(self, units: Mapping[str, np.ndarray]) -> Graph:
        """The graph of the network that keeps only ``units`` by group, each ``(kept,)``: what ``trace`` would find there.

        A group of which one unit is left stays a group; ``trace`` would find none.  So do groups inside of a block that is
        left out, but nothing depends on them any more.
        """
        absent = self.absent(units)
        if absent:
            return self._without(absent).after(units)
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
            groups.append(replace(group, size=len(stay), slices=tuple(slices), options=group.options[: len(stay)]))
        if not kept and all(g.size == old.size for g, old in zip(groups, self.groups, strict=True)):
            return self
        gone = set(self.baked_away)
        return replace(
            self,
            groups=tuple(groups),
            extents=tuple(replace(e, table=_shorter(e.table, groups)) for e in self.extents),
            shapes={n: v for n, v in shapes.items() if n not in gone},
            parameters=tuple(t for t in self.parameters if t.name not in gone),
            baked=(),
            baked_away=(),
            baked_new=(),
        )

    def _without(self, absent: Sequence[Block]) -> Graph:
        """The graph in which nothing costs or holds anything that is inside ``absent``; their groups have one unit left."""

        def gone(name: str) -> bool:
            return any(b.holds(name) for b in absent)

        inside = (*self.inside, *[""] * (len(self.activations) - len(self.inside)))
        moments = [(m, n) for m, n in zip(self.activations, inside, strict=True) if not gone(n)]
        left_out = {b.group for b in absent}
        numbers = {self.index[n] for n in left_out}
        groups = [
            replace(
                g,
                size=1 if g.name in left_out else g.size,
                slices=tuple(s for s in g.slices if not gone(s.tensor)),
                options=g.options[:1] if g.name in left_out else g.options,
            )
            for g in self.groups
        ]
        tables = [tuple((g, lengths[:2] if g in numbers else lengths) for g, lengths in e.table) for e in self.extents]
        return replace(
            self,
            groups=tuple(groups),
            extents=tuple(replace(e, table=t) for e, t in zip(self.extents, tables, strict=True)),
            sites=tuple(s for s in self.sites if not gone(s.module)),
            parameters=tuple(t for t in self.parameters if not gone(t.name)),
            frozen=tuple(f for f in self.frozen if not gone(f.tensor)),
            activations=tuple(m for m, _ in moments),
            inside=tuple(n for _, n in moments),
            spans=tuple(s for s in self.spans if not gone(s.module)),
            shapes={n: s for n, s in self.shapes.items() if not gone(n)},
            group_width={n: w for n, w in self.group_width.items() if not gone(n)},
            baked=tuple(n for n in self.baked if not gone(n)),
            baked_away=tuple(n for n in self.baked_away if not gone(n)),
            baked_new=tuple(n for n in self.baked_new if not gone(n)),
            selects=tuple(n for n in self.selects if not gone(n)),
            blocks=tuple(b for b in self.blocks if b not in absent),
        )

    def summary(self) -> str:
        """A table of groups, of layers with MACs and parameters, and of what is frozen and why."""
        from espalier.graph.summary import summarise

        return summarise(self)


def _shorter(
    table: tuple[tuple[int, tuple[int, ...]], ...], groups: Sequence[Group]
) -> tuple[tuple[int, tuple[int, ...]], ...]:
    return tuple((g, lengths[: groups[g].size + 1]) for g, lengths in table)
