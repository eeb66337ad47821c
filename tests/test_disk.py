"""A disk that is full at every single write of a run, fifty runs in a row, two at a time: nothing is lost or left behind."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import espalier as es
from espalier.run.checkpoint import read_checkpoint, write_checkpoint
from espalier.run.rundir import begin_folder
from espalier.surgery.writing import append_lines
from tests.forked import forked

X, Y = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(40) % 10
pytestmark = pytest.mark.usefixtures("unmeasured")
BATCHES = list(zip(X.split(10), Y.split(10), strict=True))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 10),
    )


def compress(folder: Path, model: nn.Module | None = None, **options: Any) -> es.Result:
    model = network() if model is None else model
    data = es.Loaders(BATCHES, BATCHES, num_classes=10)
    recipe = es.Recipe(epochs=2, device="cpu", threads=1)
    return es.compress(model, data, budget=es.Budget(macs=0.6), method=es.TCP(), recipe=recipe, out=folder, **options)


def test_every_write_of_a_run_may_fail_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write number n fails, for every n: one line naming the folder's file, nothing half written, and then it is resumed."""
    whole, count, fails_at = os.replace, 0, -1

    def counted(source: Any, target: Any, **options: Any) -> None:
        nonlocal count
        count += str(target).startswith(str(tmp_path))  # not what verification saves and loads elsewhere
        if count == fails_at and str(target).startswith(str(tmp_path)):
            raise OSError(28, "No space left on device")
        whole(source, target, **options)

    monkeypatch.setattr("os.replace", counted)
    compress(tmp_path / "right")
    right = load_file(tmp_path / "right" / "model.safetensors")
    total = count
    assert total >= 8
    for number in range(1, total + 1):
        folder = tmp_path / str(number)
        count, fails_at = 0, number
        with pytest.raises(OSError, match=rf"{number}/[a-z.]+: .*No space left") as caught:
            compress(folder)
        assert "\n" not in str(caught.value)
        left = list(folder.iterdir()) if folder.exists() else []
        assert not [p for p in left if p.name.startswith((".", "run.lock", "run.owner"))]
        fails_at = -1
        compress(folder, resume=(folder / "config.toml").exists())
        found = load_file(folder / "model.safetensors")
        assert all(torch.equal(found[name], tensor) for name, tensor in right.items())


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_named_before_training(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(OSError, match=r"locked.*(cannot be made|cannot be written)"):
        compress(tmp_path / "locked" / "run")


@pytest.mark.parametrize("step", ["tempfile.mkstemp", "pathlib.Path.mkdir", "os.fsync"])
def test_wherever_a_write_fails_the_file_is_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(step, full)
        said = r"new/small\.safetensors: cannot be written \(No space left on device\); make room there, or choose another .*$"
        with pytest.raises(OSError, match=said) as caught:
            es.save(network(), tmp_path / "new" / "small.safetensors")
    assert caught.value.errno == 28 and not list(tmp_path.iterdir())


def limited(act: Any) -> None:
    """No file may become larger than 3000 bytes: the part of a write that fits is written, and then it fails."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
    try:
        act()
    except OSError as error:
        sys.stdout.write(f"{error}\n")


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
@pytest.mark.parametrize("size", [10, 1000])
def test_a_checkpoint_that_did_not_fit_says_why(tmp_path: Path, size: int) -> None:
    """torch's writer says "unexpected pos" of it."""
    write_checkpoint(tmp_path / "c.pt", {"epoch": 1})
    content = {f"w{n}": torch.zeros(size) for n in range(20)}
    said = forked(lambda: limited(lambda: write_checkpoint(Path("c.pt"), content)), folder=tmp_path).stdout
    assert (
        said
        == "c.pt: cannot be written (File too large); make room there, or choose another place; what was there is untouched\n"
    )
    assert read_checkpoint(tmp_path / "c.pt")["epoch"] == 1 and os.listdir(tmp_path) == ["c.pt"]


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_lines_are_added_whole_or_not_at_all(tmp_path: Path) -> None:
    journal, whole = tmp_path / "journal", b"x" * 2000 + b"\n"
    journal.write_bytes(whole + b"half")  # a program was killed there
    said = forked(lambda: limited(lambda: append_lines(Path("journal"), whole)), folder=tmp_path).stdout
    assert said.startswith("journal: cannot be written (File too large); make room")
    assert journal.read_bytes() == whole
    append_lines(journal, b"next\n")
    assert journal.read_bytes() == whole + b"next\n"


def test_half_a_checkpoint_of_a_killed_program_is_cleared_away(tmp_path: Path) -> None:
    """Every kill would leave one, of the network's size, until the disk is full."""

    def killed(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def act() -> None:
        os.replace = killed  # type: ignore[assignment]
        write_checkpoint(Path("checkpoint.pt"), {"epoch": 1})

    (tmp_path / ".checkpoint.pt.mine").touch()
    forked(act, folder=tmp_path)
    assert len(list(tmp_path.glob(".checkpoint.pt.*"))) == 2
    compress(tmp_path)
    assert [p.name for p in tmp_path.glob(".*")] == [".checkpoint.pt.mine"]


def test_begun_anew_on_a_full_disk_the_old_run_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compress(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with monkeypatch.context() as broken:
        broken.setattr("tempfile.mkstemp", lambda **_: os.open(tmp_path / "no" / "where", os.O_RDONLY))
        with pytest.raises(OSError, match=r"config\.toml: cannot be written"):
            begin_folder(tmp_path, {"recipe": {"epochs": 1}})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_locked_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(self: Any, *_: object) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr("filelock.FileLock._acquire", none)
    with pytest.raises(OSError, match=r"run: cannot be written \(FileSystem .* flock\); choose another place"):
        compress(tmp_path / "run")
    monkeypatch.undo()

    def full(self: Path, *_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(OSError, match=r"run: cannot be written \(No space .*; make room"):
        compress(tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_fifty_runs_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Descriptors, threads, temporary files and the state of torch and Python are as they were."""
    import random
    import signal
    import tempfile
    import warnings

    import numpy as np

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    example = torch.zeros(1, 8)
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))

    def state() -> list[Any]:
        return [
            torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(), torch.get_num_threads(),
            torch.get_default_dtype(), torch.is_grad_enabled(), signal.getsignal(signal.SIGTERM),
            signal.getsignal(signal.SIGALRM), list(warnings.filters), sorted(t.name for t in threading.enumerate()),
            len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0, sorted(os.listdir(tmp_path)),
        ]  # fmt: skip

    es.compress(net, example, budget=es.Budget(macs=0.5), method=es.Magnitude())  # what is made once
    before = state()
    for _ in range(50):
        es.compress(net, example, budget=es.Budget(macs=0.5), method=es.Magnitude(), verify=False)
    until = time.monotonic() + 5
    while state() != before and time.monotonic() < until:
        time.sleep(0.05)  # a thread of the test runner's own comes and goes
    for was, now in zip(before, state(), strict=True):
        assert was == now


def test_two_threads_compress_side_by_side(tmp_path: Path) -> None:
    """Each ends as it does alone. The networks are made before: two threads that draw weights share torch's one generator."""
    alone = compress(tmp_path / "alone").model
    networks = [network() for _ in range(2)]
    found: dict[int, Any] = {}

    def one(number: int) -> None:
        try:
            found[number] = compress(tmp_path / str(number), networks[number]).model.state_dict()
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=one, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        assert not isinstance(found[number], Exception), found[number]
        for name, tensor in alone.state_dict().items():
            assert torch.equal(found[number][name], tensor), name
