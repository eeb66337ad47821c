"""From times that were measured to staircases: what layers of one kind take at any lengths.

A layer takes ``a + b [o] + c [i] + d [o] [i]`` milliseconds, lengths rounded up to the runtime's blocks; how large these are,
and whether less than one of them is computed channel by channel, is found by what fits best.  What is left over (caches, other
algorithms for other sizes) is added as a smooth surface over the logarithms of the lengths.  Noise only ever adds time, so
times above the fit weigh less than times below.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from espalier.graph.times import Staircase

BLOCKS = (1, 8, 16, 32)
INT8_BLOCKS = (*BLOCKS, 64)
ABOVE = 0.6  # weight of a time above the fit
REACH = 0.5  # of the smooth surface, in powers of two of a length
FAITH = 0.7  # times that the surface counts as zero, everywhere: few times bend it little
FINEST = 4  # blocks of one channel are tabled in steps of this many

Times = np.ndarray
"""Rows of (length, ..., milliseconds)."""


@dataclass(frozen=True, order=True)
class Block:
    """So many channels are computed as one block; those of less than one ``whole``, or one by one.

    ONNX Runtime with AVX-512 reads 3 to 16 channels one by one and 24 as if they were 32.
    """

    size: int
    whole: bool = True

    def round_up(self, lengths: np.ndarray) -> np.ndarray:
        rounded = np.ceil(lengths / self.size) * self.size
        return rounded if self.whole else np.where(lengths < self.size, lengths, rounded)

    def edges(self, longest: int, finest: int) -> np.ndarray:
        """Lengths from which another one takes another block; where blocks are smaller than ``finest``, multiples of that."""
        step = max(self.size, finest)
        below = np.arange(finest, 1 if self.whole else min(step, longest), finest)
        return np.unique(np.concatenate([below, np.arange(step, longest + 1, step), [longest]]))


def staircases(
    times: Mapping[str, Times], kinds: Mapping[str, str], *, grain: int, of: Sequence[int] = BLOCKS
) -> dict[str, Staircase]:
    """A table for every signature.  Signatures of one kind share the sizes of the blocks, which are some ``of`` these."""
    blocks = {}
    for kind in sorted(set(kinds.values())):
        alike = [_merged(times[s]) for s in times if kinds[s] == kind]
        errors = {}
        for sizes in itertools.product(*(_possible(alike, dim, of) for dim in range(alike[0].shape[1] - 1))):
            errors[sizes] = sum(_error(rows, sizes) for rows in alike)
        best = min(errors.values())
        blocks[kind] = max(sizes for sizes, error in errors.items() if error <= 1.02 * best + 1e-9)
    return {s: _table(_merged(rows), blocks[kinds[s]], grain) for s, rows in times.items()}


def _possible(alike: Sequence[Times], dim: int, of: Sequence[int]) -> list[Block]:
    """Blocks in which a length may be computed, as far as the lengths that were measured tell them apart."""
    lengths = np.unique(np.concatenate([rows[:, dim] for rows in alike]))
    if all(len(set(rows[:, dim])) <= 2 for rows in alike):
        return [Block(of[0])]
    parts = [Block(size, whole=False) for size in of if (lengths < size).sum() > 1 and (lengths > size).any()]
    return [*map(Block, of), *parts]


def _merged(rows: Times) -> Times:
    """Of equal lengths the median of the times."""
    lengths, which = np.unique(rows[:, :-1], axis=0, return_inverse=True)
    took = [float(np.median(rows[which.ravel() == i, -1])) for i in range(len(lengths))]
    return np.column_stack([lengths, took])


def _terms(lengths: np.ndarray, sizes: Sequence[Block]) -> np.ndarray:
    """``[1, o, i, o i]`` with lengths rounded up to blocks; ``(rows, terms)``."""
    rounded = np.stack([block.round_up(lengths[:, dim]) for dim, block in enumerate(sizes)], axis=1)
    columns = [np.ones(len(lengths))]
    for picked in range(1, 2 ** len(sizes)):
        columns.append(np.prod([rounded[:, d] for d in range(len(sizes)) if picked >> d & 1], axis=0))
    return np.column_stack(columns)


def _coefficients(rows: Times, sizes: Sequence[Block]) -> np.ndarray:
    """Not negative, least in relative squares, times above the fit weighing ``ABOVE``."""
    from scipy.optimize import nnls

    terms, took = _terms(rows[:, :-1], sizes), np.maximum(rows[:, -1], 1e-6)
    scale = terms.max(0)
    weight = np.ones(len(rows))
    found = np.zeros(terms.shape[1])
    for _ in range(4):
        found, _ = nnls(terms / scale * (weight / took)[:, None], weight)
        weight = np.where(terms / scale @ found < took, ABOVE**0.5, 1.0)
    return found / scale


def _error(rows: Times, sizes: Sequence[Block]) -> float:
    fit = _terms(rows[:, :-1], sizes) @ _coefficients(rows, sizes)
    off = (fit - rows[:, -1]) / np.maximum(rows[:, -1], 1e-6)
    return float((np.where(off < 0, ABOVE, 1.0) * np.minimum(off**2, 1.0)).sum())


def _table(rows: Times, sizes: Sequence[Block], grain: int) -> Staircase:
    coefficients = _coefficients(rows, sizes)
    finest = min(grain, FINEST)
    edges = [block.edges(int(rows[:, dim].max()), finest) for dim, block in enumerate(sizes)]
    mesh = np.stack([m.ravel() for m in np.meshgrid(*edges, indexing="ij")], axis=1).astype(float)
    fit = _terms(mesh, sizes) @ coefficients
    left = rows[:, -1] / np.maximum(_terms(rows[:, :-1], sizes) @ coefficients, 1e-9) - 1.0
    surface = _surface(np.log2(mesh), np.log2(rows[:, :-1]), np.clip(left, -0.8, 2.0))
    ms = (fit * (1.0 + surface)).reshape([len(e) for e in edges])
    for dim in range(ms.ndim):  # more units never take less time: what a table says otherwise is noise
        ms = np.maximum.accumulate(ms, axis=dim)
    return Staircase(tuple(edges), ms)


def _surface(where: np.ndarray, known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Mean of ``values`` by distance, drawn towards zero where none is near."""
    found = np.empty(len(where))
    for begin in range(0, len(where), 4096):
        piece = where[begin : begin + 4096]
        apart = ((piece[:, None, :] - known[None]) ** 2).sum(-1)
        near = np.exp(-apart / (2 * REACH**2))
        found[begin : begin + 4096] = near @ values / (near.sum(1) + FAITH)
    return found


def whole_from_parts(parts: np.ndarray, whole: np.ndarray) -> tuple[float, float]:
    """``whole = a parts + b``: what watching the nodes has cost, and what the runtime does between them.

    ``b`` is drawn towards 0 and ``a`` towards 1, as far as the networks do not say otherwise.
    """
    weight = np.ones(len(whole))
    terms = np.column_stack([parts, np.full(len(parts), whole.mean())])
    prior = 0.1 * np.sqrt(len(whole)) * np.eye(2)
    a, b = 1.0, 0.0
    for _ in range(6):
        scaled = np.vstack([terms * (weight / whole)[:, None], prior])
        a, b = np.linalg.lstsq(scaled, np.append(weight, prior @ [1.0, 0.0]), rcond=None)[0].tolist()
        fit = terms @ [a, b]
        weight = 1.0 / np.sqrt(1.0 + ((fit / whole - 1.0) / 0.05) ** 2)
    return a, b * float(whole.mean())
