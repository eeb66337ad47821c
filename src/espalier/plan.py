"""The decision as data: what to keep (``Plan``) and what it may cost (``Budget``)."""

from __future__ import annotations

import fnmatch
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any, Protocol

import numpy as np

from espalier.carving import number_named
from espalier.graph import Graph, Group
from espalier.seals import DAMAGED, SEAL, opened_json, sealed_json


@dataclass(frozen=True)
class Plan:
    """Which units of every group stay.  Groups that are not named stay whole."""

    keep: Mapping[str, np.ndarray]  # group name -> sorted unit numbers
    sizes: Mapping[str, int] = field(default_factory=dict)  # group name -> units of the traced network

    @staticmethod
    def dense(graph: Graph) -> Plan:
        """The plan that removes nothing."""
        return Plan({g.name: np.arange(g.size) for g in graph.groups}, {g.name: g.size for g in graph.groups})

    def check(self, graph: Graph) -> None:
        """Raise ``ValueError`` if this plan does not belong to ``graph``."""
        for name, units in self.keep.items():
            group = graph.group(name)
            total = self.sizes.get(name, group.size)
            if total != group.size:
                raise ValueError(
                    f"plan: group {name!r} had {total} units when planned, this graph has {group.size}; trace again"
                )
            units = np.asarray(units)
            if units.ndim != 1 or len(units) == 0:
                raise ValueError(f"plan: group {name!r} must keep at least one unit")
            once = units.min() >= 0 and units.max() < group.size and np.bincount(units).max() == 1
            if not once:
                raise ValueError(f"plan: group {name!r} lists units outside 0..{group.size - 1}, or twice")

    def counts(self, graph: Graph) -> np.ndarray:
        """Kept units per group, ``(groups,)``, in the order of ``graph.groups``."""
        return np.array(
            [len(self.keep[g.name]) if g.name in self.keep else g.size for g in graph.groups], dtype=np.int64
        )

    def to_json(self) -> str:
        """As text with a checksum, for ``from_json``."""
        groups = {n: {"of": int(self.sizes.get(n, 0)), "keep": np.asarray(u).tolist()} for n, u in self.keep.items()}
        return sealed_json({"format": "espalier-plan/2", "groups": groups})

    @staticmethod
    def from_json(text: str) -> Plan:
        """Inverse of ``to_json``; ``ValueError`` for anything else.  The first format had no checksum."""
        content = opened_json(text, where="plan")
        if content.get("format") == "espalier-plan/2" and f'"{SEAL}"' not in text:
            raise ValueError(f"plan: {DAMAGED}")
        try:
            groups = content["groups"]
            keep = {n: np.array(g["keep"], dtype=np.int64) for n, g in groups.items()}
            return Plan(keep, {n: int(g["of"]) for n, g in groups.items()})
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ValueError(f"plan: not an Espalier plan ({error})") from error


class Timekeeper(Protocol):
    """Who knows how long layers take: ``espalier.timing.Profile``."""

    @property
    def dense(self) -> float:
        """Milliseconds of the dense network, as measured."""

    def on(self, graph: Graph) -> Graph:
        """``graph`` with the time of every layer, as a table over its lengths."""


_UNITS = {"s": 1e3, "ms": 1.0, "us": 1e-3, "µs": 1e-3}  # in milliseconds


def milliseconds_of(latency: float | str, dense: float) -> float:
    """A budget of time in milliseconds: "2.0 ms" as it stands, or a fraction of ``dense``.  Raises: ValueError for others."""
    if isinstance(latency, str):
        found = re.fullmatch(r"\s*([0-9.]+(?:e-?\d+)?)\s*(s|ms|us|µs)\s*", latency)
        try:
            amount = float(found[1]) * _UNITS[found[2]] if found else 0.0
        except ValueError:
            amount = 0.0
        if amount > 0:
            return amount
    elif isinstance(latency, Real) and not isinstance(latency, bool) and 0 < latency <= 1:
        return float(latency) * dense
    raise ValueError(
        f'Budget(latency={latency!r}): must be a fraction of the dense time, above 0 and up to 1, or a time such as "2.0 ms"'
    )


def amount_of(text: str, where: str) -> float | int:
    """``40%`` and ``0.4`` as a fraction, ``4e6`` and ``4000000`` as a count.  Raises: ValueError for anything else."""
    number = text.strip().removesuffix("%").replace("_", "")
    try:
        value = float(number)
    except ValueError as error:
        raise ValueError(f"{where}: give a fraction (0.4 or 40%) or a count (4000000 or 4e6)") from error
    if text.strip().endswith("%"):
        return value / 100
    return int(value) if value > 1 and value.is_integer() else value


@dataclass(frozen=True)
class Budget:
    """What the small network may cost.  Several limits at once must all hold.

    Floats up to 1.0 and texts such as "40%" are fractions of the dense network, whole numbers are counts, whatever their size
    (as are floats above 100, rounded down): ``macs=1.0`` is all of them, ``macs=1`` is a single one.  ``macs`` is in
    multiply-accumulates, ``params`` in elements, ``activation_memory`` in bytes of live activations at the traced input.
    ``multiple_of`` makes every width and rank a multiple (or leaves it whole): 4 is what it takes to be much faster in ONNX
    Runtime, 16 runs fastest there, and 8 is the least for a GPU (docs/results.md); ``protect`` lists groups or modules,
    wildcards allowed, that keep everything.

    ``latency`` is time in a runtime: a fraction of what the dense network takes there, or a text such as "50%" or "2.0 ms".  It
    needs a ``profile`` (``es.profile``, ``es.load_profile``), which says how long every layer takes at every width.
    """

    macs: float | str | None = None
    params: float | str | None = None
    activation_memory: float | str | None = None
    multiple_of: int = 1
    protect: Sequence[str] = ()
    latency: float | str | None = None
    profile: Timekeeper | None = None

    def __post_init__(self) -> None:
        for name, value in self._values().items():
            if value is None:
                continue
            if isinstance(value, str):
                value = amount_of(value, f"Budget({name}={value!r})")
            if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value <= 0:
                raise ValueError(
                    f"Budget({name}={value!r}): must be a positive number, a float up to 1.0 as a fraction of the dense "
                    "network or a whole number as a count"
                )
            if 1 < float(value) <= 100 and not float(value).is_integer():
                raise ValueError(
                    f"Budget({name}={value!r}): a fraction is at most 1.0 and a count is a whole number; for {value:g} % give "
                    f'{value / 100:g} or "{value:g}%"'
                )
            object.__setattr__(self, name, int(value) if isinstance(value, Integral) else float(value))
        if isinstance(self.latency, str) and self.latency.strip().endswith("%"):
            object.__setattr__(self, "latency", amount_of(self.latency, f"Budget(latency={self.latency!r})"))
        if isinstance(self.profile, (str, os.PathLike)):
            raise ValueError(f"Budget(profile={self.profile!r}): give es.load_profile({os.fspath(self.profile)!r})")
        if self.latency is not None:
            milliseconds_of(self.latency, 1.0)
            if self.profile is None:
                raise ValueError(
                    f"Budget(latency={self.latency!r}): needs the profile of the network in a runtime: "
                    f"Budget(latency={self.latency!r}, profile=es.profile(model, example))"
                )
        if all(v is None for v in (*self._values().values(), self.latency)):
            raise ValueError(
                "Budget(): give at least one of macs, params, activation_memory, latency, for example Budget(macs=0.5)"
            )
        if isinstance(self.multiple_of, bool) or not isinstance(self.multiple_of, Integral) or self.multiple_of < 1:
            raise ValueError(f"Budget(multiple_of={self.multiple_of!r}): must be a whole number, 1 or more")
        if self.multiple_of >= 2**31:
            raise ValueError(f"Budget(multiple_of={self.multiple_of!r}): no layer is that wide; 4, 8 or 16 runs fast")
        object.__setattr__(self, "multiple_of", int(self.multiple_of))
        several = isinstance(self.protect, Iterable) and not isinstance(self.protect, str)
        names = tuple(self.protect) if several else (self.protect,)
        if not all(isinstance(name, str) for name in names):
            raise ValueError(
                f"Budget(protect={self.protect!r}): must be names of groups or modules, for example protect=['layer1.*']"
            )
        object.__setattr__(self, "protect", names)

    def _values(self) -> dict[str, Any]:
        return {"macs": self.macs, "params": self.params, "activation_memory": self.activation_memory}

    def limits(self, dense: Any) -> dict[str, float]:
        """Absolute limits, given the dense ``Cost``: the largest whole amounts that are allowed; of latency, milliseconds."""
        resolved: dict[str, float] = {}
        for name, value in self._values().items():
            if value is not None:
                total = getattr(dense, name)
                fraction = isinstance(value, float) and value <= 1.0
                resolved[name] = min(math.floor(value * total + 1e-6) if fraction else math.floor(value), total)
        if self.latency is not None and self.profile is not None:
            if dense.latency is None:
                raise ValueError("Budget(latency=...): this graph has no times; take budget.timed(graph)")
            resolved["latency"] = milliseconds_of(self.latency, self.profile.dense)
        return resolved

    @property
    def counted(self) -> Budget | None:
        """The limits on what is counted: all but time.  ``None`` where there is no other."""
        if all(v is None for v in self._values().values()):
            return None
        return replace(self, latency=None, profile=None)

    @property
    def settings(self) -> dict[str, Any]:
        """What can be written down: everything but the profile, which is a file of its own."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "profile"}

    def timed(self, graph: Graph) -> Graph:
        """``graph`` with the time of every layer, where the budget is about time."""
        return graph if self.latency is None or self.profile is None else self.profile.on(graph)

    def protected(self, graph: Graph) -> np.ndarray:
        """Boolean per group, ``(groups,)``; a pattern that matches nothing is a ``ValueError``."""
        mask = np.zeros(len(graph.groups), dtype=bool)
        for pattern in self.protect:
            hits = np.array([_matches(g, pattern) for g in graph.groups], dtype=bool)
            if not hits.any() and not any(fnmatch.fnmatch(n.rpartition(".")[0], pattern) for n in graph.shapes):
                raise ValueError(
                    f"Budget(protect={pattern!r}): matches no group and no module; groups: "
                    + ", ".join(g.name for g in graph.groups[:20])
                )
            mask |= hits
        return mask


def _matches(group: Group, pattern: str) -> bool:
    modules = {
        (found[0] if (found := number_named(s.tensor)) else s.tensor).rpartition(".")[0] for s in group.producers
    }
    return any(fnmatch.fnmatch(n, pattern) for n in (group.name, group.layer)) or any(
        fnmatch.fnmatch(m, pattern) for m in modules
    )


def need_budget(budget: Any) -> None:
    """Raise ``ValueError`` for what is no ``Budget``."""
    if not isinstance(budget, Budget):
        raise ValueError(f"budget: expected a Budget, for example Budget(macs=0.5), got {type(budget).__name__}")
