"""TT-LC: TT-Tucker forms inside learning-compression, with ranks chosen twice by Bayes, from random weights on.

Liu Weirong et al., Journal of South China University of Technology 52(7), 2024.  The paper fixes the idea: no pre-training, the
learning-compression framework with an exponential cyclical learning rate in the L steps, TT-Tucker in the C steps, ranks
from EVBMF and Bayesian optimisation together.  What follows is our reading, in the paper's order:

1. L steps (``methods/lc``): train on the loss plus ``mu/2 |w - D(theta) - lam/mu|^2``, the rate falling exponentially in each
   and starting at ``decay`` of the last one's;
2. ranks: EVBMF of the two channel unfoldings proposes ``(R_i, R_o)`` for every layer, floored because it collapses on some;
3. forms: the proposal, scaled up and down, makes the alternatives of a layer - channel and spatial SVD, Tucker-2, TT-Tucker,
   dense - on the front of error against cost; energy beyond the proposal counts less.  The solver takes the options that
   lose least inside the exact budget (the front takes the place of merging stages that do not pay);
4. Bayesian optimisation of how much the error of each stage of the network weighs, and of the TT rank as a fraction of its full
   rank.  Every candidate is at the budget by construction and is scored by its loss on held-out training images, with
   BatchNorm estimated anew; never on test images;
5. C steps: HOSVD and a few HOOI sweeps from the bases of the last one, multipliers, a larger ``mu``; in the last L step
   ``arrive`` more take what is left of the distance in equal parts: a pull alone approaches the constraint and never meets it;
6. after the last one ``D(theta)`` takes the place of ``w``, as plain convolutions, and the rest of the run trains ``theta``,
   with ``frobenius`` under the weight decay of their product (``methods/decay``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from espalier.copies import device_of
from espalier.costs import LATENCY
from espalier.forms import FORMS, Place, Wish, blank, cost_of, dense_sequence, sequential
from espalier.forms.candidates import Factors, compose, factorise, full_rank, options_at, ranks_of, scaled
from espalier.forms.form import shape_of
from espalier.forms.spectra import Spectra, spectra_of
from espalier.forms.table import possible
from espalier.forms.transfer import moved
from espalier.graph import ConvSequence, with_alternatives
from espalier.graph.alternatives import alternatives_name
from espalier.graph.times import Staircase
from espalier.methods.agreement import check_run, check_same, once
from espalier.methods.base import NO_BUDGET, Batches, Method, Removed, Run, Status
from espalier.methods.decay import decay_products
from espalier.methods.equal import equal_sequences
from espalier.methods.formed import check_reachable, places_for
from espalier.methods.lc import LearningCompression
from espalier.methods.scoring import loss_with
from espalier.methods.search import JOURNAL, Point, Trials, curves, minimise, name_of
from espalier.plan import Budget
from espalier.settings import Fraction, OneOf, Portion, Positive, described
from espalier.surgery import put_layer
from espalier.timing.profile import Profile

RANKS = ("evbmf", "energy", "equal")


@dataclass(frozen=True)
class TTLC(Method):
    """Hyper-parameters of TT-LC; durations are shares of the whole run.

    Source: Liu Weirong et al., Journal of South China University of Technology 52(7), 2024.  The module's docstring has the
    steps, and what of them is our reading.
    """

    name: ClassVar[str] = "tt-lc"
    trains: ClassVar[bool] = True
    iterations: Annotated[int, described("C steps, at equal distances", ge=2)] = 12
    share: Annotated[
        float, described("of the run in which they lie; the rest trains the small network", gt=0, lt=1)
    ] = 0.65
    select: Annotated[
        Fraction, described("share of the C steps in which ranks are chosen anew, by search in the last")
    ] = 0.5
    search: Annotated[int, described("trials; 0: EVBMF and the solver alone", ge=0)] = 16
    held_out: Annotated[int, described("training images that trials are scored on", ge=0)] = 1000
    lc: Annotated[bool, described("false: plain training, one decomposition at share, fine-tuning; the baseline")] = (
        True
    )
    penalty_exponent: Annotated[
        Positive,
        described(
            "how far the penalty alone moves weights in the first L step that has one, as an exponent; 1: all but 1/e"
        ),
    ] = 0.1
    growth: Annotated[float, described("of penalty_exponent, from one L step to the next", ge=1)] = 1.2
    arrive: Annotated[
        int, described("C steps within the last L step that take equal parts of what is left of the distance", ge=0)
    ] = 0
    cycle: Annotated[Fraction, described("learning rate at the end of an L step, relative to its start")] = 0.3
    decay: Annotated[Fraction, described("learning rate at the start of an L step, relative to the last one's")] = 1.0
    finetune_lr: Annotated[
        Fraction,
        described("peak of the rate after the last C step, relative to where the next L step would have started"),
    ] = 0.5
    finetune_warmup: Annotated[Portion, described("share of what is left in which the rate rises to that")] = 0.15
    frobenius: Annotated[bool, described("after the cut the product of a layer's factors decays, not each of them")] = (
        False
    )
    forms: Annotated[tuple[str, ...], described("what a layer may become")] = tuple(FORMS)
    ranks: Annotated[
        str,
        OneOf(RANKS),
        described("evbmf proposes; energy: all of it counts the same; equal: one form and fraction in all layers"),
    ] = "evbmf"
    floor: Annotated[Fraction, described("least share of the full rank that a proposal may have")] = 0.1
    noise_weight: Annotated[Fraction, described("what energy beyond the proposal, which EVBMF calls noise, counts")] = (
        0.5
    )
    tt_fraction: Annotated[Fraction, described("TT rank as a share of the full one, where no search sets it")] = 0.5
    sweeps: Annotated[int, described("of HOOI in a C step", ge=0)] = 3
    seed: Annotated[int, described("of the search", ge=0)] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.forms or not set(self.forms) <= set(FORMS):
            raise ValueError(f"TTLC(forms={self.forms!r}): give one or more of {', '.join(FORMS)}")

    @property
    def withholds(self) -> int:
        return self.held_out if self.trials else 0

    @property
    def trials(self) -> int:
        """Of the search."""
        return 0 if self.ranks == "equal" else self.search

    @property
    def c_steps(self) -> int:
        """In the whole run."""
        return self.iterations if self.lc else 1

    def start(self, model: nn.Module, example: Any, budget: Budget, *, batches: Batches | None = None) -> TTLCRun:
        """``batches`` estimate BatchNorm for the search, which scores on ``held_out`` of the run, or else on them too.

        Without either, as in a loop of one's own, nothing is searched.
        """
        return TTLCRun(model, example, budget, self, batches)


class TTLCRun(Run):
    """One run of TT-LC."""

    def __init__(self, model: nn.Module, example: Any, budget: Budget, method: TTLC, batches: Batches | None) -> None:
        through = _is_through(model, budget)
        super().__init__(model, example, NO_BUDGET if through else budget)
        self.budget = budget
        if budget.activation_memory is not None:
            raise ValueError(
                "TT-LC: activation_memory cannot be its budget, because a factorised layer holds more activations than a "
                "dense one; give macs, params or both"
            )
        if method.ranks == "equal" and budget.latency is not None:
            raise ValueError(
                "TTLC(ranks='equal'): counts MACs and parameters alone; under a budget of time give ranks='evbmf' or 'energy'"
            )
        self.method = method
        self.batches = batches
        self.bake()
        self.places, self.skipped = places_for(model, example, self.graph, budget, method.forms)
        self.stages = {n: "linear" if p.linear else "x".join(map(str, p.output_size)) for n, p in self.places.items()}
        self.lc = LearningCompression(
            {n: model.get_submodule(n).weight for n in self.places},  # type: ignore[misc]
            mu=method.penalty_exponent,
            growth=method.growth,
        )
        self.sequences: dict[str, ConvSequence] = {}  # form of every layer that does not stay dense
        self.factors: dict[str, Factors] = {}  # theta, on the CPU
        self.collapsed: dict[str, tuple[int, int]] = {}  # layer -> what EVBMF said where the floor took its place
        self.trials: Trials = []
        self.point: Point = {}  # what the search has chosen
        self.replaced = False
        self.forced = False  # the run was over before the last C step
        self._at = 0.0  # progress of the last C step
        self._arrived = 0  # of the C steps within the last L step
        self._travel = 0.0  # sum of the learning rates since then, over what momentum leaves of each
        self._decayed = 0  # steps whose decay is that of factors still
        # forms that layers may have: those that are measured, and then those that the last choice was among
        self.offered: dict[str, list[ConvSequence]] = {}
        self._times: dict[tuple[str, str], Staircase] = {}  # of every stage of every form, where time is limited
        if LATENCY in self.limits and not through:
            self._learn_times()
        self._check_reachable()
        if LATENCY in self.limits and not through:  # what is out of reach by the clock fails now
            self._choose(spectra_of(self.lc.plain()), {}, measured=True)

    def _learn_times(self) -> None:
        """Time is a cost like others once it is known of every form at every rank: each is measured whole, and narrower."""
        wish, plain = self._wish((1, 1), 1.0), self.graph
        self.offered = {
            n: [*(scaled(p, form, 1.0, wish) for form in possible(shape_of(p), self.method.forms)), dense_sequence(p)]
            for n, p in self.places.items()
        }
        self.graph = with_alternatives(plain, self.offered)
        self.know_forms()
        self._times = {(s.module, s.form): s.time for s in self.graph.sites if s.time is not None}
        self.graph = self.budget.timed(plain)

    def put(self, model: nn.Module, options: Mapping[str, int]) -> None:
        for name, row in self.offered.items():
            form = row[options.get(alternatives_name(name), len(row)) - 1]
            if form.widths:
                put_layer(model, name, blank(self.places[name], form, model.get_submodule(name)))

    def _wish(self, ranks: tuple[int, int], tt_fraction: float) -> Wish:
        """Ranks are also multiples of what the runtime likes, where time is limited."""
        grain = self.graph.grain if LATENCY in self.limits else 1
        return Wish(ranks, tt_fraction, math.lcm(self.budget.multiple_of, grain))

    def _price(self, place: Place, form: ConvSequence) -> tuple[float, ...]:
        """What is limited decides which forms are cheaper: MACs and weights, or milliseconds, or all of them."""
        if LATENCY not in self.limits:
            return cost_of(place, form)
        ends = [place.in_channels, *form.widths, place.out_channels]
        alone = form.depthwise or (False,) * len(form.macs)
        took = 0.0
        for number, (inputs, outputs) in enumerate(itertools.pairwise(ends)):
            stage = (f"{place.name}.{number}", form.name) if form.widths else (place.name, "")
            took += float(self._times[stage].at((outputs,) if alone[number] else (outputs, inputs)))
        return (took,) if len(self.limits) == 1 else (*cost_of(place, form), took)

    def _check_reachable(self) -> None:
        """A budget that cannot be met fails now, not in the middle of the run; a model within it already is fine."""
        if all(getattr(self.cost, m) <= limit for m, limit in self.limits.items()):
            return
        method = self.method
        check_reachable(
            self.graph,
            self.places,
            self.limits,
            self.budget,
            [(f,) for f in method.forms] if method.ranks == "equal" else [method.forms],
            wish=self._wish((1, 1), max(method.tt_fraction, TT_RANGE[0]) if method.trials else method.tt_fraction),
            skipped=self.skipped,
            price=self._price,
        )

    # -- 1. L steps ----------------------------------------------------------------------------------------------------

    def penalty(self) -> Tensor | float:
        return 0.0 if self.replaced else self.lc.penalty()

    def schedule(self, progress: float) -> float:
        """Exponential and cyclical in the L steps, then a cosine from where the next one would have started."""
        method = self.method
        if self.replaced:
            left = min((progress - self._at) / max(1.0 - self._at, 1e-9), 1.0)
            peak = method.finetune_lr * method.decay**self.lc.iterations
            risen = min(1.0, left / method.finetune_warmup) if method.finetune_warmup else 1.0
            return risen * peak * 0.5 * (1.0 + math.cos(math.pi * left))
        inside = min(max(progress - self._at, 0.0) / max(self._due() - self._at, 1e-9), 1.0)
        warm = min(1.0, (inside + WARM_UP / 10) / WARM_UP) if self.lc.iterations == 0 else 1.0
        return warm * method.decay**self.lc.iterations * method.cycle**inside

    def _due(self) -> float:
        """Progress at which the next C step is due."""
        return self.method.share * (self.lc.iterations + 1) / self.method.c_steps

    def _next_approach(self) -> float:
        """Progress at which the weights are next to come nearer by force; infinite where they are not."""
        method = self.method
        if self.lc.iterations < max(method.c_steps - 1, 1) or self._arrived >= method.arrive:
            return math.inf
        return self._at + (self._due() - self._at) * (self._arrived + 1) / (method.arrive + 1)

    def step(self, *, progress: float, optimizer: torch.optim.Optimizer) -> Removed | None:
        self.check_step(progress, optimizer)
        group = optimizer.param_groups[0]
        self._travel += group["lr"] / (1.0 - group.get("momentum", 0.0))
        while not self.replaced and progress < self._due() - 1e-9 and progress >= self._next_approach() - 1e-9:
            self._approach(progress)
        while not self.replaced and progress >= self._due() - 1e-9:
            wanted, sequences = self.lc.wanted(), self.sequences
            choosing = self._spectra(wanted)
            if choosing is not None:
                sequences = self._choose(choosing, self.point, measured=self.lc.iterations == self._last_choice)
            self._c_step(progress, wanted, sequences, fresh=choosing is not None)
            if self.lc.iterations == self.method.c_steps:
                removed = self._replace(progress, optimizer)
                check_run(self)
                return removed
        self._decayed += self.replaced and self.method.frobenius
        if self._decayed == DECAY_EVERY:
            decay_products(map(self.model.get_submodule, self.sequences), optimizer, steps=DECAY_EVERY)
            self._decayed = 0
        return None

    # -- 2. and 3. ranks and forms -------------------------------------------------------------------------------------

    def proposal(self, name: str, spectra: Spectra) -> tuple[int, int]:
        """``(R_i, R_o)`` of one layer."""
        place = self.places[name]
        whole = (place.in_channels, place.out_channels)
        if self.method.ranks == "energy":
            return whole
        found = spectra.evbmf()
        floored = tuple(max(r, math.ceil(self.method.floor * n)) for r, n in zip(found, whole, strict=True))
        if floored != found:
            self.collapsed[name] = found
        return floored[0], floored[1]

    def _choose(
        self, spectra: Mapping[str, Spectra], point: Mapping[str, float], *, measured: bool = False
    ) -> dict[str, ConvSequence]:
        """The forms that keep most inside the budget; of time by the clock if ``measured``.  ``BudgetError`` if none do."""
        if self.method.ranks == "equal":
            return equal_sequences(
                self.graph, self.places, spectra, self.limits, forms=self.method.forms,
                tt_fraction=self.method.tt_fraction, multiple_of=self.budget.multiple_of,
            )  # fmt: skip
        alternatives: dict[str, list[ConvSequence]] = {}
        worth: dict[str, np.ndarray] = {}
        for name, place in self.places.items():
            ranks = self.proposal(name, spectra[name])
            wish = self._wish(ranks, point.get("tt", self.method.tt_fraction))
            options, lost = options_at(place, spectra[name], wish, forms=self.method.forms, price=self._price)
            if len(options) == 1:
                continue
            held = self._worth(1.0 - lost, spectra[name], ranks)
            alternatives[name] = options
            worth[alternatives_name(name)] = 2.0 ** point.get(self.stages[name], 0.0) * np.diff(held, prepend=0.0)
        self.offered = alternatives
        graph = self.budget.timed(with_alternatives(self.graph, alternatives))
        plan = self.decide(worth, graph=graph, measured=measured)
        taken = {n: options[len(plan.keep[alternatives_name(n)]) - 1] for n, options in alternatives.items()}
        return {n: c for n, c in taken.items() if c.widths}

    def _worth(self, held: np.ndarray, spectra: Spectra, ranks: tuple[int, int]) -> np.ndarray:
        """Shares of a layer's energy; what EVBMF calls noise counts less."""
        if self.method.ranks == "energy":
            signal = 1.0
        elif spectra.core is not None:
            signal = float(spectra.tucker[ranks])
        else:
            signal = float(spectra.channel[min(max(ranks), len(spectra.channel) - 1)])
        worth: np.ndarray = np.minimum(held, signal) + self.method.noise_weight * np.maximum(held - signal, 0.0)
        return np.maximum.accumulate(worth)

    # -- 4. search -----------------------------------------------------------------------------------------------------

    def search(self, wanted: Mapping[str, Tensor], spectra: Mapping[str, Spectra]) -> Point:
        """The best point of ``method.search`` trials on what the weights are now; nothing of the model changes."""
        if not self.method.trials or self.batches is None:
            return {}
        method, stages = self.method, list(dict.fromkeys(self.stages.values()))
        ranges = {**dict.fromkeys(stages, (-SPAN, SPAN)), "tt": TT_RANGE}
        neutral = {**dict.fromkeys(stages, 0.0), "tt": min(max(method.tt_fraction, TT_RANGE[0]), TT_RANGE[1])}
        fits: dict[tuple[str, ConvSequence], Factors] = {}  # of the trials so far: many ask for the same

        def score(point: Point) -> float:
            return self._loss_with(self._fit(wanted, self._choose(spectra, point), sweeps=0, known=fits))

        # The limits, not the budget: a resumed run has it in absolute numbers.
        asked = (method, self.limits, self.budget.multiple_of, list(self.places), ranges)
        if self.budget.profile is not None:  # by whose predictions trials choose
            asked = (*asked, self.budget.profile)  # type: ignore[assignment]
        same = name_of(asked, (*wanted.values(), *self.model.state_dict().values()))

        def found() -> tuple[Point, Trials]:
            best = minimise(
                score, ranges, first=neutral, count=method.trials, seed=method.seed * 1000, trials=self.trials,
                journal=None if self.folder is None else self.folder / JOURNAL,
                name=f"C step {self.lc.iterations + 1}, {same}",
            )  # fmt: skip
            return best, self.trials

        best, self.trials = once(found)
        self._record_search()
        return best

    def _record_search(self) -> None:
        self.history |= curves(self.trials)

    def _loss_with(self, factors: Mapping[str, Factors]) -> float:
        """Loss of the model if its layers were ``factors``, BatchNorm estimated anew."""
        assert self.batches is not None
        images = self.batches if self.held_out is None else self.held_out
        return loss_with(
            self.model, {n: compose(f) for n, f in factors.items()}, images, batches=self.batches, n=CALIBRATION
        )

    # -- 5. C steps ----------------------------------------------------------------------------------------------------

    @property
    def _last_choice(self) -> int:
        """The C step that chooses for good."""
        return max(1, round(self.method.select * self.method.c_steps)) - 1

    @torch.no_grad()
    def _spectra(self, wanted: Mapping[str, Tensor]) -> dict[str, Spectra] | None:
        """What a C step chooses by, of ``wanted``; ``None`` once all is chosen.  The last one that chooses searches first."""
        if self.lc.iterations > self._last_choice:
            return None
        spectra = spectra_of(wanted)
        self.collapsed = {}
        if self.lc.iterations == self._last_choice:
            self.point = self.search(wanted, spectra)
        return spectra

    @torch.no_grad()
    def _c_step(
        self, progress: float, wanted: Mapping[str, Tensor], sequences: dict[str, ConvSequence], *, fresh: bool
    ) -> None:
        """The closest to ``wanted`` that ``sequences`` can have, which are ``fresh`` while C steps choose."""
        number = self.lc.iterations
        factors = self._fit(wanted, sequences, sweeps=self.method.sweeps)
        mu, theta = self.lc.mu if number else 0.0, {n: compose(f) for n, f in factors.items()}
        gap = self.lc.c_step(theta, fresh=fresh, mu=self._next_mu(number))
        self.sequences, self.factors, self._at = sequences, factors, progress
        check_same("what the layers are compressed to", repr((sorted(sequences.items()), gap)))
        self.record("gap", {"all": gap}, progress=progress)
        self.record("mu", {"all": mu}, progress=progress)
        self._record_forms(progress)

    @torch.no_grad()
    def _approach(self, progress: float) -> None:
        """One of ``arrive`` steps; of the distance there was, ``1 / (arrive + 1)`` is left after all of them."""
        parts = self.method.arrive + 1 - self._arrived  # of the distance, still to go
        self.factors = self._fit(self.lc.plain(), self.sequences, sweeps=self.method.sweeps)
        gap = self.lc.approach({n: compose(f) for n, f in self.factors.items()}, left=(parts - 1) / parts)
        self._arrived += 1
        self.record("gap", {"all": gap}, progress=progress)

    def _next_mu(self, number: int) -> float:
        """Of the L step that follows C step ``number``, which will move as far as the last one did.

        A gradient step of rate ``r`` on the penalty leaves ``1 - r mu`` of the distance, so ``mu`` times the sum of the rates
        is the exponent.  A fixed ``mu`` means another thing in a run of another length: one that suited a short run held the
        weights of a long one, from random ones on, to the ranks of its second epoch.
        """
        exponent = self.method.penalty_exponent * self.method.growth**number
        travel, self._travel = self._travel, 0.0
        return exponent / travel if travel > 0 else self.lc.mu

    def _fit(
        self,
        wanted: Mapping[str, Tensor],
        sequences: Mapping[str, ConvSequence],
        *,
        sweeps: int,
        known: dict[tuple[str, ConvSequence], Factors] | None = None,
    ) -> dict[str, Factors]:
        """On the device of ``wanted``.  ``known``: earlier fits of the same weights, to which new ones are added."""
        known = {} if known is None else known
        for name, form in sequences.items():
            if (name, form) not in known:
                old = self.factors.get(name)
                start = old.bases if old is not None and old.form == form.name else None
                known[name, form] = factorise(
                    wanted[name], form.name, ranks_of(self.places[name], form), sweeps=sweeps, start=start
                )
        return {name: known[name, form] for name, form in sequences.items()}

    def _record_forms(self, progress: float) -> None:
        for name, place in self.places.items():
            form = self.sequences.get(name)
            whole = min(place.in_channels, place.out_channels) if form is None else full_rank(place, form.name)
            ranks = form.widths if form is not None else (whole,)
            self.record("rank", {name: float(min(ranks))}, progress=progress)
            self.record("full rank", {name: float(whole)}, progress=progress)
            dense = cost_of(place, dense_sequence(place))[0]
            share = 1.0 if form is None else cost_of(place, form)[0] / dense
            self.record("MACs of the layer", {name: share}, progress=progress)
        # what EVBMF said where the floor took its place
        self.record(
            "rank below the floor", {n: float(min(found)) for n, found in self.collapsed.items()}, progress=progress
        )

    # -- 6. replacement ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _replace(self, progress: float, optimizer: torch.optim.Optimizer | None) -> Removed:
        """``D(theta)`` in place of ``w``, fitted once more to the weights themselves."""
        final = self._fit(self.lc.plain(), self.sequences, sweeps=FINAL_SWEEPS)
        parts = {(n, i): w for n, layer in final.items() for i, w in enumerate(layer.weights)}
        parts = moved(parts, device_of(self.model))
        for name, layer in final.items():
            old = self.model.get_submodule(name)
            weights = [parts[name, i] for i in range(len(layer.weights))]
            row = sequential(self.places[name], layer.form, weights, old.bias)  # type: ignore[arg-type]
            if _is_channels_last(old.weight):  # type: ignore[arg-type]
                row.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            put_layer(self.model, name, row, optimizer=optimizer)
        self.lc.release()
        self.replaced, self._at = True, progress
        self.factors = {}
        alternatives = {n: [self.sequences[n], dense_sequence(self.places[n])] for n in final}
        self.graph = self.budget.timed(with_alternatives(self.graph, alternatives))
        self.taken = {alternatives_name(n): 1 for n in alternatives}
        self.options_stay()
        return Removed({}, self.cost)

    def finish(self) -> nn.Module:
        """The small model.  If training stopped before the last C step, the weights are compressed here; ``forced`` is true."""
        if not self.replaced:
            self.forced = True
            if not self.sequences and any(getattr(self.cost, m) > limit for m, limit in self.limits.items()):
                self.sequences = self._choose(spectra_of(self.lc.plain()), self.point, measured=True)
            self._replace(1.0, None)
        return self.model

    @property
    def status(self) -> Status:
        return Status(self.cost, 0.0 if self.replaced else self.lc.mu, 0.0 if self.replaced else self.lc.gap)

    # -- resume --------------------------------------------------------------------------------------------------------

    remembers = (
        "replaced", "forced", "_at", "_arrived", "_travel", "_decayed", "sequences", "factors", "collapsed", "trials",
        "point", "lc",
    )  # fmt: skip


def _is_through(model: nn.Module, budget: Budget) -> bool:
    """Whether layers of ``model`` have the forms already whose times a run has measured: one that goes on after its cut."""
    profile = budget.profile
    forms = profile.forms if isinstance(profile, Profile) else ()
    there = {n for n, _ in model.named_modules()}
    return any(x.form and x.module in there for part in forms for x in part.layers)


def _is_channels_last(weight: Tensor) -> bool:
    """And not contiguous as well, as a 1x1 kernel is."""
    return weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


WARM_UP = 0.1  # share of the first L step in which the rate rises
SPAN = 2.0  # the error of a stage weighs between 2**-SPAN and 2**SPAN times what it does by itself
TT_RANGE = (0.2, 1.0)
CALIBRATION = 8  # batches that estimate BatchNorm for one candidate
FINAL_SWEEPS = 10
DECAY_EVERY = 4  # steps: the gradient of a product costs a fraction of a step
