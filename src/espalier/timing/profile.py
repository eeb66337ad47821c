"""A profile: what every layer of one network takes in one runtime on one processor, as plain data in a file."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from espalier.costs import CostModel
from espalier.graph import Graph
from espalier.graph.times import Staircase
from espalier.surgery.writing import write_beside
from espalier.timing.fitting import BLOCKS, INT8_BLOCKS, staircases, whole_from_parts

FORMAT = "espalier-profile/2"
NOISY = 0.05  # spread above which a profile says that the machine was busy


@dataclass(frozen=True)
class ProfileSetting:
    """Where and how times were taken: profiles of other settings say nothing about this one."""

    runtime: str
    version: str  # of the runtime
    processor: str
    threads: int
    batch: int
    precision: str


@dataclass(frozen=True)
class ProfiledLayer:
    """A layer of the profiled network; those of one signature take the same time at the same lengths."""

    module: str
    signature: str
    lengths: tuple[int, ...]  # of the dense network: outputs, inputs of one filter
    form: str = ""  # of which alternative it is a stage; none of a layer as it is


@dataclass(frozen=True)
class Measured:
    """One network that was measured: every layer's lengths, milliseconds and number of nodes, and the whole."""

    lengths: tuple[tuple[int, ...], ...]
    ms: tuple[float, ...]
    nodes: tuple[int, ...]
    rest: float  # milliseconds of nodes that belong to no layer
    whole: float
    spread: float  # how far the fastest of two halves of the runs differ


@dataclass(frozen=True)
class Formed:
    """Networks in which layers were measured in other forms than the dense one (``timing.forms``)."""

    layers: tuple[ProfiledLayer, ...]
    networks: tuple[Measured, ...]


@dataclass(frozen=True)
class Profile:
    """Times of the layers of one network at every width: ``profile.on(graph)`` lets a budget of latency be planned."""

    setting: ProfileSetting  # runtime, processor, threads, batch, precision
    date: str  # in UTC
    grain: int  # widths were measured at multiples of this, at a half and a quarter of it, and whole
    layers: tuple[ProfiledLayer, ...]  # in the order of the exported file
    networks: tuple[Measured, ...]  # the dense one first
    correction: float = 1.0  # what the prediction is multiplied with, from networks measured against the dense one
    forms: tuple[Formed, ...] = ()  # measured once a method asks for them
    anyway: bool = False  # to be used where something does not fit, with a warning; not stored

    @property
    def dense(self) -> float:
        """Milliseconds of the dense network, as measured."""
        return self.networks[0].whole

    @property
    def spread(self) -> float:
        """How far repeated measurements differed, in the median."""
        return float(np.median([n.spread for n in self.networks]))

    @cached_property
    def _scale(self) -> tuple[float, float]:
        every = [n for _, n in self._every]
        parts = np.array([sum(n.ms) + n.rest for n in every])
        return whole_from_parts(parts, np.array([n.whole for n in every]))

    @property
    def _every(self) -> Iterator[tuple[tuple[ProfiledLayer, ...], Measured]]:
        """All networks that were measured, with their layers."""
        for layers, networks in ((self.layers, self.networks), *((f.layers, f.networks) for f in self.forms)):
            for network in networks:
                yield layers, network

    @cached_property
    def tables(self) -> dict[str, Staircase]:
        """By signature, so that the networks that were measured come out right in the median."""
        tables = self._tables
        off = [n.whole / (self.overhead + _sum_of(tables, x, n)) for x, n in self._every]
        return {s: Staircase(t.edges, t.ms * float(np.median(off))) for s, t in tables.items()}

    @cached_property
    def _tables(self) -> dict[str, Staircase]:
        a, b = self._scale
        rows: dict[str, list[tuple[float, ...]]] = {}
        for layers, network in self._every:
            each = min(b, 0.0) / max(sum(network.nodes), 1)  # what watching a node has cost
            own = max((sum(network.ms) + network.rest) * a + b, 1e-6)
            right = network.whole / own  # nodes are interrupted more often than the time on the processor shows
            for layer, lengths, ms, nodes in zip(layers, network.lengths, network.ms, network.nodes, strict=True):
                took = right * max(a * ms + each * nodes, 0.1 * ms, 1e-5)
                rows.setdefault(layer.signature, []).append((*lengths, took))
        kinds = {x.signature: _kind(x) for layers, _ in self._every for x in layers}
        of = INT8_BLOCKS if self.setting.precision == "int8" else BLOCKS
        return staircases({s: np.array(r) for s, r in rows.items()}, kinds, grain=self.grain, of=of)

    @property
    def overhead(self) -> float:
        """Milliseconds that belong to no layer."""
        a, b = self._scale
        return float(np.median([n.rest for _, n in self._every])) * a + max(b, 0.0)

    def on(self, graph: Graph) -> Graph:
        """``graph`` with the time of every layer.

        Raises: ValueError if it is not the network that was profiled, or offers forms that were not measured.
        """
        lacking = self.lacking(graph)
        if lacking:
            name, form = lacking[0]
            raise ValueError(
                f"profile: form {form!r} of {name} was never measured ({len(lacking)} such forms in all); "
                "espalier.timing.forms.measured measures them where the runtime is, or give a method that needs none "
                "(TCP, Magnitude)"
            )
        stages = {(x.module, x.form): x for part in self.forms for x in part.layers}
        waiting: dict[str, list[ProfiledLayer]] = {}
        for layer in self.layers:
            waiting.setdefault(layer.module, []).append(layer)
        sites, missing = [], []
        for site in graph.sites:
            if site.form:
                sites.append(replace(site, time=self._table(stages[site.module, site.form])))
                continue
            if not waiting.get(site.module):
                missing.append(site.module)
                sites.append(replace(site, time=None))
                continue
            layer = waiting[site.module].pop(0)
            lengths = [graph.extents[e].length(graph.sizes) for e in site.term.extents[: len(layer.lengths)]]
            if any(own > most for own, most in zip(lengths, layer.lengths, strict=True)):
                raise ValueError(
                    f"profile: {site.module} has lengths {lengths}, the profiled network had {list(layer.lengths)}; "
                    "this is the profile of another network: make one of this"
                )
            sites.append(replace(site, time=self._table(layer)))
        absent = [module for module, rest in waiting.items() if rest]
        if absent and len(absent) == len(waiting):
            raise ValueError("profile: of another network, none of its layers is in this one; make one of this network")
        return replace(graph, sites=tuple(sites), overhead=self.overhead * self.correction, grain=self.grain)

    def corrected(self, factor: float) -> Profile:
        """The same, whose predictions are ``factor`` times as long; what was fitted is not fitted again."""
        return self._fitted_as(replace(self, correction=self.correction * factor))

    def elsewhere(self) -> Profile:
        """The same as of another machine: by it is predicted, and nothing measured."""
        return self._fitted_as(replace(self, setting=replace(self.setting, processor="")))

    def _fitted_as(self, found: Profile) -> Profile:
        found.__dict__.update({n: v for n, v in self.__dict__.items() if n in FITTED})
        return found

    def lacking(self, graph: Graph) -> list[tuple[str, str]]:
        """Stages and forms of them that ``graph`` offers and this profile has no times of."""
        known = {(x.module, x.form) for part in self.forms for x in part.layers}
        return sorted({(s.module, s.form) for s in graph.sites if s.form} - known)

    def _table(self, layer: ProfiledLayer) -> Staircase:
        table = self.tables[layer.signature]
        return Staircase(table.edges, table.ms * self.correction)

    def describe(self) -> str:
        """One line for people."""
        own = self.setting
        noise = f", spread {self.spread:.1%}: the machine was busy" if self.spread > NOISY else ""
        return (
            f"{own.runtime} {own.version}, {own.precision}, {own.threads} thread{'s' * (own.threads > 1)}, batch {own.batch}, "
            f"{own.processor}: dense {self.dense:.3g} ms, {len(self.networks)} networks, widths of {self.grain}{noise}"
        )

    def predict(self, graph: Graph, keep: np.ndarray | None = None) -> float:
        """Milliseconds of the network that keeps ``keep`` units of every group, ``(groups,)``; all of them by default."""
        took = CostModel(self.on(graph)).cost(graph.sizes if keep is None else keep).latency
        assert took is not None
        return took

    def need(self, wanted: Mapping[str, Any], *, anyway: bool | None = None) -> None:
        """Raise ``ValueError`` where the profile was made for other settings than those ``wanted``; ``anyway`` only warns."""
        anyway = self.anyway if anyway is None else anyway
        own = asdict(self.setting)
        other = [f"{key} {own[key]}, not {value}" for key, value in wanted.items() if own[key] != value]
        if other:
            _refuse(
                f"profile: made for {'; '.join(other)}; make one for this, or use it with load_profile(..., anyway=True)",
                anyway,
            )


FITTED = ("_scale", "_tables", "tables")  # what follows from the measurements alone


def _sum_of(tables: Mapping[str, Staircase], layers: tuple[ProfiledLayer, ...], network: Measured) -> float:
    pairs = zip(layers, network.lengths, strict=True)
    return sum(float(tables[layer.signature].at(lengths)) for layer, lengths in pairs)


def _kind(layer: ProfiledLayer) -> str:
    """Layers that a runtime computes by the same code: what stands before the sizes in the signature."""
    return " ".join(w for w in layer.signature.partition(" at ")[0].split() if not w.startswith(("d", "p", "s")))


# -- files


def save_profile(profile: Profile, path: str | os.PathLike[str]) -> None:
    """Write ``profile`` as JSON.  Raises: OSError if the disk does not take it; what was there before is whole then."""

    def write(place: str) -> None:
        Path(place).write_text(to_json(profile), encoding="utf-8")

    write_beside(Path(path), write)


def load_profile(path: str | os.PathLike[str], *, anyway: bool = False) -> Profile:
    """Read a profile.  ``anyway``: one that was changed by hand, or made with another version, is used with a warning.

    Raises: ValueError if it is no profile, truncated, or changed by hand.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a profile (not text)") from error
    return replace(from_json(text, name=str(path), anyway=anyway), anyway=anyway)


def to_json(profile: Profile) -> str:
    """Plain JSON, one line per network; with a sum over the content, so that a change by hand is seen."""
    content = _stored(profile)
    parts = [f'"format": {json.dumps(FORMAT)}', f'"sum": {json.dumps(_sum(content))}']
    for key, value in content.items():
        if key in ("layers", "networks"):
            parts.append(f"{json.dumps(key)}: {_rows(value)}")
        elif key == "forms":
            some = ", ".join(f'{{"layers": {_rows(p["layers"])}, "networks": {_rows(p["networks"])}}}' for p in value)
            parts.append(f"{json.dumps(key)}: [{some}]")
        else:
            parts.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return "{\n " + ",\n ".join(parts) + "\n}\n"


def _rows(values: Sequence[Any]) -> str:
    rows = ",\n  ".join(json.dumps(row) for row in values)
    return f"[\n  {rows}\n ]"


def _stored(profile: Profile) -> dict[str, Any]:
    content = asdict(profile)
    del content["anyway"]
    return content


def from_json(text: str, *, name: str = "profile", anyway: bool = False) -> Profile:
    """Inverse of ``to_json``."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{name}: not a profile, or truncated ({error}); make it anew with: espalier profile"
        ) from error
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise ValueError(f"{name}: not a profile ({FORMAT}); make one with: espalier profile")
    given = content.pop("sum", None)
    try:
        profile = Profile(
            setting=ProfileSetting(**content.pop("setting")),
            forms=tuple(Formed(**_part(x)) for x in content.pop("forms")),
            **_part(content),
            **content,
        )
        _check(profile)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: not a whole profile ({error}); make it anew with: espalier profile") from error
    if given != _sum(_stored(profile)):
        _refuse(f"{name}: was changed after it was measured; make it anew, or say that it is to be used anyway", anyway)
    return profile


def _part(content: dict[str, Any]) -> dict[str, Any]:
    layers = tuple(ProfiledLayer(**{**x, "lengths": tuple(x["lengths"])}) for x in content.pop("layers"))
    return {"layers": layers, "networks": tuple(_measured(x) for x in content.pop("networks"))}


def _measured(row: Mapping[str, Any]) -> Measured:
    lengths = tuple(tuple(int(n) for n in one) for one in row["lengths"])
    return Measured(**{**row, "lengths": lengths, "ms": tuple(row["ms"]), "nodes": tuple(row["nodes"])})


def _check(profile: Profile) -> None:
    if not profile.networks or not profile.layers:
        raise ValueError("it has no networks")
    for layers, network in profile._every:
        numbers = (*network.ms, network.rest, network.whole, network.spread)
        if not all(isinstance(n, (int, float)) and 0 <= n < float("inf") for n in numbers) or network.whole <= 0:
            raise ValueError("times must be numbers, not negative")
        if not len(network.lengths) == len(network.ms) == len(network.nodes) == len(layers):
            raise ValueError("a network has another number of layers")


def _sum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _refuse(message: str, anyway: bool) -> None:
    if not anyway:
        raise ValueError(message)
    warnings.warn(message, stacklevel=3)
