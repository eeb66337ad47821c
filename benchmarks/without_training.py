"""What is left of a network that is cut to a budget and never trained: one-shot methods, plain and with a few images.

    python -m benchmarks.without_training --model resnet20a --weights resnet20-12fca82f.th --data-dir D

``--weights`` is looked for in ``D/weights``.  Every way of cutting at 70, 50 and 30 % of the MACs (``--macs`` for one of them),
judged by the whole test set; the images to calibrate by are training images, drawn anew for every seed.  Rows of other
networks and budgets in the results stay, and what is there already is not run again.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import environment, read_results, rounded, table, write_results
from espalier.methods.base import Method
from espalier.methods.magnitude import Magnitude
from espalier.methods.scoring import recalibrate_batchnorm
from espalier.methods.svd_oneshot import SVDOneShot
from espalier.plan import Budget
from espalier.run.compress import compress
from espalier.run.data import Data, load_data
from espalier.run.evaluate import evaluate
from espalier.run.models import build_model, load_weights

NAME = "without_training"
BUDGETS, SEEDS = (0.7, 0.5, 0.3), (0, 1, 2)
BATCH, BATCHES = 128, 8
WAYS: dict[str, tuple[Method, bool]] = {
    "ranks by the outputs, BatchNorm follows": (SVDOneShot(), True),
    "ranks, BatchNorm follows": (SVDOneShot(whiten=False), True),
    "ranks": (SVDOneShot(), False),
    "channels by share, BatchNorm follows": (Magnitude(score="share"), True),
    "channels, BatchNorm follows": (Magnitude(), True),
    "channels": (Magnitude(), False),
}
"""What the table calls it -> the method, and whether it sees images."""


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    data = load_data("cifar10", data_dir=options.data_dir)
    assert isinstance(data, Data)
    model = build_model(options.model, num_classes=data.num_classes)
    load_weights(model, Path(options.data_dir) / "weights" / options.weights)
    model.eval()
    whole = evaluate(model, data.test_batches())["accuracy"]
    anew = read_results(NAME).get(options.model, {}).get("anew") or [estimated_anew(model, data, s) for s in SEEDS]
    for macs, (label, (method, sees)) in product(options.macs, WAYS.items()):
        results = read_results(NAME)
        rows = results.get(options.model, {}).get("rows", [])
        if any((r["macs"], r["label"]) == (macs, label) for r in rows):
            continue  # a run that was stopped goes on
        found = [accuracy(model, data, method, macs, seed if sees else None) for seed in (SEEDS if sees else (0,))]
        rows.append({"macs": macs, "label": label, "accuracy": found})
        content = {"dense": whole, "anew": anew, "images": BATCH * BATCHES, "rows": rows, **environment()}
        results[options.model] = rounded(content, 6)
        write_results(NAME, results)
        print(rows[-1], flush=True)
    print(as_table(read_results(NAME)))


def accuracy(model: nn.Module, data: Data, method: Method, macs: float, seed: int | None) -> float:
    """On the test set, without any training; ``seed`` draws the images to calibrate by, ``None``: there are none."""
    given: Any = data.example()
    if seed is not None:
        given = list(data.calibration_batches(batch_size=BATCH, batches=BATCHES, seed=seed))
    small = compress(model, given, budget=Budget(macs=macs), method=method).model
    return evaluate(small, data.test_batches())["accuracy"]


def estimated_anew(model: nn.Module, data: Data, seed: int) -> float:
    """What plain averages over the images make of the whole network: why the statistics follow by differences instead."""
    twin = copy.deepcopy(model)
    recalibrate_batchnorm(twin, data.calibration_batches(batch_size=BATCH, batches=BATCHES, seed=seed), BATCHES)
    return evaluate(twin, data.test_batches())["accuracy"]


def as_table(results: dict[str, Any]) -> str:
    """A row for every way, a column for every network and budget; mean and spread over seeds where there are some."""
    columns = [(model, macs) for model in results for macs in BUDGETS]
    found = {(m, r["macs"], r["label"]): r["accuracy"] for m, content in results.items() for r in content["rows"]}
    body = [["as it was", *(f"{results[m]['dense']:.2f}" for m, _ in columns)]]
    body += [["nothing cut, BatchNorm estimated anew", *(_spread(results[m].get("anew")) for m, _ in columns)]]
    body += [[label, *(_spread(found.get((m, macs, label))) for m, macs in columns)] for label in WAYS]
    return table(["", *(f"{m}, {macs:.0%} of the MACs" for m, macs in columns)], body)


def _spread(values: list[float] | None) -> str:
    if not values:
        return "not run"
    return f"{values[0]:.2f}" if len(values) == 1 else f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20a")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--macs", type=float, nargs="+", choices=BUDGETS, default=BUDGETS)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
