"""Alternatives: a layer may take other forms than the dense one, and one budget holds for channels, ranks and kernel shapes.

The alternatives of a layer become a group of the graph; its options are sequences of convolutions, the dense layer last.
Keeping ``k`` units means option ``k``.  What options cost are products of extents like everything else, only that some extents
are looked up in a table; so costs, solver and plan treat alternatives and channels alike, and a joint plan is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from espalier.graph.graph import FORM, ConvSequence, Extent, Graph, Group, Site, Term, group_name


def with_alternatives(graph: Graph, alternatives: Mapping[str, Sequence[ConvSequence]]) -> Graph:
    """``graph`` in which every layer named in ``alternatives`` may also be computed by one of its sequences.

    The sequences of a layer are given from cheap to dear; the last must cost what the layer costs now.  The new group is
    called ``LAYER:form``.  Of times nothing is known afterwards: take ``budget.timed`` of the result.  ``ValueError`` for a
    layer that does not run exactly once or holds groups of channels.
    """
    if not alternatives:
        return graph
    build = _Build(graph)
    for layer, sequences in alternatives.items():
        build.add(layer, tuple(sequences))
    return build.graph()


def alternatives_name(layer: str) -> str:
    """The group that ``with_alternatives`` adds for ``layer``."""
    return group_name(layer, FORM)


class _Build:
    def __init__(self, graph: Graph) -> None:
        self.base = graph
        self.groups = list(graph.groups)
        self.extents = list(graph.extents)
        self.sites = dict(enumerate(graph.sites))
        self.added: list[Site] = []
        self.parameters = list(
            graph.parameters
        )  # of one name there may be several: options of an earlier group of alternatives
        self.activations = list(graph.activations)

    def add(self, layer: str, sequences: tuple[ConvSequence, ...]) -> None:
        number, site = self._site(layer)
        weight = f"{layer}.weight"
        shape = self.base.shapes.get(weight)
        if len(site.term.extents) > 2:
            raise ValueError(
                f"alternatives of {layer!r}: channels lie among the rows it runs over; it has to stay dense"
            )
        if shape is None or len(site.term.extents) != 2 or site.kind not in ("convolution", "matrix product"):
            raise ValueError(f"alternatives of {layer!r}: not a convolution or linear layer with a weight of its own")
        outputs, inputs = site.term.extents
        whole = self._length(outputs) * self._length(inputs)
        if whole != shape[0] * shape[1]:
            raise ValueError(f"alternatives of {layer!r}: grouped or tied channels; it has to stay dense")
        top = sequences[-1] if sequences else None
        own = next(t for t in self.parameters if t.name == weight)
        taps = own.coefficient
        for extent in own.extents:
            taps *= self._length(extent)
        if top is None or top.widths or top.macs != (site.term.coefficient,) or top.params != (taps / whole,):
            raise ValueError(f"alternatives of {layer!r}: its last sequence must be the dense layer, found {top}")
        group = len(self.groups)
        options = tuple(map(str, sequences))
        self.groups.append(Group(alternatives_name(layer), len(sequences), (), options, FORM, layer))
        del self.sites[number]
        self.parameters.remove(own)
        for kind in dict.fromkeys(replace(c, widths=()) for c in sequences):
            here = [replace(c, widths=()) == kind for c in sequences]
            form = "" if kind == replace(top, widths=()) else kind.name
            self._form(layer, site, group, kind, form, [c if h else None for c, h in zip(sequences, here, strict=True)])

    def _form(
        self, layer: str, site: Site, group: int, kind: ConvSequence, form: str, options: list[ConvSequence | None]
    ) -> None:
        """Terms of all options of one kind: the same stages, with widths that differ."""
        macs = kind.macs
        outputs, inputs = site.term.extents
        between = [
            self._extent(Extent(0, (), ((group, (0, *(c.widths[i] if c else 0 for c in options))),)))
            for i in range(len(macs) - 1)
        ]
        if not between:  # one stage: there only while its option is taken
            chosen = self._extent(Extent(0, (), ((group, (0, *(int(c is not None) for c in options))),)))
            ends: list[tuple[int, ...]] = [(outputs, inputs, chosen)]
        else:
            ends = list(zip([*between, outputs], [inputs, *between], strict=True))
        alone = kind.depthwise or (False,) * len(ends)
        for i, (extents, single) in enumerate(zip(ends, alone, strict=True)):
            extents = extents[:1] if single else extents
            label = layer if len(ends) == 1 else f"{layer}.{i}"
            term = Term(label, macs[i], extents)
            self.added.append(Site(label, f"{site.kind}, {kind.name}", term, form=form))
            self.parameters.append(Term(f"{label}.weight", kind.params[i], extents))
        self._memory(site, between, kind.bytes)
        if kind.copies and site.live:
            length = self._length(inputs)
            padded = self._extent(Extent(0, (), ((group, (0, *(length if c else 0 for c in options))),)))
            self.activations.append((*site.live, (float(kind.copies), padded)))

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
            raise ValueError(f"alternatives of {layer!r}: it runs {len(found)} times in one forward, not once")
        if f"{layer}.weight" in self.base.reread:
            raise ValueError(
                f"alternatives of {layer!r}: the forward reads its weight a second time, so it has to stay dense"
            )
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
            overhead=None,
        )
