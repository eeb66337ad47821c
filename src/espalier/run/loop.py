"""The training loop: one for plain training, for methods that prune meanwhile, and for fine-tuning."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from espalier.copies import copy_model, device_of
from espalier.graph.watch import first_line
from espalier.layers import OwnDecay
from espalier.methods.agreement import anywhere, average_, average_statistics, once, reduce_gradients, share, total
from espalier.methods.base import Removed, Run
from espalier.methods.scoring import buffers_kept, modes_kept
from espalier.run.batches import Source
from espalier.run.batchnorm import synchronised
from espalier.run.checkpoint import (
    all_tensors,
    check_entries,
    damage_said,
    fingerprint,
    load_optimizer_state,
    optimizer_state,
    random_state,
    read_checkpoint,
    restore_random_state,
    same_structure,
    seeded,
    take_over,
    write_checkpoint,
)
from espalier.run.data import Data, FolderData, identity
from espalier.run.ema import AveragedWeights
from espalier.run.evaluate import autocast, pick_device, thread_count
from espalier.run.processes import shares, tested
from espalier.run.recipe import ADDED, WHERE, Recipe
from espalier.run.replay import Replay, recorder_for, running
from espalier.run.stopping import TrainingStopped, sigterm_noticed
from espalier.surgery.files import structure, untouched_on_error
from espalier.tasks import Classification, Task, image_count, main_logits, to_device

CHECK_EVERY = 50  # steps between looks at the loss, each of which waits for the device


class TrainingDiverged(RuntimeError):
    """The loss or the weights are no longer finite; the last checkpoint is from before that."""


@dataclass(frozen=True)
class Epoch:
    """One line of the log.  Costs, strength and remaining mass are those after the epoch; ``None`` without a run."""

    epoch: int  # from 1 on
    loss: float  # mean of what was minimised, penalty included
    train_accuracy: float | None  # percent, of the augmented training images as they were seen
    accuracy: float | None  # percent, of the test images; ``None`` where the task is judged otherwise
    test_loss: float | None  # ``None`` where predictions have no loss
    lr: float  # at the last step
    seconds: float  # of training, without evaluation and checkpoint
    macs: int | None = None
    params: int | None = None
    activation_memory: int | None = None
    strength: float | None = None
    remaining: float | None = None
    removals: int = 0  # how often channels were removed during the epoch
    metric: float | None = None  # of the test images, where the task is not judged by accuracy


@dataclass(frozen=True)
class History:
    """What happened, epoch by epoch."""

    epochs: tuple[Epoch, ...] = ()

    @property
    def last(self) -> Epoch:
        if not self.epochs:
            raise ValueError("no epoch has been trained")
        return self.epochs[-1]

    @property
    def seconds(self) -> float:
        return sum(e.seconds for e in self.epochs)


@dataclass(frozen=True)
class Step:
    """Where the loop is, for progress bars; all counted from 1."""

    epoch: int
    epochs: int
    step: int  # within the epoch
    steps: int  # per epoch


OnEpoch = Callable[[History], None]
OnStep = Callable[[Step], None]


def train(
    model: nn.Module,
    data: Source,
    recipe: Recipe,
    *,
    run: Run | None = None,
    teacher: nn.Module | None = None,
    task: Task | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    on_epoch: OnEpoch | None = None,
    on_step: OnStep | None = None,
) -> History:
    """Train ``model`` for ``task`` (default: a classifier), in place, and return what happened; with a ``run`` it is
    compressed meanwhile.

    ``run`` has been started on ``model``; call its ``finish()`` afterwards.  With a ``teacher`` the loss
    is ``(1 - w) * loss + w * task.follow(...)``, the latter for classifiers ``T^2 * KL(teacher || model)`` of predictions
    softened by ``T = recipe.temperature`` (Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015).

    ``checkpoint`` is a file that is replaced after every epoch.  With ``resume`` the run goes on from it
    (from the start if there is none yet) and, on the CPU and with the same number of threads, ends bit for
    bit where the uninterrupted run would have ended.  The caller's random number streams and ``teacher`` are
    left as they were.

    Raises: ValueError if model, data and recipe do not fit together, or if a checkpoint is in the way or
    belongs to another run, and the weights are as they were then; TrainingDiverged, naming epoch and step, if
    the loss of training or testing is no longer finite; TrainingStopped after SIGTERM, with a checkpoint of the very step.
    """
    device = pick_device(recipe.device)
    path = None if checkpoint is None else Path(checkpoint)
    if resume and path is None:
        raise ValueError("train(resume=True): say where the checkpoint is: checkpoint=PATH")
    if run is not None and any(p.device != device for p in model.parameters()):
        raise ValueError(f"train: move the model to {device} before the run is started on it")
    with thread_count(recipe.threads), seeded(recipe.seed, device), synchronised(model, wanted=recipe.sync_batchnorm):
        content = once(lambda: _found(path, resume=resume))
        if content is not None and run is not None and not same_structure(model, content):
            raise ValueError(
                f"{path}: the model has another structure than this checkpoint; first "
                "rebuild_from_checkpoint(model, path), then start the run on it"
            )
        loop = _Loop(model, data, recipe, device, run, teacher, path, task or Classification())
        check_fit(model, loop.data, recipe, teacher=loop.teacher, task=loop.task)
        if content is not None:
            loop.load(content)
        with nullcontext(bool) if path is None else sigterm_noticed() as loop.told_to_stop:
            while len(loop.history.epochs) < recipe.epochs:
                with running(loop.replay):
                    for x, y in loop.batches():
                        loop.learn(x, y)
                        if run is not None:
                            with loop.divergence_named():
                                removed = run.step(progress=loop.progress, optimizer=loop.optimizer)
                            loop.follow(removed)
                        loop.end_step(on_step)
                loop.end_epoch()
                if on_epoch is not None and loop.own.first:
                    on_epoch(loop.history)
                if anywhere(loop.told_to_stop()):
                    loop.stop()
        if loop.average is not None:
            loop.average.swap(model)
    return loop.history


def _found(path: Path | None, *, resume: bool) -> dict[str, Any] | None:
    """The checkpoint to go on from, if there is one.  Raises: ValueError if one is in the way."""
    if path is None or not path.exists():
        return None
    if not resume:
        raise ValueError(f"{path}: a checkpoint is already there; resume it with resume=True, or choose another place")
    return read_checkpoint(path)


def check_fit(
    model: nn.Module, data: Source, recipe: Recipe, *, teacher: nn.Module | None = None, task: Task | None = None
) -> None:
    """Find out before anything is trained or written whether model, data, task and recipe go together.

    Raises: ValueError saying what does not fit.
    """
    images = len(data.train) if isinstance(data, (Data, FolderData)) else None
    if images is not None and recipe.batch_size > images:
        raise ValueError(
            f"Recipe(batch_size={recipe.batch_size}): there are {images} training images; "
            "give a batch size that is not larger"
        )
    task = task or Classification()
    _distillation_weight(recipe, teacher, task)
    device = device_of(model)
    if data.num_classes is None or not isinstance(task, Classification):
        if recipe.graphs:
            raise ValueError(
                "Recipe(graphs=True): steps are replayed for classifiers with num_classes only; set graphs=False"
            )
        batch = next(iter(data.calibration_batches(batch_size=recipe.batch_size, batches=1, seed=recipe.seed)))
        for network in (model, teacher):
            if network is not None:
                _check_task(network, task, *to_device(task.split(batch), device))
        return
    x = data.example(1).to(device)
    for network in (model, teacher):
        if network is None:
            continue
        with modes_kept(network), torch.no_grad():
            network.eval()
            try:
                output = network(x)
            except Exception as error:
                raise ValueError(
                    f"the model does not take the data's images {tuple(x.shape[1:])}: {first_line(error)}"
                ) from error
        main_logits(output, classes=data.num_classes)


def _check_task(model: nn.Module, task: Task, inputs: Any, targets: Any) -> None:
    """One batch in train mode, of which nothing stays.  Raises: ValueError if the network or its loss does not take it."""
    with modes_kept(model), buffers_kept(model), torch.no_grad(), torch.random.fork_rng():
        model.train()
        try:
            output = task.forward(model, inputs, targets)
            loss = task.loss(output, targets)
        except Exception as error:
            raise ValueError(f"{task.name}: a first training batch does not go through: {first_line(error)}") from error
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(f"{task.name}: loss(output, targets) is a tensor of one number, mean over the batch")


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """The rate of step ``step`` (from 0 on): linear warm-up, then the schedule."""
    total, warm = recipe.epochs * steps_per_epoch, round(recipe.warmup_epochs * steps_per_epoch)
    if step < warm:
        return recipe.lr * (step + 1) / warm
    return recipe.lr * _DECAY[recipe.schedule]((step - warm) / max(total - warm, 1))


def _cosine(share: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * share))


_DECAY: dict[str, Callable[[float], float]] = {
    "cosine": _cosine,
    "constant": lambda share: 1.0,
    "wsd": lambda share: _cosine(max(2.0 * share - 1.0, 0.0)),
}

_NORMALISATIONS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """SGD or AdamW over the parameters that train; vectors and normalisation layers without weight decay.

    ``OwnDecay`` modules say themselves what it is for.
    """
    spared = {id(p) for m in model.modules() if isinstance(m, _NORMALISATIONS) for p in m.parameters(recurse=False)}
    chosen = {
        id(p): name in module.decayed
        for module in model.modules()
        if isinstance(module, OwnDecay)
        for name, p in module.named_parameters(recurse=False)
    }
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            usual = parameter.ndim > 1 and id(parameter) not in spared
            (decayed if chosen.get(id(parameter), usual) else plain).append(parameter)
    if not decayed and not plain:
        raise ValueError("train: the model has no parameter that requires a gradient")
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr)
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov)


class _Loop:
    """The state of the training loop."""

    def __init__(
        self,
        model: nn.Module,
        data: Source,
        recipe: Recipe,
        device: torch.device,
        run: Run | None,
        teacher: nn.Module | None,
        path: Path | None,
        task: Task,
    ) -> None:
        self.task = task.smoothed(recipe.label_smoothing) if recipe.label_smoothing else task
        self.distill = _distillation_weight(recipe, teacher, task)
        self.model = _placed(model, device, recipe)
        self.teacher = None
        if teacher is not None and self.distill:
            self.teacher = _placed(copy_model(teacher, {}), device, recipe).eval()
        self.teacher_print = fingerprint(self.teacher)
        self.data = data.to(device) if isinstance(data, Data) else data
        self.recipe, self.device, self.run, self.path = recipe, device, run, path
        self.steps = data.steps(recipe.batch_size)
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")
        self.history = History()
        self.done = 0  # steps of the whole run
        self.kept_checkpoint = 0  # the epoch that lies on disk
        self.now = _Pass(device)
        self.own = share()  # of every batch, where several processes train
        self.weight = 1.0  # of the mean over this process's part of the batch, among all
        self.alarms = torch.zeros((), device=device)  # from processes that were told to stop
        self.begun: _Pass | None = None  # the epoch that a checkpoint was written in the middle of
        self.told_to_stop: Callable[[], bool] = bool
        self._begin()

    def _begin(self) -> None:
        """Make what holds the model's tensors."""
        self.optimizer = make_optimizer(self.model, self.recipe)
        self.average = None if self.recipe.ema is None else AveragedWeights(self.model, self.recipe.ema)
        recorder = recorder_for(self.device, wanted=self.recipe.graphs)
        self.replay = None if recorder is None else Replay(self._compute, self.model, recorder=recorder)

    @property
    def progress(self) -> float:
        """Share of the whole run that is done."""
        return self.done / (self.recipe.epochs * self.steps)

    # -- one epoch -------------------------------------------------------------------------------------------

    def batches(self) -> Iterator[tuple[Any, Any]]:
        """Inputs and targets on the device, once through the training images, or through the rest of them after a stop."""
        number, recipe = len(self.history.epochs), self.recipe
        self.now, self.begun = self.begun or _Pass(self.device), None
        gone, resumed_at = 0, random_state(self.device)
        self.now.begin = time.perf_counter()
        self.model.train()
        for x, y, weight in shares(
            self.data, self.task, self.own,
            batch_size=recipe.batch_size, epoch=number, seed=recipe.seed, channels_last=recipe.channels_last,
        ):  # fmt: skip
            if gone < self.now.done:
                gone += 1
                if gone == self.now.done:  # loading them drew numbers
                    restore_random_state(resumed_at, self.device)
                continue
            if self.now.losses.seen == self.steps:
                raise ValueError(f"the data promised {self.steps} batches in an epoch and gives more")
            self.weight = weight
            yield to_device((x, y), self.device)

    def learn(self, x: Any, y: Any) -> None:
        """Forward, backward, and a step of the optimiser."""
        rate = None if self.run is None else self.run.rate(self.progress)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, self.done, self.steps) if rate is None else rate * self.recipe.lr
        if self.replay is None:
            loss, hits = self._forward(x, y)
            loss = loss + (0.0 if self.run is None else self.run.penalty())
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(loss).backward()
        else:
            penalty = 0.0 if self.run is None else self.run.penalty()
            loss, hits = self.replay(x, y, penalty=penalty if isinstance(penalty, Tensor) else None)
            loss = loss + penalty
        self.now.add(loss * self.weight, hits, image_count(x))  # hits are on the device still
        if self.own.world > 1:
            told = [float(self.told_to_stop())]
            self.alarms = self.alarms + reduce_gradients(self.model, told, weight=self.weight)[0]
            if self.run is not None:
                self.run.averaged()
        if self.recipe.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self.recipe.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.done += 1

    def _compute(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """What is recorded where steps are replayed."""
        loss, right = self._forward(x, y)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach(), torch.zeros_like(loss, dtype=torch.int64) if right is None else right

    def _forward(self, x: Any, y: Any) -> tuple[Tensor, Tensor | None]:
        """Loss without penalty, and how many were right."""
        with autocast(self.device, self.recipe.precision):
            output = self.task.forward(self.model, x, y)
            soft = None
            if self.teacher is not None:
                with torch.no_grad():
                    soft = self.task.predict(self.teacher, x, y)
        loss = self.task.loss(output, y)
        if self.teacher is not None:
            apart = self.task.follow(output, soft, self.recipe.temperature)
            loss = (1.0 - self.distill) * loss + self.distill * apart
        return loss, self.task.hits(output, y)

    @contextmanager
    def divergence_named(self) -> Iterator[None]:
        """A method stumbles over NaN before the loop looks: name the cause, and then the symptom."""
        try:
            yield
        except Exception as error:
            self._look_at_losses(alone=True)
            self._check_weights(f" ({first_line(error)})")
            raise

    def follow(self, removed: Removed | None) -> None:
        """What holds tensors of the model beside it moves on with them."""
        if removed is None:
            return
        if self.replay is not None and removed.rebuilt:
            self.replay.forget()
        if self.average is not None:
            self.average.cut(removed.kept, self.model, renewed=removed.renewed, turned=removed.turned)
        self.now.removals += bool(removed.kept)

    def end_step(self, on_step: OnStep | None) -> None:
        """Average, look at the losses now and then, and stop where that was asked for."""
        if self.average is not None:
            self.average.update(self.model)
        if self.now.losses.full:
            self._look_at_losses()
        if on_step is not None and self.own.first:
            on_step(Step(len(self.history.epochs) + 1, self.recipe.epochs, self.now.losses.seen, self.steps))
        if self._stops() and self.now.losses.seen < self.steps:
            self._close_pass()
            self.begun = self.now
            self.stop()

    def _stops(self) -> bool:
        """Whether any process was told to stop, after the same step in all of them."""
        if self.own.world == 1:
            return self.told_to_stop()
        looks = self.device.type == "cpu" or not self.now.losses.unread  # a look waits for the device
        return looks and bool(self.alarms > 0)

    def end_epoch(self) -> None:
        """Evaluate, and write the checkpoint."""
        found = self.now
        self._close_pass()
        if found.losses.seen != self.steps:
            raise ValueError(f"the data promised {self.steps} batches in an epoch and gave {found.losses.seen}")
        tested = self._evaluate()
        test_loss = tested.get("loss")
        if test_loss is not None and not math.isfinite(test_loss):
            self._diverged(self.steps, f"the test loss is {test_loss}")
        metric = self.task.metric.name
        epoch = Epoch(
            epoch=len(self.history.epochs) + 1,
            loss=found.losses.mean,
            train_accuracy=found.accuracy,
            accuracy=tested.get("accuracy"),
            test_loss=test_loss,
            metric=None if metric == "accuracy" else tested[metric],
            lr=self.optimizer.param_groups[0]["lr"],
            seconds=found.seconds,
            removals=found.removals,
        )
        self.history = History((*self.history.epochs, self._with_status(epoch)))
        self._save()

    def _close_pass(self) -> None:
        self._look_at_losses()
        self._check_weights()
        self.now.seconds += time.perf_counter() - self.now.begin

    def stop(self) -> NoReturn:
        """Write the checkpoint of this very step and end."""
        where = f"after epoch {len(self.history.epochs)}"
        if self.begun is not None:
            where = f"in epoch {len(self.history.epochs) + 1} after step {self.begun.losses.seen} of {self.steps}"
            self._save()
        raise TrainingStopped(
            f"stopped by SIGTERM {where}; the checkpoint of there is in {self.path}: "
            "the same call with resume=True goes on exactly"
        )

    # -- looking ---------------------------------------------------------------------------------------------

    def _look_at_losses(self, *, alone: bool = False) -> None:
        bad = self.now.losses.read(alone=alone)
        if bad is not None:
            self._diverged(bad[0], f"the loss is {bad[1]}")

    def _check_weights(self, symptom: str = "") -> None:
        finite = torch.stack([torch.isfinite(p.detach()).all() for p in self.model.parameters()]).all()
        if not bool(finite):
            self._diverged(self.now.losses.seen, f"weights are not finite{symptom}")

    def _diverged(self, step: int, what: str) -> None:
        epoch = len(self.history.epochs) + 1
        total = (epoch - 1) * self.steps + step
        kept = self.kept_checkpoint
        raise TrainingDiverged(
            f"training diverged in epoch {epoch} at step {step} of {self.steps} (run step {total}): {what}"
            + (f"; the checkpoint of epoch {kept} is kept in {self.path}" if kept else "")
            + f". Lower the learning rate ({self.recipe.lr:g}), set clip_norm, or warm up longer"
        )

    def _evaluate(self) -> dict[str, float]:
        average_statistics(self.model)
        if self.average is not None:
            self.average.swap(self.model)
            average_statistics(self.model)
        try:
            return tested(
                self.model, self.data, self.own,
                device=self.device, task=self.task, channels_last=self.recipe.channels_last,
            )[0]  # fmt: skip
        finally:
            if self.average is not None:
                self.average.swap(self.model)

    def _with_status(self, epoch: Epoch) -> Epoch:
        if self.run is None:
            return epoch
        status = self.run.status
        strength, remaining = float(status.strength), float(status.remaining)
        return replace(epoch, **status.cost.counts, strength=strength, remaining=remaining)

    # -- checkpoints -----------------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.path is None:
            return
        average_statistics(self.model)
        begun = None if self.begun is None else self.begun.state_dict()
        self.kept_checkpoint = once(lambda: self._write(begun))

    def _write(self, begun: dict[str, Any] | None) -> int:
        """The checkpoint; returns the epoch that lies on disk then."""
        assert self.path is not None
        content = {
            "epoch": len(self.history.epochs),
            "step": self.done,
            "begun": begun,
            "structure": structure(self.model),
            "weights": {name: tensor.detach() for name, tensor in all_tensors(self.model).items()},
            "optimizer": optimizer_state(self.model, self.optimizer),
            "process": None if self.run is None else self.run.state_dict(model=False),
            "average": None if self.average is None else self.average.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": random_state(self.device),
            "history": [asdict(epoch) for epoch in self.history.epochs],
            "recipe": self.recipe.to_dict(),
            "setting": self.setting,
        }
        write_checkpoint(self.path, content)
        return len(self.history.epochs)

    @cached_property
    def setting(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        return {
            **self.data_setting,
            "batches in an epoch": self.steps,
            "classes": self.data.num_classes,
            "teacher's weights": self.teacher_print,
            "process": None if self.run is None else type(self.run).__name__,
            **(
                {}
                if isinstance(self.task, Classification) and not self.task.multi_label
                else {"task": self.task.to_dict()}
            ),
        }

    @cached_property
    def data_setting(self) -> dict[str, Any]:
        return {f"the data's {name}": value for name, value in identity(self.data).items()}

    def _compare(self, content: dict[str, Any]) -> None:
        """Raises: ValueError if the checkpoint is of another run."""
        ours = {**self.recipe.to_dict(), **self.setting}
        # Older checkpoints said nothing of the data, or of fields that there were not.
        theirs = {**self.data_setting, **ADDED, **content["recipe"], **content["setting"]}
        for name in {**ours, **theirs}:
            if name not in WHERE and ours.get(name) != theirs.get(name):
                raise ValueError(
                    f"{self.path}: cannot resume: {name} was {theirs.get(name)} and is {ours.get(name)} now; "
                    "give what the run began with, or begin a new one"
                )

    def load(self, content: dict[str, Any]) -> None:
        """Go on from a checkpoint, of which the model may have the structure already."""
        with damage_said(str(self.path)), untouched_on_error(self.model):
            check_entries(content, where=str(self.path))
            self._compare(content)
            take_over(self.model, content, where=str(self.path))
            self._begin()
            load_optimizer_state(self.model, self.optimizer, content["optimizer"])
            if self.run is not None:
                self.run.load_state_dict(content["process"])
            if self.average is not None:
                self.average.load_state_dict(content["average"])
            self.scaler.load_state_dict(content["scaler"])
            self.history = History(tuple(Epoch(**epoch) for epoch in content["history"]))
            self.done, self.kept_checkpoint = content["step"], content["epoch"]
            if begun := content.get("begun"):  # older checkpoints were of whole epochs
                self.begun = _Pass.from_state(begun, self.device)
            steps = len(self.history.epochs) * self.steps + (0 if self.begun is None else self.begun.done)
            if self.kept_checkpoint != len(self.history.epochs) or self.done != steps:
                raise ValueError(f"{self.path}: damaged, it says step {self.done} where its epochs have {steps}")
            restore_random_state(content["random"], self.device)


class _Losses:
    """Losses of an epoch, kept on the device and read in bulk: reading waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self.waiting = torch.zeros(CHECK_EVERY, device=device)
        self.unread = 0
        self.values: list[float] = []

    @property
    def seen(self) -> int:
        return len(self.values) + self.unread

    @property
    def full(self) -> bool:
        return self.unread == CHECK_EVERY

    @property
    def mean(self) -> float:
        return math.fsum(self.values) / len(self.values)

    def add(self, loss: Tensor) -> None:
        self.waiting[self.unread] = loss.detach()
        self.unread += 1

    def read(self, *, alone: bool = False) -> tuple[int, float] | None:
        """Read what waits, as the mean over all processes unless ``alone``; returns the first step of the epoch, from 1 on,
        whose loss is not finite."""
        waiting = self.waiting[: self.unread].clone()
        fresh = (waiting if alone else average_(waiting)).tolist()
        before = len(self.values)
        self.values += fresh
        self.unread = 0
        return next(((before + i + 1, v) for i, v in enumerate(fresh) if not math.isfinite(v)), None)


class _Pass:
    """What an epoch has come to so far."""

    def __init__(self, device: torch.device) -> None:
        self.losses = _Losses(device)
        self.correct: Tensor | None = torch.zeros((), dtype=torch.int64, device=device)
        self.images = self.removals = 0
        self.seconds = self.begin = 0.0  # begin: by the clock, since the last stop
        self.done = 0  # steps before a stop

    def add(self, loss: Tensor, right: Tensor | None, images: int) -> None:
        self.losses.add(loss)
        self.correct = None if right is None or self.correct is None else self.correct + right
        self.images += images

    @property
    def accuracy(self) -> float | None:
        """Percent, over all processes."""
        right, images = self._counts()
        return None if right is None else 100.0 * right / images

    def _counts(self) -> tuple[int | None, int]:
        """Right answers and images of all processes."""
        right, images = total(0 if self.correct is None else int(self.correct), self.images)
        return None if self.correct is None else int(right), int(images)

    def state_dict(self) -> dict[str, Any]:
        """As plain values, once all losses have been read."""
        assert not self.losses.unread
        right, images = self._counts()
        return {
            "losses": list(self.losses.values), "correct": right, "images": images,
             "removals": self.removals, "seconds": self.seconds,
        }  # fmt: skip

    @staticmethod
    def from_state(state: dict[str, Any], device: torch.device) -> _Pass:
        found = _Pass(device)
        found.losses.values = [float(loss) for loss in state["losses"]]
        mine = int(share().first)  # what all had counted, one of them goes on with
        if state["correct"] is None:
            found.correct = None
        elif found.correct is not None:
            found.correct += mine * int(state["correct"])
        found.images, found.removals = mine * int(state["images"]), int(state["removals"])
        found.seconds, found.done = float(state["seconds"]), len(found.losses.values)
        return found


def _distillation_weight(recipe: Recipe, teacher: nn.Module | None, task: Task) -> float:
    if recipe.distill and not task.follows:
        raise ValueError(f"Recipe(distill={recipe.distill:g}): {task.name} follows no teacher; leave it out")
    if teacher is None:
        if recipe.distill:
            raise ValueError(f"Recipe(distill={recipe.distill:g}): there is no trained network to learn from")
        return 0.0
    if not task.follows:
        return 0.0
    return 0.5 if recipe.distill is None else recipe.distill


def _placed(model: nn.Module, device: torch.device, recipe: Recipe) -> nn.Module:
    model.to(device)
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model
