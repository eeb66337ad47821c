"""ONNX export that proves itself: what ONNX Runtime computes is compared with what PyTorch computes."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espalier.graph.watch import first_line, tensors_in
from espalier.run.optional import import_optional
from espalier.run.rundir import write_file


def export_onnx(model: nn.Module, path: str | os.PathLike[str], example: Any, *, tolerance: float = 1e-4) -> float:
    """Write ``model`` as ONNX with a free batch size, and return the largest difference from PyTorch.

    The difference is relative to the largest output, taken over the example and random inputs at batch sizes
    1 and 3. Nothing is written unless it is within ``tolerance``.  ``example`` is what ``trace`` takes.

    Raises: ValueError if ``path`` cannot be written, no exporter can translate the model, or ONNX Runtime computes
    something else; MissingPackage if the extra ``onnx`` is not installed.
    """
    _check_place(Path(path))
    content, difference = exported(model, example)
    if not difference <= tolerance:  # NaN is not within it either
        raise ValueError(
            f"ONNX Runtime's outputs differ from PyTorch's by {difference:.2g}, more than {tolerance:g}; "
            f"{path} was not written"
        )
    write_file(Path(path), content)
    return difference


def _check_place(path: Path) -> None:
    """An export takes long; that its file cannot be written is said before."""
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; give the name of a file")
    folder = next(p for p in path.absolute().parents if p.exists())  # those below it will be made
    if not folder.is_dir():
        raise ValueError(f"{path}: {folder} is a file, not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{path}: the folder {folder} may not be written; choose another")


def to_onnx_bytes(model: nn.Module, example: Any) -> bytes:
    """The model in eval mode as an ONNX file, batch size free where the exporter can leave it free.

    Raises: ValueError if no exporter can translate the model; MissingPackage without the extra ``onnx``.
    """
    return exported(model, example)[0]


def exported(model: nn.Module, example: Any) -> tuple[bytes, float]:
    """The ONNX file and its largest difference from PyTorch, from the first exporter whose file runs."""
    import_optional("onnx", extra="onnx")
    import_optional("onnxruntime", extra="onnx")
    private = copy.deepcopy(model).cpu().eval()
    args = positional(example)
    problems = []
    for name, export, free in _ATTEMPTS:
        try:
            with _quiet():
                content = export(private, resized(args, 2) if free else args, free)
            return content, _difference(private, content, args, (1, 3) if free else (None,))
        except Exception as error:  # every exporter fails in its own way; the next one may not
            problems.append(f"{name}: {_COLOUR.sub('', first_line(error))}")
    raise ValueError(f"the model cannot be exported to ONNX; {'; '.join(problems)}")


_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def onnx_session(content: bytes, *, threads: int = 1) -> Any:
    """An ONNX Runtime session on the CPU."""
    runtime = import_optional("onnxruntime", extra="onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def feeds(session: Any, args: tuple[Tensor, ...]) -> dict[str, Any]:
    """Inputs by name, as the session wants them."""
    return {i.name: t.numpy() for i, t in zip(session.get_inputs(), args, strict=True)}


def positional(example: Any) -> tuple[Tensor, ...]:
    """The example's tensors on the CPU.  Raises: ValueError for keyword arguments, which ONNX has no place
    for."""
    args = example if isinstance(example, (tuple, list)) else (example,)
    if not args or not all(isinstance(a, Tensor) for a in args):
        raise ValueError("ONNX export takes a tensor or a tuple of tensors as example")
    return tuple(a.detach().cpu() for a in args)


def resized(args: tuple[Tensor, ...], batch: int) -> tuple[Tensor, ...]:
    """The same inputs with another batch size: the first dimension, repeated or cut."""
    return tuple(a.repeat(-(-batch // len(a)), *[1] * (a.dim() - 1))[:batch].contiguous() for a in args)


def _difference(model: nn.Module, content: bytes, args: tuple[Tensor, ...], batches: tuple[int | None, ...]) -> float:
    session = onnx_session(content)
    random = torch.Generator().manual_seed(0)
    worst = 0.0
    for batch in batches:
        given = args if batch is None else resized(args, batch)
        noise = tuple(torch.randn(a.shape, generator=random).to(a.dtype) if a.is_floating_point() else a for a in given)
        for inputs in (given, noise):
            with torch.no_grad():
                ours = list(tensors_in(model(*inputs)))
            theirs = [torch.from_numpy(o) for o in session.run(None, feeds(session, inputs))]
            if [t.shape for t in ours] != [t.shape for t in theirs]:
                raise ValueError("ONNX Runtime returns other shapes than PyTorch")
            for a, b in zip(ours, theirs, strict=True):
                found = _relative(a.double(), b.double()) if a.numel() else 0.0
                worst = found if found != found else max(worst, found)
    return worst


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / ours.abs().max().clamp_min(torch.finfo(ours.dtype).tiny))


# -- exporters


def _by_export(model: nn.Module, args: tuple[Tensor, ...], free: bool) -> bytes:
    import_optional("onnxscript", extra="onnx")
    batch = torch.export.Dim("batch")
    shapes = tuple({0: batch} for _ in args) if free else None
    names = _names(args)
    program = torch.onnx.export(model, args, dynamo=True, dynamic_shapes=shapes, verbose=False, input_names=names)
    if program is None:
        raise RuntimeError("nothing was returned")
    return program.model_proto.SerializeToString()


def _by_tracing(model: nn.Module, args: tuple[Tensor, ...], free: bool) -> bytes:
    file = io.BytesIO()
    names = _names(args)
    axes = {name: {0: "batch"} for name in names} if free else None
    torch.onnx.export(model, args, file, dynamo=False, input_names=names, dynamic_axes=axes)  # type: ignore[arg-type]
    return file.getvalue()


def _names(args: tuple[Tensor, ...]) -> list[str]:
    return ["input"] if len(args) == 1 else [f"input{number}" for number in range(len(args))]


_Export = Callable[[nn.Module, tuple[Tensor, ...], bool], bytes]

# The older exporter translates some networks that the newer does not; PyTorch will drop it.
_ATTEMPTS: tuple[tuple[str, _Export, bool], ...] = (
    ("torch.export", _by_export, True),
    ("tracing", _by_tracing, True),
    ("torch.export with a fixed batch", _by_export, False),
    ("tracing with a fixed batch", _by_tracing, False),
)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters write progress and advice to every channel there is."""
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    nowhere = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
