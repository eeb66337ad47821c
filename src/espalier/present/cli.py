"""The ``espalier`` command: options become calls of the library, and what comes back is shown."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import torch
import typer

from espalier import __version__
from espalier.graph import trace
from espalier.graph.summary import overview
from espalier.present import options as opt
from espalier.present.edge import Edge, stdout
from espalier.present.show import show_summary
from espalier.run.data import load_data
from espalier.run.models import build_model, load_weights, model_names

app = typer.Typer(
    cls=Edge,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train and prune a network until it fills a budget exactly: an ordinary, smaller PyTorch model.",
)


def _version(wanted: bool) -> None:
    if wanted:
        stdout.print(f"espalier {__version__}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of the program itself."""


# -- inspect


@app.command()
def inspect(
    model: opt.ModelArgument,
    data: opt.Data = None,
    data_dir: opt.DataDir = None,
    image_size: opt.ImageSize = None,
    num_classes: opt.NumClasses = None,
    input: opt.Input = None,
    weights: opt.Weights = None,
    as_json: opt.AsJson = False,
) -> None:
    """Show what can be removed from a network, what every layer costs, and what is frozen and why."""
    if data is not None:
        source = load_data(data, data_dir=data_dir, image_size=image_size)
        shapes, classes = [tuple(source.example().shape)], source.num_classes
    else:
        shapes, classes = _input_shapes(model, input), num_classes or _usual(model)[1]
    channels, size = _channels_and_size(shapes[0])
    network = build_model(model, num_classes=classes, in_channels=channels, image_size=size)
    if weights is not None:
        load_weights(network, weights)
    summary = overview(trace(network, tuple(torch.zeros(shape) for shape in shapes)))
    if as_json:
        typer.echo(json.dumps(asdict(summary), indent=1))
    else:
        show_summary(summary, stdout)


def _usual(model: str) -> tuple[tuple[int, ...], int]:
    """Input shape and classes that a network of this name usually has: CIFAR's or ImageNet's."""
    return ((1, 3, 32, 32), 10) if model in model_names() else ((1, 3, 224, 224), 1000)


def _input_shapes(model: str, given: list[str] | None) -> list[tuple[int, ...]]:
    return [_shape(text) for text in given] if given else [_usual(model)[0]]


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise ValueError(f"--input {text}: give the shape as numbers, batch first, for example 1,3,224,224")
    return shape


def _channels_and_size(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[1] if len(shape) > 1 else shape[0], shape[-1]
