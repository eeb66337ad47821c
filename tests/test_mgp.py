"""MGP: shapes and selections compute what the masked layer did, cost what was planned, and arrive at the budget."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.common import ZOO, build, example as zoo_example
from espalier.costs import CostModel, cost
from espalier.forms import cut_kernel, find_places, rectangles, shape_sequence, shapes
from espalier.graph import files, hold, selectable, trace, with_inputs
from espalier.graph.alternatives import alternatives_name
from espalier.graph.graph import FORM, INPUTS
from espalier.graph.inputs import inputs_name
from espalier.layers import PartConv2d
from espalier.methods.mgp import FILTERS, MGP, SHAPES, MGPRun, granularities, granularity
from espalier.methods.units import Units
from espalier.plan import Budget, Plan
from espalier.run.models import build_model
from espalier.run.onnx import export_onnx, exported
from espalier.solver import solve, unused_blocks
from espalier.surgery import load, mask, rebuild, save, shrink, structure, verify
from tests import steps
from tests.proving import randomise
from tests.steps import EXAMPLE, batch, logits, train_step, train_through

STEPS = 60


def network(name: str = "resnet8") -> nn.Module:
    return randomise(steps.network(name))


def whole_run(model: nn.Module, method: MGP, budget: Budget) -> MGPRun:
    run = method.start(model, EXAMPLE, budget)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    train_through(run, optimizer, steps=STEPS)
    run.finish()
    return run


# -- shapes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [(3, 3), (1, 5), (4, 2), (2, 2)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 1), (3, 2)])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 1), (1, 3)])
def test_a_cut_kernel_is_the_masked_one(
    kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> None:
    x = torch.randn(2, 3, 11, 15, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    down, across = (d * (k - 1) for k, d in zip(kernel, dilation, strict=True))
    for padding in {(0, 0), (1, across), (down, 1), (down // 2, across // 2), (0, across)}:
        cut_to_every_rectangle(nn.Conv2d(3, 4, kernel, stride, padding, dilation, dtype=torch.float64), x)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 2)])
def test_a_cut_kernel_may_read_nothing_but_padding(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for dilation in (4, 7):
        cut_to_every_rectangle(nn.Conv2d(3, 4, 3, padding=dilation, dilation=dilation, dtype=torch.float64), x)


def cut_to_every_rectangle(layer: nn.Conv2d, x: torch.Tensor) -> None:
    """Every rectangle of its kernel computes what the masked kernel does, saved and loaded too."""
    model, kernel = nn.Sequential(layer), layer.kernel_size
    for rectangle in rectangles(kernel):
        masked, small = copy.deepcopy(model), copy.deepcopy(model)
        with torch.no_grad():
            masked[0].weight.mul_(torch.from_numpy(rectangle.mask(kernel)))
        cut_kernel(small, "0", rectangle)
        assert tuple(small[0].weight.shape[2:]) == rectangle.size
        assert torch.allclose(masked(x), small(x), rtol=0, atol=1e-12), (rectangle, layer)
        again = rebuild(copy.deepcopy(model), structure(small)).double()
        again.load_state_dict(small.state_dict())
        assert torch.equal(again(x), small(x))


def test_rectangles_that_need_no_uneven_padding_come_first() -> None:
    places, _ = find_places(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)), torch.zeros(1, 4, 8, 8))
    found = [sorted({str(r) for r in option}) for option in shapes(places["0"])]
    assert found == [["1x1"], ["1x2", "2x1"], ["1x3", "3x1"], ["2x2"], ["2x3", "3x2"], ["3x3"]]
    assert [len(option) for option in shapes(places["0"])] == [1, 12, 2, 4, 4, 1]
    assert [shape_sequence(places["0"], option).copies > 0 for option in shapes(places["0"])] == [0, 1, 0, 1, 1, 0]


def test_cutting_a_kernel_carries_momentum_along() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(1, 3, 5, 5)).sum().backward()
    optimizer.step()
    before = optimizer.state[model[0].weight]["momentum_buffer"].clone()
    rectangle = next(r for r in rectangles((3, 3)) if str(r) == "2x2")
    cut_kernel(model, "0", rectangle, optimizer=optimizer)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    after = optimizer.state[model[0].weight]["momentum_buffer"]
    rows, columns = slice(rectangle.top, rectangle.bottom + 1), slice(rectangle.left, rectangle.right + 1)
    assert torch.equal(after, before[:, :, rows, columns])


# -- inputs ------------------------------------------------------------------------------------------------------------


def joint(model: nn.Module, example: Tensor, method: MGP) -> tuple[object, dict]:
    graph, options, _ = granularities(model, trace(model, example), method, *find_places(model, example))
    return graph, options


def carried_out(model, graph, options, plan: Plan, draw: np.random.Generator, *, masked: bool):
    """The network of a plan: small, or of full size with zeros."""
    channels = Plan({n: u for n, u in plan.keep.items() if graph.group(n).kind != FORM})
    made = mask(model, graph, channels) if masked else shrink(model, graph, channels)
    for layer, found in options.items():
        option = found[len(plan.keep[alternatives_name(layer)]) - 1]
        rectangle = option[int(draw.integers(len(option)))]
        weight = made.get_submodule(layer).weight
        if masked:
            with torch.no_grad():
                weight.mul_(torch.from_numpy(rectangle.mask(weight.shape[2:])))
        elif rectangle.area < weight.shape[2:].numel():
            cut_kernel(made, layer, rectangle)
    return made


@pytest.mark.parametrize("name", ["resnet20", "resnet20a", "vgg16_bn"])
@pytest.mark.parametrize("streams", [False, True])
def test_random_plans_over_all_granularities_cost_and_compute_what_was_planned(name: str, streams: bool) -> None:
    model, example = randomise(build_model(name, num_classes=10)), torch.zeros(2, 3, 32, 32)
    graph, options = joint(model, example, MGP(streams=streams))
    assert cost(graph) == cost(trace(model, example, rehearse=False))
    draw = np.random.default_rng(0)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for turn in range(2):
        keep = {}
        for group in graph.groups:
            count = int(draw.integers(1, group.size + 1))
            order = np.arange(group.size) if group.options else draw.permutation(group.size)
            keep[group.name] = np.sort(order[:count])
        plan = Plan(keep)
        small = carried_out(model, graph, options, plan, np.random.default_rng(turn), masked=False)
        found, planned = cost(trace(small, example, rehearse=False)), cost(graph, plan)
        assert (found.macs, found.params) == (planned.macs, planned.params)
        assert found.activation_memory <= planned.activation_memory
        zeroed = carried_out(model, graph, options, plan, np.random.default_rng(turn), masked=True)
        one, other = logits(zeroed.double(), x), logits(small.double(), x)
        assert (one - other).abs().max() <= 1e-9 * one.abs().max()


def test_selected_inputs_are_planned_to_the_byte_and_pass_every_proof() -> None:
    model, example = network(), EXAMPLE
    whole = trace(model, example)
    graph = hold(whole, [g.name for g in whole.groups], "kept for this test")
    assert cost(graph) == cost(whole)
    layers = [
        n for n in selectable(graph, [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]) if n != "conv1"
    ]
    places, _ = find_places(model, example)
    graph = with_inputs(graph, {n: int(np.prod(places[n].input_size)) * 4 for n in layers})
    assert cost(graph) == cost(whole)
    draw = np.random.default_rng(0)
    budget = Budget(macs=0.6, params=0.7)
    plan = solve(graph, {g.name: draw.random(g.size) for g in graph.groups}, budget)
    assert unused_blocks(graph, plan, budget) == []
    verify(model, graph, plan, example, budget=budget).require()
    assert cost(trace(shrink(model, graph, plan), example, rehearse=False)) == cost(graph, plan)
    few = Plan(
        {
            inputs_name(n): np.array([0]) if n == layers[0] else np.arange(graph.group(inputs_name(n)).size)
            for n in layers
        }
    )
    small = shrink(model, graph, few)
    assert sum(isinstance(m, PartConv2d) for m in small.modules()) == 1
    assert cost(trace(small, example, rehearse=False)) == cost(graph, few)


def test_a_network_that_keeps_reading_everything_copies_nothing() -> None:
    model = network()
    graph, _ = joint(model, EXAMPLE, MGP(shapes=False))
    assert not any(isinstance(m, PartConv2d) for m in shrink(model, graph, Plan.dense(graph)).modules())
    inputs = [g for g in graph.groups if g.kind == INPUTS]
    assert inputs
    less = Plan({inputs[0].name: np.arange(inputs[0].size - 1)})
    assert cost(graph, less).macs < cost(graph).macs


def test_inputs_that_can_go_anyway_are_not_selected() -> None:
    model = network()
    graph = trace(model, EXAMPLE)
    inner = next(n for n in graph.shapes if n.endswith("layer1.0.conv2.weight")).rpartition(".")[0]
    assert selectable(graph, [inner]) == []
    with pytest.raises(ValueError, match="whose inputs all stay"):
        with_inputs(graph, {inner: 4})


def test_moving_step_by_step_adds_up_to_the_whole() -> None:
    graph, _ = joint(network(), EXAMPLE, MGP())
    costs = CostModel(graph)
    state = costs.at(graph.sizes)
    draw = np.random.default_rng(2)
    for _ in range(200):
        group = int(draw.integers(len(graph.groups)))
        state.move(group, int(draw.integers(1, graph.groups[group].size + 1)) - int(state.keep[group]))
    whole = costs.cost(state.keep)
    assert (state.value("macs"), state.value("params"), state.activation_memory) == (
        whole.macs, whole.params, whole.activation_memory,
    )  # fmt: skip


def test_a_graph_goes_through_text_and_follows_a_removal() -> None:
    model = network()
    graph, _ = joint(model, EXAMPLE, MGP())
    draw = np.random.default_rng(3)
    units = {g.name: np.arange(max(1, g.size - int(draw.integers(3)))) for g in graph.groups}
    after = graph.after(units)
    assert cost(after) == cost(graph, Plan(units))
    again = files.from_json(files.to_json(after))
    assert files.to_json(again) == files.to_json(after)
    assert cost(again) == cost(after)
    solved = [
        solve(g, {h.name: np.ones(h.size) for h in g.groups}, {"macs": cost(after).macs // 2}) for g in (after, again)
    ]
    assert all(np.array_equal(solved[0].keep[n], solved[1].keep[n]) for n in solved[0].keep)


# -- the run -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        MGP(),
        MGP(inputs=False, shapes=False),
        MGP(filters=False, shapes=False),
        MGP(filters=False, inputs=False),
        MGP(streams=True),
    ],
    ids=["all", "filters", "inputs", "shapes", "streams"],
)
def test_arrives_at_the_budget_without_force(method: MGP, tmp_path) -> None:
    model = network()
    dense = copy.deepcopy(model)
    run = whole_run(model, method, Budget(macs=0.5))
    assert run.done
    assert not run.forced
    found = cost(trace(model, EXAMPLE, rehearse=False))
    assert (found.macs, found.params) == (run.cost.macs, run.cost.params)
    slack = 0.1 if method.shapes and not method.inputs else 0.02  # one option of a kernel is much
    assert (1 - slack) * run.limits["macs"] <= found.macs <= run.limits["macs"]
    save(model, tmp_path / "small.safetensors")
    again = load(tmp_path / "small.safetensors", base=dense)
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(logits(again, x), logits(model, x))


def test_removal_changes_no_logit_and_keeps_training_going() -> None:
    model = network("resnet20")
    run = MGP(stagger=0.0).start(model, EXAMPLE, Budget(macs=0.08, params=0.08))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    x = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    kinds: set[str] = set()
    carry_out = run.realise

    def watched(stay, optimizer):
        kinds.update(granularity(run.graph.group(n)) for n, u in stay.items() if len(u) < run.graph.group(n).size)
        before = logits(model, x)
        result = carry_out(stay, optimizer)
        assert (before - logits(model, x)).abs().max() <= 1e-5 * before.abs().max()
        return result

    run.realise = watched  # type: ignore[method-assign]
    for step in range(STEPS):
        train_step(run, optimizer, step)
        run.step(progress=(step + 1) / STEPS, optimizer=optimizer)
        ours = {id(p) for p in model.parameters()}
        assert ours == {id(p) for g in optimizer.param_groups for p in g["params"]}
        assert all(s["momentum_buffer"].shape == p.shape for p, s in optimizer.state.items())
    assert kinds == {FILTERS, INPUTS, SHAPES}


def test_finer_granularities_begin_later_unless_the_budget_needs_them() -> None:
    run = MGP(stagger=0.1).start(network(), EXAMPLE, Budget(macs=0.3))
    gentle, tight = {"macs": int(0.9 * run.dense.macs)}, {"macs": int(0.03 * run.dense.macs)}

    def touched(limits: dict[str, int], progress: float) -> set[str]:
        plan = run.keep_set(limits, progress)
        return {granularity(run.graph.group(n)) for n, u in plan.keep.items() if len(u) < run.graph.group(n).size}

    run.score.value = torch.rand(run.units.count, generator=torch.Generator().manual_seed(0))
    assert touched(gentle, 0.05) == {FILTERS}
    assert SHAPES not in touched(gentle, 0.15)
    assert touched(tight, 0.05) > {FILTERS}


def test_only_what_is_outside_is_pressed_and_dear_groups_fade_faster() -> None:
    model = network()
    run = MGP(stagger=0.0).start(model, EXAMPLE, Budget(macs=0.3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for step in range(12):
        train_step(run, optimizer, step)
        run.step(progress=(step + 1) / STEPS, optimizer=optimizer)
    pressed, pull = run.pressed, run.pull
    assert pressed.any() and not pressed.all()
    assert 0.5 <= float(pull.min()) < float(pull.max()) <= 2.0
    free = [p.detach().clone() for p in model.parameters() if p.ndim == 1]
    run._press(0.002, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(free, [p for p in model.parameters() if p.ndim == 1], strict=True))
    untouched = {i for s in run.units.taps.values() for i in range(s.start, s.stop)} - set(
        pressed.nonzero().ravel().tolist()
    )
    assert untouched


def test_importance_of_a_kernel_position_is_the_derivative_of_its_skeleton() -> None:
    from espalier.methods.importance import Sensitivity

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(64, 10))
    units = Units(model, trace(model, EXAMPLE), taps=["2"])
    heard = Sensitivity(units)
    x, y = batch(0)
    nn.functional.cross_entropy(model(x), y).backward()
    heard.batch_done()
    ours = heard.value[units.taps["2"]]
    skeleton = torch.ones(4, 1, 3, 3, requires_grad=True)
    hidden = nn.functional.conv2d(torch.relu(model[0](x)), model[2].weight * skeleton, model[2].bias)
    nn.functional.cross_entropy(model[4](model[3](hidden)), y).backward()
    assert skeleton.grad is not None
    expected = skeleton.grad.sum((0, 1)).reshape(-1).square()
    assert torch.allclose(ours / ours.sum(), expected / expected.sum(), rtol=1e-3, atol=1e-7)


def test_onnx_gives_the_same_numbers(tmp_path) -> None:
    pytest.importorskip("onnxruntime")
    model = network()
    run = MGP(stagger=0.0).start(model, EXAMPLE, Budget(macs=0.3))
    draw = np.random.default_rng(0)
    stay = {g.name: np.sort(draw.permutation(g.size)[: max(1, g.size // 2)]) for g in run.graph.groups}
    run.kernels.chosen = {n: r[1][0] for n, r in run.kernels.options.items()}
    run.realise({**stay, **run.kernels.going(run.kernels.options)}, None)
    assert any(isinstance(m, PartConv2d) and m.index is not None and any(m.shift) for m in model.modules())
    export_onnx(model.eval(), tmp_path / "small.onnx", example=torch.randn(2, 1, 8, 8))  # raises where they differ


@pytest.mark.parametrize(("other", "selections"), [(0, 1), (1, 2)], ids=["same", "different"])
def test_neighbours_that_select_the_same_share_one_selection_in_onnx(other: int, selections: int) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model = network()
    graph, _ = joint(model, EXAMPLE, MGP(shapes=False))
    readers = ("layer2.0.conv1", "layer2.0.shortcut.0")
    size = graph.group(inputs_name(readers[0])).size
    rows = [np.arange(0, size, 2), np.arange(other, size, 2)]
    plan = Plan({inputs_name(n): r for n, r in zip(readers, rows, strict=True)})
    verify(model, graph, plan, EXAMPLE).require()
    small = shrink(model, graph, plan)
    assert all(isinstance(small.get_submodule(n), PartConv2d) for n in readers)
    content, difference = exported(small, torch.randn(2, 1, 8, 8))
    assert difference <= 1e-4
    nodes = [n.op_type for n in onnx.load_model_from_string(content).graph.node]
    assert nodes.count("Gather") == selections


def test_layers_that_cannot_take_part_are_listed_and_survive() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(1, 16, 3, padding=1)
            self.circular = nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular")
            self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
            self.twice = nn.Conv2d(16, 16, 3, padding=1)
            self.even = nn.Conv2d(16, 16, 4, padding="same")
            self.wide = nn.Conv2d(16, 16, (3, 5), padding=(2, 0), stride=(1, 2), dilation=(2, 1))
            self.fc = nn.Linear(16, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.stem(x))
            x = x + self.grouped(self.circular(x))
            x = torch.relu(self.twice(torch.relu(self.twice(x))))
            return self.fc(torch.relu(self.wide(self.even(x))).mean((2, 3)))

    torch.manual_seed(0)
    run = whole_run(Net(), MGP(), Budget(macs=0.8))
    assert set(run.skipped) == {"circular", "grouped", "twice", "even"}
    assert run.done
    found = cost(trace(run.model, EXAMPLE, rehearse=False))
    assert found.macs == run.cost.macs <= run.limits["macs"]


def test_a_protected_layer_keeps_its_inputs_and_its_kernel() -> None:
    run = MGP().start(network("resnet20"), EXAMPLE, Budget(macs=0.5, protect=["layer1.1.*"]))
    protected = run.budget.protected(run.graph)
    names = {g.name for g, p in zip(run.graph.groups, protected, strict=True) if p}
    assert {"layer1.1.conv1:inputs", "layer1.1.conv1:form", "layer1.1.conv2:form"} <= names
    assert "layer1.2.conv1:form" not in names


def test_the_kernels_of_the_keep_set_are_recorded_over_time() -> None:
    run = whole_run(network(), MGP(filters=False, inputs=False), Budget(macs=0.5))
    kernels = run.history["kernel"]
    assert set(kernels) == {n for n, p in find_places(network(), EXAMPLE)[0].items() if p.kernel == (3, 3)}
    assert all(points[0][1] <= 9 and points[0][0] < 0.1 for points in kernels.values())
    for layer, points in kernels.items():
        assert points[-1][1] == run.model.get_submodule(layer).weight.shape[2:].numel()


IN_CI = ("cifar:resnet20a", "shufflenet_v2_x1_0")
NETWORKS = [pytest.param(n, marks=() if n in IN_CI else (pytest.mark.zoo,)) for n in ZOO]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NETWORKS)
def test_zoo_half_the_macs_over_all_granularities(name: str) -> None:
    model, example = build(name), zoo_example(name)
    run = MGP(end_at=0.5).start(model, example, Budget(macs=0.5))
    run.score.value = torch.rand(run.units.count, generator=torch.Generator().manual_seed(0))
    small = run.finish()
    assert run.forced
    found = cost(trace(small, example, rehearse=False))
    assert (found.macs, found.params) == (run.cost.macs, run.cost.params)
    assert found.macs <= run.limits["macs"]
    save_and_load(small, name)


def save_and_load(small: nn.Module, name: str) -> None:
    again = rebuild(build(name), structure(small))
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in small.state_dict().items()}
