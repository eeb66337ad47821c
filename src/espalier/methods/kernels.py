"""Kernel positions of whole layers as units: pushed towards one rectangle per layer, which runs as a smaller convolution."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from espalier.carving import Kept
from espalier.forms import Rectangle, cut_kernel
from espalier.graph.alternatives import alternatives_name


@dataclass
class Kernels:
    """What the kernels of some convolutions may become, and what the keep-set of now leaves of them."""

    options: dict[str, list[list[Rectangle]]]  # layer -> from the smallest area to the whole kernel, the places of each
    chosen: dict[str, Rectangle] = field(default_factory=dict)  # where it is not all

    @property
    def layers(self) -> tuple[str, ...]:
        """Those that are not cut yet."""
        return tuple(self.options)

    @property
    def stays(self) -> dict[str, np.ndarray]:
        """Layer -> which positions; shape ``(kh * kw,)``."""
        return {n: rectangle.mask(self._whole(n).size).reshape(-1) for n, rectangle in self.chosen.items()}

    @property
    def areas(self) -> dict[str, float]:
        """Layer -> how many positions stay."""
        return {n: float(self.chosen.get(n, self._whole(n)).area) for n in self.options}

    def _whole(self, layer: str) -> Rectangle:
        return self.options[layer][-1][0]

    def scores(self, worth: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What each option adds, as ``solve`` takes it, from what positions are worth; shape ``(kh * kw,)`` per layer."""
        best = {n: self._best(n, worth[n]) for n in self.options}
        return {
            alternatives_name(n): np.diff(np.maximum.accumulate([0.0, *(held for held, _ in options)]))
            for n, options in best.items()
        }

    def choose(self, worth: Mapping[str, np.ndarray], keep: Mapping[str, np.ndarray]) -> None:
        """Of every layer the best rectangle of the option that ``keep`` takes."""
        taken = {n: len(keep[alternatives_name(n)]) for n in self.options}
        self.chosen = {n: self._best(n, worth[n])[t - 1][1] for n, t in taken.items() if t < len(self.options[n])}

    def _best(self, layer: str, worth: np.ndarray) -> list[tuple[float, Rectangle]]:
        """By option what its best rectangle holds, and this."""
        taps = worth.reshape(self._whole(layer).size)
        found = []
        for places in self.options[layer]:
            held = [float(taps[r.top : r.bottom + 1, r.left : r.right + 1].sum()) for r in places]
            found.append((max(held), places[int(np.argmax(held))]))
        return found

    def going(self, ready: Collection[str]) -> dict[str, np.ndarray]:
        """Options that the layers ``ready`` are cut to, by group."""
        found = {}
        for layer in (n for n in self.chosen if n in ready):
            areas = [places[0].area for places in self.options[layer]]
            found[alternatives_name(layer)] = np.arange(areas.index(self.chosen[layer].area) + 1)
        return found

    def cut(self, model: nn.Module, layers: Collection[str], *, optimizer: torch.optim.Optimizer | None) -> Kept:
        """Leave of the kernels of ``layers`` what was chosen, for good."""
        kept: Kept = {}
        for layer in layers:
            kept.update(cut_kernel(model, layer, self.chosen[layer], optimizer=optimizer))
        return kept

    def forget(self, layers: Collection[str]) -> None:
        """There is nothing to decide about ``layers`` any more."""
        self.options = {n: o for n, o in self.options.items() if n not in layers}
        self.chosen = {n: r for n, r in self.chosen.items() if n not in layers}


LOST = 1.5


@dataclass
class Forms(Kernels):
    """The forms that layers may take: ``options`` has the places of a rectangle, none where the option is a rank."""

    ranks: dict[str, list[int]] = field(
        default_factory=dict
    )  # layer -> rank of every option; 0: a kernel shape, or dense
    layouts: dict[str, str] = field(default_factory=dict)  # layer -> form of its factors
    aims: dict[str, int] = field(default_factory=dict)  # layer -> rank that the keep-set of now gives it

    @property
    def spatial(self) -> tuple[str, ...]:
        """Layers with a kernel that may be cut."""
        return tuple(n for n, options in self.options.items() if any(options[:-1]))

    def worth(self, taps: Mapping[str, np.ndarray], triplets: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What each option adds, as ``solve`` takes it."""
        found = {}
        for layer, ranks in self.ranks.items():
            held = self._held(layer, taps.get(layer), triplets.get(layer))
            found[alternatives_name(layer)] = np.diff(np.maximum.accumulate([0.0, *held]))
            assert len(held) == len(ranks)
        return found

    def _held(self, layer: str, taps: np.ndarray | None, triplets: np.ndarray | None) -> list[float]:
        """What each option holds of what the layer is worth, as its kernel positions have it; of a layer of one, its triplets.

        What truncation loses grows faster than the sum over the triplets that go: measured on trained layers of ResNet-20
        beside the channels of the same layers, with the power ``LOST``.
        """
        views = [v for v in (taps, triplets) if v is not None]
        whole = float(views[0].sum()) if views else 0.0
        rectangles = [h for h, _ in self._best(layer, taps)] if taps is not None else None
        held = []
        for number, rank in enumerate(self.ranks[layer][:-1]):
            if rank:
                assert triplets is not None
                lost = 1.0 - float(triplets[:rank].sum()) / max(float(triplets.sum()), 1e-30)
                held.append(whole * (1.0 - max(lost, 0.0) ** LOST))
            else:
                assert rectangles is not None
                held.append(rectangles[number])
        return [*held, whole]

    def _best(self, layer: str, worth: np.ndarray) -> list[tuple[float, Rectangle]]:
        whole = self.options[layer][-1][0]
        taps = worth.reshape(whole.size)
        found = []
        for places in self.options[layer]:
            held = [float(taps[r.top : r.bottom + 1, r.left : r.right + 1].sum()) for r in places]
            found.append((max(held), places[int(np.argmax(held))]) if places else (0.0, whole))
        return found

    def take(self, taps: Mapping[str, np.ndarray], keep: Mapping[str, np.ndarray]) -> None:
        """Of every layer the rectangle or the rank of the option that ``keep`` takes."""
        taken = {n: len(keep[alternatives_name(n)]) - 1 for n in self.ranks}
        self.aims = {n: self.ranks[n][t] for n, t in taken.items() if self.ranks[n][t]}
        self.chosen = {
            n: self._best(n, taps[n])[t][1]
            for n, t in taken.items()
            if t < len(self.ranks[n]) - 1 and not self.ranks[n][t]
        }

    @property
    def areas(self) -> dict[str, float]:
        return {n: float(self.chosen.get(n, self._whole(n)).area) for n in self.spatial}

    def going(self, ready: Collection[str]) -> dict[str, np.ndarray]:
        found = {}
        for layer in (n for n in self.chosen if n in ready):
            areas = [places[0].area if places else 0 for places in self.options[layer]]
            found[alternatives_name(layer)] = np.arange(areas.index(self.chosen[layer].area) + 1)
        return found

    def forget(self, layers: Collection[str]) -> None:
        super().forget(layers)
        for table in ("ranks", "layouts", "aims"):
            setattr(self, table, {n: v for n, v in getattr(self, table).items() if n not in layers})
