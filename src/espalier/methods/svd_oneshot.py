"""One-shot truncated SVD: cut every layer's small singular values off at once, then fine-tune.  The baseline of DPRP.

Where there are batches, what is small is judged by the layer's output on them (``methods.whitening``) and BatchNorm is
estimated anew: most of what a cut costs comes back without a step of training.  Of an untrained network it makes a factorised
one of fixed ranks, to be trained from scratch at the same cost.
Sources: Denton et al. 2014, Zhang et al. 2016 (channel), Jaderberg et al. 2014 (spatial); BALF, arXiv 2509.25136 (whitened).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from espalier.forms.lowrank import orthonormalise
from espalier.forms.svd import svd
from espalier.forms.table import matrix_form
from espalier.graph.alternatives import alternatives_name
from espalier.methods.base import AtOnce, Batches, Method
from espalier.methods.importance import ShareExponent
from espalier.methods.ranks import LAYOUTS, RankAlternatives, energy, rank_alternatives
from espalier.methods.scoring import batchnorm_settled
from espalier.methods.whitening import input_moments, whitened_svd
from espalier.plan import Budget
from espalier.settings import OneOf, described
from espalier.surgery import put_layer


@dataclass(frozen=True)
class SVDOneShot(Method):
    """Ranks by energy: a triplet is worth its share ``s_i^2 / sum s^2`` of its layer, per cost.

    Source: Denton et al., Exploiting Linear Structure, 2014; Jaderberg et al., Speeding up Convolutional Neural Networks with
    Low Rank Expansions, 2014 (spatial); BALF, arXiv 2509.25136, 2025 (whitened).
    """

    name: ClassVar[str] = "svd-oneshot"
    trains: ClassVar[bool] = False
    form: Annotated[str, OneOf(LAYOUTS), described("of the factors; auto is the faster one of every layer")] = "auto"
    whiten: Annotated[bool, described("where there are batches, weigh directions by how the inputs use them")] = True
    share_exponent: ShareExponent = 1.0

    def start(self, model: nn.Module, example: Any, budget: Budget, *, batches: Batches | None = None) -> Truncated:
        """``batches``: what directions are worth and BatchNorm are measured on them; without, on nothing."""
        return Truncated(model, example, budget, self, batches)


class Truncated(AtOnce):
    """One truncation."""

    def __init__(
        self, model: nn.Module, example: Any, budget: Budget, method: SVDOneShot, batches: Batches | None
    ) -> None:
        super().__init__(model, example, budget)
        self.bake()
        alternatives = rank_alternatives(model, example, graph=self.graph, budget=budget, form=method.form)
        self.graph, self.skipped, self.budget = alternatives.graph, dict(alternatives.skipped), alternatives.budget
        self.alternatives = alternatives
        layers: dict[str, Any] = {n: model.get_submodule(n) for n in alternatives.places}
        whitened = batches is not None and method.whiten
        factors = _factors(model, alternatives, batches if whitened else None)
        scores = alternatives.importance(
            {n: energy(s) for n, (_, s, _) in factors.items()}, exponent=method.share_exponent
        )
        self.plan = self.decide(scores)
        self.taken = {n: len(units) for n, units in self.plan.keep.items() if n in scores}
        ranks = {}
        with torch.no_grad(), batchnorm_settled(model, batches):
            for name, (u, s, v) in factors.items():
                option = self.taken[alternatives_name(name)]
                ranks[name] = len(s) if option == alternatives.top(name) else alternatives.ranks[name][option - 1]
                if option < alternatives.top(name):
                    cut = slice(0, ranks[name])
                    kept = u[:, cut], s[cut], v[:, cut]
                    if whitened:  # both sides share a square root of the values, and train alike
                        turn = orthonormalise(*kept, name=name)
                        kept = turn.u, turn.s, turn.v
                    put_layer(model, name, alternatives.plain(name, kept, bias=layers[name].bias))
        self.record("rank", ranks, progress=0.0)

    def put(self, model: nn.Module, options: Mapping[str, int]) -> None:
        self.alternatives.put(model, options)


def _factors(
    model: nn.Module, alternatives: RankAlternatives, batches: Batches | None
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    matrices = {
        n: matrix_form(alternatives.forms[n]).matrix(model.get_submodule(n).weight.detach())  # type: ignore[operator]
        for n in alternatives.places
    }
    if batches is None:
        return {n: svd(matrix, name=n) for n, matrix in matrices.items()}
    moments = input_moments(model, alternatives.places, alternatives.forms, batches)
    return {n: whitened_svd(matrix, moments[n], name=n) for n, matrix in matrices.items()}
