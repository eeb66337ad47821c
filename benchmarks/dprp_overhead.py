"""What DPRP costs at full rank, what it saves as ranks fall, and how long a rank event takes.

    python -m benchmarks.dprp_overhead [--networks resnet20 ...] [--blocks 8] [--block 4]

Batches of 128 random CIFAR-sized images, bf16, channels_last, one thread, SGD, as in ``benchmarks.tcp_overhead``.  Three
networks take turns, block by block: plain training of the dense one, DPRP at full rank (penalties and gradient readings
included, before its first event), and DPRP after its last event at half the parameters.  Ratios are medians over blocks.
*Event*: turning the factors of all layers, momentum included, with ``--event-threads`` threads; the best of three, since
other work on the machine can only add to it.  *Memory*: parameters and momentum at full rank, relative to dense.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import asdict
from statistics import median
from typing import Any

import torch

import espalier as es
from benchmarks import common
from benchmarks.tcp_overhead import RECIPE, Trainer, network
from espalier.methods.dprp import DPRP, Falling

NETWORKS = ("resnet20", "resnet56", "vgg16_bn")
BUDGET = es.Budget(params=0.5)
EXAMPLE = torch.zeros(1, 3, 32, 32)


def started(name: str, method: DPRP) -> tuple[Trainer, Falling]:
    model = network(name)
    process = method.start(model, EXAMPLE, BUDGET)
    return Trainer(model, process=process), process


def standing_at(progress: float) -> Iterator[float]:
    while True:
        yield progress


def measured(name: str, method: DPRP, *, blocks: int, block: int, threads: int) -> dict[str, Any]:
    plain = Trainer(network(name))
    full, process = started(name, method)
    small, falling = started(name, method)
    still = standing_at(0.0)
    for trainer in (plain, full, small):
        trainer.run(still, 2)
    event_full = event_seconds(full, process, threads=threads)
    held = sum(p.numel() for p in full.model.parameters()) / sum(p.numel() for p in plain.model.parameters())
    arrive(small, falling)
    event_small = event_seconds(small, falling, threads=threads)
    times = [[trainer.run(still, block) for trainer in (plain, full, small)] for _ in range(blocks)]
    cost = falling.cost.fraction_of(falling.dense)
    return {
        "network": name,
        "plain ms per step": 1e3 * median(row[0] for row in times) / block,
        "full rank": common.spread([row[1] / row[0] for row in times]),
        "half the parameters": common.spread([row[2] / row[0] for row in times]),
        "MACs then": cost["macs"],
        "parameters then": cost["params"],
        "event ms, full rank": 1e3 * event_full,
        "event ms, at the end": 1e3 * event_small,
        "memory of weights and momentum": held,
        "layers": len(process.layers),
        "forms": {
            form: sum(layer.form == form for layer in process.layers.values()) for form in ("channel", "spatial")
        },
    }


def arrive(trainer: Trainer, process: Falling) -> None:
    """Let the ranks fall in as few steps as there are events."""
    progress = process.method.start_at
    while not process.done:
        trainer.run(standing_at(progress), 1)
        progress += process.method.every


def event_seconds(trainer: Trainer, process: Falling, *, threads: int) -> float:
    from espalier.surgery import turn_factors

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    found = []
    for _ in range(3):
        begin = time.perf_counter()
        for layer_name, layer in process.layers.items():
            turn_factors(layer, name=layer_name, optimizer=trainer.optimizer)
        found.append(time.perf_counter() - begin)
    torch.set_num_threads(before)
    return min(found)


def as_table(rows: list[dict[str, Any]]) -> str:
    headers = ["network", "ms", "full rank", "at the end", "MACs then", "event, full", "event, end", "memory"]
    body = [
        [
            r["network"], f"{r['plain ms per step']:.0f}", f"{r['full rank']['median']:.3f}",
            f"{r['half the parameters']['median']:.3f}", f"{r['MACs then']:.3f}",
            f"{r['event ms, full rank']:.0f} ms", f"{r['event ms, at the end']:.0f} ms",
            f"{r['memory of weights and momentum']:.2f}",
        ]
        for r in rows
    ]  # fmt: skip
    return (
        common.table(headers, body)
        + "\nsteps relative to dense training; goals: full rank 1.15, event 100 ms (ResNet-56)"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--block", type=int, default=4, help="steps between turns")
    parser.add_argument("--event-threads", type=int, default=2)
    parser.add_argument("--form", default="auto")
    parser.add_argument("--name", default="dprp_overhead", help="of the results file")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    method = DPRP(form=chosen.form)
    rows = []
    for name in chosen.networks:
        row = measured(name, method, blocks=chosen.blocks, block=chosen.block, threads=chosen.event_threads)
        rows.append(row)
        print("\n".join(as_table([row]).splitlines()[2:-1]), flush=True)
    settings = {
        "method": asdict(method),
        "recipe": RECIPE.to_dict(),
        "params": 0.5,
        "event threads": chosen.event_threads,
    }
    content = {"environment": common.environment(), "settings": settings, "rows": rows}
    path = common.write_results(chosen.name, common.rounded(content))
    print(as_table(rows))
    print(f"written to {path.relative_to(common.ROOT)}")


if __name__ == "__main__":
    main()
