"""A graph as text and back: what a run goes on with after it was interrupted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from espalier.graph.graph import Block, Extent, Frozen, Graph, Group, Site, Slice, Span, Term
from espalier.graph.reasons import CallPlace, Reason


def to_json(graph: Graph) -> str:
    """Everything in ``graph`` but times, which its profile knows (``budget.timed``)."""
    untimed = replace(graph, sites=tuple(replace(s, time=None) for s in graph.sites), overhead=None)
    plain = asdict(untimed)
    plain["frozen"] = [{**f, "reason": own.reason.parts} for f, own in zip(plain["frozen"], graph.frozen, strict=True)]
    plain |= {"notes": [n.parts for n in graph.notes], "unknown": [n.parts for n in graph.unknown]}
    return json.dumps(plain, default=lambda value: value.tolist())


def from_json(text: str) -> Graph:
    """Inverse of ``to_json``."""
    plain: dict[str, Any] = json.loads(text)
    groups = []
    for g in plain["groups"]:
        slices = [Slice(**{**s, "index": _index(s["index"])}) for s in g["slices"]]
        groups.append(Group(**{**g, "slices": tuple(slices), "options": tuple(g["options"])}))
    rest = {n: _tuples(v) for n, v in plain.items()}
    return Graph(**{
        **rest,
        "groups": tuple(groups),
        "frozen": tuple(Frozen(**{**f, "reason": _reason(f["reason"])}) for f in plain["frozen"]),
        "notes": tuple(map(_reason, plain["notes"])),
        "unknown": tuple(map(_reason, plain["unknown"])),
        "extents": tuple(Extent(**_tuples_in(e)) for e in plain["extents"]),
        "sites": tuple(Site(**{**_tuples_in(s), "term": Term(**_tuples_in(s["term"]))}) for s in plain["sites"]),
        "parameters": tuple(Term(**_tuples_in(t)) for t in plain["parameters"]),
        "shapes": {n: tuple(s) for n, s in plain["shapes"].items()},
        "group_width": plain["group_width"],
        "spans": tuple(Span(**_tuples_in(s)) for s in plain["spans"]),
        "blocks": tuple(Block(**_tuples_in(b)) for b in plain["blocks"]),
    })  # fmt: skip


def _reason(value: Mapping[str, Any]) -> Reason:
    return Reason(value["text"], None if value["place"] is None else CallPlace(**value["place"]))


def _index(rows: list[list[int]]) -> np.ndarray:
    return np.array(rows, dtype=np.int64).reshape(len(rows), -1)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _tuples_in(entry: dict[str, Any]) -> dict[str, Any]:
    return {n: _tuples(v) for n, v in entry.items()}
