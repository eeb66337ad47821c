"""Convolutions and matrix products: where channels are made and where they end."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor, nn

from espalier.carving import computes_weight
from espalier.graph.call import Call
from espalier.graph.reasons import Reason
from espalier.graph.rules.elementwise import combine, unknown
from espalier.graph.rules.table import align, derived_from, pending_of, rule, settle
from espalier.graph.watch import COMPUTED, Layer, RawSite, State, Watch, state, varying

# -- convolutions and matrix products ----------------------------------------------------------------------------------

GROUPS_TAKEN_WHOLE = 4  # from this many groups on, a convolution loses whole groups; below, it loses positions in all


@rule("convolution", "_convolution", "cudnn_convolution", "mkldnn_convolution")
def convolution(watch: Watch, call: Call) -> None:
    """Weight ``(O, I/g, ...)``, transposed ``(I, O/g, ...)``: outputs are made, inputs are consumed."""
    x, weight, bias, out = call["input"], call["weight"], call["bias"], call.out
    transposed, groups = call.get("transposed", False), call["groups"]
    channels = watch.vector(x, 1 if x.ndim == weight.ndim else 0)
    known = state(weight)
    note_normed(watch, weight)
    rows, cols = watch.vector(weight, 0), watch.vector(weight, 1)
    watch.freeze([m for m in known.layers if min(varying(m), default=0) > 1], "are positions of a kernel")
    bake = ""
    if known.pending:
        module = watch.module
        if isinstance(module, nn.Conv2d) and "weight" in module._parameters and not transposed and not known.source:
            bake = watch.module_name
            watch.baked[bake] = None
            cols = baked_columns(watch, module, cols)
        else:
            settle(watch, [weight])
    if known.derived == COMPUTED and not bake:
        watch.freeze([rows if transposed else cols], "belongs to a weight that is computed")
    made = cols if transposed else rows
    if groups > 1:
        made = grouped(watch, channels, rows, cols, groups, transposed, known.source)
    else:
        consumed = rows if transposed else cols
        watch.tie(channels, consumed)
        watch.consume(consumed)
    if isinstance(bias, Tensor):
        watch.tie(made, watch.vector(bias, 0))
    images = [
        m for m in state(x).layers if x.ndim == weight.ndim and varying(m) == (0,)
    ]  # channels filtered one by one
    positions = x if transposed else out
    spatial = math.prod(positions.shape[2 - (x.ndim != weight.ndim) :])
    if x.ndim == weight.ndim and not images:
        spatial *= x.shape[0]
    watch.sites.append(
        RawSite(
            watch.module_name,
            "transposed convolution" if transposed else "convolution",
            known.source,
            int(spatial * math.prod(weight.shape[2:])),
            (rows, cols, *(m.reshape(-1) for m in images)),
            watch.clock,
            baked=bool(bake),
        )
    )
    shape = [1] * out.ndim
    shape[1 if x.ndim == weight.ndim else 0] = -1
    watch.put(call.out, [*([made.reshape(shape)] if np.count_nonzero(made) else []), *images])


def note_normed(watch: Watch, weight: Tensor) -> None:
    """Weight norm and the like: the layer could be watched as a plain one, which takes its place when it is cut."""
    known = state(weight)
    computed = not known.derived or known.pending or known.derived == COMPUTED
    if known.source is None and computed and computes_weight(watch.module):
        watch.normed[watch.module_name] = None


def baked_columns(watch: Watch, module: nn.Module, cols: np.ndarray) -> np.ndarray:
    """Input labels of a weight that is computed: those of the raw parameter, which went through a statistic."""
    raw = getattr(module, "weight", None)
    if isinstance(raw, Tensor) and state(raw).source is not None:
        return watch.vector(raw, 1)
    return cols


def grouped(
    watch: Watch,
    channels: np.ndarray,
    rows: np.ndarray,
    cols: np.ndarray,
    groups: int,
    transposed: bool,
    source: str | None,
) -> np.ndarray:
    """Tie what a grouped convolution needs to stay one; returns the labels of its output channels.

    Many groups (depthwise, ResNeXt): a unit is a whole group, inputs and outputs together, and ``groups`` shrinks.
    Few groups (ResNeSt's 2), and those whose inputs stay: a unit is one position in every group, ``groups`` stays.
    A convolution is known by its module, a functional one by its weight, ``source``.
    """
    inside = channels.size // groups
    outside = (cols.size * groups if transposed else rows.size) // groups
    x = channels.reshape(groups, inside)
    module = watch.module
    owned = isinstance(
        module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    )
    owned = owned and bool(module.groups == groups)
    name = watch.module_name if owned or source is None else source
    if watch.rehearsal is None:
        many = inside == 1 or (owned and groups >= GROUPS_TAKEN_WHOLE)
        whole = many and name not in watch.lessons.positions and not watch.level()
    else:
        whole = name in watch.rehearsal.whole_groups
    if watch.level() and max(inside, outside) == 1:
        watch.freeze([channels, rows], watch.reason())
    if whole:
        watch.tie(x, x[:, :1])
        if not owned:  # ``groups`` follows a width, or a rehearsal shows that it does not
            watch.follow(groups, x[:, 0])
        watch.whole_groups[name] = outside
        if max(inside, outside) > 1 and not watch.is_made(
            rows
        ):  # kernels that are repeated for every channel hold no weight
            watch.divided.add(name)
        if transposed:  # weight (I, O/g): rows follow the inputs, columns stay
            watch.tie(rows.reshape(groups, inside), x)
            watch.freeze([cols], "is shared by all groups of a transposed convolution")
            watch.consume(rows)
            return x[:, 0].repeat(outside)
        watch.tie(rows.reshape(groups, outside), x[:, :1])
        watch.freeze([cols], "is shared by the groups of a convolution")
        return rows
    watch.tie(x, x[:1])
    if transposed:
        watch.tie(rows.reshape(groups, inside), x)
        watch.consume(rows)
        return np.tile(cols, groups)
    watch.tie(cols, x[0])
    watch.consume(cols)
    watch.tie(rows.reshape(groups, outside), rows.reshape(groups, outside)[:1])
    return rows


@rule("mm", "bmm", "matmul", "dot", "vdot", "mv")
def matmul(watch: Watch, call: Call) -> None:
    a, b = call.args
    derived = derived_from([a, b])
    if derived and min(a.ndim, b.ndim) == 1:
        weight_times_vector(watch, a, b, call.out, derived)
    else:
        sites = len(watch.sites)
        watch.put(call.out, contract(watch, a, b, call.out), derived=derived)
        if min(a.ndim, b.ndim) == 1:  # of a vector, which torch's counter does not count
            del watch.sites[sites:]


def weight_times_vector(watch: Watch, a: Tensor, b: Tensor, out: Tensor, derived: int) -> None:
    """A statistic of a weight, such as its largest singular value: it ends up in every element of the weight."""
    watch.tie(watch.vector(a, -1), watch.vector(b, 0))
    reason = Reason("a weight is divided by a statistic over these channels", watch.place())
    layers, pending = [], list(pending_of([a, b]))
    for layer in (*state(a).layers, *state(b).layers):
        if layer.ndim == 2 and layer.shape[1] == 1:
            layers.append(layer.reshape(-1))
        else:
            pending.append((layer.reshape(1, -1), reason))
    watch.put(out, layers, derived=derived, pending=tuple(pending))


@rule("addmm", "baddbmm", "addbmm")
def addmm(watch: Watch, call: Call) -> None:
    added, a, b = call.args[:3]
    watch.put(call.out, contract(watch, a, b, call.out))
    watch.put(call.out, combine(watch, [call.out, added], call.out.shape))


@rule("linear")
def linear(watch: Watch, call: Call) -> None:
    weight, known = call["weight"], state(call["weight"])
    flipped = weight.t()
    layers = tuple(m.T for m in known.layers)
    flipped._espalier = State(layers, source=known.source, derived=known.derived, pending=known.pending)  # type: ignore[attr-defined]
    watch.put(call.out, contract(watch, call.first, flipped, call.out))
    if call["bias"] is not None:
        watch.put(call.out, combine(watch, [call.out, call["bias"]], call.out.shape))


FACTORS = 4  # of a cost, see ``costs``


def contract(watch: Watch, a: Tensor, b: Tensor, out: Tensor) -> list[Layer]:
    """``a (..., m, k) @ b (..., k, n)``: labels along ``k`` meet and end here, the others go through."""
    ka, kb = a.ndim - 1, max(b.ndim - 2, 0)
    ends_b = [m for m in state(b).layers if m.shape[kb] > 1]
    # of a single channel that was flattened every position is an input
    alone = [m for m in state(a).layers if not varying(m) and (a.shape[ka] == 1 or ends_b)]
    ends_a = [m for m in state(a).layers if m.shape[ka] > 1] + alone
    weight = b if state(b).derived else a if state(a).derived else None
    note_normed(watch, b)
    if weight is None and (ends_a or ends_b):
        watch.freeze([*ends_a, *ends_b], "is contracted with another activation")
        inner = np.zeros(a.shape[ka], dtype=np.int64)
    else:
        inner = alone[0].reshape(-1).repeat(a.shape[ka]) if alone else watch.vector(a, ka)
        other = watch.vector(b, kb)
        watch.tie(inner, other)
        if weight is not None:
            settle(watch, [a, b])
            if state(weight).derived == COMPUTED:
                watch.freeze([other if weight is b else inner], "belongs to a weight that is computed")
            watch.consume(other if weight is b else inner)
        inner = other if weight is b else inner
    layers = []
    for m in state(a).layers:
        if not any(m is e for e in ends_a) and m.ndim == out.ndim:
            layers.append(m)
    outer: list[Layer] = []
    for m in state(b).layers:
        if not any(m is e for e in ends_b):
            moved = align(m, out.ndim) if b.ndim > 1 else m
            same = next((n for n in layers if n.shape == moved.shape and varying(n) and out.ndim > 2), None)
            if same is not None:  # one product for each channel
                watch.tie(same, moved)
                continue
            layers.append(moved)
            if weight is b:
                outer.append(m)
    macs = out.numel() * a.shape[ka]
    through = [m.reshape(-1) for m in state(a).layers if not any(m is e for e in ends_a)]  # channels among its rows
    if weight is not b:
        outer, through = [], [m.reshape(-1) for m in layers]
    factors = tuple([f for f in (*_apart(outer), inner, *through) if f.size > 1][:FACTORS])
    count = math.prod(len(f) for f in factors)
    if not count or macs % count:
        factors, count = (), 1
    watch.sites.append(
        RawSite(
            watch.module_name,
            "matrix product",
            state(weight).source if weight is not None else None,
            macs // count,
            factors,
            watch.clock,
        )
    )
    return layers


def _apart(layers: list[Layer]) -> list[np.ndarray]:
    """Labels of each; of several along one dimension, as of a weight that was flattened, every label once."""
    dims = [set(varying(m)) for m in layers]
    alone = [sum(bool(d & other) for other in dims) == 1 for d in dims]
    return [m.reshape(-1) if one else np.unique(m) for m, one in zip(layers, alone, strict=True)]


@rule("_trilinear")
def bilinear(watch: Watch, call: Call) -> None:
    """``x (..., I) W (O, I, J) y (..., J)``, as ``nn.Bilinear`` computes it."""
    x, weight, y = call.operands
    known = state(weight)
    if known.source is None or weight.ndim != 3 or x.ndim != 2 or y.ndim != 2:
        unknown(watch, call)
        return
    for given, dim in ((x, 1), (y, 2)):
        read = watch.axis_labels(known.source, dim, weight.shape[dim])
        watch.tie(watch.vector(given, 1), read)
        watch.consume(read)
    made = watch.vector(weight, 0)
    watch.put(call.out, [made.reshape(1, -1)] if np.count_nonzero(made) else [])


@rule("embedding")
def embedding(watch: Watch, call: Call) -> None:
    table, out = call.first, call.out
    watch.freeze([m for m in state(table).layers if m.shape[0] > 1], "is looked up by index")
    vec = watch.vector(table, 1)
    watch.put(call.out, [vec.reshape([1] * (out.ndim - 1) + [-1])] if vec.any() else [])
