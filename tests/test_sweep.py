"""Sweeps: every point once, whatever is killed, by however many workers; what fails is recorded and the rest goes on."""

import csv
import json
import multiprocessing
import signal
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import espalier as es
from espalier.present import sweep as room
from espalier.present.cli import app
from espalier.present.sweep import as_markdown, numbers, points_of, rows_of, sweep
from espalier.run.ledger import SWEEP_JOURNAL, Ledger, StorageLost
from espalier.run.loop import TrainingDiverged
from espalier.run.rundir import write_sealed
from espalier.run.stopping import TrainingStopped

pytest.importorskip("optuna")

CONFIG = {
    "model": {"name": "resnet20", "weights": "w.pt"},
    "data": {"name": "digits"},
    "budget": {},
    "recipe": {"epochs": 1},
}


def points(**more):
    given = {"methods": ["tcp", "mgp:blocks=true"], "budgets": {"macs": [0.3, 0.5]}, "seeds": 2, **more}
    return points_of(CONFIG, **given)


def metrics(accuracy: float, macs: float = 0.5) -> dict:
    return {
        "small": {"accuracy": accuracy},
        "dense": {"accuracy": 90.0, "loss": 0.5},
        "fraction": {"macs": macs, "params": 0.6, "activation_memory": 0.9},
        "latency": [{"name": "small", "backend": "onnxruntime", "batch": 1, "speedup": 2.0}],
        "seconds": 1.0,
    }


@pytest.fixture
def jobs(monkeypatch):
    """Runs that take no time; a list of what was run, and with what was known of the dense network."""
    done = []

    def job(config, *, out, resume, download, known, beat):
        done.append((out.name, resume, known))
        out.mkdir(exist_ok=True)
        beat()
        if "tcp-macs0.3" in out.name:
            raise TrainingDiverged("the loss is not finite: lower lr")
        (out / "config.toml").write_text("[start]\ntrained = true\n")
        write_sealed(out / "metrics.json", metrics(80.0 + config["recipe"]["seed"], config["budget"]["macs"]))

    monkeypatch.setattr(room, "run_job", job)
    monkeypatch.setattr(
        room, "dot_chart", lambda dots, **labels: f"<svg>{len(dots)}</svg>"
    )  # drawn anew at every point
    return done


def test_points_are_methods_times_budgets_times_seeds():
    found = points()
    assert [p.name for p in found][:3] == ["tcp-macs0.3-seed0", "tcp-macs0.3-seed1", "tcp-macs0.5-seed0"]
    assert len(found) == 8 and found[-1].config["method"] == {"name": "mgp", "blocks": True}
    paired = points(methods=["tcp"], budgets={"macs": [0.3, 0.5], "params": [0.6]}, seeds=1)
    assert [p.config["budget"] for p in paired] == [{"macs": 0.3, "params": 0.6}, {"macs": 0.5, "params": 0.6}]


def test_points_may_be_times_and_say_what_was_measured(tmp_path, jobs):
    found = points_of(CONFIG, methods=["tcp"], budgets={"latency": [0.5, "2 ms"]}, seeds=1)
    assert [p.name for p in found] == ["tcp-latency0.5-seed0", "tcp-latency2ms-seed0"]
    assert [p.config["budget"]["latency"] for p in found] == [0.5, "2 ms"]
    with pytest.raises(ValueError, match="latency"):
        points_of(CONFIG, methods=["tcp"], budgets={"latency": ["soon"]}, seeds=1)
    kept = {"small": 0.4, "dense": 1.0, "setting": {"runtime": "openvino"}}
    facts = room.facts_of({**metrics(80.0), "time": kept}, {"start": {"trained": True}})
    assert facts["time"] == 0.4 and facts["backend"] == "openvino"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"seeds": 0}, "--seeds 0"),
        ({"methods": ["none"]}, "compares methods"),
        ({"methods": ["nothing"]}, "choose one of"),
        ({"methods": ["tcp:speed=1"]}, "speed"),
        ({"methods": ["tcp", "tcp"]}, "the same"),
        ({"budgets": {"macs": [0.3, 0.5], "params": [0.1, 0.2, 0.3]}}, "paired"),
        ({"budgets": {}}, "no budget"),
        ({"budgets": {"macs": [-1.0]}}, "macs"),
    ],
)
def test_points_that_a_run_would_refuse_are_refused_before_anything_runs(more, words):
    with pytest.raises(ValueError, match=words):
        points(**more)


def test_numbers_of_a_list():
    assert numbers("--macs", "0.3,0.5") == [0.3, 0.5]
    with pytest.raises(ValueError, match=r"--macs 0\.3;0\.5"):
        numbers("--macs", "0.3;0.5")


def test_a_diverging_point_is_recorded_and_the_rest_goes_on(tmp_path, jobs):
    rows = sweep(points(), out=tmp_path, storage=None)
    assert [r["state"] for r in rows] == ["fail"] * 2 + ["complete"] * 6
    assert "not finite" in rows[0]["error"] and rows[2]["accuracy"] == 80.0 and rows[2]["time"] == 0.5
    text = (tmp_path / "sweep.md").read_text()
    assert "tcp, macs 0.3, seed 0: the loss is not finite" in text and "| tcp | macs 0.5 | 80.50 ± 0.71 | 50.0" in text
    with (tmp_path / "sweep.csv").open() as file:
        assert [r["seed"] for r in csv.DictReader(file)] == ["0", "1"] * 4
    assert all((tmp_path / f"sweep-{axis}.svg").exists() for axis in ("time", "macs", "params"))


def test_the_dense_network_is_evaluated_once(tmp_path, jobs):
    sweep(points(methods=["mgp"]), out=tmp_path, storage=None)
    assert [known for *_, known in jobs] == [None, *[{"accuracy": 90.0, "loss": 0.5}] * 3]


def test_a_sweep_that_is_started_again_runs_nothing_twice(tmp_path, jobs):
    sweep(points(), out=tmp_path, storage=None)
    first = len(jobs)
    more = points(methods=["tcp", "mgp:blocks=true", "dprp"], seeds=2)
    rows = sweep(more, out=tmp_path, storage=None)
    assert [name.split("-")[0] for name, *_ in jobs[first:]] == ["dprp"] * 4 and len(rows) == 12


def test_a_sweep_with_another_recipe_is_refused(tmp_path, jobs):
    sweep(points(methods=["mgp"], seeds=1), out=tmp_path, storage=None)
    other = points_of({**CONFIG, "recipe": {"epochs": 2}}, methods=["mgp"], budgets={"macs": [0.3]}, seeds=1)
    with pytest.raises(ValueError, match="other settings"):
        sweep(other, out=tmp_path, storage=None)


def test_an_interrupted_point_is_free_again_and_goes_on(tmp_path, monkeypatch, jobs):
    def interrupted(config, *, out, **_):
        out.mkdir()
        (out / "config.toml").write_text("[method]\n")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(room, "run_job", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sweep(points(methods=["mgp"], seeds=1), out=tmp_path, storage=None)
    rows = sweep(points(methods=["mgp"], seeds=1), out=tmp_path, storage=None)
    assert [r["state"] for r in rows] == ["complete"] * 2 and jobs[0][:2] == ("mgp-macs0.3-seed0", True)


def test_a_full_disk_is_no_fault_of_a_point(tmp_path, monkeypatch, jobs):
    """It would be recorded as failed, and so would all the others, and never be tried again."""

    def full(config, *, out, **_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(room, "run_job", full)
        with pytest.raises(OSError, match="No space left"):
            sweep(points(methods=["mgp"], seeds=1), out=tmp_path, storage=None)
    rows = sweep(points(methods=["mgp"], seeds=1), out=tmp_path, storage=None)
    assert [r["state"] for r in rows] == ["complete"] * 2


def test_a_point_stopped_while_something_is_imported_has_not_failed(tmp_path, monkeypatch, jobs):
    """An extension that is stopped as it is imported raises an ImportError."""

    def stopped(config, *, out, **_):
        raise ImportError("initialization failed") from TrainingStopped("stopped by SIGTERM")

    with monkeypatch.context() as patch:
        patch.setattr(room, "run_job", stopped)
        with pytest.raises(TrainingStopped):
            sweep(points(methods=["mgp"], seeds=1), out=tmp_path, storage=None)
    rows = sweep(points(methods=["mgp"], seeds=1), out=tmp_path, storage=None)
    assert [r["state"] for r in rows] == ["complete"] * 2


# -- the ledger --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["journal", "sqlite"])
def storage(request, tmp_path):
    return str(tmp_path / SWEEP_JOURNAL) if request.param == "journal" else f"sqlite:///{tmp_path / 'sweep.db'}"


def test_two_workers_never_get_the_same_point(storage):
    one, two = Ledger(storage, "s"), Ledger(storage, "s")
    names = ["a", "b", "c"]
    one.add(names)
    two.add(names)
    taken = [worker.take(names) for worker in (one, two, one, two)]
    assert [t and t.point for t in taken] == ["a", "b", "c", None]
    one.complete(taken[0], 1.0)
    one.fail(taken[1], "diverged")
    assert [(e.point, e.state) for e in two.entries()] == [("a", "complete"), ("b", "fail"), ("c", "running")]


def test_workers_that_begin_at_the_same_moment_share_a_new_storage(storage):
    processes = multiprocessing.get_context("fork")
    together, opened = processes.Barrier(4), processes.Queue()

    def work():
        together.wait()
        try:
            Ledger(storage, "s").add(["a", "b"])
            opened.put("")
        except Exception as error:
            opened.put(repr(error))

    workers = [processes.Process(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    assert [opened.get(timeout=60) for _ in workers] == [""] * 4
    for worker in workers:
        worker.join()
    assert [e.point for e in Ledger(storage, "s").entries()] == ["a", "b"]


def test_what_a_killed_worker_held_is_taken_over_once(storage):
    processes = multiprocessing.get_context("fork")
    at_work = processes.Event()

    def work():
        ledger = Ledger(storage, "s")
        ledger.add(["a"])
        assert ledger.take(["a"])
        at_work.set()
        signal.pause()

    worker = processes.Process(target=work)
    worker.start()
    assert at_work.wait(60)
    one, two = Ledger(storage, "s"), Ledger(storage, "s")
    assert one.take(["a"]) is None  # it is at work
    worker.kill()
    worker.join()
    taken = [one.take(["a"]), two.take(["a"])]
    assert taken[0] is not None and taken[1] is None
    one.complete(taken[0], 1.0)
    assert [(e.point, e.state) for e in two.entries()] == [("a", "complete")]


def test_a_worker_on_another_machine_is_given_time(tmp_path, monkeypatch):
    ledger = Ledger(str(tmp_path / SWEEP_JOURNAL), "s")
    ledger.add(["a"])
    entry = ledger.take(["a"])
    ledger.note(entry, worker={"host": "elsewhere", "process": 1, "heard": time.time()})
    assert ledger.take(["a"]) is None
    monkeypatch.setattr("espalier.run.ledger.SILENT", -1.0)
    assert ledger.take(["a"]).point == "a"


def test_a_storage_that_cannot_be_opened_says_so(tmp_path):
    with pytest.raises(ValueError, match="cannot be opened"):
        Ledger(f"sqlite:///{tmp_path / 'nowhere' / 'sweep.db'}", "s")


def pages(ledger, most):
    """How many SQLite may write; those that are there stay."""
    with ledger._storage.engine.connect() as connection:
        connection.exec_driver_sql(f"PRAGMA max_page_count={most}")


def test_a_storage_that_is_lost_on_the_way_is_named(storage, tmp_path, monkeypatch):
    ledger = Ledger(storage, "s")
    ledger.add(["a"])
    entry = ledger.take(["a"])

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        if "sqlite" in storage:
            pages(ledger, 1)
        with pytest.raises(StorageLost, match=r"^storage .*sweep\.(journal|db): cannot be .*(No space|disk is full)"):
            ledger.note(entry, words="long " * 10_000)
    if "sqlite" in storage:
        pages(ledger, 10_000)
    ledger.note(entry, seconds=2.0)
    assert Ledger(storage, "s").entries()[0].facts["seconds"] == 2.0


def test_the_lock_of_a_journal_is_found_again_from_anywhere(tmp_path, monkeypatch):
    """It is a link; where its target is not there, a lock that a killed worker left is waited for without end."""
    monkeypatch.chdir(tmp_path)
    ledger = Ledger("runs/sweep.journal", "s")
    lock = ledger._storage._backend.lock
    lock.acquire()
    assert Path("runs/sweep.journal.lock").is_symlink() and Path("runs/sweep.journal.lock").exists()
    lock.release()


def test_the_command_sweeps_and_goes_on(tmp_path, unmeasured):
    arguments = ["sweep", "--model", "resnet8", "--data", "digits", "--method", "magnitude", "--macs", "0.5,0.000001"]
    arguments += ["--epochs", "1", "--device", "cpu", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1, done.output  # one budget cannot be met
    rows = list(csv.DictReader((tmp_path / "sweep.csv").open()))
    assert [r["state"] for r in rows] == ["complete", "fail"] and float(rows[0]["macs"]) <= 0.5
    assert (
        rows[0]["dense accuracy"] == "" and "Dense" not in (tmp_path / "sweep.md").read_text()
    )  # untrained: no measure
    assert "cannot be met" in rows[1]["error"] and (tmp_path / "magnitude-macs0.5-seed0" / "model.safetensors").exists()
    assert json.loads((tmp_path / "magnitude-macs0.5-seed0" / "metrics.json").read_text())
    ledger = Ledger(str(Path(tmp_path) / SWEEP_JOURNAL), "espalier sweep")
    assert as_markdown(rows_of(ledger, []), es.Metric("error")).startswith("| method | budget | error |")
