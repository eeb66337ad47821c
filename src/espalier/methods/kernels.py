"""The forms of whole layers that compete for a budget: rectangles of a kernel, which run as smaller convolutions, and ranks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from espalier.carving import Kept
from espalier.forms import Rectangle, cut_kernel
from espalier.graph.alternatives import alternatives_name

LOST = 1.5


@dataclass
class Kernels:
    """What the kernels of some layers may become, and what the keep-set of now leaves of them.

    Kernel positions are units, pushed towards one rectangle per layer.
    """

    options: dict[
        str, list[list[Rectangle]]
    ]  # layer -> by cost, whole last, the places of each; none where it is a rank
    chosen: dict[str, Rectangle] = field(default_factory=dict)  # where it is not all
    ranks: dict[str, list[int]] = field(default_factory=dict)  # layer -> rank of every option; 0: a rectangle, or dense
    layouts: dict[str, str] = field(default_factory=dict)  # layer -> form of its factors
    aims: dict[str, int] = field(default_factory=dict)  # layer -> rank that the keep-set of now gives it
    best: dict[str, list[Rectangle]] = field(default_factory=dict)  # layer -> of every option the place worth most

    def __post_init__(self) -> None:
        self.ranks = self.ranks or {n: [0] * len(options) for n, options in self.options.items()}

    @property
    def spatial(self) -> tuple[str, ...]:
        """Layers with a kernel that may be cut."""
        return tuple(n for n, options in self.options.items() if any(options[:-1]))

    @property
    def stays(self) -> dict[str, np.ndarray]:
        """Layer -> which positions; shape ``(kh * kw,)``."""
        return {n: rectangle.mask(self._whole(n).size).reshape(-1) for n, rectangle in self.chosen.items()}

    @property
    def areas(self) -> dict[str, float]:
        """Layer -> how many positions stay."""
        return {n: float(self.chosen.get(n, self._whole(n)).area) for n in self.spatial}

    def _whole(self, layer: str) -> Rectangle:
        return self.options[layer][-1][0]

    def scores(self, taps: Mapping[str, np.ndarray], triplets: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What each option adds, as ``solve`` takes it, from what kernel positions, ``(kh * kw,)``, and triplets are worth.

        From here on each option of a kernel stands for the place in it that is worth most.
        """
        self.best = {
            n: [
                max(places, key=lambda r: self._inside(n, r, taps[n]), default=self._whole(n))
                for places in self.options[n]
            ]
            for n in taps
        }
        held = {n: self._held(n, taps.get(n), triplets.get(n)) for n in self.ranks}
        return {alternatives_name(n): np.diff(np.maximum.accumulate([0.0, *some])) for n, some in held.items()}

    def _held(self, layer: str, taps: np.ndarray | None, triplets: np.ndarray | None) -> list[float]:
        """What each option holds of what the layer is worth, as its kernel positions have it; of a layer of one, its triplets.

        What truncation loses grows faster than the sum over the triplets that go: measured on trained layers of ResNet-20
        beside the channels of the same layers, with the power ``LOST``.
        """
        views = [v for v in (taps, triplets) if v is not None]
        whole = float(views[0].sum()) if views else 0.0
        held = []
        for number, rank in enumerate(self.ranks[layer][:-1]):
            if rank:
                assert triplets is not None
                lost = 1.0 - float(triplets[:rank].sum()) / max(float(triplets.sum()), 1e-30)
                held.append(whole * (1.0 - max(lost, 0.0) ** LOST))
            else:
                assert taps is not None
                held.append(self._inside(layer, self.best[layer][number], taps))
        return [*held, whole]

    def _inside(self, layer: str, place: Rectangle, taps: np.ndarray) -> float:
        """What of ``taps`` lies in ``place``."""
        kernel = taps.reshape(self._whole(layer).size)
        return float(kernel[place.top : place.bottom + 1, place.left : place.right + 1].sum())

    def choose(self, keep: Mapping[str, np.ndarray]) -> None:
        """Of every layer the rank, or the best rectangle, of the option that ``keep`` takes."""
        taken = {n: len(keep[alternatives_name(n)]) - 1 for n in self.ranks}
        self.aims = {n: self.ranks[n][t] for n, t in taken.items() if self.ranks[n][t]}
        cut = {n: t for n, t in taken.items() if t < len(self.ranks[n]) - 1 and n not in self.aims}
        self.chosen = {n: self.place(n, t) for n, t in cut.items()}

    def place(self, layer: str, option: int) -> Rectangle:
        """What the kernel of ``layer`` is cut to by an option that is no rank; before anything is heard, around the middle."""
        places = self.options[layer][option]
        return self.best[layer][option] if layer in self.best else places[len(places) // 2]

    def going(self, ready: Collection[str]) -> dict[str, np.ndarray]:
        """Options that the layers ``ready`` are cut to, by group."""
        found = {}
        for layer in (n for n in self.chosen if n in ready):
            areas = [places[0].area if places else 0 for places in self.options[layer]]
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
        for table in ("options", "chosen", "ranks", "layouts", "aims", "best"):
            setattr(self, table, {n: v for n, v in getattr(self, table).items() if n not in layers})
