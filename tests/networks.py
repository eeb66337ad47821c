"""Random convolutional networks: what a fixed zoo does not think of.

``random_network(pick)`` asks ``pick(options)`` for every decision, so that Hypothesis can shrink a failing network, and
``random.Random(seed).choice`` makes thousands for a soak.  Every operation of the network is a small module of its own:
a source line that proves to be rigid does not take others with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espalier.layers import ChannelPad

T = TypeVar("T")
Pick = Callable[[Sequence[Any]], Any]
Shape = tuple[int, int]  # channels, side of the square map


@dataclass(frozen=True)
class Step:
    """One operation: a module, made when the network is built, on the maps numbered ``inputs``."""

    kind: str
    inputs: tuple[int, ...]
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """A whole network as plain data; its ``repr`` reproduces a failure."""

    steps: tuple[Step, ...]
    heads: tuple[Step, ...]
    form: str  # how outputs are returned
    channels: int  # of the image
    side: int
    seed: int = 0

    def build(self) -> nn.Module:
        torch.manual_seed(self.seed)
        return Network(self)

    def example(self) -> Tensor:
        return torch.zeros(1, self.channels, self.side, self.side)


class Network(nn.Module):
    """Carries out a recipe: maps are numbered in the order in which they are made, 0 is the image."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        made: list[nn.Module] = []
        for step in recipe.steps:
            again = step.kind == "again"
            made.append(made[step.arguments[0]] if again else MODULES[step.kind](*step.arguments))
        self.body = nn.ModuleList(made)
        self.heads = nn.ModuleList(MODULES[step.kind](*step.arguments) for step in recipe.heads)

    def forward(self, x: Tensor) -> Any:
        maps = [x]
        for step, module in zip(self.recipe.steps, self.body, strict=True):
            result = module(*[maps[i] for i in step.inputs])
            maps += result if isinstance(result, (tuple, list)) else [result]
        outputs = [
            head(*[maps[i] for i in step.inputs]) for step, head in zip(self.recipe.heads, self.heads, strict=True)
        ]
        if self.recipe.form == "tensor":
            return outputs[0]
        return tuple(outputs) if self.recipe.form == "tuple" else {"first": outputs[0], "rest": outputs[1:]}


# -- modules: one per kind of step -------------------------------------------------------------------------------------


def normalisation(kind: str, channels: int) -> nn.Module:
    """A norm by name; ``group`` falls back to the largest number of groups below five that divides."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "instance":
        return nn.InstanceNorm2d(channels, affine=channels % 2 == 0)
    if kind == "group":
        return nn.GroupNorm(next(g for g in (4, 3, 2, 1) if channels % g == 0), channels, affine=channels % 4 != 0)
    return FrozenNorm(channels) if kind == "frozen" else nn.Identity()


def activation(kind: str, channels: int) -> nn.Module:
    if kind == "prelu":
        return nn.PReLU(channels)
    return {"relu": nn.ReLU(inplace=True), "silu": nn.SiLU(), "sigmoid": nn.Sigmoid(), "none": nn.Identity()}[kind]


class FrozenNorm(nn.Module):
    """Buffers only, as detectors have it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


class StandardisedConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.flatten(1).std(1).view(-1, 1, 1, 1) + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class FunctionalConv(nn.Module):
    """A convolution on a bare parameter."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(outputs, inputs, 3, 3) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, padding=1)


def conv(
    inputs: int, outputs: int, kernel: int, stride: int, groups: int, norm: str, act: str, bias: bool
) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias),
        normalisation(norm, outputs),
        activation(act, outputs),
    )


def transposed(inputs: int, outputs: int, groups: int, norm: str, act: str) -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(inputs, outputs, 2, stride=2, groups=groups),
        normalisation(norm, outputs),
        activation(act, outputs),
    )


class Add(nn.Module):
    def forward(self, *maps: Tensor) -> Tensor:
        total = maps[0]
        for other in maps[1:]:
            total = total + other
        return total


class AddInPlace(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a = a.clone()
        a += b
        return a


class Multiply(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a * torch.sigmoid(b)


class Concat(nn.Module):
    def forward(self, *maps: Tensor) -> Tensor:
        return torch.cat(maps, 1)


class Chunk(nn.Module):
    def __init__(self, pieces: int) -> None:
        super().__init__()
        self.pieces = pieces

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.chunk(self.pieces, 1)


class SplitHalf(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return torch.split(x, x.shape[1] // 2, 1)


class SplitFixed(nn.Module):
    """A width written into the forward: rigid, and it must be found out."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__()
        self.widths = [first, second]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return torch.split(x, self.widths, 1)


class FirstFixed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return x[:, : self.width]


class FirstHalf(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, : x.shape[1] // 2]


class Shuffle(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return x.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(b, c, h, w)


class Unshuffle(nn.Module):
    """The same the other way round: the first factor is the one that shrinks."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return x.view(b, c // self.groups, self.groups, h, w).transpose(1, 2).reshape(b, c, h, w)


class Gate(nn.Module):
    """Squeeze-and-excite, with 1x1 convolutions or with linear layers and views."""

    def __init__(self, channels: int, inner: int, linear: bool) -> None:
        super().__init__()
        self.linear = linear
        layer = nn.Linear if linear else nn.Conv2d
        kernel = () if linear else (1,)
        self.down, self.up = layer(channels, inner, *kernel), layer(inner, channels, *kernel)

    def forward(self, x: Tensor) -> Tensor:
        b, c = x.shape[:2]
        pooled = F.adaptive_avg_pool2d(x, 1)
        if self.linear:
            pooled = pooled.view(b, c)
        gate = torch.sigmoid(self.up(torch.relu(self.down(pooled))))
        return x * gate.view(b, c, 1, 1)


class ChannelsLast(nn.Module):
    """LayerNorm and a two-layer MLP with the channels at the end, around a residual: ConvNeXt's block."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.up, self.down = nn.Linear(channels, inner), nn.Linear(inner, channels)
        self.scale = nn.Parameter(torch.full((channels,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x.permute(0, 2, 3, 1))
        y = self.down(F.gelu(self.up(y))) * self.scale
        return x + y.permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Non-local block: the values may shrink, queries and keys meet each other."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.query, self.key = nn.Conv2d(channels, inner, 1), nn.Conv2d(channels, inner, 1)
        self.value, self.out = nn.Conv2d(channels, inner, 1), nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        query, key, value = (f(x).flatten(2) for f in (self.query, self.key, self.value))
        weights = torch.softmax(query.transpose(1, 2) @ key, dim=-1)
        return x + self.out((value @ weights.transpose(1, 2)).view(b, -1, h, w))


class SpatialGate(nn.Module):
    """A statistic over channels: what feeds it is rigid."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        summary = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.conv(summary))


class LayerScale(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(channels, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * x


class Constant(nn.Module):
    """A buffer per channel goes along; a tensor made in the forward does not."""

    def __init__(self, channels: int, registered: bool) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("mask", torch.linspace(0.5, 1.5, channels).view(1, -1, 1, 1) if registered else None)

    def forward(self, x: Tensor) -> Tensor:
        mask = self.mask
        return x * (torch.full((1, self.channels, 1, 1), 0.5, device=x.device, dtype=x.dtype) if mask is None else mask)


class SquareStack(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([a, b], 2).amax(2)


class RigidView(nn.Module):
    """The number of channels is written into the view."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], self.channels, -1).sort(-1).values.view(x.shape)


class PooledHead(nn.Module):
    def __init__(self, channels: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class FlatHead(nn.Module):
    def __init__(self, channels: int, side: int, classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels * side * side, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.reshape(x.size(0), -1))


class MeanHead(nn.Module):
    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


MODULES: dict[str, Callable[..., nn.Module]] = {
    "conv": conv,
    "functional": FunctionalConv,
    "standardised": lambda i, o, g: StandardisedConv2d(i, o, 3, padding=1, groups=g),
    "transposed": transposed,
    "add": Add,
    "add_": AddInPlace,
    "multiply": Multiply,
    "stack": SquareStack,
    "concat": Concat,
    "chunk": Chunk,
    "half": SplitHalf,
    "first half": FirstHalf,
    "split fixed": SplitFixed,
    "first fixed": FirstFixed,
    "rigid view": RigidView,
    "shuffle": Shuffle,
    "unshuffle": Unshuffle,
    "channel shuffle": nn.ChannelShuffle,
    "pixel shuffle": lambda: nn.PixelShuffle(2),
    "pixel unshuffle": lambda: nn.PixelUnshuffle(2),
    "glu": lambda: nn.GLU(1),
    "max pool": lambda: nn.MaxPool2d(2),
    "avg pool": lambda: nn.AvgPool2d(3, 1, 1),
    "upsample": lambda: nn.Upsample(scale_factor=2),
    "gate": Gate,
    "channels last": ChannelsLast,
    "attention": Attention,
    "spatial gate": SpatialGate,
    "scale": LayerScale,
    "constant": Constant,
    "norm": normalisation,
    "pad": lambda before, after: ChannelPad(before, after),
    "pooled": PooledHead,
    "flat": FlatHead,
    "mean": MeanHead,
    "map": lambda i, o: nn.Conv2d(i, o, 1),
    "feature": nn.Identity,
}

RIGID = {"split fixed", "first fixed", "rigid view"}
"""Steps whose forward works for one width only."""


# -- choosing ----------------------------------------------------------------------------------------------------------


@dataclass
class _Draft:
    """The network so far: the shape of every map, and what may be used again."""

    pick: Pick
    shapes: list[Shape]
    steps: list[Step]
    widths: tuple[int, ...]

    def add(self, kind: str, inputs: Sequence[int], arguments: Sequence[Any], *made: Shape) -> None:
        self.steps.append(Step(kind, tuple(inputs), tuple(arguments)))
        self.shapes += made


def random_network(pick: Pick, *, longest: int = 12) -> Recipe:
    """A network of up to ``longest`` steps, drawn with ``pick(options)``."""
    side, channels = pick([4, 6, 8]), pick([3, 1, 2])
    draft = _Draft(pick, [(channels, side)], [], pick([(4, 6, 8, 12), (8, 16), (2, 3, 4, 5), (6, 12, 24)]))
    _conv(draft)
    for _ in range(pick(range(longest))):
        _step(draft)
    heads = [_head(draft, recent=True)]
    for _ in range(pick([0, 0, 1, 2])):
        heads.append(_head(draft, recent=False))
    form = pick(["tuple", "dict"]) if len(heads) > 1 else pick(["tensor", "tuple"])
    return Recipe(tuple(draft.steps), tuple(heads), form, channels, side, pick(range(4)))


def _recent(draft: _Draft) -> int:
    """Mostly one of the last maps, so that networks grow deep rather than wide."""
    last = len(draft.shapes) - 1
    return max(0, last - draft.pick([0, 0, 0, 1, 1, 2, 3, 5]))


def _matching(draft: _Draft, at: int) -> list[int]:
    return [i for i, shape in enumerate(draft.shapes) if shape == draft.shapes[at]]


def _conv(draft: _Draft) -> None:
    pick, at = draft.pick, _recent(draft)
    channels, side = draft.shapes[at]
    groups = pick([1, 1, 1, *(g for g in (2, 3, 4, 6, 8) if channels % g == 0), channels])
    outputs = groups * pick([1, 2]) if groups == channels > 1 else pick(draft.widths)
    if outputs % groups:
        outputs = groups * max(1, outputs // groups)
    stride = pick([1, 1, 2]) if side % 2 == 0 and side > 2 else 1
    norm = pick(["batch", "none", "frozen", "batch"] + ["group", "instance"] * (side > stride))
    act = pick(["relu", "none", "silu", "prelu", "sigmoid"])
    arguments = (channels, outputs, pick([3, 1]), stride, groups, norm, act, pick([True, False]))
    draft.add("conv", [at], arguments, (outputs, side // stride))


def _project(draft: _Draft, at: int, shape: Shape) -> int:
    """A map of ``shape``, made from map ``at``, which is of the same side."""
    channels, side = draft.shapes[at]
    draft.add("conv", [at], (channels, shape[0], 1, 1, 1, draft.pick(["batch", "none"]), "none", True), shape)
    assert side == shape[1]
    return len(draft.shapes) - 1


def _merge(draft: _Draft) -> None:
    """Add, multiply or stack maps of one shape; where there is only one, a projection makes another."""
    pick, at = draft.pick, _recent(draft)
    others = [i for i in _matching(draft, at) if i != at]
    if not others:
        same_side = [i for i, s in enumerate(draft.shapes) if s[1] == draft.shapes[at][1]]
        others = [_project(draft, pick(same_side), draft.shapes[at])]
    other = pick(others)
    kind = pick(["add", "add", "add_", "multiply", "stack"])
    draft.add(kind, [at, other], (), draft.shapes[at])


def _concat(draft: _Draft) -> None:
    at = _recent(draft)
    same_side = [i for i, s in enumerate(draft.shapes) if s[1] == draft.shapes[at][1]]
    chosen = [at, *(draft.pick(same_side) for _ in range(draft.pick([1, 2])))]
    total = sum(draft.shapes[i][0] for i in chosen)
    if total <= 64:
        draft.add("concat", chosen, (), (total, draft.shapes[at][1]))


def _cut(draft: _Draft) -> None:
    pick, at = draft.pick, _recent(draft)
    channels, side = draft.shapes[at]
    options = []
    if channels % 2 == 0 and channels > 2:
        half = (channels // 2, side)
        options += [
            ("half", (), [half, half]), ("first half", (), [half]), ("glu", (), [half]), ("chunk", (2,), [half, half])
        ]  # fmt: skip
    if channels % 3 == 0 and channels > 3:
        options.append(("chunk", (3,), [(channels // 3, side)] * 3))
    if channels > 3:
        first = pick(range(1, channels - 1))
        options += [
            ("split fixed", (first, channels - first), [(first, side), (channels - first, side)]),
            ("first fixed", (first,), [(first, side)]),
        ]
    if options:
        kind, arguments, made = pick(options)
        draft.add(kind, [at], arguments, *made)


def _rearrange(draft: _Draft) -> None:
    pick, at = draft.pick, _recent(draft)
    channels, side = draft.shapes[at]
    options: list[tuple[str, tuple[Any, ...], Shape]] = [
        (kind, (groups,), (channels, side))
        for groups in (2, 3, 4)
        if channels % groups == 0
        for kind in ("shuffle", "unshuffle", "channel shuffle")
    ]
    if channels % 4 == 0 and side <= 8:
        options.append(("pixel shuffle", (), (channels // 4, side * 2)))
    if side % 2 == 0 and channels <= 8:
        options.append(("pixel unshuffle", (), (channels * 4, side // 2)))
    options.append(("rigid view", (channels,), (channels, side)))
    kind, arguments, made = pick(options)
    draft.add(kind, [at], arguments, made)


def _resize(draft: _Draft) -> None:
    pick, at = draft.pick, _recent(draft)
    channels, side = draft.shapes[at]
    options: list[tuple[str, tuple[Any, ...], Shape]] = [("avg pool", (), (channels, side))]
    if side % 2 == 0:
        options.append(("max pool", (), (channels, side // 2)))
    if side <= 4:
        options.append(("upsample", (), (channels, side * 2)))
        groups = pick([1, *(g for g in (2, 3, 4) if channels % g == 0), channels])
        outputs = groups * pick([1, 2, 3])
        norm, act = pick(["batch", "none", "group"]), pick(["relu", "none"])
        options.append(("transposed", (channels, outputs, groups, norm, act), (outputs, side * 2)))
    kind, arguments, made = options[-1] if pick([True, False]) else pick(options)
    draft.add(kind, [at], arguments, made)


def _block(draft: _Draft) -> None:
    pick, at = draft.pick, _recent(draft)
    channels, side = draft.shapes[at]
    width = pick(draft.widths)
    groups = pick([1, *(g for g in (2, 4) if channels % g == 0 and width % g == 0)])
    kind, arguments, made = pick(
        [
            ("gate", (channels, pick([2, 4, 6]), pick([True, False])), (channels, side)),
            ("scale", (channels,), (channels, side)),
            ("norm", (pick(["batch", "group", "instance", "frozen"]), channels), (channels, side)),
            ("functional", (channels, width), (width, side)),
            ("standardised", (channels, width, groups), (width, side)),
            ("channels last", (channels, width), (channels, side)),
            ("attention", (channels, width), (channels, side)),
            ("spatial gate", (), (channels, side)),
            ("constant", (channels, pick([True, True, False])), (channels, side)),
            ("pad", (pick([0, 1, 2]), pick([0, 2, 3])), (channels, side)),
        ]
    )
    if kind == "pad":
        made = (channels + sum(arguments), side)
    draft.add(kind, [at], arguments, made)


def _again(draft: _Draft) -> None:
    """Use a module a second time, on another map of the shape it was made for."""
    candidates = []
    position = 1
    for number, step in enumerate(draft.steps):
        if step.kind in ("conv", "functional", "standardised", "gate", "channels last", "norm", "scale"):
            before = draft.shapes[step.inputs[0]]
            candidates += [(number, i, position) for i, s in enumerate(draft.shapes) if s == before and i > 0]
        position += len(_made_by(step))
    if candidates:
        number, at, made = draft.pick(candidates)
        draft.add("again", [at], (number,), draft.shapes[made])


def _made_by(step: Step) -> range:
    if step.kind == "chunk":
        return range(step.arguments[0])
    return range(2 if step.kind in ("half", "split fixed") else 1)


def _step(draft: _Draft) -> None:
    kinds = [_conv, _conv, _conv, _merge, _merge, _concat, _cut, _rearrange, _resize, _block, _block, _again]
    draft.pick(kinds)(draft)


def _head(draft: _Draft, *, recent: bool) -> Step:
    pick = draft.pick
    at = len(draft.shapes) - 1 if recent else pick(range(len(draft.shapes)))
    channels, side = draft.shapes[at]
    classes = pick([3, 1, 10])
    kind, arguments = pick(
        [
            ("pooled", (channels, pick([4, 6]), classes)),
            ("flat", (channels, side, classes)),
            ("mean", (channels, classes)),
            ("map", (channels, classes)),
            ("map", (channels, classes)),
            ("feature", ()),
        ]
    )
    return Step(kind, (at,), arguments)
