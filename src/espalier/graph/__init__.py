"""Run one forward, watch it, and know which channels live or die together."""

from espalier.graph.graph import Chain, Extent, Frozen, Graph, Group, Site, Slice, Term
from espalier.graph.inputs import hold, selectable, with_inputs
from espalier.graph.ladders import with_ladders
from espalier.graph.tracing import trace
from espalier.graph.watch import TraceError, TraceTimeout

__all__ = [
    "Chain",
    "Extent",
    "Frozen",
    "Graph",
    "Group",
    "Site",
    "Slice",
    "Term",
    "TraceError",
    "TraceTimeout",
    "hold",
    "selectable",
    "trace",
    "with_inputs",
    "with_ladders",
]
