"""What befalls a run from outside: told to stop, two at once, files that were changed."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import espalier as es
from espalier.methods.search import minimise
from espalier.present.cli import app
from espalier.present.progress import RunProgress
from espalier.run.checkpoint import ENTRIES, read_checkpoint, write_checkpoint
from espalier.run.lock import LOCK, OWNER, owned
from espalier.run.loop import Step
from espalier.run.rundir import metadata_of
from tests.forked import forked

METHODS = [es.TCP(), es.MGP(), es.DPRP(), es.TTLC(search=0), es.Magnitude()]


pytestmark = pytest.mark.usefixtures("unmeasured")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )  # fmt: skip


class Noisy(torch.utils.data.Dataset):
    """Images that are augmented by torch's global random numbers as they are loaded."""

    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(index)
        return torch.randn(1, 8, 8, generator=generator) + 0.3 * torch.randn(1, 8, 8), index % 10


def data() -> es.Loaders:
    train = torch.utils.data.DataLoader(Noisy(), batch_size=16, shuffle=True)
    test = [(torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(9)), torch.arange(20) % 10)]
    return es.Loaders(train, test, num_classes=10)


def compress(folder: Path, method: es.Method | None = None, **options: Any) -> es.Result:
    recipe = es.Recipe(epochs=3, lr=0.02, device="cpu", threads=1, ema=0.9)
    budget = es.Budget(macs=0.6)
    return es.compress(net(), data(), budget=budget, method=method or es.TCP(), recipe=recipe, out=folder, **options)


def told_at(*steps: int) -> Callable[[Step], None]:
    """SIGTERM to oneself at these steps of the whole run."""
    return lambda s: os.kill(os.getpid(), signal.SIGTERM) if (s.epoch - 1) * s.steps + s.step in steps else None


# -- told to stop


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_a_run_that_was_told_to_stop_goes_on_exactly(method: es.Method, tmp_path: Path) -> None:
    """In the middle of the first epoch, at an end of an epoch, and in the middle of the last."""
    compress(tmp_path / "whole", method)
    before = signal.getsignal(signal.SIGTERM)
    for number, (step, where) in enumerate(
        [(2, "in epoch 1 after step 2 of 6"), (12, "after epoch 2"), (16, "in epoch 3 after step 4 of 6")]
    ):
        with pytest.raises(es.TrainingStopped, match=f"{where}; .*checkpoint.pt.*resume=True"):
            compress(tmp_path / "run", method, resume=number > 0, on_step=told_at(step))
        assert signal.getsignal(signal.SIGTERM) is before
        assert not (tmp_path / "run" / LOCK).exists()
    compress(tmp_path / "run", method, resume=True)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    logs = [(tmp_path / name / "log.csv").read_text().splitlines() for name in ("whole", "run")]
    for mine, other in zip(*logs, strict=True):  # all but the seconds
        assert mine.split(",")[:6] == other.split(",")[:6]


def test_a_handler_of_ones_own_is_left_in_place(tmp_path: Path) -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        compress(tmp_path / "run", on_step=told_at(4))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert came == [signal.SIGTERM]


def test_the_command_says_how_to_go_on_and_ends_as_if_terminated(tmp_path: Path) -> None:
    """A process of its own, which a batch system ends in an epoch that would take for ever."""
    old = RunProgress.on_step

    def told(self: RunProgress, step: Step) -> None:
        old(self, step)
        if step.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    def command() -> None:
        RunProgress.on_step = told  # of this process alone
        app([
            "compress", "--model", "resnet8", "--data", "digits", "--method", "none", "--epochs", "500", "--out", "run",
            "--device", "cpu", "--threads", "1", "--batch-size", "8",
        ])  # fmt: skip

    done = forked(command, folder=tmp_path)
    assert done.returncode == 143, done.stderr
    said = done.stderr.splitlines()[-1]
    assert said == "stopped by SIGTERM in epoch 1 after step 3 of 179; go on with: espalier compress --out run --resume"
    assert read_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 3
    assert not (tmp_path / "run" / LOCK).exists()


# -- two at once


@pytest.mark.parametrize("options", [{}, {"force": True}, {"resume": True}], ids=str)
def test_a_folder_in_which_somebody_is_at_work_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    compress(tmp_path / "run")
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    with owned(tmp_path / "run"):
        words = rf"process {os.getpid()} on .+ is at work in it, since \d{{4}}-.*{OWNER}"
        with pytest.raises(ValueError, match=words):
            compress(tmp_path / "run", **options)
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before


def test_of_two_threads_on_a_new_folder_one_gets_it(tmp_path: Path) -> None:
    both, said = threading.Barrier(2), []

    def one() -> None:
        both.wait()
        try:
            compress(tmp_path / "run")
        except ValueError as error:
            said.append(str(error))

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(said) == 1 and "is at work in it" in said[0]
    assert (tmp_path / "run" / "model.safetensors").exists() and not list((tmp_path / "run").glob("old-*"))


# Whether the folder may be taken: the lock says that its owner has ended, but not across hosts.
STALE: dict[str, tuple[dict[str, Any], bool]] = {
    "a process that has ended": ({"process": 2**22 + 1}, True),
    "before the machine was started again": ({"boot": "another"}, True),
    "another container on this machine": ({"host": "elsewhere"}, True),
    "another host": ({"host": "elsewhere", "boot": "another"}, False),
}


@pytest.mark.parametrize("kind", STALE)
def test_an_owner_that_was_left_behind_is_recognised(kind: str, tmp_path: Path) -> None:
    with owned(tmp_path):
        owner = json.loads((tmp_path / OWNER).read_text())
    change, gone = STALE[kind]
    (tmp_path / OWNER).write_text(json.dumps({**owner, **change}))
    if gone:
        with owned(tmp_path):
            assert json.loads((tmp_path / OWNER).read_text())["process"] == os.getpid()
        assert not list(tmp_path.iterdir())
    else:
        with pytest.raises(ValueError, match=rf"on elsewhere is at work.*remove .*{OWNER}"), owned(tmp_path):
            pass


def test_an_owner_that_was_cut_short_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / OWNER).write_text('{"host": "x')
    with owned(tmp_path):
        pass


def test_a_refused_run_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(es.BudgetError):
        es.compress(net(), data(), budget=es.Budget(macs=1e-6), out=tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


# -- files that were changed


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in the middle of its second epoch."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(es.TrainingStopped):
        compress(folder, on_step=told_at(8))
    return folder


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_flipped_bits_in_a_checkpoint_are_found_or_change_nothing(stopped: Path, tmp_path: Path) -> None:
    path = copied(stopped, tmp_path / "run") / "checkpoint.pt"
    whole, right = path.read_bytes(), read_checkpoint(path)
    found = 0
    for place in range(7, len(whole), len(whole) // 120):
        changed = bytearray(whole)
        changed[place] ^= 1 << (place % 8)
        path.write_bytes(changed)
        try:
            content = read_checkpoint(path)
        except ValueError as error:
            assert "checkpoint.pt" in str(error) and "\n" not in str(error)
            found += 1
        else:  # a bit that is padding, or a date in the archive
            assert equal(content, right)
    assert found > 40


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(v, other[k]) for k, v in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, Tensor):
        return torch.equal(one, other) and one.stride() == other.stride()
    return bool(one == other)


OTHERS: dict[str, Any] = {"a number": 10**9, "a word": "x", "a list": [1], "a table": {"x": 1}}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("how", ["missing", *OTHERS])
def test_a_checkpoint_with_another_entry_is_one_line(entry: str, how: str, stopped: Path, tmp_path: Path) -> None:
    """Written anew with a right checksum, as a program of somebody's own would."""
    if (entry, how) in {("scaler", "a table")}:
        return  # without fp16 nothing is scaled
    path = copied(stopped, tmp_path / "run") / "checkpoint.pt"
    content = read_checkpoint(path)
    content[entry] = OTHERS.get(how)
    if how == "missing":
        del content[entry]
    write_checkpoint(path, content)
    with pytest.raises(ValueError, match=r"checkpoint\.pt|cannot resume") as caught:
        compress(tmp_path / "run", resume=True)
    assert type(caught.value) is ValueError and "\n" not in str(caught.value)


def test_a_history_that_was_made_longer_or_shorter_is_found(stopped: Path, tmp_path: Path) -> None:
    for number, change in enumerate((lambda h: h * 2, lambda h: [])):
        path = copied(stopped, tmp_path / str(number)) / "checkpoint.pt"
        content = read_checkpoint(path)
        write_checkpoint(path, {**content, "history": change(content["history"])})
        with pytest.raises(ValueError, match="damaged, it says step 8 where its epochs have"):
            compress(path.parent, resume=True)


def test_a_changed_plan_is_found(tmp_path: Path) -> None:
    text = es.Plan.dense(es.trace(net(), torch.zeros(1, 1, 8, 8))).to_json()
    assert es.Plan.from_json(text).to_json() == text
    for change in (("7", "6"), ("sha256", "sha255"), ('"0"', '"1"'), ("of", "if")):
        assert change[0] in text
        with pytest.raises(ValueError, match="plan"):
            es.Plan.from_json(text.replace(*change, 1))
    earlier = {**json.loads(text), "format": "espalier-plan/1"}
    del earlier["sha256"]
    assert es.Plan.from_json(json.dumps(earlier)).to_json() == text


@pytest.mark.parametrize("change", ["a score", "a line less", "lines in another order"])
def test_a_changed_journal_is_found(change: str, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    journal = tmp_path / "search.journal"

    def searched(count: int) -> list[dict[str, Any]]:
        trials: list[dict[str, Any]] = []
        minimise(
            lambda p: (p["x"] - 0.3) ** 2,
            {"x": (0.0, 1.0)},
            first={"x": 0.5},
            count=count,
            seed=0,
            trials=trials,
            journal=journal,
        )
        return trials

    first = searched(2)
    assert searched(2) == first
    lines = journal.read_text().splitlines(keepends=True)
    number = next(i for i, line in enumerate(lines) if '"values"' in line)
    if change == "a score":
        lines[number] = lines[number].replace('"values":[0.0', '"values":[9.0')
    elif change == "a line less":
        del lines[number]
    else:
        lines[number - 1], lines[number] = lines[number], lines[number - 1]
    journal.write_text("".join(lines))
    with pytest.raises(ValueError, match=r"search\.journal.*checksum"):
        searched(3)


def test_a_journal_of_the_earlier_release_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    journal, trials = tmp_path / "search.journal", []

    def searched(count: int) -> None:
        minimise(
            lambda p: p["x"], {"x": (0.0, 1.0)}, first={"x": 0.5}, count=count, seed=0, trials=trials, journal=journal
        )

    searched(1)
    plain = [{k: v for k, v in json.loads(line).items() if k != "sha256"} for line in journal.read_text().splitlines()]
    journal.write_text("".join(json.dumps(line) + "\n" for line in plain))
    searched(2)
    assert len(trials) == 2 and journal.read_text().count("sha256") > 0
    searched(3)


@pytest.mark.parametrize("name", ["preprocessing.json", "plan.json"])
@pytest.mark.parametrize("text", ["[1]", "{"])
def test_what_a_file_of_onnx_is_to_say_is_named_where_it_is_damaged(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}: damaged"):
        metadata_of(tmp_path)


@pytest.mark.parametrize("name", ["metrics.json", "history.json"])
def test_changed_results_are_found(name: str, tmp_path: Path) -> None:
    from espalier.present.runs import read_run

    compress(tmp_path / "run", es.DPRP(), config={"model": {"name": "mine:net"}})
    read_run(tmp_path / "run")
    file = tmp_path / "run" / name
    digit = next(c for c in "2345678" if f"{c}" in file.read_text().partition("sha256")[0])
    file.write_text(file.read_text().replace(digit, "9", 1))
    with pytest.raises(ValueError, match=f"{name}.*checksum"):
        read_run(tmp_path / "run")
