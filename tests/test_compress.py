"""The whole job: a network and a budget in, a smaller network and the folder of its run out."""

import copy
import csv
import dataclasses
import json
import re
import tomllib
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from halving import Halving, HalvingAtOnce
from torch import nn

from espalier.costs import cost
from espalier.graph import trace
from espalier.methods.dprp import DPRP
from espalier.methods.magnitude import Magnitude
from espalier.methods.mgp import MGP
from espalier.methods.svd_oneshot import SVDOneShot
from espalier.methods.tcp import TCP
from espalier.methods.tt_lc import TTLC
from espalier.plan import Budget, Plan
from espalier.run import compress as compress_room, onnx, report, rundir
from espalier.run.compress import compress
from espalier.run.data import Data, Loaders, load_data
from espalier.run.evaluate import evaluate
from espalier.run.loop import train
from espalier.run.onnx import exported
from espalier.run.recipe import Recipe
from espalier.surgery import load
from tests.steps import Killed, assert_same, killed_after

BUDGET = Budget(macs=0.5)
EXAMPLE = torch.zeros(1, 1, 8, 8)


class Net(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.head(x.mean((2, 3)))


def net() -> Net:
    torch.manual_seed(7)
    return Net()


def recipe(**changes) -> Recipe:
    return Recipe(**{"epochs": 3, "batch_size": 32, "lr": 0.05, "device": "cpu", "threads": 1, **changes})


@pytest.fixture(scope="module")
def digits() -> Data:
    whole = load_data("digits")
    return dataclasses.replace(whole, train=whole.train[:320], test=whole.test[:100])


@pytest.fixture(scope="module")
def trained(digits) -> nn.Module:
    model = net()
    train(model, load_data("digits"), recipe(epochs=6, lr=0.1))
    return model


# -- what comes out


def test_one_shot_needs_only_an_example_and_touches_nothing_else():
    model = net()
    before = copy.deepcopy(model)
    result = compress(model, EXAMPLE, budget=BUDGET, method=Magnitude())
    assert result.cost == cost(trace(result.model, EXAMPLE, rehearse=False))
    assert result.cost.macs <= result.limits["macs"] == result.dense.macs // 2
    assert type(result.model) is Net and result.model.training
    assert result.accuracy is None and result.history.epochs == ()
    assert_same(model, before)


@pytest.mark.parametrize("method", [None, TCP(importance="share")])
def test_training_meets_the_budget_and_learns(digits, trained, method):
    before = copy.deepcopy(trained)
    result = compress(trained, digits, budget=BUDGET, method=method, recipe=recipe(epochs=4))
    assert result.cost.macs <= result.limits["macs"]
    assert result.dense_accuracy == evaluate(trained, digits.test_batches())["accuracy"] > 60
    assert result.accuracy == evaluate(result.model, digits.test_batches())["accuracy"] > 40
    assert result.history.last.macs == result.cost.macs
    assert len(result.history.epochs) == 4
    assert_same(trained, before)


@pytest.mark.parametrize(
    "method", [Magnitude(), SVDOneShot(), TCP(), MGP(), DPRP(), TTLC(search=0, iterations=3)], ids=lambda m: m.name
)
def test_what_is_delivered_is_proven(digits, tmp_path, unmeasured, method):
    result = compress(net(), digits, budget=Budget(macs=0.6), method=method, recipe=recipe(), out=tmp_path)
    assert result.proof.passed and {"budget", "planned cost equals built cost"} <= {c.name for c in result.proof.checks}
    assert cost(result.graph, result.plan) == result.cost
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["proof"]["passed"] and len(metrics["proof"]["checks"]) == len(result.proof.checks)
    assert "Proven: identity; small equals" in (tmp_path / "summary.md").read_text()


def test_a_failed_proof_is_an_error_that_keeps_everything(digits, tmp_path, unmeasured):
    class Spoiling(type(Magnitude().start(net(), EXAMPLE, BUDGET))):
        def finish(self):
            self.model.conv2.padding_mode = "circular"  # the same cost and weights, another function
            return self.model

    class Spoilt(Magnitude):
        def start(self, model, example, budget, *, batches=None):
            return Spoiling(model, example, budget, self, batches)

    with pytest.raises(compress_room.ProofError, match="small equals masked: ") as caught:
        compress(net(), digits, budget=BUDGET, method=Spoilt(), recipe=recipe(epochs=1), out=tmp_path)
    assert not caught.value.result.proof.passed
    assert (tmp_path / "model.safetensors").exists()
    assert "NOT WHAT WAS PROMISED" in (tmp_path / "summary.md").read_text()
    shut = compress(net(), digits, budget=Budget(macs=0.9), method=Spoilt(), recipe=recipe(epochs=1), verify=False)
    assert shut.proof is None


def test_one_shot_with_data_is_fine_tuned_at_constant_cost(digits, trained):
    result = compress(trained, digits, budget=BUDGET, method=Magnitude(), recipe=recipe())
    assert [e.macs for e in result.history.epochs] == [result.cost.macs] * 3
    assert result.accuracy > 60
    untouched = compress(trained, digits, budget=BUDGET, method=Magnitude(), recipe=recipe(epochs=0))
    assert untouched.accuracy < result.accuracy and untouched.history.epochs == ()


def test_a_trained_network_teaches_and_an_untrained_one_does_not(digits, trained, monkeypatch):
    seen = []

    def spy(model, *args, teacher, **options):
        seen.append(teacher)
        return train(model, *args, teacher=teacher, **options)

    monkeypatch.setattr(compress_room, "train", spy)
    job = {"budget": BUDGET, "method": Halving()}
    compress(trained, digits, **job, recipe=recipe(epochs=1))
    compress(net(), digits, **job, recipe=recipe(epochs=1))
    compress(trained, digits, **job, recipe=recipe(epochs=1, distill=0.0))
    compress(trained, digits, **job, recipe=recipe(epochs=1), trained=False)
    compress(net(), digits, **job, recipe=recipe(epochs=1), trained=True)
    assert [teacher is not None for teacher in seen] == [True, False, False, False, True]
    assert_same(seen[0], trained)


def test_a_method_above_the_budget_is_found_out(digits):
    @dataclasses.dataclass(frozen=True)
    class Lazy(HalvingAtOnce):
        def start(self, model, example, budget, *, batches=None):
            run = super().start(model, example, budget)
            run.finish = lambda: model
            return run

    with pytest.raises(ValueError, match="above the budget"):
        compress(net(), EXAMPLE, budget=BUDGET, method=Lazy())


def test_every_layer_is_in_the_mode_that_it_had(digits):
    model = net()
    model.bn1.eval()
    for data, method in ((EXAMPLE, Magnitude()), (EXAMPLE, SVDOneShot()), (digits, Halving())):
        small = compress(model, data, budget=BUDGET, method=method, recipe=recipe(epochs=1)).model
        assert [n for n, m in small.named_modules() if not m.training] == ["bn1"]
    model.eval()
    assert not any(m.training for m in compress(model, EXAMPLE, budget=BUDGET, method=SVDOneShot()).model.modules())


# -- the folder


def test_a_run_folder_holds_the_network_its_metrics_and_what_reproduces_it(digits, trained, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    exports = []
    monkeypatch.setattr(onnx, "exported", lambda *given: (exports.append(given[0]), exported(*given))[1])
    out = tmp_path / "run"
    origin = {"model": {"name": "mine"}, "data": {"name": "digits", "holdout": 0}}
    plan = recipe(epochs=2, ema=0.9)
    result = compress(
        trained,
        digits,
        budget=Budget(macs=0.5, multiple_of=2),
        method=Halving(0.3),
        recipe=plan,
        out=out,
        config=origin,
    )
    assert result.folder == out
    x, _ = next(digits.test_batches(4))
    small = load(out / "model.safetensors", base=net())
    assert torch.equal(small.eval()(x), copy.deepcopy(result.model).eval()(x))
    assert (out / "model.onnx").stat().st_size > 0
    assert len(exports) == 2  # the small network once, to be written and timed, and the dense one to be timed

    plan_made = Plan.from_json((out / "plan.json").read_text())
    assert cost(trace(net(), EXAMPLE, rehearse=False), plan_made) == result.cost

    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["small"]["accuracy"] == result.accuracy
    assert metrics["dense"]["macs"] == result.dense.macs and metrics["small"]["macs"] == result.cost.macs
    assert metrics["small"]["bytes"] == (out / "model.safetensors").stat().st_size < metrics["dense"]["bytes"]
    assert metrics["fraction"]["macs"] == result.cost.macs / result.dense.macs
    timed = [(t["backend"], t["batch"], t["name"]) for t in metrics["latency"]]
    assert timed == [(b, n, m) for b in ("torch", "onnxruntime") for n in (1, 64) for m in ("dense", "small")]
    assert metrics["cut_seconds"] > 0
    assert metrics["notes"] == {} and metrics["onnx_difference"] < 1e-4

    config = tomllib.loads((out / "config.toml").read_text())
    assert config["model"] == {"name": "mine"} and config["data"] == {"name": "digits", "holdout": 0}
    assert Budget(**config["budget"]) == Budget(macs=0.5, multiple_of=2, protect=[])
    assert config["method"] == {"name": "halving", "at": 0.3}
    assert Recipe.from_dict(config["recipe"]) == plan

    rows = list(csv.DictReader((out / "log.csv").open()))
    assert [int(r["epoch"]) for r in rows] == [1, 2]
    assert float(rows[1]["accuracy"]) == pytest.approx(result.history.last.accuracy, rel=1e-5)
    assert {"loss", "macs", "strength", "remaining", "seconds", "lr"} <= rows[0].keys()
    text = (out / "summary.md").read_text()
    assert "mine on digits, compressed by halving" in text and f"{result.cost.macs:,}" in text


def test_a_one_shot_run_without_data_has_a_folder_too(tmp_path, unmeasured):
    result = compress(net(), EXAMPLE, budget=BUDGET, method=Magnitude(), out=tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text())["small"]["macs"] == result.cost.macs
    assert "accuracy" not in (tmp_path / "summary.md").read_text()


def test_what_cannot_be_exported_is_said_and_the_run_is_kept(tmp_path, monkeypatch, unmeasured):
    def broken(*_, **__):
        raise ValueError("no translation for this operation")

    monkeypatch.setattr(report, "export_onnx", broken)
    compress(net(), EXAMPLE, budget=BUDGET, method=Magnitude(), out=tmp_path)
    assert (tmp_path / "model.safetensors").exists() and not (tmp_path / "model.onnx").exists()
    notes = json.loads((tmp_path / "metrics.json").read_text())["notes"]
    assert notes["model.onnx"] == "no translation for this operation"
    assert "no translation for this operation" in (tmp_path / "summary.md").read_text()


def test_an_older_run_is_refused_and_with_force_moved_aside(tmp_path, unmeasured):
    (tmp_path / "notes.txt").write_text("mine")
    one_shot = {"budget": BUDGET, "method": Magnitude()}
    compress(net(), EXAMPLE, **one_shot, out=tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"already holds a run.*resume.*force"):
        compress(net(), EXAMPLE, **one_shot, out=tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    for number in (1, 2):
        compress(net(), EXAMPLE, budget=Budget(macs=0.4), method=Magnitude(), out=tmp_path, force=True)
        assert (tmp_path / f"old-{number}" / "config.toml").exists()
    assert {p.name: p.read_bytes() for p in (tmp_path / "old-1").iterdir()} == {
        n: b for n, b in before.items() if n != "notes.txt"
    }
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_unreachable_budget_leaves_an_older_run_where_it_is(tmp_path, unmeasured):
    compress(net(), EXAMPLE, budget=BUDGET, method=Magnitude(), out=tmp_path)
    with pytest.raises(ValueError, match="smallest reachable"):
        compress(net(), EXAMPLE, budget=Budget(macs=1e-9), method=Magnitude(), out=tmp_path, force=True)
    assert (tmp_path / "metrics.json").exists()


@pytest.fixture(scope="module")
def wholes():
    """The runs that nobody kills, by method."""
    return {}


SEARCHING = TTLC(search=2, iterations=7, share=0.6, arrive=2, held_out=20)


@pytest.mark.parametrize(
    ("method", "killed", "changes"),
    [
        (TCP(), 2, {}),
        (DPRP(), 1, {"optimizer": "adamw", "lr": 0.002}),
        (Halving(0.4), 1, {}),
        (Magnitude(), 3, {}),
        (MGP(), 2, {}),
        (SEARCHING, 1, {}),  # inside an L step before the search
        (SEARCHING, 2, {}),  # after it
        (SEARCHING, 3, {}),  # and after the replacement
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_killed_run_is_resumed_exactly(
    digits, trained, tmp_path, tmp_path_factory, unmeasured, wholes, method, killed, changes
):
    plan = recipe(epochs=4, ema=0.9, **changes)
    job = {"budget": Budget(macs=0.4, params=0.6), "method": method, "recipe": plan}
    if method not in wholes:
        wholes[method] = compress(trained, digits, **job, out=tmp_path_factory.mktemp("whole"))
    whole = wholes[method]
    with pytest.raises(Killed):
        compress(trained, digits, **job, out=tmp_path / "part", on_epoch=killed_after(killed))
    torch.manual_seed(1234)
    result = compress(trained, digits, **job, out=tmp_path / "part", resume=True)
    assert_same(whole.model, result.model)
    assert (result.cost, result.dense, result.limits) == (whole.cost, whole.dense, whole.limits)
    same = [dataclasses.replace(e, seconds=0.0) for e in result.history.epochs]
    assert same == [dataclasses.replace(e, seconds=0.0) for e in whole.history.epochs]
    assert len((tmp_path / "part" / "log.csv").read_text().splitlines()) == 5
    for name in ("plan.json", "history.json"):
        one, other = ((folder / name) for folder in (whole.folder, tmp_path / "part"))
        assert one.exists() == other.exists() and (not one.exists() or one.read_text() == other.read_text())


def test_a_run_killed_while_the_results_are_written_is_resumed(digits, trained, tmp_path, unmeasured, monkeypatch):
    def full(*_, **__):
        raise OSError("No space left on device")

    job = {"budget": BUDGET, "method": Halving(), "recipe": recipe(epochs=1), "out": tmp_path}
    with monkeypatch.context() as broken:
        broken.setattr(report, "save", full)
        with pytest.raises(OSError, match="No space left"):
            compress(trained, digits, **job)
    assert not (tmp_path / "model.safetensors").exists()
    compress(trained, digits, **job, resume=True)
    assert (tmp_path / "model.safetensors").exists() and (tmp_path / "summary.md").exists()


def one_shot_job(out, **changes):
    data = {"method": SVDOneShot(), "budget": Budget(macs=0.8, multiple_of=8), "recipe": recipe(epochs=2), "out": out}
    return {**data, **changes}


def test_a_resumed_run_of_a_one_shot_method_still_says_what_it_left(digits, tmp_path, unmeasured):
    for name in ("whole", "part"):
        try:
            compress(net(), digits, **one_shot_job(tmp_path / name, on_epoch=killed_after(1 if name == "part" else 9)))
        except Killed:
            compress(net(), digits, **one_shot_job(tmp_path / name), resume=True)
    left = [json.loads((tmp_path / name / "metrics.json").read_text())["skipped"] for name in ("whole", "part")]
    assert left[0] == left[1] != {}


def test_a_one_shot_run_that_left_nothing_is_resumed(digits, tmp_path, unmeasured):
    job = {"budget": BUDGET, "method": Magnitude(), "recipe": recipe(epochs=1), "out": tmp_path}
    compress(net(), digits, **job)
    (tmp_path / "history.json").unlink(missing_ok=True)
    compress(net(), digits, **job, resume=True)
    assert json.loads((tmp_path / "metrics.json").read_text())["skipped"] == {}


@pytest.mark.parametrize("gone", [r"\n\[start\]\ntrained = \w+\nweights = \S+", r"trained = \w+\n"])
def test_a_configuration_that_does_not_say_how_the_run_began_is_resumed(digits, tmp_path, unmeasured, gone):
    job = {"budget": BUDGET, "method": Magnitude(), "recipe": recipe(epochs=1), "out": tmp_path}
    compress(net(), digits, **job)
    config = tmp_path / "config.toml"
    shorter = re.sub(gone, "", config.read_text())
    assert shorter != config.read_text()
    config.write_text(shorter)
    compress(net(), digits, **job, resume=True)


def test_a_run_that_only_trained_is_not_resumed_by_compressing(digits, tmp_path):
    tables = {"method": {"name": "none"}, "recipe": recipe(epochs=1).to_dict()}
    rundir.begin_folder(tmp_path, tables)
    train(net(), digits, recipe(epochs=1), checkpoint=tmp_path / "checkpoint.pt")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"method.name was none and is magnitude now"):
        compress(net(), digits, budget=BUDGET, method=Magnitude(), recipe=recipe(epochs=1), out=tmp_path, resume=True)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


ORIGINS = [
    ("data", {"name": "cifar10"}, r"data.name was digits and is cifar10 now"),
    ("data", {"holdout": 40}, r"data.holdout was 0 and is 40 now"),
    ("data", {"image_size": 16}, r"data.image_size was 8 and is 16 now"),
    ("model", {"name": "resnet32"}, r"model.name was resnet20 and is resnet32 now"),
    ("model", {"image_size": 16}, r"model.image_size was 8 and is 16 now"),
    ("data", {"name": "imagefolder:/elsewhere"}, r"data.name was digits and is imagefolder now"),
    ("data", {"dir": "/elsewhere"}, None),
    ("data", {"holdout": 0}, None),
    ("model", {"weights": "/elsewhere"}, None),
]


def test_what_the_configuration_says_of_model_and_data_stays(tmp_path, unmeasured):
    said = {
        "model": {"name": "resnet20", "weights": "/a", "image_size": 8},
        "data": {"name": "digits", "dir": "/a", "image_size": 8},
    }
    job = {"budget": BUDGET, "method": Magnitude(), "out": tmp_path}
    compress(net(), EXAMPLE, **job, config=said)
    for table, change, message in ORIGINS:
        changed = {**said, table: {**said[table], **change}}
        with nullcontext() if message is None else pytest.raises(ValueError, match=message):
            compress(net(), EXAMPLE, **job, config=changed, resume=True)
    compress(net(), EXAMPLE, **job, resume=True)  # says nothing of them


def test_a_run_is_resumed_only_with_its_data(digits, tmp_path, unmeasured):
    job = {"budget": BUDGET, "method": Magnitude(), "recipe": recipe(epochs=1), "out": tmp_path}
    compress(net(), digits, **job)
    with pytest.raises(ValueError, match="the data's test images was 100 and is 90 now"):
        compress(net(), dataclasses.replace(digits, test=digits.test[:90]), **job, resume=True)


def test_a_configuration_that_toml_cannot_hold_leaves_an_older_run_where_it_is(tmp_path, unmeasured):
    job = {"budget": BUDGET, "method": Magnitude(), "out": tmp_path}
    compress(net(), EXAMPLE, **job)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(ValueError, match="which TOML has no notation for"):
        compress(net(), EXAMPLE, **job, force=True, config={"model": {"arguments": {"depth": 3}}})
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_run_is_resumed_only_as_it_began(digits, trained, tmp_path, unmeasured):
    job = {"budget": BUDGET, "method": Halving(), "recipe": recipe(epochs=1), "out": tmp_path}
    with pytest.raises(ValueError, match="no run to resume"):
        compress(trained, digits, **job, resume=True)
    compress(trained, digits, **job)
    for changed, message in (
        ({"budget": Budget(macs=0.4)}, r"budget.macs was 0.5 and is 0.4"),
        ({"method": Halving(0.2)}, r"method.at was 0.4 and is 0.2"),
        ({"recipe": recipe(epochs=2)}, r"recipe.epochs was 1 and is 2"),
    ):
        with pytest.raises(ValueError, match=message):
            compress(trained, digits, **{**job, **changed}, resume=True)
    with pytest.raises(ValueError, match=r"start.weights was"):
        compress(net(), digits, **job, trained=True, resume=True)
    compress(trained, digits, **{**job, "recipe": recipe(epochs=1, threads=2, graphs=True)}, resume=True)


# -- bad input


def test_data_and_method_have_to_fit(digits):
    with pytest.raises(ValueError, match=r"tcp works while the network trains, so it needs data"):
        compress(net(), EXAMPLE, budget=BUDGET)
    with pytest.raises(ValueError, match=r"Loaders\(train, test"):
        compress(net(), torch.utils.data.DataLoader([1]), budget=BUDGET)
    with pytest.raises(ValueError, match=r"load_data\('cifar10'\)"):
        compress(net(), "cifar10", budget=BUDGET)
    with pytest.raises(ValueError, match="data is a int"):
        compress(net(), 3, budget=BUDGET)
    with pytest.raises(ValueError, match="epochs=1"):
        compress(net(), digits, budget=BUDGET, recipe=recipe(epochs=0))
    with pytest.raises(ValueError, match="expected a Budget"):
        compress(net(), EXAMPLE, budget=0.5, method=Magnitude())
    with pytest.raises(
        ValueError, match=r"method=Magnitude: give a method with its settings, for example es.Magnitude\(\)"
    ):
        compress(net(), EXAMPLE, budget=BUDGET, method=Magnitude)
    with pytest.raises(ValueError, match=r"expected an nn.Module"):
        compress("resnet20", EXAMPLE, budget=BUDGET, method=Magnitude())
    with pytest.raises(ValueError, match="out=FOLDER"):
        compress(net(), EXAMPLE, budget=BUDGET, method=Magnitude(), resume=True)
    with pytest.raises(ValueError, match="batch_size=999"):
        compress(net(), digits, budget=BUDGET, recipe=recipe(batch_size=999))


def test_data_that_does_not_fit_the_network_is_said():
    colour = [(torch.randn(4, 3, 8, 8), torch.randint(10, (4,)))]
    with pytest.raises(ValueError, match=r"does not take the data's images \(3, 8, 8\)"):
        compress(net(), Loaders(colour, colour, num_classes=10), budget=BUDGET, recipe=recipe())
    gray = [(torch.randn(4, 1, 8, 8), torch.randint(5, (4,)))]
    with pytest.raises(ValueError, match=r"10 logits for an image, the data has 5 classes"):
        compress(net(), Loaders(gray, gray, num_classes=5), budget=BUDGET, recipe=recipe())


def test_own_loaders_work_in_place_of_named_data(digits):
    batches = list(digits.train_batches(batch_size=32, epoch=0, seed=0))
    result = compress(net(), Loaders(batches, batches, num_classes=10), budget=BUDGET, recipe=recipe(epochs=2))
    assert result.cost.macs <= result.limits["macs"]


# -- the plain formats


def test_toml_is_read_back_as_it_was_written():
    tables = {
        "espalier": "0.1.0",
        "network": {"name": 'a "quoted"\\path\nü', "weights": None, "odd key": 1},
        "recipe": {"lr": 1e-5, "epochs": 3, "big": 1e22, "on": True, "list": ["a", 2, False]},
        "empty": {},
    }
    expected = {**tables, "network": {"name": 'a "quoted"\\path\nü', "odd key": 1}}
    assert tomllib.loads(rundir.to_toml(tables)) == expected
    with pytest.raises(ValueError, match="noise is a Tensor"):
        rundir.to_toml({"recipe": {"noise": torch.zeros(1)}})


def test_json_has_null_where_a_number_is_not_finite(tmp_path):
    rundir.write_sealed(tmp_path / "m.json", {"loss": float("nan"), "list": [float("inf"), 1.5]})
    assert rundir.read_sealed(tmp_path / "m.json") == {"loss": None, "list": [None, 1.5]}
