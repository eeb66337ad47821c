"""Data sets by name, resident on the device, and the user's own loaders behind the same interface."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from espalier.methods.agreement import ALONE, Share
from espalier.run.batches import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Batch,
    Normalise,
    Source,
    check_labels,
    crop_and_flip,
    epoch_generator,
    epoch_seed,
    full_batches,
    stratified_order,
)
from espalier.run.cifar import LAYOUTS, read_cifar
from espalier.run.images import FolderData, Images, read_folder
from espalier.run.preprocessing import Preprocessing
from espalier.tasks import to_device

__all__ = ["Data", "FolderData", "Loaders", "Source", "Split", "identity", "load_data", "set_aside"]

CLASSES = {
    "digits": tuple("0123456789"),
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}
"""Names of the classes of data sets that are known by name."""

_AT_ONCE = 8192  # images augmented in one go: few kernel launches, little memory


@dataclass(frozen=True, eq=False)
class Split:
    """Images, uint8 ``(n, c, h, w)``, and their labels, int64 ``(n,)``, on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> "Split":
        return Split(self.images[index], self.labels[index])

    def to(self, device: str | torch.device) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True, eq=False)
class Data:
    """A whole data set as uint8 tensors on one device. Implements :class:`Source`.

    Pixels go from 0 to ``levels`` and come out as ``(images / levels - mean) / std``. Training images are
    shifted by up to ``pad`` pixels and, with ``flip``, mirrored. ``holdout`` is empty unless images were set
    aside. To normalise otherwise: ``dataclasses.replace(data, mean=..., std=...)``.

    Raises: ValueError if train or test is empty, images and labels do not agree, or a label is not a class.
    """

    name: str
    num_classes: int
    in_channels: int
    image_size: int
    train: Split
    test: Split
    holdout: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    levels: int = 255
    pad: int = 0
    flip: bool = False
    share: Share = ALONE  # of every training batch

    def __post_init__(self) -> None:
        for name, split in {"train": self.train, "test": self.test, "holdout": self.holdout}.items():
            where = f"{self.name}, {name}"
            if len(split) == 0 and name != "holdout":
                raise ValueError(f"{where}: there are no images")
            expected = (self.in_channels, self.image_size, self.image_size)
            if split.images.dtype != torch.uint8 or split.images.shape[1:] != expected:
                raise ValueError(
                    f"{where}: images are uint8 (n, {', '.join(map(str, expected))}); "
                    f"these are {split.images.dtype} of shape {tuple(split.images.shape)}"
                )
            if len(split.images) != len(split.labels):
                raise ValueError(f"{where}: {len(split.images)} images have {len(split.labels)} labels")
            check_labels(split.labels, num_classes=self.num_classes, where=where)
        if not len(self.mean) == len(self.std) == self.in_channels:
            raise ValueError(f"{self.name}: mean and std need one value for each of {self.in_channels} channels")

    @property
    def has_holdout(self) -> bool:
        return len(self.holdout) > 0

    @property
    def preprocessing(self) -> Preprocessing:
        """What turns a picture into an input of a network that was trained on this."""
        return Preprocessing(
            channels=self.in_channels,
            height=self.image_size,
            width=self.image_size,
            levels=self.levels,
            mean=tuple(map(float, self.mean)),
            std=tuple(map(float, self.std)),
            resize=f"none: pictures of {self.image_size}x{self.image_size}",
            classes=CLASSES.get(self.name, ()),
        )

    def to(self, device: str | torch.device) -> "Data":
        """The same data on another device."""
        return replace(self, train=self.train.to(device), test=self.test.to(device), holdout=self.holdout.to(device))

    def steps(self, batch_size: int) -> int:
        return full_batches(len(self.train), batch_size)

    def train_batches(self, *, batch_size: int, epoch: int, seed: int, channels_last: bool = False) -> Iterator[Batch]:
        steps = self.steps(batch_size)
        return self._augmented(steps, batch_size, epoch_generator(seed, epoch), channels_last)

    def _augmented(self, steps: int, batch_size: int, random: torch.Generator, channels_last: bool) -> Iterator[Batch]:
        used = min(len(self.train), steps * batch_size)
        device = self.train.labels.device
        # Drawn on the CPU for the whole epoch: three copies to the device, and every device draws the same.
        order = torch.randperm(len(self.train), generator=random)[:used]
        shift = torch.randint(2 * self.pad + 1, (2, used), generator=random)
        flip = torch.rand(used, generator=random) < (0.5 if self.flip else 0.0)
        mine = torch.from_numpy(self.share.among(used, steps))
        order, shift, flip = (drawn[..., mine].to(device) for drawn in (order, shift, flip))
        used = len(mine)
        batch_size = used // steps
        chunk = max(1, _AT_ONCE // batch_size) * batch_size
        for start in range(0, used, chunk):
            part = slice(start, min(start + chunk, used))
            chosen = self.train[order[part]]
            if self.pad or self.flip:
                down, right = shift[:, part]
                moved = crop_and_flip(chosen.images, down=down, right=right, flip=flip[part], pad=self.pad)
                chosen = Split(moved, chosen.labels)
            yield from self._batches(chosen, batch_size, channels_last)

    def test_batches(self, batch_size: int = 500, *, channels_last: bool = False) -> Iterator[Batch]:
        return self._batches(self.test, batch_size, channels_last)

    def holdout_batches(self, batch_size: int = 500, *, channels_last: bool = False) -> Iterator[Batch]:
        if not self.has_holdout:
            raise ValueError(f"{self.name}: no images are held out; load_data(..., holdout=N) sets some aside")
        return self._batches(self.holdout, batch_size, channels_last)

    def calibration_batches(
        self, *, batch_size: int, batches: int, seed: int = 0, channels_last: bool = False
    ) -> Iterator[Batch]:
        order = torch.randperm(len(self.train), generator=epoch_generator(seed, 0))
        order = order[: batches * batch_size].to(self.train.labels.device)
        return self._batches(self.train[order], batch_size, channels_last)

    def example(self, batch: int = 1) -> Tensor:
        index = torch.arange(batch, device=self.train.labels.device) % len(self.train)
        return self._normalise(self.train.images[index])

    def _batches(self, split: Split, batch_size: int, channels_last: bool) -> Iterator[Batch]:
        if batch_size < 1:
            raise ValueError(f"the batch size is 1 or more, not {batch_size}")
        for start in range(0, len(split), batch_size):
            part = slice(start, start + batch_size)
            yield self._normalise(split.images[part], channels_last=channels_last), split.labels[part]

    @cached_property
    def _normalise(self) -> Normalise:
        return Normalise(self.mean, self.std, levels=self.levels, device=self.train.images.device)


@dataclass(frozen=True, eq=False)
class Loaders:
    """The user's own loaders, which yield (images, labels): DataLoaders, lists of batches, or the like.  Without
    ``num_classes`` they yield what the task takes apart, which is moved to the device and not looked at.

    ``train``, ``test`` and, to choose by, ``holdout`` can be gone through again and again and know their length; batches go to
    ``device``. Implements :class:`Source`.

    Images are already normalised floats ``(n, c, h, w)``. Batch size, augmentation and what is held out are
    the loaders' affair; ``batch_size`` is not used. Shuffling by torch's global generator is seeded from seed
    and epoch, so that a resumed run sees the same batches; a loader with a generator of its own keeps that
    generator.

    Raises: ValueError if a loader is empty, can be gone through only once, yields something else than pairs,
    or holds a label outside the classes (as soon as that batch comes).
    """

    train: Iterable[Any]
    test: Iterable[Any]
    num_classes: int | None = None
    holdout: Iterable[Any] | None = None
    device: str | torch.device = "cpu"
    _shape: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.num_classes is not None and self.num_classes < 1:
            raise ValueError(f"num_classes is 1 or more, not {self.num_classes}")
        for name, loader in self._named().items():
            if isinstance(loader, Iterator) or not isinstance(loader, Iterable):
                raise ValueError(
                    f"the {name} loader is a {type(loader).__name__}, which cannot be gone through again "
                    "each epoch; give a DataLoader or a list of batches"
                )
        if self.num_classes is None:
            next(self._batches("train", False))
            return
        images = self.example()
        if images.dim() != 4:
            raise ValueError(f"train loader: images are (n, c, h, w); these are of shape {tuple(images.shape)}")
        object.__setattr__(self, "_shape", tuple(images.shape[1:]))

    def _named(self) -> dict[str, Any]:
        loaders = {"train": self.train, "test": self.test, "holdout": self.holdout}
        return {name: loader for name, loader in loaders.items() if loader is not None}

    @property
    def preprocessing(self) -> None:
        """Unknown: the loaders do it."""

    @property
    def in_channels(self) -> int:
        return self._shape[0]

    @property
    def image_size(self) -> int:
        return self._shape[-1]

    @property
    def has_holdout(self) -> bool:
        return self.holdout is not None

    def steps(self, batch_size: int) -> int:
        try:
            return len(cast(Sized, self.train))
        except TypeError as error:  # a DataLoader has a length, of which its data set may know nothing
            raise ValueError(
                "the train loader has no length, which the rate schedule needs; give it, or the data set in it, a __len__"
            ) from error

    def train_batches(self, *, batch_size: int, epoch: int, seed: int, channels_last: bool = False) -> Iterator[Batch]:
        return self._batches("train", channels_last, seed=epoch_seed(seed, epoch))

    def test_batches(self, batch_size: int = 500, *, channels_last: bool = False) -> Iterator[Batch]:
        return self._batches("test", channels_last)

    def holdout_batches(self, batch_size: int = 500, *, channels_last: bool = False) -> Iterator[Batch]:
        if self.holdout is None:
            raise ValueError("no loader of held-out images was given: Loaders(..., holdout=loader)")
        return self._batches("holdout", channels_last)

    def calibration_batches(
        self, *, batch_size: int, batches: int, seed: int = 0, channels_last: bool = False
    ) -> Iterator[Batch]:
        """The first batches of the train loader, ``(n, c, h, w)`` and labels ``(n,)``, with the augmentation that it does."""
        source = self._batches("train", channels_last, seed=epoch_seed(seed, 0))
        for _, batch in zip(range(batches), source, strict=False):
            yield batch

    def example(self, batch: int = 1) -> Tensor:
        if self.num_classes is None:
            raise ValueError("Loaders without num_classes: only a task knows what of a batch is the input")
        images = next(self._batches("train", False, seed=0))[0]
        if len(images) < batch:
            images = images.repeat(-(-batch // len(images)), *[1] * (images.dim() - 1))
        return images[:batch]

    def _batches(self, name: str, channels_last: bool, *, seed: int = 0) -> Iterator[Batch]:
        iterator, first = _start(self._named()[name], seed=seed)
        if first is None:
            raise ValueError(f"the {name} loader is empty")
        item = first
        while item is not None:
            yield self._checked(item, name, channels_last)
            item = next(iterator, None)

    def _checked(self, item: Any, name: str, channels_last: bool) -> Any:
        if self.num_classes is None:
            return to_device(item, self.device)
        if not (isinstance(item, tuple | list) and len(item) == 2 and all(isinstance(t, Tensor) for t in item)):
            raise ValueError(
                f"the {name} loader yields a {type(item).__name__}, not a pair (images, labels) of tensors"
            )
        images, labels = item
        if not images.is_floating_point():
            raise ValueError(f"the {name} loader yields images of {images.dtype}; give normalised floats")
        if len(images) == 0:
            raise ValueError(f"the {name} loader yields an empty batch; leave it out")
        first = getattr(self, "_shape", None)  # of the first batch; sizes may change, channels may not
        if first is not None and (images.dim() != len(first) + 1 or images.shape[1] != first[0]):
            shape = tuple(images.shape)
            raise ValueError(
                f"the {name} loader yields images of shape {shape} after others of {(len(images), *first)}"
            )
        if len(images) != len(labels):
            raise ValueError(f"the {name} loader yields {len(images)} images with {len(labels)} labels")
        if labels.dim() != 1 or labels.is_floating_point():
            raise ValueError(
                f"the {name} loader yields labels of {labels.dtype} and shape {tuple(labels.shape)}; with num_classes they are "
                "class numbers, one integer per image; for other tasks leave num_classes out and give compress(task=...)"
            )
        # Smallest and largest label would be fetched one by one.
        check_labels(labels.cpu(), num_classes=self.num_classes, where=f"{name} loader")
        images = images.to(self.device, non_blocking=True)
        if channels_last and images.dim() == 4:
            images = images.to(memory_format=torch.channels_last)
        return images, labels.to(self.device, torch.int64, non_blocking=True)


def _start(loader: Iterable[Any], *, seed: int) -> tuple[Iterator[Any], Any]:
    """An iterator and its first item; the loader draws its order from torch's global generator, seeded."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        iterator = iter(loader)
        return iterator, next(iterator, None)


def set_aside(source: Source, images: int) -> Source:
    """``source`` with that many training images held out, a tenth of all at the most, each class in its share.

    What has held-out images already stays as it is, and so do ``Loaders``: what they hold out is their affair.
    """
    if images == 0 or source.has_holdout or not isinstance(source, (Data, FolderData)):
        return source
    count = min(images, len(source.train) // 10)
    if isinstance(source, FolderData):
        labels = np.array([label for _, label in source.train])
        kept, aside = stratified_order(labels, count, seed=_SPLIT_SEED)
        return replace(
            source, train=tuple(source.train[i] for i in kept), holdout=tuple(source.train[i] for i in aside)
        )
    kept, aside = stratified_order(source.train.labels.cpu().numpy(), count, seed=_SPLIT_SEED)
    device = source.train.labels.device
    parts = [source.train[torch.from_numpy(index).to(device)] for index in (kept, aside)]
    return replace(source, train=parts[0], holdout=parts[1])


def identity(source: Source) -> dict[str, Any]:
    """What tells other data apart at little cost: how many there are and, unless loaders hide it, a hash of what they are."""
    splits = {"training": "train", "test": "test", "held-out": "holdout"}
    if isinstance(source, Loaders):
        lengths = {name: _length(getattr(source, split)) for name, split in splits.items()}
        return {f"{name} batches": length for name, length in lengths.items() if length is not None}
    if not isinstance(source, (Data, FolderData)):
        return {}
    found: dict[str, Any] = {f"{name} images": len(getattr(source, split)) for name, split in splits.items()}
    found["hash"] = _hash(source)
    return found


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:  # None, or a DataLoader around an iterable that does not know
        return None


def _hash(source: Data | FolderData) -> str:
    """Of size, normalisation, augmentation, labels, and some images or all file names; not of where the files are."""
    augmented = (
        (source.levels, source.pad, source.flip) if isinstance(source, Data) else (source.augment, source.resize)
    )
    scaled = [float(number) for number in (*source.mean, *source.std)]
    digest = hashlib.sha256(repr((source.image_size, scaled, augmented)).encode())
    for split in (source.train, source.test, source.holdout):
        if isinstance(split, Split):
            some = split.images[:: len(split) // 64 + 1]
            for tensor in (split.labels, some):
                digest.update(tensor.cpu().contiguous().numpy().tobytes())
        else:
            digest.update(repr([(path.name, label) for path, label in split]).encode())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------- data sets by name

_SPLIT_SEED = 0  # what is test among the digits, and what is held out, never depends on the run's seed


def load_data(
    name: str,
    *,
    data_dir: str | Path | None = None,
    download: bool = False,
    holdout: int = 0,
    image_size: int | None = None,
    images: Images | None = None,
    device: str | torch.device = "cpu",
) -> Data | FolderData:
    """Load the data set ``name`` onto ``device``, after fetching it if ``download`` allows that.

    ``digits``: scikit-learn's 1797 real 8x8 digits, 1437 to train and 360 to test. ``cifar10``, ``cifar100``:
    from ``data_dir`` (default: the environment's ESPALIER_DATA_DIR, then ``data``), in torchvision's layout.
    ``imagefolder:PATH``: images in ``PATH/train/CLASS`` and ``PATH/val/CLASS`` (or ``test``), which ``images``
    says how to read; ``image_size``, in pixels, is short for ``Images(image_size=...)``. ``holdout`` takes that many images,
    each class in its share and the same ones every time, out of training, to choose by.

    Raises: ValueError for an unknown name, absent or damaged files, a wrong layout, or a ``holdout`` that
    leaves nothing to train on; MissingPackage if torchvision is needed to download, or pillow to decode, and
    absent.
    """
    if name.startswith("imagefolder:"):
        path = Path(name.removeprefix("imagefolder:")).expanduser()
        chosen = images or Images()
        chosen = chosen if image_size is None else replace(chosen, image_size=image_size)
        return read_folder(path, images=chosen, holdout=holdout, device=device)
    if images is not None and images != Images(image_size=images.image_size):
        raise ValueError(
            f"{name} has its own size, normalisation and augmentation; Images(...) is for imagefolder:PATH"
        )
    if name != "digits" and name not in LAYOUTS:
        if Path(name).is_dir():
            raise ValueError(
                f"{name} is a folder: give imagefolder:{name}, which reads {name}/train/CLASS and {name}/val/CLASS"
            )
        raise ValueError(f"no data set is called {name!r}; there are digits, {', '.join(LAYOUTS)} and imagefolder:PATH")
    own_size = 8 if name == "digits" else 32
    if image_size not in (None, own_size):
        raise ValueError(
            f"{name} images are {own_size}x{own_size}; image_size={image_size} applies to imagefolder:PATH"
        )
    if name == "digits":
        return _digits(holdout=holdout).to(device)
    folder = Path(data_dir or os.environ.get("ESPALIER_DATA_DIR") or "data").expanduser()
    return _cifar(name, folder, download=download, holdout=holdout).to(device)


def _digits(*, holdout: int) -> Data:
    from sklearn.datasets import load_digits  # a second to import

    images, labels = load_digits(return_X_y=True)
    images = images.astype(np.uint8).reshape(-1, 1, 8, 8)
    train, test = stratified_order(labels, 360, seed=_SPLIT_SEED)
    kept, aside = _set_aside(images[train], labels[train], holdout)
    return Data(
        name="digits",
        num_classes=10,
        in_channels=1,
        image_size=8,
        train=kept,
        test=_split(images[test], labels[test]),
        holdout=aside,
        mean=(0.3058,),  # of the 1437 training images
        std=(0.3764,),
        levels=16,
        pad=1,
    )


def _cifar(name: str, folder: Path, *, download: bool, holdout: int) -> Data:
    train, test = read_cifar(name, folder, download=download)
    kept, aside = _set_aside(*train, holdout)
    return Data(
        name=name,
        num_classes=LAYOUTS[name].num_classes,
        in_channels=3,
        image_size=32,
        train=kept,
        test=_split(*test),
        holdout=aside,
        mean=IMAGENET_MEAN,  # as the published CIFAR weights were trained with
        std=IMAGENET_STD,
        pad=4,
        flip=True,
    )


def _set_aside(images: np.ndarray, labels: np.ndarray, holdout: int) -> tuple[Split, Split]:
    kept, aside = stratified_order(labels, holdout, seed=_SPLIT_SEED)
    return _split(images[kept], labels[kept]), _split(images[aside], labels[aside])


def _split(images: np.ndarray, labels: np.ndarray) -> Split:
    return Split(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)))
