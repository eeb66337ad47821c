"""Positions of kernels that fade beside channels: whole kernels are cut to rectangles, free stripes stay zero.

A kernel goes in one piece, once the keep-set is final.  Stripes are never removed: what has come to zero is held there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from espalier.costs import Cost
from espalier.forms import cut_kernel
from espalier.graph.alternatives import alternatives_name
from espalier.methods.base import Removed
from espalier.methods.kernels import Kernels
from espalier.methods.pressure import MOMENTA, Fading
from espalier.methods.stripes import StripeMasks
from espalier.methods.units import Units, upload
from espalier.plan import Plan


class PositionFading(Fading):
    """A run in which channels, kernels and stripes fade; a method sets ``kernels`` and ``stripes`` before it begins."""

    kernels: Kernels
    stripes: StripeMasks
    remembers: ClassVar[tuple[str, ...]] = ("kernels", "stripes")

    @property
    def counted(self) -> Cost | None:
        """The cost of kept stripes, where they are free; zeros are not executed faster than other numbers."""
        return self.stripes.count(self.graph) if self.stripes.layers else None

    def put(self, model: nn.Module, options: Mapping[str, int]) -> None:
        for layer, places in self.kernels.options.items():
            taken = places[options.get(alternatives_name(layer), len(places)) - 1]
            if taken is not places[-1]:
                chosen = self.kernels.chosen.get(layer)
                cut_kernel(model, layer, chosen if chosen in taken else taken[len(taken) // 2])

    def _units(self) -> Units:
        return Units(self.model, self.graph, taps=self.kernels.layers, stripes=self.stripes.layers)

    def _outside_of(self, plan: Plan) -> np.ndarray:
        return self.units.outside(plan.keep, {**self.kernels.stays, **self.stripes.stays})

    def _remove_faded(self, optimizer: torch.optim.Optimizer) -> Removed | None:
        """Of free stripes all that happens is that they stay zero, once the keep-set is final."""
        if self.stripes.layers and self.settled and self._outside.any():
            zero = upload(self._zero, self.units.device)
            self.stripes.add({layer: zero[rows] for layer, rows in self.units.stripes.items()})
            if not self._channels(self._outside).any() and bool(self._zero[self._outside].all()):
                return self._masked()
        return super()._remove_faded(optimizer)

    def _ready(self) -> tuple[np.ndarray, bool]:
        """Kernels are cut when the keep-set is final, stripes never."""
        ready = self._channels(self._faded())
        for rows in self.units.taps.values() if not self.settled else ():
            ready[rows] = False
        return ready, bool((ready == self._channels(self._outside)).all())

    def _channels(self, units: np.ndarray) -> np.ndarray:
        """``units`` without stripes."""
        units = units.copy()
        for rows in self.units.stripes.values():
            units[rows] = False
        return units

    def _stay(self, ready: np.ndarray) -> dict[str, np.ndarray]:
        cut = [n for n, rows in self.units.taps.items() if ready[rows].any()]
        return {**super()._stay(ready), **self.kernels.going(cut)}

    def _masked(self) -> Removed:
        """All masks are final; averages of the weights begin anew, so that they hold exact zeros too."""
        self.pressed[:] = False
        self._find_busy(np.zeros_like(self._outside))
        self._finished()
        return Removed({}, self.cost, frozenset(f"{n}.weight" for n in self.stripes.layers))

    def _hold(self, optimizer: torch.optim.Optimizer) -> None:
        if self.settled and self.stripes.layers:
            self.stripes.hold(optimizer.state, MOMENTA)

    def _survivors(self, stay: Mapping[str, np.ndarray]) -> np.ndarray:
        gone = {n for some in self._kernels(stay) for n in some}
        taps = [np.arange(rows.start, rows.stop) for n, rows in self.units.taps.items() if n not in gone]
        stripes = self.stripes.survivors(self.units.stripes, self.graph.kept(dict(stay)))
        return np.concatenate([super()._survivors(stay), *taps, *stripes])

    def _kernels(self, stay: Mapping[str, np.ndarray]) -> tuple[list[str], list[str]]:
        """Layers whose kernels are cut, and those that are gone with their block."""
        absent = self.graph.absent(stay)
        gone = [n for n in self.kernels.layers if any(b.holds(n) for b in absent)]
        less = [n for n, all_ in self.kernels.options.items() if len(stay[alternatives_name(n)]) < len(all_)]
        return [n for n in less if n not in gone], gone

    def _cut(self, stay: Mapping[str, np.ndarray], optimizer: torch.optim.Optimizer | None) -> Removed:
        cut, gone = self._kernels(stay)
        kept = self.graph.kept(dict(stay))
        trimmed = self.kernels.cut(self.model, cut, optimizer=optimizer)
        removed = super()._cut(stay, optimizer)
        for tensor, by_dim in trimmed.items():
            removed.kept.setdefault(tensor, {}).update(by_dim)
        self.kernels.forget([*cut, *gone])
        self.stripes.cut(kept)
        return removed

    def finish(self) -> nn.Module:
        stopped = not self.done
        super().finish()
        if stopped:
            self.stripes.load({n: torch.from_numpy(~mask) for n, mask in self.stripes.stays.items()})
        self.stripes.hold({}, ())
        self.stripes.read()
        return self.model
