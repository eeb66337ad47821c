"""Selected inputs: let single convolutions read only some of their input channels, which stay for everybody else.

Where channels are tied to many layers, as in a residual stream, none of them can go; but one convolution need not read all of
them.  What it stops reading becomes a group ``LAYER:inputs`` that holds columns of this one weight.  Costs, solver, plan and
surgery (``layers.PartConv2d``) treat it like any other group.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import numpy as np

from espalier.carving import number_named
from espalier.graph.graph import INPUTS, Extent, Frozen, Graph, Group, Slice, Term, group_name
from espalier.graph.reasons import Reason


def hold(graph: Graph, names: Collection[str], reason: str) -> Graph:
    """``graph`` in which the groups ``names`` are no groups any more: their channels stay, for ``reason``."""
    held = {graph.index[graph.group(n).name] for n in names}
    if not held:
        return graph
    moved: dict[int, int] = {}
    for number in range(len(graph.groups)):
        if number not in held:
            moved[number] = len(moved)
    extents = []
    for e in graph.extents:
        fixed = e.length([g.size if i in held else 0 for i, g in enumerate(graph.groups)])
        table = tuple((moved[g], lengths) for g, lengths in e.table)
        extents.append(Extent(fixed, tuple((moved[g], n) for g, n in e.each if g not in held), table))
    frozen = [
        Frozen(s.tensor, s.dim, s.index.size, Reason(reason))
        for i in sorted(held)
        for s in graph.groups[i].slices
        if s.dim < 2 and not number_named(s.tensor)
    ]
    return replace(
        graph,
        groups=tuple(g for i, g in enumerate(graph.groups) if i not in held),
        extents=tuple(extents),
        frozen=(*graph.frozen, *frozen),
    )


def inputs_name(layer: str) -> str:
    """The group that ``with_inputs`` adds for ``layer``."""
    return group_name(layer, INPUTS)


def with_inputs(graph: Graph, layers: Mapping[str, int]) -> Graph:
    """``graph`` in which every convolution of ``layers`` may select its inputs; add alternatives afterwards.

    ``layers`` maps names to the bytes that one input channel takes, which a selection copies.  ``ValueError`` for a layer
    that does not run exactly once, is grouped, or reads channels that can be removed anyway (``selectable`` tells).
    """
    groups, extents = list(graph.groups), list(graph.extents)
    sites, parameters = list(graph.sites), list(graph.parameters)
    shapes, activations = dict(graph.shapes), list(graph.activations)
    for layer, held in layers.items():
        number = _site(graph, layer)
        if number is None:
            raise ValueError(
                f"inputs of {layer!r}: only a convolution that runs once and whose inputs all stay can select among them"
            )
        site, weight = sites[number], f"{layer}.weight"
        outputs, _ = site.term.extents
        size = shapes[weight][1]
        group, every = len(groups), np.arange(size)[:, None]
        columns = Slice(weight, 1, every, consumed=True)
        slices = (columns, Slice(f"{layer}.index", 0, every, consumed=False))
        groups.append(Group(inputs_name(layer), size, slices, kind=INPUTS, layer=layer))
        shapes[f"{layer}.index"] = (size,)
        kept, copied = len(extents), len(extents) + 1
        extents += [
            Extent(0, ((group, 1),)),
            Extent(0, (), ((group, (*range(size), 0)),)),  # the selected copy; who reads all copies nothing
        ]
        place = next(i for i, t in enumerate(parameters) if t.name == weight)
        own = parameters[place]
        parameters[place] = Term(weight, own.coefficient / size, (*own.extents, kept))
        copy = (float(held), copied)
        live = site.live
        if live:
            bytes_, made = site.made
            before = [(b - bytes_ if e == made else b, e) for b, e in live]
            activations += [tuple(m for m in (*before, copy) if m[0] > 0), (*live, copy)]
            live = (*live, copy)
        sites[number] = replace(site, term=replace(site.term, extents=(outputs, kept)), live=live)
    return replace(
        graph, groups=tuple(groups), extents=tuple(extents), sites=tuple(sites), parameters=tuple(parameters),
        shapes=shapes, activations=tuple(activations), selects=(*graph.selects, *layers),
    )  # fmt: skip


def selectable(graph: Graph, layers: Iterable[str]) -> list[str]:
    """Those of ``layers`` that ``with_inputs`` takes."""
    return [layer for layer in layers if _site(graph, layer) is not None]


def _site(graph: Graph, layer: str) -> int | None:
    """The site of a convolution that could select its inputs."""
    found = [i for i, s in enumerate(graph.sites) if s.module == layer]
    shape = graph.shapes.get(f"{layer}.weight")
    if len(found) != 1 or shape is None or len(shape) != 4 or f"{layer}.index" in graph.shapes:
        return None
    site = graph.sites[found[0]]
    if site.kind != "convolution" or len(site.term.extents) != 2 or f"{layer}.weight" in graph.reread:
        return None
    outputs, inputs = (graph.extents[e] for e in site.term.extents)
    if inputs.groups or inputs.fixed != shape[1] or outputs.length(graph.sizes) != shape[0]:
        return None
    return found[0]
