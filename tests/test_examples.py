"""Every example runs as it stands, on tiny data: the ways in which people come with a network."""

import importlib.util
import re
import shlex
import subprocess

import numpy as np
import pytest
from test_readme import REPOSITORY, run_forked
from typer.testing import CliRunner

import espalier as es
from benchmarks.vision_ops import torchvision
from espalier.optional import import_lightning
from espalier.run.models import CIFAR_MODELS
from tests.steps import export_quickly, tiny

EXAMPLES = REPOSITORY / "examples"
ROWS = {
    "own_loop.py": (["--epochs", "1"], (), r"of the dense MACs"),
    "lightning_loop.py": (["--epochs", "1"], ("lightning", "torchvision"), r"of the dense MACs"),
    "segmentation.py": (["--epochs", "1", "--images", "32"], (), r"mean_iou .* proven"),
    "detection.py": (["--epochs", "1", "--images", "8", "--by-loss"], ("torchvision",), r"detection_loss .* proven"),
    "yolo.py": (
        ["--data", "tiny.yaml", "--epochs", "2", "--imgsz", "64", "--batch", "8"],
        ("ultralytics", "onnx", "onnxruntime"),
        r"(4\d\.\d|50\.0)% of the dense MACs",
    ),
}
"""File -> arguments, packages that it needs, what it says at the end."""


def absent(packages):
    return [name for name in packages if importlib.util.find_spec(name) is None]


@pytest.mark.parametrize("name", ROWS)
def test_an_example_runs(name, tmp_path, monkeypatch):
    arguments, packages, says = ROWS[name]
    if lacking := absent(packages):
        pytest.skip(f"without {', '.join(lacking)}")
    if name == "yolo.py":
        boxes_in_yolos_layout(tmp_path)
        monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
        monkeypatch.setenv("YOLO_OFFLINE", "true")
        monkeypatch.setenv("YOLO_AUTOINSTALL", "false")
    if {"torchvision", "ultralytics"} & {*packages}:
        torchvision()
    if "lightning" in packages:
        import_lightning()
    done = run_forked(EXAMPLES / name, *arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(says, done.stdout), done.stdout


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.*")} == {*ROWS, "classifier.sh", "service.py", "two_processes.py"}


def boxes_in_yolos_layout(folder):
    from PIL import Image

    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for number in range(8):
            picture = random.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(picture).save(folder / "images" / split / f"{number}.png")
            (folder / "labels" / split / f"{number}.txt").write_text("0 0.5 0.5 0.4 0.4\n")
    (folder / "tiny.yaml").write_text(f"path: {folder}\ntrain: images/train\nval: images/val\nnames: [thing]\n")


def test_the_classifier_of_the_command_line_goes_from_pictures_to_a_service(tmp_path, monkeypatch):
    """The commands of the shell script one by one, in this process."""
    if lacking := absent(("torchvision", "PIL", "onnx", "onnxruntime")):
        pytest.skip(f"without {', '.join(lacking)}")
    from PIL import Image

    from espalier.present.cli import app

    random = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 4)):
        for value, name in ((60, "dark"), (190, "light")):
            (tmp_path / "pictures" / split / name).mkdir(parents=True)
            for number in range(count):
                picture = (value + random.integers(-40, 40, (16, 16, 3))).astype(np.uint8)
                Image.fromarray(picture).save(tmp_path / "pictures" / split / name / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(CIFAR_MODELS, "tiny", tiny)  # a known name, so that nothing has to be trusted
    export_quickly(monkeypatch)
    said = ""
    for command in commands(EXAMPLES / "classifier.sh", pictures="pictures", model="tiny", epochs="1"):
        found = CliRunner().invoke(app, command)
        assert found.exit_code == 0, f"espalier {shlex.join(command)}\n{found.output}"
        said += found.output
    assert (tmp_path / "small.onnx").stat().st_size > 0
    assert re.search(r"small\.onnx +1 .*x", said)
    picture = str(tmp_path / "pictures" / "val" / "dark" / "0.png")
    served = run_forked(EXAMPLES / "service.py", "runs/half", picture, folder=tmp_path)
    assert re.search(r"0\.png: (dark|light) \(\d+%\)", served.stdout), served.stderr
    dense, small = (es.load_run(folder) for folder in ("runs/dense", "runs/half"))
    example = es.load_data("imagefolder:pictures").example()
    share = es.cost(es.trace(small, example, rehearse=False)).fraction_of(
        es.cost(es.trace(dense, example, rehearse=False))
    )
    assert share["macs"] <= 0.5


def commands(script, **values):
    """The arguments of every ``espalier`` command in a shell script, with its variables as given."""
    text = script.read_text().replace("\\\n", " ")
    for name, value in values.items():
        text = text.replace(f"${name}", value)
    return [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("espalier ")]


def test_the_shell_script_is_one():
    assert subprocess.run(["sh", "-n", EXAMPLES / "classifier.sh"]).returncode == 0
