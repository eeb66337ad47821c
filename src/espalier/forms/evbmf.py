"""EVBMF: the rank of a noisy matrix, in closed form.

Nakajima, Sugiyama, Babacan, Tomioka: "Global Analytic Solution of Fully-Observed Variational Bayesian Matrix Factorization",
JMLR 14, 2013.  A matrix ``V`` of shape ``(L, M)``, ``L <= M``, is a low-rank product plus noise of variance ``s2``.  The
empirical variational Bayes solution keeps exactly the singular values ``g`` above

    sqrt(M s2 (1 + tau)(1 + alpha / tau)),    alpha = L / M,

where ``tau``, about ``2.5129 sqrt(alpha)``, is the zero of ``Phi(tau) + Phi(tau / alpha)``, ``Phi(z) = log(1 + z) / z - 1/2``.
The variance minimises the free energy, which depends on it alone.

Only the singular values are needed, so that the cost is that of a few thousand logarithms.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

_GRID = 200  # variances looked at between the bounds before the best is refined
_REFINE = 3


def evbmf(singular: np.ndarray, shape: tuple[int, int]) -> tuple[int, float]:
    """Rank and noise variance of a matrix, tall or wide, from all its ``min(shape)`` singular values.

    Raises: ValueError if they are not finite, negative, or not as many as the shape says.

    >>> import numpy as np
    >>> draw = np.random.default_rng(0)
    >>> matrix = draw.normal(size=(40, 5)) @ draw.normal(size=(5, 90)) + 0.5 * draw.normal(size=(40, 90))
    >>> evbmf(np.linalg.svd(matrix, compute_uv=False), matrix.shape)[0]
    5
    """
    short, long = sorted(shape)
    values = np.sort(np.asarray(singular, dtype=np.float64))[::-1]
    if values.shape != (short,):
        raise ValueError(f"evbmf: a matrix {shape} has {short} singular values, got shape {values.shape}")
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError("evbmf: singular values must be finite and not negative")
    if short == 0 or values[0] == 0:
        return 0, 0.0
    alpha = short / long
    tau = threshold_ratio(alpha)
    edge = (1 + tau) * (1 + alpha / tau)
    # In units of the largest singular value; what the arithmetic cannot tell from zero is zero.
    energy = np.maximum((values / values[0]) ** 2, 1e-14)
    variance = _variance(energy, short, long, edge)
    return int((energy > long * variance * edge).sum()), variance * float(values[0]) ** 2


@lru_cache(maxsize=256)
def threshold_ratio(alpha: float) -> float:
    """The zero of ``Phi(tau) + Phi(tau / alpha)``, by bisection; ``Phi`` falls."""

    def phi(z: float) -> float:
        return math.log1p(z) / z - 0.5

    low, high = 1e-12, 2.5129
    while phi(high) + phi(high / alpha) > 0:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if phi(middle) + phi(middle / alpha) > 0 else (low, middle)
    return (low + high) / 2


def _variance(energy: np.ndarray, short: int, long: int, edge: float) -> float:
    """The noise variance of least free energy, between its bounds: all is noise, or as many signals as can be told from it.

    The free energy has more than one valley, so it is looked at along the whole range, not only downhill.
    """
    alpha = short / long
    most = max(min(math.ceil(short / (1 + alpha)) - 1, short) - 1, 0)  # no more components can be told from noise
    tail = energy[most + 1 :]
    lowest = max(energy[most + 1] / (long * edge), float(tail.mean()) / long) if len(tail) else 0.0
    highest = float(energy.sum()) / (short * long)
    low, high = math.log(max(lowest, 1e-16 / long)), math.log(highest)
    for _ in range(_REFINE):
        grid = np.linspace(low, max(high, low), _GRID)
        best = int(np.argmin(_free_energy(np.exp(grid), energy, long=long, alpha=alpha, edge=edge)))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, _GRID - 1)]
    return math.exp(grid[best])


def _free_energy(variances: np.ndarray, energy: np.ndarray, *, long: int, alpha: float, edge: float) -> np.ndarray:
    """Up to constants and a factor, for every variance; shape of ``variances``."""
    x = energy / (long * variances[:, None])  # (variances, components)
    signal = x > edge
    base = np.where(signal, x, edge) - (1 + alpha)
    tau = 0.5 * (base + np.sqrt(np.maximum(base**2 - 4 * alpha, 0)))
    kept = x - tau + np.log((tau + 1) / x) + alpha * np.log(tau / alpha + 1)
    return np.where(signal, kept, x - np.log(x)).sum(1)
