"""Proof, from the statements of a random program alone, that no channel of it can go.

What is made in a forward - by a layer, or as a constant - is *held* where it is returned, where it comes from a tensor that is
given, where something held is made of it by an operation that keeps channels apart, or is combined with it element by element,
where statistics are taken over it, and where the same weight makes or reads something held elsewhere.  A program is rigid if
all that is made is held.  What is not understood holds nothing, so the proof may miss a rigid program, and takes no other for
one.
"""

from __future__ import annotations

import ast
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Operations that bring every channel of their first arguments, by itself, into what they give.
APART = {
    "relu", "tanh", "sigmoid", "elu", "gelu", "silu", "softplus", "hardtanh", "hardswish", "leaky_relu", "prelu", "clamp",
    "abs", "exp", "clone", "dropout", "contiguous", "max_pool2d", "adaptive_avg_pool2d", "interpolate", "batch_norm",
    "instance_norm", "transpose", "permute", "flatten", "unflatten", "view", "reshape", "roll", "flip", "cat", "stack",
    "maximum", "minimum", "add", "lerp", "addcmul", "where", "pixel_shuffle", "pixel_unshuffle", "repeat",
}  # fmt: skip
JOINS = {"maximum", "minimum", "add", "lerp", "where"}  # element by element
CONSTANTS = {
    "zeros", "ones", "full", "new_zeros", "new_ones", "zeros_like", "ones_like", "rand", "randn", "linspace", "arange",
}  # fmt: skip

Sources = frozenset[Any]  # names of variables, and numbers of what was made


def is_rigid(program: Any) -> bool:
    """See above; ``program`` is a ``programs.Program``."""
    return _Flow(program).is_rigid()


class _Flow:
    def __init__(self, program: Any) -> None:
        self.model = program.build().eval()
        self.values: dict[str, Any] = {"self": self.model, "torch": torch, "F": F, "nn": nn}
        self.held: set[Any] = set()
        self.made: list[int] = []
        self.parts: dict[str, Sources] = {}  # of every variable
        self.tied: list[tuple[Sources, Sources]] = []  # where all of the first are held, so are the second
        self.by_use: dict[
            tuple[str, str, bool], list[Sources]
        ] = {}  # what a weight, by a function, makes (True) and reads
        given = {f"x{i}": x for i, x in enumerate(program.example(3))}
        self.values |= given
        self.held |= set(given)
        self.whole = self._follow(ast.parse("\n".join(program.forward)).body)

    def is_rigid(self) -> bool:
        if not self.whole:
            return False
        for several in self.by_use.values():
            self.tied += [(one, two) for one in several for two in several if one is not two]
        before = -1
        while before != len(self.held):
            before = len(self.held)
            for name, parts in self.parts.items():
                if name in self.held:
                    self.held |= parts
            for one, two in self.tied:
                if one and self._all_held(one):
                    self.held |= two
        return all(number in self.held for number in self.made)

    def _all_held(self, parts: Sources) -> bool:
        """A variable is held, too, if all that it is made of is."""
        return all(
            p in self.held or (p in self.parts and self.parts[p] and self._all_held(self.parts[p])) for p in parts
        )

    def _follow(self, body: list[ast.stmt]) -> bool:
        for statement in body:
            match statement:
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    self.parts[name] = self._through(value)
                    try:
                        with torch.no_grad():
                            self.values[name] = self._value(value)
                    except Exception:
                        return False
                case ast.Return(value=ast.expr() as value):
                    self.held |= self._through(value)
                case _:
                    return False
        return True

    def _value(self, node: ast.expr) -> Any:
        return eval(compile(ast.Expression(node), "<program>", "eval"), self.values)

    def _through(self, node: ast.expr) -> Sources:
        """Whose channels, each by itself, are in the value of ``node``."""
        match node:
            case ast.Name(id=name) if isinstance(self.values.get(name), Tensor):
                return frozenset({name})
            case ast.Attribute() | ast.Subscript(value=ast.Attribute()) if self._is_vector(node):
                return frozenset()  # goes along with what it is combined with
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                return frozenset().union(*map(self._through, parts))
            case ast.UnaryOp(operand=operand):
                return self._through(operand)
            case ast.BinOp(left=left, right=right) if not isinstance(node.op, ast.MatMult):
                return self._joined([left, right])
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return self._through(body if self._value(test) else orelse)
            case ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr=name), args=args):
                return self._layer(name, [self._through(a) for a in args], node)
            case ast.Call(func=ast.Attribute(value=of, attr=name), args=args):
                own = isinstance(of, ast.Name) and of.id in ("torch", "F")
                return self._called(name, list(args) if own else [of, *args], node)
        self._uses(node)
        return frozenset()

    def _called(self, name: str, args: list[ast.expr], node: ast.Call) -> Sources:
        weights = [a for a in args if _weight(a) and not self._is_vector(a)]
        if name in CONSTANTS:
            return self._make()
        if name in ("conv1d", "conv2d", "conv3d"):
            width, weight = self._value(args[0]).shape[1], self._value(args[1])
            if _weight(args[1]) and weight.shape[:2] == (width, 1) and width > 1:  # of every channel by itself
                return self._through(args[0])
            weights = [args[1]] if _weight(args[1]) else []
        if weights:
            others = [self._through(a) for a in args if not _weight(a)]
            return self._layer(ast.unparse(weights[0]), others, node)
        if name in ("mean", "amax") and len(args) == 2:
            where = ast.unparse(args[1])
            stacked = isinstance(args[0], ast.Call) and ast.unparse(args[0].func) == "torch.stack"
            if where == "(2, 3)" or (where == "0" and stacked):
                return self._through(args[0])
        if name in JOINS:
            return self._joined(args)
        if name in ("cat", "stack") and any(_weight(n) for a in args for n in ast.walk(a)):
            self._make()  # of weights
        if name in APART:
            return frozenset().union(*map(self._through, args))
        for a in args:
            self._uses(a)
        return frozenset()

    def _joined(self, sides: list[ast.expr]) -> Sources:
        """Of operations element by element: where one side is held, so is another of the same shape."""
        parts = [self._through(side) for side in sides]
        shapes = [self._shape(side) for side in sides]
        for i, one in enumerate(parts):
            for j, two in enumerate(parts):
                if i != j and one and two and shapes[i] is not None and shapes[i] == shapes[j]:
                    self.tied.append((one, two))
        return frozenset().union(*parts)

    def _shape(self, node: ast.expr) -> Any:
        try:
            with torch.no_grad():
                value = self._value(node)
        except Exception:
            return None
        return value.shape if isinstance(value, Tensor) else None

    def _layer(self, name: str, read: list[Sources], node: ast.Call) -> Sources:
        module = getattr(self.model, name, None)
        if isinstance(module, nn.LayerNorm):
            self.held |= frozenset().union(*read)
        by_itself = (nn.LayerNorm, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.PReLU)
        if isinstance(module, by_itself) or (
            1 < getattr(module, "groups", 1) == module.in_channels == module.out_channels
        ):
            return frozenset().union(*read)
        made = self._make()
        use = name, ast.unparse(node.func)
        self.by_use.setdefault((*use, True), []).append(made)
        self.by_use.setdefault((*use, False), []).append(frozenset().union(*read))
        return made

    def _make(self) -> Sources:
        self.made.append(len(self.made))
        return frozenset({self.made[-1]})

    def _uses(self, node: ast.expr) -> None:
        """What is not understood may make channels that are held nowhere."""
        for inner in ast.walk(node):
            if _weight(inner) or (isinstance(inner, ast.Attribute) and inner.attr in CONSTANTS):
                self._make()

    def _is_vector(self, node: ast.expr) -> bool:
        """A weight for every channel."""
        inner = node.value if isinstance(node, ast.Subscript) else node
        found = self._value(inner) if _weight(inner) else None
        return isinstance(found, Tensor) and found.numel() == max(found.shape, default=1)


def _weight(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self" and node.attr != "training"
