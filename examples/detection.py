"""Compress a detector of torchvision, judged by COCO's mean average precision.

pip install '.[models,detection,onnx]'
python examples/detection.py --model ssdlite320_mobilenet_v3_large --epochs 10
"""

import argparse

import torch
from torch import Tensor

import espalier as es
from espalier.optional import import_torchvision

import_torchvision()
from torchvision.models import detection  # noqa: E402


def squares(images: int, side: int, seed: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """One bright square on noise, as torchvision's detectors take them."""
    random = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(images):
        size = int(torch.randint(side // 4, side // 2, (), generator=random))
        x, y = torch.randint(side - size, (2,), generator=random).tolist()
        image = 0.2 * torch.rand(3, side, side, generator=random)
        image[:, y : y + size, x : x + size] += 0.7
        boxes = torch.tensor([[x, y, x + size, y + size]], dtype=torch.float32)
        found.append((image, {"boxes": boxes, "labels": torch.ones(1, dtype=torch.int64)}))
    return found


def batches(images: list, size: int) -> list:
    return [tuple(zip(*images[i : i + size], strict=True)) for i in range(0, len(images), size)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ssdlite320_mobilenet_v3_large")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--macs", type=float, default=0.5)
    parser.add_argument("--by-loss", action="store_true", help="Judge by the loss, which needs no pycocotools.")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = getattr(detection, arguments.model)(weights=None, weights_backbone=None, num_classes=2)
    train, test = squares(arguments.images, 320, seed=0), squares(max(arguments.images // 4, 1), 320, seed=1)
    data = es.Loaders(batches(train, 8), batches(test, 8))
    result = es.compress(
        model,
        data,
        budget=es.Budget(macs=arguments.macs),
        task=es.Detection(by_loss=arguments.by_loss),
        recipe=es.Recipe(epochs=arguments.epochs, lr=0.01, clip_norm=5.0),
    )
    print(result)
    es.save(result.model, "small.safetensors")


if __name__ == "__main__":
    main()
