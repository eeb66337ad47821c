"""A program in a process of its own, without importing PyTorch anew, which takes seconds."""

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch

COME_LATE = ("torch._dynamo", "sklearn.datasets")
"""What a first optimiser and the digits import, in three and in six seconds: here, or every copy would do so anew."""


def forked(act: Callable[[], Any], *, folder: Path) -> subprocess.CompletedProcess[str]:
    """Call ``act`` in a copy of this process whose current folder is ``folder``: its exit code and what it printed."""
    for package in COME_LATE:
        importlib.import_module(package)
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        child = multiprocessing.get_context("fork").Process(target=_inside, args=(act, folder, stdout, stderr))
        child.start()
        child.join(600)
        if child.exitcode is None:
            child.kill()
            child.join()
        said = []
        for file in (stdout, stderr):
            file.seek(0)
            said.append(file.read())
    assert child.exitcode is not None
    return subprocess.CompletedProcess([], child.exitcode, *said)


def _inside(act: Callable[[], Any], folder: Path, stdout: TextIO, stderr: TextIO) -> None:
    sys.stdout, sys.stderr = stdout, stderr
    os.chdir(folder)
    torch.set_num_threads(1)  # a pool of threads does not live through a fork
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as a program has it that a shell starts
    act()
