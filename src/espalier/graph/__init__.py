"""Run one forward, watch it, and know which channels live or die together.

The idea, on a convolution, an addition and a convolution: ``c(a(x) + b(x))``, two channels in the middle, no biases.

1. Every index of every dimension of every parameter gets a number, its *label*:
   ``a.weight`` has outputs 1 2 and inputs 3 4 5, ``b.weight`` 6 7 and 8 9 10, ``c.weight`` 11 12 13 and 14 15.
2. Labels flow beside the activations.  ``a`` ties the channels of ``x``, which have label 0 (*fixed*), to 3 4 5, so these
   stay; its result carries 1 2.  In the same way that of ``b`` carries 6 7.  The addition *ties* 1 to 6 and 2 to 7.  ``c``
   ties what it reads, 1 2, to its inputs 14 15; its result carries 11 12 13, and as an output of the model these stay.
3. What is tied is a *unit*: 1 6 14 and 2 7 15.  Units that lie in the same places are interchangeable, a *group* of two.
   Removing the first removes row 0 of ``a.weight`` and of ``b.weight``, and column 0 of ``c.weight``.

>>> import torch
>>> from espalier.graph import trace
>>> class Sum(torch.nn.Module):
...     def __init__(self):
...         super().__init__()
...         self.a, self.b, self.c = (torch.nn.Conv2d(i, o, 1, bias=False) for i, o in ((3, 2), (3, 2), (2, 3)))
...     def forward(self, x):
...         return self.c(self.a(x) + self.b(x))
>>> (group,) = trace(Sum(), torch.zeros(1, 3, 4, 4)).groups
>>> group.name, group.size, [(s.tensor, s.dim, s.index.tolist()) for s in group.slices]
('a', 2, [('a.weight', 0, [[0], [1]]), ('b.weight', 0, [[0], [1]]), ('c.weight', 1, [[0], [1]])])

``watch`` lets labels flow (``rules``: what each operation does to them), ``grouping`` makes units and groups of them,
``memory`` says what is alive when, ``rehearsal`` holds smaller forwards against the first, and ``tracing`` does all of it.
"""

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
