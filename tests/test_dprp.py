"""DPRP: at full rank it is the dense network, ranks only fall, the budget is met exactly, and momentum follows every turn."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import espalier as es
from benchmarks.common import ZOO, build, example
from espalier.costs import cost
from espalier.forms import LowRank, find_places
from espalier.forms.lowrank import DAMPING, orthonormalise
from espalier.forms.svd import svd
from espalier.forms.table import matrix_form
from espalier.graph import trace
from espalier.graph.alternatives import alternatives_name
from espalier.methods import dprp
from espalier.methods.dprp import DPRP, DPRPRun
from espalier.methods.ranks import tails
from espalier.plan import Budget
from espalier.run.compress import compress
from espalier.run.data import Data, load_data
from espalier.run.ema import AveragedWeights
from espalier.run.evaluate import evaluate
from espalier.run.loop import make_optimizer, train
from espalier.run.recipe import Recipe
from espalier.solver import unused_blocks
from espalier.surgery import change_bases, cut_ranks, decompositions, load, save, split_layers, verify
from espalier.surgery.verify import gradients
from tests.steps import EXAMPLE, batch, network, train_step

STEPS = 40


def trained(method: DPRP, budget: Budget, *, steps: int = STEPS) -> tuple[DPRPRun, list[dict[str, int]]]:
    model = network()
    run = method.start(model, EXAMPLE, budget)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    ranks = []
    for step in range(steps):
        train_step(run, optimizer, step)
        run.step(progress=(step + 1) / steps, optimizer=optimizer)
        ranks.append({n: layer.rank for n, layer in run.layers.items()})
    return run, ranks


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Conv2d(5, 7, 3, padding=1),
    "strided": lambda: nn.Conv2d(5, 7, 3, stride=2, padding=1, bias=False),
    "asymmetric": lambda: nn.Conv2d(4, 6, (3, 5), stride=(1, 2), padding=(0, 2), dilation=(2, 1)),
    "pointwise": lambda: nn.Conv2d(4, 6, 1, stride=2),
    "linear": lambda: nn.Linear(9, 4),
}


def factorised(kind: str, form: str, *, whole: bool = False) -> tuple[Any, LowRank, Tensor]:
    """A layer, the same as its factors, and an input; a linear layer has one form."""
    torch.manual_seed(1)
    form = "channel" if kind == "linear" else form
    layer: Any = LAYERS[kind]().double()
    x = torch.randn(2, 9).double() if kind == "linear" else torch.randn(2, layer.in_channels, 12, 11).double()
    place = find_places(nn.Sequential(layer), x)[0]["0"]
    return layer, LowRank.of(copy.deepcopy(layer), place, form=form, whole=whole), x


# -- the layer


@pytest.mark.parametrize("form", ["channel", "spatial"])
@pytest.mark.parametrize("kind", LAYERS)
def test_full_rank_is_the_dense_layer_forward_and_gradient(kind: str, form: str) -> None:
    layer, low, x = factorised(kind, form)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(inputs[0]), low(inputs[1])]
    assert torch.allclose(*outputs, atol=1e-12)
    toward = torch.randn_like(outputs[0])
    for output in outputs:
        (output * toward).sum().backward()
    assert torch.allclose(inputs[0].grad, inputs[1].grad, atol=1e-12)
    gradient = matrix_form(low.form).matrix(layer.weight.grad)
    squares = low.s.square()
    factor = 0.5 / (squares + DAMPING * squares.max())  # the plain gradient of the factors, scaled
    assert torch.allclose(low.u.grad, gradient @ low.v * low.s * factor, atol=1e-11)
    assert torch.allclose(low.v.grad, gradient.T @ low.u * low.s * factor, atol=1e-11)
    assert torch.allclose(low.s.grad, (low.u * (gradient @ low.v)).sum(0), atol=1e-11)


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("form", ["channel", "spatial"])
def test_a_step_moves_the_weight_about_as_far_as_dense_training_however_large_it_is(form: str, scale: float) -> None:
    torch.manual_seed(1)
    layer = nn.Conv2d(8, 8, 3, padding=1, bias=False).double()
    with torch.no_grad():
        layer.weight.mul_(scale)
    x = torch.randn(4, 8, 9, 9).double()
    low = LowRank.of(copy.deepcopy(layer), find_places(nn.Sequential(layer), x)[0]["0"], form=form)
    toward = torch.randn(4, 8, 9, 9).double()
    moved = []
    for module in (layer, low):
        before = module.weight.detach().clone()
        (module(x) * toward).sum().backward()
        torch.optim.SGD(module.parameters(), lr=1e-6 * scale).step()
        moved.append(module.weight.detach() - before)
    dense, ours = moved
    assert 0.5 < ours.norm() / dense.norm() < 1.5
    assert (ours * dense).sum() > 0.8 * ours.norm() * dense.norm()


@pytest.mark.parametrize("form", ["channel", "spatial"])
@pytest.mark.parametrize("kind", ["plain", "asymmetric", "pointwise", "linear"])
def test_composed_or_in_two_layers_makes_no_difference(kind: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind in ("linear", "pointwise"):
        form = "channel"
    _, low, x = factorised(kind, form)
    found = []
    for composes in (True, False):
        monkeypatch.setattr(LowRank, "composes", lambda self, x, answer=composes: answer)
        low.zero_grad()
        output = low(x)
        output.square().sum().backward()
        found.append([output, low.u.grad.clone(), low.s.grad.clone(), low.v.grad.clone()])
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("form", ["channel", "spatial"])
@pytest.mark.parametrize("composes", [True, False])
def test_under_autocast_gradients_are_those_of_float32_up_to_its_precision(
    form: str, composes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, low, x = factorised("plain", form)
    low, x = low.float(), x.float().to(memory_format=torch.channels_last)
    monkeypatch.setattr(LowRank, "composes", lambda self, x: composes)
    toward, found = torch.randn(2, 7, 12, 11), []
    for enabled in (False, True):
        low.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = low(x)
        assert output.dtype == (torch.bfloat16 if enabled else torch.float32)
        (output.float() * toward).sum().backward()
        found.append([low.u.grad.clone(), low.s.grad.clone(), low.v.grad.clone()])
        assert all(g.dtype == torch.float32 and g.is_contiguous() for g in found[-1])
    for exact, half in zip(*found, strict=True):
        assert float((exact - half).norm()) < 0.02 * float(exact.norm())


@pytest.mark.parametrize("form", ["channel", "spatial"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_whole_layer_is_trained_as_the_dense_one(kind: str, form: str) -> None:
    """Momentum and weight decay included."""
    layer, low, x = factorised(kind, form, whole=True)
    recipe = Recipe(epochs=1, lr=0.05, weight_decay=5e-3)
    start, toward = layer.weight.detach().clone(), torch.randn_like(layer(x))
    optimizers = [make_optimizer(module, recipe) for module in (layer, low)]
    for _ in range(30):
        for module, optimizer in zip((layer, low), optimizers, strict=True):
            optimizer.zero_grad()
            (module(x) - toward).square().mean().backward()
            optimizer.step()
    with torch.no_grad():
        assert float((layer.weight - start).norm()) > 0.1
        assert torch.allclose(low.weight, layer.weight, rtol=0, atol=1e-13)
    rests = low.v if low.tall else low.u
    assert torch.equal(rests.detach(), torch.eye(low.rank, dtype=rests.dtype))
    assert torch.equal(low.s.detach(), torch.ones_like(low.s))


def test_weight_decay_goes_over_to_the_values_when_a_layer_is_split() -> None:
    _, low, x = factorised("plain", "spatial", whole=True)
    optimizer = make_optimizer(low, Recipe(epochs=1))

    def decayed() -> set[int]:
        return {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}

    assert decayed() == {id(low.matrix)}
    low(x).square().mean().backward()
    optimizer.step()
    split_layers({"layer": low}, decompositions({"layer": low}), optimizer=optimizer)
    assert decayed() == {id(low.s)}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("shape", [(16, 24), (24, 16)])
def test_splitting_a_whole_layer_keeps_its_weight_and_its_next_step(kind: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(*shape, 3, padding=1).double()
    x = torch.randn(4, shape[0], 8, 8).double()
    with torch.no_grad():  # singular values from 1 to 2: small ones are damped
        u, s, v = svd(matrix_form("spatial").matrix(layer.weight), name="layer")
        matrix = u * torch.linspace(2, 1, len(s), dtype=s.dtype) @ v.T
        layer.weight.copy_(matrix.view(shape[1], 3, shape[0], 3).permute(0, 2, 1, 3))
    low = LowRank.of(layer, find_places(nn.Sequential(layer), x)[0]["0"], form="spatial", whole=True)
    assert low.tall == (shape == (16, 24))
    optimizer: Any = (
        torch.optim.SGD(low.parameters(), lr=1e-2, momentum=0.9)
        if kind == "sgd"
        else torch.optim.AdamW(low.parameters(), lr=1e-3, weight_decay=0.0)
    )
    for step in range(4):
        low(x + step).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    twin = copy.deepcopy(low)
    other = type(optimizer)(twin.parameters(), lr=1.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = low.weight.detach().clone()
    split_layers({"layer": twin}, decompositions({"layer": twin}), optimizer=other)
    assert not twin.whole
    assert torch.allclose(twin.weight, before, atol=1e-10)
    steps = []
    for module, optim in ((low, optimizer), (twin, other)):
        for group in optim.param_groups:
            group["lr"] = 1e-6
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optim.step()
        steps.append(module.weight.detach() - before)
    dense, ours = steps
    assert float(dense.norm()) > 0
    tolerance = 0.05 if kind == "sgd" else 0.3  # damping costs a few per cent; Adam's moments forget in another basis
    assert float((ours - dense).norm()) < tolerance * float(dense.norm())


def test_until_its_rank_falls_a_network_is_trained_as_the_dense_one() -> None:
    plain, ours = network("resnet20"), network("resnet20")
    ours.load_state_dict(plain.state_dict())
    run = DPRP().start(ours, EXAMPLE, Budget(macs=0.5))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.02, momentum=0.9) for m in (plain, ours)]
    for step in range(3):
        x, y = batch(step)
        for model, optimizer in zip((plain, ours), optimizers, strict=True):
            loss = nn.functional.cross_entropy(model.train()(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert run.step(progress=0.01 * step, optimizer=optimizers[1]) is None
    x, _ = batch(9)
    with torch.no_grad():
        assert torch.allclose(plain.eval()(x), ours.eval()(x), atol=1e-4)


def test_factors_stay_orthonormal_between_events_and_after_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dprp, "TURN_EVERY", 10)
    run, _ = trained(DPRP(orthogonality=0.0), Budget(macs=0.5), steps=100)
    assert run.done
    assert not any(layer.whole for layer in run.layers.values() if layer.rank < min(len(layer.u), len(layer.v)))
    split = [layer for layer in run.layers.values() if not layer.whole]
    assert split
    for layer in split:  # the last step was one at which they were turned
        for factor in (layer.u, layer.v):
            assert float((factor.T @ factor - torch.eye(layer.rank)).detach().abs().max()) < 1e-5


def test_it_composes_near_full_rank_and_not_below_break_even() -> None:
    layer = nn.Conv2d(32, 32, 3, padding=1)
    x = torch.zeros(64, 32, 16, 16)
    model = nn.Sequential(LowRank.of(layer, find_places(nn.Sequential(layer), x)[0]["0"], form="spatial"))
    assert model[0].composes(x)
    cut_ranks(model, {"0": 40})
    assert not model[0].composes(x)


@pytest.mark.parametrize("form", ["channel", "spatial"])
def test_truncation_error_is_the_tail_energy(form: str) -> None:
    layer, low, _ = factorised("plain", form)
    model = nn.Sequential(low)
    expected = tails(low.s)
    for rank in range(low.rank, 0, -1):
        cut_ranks(model, {"0": rank})
        error = (model[0].weight - layer.weight).square().sum() / layer.weight.square().sum()
        assert abs(error.item() - float(expected[rank])) < 1e-12


def test_decay_of_the_values_alone_is_decay_of_the_layer() -> None:
    layer, low, _ = factorised("plain", "spatial")
    model = nn.Sequential(low, nn.BatchNorm2d(7))
    groups = make_optimizer(model, Recipe(epochs=1)).param_groups
    decayed = [p for g in groups if g["weight_decay"] for p in g["params"]]
    assert [id(p) for p in decayed] == [id(low.s)]
    assert torch.allclose(low.s.square().sum(), layer.weight.square().sum())


def test_a_rank_that_a_matrix_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="ranks 1 to 4"):
        LowRank(4, 8, rank=5)


def test_the_penalty_of_one_cycle_of_steps_is_on_average_the_sum_over_layers() -> None:
    model = network("resnet20")
    run = DPRP(form="spatial", orthogonality=2.0, sparsity=0.3).start(model, EXAMPLE, Budget(macs=0.5))
    assert run.penalty() == 0.0  # whole layers have none
    split_layers(run.layers, decompositions(run.layers))
    with torch.no_grad():
        for layer in run.layers.values():
            layer.u.add_(0.1 * torch.randn_like(layer.u) / layer.u.shape[0] ** 0.5)

    def gradients_of(loss: Any) -> list[Tensor]:
        model.zero_grad()
        loss.backward()
        return [torch.zeros_like(f) if f.grad is None else f.grad.clone()
                for layer in run.layers.values() for f in (layer.u, layer.s, layer.v)]  # fmt: skip

    expected: Any = 0.0
    for layer in run.layers.values():
        off = sum((f.T @ f - torch.eye(layer.rank)).square().sum() for f in (layer.u, layer.v))
        expected = (
            expected + 2.0 * off / max(layer.rank, 16) ** 2 + 0.3 * layer.s.sum().square() / layer.s.square().sum()
        )
    wanted = gradients_of(expected)
    steps = 8 * 3  # a layer of rank 192, three times 64, takes its turn at one in so many
    assert {max(layer.rank // 64, 1) for layer in run.layers.values()} == {1, 3}
    found, total = [torch.zeros_like(w) for w in wanted], 0.0
    for step in range(steps):
        run._steps = step
        loss: Any = run.penalty()
        total += float(loss.detach()) / steps
        for sum_, gradient in zip(found, gradients_of(loss), strict=True):
            sum_.add_(gradient, alpha=1 / steps)
    assert total == pytest.approx(float(expected.detach()), rel=1e-5)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(found, wanted, strict=True))


# -- turning


def disturbed(dtype: torch.dtype = torch.float32) -> LowRank:
    torch.manual_seed(3)
    layer = nn.Conv2d(16, 24, 3, padding=1).to(dtype)
    low = LowRank.of(
        layer, find_places(nn.Sequential(layer), torch.zeros(1, 16, 8, 8, dtype=dtype))[0]["0"], form="spatial"
    )
    with torch.no_grad():
        for factor in (low.u, low.v):
            factor.add_(0.05 * torch.randn_like(factor) / factor.shape[0] ** 0.5)
        low.s.mul_(1 + 0.2 * torch.randn_like(low.s))
    return low


def test_turning_is_exact_and_leaves_orthonormal_factors() -> None:
    low = disturbed()
    before = low.weight.double()
    change_bases({"layer": low})
    assert float((low.weight.double() - before).norm() / before.norm()) < 1e-6
    for factor in (low.u, low.v):
        off = factor.T @ factor - torch.eye(low.rank)
        assert float(off.abs().max()) < 1e-6
    assert (low.s.diff() <= 0).all()
    assert (low.s >= 0).all()


@pytest.mark.parametrize("kind", ["sgd", "nesterov", "adam", "amsgrad"])
def test_the_optimiser_steps_to_the_same_weight_after_turning(kind: str) -> None:
    """To first order: with a step of 1e-6 the two weights differ by a thousandth of the step."""
    low = disturbed(torch.float64)
    make: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
        "nesterov": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
        "adam": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0),
        "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0, amsgrad=True),
    }
    optimizer = make[kind](low.parameters())
    for step in range(4):
        x = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(step)).double()
        low(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for group in optimizer.param_groups:
        group["lr"] = 1e-6

    def next_step(layer: LowRank, optimizer: torch.optim.Optimizer) -> Tensor:
        """What momentum alone does: the gradient is zero."""
        before = layer.weight.detach().clone()
        for parameter in layer.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        return layer.weight.detach() - before

    twin = copy.deepcopy(low)
    other = make[kind](twin.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    change_bases({"layer": twin}, optimizer=other)
    assert torch.allclose(twin.weight, low.weight, atol=1e-12)
    expected, found = next_step(low, optimizer), next_step(twin, other)
    assert float(expected.norm()) > 0
    tolerance = 1e-3 if kind in ("sgd", "nesterov") else 2e-2  # of Adam, second moments forget in another basis
    assert float((expected - found).norm()) < tolerance * float(expected.norm())


@pytest.mark.parametrize("threads", [1, 2])
def test_layers_turned_together_are_turned_as_alone_whatever_the_rest_is_like(threads: int) -> None:
    """Dead values, a value of nothing and factors far from orthonormal are beside the usual ones in one batch."""
    layers = {str(i): disturbed() for i in range(6)}
    with torch.no_grad():
        for i, layer in enumerate(layers.values()):
            layer.u.add_(0.01 * torch.randn_like(layer.u))
            layer.s.mul_(0.5 + i)
        layers["1"].s[-5:] = 0.0
        layers["2"].s[-5:] = 1e-8
        layers["3"].v[:, 0] = layers["3"].v[:, 1] * (1 + 1e-5)
        layers["4"].s[:3].neg_()
    before = {n: layer.weight.double() for n, layer in layers.items()}
    kept = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        turns = change_bases(layers)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(kept)
    assert list(turns) == list(layers)
    for name, layer in layers.items():
        assert float((layer.weight.double() - before[name]).norm() / before[name].norm()) < 1e-6
        for factor in (layer.u, layer.v):
            assert float((factor.T @ factor - torch.eye(layer.rank)).abs().max()) < 1e-6
        assert (layer.s.diff() <= 0).all()
        assert (layer.s >= 0).all()
        assert torch.equal(turns[name].s, layer.s)


@pytest.mark.parametrize("form", ["channel", "spatial"])
@pytest.mark.parametrize("kind", ["plain", "asymmetric", "linear"])
@pytest.mark.parametrize("weight", ["usual", "of low rank", "with dead values", "of equal filters", "zero"])
def test_a_whole_layer_is_decomposed_exactly_whatever_it_holds(kind: str, form: str, weight: str) -> None:
    _, low, _ = factorised(kind, form, whole=True)
    low.float()
    with torch.no_grad():
        if weight == "of low rank":
            low.matrix.copy_(low.matrix[:, :2] @ low.matrix[:2, :])
        elif weight == "with dead values":
            low.matrix[:, -3:] *= torch.tensor([1e-3, 1e-8, 0.0])
        elif weight == "of equal filters":
            low.matrix.copy_(low.matrix[:, :1].expand_as(low.matrix))
        elif weight == "zero":
            low.matrix.zero_()
    matrix = (low.u @ low.v.T).double()
    turn = decompositions({"layer": low, "other": low})["layer"]
    error = (turn.u.double() * turn.s) @ turn.v.double().T - matrix
    assert float(error.norm()) <= 1e-6 * float(matrix.norm())
    for factor in (turn.u, turn.v):
        assert float((factor.T @ factor - torch.eye(low.rank)).abs().max()) < 1e-6
    assert (turn.s.diff() <= 0).all()
    assert (turn.s >= 0).all()
    largest = float(torch.linalg.matrix_norm(matrix, 2))
    assert torch.allclose(turn.s.double(), torch.linalg.svdvals(matrix), rtol=1e-6, atol=1e-6 * largest)


def test_a_bad_whole_layer_in_a_batch_is_the_one_that_is_named() -> None:
    layers = {str(i): factorised("plain", "channel", whole=True)[1] for i in range(3)}
    with torch.no_grad():
        layers["1"].matrix[2, 3] = float("nan")
    with pytest.raises(ValueError, match="1: its weight"):
        decompositions(layers)


def test_a_bad_layer_in_a_batch_is_the_one_that_is_named() -> None:
    layers = {str(i): disturbed() for i in range(3)}
    with torch.no_grad():
        layers["1"].u[2, 3] = float("inf")
    with pytest.raises(ValueError, match="1: its weight"):
        change_bases(layers)


def test_momentum_of_dead_values_does_not_explode() -> None:
    """Two values of nothing: as a turn of their directions, a step of either would be of any size."""
    low = disturbed(torch.float64)
    with torch.no_grad():
        low.s[-8:] = 1e-7 * torch.rand(8)
    optimizer = torch.optim.SGD(low.parameters(), lr=1e-3, momentum=0.9)
    low(torch.randn(4, 16, 8, 8).double()).square().mean().backward()
    optimizer.step()
    for parameter in (low.u, low.s, low.v):
        optimizer.state[parameter]["momentum_buffer"] = torch.randn_like(parameter)
    before = float(optimizer.state[low.u]["momentum_buffer"].norm())
    change_bases({"layer": low}, optimizer=optimizer)
    assert float(optimizer.state[low.u]["momentum_buffer"].norm()) < 3 * before


def test_averages_follow_their_factors_into_another_basis() -> None:
    low = disturbed(torch.float64)
    model = nn.Sequential(low)
    average = AveragedWeights(model, 0.9)
    generator = torch.Generator().manual_seed(3)
    for name, shadow in average.shadow.items():  # as far from the weights as an average of many steps is
        if name != "0.bias":
            shadow.add_(1e-4 * shadow.abs().mean() * torch.randn(shadow.shape, generator=generator, dtype=shadow.dtype))

    def composed(factors: dict[str, Tensor]) -> Tensor:
        return (factors["0.u"] * factors["0.s"]) @ factors["0.v"].T

    before, own = composed(average.shadow), composed({f"0.{n}": p.detach() for n, p in low.named_parameters()})
    average.cut({}, model, turned=change_bases({"0": low}))
    apart = float((before - own).norm())
    assert apart > 0
    assert float((composed(average.shadow) - before).norm()) < 0.1 * apart
    assert not torch.equal(average.shadow["0.u"], low.u)


def test_second_moments_swap_places_with_their_columns() -> None:
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 4).double())[0] for n in (7, 6))
    s = torch.tensor([1.0, 3.0, 2.0, 4.0]).double()
    turn = orthonormalise(u, s, v, name="layer")
    moments = [torch.rand(7, 4).double(), torch.rand(4).double(), torch.rand(6, 4).double()]
    for old, new in zip(moments, turn.spread(*moments), strict=True):
        assert torch.allclose(new, old[..., [3, 1, 2, 0]], atol=1e-12)


@pytest.mark.parametrize("whole", [True, False])
def test_a_weight_that_is_not_finite_names_its_layer(whole: bool) -> None:
    model = network()
    run = DPRP().start(model, EXAMPLE, Budget(macs=0.5))
    layer = run.layers["layer2.0.conv1"]
    if not whole:
        run.split(run.layers, optimizer=None)
    with torch.no_grad():
        (layer.matrix[3] if whole else layer.s[3:4]).fill_(float("nan"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"layer2\.0\.conv1"):
        run.step(progress=0.2, optimizer=optimizer)


def test_a_decomposition_that_fails_in_float32_is_done_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    original, seen = torch.linalg.svd, []

    def failing(matrix: Tensor, **options: Any) -> Any:
        seen.append(matrix.dtype)
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return original(matrix, **options)

    monkeypatch.setattr(torch.linalg, "svd", failing)
    u, s, v = svd(torch.randn(5, 4), name="layer")
    assert seen == [torch.float32, torch.float64]
    assert u.dtype == s.dtype == v.dtype == torch.float32


# -- a run


@pytest.mark.parametrize(
    "budget", [Budget(macs=0.5), Budget(params=0.4), Budget(macs=0.6, params=0.5, multiple_of=4)], ids=str
)
def test_ranks_only_fall_to_a_budget_that_is_met_exactly(budget: Budget) -> None:
    run, ranks = trained(DPRP(), budget)
    for before, after in pairwise(ranks):
        assert all(after[n] <= before[n] for n in before)
    assert run.done
    assert sum(a != b for a, b in pairwise(ranks)) >= 5  # not in one go
    recorded = {n: int(points[-1][1]) for n, points in run.history["rank"].items()}
    assert recorded == ranks[-1]
    whole, limits, graph, planned = run.dense, run.limits, run.graph, run.cost
    small = run.finish()
    assert not run.forced
    assert cost(trace(small, EXAMPLE, rehearse=False)) == cost(graph, run.plan) == planned
    assert all(getattr(planned, m) <= limit for m, limit in limits.items())
    assert all(getattr(planned, m) > 0.97 * limit for m, limit in limits.items()) or len(limits) > 1
    factored = [m for m in small.modules() if isinstance(m, nn.Sequential) and type(m[0]) is nn.Conv2d and len(m) == 2]
    assert factored
    assert all(m[0].out_channels % budget.multiple_of == 0 for m in factored)
    assert not any(isinstance(m, LowRank) for m in small.modules())
    assert whole.macs == cost(trace(network(), EXAMPLE, rehearse=False)).macs


def test_nothing_that_fits_is_left_out() -> None:
    run, _ = trained(DPRP(start_at=0.0, every=0.25, end_at=0.25), Budget(params=0.5))
    run.finish()  # one decision: no earlier one has bound it
    assert unused_blocks(run.graph, run.plan, Budget(params=0.5)) == []


@pytest.mark.parametrize("budget", [Budget(macs=0.4), Budget(macs=0.5, params=0.3)], ids=str)
def test_decided_once_all_layers_walk_together_to_ranks_that_were_known_at_the_first_event(budget: Budget) -> None:
    model = network()
    run = DPRP(once=True, power=1.0).start(model, EXAMPLE, budget)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    costs = []
    for step in range(STEPS):
        train_step(run, optimizer, step)
        run.step(progress=(step + 1) / STEPS, optimizer=optimizer)
        if run.final and not costs:
            first = dict(run.final)
        costs += [run.cost.params] if run.final else []
    split = {n for n, layer in run.layers.items() if not layer.whole}
    assert split and {n: run.layers[n].rank for n in split} == {n: first[n] for n in split}
    assert all(a >= b for a, b in pairwise(costs)) and len(set(costs)) >= 5
    half = costs[STEPS // 4]  # in the middle between start_at and end_at
    assert 0.3 < (costs[0] - half) / (costs[0] - costs[-1]) < 0.7
    used = [getattr(run.cost, m) / limit for m, limit in run.limits.items()]
    assert max(used) <= 1.0 and max(used) >= 0.97


def test_decided_once_no_layer_falls_below_its_share_of_equal_ranks() -> None:
    """One layer whose energy is all in one triplet would be left with it, by additive energy."""
    method = DPRP(once=True, importance="energy", floor=0.5)
    model = network("resnet20a")
    name = "layer2.0.conv2"
    with torch.no_grad():
        weight = model.get_parameter(f"{name}.weight")
        weight[:, :, 1, 1] += torch.ones_like(weight[:, :, 1, 1]) * 10
    run = method.start(model, EXAMPLE, Budget(params=0.4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    train_step(run, optimizer, 0)
    run.step(progress=0.1, optimizer=optimizer)
    equal = run.alternatives.equal(run.limits, share=0.5)
    least = {n: run.alternatives.option(n, run.final[n]) for n in run.layers}
    assert all(least[n] >= equal[alternatives_name(n)] for n in least)
    assert least[name] == equal[alternatives_name(name)] > 1


def test_equal_ranks_are_the_largest_equal_fraction_that_fits() -> None:
    run = DPRP().start(network(), EXAMPLE, Budget(params=0.4))
    ranks = run.alternatives.ranks
    options = run.alternatives.equal(run.limits)
    fraction = max(options[alternatives_name(n)] / len(r) for n, r in ranks.items() if len(r) > 20)
    assert all(options[alternatives_name(n)] <= max(1, fraction * len(r) + 1) for n, r in ranks.items())
    run.taken = options
    assert run.cost.params <= run.limits["params"]
    run.taken = {alternatives_name(n): min(options[alternatives_name(n)] + 1, len(r)) for n, r in ranks.items()}
    assert run.cost.params > run.limits["params"]


def test_decided_once_energy_is_that_of_whole_layers() -> None:
    run, _ = trained(DPRP(once=True, energy=0.3), Budget(macs=1.0))
    assert run.final and any(not layer.whole for layer in run.layers.values())
    for name, layer in run.layers.items():
        if not layer.whole:
            assert layer.rank == run.final[name] < run.history["full rank"][name][0][1]


def test_energy_finds_ranks_without_a_budget_and_gives_up_no_more() -> None:
    few, _ = trained(DPRP(energy=0.3), Budget(macs=1.0))
    many, _ = trained(DPRP(energy=0.05), Budget(macs=1.0))
    assert all(0 <= lost <= 0.3 + 1e-6 for lost in few.given_up.values())
    assert sum(layer.rank for layer in few.layers.values()) < sum(layer.rank for layer in many.layers.values())
    assert few.cost.params < many.cost.params <= many.dense.params


@pytest.mark.parametrize("importance", ["energy", "whole"])
def test_what_a_layer_is_worth_is_what_it_was_while_whole_or_what_is_left(importance: str) -> None:
    model = network()
    run = DPRP(importance=importance).start(model, EXAMPLE, Budget(macs=0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    train_step(run, optimizer, 0)
    run.step(progress=0.1, optimizer=optimizer)
    split = [n for n, layer in run.layers.items() if not layer.whole]
    dense = {n: run.scores()[n] for n in split}
    assert split and len(split) < len(run.layers)
    train_step(run, optimizer, 1)
    run.step(progress=0.13, optimizer=optimizer)
    for name in split:
        rank, now = run.layers[name].rank, run.scores()[name]
        assert rank < len(dense[name]) and len(now) == rank
        left = dense[name][:rank] / (dense[name][:rank].sum() if importance == "energy" else 1.0)
        assert now == pytest.approx(left, rel=1e-4)


def test_energy_and_a_budget_hold_together() -> None:
    run, _ = trained(DPRP(energy=0.05), Budget(params=0.3))
    run.finish()
    assert run.cost.params <= run.limits["params"]


def test_what_stays_dense_is_listed_with_the_reason() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 2)
    )
    run = DPRP().start(model, EXAMPLE, Budget(macs=0.95, multiple_of=2, protect=["2"]))
    assert run.skipped == {
        "1": "grouped convolution",
        "2": "protected by the budget",
        "4": "too small: rank 2 costs as much as the layer itself",
    }
    assert list(run.layers) == ["0"]


def test_memory_of_activations_is_not_a_budget_for_ranks() -> None:
    with pytest.raises(ValueError, match="do not lower the memory"):
        DPRP().start(network(), EXAMPLE, Budget(activation_memory=0.5))


def test_only_methods_that_find_the_size_go_without_a_budget() -> None:
    for method in (DPRP(), es.TCP(), es.SVDOneShot()):
        with pytest.raises(ValueError, match="needs a budget"):
            es.attach(network(), EXAMPLE, method=method)
    dense = cost(trace(network(), EXAMPLE, rehearse=False))
    limits = es.attach(network(), EXAMPLE, method=DPRP(energy=0.1)).limits
    assert limits == {"macs": dense.macs, "params": dense.params}


# -- the whole job


@pytest.fixture(scope="module")
def digits() -> Data:
    whole = load_data("digits")
    return dataclasses.replace(whole, train=whole.train[:320], test=whole.test[:100])


def recipe(**changes: Any) -> Recipe:
    return Recipe(**{"epochs": 3, "batch_size": 32, "lr": 0.02, "device": "cpu", "threads": 1, **changes})


def test_energy_needs_no_budget_in_compress(digits: Data, unmeasured: None, tmp_path: Any) -> None:
    result = compress(network(), digits, method=DPRP(energy=0.2), recipe=recipe(epochs=2), out=tmp_path / "run")
    assert result.limits == {}
    assert result.cost.params < result.dense.params
    assert "No budget" in (tmp_path / "run" / "summary.md").read_text()
    with pytest.raises(ValueError, match="needs a budget"):
        compress(network(), digits, method=DPRP(), recipe=recipe())


def test_one_shot_svd_is_at_the_budget_and_goes_on_as_plain_layers(digits: Data, tmp_path: Any) -> None:
    result = compress(network(), digits, budget=Budget(params=0.5), method=es.SVDOneShot(), recipe=recipe(epochs=1))
    assert result.cost.params <= result.limits["params"]
    assert result.cost.params > 0.97 * result.limits["params"]
    save(result.model, tmp_path / "small.safetensors")
    loaded = load(tmp_path / "small.safetensors", base=network())
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), result.model.parameters(), strict=True))


def test_what_is_delivered_is_what_was_trained_whatever_the_precision(digits: Data) -> None:
    few = dataclasses.replace(  # some processors emulate bfloat16
        digits, train=digits.train[:96], test=digits.test[:50]
    )
    half = recipe(epochs=3, precision="bf16")
    result = compress(network(), few, budget=Budget(macs=0.5), method=DPRP(), recipe=half)
    assert result.history is not None
    delivered = evaluate(result.model, few.test_batches())
    assert delivered["accuracy"] == result.history.last.accuracy == result.accuracy
    assert delivered["loss"] == pytest.approx(result.history.last.test_loss, rel=1e-5)


def test_it_learns_from_trained_weights(digits: Data) -> None:
    model = network()
    train(model, load_data("digits"), recipe(epochs=3, lr=0.05))
    result = compress(model, digits, budget=Budget(params=0.5), method=DPRP(), recipe=recipe(epochs=4))
    assert result.accuracy is not None and result.dense_accuracy is not None
    assert result.dense_accuracy > 70
    assert result.accuracy > result.dense_accuracy - 15


# -- networks nobody here wrote


def first_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else next(iter(output.values() if isinstance(output, dict) else output))


IN_CI = ("cifar:resnet20", "timm:test_vit")
NETWORKS = [pytest.param(n, marks=() if n in IN_CI else (pytest.mark.zoo,)) for n in (*ZOO, "timm:test_vit")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_factorises_takes_steps_and_keeps_its_promises(name: str, tmp_path: Any) -> None:
    model, inputs = build(name), example(name)
    dense = copy.deepcopy(model)
    if name not in ("cifar:vgg16_bn", "vgg16_bn", "inception_v3"):  # the last: a head that trains on larger images only
        model.train()
    before = cost(trace(model, inputs, rehearse=False))
    run = DPRP(importance="energy").start(model, inputs, Budget(params=0.7))
    x = torch.randn(2, *inputs.shape[1:], generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    for progress in (0.1, 0.6):
        output = model(x)
        outputs = (
            [output] if isinstance(output, Tensor) else list(output.values() if isinstance(output, dict) else output)
        )
        (sum(o.float().square().mean() for o in outputs) + run.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        run.step(progress=progress, optimizer=optimizer)
    small = run.finish().eval()
    reached = cost(trace(small, inputs, rehearse=False))
    assert (reached.macs, reached.params) == (run.cost.macs, run.cost.params)
    assert sum(p.numel() for p in small.parameters()) == reached.params <= run.limits["params"] < before.params
    assert verify(dense, run.graph, run.plan, inputs, small=small, budget=Budget(params=0.7)).require()
    save(small, tmp_path / "small.safetensors")
    loaded = load(tmp_path / "small.safetensors", base=build(name)).eval()
    y = torch.randn(1, *inputs.shape[1:], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = small(y), loaded(y)
    assert torch.equal(first_of(ours), first_of(theirs))
    assert len(gradients(small, inputs)) > 0.5 * len(list(small.parameters()))
