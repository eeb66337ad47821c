"""How much each unit matters.  One function per score; all return one value per unit, larger is more important.

``by_weight`` scores read the model as it is.  ``Sensitivity`` and ``share_of_variance`` need data; both are calibrated
across layers: the first is the loss itself to first order, the second a share of what every consumer sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from espalier.copies import device_of, named_modules
from espalier.graph import Graph
from espalier.methods.agreement import average_
from espalier.methods.scoring import modes_kept, training_loss, without_noise
from espalier.methods.units import Gate, Units, upload
from espalier.settings import Fraction, OneOf, described
from espalier.tasks import called, task_of, to_device

Score = Callable[[nn.Module, Units], Tensor]


def weight_norm(model: nn.Module, units: Units) -> Tensor:
    """Norm of the filters that make a unit, relative to the mean filter of each layer, added up over layers."""
    with torch.no_grad():
        matrices = [c for c in units.producers if c.parameter.ndim > 1]
        return units.sum((c, relative(c.energy().sqrt())) for c in matrices)


def consumer_norm(model: nn.Module, units: Units) -> Tensor:
    """Norm of what reads a unit, relative to the mean input of each reader, added up over readers."""
    with torch.no_grad():
        return units.sum((c, relative(c.energy().sqrt())) for c in units.consumers)


def scale(model: nn.Module, units: Units) -> Tensor:
    """Root mean square of the BatchNorm scales of a unit (network slimming, Liu et al. 2017); weight norm without any."""
    gammas = _norm_scales(model)
    with torch.no_grad():
        coupled = [c for c in units.producers if c.tensor in gammas]
        energy = units.sum((c, c.parameter.square()) for c in coupled)
        number = units.sum((c, torch.ones_like(c.parameter)) for c in coupled)
    scales = (energy / number.clamp_min(1)).sqrt()
    return scales if bool((number > 0).all()) else torch.where(number > 0, scales, weight_norm(model, units))


def scale_times_consumer(model: nn.Module, units: Units) -> Tensor:
    """BatchNorm scale times the norm of what reads it, relative to the mean of each reader, added up over readers."""
    if not units.consumers:
        return torch.zeros(units.count, device=units.device)
    size = torch.cat([scale(model, units), torch.zeros(1, device=units.device)])
    with torch.no_grad():
        owner = torch.cat([c.owner for c in units.consumers])
        worth = size[owner] * torch.cat([c.energy() for c in units.consumers]).sqrt()
        parts = worth.split([len(c.owner) for c in units.consumers])
        return units.sum(zip(units.consumers, map(relative, parts), strict=True))


def relative(values: Tensor) -> Tensor:
    """Divide by the mean, so that layers of different scale can be compared."""
    return values / values.mean().clamp_min(1e-30)


def _norm_scales(model: nn.Module) -> set[str]:
    norms = (nn.modules.batchnorm._NormBase, nn.GroupNorm)
    return {f"{n}.weight" for n, m in named_modules(model).items() if isinstance(m, norms)}


BY_WEIGHT: dict[str, Score] = {
    "weight_norm": weight_norm,
    "consumer_norm": consumer_norm,
    "scale": scale,
    "scale_times_consumer": scale_times_consumer,
}


class Listener:
    """What units are worth, from what a run hears on the way; by default there is nothing to hear."""

    value: Tensor  # one number per unit; larger is more important

    def hear(self, steps: int, *, soon: bool) -> None:
        """Take in what was heard in the last of ``steps`` steps, and say what to hear next; a decision may be due ``soon``."""
        return

    def averaged(self) -> None:
        """Gradients are means over the processes now: what they say need not be averaged again."""
        return

    def decided(self) -> None:
        """A decision was taken on what was heard so far."""
        return

    def follow(self, before: Any, survivors: np.ndarray) -> None:
        """Go on from what was heard ``before``, of which the units ``survivors`` are still there."""
        return

    def close(self) -> None:
        """Take all hooks away."""
        return

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for ``load_state_dict``."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of ``state_dict``."""
        return


class Weights(Listener):
    """A score that the weights have as they are."""

    def __init__(self, model: nn.Module, units: Units, score: Score) -> None:
        self.model, self.units, self.score = model, units, score

    @property
    def value(self) -> Tensor:  # type: ignore[override]
        return self.score(self.model, self.units)


def listener(kind: str, model: nn.Module, units: Units, *, smoothing: float) -> Listener:
    """What finds the score ``kind``, a name in ``SCORES``, while a network trains."""
    if kind in BY_WEIGHT:
        return Weights(model, units, BY_WEIGHT[kind])
    return Moments(model, units) if kind == "share" else Sensitivity(units, smoothing=smoothing)


LISTEN_EVERY = 4  # batches between two readings of the gradients


# -- from gradients ----------------------------------------------------------------------------------------------------


class Gated(Protocol):
    """Units that gradients of parameters tell something about: ``Units``, or the triplets of factorised layers."""

    device: torch.device

    @property
    def count(self) -> int: ...

    def gates(self) -> Mapping[nn.Parameter, Gate]: ...

    def sum(self, parts: Iterable[tuple[Any, Tensor]]) -> Tensor:
        """One value per unit, shape ``(count,)``, from what gates have said."""

    def total(self, values: Tensor) -> Tensor:
        """Of one value per unit; what it is measured by."""


class Sensitivity(Listener):
    """First-order change of the loss when a unit is switched off, squared and averaged over batches.

    With a gate ``g`` on a unit, ``dL/dg = sum(W * dL/dW)`` over all weights that read it, so the gradients of ordinary
    training are all that is needed.  Listens through gradient hooks and works in any loop, whatever it does with
    ``zero_grad``.  Per batch the squares are normalised, so loss scaling cancels.
    Source: Molchanov et al., Importance Estimation for Neural Network Pruning, 2019, equation 6, on gates.
    """

    def __init__(self, units: Gated, *, smoothing: float = 0.98) -> None:
        self.units = units
        self.smoothing = smoothing
        self.value = torch.zeros(units.count, device=units.device)
        self.listening = True
        self._batches = torch.zeros((), dtype=torch.int64, device=units.device)
        self._heard: dict[nn.Parameter, list[tuple[Any, Tensor]]] = {}
        self._gates = units.gates()
        self._together = False  # what was heard is the mean over the processes
        self._hooks = [p.register_post_accumulate_grad_hook(self._hear) for p in self._gates]

    @property
    def batches(self) -> int:
        """How many were taken in; asking waits for the device."""
        return int(self._batches)

    @batches.setter
    def batches(self, number: int) -> None:
        self._batches.fill_(number)

    def _hear(self, parameter: Tensor) -> None:
        if self.listening and parameter.grad is not None:
            assert isinstance(parameter, nn.Parameter)
            # what is heard last counts: where gradients accumulate, that is the whole gradient of the step
            self._heard[parameter] = self._gates[parameter](parameter.detach(), parameter.grad)

    def averaged(self) -> None:
        if self.listening:
            self._together = True
            for parameter in self._gates:
                self._hear(parameter)

    def batch_done(self) -> None:
        """Take in what was heard since the last call, unless it is not finite.  Nothing here waits for the device."""
        if not self._heard:
            return
        sums = self.units.sum(part for parts in self._heard.values() for part in parts).to(self.value)
        squares = (sums if self._together else average_(sums)).square()
        squares = squares / self.units.total(squares).clamp_min(1e-30)
        finite = torch.isfinite(squares).all()
        self._batches += finite
        weight = self._batches.clamp_min(1).reciprocal().clamp_min(1.0 - self.smoothing)
        self.value.lerp_(torch.where(finite, squares, self.value), weight)
        self._heard, self._together = {}, False

    def hear(self, steps: int, *, soon: bool) -> None:
        self.batch_done()
        self.listening = steps % LISTEN_EVERY == 0

    def follow(self, before: Sensitivity, survivors: np.ndarray) -> None:
        self.value = before.value[upload(survivors, self.units.device)]
        self._batches = before._batches

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def state_dict(self) -> dict[str, Any]:
        self.batch_done()
        return {"value": self.value.clone(), "batches": self.batches, "listening": self.listening}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]
        self.batches, self.listening = state["batches"], state["listening"]


# -- from activations --------------------------------------------------------------------------------------------------


class Moments(Listener):
    """Mean and variance of every channel that enters a consumer, gathered while forwards run.

    ``share(units)`` is what removal would take away: the variance a unit contributes to each consumer's output before its
    normalisation, as a share of the whole, relative to the mean share there, added up over the unit's consumers.
    """

    def __init__(self, model: nn.Module, units: Units) -> None:
        self.units = units
        self._modules = dict(model.named_modules())
        columns = [c for c in units.consumers if len(c.dims) == 1]
        readers = {c.tensor.rpartition(".")[0]: c for c in columns if c.tensor.endswith(".weight")}
        self._columns = {n: c for n, c in readers.items() if n in self._modules}
        self.sums: dict[str, Tensor] = {}
        self._fresh: dict[str, Tensor] = {}  # of this process alone, since the last step
        self.active = False  # it gathers
        self._judging = False  # in eval mode too
        self._hooks: list[Any] = []

    @contextmanager
    def watching(self) -> Iterator[Moments]:
        """Gather from all forwards inside the ``with`` block."""
        self.start(judging=True)
        try:
            yield self
        finally:
            self.stop()

    @property
    def value(self) -> Tensor:  # type: ignore[override]
        return self.share() if self.sums else torch.ones(self.units.count, device=self.units.device)

    def hear(self, steps: int, *, soon: bool) -> None:
        self.batch_done()
        if soon and not self.active:
            self.start()

    def decided(self) -> None:
        self.stop()

    def follow(self, before: Moments, survivors: np.ndarray) -> None:
        """What was gathered belongs to the old channels: gather anew."""
        if before.active:
            self.start()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def start(self, sums: dict[str, Tensor] | None = None, *, judging: bool = False) -> None:
        """Forget what was gathered (or go on from ``sums``), and gather from now on, in eval mode only if ``judging``."""
        self.close()
        self.active, self._judging = True, judging
        self.sums, self._fresh = dict(sums or {}), {}
        for name in self._columns:
            self._hooks.append(self._modules[name].register_forward_pre_hook(self._gather(name)))

    def stop(self) -> None:
        self.close()
        self.active = False

    def state_dict(self) -> dict[str, Any]:
        return {"active": self.active, "sums": dict(self.sums)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["active"]:
            self.start({name: row.to(self.units.device) for name, row in state["sums"].items()})

    def _gather(self, name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            if not (module.training or self._judging):
                return  # test images decide nothing
            x = inputs[0].detach()
            channel = 1 if isinstance(module, nn.modules.conv._ConvNd) and x.ndim > 2 else x.ndim - 1
            dims = [d for d in range(x.ndim) if d != channel]
            number = x.numel() // x.shape[channel]
            x = x.float()
            row = torch.stack(
                [x.sum(dims), x.square().sum(dims), torch.full((x.shape[channel],), number, device=x.device)]
            )
            self._fresh[name] = self._fresh.get(name, 0) + row

        return hook

    def batch_done(self) -> None:
        """Add what was gathered since the last call, over all processes."""
        if self._fresh:
            flat = average_(torch.cat([row.reshape(-1) for row in self._fresh.values()]))
            parts = flat.split([row.numel() for row in self._fresh.values()])
            for (name, row), part in zip(self._fresh.items(), parts, strict=True):
                self.sums[name] = self.sums.get(name, 0) + part.view_as(row)
            self._fresh = {}

    def share(self) -> Tensor:
        """Relative share of variance per unit, shape ``(count,)``; every consumer hands out 1 on average."""
        self.batch_done()
        total = torch.zeros(self.units.count + 1, device=self.units.device)
        for name, sums in self.sums.items():
            columns = self._columns[name]
            mean, square = sums[0] / sums[2], sums[1] / sums[2]
            variance = (square - mean.square()).clamp_min(0)
            weights = columns.per_position(columns.parameter.detach().square())
            groups = len(variance) // len(weights)  # grouped convolutions read the same position in every group
            part = variance.view(groups, -1).sum(0) * weights
            total.index_add_(0, columns.owner, relative(part))
        return total[: self.units.count]


@contextmanager
def _all_gradients(model: nn.Module) -> Iterator[None]:
    """Frozen parameters get gradients too; afterwards all have those they had."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    for parameter, *_ in before:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, trained, gradient in before:
            parameter.requires_grad_(trained).grad = gradient


def score_units(
    model: nn.Module, graph: Graph, kind: str, batches: Iterable[tuple[Any, Any]] | None = None
) -> dict[str, np.ndarray]:
    """Score every unit of ``graph`` once; ``kind`` is a name in ``SCORES``.

    ``taylor`` and ``share`` need ``batches`` of inputs and targets; ``taylor`` uses the loss of their task, cross-entropy
    unless they are ``TaskBatches``.  The model is not changed.
    """
    units = Units(model, graph)
    if kind in BY_WEIGHT:
        return units.by_group(BY_WEIGHT[kind](model, units))
    if kind not in SCORES:
        raise ValueError(f"importance {kind!r} does not exist; choose one of {', '.join(SCORES)}")
    if batches is None:
        raise ValueError(
            f"importance {kind!r} is measured on data; give batches, or choose one of {', '.join(BY_WEIGHT)}"
        )
    if kind == "share":
        moments = Moments(model, units)
        with modes_kept(model), moments.watching(), torch.no_grad():
            model.eval()
            for x, _ in batches:
                called(model, to_device(x, device_of(model)))
        return units.by_group(moments.share())
    task = task_of(batches)
    with without_noise(model, task), _all_gradients(model):
        sensitivity = Sensitivity(units, smoothing=1.0)
        try:
            for x, y in batches:
                model.zero_grad()
                training_loss(model, x, y, task).backward()
                sensitivity.batch_done()
        finally:
            sensitivity.close()
    return units.by_group(sensitivity.value)


TAYLOR = "taylor"
SCORES = (*BY_WEIGHT, TAYLOR, "share")


ShareExponent = Annotated[
    Fraction,
    described("the best units of a group are worth their share of it to this power; below 1 the last ones count more"),
]
ScoreName = Annotated[str, OneOf(SCORES), described("how units are ranked; taylor is the sensitivity of the loss")]


def diminishing(scores: np.ndarray, exponent: float) -> np.ndarray:
    """Scores of one group with diminishing returns: the best ``k`` units together are worth ``total * share ** exponent``.

    ``share`` is what they hold of the group's total, ``exponent`` is above 0 and up to 1, which leaves the scores as they are.
    Below 1 the last units of a group gain worth, so that no group is emptied because its units are small one by one.
    """
    total = float(scores.sum())
    if exponent == 1.0 or total <= 0.0:
        return scores
    order = np.argsort(-scores, kind="stable")
    share = np.cumsum(scores[order]) / total
    worth = np.empty_like(scores, dtype=np.float64)
    worth[order] = total * np.diff(np.concatenate([[0.0], np.minimum(share, 1.0) ** exponent]))
    return np.maximum(worth, 0.0)
