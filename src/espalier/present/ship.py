"""Out of a run folder: its network, as a file that runs without Espalier, and how long it takes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from espalier.deploy.int8 import export_int8
from espalier.deploy.torch_files import export_torch
from espalier.graph.watch import first_line
from espalier.present.config import (
    SECTIONS,
    Config,
    check_runs_no_code,
    fit_model_to,
    make_data,
    make_model,
    make_task,
    read_sections,
)
from espalier.present.jobs import open_network
from espalier.run.evaluate import pick_device
from espalier.run.latency import Timing, latency, ms_said
from espalier.run.models import model_names, own_defaults, runs_code
from espalier.run.onnx import export_onnx
from espalier.run.rundir import CONFIG, ONNX, check_is_run, metadata_of

CALIBRATION = 64  # images in one batch to calibrate with


def load_run(folder: str | os.PathLike[str], *, trust: bool = False) -> nn.Module:
    """The small network of a finished run, in eval mode; the folder may have been moved.

    It is rebuilt from its structure and the network that the run names.  A network that would be imported, ``module:factory``,
    is refused unless ``trust``: the folder may come from anybody.

    Raises: ValueError if ``folder`` holds no finished run, or does not say which network it was.
    """
    path = Path(folder)
    check_is_run(path)
    config = read_sections(path / CONFIG)
    if missing := [n for n in ("name", *SIZES) if n not in config["model"]]:
        given = " (it was given in Python)" if "name" in missing else ""
        raise ValueError(
            f"{path / CONFIG}: [model] has no {', '.join(missing)}{given}; build that network and load into it: "
            f"es.load({str(path / 'model.safetensors')!r}, base=your_model)"
        )
    if not trust:
        check_runs_no_code(config, path / CONFIG)
    return open_network(path, config)


def exported(
    path: Path, config: Config, target: Path, inputs: tuple[torch.Tensor, ...], *, form: Mapping[str, Any]
) -> str:
    """Write the network in ``path`` to ``target``; what its ending says, and how far it is from PyTorch, in a sentence."""
    network = open_network(path, config)
    if target.suffix == ".onnx":
        difference = export_onnx(
            network, target, inputs, metadata=metadata_of(path if path.is_dir() else path.parent), **form
        )
    else:
        if given := [f"--{name.replace('_', '-')}" for name, value in form.items() if value]:
            raise ValueError(f"{', '.join(given)}: of ONNX files only; {target} is none")
        difference = export_torch(network, target, inputs)
    return f"{target}: differs from PyTorch by at most {difference:.1e}"


def exported_int8(
    path: Path,
    config: Config,
    target: Path,
    *,
    batches: int,
    most_lost: float | None,
    runtime: str,
    data_dir: Path | None,
) -> str:
    """The same in eight bits, calibrated and judged on the data of the run."""
    if data_dir is not None:
        config = {**config, "data": {**config["data"], "dir": str(data_dir)}}
    source = make_data(config, device=pick_device("cpu"))
    network = open_network(path, fit_model_to(config, source))
    found = export_int8(
        network,
        target,
        source.calibration_batches(batch_size=CALIBRATION, batches=batches),
        source.test_batches(),
        most_lost=most_lost,
        runtime=runtime,
        task=make_task(config),
    )
    last = found.timings[-1]
    return (
        f"{target}: {found.judged_by.said(found.metric)} in eight bits, {found.judged_by.said(found.float_metric)} in float; "
        f"{last.milliseconds:.3g} ms, {last.speedup:.2f}x as fast"
    )


def times(
    names: Sequence[str], *, runtime: str, threads: int, batches: Sequence[int], given: Sequence[str], trust: bool
) -> list[Timing]:
    """Run folders, ONNX files and names of networks, timed in turns at the input that was given, else that of the first run.

    Names are networks for the classes, channels and size of that run.
    """
    sections = [read_sections(Path(name) / CONFIG)["model"] for name in names if (Path(name) / CONFIG).is_file()]
    known = {key: sections[0][key] for key in SIZES if key in sections[0]} if sections else {}
    if not given and known.keys() >= {"in_channels", "image_size"}:
        given = ["1,{in_channels},{image_size},{image_size}".format(**known)]
    found = [_timed(name, given, known.get("num_classes"), trust=trust) for name in names]
    shapes = [shape_of(text) for text in given[:1]] or [shape for _, shape in found if shape is not None]
    example = torch.zeros(shapes[0]) if shapes else None
    models = dict(zip(names, (model for model, _ in found), strict=True))
    try:
        return latency(models, example, backend=runtime, threads=threads, batch_sizes=batches)
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        raise ValueError(f"{runtime}: {first_line(error)}; say another shape with --input") from error


def time_told(path: Path, network: nn.Module, example: Any) -> str:
    """Milliseconds of one input: of the run's ONNX file where there is one and it can be run, else of the network."""
    quick: dict[str, Any] = {"batch_sizes": (1,), "seconds": 1.0}
    try:
        [found] = latency(path / ONNX, backend="onnxruntime", **quick)
    except Exception:  # there is no such file or runtime, or the runtime has an error of its own
        try:
            [found] = latency(network, example, **quick)
        except Exception as error:  # what networks say to inputs that do not stand in a row
            return f"not timed: {first_line(error)}"
    return f"{ms_said(found.milliseconds)} ms for a batch of one in {found.backend}, one thread"


SIZES = ("num_classes", "in_channels", "image_size")


def _timed(
    name: str, given: Sequence[str], classes: int | None, *, trust: bool
) -> tuple[nn.Module | Path, tuple[int, ...] | None]:
    """What ``name`` stands for, and the shape of its input where that is known."""
    path = Path(name)
    if path.is_dir():
        return load_run(path, trust=trust), None
    if path.suffix == ".onnx":
        if not path.is_file():
            raise ValueError(f"{path}: there is no such file")
        return path, None
    if path.is_file():
        raise ValueError(
            f"{path}: weights alone have no structure; give a run folder, an .onnx file or a network's name"
        )
    config, inputs = described({**{section: {} for section in SECTIONS}, "model": {"name": name}}, given, classes)
    return make_model(config).eval(), tuple(inputs[0].shape)


def times_table(timings: Sequence[Timing]) -> str:
    """One line per network and batch size, whatever the length of names."""
    rows = [(t.name, str(t.batch), ms_said(t.milliseconds), f"{t.speedup:.2f}x") for t in timings]
    width = max(len(name) for name, *_ in [("network",), *rows])
    lines = [("network", "batch", "ms", "speed-up"), *rows]
    return "\n".join(f"{name:<{width}}  {batch:>5}  {ms:>8}  {speed:>8}" for name, batch, ms, speed in lines)


# -- inputs without data


def input_of_run(path: Path, section: Mapping[str, Any], given_input: list[str] | None) -> list[str]:
    """What was given, or the shape of the run's images, as ``--input`` has it."""
    needed = {"name": "--model", **({} if given_input else {"in_channels": "--input", "image_size": "--input"})}
    if missing := {name: option for name, option in needed.items() if name not in section}:
        options = " and ".join(dict.fromkeys(missing.values()))
        raise ValueError(f"{path / CONFIG}: [model] has no {', '.join(missing)}; give {options}")
    return given_input or ["1,{in_channels},{image_size},{image_size}".format(**section)]


def described(
    config: Config, given_input: Sequence[str] | None, num_classes: int | None
) -> tuple[Config, tuple[torch.Tensor, ...]]:
    """A network's section for inputs of the shapes given, and those inputs; classes as given, as they stand there, or usual."""
    shape, classes = _usual(config["model"].get("name", ""))
    shapes = [shape_of(text) for text in given_input] if given_input else [shape]
    first = shapes[0]
    section = {
        "num_classes": num_classes or config["model"].get("num_classes", classes),
        "in_channels": first[1] if len(first) > 1 else first[0],
        "image_size": first[-1],
    }
    inputs = tuple(torch.zeros(s) for s in shapes)
    return {**config, "model": {**config["model"], **section}}, inputs


def _usual(model: str) -> tuple[tuple[int, ...], int]:
    """Input shape and classes that a network of this name usually has: CIFAR's or ImageNet's, or what its own factory says."""
    side, classes = (32, 10) if model in model_names() else (224, 1000)
    own = own_defaults(model) if runs_code(model) else {}
    side = own.get("image_size", side)
    return (1, own.get("in_channels", 3), side, side), own.get("num_classes", classes)


def shape_of(text: str) -> tuple[int, ...]:
    """``1,3,224,224`` as numbers.  Raises: ValueError for anything else."""
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise ValueError(f"--input {text}: give the shape as numbers, batch first, for example 1,3,224,224")
    return shape
