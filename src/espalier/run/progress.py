"""One line per epoch: what the command line shows, and ``compress`` where somebody looks on."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from espalier.run.loop import Epoch, History
from espalier.tasks import Metric


class Lines:
    """``on_dense`` and ``on_epoch`` that write to stderr, so that what a program prints stays as it is."""

    def __init__(self, *, epochs: int, metric: Metric) -> None:
        self.epochs, self.metric = epochs, metric

    def on_dense(self, found: Mapping[str, float], teaches: bool) -> None:
        self._write(dense_line(found, teaches, metric=self.metric))

    def on_epoch(self, history: History) -> None:
        self._write(next_line(history, epochs=self.epochs, metric=self.metric))

    def _write(self, line: str) -> None:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def watched() -> bool:
    """Whether somebody is likely to look on: in a terminal or a notebook."""
    return "ipykernel" in sys.modules or (sys.stderr is not None and sys.stderr.isatty())


def dense_line(found: Mapping[str, float], teaches: bool, *, metric: Metric) -> str:
    """What the network could do before it was touched."""
    taught = "; it is the teacher of the small one" if teaches else ""
    return f"dense  test {_said(found[metric.name], metric)}{taught}"


def next_line(history: History, *, epochs: int, metric: Metric) -> str:
    """Of the last epoch.  Later epochs are faster than early ones, so the last two are the best guess of the time left."""
    recent = [e.seconds for e in history.epochs[-2:]]
    left = (epochs - history.last.epoch) * sum(recent) / len(recent)
    return epoch_line(history.last, epochs=epochs, seconds_left=left, metric=metric)


def _said(value: float, metric: Metric) -> str:
    return f"{value:.2f}%" if metric.name == "accuracy" else metric.said(value)


def epoch_line(epoch: Epoch, *, epochs: int, seconds_left: float, metric: Metric) -> str:
    """Loss, metric, and - while a method is at work - cost, strength and remaining mass."""
    width = len(str(epochs))
    parts = [f"epoch {epoch.epoch:>{width}}/{epochs}", f"loss {epoch.loss:.3f}"]
    if epoch.train_accuracy is not None:
        parts.append(f"train {epoch.train_accuracy:.1f}%")
    if epoch.accuracy is not None:
        parts.append(f"test {epoch.accuracy:.2f}%")
    if epoch.metric is not None:
        parts.append(f"test {metric.said(epoch.metric)}")
    if epoch.macs is not None and epoch.params is not None:
        parts.append(f"{short(epoch.macs)} MACs {short(epoch.params)} params")
    if epoch.strength is not None and epoch.remaining is not None:
        parts.append(f"strength {epoch.strength:.2g} remaining {epoch.remaining:.3f}")
    if epoch.epoch < epochs:
        parts.append(f"{clock(seconds_left)} left")
    return "  ".join(parts)


def short(number: float) -> str:
    """``1265344`` -> ``"1.27M"``."""
    for power, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= power:
            return f"{number / power:.3g}{letter}"
    return f"{number:.0f}"


def clock(seconds: float) -> str:
    """``3725`` -> ``"1:02:05"``, ``65`` -> ``"1:05"``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
