"""Surgery: the input is left alone, optimiser state and tied weights are carried along, files are whole or absent."""

import copy
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from espalier.graph import Graph, trace
from espalier.plan import Budget, Plan
from espalier.run.models import build_model
from espalier.solver import solve
from espalier.surgery import load, mask, save, shrink, shrink_, verify

EXAMPLE = torch.zeros(1, 3, 16, 16)


def network(name: str = "resnet20a") -> nn.Module:
    torch.manual_seed(0)
    return build_model(name, num_classes=10, in_channels=3, image_size=16).eval()


def planned(model: nn.Module, fraction: float = 0.5) -> tuple[Graph, Plan, Budget]:
    graph = trace(model, EXAMPLE)
    random = np.random.default_rng(0)
    budget = Budget(macs=fraction)
    return graph, solve(graph, {g.name: random.random(g.size) for g in graph.groups}, budget), budget


def test_shrink_leaves_the_model_alone_and_keeps_its_class() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    graph, plan, budget = planned(model)
    small = shrink(model, graph, plan)
    assert type(small) is type(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    verify(model, graph, plan, EXAMPLE, budget=budget, fresh=network).require()


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_the_next_step_is_that_of_the_masked_network_on_what_stayed(kind: str) -> None:
    model = network("resnet20").double()
    graph, plan, _ = planned(model)
    model = mask(model, graph, plan)
    model.eval()  # statistics of a batch would differ between widths only by rounding, but keep it exact

    def optimiser(parameters: object) -> torch.optim.Optimizer:
        if kind == "sgd":
            return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)  # type: ignore[arg-type]
        return torch.optim.AdamW(parameters, lr=0.001)  # type: ignore[arg-type]

    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    frozen = optimiser(model.parameters())
    model(x).square().sum().backward()
    # only what stays may move, or the big network would no longer be the masked one
    kept = graph.kept(dict(plan.keep))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        for dim, stay in kept.get(name, {}).items():
            gone = np.setdiff1d(np.arange(parameter.shape[dim]), stay)
            parameter.grad.index_fill_(dim, torch.from_numpy(gone), 0.0)
    frozen.step()
    small = copy.deepcopy(model)
    twin = optimiser(small.parameters())
    twin.load_state_dict(copy.deepcopy(frozen.state_dict()))
    for parameter in small.parameters():
        parameter.grad = None
    shrink_(small, graph, plan, optimizer=twin)
    twin.zero_grad()
    small(x).square().sum().backward()
    twin.step()
    frozen.zero_grad()
    model(x).square().sum().backward()
    frozen.step()
    big = dict(model.named_parameters())
    for name, parameter in small.named_parameters():
        expected = big[name].detach()
        for dim, stay in kept.get(name, {}).items():
            expected = expected.index_select(dim, torch.from_numpy(stay))
        assert torch.allclose(parameter.detach(), expected, rtol=1e-7, atol=1e-9), name


def test_tied_parameters_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 8, 3, padding=1)
            self.one = nn.Conv2d(8, 8, 3, padding=1)
            self.two = nn.Conv2d(8, 8, 3, padding=1)
            self.two.weight = self.one.weight
            self.head = nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.first(x))
            x = x + torch.relu(self.one(x))
            x = x + torch.relu(self.two(x))
            return self.head(x.mean((2, 3)))

    model = Tied()
    graph, plan, budget = planned(model, 0.6)
    small = shrink(model, graph, plan)
    assert small.one.weight is small.two.weight
    assert small.one.weight.shape[0] < 8
    verify(model, graph, plan, EXAMPLE, budget=budget, fresh=Tied).require()


def test_a_plan_that_removes_nothing_changes_nothing() -> None:
    model = network()
    graph, _, _ = planned(model)
    assert shrink_(copy.deepcopy(model), graph, Plan.dense(graph)) == {}


# -- files -------------------------------------------------------------------------------------------------------------


def small_network() -> nn.Module:
    model = network()
    graph, plan, _ = planned(model)
    return shrink(model, graph, plan)


def test_saved_and_loaded_it_gives_the_same_bits(tmp_path: Path) -> None:
    small = small_network()
    save(small, tmp_path / "small.safetensors")
    again = load(tmp_path / "small.safetensors", base=network())
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(small.eval()(x), again.eval()(x))


def test_files_that_are_not_what_they_should_be_are_named(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    save(small_network(), path)
    with pytest.raises(ValueError, match="structure"):
        load(path, base=nn.Sequential(nn.Conv2d(3, 8, 3)))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"small\.safetensors"):
        load(path, base=network())
    plain = tmp_path / "plain.safetensors"
    save_file({"weight": torch.zeros(2)}, plain)
    with pytest.raises(ValueError, match="no Espalier structure"):
        load(plain, base=network())


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "small.safetensors"
    save(small_network(), path)
    before = path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("espalier.surgery.files.save_file", full)
    with pytest.raises(OSError, match="No space"):
        save(network(), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


# -- verify names what fails ------------------------------------------------------------------------------------------


def failing(small: nn.Module, model: nn.Module, graph: Graph, plan: Plan, budget: Budget) -> set[str]:
    proof = verify(model, graph, plan, EXAMPLE, small=small, budget=budget, fresh=network)
    with pytest.raises(ValueError, match="verification failed"):
        proof.require()
    return {c.name for c in proof.checks if not c.passed}


def test_a_changed_weight_is_found() -> None:
    model = network()
    graph, plan, budget = planned(model)
    small = shrink(model, graph, plan)
    with torch.no_grad():
        small.layer2[0].conv1.weight[0] += 0.5
    assert failing(small, model, graph, plan, budget) == {"small equals masked"}


def test_another_width_is_found() -> None:
    model = network()
    graph, plan, budget = planned(model)
    other = solve(graph, {g.name: np.ones(g.size) for g in graph.groups}, Budget(macs=0.3))
    assert "planned cost equals built cost" in failing(shrink(model, graph, other), model, graph, plan, budget)


def test_a_budget_that_is_missed_or_wasted_is_found() -> None:
    model = network()
    graph, plan, _ = planned(model)
    small = shrink(model, graph, plan)
    assert failing(small, model, graph, plan, Budget(macs=0.4)) == {"budget"}
    assert failing(small, model, graph, plan, Budget(macs=0.8)) == {"budget"}


def test_a_cut_gradient_is_found() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.cut = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.a(x))
            return self.b(x.detach() if self.cut else x)

    model = Cut()
    graph, plan, budget = planned(model, 0.6)
    small = shrink(model, graph, plan)
    small.cut = True
    proof = verify(model, graph, plan, EXAMPLE, small=small, budget=budget)
    assert [c.name for c in proof.checks if not c.passed] == ["backward"]
