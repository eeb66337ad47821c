"""Compress a network inside Lightning: the process lives in the module, its step follows the optimiser's.

pip install lightning
python examples/lightning_loop.py --epochs 10
"""

import argparse

import lightning as L
import torch
import torch.nn.functional as F

import espalier as es


class Compressed(L.LightningModule):
    """A classifier that shrinks while it trains."""

    def __init__(self, model: torch.nn.Module, example: torch.Tensor, *, macs: float, steps: int) -> None:
        super().__init__()
        self.automatic_optimization = False  # the step must come right after the optimiser's
        self.run = es.attach(model, example, budget=es.Budget(macs=macs), method=es.TCP())
        self.model = self.run.model
        self.steps = steps
        self.done = 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> None:
        images, labels = batch
        optimizer = self.optimizers()
        loss = F.cross_entropy(self.model(images), labels) + self.run.penalty()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.done += 1
        self.run.step(progress=self.done / self.steps, optimizer=optimizer.optimizer)
        self.log("loss", loss)


class Batches(torch.utils.data.IterableDataset):
    """The digits, one epoch per pass."""

    def __init__(self, data: object) -> None:
        self.data = data
        self.epoch = -1

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
    module = Compressed(model, example, macs=arguments.macs, steps=arguments.epochs * data.steps(64))
    trainer = L.Trainer(
        max_epochs=arguments.epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(Batches(data), batch_size=None))
    small = module.run.finish().eval()

    share = es.cost(es.trace(small, example)).fraction_of(dense)
    print(f"{share['macs']:.1%} of the dense MACs, {share['params']:.1%} of the parameters")
    es.save(small, "small.safetensors")


if __name__ == "__main__":
    main()
