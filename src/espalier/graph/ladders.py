"""Ladders: let a layer take other forms than the dense one, so that one budget holds for channels, ranks and kernel shapes.

A ladder becomes a group of the graph, and its rungs are chains of convolutions, the dense layer on top.  Keeping ``k`` units
means rung ``k``.  What the chains cost are products of extents like everything else, only that some extents are looked up
in a table; so costs, solver and plan treat ladders and channels alike, and a joint plan is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from espalier.graph.graph import Chain, Extent, Graph, Group, Site, Term


def with_ladders(graph: Graph, ladders: Mapping[str, Sequence[Chain]]) -> Graph:
    """``graph`` in which every layer named in ``ladders`` may also be computed by one of its chains.

    The chains of a layer are given from cheap to dear; the last must cost what the layer costs now.  The new group is
    called ``LAYER:form``.  ``ValueError`` for a layer that does not run exactly once or holds groups of channels.
    """
    if not ladders:
        return graph
    build = _Build(graph)
    for layer, chains in ladders.items():
        build.add(layer, tuple(chains))
    return build.graph()


def ladder_name(layer: str) -> str:
    """The group that ``with_ladders`` adds for ``layer``."""
    return f"{layer}:form"


class _Build:
    def __init__(self, graph: Graph) -> None:
        self.base = graph
        self.groups = list(graph.groups)
        self.extents = list(graph.extents)
        self.sites = dict(enumerate(graph.sites))
        self.added: list[Site] = []
        self.parameters = list(graph.parameters)  # of one name there may be several: rungs of an earlier ladder
        self.activations = list(graph.activations)

    def add(self, layer: str, chains: tuple[Chain, ...]) -> None:
        number, site = self._site(layer)
        weight = f"{layer}.weight"
        shape = self.base.shapes.get(weight)
        if shape is None or len(site.term.extents) != 2 or site.kind not in ("convolution", "matrix product"):
            raise ValueError(f"ladder of {layer!r}: not a convolution or linear layer with a weight of its own")
        outputs, inputs = site.term.extents
        whole = self._length(outputs) * self._length(inputs)
        if whole != shape[0] * shape[1]:
            raise ValueError(f"ladder of {layer!r}: grouped or tied channels; it has to stay dense")
        top = chains[-1] if chains else None
        own = next(t for t in self.parameters if t.name == weight)
        taps = own.coefficient
        for extent in own.extents:
            taps *= self._length(extent)
        if top is None or top.widths or top.macs != (site.term.coefficient,) or top.params != (taps / whole,):
            raise ValueError(f"ladder of {layer!r}: its last chain must be the dense layer, found {top}")
        group = len(self.groups)
        self.groups.append(Group(ladder_name(layer), len(chains), (), tuple(map(str, chains))))
        del self.sites[number]
        self.parameters.remove(own)
        for kind in dict.fromkeys((c.name, c.macs, c.params, c.bytes, c.copies) for c in chains):
            here = [(c.name, c.macs, c.params, c.bytes, c.copies) == kind for c in chains]
            self._form(layer, site, group, kind, [c if h else None for c, h in zip(chains, here, strict=True)])

    def _form(
        self,
        layer: str,
        site: Site,
        group: int,
        kind: tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...], int],
        rungs: list[Chain | None],
    ) -> None:
        """Terms of all rungs of one kind: the same stages, with widths that differ."""
        name, macs, params, held, copies = kind
        outputs, inputs = site.term.extents
        between = [
            self._extent(Extent(0, (), ((group, (0, *(c.widths[i] if c else 0 for c in rungs))),)))
            for i in range(len(macs) - 1)
        ]
        if not between:  # one stage: there only while its rung is taken
            chosen = self._extent(Extent(0, (), ((group, (0, *(int(c is not None) for c in rungs))),)))
            ends: list[tuple[int, ...]] = [(inputs, outputs, chosen)]
        else:
            ends = list(zip([inputs, *between], [*between, outputs], strict=True))
        for i, extents in enumerate(ends):
            label = layer if len(ends) == 1 else f"{layer}.{i}"
            self.added.append(Site(label, f"{site.kind}, {name}", Term(label, macs[i], extents)))
            self.parameters.append(Term(f"{label}.weight", params[i], extents))
        self._memory(site, between, held)
        if copies and site.live:
            length = self._length(inputs)
            padded = self._extent(Extent(0, (), ((group, (0, *(length if c else 0 for c in rungs))),)))
            self.activations.append((*site.live, (float(copies), padded)))

    def _memory(self, site: Site, between: list[int], held: tuple[int, ...]) -> None:
        """Every stage runs beside what was alive before the layer, its own input and its own output."""
        if not site.live or not between:
            return
        before = {k: v for v, k in site.live}
        size, made = site.made
        before[made] = before.get(made, 0.0) - size
        row = [(float(b), e) for b, e in zip(held, between, strict=True)]
        for one, two in zip([None, *row], [*row, (size, made)], strict=True):
            moment = dict(before)
            for part in (one, two):
                if part is not None:
                    moment[part[1]] = moment.get(part[1], 0.0) + part[0]
            self.activations.append(tuple((v, k) for k, v in moment.items() if v > 0))

    def _site(self, layer: str) -> tuple[int, Site]:
        found = [(i, s) for i, s in self.sites.items() if s.module == layer]
        if len(found) != 1:
            raise ValueError(f"ladder of {layer!r}: it runs {len(found)} times in one forward, not once")
        return found[0]

    def _length(self, extent: int) -> int:
        return self.extents[extent].length([g.size for g in self.groups])

    def _extent(self, extent: Extent) -> int:
        self.extents.append(extent)
        return len(self.extents) - 1

    def graph(self) -> Graph:
        return replace(
            self.base,
            groups=tuple(self.groups),
            extents=tuple(self.extents),
            sites=(*self.sites.values(), *self.added),
            parameters=tuple(self.parameters),
            activations=tuple(self.activations),
        )
