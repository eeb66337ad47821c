"""How a network is trained: one frozen, plain object that can be written to TOML and read back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from espalier.settings import Portion, Positive, Settings, described, settings_of

PROCESSES = ("devices", "nodes", "strategy")
WHERE = ("device", "threads", "graphs", *PROCESSES)
"""Fields that say where a run goes on, not what it is: another machine may resume it."""


ADDED = {"sync_batchnorm": False}
"""Fields that older runs do not name, and what they were in effect."""


@dataclass(frozen=True)
class Recipe(Settings):
    """Hyper-parameters of one training run.

    ``lr`` is reached after a linear warm-up and then follows ``schedule`` step by step: "cosine" down to 0; "wsd" (warm-up,
    stable, decay), constant for half of the rest, then a cosine down to 0; or "constant".
    ``momentum`` and ``nesterov`` are SGD's; AdamW keeps its usual betas.  ``distill`` ``None`` means 0.5 where there is a
    trained network to learn from.  Accuracy is always evaluated in float32, as the network is shipped.

    Raises: ValueError that names the field and what it allows.
    """

    epochs: Annotated[int, described("Passes over the training images", ge=0)] = 40
    batch_size: Annotated[int, described("Images per step", ge=1)] = 128
    optimizer: Annotated[Literal["sgd", "adamw"], described("sgd or adamw")] = "sgd"
    lr: Annotated[Positive, described("Learning rate at its peak")] = 0.05
    momentum: Annotated[Portion, described("Momentum of SGD")] = 0.9
    nesterov: Annotated[bool, described("Nesterov's form of SGD's momentum")] = True
    weight_decay: Annotated[float, described("Except on biases and normalisation layers", ge=0)] = 5e-4
    warmup_epochs: Annotated[float, described("Epochs of linear warm-up", ge=0)] = 0.0
    schedule: Annotated[
        Literal["cosine", "constant", "wsd"],
        described("Learning rate: cosine, constant, or wsd (constant for half of the run, then cosine)"),
    ] = "cosine"
    label_smoothing: Annotated[Portion, described("Share of the label that goes to the other classes")] = 0.0
    ema: Annotated[
        float | None, described("Decay of averaged weights, which are then evaluated and kept: 0.999", gt=0, lt=1)
    ] = None
    distill: Annotated[
        float | None,
        described(
            "Weight of the dense network's predictions against the labels; default 0.5 if it is trained", ge=0, le=1
        ),
    ] = None
    temperature: Annotated[Positive, described("Softens predictions for distillation")] = 4.0
    precision: Annotated[
        Literal["fp32", "bf16", "fp16"], described("Of training: fp32, bf16 or fp16; evaluation is fp32")
    ] = "fp32"
    channels_last: Annotated[bool, described("Memory layout; often faster")] = False
    clip_norm: Annotated[float | None, described("Bound on the norm of the gradient", gt=0)] = None
    seed: Annotated[
        int, described("Seeds batch order, augmentation and initial weights", ge=0, le=2**63 - 1)  # what TOML holds
    ] = 0
    device: Annotated[
        str, described("auto, cpu, cuda, cuda:1, ...; auto takes a GPU if there is one", min_length=1)
    ] = "auto"
    threads: Annotated[int | None, described("Number of CPU threads", ge=1)] = None
    devices: Annotated[
        int | None,
        described("Processes on each machine, one a GPU; default: one, or those that torchrun started", ge=1),
    ] = None
    nodes: Annotated[int, described("Machines", ge=1)] = 1
    strategy: Annotated[
        Literal["ddp"],
        described("How processes share the work: ddp, each has the whole network and a part of every batch"),
    ] = "ddp"
    sync_batchnorm: Annotated[
        bool, described("With several processes: BatchNorm over the whole batch, as in one process")
    ] = False
    graphs: Annotated[bool, described("On a GPU: replay training steps as CUDA graphs")] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.graphs and self.precision == "fp16":
            raise ValueError(
                "Recipe(graphs=True, precision='fp16'): the scale of fp16 losses changes; take bf16 or fp32"
            )
        if self.optimizer == "sgd" and self.nesterov and self.momentum == 0:
            raise ValueError("Recipe(nesterov=True, momentum=0): Nesterov needs momentum; set nesterov=False")
        if self.epochs and self.warmup_epochs >= self.epochs:
            raise ValueError(f"Recipe(warmup_epochs={self.warmup_epochs}): must end before the {self.epochs} epochs do")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for TOML or JSON; fields that are ``None`` are left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def to_config(self) -> dict[str, Any]:
        """What ``config.toml`` keeps: any number of processes may go on with a run."""
        return {name: value for name, value in self.to_dict().items() if name not in PROCESSES}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Recipe:
        """Inverse of ``to_dict``.  Raises: ValueError for a field that does not exist."""
        known = [s.name for s in settings_of(Recipe)]
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ValueError(f"recipe: there is no field {unknown[0]!r}; fields: {', '.join(known)}")
        return Recipe(**values)
