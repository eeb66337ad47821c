"""Who works on which point of a sweep, and what came of it: one Optuna study, in a file or in any database.

A point is an enqueued trial.  A worker takes one by moving it from *waiting* to *running*, which a storage lets only one worker
do.  What was taken by a process that is no longer there is free again: on this machine at once, on others once it has not been
heard of for ``SILENT`` seconds.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from espalier.methods.search import Journal

P = ParamSpec("P")
R = TypeVar("R")

SILENT = 3600.0  # seconds without an epoch after which a point on another machine is given to somebody else
SWEEP_JOURNAL = "sweep.journal"


@dataclass(frozen=True)
class Entry:
    """One point as the ledger has it: ``state`` is waiting, running, complete or fail."""

    point: str
    state: str
    number: int
    facts: Mapping[str, Any]  # what its worker has written down: results, or the ``error``


class StorageLost(OSError):
    """The storage of a sweep can no longer be read or written; what is in it stays."""


def _named(act: Callable[Concatenate[Ledger, P], R]) -> Callable[Concatenate[Ledger, P], R]:
    """Every database has errors of its own: they become one that names the storage."""

    @wraps(act)
    def told(self: Ledger, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return act(self, *args, **kwargs)
        except StorageLost:
            raise
        except OSError as error:  # of the journal, which is named in it
            raise StorageLost(f"storage {error}") from error
        except Exception as error:
            raise StorageLost(f"storage {self.storage}: cannot be used any longer ({_reason(error)})") from error

    return told


def _reason(error: BaseException) -> str:
    """What was at the root of it, in its first line: Optuna says of any failure that it was invalid data."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Ledger:
    """``storage`` is a database URL (``sqlite:///sweep.db``, ``postgresql://...``) or a file of Optuna's journal.

    Raises: ValueError if it cannot be opened; StorageLost, from all methods, if it cannot be used any longer.
    """

    def __init__(self, storage: str, name: str, *, maximize: bool = True) -> None:
        import optuna  # takes a second

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._states = optuna.trial.TrialState
        self.storage = storage
        try:
            if "://" in storage:
                backend = _database(storage)
            else:
                journal = Journal(Path(storage), optuna.storages.journal.JournalFileSymlinkLock)
                backend = optuna.storages.JournalStorage(journal)
            self.study = optuna.create_study(
                study_name=name, storage=backend, direction="maximize" if maximize else "minimize", load_if_exists=True
            )
        except OSError as error:  # of the journal, which is named in it
            raise ValueError(f"storage {error}") from error
        except Exception as error:  # every database has errors of its own
            raise ValueError(
                f"storage {storage}: cannot be opened ({_reason(error)}); mend that, or name another with --storage"
            ) from error
        self._storage = backend

    @_named
    def add(self, points: Iterable[str]) -> None:
        """Enqueue those that are not there yet."""
        there = {e.point for e in self.entries()}
        for point in points:
            if point not in there:
                self.study.enqueue_trial({"point": point}, user_attrs={"point": point})

    @_named
    def entries(self) -> list[Entry]:
        """Every point once, in the order in which they were added: of two workers that added it the first one's counts."""
        found: dict[str, Entry] = {}
        for trial in self.study.get_trials(deepcopy=False):
            facts = dict(trial.user_attrs)
            point = facts.pop("point", None)
            if point is not None and point not in found and not facts.get("superseded"):
                found[point] = Entry(point, trial.state.name.lower(), trial.number, facts)
        return list(found.values())

    @_named
    def take(self, points: Iterable[str]) -> Entry | None:
        """The next of ``points`` that nobody is at work on, now ours; ``None`` if there is none."""
        mine = set(points)
        for entry in self.entries():
            if entry.point in mine and entry.state == "running" and _is_gone(entry.facts.get("worker")):
                self._supersede(entry)
        for entry in self.entries():
            if entry.point in mine and entry.state == "waiting" and self._move(entry, self._states.RUNNING):
                self.note(entry, worker=_me())
                return entry
        return None

    def _supersede(self, entry: Entry) -> None:
        """Put a new trial in the place of one whose worker is gone; of several who try, one succeeds: a trial ends once."""
        self.note(entry, superseded=True)
        if self._move(entry, self._states.FAIL):
            self.study.enqueue_trial({"point": entry.point}, user_attrs={"point": entry.point})

    @_named
    def beat(self, entry: Entry) -> None:
        """Say that we are still at it."""
        self.note(entry, worker=_me())

    @_named
    def note(self, entry: Entry, **facts: Any) -> None:
        """Write something down about a point that has not ended: plain values."""
        with suppress(RuntimeError):  # it ended meanwhile
            for name, value in facts.items():
                self._storage.set_trial_user_attr(self._id(entry), name, value)

    @_named
    def complete(self, entry: Entry, score: float) -> None:
        self._storage.set_trial_state_values(self._id(entry), self._states.COMPLETE, [score])

    @_named
    def fail(self, entry: Entry, error: str) -> None:
        """Recorded, and not tried again."""
        self.note(entry, error=error)
        self._storage.set_trial_state_values(self._id(entry), self._states.FAIL)

    @_named
    def release(self, entry: Entry) -> None:
        """Let somebody else go on with it."""
        self._move(entry, self._states.WAITING)

    def _id(self, entry: Entry) -> int:
        return int(self._storage.get_trial_id_from_study_id_trial_number(self.study._study_id, entry.number))

    def _move(self, entry: Entry, state: Any) -> bool:
        try:
            return bool(self._storage.set_trial_state_values(self._id(entry), state))
        except RuntimeError:  # finished by somebody meanwhile
            return False


def _database(url: str) -> Any:
    """Of workers that begin together on a new database, as an array of jobs does, each makes the tables that are not there:
    all but one fail, and find them there when they look again."""
    import optuna

    for attempt in range(1, TRIES + 1):
        try:
            return optuna.storages.RDBStorage(url)
        except Exception as error:  # in the words of SQLite, PostgreSQL and MySQL
            if attempt == TRIES or not re.search("(?i)already exists|duplicate|unique|locked", _reason(error)):
                raise
        time.sleep(0.1 * attempt + os.getpid() % 10 / 50)  # not all at once again
    raise AssertionError


TRIES = 8


def _me() -> dict[str, Any]:
    return {"host": platform.node(), "process": os.getpid(), "heard": time.time()}


def _is_gone(worker: Any) -> bool:
    """Is the worker no longer there?  One that has just moved a point has not said who it is yet."""
    if not isinstance(worker, Mapping):
        return False
    if worker.get("host") != platform.node():
        return time.time() - float(worker.get("heard", 0.0)) > SILENT
    try:
        os.kill(int(worker["process"]), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
