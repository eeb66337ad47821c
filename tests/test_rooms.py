"""A room imports only from rooms above it, and importing the package stays cheap."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "espalier"
ORDER = [
    "settings",  # how a field of settings says what it allows
    "seals",  # checksums
    "optional",  # packages that need not be there
    "layers",  # our own nn.Module classes
    "copies",
    "carving",
    "graph",
    "plan",
    "costs",
    "solver",
    "forms",
    "surgery",
    "timing",
    "tasks",  # what a network is for: loss, metric, teacher
    "methods",
    "run",
    "trainers",  # compression inside the trainers of others
    "deploy",  # files that run without Espalier
    "present",
]
FACADE = "espalier"  # __init__.py and __main__.py: may see every room, no room may see them


def room_of(module: str) -> str:
    """The room a dotted module name belongs to, or the facade."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ORDER else FACADE


def module_name(path: Path) -> str:
    parts = ["espalier", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(source: str, *, module: str, is_package: bool) -> list[tuple[int, str]]:
    """Every module of ours that the source imports anywhere, functions included, as (line, dotted name)."""
    here = module.split(".") if is_package else module.split(".")[:-1]
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            # "from espalier.run import data" imports the module espalier.run.data
            found += [(node.lineno, f"{origin}.{alias.name}") for alias in node.names]
    return [(line, name) for line, name in found if name.split(".")[0] == "espalier"]


def violations(source: str, *, module: str, is_package: bool = False) -> list[str]:
    """What the source imports from its own or an upper floor that it may not see."""
    room = room_of(module)
    if room == FACADE:
        return []
    wrong = []
    for line, name in imported_modules(source, module=module, is_package=is_package):
        target = room_of(name)
        if name == "espalier.__version__" or target == room:
            continue
        if target == FACADE or ORDER.index(target) > ORDER.index(room):
            wrong.append(f"{module}:{line} ({room}) imports {name} ({target})")
    return wrong


SOURCES = sorted(PACKAGE.rglob("*.py"))


def test_a_room_imports_only_from_rooms_above():
    found = [
        wrong
        for path in SOURCES
        for wrong in violations(path.read_text(), module=module_name(path), is_package=path.name == "__init__.py")
    ]
    assert SOURCES and not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("espalier.graph.trace", "from espalier.plan import Budget"),
        ("espalier.graph.trace", "from ..plan import Budget"),
        ("espalier.graph.trace", "from espalier import plan"),
        ("espalier.plan.fit", "def f():\n    import espalier.methods.tcp"),
        ("espalier.costs", "import espalier"),
        ("espalier.run.data", "from espalier import compress"),
        ("espalier.layers", "from espalier.graph import Graph"),
        ("espalier.graph.trace", "from espalier.forms import svd"),
    ],
)
def test_the_check_sees_a_forbidden_import(module, source):
    assert len(violations(source, module=module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("espalier.graph.trace", "from espalier.layers import ChannelPad"),
        ("espalier.graph.trace", "from espalier import layers"),
        ("espalier.plan.fit", "from ..graph import Graph\nfrom .budget import Budget"),
        ("espalier.present.cli", "from espalier import __version__\nfrom espalier.run.data import load_data"),
    ],
)
def test_the_check_lets_an_allowed_import_pass(module, source):
    assert violations(source, module=module) == []


def test_every_source_lies_in_a_known_room():
    homeless = [
        module_name(path)
        for path in SOURCES
        if room_of(module_name(path)) == FACADE and path.name not in ("__init__.py", "__main__.py")
    ]
    assert homeless == []


@pytest.fixture(scope="module")
def fresh():
    """What a process says that imports the package, traces, and imports the command line, then torchvision and timm."""
    code = (
        "import sys, torch, espalier; from espalier.run.models import build_model\n"
        "espalier.trace(build_model('resnet8', num_classes=10), torch.zeros(1, 3, 32, 32))\n"
        "print('typer' in sys.modules); import espalier.present.cli\n"
        "print(*sorted({'.'.join(name.split('.')[:2]) for name in sys.modules}), flush=True)\n"
        "from espalier.optional import import_timm, import_torchvision\n"
        "import_timm(); print(import_torchvision().models.resnet18().fc.out_features)"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_neither_importing_nor_tracing_nor_the_command_line_imports_what_takes_seconds(fresh):
    typer, loaded, *_ = fresh.stdout.splitlines()
    heavy = {
        "timm",
        "torchvision",
        "onnx",
        "onnxruntime",
        "onnxscript",
        "sklearn",
        "matplotlib",
        "jinja2",
        "torch._dynamo",
    }
    assert typer == "False" and heavy & set(loaded.split()) == set()


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="without timm")
def test_torchvision_and_timm_import_in_a_fresh_process(fresh):
    assert fresh.stdout.splitlines()[2:] == ["1000"], fresh.stderr
