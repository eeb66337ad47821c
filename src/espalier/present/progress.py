"""What a run shows while it goes on: a bar with the time left, and one line per epoch."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from espalier.run.loop import Epoch, History, Step


class RunProgress:
    """A context whose ``on_epoch`` and ``on_step`` go to ``compress`` or ``train``."""

    def __init__(self, console: Console, *, epochs: int, title: str) -> None:
        self.console = console
        self.epochs = epochs
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.1f}/{task.total:.0f} epochs"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task(title, total=epochs)

    def __enter__(self) -> RunProgress:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def on_epoch(self, history: History) -> None:
        """Move the bar and print the epoch's line."""
        self.console.print(
            epoch_line(history.last, epochs=self.epochs, seconds_left=self._left(history)),
            markup=False,
            soft_wrap=True,
        )
        self.bar.update(self.task, completed=len(history.epochs))

    def on_dense(self, found: Mapping[str, float], teaches: bool) -> None:
        """Print what the network could do before it was touched."""
        taught = "; it is the teacher of the small one" if teaches else ""
        self.console.print(f"dense  test {found['accuracy']:.2f}%{taught}", markup=False, soft_wrap=True)

    def on_step(self, step: Step) -> None:
        """Move the bar."""
        self.bar.update(self.task, completed=step.epoch - 1 + step.step / step.steps)

    def _left(self, history: History) -> float:
        """Later epochs are faster than early ones, so the last two are the best guess."""
        recent = [e.seconds for e in history.epochs[-2:]]
        return (self.epochs - history.last.epoch) * sum(recent) / len(recent)


def epoch_line(epoch: Epoch, *, epochs: int, seconds_left: float) -> str:
    """Loss, accuracies, and - while a method is at work - cost, strength and remaining mass."""
    width = len(str(epochs))
    parts = [
        f"epoch {epoch.epoch:>{width}}/{epochs}",
        f"loss {epoch.loss:.3f}",
    ]
    if epoch.train_accuracy is not None:
        parts.append(f"train {epoch.train_accuracy:.1f}%")
    if epoch.accuracy is not None:
        parts.append(f"test {epoch.accuracy:.2f}%")
    if epoch.metric is not None:
        parts.append(f"test {epoch.metric:.4g}")
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
