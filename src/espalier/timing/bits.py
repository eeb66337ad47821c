"""Files in eight bits: what ``export_int8`` ships is what a profile of int8 times."""

from __future__ import annotations

import io
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from espalier.optional import import_optional

PRECISIONS = {"onnxruntime": ("f32", "int8"), "openvino": ("f32", "bf16", "f16")}
"""What a runtime is profiled in."""


def check_precision(runtime: str, precision: str) -> None:
    """Raises: ValueError for a precision that is not profiled in ``runtime``."""
    if precision not in PRECISIONS[runtime]:
        raise ValueError(f"profile(precision={precision!r}): in {runtime} choose {', '.join(PRECISIONS[runtime])}")


def in_precision(content: bytes, precision: str, inputs: Sequence[np.ndarray]) -> bytes:
    """An ONNX file in float as it is timed: int8 is another file, other precisions are the runtime's own."""
    return quantised(content, [inputs]) if precision == "int8" else content


def quantised(content: bytes, batches: Sequence[Sequence[np.ndarray]]) -> bytes:
    """An ONNX file in float as one in eight bits, calibrated on ``batches``, each an array for every input.

    ONNX Runtime's static quantisation: QDQ, weights per channel and symmetric, activations per tensor by their extremes.
    """
    onnx = import_optional("onnx", extra="onnx")
    quantization = import_optional("onnxruntime.quantization", extra="onnx")
    shape_inference = import_optional("onnxruntime.quantization.shape_inference", extra="onnx")
    graph = onnx.load_model_from_string(content).graph
    names = [i.name for i in graph.input]

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.batches: Iterator[Sequence[np.ndarray]] = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else dict(zip(names, batch, strict=True))

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
