"""What a network is for: how a batch is taken apart, what the loss is, how it is judged, and how it follows a teacher."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from espalier.optional import import_torchvision

AUXILIARY_WEIGHT = 0.3  # of the loss of each auxiliary classifier; Szegedy et al., Going Deeper with Convolutions, 2015
AUXILIARY_MAP_WEIGHT = (
    0.5  # of an auxiliary map; Zhao et al., Pyramid Scene Parsing Network, 2017, take 0.4, torchvision 0.5
)


@dataclass(frozen=True)
class Metric:
    """What a network is judged by.  ``name`` is the key in ``metrics.json`` and the column in ``log.csv``."""

    name: str
    unit: str = ""  # "%", or empty
    higher_is_better: bool = True  # False for an error

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or self.name == "loss":
            raise ValueError(f"Metric({self.name!r}): a name is one word of letters, digits and _, and not 'loss'")

    @property
    def words(self) -> str:
        """``mean iou``."""
        return self.name.replace("_", " ")

    def said(self, value: float) -> str:
        """``mean_iou 71.20 %``."""
        return f"{self.name} {value:.4g}" if not self.unit else f"{self.name} {value:.2f} {self.unit}"


class Meter(Protocol):
    """Collects what a metric needs, batch by batch.  Every metric of torchmetrics is one."""

    def update(self, output: Any, targets: Any, /) -> Any: ...

    def compute(self) -> Any:
        """A number, or a tensor that holds one."""


class Summed:
    """A meter whose ``kept`` are sums, or lists, of which those of several processes can be put together."""

    kept: ClassVar[tuple[str, ...]]

    def sums(self) -> dict[str, Any]:
        return {name: to_device(getattr(self, name), "cpu") for name in self.kept}

    def put_together(self, all_sums: Sequence[dict[str, Any]]) -> None:
        """Hold what all of ``all_sums`` hold."""
        for name in self.kept:
            first, *rest = (sums[name] for sums in all_sums)
            setattr(self, name, sum(rest, start=first))


class Task(ABC):
    """What a network is for.  Own tasks say ``metric``, ``loss`` and ``meter``; the rest has a default.

    ``inputs`` are what ``espalier.trace`` takes: a tensor, a tuple of arguments or a dictionary of keywords; a list is one
    argument.
    """

    @property
    @abstractmethod
    def metric(self) -> Metric:
        """Name, unit and direction; a plain class attribute will do."""

    @abstractmethod
    def loss(self, output: Any, targets: Any) -> Tensor:
        """Mean over the batch, of what ``forward`` returned; a scalar."""

    @abstractmethod
    def meter(self) -> Meter:
        """A new one, which is given what ``predict`` returned and the targets."""

    def split(self, batch: Any) -> tuple[Any, Any]:
        """Inputs and targets.  Raises: ValueError if the batch is not a pair."""
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
            raise ValueError(
                f"{self.name}: a batch is a pair (inputs, targets), the loader yields a {type(batch).__name__}; a task of your "
                "own may take it apart in split(batch)"
            )
        return batch[0], batch[1]

    def forward(self, model: nn.Module, inputs: Any, targets: Any) -> Any:
        """In train mode; ``targets`` are for networks that compute their losses themselves."""
        return called(model, inputs)

    def predict(self, model: nn.Module, inputs: Any, targets: Any) -> Any:
        """In eval mode; ``targets`` are for networks that are judged by their losses."""
        return called(model, inputs)

    def quiet(self, model: nn.Module) -> None:
        """Set the mode in which ``forward`` and ``loss`` go without noise: eval mode, where the network has a loss in it."""
        model.eval()

    def follow(self, output: Any, teacher: Any, temperature: float) -> Tensor:
        """How far ``output`` is from what the teacher returned on the same inputs, mean over the batch; a scalar."""
        raise ValueError(f"{self.name} follows no teacher: give Recipe(distill=0)")

    @property
    def follows(self) -> bool:
        """Whether there is a way to learn from the dense network."""
        return type(self).follow is not Task.follow

    def test_loss(self, output: Any, targets: Any, images: int) -> Tensor | None:
        """Summed over the images of a batch, a scalar; ``None`` where predictions have no loss."""
        return self.loss(output, targets) * images

    def hits(self, output: Any, targets: Any) -> Tensor | None:
        """How many training images were right, a scalar, where they can be counted."""
        return None

    def smoothed(self, share: float) -> Task:
        """The same task with that share of a label given to the other classes."""
        raise ValueError(f"Recipe(label_smoothing={share:g}): {self.name} has no labels to smooth")

    @property
    def name(self) -> str:
        """What it is called in messages and configurations."""
        return type(self).__name__

    def to_dict(self) -> dict[str, Any]:
        """Name and plain settings, for ``config.toml``: a run goes on only with the task that it began with."""
        own: list[tuple[str, Any]] = (
            [(f.name, getattr(self, f.name)) for f in fields(self)] if is_dataclass(self) else []
        )
        return {"name": self.name, **{key: v for key, v in own if isinstance(v, (bool, int, float, str))}}


@dataclass(frozen=True)
class TaskBatches:
    """Inputs and targets as ``task`` takes ``batches`` apart, for methods that measure; to be gone through again and again."""

    batches: Iterable[Any]
    task: Task

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        return map(self.task.split, self.batches)


def need_task(task: Any) -> Task:
    """``task``, ``Classification()`` for ``None``.  Raises: ValueError for what is no task, with an example."""
    if task is None or isinstance(task, Task):
        return task or Classification()
    said = task.__name__ if isinstance(task, type) else repr(task)[:80]
    raise ValueError(f"task={said}: give a task with its settings, for example es.Segmentation(classes=21)")


def task_of(batches: Iterable[Any]) -> Task:
    """What ``batches`` are for; plain pairs are a classifier's."""
    return batches.task if isinstance(batches, TaskBatches) else Classification()


def called(model: nn.Module, inputs: Any) -> Any:
    """The network on inputs: a tuple is its arguments, a dictionary its keywords, anything else one argument."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def to_device(value: Any, device: str | torch.device) -> Any:
    """Every tensor in tuples, lists and dictionaries on ``device``."""
    return _mapped(value, lambda t: t.to(device, non_blocking=True))


def image_count(inputs: Any) -> int:
    """How many images a batch of inputs holds.  Raises: ValueError where it does not show."""
    first = inputs
    if isinstance(inputs, (tuple, dict)) and inputs:
        first = next(iter(inputs.values() if isinstance(inputs, dict) else inputs))
    if isinstance(first, list) or (isinstance(first, Tensor) and first.dim()):
        return len(first)
    raise ValueError(
        f"inputs are a tensor, a list, or a tuple or dictionary that begins with one, not a {type(inputs).__name__}"
    )


def example_of(inputs: Any, images: int = 1) -> Any:
    """The first images of a batch, as ``espalier.trace`` takes them."""
    if isinstance(inputs, list):
        return (inputs[:images],)
    if isinstance(inputs, tuple):
        return tuple(v[:images] if isinstance(v, (list, Tensor)) else v for v in inputs)
    return _mapped(inputs, lambda t: t[:images] if t.dim() else t)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _mapped(v, change) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        changed = [_mapped(v, change) for v in value]
        return changed if isinstance(value, list) else tuple(changed)
    return value


# -- classification


@dataclass(frozen=True)
class Classification(Task):
    """One class per image, by cross-entropy, judged by accuracy.  ``multi_label``: any number of classes, targets of 0 and 1
    ``(images, classes)``, by binary cross-entropy, judged by average precision, mean over the classes that occur.

    Of several outputs the first counts, and the others of its shape are auxiliary classifiers.  ``label_smoothing`` is the
    share of a label that goes to the other classes.
    """

    multi_label: bool = False
    label_smoothing: float = 0.0

    @property
    def metric(self) -> Metric:
        return Metric("mean_ap" if self.multi_label else "accuracy", "%")

    def loss(self, output: Any, targets: Tensor) -> Tensor:
        logits = main_logits(output).float()
        loss = self._loss(logits, targets)
        for other in output[1:] if isinstance(output, (tuple, list)) else ():
            if isinstance(other, Tensor) and other.shape == logits.shape:
                loss = loss + AUXILIARY_WEIGHT * self._loss(other.float(), targets)
        return loss

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        if not self.multi_label:
            if targets.dim() != 1:
                raise ValueError(
                    f"labels are class numbers (images,), these have the shape {tuple(targets.shape)}; for several classes an "
                    "image give Classification(multi_label=True), --task classification:multi_label=true"
                )
            return F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        soft = _as_map(targets, logits, self.name) * (1.0 - self.label_smoothing) + 0.5 * self.label_smoothing
        return F.binary_cross_entropy_with_logits(logits, soft)

    def test_loss(self, output: Any, targets: Tensor, images: int) -> Tensor:
        logits = main_logits(output).float()
        if self.multi_label:
            return F.binary_cross_entropy_with_logits(logits, _as_map(targets, logits, self.name)) * images
        return F.cross_entropy(logits, targets, reduction="sum")

    def follow(self, output: Any, teacher: Any, temperature: float) -> Tensor:
        logits, soft = main_logits(output).float(), main_logits(teacher).float()
        if not self.multi_label:
            return distillation(logits, soft, temperature)
        share = torch.sigmoid(soft / temperature)
        own, least = (F.binary_cross_entropy_with_logits(x / temperature, share) for x in (logits, soft))
        return (own - least) * temperature**2

    def hits(self, output: Any, targets: Tensor) -> Tensor | None:
        return None if self.multi_label else (main_logits(output).detach().argmax(1) == targets).sum()

    def meter(self) -> Meter:
        return AveragePrecision() if self.multi_label else Mean(_right)

    def smoothed(self, share: float) -> Classification:
        return replace(self, label_smoothing=share)


def _right(output: Any, targets: Tensor) -> Tensor:
    """100 where the largest logit is that of the class, else 0; whole numbers, so sums do not depend on the batch size."""
    return 100 * (main_logits(output).float().argmax(1) == targets)


def main_logits(output: Any, *, classes: int | None = None) -> Tensor:
    """The logits ``(n, classes)`` in what a classifier returns: itself, or the first of a tuple (the rest are
    auxiliary).

    Raises: ValueError for anything else.
    """
    logits = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(output).__name__}"
        raise ValueError(
            f"the model returns {found}, not logits (images, classes); without a task a network is taken for a classifier: "
            "give compress(task=...), for example Segmentation(classes=...)"
        )
    if classes is not None and logits.shape[1] != classes:
        raise ValueError(
            f"the model returns {logits.shape[1]} logits for an image, the data has {classes} classes; "
            "build the model for the data's classes"
        )
    return logits


def distillation(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2 * KL(softmax(teacher / T) || softmax(logits / T))``, mean over images; both are ``(n,
    classes)``."""
    student = F.log_softmax(logits / temperature, dim=1)
    target = F.log_softmax(teacher / temperature, dim=1)
    return F.kl_div(student, target, reduction="batchmean", log_target=True) * temperature**2


class Mean(Summed):
    """Mean over images of what ``each`` says of a batch, ``(n,)``."""

    kept = ("total", "images")

    def __init__(self, each: Callable[[Any, Any], Tensor]) -> None:
        self.each = each
        self.total: Tensor | float = 0.0
        self.images = 0

    def update(self, output: Any, targets: Any, /) -> None:
        found = self.each(output, targets)
        self.total = self.total + found.double().sum()
        self.images += len(found)

    def compute(self) -> float:
        return float(self.total) / self.images


class AveragePrecision(Summed):
    """Percent, mean over the classes that occur: of the precision at the rank of every image of the class."""

    kept = ("scores", "targets")

    def __init__(self) -> None:
        self.scores: list[Tensor] = []
        self.targets: list[Tensor] = []

    def update(self, output: Any, targets: Tensor, /) -> None:
        self.scores.append(main_logits(output).double().cpu())
        self.targets.append(targets.double().cpu())

    def compute(self) -> float:
        scores, targets = torch.cat(self.scores), torch.cat(self.targets)
        ranked = targets.gather(0, scores.argsort(dim=0, descending=True, stable=True))  # (images, classes)
        rank = torch.arange(1, len(ranked) + 1, dtype=ranked.dtype)[:, None]
        found = (ranked.cumsum(0) / rank * ranked).sum(0) / ranked.sum(0)
        if found.isnan().all():
            raise ValueError("mean_ap: no test image has a label")
        return 100.0 * float(found.nanmean())


# -- dense maps


@dataclass(frozen=True)
class Segmentation(Task):
    """One class per pixel, by cross-entropy, judged by mean IoU.

    The network returns logits ``(n, classes, h, w)``, alone or as ``out`` of a dictionary in which ``aux`` may be an auxiliary
    map, as torchvision's do; targets are class numbers ``(n, h, w)``.  Pixels of ``ignore_index`` count nowhere.  A teacher is
    followed pixel by pixel.
    """

    classes: int  # channels of the map
    ignore_index: int = 255
    label_smoothing: float = 0.0  # share of a label that goes to the other classes
    metric = Metric("mean_iou", "%")

    def loss(self, output: Any, targets: Tensor) -> Tensor:
        loss = self._loss(self._logits(output, targets), targets, self.label_smoothing)
        if isinstance(output, dict) and "aux" in output:
            loss = loss + AUXILIARY_MAP_WEIGHT * self._loss(output["aux"].float(), targets, self.label_smoothing)
        return loss

    def _loss(self, logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        """Mean over the pixels that count; 0 where there is none, which a plain mean would make NaN."""
        total = F.cross_entropy(
            logits, targets.long(), ignore_index=self.ignore_index, label_smoothing=smoothing, reduction="sum"
        )
        return total / (targets != self.ignore_index).sum().clamp_min(1)

    def _logits(self, output: Any, targets: Tensor) -> Tensor:
        logits = _main_map(output)
        if logits.dim() != 4 or logits.shape[1] != self.classes or logits.shape[2:] != targets.shape[1:]:
            raise ValueError(
                f"Segmentation(classes={self.classes}): logits are (n, {self.classes}, h, w) and targets (n, h, w); these are "
                f"{tuple(logits.shape)} and {tuple(targets.shape)}"
            )
        return logits.float()

    def test_loss(self, output: Any, targets: Tensor, images: int) -> Tensor:
        return self._loss(self._logits(output, targets), targets, 0.0) * images

    def follow(self, output: Any, teacher: Any, temperature: float) -> Tensor:
        own, soft = (_main_map(o).float().movedim(1, -1).flatten(0, 2) for o in (output, teacher))  # (pixels, classes)
        return distillation(own, soft, temperature)

    def meter(self) -> Meter:
        return MeanIoU(self)

    def smoothed(self, share: float) -> Segmentation:
        return replace(self, label_smoothing=share)


class MeanIoU(Summed):
    """Percent: intersection over union of every class over all pixels, mean over the classes that occur or are predicted."""

    kept = ("counts",)

    def __init__(self, task: Segmentation) -> None:
        self.task = task
        self.counts: Tensor | int = 0  # (true class, predicted class)

    def update(self, output: Any, targets: Tensor, /) -> None:
        classes = self.task.classes
        predicted = self.task._logits(output, targets).argmax(1)
        counted = targets != self.task.ignore_index
        true = targets[counted].long()
        if len(true) and not (int(true.min()) >= 0 and int(true.max()) < classes):
            raise ValueError(
                f"Segmentation(classes={classes}, ignore_index={self.task.ignore_index}): targets go from {int(true.min())} to "
                f"{int(true.max())}"
            )
        pairs = true * classes + predicted[counted]
        self.counts = self.counts + torch.bincount(pairs, minlength=classes**2).view(classes, classes)

    def compute(self) -> float:
        counts = torch.as_tensor(self.counts).double()
        if not counts.sum():
            raise ValueError("mean_iou: no pixel counts, all are of ignore_index")
        both = counts.diagonal()
        either = counts.sum(0) + counts.sum(1) - both
        return 100.0 * float((both[either > 0] / either[either > 0]).mean())


def _main_map(output: Any) -> Tensor:
    """What a network predicts: itself, ``out`` of a dictionary, or the first of a tuple."""
    if isinstance(output, dict) and "out" in output:
        output = output["out"]
    found = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(found, Tensor):
        raise ValueError(
            f"the model returns a {type(output).__name__}; a tensor, a tuple or a dictionary with 'out' is expected"
        )
    return found


# -- numbers


@dataclass(frozen=True)
class Regression(Task):
    """Numbers of any shape, by mean squared error, judged by mean absolute error.  A teacher's numbers are followed alike."""

    metric = Metric("mae", higher_is_better=False)

    def loss(self, output: Any, targets: Tensor) -> Tensor:
        found = _main_map(output).float()
        return F.mse_loss(found, _as_map(targets, found, self.name))

    def follow(self, output: Any, teacher: Any, temperature: float) -> Tensor:
        return F.mse_loss(_main_map(output).float(), _main_map(teacher).float())

    def meter(self) -> Meter:
        return Mean(self._error)

    def _error(self, output: Any, targets: Tensor) -> Tensor:
        found = _main_map(output).float()
        return (found - _as_map(targets, found, self.name)).abs().flatten(1).mean(1)


@dataclass(frozen=True)
class SuperResolution(Task):
    """Images from smaller or worse ones, by mean absolute error, judged by PSNR, the mean over images of
    ``10 log10(peak^2 / MSE)``.

    ``peak`` is the range of a pixel.  An image without any error counts as one of 100 dB.  A teacher's images are followed
    alike.
    """

    peak: float = 1.0
    metric = Metric("psnr", "dB")

    def loss(self, output: Any, targets: Tensor) -> Tensor:
        found = _main_map(output).float()
        return F.l1_loss(found, _as_map(targets, found, self.name))

    def follow(self, output: Any, teacher: Any, temperature: float) -> Tensor:
        return F.l1_loss(_main_map(output).float(), _main_map(teacher).float())

    def meter(self) -> Meter:
        return Mean(self._psnr)

    def _psnr(self, output: Any, targets: Tensor) -> Tensor:
        found = _main_map(output).float()
        error = (found - _as_map(targets, found, self.name)).square().flatten(1).mean(1) / self.peak**2
        return -10.0 * error.clamp_min(1e-10).log10()


def _as_map(targets: Tensor, found: Tensor, name: str) -> Tensor:
    """Targets as floats.  Raises: ValueError for another shape: (n,) and (n, 1) would broadcast to (n, n) unseen."""
    if targets.shape != found.shape:
        raise ValueError(
            f"{name}: the model returns {tuple(found.shape)}, the targets are {tuple(targets.shape)}; they have to be of "
            "one shape"
        )
    return targets.float()


# -- detection


@dataclass(frozen=True)
class Detection(Task):
    """Networks with torchvision's interface: in train mode ``model(images, targets)`` returns a dictionary of losses, in eval
    mode ``model(images)`` a list of dictionaries ``boxes``, ``scores``, ``labels``.

    Images are a list of ``(c, h, w)``, targets a list of dictionaries ``boxes`` (x1, y1, x2, y2) and ``labels``.  The loss is
    the sum of the losses.  Judged by COCO's mean average precision, which torchmetrics computes (extra ``detection``), or, if
    ``by_loss``, by the loss on test images.  A teacher is not followed: its boxes are not ours.
    """

    by_loss: bool = False

    @property
    def metric(self) -> Metric:
        return Metric("detection_loss", higher_is_better=False) if self.by_loss else Metric("mean_ap", "%")

    def split(self, batch: Any) -> tuple[Any, Any]:
        images, targets = super().split(batch)
        return list(images), list(targets)

    def forward(self, model: nn.Module, inputs: Any, targets: Any) -> Any:
        return model(inputs, targets)

    def quiet(self, model: nn.Module) -> None:
        for module in model.modules():  # losses are those of train mode, statistics and dropout those of eval mode
            module.training = not isinstance(module, (_BatchNorm, _DropoutNd))

    def predict(self, model: nn.Module, inputs: Any, targets: Any) -> Any:
        if not self.by_loss:
            return model(inputs)
        self.quiet(model)
        try:
            with torch.random.fork_rng():  # which boxes are counted is drawn
                torch.manual_seed(0)
                return model(inputs, targets)
        finally:
            model.eval()

    def loss(self, output: Any, targets: Any) -> Tensor:
        if not isinstance(output, dict) or not output:
            raise ValueError(
                f"Detection: in train mode model(images, targets) returns a dictionary of losses, not a {type(output).__name__}"
            )
        return torch.stack([loss.float() for loss in output.values()]).sum()

    def test_loss(self, output: Any, targets: Any, images: int) -> Tensor | None:
        return self.loss(output, targets) * images if self.by_loss else None

    def meter(self) -> Meter:
        if not self.by_loss:
            return _MeanAveragePrecision()
        return Mean(lambda output, targets: self.loss(output, targets).double().expand(len(targets)))


class _MeanAveragePrecision:
    """COCO's, in percent."""

    def __init__(self) -> None:
        try:
            import_torchvision()  # torchmetrics does, and stumbles where its build and torch's do not match
            from torchmetrics.detection import MeanAveragePrecision
        except (ImportError, RuntimeError) as error:
            raise ValueError(
                "Detection: mean average precision needs torchmetrics and pycocotools, which come with the extra 'detection' "
                f"(pip install '.[detection]' in a clone of Espalier); Detection(by_loss=True) needs neither: {error}"
            ) from error
        # several processes all judge all images: what is on the host cannot be sent between GPUs
        self.metric = MeanAveragePrecision(box_format="xyxy", sync_on_compute=False)

    def update(self, output: Any, targets: Any, /) -> None:
        self.metric.update(to_device(output, "cpu"), to_device(targets, "cpu"))

    def compute(self) -> float:
        return 100.0 * max(float(self.metric.compute()["map"]), 0.0)  # -1 where there is nothing to find
