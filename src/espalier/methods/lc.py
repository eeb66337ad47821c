"""Learning-compression: train the weights and compress them in turns until they are their own compressed form.

Carreira-Perpinan & Idelbayev, "Learning-compression algorithms for neural net pruning", CVPR 2018, and their arXiv 1707.01209.
``min L(w)  s.t.  w = D(theta)`` by the augmented Lagrangian with multipliers ``lam`` and a growing penalty ``mu``:

- L step: train on ``L(w) + mu/2 |w - D(theta) - lam/mu|^2``, some steps of any optimiser;
- C step: ``theta = argmin |w - lam/mu - D(theta)|^2``, a decomposition that knows nothing of the loss;
- ``lam <- lam - mu (w - D(theta))``, ``mu <- a mu``.

What ``D`` is, is the caller's business: of the weights wanted it finds the nearest that it can represent.  It works on the CPU,
wherever the weights are: a GPU is slow with the decompositions of many small matrices.  A layer that it leaves out is free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from espalier.forms.transfer import moved


class PenaltyDiverged(RuntimeError):
    """The weights move away from their compressed form; what they were compressed to last is untouched."""


class LearningCompression:
    """State of the LC algorithm over the weights of some layers of a model."""

    def __init__(self, weights: Mapping[str, nn.Parameter], *, mu: float, growth: float) -> None:
        self.weights = dict(weights)
        self.mu, self.growth = mu, growth
        self.iterations = 0  # C steps so far
        self.compressed: dict[str, Tensor] = {}  # D(theta)
        self.multipliers: dict[str, Tensor] = {}  # lam
        self.gap = 1.0  # |w - D(theta)| / |w| over all layers, after the last C step
        self._least = math.inf  # of the gaps since the scheme last changed
        self._targets: list[Tensor] = []

    def penalty(self) -> Tensor | float:
        """``mu/2 |w - D(theta) - lam/mu|^2``; nothing before the first C step."""
        if not self._targets:
            return 0.0
        pull: Tensor = _Pull.apply(self.mu, self._targets, *(self.weights[n] for n in self.compressed))  # type: ignore[no-untyped-call]
        return pull

    @torch.no_grad()
    def c_step(self, theta: Mapping[str, Tensor], *, fresh: bool = False, mu: float | None = None) -> float:
        """Take ``D(theta)`` by layer, the nearest to ``wanted()``; update the multipliers, raise the penalty; returns the gap.

        The penalty becomes ``mu``, or grows by ``growth``.

        ``fresh``: ``theta`` represents other weights than before.  The gap may jump, and multipliers begin anew: they belong
        to one constraint, and what they gather while the gap is wide pushes the weights far beyond it.  The first C step has no
        multipliers to follow; the penalty begins after it.  ``PenaltyDiverged`` leaves everything as it was.
        """
        first = self.iterations == 0
        compressed = self._carried(theta)
        gap = relative_gap(self.weights, compressed)
        self._check(gap, fresh or first)
        multipliers = {}
        for name, target in compressed.items():
            weight, old = self.weights[name], self.multipliers.get(name)
            if fresh or old is None:
                old = torch.zeros_like(weight)
            multipliers[name] = old if fresh or first else old - self.mu * (weight - target)
        self.multipliers = multipliers
        self.compressed = {n: torch.empty_like(self.weights[n]).copy_(c) for n, c in compressed.items()}
        if mu is not None:
            self.mu = mu
        elif not first:
            self.mu *= self.growth
        self.iterations += 1
        self.gap, self._least = gap, gap if fresh or first else min(self._least, gap)
        self._aim()
        return gap

    @torch.no_grad()
    def approach(self, theta: Mapping[str, Tensor], *, left: float) -> float:
        """A C step to ``D(theta)``, the nearest to ``plain()``; then ``left`` of the distance, and of the multipliers, is left.

        Steps with falling ``left`` let the weights arrive while they go on training inside what can be represented: what is
        taken is their distance from what they are nearest to now.  Returns the gap as it was.
        """
        compressed = self._carried(theta)
        gap = relative_gap(self.weights, compressed)
        self._check(gap, fresh=False)
        for name, target in compressed.items():
            weight = self.weights[name]
            weight.copy_(target + left * (weight - target))
            if name in self.multipliers:
                self.multipliers[name].mul_(left)
        self.compressed = {n: torch.empty_like(self.weights[n]).copy_(c) for n, c in compressed.items()}
        self._aim()
        return gap

    def _carried(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """To where the weights are."""
        return moved(tensors, next(iter(self.weights.values())).device) if self.weights else {}

    def wanted(self) -> dict[str, Tensor]:
        """``w - lam/mu``: what the C step has to represent; on the CPU."""
        lam = self.multipliers
        found = {n: w.detach() - lam[n] / self.mu if n in lam else w.detach() for n, w in self.weights.items()}
        return moved(found, "cpu")

    def plain(self) -> dict[str, Tensor]:
        """The weights themselves, on the CPU."""
        return moved({n: w.detach() for n, w in self.weights.items()}, "cpu")

    def _aim(self) -> None:
        self._targets = [
            c + self.multipliers[n] / self.mu if n in self.multipliers else c for n, c in self.compressed.items()
        ]

    def _check(self, gap: float, fresh: bool) -> None:
        if math.isfinite(gap) and (fresh or gap <= DIVERGED * self._least + SLACK):
            return
        raise PenaltyDiverged(
            f"LC iteration {self.iterations + 1}: the weights move away from their compressed form (gap {gap:.3g}, it was "
            f"{self._least:.3g}) at mu={self.mu:.3g}; lower the rate, or of TTLC penalty_exponent or growth. What "
            f"iteration {self.iterations} compressed the weights to is kept, and so is the last checkpoint"
        )

    def release(self) -> None:
        """The weights are no longer there: nothing is compressed, and nothing is pulled, any more."""
        self.weights, self.compressed, self.multipliers, self._targets = {}, {}, {}, []

    def state_dict(self) -> dict[str, Any]:
        return {
            "mu": self.mu,
            "iterations": self.iterations,
            "gap": self.gap,
            "least": self._least,
            "compressed": dict(self.compressed),
            "multipliers": dict(self.multipliers),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.mu, self.iterations = state["mu"], state["iterations"]
        self.gap, self._least = state["gap"], state["least"]
        for own, saved in ((self.compressed, state["compressed"]), (self.multipliers, state["multipliers"])):
            own.clear()
            for name, tensor in saved.items():
                own[name] = torch.empty_like(self.weights[name]).copy_(tensor)
        self._aim()


# A gap above twice the least one so far, and half the weights beside, is no longer the multipliers at work: in a run of 112
# steps from random weights they were seen to carry it from 0.09 to 0.29.
DIVERGED, SLACK = 2.0, 0.5


def relative_gap(weights: Mapping[str, Tensor], compressed: Mapping[str, Tensor]) -> float:
    """``|w - D| / |w|`` over all layers together; 0 where there is nothing, and for a layer without ``D``."""
    if not compressed:
        return 0.0
    apart = torch.stack([(weights[n].detach() - c).double().square().sum() for n, c in compressed.items()]).sum()
    whole = torch.stack([w.detach().double().square().sum() for w in weights.values()]).sum()
    over, under = torch.stack([apart, whole]).tolist()
    return math.sqrt(over / under) if under > 0 else 0.0


class _Pull(torch.autograd.Function):
    """``mu/2 sum |w - t|^2`` with the gradient written down: three passes over the weights, no graph."""

    @staticmethod
    def forward(ctx: Any, mu: float, targets: list[Tensor], *weights: Tensor) -> Tensor:
        ctx.mu = mu
        ctx.apart = torch._foreach_sub(weights, targets)
        return 0.5 * mu * torch.stack(torch._foreach_norm(ctx.apart)).square().sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        # New tensors: of those that ``ctx`` holds, every weight would make a copy as its gradient.
        return (None, None, *torch._foreach_mul(ctx.apart, ctx.mu * gradients[0]))
