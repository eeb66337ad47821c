"""Speed by the multiple that widths are held to: half of the MACs, ONNX Runtime, one thread; or PyTorch on a GPU.

    python -m benchmarks.alignment [--networks ...] [--name alignment]
    python -m benchmarks.alignment --device cuda --name alignment_gpu [--size 224]     # float16, channels last

Which units go is drawn by chance, so that free widths are what they come to be in a run: any number.  All networks of a row are
timed in turns, in one run, and compared with the dense one, as ratios.  ``docs/results.md`` shows it.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from torch import nn

import espalier as es
from benchmarks import common
from espalier.run.latency import depthwise, latency, slow_widths
from espalier.solver import solve
from espalier.surgery import shrink

NETWORKS = (
    "cifar:resnet20", "cifar:vgg16_bn", "resnet18", "resnet50",
    "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "efficientnet_b0", "mnasnet1_0",
)  # fmt: skip
MULTIPLES = (1, 4, 8, 16)
MACS = 0.5
BATCHES = {"cpu": (1, 16), "cuda": (1, 256)}


def narrowed(model: nn.Module, x: torch.Tensor, multiple: int) -> tuple[nn.Module, es.Cost]:
    """The network at half of the MACs, units chosen by chance, and what it costs."""
    graph = es.trace(model, x)
    chance = np.random.default_rng(0)
    plan = solve(
        graph, {g.name: chance.random(g.size) for g in graph.groups}, es.Budget(macs=MACS, multiple_of=multiple)
    )
    return shrink(model, graph, plan).eval(), es.cost(graph, plan)


def one_network(name: str, *, seconds: float, device: str = "cpu", size: int | None = None) -> dict[str, Any]:
    """Speed-ups over the dense network, by multiple and batch size."""
    model, x = common.build(name).eval(), common.example(name)[:1]
    dense = es.cost(es.trace(model, x, rehearse=False)).macs
    small = {multiple: narrowed(model, x, multiple) for multiple in MULTIPLES}
    models = {"dense": model, **{str(multiple): network for multiple, (network, _) in small.items()}}
    backend = "onnxruntime"
    if device != "cpu":
        backend, kind = "torch", {"dtype": torch.float16, "memory_format": torch.channels_last}
        x = (torch.randn(1, 3, size, size) if size else x).to(device, **kind)
        models = {label: network.to(device, **kind) for label, network in models.items()}
    timings = latency(models, x, backend=backend, batch_sizes=BATCHES[x.device.type], seconds=seconds)
    return {
        "network": name,
        "dense ms": {str(t.batch): t.milliseconds for t in timings if t.name == "dense"},
        "depthwise": len(depthwise(model)),
        "rows": [
            {
                "multiple_of": multiple,
                "macs": cost.macs / dense,
                "slow layers": len(slow_widths(network)),
                "speed-up": {str(t.batch): t.speedup for t in timings if t.name == str(multiple)},
            }
            for multiple, (network, cost) in small.items()
        ],
    }


def as_table(rows: list[dict[str, Any]]) -> str:
    """One line per network and batch size; a column per multiple."""
    headers = [
        "network",
        "depthwise layers",
        "batch",
        *(f"multiples of {m}" if m > 1 else "any width" for m in MULTIPLES),
    ]
    lines = [
        [
            row["network"],
            str(row["depthwise"]),
            str(batch),
            *(f"{found['speed-up'][batch]:.2f}x" for found in row["rows"]),
        ]
        for row in rows
        for batch in row["rows"][0]["speed-up"]
    ]
    return common.table(headers, lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--seconds", type=float, default=10.0, help="at most, per network and batch size")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, help="of the square images on a GPU; default: the small ones of the zoo")
    parser.add_argument("--name", default="alignment", help="of the results file")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    for name in chosen.networks:
        rows.append(one_network(name, seconds=chosen.seconds, device=chosen.device, size=chosen.size))
        print(as_table(rows[-1:]), flush=True)
    content = {"environment": common.environment(), "processor": common.processor(), "macs": MACS, "rows": rows}
    path = common.write_results(chosen.name, common.rounded(content))
    print(as_table(rows))
    print(f"written to {path.relative_to(common.ROOT)}")


if __name__ == "__main__":
    main()
