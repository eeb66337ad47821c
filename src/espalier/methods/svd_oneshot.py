"""One-shot truncated SVD: cut every layer's small singular values off at once, then fine-tune.  The baseline of DPRP.

Of an untrained network it makes a factorised one of fixed ranks, to be trained from scratch at the same cost.
Sources: Denton et al. 2014, Zhang et al. 2016 (channel), Jaderberg et al. 2014 (spatial).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from espalier.forms.svd import svd, to_matrix
from espalier.graph.alternatives import alternatives_name
from espalier.methods.base import AtOnce, Batches, Method
from espalier.methods.ranks import LAYOUTS, energy, rank_alternatives
from espalier.plan import Budget
from espalier.solver import solve
from espalier.surgery import replace


@dataclass(frozen=True)
class SVDOneShot(Method):
    """Ranks by energy: a triplet is worth its share ``s_i^2 / sum s^2`` of its layer, per cost."""

    name: ClassVar[str] = "svd-oneshot"
    trains: ClassVar[bool] = False
    form: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in LAYOUTS:
            raise ValueError(f"SVDOneShot(form={self.form!r}): choose one of {', '.join(LAYOUTS)}")

    def start(self, model: nn.Module, example: Any, budget: Budget, *, batches: Batches | None = None) -> Truncated:
        return Truncated(model, example, budget, self)


class Truncated(AtOnce):
    """One truncation."""

    def __init__(self, model: nn.Module, example: Any, budget: Budget, method: SVDOneShot) -> None:
        super().__init__(model, example, budget)
        self.bake()
        alternatives = rank_alternatives(model, example, graph=self.graph, budget=budget, form=method.form)
        self.graph, self.skipped = alternatives.graph, dict(alternatives.skipped)
        layers: dict[str, Any] = {n: model.get_submodule(n) for n in alternatives.places}
        factors = {n: svd(to_matrix(m.weight.detach(), alternatives.forms[n]), name=n) for n, m in layers.items()}
        scores = alternatives.importance({n: energy(s) for n, (_, s, _) in factors.items()})
        self.plan = solve(self.graph, scores, self.limits)
        self.taken = {n: len(units) for n, units in self.plan.keep.items() if n in scores}
        ranks = {}
        with torch.no_grad():
            for name, (u, s, v) in factors.items():
                option = self.taken[alternatives_name(name)]
                ranks[name] = len(s) if option == alternatives.top(name) else alternatives.ranks[name][option - 1]
                if option < alternatives.top(name):
                    cut = slice(0, ranks[name])
                    small = alternatives.plain(name, (u[:, cut], s[cut], v[:, cut]), bias=layers[name].bias)
                    replace(model, name, small)
        self.record("rank", ranks, progress=0.0)
