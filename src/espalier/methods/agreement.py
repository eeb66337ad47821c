"""What processes that train one network together agree on: weights, gradients, scores and decisions.

Every process holds the whole network and sees its share of every batch.  Gradients and scores are averaged over the processes,
so that all that follows from them is equal everywhere by construction; hashes are compared at every event, at once
(``check_same``) or with the next gradients (``check_soon``).  A step is one message where it can be: at every message all wait
for the slowest.  What does not follow from averages alone, because a clock or a search is asked, the first process decides and
sends (``once``).

The group is torch.distributed's; without one, or alone in it, every function here leaves things as they are.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from espalier.copies import check_free

if TYPE_CHECKING:
    from espalier.methods.base import Run

T = TypeVar("T")

_alone: ContextVar[bool] = ContextVar("alone", default=False)  # while the first process does something for all


@dataclass(frozen=True)
class Share:
    """What this process has of every batch: of ``n`` rows those from ``n * rank // world`` to ``n * (rank + 1) // world``."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes, logs and decides."""
        return self.rank == 0

    def rows(self, count: int) -> slice:
        """Raises: ValueError where a process would have none."""
        if count < self.world:
            raise ValueError(f"a batch of {count} cannot be shared by {self.world} processes; give larger batches")
        return slice(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def among(self, count: int, steps: int) -> np.ndarray:
        """Its places among ``count`` images that make ``steps`` batches, in order."""
        size = count // steps
        return np.arange(steps * size).reshape(steps, size)[:, self.rows(size)].reshape(-1)

    def weight(self, count: int) -> float:
        """Of a mean over its rows of ``count``, when means are averaged over the processes; 1 where all have equally many."""
        rows = self.rows(count)
        return (rows.stop - rows.start) * self.world / count


ALONE = Share()  # of one process alone


def share() -> Share:
    """Which of how many processes this one is."""
    together = dist.is_available() and dist.is_initialized() and not _alone.get()
    return Share(dist.get_rank(), dist.get_world_size()) if together else ALONE


# -- decisions


def once(act: Callable[[], T]) -> T:
    """What ``act`` returns, called in the first process and sent to all; what it raises is raised in all of them."""
    own = share()
    if own.world == 1:
        return act()
    box: list[Any] = [None, None]
    token = _alone.set(True)
    try:
        if own.first:
            box[0] = act()
    except Exception as error:
        box[1] = error
    finally:
        _alone.reset(token)
    sent = [box[0], _as_sent(box[1])]
    dist.broadcast_object_list(sent, src=0, group=_host())
    failed = box[1] or sent[1]
    if failed is not None:
        raise failed
    return box[0] if own.first else sent[0]  # type: ignore[no-any-return]


def _as_sent(error: Exception | None) -> Exception | None:
    """One that cannot be pickled as what it says."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return ValueError(f"process 0: {error}")


def check_same(what: str, value: str | bytes) -> None:
    """With all that waits since ``check_soon``.

    Raises: ValueError in every process, naming those where ``value`` is not what it is in the first.
    """
    own = share()
    if own.world == 1:
        return
    _waiting.append((what, value.encode() if isinstance(value, str) else value))
    mine, names = _fingerprint(), " or ".join(dict(_waiting))
    _waiting.clear()
    found = [torch.empty_like(mine) for _ in range(own.world)]
    dist.all_gather(found, mine, group=_host())
    odd = [str(rank) for rank, other in enumerate(found) if not torch.equal(other, found[0])]
    if odd:
        raise ValueError(
            f"{names} of process {', '.join(odd)} is not that of process 0: processes that train together are given the same "
            "network, data, method and seeds, and run on processors of one kind"
        )


_waiting: list[tuple[str, bytes]] = []  # what is compared with the next message


def check_soon(what: str, value: bytes, device: torch.device) -> None:
    """``check_same`` with the next gradients or the next check; at once where reading the answer waits for ``device``."""
    if device.type != "cpu":
        check_same(what, value)
    elif share().world > 1:
        _waiting.append((what, value))


def _fingerprint() -> Tensor:
    """Of what waits, as numbers that a mean leaves as they are only where all are equal: bytes and their squares."""
    digest = hashlib.sha256()
    for what, value in _waiting:
        digest.update(f"{what} {len(value)} ".encode() + value)
    found = torch.tensor(list(digest.digest()[:8]), dtype=torch.float32)
    return torch.cat([found, found.square()])


def check_run(run: Run) -> None:
    """Plan and weights of a run are the same in every process, as they must be after an event.  Raises: ValueError."""
    if share().world > 1:
        check_same("the plan", run.plan.to_json())
        norms = torch.stack([n.double() for n in torch._foreach_norm([p.detach() for p in run.model.parameters()])])
        check_same("the network", norms.cpu().numpy().tobytes())


def anywhere(flag: bool) -> bool:
    """Whether it is set in any process."""
    if share().world == 1:
        return flag
    found = torch.tensor([float(flag)])
    dist.all_reduce(found, group=_host())
    return bool(found > 0)


def total(*numbers: float) -> list[float]:
    """Each summed over the processes."""
    found = torch.tensor(numbers, dtype=torch.float64)
    if share().world > 1:
        dist.all_reduce(found, group=_host())
    return [float(number) for number in found]


def gathered(value: T) -> list[T]:
    """Everybody's, by rank."""
    own = share()
    found: list[Any] = [value]
    if own.world > 1:
        found = [None] * own.world
        dist.all_gather_object(found, value, group=_host())
    return found


# -- tensors


def average_(tensor: Tensor) -> Tensor:
    """``tensor``, which becomes its mean over the processes."""
    world = share().world
    if world > 1:
        dist.all_reduce(tensor, group=_group_of(tensor))
        tensor.div_(world)
    return tensor


@torch.no_grad()
def average_gradients(model: nn.Module) -> None:
    """Make every gradient the mean over the processes; between ``backward()`` and the optimiser's step, in every process.

    In a loop of one's own it takes the place of DistributedDataParallel: there is no wrapper that a surgery could leave behind.

    Raises: ValueError for a model inside a wrapper that averages by itself.
    """
    check_free(model, who="average_gradients")
    reduce_gradients(model, ())


@torch.no_grad()
def reduce_gradients(model: nn.Module, more: Sequence[float], *, weight: float = 1.0) -> Tensor:
    """``average_gradients`` of gradients that count ``weight``, means of the numbers ``more``, and what is to be checked."""
    own = share()
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device if parameters else torch.device("cpu")
    numbers = torch.tensor(more, dtype=torch.float32, device=device)
    if own.world == 1:
        return numbers
    mine = _fingerprint() if device.type == "cpu" else torch.empty(0, device=device)
    absent = [p.grad is None for p in parameters]
    there = 1.0 - torch.tensor(absent, dtype=torch.float32).to(device, non_blocking=True)
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    heads = [numbers, mine, there]
    flat = torch.cat([*heads, *(part.reshape(-1) for part in parts)])
    sizes = [*map(len, heads), len(flat) - sum(map(len, heads))]
    if weight != 1.0:
        flat[-sizes[-1] :].mul_(weight)
    average_(flat)
    numbers, same, seen, rest = flat.split(sizes)
    if mine.device.type == "cpu" and not torch.equal(same.float(), mine):  # in all of them
        check_same(*(_waiting.pop() if _waiting else ("a decision", b"")))
    _waiting.clear()
    means = [
        part.view(p.shape) for part, p in zip(rest.split([p.numel() for p in parameters]), parameters, strict=True)
    ]
    if any(absent):  # a parameter that no process used has no gradient, and the optimiser leaves it alone
        for parameter, used in zip(parameters, seen.tolist(), strict=True):
            if parameter.grad is None and used:
                parameter.grad = torch.empty_like(parameter)
    pairs = [(p.grad, mean) for p, mean in zip(parameters, means, strict=True) if p.grad is not None]
    if pairs:
        torch._foreach_copy_([g for g, _ in pairs], [m for _, m in pairs])
    return numbers


@torch.no_grad()
def average_statistics(model: nn.Module) -> None:
    """Running means and variances become their means over the processes, other floating buffers those of the first."""
    if share().world == 1:
        return
    norms = {id(b) for m in model.modules() if isinstance(m, _NormBase) for b in m.buffers(recurse=False)}
    buffers = [b for b in model.buffers() if b.is_floating_point()]
    _as_one([b for b in buffers if id(b) in norms], average_)
    _as_one([b for b in buffers if id(b) not in norms], _from_first)


@torch.no_grad()
def take_from_first(model: nn.Module) -> None:
    """All weights and buffers of the first process."""
    if share().world > 1:
        shapes = {n: (tuple(t.shape), str(t.dtype)) for n, t in model.state_dict().items()}
        check_same("the structure of the network", repr(shapes))
        _as_one([*model.parameters(), *model.buffers()], _from_first)


def _from_first(tensor: Tensor) -> Tensor:
    dist.broadcast(tensor, src=0, group=_group_of(tensor))
    return tensor


def _as_one(tensors: Iterable[Tensor], change: Callable[[Tensor], Tensor]) -> None:
    """``change`` all tensors of a type in one message."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for alike in kinds.values():
        flat = change(torch.cat([t.detach().reshape(-1) for t in alike]))
        for tensor, part in zip(alike, flat.split([t.numel() for t in alike]), strict=True):
            tensor.copy_(part.view(tensor.shape))


# -- groups

_hosts: dict[int, Any] = {}  # by the group that it stands beside
PATIENCE = timedelta(days=1)  # that the first process may search; one that is gone is noticed at once


def _host() -> Any:
    """A group of all processes that sends what is on the host, and makes no device wait."""
    world = dist.group.WORLD
    if "gloo" in str(dist.get_backend_config()):
        return world
    if id(world) not in _hosts:
        _hosts[id(world)] = dist.new_group(backend="gloo", timeout=PATIENCE)
    return _hosts[id(world)]


def _group_of(tensor: Tensor) -> Any:
    return _host() if tensor.device.type == "cpu" else dist.group.WORLD
