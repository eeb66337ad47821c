"""What DPRP costs at full rank, what it saves as ranks fall, and how long a rank event takes.

    python -m benchmarks.dprp_overhead [--networks resnet20 ...] [--blocks 8] [--block 1]

Batches of 128 random CIFAR-sized images, bf16, channels_last, one thread, SGD, as in ``benchmarks.tcp_overhead``.  Four
networks take turns, block by block: plain training of the dense one, DPRP while all layers are whole (gradient readings
included, before its first event), DPRP with all layers split at full rank (penalties too), and DPRP after its last event at
half the parameters.  Ratios are medians over blocks, of processor time, for which other work on the machine hardly counts, and
of time on the clock.
*Event*: turning the factors of all layers, momentum included, with ``--event-threads`` threads; the best of ``--events``, since
other work on the machine can only add to it.  Before each the factors are disturbed by ``DRIFT``, about as much as
training between two events does.  *Off*: the largest error of an event, relative in the weights, and absolute in ``U^T U - I``.
*Memory*: of weights and momentum at full rank, and of these, gradients and what forward keeps for backward, relative to dense.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import espalier as es
from benchmarks import common
from benchmarks.tcp_overhead import RECIPE, Trainer, network
from espalier.methods.dprp import DPRP, DPRPRun
from espalier.run.evaluate import autocast
from espalier.surgery import change_bases

NETWORKS = ("resnet20", "resnet56", "vgg16_bn")
BUDGET = es.Budget(params=0.5)
EXAMPLE = torch.zeros(1, 3, 32, 32)


def started(name: str, method: DPRP) -> tuple[Trainer, DPRPRun]:
    model = network(name)
    run = method.start(model, EXAMPLE, BUDGET)
    return Trainer(model, run=run), run


def standing_at(progress: float) -> Iterator[float]:
    while True:
        yield progress


def measured(name: str, method: DPRP, *, blocks: int, block: int, threads: int, events: int) -> dict[str, Any]:
    plain = Trainer(network(name))
    whole, _ = started(name, method)
    full, run = started(name, method)
    small, falling = started(name, method)
    still = standing_at(0.0)
    for trainer in (plain, whole, full, small):
        trainer.run(still, 2)
    run.split(run.layers, optimizer=full.optimizer)
    full.run(still, 2)
    event_full = event(full, run, threads=threads, events=events)
    weights = [parameter_bytes(trainer) for trainer in (full, plain)]
    in_all = [3 * parameter_bytes(trainer) + kept_for_backward(trainer) for trainer in (full, plain)]
    arrive(small, falling)
    event_small = event(small, falling, threads=threads, events=events)
    times = [[timed(trainer, still, block) for trainer in (plain, whole, full, small)] for _ in range(blocks)]
    cost = falling.cost.fraction_of(falling.dense)
    row: dict[str, Any] = {"network": name}
    for clock, label in enumerate(CLOCKS):
        row[label] = {
            "plain ms per step": 1e3 * median(turn[0][clock] for turn in times) / block,
            **{
                place: common.spread([turn[number][clock] / turn[0][clock] for turn in times])
                for number, place in enumerate(PLACES, start=1)
            },
        }
    return {
        **row,
        "MACs then": cost["macs"],
        "parameters then": cost["params"],
        "event, full rank": event_full,
        "event, at the end": event_small,
        "memory of weights and momentum": weights[0] / weights[1],
        "memory of a step": in_all[0] / in_all[1],
        "layers": len(run.layers),
        "forms": {form: sum(layer.form == form for layer in run.layers.values()) for form in ("channel", "spatial")},
    }


CLOCKS = ("processor time", "clock")
PLACES = ("whole", "full rank", "half the parameters")


def timed(trainer: Trainer, progress: Iterator[float], steps: int) -> tuple[float, float]:
    """Seconds of processor time and on the clock."""
    before = time.process_time()
    wall = trainer.run(progress, steps)
    return time.process_time() - before, wall


def parameter_bytes(trainer: Trainer) -> int:
    return sum(p.numel() * p.element_size() for p in trainer.model.parameters())


def kept_for_backward(trainer: Trainer) -> int:
    """Bytes that a forward in training keeps, parameters apart."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x, y = trainer.data[0]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with autocast(x.device, RECIPE.precision):
            logits = trainer.model(x).float()
        loss = F.cross_entropy(logits, y)
        assert loss.requires_grad
        own = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
    return sum(size for place, size in kept.items() if place not in own)


def arrive(trainer: Trainer, run: DPRPRun) -> None:
    """Let the ranks fall in as few steps as there are events."""
    progress = run.method.start_at
    while not run.done:
        trainer.run(standing_at(progress), 1)
        progress += run.method.every


def event(trainer: Trainer, run: DPRPRun, *, threads: int, events: int) -> dict[str, float]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    layers = {n: layer for n, layer in run.layers.items() if not layer.whole}
    row: dict[str, float] = {"ms": math.inf, "processor ms": math.inf, "weight": 0.0, "orthonormal": 0.0}
    for _ in range(events):
        with torch.no_grad():
            for layer in layers.values():
                for factor in (layer.u, layer.v):
                    factor.add_(torch.randn_like(factor), alpha=DRIFT / factor.shape[0] ** 0.5)
            weights = {n: layer.weight.double() for n, layer in layers.items()}
        begin = time.perf_counter(), time.process_time()
        change_bases(layers, optimizer=trainer.optimizer)
        row["ms"] = min(row["ms"], 1e3 * (time.perf_counter() - begin[0]))
        row["processor ms"] = min(row["processor ms"], 1e3 * (time.process_time() - begin[1]))
        with torch.no_grad():
            for n, layer in layers.items():
                error = float((layer.weight.double() - weights[n]).norm() / weights[n].norm())
                row["weight"] = max(row["weight"], error)
                for factor in (layer.u.double(), layer.v.double()):
                    off = factor.T @ factor - torch.eye(layer.rank, dtype=torch.float64)
                    row["orthonormal"] = max(row["orthonormal"], float(off.abs().max()))
    torch.set_num_threads(before)
    return row


DRIFT = 0.08  # standard deviation of a column's entries, times the root of their number


def as_table(rows: list[dict[str, Any]]) -> str:
    headers = [
        "network", "ms", "whole", "full rank", "at the end", *(f"clock, {p}" for p in PLACES), "MACs then",
        "event, full", "event, end",
        "off: M", "U^T U", "weights", "memory",
    ]  # fmt: skip
    body = []
    for r in rows:
        ours, wall, full, end = (r[k] for k in (*CLOCKS, "event, full rank", "event, at the end"))
        ratios = [f"{t[k]['median']:.3f}" for t in (ours, wall) for k in PLACES]
        body.append([
            r["network"], f"{wall['plain ms per step']:.0f}", *ratios, f"{r['MACs then']:.3f}",
            *(f"{e['ms']:.0f} ms ({e['processor ms']:.0f})" for e in (full, end)),
            f"{full['weight']:.1e}", f"{full['orthonormal']:.1e}",
            f"{r['memory of weights and momentum']:.2f}", f"{r['memory of a step']:.2f}",
        ])  # fmt: skip
    return (
        common.table(headers, body)
        + "\nsteps relative to dense training, processor time and clock; events on the clock (processor "
        "time of all threads); goals: full rank 1.15, event 100 ms (ResNet-56)"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--block", type=int, default=1, help="steps between turns")
    parser.add_argument("--event-threads", type=int, default=2)
    parser.add_argument("--events", type=int, default=10, help="of which the best counts")
    parser.add_argument("--form", default="auto")
    parser.add_argument("--name", default="dprp_overhead", help="of the results file")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    method = DPRP(form=chosen.form)
    rows = []
    for name in chosen.networks:
        row = measured(
            name, method, blocks=chosen.blocks, block=chosen.block, threads=chosen.event_threads, events=chosen.events
        )
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
