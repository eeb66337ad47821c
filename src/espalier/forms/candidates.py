"""Which forms a layer could take, what each would lose and what it would cost: the alternatives of one layer.

What every form at every rank loses is read off a few spectra, without fitting anything: of ``channel`` and ``spatial`` the
tail of the singular values, of ``tucker`` what the HOSVD's core leaves out (a table over both ranks), of ``tt`` that plus the
tail of the truncated core.  So listing options is a matter of look-ups, and of one small spectrum per pair of ranks for ``tt``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from espalier.forms.evbmf import evbmf
from espalier.forms.places import Place
from espalier.forms.sequences import FORMS, cost_of, dense_sequence, sequence
from espalier.forms.svd import to_matrix
from espalier.forms.transfer import moved
from espalier.forms.tucker import input_unfolding, leading, output_unfolding, project_inputs, project_outputs, spectrum
from espalier.graph import ConvSequence


def possible(shape: Sequence[int], forms: Collection[str] = FORMS) -> tuple[str, ...]:
    """Those of ``forms`` that make sense for a weight ``(O, I, kh, kw)``; "channel" where none does.

    A kernel of one element has nothing to split, one along a line no rows and columns; nor is there a core to gain where
    one side has more channels than all the rest together.
    """
    outputs, inputs, *kernel = shape
    taps = math.prod(kernel)
    cores = taps > 1 and outputs <= inputs * taps and inputs <= outputs * taps
    sense = tuple(FORMS) if min(kernel, default=1) > 1 else ("channel", "tucker") if cores else ("channel",)
    return tuple(f for f in forms if f in sense) or ("channel",)


SIZES = 14  # sizes of each form that are looked at, in equal ratios from rank 1 to whole


@dataclass
class Spectra:
    """Of one weight: how much of its energy every form at every rank holds, as shares of ``energy``."""

    shape: tuple[int, ...]
    energy: float
    inputs: np.ndarray  # squared singular values of the input unfolding, falling; at least as many as its shorter side
    outputs: np.ndarray  # and of the output unfolding
    channel: np.ndarray  # held by rank r, (ranks + 1,)
    spatial: np.ndarray  # likewise; empty where the form makes no sense
    tucker: np.ndarray  # held by ranks (a, b), (I + 1, O + 1); empty likewise
    core: Tensor | None  # (O, I, kh, kw) in the bases of the HOSVD
    _tt: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    _evbmf: tuple[int, int] | None = None

    def tt(self, a: int, b: int) -> np.ndarray:
        """Held by the train of ranks ``a, t, b``, for every ``t``, shape ``(ranks + 1,)``."""
        if (a, b) not in self._tt:
            assert self.core is not None
            part = self.core[:b, :a].permute(1, 2, 3, 0)
            values = spectrum(part.reshape(a * part.shape[1], -1))
            self._tt[a, b] = _held(values.double().cpu().numpy(), self.energy)
        return self._tt[a, b]

    def evbmf(self) -> tuple[int, int]:
        """Ranks of the input and the output unfolding, as EVBMF finds them; 0 where all is noise."""
        if self._evbmf is None:
            rest = math.prod(self.shape[2:])
            found = []
            for values, size, other in ((self.inputs, 1, 0), (self.outputs, 0, 1)):
                shape = (self.shape[size], self.shape[other] * rest)
                found.append(evbmf(np.sqrt(values[: min(shape)]), shape).rank)
            self._evbmf = found[0], found[1]  # at once: threads read it
        return self._evbmf

    def held(self, form: ConvSequence) -> float:
        """Share of the energy that a sequence holds."""
        if form.name in ("channel", "spatial"):
            return float(getattr(self, form.name)[form.widths[0]])
        a, b = form.widths[0], form.widths[-1]
        return float(self.tt(a, b)[form.widths[1]] if form.name == "tt" else self.tucker[a, b])


def _held(values: np.ndarray, energy: float) -> np.ndarray:
    """Shares held by 0, 1, 2, ... components; nothing at all counts as held whole."""
    if energy == 0:
        return np.ones(len(values) + 1)
    return np.minimum(np.concatenate([[0.0], np.cumsum(values)]) / energy, 1.0)


@torch.no_grad()
def measure(weights: Mapping[str, Tensor]) -> dict[str, Spectra]:
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
    for shape, names in by_shape.items():
        stack = torch.stack([weights[n] for n in names]).detach()
        if stack.dtype not in (torch.float32, torch.float64):
            stack = stack.float()
        four = stack if len(shape) == 4 else stack[..., None, None]
        found.update(zip(names, _stacked(shape, four), strict=True))
    return {n: found[n] for n in weights}


def _stacked(shape: tuple[int, ...], stack: Tensor) -> list[Spectra]:
    """``(layers, O, I, kh, kw)``."""
    energies = stack.flatten(1).double().square().sum(1).cpu().numpy()
    cores: Tensor | None = None
    spatial: np.ndarray | None = None
    if "tucker" in possible(stack.shape[1:]):
        inputs, inner = leading(input_unfolding(stack), stack.shape[2])
        outputs, outer = leading(output_unfolding(stack), stack.shape[1])
        cores = project_outputs(project_inputs(stack, inner), outer)
        if min(stack.shape[3:]) > 1:
            spatial = torch.stack([spectrum(to_matrix(w, "spatial")) for w in stack]).double().cpu().numpy()
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
                shape, float(energy), ins[i], outs[i], _held(outs[i][:most], energy),
                np.zeros(0) if spatial is None else _held(spatial[i], energy), table, None if cores is None else cores[i],
            )
        )  # fmt: skip
    return rows


def _cleaned(values: Tensor) -> np.ndarray:
    """``(layers, n)``, falling; what rounding makes of zero is zero."""
    noise = values[:, :1] * values.shape[1] * torch.finfo(values.dtype).eps
    return torch.where(values > noise, values, 0.0).double().cpu().numpy()


def options_at(
    place: Place,
    spectra: Spectra,
    ranks: tuple[int, int],
    *,
    fraction: float = 0.5,
    multiple_of: int = 1,
    forms: Collection[str] = FORMS,
) -> tuple[list[ConvSequence], np.ndarray]:
    """Sequences of ``place`` from cheap to dear, the dense layer on top, and the share of energy each loses, falling.

    ``tucker`` and ``tt`` take ``ranks = (a, b)`` scaled up and down together; the core of ``tt`` is split at ``fraction`` of
    its full rank.  Only what is on the front stays: dearer in MACs and in weights than all below it, and closer.  Ranks are
    multiples of ``multiple_of``, or whole.  Only those of ``forms`` are offered that are ``possible``.
    """
    forms = possible(_shape(place), forms)
    offers: list[tuple[float, ConvSequence]] = []
    if "channel" in forms:
        for rank in _sizes(len(spectra.channel) - 1, multiple_of):
            offers.append((spectra.channel[rank], sequence(place, "channel", [rank])))
    if "spatial" in forms:
        for rank in _sizes(len(spectra.spatial) - 1, multiple_of):
            offers.append((spectra.spatial[rank], sequence(place, "spatial", [rank])))
    if "tucker" in forms or "tt" in forms:
        _add_tuckers(offers, place, spectra, ranks, fraction, multiple_of, forms)
    return _front(place, offers)


def _shape(place: Place) -> tuple[int, ...]:
    return (place.out_channels, place.in_channels, *place.kernel)


def cheapest(place: Place, *, multiple_of: int = 1, forms: Collection[str] = FORMS) -> list[ConvSequence]:
    """The least that ``options_at`` can offer, and the dense layer; the latter alone if nothing is cheaper."""
    least = snap(1, min(place.in_channels, place.out_channels), multiple_of)
    offers = [(0.0, sequence(place, form, [least] * (len(FORMS[form]) - 1))) for form in possible(_shape(place), forms)]
    options = _front(place, offers)[0]
    return options if len(options) == 1 else [options[0], options[-1]]


def _add_tuckers(
    offers: list[tuple[float, ConvSequence]],
    place: Place,
    spectra: Spectra,
    ranks: tuple[int, int],
    fraction: float,
    multiple_of: int,
    forms: Collection[str],
) -> None:
    wide, high = place.in_channels, place.out_channels
    kh, kw = place.kernel
    least, most = 1.0 / max(ranks), max(wide / ranks[0], high / ranks[1])
    scales = sorted({1.0, *np.geomspace(least, max(most, least), SIZES)})
    pairs = dict.fromkeys(
        (snap(s * ranks[0], wide, multiple_of), snap(s * ranks[1], high, multiple_of)) for s in scales
    )
    if "tucker" in forms:
        offers += [(float(spectra.tucker[a, b]), sequence(place, "tucker", [a, b])) for a, b in pairs]
    if "tt" not in forms:
        return
    dense = cost_of(place, dense_sequence(place))
    known = [(cost_of(place, form), held) for held, form in offers]
    for a, b in pairs:
        whole = min(a * kh, kw * b)
        form = sequence(place, "tt", [a, snap(fraction * whole, whole, multiple_of), b])
        cost, hope = cost_of(place, form), float(spectra.tucker[a, b])
        # A train holds no more than its Tucker: the spectrum is computed only where that could win.
        if _below(cost, dense) and not any(held >= hope and _below(other, cost) for other, held in known):
            offers.append((float(spectra.tt(a, b)[form.widths[1]]), form))


def full_rank(place: Place, form: str) -> int:
    """Of ``channel`` and ``spatial`` the rank of an exact one; of the others the lesser one of the two channel unfoldings."""
    kh, kw = place.kernel
    if form == "channel":
        return min(place.out_channels, place.in_channels * kh * kw)
    if form == "spatial":
        return min(place.out_channels * kh, place.in_channels * kw)
    return min(place.in_channels, place.out_channels)


def snap(rank: float, whole: int, multiple_of: int) -> int:
    """The nearest allowed rank: a multiple, at least one of them, or everything."""
    return min(max(round(rank / multiple_of), 1) * multiple_of, whole)


def _sizes(whole: int, multiple_of: int) -> list[int]:
    return sorted({snap(r, whole, multiple_of) for r in np.geomspace(1, whole, SIZES)})


def _below(one: Sequence[int], other: Sequence[int]) -> bool:
    return all(a < b for a, b in zip(one, other, strict=True))


def _front(place: Place, offers: list[tuple[float, ConvSequence]]) -> tuple[list[ConvSequence], np.ndarray]:
    top = dense_sequence(place)
    dense = cost_of(place, top)
    priced = [(cost_of(place, form), held, form) for held, form in offers]
    priced.sort(key=lambda p: (p[0][0] / dense[0] + p[0][1] / dense[1], -p[1]))
    options: list[ConvSequence] = []
    kept: list[float] = []
    last, best = (0, 0), -1.0
    for cost, held, form in priced:
        if _below(last, cost) and _below(cost, dense) and held > best:
            options.append(form)
            kept.append(held)
            last, best = cost, held
    return [*options, top], 1.0 - np.array([*kept, 1.0])
