"""SIGTERM, by which containers and batch systems end a program: finish the step, write a checkpoint, say how to go on."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class TrainingStopped(BaseException):
    """The program was told to end, and a checkpoint of the very step was written.  Not an ``Exception``: nothing failed."""


def stop_now(number: int, frame: FrameType | None) -> None:
    """What the command line does with SIGTERM where no training is under way."""
    raise TrainingStopped("stopped by SIGTERM")


def stop_within(error: BaseException | None) -> BaseException | None:
    """The stop that ``error`` comes from, if it does: an extension that is stopped while it is imported raises ImportError."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, (KeyboardInterrupt, TrainingStopped)):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def sigterm_noticed() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM ends nothing; what is yielded tells whether it has come.

    A handler of the caller's own is left in place, and so is every handler where this is not the main thread, which alone
    may set one.
    """
    came = threading.Event()
    ours, before = os.getpid(), signal.getsignal(signal.SIGTERM)
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or before not in (signal.SIG_DFL, stop_now):
        yield came.is_set
        return

    def notice(number: int, frame: FrameType | None) -> None:
        if os.getpid() == ours:
            came.set()
        else:  # a process that was forked inside, for example to load data
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, notice)
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
