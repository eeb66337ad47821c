"""How a network is trained: one frozen, plain object that can be written to TOML and read back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from typing import Any

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("cosine", "constant", "wsd")
PRECISIONS = ("fp32", "bf16", "fp16")
WHERE = ("device", "threads", "graphs")
"""Fields that say where a run goes on, not what it is: another machine may resume it."""


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of one training run.

    ``lr`` is reached after a linear warm-up and then follows ``schedule`` step by step: "cosine" down to 0; "wsd" (warm-up,
    stable, decay), constant for half of the rest, then a cosine down to 0; or "constant".
    ``momentum`` and ``nesterov`` are SGD's; AdamW keeps its usual betas.  ``weight_decay`` is not applied to
    biases and the parameters of normalisation layers.  ``distill`` weighs the teacher's softened predictions
    against the labels: ``None`` means 0.5 where there is a trained network to learn from, 0 means never.
    ``ema`` is the decay of averaged weights, which are then evaluated and returned.  ``clip_norm`` bounds the
    norm of the whole gradient.  ``device`` "auto" takes a GPU if there is one.  ``precision`` is that of training;
    accuracy is always evaluated in float32, as the network is shipped.  ``graphs``, on a GPU: record steps as CUDA
    graphs and replay them (``run/replay.py``).

    Raises: ValueError that names the field and what it allows.
    """

    epochs: int = 40
    batch_size: int = 128
    optimizer: str = "sgd"
    lr: float = 0.05
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    warmup_epochs: float = 0.0
    schedule: str = "cosine"
    label_smoothing: float = 0.0
    ema: float | None = None
    distill: float | None = None
    temperature: float = 4.0
    precision: str = "fp32"
    channels_last: bool = False
    clip_norm: float | None = None
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    graphs: bool = False

    def __post_init__(self) -> None:
        self._whole("epochs", 0)
        self._whole("batch_size", 1)
        self._whole("seed", 0, most=2**63 - 1)  # what TOML and torch's generators hold
        if self.threads is not None:
            self._whole("threads", 1)
        self._choice("optimizer", OPTIMIZERS)
        self._choice("schedule", SCHEDULES)
        self._choice("precision", PRECISIONS)
        for name in ("nesterov", "channels_last", "graphs"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"Recipe({name}={getattr(self, name)!r}): must be true or false")
        self._number("lr", above=0.0)
        self._number("momentum", least=0.0, below=1.0)
        self._number("weight_decay", least=0.0)
        self._number("warmup_epochs", least=0.0)
        self._number("label_smoothing", least=0.0, below=1.0)
        self._number("temperature", above=0.0)
        if self.ema is not None:
            self._number("ema", above=0.0, below=1.0)
        if self.distill is not None:
            self._number("distill", least=0.0, most=1.0)
        if self.clip_norm is not None:
            self._number("clip_norm", above=0.0)
        if not isinstance(self.device, str) or not self.device:
            raise ValueError(f"Recipe(device={self.device!r}): must be a name such as 'auto', 'cpu' or 'cuda:0'")
        if self.graphs and self.precision == "fp16":
            raise ValueError(
                "Recipe(graphs=True, precision='fp16'): the scale of fp16 losses changes; take bf16 or fp32"
            )
        if self.optimizer == "sgd" and self.nesterov and self.momentum == 0:
            raise ValueError("Recipe(nesterov=True, momentum=0): Nesterov needs momentum; set nesterov=False")
        if self.epochs and self.warmup_epochs >= self.epochs:
            raise ValueError(f"Recipe(warmup_epochs={self.warmup_epochs}): must end before the {self.epochs} epochs do")

    def _whole(self, name: str, least: int, *, most: float = math.inf) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= most:
            bound = f"{least} or more" if most == math.inf else f"from {least} to {most}"
            raise ValueError(f"Recipe({name}={value!r}): must be a whole number, {bound}")
        object.__setattr__(self, name, int(value))  # not numpy's, which checkpoint and config.toml do not hold

    def _choice(self, name: str, allowed: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in allowed:
            raise ValueError(f"Recipe({name}={value!r}): must be one of {', '.join(allowed)}")

    def _number(
        self,
        name: str,
        *,
        least: float = -math.inf,
        above: float = -math.inf,
        below: float = math.inf,
        most: float = math.inf,
    ) -> None:
        value = getattr(self, name)
        fits = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        if not fits or not (least <= value <= most and above < value < below):
            bounds = {"at least": least, "above": above, "below": below, "at most": most}
            wanted = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound))
            raise ValueError(f"Recipe({name}={value!r}): must be a number {wanted}")
        object.__setattr__(self, name, int(value) if isinstance(value, Integral) else float(value))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for TOML or JSON; fields that are ``None`` are left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Recipe:
        """Inverse of ``to_dict``.  Raises: ValueError for a field that does not exist."""
        known = [f.name for f in fields(Recipe)]
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ValueError(f"recipe: there is no field {unknown[0]!r}; fields: {', '.join(known)}")
        return Recipe(**values)
