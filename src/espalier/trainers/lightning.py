"""Compression as a Lightning callback, with automatic optimisation: ``Trainer(callbacks=[es.lightning.Compression(...)])``."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from espalier.methods.base import Method, attach
from espalier.optional import import_lightning
from espalier.plan import Budget
from espalier.trainers.attached import Attached

_lightning: Any = import_lightning()
Callback: Any = _lightning.Callback
DDPStrategy: Any = _lightning.strategies.DDPStrategy


class Compression(Attached, Callback):  # type: ignore[misc]
    """Train the network in a LightningModule down to ``budget`` by ``method``; nothing in the module changes.

    ``network`` names the attribute of the module that holds the network, ``"model"`` for ``self.model``; the empty name is the
    module itself.  ``example`` is an input of it, as ``es.trace`` takes it; by default the module's ``example_input_array``.
    Progress is counted in optimiser steps of ``trainer.estimated_stepping_batches``, so accumulation and schedules of rate are
    right as they are.  When training ends, ``small`` is the compressed network, and stands in the module.

    Lightning's checkpoints hold the run: ``trainer.fit(..., ckpt_path=...)`` on a module with the *dense* network goes on
    exactly.  Of several processes, ``Trainer(devices=2, strategy="ddp")``, all end with the same network; methods that train
    layers as factors want ``"ddp_find_unused_parameters_true"``.

    Raises: ValueError where the module has no such network, no example is known, several optimisers train, or several processes
    by another strategy or with ``sync_batchnorm``.

    >>> compression = es.lightning.Compression(es.Budget(macs=0.5), es.TCP(), network="model")    # doctest: +SKIP
    >>> trainer = L.Trainer(max_epochs=40, callbacks=[compression])                               # doctest: +SKIP
    >>> trainer.fit(module, loader); small = compression.small                                    # doctest: +SKIP
    """

    def __init__(self, budget: Budget | None, method: Method, *, network: str = "model", example: Any = None) -> None:
        super().__init__(budget, method, example)
        self.network = network
        self._hook: RemovableHandle | None = None
        self._stepped = 0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit" or self.run is not None:
            return
        if trainer.world_size > 1 and not isinstance(trainer.strategy, DDPStrategy):
            raise ValueError(
                f"Compression: several processes train with Trainer(strategy='ddp'), not {type(trainer.strategy).__name__}: "
                "surgery changes parameters that others hold in parts"
            )
        if getattr(trainer.strategy, "_layer_sync", None) is not None:
            raise ValueError(
                "Compression: Trainer(sync_batchnorm=True) replaces layers that are compressed; leave it out"
            )
        model = pl_module.get_submodule(self.network) if self._has(pl_module) else None
        if model is None:
            inside = ", ".join(name for name, _ in pl_module.named_children()) or "nothing"
            raise ValueError(
                f"Compression(network={self.network!r}): the module has no such network; it holds {inside}"
            )
        example = self.example if self.example is not None else pl_module.example_input_array
        if example is None:
            raise ValueError(
                "Compression: give example=, an input of the network, or set example_input_array in the module"
            )
        model.to(trainer.strategy.root_device)  # the run's own tensors lie where the network lies
        dense = copy.deepcopy(model)

        def take_up(*_: Any) -> None:
            """Before Lightning loads the weights of a checkpoint: they need the structure that they were saved with."""
            self._saved = self._read(trainer.ckpt_path)
            self.run = attach(dense, example, budget=self.budget, method=self.method, state=self._saved["run"])
            self._put(pl_module, self.run.model)

        self._hook = pl_module.register_load_state_dict_pre_hook(take_up)
        self.run = attach(model, example, budget=self.budget, method=self.method)
        self._put(pl_module, self.run.model)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f"Compression: works with one optimiser; configure_optimizers returned {len(trainer.optimizers)}"
            )
        assert self._hook is not None
        self._hook.remove()
        self.begin(trainer.optimizers[0], "make it in configure_optimizers, of self.parameters(), not before")
        self._stepped = trainer.global_step

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        self.before_step(optimizer, trainer.global_step / trainer.estimated_stepping_batches)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self._stepped or self.run is None:
            return  # gradients were only accumulated
        self._stepped = trainer.global_step
        progress = trainer.global_step / trainer.estimated_stepping_batches
        removed = self.after_step(trainer.optimizers[0], progress)
        if removed is not None and isinstance(trainer.strategy, DDPStrategy):
            trainer.strategy.model = trainer.lightning_module  # DDP is made anew, around the parameters of now
            trainer.strategy.configure_ddp()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.small = self.running.finish()
        self._put(pl_module, self.small)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self.run is not None and self.small is None:
            checkpoint[KEY] = self.saved(trainer.optimizers[0] if trainer.optimizers else None)

    # -- inside

    def _has(self, pl_module: nn.Module) -> bool:
        return self.network in dict(pl_module.named_modules())

    def _put(self, pl_module: nn.Module, model: nn.Module) -> None:
        parent, _, name = self.network.rpartition(".")
        if self.network:
            setattr(pl_module.get_submodule(parent), name, model)

    def _read(self, path: Any) -> dict[str, Any]:
        """What ``on_save_checkpoint`` wrote."""
        content = torch.load(path, map_location="cpu", weights_only=True)
        if KEY not in content:
            raise ValueError(f"{path}: was not written with the callback Compression, or only after its run had ended")
        return dict(content[KEY])


KEY = "espalier"  # in Lightning's checkpoints
