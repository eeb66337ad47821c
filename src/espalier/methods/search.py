"""Bayesian optimisation of a few numbers, on Optuna's Gaussian process sampler and in Optuna's storage.

Every trial is stored as it begins and as it ends, in a journal if there is one, so that a search that was killed goes on at the
trial it was killed in.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from espalier.forms.transfer import moved
from espalier.seals import DAMAGED, SEAL, seal
from espalier.surgery.writing import append_lines, cannot_write, cut_torn_line

JOURNAL = "search.journal"  # in the folder of a run

Ranges = Mapping[str, tuple[float, float]]
Point = dict[str, float]
Trials = list[dict[str, Any]]
"""``{"point": {name: value}, "score": number or None, "failed": why}`` in the order they were begun."""


def minimise(
    score: Callable[[Point], float],
    ranges: Ranges,
    *,
    first: Point,
    count: int,
    seed: int,
    trials: Trials,
    journal: Path | None = None,
    name: str = "search",
) -> Point:
    """Extend ``trials`` to ``count``, beginning with ``first``, and return the best point.

    A trial that raises ValueError, RuntimeError or ArithmeticError is recorded with its reason and the search goes on.  Every
    trial is proposed from those before it and its number alone, so that an interrupted search ends where it would have ended.

    With a ``journal`` the trials that count are those of the study ``name`` in that file: name everything that the score
    depends on.  A trial that was under way when the program was killed is begun again.

    Raises: ValueError if the journal cannot be read, or if all trials failed.
    """
    study = _study(journal, name)
    if journal is None:
        for trial in trials:
            _store(study, trial, ranges)

    def one(number: int) -> None:
        with _quiet():
            study.sampler = _sampler(seed + number, count, first if number == 0 else {})
            trial = study.ask(fixed_distributions=_shape(ranges))
        try:
            value = float(score(dict(trial.params)))
            reason = "" if math.isfinite(value) else f"the score is {value}"
        except (ValueError, RuntimeError, ArithmeticError) as error:
            value, reason = math.nan, f"{type(error).__name__}: {error}"
        with _quiet():
            if reason:
                trial.set_user_attr(FAILED, reason)
                study.tell(trial, state=_state("FAIL"))
            else:
                study.tell(trial, value)

    try:
        for number in range(len(_finished(study)), count):
            one(number)
    finally:
        trials[:] = _finished(study)
    good = [t for t in trials[:count] if t["score"] is not None]
    if not good:
        again = "" if journal is None else f"; to try them again, move {journal} away"
        raise ValueError(f"all {count} trials of the search failed, the first: {trials[0]['failed']}{again}")
    return dict(min(good, key=lambda t: float(t["score"]))["point"])


FAILED = "failed"  # attribute of a trial: why; one that failed without it was interrupted, and does not count


def _study(journal: Path | None, name: str) -> Any:
    """The study, without trials that are under way."""
    import optuna

    with _quiet():
        if journal is None:
            return optuna.create_study()
        journals = optuna.storages.journal
        try:
            if journal.exists():
                cut_torn_line(journal)
            # An open file as a lock works on every system, a symbolic link does not.
            backend = Journal(journal, journals.JournalFileOpenLock)
            storage = optuna.storages.JournalStorage(_Sealed(backend))
            study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{journal}: the trials in it cannot be read ({type(error).__name__}: {error}); move the file away, "
                "and the search begins anew"
            ) from error
        for trial in study.get_trials(states=(_state("RUNNING"),)):
            study.tell(trial.number, state=_state("FAIL"))
        return study


class Journal:
    """A backend of Optuna's journal to whose file lines are added whole or not at all, however full the disk is."""

    def __init__(self, file: Path, lock: Callable[[str], Any]) -> None:
        import optuna

        self.file = file.absolute()  # the link that locks it points there from wherever it lies
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.backend = optuna.storages.journal.JournalFileBackend(str(self.file))
        except OSError as error:
            raise cannot_write(file, error) from error
        self.lock = lock(str(self.file))

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        try:
            self.lock.acquire()
        except OSError as error:
            raise cannot_write(self.file, error) from error
        try:
            append_lines(self.file, "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode())
        finally:
            self.lock.release()

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        return iter(self.backend.read_logs(log_number_from))


class _Sealed:
    """A backend of Optuna's journal that adds a checksum to every line, over it and the one before, and compares it later.

    Lines from before there were checksums, at the beginning, have none.
    """

    def __init__(self, backend: Journal) -> None:
        self.backend = backend
        self.chain = [""]  # checksum of every line, after that of none

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        for _ in self.read_logs(len(self.chain) - 1):  # to know the last line
            pass
        last, sealed = self.chain[-1], []
        for log in logs:
            last = seal([last, json.loads(json.dumps(log))])
            sealed.append({**log, SEAL: last})
        self.backend.append_logs(sealed)

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        start = min(log_number_from, len(self.chain) - 1)
        del self.chain[start + 1 :]
        for number, log in enumerate(self.backend.read_logs(start), start=start):
            written, before = log.pop(SEAL, ""), self.chain[-1]
            if (written or before) and written != seal([before, log]):
                raise ValueError(f"line {number + 1} is {DAMAGED}")
            self.chain.append(written)
            if number >= log_number_from:
                yield log


def _finished(study: Any) -> Trials:
    rows: Trials = []
    for trial in study.get_trials(deepcopy=False):
        reason = trial.user_attrs.get(FAILED, "")
        if trial.state == _state("COMPLETE") or (trial.state == _state("FAIL") and reason):
            rows.append({"point": dict(trial.params), "score": None if reason else trial.value, "failed": reason})
    return rows


def _store(study: Any, trial: Mapping[str, Any], ranges: Ranges) -> None:
    import optuna

    failed = trial["score"] is None
    study.add_trial(
        optuna.trial.create_trial(
            params=trial["point"],
            distributions=_shape(ranges),
            value=trial["score"],
            state=_state("FAIL" if failed else "COMPLETE"),
            user_attrs={FAILED: trial["failed"]} if failed else {},
        )
    )


def _sampler(seed: int, count: int, fixed: Point) -> Any:
    import optuna

    sampler = optuna.samplers.GPSampler(seed=seed, n_startup_trials=max(2, count // 3))
    return optuna.samplers.PartialFixedSampler(fixed, sampler) if fixed else sampler


def _shape(ranges: Ranges) -> dict[str, Any]:
    import optuna

    return {n: optuna.distributions.FloatDistribution(low, high) for n, (low, high) in ranges.items()}


def _state(name: str) -> Any:
    import optuna

    return optuna.trial.TrialState[name]


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna logs every trial and calls its sampler experimental; whatever it draws, the caller's streams stay as they are."""
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        # The sampler climbs by torch's gradients.
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)


def name_of(asked: Any, tensors: Iterable[Tensor]) -> str:
    """A hash of all that scores depend on: trials of other questions, or on other weights, are not those of a search."""
    digest = hashlib.sha256(repr(asked).encode())
    for tensor in moved(dict(enumerate(tensors)), "cpu").values():
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def curves(trials: Trials) -> dict[str, dict[str, list[list[float]]]]:
    """By trial, from 1 on: its loss and point, the least loss so far, and whether it is feasible; as ``Run.history`` has it."""
    curve: dict[str, list[list[float]]] = {"loss": [], "best": [], "feasible": []}
    points: dict[str, list[list[float]]] = {}
    for number, trial in enumerate(trials, 1):
        curve["feasible"].append([number, float(trial["score"] is not None)])
        if trial["score"] is not None:
            curve["loss"].append([number, trial["score"]])
            curve["best"].append([number, min(loss for _, loss in curve["loss"])])
        for name, value in trial["point"].items():
            points.setdefault(name, []).append([number, value])
    return {"search": curve, "search point": points}
