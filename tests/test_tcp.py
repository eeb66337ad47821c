"""TCP: it arrives at the budget by fading, removes without a jump, and carries optimiser and resume state along."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import espalier as es
from espalier.costs import CostModel
from espalier.graph import trace
from espalier.methods.importance import SCORES, Sensitivity, diminishing, score_units
from espalier.methods.tcp import TCP
from espalier.methods.units import Units
from espalier.plan import Budget
from tests.steps import EXAMPLE, batch, network, train_step, train_through

STEPS = 120


def test_a_score_of_the_weights_arrives_at_the_budget_in_multiples() -> None:
    model = network()
    budget = Budget(macs=0.5, multiple_of=2)
    run = TCP(importance="scale").start(model, EXAMPLE, budget)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    train_through(run, optimizer, steps=STEPS)
    small = run.finish()
    assert not run.forced
    assert run.done
    graph = trace(small, EXAMPLE)
    assert es.cost(graph) == run.cost
    assert run.cost.macs <= run.limits["macs"]
    assert run.cost.macs >= 0.9 * run.limits["macs"]
    assert all(g.size % 2 == 0 for g in graph.groups)


def test_early_everything_is_decided_at_once_fades_until_reach_and_leaves_every_group_its_floor() -> None:
    model = network()
    run = TCP(early=True, floor=0.4, fade=0.1, end_at=0.4).start(model, EXAMPLE, Budget(macs=0.5))
    floor, sizes = dict(run.floor), {g.name: g.size for g in run.graph.groups}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    frozen, gone_at, cost = None, [], run.cost.macs
    for step in range(STEPS):
        train_step(run, optimizer, step)
        progress = (step + 1) / STEPS
        run.step(progress=progress, optimizer=optimizer)
        if progress >= 0.03 and not run.done:
            plan = run.keep_set(run.limits_at(progress), progress)
            assert es.cost(run.graph, plan).macs <= run.limits["macs"]  # of the final budget from the first decision on
        frozen = progress if run.settled and frozen is None else frozen
        if run.cost.macs < cost:
            cost = run.cost.macs
            gone_at.append(progress)
    run.finish()
    assert not run.forced and run.cost.macs <= run.limits["macs"]
    assert frozen is not None and frozen <= 0.32
    assert gone_at and min(gone_at) > 0.3  # all arrive together, by the pace of each
    kept = {name: len(units) for name, units in run.plan.keep.items()}
    assert all(kept[n] >= floor[n] >= 0.4 * sizes[n] for n in floor)


def test_only_units_outside_the_keep_set_are_pressed() -> None:
    model = network()
    run = TCP().start(model, EXAMPLE, Budget(macs=0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for step in range(10):
        train_step(run, optimizer, step)
        run.step(progress=(step + 1) / STEPS, optimizer=optimizer)
    before = run._norm().clone()
    pressed = run.pressed.clone()
    assert pressed.any()
    assert not pressed.all()
    run._press(0.01, optimizer)
    after = run._norm()
    assert torch.equal(before[~pressed], after[~pressed])
    assert (after[pressed] < before[pressed]).all()


def test_strength_rises_when_the_mass_lags_and_falls_when_it_leads() -> None:
    model = network()
    run = TCP().start(model, EXAMPLE, Budget(macs=0.5))
    run.pressed[:5] = True
    run._find_busy(run.pressed.numpy().copy())
    run.reference = run._norm().clone()
    run.since[:5] = 0.1
    run.strength = 1.0
    run._adapt(0.1 + run.method.fade)  # everything is due, nothing has faded
    assert run.strength > 1.0
    run.strength = 1.0
    run.reference *= 4.0  # as if three quarters had gone at once
    run._adapt(0.1)
    assert run.strength < 1.0


def test_energy_taken_in_pieces_is_the_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    units = Units(model, trace(model, EXAMPLE))
    matrices = [c for c in (*units.consumers, *units.producers) if c.parameter.ndim > 1]
    whole = [c.energy() for c in matrices]
    together = units.consumer_energy()
    monkeypatch.setattr("espalier.methods.units._PIECE", 50)
    for columns, expected in zip(matrices, whole, strict=True):
        torch.testing.assert_close(columns.energy(), expected)
    for piece in (50, 5000):
        monkeypatch.setattr("espalier.methods.units._PIECE", piece)
        torch.testing.assert_close(Units(model, units.graph).consumer_energy(), together)
    torch.testing.assert_close(
        units.sum(zip(units.consumers, [c.energy() for c in units.consumers], strict=True)), together
    )


def test_sensitivity_is_the_derivative_of_a_gate_on_the_unit() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(64, 10))
    graph = trace(model, EXAMPLE)
    units = Units(model, graph)
    heard = Sensitivity(units)
    x, y = batch(0)
    nn.functional.cross_entropy(model(x), y).backward()
    heard.batch_done()
    group = graph.index["0"]
    ours = heard.value[units.offsets[group] : units.offsets[group + 1]]
    gate = torch.ones(1, 6, 1, 1, requires_grad=True)
    hidden = torch.relu(model[0](x)) * gate
    nn.functional.cross_entropy(model[4](model[3](model[2](hidden))), y).backward()
    assert gate.grad is not None
    expected = gate.grad.reshape(-1).square()
    assert torch.allclose(ours / ours.sum(), expected / expected.sum(), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("score", SCORES)
def test_every_score_gives_one_finite_value_per_unit_and_leaves_the_model_alone(score: str) -> None:
    model = network()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
    before = copy.deepcopy(model.state_dict())
    graph = trace(model, EXAMPLE)
    values = score_units(model, graph, score, [batch(0), batch(1)])
    assert {n: len(v) for n, v in values.items()} == {g.name: g.size for g in graph.groups}
    assert all(np.isfinite(v).all() and (v >= 0).all() for v in values.values())
    assert any(v.std() > 0 for v in values.values())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_graph_after_a_removal_is_what_a_fresh_trace_finds() -> None:
    model = network()
    run = TCP().start(model, EXAMPLE, Budget(macs=0.5))
    random = np.random.default_rng(0)
    stay = {g.name: np.sort(random.permutation(g.size)[: max(1, g.size // 2)]) for g in run.graph.groups}
    run.remove(stay, None)
    fresh = trace(model, EXAMPLE)
    assert {g.name: g.size for g in fresh.groups} == {g.name: g.size for g in run.graph.groups}
    assert CostModel(fresh).cost(fresh.sizes) == run.cost


def test_diminishing_returns_keep_the_order_and_the_total_and_lift_the_last_unit() -> None:
    scores = np.array([4.0, 1.0, 3.0, 0.0, 2.0])
    lifted = diminishing(scores, 0.5)
    assert (np.argsort(-lifted, kind="stable") == np.argsort(-scores, kind="stable")).all()
    assert lifted.sum() == pytest.approx(scores.sum())
    assert lifted[0] / scores[0] > 1 > lifted[1] / scores[1]
    assert (diminishing(scores, 1.0) == scores).all()
    assert (diminishing(np.zeros(3), 0.5) == 0).all()
