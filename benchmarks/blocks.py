"""The parts of README and docs that are written from results: what stands between two marks in a page.

    <!-- results: runs resnet20-half-5-epochs -->
    ...
    <!-- end of results -->

``python -m benchmarks.tables`` writes every such block anew.  The first word says what (``BLOCKS``), the others of what.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

from benchmarks import int8, latency, shape_groups, without_training
from benchmarks.common import read_results, table
from espalier.present.config import METHODS
from espalier.settings import settings_of

BLOCK = re.compile(r"(<!-- results: ([\w-]+) ?([^>]*?) -->\n).*?(<!-- end of results -->)", re.DOTALL)


def fill(text: str, more: Mapping[str, Callable[..., str]]) -> str:
    """``text`` with every block written anew, by ``BLOCKS`` and ``more``."""
    makers = {**BLOCKS, **more}

    def block(found: re.Match[str]) -> str:
        begin, name, words, end = found.groups()
        if name not in makers:
            raise SystemExit(f"results: {name}: no such block; there are {', '.join(sorted(makers))}")
        return f"{begin}{makers[name](*words.split())}\n{end}"

    return BLOCK.sub(block, text)


def outside(text: str) -> str:
    """``text`` without its blocks."""
    return BLOCK.sub("", text)


def fading_overhead(method: str) -> str:
    """What a step costs while units fade, and a whole run, beside plain training: ``benchmarks.tcp_overhead``."""
    content = read_results(f"{method}_overhead")
    lines: list[list[str | None]] = []
    for row in content["rows"]:
        press = f"{row['pressing']['ratio']:.2f}"
        if not row["run"]:
            lines.append([row["network"], press, *[None] * 4])
        for label, run in row["run"].items():
            if isinstance(run, dict):
                ratios = (
                    "ratio",
                    "ratio with distillation, dense too",
                    "ratio of the last quarter",
                    "MACs over the run",
                )
                lines.append([f"{row['network']}, {label}", press, *[f"{run[k]:.2f}" for k in ratios]])
    head = [
        "network",
        "a step while units fade",
        "whole run",
        "both distilled",
        "last quarter of it",
        "mean MACs of the run",
    ]
    used = [i for i in range(len(head)) if any(line[i] is not None for line in lines)]
    body = [[line[i] for i in used] for line in lines]
    return table([head[i] for i in used], body) + "\n\n" + _by(f"tcp_overhead --method {method}", content)


def no_training() -> str:
    """Accuracy of one-shot cuts without a training step: ``benchmarks.without_training``."""
    content = read_results(without_training.NAME)
    if not content:
        return "*not run*"
    return (
        without_training.as_table(content)
        + "\n\n"
        + _by("without_training", {"environment": next(iter(content.values()))})
    )


def eight_bits() -> str:
    """Dense and small, float and int8, in time and accuracy; files and their load times: ``benchmarks.int8``."""
    content = read_results(int8.NAME)
    if not content:
        return "*not run*"
    where = [_by("int8", next(iter(rows.values()))) for rows in content.values()]
    return "\n\n".join([int8.as_table(content), *where])


def times() -> str:
    """How good predictions of time are and how well budgets of time are held: ``benchmarks.latency``."""
    parts = []
    for processor, rows in latency.by_processor(read_results("latency")["rows"]).items():
        parts += [f"On {processor}: {latency.kept(rows)}", latency.as_table(rows), _by("latency", *rows)]
    return "\n\n".join(parts)


def settings(method: str) -> str:
    """The hyper-parameters of a method, as they are declared."""
    rows = [[f"`{s.name}`", s.text or None, s.allowed, f"`{s.default}`"] for s in settings_of(METHODS[method])]
    return table(["setting", "what it is", "allowed", "default"], rows)


def dprp_overhead() -> str:
    """Time and memory of DPRP's steps and events beside dense training: ``benchmarks.dprp_overhead``."""
    content = read_results("dprp_overhead")
    lines = []
    for row in content["rows"]:
        steps, clock = (
            [f"{row[kind][k]['median']:.2f}" for k in ("whole", "full rank", "half the parameters")]
            for kind in ("processor time", "clock")
        )
        events = [row["event, full rank"], row["event, at the end"]]
        lines.append(
            [
                row["network"],
                *[f"{s} ({c})" for s, c in zip(steps, clock, strict=True)],
                *[f"{e['ms']:.0f} ms ({e['processor ms']:.0f})" for e in events],
                f"{max(e['weight'] for e in events):.1e}, {max(e['orthonormal'] for e in events):.1e}",
                f"{row['memory of weights and momentum']:.2f}x",
                f"{row['memory of a step']:.2f}x",
            ]
        )
    head = [
        "network",
        "whole",
        "full rank",
        "at the end",
        "event, full rank",
        "event, end",
        "off after it",
        "weights",
        "whole step",
    ]
    return table(head, lines) + "\n\n" + _by("dprp_overhead", content)


def decompositions() -> str:
    """Time of TT-LC's parts: ``benchmarks.decompositions``."""
    content = read_results("decompositions")
    rows = content["rows"]
    c_step, tensorly, evbmf, l_step = (rows[k] for k in rows)
    lines = [
        [
            "C step over all of ResNet-32 (spectra, choice, fits)",
            "1 s",
            f"{c_step['processor seconds']:.2f} s of processor time, {c_step['seconds']:.2f} s on the clock",
        ],
        ["TT-Tucker of its layers against tensorly, same error", "3x faster", f"{tensorly['ratio']:.1f}x"],
        ["EVBMF of 512 x 4608 singular values", "100 ms", f"{1e3 * evbmf['seconds']:.0f} ms"],
        ["training step with the penalty over one without, ResNet-20", "1.10", f"{l_step['ratio']:.2f}"],
    ]
    return table(["what", "goal", "measured"], lines) + "\n\n" + _by("decompositions", content)


def planted_ranks() -> str:
    """Ranks that EVBMF finds in matrices of known rank: by size and noise the highest that is right, the lowest that is not."""
    rows = read_results("decompositions")["planted ranks"]
    wrong = [r for r in rows if abs(r["found"] - r["planted"]) > 0.5]
    lines = []
    for matrix, noise in dict.fromkeys((r["matrix"], r["noise"]) for r in rows):
        alike = [r for r in rows if (r["matrix"], r["noise"]) == (matrix, noise)]
        for r in [*[r for r in alike if r not in wrong][-1:], *[r for r in alike if r in wrong][:1]]:
            lines.append([matrix, f"{noise:.1f}", r["planted"], f"{r['found']:g}", f"{r['known']:g}"])
    right = f"Right, to half a rank, in {len(rows) - len(wrong)} of {len(rows)} cases."
    which = "By size and noise the highest rank that is right, and the lowest that is not:"
    return f"{right} {which}\n\n" + table(["matrix", "noise", "planted", "found", "with the noise known"], lines)


def importance(key: str = "resnet20a 0.5") -> str:
    """The best cut of every score before any training, and what additive scores per cost make: ``benchmarks.importance``."""
    content = read_results("importance")[key]
    lines = []
    for score in sorted({r["score"] for r in content["rows"]}, key=lambda s: min(_losses(content, s))):
        best = min((r for r in content["rows"] if r["score"] == score), key=lambda r: r["loss"])
        plain = next(
            r
            for r in content["rows"]
            if (r["score"], r["per_cost"], r["returns"], r["steps"]) == (score, True, 1.0, 1)
        )  # fmt: skip
        how = [
            "per cost" if best["per_cost"] else "per unit",
            "additive" if best["returns"] == 1 else "diminishing returns",
            "at once" if best["steps"] == 1 else f"in {best['steps']} steps",
        ]
        lines.append(
            [score, ", ".join(how), f"{best['accuracy']:.1f}", f"{best['loss']:.2f}", f"{plain['accuracy']:.1f}"]
        )
    head = ["score", "best way", "accuracy", "loss", "per cost, additive, at once"]
    return table(head, lines) + f"\n\n*`python -m benchmarks.importance`; revision {content['revision']}.*"


def _losses(content: Mapping[str, Any], score: str) -> list[float]:
    return [r["loss"] for r in content["rows"] if r["score"] == score]


def removal() -> str:
    """What a removal in the middle of training changes: ``benchmarks.removal``."""
    content = read_results("removal")
    lines = [
        [
            r["data"],
            r["removals in training"],
            f"{r['largest difference, float32']:.1e}",
            f"{r['largest difference, float64']:.1e}",
            f"{r['largest change of accuracy']:.2f}",
        ]
        for r in content["summary"]
    ]
    head = ["data", "removals", "logits, float32", "logits, float64", "accuracy, points"]
    return table(head, lines) + "\n\n" + _by("removal", content)


def groups_of_shapes() -> str:
    """One kernel shape in a layer or two, in accuracy and in time: ``benchmarks.shape_groups``."""
    content = read_results("shape_groups")
    parts = [
        shape_groups.loss_table(content["loss"]),
        shape_groups.time_table(content["time"]),
        _by("shape_groups", content),
    ]
    return "\n\n".join(parts)


def budgets() -> str:
    """How exactly budgets are met: ``benchmarks.budgets``."""
    content = read_results("budgets")
    found, networks = content["summary"], {r["network"] for r in content["rows"]}
    free, eights = (f"{100 * found['slack'][k]['median']:.2g} %" for k in ("any width", "multiples of 8"))
    return (
        f"Of {found['targets']} random budgets on {len(networks)} networks, {found['above the budget']} were exceeded, "
        f"{found['with a block unused']} left unused what would still fit, and {found['counted otherwise than planned']} cost "
        f"something else once built. Unused, in the median: {free} of the budget at any width, {eights} in multiples of 8. "
        "(`python -m benchmarks.budgets`)"
    )


def families() -> str:
    """How many networks that nobody chose are cut and proven: ``benchmarks.families``."""
    content = read_results("families")
    found = content["summary"]
    whole = f", {found['nothing can go']} stay whole because of how they are written" if found["nothing can go"] else ""
    return (
        f"Of {found['networks']} networks, some of each of {found['files']} model files of timm, {found['proven']} are cut "
        f"and pass every proof{whole}, and {found['failed']} fail. (`python -m benchmarks.families`)"
    )


def options(command: str) -> str:
    """Every option of a command of ``espalier``, as its ``--help`` has it."""
    import typer.main

    from espalier.present.cli import app

    program = typer.main.get_command(app)
    lines: list[list[str | None]] = []
    for parameter in program.commands[command].params:  # type: ignore[attr-defined]
        if parameter.name == "help":
            continue
        names = ", ".join(
            f"`{name}`"
            for name in (
                (*parameter.opts, *parameter.secondary_opts)
                if parameter.param_type_name == "option"
                else [parameter.metavar]
            )
        )
        lines.append([names, parameter.help.replace("|", "\\|")])
    return table([f"`espalier {command}`", ""], lines)


def _by(command: str, *content: Mapping[str, Any]) -> str:
    where = [part["environment"] for part in content]
    hardware = where[-1]["hardware"]
    loads = sorted(w["hardware"]["load_average"] for w in where)
    load = f"{loads[0]}" if loads[0] == loads[-1] else f"{loads[0]} to {loads[-1]}"
    versions, revisions = (", ".join(dict.fromkeys(every)) for every in (
        (w["versions"]["torch"] for w in where), (w["revision"] for w in where)
    ))  # fmt: skip
    return (
        f"*`python -m benchmarks.{command}`; {hardware['cpu']}, {hardware['cores']} cores, load {load}; "
        f"PyTorch {versions}; revision {revisions}.*"
    )


def demo() -> str:
    """How long the demo takes: ``benchmarks.demo``."""
    content = read_results("demo")
    return f"The demo took {content['seconds']:.0f} s; the goal is {content['limit']} s. {_by('demo', content)}"


def processes() -> str:
    """What a second process gains: ``benchmarks.processes``."""
    content = read_results("processes")
    found, network, batch = content["summary"], content["network"], content["batch"]
    threads, agreement = found["speed-up of two threads"], found["agreement"]
    return (
        f"Two processes train a {network} at batches of {batch} in all, two cores, one thread each, "
        f"{found['speed-up']:.2f} times as fast as one does (one process with two threads: {threads:.2f}); the goal is 1.7. "
        f"Of a step {agreement:.1%} goes into agreement, with waiting for the slower one, {found['work of it']:.1%} without; "
        "the goal is 5 %. "
        f"{_by('processes', content)}"
    )


def block_importance() -> str:
    """What residual blocks are worth beside channels, and cuts by both: ``benchmarks.block_importance``."""
    content = read_results("block_importance")
    lines: list[list[str | None]] = []
    for name, one in content.items():
        if "blocks" in one:
            out, half = ([r[k] for r in one["blocks"]] for k in ("rise, BatchNorm anew", "rise of the half"))
            per = [
                (r["rise, BatchNorm anew"] / r["inside"]) / (r["rise of the half"] / r["inside the half"])
                for r in one["blocks"]
            ]
            numbers = [f"{median(values):.3f}" for values in (out, half)]
            lines.append([name, str(len(out)), *numbers, f"{median(per):.2f}"])
    head = [
        "network",
        "blocks",
        "rise of the loss, left out",
        "half of its channels out",
        "ratio per first-order worth",
    ]
    parts = ["Medians over blocks, BatchNorm estimated anew:", table(head, lines)]
    for one in content.values():
        if "cuts" in one:
            rows: list[list[str | None]] = [
                [r["cut"], f"{r['blocks out']}", f"{r['loss']:.2f}", f"{r['accuracy, trained']:.1f}"]
                for r in one["cuts"]
            ]
            parts.append(
                f"{one['model']} at {100 * one['macs']:g} % of the MACs, then {one['steps']} steps of training:"
            )
            parts.append(table(["cut", "blocks out", "loss at once", "accuracy, trained"], rows))
            last = one
    return "\n\n".join([*parts, f"*`python -m benchmarks.block_importance`; revision {last['revision']}.*"])


BLOCKS: dict[str, Callable[..., str]] = {
    "options": options,
    "block-importance": block_importance,
    "budgets": budgets,
    "decompositions": decompositions,
    "demo": demo,
    "processes": processes,
    "dprp-overhead": dprp_overhead,
    "fading-overhead": fading_overhead,
    "families": families,
    "groups-of-shapes": groups_of_shapes,
    "importance": lambda: importance(),
    "int8": eight_bits,
    "latency": times,
    "settings": settings,
    "without-training": lambda: no_training(),
    "planted-ranks": planted_ranks,
    "removal": removal,
}
