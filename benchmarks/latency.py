"""Time as a budget: how well profiles predict, how well budgets hold, what half of the MACs saves, what planning takes.

    python -m benchmarks.latency [--networks resnet18 ...] [--runtimes onnxruntime] [--batches 1]    # goes on where it stopped
    python -m benchmarks.latency --show

One thread.  Profiles lie in ``--profiles`` and are used again.  Importance is drawn by chance: structure is what takes time.
Residual blocks may go as a whole, as by default where time is limited.
What is planned is measured afterwards in processes of their own, exported as it is delivered, in turns with the dense
network.  Every processor has rows of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

import espalier as es
from benchmarks import common
from espalier.costs import CostModel
from espalier.methods.blocks import block_rules, offer_blocks, worth_of_blocks
from espalier.run.timed import delivered
from espalier.timing import on_device
from espalier.timing.closing import settle
from espalier.timing.family import Family
from espalier.timing.making import asked, batched, check_profile

NETWORKS = {
    "cifar:resnet20": 32, "cifar:resnet56": 32, "cifar:vgg16_bn": 32, "resnet18": 224, "resnet50": 224, "mobilenet_v2": 224,
    "efficientnet_b0": 224,
}  # fmt: skip
BUDGETS = (0.7, 0.5, 0.3)
MACS = 0.5
NEAR = 0.1  # predictions that are off by less are near
BELOW, ABOVE = 0.08, 0.03  # how far from what was asked a budget of time is met
AFRESH = 3  # processes that measure what was planned


def one(name: str, runtime: str, batch: int, profiles: Path) -> dict[str, Any]:
    """Everything about one network in one runtime at one batch size."""
    model, x = common.build(name).eval(), torch.zeros(1, 3, NETWORKS[name], NETWORKS[name])
    profiles.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    profile = es.profile(
        model, x, runtime=runtime, batch=batch, to=profiles / f"{name.replace(':', '_')}.{runtime}.{batch}.json"
    )
    row: dict[str, Any] = {
        "network": name, "runtime": f"{runtime} {profile.setting.version}", "batch": batch,
        "processor": common.processor(), "environment": common.environment(), "dense ms": profile.dense,
        "spread": profile.spread, "grain": profile.grain, "seconds of profiling": time.monotonic() - begun,
    }  # fmt: skip
    row["prediction"] = [(p / m - 1) for p, m in check_profile(profile, model, x)]
    graph, _ = offer_blocks(model, es.trace(model, x), x)
    random = np.random.default_rng(0)
    importance = worth_of_blocks(graph, {g.name: random.random(g.size) for g in graph.groups})
    rules = block_rules(graph)
    row["budgets"] = []
    for asked_for in BUDGETS:
        budget = es.Budget(latency=asked_for, profile=profile)
        begun = time.monotonic()
        timed = profile.on(graph)
        on = time.monotonic()
        try:
            es.solve(timed, importance, budget, **rules)
        except es.BudgetError as error:
            row["budgets"].append({"asked": asked_for, "out of reach": str(error).partition(";")[0]})
            continue
        solved = time.monotonic()
        family = Family(model, graph, batched(x, batch), setting=profile.setting)
        found = settle(family, family.file(es.Plan.dense(graph)), importance, budget, rules=rules)
        done = time.monotonic()
        share = afresh(model, es.shrink(model, graph, found.plan).eval(), x, profile)
        row["budgets"].append(
            {
                "asked": asked_for, "measured while planning": found.measured / profile.dense, "measured afresh": share,
                "macs": es.cost(graph, found.plan).macs / es.cost(graph).macs, "rounds": found.rounds,
                "blocks": sum(len(found.plan.keep[b.group]) < 2 for b in graph.blocks),
                "seconds of tables": on - begun, "seconds of solving": solved - on, "seconds of planning": done - solved,
            }
        )  # fmt: skip
    row["half of the macs"] = halves(model, graph, importance, profile, x)
    return row


def halves(
    model: nn.Module, graph: es.Graph, importance: Any, profile: es.Profile, x: torch.Tensor
) -> dict[str, float]:
    """Real speed-up where half of the MACs are left and the plan knows what time is: least time within the MACs."""
    timed = profile.on(graph)
    least, plan = 1.0, None
    for share in np.arange(0.9, 0.25, -0.02):
        try:
            wanted = es.Budget(macs=MACS, latency=float(share), profile=profile)
            found = es.solve(timed, importance, wanted, **block_rules(graph))
        except es.BudgetError:
            break
        if es.cost(graph, found).macs >= 0.9 * MACS * es.cost(graph).macs:
            least, plan = float(share), found
    if plan is None:
        return {}
    macs = es.cost(graph, plan).macs / es.cost(graph).macs
    took = CostModel(timed).cost(plan.counts(graph)).latency
    assert took is not None
    share = afresh(model, es.shrink(model, graph, plan).eval(), x, profile)
    return {"macs": macs, "asked": least, "predicted speed-up": profile.dense / took, "speed-up": 1 / share}


def afresh(model: nn.Module, small: nn.Module, x: torch.Tensor, profile: es.Profile) -> float:
    """Share of the dense time, measured in processes of their own: the median of ``AFRESH``."""
    shares = []
    with tempfile.TemporaryDirectory() as folder:
        for name, network in (("dense", model), ("small", small)):
            (Path(folder) / name).write_bytes(delivered(network, x, profile.setting))
        settings = json.dumps({**asked(profile.setting), "seconds": 2.0, "pace": profile.dense})
        command = [sys.executable, "-m", "benchmarks.latency", "--race", folder, settings]
        for _ in range(AFRESH):
            found = subprocess.run(command, check=True, capture_output=True, text=True, cwd=common.ROOT).stdout
            dense, left = json.loads(found.splitlines()[-1])
            shares.append(left / dense)
    return median(shares)


def by_processor(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The newest processor first."""
    names = dict.fromkeys(row["processor"] for row in reversed(rows))
    return {name: [row for row in rows if row["processor"] == name] for name in names}


def kept(rows: list[dict[str, Any]]) -> str:
    """How many predictions and budgets were near."""
    off = [abs(e) for row in rows for e in row["prediction"]]
    over = [b["measured afresh"] / b["asked"] - 1 for row in rows for b in row["budgets"] if "measured afresh" in b]
    near, held = sum(e <= NEAR for e in off), sum(-BELOW <= e <= ABOVE for e in over)
    return (
        f"{near} of {len(off)} networks that are in no profile were predicted within {NEAR:.0%}; {held} of {len(over)} budgets "
        f"were met, measured afresh between {BELOW:.0%} below and {ABOVE:.0%} above."
    )


def as_table(rows: list[dict[str, Any]]) -> str:
    """One line per network, runtime and batch size, of one processor."""
    head = ["network", "runtime", "batch", "dense, ms", "prediction off by: median, at most"]
    head += [f"asked {b:.0%}" for b in BUDGETS] + ["half of the MACs", "solver, s", "planning, s"]
    lines = []
    for row in rows:
        off = [abs(e) for e in row["prediction"]]
        held = [f"{b['measured afresh']:.1%}" if "measured afresh" in b else "out of reach" for b in row["budgets"]]
        reached = [b for b in row["budgets"] if "measured afresh" in b]
        half = row["half of the macs"]
        slowest = [max((b[k] for b in reached), default=0.0) for k in ("seconds of solving", "seconds of planning")]
        lines.append(
            [
                row["network"], row["runtime"], str(row["batch"]), f"{row['dense ms']:.3g}",
                f"{median(off):.1%}, {max(off):.1%}", *held, f"{half['speed-up']:.2f}x at {half['macs']:.0%}" if half else "",
                *(f"{s:.1f}" for s in slowest),
            ]
        )  # fmt: skip
    return common.table(head, lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime", "openvino"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--profiles", type=Path, default=common.ROOT / "runs" / "profiles")
    parser.add_argument("--name", default="latency", help="of the results file, which is added to")
    parser.add_argument("--show", action="store_true", help="only print the table")
    parser.add_argument("--race", nargs=2, metavar=("FOLDER", "SETTINGS"), help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.race:
        folder, settings = Path(chosen.race[0]), json.loads(chosen.race[1])
        print(json.dumps(on_device.race([(folder / n).read_bytes() for n in ("dense", "small")], **settings)))
        return
    torch.set_num_threads(1)
    file = common.RESULTS / f"{chosen.name}.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    here = common.processor()
    done = {(r["network"], r["runtime"].partition(" ")[0], r["batch"]) for r in rows if r["processor"] == here}
    for name in chosen.networks:
        for runtime in chosen.runtimes:
            for batch in chosen.batches:
                if (name, runtime, batch) in done or chosen.show:
                    continue
                rows.append(one(name, runtime, batch, chosen.profiles))
                common.write_results(chosen.name, common.rounded({"macs": MACS, "rows": rows}))
                print(as_table(rows[-1:]), flush=True)
    for processor, own in by_processor(rows).items():
        print(f"{processor}: {kept(own)}\n\n{as_table(own)}\n")


if __name__ == "__main__":
    main()
