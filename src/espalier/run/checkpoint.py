"""Checkpoints: plain tensors and numbers, written beside and renamed, enough to go on bit for bit."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from espalier.graph.watch import first_line
from espalier.seals import DAMAGED, SEAL, seal
from espalier.surgery.files import rebuild, structure, untouched_on_error
from espalier.surgery.writing import write_tensors

FORMAT = "espalier-checkpoint/2"


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` to ``path``; an older checkpoint stays whole until the new one is.

    Raises: ValueError if something in it is not a plain value; OSError if the disk does not take it.
    """
    _check_plain(content, "checkpoint")
    content = {**content, "format": FORMAT}
    content[SEAL] = seal({k: v for k, v in content.items() if k != SEAL})
    write_tensors(path, content)


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what ``write_checkpoint`` wrote, all tensors on the CPU.  Nothing in the file is executed.

    Raises: ValueError if the file is absent, damaged, changed or something else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: there is no checkpoint") from error
    except Exception as error:  # a damaged file makes the reader stumble anywhere
        raise ValueError(f"{path}: not a whole checkpoint ({first_line(error)})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path}: not a checkpoint of a training run (its format is not {FORMAT})")
    written = content.pop(SEAL, None)
    with damage_said(path):
        if written != seal(content):
            raise ValueError(f"{path}: {DAMAGED}")
    return content


ENTRIES: dict[str, tuple[type, ...]] = {
    "epoch": (int,), "step": (int,), "structure": (dict,), "weights": (dict,), "optimizer": (dict,),
    "process": (dict, type(None)), "average": (dict, type(None)),
    "scaler": (dict,), "random": (dict,), "history": (list, tuple), "recipe": (dict,), "setting": (dict,),
}  # fmt: skip
"""What the checkpoint of a training run holds."""


def check_entries(content: dict[str, Any], *, where: str) -> None:
    """Raise ``ValueError`` for an entry that is missing or of another kind."""
    for name, kinds in ENTRIES.items():
        if name not in content or not isinstance(content[name], kinds):
            found = f"{name} is a {type(content[name]).__name__}" if name in content else f"it has no {name}"
            raise ValueError(f"{where}: damaged, the run cannot go on from it: {found}")


@contextmanager
def damage_said(where: str | os.PathLike[str]) -> Iterator[None]:
    """What stumbles inside over entries that are missing or of another kind becomes one ``ValueError`` that names the file."""
    try:
        yield
    except ValueError as error:
        if str(where) in str(error):
            raise
        raise ValueError(f"{where}: {first_line(error)}") from error
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError, RuntimeError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else first_line(error)
        raise ValueError(f"{where}: damaged, the run cannot go on from it: {what}") from error


def rebuild_from_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Give ``model``, the dense one a run began with, the structure and weights of a checkpoint, in place.

    To resume a run of a method: rebuild, start the method on the result, then ``train(...,
    resume=True)``.

    Raises: ValueError if the checkpoint is of another model; ``model`` is as it was then.
    """
    return take_over(model, read_checkpoint(path), where=str(path))


def take_over(model: nn.Module, content: dict[str, Any], *, where: str) -> nn.Module:
    """``rebuild_from_checkpoint`` with what was read from ``where``."""
    with damage_said(where), untouched_on_error(model):
        if not same_structure(model, content):
            rebuild(model, content["structure"])
        put_weights(model, content["weights"], where=where)
    return model


def same_structure(model: nn.Module, content: dict[str, Any]) -> bool:
    """Whether ``model`` already is what the checkpoint holds."""
    return _plain(structure(model)) == _plain(content["structure"])


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, shared ones once."""
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    tensors.update(model.named_buffers())
    return tensors


def put_weights(model: nn.Module, weights: dict[str, Tensor], *, where: str) -> None:
    """Put ``weights`` in, strides included: a copy into another memory format would round differently
    later.

    Raises: ValueError if they are those of another model, before any is changed.
    """
    check_weights(model, weights, where=where)
    for name, tensor in all_tensors(model).items():
        tensor.data = weights[name].to(tensor.device)


def check_weights(model: nn.Module, weights: dict[str, Tensor], *, where: str) -> None:
    """Raises: ValueError if ``weights`` are not those of such a model."""
    own = all_tensors(model)
    if own.keys() != weights.keys():
        odd = sorted(own.keys() ^ weights.keys())
        raise ValueError(f"{where}: its weights are those of another model; they differ in {', '.join(odd[:5])}")
    for name, tensor in own.items():
        if tensor.shape != weights[name].shape or tensor.dtype != weights[name].dtype:
            raise ValueError(
                f"{where}: {name} is {weights[name].dtype} {tuple(weights[name].shape)} there, "
                f"the model's is {tensor.dtype} {tuple(tensor.shape)}"
            )


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """The optimiser's state by parameter name, which outlives a change of the parameters' order."""
    return {
        name: dict(optimizer.state[parameter])
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
    }


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, dict[str, Any]]) -> None:
    """Inverse of ``optimizer_state``.  Step counters stay where the optimiser keeps them, on the CPU."""
    parameters = dict(model.named_parameters())
    for name, entries in state.items():
        parameter = parameters[name]
        optimizer.state[parameter] = {
            key: value.to(parameter.device)
            if isinstance(value, Tensor) and value.shape == parameter.shape and key != "step"
            else value
            for key, value in entries.items()
        }


def fingerprint(model: nn.Module | None) -> str | None:
    """A hash of all weights, to tell whether two runs start from, or learn from, the same network."""
    if model is None:
        return None
    digest = hashlib.sha256()
    for name, tensor in all_tensors(model).items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


# -- random numbers ------------------------------------------------------------------------------------------


def random_state(device: torch.device) -> dict[str, Any]:
    """Where torch, numpy and Python stand in their streams, as tensors and numbers."""
    numpy_state = np.random.get_state(legacy=False)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": random.getstate(),
        "numpy": {
            "key": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
    }


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Inverse of ``random_state``."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    saved = state["numpy"]
    key = saved["key"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, saved["pos"], saved["has_gauss"], saved["gauss"]))


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch on the CPU and on ``device``, numpy and Python inside; the caller's streams go on afterwards as
    if nothing had been drawn."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(
            seed
        )  # torch.manual_seed would seed every GPU, and the others' streams be lost
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        elif device.type != "cpu":
            torch.get_device_module(device).manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


def _check_plain(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, (str, int)):
                raise ValueError(f"{where}: the key {key!r} is neither a string nor a whole number")
            _check_plain(item, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            _check_plain(item, f"{where}[{number}]")
    elif type(value) not in (Tensor, nn.Parameter, int, float, bool, str, type(None)):
        raise ValueError(
            f"{where} is a {type(value).__name__}; a state_dict holds tensors, numbers, strings, lists and dictionaries"
        )
