"""Shapes of common operations in closed form, because their meta kernels are chains of Python decompositions.

Each takes an operation's arguments and returns the output on the meta device, or ``None`` where the case is not the
plain one: then the meta kernel decides, and raises what there is to raise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
META = torch.device("meta")
EMPTY = aten.empty.memory_format


def _new(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(tuple(shape), dtype=like.dtype, device=META)  # of a tuple, as anything else takes twice as long


def _dense(x: Any) -> bool:
    """A tensor of floats that fills its storage, in whatever order: what comes of it has its strides."""
    return (
        isinstance(x, Tensor)
        and x.is_floating_point()
        and (x.is_contiguous() or x.untyped_storage().nbytes() == x.numel() * x.element_size())
    )


def _like(x: Tensor) -> Tensor:
    if x.is_contiguous():  # of a slice along a dimension of size 1 the strides are others
        return _new(x, x.shape)
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=META)


def unary(x: Tensor, *_: Any, **__: Any) -> Any:
    return _like(x) if _dense(x) else None


def softmax(x: Tensor, *_: Any, **__: Any) -> Any:
    return unary(x) if x.is_contiguous() else None  # what its kernel makes is contiguous


def unary_(x: Tensor, *_: Any, **__: Any) -> Any:
    return x if x.is_floating_point() else None


def binary(x: Any, y: Any, *_: Any, **options: Any) -> Any:
    if not isinstance(y, Tensor):
        return unary(x) if isinstance(y, (int, float)) else None
    if not (_dense(x) and x.shape == y.shape and x.dtype == y.dtype):
        return _broadcast(x, y)
    if x.stride() != y.stride() and 1 in x.shape[1:]:
        return None
    return _like(x)  # where strides differ the first operand decides


def _broadcast(x: Any, y: Tensor) -> Any:
    """Gates and biases: one operand has the shape of the result, the other is stretched to it."""
    if not (isinstance(x, Tensor) and x.dtype == y.dtype and x.is_floating_point() and x.ndim and y.ndim):
        return None
    for one, other in ((x, y), (y, x)):
        if one.is_contiguous() and other.is_contiguous() and _stretches(other.shape, one.shape):
            return _like(one)
    return None


def _stretches(small: Sequence[int], large: Sequence[int]) -> bool:
    missing = len(large) - len(small)
    return missing >= 0 and all(s in (1, n) for s, n in zip(small, large[missing:], strict=True))


def binary_(x: Tensor, y: Any, *_: Any, **__: Any) -> Any:
    if not isinstance(y, Tensor):
        return x if x.is_floating_point() else None
    return x if x.shape == y.shape and x.dtype == y.dtype else None


def batch_norm(x: Tensor, weight: Any, bias: Any, mean: Any, variance: Any, training: bool, *_: Any) -> Any:
    width = (x.shape[1],)
    for affine in (weight, bias, mean, variance):
        if affine is not None and affine.shape != width:
            raise RuntimeError(f"batch norm of {x.shape[1]} channels has {affine.shape[0]} parameters")
    if not _dense(x):
        return None
    return _like(x), _new(x, width if training else (0,)), _new(x, width if training else (0,))


def group_norm(x: Tensor, weight: Any, bias: Any, batch: int, channels: int, _: int, groups: int, *__: Any) -> Any:
    if not x.is_contiguous() or not x.is_floating_point() or channels % groups:
        return None
    if any(p is not None and (p.shape != (channels,) or p.dtype != x.dtype) for p in (weight, bias)):
        return None
    return _new(x, x.shape), _new(x, (batch, groups)), _new(x, (batch, groups))


def layer_norm(x: Tensor, shape: Sequence[int], weight: Any, bias: Any, *_: Any) -> Any:
    outer = x.ndim - len(shape)
    if list(x.shape[outer:]) != list(shape) or not x.is_floating_point():
        return None
    if any(p is not None and list(p.shape) != list(shape) for p in (weight, bias)):
        return None
    statistics = [*x.shape[:outer], *[1] * len(shape)]
    return _new(x, x.shape), _new(x, statistics), _new(x, statistics)


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    _: Any,
    groups: int,
) -> Any:
    if transposed or x.ndim != weight.ndim or not x.is_contiguous() or not x.is_floating_point():
        return None
    batch, channels, *space = x.shape
    rows, cols, *kernel = weight.shape
    if channels != cols * groups or rows % groups or x.dtype != weight.dtype:
        return None
    if bias is not None and bias.shape != (rows,):
        return None
    if not len(stride) == len(padding) == len(dilation) == len(kernel):
        return None
    sizes = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(space, kernel, stride, padding, dilation, strict=True)
    ]
    return _new(x, (batch, rows, *sizes)) if min(sizes, default=1) > 0 else None


def addmm(bias: Tensor, a: Tensor, b: Tensor, *_: Any, **__: Any) -> Any:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0] or bias.shape != (b.shape[1],):
        return None
    return _new(a, (a.shape[0], b.shape[1])) if a.dtype == b.dtype == bias.dtype else None


def mm(a: Tensor, b: Tensor) -> Any:
    fits = a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0] and a.dtype == b.dtype
    return _new(a, (a.shape[0], b.shape[1])) if fits else None


def bmm(a: Tensor, b: Tensor) -> Any:
    fits = a.ndim == b.ndim == 3 and a.shape[0] == b.shape[0] and a.shape[2] == b.shape[1] and a.dtype == b.dtype
    return _new(a, (a.shape[0], a.shape[1], b.shape[2])) if fits else None


def mean(x: Tensor, dims: Any = None, keepdim: bool = False, **options: Any) -> Any:
    if not dims or options or not x.is_contiguous() or not x.is_floating_point():
        return None
    gone = {d % x.ndim for d in dims}
    if keepdim:
        return _new(x, [1 if d in gone else n for d, n in enumerate(x.shape)])
    return _new(x, [n for d, n in enumerate(x.shape) if d not in gone])


def cat(tensors: Sequence[Tensor], dim: int = 0) -> Any:
    first = tensors[0]
    if first.ndim == 0:
        return None
    dim %= first.ndim
    shape = list(first.shape)
    shape[dim] = 0
    for t in tensors:
        if t.ndim != first.ndim or t.dtype != first.dtype or not t.is_contiguous():
            return None
        if any(n != shape[d] for d, n in enumerate(t.shape) if d != dim):
            return None
        shape[dim] += t.shape[dim]
    return _new(first, shape)


def grid_sampler(x: Tensor, grid: Tensor, *_: Any) -> Any:
    plain = x.ndim == grid.ndim == 4 and grid.shape[3] == 2 and x.shape[0] == grid.shape[0] and x.dtype == grid.dtype
    if not plain or not x.is_contiguous() or not x.is_floating_point() or 0 in x.shape:
        return None
    return _new(x, (x.shape[0], x.shape[1], grid.shape[1], grid.shape[2]))


def upsample(x: Tensor, size: Any, *_: Any) -> Any:
    if x.ndim != 4 or not x.is_contiguous() or not x.is_floating_point() or 0 in x.shape or min(size) < 1:
        return None
    return _new(x, (*x.shape[:2], *size))


SHAPES: dict[Any, Callable[..., Any]] = {
    aten.native_batch_norm: batch_norm,
    aten.native_layer_norm: layer_norm,
    aten.native_group_norm: group_norm,
    aten.convolution: convolution,
    aten.addmm: addmm,
    aten.mm: mm,
    aten.bmm: bmm,
    aten.cat: cat,
}

OVERLOADS: dict[Any, Callable[..., Any]] = {
    aten.mean.dim: mean,
    aten.grid_sampler_2d.default: grid_sampler,
    aten.upsample_bilinear2d.default: upsample,
    aten.upsample_nearest2d.default: upsample,
    aten.add.Tensor: binary,
    aten.mul.Tensor: binary,
    aten.sub.Tensor: binary,
    aten.div.Tensor: binary,
    aten.add_.Tensor: binary_,
    aten.mul_.Tensor: binary_,
    aten.maximum.default: binary,
    aten.minimum.default: binary,
    aten.lerp.Scalar: binary,
    aten.mul.Scalar: unary,
    aten.pow.Tensor_Scalar: unary,
    aten._safe_softmax.default: softmax,
}

_UNARY = "relu hardtanh hardswish hardsigmoid leaky_relu gelu silu sigmoid elu tanh softplus clamp abs neg exp log sqrt rsqrt"
for _name in _UNARY.split():
    OVERLOADS[getattr(aten, _name).default] = unary
    if hasattr(aten, f"{_name}_"):
        OVERLOADS[getattr(aten, f"{_name}_").default] = unary_


def empty(
    size: Sequence[int],
    *,
    dtype: Any = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
    **options: Any,
) -> Any:
    if device != META or dtype is None or layout not in (None, torch.strided) or pin_memory or options:
        return None
    return torch.empty(tuple(size), dtype=dtype, device=META)


def output(func: Any, args: Any, kwargs: Any) -> Any:
    """What ``func`` would return on the meta device, or ``None`` if only its kernel knows."""
    if func is EMPTY:  # every batch norm makes one, of no elements
        return empty(*args, **kwargs)
    shape = OVERLOADS.get(func) or SHAPES.get(func._overloadpacket)
    if shape is None:
        return None
    first = args[0][0] if type(args[0]) is list else args[0]
    return shape(*args, **kwargs) if isinstance(first, Tensor) and first.is_meta else None
