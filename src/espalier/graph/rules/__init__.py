"""One rule per ATen operation: what it does to labels.

A rule is called after the operation ran, as ``rule(watch, call)``: ``call["dim"]`` is an argument by the name that the
operation's schema gives it, ``call.out`` the result, which the rule describes with ``watch.put``.  To support a new operation,
write a function in the file of its kind and register it with ``@rule``; an operation without a rule freezes whatever labels
reach it, so a missing rule costs compression but never correctness.
"""

from __future__ import annotations

from espalier.graph.rules.elementwise import pointwise, same, unknown
from espalier.graph.rules.products import addmm, convolution, embedding, linear, matmul
from espalier.graph.rules.statistics import along, batch_norm, group_norm, layer_norm, reduction, spatial
from espalier.graph.rules.table import RULES, rule
from espalier.graph.rules.views import cat, reshaped, stack, turned
from espalier.graph.watch import FLOWING

FLOWING |= {
    pointwise, same, unknown, cat, stack, reduction, along, spatial, batch_norm, layer_norm, group_norm, convolution, matmul,
    addmm, linear, embedding, turned,
}  # fmt: skip


__all__ = ["RULES", "reshaped", "rule"]
