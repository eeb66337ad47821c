"""Bayesian optimisation of a few numbers, on Optuna's Gaussian process sampler; what was tried is plain data."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

Ranges = Mapping[str, tuple[float, float]]
Point = dict[str, float]
Trials = list[dict[str, Any]]
"""``{"point": {name: value}, "score": number or None, "failed": why}`` in the order they were tried."""


class MissingOptuna(ImportError, ValueError):
    """The optional package is not installed."""


def need_optuna(who: str) -> None:
    """Raises: MissingOptuna with what to do."""
    if importlib.util.find_spec("optuna") is None:
        raise MissingOptuna(
            f"{who} searches with optuna, which is not installed: pip install 'espalier[search]', or set search=0"
        )


def minimise(
    score: Callable[[Point], float], ranges: Ranges, *, first: Point, count: int, seed: int, trials: Trials
) -> Point | None:
    """Extend ``trials`` to ``count``, beginning with ``first``, and return the best point; ``None`` if all failed.

    A trial that raises ValueError, RuntimeError or ArithmeticError is recorded with its reason and the search goes on.  Every
    trial is proposed from those before it and its number alone, so that an interrupted search ends where it would have ended.
    """
    while len(trials) < count:
        point = dict(first) if not trials else _propose(ranges, trials, count, seed + len(trials))
        try:
            value = float(score(point))
            reason = "" if math.isfinite(value) else f"the score is {value}"
        except (ValueError, RuntimeError, ArithmeticError) as error:
            value, reason = math.nan, f"{type(error).__name__}: {error}"
        trials.append({"point": point, "score": None if reason else value, "failed": reason})
    good = [t for t in trials[:count] if t["score"] is not None]
    return dict(min(good, key=lambda t: float(t["score"]))["point"]) if good else None


def _propose(ranges: Ranges, trials: Trials, count: int, seed: int) -> Point:
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with torch.enable_grad(), warnings.catch_warnings():  # the sampler climbs by torch's gradients
            warnings.simplefilter("ignore")  # the sampler calls itself experimental
            sampler = optuna.samplers.GPSampler(seed=seed, n_startup_trials=max(2, count // 3))
            study = optuna.create_study(sampler=sampler)
            shape = {n: optuna.distributions.FloatDistribution(low, high) for n, (low, high) in ranges.items()}
            for trial in trials:
                state = optuna.trial.TrialState.COMPLETE if trial["score"] is not None else optuna.trial.TrialState.FAIL
                study.add_trial(
                    optuna.trial.create_trial(
                        params=trial["point"], distributions=shape, value=trial["score"], state=state
                    )
                )
            return dict(study.ask(fixed_distributions=shape).params)
    finally:
        optuna.logging.set_verbosity(verbosity)
