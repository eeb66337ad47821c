"""Views, cuts, concatenations, permutations: executed on the labels."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from espalier.carving import number_name
from espalier.graph.call import Call
from espalier.graph.numbers import Number, Width
from espalier.graph.rules.elementwise import combine, made_widths, new_widths, unknown
from espalier.graph.rules.table import align, aten, derived_from, dims_of, pending_of, rule
from espalier.graph.watch import ALL, Layer, State, Watch, compact, narrowed, state, varying
from espalier.layers import ChannelPad

# -- views: executed on the labels -------------------------------------------------------------------------------------


def on_labels(call: Call, layer: Layer) -> Any:
    """What the operation makes of a layer in the place of its first operand: an array, or several."""
    whole = torch.from_numpy(layer if layer.flags.writeable else layer.copy()).expand(call.first.shape)
    made = call.op(whole, *call.args[1:], **call.kwargs)
    return made.numpy() if isinstance(made, Tensor) else [m.numpy() for m in made]


def executed(watch: Watch, call: Call) -> None:
    """Run the operation itself on the labels."""
    known = state(call.first)
    layers = [compact(on_labels(call, layer)) for layer in known.layers]
    watch.put(call.out, layers, source=known.source, derived=known.derived, pending=known.pending)


rule("squeeze", "flip", "rot90", "unfold")(executed)


@rule("roll")
def roll(watch: Watch, call: Call) -> None:
    """Channels in another order; if a rehearsal shows that neighbours go apart, those stay that are taken round the end."""
    executed(watch, call)
    if watch.level():
        shifts, dims = (v if isinstance(v, (list, tuple)) else [v] for v in (call["shifts"], call["dims"]))
        for shift, dim in zip(shifts, dims, strict=False):
            for layer in state(call.first).layers:
                size = layer.shape[dim]
                if size > 1:
                    ends = range(max(size - shift, 0), size) if shift > 0 else range(min(-shift, size))
                    stay = ends if len(ends) < size - 1 else range(size)
                    watch.freeze([layer.take(stay, dim)], "is rolled round the end of its channels")


@rule("permute", "transpose", "t", "unsqueeze", "movedim", "transpose_", "t_")
def turned(watch: Watch, call: Call) -> None:
    """Dimensions change places, channels do not."""
    turn = TURNS.get(call.packet)
    if turn is None or call.kwargs:
        executed(watch, call)
        return
    tensor, known = call.first, state(call.first)
    layers = [turn(align(layer, tensor.ndim), *call.args[1:]) for layer in known.layers]
    watch.put(call.out, layers, source=known.source, derived=known.derived, pending=known.pending)


@rule("unsqueeze_", "squeeze_")
def turned_in_place(watch: Watch, call: Call) -> None:
    """The tensor has its new shape by now, its layers have the old one."""
    out, known = call.out, state(call.first)
    layers = list(known.layers)
    if any(m.ndim != out.ndim for m in layers):
        if call.get("dim") is None:  # which dimensions had one position nobody knows any more
            unknown(watch, call)
            return
        dims = dims_of(call["dim"], max(out.ndim, layers[0].ndim))
        if out.ndim > layers[0].ndim:
            layers = [np.expand_dims(m, tuple(dims)) for m in layers]
        else:
            layers = [m.squeeze(tuple(d for d in dims if m.shape[d] == 1)) for m in layers]
    if any(m.ndim != out.ndim for m in layers):  # of several dimensions only some went
        unknown(watch, call)
        return
    watch.put(out, layers, source=known.source, derived=known.derived, pending=known.pending)


@rule("view_as_real")
def parted(watch: Watch, call: Call) -> None:
    """Real and imaginary part lie along a new last dimension."""
    known = state(call.first)
    layers = [m[..., None] for m in known.layers]
    watch.put(call.out, layers, source=known.source, derived=known.derived, pending=known.pending)


@rule("view_as_complex")
def joined(watch: Watch, call: Call) -> None:
    """The pairs along the last dimension become one number each."""
    known = state(call.first)
    watch.freeze([m for m in known.layers if m.shape[-1] > 1], "real and imaginary part of one number are no channels")
    layers = [m[..., 0] for m in known.layers if m.shape[-1] == 1]
    watch.put(call.out, layers, source=known.source, derived=known.derived, pending=known.pending)


TURNS: dict[Any, Callable[..., Layer]] = {
    aten.t: np.transpose,
    aten.t_: np.transpose,
    aten.transpose: np.swapaxes,
    aten.transpose_: np.swapaxes,
    aten.permute: np.transpose,
    aten.unsqueeze: np.expand_dims,
}


@rule("expand")
def expand(watch: Watch, call: Call) -> None:
    """Along a dimension that had one position the result may be as wide as what it is combined with, if its size follows."""
    tensor, known = call.first, state(call.first)
    layers = [align(layer, call.out.ndim) for layer in known.layers]
    before = (1,) * (call.out.ndim - tensor.ndim) + tuple(tensor.shape)
    new = [d for d, (n, m) in enumerate(zip(before, call.out.shape, strict=True)) if n == 1 < m]
    if known.derived:  # a kernel for each channel, or a statistic of a weight for each of its inputs
        layers += made_widths(watch, call.out, new)
    if known.layers or known.derived or known.value is not None:
        watch.put(call.out, layers, source=known.source, derived=known.derived, pending=known.pending)
        return
    new_widths(watch, call.out, new)


@rule("repeat")
def repeat(watch: Watch, call: Call) -> None:
    """Kernels that are repeated for each channel, as many times as a tensor's size says, go with the channels; all of them."""
    tensor, out, known = call.first, call.out, state(call.first)
    executed(watch, call)
    if not known.derived:
        return
    watch.made += 1
    layers = list(state(out).layers)
    for dim, size in enumerate((1,) * (out.ndim - tensor.ndim) + tuple(tensor.shape)):
        times = out.shape[dim] // size if size else 1
        if times == 1:
            continue
        name = number_name(watch.module_name, f"made{watch.made}.{dim}")
        given = watch.said_sizes[dim] if len(watch.said_sizes) == out.ndim else None
        labels = watch.like_axis(name, given, times) if size > 1 else watch.made_axis(name, out, dim)
        if labels is None or len(labels) != times:
            continue
        watch.freeze([m for m in layers if m.shape[dim] > 1], "is repeated for every channel")
        layers = [m for m in layers if m.shape[dim] == 1]
        layers.append(labels.repeat(size).reshape((1,) * dim + (-1,) + (1,) * (out.ndim - dim - 1)))
    watch.put(out, layers, derived=known.derived, pending=known.pending)


def reshaped(layer: Layer, shape: Sequence[int], new: Sequence[int]) -> Layer:
    """What reshaping ``shape`` to ``new`` makes of a layer: written out only in the dimensions that its channels share.

    Neighbouring dimensions are taken together until both sides have the same product; where the labels do not change
    along any of them, they need no copy of a weight's or an activation's size.
    """
    if 0 in shape:
        return np.broadcast_to(layer, shape).reshape(new)
    expanded, final = _shared_dimensions(layer.shape, tuple(shape), tuple(new))
    return (layer if layer.shape == expanded else np.broadcast_to(layer, expanded)).reshape(final)


@functools.lru_cache(4096)
def _shared_dimensions(
    layer: tuple[int, ...], shape: tuple[int, ...], new: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """``shape`` and ``new`` with 1 in the place of sizes along which nothing changes in an array of shape ``layer``."""
    before, after = (np.cumprod([1, *sizes]) for sizes in (shape, new))
    expanded: list[int] = []
    final: list[int] = []
    for product in np.intersect1d(before, after):
        i, j = (int(np.searchsorted(p, product, side="right")) - 1 for p in (before, after))
        changes = any(n > 1 for n in layer[len(expanded) : i])
        expanded += shape[len(expanded) : i] if changes else [1] * (i - len(expanded))
        final += new[len(final) : j] if changes else [1] * (j - len(final))
    return tuple(expanded), tuple(final)


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten")
def view(watch: Watch, call: Call) -> None:
    """Merging dimensions only flows; splitting the channel axis says that one factor stays fixed, which one is tried out.

    First guess of two factors: the last shrinks (``view(b, groups, c // groups, h, w)``), of more: the first (a map made of a
    vector, ``view(b, c, h, w)``); then the other; then none.  A rehearsal decides, see ``trace``.
    """
    tensor, known = call.first, state(call.first)
    layers = []
    for layer in known.layers:
        result = compact(reshaped(align(layer, tensor.ndim), tensor.shape, call.out.shape))
        dims = varying(result)
        level = watch.level()
        if level and len(dims) <= 1:
            watch.freeze([result], "a view fixes the number of channels")
        elif len(dims) > max(1, len(varying(layer))):
            tried = level + (watch.key() in watch.lessons.turned)
            if tried >= 2:
                watch.freeze([result], "a view splits the channels in a way that does not follow their number")
            else:
                shrinking = dims[-1] if (tried == 0) == (len(dims) == 2) else dims[0]
                watch.guess(result, shrinking)
                for dim in dims:
                    if dim != shrinking:
                        watch.stay(call.out.shape[dim])
                dims = (shrinking,)
        for dim in dims:
            given = watch.given_at(call.out, dim)
            if given is None or isinstance(given, Number):  # another dimension's size may be the same number by chance
                watch.follow(call.out.shape[dim], line(result, dim))
        layers.append(result)
    watch.put(call.out, layers, source=known.source, derived=known.derived, pending=known.pending)


@rule("pixel_shuffle")
def pixel_shuffle(watch: Watch, call: Call) -> None:
    """``(C*r*r, H, W) -> (C, H*r, W*r)``"""
    block = watch.vector(call.first, -3).reshape(-1, call["upscale_factor"] ** 2)
    watch.tie(block, block[:, :1])
    _put_along(watch, call.out, -3, block[:, 0])


@rule("pixel_unshuffle")
def pixel_unshuffle(watch: Watch, call: Call) -> None:
    """``(C, H*r, W*r) -> (C*r*r, H, W)``"""
    _put_along(watch, call.out, -3, watch.vector(call.first, -3).repeat(call["downscale_factor"] ** 2))


@rule("im2col")
def im2col(watch: Watch, call: Call) -> None:
    """``(C, H, W) -> (C*k*k, positions)``"""
    channels = watch.vector(call.first, -3)
    _put_along(watch, call.out, -2, channels.repeat(math.prod(call["kernel_size"])))


@rule("col2im")
def col2im(watch: Watch, call: Call) -> None:
    """``(C*k*k, positions) -> (C, H, W)``"""
    block = watch.vector(call.first, -2).reshape(-1, math.prod(call["kernel_size"]))
    watch.tie(block, block[:, :1])
    _put_along(watch, call.out, -3, block[:, 0])


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(watch: Watch, call: Call) -> None:
    block = watch.vector(call.first, 1).reshape(call["groups"], -1)
    watch.tie(block, block[:1])
    _put_along(watch, call.out, 1, block.T.reshape(-1))


def _put_along(watch: Watch, out: Tensor, dim: int, labels: np.ndarray) -> None:
    """``out`` has ``labels`` along ``dim`` and no others."""
    shape = [1] * out.ndim
    shape[dim] = -1
    watch.put(out, [labels.reshape(shape)] if labels.any() else [])


def line(layer: Layer, dim: int) -> np.ndarray:
    """Labels along ``dim``, at the first position of every other dimension; shape ``(size,)``."""
    for other in varying(layer):
        layer = layer if other == dim else narrowed(layer, other)
    return layer.reshape(-1)


MOST_PIECES = 16  # that a width is taken to be made of, where no number says how it is cut


def _seam(watch: Watch, labels: np.ndarray, at: int) -> bool:
    """Do two tensors seem to have been joined before position ``at``?  Another axis begins there, or the order breaks."""
    if watch.axis_at(labels[at - 1]) != watch.axis_at(labels[at]):
        return True
    steps = np.diff(labels[max(at - 2, 0) : at + 2])
    return len(steps) > 1 and steps[min(at - 1, 1)] not in np.delete(steps, min(at - 1, 1))


def shares(watch: Watch, layer: Layer, dim: int, ends: Sequence[int], text: str, *, held: slice = ALL) -> None:
    """``layer`` is cut along ``dim`` at ``ends``, of which no number says why: are the pieces shares of the width?

    First guess where two tensors were joined there: the cut is where they meet; then: yes, so that equal pieces lose the same;
    then: no, and what is ``held`` stays.  A rehearsal decides.
    """
    if watch.told:
        watch.mix(layer, [dim], text)
        return
    size, level = math.gcd(*ends, layer.shape[dim]), watch.level()
    labels = line(layer, dim)
    if all(_seam(watch, labels, n) for n in ends):
        if level == 0:
            return
        level -= 1
    if layer.shape[dim] // size > MOST_PIECES or size < min(4, *np.diff([0, *ends, layer.shape[dim]])) or size == 1:
        watch.mix(layer, [dim], text, held=held)
    elif level >= 1:
        watch.hold(layer[(slice(None),) * dim + (held,)], "is cut at a fixed width")
    else:
        if held != ALL:
            watch.shared.setdefault(watch.key(), set()).update(watch.axes_in(labels))
        first, *others = np.split(layer, range(size, layer.shape[dim], size), dim)
        for piece in others:
            watch.tie(first, piece)


def _counted_off(total: int, *places: int | None) -> slice:
    """The positions that have to stay for ``places`` to be the same ones: those before, or of negative numbers behind."""
    inside = [n for n in places if n is not None and -total < n < total]
    front, back = max([0, *inside]), max([0, *(-n for n in inside)])
    return slice(0, front) if not back else slice(total - back, total) if not front else ALL


@rule("slice", "narrow")
def slice_(watch: Watch, call: Call) -> None:
    tensor, known = call.first, state(call.first)
    out, dim = call.out, call["dim"] % max(tensor.ndim, 1)
    layers = []
    for layer in known.layers:
        size, total = out.shape[dim], tensor.shape[dim]
        if layer.shape[dim] > 1 and size != total:
            start = (call["start"] or 0) % total
            if call.get("step", 1) == 1 and size:
                labels = line(layer, dim)
                ends = [n for n in (start, start + size) if 0 < n < total]
                if not all(watch.follow(n, labels[:n]) or watch.follow(total - n, labels[n:]) for n in ends):
                    held = _counted_off(total, call["start"] or 0, call["end"])
                    shares(watch, layer, dim, ends, "is sliced at a fixed index", held=held)
            elif start == 0 and size and size * call["step"] == total and not watch.level():
                every = np.moveaxis(layer, dim, 0).reshape(size, call["step"], -1)  # of a few neighbours the first
                watch.tie(every, every[:, :1])
            else:
                watch.mix(layer, [dim], "is sliced at a fixed index")
            layer = on_labels(call, layer)
        layers.append(compact(layer))
    watch.put(call.out, layers, source=known.source, derived=known.derived, pending=known.pending)


@rule(
    "split",
    "split_with_sizes",
    "chunk",
    "unbind",
    "tensor_split",
    "unsafe_split",
    "unsafe_split_with_sizes",
    "unsafe_chunk",
)
def split(watch: Watch, call: Call) -> None:
    tensor, known = call.first, state(call.first)
    unbinds = call.packet is aten.unbind
    out, dim = call.out, call["dim"] % tensor.ndim
    pieces: list[list[Layer]] = [[] for _ in out]
    for layer in known.layers:
        if layer.shape[dim] > 1:
            if unbinds and varying(layer) == (dim,) and watch.is_made(layer):  # of a state of zeros that of one layer
                watch.freeze([layer], "is unbound one by one")
                continue
            if unbinds:
                watch.mix(layer, [dim], "is unbound one by one")
            elif len(out) > 1:
                sizes = [o.shape[dim] for o in out]
                parts = np.split(line(layer, dim), np.cumsum(sizes)[:-1])
                follow = [watch.follow(n, part) for n, part in zip(sizes, parts, strict=True)]
                if any(follow):
                    watch.freeze([m for m, f in zip(parts, follow, strict=True) if not f], "is split at a fixed width")
                else:
                    shares(watch, layer, dim, np.cumsum(sizes)[:-1].tolist(), "is split at fixed widths")
            cut = on_labels(call, layer)
        else:
            cut = [layer.squeeze(dim) if unbinds else layer] * len(out)
        for piece, part in zip(pieces, cut, strict=True):
            piece.append(compact(part))
    for o, layers in zip(out, pieces, strict=True):
        watch.put(o, layers, derived=known.derived, pending=known.pending)


@rule("select")
def select(watch: Watch, call: Call) -> None:
    tensor, known = call.first, state(call.first)
    dim, index = call["dim"] % tensor.ndim, call["index"]
    layers = []
    for layer in known.layers:
        held = slice(0, index + 1) if index >= 0 else slice(tensor.shape[dim] + index, None)
        watch.mix(layer, [dim], "is selected by a fixed index", held=held)
        layers.append(compact(np.asarray(layer.take(index if layer.shape[dim] > 1 else 0, dim))))
    watch.put(call.out, layers, derived=known.derived, pending=known.pending)


@rule("cat", "concat", "concatenate")
def cat(watch: Watch, call: Call) -> None:
    tensors = [t for t in call.first if t.numel() or t.ndim == call.out.ndim]
    dim = call["dim"] % call.out.ndim
    watch.put(call.out, join(watch, tensors, dim), derived=derived_from(tensors), pending=pending_of(tensors))


def join(watch: Watch, tensors: Sequence[Tensor], dim: int) -> list[Layer]:
    """Layers after concatenation: labels line up along ``dim`` and must agree along every other dimension."""
    if not any(state(t).layers for t in tensors):
        return []
    for t in tensors:  # whose width a constant follows cannot be seen where it is only joined
        made = [m for m in state(t).layers if m.shape[dim] > 1 and int(m.flat[-1]) in watch.made_labels]
        if made:
            watch.freeze(made, "is as wide as the forward says, and joined to others")
            watch.put_all(t, [m for m in state(t).layers if not any(m is n for n in made)])
    along = [any(layer.shape[dim] > 1 for layer in state(t).layers) for t in tensors]
    single = [t.shape[dim] == 1 and any(not varying(m) for m in state(t).layers) for t in tensors]
    if any(along) or (any(single) and all(len(state(t).layers) <= 1 for t in tensors)):
        new = np.concatenate([watch.vector(t, dim) for t in tensors])
        shape = [1] * tensors[0].ndim
        shape[dim] = -1
        return [new.reshape(shape)] if np.count_nonzero(new) else []
    base = tensors[0]
    narrow = [t.narrow(dim, 0, 1) for t in tensors]
    for short, full in zip(narrow, tensors, strict=True):
        short._espalier = State(state(full).layers)  # type: ignore[attr-defined]
    return combine(watch, narrow, base.narrow(dim, 0, 1).shape)


@rule("stack")
def stack(watch: Watch, call: Call) -> None:
    tensors, dim = call.first, call["dim"] % call.out.ndim
    layers = combine(watch, tensors, tensors[0].shape)
    derived = derived_from(tensors)
    watch.put(call.out, [np.expand_dims(layer, dim) for layer in layers], derived=derived, pending=pending_of(tensors))


@rule("index_select")
def numbered(watch: Watch, call: Call) -> None:
    """What is read by number cannot move; what lies along other dimensions is not touched."""
    dim = call["dim"] % max(call.first.ndim, 1)
    kept = []
    for layer in state(call.first).layers:
        if layer.shape[dim] > 1:
            watch.freeze([layer], "channels are selected by number")
        else:
            kept.append(layer)
    watch.put(call.out, kept, derived=derived_from([call.first]))


@rule("gather")
def gather(watch: Watch, call: Call) -> None:
    """Every channel by itself, by numbers of its own, along another dimension: ``index`` has to be as wide."""
    tensor, index, dim = call.first, call["index"], call["dim"] % max(call.first.ndim, 1)
    kept = []
    for layer in state(tensor).layers:
        if layer.shape[dim] > 1 or any(index.shape[d] != layer.shape[d] for d in varying(layer)):
            watch.freeze([layer], "channels are selected by number")
        else:
            kept.append(layer)
    for layer in state(index).layers:
        same = [m for m in kept if varying(m) == varying(layer)]
        if same:
            watch.tie(same[0], layer)
        else:
            watch.freeze([layer], "are numbers to select by")
    watch.put(call.out, kept, derived=derived_from([tensor]), pending=state(tensor).pending)


def _read(call: Call, layer: Layer) -> Layer | None:
    """What ``x[indices]`` makes of a layer of ``x``; ``None`` if its channels lie along what is indexed.

    Which rows are read is no matter then.
    """
    places, rows = _indexed(call)
    layer = align(layer, call.first.ndim)
    if any(layer.shape[d] > 1 for d in places):
        return None
    return layer.reshape(_with_rows(layer.shape, places, (1,) * len(rows)))


def _indexed(call: Call) -> tuple[list[int], tuple[int, ...]]:
    """The dimensions that are read by number, and the shape of the numbers.

    A mask of ``n`` dimensions reads like ``n`` vectors of row numbers.
    """
    numbers: list[tuple[int, ...] | None] = []
    for i in call["indices"]:
        masks = i is not None and i.dtype in (torch.bool, torch.uint8)
        numbers += [None] if i is None else [(i.numel(),)] * i.ndim if masks else [tuple(i.shape)]
    shapes = [at for at in numbers if at is not None]
    return [d for d, at in enumerate(numbers) if at is not None], np.broadcast_shapes(*shapes)


def _with_rows(shape: Sequence[int], places: list[int], rows: tuple[int, ...]) -> tuple[int, ...]:
    """``shape`` with ``rows`` in place of the dimensions ``places``: at the first if they are neighbours, else in front."""
    rest = [n for d, n in enumerate(shape) if d not in places]
    at = places[0] if places and places[-1] - places[0] + 1 == len(places) else 0
    return (*rest[:at], *rows, *rest[at:])


@rule("index")
def index(watch: Watch, call: Call) -> None:
    """Rows are chosen by number or by a mask, while channels lie along another dimension."""
    watch.freeze([m for i in call["indices"] if i is not None for m in state(i).layers], "are numbers to select by")
    watch.put(call.out, _readable(watch, call), derived=derived_from([call.first]))


def _readable(watch: Watch, call: Call) -> list[Layer]:
    kept = []
    for layer in state(call.first).layers:
        read = _read(call, layer)
        if read is None:
            watch.freeze([layer], "channels are selected by number")
        else:
            kept.append(compact(read))
    return kept


@rule("index_put", "index_put_")
def index_put(watch: Watch, call: Call) -> None:
    """Rows are written: they are combined with what was there, and the others stay."""
    watch.freeze([m for i in call["indices"] if i is not None for m in state(i).layers], "are numbers to select by")
    into, values, known = call.first, call["values"], state(call.first)
    rows = values.new_empty(_with_rows(into.shape, *_indexed(call)))
    watch.put(rows, _readable(watch, call))
    combine(watch, [rows, values], rows.shape)
    watch.put(call.out, [m for m in known.layers if _read(call, m) is not None], derived=derived_from([into, values]))


@rule("constant_pad_nd")
def pad(watch: Watch, call: Call) -> None:
    """Spatial padding belongs to its channel; new channels are known only where a ``ChannelPad`` makes them."""
    tensor, amounts, known = call.first, call["pad"], state(call.first)
    watch.made += 1
    layers = []
    for layer in known.layers:
        amount = {tensor.ndim - 1 - i: tuple(amounts[2 * i : 2 * i + 2]) for i in range(len(amounts) // 2)}
        padded = [d for d in varying(layer) if amount.get(d, (0, 0)) != (0, 0)]
        if padded == [1] and isinstance(watch.module, ChannelPad) and len(varying(layer)) == 1:
            name = watch.module_name
            before = watch.axis_labels(number_name(name, "before"), 0, watch.module.before)
            after = watch.axis_labels(number_name(name, "after"), 0, watch.module.after)
            vec = np.concatenate([before, layer.reshape(-1), after])
            layer = vec.reshape([1, -1] + [1] * (tensor.ndim - 2))
        elif padded and (both := _padding(watch, layer, padded, amount[padded[0]])) is not None:
            layer = both
        elif padded:
            watch.freeze([layer], "channels are padded by a fixed number")
            continue
        layers.append(layer)
    watch.put(call.out, layers, derived=known.derived, pending=known.pending)


def _padding(watch: Watch, layer: Layer, dims: list[int], amount: tuple[int, int]) -> Layer | None:
    """``layer`` with new channels before and after it, as many as numbers of modules or sizes say; ``None`` where none do."""
    if dims != [1] or varying(layer) != (1,) or watch.level():
        return None
    before, after = (_new_channels(watch, size, f"made{watch.made}.{side}") for side, size in enumerate(amount))
    if before is None or after is None or (len(before), len(after)) != amount:
        return None
    vec = np.concatenate([before, layer.reshape(-1), after])
    return vec.reshape([1, -1] + [1] * (layer.ndim - 2))


def _new_channels(watch: Watch, size: int, name: str) -> np.ndarray | None:
    """As many as a number of a module says, or what is left of a tensor's size after another's; ``None`` where neither does."""
    if size <= 0:
        return np.zeros(0, dtype=np.int64)
    if numbers := watch.said.get(size):
        return numbers[0].labels(watch)
    given = next((n for n in watch.said_sizes if type(n) is Width and n == size), None)
    return watch.like_axis(number_name(watch.module_name, name), given, size)
