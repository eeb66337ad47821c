"""The command line's options, each in one place: name, type, help, panel.

All of them default to ``None`` - not given - so that a ``--config`` file can stand behind them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from espalier.run.recipe import Recipe


def _option(name: str, text: str, panel: str, *, metavar: str | None = None) -> typer.models.OptionInfo:
    return typer.Option(name, help=text, rich_help_panel=panel, metavar=metavar, show_default=False)


# -- network and data

Model = Annotated[
    str | None,
    _option(
        "--model",
        "resnet20 ... resnet110 (also resnet20a: option-A shortcuts), cifar_resnet18, vgg16_bn, torchvision:NAME, timm:NAME, "
        "package.module:factory.",
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
    _option("--data", "digits, cifar10, cifar100 or imagefolder:PATH.", "Network and data", metavar="NAME"),
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
Holdout = Annotated[
    int | None,
    _option("--holdout", "Training images set aside to choose by.", "Network and data", metavar="N"),
]
ImageSize = Annotated[
    int | None,
    _option("--image-size", "For imagefolder: side of the square images.", "Network and data", metavar="N"),
]

# -- budget

Macs = Annotated[
    float | None,
    _option("--macs", "Multiply-adds: up to 1 a fraction of the dense network, above 1 absolute.", "Budget"),
]
Params = Annotated[float | None, _option("--params", "Parameters, likewise.", "Budget")]
ActivationMemory = Annotated[
    float | None, _option("--activation-memory", "Peak bytes of activations, likewise.", "Budget")
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
Epochs = Annotated[
    int | None,
    _option("--epochs", f"Passes over the training images; default {Recipe.epochs}.", "Training", metavar="N"),
]
BatchSize = Annotated[
    int | None, _option("--batch-size", f"Images per step; default {Recipe.batch_size}.", "Training", metavar="N")
]
Lr = Annotated[float | None, _option("--lr", f"Learning rate at its peak; default {Recipe.lr}.", "Training")]
Optimizer = Annotated[
    str | None, _option("--optimizer", f"sgd or adamw; default {Recipe.optimizer}.", "Training", metavar="NAME")
]
WeightDecay = Annotated[
    float | None,
    _option("--weight-decay", f"Except on biases and normalisation layers; default {Recipe.weight_decay}.", "Training"),
]
Warmup = Annotated[
    float | None,
    _option("--warmup", f"Epochs of linear warm-up; default {Recipe.warmup_epochs:g}.", "Training", metavar="EPOCHS"),
]
Schedule = Annotated[
    str | None,
    _option(
        "--schedule",
        f"Learning rate: cosine, wsd (constant for half of the run, then cosine) or constant; default {Recipe.schedule}.",
        "Training",
        metavar="NAME",
    ),
]
LabelSmoothing = Annotated[float | None, _option("--label-smoothing", "From 0 to below 1.", "Training")]
Ema = Annotated[float | None, _option("--ema", "Decay of averaged weights, for example 0.999.", "Training")]
Distill = Annotated[
    bool | None,
    typer.Option(
        "--distill/--no-distill",
        help="Learn from the dense network; default: if it is trained.",
        rich_help_panel="Training",
        show_default=False,
    ),
]
Clip = Annotated[float | None, _option("--clip", "Bound on the norm of the gradient.", "Training", metavar="NORM")]
Seed = Annotated[
    int | None,
    _option(
        "--seed",
        f"Seeds batch order, augmentation and initial weights; default {Recipe.seed}.",
        "Training",
        metavar="N",
    ),
]

# -- machine

Precision = Annotated[
    str | None,
    _option(
        "--precision",
        f"fp32, bf16 or fp16; default {Recipe.precision}. Of training; evaluation is fp32.",
        "Machine",
        metavar="NAME",
    ),
]
ChannelsLast = Annotated[
    bool | None, typer.Option("--channels-last/--no-channels-last", help="Memory layout; often faster.",
                              rich_help_panel="Machine", show_default=False),
]  # fmt: skip
Graphs = Annotated[
    bool | None, typer.Option("--graphs/--no-graphs", help="On a GPU: replay training steps as CUDA graphs.",
                              rich_help_panel="Machine", show_default=False),
]  # fmt: skip
Device = Annotated[
    str | None,
    _option("--device", f"auto, cpu, cuda, cuda:1, ...; default {Recipe.device}.", "Machine", metavar="NAME"),
]
Threads = Annotated[int | None, _option("--threads", "Number of CPU threads.", "Machine", metavar="N")]

# -- run folder

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
Tensorboard = Annotated[bool, _option("--tensorboard", "Log for TensorBoard as well, in --out.", "Run folder")]

# -- inspect

NumClasses = Annotated[int | None, typer.Option("--num-classes", help="Default: CIFAR's 10, else 1000.", min=1)]
Input = Annotated[
    list[str] | None,
    typer.Option("--input", help="Shape of an input, batch first; repeat for several.", metavar="1,3,224,224"),
]
AsJson = Annotated[bool, typer.Option("--json", help="The same as JSON.")]

# -- evaluate, export

RunOrFile = Annotated[Path, typer.Argument(help="A run folder, or a file of weights.", metavar="PATH")]
To = Annotated[Path | None, typer.Option("--to", help="Where the ONNX file goes; default: beside.", metavar="FILE")]
