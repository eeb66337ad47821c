"""One ATen operation that ran: its arguments by the names of its schema, wherever they were given, and what it made."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map


@functools.cache
def _schema(op: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Names of the arguments of an operation in their order, and the defaults of those that have one."""
    arguments = op._schema.arguments
    return tuple(a.name for a in arguments), {a.name: a.default_value for a in arguments if a.has_default_value()}


class Call:
    """``call["dim"]`` is that argument of the operation, its default where it was not given.

    ``first`` is the first argument, whatever this operation calls it; ``operands`` are all tensors that it got, ``outs`` all
    that it made.
    """

    __slots__ = ("_named", "args", "kwargs", "op", "out")

    def __init__(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        self.op, self.args, self.kwargs, self.out = op, args, kwargs, out
        self._named: dict[str, Any] | None = None

    @property
    def named(self) -> dict[str, Any]:
        """Every argument by its name."""
        if self._named is None:
            names, defaults = _schema(self.op)
            self._named = {**defaults, **dict(zip(names, self.args, strict=False)), **self.kwargs}
        return self._named

    def __getitem__(self, name: str) -> Any:
        return self.named[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The argument of that name, ``default`` if the operation has none such, or if it is ``None``."""
        value = self.named.get(name)
        return default if value is None else value

    @property
    def packet(self) -> Any:
        """The operation without its overload."""
        return self.op._overloadpacket

    @property
    def first(self) -> Any:
        return self.args[0] if self.args else next(iter(self.named.values()))

    @property
    def operands(self) -> list[Tensor]:
        return tensors_of(self.args, self.kwargs)

    @property
    def outs(self) -> list[Tensor]:
        return tensors_of(self.out)


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with another tensor for every one in it, also inside named tuples and dataclasses."""

    def leaf(item: Any) -> Any:
        if isinstance(item, Tensor):
            return change(item)
        if not dataclasses.is_dataclass(item) or isinstance(item, type):
            return item
        new = copy.copy(item)
        for name, held in vars(item).items():
            object.__setattr__(new, name, mapped(held, change))  # it may be frozen
        return new

    return tree_map(leaf, value)


def tensors_of(args: Any, kwargs: Any = None) -> list[Tensor]:
    """The tensors among the arguments or results of an ATen operation, which are flat or lists."""
    if isinstance(args, Tensor):
        return [args]
    found = []
    values = args if isinstance(args, (tuple, list)) else (args,)
    for value in (*values, *kwargs.values()) if kwargs else values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [t for t in value if isinstance(t, Tensor)]
    return found
