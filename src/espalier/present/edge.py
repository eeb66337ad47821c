"""The edge of the program: a user's error becomes one clear message and exit code 2, a stop exit code 130 or 143."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import typer
from rich.console import Console
from typer.core import TyperGroup

from espalier.methods.lc import PenaltyDiverged
from espalier.run.loop import TrainingDiverged
from espalier.run.processes import is_lost_process
from espalier.run.stopping import TrainingStopped, stop_now, stop_within
from espalier.surgery.writing import cannot_write

USER_ERRORS = (
    ValueError, OSError, ImportError, MemoryError, TrainingDiverged, PenaltyDiverged, torch.OutOfMemoryError,
)  # fmt: skip
"""What a user can cause and mend. Everything else is our bug and keeps its traceback."""


class _Console(Console):
    def print(self, *objects: Any, **how: Any) -> None:
        try:
            super().print(*objects, **how)
        except OSError as error:
            raise cannot_write("what is printed", error) from error


stdout = _Console(highlight=False)
stderr = _Console(stderr=True, highlight=False)


class Edge(TyperGroup):
    """Runs a command; ESPALIER_DEBUG=1 lets tracebacks through."""

    def make_context(self, *args: Any, **how: Any) -> Any:  # --version and --help print in here
        with _said():
            return super().make_context(*args, **how)

    def invoke(self, ctx: Any) -> Any:
        with _said():
            return super().invoke(ctx)


@contextmanager
def _said() -> Iterator[None]:
    try:
        yield
    except USER_ERRORS as error:
        if os.environ.get("ESPALIER_DEBUG") == "1":
            raise
        with suppress(OSError):  # there may be no room for this either
            say_error(error)
        raise typer.Exit(2) from None


def say_error(error: BaseException) -> None:
    """``error: ...`` on stderr, as it stands: no markup in brackets, no pictures for words between colons, no wrapping."""
    text = str(error).strip() or type(error).__name__
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    text = printable(text)
    stderr.print(f"error: {text}", markup=False, emoji=False, soft_wrap=True)


def printable(text: str) -> str:
    """Names come from files: what would steer the terminal, or has no encoding, is written out."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


@contextmanager
def stopped(advice: str, *, begun: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Ctrl-C inside says what to do next and ends with exit code 130, SIGTERM with 143; so does the error of a disk that is
    full or gone, or of another process that has ended, if something has ``begun`` that can go on."""
    before = signal.getsignal(signal.SIGTERM)
    in_main = threading.current_thread() is threading.main_thread()
    if in_main and before == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, stop_now)
    try:
        yield
    except BaseException as error:
        stop = stop_within(error)
        if stop is None and isinstance(error, OSError) and begun():
            raise OSError(f"{error}; then {advice}") from error
        if stop is None and is_lost_process(error):
            ended = (
                f"another process of this run has ended; {advice}" if begun() else f"another process has ended: {error}"
            )
            raise ValueError(ended) from error
        if stop is None:
            raise
        code = 143 if isinstance(stop, TrainingStopped) else 130
        what = (str(stop).partition(";")[0] if code == 143 else "") or "stopped"
        stderr.print(f"{what}; {advice}", markup=False, emoji=False, soft_wrap=True)
        raise typer.Exit(code) from None
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)
