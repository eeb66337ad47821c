"""Compression as a callback of Hugging Face's Trainer: nothing else changes, checkpoints go on exactly.

Runs where transformers and accelerate are installed (``pip install '.[huggingface]'``).
"""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import espalier as es
from espalier.optional import import_transformers

if not all(
    find_spec(name) for name in ("transformers", "accelerate")
):  # importing one of them alone would take seconds
    pytest.skip("without transformers and accelerate", allow_module_level=True)
hf = import_transformers()

torch.manual_seed(0)
IMAGES = [{"pixel_values": torch.randn(3, 8, 8), "labels": n % 4} for n in range(80)]
EXAMPLE = {"pixel_values": torch.zeros(1, 3, 8, 8)}
METHODS = [es.TCP(), es.DPRP(), es.TTLC(iterations=3, search=0)]


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
        )  # fmt: skip

    def forward(self, pixel_values, labels=None):
        logits = self.layers(pixel_values)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def net():
    torch.manual_seed(1)
    return Network()


def trained(method, folder, *, resume=None, callback=None, **options):
    arguments = hf.TrainingArguments(
        output_dir=str(folder), max_steps=40, per_device_train_batch_size=8, learning_rate=0.01, optim="sgd", save_steps=20,
        report_to=[], disable_tqdm=True, use_cpu=True, logging_steps=1000, resume_from_checkpoint=resume, **options,
    )  # fmt: skip
    compression = callback or es.huggingface.Compression(es.Budget(macs=0.5), method, example=EXAMPLE)
    trainer = hf.Trainer(net(), arguments, train_dataset=IMAGES, callbacks=[compression])
    trainer.train(resume_from_checkpoint=resume)
    return compression, trainer.model


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_the_budget_is_met_in_place_and_a_checkpoint_goes_on_exactly(method, tmp_path):
    found, model = trained(method, tmp_path)
    assert model is found.small
    assert (
        es.cost(es.trace(found.small, EXAMPLE, rehearse=False)).macs
        <= 0.5 * es.cost(es.trace(net(), EXAMPLE, rehearse=False)).macs
    )
    assert not found.run.forced
    again, _ = trained(method, tmp_path / "again", resume=str(tmp_path / "checkpoint-20"))
    assert again.plan.to_json() == found.plan.to_json()
    ours, theirs = found.small.state_dict(), again.small.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_does_not_fit_is_said_before_training(tmp_path):
    with pytest.raises(ValueError, match="was written without the callback Compression"):
        trained(es.TCP(), tmp_path, resume=str(tmp_path / "checkpoint-20"))
    with pytest.raises(ValueError, match="with fp16 give max_grad_norm"):
        compression = es.huggingface.Compression(es.Budget(macs=0.5), es.TCP(), example=EXAMPLE)
        arguments = hf.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, max_grad_norm=0.0)
        arguments.fp16 = True
        hf.Trainer(net(), arguments, callbacks=[compression])
    with pytest.raises(ValueError, match=r"in several train with es\.lightning"):
        two = SimpleNamespace(world_size=2, n_gpu=0)
        es.huggingface.Compression(None, es.TCP(), example=EXAMPLE).on_init_end(two, None, None, model=net())
