"""ONNX export that proves itself: what ONNX Runtime computes is compared with what PyTorch computes."""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import math
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_flatten_with_path, tree_unflatten

from espalier import __version__
from espalier.copies import copy_model, unwrapped
from espalier.graph.watch import first_line, tensors_in
from espalier.optional import import_optional
from espalier.run.merging import merge_linear
from espalier.run.rundir import write_file
from espalier.surgery.writing import check_place
from espalier.timing.on_device import session as session_of

FREE = ("batch", "height", "width")
"""Sizes of the inputs that a file may leave open, by the dimension they stand at: 0, -2, -1."""


@dataclass(frozen=True)
class OnnxForm:
    """How a network is written as ONNX; the defaults leave the batch size open and name a single input ``input``."""

    input_names: Sequence[str] | None = None
    output_names: Sequence[str] | None = None
    opset: int | None = None  # of the exporter by default
    dynamic: Sequence[str] = ("batch",)
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for unknown in sorted(set(self.dynamic) - set(FREE)):
            raise ValueError(f"export_onnx(dynamic={list(self.dynamic)!r}): {unknown!r} is none of {', '.join(FREE)}")


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example: Any,
    *,
    tolerance: float = 1e-4,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset: int | None = None,
    dynamic: Sequence[str] = ("batch",),
    metadata: Mapping[str, str] | None = None,
) -> float:
    """Write ``model`` as ONNX with a free batch size, and return the largest difference from PyTorch.

    The difference is relative to the largest output, taken over the example and random inputs, at batch sizes
    1 and 3, and where ``dynamic`` has "height" or "width" at another size as well. Nothing is written unless it is within
    ``tolerance``.  ``example`` is what ``trace`` takes.

    ``input_names`` and ``output_names`` name inputs and outputs in order, by default by their keys in tables; ``opset`` is the
    version of ONNX's operators, the exporter's by default; ``dynamic`` lists what stays open, of "batch", "height" and "width".
    ``metadata`` goes into the file's ``metadata_props``; the version of Espalier is always there.

    Raises: ValueError if ``path`` cannot be written, no exporter can translate the model, or ONNX Runtime computes
    something else; MissingPackage if the extra ``onnx`` is not installed.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(
            f"export_onnx: the second argument is the file to write, the third the example; got a {type(path).__name__} "
            "second: export_onnx(model, 'model.onnx', example)"
        )
    check_place(Path(path))
    form = OnnxForm(input_names, output_names, opset, tuple(dynamic), dict(metadata or {}))
    content, difference = exported(model, example, form)
    if not difference <= tolerance:  # NaN is not within it either
        raise ValueError(
            f"ONNX Runtime's outputs differ from PyTorch's by {difference:.2g}, more than {tolerance:g}; "
            f"{path} was not written"
        )
    write_file(Path(path), content)
    return difference


def read_onnx(path: Path) -> bytes:
    """The content of an ONNX file.  Raises: ValueError for what is none."""
    onnx = import_optional("onnx", extra="onnx")
    try:
        content = path.read_bytes()
        onnx.checker.check_model(onnx.load_model_from_string(content))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:  # protobuf and the checker have errors of their own
        raise ValueError(f"{path}: is no ONNX file ({first_line(error)})") from error
    return content


def to_onnx_bytes(model: nn.Module, example: Any) -> bytes:
    """The model in eval mode as an ONNX file, batch size free where the exporter can leave it free.

    Raises: ValueError if no exporter can translate the model; MissingPackage without the extra ``onnx``.
    """
    return exported(model, example)[0]


def exported(model: nn.Module, example: Any, form: OnnxForm | None = None) -> tuple[bytes, float]:
    """The ONNX file and its largest difference from PyTorch, from the first exporter whose file runs."""
    import_optional("onnx", extra="onnx")
    import_optional("onnxruntime", extra="onnx")
    private = copy_model(unwrapped(model, who="export_onnx"), {}).cpu().eval()
    args, form = positional(example), form or OnnxForm()
    private = _flat(private, example)
    if form.input_names is None:
        form = replace(form, input_names=names_of(example))
    assert form.input_names is not None
    if len(form.input_names) != len(args):
        raise ValueError(f"export_onnx: {len(form.input_names)} input names were given for {len(args)} inputs")
    try:
        with torch.no_grad():
            output = private(*args)
    except Exception as error:
        shapes = ", ".join(str(tuple(a.shape)) for a in args)
        raise ValueError(f"the model does not take inputs of {shapes}: {first_line(error)}") from error
    if form.output_names is None:
        form = replace(form, output_names=_keys_of(output, taken=form.input_names))
    problems = []
    for name, export, free in _attempts(form):
        try:
            with _quiet():
                content = _described(export(private, resized(args, 2) if free else args, free, form), form)
            return content, _difference(private, content, args, free)
        except Exception as error:  # every exporter fails in its own way; the next one may not
            problems.append(f"{name}: {_COLOUR.sub('', first_line(error))}")
    raise ValueError(f"the model cannot be exported to ONNX; {'; '.join(problems)}")


def _described(content: bytes, form: OnnxForm) -> bytes:
    """The file with its metadata, adjacent linear layers as one where that is cheaper, and no weights so small that processors
    take many times as long for them."""
    onnx = import_optional("onnx", extra="onnx")
    model = onnx.load_model_from_string(content)
    version = max(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    if form.opset not in (None, version):
        raise ValueError(f"writes opset {version}, not {form.opset}")
    merge_linear(model.graph)
    for weight in model.graph.initializer:
        if weight.data_type == onnx.TensorProto.FLOAT:
            values = onnx.numpy_helper.to_array(weight)
            normal = np.where(np.abs(values) < np.finfo(np.float32).tiny, np.float32(0), values)
            if not np.array_equal(normal, values, equal_nan=True):
                weight.CopyFrom(onnx.numpy_helper.from_array(normal, weight.name))
    onnx.helper.set_model_props(model, {"espalier_version": __version__, **form.metadata})
    found: bytes = model.SerializeToString()
    return found


_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def onnx_session(content: bytes, *, threads: int = 1) -> Any:
    """An ONNX Runtime session on the CPU.  Raises: MissingPackage without the extra ``onnx``."""
    import_optional("onnxruntime", extra="onnx")
    return session_of(content, threads=threads)


def feeds(session: Any, args: tuple[Tensor, ...]) -> dict[str, Any]:
    """Inputs by name, as the session wants them."""
    return {i.name: t.numpy() for i, t in zip(session.get_inputs(), args, strict=True)}


def positional(example: Any) -> tuple[Tensor, ...]:
    """The example's tensors on the CPU, in the order of positions, lists and keywords.

    Raises: ValueError if there is none, or something that is no tensor among them.
    """
    leaves, _ = tree_flatten(example)
    if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
        odd = sorted({type(leaf).__name__ for leaf in leaves if not isinstance(leaf, Tensor)})
        raise ValueError(f"ONNX has inputs that are tensors; the example has {', '.join(odd) or 'nothing'}")
    return tuple(leaf.detach().cpu() for leaf in leaves)


def names_of(example: Any) -> list[str]:
    """Of the tensors in ``positional(example)``: ``input``, ``input0`` in a row, ``images.left`` in tables.

    >>> x = torch.zeros(1)
    >>> names_of(x), names_of((x, x)), names_of({"images": {"left": x, "right": x}, "sizes": [x]})
    (['input'], ['input0', 'input1'], ['images.left', 'images.right', 'sizes.0'])
    """
    while isinstance(example, (tuple, list)) and not hasattr(example, "_fields") and len(example) == 1:
        [example] = example
    paths = [path for path, _ in tree_flatten_with_path(example)[0]]
    found = [
        [next(str(getattr(key, n)) for n in ("key", "idx", "name") if hasattr(key, n)) for key in path]
        for path in paths
    ]
    if not isinstance(example, dict) and not hasattr(example, "_fields"):
        found = [[f"input{''.join(words[:1])}", *words[1:]] for words in found]
    return [".".join(words) for words in found]


def _keys_of(found: Any, *, taken: Sequence[str]) -> list[str] | None:
    """Where the network returns a table of tensors, their keys; other outputs are named by the exporter."""
    if not isinstance(found, dict) or not all(isinstance(leaf, Tensor) for leaf in tree_flatten(dict(found))[0]):
        return None
    names = names_of(dict(found))
    return None if set(names) & set(taken) else names


class _Flat(nn.Module):
    """A network whose inputs are tables, lists or named tuples, as one that takes their tensors in a row."""

    def __init__(self, model: nn.Module, form: Any) -> None:
        super().__init__()
        self.model, self.form = model, form

    def forward(self, *tensors: Tensor) -> Any:
        example = tree_unflatten(list(tensors), self.form)
        if isinstance(example, dict):
            return self.model(**example)
        several = isinstance(example, (tuple, list)) and not hasattr(example, "_fields")
        return self.model(*example) if several else self.model(example)


def _flat(model: nn.Module, example: Any) -> nn.Module:
    """``model``, or what takes the tensors of ``example`` where they do not stand side by side."""
    several = isinstance(example, (tuple, list)) and not hasattr(example, "_fields")
    side_by_side = isinstance(example, Tensor) or (several and all(isinstance(v, Tensor) for v in example))
    return model if side_by_side else _Flat(model, tree_flatten(example)[1]).eval()


def resized(args: tuple[Tensor, ...], batch: int) -> tuple[Tensor, ...]:
    """The same inputs with another batch size: the first dimension, repeated or cut."""
    return tuple(a.repeat(-(-batch // len(a)), *[1] * (a.dim() - 1))[:batch].contiguous() for a in args)


def _difference(model: nn.Module, content: bytes, args: tuple[Tensor, ...], free: tuple[str, ...]) -> float:
    session = onnx_session(content)
    given = []
    for batch, grown in ((1, False), (3, True)) if "batch" in free else ((None, False), (None, True)):
        inputs = args if batch is None else resized(args, batch)
        given.append(_larger(inputs, free) if grown else inputs)
    return difference(model, lambda *x: [torch.from_numpy(o) for o in session.run(None, feeds(session, x))], given)


def difference(model: nn.Module, other: Callable[..., Any], given: Iterable[tuple[Tensor, ...]]) -> float:
    """Largest difference of ``other`` from ``model`` on ``given`` and on random inputs of the same shapes.

    Of every output relative to its largest value over all inputs, because those of zeros alone may be rounding and nothing
    else.  Raises: ValueError for outputs of other shapes.
    """
    random = torch.Generator().manual_seed(0)
    errors: dict[int, float] = {}  # by output
    scales: dict[int, float] = {}
    for example in given:
        noise = tuple(
            torch.randn(a.shape, generator=random).to(a.dtype) if a.is_floating_point() else a for a in example
        )
        for inputs in (example, noise):
            with torch.no_grad():
                ours, theirs = (list(tensors_in(run(*inputs))) for run in (model, other))
            if [t.shape for t in ours] != [t.shape for t in theirs]:
                raise ValueError("returns other shapes than PyTorch")
            for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
                error, scale = _compared(a.double(), b.double())
                before = errors.get(number, 0.0)
                errors[number] = before if math.isnan(before) else error if math.isnan(error) else max(before, error)
                scales[number] = max(scales.get(number, 0.0), scale)
    tiny = torch.finfo(torch.float64).tiny
    found = [0.0, *(error / max(scales[number], tiny) for number, error in errors.items())]
    return next((f for f in found if math.isnan(f)), max(found))


GROWN = 32  # pixels by which an open height or width is larger at the second look: whatever strides there are divide it


def _larger(args: tuple[Tensor, ...], free: tuple[str, ...]) -> tuple[Tensor, ...]:
    """Images of another height or width, where these are open."""
    more = [GROWN if side in free else 0 for side in ("width", "height")]
    if not any(more):
        return args
    return tuple(nn.functional.pad(a, (0, more[0], 0, more[1])) if a.dim() >= 4 else a for a in args)


def _compared(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """Largest difference, and largest of ours that is finite.  NaN and infinity in the same places differ by nothing."""
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    if not ours.numel():
        return 0.0, 0.0
    error = torch.where(same, 0.0, (ours - theirs).abs())
    return float(error.max()), float(torch.where(ours.isfinite(), ours.abs(), 0.0).max())


# -- exporters


def _by_export(model: nn.Module, args: tuple[Tensor, ...], free: tuple[str, ...], form: OnnxForm) -> bytes:
    import_optional("onnxscript", extra="onnx")
    open_sizes = {name: torch.export.Dim(name) for name in free}
    shapes: Any = tuple({d: open_sizes[n] for d, n in _open(a, free).items()} for a in args) if free else None
    if free and isinstance(model, _Flat):
        shapes = (shapes,)  # of its one argument, ``*tensors``
    program = torch.onnx.export(
        model,
        args,
        dynamo=True,
        dynamic_shapes=shapes,
        verbose=False,
        input_names=form.input_names,
        output_names=form.output_names,
        opset_version=form.opset,
    )
    if program is None:
        raise RuntimeError("nothing was returned")
    return program.model_proto.SerializeToString()


def _by_tracing(model: nn.Module, args: tuple[Tensor, ...], free: tuple[str, ...], form: OnnxForm) -> bytes:
    file = io.BytesIO()
    assert form.input_names is not None
    axes = {name: _open(a, free) for name, a in zip(form.input_names, args, strict=True)} if free else None
    torch.onnx.export(
        model,
        args,
        file,  # type: ignore[arg-type]
        dynamo=False,
        input_names=form.input_names,
        output_names=form.output_names,
        opset_version=form.opset,
        dynamic_axes=axes,
    )
    return file.getvalue()


def _open(tensor: Tensor, free: tuple[str, ...]) -> dict[int, str]:
    """Dimension -> name of what stays open in this input; height and width only where it is an image."""
    places = {"batch": 0, "height": tensor.dim() - 2, "width": tensor.dim() - 1}
    return {places[name]: name for name in free if name == "batch" or tensor.dim() >= 4}


_Export = Callable[[nn.Module, tuple[Tensor, ...], tuple[str, ...], OnnxForm], bytes]


# The older exporter translates some networks that the newer does not; PyTorch will drop it.
_EXPORTERS: tuple[tuple[str, _Export], ...] = (("torch.export", _by_export), ("tracing", _by_tracing))


def _attempts(form: OnnxForm) -> Iterator[tuple[str, _Export, tuple[str, ...]]]:
    """Exporters in turn, with the sizes that each leaves open."""
    yield from ((name, export, tuple(form.dynamic)) for name, export in _EXPORTERS)
    if tuple(form.dynamic) == ("batch",):  # only what nobody asked for is given up
        yield from ((f"{name} with a fixed batch", export, ()) for name, export in _EXPORTERS)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters write progress and advice to every channel there is, and C++ writes past Python's."""
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    nowhere = io.StringIO()
    with (
        warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere), _no_output(),
    ):  # fmt: skip
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


_silence = threading.Lock()
_silent: list[int] = []  # copies of the program's two outputs while threads inside want silence
_inside = 0


@contextlib.contextmanager
def _no_output() -> Iterator[None]:
    """The file descriptors 1 and 2 lead nowhere; the first thread in turns them, the last one out turns them back."""
    global _inside
    with _silence:
        if _inside == 0:
            for stream in (sys.__stdout__, sys.__stderr__):
                with contextlib.suppress(OSError, ValueError, AttributeError):
                    stream.flush()  # type: ignore[union-attr]
            _silent[:] = _turned_away()
        _inside += 1
    try:
        yield
    finally:
        with _silence:
            _inside -= 1
            if _inside == 0:
                _flush_c()
                for number, kept in zip((1, 2), _silent, strict=False):
                    os.dup2(kept, number)
                    os.close(kept)
                _silent.clear()


def _flush_c() -> None:
    """What C's own buffers still hold would come out later."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).fflush(None)


def _turned_away() -> list[int]:
    _flush_c()
    try:
        kept = [os.dup(1), os.dup(2)]
    except OSError:  # a program without outputs
        return []
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    return kept
