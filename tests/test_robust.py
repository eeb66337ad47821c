"""What users bring along: frozen layers, other precisions, other optimisers, numbers of numpy, settings of the wrong type."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import espalier as es
from espalier.methods.importance import Moments, Sensitivity, score_units
from espalier.methods.units import Positions, Units
from espalier.surgery.files import rebuild, structure

X, Y = torch.randn(160, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(160) % 10
METHODS = [es.TCP(), es.MGP(), es.DPRP(), es.TTLC(search=0), es.Magnitude(), es.SVDOneShot()]
TRAINING = METHODS[:4]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


def data(batch: int = 16, dtype: torch.dtype = torch.float32) -> Any:
    batches = list(zip(X.to(dtype).split(batch), Y.split(batch), strict=True))
    return es.Loaders(batches, batches, num_classes=10)


def trained(
    model: nn.Module,
    method: es.Method,
    *,
    steps: int = 60,
    macs: float = 0.5,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
) -> tuple[nn.Module, float]:
    """A run in a loop of one's own: the finished network, and the largest step that any weight took."""
    run = es.attach(model, X[:1].to(next(model.parameters()).dtype), budget=es.Budget(macs=macs), method=method)
    optimiser = optimizer([p for p in run.model.parameters() if p.requires_grad], lr=2e-3)
    largest = 0.0
    for step in range(steps):
        x, y = X[(8 * step) % 160 :][:8], Y[(8 * step) % 160 :][:8]
        loss = F.cross_entropy(run.model(x.to(next(run.model.parameters()).dtype)), y) + run.penalty()
        optimiser.zero_grad()
        loss.backward()
        before = [(p, p.detach().clone()) for group in optimiser.param_groups for p in group["params"]]
        optimiser.step()
        largest = max(largest, *(float((p - b).detach().abs().max()) for p, b in before))
        run.step(progress=(step + 1) / steps, optimizer=optimiser)
    return run.finish(), largest


# -- frozen layers


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_a_frozen_weight_stays_what_it_is(method: es.Method) -> None:
    model = net()
    model[3].weight.requires_grad_(False)
    before = model[3].weight.detach().clone()
    small, _ = trained(model, method, macs=0.6)
    assert (
        es.cost(es.trace(small, X[:1], rehearse=False)).fraction_of(es.cost(es.trace(net(), X[:1], rehearse=False)))[
            "macs"
        ]
        <= 0.6
    )
    if method.name != "magnitude":  # one shot takes any channel away
        layer = small.get_submodule("3")
        assert isinstance(layer, nn.Conv2d)
        rows = layer.weight.shape[0]  # filters that only trained layers read may go
        assert layer.weight.shape[1] == 16
        assert not layer.weight.requires_grad
        kept = [any(torch.equal(row, old) for old in before) for row in layer.weight]
        assert kept == [True] * rows


@pytest.mark.parametrize("method", [es.DPRP(), es.SVDOneShot()], ids=lambda m: m.name)
def test_a_frozen_layer_is_listed_as_left(method: es.Method) -> None:
    model = net()
    model[3].weight.requires_grad_(False)
    run = es.attach(model, X[:1], budget=es.Budget(macs=0.6), method=method)
    assert run.skipped["3"] == "its weight is frozen"


def test_what_was_frozen_is_frozen_after_rebuilding() -> None:
    model = net()
    model[3].bias.requires_grad_(False)
    run = es.attach(model, X[:1], budget=es.Budget(macs=0.5), method=es.DPRP())
    again = rebuild(net(), structure(run.model))
    frozen = [n for n, p in run.model.named_parameters() if not p.requires_grad]
    assert "3.bias" in frozen
    assert [n for n, p in again.named_parameters() if not p.requires_grad] == frozen


# -- precisions


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("method", TRAINING, ids=lambda m: m.name)
def test_networks_of_any_precision_train_and_load(method: es.Method, dtype: torch.dtype, tmp_path: Path) -> None:
    small, _ = trained(net().to(dtype), method)
    es.save(small, tmp_path / "small.safetensors")
    again = es.load(tmp_path / "small.safetensors", base=net().to(dtype))
    assert {p.dtype for p in again.parameters()} == {dtype}
    x = X[:2].to(dtype)
    assert torch.equal(small.eval()(x), again.eval()(x))


def test_spatial_factors_train_where_torch_has_no_fast_convolution() -> None:
    """Batches of one image, float64 and channels_last are computed by plain convolutions."""
    for dtype, batch, last in ((torch.float32, 1, True), (torch.float64, 8, True), (torch.float64, 8, False)):
        result = es.compress(
            net().to(dtype), data(batch, dtype), budget=es.Budget(macs=0.2), method=es.DPRP(form="spatial"),
            recipe=es.Recipe(epochs=1, device="cpu", channels_last=last),
        )  # fmt: skip
        assert any(m.kernel_size == (1, 3) for m in result.model.modules() if isinstance(m, nn.Conv2d))


# -- optimisers


@pytest.mark.parametrize("method", [es.TCP(), es.DPRP()], ids=lambda m: m.name)
@pytest.mark.parametrize("kind", ["Adamax", "Adafactor", "RMSprop", "NAdam"])
def test_any_optimiser_goes_on_after_removals(method: es.Method, kind: str) -> None:
    if not hasattr(torch.optim, kind):
        pytest.skip(f"this torch has no {kind}")
    small, largest = trained(net(), method, optimizer=getattr(torch.optim, kind))
    assert largest < 0.1
    assert all(torch.isfinite(p).all() for p in small.parameters())


# -- importance


def test_accumulated_gradients_give_the_importance_of_the_whole_batch() -> None:
    found = []
    for piece in (32, 8):
        model = net().eval()
        sensitivity = Sensitivity(Units(model, es.trace(model, X[:1])))
        for x, y in zip(X[:32].split(piece), Y[:32].split(piece), strict=True):
            (F.cross_entropy(model(x), y, reduction="sum") / 32).backward()
        sensitivity.batch_done()
        found.append(sensitivity.value)
    assert torch.allclose(*found, rtol=1e-3, atol=1e-7)


def test_moments_of_a_resumed_run_are_where_the_model_is() -> None:
    run = es.TCP(importance="share").start(net(), X[:1], es.Budget(macs=0.5))
    assert isinstance(run.score, Moments)
    run.score.start()
    run.model(X[:8])
    run.score.batch_done()
    model = net().to("meta")  # in the place of a GPU
    again = Moments(model, Units(model, run.graph))
    again.load_state_dict(run.score.state_dict())
    model(torch.zeros(2, 1, 8, 8, device="meta"))
    again.batch_done()  # adds to the sums
    assert {s.device.type for s in again.sums.values()} == {"meta"}


def test_frozen_weights_are_measured_and_nothing_is_left_behind() -> None:
    model, other = net(), net()
    other[3].weight.requires_grad_(False)
    batches = [(X[:32], Y[:32])]
    graph = es.trace(model, X[:1])
    found = [score_units(m, graph, "taylor", batches) for m in (model, other)]
    for group in graph.groups:
        np.testing.assert_allclose(found[1][group.name], found[0][group.name])
    with pytest.raises(IndexError):
        score_units(other, graph, "taylor", [(X[:8], Y[:8] + 100)])
    assert [n for n, p in other.named_parameters() if not p.requires_grad] == ["3.weight"]
    assert not any(p._post_accumulate_grad_hooks for p in other.parameters())
    assert all(p.grad is None for p in other.parameters())


# -- settings


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: es.MGP(shapes="False"), r"MGP\(shapes='False'\): must be true or false"),
        (lambda: es.TCP(per_cost="no"), r"TCP\(per_cost='no'\): must be true or false"),
        (lambda: es.Magnitude(per_cost=1), r"Magnitude\(per_cost=1\): must be true or false"),
        (lambda: es.TCP(every="abc"), r"TCP\(every='abc'\): must be a number"),
        (lambda: es.TCP(chunk=[1, 2]), r"TCP\(chunk=\[1, 2\]\): must be a number"),
        (lambda: es.TCP(power=float("nan")), r"TCP\(power=nan\): must be a number"),
        (lambda: es.TCP(power=-1.0), r"TCP\(power=-1.0\): must be a number above 0"),
        (lambda: es.TTLC(share="half"), r"TTLC\(share='half'\): must be a number"),
        (lambda: es.TTLC(iterations=2.5), r"TTLC\(iterations=2.5\): must be a whole number"),
        (lambda: es.DPRP(form=3), r"DPRP\(form=3\): must be one of auto, channel, spatial"),
    ],
)  # fmt: skip
def test_settings_of_the_wrong_type_are_refused(make: Callable[[], es.Method], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_settings_that_are_numbers_of_numpy_become_plain_ones() -> None:
    method = es.TTLC(penalty_exponent=np.float32(0.5), iterations=np.int64(4), growth=2)
    assert [type(v) for v in (method.penalty_exponent, method.iterations, method.growth)] == [float, int, float]
    assert copy.copy(method) == es.TTLC(penalty_exponent=0.5, iterations=4, growth=2.0)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("progress", [float("nan"), 7.0, -0.5])
def test_progress_that_is_no_share_of_the_run_changes_nothing(method: es.Method, progress: float) -> None:
    run = es.attach(net(), X[:1], budget=es.Budget(macs=0.5), method=method)
    optimiser = torch.optim.SGD(run.model.parameters(), lr=0.01)
    before = copy.deepcopy(run.model.state_dict())
    with pytest.raises(ValueError, match=rf"step\(progress={progress}\): must be the share of training that is done"):
        run.step(progress=progress, optimizer=optimiser)
    after = run.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_a_vector_that_reads_channels_has_a_value_for_each() -> None:
    """A head that is a bare vector, ``x @ w``: summing over no dimension sums over all."""
    vector = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    columns = Positions("w", (0,), vector, torch.arange(3))
    assert columns.per_position(vector.detach()).tolist() == [1.0, -2.0, 3.0]
    assert columns.energy().tolist() == [1.0, 4.0, 9.0]
