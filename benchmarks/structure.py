"""Graph, plan and surgery against torch-pruning, network by network: time, memory, and what was delivered.

    python -m benchmarks.structure [--networks resnet18 timm:dla34 ...] [--repeats 7] [--limit 120]

One job is: a model and an example in, a smaller model out, by a magnitude score.

- Espalier: ``trace``, score, ``solve`` for exactly half of the MACs, ``shrink`` (which returns a copy).
- torch-pruning: ``MetaPruner`` with group magnitude importance and the channel ratio that halves the MACs of a plain
  chain of convolutions (1 - sqrt(1/2)), one ``step`` (in place).  Looping until a MACs target is met costs it more; that is
  measured apart, ``--to-target``.

Times are taken in one process, in turns, after one job of each for warming up; every job starts from a copy that is made
off the clock.  Memory is taken in a fresh process per tool: peak resident size during the job (the kernel's VmHWM, set back
to the current size right before) minus the size with the model in place.  A tool "handles" a network if the job ends
within the limit and the result computes an output of the right shape in eval mode.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import espalier as es
from benchmarks import common
from espalier.methods.importance import score_units
from espalier.surgery.verify import count_macs

SHARE = 0.5  # of the MACs
RATIO = 1 - SHARE**0.5  # of the channels
SHORT = ("cifar:resnet20a", "resnet18", "mobilenet_v2", "densenet121")


# ---------------------------------------------------------------- the two jobs


def espalier_job(model: nn.Module, x: torch.Tensor) -> tuple[nn.Module, dict[str, float]]:
    """The small model and the seconds of every stage."""
    clock = [time.perf_counter()]
    graph = es.trace(model, x)
    clock.append(time.perf_counter())
    importance = score_units(model, graph, es.Magnitude().score)
    clock.append(time.perf_counter())
    plan = es.solve(graph, importance, es.Budget(macs=SHARE))
    clock.append(time.perf_counter())
    small = es.shrink(model, graph, plan)
    clock.append(time.perf_counter())
    stages = zip(("trace", "score", "solve", "shrink"), clock, clock[1:], strict=False)
    return small, {name: end - begin for name, begin, end in stages}


def classifiers(model: nn.Module, classes: int) -> list[nn.Module]:
    """Layers that make the logits: torch-pruning has to be told not to prune them."""
    kinds = (nn.Linear, nn.Conv2d)
    return [
        m
        for m in model.modules()
        if isinstance(m, kinds) and classes in (getattr(m, "out_features", 0), getattr(m, "out_channels", 0))
    ]  # fmt: skip


def torch_pruning_job(model: nn.Module, x: torch.Tensor, classes: int) -> tuple[nn.Module, dict[str, float]]:
    tp = common.torch_pruning()
    begin = time.perf_counter()
    pruner = tp.pruner.MetaPruner(
        model, x, importance=tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=RATIO,
        ignored_layers=classifiers(model, classes),
    )  # fmt: skip
    middle = time.perf_counter()
    pruner.step()
    return model, {"graph": middle - begin, "step": time.perf_counter() - middle}


def torch_pruning_to_target(model: nn.Module, x: torch.Tensor, classes: int) -> tuple[nn.Module, dict[str, float]]:
    """Its way to a MACs target: small steps and counting, until the count is at or below it."""
    tp = common.torch_pruning()
    begin = time.perf_counter()
    pruner = tp.pruner.MetaPruner(
        model, x, importance=tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=1.0, iterative_steps=100,
        ignored_layers=classifiers(model, classes),
    )  # fmt: skip
    dense, _ = tp.utils.count_ops_and_params(model, x)
    for _ in range(100):
        pruner.step()
        if tp.utils.count_ops_and_params(model, x)[0] <= SHARE * dense:
            break
    return model, {"loop": time.perf_counter() - begin}


def macs(model: nn.Module, x: torch.Tensor) -> int:
    """Counted by PyTorch itself, which knows neither tool."""
    return count_macs(model, x)


def output_shape(model: nn.Module, x: torch.Tensor) -> list[Any]:
    with torch.no_grad():
        out = model(x)
    if isinstance(out, dict):
        return [(k, list(v.shape)) for k, v in out.items()]
    return [list(t.shape) for t in (out if isinstance(out, (tuple, list)) else [out])]


JOBS: dict[str, Callable[[nn.Module, torch.Tensor, int], tuple[nn.Module, dict[str, float]]]] = {
    "espalier": lambda model, x, classes: espalier_job(model, x),
    "torch-pruning": torch_pruning_job,
    "torch-pruning to target": torch_pruning_to_target,
}


# ---------------------------------------------------------------- in the child process


def say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def classes_of(name: str) -> int:
    return 10 if name.startswith("cifar:") else 21 if name.startswith("segmentation:") else 1000


def child_time(name: str, tools: list[str], repeats: int) -> None:
    """Check every tool once, which also warms it up, then time them in turns."""
    model, x = common.build(name), common.example(name)
    dense, shape = macs(model, x), output_shape(model, x)
    for tool in list(tools):
        say(event="begin", tool=tool)
        begin = time.perf_counter()
        try:
            small, _ = JOBS[tool](copy.deepcopy(model), x, classes_of(name))
            cold = time.perf_counter() - begin
            found = output_shape(small, x)
            if found != shape:
                raise ValueError(f"the output has shape {found}, not {shape}")
            say(event="handled", tool=tool, cold=cold, delivered=macs(small, x) / dense)
        except Exception as error:
            say(event="failed", tool=tool, error=common.first_line(error))
            tools.remove(tool)
    for _ in range(repeats):
        for tool in tools:
            private = copy.deepcopy(model)
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            _, stages = JOBS[tool](private, x, classes_of(name))
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            say(event="time", tool=tool, wall=wall, cpu=cpu, stages=stages)


def resident() -> dict[str, int]:
    """Bytes now and at the peak."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"now": int(lines["VmRSS"].split()[0]) * 1024, "peak": int(lines["VmHWM"].split()[0]) * 1024}


def child_memory(name: str, tool: str) -> None:
    """Peak of one job in a process that has done nothing but a small job, so that lazy imports are not counted."""
    warm = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 10, 3))
    JOBS[tool](warm.eval(), torch.zeros(1, 3, 16, 16), 10)
    model, x = common.build(name), common.example(name)
    weights = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident()["now"]
    small, _ = JOBS[tool](model, x, classes_of(name))
    peak = resident()["peak"]
    made = sum(t.numel() * t.element_size() for t in [*small.parameters(), *small.buffers()])
    say(event="memory", tool=tool, extra=peak - before, weights=weights, small=made)


# ---------------------------------------------------------------- in the parent process


def run_child(arguments: list[str], limit: float) -> tuple[list[dict[str, Any]], bool]:
    """What the child said, and whether the time was up.  What it said before it was killed counts."""
    command = [sys.executable, "-m", "benchmarks.structure", *arguments]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, cwd=common.ROOT)
        late = False
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            late = True
        out.seek(0)
        lines = [json.loads(line) for line in out.read().splitlines() if line.startswith("{")]
        if process.returncode and not late:
            err.seek(0)
            last = (err.read().strip().splitlines() or ["no message"])[-1]
            lines.append({"event": "died", "error": common.without_paths(last)[:200]})
    return lines, late


def one_network(name: str, *, repeats: int, limit: float, to_target: bool, memory: bool = True) -> dict[str, Any]:
    tools = ["espalier", "torch-pruning"] + (["torch-pruning to target"] if to_target else [])
    row: dict[str, Any] = {"network": name, "input": common.image_size(name)}
    lines, late = run_child(["--child", name, "--tools", *tools, "--repeats", str(repeats)], limit)
    stuck = [line["tool"] for line in lines if line["event"] == "begin"][-1:] if late else []
    if stuck and not any(line["event"] == "time" for line in lines):  # the others have a right to be timed
        rest = [t for t in tools if t not in stuck]
        lines = run_child(["--child", name, "--tools", *rest, "--repeats", str(repeats)], limit)[0]
        lines.append({"event": "failed", "tool": stuck[0], "error": f"no result within {limit:g} s"})
    for tool in tools:
        row[tool] = collect([line for line in lines if line.get("tool") == tool or line["event"] == "died"])
    for tool in tools if memory else []:
        if row[tool]["handled"]:
            found = [
                line
                for line in run_child(["--child-memory", name, "--tools", tool], limit)[0]
                if line["event"] == "memory"
            ]
            row[tool]["memory"] = {k: found[0][k] for k in ("extra", "weights", "small")} if found else None
    ours, theirs = row["espalier"], row["torch-pruning"]
    if ours.get("times") and theirs.get("times"):
        row["speedup"] = theirs["wall"] / ours["wall"]
        row["speedup_cpu"] = theirs["cpu"] / ours["cpu"]
    return row


def collect(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything a child said about one tool as one entry."""
    times = [line for line in lines if line["event"] == "time"]
    handled = [line for line in lines if line["event"] == "handled"]
    errors = [line["error"] for line in lines if line["event"] in ("failed", "died")]
    entry: dict[str, Any] = {"handled": bool(handled) and not errors}
    if errors:
        entry["error"] = errors[0]
    if handled:
        entry |= {"cold": handled[0]["cold"], "delivered": handled[0]["delivered"]}
    if times:
        entry |= {
            "wall": median(t["wall"] for t in times),
            "cpu": median(t["cpu"] for t in times),
            "times": [t["wall"] for t in times],
            "stages": {s: median(t["stages"][s] for t in times) for s in times[0]["stages"]},
        }
    return entry


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    both = [r for r in rows if "speedup" in r]
    ratios = [r["speedup"] for r in both]
    extra = {r["network"]: r["espalier"]["memory"]["extra"] for r in rows if r["espalier"].get("memory")}
    beyond = {r["network"]: m["extra"] - m["small"] for r in rows if (m := r["espalier"].get("memory")) is not None}
    theirs = [r["torch-pruning"]["delivered"] for r in rows if r["torch-pruning"]["handled"]]
    most = max(extra, key=lambda n: extra[n], default=None)
    return {
        "networks": len(rows),
        "both handle": len(both),
        "slower on": {r["network"]: r["speedup"] for r in both if r["speedup"] < 1},
        "median speed-up over torch-pruning": median(ratios) if ratios else None,
        "median speed-up in CPU time": median(r["speedup_cpu"] for r in both) if both else None,
        "range of the speed-up": [min(ratios), max(ratios)] if ratios else None,
        "largest extra memory of espalier, MB": None if most is None else {most: extra[most] / 1e6},
        "largest beyond the small model itself, MB": max(beyond.values(), default=0) / 1e6,
        "asked for": SHARE,
        "espalier delivers": _range([r["espalier"]["delivered"] for r in rows if r["espalier"]["handled"]]),
        "torch-pruning delivers": _range(theirs),
        "espalier fails": {r["network"]: r["espalier"]["error"] for r in rows if "error" in r["espalier"]},
        "torch-pruning fails": {
            r["network"]: r["torch-pruning"]["error"] for r in rows if "error" in r["torch-pruning"]
        },
    }


def _range(values: list[float]) -> list[float] | None:
    return [min(values), median(values), max(values)] if values else None


def as_table(rows: list[dict[str, Any]]) -> str:
    def megabytes(entry: dict[str, Any]) -> str | None:
        return f"{entry['memory']['extra'] / 1e6:.0f}" if entry.get("memory") else None

    def cell(entry: dict[str, Any], key: str, form: str) -> str | None:
        return format(entry[key], form) if key in entry else None

    body = []
    for r in rows:
        ours, theirs = r["espalier"], r["torch-pruning"]
        body.append([
            r["network"], cell(ours, "wall", ".3f"), cell(theirs, "wall", ".3f"), cell(r, "speedup", ".2f"),
            megabytes(ours), megabytes(theirs), cell(ours, "delivered", ".4f"), cell(theirs, "delivered", ".3f"),
            theirs.get("error", "") if not ours.get("error") else f"OURS: {ours['error']}",
        ])  # fmt: skip
    headers = ["network", "s", "s, tp", "tp / ours", "MB", "MB, tp", "MACs", "MACs, tp", "fails"]
    return common.table(headers, body)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(common.ZOO))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--limit", type=float, default=180.0, help="seconds for one network and process")
    parser.add_argument("--to-target", action="store_true", help="also time torch-pruning looping to the MACs target")
    parser.add_argument("--name", default="structure", help="of the results file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--child-memory", help=argparse.SUPPRESS)
    parser.add_argument("--tools", nargs="+", default=list(JOBS), help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.child or chosen.child_memory:
        warnings.filterwarnings("ignore")
        talk = os.dup(1)
        with contextlib.redirect_stdout(sys.stderr):  # torch-pruning prints
            lines = os.fdopen(talk, "w")
            globals()["say"] = lambda **line: print(json.dumps(line), file=lines, flush=True)
            if chosen.child:
                child_time(chosen.child, list(chosen.tools), chosen.repeats)
            else:
                child_memory(chosen.child_memory, chosen.tools[0])
        return
    rows = []
    for name in chosen.networks:
        rows.append(one_network(name, repeats=chosen.repeats, limit=chosen.limit, to_target=chosen.to_target))
        print(as_table(rows[-1:]).splitlines()[-1], flush=True)
    report = summarise(rows)
    settings = {"share": SHARE, "channel_ratio": RATIO, "repeats": chosen.repeats, "limit": chosen.limit, "seed": 0}
    path = common.write_results(
        chosen.name,
        common.rounded({"environment": common.environment(), "settings": settings, "summary": report, "rows": rows}),
    )
    print(as_table(rows))
    print(json.dumps(common.rounded(report), indent=1))
    print(f"written to {path.relative_to(common.ROOT)}")


if __name__ == "__main__":
    main()
