"""Run one forward, watch it, and know which channels live or die together."""

from espalier.graph.blocks import Blocks, find_blocks, with_blocks
from espalier.graph.graph import Block, Chain, Extent, Frozen, Graph, Group, Site, Slice, Span, Term
from espalier.graph.inputs import hold, selectable, with_inputs
from espalier.graph.ladders import with_ladders
from espalier.graph.tracing import trace
from espalier.graph.watch import TraceError, TraceTimeout

__all__ = [
    "Block",
    "Blocks",
    "Chain",
    "Extent",
    "Frozen",
    "Graph",
    "Group",
    "Site",
    "Slice",
    "Span",
    "Term",
    "TraceError",
    "TraceTimeout",
    "find_blocks",
    "hold",
    "selectable",
    "trace",
    "with_blocks",
    "with_inputs",
    "with_ladders",
]
