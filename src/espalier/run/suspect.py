"""Weights that were trained on inputs of another kind: found out before a network is judged by them, or learnt from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from espalier.run.batches import IMAGENET_MEAN, IMAGENET_STD, Batch
from espalier.run.data import Data, FolderData
from espalier.run.evaluate import evaluate

IMAGES = 512  # test images that are tried
CLEAR = 5.0  # points of accuracy by which another normalisation must be better to be named
WEAK = 0.5  # of the way from chance to perfect: below it, trained weights do badly


def suspicion(model: nn.Module, source: Data | FolderData) -> str | None:
    """Why the accuracy of ``model`` on test images is hardly what its weights can do; ``None`` where nothing speaks for that.

    Other usual normalisations of the same pictures are tried, on up to 512 test images; a better one is named with the options
    that choose it.
    """
    batches = _few(source)
    own = evaluate(model, batches)["accuracy"]
    found = {name: evaluate(model, _renormalised(batches, source, c))["accuracy"] for name, c in _usual(source).items()}
    best = max(found, key=lambda name: found[name])
    chance = 100.0 / source.num_classes
    good = chance + WEAK * (100.0 - chance)
    if found[best] > own + CLEAR and found[best] >= good:
        mean, std = best.split(" ")
        return (
            f"the given weights classify {own:.1f} % of the test images as they are normalised here, and {found[best]:.1f} % "
            f"with mean {mean} and std {std}: they were trained on inputs like that (imagefolder: --mean {mean} --std {std})"
        )
    if own < good:
        return (
            f"the given weights classify only {own:.1f} % of the test images. Were they trained on these classes in this "
            "order, on images of this size and cut, with this number of channels? No usual normalisation does better"
        )
    return None


def _few(source: Data | FolderData) -> list[Batch]:
    """The first test images of every stretch, so that classes that come in order are all there."""
    batches, seen = [], 0
    step = max(1, len(source.test) // IMAGES)
    for x, y in source.test_batches():
        batches.append((x[::step], y[::step]))
        seen += len(y[::step])
        if seen >= IMAGES:
            break
    return batches


def _usual(source: Data | FolderData) -> dict[str, tuple[Tensor, Tensor]]:
    """Name as "mean std", as options take them -> mean and std of pixels from 0 to 1, per channel."""
    channels = source.in_channels
    imagenet = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((sum(IMAGENET_MEAN) / 3,), (sum(IMAGENET_STD) / 3,))
    constants = {"0.5 0.5": ((0.5,), (0.5,)), "0 1": ((0.0,), (1.0,)), "imagenet imagenet": imagenet}
    return {n: (torch.tensor(m).expand(channels), torch.tensor(s).expand(channels)) for n, (m, s) in constants.items()}


def _renormalised(batches: list[Batch], source: Data | FolderData, constants: tuple[Tensor, Tensor]) -> list[Batch]:
    """The same pictures with another mean and std."""
    mean, std = (torch.tensor(c, dtype=torch.float32) for c in (source.mean, source.std))
    found = []
    for x, y in batches:
        m, s, other_m, other_s = (c.to(x.device).view(1, -1, 1, 1) for c in (mean, std, *constants))
        found.append(((x * s + m - other_m) / other_s, y))
    return found
