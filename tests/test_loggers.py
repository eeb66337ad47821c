"""Loggers beside the run's folder: by name, or any of Lightning Fabric's."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from espalier.optional import MissingPackage
from espalier.run import loggers
from espalier.run.loggers import Loggers
from espalier.run.loop import Epoch, History

HISTORY = History(tuple(Epoch(n, 0.5 / n, 60.0, 50.0 + n, 0.7, 0.1, 2.0) for n in (1, 2)))


class Recorder:
    """As Fabric's loggers are."""

    def __init__(self, **settings):
        self.settings, self.rows, self.status = settings, [], None

    def log_metrics(self, metrics, step):
        self.rows.append((step, metrics))

    def finalize(self, status):
        self.status = status


def test_any_logger_of_fabric_gets_every_number_of_every_epoch_once(tmp_path):
    recorder = Recorder()
    found = Loggers(["csv", recorder], tmp_path)
    found(History(HISTORY.epochs[:1]))
    found(HISTORY)
    found.close()
    assert [step for step, _ in recorder.rows] == [1, 2]
    assert recorder.rows[1][1] == {
        "loss": 0.25, "train_accuracy": 60.0, "accuracy": 52.0, "test_loss": 0.7, "lr": 0.1, "seconds": 2.0, "removals": 0,
    }  # fmt: skip
    assert recorder.status == "success"


@pytest.mark.parametrize(("name", "logger"), [("wandb", "WandbLogger"), ("mlflow", "MLFlowLogger")])
def test_a_name_makes_the_logger_of_lightning_at_the_first_epoch(name, logger, tmp_path, monkeypatch):
    made = []
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    there = SimpleNamespace(loggers=SimpleNamespace(**{logger: lambda **s: made.append(Recorder(**s)) or made[-1]}))
    monkeypatch.setattr(loggers, "import_lightning", lambda: there)
    found = Loggers(name, tmp_path / "run")
    assert not made
    found(HISTORY)
    assert len(made[0].rows) == 2 and "run" in made[0].settings.values()


@pytest.mark.parametrize(
    ("log", "folder", "error", "words"),
    [
        (
            "tensorbord",
            True,
            ValueError,
            "'tensorbord': there is no such logger; choose of csv, tensorboard, wandb, mlflow",
        ),
        (
            "csv, wandb",
            True,
            MissingPackage,
            r"needs the package wandb, which is not installed.*pip install '.\[wandb\]'",
        ),
        ("csv", False, ValueError, "give out=FOLDER"),
    ],
)
def test_what_cannot_be_logged_is_said_before_training(log, folder, error, words, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(error, match=words):
        Loggers(log, tmp_path if folder else None)
