"""CIFAR-10 and CIFAR-100 from the folders that torchvision uses, read without trusting a pickle.

Source: Alex Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
"""

import hashlib
import importlib
import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from espalier.optional import import_torchvision


@dataclass(frozen=True)
class CifarLayout:
    """Folder, files with their published MD5 sums, and where the labels are."""

    folder: str
    train: dict[str, str]
    test: dict[str, str]
    labels: str
    num_classes: int
    torchvision: str


LAYOUTS = {
    "cifar10": CifarLayout(
        folder="cifar-10-batches-py",
        train={
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        },
        test={"test_batch": "40351d587109b95175f43aff81a1287e"},
        labels="labels",
        num_classes=10,
        torchvision="CIFAR10",
    ),
    "cifar100": CifarLayout(
        folder="cifar-100-python",
        train={"train": "16019d7e3df5f24257cddd939b257f8d"},
        test={"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
        labels="fine_labels",
        num_classes=100,
        torchvision="CIFAR100",
    ),
}

Arrays = tuple[np.ndarray, np.ndarray]


def read_cifar(name: str, data_dir: Path, *, download: bool) -> tuple[Arrays, Arrays]:
    """Train and test as uint8 images ``(n, 3, 32, 32)`` and int64 labels ``(n,)``.

    ``data_dir`` is the folder that holds ``cifar-10-batches-py`` or ``cifar-100-python``, or that folder
    itself.

    Raises: ValueError if the folder or a file is absent, if a file is not the published one (truncated,
    damaged), or if a download fails.
    """
    layout = LAYOUTS[name]
    folder = data_dir if data_dir.name == layout.folder else data_dir / layout.folder
    if download:
        _download(layout, folder.parent)
    if not folder.is_dir():
        raise ValueError(
            f"{name} is not in {data_dir}: expected the folder {folder}; name its parent with data_dir "
            "(--data-dir), or let it be fetched with download=True (--download)"
        )
    return _read_split(folder, layout.train, layout.labels), _read_split(folder, layout.test, layout.labels)


def _download(layout: CifarLayout, root: Path) -> None:
    import_torchvision()
    datasets = importlib.import_module("torchvision.datasets")
    try:
        getattr(datasets, layout.torchvision)(root, download=True)  # checks what is there, fetches what is not
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{layout.torchvision} could not be downloaded into {root}: {error}") from error


def _read_split(folder: Path, files: dict[str, str], labels: str) -> Arrays:
    batches = [_read_batch(folder / name, md5) for name, md5 in files.items()]
    images = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
    return images, np.concatenate([np.asarray(batch[labels], dtype=np.int64) for batch in batches])


def _read_batch(path: Path, md5: str) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} is missing; unpack the archive again, or use download=True (--download)")
    content = path.read_bytes()
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise ValueError(
            f"{path} is not the published file: {len(content)} bytes with MD5 {found} instead of {md5}; it "
            "is truncated or damaged; remove it and unpack the archive again, or use download=True"
        )
    return _ArraysOnly(io.BytesIO(content), encoding="latin1").load()


class _ArraysOnly(pickle.Unpickler):
    """Unpickles arrays, numbers, strings, lists and dictionaries; anything else could execute code."""

    def find_class(self, module: str, name: str) -> Any:
        rebuild = np.zeros(0).__reduce__()[0]  # its module is called numpy.core or numpy._core, by version
        known = {
            ("numpy.core.multiarray", "_reconstruct"): rebuild,
            ("numpy._core.multiarray", "_reconstruct"): rebuild,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"a data file has no business with {module}.{name}")
        return known[module, name]
