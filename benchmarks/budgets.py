"""Random budgets on several networks: never above, nothing left that a further block would fit into, and how fast.

    python -m benchmarks.budgets [--networks resnet50 ...] [--targets 20]

Every target is drawn from 15 to 90 % of the dense cost, of MACs, of parameters, of both, and of activation memory along
with MACs, each with and without widths in multiples of 8.  A draw that no plan can reach must be refused as such (the
smallest network there is must break it) and is drawn anew.  Every plan is carried out, and the small network is counted by
PyTorch: planned and counted MACs have to be the same number.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
import warnings
from dataclasses import asdict, replace
from statistics import median
from typing import Any

import numpy as np

import espalier as es
from benchmarks import common
from benchmarks.structure import macs as counted_macs
from espalier.graph import Graph
from espalier.methods.importance import score_units
from espalier.solver import unused_blocks

NETWORKS = (
    "cifar:resnet20a", "cifar:vgg16_bn", "resnet50", "mobilenet_v2", "densenet121", "shufflenet_v2_x1_0", "efficientnet_b0",
    "convnext_tiny",
)  # fmt: skip
SHORT = ("cifar:resnet20a", "resnet50", "densenet121")
KINDS = (("macs",), ("params",), ("macs", "params"), ("macs", "activation_memory"))


def draw(chance: random.Random, number: int) -> es.Budget:
    """The kinds take turns: all of them without and then with a multiple of 8."""
    metrics = KINDS[number % len(KINDS)]
    multiple = 8 if (number // len(KINDS)) % 2 else 1
    return replace(es.Budget(macs=1.0, multiple_of=multiple), **_fractions(chance, metrics))


def _fractions(chance: random.Random, metrics: tuple[str, ...]) -> dict[str, Any]:
    """``macs`` is always there, ``None`` where it is not limited."""
    return {"macs": None, **{m: round(chance.uniform(0.15, 0.9), 4) for m in metrics}}


def cannot_be_met(graph: Graph, budget: es.Budget) -> bool:
    """Does even the plan with the fewest units that ``multiple_of`` allows break a limit?"""
    steps = [budget.multiple_of // math.gcd(budget.multiple_of, g.width) for g in graph.groups]
    least = {g.name: np.arange(min(n, g.size)) for g, n in zip(graph.groups, steps, strict=True)}
    cost = es.cost(graph, es.Plan(least))
    return any(getattr(cost, metric) > limit for metric, limit in budget.limits(es.cost(graph)).items())


def one_network(name: str, *, targets: int, seed: int = 0) -> list[dict[str, Any]]:
    model, x = common.build(name), common.example(name)
    graph = es.trace(model, x)
    dense = es.cost(graph)
    importance = score_units(model, graph, es.Magnitude().score)
    chance = random.Random(f"{name} {seed}")
    rows: list[dict[str, Any]] = []
    refused = 0
    while len(rows) < targets:
        budget = draw(chance, len(rows))
        begin = time.perf_counter()
        try:
            plan = es.solve(graph, importance, budget)
        except es.BudgetError as error:
            refused += 1
            assert cannot_be_met(graph, budget), f"{name}: {budget} was refused although it can be met"
            if refused > 20 * targets:
                raise ValueError(f"{name}: almost no budget can be met") from error
            continue
        seconds = time.perf_counter() - begin
        planned, limits = es.cost(graph, plan), budget.limits(dense)
        used = {m: getattr(planned, m) / limit for m, limit in limits.items()}
        rows.append({
            "network": name,
            "budget": {k: v for k, v in asdict(budget).items() if v is not None and k != "protect"},
            "refused before": refused,
            "used": used,  # of each limit
            "above": any(getattr(planned, m) > limit for m, limit in limits.items()),
            "slack": 1 - max(used.values()),  # of the limit that binds
            "slack of dense": min((limits[m] - getattr(planned, m)) / getattr(dense, m) for m in limits),
            "unused blocks": unused_blocks(graph, plan, budget),
            "counted": counted_macs(es.shrink(model, graph, plan), x) == planned.macs,
            "seconds": seconds,
        })  # fmt: skip
        refused = 0
    return rows


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "targets": len(rows),
        "above the budget": sum(r["above"] for r in rows),
        "with a block unused": sum(bool(r["unused blocks"]) for r in rows),
        "counted otherwise than planned": sum(not r["counted"] for r in rows),
        "refused, rightly": sum(r["refused before"] for r in rows),
        "slack": {
            name: common.spread([r["slack"] for r in rows if r["budget"]["multiple_of"] == multiple])
            for name, multiple in (("any width", 1), ("multiples of 8", 8))
            if any(r["budget"]["multiple_of"] == multiple for r in rows)
        },
        "seconds": common.spread([r["seconds"] for r in rows]),
    }


def as_table(rows: list[dict[str, Any]]) -> str:
    body = []
    for name in dict.fromkeys(r["network"] for r in rows):
        own = [r for r in rows if r["network"] == name]

        def slack(multiple: int, own: list[dict[str, Any]] = own) -> str | None:
            found = [r["slack"] for r in own if r["budget"]["multiple_of"] == multiple]
            return f"{median(found):.2%} / {max(found):.2%}" if found else None

        body.append([
            name, len(own), sum(r["above"] for r in own), sum(bool(r["unused blocks"]) for r in own),
            sum(not r["counted"] for r in own), slack(1), slack(8),
            f"{median(r['seconds'] for r in own):.3f} / {max(r['seconds'] for r in own):.3f}",
        ])  # fmt: skip
    headers = ["network", "targets", "above", "unused", "miscounted", "slack", "slack, x8", "seconds"]
    return common.table(headers, body) + "\nslack and seconds: median / most"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--targets", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="budgets", help="of the results file")
    chosen = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    rows = [r for name in chosen.networks for r in one_network(name, targets=chosen.targets, seed=chosen.seed)]
    report = summarise(rows)
    content = {
        "environment": common.environment(),
        "settings": {"targets": chosen.targets, "seed": chosen.seed, "importance": es.Magnitude().score},
        "summary": report,
        "rows": rows,
    }
    path = common.write_results(chosen.name, common.rounded(content))
    print(as_table(rows))
    print(json.dumps(common.rounded(report), indent=1))
    print(f"written to {path.relative_to(common.ROOT)}")


if __name__ == "__main__":
    main()
