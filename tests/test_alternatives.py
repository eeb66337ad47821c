"""Alternatives: what is planned for forms of layers is what the built network costs, alone and together with channels."""

from __future__ import annotations

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from espalier.carving import put_in_place
from espalier.costs import CostModel, cost
from espalier.forms import dense_sequence, find_places, sequence, sequential, stages
from espalier.forms.form import cost_of
from espalier.graph import trace, with_alternatives
from espalier.graph.alternatives import alternatives_name
from espalier.plan import Budget, Plan
from espalier.run.models import build_model
from espalier.solver import solve, unused_blocks
from espalier.surgery import shrink


def alternatives(model, example, *, forms=("channel", "spatial", "tucker", "tt")):
    """Rungs of increasing cost from a mix of forms, for every layer that can take one."""
    places, _ = find_places(model, example)
    found = {}
    for place in places.values():
        options = []
        for form in forms if not place.linear else ("channel",):
            count = {"channel": 1, "spatial": 1, "tucker": 2, "tt": 3}[form]
            for rank in range(1, min(place.in_channels, place.out_channels) + 1, 3):
                options.append(sequence(place, form, [rank + i for i in range(count)]))
        dense = dense_sequence(place)
        least = (0, 0)
        kept = []
        for option in sorted(options, key=lambda c: cost_of(place, c)):
            here = cost_of(place, option)
            if here[1] > least[1] and here < cost_of(place, dense) and here[1] < cost_of(place, dense)[1]:
                kept.append(option)
                least = here
        if kept:
            found[place.name] = [*kept, dense]
    return places, found


def build(model, places, found, keep):
    """The network that a plan over alternatives describes, with arbitrary weights."""
    small = copy.deepcopy(model)
    for name, options in found.items():
        option = options[keep[alternatives_name(name)] - 1]
        if option.name == "dense":
            continue
        layer = small.get_submodule(name)
        ends = [layer.weight.shape[1], *option.widths, layer.weight.shape[0]]
        row = [(1, 1)] if places[name].linear else [s.kernel for s in stages(places[name], option.name)]
        weights = [torch.randn(o, i, *row[min(n, len(row) - 1)]) for n, (i, o) in enumerate(pairwise(ends))]
        put_in_place(small, layer, sequential(places[name], option.name, weights, layer.bias))
    return small


@pytest.mark.parametrize("name", ["resnet20", "resnet20a", "vgg16_bn"])
def test_planned_cost_of_any_forms_is_that_of_the_built_network(name: str) -> None:
    model, example = build_model(name, num_classes=10), torch.zeros(2, 3, 32, 32)
    graph = trace(model, example)
    places, found = alternatives(model, example)
    assert len(found) > 10
    joint = with_alternatives(graph, found)
    assert cost(joint) == cost(graph)
    draw = np.random.default_rng(0)
    for _ in range(3):
        keep = {alternatives_name(n): int(draw.integers(1, len(r) + 1)) for n, r in found.items()}
        plan = Plan({n: np.arange(k) for n, k in keep.items()})
        assert cost(joint, plan) == cost(trace(build(model, places, found, keep), example, rehearse=False))


def test_one_budget_over_channels_and_forms_is_exact() -> None:
    model, example = build_model("resnet20", num_classes=10), torch.zeros(1, 3, 32, 32)
    graph = trace(model, example)
    places, found = alternatives(model, example)
    joint = with_alternatives(graph, found)
    draw = np.random.default_rng(1)
    scores = {g.name: draw.random(g.size) * (0.02 if g.options else 1.0) for g in joint.groups}
    budget = Budget(macs=0.3, params=0.4, activation_memory=0.9)
    plan = solve(joint, scores, budget)
    assert unused_blocks(joint, plan, budget) == []
    planned = cost(joint, plan)
    limits = budget.limits(cost(graph))
    assert all(getattr(planned, m) <= limit for m, limit in limits.items())
    channels = Plan({n: u for n, u in plan.keep.items() if not n.endswith(":form")})
    forms = {n: len(u) for n, u in plan.keep.items() if n.endswith(":form")}
    assert any(forms[alternatives_name(n)] < len(r) for n, r in found.items())
    assert any(len(u) < graph.group(n).size for n, u in channels.keep.items())
    small = build(shrink(model, graph, channels), places, found, forms)
    assert cost(trace(small, example, rehearse=False)) == planned


def test_moving_alternatives_step_by_step_adds_up_to_the_whole() -> None:
    model, example = build_model("resnet20", num_classes=10), torch.zeros(1, 3, 32, 32)
    joint = with_alternatives(trace(model, example), alternatives(model, example)[1])
    costs = CostModel(joint)
    state = costs.at(joint.sizes)
    draw = np.random.default_rng(2)
    for _ in range(200):
        group = int(draw.integers(len(joint.groups)))
        state.move(group, int(draw.integers(1, joint.groups[group].size + 1)) - int(state.keep[group]))
    whole = costs.cost(state.keep)
    assert (state.value("macs"), state.value("params"), state.activation_memory) == (
        whole.macs, whole.params, whole.activation_memory,
    )  # fmt: skip


def test_a_group_of_alternatives_steps_over_options_that_save_little() -> None:
    """From dense straight to the option that gives up least per MAC saved, not to the nearest, which saves nothing."""
    model, example = nn.Sequential(nn.Linear(32, 32, bias=False)), torch.zeros(1, 32)
    places, _ = find_places(model, example)
    options = [*(sequence(places["0"], "channel", [r]) for r in range(1, 16)), dense_sequence(places["0"])]
    joint = with_alternatives(trace(model, example), {"0": options})
    worth = np.array([10.0, 1.0, *[0.01] * 13, 1.0])
    plan = solve(joint, {"0:form": worth}, Budget(macs=0.9))
    assert cost(joint, plan).macs == 14 * 64  # the fill gives back what fits
    tight = solve(joint, {"0:form": worth}, Budget(macs=0.13))
    assert len(tight.keep["0:form"]) == 2


def test_a_layer_that_reads_what_values_select_is_placed_as_it_is_counted() -> None:
    class Selecting(nn.Module):
        """As a detector's head, which sees as many proposals as pass a threshold."""

        def __init__(self) -> None:
            super().__init__()
            self.scores, self.head = nn.Linear(8, 1), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            chosen = x[self.scores(x)[:, 0] > 0.1]
            return self.head(chosen).sum(0 if float(chosen.sum()) > -1e9 else 1)

    model, example = Selecting(), torch.randn(10, 8)
    places, _ = find_places(model, example)
    assert places["head"].positions == 10
    with_alternatives(trace(model, example), {"head": [dense_sequence(places["head"])]})


def test_what_cannot_take_a_form_says_why() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice = nn.Conv2d(4, 4, 3, padding=1)
            self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
            self.circular = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
            self.same = nn.Conv2d(4, 4, 3, padding="same")
            self.even = nn.Conv2d(4, 4, 2, padding="same")
            self.idle = nn.Linear(4, 4)

        def forward(self, x):
            return self.even(self.same(self.circular(self.grouped(self.twice(self.twice(x))))))

    places, reasons = find_places(Net(), torch.zeros(1, 4, 8, 8))
    assert list(places) == ["same"]
    assert places["same"].padding == (1, 1)
    assert reasons == {
        "twice": "it runs 2 times in one forward",
        "grouped": "grouped convolution",
        "circular": "padding mode 'circular'",
        "even": "padding 'same' of an even kernel is uneven",
        "idle": "it runs 0 times in one forward",
    }


def test_alternatives_that_do_not_end_in_the_dense_layer_is_refused() -> None:
    model, example = nn.Sequential(nn.Linear(8, 8)), torch.zeros(1, 8)
    places, _ = find_places(model, example)
    with pytest.raises(ValueError, match="last sequence must be the dense layer"):
        with_alternatives(trace(model, example), {"0": [sequence(places["0"], "channel", [2])]})
    with pytest.raises(ValueError, match="runs 0 times"):
        with_alternatives(trace(model, example), {"1": [dense_sequence(places["0"])]})
