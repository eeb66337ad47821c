"""The two networks of a run, layer by layer: what stood there, what stands there now, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from espalier.graph import Graph, trace
from espalier.graph.summary import overview
from espalier.layers import PartConv2d
from espalier.plan import Plan
from espalier.timing import on_device
from espalier.timing.family import Family
from espalier.timing.making import attributed, batched


@dataclass(frozen=True)
class OneLayer:
    """One convolution or linear layer."""

    inputs: int
    outputs: int
    kernel: tuple[int, ...]  # empty for a linear layer
    chooses: bool = False  # reads only ``inputs`` of the channels that reach it

    @property
    def shape(self) -> str:
        return "×".join(map(str, self.kernel)) or "linear"


@dataclass(frozen=True)
class ComparedLayer:
    """A layer of the dense network and what has taken its place; times in milliseconds, 0 where none were measured."""

    name: str
    dense: OneLayer
    small: tuple[OneLayer, ...]  # several where it was factorised or split
    dense_macs: int
    small_macs: int
    dense_params: int
    small_params: int
    dense_ms: float = 0.0
    small_ms: float = 0.0

    @property
    def factorised(self) -> bool:
        return len(self.small) > 1

    @property
    def reshaped(self) -> bool:
        """Of another kernel, but still one layer."""
        return len(self.small) == 1 and self.small[0].kernel != self.dense.kernel

    @property
    def changed(self) -> bool:
        return self.small != (self.dense,)


def layers_of(dense: nn.Module, small: nn.Module, example: Any) -> tuple[ComparedLayer, ...]:
    """Every convolution and linear layer of ``dense``, in the order of its modules, beside what ``small`` has there."""
    there = dict(small.named_modules())
    traced = [trace(model, example, rehearse=False) for model in (dense, small)]
    amounts = [{row.name: row for row in overview(graph).layers} for graph in traced]
    found = []
    for name, module in dense.named_modules():
        stage = _stage(module)
        if stage is None:
            continue
        macs, params = [], []
        for rows in amounts:
            inside = [row for n, row in rows.items() if _inside(n, name)]
            macs.append(sum(row.macs for row in inside))
            params.append(sum(row.params for row in inside))
        stages = tuple(s for n, m in there.items() if _inside(n, name) and (s := _stage(m)) is not None)
        found.append(ComparedLayer(name, stage, stages, macs[0], macs[1], params[0], params[1]))
    return tuple(found)


def _inside(name: str, module: str) -> bool:
    return name == module or not module or name.startswith(f"{module}.")


def layers_from(rows: list[dict[str, Any]]) -> tuple[ComparedLayer, ...]:
    """Inverse of ``asdict`` on every layer.  Raises: KeyError or TypeError for anything else."""

    def stage(row: dict[str, Any]) -> OneLayer:
        return OneLayer(int(row["inputs"]), int(row["outputs"]), tuple(map(int, row["kernel"])), bool(row["chooses"]))

    amounts = ("dense_macs", "small_macs", "dense_params", "small_params")
    return tuple(
        ComparedLayer(
            str(r["name"]), stage(r["dense"]), tuple(map(stage, r["small"])), **{a: int(r[a]) for a in amounts}
        )
        for r in rows
    )


SECONDS = 0.3  # of measuring a network, once


def timed(
    layers: tuple[ComparedLayer, ...], dense: nn.Module, small: nn.Module, *, example: torch.Tensor
) -> tuple[tuple[ComparedLayer, ...], float]:
    """The same with times in ONNX Runtime, on one thread, and how far two measurements of a whole network were apart.

    They are those of the runtime's own profile of its nodes; what is computed between two layers counts to the first.  Of two
    measurements the less; where they are apart, something else was at work.
    Raises: ValueError where ONNX Runtime does not time them; ImportError where it is not installed.
    """
    families = {}
    for name, model in {"dense": dense, "small": small}.items():
        graph = trace(model, example[:1], rehearse=False)
        families[name] = (graph, Family(model, graph, batched(example, len(example))))
    one, two = {}, {}
    for name, family in families.items():
        one[name], pace = _times(layers, *family)
        two[name], _ = _times(layers, *family, pace=pace)  # which takes longest to find out
    least = {n: {layer: min(t, two[n][layer]) for layer, t in row.items()} for n, row in one.items()}
    totals = [sorted(sum(times[n].values()) for times in (one, two)) for n in one]
    found = tuple(replace(lr, dense_ms=least["dense"][lr.name], small_ms=least["small"][lr.name]) for lr in layers)
    return found, max(most / fewest - 1 for fewest, most in totals)


def _times(
    layers: tuple[ComparedLayer, ...], graph: Graph, family: Family, *, pace: float = 0.0
) -> tuple[dict[str, float], float]:
    """Milliseconds by layer, of one that is gone, none; and of the whole network."""
    plan, found = Plan.dense(graph), dict.fromkeys((layer.name for layer in layers), 0.0)
    how: dict[str, Any] = {"runtime": "onnxruntime", "threads": 1, "batch": family.batch, "precision": "f32"}
    times = on_device.measure(family.file(plan), seconds=SECONDS, pace=pace, **how)
    spent = attributed(times, family, graph, plan).ms
    for layer, took in zip(family.layers, spent, strict=True):
        owner = next((n for n in found if _inside(graph.sites[layer.site].module, n)), None)
        if owner is not None:
            found[owner] += took
    return found, float(times["whole"])


def _stage(module: nn.Module) -> OneLayer | None:
    if isinstance(module, _ConvNd):
        chooses = isinstance(module, PartConv2d) and module.index is not None
        return OneLayer(module.in_channels, module.out_channels, tuple(module.kernel_size), chooses)
    return OneLayer(module.in_features, module.out_features, ()) if isinstance(module, nn.Linear) else None
