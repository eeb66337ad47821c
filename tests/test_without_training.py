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
    model = network()
    found = es.compress(model, batches, budget=es.Budget(macs=0.5), method=method)
    assert found.cost.macs <= found.limits["macs"] and found.accuracy is None
    seen = []
    first = next(m for m in found.model.modules() if isinstance(m, nn.BatchNorm2d))
    first.register_forward_hook(lambda m, x, y: seen.append(x[0].detach()))
    with torch.no_grad():
        for x in images:
            found.model.eval()(x)
    mean = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    assert torch.allclose(first.running_mean, mean, atol=1e-5)  # type: ignore[arg-type]


def test_a_loader_calibrates_a_method_that_needs_no_training_only() -> None:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(32, 1, 8, 8), torch.zeros(32)), 16)
    assert es.compress(network(), loader, budget=es.Budget(params=0.5), method=es.SVDOneShot()).cost.params > 0
    with pytest.raises(ValueError, match=r"works while the network trains.*Loaders"):
        es.compress(network(), loader, budget=es.Budget(params=0.5), method=es.TCP())
    with pytest.raises(ValueError, match="calibration batch 0 is a str"):
        es.compress(network(), ["cifar10"], budget=es.Budget(params=0.5), method=es.SVDOneShot())
    with pytest.raises(ValueError, match="no calibration batches"):
        es.compress(network(), [], budget=es.Budget(params=0.5), method=es.SVDOneShot())
