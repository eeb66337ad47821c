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
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import nn

from espalier.costs import CostModel
from espalier.forms import Place, Rectangle, cut_kernel, find_places, shape_sequence, shapes
from espalier.graph import Graph, hold, selectable, with_alternatives, with_inputs
from espalier.graph.alternatives import alternatives_name
from espalier.graph.graph import FORM, INPUTS, Group
from espalier.methods.base import Batches, Removed
from espalier.methods.blocks import WholeBlocks, takes_blocks
from espalier.methods.kernels import Kernels
from espalier.methods.pressure import Fading, FadingMethod
from espalier.methods.ranks import unreachable
from espalier.methods.state import WEIGHT_FROZEN, is_frozen
from espalier.methods.units import Units, upload
from espalier.plan import Budget, Plan
from espalier.settings import Portion, described
from espalier.solver import BudgetError


@dataclass(frozen=True)
class MGP(FadingMethod):
    """Hyper-parameters of multi-granularity pruning; every duration is a fraction of the whole run.

    Source: Liu Qi, Chen Ying, Multi-granularity pruning with a regularisation mechanism, Acta Electronica Sinica 51(8), 2023.
    The module's docstring has the steps, and what of them is our reading.
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
    stagger: Annotated[Portion, described("how much later than the coarser one each finer granularity begins")] = 0.03

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_pace()
        if not (self.filters or self.inputs or self.shapes):
            raise ValueError("MGP(): all granularities are off; switch on filters, inputs or shapes")
        if self.streams and not self.filters:
            raise ValueError("MGP(streams=True, filters=False): streams go as filters do; switch filters on")

    def start(self, model: nn.Module, example: Any, budget: Budget, *, batches: Batches | None = None) -> MGPRun:
        return MGPRun(model, example, budget, self)


class MGPRun(Fading):
    """One run of MGP: ``step``, pressure and strength are those of ``Fading``."""

    method: MGP
    remembers: ClassVar[tuple[str, ...]] = ("kernels",)

    def __init__(self, model: nn.Module, example: Any, budget: Budget, method: MGP) -> None:
        super().__init__(model, example, budget, method)
        self.graph, options, self.skipped = granularities(model, self.graph, method, *find_places(model, example))
        self._offer(Kernels(options), blocks=takes_blocks(method.blocks, budget, self.graph))
        self._begin()

    def _offer(self, kernels: Kernels, *, blocks: bool) -> None:
        """Let ``kernels``, which ``graph`` has as alternatives, compete for the budget, and ``blocks`` too."""
        self.kernels = kernels
        if blocks:
            self.offer_blocks()
        self.know_forms()
        try:
            self.decide({g.name: np.ones(g.size) for g in self.graph.groups})  # unreachable budgets fail now
        except BudgetError as error:
            raise unreachable(error, self.skipped) from error

    def put(self, model: nn.Module, options: Mapping[str, int]) -> None:
        for layer, places in self.kernels.options.items():
            taken = options.get(alternatives_name(layer), len(places)) - 1
            if taken < len(places) - 1:
                cut_kernel(model, layer, self.kernels.place(layer, taken))

    def _units(self) -> Units:
        return Units(self.model, self.graph, taps=self.kernels.spatial)

    def _outside_of(self, plan: Plan) -> np.ndarray:
        return self.units.outside(plan.keep, self.kernels.stays)

    # -- 2. importance, and 3. coarse to fine --------------------------------------------------------------------------

    def keep_set(self, limits: Mapping[str, float], progress: float) -> Plan:
        """What stays inside ``limits`` of the granularities that take part by now; finer ones come early if it needs them."""
        values = self.score.value.double().cpu().numpy()
        taps = {n: values[rows] for n, rows in self.units.taps.items()}
        triplets = {n: values[rows] for n, rows in self.units.triplets.items()}
        scores = {**self.units.split(values), **self.kernels.scores(taps, triplets)}
        for some in self.coarse_to_fine(scores, progress):
            with suppress(BudgetError):
                plan = self.decide(some, limits)
                break
        else:
            plan = self.decide(scores, limits, measured=bool(scores))
        plan = self._reviewed(plan)
        self.kernels.choose(plan.keep)
        self.record("kernel", self.kernels.areas, progress=progress)
        self._chosen(progress)
        return plan

    def _reviewed(self, plan: Plan) -> Plan:
        """``plan``, or one that is no dearer and better."""
        return plan

    def _chosen(self, progress: float) -> None:
        """``kernels`` has what the keep-set of ``progress`` leaves of every layer."""
        return

    def coarse_to_fine(self, scores: Mapping[str, np.ndarray], progress: float) -> Iterator[Mapping[str, np.ndarray]]:
        """Scores of the granularities that take part by now, then of finer ones too, for budgets that need them; never all."""
        of = {n: granularity(self.graph.group(n)) for n in scores}
        kinds = [k for k in GRANULARITIES if k in of.values()]
        for number in range(self._open(len(kinds), progress), len(kinds)):
            yield {n: s for n, s in scores.items() if of[n] in kinds[:number]}

    def _open(self, kinds: int, progress: float) -> int:
        """How many of ``kinds`` granularities take part at ``progress``; one at least."""
        if progress >= self.method.closed_at:
            return max(kinds, 1)
        begun = int((progress - self.method.start_at) / max(self.method.stagger, 1e-9))
        return max(min(kinds, 1 + begun), 1)

    # -- 4. adaptive L1 ------------------------------------------------------------------------------------------------

    def _adapt_to(self, plan: Plan, outside: np.ndarray) -> None:
        """How fast each group fades: by the cost that goes with it and by how much of what is left has to go."""
        graph = self.graph
        state = CostModel(graph).at(graph.sizes)
        group = self.units.group_of()
        left = self.units.sizes.clip(min=1)
        going = np.bincount(group[outside], minlength=self.units.groups)
        share = np.zeros(self.units.groups)
        place = {name: len(graph.groups) + i for i, name in enumerate(self.units.taps)}
        for number, g in enumerate(graph.groups):
            less = len(plan.keep[g.name]) - g.size if g.name in plan.keep else -int(going[number])
            if less:
                saved = sum(-state.change(m, number, less) / max(getattr(self.dense, m), 1) for m in ("macs", "params"))
                share[place.get(g.layer, number) if g.options else number] = max(saved, 0.0)
        pace = np.sqrt(share) * (1.0 + going / left)
        busy = pace > 0
        mean = pace[busy].mean() if busy.any() else 1.0
        pace = np.where(busy, pace / mean, 1.0).clip(SLOWEST, FASTEST)
        self.pull = upload(pace[group].astype(np.float32), self.units.device)

    # -- 5. removal ----------------------------------------------------------------------------------------------------

    def _ready(self) -> tuple[np.ndarray, bool]:
        ready = self._faded()
        for rows in self.units.taps.values() if not self.settled else ():
            ready[rows] = False
        return ready, bool((ready == self._outside).all())

    def _stay(self, ready: np.ndarray) -> dict[str, np.ndarray]:
        cut = [n for n, rows in self.units.taps.items() if ready[rows].any()]
        return {**super()._stay(ready), **self.kernels.going(cut)}

    def _survivors(self, stay: Mapping[str, np.ndarray]) -> np.ndarray:
        gone = {n for some in self._kernels(stay) for n in some}
        taps = [np.arange(rows.start, rows.stop) for n, rows in self.units.taps.items() if n not in gone]
        return np.concatenate([super()._survivors(stay), *taps])

    def _kernels(self, stay: Mapping[str, np.ndarray]) -> tuple[list[str], list[str]]:
        """Layers whose kernels are cut, and those that are gone with their block."""
        absent = self.graph.absent(stay)
        gone = [n for n in self.kernels.options if any(b.holds(n) for b in absent)]
        less = [n for n, all_ in self.kernels.options.items() if len(stay[alternatives_name(n)]) < len(all_)]
        return [n for n in less if n not in gone], gone

    def _cut(self, stay: Mapping[str, np.ndarray], optimizer: torch.optim.Optimizer | None) -> Removed:
        cut, gone = self._kernels(stay)
        trimmed = self.kernels.cut(self.model, cut, optimizer=optimizer)
        removed = super()._cut(stay, optimizer)
        for tensor, by_dim in trimmed.items():
            removed.kept.setdefault(tensor, {}).update(by_dim)
        self.kernels.forget([*cut, *gone])
        return removed


# -- 1. granularities --------------------------------------------------------------------------------------------------

FILTERS, SHAPES = "filters", "shapes"
GRANULARITIES = (FILTERS, INPUTS, SHAPES)
SLOWEST, FASTEST = 0.5, 2.0  # pace of a group, relative to the mean
FEWEST_INPUTS = 8  # an image has too few channels to select among


def granularity(group: Group) -> str:
    """Residual blocks take part from the beginning, as filters do."""
    return {INPUTS: INPUTS, FORM: SHAPES}.get(group.kind, FILTERS)


def granularities(
    model: nn.Module, graph: Graph, method: MGP, places: Mapping[str, Place], left: Mapping[str, str]
) -> tuple[Graph, dict[str, list[list[Rectangle]]], dict[str, str]]:
    """The graph with everything that ``method`` may prune, the options of every kernel, and layer -> why it stays as it is.

    ``places`` and ``left`` are those of ``find_places``.
    """
    layers = dict(model.named_modules())  # weights of no layer are among ``left`` too
    left = {n: r for n, r in left.items() if not isinstance(layers.get(n), nn.Linear)}
    left.update({n: WEIGHT_FROZEN for n, p in places.items() if not p.linear and is_frozen(model, n)})
    if not method.filters:
        graph = hold(graph, [g.name for g in graph.groups], "filters are switched off")
    elif not method.streams:
        graph = hold(graph, streams(graph), "made by several layers, whose widths must match")
    convolutions = {n: p for n, p in places.items() if not p.linear and len(p.kernel) == 2 and n not in left}
    if method.inputs:
        wide = [n for n, p in convolutions.items() if p.in_channels >= FEWEST_INPUTS]
        graph = with_inputs(graph, {n: _bytes(places[n]) for n in selectable(graph, wide)})
    options: dict[str, list[list[Rectangle]]] = {}
    for name, place in convolutions.items() if method.shapes else ():
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
        weights = {s.tensor for s in group.producers if s.dim == 0 and _is_weight(graph, s.tensor)}
        makers = {name.rpartition(".")[0] for name in weights - graph.group_width.keys()}
        if len(makers - graph.group_width.keys()) > 1:
            found.append(group.name)
    return found


def _is_weight(graph: Graph, tensor: str) -> bool:
    return len(graph.shapes.get(tensor, ())) > 1


def _bytes(place: Place) -> int:
    return place.positions * place.input_size[0] * place.input_size[1] * place.itemsize
