"""Every family of operations on the smallest network that shows it: which channels go together, and what is rigid."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import FrozenNorm, FunctionalConv, Gate, LayerScale, Shuffle, StandardisedConv2d
from proving import prove, random_importance, randomise, reasons, sizes
from torch import Tensor, nn

from espalier.costs import cost
from espalier.graph import TraceError, TraceTimeout, trace
from espalier.plan import Budget
from espalier.solver import solve
from espalier.surgery import shrink, verify


class Net(nn.Module):
    """Layers by name, and a function of the module and its inputs as the forward."""

    def __init__(self, run: Callable[..., Any], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs: Tensor, **named: Tensor) -> Any:
        return self.run(self, *inputs, **named)


def conv(inputs: int, outputs: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / math.sqrt(math.prod(shape[1:])))


def around(middle: nn.Module, outputs: int = 16) -> Net:
    """``middle`` between a convolution that makes 16 channels and one that consumes ``outputs``."""
    return Net(lambda m, x: m.last(m.middle(m.first(x))), first=conv(3, 16), middle=middle, last=conv(outputs, 4))


class PixelNorm(nn.Module):
    """Layer norm over the channels of every pixel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


IMAGE = torch.zeros(1, 3, 8, 8)


def residual() -> nn.Module:
    layers = {"stem": conv(3, 16), "inner": conv(16, 12), "outer": conv(12, 16), "last": conv(16, 4)}
    return Net(lambda m, x: m.last((y := m.stem(x)) + m.outer(m.inner(y).relu())), **layers)


def concat() -> nn.Module:
    return Net(lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 1)), a=conv(3, 8), b=conv(3, 12), c=conv(20, 4))


def chunk() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        one, two = m.a(x).chunk(2, 1)
        return m.b(one) + m.c(two)

    return Net(run, a=conv(3, 16), b=conv(8, 4), c=conv(8, 4))


def flatten() -> nn.Module:
    layers = {"a": conv(3, 16), "b": nn.Linear(16 * 16, 24), "c": nn.Linear(24, 5)}
    return Net(lambda m, x: m.c(m.b(F.max_pool2d(m.a(x), 2).flatten(1)).relu()), **layers)


def permute() -> nn.Module:
    layers = {"a": conv(3, 16), "up": nn.Linear(16, 32), "down": nn.Linear(32, 5)}
    return Net(lambda m, x: m.down(F.gelu(m.up(m.a(x).permute(0, 2, 3, 1)))), **layers)


def separable() -> nn.Module:
    return around(nn.Sequential(conv(16, 16, groups=16), nn.Conv2d(16, 12, 1)), 12)


def line() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 16, 3), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 4, 3))


def volume() -> nn.Module:
    return nn.Sequential(nn.Conv3d(2, 16, 3), nn.BatchNorm3d(16), nn.ReLU(), nn.Conv3d(16, 4, 1))


def shared() -> nn.Module:
    return Net(lambda m, x: m.c(m.b(m.b(m.a(x)).relu())), a=conv(3, 16), b=conv(16, 16), c=conv(16, 4))


def functional() -> nn.Module:
    layers = {"kernel": parameter(16, 3, 3, 3), "hidden": parameter(12, 16), "out": parameter(5, 12)}
    return Net(
        lambda m, x: F.linear(F.linear(F.conv2d(x, m.kernel).mean((2, 3)), m.hidden).relu(), m.out),
        **layers,
    )


def tied() -> nn.Module:
    net = Net(lambda m, x: m.c(m.b(m.a(m.stem(x)))), stem=conv(3, 16), a=conv(16, 16), b=conv(16, 16), c=conv(16, 4))
    net.b.weight = net.a.weight
    return net


PRUNABLE: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[str, int]]] = {
    "residual add": (residual, IMAGE, {"stem": 16, "inner": 12}),
    "concat": (concat, IMAGE, {"a": 8, "b": 12}),
    "chunk": (chunk, IMAGE, {"a": 8}),
    "flatten into linear": (flatten, IMAGE, {"a": 16, "b": 24}),
    "permute": (permute, IMAGE, {"a": 16, "up": 32}),
    "pixel shuffle": (lambda: around(nn.PixelShuffle(2), 4), IMAGE, {"first": 4}),
    "pixel unshuffle": (lambda: around(nn.PixelUnshuffle(2), 64), IMAGE, {"first": 16}),
    "channel shuffle by views": (lambda: around(Shuffle(2)), IMAGE, {"first": 8}),
    "channel shuffle": (lambda: around(nn.ChannelShuffle(2)), IMAGE, {"first": 8}),
    "depthwise": (separable, IMAGE, {"first": 16, "middle.1": 12}),
    "two groups": (lambda: around(conv(16, 16, groups=2)), IMAGE, {"first": 8, "middle": 8}),
    "eight groups": (lambda: around(conv(16, 16, groups=8)), IMAGE, {"first": 8}),
    "transposed": (lambda: around(nn.ConvTranspose2d(16, 12, 2, 2), 12), IMAGE, {"first": 16, "middle": 12}),
    "grouped transposed": (
        lambda: around(nn.ConvTranspose2d(16, 16, 2, 2, groups=8)),
        IMAGE,
        {"first": 8},
    ),
    "1-d": (line, torch.zeros(1, 2, 12), {"0": 16}),
    "3-d": (volume, torch.zeros(1, 2, 5, 5, 5), {"0": 16}),
    "squeeze-excite, linear": (lambda: around(Gate(16, 6, True)), IMAGE, {"first": 16, "middle.down": 6}),
    "squeeze-excite, 1x1": (lambda: around(Gate(16, 6, False)), IMAGE, {"first": 16, "middle.down": 6}),
    "batch norm": (lambda: around(nn.BatchNorm2d(16)), IMAGE, {"first": 16}),
    "group norm": (lambda: around(nn.GroupNorm(4, 16)), IMAGE, {"first": 4}),
    "instance norm": (lambda: around(nn.InstanceNorm2d(16, affine=True)), IMAGE, {"first": 16}),
    "frozen batch norm": (lambda: around(FrozenNorm(16)), IMAGE, {"first": 16}),
    "layer scale": (lambda: around(LayerScale(16)), IMAGE, {"first": 16}),
    "weight-standardised": (
        lambda: around(StandardisedConv2d(16, 12, 3, padding=1), 12),
        IMAGE,
        {"first": 16, "middle": 12},
    ),
    "shared module": (shared, IMAGE, {"a": 16}),
    "functional": (functional, IMAGE, {"kernel": 16, "hidden": 12}),
    "functional convolution": (lambda: around(FunctionalConv(16, 12), 12), IMAGE, {"first": 16, "middle.kernel": 12}),
    "GLU": (lambda: around(nn.GLU(1), 8), IMAGE, {"first": 8}),
    "PReLU": (lambda: around(nn.PReLU(16)), IMAGE, {"first": 16}),
    "tied parameters": (tied, IMAGE, {"stem": 16}),
}


@pytest.mark.parametrize("family", PRUNABLE)
def test_what_can_be_pruned_is_proven(family: str) -> None:
    torch.manual_seed(0)
    build, example, expected = PRUNABLE[family]
    model = build()
    graph, plan, small = prove(model, example, macs=0.6)
    assert sizes(graph) == expected, reasons(graph)
    assert not graph.unknown and not graph.notes
    assert cost(graph, plan).macs <= 0.6 * cost(graph).macs
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


# -- what is rigid -----------------------------------------------------------------------------------------------------


def split_fixed(m: Any, x: Tensor) -> Tensor:
    one, two = torch.split(m.a(x), [6, 10], 1)
    return m.c(torch.cat([two, one], 1))


def slice_fixed(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.c(y[:, :16])


def view_fixed(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    y = y.view(y.shape[0], 64, -1)
    return m.c(y.sort(-1).values)


def split_net() -> nn.Module:
    return Net(split_fixed, a=conv(3, 16), c=nn.Sequential(conv(16, 12), conv(12, 4)))


def slice_net() -> nn.Module:
    return Net(slice_fixed, a=conv(3, 24), c=nn.Sequential(conv(16, 12), conv(12, 4)))


def view_net() -> nn.Module:
    return Net(view_fixed, a=conv(3, 64), c=nn.Sequential(nn.Conv1d(64, 12, 3), nn.Conv1d(12, 4, 1)))


@pytest.mark.parametrize(
    ("build", "forward"), [(split_net, split_fixed), (slice_net, slice_fixed), (view_net, view_fixed)]
)
def test_a_width_written_into_the_forward_freezes_its_line_only(
    build: Callable[[], nn.Module], forward: Callable[..., Tensor]
) -> None:
    torch.manual_seed(0)
    graph, _, _ = prove(build(), IMAGE, macs=0.6)
    assert sizes(graph) == {"c.0": 12}
    code = forward.__code__
    said = re.findall(r"test_graph\.py:(\d+)", reasons(graph))
    assert any(code.co_firstlineno < int(number) <= code.co_firstlineno + 4 for number in said), reasons(graph)
    stuck = [f for f in graph.frozen if f.tensor == "a.weight" and f.dim == 0]
    assert sum(f.count for f in stuck) == graph.shapes["a.weight"][0]


def test_a_layer_norm_over_channels_freezes_them_and_names_itself() -> None:
    net = around(nn.Sequential(PixelNorm(16), conv(16, 12)), 12)
    graph, _, _ = prove(net, IMAGE, macs=0.6)
    assert sizes(graph) == {"middle.1": 12}
    assert "middle.0.norm [LayerNorm]" in reasons(graph)


# -- inputs, outputs, modes --------------------------------------------------------------------------------------------


def test_two_inputs_and_nested_outputs() -> None:
    def run(m: Any, left: Tensor, right: Tensor) -> Any:
        y = m.a(left) + m.b(right)
        return {"map": m.c(y), "rest": [m.d(y), {"raw": m.e(y)}]}

    net = Net(run, a=conv(3, 16), b=conv(1, 16), c=conv(16, 2), d=conv(16, 3), e=conv(16, 5))
    for example in [(IMAGE, IMAGE[:, :1]), {"left": IMAGE, "right": IMAGE[:, :1]}]:
        graph, _, small = prove(net, example, macs=0.6)
        assert sizes(graph) == {"a": 16}
        assert "c.weight[0] x2: is an output of the model" in reasons(graph)
    assert small(IMAGE, IMAGE[:, :1])["rest"][1]["raw"].shape == (1, 5, 8, 8)


def test_an_auxiliary_head_shrinks_although_only_training_runs_it() -> None:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        return (m.c(y), m.aux(y)) if m.training else m.c(y)

    _, _, small = prove(Net(run, a=conv(3, 16), c=conv(16, 4), aux=conv(16, 4)), IMAGE, macs=0.6)
    assert small.aux.in_channels == small.c.in_channels < 16
    main, aux = small.train()(IMAGE)
    assert main.shape == aux.shape == (1, 4, 8, 8)


def test_a_data_dependent_forward_is_traced_on_the_cpu() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.c(y * 2 if x.sum().item() > 0 else y)

    net = randomise(Net(run, a=conv(3, 16), c=conv(16, 4))).eval()
    graph = trace(net, IMAGE + 1)
    budget = Budget(macs=0.6)
    plan = solve(graph, random_importance(graph), budget)
    verify(net, graph, plan, IMAGE + 1, budget=budget).require()
    assert sizes(graph) == {"a": 16} and shrink(net, graph, plan).a.out_channels < 16


def test_tracing_leaves_the_model_alone() -> None:
    net = residual().train()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    trace(net, IMAGE)
    assert net.training and all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert not any(hooks for m in net.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks))


# -- errors ------------------------------------------------------------------------------------------------------------


def test_a_forward_that_fails_is_named() -> None:
    net = nn.Sequential(conv(3, 16), nn.Sequential(nn.ReLU(), conv(12, 4)))
    with pytest.raises(TraceError, match=r"the forward failed on the example input: .*: 1\.1 \[Conv2d\]"):
        trace(net, IMAGE)


def test_a_time_limit_is_kept_and_names_the_operation() -> None:
    with pytest.raises(TraceTimeout, match=r"time limit at aten\.convolution.* in stem \[Conv2d\]"):
        trace(residual(), IMAGE, time_limit=0)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(ValueError, match="got function"):
        trace(lambda x: x, IMAGE)
