"""Compression as a callback of Hugging Face's Trainer: ``Trainer(..., callbacks=[es.huggingface.Compression(...)])``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from espalier.methods.base import Method, attach
from espalier.optional import import_transformers
from espalier.plan import Budget
from espalier.surgery.writing import write_tensors
from espalier.trainers.attached import Attached

TrainerCallback: Any = import_transformers().TrainerCallback


class Compression(Attached, TrainerCallback):  # type: ignore[misc]
    """Train the model of a ``transformers.Trainer`` down to ``budget`` by ``method``, in place; nothing else changes.

    ``example`` is an input as ``es.trace`` takes it, for models of transformers a dictionary: ``{"pixel_values": ...}``.  Give
    the callback to the Trainer when it is made: some methods give layers other parameters, and its optimiser comes after.
    When training ends, the model is the compressed network, ``small``.

    The Trainer's checkpoints hold the run (``espalier.pt``).  To go on, make a Trainer around the *dense* model with
    ``TrainingArguments(resume_from_checkpoint=FOLDER)``, from which the structure is taken, and call
    ``trainer.train(resume_from_checkpoint=FOLDER)``.

    Raises: ValueError where several processes or GPUs train, the optimiser holds other parameters, or a checkpoint has no run.

    >>> compression = es.huggingface.Compression(es.Budget(macs=0.5), es.TCP(), example={"pixel_values": x})   # doctest: +SKIP
    >>> trainer = Trainer(model, arguments, train_dataset=images, callbacks=[compression])                 # doctest: +SKIP
    >>> trainer.train(); small = compression.small                                                         # doctest: +SKIP
    """

    def __init__(self, budget: Budget | None, method: Method, *, example: Any) -> None:
        super().__init__(budget, method, example)

    def on_init_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        if args.world_size > 1 or args.n_gpu > 1:
            raise ValueError(
                "Compression: works in one process on one GPU, for surgery changes parameters that DDP and DataParallel hold; "
                "in several train with es.lightning.Compression, or in a loop of your own with es.attach"
            )
        if args.fp16 and not args.max_grad_norm:
            raise ValueError("Compression: with fp16 give max_grad_norm, which is when the Trainer unscales gradients")
        if args.resume_from_checkpoint is not None:
            self._saved = _read(Path(args.resume_from_checkpoint) / FILE)
        at = None if self._saved is None else self._saved["run"]
        self.run = attach(model, self.example, budget=self.budget, method=self.method, state=at)

    def on_train_begin(self, args: Any, state: Any, control: Any, *, optimizer: Any, **kwargs: Any) -> None:
        if self.run is None:
            raise ValueError("Compression: give it to the Trainer when it is made, Trainer(..., callbacks=[...])")
        if state.global_step and self._saved is None:
            raise ValueError(
                "Compression: to go on, say the checkpoint in TrainingArguments(resume_from_checkpoint=...) too"
            )
        self.begin(_inner(optimizer), "let the Trainer make it, after the callback has been given to it")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, optimizer: Any, **kwargs: Any) -> None:
        self.before_step(_inner(optimizer), state.global_step / state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, *, optimizer: Any, **kwargs: Any) -> None:
        self.after_step(_inner(optimizer), state.global_step / state.max_steps)

    def on_save(self, args: Any, state: Any, control: Any, *, optimizer: Any, **kwargs: Any) -> None:
        if self.run is not None and self.small is None:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_tensors(folder / FILE, self.saved(_inner(optimizer)))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.small = self.running.finish()


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """What accelerate has wrapped."""
    while not type(optimizer).__module__.startswith("torch.") and isinstance(
        inside := getattr(optimizer, "optimizer", None), torch.optim.Optimizer
    ):
        optimizer = inside
    found: torch.optim.Optimizer = optimizer
    return found


def _read(file: Path) -> dict[str, Any]:
    if not file.exists():
        raise ValueError(
            f"{file} is not there: the checkpoint was written without the callback Compression, or after its run"
        )
    return dict(torch.load(file, map_location="cpu", weights_only=True))


FILE = "espalier.pt"  # in the Trainer's checkpoints
