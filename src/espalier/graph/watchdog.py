"""The time limit where no operation comes by: a loop of plain Python in a forward would hang for ever otherwise."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from espalier.graph.reasons import is_users
from espalier.graph.watch import TraceTimeout

GRACE = 0.5  # seconds in which the watch, which names the operation, may find out by itself
AGAIN = 1.0  # seconds until the next try, where a forward has caught what was thrown at it


WAITING = 10


def _processor_time(thread: int) -> Callable[[], float]:
    """Seconds that a thread of this process has computed; where the system does not say, by the clock, from now."""
    if hasattr(time, "pthread_getcpuclockid"):
        return partial(time.clock_gettime, time.pthread_getcpuclockid(thread))
    begun, used = time.monotonic(), time.thread_time()
    return lambda: used + time.monotonic() - begun


class Interrupted(BaseException):
    """Thrown into the Python code of another thread; no ``except Exception`` of a model catches it."""


@contextmanager
def watchdog(deadline: float) -> Iterator[None]:
    """``TraceTimeout`` in what runs inside when ``deadline``, by ``time.thread_time``, has passed.

    Processor time, so that a busy machine changes no result; what only waits has ``WAITING`` times as long by the clock.  Code
    that is not Python is interrupted when it returns.
    """
    thread, over, lock = threading.get_ident(), threading.Event(), threading.Lock()
    used, where = _processor_time(thread), "code that is not the model's"
    limit = deadline - used()
    latest = time.monotonic() + WAITING * limit

    def bark() -> None:
        nonlocal where
        pause = limit + GRACE
        while not over.wait(min(max(pause, 0.0), threading.TIMEOUT_MAX)):
            pause = min(deadline + GRACE - used(), latest - time.monotonic())
            if pause > 0:
                continue
            with lock:
                if over.is_set():
                    return
                where = _line_of(thread) or where
                _throw(thread, Interrupted)
            pause = AGAIN

    def stop() -> None:
        with lock:
            over.set()
            _throw(thread, None)  # what was thrown and has not arrived

    threading.Thread(target=bark, name="espalier-watchdog", daemon=True).start()
    try:
        try:
            yield
        finally:
            stop()
    except Interrupted:
        stop()
        raise TraceTimeout(
            f"tracing exceeded its time limit in Python code that runs no operation: {where}; raise `time_limit`, or "
            "trace at a smaller input"
        ) from None


def _throw(thread: int, what: type[BaseException] | None) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), None if what is None else ctypes.py_object(what))


def _line_of(thread: int) -> str:
    """``file:line`` of the innermost frame of the user's."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if is_users(frame.f_code.co_filename):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
