"""What README, docs and examples show runs as it stands there."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from espalier.present.cli import app
from espalier.present.config import hyper_parameters, make_method
from espalier.run.models import CIFAR_MODELS
from tests.forked import forked
from tests.steps import measure_nothing, tiny

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def code_of(page: Path) -> str:
    """All Python blocks of a page, as one program."""
    return "\n".join(BLOCK.findall(page.read_text(encoding="utf-8")))


def commands_of(page: Path) -> list[list[str]]:
    """Arguments of every ``espalier`` command that a page shows."""
    text = re.sub(r"\\\n\s*|\$\(.*?\)", "", page.read_text(encoding="utf-8"))
    found = re.findall(r"^ *(?:srun |torchrun .* -m )*espalier ([a-z]+ .*)$", text, re.MULTILINE)
    return [shlex.split(command, comments=True) for command in found]


def run(arguments: list[str], *, folder: Path) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter in an empty folder, as a reader would have it."""
    paths = [str(REPOSITORY / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def run_forked(script: Path, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The same as ``python SCRIPT ARGUMENTS``, but that all is imported already and runs leave out export and timing."""

    return forked(lambda: run_here(script, *arguments, patch=pytest.MonkeyPatch()), folder=folder)


def run_here(script: Path, *arguments: str, patch: pytest.MonkeyPatch) -> None:
    """The same in this process: for what imports much that other tests need too."""
    measure_nothing(patch)
    patch.setattr(sys, "argv", [str(script), *arguments])
    runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("page", [p for p in PAGES if code_of(p)], ids=lambda page: page.name)
def test_the_code_on_a_page_runs(page, tmp_path, monkeypatch):
    script = tmp_path / "page.py"
    script.write_text(code_of(page), encoding="utf-8")
    if page.name == "shipping.md":  # exports to every kind of file there is
        monkeypatch.chdir(tmp_path)
        monkeypatch.setitem(CIFAR_MODELS, "resnet8", tiny)
        return run_here(script, patch=monkeypatch)
    done = run([str(script)], folder=tmp_path) if page.name == "README.md" else run_forked(script, folder=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", [p for p in PAGES if commands_of(p)], ids=lambda page: page.name)
def test_the_commands_on_a_page_are_understood(page):
    known = typer.main.get_command(app).commands
    for name, *arguments in commands_of(page):
        given = known[name].make_context(name, arguments).params
        if given.get("set"):
            make_method({"method": {"name": given["method"], **hyper_parameters(given["set"])}})


def test_the_scripts_for_slurm_are_scripts():
    page = (REPOSITORY / "docs" / "several_machines.md").read_text(encoding="utf-8")
    scripts = re.findall(r"^    #!/bin/bash\n(?:    .*\n)+", page, re.MULTILINE)
    assert len(scripts) == 2
    for script in scripts:
        done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert "#SBATCH" in script and "srun" in script


def test_the_first_result_takes_ten_lines():
    first = BLOCK.search((REPOSITORY / "README.md").read_text(encoding="utf-8"))
    assert first is not None
    assert len([line for line in first[1].splitlines() if line.strip()]) <= 10


def test_every_link_to_a_file_leads_somewhere():
    found = [(page, re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))) for page in PAGES]
    assert [(page.name, t) for page, targets in found for t in targets if not (page.parent / t).exists()] == []
