"""Real data for the tests that want it: given by the environment, or packed beside the repository.

PyTorch is imported inside fixtures: the process that hands out the tests reads this file too, and needs none.
"""

import functools
import gc
import importlib
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKED = REPOSITORY.parent / "shared" / "data"


@pytest.fixture(scope="session")
def cifar_dir(request: pytest.FixtureRequest) -> Path:
    """The folder that holds ``cifar-10-batches-py``; unpacked once into pytest's cache where it is packed."""
    given = os.environ.get("ESPALIER_DATA_DIR")
    if given and (Path(given) / "cifar-10-batches-py").is_dir():
        return Path(given)
    if not (PACKED / "unpack.py").is_file():
        pytest.skip("CIFAR-10 is absent: set ESPALIER_DATA_DIR to the folder that holds cifar-10-batches-py")
    cache = request.config.cache.mkdir("espalier")
    target = cache / "cifar"
    if not target.is_dir():
        beside = cache / f"cifar-{os.getpid()}"
        subprocess.run([sys.executable, PACKED / "unpack.py", beside], check=True, capture_output=True)
        try:
            beside.rename(target)  # another worker may have been faster
        except OSError:
            shutil.rmtree(beside)
    return target


@pytest.fixture(scope="session")
def weights_dir() -> Path:
    """The folder of published CIFAR weights (``resnet20-12fca82f.th`` and its like)."""
    given = os.environ.get("ESPALIER_DATA_DIR")
    for folder in [*([Path(given) / "weights"] if given else []), PACKED / "weights"]:
        if folder.is_dir():
            return folder
    pytest.skip("the published weights are absent: put them into ESPALIER_DATA_DIR/weights")


@pytest.fixture(autouse=True, scope="session")
def translations_read_once() -> None:
    """PyTorch's exporters read what operations there are, and how ONNX has them, anew for every file, which takes seconds."""
    import torch

    export = torch.onnx.export

    def first_export(*arguments: Any, **options: Any) -> Any:
        torch.onnx.export = export
        registry = importlib.import_module("torch.onnx._internal.exporter._registration").ONNXRegistry
        registry.from_torchlib = staticmethod(functools.cache(registry.from_torchlib))
        utils = importlib.import_module("torch._export.utils")
        utils._materialize_cpp_cia_ops = functools.cache(utils._materialize_cpp_cia_ops)
        return export(*arguments, **options)

    torch.onnx.export = first_export


@pytest.fixture(autouse=True, scope="session")
def imports_left_alone() -> None:
    """PyTorch brings a million objects that stay: each full collection of garbage would look through them, for 0.3 seconds."""

    def leave(phase: str, found: dict[str, int]) -> None:
        if phase == "stop" and found["generation"] == 2 and len(gc.get_objects()) > 100_000:
            gc.freeze()

    gc.callbacks.append(leave)


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts copies between host and device."""
    from tests.waits import count_copies

    return count_copies(monkeypatch)


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without their slow last part, export and timing: what is tested comes before."""
    from tests.steps import measure_nothing

    measure_nothing(monkeypatch)
