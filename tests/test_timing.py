"""Time as a budget: staircases, the solver on them, profiles as files, and the loop that is closed by measuring."""

import io
import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import espalier as es
from espalier import solver
from espalier.costs import CostModel
from espalier.forms import Rectangle, Wish, cut_kernel, dense_sequence, find_places, sequence
from espalier.forms.candidates import options_at
from espalier.forms.spectra import spectra_of
from espalier.graph.alternatives import with_alternatives
from espalier.graph.times import Staircase
from espalier.layers import FactorisedConv
from espalier.methods import base
from espalier.methods.blocks import block_rules, offer_blocks, worth_of_blocks
from espalier.present.cli import app
from espalier.present.profiling import time_of
from espalier.run import timed as at_the_end
from espalier.run.models import build_model
from espalier.solver import solve
from espalier.timing import closing, forms, making, on_device
from espalier.timing.family import Family
from espalier.timing.fitting import staircases
from espalier.timing.marks import layer_of
from espalier.timing.onnx_files import OnnxFiles
from espalier.timing.profile import ProfileSetting, _sum_of as sum_of, from_json, to_json


class Small(nn.Module):
    """Two convolutions, a depthwise one and a classifier."""

    def __init__(self):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        self.deep = nn.Conv2d(64, 64, 3, padding=1, groups=64)
        self.last = nn.Linear(64, 10)

    def forward(self, x):
        return self.last(self.deep(self.two(self.one(x))).mean((2, 3)))


X = torch.zeros(1, 3, 16, 16)


def stairs(step, most, per_step):
    """Time that goes up by ``per_step`` with every ``step`` outputs, whatever the inputs."""
    edges = np.arange(step, most + step, step)
    return Staircase((edges, np.array([10_000])), per_step * np.arange(1, len(edges) + 1.0)[:, None])


def timed(graph, step=16, grain=4, per_step=1.0):
    """``graph`` with a staircase at every site."""
    sites = [replace(s, time=stairs(step, 1024, per_step)) for s in graph.sites]
    return replace(graph, sites=tuple(sites), overhead=0.5 * per_step, grain=grain)


@cache
def graph_of_small():
    return es.trace(Small(), X)


@pytest.fixture(scope="module")
def profile():
    """Measured in no time; not the grain, from which follows which forms layers may take: no test may depend on the machine."""
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(making, "SECONDS", 0.01)
        patch.setattr(making, "find_grain", lambda *_: 8)
        found = es.profile(Small().eval(), X, networks=8)
    # however noisy it was, the dense network is predicted to take what it took
    return found.corrected(found.dense / found.predict(graph_of_small()))


# -- staircases


def test_a_length_takes_what_its_step_takes_and_nothing_takes_nothing():
    table = Staircase((np.array([8, 16]), np.array([4, 8])), np.array([[1.0, 2.0], [3.0, 5.0]]))
    assert [table.at((n, 4)) for n in (0, 1, 8, 9, 16)] == [0, 1, 1, 3, 3]
    assert table.at((16, 8)) == 5
    assert table.at((np.array([8, 16]), 8)).tolist() == [2, 5]
    assert table.at((16, 8, 0)) == 0, "a third length says whether the layer is there"


def test_blocks_of_a_runtime_are_found_in_its_times():
    random = np.random.default_rng(0)
    lengths = random.integers(1, 16, (60, 2)) * 4
    blocks = np.ceil(lengths / 16) * 16
    took = 0.1 + 0.01 * blocks[:, 0] + 0.002 * blocks[:, 0] * lengths[:, 1]
    table = staircases({"s": np.column_stack([lengths, took])}, {"s": "conv"}, grain=4)["s"]
    assert table.edges[0].tolist()[:3] == [16, 32, 48]
    fit = np.array([float(table.at(pair)) for pair in lengths])
    assert np.abs(fit / took - 1).max() < 0.05


# -- the solver


def test_latency_is_the_sum_of_the_tables_and_moves_with_the_units():
    graph = timed(graph_of_small())
    model = CostModel(graph)
    state = model.at(graph.sizes, metrics=("latency",))
    random = np.random.default_rng(0)
    for _ in range(30):
        group = int(random.integers(len(graph.groups)))
        there = int(random.integers(1, graph.groups[group].size + 1))
        state.move(group, there - int(state.keep[group]))
        assert state.value("latency") == pytest.approx(model.cost(state.keep).latency)


@pytest.mark.parametrize("milliseconds", [4.5, 6.5, 9.5])
def test_units_go_in_steps_that_save_time_and_a_step_is_filled(milliseconds):
    graph = timed(graph_of_small())
    random = np.random.default_rng(0)
    importance = {g.name: random.random(g.size) for g in graph.groups}
    plan = solve(graph, importance, {"latency": milliseconds})
    assert CostModel(graph).cost(plan.counts(graph)).latency <= milliseconds
    assert all(n % 16 == 0 for n in plan.counts(graph)), "a step that is paid for is used to its end"


@cache
def resnet20_with_blocks():
    model = build_model("resnet20", num_classes=10).eval()
    graph, _ = offer_blocks(model, timed(es.trace(model, X)), X)
    return graph


def kept_worth(graph, importance, plan):
    """Importance of what stays; nothing of what goes with its block."""
    gone = {b.group for b in graph.blocks if len(plan.keep[b.group]) < 2}
    inside = {graph.groups[i].name for b in graph.blocks if b.group in gone for i in graph.inner(b)}
    return sum(float(importance[n][units].sum()) for n, units in plan.keep.items() if n not in inside)


def test_a_large_last_step_is_taken_back_where_others_make_room_for_it(monkeypatch):
    graph = resnet20_with_blocks()
    dense, shares = CostModel(graph).cost(graph.sizes).latency, np.linspace(0.3, 0.9, 7)
    used, worth, some = {}, {}, solver.EXCHANGES
    for tried in (0, some):
        monkeypatch.setattr(solver, "EXCHANGES", tried)
        for seed in range(4):
            random = np.random.default_rng(seed)
            scores = worth_of_blocks(graph, {g.name: random.random(g.size) for g in graph.groups})
            for share in shares:
                plan = solve(graph, scores, {"latency": share * dense}, **block_rules(graph))
                used[tried, seed, share] = CostModel(graph).cost(plan.counts(graph)).latency / (share * dense)
                worth[tried, seed, share] = kept_worth(graph, scores, plan)
    without, exchanged = ([v for (t, *_), v in used.items() if t == n] for n in (0, some))
    assert max(exchanged) <= 1 + 1e-9
    assert 1 - np.mean(exchanged) < 0.85 * (1 - np.mean(without))
    gained = [worth[some, s, x] - w for (t, s, x), w in worth.items() if t == 0]
    assert min(gained) > -1e-9 and max(gained) > 10


def test_other_limits_hold_together_with_latency():
    graph = timed(graph_of_small())
    importance = {g.name: np.ones(g.size) for g in graph.groups}
    plan = solve(graph, importance, {"latency": 9.5, "params": 8000})
    found = CostModel(graph).cost(plan.counts(graph))
    assert found.latency <= 9.5 and found.params <= 8000


def test_time_out_of_reach_is_refused_with_the_least_that_is():
    graph = timed(graph_of_small())
    importance = {g.name: np.ones(g.size) for g in graph.groups}
    with pytest.raises(es.BudgetError, match=r"latency=0\.1 ms cannot be met: the smallest reachable is"):
        solve(graph, importance, {"latency": 0.1})


def test_what_can_be_reached_is_said_as_a_share_of_the_time_that_was_measured(profile):
    """As the budget is, whatever predictions have been put right by."""
    wrong = profile.corrected(10.0)
    budget = es.Budget(latency=0.5, profile=wrong)
    graph = wrong.on(graph_of_small())
    with pytest.raises(es.BudgetError, match=f"% of {profile.dense:.3g} ms") as caught:
        solve(graph, {g.name: np.ones(g.size) for g in graph.groups}, budget)
    assert caught.value.smallest.latency > 0.5 * profile.dense


@pytest.mark.parametrize("latency", [0.0, 1.5, True, "2", "2 m", "-1 ms", "0 ms", "fast"])
def test_a_budget_of_time_is_a_fraction_or_an_amount_with_its_unit(latency):
    with pytest.raises(ValueError, match="latency"):
        es.Budget(latency=latency)


def test_a_budget_of_time_needs_a_profile():
    with pytest.raises(ValueError, match="profile"):
        es.Budget(latency=0.5)


# -- networks to measure


def test_files_are_cut_to_what_the_plan_keeps_and_say_whose_nodes_they_hold():
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model, graph = Small().eval(), graph_of_small()
    family = Family(model, graph, (X,))
    assert [graph.sites[x.site].module for x in family.layers] == ["one.0", "two.0", "deep", "last"]
    plan = es.Plan({g.name: np.arange(16) for g in graph.groups})
    found = on_device.measure(
        family.file(plan), runtime="onnxruntime", threads=1, batch=1, precision="f32", seconds=0.0
    )
    assert {layer_of(name) for name, _, _ in found["nodes"]} >= {0, 1, 2, 3}
    assert found["whole"] > 0


@pytest.mark.parametrize("rows", [(0, 1), (1, 2), (1, 1)])
def test_a_kernel_off_the_centre_is_measured_as_it_is_delivered(rows):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model, graph = Small().eval(), graph_of_small()
    cut_kernel(model, "two.0", Rectangle(*rows, 0, 1))
    x = torch.randn(1, 3, 16, 16)
    content = OnnxFiles(Small().eval(), graph, (x,)).written(model)
    assert "Pad" not in {node.op_type for node in onnx.load_from_string(content).graph.node}
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    [found] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert np.allclose(found, model(x).detach().numpy(), atol=1e-5)


def test_node_times_are_told_apart_from_means_over_all_runs_even_of_nodes_that_come_later():
    conv, reorder = ("conv", "Convolution"), ("conv_acdb", "Reorder")
    found = on_device._between({conv: 2.0}, {conv: 1.2, reorder: 0.8}, first=2, last=10)
    assert found == {conv: pytest.approx(1.0), reorder: pytest.approx(1.0)}


class WithBlock(nn.Module):
    """What comes after the block is there still when the block has gone."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = (nn.Conv2d(i, 8, 3, padding=1, bias=False) for i in (3, 8, 8))
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (x + self.two(self.one(x).relu())).relu()
        return self.last(nn.functional.max_pool2d(x, 2)[:, :, ::2].mean((2, 3)))


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
def test_what_comes_after_a_block_belongs_to_the_layer_before_it(runtime):
    if runtime == "onnxruntime":
        pytest.importorskip("onnxruntime")
    model = WithBlock().eval()
    family = Family(model, es.trace(model, X), (X,), setting=ProfileSetting(runtime, "", "", 1, 1, "f32"))
    tails = [layer.signature.partition(" > ")[2].lower().split() for layer in family.layers]
    stem, one, two, _ = tails
    assert stem[0] == "relu" and any("pool" in kind for kind in stem) and "slice" in stem
    assert one == ["relu"] and two == ["add", "relu"]


def test_a_runtime_that_others_slow_down_is_measured_in_a_process_of_its_own(monkeypatch):
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    family = Family(Small().eval(), graph_of_small(), (X,))
    file = family.file(es.Plan.dense(family.graph))
    monkeypatch.setattr(on_device, "APART", ("onnxruntime",))
    opened_here = []
    monkeypatch.setitem(on_device.RUNTIMES, "onnxruntime", lambda *a: opened_here.append(a))
    how = {"runtime": "onnxruntime", "threads": 1, "batch": 1, "precision": "f32", "seconds": 0.0}
    found = on_device.measure(file, **how, beside=file)
    assert {layer_of(name) for name, _, _ in found["nodes"]} >= {0, 1, 2, 3} and found["beside"] > 0
    assert len(on_device.race([file, file], **how)) == 2
    first = on_device._apart().child
    with pytest.raises(RuntimeError, match=r"onnxruntime: .*(?i:protobuf)"):
        on_device.race([b"no network"], **how)
    assert on_device._apart().child is first, "it lives on"
    first.kill()
    first.wait()
    assert len(on_device.race([file], **how)) == 1, "and is replaced"
    asked = on_device._apart()
    monkeypatch.setattr(on_device.json, "dumps", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        on_device.race([file], **how)
    monkeypatch.undo()
    assert asked.child.wait() != 0, "whoever is interrupted does not leave an answer behind"
    assert not opened_here


def test_programs_of_pytorch_say_whose_operations_they_hold(monkeypatch):
    torch.manual_seed(0)
    model, graph = Small().eval(), graph_of_small()
    setting = ProfileSetting("torch", on_device.version("torch"), "", 1, 2, "f32")
    family = Family(model, graph, making.batched(X, 2), setting=setting)
    assert [graph.sites[x.site].module for x in family.layers] == ["one.0", "two.0", "deep", "last"]
    assert family.layers[0].signature.startswith("conv2d k3x3 s1x1 p1x1 at ")
    assert family.layers[0].signature.endswith("> batch_norm relu")
    plan = es.Plan({g.name: np.arange(16) for g in graph.groups})
    content = family.file(plan)
    given = torch.rand(2, *X.shape[1:])
    module = torch.export.load(io.BytesIO(content)).module()
    assert torch.allclose(module(given), es.shrink(model, graph, plan)(given), atol=1e-6)
    threads = torch.get_num_threads()
    found = on_device.measure(content, **making.asked(setting), seconds=0.0)
    assert torch.get_num_threads() == threads
    owned = [layer_of(name) for name, _, _ in found["nodes"]]
    assert None not in owned and sorted(set(owned)) == [0, 1, 2, 3], "all that runs is a layer's"
    assert found["whole"] > 0


class Machine:
    """A processor that is shared: it goes at its full speed now and then, and at two thirds of it the rest of the time.

    ``slow`` says so at a time; a network is its milliseconds on a machine at rest, and loses what ``loses`` says of it.
    So many runs after another's are ``cold``: they take twice as long, as their weights have left the caches.
    """

    def __init__(self, monkeypatch, slow, loses=lambda ms: 1.5, cold=0):
        self.now, self.slow, self.loses, self.cold = 0.0, slow, loses, cold
        self.ran, self.runs = None, 0
        monkeypatch.setattr(on_device, "_clock", lambda threads: lambda: self.now)
        monkeypatch.setitem(on_device.RUNTIMES, "paper", self.opened)
        monkeypatch.setattr(on_device, "_slower", [1.0])

    def watched(self, ms):
        """One run was."""

    def opened(self, content, threads, batch, precision):
        ms, seen = float(content), []

        def run(who):
            self.ran, self.runs = who, self.runs + 1 if self.ran is who else 1
            self.now += 1e-3 * ms * (self.loses(ms) if self.slow(self.now) else 1.0) * (1 + (self.runs <= self.cold))

        def alone():
            run(alone)

        def watched():
            begin = self.now
            run(watched)
            seen.append(1e3 * (self.now - begin))
            self.watched(seen[-1])

        return alone, watched, lambda: [("only", "Conv", on_device._fast(seen))]


ON_PAPER = {"runtime": "paper", "threads": 1, "batch": 1, "precision": "f32"}


def busy_first(seconds):
    return lambda now: now < seconds


def at_rest_now_and_then(now):
    return now % 1.0 > 0.3


@pytest.mark.parametrize("slow", [at_rest_now_and_then, busy_first(1.5)])
def test_networks_are_compared_as_on_a_machine_at_rest(monkeypatch, slow):
    Machine(monkeypatch, slow, loses=lambda ms: 1.2 if ms > 0.8 else 1.6)
    took = on_device.race([b"1.0", b"0.6"], **ON_PAPER, seconds=1.0, pace=1.0)
    assert took == pytest.approx([1.0, 0.6], rel=1e-6)


def test_a_machine_that_is_never_at_rest_is_measured_as_it_is(monkeypatch):
    machine = Machine(monkeypatch, lambda now: True)
    assert on_device.race([b"1.0", b"0.6"], **ON_PAPER, seconds=1.0, pace=1.0) == pytest.approx([1.5, 0.9])
    assert machine.now <= on_device.OPENINGS
    machine.now = 0.0
    found = on_device.measure(b"0.6", **ON_PAPER, seconds=0.3, beside=b"1.0", pace=1.0)
    assert (found["whole"], found["beside"]) == pytest.approx((0.9, 1.5)) and machine.now < 2 * on_device.WAIT


def test_a_machine_that_does_not_come_to_rest_is_waited_for_once(monkeypatch):
    """A run held to a time has dozens of networks measured: to wait for each took minutes beside a busy neighbour."""
    machine = Machine(monkeypatch, lambda now: True)

    def race():
        machine.now = 0.0
        return on_device.race([b"1.0", b"0.6"], **ON_PAPER, seconds=1.0, pace=1.0)

    assert race() == pytest.approx([1.5, 0.9]) and machine.now > 4.0
    for _ in range(2):
        assert race() == pytest.approx([1.5, 0.9]) and machine.now < 1.5
    machine.now = 0.0
    on_device.measure(b"0.6", **ON_PAPER, seconds=0.1, beside=b"1.0", pace=1.0)
    assert machine.now < 0.5
    machine.slow = lambda now: False
    assert race() == pytest.approx([1.0, 0.6])
    machine.slow = busy_first(1.5)  # it has been seen at rest, and is waited for again
    assert race() == pytest.approx([1.0, 0.6])


def test_of_a_fast_network_some_runs_of_a_turn_are_watched(monkeypatch):
    machine = Machine(monkeypatch, lambda now: False)
    seen = []
    monkeypatch.setattr(machine, "watched", seen.append)
    on_device.measure(b"0.05", **ON_PAPER, seconds=0.2, beside=b"1.0", pace=1.0)
    assert 3 * on_device.WATCHED <= len(seen) <= 10 * on_device.WATCHED


def test_nodes_are_timed_while_the_network_beside_is_as_fast_as_on_a_machine_at_rest(monkeypatch):
    Machine(monkeypatch, at_rest_now_and_then, loses=lambda ms: 1.2 if ms > 0.8 else 1.6)
    for pace in (1.0, 0.0):  # known, and looked for
        found = on_device.measure(b"0.6", **ON_PAPER, seconds=0.3, beside=b"1.0", pace=pace)
        assert (found["whole"], found["beside"]) == pytest.approx((0.6, 1.0))
        assert found["nodes"] == [("only", "Conv", pytest.approx(0.6))]


def test_less_than_a_block_may_be_computed_channel_by_channel():
    """As ONNX Runtime does with AVX-512: 3 to 16 inputs one by one, 24 as if they were 32."""

    def read(inputs):
        return inputs if inputs < 16 else 16 * math.ceil(inputs / 16)

    random = np.random.default_rng(0)
    rows = [
        (o, i, (1.0 + 0.01 * 16 * math.ceil(o / 16) * read(i)) * random.normal(1.0, 0.01))
        for o in (8, 16, 24, 32, 48, 64) for i in (2, 4, 8, 16, 24, 32, 40, 64)
    ]  # fmt: skip
    table = staircases({"layer": np.array(rows)}, {"layer": "Conv"}, grain=8)["layer"]
    assert table.edges[1].tolist() == [4, 8, 12, 16, 32, 48, 64] and table.edges[0].tolist() == [16, 32, 48, 64]
    assert table.at((32, 24)) == table.at((32, 32)) > 1.3 * table.at((32, 16))
    assert table.at((32, 8)) == pytest.approx(1.0 + 0.01 * 32 * 8, rel=0.1)


def test_what_a_network_takes_after_itself_counts_however_long_the_caches_remember_another(monkeypatch):
    Machine(monkeypatch, lambda now: False, cold=8)
    found = on_device.measure(b"0.6", **ON_PAPER, seconds=0.3, beside=b"1.0", pace=1.0)
    assert (found["whole"], found["beside"], found["spread"]) == pytest.approx((0.6, 1.0, 0.0))
    assert found["nodes"] == [("only", "Conv", pytest.approx(0.6))]
    assert on_device.race([b"1.0", b"0.6"], **ON_PAPER, seconds=1.0, pace=1.0) == pytest.approx([1.0, 0.6])


def test_what_was_measured_on_a_busy_machine_is_measured_again_once_that_is_known(monkeypatch):
    paces = []
    took = iter([1.5, 0.9, 0.6, 1.0, 0.6])  # the dense network, two others, then the first two again
    besides = iter([1.5, 1.0, 1.0])

    def measure(content, *, beside=None, pace=0.0, **_):
        paces.append(pace)
        times = {"whole": next(took), "spread": 0.0, "nodes": []}
        return times if beside is None else {**times, "beside": next(besides)}

    monkeypatch.setattr(on_device, "measure", measure)
    monkeypatch.setattr(on_device, "version", lambda runtime: "1")
    monkeypatch.setattr(making, "need_runtime", lambda runtime: runtime)
    monkeypatch.setattr(making, "find_grain", lambda *_: 8)
    found = es.profile(Small().eval(), X, networks=3)
    assert [n.whole for n in found.networks] == pytest.approx([1.0, 0.6, 0.6])
    assert paces == [0.0, 1.5, 1.5, 1.0, 1.0]


# -- profiles


def test_a_profile_predicts_what_it_has_measured(profile):
    for network in profile.networks:
        predicted = profile.overhead + sum_of(profile.tables, profile.layers, network)
        assert predicted == pytest.approx(network.whole, rel=1.0), "on a busy machine not closer"
    assert {x.module for x in profile.layers} == {"one.0", "two.0", "deep", "last"}
    graph = profile.on(graph_of_small())
    assert CostModel(graph).cost(graph.sizes).latency == pytest.approx(profile.dense, rel=1.0)


@pytest.mark.parametrize("block", [4, 8, 16])
def test_the_grain_is_the_smallest_at_which_a_runtime_is_as_fast_as_at_any(profile, monkeypatch, block):
    """Here a runtime computes whole blocks of channels."""
    graph = graph_of_small()
    costs = CostModel(graph)

    def took(plan):
        blocks = -(-np.array(plan.counts(graph)) // block) * block
        return costs.cost(np.minimum(blocks, graph.sizes)).macs

    monkeypatch.setattr(on_device, "race", lambda plans, **_: [took(plan) for plan in plans])
    assert making.find_grain(SimpleNamespace(file=lambda plan: plan), graph, profile.setting) == block


def test_a_profile_that_was_stored_is_the_same(profile, tmp_path):
    es.save_profile(profile, tmp_path / "p.json")
    assert es.load_profile(tmp_path / "p.json") == profile


def test_an_interrupted_profile_goes_on(profile, tmp_path, monkeypatch):
    file = tmp_path / "p.json"
    es.save_profile(replace(profile, networks=profile.networks[:7]), file)
    measure_little(monkeypatch, networks=8)
    monkeypatch.setattr(making, "SECONDS", 0.0)
    measured = []
    whole = es.profile(Small().eval(), X, networks=8, to=file, progress=lambda done, of: measured.append(done))
    assert whole.networks[:7] == profile.networks[:7]
    assert len(es.load_profile(file).networks) == 8 and measured[-1] == 8


def test_a_profile_of_another_network_goes_on_with_nothing(profile, tmp_path):
    es.save_profile(profile, tmp_path / "p.json")
    with pytest.raises(ValueError, match="another network"):
        es.profile(nn.Sequential(nn.Conv2d(3, 4, 3)), X, networks=2, to=tmp_path / "p.json")


def test_a_damaged_profile_is_refused(profile):
    text = to_json(profile)
    with pytest.raises(ValueError, match="truncated"):
        from_json(text[: len(text) // 2])
    with pytest.raises(ValueError, match="not a profile"):
        from_json("{}")
    content = json.loads(text)
    content["networks"][0]["whole"] *= 2
    with pytest.raises(ValueError, match="changed after"):
        from_json(json.dumps(content))
    with pytest.warns(UserWarning, match="changed after"):
        assert from_json(json.dumps(content), anyway=True).dense == pytest.approx(2 * profile.dense)
    content["networks"][0]["ms"] = [-1.0]
    with pytest.raises(ValueError, match="not a whole profile"):
        from_json(json.dumps(content))


def test_a_profile_of_another_network_or_setting_is_refused(profile):
    with pytest.raises(ValueError, match="another network"):
        profile.on(es.trace(nn.Sequential(nn.Conv2d(3, 4, 3)), X))
    wider = es.trace(nn.Sequential(nn.Conv2d(3, 4, 3)), X)
    assert wider.overhead is None
    with pytest.raises(ValueError, match="threads 1, not 2"):
        profile.need({"threads": 2})
    with pytest.warns(UserWarning, match="threads 1, not 2"):
        profile.need({"threads": 2}, anyway=True)


def test_a_runtime_that_nobody_knows_is_refused():
    with pytest.raises(ValueError, match="choose one of onnxruntime, openvino, torch"):
        es.profile(Small(), X, runtime="fastest")
    with pytest.raises(ValueError, match="in onnxruntime choose f32, int8"):
        es.profile(Small(), X, precision="bf16")


def test_a_profile_in_eight_bits_times_the_files_that_are_shipped(monkeypatch):
    pytest.importorskip("onnxruntime")
    measure_little(monkeypatch, networks=2)
    monkeypatch.setattr(making, "SECONDS", 0.0)
    measure_little(monkeypatch, networks=2)
    seen, measure = [], on_device.measure

    def watched(content, **how):
        assert b"QuantizeLinear" in content
        seen.append(measure(content, **how))
        return seen[-1]

    monkeypatch.setattr(on_device, "measure", watched)
    torch.manual_seed(0)
    model = Small().eval()
    profile = es.profile(model, X, precision="int8", networks=2)
    kinds = [{layer_of(name) for name, kind, _ in found["nodes"] if kind.startswith("QLinear")} for found in seen]
    assert all({0, 1, 2} <= layers for layers in kinds)
    assert profile.setting.precision == "int8" and profile.grain in making.GRAINS and "int8" in profile.describe()
    small = es.compress(model, X, budget=es.Budget(macs=0.5), method=es.Magnitude()).model
    kept = at_the_end.time_kept(model, small, X, es.Budget(latency=0.5, profile=profile))
    assert kept is not None and kept.setting.precision == "int8" and kept.small > 0
    measured = len(seen)
    es.SVDOneShot().start(model, X, es.Budget(latency="1 s", profile=profile))  # asks for forms of layers
    assert len(seen) > measured


def test_a_full_disk_leaves_no_half_of_a_network_to_be_measured(tmp_path, monkeypatch):
    def full(self, content):
        with self.open("wb") as file:
            file.write(content[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match=r"there/000\.onnx: cannot be written .*; make room there"):
        making.export_networks(Small().eval(), X, tmp_path / "there", networks=3, grain=8)
    assert not list(tmp_path.iterdir())


def test_a_place_for_a_profile_is_looked_at_before_anything_is_measured(tmp_path, monkeypatch):
    def too_early(*_, **__):
        raise AssertionError("it was measured")

    monkeypatch.setattr(on_device, "measure", too_early)
    with pytest.raises(ValueError, match="is a folder; give the name of a file"):
        making.profile(Small().eval(), X, to=tmp_path)


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
def test_networks_go_to_another_machine_and_come_back_as_a_profile(tmp_path, monkeypatch, runtime):
    pytest.importorskip(runtime)
    monkeypatch.setattr(making, "SECONDS", 0.0)
    torch.manual_seed(0)
    model = Small().eval()
    place = making.export_networks(model, X, tmp_path / "there", networks=3, grain=8, runtime=runtime)
    with pytest.raises(ValueError, match=r"3 networks are not measured yet \(000.json\)"):
        making.collect(model, X, place)
    environment = {"PATH": "", "OMP_NUM_THREADS": "1"}  # nothing of ours is needed there
    for _ in range(2):  # the second time nothing is left to do
        found = subprocess.run(
            [sys.executable, "measure.py", "."], cwd=place, env=environment, capture_output=True, text=True, check=True
        )
    assert found.stdout == ""
    profile = making.collect(model, X, place)
    assert len(profile.networks) == 3 and profile.grain == 8 and profile.dense > 0
    assert profile.setting.runtime == runtime
    (place / "001.json").write_text("{")
    with pytest.raises(ValueError, match="not a folder of exported and measured networks"):
        making.collect(model, X, place)


def test_the_command_makes_a_profile_and_checks_it(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    measure_little(monkeypatch, networks=3)
    monkeypatch.setattr(making, "SECONDS", 0.0)
    monkeypatch.setattr(making, "NETWORKS", 3)
    monkeypatch.setattr("espalier.present.cli.make_model", lambda config: Small())
    file = tmp_path / "p.json"
    options = ["profile", "resnet20", "--out", str(file), "--input", "1,3,16,16", "--check"]
    found = CliRunner().invoke(app, options)
    assert found.exit_code == 0, found.output
    assert "onnxruntime" in found.output and "networks that are not in the profile" in found.output
    assert len(es.load_profile(file).networks) == 3


@pytest.mark.parametrize(("text", "value"), [("0.5", 0.5), ("2ms", "2ms"), (None, None)])
def test_the_option_for_time_takes_a_fraction_or_an_amount(text, value):
    assert time_of(text) == value


# -- the loop


@pytest.mark.parametrize("really", [lambda share: 1.3 * share, lambda share: 0.55 + 0.4 * share])
def test_plans_are_measured_until_the_time_is_right_however_wrong_the_profile_is(profile, monkeypatch, really):
    model, graph = Small().eval(), graph_of_small()
    importance = {g.name: np.random.default_rng(0).random(g.size) for g in graph.groups}
    planned = []

    def watched(timed, *args, **options):
        planned.append(solve(timed, *args, **options))
        return planned[-1]

    def race(contents, **_):
        assert len(contents) == 2 and contents[0] == b"dense"
        return [1.0, really(profile.predict(graph, planned[-1].counts(graph)) / profile.dense)]

    monkeypatch.setattr(closing, "solve", watched)
    monkeypatch.setattr(on_device, "race", race)
    budget = es.Budget(latency=0.8, profile=profile)
    found = closing.settle(Family(model, graph, (X,)), b"dense", importance, budget)
    assert found.limit == pytest.approx(0.8 * profile.dense)
    assert (
        found.measured <= found.limit < (found.above or math.inf)
    )  # where blocks are wide, the first plan may be close
    for share in np.linspace(0.4, 0.9, 30):  # a better one there is not
        plan = solve(profile.on(graph), importance, es.Budget(latency=float(share), profile=profile))
        took = really(profile.predict(graph, plan.counts(graph)) / profile.dense) * profile.dense
        assert took > found.limit or took <= found.measured or found.measured >= closing.CLOSE * found.limit
    assert found.budget.profile.correction == pytest.approx(profile.correction * found.measured / found.predicted)
    assert found.rounds <= closing.ROUNDS and len(planned) <= 2 * closing.SOLVES  # once more with blocks held


class Paper:
    """Networks on paper: in place of a file, what the network of a plan takes by staircases."""

    def __init__(self, model, graph, *args, **options):
        self.graph = graph

    def file(self, plan):
        graph = timed(self.graph)
        return repr(CostModel(graph).cost(plan.counts(graph)).latency).encode()


@pytest.fixture
def paper(profile, monkeypatch):
    """A graph and a profile on paper; measured is what ``really`` makes of the share of the dense network's time."""

    def of(network, really):
        graph = timed(es.trace(network, X))
        dense = CostModel(graph).cost(graph.sizes).latency
        step = profile.dense / dense
        monkeypatch.setattr(type(profile), "on", lambda self, graph: timed(graph, per_step=self.correction * step))
        monkeypatch.setattr(on_device, "race", lambda files, **_: [really(float(file) / dense) for file in files])
        monkeypatch.setattr(base, "Family", Paper)
        own = replace(profile, correction=1.0)
        return own.on(graph), own

    return of


def test_where_a_whole_block_is_the_step_narrower_layers_fill_it(paper):
    model = build_model("resnet20", num_classes=10).eval()
    graph, profile = paper(model, lambda share: share)
    graph, _ = offer_blocks(model, graph, X)
    random = np.random.default_rng(1)
    worth = worth_of_blocks(graph, {g.name: random.random(g.size) * random.exponential() for g in graph.groups})
    budget, family, rules = es.Budget(latency=0.5, profile=profile), Paper(model, graph), block_rules(graph)
    found = closing.settle(family, family.file(es.Plan.dense(graph)), worth, budget, rules=rules)
    assert found.is_close and found.above > found.limit


def times_on_the_way(run, profile):
    """40 steps; the share of the dense network's time that is predicted after each, before and after the last decision."""
    optimizer, took = torch.optim.SGD(run.model.parameters(), lr=0.05), {False: [], True: []}
    for step in range(40):
        loss = run.model(torch.randn(4, *X.shape[1:])).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.step(progress=(step + 1) / 40, optimizer=optimizer)
        took[run.settled].append(profile.predict(run.graph) / profile.dense)
    return took


def test_on_the_way_no_more_goes_than_the_last_decision_can_use(paper):
    """Small networks are much faster than was predicted, as it turns out once the run has begun."""
    torch.manual_seed(0)
    model, began = Small(), []
    _, profile = paper(model, lambda share: share**2 if began else share)
    run = es.attach(model, X, budget=es.Budget(latency=0.6, profile=profile), method=es.TCP(chunk=0.01))
    began.append(True)
    took = times_on_the_way(run, profile)
    assert took[False][-1] ** 2 >= 0.6 >= took[True][-1] ** 2 >= 0.9 * 0.6


def test_what_is_left_of_a_network_is_not_measured_as_if_it_were_whole(paper):
    torch.manual_seed(0)
    _, profile = paper(Small(), lambda share: share)
    budget, method = es.Budget(latency=0.6, profile=profile), es.TCP(chunk=0.01)
    run = es.attach(Small(), X, budget=budget, method=method)
    times_on_the_way(run, profile)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_device, "race", lambda *_, **__: pytest.fail("it was measured"))
        again = es.attach(Small(), X, budget=budget, method=method, state=run.state_dict())
    assert again.cost == run.cost and again.limits == run.limits
    assert again.budget.profile == run.budget.profile


def test_a_block_that_is_a_large_step_does_not_lead_below_the_limit_before_the_last_decision(paper):
    torch.manual_seed(0)
    model = build_model("resnet20", num_classes=10)
    _, profile = paper(model, lambda share: share)
    run = es.attach(model, X, budget=es.Budget(latency=0.6, profile=profile), method=es.TCP(blocks=True, chunk=0.01))
    took = times_on_the_way(run, profile)
    assert min(took[False]) >= 1.05 * 0.6 and 0.96 * 0.6 <= took[True][-1] <= 0.6


def test_one_call_brings_a_network_to_a_fraction_of_its_time(profile, monkeypatch):
    measure_little(monkeypatch, networks=2)
    torch.manual_seed(0)
    result = es.compress(Small(), X, budget=es.Budget(latency=0.9, profile=profile), method=es.Magnitude())
    assert result.cost.macs < result.dense.macs
    assert result.limits["latency"] == pytest.approx(0.9 * profile.dense)


def test_a_budget_of_time_in_pytorch_is_measured_in_pytorch(monkeypatch):
    """Planned, measured and delivered as a program of ``torch.export``; no ONNX in it."""
    measure_little(monkeypatch, networks=2)
    monkeypatch.setattr(making, "find_grain", lambda *_: 8)
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setattr(making, "SECONDS", 0.0)
    torch.manual_seed(0)
    model = Small()
    budget = es.Budget(latency=0.95, profile=es.profile(model, X, runtime="torch", networks=3))
    result = es.compress(model, X, budget=budget, method=es.Magnitude())
    assert result.cost.macs < result.dense.macs
    kept = at_the_end.time_kept(model, result.model, X, budget)
    assert kept.setting.runtime == "torch" and kept.small > 0 and kept.limit == pytest.approx(0.95 * kept.dense)


class Described(nn.Module):
    """Takes what detectors and language models take: images in a list, a scale by its name."""

    def __init__(self):
        super().__init__()
        self.body = Small()

    def forward(self, images, scale=None):
        return {"logits": self.body(scale * torch.stack(images))}


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
def test_networks_that_take_lists_and_keywords_are_held_to_a_time(monkeypatch, runtime):
    pytest.importorskip(runtime)
    measure_little(monkeypatch, networks=2)
    monkeypatch.setattr(making, "find_grain", lambda *_: 8)
    monkeypatch.setattr(making, "SECONDS", 0.0)
    torch.manual_seed(0)
    model, example = (
        Described().eval(),
        {"scale": torch.ones(1), "images": [X[0]]},
    )  # in another order than it takes them
    budget = es.Budget(latency="1 s", profile=es.profile(model, example, runtime=runtime, networks=3))
    result = es.compress(model, example, budget=budget, method=es.Magnitude())
    assert result.time.small > 0 and result.proof.passed
    with pytest.raises(ValueError, match=r"profile\(batch=2\): the example has a list of tensors"):
        es.profile(model, example, runtime=runtime, batch=2)


@torch.jit.script
def brighter(x):
    if bool(x.mean() < 0):
        x = x + 1
    return x


class Branching(nn.Module):
    """One of its branches reads by name what a layer around it makes."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 3)

    def forward(self, x):
        return self.two(brighter(self.one(x)))


def test_networks_with_branches_in_their_file_are_profiled(monkeypatch):
    pytest.importorskip("onnxruntime")
    measure_little(monkeypatch, networks=2)
    monkeypatch.setattr(making, "find_grain", lambda *_: 8)
    monkeypatch.setattr(making, "SECONDS", 0.0)
    assert len(es.profile(Branching().eval(), X, networks=2).layers) == 2


def test_a_network_that_cannot_be_written_for_a_runtime_is_refused_in_one_line():
    pytest.importorskip("onnxruntime")

    class Unheard(nn.Module):
        def forward(self, x):
            return torch.linalg.eigvalsh(x)

    with pytest.raises(ValueError, match=r"cannot be exported to ONNX by tracing: .*eigvalsh.*; runtime='torch'"):
        es.profile(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), Unheard()), X)


# -- other forms of layers


def test_forms_that_were_never_measured_are_named(profile):
    places, _ = find_places(Small(), X)
    place = places["two.0"]
    graph = with_alternatives(
        profile.on(graph_of_small()), {"two.0": [sequence(place, "channel", [8]), dense_sequence(place)]}
    )
    with pytest.raises(ValueError, match=r"form 'channel' of two\.0\.0 was never measured"):
        profile.on(graph)


def measure_little(monkeypatch, *, networks):
    for module, name, value in (
        (forms, "NETWORKS", networks),
        (forms, "SECONDS", 0.0),
        (closing, "SECONDS", 0.0),
        (closing, "ROUNDS", 1),
        (at_the_end, "SECONDS", 0.0),
        (on_device, "OPENINGS", 1),
        (on_device, "TURN", 0.0),
        (on_device, "PACE", 1e9),  # whatever else the machine does
    ):
        monkeypatch.setattr(module, name, value)


def test_a_result_says_the_milliseconds_that_were_measured(profile, monkeypatch):
    measure_little(monkeypatch, networks=2)
    monkeypatch.setattr(on_device, "race", lambda contents, **_: [2.0, 0.98765])
    budget = es.Budget(latency="50%", macs=0.9, profile=profile)
    result = es.compress(Small().eval(), X, budget=budget, method=es.Magnitude())
    assert "MACs limit" not in repr(result) and "macs limit " in repr(result)
    assert "0.988 of 2 ms, limit 1 ms" in repr(result)


def test_ranks_are_planned_by_what_factorised_layers_take_and_a_run_goes_on_with_these_times(profile, monkeypatch):
    measure_little(monkeypatch, networks=3)
    torch.manual_seed(0)
    model = Small().eval()
    run = es.SVDOneShot().start(model, X, es.Budget(latency=0.95, profile=profile))
    known = run.budget.profile
    assert {x.form for part in known.forms for x in part.layers} == {"", "channel", "spatial"}
    assert known.lacking(run.graph) == [] and run.cost.latency > 0
    assert from_json(to_json(known)) == known
    state = run.state_dict()
    again = es.attach(Small(), X, budget=es.Budget(latency=0.95, profile=profile), method=es.SVDOneShot(), state=state)
    assert again.budget.profile.forms == known.forms and again._reference == run._reference is not None
    assert again.cost == run.cost


def test_the_last_ranks_are_built_and_measured(profile, monkeypatch):
    measure_little(monkeypatch, networks=2)
    files = []

    def race(contents, **_):
        files.append(contents)
        return [1.0, 0.5]

    monkeypatch.setattr(on_device, "race", race)
    torch.manual_seed(0)
    run = es.attach(Small(), X, budget=es.Budget(latency=0.9, profile=profile), method=es.DPRP())
    assert not files
    run.finish()
    assert [len(pair) for pair in files] == [2] and run.cost.latency == pytest.approx(0.5 * profile.dense)


def test_everything_is_measured_beside_the_dense_network_because_the_machine_may_be_slower_now(profile, monkeypatch):
    measure_little(monkeypatch, networks=2)
    monkeypatch.setattr(making, "SECONDS", 0.0)
    really, took = on_device.measure, []

    def measured(content, *, beside=None, **options):
        found = really(content, beside=beside, **options)
        assert ("beside" in found) == (beside is not None)
        took.append((found["whole"], found.get("beside")))
        return found

    monkeypatch.setattr(on_device, "measure", measured)
    monkeypatch.setattr(making, "find_grain", lambda *_: 8)
    found = es.profile(Small().eval(), X, networks=3)
    (dense, nothing), *others = took
    assert nothing is None and found.dense == dense
    assert [n.whole for n in found.networks[1:]] == pytest.approx([t * dense / beside for t, beside in others])
    took.clear()
    run = es.SVDOneShot().start(Small().eval(), X, es.Budget(latency=0.95, profile=profile))
    assert took and [n.whole for n in run.budget.profile.forms[0].networks] == pytest.approx(
        [t * profile.dense / beside for t, beside in took]
    )


@pytest.mark.parametrize("method", [es.MGP(inputs=False), es.DPRP()])
def test_kernel_shapes_and_ranks_that_fall_in_training_have_times_too(profile, monkeypatch, method):
    measure_little(monkeypatch, networks=2)
    torch.manual_seed(0)
    run = method.start(Small().eval(), X, es.Budget(latency=0.95, profile=profile))
    assert run.budget.profile.lacking(run.graph) == [] and run.budget.profile.forms and run.cost.latency > 0
    with pytest.raises(ValueError, match="no times are known of the forms"):
        solve(replace(run.graph, overhead=None), {}, {"latency": 1.0})


def stepped(run, to=1.0, steps=10):
    """``run`` after training to ``to``, on noise."""
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.01)
    for step in range(round(to * steps)):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * run.lr_scale(step / steps, default=1.0)
        (run.model(torch.randn(2, *X.shape[1:])).square().mean() + run.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        run.step(progress=(step + 1) / steps, optimizer=optimizer)
    return run


@pytest.mark.parametrize("to", [0.4, 0.8])  # before the layers take their forms, and after
def test_tt_lc_is_held_to_a_time_and_goes_on_with_what_it_has_measured(profile, monkeypatch, to):
    """Every form at every rank has a time, so the solver chooses forms by it as by MACs, and the plan is measured."""
    measure_little(monkeypatch, networks=2)
    races = []

    def race(contents, **_):
        races.append(contents)
        return [1.0, 0.9]

    monkeypatch.setattr(on_device, "race", race)
    torch.manual_seed(0)
    budget, method = es.Budget(latency=0.95, profile=profile), es.TTLC(search=0, iterations=2, share=0.7)
    run = es.attach(Small(), X, budget=budget, method=method)
    known = run.budget.profile
    assert {x.form for part in known.forms for x in part.layers} == {"", "channel", "spatial", "tucker", "tt"}
    assert len(races) == 1, "what is out of reach by the clock fails before anything is trained"
    stepped(run, to)
    assert len(races) == 2 and run.replaced == (to > 0.7)
    state = run.state_dict()
    for going in (run, es.attach(Small(), X, budget=budget, method=method, state=state)):
        assert going.budget.profile.forms == known.forms and going._reference is not None
        small = going.finish()
        assert any(isinstance(m, FactorisedConv) for m in small.modules())
        assert going.cost.latency <= going.limits["latency"]
        own = es.cost(es.trace(small, X, rehearse=False))
        assert (own.macs, own.params) == (going.cost.macs, going.cost.params)
    assert len(races) == 2, "of the rest of the run nothing is measured again"


def test_under_a_budget_of_time_the_faster_form_is_taken_whatever_its_macs(profile, monkeypatch):
    measure_little(monkeypatch, networks=2)
    monkeypatch.setattr(on_device, "race", lambda contents, **_: [1.0, 0.9])
    torch.manual_seed(0)
    run = es.TTLC(search=0).start(Small(), X, es.Budget(latency=0.95, profile=profile))
    flat = (np.array([10_000]), np.array([10_000]))
    run._times = dict.fromkeys(run._times, Staircase(flat, np.ones((1, 1))))  # two stages take 2 ms, four take 4
    run._times["two.0", ""] = Staircase(flat, np.array([[9.0]]))
    place, wish = run.places["two.0"], Wish((8, 8), 0.5, 8)
    found = spectra_of({"two.0": run.model.two[0].weight.detach()})["two.0"]

    def times(**price):
        return [run._price(place, option)[0] for option in options_at(place, found, wish, **price)[0]]

    assert times(price=run._price)[0] == 2.0 and times(price=run._price)[-1] == 9.0
    assert times(price=run._price) == sorted(set(times(price=run._price))), "each takes longer than the one before"
    assert times() != sorted(set(times())), "by MACs forms are on the front that are slower than better ones"
    with pytest.raises(ValueError, match="ranks='evbmf'"):
        es.TTLC(ranks="equal").start(Small(), X, es.Budget(latency=0.95, profile=profile))


def test_where_a_profile_was_made_elsewhere_its_prediction_counts(profile, monkeypatch):
    """Another machine's times cannot be measured here; another version of the runtime is refused unless it is said."""
    monkeypatch.setattr(on_device, "race", None)
    budget = es.Budget(latency=0.9, profile=replace(profile, setting=replace(profile.setting, processor="a camera")))
    run = es.Magnitude().start(Small().eval(), X, budget)
    assert run.cost.macs < run.dense.macs
    other = replace(profile, setting=replace(profile.setting, version="0.1"))
    with pytest.raises(ValueError, match=r"version 0\.1, not"):
        es.Magnitude().start(Small().eval(), X, es.Budget(latency=0.9, profile=other))
