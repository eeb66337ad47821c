"""Networks as people hold them: wrapped, with hooks that are closures, with inputs that are tables; and what has to be said."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import espalier as es
from espalier.copies import copy_model
from espalier.run.onnx import _quiet

X = torch.zeros(1, 3, 16, 16)
BUDGET = es.Budget(macs=0.6)
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated", "ignore:.*torch.jit")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3))


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "compiled": torch.compile,
    "DataParallel": nn.DataParallel,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "several": lambda m: nn.DataParallel(torch.compile(m)),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_the_network_inside_a_wrapper_is_compressed(kind: str, tmp_path: Path) -> None:
    wrapped = WRAPPERS[kind](net())
    inside = es.compress(net(), X, budget=BUDGET, method=es.Magnitude()).model
    small = es.compress(wrapped, X, budget=BUDGET, method=es.Magnitude()).model
    assert type(small) is nn.Sequential
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), inside.parameters(), strict=True))
    graph = es.trace(wrapped, X)
    assert [g.name for g in graph.groups] == ["0"]
    assert es.verify(wrapped, graph, es.Plan.dense(graph), X)
    run = es.attach(wrapped, X, budget=BUDGET, method=es.TCP())
    assert type(run.model) is nn.Sequential
    es.save(wrapped, tmp_path / "dense.safetensors")
    es.save(small, tmp_path / "small.safetensors")
    base = WRAPPERS[kind](net())
    assert es.load(tmp_path / "small.safetensors", base=base) is base
    assert torch.equal(es.load(tmp_path / "small.safetensors", base=net())(X), small(X))


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_what_follows_no_change_of_parameters_is_refused_in_place(group: None) -> None:
    wrapped = nn.parallel.DistributedDataParallel(net())
    assert [g.name for g in es.trace(wrapped, X).groups] == ["0"]
    assert type(es.compress(wrapped, X, budget=BUDGET, method=es.Magnitude()).model) is nn.Sequential
    with pytest.raises(ValueError, match=r"attach: this is a DistributedDataParallel.*before it is wrapped"):
        es.attach(wrapped, X, budget=BUDGET, method=es.TCP())


def test_a_lazy_layer_is_named_with_what_to_do() -> None:
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU(), nn.LazyConv2d(4, 3))
    for call in (lambda: es.trace(model, X), lambda: es.compress(model, X, budget=BUDGET, method=es.Magnitude())):
        with pytest.raises(ValueError, match=r"0 is a LazyConv2d, .*run the model once"):
            call()
    model(X)
    assert [g.name for g in es.trace(model, X).groups] == ["0"]


# -- copies


class Hooked(nn.Module):
    """A hook of the given kind keeps what a layer gave, and the forward reads it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(16, 4, 1), nn.Conv2d(8, 8, 1)
        self.seen: dict[str, Tensor] = {}
        self.kept: list[Tensor] = []
        seen, kept = self.seen, self.kept
        hooks: dict[str, Any] = {
            "over the module": lambda m, i, o: self.seen.update(a=o),
            "over a table": lambda m, i, o: seen.update(a=o),
            "over a list": lambda m, i, o: kept.__setitem__(slice(None), [o]),
            "a method": self.keep,
        }
        self.a.register_forward_hook(hooks[kind])

    def keep(self, module: nn.Module, given: Any, output: Tensor) -> None:
        self.seen["a"] = output

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(self.a(x))
        return self.b(torch.cat([y, self.kept[0] if self.kept else self.seen["a"]], 1))


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("kind", ["over the module", "over a table", "over a list", "a method"])
def test_a_hook_keeps_for_its_own_copy(kind: str, used: bool) -> None:
    torch.manual_seed(0)
    model = Hooked(kind)
    if used:
        model(torch.randn(2, 3, 16, 16))  # keeps a result with a history
    before = copy.copy(model.seen), list(model.kept)
    other = copy_model(model, {})
    x = torch.randn(1, 3, 16, 16)
    result = other(x)
    assert model.seen.keys() == before[0].keys() and len(model.kept) == len(before[1])
    assert all(model.seen[k] is v for k, v in before[0].items())
    assert torch.equal(result, model(x))
    small = es.compress(model, X, budget=BUDGET, method=es.Magnitude()).model
    assert small(x).shape == model(x).shape and small.a.weight.shape[0] < 8


@pytest.mark.parametrize("norm", [
    nn.utils.weight_norm, nn.utils.spectral_norm,
    nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm,
], ids=["hook weight", "hook spectral", "weight", "spectral"])  # fmt: skip
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_normalised_weights_are_cut_as_what_they_compute(norm: Callable[..., Any], used: bool) -> None:
    torch.manual_seed(0)
    layers = [
        norm(nn.Conv2d(3, 8, 3)),
        nn.ReLU(),
        norm(nn.Conv2d(8, 16, 3)),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ]
    model = nn.Sequential(*layers, norm(nn.Linear(16, 6)), nn.ReLU(), nn.Linear(6, 4)).eval()
    if used:
        model(torch.randn(1, 3, 16, 16))
    result = es.compress(model, X, budget=BUDGET, method=es.Magnitude())
    assert {g.name: g.size for g in result.graph.groups} == {"0": 8, "2": 16, "6": 6}
    assert result.model[0].weight.shape[0] == result.model[2].weight.shape[1] < 8
    graph = es.trace(model, X)
    es.verify(model, graph, es.Plan.dense(graph), X).require()


@pytest.mark.parametrize("method", [es.Magnitude(), es.TCP()], ids=["magnitude", "tcp"])
def test_masks_of_torchs_pruning_are_cut_with_their_weights(method: es.Method) -> None:
    def made() -> nn.Module:
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3)]
        for layer in layers[:3:2]:
            prune.random_unstructured(layer, "weight", 0.3)
        return nn.Sequential(*layers).eval()

    model = made()
    run = es.attach(made(), X, budget=BUDGET, method=method)
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.01)
    run.step(progress=1.0, optimizer=optimizer)
    small = run.finish()
    assert small[2].weight_orig.shape == small[2].weight_mask.shape == small[2].weight.shape
    assert small[2].in_channels == small[2].weight.shape[1] < 8
    graph = es.trace(model, X)
    plan = es.solve(graph, {g.name: np.arange(g.size) for g in graph.groups}, BUDGET)
    es.verify(model, graph, plan, X, fresh=made).require()


def test_a_scripted_part_takes_its_tensors_with_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU())), nn.Conv2d(16, 4, 3))
    graph = es.trace(model, X)
    plan = es.solve(graph, {g.name: torch.arange(g.size).numpy() + 1.0 for g in graph.groups}, BUDGET)
    small = es.shrink(model, graph, plan)
    assert small.get_parameter("0.0.weight").shape[0] == small[1].weight.shape[1] < 16
    assert model.get_parameter("0.0.weight").shape[0] == 16
    es.verify(model, graph, plan, X).require()


def test_a_scripted_network_is_compressed_saved_and_loaded(tmp_path: Path) -> None:
    small = es.compress(torch.jit.script(net()), X, budget=BUDGET, method=es.Magnitude()).model
    es.save(small, tmp_path / "small.safetensors")
    again = es.load(tmp_path / "small.safetensors", base=torch.jit.script(net()))
    assert torch.equal(again(X), small(X)) and small.state_dict()["0.weight"].shape[0] < 16


def test_a_forward_that_was_replaced_is_that_of_the_copy() -> None:
    model = net()
    before = model.forward
    model.forward = lambda x: before(x) * 2  # type: ignore[method-assign]
    small = es.compress(model, X, budget=BUDGET, method=es.Magnitude()).model
    assert small[0].weight.shape[0] < 16 == model[0].weight.shape[0]


def test_a_forward_that_returns_nothing_is_refused() -> None:
    model = net()
    model.forward = lambda x: None  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="gives NoneType; it has to return what it computes"):
        es.trace(model, X)


# -- inputs


@dataclass(frozen=True)
class Both:
    p: Tensor
    q: Tensor


def test_an_input_that_is_a_dataclass_is_compressed() -> None:
    model = Takes(lambda i: i.p + i.q)
    assert es.compress(model, (Both(X, X),), budget=BUDGET, method=es.Magnitude()).model.a.weight.shape[0] < 8


class Pair(NamedTuple):
    p: Tensor
    q: Tensor


class Takes(nn.Module):
    def __init__(self, read: Callable[..., Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.read = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), read

    def forward(self, *given: Any, **named: Any) -> Any:
        return self.b(self.a(self.read(*given, **named)))


INPUTS: dict[str, tuple[Callable[..., Tensor], Any, list[str]]] = {
    "a named tuple": (lambda i: i.p + i.q, Pair(X, X), ["p", "q"]),
    "a named tuple in a tuple": (lambda i: i.p + i.q, (Pair(X, X),), ["p", "q"]),
    "keywords": (lambda p, q: p + q, {"p": X, "q": X}, ["p", "q"]),
    "a list": (lambda xs: xs[0] + xs[1], ([X, X],), ["input0", "input1"]),
    "a table": (lambda d: d["p"] + d["q"], ({"p": X, "q": X},), ["p", "q"]),
    "a tensor and a list": (lambda x, xs: x + xs[0], (X, [X]), ["input0", "input1.0"]),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_inputs_that_are_no_tensors_in_a_row_are_compressed_and_exported(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    import onnx

    read, example, names = INPUTS[kind]
    result = es.compress(Takes(read), example, budget=BUDGET, method=es.Magnitude())
    assert es.export_onnx(result.model, tmp_path / "net.onnx", example) < 1e-5
    assert [i.name for i in onnx.load(tmp_path / "net.onnx").graph.input] == names


def test_an_example_without_tensors_is_refused() -> None:
    pytest.importorskip("onnxruntime")
    with pytest.raises(ValueError, match="the example has str"):
        es.export_onnx(net(), "never.onnx", (X, "x"))


# -- what is compared, and what is shown


class Ratio(nn.Module):
    """Of zeros it gives NaN, or zeros up to rounding."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b, self.kind = nn.Conv2d(3, 16, 3, bias=False), nn.Conv2d(16, 4, 3, bias=False), kind

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        if self.kind == "NaN":
            y = y / y.abs().amax((2, 3), keepdim=True)
        y = self.b(y)
        return y if self.kind == "NaN" else y + 1e-30 * y.sin().add(0.1).exp()


@pytest.mark.parametrize("kind", ["NaN", "rounding"])
def test_an_example_of_zeros_condemns_no_network(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = Ratio(kind)
    graph = es.trace(model, X)
    proof = es.verify(model, graph, es.Plan.dense(graph), X)
    assert {c.name for c in proof.checks if not c.passed} <= {"small equals masked"}  # whose inputs are random
    assert es.export_onnx(model, tmp_path / "net.onnx", X) < 1e-4


def test_exporters_say_nothing_even_past_python(capfd: pytest.CaptureFixture[str]) -> None:
    with _quiet():
        os.write(1, b"from C")
        sys.stdout.write("from Python")
        with _quiet():
            os.write(2, b"from C")
        os.write(1, b"from C")
    os.write(1, b"after")
    assert capfd.readouterr() == ("after", "")
