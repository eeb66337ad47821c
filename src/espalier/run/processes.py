"""Several processes that train one network together: how they are started, and what of the data each of them gets."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DistributedSampler

from espalier.methods.agreement import Share, once, share
from espalier.optional import import_fabric
from espalier.run.batches import Source
from espalier.run.data import Data, FolderData
from espalier.run.evaluate import judged
from espalier.run.lock import owned
from espalier.run.recipe import Recipe
from espalier.tasks import Summed, Task, image_count

TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what it sets for every process that it starts


def join(recipe: Recipe) -> Share:
    """Make this process one of those that the recipe asks for, or that torchrun has started; which one it is.

    Without torchrun Lightning Fabric starts the others: on this machine with the same command, under SLURM those of ``srun``.
    GPUs are shared out in order.  Joined already, or alone, it does nothing.

    Raises: ValueError if another number was started than asked for, or there are too few GPUs; MissingPackage without
    Lightning.
    """
    asked = (recipe.devices or 1) * recipe.nodes
    if not dist.is_available() or not dist.is_initialized():
        if all(name in os.environ for name in TORCHRUN):
            _join_torchrun(recipe)
        elif asked > 1:
            _start(recipe)
    found = share()
    if recipe.devices is not None and asked != found.world:
        raise ValueError(
            f"Recipe(devices={recipe.devices}, nodes={recipe.nodes}) asks for {asked} processes, and there are {found.world}; "
            "leave both out where torchrun starts them"
        )
    return found


def _on_gpus(recipe: Recipe) -> bool:
    return torch.cuda.is_available() and (recipe.device == "auto" or recipe.device.startswith("cuda"))


def _join_torchrun(recipe: Recipe) -> None:
    if int(os.environ["WORLD_SIZE"]) == 1:
        return
    if _on_gpus(recipe):
        local, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= there:
            raise ValueError(f"process {local} of this machine has no GPU, there are {there}; start no more processes")
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if _on_gpus(recipe) else "gloo")
    atexit.register(_leave)


def _start(recipe: Recipe) -> None:
    fabric = import_fabric().Fabric(
        accelerator="cuda" if _on_gpus(recipe) else "cpu",
        devices=recipe.devices or 1,
        num_nodes=recipe.nodes,
        strategy=recipe.strategy,
    )
    fabric.launch()
    if fabric.device.type == "cuda":
        torch.cuda.set_device(fabric.device)


def is_lost_process(error: BaseException) -> bool:
    """Whether ``error`` is that of a message to a process that is no longer there."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    return isinstance(error, dist.DistBackendError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def held(folder: Path | None) -> Iterator[None]:
    """``owned(folder)`` by the first process, for all."""
    with ExitStack() as stack:
        if folder is not None:
            once(lambda: stack.enter_context(owned(folder)))
        yield


# -- data


def part_of(source: Source, own: Share) -> Source:
    """This process's part of data that can be read in parts, so that no other is loaded."""
    if own.world == 1 or not isinstance(source, (Data, FolderData)):
        return source
    mine: Any = source.test[own.rank :: own.world]
    return replace(source, share=own, test=mine)


def is_shared(source: Source) -> bool:
    """Whether the training loader itself gives every process other images."""
    return isinstance(getattr(getattr(source, "train", None), "sampler", None), DistributedSampler)


def shares(source: Source, task: Task, own: Share, **how: Any) -> Iterator[tuple[Any, Any, float]]:
    """``source.train_batches(**how)``: inputs and targets of this process, and what their mean counts among all.

    All processes together see the batches that one alone would see: of every batch each takes its rows.  A loader with a
    ``DistributedSampler`` is taken to give every process its own.
    """
    if is_shared(source):
        source.train.sampler.set_epoch(how["epoch"])  # type: ignore[attr-defined]
    whole = own.world == 1 or is_shared(source)
    part = part_of(source, own)
    for batch in part.train_batches(**how):
        inputs, targets = task.split(batch)
        if whole:
            yield inputs, targets, 1.0
        elif isinstance(source, (Data, FolderData)):
            yield inputs, targets, own.weight(min(how["batch_size"], len(source.train)))
        else:
            count = image_count(inputs)
            rows = own.rows(count)
            yield _rows(inputs, count, rows), _rows(targets, count, rows), own.weight(count)


def _rows(value: Any, count: int, rows: slice) -> Any:
    """Of every list and tensor that has one entry for each of ``count`` images, those of ``rows``."""
    if isinstance(value, (torch.Tensor, list)) and not (isinstance(value, torch.Tensor) and value.dim() == 0):
        return value[rows] if len(value) == count else value
    if isinstance(value, dict):
        return {name: _rows(v, count, rows) for name, v in value.items()}
    return tuple(_rows(v, count, rows) for v in value) if isinstance(value, tuple) else value


def tested(
    model: nn.Module, source: Source, own: Share, *, device: torch.device, task: Task, channels_last: bool
) -> tuple[dict[str, float], int]:
    """``evaluate`` on the test images, and their number; every process takes its share if the metric can be put together."""
    meter = task.meter()
    joint = own.world > 1 and isinstance(meter, (Summed, nn.Module))
    part = part_of(source, own) if joint else source
    batches = part.test_batches(channels_last=channels_last)
    if joint and part is source:
        batches = islice(batches, own.rank, None, own.world)
    return judged(model, batches, device=device, task=task, joint=joint)
