"""Does removing channels in the middle of training change the network?  Logits and accuracy around every removal.

    python -m benchmarks.removal [--data-dir D]

Short TCP runs to half of the MACs, from a trained network: CIFAR ResNet-20 on scikit-learn's digits (trained here first), and,
with ``--data-dir`` and ``--weights``, the same on CIFAR-10.  Right before and right after each surgery the test images pass
through the network in eval mode; the difference of the logits is relative to the largest logit.  Both in float32, in which
sums over fewer channels round differently, and in float64, which tells rounding from a real change.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import espalier as es
from benchmarks import common
from espalier.methods.base import Removed, Run
from espalier.methods.scoring import modes_kept
from espalier.run.data import Data
from espalier.run.loop import train

BUDGET = es.Budget(macs=0.5)


class Witness:
    """Looks at the network before and after every removal of one run."""

    def __init__(self, run: Run, data: Data, images: int) -> None:
        self.run, self.rows = run, list[dict[str, Any]]()
        self.dense = run.cost.macs
        self.labels = data.test.labels[:images]
        self.images = torch.cat([x for x, _ in data.test_batches(500)])[:images]
        self._remove = run.remove
        run.remove = self.remove  # type: ignore[method-assign]

    def remove(self, units: Mapping[str, np.ndarray], optimizer: torch.optim.Optimizer | None) -> Removed:
        before = self._logits()
        removed = self._remove(units, optimizer)
        after = self._logits()
        row: dict[str, Any] = {"macs": removed.cost.macs / self.dense, "in training": optimizer is not None}
        for kind in before:
            row[f"difference, {kind}"] = _difference(before[kind], after[kind])
        row["accuracy before"] = self._accuracy(before["float32"])
        row["accuracy after"] = self._accuracy(after["float32"])
        self.rows.append(row)
        return removed

    def _logits(self) -> dict[str, Tensor]:
        model = self.run.model
        with modes_kept(model), torch.no_grad():
            model.eval()
            exact = _bare(model).double()
            return {
                "float32": torch.cat([model(x) for x in self.images.split(500)]),
                "float64": torch.cat([exact(x.double()) for x in self.images.split(500)]),
            }

    def _accuracy(self, logits: Tensor) -> float:
        return 100.0 * float((logits.argmax(1) == self.labels).double().mean())


def _bare(model: nn.Module) -> nn.Module:
    """A copy to which nobody listens."""
    private = copy.deepcopy(model)
    for module in private.modules():
        module._forward_pre_hooks.clear()
    return private


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / one.abs().max())


def one_run(model: nn.Module, data: Data, recipe: es.Recipe, *, images: int) -> dict[str, Any]:
    """Train with TCP; what was seen at every removal, and accuracies by epoch."""
    teacher = copy.deepcopy(model)
    run = es.attach(model, data.example(), budget=BUDGET, method=es.TCP())
    witness = Witness(run, data, images)
    history = train(model, data, recipe, run=run, teacher=teacher)
    run.finish()
    return {
        "data": data.name,
        "images": images,
        "recipe": recipe.to_dict(),
        "accuracy by epoch": [e.accuracy for e in history.epochs],
        "macs at the end": run.cost.macs / witness.dense,
        "forced at the end": bool(getattr(run, "forced", False)),
        "removals": witness.rows,
    }


def on_digits(*, epochs: int = 15, seed: int = 0) -> dict[str, Any]:
    data = es.load_data("digits")
    assert isinstance(data, Data)
    torch.manual_seed(seed)
    model = es.build_model("resnet20", num_classes=10, in_channels=1, image_size=8)
    recipe = es.Recipe(epochs=epochs, batch_size=64, seed=seed, device="cpu", threads=1)
    train(model, data, replace(recipe, distill=0.0))
    return one_run(model, data, recipe, images=len(data.test))


def on_cifar(data_dir: str, weights: str, *, epochs: int, train_images: int = 12_800, seed: int = 0) -> dict[str, Any]:
    data = es.load_data("cifar10", data_dir=data_dir)
    assert isinstance(data, Data)
    data = replace(data, train=data.train[slice(train_images)], test=data.test[slice(2000)])
    model = es.build_model("resnet20a", num_classes=10)
    es.load_weights(model, weights)
    recipe = es.Recipe(epochs=epochs, precision="bf16", channels_last=True, seed=seed, device="cpu", threads=1)
    return {"train images": train_images, **one_run(model, data, recipe, images=1000)}


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "data": run["data"],
            "removals in training": sum(r["in training"] for r in run["removals"]),
            "largest difference, float32": max(r["difference, float32"] for r in run["removals"]),
            "largest difference, float64": max(r["difference, float64"] for r in run["removals"]),
            "largest change of accuracy": max(abs(r["accuracy after"] - r["accuracy before"]) for r in run["removals"]),
            "forced at the end": run["forced at the end"],
            "accuracy at the end": run["accuracy by epoch"][-1],
            "macs at the end": run["macs at the end"],
        }
        for run in runs
    ]


def as_table(runs: list[dict[str, Any]]) -> str:
    body = []
    for run in runs:
        for number, r in enumerate(run["removals"]):
            body.append(
                [
                    f"{run['data']} {number + 1}", f"{r['macs']:.3f}", f"{r['difference, float32']:.1e}",
                    f"{r['difference, float64']:.1e}", f"{r['accuracy before']:.2f}", f"{r['accuracy after']:.2f}",
                    "" if r["in training"] else "at the end",
                ]
            )  # fmt: skip
    return common.table(["removal", "MACs left", "float32", "float64", "accuracy before", "after", "forced"], body)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--digits-epochs", type=int, default=15)
    parser.add_argument("--data-dir", help="of CIFAR-10")
    parser.add_argument("--weights", help="of ResNet-20 (option A) on CIFAR-10")
    parser.add_argument("--cifar-epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="removal", help="of the results file")
    chosen = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    runs = [on_digits(epochs=chosen.digits_epochs, seed=chosen.seed)]
    if chosen.data_dir and chosen.weights:
        runs.append(on_cifar(chosen.data_dir, chosen.weights, epochs=chosen.cifar_epochs, seed=chosen.seed))
    report = summarise(runs)
    content = {
        "environment": common.environment(),
        "settings": {"budget": asdict(BUDGET), "method": asdict(es.TCP()), "seed": chosen.seed},
        "summary": report,
        "runs": runs,
    }
    path = common.write_results(chosen.name, common.rounded(content, 6))
    print(as_table(runs))
    print(json.dumps(common.rounded(report), indent=1))
    print(f"written to {path.relative_to(common.ROOT)}")


if __name__ == "__main__":
    main()
