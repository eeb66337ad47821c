"""The command line's options, each in one place: name, type, help, panel.

Options that are fields of a class of settings are made from it (``with_settings``); what a field means and allows is written
there.  All options default to ``None`` - not given - so that a ``--config`` file can stand behind them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Annotated, Any, Optional, get_args

import typer

from espalier.present.config import METHODS, TASKS
from espalier.settings import Setting, settings_of

SHORTER = {"warmup_epochs": "--warmup", "clip_norm": "--clip", "image_size": "--crop"}
"""Second spellings of options that are named after fields."""
PANELS = {"data": "Network and data", "recipe": "Training"}
"""Where the help shows the options of a section."""
MACHINE = ("precision", "channels_last", "device", "threads", "graphs")
"""Fields of a recipe that have a panel of their own in the help."""


Command = Callable[..., None]


def with_settings(
    shared: Mapping[str, Any] | None = None, **sections: Sequence[Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for every field of a class of settings, or for those named behind it.

    The command receives what was given, section by section, as ``settings``, and the options that it shares with others,
    ``shared`` (name -> annotation), as ``job``.

    >>> @with_settings(recipe=(Recipe,))                          # doctest: +SKIP
    ... def compress(model: opt.Model = None, *, settings: Mapping[str, Mapping[str, Any]]) -> None: ...
    """

    def decorate(command: Command) -> Command:
        taken = inspect.signature(command, eval_str=True).parameters.values()
        own = [p for p in taken if p.name not in ("settings", "job")]
        common = [_shared(name, annotation) for name, annotation in (shared or {}).items()]
        made = {
            s.name: (section, _parameter(s, PANELS[section]))
            for section, (owner, *names) in sections.items()
            for s in settings_of(owner)
            if not names or s.name in names
        }

        @functools.wraps(command)
        def call(**values: Any) -> None:
            found: dict[str, dict[str, Any]] = {section: {} for section in sections}
            for name, (section, _) in made.items():
                if (value := values.pop(name)) is not None:
                    found[section][name] = value
            if shared is not None:
                values["job"] = {name: values.pop(name) for name in shared}
            command(**values, settings=found)

        mine = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        parameters = common + mine + [p for _, p in made.values()]
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {p.name: p.annotation for p in parameters}
        return call

    return decorate


def _shared(name: str, annotation: Any) -> inspect.Parameter:
    default = False if get_args(annotation)[0] is bool else None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _parameter(setting: Setting, panel: str) -> inspect.Parameter:
    name = f"--{setting.name.replace('_', '-')}"
    names = [f"{name}/--no-{name[2:]}"] if setting.plain is bool else [name]
    if setting.name in SHORTER:
        names.append(SHORTER[setting.name])
    usual = "" if setting.default in (None, MISSING) or setting.plain is bool else f"; default {setting.default}"
    info = typer.Option(
        *names,
        help=f"{setting.text}{usual}.",
        rich_help_panel="Machine" if setting.name in MACHINE else panel,
        metavar={int: "N", str: "NAME"}.get(setting.plain),
        show_default=False,
    )
    annotation = Annotated[Optional[setting.plain], info]  # type: ignore[name-defined]  # noqa: UP045 - made at run time
    return inspect.Parameter(setting.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _option(panel: str | None, text: str, metavar: str | None = None, flag: str | None = None, **more: Any) -> Any:
    """Named after the parameter that it annotates, unless ``flag`` says otherwise."""
    names = [] if flag is None else [flag]
    return typer.Option(*names, help=text, rich_help_panel=panel, metavar=metavar, show_default=False, **more)


_network, _budget, _training, _folder, _plain = (
    functools.partial(_option, panel) for panel in ("Network and data", "Budget", "Training", "Run folder", None)
)

# -- network and data

Model = Annotated[
    str | None,
    _network(
        "resnet20 ... resnet110 (also resnet20a: option-A shortcuts), cifar_resnet18, vgg16_bn, torchvision:NAME, timm:NAME, "
        "file.py:factory or package.module:factory.",
        "NAME",
    ),
]
ModelArgument = Annotated[str, typer.Argument(help="Name of a network, as for --model.", metavar="MODEL")]
Weights = Annotated[Path | None, _network("Trained weights: safetensors or a checkpoint.", "FILE")]
Data = Annotated[
    str | None,
    _network("digits, cifar10, cifar100, imagefolder:PATH, or loaders of your own: file.py:make_data.", "NAME"),
]
DataDir = Annotated[Path | None, _network("Where the data lies; default ESPALIER_DATA_DIR, then data.", "DIR")]
Download = Annotated[bool, _network("Fetch the data if it is absent.", flag="--download")]
Holdout = Annotated[int | None, _network("Training images set aside to choose by.", "N")]
Task = Annotated[
    str | None,
    _network(
        f"What the network is for: {', '.join(TASKS)}, settings behind it (segmentation:classes=21); or file.py:make_task.",
        "NAME",
    ),
]

# -- budget; the lists are a sweep's

Macs = Annotated[
    str | None, _budget("Multiply-adds: 0.4 or 40% of the dense network's, or a count such as 4e6.", "AMOUNT")
]
Params = Annotated[str | None, _budget("Parameters, likewise.", "AMOUNT")]
ActivationMemory = Annotated[str | None, _budget("Peak bytes of activations, likewise.", "AMOUNT")]
Latency = Annotated[
    str | None,
    _budget(
        "Time in a runtime: a fraction of the dense network's, or a time such as 2ms. Measures a profile first, or takes one.",
        "TIME",
    ),
]
MacsList = Annotated[str | None, _budget("Multiply-adds, several with commas between them: 0.3,0.5,0.7.", "LIST")]
ParamsList = Annotated[str | None, _budget("Parameters, likewise; lists are paired, one value goes with all.", "LIST")]
ActivationMemoryList = Annotated[str | None, _budget("Peak bytes of activations, likewise.", "LIST")]
LatencyList = Annotated[
    str | None,
    _budget(
        "Times in a runtime, likewise: fractions of the dense network's, or times such as 2ms; all points share one profile.",
        "LIST",
    ),
]
Profile = Annotated[
    Path | None, _budget("What layers take there, from espalier profile; default: measured now.", "FILE")
]
TimeRuntime = Annotated[str | None, _budget("Where time counts: onnxruntime (default), openvino or torch.", "NAME")]
MultipleOf = Annotated[
    int | None,
    _budget(
        "Widths and ranks are multiples of this, or stay whole; default 4, which runs fast, or 1 if that is out of reach.",
        "N",
    ),
]
Protect = Annotated[
    list[str] | None, _budget("A group or module that keeps everything; * allowed, repeatable.", "NAME")
]

# -- method and training

Method = Annotated[str | None, _training(f"{', '.join(METHODS)}, or none to train only; default tcp.", "NAME")]
Methods = Annotated[
    str | None,
    _training(
        "Methods, with commas between them; hyper-parameters behind colons: mgp,mgp:blocks=true. Default tcp.", "LIST"
    ),
]
Set = Annotated[
    list[str] | None, _training("A hyper-parameter of the method, for example energy=0.02; repeatable.", "NAME=VALUE")
]
Seeds = Annotated[
    int,
    typer.Option(help="Runs of every method at every budget, from --seed on.", rich_help_panel="Training", metavar="N"),
]
NoDistill = Annotated[bool, _training("The same as --distill 0.", flag="--no-distill")]

# -- run folder

NoVerify = Annotated[bool, _folder("Do not prove the finished network.", flag="--no-verify")]
Out = Annotated[Path | None, _folder("Folder that receives the run.", "DIR")]
Config = Annotated[
    Path | None, _folder("config.toml of a run, or its folder: does it again; options given here win.", "PATH")
]
Resume = Annotated[bool, _folder("Go on with the run in --out.", flag="--resume")]
Force = Annotated[bool, _folder("Begin anew in --out; the old run moves to a folder inside.", flag="--force")]
Log = Annotated[
    str | None,
    _folder(
        "Loggers, with commas between them: tensorboard, wandb, mlflow; csv (log.csv in --out) is always written.",
        "LIST",
    ),
]
Tensorboard = Annotated[bool, _folder("The same as --log tensorboard.", flag="--tensorboard")]
Storage = Annotated[
    str | None,
    _folder(
        "Where workers take points from: a file of Optuna's journal, or a database URL such as sqlite:///sweep.db; default "
        "sweep.journal in --out. Start the same command as often as you like, on this machine or others.",
        "FILE|URL",
    ),
]
Trust = Annotated[
    bool,
    typer.Option("--trust", help="Run the code that the folder's config.toml names: only if you know who wrote it."),
]

JOB: dict[str, Any] = {
    "model": Model, "weights": Weights, "data": Data, "data_dir": DataDir, "download": Download, "holdout": Holdout,
    "task": Task, "multiple_of": MultipleOf, "protect": Protect, "no_distill": NoDistill,
    "config": Config, "out": Out, "trust": Trust,
}  # fmt: skip
"""What one run and a sweep of runs are told alike."""

# -- inspect, evaluate, export, time

NumClasses = Annotated[
    int | None, typer.Option(help="Default: those of your own factory, CIFAR's 10, else 1000.", min=1)
]
Input = Annotated[list[str] | None, _plain("Shape of an input, batch first; repeat for several.", "1,3,224,224")]
AsJson = Annotated[bool, typer.Option("--json", help="The same as JSON.")]
RunOrFile = Annotated[Path, typer.Argument(help="A run folder, or a file of weights.", metavar="PATH")]
To = Annotated[
    Path | None, _plain("Where the file goes; its ending says what: .onnx, .pt2 or .pt; default: ONNX, beside.", "FILE")
]
InputNames = Annotated[
    list[str] | None, _plain("Name of an input in the ONNX file; repeat in order.", "NAME", "--input-name")
]
OutputNames = Annotated[list[str] | None, _plain("Name of an output, likewise.", "NAME", "--output-name")]
Opset = Annotated[int | None, _plain("Version of ONNX's operators; default: the exporter's.", "N", min=9)]
Dynamic = Annotated[
    list[str] | None, _plain("A size to leave open: batch, height or width; repeatable; default batch.", "NAME")
]
Int8 = Annotated[bool, typer.Option("--int8", help="In eight bits, calibrated and judged on the run's data.")]
Calibrate = Annotated[int, typer.Option(help="For --int8: batches of 64 images to calibrate with.", metavar="N", min=1)]
MostLost = Annotated[
    float | None,
    typer.Option(
        help="For --int8: how much may be lost; default 1 point of a metric in per cent, else a twentieth of its value."
    ),
]
Int8Runtime = Annotated[
    str, typer.Option("--runtime", help="For --int8: onnxruntime, or openvino, by NNCF.", metavar="NAME")
]
Runtime = Annotated[str, typer.Option(help="onnxruntime, openvino or torch.", metavar="NAME")]
TimeThreads = Annotated[int, typer.Option("--threads", help="Number of CPU threads.", metavar="N")]
Batch = Annotated[list[int] | None, _plain("Batch size; repeatable; default 1.", "N")]
