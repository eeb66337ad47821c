"""EVBMF finds planted ranks, tall and wide, with the noise given or not."""

from __future__ import annotations

import numpy as np
import pytest

from espalier.forms.evbmf import evbmf, threshold_ratio


def planted(rows: int, columns: int, rank: int, noise: float, *, seed: int = 0) -> np.ndarray:
    """``rank`` equal singular values and unit-variance elements, plus noise of that standard deviation."""
    draw = np.random.default_rng(seed)
    u, v = (np.linalg.qr(draw.normal(size=(n, rank)))[0] for n in (rows, columns))
    return np.sqrt(rows * columns / max(rank, 1)) * u @ v.T + noise * draw.normal(size=(rows, columns))


def singular(matrix: np.ndarray) -> np.ndarray:
    return np.linalg.svd(matrix, compute_uv=False)


@pytest.mark.parametrize("shape", [(64, 64), (32, 288), (288, 32), (128, 1152), (1152, 128)])
@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("noise", [0.1, 0.5])
def test_planted_ranks_are_found(shape: tuple[int, int], rank: int, noise: float) -> None:
    matrix = planted(*shape, rank, noise)
    found, variance = evbmf(singular(matrix), shape)
    assert found == rank and variance == pytest.approx(noise**2, rel=0.25)


def test_pure_noise_has_rank_zero_and_its_variance() -> None:
    assert evbmf(singular(planted(64, 576, 0, 0.3)), (64, 576)) == (0, pytest.approx(0.09, rel=0.05))


def test_threshold_is_close_to_the_approximation_of_the_paper() -> None:
    assert threshold_ratio(1.0) == pytest.approx(2.51286, abs=1e-5)
    for alpha in (0.05, 0.2, 0.5):
        assert threshold_ratio(alpha) == pytest.approx(2.5129 * np.sqrt(alpha), rel=0.06)


def test_scale_does_not_change_the_rank() -> None:
    matrix = planted(48, 100, 6, 0.4)
    assert {evbmf(singular(matrix * s), (48, 100))[0] for s in (1e-8, 1.0, 1e8)} == {6}


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (4, 4)])
def test_zero_constant_and_tiny_matrices(shape: tuple[int, int]) -> None:
    assert evbmf(np.zeros(min(shape)), shape)[0] == 0
    assert evbmf(singular(np.ones(shape)), shape)[0] <= 1


def test_a_matrix_without_noise_keeps_its_rank() -> None:
    assert evbmf(singular(planted(40, 90, 5, 0.0)), (40, 90))[0] == 5


def test_bad_values_are_named() -> None:
    with pytest.raises(ValueError, match="has 3 singular values"):
        evbmf(np.ones(2), (3, 5))
    with pytest.raises(ValueError, match="finite"):
        evbmf(np.array([1.0, np.nan]), (2, 2))
