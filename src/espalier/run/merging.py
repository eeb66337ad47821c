"""Adjacent linear layers of an ONNX file as one, where that takes fewer multiplications."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from espalier.optional import import_optional

Settings = Mapping[str, Any]  # of a node, by name


LINEAR = ("Conv", "Gemm")


def merge_linear(graph: Any) -> None:
    """Change ``graph`` in place: convolutions, and matrix products, that follow each other with nothing between.

    ``W[o, c] = sum_m W2[o, m] W1[m, c]`` over kernels of which one is a point, in double precision.  What others read stays,
    and so do layers that cost less as two, as factors of a low rank do.
    """
    while _merge_one(graph):
        pass


def _merge_one(graph: Any) -> bool:
    numpy_helper = import_optional("onnx", extra="onnx").numpy_helper
    stored = {i.name: i for i in graph.initializer}
    used = Counter([o.name for o in graph.output] + [name for node in graph.node for name in node.input])
    made = {node.output[0]: node for node in graph.node}
    for second in graph.node:
        first = made.get(second.input[0]) if second.input else None
        if first is None or used[first.output[0]] > 1 or first.op_type != second.op_type or first.op_type not in LINEAR:
            continue
        before = {*first.input[1:], *second.input[1:]}
        if not before <= stored.keys():
            continue
        arrays = [[numpy_helper.to_array(stored[n]) for n in node.input[1:]] for node in (first, second)]
        found = _merged((first.op_type, _settings(first), *arrays[0]), (second.op_type, _settings(second), *arrays[1]))
        if found is None:
            continue
        weight, bias, settings = found
        second.input[0] = first.input[0]
        names = [f"{second.output[0]}.merged_{part}" for part in ("weight", "bias")]
        del second.input[1:]
        second.input.extend(names)
        graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in zip(names, (weight, bias), strict=True))
        del second.attribute[:]
        second.attribute.extend(settings)
        graph.node.remove(first)
        for name in before:
            if used[name] == 1:
                graph.initializer.remove(stored[name])
        return True
    return False


def _settings(node: Any) -> Settings:
    return {a.name: a for a in node.attribute}


def _merged(first: Sequence[Any], second: Sequence[Any]) -> tuple[np.ndarray, np.ndarray, list[Any]] | None:
    """Weight, bias and settings of the one layer; ``None`` where two are something else, or cheaper."""
    kind, one, w1, *b1 = first
    _, two, w2, *b2 = second
    if w1.dtype != np.float32 or w2.dtype != np.float32:
        return None
    m, o, c, k1, k2 = len(w1), len(w2), w1.shape[1], math.prod(w1.shape[2:]), math.prod(w2.shape[2:])
    if w2.shape[1] != m or min(k1, k2) > 1:  # groups, or kernels of which none is a point
        return None
    settings, times = (one, math.prod(_ints(two, "strides"))) if k2 == 1 else (two, math.prod(_ints(one, "strides")))
    if kind == "Gemm":
        if not all(_is_plain_product(s) for s in (one, two)):
            return None
    elif not _is_plain(one) or not _is_plain(two) or times > 1:
        return None
    elif any(_ints(two if k2 == 1 else one, "pads")) or (k2 > 1 and b1 and any(_ints(two, "pads"))):
        return None  # the edge would see another bias
    if o * c * k1 * k2 >= m * c * k1 + o * m * k2:
        return None
    left, right = w2.reshape(o, m, k2).astype(np.float64), w1.reshape(m, c, k1).astype(np.float64)
    weight = np.einsum("omk,mcl->ockl", left, right).reshape(o, c, *(w2 if k2 > 1 else w1).shape[2:])
    bias = left.sum(2) @ (b1[0] if b1 else np.zeros(m)) + (b2[0] if b2 else 0.0)
    return weight.astype(np.float32), bias.astype(np.float32), list(settings.values())


def _ints(settings: Settings, name: str) -> list[int]:
    return list(settings[name].ints) if name in settings else []


def _is_plain(settings: Settings) -> bool:
    """A convolution in one group whose padding stands in numbers."""
    automatic = settings["auto_pad"].s not in (b"", b"NOTSET") if "auto_pad" in settings else False
    return not automatic and ("group" not in settings or settings["group"].i == 1)


def _is_plain_product(settings: Settings) -> bool:
    """``x @ W.T + b``."""
    amounts = [settings[name].f for name in ("alpha", "beta") if name in settings]
    turned = {name: settings[name].i for name in ("transA", "transB") if name in settings}
    return all(a == 1.0 for a in amounts) and turned.get("transB") == 1 and not turned.get("transA")
