"""A folder of images, one sub-folder per class, decoded as they are needed.

What happens between a file and an input is ``Images``, settings that a user gives, and torchvision's transforms carry it out.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from espalier.methods.agreement import ALONE, Share
from espalier.optional import import_optional, import_torchvision
from espalier.run.batches import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Batch,
    Normalise,
    epoch_generator,
    epoch_seed,
    full_batches,
    stratified_order,
)
from espalier.run.preprocessing import Preprocessing
from espalier.settings import Settings, described

IMAGE_ENDINGS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_MANY = (
    2000  # images from which worker processes are worth their start, and at most so many are looked at before training
)

Files = tuple[tuple[Path, int], ...]
"""Image files with their labels."""


@dataclass(frozen=True)
class Images(Settings):
    """How the pictures of ``imagefolder:PATH`` become inputs."""

    image_size: Annotated[
        int | None,
        described("Side of the square inputs; default: that of the files if all are alike, else 224", ge=1, le=10_000),
    ] = None
    resize: Annotated[
        int | None,
        described(
            "Shorter side before the central cut; default 8/7 of the input, or none where files have its size", ge=1
        ),
    ] = None
    augment: Annotated[
        Literal["none", "flip", "crop", "randaugment"],
        described("Of training images: none, flip, crop (8 to 100 % of the area, and flip) or randaugment (all of it)"),
    ] = "crop"
    mean: Annotated[
        str,
        described(
            "Per channel, of pixels from 0 to 1: imagenet, measured (on training images), or numbers: 0.5,0.5,0.5"
        ),
    ] = "imagenet"
    std: Annotated[str, described("Likewise")] = "imagenet"
    grey: Annotated[bool, described("Read one channel, not three")] = False
    train_split: Annotated[str, described("Folder of training images", min_length=1)] = "train"
    test_split: Annotated[
        str | None, described("Folder of test images; default val, or else test, valid or validation", min_length=1)
    ] = None

    @property
    def channels(self) -> int:
        """Of an input."""
        return 1 if self.grey else 3

    def constants(self, name: str, measured: tuple[float, ...] | None) -> tuple[float, ...]:
        """``mean`` or ``std`` as numbers, one for each channel.  Raises: ValueError for text that is none of the three."""
        text = getattr(self, name)
        if text == "imagenet":
            usual = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}[name]
            return (sum(usual) / 3,) if self.grey else usual
        if text == "measured":
            assert measured is not None
            return measured
        try:
            numbers = tuple(float(part) for part in text.split(","))
        except ValueError:
            numbers = ()
        if len(numbers) == 1:
            numbers *= self.channels
        if len(numbers) != self.channels or not all(np.isfinite(numbers)) or (name == "std" and min(numbers) <= 0):
            raise ValueError(
                f"Images({name}={text!r}): must be imagenet, measured, or {self.channels} number{'s' if not self.grey else ''}"
                f"{', above 0' if name == 'std' else ''}, for example {','.join(['0.5'] * self.channels)}"
            )
        if max(numbers) > 1:
            raise ValueError(
                f"Images({name}={text!r}): is of pixels from 0 to 1; where they go up to 255, divide by 255"
            )
        return numbers


@dataclass(frozen=True, eq=False)
class FolderData:
    """Images in ``PATH/train/CLASS`` and ``PATH/val/CLASS``, square inputs.

    Test images are resized so that their shorter side is ``resize``, and cut from the centre. Each training image's draw
    depends on seed, epoch and its place in the list alone, not on the number of ``workers`` that decode. Implements
    :class:`Source`.
    """

    name: str
    classes: tuple[str, ...]
    image_size: int
    resize: int
    train: Files
    test: Files
    holdout: Files = ()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    workers: int = 0
    in_channels: int = 3
    augment: str = "crop"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    share: Share = ALONE  # of every training batch
    told: str = ""  # what was found in the files, in a sentence

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
            resize=f"shorter side to {self.resize}, bilinear; then the central {self.image_size}x{self.image_size}",
            classes=self.classes,
        )

    def steps(self, batch_size: int) -> int:
        return full_batches(len(self.train), batch_size)

    def train_batches(self, *, batch_size: int, epoch: int, seed: int, channels_last: bool = False) -> Iterator[Batch]:
        steps = self.steps(batch_size)
        order = torch.randperm(len(self.train), generator=epoch_generator(seed, epoch)).tolist()
        files = self._files(self.train, draw=epoch_seed(seed, epoch))
        mine = self.share.among(min(len(order), steps * batch_size), steps)
        return self._batches(files, [order[i] for i in mine], len(mine) // steps, channels_last)

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
        return self._batches(self._files(self.train), order[: batches * batch_size], batch_size, channels_last)

    def example(self, batch: int = 1) -> Tensor:
        order = [i % len(self.train) for i in range(batch)]
        return next(self._batches(self._files(self.train), order, batch, False))[0]

    def _files(self, files: Files, *, draw: int | None = None) -> "_Files":
        return _Files(files, self.image_size, self.resize, self.in_channels, self.augment, draw)

    def _in_order(self, files: Files, batch_size: int, channels_last: bool) -> Iterator[Batch]:
        return self._batches(self._files(files), range(len(files)), batch_size, channels_last)

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


Steps = list[tuple[str, dict[str, Any]]]
"""Names of torchvision's transforms with their arguments."""


@dataclass(frozen=True)
class _Files(Dataset):
    """Decodes image ``i`` to uint8 ``(channels, size, size)``; augmented if there is a ``draw``, the seed of an epoch."""

    files: Files
    size: int
    resize: int
    channels: int
    augment: str
    draw: int | None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor | str, int]:
        path, label = self.files[index]
        try:
            with self._pil.open(path) as opened:
                picture = _eight_bits(opened).convert("L" if self.channels == 1 else "RGB")
        except _OutOfRange as error:
            return f"{path}: {error}", label
        except (OSError, SyntaxError, ValueError) as error:
            # Returned, not raised: from a worker process the message would arrive inside a traceback.
            return f"{path} cannot be decoded: truncated, or not an image ({error})", label
        if self.draw is None:
            return self._central(picture), label
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.manual_seed(epoch_seed(self.draw, index))
            return self._augmented(picture), label

    @cached_property
    def _pil(self) -> Any:
        return import_optional("PIL.Image", extra="data")

    @cached_property
    def _central(self) -> Any:
        return _transform(self._steps("none"))

    @cached_property
    def _augmented(self) -> Any:
        return _transform(self._steps(self.augment))

    def _steps(self, augment: str) -> Steps:
        whole: Steps = [("Resize", {"size": self.resize}), ("CenterCrop", {"size": self.size})]
        flip: Steps = [("RandomHorizontalFlip", {})]
        cut: Steps = [("RandomResizedCrop", {"size": self.size, "scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3)})]
        steps: dict[str, Steps] = {
            "none": whole,
            "flip": [*whole, *flip],
            "crop": [*cut, *flip],
            "randaugment": [*cut, *flip, ("RandAugment", {})],
        }
        return [*steps[augment], ("PILToTensor", {})]


def _transform(steps: Steps) -> Any:
    import_torchvision()
    v2 = import_module("torchvision.transforms.v2")
    return v2.Compose([getattr(v2, name)(**arguments) for name, arguments in steps])


class _OutOfRange(ValueError):
    """A picture whose numbers are no shades."""


def _eight_bits(picture: Any) -> Any:
    """Pictures of 16 bits, and of floats from 0 to 1, scaled to 8 bits: converting clips them to white.

    Raises: _OutOfRange for numbers outside.
    """
    if picture.mode not in ("I", "F") and not picture.mode.startswith("I;16"):
        return picture
    pixels = np.asarray(picture)
    top = 1.0 if picture.mode == "F" else 65535
    if not np.isfinite(pixels).all() or pixels.min() < 0 or pixels.max() > top:
        raise _OutOfRange(f"its pixels go from {pixels.min():g} to {pixels.max():g}, not from 0 to {top:g}")
    pil = import_optional("PIL.Image", extra="data")
    return pil.fromarray((pixels * (255.0 / top)).round().astype(np.uint8))


def _collate(items: list[tuple[Tensor | str, int]]) -> tuple[Tensor | str, Tensor]:
    labels = torch.tensor([label for _, label in items])
    for image, _ in items:
        if isinstance(image, str):
            return image, labels
    return torch.stack([image for image, _ in items if isinstance(image, Tensor)]), labels


TEST_FOLDERS = ("val", "test", "valid", "validation")


def read_folder(
    path: Path, *, images: Images | None = None, holdout: int = 0, device: str | torch.device = "cpu"
) -> FolderData:
    """List the images of ``path``, and look at the size of some; decoded are those that a measured mean needs.

    Raises: ValueError if ``path``, the training folder or the test folder are absent, if a class has no
    images, or if the test folder has a class that the training folder lacks.
    """
    import_optional("PIL.Image", extra="data")
    images = images or Images()
    if not path.is_dir():
        raise ValueError(f"imagefolder: there is no folder {path}")
    learn, judge = _splits(path, images)
    classes = tuple(sorted(entry.name for entry in learn.iterdir() if entry.is_dir()))
    train = _list_files(learn, classes)
    if len(classes) == 1:
        raise ValueError(f"{learn} has one sub-folder, {classes[0]}; give one for each class, two or more")
    strangers = sorted(entry.name for entry in judge.iterdir() if entry.is_dir() and entry.name not in classes)
    if strangers:
        raise ValueError(f"{judge} has classes that {learn} lacks: {', '.join(strangers[:8])}")
    test = _list_files(judge, tuple(name for name in classes if (judge / name).is_dir()), known=classes)
    labels = np.array([label for _, label in train])
    kept, aside = stratified_order(labels, holdout, seed=0)
    trained = tuple(train[i] for i in kept)
    size, resize, found = _sizes(trained, images)
    measured: dict[str, tuple[float, ...]] = {}
    if "measured" in (images.mean, images.std):
        measured = _measured(_Files(trained, size, resize, images.channels, "none", None))
    constants = {name: images.constants(name, measured.get(name)) for name in ("mean", "std")}
    many = len(train) >= _MANY
    return FolderData(
        name=f"imagefolder:{path}",
        classes=classes,
        image_size=size,
        resize=resize,
        train=trained,
        test=test,
        holdout=tuple(train[i] for i in aside),
        device=torch.device(device),
        workers=min(8, (os.cpu_count() or 1) - 1) if many else 0,
        in_channels=images.channels,
        augment=images.augment,
        told=(
            f"{len(trained)} training and {len(test)} test images of {len(classes)} classes, {found}; inputs are "
            f"{images.channels}x{size}x{size}, mean {_short(constants['mean'])} ({images.mean}), "
            f"std {_short(constants['std'])} ({images.std}), augmentation {images.augment}"
        ),
        mean=constants["mean"],
        std=constants["std"],
    )


def _splits(path: Path, images: Images) -> tuple[Path, Path]:
    """The folders of training and test images."""
    names = TEST_FOLDERS if images.test_split is None else (images.test_split,)
    tests = [path / name for name in names if (path / name).is_dir()]
    if not (path / images.train_split).is_dir() or not tests:
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        test = f"{names[0]} (or {names[1]})" if len(names) > 1 else names[0]
        raise ValueError(
            f"{path} needs the folders {images.train_split} and {test}, one sub-folder per class; it has {found}; other names "
            "are given with --train-split and --test-split, Images(train_split=..., test_split=...)"
        )
    return path / images.train_split, tests[0]


def _sizes(files: Files, images: Images) -> tuple[int, int, str]:
    """Side of the inputs, shorter side before the cut, and in words what sizes and modes the files have."""
    pil = import_optional("PIL.Image", extra="data")
    sizes, modes = set(), set()
    for path, _ in files[:: len(files) // _MANY + 1]:
        try:
            with pil.open(path) as opened:
                sizes.add(opened.size)
                modes.add(opened.mode)
        except (OSError, SyntaxError, ValueError):
            continue  # said when it is decoded, by name
    alike = next(iter(sizes)) if len(sizes) == 1 else None
    square = alike[0] if alike is not None and alike[0] == alike[1] else None
    size = images.image_size or square or 224
    if images.resize is not None and images.resize < size:
        raise ValueError(f"Images(resize={images.resize}): must be at least the side of the inputs, {size}")
    resize = images.resize or (size if square == size else round(size * 8 / 7))
    grey = bool(modes) and all(m in ("1", "L", "LA", "I", "F") or m.startswith("I;16") for m in modes)
    words = "of several sizes" if alike is None else f"all of {alike[0]}x{alike[1]}"
    hint = " and grey" + ("" if images.grey else " (--grey reads them as one channel)") if grey else ""
    return size, resize, words + hint


def _measured(files: _Files) -> dict[str, tuple[float, ...]]:
    """Mean and standard deviation per channel, of pixels from 0 to 1, over up to 2000 training images."""
    total = square = torch.zeros(files.channels, dtype=torch.float64)
    pixels = 0
    for index in range(0, len(files), len(files) // _MANY + 1):
        image, _ = files[index]
        if isinstance(image, str):
            raise ValueError(image)
        flat = image.flatten(1).double() / 255
        total, square, pixels = total + flat.sum(1), square + flat.square().sum(1), pixels + flat.shape[1]
    mean = total / pixels
    std = (square / pixels - mean.square()).clamp_min(1e-12).sqrt()
    return {name: tuple(round(float(v), 4) or 1e-4 for v in values) for name, values in (("mean", mean), ("std", std))}


def _short(numbers: Sequence[float]) -> str:
    return ",".join(f"{n:.3g}" for n in numbers)


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
