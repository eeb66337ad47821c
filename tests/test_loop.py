"""The training loop: it learns, it resumes bit for bit, and it stops where a loss is no longer finite."""

import copy
import dataclasses
import itertools
import random
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from halving import Halving
from torch import nn

import espalier as es
from espalier.carving import carve
from espalier.graph import trace
from espalier.methods.scoring import recalibrate_batchnorm
from espalier.plan import Budget
from espalier.run.checkpoint import read_checkpoint, rebuild_from_checkpoint, write_checkpoint
from espalier.run.data import Data, Loaders, load_data
from espalier.run.ema import AveragedWeights
from espalier.run.evaluate import evaluate
from espalier.run.loop import History, TrainingDiverged, learning_rate, make_optimizer, train
from espalier.run.recipe import Recipe
from espalier.tasks import distillation
from tests.steps import Killed, assert_same, killed_after

BUDGET = Budget(macs=0.5)


class Net(nn.Module):
    """Two convolutions with BatchNorm, a dropout that draws random numbers, one linear layer."""

    def __init__(self, classes: int = 10, width: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(width)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.head(self.drop(x.mean((2, 3))))


def net(**arguments) -> Net:
    torch.manual_seed(7)
    return Net(**arguments)


@pytest.fixture(scope="module")
def digits() -> Data:
    whole = load_data("digits")
    return dataclasses.replace(whole, train=whole.train[:192], test=whole.test[:60])


def recipe(**changes) -> Recipe:
    return Recipe(**{"epochs": 4, "batch_size": 32, "lr": 0.05, "device": "cpu", "threads": 1, **changes})


def without_seconds(history: History) -> list:
    return [dataclasses.replace(e, seconds=0.0) for e in history.epochs]


# -- training


def test_training_learns_the_digits():
    model = net(width=16)
    history = train(model, load_data("digits"), recipe(epochs=6, lr=0.1))
    assert history.last.accuracy > 85
    assert history.last.loss < history.epochs[0].loss / 2
    assert history.last.macs is None


def test_two_runs_with_one_seed_agree_and_another_seed_differs(digits):
    models = [net(), net(), net()]
    for model, seed in zip(models, (3, 3, 4), strict=True):
        train(model, digits, recipe(epochs=1, seed=seed))
    assert_same(models[0], models[1])
    assert not torch.equal(models[0].head.weight, models[2].head.weight)


def test_the_rate_of_the_log_is_the_one_that_the_last_step_took(digits):
    """A run that moves on in its last step asks for another rate afterwards."""
    model, used = net(), []
    run = Halving().start(model, digits.example(), BUDGET)
    run.rate = lambda progress: 1.0 / (1 + run.steps)

    class Spy(type(run)):
        def step(self, *, progress, optimizer):
            used.append(optimizer.param_groups[0]["lr"])
            return super().step(progress=progress, optimizer=optimizer)

    run.__class__ = Spy
    history = train(model, digits, recipe(), run=run)
    assert [e.lr for e in history.epochs] == used[5::6]


def test_seeding_touches_the_generators_of_the_runs_device_alone(digits):
    model = net()
    with (
        mock.patch("torch.cuda.manual_seed_all") as every_gpu,
        mock.patch("torch.cuda._is_in_bad_fork", return_value=False),
    ):
        train(model, digits, recipe(epochs=1))
    every_gpu.assert_not_called()


def test_training_leaves_the_callers_random_numbers_alone(digits):
    model = net()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    expected = torch.rand(1).item(), np.random.rand(), random.random()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    train(model, digits, recipe(epochs=1))
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == expected


def test_a_process_sees_every_step_and_its_removal_reaches_optimiser_average_and_log(digits):
    model = net()
    run = Halving(at=0.4).start(model, digits.example(), BUDGET)
    history = train(model, digits, recipe(ema=0.9, optimizer="adamw", lr=0.01), run=run)
    assert run.steps == 4 * 6
    assert model.conv1.out_channels == 4 and model.conv2.weight.shape == (4, 4, 3, 3)
    assert [e.removals for e in history.epochs] == [0, 1, 0, 0]
    assert [e.remaining for e in history.epochs] == [1.0, 0.0, 0.0, 0.0]
    assert history.epochs[0].macs == run.dense.macs > history.last.macs
    assert history.last.accuracy == evaluate(run.finish(), digits.test_batches())["accuracy"]


@pytest.mark.parametrize("changes", [{"precision": "bf16", "channels_last": True}, {"precision": "fp16"}])
def test_reduced_precision_trains_without_losing_the_float_weights(digits, changes):
    model = net()
    history = train(model, digits, recipe(epochs=3, clip_norm=1.0, **changes))
    assert model.conv1.weight.dtype == torch.float32
    assert history.last.loss < history.epochs[0].loss
    tested = evaluate(model.to(memory_format=torch.contiguous_format), digits.test_batches())
    assert history.last.test_loss == pytest.approx(tested["loss"], rel=1e-5)  # in float32, as the network is shipped


def test_auxiliary_heads_are_trained_too(digits):
    class TwoHeads(Net):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(8, 10)

        def forward(self, x):
            x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))).mean((2, 3))
            return (self.head(x), self.extra(x)) if self.training else self.head(x)

    model = TwoHeads()
    before = model.extra.weight.detach().clone()
    train(model, digits, recipe(epochs=1, weight_decay=0.0))
    assert not torch.equal(before, model.extra.weight)


def test_gradient_clipping_bounds_the_first_step(digits):
    model, before = net(), net()
    train(
        model,
        dataclasses.replace(digits, train=digits.train[:32]),
        recipe(epochs=1, clip_norm=1e-3, momentum=0.0, nesterov=False, weight_decay=0.0, lr=1.0),
    )
    moved = [(a - b).detach().square().sum() for a, b in zip(model.parameters(), before.parameters(), strict=True)]
    assert 0 < float(sum(moved).sqrt()) <= 1.001e-3


def test_weight_decay_spares_biases_and_normalisation():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LayerNorm([4]), nn.Linear(4, 2))
    decayed, plain = make_optimizer(model, recipe(weight_decay=0.1)).param_groups
    assert {id(p) for p in decayed["params"]} == {id(model[0].weight), id(model[4].weight)}
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0
    assert len(plain["params"]) == 6


def test_the_rate_warms_up_and_falls_to_zero():
    plan = recipe(epochs=10, lr=1.0, warmup_epochs=2)
    rates = [learning_rate(plan, step, 5) for step in range(50)]
    assert rates[:3] == [0.1, 0.2, pytest.approx(0.3)] and rates[9] == rates[10] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(rates[10:])) and rates[-1] < 0.01
    assert learning_rate(recipe(schedule="constant"), 40, 5) == 0.05
    wsd = [learning_rate(recipe(schedule="wsd", epochs=4, warmup_epochs=0.0), step, 10) for step in range(41)]
    assert wsd[:21] == [0.05] * 21
    assert wsd[30] == pytest.approx(0.025)
    assert wsd[40] == pytest.approx(0.0)
    assert sorted(wsd, reverse=True) == wsd


# -- distillation and averaged weights


def test_distillation_is_zero_for_equal_logits_and_matches_its_formula():
    ours, theirs = torch.randn(5, 3), torch.randn(5, 3)
    assert distillation(ours, ours, 4.0).item() == pytest.approx(0.0, abs=1e-6)
    p, q = (theirs / 4).softmax(1), (ours / 4).softmax(1)
    assert distillation(ours, theirs, 4.0).item() == pytest.approx(16 * (p * (p / q).log()).sum(1).mean().item())


def test_a_teacher_changes_what_is_learned_unless_its_weight_is_zero(digits):
    teacher = net(width=12)
    trained = {}
    for weight in (None, 0.0, 1.0):
        trained[weight] = net()
        train(trained[weight], digits, recipe(epochs=1, distill=weight), teacher=teacher)
    alone = net()
    train(alone, digits, recipe(epochs=1))
    assert_same(alone, trained[0.0])
    assert not torch.equal(alone.head.weight, trained[None].head.weight)
    assert not torch.equal(trained[1.0].head.weight, trained[None].head.weight)
    with pytest.raises(ValueError, match="no trained network"):
        train(net(), digits, recipe(distill=0.5))


def test_a_teacher_is_given_back_as_it_was(digits):
    teacher = net(width=12).train()
    teacher.bn1.eval()
    before = copy.deepcopy(teacher)
    train(net(), digits, recipe(epochs=1, channels_last=True), teacher=teacher)
    assert [m.training for m in teacher.modules()] == [m.training for m in before.modules()]
    assert_same(teacher, before)
    assert teacher.conv2.weight.stride() == before.conv2.weight.stride()


def test_averaged_weights_are_cut_with_the_model():
    model = net()
    average = AveragedWeights(model, 0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    average.update(model)
    expected = average.shadow["conv2.weight"][:, [0, 2, 4, 6]][[0, 2, 4, 6]]
    graph = trace(model, torch.zeros(1, 1, 8, 8))
    kept = graph.kept({g.name: np.arange(0, g.size, 2) for g in graph.groups})
    carve(model, kept, group_width=graph.group_width)
    average.cut(kept, model)
    assert torch.equal(average.shadow["conv2.weight"], expected)
    raw = model.conv2.weight.detach().clone()
    average.swap(model)
    assert torch.equal(model.conv2.weight, expected)
    average.swap(model)
    assert torch.equal(model.conv2.weight, raw)


def test_a_module_of_averages_follows_removals_in_a_loop_of_ones_own():
    """As ``AveragedModel`` and the trainers that keep one average: a copy of the network, no shadows of ours."""
    model = net()
    run = es.attach(model, torch.zeros(1, 1, 8, 8), budget=es.Budget(macs=0.5), method=es.TCP())
    average = torch.optim.swa_utils.AveragedModel(model)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.add_(1.0)
    expected, removals = average.module.conv2.weight.detach().clone(), 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(40):
        removed = run.step(progress=(step + 1) / 40, optimizer=optimizer)
        if removed is not None:
            es.follow(average, model, removed)
            for dim, index in removed.kept.get("conv2.weight", {}).items():
                expected = expected.index_select(dim, torch.from_numpy(index))
            assert torch.equal(average.module.conv2.weight, expected)
            removals += 1
    assert removals > 0
    small = run.finish()
    es.follow(average, small)
    assert {n: p.shape for n, p in average.module.named_parameters()} == {
        n: p.shape for n, p in small.named_parameters()
    }
    average.update_parameters(small)


# -- resuming

SETTINGS = {
    "sgd": {},
    "adamw, average, clipping": {"optimizer": "adamw", "lr": 0.01, "ema": 0.9, "clip_norm": 1.0},
    "bf16, channels last": {"precision": "bf16", "channels_last": True, "label_smoothing": 0.1, "clip_norm": 1.0},
    "fp16": {"precision": "fp16", "warmup_epochs": 1.5},
}


@pytest.mark.parametrize(
    ("name", "killed"),
    [
        ("sgd", 1), ("sgd", 2), ("sgd", 3), ("adamw, average, clipping", 1), ("adamw, average, clipping", 2),
        ("bf16, channels last", 2), ("fp16", 3),
    ],
)  # fmt: skip
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(digits, tmp_path, name, killed):
    plan = recipe(**SETTINGS[name])
    path, example, teacher = tmp_path / "checkpoint.pt", digits.example(), net(width=12)
    whole = net()
    run = Halving(at=0.4).start(whole, example, BUDGET)
    expected = train(whole, digits, plan, run=run, teacher=teacher)

    first = net()
    run = Halving(at=0.4).start(first, example, BUDGET)
    with pytest.raises(Killed):
        train(first, digits, plan, run=run, teacher=teacher, checkpoint=path, on_epoch=killed_after(killed))
    second = rebuild_from_checkpoint(net(), path)
    run = Halving(at=0.4).start(second, example, BUDGET)
    torch.manual_seed(99)
    history = train(second, digits, plan, run=run, teacher=teacher, checkpoint=path, resume=True)

    assert_same(whole, second)
    assert without_seconds(history) == without_seconds(expected)
    assert run.limits["macs"] == run.dense.macs // 2, "fractions must refer to the first network"


def test_a_run_killed_inside_an_epoch_goes_on_from_the_last_whole_one(digits, tmp_path):
    def on_step(step):
        if (step.epoch, step.step) == (3, 4):
            raise Killed

    path, whole, second = tmp_path / "c.pt", net(), net()
    train(whole, digits, recipe())
    with pytest.raises(Killed):
        train(net(), digits, recipe(), checkpoint=path, on_step=on_step)
    assert read_checkpoint(path)["epoch"] == 2
    train(second, digits, recipe(), checkpoint=path, resume=True)
    assert_same(whole, second)


def test_plain_training_resumes_from_a_fresh_model(digits, tmp_path):
    path, whole, second = tmp_path / "c.pt", net(), net()
    train(whole, digits, recipe())
    with pytest.raises(Killed):
        train(net(), digits, recipe(), checkpoint=path, on_epoch=killed_after(2))
    train(second, digits, recipe(), checkpoint=path, resume=True)
    assert_same(whole, second)


def test_resuming_a_finished_run_gives_its_result(digits, tmp_path):
    path, first, second = tmp_path / "c.pt", net(), net()
    plan = recipe(epochs=2, ema=0.9)
    history = train(first, digits, plan, checkpoint=path)
    assert train(second, digits, plan, checkpoint=path, resume=True) == history
    assert_same(first, second)


def test_a_checkpoint_in_the_way_is_never_overwritten(digits, tmp_path):
    path = tmp_path / "c.pt"
    train(net(), digits, recipe(epochs=1), checkpoint=path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="already there"):
        train(net(), digits, recipe(epochs=1), checkpoint=path)
    with pytest.raises(ValueError, match=r"lr was 0.05 and is 0.1 now"):
        train(net(), digits, recipe(epochs=1, lr=0.1), checkpoint=path, resume=True)
    with pytest.raises(ValueError, match="teacher"):
        train(net(), digits, recipe(epochs=1), teacher=net(), checkpoint=path, resume=True)
    assert path.read_bytes() == before


def cut(model: nn.Module) -> nn.Module:
    """Half of its channels gone."""
    return Halving().start(model, torch.zeros(1, 1, 8, 8), BUDGET).finish()


@pytest.mark.parametrize("refused", ["lr", "dtype", "class", "trained parameters", "data"])
def test_a_refused_resume_leaves_the_model_as_it_was(digits, tmp_path, refused):
    path, model, data = tmp_path / "c.pt", net(), digits
    train(cut(net()), digits, recipe(epochs=1), checkpoint=path)
    if refused == "dtype":
        content = read_checkpoint(path)
        content["weights"]["head.weight"] = content["weights"]["head.weight"].double()
        write_checkpoint(path, content)
    if refused == "class":
        model.later = nn.Linear(2, 2)
    if refused == "trained parameters":
        model.requires_grad_(False)
    if refused == "data":
        data = dataclasses.replace(digits, train=digits.train[64:])
    before = copy.deepcopy(model)
    with pytest.raises(ValueError):
        train(model, data, recipe(epochs=1, lr=0.1 if refused == "lr" else 0.05), checkpoint=path, resume=True)
    assert_same(model, before)
    assert model.conv1.out_channels == 8


@pytest.mark.parametrize("wrong", ["shape of one weight", "format"])
def test_a_refused_rebuild_leaves_the_model_as_it_was(digits, tmp_path, wrong):
    path, model = tmp_path / "c.pt", net()
    train(cut(net()), digits, recipe(epochs=1), checkpoint=path)
    content = read_checkpoint(path)
    if wrong == "format":
        content["structure"]["format"] = "another"
    else:
        content["weights"]["head.bias"] = torch.zeros(3)
    write_checkpoint(path, content)
    with pytest.raises(ValueError, match=r"format 'another'|head.bias"):
        rebuild_from_checkpoint(model, path)
    assert_same(model, net())


CHANGES = {
    "training images": lambda d: {"train": d.train[:-1]},
    "test images": lambda d: {"test": d.test[:-1]},
    "held-out images": lambda d: {"holdout": d.test[:5]},
    "hash": lambda d: {"train": d.train[torch.arange(len(d.train)).flip(0)]},
    "hash ": lambda d: {"mean": (0.5,)},
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_run_goes_on_with_the_data_that_it_began_with_only(digits, tmp_path, what):
    path = tmp_path / "c.pt"
    train(net(), digits, recipe(epochs=1), checkpoint=path)
    other = dataclasses.replace(digits, **CHANGES[what](digits))
    with pytest.raises(ValueError, match=f"cannot resume: the data's {what.strip()} was .* and is .* now"):
        train(net(), other, recipe(epochs=1), checkpoint=path, resume=True)


def test_loaders_of_another_length_are_refused_on_resuming(tmp_path):
    path, batches = tmp_path / "c.pt", [(torch.randn(8, 1, 8, 8), torch.randint(10, (8,))) for _ in range(3)]
    train(net(), Loaders(batches, batches, num_classes=10), recipe(epochs=1), checkpoint=path)
    with pytest.raises(ValueError, match="the data's test batches was 3 and is 2 now"):
        train(net(), Loaders(batches, batches[1:], num_classes=10), recipe(epochs=1), checkpoint=path, resume=True)


def test_a_checkpoint_from_before_data_was_compared_is_resumed(digits, tmp_path):
    path, whole, second = tmp_path / "c.pt", net(), net()
    train(whole, digits, recipe())
    with pytest.raises(Killed):
        train(net(), digits, recipe(), checkpoint=path, on_epoch=killed_after(2))
    content = read_checkpoint(path)
    kept = ("batches in an epoch", "classes", "teacher's weights", "process")
    content["setting"] = {name: content["setting"][name] for name in kept}
    write_checkpoint(path, content)
    train(second, digits, recipe(), checkpoint=path, resume=True)
    assert_same(whole, second)


def test_a_process_on_the_wrong_structure_is_refused(digits, tmp_path):
    path, model = tmp_path / "c.pt", net()
    run = Halving(at=0.0).start(model, digits.example(), BUDGET)
    with pytest.raises(Killed):
        train(model, digits, recipe(), run=run, checkpoint=path, on_epoch=killed_after(1))
    fresh = net()
    run = Halving(at=0.0).start(fresh, digits.example(), BUDGET)
    with pytest.raises(ValueError, match="rebuild_from_checkpoint"):
        train(fresh, digits, recipe(), run=run, checkpoint=path, resume=True)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"hello"])
def test_a_damaged_checkpoint_is_named(digits, tmp_path, damage):
    path = tmp_path / "c.pt"
    train(net(), digits, recipe(epochs=1), checkpoint=path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        train(net(), digits, recipe(epochs=1), checkpoint=path, resume=True)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    write_checkpoint(path, {"epoch": 1})

    def full(content, target):
        raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="untouched"):
        write_checkpoint(path, {"epoch": 2})
    assert read_checkpoint(path)["epoch"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_a_checkpoint_holds_plain_values_only(tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint\['process'\]\['scores'\] is a ndarray"):
        write_checkpoint(tmp_path / "c.pt", {"process": {"scores": np.zeros(3)}})
    assert not list(tmp_path.iterdir())


# -- bad input


class Exploding(Net):
    """NaN from the given training step on."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.count = at, 0

    def forward(self, x):
        self.count += self.training
        return super().forward(x) * (float("nan") if self.count >= self.at else 1.0)


@pytest.mark.parametrize("at", [7, 10, 12])
def test_a_nan_loss_stops_at_its_step_and_the_last_good_checkpoint_stays(digits, tmp_path, at):
    path = tmp_path / "c.pt"
    with pytest.raises(TrainingDiverged, match=rf"epoch 2 at step {at - 6} of 6 \(run step {at}\).*epoch 1 is kept"):
        train(Exploding(at), digits, recipe(), checkpoint=path)
    content = read_checkpoint(path)
    assert content["epoch"] == 1
    assert all(t.isfinite().all() for t in content["weights"].values())


def test_a_test_loss_that_is_not_finite_stops_the_run_and_the_last_good_checkpoint_stays(digits, tmp_path):
    class Blind(Net):
        """NaN for the test images of the second epoch."""

        def forward(self, x):
            self.tested = getattr(self, "tested", 0) + (not self.training and len(x) == 60)
            return super().forward(x) * (1.0 if self.training or self.tested < 2 else float("nan"))

    path = tmp_path / "c.pt"
    with pytest.raises(TrainingDiverged, match=r"epoch 2 at step 6 of 6 .*the test loss is nan.*epoch 1 is kept"):
        train(Blind(), digits, recipe(), checkpoint=path)
    assert read_checkpoint(path)["epoch"] == 1


def test_a_method_that_stumbles_over_nan_is_not_blamed(digits):
    class Strict(Halving):
        def start(self, model, example, budget, *, batches=None):
            run = super().start(model, example, budget)

            def step(*, progress, optimizer):
                if not model.head.weight.isfinite().all():
                    raise ValueError("importance must be finite")

            run.step = step
            return run

    model = Exploding(3)
    run = Strict().start(model, digits.example(), BUDGET)
    with pytest.raises(TrainingDiverged, match="epoch 1 at step 3"):
        train(model, digits, recipe(), run=run)


def test_weights_that_are_not_finite_are_named_with_what_the_method_found(digits):
    class Names(Halving):
        def start(self, model, example, budget, *, batches=None):
            run = super().start(model, example, budget)

            def step(*, progress, optimizer):
                with torch.no_grad():
                    model.head.weight[0, 0] = float("inf")
                raise ValueError("layer 'head': its singular values are not finite")

            run.step = step
            return run

    model = net()
    with pytest.raises(TrainingDiverged, match=r"weights are not finite \(layer 'head': its singular"):
        train(model, digits, recipe(), run=Names().start(model, digits.example(), BUDGET))


def test_what_does_not_fit_is_said_before_training(digits):
    with pytest.raises(ValueError, match="7 logits for an image, the data has 10 classes"):
        train(net(classes=7), digits, recipe())
    with pytest.raises(ValueError, match=r"does not take the data's images \(1, 8, 8\)"):
        train(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), digits, recipe())
    with pytest.raises(ValueError, match="not logits"):
        train(nn.Conv2d(1, 10, 3), digits, recipe())
    with pytest.raises(ValueError, match=r"batch_size=512.*192 training images"):
        train(net(), digits, recipe(batch_size=512))
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        train(net().requires_grad_(False), digits, recipe())
    with pytest.raises(ValueError, match="cannot be used here"):
        train(net(), digits, recipe(device="nowhere"))


def test_own_loaders_are_trained_on_and_their_length_is_checked():
    batches = [(torch.randn(8, 1, 8, 8), torch.randint(10, (8,))) for _ in range(3)]

    class Liar(list):
        def __len__(self):
            return 5

    assert len(train(net(), Loaders(batches, batches, num_classes=10), recipe()).epochs) == 4
    with pytest.raises(ValueError, match="promised 5 batches in an epoch and gave 3"):
        train(net(), Loaders(Liar(batches), batches, num_classes=10), recipe())


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": -1},
        {"epochs": 2.5},
        {"epochs": True},
        {"batch_size": 0},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"lr": "fast"},
        {"momentum": 1.0},
        {"weight_decay": -1e-4},
        {"warmup_epochs": 4},
        {"schedule": "step"},
        {"optimizer": "lion"},
        {"precision": "int8"},
        {"label_smoothing": 1.0},
        {"ema": 1.0},
        {"distill": 1.5},
        {"temperature": 0.0},
        {"clip_norm": 0.0},
        {"seed": -1},
        {"device": ""},
        {"threads": 0},
        {"channels_last": 1},
        {"momentum": 0.0},
    ],
)
def test_a_wrong_recipe_names_the_field(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        recipe(**wrong)


def test_a_recipe_survives_a_round_trip_and_an_unknown_field_is_named():
    plan = recipe(ema=0.99, distill=0.3)
    assert Recipe.from_dict(plan.to_dict()) == plan
    assert "clip_norm" not in plan.to_dict()
    with pytest.raises(ValueError, match=r"'epoch'.*epochs"):
        Recipe.from_dict({"epoch": 3})


# -- evaluation


def test_accuracy_is_counted_exactly_whatever_the_batches(digits):
    model = net().train()
    found = [evaluate(model, digits.test_batches(size)) for size in (7, 60)]
    x, y = next(digits.test_batches(60))
    right = int((copy.deepcopy(model).eval()(x).argmax(1) == y).sum())
    assert found[0]["accuracy"] == found[1]["accuracy"] == 100 * right / 60
    assert found[0]["loss"] == pytest.approx(found[1]["loss"])
    assert model.training and model.bn1.training


def test_evaluation_leaves_a_frozen_layer_frozen(digits):
    model = net().train()
    model.bn1.eval()
    evaluate(model, digits.test_batches())
    assert model.training and not model.bn1.training


def test_nothing_to_evaluate_is_an_error():
    with pytest.raises(ValueError, match="no images"):
        evaluate(net(), [])


def test_recalibration_gives_the_average_of_the_batches(digits):
    model = net()
    batches = list(digits.calibration_batches(batch_size=48, batches=4))
    recalibrate_batchnorm(model, iter(batches), 4)
    means = torch.stack([model.conv1(x).mean((0, 2, 3)) for x, _ in batches])
    assert torch.allclose(model.bn1.running_mean, means.mean(0), atol=1e-6)
    assert model.bn1.momentum == 0.1 and model.training
    before = model.bn1.running_mean.clone()
    with pytest.raises(ValueError, match="no batches"):
        recalibrate_batchnorm(model, [], 4)
    assert torch.equal(before, model.bn1.running_mean)


# -- TensorBoard


def test_tensorboard_gets_every_number_of_every_epoch(digits, tmp_path):
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from espalier.run.loggers import Loggers

    history = train(net(), digits, recipe(epochs=2), on_epoch=Loggers("tensorboard", tmp_path))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {"loss", "accuracy", "lr"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("loss")] == [1, 2]
    assert events.Scalars("loss")[1].value == pytest.approx(history.last.loss)
