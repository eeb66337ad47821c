"""How much faster two processes train than one, on the same global batch, and what agreeing costs them.

    python -m benchmarks.processes [--rounds N] [--steps N]

ResNet-20 at 32 x 32 under TCP, which decides and presses in the epoch that is timed, random images, one thread a process: two
processes (forked by torchrun's own engine, messages by gloo), one, and one with two threads.  The fastest round counts.
Agreement is all that a process spends in messages and around them, waiting for the other one included: gradients, scores,
losses, comparing plans.  Its work is the part of that which a processor spends, what is left is waiting: for the other process
where that one is slower, and for whatever else this machine runs.  Needs two idle cores; the load is recorded.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import espalier as es
from benchmarks import common
from espalier.methods import base, importance, pressure
from espalier.run import loop
from espalier.run.data import Data, Split
from espalier.run.loop import train
from espalier.run.models import build_model
from espalier.run.recipe import Recipe

AGREEING = (
    (loop, "reduce_gradients"),
    (loop, "average_"),
    (importance, "average_"),
    (pressure, "check_run"),
    (base, "check_run"),
)
"""Where training steps agree."""
BATCH = 128


def images(number: int) -> Data:
    random = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        pictures = torch.randint(256, (count, 3, 32, 32), generator=random, dtype=torch.uint8)
        return Split(pictures, torch.randint(10, (count,), generator=random))

    return Data("random", 10, 3, 32, split(number), split(BATCH), split(0), (0.5,) * 3, (0.25,) * 3, pad=4, flip=True)


def measured(steps: int, threads: int) -> dict[str, float]:
    """Images per second of the second of three epochs, all processes together, and the share of the time spent on agreement."""
    torch.set_num_threads(threads)
    spent = [0.0, 0.0]  # seconds by the clock, and on the processor
    before = [(module, name, getattr(module, name)) for module, name in AGREEING]
    for module, name, function in before:
        setattr(module, name, _timed(function, spent))
    try:
        torch.manual_seed(0)
        model = build_model("resnet20", num_classes=10)
        budget = es.Budget(macs=0.5)
        run = es.attach(model, torch.zeros(1, 3, 32, 32), budget=budget, method=es.TCP(start_at=0.34, end_at=0.66))
        recipe = Recipe(epochs=3, batch_size=BATCH, device="cpu")
        marks: list[list[float]] = []
        dist_on = dist.is_initialized()
        history = train(model, images(steps * BATCH), recipe, run=run, on_epoch=lambda _: marks.append(list(spent)))
        if not marks:  # only the first process is told
            marks = [[0.0, 0.0], [each / 3 for each in spent]]
        seconds = history.epochs[1].seconds
        agreed, worked = ((after - before) / seconds * dist_on for before, after in zip(*marks[:2], strict=True))
        return {"images per second": steps * BATCH / seconds, "agreement": agreed, "work of it": worked}
    finally:
        for module, name, function in before:
            setattr(module, name, function)


def _timed(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def called(*arguments: Any, **options: Any) -> Any:
        begun = time.perf_counter(), time.process_time()
        try:
            return function(*arguments, **options)
        finally:
            spent[0] += time.perf_counter() - begun[0]
            spent[1] += time.process_time() - begun[1]

    return called


def _one_of_two(steps: int) -> dict[str, float]:
    dist.init_process_group("gloo")
    return measured(steps, 1)


def two(steps: int) -> dict[str, float]:
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, run_id="processes", rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        max_restarts=0, start_method="fork", monitor_interval=0.1,
    )  # fmt: skip
    found: dict[str, float] = elastic_launch(config, _one_of_two)(steps)[0]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30, help="in an epoch")
    arguments = parser.parse_args()
    kinds: dict[str, Callable[[], dict[str, float]]] = {
        "two processes": lambda: two(arguments.steps),
        "one process": lambda: measured(arguments.steps, 1),
        "one process, two threads": lambda: measured(arguments.steps, 2),  # last: its pool does not live through a fork
    }
    rounds: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for _ in range(arguments.rounds):  # in turns: what else the machine does meets both
        for kind in ("two processes", "one process"):
            rounds[kind].append(kinds[kind]())
    for _ in range(arguments.rounds):
        rounds["one process, two threads"].append(kinds["one process, two threads"]())
    best = {kind: max(found, key=lambda row: row["images per second"]) for kind, found in rounds.items()}
    speed = {kind: row["images per second"] for kind, row in best.items()}
    summary = {
        "speed-up": speed["two processes"] / speed["one process"],
        "speed-up of two threads": speed["one process, two threads"] / speed["one process"],
        "agreement": best["two processes"]["agreement"],
        "work of it": best["two processes"]["work of it"],
    }
    content = {
        "environment": common.environment(), "network": "resnet20", "batch": BATCH, "steps": arguments.steps,
        "rounds": rounds, "summary": summary,
    }  # fmt: skip
    common.write_results("processes", common.rounded(content))
    print(common.table(["", "images per second"], [[kind, f"{value:.0f}"] for kind, value in speed.items()]))
    agreed = f"{summary['agreement']:.1%} of a step on agreement, {summary['work of it']:.1%} without waiting"
    print(f"two processes {summary['speed-up']:.2f}x, {agreed}")


if __name__ == "__main__":
    main()
