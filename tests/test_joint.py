"""Joint: one budget for blocks, channels, kernel shapes and ranks of one network."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import espalier as es
from espalier.forms import Rectangle
from espalier.graph.alternatives import alternatives_name
from espalier.layers import FactorisedConv
from espalier.methods.kernels import Kernels
from tests.test_contract import batch, optimizer_of

EXAMPLE = torch.zeros(1, 1, 8, 8)


class Wide(nn.Module):
    """A residual block and a wide layer of rank 4."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.block = Block(16)
        self.wide, self.head = nn.Conv2d(16, 48, 3, padding=1), nn.Linear(48, 10)
        weight = self.wide.weight.data
        weight.copy_((torch.randn(48, 4) @ torch.randn(4, 144) * 0.05).view_as(weight))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.wide(self.block(F.relu(self.bn(self.stem(x)))))).mean((2, 3)))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


def run_of(method: es.Joint, budget: es.Budget, *, steps: int, of: int) -> tuple[nn.Module, es.Run]:
    torch.manual_seed(0)
    model = Wide()
    dense = copy.deepcopy(model)
    run = es.attach(model, EXAMPLE, budget=budget, method=method)
    optimizer = optimizer_of(run)
    for step in range(steps):
        x, y = batch(step)
        F.cross_entropy(run.model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        run.step(progress=(step + 1) / of, optimizer=optimizer)
    return dense, run


@pytest.mark.parametrize(
    ("method", "budget", "steps"),
    [
        (es.Joint(blocks=False, shapes=False, fade=0.1), es.Budget(params=0.6), 60),
        (es.Joint(fade=0.1), es.Budget(macs=0.4, params=0.5), 60),
        (es.Joint(blocks=False, shapes=False, fade=0.1), es.Budget(params=0.6), 26),  # stopped while ranks sink
        (es.Joint(fade=0.1), es.Budget(macs=0.5), 5),  # stopped before anything was decided
    ],
)
def test_layers_end_in_the_forms_that_were_planned_and_all_is_proven(method, budget, steps):
    dense, run = run_of(method, budget, steps=steps, of=60)
    small = run.finish()
    assert run.forced == (steps < 60)
    es.verify(dense, run.dense_graph, run.plan, EXAMPLE, small=small, trained=True).require()
    found = es.cost(es.trace(small, EXAMPLE, rehearse=False))
    assert all(getattr(found, m) <= limit for m, limit in run.limits.items())
    if budget.params == 0.6:
        assert isinstance(small.wide, FactorisedConv), "its rank is low: two layers keep nearly all of it"
        assert small.stem.out_channels < 16 or small.block.conv1.out_channels < 16 or small.wide[1].out_channels < 48


def test_a_rank_gives_up_less_than_the_sum_of_its_triplets_beside_kernel_positions():
    kernel = Rectangle(0, 2, 0, 2)
    forms = Kernels({"layer": [[], [kernel]]}, ranks={"layer": [4, 0]})
    triplets = np.array([8.0, 4, 2, 1, 5])  # a quarter of which is behind rank 4
    [kept, given_up] = forms.scores({"layer": np.ones(9)}, {"layer": triplets})[alternatives_name("layer")]
    assert kept + given_up == pytest.approx(9.0), "the layer is worth what its positions are"
    assert given_up == pytest.approx(9.0 * 0.125)


def test_a_plan_is_measured_with_the_rectangles_that_it_leads_to():
    kernel = Rectangle(0, 2, 0, 2)
    lower, middle, upper = ([Rectangle(top, top, 0, 2)] for top in (2, 1, 0))
    forms = Kernels({"layer": [[*upper, *middle, *lower], [kernel]]})
    assert [forms.place("layer", 0)] == middle, "nothing was heard yet"
    taps = np.arange(9.0)
    forms.scores({"layer": taps}, {})
    measured = forms.place("layer", 0)
    forms.choose({alternatives_name("layer"): np.arange(1)})
    assert [measured] == lower == [forms.chosen["layer"]]


def test_a_pace_that_leaves_ranks_no_time_is_refused():
    with pytest.raises(ValueError, match="ranks fall after channels"):
        es.Joint(fade=0.3)


def test_layers_that_may_select_their_inputs_stand_beside_layers_that_may_be_factorised():
    class Centred(Wide):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(F.relu(self.wide(self.block(x - x.mean(1, keepdim=True)))).mean((2, 3)))

    model = Centred()
    run = es.attach(model, EXAMPLE, budget=es.Budget(macs=0.7), method=es.Joint())
    kinds = {g.kind for g in run.graph.groups}
    assert {"inputs", "form"} <= kinds, kinds
