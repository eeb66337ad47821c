"""Free stripes, as pruning filter in filter counts them: one kernel position of one filter at a time, whatever runs.

This counts what a mask leaves of a dense convolution; it is not what is executed.  A filter keeps its best stripe as long as
it lives; the others are *spare* and become a group ``LAYER:stripes``.  Where no filter goes the counts are exact; with every
filter that goes, an average share of the spare stripes is planned to go (``methods.stripes`` then decides once more).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from espalier.graph.graph import STRIPES, Extent, Graph, Group, Term, group_name


def stripes_name(layer: str) -> str:
    """The group that ``with_stripes`` adds for ``layer``."""
    return group_name(layer, STRIPES)


def striped(graph: Graph, layer: str) -> bool:
    """Can the stripes of this layer be counted?  It must run once, and every filter read every input."""
    found = [s for s in graph.sites if s.module == layer]
    shape = graph.shapes.get(f"{layer}.weight")
    if len(found) != 1 or shape is None or len(shape) != 4 or len(found[0].term.extents) != 2:
        return False
    if f"{layer}.weight" in graph.reread:
        return False
    return tuple(graph.extents[e].length(graph.sizes) for e in found[0].term.extents) == shape[:2]


def with_stripes(graph: Graph, spare: Mapping[str, int]) -> Graph:
    """``graph`` that costs kept stripes: one per filter, and of ``layer`` at most ``spare[layer]`` more.

    Its first unit stands for none of them, because every group keeps at least one: ``k`` units are ``k - 1`` spare stripes.
    Activation memory stays that of what is executed.  ``ValueError`` for a layer that is not ``striped``.
    """
    groups, extents = list(graph.groups), list(graph.extents)
    sites, parameters = list(graph.sites), list(graph.parameters)
    for layer, count in spare.items():
        if not striped(graph, layer):
            raise ValueError(f"stripes of {layer!r}: only a plain convolution that runs once has stripes to count")
        number = next(i for i, s in enumerate(graph.sites) if s.module == layer)
        outputs, inputs = graph.sites[number].term.extents
        filters, _, *kernel = graph.shapes[f"{layer}.weight"]
        kept = len(extents)
        extents.append(Extent(-1, ((len(groups), 1),)))
        groups.append(Group(stripes_name(layer), count + 1, (), kind=STRIPES, layer=layer))
        each = graph.sites[number].term.coefficient / (kernel[0] * kernel[1])  # MACs of a stripe per input channel
        sites[number] = replace(graph.sites[number], term=Term(layer, each, (outputs, inputs)))
        sites.append(replace(sites[number], term=Term(layer, each / filters, (outputs, inputs, kept)), time=None))
        weight = f"{layer}.weight"
        place = next(i for i, t in enumerate(parameters) if t.name == weight)
        parameters[place] = Term(weight, 1.0, (outputs, inputs))
        parameters.append(Term(weight, 1.0 / filters, (outputs, inputs, kept)))
    return replace(
        graph, groups=tuple(groups), extents=tuple(extents), sites=tuple(sites), parameters=tuple(parameters)
    )
