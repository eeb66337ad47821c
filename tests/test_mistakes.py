"""What people are likely to write first, and what they are told to write instead."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import espalier as es
from espalier.present.cli import app

X = torch.zeros(1, 3, 8, 8)
HALF = es.Budget(macs=0.5)
OWN = """
from torch import nn


def build(num_classes=10):
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, num_classes)
    )
"""


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4))


def one_shot(**changed):
    return es.compress(net(), X, **{"budget": HALF, "method": es.Magnitude(), **changed})


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A folder as people have it: pictures, a network's code, files of all kinds."""
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    Path("run").mkdir()
    Path("own.py").write_text(OWN)
    Path("model.onnx").write_bytes(b"onnx")
    torch.save(net().state_dict(), "model.pt")


IN_PYTHON = {
    "40 for 40 %": (lambda: one_shot(budget=es.Budget(macs=40)), r'40 is a count, for 40 % give 0\.4 or "40%"'),
    "1.5": (lambda: es.Budget(macs=1.5), r'at most 1\.0.*for 1\.5 % give 0\.015 or "1\.5%"'),
    "half": (lambda: es.Budget(macs="half"), r"Budget\(macs='half'\): give a fraction \(0\.4 or 40%\) or a count"),
    "a class for a method": (lambda: one_shot(method=es.DPRP), r"method=DPRP: .* es\.DPRP\(\)"),
    "a name for a method": (lambda: one_shot(method="magnitude"), r"method='magnitude': .* es\.Magnitude\(\)"),
    "a folder": (lambda: es.compress(net(), "pictures", budget=HALF), r"give load_data\('imagefolder:pictures'\)"),
    "a path": (lambda: es.compress(net(), Path("pictures"), budget=HALF), r"load_data\('imagefolder:pictures'\)"),
    "a folder by name": (lambda: es.load_data("pictures"), r"is a folder: give imagefolder:pictures"),
    "cost of a model": (lambda: es.cost(net(), X), r"es\.cost\(es\.trace\(model, x\)\)"),
    "a shape for an example": (lambda: es.trace(net(), (1, 3, 8, 8)), r"give torch\.zeros\(1, 3, 8, 8\)"),
    "a shape in a list": (
        lambda: es.compress(net(), (1, 3, 8, 8), budget=HALF, method=es.Magnitude()),
        r"torch\.zeros\(1, 3",
    ),
    "a run for weights": (lambda: es.load_weights(net(), "run"), r"is a folder; .*model\.safetensors"),
    "a run for a file": (lambda: es.load("run", base=net()), r"is a folder; give es\.load_run\('run'\)"),
    "onnx for weights": (lambda: es.load_weights(net(), "model.onnx"), r"is an ONNX file; give the PyTorch checkpoint"),
    "a checkpoint for a network": (lambda: es.load("model.pt", base=net()), r"is a checkpoint \(es\.load_weights"),
    "weights for a run": (lambda: es.load_run("model.pt"), r"holds no run.*give a folder"),
    "weights for a name": (lambda: es.build_model("model.pt", num_classes=4), r"file of weights: give it as --weights"),
    "onnx for a name": (lambda: es.build_model("model.onnx", num_classes=4), r"an ONNX file cannot be trained"),
    "a run for a name": (lambda: es.build_model("run", num_classes=4), r"is a folder.*es\.load_run\('run'\)"),
    "a file for a model": (lambda: es.compress("model.pt", X, budget=HALF), r"expected an nn\.Module, got str"),
}


@pytest.mark.parametrize("mistake", IN_PYTHON)
def test_a_likely_mistake_is_answered_in_one_line(mistake, places):
    act, says = IN_PYTHON[mistake]
    with pytest.raises(ValueError) as caught:
        act()
    message = str(caught.value)
    assert re.search(says, message), message
    assert "\n" not in message


RUN = [
    "compress",
    "--model",
    "own.py:build",
    "--data",
    "digits",
    "--method",
    "magnitude",
    "--epochs",
    "0",
    "--out",
    "out",
]
ON_THE_COMMAND_LINE = {
    "--macs 40": ([*RUN, "--macs", "40"], r'for 40 % give 0\.4 or "40%"'),
    "--macs 1.5": ([*RUN, "--macs", "1.5"], r"a fraction is at most 1\.0"),
    "--macs x": ([*RUN, "--macs", "x"], r"--macs x: give a fraction \(0\.4 or 40%\) or a count"),
    "a folder for data": (
        ["compress", "--data", "pictures", "--macs", "0.5", "--out", "o"],
        r"give imagefolder:pictures",
    ),
    "evaluate an onnx": (["evaluate", "model.onnx", "--model", "resnet8", "--data", "digits"], r"is an ONNX file"),
    "export a checkpoint of nothing": (["export", "model.pt"], r"--model is missing"),
    "inspect a file of weights": (["inspect", "model.pt"], r"give it as --weights model\.pt"),
}


@pytest.mark.parametrize("mistake", ON_THE_COMMAND_LINE)
def test_a_likely_mistake_on_the_command_line_is_one_line_and_exit_code_2(mistake, places):
    arguments, says = ON_THE_COMMAND_LINE[mistake]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 2, found.output
    assert re.search(says, found.output), found.output
    assert len(found.output.strip().splitlines()) == 1


def test_what_is_clear_simply_works(places):
    """A share as a percentage, and a factory in a file."""
    assert one_shot(budget=es.Budget(macs="50%")).limits == one_shot().limits
    found = CliRunner().invoke(app, [*RUN, "--macs", "50%", "--no-verify"])
    assert found.exit_code == 0, found.output
    assert es.load_run("out", trust=True)[0].out_channels < 8
