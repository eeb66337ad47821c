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

from espalier.settings import Setting, settings_of

SHORTER = {"warmup_epochs": "--warmup", "clip_norm": "--clip"}
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


def _option(name: str, text: str, panel: str, *, metavar: str | None = None) -> typer.models.OptionInfo:
    return typer.Option(name, help=text, rich_help_panel=panel, metavar=metavar, show_default=False)


# -- network and data

Model = Annotated[
    str | None,
    _option(
        "--model",
        "resnet20 ... resnet110 (also resnet20a: option-A shortcuts), cifar_resnet18, vgg16_bn, torchvision:NAME, timm:NAME, "
        "file.py:factory or package.module:factory.",
        "Network and data",
        metavar="NAME",
    ),
]
ModelArgument = Annotated[str, typer.Argument(help="Name of a network, as for --model.", metavar="MODEL")]
Weights = Annotated[
    Path | None,
    _option("--weights", "Trained weights: safetensors or a checkpoint.", "Network and data", metavar="FILE"),
]
Data = Annotated[
    str | None,
    _option(
        "--data",
        "digits, cifar10, cifar100, imagefolder:PATH, or loaders of your own: file.py:make_data.",
        "Network and data",
        metavar="NAME",
    ),
]
DataDir = Annotated[
    Path | None,
    _option(
        "--data-dir",
        "Where the data lies; default ESPALIER_DATA_DIR, then data.",
        "Network and data",
        metavar="DIR",
    ),
]
Download = Annotated[bool, _option("--download", "Fetch the data if it is absent.", "Network and data")]
Task = Annotated[
    str | None,
    _option(
        "--task",
        "What the network is for: classification (default), segmentation:classes=21, regression, super-resolution, detection, "
        "or file.py:make_task.",
        "Network and data",
        metavar="NAME",
    ),
]
Holdout = Annotated[
    int | None,
    _option("--holdout", "Training images set aside to choose by.", "Network and data", metavar="N"),
]

# -- budget

Macs = Annotated[
    str | None,
    _option(
        "--macs",
        "Multiply-adds: 0.4 or 40% of the dense network's, or a count such as 4e6.",
        "Budget",
        metavar="AMOUNT",
    ),
]
Params = Annotated[str | None, _option("--params", "Parameters, likewise.", "Budget", metavar="AMOUNT")]
ActivationMemory = Annotated[
    str | None, _option("--activation-memory", "Peak bytes of activations, likewise.", "Budget", metavar="AMOUNT")
]
Latency = Annotated[
    str | None,
    _option(
        "--latency",
        "Time in a runtime: a fraction of the dense network's, or a time such as 2ms. Measures a profile first, or takes one.",
        "Budget",
        metavar="TIME",
    ),
]
Profile = Annotated[
    Path | None,
    _option(
        "--profile", "What layers take there, from espalier profile; default: measured now.", "Budget", metavar="FILE"
    ),
]
TimeRuntime = Annotated[
    str | None,
    _option("--runtime", "Where time counts: onnxruntime (default) or openvino.", "Budget", metavar="NAME"),
]
MultipleOf = Annotated[
    int | None,
    _option(
        "--multiple-of",
        "Widths and ranks are multiples of this, or stay whole; default 4, which runs fast, or 1 if that is out of reach.",
        "Budget",
        metavar="N",
    ),
]
Protect = Annotated[
    list[str] | None,
    _option(
        "--protect",
        "A group or module that keeps everything; * allowed, repeatable.",
        "Budget",
        metavar="NAME",
    ),
]

# -- method and training

Method = Annotated[
    str | None,
    _option(
        "--method",
        "tcp (default), dprp, tt-lc, mgp, magnitude, svd-oneshot, or none to train only.",
        "Training",
        metavar="NAME",
    ),
]
Set = Annotated[
    list[str] | None,
    _option(
        "--set",
        "A hyper-parameter of the method, for example energy=0.02; repeatable.",
        "Training",
        metavar="NAME=VALUE",
    ),
]
NoDistill = Annotated[
    bool, typer.Option("--no-distill", help="The same as --distill 0.", rich_help_panel="Training", show_default=False)
]

# -- run folder

NoVerify = Annotated[
    bool,
    typer.Option(
        "--no-verify", help="Do not prove the finished network.", rich_help_panel="Run folder", show_default=False
    ),
]
Out = Annotated[Path | None, _option("--out", "Folder that receives the run.", "Run folder", metavar="DIR")]
Config = Annotated[
    Path | None,
    _option(
        "--config",
        "config.toml of a run, or its folder: does it again; options given here win.",
        "Run folder",
        metavar="PATH",
    ),
]
Resume = Annotated[bool, _option("--resume", "Go on with the run in --out.", "Run folder")]
Force = Annotated[bool, _option("--force", "Begin anew in --out; the old run moves to a folder inside.", "Run folder")]
Log = Annotated[
    str | None,
    _option(
        "--log",
        "Loggers, with commas between them: tensorboard, wandb, mlflow; csv (log.csv in --out) is always written.",
        "Run folder",
        metavar="LIST",
    ),
]
Tensorboard = Annotated[bool, _option("--tensorboard", "The same as --log tensorboard.", "Run folder")]

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

# -- sweep

MacsList = Annotated[
    str | None,
    _option("--macs", "Multiply-adds, several with commas between them: 0.3,0.5,0.7.", "Budget", metavar="LIST"),
]
ParamsList = Annotated[
    str | None,
    _option("--params", "Parameters, likewise; lists are paired, one value goes with all.", "Budget", metavar="LIST"),
]
ActivationMemoryList = Annotated[
    str | None, _option("--activation-memory", "Peak bytes of activations, likewise.", "Budget", metavar="LIST")
]
LatencyList = Annotated[
    str | None,
    _option(
        "--latency",
        "Times in a runtime, likewise: fractions of the dense network's, or times such as 2ms; all points share one profile.",
        "Budget",
        metavar="LIST",
    ),
]
Methods = Annotated[
    str | None,
    _option(
        "--method",
        "Methods, with commas between them; hyper-parameters behind colons: mgp,mgp:blocks=true. Default tcp.",
        "Training",
        metavar="LIST",
    ),
]
Seeds = Annotated[
    int,
    typer.Option(
        "--seeds", help="Runs of every method at every budget, from --seed on.", rich_help_panel="Training", metavar="N"
    ),
]
Storage = Annotated[
    str | None,
    _option(
        "--storage",
        "Where workers take points from: a file of Optuna's journal, or a database URL such as sqlite:///sweep.db; default "
        "sweep.journal in --out. Start the same command as often as you like, on this machine or others.",
        "Run folder",
        metavar="FILE|URL",
    ),
]

# -- inspect

NumClasses = Annotated[int | None, typer.Option("--num-classes", help="Default: CIFAR's 10, else 1000.", min=1)]
Input = Annotated[
    list[str] | None,
    typer.Option("--input", help="Shape of an input, batch first; repeat for several.", metavar="1,3,224,224"),
]
AsJson = Annotated[bool, typer.Option("--json", help="The same as JSON.")]

# -- evaluate, export

RunOrFile = Annotated[Path, typer.Argument(help="A run folder, or a file of weights.", metavar="PATH")]
To = Annotated[
    Path | None,
    typer.Option(
        "--to",
        help="Where the file goes; its ending says what: .onnx, .pt2 or .pt; default: ONNX, beside.",
        metavar="FILE",
    ),
]
InputNames = Annotated[
    list[str] | None,
    typer.Option("--input-name", help="Name of an input in the ONNX file; repeat in order.", metavar="NAME"),
]
OutputNames = Annotated[
    list[str] | None, typer.Option("--output-name", help="Name of an output, likewise.", metavar="NAME")
]
Opset = Annotated[
    int | None,
    typer.Option("--opset", help="Version of ONNX's operators; default: the exporter's.", metavar="N", min=9),
]
Dynamic = Annotated[
    list[str] | None,
    typer.Option(
        "--dynamic", help="A size to leave open: batch, height or width; repeatable; default batch.", metavar="NAME"
    ),
]
Int8 = Annotated[bool, typer.Option("--int8", help="In eight bits, calibrated and judged on the run's data.")]
Calibrate = Annotated[
    int, typer.Option("--calibrate", help="For --int8: batches of 64 images to calibrate with.", metavar="N", min=1)
]
MostLost = Annotated[
    float, typer.Option("--most-lost", help="For --int8: points of accuracy that may be lost; else nothing is written.")
]

# -- time

Runtime = Annotated[str, typer.Option("--runtime", help="onnxruntime, openvino or torch.", metavar="NAME")]
TimeThreads = Annotated[int, typer.Option("--threads", help="Number of CPU threads.", metavar="N")]
Batch = Annotated[list[int] | None, typer.Option("--batch", help="Batch size; repeatable; default 1.", metavar="N")]
