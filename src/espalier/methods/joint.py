"""Joint: one budget spent on blocks, channels, selected inputs, kernel shapes and ranks of the same network, in one run.

Methods that shorten a network, narrow it or factorise it have each a kind of structure, and networks have layers for all of
them: a wide late layer has a low rank, a narrow early one none; a shallow block is worth less than the time it takes to launch.
Here every layer may end in the form that serves the budget best, and one solver weighs them all:

1. what may go (``granularities``): residual blocks as a whole; coupled channels; input channels of convolutions that read what
   cannot go; and the forms of a layer, in one group of alternatives: kernel rectangles, ranks, or dense;
2. importance, the same measure for every kind: the squared first-order change of the loss when a gate closes, on a channel, an
   input, a kernel position, or a singular triplet (``s u^T dL/dW v``), normalised together (``methods.importance``).  The bases
   of the triplets are those of the weights a few decisions ago (``REBASE_EVERY``); blocks are calibrated (``methods.blocks``);
3. coarse to fine: at first only blocks and channels may go, then inputs, then forms; a decision may be taken back until it is
   carried out.  The last one, at ``end_at - 2 fade``, is final and spends the whole budget;
4. pressure and removal of blocks, channels, inputs and kernels while the network trains, as in MGP;
5. ranks last, on what remains: the part of a weight outside of the leading singular subspace of its final rank sinks to zero in
   a straight line, momentum along; then the layer is written as two, which compute the same, and trains on as these.

Channels and ranks by one measure, after training: Li et al., "Towards Compact CNNs via Collaborative Compression", CVPR 2021.
That all of it, blocks and kernel shapes too, is spent from one exact budget inside one training run is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from espalier.costs import CostModel
from espalier.forms import Place, Rectangle, cost_of, dense_sequence, find_places, sequential, shape_sequence, shapes
from espalier.forms.shapes import cut_kernel
from espalier.forms.svd import svd
from espalier.forms.table import matrix_form
from espalier.forms.trial import refused
from espalier.graph import ConvSequence, Graph, with_alternatives
from espalier.graph.alternatives import alternatives_name
from espalier.methods.base import Batches, Removed
from espalier.methods.kernels import Kernels
from espalier.methods.mgp import MGP, MGPRun, granularities
from espalier.methods.pressure import MOMENTA, PRESSES, FadingMethod
from espalier.methods.ranks import LAYOUTS, layout, rank_options
from espalier.methods.state import WEIGHT_FROZEN, is_frozen
from espalier.methods.units import Gate, Units
from espalier.plan import Budget, Plan
from espalier.settings import OneOf, Portion, described
from espalier.surgery import put_layer


@dataclass(frozen=True)
class Joint(FadingMethod):
    """Hyper-parameters of joint compression; every duration is a fraction of the whole run.

    Source: ours; channels and ranks by one measure, after training, are of Li et al., Towards Compact CNNs via Collaborative
    Compression, CVPR 2021.  The module's docstring has the steps.
    """

    name: ClassVar[str] = "joint"
    trains: ClassVar[bool] = True
    blocks: Annotated[bool, described("let residual blocks go as a whole")] = True
    inputs: Annotated[bool, described("let convolutions select among inputs that cannot go")] = True
    shapes: Annotated[bool, described("let kernels become smaller")] = True
    ranks: Annotated[bool, described("let layers be factorised")] = True
    form: Annotated[str, OneOf(LAYOUTS), described("of the factors; auto is the faster one of every layer")] = "auto"
    stagger: Annotated[Portion, described("how much later than the coarser one each finer granularity begins")] = 0.03

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start_at + 2 * self.fade >= self.end_at:
            raise ValueError(
                f"Joint(start_at={self.start_at}, fade={self.fade}, end_at={self.end_at}): the budget needs time to move, and "
                "ranks fall after channels; start_at + 2 * fade must be below end_at"
            )

    @property
    def closed_at(self) -> float:
        return self.end_at - 2 * self.fade

    def start(self, model: nn.Module, example: Any, budget: Budget, *, batches: Batches | None = None) -> JointRun:
        return JointRun(model, example, budget, self)


TripletBases = dict[str, tuple[Tensor, Tensor, Tensor]]
"""Layer -> ``u``, ``s``, ``v`` of the matrix that its weight is."""


class WithTriplets(Units):
    """``Units``, and behind them the singular triplets of layers that may be factorised, the largest value first."""

    def __init__(
        self, model: nn.Module, graph: Graph, *, taps: tuple[str, ...], bases: TripletBases, layouts: Mapping[str, str]
    ) -> None:
        super().__init__(model, graph, taps=taps, more=[len(s) for _, s, _ in bases.values()])
        begins = self.offsets[len(self.offsets) - 1 - len(bases) :]
        self.triplets = {n: slice(int(a), int(b)) for n, a, b in zip(bases, begins, begins[1:], strict=False)}
        self._sides = {n: (u * s, v) for n, (u, s, v) in bases.items()}
        self._layouts = layouts
        self._weights = {n: model.get_parameter(f"{n}.weight") for n in bases}

    def gates(self) -> dict[nn.Parameter, Gate]:
        found = super().gates()
        for layer, weight in self._weights.items():
            found[weight] = self._with(layer, found.get(weight))
        return found

    def _with(self, layer: str, others: Gate | None) -> Gate:
        rows = self.triplets[layer]
        owner = torch.arange(rows.start, rows.stop, device=self.device)
        left, right = self._sides[layer]
        form = matrix_form(self._layouts[layer])

        def of(weight: Tensor, gradient: Tensor) -> list[tuple[Any, Tensor]]:
            heard = ((form.matrix(gradient).to(left) @ right) * left).sum(0)
            return [*(others(weight, gradient) if others else ()), (_Owned(owner), heard)]

        return of


@dataclass(frozen=True)
class _Owned:
    owner: Tensor


class JointRun(MGPRun):
    """One run: ``step`` is that of ``Fading``, and then ranks sink."""

    method: Joint  # type: ignore[assignment]

    def __init__(self, model: nn.Module, example: Any, budget: Budget, method: Joint) -> None:
        super(MGPRun, self).__init__(model, example, budget, method)
        self.graph, kernels, self.skipped = offered(model, self.graph, example, method, budget)
        self.subspaces: dict[str, Tensor] = {}  # of the layers whose ranks sink: the leading left singular vectors
        self.options: dict[str, np.ndarray] = {}  # what they take of their alternatives
        self.sinks_from = self.sunk = 0.0
        self._refreshed = -1.0
        self._places: dict[str, Place] = {}
        self._offer(kernels, blocks=method.blocks)
        self.bases = self._decomposed()
        self._begin()

    def put(self, model: nn.Module, options: Mapping[str, int]) -> None:
        for layer, ranks in self.kernels.ranks.items():
            taken = options.get(alternatives_name(layer), len(ranks)) - 1
            if ranks[taken]:
                put_layer(model, layer, self._factorised(model, layer, ranks[taken]))
            elif taken < len(ranks) - 1:
                cut_kernel(model, layer, self.kernels.place(layer, taken))

    def _factorised(self, model: nn.Module, layer: str, rank: int) -> nn.Sequential:
        """Two layers of ``rank`` that come closest to one."""
        module: Any = model.get_submodule(layer)
        form = matrix_form(self.kernels.layouts[layer])
        place = replace(self._place(layer), out_channels=module.weight.shape[0], in_channels=module.weight.shape[1])
        u, s, v = svd(form.matrix(module.weight.detach()), name=layer)
        root = torch.nn.functional.pad(s, (0, max(0, rank - len(s))))[:rank].sqrt()
        u, v = (torch.nn.functional.pad(x, (0, max(0, rank - x.shape[1])))[:, :rank] for x in (u, v))
        weights = form.stage_weights(u * root, v * root, place.weight_shape)
        return sequential(place, self.kernels.layouts[layer], weights, module.bias)

    def _place(self, layer: str) -> Place:
        if layer not in self._places:
            self._places = find_places(self.model, self.example)[0]
        return self._places[layer]

    # -- 2. importance -------------------------------------------------------------------------------------------------

    def _units(self) -> Units:
        taps, layouts = self.kernels.spatial, self.kernels.layouts
        return WithTriplets(self.model, self.graph, taps=taps, bases=self.bases, layouts=layouts)

    def _decomposed(self) -> TripletBases:
        found = {}
        for layer, form in self.kernels.layouts.items():
            if any(self.kernels.ranks[layer]):
                found[layer] = svd(
                    matrix_form(form).matrix(self.model.get_parameter(f"{layer}.weight").detach()), name=layer
                )
        return found

    def _refresh(self, progress: float) -> None:
        """The bases of the weights as they are now; what was heard stays with the number of the triplet."""
        if self._refreshed >= 0 and progress - self._refreshed < REBASE_EVERY * self.method.every:
            return
        self._refreshed, heard = progress, self.score
        self._silence()
        self.bases = self._decomposed()
        self._bind()
        self.score.follow(heard, np.arange(self.units.count))

    # -- 3. coarse to fine ---------------------------------------------------------------------------------------------

    def _chosen(self, progress: float) -> None:
        self.record("rank aimed at", {n: float(r) for n, r in self.kernels.aims.items()}, progress=progress)
        if progress < self.method.closed_at:
            self._refresh(progress)

    def _reviewed(self, plan: Plan) -> Plan:
        """Layers that became so narrow that two would cost more than one stay dense."""
        model, keep = CostModel(self.graph), plan.counts(self.graph)
        for layer, ranks in self.kernels.ranks.items():
            number = self.graph.index[alternatives_name(layer)]
            if not ranks[keep[number] - 1]:
                continue
            dense = keep.copy()
            dense[number] = len(ranks)
            now, then = model.cost(keep), model.cost(dense)
            if all(getattr(then, m) <= getattr(now, m) for m in self.limits):
                keep = dense
        return replace(plan, keep={**plan.keep, **{g.name: np.arange(k) for g, k in zip(self.graph.groups, keep, strict=True)
                                                   if g.name in plan.keep and len(plan.keep[g.name]) != k}})  # fmt: skip

    # -- 4. removal ----------------------------------------------------------------------------------------------------

    def realise(self, stay: Mapping[str, np.ndarray], optimizer: torch.optim.Optimizer | None) -> Removed:
        ranked = {alternatives_name(n): len(self.kernels.ranks[n]) for n in self.kernels.aims}
        return super().realise({n: np.arange(ranked[n]) if n in ranked else u for n, u in stay.items()}, optimizer)

    def _survivors(self, stay: Mapping[str, np.ndarray]) -> np.ndarray:
        """Of a layer that is narrower as many triplets as it has still; none of one that is gone or was cut."""
        gone = {n for some in self._kernels(stay) for n in some}
        kept = self.graph.kept(dict(stay))
        rows = [super()._survivors(stay)]
        for layer, own in self.units.triplets.items():
            if layer not in gone:
                shape = list(self.model.get_parameter(f"{layer}.weight").shape)
                for dim, left in kept.get(f"{layer}.weight", {}).items():
                    shape[dim] = len(left)
                full = min(matrix_form(self.kernels.layouts[layer]).size([*shape, *[1] * (4 - len(shape))]))
                rows.append(np.arange(own.start, own.start + min(full, own.stop - own.start)))
        return np.concatenate(rows)

    def _cut(self, stay: Mapping[str, np.ndarray], optimizer: torch.optim.Optimizer | None) -> Removed:
        removed = super()._cut(stay, optimizer)
        self.bases = self._decomposed()
        return removed

    # -- 5. ranks ------------------------------------------------------------------------------------------------------

    def _go_on(self, progress: float, optimizer: torch.optim.Optimizer) -> Removed | None:
        """Ranks sink."""
        if not self.subspaces:
            return None
        left = max(0.0, 1.0 - (progress - self.sinks_from) / self.method.fade)
        if self.sunk - left < 1.0 / PRESSES and left > 0.0:
            return None
        self._sink(left / self.sunk, optimizer)
        self.sunk = left
        return self._split(optimizer) if left == 0.0 else None

    def _finished(self) -> None:
        """Once everything else is gone, ranks begin to sink."""
        here = {n: r for n, r in self.kernels.aims.items() if not self.subspaces}
        if not here:
            if not self.subspaces:
                super()._finished()
            return
        self._silence()
        self.sinks_from, self.sunk = self._last, 1.0
        for layer, rank in here.items():
            form = matrix_form(self.kernels.layouts[layer])
            u, _, _ = svd(form.matrix(self.model.get_parameter(f"{layer}.weight").detach()), name=layer)
            self.subspaces[layer] = u[:, :rank].clone()
            option = self.kernels.ranks[layer].index(rank) + 1
            self.options[alternatives_name(layer)] = np.arange(option)

    @torch.no_grad()
    def _sink(self, ratio: float, optimizer: torch.optim.Optimizer | None) -> None:
        """What lies outside of the subspaces is ``ratio`` times what it was; momentum has no part there."""
        for layer, basis in self.subspaces.items():
            form, weight = matrix_form(self.kernels.layouts[layer]), self.model.get_parameter(f"{layer}.weight")
            state = {} if optimizer is None else optimizer.state.get(weight, {})
            for tensor, rest in (
                (weight, ratio),
                *((state[k], 0.0) for k in MOMENTA if isinstance(state.get(k), Tensor)),
            ):
                matrix = form.matrix(tensor)
                inside = basis @ (basis.mT @ matrix)
                tensor.copy_(form.weight(inside.add(matrix - inside, alpha=rest), tensor.shape))

    def _split(self, optimizer: torch.optim.Optimizer | None) -> Removed:
        """Every layer that has come to its rank is two layers from here on."""
        self.remove(self.options, optimizer)
        ranks, renewed = {}, set()
        for layer, basis in self.subspaces.items():
            row = self._factorised(self.model, layer, basis.shape[1])
            put_layer(self.model, layer, row, optimizer=optimizer)
            renewed |= {f"{layer}.{n}" for n, _ in row.named_parameters()}
            ranks[layer] = float(basis.shape[1])
        self.record("rank", ranks, progress=self._last)
        self.subspaces, self.kernels.aims = {}, {}
        super()._finished()
        return Removed({}, self.cost, frozenset(renewed))

    def finish(self) -> nn.Module:
        """The small model.  If training stopped before everything had gone, the rest is cut here, and ``forced`` is true."""
        if not self.done and not self.subspaces:
            super().finish()
        if self.subspaces:
            self.forced = True
            self._sink(0.0, None)
            self._split(None)
        return self.model

    remembers = ("subspaces", "options", "sinks_from", "sunk", "bases", "_refreshed")

    def restored(self) -> None:
        super().restored()
        if self.subspaces:
            self._silence()


REBASE_EVERY = 4  # decisions for which the bases of triplets stand


def offered(
    model: nn.Module, graph: Graph, example: Any, method: Joint, budget: Budget
) -> tuple[Graph, Kernels, dict[str, str]]:
    """The graph with everything that may go, the forms of every layer, and layer -> why it stays as it is."""
    coarse = MGP(inputs=method.inputs, shapes=False, streams=True)
    found = find_places(model, example)
    graph, _, left = granularities(model, graph, coarse, *found)
    places = {n: p for n, p in found[0].items() if not is_frozen(model, n)}
    multiple_of = budget.multiple_of if budget.latency is None else int(np.lcm(budget.multiple_of, graph.grain))
    layouts = {n: layout(p, method.form) for n, p in places.items() if method.ranks and n not in graph.selects}
    unfit = refused(model, example, {n: places[n] for n in layouts}, layouts)
    forms = Kernels({})
    for name, place in places.items():
        rows: list[tuple[ConvSequence, list[Rectangle], int]] = []
        if name in layouts and name not in unfit:
            rows += [(s, [], s.widths[0]) for s in rank_options(place, layouts[name], multiple_of)]
        whole: list[Rectangle] = []
        if len(place.kernel) == 2 and not place.linear:
            rectangles = shapes(place)
            whole = rectangles[-1]
            if method.shapes and place.kernel != (1, 1):
                rows += [(shape_sequence(place, option), option, 0) for option in rectangles[:-1]]
        rows.sort(key=lambda row: cost_of(place, row[0]))
        if not rows:
            continue
        try:
            own = {name: [*(s for s, _, _ in rows), dense_sequence(place)]}
            graph = with_alternatives(graph, own)
        except ValueError as error:
            left[name] = str(error)
            continue
        forms.options[name] = [*(o for _, o, _ in rows), whole]
        forms.ranks[name] = [*(r for _, _, r in rows), 0]
        forms.layouts[name] = layouts.get(name, "")
    left.update({n: WEIGHT_FROZEN for n in found[0] if n not in places})
    return budget.timed(graph) if budget.latency is None else graph, forms, left
