"""Where a run is logged beside its folder, by name or as a logger of Lightning Fabric."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from espalier.optional import import_lightning, import_optional
from espalier.run.loop import History

Log = str | Iterable[Any]
"""Names with commas between them, or a list of names and of objects with ``log_metrics(metrics, step)``, as Fabric's are."""


class _Board:
    """TensorBoard's log, without Lightning."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(os.fspath(folder))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def finalize(self, status: str) -> None:
        self.writer.close()


def _wandb(folder: Path) -> Any:
    return import_lightning().loggers.WandbLogger(name=folder.name, save_dir=folder, project="espalier")


def _mlflow(folder: Path) -> Any:
    at = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    return import_lightning().loggers.MLFlowLogger(experiment_name="espalier", run_name=folder.name, tracking_uri=at)


# name -> packages that it needs, each with the extra that brings it, and how it is made
_LOGGERS: dict[str, tuple[dict[str, str], Callable[[Path], Any] | None]] = {
    "csv": ({}, None),  # log.csv, which is always written
    "tensorboard": ({"tensorboard": "tensorboard"}, _Board),
    "wandb": ({"wandb": "wandb"}, _wandb),
    "mlflow": ({"mlflow": "mlflow"}, _mlflow),
}


class Loggers:
    """To be called after every epoch.  Loggers are made at the first: a refused run leaves none.

    A resumed run writes its earlier epochs again, so that curves are whole.

    Raises: ValueError for an unknown name, or no folder to write into; MissingPackage naming what is not installed.
    """

    def __init__(self, log: Log, folder: Path | None, config: Mapping[str, Any] | None = None) -> None:
        self.wanted = [w.strip() for w in log.split(",")] if isinstance(log, str) else list(log)
        self.folder, self.config = folder, config
        self.made: list[Any] = []
        self.written = 0
        for name in (w for w in self.wanted if isinstance(w, str)):
            if name not in _LOGGERS:
                raise ValueError(
                    f"log={name!r}: there is no such logger; choose of {', '.join(_LOGGERS)}, or give a logger of Fabric"
                )
            if folder is None:
                raise ValueError(f"log={name!r}: it is written into the folder of a run; give out=FOLDER")
            for package, extra in _LOGGERS[name][0].items():
                import_optional(package, extra=extra)

    def __call__(self, history: History) -> None:
        if not self.made:
            self.made = [logger for wanted in self.wanted if (logger := self._logger(wanted)) is not None]
        for epoch in history.epochs[self.written :]:
            metrics = {n: v for n, v in asdict(epoch).items() if n != "epoch" and v is not None}
            for logger in self.made:
                try:
                    logger.log_metrics(metrics, epoch.epoch)
                except OSError as error:
                    name = type(logger).__name__.strip("_")
                    raise OSError(f"log={name}: cannot be written ({error}); make room, or go on without it") from error
        self.written = len(history.epochs)

    def close(self) -> None:
        for logger in self.made:
            logger.finalize("success")

    def _logger(self, wanted: Any) -> Any:
        if not isinstance(wanted, str):
            return wanted
        make = _LOGGERS[wanted][1]
        return None if make is None or self.folder is None else make(self.folder)
