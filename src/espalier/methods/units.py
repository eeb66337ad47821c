"""Units on tensors: from per-channel numbers of every layer to one vector over all units of a graph, and back.

A unit acts on the network only through its *consumers*, the convolutions and linear layers that read it.  Shrinking the
consumers' columns to zero removes it exactly: no bias or BatchNorm shift of the producer survives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from espalier.copies import named_tensors
from espalier.graph import Graph, Slice
from espalier.graph.graph import FORM

_PIECE = 1 << 20  # elements that are squared at a time


@dataclass(frozen=True)
class Positions:
    """Some dimensions of one parameter and the unit that owns each position; ``owner`` is ``Units.count`` where none does.

    Of a weight ``(out, in, kh, kw)``, ``dims`` are ``(1,)`` for the columns that read channels, ``(0,)`` for the rows that make
    them, ``(2, 3)`` for the kernel positions of a layer, ``()`` for what a unit owns as a whole, as what silences a residual
    block.
    """

    tensor: str
    dims: tuple[int, ...]
    parameter: nn.Parameter
    owner: Tensor  # int64, (positions,)

    def per_position(self, values: Tensor) -> Tensor:
        """Sum a tensor shaped like the parameter over everything but ``dims``; shape ``(positions,)``, float32."""
        others = [d for d in range(values.ndim) if d not in self.dims]
        # no dimensions would mean all of them
        return (values.sum(others, dtype=torch.float32) if others else values.float()).reshape(-1)

    def energy(self) -> Tensor:
        """Sum of squares per position, like ``per_position``; rows by rows, so that no large copy is made of the squares."""
        weight = self.parameter.detach()
        if weight.is_complex():
            weight = weight.abs()
        if weight.numel() <= _PIECE or len(self.dims) != 1:
            return self.per_position(weight.square())
        rows = weight.split(max(1, _PIECE * len(weight) // weight.numel()))
        parts = (self.per_position(piece.square()) for piece in rows)
        return torch.cat(list(parts)) if self.dims == (0,) else reduce(torch.Tensor.add_, parts)

    def shaped(self, per_position: Tensor) -> Tensor:
        """Values per position, to be broadcast against the parameter."""
        return per_position.view([n if d in self.dims else 1 for d, n in enumerate(self.parameter.shape)])


Gate = Callable[[Tensor, Tensor], list[tuple[Any, Tensor]]]
"""From a parameter and its gradient to the derivatives of the loss by gates on units, in parts that ``sum`` adds up."""


class Units:
    """All units of a graph in one row, group after group, tied to the parameters of one model.

    Behind them come the kernel positions of the convolutions named in ``taps``, layer after layer, row by row.  Of a block that
    may be left out (``graph.blocks``) the second unit owns what silences it, and the first one nothing.
    """

    def __init__(self, model: nn.Module, graph: Graph, *, taps: Sequence[str] = (), more: Sequence[int] = ()) -> None:
        """``more``: sizes of rows of units behind all others, which no position owns."""
        self.graph = graph
        parameters, _ = named_tensors(model)
        weights = [parameters[f"{name}.weight"] for name in taps]
        owned = [w.shape[2:].numel() for w in weights]
        self.groups = len(graph.groups) + len(owned) + len(more)
        self.sizes = np.concatenate([graph.sizes, np.array([*owned, *more], dtype=np.int64)])
        self.offsets = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)
        self.count = int(self.offsets[-1])
        rows = [slice(*self.offsets[len(graph.groups) + i :][:2].tolist()) for i in range(len(owned))]
        self.taps = dict(zip(taps, rows, strict=True))
        self.triplets: dict[str, slice] = {}  # layer -> its singular triplets, where somebody adds them
        first = next(iter(parameters.values()), None)
        self.device = torch.device("cpu") if first is None else first.device
        reads = self._owners(lambda s: s.consumed and s.tensor in parameters)
        makes = self._owners(lambda s: not s.consumed and s.tensor in parameters)
        silencers = [(n, self.offsets[graph.index[b.group]] + 1) for b in graph.blocks for n in b.silent]
        self.read = [*reads.values(), *(np.arange(own.start, own.stop) for own in rows)]  # owners, on the host
        self.read += [np.array([unit]) for _, unit in silencers]
        every = [*self.read, *makes.values()]
        row = upload(np.concatenate(every) if every else np.zeros(0, dtype=np.int64), self.device)
        owners = iter(row.split([len(o) for o in every]))
        self.consumers = [Positions(t, (d,), parameters[t], next(owners)) for t, d in reads]
        for name, weight in zip(taps, weights, strict=True):
            self.consumers.append(Positions(f"{name}.weight", (2, 3), weight, next(owners)))
        self.consumers += [Positions(name, (), parameters[name], next(owners)) for name, _ in silencers]
        self.producers = [Positions(t, (d,), parameters[t], next(owners)) for t, d in makes]
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

    def sum(self, parts: Iterable[tuple[Positions, Tensor]]) -> Tensor:
        """Add per-position values of several columns up per unit; shape ``(count,)``."""
        total = torch.zeros(self.count + 1, device=self.device)
        every = list(parts)
        if every:
            owners = torch.cat([columns.owner for columns, _ in every])
            total.index_add_(0, owners, torch.cat([values.float() for _, values in every]))
        return total[: self.count]

    def total(self, values: Tensor) -> Tensor:
        """Of one value per unit."""
        return values.sum()

    def gates(self) -> dict[nn.Parameter, Gate]:
        """What gradients say of the units that a parameter reads: ``dL/dg = sum(W * dL/dW)`` of a gate ``g`` on each."""
        readers: dict[nn.Parameter, list[Positions]] = {}
        for positions in self.consumers:
            readers.setdefault(positions.parameter, []).append(positions)

        def gate(some: list[Positions]) -> Gate:
            def of(weight: Tensor, gradient: Tensor) -> list[tuple[Positions, Tensor]]:
                product = weight * gradient
                return [(positions, positions.per_position(product)) for positions in some]

            return of

        return {parameter: gate(some) for parameter, some in readers.items()}

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
        """Number of the group, or of the layer of a kernel position, of every unit; shape ``(count,)``."""
        return np.repeat(np.arange(self.groups), self.sizes)

    def outside(self, keep: Mapping[str, np.ndarray], stays: Mapping[str, np.ndarray] | None = None) -> np.ndarray:
        """True for the units that are not in ``keep``, and the positions of kernels that are not in ``stays``, by layer.

        Alternatives have no units, only an option that is taken.  Shape ``(count,)``.
        """
        out = np.zeros(self.count, dtype=bool)
        for i, group in enumerate(self.graph.groups):
            if group.name in keep and group.kind != FORM:
                out[self.offsets[i] : self.offsets[i + 1]] = True
                out[self.offsets[i] + np.asarray(keep[group.name])] = False
        for layer, mask in (stays or {}).items():
            out[self.taps[layer]] = ~mask.reshape(-1)
        return out


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy on ``device`` that nobody waits for: the driver has read pageable memory before the call returns."""
    return torch.from_numpy(array).to(device, non_blocking=True, copy=True)
