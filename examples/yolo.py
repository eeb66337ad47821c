"""Compress a YOLO inside ultralytics' own trainer: three callbacks, nothing of the trainer changes.

pip install '.[models,onnx]' ultralytics      # the network's definition is ultralytics', under ultralytics' licence
python examples/yolo.py --model yolov8n.pt --data coco8.yaml --epochs 100 --imgsz 640
"""

import argparse
from typing import Any

import torch

import espalier as es
from espalier.optional import import_torchvision

import_torchvision()  # as ultralytics does, also where PyPI's torchvision stands beside a CPU build of torch
from ultralytics import YOLO  # noqa: E402
from ultralytics.utils.torch_utils import ModelEMA  # noqa: E402


class Compression:
    """Channels go while ultralytics trains; its optimiser and its averaged weights follow."""

    def __init__(self, budget: es.Budget, method: es.Method) -> None:
        self.budget, self.method = budget, method

    def begin(self, trainer: Any) -> None:
        self.example = torch.zeros(1, 3, trainer.args.imgsz, trainer.args.imgsz, device=trainer.device)
        self.dense = es.cost(es.trace(trainer.model, self.example))
        self.run = es.attach(trainer.model, self.example, budget=self.budget, method=self.method)
        self.batches, self.steps = 0, trainer.ema.updates
        self.total = trainer.epochs * len(trainer.train_loader)
        self.follow(trainer)

    def after_batch(self, trainer: Any) -> None:
        self.batches += 1
        if trainer.ema.updates == self.steps:  # gradients were only accumulated
            return
        removed = self.run.step(progress=self.batches / self.total, optimizer=trainer.optimizer)
        if removed is not None:
            self.follow(trainer, removed)
        self.steps = trainer.ema.updates

    def after_epoch(self, trainer: Any) -> None:
        """Before the epoch is judged and saved; the last one finishes the network."""
        if trainer.epoch + 1 == trainer.epochs:
            self.small = self.run.finish()
            self.follow(trainer)

    def follow(self, trainer: Any, removed: Any = None) -> None:
        average = trainer.ema.ema
        es.follow(average, trainer.model, removed)
        trainer.ema = ModelEMA(average, updates=trainer.ema.updates)
        trainer.best_fitness = None  # best.pt shall be of this size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="yolov8n.yaml")
    parser.add_argument("--data", default="coco8.yaml")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--macs", type=float, default=0.5)
    arguments = parser.parse_args()

    compression = Compression(es.Budget(macs=arguments.macs, multiple_of=4), es.TCP())
    yolo = YOLO(arguments.model)
    yolo.add_callback("on_pretrain_routine_end", compression.begin)
    yolo.add_callback("on_train_batch_end", compression.after_batch)
    yolo.add_callback("on_train_epoch_end", compression.after_epoch)
    yolo.train(
        data=arguments.data,
        epochs=arguments.epochs,
        imgsz=arguments.imgsz,
        batch=arguments.batch,
        patience=0,  # stopping early would end above the budget
        plots=False,
        project="runs",
    )

    last = YOLO(yolo.trainer.last).model.float().eval()  # an ordinary file of ultralytics, of a smaller network
    example = compression.example.cpu()
    share = es.cost(es.trace(last, example)).fraction_of(compression.dense)
    print(f"{share['macs']:.1%} of the dense MACs, {share['params']:.1%} of the parameters")
    es.export_onnx(last, "small.onnx", example)


if __name__ == "__main__":
    main()
