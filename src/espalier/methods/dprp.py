"""DPRP, dynamic parameter rank pruning: layers are trained as their SVD, and their ranks fall while the network trains.

Sharma, Heard, Saber, Markopoulos: "Dynamic Parameter Rank Pruning", IEEE Access 13, 2025, arXiv 2401.08014.  The paper fixes
the idea: the factors of every layer's singular value decomposition are trained end to end, regularisers keep them orthonormal
and their values sparse, ranks are pruned during training, with no rank preset and no adjustment afterwards.  What follows is
our reading, in the paper's order:

1. every convolution and linear layer becomes ``M = U diag(s) V^T`` at full rank (``forms.LowRank``): the same function; as
   long as its rank has not fallen its factors are trained as their product, which takes the steps of dense training;
2. penalty ``orthogonality * sum_l (|U^T U - I|^2 + |V^T V - I|^2) / r_l^2 + sparsity * sum_l (sum |s|)^2 / sum s^2``,
   with at least 16 for ``r_l``: of the smallest ranks the pull would be too strong for usual learning rates;
3. rank events, from ``start_at`` to ``reach`` every ``every``: drop what has faded; re-orthonormalise exactly, with the
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

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from espalier.carving import put_in_place
from espalier.costs import Cost, CostModel, cost
from espalier.forms import LowRank
from espalier.forms.lowrank import BasisChange
from espalier.forms.transfer import moved
from espalier.graph import trace
from espalier.graph.alternatives import alternatives_name
from espalier.methods.base import Batches, Method, Removed, Run, Status
from espalier.methods.pace import limits_on_the_way, still_to_go
from espalier.methods.ranks import LAYOUTS, energy, rank_alternatives, tails
from espalier.plan import Budget, Plan
from espalier.settings import Fraction, OneOf, Share, described
from espalier.solver import solve
from espalier.surgery import change_bases, cut_ranks, decompositions, replace, split_layers

SCORES = ("energy", "taylor", "whole")


@dataclass(frozen=True)
class DPRP(Method):
    """Hyper-parameters of dynamic rank pruning; every duration is a fraction of the whole run."""

    name: ClassVar[str] = "dprp"
    trains: ClassVar[bool] = True
    energy: Annotated[
        float | None,
        described("find ranks without a budget, giving up at most this share of every layer's energy", gt=0, lt=1),
    ] = None
    form: Annotated[str, OneOf(LAYOUTS), described("of the factors; auto is the faster one of every layer")] = "auto"
    importance: Annotated[
        str,
        OneOf(SCORES),
        described(
            "of a triplet: its share of the layer's energy; whole, the same while the layer was whole, whatever it has lost "
            "since; or taylor, the squared first-order change of the loss"
        ),
    ] = "taylor"
    once: Annotated[
        bool,
        described("find the final ranks at the first event and walk there; later only whole layers are aimed anew"),
    ] = False
    returns: Annotated[
        Fraction, described("with once: a rank that holds a share h of its layer is worth h ** returns; 1 is additive")
    ] = 0.5
    floor: Annotated[
        float,
        described("with once: no rank falls below that share of what equal fractions in all layers leave", ge=0, le=1),
    ] = 0.5
    start_at: Annotated[Share, described("when ranks begin to fall")] = 0.1
    reach: Annotated[Share, described("when they stand")] = 0.6
    every: Annotated[float, described("time between two rank events", gt=0, lt=1)] = 0.02
    orthogonality: Annotated[float, described("weight of the pull to orthonormal factors", ge=0)] = 1.0
    sparsity: Annotated[float, described("weight of the penalty on singular values", ge=0)] = 1e-4
    smoothing: Annotated[Share, described("of the importance, over batches")] = 0.97
    power: Annotated[float, described("how fast the cost falls at first; 1 is a straight line", ge=0)] = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start_at + self.every > self.reach:
            raise ValueError(
                f"DPRP(start_at={self.start_at}, every={self.every}, reach={self.reach}): start_at + every must not be above "
                "reach: ranks need one interval to fall"
            )

    @property
    def needs_budget(self) -> bool:
        return self.energy is None

    def start(self, model: nn.Module, example: Any, budget: Budget, *, batches: Batches | None = None) -> DPRPRun:
        return DPRPRun(model, example, budget, self)


class DPRPRun(Run):
    """One run of DPRP."""

    def __init__(self, model: nn.Module, example: Any, budget: Budget, method: DPRP) -> None:
        goes_on = any(isinstance(m, LowRank) for m in model.modules())
        dense = _dense_twin(model) if goes_on else model
        super().__init__(model, example, budget, dense=dense)
        self.method = method
        if not goes_on:
            self.bake()
        self.alternatives = rank_alternatives(dense, example, graph=self.graph, budget=budget, form=method.form)
        self.graph, self.skipped = self.alternatives.graph, dict(self.alternatives.skipped)
        self.plan = Plan.dense(self.graph)
        even = {g.name: np.ones(g.size) for g in self.graph.groups if g.options}
        solve(self.graph, even, self.limits)  # unreachable budgets fail now
        self.settled = False  # the last decision is taken
        self.done = False
        self.forced = False
        self._next = method.start_at
        self._last = 0.0
        self._steps = 0
        self._batches = 0
        if not goes_on:
            self._factorise()
        self.layers: dict[str, LowRank] = {
            n: m for n in self.alternatives.places if isinstance(m := model.get_submodule(n), LowRank)
        }
        self.targets = {n: layer.rank for n, layer in self.layers.items()}  # what fades lies above
        self.final: dict[str, int] = {}  # ranks at the end, once they are found
        self.given_up = dict.fromkeys(self.layers, 0.0)  # share of its energy that each layer has lost so far
        self._sensitivity = {n: torch.zeros_like(layer.s) for n, layer in self.layers.items()}
        self._decomposed = decompositions({n: layer for n, layer in self.layers.items() if layer.whole})
        self.values: dict[str, Tensor] = {}  # singular values of every layer at the last event
        self.shares: dict[str, np.ndarray] = {}  # of energy, by triplet, while a layer was whole
        self._heard: dict[str, Tensor] = {}
        self._hooks: list[Any] = []
        self._listen()
        self._took_stock(0.0)

    # -- 1. every layer as its singular value decomposition ------------------------------------------------------------

    def _factorise(self) -> None:
        for name, place in self.alternatives.places.items():
            layer: Any = self.model.get_submodule(name)
            replace(self.model, name, LowRank.of(layer, place, form=self.alternatives.forms[name], whole=True))

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

    # -- one step ------------------------------------------------------------------------------------------------------

    def step(self, *, progress: float, optimizer: torch.optim.Optimizer) -> Removed | None:
        self.check_step(progress, optimizer)
        self._steps += 1
        if not self.done:
            self._take_in()
            self._fade(progress)
            self._last = progress
            if progress >= self._next:
                return self._event(progress, optimizer)
        return self._straighten(optimizer) if self._steps % TURN_EVERY == 0 else None

    # -- 3. rank events ------------------------------------------------------------------------------------------------

    def _event(self, progress: float, optimizer: torch.optim.Optimizer | None) -> Removed:
        kept = self._drop(optimizer)
        turned, renewed = self._turn(optimizer), frozenset[str]()
        self._took_stock(progress)
        if self.settled:
            self._finished()
        else:
            self._decide(progress)
            renewed = self.split(self._falling, optimizer=optimizer)
        return Removed(kept, self.cost, renewed, turned)

    def _drop(self, optimizer: torch.optim.Optimizer | None) -> Any:
        kept = cut_ranks(self.model, self.targets, optimizer=optimizer)
        self._sensitivity = {n: v[: self.targets[n]] for n, v in self._sensitivity.items()}
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
        self._listen()
        return frozenset(f"{n}.{factor}" for n in layers for factor in ("u", "s", "v"))

    def _straighten(self, optimizer: torch.optim.Optimizer) -> Removed | None:
        """Between events and after the last one: what the penalty leaves of the drift from orthonormal factors goes."""
        turns = change_bases({n: layer for n, layer in self.layers.items() if not layer.whole}, optimizer=optimizer)
        self._mix(turns)
        return Removed({}, self.cost, turned=turns, rebuilt=False) if turns else None

    def _mix(self, turns: Mapping[str, BasisChange]) -> None:
        """Sensitivities follow their triplets into the new bases."""
        heard = moved({n: self._sensitivity[n] for n in turns}, "cpu")
        mixed = {n: turn.mixed(heard[n]) for n, turn in turns.items()}
        self._sensitivity.update(moved(mixed, next(self.model.parameters()).device))

    @property
    def _falling(self) -> list[str]:
        """Whole layers whose ranks are to fall now."""
        return [n for n, layer in self.layers.items() if layer.whole and self.targets[n] < layer.rank]

    def _took_stock(self, progress: float) -> None:
        ranks = {n: layer.rank for n, layer in self.layers.items()}
        self.taken = self.alternatives.options(ranks)
        self.record("rank", ranks, progress=progress)
        if "full rank" not in self.history:
            self.record("full rank", ranks, progress=progress)

    # -- 4. which ranks ------------------------------------------------------------------------------------------------

    def _decide(self, progress: float) -> None:
        """Set the ranks that the next event is to arrive at."""
        self._next = progress + self.method.every
        self.settled = self._next >= self.method.reach
        if self.method.once:
            self._find_final()
            self._walk(0.0 if self.settled else self._left_at(self._next))
            return
        wanted = self._by_energy(min((self._next - self.method.start_at) / self._span, 1.0))
        limits = self.limits if self.settled else self.limits_at(self._next)
        self._aim(wanted, limits)

    @property
    def _span(self) -> float:
        return self.method.reach - self.method.start_at

    def limits_at(self, progress: float) -> dict[str, float]:
        """The budget now."""
        return limits_on_the_way(self.limits, self.dense, self._left_at(progress))

    def _left_at(self, progress: float) -> float:
        """Share of what the cost has to fall that is still to fall."""
        method = self.method
        return still_to_go(progress, begin=method.start_at, end=method.reach, power=method.power)

    def _find_final(self) -> None:
        """Ranks at the end, from whole layers; of those that are split the ranks found before stand."""
        stands = {n: r for n, r in self.final.items() if not self.layers[n].whole}
        free = {n: scores for n, scores in self.scores().items() if n not in stands}
        plan = solve(
            self.graph,
            self.alternatives.importance(free, returns=self.method.returns),
            self.limits,
            ceiling=self.alternatives.options({**self._by_energy(1.0), **stands}),
            floor=self.alternatives.equal(self.limits, share=self.method.floor),
        )
        for name in free:
            option = len(plan.keep[alternatives_name(name)])
            full = self.layers[name].rank
            self.final[name] = (
                full if option == self.alternatives.top(name) else self.alternatives.ranks[name][option - 1]
            )

    def _walk(self, left: float) -> None:
        """Targets on the way to the final ranks: in all layers the same share of it, the least at which the cost is down to
        what the schedule has ``left`` of its fall."""
        end = self.alternatives.options(self.final)
        costs = CostModel(self.graph)

        def options(share: float) -> dict[str, int]:
            tops = {alternatives_name(n): self.alternatives.top(n) for n in self.layers}
            return {n: top - math.floor(share * (top - end[n]) + 0.5) for n, top in tops.items()}

        def cost_at(share: float) -> Cost:
            there = options(share)
            return costs.cost(np.array([there.get(g.name, g.size) for g in self.graph.groups], dtype=np.int64))

        last = cost_at(1.0)
        allowed = {m: getattr(last, m) + (getattr(self.dense, m) - getattr(last, m)) * left for m in self.limits}
        low, high = 0.0, 1.0
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            there = cost_at(middle)
            fits = all(getattr(there, m) <= limit for m, limit in allowed.items())
            low, high = (low, middle) if fits else (middle, high)
        for name, option in ((n, options(high)[alternatives_name(n)]) for n in self.layers):
            if option < self.alternatives.top(name):
                self.targets[name] = min(self.alternatives.ranks[name][option - 1], self.layers[name].rank)

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

    def _aim(self, wanted: dict[str, int], limits: dict[str, float]) -> None:
        """The most important triplets within ``limits``, and never more than ``wanted``."""
        plan = solve(
            self.graph, self.alternatives.importance(self.scores()), limits, ceiling=self.alternatives.options(wanted)
        )
        for name, layer in self.layers.items():
            option = len(plan.keep[alternatives_name(name)])
            allowed = self.alternatives.ranks[name]
            rank = wanted[name] if option > len(allowed) else min(allowed[option - 1], layer.rank)
            self.given_up[name] = 1.0 - (1.0 - self.given_up[name]) * (1.0 - float(tails(self.values[name])[rank]))
            self.targets[name] = rank

    def scores(self) -> dict[str, np.ndarray]:
        """Importance per triplet of every layer, largest singular value first."""
        if self.method.importance == "taylor" and self._batches:
            return {n: v.double().numpy() for n, v in moved(self._sensitivity, "cpu").items()}
        now = {n: energy(self.values[n]) for n in self.layers}
        if self.method.importance != "whole":
            return now
        self.shares.update({n: now[n] for n, layer in self.layers.items() if layer.whole or n not in self.shares})
        return {n: self.shares[n][: layer.rank] for n, layer in self.layers.items()}

    def _listen(self) -> None:
        """Tie hooks to what the layers are trained by now: the gradients are read every ``LISTEN_EVERY`` steps."""
        for hook in self._hooks:
            hook.remove()
        self._heard, self._hooks = {}, []
        if self.method.importance == "taylor" and not self.done:
            self._hooks = [
                (layer.matrix if layer.whole else layer.s).register_post_accumulate_grad_hook(self._hear(n))
                for n, layer in self.layers.items()
            ]

    def _hear(self, name: str) -> Any:
        layer, turn = self.layers[name], self._decomposed.get(name)
        sides = None if turn is None else (turn.u * turn.s, turn.v) if layer.tall else (turn.v * turn.s, turn.u)
        if sides is not None:
            sides = (sides[0].to(layer.s.device), sides[1].to(layer.s.device))

        def hook(factor: Tensor) -> None:
            if self._steps % LISTEN_EVERY == 0 and factor.grad is not None:
                if sides is None:
                    self._heard[name] = (factor.detach() * factor.grad).square()
                else:
                    self._heard[name] = ((factor.grad @ sides[1]) * sides[0]).sum(0).square()

        return hook

    def _take_in(self) -> None:
        """``(s_i dL/ds_i)^2``, averaged over batches; the sum over the network is one per batch, so loss scaling cancels."""
        if len(self._heard) < len(self.layers):
            return
        total = torch.stack([v.sum() for v in self._heard.values()]).sum()
        fine = torch.isfinite(total) & (total > 0)  # stays on the device: nobody waits for it
        self._batches += 1
        weight = max(1.0 - self.method.smoothing, 1.0 / self._batches) * fine
        for name, value in self._sensitivity.items():
            value.lerp_(torch.where(fine, self._heard[name] / total, 0.0), weight)
        self._heard = {}

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

    def _finished(self) -> None:
        self.done = True
        self._listen()

    def finish(self) -> nn.Module:
        """The small model.  If training stopped before the last ranks were reached, the rest is cut here: ``forced``."""
        if not self.done:
            before = {n: layer.rank for n, layer in self.layers.items()}
            self._drop_to_the_end()
            self.forced = any(layer.rank < before[n] for n, layer in self.layers.items())
            self._finished()
        self.options_stay()
        for name, layer in self.layers.items():
            if self.taken[alternatives_name(name)] == self.alternatives.top(name):
                plain: nn.Module = layer.dense()
            else:
                with torch.no_grad():
                    plain = self.alternatives.plain(name, (layer.u, layer.s, layer.v), bias=layer.bias)
            replace(self.model, name, plain)
        self.layers = {}
        built = cost(trace(self.model, self.example))
        assert (built.macs, built.params) == (self.cost.macs, self.cost.params), "planned cost is not the built one"
        return self.model

    def _drop_to_the_end(self) -> None:
        self._drop(None)
        self._turn(None)
        if self.method.once:
            self._find_final()
            self.targets = dict(self.final)
        else:
            self._aim(self._by_energy(1.0), self.limits)
        self.split(self._falling, optimizer=None)
        self._drop(None)
        self._took_stock(self._last)

    @property
    def status(self) -> Status:
        left = 0.0 if self.done else min(max((self.method.reach - self._last) / self._span, 0.0), 1.0)
        return Status(self.cost, 0.0 if self.done else self.method.sparsity, left)

    # -- resume --------------------------------------------------------------------------------------------------------

    remembers = (
        "settled", "done", "forced", "_next", "_last", "_steps", "_batches",
        "targets", "final", "given_up", "shares", "_sensitivity", "_decomposed",
    )  # fmt: skip

    def restored(self) -> None:
        self._listen()


def _dense_twin(model: nn.Module) -> nn.Module:
    """A copy with plain layers for the factorised ones: what a run that goes on began with."""
    twin = copy.deepcopy(model)
    for module in list(twin.modules()):
        if isinstance(module, LowRank):
            put_in_place(twin, module, module.dense())
    return twin


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
BISECTIONS = 30  # for the share of the way to the final ranks
LISTEN_EVERY = 4  # steps between two readings of the gradients
