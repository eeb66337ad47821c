"""Replayed steps train what steps that are run train; here a recording is replayed by running its step again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import espalier as es
from espalier.methods.base import Method
from espalier.run import loop
from espalier.run.data import load_data
from espalier.run.loop import History, train
from espalier.run.recipe import Recipe
from espalier.run.replay import WARM_UP, Computed, Replay, recorder_for
from tests.steps import EXAMPLE, Again, batch, network


def trained(method: Method | None, *, epochs: int = 3) -> tuple[nn.Module, History]:
    model = network()
    run = None if method is None else method.start(model, EXAMPLE, es.Budget(macs=0.5))
    history = train(model, load_data("digits"), Recipe(epochs=epochs, batch_size=128, lr=0.02), run=run)
    return (model if run is None else run.finish()), history


@pytest.mark.parametrize("method", [None, es.TCP(), es.MGP(), es.DPRP(sparsity=0.0, orthogonality=0.0)])
def test_replayed_steps_train_the_same_network(method: Method | None, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, before = trained(method)
    recorder = Again()
    monkeypatch.setattr(loop, "recorder_for", lambda device, wanted: recorder)
    replayed, after = trained(method)
    assert recorder.replayed >= 3
    assert (recorder.recorded > 1) == (method is not None)  # anew after every removal
    assert [e.loss for e in before.epochs] == [e.loss for e in after.epochs]
    own = replayed.state_dict()
    assert own.keys() == plain.state_dict().keys()
    assert all(torch.equal(own[n], v) for n, v in plain.state_dict().items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="records CUDA graphs")
@pytest.mark.parametrize("method", [None, es.TCP(), es.MGP(), es.DPRP(), es.TTLC(search=0)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recorded_steps_train_like_run_ones(method: Method | None, precision: str) -> None:
    found = []
    for graphs in (False, True):
        torch.manual_seed(0)
        model = network()
        run = None if method is None else method.start(model.cuda(), EXAMPLE.cuda(), es.Budget(macs=0.5))
        recipe = Recipe(
            epochs=6, batch_size=128, lr=0.02, device="cuda", graphs=graphs, precision=precision, channels_last=True
        )
        found.append([e.loss for e in train(model, load_data("digits"), recipe, run=run).epochs])
    plain, recorded = found
    assert recorded[0] == pytest.approx(plain[0], rel=2e-2)
    assert recorded[-1] == pytest.approx(plain[-1], rel=0.2)
    assert len(set(recorded)) == len(recorded)


def test_a_penalty_is_added_to_the_gradients_and_hooks_see_both(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(4, 3)
    seen: list[torch.Tensor] = []
    model.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))

    def step(x: torch.Tensor, y: torch.Tensor) -> Computed:
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss.detach(), torch.zeros(())

    replay = Replay(step, model, recorder=Again())
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    for number in range(WARM_UP + 3):
        replay(x, y, penalty=2.0 * model.weight.square().sum())
        wanted = torch.autograd.grad(
            nn.functional.cross_entropy(model(x), y) + 2.0 * model.weight.square().sum(), model.weight
        )[0]
        assert len(seen) == number + 1  # once a step, when the gradient is complete
        assert torch.allclose(seen[-1], wanted)
        assert torch.allclose(model.weight.grad, wanted)


def test_steps_that_somebody_watches_or_of_another_size_are_run() -> None:
    model, recorder = network(), Again()

    def step(x: torch.Tensor, y: torch.Tensor) -> Computed:
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss.detach(), torch.zeros(())

    replay = Replay(step, model, recorder=recorder)
    x, y = batch(0)
    for _ in range(WARM_UP + 1):
        replay(x, y)
    assert recorder.replayed == 1
    replay(x[:5], y[:5])
    handle = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).register_forward_hook(lambda *_: None)
    replay(x, y)
    assert recorder.replayed == 1
    handle.remove()
    replay(x, y)
    assert (recorder.replayed, recorder.recorded) == (2, 1)


def test_without_a_gpu_nothing_is_recorded_and_fp16_is_refused() -> None:
    assert recorder_for(torch.device("cpu"), wanted=True) is None
    with pytest.raises(ValueError, match="take bf16 or fp32"):
        Recipe(graphs=True, precision="fp16")
