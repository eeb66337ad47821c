"""The results of a run, written into its folder: networks, metrics, and a summary to read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from espalier.costs import COUNTS, LATENCY
from espalier.graph.watch import first_line
from espalier.run.anatomy import layers_of
from espalier.run.latency import LANES, Model, Timing, latency, ms_said, size_on_disk, slow_widths
from espalier.run.onnx import export_onnx
from espalier.run.preprocessing import Preprocessing
from espalier.run.rundir import METRICS, MODEL, ONNX, PREPROCESSING, SUMMARY, metadata_of, write_file, write_sealed
from espalier.run.timed import time_sentence
from espalier.surgery import save
from espalier.tasks import Classification, Metric
from espalier.timing.on_device import processor

if TYPE_CHECKING:
    from espalier.run.compress import Result

BATCH_SIZES = (1, 64)


@dataclass(frozen=True)
class Outcome:
    """What the files of a run say beside its result."""

    result: Result
    dense_model: nn.Module
    example: Any
    dense_result: Mapping[str, float]  # accuracy and loss; empty without data
    small_result: Mapping[str, float]
    cut_seconds: float  # in the method before and after training
    skipped: Mapping[str, str]  # layers that the method left as they are, and why
    config: Mapping[str, Any]
    preprocessing: Preprocessing | None  # from a picture to an input, where the data says it
    test_images: int


def write_results(folder: Path, outcome: Outcome) -> None:
    """Write ``model.safetensors``, ``model.onnx``, ``metrics.json`` and ``summary.md``.

    What cannot be measured or exported here - an extra that is not installed, an operation without a
    translation - is said in the metrics and the summary; the run is not lost for it.
    """
    save(outcome.result.model, folder / MODEL)
    if outcome.preprocessing is not None:
        write_file(folder / PREPROCESSING, outcome.preprocessing.to_json().encode())
    metrics = measured(folder, outcome)
    write_sealed(folder / METRICS, metrics)
    write_file(folder / SUMMARY, summary(metrics, outcome.config).encode())


def measured(folder: Path, outcome: Outcome) -> dict[str, Any]:
    """The content of ``metrics.json``; writes ``model.onnx`` on the way."""
    result, notes = outcome.result, dict[str, str]()
    difference = None
    try:
        difference = export_onnx(result.model, folder / ONNX, outcome.example, metadata=metadata_of(folder))
    except ValueError as error:
        notes["model.onnx"] = str(error)
    timings: list[Timing] = []
    for backend in ("torch", "onnxruntime"):
        try:
            timings += _timings(outcome, backend, folder / ONNX if difference is not None else None)
        except (ValueError, RuntimeError) as error:
            notes[f"latency, {backend}"] = first_line(error)
    layers: list[dict[str, Any]] = []
    try:
        layers = [asdict(layer) for layer in layers_of(outcome.dense_model, result.model, outcome.example)]
    except (ValueError, RuntimeError) as error:
        notes["layers"] = first_line(error)
    dense_bytes, small_bytes = size_on_disk(outcome.dense_model), (folder / MODEL).stat().st_size
    return {
        "dense": {**outcome.dense_result, **result.dense.counts, "bytes": dense_bytes},
        "small": {**outcome.small_result, **result.cost.counts, "bytes": small_bytes},
        "metric": asdict(result.judged_by or Classification().metric),
        "fraction": {**result.cost.fraction_of(result.dense), "bytes": small_bytes / dense_bytes},
        "limits": dict(result.limits),
        "example_batch": _batch(outcome.example),
        "latency": [asdict(timing) for timing in timings],
        "time": None if result.time is None else asdict(result.time),
        "layers": layers,  # so that a report needs no network
        "onnx_difference": difference,
        "skipped": dict(outcome.skipped),
        "proof": None if result.proof is None else {"passed": result.proof.passed, **asdict(result.proof)},
        "notes": notes,
        "slow_widths": slow_widths(result.model),
        "epochs": len(result.history.epochs),
        "seconds": result.history.seconds,
        "cut_seconds": outcome.cut_seconds,
        "seed": outcome.config["recipe"].get("seed"),
        **circumstances(outcome.test_images),
        "versions": outcome.config["versions"],
    }


def circumstances(test_images: int) -> dict[str, Any]:
    """When and where a run ended, and by how many images it is judged; 0 where that is not known."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {"test_images": test_images, "date": now, "processor": processor()}


def _batch(example: Any) -> int | None:
    """``None`` where it does not show: nested inputs, inputs of several sizes or of one dimension."""
    inputs = (
        example.values() if isinstance(example, dict) else example if isinstance(example, (tuple, list)) else (example,)
    )
    sizes = {len(i) if isinstance(i, Tensor) and i.dim() > 1 else None for i in inputs}
    return sizes.pop() if len(sizes) == 1 else None


def _timings(outcome: Outcome, backend: str, exported: Path | None) -> list[Timing]:
    """``exported``: the small network as ONNX, which need not be exported again."""
    example = outcome.example
    if isinstance(example, dict):
        raise ValueError("models with keyword inputs are not timed")
    tensors = example if isinstance(example, (tuple, list)) else (example,)
    if not all(isinstance(t, Tensor) for t in tensors):
        raise ValueError("models with nested inputs are not timed")
    small: Model = exported if backend == "onnxruntime" and exported is not None else outcome.result.model
    models: dict[str, Model] = {"dense": outcome.dense_model, "small": small}
    return latency(models, tuple(t.detach().cpu() for t in tensors), backend=backend, batch_sizes=BATCH_SIZES)


UNTRAINED = "untrained"


def metric_of(metrics: Mapping[str, Any]) -> Metric:
    """What the networks of a run are judged by; older runs, which do not say it, were of classifiers."""
    return Metric(**metrics.get("metric", {"name": "accuracy", "unit": "%"}))


def dense_score(metrics: Mapping[str, Any], config: Mapping[str, Any]) -> float | None:
    """Of the network that the run began with, in its metric; ``None`` where it was untrained or nothing was tested."""
    score: float | None = metrics["dense"].get(metric_of(metrics).name)
    return score if config.get("start", {}).get("trained") else None


def summary(metrics: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """``metrics.json`` as Markdown."""
    dense, small, fraction = metrics["dense"], metrics["small"], metrics["fraction"]
    origin = [f"{config[name]['name']}" for name in ("model", "data") if "name" in config.get(name, {})]
    title = " on ".join(origin) or "A network"
    lines = [f"# {title}, compressed by {config['method']['name']}", "", _sentence(metrics, config), ""]
    lines += ["| | dense | small | small / dense |", "|---|---:|---:|---:|"]
    lines += [f"| {' | '.join(row)} |" for row in scores(metrics, config)]
    limits = {name: f" (limit {limit:,})" for name, limit in metrics["limits"].items()}
    for name, label in _LABELS.items():
        lines.append(f"| {label} | {dense[name]:,} | {small[name]:,}{limits.get(name, '')} | {fraction[name]:.1%} |")
    lines += ["", proven(metrics), "", *_latency_table(metrics["latency"])]
    lines += [f"{time_sentence(metrics['time'])}\n"] if metrics.get("time") else []
    if metrics["epochs"]:
        epochs = "1 epoch" if metrics["epochs"] == 1 else f"{metrics['epochs']} epochs"
        lines += [f"Trained for {epochs} in {metrics['seconds']:.0f} s, seed {metrics['seed']}.", ""]
    if metrics["onnx_difference"] is not None:
        lines += [f"`model.onnx` differs from PyTorch by at most {metrics['onnx_difference']:.1e}.", ""]
    lines += _skipped(metrics.get("skipped", metrics.get("left", {})))  # older runs: "left"
    lines += [f"{slow}\n"] if (slow := slow_sentence(metrics)) else []
    lines += [f"Missing - {name}: {reason}\n" for name, reason in metrics["notes"].items()]
    versions = ", ".join(f"{name} {version}" for name, version in metrics["versions"].items())
    lines += [f"Made with {versions}. `config.toml` reproduces it, `log.csv` has every epoch.", ""]
    return "\n".join(lines)


def scores(metrics: Mapping[str, Any], config: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Label, dense, small and change of what the networks are judged by, and of the loss; empty where nothing was tested."""
    dense, small, metric = metrics["dense"], metrics["small"], metric_of(metrics)
    if small.get(metric.name) is None:
        return []
    before = dense_score(metrics, config)
    label = f"test {metric.words}{', ' if metric.unit else ''}{metric.unit}"
    label += "" if metric.higher_is_better else " (less is better)"
    rows = [(label, metric.name, places(metric), changed(metrics, config)), ("test loss", "loss", 4, "")]
    return [
        (text, UNTRAINED if before is None else f"{dense[key]:.{digits}f}", f"{small[key]:.{digits}f}", change)
        for text, key, digits, change in rows
        if small.get(key) is not None and dense.get(key) is not None
    ]


def changed(metrics: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """``-0.56 points``, from the dense network's; empty where that is not known."""
    metric, before = metric_of(metrics), dense_score(metrics, config)
    score = metrics["small"].get(metric.name)
    return "" if None in (score, before) else f"{score - before:+.{places(metric)}f}{points(metric)}"


def points(metric: Metric) -> str:
    """What differences of scores are counted in."""
    return " points" if metric.unit == "%" else metric.unit and f" {metric.unit}"


def places(metric: Metric) -> int:
    """Decimals that a value is shown with."""
    return 2 if metric.unit else 4


_LABELS = {
    **dict(zip(COUNTS, ("MACs", "parameters", "peak activation memory, bytes"), strict=True)),
    "bytes": "bytes on disk",
}


def _skipped(skipped: Mapping[str, str]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for layer, reason in skipped.items():
        reasons.setdefault(reason, []).append(layer)
    return [f"Left as they were, {len(names)} ({why}): {', '.join(names)}.\n" for why, names in reasons.items()]


def slow_sentence(metrics: Mapping[str, Any]) -> str | None:
    """What to know about the widths that were left, if there is anything."""
    layers = metrics.get("slow_widths")
    if not layers:
        return None
    return (
        f"Slow: depthwise convolutions whose number of channels is no multiple of {LANES}, which ONNX Runtime computes channel "
        f"by channel; a budget with multiple_of={LANES} avoids it: {', '.join(layers)}."
    )


def _sentence(metrics: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    if not metrics["limits"]:
        return f"No budget: the method found the size. {basis(metrics)}"
    limits = ", ".join(
        f"{name} up to {value:.3g} ms" if name == LATENCY else f"{name} up to {value:,}"
        for name, value in metrics["limits"].items()
    )
    multiple = config["budget"].get("multiple_of", 1)
    widths = f"; widths and ranks in multiples of {multiple}, or whole" if multiple > 1 else ""
    return f"Budget: {limits}{widths}. {basis(metrics)}"


def proven(metrics: Mapping[str, Any]) -> str:
    """What was proven of the small network, or what failed, in one sentence."""
    proof = metrics.get("proof")
    if proof is None:
        return "Not proven: nobody asked, or an older version began the run."
    failed = [f"{c['name']} ({c['detail']})" for c in proof["checks"] if not c["passed"]]
    if failed:
        return f"NOT WHAT WAS PROMISED: {'; '.join(failed)}."
    said = [c["name"] + (f" ({c['detail']})" if c["name"].startswith("small equals") else "") for c in proof["checks"]]
    return f"Proven: {'; '.join(said)}."


def basis(metrics: Mapping[str, Any]) -> str:
    """What is counted, and at which input."""
    batch = metrics.get("example_batch")  # runs from before it was written down do not say it
    shown = "" if batch is None else f" (batch {batch})"
    return f"One multiply-add is one MAC; costs are those of {'a single input' if batch == 1 else f'the example input{shown}'}."


def _latency_table(timings: list[dict[str, Any]]) -> list[str]:
    if not timings:
        return []
    lines = ["| latency | dense, ms | small, ms | speed-up |", "|---|---:|---:|---:|"]
    for first, second in zip(timings[::2], timings[1::2], strict=True):
        place, times = f"{first['backend']}, batch {first['batch']}", (first["milliseconds"], second["milliseconds"])
        lines.append(f"| {place} | {ms_said(times[0])} | {ms_said(times[1])} | {second['speedup']:.2f}x |")
    return [*lines, "", "One thread of this machine's processor, the fastest of several interleaved runs.", ""]
