"""Staircases: what a layer takes in a runtime, as a table over its lengths.

Runtimes compute channels in blocks, so time goes up in steps: a straight line through it would promise savings that are none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Staircase:
    """Milliseconds by lengths: ``ms[i, j, ...]`` for lengths up to ``edges[0][i]``, ``edges[1][j]``, ...; none where one is 0.

    Longer ones than the last edge take what the last edge takes, in proportion.  More lengths than the table has dimensions are
    factors, 0 or 1: whether the layer is there at all.
    """

    edges: tuple[np.ndarray, ...]  # ascending
    ms: np.ndarray

    @cached_property
    def _steps(self) -> tuple[np.ndarray, ...]:
        """Per dimension: the number of the step that each whole length is on."""
        return tuple(np.searchsorted(e, np.arange(int(e[-1]) + 1)) for e in self.edges)

    def at(self, lengths: Sequence[Any]) -> Any:
        """For numbers, or for arrays that broadcast."""
        there, steps = 1.0, []
        for number, length in enumerate(lengths):
            if number >= len(self.edges):
                there = there * length
                continue
            last = len(self._steps[number]) - 1
            there = there * (np.maximum(length, last) / last) * (np.asarray(length) > 0)
            steps.append(self._steps[number][np.minimum(length, last).astype(np.int64)])
        return self.ms[tuple(steps)] * there
