"""One kernel shape for all filters of a layer, or two groups of filters with a shape each?  Accuracy and time of both.

    python -m benchmarks.shape_groups --weights resnet20.th --data-dir D

Accuracy: one layer of a trained network at a time keeps a rectangle of so many of its kernel positions, for all filters the
same or for every filter the better of two, chosen by the first-order change of the loss that MGP sums too; BatchNorm statistics
are estimated anew on training images; loss and accuracy are of training images that neither saw.  Time: one convolution in
ONNX Runtime, batch 1, one thread, beside the whole kernel; of two groups with the concatenation that puts them together again,
and without the gather that would bring the filters back to their order.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Sequence
from itertools import combinations_with_replacement
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import environment, rounded, table, write_results
from espalier.forms.shapes import Rectangle, rectangles
from espalier.methods.scoring import recalibrate_batchnorm
from espalier.run.batches import Batch
from espalier.run.data import Data, load_data
from espalier.run.evaluate import evaluate
from espalier.run.latency import latency
from espalier.run.models import build_model, load_weights

NAME = "shape_groups"
BATCH, SCORING, SETTLING, JUDGING = 128, 8, 4, 16  # images in a batch; batches for scores, BatchNorm, loss and accuracy
KERNEL = (3, 3)
AREAS = (2, 3, 4, 6)
WIDTHS = ((16, 32), (32, 16), (64, 8), (128, 16), (256, 8))  # channels, side of the image
TIMED = {
    "one 3x1": ((3, 1),), "one 2x2": ((2, 2),), "one 2x3": ((2, 3),),
    "3x1 + 1x3": ((3, 1), (1, 3)), "2x3 + 3x2": ((2, 3), (3, 2)),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet20a")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data-dir", required=True, help="of CIFAR-10")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    data = load_data("cifar10", data_dir=options.data_dir)
    assert isinstance(data, Data)
    model = build_model(options.model, num_classes=data.num_classes)
    load_weights(model, options.weights)
    model = model.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    losses = by_loss(model, data)
    times = by_time()
    content = {"environment": environment(), "model": options.model, "loss": losses, "time": times}
    path = write_results(NAME, rounded(content))
    print(loss_table(losses), time_table(times), f"written to {path.name}", sep="\n\n")


# -- accuracy ----------------------------------------------------------------------------------------------------------


def by_loss(model: nn.Module, data: Data) -> dict[str, Any]:
    """Per layer and number of positions, what is left of importance, loss and accuracy with one shape and with two."""
    batches = list(data.calibration_batches(batch_size=BATCH, batches=SCORING + SETTLING + JUDGING, channels_last=True))
    settling, judging = batches[SCORING : SCORING + SETTLING], batches[SCORING + SETTLING :]
    worth = skeleton_importance(model, batches[:SCORING])
    whole = settled(model, settling, judging)
    rows = []
    for layer, values in worth.items():
        for area in AREAS:
            candidates = [r for r in rectangles(KERNEL) if r.area == area]
            for number in (1, 2):
                shapes, mask = best(values, candidates, number)
                cut = copy.deepcopy(model)
                with torch.no_grad():
                    cut.get_submodule(layer).weight.mul_(mask[:, None])  # type: ignore[operator, union-attr]
                found = settled(cut, settling, judging)
                kept = float((values * mask).sum() / values.sum())
                names = [f"{r} at row {r.top}, column {r.left}" for r in shapes]
                rows.append(
                    {"layer": layer, "positions": area, "groups": number, "shapes": names, "importance": kept, **found}
                )
    return {"whole": whole, "rows": rows}


def skeleton_importance(model: nn.Module, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Squared first-order change of the loss when one position of one filter goes, ``(out, kh, kw)`` by layer."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == KERNEL}
    worth = {n: torch.zeros(m.out_channels, *KERNEL) for n, m in layers.items()}
    for images, labels in batches:
        model.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        for name, layer in layers.items():
            assert layer.weight.grad is not None
            worth[name] += (layer.weight.detach() * layer.weight.grad).sum(1).square() / len(batches)
    model.zero_grad()
    return worth


def best(values: Tensor, candidates: Sequence[Rectangle], groups: int) -> tuple[list[Rectangle], Tensor]:
    """The shapes that keep most of ``values``, every filter in the better one, and the mask, both ``(out, kh, kw)``."""
    masks = {r: torch.from_numpy(r.mask(KERNEL)) for r in candidates}
    kept = {r: (values * m).sum((1, 2)) for r, m in masks.items()}
    several = combinations_with_replacement(candidates, groups)
    chosen = max(several, key=lambda rs: float(torch.stack([kept[r] for r in rs]).amax(0).sum()))
    own = torch.stack([kept[r] for r in chosen]).argmax(0)
    return sorted(set(chosen), key=str), torch.stack([masks[r] for r in chosen])[own].float()


def settled(model: nn.Module, settling: Sequence[Batch], judging: Sequence[Batch]) -> dict[str, float]:
    recalibrate_batchnorm(model, settling, SETTLING * BATCH)
    return evaluate(model, judging)


def loss_table(losses: dict[str, Any]) -> str:
    whole, lines = losses["whole"], []
    for area in sorted({r["positions"] for r in losses["rows"]}):
        line: list[Any] = [f"{area} of 9"]
        for key, digits in (("importance", 3), ("loss", 3), ("accuracy", 2)):
            for number in (1, 2):
                picked = [r for r in losses["rows"] if (r["positions"], r["groups"]) == (area, number)]
                line.append(f"{mean(r[key] - (whole[key] if key != 'importance' else 0) for r in picked):+.{digits}f}")
        lines.append(line)
    heads = [f"{key}, {n}" for key in ("importance kept", "loss", "accuracy") for n in ("one shape", "two")]
    return table(["positions", *heads], lines)


# -- time --------------------------------------------------------------------------------------------------------------


class Grouped(nn.Module):
    """A convolution whose filters fall into as many groups as there are kernels."""

    def __init__(self, channels: int, kernels: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        own = channels // len(kernels)
        self.parts = nn.ModuleList(nn.Conv2d(channels, own, k, padding=(k[0] // 2, k[1] // 2)) for k in kernels)
        # an even kernel is padded at one end, so that the output keeps its size
        self.grow = [(0, 1 - k[1] % 2, 0, 1 - k[0] % 2) for k in kernels]
        for part, (height, width) in zip(self.parts, kernels, strict=True):
            part.padding = (height // 2 if height % 2 else 0, width // 2 if width % 2 else 0)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        made = [
            part(nn.functional.pad(x, grow) if any(grow) else x)
            for part, grow in zip(self.parts, self.grow, strict=True)
        ]
        return torch.cat(made, 1) if len(made) > 1 else made[0]


def by_time(rounds: int = 40) -> list[dict[str, Any]]:
    """Speed-up over the whole kernel of one layer, by width."""
    rows = []
    for channels, side in WIDTHS:
        torch.manual_seed(0)
        models = {"3x3": Grouped(channels, (KERNEL,)), **{n: Grouped(channels, k) for n, k in TIMED.items()}}
        example = torch.randn(1, channels, side, side)
        timings = latency(models, example, backend="onnxruntime", batch_sizes=(1,), repeats=rounds)
        rows.append(
            {"channels": channels, "side": side, "milliseconds": timings[0].milliseconds}
            | {t.name: t.speedup for t in timings[1:]}
        )
    return rows


def time_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [[f"{r['channels']}, {r['side']}x{r['side']}", *[f"{r[n]:.2f}x" for n in TIMED]] for r in rows]
    return table(["channels, image", *TIMED], lines)


if __name__ == "__main__":
    main()
