"""From a run to its charts: which numbers go where, in which unit.  An empty string where a run has none of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from espalier.graph.alternatives import alternatives_name
from espalier.present.progress import short
from espalier.present.runs import Run
from espalier.run.anatomy import Layer, timed
from espalier.run.charts import (
    Dot,
    Level,
    Limit,
    Line,
    Pair,
    bundle,
    dot_chart,
    limit_bars,
    line_chart,
    pair_bars,
    silhouette,
)
from espalier.run.report import COUNTED_WORDS

COST_TONES = {"macs": ("MACs", 0), "params": ("params", 1), "activation_memory": ("memory", 2)}
PLAIN, FACTORISED, RESHAPED = 0, 1, 2  # tones of layers
LAYER_TONES = {
    PLAIN: "the layer as it was, or with fewer channels",
    FACTORISED: "factorised into several layers",
    RESHAPED: "another kernel",
}


def budget_bars(run: Run, names: Mapping[str, str]) -> str:
    """Share of every cost that is left, and its limit, which stands beside what was counted where that differs."""
    dense, fraction, limits = run.metrics["dense"], run.metrics["fraction"], run.metrics["limits"]
    counted = (run.metrics["counted"] or {}).get("fraction", {})
    bars = []
    for name, cost, share, meant in [
        *((name.partition(",")[0], cost, fraction[cost], cost not in counted) for cost, name in names.items()),
        *((f"{COST_TONES[cost][0]} {COUNTED_WORDS}", cost, share, True) for cost, share in counted.items()),
    ]:
        limit = limits[cost] / dense[cost] if cost in limits and meant else None
        asked = "" if limit is None else f" of at most {100 * limit:.4g} %"
        bars.append(Limit(name, share, limit, f"{100 * share:.4g} %{asked}"))
    return limit_bars(bars, title="Share of the dense network that is left, by cost")


# -- layers


def network_drawing(run: Run) -> str:
    """The silhouette of the network."""
    levels = [
        Level(lr.name, lr.dense.outputs, tuple(s.outputs for s in lr.small), _what_stands_there(lr), _tone(lr))
        for lr in run.layers
    ]
    return silhouette(levels, title="Outputs of every layer before and after")


def layer_key(run: Run) -> dict[int, str]:
    """What the tones of layers mean, of those that occur; nothing where one tone is all there is."""
    there = {_tone(layer) for layer in run.layers}
    return {tone: text for tone, text in LAYER_TONES.items() if tone in there and len(there) > 1}


def macs_by_layer(run: Run) -> str:
    """Multiply-adds before and after."""
    pairs = [
        Pair(
            lr.name,
            lr.dense_macs,
            lr.small_macs,
            f"{100 * lr.small_macs / lr.dense_macs:.0f} %" if lr.dense_macs else "–",
            _tone(lr),
        )
        for lr in run.layers
    ]
    total = sum(lr.dense_macs for lr in run.layers)
    return pair_bars(
        pairs, title="MACs of every layer before and after", unit=f"MACs, of {short(total)} in all", head="left"
    )


def latency_by_layer(run: Run) -> tuple[str, int]:
    """Times before and after, measured now, and the batch they were measured at."""
    assert run.dense is not None and run.small is not None
    batch = 64 if run.config["model"]["image_size"] <= 64 else 8
    example = _example(run).expand(batch, -1, -1, -1).contiguous()
    layers = timed(run.layers, run.dense, run.small, example=example)
    pairs = [
        Pair(lr.name, lr.dense_ms, lr.small_ms, f"{lr.dense_ms / lr.small_ms:.2f}×" if lr.small_ms else "–", _tone(lr))
        for lr in layers
    ]
    before, after = sum(lr.dense_ms for lr in layers), sum(lr.small_ms for lr in layers)
    unit = f"{before:.3g} ms in all, {after:.3g} ms after"
    return pair_bars(pairs, title="Time of every layer before and after", unit=unit, head="speed-up"), batch


def _example(run: Run) -> torch.Tensor:
    model = run.config["model"]
    return torch.zeros(1, model["in_channels"], model["image_size"], model["image_size"])


def _tone(layer: Layer) -> int:
    return FACTORISED if layer.factorised else RESHAPED if layer.reshaped else PLAIN


def _what_stands_there(layer: Layer) -> str:
    """``12 of 16``; ``rank 5: 1×3, 3×1``; ``3×1, 12 of 16``; ``12 of 16, reads 9`` where inputs were left out as well."""
    if layer.factorised:
        ranks = ", ".join(str(stage.outputs) for stage in layer.small[:-1])
        return f"rank {ranks}: {', '.join(stage.shape for stage in layer.small)}"
    if not layer.small:
        return "left out"
    kept = layer.small[-1].outputs
    text = f"{kept}" if kept == layer.dense.outputs else f"{kept} of {layer.dense.outputs}"
    if layer.small[0].chooses:
        text += f", reads {layer.small[0].inputs}"
    return f"{layer.small[0].shape}, {text}" if layer.reshaped else text


# -- training


def accuracy_curves(run: Run) -> str:
    lines = [_curve(run, "accuracy", "test", 0), _curve(run, "train_accuracy", "training", 1)]
    epochs = [e["epoch"] for e in run.epochs]
    if (dense := run.dense_accuracy) is not None:
        lines.append(Line("dense", ((epochs[0], dense), (epochs[-1], dense)), 5, dashed=True))
    return line_chart(lines, title="Accuracy by epoch", x_label="epoch", y_label="per cent")


def loss_curves(run: Run) -> str:
    lines = [_curve(run, "test_loss", "test", 0), _curve(run, "loss", "training", 1)]
    return line_chart(lines, title="Loss by epoch", x_label="epoch", y_label="loss", low=0)


def cost_curves(run: Run) -> str:
    """Every cost that has a limit, as a share of the dense network, from the dense network on."""
    lines = []
    counted = run.metrics["counted"] or {}
    for cost, limit in run.metrics["limits"].items():
        if cost not in COST_TONES:  # time is measured at the end
            continue
        name, tone = COST_TONES[cost]
        whole = run.metrics["dense"][cost]
        points = tuple((e["epoch"], 100 * e[cost] / whole) for e in run.epochs if cost in e)
        if points:
            lines.append(Line(name, ((0.0, 100.0), *points), tone))
            lines.append(
                Line(
                    f"{'limit of the count' if cost in counted else 'limit'} {100 * limit / whole:.3g}",
                    ((0.0, 100 * limit / whole), (points[-1][0], 100 * limit / whole)),
                    tone,
                    dashed=True,
                )
            )
    if not lines:
        return ""
    return line_chart(
        lines, title="Cost by epoch", x_label="epoch", y_label="per cent of the dense network", low=0, high=100
    )


def pressure_curves(run: Run) -> str:
    lines = [_curve(run, "remaining", "remaining", 3), _curve(run, "strength", "strength", 4)]
    if not any(line.points for line in lines):
        return ""
    return line_chart(lines, title="Remaining mass and strength by epoch", x_label="epoch", y_label="share", low=0)


def width_history(run: Run) -> str:
    """The groups that changed, as shares of their widest."""
    changed = {g: points for g, points in run.widths.items() if len({n for _, n in points}) > 1}
    shares = {
        g.removesuffix(alternatives_name("")): tuple((float(e), 100 * n / max(m for _, m in points)) for e, n in points)
        for g, points in changed.items()
    }
    return bundle(shares, title="Kept units by epoch", y_label="per cent of the group")


def _curve(run: Run, column: str, name: str, tone: int) -> Line:
    return Line(name, tuple((e["epoch"], e[column]) for e in run.epochs if column in e), tone)


# -- several runs


def pareto_plot(runs: Sequence[Run], names: Sequence[str], *, cost: str) -> str:
    """Accuracy against what is left of ``cost``, or of the "time" in the last backend measured, at batch 1.

    Runs of one method have one colour.
    """
    methods = list(dict.fromkeys(run.method for run in runs))
    dots = []
    for run, name in zip(runs, names, strict=True):
        share = _time_left(run) if cost == "time" else run.metrics["fraction"][cost]
        if "accuracy" in run.metrics["small"] and share is not None:
            dots.append(Dot(name, 100 * share, run.metrics["small"]["accuracy"], methods.index(run.method) % 6))
    if not dots:
        return ""
    for dense in sorted({known for run in runs if (known := run.dense_accuracy) is not None}):
        dots.append(Dot("dense", 100.0, dense, 5, hollow=True))
    x_label = f"{PARETO_AXES[cost]} left, per cent of the dense network"
    return dot_chart(dots, title=f"Accuracy against {cost}", x_label=x_label, y_label="test accuracy, per cent")


PARETO_AXES = {"macs": "MACs", "params": "parameters", "time": "time"}


def _time_left(run: Run) -> float | None:
    timings = [t for t in run.metrics["latency"] if t["name"] == "small" and t["batch"] == 1]
    return 1 / timings[-1]["speedup"] if timings else None
