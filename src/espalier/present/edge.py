"""The edge of the program: a user's error becomes one clear message and exit code 2, a stop exit code 130 or 143."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import typer
from rich.console import Console
from typer.core import TyperGroup

from espalier.methods.lc import PenaltyDiverged
from espalier.run.loop import TrainingDiverged
from espalier.run.stopping import TrainingStopped, stop_now

USER_ERRORS = (
    ValueError, OSError, ImportError, MemoryError, TrainingDiverged, PenaltyDiverged, torch.OutOfMemoryError,
)  # fmt: skip
"""What a user can cause and mend. Everything else is our bug and keeps its traceback."""

stdout = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)


class Edge(TyperGroup):
    """Runs a command; ESPALIER_DEBUG=1 lets tracebacks through."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except USER_ERRORS as error:
            if os.environ.get("ESPALIER_DEBUG") == "1":
                raise
            say_error(error)
            raise typer.Exit(2) from None


def say_error(error: BaseException) -> None:
    """``error: ...`` on stderr, as it stands: no markup in brackets, no pictures for words between colons, no wrapping."""
    text = printable(str(error).strip() or type(error).__name__)
    stderr.print(f"error: {text}", markup=False, emoji=False, soft_wrap=True)


def printable(text: str) -> str:
    """Names come from files: what would steer the terminal, or has no encoding, is written out."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


@contextmanager
def stopped(advice: str) -> Iterator[None]:
    """Ctrl-C inside says what to do next and ends with exit code 130, SIGTERM with 143."""
    before = signal.getsignal(signal.SIGTERM)
    in_main = threading.current_thread() is threading.main_thread()
    if in_main and before == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, stop_now)
    try:
        yield
    except (KeyboardInterrupt, TrainingStopped) as stop:
        code = 143 if isinstance(stop, TrainingStopped) else 130
        what = (str(stop).partition(";")[0] if code == 143 else "") or "stopped"
        stderr.print(f"{what}; {advice}", markup=False, emoji=False, soft_wrap=True)
        raise typer.Exit(code) from None
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)
