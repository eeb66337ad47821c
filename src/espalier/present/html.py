"""The report: one HTML file with its style and figures inside, that needs nothing from outside, and the same numbers as CSV.

``report.html.j2`` says what stands where; here is what it is told.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from datetime import date
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any

from espalier.costs import LATENCY
from espalier.present.figures import COST_WORDS, Seeds, figures_of, figures_of_all, time_left
from espalier.present.runs import COSTS, FinishedRun, blank_input, read_run
from espalier.run.anatomy import ComparedLayer, timed
from espalier.run.charts import COLOURS
from espalier.run.progress import short
from espalier.run.report import UNTRAINED, basis, places, points, proven, scores, slow_sentence
from espalier.run.rundir import REPORT, to_toml, write_file
from espalier.run.timed import time_sentence
from espalier.surgery.writing import check_place

COST_NAMES = {
    "macs": "multiply-adds (MACs)",
    "params": "parameters",
    "activation_memory": "peak activations, bytes",
    "bytes": "size on disk, bytes",
}
RUNTIME_NAMES = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
TONES = ("the layer as it was, or with fewer channels", "factorised into several layers", "another kernel")
BUSY = 0.1  # two measurements further apart are not to be relied on
BUSY_ROUNDS = 1.5  # nor are times whose median round took longer than the fastest by this factor


def write_report(
    folders: Sequence[Path],
    *,
    out: Path | None = None,
    table: Path | None = None,
    runtime: str | None = None,
    timing: bool = True,
    trust: bool = False,
) -> Path:
    """Write the page of the runs in ``folders`` to ``out``, by default into the first of them; returns where it is.

    ``table`` receives a row of numbers per run, as CSV.  Without ``trust`` no code runs that a folder names: layers of such
    networks are drawn, and not timed.

    Raises: ValueError for a folder without a finished, undamaged run, runs that are judged by different metrics, a
    ``runtime`` that not all of them were timed in, and a place that cannot be written.
    """
    runs = [read_run(folder, trust=trust) for folder in folders]
    target = out or folders[0] / REPORT
    for place in (target, table):
        if place is not None:
            check_place(place)
    content = page(runs, timing=timing, runtime=runtime)
    write_file(target, content.encode())
    if table is not None:
        write_file(table, as_csv(runs).encode())
    return target


def page(runs: Sequence[FinishedRun], *, timing: bool = True, runtime: str | None = None) -> str:
    """The whole report; with ``timing`` layers are timed now, on this machine.  All times are those in ``runtime``."""
    from jinja2 import Environment, FunctionLoader
    from markupsafe import Markup

    groups, names, runtime = grouped(runs), _names(runs), _runtime(runs, runtime)
    page = Environment(loader=FunctionLoader(_part), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page.filters |= {"percent": percent, "what": what_stands_there, "chart": lambda svg: Markup(themed(svg))}
    return page.get_template("report.html.j2").render(
        title=f"{len(runs)} runs compared" if len(runs) > 1 else runs[0].heading,
        colours=COLOURS,
        tones=TONES,
        comparison=_comparison(groups, runtime) if len(runs) > 1 else None,
        sections=[_section(run, name, runtime, timing) for run, name in zip(runs, names, strict=True)],
    )


def _part(name: str) -> str:
    return files("espalier.present").joinpath(name).read_text(encoding="utf-8")


def themed(svg: str) -> str:
    """The chart in the colours of the page, which knows light and dark."""
    names = {colour: name for name, colour in COLOURS.items()}
    return re.sub("|".join(names), lambda found: f"var(--{names[found[0]]})", svg)


def _runtime(runs: Sequence[FinishedRun], wanted: str | None) -> str | None:
    """What the times of the page are of: what was asked for, else the last that every run was timed in."""
    measured = [[t["backend"] for t in run.metrics["latency"]] for run in runs if not run.is_dense]
    common = [b for b in dict.fromkeys(chain(*measured)) if all(b in own for own in measured)]
    if wanted is not None and wanted not in common:
        raise ValueError(f"report: not every run was timed in {wanted!r}; there is {', '.join(common) or 'none'}")
    return wanted or (common[-1] if common else None)


# -- one run


def _section(run: FinishedRun, name: str, runtime: str | None, timing: bool) -> dict[str, Any]:
    config = {section: dict(values) for section, values in run.config.items() if values}
    if "weights" in config.get("model", {}):  # a page that is sent around names no folders
        config["model"]["weights"] = Path(str(config["model"]["weights"])).name
    return {
        "run": run,
        "name": name,
        "sentence": sentence(run, runtime),
        "origin": _origin(run, runtime),
        "tiles": [] if run.is_dense else _tiles(run, runtime),
        "verdict": _verdict(run),
        "scores": [(*row, change.replace("-", "−")) for *row, change in scores(run.metrics, run.config)],
        "costs": _costs(run),
        "layers": _layers(run, timing),
        "figures": figures_of(run),
        "slow": slow_sentence(run.metrics),
        "config": to_toml(config),
    }


def sentence(run: FinishedRun, runtime: str | None = None) -> str:
    """What was asked for, what was met, and what was lost, with an error where the test images give one."""
    if run.is_dense:
        return f"{run.title} was trained as it is{_reached(run)}."
    metrics = run.metrics
    network = f"{'a trained' if run.config.get('start', {}).get('trained') else 'an untrained'} {run.title}"
    met = listed(
        [percent(_meant(run, cost)) for cost in metrics["limits"] if cost in COST_NAMES or metrics.get("time")]
    )
    if asked := _asked(run):
        text = f"{run.method} was asked for at most {asked} of {network}{f', kept {met}' if met else ''}"
    else:
        text = f"{run.method} chose the size of {network}, kept {percent(metrics['fraction']['macs'])} of the MACs"
    if kept := metrics.get("time"):
        text += f", takes {kept['small']:.3g} ms instead of {kept['dense']:.3g}"
    elif time := run.times(runtime or "").get(1):
        text += f", takes {time[1]['milliseconds']:.3g} ms instead of {time[0]['milliseconds']:.3g}"
    return f"{text}{_reached(run)}."


def _asked(run: FinishedRun) -> str:
    """``40 % of the MACs and 50 % of the time``."""
    dense, limits = run.metrics["dense"], run.metrics["limits"]
    parts = [f"{100 * limits[c] / dense[c]:.4g} % of the {COST_WORDS[c]}" for c in limits if c in COST_WORDS]
    if LATENCY in limits:
        asked = (run.metrics.get("time") or {}).get("asked")
        parts.append(f"{100 * asked:.4g} % of the time" if isinstance(asked, float) else f"{limits[LATENCY]:.3g} ms")
    return listed(parts)


def _meant(run: FinishedRun, cost: str) -> float:
    """The share that a limit is about."""
    if cost == LATENCY:
        return float(run.metrics["time"]["small"] / run.metrics["time"]["dense"])
    return float(run.metrics["fraction"][cost])


def _reached(run: FinishedRun) -> str:
    """``, and lost 0.56 points of accuracy (98.61 ± 0.63 %, before 99.17 ± 0.50 %)``."""
    score, before = run.score, run.dense_score
    if score is None:
        return ""
    if before is None:
        return f", and has a test {run.metric.words} of {run.told(score)}"
    verb = "lost" if (before > score) is run.metric.higher_is_better and before != score else "gained"
    amount = f"{abs(score - before):.{places(run.metric)}f}{points(run.metric)}"
    return f", and {verb} {amount} of {run.metric.words} ({run.told(score)}, before {run.told(before)})"


def _origin(run: FinishedRun, runtime: str | None) -> str:
    """How long, of which images, when, where, in what."""
    metrics, epochs = run.metrics, run.metrics["epochs"]
    day, images, seed = (metrics.get(key) for key in ("date", "test_images", "seed"))
    facts = [
        f"{epochs} epoch{'s' if epochs != 1 else ''} in {_duration(metrics['seconds'])}" if epochs else "no training",
        "" if seed is None else f"seed {seed}",
        f"{images:,} test images" if images else "",
        "± is one binomial standard error" if run.score is not None and run.error(run.score) is not None else "",
        f"{date.fromisoformat(day[:10]):%d %B %Y}".lstrip("0") if day else "",
        metrics.get("processor", ""),
        f"times in {RUNTIME_NAMES.get(runtime, runtime)}, one thread" if runtime and not run.is_dense else "",
    ]
    return " · ".join(filter(None, facts))


def _tiles(run: FinishedRun, runtime: str | None) -> list[tuple[str, str]]:
    """Big, and small below it."""
    tiles = []
    if run.score is not None:
        tiles.append(
            (run.told(run.score, error=False), f"test {run.metric.words}{f', {run.change}' if run.change else ''}")
        )
    fraction = run.metrics["fraction"]
    tiles += [(percent(fraction[cost]), f"of the {COST_WORDS[cost]} are left") for cost in ("macs", "params")]
    for batch, (dense, small) in run.times(runtime or "").items():
        spread = max(dense.get("spread", 1.0), small.get("spread", 1.0))
        text = f"{f'a batch of {batch}' if batch > 1 else 'one image'}, {small['speedup']:.2f}× as fast "
        text += f"(dense: {dense['milliseconds']:.3g} ms)"
        if spread > BUSY_ROUNDS:
            text += f"; UNRELIABLE: the machine was busy (median round {spread:.1f}× the fastest)"
        tiles.append((f"{small['milliseconds']:.3g} ms", text))
    return tiles


def _verdict(run: FinishedRun) -> str:
    metrics, limits = run.metrics, run.metrics["limits"]
    over = any(metrics["small"][cost] > limit for cost, limit in limits.items() if cost in COST_NAMES)
    multiple = run.config["budget"].get("multiple_of", 1)
    parts = [
        ("A LIMIT IS EXCEEDED." if over else "Every limit is kept.") if set(limits) - {LATENCY} else "",
        time_sentence(metrics["time"]) if metrics.get("time") else "",
        f"Widths and ranks are multiples of {multiple} or whole." if multiple != 1 else "",
        basis(metrics),
        "" if run.is_dense else proven(metrics),
    ]
    return " ".join(filter(None, parts))


def _costs(run: FinishedRun) -> list[tuple[Any, ...]]:
    """Label, dense, small, share, limit, limit as a share."""
    dense, small, fraction, limits = (run.metrics[table] for table in ("dense", "small", "fraction", "limits"))
    return [
        (label, dense[c], small[c], fraction[c], limits.get(c), limits.get(c, dense[c]) / dense[c])
        for c, label in COST_NAMES.items()
    ]


def _layers(run: FinishedRun, timing: bool) -> dict[str, Any]:
    """Every layer before and after, timed if they can be; and the largest of everything, which bars are shares of."""
    layers, note, batch, apart = run.layers, run.note, 0, 0.0
    if timing and layers and run.dense is not None and run.small is not None:
        batch = 64 if run.config["model"]["image_size"] <= 64 else 8
        example = blank_input(run.config).expand(batch, -1, -1, -1).contiguous()
        try:
            layers, apart = timed(layers, run.dense, run.small, example=example)
        except (ValueError, RuntimeError, KeyError, ImportError) as error:
            note, batch = f"the layers cannot be timed: {error}", 0
    tones = [1 if lr.factorised else 2 if lr.reshaped else 0 for lr in layers]
    return {
        "rows": list(zip(layers, tones, strict=True)),
        "tones": sorted(set(tones)),
        "widest": max((n for lr in layers for n in (lr.dense.outputs, *(s.outputs for s in lr.small))), default=1),
        "most": {k: max((max(getattr(lr, f"dense_{k}"), getattr(lr, f"small_{k}")) for lr in layers), default=0) or 1
                 for k in ("macs", "ms")},
        "total": short(sum(lr.dense_macs for lr in layers)),
        "note": note, "batch": batch, "apart": apart, "unreliable": apart > BUSY,
    }  # fmt: skip


def what_stands_there(layer: ComparedLayer) -> str:
    """``12 of 16``; ``rank 5: 1×3, 3×1``; ``3×1, 12 of 16``; ``12 of 16, reads 9`` where inputs were left out as well."""
    if layer.factorised:
        ranks = ", ".join(str(stage.outputs) for stage in layer.small[:-1])
        return f"rank {ranks}: {', '.join(stage.shape for stage in layer.small)}"
    if not layer.small:
        return "left out"
    kept = layer.small[-1].outputs
    text = f"{kept}" if kept == layer.dense.outputs else f"{kept} of {layer.dense.outputs}"
    text += f", reads {layer.small[0].inputs}" if layer.small[0].chooses else ""
    return f"{layer.small[0].shape}, {text}" if layer.reshaped else text


# -- several runs


def grouped(runs: Sequence[FinishedRun]) -> list[Seeds]:
    """Runs that differ in their seed alone, together.  Raises: ValueError for runs that are judged by different metrics."""
    if len(metrics := dict.fromkeys(run.metric.name for run in runs)) > 1:
        raise ValueError(f"report: these runs are judged by {listed(list(metrics))}; make a page for each")
    settings: dict[str, list[tuple[FinishedRun, str]]] = {}
    for run, name in zip(runs, _names(runs), strict=True):
        settings.setdefault(run.setting, []).append((run, name))
    groups: list[Seeds] = []
    for members in settings.values():
        first, name = members[0]
        if len(members) > 1:
            name = ", ".join(filter(None, [first.method, _asked(first)]))
            name += f" ({len(groups) + 1})" if name in [group.name for group in groups] else ""
        groups.append(Seeds(name, tuple(run for run, _ in members)))
    return groups


def _comparison(groups: Sequence[Seeds], runtime: str | None) -> dict[str, Any]:
    metric, rows = groups[0].first.metric, []
    for group in groups:
        run = group.first
        untrained = "–" if run.score is None else UNTRAINED
        shares = [
            group.mean(lambda r: r.metrics["fraction"]["macs"]),
            group.mean(lambda r: r.metrics["fraction"]["params"]),
        ]
        took = group.mean(lambda r: r.times(runtime or "").get(1, ({}, {}))[1].get("milliseconds"))
        left = None if run.is_dense else group.mean(lambda r: time_left(r, runtime))
        seeds = [str(r.metrics.get("seed", "–")) for r in group.runs]
        rows.append([
            group.name, run.title, run.method, untrained if run.dense_score is None else group.told(lambda r: r.dense_score),
            group.told(lambda r: r.score), *(percent(share or 0.0) for share in shares), "–" if took is None else f"{took:.3g}",
            "–" if left is None else f"{1 / left:.2f}×", str(run.metrics["epochs"]), ", ".join(seeds),
        ])  # fmt: skip
    scores = {g: s for g in groups if not g.first.is_dense and (s := g.mean(lambda r: r.score)) is not None}
    best = max(scores, key=lambda g: scores[g] * (1 if metric.higher_is_better else -1), default=None)
    text = f"{sum(len(group.runs) for group in groups)} runs in {len(groups)} settings of "
    text += f"{listed(list(dict.fromkeys(group.first.title for group in groups)))}."
    if best is not None:
        text += f" Best of the compressed: {best.name}, with a test {metric.words} of {best.told(lambda r: r.score)}"
        text += f" at {percent(best.first.metrics['fraction']['macs'])} of the MACs."
    unit = f", {metric.unit}" if metric.unit else ""
    head = f"setting|network|method|dense{unit}|small{unit}|MACs left|parameters left|ms|speed-up|epochs|seed"
    return {
        "sentence": text,
        "head": head.split("|"),
        "rows": rows,
        "figures": figures_of_all(groups, runtime),
        "runtime": RUNTIME_NAMES.get(runtime or "", runtime),
        "metric": metric.words,
        "better": "more" if metric.higher_is_better else "less",
    }


def as_csv(runs: Sequence[FinishedRun]) -> str:
    """A row per run: what it was, its scores, costs of both networks, every measured time."""
    rows = []
    for name, run in [(group.name, run) for group in grouped(runs) for run in group.runs]:
        metrics, error = run.metrics, None if run.score is None else run.error(run.score)
        row: dict[str, Any] = {"run": run.name, "setting": name, "method": run.method}
        row |= {"network": run.config["model"].get("name"), "data": run.config["data"].get("name")}
        row |= {key: metrics.get(key) for key in ("seed", "epochs", "seconds", "date", "processor", "test_images")}
        row |= {"metric": run.metric.name, "dense": run.dense_score, "small": run.score, "standard error": error}
        for cost in COSTS:
            row |= {f"{side} {cost}": metrics[side][cost] for side in ("dense", "small")}
            row[f"limit {cost}"] = metrics["limits"].get(cost)
        row |= {f"{t['name']} ms, {t['backend']}, batch {t['batch']}": t["milliseconds"] for t in metrics["latency"]}
        rows.append(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(chain(*rows))), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _names(runs: Sequence[FinishedRun]) -> list[str]:
    """Folder names; with the folder above where two are the same."""
    names = [run.name for run in runs]
    parts = [run.folder.resolve().parts[-2:] for run in runs]
    return [name if names.count(name) == 1 else "/".join(part) for name, part in zip(names, parts, strict=True)]


# -- words


def listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
