"""Forwards that take another path at few widths only, which no rehearsal of all layers at once would try."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from proving import randomise
from torch import Tensor, nn

from espalier.graph import trace
from espalier.plan import Plan
from espalier.surgery import mask, shrink


class Branching(nn.Module):
    """Two convolutions of 8 and 4 channels, and what ``joins`` makes of their maps."""

    def __init__(self, joins: Callable[[Branching, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.wide, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.head = nn.Conv2d(4, 2, 1)
        self.kept = 6
        self.joins = joins

    def forward(self, x: Tensor) -> Tensor:
        wide = self.wide(x).relu()
        return self.head(self.joins(self, wide, self.last(wide)))


def added_where_shapes_agree(_: Branching, wide: Tensor, last: Tensor) -> Tensor:
    return last + wide if last.shape == wide.shape else last * 0.5


def by_a_remainder(_: Branching, wide: Tensor, last: Tensor) -> Tensor:
    return last.tanh() if wide.shape[1] % 7 == 0 else last


def by_what_is_computed_of_sizes(_: Branching, wide: Tensor, last: Tensor) -> Tensor:
    return last if 2 * last.size(1) != wide.size(1) + 1 else last.sigmoid()


def by_a_range(_: Branching, wide: Tensor, last: Tensor) -> Tensor:
    return last.tanh() if 5 <= wide.shape[1] < 7 else last


def by_a_number_that_the_module_keeps(model: Branching, wide: Tensor, last: Tensor) -> Tensor:
    return last.tanh() if wide.shape[1] == model.kept else last


def by_whether_something_is_left_over(model: Branching, wide: Tensor, last: Tensor) -> Tensor:
    return last.tanh() if wide.shape[1] & 3 == 3 or not model.wide.out_channels % 5 else last


def by_how_many_values_there_are(_: Branching, wide: Tensor, last: Tensor) -> Tensor:
    return last.tanh() if wide.numel() // len(wide) == 6 * 4 else last


@pytest.mark.parametrize(
    "joins",
    [
        by_whether_something_is_left_over,
        by_how_many_values_there_are,
        added_where_shapes_agree,
        by_a_remainder,
        by_what_is_computed_of_sizes,
        by_a_range,
        by_a_number_that_the_module_keeps,
    ],
)
def test_of_all_widths_that_can_be_planned_none_takes_another_path(joins: Callable[..., Tensor]) -> None:
    model = randomise(Branching(joins)).eval()
    x = torch.randn(2, 3, 2, 2)
    graph = trace(model, x[:1])
    assert any(g.size > 1 for g in graph.groups)
    for counts in product(*(range(1, g.size + 1) for g in graph.groups)):
        keep = {g.name: np.arange(n) for g, n in zip(graph.groups, counts, strict=True)}
        plan = Plan(keep, {g.name: g.size for g in graph.groups})
        with torch.no_grad():
            assert torch.allclose(shrink(model, graph, plan)(x), mask(model, graph, plan)(x), atol=1e-6), counts
