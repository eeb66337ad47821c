"""Why channels stay, and where in the user's code that was decided: data, made into sentences here and nowhere else."""

from __future__ import annotations

import functools
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class CallPlace:
    """Where in the user's code an operation was called."""

    module: str  # name inside the model, "" for the model itself
    module_type: str
    line: str  # "file.py:123", or "" when no user code is on the stack

    def __str__(self) -> str:
        where = f"{self.module or '(model)'} [{self.module_type}]"
        return f"{where} at {self.line}" if self.line else where


class Reason(str):
    """Why something stays, or what else is to be known: a sentence that knows its parts.

    ``place`` is ``None`` where no line of code is to blame.
    """

    text: str
    place: CallPlace | None

    def __new__(cls, text: str, place: CallPlace | None = None) -> Reason:
        reason = super().__new__(cls, text if place is None else f"{text}: {place}")
        reason.text, reason.place = text, place
        return reason

    @property
    def line(self) -> str:
        """The source line, shortened; empty where there is none."""
        return shorten_path(self.place.line) if self.place is not None else ""

    @property
    def shortened(self) -> Reason:
        """The same with a shortened line."""
        if self.place is None:
            return self
        return Reason(self.text, CallPlace(self.place.module, self.place.module_type, self.line))

    @property
    def parts(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return {"text": self.text, "place": None if self.place is None else asdict(self.place)}


OUTPUT = "is an output of the model"  # no news to anybody
WITH_FIXED = "is combined with channels that are fixed"
UNUSED = "nothing consumes these channels"
FIXED = Reason("is fixed")


_SKIP = (f"{torch.__path__[0]}/", __file__.rsplit("/", 1)[0] + "/")


@functools.cache
def is_users(path: str) -> bool:
    """Is this source file neither torch's nor ours?"""
    return not path.startswith(_SKIP) and not path.startswith("<")


def shorten_path(line: str) -> str:
    """``file:line`` from the installed package on, or from the current folder on, or the last two parts."""
    path = line.replace("\\", "/")
    for marker in ("/site-packages/", "/dist-packages/", f"/python{sys.version_info[0]}.{sys.version_info[1]}/"):
        if marker in path:
            return path.rpartition(marker)[2]
    here = f"{Path.cwd().as_posix().rstrip('/')}/"
    if path.startswith(here):
        return path.removeprefix(here)
    return "/".join(path.split("/")[-2:])
