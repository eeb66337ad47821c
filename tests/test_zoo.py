"""Networks nobody here wrote: each traces, prunes to half its MACs, and passes every proof obligation.

CI runs one network per idea; ``pytest -m zoo`` runs them all (about ten minutes on one core).
"""

import numpy as np
import pytest

from benchmarks.common import ZOO, build, example
from espalier.graph import trace
from espalier.plan import Budget
from espalier.solver import solve
from espalier.surgery import verify

IN_CI = (
    "cifar:resnet20a",
    "cifar:vgg16_bn",
    "resnext50_32x4d",
    "mobilenet_v3_small",
    "densenet121",
    "shufflenet_v2_x1_0",
    "squeezenet1_1",
    "googlenet",
    "timm:res2net50_26w_4s",
    "timm:resnest14d",
    "timm:nfnet_f0",
    "timm:vit_tiny_patch16_224",
)
NETWORKS = [pytest.param(n, marks=() if n in IN_CI else (pytest.mark.zoo,)) for n in ZOO]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NETWORKS)
def test_half_the_macs_and_every_proof(name: str) -> None:
    model, inputs = build(name), example(name)
    graph = trace(model, inputs)
    random = np.random.default_rng(0)
    budget = Budget(macs=0.5)
    plan = solve(graph, {g.name: random.random(g.size) for g in graph.groups}, budget)
    verify(model, graph, plan, inputs, budget=budget).require()
