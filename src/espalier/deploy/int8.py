"""Eight bits after compression: static quantisation, judged against the float network before it is kept."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from espalier.methods.scoring import modes_kept
from espalier.optional import import_optional
from espalier.run.evaluate import evaluate
from espalier.run.latency import Timing, latency
from espalier.run.onnx import onnx_session, to_onnx_bytes
from espalier.run.rundir import write_file
from espalier.surgery.writing import check_place
from espalier.tasks import Metric, Task, need_task
from espalier.timing.bits import quantised


@dataclass(frozen=True)
class Quantised:
    """A network in eight bits beside the same in float, on the same images: ``metric`` and ``float_metric`` are what
    ``judged_by`` names, in its unit (top-1 accuracy in per cent, unless another task was given)."""

    path: Path
    float_metric: float
    metric: float
    judged_by: Metric
    timings: tuple[Timing, ...]  # "float" and "int8" in turns, one thread

    @property
    def lost(self) -> float:
        """What eight bits cost, in the unit of the metric; below 0 where they gained."""
        return _lost(self.judged_by, self.float_metric, self.metric)


def export_int8(
    model: nn.Module,
    path: str | os.PathLike[str],
    calibration: Iterable[Any],
    test: Iterable[Any],
    *,
    most_lost: float | None = None,
    batch_sizes: Sequence[int] = (1,),
    runtime: str = "onnxruntime",
    task: Task | None = None,
) -> Quantised:
    """Write ``model`` as an ONNX file whose convolutions and matrix products compute in eight bits.

    Static quantisation (QDQ; weights per channel and symmetric, activations by what they are on ``calibration``, a few batches
    of images as the network gets them): by ONNX Runtime, or for ``runtime="openvino"`` by NNCF.  ``test`` are batches that
    float and eight bits are judged on in that runtime, as ``task`` judges (default: top-1 accuracy of images and labels), and
    ``batch_sizes`` those at which both files are timed.  Nothing is written if more than ``most_lost`` is lost: points of a
    metric in per cent (default: 1), else an amount in its unit (default: a twentieth of what float has).

    Raises: ValueError if more is lost than ``most_lost``, a batch is missing, the network takes more than one tensor, or it
    cannot be exported; MissingPackage without the extra ``onnx``, or ``openvino`` and ``nncf``.
    """
    target = Path(path)
    check_place(target)
    task = need_task(task)
    images = [task.split(batch)[0] for batch in calibration]
    judged = list(test)
    if not images or not judged:
        raise ValueError("export_int8: give at least one batch to calibrate with and one to test with")
    if odd := [x for x in images if not isinstance(x, Tensor)]:
        raise ValueError(f"export_int8: a batch's inputs are one tensor, these are a {type(odd[0]).__name__}")
    example = images[0][:1].detach().cpu()
    plain = to_onnx_bytes(model, example)
    small = quantised(plain, [(x.detach().cpu().numpy(),) for x in images], runtime=runtime)
    form = _form_of_output(model, images[0][:1])
    before, after = (
        evaluate(_Opened(READERS[runtime](content), form), judged, device="cpu", task=task)[task.metric.name]
        for content in (plain, small)
    )
    if most_lost is None:
        most_lost = 1.0 if task.metric.unit == "%" else abs(before) / 20
    if not _lost(task.metric, before, after) <= most_lost:
        unit = "points" if task.metric.unit == "%" else f"{task.metric.unit}".strip()
        raise ValueError(
            f"{target}: was not written: in eight bits the {task.metric.words} goes from {before:.4g} to {after:.4g}, by more "
            f"than {most_lost:.3g}{f' {unit}' if unit else ''}; calibrate with more images, or allow more (most_lost, "
            "--most-lost)"
        )
    with tempfile.TemporaryDirectory() as folder:
        files = {"float": Path(folder) / "float.onnx", "int8": Path(folder) / "int8.onnx"}
        files["float"].write_bytes(plain)
        files["int8"].write_bytes(small)
        timings = latency(files, example, backend=runtime, batch_sizes=batch_sizes)
    write_file(target, small)
    return Quantised(target, before, after, task.metric, tuple(timings))


def _lost(metric: Metric, before: float, after: float) -> float:
    return before - after if metric.higher_is_better else after - before


Answers = Callable[[np.ndarray], list[np.ndarray]]
Reader = Callable[[bytes], Answers]


def _in_onnxruntime(content: bytes) -> Answers:
    session = onnx_session(content)
    name = session.get_inputs()[0].name
    return lambda x: [np.asarray(output) for output in session.run(None, {name: x})]


def _in_openvino(content: bytes) -> Answers:
    core = import_optional("openvino", extra="openvino").Core()
    network = core.compile_model(core.read_model(io.BytesIO(content)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: [np.asarray(output) for output in network(x).to_tuple()]


READERS: dict[str, Reader] = {"onnxruntime": _in_onnxruntime, "openvino": _in_openvino}


def _form_of_output(model: nn.Module, example: Tensor) -> Any:
    """What the network returns, without its tensors: files give them in a row."""
    with modes_kept(model), torch.no_grad():
        return tree_flatten(model.eval()(example))[1]


class _Opened(nn.Module):
    """A file as a network that a task can judge."""

    def __init__(self, answers: Answers, form: Any) -> None:
        super().__init__()
        self.answers, self.form = answers, form

    def forward(self, x: Tensor) -> Any:
        return tree_unflatten([torch.from_numpy(output) for output in self.answers(x.numpy())], self.form)
