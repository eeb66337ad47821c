"""DPRP, dynamic parameter rank pruning: layers are trained as their SVD, and their ranks fall while the network trains.

Sharma, Heard, Saber, Markopoulos: "Dynamic Parameter Rank Pruning", IEEE Access 13, 2025, arXiv 2401.08014.  The paper fixes
the idea: the factors of every layer's singular value decomposition are trained end to end, regularisers keep them orthonormal
and their values sparse, ranks are pruned during training, with no rank preset and no adjustment afterwards.  What follows is
our reading, in the paper's order:

1. every convolution and linear layer becomes ``M = U diag(s) V^T`` at full rank (``forms.LowRank``): the same function; as
   long as its rank has not fallen its factors are trained as their product, which takes the steps of dense training;
2. penalty ``orthogonality * sum_l (|U^T U - I|^2 + |V^T V - I|^2) / r_l^2 + sparsity * sum_l (sum |s|)^2 / sum s^2``,
   with at least 16 for ``r_l``: of the smallest ranks the pull would be too strong for usual learning rates;
3. rank events, from ``start_at`` to ``end_at`` every ``every``: drop what has faded; re-orthonormalise exactly, with the
   optimiser's state (``surgery.change_bases``), as every ``TURN_EVERY`` steps until the end; decide the next ranks;
4. which ranks: at most a share of ``energy`` is given up over the whole run, or the most important triplets inside the
   budget, by the shared ``solver``, or both.  The cost falls from the full one to the target, fast at first (``power``).  With
   ``once`` the final ranks are found at the first event, on whole layers, and approached from there; otherwise every event
   decides anew on what the last one left;
5. until the next event the values outside the new ranks fade to zero in a straight line, so that dropping them changes nothing;
6. at the end every layer is the cheaper of dense and factorised, as plain layers.

Fading (5) is ours; the paper's threshold is the limit of no time to fade.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from espalier.carving import Kept
from espalier.costs import cost
from espalier.forms import LowRank
from espalier.forms.lowrank import BasisChange
from espalier.forms.transfer import moved
from espalier.graph import trace
from espalier.graph.alternatives import alternatives_name
from espalier.methods.agreement import check_run
from espalier.methods.base import Batches, Removed, Status
from espalier.methods.importance import TAYLOR, Sensitivity
from espalier.methods.pace import Closing, ClosingMethod
from espalier.methods.ranks import LAYOUTS, Triplets, dense_twin, energy, rank_alternatives, tails
from espalier.plan import Budget, Plan
from espalier.settings import Fraction, OneOf, Portion, described
from espalier.surgery import change_bases, cut_ranks, decompositions, put_layer, split_layers

TRIPLET_SCORES = ("energy", TAYLOR, "whole")


@dataclass(frozen=True)
class DPRP(ClosingMethod):
    """Hyper-parameters of dynamic rank pruning; every duration is a fraction of the whole run.

    Source: Sharma, Heard, Saber, Markopoulos, Dynamic Parameter Rank Pruning, IEEE Access 13, 2025, arXiv 2401.08014.
    The module's docstring has the steps, and what of them is our reading.
    """

    name: ClassVar[str] = "dprp"
    trains: ClassVar[bool] = True
    energy: Annotated[
        float | None,
        described("find ranks without a budget, giving up at most this share of every layer's energy", gt=0, lt=1),
    ] = None
    form: Annotated[str, OneOf(LAYOUTS), described("of the factors; auto is the faster one of every layer")] = "auto"
    importance: Annotated[
        str,
        OneOf(TRIPLET_SCORES),
        described(
            "of a triplet: its share of the layer's energy; whole, the same while the layer was whole, whatever it has lost "
            "since; or taylor, the squared first-order change of the loss"
        ),
    ] = "taylor"
    once: Annotated[
        bool,
        described("find the final ranks at the first event and walk there; later only whole layers are aimed anew"),
    ] = False
    share_exponent: Annotated[
        Fraction,
        described("with once: a rank that holds a share h of its layer is worth h ** share_exponent; 1 is additive"),
    ] = 0.5
    floor: Annotated[
        float,
        described("with once: no rank falls below that share of what equal fractions in all layers leave", ge=0, le=1),
    ] = 0.5
    start_at: Annotated[Portion, described("when ranks begin to fall")] = 0.1
    end_at: Annotated[Portion, described("when ranks have fallen")] = 0.6
    every: Annotated[float, described("time between two rank events", gt=0, lt=1)] = 0.02
    orthogonality: Annotated[float, described("weight of the pull to orthonormal factors", ge=0)] = 1.0
    sparsity: Annotated[float, described("weight of the penalty on singular values", ge=0)] = 1e-4
    smoothing: Annotated[Portion, described("of the importance, over batches")] = 0.97
    power: Annotated[float, described("how fast the cost falls at first; 1 is a straight line", ge=0)] = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start_at + self.every > self.end_at:
            raise ValueError(
                f"DPRP(start_at={self.start_at}, every={self.every}, end_at={self.end_at}): start_at + every must not be above "
                "end_at: ranks need one interval to fall"
            )

    @property
    def closed_at(self) -> float:
        return self.end_at

    @property
    def needs_budget(self) -> bool:
        return self.energy is None

    def start(self, model: nn.Module, example: Any, budget: Budget, *, batches: Batches | None = None) -> DPRPRun:
        return DPRPRun(model, example, budget, self)


class DPRPRun(Closing):
    """One run of DPRP."""

    method: DPRP
    score: Sensitivity
    remembers = ("_next", "targets", "final", "given_up", "shares", "_decomposed")

    def __init__(self, model: nn.Module, example: Any, budget: Budget, method: DPRP) -> None:
        goes_on = any(isinstance(m, LowRank) for m in model.modules())
        dense = dense_twin(model) if goes_on else model
        super().__init__(model, example, budget, method, dense=dense)
        if not goes_on:
            self.bake()
        self.alternatives = rank_alternatives(dense, example, graph=self.graph, budget=budget, form=method.form)
        self.graph, self.skipped = self.alternatives.graph, dict(self.alternatives.skipped)
        self.budget = self.alternatives.budget
        self.plan = Plan.dense(self.graph)
        if not goes_on:
            self._factorise()
        self.layers: dict[str, LowRank] = {
            n: m for n in self.alternatives.places if isinstance(m := model.get_submodule(n), LowRank)
        }
        self.targets = self.ranks  # what fades lies above
        self.final: dict[str, int] = {}  # ranks at the end, once they are found
        self.given_up = dict.fromkeys(self.layers, 0.0)  # share of its energy that each layer has lost so far
        self.values: dict[str, Tensor] = {}  # singular values of every layer at the last event
        self.shares: dict[str, np.ndarray] = {}  # of energy, by triplet, while a layer was whole
        self._next = method.start_at  # when the next event is due
        self._decomposed = decompositions({n: layer for n, layer in self.layers.items() if layer.whole})
        self._bind()
        self._took_stock(0.0)

    def _bind(self) -> None:
        self.triplets = Triplets(self.layers, self._decomposed)
        self.score = Sensitivity(self.triplets, smoothing=self.method.smoothing)
        if self.method.importance != TAYLOR or self.done:
            self.score.close()

    @property
    def ranks(self) -> dict[str, int]:
        """Of every factorised layer, now."""
        return {n: layer.rank for n, layer in self.layers.items()}

    def plain_model(self) -> nn.Module:
        return dense_twin(self.model)

    def put(self, model: nn.Module, options: Mapping[str, int]) -> None:
        self.alternatives.put(model, options)

    # -- 1. every layer as its singular value decomposition ------------------------------------------------------------

    def _factorise(self) -> None:
        for name, place in self.alternatives.places.items():
            layer: Any = self.model.get_submodule(name)
            put_layer(self.model, name, LowRank.of(layer, place, form=self.alternatives.forms[name], whole=True))

    # -- 2. penalty ----------------------------------------------------------------------------------------------------

    def penalty(self) -> Tensor | float:
        """At every step that of some layers, as many times as there are steps between: the same on average, for less work.

        A layer takes its turn at one step in ``PARTS``; for the first term, of large layers, at one in as many as its rank
        allows: its weight falls with ``1 / r^2``, so none is pulled harder at a time than one of rank ``LARGE``.
        """
        parts = min(PARTS, len(self.layers))
        total: Tensor | float = 0.0
        for number, layer in enumerate(self.layers.values()):
            turn = self._steps + number
            if turn % parts or layer.whole:
                continue
            often = max(layer.rank // LARGE, 1)
            if self.method.orthogonality and turn // parts % often == 0:
                off = _OffIdentity.apply(layer.u) + _OffIdentity.apply(layer.v)
                weight = self.method.orthogonality / max(layer.rank, WEAKER_BELOW) ** 2
                total = total + parts * often * weight * off
            if self.method.sparsity and not self.done:
                hoyer = layer.s.abs().sum().square() / layer.s.square().sum().clamp_min(1e-30)
                total = total + parts * self.method.sparsity * hoyer
        return total

    # -- 3. rank events ------------------------------------------------------------------------------------------------

    def step(self, *, progress: float, optimizer: torch.optim.Optimizer) -> Removed | None:
        self.check_step(progress, optimizer)
        self._steps += 1
        if not self.done:
            self.score.hear(self._steps, soon=False)
            self._fade(progress)
            self._last = progress
        if self.done or progress < self._next:
            return self._straighten(optimizer) if self._steps % TURN_EVERY == 0 else None
        kept = self._drop(optimizer)
        turned, renewed = self._turn(optimizer), frozenset[str]()
        self._took_stock(progress)
        if self.settled:
            self._finished()
        else:
            self._next = progress + self.method.every
            self.settled = self._next >= self.method.end_at
            if self.method.once:
                self._find_final()
            self._aim(self._next)
            renewed = self.split(self._falling, optimizer=optimizer)
        check_run(self)
        return Removed(kept, self.cost, renewed, turned)

    def _drop(self, optimizer: torch.optim.Optimizer | None) -> Kept:
        heard = self.triplets.by_layer(self.score.value)
        kept = cut_ranks(self.model, self.targets, optimizer=optimizer)
        self.score.value = self.triplets.row({n: v[: self.layers[n].rank] for n, v in heard.items()})
        return kept

    def _turn(self, optimizer: torch.optim.Optimizer | None) -> dict[str, BasisChange]:
        """Factors become singular value decompositions again; those of whole layers are only taken note of."""
        turns = change_bases({n: layer for n, layer in self.layers.items() if not layer.whole}, optimizer=optimizer)
        whole = decompositions({n: layer for n, layer in self.layers.items() if layer.whole})
        self._mix({**turns, **{n: turn.seen_from(self._decomposed[n]) for n, turn in whole.items()}})
        self._decomposed = whole
        self.values = {n: turn.s for n, turn in {**turns, **whole}.items()}
        return turns

    def split(self, names: Iterable[str], *, optimizer: torch.optim.Optimizer | None) -> frozenset[str]:
        """Whole layers are trained as their factors from here on; returns the names of these."""
        layers = {n: self.layers[n] for n in names}
        split_layers(layers, self._decomposed, optimizer=optimizer)
        self._decomposed = {n: turn for n, turn in self._decomposed.items() if n not in layers}
        heard = self.score.state_dict()
        self.bind()
        self.score.load_state_dict(heard)
        return frozenset(f"{n}.{factor}" for n in layers for factor in ("u", "s", "v"))

    def _straighten(self, optimizer: torch.optim.Optimizer) -> Removed | None:
        """Between events and after the last one: what the penalty leaves of the drift from orthonormal factors goes."""
        turns = change_bases({n: layer for n, layer in self.layers.items() if not layer.whole}, optimizer=optimizer)
        self._mix(turns)
        return Removed({}, self.cost, turned=turns, rebuilt=False) if turns else None

    def _mix(self, turns: Mapping[str, BasisChange]) -> None:
        """What was heard of triplets follows them into the new bases."""
        rows = self.triplets.by_layer(self.score.value)
        heard = moved({n: rows[n] for n in turns}, "cpu")
        mixed = {n: turn.mixed(heard[n]) for n, turn in turns.items()}
        self.score.value = self.triplets.row({**rows, **moved(mixed, self.triplets.device)})

    @property
    def _falling(self) -> list[str]:
        """Whole layers whose ranks are to fall now."""
        return [n for n, layer in self.layers.items() if layer.whole and self.targets[n] < layer.rank]

    def _took_stock(self, progress: float) -> None:
        self.taken = self.alternatives.options(self.ranks)
        self.record("rank", self.ranks, progress=progress)
        if "full rank" not in self.history:
            self.record("full rank", self.ranks, progress=progress)

    # -- 4. which ranks ------------------------------------------------------------------------------------------------

    def _aim(self, arrival: float) -> None:
        """Set the ranks to arrive at when ``arrival`` of the run is done; for good, once settled."""
        if self.method.once:
            left = 0.0 if self.settled else self.left_at(arrival)
            options = self.alternatives.on_the_way(self.final, left, self.limits, self.dense)
            for name, rank in self.ranks.items():
                found = self.alternatives.rank(name, options[alternatives_name(name)], whole=rank)
                self.targets[name] = min(found, rank)
            return
        method = self.method
        wanted = self._by_energy(min((arrival - method.start_at) / (method.end_at - method.start_at), 1.0))
        limits = self.limits if self.settled else self.limits_at(arrival)
        worth = self.alternatives.importance(self.scores())
        plan = self.decide(worth, limits, ceiling=self.alternatives.options(wanted), measured=self.settled)
        for name, now in self.ranks.items():
            option = len(plan.keep[alternatives_name(name)])
            rank = min(self.alternatives.rank(name, option, whole=wanted[name]), now)
            self.given_up[name] = 1.0 - (1.0 - self.given_up[name]) * (1.0 - float(tails(self.values[name])[rank]))
            self.targets[name] = rank

    def _find_final(self) -> None:
        """Ranks at the end, from whole layers; of those that are split the ranks found before stand."""
        stands = {n: r for n, r in self.final.items() if not self.layers[n].whole}
        free = {n: scores for n, scores in self.scores().items() if n not in stands}
        plan = self.decide(
            self.alternatives.importance(free, exponent=self.method.share_exponent),
            measured=self.settled or not self.final,
            ceiling=self.alternatives.options({**self._by_energy(1.0), **stands}),
            floor=self.alternatives.equal(self.limits, share=self.method.floor),
        )
        for name in free:
            option = len(plan.keep[alternatives_name(name)])
            self.final[name] = self.alternatives.rank(name, option, whole=self.layers[name].rank)

    def _by_energy(self, share: float) -> dict[str, int]:
        """The smallest ranks that give up at most ``share`` of what may be given up in all; now's without ``energy``."""
        ranks = {n: layer.rank for n, layer in self.layers.items()}
        if self.method.energy is None:
            return ranks
        for name in self.layers:
            lost = 1.0 - (1.0 - self.given_up[name]) * (1.0 - tails(self.values[name]))
            within = torch.nonzero(lost <= self.method.energy * share)
            ranks[name] = min(ranks[name], max(1, int(within[0]) if len(within) else ranks[name]))
        return ranks

    def scores(self) -> dict[str, np.ndarray]:
        """Importance per triplet of every layer, largest singular value first."""
        if self.method.importance == TAYLOR and self.score.batches:
            heard = moved(self.triplets.by_layer(self.score.value), "cpu")
            return {n: v.double().numpy() for n, v in heard.items()}
        now = {n: energy(self.values[n]) for n in self.layers}
        if self.method.importance != "whole":
            return now
        self.shares.update({n: now[n] for n, layer in self.layers.items() if layer.whole or n not in self.shares})
        return {n: self.shares[n][: layer.rank] for n, layer in self.layers.items()}

    # -- 5. fading -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _fade(self, progress: float) -> None:
        """Values outside the next ranks go to zero in a straight line, and stand at zero when the next event comes."""
        span = self._next - self._last
        factor = 0.0 if span <= 0 else min(max((self._next - progress) / span, 0.0), 1.0)
        for name, layer in self.layers.items():
            if self.targets[name] < layer.rank:
                layer.s[self.targets[name] :].mul_(factor)

    # -- 6. the end ----------------------------------------------------------------------------------------------------

    def finish(self) -> nn.Module:
        """The small model.  If training stopped before the last ranks were reached, the rest is cut here: ``forced``."""
        if not self.done:
            before = self.ranks
            self._drop(None)
            self._turn(None)
            self.settled = True
            if self.method.once:
                self._find_final()
            self._aim(1.0)
            self.split(self._falling, optimizer=None)
            self._drop(None)
            self._took_stock(self._last)
            self.forced = self.ranks != before
            self._finished()
        self.options_stay()
        for name, layer in self.layers.items():
            if self.taken[alternatives_name(name)] == self.alternatives.top(name):
                plain: nn.Module = layer.dense()
            else:
                with torch.no_grad():
                    plain = self.alternatives.plain(name, (layer.u, layer.s, layer.v), bias=layer.bias)
            put_layer(self.model, name, plain)
        self.layers = {}
        built = cost(trace(self.model, self.example, rehearse=False))
        assert (built.macs, built.params) == (self.cost.macs, self.cost.params), "planned cost is not the built one"
        return self.model

    @property
    def status(self) -> Status:
        whole = self.method.end_at - self.method.start_at
        left = 0.0 if self.done else min(max((self.method.end_at - self._last) / whole, 0.0), 1.0)
        return Status(self.cost, 0.0 if self.done else self.method.sparsity, left)


class _OffIdentity(torch.autograd.Function):
    """``|F^T F - I|^2``, whose gradient ``4 F (F^T F - I)`` is one product."""

    @staticmethod
    def forward(context: Any, factor: Tensor) -> Tensor:
        off = factor.T @ factor
        off.diagonal().sub_(1.0)
        context.save_for_backward(factor, off)
        return off.square().sum()

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> Tensor:
        factor, off = context.saved_tensors
        return factor @ (4.0 * gradient * off)


PARTS = 8  # the penalty of a layer is counted at one step in so many
LARGE = 64  # rank above which the pull to orthonormal factors is counted more rarely still
WEAKER_BELOW = 16  # rank from which the pull to orthonormal factors no longer grows as ranks fall
TURN_EVERY = 200  # steps after which factors are orthonormal again at the latest
