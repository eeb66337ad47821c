"""Residual blocks as units: found, proven, costed exactly, left out by surgery, saved and exported."""

import copy
import gc
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from proving import random_importance, randomise
from torch import Tensor, nn

import espalier as es
from espalier.graph import files, find_blocks, trace, with_blocks
from espalier.graph.blocks import LEFT
from espalier.methods.blocks import takes_blocks
from espalier.plan import Budget, Plan
from espalier.solver import solve
from espalier.surgery import load, rebuild, save, shrink, shrink_, structure, verify
from tests.steps import EXAMPLE as STEP_EXAMPLE, logits, network, train_step, train_through


class Residual(nn.Module):
    """``act(scale * branch(x) + x)``, as people write it."""

    def __init__(self, branch: nn.Module, act: nn.Module | None = None, *, scale: int = 0) -> None:
        super().__init__()
        self.branch = branch
        self.act = act
        self.gamma = nn.Parameter(torch.full((scale, 1, 1), 1e-6)) if scale else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.branch(x)
        if self.gamma is not None:
            out = out * self.gamma
        if self.training:
            out = out * (torch.rand(len(x), 1, 1, 1) < 0.9)  # stochastic depth
        x = x + out
        return x if self.act is None else self.act(x)


class Squeeze(nn.Module):
    """Squeeze and excite."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.two(F.relu(self.one(x.mean((2, 3), keepdim=True)))))


def conv(inputs: int, outputs: int, kernel: int = 3, groups: int = 1, act: bool = True) -> list[nn.Module]:
    made = [nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs)]
    return [*made, nn.ReLU(inplace=True)] if act else made


def basic(width: int, inner: int) -> nn.Module:
    return Residual(nn.Sequential(*conv(width, inner), *conv(inner, width, act=False)), nn.ReLU(inplace=True))


def bottleneck(width: int, inner: int) -> nn.Module:
    row = [*conv(width, inner, 1), *conv(inner, inner), *conv(inner, width, 1, act=False), Squeeze(width)]
    return Residual(nn.Sequential(*row), nn.ReLU())


def inverted(width: int, inner: int) -> nn.Module:
    row = [*conv(width, inner, 1), *conv(inner, inner, groups=inner), *conv(inner, width, 1, act=False)]
    return Residual(nn.Sequential(*row))


def scaled(width: int, inner: int) -> nn.Module:
    row = [nn.Conv2d(width, width, 3, padding=1, groups=width), nn.Conv2d(width, inner, 1), nn.GELU()]
    return Residual(nn.Sequential(*row, nn.Conv2d(inner, width, 1)), scale=width)


def preactivated(width: int, inner: int) -> nn.Module:
    row = [nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, inner, 3, padding=1), nn.BatchNorm2d(inner), nn.ReLU()]
    return Residual(nn.Sequential(*row, nn.Conv2d(inner, width, 3, padding=1)))


def leaky(width: int, inner: int) -> nn.Module:
    return Residual(nn.Sequential(*conv(width, inner), *conv(inner, width, act=False)), nn.LeakyReLU())


KINDS = {
    "basic": (basic, ("branch.4.weight", "branch.4.bias"), "Identity"),
    "bottleneck with squeeze-and-excite": (bottleneck, ("branch.7.weight", "branch.7.bias"), "Identity"),
    "inverted residual": (inverted, ("branch.7.weight", "branch.7.bias"), "ReLU"),
    "layer scale": (scaled, ("gamma",), "ReLU"),
    "pre-activation": (preactivated, ("branch.5.weight", "branch.5.bias"), "ReLU"),
    "an activation is left": (leaky, ("branch.4.weight", "branch.4.bias"), "LeakyReLU"),
}


class Net(nn.Module):
    """A stem, two blocks, a convolution that changes the width, one more block, and a head."""

    def __init__(self, block, *, width: int = 8, inner: int = 6) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv(3, width))
        self.stage = nn.Sequential(block(width, inner), block(width, inner))
        self.down = nn.Sequential(*conv(width, 2 * width))
        self.last = block(2 * width, inner)
        self.head = nn.Linear(2 * width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.down(self.stage(self.stem(x)))).mean((2, 3)))


EXAMPLE = torch.zeros(1, 3, 8, 8)


def graph_of(model: nn.Module, example: Tensor = EXAMPLE) -> es.Graph:
    return with_blocks(trace(model, example), find_blocks(model, example).found)


def without(graph, *modules: str) -> Plan:
    return Plan({f"{m}:block": np.arange(1) for m in modules})


# -- finding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_is_found_with_what_silences_it(kind):
    make, silent, _ = KINDS[kind]
    found = find_blocks(randomise(Net(make)), EXAMPLE)
    assert [b.module for b in found.found] == ["stage.0", "stage.1", "last"] and not found.left
    assert found.found[0].silent == tuple(f"stage.0.{n}" for n in silent)


def test_an_activation_is_left_only_where_it_does_something():
    """What comes out of a ReLU passes the ReLU behind a silent branch unchanged; a leaky one lets negative numbers in."""
    assert {b.left for b in find_blocks(randomise(Net(basic)), EXAMPLE).found} == {"Identity"}
    first, second, last = find_blocks(randomise(Net(leaky)), EXAMPLE).found
    assert (first.left, second.left, last.left) == ("Identity", "LeakyReLU", "Identity")


@pytest.mark.parametrize(("name", "blocks"), [("resnet20", 7), ("resnet20a", 7)])
def test_blocks_of_resnets_are_those_without_projection(name, blocks):
    model = randomise(es.build_model(name, num_classes=10))
    found = find_blocks(model, torch.zeros(1, 3, 32, 32)).found
    assert len(found) == blocks and "layer2.0" not in {b.module for b in found}


def test_finding_leaves_the_model_as_it_was():
    model = randomise(Net(bottleneck)).train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    find_blocks(model, EXAMPLE)
    assert model.training and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_scale_that_begins_at_zero_hides_no_block():
    model = Net(basic)
    for block in (*model.stage, model.last):
        nn.init.zeros_(block.branch[4].weight)
    assert [b.silent[0] for b in find_blocks(model, EXAMPLE).found] == [
        f"{n}.branch.4.weight" for n in ("stage.0", "stage.1", "last")
    ]


class Twice(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.head(self.last(self.down(self.stage(self.stem(x)))).amax((2, 3)))


class Reads(Net):
    """The forward looks into the block: nothing can take its place."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.stage[0].branch[0].weight.abs().sum()


def shares(model: Net) -> Net:
    model.stage[1].branch[0].weight = model.stage[0].branch[0].weight
    return model


@pytest.mark.parametrize(
    ("model", "expected"),
    [(Twice(basic), []), (Reads(basic), ["stage.1", "last"]), (shares(Net(basic)), ["stage", "last"])],
    ids=["called twice", "read from outside", "shared weights: only together"],
)
def test_what_cannot_be_left_out_is_no_block(model, expected):
    found = find_blocks(randomise(model), EXAMPLE)
    assert [b.module for b in found.found] == expected
    assert "stage.0" not in found.left or "without it" in found.left["stage.0"]


# -- costs and surgery -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_without_blocks_is_proven(kind, tmp_path):
    model = randomise(Net(KINDS[kind][0])).eval()
    graph = graph_of(model)
    plan = without(graph, "stage.1", "last")
    verify(model, graph, plan, EXAMPLE).require()
    small = shrink(model, graph, plan)
    assert isinstance(small.last, tuple(LEFT.values())) and isinstance(model.last, Residual)
    save(small, tmp_path / "small.safetensors")
    again = load(tmp_path / "small.safetensors", base=Net(KINDS[kind][0])).eval()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(again(x), small(x))


@pytest.mark.parametrize("kind", KINDS)
def test_activation_memory_without_blocks_is_exact(kind):
    model = randomise(Net(KINDS[kind][0])).eval()
    graph = graph_of(model)
    for modules in (["stage.0"], ["stage.0", "stage.1"], ["stage.0", "stage.1", "last"]):
        plan = without(graph, *modules)
        assert es.cost(graph, plan) == es.cost(trace(shrink(model, graph, plan), EXAMPLE, rehearse=False))


@pytest.mark.parametrize("limits", [{"macs": 0.6}, {"macs": 0.3, "params": 0.4}, {"activation_memory": 0.8}])
def test_blocks_and_channels_share_one_exact_budget(limits):
    example = torch.zeros(1, 3, 32, 32)
    model = randomise(es.build_model("resnet20a", num_classes=10)).eval()
    graph = graph_of(model, example)
    budget = Budget(**limits)
    half = {g.name: g.size // 2 for g in graph.groups}
    plan = solve(graph, random_importance(graph), budget, floor=half if "macs" in limits else None)
    verify(model, graph, plan, example, budget=budget).require()
    only = {n: w for n, w in random_importance(graph).items() if n.endswith(":block")}
    plan = solve(graph, only, Budget(macs=0.5))
    assert graph.absent(plan.keep)
    verify(model, graph, plan, example).require()


def test_random_networks_of_blocks_are_proven():
    makers = [make for make, *_ in KINDS.values()]
    for seed in range(6):
        draw = random.Random(seed)

        def mixed(width: int, inner: int, draw: random.Random = draw) -> nn.Module:
            return draw.choice(makers)(width, inner + draw.randrange(3))

        torch.manual_seed(seed)
        model = randomise(Net(mixed, width=draw.choice([6, 8]), inner=4)).eval()
        graph = graph_of(model)
        importance = random_importance(graph, seed=seed)
        budget = Budget(macs=draw.choice([0.3, 0.5, 0.7]))
        plan = solve(graph, importance, budget, floor={g.name: g.size // 2 for g in graph.groups if "." in g.name})
        verify(model, graph, plan, EXAMPLE, budget=budget).require()


# -- the solver --------------------------------------------------------------------------------------------------------


def test_a_block_goes_instead_of_all_its_channels():
    """With a floor under its inner width a block that is worth little goes as a whole; without one it would end narrow."""
    model = randomise(Net(basic)).eval()
    graph = graph_of(model)
    importance = {g.name: np.full(g.size, 1.0) for g in graph.groups if not g.name.startswith(("stem", "down"))}
    importance["stage.0.branch.0"] = np.full(6, 1e-3)
    importance |= {b.group: np.array([0.0, 1e-3]) for b in graph.blocks}
    macs = {"macs": int(0.8 * es.cost(graph).macs)}
    assert graph.absent(solve(graph, importance, macs, floor={"stage.0.branch.0": 3}).keep)[0].module == "stage.0"


def test_what_a_block_is_worth_falls_with_its_channels():
    """The block's own worth is nothing here: all of it lies in channels, and with most of them gone the rest is cheap."""
    graph = graph_of(randomise(Net(basic)))
    importance = {g.name: np.full(g.size, 1.0) for g in graph.groups}
    importance |= {b.group: np.array([0.0, 0.0]) for b in graph.blocks}
    importance["stage.0.branch.0"] = np.array([1e-3] * 5 + [1e-2])
    plan = solve(graph, importance, {"macs": int(0.83 * es.cost(graph).macs)})
    assert [b.module for b in graph.absent(plan.keep)] == ["stage.0"]
    assert len(plan.keep["stage.0.branch.0"]) == 6  # gone with its block: no decision


def test_a_protected_channel_keeps_the_block_around_it():
    graph = graph_of(randomise(Net(basic)))
    only = {b.group: np.array([0.0, 0.0]) for b in graph.blocks}
    kept = solve(graph, only, Budget(macs=0.9, protect=["stage.0.branch.0"])).keep
    assert [b.module for b in graph.absent(kept)] and "stage.0" not in {b.module for b in graph.absent(kept)}
    kept = solve(graph, only, Budget(macs=0.9, protect=["stage*"])).keep
    assert [b.module for b in graph.absent(kept)] == ["last"]


# -- in the middle of training -----------------------------------------------------------------------------------------


def test_leaving_a_block_out_in_training_takes_its_parameters_from_the_optimiser():
    model = randomise(Net(bottleneck))
    graph = graph_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    shrink_(model, graph, without(graph, "stage.1"), optimizer=optimizer)
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in model.parameters()} and set(map(id, optimizer.state)) <= held


def test_activation_memory_does_not_depend_on_when_garbage_is_collected():
    model, before, found = Net(bottleneck).eval(), gc.get_threshold(), set()
    try:
        for often in (0, 50, 50, 50, 70):
            gc.set_threshold(often)
            found.add(es.cost(graph_of(model)).activation_memory)
    finally:
        gc.set_threshold(*before)
    assert len(found) == 1


def test_the_graph_after_a_block_has_left_is_that_of_the_network():
    model = randomise(Net(bottleneck)).eval()
    graph = graph_of(model)
    half = {"stage.0.branch.0": np.arange(3), "stage.1:block": np.arange(1), "stage.1.branch.0": np.arange(2)}
    small = shrink(model, graph, Plan(half))
    after = files.from_json(files.to_json(graph.after(half)))
    assert es.cost(after) == es.cost(trace(small, EXAMPLE, rehearse=False)) == es.cost(graph, Plan(half))
    assert [b.module for b in after.blocks] == ["stage.0", "last"]
    rest = {"last:block": np.arange(1)}
    verify(small, after, Plan(rest), EXAMPLE).require()


def test_a_block_that_the_graph_does_not_know_is_refused():
    graph = graph_of(randomise(Net(basic)))
    with pytest.raises(ValueError, match="no such module"):
        with_blocks(graph, [graph.blocks[0]])


def test_a_network_without_a_block_is_exported(tmp_path):
    pytest.importorskip("onnxruntime")
    model = randomise(Net(leaky)).eval()
    graph = graph_of(model)
    small = shrink(model, graph, without(graph, "stage.1"))
    assert es.export_onnx(small, tmp_path / "small.onnx", EXAMPLE) < 1e-4


# -- methods -----------------------------------------------------------------------------------------------------------


def test_one_shot_leaves_out_blocks_where_that_gives_up_less():
    model = randomise(Net(basic))
    with torch.no_grad():
        model.stage[0].branch[3].weight.mul_(1e-3)  # what reads its channels
    batches = [(torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4)]
    run = es.Magnitude(score="taylor", blocks=True).start(model, EXAMPLE, Budget(macs=0.7), batches=batches)
    assert [b.module for b in run.dense_graph.absent(run.plan.keep)] == ["stage.0"]
    assert isinstance(run.finish().stage[0], nn.Identity) and run.cost.macs <= run.limits["macs"]


@pytest.mark.parametrize("method", [es.TCP(blocks=True), es.MGP(blocks=True)], ids=lambda m: m.name)
def test_fading_blocks_arrives_without_force_and_without_a_jump(method):
    model = network("resnet20a")
    run = method.start(model, STEP_EXAMPLE, Budget(macs=0.3))
    assert len(run.graph.blocks) == 7
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    shrink_now, jumps = run.remove, []

    def watched(units, optimizer):
        absent = run.graph.absent(units)
        before = logits(model, x)
        result = shrink_now(units, optimizer)
        jumps.append((len(absent), float((logits(model, x) - before).abs().max() / before.abs().max())))
        return result

    run.remove = watched
    train_through(run, optimizer, steps=120)
    small = run.finish()
    assert not run.forced and max(jump for _, jump in jumps) < 1e-5 and sum(n for n, _ in jumps) >= 2
    assert len(run.dense_graph.absent(run.plan.keep)) == sum(n for n, _ in jumps)
    found = trace(small, STEP_EXAMPLE)
    assert es.cost(found) == run.cost and run.cost.macs <= run.limits["macs"]
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in small.parameters()}


@pytest.mark.parametrize("method", [es.TCP(blocks=True), es.MGP(blocks=True)], ids=lambda m: m.name)
def test_a_run_that_leaves_blocks_out_goes_on_exactly(method):
    def half(steps, model, run, optimizer):
        for step in steps:
            train_step(run, optimizer, step)
            run.step(progress=(step + 1) / 80, optimizer=optimizer)

    def begin():
        model = network()
        run = method.start(model, STEP_EXAMPLE, Budget(macs=0.3))
        return model, run, torch.optim.SGD(model.parameters(), lr=0.05)

    model, run, optimizer = begin()
    half(range(50), model, run, optimizer)
    assert len(run.graph.blocks) < 7
    state, table = copy.deepcopy(run.state_dict()), structure(model)
    weights = {n: t.clone() for n, t in model.state_dict().items()}
    half(range(50, 80), model, run, optimizer)

    again = rebuild(network(), table)
    again.load_state_dict(weights)
    second = method.start(again, STEP_EXAMPLE, Budget(macs=1.0))
    second.load_state_dict(state)
    half(range(50, 80), again, second, torch.optim.SGD(again.parameters(), lr=0.05))
    one, two = run.finish().state_dict(), second.finish().state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize("make", [lambda: es.Magnitude(blocks=True), lambda: es.TCP(blocks=True, importance="scale")])
def test_a_score_that_cannot_weigh_blocks_is_refused(make):
    with pytest.raises(ValueError, match="taylor"):
        make()


class Response(nn.Module):
    """As in ConvNeXt V2: a mean over the channels, which therefore stay."""

    def forward(self, x: Tensor) -> Tensor:
        norms = x.square().sum((2, 3), keepdim=True).sqrt()
        return x * norms / (norms.mean(1, keepdim=True) + 1e-6)


def responding() -> nn.Module:
    def block(width: int, inner: int) -> nn.Module:
        return Residual(nn.Sequential(*conv(width, inner), Response(), *conv(inner, width, act=False)))

    model = randomise(Net(block))
    model.stem.append(Response())
    model.down.append(Response())
    return model


def test_blocks_may_go_by_default_where_time_is_limited_or_nothing_else_is_enough():
    class Clock:
        dense = 1.0

        def on(self, graph):
            return graph

    graph, stiff = graph_of(randomise(Net(basic))), trace(responding(), EXAMPLE)
    by_time, by_macs = Budget(latency=0.5, profile=Clock()), Budget(macs=0.5)
    assert takes_blocks(None, by_time, graph) and not takes_blocks(None, by_macs, graph)
    assert takes_blocks(None, by_macs, stiff) and not takes_blocks(None, Budget(macs=1.0), stiff)
    assert not takes_blocks(False, by_time, graph) and takes_blocks(True, by_macs, graph)
    assert not takes_blocks(None, by_time, graph, score="scale")


@pytest.mark.parametrize(
    "method", [es.TCP(), es.MGP(inputs=False, shapes=False), es.Magnitude(score="taylor")], ids=lambda m: m.name
)
def test_a_network_of_which_no_channel_can_go_gives_up_blocks(method):
    model, x = responding(), torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    batches = [(x, torch.arange(8) % 4)]
    run = method.start(model, EXAMPLE, Budget(macs=0.6), batches=batches)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(40):
        loss = F.cross_entropy(model(x), batches[0][1]) + run.penalty()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.step(progress=(step + 1) / 40, optimizer=optimizer)
    run.finish()
    assert run.cost.macs <= run.limits["macs"] and run.dense_graph.absent(run.plan.keep)
    with pytest.raises(es.BudgetError):
        type(method)(**{**vars(method), "blocks": False}).start(
            responding(), EXAMPLE, Budget(macs=0.6), batches=batches
        )
