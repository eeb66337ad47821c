"""Files that are whole or not there: written beside, renamed at the end; errors say where and what to do."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import tempfile
from collections.abc import Callable
from glob import escape
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from espalier.graph.watch import first_line

_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room there, or choose another place"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "choose a place that may be written"),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "a file stands where a folder is wanted, choose another place"),
    errno.EISDIR: "give the name of a file",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def cannot_write(place: str | os.PathLike[str], error: BaseException, *, what: str = "cannot be written") -> OSError:
    """The error to raise instead: one line with the place, the system's reason and what to do; ``errno`` as it was."""
    reason = (getattr(error, "strerror", None) or str(error)).strip().partition("\n")[0]
    number = getattr(error, "errno", None)
    if number is None and (found := re.search(r"\(os error (\d+)\)", reason)):  # as Rust's libraries tell it
        number, reason = int(found[1]), os.strerror(int(found[1]))
    remedy = _REMEDIES.get(number or 0, "choose another place")
    said = OSError(f"{os.fspath(place)}: {what} ({reason}); {remedy}")
    said.errno = number
    return said


def write_beside(path: Path, write: Callable[[str], object]) -> None:
    """Let ``write`` make a temporary file in the folder of ``path``, then rename it there; clean up after a failure.

    Raises: OSError with the name of ``path``, the reason and what to do; what was there is as it was.
    """
    temporary = None
    made = [p for p in path.parents if not p.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        write(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        handle = os.open(temporary, os.O_RDWR)
        try:
            _sync(handle)
        finally:
            os.close(handle)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)
            for folder in made:
                folder.rmdir()
        if not isinstance(error, (OSError, SafetensorError)):
            raise
        said = cannot_write(path, error)
        kept = "; what was there is untouched" if _is_there(path) else ""
        said.args = (f"{said}{kept}",)
        raise said from error


def clear(path: Path) -> None:
    """Remove what a program that was killed left half written beside ``path``.  Nobody may be writing it."""
    for left in path.parent.glob(f".{escape(path.name)}.????????"):
        with contextlib.suppress(OSError):
            left.unlink()


def write_tensors(path: Path, content: Any) -> None:
    """``torch.save``, beside and renamed.  Raises: as ``write_beside``."""

    def write(temporary: str) -> None:
        with open(temporary, "wb") as file:  # given a name, torch's writer does not know why it could not write
            try:
                torch.save(content, file)
            except RuntimeError as error:  # closing a file that it could not write, it says "unexpected pos"
                cause = error.__context__
                raise cause if isinstance(cause, OSError) else OSError(first_line(error)) from error

    write_beside(path, write)


def check_place(path: Path) -> None:
    """What is to be written may take long to make; that it cannot be written there is said before.

    Raises: ValueError with what to do.
    """
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; give the name of a file")
    folder = next(p for p in path.absolute().parents if p.exists())  # those below it will be made
    if not folder.is_dir():
        raise ValueError(f"{path}: {folder} is a file, not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{path}: the folder {folder} may not be written; choose another")


def append_lines(path: Path, lines: bytes) -> None:
    """Add ``lines`` at the end: all of them or none, and not to half a line that a program left as it was killed.

    Whoever else appends must be kept away meanwhile.  Raises: OSError with the name of ``path``; the file is as it was.
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            end, done = cut_torn_line(path), 0
            try:
                while done < len(lines):
                    done += os.write(handle, lines[done:])
                _sync(handle)
            except BaseException:
                os.truncate(path, end)
                raise
        finally:
            os.close(handle)
    except OSError as error:
        raise cannot_write(path, error) from error


def cut_torn_line(path: Path) -> int:
    """Take away what stands behind the last end of a line, and return where the file ends then."""
    with path.open("rb+") as file:
        end = whole = file.seek(0, os.SEEK_END)
        while whole:  # backwards, a block at a time
            start = max(0, whole - 65536)
            file.seek(start)
            found = file.read(whole - start).rfind(b"\n")
            whole = start + found + 1
            if found >= 0:
                break
        if whole < end:
            file.truncate(whole)
    return whole


def _sync(handle: int) -> None:
    """To the disk: file systems of networks say only then that there is no room, and a machine may stop after the renaming."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):  # some know no such thing
            raise


def _is_there(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return path.exists()
    return False


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
