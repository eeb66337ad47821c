"""Tensors that depend on neither inputs nor parameters, and their values: how a width reaches the arithmetic unseen.

``y / torch.tensor(y.shape[1])`` computes with a number that follows the widths, and no shape says so.  On the meta device the
number is gone, so small constants are computed beside the forward on the CPU, and a rehearsal compares them.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from espalier.graph.numbers import numbers_in, sizes_in
from espalier.graph.reasons import is_users

LARGEST = 1024  # elements: what is larger is compared by what it was made of


class Unknown:
    """In the place of a value: a constant that is random, or large."""


UNKNOWN = Unknown()
ITSELF = Unknown()  # a constant on the CPU: its value is read from the tensor, which must not hold itself alive
Value = Tensor | Unknown | None
"""Of a tensor that is no constant ``None``."""

aten = torch.ops.aten
SIZE_GETTERS = (Tensor.shape.__get__, Tensor.size, Tensor.numel)  # type: ignore[attr-defined]
PIECES = (torch.chunk, Tensor.chunk)  # the number that they get says how many, not how wide
MAKERS = {aten.new_full, aten.new_zeros, aten.new_ones, aten.new_empty, aten.new_empty_strided}
"""Operations that take dtype and device from their operand, and no value."""
OVERWRITING = {aten.copy_, aten.fill_, aten.zero_}
EMPTY = {aten.empty, aten.new_empty, aten.new_empty_strided, aten.empty_strided}


class NumbersMadeTensors(TorchFunctionMode):
    """Sees what dispatch loses: numbers that make a tensor on the meta device, and those that come from a module."""

    MAKE = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor, Tensor.new)

    def __init__(self, note: Any, say: Any, width: Any) -> None:
        super().__init__()
        self.note = note  # called with the tensor and its value
        self.say = say  # called with the numbers of modules that a call gets, and with none after it
        self.width = (
            width  # of a tensor, a dimension and its size: what the user's code sees of it, if it is told otherwise
        )
        self.sizes_read = False  # the user's code has asked a tensor for its size

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in SIZE_GETTERS:
            if not is_users(sys._getframe(1).f_code.co_filename):
                return func(*args, **kwargs)
            self.sizes_read = True
            if self.width is not None and func is not Tensor.numel:
                return self._size(args[0], func(*args, **kwargs), *args[1:], *kwargs.values())
        given = (*args, *kwargs.values())
        said, sizes = ([], None) if func in PIECES else (list(numbers_in(given)), sizes_in(given))
        if said or sizes:
            self.say(said, sizes)
        try:
            out = func(*args, **kwargs)
        finally:
            if said or sizes:
                self.say([])
        if func in self.MAKE and isinstance(out, Tensor) and out.is_meta:
            data = args[1:] if func in (Tensor.new_tensor, Tensor.new) else args
            self.note(out, _value_of_numbers(data[0] if data else kwargs.get("data"), out))
        return out

    def _size(self, tensor: Tensor, size: Any, dim: int | None = None) -> Any:
        """``tensor.shape``, ``tensor.size()`` or ``tensor.size(dim)``, as ``width`` says."""
        if isinstance(size, torch.Size):
            return torch.Size([self.width(tensor, d, n) for d, n in enumerate(size)])
        return self.width(tensor, dim, size)


def _value_of_numbers(data: Any, like: Tensor) -> Value:
    if isinstance(data, Tensor) or like.numel() > LARGEST:
        return UNKNOWN
    try:
        with _disable_current_modes():
            return torch.tensor(data, dtype=like.dtype, device="cpu").reshape(like.shape)
    except (TypeError, ValueError, RuntimeError):
        return UNKNOWN


def own_value(tensor: Tensor) -> Value:
    """Of a constant that nobody saw being made."""
    return UNKNOWN if tensor.is_meta or tensor.numel() > LARGEST else tensor


def computed_values(func: Any, args: Any, kwargs: Any, outs: list[Tensor], value_of: Any) -> list[Value]:
    """Values of the ``outs`` that ``func`` makes of constants alone; ``value_of`` gives that of a tensor."""
    if torch.Tag.nondeterministic_seeded in func.tags or any(o.numel() > LARGEST for o in outs):
        return [UNKNOWN for _ in outs]
    if not any(o.is_meta for o in outs):
        return [ITSELF for _ in outs]
    packet = func._overloadpacket
    if packet in EMPTY:
        return [torch.zeros(o.shape, dtype=o.dtype) for o in outs]

    def given(value: Any) -> Any:
        if isinstance(value, Tensor):
            if packet in MAKERS:
                return torch.empty(0, dtype=value.dtype)
            found = value_of(value)
            if not isinstance(found, Tensor):
                raise LookupError
            return found
        if isinstance(value, (list, tuple)):
            return type(value)(given(v) for v in value) if type(value) in (list, tuple) else value
        return value

    try:
        with _disable_current_modes(), torch.no_grad():
            keywords = {k: torch.device("cpu") if k == "device" else given(v) for k, v in kwargs.items()}
            made = func(*[given(a) for a in args], **keywords)
    except (LookupError, RuntimeError, TypeError, ValueError, IndexError):
        return [UNKNOWN for _ in outs]
    values = [v for v in (made if isinstance(made, (tuple, list)) else [made]) if isinstance(v, Tensor) and v.numel()]
    return list(values) if [v.shape for v in values] == [o.shape for o in outs] else [UNKNOWN for _ in outs]


def copied_value(value: Value) -> Value:
    """As it is now: the constant may still be written to."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def same_value(one: Tensor, other: Tensor) -> bool:
    """Are they equal?  Of two shapes (which labels answer for) if both are full of one number."""
    if one.dtype != other.dtype:
        return False
    if one.shape != other.shape:
        if not one.numel() or not other.numel():
            return True
        first = one.reshape(-1)[:1]
        return bool((one == first).all()) and bool((other == first).all())
    if one.is_floating_point() or one.is_complex():
        return bool(((one == other) | (one.isnan() & other.isnan())).all())
    return torch.equal(one, other)
