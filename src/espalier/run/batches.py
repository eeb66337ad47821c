"""What every source of batches shares: interface, seeds, augmentation and normalisation on the device."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from espalier.methods.scoring import Batch
from espalier.run.preprocessing import Preprocessing

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Per channel, of pixels from 0 to 1."""


class Source(Protocol):
    """Where a training loop gets its batches: :class:`Data`, :class:`FolderData` or :class:`Loaders`.

    A ``batch_size`` is in images.
    """

    @property
    def num_classes(self) -> int | None:
        """``None`` where batches are what a task takes apart, of which nothing is known here."""

    @property
    def in_channels(self) -> int:
        """Of an image."""

    @property
    def image_size(self) -> int:
        """Side of a square image, in pixels."""

    @property
    def has_holdout(self) -> bool:
        """Whether training images were set aside to choose by."""

    @property
    def preprocessing(self) -> Preprocessing | None:
        """From a picture to an input; ``None`` where only the user knows."""

    def steps(self, batch_size: int) -> int:
        """Batches in one epoch of :meth:`train_batches`."""

    def train_batches(self, *, batch_size: int, epoch: int, seed: int, channels_last: bool = False) -> Iterator[Batch]:
        """One epoch of shuffled, augmented images ``(n, c, h, w)`` and labels ``(n,)``: a function of seed and epoch alone."""

    def test_batches(self, batch_size: int = 500, *, channels_last: bool = False) -> Iterator[Batch]:
        """Every test image once, in order: ``(n, c, h, w)`` and labels ``(n,)``."""

    def holdout_batches(self, batch_size: int = 500, *, channels_last: bool = False) -> Iterator[Batch]:
        """Every held-out image once, in order: ``(n, c, h, w)`` and labels ``(n,)``."""

    def calibration_batches(
        self, *, batch_size: int, batches: int, seed: int = 0, channels_last: bool = False
    ) -> Iterator[Batch]:
        """So many training batches, ``(n, c, h, w)`` and labels ``(n,)``, without augmentation, drawn by the seed."""

    def example(self, batch: int = 1) -> Tensor:
        """Normalised training images ``(batch, c, h, w)``, always the same, to trace a network with."""


def epoch_seed(seed: int, epoch: int) -> int:
    """A seed for this epoch alone, so that a resumed run draws what an uninterrupted one would have drawn."""
    if seed < 0 or epoch < 0:
        raise ValueError(f"seed and epoch are 0 or more, not {seed} and {epoch}")
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """The generator of :func:`epoch_seed`. On the CPU, so that every device draws the same numbers."""
    return torch.Generator().manual_seed(epoch_seed(seed, epoch))


def full_batches(images: int, batch_size: int) -> int:
    """Batches in an epoch: whole ones only, since a ragged one upsets BatchNorm, but one at the least."""
    if batch_size < 1:
        raise ValueError(f"the batch size is 1 or more, not {batch_size}")
    return max(1, images // batch_size)


class Normalise:
    """``(images / levels - mean) / std`` per channel: uint8 ``(n, c, h, w)`` to float32.

    Its two constants stay on the device; made anew for each batch, they would cost two copies there.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], *, levels: int, device: torch.device) -> None:
        shape = (1, -1, 1, 1)
        self.scale = torch.tensor([1 / (levels * s) for s in std], device=device).view(shape)
        self.shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device).view(shape)

    def __call__(self, images: Tensor, *, channels_last: bool = False) -> Tensor:
        form = torch.channels_last if channels_last else torch.contiguous_format
        return images.to(torch.float32, memory_format=form).mul_(self.scale).add_(self.shift)


def crop_and_flip(images: Tensor, *, down: Tensor, right: Tensor, flip: Tensor, pad: int) -> Tensor:
    """Pad with black, cut each image back to its size at its own offset, and mirror it where asked.

    ``images`` is ``(n, c, h, w)``; ``down`` and ``right`` are int64 ``(n,)`` in ``[0, 2 * pad]``; ``flip`` is
    bool ``(n,)``. One gather for the whole batch, on the images' device.
    """
    n, c, h, w = images.shape
    device = images.device
    padded = F.pad(images, (pad, pad, pad, pad))
    across = torch.arange(w, device=device).expand(n, w)
    across = torch.where(flip[:, None], w - 1 - across, across)
    rows = (down[:, None] + torch.arange(h, device=device)).view(n, 1, h, 1)
    columns = (right[:, None] + across).view(n, 1, 1, w)
    planes = torch.arange(c, device=device).view(1, c, 1, 1)
    return padded[torch.arange(n, device=device).view(n, 1, 1, 1), planes, rows, columns]


def check_labels(labels: Tensor, *, num_classes: int, where: str) -> None:
    """Raises: ValueError if a label is not an integer in ``[0, num_classes)``."""
    if labels.dtype.is_floating_point or labels.dtype == torch.bool or labels.dim() != 1:
        raise ValueError(
            f"{where}: labels are class numbers, one integer per image; these are {labels.dtype} of shape "
            f"{tuple(labels.shape)}"
        )
    if labels.numel() == 0:
        return
    low, high = (int(value) for value in labels.aminmax())
    if low < 0 or high >= num_classes:
        wrong = low if low < 0 else high
        raise ValueError(f"{where}: label {wrong} lies outside the {num_classes} classes 0 to {num_classes - 1}")


def stratified_order(labels: np.ndarray, size: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Set ``size`` of the labels aside, each class in its share: (kept, set aside), both sorted indices.

    Raises: ValueError if not at least one would be kept or ``size`` is negative.
    """
    if not 0 <= size < len(labels):
        raise ValueError(
            f"holdout={size}: cannot be set aside of {len(labels)} training images; give 0 up to {len(labels) - 1}"
        )
    random = np.random.RandomState(seed)  # its stream is frozen by numpy's policy; that of default_rng is not
    order = random.permutation(len(labels))
    # The rank of each image within its class, as a fraction: sorting by it interleaves the classes evenly.
    position = np.empty(len(labels))
    for label in np.unique(labels):
        members = order[labels[order] == label]
        position[members] = (np.arange(len(members)) + 0.5) / len(members)
    by_share = order[np.argsort(position[order], kind="stable")]
    return np.sort(by_share[size:]), np.sort(by_share[:size])
