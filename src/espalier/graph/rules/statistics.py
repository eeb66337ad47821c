"""Reductions, pooling and normalisations: what runs over channels mixes them, what runs beside them does not."""

from __future__ import annotations

import numpy as np
from torch import nn

from espalier.carving import number_name
from espalier.graph.call import Call
from espalier.graph.reasons import Reason
from espalier.graph.rules.elementwise import combine, pointwise
from espalier.graph.rules.table import aten, derived_from, dims_of, rule, settle
from espalier.graph.watch import COMPUTED, Watch, narrowed, state, varying

# -- statistics over dimensions ----------------------------------------------------------------------------------------


def reduced(watch: Watch, call: Call, dims: list[int], keepdim: bool, text: str) -> None:
    """A reduction over ``dims``; a weight that is normalised over its own inputs may still be baked into a plain one."""
    known = state(call.first)
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
    for o in call.outs:
        watch.put(o, layers, derived=known.derived, pending=tuple(pending))


@rule("mean", "sum", "amax", "amin", "var", "std", "var_mean", "std_mean", "norm", "linalg_vector_norm", "prod", "max", "min",
      "logsumexp", "argmax", "argmin", "any", "all", "median", "nansum")  # fmt: skip
def reduction(watch: Watch, call: Call) -> None:
    if len(call.operands) > 1:  # max(a, b)
        pointwise(watch, call)
        return
    dims = dims_of(call.get("dim"), call.first.ndim)
    reduced(watch, call, dims, bool(call.get("keepdim", False)), f"{call.packet} runs over these channels")


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
def along(watch: Watch, call: Call) -> None:
    known, dim = state(call.first), int(call.get("dim", -1)) % max(call.first.ndim, 1)
    layers = []
    for layer in known.layers:
        watch.mix(layer, [dim], f"{call.packet} runs over these channels")
        layers.append(layer if call.outs[0].shape == call.first.shape else narrowed(layer, dim))
    for o in call.outs:
        watch.put(o, layers, derived=COMPUTED if known.derived else 0, pending=known.pending)


@rule("_fft_r2c", "_fft_c2r", "_fft_c2c")
def fourier(watch: Watch, call: Call) -> None:
    """What lies along its dimensions is mixed, all others are left alone."""
    tensor, known = call.first, state(call.first)
    dims = dims_of(call["dim"], tensor.ndim)
    for layer in known.layers:
        watch.mix(layer, dims, "a Fourier transform runs over these channels")
    for o in call.outs:
        layers = [m for m in known.layers if all(m.shape[d] in (1, o.shape[d]) for d in range(o.ndim))]
        watch.put(o, layers, derived=known.derived, pending=known.pending)


def spatial(watch: Watch, call: Call) -> None:
    """Pooling, resizing, reflecting: every channel by itself, over the last dimensions."""
    tensor, known = call.first, state(call.first)
    layers = []
    for layer in known.layers:
        for o in call.outs:
            resized = [d for d in varying(layer) if d >= 2 or o.ndim != tensor.ndim]
            if resized or o.shape[1] != tensor.shape[1]:
                watch.freeze([layer], f"{call.packet} runs over these channels")
                break
        else:
            layers.append(layer)
    for o in call.outs:
        watch.put(o, layers)


rule(
    "max_pool2d_with_indices", "max_pool3d_with_indices", "max_pool2d", "max_pool1d", "max_pool1d_with_indices", "avg_pool1d",
    "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "upsample_nearest1d",
    "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d", "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d",
    "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
    "replication_pad1d", "replication_pad2d", "replication_pad3d", "fractional_max_pool2d", "grid_sampler", "grid_sampler_2d",
    "grid_sampler_3d", "torchvision::roi_align", "torchvision::roi_pool",
)(spatial)  # fmt: skip


@rule("max_unpool2d", "max_unpool3d")
def unpooled(watch: Watch, call: Call) -> None:
    """Every channel by itself: its values go back to where its maxima were."""
    values, places = call.operands
    layers = combine(watch, [values, places], values.shape)
    beside = [m for m in layers if any(d >= call.out.ndim - len(call["output_size"]) for d in varying(m))]
    watch.freeze(beside, f"{call.packet} runs over these channels")
    watch.put(call.out, [m for m in layers if not any(m is b for b in beside)])


@rule("glu")
def glu(watch: Watch, call: Call) -> None:
    tensor, known = call.first, state(call.first)
    dim = call["dim"] % tensor.ndim
    layers = []
    for layer in known.layers:
        if layer.shape[dim] > 1:
            one, other = np.split(layer, 2, dim)
            watch.tie(one, other)
            layer = one
        layers.append(layer)
    watch.put(call.out, layers)


# -- normalisations ----------------------------------------------------------------------------------------------------


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "batch_norm",
      "miopen_batch_norm", "_batch_norm_with_update", "_batch_norm_no_update")  # fmt: skip
def batch_norm(watch: Watch, call: Call) -> None:
    """Per-channel scale, shift and statistics go with channel 1; also the way weights are standardised."""
    tensor, known = call.first, state(call.first)
    vec = watch.vector(tensor, 1)
    affines = [t for name in ("weight", "bias", "running_mean", "running_var") if (t := call.get(name)) is not None]
    module = watch.module
    if isinstance(module, nn.modules.instancenorm._InstanceNorm) and not affines and vec.any():
        width = module.num_features  # it remembers its width, though it has nothing of that width
        watch.tie(vec[:width], watch.axis_labels(number_name(watch.module_name, "channels"), 0, width))
    for affine in affines:
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
    first, *statistics = call.outs
    watch.put(first, layers, derived=known.derived, pending=tuple(pending))
    for o in statistics:
        watch.put(o, [vec] if o.shape == vec.shape and vec.any() else [], derived=known.derived)


@rule("native_layer_norm", "layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(watch: Watch, call: Call) -> None:
    tensor, known, shape = call.first, state(call.first), call["normalized_shape"]
    dims = list(range(tensor.ndim - len(shape), tensor.ndim))
    text = f"{call.packet} takes its statistics over these channels"
    for layer in known.layers:
        watch.mix(layer, dims, text)
    affine = [t for name in ("weight", "bias") if (t := call.get(name)) is not None]
    first = call.outs[0]
    for t in affine:  # its own parameters live as long as what they scale
        if known.layers:
            combine(watch, [tensor, t], tensor.shape)
        else:
            watch.freeze(state(t).layers, text)
    watch.put(first, known.layers)
    for o in call.outs[1:]:
        watch.put(o)


@rule("_weight_norm_interface", "_weight_norm")
def weight_norm(watch: Watch, call: Call) -> None:
    """``g * v / |v|`` over all but one dimension: nothing of a weight normed so goes unless the layer is made plain."""
    operands = call.operands
    watch.freeze(
        [m for t in operands for m in state(t).layers], f"{call.packet} takes its statistics over these channels"
    )
    for o in call.outs:
        watch.put(o, derived=COMPUTED if derived_from(operands) else 0)


@rule("native_group_norm", "group_norm")
def group_norm(watch: Watch, call: Call) -> None:
    """Statistics per group: exact when a whole group of channels goes, so that is the unit."""
    tensor, groups = call.first, call["group" if call.packet is aten.native_group_norm else "num_groups"]
    affine = [t for name in ("weight", "bias") if (t := call.get(name)) is not None]
    vec = watch.vector(tensor, 1)
    for t in affine:
        watch.tie(vec, watch.vector(t, 0))
    block = vec.reshape(groups, -1)
    known = isinstance(watch.module, nn.GroupNorm) and watch.module.num_groups == groups
    if known and vec.any():
        watch.tie(vec, watch.axis_labels(number_name(watch.module_name, "channels"), 0, vec.size))
    if groups == 1 and block.shape[1] > 1:
        watch.mix(block, [1], "group norm with one group takes its statistics over these channels")
    elif not known:
        watch.freeze([vec], "a functional group norm fixes the number of groups")
    else:
        watch.tie(block, block[:, :1])
        watch.whole_groups[watch.module_name] = block.shape[1]
    first, *statistics = call.outs
    watch.put(first, state(tensor).layers)
    for o in statistics:  # (n, groups)
        watch.put(o, [block[:, 0].reshape(1, -1)] if vec.any() else [])
