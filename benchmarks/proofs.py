"""What proofs cost: ``es.verify`` of networks at their usual size, and its share of a run of ten epochs.

    python -m benchmarks.proofs [NAME ...]

Half of the MACs at random scores, one thread, seconds by the clock, the fastest of three; *forward* is the dense network's.
*Share of ten epochs* is that of ``compress`` on scikit-learn's digits, an epoch of which takes seconds: no run of that length
has a larger one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import espalier as es
from benchmarks import common
from espalier.run import compress as running

NAME = "proofs"
NETWORKS = {"resnet50": 224, "resnet18": 224, "mobilenet_v2": 224, "cifar:resnet20": 32, "cifar:resnet56": 32}
ROUNDS, EPOCHS = 3, 10


def proof_of(name: str, side: int) -> dict[str, Any]:
    model, x = common.build(name), torch.zeros(1, 3, side, side)
    begun = time.perf_counter()
    graph = es.trace(model, x)
    traced = time.perf_counter() - begun
    random, budget = np.random.default_rng(0), es.Budget(macs=0.5)
    plan = es.solve(graph, {g.name: random.random(g.size) for g in graph.groups}, budget)
    with torch.inference_mode():
        forward = min(_seconds(lambda: model(x)) for _ in range(ROUNDS))
    verify = min(_seconds(lambda: es.verify(model, graph, plan, x, budget=budget).require()) for _ in range(ROUNDS))
    return {"network": name, "side": side, "forward_s": forward, "trace_s": traced, "verify_s": verify}


def share_of_a_run() -> float:
    """Of the seconds of ``compress`` those that its proof takes."""
    data = es.load_data("digits")
    model = es.build_model("resnet20", num_classes=10, in_channels=data.in_channels, image_size=data.image_size)
    spent: list[float] = []
    before = running.proof_of

    def timed(*args: Any, **options: Any) -> Any:
        begun = time.perf_counter()
        try:
            return before(*args, **options)
        finally:
            spent.append(time.perf_counter() - begun)

    running.proof_of = timed
    try:
        recipe = es.Recipe(epochs=EPOCHS, threads=1)
        whole = _seconds(lambda: es.compress(model, data, budget=es.Budget(macs=0.5), recipe=recipe, progress=False))
    finally:
        running.proof_of = before
    assert len(spent) == 1, "compress proves once"
    return spent[0] / whole


def _seconds(call: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("networks", nargs="*", choices=[*NETWORKS, []], help="all by default")
    names = parser.parse_args().networks or list(NETWORKS)
    torch.set_num_threads(1)
    kept = common.read_results(NAME) or {"rows": []}
    for name in names:
        row = common.rounded(proof_of(name, NETWORKS[name]), 3)
        kept["rows"] = [*(r for r in kept["rows"] if r["network"] != name), row]
    kept |= {"share": round(share_of_a_run(), 4), "environment": common.environment()}
    common.write_results(NAME, kept)
    print(as_table(kept))


def as_table(content: dict[str, Any]) -> str:
    """A row for every network, and what share of a run is spent on its proof."""
    body = [
        [r["network"], str(r["side"]), *(f"{r[key]:.3f}" for key in ("forward_s", "trace_s", "verify_s"))]
        for r in content["rows"]
    ]
    text = f"Of ten epochs on digits, ResNet-20 under TCP, {100 * content['share']:.1f} % are spent on the proof."
    return f"{text}\n\n{common.table(['network', 'input', 'forward, s', 'trace, s', 'verify, s'], body)}"


if __name__ == "__main__":
    main()
