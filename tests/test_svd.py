"""Two-stage forms: the product of the factors, the composed convolution and the two small ones are the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import espalier as es
from espalier.forms import find_places, sequential
from espalier.forms.svd import svd
from espalier.forms.table import matrix_form
from espalier.layers import FactorisedConv

LAYERS = {
    "plain": nn.Conv2d(5, 7, 3, padding=1),
    "strided": nn.Conv2d(5, 7, 3, stride=2, padding=1, bias=False),
    "asymmetric": nn.Conv2d(4, 6, (3, 5), stride=(1, 2), padding=(0, 2), dilation=(2, 1)),
    "even": nn.Conv2d(4, 6, 2),
    "pointwise": nn.Conv2d(4, 6, 1, stride=2),
    "linear": nn.Linear(9, 4),
}


@pytest.mark.parametrize("form", ["channel", "spatial"])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rank", [1, 3, None])
def test_small_convolutions_equal_the_composed_one(name: str, form: str, rank: int | None) -> None:
    layer = LAYERS[name].double()
    if isinstance(layer, nn.Linear) and form == "spatial":
        pytest.skip("a linear layer has one form")
    example = torch.randn(2, 9, dtype=torch.float64) if isinstance(layer, nn.Linear) else torch.randn(
        2, layer.in_channels, 12, 11, dtype=torch.float64
    )  # fmt: skip
    place = find_places(nn.Sequential(layer), example)[0]["0"]
    u, s, v = svd(matrix_form(form).matrix(layer.weight.detach()), name=name)
    left, right = (u * s)[:, :rank], v[:, :rank]
    composed = matrix_form(form).weight(left @ right.T, layer.weight.shape)
    small = sequential(place, form, matrix_form(form).stage_weights(left, right, layer.weight.shape), layer.bias)
    with torch.no_grad():
        found = small(example)
        tail = s[rank:].square().sum() if rank else torch.zeros(())
        assert torch.allclose((composed - layer.weight).square().sum(), tail.double(), atol=1e-12)
        kept, layer.weight.data = layer.weight.data, composed.contiguous()
        expected = layer(example)
        layer.weight.data = kept
    assert torch.allclose(found, expected, atol=1e-12)


def test_a_matrix_with_nan_is_an_error_that_names_the_layer() -> None:
    matrix = torch.ones(4, 3)
    matrix[1, 1] = float("nan")
    with pytest.raises(ValueError, match=r"layer3\.conv1: .* NaN or infinite numbers \(1 of 12\)"):
        svd(matrix, name="layer3.conv1")


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("kind", "side"), [(nn.Conv1d, (9,)), (nn.Conv3d, (3, 4, 4))])
def test_what_series_and_volumes_are_factorised_into_is_proven(kind, side, normed):
    torch.manual_seed(0)
    first, second = kind(3, 12, 3, padding=2, dilation=2), kind(12, 16, 3, padding=1, bias=False)
    model = nn.Sequential(first, nn.ReLU(), nn.utils.parametrizations.weight_norm(second) if normed else second)
    x = torch.randn(2, 3, *side)
    found = es.compress(model, x, budget=es.Budget(macs=0.6), method=es.SVDOneShot())
    assert found.proof.passed
    assert any(isinstance(layer, FactorisedConv) for layer in found.model.modules())
