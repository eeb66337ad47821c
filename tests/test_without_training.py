"""Without training: a truncation that knows the inputs loses least of the output, and BatchNorm is estimated anew."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import espalier as es
from espalier.forms import find_places
from espalier.forms.svd import svd
from espalier.forms.table import matrix_form
from espalier.methods.scoring import batchnorm_settled, recalibrate_batchnorm
from espalier.methods.whitening import DAMPING, input_moments, whitened_svd
from tests.steps import network

Pair = tuple[Tensor, Tensor]


def streams(count: int = 3) -> list[Pair]:
    """Channels of very different size that go together, so that inputs are far from white."""
    random = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=random) * torch.tensor([3.0, 2.0, 1.0, 0.3, 0.1, 0.03])
    images = [torch.einsum("nchw,dc->ndhw", torch.randn(4, 6, 9, 8, generator=random), mixing) for _ in range(count)]
    return [(x, torch.zeros(4, dtype=torch.int64)) for x in images]


LAYERS: dict[str, Any] = {
    "plain": lambda: nn.Conv2d(6, 7, 3, padding=1, bias=False),
    "strided": lambda: nn.Conv2d(6, 7, (3, 5), stride=(2, 1), padding=(0, 2), dilation=(1, 2), bias=False),
    "pointwise": lambda: nn.Conv2d(6, 7, 1, bias=False),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_the_error_of_a_whitened_truncation_is_its_tail_energy_and_no_other_rank_r_matrix_is_nearer(kind: str) -> None:
    torch.manual_seed(1)
    layer, batches = LAYERS[kind](), streams()
    model = nn.Sequential(layer)
    places = find_places(model, batches[0][0])[0]
    moment = input_moments(model, places, {"0": "channel"}, batches)["0"]
    matrix = matrix_form("channel").matrix(layer.weight.detach())
    u, s, v = whitened_svd(matrix, moment, name="0")
    assert torch.allclose(u * s @ v.T, matrix, atol=1e-4)

    def output_error(other: Tensor) -> float:
        changed = copy.deepcopy(layer)
        with torch.no_grad():
            changed.weight.copy_(other.reshape(layer.weight.shape))
            apart = [(layer(x) - changed(x)).double().square().sum(1).flatten() for x, _ in batches]
        return float(torch.cat(apart).mean())

    plain = svd(matrix, name="0")
    for rank in (1, 3):
        best = u[:, :rank] * s[:rank] @ v[:, :rank].T
        ours = output_error(best)
        damped = DAMPING * float(moment.diagonal().mean() * (matrix - best).double().square().sum())
        assert ours + damped == pytest.approx(float(s[rank:].double().square().sum()), rel=1e-3)
        theirs = output_error(plain[0][:, :rank] * plain[1][:rank] @ plain[2][:, :rank].T)
        assert ours < theirs


def test_moments_of_the_spatial_form_are_those_of_rows_of_patches() -> None:
    torch.manual_seed(1)
    model, batches = nn.Sequential(nn.Conv2d(6, 7, 3, padding=1)), streams(2)
    places = find_places(model, batches[0][0])[0]
    moment = input_moments(model, places, {"0": "spatial"}, batches)["0"]
    x = torch.nn.functional.pad(torch.cat([x for x, _ in batches]), (1, 1)).double()
    rows = x.unfold(3, 3, 1).permute(0, 2, 3, 1, 4).reshape(-1, 18)  # (positions, I * kw)
    assert torch.allclose(moment, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)


def test_directions_that_the_inputs_never_use_cost_nothing_and_stay_finite() -> None:
    torch.manual_seed(1)
    matrix = torch.randn(5, 4)
    moment = torch.diag(torch.tensor([1.0, 0.5, 0.0, 0.0])).double()
    u, s, v = whitened_svd(matrix, moment, name="x")
    assert torch.isfinite(v).all() and s[2] < 0.1 * s[1]
    two = u[:, :2] * s[:2] @ v[:, :2].T
    assert torch.allclose(two[:, :2], matrix[:, :2], atol=0.02)
    with pytest.raises(ValueError, match=r"^x: its inputs are not finite"):
        whitened_svd(matrix, torch.full((4, 4), float("nan")), name="x")


@pytest.mark.parametrize("method", [es.SVDOneShot(), es.Magnitude()], ids=lambda m: m.name)
@pytest.mark.parametrize("labels", [True, False])
def test_calibration_batches_alone_are_enough_to_compress_and_settle_batchnorm(method: es.Method, labels: bool) -> None:
    random = torch.Generator().manual_seed(3)
    images = [3.0 * torch.randn(16, 1, 8, 8, generator=random) + 1.0 for _ in range(2)]
    batches = [(x, torch.zeros(16, dtype=torch.int64)) for x in images] if labels else images
    found = es.compress(network(), batches, budget=es.Budget(macs=0.5), method=method)
    assert found.cost.macs <= found.limits["macs"] and found.accuracy is None
    norms = [m for m in found.model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert any(bool((m.running_mean != 0).any()) for m in norms)  # as it was built, they all were 0


def test_a_cut_moves_the_statistics_of_batchnorm_by_what_it_changes_on_the_batches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(6, 7, 3), nn.BatchNorm2d(7), nn.ReLU(), nn.Conv2d(7, 2, 1), nn.BatchNorm2d(2)
    ).eval()
    for x, _ in streams():
        model.train()(2.0 * x + 1.0)  # what it was trained on differs from what it is calibrated by
    before = copy.deepcopy(model.state_dict())
    with batchnorm_settled(model, streams()):
        pass
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor, before[name], rtol=1e-4, atol=1e-5) or "num_batches" in name, name
    first, last, kept = model[1], model[4], [0, 2, 3, 6]
    with batchnorm_settled(model, streams()), torch.no_grad():
        model[0] = shortened(model[0], kept, dim=0)
        model[3] = shortened(model[3], kept, dim=1)
        for name in ("weight", "bias", "running_mean", "running_var"):
            tensor = getattr(first, name)[kept]
            setattr(first, name, nn.Parameter(tensor) if name in ("weight", "bias") else tensor)
        first.num_features = len(kept)
    assert torch.allclose(
        first.running_mean, before["1.running_mean"][kept], rtol=1e-4, atol=1e-5
    )  # nothing before it changed
    assert not torch.allclose(last.running_var, before["4.running_var"], rtol=1e-2)

    def variance(net: nn.Module) -> Tensor:
        twin = copy.deepcopy(net)
        recalibrate_batchnorm(twin, streams(), 9)
        return twin[4].running_var

    whole = nn.Sequential(nn.Conv2d(6, 7, 3), nn.BatchNorm2d(7), nn.ReLU(), nn.Conv2d(7, 2, 1), nn.BatchNorm2d(2))
    whole.load_state_dict(before)
    moved = before["4.running_var"] * variance(model) / variance(whole)
    assert torch.allclose(last.running_var, moved, rtol=1e-3)
    with pytest.raises(RuntimeError), batchnorm_settled(whole, streams()):
        raise RuntimeError
    assert torch.equal(whole[1].running_mean, before["1.running_mean"])  # a cut that fails leaves what was there


def shortened(conv: nn.Conv2d, kept: list[int], *, dim: int) -> nn.Conv2d:
    weight = conv.weight.detach().index_select(dim, torch.tensor(kept))
    new = nn.Conv2d(weight.shape[1], weight.shape[0], conv.kernel_size)
    new.weight.data = weight
    new.bias.data = conv.bias.detach()[kept] if dim == 0 else conv.bias.detach()  # type: ignore[index,union-attr]
    return new


def test_a_loader_calibrates_a_method_that_needs_no_training_only() -> None:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(32, 1, 8, 8), torch.zeros(32)), 16)
    assert es.compress(network(), loader, budget=es.Budget(params=0.5), method=es.SVDOneShot()).cost.params > 0
    with pytest.raises(ValueError, match=r"works while the network trains.*Loaders"):
        es.compress(network(), loader, budget=es.Budget(params=0.5), method=es.TCP())
    with pytest.raises(ValueError, match="calibration batch 0 is a str"):
        es.compress(network(), ["cifar10"], budget=es.Budget(params=0.5), method=es.SVDOneShot())
    with pytest.raises(ValueError, match="no calibration batches"):
        es.compress(network(), [], budget=es.Budget(params=0.5), method=es.SVDOneShot())
