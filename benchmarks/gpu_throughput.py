"""How fast a GPU can train the CIFAR networks: seconds per epoch of 50,000 images, by how the steps are launched.

    python -m benchmarks.gpu_throughput [--networks resnet20,vgg16_bn] [--seeds 3] [--ways loop,eager,graph,methods]
        [--batch 128]

Ways: ``loop`` (the library's own ``train``, augmentation included), ``loop graphs`` (the same with
``Recipe(graphs=True)``), ``eager`` (forward, backward and SGD step alone),
``compile`` (``torch.compile``), ``graph`` (the whole step captured once as a CUDA graph, replayed), and ``graph xN`` (N seeds
side by side, each graph on a stream of its own; seconds are for all N).  ``methods``: what a step with each method takes,
eager and with graphs, its penalty and its events included, relative to one without, at ``PLACES`` of a run of ``EPOCHS``
epochs.  ``bf16``, channels last, random images that lie on the device.  The floor is the time that the device needs for the
same arithmetic at its measured matrix speed.
Results: ``benchmarks/results/gpu_throughput.json`` and, of the methods, ``gpu_steps.json``; of another batch than 128 with its
number behind the name.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.common import environment, rounded, table, write_results
from espalier.costs import cost
from espalier.graph import trace
from espalier.methods.base import Method, Run
from espalier.methods.dprp import DPRP
from espalier.methods.mgp import MGP
from espalier.methods.tcp import TCP
from espalier.methods.tt_lc import TTLC
from espalier.plan import Budget
from espalier.run.data import Data, Split
from espalier.run.loop import make_optimizer, train
from espalier.run.models import build_model
from espalier.run.recipe import Recipe
from espalier.run.replay import Replay, recorder_for, running

NETWORKS = ("resnet20", "resnet32", "resnet56", "resnet110", "vgg16_bn")
IMAGES, BATCH, WARM_UP, STEPS = 50_000, 128, 20, 100
Step = Callable[[], object]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ways", help="only these, by their name or its first word; default: all")
    parser.add_argument("--batch", type=int, default=BATCH, help="images per step; default: %(default)s")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("error: there is no CUDA device here, and on another one these numbers would mean nothing")
    speed = matrix_speed()
    suffix, where = "" if options.batch == BATCH else f"_{options.batch}", {"batch": options.batch, **environment()}
    found: dict[str, dict[str, float]] = {}
    steps: dict[str, dict[str, list[float]]] = {}
    for name in options.networks.split(","):
        model = build_model(name, num_classes=10)
        macs = cost(trace(model, torch.zeros(1, 3, 32, 32), rehearse=False)).macs
        times = {"floor": 3 * macs * IMAGES / speed}  # a backward costs two forwards
        for way, measure in ways(name, options.seeds, options.batch).items():
            if options.ways and not {way, way.split()[0]} & set(options.ways.split(",")):
                continue
            try:
                times[way] = measure()
            except Exception as error:  # a way that this driver or network does not support is a result too
                print(f"{name}, {way}: {type(error).__name__}: {error}", flush=True)
            torch.cuda.empty_cache()
        found[name] = times
        if not options.ways or "methods" in options.ways.split(","):
            steps[name] = {}
            for label, method, graphs in ((n, m, g) for g in (False, True) for n, m in METHODS.items()):
                label += " graphs" if graphs else ""
                try:
                    steps[name][label] = method_steps(name, method, batch=options.batch, graphs=graphs)
                except Exception as error:
                    print(f"{name}, {label}: {type(error).__name__}: {error}", flush=True)
                    traceback.print_exc()
            print(name, steps[name], flush=True)
        print(name, {way: round(seconds, 2) for way, seconds in times.items()}, flush=True)
        if len(times) > 1:
            write_results("gpu_throughput" + suffix, rounded({"seconds_per_epoch": found, **where}))
        if steps:
            write_results("gpu_steps" + suffix, rounded({"steps": steps, **where}))
    columns = list(dict.fromkeys(way for times in found.values() for way in times))
    print(table(["seconds per epoch", *columns], [[n, *[_short(t.get(c)) for c in columns]] for n, t in found.items()]))


def ways(name: str, seeds: int, batch: int) -> dict[str, Callable[[], float]]:
    """Way -> seconds of an epoch."""
    return {
        "loop": lambda: library_loop(name, batch),
        "loop graphs": lambda: library_loop(name, batch, graphs=True),
        "eager": lambda: epoch_seconds([eager_step(name, batch, device="cuda")], batch),
        "compile": lambda: epoch_seconds([eager_step(name, batch, device="cuda", compiled=True)], batch),
        "graph": lambda: epoch_seconds([graph_step(name, batch, seed=0)], batch),
        f"graph x{seeds}": lambda: epoch_seconds([graph_step(name, batch, seed=seed) for seed in range(seeds)], batch),
    }


def eager_step(name: str, batch: int, *, device: str, seed: int = 0, compiled: bool = False) -> Step:
    """One training step on images that never change."""
    torch.manual_seed(seed)
    model = build_model(name, num_classes=10).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = make_optimizer(model, Recipe(lr=0.01))
    images = torch.randn(batch, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,), device=device)
    forward: Any = torch.compile(model) if compiled else model

    def step() -> torch.Tensor:
        # No cache of casted weights: inside a captured graph it would hold those of the first step.
        with torch.autocast(device, torch.bfloat16, cache_enabled=False):
            logits = forward(images)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def graph_step(name: str, batch: int, *, seed: int) -> Step:
    """The same step, captured; it is replayed on a stream of its own."""
    step = eager_step(name, batch, device="cuda", seed=seed)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP // 2):  # momentum and workspaces have to be there before the capture
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()

    def replay(kept: Step = step) -> None:  # its tensors are the graph's: without it they would be given to others
        del kept
        with torch.cuda.stream(stream):
            graph.replay()

    return replay


def epoch_seconds(steps: list[Step], batch: int) -> float:
    """Of an epoch of every one of ``steps``, side by side."""
    for _ in range(WARM_UP):
        for step in steps:
            step()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(STEPS):
        for step in steps:
            step()
    torch.cuda.synchronize()
    return (time.perf_counter() - begun) / STEPS * IMAGES / batch


METHODS: dict[str, Method] = {"dprp": DPRP(), "tcp": TCP(), "mgp": MGP(), "tt-lc": TTLC(search=0)}
PLACES, EPOCHS = (0.0, 0.2, 0.4, 0.9), 40


def method_steps(
    name: str, method: Method, *, batch: int = BATCH, device: str = "cuda", graphs: bool = True, steps: int = STEPS
) -> list[float]:
    """Time of a step at each of ``PLACES``, relative to one without the method at the beginning; both replayed, or neither."""
    torch.manual_seed(0)
    model = build_model(name, num_classes=10).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(batch, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,), device=device)
    recipe, total = Recipe(lr=0.01), EPOCHS * IMAGES // batch
    run: Run | None = None
    optimizer = make_optimizer(model, recipe)

    def forward(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(device, torch.bfloat16, cache_enabled=False):
            logits = model(x)
        return F.cross_entropy(logits.float(), y), (logits.detach().argmax(1) == y).sum()

    def recorded(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss, right = forward(x, y)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach(), right

    recorder = recorder_for(torch.device(device), wanted=graphs)
    replay = None if recorder is None else Replay(recorded, model, recorder=recorder)

    def step(progress: float) -> None:
        penalty = run.penalty() if run is not None else 0.0
        if replay is not None:
            replay(images, labels, penalty=penalty if isinstance(penalty, torch.Tensor) else None)
        else:
            optimizer.zero_grad(set_to_none=True)
            (forward(images, labels)[0] + penalty).backward()
        optimizer.step()
        removed = None if run is None else run.step(progress=progress, optimizer=optimizer)
        if replay is not None and removed is not None and removed.rebuilt:
            replay.forget()

    def timed(start: int, count: int) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        for number in range(start, start + count):
            step(min((number + 1) / total, 1.0))
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begun) / count

    with running(replay):
        timed(0, WARM_UP)
        plain = timed(0, steps)
        run = method.start(model, images[:1], Budget(macs=0.5))
        optimizer = make_optimizer(model, recipe)
        if replay is not None:
            replay.forget()
        found = []
        for place in PLACES:
            start = round(place * total)
            timed(start, WARM_UP)  # the jump makes up for what was left out
            found.append(timed(start + WARM_UP, steps) / plain)
    return found


def library_loop(name: str, batch: int, *, graphs: bool = False) -> float:
    """The second epoch of ``train`` on random images of CIFAR-10's size."""
    torch.manual_seed(0)

    def split(n: int) -> Split:
        return Split(torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (n,)))

    data = Data("random", 10, 3, 32, split(IMAGES), split(500), split(0), (0.5,) * 3, (0.25,) * 3, pad=4, flip=True).to(
        "cuda"
    )
    recipe = Recipe(
        epochs=2, batch_size=batch, lr=0.01, precision="bf16", channels_last=True, device="cuda", graphs=graphs
    )
    return train(build_model(name, num_classes=10), data, recipe).last.seconds


def matrix_speed(size: int = 8192) -> float:
    """Multiply-adds a second of a large bf16 matrix product, measured."""
    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    for _ in range(5):
        a @ a
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(20):
        a @ a
    torch.cuda.synchronize()
    return 20 * size**3 / (time.perf_counter() - begun)


def _short(seconds: float | None) -> str | None:
    return None if seconds is None else f"{seconds:.2f}"


if __name__ == "__main__":
    main()
