"""How good a network is at its task, exactly counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from espalier.copies import device_of
from espalier.methods.agreement import gathered, total
from espalier.methods.scoring import modes_kept
from espalier.tasks import Classification, Summed, Task, image_count, to_device

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


def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    device: str | torch.device | None = None,
    precision: str = "fp32",
    task: Task | None = None,
) -> dict[str, float]:
    """What ``task.metric`` names, and as ``loss`` the mean loss over all images of ``batches``, where predictions have one.

    Without a task: top-1 accuracy in percent and mean cross-entropy.  Runs in eval mode on ``device`` (default: where the model
    is); the model is left as it was.  Neither depends on the batch size.

    Raises: ValueError if there is no image, or if the model does not return what the task takes.
    """
    return judged(model, batches, device=device, precision=precision, task=task or Classification())[0]


def judged(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    device: str | torch.device | None,
    task: Task,
    precision: str = "fp32",
    joint: bool = False,
) -> tuple[dict[str, float], int]:
    """``evaluate``, and the number of images.  ``joint``: ``batches`` are of this process, and the answer is of all of them."""
    place = device_of(model) if device is None else pick_device(device)
    meter = task.meter()
    if isinstance(meter, nn.Module):  # as those of torchmetrics are
        meter.to(place)
    loss = torch.zeros((), dtype=torch.float64, device=place)
    images, has_loss = 0, False
    with modes_kept(model), torch.no_grad(), autocast(place, precision):
        model.eval()
        for batch in batches:
            x, y = to_device(task.split(batch), place)
            count = image_count(x)
            output = task.predict(model, x, y)
            meter.update(output, y)
            part = task.test_loss(output, y, count)
            if part is not None:
                loss, has_loss = loss + part.double(), True
            images += count
    summed = float(loss)
    if joint:
        summed, number, losses = total(summed, images, has_loss)
        images, has_loss = int(number), bool(losses)
        if isinstance(meter, Summed):
            meter.put_together(gathered(meter.sums()))
    if not images:
        raise ValueError("evaluate: there are no images")
    found = {task.metric.name: float(meter.compute())}
    return ({**found, "loss": summed / images} if has_loss else found), images
