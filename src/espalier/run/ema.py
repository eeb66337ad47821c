"""An exponential average of a model's weights that follows the model when channels go."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from espalier.carving import Kept, select
from espalier.copies import unwrapped
from espalier.forms.lowrank import BasisChange
from espalier.methods.base import Removed
from espalier.surgery.files import rebuild, structure


class AveragedWeights:
    """Shadows of all parameters and floating buffers: ``shadow += (1 - d) * (weight - shadow)`` after every
    step.

    ``d = min(decay, (1 + t) / (10 + t))`` at step ``t``, so that the random start is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.shadow = {name: tensor.detach().clone() for name, tensor in _averaged(model)}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the shadows towards the weights; call after every step."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        for name, tensor in _averaged(model):
            self.shadow[name].lerp_(tensor.detach(), 1.0 - decay)

    @torch.no_grad()
    def cut(
        self,
        kept: Kept,
        model: nn.Module,
        *,
        renewed: Collection[str] = (),
        turned: Mapping[str, BasisChange] | None = None,
    ) -> None:
        """Follow a removal, and factors into the bases that they were ``turned`` to.

        A tensor that is ``renewed``, or came into the model with the removal, starts from its present value.
        """
        for name in renewed:
            self.shadow.pop(name, None)
        for name, by_dim in kept.items():
            if name in self.shadow:
                old = self.shadow[name]
                index = {d: torch.from_numpy(i).to(old.device) for d, i in by_dim.items()}
                self.shadow[name] = select(old, index)
        for layer, turn in (turned or {}).items():
            names = [f"{layer}.{factor}" for factor in ("u", "s", "v")]
            self.shadow.update(zip(names, turn.follow(*(self.shadow[n] for n in names)), strict=True))
        shadow = self.shadow
        self.shadow = {
            name: shadow[name] if name in shadow and shadow[name].shape == tensor.shape else tensor.detach().clone()
            for name, tensor in _averaged(model)
        }

    def swap(self, model: nn.Module) -> None:
        """Exchange the model's weights with the shadows; a second call undoes it.  Nothing is copied."""
        for name, tensor in _averaged(model):
            tensor.data, self.shadow[name] = self.shadow[name], tensor.data

    def state_dict(self) -> dict[str, object]:
        return {"steps": self.steps, "shadow": dict(self.shadow)}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """The shadows go to the devices where those of this object are."""
        saved = state["shadow"]
        if not isinstance(saved, dict) or saved.keys() != self.shadow.keys():
            raise ValueError("the averaged weights of the checkpoint are not those of this model")
        self.shadow = {name: saved[name].to(tensor.device) for name, tensor in self.shadow.items()}
        self.steps = int(state["steps"])  # type: ignore[call-overload]


def _averaged(model: nn.Module) -> list[tuple[str, Tensor]]:
    named: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    return [(name, tensor) for name, tensor in named if tensor.is_floating_point()]


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, removed: Removed | None = None) -> None:
    """Let an averaged copy of ``model`` go through what was just ``removed`` from it: averages of what stayed stay.

    ``average`` is a module, ``torch.optim.swa_utils.AveragedModel`` for example, copied after ``attach``.  Without ``removed``,
    after ``run.finish()``, tensors of another shape begin anew from the model's.

    Raises: ValueError if it is no copy of ``model``.

    >>> if (removed := run.step(progress=done / total, optimizer=optimizer)) is not None:      # doctest: +SKIP
    ...     es.follow(average, run.model, removed)
    """
    inner = unwrapped(average, who="follow", in_place=True)
    shadows = AveragedWeights(inner, 1.0)
    rebuild(inner, structure(model))
    if removed is None:
        shadows.cut({}, model)
    else:
        shadows.cut(removed.kept, model, renewed=removed.renewed, turned=removed.turned)
    shadows.swap(inner)
    own = dict(model.named_buffers())
    for name, buffer in inner.named_buffers():  # counters are not averaged
        if not buffer.is_floating_point():
            buffer.copy_(own[name])
