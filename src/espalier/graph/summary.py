"""The graph as tables: what can be removed, what every layer costs, and what is frozen and why."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from espalier.carving import number_named
from espalier.graph.graph import Frozen, Graph, Group, Term


@dataclass(frozen=True)
class Totals:
    """The dense network at the traced input."""

    macs: int
    params: int
    activation_memory: int  # bytes at the peak
    groups: int
    units: int  # of groups that have more than one: the last unit of a group always stays


@dataclass(frozen=True)
class GroupRow:
    """Units that can be removed one by one."""

    name: str
    units: int
    channels: int  # channels of one unit at the layer that makes them
    made_by: tuple[str, ...]
    used_by: tuple[str, ...]
    macs_share: float  # share of all MACs spent in layers whose width depends on this group


@dataclass(frozen=True)
class LayerRow:
    """One layer that multiplies, over all its calls."""

    name: str
    kind: str
    calls: int
    macs: int
    params: int
    inputs: int | None  # per group of the convolution, as in the weight; None where there is no weight
    outputs: int | None
    removable: int | None  # of the outputs


@dataclass(frozen=True)
class FrozenRow:
    """Everything that one line of code keeps from being removed."""

    reason: str
    line: str  # "file.py:123", shortened; "" if no line is to blame
    channels: int  # outputs and inputs of layers; scales and biases that follow them are not counted again
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Summary:
    """Everything ``summarise`` prints, as plain data."""

    totals: Totals
    groups: tuple[GroupRow, ...]
    layers: tuple[LayerRow, ...]
    other_params: int  # of layers that do not multiply: normalisations, layer scales
    frozen: tuple[FrozenRow, ...]
    notes: tuple[str, ...]
    unknown: tuple[str, ...]


ONE_UNIT = "are tied to each other: all would have to go at once"


def overview(graph: Graph) -> Summary:
    """The rows of all tables."""
    length = _lengths(graph)
    macs = [_amount(site.term, length) for site in graph.sites]
    layers = _layer_rows(graph, macs, length)
    params = sum(_amount(term, length) for term in graph.parameters)
    peak = max((sum(c * length[e] for c, e in moment) for moment in graph.activations), default=0.0)
    units = sum(g.size for g in graph.groups if g.size > 1)
    groups = _group_rows(graph, macs)
    tied = [FrozenRow(ONE_UNIT, "", r.channels, r.made_by) for r in groups if r.units == 1 < r.channels]
    return Summary(
        totals=Totals(sum(macs), params, round(peak), len(graph.groups), units),
        groups=groups,
        layers=layers,
        other_params=params - sum(row.params for row in layers),
        frozen=(*_frozen_rows(graph.frozen, graph), *tied),
        notes=tuple(str(note.shortened) for note in graph.notes),
        unknown=tuple(str(operation.shortened) for operation in graph.unknown),
    )


def summarise(graph: Graph) -> str:
    """Plain text tables of ``overview(graph)``, one below the other."""
    return as_text(overview(graph))


def as_text(summary: Summary) -> str:
    """Every table of ``summary`` as aligned text."""
    parts = [totals_line(summary.totals)]
    parts += [f"{title}\n{_table(head, rows)}" for title, head, rows in tables(summary)]
    return "\n\n".join(parts)


def totals_line(totals: Totals) -> str:
    """One line: what the dense network costs, and how much of it can be removed."""
    return (
        f"{totals.macs:,} MACs, {totals.params:,} parameters, "
        f"{readable_bytes(totals.activation_memory)} of activations at the peak; "
        f"{totals.units:,} removable units in {totals.groups} groups"
    )


Table = tuple[str, tuple[str, ...], Sequence[tuple[str, ...]]]
"""Title, column heads, rows of cells. Columns whose head begins with ``>`` are numbers."""


def tables(summary: Summary) -> list[Table]:
    """Every table that has rows."""
    total = max(summary.totals.macs, 1)
    groups = [
        (r.name, f"{r.units:,}", f"{r.channels:,}", f"{r.macs_share:.1%}", _few(r.made_by), _few(r.used_by))
        for r in summary.groups
    ]
    layers = [
        (
            r.name or "(model)",
            r.kind if r.calls == 1 else f"{r.kind} x{r.calls}",
            f"{r.macs:,}",
            f"{r.macs / total:.1%}",
            f"{r.params:,}",
            *("" if n is None else f"{n:,}" for n in (r.inputs, r.outputs, r.removable)),
        )
        for r in summary.layers
    ]
    if summary.other_params:
        layers.append(("(all others)", "", "0", "0.0%", f"{summary.other_params:,}", "", "", ""))
    frozen = [(r.reason, f"{r.channels:,}", r.line, _few(r.layers)) for r in summary.frozen]
    made: list[Table] = [
        ("Groups", ("group", ">units", ">channels", ">of MACs", "made by", "used by"), groups),
        ("Layers", ("layer", "kind", ">MACs", ">share", ">parameters", ">in/group", ">out", ">removable"), layers),
        ("Frozen", ("why", ">channels", "where", "layers"), frozen),
        ("Operations without a rule", ("operation",), [(text,) for text in summary.unknown]),
        ("Notes", ("note",), [(text,) for text in summary.notes]),
    ]
    return [(title, head, rows) for title, head, rows in made if rows]


def readable_bytes(count: float) -> str:
    """``340096`` -> ``"332.1 KiB"``."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"


# -- rows ------------------------------------------------------------------------------------------


def _lengths(graph: Graph) -> list[int]:
    """The dense length of every extent; the last entry, number -1, is the constant 1."""
    return [*(e.length(graph.sizes) for e in graph.extents), 1]


def _amount(term: Term, length: Sequence[int]) -> int:
    return round(term.coefficient * math.prod(length[e] for e in term.extents))


def _group_rows(graph: Graph, macs: Sequence[int]) -> tuple[GroupRow, ...]:
    total = max(sum(macs), 1)
    multiply = {site.module for site in graph.sites}
    touched = [0] * len(graph.groups)
    for site, amount in zip(graph.sites, macs, strict=True):
        for number in {g for e in site.term.extents for g in graph.extents[e].groups}:
            touched[number] += amount
    return tuple(
        GroupRow(
            group.name, group.size, group.width, *_makers_and_users(group, multiply), macs_share=touched[number] / total
        )
        for number, group in enumerate(graph.groups)
    )


def _makers_and_users(group: Group, multiply: set[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    makers = _modules(s.tensor for s in group.producers)
    users = _modules(s.tensor for s in group.consumers)
    return tuple(m for m in makers if m in multiply) or makers, users


def _layer_rows(graph: Graph, macs: Sequence[int], length: Sequence[int]) -> tuple[LayerRow, ...]:
    calls: dict[tuple[str, str], list[int]] = {}
    for site, amount in zip(graph.sites, macs, strict=True):
        calls.setdefault((site.module, site.kind), []).append(amount)
    weights = _weights(graph)
    removable = _removable(graph)
    params: dict[str, int] = {}
    for term in graph.parameters:
        module = _module(term.name)
        params[module] = params.get(module, 0) + _amount(term, length)
    rows = []
    for (module, kind), amounts in calls.items():
        own = params.pop(module, 0)  # a module with two kinds of products shows its parameters once
        widths = _widths(graph, weights.get(module), kind, removable) if own else (None, None, None)
        rows.append(LayerRow(module, kind, len(amounts), sum(amounts), own, *widths))
    return tuple(rows)


def _weights(graph: Graph) -> dict[str, str]:
    """Module -> its weight, the first parameter that has more than one dimension."""
    found: dict[str, str] = {}
    for term in graph.parameters:
        if len(graph.shapes[term.name]) > 1:
            found.setdefault(_module(term.name), term.name)
    return found


def _removable(graph: Graph) -> dict[tuple[str, int], int]:
    """Tensor and dimension -> positions that can go. The one unit of a group of one cannot: something must stay."""
    found: dict[tuple[str, int], int] = {}
    for group in graph.groups:
        for part in group.slices if group.size > 1 else ():
            key = (part.tensor, part.dim)
            found[key] = found.get(key, 0) + part.index.size
    return found


def _widths(
    graph: Graph, weight: str | None, kind: str, removable: dict[tuple[str, int], int]
) -> tuple[int, int, int] | tuple[None, None, None]:
    """Inputs, outputs and removable outputs of a layer with a weight."""
    if weight is None:
        return None, None, None
    out, into = (1, 0) if kind.startswith("transposed") else (0, 1)
    shape = graph.shapes[weight]
    return shape[into], shape[out], removable.get((weight, out), 0)


def _frozen_rows(frozen: Iterable[Frozen], graph: Graph) -> tuple[FrozenRow, ...]:
    channels: dict[tuple[str, str], int] = {}
    layers: dict[tuple[str, str], dict[str, None]] = {}
    for entry in frozen:
        key = entry.reason.text, entry.reason.line
        is_weight = len(graph.shapes[entry.tensor]) > 1
        channels[key] = channels.get(key, 0) + (entry.count if is_weight else 0)
        layers.setdefault(key, {})[_module(entry.tensor)] = None
    rows = [FrozenRow(*key, channels[key], tuple(layers[key])) for key in layers]
    return tuple(sorted(rows, key=lambda row: -row.channels))


def _modules(tensors: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_module(tensor) for tensor in tensors))


def _module(tensor: str) -> str:
    """The module that a parameter, or a number, belongs to, whether or not the parameter is parametrised."""
    number = number_named(tensor)
    module, parametrised, _ = tensor.partition(".parametrizations.")
    return number[0] if number else module if parametrised else tensor.rpartition(".")[0]


# -- text ------------------------------------------------------------------------------------------


def _few(names: Sequence[str], limit: int = 3) -> str:
    shown = ", ".join(name or "(model)" for name in names[:limit])
    return f"{shown} + {len(names) - limit} more" if len(names) > limit else shown


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns under their heads; numbers to the right."""
    cells = [[h.removeprefix(">") for h in head], *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = []
    for row in cells:
        parts = [
            cell.rjust(width) if h.startswith(">") else cell.ljust(width)
            for cell, width, h in zip(row, widths, head, strict=True)
        ]
        lines.append(f"  {'  '.join(parts)}".rstrip())
    return "\n".join(lines)
