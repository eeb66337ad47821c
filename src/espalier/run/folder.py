"""A folder of images, one sub-folder per class, decoded as they are needed."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from espalier.run.batches import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Batch,
    Normalise,
    epoch_generator,
    full_batches,
    stratified_order,
)
from espalier.run.optional import import_optional
from espalier.run.preprocessing import Preprocessing

IMAGE_ENDINGS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_MANY = 2000  # images from which worker processes are worth their start

Files = tuple[tuple[Path, int], ...]
"""Image files with their labels."""


@dataclass(frozen=True, eq=False)
class FolderData:
    """Images in ``PATH/train/CLASS`` and ``PATH/val/CLASS`` (or ``test``), three channels, square.

    Training images are cut by a random area of 8 to 100 % and aspect 3/4 to 4/3, resized and mirrored at
    random; test images are resized to 8/7 of the size and cut from the centre. Each image's draw depends on
    seed, epoch and its place in the list alone, not on the number of ``workers`` that decode. Implements
    :class:`Source`.
    """

    name: str
    classes: tuple[str, ...]
    image_size: int
    train: Files
    test: Files
    holdout: Files = ()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    workers: int = 0
    in_channels: int = 3
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def has_holdout(self) -> bool:
        return bool(self.holdout)

    @property
    def preprocessing(self) -> Preprocessing:
        """What turns a picture into an input of a network that was trained on this."""
        return Preprocessing(
            channels=self.in_channels,
            height=self.image_size,
            width=self.image_size,
            levels=255,
            mean=tuple(map(float, self.mean)),
            std=tuple(map(float, self.std)),
            resize="the central square of 7/8 of the shorter side, bilinear",
            classes=self.classes,
        )

    def steps(self, batch_size: int) -> int:
        return full_batches(len(self.train), batch_size)

    def train_batches(self, *, batch_size: int, epoch: int, seed: int, channels_last: bool = False) -> Iterator[Batch]:
        steps = self.steps(batch_size)
        order = torch.randperm(len(self.train), generator=epoch_generator(seed, epoch)).tolist()
        files = _Files(self.train, self.image_size, draw=(seed, epoch))
        return self._batches(files, order[: steps * batch_size], batch_size, channels_last)

    def test_batches(self, batch_size: int = 500, *, channels_last: bool = False) -> Iterator[Batch]:
        return self._in_order(self.test, batch_size, channels_last)

    def holdout_batches(self, batch_size: int = 500, *, channels_last: bool = False) -> Iterator[Batch]:
        if not self.holdout:
            raise ValueError(f"{self.name}: no images are held out; load_data(..., holdout=N) sets some aside")
        return self._in_order(self.holdout, batch_size, channels_last)

    def calibration_batches(
        self, *, batch_size: int, batches: int, seed: int = 0, channels_last: bool = False
    ) -> Iterator[Batch]:
        order = torch.randperm(len(self.train), generator=epoch_generator(seed, 0)).tolist()
        files = _Files(self.train, self.image_size)
        return self._batches(files, order[: batches * batch_size], batch_size, channels_last)

    def example(self, batch: int = 1) -> Tensor:
        files = _Files(self.train, self.image_size)
        return next(self._batches(files, [i % len(self.train) for i in range(batch)], batch, False))[0]

    def _in_order(self, files: Files, batch_size: int, channels_last: bool) -> Iterator[Batch]:
        return self._batches(_Files(files, self.image_size), range(len(files)), batch_size, channels_last)

    def _batches(self, files: "_Files", order: Any, batch_size: int, channels_last: bool) -> Iterator[Batch]:
        loader = DataLoader(
            files,
            batch_size=batch_size,
            sampler=order,
            num_workers=self.workers,
            collate_fn=_collate,
            generator=torch.Generator().manual_seed(0),  # else it would draw from the global one
        )
        normalise = Normalise(self.mean, self.std, levels=255, device=self.device)
        for images, labels in loader:
            if isinstance(images, str):
                raise ValueError(images)
            x = normalise(images.to(self.device), channels_last=channels_last)
            yield x, labels.to(self.device)


class _Files(Dataset):
    """Decodes image ``i`` to uint8 ``(3, size, size)``; cut at random if ``draw`` gives (seed, epoch)."""

    def __init__(self, files: Files, size: int, *, draw: tuple[int, int] | None = None) -> None:
        self.files = files
        self.size = size
        self.draw = draw

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor | str, int]:
        path, label = self.files[index]
        try:
            with self._pil.open(path) as opened:
                picture = opened.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            # Returned, not raised: from a worker process the message would arrive inside a traceback.
            return f"{path} cannot be decoded: truncated, or not an image ({error})", label
        if self.draw is None:
            pixels = self._central(picture)
        else:
            pixels = self._random(picture, np.random.default_rng([*self.draw, index]))
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1), label

    @cached_property
    def _pil(self) -> Any:
        return import_optional("PIL.Image", extra="data")

    def _central(self, picture: Any) -> np.ndarray:
        """The central square, so that the shorter side is 8/7 of the size before the cut."""
        side = min(picture.size) * 7 / 8
        left, top = ((length - side) / 2 for length in picture.size)
        return self._cut(picture, (left, top, left + side, top + side))

    def _random(self, picture: Any, random: np.random.Generator) -> np.ndarray:
        width, height = picture.size
        box: tuple[float, float, float, float] = (0, 0, width, height)
        for _ in range(10):
            area = random.uniform(0.08, 1.0) * width * height
            aspect = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
            w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                left, top = random.integers(width - w + 1), random.integers(height - h + 1)
                box = (left, top, left + w, top + h)
                break
        pixels = self._cut(picture, box)
        return pixels[:, ::-1] if random.random() < 0.5 else pixels

    def _cut(self, picture: Any, box: tuple[float, float, float, float]) -> np.ndarray:
        return np.asarray(picture.resize((self.size, self.size), self._pil.Resampling.BILINEAR, box=box))


def _collate(items: list[tuple[Tensor | str, int]]) -> tuple[Tensor | str, Tensor]:
    labels = torch.tensor([label for _, label in items])
    for image, _ in items:
        if isinstance(image, str):
            return image, labels
    return torch.stack([image for image, _ in items if isinstance(image, Tensor)]), labels


def read_folder(path: Path, *, image_size: int, holdout: int = 0, device: str | torch.device = "cpu") -> FolderData:
    """List the images of ``path``; nothing is decoded yet.

    Raises: ValueError if ``path``, ``train`` or both of ``val`` and ``test`` are absent, if a class has no
    images, or if the test folder has a class that the training folder lacks.
    """
    import_optional("PIL.Image", extra="data")
    if not path.is_dir():
        raise ValueError(f"imagefolder: there is no folder {path}")
    tests = [path / name for name in ("val", "test") if (path / name).is_dir()]
    if not (path / "train").is_dir() or not tests:
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise ValueError(f"{path} needs the folders train and val (or test), one sub-folder per class; it has {found}")
    classes = tuple(sorted(entry.name for entry in (path / "train").iterdir() if entry.is_dir()))
    train = _list_files(path / "train", classes)
    strangers = sorted(entry.name for entry in tests[0].iterdir() if entry.is_dir() and entry.name not in classes)
    if strangers:
        raise ValueError(f"{tests[0]} has classes that {path / 'train'} lacks: {', '.join(strangers[:8])}")
    test = _list_files(tests[0], tuple(name for name in classes if (tests[0] / name).is_dir()), known=classes)
    labels = np.array([label for _, label in train])
    kept, aside = stratified_order(labels, holdout, seed=0)
    many = len(train) >= _MANY
    return FolderData(
        name=f"imagefolder:{path}",
        classes=classes,
        image_size=image_size,
        train=tuple(train[i] for i in kept),
        test=test,
        holdout=tuple(train[i] for i in aside),
        device=torch.device(device),
        workers=min(8, (os.cpu_count() or 1) - 1) if many else 0,
    )


def _list_files(folder: Path, classes: tuple[str, ...], *, known: tuple[str, ...] | None = None) -> Files:
    if not classes:
        raise ValueError(f"{folder} has no sub-folders; images belong into one sub-folder per class")
    found: list[tuple[Path, int]] = []
    for name in classes:
        images = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in IMAGE_ENDINGS)
        if not images:
            raise ValueError(f"{folder / name} has no images ({', '.join(IMAGE_ENDINGS)})")
        found += [(image, (known or classes).index(name)) for image in images]
    return tuple(found)
