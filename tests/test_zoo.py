"""Networks nobody here wrote: each traces, prunes to half its MACs, and passes every proof obligation.

CI runs one network per idea; ``pytest -m zoo`` runs them all (about ten minutes on one core).
"""

import copy
from collections import Counter

import numpy as np
import pytest
import torch

import espalier as es
from benchmarks.common import ZOO, build, example
from espalier.costs import cost
from espalier.graph import trace
from espalier.optional import import_timm
from espalier.plan import Budget
from espalier.solver import solve
from espalier.surgery import shrink, verify
from espalier.timing import making

IN_CI = (
    "cifar:resnet20a",
    "cifar:vgg16_bn",
    "resnext50_32x4d",
    "mobilenet_v3_small",
    "shufflenet_v2_x1_0",
    "squeezenet1_1",
    "googlenet",
    "timm:resnest14d",
    "timm:test_nfnet",
    "timm:vit_tiny_patch16_224",
)
NETWORKS = [pytest.param(n, marks=() if n in IN_CI else (pytest.mark.zoo,)) for n in (*ZOO, "timm:test_nfnet")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NETWORKS)
def test_half_the_macs_and_every_proof(name: str) -> None:
    model, inputs = build(name), example(name)
    graph = trace(model, inputs)
    random = np.random.default_rng(0)
    budget = Budget(macs=0.5)
    plan = solve(graph, {g.name: random.random(g.size) for g in graph.groups}, budget)
    verify(model, graph, plan, inputs, budget=budget).require()


def pruned(name: str):
    """The network at half its MACs by a random score, its graph, plan and input."""
    model, inputs = build(name), example(name)
    graph = trace(model, inputs)
    random = np.random.default_rng(0)
    plan = solve(graph, {g.name: random.random(g.size) for g in graph.groups}, Budget(macs=0.5))
    return shrink(model, graph, plan), graph, plan, inputs


def some(*in_ci: str):
    return [pytest.param(n, marks=() if n in in_ci else (pytest.mark.zoo,)) for n in (*ZOO, "timm:test_nfnet")]


def attention_macs(inputs, outputs) -> int:
    """Queries (..., l, d) by keys (..., s, d), and what comes of it (..., l, s) by values (..., s, v)."""
    query, key, value = (v.type().sizes() for v in inputs[:3])
    return int(np.prod(query[:-1])) * key[-2] * (query[-1] + value[-1])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", some("cifar:resnet20", "mobilenet_v3_small"))
def test_fvcore_counts_what_was_planned(name: str) -> None:
    fvcore = pytest.importorskip("fvcore.nn")
    small, graph, plan, inputs = pruned(name)
    analysis = fvcore.FlopCountAnalysis(copy.deepcopy(small).eval(), inputs)
    analysis.set_op_handle("aten::scaled_dot_product_attention", attention_macs)  # fvcore knows none
    counted: Counter[str] = analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).by_operator()
    # fvcore also counts normalisation and pooling
    products = ("conv", "linear", "matmul", "addmm", "bmm", "einsum", "scaled_dot_product_attention")
    assert sum(counted[p] for p in products) == cost(graph, plan).macs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", some("cifar:resnet20a"))
def test_a_pruned_network_computes_the_same_in_onnx_runtime(name: str, tmp_path) -> None:
    pytest.importorskip("onnxruntime")
    from espalier.run.onnx import export_onnx

    small, _, _, inputs = pruned(name)
    assert export_onnx(small.eval(), tmp_path / "small.onnx", inputs) <= 1e-4


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["mobileone_s0", "repvgg_a0"])
def test_what_is_reparameterised_by_its_own_library_gets_a_profile_and_a_budget(name, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(making, "SECONDS", 0.0)
    model = import_timm().create_model(name, num_classes=4)
    branches = sum(p.numel() for p in model.parameters())
    for module in list(model.modules()):
        if hasattr(module, "reparameterize"):
            module.reparameterize()
    assert sum(p.numel() for p in model.parameters()) < branches
    x = torch.zeros(1, 3, 32, 32)
    graph, profile = trace(model.eval(), x), es.profile(model, x, networks=2)
    assert {layer.module for layer in profile.layers} == {site.module for site in graph.sites}
    importance = {g.name: np.ones(g.size) for g in graph.groups}
    plan = solve(profile.on(graph), importance, {"latency": 0.8 * profile.predict(graph)})
    assert cost(graph, plan).macs < cost(graph).macs
    assert verify(model, graph, plan, x, fills=False).passed
