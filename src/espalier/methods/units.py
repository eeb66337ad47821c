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
        return values.sum([d for d in range(values.ndim) if d != self.dim], dtype=torch.float32)

    def energy(self) -> Tensor:
        """Sum of squares per position, like ``per_position``; rows by rows, so that no large copy is made of the squares."""
        weight = self.parameter.detach()
        if weight.numel() <= _PIECE:
            return self.per_position(weight.square())
        rows = weight.split(max(1, _PIECE * len(weight) // weight.numel()))
        parts = (self.per_position(piece.square()) for piece in rows)
        return torch.cat(list(parts)) if self.dim == 0 else reduce(torch.Tensor.add_, parts)

    def spread(self, per_unit: Tensor) -> Tensor:
        """Values per unit, shape ``(count + 1,)``, broadcast against the parameter."""
        shape = [1] * self.parameter.ndim
        shape[self.dim] = -1
        return per_unit[self.owner].view(shape)


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

    def spread(self, per_unit: Tensor) -> Tensor:
        """Values per unit, shape ``(count + 1,)``, broadcast against the parameter."""
        return per_unit[self.owner].view(1, 1, *self.parameter.shape[2:])


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

    def spread(self, per_unit: Tensor) -> Tensor:
        """Values per unit, shape ``(count + 1,)``, broadcast against the parameter."""
        return per_unit[self.owner].view(self.parameter.shape[0], 1, *self.parameter.shape[2:])


Consumer = Columns | Taps | Stripes


class Units:
    """All units of a graph in one row, group after group, tied to the parameters of one model.

    Behind them come the kernel positions of the convolutions named in ``taps``, layer after layer, row by row, and behind
    those the stripes of the convolutions named in ``stripes``, filter by filter.
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
        self.consumers: list[Consumer] = [*self._columns(parameters, lambda s: s.consumed)]
        for name, weight, own in zip((*taps, *stripes), weights, rows, strict=True):
            owner = torch.arange(own.start, own.stop, device=self.device)
            kind = Taps if name in self.taps else Stripes
            self.consumers.append(kind(f"{name}.weight", weight, owner))
        self.producers = self._columns(parameters, lambda s: not s.consumed and s.tensor in parameters)

    def _columns(self, parameters: dict[str, nn.Parameter], wanted: Callable[[Slice], bool]) -> list[Columns]:
        owners: dict[tuple[str, int], np.ndarray] = {}
        for number, group in enumerate(self.graph.groups):
            unit = np.arange(self.offsets[number], self.offsets[number] + group.size)[:, None]
            for s in group.slices:
                if wanted(s):
                    key = (s.tensor, s.dim)
                    if key not in owners:
                        owners[key] = np.full(self.graph.shapes[s.tensor][s.dim], self.count, dtype=np.int64)
                    owners[key][s.index] = unit
        return [Columns(t, d, parameters[t], torch.from_numpy(o).to(self.device)) for (t, d), o in owners.items()]

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
        with torch.no_grad():
            return self.sum((c, c.energy()) for c in self.consumers)

    def by_group(self, values: Tensor) -> dict[str, np.ndarray]:
        """Cut one vector over all units into one array per group, as ``solve`` takes it."""
        array = values.detach().double().cpu().numpy()
        return {g.name: array[self.offsets[i] : self.offsets[i + 1]] for i, g in enumerate(self.graph.groups)}

    def group_of(self) -> Tensor:
        """Number of the group, or of the layer of a kernel position or stripe, of every unit; shape ``(count,)``."""
        return torch.from_numpy(np.repeat(np.arange(self.groups), self.sizes)).to(self.device)

    def outside(self, keep: dict[str, np.ndarray]) -> Tensor:
        """True for the units that are not in ``keep``; shape ``(count,)``."""
        out = np.zeros(self.count, dtype=bool)
        for i, group in enumerate(self.graph.groups):
            if group.name in keep:
                out[self.offsets[i] : self.offsets[i + 1]] = True
                out[self.offsets[i] + np.asarray(keep[group.name])] = False
        return torch.from_numpy(out).to(self.device)
