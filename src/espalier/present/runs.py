"""A run folder read back for the report; what is absent or damaged is said by file and by what to do."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from espalier.present.config import Config, make_model, read_sections
from espalier.present.jobs import open_network
from espalier.run.anatomy import Layer, layers_from, layers_of
from espalier.run.models import load_weights, runs_code
from espalier.run.report import COUNTED, dense_accuracy
from espalier.run.rundir import CONFIG, HISTORY, LOG, METRICS, MODEL, WIDTHS, read_sealed, unfinished

COSTS = ("macs", "params", "activation_memory", "bytes")


@dataclass(frozen=True, eq=False)
class Run:
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
    layers: tuple[Layer, ...]  # empty where neither the metrics nor the networks tell

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def title(self) -> str:
        model, data = (self.config[s].get("name", "") for s in ("model", "data"))
        return " on ".join(filter(None, (model, data))) or "A network"

    @property
    def method(self) -> str:
        return str(self.config["method"].get("name", "?"))

    @property
    def dense_accuracy(self) -> float | None:
        """``None`` where the dense network was untrained, and its accuracy says nothing."""
        return dense_accuracy(self.metrics, self.config)


def read_run(folder: Path, *, trust: bool = False) -> Run:
    """What the folder says; without ``trust`` nothing is imported and run that its files name.

    Raises: ValueError for a folder without a run, a run that has not finished, and files that are damaged."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such run folder")
    if not (folder / CONFIG).exists():
        raise ValueError(f"{folder}: holds no run (no {CONFIG}); give a folder that espalier compress wrote")
    config = read_sections(folder / CONFIG)
    if config["method"].get("name") == "none":
        raise ValueError(f"{folder}: this run only trained a dense network; there is nothing to report on")
    if not (folder / METRICS).exists():
        raise unfinished(folder)
    dense, small, note = _networks(folder, config, trust=trust)
    metrics = _metrics(folder / METRICS)
    layers: tuple[Layer, ...] = metrics["layers"]
    if not layers and dense is not None and small is not None:  # runs from before they were written down
        model = config["model"]
        layers = layers_of(dense, small, torch.zeros(1, model["in_channels"], model["image_size"], model["image_size"]))
    return Run(
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
        if found.setdefault("counted", None) is not None:  # runs from before it existed have none
            for cost in COUNTED:
                if not all(
                    isinstance(n, (int, float)) for n in (found["counted"][cost], found["counted"]["fraction"][cost])
                ):
                    raise TypeError(f"counted.{cost} is not a number")
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


def _log(path: Path) -> tuple[dict[str, float], ...]:
    """Empty where nothing was trained."""
    return tuple({k: float(v) for k, v in row.items() if v} for row in _rows(path))


def _widths(path: Path) -> dict[str, tuple[tuple[int, int], ...]]:
    rows = _rows(path)
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


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, strict=True))
        for row in rows:
            for key, value in row.items():
                if key is None or value is None:
                    raise ValueError("a row of another length")
                float(value or 0)
    except (csv.Error, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path}: damaged ({error})") from error
    return rows


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
