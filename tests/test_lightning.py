"""Compression as a callback of Lightning: nothing in the module changes, checkpoints go on exactly."""

from functools import cache
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import espalier as es
from espalier.optional import import_lightning

if not any(find_spec(name) for name in ("lightning", "pytorch_lightning")):
    pytest.skip("without lightning", allow_module_level=True)

torch.manual_seed(0)
BATCHES = [(torch.randn(8, 3, 8, 8), torch.randint(4, (8,))) for _ in range(10)]
EXAMPLE = torch.zeros(1, 3, 8, 8)


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


@cache
def lightning():
    """Its classes and ours on them; every worker collects this file, and the import takes seconds."""
    L = import_lightning()

    class Module(L.LightningModule):
        def __init__(self, early: bool = False) -> None:
            super().__init__()
            self.net = net()
            self.early = torch.optim.SGD(self.net.parameters(), lr=0.05) if early else None

        def training_step(self, batch, index):
            x, y = batch
            return F.cross_entropy(self.net(x), y)

        def configure_optimizers(self):
            return self.early or torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    class Stop(L.Callback):
        """A kill after so many epochs, when the checkpoint is written."""

        def __init__(self, epochs, path):
            self.epochs, self.path = epochs, path

        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch + 1 == self.epochs:
                trainer.save_checkpoint(self.path)

    return SimpleNamespace(Module=Module, Stop=Stop, Trainer=L.Trainer)


def trained(module, compression, *extra, epochs=6, path=None, **options):
    trainer = lightning().Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[compression, *extra], **options,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(BATCHES, batch_size=None), ckpt_path=path)
    return compression


METHODS = [es.TCP(), es.DPRP(), es.MGP()]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_the_budget_is_met_and_the_plan_gives_the_same_network(method):
    module = lightning().Module()
    found = trained(module, es.lightning.Compression(es.Budget(macs=0.5), method, network="net", example=EXAMPLE))
    dense = es.cost(es.trace(net(), EXAMPLE, rehearse=False))
    small = es.cost(es.trace(found.small, EXAMPLE, rehearse=False))
    assert 0.3 * dense.macs < small.macs <= 0.5 * dense.macs
    assert module.net is found.small
    assert not found.run.forced


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_a_checkpoint_goes_on_exactly(method, tmp_path):
    def compression():
        return es.lightning.Compression(es.Budget(macs=0.5), method, network="net", example=EXAMPLE)

    file = tmp_path / "half.ckpt"
    whole = trained(lightning().Module(), compression(), lightning().Stop(4, file))
    again = trained(lightning().Module(), compression(), path=file)
    assert es.cost(es.trace(again.small, EXAMPLE, rehearse=False)) == es.cost(
        es.trace(whole.small, EXAMPLE, rehearse=False)
    )
    ours, theirs = whole.small.state_dict(), again.small.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert again.plan.to_json() == whole.plan.to_json()


def test_accumulated_gradients_count_as_one_step():
    module = lightning().Module()
    found = trained(
        module,
        es.lightning.Compression(es.Budget(macs=0.5), es.TCP(), network="net", example=EXAMPLE),
        accumulate_grad_batches=2,
        epochs=12,
    )
    assert not found.run.forced
    assert (
        es.cost(es.trace(found.small, EXAMPLE, rehearse=False)).macs
        <= 0.5 * es.cost(es.trace(net(), EXAMPLE, rehearse=False)).macs
    )


def test_the_penalty_reaches_the_gradients_as_if_it_were_in_the_loss():
    from espalier.trainers.attached import add_penalty

    x, y = BATCHES[0]
    grads = []
    for inside in (True, False):
        run = es.attach(net(), EXAMPLE, budget=es.Budget(params=0.5), method=es.DPRP(start_at=0.0, every=0.02))
        optimizer = torch.optim.SGD(run.model.parameters(), lr=0.0)
        for step in range(30):  # until layers are trained as factors, and it is the turn of one of them
            run.step(progress=(step + 1) / 60, optimizer=optimizer)
            if run.penalty() > 0:
                break
        assert run.penalty() > 0
        loss = F.cross_entropy(run.model(x), y)
        penalty = run.penalty() if inside else 0.0
        (loss + penalty).backward()
        if not inside:
            add_penalty(run)
        grads.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in run.model.parameters()])
    assert len(grads[0]) == len(grads[1])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("options", "early", "words"),
    [
        ({"network": "model"}, False, r"Compression\(network='model'\): the module has no such network; it holds net"),
        ({"network": "net", "example": None}, False, "give example="),
        ({"network": "net", "method": es.DPRP()}, True, "the optimiser does not hold all parameters"),
    ],
)
def test_what_does_not_fit_is_said_before_training(options, early, words):
    settings = {"method": es.TCP(), "example": EXAMPLE, **options}
    method = settings.pop("method")
    with pytest.raises(ValueError, match=words):
        trained(lightning().Module(early), es.lightning.Compression(es.Budget(macs=0.5), method, **settings))


def test_a_checkpoint_of_another_trainer_is_refused(tmp_path):
    file = tmp_path / "plain.ckpt"
    trained(lightning().Module(), lightning().Stop(1, file), epochs=1)
    with pytest.raises(ValueError, match="not written with the callback Compression"):
        trained(
            lightning().Module(),
            es.lightning.Compression(es.Budget(macs=0.5), es.TCP(), network="net", example=EXAMPLE),
            path=file,
        )
