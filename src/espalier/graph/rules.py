"""One rule per ATen operation: what it does to labels.

A rule is called after the operation ran, as ``rule(watch, func, args, kwargs, out)``, and describes ``out`` with
``watch.put``.  To support a new operation, write a function below and add it to ``RULES``; an operation without a rule
freezes whatever labels reach it, so a missing rule costs compression but never correctness.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from espalier.graph.watch import (
    COMPUTED,
    FLOWING,
    PLAIN,
    Layer,
    RawSite,
    Reason,
    State,
    Watch,
    compact,
    narrowed,
    state,
    tensors_of,
    varying,
)
from espalier.layers import ChannelPad

aten = torch.ops.aten
Rule = Callable[[Watch, Any, Any, Any, Any], None]
RULES: dict[Any, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function for ATen operations by name; names this torch does not have are skipped."""

    def register(function: Rule) -> Rule:
        for name in names:
            packet = getattr(aten, name, None)
            if packet is not None:
                RULES[packet] = function
        return function

    return register


def align(layer: Layer, ndim: int) -> Layer:
    return layer if layer.ndim == ndim else layer.reshape((1,) * (ndim - layer.ndim) + tuple(layer.shape))


def argument(func: Any, args: Any, kwargs: Any, name: str, default: Any) -> Any:
    """The value of one argument of an operation, however it was given."""
    for position, known in enumerate(func._schema.arguments):
        if known.name == name and position < len(args):
            return args[position]
    return kwargs.get(name, default)


def dims_of(dims: Any, ndim: int) -> list[int]:
    """Normalise a reduction's ``dim`` argument; ``None`` and ``[]`` mean all."""
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return list(range(ndim))
    if isinstance(dims, int):
        dims = [dims]
    return [d % ndim for d in dims] if ndim else []


def derived_from(operands: Sequence[Tensor]) -> int:
    """``State.derived`` of what is made of ``operands``; a tensor the watch has never seen is no parameter."""
    kinds = [state(t).derived for t in operands]
    return max(kinds) if kinds and 0 not in kinds else 0


def pending_of(operands: Sequence[Tensor]) -> tuple[tuple[np.ndarray, Reason], ...]:
    return tuple(p for t in operands for p in state(t).pending)


def settle(watch: Watch, operands: Sequence[Tensor]) -> None:
    """Weights whose inputs were mixed by a statistic meet an activation other than as a weight: freeze what was mixed."""
    for tensor in operands:
        for labels, reason in state(tensor).pending:
            watch.mixes.append((labels, reason))


# -- element-wise ------------------------------------------------------------------------------------------------------


def combine(watch: Watch, operands: Sequence[Tensor], shape: Sequence[int]) -> list[Layer]:
    """Layers of an element-wise result of ``shape``: matching dimensions tie, a fixed partner freezes."""
    first = state(operands[0]).layers if operands else ()
    if len(first) == 1 and first[0].size > 1 and all(t.shape == shape and _is_alike(t, first[0]) for t in operands):
        for other in operands[1:]:  # a residual sum, as most are
            watch.tie(first[0], state(other).layers[0])
        return [compact(first[0])]
    ndim = len(shape)
    merged: list[Layer] = []
    shapes = [(1,) * (ndim - t.ndim) + tuple(t.shape) for t in operands]
    for tensor in operands:
        for layer in state(tensor).layers:
            layer = align(layer, ndim)
            dims = varying(layer)
            if not dims and any(
                other is not tensor and max(s, default=1) > 1 for other, s in zip(operands, shapes, strict=True)
            ):
                watch.freeze([layer], "is a single channel that is broadcast")
                continue
            if _meets_fixed(tensor, dims, operands, shapes, ndim):
                watch.freeze([layer], "is combined element by element with a tensor of fixed size")
                continue
            for i, known in enumerate(merged):
                if set(varying(known)) & set(dims) or (not dims and not varying(known)):
                    watch.tie(known, layer)
                    if known.shape != layer.shape:
                        known = np.broadcast_to(known, np.broadcast_shapes(known.shape, layer.shape))
                    merged[i] = compact(known)
                    break
            else:
                merged.append(layer)
    return merged


def _is_alike(tensor: Tensor, layer: Layer) -> bool:
    """Are the channels of ``tensor`` where those of ``layer`` are, and nowhere else?"""
    layers = state(tensor).layers
    return len(layers) == 1 and layers[0].shape == layer.shape


def _meets_fixed(
    tensor: Tensor, dims: tuple[int, ...], operands: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], ndim: int
) -> bool:
    """Another operand is as long as this one along its channels, but no channels of its own are known there."""
    for other, size in zip(operands, shapes, strict=True):
        if other is not tensor:
            theirs = [align(m, ndim) for m in state(other).layers]
            if any(size[d] > 1 and not any(m.shape[d] > 1 for m in theirs) for d in dims):
                return True
    return False


KEEPS_ZERO = {
    getattr(aten, name)
    for name in (
        "mul", "mul_", "div", "div_", "neg", "neg_", "abs", "abs_", "sign", "sgn", "round", "trunc", "relu", "relu_", "tanh",
        "leaky_relu", "gelu", "silu", "hardswish", "erf", "sin", "atan", "square", "asinh", "sinh",
    )
}  # fmt: skip
"""Operations that make zero of a parameter that is zero (of a quotient: of its first operand)."""


def computed(func: Any, operands: Sequence[Tensor]) -> bool:
    """Could the result be other than zero where a parameter among ``operands`` is zero?"""
    packet = func._overloadpacket
    quotient = packet in (aten.div, aten.div_)
    return packet not in KEEPS_ZERO or (quotient and any(state(t).layers for t in operands[1:]))


def pointwise(watch: Watch, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    operands, outs = tensors_of(args, kwargs), tensors_of(out)
    derived = derived_from(operands)
    if derived == PLAIN and computed(func, operands):
        derived = COMPUTED
    shape = outs[0].shape if outs else ()
    if len(operands) == 1 and operands[0].shape == shape:
        known = state(operands[0])
        for o in outs:
            watch.put(o, known.layers, derived=derived, pending=known.pending)
        return
    layers = combine(watch, operands, shape)
    pending = pending_of(operands)
    if not derived:
        settle(watch, operands)
        pending = ()
    for o in outs:
        watch.put(o, layers, derived=derived, pending=pending)


RULES["pointwise"] = pointwise
rule(
    "hardswish", "hardswish_", "_prelu_kernel", "where", "copy_", "celu", "celu_", "elu", "elu_", "softplus", "mish", "mish_",
    "hardsigmoid_", "hardtanh", "hardtanh_", "threshold", "threshold_", "log_sigmoid_forward", "rrelu_with_noise", "selu",
    "leaky_relu", "leaky_relu_", "logit", "hardshrink", "softshrink", "masked_fill", "masked_fill_", "relu6", "silu", "silu_",
    "lerp", "addcmul", "addcdiv", "dropout", "feature_dropout", "maximum", "minimum",
)(pointwise)  # fmt: skip


@rule("clone", "contiguous", "detach", "alias", "_to_copy", "lift_fresh", "lift_fresh_copy", "native_dropout", "empty_like",
      "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "bernoulli_", "bernoulli", "fill_", "zero_",
      "uniform_", "normal_", "fill", "_reshape_alias_copy", "positive")  # fmt: skip
def same(watch: Watch, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """The result has the channels of the first operand."""
    known = state(args[0])
    for o in tensors_of(out):
        watch.put(o, known.layers, source=known.source, derived=known.derived, pending=known.pending)


@rule("as_strided_")
def restrided(watch: Watch, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """In place: the same elements in the same shape with other strides (adaptive pooling to 1x1 ends so)."""
    if all(
        len(args[1]) == m.ndim and all(s in (1, n) for s, n in zip(m.shape, args[1], strict=True))
        for m in state(out).layers
    ):
        return
    unknown(watch, func, args, kwargs, out)


def unknown(watch: Watch, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """No rule: freeze every label that gets here, and list the operation."""
    operands = tensors_of(args, kwargs)
    if any(state(t).layers for t in operands):
        watch.freeze_operands(args, kwargs, f"{func._overloadpacket} has no rule")
        watch.unknown[f"{func._overloadpacket} in {watch.place()}"] = None
    if operands:
        constant_macs(watch, func, args, kwargs, out)
    for o in tensors_of(out):
        watch.put(o)


RULES["unknown"] = unknown


def fixed(watch: Watch, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """A rehearsal has shown that this line, or the module it is in, works for one size only."""
    watch.freeze_operands(args, kwargs, watch.reason())
    constant_macs(watch, func, args, kwargs, out)
    derived = derived_from(tensors_of(args, kwargs))
    for o in tensors_of(out):
        watch.put(o, derived=derived)


RULES["fixed"] = fixed


def constant_macs(watch: Watch, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """MACs of an operation whose sizes are fixed, from torch's own table of closed forms."""
    from torch.utils.flop_counter import flop_registry

    count = flop_registry.get(func._overloadpacket)
    if count is not None:
        macs = count(*args, **kwargs, out_val=out) // 2
        watch.sites.append(RawSite(watch.module_name, str(func._overloadpacket), None, int(macs), (), watch.clock))


# -- views: executed on the labels -------------------------------------------------------------------------------------


def on_labels(func: Any, layer: Layer, args: Any, kwargs: Any) -> Any:
    """What the operation makes of a layer in the place of its first operand: an array, or several."""
    whole = torch.from_numpy(layer if layer.flags.writeable else layer.copy()).expand(args[0].shape)
    made = func(whole, *args[1:], **kwargs)
    return made.numpy() if isinstance(made, Tensor) else [m.numpy() for m in made]


def executed(watch: Watch, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Run the operation itself on the labels."""
    known = state(args[0])
    layers = [compact(on_labels(func, layer, args, kwargs)) for layer in known.layers]
    watch.put(out, layers, source=known.source, derived=known.derived, pending=known.pending)


rule("squeeze", "flip", "repeat", "unfold", "roll")(executed)


@rule("permute", "transpose", "t", "unsqueeze", "movedim")
def turned(watch: Watch, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Dimensions change places, channels do not."""
    turn = TURNS.get(func._overloadpacket)
    if turn is None or kwargs:
        executed(watch, func, args, kwargs, out)
        return
    tensor, known = args[0], state(args[0])
    layers = [turn(align(layer, tensor.ndim), *args[1:]) for layer in known.layers]
    watch.put(out, layers, source=known.source, derived=known.derived, pending=known.pending)


TURNS: dict[Any, Callable[..., Layer]] = {
    aten.t: np.transpose,
    aten.transpose: np.swapaxes,
    aten.permute: np.transpose,
    aten.unsqueeze: np.expand_dims,
}


@rule("expand")
def expand(watch: Watch, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    known = state(args[0])
    layers = [align(layer, out.ndim) for layer in known.layers]
    watch.put(out, layers, source=known.source, derived=known.derived, pending=known.pending)


def reshaped(layer: Layer, shape: Sequence[int], new: Sequence[int]) -> Layer:
    """What reshaping ``shape`` to ``new`` makes of a layer: written out only in the dimensions that its channels share.

    Neighbouring dimensions are taken together until both sides have the same product; where the labels do not change
    along any of them, they need no copy of a weight's or an activation's size.
    """
    if 0 in shape:
        return np.broadcast_to(layer, shape).reshape(new)
    before, after = (np.cumprod([1, *sizes]) for sizes in (shape, new))
    expanded: list[int] = []
    final: list[int] = []
    for product in np.intersect1d(before, after):
        i, j = (int(np.searchsorted(p, product, side="right")) - 1 for p in (before, after))
        changes = any(n > 1 for n in layer.shape[len(expanded) : i])
        expanded += shape[len(expanded) : i] if changes else [1] * (i - len(expanded))
        final += new[len(final) : j] if changes else [1] * (j - len(final))
    return np.broadcast_to(layer, expanded).reshape(final)


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten")
def view(watch: Watch, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Merging dimensions only flows; splitting the channel axis says that one factor stays fixed, which one is tried out.

    First guess: the last factor shrinks (``view(b, groups, c // groups, h, w)``), then the first
    (``view(b, c // 4, 2, 2, h, w)``), then none.  A rehearsal decides, see ``trace``.
    """
    tensor, known = args[0], state(args[0])
    layers = []
    for layer in known.layers:
        result = compact(reshaped(align(layer, tensor.ndim), tensor.shape, out.shape))
        dims = varying(result)
        level = watch.level()
        if level and len(dims) <= 1:
            watch.freeze([result], "a view fixes the number of channels")
        elif len(dims) > max(1, len(varying(layer))):
            if level >= 2:
                watch.freeze([result], "a view splits the channels in a way that does not follow their number")
            else:
                shrinking = dims[-1] if level == 0 else dims[0]
                for dim in dims:
                    if dim != shrinking:
                        watch.tie(result, narrowed(result, dim))
        layers.append(result)
    watch.put(out, layers, source=known.source, derived=known.derived, pending=known.pending)


@rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle")
def shuffle(watch: Watch, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    tensor = args[0]
    vec = watch.vector(tensor, -3 if "pixel" in str(func) else 1)
    if not vec.any():
        watch.put(out)
        return
    if func._overloadpacket is aten.pixel_shuffle:  # (C*r*r, H, W) -> (C, H*r, W*r)
        block = vec.reshape(-1, args[1] ** 2)
        watch.tie(block, block[:, :1])
        new = block[:, 0]
    elif func._overloadpacket is aten.pixel_unshuffle:  # (C, H*r, W*r) -> (C*r*r, H, W)
        new = vec.repeat(args[1] ** 2)
    else:
        block = vec.reshape(args[1], -1)
        watch.tie(block, block[:1])
        new = block.T.reshape(-1)
    shape = [1] * out.ndim
    shape[-3 if "pixel" in str(func) else 1] = -1
    watch.put(out, [new.reshape(shape)])


def chunked(watch: Watch, layer: Layer, dim: int, size: int) -> None:
    """``layer`` is cut along ``dim`` into equal pieces: they stay equal only if their channels go together."""
    if watch.level() >= 1:
        watch.freeze([layer], "is cut at a fixed width")
        return
    pieces = np.split(layer, range(size, layer.shape[dim], size), dim)
    for piece in pieces[1:]:
        watch.tie(pieces[0], piece)


@rule("slice", "narrow")
def slice_(watch: Watch, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    tensor, known = args[0], state(args[0])
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % max(tensor.ndim, 1)
    start = args[2] if len(args) > 2 else kwargs.get("start", 0)
    step = args[4] if len(args) > 4 else kwargs.get("step", 1)
    layers = []
    for layer in known.layers:
        if layer.shape[dim] > 1 and out.shape[dim] != tensor.shape[dim]:
            size, total = out.shape[dim], tensor.shape[dim]
            start = (start or 0) % total
            if step == 1 and func._overloadpacket is aten.slice and size and total % size == 0 and start % size == 0:
                chunked(watch, layer, dim, size)
            else:
                watch.mix(layer, [dim], "is sliced at a fixed index")
            layer = on_labels(func, layer, args, kwargs)
        layers.append(compact(layer))
    watch.put(out, layers, source=known.source, derived=known.derived, pending=known.pending)


@rule("split", "split_with_sizes", "chunk", "unbind", "tensor_split")
def split(watch: Watch, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    tensor, known = args[0], state(args[0])
    unbinds = func._overloadpacket is aten.unbind
    dim = (args[1 if unbinds else 2] if len(args) > (1 if unbinds else 2) else kwargs.get("dim", 0)) % tensor.ndim
    pieces: list[list[Layer]] = [[] for _ in out]
    for layer in known.layers:
        if layer.shape[dim] > 1:
            if unbinds:
                watch.mix(layer, [dim], "is unbound one by one")
            elif len({o.shape[dim] for o in out}) == 1:
                if len(out) > 1:
                    chunked(watch, layer, dim, out[0].shape[dim])
            else:
                watch.mix(layer, [dim], "is split at fixed widths")
            cut = on_labels(func, layer, args, kwargs)
        else:
            cut = [layer.squeeze(dim) if unbinds else layer] * len(out)
        for piece, part in zip(pieces, cut, strict=True):
            piece.append(compact(part))
    for o, layers in zip(out, pieces, strict=True):
        watch.put(o, layers, derived=known.derived, pending=known.pending)


@rule("select")
def select(watch: Watch, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    tensor, known = args[0], state(args[0])
    dim = args[1] % tensor.ndim
    layers = []
    for layer in known.layers:
        watch.mix(layer, [dim], "is selected by a fixed index")
        layers.append(compact(np.asarray(np.broadcast_to(layer, tensor.shape).take(args[2], dim))))
    watch.put(out, layers, derived=known.derived, pending=known.pending)


@rule("cat", "concat", "concatenate")
def cat(watch: Watch, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    tensors = [t for t in args[0] if t.numel() or t.ndim == out.ndim]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim
    watch.put(out, join(watch, tensors, dim), derived=derived_from(tensors), pending=pending_of(tensors))


def join(watch: Watch, tensors: Sequence[Tensor], dim: int) -> list[Layer]:
    """Layers after concatenation: labels line up along ``dim`` and must agree along every other dimension."""
    if not any(state(t).layers for t in tensors):
        return []
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
def stack(watch: Watch, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim
    layers = combine(watch, list(args[0]), args[0][0].shape)
    derived = derived_from(list(args[0]))
    watch.put(out, [np.expand_dims(layer, dim) for layer in layers], derived=derived, pending=pending_of(args[0]))


@rule("index_select")
def numbered(watch: Watch, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """What is read by number cannot move."""
    watch.freeze_operands(args, kwargs, "channels are selected by number")
    watch.put(out, derived=derived_from([args[0]]))


@rule("constant_pad_nd")
def pad(watch: Watch, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Spatial padding belongs to its channel; new channels are known only where a ``ChannelPad`` makes them."""
    tensor, amounts, known = args[0], args[1], state(args[0])
    layers = []
    for layer in known.layers:
        amount = {tensor.ndim - 1 - i: tuple(amounts[2 * i : 2 * i + 2]) for i in range(len(amounts) // 2)}
        padded = [d for d in varying(layer) if amount.get(d, (0, 0)) != (0, 0)]
        if padded == [1] and isinstance(watch.module, ChannelPad) and len(varying(layer)) == 1:
            name = watch.module_name
            before = watch.axis_labels(f"{name}#before", 0, watch.module.before)
            after = watch.axis_labels(f"{name}#after", 0, watch.module.after)
            vec = np.concatenate([before, layer.reshape(-1), after])
            layer = vec.reshape([1, -1] + [1] * (tensor.ndim - 2))
        elif padded:
            watch.freeze([layer], "channels are padded by a fixed number")
            continue
        layers.append(layer)
    watch.put(out, layers, derived=known.derived, pending=known.pending)


# -- statistics over dimensions ----------------------------------------------------------------------------------------


def reduced(watch: Watch, args: Any, out: Any, dims: list[int], keepdim: bool, text: str) -> None:
    """A reduction over ``dims``; a weight that is normalised over its own inputs may still be baked into a plain one."""
    known = state(args[0])
    layers, pending = [], list(known.pending)
    for layer in known.layers:
        touched = [d for d in dims if layer.shape[d] > 1]
        if touched and known.derived:
            pending.append((layer.reshape(1, -1), Reason(text, watch.place())))
        elif touched:
            watch.mix(layer, touched, text)
        for d in dims:
            layer = narrowed(layer, d)
        if not keepdim:
            layer = layer.reshape([s for d, s in enumerate(layer.shape) if d not in dims])
        if not touched or not known.derived:
            layers.append(layer)
    for o in tensors_of(out):
        watch.put(o, layers, derived=known.derived, pending=tuple(pending))


@rule("mean", "sum", "amax", "amin", "var", "std", "var_mean", "std_mean", "norm", "linalg_vector_norm", "prod", "max", "min",
      "logsumexp", "argmax", "argmin", "any", "all", "median", "nansum")  # fmt: skip
def reduction(watch: Watch, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    if len(tensors_of(args, kwargs)) > 1:  # max(a, b)
        pointwise(watch, func, args, kwargs, out)
        return
    dims = dims_of(argument(func, args, kwargs, "dim", None), args[0].ndim)
    keepdim = bool(argument(func, args, kwargs, "keepdim", False))
    reduced(watch, args, out, dims, keepdim, f"{func._overloadpacket} runs over these channels")


@rule(
    "_softmax",
    "_log_softmax",
    "_safe_softmax",
    "softmax",
    "log_softmax",
    "cumsum",
    "cumprod",
    "sort",
    "argsort",
    "topk",
)
def along(watch: Watch, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    known, dim = state(args[0]), int(argument(func, args, kwargs, "dim", -1)) % max(args[0].ndim, 1)
    layers = []
    for layer in known.layers:
        watch.mix(layer, [dim], f"{func._overloadpacket} runs over these channels")
        layers.append(layer if tensors_of(out)[0].shape == args[0].shape else narrowed(layer, dim))
    for o in tensors_of(out):
        watch.put(o, layers)


def spatial(watch: Watch, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Pooling, resizing, reflecting: every channel by itself, over the last dimensions."""
    tensor, known = args[0], state(args[0])
    layers = []
    for layer in known.layers:
        for o in tensors_of(out):
            resized = [d for d in varying(layer) if d >= 2 or o.ndim != tensor.ndim]
            if resized or o.shape[1] != tensor.shape[1]:
                watch.freeze([layer], f"{func._overloadpacket} runs over these channels")
                break
        else:
            layers.append(layer)
    for o in tensors_of(out):
        watch.put(o, layers)


rule(
    "max_pool2d_with_indices", "max_pool3d_with_indices", "max_pool2d", "max_pool1d", "max_pool1d_with_indices", "avg_pool1d",
    "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "upsample_nearest1d",
    "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d", "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d",
    "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
    "replication_pad1d", "replication_pad2d", "replication_pad3d", "fractional_max_pool2d", "grid_sampler", "grid_sampler_2d",
    "grid_sampler_3d",
)(spatial)  # fmt: skip


@rule("glu")
def glu(watch: Watch, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    tensor, known = args[0], state(args[0])
    dim = (args[1] if len(args) > 1 else -1) % tensor.ndim
    layers = []
    for layer in known.layers:
        if layer.shape[dim] > 1:
            one, other = np.split(layer, 2, dim)
            watch.tie(one, other)
            layer = one
        layers.append(layer)
    watch.put(out, layers)


# -- normalisations ----------------------------------------------------------------------------------------------------


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "batch_norm",
      "miopen_batch_norm", "_batch_norm_with_update", "_batch_norm_no_update")  # fmt: skip
def batch_norm(watch: Watch, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Per-channel scale, shift and statistics go with channel 1; also the way weights are standardised."""
    tensor, known = args[0], state(args[0])
    vec = watch.vector(tensor, 1)
    module = watch.module
    if isinstance(module, nn.modules.instancenorm._InstanceNorm) and not tensors_of(args[1:5]) and vec.any():
        width = module.num_features  # it remembers its width, though it has nothing of that width
        watch.tie(vec[:width], watch.axis_labels(f"{watch.module_name}#channels", 0, width))
    for affine in args[1:5]:
        if isinstance(affine, Tensor):
            watch.tie(vec, watch.vector(affine, 0))
            if not known.derived and state(affine).pending:
                settle(watch, [affine])
    layers, pending = [], list(known.pending)
    for layer in known.layers:
        if layer.ndim > 1 and layer.size == layer.shape[1]:
            layers.append(layer)
        elif known.derived:
            text = "the weight is standardised over its inputs"
            pending.append((layer.reshape(1, -1), Reason(text, watch.place())))
            layers.append(layer)
        else:
            watch.mix(layer, [d for d in varying(layer) if d != 1], "batch norm runs over these channels")
    first, *statistics = tensors_of(out)
    watch.put(first, layers, derived=known.derived, pending=tuple(pending))
    for o in statistics:
        watch.put(o, [vec] if o.shape == vec.shape and vec.any() else [], derived=known.derived)


@rule("native_layer_norm", "layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(watch: Watch, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    tensor, known, shape = args[0], state(args[0]), args[1]
    dims = list(range(tensor.ndim - len(shape), tensor.ndim))
    text = f"{func._overloadpacket} takes its statistics over these channels"
    for layer in known.layers:
        watch.mix(layer, dims, text)
    affine = [t for t in tensors_of(args[2:], kwargs) if t.ndim == len(shape)]
    first = tensors_of(out)[0]
    for t in affine:  # its own parameters live as long as what they scale
        if known.layers:
            combine(watch, [tensor, t], tensor.shape)
        else:
            watch.freeze(state(t).layers, text)
    watch.put(first, known.layers)
    for o in tensors_of(out)[1:]:
        watch.put(o)


@rule("native_group_norm", "group_norm")
def group_norm(watch: Watch, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Statistics per group: exact when a whole group of channels goes, so that is the unit."""
    tensor, groups = args[0], args[6] if func._overloadpacket is aten.native_group_norm else args[1]
    affine = [t for t in tensors_of(args[1:4]) if t.ndim == 1]
    vec = watch.vector(tensor, 1)
    for t in affine:
        watch.tie(vec, watch.vector(t, 0))
    block = vec.reshape(groups, -1)
    known = isinstance(watch.module, nn.GroupNorm) and watch.module.num_groups == groups
    if known and vec.any():
        watch.tie(vec, watch.axis_labels(f"{watch.module_name}#channels", 0, vec.size))
    if groups == 1 and block.shape[1] > 1:
        watch.mix(block, [1], "group norm with one group takes its statistics over these channels")
    elif not known:
        watch.freeze([vec], "a functional group norm fixes the number of groups")
    else:
        watch.tie(block, block[:, :1])
        watch.whole_groups[watch.module_name] = block.shape[1]
    first, *statistics = tensors_of(out)
    watch.put(first, state(tensor).layers)
    for o in statistics:  # (n, groups)
        watch.put(o, [block[:, 0].reshape(1, -1)] if vec.any() else [])


# -- convolutions and matrix products ----------------------------------------------------------------------------------

GROUPS_TAKEN_WHOLE = 4  # from this many groups on, a convolution loses whole groups; below, it loses positions in all


@rule("convolution", "_convolution", "cudnn_convolution", "mkldnn_convolution")
def convolution(watch: Watch, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Weight ``(O, I/g, ...)``, transposed ``(I, O/g, ...)``: outputs are made, inputs are consumed."""
    x, weight, bias = args[0], args[1], args[2]
    transposed, groups = args[6], args[8]
    channels = watch.vector(x, 1 if x.ndim == weight.ndim else 0)
    known = state(weight)
    rows, cols = watch.vector(weight, 0), watch.vector(weight, 1)
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
        made = grouped(watch, channels, rows, cols, groups, transposed)
    else:
        consumed = rows if transposed else cols
        watch.tie(channels, consumed)
        watch.consume(consumed)
    if isinstance(bias, Tensor):
        watch.tie(made, watch.vector(bias, 0))
    positions = x if transposed else out
    spatial = math.prod(positions.shape[2 - (x.ndim != weight.ndim) :]) * (x.shape[0] if x.ndim == weight.ndim else 1)
    watch.sites.append(
        RawSite(
            watch.module_name,
            "transposed convolution" if transposed else "convolution",
            known.source,
            int(spatial * math.prod(weight.shape[2:])),
            (rows, cols),
            watch.clock,
            baked=bool(bake),
        )
    )
    shape = [1] * out.ndim
    shape[1 if x.ndim == weight.ndim else 0] = -1
    watch.put(out, [made.reshape(shape)] if np.count_nonzero(made) else [])


def baked_columns(watch: Watch, module: nn.Module, cols: np.ndarray) -> np.ndarray:
    """Input labels of a weight that is computed: those of the raw parameter, which went through a statistic."""
    raw = getattr(module, "weight", None)
    if isinstance(raw, Tensor) and state(raw).source is not None:
        return watch.vector(raw, 1)
    return cols


def grouped(
    watch: Watch, channels: np.ndarray, rows: np.ndarray, cols: np.ndarray, groups: int, transposed: bool
) -> np.ndarray:
    """Tie what a grouped convolution needs to stay one; returns the labels of its output channels.

    Many groups (depthwise, ResNeXt): a unit is a whole group, inputs and outputs together, and ``groups`` shrinks.
    Few groups (ResNeSt's 2): a unit is one position in every group, ``groups`` stays.
    """
    inside = channels.size // groups
    outside = (cols.size * groups if transposed else rows.size) // groups
    x = channels.reshape(groups, inside)
    module = watch.module
    if watch.rehearsal is None:
        whole = inside == 1 or groups >= GROUPS_TAKEN_WHOLE
    else:
        whole = watch.module_name in watch.rehearsal.whole_groups
    owned = isinstance(
        module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    )
    if whole and not (owned and module.groups == groups):
        made = np.tile(cols, groups) if transposed else rows
        watch.freeze([channels, rows, cols], "a functional convolution fixes the number of groups")
        return made
    if whole:
        watch.tie(x, x[:, :1])
        watch.whole_groups[watch.module_name] = outside
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


@rule("mm", "bmm", "matmul", "dot", "mv")
def matmul(watch: Watch, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    a, b = args[0], args[1]
    derived = derived_from([a, b])
    if derived and min(a.ndim, b.ndim) == 1:
        weight_times_vector(watch, a, b, out, derived)
    else:
        watch.put(out, contract(watch, func, a, b, out), derived=derived)


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
def addmm(watch: Watch, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    watch.put(out, contract(watch, func, args[1], args[2], out))
    watch.put(out, combine(watch, [out, args[0]], out.shape))


@rule("linear")
def linear(watch: Watch, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    weight, known = args[1], state(args[1])
    flipped = weight.t()
    layers = tuple(m.T for m in known.layers)
    flipped._espalier = State(layers, source=known.source, derived=known.derived, pending=known.pending)  # type: ignore[attr-defined]
    watch.put(out, contract(watch, func, args[0], flipped, out))
    if len(args) > 2 and isinstance(args[2], Tensor):
        watch.put(out, combine(watch, [out, args[2]], out.shape))


def contract(watch: Watch, func: Any, a: Tensor, b: Tensor, out: Tensor) -> list[Layer]:
    """``a (..., m, k) @ b (..., k, n)``: labels along ``k`` meet and end here, the others go through."""
    ka, kb = a.ndim - 1, max(b.ndim - 2, 0)
    ends_b = [m for m in state(b).layers if m.shape[kb] > 1]
    # of a single channel that was flattened every position is an input
    alone = [m for m in state(a).layers if not varying(m) and (a.shape[ka] == 1 or ends_b)]
    ends_a = [m for m in state(a).layers if m.shape[ka] > 1] + alone
    weight = b if state(b).derived else a if state(a).derived else None
    if weight is None and (ends_a or ends_b):
        watch.freeze([*ends_a, *ends_b], "is contracted with another activation")
        inner = np.zeros(a.shape[ka], dtype=np.int64)
    else:
        inner = alone[0].reshape(-1).repeat(a.shape[ka]) if alone else watch.vector(a, ka)
        other = watch.vector(b, kb)
        watch.tie(inner, other)
        if weight is not None:
            settle(watch, [weight])
            if state(weight).derived == COMPUTED:
                watch.freeze([other if weight is b else inner], "belongs to a weight that is computed")
            watch.consume(other if weight is b else inner)
        inner = other if weight is b else inner
    layers = []
    for m in state(a).layers:
        if not any(m is e for e in ends_a) and m.ndim == out.ndim:
            layers.append(m)
    outer = np.zeros(0, dtype=np.int64)
    for m in state(b).layers:
        if not any(m is e for e in ends_b):
            moved = align(m, out.ndim) if b.ndim > 1 else m
            layers.append(moved)
            if weight is b:
                outer = m.reshape(-1)
    macs = out.numel() * a.shape[ka]
    factors = tuple(f for f in (outer, inner) if f.size > 1)
    if weight is not b:
        rest = [m.reshape(-1) for m in layers]
        factors = (inner, *rest)[:3] if inner.size > 1 else tuple(rest[:3])
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


@rule("embedding")
def embedding(watch: Watch, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    table = args[0]
    watch.freeze([m for m in state(table).layers if m.shape[0] > 1], "is looked up by index")
    vec = watch.vector(table, 1)
    watch.put(out, [vec.reshape([1] * (out.ndim - 1) + [-1])] if vec.any() else [])


FLOWING |= {
    pointwise, same, unknown, cat, stack, reduction, along, spatial, batch_norm, layer_norm, group_norm, convolution, matmul,
    addmm, linear, embedding, turned,
}  # fmt: skip


__all__ = ["RULES", "rule"]
