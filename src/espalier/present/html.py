"""The report: one HTML file with its style and figures inside, that needs nothing from outside."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from espalier.costs import LATENCY
from espalier.present.figures import (
    COST_TONES,
    PARETO_AXES,
    accuracy_curves,
    budget_bars,
    cost_curves,
    latency_by_layer,
    layer_key,
    loss_curves,
    macs_by_layer,
    network_drawing,
    pareto_plot,
    pressure_curves,
    width_history,
)
from espalier.present.runs import Run, read_run
from espalier.run.charts import figure_style
from espalier.run.course import gap_curve, kernel_history, rank_bars, rank_history, search_curve
from espalier.run.report import COUNTED_WORDS, UNTRAINED, basis, proven, slow_sentence
from espalier.run.rundir import REPORT, to_toml, write_file
from espalier.run.timed import time_sentence

COST_NAMES = {
    "macs": "multiply-adds (MACs)",
    "params": "parameters",
    "activation_memory": "peak activations, bytes",
    "bytes": "size on disk, bytes",
}
BACKENDS = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime"}


def write_report(folders: Sequence[Path], *, out: Path | None = None, timing: bool = True, trust: bool = False) -> Path:
    """Write the page of the runs in ``folders`` to ``out``, by default into the first of them; returns where it is.

    Without ``trust`` no code runs that a folder names: layers of such networks are drawn, and not timed.

    Raises: ValueError for a folder without a finished, undamaged run.
    """
    content = page([read_run(folder, trust=trust) for folder in folders], timing=timing)
    target = out or folders[0] / REPORT
    write_file(target, content.encode())
    return target


def page(runs: Sequence[Run], *, timing: bool = True) -> str:
    """The whole report; with ``timing`` layers are timed now, on this machine."""
    names = _names(runs)
    body = [_comparison(runs, names)] if len(runs) > 1 else []
    body += [_run(run, name, timing=timing, only=len(runs) == 1) for run, name in zip(runs, names, strict=True)]
    title = (
        f"{len(runs)} compressions compared" if len(runs) > 1 else f"{runs[0].title}, compressed by {runs[0].method}"
    )
    style = figure_style() + files("espalier.present").joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<title>{escape(title)}</title><link rel="icon" href="data:,"><style>\n{style}</style></head>\n'
        f"<body><main>\n<h1>{escape(title)}</h1>\n" + "\n".join(body) + "\n</main></body></html>\n"
    )


# -- one run


def _run(run: Run, name: str, *, timing: bool, only: bool) -> str:
    parts = [] if only else [f'<h2 class="title" id="{escape(name)}">{escape(name)}: {escape(run.title)}</h2>']
    parts += [_lead(run), _tiles(run), _asked_and_met(run), _network(run, timing=timing)]
    parts += [_training(run), _speed(run.metrics), _origin(run)]
    return f'<section class="run{" only" if only else ""}">' + "\n".join(filter(None, parts)) + "</section>"


def _lead(run: Run) -> str:
    metrics = run.metrics
    epochs = metrics["epochs"]
    words = f"{epochs} epoch{'s' if epochs != 1 else ''}"
    trained = f"{words} in {_duration(metrics['seconds'])}" if epochs else "no training"
    start = "a trained" if run.config.get("start", {}).get("trained") else "an untrained"
    seed = "" if metrics.get("seed") is None else f", seed {metrics['seed']}"
    return f'<p class="soft">Method {escape(run.method)}, from {start} network, {trained}{escape(seed)}.</p>'


def _tiles(run: Run) -> str:
    metrics, before = run.metrics, run.dense_accuracy
    small, fraction = metrics["small"], metrics["fraction"]
    tiles = []
    if "accuracy" in small:
        change = "" if before is None else f", {_signed(small['accuracy'] - before)} points"
        tiles.append((f"{small['accuracy']:.2f} %", f"test accuracy{change}"))
    tiles.append((_percent(fraction["macs"]), "of the MACs are left"))
    tiles.append((_percent(fraction["params"]), "of the parameters are left"))
    for cost, share in (metrics["counted"] or {}).get("fraction", {}).items():
        tiles.append((_percent(share), f"of the {COST_TONES[cost][0]}: {COUNTED_WORDS}"))
    fastest = [t for t in metrics["latency"] if t["name"] == "small"]
    for timing in fastest[-2:]:
        backend = BACKENDS.get(timing["backend"], timing["backend"])
        tiles.append((f"{timing['speedup']:.2f}×", f"as fast in {backend}, batch {timing['batch']}"))
    cells = "".join(f'<div class="tile"><b>{escape(big)}</b><span>{escape(text)}</span></div>' for big, text in tiles)
    return f'<div class="tiles">{cells}</div>'


def _asked_and_met(run: Run) -> str:
    metrics = run.metrics
    dense, small, limits = metrics["dense"], metrics["small"], metrics["limits"]
    rows = []
    if "accuracy" in small:
        before = run.dense_accuracy
        change = "" if before is None else f"{_signed(small['accuracy'] - before)} points"
        known = (UNTRAINED, UNTRAINED) if before is None else (f"{before:.2f}", _decimals(dense["loss"]))
        rows.append(("test accuracy, %", known[0], f"{small['accuracy']:.2f}", change, ""))
        rows.append(("test loss", known[1], _decimals(small["loss"]), "", ""))
    counted = metrics["counted"] or {"fraction": {}}
    asked = {cost: f"{limit:,}" for cost, limit in limits.items() if cost in COST_NAMES}
    for cost, label in COST_NAMES.items():
        limit = "" if cost in counted else asked.get(cost, "")
        rows.append((label, f"{dense[cost]:,}", f"{small[cost]:,}", _percent(metrics["fraction"][cost]), limit))
    for cost, share in counted["fraction"].items():
        label = f"{COST_NAMES[cost]}, {COUNTED_WORDS}"
        rows.append((label, f"{dense[cost]:,}", f"{counted[cost]:,}", _percent(share), asked.get(cost, "")))
    table = _table(("", "dense", "small", "small / dense", "limit"), rows)
    caption = "The mark is the limit; the pale bar is the dense network."
    kept = all({**small, **counted}[cost] <= limit for cost, limit in limits.items() if cost in COST_NAMES)
    verdict = ("Every limit is kept." if kept else "A LIMIT IS EXCEEDED.") if set(limits) - {LATENCY} else ""
    if metrics.get("time"):
        verdict = f"{verdict} {time_sentence(metrics['time'])}".strip()
    if metrics["counted"]:
        verdict += f" Limits are met as {metrics['counted']['note']}; the other rows are what is executed."
    others = run.config["budget"].get("multiple_of", 1)
    aligned = f" Widths and ranks are multiples of {others} or whole." if others != 1 else ""
    return (
        f"<h2>What was asked, and what was met</h2><p>{escape(f'{verdict}{aligned} {basis(metrics)} {proven(metrics)}')}</p>"
        '<div class="figures asked">'
        + _figure(budget_bars(run, COST_NAMES), "Share of the dense network that is left", caption)
        + f"<div>{table}</div></div>"
    )


def _network(run: Run, *, timing: bool) -> str:
    if not run.layers:
        return f'<h2>The network</h2><p class="note">Not drawn: {escape(run.note)}.</p>'
    drawing = network_drawing(run)
    figures = [
        _figure(
            drawing, "Layer by layer, input on top", "Pale: outputs of the dense layer. Strong: outputs that stayed."
        ),
        _figure(macs_by_layer(run), "Multiply-adds of every layer", "Pale: dense. Strong: small, and its share."),
    ]
    if timing and run.dense is not None and run.small is not None:
        chart, batch = latency_by_layer(run)
        caption = (
            f"PyTorch, batch {batch}, one thread of the machine that wrote this page; the fastest of interleaved runs."
        )
        figures.append(_figure(chart, "Time of every layer", caption))
    key = "".join(
        f'<span><i style="background:var(--c{tone})"></i>{escape(text)}</span>' for tone, text in layer_key(run).items()
    )
    key = f'<p class="legend soft">{key}</p>' if key else ""
    note = f'<p class="note">Not drawn: the time of every layer; {escape(run.note)}.</p>' if run.note else ""
    return f'<h2>The network</h2>{note}{key}<div class="figures three">{"".join(figures)}</div>'


def _training(run: Run) -> str:
    if not run.epochs:
        return ""
    figures = [
        _figure(accuracy_curves(run), "Accuracy", "Training images are augmented, and seen before the step."),
        _figure(
            cost_curves(run), "The budget closing in", "Cost of the network as it was executed; dashed: the limits."
        ),
        _figure(pressure_curves(run), "Pressure", "What is to go and is still felt, and how hard the method presses."),
        _figure(loss_curves(run), "Loss", "Training: what was minimised, distillation and penalty included."),
        _figure(width_history(run), "Width of every group over time", "Kept units as a share of what the group had."),
        *_course(run),
    ]
    return f'<h2>Training</h2><div class="figures">{"".join(figures)}</div>'


_KERNELS = (
    "Positions that the keep-set leaves of a kernel, of free stripes the mean over filters; the kernel is cut, or the stripes "
    "stay zero, once it is final.  Layers that keep all are not drawn."
)


def _course(run: Run) -> list[str]:
    """What the method recorded on its way."""
    history, epochs = run.history, max(run.metrics["epochs"], 1)
    ranks = history.get("rank", {})
    bars = rank_bars(ranks, history.get("full rank", {}))
    return [
        _figure(
            gap_curve(history.get("gap", {})), "Penalty gap", "How far the weights are from their compressed form."
        ),
        _figure(
            search_curve(history.get("search", {})), "Search for ranks", "Every trial is within the budget, or failed."
        ),
        _figure(bars, "Rank of every layer", "Pale: full. Strong: kept; of several ranks of a form the least."),
        _figure(
            rank_history(ranks, epochs=epochs),
            "Rank of every layer over time",
            "Lowest, middle and highest have their names.",
        ),
        _figure(kernel_history(history.get("kernel", {}), epochs=epochs), "Kernel of every layer over time", _KERNELS),
    ]


def _speed(metrics: dict[str, Any]) -> str:
    if not metrics["latency"]:
        return ""
    dense = {(t["backend"], t["batch"]): t["milliseconds"] for t in metrics["latency"] if t["name"] == "dense"}
    rows = []
    for timing in metrics["latency"]:
        if timing["name"] != "dense":
            where = f"{BACKENDS.get(timing['backend'], timing['backend'])}, batch {timing['batch']}"
            before = dense[timing["backend"], timing["batch"]]
            rows.append((where, f"{before:.3g}", f"{timing['milliseconds']:.3g}", f"{timing['speedup']:.2f}×"))
    table = _table(("whole network", "dense, ms", "small, ms", "speed-up"), rows)
    return f'<h2>Speed</h2><p class="soft">Measured at the end of the run; one thread, fastest of interleaved runs.</p>{table}'


def _origin(run: Run) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run.metrics["versions"].items())
    difference = run.metrics.get("onnx_difference")
    lines = [f"Made with {versions}."]
    if difference is not None:
        lines.append(f"model.onnx differs from PyTorch by at most {difference:.1e}.")
    notes = "".join(
        f'<p class="note">Missing: {escape(name)} ({escape(str(reason))})</p>'
        for name, reason in run.metrics["notes"].items()
    )
    if slow := slow_sentence(run.metrics):
        notes += f'<p class="note">{escape(slow)}</p>'
    config = {section: dict(values) for section, values in run.config.items() if values}
    if "weights" in config.get("model", {}):
        config["model"]["weights"] = Path(
            str(config["model"]["weights"])
        ).name  # a page that is sent around names no folders
    return (
        f"<h2>How to repeat it</h2><p>{escape(' '.join(lines))}</p>{notes}"
        f"<details><summary>Configuration</summary><pre>{escape(to_toml(config))}</pre></details>"
    )


# -- several runs


def _comparison(runs: Sequence[Run], names: Sequence[str]) -> str:
    rows = []
    for run, name in zip(runs, names, strict=True):
        metrics, fraction = run.metrics, run.metrics["fraction"]
        small, before = metrics["small"], run.dense_accuracy
        fast = [t for t in metrics["latency"] if t["name"] == "small" and t["batch"] == 1]
        rows.append(
            (
                name, run.title, run.method, (UNTRAINED if "accuracy" in small else "–") if before is None else f"{before:.2f}",
                f"{small['accuracy']:.2f}" if "accuracy" in small else "–",
                _percent(fraction['macs']), _percent(fraction['params']),
                f"{fast[-1]['speedup']:.2f}×" if fast else "–", str(metrics["epochs"]),
            )
        )  # fmt: skip
    head = ("run", "network", "method", "dense, %", "small, %", "MACs left", "params left", "speed-up", "epochs")
    figures = "".join(
        _figure(pareto_plot(runs, names, cost=cost), f"Accuracy against {axis}", "Hollow: dense. Dashed: the frontier.")
        for cost, axis in PARETO_AXES.items()
    )
    return (
        f"{_table(head, rows)}<p class='soft'>Accuracy is that of the last epoch on the test set; speed-up at batch 1, in ONNX "
        f"Runtime where it was there.</p><div class='figures'>{figures}</div>"
    )


def _names(runs: Sequence[Run]) -> list[str]:
    """Folder names; with the folder above where two are the same."""
    short = [run.name for run in runs]
    return [
        n if short.count(n) == 1 else "/".join(r.folder.resolve().parts[-2:]) for n, r in zip(short, runs, strict=True)
    ]


# -- parts


def _figure(chart: str, title: str, caption: str) -> str:
    """Nothing where there is nothing to draw."""
    if not chart:
        return ""
    return f"<figure><figcaption>{escape(title)}<small>{escape(caption)}</small></figcaption>{chart}</figure>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _decimals(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
