"""What a network really costs: time and bytes, measured side by side so that ratios mean something."""

from __future__ import annotations

import io
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from espalier.copies import copy_model
from espalier.optional import import_optional
from espalier.run.evaluate import thread_count
from espalier.run.onnx import feeds, onnx_session, positional, read_onnx, resized, to_onnx_bytes
from espalier.surgery.files import save

WARM_UP = 3  # calls of every model before the clock counts
LONGEST = 1.0  # seconds; a slower call is warm after one
SHORTEST = 2e-3  # seconds; faster calls are timed several at once


@dataclass(frozen=True)
class Timing:
    """The time of one forward of one model."""

    name: str
    backend: str
    batch: int
    threads: int
    milliseconds: float  # of the fastest round
    speedup: float  # over the first model, at the same batch size
    spread: float = 1.0  # the median round over the fastest; far above 1 other work was in the way


LANES = 4  # channels that ONNX Runtime's depthwise convolution takes at a time


def depthwise(model: nn.Module) -> dict[str, _ConvNd]:
    """Convolutions of ``model`` that filter every channel by itself."""
    return {n: m for n, m in model.named_modules() if isinstance(m, _ConvNd) and m.groups == m.in_channels > 1}


def slow_widths(model: nn.Module) -> list[str]:
    """Depthwise convolutions that ONNX Runtime computes channel by channel, because of their number of channels.

    The whole block around such a layer then takes about twice as long, and more on large batches
    (``benchmarks/results/alignment.json``).
    """
    return [n for n, m in depthwise(model).items() if m.in_channels % LANES]


def ms_said(milliseconds: float) -> str:
    """Three digits, or all before the point.

    >>> ms_said(0.73712), ms_said(3104.2)
    ('0.737', '3,104')
    """
    return f"{milliseconds:.3g}" if milliseconds < 1000 else f"{milliseconds:,.0f}"


Model = nn.Module | str | os.PathLike[str]
"""A network, or the path of an ONNX file, which "onnxruntime" times as it is."""


def latency(
    models: Model | Mapping[str, Model],
    example: Any = None,
    *,
    backend: str = "torch",
    batch_sizes: Sequence[int] = (1, 64),
    repeats: int = 30,
    threads: int = 1,
    seconds: float = 5.0,
) -> list[Timing]:
    """Time the forward of all ``models`` in one run, in turns, and compare each with the first.

    In turns, because a machine's speed drifts: every round times every model once, and the fastest rounds are compared.  What
    else a machine does only adds time, and on a busy one medians mean nothing: for one and the same network, 0.07 and 0.23 ms
    were seen.  ``backend`` is "torch" (where ``example`` is; eval mode), "onnxruntime" or "openvino" (CPU, float32).  Each of
    ``batch_sizes``, in images, takes ``repeats`` rounds, or fewer (at least 3) once ``seconds`` have passed; the runtime has
    ``threads``.  ``example`` is a tensor or a tuple of tensors, batch first; it is repeated to the batch sizes, and may be
    left out where all ``models`` are files.  One model without a name is called "model".

    Raises: ValueError for an unknown backend, numbers below 1 or a file that is no ONNX; MissingPackage without the backend's
    extra.

    >>> import torch, espalier as es
    >>> [timing] = es.latency(torch.nn.Linear(8, 4), torch.zeros(1, 8), batch_sizes=(1,), repeats=3)
    >>> (timing.name, timing.batch, timing.milliseconds > 0)
    ('model', 1, True)
    """
    if backend not in _BACKENDS:
        raise ValueError(f"latency(backend={backend!r}): choose one of {', '.join(_BACKENDS)}")
    numbers = {"repeats": repeats, "threads": threads, "batch_sizes": min(batch_sizes, default=0)}
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"latency({name}): must be 1 or more")
    named = dict(models) if isinstance(models, Mapping) else {"model": models}
    if not named:
        raise ValueError("latency: there is no model to time")
    found = []
    with thread_count(threads):
        makers = {name: _BACKENDS[backend](model, example, threads) for name, model in named.items()}
        for batch in batch_sizes:
            rounds = _race({name: make(batch) for name, make in makers.items()}, repeats, seconds)
            fastest = {name: min(times) for name, times in rounds.items()}
            first = next(iter(fastest.values()))
            found += [
                Timing(name, backend, batch, threads, 1e3 * t, first / t, median(rounds[name]) / t)
                for name, t in fastest.items()
            ]
    return found


def size_on_disk(model: nn.Module) -> int:
    """Bytes of the file that ``es.save`` writes: weights and structure."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save(model, path)
        return path.stat().st_size


Call = Callable[[], Any]


def _race(calls: dict[str, Call], repeats: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of one call in every round, by name."""
    loops = {}
    for name, call in calls.items():
        for _ in range(WARM_UP):
            took = _time(call, 1)
            if took > LONGEST:
                break
        loops[name] = max(1, math.ceil(SHORTEST / max(took, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for done in range(repeats):
        if done >= 3 and time.perf_counter() - begin > seconds:
            break
        for name, call in calls.items():
            times[name].append(_time(call, loops[name]))
    return times


def _time(call: Call, loops: int) -> float:
    begin = time.perf_counter()
    for _ in range(loops):
        call()
    return (time.perf_counter() - begin) / loops


Maker = Callable[[int], Call]  # from a batch size to what is timed


def _torch_maker(model: Model, example: Any, threads: int) -> Maker:
    if not isinstance(model, nn.Module):
        raise ValueError(f"{os.fspath(model)}: PyTorch does not run files of ONNX; time it in onnxruntime or openvino")
    args: tuple[Tensor, ...] = tuple(example) if isinstance(example, (tuple, list)) else (example,)
    if not all(isinstance(a, Tensor) for a in args):
        raise ValueError("latency: give an example input, a tensor or a tuple of tensors, batch first")
    device = args[0].device
    private = copy_model(model, {}).to(device).eval()

    def make(batch: int) -> Call:
        inputs = resized(args, batch)

        def call() -> None:
            with torch.inference_mode():
                private(*inputs)
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return call

    return make


def _onnx_maker(model: Model, example: Any, threads: int) -> Maker:
    session = onnx_session(_onnx_content(model, example), threads=threads)
    args = _zeros(session.get_inputs()) if example is None else positional(example)

    def make(batch: int) -> Call:
        inputs = feeds(session, resized(args, batch))
        return lambda: session.run(None, inputs)

    return make


def _openvino_maker(model: Model, example: Any, threads: int) -> Maker:
    openvino = import_optional("openvino", extra="openvino")
    content = _onnx_content(model, example)
    args = _zeros(onnx_session(content).get_inputs()) if example is None else positional(example)
    # The default precision is bf16 where the processor has it: another network than the one that is timed elsewhere.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    core = openvino.Core()

    def make(batch: int) -> Call:
        inputs = [a.numpy() for a in resized(args, batch)]
        plain = core.read_model(io.BytesIO(content))
        plain.reshape({port: list(a.shape) for port, a in zip(plain.inputs, inputs, strict=True)})
        request = core.compile_model(plain, "CPU", settings).create_infer_request()
        return lambda: request.infer(inputs, share_inputs=True, share_outputs=True)

    return make


def _onnx_content(model: Model, example: Any) -> bytes:
    if isinstance(model, nn.Module):
        if example is None:
            raise ValueError("latency: give an example input, a tensor or a tuple of tensors, batch first")
        return to_onnx_bytes(model, example)
    return read_onnx(Path(model))


def _zeros(inputs: Sequence[Any]) -> tuple[Tensor, ...]:
    """An input of the shape that a file asks for; what it leaves open is 1, but sizes of images, of which nothing is known."""
    found = []
    for port in inputs:
        sizes = [n if isinstance(n, int) else 1 if place == 0 else None for place, n in enumerate(port.shape)]
        if None in sizes:
            raise ValueError(
                f"latency: the file leaves the shape of {port.name!r} open, {port.shape}: give an example input "
                "(on the command line --input 1,3,224,224)"
            )
        found.append(torch.zeros([int(n or 1) for n in sizes], dtype=_ONNX_TYPES[port.type]))
    return tuple(found)


_ONNX_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(uint8)": torch.uint8,
    "tensor(bool)": torch.bool,
}

_BACKENDS: dict[str, Callable[[Model, Any, int], Maker]] = {
    "torch": _torch_maker,
    "onnxruntime": _onnx_maker,
    "openvino": _openvino_maker,
}
