"""Files of PyTorch that need nothing of ours: ``torch.export`` programs and TorchScript, proven equal to the network."""

from __future__ import annotations

import copy
import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espalier.graph.watch import first_line
from espalier.run.onnx import difference, positional, resized
from espalier.run.rundir import write_file
from espalier.surgery.writing import check_place


def export_torch(model: nn.Module, path: str | os.PathLike[str], example: Any, *, tolerance: float = 1e-5) -> float:
    """Write ``model`` in eval mode as a file that PyTorch alone can run; return the largest relative difference from it.

    The ending of ``path`` says which: ``.pt2`` is a program of ``torch.export`` (``torch.export.load(path).module()``), batch
    size free where the network leaves it free; ``.pt`` or ``.ts`` is TorchScript (``torch.jit.load(path)``), scripted where
    PyTorch can script the network and else traced.  ``example`` is a tensor or a tuple of tensors, batch first.  What is to be
    written is loaded again and compared on the example and on random inputs; nothing is written that is not within
    ``tolerance``, relative to the largest output.

    Raises: ValueError for another ending, a path that cannot be written, or a network that PyTorch cannot export.

    >>> import tempfile, torch, espalier as es
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     es.export_torch(torch.nn.Linear(8, 4), f"{folder}/model.pt2", torch.zeros(1, 8)) < 1e-6
    True
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(
            "export_torch: the second argument is the file to write: export_torch(model, 'model.pt2', example)"
        )
    target = Path(path)
    if target.suffix not in _WRITERS:
        raise ValueError(
            f"{target}: the ending says what is written; end it in .onnx (es.export_onnx, espalier export), "
            ".pt2 (torch.export), or .pt or .ts (TorchScript)"
        )
    check_place(target)
    private = copy.deepcopy(model).cpu().eval()
    args = positional(example)
    problems = []
    for name, write in _WRITERS[target.suffix]:
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                content, run = write(private, args)
                apart = difference(private, run, [args])
        except Exception as error:  # PyTorch's exporters fail in ways of their own; the next one may not
            problems.append(f"{name}: {first_line(error)}")
            continue
        if apart <= tolerance:
            write_file(target, content)
            return apart
        problems.append(f"{name}: differs from the network by {apart:.2g}, more than {tolerance:g}")
    raise ValueError(f"{target}: was not written; {'; '.join(problems)}")


Written = tuple[bytes, Callable[..., Any]]


def _program(model: nn.Module, args: tuple[Tensor, ...], *, free: bool) -> Written:
    batch = torch.export.Dim("batch")
    given = resized(args, 2) if free else args  # a batch of one would be taken for a constant
    shapes = tuple({0: batch} for _ in args) if free else None
    program = torch.export.export(model, given, dynamic_shapes=shapes)
    file = io.BytesIO()
    torch.export.save(program, file)
    content = file.getvalue()
    return content, torch.export.load(io.BytesIO(content)).module()


def _script(model: nn.Module, args: tuple[Tensor, ...]) -> Written:
    return _torchscript(torch.jit.script(model))


def _trace(model: nn.Module, args: tuple[Tensor, ...]) -> Written:
    return _torchscript(torch.jit.trace(model, args, check_trace=False))


def _torchscript(made: Any) -> Written:
    file = io.BytesIO()
    torch.jit.save(made, file)
    content = file.getvalue()
    return content, torch.jit.load(io.BytesIO(content))


Writer = Callable[[nn.Module, tuple[Tensor, ...]], Written]

_PROGRAMS: tuple[tuple[str, Writer], ...] = (
    ("torch.export", lambda model, args: _program(model, args, free=True)),
    ("torch.export with a fixed batch", lambda model, args: _program(model, args, free=False)),
)
_SCRIPTS: tuple[tuple[str, Writer], ...] = (("scripting", _script), ("tracing", _trace))
_WRITERS = {".pt2": _PROGRAMS, ".pt": _SCRIPTS, ".ts": _SCRIPTS}
