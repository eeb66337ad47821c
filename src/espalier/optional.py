"""Optional packages, imported where they are needed and named with their extra where they are absent."""

import importlib
import sys
from contextlib import suppress
from types import ModuleType

import torch


class MissingPackage(ImportError, ValueError):
    """An optional package is not installed; the message names the extra that brings it."""


# A library fragment undoes its declarations when it is collected, so it stays referenced here.
_fragments: list[torch.library.Library] = []


def import_optional(module: str, *, extra: str) -> ModuleType:
    """Import ``module`` or say which extra of espalier installs it.

    Raises: MissingPackage (an ImportError and a ValueError) if the module's package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise  # the package is there, and something inside it is broken: its own message says more
        raise MissingPackage(
            f"this needs the package {module.split('.')[0]}, which is not installed; it comes with the extra '{extra}': "
            f"pip install '.[{extra}]' in a clone of Espalier"
        ) from error


def import_torchvision() -> ModuleType:
    """Import torchvision, also where its build and torch's do not match.

    PyPI's torchvision is compiled against CUDA torch. Beside a CPU build of torch its operators fail to load
    and the import stops at the first one it refers to. Models, transforms and data sets need none of them, so
    the two operators are declared, without an implementation, and the import is repeated.

    Raises: MissingPackage if torchvision is not installed.
    """
    try:
        return import_optional("torchvision", extra="models")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    fragment = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        fragment.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _fragments.append(fragment)
    return import_optional("torchvision", extra="models")


def import_timm() -> ModuleType:
    """Import timm, which itself imports torchvision and so needs the same care.

    Raises: MissingPackage if timm or torchvision is not installed.
    """
    import_torchvision()
    return import_optional("timm", extra="models")


def import_fabric() -> ModuleType:
    """Import Lightning Fabric.  Raises: MissingPackage if neither ``lightning`` nor ``lightning_fabric`` is installed."""
    return _lightning("lightning.fabric", "lightning_fabric")


def import_transformers() -> ModuleType:
    """Import transformers, which itself imports torchvision where that is installed, and needs the same care.

    Raises: MissingPackage if it, or accelerate, without which its Trainer does not run, is not installed.
    """
    with suppress(MissingPackage):
        import_torchvision()
    for name in ("accelerate", "transformers"):
        found = import_optional(name, extra="huggingface")
    return found


def import_lightning() -> ModuleType:
    """Import Lightning's training package, which itself imports torchvision where that is installed, and needs the same care.

    Raises: MissingPackage if neither ``lightning`` nor ``pytorch_lightning`` is installed.
    """
    return _lightning("lightning.pytorch", "pytorch_lightning")


def _lightning(*names: str) -> ModuleType:
    """The first of ``names`` that is installed."""
    with suppress(MissingPackage):
        import_torchvision()
    for name in names:
        with suppress(MissingPackage):
            return import_optional(name, extra="lightning")
    raise MissingPackage("this needs the package lightning, which is not installed: pip install lightning")
