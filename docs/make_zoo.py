"""Writes docs/zoo.md: what can be removed from well-known networks, and what stays frozen and why.

python -m docs.make_zoo > docs/zoo.md
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable

import numpy as np
import torch

from benchmarks.common import ZOO, build, example
from espalier.costs import CostModel
from espalier.graph import Graph, trace
from espalier.graph.summary import FrozenRow, overview

HEAD = """# What stays frozen, network by network

Written by `python -m docs.make_zoo`, with torch {torch}, torchvision {torchvision}, timm {timm}; inputs are 64x64 (CIFAR
networks 32x32, others where 64x64 is too small). *Removable* is the share of the outputs of all convolutions and linear
layers that can go. *Smallest* is the share of the MACs that is left when every group keeps one unit: the smallest budget
that can be met.

| network | groups | units | removable | smallest |
|---|---:|---:|---:|---:|"""

EVERYWHERE = ("is an output of the model", "is combined with channels that are fixed")
BETWEEN = """
## Reasons

Frozen in every network, and not repeated below: the outputs of the last layer, and the channels of the image. A reason with
a long tail of layers is usually one residual stream: all layers that write to it or read from it. Layers whose names differ
in numbers only stand as one pattern with their count. "Channels" counts outputs and inputs of layers.
"""


def main() -> None:
    graphs = {name: trace(build(name), example(name)) for name in _told(ZOO)}
    print(HEAD.format(**_versions()))
    for name, graph in graphs.items():
        print(_row(name, graph))
    print(BETWEEN)
    for name, graph in graphs.items():
        for line in _reasons(name, graph):
            print(line)


def _told(names: Iterable[str]) -> Iterable[str]:
    for name in names:
        print(name, file=sys.stderr)
        yield name


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {
        "torch": torch.__version__.partition("+")[0],
        "torchvision": version("torchvision"),
        "timm": version("timm"),
    }


def _row(name: str, graph: Graph) -> str:
    summary = overview(graph)
    layers = [row for row in summary.layers if row.outputs is not None]
    removable = sum(row.removable or 0 for row in layers) / max(sum(row.outputs or 0 for row in layers), 1)
    model = CostModel(graph)
    smallest = model.cost(np.minimum(graph.sizes, 1)).macs / model.cost(graph.sizes).macs
    totals = summary.totals
    return f"| {name} | {totals.groups} | {totals.units:,} | {removable:.0%} | {smallest:.1%} |"


def _reasons(name: str, graph: Graph) -> list[str]:
    summary = overview(graph)
    rows = [row for row in summary.frozen if not row.reason.startswith(EVERYWHERE)]
    return [f"### {name}", "", *(_reason(row) for row in rows), ""] if rows else []


def _reason(row: FrozenRow) -> str:
    where = f" ({row.line})" if row.line and not row.line.startswith("docs/") else ""
    alike: dict[str, list[str]] = {}  # layers whose names differ in numbers only
    for layer in row.layers:
        alike.setdefault(re.sub(r"\d+", "*", layer), []).append(layer)
    names = ", ".join(
        f"`{of[0] or 'the model'}`" if len(of) == 1 else f"`{pattern}` ({len(of)})" for pattern, of in alike.items()
    )
    return f"- {row.channels:,} channels: {row.reason}{where}: {names}"


if __name__ == "__main__":
    main()
