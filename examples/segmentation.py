"""Compress a segmentation network: a U-Net of one's own, judged by its mean IoU.

python examples/segmentation.py --epochs 10
"""

import argparse

import torch
from torch import Tensor, nn

import espalier as es


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, stride=stride, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class UNet(nn.Module):
    """Twice down, twice up, with skips between."""

    def __init__(self, classes: int, width: int = 16) -> None:
        super().__init__()
        self.enter = block(3, width)
        self.down1, self.down2 = block(width, 2 * width, stride=2), block(2 * width, 4 * width, stride=2)
        self.up2, self.up1 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2), nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.mix2, self.mix1 = block(4 * width, 2 * width), block(2 * width, width)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.enter(x)
        middle = self.down1(fine)
        found = self.mix2(torch.cat([middle, self.up2(self.down2(middle))], 1))
        return self.head(self.mix1(torch.cat([fine, self.up1(found)], 1)))


def shapes(images: int, side: int, seed: int) -> tuple[Tensor, Tensor]:
    """A bright square and a disc on noise; every pixel is of class 0 (neither), 1 or 2."""
    random = torch.Generator().manual_seed(seed)
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    x, y = (
        0.3 * torch.randn(images, 3, side, side, generator=random),
        torch.zeros(images, side, side, dtype=torch.int64),
    )
    for image, labels in zip(x, y, strict=True):
        (top, left), (down, right) = torch.randint(side // 4, 3 * side // 4, (2, 2), generator=random).tolist()
        square = ((row - top).abs() < side // 6) & ((column - left).abs() < side // 6)
        disc = (row - down) ** 2 + (column - right) ** 2 < (side // 6) ** 2
        labels[square], labels[disc] = 1, 2
        image[0, square] += 1
        image[1, disc] += 1
    return x, y


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--macs", type=float, default=0.5)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    train = torch.utils.data.TensorDataset(*shapes(arguments.images, 32, seed=0))
    test = torch.utils.data.TensorDataset(*shapes(64, 32, seed=1))
    data = es.Loaders(  # no num_classes: the task knows what is in a batch
        torch.utils.data.DataLoader(train, batch_size=16, shuffle=True),
        torch.utils.data.DataLoader(test, batch_size=32),
    )
    result = es.compress(
        UNet(classes=3),
        data,
        budget=es.Budget(macs=arguments.macs, multiple_of=4),
        task=es.Segmentation(classes=3),
        recipe=es.Recipe(epochs=arguments.epochs),
    )
    print(result)
    es.save(result.model, "small.safetensors")


if __name__ == "__main__":
    main()
