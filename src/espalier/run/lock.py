"""A run folder belongs to one process at a time, which is named in it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOCK = "run.lock"


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Inside, no other process, and no other thread of this one, gets ``folder``.  It is made, and goes if it stays empty.

    The owner stands in ``run.lock``: host, process, since when.  The file is locked as well, which ends with the process
    however it ends; where the file system has no locks, a process that is no longer there counts as gone.  A lock from
    another host is never taken over.

    Raises: ValueError naming the owner; OSError if the folder may not be written.
    """
    made = _make(folder)
    path = folder / LOCK
    try:
        file = _lock(path)
    except BaseException:
        _remove(made)
        raise
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before it is let go: whoever waits for it looks whether it is still the one
        os.close(file)
        _remove(made)


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
        raise OSError(f"{folder}: cannot be made ({error.strerror}); choose another folder") from error
    return absent


def _remove(made: list[Path]) -> None:
    with contextlib.suppress(OSError):
        for folder in made:
            folder.rmdir()


def _lock(path: Path) -> int:
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise OSError(f"{path.parent}: cannot be written ({error.strerror}); choose another folder") from error
        try:
            held = _try(file)
            there = _read(file)
            if held is False or (there is not None and not _is_gone(there, locked=held)):
                raise _taken(path, there)
            if held is None or _is_still(file, path):
                os.ftruncate(file, 0)
                os.pwrite(file, json.dumps(_me()).encode(), 0)
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # its owner removed it meanwhile: try again


def _try(file: int) -> bool | None:
    """Lock the file: whether it worked, ``None`` where there are no locks."""
    try:
        import fcntl
    except ImportError:  # not a Unix
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def _is_still(file: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file), os.stat(path))
    return False


def _me() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "host": platform.node(),
        "boot": _boot(),
        "process": pid,
        "begun": _begun(pid),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _is_gone(there: dict[str, Any], *, locked: bool | None) -> bool:
    """Whether the owner that the file names has ended without removing it."""
    same_machine = there.get("host") == platform.node() or (_boot() and there.get("boot") == _boot())
    if not same_machine:
        return False  # locks of a network's file systems do not always reach other hosts
    if locked:
        return True
    if there.get("host") != platform.node():
        return False  # a container does not see the processes of another
    pid = there.get("process")
    if type(pid) is not int or pid < 1 or there.get("boot") != _boot():
        return True
    if there.get("begun") != _begun(pid):
        return True  # the number was given to another process
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _boot() -> str:
    """What tells a machine since its start; also for containers, whose hosts are called anything.  Empty where nothing does."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _begun(pid: int) -> str:
    """When the process began, in ticks since the machine's start; empty where that cannot be told."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


def _read(file: int) -> dict[str, Any] | None:
    try:
        content = json.loads(os.pread(file, 10_000, 0))
    except ValueError:  # nothing yet, or half of it
        return None
    return content if isinstance(content, dict) else None


def _taken(path: Path, there: dict[str, Any] | None) -> ValueError:
    owner = there or {}
    who = "another process" if there is None else f"process {owner.get('process')} on {owner.get('host')}"
    since = f", since {owner['since']}" if "since" in owner else ""
    return ValueError(
        f"{path.parent}: {who} is at work in it{since}; wait for it or choose another folder (if it has ended, remove {path})"
    )
