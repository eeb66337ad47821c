"""What a residual block is worth beside channels, and what should choose among both.

    python -m benchmarks.block_importance --model resnet56a --weights resnet56.th --data-dir D

Two tables, on training images that neither scores nor statistics saw; the test set is not touched.

``blocks``: every block by itself.  The first-order worth of a gate on its branch and of all gates inside it (shares of the
whole, squared, averaged over batches); the rise of the loss when it is left out, as it is and with BatchNorm estimated anew,
and when half of its inner channels go instead, the least important ones.

``cuts``: the whole network cut to a share of its MACs by channels alone, by blocks alone in the order of each of these scores,
and by both (``share``, ``narrowest``: the constants of ``methods.blocks``); BatchNorm estimated anew, then ``--steps``
of training with the network as its own teacher.
"""

from __future__ import annotations

import argparse
import copy
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.common import environment, read_results, rounded, table, write_results
from espalier.costs import cost
from espalier.graph import Graph, find_blocks, trace, with_blocks
from espalier.methods.importance import score_units
from espalier.methods.scoring import recalibrate_batchnorm
from espalier.plan import Plan
from espalier.run.batches import Batch
from espalier.run.data import Data, load_data
from espalier.run.evaluate import evaluate
from espalier.run.models import build_model, load_weights
from espalier.solver import solve
from espalier.surgery import shrink

NAME = "block_importance"
BATCH, SCORING, SETTLING, JUDGING = 128, 4, 4, 4


def main() -> None:
    options = arguments()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    data = load_data("cifar10", data_dir=options.data_dir)
    assert isinstance(data, Data)
    model = build_model(options.model, num_classes=data.num_classes)
    load_weights(model, options.weights)
    model = model.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    batches = list(
        data.calibration_batches(
            batch_size=BATCH, batches=SCORING + SETTLING + JUDGING + options.steps, seed=0, channels_last=True
        )
    )
    example = batches[0][0][:1].contiguous()
    graph = with_blocks(trace(model, example), find_blocks(model, example).found)
    bench = Bench(model, graph, batches)
    found = read_results(NAME)
    blocks = found.get(options.model, {}).get("blocks")
    if blocks is None:
        blocks = bench.blocks()
        one = {"model": options.model, "dense": bench.dense, "blocks": blocks, **environment()}
        found = {**found, options.model: rounded(one)}
        write_results(NAME, found)
    cuts = bench.cuts(options.macs, blocks, shares=options.shares, narrowest=options.narrowest)
    setting = {"model": options.model, "macs": options.macs, "steps": options.steps, "dense": bench.dense, "cuts": cuts}
    write_results(NAME, {**found, f"{options.model} {options.macs:g}": rounded({**setting, **environment()})})
    print(blocks_table(blocks), cuts_table(cuts), sep="\n\n")


class Bench:
    """One trained network and the images that everything is measured on."""

    def __init__(self, model: nn.Module, graph: Graph, batches: list[Batch]) -> None:
        self.model, self.graph = model, graph
        self.scoring, rest = batches[:SCORING], batches[SCORING:]
        self.settling, rest = rest[:SETTLING], rest[SETTLING:]
        self.judging, self.training = rest[:JUDGING], rest[JUDGING:]
        self.dense = evaluate(model, self.judging)
        self.worth = score_units(model, graph, "taylor", self.scoring)

    def blocks(self) -> list[dict[str, Any]]:
        rows = []
        for block in self.graph.blocks:
            inner = [self.graph.groups[i] for i in self.graph.inner(block)]
            out = Plan({block.group: np.arange(1)})
            half = Plan({g.name: best(self.worth[g.name], g.size // 2) for g in inner})
            lost = sum(float(np.sort(self.worth[g.name])[: g.size - g.size // 2].sum()) for g in inner)
            small = shrink(self.model, self.graph, out)
            row = {
                "block": block.module,
                "macs": 1 - cost(self.graph, out).macs / cost(self.graph).macs,
                "gate": float(self.worth[block.group][1]),
                "inside": sum(float(self.worth[g.name].sum()) for g in inner),
                "rise": evaluate(small, self.judging)["loss"] - self.dense["loss"],
                "rise, BatchNorm anew": self._settled(small)["loss"] - self.dense["loss"],
                "inside the half": lost,
                "rise of the half": self._settled(shrink(self.model, self.graph, half))["loss"] - self.dense["loss"],
            }
            rows.append(row)
            print(row, flush=True)
        return rows

    def _settled(self, small: nn.Module) -> dict[str, float]:
        recalibrate_batchnorm(small, self.settling, SETTLING)
        return evaluate(small, self.judging)

    def cuts(
        self, macs: float, blocks: list[dict[str, Any]], *, shares: list[float], narrowest: list[float]
    ) -> list[dict[str, Any]]:
        rows = []
        for label, plan in self._plans(macs, blocks, shares, narrowest).items():
            small = shrink(self.model, self.graph, plan)
            settled = self._settled(small)
            train(small, self.model, self.training)
            row = {
                "cut": label,
                "blocks out": len(self.graph.absent(plan.keep)),
                "macs": cost(self.graph, plan).macs / cost(self.graph).macs,
                "loss": settled["loss"],
                "loss, trained": self._settled(small)["loss"],
                "accuracy, trained": evaluate(small, self.judging)["accuracy"],
            }
            rows.append(row)
            print(row, flush=True)
        return rows

    def _plans(
        self, macs: float, blocks: list[dict[str, Any]], shares: list[float], narrowest: list[float]
    ) -> dict[str, Plan]:
        limits = {"macs": math.floor(macs * cost(self.graph).macs)}
        channels = {n: w for n, w in self.worth.items() if not n.endswith(":block")}
        plans = {"channels": solve(self.graph, channels, limits)}
        if macs >= 0.4:  # blocks alone reach no less
            for score in ("gate", "inside", "rise", "rise, BatchNorm anew"):
                worth = {f"{r['block']}:block": np.array([0.0, max(r[score], 0.0)]) for r in blocks}
                plans[f"blocks by {score}"] = solve(self.graph, worth, limits)
        nothing = {b.group: np.zeros(2) for b in self.graph.blocks}
        inner = {i for b in self.graph.blocks for i in self.graph.inner(b)}
        for share in shares:
            for part in narrowest:
                floor = {self.graph.groups[i].name: math.ceil(part * self.graph.groups[i].size) for i in inner}
                plan = solve(self.graph, {**channels, **nothing}, limits, block_share=share, floor=floor)
                plans[f"both, share {share}, narrowest {part}"] = plan
        return plans


def best(worth: np.ndarray, count: int) -> np.ndarray:
    return np.sort(np.argsort(-worth, kind="stable")[: max(count, 1)])


def train(small: nn.Module, teacher: nn.Module, batches: list[Batch]) -> None:
    """A few steps with half the loss from the teacher, at a rate that falls to zero."""
    teacher = copy.deepcopy(teacher).eval()
    optimizer = torch.optim.SGD(small.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    small.train()
    for number, (x, y) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 0.05 * 0.5 * (1 + math.cos(math.pi * number / len(batches)))
        with torch.no_grad():
            target = (teacher(x) / 4).softmax(1)
        logits = small(x)
        loss = 0.5 * F.cross_entropy(logits, y) + 0.5 * 16 * F.kl_div(
            (logits / 4).log_softmax(1), target, reduction="batchmean"
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    small.eval()


def blocks_table(rows: list[dict[str, Any]]) -> str:
    head = ["block", "gate", "inside", "rise", "rise, BatchNorm anew", "inside the half", "rise of the half"]
    return table(head, [[r["block"], *[f"{r[h]:.4f}" for h in head[1:]]] for r in rows])


def cuts_table(rows: list[dict[str, Any]]) -> str:
    body = [
        [r["cut"], r["blocks out"], f"{r['loss']:.3f}", f"{r['loss, trained']:.3f}", f"{r['accuracy, trained']:.2f}"]
        for r in rows
    ]
    return table(["cut", "blocks out", "loss", "loss, trained", "accuracy, trained"], body)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet56a")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data-dir")
    parser.add_argument("--macs", type=float, default=0.5)
    parser.add_argument("--shares", type=float, nargs="*", default=[1.0, 0.5, 0.25])
    parser.add_argument("--narrowest", type=float, nargs="*", default=[0.0, 0.25, 0.5])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
