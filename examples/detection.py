"""Compress a detector of torchvision, judged by COCO's mean average precision.

pip install '.[models,detection]'
python examples/detection.py --epochs 20

The network is torchvision's FCOS on a small backbone of one's own; any of torchvision's detectors goes the same way:
``torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights_backbone=None, num_classes=2)``, for example.
"""

import argparse

import torch
from torch import Tensor, nn

import espalier as es
from espalier.optional import import_torchvision

import_torchvision()
from torchvision.models.detection import FCOS  # noqa: E402
from torchvision.models.detection.anchor_utils import AnchorGenerator  # noqa: E402

SIDE = 64


def detector() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((3, 16, 2), (16, 32, 2), (32, 32, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    backbone = nn.Sequential(*layers)
    backbone.out_channels = 32
    anchors = AnchorGenerator(sizes=((8,),), aspect_ratios=((1.0,),))
    return FCOS(backbone, num_classes=2, anchor_generator=anchors, min_size=SIDE, max_size=SIDE, topk_candidates=50)


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
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--macs", type=float, default=0.5)
    parser.add_argument("--by-loss", action="store_true", help="judge by the loss, which needs no pycocotools")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    train, test = squares(arguments.images, SIDE, seed=0), squares(max(arguments.images // 8, 1), SIDE, seed=1)
    result = es.compress(
        detector(),
        es.Loaders(batches(train, 8), batches(test, 8)),
        budget=es.Budget(macs=arguments.macs, multiple_of=4),
        task=es.Detection(by_loss=arguments.by_loss),
        recipe=es.Recipe(epochs=arguments.epochs, lr=0.01, clip_norm=5.0),
    )
    print(result)
    es.save(result.model, "small.safetensors")


if __name__ == "__main__":
    main()
