"""Forms are objects with one contract; factorised layers answer what the layer answered that was there."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import espalier as es
from espalier.costs import cost
from espalier.forms import FORMS, find_places, sequence, sequential
from espalier.forms.candidates import compose, factorise
from espalier.graph import trace, with_alternatives
from espalier.layers import FactorisedConv, FactorisedLinear
from espalier.plan import Plan
from espalier.solver import BudgetError
from espalier.surgery import put_layer

KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def test_the_page_about_forms_gives_a_working_form() -> None:
    page = (Path(__file__).parent.parent / "docs" / "add_a_form.md").read_text()
    space: dict[str, Any] = {}
    before = dict(FORMS)
    try:
        for block in re.findall(r"```python\n(.*?)```", page, flags=re.S):
            exec(compile(block, "add_a_form.md", "exec"), space)
        run, small = space["run"], space["small"]
        assert any(c.name == "cp" for c in run.sequences.values())
        built = cost(trace(small, space["example"], rehearse=False))
        assert (built.macs, built.params) == (run.cost.macs, run.cost.params)
        assert es.verify(space["model"], run.graph, run.plan, space["example"], small=small) is not None
        check("cp", 2)
    finally:
        FORMS.clear()
        FORMS.update(before)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("form", list(FORMS))
def test_a_form_composes_to_what_its_layers_compute_at_the_planned_cost(form: str, axes: int) -> None:
    if FORMS[form].possible((8, 6, *((1, 3) if axes == 1 else (3, 3)))):
        check(form, axes)


def check(form: str, axes: int) -> None:
    layer: Any = KINDS[axes](6, 8, 3, stride=2, padding=1).double()
    model, example = nn.Sequential(layer), torch.randn(2, 6, *(7,) * axes, dtype=torch.float64)
    place = find_places(model, example)[0]["0"]
    ranks = [2] * FORMS[form].ranks
    factors = factorise(layer.weight, form, ranks)
    row = sequential(place, form, factors.weights, layer.bias)
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[axes]
    torch.testing.assert_close(row(example), convolve(example, compose(factors), layer.bias, stride=2, padding=1))
    option = sequence(place, form, ranks)
    from espalier.forms import dense_sequence

    joint = with_alternatives(trace(model, example), {"0": [option, dense_sequence(place)]})
    put_layer(model, "0", row)
    assert cost(joint, Plan({"0:form": torch.arange(1).numpy()})) == cost(trace(model, example, rehearse=False))


def test_an_unknown_form_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(ValueError, match="channel, spatial, tucker, tt"):
        es.TTLC(forms=("cp",))


# -- what the forward reads of a layer


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, stride=2)
        self.f = nn.Linear(32, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x.to(self.a.weight.dtype)).relu()
        x = F.pad(x, (0, self.b.stride[0] - 1) * 2).view(-1, self.b.in_channels, x.shape[2] + 1, x.shape[3] + 1)
        return self.f(self.b(x).relu().mean((2, 3)).view(-1, self.f.in_features))


@pytest.mark.parametrize("method", [es.SVDOneShot(), es.DPRP(), es.TTLC(search=0)], ids=lambda m: m.name)
def test_a_forward_that_reads_its_layers_runs_factorised(method: Any, tmp_path: Path) -> None:
    example = torch.zeros(1, 3, 8, 8)
    run = es.attach(Reads(), example, budget=es.Budget(macs=0.5), method=method)
    run.model.train()(torch.randn(2, 3, 8, 8)).square().mean().backward()
    small = run.finish().eval()
    assert cost(trace(small, example, rehearse=False)).macs == run.cost.macs  # reading a dtype composes nothing
    x = torch.randn(2, 3, 8, 8)
    es.save(small, tmp_path / "small.safetensors")
    again = es.load(tmp_path / "small.safetensors", base=Reads()).eval()
    assert any(isinstance(m, (FactorisedConv, FactorisedLinear)) for m in again.modules())
    with torch.no_grad():
        assert torch.equal(again(x), small(x))
        torch.testing.assert_close(torch.export.export(small, (x,)).module()(x), small(x))
        torch.testing.assert_close(torch.jit.trace(small, (x,))(x), small(x))


def row() -> FactorisedConv:
    first, last = nn.Conv2d(3, 4, (1, 3), padding=(0, 1), bias=False), nn.Conv2d(4, 8, (3, 1), padding=(1, 0))
    return FactorisedConv(first, last, kernel_size=(3, 3), padding=(1, 1))


def test_the_composed_weight_computes_what_the_row_computes_and_passes_gradients_on() -> None:
    layer, x = row(), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding), layer(x))
    assert layer.weight.shape == (8, 3, 3, 3) and layer.weight.requires_grad
    layer.weight.square().sum().backward()
    assert all(float(stage.weight.grad.abs().max()) > 0 for stage in layer)
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))
    torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x))


def test_a_file_with_plain_rows_still_loads(tmp_path: Path) -> None:
    """As the first release saved them."""
    net, old = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)), nn.Sequential(nn.Sequential(*row()))
    es.save(old, tmp_path / "old.safetensors")
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(es.load(tmp_path / "old.safetensors", base=net)(x), old(x))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.Conv2d(16, 16, 3, padding=1)
        self.w = nn.Parameter(torch.randn(8, 16, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x) - F.conv2d(x, self.a.weight.sum((2, 3), keepdim=True))
        return F.conv2d(self.b(x).relu(), self.w)


def test_a_weight_that_the_forward_uses_twice_keeps_its_form_and_says_so() -> None:
    places, reasons = find_places(Twice(), torch.zeros(1, 3, 8, 8))
    assert list(places) == ["b"]
    assert reasons["a"] == "the forward uses its weight a second time, in sum"
    assert reasons["w"].startswith("conv2d is called with this parameter")


class Turned(nn.Module):
    """Weights that are made of parameters: turned, and added up."""

    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.randn(3, 3, 3, 16))
        self.v, self.w = nn.Parameter(torch.randn(8, 16, 1, 1)), nn.Parameter(torch.randn(8, 16, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.k.permute(3, 2, 0, 1), padding=1).relu()
        return F.conv2d(x, self.w + F.pad(self.v, [1, 1, 1, 1]), padding=1)


def test_a_budget_that_only_other_forms_could_meet_names_the_parameters_that_weights_are_made_of() -> None:
    reasons = find_places(Turned(), torch.zeros(1, 3, 8, 8))[1]
    assert set(reasons) == {"k", "w"}
    with pytest.raises(es.BudgetError, match=r"keep their form: k \(conv2d is called with .* what is made of it"):
        es.attach(Turned(), torch.zeros(1, 3, 8, 8), budget=es.Budget(macs=0.5), method=es.DPRP())


@pytest.mark.parametrize(
    "method", [es.SVDOneShot(), es.DPRP(), es.TTLC(search=0), es.MGP(), es.Joint()], ids=lambda m: m.name
)
def test_a_budget_out_of_reach_says_which_layers_keep_their_form(method: Any) -> None:
    with pytest.raises(BudgetError, match=r"keep their form: .*a \(the forward uses its weight a second time"):
        es.attach(Twice(), torch.zeros(1, 3, 8, 8), budget=es.Budget(macs=0.001), method=method)


class Indexes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.a, nn.Conv2d)  # no row of layers is one
        return self.b(self.a(x))


def test_a_structure_that_the_forward_refuses_is_found_before_training() -> None:
    run = es.attach(Indexes(), torch.zeros(1, 8, 8, 8), budget=es.Budget(macs=0.6), method=es.TTLC(search=0))
    assert run.skipped["a"].startswith("the forward does not take it factorised (AssertionError")
    assert isinstance(run.finish().a, nn.Conv2d)


def test_tt_lc_refuses_at_attach_what_its_first_step_would_refuse() -> None:
    """The core of a train is split at a fraction of its full rank, so that rank one is not the least it has."""
    torch.manual_seed(0)
    model, example = (
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)),
        torch.zeros(1, 3, 8, 8),
    )
    for share in range(20, 100, 4):
        try:
            run = es.attach(model, example, budget=es.Budget(macs=share / 100), method=es.TTLC(search=0, forms=("tt",)))
        except BudgetError:
            continue
        run.finish()
        return
    pytest.fail("no budget could be met")
