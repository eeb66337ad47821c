"""Several runs side by side, each a process of its own: one narrow network does not fill a GPU."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.recipe import Job

Command = Callable[[Job], list[str]]
StartFile = Callable[[Job], Path]
"""Where the dense network lies that a job begins with."""

LOOK_AGAIN = 0.2  # seconds


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def last_line(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return lines[-1] if lines else "no output"


def run_side_by_side(
    waiting: Iterable[Job],
    command: Command,
    *,
    places: int,
    start_file: StartFile,
    logs: Path,
    seconds: float | None = None,
) -> bool:
    """Run the jobs in their order, at most ``places`` at a time, for at most ``seconds``; what is stopped goes on another time.

    A job that begins with a network which is still to be trained waits while another trains it.  Output goes to
    ``logs/KEY.log``.  Returns whether none failed.
    """
    if places < 1:
        raise ValueError(f"side by side: at least 1, not {places}")
    logs.mkdir(parents=True, exist_ok=True)
    left, running, fine = list(waiting), list[_Running](), True
    end = None if seconds is None else time.monotonic() + seconds
    try:
        while left or running:
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                failed = one.process.returncode != 0
                fine &= not failed
                print(f"{one.job.key}: failed: {one.last_line}" if failed else one.last_line, flush=True)
            while len(running) < places:
                ready = next((job for job in left if not _must_wait(job, left, running, start_file)), None)
                if ready is None:
                    break
                left.remove(ready)
                running.append(_begin(ready, command(ready), logs / f"{ready.key}.log"))
            if end is not None and time.monotonic() >= end:
                break
            time.sleep(LOOK_AGAIN)
    finally:
        for one in running:
            one.process.kill()
            one.process.wait()
            print(f"{one.job.key}: stopped after: {one.last_line}", flush=True)
    return fine


def _must_wait(job: Job, left: list[Job], running: list[_Running], start_file: StartFile) -> bool:
    if not _trains_start(job, start_file) or job.is_the_start:
        return False
    others = [one.job for one in running] + [other for other in left if other.is_the_start]
    return any(
        start_file(other) == start_file(job) and _trains_start(other, start_file) for other in others if other != job
    )


def _trains_start(job: Job, start_file: StartFile) -> bool:
    """Does it train the dense network of its recipe's ``start``, or would it?"""
    if "start" not in job.content or start_file(job).exists():
        return False
    return job.is_the_start or (job.starts_trained and "weights" not in job.content["model"])


def _begin(job: Job, command: list[str], log: Path) -> _Running:
    print(f"== {job.key}", flush=True)
    with log.open("ab") as file:
        return _Running(job, subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT), log)
