"""What TCP or MGP costs while it presses, and what it saves over a whole run.

    python -m benchmarks.tcp_overhead [--method tcp] [--networks resnet20 ...] [--window 160] [--run-steps 200]

Batches of 128 random CIFAR-sized images (speed does not depend on what they show), bf16, channels_last, one thread, SGD.

*While pressing*: a window of consecutive steps of a run of 20 epochs on 50,000 images (7,800 steps) at a MACs target of
50 %, at one tenth of the run, where the keep-set is decided anew and units fade.  Blocks of steps with the run take
turns with blocks of plain training of a network of the same structure, copied again whenever the run has removed
something.  The ratio is that of the sums.  ``step`` is the part of it that is spent inside ``run.step``; the rest is
gradient hooks.

*Whole run*: all of a run of fewer steps, whose schedule is the same in proportion, beside dense training of as many steps,
in turns; with free widths and with multiples of 4 and 8.  A run takes as many decisions however short it is, so the time inside
``run.step`` counts for the share that it has of a run of real length; "as measured" is without that correction.  The
teacher's forward, timed beside, is added for the ratios with distillation.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import espalier as es
from benchmarks import common
from espalier.methods.base import Run
from espalier.methods.pressure import FadingMethod
from espalier.run.evaluate import autocast
from espalier.run.loop import make_optimizer
from espalier.tasks import distillation

NETWORKS = ("resnet20", "resnet56", "vgg16_bn")
RECIPE = es.Recipe(precision="bf16", channels_last=True, lr=0.01, device="cpu", threads=1)
REAL_STEPS = 7800  # 20 epochs of 390
BUDGET = es.Budget(macs=0.5)
BUDGETS = {
    "any width": BUDGET,
    "multiples of 4": es.Budget(macs=0.5, multiple_of=4),  # what the command line takes
    "multiples of 8": es.Budget(macs=0.5, multiple_of=8),
}
METHODS: dict[str, type[FadingMethod]] = {"tcp": es.TCP, "mgp": es.MGP}
WINDOW_AT = 0.1


def batches(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(0)
    images = [torch.randn(RECIPE.batch_size, 3, 32, 32, generator=random) for _ in range(count)]
    labels = [torch.randint(10, (RECIPE.batch_size,), generator=random) for _ in range(count)]
    return [(x.to(memory_format=torch.channels_last), y) for x, y in zip(images, labels, strict=True)]


class Trainer:
    """Steps of training on one network, timed; with a run, its part apart."""

    def __init__(self, model: nn.Module, *, run: Run | None = None, teacher: nn.Module | None = None) -> None:
        self.model, self.run, self.teacher = model, run, teacher
        self.optimizer = make_optimizer(model, RECIPE)
        self.data = batches()
        self.inside = 0.0  # seconds in run.step
        self.removals = 0

    def go(self, progress: Iterator[float], steps: int) -> float:
        """Seconds of ``steps`` steps."""
        begin = time.perf_counter()
        for number in range(steps):
            self._step(*self.data[number % len(self.data)], next(progress))
        return time.perf_counter() - begin

    def _step(self, x: Tensor, y: Tensor, progress: float) -> None:
        with autocast(x.device, RECIPE.precision):
            logits = self.model(x).float()
            soft = None
            if self.teacher is not None:
                with torch.no_grad():
                    soft = self.teacher(x).float()
        loss = F.cross_entropy(logits, y)
        if soft is not None:
            loss = 0.5 * loss + 0.5 * distillation(logits, soft, RECIPE.temperature)
        if self.run is not None:
            loss = loss + self.run.penalty()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        if self.run is not None:
            begin = time.perf_counter()
            removed = self.run.step(progress=progress, optimizer=self.optimizer)
            self.inside += time.perf_counter() - begin
            self.removals += removed is not None


def network(name: str) -> nn.Module:
    model = common.build(f"cifar:{name}").train()
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def counting(start: float, total: int) -> Iterator[float]:
    step = round(start * total)
    while True:
        step += 1
        yield min(step / total, 1.0)


def _arrive(trainer: Trainer, at: float) -> Iterator[float]:
    """Put the run where it would be at ``at``, about to decide.  A jump in progress alone would count as a long press."""
    run: Any = trainer.run
    run._last = run._pressed_at = at
    run._decided = at - run.method.every
    return counting(at, REAL_STEPS)


def pressing(name: str, method: FadingMethod, *, window: int, block: int) -> dict[str, Any]:
    """Ratio of a window of the method to plain training of the same structure, in turns."""
    example = torch.zeros(1, 3, 32, 32)
    model = network(name)
    fading = Trainer(model, run=method.start(model, example, BUDGET))
    plain = Trainer(_without_hooks(model))
    at = _arrive(fading, WINDOW_AT)
    fading.go(at, 2 * block)  # warm up; also the first decision, for which everything is new
    plain.go(counting(0, REAL_STEPS), block)
    fading.inside, times = 0.0, []
    for _ in range(window // block):
        if sum(p.numel() for p in fading.model.parameters()) != sum(p.numel() for p in plain.model.parameters()):
            plain = Trainer(_without_hooks(fading.model))
            plain.go(counting(0, REAL_STEPS), 2)
        times.append((fading.go(at, block), plain.go(counting(0, REAL_STEPS), block)))
    pressed = getattr(fading.run, "pressed", None)
    ours, theirs = (sum(column) for column in zip(*times, strict=True))
    return {
        "ratio": ours / theirs,
        "ratio, median of blocks": median(a / b for a, b in times),
        "step": fading.inside / theirs,
        "plain ms per step": 1e3 * theirs / (block * len(times)),
        "steps": block * len(times),
        "removals": fading.removals,
        "units pressed at the end": None if pressed is None else int(pressed.sum()),
    }


def _without_hooks(model: nn.Module) -> nn.Module:
    """A copy that no run listens to: copied parameters have no hooks, copied modules have."""
    private = copy.deepcopy(model)
    for module in private.modules():
        module._forward_pre_hooks.clear()
    return private


def whole_run(name: str, method: FadingMethod, *, steps: int, block: int) -> dict[str, Any]:
    """Whole runs of the method beside dense training, in turns; one entry per budget."""
    example = torch.zeros(1, 3, 32, 32)
    model = network(name)
    teacher = copy.deepcopy(model).eval()
    plain = Trainer(copy.deepcopy(model))
    runs: dict[str, Trainer] = {}
    for label, budget in BUDGETS.items():
        own = copy.deepcopy(model)
        runs[label] = Trainer(own, run=method.start(own, example, budget))
    dense = es.cost(es.trace(model, example, rehearse=False)).macs
    plain.go(counting(0, steps), block)
    at = {label: counting(0, steps) for label in runs}
    ours: dict[str, list[float]] = {label: [] for label in runs}
    macs: dict[str, list[float]] = {label: [] for label in runs}
    theirs, alone = [], []
    for _ in range(steps // block):
        theirs.append(plain.go(counting(0, steps), block))
        alone.append(_forward_time(teacher, plain.data[0][0], 2) * block)
        for label, trainer in runs.items():
            ours[label].append(trainer.go(at[label], block))
            macs[label].append(_macs(trainer) / dense)
    found: dict[str, Any] = {"steps": steps, "plain ms per step": 1e3 * sum(theirs) / steps}
    for label, trainer in runs.items():
        assert trainer.run is not None
        time_, plain_time, teacher_time = sum(ours[label]), sum(theirs), sum(alone)
        later = len(theirs) - len(theirs) // 4
        real = time_ - trainer.inside * (
            1 - steps / REAL_STEPS
        )  # as many decisions, over as many steps as a real run has
        small = trainer.run.finish()
        found[label] = {
            "ratio as measured": time_ / plain_time,
            "ratio": real / plain_time,
            "ratio with distillation, dense without": (real + teacher_time) / plain_time,
            "ratio with distillation, dense too": (real + teacher_time) / (plain_time + teacher_time),
            "ratio of the last quarter": sum(ours[label][later:]) / sum(theirs[later:]),
            "step": trainer.inside / plain_time,
            "MACs over the run": sum(macs[label]) / len(macs[label]),
            "MACs at the end": es.cost(es.trace(small, example, rehearse=False)).macs / dense,
            "removals": trainer.removals,
            "curve": [{"macs": m, "time": a / b} for m, a, b in zip(macs[label], ours[label], theirs, strict=True)],
        }
    return found


def _macs(trainer: Trainer) -> int:
    assert trainer.run is not None
    return trainer.run.cost.macs


def _forward_time(model: nn.Module, x: Tensor, repeats: int) -> float:
    begin = time.perf_counter()
    with torch.no_grad(), autocast(x.device, RECIPE.precision):
        for _ in range(repeats):
            model(x)
    return (time.perf_counter() - begin) / repeats


PARTS = ("keep_set", "_aim", "_press", "_adapt", "_remove_faded", "realise", "_norm")


def profile(name: str, method: FadingMethod, *, steps: int) -> dict[str, float]:
    """Milliseconds per step in the parts of the run (some contain others) and in the gradient hooks."""
    spent: dict[str, float] = {}

    def timed(label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[label] = spent.get(label, 0.0) + time.perf_counter() - begin

        return call

    from espalier.methods.importance import Sensitivity

    hear = Sensitivity._hear
    Sensitivity._hear = lambda self, columns: timed("hooks", hear(self, columns))  # type: ignore[method-assign]
    try:
        model = network(name)
        run: Any = method.start(model, torch.zeros(1, 3, 32, 32), BUDGET)
    finally:
        Sensitivity._hear = hear  # type: ignore[method-assign]
    for part in PARTS:
        if hasattr(run, part):
            setattr(run, part, timed(part, getattr(run, part)))
    run.score.batch_done = timed("batch_done", run.score.batch_done)
    trainer = Trainer(model, run=run)
    at = _arrive(trainer, WINDOW_AT)
    trainer.go(at, 10)
    spent.clear()
    trainer.inside = 0.0
    begin = time.perf_counter()
    trainer.go(at, steps)
    total = time.perf_counter() - begin
    found = {"whole step": total, "run.step": trainer.inside, **spent}
    return {label: 1e3 * seconds / steps for label, seconds in found.items()}


def as_table(rows: list[dict[str, Any]]) -> str:
    body = []
    for r in rows:
        press = r["pressing"]
        if not r["run"]:
            body.append([r["network"], f"{press['plain ms per step']:.0f}", f"{press['ratio']:.3f}", *["-"] * 6])
        for label in BUDGETS if r["run"] else ():
            whole = r["run"][label]
            body.append([
                f"{r['network']}, {label}", f"{press['plain ms per step']:.0f}", f"{press['ratio']:.3f}",
                f"{whole['ratio']:.3f}", f"{whole['ratio as measured']:.3f}",
                f"{whole['ratio with distillation, dense without']:.3f}",
                f"{whole['ratio with distillation, dense too']:.3f}", f"{whole['ratio of the last quarter']:.3f}",
                f"{whole['MACs over the run']:.3f}",
            ])  # fmt: skip
    headers = [
        "network",
        "ms",
        "pressing",
        "run",
        "measured",
        "+ teacher",
        "both + teacher",
        "last quarter",
        "mean MACs",
    ]
    return common.table(headers, body) + "\nall but ms: relative to plain training; goals: pressing 1.05, run 0.85"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=METHODS, default="tcp")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--window", type=int, default=160, help="steps while pressing")
    parser.add_argument("--run-steps", type=int, default=200, help="steps of the whole run; 0: none")
    parser.add_argument("--block", type=int, default=5, help="steps between turns")
    parser.add_argument("--profile", action="store_true", help="only say where the time goes")
    parser.add_argument("--name", help="of the results file; default: METHOD_overhead")
    chosen = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    method = METHODS[chosen.method]()
    if chosen.profile:
        for name in chosen.networks:
            print(name, json.dumps(common.rounded(profile(name, method, steps=chosen.window))))
        return
    rows = []
    for name in chosen.networks:
        press = pressing(name, method, window=chosen.window, block=chosen.block)
        steps = chosen.run_steps
        whole = whole_run(name, method, steps=steps, block=chosen.block) if steps else {}
        rows.append({"network": name, "pressing": press, "run": whole})
        print("\n".join(as_table(rows).splitlines()[-4:-1]), flush=True)
    content = {
        "environment": common.environment(),
        "settings": {
            "method": asdict(method),
            "recipe": RECIPE.to_dict(),
            "macs": 0.5,
            "real_steps": REAL_STEPS,
            "seed": 0,
        },
        "rows": rows,
    }
    path = common.write_results(chosen.name or f"{chosen.method}_overhead", common.rounded(content))
    print(as_table(rows))
    print(f"written to {path.relative_to(common.ROOT)}")


if __name__ == "__main__":
    main()
