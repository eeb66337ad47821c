"""Run one forward, watch it, and know which channels live or die together."""

from espalier.graph.alternatives import with_alternatives
from espalier.graph.blocks import Blocks, find_blocks, with_blocks
from espalier.graph.graph import Block, ConvSequence, Extent, Frozen, Graph, Group, Site, Slice, Span, Term
from espalier.graph.inputs import hold, selectable, with_inputs
from espalier.graph.tracing import trace
from espalier.graph.watch import TraceError, TraceTimeout

__all__ = [
    "Block",
    "Blocks",
    "ConvSequence",
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
    "with_alternatives",
    "with_blocks",
    "with_inputs",
]
