"""Compress a network inside Lightning: one callback, nothing else changes.

pip install '.[lightning]'
python examples/lightning_loop.py --epochs 10
"""

import argparse

import espalier as es
from espalier.optional import import_lightning

L = import_lightning()  # as ``import lightning as L``, also where PyPI's torchvision stands beside a CPU build of torch

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402


class Classifier(L.LightningModule):
    """A classifier as anybody writes it."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.model(images), labels)
        self.log("loss", loss)
        return loss


class Batches(torch.utils.data.IterableDataset):
    """The digits, one epoch per pass."""

    def __init__(self, data: object) -> None:
        self.data = data
        self.epoch = -1

    def __len__(self) -> int:
        return self.data.steps(64)

    def __iter__(self):
        self.epoch += 1
        return self.data.train_batches(batch_size=64, epoch=self.epoch, seed=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--macs", type=float, default=0.5)
    arguments = parser.parse_args()

    L.seed_everything(0)
    data = es.load_data("digits")
    model = es.build_model("resnet20", num_classes=10, in_channels=1, image_size=8)
    example = data.example()
    dense = es.cost(es.trace(model, example))
    compression = es.lightning.Compression(es.Budget(macs=arguments.macs), es.TCP(), network="model", example=example)
    trainer = L.Trainer(
        max_epochs=arguments.epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[compression],
    )
    trainer.fit(Classifier(model), torch.utils.data.DataLoader(Batches(data), batch_size=None))
    small = compression.small.eval()

    share = es.cost(es.trace(small, example)).fraction_of(dense)
    print(f"{share['macs']:.1%} of the dense MACs, {share['params']:.1%} of the parameters")
    es.save(small, "small.safetensors")


if __name__ == "__main__":
    main()
