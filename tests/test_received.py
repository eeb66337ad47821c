"""Folders and files from somebody else are data: nothing runs that they name, nothing is allocated that they ask for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from typer.testing import CliRunner

import espalier as es
from espalier.present.cli import app
from espalier.run.rundir import to_toml
from tests.steps import measure_nothing

SPY = """from pathlib import Path

from torch import nn

Path(__file__).with_name("it ran").touch()


def net(num_classes, in_channels):
    return nn.Sequential(nn.Conv2d(in_channels, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
"""


def espalier(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refused(done: Any, *words: str) -> None:
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr


@pytest.fixture
def spy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module that leaves a trace when it is imported; the current folder, as for who looks into it."""
    (tmp_path / "spy_in_a_run.py").write_text(SPY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "spy_in_a_run", raising=False)
    return tmp_path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a network of one's own."""
    folder = tmp_path_factory.mktemp("received")
    with pytest.MonkeyPatch.context() as patch:
        measure_nothing(patch)
        scope: dict[str, Any] = {"__file__": str(folder / "spy")}
        exec(SPY, scope)
        data = es.load_data("digits")
        es.compress(
            scope["net"](10, 1), data.example(), budget=es.Budget(macs=0.5), method=es.Magnitude(), out=folder / "run",
            config={"model": _section("spy_in_a_run:net"), "data": {"name": "digits"}},
        )  # fmt: skip
    return folder / "run"


def _section(name: str, **sizes: int) -> dict[str, Any]:
    return {"name": name, "num_classes": 10, "in_channels": 1, "image_size": 8, **sizes}


def copied(run: Path, to: Path, **model: Any) -> Path:
    """The run, with another section of its model."""
    to.mkdir()
    for file in run.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    tables = {"model": model, "data": {"name": "digits"}, "budget": {"macs": 0.5}, "method": {"name": "magnitude"}}
    (to / "config.toml").write_text(to_toml({**tables, "recipe": {"epochs": 0}, "start": {"trained": False}}))
    return to


COMMANDS: dict[str, tuple[str, ...]] = {
    "evaluate": ("evaluate", "RUN"),
    "export": ("export", "RUN", "--to", "x.onnx"),
    "compress --config": ("compress", "--config", "RUN", "--out", "new"),
    "compress --resume": ("compress", "--out", "RUN", "--resume"),
}


@pytest.mark.parametrize("name", ["spy_in_a_run:net", "os:abort", "builtins:exec", "a.b:c"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_received_folder_runs_no_code(command: str, name: str, run: Path, spy: Path) -> None:
    folder = copied(run, spy / "got", **_section(name))
    refused(espalier(*(str(folder) if a == "RUN" else a for a in COMMANDS[command])), "config.toml", name, "--trust")
    assert not (spy / "it ran").exists() and not (spy / "new").exists()


@pytest.mark.parametrize("name", ["spy_in_a_run:net", "os:abort"])
def test_the_report_of_a_received_folder_runs_no_code_and_draws_every_layer(name: str, run: Path, spy: Path) -> None:
    folder = copied(run, spy / "got", **_section(name))
    assert espalier("report", folder, "--out", spy / "page.html").exit_code == 0
    html = (spy / "page.html").read_text()
    assert not (spy / "it ran").exists()
    assert "The network, layer by layer" in html and "Not timed: " in html and "--trust" in html


@pytest.mark.parametrize("how", [("--trust",), ("--model", "spy_in_a_run:net")], ids=" ".join)
def test_code_runs_where_the_user_says_so(how: tuple[str, ...], run: Path, spy: Path) -> None:
    done = espalier("evaluate", run, *how)
    assert done.exit_code == 0, done.output
    assert (spy / "it ran").exists()


def test_a_trusted_report_times_layers(run: Path, spy: Path) -> None:
    assert espalier("report", run, "--trust", "--out", spy / "page.html").exit_code == 0
    assert "Not drawn" not in (spy / "page.html").read_text() and (spy / "it ran").exists()


@pytest.mark.parametrize("command", [*COMMANDS, "report"])
@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("model", "num_classes", 10**12), ("model", "in_channels", 10**9), ("model", "image_size", 0)],
)
def test_sizes_of_a_configuration_are_bounded(
    command: str, section: str, key: str, value: int, run: Path, spy: Path
) -> None:
    folder = copied(run, spy / "got", **_section("resnet20", **{key: value}))
    arguments = COMMANDS.get(command, ("report", "RUN"))
    refused(
        espalier(*(str(folder) if a == "RUN" else a for a in arguments)), "config.toml", f"[{section}] {key}", "1 to"
    )


def test_layers_in_the_metrics_are_what_the_networks_have(run: Path, spy: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    assert sum(row["dense_macs"] for row in metrics["layers"]) == metrics["dense"]["macs"]
    assert sum(row["small_macs"] for row in metrics["layers"]) == metrics["small"]["macs"]
    scope: dict[str, Any] = {"__file__": str(spy / "spy")}
    exec(SPY, scope)
    small = es.load(run / "model.safetensors", base=scope["net"](10, 1))
    widths = [m.weight.shape[0] for m in small.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert [row["small"][-1]["outputs"] for row in metrics["layers"]] == widths
