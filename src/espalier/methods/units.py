"""Units on tensors: from per-channel numbers of every layer to one vector over all units of a graph, and back.

A unit acts on the network only through its *consumers*, the convolutions and linear layers that read it.  Shrinking the
consumers' columns to zero removes it exactly: no bias or BatchNorm shift of the producer survives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from torch import Tensor, nn

from espalier.copies import named_tensors
from espalier.graph import Graph, Slice

_PIECE = 1 << 20  # elements that are squared at a time


@dataclass(frozen=True)
class Columns:
    """One dimension of one parameter and the unit that owns each position; ``owner`` is ``Units.count`` where none does."""

    tensor: str
    dim: int
    parameter: nn.Parameter
    owner: Tensor  # int64, (size of dim,)

    def per_position(self, values: Tensor) -> Tensor:
        """Sum a tensor shaped like the parameter over everything but ``dim``; shape ``(size of dim,)``, float32."""
        others = [d for d in range(values.ndim) if d != self.dim]
        return (
            values.sum(others, dtype=torch.float32) if others else values.float()
        )  # no dimensions would mean all of them

    def energy(self) -> Tensor:
        """Sum of squares per position, like ``per_position``; rows by rows, so that no large copy is made of the squares."""
        weight = self.parameter.detach()
        if weight.numel() <= _PIECE:
            return self.per_position(weight.square())
        rows = weight.split(max(1, _PIECE * len(weight) // weight.numel()))
        parts = (self.per_position(piece.square()) for piece in rows)
        return torch.cat(list(parts)) if self.dim == 0 else reduce(torch.Tensor.add_, parts)

    def shaped(self, per_position: Tensor) -> Tensor:
        """Values per position, to be broadcast against the parameter."""
        shape = [1] * self.parameter.ndim
        shape[self.dim] = -1
        return per_position.view(shape)


@dataclass(frozen=True)
class Taps:
    """The kernel positions of one convolution: a unit owns its position in all filters, ``weight[:, :, i, j]``."""

    tensor: str
    parameter: nn.Parameter  # (out, in, kh, kw)
    owner: Tensor  # int64, (kh * kw,)

    def per_position(self, values: Tensor) -> Tensor:
        """Sum a tensor shaped like the parameter over all filters and inputs; shape ``(kh * kw,)``, float32."""
        return values.sum((0, 1), dtype=torch.float32).reshape(-1)

    def energy(self) -> Tensor:
        """Sum of squares per position, like ``per_position``."""
        return self.per_position(self.parameter.detach().square())

    def shaped(self, per_position: Tensor) -> Tensor:
        """Values per position, to be broadcast against the parameter."""
        return per_position.view(1, 1, *self.parameter.shape[2:])


@dataclass(frozen=True)
class Stripes:
    """The kernel positions of every filter of one convolution: a unit owns ``weight[o, :, i, j]``."""

    tensor: str
    parameter: nn.Parameter  # (out, in, kh, kw)
    owner: Tensor  # int64, (out * kh * kw,)

    def per_position(self, values: Tensor) -> Tensor:
        """Sum a tensor shaped like the parameter over all inputs; shape ``(out * kh * kw,)``, float32."""
        return values.sum(1, dtype=torch.float32).reshape(-1)

    def energy(self) -> Tensor:
        """Sum of squares per position, like ``per_position``."""
        return self.per_position(self.parameter.detach().square())

    def shaped(self, per_position: Tensor) -> Tensor:
        """Values per position, to be broadcast against the parameter."""
        return per_position.view(self.parameter.shape[0], 1, *self.parameter.shape[2:])


@dataclass(frozen=True)
class Whole:
    """A parameter that a unit owns with all its elements: what silences a residual block."""

    tensor: str
    parameter: nn.Parameter
    owner: Tensor  # int64, (1,)

    def per_position(self, values: Tensor) -> Tensor:
        """Sum over everything; shape ``(1,)``, float32."""
        return values.sum(dtype=torch.float32).reshape(1)

    def energy(self) -> Tensor:
        """Sum of squares, like ``per_position``."""
        return self.per_position(self.parameter.detach().square())

    def shaped(self, per_position: Tensor) -> Tensor:
        """The value, to be broadcast against the parameter."""
        return per_position.view([1] * self.parameter.ndim)


Consumer = Columns | Taps | Stripes | Whole


class Units:
    """All units of a graph in one row, group after group, tied to the parameters of one model.

    Behind them come the kernel positions of the convolutions named in ``taps``, layer after layer, row by row, and behind
    those the stripes of the convolutions named in ``stripes``, filter by filter.  Of a block that may be left out
    (``graph.blocks``) the second unit owns what silences it, and the first one nothing.
    """

    def __init__(
        self, model: nn.Module, graph: Graph, *, taps: Sequence[str] = (), stripes: Sequence[str] = ()
    ) -> None:
        self.graph = graph
        parameters, _ = named_tensors(model)
        weights = [parameters[f"{name}.weight"] for name in (*taps, *stripes)]
        owned = [w.shape[2:].numel() * (w.shape[0] if i >= len(taps) else 1) for i, w in enumerate(weights)]
        self.groups = len(graph.groups) + len(owned)
        self.sizes = np.concatenate([graph.sizes, np.array(owned, dtype=np.int64)])
        self.offsets = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)
        self.count = int(self.offsets[-1])
        rows = [slice(*self.offsets[len(graph.groups) + i :][:2].tolist()) for i in range(len(owned))]
        self.taps = dict(zip(taps, rows[: len(taps)], strict=True))
        self.stripes = dict(zip(stripes, rows[len(taps) :], strict=True))
        first = next(iter(parameters.values()), None)
        self.device = torch.device("cpu") if first is None else first.device
        reads = self._owners(lambda s: s.consumed)
        makes = self._owners(lambda s: not s.consumed and s.tensor in parameters)
        silencers = [(n, self.offsets[graph.index[b.group]] + 1) for b in graph.blocks for n in b.silent]
        self.read = [*reads.values(), *(np.arange(own.start, own.stop) for own in rows)]  # owners, on the host
        self.read += [np.array([unit]) for _, unit in silencers]
        every = [*self.read, *makes.values()]
        row = upload(np.concatenate(every) if every else np.zeros(0, dtype=np.int64), self.device)
        owners = iter(row.split([len(o) for o in every]))
        self.consumers: list[Consumer] = [Columns(t, d, parameters[t], next(owners)) for t, d in reads]
        for name, weight in zip((*taps, *stripes), weights, strict=True):
            kind = Taps if name in self.taps else Stripes
            self.consumers.append(kind(f"{name}.weight", weight, next(owners)))
        self.consumers += [Whole(name, parameters[name], next(owners)) for name, _ in silencers]
        self.producers = [Columns(t, d, parameters[t], next(owners)) for t, d in makes]
        self._read = row[: sum(map(len, self.read))]
        self._together = self._by_size()

    def _by_size(self) -> list[list[int]]:
        """Numbers of consumers whose parameters are squared in one go: up to ``_PIECE`` elements, or one that is larger."""
        readers: dict[str, list[int]] = {}
        for number, columns in enumerate(self.consumers):
            readers.setdefault(columns.tensor, []).append(number)
        found: list[list[int]] = []
        room = -1
        for numbers in readers.values():
            size = self.consumers[numbers[0]].parameter.numel()
            if size > room:
                found.append([])
                room = _PIECE
            found[-1] += numbers
            room -= size
        return found

    def _owners(self, wanted: Callable[[Slice], bool]) -> dict[tuple[str, int], np.ndarray]:
        owners: dict[tuple[str, int], np.ndarray] = {}
        for number, group in enumerate(self.graph.groups):
            unit = np.arange(self.offsets[number], self.offsets[number] + group.size)[:, None]
            for s in group.slices:
                if wanted(s):
                    key = (s.tensor, s.dim)
                    if key not in owners:
                        owners[key] = np.full(self.graph.shapes[s.tensor][s.dim], self.count, dtype=np.int64)
                    owners[key][s.index] = unit
        return owners

    def sum(self, parts: Iterable[tuple[Consumer, Tensor]]) -> Tensor:
        """Add per-position values of several columns up per unit; shape ``(count,)``."""
        total = torch.zeros(self.count + 1, device=self.device)
        every = list(parts)
        if every:
            owners = torch.cat([columns.owner for columns, _ in every])
            total.index_add_(0, owners, torch.cat([values.float() for _, values in every]))
        return total[: self.count]

    def consumer_energy(self) -> Tensor:
        """Squared norm of everything that reads a unit; shape ``(count,)``."""
        parts: dict[int, Tensor] = {}
        total = torch.zeros(self.count + 1, device=self.device)
        if not self.consumers:
            return total[: self.count]
        with torch.no_grad():
            for numbers in self._together:
                some = {n: self.consumers[n] for n in numbers}
                weights = {c.tensor: c.parameter for c in some.values()}
                if any(w.numel() > _PIECE for w in weights.values()):
                    parts.update({n: c.energy() for n, c in some.items()})
                    continue
                squares = torch._foreach_mul([*weights.values()], [*weights.values()])
                squared = dict(zip(weights, squares, strict=True))
                parts.update({n: c.per_position(squared[c.tensor]) for n, c in some.items()})
            total.index_add_(0, self._read, torch.cat([parts[n] for n in range(len(parts))]))
        return total[: self.count]

    def by_group(self, values: Tensor) -> dict[str, np.ndarray]:
        """Cut one vector over all units into one array per group, as ``solve`` takes it."""
        return self.split(values.detach().double().cpu().numpy())

    def split(self, array: np.ndarray) -> dict[str, np.ndarray]:
        """``by_group`` of what is on the host already."""
        return {g.name: array[self.offsets[i] : self.offsets[i + 1]] for i, g in enumerate(self.graph.groups)}

    def group_of(self) -> np.ndarray:
        """Number of the group, or of the layer of a kernel position or stripe, of every unit; shape ``(count,)``."""
        return np.repeat(np.arange(self.groups), self.sizes)

    def outside(self, keep: dict[str, np.ndarray]) -> np.ndarray:
        """True for the units that are not in ``keep``; shape ``(count,)``."""
        out = np.zeros(self.count, dtype=bool)
        for i, group in enumerate(self.graph.groups):
            if group.name in keep:
                out[self.offsets[i] : self.offsets[i + 1]] = True
                out[self.offsets[i] + np.asarray(keep[group.name])] = False
        return out


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy on ``device`` that nobody waits for: the driver has read pageable memory before the call returns."""
    return torch.from_numpy(array).to(device, non_blocking=True, copy=True)
