"""Tucker-2, TT-Tucker and tensor trains: against tensorly, against the energy that is left out, and rank by rank."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import tensorly
import torch
from tensorly.decomposition import partial_tucker, tensor_train
from torch import nn

from espalier.forms import cost_of, find_places, sequence, sequential
from espalier.forms.candidates import compose, factorise
from espalier.forms.tensors import input_unfolding, output_unfolding, spectrum, split_core, tucker2


@pytest.fixture(autouse=True)
def _on_torch() -> Iterator[None]:
    with tensorly.backend_context("pytorch"):
        yield


def weight(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def error(w: torch.Tensor, form: str, ranks: list[int], **options) -> float:
    return float((w - compose(factorise(w, form, ranks, **options))).square().sum())


@pytest.mark.parametrize("shape", [(12, 7, 3, 3), (5, 16, 3, 3), (8, 8, 2, 4), (9, 6, 3, 1)])
@pytest.mark.parametrize("ranks", [(2, 3), (5, 4), (1, 1)])
def test_tucker_is_as_close_as_tensorly(shape: tuple[int, ...], ranks: tuple[int, int]) -> None:
    w = compose(factorise(weight(*shape), "tucker", [min(ranks[0], shape[1]), min(ranks[1], shape[0])]))
    w = w + 0.05 * weight(*shape, seed=1)  # one best answer, not the many of pure noise
    (core, factors), _ = partial_tucker(
        w, rank=[ranks[1], ranks[0]], modes=[0, 1], init="svd", n_iter_max=100, tol=1e-10
    )
    theirs = tensorly.tenalg.multi_mode_dot(core, factors, modes=[0, 1])
    ours = error(w, "tucker", list(ranks), sweeps=100)
    reference = float((w - theirs).square().sum())
    assert ours == pytest.approx(reference, rel=1e-3)


@pytest.mark.parametrize("rank", [1, 4, 9])
@pytest.mark.parametrize("shape", [(12, 7, 3, 3), (6, 10, 5, 3), (8, 8, 2, 4)])
def test_the_core_and_tt_tucker_are_split_as_by_tensorly(shape: tuple[int, ...], rank: int) -> None:
    """Tucker-2 by tensorly, its core as a train of two carriages by tensorly, put together by tensorly; and ours."""
    w = weight(*shape)
    b, a = 6, 5
    (core, factors), _ = partial_tucker(w, rank=[b, a], modes=[0, 1], init="svd", n_iter_max=0)
    matrix = core.permute(1, 2, 3, 0).reshape(a * shape[2], shape[3] * b)
    split = tensor_train(matrix, rank=[1, rank, 1]).to_tensor()
    first, second = split_core(core, rank)
    ours = torch.einsum("taij,btij->baij", first.expand(-1, -1, -1, shape[3]), second.expand(-1, -1, shape[2], -1))
    theirs = split.reshape(a, shape[2], shape[3], b).permute(3, 0, 1, 2)
    torch.testing.assert_close(ours, theirs)
    whole = tensorly.tenalg.multi_mode_dot(theirs, factors, modes=[0, 1])
    torch.testing.assert_close(compose(factorise(w, "tt", [a, rank, b], sweeps=0)), whole)


@pytest.mark.parametrize("form", ["channel", "spatial"])
def test_truncation_leaves_out_exactly_the_tail(form: str) -> None:
    w = weight(6, 5, 3, 3)
    matrix = w.flatten(1) if form == "channel" else w.permute(0, 2, 1, 3).reshape(18, 15)
    values = torch.linalg.svdvals(matrix).square()
    for rank in (1, 3, 5):
        assert error(w, form, [rank]) == pytest.approx(float(values[rank:].sum()))


@pytest.mark.parametrize("ranks", [(2, 3), (4, 6), (7, 2)])
def test_hosvd_keeps_the_energy_of_its_core_and_stays_below_its_bound(ranks: tuple[int, int]) -> None:
    w = weight(9, 8, 3, 3)
    core, _ = tucker2(w, ranks, sweeps=0)
    left_out = float(w.square().sum() - core.square().sum())
    assert error(w, "tucker", list(ranks), sweeps=0) == pytest.approx(left_out)
    tails = float(spectrum(input_unfolding(w))[ranks[0] :].sum() + spectrum(output_unfolding(w))[ranks[1] :].sum())
    assert left_out <= tails + 1e-9


@pytest.mark.parametrize("ranks", [(8, 3), (5, 9)])
def test_hosvd_of_one_mode_leaves_out_exactly_the_bound(ranks: tuple[int, int]) -> None:
    """With the other mode whole, the bound is met with equality (Eckart and Young)."""
    w = weight(9, 8, 3, 3)
    tails = spectrum(input_unfolding(w))[ranks[0] :].sum() + spectrum(output_unfolding(w))[ranks[1] :].sum()
    assert error(w, "tucker", list(ranks), sweeps=0) == pytest.approx(float(tails))


def test_hooi_is_never_further_than_hosvd_and_a_start_saves_sweeps() -> None:
    w = weight(16, 12, 3, 3)
    plain = error(w, "tucker", [4, 5], sweeps=0)
    better = factorise(w, "tucker", [4, 5], sweeps=30)
    assert float((w - compose(better)).square().sum()) < plain
    moved = w + 1e-3 * weight(16, 12, 3, 3, seed=1)
    assert error(moved, "tucker", [4, 5], sweeps=1, start=better.bases) <= error(moved, "tucker", [4, 5], sweeps=0)


@pytest.mark.parametrize("form", ["channel", "spatial", "tucker", "tt"])
def test_error_falls_in_every_rank_down_to_nothing(form: str) -> None:
    w = weight(6, 5, 3, 3)
    top = {"channel": [6], "spatial": [15], "tucker": [5, 6], "tt": [5, 12, 6]}[form]
    for which in range(len(top)):
        lowest = 1 if form != "tt" or which == 1 else -(-top[1] // 3)  # three kernel rows or columns carry the split
        errors = [error(w, form, [*top[:which], r, *top[which + 1 :]], sweeps=0) for r in range(lowest, top[which] + 1)]
        assert all(later < earlier for earlier, later in itertools.pairwise(errors))
    if form == "tt":
        top[1] = 15
    assert error(w, form, top, sweeps=0) == pytest.approx(0.0, abs=1e-20)


def test_the_split_core_leaves_out_exactly_its_tail() -> None:
    core = weight(4, 3, 3, 3)
    values = torch.linalg.svdvals(core.permute(1, 2, 3, 0).reshape(9, 12)).square()
    for rank in (1, 4, 8):
        first, second = split_core(core, rank)
        back = torch.einsum("btxw,tahy->bahw", second, first)
        assert float((core - back).square().sum()) == pytest.approx(float(values[rank:].sum()))


LAYERS = {
    "plain": {"kernel_size": 3, "padding": 1},
    "stride": {"kernel_size": 3, "padding": 1, "stride": 2},
    "dilation": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "even": {"kernel_size": (2, 4), "padding": (1, 2), "stride": (2, 1)},
    "no padding": {"kernel_size": (3, 1)},
    "pointwise": {"kernel_size": 1},
}


@pytest.mark.parametrize("form", ["channel", "spatial", "tucker", "tt"])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_stages_compute_what_the_composed_weight_computes(form: str, layer: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 8, **LAYERS[layer]).double()
    x = weight(2, 6, 9, 10)
    place = find_places(nn.Sequential(conv), x)[0]["0"]
    ranks = {"channel": [4], "spatial": [5], "tucker": [3, 4], "tt": [3, 4, 5]}[form]
    if layer == "pointwise" and form == "tt":
        ranks = [3, 3, 5]
    factors = factorise(conv.weight, form, ranks)
    row = sequential(place, form, factors.weights, conv.bias)
    assert [len(stage) for stage in factors.weights[:-1]] == ranks
    assert (
        sum(p.numel() for n, p in row.named_parameters() if "weight" in n)
        == cost_of(place, sequence(place, form, ranks))[1]
    )
    with torch.no_grad():
        conv.weight.copy_(compose(factors))
    torch.testing.assert_close(row(x), conv(x))


def test_a_linear_layer_has_two_factors() -> None:
    w = weight(7, 5)
    factors = factorise(w, "channel", [3])
    assert [tuple(f.shape) for f in factors.weights] == [(3, 5), (7, 3)]
    assert float((w - compose(factors)).square().sum()) == pytest.approx(
        float(torch.linalg.svdvals(w)[3:].square().sum())
    )


@pytest.mark.parametrize("form", ["channel", "spatial", "tucker", "tt"])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_zero_and_constant_weights_are_exact_at_rank_one(form: str, value: float) -> None:
    w = torch.full((6, 5, 3, 3), value)
    ranks = {"channel": [1], "spatial": [1], "tucker": [1, 1], "tt": [1, 1, 1]}[form]
    back = compose(factorise(w, form, ranks))
    assert back.dtype == torch.float32
    torch.testing.assert_close(back, w)


def test_half_precision_is_computed_in_float32() -> None:
    w = weight(8, 6, 3, 3, dtype=torch.bfloat16)
    factors = factorise(w, "tucker", [6, 8])
    assert factors.weights[0].dtype == torch.bfloat16
    torch.testing.assert_close(compose(factors).float(), w.float(), atol=0.1, rtol=0.1)


def test_all_stages_have_the_same_norm() -> None:
    norms = [float(f.norm()) for f in factorise(weight(8, 6, 3, 3), "tt", [3, 5, 4]).weights]
    assert norms == pytest.approx([norms[0]] * 4)


def test_wrong_forms_and_ranks_are_named() -> None:
    with pytest.raises(ValueError, match="form 'cp' does not exist; choose one of channel"):
        factorise(weight(4, 4, 3, 3), "cp", [2])
    with pytest.raises(ValueError, match="ranks 1 to 6, not 7"):
        factorise(weight(4, 4, 3, 3), "tt", [2, 7, 2])
