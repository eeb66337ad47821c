"""Accuracy at an equal budget: every method trains with the same recipe, data, teacher and seeds.

    python -m benchmarks.accuracy --model resnet20a --weights resnet20.th --data cifar10 --data-dir D --epochs 20

One row per (method, seed), written to ``benchmarks/results/accuracy.json`` as soon as it is done; rows that exist are not
run again.  Accuracy is that of the last epoch on the test set.  Methods: ``dense`` (the same training, nothing removed),
``magnitude`` or ``magnitude:SCORE`` (one shot, then fine-tuning), ``tcp`` or ``tcp:SCORE``, ``torch-pruning`` (group norm,
global, in small steps to the target, then fine-tuning), ``tt-lc`` and ``tt-once`` (the same forms and ranks, decomposed once,
then fine-tuning; ``tt-once`` searches nothing).
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from benchmarks.common import environment, read_results, rounded, table, torch_pruning, write_results
from espalier.costs import Cost, cost
from espalier.graph import trace
from espalier.methods.magnitude import Magnitude
from espalier.methods.tcp import TCP
from espalier.methods.tt_lc import TTLC
from espalier.plan import Budget
from espalier.run.data import Data, load_data, set_aside
from espalier.run.evaluate import evaluate
from espalier.run.loop import History, train
from espalier.run.models import build_model, load_weights
from espalier.run.recipe import Recipe

NAME = "accuracy"


def main() -> None:
    options = arguments()
    data = load_data(options.data, data_dir=options.data_dir, holdout=options.holdout)
    assert isinstance(data, Data)
    dense = build_model(
        options.model, num_classes=data.num_classes, in_channels=data.in_channels, image_size=data.image_size
    )
    if options.weights:
        load_weights(dense, options.weights)
    for seed in [int(s) for s in options.seeds.split(",")]:
        for method in options.methods.split(","):
            recipe = Recipe(
                epochs=options.epochs, batch_size=options.batch_size, lr=options.lr, warmup_epochs=options.warmup,
                distill=0.5 if options.distill else 0.0, precision=options.precision, channels_last=True,
                threads=options.threads, seed=seed,
            )  # fmt: skip
            setting = {
                "model": options.model, "trained": bool(options.weights), "data": options.data, "method": method,
                "macs": options.macs, "multiple_of": options.multiple_of, "settings": options.set,
                "recipe": {k: v for k, v in recipe.to_dict().items() if k not in ("threads", "device")},
            }  # fmt: skip
            key = hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:12]
            if key in read_results(NAME).get("rows", {}):
                continue
            row = one(dense, data, method, recipe, options)
            rows = {**read_results(NAME).get("rows", {}), key: rounded({**setting, **row, **environment()}, 8)}
            write_results(NAME, {"rows": rows})
    print(summary(read_results(NAME).get("rows", {})))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20a")
    parser.add_argument("--weights")
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--data-dir")
    parser.add_argument("--macs", type=float, default=0.5)
    parser.add_argument("--multiple-of", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--warmup", type=float, default=0.5)
    parser.add_argument("--methods", default="dense,magnitude:taylor,torch-pruning,tcp")
    parser.add_argument("--set", default="", help="TCP settings, for example reach=0.4,fade=0.05")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--holdout", type=int, default=0)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--distill", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


def one(dense: nn.Module, data: Data, method: str, recipe: Recipe, options: argparse.Namespace) -> dict[str, Any]:
    """Train one network; returns accuracy, cost, time and the curve."""
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(recipe.threads or 1)
    example = data.example()
    whole = cost(trace(dense, example))
    model = copy.deepcopy(dense)
    budget = Budget(macs=options.macs, multiple_of=options.multiple_of)
    kind, _, score = method.partition(":")
    process = None
    started = time.perf_counter()
    if kind == "magnitude":
        batches = list(data.calibration_batches(batch_size=128, batches=8, seed=recipe.seed))
        cut = Magnitude(**({"score": score} if score else {})).start(model, example, budget, batches=batches)
        model = cut.finish()
    elif kind == "torch-pruning":
        model = peer(model, example, options.macs)
    elif kind == "tcp":
        settings = {k: float(v) for k, v in (pair.split("=") for pair in options.set.split(",") if pair)}
        process = TCP(**({"importance": score} if score else {}), **settings).start(model, example, budget)
    elif kind == "tt-once":
        model = TTLC(search=0).start(model, example, budget).finish()
    elif kind == "tt-lc":
        method_of = TTLC()
        kept = set_aside(data, method_of.withholds)
        assert isinstance(kept, Data)
        data = kept  # what is held out is not trained on; the test images are the same
        batches = list(data.calibration_batches(batch_size=128, batches=8, seed=recipe.seed))
        process = method_of.start(model, example, budget, batches=batches)
        process.held_out = list(data.holdout_batches())
    elif kind != "dense":
        raise SystemExit(f"unknown method {method!r}")
    before = _accuracy(model, data, recipe)
    teacher = copy.deepcopy(dense) if recipe.distill else None

    def progress(history: History) -> None:
        last = history.last
        print(
            f"{method} seed {recipe.seed} epoch {last.epoch} loss {last.loss:.3f} accuracy {last.accuracy:.2f} "
            f"macs {last.macs / whole.macs if last.macs else 1:.3f} {last.seconds:.0f}s",
            flush=True,
        )

    history = train(model, data, recipe, process=process, teacher=teacher, on_epoch=progress)
    if process is not None:
        model = process.finish()
    small: Cost = cost(trace(model, example))
    return {
        "before_training": before,
        "accuracy": _accuracy(model, data, recipe),
        "macs_left": small.macs / whole.macs,
        "params_left": small.params / whole.params,
        "forced": bool(getattr(process, "forced", False)),
        "seconds": time.perf_counter() - started,
        "curve": [e.accuracy for e in history.epochs],
        "epoch_seconds": [e.seconds for e in history.epochs],
        "widths": {n: m.out_channels for n, m in model.named_modules() if isinstance(m, nn.Conv2d)},
    }


def _accuracy(model: nn.Module, data: Data, recipe: Recipe) -> float:
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return evaluate(model, data.test_batches(500, channels_last=True), precision=recipe.precision)["accuracy"]


def peer(model: nn.Module, example: torch.Tensor, target: float) -> nn.Module:
    """torch-pruning: group norm, global, in small steps until the MACs are at or below the target."""
    tp = torch_pruning()
    ignored: list[nn.Module] = [m for n, m in model.named_modules() if n in ("linear", "fc", "classifier")]
    if any(type(m).__name__ == "ChannelPad" for m in model.modules()):
        # its graph cannot adjust the zero padding of option A shortcuts: inner widths only
        ignored += [m for n, m in model.named_modules() if n == "conv1" or n.endswith(".conv2")]
    pruner = tp.pruner.GroupNormPruner(
        model, example, importance=tp.importance.GroupMagnitudeImportance(p=2), global_pruning=True,
        iterative_steps=200, pruning_ratio=0.98, ignored_layers=ignored,
    )  # fmt: skip
    whole = tp.utils.count_ops_and_params(model, example)[0]
    for _ in range(200):
        pruner.step()
        if tp.utils.count_ops_and_params(model, example)[0] <= target * whole:
            return model
    raise SystemExit("torch-pruning did not reach the target")


def summary(rows: Mapping[str, Any]) -> str:
    """Mean and spread over seeds, as a Markdown table."""
    settings: dict[tuple[Any, ...], list[Any]] = {}
    for row in rows.values():
        key = (row["model"], row["data"], row["macs"], row["recipe"]["epochs"], row["recipe"]["distill"] > 0)
        settings.setdefault((*key, row["method"] + (f" ({row['settings']})" if row["settings"] else "")), []).append(
            row
        )
    lines = []
    for (model, data, macs, epochs, distilled, method), found in sorted(settings.items(), key=str):
        scores = [r["accuracy"] for r in found]
        spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
        lines.append(
            [
                f"{model}, {data}, {epochs} epochs{', distilled' if distilled else ''}", method, macs,
                f"{statistics.mean(r['macs_left'] for r in found):.4f}",
                f"{statistics.mean(r['params_left'] for r in found):.3f}",
                f"{statistics.mean(r['before_training'] for r in found):.2f}",
                f"{statistics.mean(scores):.2f}{spread}", len(scores),
            ]
        )  # fmt: skip
    return table(["setting", "method", "asked", "MACs left", "params left", "before", "accuracy", "seeds"], lines)


if __name__ == "__main__":
    main()
