"""The command line: what it prints, what it leaves behind, and how it says no."""

import json
import tomllib

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

import espalier as es
from espalier import __version__
from espalier.methods.lc import PenaltyDiverged
from espalier.plan import Budget
from espalier.present import demo
from espalier.present.cli import app
from espalier.present.config import hyper_parameters
from espalier.present.runs import read_run
from espalier.run import anatomy, timed
from espalier.run.evaluate import pick_device
from espalier.run.loop import TrainingDiverged
from espalier.run.models import build_model
from espalier.run.onnx import export_onnx, to_onnx_bytes
from espalier.run.recipe import Recipe
from espalier.run.rundir import to_toml
from espalier.timing import closing, making, on_device
from tests.steps import export_quickly


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch):
    monkeypatch.delenv("ESPALIER_DEBUG", raising=False)


def espalier(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_the_version_is_the_packages():
    assert espalier("--version").output.split() == ["espalier", __version__]


def test_help_names_every_command():
    text = espalier("--help").output
    assert all(name in text for name in ("compress", "inspect", "evaluate", "export", "demo"))


# -- inspect


def test_inspect_shows_groups_layers_and_what_is_frozen():
    done = espalier("inspect", "resnet20")
    assert done.exit_code == 0
    assert "40,813,184 MACs, 272,474 parameters" in done.output
    assert "layer3.2.conv2" in done.output
    assert "is an output of the model" in done.output


def test_inspect_builds_the_network_for_the_data():
    done = espalier("inspect", "resnet20", "--data", "digits", "--json")
    layers = {row["name"]: row for row in json.loads(done.output)["layers"]}
    assert layers["conv1"]["inputs"] == 1


def test_inspect_takes_shapes_and_classes():
    done = espalier("inspect", "resnet20", "--input", "1,4,16,16", "--num-classes", 7, "--json")
    layers = {row["name"]: row for row in json.loads(done.output)["layers"]}
    assert layers["conv1"]["inputs"] == 4
    assert layers["linear"]["outputs"] == 7


def test_inspect_takes_a_factory_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "mine_for_inspect.py").write_text(
        "from torch import nn\n\n\ndef net(in_channels):\n    return nn.Conv2d(in_channels, 4, 3)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    done = espalier("inspect", "mine_for_inspect:net", "--input", "1,2,8,8", "--json")
    assert json.loads(done.output)["totals"]["params"] == 2 * 4 * 9 + 4


def test_a_factory_of_ones_own_keeps_its_defaults_where_nothing_is_said(tmp_path, monkeypatch):
    (tmp_path / "own_sizes.py").write_text(
        "from torch import nn\n\n\ndef net(num_classes=7, in_channels=2, image_size=6):\n"
        "    head = nn.Linear(4 * (image_size - 2) ** 2, num_classes)\n"
        "    return nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.Flatten(), head)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    done = espalier("inspect", "own_sizes:net", "--json")
    assert done.exit_code == 0, done.output
    layers = {row["name"]: row for row in json.loads(done.output)["layers"]}
    assert (layers["0"]["inputs"], layers["2"]["inputs"], layers["2"]["outputs"]) == (2, 64, 7)


def test_a_factory_keeps_its_classes_where_neither_data_nor_task_say_any(tmp_path, monkeypatch):
    (tmp_path / "own_labels.py").write_text(
        "import torch\nfrom torch import nn\n\nimport espalier as es\n\n\ndef net(num_classes=4):\n"
        "    head = nn.Linear(8, num_classes)\n"
        "    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)\n"
        "\n\ndef data():\n    batch = torch.zeros(8, 1, 6, 6), torch.ones(8, 4)\n    return es.Loaders([batch], [batch])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    job = ("--model", "own_labels:net", "--data", "own_labels:data", "--task", "classification:multi_label=true")
    done = espalier("compress", *job, "--method", "none", "--epochs", 1, "--batch-size", 8, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert es.load_run(tmp_path / "run", trust=True)[4].out_features == 4
    found = read_run(tmp_path / "run", trust=True)  # a row of a report, as runs that compress are
    assert (found.metric.name, found.metrics["small"]["mean_ap"]) == ("mean_ap", 100.0)
    for method in ("none", "magnitude"):  # without the task these are no labels, and nothing is left behind
        done = espalier(
            "compress", *job[:4], "--method", method, "--macs", 0.5, "--batch-size", 8, "--out", tmp_path / "two"
        )
        refused(done, "labels are class numbers", "(8, 4)", "classification:multi_label=true")
        assert not (tmp_path / "two").exists()


# -- how it says no


def refused(done, *words: str) -> None:
    """One message on stderr, exit code 2, no traceback, nothing on stdout."""
    assert done.exit_code == 2, done.output
    assert isinstance(done.exception, SystemExit)
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stdout == ""
    for word in words:
        assert word in done.stderr


def test_an_unknown_network_is_refused_with_what_there_is():
    refused(espalier("inspect", "resnet21"), "resnet21", "resnet20")


def test_a_shape_that_is_none_is_refused():
    refused(espalier("inspect", "resnet20", "--input", "1,three,8,8"), "--input 1,three,8,8")


def test_weights_that_do_not_fit_are_refused_with_a_list(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "w.pt")
    refused(espalier("inspect", "resnet20", "--weights", tmp_path / "w.pt"), "w.pt", "missing", "conv1.weight")


def test_truncated_weights_are_refused(tmp_path):
    path = tmp_path / "w.pt"
    torch.save(build_model("resnet20", num_classes=10).state_dict(), path)
    path.write_bytes(path.read_bytes()[:1000])
    refused(espalier("inspect", "resnet20", "--weights", path), "w.pt", "truncated")


def test_data_that_is_absent_is_refused(tmp_path):
    refused(espalier("inspect", "resnet20", "--data", "cifar10", "--data-dir", tmp_path), str(tmp_path))


def test_with_debug_the_traceback_comes_through(monkeypatch):
    monkeypatch.setenv("ESPALIER_DEBUG", "1")
    done = espalier("inspect", "resnet21")
    assert isinstance(done.exception, ValueError)


# -- a run, from beginning to end


SMALL_RUN = ("--batch-size", 256, "--threads", 1, "--device", "cpu", "--lr", 0.02)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A network of one's own that trains in no time; returns its name."""
    (tmp_path / "tiny_for_cli.py").write_text(
        "from torch import nn\n\n\n"
        "def net(num_classes, in_channels):\n"
        "    return nn.Sequential(nn.Conv2d(in_channels, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),\n"
        "        nn.Conv2d(16, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "tiny_for_cli:net"


def begin(tiny, out, *more: object):
    return espalier(
        "compress", "--model", tiny, "--data", "digits", "--macs", 0.5, "--epochs", 1, *SMALL_RUN, "--out", out, *more
    )


@pytest.mark.usefixtures("unmeasured")
def test_a_run_meets_its_budget_and_leaves_a_folder(tiny, tmp_path):
    done = begin(tiny, tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert "epoch 1/1" in done.output
    assert "strength" in done.output
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["small"]["macs"] <= 0.5 * metrics["dense"]["macs"]
    assert (tmp_path / "run" / "summary.md").read_text().splitlines()[0].endswith("compressed by tcp")
    assert (tmp_path / "run" / "summary.md").read_text().strip() in done.output
    assert {"model.safetensors", "config.toml", "log.csv"} <= {p.name for p in (tmp_path / "run").iterdir()}


@pytest.mark.usefixtures("unmeasured")
def test_evaluate_finds_what_the_run_reported(tiny, tmp_path):
    begin(tiny, tmp_path / "run")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    done = espalier("evaluate", tmp_path / "run", "--trust")
    assert f"accuracy {metrics['small']['accuracy']:.2f} %" in done.output
    assert f"{metrics['small']['macs']:,} MACs" in done.output


@pytest.mark.usefixtures("unmeasured")
def test_the_configuration_repeats_the_run_bit_for_bit(tiny, tmp_path):
    begin(tiny, tmp_path / "one")
    done = espalier("compress", "--config", tmp_path / "one" / "config.toml", "--out", tmp_path / "two", "--trust")
    assert done.exit_code == 0, done.output
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.usefixtures("unmeasured")
def test_an_option_wins_over_the_configuration(tiny, tmp_path):
    begin(tiny, tmp_path / "one")
    config = tmp_path / "one" / "config.toml"
    espalier(
        "compress", "--config", config, "--macs", 0.3, "--method", "magnitude", "--out", tmp_path / "two", "--trust"
    )
    metrics = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert metrics["fraction"]["macs"] <= 0.3
    assert 'name = "magnitude"' in (tmp_path / "two" / "config.toml").read_text()


@pytest.mark.usefixtures("unmeasured")
def test_training_only_leaves_weights_that_can_be_compressed(tiny, tmp_path):
    dense = espalier(
        "compress", "--model", tiny, "--data", "digits", "--method", "none", "--epochs", 1, *SMALL_RUN,
        "--out", tmp_path / "dense",
    )  # fmt: skip
    assert dense.exit_code == 0, dense.output
    file = tmp_path / "dense" / "model.safetensors"
    small = begin(tiny, tmp_path / "small", "--weights", file, "--method", "magnitude")
    assert small.exit_code == 0, small.output
    reported = json.loads((tmp_path / "small" / "metrics.json").read_text())["dense"]["accuracy"]
    assert f"accuracy {reported:.2f} %" in espalier("evaluate", tmp_path / "dense", "--trust").output
    found = espalier("evaluate", file, "--model", tiny, "--data", "digits").output
    assert f"accuracy {reported:.2f} %" in found


@pytest.mark.usefixtures("unmeasured")
def test_export_writes_onnx_that_computes_the_same(tiny, tmp_path):
    pytest.importorskip("onnxruntime")
    begin(tiny, tmp_path / "run")
    done = espalier("export", tmp_path / "run", "--to", tmp_path / "x.onnx", "--trust")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "x.onnx").stat().st_size > 0
    assert "differs from PyTorch by at most" in done.output.replace("\n", " ")


@pytest.mark.usefixtures("unmeasured")
def test_a_run_from_python_is_exported_once_its_network_and_input_are_said(tiny, tmp_path):
    pytest.importorskip("onnxruntime")
    network = build_model(tiny, num_classes=10, in_channels=1)
    run = tmp_path / "run"
    es.compress(network, torch.zeros(1, 1, 8, 8), budget=Budget(macs=0.5), method=es.Magnitude(), out=run)
    where = f"{run / 'config.toml'}: [model] has no "
    refused(espalier("export", run), where + "name, in_channels, image_size; give --model and --input")
    refused(espalier("export", run, "--model", tiny), where + "in_channels, image_size; give --input")
    refused(espalier("export", run, "--input", "1,1,8,8"), where + "name; give --model")
    done = espalier("export", run, "--model", tiny, "--input", "1,1,8,8")
    assert done.exit_code == 0, done.output
    assert (run / "model.onnx").stat().st_size > 0


@pytest.mark.usefixtures("unmeasured")
def test_an_input_given_for_a_run_leaves_its_classes(tiny, tmp_path, monkeypatch):
    begin(tiny, tmp_path / "run", "--method", "none")
    found = []
    monkeypatch.setattr("espalier.present.ship.open_network", lambda path, config: found.append(config["model"]))
    monkeypatch.setattr("espalier.present.ship.export_onnx", lambda *_, **__: 0.0)
    espalier("export", tmp_path / "run", "--input", "1,1,12,12", "--trust")
    assert [(m["num_classes"], m["image_size"]) for m in found] == [(10, 12)]


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_a_run_that_has_not_finished_is_told_to_go_on(command, tiny, tmp_path):
    begin(tiny, tmp_path / "run", "--method", "none")
    (tmp_path / "run" / "model.safetensors").unlink()
    done = espalier(command, tmp_path / "run", "--trust")
    refused(done, f"espalier compress --out {tmp_path / 'run'} --resume", "has not finished")


def test_a_place_that_cannot_be_written_is_refused_before_the_export(tmp_path, monkeypatch):
    def too_early(*_):
        raise AssertionError("it was exported")

    monkeypatch.setattr("espalier.run.onnx.exported", too_early)
    (tmp_path / "file").touch()
    for path, words in ((tmp_path, "is a folder"), (tmp_path / "file" / "x.onnx", "is a file, not a folder")):
        with pytest.raises(ValueError, match=words):
            export_onnx(nn.Linear(2, 2), path, torch.zeros(1, 2))
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ValueError, match="may not be written"):
        export_onnx(nn.Linear(2, 2), tmp_path / "new" / "x.onnx", torch.zeros(1, 2))
    assert not (tmp_path / "new").exists()


def test_what_an_exporter_says_comes_without_colours(monkeypatch):
    pytest.importorskip("onnxruntime")

    def broken(*_):
        raise RuntimeError("\x1b[96mno rule\x1b[0;1m for this\x1b[0m")

    monkeypatch.setattr("espalier.run.onnx._EXPORTERS", (("broken", broken),))
    with pytest.raises(ValueError, match=r"broken: no rule for this; broken with a fixed batch: no rule for this$"):
        to_onnx_bytes(nn.Linear(2, 2), torch.zeros(1, 2))


@pytest.mark.parametrize(("ours", "theirs"), [(1e-6, 2e-6), (0.0, 1e-6)])
def test_a_difference_is_relative_to_outputs_however_small(ours, theirs, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")

    def constant(value):
        network = nn.Linear(2, 2)
        nn.init.zeros_(network.weight)
        nn.init.constant_(network.bias, value)
        return network

    assert export_onnx(constant(ours), tmp_path / "same.onnx", torch.zeros(1, 2)) == 0.0
    wrong = to_onnx_bytes(constant(theirs), torch.zeros(1, 2))
    monkeypatch.setattr("espalier.run.onnx._EXPORTERS", (("liar", lambda *_: wrong),))
    with pytest.raises(ValueError, match="differ from PyTorch's"):
        export_onnx(constant(ours), tmp_path / "m.onnx", torch.zeros(1, 2))


@pytest.mark.usefixtures("unmeasured")
def test_a_folder_that_holds_a_run_is_refused_and_left_alone(tiny, tmp_path):
    begin(tiny, tmp_path / "run")
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    refused(begin(tiny, tmp_path / "run"), str(tmp_path / "run"), "already holds a run")
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before
    assert begin(tiny, tmp_path / "run", "--force").exit_code == 0


@pytest.mark.usefixtures("unmeasured")
def test_ctrl_c_says_how_to_go_on_and_resume_ends_where_the_run_would_have(tiny, tmp_path, monkeypatch):
    two = ("--epochs", 2)
    assert begin(tiny, tmp_path / "whole", *two).exit_code == 0

    def stop(self, history):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("espalier.present.progress.RunProgress.on_epoch", stop)
        done = begin(tiny, tmp_path / "run", *two)
    assert done.exit_code == 130
    assert f"espalier compress --out {tmp_path / 'run'} --resume" in done.stderr
    resumed = espalier("compress", "--out", tmp_path / "run", "--resume", "--trust")
    assert resumed.exit_code == 0, resumed.output
    assert "epoch 2/2" in resumed.output
    assert "epoch 1/2" not in resumed.output
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.usefixtures("unmeasured")
def test_the_demo_compresses_what_it_trained_to_a_share_of_its_time(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    quick = {making: {"NETWORKS": 4, "SECONDS": 0.0}, closing: {"ROUNDS": 1, "SECONDS": 0.0}, timed: {"SECONDS": 0.0}}
    quick |= {on_device: {"OPENINGS": 1, "TURN": 0.0}, anatomy: {"SECONDS": 0.0}}
    for module, values in quick.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    export_quickly(monkeypatch)
    monkeypatch.setattr(demo, "NETWORK", "resnet8")
    monkeypatch.setattr(demo, "BUDGET", {"latency": 0.8})  # of so small a network half cannot be reached everywhere
    for recipe in ("DENSE", "SMALL"):
        monkeypatch.setattr(demo, recipe, {**getattr(demo, recipe), "epochs": 1, "warmup_epochs": 0})
    done = espalier("demo", "--out", tmp_path / "demo")
    assert done.exit_code == 0, done.output
    metrics = json.loads((tmp_path / "demo" / "metrics.json").read_text())
    assert metrics["time"]["asked"] == 0.8
    assert "Time: asked 80% of the dense network's, measured" in done.output
    assert (tmp_path / "demo" / "report.html").exists()


# -- requests that make no sense


@pytest.mark.parametrize(
    "budget", [("--macs", 0), ("--macs", -1), ("--params", "nan"), ("--multiple-of", 0, "--macs", 0.5)]
)
def test_a_budget_that_makes_no_sense_is_refused(tiny, tmp_path, budget):
    done = espalier("compress", "--model", tiny, "--data", "digits", *budget, "--out", tmp_path / "run")
    refused(done, "Budget(")
    assert not (tmp_path / "run").exists()


def test_a_seed_that_no_generator_takes_is_refused(tiny, tmp_path):
    refused(begin(tiny, tmp_path / "run", "--seed", 2**64), "Recipe(seed=18446744073709551616)", str(2**63 - 1))
    assert not (tmp_path / "run").exists()
    assert Recipe(seed=2**63 - 1).seed == 2**63 - 1


@pytest.mark.usefixtures("unmeasured")
def test_the_schedule_of_the_rate_is_an_option(tiny, tmp_path):
    refused(begin(tiny, tmp_path / "run", "--schedule", "step"), "Recipe(schedule='step')", "cosine, constant, wsd")
    assert not (tmp_path / "run").exists()
    for name in ("cosine", "wsd"):
        done = begin(tiny, tmp_path / name, "--schedule", name, "--method", "none", "--force")
        assert done.exit_code == 0, done.output
        assert f'schedule = "{name}"' in (tmp_path / name / "config.toml").read_text()
    cosine, wsd = (load_file(tmp_path / name / "model.safetensors") for name in ("cosine", "wsd"))
    assert not all(torch.equal(cosine[name], wsd[name]) for name in cosine)


def test_a_device_that_holds_no_numbers_is_refused(tiny, tmp_path):
    refused(begin(tiny, tmp_path / "run", "--device", "meta"), "device 'meta'", "no numbers")
    with pytest.raises(ValueError, match="meta"):
        pick_device(torch.device("meta"))


def test_numbers_of_numpy_become_plain_ones():
    recipe = Recipe(
        epochs=np.int64(3), lr=np.float64(0.1), ema=np.float32(0.5), weight_decay=np.int32(0), seed=np.uint8(7)
    )
    plain = {"epochs": 3, "lr": 0.1, "ema": 0.5, "weight_decay": 0, "seed": 7}
    assert {name: getattr(recipe, name) for name in plain} == plain
    assert [type(getattr(recipe, name)) for name in plain] == [
        int,
        float,
        float,
        float,
        int,
    ]  # as the field is declared
    table = {"a": np.float64(0.1), "b": np.float32(0.5), "c": np.int64(3), "d": [np.float64(1e-5)], "e": float("inf")}
    assert tomllib.loads(to_toml(table)) == {"a": 0.1, "b": 0.5, "c": 3, "d": [1e-5], "e": float("inf")}


def test_no_budget_at_all_is_refused(tiny, tmp_path):
    refused(espalier("compress", "--model", tiny, "--data", "digits", "--out", tmp_path / "run"), "--macs 0.5")


@pytest.mark.usefixtures("unmeasured")
def test_a_method_that_finds_the_size_needs_no_budget_and_takes_its_settings(tiny, tmp_path):
    run = ("compress", "--model", tiny, "--data", "digits", "--epochs", 1, *SMALL_RUN, "--method", "dprp")
    refused(espalier(*run, "--out", tmp_path / "none"), "--macs 0.5")
    settings = ("--set", "energy=0.3", "--set", "form=channel", "--set", "every=0.2")
    done = espalier(*run, *settings, "--multiple-of", 2, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "run" / "history.json").read_text())["rank"]
    assert any(len(points) > 1 for points in found.values())
    config = (tmp_path / "run" / "config.toml").read_text()
    assert "energy = 0.3" in config
    assert 'form = "channel"' in config
    again = espalier("compress", "--config", tmp_path / "run" / "config.toml", "--out", tmp_path / "again", "--trust")
    assert again.exit_code == 0, again.output


@pytest.fixture
def depthwise(tmp_path, monkeypatch):
    (tmp_path / "mine_with_depthwise.py").write_text(
        "from torch import nn\n\n\n"
        "def net(num_classes, in_channels):\n"
        "    layers = [nn.Conv2d(in_channels, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU()]\n"
        "    layers += [nn.Conv2d(24, 24, 3, groups=24), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 30, 1), nn.ReLU()]\n"
        "    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(30, num_classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "mine_with_depthwise:net"


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize(("options", "multiple", "width"), [((), 4, 12), (("--multiple-of", 1), 1, 14)], ids=str)
def test_depthwise_layers_keep_widths_that_run_fast_unless_asked_otherwise(
    depthwise, tmp_path, options, multiple, width
):
    run = ("compress", "--model", depthwise, "--data", "digits", "--epochs", 1, *SMALL_RUN, "--method", "magnitude")
    done = espalier(*run, "--macs", 0.6, *options, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert f"multiple_of = {multiple}" in (tmp_path / "run" / "config.toml").read_text()
    assert len(load_file(tmp_path / "run" / "model.safetensors")["3.weight"]) == width
    slow = json.loads((tmp_path / "run" / "metrics.json").read_text())["slow_widths"]
    assert slow == (["3"] if options else [])
    summary = (tmp_path / "run" / "summary.md").read_text()
    assert ("channel by channel" in summary) == bool(options)
    assert ("multiples of 4" in summary) == (not options)


@pytest.mark.usefixtures("unmeasured")
def test_widths_are_multiples_of_four_where_nothing_is_said(tiny, tmp_path):
    done = begin(tiny, tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert "multiples of 4" in (tmp_path / "run" / "summary.md").read_text()
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert [len(weights[n]) % 4 for n in ("0.weight", "3.weight")] == [0, 0]
    assert "multiple_of = 4" in (tmp_path / "run" / "config.toml").read_text()


@pytest.mark.usefixtures("unmeasured")
def test_a_budget_below_the_smallest_multiple_is_met_by_other_widths(tiny, tmp_path):
    run = ("compress", "--model", tiny, "--data", "digits", "--epochs", 1, *SMALL_RUN, "--macs", 0.03)
    refused(
        espalier(*run, "--multiple-of", 4, "--out", tmp_path / "refused"), "smallest reachable", "lower multiple_of"
    )
    done = espalier(*run, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert "multiple_of = 1" in (tmp_path / "run" / "config.toml").read_text()
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["fraction"]["macs"] <= 0.03


@pytest.mark.parametrize("text", ["energy", "=0.1", "energy="])
def test_a_setting_that_is_none_is_refused(tiny, tmp_path, text):
    done = espalier("compress", "--model", tiny, "--data", "digits", "--set", text, "--out", tmp_path / "run")
    refused(done, "NAME=VALUE")


@pytest.mark.parametrize(("text", "value"), [("False", False), ("TRUE", True), ("true", True), ("falsey", "falsey")])
def test_true_and_false_are_switches_however_they_are_written(text, value):
    assert hyper_parameters([f"streams={text}"]) == {"streams": value}


def test_a_setting_cannot_choose_another_method(tiny, tmp_path):
    done = begin(tiny, tmp_path / "run", "--method", "tcp", "--set", "name=dprp")
    refused(done, "--set name=dprp", "--method")
    assert not (tmp_path / "run").exists()


def test_an_unreachable_budget_is_refused_with_the_smallest(tiny, tmp_path):
    done = espalier("compress", "--model", tiny, "--data", "digits", "--macs", 1e-6, "--out", tmp_path / "run")
    refused(done, "smallest reachable")


@pytest.mark.parametrize(
    ("missing", "given"),
    [
        ("--out", ("--model", "resnet20", "--data", "digits", "--macs", 0.5)),
        ("--data", ("--model", "resnet20", "--macs", 0.5, "--out", "nowhere")),
        ("--model", ("--data", "digits", "--macs", 0.5, "--out", "nowhere")),
    ],
)
def test_what_is_missing_is_named(missing, given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(espalier("compress", *given), f"{missing} is missing")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("unmeasured")
def test_what_a_runs_configuration_lacks_is_named_with_file_and_section(tiny, tmp_path):
    """These commands have no --config that could hold it."""
    run, file = tmp_path / "run", tmp_path / "run" / "config.toml"
    begin(tiny, run, "--method", "none")
    whole = file.read_text()
    for section, lacks in (("model", f'name = "{tiny}"'), ("data", 'name = "digits"')):
        file.write_text(whole.replace(lacks, "", 1))
        words = f"{file}: [{section}] has no name; say it with --{section}"
        refused(espalier("evaluate", run, "--trust"), words)
        refused(espalier("export", run, "--int8", "--trust"), words)
        refused(espalier("compress", "--resume", "--out", run, "--trust"), words)
        assert "--config" not in espalier("evaluate", run, "--trust").stderr
    file.write_text(whole.replace("image_size = 8", "", 1))
    refused(espalier("time", run, "--trust"), f"{file}: [model] has no image_size; build that network")
    refused(espalier("export", run, "--trust"), f"{file}: [model] has no image_size; give --input")


@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_what_a_file_of_weights_does_not_say_is_asked_for(command, tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "w.pt")
    done = espalier(command, tmp_path / "w.pt")
    refused(
        done, f"error: {tmp_path / 'w.pt'}: is a file; say with --model whose weights they are, or give a run folder\n"
    )
    if command == "evaluate":
        refused(espalier(command, tmp_path / "w.pt", "--model", "resnet8"), "error: --data is missing: give it\n")


def test_an_unknown_method_is_refused_with_what_there_is(tmp_path):
    done = espalier(
        "compress",
        "--model",
        "resnet20",
        "--data",
        "digits",
        "--macs",
        0.5,
        "--method",
        "magic",
        "--out",
        tmp_path / "r",
    )
    refused(done, "magic", "tcp", "magnitude")


def test_nothing_to_resume_is_refused(tmp_path):
    refused(espalier("compress", "--out", tmp_path / "none", "--resume"), str(tmp_path / "none"))


@pytest.mark.usefixtures("unmeasured")
def test_resuming_with_another_method_is_refused(tiny, tmp_path):
    begin(tiny, tmp_path / "run")
    refused(begin(tiny, tmp_path / "run", "--resume", "--method", "magnitude"), "another method")


def test_a_configuration_that_is_none_is_refused(tmp_path):
    (tmp_path / "config.toml").write_text("= nonsense")
    refused(espalier("compress", "--config", tmp_path / "config.toml", "--out", tmp_path / "r"), "config.toml", "TOML")


@pytest.mark.parametrize("command", ["compress", "evaluate", "report"])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model = 3", ("model = 3", "table")),
        ("start = 3", ("start = 3", "table")),
        ("[[recipe]]\nepochs = 1", ("recipe", "table")),
        ("[model]\nname = 3", ("[model] name = 3", "text")),
        ("[model]\nweights = true", ("[model] weights = True", "text")),
        ("[data]\nname = 5", ("[data] name = 5", "text")),
        ('[data]\nholdout = "3"', ("[data] holdout = '3'", "whole number")),
        ("[data]\nimage_size = true", ("[data] image_size = True", "whole number")),
        ("[budget]\nprotect = 3", ("[budget] protect = 3", "names")),
        ("[budget]\nprotect = [3]", ("[budget] protect = [3]", "names")),
        ('[method]\nname = ["tcp"]', ("[method] name = ['tcp']", "text")),
        ("", ("no configuration",)),
        ("[model]\n", ("no configuration",)),
    ],
)
def test_a_configuration_with_values_of_another_kind_is_refused(command, text, words, tmp_path):
    (tmp_path / "config.toml").write_text(text)
    (tmp_path / "metrics.json").write_text("{}")
    options = ("--out", tmp_path, "--resume") if command == "compress" else (tmp_path,)
    refused(espalier(command, *options), str(tmp_path / "config.toml"), *words)


@pytest.mark.usefixtures("unmeasured")
def test_a_run_folder_is_a_configuration(tiny, tmp_path):
    begin(tiny, tmp_path / "one", "--method", "magnitude")
    done = espalier("compress", "--config", tmp_path / "one", "--out", tmp_path / "two", "--trust")
    assert done.exit_code == 0, done.output
    assert 'name = "magnitude"' in (tmp_path / "two" / "config.toml").read_text()
    (tmp_path / "empty").mkdir()
    done = espalier("compress", "--config", tmp_path / "empty", "--out", tmp_path / "three")
    refused(done, str(tmp_path / "empty" / "config.toml"), "no such file")


@pytest.mark.parametrize("protect", [3, [3], None])
def test_what_is_protected_is_given_by_name(protect):
    with pytest.raises(ValueError, match=r"Budget\(protect=.*names"):
        Budget(macs=0.5, protect=protect)


@pytest.mark.usefixtures("unmeasured")
def test_a_hyper_parameter_that_does_not_exist_is_refused(tiny, tmp_path):
    begin(tiny, tmp_path / "one")
    config = tmp_path / "one" / "config.toml"
    config.write_text(config.read_text().replace("[recipe]\n", "[recipe]\nspeed = 3\n"))
    refused(espalier("compress", "--config", config, "--out", tmp_path / "two", "--trust"), "speed")


def test_a_loss_that_is_not_finite_stops_the_run_with_the_step(tiny, tmp_path):
    done = begin(tiny, tmp_path / "run", "--lr", 1e30)
    assert done.exit_code == 2
    assert "diverged in epoch 1 at step" in done.stderr


def test_the_log_goes_to_tensorboard_as_well(tiny, tmp_path, unmeasured):
    pytest.importorskip("tensorboard")
    assert begin(tiny, tmp_path / "run", "--log", "csv,tensorboard").exit_code == 0
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))


@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_a_path_that_is_not_there_is_refused(command, tmp_path):
    refused(espalier(command, tmp_path / "gone"), str(tmp_path / "gone"), "no such")


def test_a_folder_without_a_network_is_refused(tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(espalier("evaluate", tmp_path / "empty"), "config.toml")


@pytest.mark.usefixtures("unmeasured")
def test_a_disk_that_became_full_says_how_to_go_on(tiny, tmp_path, monkeypatch):
    def full(self, history):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("espalier.present.progress.RunProgress.on_epoch", full)
    done = begin(tiny, tmp_path / "run")
    assert done.exit_code == 2
    assert (
        "No space left" in done.stderr and f"then go on with: espalier compress --out {tmp_path / 'run'}" in done.stderr
    )
    monkeypatch.setattr("espalier.run.rundir.write_file", full)
    done = begin(tiny, tmp_path / "other")
    assert done.exit_code == 2 and "go on with" not in done.stderr  # nothing has begun


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt, 130), (es.TrainingStopped, 143)])
def test_a_stop_that_an_import_turned_into_an_error_is_a_stop(tiny, tmp_path, monkeypatch, stop, code):
    def imported(self, history):
        raise ImportError("initialization failed") from stop("stopped by somebody")

    monkeypatch.setattr("espalier.present.progress.RunProgress.on_epoch", imported)
    done = begin(tiny, tmp_path / "run")
    assert done.exit_code == code and "initialization" not in done.stderr
    assert f"go on with: espalier compress --out {tmp_path / 'run'} --resume" in done.stderr


# -- errors


@pytest.mark.parametrize("arguments", [["--version"], ["inspect", "resnet8"], ["inspect", "resnet8", "--json"]])
def test_no_room_for_what_is_printed_is_said(arguments, monkeypatch):
    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rich.console.Console._write_buffer", full)
    said = []
    monkeypatch.setattr("espalier.present.edge.say_error", said.append)
    assert espalier(*arguments).exit_code == 2
    assert str(said[0]).startswith("what is printed: cannot be written (No space left on device); make room")


@pytest.mark.parametrize("kind", [ValueError, PenaltyDiverged, TrainingDiverged])
def test_what_a_user_can_mend_is_one_line_just_as_it_stands(monkeypatch, kind):
    def fail(*arguments, **given):
        raise kind("[bold]usermod:boom: LC iteration 3")

    monkeypatch.setattr("espalier.present.config.build_model", fail)
    done = espalier("inspect", "resnet20")
    assert done.exit_code == 2
    assert done.stderr == "error: [bold]usermod:boom: LC iteration 3\n"
