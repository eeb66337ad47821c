"""Accuracy and loss of a classifier, exactly counted; BatchNorm statistics of a changed network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espalier.methods.scoring import modes_kept, recalibrate_batchnorm
from espalier.run.batches import Batch

__all__ = [
    "AUTOCAST",
    "autocast",
    "evaluate",
    "main_logits",
    "modes_kept",
    "pick_device",
    "recalibrate_batchnorm",
    "thread_count",
]

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str | torch.device) -> torch.device:
    """``"auto"`` is the GPU if there is one.  Raises: ValueError for a device that is not there or cannot compute."""
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {str(name)!r} cannot be used here: {str(error).splitlines()[0]}") from error
    if device.type == "meta":
        raise ValueError(f"device {str(name)!r} holds no numbers to compute with; take 'auto', 'cpu' or 'cuda'")
    return torch.empty(0, device=device).device  # "cuda" becomes "cuda:0", so that devices can be compared


def autocast(device: torch.device, precision: str) -> Any:
    """The context for one forward: nothing for fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=AUTOCAST[precision])


@contextmanager
def thread_count(count: int | None) -> Iterator[None]:
    """Let torch use ``count`` threads inside; ``None`` changes nothing."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        if count is not None:
            torch.set_num_threads(before)


def main_logits(output: Any, *, classes: int | None = None) -> Tensor:
    """The logits ``(n, classes)`` in what a classifier returns: itself, or the first of a tuple (the rest are
    auxiliary).

    Raises: ValueError for anything else.
    """
    logits = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(output).__name__}"
        raise ValueError(f"the model returns {found}, not logits (images, classes); this loop trains classifiers")
    if classes is not None and logits.shape[1] != classes:
        raise ValueError(
            f"the model returns {logits.shape[1]} logits for an image, the data has {classes} classes; "
            "build the model for the data's classes"
        )
    return logits


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    device: str | torch.device | None = None,
    precision: str = "fp32",
) -> dict[str, float]:
    """Top-1 accuracy in percent and mean cross-entropy over all images of ``batches``.

    Runs in eval mode on ``device`` (default: where the model is); the model is left as it was.  Correct
    answers are counted as whole numbers, so the accuracy does not depend on the batch size.

    Raises: ValueError if there is no image, or if the model does not return logits.
    """
    first = next(model.parameters(), None)
    place = pick_device(device) if device is not None else first.device if first is not None else torch.device("cpu")
    correct = torch.zeros((), dtype=torch.int64, device=place)
    loss = torch.zeros((), dtype=torch.float64, device=place)
    images = 0
    with modes_kept(model), torch.no_grad(), autocast(place, precision):
        model.eval()
        for x, y in batches:
            x, y = x.to(place, non_blocking=True), y.to(place, non_blocking=True)
            logits = main_logits(model(x)).float()
            correct += (logits.argmax(1) == y).sum()
            loss += F.cross_entropy(logits, y, reduction="sum").double()
            images += len(y)
    if not images:
        raise ValueError("evaluate: there are no images")
    return {"accuracy": 100.0 * int(correct) / images, "loss": float(loss) / images}
