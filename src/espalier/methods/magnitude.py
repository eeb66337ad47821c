"""One shot: rank the units by a score, keep what the budget allows, cut.  The baseline that every method has to beat.

Sources: Han et al. 2015 (magnitude); Liu et al., network slimming, 2017 (BatchNorm scales); He et al. 2017 (fine-tuning
afterwards, which is the training loop's business).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from torch import nn

from espalier.methods.base import AtOnce, Batches, Method
from espalier.methods.blocks import WholeBlocks, need_comparable, takes_blocks
from espalier.methods.importance import ScoreName, ShareExponent, diminishing, score_units
from espalier.methods.scoring import batchnorm_settled
from espalier.plan import Budget
from espalier.settings import described


@dataclass(frozen=True)
class Magnitude(Method):
    """Prune once by ``score``, a name in ``espalier.methods.importance.SCORES``; no data needed unless the score says so.

    The defaults are the best without data in ``benchmarks/results/importance.json``: additive, the same score empties whole
    blocks of a ResNet-20 at half of the MACs.

    Source: Han et al., Learning both Weights and Connections, 2015, section 3 (magnitude); Liu et al., Network Slimming, 2017,
    section 3 (scales of BatchNorm).
    """

    name: ClassVar[str] = "magnitude"
    trains: ClassVar[bool] = False
    score: ScoreName = "scale_times_consumer"
    per_cost: Annotated[bool, described("importance per MAC saved, or importance alone")] = True
    share_exponent: ShareExponent = 0.5
    blocks: WholeBlocks = None

    def __post_init__(self) -> None:
        super().__post_init__()
        need_comparable("Magnitude", "score", self.score, self.blocks)

    def start(self, model: nn.Module, example: Any, budget: Budget, *, batches: Batches | None = None) -> OneShot:
        return OneShot(model, example, budget, self, batches)


class OneShot(AtOnce):
    """One cut."""

    def __init__(
        self, model: nn.Module, example: Any, budget: Budget, method: Magnitude, batches: Batches | None
    ) -> None:
        super().__init__(model, example, budget)
        if takes_blocks(method.blocks, budget, self.graph, score=method.score):
            self.offer_blocks()
        importance = score_units(model, self.graph, method.score, batches)
        importance = {n: diminishing(w, method.share_exponent) for n, w in importance.items()}
        keep = self.decide(importance, per_cost=method.per_cost).keep
        with batchnorm_settled(model, batches):
            self.remove(keep, None)
