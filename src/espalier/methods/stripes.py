"""Free stripe masks: kernel positions of single filters that are zero in a dense convolution, as the paper counts them.

Pruning filter in filter (Meng et al. 2020) removes stripes, one kernel position of one filter, wherever they are.  No runtime
executes that faster, so these masks are for comparison: their cost is *counted, not executed*.  The last stripe of a filter is
the filter: it stays unless the filter goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from espalier.costs import Cost, CostModel
from espalier.forms import find_places
from espalier.graph import Graph
from espalier.graph.stripes import striped, stripes_name, with_stripes
from espalier.layers import PartConv2d
from espalier.methods.state import WEIGHT_FROZEN, is_frozen
from espalier.plan import Budget
from espalier.solver import solve

Masks = dict[str, np.ndarray]
"""Layer -> which stripes, shape ``(out, kh * kw)``."""


class StripeMasks:
    """Which stripes of ``layers`` are zero for good.  The weights themselves stay whole and dense."""

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        self.model = model
        self.gone: dict[str, Tensor] = {}  # bool, (out, kh * kw)
        self.stays: Masks = {}  # what the keep-set of now leaves
        for layer in layers:
            weight = model.get_parameter(f"{layer}.weight")
            rows, positions = weight.shape[0], weight.shape[2:].numel()
            self.gone[layer] = torch.zeros(rows, positions, dtype=torch.bool, device=weight.device)

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(self.gone)

    @property
    def areas(self) -> dict[str, float]:
        """Layer -> how many positions the keep-set of now leaves of a filter, on average."""
        return {n: round(float(mask.sum(1).mean()), 3) for n, mask in self.stays.items()}

    # -- counting ------------------------------------------------------------------------------------------------------

    def graph(self, graph: Graph) -> Graph:
        """``graph`` that costs stripes, all of them to begin with; an average where filters go."""
        return with_stripes(graph, {n: gone.numel() - len(gone) for n, gone in self.gone.items()})

    def count(self, graph: Graph) -> Cost:
        """What is left by the paper's counting; ``graph`` is that of the network as it is executed now."""
        left = with_stripes(graph, {n: int((~gone).sum()) - len(gone) for n, gone in self.gone.items()})
        return CostModel(left).cost(left.sizes)

    # -- which ---------------------------------------------------------------------------------------------------------

    def scores(self, worth: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Importance of the units of ``graph``; ``worth`` is that of all stripes, shape ``(out, kh * kw)`` per layer."""
        return {stripes_name(n): _scores(_best_first(w)[1]) for n, w in worth.items()}

    def choose(
        self,
        graph: Graph,
        worth: Mapping[str, np.ndarray],
        keep: Mapping[str, np.ndarray],
        limits: Mapping[str, float],
        budget: Budget,
    ) -> Masks:
        """The stripes that stay, exactly inside ``limits``, when the groups of ``graph`` keep ``keep``.

        Everything of filters that go is said to stay: it goes with them.
        """
        stay = graph.kept(dict(keep))
        rows = {n: stay.get(f"{n}.weight", {}).get(0, np.arange(len(w))) for n, w in worth.items()}
        ranked = {n: _best_first(w[rows[n]]) for n, w in worth.items()}
        left = with_stripes(graph.after(keep), {n: order[:, 1:].size for n, (order, _) in ranked.items()})
        scores = {stripes_name(n): _scores(values) for n, (_, values) in ranked.items()}
        plan = solve(left, scores, limits, multiple_of=1, protect=budget.protected(left))
        masks = {}
        for layer, (order, _) in ranked.items():
            spare = np.zeros(order[:, 1:].size + 1, dtype=bool)
            spare[plan.keep[stripes_name(layer)]] = True
            mine = np.zeros(order.shape, dtype=bool)
            np.put_along_axis(mine, order[:, :1], True, axis=1)
            np.put_along_axis(mine, order[:, 1:], spare[1:].reshape(len(order), -1), axis=1)
            masks[layer] = np.ones(worth[layer].shape, dtype=bool)
            masks[layer][rows[layer]] = mine
        self.stays = masks
        return masks

    # -- zero for good -------------------------------------------------------------------------------------------------

    def survivors(self, rows: Mapping[str, slice], kept: Mapping[str, Mapping[int, np.ndarray]]) -> list[np.ndarray]:
        """Units of the filters that stay; ``rows`` are those of all stripes, by layer."""
        found = []
        for layer, gone in self.gone.items():
            by_filter = np.arange(rows[layer].start, rows[layer].stop).reshape(gone.shape)
            found.append(by_filter[kept.get(f"{layer}.weight", {}).get(0, slice(None))].reshape(-1))
        return found

    def cut(self, kept: Mapping[str, Mapping[int, np.ndarray]]) -> None:
        """Follow a removal of filters."""
        for layer, gone in self.gone.items():
            rows = kept.get(f"{layer}.weight", {}).get(0)
            if rows is not None:
                self.gone[layer] = gone[torch.from_numpy(rows).to(gone.device)]
                if layer in self.stays:
                    self.stays[layer] = self.stays[layer][rows]

    def add(self, gone: Mapping[str, Tensor]) -> None:
        """Stripes that are zero for good from now on, beside those that were; of the same layers."""
        for layer, more in gone.items():
            self.gone[layer] |= more.view_as(self.gone[layer])

    @torch.no_grad()
    def hold(self, state: Mapping[Any, Any], keys: Sequence[str]) -> None:
        """Zero what is gone, and the moments ``keys`` of an optimiser's ``state`` there, whatever the optimiser has done."""
        for layer, gone in self.gone.items():
            weight = self.model.get_parameter(f"{layer}.weight")
            mask = gone.view(gone.shape[0], 1, *weight.shape[2:])
            weight.masked_fill_(mask, 0.0)
            for key in keys:
                moment = state.get(weight, {}).get(key)
                if isinstance(moment, Tensor):
                    moment.masked_fill_(mask, 0.0)

    def read(self) -> None:
        """From now on gone is what is zero in the weights; of a filter without any other, its first stripe stays."""
        for layer in self.layers:
            gone = ~living(self.model.get_parameter(f"{layer}.weight"))
            gone[gone.all(1), 0] = False
            self.gone[layer] = gone

    def state_dict(self) -> dict[str, Tensor]:
        return {n: gone.clone() for n, gone in self.gone.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.load(state)

    def load(self, gone: Mapping[str, Tensor]) -> None:
        """Go on with these masks."""
        self.gone = {n: g.to(self.model.get_parameter(f"{n}.weight").device) for n, g in gone.items()}


def living(weight: Tensor) -> Tensor:
    """Stripes of ``weight``, ``(out, in, kh, kw)``, that are not zero; shape ``(out, kh * kw)``."""
    return (weight.detach() != 0).any(1).flatten(1)


def _best_first(worth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per filter the positions from the best on, and what all but the best are worth."""
    order = np.argsort(-worth, axis=1, kind="stable")
    return order, np.take_along_axis(worth, order[:, 1:], axis=1).reshape(-1)


def _scores(spare: np.ndarray) -> np.ndarray:
    """Scores of spare stripes behind the unit that stands for none, which is the last to go."""
    return np.concatenate([[spare.max(initial=0.0)], spare])


def stripable(model: nn.Module, graph: Graph, example: Any) -> tuple[list[str], dict[str, str]]:
    """Convolutions whose stripes can be masked and counted; a 1x1 filter has only one.  And layer -> why others are left."""
    places, _ = find_places(model, example)
    parts = {n for n, m in model.named_modules() if isinstance(m, PartConv2d)}  # where a run goes on
    whole = {n for n, p in places.items() if not p.linear}
    kernels: dict[str, Any] = {n: model.get_submodule(n).kernel_size for n in (*whole, *parts)}
    spatial = [n for n, _ in model.named_modules() if kernels.get(n, (1, 1)) != (1, 1)]
    frozen = [n for n in spatial if is_frozen(model, n)]
    found = [n for n in spatial if n not in frozen and striped(graph, n)]
    return found, {n: WEIGHT_FROZEN if n in frozen else "grouped or tied channels" for n in spatial if n not in found}
