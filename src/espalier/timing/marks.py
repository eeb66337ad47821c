"""Which layer of a network every node of its file belongs to, whatever wrote the file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from espalier.graph import Graph

_MARK = re.compile(r"_L(\d+)_")
SUMS = ("Add", "add")
ACTIVATIONS = ("Relu", "Clip", "relu", "hardtanh", "clamp")  # those that do nothing when they come twice


@dataclass(frozen=True)
class FileLayer:
    """A layer as the exported file has it: which site of the graph it is, and what makes others take the same time."""

    site: int
    signature: str


@dataclass(frozen=True)
class FileNode:
    """One operation of a file, by the names that it reads and makes."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weight: str | None = None  # where a layer of the network reads its weight; none of other operations
    settings: str = ""  # of a layer: "k3x3 s1x1" and the like


@dataclass(frozen=True)
class Written:
    """A file whose nodes are named by ``marked``, and its layers in the order of the file."""

    content: bytes
    layers: tuple[FileLayer, ...]


def marked(node: str, mark: int) -> str:
    """The name of ``node`` that belongs to layer ``mark - 1``, or to none yet where ``mark`` is 0."""
    return f"n{node}_L{mark}_"


def layer_of(name: str) -> int | None:
    """The layer that a runtime's node belongs to, by its name; ``None`` for nodes that the runtime has added."""
    found = _MARK.findall(name)
    return int(found[0]) - 1 if found else None


def marks_of(
    nodes: Sequence[FileNode], graph: Graph, *, given: Iterable[str], weights: Iterable[str]
) -> tuple[list[int | None], tuple[FileLayer, ...]]:
    """The mark of every node: its layer's number from 1 on, that of the last layer before it that it depends on, or none.

    What comes after a residual block belongs to the layer that the block's input belongs to: it is there still when the block
    has gone.  The addition itself, and an activation on it, go with the block.

    ``given`` are the names of the network's inputs, ``weights`` those of what it has learnt; what follows from weights alone is
    computed when the file is loaded and belongs to no layer.
    """
    made_of: dict[str, set[str]] = {w: {w} for w in weights}
    owner = dict.fromkeys(given, 0)
    waiting: dict[str, list[int]] = {}
    for number, site in enumerate(graph.sites):
        waiting.setdefault(site.module, []).append(number)
    found: list[int | None] = []
    heads: list[tuple[int, str]] = []
    tails: list[list[str]] = [[]]
    before: dict[str, int] = {name: 1 << n for n, name in enumerate(owner)}  # what a tensor depends on, a bit for each
    ends: dict[str, tuple[int, int]] = {}  # the sum at the end of a block -> marks of its last layer, and of its input
    for node in nodes:
        live = [owner[i] for i in node.inputs if i in owner]
        if not live:
            roots = set().union(*(made_of.get(i, set()) for i in node.inputs))
            made_of.update(dict.fromkeys(node.outputs, roots))
            found.append(None)
            continue
        mark = max(live)
        site_number = None if node.weight is None else _site_of(made_of.get(node.weight, set()), waiting)
        if site_number is not None:
            mark = len(heads) + 1
            heads.append((site_number, f"{node.kind} {node.settings}".rstrip()))
            tails.append([])
        else:
            skipped = _skipped(node, before) if node.kind in SUMS else None
            if skipped is not None:
                ends.update(dict.fromkeys(node.outputs, (mark, owner[skipped])))
            elif node.kind in ACTIVATIONS and node.inputs[0] in ends:
                ends.update(dict.fromkeys(node.outputs, ends[node.inputs[0]]))
                mark = ends[node.inputs[0]][0]
            tails[mark].append(node.kind)
        own = 0
        for name in node.inputs:
            own |= before.get(name, 0)
        for name in node.outputs:
            before[name] = own | 1 << len(before)
            owner[name] = ends[name][1] if name in ends else mark
        found.append(mark)
    layers = (
        FileLayer(site, _signature(graph, site, head, tail))
        for (site, head), tail in zip(heads, tails[1:], strict=True)
    )
    return found, tuple(layers)


def _skipped(node: FileNode, before: dict[str, int]) -> str | None:
    """The input of a sum from which the other one is made: what a residual block reads."""
    if len(node.inputs) != 2 or not all(name in before for name in node.inputs):
        return None
    one, two = node.inputs
    bits = before[one], before[two]
    if bits[0] == bits[1]:
        return None
    if bits[0] & bits[1] == bits[0]:
        return one
    return two if bits[0] & bits[1] == bits[1] else None


def _site_of(roots: set[str], waiting: dict[str, list[int]]) -> int | None:
    """The site of the graph that a layer computes: the next one of the module whose weight it reads."""
    for root in sorted(roots):
        module = root
        while module:
            module = module.rpartition(".")[0]
            if waiting.get(module):
                return waiting[module].pop(0)
    return None


def _signature(graph: Graph, number: int, head: str, tail: list[str]) -> str:
    """What layers that take the same time at the same lengths have in common."""
    term = graph.sites[number].term
    width = graph.group_width.get(graph.sites[number].module)
    groups = "" if width is None else f" in groups of {width}"
    return f"{head}{groups} at {term.coefficient:g} > {' '.join(tail)}"
