"""The closing budget, which all methods share: from the full cost to the target, fast at first.

Zhu & Gupta, "To prune, or not to prune", arXiv 1710.01878: what is still to go is ``(1 - t) ** power``, with ``t`` from 0 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from espalier.costs import LATENCY, Cost


def still_to_go(progress: float, *, begin: float, end: float, power: float) -> float:
    """Share of the way from the full cost to the target that is ahead at ``progress``: 1 up to ``begin``, 0 from ``end`` on."""
    done = min(max((progress - begin) / (end - begin), 0.0), 1.0)
    left: float = (1.0 - done) ** power
    return left


def limits_on_the_way(limits: Mapping[str, float], dense: Cost, left: float) -> dict[str, float]:
    """What the network may cost while the share ``left`` of the way to ``limits`` is ahead; all but time in whole numbers."""
    now = {m: limit + (getattr(dense, m) - limit) * left for m, limit in limits.items()}
    return {m: limit if m == LATENCY else math.floor(limit) for m, limit in now.items()}
