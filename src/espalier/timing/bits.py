"""Files in eight bits: what ``export_int8`` ships is what a profile of int8 times."""

from __future__ import annotations

import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from espalier.optional import import_optional
from espalier.timing.profile import ProfileSetting

PRECISIONS = {"onnxruntime": ("f32", "int8"), "openvino": ("f32", "bf16", "f16", "int8"), "torch": ("f32",)}
"""What a runtime is profiled in."""


def check_precision(runtime: str, precision: str) -> None:
    """Raises: ValueError for a precision that is not profiled in ``runtime``."""
    if precision not in PRECISIONS[runtime]:
        raise ValueError(f"profile(precision={precision!r}): in {runtime} choose {', '.join(PRECISIONS[runtime])}")


def in_precision(content: bytes, own: ProfileSetting | None, inputs: Sequence[np.ndarray]) -> bytes:
    """An ONNX file in float as it is timed: int8 is another file, other precisions are the runtime's own."""
    return quantised(content, [inputs], runtime=own.runtime) if own and own.precision == "int8" else content


def quantised(content: bytes, batches: Sequence[Sequence[np.ndarray]], *, runtime: str = "onnxruntime") -> bytes:
    """An ONNX file in float as one in eight bits for ``runtime``, calibrated on ``batches``, each an array for every input.

    Both are QDQ, weights per channel and symmetric.  For ONNX Runtime by its static quantisation, activations per tensor by
    their extremes, weights within 7 bits (``reduce_range`` in its documentation): AVX2 adds two products in 16 bits, and
    255 * 64 * 2 is below 2**15, so that a file loses as little on processors without instructions for eight bits.  For
    OpenVINO by NNCF's, which places what OpenVINO fuses and corrects biases.

    Raises: ValueError for another runtime; MissingPackage without the extra of the runtime.
    """
    if runtime not in QUANTISERS:
        raise ValueError(f"eight bits for runtime {runtime!r}: choose {' or '.join(QUANTISERS)}")
    onnx = import_optional("onnx", extra="onnx")
    proto = onnx.load_model_from_string(content)
    names = [i.name for i in proto.graph.input]
    return QUANTISERS[runtime](proto, [dict(zip(names, batch, strict=True)) for batch in batches])


Feeds = Sequence[dict[str, np.ndarray]]


def _by_nncf(proto: Any, batches: Feeds) -> bytes:
    nncf = import_optional("nncf", extra="nncf")
    log = logging.getLogger("nncf")
    level = log.level
    try:
        log.setLevel(logging.ERROR)
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # bars of progress
            found = nncf.quantize(proto, nncf.Dataset(batches), subset_size=len(batches))
    finally:
        log.setLevel(level)
    return bytes(found.SerializeToString())


def _by_onnxruntime(proto: Any, batches: Feeds) -> bytes:
    quantization = import_optional("onnxruntime.quantization", extra="onnx")
    shape_inference = import_optional("onnxruntime.quantization.shape_inference", extra="onnx")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.batches = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, ready, small = (Path(folder) / f"{stage}.onnx" for stage in ("plain", "ready", "small"))
        plain.write_bytes(proto.SerializeToString())
        nowhere = io.StringIO()
        with redirect_stdout(nowhere), redirect_stderr(nowhere):  # they print advice
            shape_inference.quant_pre_process(str(plain), str(ready), skip_symbolic_shape=True)
            quantization.quantize_static(
                str(ready),
                str(small),
                Reader(),
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
                reduce_range=True,
                weight_type=quantization.QuantType.QInt8,
                activation_type=quantization.QuantType.QUInt8,
            )
        return small.read_bytes()


QUANTISERS: dict[str, Callable[[Any, Feeds], bytes]] = {"onnxruntime": _by_onnxruntime, "openvino": _by_nncf}
