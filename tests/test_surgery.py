"""Surgery: the input is left alone, optimiser state and tied weights are carried along, files are whole or absent."""

import copy
import itertools
import os
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import StandardisedConv2d
from proving import randomise
from safetensors.torch import save_file
from torch import Tensor, nn

from espalier import carving
from espalier.graph import Graph, trace
from espalier.plan import Budget, Plan
from espalier.run.models import build_model
from espalier.solver import solve
from espalier.surgery import load, mask, save, shrink, shrink_, verify
from espalier.surgery.files import ATTRIBUTES
from tests.forked import forked

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


def test_a_graph_of_another_model_is_refused() -> None:
    graph, plan, _ = planned(network())
    wider = build_model("resnet20a", num_classes=10, in_channels=4, image_size=16)
    other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3))
    for model, words in ((wider, r"'conv1.weight' has shape \(16, 4, 3, 3\)"), (other, "'conv1.weight' is not there")):
        before = copy.deepcopy(model.state_dict())
        for act in (shrink, shrink_, mask):
            with pytest.raises(ValueError, match=f"of another model: {words}.*trace again"):
                act(model, graph, plan)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match="expected a Budget"):
        verify(network(), graph, plan, EXAMPLE, budget=0.5)  # type: ignore[arg-type]


class Gated(nn.Module):
    """Keeps the width of its child where nobody sees it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self._width = channels
        self.conv = nn.Conv2d(3, 2 * channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y[:, : self._width] * y[:, self._width :].sigmoid()


def gated() -> nn.Module:
    return nn.Sequential(Gated(12), nn.ReLU(), nn.Conv2d(12, 4, 3))


def test_a_module_that_repeats_the_width_of_its_child_is_refreshed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not trace(gated(), EXAMPLE).groups

    def refresh_gated(module: Gated, name: str, kept: object, width: int | None) -> None:
        module._width = module.conv.out_channels // 2  # the child's own numbers are true already

    monkeypatch.setitem(carving.REFRESH, Gated, refresh_gated)
    monkeypatch.setitem(ATTRIBUTES, Gated, ("_width",))
    model = gated()
    graph = trace(model, EXAMPLE)
    assert [g.size for g in graph.groups] == [12]
    budget = Budget(macs=0.5)
    plan = solve(graph, {g.name: np.arange(g.size) + 1.0 for g in graph.groups}, budget)
    verify(model, graph, plan, EXAMPLE, budget=budget, fresh=gated).require()
    assert shrink(model, graph, plan)[0]._width == len(plan.keep[graph.groups[0].name])  # type: ignore[index]


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


def test_gradients_optimiser_state_and_tied_parameters_are_cut_together() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 8), (8, 8), (8, 8)))
            self.c.weight, self.head = self.b.weight, nn.Conv2d(8, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.c(self.b(self.a(x)).relu()).relu())

    model = Tied()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    optimizer.step()
    graph, plan, _ = planned(model, 0.6)
    before = {n: (p.grad.clone(), optimizer.state[p]["exp_avg"].clone()) for n, p in model.named_parameters()}
    kept = shrink_(model, graph, plan, optimizer=optimizer)
    assert model.b.weight is model.c.weight and model.b.weight.shape[0] < 8
    listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert listed == [id(p) for p in model.parameters()] and set(optimizer.state) == set(model.parameters())
    for name, parameter in model.named_parameters():
        gradient, moment = before[name]
        for dim, stay in kept.get(name, {}).items():
            gradient, moment = (t.index_select(dim, torch.from_numpy(stay)) for t in (gradient, moment))
        assert torch.equal(parameter.grad, gradient)
        assert torch.equal(optimizer.state[parameter]["exp_avg"], moment)


def test_a_baked_weight_is_trained_on_and_what_made_it_is_forgotten() -> None:
    model = nn.Sequential(
        StandardisedConv2d(3, 8, 3), nn.ReLU(), StandardisedConv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    optimizer.step()
    graph, plan, _ = planned(model)
    shrink_(model, graph, plan, optimizer=optimizer)
    assert type(model[0]) is type(model[2]) is nn.Conv2d
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    assert set(optimizer.state) <= set(model.parameters())
    before = model[2].weight.detach().clone()
    optimizer.zero_grad()
    model(torch.randn(2, 3, 16, 16)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[2].weight, before)


def test_a_copy_with_baked_weights_has_nothing_of_the_model() -> None:
    model = nn.Sequential(StandardisedConv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), StandardisedConv2d(8, 6, 3))
    model = nn.Sequential(*model, nn.ReLU(), nn.Conv2d(6, 2, 1), nn.Conv2d(2, 2, 1)).train()
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    before = copy.deepcopy(model)
    graph, plan, _ = planned(model)
    small = shrink(model, graph, plan)
    assert graph.baked and type(small[0]) is nn.Conv2d and type(model[0]) is StandardisedConv2d
    memory = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    assert memory.isdisjoint(t.untyped_storage().data_ptr() for t in small.state_dict().values())
    assert all(p.grad is None for p in small.parameters()) and all(p.grad is not None for p in model.parameters())
    for (name, was), now in zip(before.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(was, now), name


def test_a_shared_module_stays_shared_in_memory_and_on_disk() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 1)
            self.one = self.two = StandardisedConv2d(8, 8, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.two(self.one(self.first(x)).relu()).relu())

    model = Twice().eval()
    graph, plan, budget = planned(model)
    small = shrink(model, graph, plan)
    assert small.one is small.two and small.one.in_channels == small.one.out_channels < 8
    verify(model, graph, plan, EXAMPLE, budget=budget, fresh=Twice).require()


def test_frozen_parameters_stay_frozen_and_the_memory_format_stays() -> None:
    model = network().to(memory_format=torch.channels_last)
    model.conv1.weight.requires_grad_(False)
    graph, plan, _ = planned(model)
    small = shrink(model, graph, plan)
    assert not small.conv1.weight.requires_grad and small.linear.weight.requires_grad
    weight = small.layer2[0].conv2.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def test_a_large_tensor_is_cut_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carving, "_PIECE", 100)
    tensor = torch.randn(30, 20, 3)
    rows, columns = torch.tensor([0, 1, 5, 17, 28, 29]), torch.tensor([2, 3, 19])
    found = carving.select(tensor, {0: rows, 1: columns})
    assert found.is_contiguous() and torch.equal(found, tensor[rows][:, columns])


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


def test_a_network_in_channels_last_is_proven_as_well() -> None:
    """A file keeps no memory layout, and a convolution sums in another order in another one."""
    torch.manual_seed(0)
    model, x = randomise(build_model("resnet8", num_classes=10)).eval(), torch.randn(1, 3, 32, 32)
    graph = trace(model, x)
    plan = Plan({g.name: np.arange(max(1, g.size // 2)) for g in graph.groups})
    verify(model, graph, plan, x, small=shrink(model, graph, plan).to(memory_format=torch.channels_last)).require()


def test_weights_that_are_not_aligned_are_proven_as_well(tmp_path: Path) -> None:
    """Tensors of a file that is mapped into memory begin anywhere, and matrix products sum in another order there."""
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Flatten(), nn.Linear(300, 64), nn.ReLU(), nn.Linear(64, 10)).eval(),
        torch.zeros(1, 3, 10, 10),
    )
    for p in model.parameters():
        room = torch.empty(p.numel() + 16)
        skip = next(i for i in range(16) if (room.data_ptr() // 4 + i) % 16 == 2)
        p.data = room[skip : skip + p.numel()].view_as(p).copy_(p)
    graph = trace(model, x)
    verify(model, graph, Plan.dense(graph), torch.randn(1, 3, 10, 10)).require()
    small = shrink(model, graph, Plan({g.name: np.arange(g.size // 2) for g in graph.groups}))
    save(small, tmp_path / "small.safetensors")
    again = load(tmp_path / "small.safetensors", base=copy.deepcopy(model))
    assert {p.data_ptr() % 64 for p in again.parameters()} == {p.data_ptr() % 64 for p in small.parameters()} == {0}


def test_a_layer_that_stands_for_another_of_its_type_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
    small = copy.deepcopy(model)
    small[2] = nn.Conv2d(8, 4, (1, 3), stride=(2, 1), padding=(0, 1), bias=False)
    save(small, tmp_path / "small.safetensors")
    again = load(tmp_path / "small.safetensors", base=copy.deepcopy(model))
    x = torch.randn(1, 3, 8, 8)
    assert again[2].stride == (2, 1)
    assert torch.equal(again(x), small(x))


def test_files_that_are_not_what_they_should_be_are_named(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    save(small_network(), path)
    with pytest.raises(ValueError, match="structure"):
        load(path, base=nn.Sequential(nn.Conv2d(3, 8, 3)))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"small\.safetensors"):
        load(path, base=network())
    torch.save(network().state_dict(), path)
    with pytest.raises(ValueError, match=r"small\.safetensors"):
        load(path, base=network())
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing.safetensors", base=network())
    plain = tmp_path / "plain.safetensors"
    save_file({"weight": torch.zeros(2)}, plain)
    with pytest.raises(ValueError, match="no Espalier structure"):
        load(plain, base=network())


@pytest.mark.parametrize("step", ["espalier.surgery.files.save_file", "espalier.surgery.files.os.replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "small.safetensors"
    save(small_network(), path)
    before = path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(step, full)
    with pytest.raises(OSError, match=r"small\.safetensors: cannot be written .*No space.*untouched"):
        save(network(), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_a_disk_that_is_really_full_is_said_in_one_line(tmp_path: Path) -> None:
    """In a process of its own: no file of it may become larger than a few blocks."""
    import resource

    def act() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
        try:
            save(nn.Linear(64, 64), "small.safetensors")
        except OSError as error:
            sys.stdout.write(f"{error}\n")

    said = forked(act, folder=tmp_path).stdout
    assert said.startswith("small.safetensors: cannot be written (") and said.count("\n") == 1
    assert os.listdir(tmp_path) == []


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


class Detects(nn.Module):
    """Gives only what is above a threshold that nothing passes."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        found = self.head(self.body(x).relu())
        return found[found > 1e6]


def test_what_a_detector_computes_is_compared_where_it_finds_nothing() -> None:
    model, x = Detects().eval(), torch.randn(1, 3, 8, 8)
    graph = trace(model, x)
    plan = Plan({graph.groups[0].name: np.arange(0, 8, 2)})
    small = shrink(model, graph, plan)
    assert verify(model, graph, plan, x, small=small).passed and small(x).numel() == 0
    with torch.no_grad():
        small.head.bias[1] += 0.01
    failed = [c.name for c in verify(model, graph, plan, x, small=small).checks if not c.passed]
    assert failed == ["small equals masked"]


def test_a_slow_machine_refutes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    graph, plan, budget = planned(model)
    monkeypatch.setattr(time, "monotonic", itertools.count(step=100).__next__)  # seconds from one operation to the next
    assert verify(model, graph, plan, EXAMPLE, budget=budget).require()


def test_a_network_that_was_trained_since_is_proven_with_its_own_weights() -> None:
    model = network()
    graph, plan, budget = planned(model)
    small = shrink(model, graph, plan)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert verify(model, graph, plan, EXAMPLE, small=small, trained=True, budget=budget).require()
    small.layer1[0].conv1.stride = (2, 2)  # something that no removal does
    proof = verify(model, graph, plan, EXAMPLE, small=small, trained=True, budget=budget)
    assert "small equals masked" in {c.name for c in proof.checks if not c.passed}


def test_a_group_that_keeps_only_what_nothing_reads_is_named() -> None:
    """Half of its units are read, and the plan keeps the other half."""
    model = network()
    graph, plan, _ = planned(model)
    group = next(g for g in graph.groups if 1 < len(plan.keep[g.name]) < g.size)
    tensors = dict(model.named_parameters())
    with torch.no_grad():
        for s in group.consumers:
            rows = torch.from_numpy(s.index[plan.keep[group.name]].reshape(-1))
            tensors[s.tensor].index_fill_(s.dim, rows, 0.0)
    proof = verify(model, graph, plan, EXAMPLE)
    assert [c.name for c in proof.checks if not c.passed] == ["kept units are alive"]
    assert group.name in str(proof)


def test_a_file_that_loads_as_something_else_is_found() -> None:
    def other() -> nn.Module:
        base = network()
        base.register_forward_hook(lambda _m, _x, out: out + 1)
        return base

    model = network()
    graph, plan, budget = planned(model)
    proof = verify(model, graph, plan, EXAMPLE, budget=budget, fresh=other)
    assert [c.name for c in proof.checks if not c.passed] == ["save and load"]


def test_a_forward_that_is_never_the_same_is_found() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x).relu()) + (0 if x.is_meta else int.from_bytes(os.urandom(2)))

    model = Noisy()
    graph, plan, budget = planned(model)
    proof = verify(model, graph, plan, EXAMPLE, budget=budget)
    assert {"identity", "small equals masked"} <= {c.name for c in proof.checks if not c.passed}


class Grid(nn.Module):
    """Resamples at points that its own code makes in single precision, and multiplies rows by a matrix kept in it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
        self.gain = [torch.full((14, 14), 2.0)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        line = torch.linspace(-1, 1, 14).float()
        grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)[None]
        x = nn.functional.grid_sample(x, grid, align_corners=True)
        return self.b(torch.matmul(x, self.gain[0]))


def test_a_forward_that_asks_for_single_precision_is_compared_in_double_all_the_same() -> None:
    torch.manual_seed(0)
    model = Grid()
    with pytest.raises(RuntimeError, match="Double"):
        copy.deepcopy(model).double()(EXAMPLE.double())
    graph, plan, budget = planned(model, 0.6)
    proof = verify(model, graph, plan, EXAMPLE, budget=budget).require()
    equal = next(c for c in proof.checks if c.name == "small equals masked")
    error, scale = (float(number) for number in re.findall(r"[\d.]+e[+-]\d+", equal.detail))
    assert 0 <= error < 1e-12 * scale
    small = shrink(model, graph, plan)
    with torch.no_grad():
        small.b.weight[0, 0, 0, 0] += 1e-4
    proof = verify(model, graph, plan, EXAMPLE, small=small, budget=budget)
    assert [c.name for c in proof.checks if not c.passed] == ["small equals masked"]


def test_a_forward_that_breaks_after_surgery_is_reported_with_its_line() -> None:
    class Rigid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x)
            return self.b(x.view(1, 8, 14, 14))

    graph = trace(Rigid(), EXAMPLE, rehearse=False)
    plan = Plan({"a": np.arange(4)})
    proof = verify(Rigid(), graph, plan, EXAMPLE)
    failed = [c for c in proof.checks if not c.passed]
    assert {c.name for c in failed} >= {"small equals masked", "planned cost equals built cost", "backward"}
    assert all("test_surgery.py:" in c.detail and "x.view(1, 8, 14, 14)" in c.detail for c in failed[:1])


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
    # The switch decides on outputs, and the fresh network does not have it on.  A detach is no operation on numbers.
    assert [c.name for c in proof.checks if not c.passed] == ["save and load", "backward"]


class Cancels(nn.Module):
    """Every output is a mean of what has mean zero: nothing but rounding is left, and it differs with the order of sums."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        normed = nn.functional.instance_norm(self.second(self.first(x).relu()))
        return self.head(normed.mean((2, 3)))


class Ranks(nn.Module):
    """Compares two numbers that are equal but for rounding, and takes something else where one is larger."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(3, 16, 3)
        self.score, self.head = nn.Linear(16, 1, bias=False), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        one, other = (layer(x).relu().flatten(2).transpose(1, 2) for layer in (self.first, self.second))
        larger = self.score(one) + self.score(other) > self.score(one + other)
        return self.head(torch.where(larger, one, -one).mean(1))


@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.parametrize("network", [Cancels, Ranks])
def test_what_cancels_and_equals_that_are_ranked_are_compared_all_the_same(network: type[Cancels], wrong: bool) -> None:
    torch.manual_seed(0)
    model, x = randomise(network()).eval(), torch.randn(1, 3, 12, 12)
    graph = trace(model, x)
    plan = Plan({g.name: np.arange(g.size // 2) for g in graph.groups}, {g.name: g.size for g in graph.groups})
    small = shrink(model, graph, plan)
    if wrong:
        small.head.register_forward_hook(lambda *given: given[-1] + (1e-9 if network is Cancels else 1e-6))
    checks = {check.name: check.passed for check in verify(model, graph, plan, x, small=small).checks}
    assert checks["small equals masked"] is not wrong
