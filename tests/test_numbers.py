"""Widths that a module keeps as a number, and splits, slices, views and makes tensors by: they follow, and are saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from proving import prove, sizes
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.graph import tracing

IMAGE = torch.zeros(1, 3, 8, 8)


class Net(nn.Module):
    """Layers and numbers by name, and a forward that is a function of them."""

    def __init__(self, run: Callable[..., Any], **own: Any) -> None:
        super().__init__()
        self.run = run
        for name, value in own.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def mfm(net: Any, x: Tensor) -> Tensor:
    """LightCNN: the larger of two halves."""
    one, other = net.a(x).split(net.c, 1)
    return net.b(torch.max(one, other))


def halves(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    first, rest = y[:, : net.width // 2], y[:, net.width // 2 :]
    return net.b(torch.cat([net.inner(first), rest], 1))


def cross_stage(net: Any, x: Tensor) -> Tensor:
    """YOLO's C2f."""
    parts = list(net.a(x).split((net.c, net.c), 1))
    parts.append(net.inner(parts[-1]))
    return net.b(torch.cat(parts, 1))


def partial(net: Any, x: Tensor) -> Tensor:
    """FasterNet: a convolution over some of the channels."""
    some, rest = net.a(x).split([net.c, net.rest], 1)
    return net.b(torch.cat([net.inner(some), rest], 1).relu())


def listed(net: Any, x: Tensor) -> Tensor:
    one, two, three = net.a(x).split(net.widths, 1)
    return net.b(torch.cat([three, one * two], 1))


def selective(net: Any, x: Tensor) -> Tensor:
    """SKNet: every path has its share of the inputs, and a softmax over paths weighs what they give."""
    y = net.a(x)
    paths = torch.stack(
        [p(s) for p, s in zip((net.inner, net.other), y.split(net.width // net.paths, 1), strict=True)], 1
    )
    gate = net.gate(paths.sum(1).mean((2, 3), keepdim=True))
    b, c, h, w = gate.shape
    return net.b((paths * gate.view(b, net.paths, c // net.paths, h, w).softmax(1)).sum(1))


def ghost(net: Any, x: Tensor) -> Tensor:
    """GhostNet: cheap copies, of which one is too many."""
    y = net.a(x)
    return net.b(torch.cat([y, net.inner(y)], 1)[:, : net.out])


def gated(net: Any, x: Tensor) -> Tensor:
    """WaveNet."""
    y = net.a(x)
    return net.b(y[:, : net.c].tanh() * y[:, -net.c :].sigmoid())


def shifted(net: Any, x: Tensor) -> Tensor:
    """TSM: an eighth of the channels goes forward, an eighth back; widths in multiples of eight."""
    y = net.a(x)
    fold = y.shape[1] // net.parts
    moved = torch.zeros_like(y)
    moved[:, :fold, 1:] = y[:, :fold, :-1]
    moved[:, fold : 2 * fold, :-1] = y[:, fold : 2 * fold, 1:]
    moved[:, 2 * fold :] = y[:, 2 * fold :]
    return net.b(moved)


def attention(net: Any, x: Tensor) -> Tensor:
    y = net.a(x).flatten(2).transpose(1, 2)
    q, k, v = (m(y).view(1, 64, net.heads, net.size).transpose(1, 2) for m in (net.inner, net.other, net.third))
    y = F.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2).reshape(1, 64, net.heads * net.size)
    return net.b(y)


def padded(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    return net.b(torch.cat([y, torch.zeros(1, net.c, 8, 8, dtype=y.dtype)], 1))


def depthwise(net: Any, x: Tensor) -> Tensor:
    return net.b(F.conv2d(net.a(x), net.weight, padding=1, groups=net.c))


def of_a_layer(net: Any, x: Tensor) -> Tensor:
    y = torch.cat([net.a(x), net.inner(x)], 1)
    return net.b(torch.cat([y[:, : net.a.out_channels].relu(), y[:, net.a.out_channels :]], 1))


def compared(net: Any, x: Tensor) -> Tensor:
    """diffusers' Downsample2D and Upsample2D."""
    y = net.inner(net.a(x).relu())
    assert y.shape[1] == net.c
    return net.b(y if y.shape[1] == net.other else net.wrong(y))


ROWS: dict[str, tuple[Callable[..., Tensor], dict[str, Any], dict[str, int]]] = {
    "mfm": (mfm, {"a": conv(3, 16), "b": conv(8, 5), "c": 8}, {"a": 8}),
    "halves": (halves, {"a": conv(3, 16), "inner": conv(8, 8), "b": conv(16, 5), "width": 16}, {"a": 8, "inner": 8}),
    "cross stage": (cross_stage, {"a": conv(3, 16), "inner": conv(8, 6), "b": conv(22, 5), "c": 8}, {"a": 8, "inner": 6}),
    "partial": (
        partial, {"a": conv(3, 16), "inner": conv(4, 4), "b": conv(16, 5), "c": 4, "rest": 12}, {"a": 4, "a~2": 12, "inner": 4},
    ),
    "listed": (listed, {"a": conv(3, 20), "b": conv(12, 5), "widths": [8, 8, 4]}, {"a": 8, "a~2": 4}),
    "selective": (
        selective,
        {"a": conv(3, 16), "inner": conv(8, 6), "other": conv(8, 6), "gate": conv(6, 12, 1), "b": conv(6, 5),
         "width": 16, "paths": 2},
        {"a": 8, "inner": 6},
    ),
    "ghost": (ghost, {"a": conv(3, 8), "inner": conv(8, 8, groups=8), "b": conv(15, 5), "out": 15}, {"a": 7}),
    "gated": (gated, {"a": conv(3, 16), "b": conv(8, 5), "c": 8}, {"a": 8}),
    "shifted": (shifted, {"a": conv(3, 32), "b": conv(32, 5), "parts": 8}, {"a": 4}),
    "attention": (
        attention,
        {"a": conv(3, 8), "inner": nn.Linear(8, 12), "other": nn.Linear(8, 12), "third": nn.Linear(8, 12),
         "b": nn.Linear(12, 5), "heads": 2, "size": 6},
        {"a": 8},
    ),
    "padded": (padded, {"a": conv(3, 8), "b": conv(12, 5), "c": 4}, {"a": 8, "b": 4}),
    "depthwise": (
        depthwise, {"a": conv(3, 8), "b": conv(8, 5), "weight": nn.Parameter(torch.rand(8, 1, 3, 3)), "c": 8}, {"weight": 8},
    ),
    "compared": (
        compared, {"a": conv(3, 12), "inner": conv(12, 12), "b": conv(12, 5), "c": 12, "other": 12}, {"a": 12, "inner": 12},
    ),
    "of a layer": (of_a_layer, {"a": conv(3, 8), "inner": conv(3, 6), "b": conv(14, 5)}, {"a": 8, "inner": 6}),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_width_that_is_kept_as_a_number_follows(name: str) -> None:
    run, own, expected = ROWS[name]
    model = Net(run, **own)
    pruned = prove(model, IMAGE, macs=0.4)
    found = sizes(pruned.graph)
    assert {k: found.get(k) for k in expected} == expected, found


def test_the_numbers_of_the_small_network_are_those_of_its_layers() -> None:
    model = Net(attention, **ROWS["attention"][1])
    assert prove(model, IMAGE, macs=0.9).small.heads == 2  # heads are no width
    listed_ = prove(Net(listed, **ROWS["listed"][1]), IMAGE, macs=0.4).small
    assert sum(listed_.widths) == len(listed_.a.weight) < 20
    assert type(listed_.widths) is list


def test_a_number_that_is_computed_with_stays() -> None:
    model = Net(lambda m, x: m.b(m.a(x)[:, : m.c] / m.c), a=conv(3, 12), b=conv(8, 5), c=8)
    assert sizes(prove(model, IMAGE).graph) == {}


class Checked(nn.Module):
    """A layer that compares what it gets with a number of its own, as those of diffusers do."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels, self.layer = channels, conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == self.channels
        return self.layer(x).relu()


def test_numbers_that_several_modules_compare_with_widths_are_found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    learn, found = tracing._learn, []
    monkeypatch.setattr(tracing, "_learn", lambda *given: found.append(given) or learn(*given))
    model = nn.Sequential(conv(3, 9), *(nn.Sequential(Checked(9), conv(9, 9)) for _ in range(4)), conv(9, 2))
    graph = prove(model, IMAGE, macs=0.3).graph
    assert len(found) == 1
    assert sum(sizes(graph).values()) == 9 * 9
