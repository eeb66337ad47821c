"""TT-LC: exact budgets, a penalty gap that closes, a faithful replacement, resuming anywhere, faults that are named."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import espalier as es
from benchmarks.common import ZOO, build, example
from espalier.costs import cost
from espalier.forms import Wish, dense_sequence, find_places, spectra
from espalier.forms.candidates import compose, factorise, full_rank, options_at
from espalier.forms.form import cost_of
from espalier.forms.spectra import spectra_of
from espalier.forms.transfer import moved
from espalier.methods import lc as lc_module, scoring, tt_lc
from espalier.methods.decay import decay_products
from espalier.methods.lc import LearningCompression, PenaltyDiverged
from espalier.methods.scoring import loss_on, recalibrate_batchnorm
from espalier.methods.search import minimise
from espalier.run.charts import COLOURS, gap_curve, rank_bars, search_curve
from espalier.run.data import load_data, set_aside
from tests.forked import forked
from tests.waits import Waits

X = torch.zeros(1, 1, 8, 8)


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def recipe(**options) -> es.Recipe:
    return es.Recipe(**{"epochs": 4, "batch_size": 64, "lr": 0.1, "distill": 0.0, "device": "cpu", **options})


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


# -- the alternatives of one layer


@pytest.mark.parametrize("multiple_of", [1, 8])
@pytest.mark.parametrize("ranks", [(3, 7), (16, 32), (1, 1)])
def test_rungs_rise_in_every_cost_and_lose_what_a_fit_loses(ranks, multiple_of) -> None:
    model = nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1)).double()
    place = find_places(model, torch.zeros(1, 16, 9, 9, dtype=torch.float64))[0]["0"]
    weight = model[0].weight.detach()
    spectra = spectra_of({"0": weight})["0"]
    for fraction in (0.3, 0.8):
        options, lost = options_at(place, spectra, Wish(ranks, fraction, multiple_of))
        costs = [cost_of(place, c) for c in options]
        assert options[-1] == dense_sequence(place) and lost[-1] == 0
        assert all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(costs))
        assert (np.diff(lost) < 0).all()
        for form, share in zip(options[:-1], lost[:-1], strict=True):
            back = compose(factorise(weight, form.name, form.widths, sweeps=0))
            assert float((weight - back).square().sum() / weight.square().sum()) == pytest.approx(share, abs=1e-9)
            assert all(r % multiple_of == 0 or r in (16, 32) for r in form.widths)


@pytest.mark.parametrize("value", [0.0, 2.0])
@pytest.mark.parametrize("size", [(3, 3), (2, 4), (1, 1), (1, 3)])
def test_zero_and_constant_weights_need_the_cheapest_rung_only(value, size) -> None:
    model = nn.Sequential(nn.Conv2d(6, 8, size))
    nn.init.constant_(model[0].weight, value)
    place = find_places(model, torch.zeros(1, 6, 9, 9))[0]["0"]
    spectra = spectra_of({"0": model[0].weight})["0"]
    options, lost = options_at(place, spectra, Wish((1, 1)))
    assert len(options) > 1
    assert lost[0] == pytest.approx(0.0, abs=1e-5)
    assert max(spectra.evbmf()) <= 1


@pytest.mark.parametrize("size", [(1, 5), (7, 1)])
def test_a_kernel_along_a_line_may_become_a_tucker(size: tuple[int, int]) -> None:
    """Of a core of few channels; what the list says is lost is what is lost."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(24, 20, size, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.einsum("oa,aikl->oikl", torch.randn(20, 3).double(), model[0].weight[:3]))
        weight = torch.einsum(
            "oikl,ij->ojkl", model[0].weight, torch.randn(24, 4).double() @ torch.randn(4, 24).double()
        )
        model[0].weight.copy_(weight + 1e-3 * torch.randn_like(weight))
    place = find_places(model, torch.zeros(1, 24, 9, 9).double())[0]["0"]
    options, lost = options_at(place, spectra_of({"0": weight})["0"], Wish((4, 3)))
    assert {"tucker", "dense"} <= {form.name for form in options} <= {"tucker", "channel", "dense"}
    number, form = next((i, f) for i, f in enumerate(options) if f.name == "tucker" and min(f.widths) >= 3)
    back = compose(factorise(weight, "tucker", form.widths, sweeps=0))
    assert float((weight - back).square().sum() / weight.square().sum()) == pytest.approx(lost[number], abs=1e-9)
    small = (
        es.TTLC(search=0, forms=("tucker",))
        .start(
            nn.Sequential(nn.Conv2d(3, 24, size), nn.Conv2d(24, 20, size)),
            torch.zeros(1, 3, 15, 15),
            es.Budget(macs=0.7),
        )
        .finish()
    )
    assert [tuple(stage.kernel_size) for stage in small[1]] == [(1, 1), size, (1, 1)]


def test_a_weight_that_is_not_finite_is_named() -> None:
    with pytest.raises(ValueError, match=r"features\.0: its weight holds NaN"):
        spectra_of({"features.0": torch.full((4, 4, 3, 3), torch.nan)})


# -- the LC loop by itself


@pytest.mark.parametrize("shape", [(40, 300), (300, 40), (40, 300, 1, 1), (300, 40, 1, 1), (12, 200, 1, 5)])
def test_no_eigenproblem_is_larger_than_the_shorter_side(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A classifier of 25088 inputs and 4096 outputs took a matrix of 25088 x 25088."""
    sizes: list[int] = []
    for name in ("eigh", "eigvalsh"):
        plain = getattr(torch.linalg, name)
        monkeypatch.setattr(torch.linalg, name, lambda a, plain=plain: (sizes.append(a.shape[-1]), plain(a))[1])
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spectra = spectra_of({"0": weight})["0"]
    outputs, rest = shape[0], weight[0].numel()
    inputs, other = shape[1], weight.numel() // shape[1]
    assert max(sizes) <= max(min(outputs, rest), min(inputs, other))
    for values, matrix in ((spectra.inputs, weight.transpose(0, 1)), (spectra.outputs, weight)):
        expected = torch.linalg.svdvals(matrix.reshape(matrix.shape[0], -1)).square()
        np.testing.assert_allclose(values, expected.numpy(), rtol=1e-9)
    assert len(spectra.channel) == min(outputs, rest) + 1


def test_lc_ends_where_weights_are_their_own_compressed_form() -> None:
    """Least squares under a rank constraint: the gap closes and the loss comes near that of the best rank-2 answer."""
    torch.manual_seed(0)
    goal = torch.randn(8, 6, dtype=torch.float64)
    weight = nn.Parameter(torch.zeros(8, 6, dtype=torch.float64))
    lc = LearningCompression({"w": weight}, mu=0.1, growth=1.3)
    gaps = []
    for _ in range(30):
        for _ in range(40):
            loss = 0.5 * (weight - goal).square().sum() + lc.penalty()
            (gradient,) = torch.autograd.grad(loss, weight)
            with torch.no_grad():
                weight -= 0.5 / (1 + lc.mu) * gradient
        gaps.append(lc.c_step({"w": compose(factorise(lc.wanted()["w"], "channel", [2]))}))
    assert gaps[-1] < 1e-3 < gaps[0]
    best = float(torch.linalg.svdvals(goal)[2:].square().sum())
    assert float((lc.compressed["w"] - goal).square().sum()) == pytest.approx(best, rel=1e-3)


def test_the_penalty_and_its_gradient_are_the_formula() -> None:
    torch.manual_seed(0)
    weights = {n: nn.Parameter(torch.randn(4, 3)) for n in "ab"}
    lc = LearningCompression(weights, mu=0.7, growth=1.0)
    assert lc.penalty() == 0.0
    for _ in range(2):
        lc.c_step({"a": 0.5 * lc.wanted()["a"]})  # b is free
    penalty = lc.penalty()
    written = 0.35 * (weights["a"] - lc.compressed["a"] - lc.multipliers["a"] / 0.7).square().sum()
    torch.testing.assert_close(penalty, written)
    torch.testing.assert_close(
        torch.autograd.grad(3 * penalty, weights["a"])[0], 3 * torch.autograd.grad(written, weights["a"])[0]
    )


def test_steps_with_falling_shares_arrive_at_what_can_be_represented() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(8, 6, dtype=torch.float64))
    lc = LearningCompression({"w": weight}, mu=0.1, growth=1.0)

    def scheme(wanted):
        return {"w": compose(factorise(wanted["w"], "channel", [2]))}

    lc.c_step(scheme(lc.wanted()))
    lc.c_step(scheme(lc.wanted()))
    first = lc.approach(scheme(lc.plain()), left=1.0)
    multiplier = lc.multipliers["w"].clone()
    distances = [first * float(weight.detach().norm())]
    for parts in (4, 3, 2):
        lc.approach(scheme(lc.plain()), left=(parts - 1) / parts)
        distances.append(float(torch.linalg.svdvals(weight.detach())[2:].norm()))
    assert distances == pytest.approx([distances[0] * left for left in (1, 3 / 4, 1 / 2, 1 / 4)], rel=1e-6)
    torch.testing.assert_close(lc.multipliers["w"], 0.25 * multiplier)


def test_multipliers_begin_anew_with_other_ranks() -> None:
    torch.manual_seed(0)
    lc = LearningCompression({"w": nn.Parameter(torch.randn(4, 4))}, mu=0.5, growth=1.0)

    def half(wanted):
        return {"w": 0.5 * wanted["w"]}

    for fresh, gathered in ((True, False), (False, True), (False, True), (True, False)):
        lc.c_step(half(lc.wanted()), fresh=fresh)
        assert bool(lc.multipliers["w"].any()) == gathered
        torch.testing.assert_close(lc.compressed["w"] + lc.multipliers["w"] / lc.mu, lc._targets[0])


def test_weights_that_run_away_are_detected_and_the_last_form_is_kept() -> None:
    weight = nn.Parameter(torch.ones(4, 4) + 0.1 * torch.eye(4))
    lc = LearningCompression({"w": weight}, mu=1.0, growth=2.0)

    def scheme(wanted):
        return {"w": compose(factorise(wanted["w"], "channel", [1]))}

    lc.c_step(scheme(lc.wanted()))
    lc.c_step(scheme(lc.wanted()))
    kept = lc.compressed["w"].clone()
    with torch.no_grad():
        weight.copy_(10 * torch.eye(4))
    with pytest.raises(PenaltyDiverged, match="LC iteration 3: the weights move away"):
        lc.c_step(scheme(lc.wanted()))
    assert torch.equal(lc.compressed["w"], kept) and lc.iterations == 2


@pytest.mark.parametrize(("steps", "momentum"), [(40, 0.0), (160, 0.9)])
def test_the_penalty_pulls_as_far_in_a_long_run_as_in_a_short_one(steps: int, momentum: float) -> None:
    """Trained on the penalty alone, weights go the same share of the way in an L step, whatever its length."""
    model = net()
    run = es.TTLC(search=0, iterations=4, share=0.8, penalty_exponent=0.4, growth=1.5).start(
        model, X, es.Budget(macs=0.4)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum)
    name, begun, left = "3", None, []
    for step in range(4 * steps):
        if run.lc.iterations:
            optimizer.zero_grad()
            run.penalty().backward()
            optimizer.step()
        before = run.lc.iterations
        target = run.lc.compressed.get(name)
        off = None if target is None else float((model.get_submodule(name).weight - target).norm().detach())
        run.step(progress=0.79 * (step + 1) / (4 * steps), optimizer=optimizer)
        if run.lc.iterations != before:
            left.append(None if begun is None else off / begun)
            begun = float((model.get_submodule(name).weight - run.lc.compressed[name]).norm().detach())
    assert left[1] == pytest.approx(np.exp(-0.4), abs=0.04)
    assert left[2] == pytest.approx(np.exp(-0.6), abs=0.06)


# -- what a GPU would have to wait for


def test_an_ordinary_step_never_waits_for_the_device(copied) -> None:
    model = es.build_model("resnet8", num_classes=10, in_channels=1, image_size=8)
    run = es.TTLC(search=0).start(model, X, es.Budget(macs=0.4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run.step(progress=0.06, optimizer=optimizer)  # a C step: from now on there is a penalty
    with Waits(copied) as counted:
        penalty = run.penalty()
        forward = counted.operations
        penalty.backward()
        backward = counted.operations - forward
        run.rate(0.07)
        run.step(progress=0.07, optimizer=optimizer)
        assert (counted.waits, counted.operations) == (0, forward + backward)
        penalty.detach().item()
        penalty.detach().tolist()
    assert counted.waits == 2  # what waits is seen
    assert run.lc.iterations == 1 and run.lc.compressed
    assert forward <= 6 and backward <= 3 + len(run.lc.compressed)  # one pass over all weights, no copy of each


def test_the_rate_after_the_replacement_rises_to_its_peak_and_falls_to_nothing() -> None:
    def rates(**options: float) -> list[float]:
        run = es.TTLC(search=0, lc=False, share=0.6, **options).start(net(), X, es.Budget(macs=0.4))
        run.step(progress=0.6, optimizer=torch.optim.SGD(run.model.parameters(), lr=0.1))
        assert run.replaced
        return [run.rate(progress) for progress in (0.6, 0.65, 0.7, 0.8, 1.0)]

    plain, settled = rates(finetune_lr=1.0, finetune_warmup=0.0), rates(finetune_lr=0.5, finetune_warmup=0.25)
    assert plain[0] == 1.0 and plain[-1] == pytest.approx(0.0, abs=1e-12)
    assert settled == pytest.approx([share * rate for share, rate in zip((0, 0.25, 0.5, 0.5, 0.5), plain, strict=True)])


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_frobenius_decay_is_that_of_the_product(kind) -> None:
    torch.manual_seed(0)
    row = nn.Sequential(nn.Conv2d(4, 3, 1, bias=False), nn.Conv2d(3, 5, 3, bias=False), nn.Conv2d(5, 6, 1)).double()
    weights = [m.weight for m in row]
    composed = torch.einsum("oa,abkl,bi->oikl", weights[2][:, :, 0, 0], weights[1], weights[0][:, :, 0, 0])
    wanted = torch.autograd.grad(0.5 * composed.square().sum(), weights)
    before = [w.detach().clone() for w in weights]
    optimizer = kind([{"params": row.parameters(), "weight_decay": 0.1}], lr=1e-3)
    for p in row.parameters():
        p.grad = torch.zeros_like(p)
    for _ in range(2):
        optimizer.step()
    decay_products([row], optimizer, steps=2)
    for weight, old, gradient in zip(weights, before, wanted, strict=True):
        torch.testing.assert_close(weight - old, -2e-4 * gradient, rtol=1e-2, atol=1e-8)


def test_frobenius_decay_sets_in_with_the_factors() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)).double()
    frobenius = es.TTLC(lc=False, search=0, share=0.5, frobenius=True)
    run = es.attach(model, torch.zeros(1, 3, 8, 8).double(), budget=es.Budget(macs=0.4), method=frobenius)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(1, 6 + tt_lc.DECAY_EVERY):
        if step == 6:
            row = model[2]
            before = [layer.weight.detach().clone() for layer in row]
            wanted = torch.autograd.grad(0.5 * row.composed().square().sum(), [layer.weight for layer in row])
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        run.step(progress=step / 10, optimizer=optimizer)
    for layer, old, gradient in zip(row, before, wanted, strict=True):
        torch.testing.assert_close(layer.weight - old, -1e-3 * tt_lc.DECAY_EVERY * gradient, rtol=0.02, atol=1e-7)


def c_step(run: tt_lc.TTLCRun, progress: float) -> None:
    wanted, sequences = run.lc.wanted(), run.sequences
    choosing = run._spectra(wanted)
    if choosing is not None:
        sequences = run._choose(choosing, run.point)
    run._c_step(progress, wanted, sequences, fresh=choosing is not None)


def test_a_c_step_fetches_all_weights_at_once_and_brings_them_back_at_once(monkeypatch) -> None:
    """``meta`` stands for a GPU: whatever reads a number of it, or mixes it with the CPU, raises."""
    run = es.TTLC(search=0).start(net(), X, es.Budget(macs=0.4))
    here = {n: w.detach() for n, w in run.lc.weights.items()}
    run.lc.weights = {n: nn.Parameter(w.to("meta")) for n, w in here.items()}
    trips = []

    def watched(tensors, device):
        if all(t.device == torch.device(device) for t in tensors.values()):
            return dict(tensors)
        trips.append(str(device))
        return here if trips[-1] == "cpu" else moved(tensors, device)

    for module in (lc_module, tt_lc, spectra):
        monkeypatch.setattr(module, "moved", watched)
    monkeypatch.setattr(lc_module, "relative_gap", lambda *_: 0.5)  # waits once
    for number in range(1, 3):
        c_step(run, 0.1 * number)
        assert trips == ["cpu", "meta"] * number
    assert {w.device.type for f in run.factors.values() for w in f.weights} == {"cpu"}
    assert {t.device.type for t in run.lc._targets} == {"meta"} and run.lc._targets
    assert run.penalty().device.type == "meta"


def test_moving_keeps_every_tensor_what_it_was() -> None:
    tensors = {"a": torch.randn(2, 3, 1, 1), "b": torch.arange(4), "c": torch.randn(3, 4, 2, 2), "d": torch.tensor(7)}
    tensors["e"] = torch.randn(2, 3, 2, 2).to(memory_format=torch.channels_last)
    assert all(t is tensors[n] for n, t in moved(tensors, "cpu").items())
    for device in ("cpu:0", "meta"):  # to torch the first is another device than "cpu"
        away = moved(tensors, device)
        assert list(away) == list(tensors)
        for name, tensor in tensors.items():
            assert (away[name].shape, away[name].dtype) == (tensor.shape, tensor.dtype)
            assert away[name].device.type == device.split(":")[0]
            assert device == "meta" or (torch.equal(away[name], tensor) and away[name] is not tensor)


def test_scoring_a_candidate_waits_once(copied) -> None:
    batches = [(torch.randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.long)) for _ in range(3)]
    model = net()
    with Waits(copied) as counted:
        recalibrate_batchnorm(model, batches, 3)
        loss_on(model, batches)
    assert counted.waits == 1


def test_a_candidate_is_scored_where_it_is() -> None:
    """The meta device stands for a GPU: what is not moved to it is refused, and no number comes back."""
    x, y = torch.randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.long)
    with pytest.raises(NotImplementedError, match="meta"):
        loss_on(net().to("meta"), [(x, y)])


# -- the search


def test_a_search_that_is_interrupted_ends_where_it_would_have_ended() -> None:
    ranges, first = {"a": (-2.0, 2.0), "b": (0.0, 1.0)}, {"a": 0.0, "b": 0.5}

    def score(point):
        return (point["a"] - 1) ** 2 + (point["b"] - 0.2) ** 2

    whole: list = []
    best = minimise(score, ranges, first=first, count=8, seed=3, trials=whole)
    parts: list = []
    minimise(score, ranges, first=first, count=8, seed=3, trials=parts[:0])
    for _ in range(2):
        calls = itertools.count()

        def stops(point, calls=calls):
            if next(calls) == 3:
                raise KeyboardInterrupt
            return score(point)

        with pytest.raises(KeyboardInterrupt):
            minimise(stops, ranges, first=first, count=8, seed=3, trials=parts)
    assert minimise(score, ranges, first=first, count=8, seed=3, trials=parts) == best
    assert parts == whole
    assert score(best) < score(first)


def test_failed_trials_are_recorded_and_the_search_goes_on() -> None:
    def score(point):
        if point["a"] > 0.5:
            raise ValueError("too large")
        return float("nan") if point["a"] < -1.5 else point["a"] ** 2

    trials: list = []
    best = minimise(score, {"a": (-2.0, 2.0)}, first={"a": 1.0}, count=8, seed=0, trials=trials)
    assert len(trials) == 8
    assert trials[0] == {"point": {"a": 1.0}, "score": None, "failed": "ValueError: too large"}
    assert best is not None and -1.5 <= best["a"] <= 0.5


def test_a_search_of_which_all_trials_failed_says_why(tmp_path) -> None:
    trials: list = []
    job = {"first": {"a": 0.5}, "count": 2, "seed": 0, "trials": trials, "journal": tmp_path / "search.journal"}
    with pytest.raises(
        ValueError, match=r"all 2 trials of the search failed, the first: the score is inf; .*move .*journal"
    ):
        minimise(lambda point: float("inf"), {"a": (0.0, 1.0)}, **job)
    assert len(trials) == 2 and all(trial["failed"] for trial in trials)


RANGES, FIRST = {"a": (-2.0, 2.0), "b": (0.0, 1.0)}, {"a": 0.0, "b": 0.5}


def test_a_search_that_is_killed_goes_on_at_its_trial(tmp_path) -> None:
    """The program is gone in the middle of trial 6, and half a line of what it wrote last is in the journal."""
    whole: list = []
    seen: list = []
    dies_at = None

    def score(point):
        seen.append(point)
        if len(seen) == dies_at:
            os._exit(9)
        if len(seen) == 3:
            raise ValueError("no such layer")
        return (point["a"] - 1) ** 2 + (point["b"] - 0.2) ** 2

    best = minimise(score, RANGES, first=FIRST, count=9, seed=3, trials=whole)
    journal = tmp_path / "search.journal"
    options = {"first": FIRST, "count": 9, "seed": 3, "journal": journal}
    seen.clear()
    dies_at = 6
    killed = forked(lambda: minimise(score, RANGES, trials=[], name="one", **options), folder=tmp_path)
    assert killed.returncode == 9
    seen, dies_at = [None] * 9, None
    with journal.open("a") as file:
        file.write('{"op_code":4,"worker_id":"x')
    parts: list = []
    asked = len(seen)
    assert minimise(score, RANGES, trials=parts, name="one", **options) == best
    assert parts == whole and parts[2]["failed"] == "ValueError: no such layer"
    assert len(seen) - asked == 4  # trials 6 to 9
    minimise(score, RANGES, trials=parts, name="one", **options)
    assert len(seen) - asked == 4  # finished: nothing is tried again
    minimise(score, RANGES, trials=parts, name="other weights", **options)
    assert len(seen) - asked == 13


def test_a_journal_that_cannot_be_read_is_named(tmp_path) -> None:
    journal = tmp_path / "search.journal"
    journal.write_text("nothing\nof the kind\n")
    with pytest.raises(ValueError, match=r"search\.journal: the trials in it cannot be read .* move the file away"):
        minimise(lambda point: 0.0, RANGES, first=FIRST, count=2, seed=0, trials=[], journal=journal)


# -- the method


@pytest.mark.parametrize(
    "budget",
    [es.Budget(macs=0.33), es.Budget(params=0.3), es.Budget(macs=0.4, params=0.3), es.Budget(macs=0.5, multiple_of=8)],
    ids=str,
)
def test_compress_meets_the_budget_and_learns(digits, budget, tmp_path, unmeasured) -> None:
    result = es.compress(net(), digits, budget=budget, method=es.TTLC(search=3), recipe=recipe(), out=tmp_path / "run")
    limits = budget.limits(result.dense)
    for metric, limit in limits.items():
        assert getattr(result.cost, metric) <= limit
    # one option more of something would not fit: the budget is used up to the step of a group of alternatives
    assert max(getattr(result.cost, m) / limit for m, limit in limits.items()) > 0.85
    assert result.accuracy is not None and result.accuracy > 60
    if budget.multiple_of == 8:
        inner = [c for m in result.model if isinstance(m, nn.Sequential) for c in list(m)[:-1]]
        assert inner and all(
            c.out_channels % 8 == 0 or c.out_channels == 16 * 3 for c in inner if isinstance(c, nn.Conv2d)
        )
    again = es.load(tmp_path / "run" / "model.safetensors", base=net())
    torch.testing.assert_close(again.eval()(X), result.model.eval()(X))
    assert (tmp_path / "run" / "history.json").exists()


def test_the_gap_falls_and_the_replacement_hardly_moves_the_logits(digits) -> None:
    data = set_aside(digits, 100)
    run, x, _ = run_until(
        data, es.TTLC(search=0, iterations=10, share=0.8, penalty_exponent=0.1, growth=2.0), stop_before=True
    )
    gaps = [value for _, value in run.history["gap"]["all"]]
    assert gaps[-1] < 0.25 * max(gaps)
    run.model.eval()
    before = run.model(x)
    macs = run.cost.macs
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1, momentum=0.9)
    removed = run.step(progress=0.8, optimizer=optimizer)
    assert removed is not None and run.replaced
    assert removed.cost.macs < 0.5 * macs and removed.cost == cost(es.trace(run.model, X, rehearse=False))
    with torch.no_grad():
        assert float((run.model(x) - before).abs().max() / before.abs().max()) < 0.2
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in run.model.parameters()}
    assert run.penalty() == 0.0 and run.status.remaining == 0.0


def test_weights_have_arrived_at_their_compressed_form_before_it_takes_their_place(digits) -> None:
    method = es.TTLC(search=0, iterations=24, share=0.65, arrive=4)
    run, x, _ = run_until(set_aside(digits, 100), method, stop_before=True, steps=300)
    gaps = [value for _, value in run.history["gap"]["all"]]
    assert len(gaps) == 23 + 4 and gaps[-1] < 0.25 * max(gaps)
    run.model.eval()
    with torch.no_grad():
        before = run.model(x)
        run.step(progress=0.65, optimizer=torch.optim.SGD(run.model.parameters(), lr=0.1, momentum=0.9))
        assert run.history["gap"]["all"][-1][1] < 0.05
        assert float((run.model(x) - before).abs().max() / before.abs().max()) < 0.05


def run_until(data, method, *, stop_before, steps: int = 150):
    """Train by hand until the last C step is due."""
    model = net()
    batches = list(data.calibration_batches(batch_size=64, batches=4))
    run = method.start(model, X, es.Budget(macs=0.4), batches=batches)
    run.held_out = list(data.holdout_batches()) if data.has_holdout else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.train()
    step = 0
    while True:
        for x, y in data.train_batches(batch_size=64, epoch=step, seed=0):
            progress = (step + 1) / steps
            if stop_before and progress >= method.share:
                return run, x, optimizer
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * run.rate(step / steps)
            optimizer.zero_grad()
            (F.cross_entropy(model(x), y) + run.penalty()).backward()
            optimizer.step()
            run.step(progress=progress, optimizer=optimizer)
            step += 1
            if step == steps:
                return run, x, optimizer


@pytest.fixture
def few(digits, unmeasured):
    """A few digits, in runs that export and time nothing."""
    return dataclasses.replace(digits, train=digits.train[:256], test=digits.test[:64])


def assert_same_run(one: es.Result, other: es.Result) -> None:
    assert one.cost == other.cost and one.limits == other.limits
    theirs = dict(other.model.named_parameters())
    assert all(torch.equal(p, theirs[n]) for n, p in one.model.named_parameters())
    assert (one.folder / "history.json").read_text() == (other.folder / "history.json").read_text()


@pytest.mark.parametrize("epochs", [2, 4], ids=["before any checkpoint", "after one"])
def test_a_run_killed_within_its_search_ends_where_the_whole_run_ends(few, epochs, tmp_path, monkeypatch) -> None:
    calls: list = []
    real = scoring.loss_on

    def loss_on(model, images):
        calls.append(model)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return real(model, images)

    monkeypatch.setattr(scoring, "loss_on", loss_on)
    method = es.TTLC(search=5, iterations=6, share=0.6)
    options = {"budget": es.Budget(macs=0.4), "method": method, "recipe": recipe(epochs=epochs)}
    stop = 0
    whole = es.compress(net(), few, out=tmp_path / "whole", **options)
    assert len(calls) == 5
    stop = 5 + 3
    with pytest.raises(KeyboardInterrupt):
        es.compress(net(), few, out=tmp_path / "parts", **options)
    rest = es.compress(net(), few, out=tmp_path / "parts", resume=True, **options)
    assert len(calls) == 5 + 3 + 3  # trials 3 to 5, and not the first two
    assert_same_run(rest, whole)


def test_the_course_of_the_search_is_recorded() -> None:
    run = es.TTLC().start(net(), X, es.Budget(macs=0.4))
    scores = [0.7, None, 0.9, 0.4]
    run.trials = [{"point": {"tt": 0.5}, "score": s, "failed": "" if s else "ValueError: x"} for s in scores]
    run._record_search()
    assert run.history["search"] == {
        "loss": [[1, 0.7], [3, 0.9], [4, 0.4]],
        "best": [[1, 0.7], [3, 0.7], [4, 0.4]],
        "feasible": [[1, 1.0], [2, 0.0], [3, 1.0], [4, 1.0]],
    }
    assert run.history["search point"]["tt"] == [[n, 0.5] for n in (1, 2, 3, 4)]
    drawing = search_curve(run.history["search"])
    marks = re.findall(r'<use xlink:href="#[^"]+" x="[^"]+" y="[^"]+" style="fill: (#\w+)', drawing)
    assert marks.count(COLOURS["c5"]) == 3 + 1 and marks.count(COLOURS["c1"]) == 1 + 1  # and one of each in the legend


def test_the_course_of_a_run_is_drawn(few, tmp_path) -> None:
    method = es.TTLC(search=2, iterations=5)
    es.compress(net(), few, budget=es.Budget(macs=0.4), method=method, recipe=recipe(epochs=2), out=tmp_path / "run")
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    ranks, gap, search = (history[kind] for kind in ("rank", "gap", "search"))
    found = {"ranks": rank_bars(ranks, history["full rank"]), "gap": gap_curve(gap), "search": search_curve(search)}
    assert all(ET.fromstring(svg).find("{http://www.w3.org/2000/svg}title").text for svg in found.values())
    assert len(history["gap"]["all"]) == 5
    assert any(path.count("L") == 4 for path in re.findall(r'd="M ([^"]+)"', found["gap"]))
    shares = [history["rank"][n][-1][1] / history["full rank"][n][-1][1] for n in history["rank"]]
    assert len(shares) == 4 and min(shares) < 1
    widths = {}
    for path, colour in re.findall(r'<path d="M ([^"]+)z\n" clip-path[^>]*fill: (#\w+)', found["ranks"]):
        places = [float(pair.split()[0]) for pair in path.split("L")]
        widths.setdefault("pale" if colour == COLOURS["pale"] else "strong", []).append(max(places) - min(places))
    drawn = [a / b for a, b in zip(widths["strong"], widths["pale"], strict=True)]
    assert drawn == pytest.approx(shares, abs=0.01)
    for name in found:  # programs other than browsers know no variables of a style sheet
        assert "var(" not in found[name]


# -- the ablation: ranks otherwise, and without learning-compression


@pytest.mark.parametrize("form", ["channel", "spatial", "tucker", "tt"])
@pytest.mark.parametrize("budget", [es.Budget(macs=0.2), es.Budget(macs=0.4, params=0.3)], ids=str)
def test_equal_ranks_are_one_fraction_and_use_the_budget_up(form, budget) -> None:
    model = es.build_model("resnet8", num_classes=10, in_channels=1, image_size=8)
    run = es.TTLC(ranks="equal", forms=(form,)).start(model, X, budget)
    spectra = spectra_of(run.lc.wanted())
    sequences = run._choose(spectra, {})
    assert {c.name for n, c in sequences.items() if run.places[n].kernel == (3, 3)} == {form}
    low, high = 0.0, 1.0  # what every rank says of the fraction: it is rounded, 1 at the least, or one more than that
    for name, taken in sequences.items():
        wholes = [full_rank(run.places[name], taken.name)]
        if taken.name in ("tucker", "tt"):
            wholes = [run.places[name].in_channels, run.places[name].out_channels]
        for rank, whole in zip((taken.widths[0], taken.widths[-1]), wholes, strict=False):
            low, high = max(low, (rank - 1.5) / whole if rank > 2 else 0.0), min(high, (rank + 0.5) / whole)
    assert low <= high
    wide = [n for n, p in run.places.items() if p.kernel == (3, 3) and p.in_channels > 1]
    assert set(wide) <= sequences.keys()  # all of them, none dense
    run.sequences = sequences
    run.finish()
    used = max(getattr(run.cost, m) / limit for m, limit in run.limits.items())
    assert 0.99 < used <= 1


def test_equal_ranks_search_for_nothing_and_withhold_nothing() -> None:
    assert es.TTLC(ranks="equal").withholds == 0 and es.TTLC(ranks="energy").withholds == 1000
    run = es.TTLC(ranks="equal").start(net(), X, es.Budget(macs=0.4), batches=[(X, torch.zeros(1, dtype=torch.long))])
    wanted = run.lc.wanted()
    assert run.search(wanted, spectra_of(wanted)) == {} and run.trials == []
    with pytest.raises(es.BudgetError, match="smallest reachable"):
        es.TTLC(ranks="equal").start(net(), X, es.Budget(macs=0.001))


@pytest.mark.parametrize("ranks", ["evbmf", "energy", "equal"])
@pytest.mark.parametrize("lc", [True, False])
def test_every_choice_of_ranks_runs_with_and_without_lc(digits, ranks, lc) -> None:
    data = set_aside(digits, 100)
    method = es.TTLC(ranks=ranks, search=2, lc=lc, iterations=4)
    run, _, optimizer = run_until(data, method, stop_before=True, steps=60)
    pulled = run.penalty()
    assert bool(pulled > 0) if lc else pulled == 0.0
    removed = run.step(progress=method.share, optimizer=optimizer)
    assert removed is not None and run.replaced and run.cost.macs <= run.limits["macs"]
    assert len(run.history["gap"]["all"]) == (4 if lc else 1)
    assert len(run.trials) == (0 if ranks == "equal" else 2)


def test_a_search_leaves_the_model_as_it_was_and_never_sees_test_images(digits) -> None:
    data = set_aside(digits, 100)
    run, _, _ = run_until(data, es.TTLC(search=2, iterations=6, select=1.0), stop_before=True, steps=40)
    run.trials.clear()
    before = {n: t.clone() for n, t in run.model.state_dict().items()}
    wanted = run.lc.wanted()
    point = run.search(wanted, spectra_of(wanted))
    assert set(point) == {"8x8", "4x4", "linear", "tt"}
    assert all(torch.equal(t, before[n]) for n, t in run.model.state_dict().items())
    assert len(run.trials) == 2


def test_images_to_choose_by_are_not_trained_on(digits) -> None:
    apart = set_aside(digits, 100)
    assert len(apart.holdout) == 100 and len(apart.train) == len(digits.train) - 100
    trained = {bytes(i.numpy().tobytes()) for i in apart.train.images}
    fresh = [i for i in apart.holdout.images if bytes(i.numpy().tobytes()) not in trained]
    assert len(fresh) >= 98  # the data set itself may hold an image twice
    assert len(set_aside(digits, 10**6).holdout) == len(digits.train) // 10
    assert set_aside(apart, 50) is apart and set_aside(digits, 0) is digits
    assert es.TTLC(search=0).withholds == 0 and es.TTLC(held_out=77).withholds == 77


def test_what_cannot_take_a_form_stays_dense_with_its_reason() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.circular = nn.Conv2d(1, 16, 3, padding=1, padding_mode="circular")
            self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
            self.dilated = nn.Conv2d(16, 24, 3, padding=2, dilation=2)
            self.even = nn.Conv2d(24, 24, 2, stride=2)
            self.frozen = nn.Conv2d(24, 24, 1)
            self.frozen.weight.requires_grad_(False)
            self.kept = nn.Conv2d(24, 24, 1)
            self.fc = nn.Linear(24, 10)

        def forward(self, x):
            x = self.even(self.dilated(self.grouped(self.circular(x)).relu()).relu())
            return self.fc(self.kept(self.frozen(x).relu()).mean((2, 3)))

    model = Odd()
    run = es.TTLC(search=0).start(model, X, es.Budget(macs=0.75, protect=["kept"]))
    assert run.skipped == {
        "circular": "padding mode 'circular'",
        "grouped": "grouped convolution",
        "frozen": "its weight is frozen",
        "kept": "protected",
    }
    small = run.finish()
    assert run.forced
    assert isinstance(small.dilated, nn.Sequential) and isinstance(small.kept, nn.Conv2d)
    assert cost(es.trace(small, X, rehearse=False)).macs <= 0.75 * run.dense.macs


def test_a_layer_called_by_the_name_of_its_input_stays_dense_with_its_reason() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 16, 3), nn.Linear(16, 10)

        def forward(self, x):
            return self.head(input=self.conv(x).mean((2, 3)))

    places, reasons = find_places(Named(), X)
    assert list(places) == ["conv"]
    assert reasons == {"head": "its input is given by name (input=x), other forms take it by position"}


def test_only_the_forms_that_are_asked_for_are_used() -> None:
    run = es.TTLC(search=0, forms=("tt",)).start(net(), X, es.Budget(macs=0.4))
    run.finish()
    assert {c.name for n, c in run.sequences.items() if run.places[n].kernel != (1, 1)} == {"tt"}


def test_collapsed_proposals_are_floored_and_reported() -> None:
    run = es.TTLC(search=0, floor=0.25).start(net(), X, es.Budget(macs=0.4))
    weights = {n: torch.randn_like(w) for n, w in run.lc.weights.items()}  # pure noise: EVBMF finds nothing in it
    run._choose(spectra_of(weights), {})
    assert run.proposal("5", spectra_of(weights)["5"]) == (8, 8)
    assert run.collapsed["5"] == (0, 0)


def test_budgets_that_cannot_be_met_fail_at_once() -> None:
    with pytest.raises(es.BudgetError, match="smallest reachable"):
        es.TTLC(search=0).start(net(), X, es.Budget(macs=0.001))
    with pytest.raises(ValueError, match="activation_memory cannot be its budget"):
        es.TTLC(search=0).start(net(), X, es.Budget(macs=0.5, activation_memory=0.5))


@pytest.mark.parametrize("name", ["resnet20", "resnet20a"])
def test_one_iteration_is_proven(name) -> None:
    one_iteration(es.build_model(name, num_classes=10), torch.zeros(1, 3, 32, 32))


@pytest.mark.zoo
@pytest.mark.parametrize("name", ZOO)
def test_one_iteration_on_the_zoo_is_proven(name) -> None:
    one_iteration(build(name), example(name))


def one_iteration(model: nn.Module, images: torch.Tensor) -> None:
    """After one LC iteration and the replacement ``verify`` holds, saving and counting included."""
    model.eval()
    dense, budget = copy.deepcopy(model), es.Budget(macs=0.6)
    run = es.TTLC(search=0, sweeps=1).start(model, images, budget)
    c_step(run, 0.1)
    small = run.finish()
    assert run.sequences
    proof = es.verify(dense, run.graph, run.plan, images, small=small, budget=budget).require()
    assert [c.name for c in proof.checks][1] == "small equals composed"


def test_a_factorised_network_that_computes_something_else_is_named() -> None:
    model, images = es.build_model("resnet20", num_classes=10).eval(), torch.zeros(1, 3, 32, 32)
    dense = copy.deepcopy(model)
    run = es.TTLC(search=0).start(model, images, es.Budget(macs=0.6))
    c_step(run, 0.1)
    small = run.finish()
    with pytest.raises(ValueError, match=r"another form, 'conv1:form' first|give what its finish"):
        es.verify(dense, run.graph, run.plan, images)
    row = small.get_submodule(next(n for n in run.sequences if run.places[n].kernel == (3, 3) and n != "conv1"))
    row[0].padding_mode = row[-1].padding_mode = "circular"  # the same cost and weights, another function
    proof = es.verify(dense, run.graph, run.plan, images, small=small)
    assert [c.name for c in proof.checks if not c.passed] == ["small equals composed"]


def outputs(value) -> list[torch.Tensor]:
    """Every tensor in what a network returns."""
    if isinstance(value, torch.Tensor):
        return [value]
    inside = value.values() if isinstance(value, dict) else value
    return [t for part in inside if part is not None for t in outputs(part)]
