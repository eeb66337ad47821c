"""Eight bits after compression: static quantisation, judged against the float network before it is kept."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from espalier.methods.scoring import Batch
from espalier.optional import import_optional
from espalier.run.latency import Timing, latency
from espalier.run.onnx import check_place, onnx_session, to_onnx_bytes
from espalier.run.rundir import write_file
from espalier.timing.bits import quantised


@dataclass(frozen=True)
class Quantised:
    """A network in eight bits beside the same in float.  Accuracies in per cent on the same images."""

    path: Path
    float_accuracy: float
    accuracy: float
    timings: tuple[Timing, ...]  # "float" and "int8" in turns, one thread

    @property
    def lost(self) -> float:
        """Points of accuracy that eight bits cost; below 0 where they gained."""
        return self.float_accuracy - self.accuracy


def export_int8(
    model: nn.Module,
    path: str | os.PathLike[str],
    calibration: Iterable[Batch],
    test: Iterable[Batch],
    *,
    most_lost: float = 1.0,
    batch_sizes: Sequence[int] = (1,),
    runtime: str = "onnxruntime",
) -> Quantised:
    """Write ``model`` as an ONNX file whose convolutions and matrix products compute in eight bits.

    Static quantisation (QDQ; weights per channel and symmetric, activations by what they are on ``calibration``, a few batches
    of images as the network gets them): by ONNX Runtime, or for ``runtime="openvino"`` by NNCF.  ``test`` are batches of images
    and labels that accuracy is compared on, in that runtime, and ``batch_sizes`` those at which both files are timed.
    Nothing is written if more than ``most_lost`` points are lost.

    Raises: ValueError if the accuracy falls by more than ``most_lost``, a batch is missing, or the network cannot be exported;
    MissingPackage without the extra ``onnx``, or ``openvino`` and ``nncf``.
    """
    target = Path(path)
    check_place(target)
    images = [x.detach().cpu().numpy() for x, _ in calibration]
    judged = [(x.detach().cpu().numpy(), y.cpu().numpy()) for x, y in test]
    if not images or not judged:
        raise ValueError("export_int8: give at least one batch to calibrate with and one to test with")
    example = next(iter(images))[:1]
    plain = to_onnx_bytes(model, torch.from_numpy(example))
    small = quantised(plain, [(x,) for x in images], runtime=runtime)
    before, after = (_accuracy(READERS[runtime](content), judged) for content in (plain, small))
    if before - after > most_lost:
        raise ValueError(
            f"{target}: was not written: in eight bits the accuracy falls from {before:.2f} to {after:.2f} %, by more than "
            f"{most_lost:g} points; calibrate with more images, or allow more"
        )
    with tempfile.TemporaryDirectory() as folder:
        files = {"float": Path(folder) / "float.onnx", "int8": Path(folder) / "int8.onnx"}
        files["float"].write_bytes(plain)
        files["int8"].write_bytes(small)
        timings = latency(files, torch.from_numpy(example), backend=runtime, batch_sizes=batch_sizes)
    write_file(target, small)
    return Quantised(target, before, after, tuple(timings))


Reader = Callable[[bytes], Callable[[np.ndarray], np.ndarray]]


def _in_onnxruntime(content: bytes) -> Callable[[np.ndarray], np.ndarray]:
    session = onnx_session(content)
    name = session.get_inputs()[0].name
    return lambda x: np.asarray(session.run(None, {name: x})[0])


def _in_openvino(content: bytes) -> Callable[[np.ndarray], np.ndarray]:
    core = import_optional("openvino", extra="openvino").Core()
    network = core.compile_model(core.read_model(io.BytesIO(content)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: np.asarray(network(x)[0])


READERS: dict[str, Reader] = {"onnxruntime": _in_onnxruntime, "openvino": _in_openvino}


def _accuracy(answers: Callable[[np.ndarray], np.ndarray], batches: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """Top-1 in per cent."""
    right = sum(int((answers(x).argmax(1) == y).sum()) for x, y in batches)
    return 100.0 * right / sum(len(y) for _, y in batches)
