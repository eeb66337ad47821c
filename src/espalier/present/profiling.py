"""``espalier profile``, and the profile that a budget of time needs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import nn

from espalier.plan import milliseconds_of
from espalier.present.config import Config
from espalier.present.edge import stdout
from espalier.run.rundir import PROFILE
from espalier.timing.making import check_profile, profile
from espalier.timing.profile import Profile, load_profile


def measured_profile(
    network: nn.Module,
    example: Any,
    *,
    to: Path,
    runtime: str,
    threads: int = 1,
    batch: int = 1,
    precision: str = "f32",
) -> Profile:
    """Make a profile, or go on with the one in ``to``, and say how far it is."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("profile"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stdout, transient=True) as bar, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the machine was busy stands in what is told of the profile
        task = bar.add_task("profile", total=None)
        return profile(
            network,
            example,
            runtime=runtime,
            threads=threads,
            batch=batch,
            precision=precision,
            to=to,
            progress=lambda done, of: bar.update(task, completed=done, total=of),
        )


def with_profile(config: Config, network: nn.Module, example: Any, *, out: Path, resume: bool) -> Config:
    """``config`` whose budget has its profile: of the run that goes on, of the file given, or made now beside ``out``."""
    budget = dict(config["budget"])
    wanted = {"runtime": budget["runtime"]} if "runtime" in budget else {}
    runtime, given = budget.pop("runtime", "onnxruntime"), budget.pop("profile", None)
    if resume and (out / PROFILE).exists():
        budget["profile"] = load_profile(out / PROFILE)
    elif given is not None:
        budget["profile"] = load_profile(given)
        budget["profile"].need(wanted)
    else:
        beside = out.with_name(f"{out.name}.{runtime}.json")
        budget["profile"] = measured_profile(network, example, to=beside, runtime=runtime)
    stdout.print(f"profile: {budget['profile'].describe()}", markup=False, soft_wrap=True)
    return {**config, "budget": budget}


def show_check(found: Profile, network: nn.Module, example: Any) -> None:
    """Predicted and measured times of networks that are not in the profile."""
    rows = check_profile(found, network, example)
    for predicted, took in rows:
        stdout.print(f"predicted {predicted:8.3f} ms, measured {took:8.3f} ms, {predicted / took - 1:+.1%}")
    worst = max(abs(predicted / took - 1) for predicted, took in rows)
    stdout.print(f"off by at most {worst:.1%} on {len(rows)} networks that are not in the profile")


def time_of(text: str | None) -> float | str | None:
    """``--latency``: a fraction or a percentage as a number, a time as it stands.  Raises: ValueError for anything else."""
    if text is None:
        return None
    try:
        found: float | str = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        found = text
    milliseconds_of(found, 1.0)
    return found
