"""What a run shows while it goes on: a bar with the time left, and one line per epoch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from espalier.run.loop import History, Step
from espalier.run.progress import dense_line, next_line
from espalier.tasks import Metric


class RunProgress:
    """A context whose ``on_epoch`` and ``on_step`` go to ``compress`` or ``train``; ``beat`` is called after every epoch."""

    def __init__(
        self, console: Console, *, epochs: int, title: str, metric: Metric, beat: Callable[[], None] | None
    ) -> None:
        self.console, self.metric, self.beat = console, metric, beat
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
        if self.beat is not None:
            self.beat()
        self.console.print(next_line(history, epochs=self.epochs, metric=self.metric), markup=False, soft_wrap=True)
        self.bar.update(self.task, completed=len(history.epochs))

    def on_dense(self, found: Mapping[str, float], teaches: bool) -> None:
        """Print what the network could do before it was touched."""
        self.console.print(dense_line(found, teaches, metric=self.metric), markup=False, soft_wrap=True)

    def on_step(self, step: Step) -> None:
        """Move the bar."""
        self.bar.update(self.task, completed=step.epoch - 1 + step.step / step.steps)
