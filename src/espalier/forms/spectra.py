"""How much of a weight's energy every form at every rank holds, read off a few spectra without fitting anything.

Of ``channel`` and ``spatial`` it is the tail of the singular values, of ``tucker`` what the HOSVD's core leaves out (a table
over both ranks), of ``tt`` that plus the tail of the truncated core: look-ups, and one small spectrum per pair of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from espalier.forms.evbmf import evbmf
from espalier.forms.tensors import (
    folded,
    input_unfolding,
    leading,
    output_unfolding,
    project_inputs,
    project_outputs,
    rows_and_columns,
    spectrum,
)
from espalier.forms.transfer import moved


def has_core(shape: Sequence[int]) -> bool:
    """Is there a core to gain in a weight ``(O, I, kh, kw)``?

    Not where a kernel has one element, nor where one side has more channels than all the rest together.
    """
    outputs, inputs, *kernel = shape
    taps = math.prod(kernel)
    return min(kernel, default=1) > 1 or (taps > 1 and outputs <= inputs * taps and inputs <= outputs * taps)


@dataclass
class Spectra:
    """Of one weight: how much of its energy every form at every rank holds, as shares of ``energy``."""

    shape: tuple[int, ...]
    energy: float
    inputs: np.ndarray  # squared singular values of the input unfolding, falling; at least as many as its shorter side
    outputs: np.ndarray  # and of the output unfolding
    channel: np.ndarray  # held by rank r, (ranks + 1,)
    spatial: np.ndarray  # likewise; empty where the kernel has no rows and columns
    tucker: np.ndarray  # held by ranks (a, b), (I + 1, O + 1); empty likewise
    core: Tensor | None  # (O, I, kh, kw) in the bases of the HOSVD
    weight: Tensor  # (O, I, kh, kw), on the CPU: for forms that no spectrum here tells about
    fits: dict[tuple[str, tuple[int, ...]], float] = field(default_factory=dict)  # (form, ranks) -> share held
    _tt: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    _evbmf: tuple[int, int] | None = None

    def tt(self, a: int, b: int) -> np.ndarray:
        """Held by the train of ranks ``a, t, b``, for every ``t``, shape ``(ranks + 1,)``."""
        if (a, b) not in self._tt:
            assert self.core is not None
            part = self.core[:b, :a].permute(1, 2, 3, 0)
            values = spectrum(part.reshape(a * part.shape[1], -1))
            self._tt[a, b] = held_by_rank(values.double().cpu().numpy(), self.energy)
        return self._tt[a, b]

    def evbmf(self) -> tuple[int, int]:
        """Ranks of the input and the output unfolding, as EVBMF finds them; 0 where all is noise."""
        if self._evbmf is None:
            rest = math.prod(self.shape[2:])
            found = []
            for values, size, other in ((self.inputs, 1, 0), (self.outputs, 0, 1)):
                shape = (self.shape[size], self.shape[other] * rest)
                found.append(evbmf(np.sqrt(values[: min(shape)]), shape)[0])
            self._evbmf = found[0], found[1]  # at once: threads read it
        return self._evbmf


def held_by_rank(values: np.ndarray, energy: float) -> np.ndarray:
    """Shares held by 0, 1, 2, ... components; nothing at all counts as held whole."""
    if energy == 0:
        return np.ones(len(values) + 1)
    return np.minimum(np.concatenate([[0.0], np.cumsum(values)]) / energy, 1.0)


@torch.no_grad()
def spectra_of(weights: Mapping[str, Tensor]) -> dict[str, Spectra]:
    """Spectra of all layers, on the CPU; weights of one shape go through one batched decomposition.

    ``ValueError`` naming the layer whose weight holds NaN or infinite numbers.
    """
    weights = moved(weights, "cpu")
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name, weight in weights.items():
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(
                f"{name}: its weight holds NaN or infinite numbers and has no decomposition. "
                "Lower the learning rate, or go back to the last checkpoint"
            )
        by_shape.setdefault(tuple(weight.shape), []).append(name)
    found: dict[str, Spectra] = {}
    for names in by_shape.values():
        stack = torch.stack([weights[n] for n in names]).detach()
        if stack.dtype not in (torch.float32, torch.float64):
            stack = stack.float()
        four = torch.stack([folded(w) for w in stack])
        found.update(zip(names, _stacked(four), strict=True))
    return {n: found[n] for n in weights}


def _stacked(stack: Tensor) -> list[Spectra]:
    """``(layers, O, I, kh, kw)``."""
    energies = stack.flatten(1).double().square().sum(1).cpu().numpy()
    cores: Tensor | None = None
    spatial: np.ndarray | None = None
    if has_core(stack.shape[1:]):
        inputs, inner = leading(input_unfolding(stack), stack.shape[2])
        outputs, outer = leading(output_unfolding(stack), stack.shape[1])
        cores = project_outputs(project_inputs(stack, inner), outer)
        if min(stack.shape[3:]) > 1:
            spatial = torch.stack([spectrum(rows_and_columns(w)) for w in stack]).double().cpu().numpy()
    else:  # no core and no bases: the spectra are enough, and the shorter side has them
        outputs = spectrum(output_unfolding(stack))
        inputs = outputs if math.prod(stack.shape[3:]) == 1 else spectrum(input_unfolding(stack))
    ins, outs = _cleaned(inputs), _cleaned(outputs)
    most = min(stack.shape[1], math.prod(stack.shape[2:]))
    rows = []
    for i, energy in enumerate(energies):
        table = np.zeros((0, 0))
        if cores is not None:
            squares = cores[i].double().square().sum((2, 3)).T.cpu().numpy()  # (I, O)
            held = np.pad(squares.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
            table = np.minimum(held / energy, 1.0) if energy > 0 else np.ones_like(held)
        rows.append(
            Spectra(
                tuple(stack.shape[1:]), float(energy), ins[i], outs[i], held_by_rank(outs[i][:most], energy),
                np.zeros(0) if spatial is None else held_by_rank(spatial[i], energy), table,
                None if cores is None else cores[i], stack[i],
            )
        )  # fmt: skip
    return rows


def _cleaned(values: Tensor) -> np.ndarray:
    """``(layers, n)``, falling; what rounding makes of zero is zero."""
    noise = values[:, :1] * values.shape[1] * torch.finfo(values.dtype).eps
    return torch.where(values > noise, values, 0.0).double().cpu().numpy()
