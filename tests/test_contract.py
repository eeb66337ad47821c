"""The contract that every method keeps, as one table: a new method adds a row to ``ROWS``."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import espalier as es
from espalier.graph import files
from espalier.methods.base import Method, Run
from espalier.methods.state import restored
from espalier.surgery.verify import Proof
from tests.halving import Halving

STEPS = 60
EXAMPLE = torch.zeros(1, 1, 8, 8)


class Net(nn.Module):
    """A residual block, so that there are channels of all kinds, in a network that trains in no time."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.conv1, self.bn1 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


@dataclass(frozen=True)
class Row:
    method: Method
    budget: es.Budget | None = field(default_factory=lambda: es.Budget(macs=0.5))
    bad: tuple[dict[str, Any], ...] = ()  # settings that are refused
    removal: str = ""  # the step that removes what has faded; "" of a method that replaces what it has compressed


ROWS = {
    "tcp": Row(
        es.TCP(),
        removal="realise",
        bad=(
            {"importance": "colour"},
            {"every": 0.0},
            {"every": float("nan")},
            {"share_exponent": 2.0},
            {"start_at": 0.5},
            {"fade": 0.0},
            {"end_at": 1.0},
            {"start_at": 0.5, "end_at": 0.5},
            {"share_exponent": float("nan")},
            {"share_exponent": True},
        ),
    ),
    "tcp-share": Row(es.TCP(importance="share", share_exponent=0.7), es.Budget(params=0.6), removal="realise"),
    "mgp": Row(
        es.MGP(),
        removal="realise",
        bad=(
            {"filters": False, "inputs": False, "shapes": False},
            {"filters": False, "streams": True},
            {"stagger": -1.0},
            {"fade": 0.0},
            {"end_at": 1.0},
        ),
    ),
    "joint": Row(es.Joint(blocks=False), removal="_cut", bad=({"form": "round"}, {"fade": 0.3}, {"stagger": -1.0})),
    "dprp": Row(
        es.DPRP(orthogonality=0.1),
        removal="_drop",
        bad=(
            {"form": "tucker"},
            {"importance": "luck"},
            {"every": 0.9},
            {"every": 0.0},
            {"end_at": 1.0},
            {"start_at": 0.6},
            {"sparsity": -1.0},
            {"energy": 0.0},
            {"energy": 1.0},
            {"energy": float("nan")},
            {"energy": True},
        ),
    ),
    "dprp-once": Row(es.DPRP(orthogonality=0.1, once=True), removal="_drop"),
    "dprp-energy": Row(es.DPRP(orthogonality=0.1, energy=0.3), None, removal="_drop"),
    "tt-lc": Row(
        es.TTLC(search=0, iterations=4),
        bad=(
            {"forms": ("cube",)},
            {"forms": ()},
            {"forms": "cp"},
            {"share": 1.0},
            {"iterations": 1},
            {"ranks": "best"},
            {"penalty_exponent": 0.0},
            {"growth": 0.5},
            {"search": -1},
            {"lc": 1},
            {"finetune_lr": 0.0},
            {"finetune_warmup": 1.0},
        ),
    ),
}
ONE_SHOT = {
    "magnitude": Row(es.Magnitude(), bad=({"score": "colour"}, {"share_exponent": 0.0})),
    "svd-oneshot": Row(es.SVDOneShot(), bad=({"form": "round"},)),
}
EVERY = {**ROWS, **ONE_SHOT}


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def batch(step: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(step)
    return torch.randn(16, 1, 8, 8, generator=random), torch.randint(0, 10, (16,), generator=random)


def optimizer_of(run: Run) -> torch.optim.Optimizer:
    return torch.optim.SGD(run.model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)


def begin(row: Row) -> tuple[Run, torch.optim.Optimizer]:
    run = es.attach(net(), EXAMPLE, budget=row.budget, method=row.method)
    return run, optimizer_of(run)


def train_on(run: Run, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """A loop as a user writes it."""
    for step in range(first, last):
        x, y = batch(step)
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * run.lr_scale(step / STEPS, default=1.0)
        (F.cross_entropy(run.model(x), y) + run.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        run.step(progress=(step + 1) / STEPS, optimizer=optimizer)


@dataclass(frozen=True)
class Finished:
    """The whole run of a row, which several tests look at."""

    run: Run
    moved: list[float]  # by how much each removal moved logits, relative to the largest
    followed: bool  # did the optimiser hold the parameters of then, with buffers of their shapes, when training ended?

    @cached_property
    def proof(self) -> Proof:
        return es.verify(net(), self.run.dense_graph, self.run.plan, EXAMPLE, small=self.run.model, trained=True)


@cache
def finished(name: str) -> Finished:
    run, optimizer = begin(EVERY[name])
    removal = getattr(run, EVERY[name].removal, None)
    moved: list[float] = []

    def watched(*arguments: Any) -> Any:
        before = eval_logits(run.model)
        found = removal(*arguments)
        moved.append(float((eval_logits(run.model) - before).abs().max() / before.abs().max()))
        return found

    with pytest.MonkeyPatch.context() as patch:
        if removal is not None:
            patch.setattr(run, EVERY[name].removal, watched)
        train_on(run, optimizer, 0, STEPS)
    own = {id(p) for p in run.model.parameters()}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    followed = own == held >= set(map(id, optimizer.state))
    followed &= all(state["momentum_buffer"].shape == p.shape for p, state in optimizer.state.items())
    assert run.finish() is run.model
    return Finished(run, moved, followed)


def eval_logits(model: nn.Module) -> Tensor:
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    with torch.no_grad():
        found = model(batch(1000)[0])
    for module, mode in modes:
        module.training = mode
    return found


def tensors_in(saved: Any) -> list[Tensor]:
    if isinstance(saved, Tensor):
        return [saved]
    parts = saved.values() if isinstance(saved, dict) else saved if isinstance(saved, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


def within(run: Run, small: nn.Module) -> bool:
    found = es.cost(es.trace(small, EXAMPLE, rehearse=False))
    return all(getattr(found, m) <= limit for m, limit in run.limits.items())


@pytest.mark.parametrize("name", ROWS)
def test_the_budget_is_reached_unforced_and_proven(name: str) -> None:
    run = finished(name).run
    small = run.model
    assert not run.forced and within(run, small)
    assert run.status.remaining == 0
    finished(name).proof.require()
    assert es.cost(run.dense_graph, run.plan) == es.cost(es.trace(small, EXAMPLE, rehearse=False))


@pytest.mark.parametrize("name", [n for n in ROWS if ROWS[n].removal])
def test_no_removal_moves_a_logit(name: str) -> None:
    whole = finished(name)
    assert whole.moved and max(whole.moved) < 1e-5
    assert whole.followed


@pytest.mark.parametrize("name", EVERY)
def test_a_run_in_a_loop_of_ones_own_is_resumed_to_the_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = EVERY[name]
    whole = finished(name).run
    part, optimizer = begin(row)
    train_on(part, optimizer, 0, 37)
    file = io.BytesIO()
    torch.save({"run": part.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    content = torch.load(file, weights_only=True)

    carried: set[int] = set()

    def watched(saved: Any, device: torch.device) -> Any:
        carried.update(map(id, tensors_in(saved)))
        return restored(saved, device)

    monkeypatch.setattr("espalier.methods.base.restored", watched)  # which takes everything to the device of the model
    again = es.attach(net(), EXAMPLE, budget=row.budget, method=row.method, state=content["run"])
    assert carried >= set(map(id, tensors_in(content["run"]["own"])))
    optimizer = optimizer_of(again)
    optimizer.load_state_dict(content["optimizer"])
    train_on(again, optimizer, 37, STEPS)

    ours, theirs = again.finish().state_dict(), whole.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
    assert again.plan.to_json() == whole.plan.to_json() and again.history == whole.history
    assert again.skipped == whole.skipped and again.limits == whole.limits
    assert files.to_json(again.dense_graph) == files.to_json(whole.dense_graph)
    finished(name).proof.require()


@pytest.mark.parametrize("name", ROWS)
def test_a_run_that_stops_early_still_meets_the_budget(name: str) -> None:
    run, optimizer = begin(ROWS[name])
    train_on(run, optimizer, 0, 8)
    small = run.finish()
    assert run.forced or ROWS[name].budget is None
    assert within(run, small)


@pytest.mark.parametrize("name", [n for n in EVERY if EVERY[n].budget is not None])
def test_an_unreachable_budget_fails_before_anything_is_trained(name: str) -> None:
    with pytest.raises(ValueError, match="smallest reachable"):
        es.attach(net(), EXAMPLE, budget=es.Budget(macs=1e-4), method=EVERY[name].method)


@pytest.mark.parametrize(("name", "settings"), [(n, s) for n, row in EVERY.items() for s in row.bad])
def test_settings_that_make_no_sense_are_refused_by_name(name: str, settings: dict[str, Any]) -> None:
    kind = type(EVERY[name].method)
    with pytest.raises(ValueError, match=rf"{kind.__name__}\(") as caught:
        kind(**settings)
    assert "\n" not in str(caught.value) and any(name in str(caught.value) for name in settings)


@pytest.mark.parametrize("name", ROWS)
def test_the_state_of_another_run_is_refused(name: str) -> None:
    run, _ = begin(ROWS[name])
    other = Halving().start(net(), EXAMPLE, es.Budget(macs=0.5))
    with pytest.raises(ValueError, match="the state of a HalvingRun"):
        run.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="older version"):
        run.load_state_dict({"numbers": {}})
    wider = net()
    wider.head = nn.Linear(16, 11)
    stranger = ROWS[name].method.start(wider, EXAMPLE, ROWS[name].budget or es.Budget(macs=1.0, params=1.0))
    with pytest.raises(ValueError, match=r"does not have the structure.*head"):
        run.load_state_dict(stranger.state_dict())


@pytest.mark.parametrize("name", ROWS)
def test_an_optimiser_made_before_the_run_began_is_found_on_the_first_step(name: str) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.head = nn.Linear(16, 10)  # or what the method does to layers when it begins
    run = es.attach(model, EXAMPLE, budget=ROWS[name].budget, method=ROWS[name].method)
    with pytest.raises(ValueError, match=r"make the optimiser from run\.model\.parameters\(\) after es\.attach"):
        run.step(progress=0.01, optimizer=optimizer)


def test_a_loop_that_ignores_the_learning_rate_of_a_method_is_warned() -> None:
    run, optimizer = begin(ROWS["tt-lc"])
    with pytest.warns(UserWarning, match=r"run\.lr_scale"):
        run.step(progress=0.01, optimizer=optimizer)
    assert run.lr_scale(0.0, default=0.5) == run.rate(0.0) != 0.5
    assert begin(ROWS["tcp"])[0].lr_scale(0.0, default=0.5) == 0.5


def test_what_a_method_measures_on_can_be_given_to_attach() -> None:
    batches = [batch(n) for n in range(2)]
    with pytest.raises(ValueError, match="give batches"):
        es.attach(net(), EXAMPLE, budget=es.Budget(macs=0.5), method=es.Magnitude(score="taylor"))
    es.attach(net(), EXAMPLE, budget=es.Budget(macs=0.5), method=es.Magnitude(score="taylor"), batches=batches)
    pytest.importorskip("optuna")
    method = es.TTLC(search=2, iterations=2, select=0.5)
    run = es.attach(net(), EXAMPLE, budget=es.Budget(macs=0.6), method=method, batches=batches, held_out=batches[:1])
    train_on(run, optimizer_of(run), 0, STEPS)
    assert len(run.trials) == 2
