"""Which importance chooses best: every score cuts a trained network to the same budget, and nothing is trained afterwards.

    python -m benchmarks.importance --model resnet20a --weights resnet20.th --data-dir D

One row per score x per cost or not x additive or with diminishing returns x cut at once or in steps (measured anew after
each).  BatchNorm statistics are estimated anew on training images, then accuracy and loss are taken on training images that
neither the score nor the statistics saw; the test set is not touched.  What training makes of the cut is another question:
the recipe ``importance-resnet20`` of ``benchmarks.run`` answers it for the best ones.
"""

from __future__ import annotations

import argparse
import copy
from itertools import product
from typing import Any

import torch
from torch import nn

from benchmarks.common import environment, read_results, rounded, table, write_results
from espalier.costs import cost
from espalier.graph import trace
from espalier.methods.importance import SCORES, diminishing, score_units
from espalier.methods.scoring import recalibrate_batchnorm
from espalier.plan import Budget
from espalier.run.batches import Batch
from espalier.run.data import Data, load_data
from espalier.run.evaluate import evaluate
from espalier.run.models import build_model, load_weights
from espalier.solver import solve
from espalier.surgery import shrink_

NAME = "importance"
BATCH, SCORING, SETTLING, JUDGING = 128, 8, 8, 16  # images in a batch; batches for scores, BatchNorm, accuracy


def main() -> None:
    options = arguments()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    data = load_data("cifar10", data_dir=options.data_dir)
    assert isinstance(data, Data)
    model = build_model(options.model, num_classes=data.num_classes)
    load_weights(model, options.weights)
    model = model.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    chosen = list(
        data.calibration_batches(batch_size=BATCH, batches=SCORING + SETTLING + JUDGING, seed=0, channels_last=True)
    )
    judging = chosen[SCORING + SETTLING :]
    whole = evaluate(model, judging)
    rows = []
    for score, per_cost, returns, steps in product(reversed(SCORES), (True, False), (1.0, 0.5), (1, 4)):
        small = cut(
            model, chosen, score, macs=options.macs, per_cost=per_cost, returns=returns, steps=steps
        )  # fmt: skip
        found = evaluate(small, judging)
        widths = [m.out_channels for m in small.modules() if isinstance(m, nn.Conv2d)]
        rows.append(
            {"score": score, "per_cost": per_cost, "returns": returns, "steps": steps, **found, "widths": widths}
        )
        print(rows[-1], flush=True)
    results = read_results(NAME)
    setting = {"model": options.model, "macs": options.macs, "dense": whole, "rows": rows, **environment()}
    results[f"{options.model} {options.macs:g}"] = rounded(setting)
    write_results(NAME, results)
    print(as_table(rows))


def cut(
    model: nn.Module, batches: list[Batch], score: str, *, macs: float, per_cost: bool, returns: float, steps: int
) -> nn.Module:
    """A copy of ``model`` cut to ``macs`` in equal ratios, its BatchNorm statistics estimated anew after every step."""
    small = copy.deepcopy(model)
    example = batches[0][0][:1].contiguous()
    dense = cost(trace(model, example, rehearse=False)).macs
    for number in range(1, steps + 1):
        graph = trace(small, example)
        worth = score_units(small, graph, score, batches[:SCORING])
        worth = {n: diminishing(w, returns) for n, w in worth.items()}
        budget = Budget(macs=max(round(dense * macs ** (number / steps)), 2))
        shrink_(small, graph, solve(graph, worth, budget, per_cost=per_cost))
        recalibrate_batchnorm(small, batches[SCORING : SCORING + SETTLING], SETTLING)
    return small


def as_table(rows: list[dict[str, Any]]) -> str:
    ordered = sorted(rows, key=lambda r: r["loss"])
    body = [
        [
            r["score"], "yes" if r["per_cost"] else "no", "additive" if r["returns"] == 1 else f"power {r['returns']}",
            r["steps"], f"{r['accuracy']:.2f}", f"{r['loss']:.3f}",
        ]
        for r in ordered
    ]  # fmt: skip
    return table(["score", "per cost", "returns", "steps", "accuracy", "loss"], body)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20a")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data-dir")
    parser.add_argument("--macs", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
