"""What people are likely to write first, and what they are told to write instead."""

import re
from functools import partial
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import espalier as es
from espalier.graph.watch import TraceTimeout
from espalier.present import profiling
from espalier.present.cli import app

X = torch.zeros(1, 3, 8, 8)
HALF = es.Budget(macs=0.5)
OWN = """
import torch
from torch import nn


def on_meta(num_classes=10):
    with torch.device("meta"):
        return build(num_classes)


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
    torch.jit.save(torch.jit.trace(net(), X), "script.pt")
    torch.export.save(torch.export.export(net(), (X,)), "p.pt2")
    namespace: dict[str, Any] = {}
    exec(OWN, namespace)
    torch.save(namespace["build"]().state_dict(), "own.pt")
    Path("other.toml").write_text("[buget]\nmacs = 0.5\n")
    Path("names.toml").write_text('[data]\nname = "digits"\nimagesize = 8\n')


IN_PYTHON = {
    "40 for 40 %": (lambda: one_shot(budget=es.Budget(macs=40)), r'40 is a count, for 40 % give 0\.4 or "40%"'),
    "1.5": (lambda: es.Budget(macs=1.5), r'at most 1\.0.*for 1\.5 % give 0\.015 or "1\.5%"'),
    "half": (lambda: es.Budget(macs="half"), r"Budget\(macs='half'\): give a fraction \(0\.4 or 40%\) or a count"),
    "a class for a method": (lambda: one_shot(method=es.DPRP), r"method=DPRP: .* es\.DPRP\(\)"),
    "a name for a method": (lambda: one_shot(method="magnitude"), r"method='magnitude': .* es\.Magnitude\(\)"),
    "a class for a task": (
        lambda: one_shot(task=es.Segmentation),
        r"task=Segmentation: .* es\.Segmentation\(classes=21\)",
    ),
    "a name for a task": (lambda: one_shot(task="detection"), r"task='detection': give a task"),
    "a file for a profile": (lambda: es.Budget(latency=0.5, profile="p.json"), r"give es\.load_profile\('p\.json'\)"),
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
    "a run for a file, without a base": (lambda: es.load("run"), r"is a folder; give es\.load_run\('run'\)"),
    "a network's file without a base": (
        lambda: (es.save(net(), "small.safetensors"), es.load("small.safetensors")),
        r"give base=YOUR_MODEL\(\.\.\.\), a fresh one",
    ),
    "a time without a profile": (lambda: es.Budget(latency=0.6), r"Budget\(latency=0\.6, profile=es\.profile\(model"),
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
        ["compress", "--model", "resnet8", "--data", "pictures", "--macs", "0.5", "--out", "o"],
        r"give imagefolder:pictures",
    ),
    "evaluate an onnx": (
        ["evaluate", "model.onnx", "--model", "resnet8", "--data", "digits"],
        r"for a runtime already",
    ),
    "export a checkpoint of nothing": (["export", "model.pt"], r"model\.pt: is a file; say with --model"),
    "evaluate a checkpoint of nothing": (["evaluate", "model.pt"], r"model\.pt: is a file; say with --model"),
    "export an onnx": (
        ["export", "model.onnx"],
        r"for a runtime already; espalier time measures it; give the run folder",
    ),
    "a file of code for a model": (["inspect", "own.py"], r"own\.py is a file of code: .*own\.py:build"),
    "inspect a run": (["inspect", "run"], r"espalier evaluate run"),
    "TorchScript for weights": (
        [*RUN, "--macs", "0.5", "--weights", "script.pt"],
        r"script\.pt: is a TorchScript file; give the checkpoint",
    ),
    "a program for weights": ([*RUN, "--macs", "0.5", "--weights", "p.pt2"], r"p\.pt2: is a program of torch\.export;"),
    "a fraction out of reach": (
        [*RUN, "--multiple-of", "1", "--macs", "0.01"],
        r"smallest reachable is [\d,]+ \([\d.]+% of [\d,]+\); raise the budget$",
    ),
    "a profile without a time": ([*RUN, "--macs", "0.5", "--profile", "p.json"], r"--profile: .* give --latency"),
    "a table of another name": (
        ["compress", "--config", "other.toml", "--out", "o"],
        r"other\.toml: \[buget\]: there is no such table; .*budget",
    ),
    "a name that a table lacks": (
        ["compress", "--config", "names.toml", "--out", "o"],
        r"names\.toml: \[data\]: there is no 'imagesize'; it has name, .*image_size",
    ),
    "evaluate a folder without a run": (["evaluate", "run"], r"^error: run: holds no run"),
    "export a folder without a run": (["export", "run"], r"^error: run: holds no run"),
    "resume where nothing began": (["compress", "--out", "run", "--resume"], r"^error: run: holds no run"),
    "an ending of no file": (
        ["export", "own.pt", "--model", "own.py:build", "--num-classes", "10", "--input", "1,1,8,8", "--to", "a.pth"],
        r"a\.pth: .*\.onnx.*\.pt2",
    ),
    "export an input of another kind": (
        ["export", "own.pt", "--model", "own.py:build", "--num-classes", "10", "--input", "1,3,8,8", "--to", "a.onnx"],
        r"^error: the model does not take inputs of \(1, 3, 8, 8\): .*channels instead$",
    ),
    "a network without numbers": (
        ["compress", "--model", "own.py:on_meta", *RUN[3:], "--macs", "0.5"],
        r"0\.weight is on meta",
    ),
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


@pytest.mark.parametrize("latency", ["2", "2mss", "0"])
def test_a_time_that_makes_no_sense_is_refused_before_anything_is_measured(latency, places, monkeypatch):
    monkeypatch.setattr(profiling, "measured_profile", lambda *_, **__: pytest.fail("was measured"))
    found = CliRunner().invoke(app, [*RUN, "--latency", latency])
    assert (found.exit_code, "a time such as" in found.output) == (2, True), found.output


def test_a_forward_that_never_ends_is_named_before_it_is_run(monkeypatch):
    class Endless(nn.Module):
        def forward(self, x):
            while x.device.type == "meta":
                x = x + 1
            raise RuntimeError("was run")

    monkeypatch.setattr("espalier.run.compress.trace", partial(es.trace, time_limit=0.2))
    with pytest.raises(TraceTimeout, match="time limit"):
        es.compress(Endless(), es.load_data("digits"), budget=HALF, method=es.Magnitude())


@pytest.mark.parametrize(("processes", "gpus"), [(2, 0), (1, 2)])
def test_hugging_faces_callback_refuses_several_processes_and_says_what_to_use(processes, gpus, monkeypatch):
    """With a stand-in for transformers, which CI does not install."""
    stand_in = SimpleNamespace(TrainerCallback=type("TrainerCallback", (), {}))
    monkeypatch.setattr("espalier.optional.import_transformers", lambda: stand_in)
    spec = find_spec("espalier.trainers.huggingface")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    model, several = net(), SimpleNamespace(world_size=processes, n_gpu=gpus)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    callback = module.Compression(HALF, es.DPRP(), example=X)
    with pytest.raises(
        ValueError, match=r"one process on one GPU.*in several train with es\.lightning\.Compression"
    ) as caught:
        callback.on_init_end(several, None, None, model=model)
    assert "\n" not in str(caught.value)
    assert callback.run is None
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
