"""Eight bits after compression: ONNX Runtime's static quantisation, judged against the float network before it is kept."""

from __future__ import annotations

import io
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from espalier.optional import import_optional
from espalier.run.measure import Timing, latency
from espalier.run.onnx import check_place, onnx_session, to_onnx_bytes
from espalier.run.rundir import write_file

Batch = tuple[Tensor, Tensor]


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
) -> Quantised:
    """Write ``model`` as an ONNX file whose convolutions and matrix products compute in eight bits.

    Static quantisation by ONNX Runtime (QDQ; weights per channel and symmetric, activations per tensor by their extremes on
    ``calibration``, a few batches of images as the network gets them).  ``test`` are batches of images and labels that accuracy
    is compared on.  Nothing is written if more than ``most_lost`` points are lost.

    Raises: ValueError if the accuracy falls by more than ``most_lost``, a batch is missing, or the network cannot be exported;
    MissingPackage without the extra ``onnx``.
    """
    target = Path(path)
    check_place(target)
    images = [x.detach().cpu().numpy() for x, _ in calibration]
    judged = [(x.detach().cpu().numpy(), y.cpu().numpy()) for x, y in test]
    if not images or not judged:
        raise ValueError("export_int8: give at least one batch to calibrate with and one to test with")
    example = next(iter(images))[:1]
    plain = to_onnx_bytes(model, torch.from_numpy(example))
    small = quantised(plain, images)
    before, after = _accuracy(plain, judged), _accuracy(small, judged)
    if before - after > most_lost:
        raise ValueError(
            f"{target}: was not written: in eight bits the accuracy falls from {before:.2f} to {after:.2f} %, by more than "
            f"{most_lost:g} points; calibrate with more images, or allow more"
        )
    with tempfile.TemporaryDirectory() as folder:
        files = {"float": Path(folder) / "float.onnx", "int8": Path(folder) / "int8.onnx"}
        files["float"].write_bytes(plain)
        files["int8"].write_bytes(small)
        timings = latency(files, torch.from_numpy(example), backend="onnxruntime", batch_sizes=batch_sizes)
    write_file(target, small)
    return Quantised(target, before, after, tuple(timings))


def quantised(content: bytes, images: Sequence[np.ndarray]) -> bytes:
    """An ONNX file in float as one in eight bits, calibrated on ``images``, arrays as its first input takes them."""
    quantization = import_optional("onnxruntime.quantization", extra="onnx")
    shape_inference = import_optional("onnxruntime.quantization.shape_inference", extra="onnx")
    name = onnx_session(content).get_inputs()[0].name

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.batches: Iterator[np.ndarray] = iter(images)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {name: batch}

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, ready, small = (Path(folder) / f"{stage}.onnx" for stage in ("plain", "ready", "small"))
        plain.write_bytes(content)
        nowhere = io.StringIO()
        with redirect_stdout(nowhere), redirect_stderr(nowhere):  # they print advice
            shape_inference.quant_pre_process(str(plain), str(ready), skip_symbolic_shape=True)
            quantization.quantize_static(
                str(ready),
                str(small),
                Reader(),
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
                weight_type=quantization.QuantType.QInt8,
                activation_type=quantization.QuantType.QUInt8,
            )
        return small.read_bytes()


def _accuracy(content: bytes, batches: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """Top-1 in per cent."""
    session = onnx_session(content)
    name = session.get_inputs()[0].name
    right = sum(int((session.run(None, {name: x})[0].argmax(1) == y).sum()) for x, y in batches)
    return 100.0 * right / sum(len(y) for _, y in batches)
