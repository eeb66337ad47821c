"""A run folder read back for the report; what is absent or damaged is said by file and by what to do."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from espalier.costs import cost
from espalier.graph import trace
from espalier.present.config import Config, check_runs_no_code, make_model, make_task, read_sections
from espalier.present.jobs import open_network
from espalier.run.anatomy import ComparedLayer, layers_from, layers_of
from espalier.run.latency import size_on_disk
from espalier.run.models import load_weights, runs_code
from espalier.run.report import changed, dense_score, metric_of, places
from espalier.run.rundir import (
    CONFIG,
    HISTORY,
    LOG,
    METRICS,
    MODEL,
    WIDTHS,
    check_is_run,
    read_rows,
    read_sealed,
    unfinished,
)
from espalier.tasks import Metric

COSTS = ("macs", "params", "activation_memory", "bytes")


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """What a finished run left."""

    folder: Path
    config: Config
    metrics: dict[str, Any]
    epochs: tuple[dict[str, float], ...]  # per epoch the columns of the log that say something
    widths: dict[str, tuple[tuple[int, int], ...]]  # group -> (epoch, kept units); empty where none were written
    history: dict[str, dict[str, list[list[float]]]]  # kind -> layer -> (progress, value) whenever it changed
    dense: nn.Module | None  # untrained unless its weights are still there: for its structure
    small: nn.Module | None
    note: str  # why the networks are absent; empty if they are there
    layers: tuple[ComparedLayer, ...]  # empty where neither the metrics nor the networks tell

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def title(self) -> str:
        model, data = (self.config[s].get("name", "") for s in ("model", "data"))
        return " on ".join(filter(None, (model, data))) or "A network"

    @property
    def heading(self) -> str:
        return f"{self.title}, {'trained' if self.is_dense else f'compressed by {self.method}'}"

    @property
    def method(self) -> str:
        return "dense" if self.is_dense else str(self.config["method"].get("name", "?"))

    @property
    def is_dense(self) -> bool:
        """A run that only trained."""
        return bool(self.config["method"].get("name") == "none")

    @property
    def metric(self) -> Metric:
        """What the networks are judged by; runs from before there were tasks are of classifiers."""
        return metric_of(self.metrics)

    @property
    def score(self) -> float | None:
        """Of the small network; ``None`` where nothing was tested."""
        score: float | None = self.metrics["small"].get(self.metric.name)
        return score

    @property
    def dense_score(self) -> float | None:
        """``None`` where the dense network was untrained, and its score says nothing."""
        return dense_score(self.metrics, self.config)

    @property
    def setting(self) -> str:
        """Equal for runs that differ in their seed, and in the weights that a seed began with, only."""
        own = {s: dict(values) for s, values in self.config.items() if s not in ("versions", "start")}
        own.get("recipe", {}).pop("seed", None)
        own.get("model", {}).pop("weights", None)
        return repr((own, self.config.get("start", {}).get("trained")))

    def error(self, score: float) -> float | None:
        """Of an accuracy in per cent, one standard error: what another as large draw of test images would change it by.

        Wilson's, which is not 0 at 100 %: ``sqrt(p (1 - p) / n + 1 / (4 n^2)) / (1 + 1 / n)``.
        """
        images = self.metrics.get("test_images", 0)
        if self.metric != Metric("accuracy", "%") or not images:
            return None
        share = score / 100
        return 100 * math.sqrt(share * (1 - share) / images + 1 / (4 * images**2)) / (1 + 1 / images)

    def told(self, score: float, *, error: bool = True) -> str:
        """``98.61 ± 0.63 %``."""
        digits, unit = places(self.metric), f" {self.metric.unit}" if self.metric.unit else ""
        around = self.error(score) if error else None
        return f"{score:.{digits}f}{'' if around is None else f' ± {around:.{digits}f}'}{unit}"

    @property
    def change(self) -> str:
        """``−0.56 points``, from the dense network's; empty where that is not known."""
        return changed(self.metrics, self.config).replace("-", "−")

    def times(self, runtime: str) -> dict[int, tuple[dict[str, Any], dict[str, Any]]]:
        """Batch -> timing of the dense and of the small network in ``runtime``."""
        rows = [t for t in self.metrics["latency"] if t["backend"] == runtime]
        by_name = {(t["name"], t["batch"]): t for t in rows}
        return {batch: (by_name["dense", batch], small) for (n, batch), small in by_name.items() if n == "small"}


def read_run(folder: Path, *, trust: bool = False) -> FinishedRun:
    """What the folder says; without ``trust`` nothing is imported and run that its files name.

    Raises: ValueError for a folder without a run, a run that has not finished, and files that are damaged."""
    check_is_run(folder)
    config = read_sections(folder / CONFIG)
    only_trained = config["method"].get("name") == "none"
    if not (folder / (MODEL if only_trained else METRICS)).exists():
        raise unfinished(folder)
    config.setdefault("budget", {})
    dense, small, note = _networks(folder, config, trust=trust)
    if only_trained and not trust:
        check_runs_no_code({"task": config["task"]}, folder / CONFIG)  # the log has scores without their unit
    metrics = _dense_metrics(folder, config, small, note) if only_trained else _metrics(folder / METRICS)
    layers: tuple[ComparedLayer, ...] = metrics["layers"]
    if (
        not layers and not only_trained and dense is not None and small is not None
    ):  # runs from before they were written down
        layers = layers_of(dense, small, blank_input(config))
    return FinishedRun(
        folder=folder,
        config=config,
        metrics=metrics,
        epochs=_log(folder / LOG),
        widths=_widths(folder / WIDTHS),
        history=_history(folder / HISTORY),
        dense=dense,
        small=small,
        note=note,
        layers=layers,
    )


def _metrics(path: Path) -> dict[str, Any]:
    try:
        found = read_sealed(path)
        for side in ("dense", "small", "fraction"):
            for cost in COSTS:
                if not isinstance(found[side][cost], (int, float)):
                    raise TypeError(f"{side}.{cost} is not a number")
        for timing in found["latency"]:
            for key in ("name", "backend", "batch", "milliseconds", "speedup"):
                timing[key]
        metric_of(found)
        for key in ("limits", "notes", "versions"):
            if not isinstance(found[key], dict):
                raise TypeError(f"{key} is not a table")
        found["layers"] = layers_from(found.get("layers", []))
        for key in ("epochs", "seconds"):
            if not isinstance(found[key], (int, float)):
                raise TypeError(f"{key} is not a number")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if str(path) in str(error):
            raise
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}: damaged ({what}); repeat the run, its {CONFIG} says how") from error
    return found


def _dense_metrics(folder: Path, config: Config, network: nn.Module | None, note: str) -> dict[str, Any]:
    """What ``metrics.json`` would say of a run that only trained: nothing was removed, and its log has its scores."""
    if network is None:
        raise ValueError(f"{folder}: the dense network is not there to be counted: {note}")
    log = _log(folder / LOG)
    metric = make_task(config).metric
    judged = {metric.name: metric.name, "loss": "test_loss"}
    scores = {name: log[-1][column] for name, column in judged.items() if log and column in log[-1]}
    used = {**cost(trace(network, blank_input(config), rehearse=False)).counts, "bytes": size_on_disk(network)}
    return {
        **(read_sealed(folder / METRICS) if (folder / METRICS).exists() else {}),  # runs did not always write it
        "metric": asdict(metric),
        "dense": {**scores, **used}, "small": {**scores, **used}, "fraction": dict.fromkeys(used, 1.0), "limits": {},
        "latency": [], "layers": (), "notes": {}, "versions": config.get("versions", {}),
        "example_batch": 1, "epochs": len(log), "seconds": sum(e["seconds"] for e in log), "seed": config["recipe"].get("seed"),
    }  # fmt: skip


def blank_input(config: Config) -> torch.Tensor:
    model = config["model"]
    return torch.zeros(1, model["in_channels"], model["image_size"], model["image_size"])


def _log(path: Path) -> tuple[dict[str, float], ...]:
    """Empty where nothing was trained."""
    return tuple({k: float(v) for k, v in row.items() if v} for row in read_rows(path))


def _widths(path: Path) -> dict[str, tuple[tuple[int, int], ...]]:
    rows = read_rows(path)
    names = [n for n in rows[0] if n != "epoch"] if rows else []
    return {name: tuple((int(row["epoch"]), int(row[name])) for row in rows if row[name]) for name in names}


def _history(path: Path) -> dict[str, dict[str, list[list[float]]]]:
    """What the method recorded on its way, empty where it recorded nothing."""
    if not path.exists():
        return {}
    try:
        kinds = {k: v for k, v in read_sealed(path).items() if k not in ("skipped", "left")}
        return {
            kind: {
                name: [[float(p), float(v)] for p, v in points if v is not None]
                for name, points in series.items()
                if points
            }
            for kind, series in kinds.items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: damaged ({error})") from error


def _networks(folder: Path, config: Config, *, trust: bool) -> tuple[nn.Module | None, nn.Module | None, str]:
    """Dense and small, on the CPU in eval mode; without them the reason."""
    if "name" not in config["model"]:
        return None, None, f"{CONFIG} does not say which network this was"
    if not (folder / MODEL).exists():
        return None, None, f"there is no {MODEL}"
    if not trust and runs_code(config["model"]["name"]):
        name = config["model"]["name"]
        return None, None, f"{name} is code, which runs only if you say --trust"
    try:
        dense = make_model(config).eval()
    except (ValueError, ImportError) as error:
        return None, None, f"the network cannot be built here: {error}"
    weights = Path(str(config["model"].get("weights", "")))
    if weights.is_file():
        load_weights(dense, weights)
    return dense, open_network(folder, config), ""
