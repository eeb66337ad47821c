"""Real data for the tests that want it: given by the environment, or packed beside the repository."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.steps import measure_nothing
from tests.waits import copied  # noqa: F401

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


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without their slow last part, export and timing: what is tested comes before."""
    measure_nothing(monkeypatch)
