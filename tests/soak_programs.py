"""``python -m tests.soak_programs N [FIRST] [--record]``: prove N random programs, of seeds FIRST, ...; exit code 1 if not.

Three plans each - about a quarter of the units gone, half of what the MACs can lose, one unit left of every group - in eval and
in train mode.  ``--record`` adds what came of it to ``benchmarks/results/soak_programs.json``; where that
ends with programs of the same revision, whose seeds go on here, as one run with them.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from programs import LONGEST, Program, random_program  # noqa: E402
from proving import random_importance, randomise  # noqa: E402

from espalier.costs import CostModel, cost  # noqa: E402
from espalier.graph import Graph, trace  # noqa: E402
from espalier.plan import Budget, Plan  # noqa: E402
from espalier.solver import BudgetError, solve  # noqa: E402
from espalier.surgery import mask, shrink, verify  # noqa: E402
from espalier.surgery.verify import RankedRoughly, RoundedOtherwise, count_macs  # noqa: E402

TOLERANCE = 1e-8  # of the largest output, in float64
ROUNDING = 1e-14  # what is less is what is left of values near one that cancel


@dataclass
class Outcome:
    """What became of one program; ``removable`` is a share of the MACs."""

    kind: str  # "proven", "rigid" (nothing can go), "whole", "wrong", "crash", "cost", "invalid" (the program does not run)
    text: str = ""
    removable: float = 0.0
    why: list[str] = field(default_factory=list)


def plans(graph: Graph, seed: int) -> Iterator[Plan]:
    """A quarter of the units gone at random, half of what the MACs can lose, one unit left of every group."""
    generator = np.random.default_rng(seed)
    yield _plan(graph, [max(1, round(0.75 * g.size)) for g in graph.groups], generator)
    importance = random_importance(graph, seed=seed)
    dense, smallest = cost(graph).macs, CostModel(graph).cost(np.ones_like(graph.sizes)).macs
    try:
        yield solve(graph, importance, Budget(macs=max((dense + smallest) // 2, 2)))
    except BudgetError:  # of what costs no MACs
        yield _plan(graph, [max(1, g.size // 2) for g in graph.groups], generator)
    yield _plan(graph, [1] * len(graph.groups), generator)


def _plan(graph: Graph, kept: list[int], generator: np.random.Generator) -> Plan:
    keep = {
        g.name: np.sort(generator.choice(g.size, n, replace=False)) for g, n in zip(graph.groups, kept, strict=True)
    }
    return Plan(keep, {g.name: g.size for g in graph.groups})


def outputs(model: nn.Module, inputs: tuple[Tensor, ...], *, training: bool) -> list[Tensor]:
    torch.default_generator.manual_seed(0)  # a millisecond less than with those of all devices
    with torch.no_grad():
        out = model.train(training)(*inputs)
    return list(out) if isinstance(out, tuple) else [out]


def judge(program: Program, seed: int, *, full: bool = True) -> Outcome:
    """Trace, make three plans (or in turn one of them), hold small against masked in both modes, planned against counted."""
    example = program.example()
    model = randomise(program.build()).eval()
    try:
        outputs(model, example, training=False)
    except (RuntimeError, ValueError) as error:
        return Outcome("invalid", _last(error))
    try:
        graph = trace(model, example)
    except Exception as error:
        return Outcome("crash", f"trace: {_last(error)}")
    dense = cost(graph)
    if dense.macs != count_macs(model, example):
        return Outcome("cost", f"dense: planned {dense.macs}, counted {count_macs(model, example)}")
    why = [str(w) for w in (*(f.reason for f in graph.frozen), *graph.notes, *graph.unknown)]
    free = [g for g in graph.groups if g.size > 1]
    if free and program.rigid:
        return Outcome("wrong", f"{free[0].name} can go, although nothing can by the statements", why=why)
    if not free:
        return Outcome("rigid" if program.rigid else "whole", why=why)
    least = CostModel(graph).cost(np.ones_like(graph.sizes))
    removable = 1 - (least.macs / dense.macs if dense.macs else least.params / dense.params)
    for number, plan in enumerate(plans(graph, seed)):
        if not full and number != seed % 3:
            continue
        try:
            small = shrink(model, graph, plan)
            problem = _differ(mask(model, graph, plan), small, program)
            if problem:
                return Outcome("wrong", f"plan {number}, {problem}", removable, why)
            planned = cost(graph, plan)
            counted = count_macs(small.eval(), example), sum(p.numel() for p in small.parameters())
            # torch.einsum over a single channel is an element-wise product, which torch does not count
            by_product = "einsum" in program.source and any(len(k) == 1 for k in plan.keep.values())
            if (
                planned.params != counted[1]
                or planned.macs < counted[0]
                or (planned.macs > counted[0] and not by_product)
            ):
                return Outcome("cost", f"plan {number}: {planned}, counted {counted}", removable, why)
            if full and number == seed % 3:  # the obligations that are left: files, gradients, activation memory
                verify(model, graph, plan, example, small=small).require()
        except Exception as error:
            return Outcome("crash", f"plan {number}: {_last(error)}", removable, why)
    return Outcome("proven", "", removable, why)


def _differ(masked: nn.Module, small: nn.Module, program: Program) -> str:
    """How the outputs of the two differ on a batch of three, in float64 and in both modes; nothing if they do not.

    Less than what rounding does to the masked one by itself is no difference: where everything cancels.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in program.example(3))
    models = _double(masked), _double(small)
    for training in (False, True):
        for one, other in zip(*(outputs(m, inputs, training=training) for m in models), strict=True):
            mode = "train" if training else "eval"
            if one.shape != other.shape:
                return f"{mode}: shape {tuple(other.shape)} instead of {tuple(one.shape)}"
            error, size = float((one - other).abs().max()), float(one.abs().max())
            if not (error <= max(TOLERANCE * size, ROUNDING) or _by_rounding(*models, inputs, training)):
                return f"{mode}: differ by {error:.1e} of {size:.1e}"
    return ""


def _by_rounding(masked: nn.Module, small: nn.Module, inputs: tuple[Tensor, ...], training: bool) -> bool:
    """Do they differ by less than the masked one by itself when its operations round otherwise, and equals rank as equals?"""
    with RankedRoughly():
        exact, found = (outputs(m, inputs, training=training) for m in (masked, small))
        with RoundedOtherwise():
            moved = outputs(masked, inputs, training=training)
    return all(
        bool((x - y).abs().max() <= torch.maximum((x - z).abs().max(), TOLERANCE * x.abs().max()))
        for x, y, z in zip(exact, found, moved, strict=True)
    )


def _double(model: nn.Module) -> nn.Module:
    from espalier.copies import copy_model

    return copy_model(model, {}).double()


def _last(error: BaseException) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {str(error).strip()[:400]} ({Path(where.filename).name}:{where.lineno})"


def soak(count: int, first: int, *, show: bool = True, full: bool = True, longest: int = LONGEST) -> dict[str, Any]:
    """Outcomes of the programs of seeds ``first``, ``first + 1``, ... and of up to ``longest`` statements."""
    begun, kinds, removable, failed = time.monotonic(), Counter[str](), [], []
    reasons: Counter[str] = Counter()
    for seed in range(first, first + count):
        program = random_program(random.Random(seed).choice, longest=longest)
        outcome = judge(program, seed, full=full)
        kinds[outcome.kind] += 1
        removable.append(outcome.removable)
        if outcome.kind == "whole":
            reasons.update({w.partition(":")[0] for w in outcome.why})
        if outcome.kind in ("wrong", "crash", "cost"):
            failed.append(seed)
            if show:
                print(f"seed {seed}: {outcome.kind}: {outcome.text}", flush=True)
    return {
        "programs": count,
        "first": first,
        **{kind: kinds[kind] for kind in ("proven", "rigid", "whole", "wrong", "crash", "cost", "invalid")},
        "median removable": median(removable),
        "removable": dict(sorted(Counter(f"{share:.2f}" for share in removable).items())),  # of how many programs
        "failed": failed,
        "why whole": dict(reasons.most_common(12)),
        "seconds": round(time.monotonic() - begun),
    }


def together(one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    """Two runs as one."""
    added = ("programs", "proven", "rigid", "whole", "wrong", "crash", "cost", "invalid", "seconds")
    removable, why = (Counter(one[key]) + Counter(two[key]) for key in ("removable", "why whole"))
    return {
        **two,
        **{key: one[key] + two[key] for key in added},
        "first": one["first"],
        "median removable": median(Counter({float(share): n for share, n in removable.items()}).elements()),
        "removable": dict(sorted(removable.items())),
        "failed": one["failed"] + two["failed"],
        "why whole": dict(why.most_common(12)),
    }


def goes_on(last: dict[str, Any], found: dict[str, Any]) -> bool:
    same = last["environment"]["revision"] == found["environment"]["revision"]
    return same and last["first"] + last["programs"] == found["first"] and "removable" in last


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int)
    parser.add_argument("first", type=int, nargs="?", default=0)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = soak(options.count, options.first)
    print(json.dumps(found, indent=1))
    if options.record:
        from benchmarks.common import RESULTS, environment, write_results

        path = RESULTS / "soak_programs.json"
        before = json.loads(path.read_text())["runs"] if path.exists() else []
        found |= {"environment": environment()}
        if before and goes_on(before[-1], found):
            found = together(before.pop(), found)
        write_results("soak_programs", {"runs": [*before, found]})
    return bool(found["failed"])


if __name__ == "__main__":
    sys.exit(main())
