"""Activation memory: what is alive at every moment that could be the peak, as linear forms of extents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from espalier.graph.graph import Span
from espalier.graph.watch import RawSpan, Watch

Moment = tuple[tuple[float, int], ...]  # (bytes per position, extent, or -1 for plain bytes)


def moments(
    watch: Watch, extent: Any
) -> tuple[tuple[Moment, ...], tuple[str, ...], dict[int, tuple[Moment, tuple[float, int]]], tuple[Span, ...]]:
    """Live bytes at every allocation, as linear forms of extents; moments that can never be the peak are dropped.

    And the span in which each happens; at the clock of every convolution and matrix product, what was alive and what was
    made; and every span, with what was alive when it was called.
    """
    births, deaths = watch.memory.births, watch.memory.deaths
    once = Counter(s.module for s in watch.spans)
    spans = sorted((s for s in watch.spans if once[s.module] == 1), key=lambda s: (s.begin, -s.end))
    events: list[tuple[int, int, int]] = []
    form: list[tuple[int, float]] = []

    def formed(vector: np.ndarray | None, size: float) -> tuple[int, float]:
        return (-1, size) if vector is None else (extent(vector), size / len(vector))

    for number, (at, _, vector, size) in enumerate(births):
        form.append(formed(vector, size))
        events.append((at, 0, number))
        if number in deaths:
            events.append((deaths[number], 1, number))
    # a tensor released while operation t runs its successor is released after t allocated: births of t come first
    events.sort(key=lambda e: (e[0], e[1]))
    where_at = _innermost(spans, [at for at, *_ in events])
    live: dict[int, float] = {}
    sites = {s.clock for s in watch.sites}
    ran: dict[int, tuple[Moment, tuple[float, int]]] = {}
    moments: dict[tuple[str, tuple[tuple[int, float], ...]], None] = {}
    called: list[Span] = []
    for position, (at, kind, number) in enumerate(events):
        while len(called) < len(spans) and spans[len(called)].begin < at:
            called.append(_span(spans[len(called)], live, formed))
        where, size = form[number]
        live[where] = live.get(where, 0.0) + (size if kind == 0 else -size)
        if kind == 0 and at in sites:
            ran[at] = tuple((v, k) for k, v in live.items() if v > 0), (size, where)
        ends = position + 1 == len(events)
        # where a span begins or ends there may be a peak of the network without it
        if kind == 0 and (ends or events[position + 1][1] == 1 or where_at[position] != where_at[position + 1]):
            moments[where_at[position], tuple(sorted((k, v) for k, v in live.items() if v > 0))] = None
    called += [_span(s, live, formed) for s in spans[len(called) :]]
    table = np.zeros((len(moments), max((k for _, m in moments for k, _ in m), default=-1) + 2))
    for row, (_, moment) in zip(table, moments, strict=True):
        for column, size in moment:
            row[column] += size  # -1, plain bytes, is the last column
    inside = [name for name, _ in moments]
    stays = _largest(table, inside)
    last = table.shape[1] - 1
    peaks = tuple(
        tuple((float(row[k]), -1 if k == last else k) for k in row.nonzero()[0].tolist()) for row in table[stays]
    )
    return peaks, tuple(inside[i] for i in stays), ran, tuple(called)


def _span(raw: RawSpan, live: dict[int, float], formed: Any) -> Span:
    where, size = formed(raw.labels, raw.bytes)
    return Span(raw.module, tuple((v, k) for k, v in live.items() if v > 0), (size, where))


def _innermost(spans: list[RawSpan], clocks: list[int]) -> list[str]:
    """For every clock, in order, the innermost of ``spans``, which are sorted and nested, or "" outside of all."""
    found, stack, coming = [], [], 0
    for at in clocks:
        while coming < len(spans) and spans[coming].begin < at:
            stack.append(spans[coming])
            coming += 1
        stack = [s for s in stack if s.end >= at]
        found.append(stack[-1].module if stack else "")
    return found


def _largest(table: np.ndarray, inside: Sequence[str]) -> list[int]:
    """Rows that no other row covers in every column: what only they can be is the peak.

    A row does not count for those outside of its span, which may be left out.
    """
    order = np.argsort(-table.sum(1), kind="stable")
    stays: list[int] = []
    by_span: dict[str, list[int]] = {}
    for number in order.tolist():
        row, name = table[number], inside[number]
        outer = [n for n in by_span if not n or n == name or name.startswith(f"{n}.")]
        if not any((table[by_span[n]] >= row).all(1).any() for n in outer):
            stays.append(number)
            by_span.setdefault(name, []).append(number)
    return sorted(stays)
