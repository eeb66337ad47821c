"""Random programs: a forward that is a straight line of operations on tensors, parameters and Python numbers.

The second generator beside ``networks.py``.  There every operation is a module of its own, so that a source line says which
layer it is in; here a whole network is one ``forward`` with one statement a line, as people write it: functional calls on bare
parameters, widths kept as numbers, branches on shapes, weights used twice.  ``random_program(pick)`` asks ``pick(options)`` for
every decision; the program is its source text, which is all that is needed to repeat a failure.
"""

from __future__ import annotations

import linecache
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rigid import is_rigid
from torch import Tensor, nn

Pick = Callable[[Sequence[Any]], Any]

HEAD = "import torch\nimport torch.nn.functional as F\nfrom torch import nn\n\n\nclass Program(nn.Module):\n"


@dataclass(frozen=True)
class Program:
    """Statements of ``__init__`` and of ``forward``, and the shapes of the inputs without the batch."""

    init: tuple[str, ...]
    forward: tuple[str, ...]
    inputs: tuple[tuple[int, ...], ...]
    seed: int = 0

    @property
    def source(self) -> str:
        names = ", ".join(f"x{i}" for i in range(len(self.inputs)))
        made = "".join(f"        {line}\n" for line in ("super().__init__()", *self.init))
        done = "".join(f"        {line}\n" for line in self.forward)
        return f"{HEAD}    def __init__(self):\n{made}\n    def forward(self, {names}):\n{done}"

    def build(self) -> nn.Module:
        """The network, with values that leave no channel idle by accident."""
        text, made = self.source, {}
        name = f"program_{zlib.crc32(text.encode()):08x}.py"
        linecache.cache[name] = (
            len(text),
            None,
            text.splitlines(keepends=True),
            name,
        )  # for messages that quote a line
        exec(compile(text, name, "exec"), made)
        torch.manual_seed(self.seed)
        return made["Program"]()

    @property
    def rigid(self) -> bool:
        """Can nothing go?  By the proof of ``rigid.py``."""
        return is_rigid(self)

    def example(self, batch: int = 1) -> tuple[Tensor, ...]:
        return tuple(torch.zeros(batch, *shape) for shape in self.inputs)


@dataclass(frozen=True)
class Value:
    """A tensor of the program: ``kind`` says where its channels are.

    ``map`` (b, c, h, w), ``seq`` (b, c, n), ``tok`` (b, n, c), ``vec`` (b, c); ``space`` is (h, w), (n,) or ().
    """

    name: str
    kind: str
    width: int
    space: tuple[int, ...] = ()

    @property
    def dim(self) -> int:
        return 2 if self.kind == "tok" else 1


@dataclass
class Draft:
    """The program so far."""

    pick: Pick
    values: list[Value] = field(default_factory=list)
    init: list[str] = field(default_factory=list)
    forward: list[str] = field(default_factory=list)
    widths: tuple[int, ...] = (8,)
    shared: list[tuple[str, str, int, int]] = field(
        default_factory=list
    )  # layers that fit once more: call, kind, in, out

    def declare(self, expression: str) -> str:
        name = f"self.p{len(self.init)}"
        self.init.append(f"{name} = {expression}")
        return name

    def parameter(self, *shape: int, scale: float = 0.0) -> str:
        """A bare parameter; of a weight by default with the scale that keeps the variance."""
        fan_in = max(1, torch.Size(shape[1:]).numel()) if len(shape) > 1 else 1
        return self.declare(f"nn.Parameter(torch.randn({', '.join(map(str, shape))}) * {scale or fan_in**-0.5:.3f})")

    def add(self, expression: str, kind: str, width: int, space: tuple[int, ...] = ()) -> Value:
        value = Value(f"v{len(self.forward)}", kind, width, space)
        self.forward.append(f"{value.name} = {expression}")
        self.values.append(value)
        return value

    def several(self, expression: str, like: Value, widths: Sequence[int]) -> list[Value]:
        base = len(self.forward)
        made = [Value(f"v{base}_{i}", like.kind, w, like.space) for i, w in enumerate(widths)]
        self.forward.append(f"{', '.join(v.name for v in made)} = {expression}")
        self.values += made
        return made

    def recent(self, *kinds: str) -> Value | None:
        """Mostly one of the last values of these kinds."""
        some = [v for v in self.values if v.kind in kinds]
        return some[max(0, len(some) - 1 - self.pick([0, 0, 0, 0, 0, 1, 1, 3]))] if some else None

    def number(self, value: Value) -> str:
        """An expression for the width of ``value``, as somebody would write it."""
        own = f"{value.name}.shape[{value.dim}]"
        kind = self.pick(["own", "own", "own", "size", "kept", "kept", "literal"])
        if kind == "kept":
            return self.declare(str(value.width))
        return {"own": own, "size": f"{value.name}.size({value.dim})", "literal": str(value.width)}[kind]


Statement = Callable[[Draft], None]
STATEMENTS: list[tuple[int, Statement]] = []


def statement(weight: int) -> Callable[[Statement], Statement]:
    def register(function: Statement) -> Statement:
        STATEMENTS.append((weight, function))
        return function

    return register


# -- layers ------------------------------------------------------------------------------------------------------------


@statement(7)
def conv(d: Draft) -> None:
    v = d.recent("map", "map", "seq")
    if v is None:
        return
    n, width = len(v.space), d.pick(d.widths)
    made = v.name.startswith("v")  # to cut an image's channels into groups is nobody's idea
    groups = d.pick([1, 1, 1, *(g for g in (2, 4) if made and v.width % g == 0 and width % g == 0)])
    number = str(groups)
    if made and d.pick([0, 0, 0, 0, 1]):  # depthwise
        width = groups = v.width
        number = f"{v.name}.shape[1]"
    kernel = d.pick([1, 3, 3])
    stride = d.pick([1, 1, 1, 2]) if min(v.space) >= 4 and kernel == 3 else 1
    space = tuple((s + 2 * (kernel // 2) - kernel) // stride + 1 for s in v.space)
    options = f"stride={stride}, padding={kernel // 2}, groups="
    if d.pick([0, 1]):
        layer = d.declare(f"nn.Conv{n}d({v.width}, {width}, {kernel}, {options}{groups}, bias={d.pick([True, False])})")
        call = f"{layer}({{}})"
    else:
        weight = d.parameter(width, v.width // groups, *[kernel] * n)
        bias = d.parameter(width, scale=0.1) if d.pick([0, 1]) else "None"
        call = f"F.conv{n}d({{}}, {weight}, {bias}, {options}{number})"
    d.add(call.format(v.name), v.kind, width, space)
    if stride == 1 and number.isdigit():
        d.shared.append((call, v.kind, v.width, width))


@statement(4)
def block(d: Draft) -> None:
    """Two layers around something wider or narrower, and a way past them."""
    v = d.recent("map", "map", "seq", "tok", "vec")
    if v is None:
        return
    x, inner, act = v.name, 2 * d.pick(d.widths), d.pick(["relu", "gelu", "silu"])
    if v.kind in ("tok", "vec"):
        down, up = d.declare(f"nn.Linear({v.width}, {inner})"), d.parameter(v.width, inner)
        y = d.add(f"F.linear(F.{act}({down}({x})), {up})", v.kind, v.width, v.space)
    else:
        n = len(v.space)
        down, normed = (
            d.declare(f"nn.Conv{n}d({v.width}, {inner}, 3, padding=1)"),
            d.declare(f"nn.BatchNorm{n}d({inner})"),
        )
        up = d.parameter(v.width, inner, *[1] * n)
        y = d.add(f"F.conv{n}d(F.{act}({normed}({down}({x}))), {up})", v.kind, v.width, v.space)
    if d.pick([0, 1, 1]):
        d.add(
            d.pick([f"{x} + {y.name}", f"{y.name}.add({x})", f"torch.add({x}, {y.name}, alpha=0.5)"]),
            v.kind,
            v.width,
            v.space,
        )


@statement(2)
def conv_transpose(d: Draft) -> None:
    v = d.recent("map", "seq")
    if v is None or max(v.space) > 5:
        return
    n, width = len(v.space), d.pick(d.widths)
    groups = d.pick([1, 1, *(g for g in (2,) if v.width % g == 0 and width % g == 0)])
    space = tuple(2 * s for s in v.space)
    if d.pick([0, 1]):
        layer = d.declare(f"nn.ConvTranspose{n}d({v.width}, {width}, 2, stride=2, groups={groups})")
        d.add(f"{layer}({v.name})", v.kind, width, space)
    else:
        weight = d.parameter(v.width, width // groups, *[2] * n)
        d.add(f"F.conv_transpose{n}d({v.name}, {weight}, stride=2, groups={groups})", v.kind, width, space)


@statement(4)
def linear(d: Draft) -> None:
    v = d.recent("vec", "tok")
    if v is None:
        return
    width = d.pick(d.widths)
    form = d.pick(["module", "module", "functional", "matmul", "einsum", "addmm"])
    if form == "module":
        call = f"{d.declare(f'nn.Linear({v.width}, {width})')}({{}})"
    elif form == "functional":
        call = f"F.linear({{}}, {d.parameter(width, v.width)}, {d.parameter(width, scale=0.1)})"
    elif form == "matmul":
        call = f"{{}} @ {d.parameter(v.width, width)}"
    elif form == "einsum":
        letters = "bnc" if v.kind == "tok" else "bc"
        call = f"torch.einsum('{letters},oc->{letters[:-1]}o', {{}}, {d.parameter(width, v.width)})"
    elif v.kind == "vec":
        call = f"torch.addmm({d.parameter(width, scale=0.1)}, {{}}, {d.parameter(v.width, width)})"
    else:
        call = f"torch.matmul({{}}, {d.parameter(width, v.width)}.t())"
    d.add(call.format(v.name), v.kind, width, v.space)
    d.shared.append((call, v.kind, v.width, width))


@statement(2)
def mixed_channels(d: Draft) -> None:
    """A 1x1 convolution by another name."""
    v = d.recent("map")
    if v is None:
        return
    width = d.pick(d.widths)
    weight = d.parameter(width, v.width)
    if d.pick([0, 1]):
        d.add(f"torch.einsum('bchw,oc->bohw', {v.name}, {weight})", "map", width, v.space)
    else:
        d.add(f"({weight} @ {v.name}.flatten(2)).unflatten(2, {v.name}.shape[2:])", "map", width, v.space)


@statement(2)
def again(d: Draft) -> None:
    """A layer used a second time."""
    fits = [
        (call, v, out) for call, kind, width, out in d.shared for v in d.values if (v.kind, v.width) == (kind, width)
    ]
    if fits:
        call, v, out = d.pick(fits)
        d.add(call.format(v.name), v.kind, out, v.space)


@statement(1)
def tied(d: Draft) -> None:
    """One weight there and back, as tied decoders have it."""
    v = d.recent("vec", "tok", "map")
    if v is None:
        return
    width = d.pick(d.widths)
    if v.kind == "map":
        weight = d.parameter(width, v.width, 3, 3)
        inner = d.add(f"F.conv2d({v.name}, {weight}, padding=1).relu()", "map", width, v.space)
        d.add(f"F.conv_transpose2d({inner.name}, {weight}, padding=1)", "map", v.width, v.space)
    else:
        weight = d.parameter(width, v.width)
        inner = d.add(f"F.linear({v.name}, {weight}).tanh()", v.kind, width, v.space)
        d.add(f"F.linear({inner.name}, {weight}.t())", v.kind, v.width, v.space)


# -- norms, activations, scales ----------------------------------------------------------------------------------------


@statement(3)
def norm(d: Draft) -> None:
    v = d.recent("map", "seq", "tok", "vec")
    if v is None:
        return
    w, x = v.width, v.name
    if v.kind == "tok" and d.pick([0, 1]):  # what normalises over channels keeps all of them
        return
    form = d.pick(
        {"tok": ["layer", "layer by hand"], "vec": ["batch", "layer"]}.get(
            v.kind, ["batch", "functional", "group", "instance"]
        )
    )
    if form == "batch":
        call = f"{d.declare(f'nn.BatchNorm{max(1, len(v.space))}d({w})')}({x})"
    elif form == "functional":
        mean, spread = d.declare(f"nn.Buffer(torch.randn({w}) * 0.1)"), d.declare(f"nn.Buffer(torch.rand({w}) + 0.5)")
        scale, shift = d.declare(f"nn.Parameter(torch.rand({w}) + 0.5)"), d.parameter(w, scale=0.1)
        call = f"F.batch_norm({x}, {mean}, {spread}, {scale}, {shift}, self.training)"
    elif form == "group":
        groups = d.pick([g for g in (1, 2, 4) if w % g == 0])
        call = f"{d.declare(f'nn.GroupNorm({groups}, {w})')}({x})"
    elif form == "instance":
        call = f"F.instance_norm({x})" if min(v.space) > 1 else f"{x} * 1.5"
    elif form == "layer":
        call = f"{d.declare(f'nn.LayerNorm({w})')}({x})"
    else:
        call = f"({x} - {x}.mean(-1, keepdim=True)) * ({x}.var(-1, keepdim=True) + 1e-5).rsqrt()"
    d.add(call, v.kind, w, v.space)


@statement(5)
def activation(d: Draft) -> None:
    v = d.recent("map", "seq", "tok", "vec")
    if v is None:
        return
    x = v.name
    call = d.pick([
        "F.relu({x})", "{x}.relu()", "F.gelu({x})", "F.silu({x})", "F.hardswish({x})", "torch.where({x} > 0, {x}, 0.1 * {x})",
        "{x} * torch.sigmoid({x})", "{x}.clamp(-2, 2)", "F.leaky_relu({x}, 0.2)", "{x}.tanh() + 0.5", "F.softplus({x})",
        "torch.lerp({x}, {x}.relu(), 0.5)", "{x} / ({x}.abs() + 1)", "F.elu({x})", "torch.maximum({x}, {x} * 0.3)",
        "F.dropout({x}, 0.0, self.training)", "{x}.exp().clamp(max=3.0)", "F.hardtanh({x})",
    ])  # fmt: skip
    d.add(call.format(x=x), v.kind, v.width, v.space)


@statement(3)
def scale(d: Draft) -> None:
    """A parameter or buffer per channel."""
    v = d.recent("map", "seq", "tok", "vec")
    if v is None:
        return
    after = len(v.space) if v.kind != "tok" else 0
    kind = d.pick(["viewed", "shaped", "prelu", "buffer", "sliced"])
    ones = ", 1" * after
    if kind == "prelu" and v.kind != "tok":
        call = f"F.prelu({v.name}, {d.declare(f'nn.Parameter(torch.rand({v.width}))')})"
    elif kind == "viewed":
        p = d.declare(f"nn.Parameter(torch.rand({v.width}) + 0.5)")
        call = f"{v.name} * {p}.view(-1{ones})"
    elif kind == "shaped":
        p = d.declare(f"nn.Parameter(torch.rand({v.width}{ones}) + 0.5)")
        call = f"{v.name} * {p} + {d.pick([0.0, 0.25])}"
    elif kind == "buffer":
        p = d.declare(f"nn.Buffer(torch.linspace(0.5, 1.5, {v.width}))")
        call = f"{v.name} - {p}[(...,{' None,' * after})]"
    else:
        p = d.declare(f"nn.Parameter(torch.rand({v.width}{ones}) + 0.5)")
        call = f"torch.addcmul({v.name}, {v.name}, {p}, value=0.5)"
    d.add(call, v.kind, v.width, v.space)


@statement(2)
def gate(d: Draft) -> None:
    """Squeeze and excite."""
    v = d.recent("map")
    if v is None:
        return
    inner = d.pick([2, 4, 6])
    b, c = f"{v.name}.shape[0]", d.number(v)
    down, up = d.parameter(inner, v.width), d.parameter(v.width, inner)
    pooled = d.pick(
        [f"{v.name}.mean((2, 3))", f"F.adaptive_avg_pool2d({v.name}, 1).view({b}, {c})", f"{v.name}.amax((-2, -1))"]
    )
    s = d.add(pooled, "vec", v.width)
    g = d.add(f"F.linear(F.linear({s.name}, {down}).relu(), {up}).sigmoid()", "vec", v.width)
    back = d.pick(
        [f"{g.name}.view({b}, {c}, 1, 1)", f"{g.name}[:, :, None, None]", f"{g.name}.reshape(*{g.name}.shape, 1, 1)"]
    )
    d.add(f"{v.name} * {back}", "map", v.width, v.space)


# -- several values become one, one becomes several --------------------------------------------------------------------


def same_shape(d: Draft, v: Value) -> list[Value]:
    return [o for o in d.values if (o.kind, o.width, o.space) == (v.kind, v.width, v.space) and o is not v]


@statement(6)
def merge(d: Draft) -> None:
    v = d.recent("map", "seq", "tok", "vec")
    others = same_shape(d, v) if v is not None else []
    if v is None or not others:
        return
    o = d.pick(others)
    call = d.pick([
        "{a} + {b}", "{a} + {b}", "torch.add({a}, {b}, alpha=0.5)", "{a} * {b}.sigmoid()", "torch.stack([{a}, {b}]).amax(0)",
        "torch.where({a} > {b}, {a}, 0.5 * {b})", "{a}.clone().add_({b})", "torch.maximum({a}, {b})", "{a} - {b}",
        "sum([{a}, {b}]) / 2", "torch.stack([{a}, {b}], -1).mean(-1)", "{a}.lerp({b}, 0.3)",
    ])  # fmt: skip
    d.add(call.format(a=v.name, b=o.name), v.kind, v.width, v.space)


@statement(2)
def branch(d: Draft) -> None:
    """A residual only where shapes allow it, a second way only where there are many channels."""
    v = d.recent("map", "seq", "tok", "vec")
    if v is None:
        return
    o = d.pick([o for o in d.values if o.kind == v.kind])
    same = (o.width, o.space) == (v.width, v.space)
    kind = d.pick(["equal shapes", "equal widths", "wide", "space"])
    if kind == "equal shapes":
        d.add(f"{v.name} + {o.name} if {v.name}.shape == {o.name}.shape else {v.name} * 0.5", v.kind, v.width, v.space)
    elif kind == "equal widths" and (same or o.width != v.width):
        test = f"{v.name}.shape[{v.dim}] == {o.name}.shape[{o.dim}]"
        d.add(f"{v.name} - {o.name} if {test} else {v.name}.relu()", v.kind, v.width, v.space)
    elif kind == "wide":
        d.add(f"{v.name} * (2 if {v.name}.shape[{v.dim}] > 4 else 3)", v.kind, v.width, v.space)
    elif v.kind == "map":
        d.add(f"{v.name}.flip(-1) if {v.name}.shape[-1] > 2 else {v.name}", v.kind, v.width, v.space)


@statement(3)
def cat(d: Draft) -> None:
    v = d.recent("map", "seq", "tok", "vec")
    if v is None:
        return
    others = [o for o in d.values if (o.kind, o.space) == (v.kind, v.space)]
    chosen = [v, *(d.pick(others) for _ in range(d.pick([1, 1, 2])))]
    total = sum(o.width for o in chosen)
    if total <= 32:
        names, dim = ", ".join(o.name for o in chosen), d.pick([str(v.dim), f"dim={v.dim}"])
        d.add(f"torch.cat([{names}], {dim})", v.kind, total, v.space)


@statement(4)
def cut(d: Draft) -> None:
    v = d.recent("map", "seq", "tok", "vec")
    if v is None or v.width < 4 or v.width % 2:
        return
    x, half, dim = v.name, v.width // 2, v.dim
    c = d.number(v)
    kind = d.pick(
        ["chunk", "split", "half", "second half", "tensor_split", "glu", "kept", "unflatten", "uneven", "every other"]
    )
    lead = ":, " * dim
    if kind == "chunk":
        d.several(f"{x}.chunk(2, {dim})", v, [half, half])
    elif kind == "split":
        d.several(f"torch.split({x}, {c} // 2, {dim})", v, [half, half])
    elif kind == "half":
        d.add(f"{x}[{lead}: {c} // 2]", v.kind, half, v.space)
    elif kind == "second half":
        d.add(f"{x}[{lead}{c} // 2 :]", v.kind, half, v.space)
    elif kind == "tensor_split":
        d.several(f"{x}.tensor_split(2, {dim})", v, [half, half])
    elif kind == "glu":
        d.add(f"F.glu({x}, {dim})", v.kind, half, v.space)
    elif kind == "kept":
        k = d.declare(str(half))
        d.several(f"{x}.split([{k}, {k}], {dim})", v, [half, half])
    elif kind == "unflatten":
        d.several(f"{x}.unflatten({dim}, (2, -1)).unbind({dim})", v, [half, half])
    elif kind == "uneven" and v.width >= 6:
        first = v.width // 3
        k = d.declare(str(first))
        d.several(f"{x}.split([{k}, {x}.shape[{dim}] - {k}], {dim})", v, [first, v.width - first])
    elif kind == "every other":
        d.add(f"{x}[{lead}::2]", v.kind, half, v.space)


@statement(2)
def cut_back(d: Draft) -> None:
    """Concatenate, work on it, and cut it where it was joined."""
    v = d.recent("map", "seq", "tok", "vec")
    if v is None:
        return
    o = d.pick([o for o in d.values if (o.kind, o.space) == (v.kind, v.space)])
    if v.width + o.width > 24:
        return
    joined = d.add(f"torch.cat([{v.name}, {o.name}], {v.dim}) * 0.7", v.kind, v.width + o.width, v.space)
    c = f"{v.name}.shape[{v.dim}]"
    if d.pick([0, 1]):
        lead = ":, " * v.dim
        d.add(f"{joined.name}[{lead}{c}:]", v.kind, o.width, v.space)
    else:
        other = f"{o.name}.shape[{v.dim}]"
        d.several(f"{joined.name}.split([{c}, {other}], {v.dim})", v, [v.width, o.width])


# -- views, permutations ----------------------------------------------------------------------------------------------


@statement(4)
def rearrange(d: Draft) -> None:
    v = d.recent("map", "seq", "tok", "vec")
    if v is None:
        return
    x, c, w = v.name, d.number(v), v.width
    groups = d.pick([g for g in (1, 2, 4) if w % g == 0])
    if v.kind == "map":
        h, s = v.space
        form = d.pick(
            [
                "tokens",
                "tokens view",
                "flat",
                "shuffle",
                "pixel",
                "unpixel",
                "windows",
                "channels last",
                "pooled",
                "flat vec",
            ]
        )
        if form == "tokens":
            d.add(f"{x}.flatten(2).transpose(1, 2)", "tok", w, (h * s,))
        elif form == "tokens view":
            d.add(f"{x}.permute(0, 2, 3, 1).reshape({x}.shape[0], -1, {c})", "tok", w, (h * s,))
        elif form == "flat":
            d.add(f"{x}.view({x}.size(0), {c}, -1)", "seq", w, (h * s,))
        elif form == "shuffle":
            sizes = f"{x}.shape[0], {groups}, {c} // {groups}, *{x}.shape[2:]"
            d.add(f"{x}.reshape({sizes}).transpose(1, 2).flatten(1, 2)", "map", w, v.space)
        elif form == "pixel" and w % 4 == 0 and h <= 4:
            d.add(f"F.pixel_shuffle({x}, 2)", "map", w // 4, (2 * h, 2 * s))
        elif form == "unpixel" and h % 2 == 0 and w <= 6:
            d.add(f"F.pixel_unshuffle({x}, 2)", "map", 4 * w, (h // 2, s // 2))
        elif form == "windows" and h % 2 == 0:
            n = d.add(f"{x}.view({x}.shape[0], {c}, {h // 2}, 2, {s // 2}, 2)", "none", w)
            d.add(f"{n.name}.amax((3, 5))", "map", w, (h // 2, s // 2))
        elif form == "channels last":
            scaled = f"F.layer_norm({x}.permute(0, 2, 3, 1), ({c},))"
            d.add(f"{scaled}.permute(0, 3, 1, 2)", "map", w, v.space)
        elif form == "pooled":
            d.add(f"{x}.mean((2, 3))", "vec", w)
        elif form == "flat vec" and w * h * s <= 64:
            d.add(f"torch.flatten({x}, 1)", "vec", w * h * s)
    elif v.kind == "seq":
        (n,) = v.space
        side = int(n**0.5)
        form = d.pick(["tokens", "back", "last", "mean"])
        if form == "tokens":
            d.add(f"{x}.transpose(1, 2)", "tok", w, v.space)
        elif form == "back" and side * side == n:
            d.add(f"{x}.reshape({x}.shape[0], {c}, {side}, {side})", "map", w, (side, side))
        elif form == "last":
            d.add(f"{x}[..., -1]", "vec", w)
        elif form == "mean":
            d.add(f"{x}.mean(-1)", "vec", w)
    elif v.kind == "tok":
        (n,) = v.space
        side = int(n**0.5)
        form = d.pick(["map", "seq", "first", "mean"])
        if form == "map" and side * side == n:
            d.add(f"{x}.transpose(1, 2).reshape(-1, {c}, {side}, {side})", "map", w, (side, side))
        elif form == "seq":
            d.add(f"{x}.permute(0, 2, 1)", "seq", w, v.space)
        elif form == "first":
            d.add(f"{x}[:, 0]", "vec", w)
        elif form == "mean":
            d.add(f"{x}.mean(1)", "vec", w)
    elif w % 4 == 0 and w <= 64:
        form = d.pick(["number", "minus one", "unflatten"])
        per = {"number": f"{x}.view(-1, {w // 4}, 2, 2)", "minus one": f"{x}.view({x}.shape[0], -1, 2, 2)"}
        d.add(per.get(form, f"{x}.unflatten(1, (-1, 2, 2))"), "map", w // 4, (2, 2))


@statement(2)
def permute_positions(d: Draft) -> None:
    v = d.recent("map", "seq", "tok")
    if v is None:
        return
    x = v.name
    form = d.pick(
        ["roll space", "flip space", "roll channels", "flip channels", "index", "index space", "shift", "pad and crop"]
    )
    if form == "roll space":
        d.add(f"torch.roll({x}, 1, {3 - v.dim if v.kind != 'map' else 2})", v.kind, v.width, v.space)
    elif form == "flip space":
        d.add(f"{x}.flip({3 - v.dim if v.kind != 'map' else -1})", v.kind, v.width, v.space)
    elif form == "roll channels":
        d.add(f"{x}.roll(1, {v.dim})", v.kind, v.width, v.space)
    elif form == "flip channels":
        d.add(f"{x}.flip({v.dim})", v.kind, v.width, v.space)
    elif form == "index":
        order = d.declare(f"nn.Buffer(torch.arange({v.width}).flip(0))")
        d.add(f"{x}[{':, ' * v.dim}{order}]", v.kind, v.width, v.space)
    elif form == "index space" and v.kind == "map":
        h = v.space[0]
        d.add(f"{x}[:, :, torch.arange({h} - 1, -1, -1)]", v.kind, v.width, v.space)
    elif form == "shift" and v.kind == "map" and v.width % 2 == 0:
        half = f"{x}.shape[1] // 2"
        d.add(f"torch.cat([{x}[:, : {half}].roll(1, 2), {x}[:, {half} :].roll(-1, 3)], 1)", v.kind, v.width, v.space)
    elif form == "pad and crop" and v.kind == "map":
        d.add(f"F.pad({x}, (1, 0, 0, 1))[:, :, 1:, :-1]", v.kind, v.width, v.space)


@statement(3)
def resize(d: Draft) -> None:
    v = d.recent("map", "map", "seq")
    if v is None:
        return
    x, n = v.name, len(v.space)
    form = d.pick(["max", "avg", "adaptive", "nearest", "bilinear", "stride", "unpool"])
    if form in ("max", "avg") and min(v.space) >= 2 and all(s % 2 == 0 for s in v.space):
        d.add(f"F.{form}_pool{n}d({x}, 2)", v.kind, v.width, tuple(s // 2 for s in v.space))
    elif form == "adaptive":
        d.add(f"F.adaptive_{d.pick(['avg', 'max'])}_pool{n}d({x}, 2)", v.kind, v.width, (2,) * n)
    elif form == "nearest" and max(v.space) <= 4:
        d.add(f"F.interpolate({x}, scale_factor=2)", v.kind, v.width, tuple(2 * s for s in v.space))
    elif form == "bilinear" and v.kind == "map":
        o = d.pick([o for o in d.values if o.kind == "map"])
        d.add(f"F.interpolate({x}, size={o.name}.shape[2:], mode='bilinear')", "map", v.width, o.space)
    elif form == "stride" and v.kind == "map" and v.space[0] > 2:
        d.add(f"{x}[:, :, ::2, ::2]", "map", v.width, tuple((s + 1) // 2 for s in v.space))
    elif form == "unpool" and v.kind == "map" and all(s % 2 == 0 for s in v.space):
        pooled = d.several(f"F.max_pool2d({x}, 2, return_indices=True)", v, [v.width, v.width])
        d.values = d.values[:-2]
        d.add(f"F.max_unpool2d({pooled[0].name}, {pooled[1].name}, 2)", "map", v.width, v.space)


# -- statistics, attention, computed weights ---------------------------------------------------------------------------


@statement(2)
def attention(d: Draft) -> None:
    v = d.recent("tok")
    if v is None:
        return
    x, w = v.name, v.width
    inner = d.pick([4, 8])
    q, k = d.parameter(inner, w), d.parameter(inner, w)
    u = d.parameter(w, w)
    scores = d.add(f"F.linear({x}, {q}) @ F.linear({x}, {k}).transpose(1, 2) * {inner**-0.5:.3f}", "none", v.space[0])
    d.add(f"{scores.name}.softmax(-1) @ F.linear({x}, {u})", "tok", w, v.space)


@statement(1)
def statistic(d: Draft) -> None:
    """A number or a map made of all channels, which stay for it."""
    v = d.recent("map", "tok", "vec")
    if v is None:
        return
    x, dim = v.name, v.dim
    call = d.pick([
        f"{x} * {x}.mean({dim}, keepdim=True).sigmoid()", f"F.normalize({x}, dim={dim})", f"{x}.softmax({dim})",
        f"{x} - {x}.amax({dim}, keepdim=True)",
    ])  # fmt: skip
    if d.pick([0, 1]):
        d.add(call, v.kind, v.width, v.space)


@statement(2)
def computed_weight(d: Draft) -> None:
    v = d.recent("map", "vec", "tok")
    if v is None:
        return
    width = d.pick(d.widths)
    if v.kind == "map":
        p = d.parameter(width, v.width, 3, 3)
        form = d.pick([
            f"{p} * {d.declare(f'nn.Parameter(torch.rand({width}, 1, 1, 1) + 0.5)')}", f"{p}.tanh()", f"{p} - {p}.flip(-1)",
            f"{p} * 0.5 + {p}.transpose(-1, -2) * 0.5", f"{p} / ({p}.norm(dim=(2, 3), keepdim=True) + 0.1)",
        ])  # fmt: skip
        weight = d.add(form, "none", width)
        d.add(f"F.conv2d({v.name}, {weight.name}, padding=1)", "map", width, v.space)
    else:
        p = d.parameter(width, v.width)
        low, high = d.parameter(width, 2), d.parameter(2, v.width)
        weight = d.add(d.pick([f"{p}.tanh()", f"{p} + {low} @ {high}", f"{p} * 0.5"]), "none", width)
        d.add(f"F.linear({v.name}, {weight.name})", v.kind, width, v.space)


@statement(2)
def made_here(d: Draft) -> None:
    """A tensor made in the forward, as wide as another."""
    v = d.recent("map", "seq", "vec")
    if v is None or v.width > 12:
        return
    x, c = v.name, d.number(v)
    rest = "".join(f", {x}.shape[{i + 2}]" for i in range(len(v.space)))
    zeros = d.pick([
        f"torch.zeros_like({x})", f"{x}.new_zeros({x}.shape[0], {c}{rest})",
        f"torch.zeros({x}.shape[0], {c}{rest}, dtype={x}.dtype)",
        f"{x}.new_ones({x}.shape)",
    ])  # fmt: skip
    made = d.add(zeros, v.kind, v.width, v.space)
    form = d.pick(["add", "cat", "where", "double"])
    if form == "add":
        d.add(f"{made.name} + {x}", v.kind, v.width, v.space)
    elif form == "cat":
        d.add(f"torch.cat([{x}, {made.name}], 1)", v.kind, 2 * v.width, v.space)
    elif form == "where":
        d.add(f"torch.where({x} > 0.2, {x}, {made.name})", v.kind, v.width, v.space)
    else:
        d.add(f"{x}.repeat(1, 2{', 1' * len(v.space)})", v.kind, 2 * v.width, v.space)


@statement(1)
def number_of_channels(d: Draft) -> None:
    """Arithmetic with a width."""
    v = d.recent("map", "tok", "vec")
    if v is not None and d.pick([0, 1]):
        c = f"{v.name}.shape[{v.dim}]"
        call = d.pick([f"{v.name} * {c} ** -0.5", f"{v.name} / {c}", f"{v.name} * min({c}, 4)"])
        d.add(call, v.kind, v.width, v.space)


# -- whole programs ----------------------------------------------------------------------------------------------------


def head(d: Draft, v: Value) -> str:
    """What the program returns of a value: mostly logits."""
    classes = d.pick([3, 5, 1])
    form = d.pick(["pooled", "pooled", "pooled", "dense", "as it is"])
    if form == "pooled" or (form == "as it is" and d.pick([0, 1, 1])):
        at = {"map": "(2, 3)", "seq": "2", "tok": "1"}.get(v.kind)
        pooled = f"{v.name}.mean({at})" if at else v.name
        return f"F.linear({pooled}, {d.parameter(classes, v.width)})"
    if form == "dense" and v.kind == "map":
        return f"F.conv2d({v.name}, {d.parameter(classes, v.width, 1, 1)})"
    if form == "dense" and v.kind == "tok":
        return f"{d.declare(f'nn.Linear({v.width}, {classes})')}({v.name})"
    return v.name


def needed(lines: Sequence[str], result: str) -> list[str]:
    """Those of ``lines`` that ``result`` needs, which is the last."""
    stays, used = [result], set(re.findall(r"\bv\d+(?:_\d)?\b", result))
    for line in reversed(lines):
        made, _, expression = line.partition(" = ")
        if used & set(made.split(", ")):
            stays.append(line)
            used |= set(re.findall(r"\bv\d+(?:_\d)?\b", expression))
    return stays[::-1]


LONGEST = 20  # statements


def random_program(pick: Pick, *, longest: int = LONGEST) -> Program:
    """A program of up to ``longest`` statements, drawn with ``pick(options)``; what its outputs do not need is left out."""
    d = Draft(pick, widths=pick([(4, 6, 8), (8, 12), (6, 8, 10), (8, 16)]))
    kind = pick(["map", "map", "map", "map", "seq", "vec", "tok"])
    side = pick([4, 6, 8])
    space = {"map": (side, side), "seq": (side,), "tok": (side,), "vec": ()}[kind]
    width = pick([3, 3, 1, 2, 4]) if kind == "map" else pick([4, 6])
    d.values.append(Value("x0", kind, width, space))
    shape = (side, width) if kind == "tok" else (width, *space)
    inputs = [shape]
    if pick([0, 0, 0, 0, 1]):
        inputs.append(shape)
        d.values.append(Value("x1", kind, width, space))
    layer = conv if kind in ("map", "seq") else linear
    table = [function for weight, function in STATEMENTS for _ in range(weight)]
    for function in (
        layer,
        activation,
        *(pick(table) for _ in range(pick(range(3, longest)))),
        pick([block, layer, cat]),
    ):
        function(d)
    some = [v for v in d.values if v.kind != "none"]
    outputs = [head(d, some[-1]), *(head(d, pick(some[1:])) for _ in range(pick([0, 0, 0, 1])))]
    forward = needed(d.forward, f"return {', '.join(outputs)}")
    body = " ".join(forward)
    init = [line for line in d.init if re.search(rf"{re.escape(line.partition(' = ')[0])}\b", body)]
    return Program(tuple(init), tuple(forward), tuple(inputs), pick(range(4)))
