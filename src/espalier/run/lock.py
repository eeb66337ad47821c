"""A run folder belongs to one process at a time, which is named in it."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from espalier.run.rundir import CHECKPOINT
from espalier.surgery.writing import cannot_write, clear

LOCK, OWNER = "run.lock", "run.owner"


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Inside, no other process, and no other thread of this one, gets ``folder``.  It is made, and goes if it stays empty.

    ``run.lock`` is locked, which ends with the process however it ends, and ``run.owner`` names the owner: host, process, since
    when.  A folder from another host is never taken over: locks of a network's file systems do not always reach there.

    Raises: ValueError naming the owner; OSError if the folder may not be written.
    """
    with ExitStack() as stack:
        stack.callback(_remove, _make(folder))
        lock = FileLock(folder / LOCK, timeout=0, thread_local=False)
        try:
            lock.acquire()
        except Timeout:
            raise _taken(folder) from None
        except (OSError, NotImplementedError) as error:  # the latter where the file system has no locks
            raise cannot_write(folder, error) from error
        stack.callback(lock.release)
        stack.callback((folder / LOCK).unlink, missing_ok=True)  # before it is let go
        owner = _read(folder)
        if owner and platform.node() != owner.get("host") and not (_boot() and owner.get("boot") == _boot()):
            raise _taken(folder)
        stack.callback((folder / OWNER).unlink, missing_ok=True)
        clear(folder / CHECKPOINT)  # the largest file, and nobody else writes it
        try:
            (folder / OWNER).write_text(json.dumps(_me()), encoding="utf-8")
        except OSError as error:
            raise cannot_write(folder, error) from error
        yield


def _make(folder: Path) -> list[Path]:
    """Folders that were not there, innermost first."""
    absent = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ValueError(f"{folder}: is a file; give a folder for the run") from error
    except NotADirectoryError as error:
        raise ValueError(f"{folder}: lies in a file; give a folder for the run") from error
    except OSError as error:
        raise cannot_write(folder, error, what="cannot be made") from error
    return absent


def _remove(made: list[Path]) -> None:
    with contextlib.suppress(OSError):
        for folder in made:
            folder.rmdir()


def _me() -> dict[str, Any]:
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return {"host": platform.node(), "boot": _boot(), "process": os.getpid(), "since": since}


def _boot() -> str:
    """What tells a machine since its start; also for containers, whose hosts are called anything.  Empty where nothing does."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _read(folder: Path) -> dict[str, Any]:
    """The owner that the folder names; empty where there is none, or half of one."""
    with contextlib.suppress(OSError, ValueError):
        content = json.loads((folder / OWNER).read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    return {}


def _taken(folder: Path) -> ValueError:
    owner = _read(folder)
    who = f"process {owner.get('process')} on {owner.get('host')}" if owner else "another process"
    since = f", since {owner['since']}" if "since" in owner else ""
    return ValueError(
        f"{folder}: {who} is at work in it{since}; wait for it or choose another folder (if it has ended, remove "
        f"{folder / OWNER} and {LOCK})"
    )
