"""MGP, multi-granularity pruning: filters where they are free, input channels and kernel shapes where widths must match.

Liu Qi, Chen Ying: "Multi-granularity pruning with a regularisation mechanism", Acta Electronica Sinica 51(8), 2023.  The paper
fixes the idea: filter pruning is limited where feature maps must match in width, as at the end of a residual branch; a coarse
to fine strategy leaves the number of filters there as it is and prunes finer structures instead, under an L1 regularisation
that adapts to the structure of the moment.  What follows is our reading, in the paper's order:

1. granularities.  Coarse: filters, the coupled channels that one layer makes.  Medium: the input channels of one convolution
   that reads a stream (``graph.inputs``).  Fine: the positions of a kernel, pushed towards one rectangle per layer
   (``forms.shapes``), because free stripes run no faster.  Pruning filter in filter (Meng et al. 2020) learns a skeleton
   ``S: (out, kh, kw)`` that multiplies ``W``; here the skeleton is implicit: ``dL/dS = sum_in(W * dL/dW)`` is read from the
   gradients, and pressure on ``S`` is pressure on ``W``, so nothing is added to the network and nothing has to be folded;
2. importance: the squared first-order change of the loss when a gate on the unit closes, whatever its kind, normalised
   together, so that filters, inputs and positions can be weighed against each other per cost in one exact budget;
3. coarse to fine: at first only filters may go, a little later inputs, then shapes; until a decision is carried out it may be
   taken back;
4. adaptive L1: only what is outside the keep-set is pressed (``methods.pressure``), every group at its own pace
   ``l_g ~ sqrt(share of the cost that goes with g) * (1 + share of what is left of g that has to go)``;
5. removal, in the middle of training, of what has reached exactly zero; kernels are cut once the keep-set is final.

``stripes=True`` leaves stripes free, as papers count them, instead of looking for rectangles (``methods.stripes``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from espalier.costs import Cost, CostModel
from espalier.forms import Place, Rectangle, cut_kernel, find_places, shape_sequence, shapes
from espalier.graph import Graph, hold, selectable, with_alternatives, with_inputs
from espalier.graph.alternatives import alternatives_name
from espalier.graph.inputs import inputs_name
from espalier.graph.stripes import striped, stripes_name
from espalier.layers import PartConv2d
from espalier.methods.base import FROZEN, Batches, Removed, is_frozen
from espalier.methods.blocks import WholeBlocks, block_rules, offer_blocks, takes_blocks, worth_of_blocks
from espalier.methods.importance import Sensitivity
from espalier.methods.pressure import MOMENTA, TINY, Fading, FadingMethod
from espalier.methods.stripes import Masks, StripeMasks
from espalier.methods.units import Units, upload
from espalier.plan import Budget, Plan
from espalier.settings import Share, described
from espalier.solver import BudgetError, solve


@dataclass(frozen=True)
class MGP(FadingMethod):
    """Hyper-parameters of multi-granularity pruning; the pace is that of ``FadingMethod``.

    ``stripes``: instead of kernel shapes, free masks of stripes, one kernel position of one filter at a time.  The budget is
    then met as the paper counts it, by MACs and parameters of kept stripes: *counted, not executed*.  The convolutions that
    are delivered are as dense as before, masked stripes are zeros in them: ``Run.cost`` is what they cost,
    ``Run.counted`` what is counted.
    """

    name: ClassVar[str] = "mgp"
    trains: ClassVar[bool] = True
    filters: Annotated[bool, described("coarse: output channels where they are free")] = True
    inputs: Annotated[bool, described("medium: input channels of single convolutions")] = True
    shapes: Annotated[bool, described("fine: kernel shapes of whole layers")] = True
    streams: Annotated[
        bool,
        described(
            "let channels that several layers make, a residual stream, go as in TCP; readers then select nothing"
        ),
    ] = False
    blocks: WholeBlocks = None
    stagger: Annotated[Share, described("how much later than the coarser one each finer granularity begins")] = 0.03
    stripes: Annotated[bool, described("free masks of stripes instead of kernel shapes: counted, not executed")] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_pace()
        if not (self.filters or self.inputs or self.shapes or self.stripes):
            raise ValueError("MGP(): all granularities are off; switch on filters, inputs, shapes or stripes")
        if self.streams and not self.filters:
            raise ValueError("MGP(streams=True, filters=False): streams go as filters do; switch filters on")
        if self.stripes and self.blocks:
            raise ValueError("MGP(stripes=True, blocks=True): stripes are counted, blocks are not executed; choose one")

    def start(self, model: nn.Module, example: Any, budget: Budget, *, batches: Batches | None = None) -> MGPRun:
        return MGPRun(model, example, budget, self)


class MGPRun(Fading):
    """One run of MGP."""

    method: MGP

    def __init__(self, model: nn.Module, example: Any, budget: Budget, method: MGP) -> None:
        super().__init__(model, example, budget, method)
        self.bake()
        self.hold_frozen()
        self.graph, self.shapes, self.skipped = granularities(model, self.graph, example, method)
        if takes_blocks(method.blocks, budget) and not method.stripes:
            offer_blocks(self)
        self.chosen: dict[str, Rectangle] = {}  # what the keep-set of now leaves of kernels, if not all
        self.stripes = StripeMasks(model, self._striped() if method.stripes else ())
        counted = self.stripes.graph(self.graph)
        even = worth_of_blocks(counted, {g.name: np.ones(g.size) for g in counted.groups})
        solve(counted, even, self.limits, **self._rules(counted))  # unreachable budgets fail now
        self._bind()
        self._begin()

    def _striped(self) -> list[str]:
        """Convolutions whose stripes can be masked and counted; a 1x1 filter has only one.  The others are said to be left."""
        places, _ = find_places(self.model, self.example)
        parts = {n for n, m in self.model.named_modules() if isinstance(m, PartConv2d)}  # where a run goes on
        whole = {n for n, p in places.items() if not p.linear}
        kernels = {n: self.model.get_submodule(n).kernel_size for n in (*whole, *parts)}
        spatial = [n for n, _ in self.model.named_modules() if kernels.get(n, (1, 1)) != (1, 1)]
        frozen = [n for n in spatial if is_frozen(self.model, n)]
        found = [n for n in spatial if n not in frozen and striped(self.graph, n)]
        self.skipped.update(
            {n: FROZEN if n in frozen else "grouped or tied channels" for n in spatial if n not in found}
        )
        return found

    def _rules(self, graph: Graph) -> dict[str, Any]:
        own = {"multiple_of": self.budget.multiple_of, "protect": self.budget.protected(graph)}
        return {**own, **block_rules(graph)}

    @property
    def counted(self) -> Cost | None:
        """The cost of kept stripes, in the ``stripes`` mode; zeros are not executed faster than other numbers."""
        return self.stripes.count(self.graph) if self.method.stripes else None

    def _bind(self) -> None:
        """Tie hooks to the model's present parameters."""
        self.units = Units(self.model, self.graph, taps=tuple(self.shapes), stripes=self.stripes.layers)
        self.sensitivity = Sensitivity(self.units, smoothing=self.method.smoothing)

    def _listen(self, progress: float) -> None:
        self._hear_every_fourth()

    # -- 2. importance -------------------------------------------------------------------------------------------------

    def importance(self) -> tuple[dict[str, np.ndarray], dict[str, list[Rectangle]]]:
        """Per group what its units are worth, of alternatives what each option adds; the best rectangle of every option."""
        values = self.sensitivity.value.double().cpu().numpy()
        scores = self.units.split(values)
        best: dict[str, list[Rectangle]] = {}
        for layer, options in self.shapes.items():
            kernel = self.model.get_parameter(f"{layer}.weight").shape[2:]
            taps = values[self.units.taps[layer]].reshape(kernel)
            best[layer], worth = [], [0.0]
            for option in options:
                kept = [float(taps[r.top : r.bottom + 1, r.left : r.right + 1].sum()) for r in option]
                best[layer].append(option[int(np.argmax(kept))])
                worth.append(max(worth[-1], *kept))
            scores[alternatives_name(layer)] = np.diff(worth)
        scores.update(self.stripes.scores(self._worth_of_stripes()))
        return scores, best

    def _worth_of_stripes(self) -> dict[str, np.ndarray]:
        """Importance of every stripe, shape ``(out, kh * kw)`` per layer."""
        rows = self.units.stripes.items()
        values = self.sensitivity.value.double().cpu().numpy() if rows else np.zeros(0)
        return {n: values[r].reshape(self.stripes.gone[n].shape) for n, r in rows}

    # -- 3. coarse to fine ---------------------------------------------------------------------------------------------

    def _plan(self, limits: Mapping[str, float], progress: float) -> tuple[Plan, dict[str, Rectangle]]:
        """The keep-set inside ``limits`` with the granularities that take part by now, finer ones only if it needs them."""
        scores, best = self.importance()
        graph = self.stripes.graph(self.graph)
        kinds = [k for k in (FILTERS, INPUTS, SHAPES, STRIPES) if any(kind_of(n) == k for n in scores)]
        open_ = min(len(kinds), 1 + int((progress - self.method.start_at) / max(self.method.stagger, 1e-9)))
        if progress >= self.method.reach - self.method.fade:
            open_ = len(kinds)
        for number in range(max(open_, 1), len(kinds) + 1):
            some = worth_of_blocks(graph, {n: s for n, s in scores.items() if kind_of(n) in kinds[:number]})
            try:
                plan = solve(graph, some, limits, **self._rules(graph))
                break
            except BudgetError:
                if number == len(kinds):
                    raise
        else:  # nothing can go at all
            plan = solve(graph, {}, limits, **self._rules(graph))
        chosen = {}
        for layer, options in self.shapes.items():
            option = len(plan.keep[alternatives_name(layer)])
            if option < len(options):
                chosen[layer] = best[layer][option - 1]
        return Plan({n: u for n, u in plan.keep.items() if kind_of(n) != STRIPES}, plan.sizes), chosen

    def _masks(self, plan: Plan, limits: Mapping[str, float]) -> Masks:
        """The stripes that stay beside ``plan``: ``_plan`` has only averaged over filters that go."""
        if not self.stripes.layers:
            return {}
        return self.stripes.choose(self.graph, self._worth_of_stripes(), plan.keep, limits, self.budget)

    def _choose(self, progress: float) -> np.ndarray:
        limits = self.limits_at(progress)
        plan, self.chosen = self._plan(limits, progress)
        masks = self._masks(plan, limits)
        self.record("kernel", self._kernels(masks), progress=progress)
        outside = self._left_out(plan, masks)
        self.pull = self._pace(plan, outside)
        self._raise_small_stripes(outside)
        return outside

    def _raise_small_stripes(self, outside: np.ndarray) -> None:
        """Press a stripe as if it were no smaller than a part of those that stay.

        One that left when it was next to nothing would be pressed by next to nothing, and the optimiser kept it alive.
        """
        if not self.units.stripes:
            return
        norm, least = self._norm().cpu(), torch.full((self.units.count,), TINY)
        for rows in self.units.stripes.values():
            stays = norm[rows][torch.from_numpy(~outside[rows])]
            least[rows] = SMALLEST * float(stays.mean()) if len(stays) else TINY
        self.least = least.to(self.units.device)

    def _kernels(self, masks: Masks) -> dict[str, float]:
        """Kernel positions that the keep-set leaves of every layer, of free stripes the mean over filters."""
        areas = {
            n: float(self.chosen[n].area if n in self.chosen else options[-1][0].area)
            for n, options in self.shapes.items()
        }
        return {**areas, **{n: round(float(mask.sum(1).mean()), 3) for n, mask in masks.items()}}

    def _left_out(self, plan: Plan, masks: Masks) -> np.ndarray:
        outside = self.units.outside({n: u for n, u in plan.keep.items() if kind_of(n) != SHAPES})
        for layer, rectangle in self.chosen.items():
            height, width = self.model.get_parameter(f"{layer}.weight").shape[2:]
            outside[self.units.taps[layer]] = ~rectangle.mask((height, width)).reshape(-1)
        for layer, mask in masks.items():
            outside[self.units.stripes[layer]] = ~mask.reshape(-1)
        return outside

    # -- 4. adaptive L1 ------------------------------------------------------------------------------------------------

    def _pace(self, plan: Plan, outside: np.ndarray) -> Tensor:
        """How fast each group fades: by the cost that goes with it and by how much of what is left has to go."""
        graph = self.stripes.graph(self.graph)
        state = CostModel(graph).at(graph.sizes)
        group = self.units.group_of()
        left = self.units.sizes.clip(min=1)
        going = np.bincount(group[outside], minlength=self.units.groups)
        share = np.zeros(self.units.groups)
        place = {name: len(self.graph.groups) + i for i, name in enumerate(self.units.taps)}
        for number, g in enumerate(graph.groups):  # behind those of the network the stripes, as in ``units``
            less = len(plan.keep[g.name]) - g.size if g.name in plan.keep else -int(going[number])
            if less:
                saved = sum(-state.change(m, number, less) / max(getattr(self.dense, m), 1) for m in ("macs", "params"))
                share[place.get(g.layer, number) if g.options else number] = max(saved, 0.0)
        pace = np.sqrt(share) * (1.0 + going / left)
        busy = pace > 0
        if not busy.any():
            return torch.ones_like(self.pull)
        pace = np.where(busy, pace / pace[busy].mean(), 1.0).clip(SLOWEST, FASTEST)
        return upload(pace[group].astype(np.float32), self.units.device)

    # -- 5. removal ----------------------------------------------------------------------------------------------------

    def _remove_faded(self, optimizer: torch.optim.Optimizer) -> Removed | None:
        if not self._outside.any():
            if self.settled:
                self._finished()
            return None
        if bool(self.stripes.layers) and self.settled:
            self._hold_faded()
            if not self._channels(self._outside).any() and bool(self._zero[self._outside].all()):
                return self._masked()
        ready = self._channels(self._faded())
        cut = {n: r for n, r in self.chosen.items() if self.settled and ready[self.units.taps[n]].any()}
        for layer in self.shapes:
            if layer not in cut:
                ready[self.units.taps[layer]] = False
        if not ready.any():
            return None
        stay = {n: np.flatnonzero(~g) for n, g in self.units.split(ready).items()}
        self._descend(stay, cut)
        if not self._worth_a_surgery(stay, last=bool((ready == self._channels(self._outside)).all())):
            return None
        return self._carry_out(stay, cut, optimizer)

    def _channels(self, units: np.ndarray) -> np.ndarray:
        """``units`` without stripes, which are never removed."""
        units = units.copy()
        for rows in self.units.stripes.values():
            units[rows] = False
        return units

    def _hold_faded(self) -> None:
        """Stripes that the final keep-set leaves out stay zero from the moment they have come to zero."""
        zero = upload(self._zero, self.units.device)
        for layer, rows in self.units.stripes.items():
            self.stripes.gone[layer] |= zero[rows].view_as(self.stripes.gone[layer])

    def _masked(self) -> Removed:
        """All masks are final; averages of the weights begin anew, so that they hold exact zeros too."""
        self.pressed[:] = False
        self._find_busy(np.zeros_like(self._outside))
        self._finished()
        return Removed({}, self.cost, frozenset(f"{n}.weight" for n in self.stripes.layers))

    def _hold(self, optimizer: torch.optim.Optimizer) -> None:
        if self.settled and self.stripes.layers:
            self.stripes.hold(optimizer.state, MOMENTA)

    def _descend(self, stay: dict[str, np.ndarray], cut: Mapping[str, Rectangle]) -> None:
        """Write the options that kernels are cut to into ``stay``."""
        for layer, rectangle in cut.items():
            option = next(i for i, option in enumerate(self.shapes[layer]) if option[0].area == rectangle.area)
            stay[alternatives_name(layer)] = np.arange(option + 1)

    def _carry_out(
        self, stay: dict[str, np.ndarray], cut: Mapping[str, Rectangle], optimizer: torch.optim.Optimizer | None
    ) -> Removed:
        gone = {n for n in self.shapes if any(b.holds(n) for b in self.graph.absent(stay))}
        cut = {n: rectangle for n, rectangle in cut.items() if n not in gone}
        rows = [self.units.offsets[i] + stay[g.name] for i, g in enumerate(self.graph.groups)]
        rows += [np.arange(s.start, s.stop) for n, s in self.units.taps.items() if n not in cut and n not in gone]
        kept = self.graph.kept({n: np.asarray(u) for n, u in stay.items()})
        for layer, own in self.units.stripes.items():
            by_filter = np.arange(own.start, own.stop).reshape(self.stripes.gone[layer].shape)
            rows.append(by_filter[kept.get(f"{layer}.weight", {}).get(0, slice(None))].reshape(-1))
        survivors = np.concatenate(rows)
        value, batches = self.sensitivity.value, self.sensitivity.batches
        self._silence()
        trimmed = {}
        for layer, rectangle in cut.items():
            trimmed.update(cut_kernel(self.model, layer, rectangle, optimizer=optimizer))
        removed = self.remove(stay, optimizer)
        for tensor, by_dim in trimmed.items():
            removed.kept.setdefault(tensor, {}).update(by_dim)
        self.stripes.cut(kept)
        self.shapes = {n: r for n, r in self.shapes.items() if n not in cut and n not in gone}
        self.chosen = {n: r for n, r in self.chosen.items() if n not in cut and n not in gone}
        self._bind()
        self.sensitivity.value, self.sensitivity.batches = value[upload(survivors, self.units.device)], batches
        self._keep_rows(survivors)
        if self.settled and not self._outside.any():
            self._finished()
        return removed

    def _silence(self) -> None:
        self.sensitivity.close()

    def finish(self) -> nn.Module:
        """The small model.  If training stopped before everything had faded, the rest is cut here, and ``forced`` is true."""
        if not self.done:
            plan, self.chosen = self._plan(self.limits, 1.0)
            masks = self._masks(plan, self.limits)
            self.record("kernel", self._kernels(masks), progress=1.0)
            stay = {n: np.asarray(u) for n, u in plan.keep.items()}
            less = any(len(k) < self.graph.group(n).size for n, k in stay.items())
            self.forced = less or not all(mask.all() for mask in masks.values())
            self.stripes.load({n: torch.from_numpy(~m) for n, m in masks.items()})
            self._carry_out(stay, dict(self.chosen), None)
            self._finished()
        self.stripes.hold({}, ())
        self.stripes.read()
        return self.model

    remembers = ("shapes", "chosen", "stripes")

    def bind(self) -> None:
        self._silence()
        self._bind()


# -- 1. granularities --------------------------------------------------------------------------------------------------

FILTERS, INPUTS, SHAPES, STRIPES = "filters", "inputs", "shapes", "stripes"
SLOWEST, FASTEST = 0.5, 2.0  # pace of a group, relative to the mean
SMALLEST = 0.1  # reference of a stripe, relative to the mean of those that stay
FEWEST_INPUTS = 8  # an image has too few channels to select among


def kind_of(group: str) -> str:
    """The granularity of a group, by its name; residual blocks take part from the beginning, as filters do."""
    layer = group.partition(":")[0]
    finer = {inputs_name(layer): INPUTS, alternatives_name(layer): SHAPES, stripes_name(layer): STRIPES}
    return finer.get(group, FILTERS)


def granularities(
    model: nn.Module, graph: Graph, example: Any, method: MGP
) -> tuple[Graph, dict[str, list[list[Rectangle]]], dict[str, str]]:
    """The graph with everything that ``method`` may prune, the options of every kernel, and layer -> why it stays as it is."""
    places, left = find_places(model, example)
    left = {n: r for n, r in left.items() if not isinstance(model.get_submodule(n), nn.Linear)}
    left.update({n: FROZEN for n, p in places.items() if not p.linear and is_frozen(model, n)})
    if not method.filters:
        graph = hold(graph, [g.name for g in graph.groups], "filters are switched off")
    elif not method.streams:
        graph = hold(graph, streams(graph), "made by several layers, whose widths must match")
    convolutions = {n: p for n, p in places.items() if not p.linear and len(p.kernel) == 2 and n not in left}
    if method.inputs:
        wide = [n for n, p in convolutions.items() if p.in_channels >= FEWEST_INPUTS]
        graph = with_inputs(graph, {n: _bytes(places[n]) for n in selectable(graph, wide)})
    options: dict[str, list[list[Rectangle]]] = {}
    for name, place in convolutions.items() if method.shapes and not method.stripes else ():
        if place.kernel == (1, 1):
            continue
        found = shapes(place)
        try:
            graph = with_alternatives(graph, {name: [shape_sequence(place, option) for option in found]})
        except ValueError as error:
            left[name] = str(error)
            continue
        options[name] = found
    return graph, options, left


def streams(graph: Graph) -> list[str]:
    """Groups whose channels come from several layers; a grouped convolution only passes on what it is given."""
    found = []
    for group in graph.groups:
        makers = {s.tensor.rpartition(".")[0] for s in group.producers if s.dim == 0 and _is_weight(graph, s.tensor)}
        if len(makers - graph.group_width.keys()) > 1:
            found.append(group.name)
    return found


def _is_weight(graph: Graph, tensor: str) -> bool:
    return len(graph.shapes.get(tensor, ())) > 1


def _bytes(place: Place) -> int:
    return place.positions * place.input_size[0] * place.input_size[1] * place.itemsize
