"""Runs side by side: order, places, shared starts, and the end of the time."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.recipe import Job
from benchmarks.side_by_side import run_side_by_side

START = {"epochs": 2, "lr": 0.1, "for": ["cut", "svd"]}


def job(label: str, *, seed: int = 0, recipe: str = "r", start: dict[str, Any] | None = None) -> Job:
    methods = {"dense": {"name": "dense"}, "cut": {"name": "magnitude"}, "svd": {"name": "svd-oneshot"},
               "slow": {"name": "tcp"}, "broken": {"name": "tcp"}}  # fmt: skip
    content = {"model": {"name": "resnet20"}, "recipe": {"epochs": 2, "lr": 0.1}, "methods": methods}
    return Job(recipe, label, seed, content if start is None else {**content, "start": start})


class Runs:
    """Jobs as small programs that write down when they began and ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start_file(self, job: Job) -> Path:
        return self.folder / f"{job.name}-start-{job.seed}"

    def command(self, job: Job) -> list[str]:
        start = self.start_file(job)
        needs = "start" in job.content and job.starts_trained
        program = f"""
import sys, time
from pathlib import Path
begun = time.time()
if {needs} and not Path({str(start)!r}).exists():
    print("trains the start")
time.sleep({60 if job.label == "slow" else 0.5})
if {job.is_the_start or needs}:
    Path({str(start)!r}).write_text("")
Path({str(self.folder / job.key)!r}).write_text(f"{{begun}} {{time.time()}}")
print("right at the end")
sys.exit({3 if job.label == "broken" else 0})
"""
        return [sys.executable, "-c", program]

    def run(self, jobs: list[Job], *, places: int, seconds: float | None = None) -> bool:
        return run_side_by_side(
            jobs, self.command, places=places, start_file=self.start_file, logs=self.folder / "logs", seconds=seconds
        )

    def times(self, job: Job) -> tuple[float, float]:
        begun, ended = map(float, (self.folder / job.key).read_text().split())
        return begun, ended

    def trained_start(self) -> list[str]:
        return sorted(p.stem for p in (self.folder / "logs").iterdir() if "trains the start" in p.read_text())


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def test_no_more_than_the_places_run_at_a_time(runs: Runs) -> None:
    jobs = [job("dense", seed=seed) for seed in range(4)]
    assert runs.run(jobs, places=2)
    times = [runs.times(one) for one in jobs]
    for begun, _ in times:
        assert 1 <= sum(b <= begun < e for b, e in times) <= 2
    assert any(sum(b <= begun < e for b, e in times) == 2 for begun, _ in times)


def test_one_run_trains_the_start_and_others_wait_for_it(runs: Runs) -> None:
    first, second, other = job("cut", start=START), job("svd", start=START), job("cut", recipe="other", start=START)
    assert runs.run([first, second, other], places=3)
    assert runs.trained_start() == ["other.cut-seed0", "r.cut-seed0"]
    assert runs.times(second)[0] >= runs.times(first)[1]
    assert runs.times(other)[0] < runs.times(first)[1]  # another recipe's start is its own


def test_a_dense_row_that_is_the_start_goes_first(runs: Runs) -> None:
    cut, dense = job("cut", start=START), job("dense", start=START)
    assert dense.is_the_start
    assert runs.run([cut, dense], places=2)
    assert runs.trained_start() == []
    assert runs.times(cut)[0] >= runs.times(dense)[1]


def test_runs_are_stopped_when_the_time_is_up(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    begun = time.monotonic()
    assert runs.run([job("slow"), job("dense"), job("dense", seed=1)], places=2, seconds=5.0)
    assert time.monotonic() - begun < 30
    assert "r.slow-seed0: stopped after: no output" in capsys.readouterr().out
    assert not (runs.folder / "r.slow-seed0").exists()
    assert (runs.folder / "r.dense-seed1").exists()


def test_a_run_that_fails_is_told_and_stops_no_other(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert not runs.run([job("broken"), job("dense")], places=1)
    assert "r.broken-seed0: failed: right at the end" in capsys.readouterr().out
    assert (runs.folder / "r.dense-seed0").exists()


def test_no_place_at_all_is_refused(runs: Runs) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        runs.run([job("dense")], places=0)
