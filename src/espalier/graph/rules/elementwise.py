"""Operations element by element, copies, and what happens to an operation without a rule."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from torch import Tensor

from espalier.carving import number_name
from espalier.graph.call import Call
from espalier.graph.reasons import Reason
from espalier.graph.rules.table import RULES, align, aten, derived_from, pending_of, rule, settle
from espalier.graph.watch import COMPUTED, PLAIN, Layer, RawSite, Watch, compact, state, varying

# -- element-wise ------------------------------------------------------------------------------------------------------


def combine(watch: Watch, operands: Sequence[Tensor], shape: Sequence[int]) -> list[Layer]:
    """Layers of an element-wise result of ``shape``: matching dimensions tie, a fixed partner freezes."""
    first = state(operands[0]).layers if operands else ()
    if len(first) == 1 and first[0].size > 1 and all(t.shape == shape and _is_alike(t, first[0]) for t in operands):
        for other in operands[1:]:  # a residual sum, as most are
            watch.tie(first[0], state(other).layers[0])
        chosen = [state(t).layers[0] for t in operands] if watch.is_made(first[0]) else first
        return [compact(min(chosen, key=watch.is_made))]  # labels of weights say more
    ndim = len(shape)
    merged: list[Layer] = []
    shapes = [(1,) * (ndim - t.ndim) + tuple(t.shape) for t in operands]
    for tensor in operands:
        first_own = len(merged)
        for layer in state(tensor).layers:
            layer = align(layer, ndim)
            dims = varying(layer)
            if not dims and any(
                other is not tensor and max(s, default=1) > 1 for other, s in zip(operands, shapes, strict=True)
            ):
                watch.freeze([layer], "is a single channel that is broadcast")
                continue
            guess = watch.guessed(layer)
            if _meets_fixed(tensor, dims if guess is None else (guess[1],), operands, shapes, ndim):
                watch.freeze([layer], "is combined element by element with a tensor of fixed size")
                continue
            for i, known in enumerate(merged):
                if set(varying(known)) & set(dims) or (not dims and not varying(known)):
                    if i >= first_own:  # of one weight, whose dimensions were flattened
                        watch.freeze([layer], "its channels are entangled with another dimension")
                        break
                    watch.tie(known, layer)
                    if watch.is_made(known):
                        known, layer = layer, known
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
    """Another operand is as long as this one along its channels, but no channels of its own are known there.

    Where it has some along one of the dimensions, every position along the others belongs to them.
    """
    for other, size in zip(operands, shapes, strict=True):
        if other is not tensor and any(size[d] > 1 for d in dims):
            theirs = [align(m, ndim) for m in state(other).layers]
            if not any(m.shape[d] > 1 for m in theirs for d in dims):
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
SUMS = {aten.add, aten.add_, aten.sub, aten.sub_}


PRODUCTS = {aten.mul, aten.mul_}


def _is_zero_with_plain(operands: Sequence[Tensor], ndim: int) -> bool:
    """Does the product have channels along no dimension but those of weights that are zero where their parameter is?"""
    plain, other = (
        {d for t in operands if state(t).derived == kind for m in state(t).layers for d in varying(align(m, ndim))}
        for kind in (PLAIN, COMPUTED)
    )
    return other <= plain


def _places(watch: Watch, tensor: Tensor) -> dict[int | None, Layer]:
    """Dimension -> the layer that has channels along it, be they of several positions each."""
    found: dict[int | None, Layer] = {}
    for layer in state(tensor).layers:
        dims, guess = varying(layer), watch.guessed(layer)
        found[guess[1] if guess is not None else dims[0] if len(dims) == 1 else None] = layer
    return found


def computed(watch: Watch, call: Call, operands: Sequence[Tensor]) -> bool:
    """Could the result be other than zero where a parameter among ``operands`` is zero?"""
    packet = call.packet
    if packet in SUMS and len(operands) == 2:  # where all is zero that both have along the same dimensions
        one, other = (_places(watch, t).keys() for t in operands)
        return operands[0].shape != operands[1].shape or one != other or None in one
    quotient = packet in (aten.div, aten.div_)
    return packet not in KEEPS_ZERO or (quotient and any(state(t).layers for t in operands[1:]))


def pointwise(watch: Watch, call: Call) -> None:
    operands, outs = call.operands, call.outs
    derived = derived_from(operands)
    shape = outs[0].shape if outs else ()
    if derived == COMPUTED and call.packet in PRODUCTS and _is_zero_with_plain(operands, len(shape)):
        derived = PLAIN
    elif derived == PLAIN and computed(watch, call, operands):
        derived = COMPUTED
    if len(operands) == 1 and operands[0].shape == shape:
        known = state(operands[0])
        for o in outs:
            watch.put(o, known.layers, derived=derived, pending=known.pending)
        return
    if derived:  # of a parameter times a mask the parameter says more
        operands.sort(key=lambda t: state(t).source in watch.buffers)
    layers = combine(watch, operands, shape)
    pending = pending_of(operands)
    if derived == PLAIN and call.packet in SUMS and len(operands) == 2:  # who reads the sum reads both
        one, other = (_places(watch, t) for t in operands)
        for dim in one:
            a, b = np.broadcast_arrays(one[dim], other[dim])
            watch.read_alike.append((a, b))
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
    "lerp", "addcmul", "addcdiv", "dropout", "feature_dropout", "maximum", "minimum", "complex", "polar",
)(pointwise)  # fmt: skip


@rule("clone", "contiguous", "detach", "alias", "_to_copy", "lift_fresh", "lift_fresh_copy", "native_dropout", "empty_like",
      "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "bernoulli_", "bernoulli", "fill_", "zero_",
      "uniform_", "normal_", "exponential_", "cauchy_", "log_normal_", "geometric_", "random_", "fill", "_reshape_alias_copy",
      "positive", "_conj", "_conj_physical", "conj_physical", "_neg_view", "resolve_conj", "resolve_neg")  # fmt: skip
def same(watch: Watch, call: Call) -> None:
    """The result has the channels of the first operand."""
    known = state(call.first)
    for o in call.outs:
        watch.put(o, known.layers, source=known.source, derived=known.derived, pending=known.pending)


@rule("fake_quantize_per_channel_affine_cachemask", "_fake_quantize_learnable_per_channel_affine")
def quantised_per_channel(watch: Watch, call: Call) -> None:
    """Every channel with a step of its own, which goes with it; what is zero stays zero."""
    tensor, known, dim = call.first, state(call.first), call["axis"]
    for own in (call["scale"], call["zero_point"]):
        watch.tie(watch.vector(tensor, dim), watch.vector(own, 0))
    for o in call.outs:
        watch.put(o, known.layers, derived=derived_from(call.operands), pending=known.pending)


@rule("fake_quantize_per_tensor_affine_cachemask", "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams")
def quantised(watch: Watch, call: Call) -> None:
    known = state(call.first)
    for o in call.outs:
        watch.put(o, known.layers, derived=derived_from(call.operands), pending=known.pending)


@rule("as_strided_")
def restrided(watch: Watch, call: Call) -> None:
    """In place: the same elements in the same shape with other strides (adaptive pooling to 1x1 ends so)."""
    if all(
        len(call["size"]) == m.ndim and all(s in (1, n) for s, n in zip(m.shape, call["size"], strict=True))
        for m in state(call.out).layers
    ):
        return
    unknown(watch, call)


def unknown(watch: Watch, call: Call) -> None:
    """No rule: freeze every label that gets here, and list the operation."""
    operands = call.operands
    if any(state(t).layers for t in operands):
        watch.freeze_operands(call.args, call.kwargs, f"{call.packet} has no rule")
        watch.unknown[Reason(str(call.packet), watch.place())] = None
    if operands:
        constant_macs(watch, call)
    for o in call.outs:
        watch.put(o)


RULES["unknown"] = unknown


@rule("nonzero", "masked_select", "_unique2", "unique_dim", "torchvision::nms", "repeat_interleave", "bincount")
def decided(watch: Watch, call: Call) -> None:
    """How many rows there are, its values decide: what it reads stays, and what follows is traced as if all passed."""
    watch.freeze_operands(call.args, call.kwargs, f"{call.packet} decides by these values how much there is")
    for o in call.outs:
        watch.put(o)


@rule("_local_scalar_dense")
def told(watch: Watch, call: Call) -> None:
    """``item``, ``if``: what Python does with the value nobody sees."""
    watch.freeze_operands(call.args, call.kwargs, "decides by its value what Python does next")


@rule("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty")
def made_here(watch: Watch, call: Call) -> None:
    """The same number everywhere: it may be as wide as anything that it is combined with, if its size follows.

    Every dimension has labels of its own, which hold no weight.
    """
    new_widths(watch, call.out, range(call.out.ndim))


def new_widths(watch: Watch, out: Tensor, dims: Iterable[int]) -> None:
    """Labels for each of ``dims`` of a tensor that holds no channels; its own, or what a module's number counts."""
    watch.put_all(out, made_widths(watch, out, dims))


def made_widths(watch: Watch, out: Tensor, dims: Iterable[int]) -> list[Layer]:
    """Layers for each of ``dims``, new ones: of labels of their own, or of what a size or a module's number counts."""
    layers = []
    watch.made += 1
    for dim in dims:
        size = out.shape[dim]
        if size > 1:
            labels = watch.made_axis(number_name(watch.module_name, f"made{watch.made}.{dim}"), out, dim)
            if len(labels) == size:  # in a rehearsal it may be another than was predicted
                layers.append(labels.reshape((1,) * dim + (-1,) + (1,) * (out.ndim - dim - 1)))
    return layers


def fixed(watch: Watch, call: Call) -> None:
    """A rehearsal has shown that this line, or the module it is in, works for one size only."""
    watch.freeze_operands(call.args, call.kwargs, watch.reason())
    constant_macs(watch, call)
    derived = derived_from(call.operands)
    for o in call.outs:
        watch.put(o, derived=derived)


RULES["fixed"] = fixed


def constant_macs(watch: Watch, call: Call) -> None:
    """MACs of an operation whose sizes are fixed, from torch's own table of closed forms."""
    from torch.utils.flop_counter import flop_registry

    count = flop_registry.get(call.packet)
    if count is not None:
        macs = count(*call.args, **call.kwargs, out_val=call.out) // 2
        watch.sites.append(RawSite(watch.module_name, str(call.packet), None, int(macs), (), watch.clock))
