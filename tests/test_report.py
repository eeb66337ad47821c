"""The report: what it says is what the run measured, nothing comes from outside, and figures show in a real browser."""

import csv
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import espalier as es
from espalier.forms import find_places
from espalier.forms.sequences import sequential
from espalier.present.cli import app
from espalier.present.html import as_csv, page, sentence
from espalier.present.runs import read_run
from espalier.run.anatomy import layers_of, timed
from espalier.run.charts import Dot, Line, dot_chart, frontier, line_chart, rank_bars
from espalier.run.report import summary
from espalier.run.rundir import add_widths
from tests.steps import export_quickly

EXAMPLE = torch.zeros(1, 1, 8, 8)
RESNET = {"name": "resnet8", "num_classes": 10, "in_channels": 1, "image_size": 8}


def report(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run of two epochs."""
    out = tmp_path_factory.mktemp("report") / "a run <&> more"
    recipe = es.Recipe(epochs=2, batch_size=256, lr=0.02, device="cpu", threads=1)
    with pytest.MonkeyPatch.context() as patch:
        export_quickly(patch)
        es.compress(
            es.build_model("resnet8", num_classes=10, in_channels=1, image_size=8),
            es.load_data("digits"),
            budget=es.Budget(macs=0.5, params=0.6),
            recipe=recipe,
            out=out,
            config={"model": RESNET, "data": {"name": "digits"}},
        )
    return out


@pytest.fixture(scope="module")
def html(folder):
    return page([read_run(folder)], timing=False)


@pytest.fixture
def no_figures(monkeypatch):
    """For tests of what the page says in words: drawing costs half a second."""
    monkeypatch.setattr("espalier.present.html.figures_of", lambda run: [])


def figures(html):
    return re.findall(r"<svg .*?</svg>", html, re.DOTALL)


def test_the_numbers_are_those_of_the_metrics(folder, html):
    metrics = json.loads((folder / "metrics.json").read_text())
    assert f"<td>{metrics['small']['accuracy']:.2f}</td>" in html
    for side in ("dense", "small"):
        for cost in ("macs", "params", "activation_memory", "bytes"):
            assert f"<td>{metrics[side][cost]:,}</td>" in html
    for limit in metrics["limits"].values():
        assert f"<td>{limit:,}</td>" in html
    assert "Every limit is kept." in html


def test_accuracy_is_compared_with_that_of_a_trained_network_only(folder):
    run = read_run(folder)
    trained = replace(run, config={**run.config, "start": {**run.config["start"], "trained": True}})
    before = f"<td>{run.metrics['dense']['accuracy']:.2f}</td>"
    alone, after = (page([r], timing=False) for r in (run, trained))
    assert before in after and " points<" in after and ">dense</text>" in after
    assert before not in alone and " points<" not in alone and ">dense</text>" not in alone
    assert "<td>untrained</td>" in alone and "untrained" not in after
    assert before not in page([run, run], timing=False)
    text = (folder / "summary.md").read_text()
    assert "| test accuracy, % | untrained |" in text and "points" not in text
    assert re.search(
        r"\| test accuracy, % \| [\d.]+ \| [\d.]+ \| [+-][\d.]+ points \|", summary(run.metrics, trained.config)
    )


def test_a_limit_that_is_exceeded_is_not_called_kept(folder, no_figures):
    run = read_run(folder)
    tight = {**run.metrics, "limits": {"macs": run.metrics["small"]["macs"] - 1}}
    assert "A LIMIT IS EXCEEDED." in page([replace(run, metrics=tight)], timing=False)


@pytest.mark.parametrize(
    ("example", "words"),
    [
        (torch.zeros(1, 8), "costs are those of a single input."),
        (torch.zeros(3, 8), "costs are those of the example input (batch 3)."),
        ({"input": torch.zeros(3, 8)}, "costs are those of the example input (batch 3)."),
        ((torch.zeros(3, 8),), "costs are those of the example input (batch 3)."),
        (torch.zeros(8), "costs are those of the example input."),
    ],
)
def test_the_summary_says_what_the_costs_are_those_of(example, words, tmp_path, unmeasured, no_figures):
    network = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    es.compress(network, example, budget=es.Budget(macs=0.5), method=es.Magnitude(), out=tmp_path / "run")
    assert words in (tmp_path / "run" / "summary.md").read_text()
    assert words in page([read_run(tmp_path / "run")], timing=False)


def test_kernels_over_time_are_drawn_where_they_changed(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run")
    history = {"kernel": {"layer1.0.conv1": [[0.0, 9], [0.5, 3]], "layer2.0.conv1": [[0.0, 9]]}, "left": {}}
    (tmp_path / "run" / "history.json").write_text(json.dumps(history))
    html = page([read_run(tmp_path / "run")], timing=False)
    assert "Kernel of every layer over time" in html
    drawing = next(f for f in figures(html) if "Kernel positions by epoch" in f)
    assert "layer1.0.conv1" in drawing and "layer2.0.conv1" not in drawing
    assert "Kernel of every layer" not in page([read_run(folder)], timing=False)


def test_nothing_comes_from_outside(html):
    addresses = re.findall(r"[a-z]+://[^\"' <]+", html)
    assert set(addresses) == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names, which nobody opens
    assert not re.search(r'(src|href)="(?!#|data:)', html)
    assert "<script" not in html
    assert "@import" not in html


def test_every_figure_is_whole_xml(html):
    found = figures(html)
    assert len(found) >= 4
    for figure in found:
        root = ET.fromstring(figure)
        assert root.find("{http://www.w3.org/2000/svg}title").text
    names = re.findall(r' id="([^"]+)"', html)
    assert len(names) == len(set(names))


def test_no_folder_of_the_machine_is_named(folder, html):
    assert str(folder.parent) not in html


def test_names_are_escaped(folder, tmp_path, no_figures):
    other = tmp_path / "<script>alert(1)"
    shutil.copytree(folder, other)
    html = page([read_run(folder), read_run(other)], timing=False)
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)" in html


def test_every_layer_has_its_row(folder, html):
    run = read_run(folder)
    layers = layers_of(run.dense, run.small, EXAMPLE)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert sum(layer.dense_macs for layer in layers) == metrics["dense"]["macs"]
    assert sum(layer.small_macs for layer in layers) == metrics["small"]["macs"]
    drawing = re.search(r'<table class="layers">.*?</table>', html, re.DOTALL)[0]
    assert drawing.count('class="bar middle"') == len(layers)
    shrunk = [lr for lr in layers if lr.small[0].outputs < lr.dense.outputs]
    assert shrunk
    for layer in shrunk:
        assert f"{layer.small[0].outputs} of {layer.dense.outputs}" in drawing
    assert 'class="legend' not in html  # one tone is all there is


def test_a_factorised_layer_shows_its_ranks():
    dense = es.build_model("resnet8", num_classes=10, in_channels=1, image_size=8)
    small = es.build_model("resnet8", num_classes=10, in_channels=1, image_size=8)
    place = find_places(small, EXAMPLE)[0]["layer1.0.conv1"]
    small.layer1[0].conv1 = sequential(place, "spatial", [torch.zeros(5, 16, 1, 3), torch.zeros(16, 5, 3, 1)], None)
    changed = [layer for layer in layers_of(dense, small, EXAMPLE) if layer.changed]
    assert [layer.name for layer in changed] == ["layer1.0.conv1"]
    assert [(s.inputs, s.outputs, s.shape) for s in changed[0].small] == [(16, 5, "1×3"), (5, 16, "3×1")]
    assert changed[0].small_macs == 64 * (16 * 5 * 3 + 5 * 16 * 3)


def test_every_layer_is_timed(folder, monkeypatch):
    pytest.importorskip("onnxruntime")
    run = read_run(folder)
    monkeypatch.setattr("espalier.run.anatomy.SECONDS", 0.02)
    layers, apart = timed(run.layers, run.dense, run.small, example=EXAMPLE)
    assert all(layer.dense_ms > 0 and layer.small_ms > 0 for layer in layers) and apart >= 0


def test_times_that_two_measurements_disagree_on_are_called_unreliable(folder, monkeypatch, no_figures):
    run, apart = read_run(folder), 0.02
    latency = [{**t, "spread": 1.1} for t in run.metrics["latency"]]
    run = replace(run, metrics={**run.metrics, "latency": latency})
    monkeypatch.setattr("espalier.present.html.timed", lambda layers, *models, **options: (layers, apart))
    assert "UNRELIABLE" not in page([run])
    apart = 0.3
    assert "layers are UNRELIABLE" in page([run])
    slow = [{**t, "spread": 2.0} for t in run.metrics["latency"]]
    busy = page([replace(run, metrics={**run.metrics, "latency": slow})], timing=False)
    assert "UNRELIABLE: the machine was busy (median round 2.0× the fastest)" in busy


def test_widths_are_logged_after_every_epoch(folder):
    run = read_run(folder)
    assert all([epoch for epoch, _ in points] == [1, 2] for points in run.widths.values())
    plan = json.loads((folder / "plan.json").read_text())["groups"]
    assert {g: points[-1][1] for g, points in run.widths.items()} == {g: len(plan[g]["keep"]) for g in run.widths}


def test_a_resumed_run_writes_its_widths_over_those_of_the_killed_one(tmp_path):
    path = tmp_path / "widths.csv"
    for epoch, width in ((1, 8), (2, 7), (3, 1), (2, 6)):
        add_widths(path, epoch, {"a": width, **({"b": 2} if epoch == 2 else {})})
    assert path.read_text() == "epoch,a,b\n1,8,\n2,6,2\n"


def test_recorded_ranks_are_drawn(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run")
    history = {"rank": {"layer1.0.conv1": [[0.0, 16], [0.5, 9]], "layer2.0.conv1": [[0.0, 32]]}, "skipped": {}}
    (tmp_path / "run" / "history.json").write_text(json.dumps(history))
    html = page([read_run(tmp_path / "run")], timing=False)
    assert "Rank of every layer over time" in html
    assert "Ranks by epoch" in figures(html)[-1]
    history |= {"full rank": {"layer1.0.conv1": [[0.0, 16]]}, "gap": {"all": [[0.1, 0.5], [0.2, 0.1]]}}
    history["search"] = {"loss": [[1, 0.7]], "best": [[1, 0.7]], "feasible": [[1, 1.0], [2, 0.0]]}
    (tmp_path / "run" / "history.json").write_text(json.dumps(history))
    html = page([read_run(tmp_path / "run")], timing=False)
    for figure in ("Penalty gap by LC iteration", "Search for ranks by trial", "Rank of every layer", "Ranks by epoch"):
        assert sum(f"<title>{figure}</title>" in found for found in figures(html)) == 1
    assert "9 of 16" in html
    (tmp_path / "run" / "history.json").write_text('{"rank": [1]}')
    refused(report(tmp_path / "run"), "history.json", "damaged")


def test_forms_and_inputs_that_were_left_out_are_drawn(tmp_path, no_figures, unmeasured):
    """Runs of one epoch of a method that factorises, and of one that leaves out inputs of single layers."""

    def drawn(method, **budget):
        folder = tmp_path / method.name
        es.compress(
            es.build_model("resnet8", num_classes=10, in_channels=1, image_size=8),
            es.load_data("digits"),
            budget=es.Budget(**budget),
            method=method,
            recipe=es.Recipe(epochs=1, batch_size=256, lr=0.02, device="cpu", threads=1),
            out=folder,
            config={"model": RESNET, "data": {"name": "digits"}},
        )
        return page([read_run(folder)], timing=False)

    text = drawn(es.SVDOneShot(), macs=0.4)
    assert re.search(r">rank \d+: 1×3, 3×1<", text) and "of an untrained resnet8" in text and "1 epoch in" in text
    assert "factorised into several layers" in text and "another kernel" not in text
    assert re.search(r">(\d+ of )?\d+, reads \d+<", drawn(es.MGP(filters=False, shapes=False), macs=0.7))


# -- several runs


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """The run, two more seeds of a trained network, and a dense run beside them."""
    run = read_run(folder)

    def of_seed(seed, accuracy, dense):
        config = {**run.config, "recipe": {**run.config["recipe"], "seed": seed}, "start": {"trained": True}}
        own = {
            "small": {**run.metrics["small"], "accuracy": accuracy},
            "dense": {**run.metrics["dense"], "accuracy": dense},
        }
        return replace(
            run, config=config, metrics={**run.metrics, **own, "seed": seed}, folder=folder.parent / f"seed{seed}"
        )

    out = tmp_path_factory.mktemp("runs") / "whole"
    arguments = ["--model", "resnet8", "--data", "digits", "--method", "none", "--epochs", "1", "--batch-size", "256"]
    done = CliRunner().invoke(app, ["compress", *arguments, "--device", "cpu", "--threads", "1", "--out", str(out)])
    assert done.exit_code == 0, done.output
    return [run, of_seed(0, 90.0, 95.0), of_seed(1, 92.0, 97.0), read_run(out)]


def test_seeds_of_a_setting_are_one_row_with_mean_and_spread_and_a_dense_run_is_another(runs, no_figures):
    html = page(runs, timing=False)
    rows = re.findall(r"<tr><td>.*?</tr>", html.partition("</table>")[0])
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in rows]
    assert len(cells) == 3
    assert cells[1][0] == "tcp, 50 % of the MACs and 60 % of the parameters" and cells[1][-1] == "0, 1"
    assert cells[1][3:5] == ["96.00 ± 1.41", "91.00 ± 1.41"]
    assert cells[2][2] == "dense" and cells[2][5:7] == ["100.0 %", "100.0 %"] and cells[2][3] == "untrained"
    assert "4 runs in 3 settings" in html
    overlay = next(f for f in figures(html) if "Accuracy by epoch, all runs" in f)
    assert all(f">{name}</text>" in overlay for name in (cells[0][0].replace("&lt;", "<") and cells[1][0], "whole"))
    assert "fill-opacity" in overlay  # the band
    alone = page([runs[-1]], timing=False)
    assert "was trained as it is, and has a test accuracy of" in alone and "layer by layer" not in alone


def test_the_numbers_are_written_as_a_table(runs, tmp_path, no_figures):
    rows = list(csv.DictReader(as_csv(runs).splitlines()))
    assert [row["setting"] for row in rows][1:3] == ["tcp, 50 % of the MACs and 60 % of the parameters"] * 2
    assert [float(row["small"]) for row in rows[1:3]] == [90.0, 92.0]
    assert int(rows[0]["small macs"]) == runs[0].metrics["small"]["macs"] and int(rows[0]["test_images"]) == 360
    assert any("onnxruntime" in name or "torch" in name for name in rows[0])
    folder = runs[-1].folder
    done = report(folder, "--no-timing", "--csv", tmp_path / "runs.csv", "--out", tmp_path / "page.html")
    assert done.exit_code == 0
    [whole] = csv.DictReader((tmp_path / "runs.csv").read_text().splitlines())
    assert (whole["method"], whole["test_images"], whole["processor"]) == ("dense", "360", runs[0].metrics["processor"])
    assert whole["date"] and float(whole["standard error"]) > 0


def test_the_page_opens_with_what_was_asked_met_and_lost(runs, no_figures):
    text = sentence(runs[1])
    assert re.match(
        r"tcp was asked for at most 50 % of the MACs and 60 % of the parameters of a trained resnet8 on digits, "
        r"kept [\d.]+ % and [\d.]+ %, and lost 5\.00 points of accuracy \(90\.00 ± 1\.5\d %, before 95\.00 ± 1\.\d\d %\)\.$",
        text,
    )
    setting = {"runtime": "openvino", "version": "1", "threads": 1, "batch": 1, "processor": "p"}
    kept = {"asked": 0.5, "limit": 2.0, "dense": 4.0, "small": 1.9, "setting": setting}
    timed = replace(runs[1], metrics={**runs[1].metrics, "limits": {"latency": 2.0}, "time": kept})
    assert "at most 50 % of the time of a trained" in sentence(timed)
    assert "kept 47.5 %, takes 1.9 ms instead of 4" in sentence(timed) and "openvino" in page([timed], timing=False)
    html = page([runs[1]], timing=False)
    assert (
        text.partition(", and lost")[0] in html and "360 test images" in html and runs[1].metrics["processor"] in html
    )
    assert "an untrained resnet8" in sentence(runs[0]) and "and has a test accuracy of" in sentence(runs[0])


def test_all_times_of_a_page_are_of_one_runtime(folder, runs, no_figures):
    timings = [
        {"name": n, "backend": b, "batch": 1, "threads": 1, "milliseconds": ms, "speedup": 3.0 / ms}
        for b, scale in (("torch", 10.0), ("onnxruntime", 1.0))
        for n, ms in (("dense", 3.0 * scale), ("small", 1.5 * scale))
    ]
    run = replace(runs[0], metrics={**runs[0].metrics, "latency": timings})
    html = page([run], timing=False)
    assert "takes 1.5 ms instead of 3" in html and "ONNX Runtime" in html and "PyTorch, one" not in html
    other = page([run], timing=False, runtime="torch")
    assert "takes 15 ms instead of 30" in other and "ONNX Runtime" not in other
    with pytest.raises(ValueError, match="not every run was timed in 'openvino'; there is torch, onnxruntime"):
        page([run], runtime="openvino")


def test_another_task_is_told_in_its_own_metric(runs):
    less = {"name": "mean_error", "unit": "", "higher_is_better": False}
    epochs = tuple(
        {**{k: v for k, v in e.items() if "acc" not in k}, "mean_error": 1 / e["epoch"]} for e in runs[1].epochs
    )
    metrics = {
        **runs[1].metrics, "metric": less, "dense": {**runs[1].metrics["dense"], "mean_error": 0.5},
        "small": {**runs[1].metrics["small"], "mean_error": 0.75},
    }  # fmt: skip
    run = replace(runs[1], metrics=metrics, epochs=epochs)
    html = page([run], timing=False)
    assert "and lost 0.2500 of mean error (0.7500, before 0.5000)" in html
    assert "test mean error (less is better)" in html and "<td>+0.2500</td>" in html
    assert "accuracy" not in re.sub(r"<pre>.*?</pre>", "", html, flags=re.DOTALL).lower()
    assert "Mean error by epoch" in html
    with pytest.raises(ValueError, match="judged by accuracy and mean_error; make a page for each"):
        page([runs[0], run])


# -- charts


def test_a_logarithmic_axis_puts_equal_ratios_at_equal_distances():
    points = ((1.0, 1.0), (2.0, 0.1), (3.0, 0.01))
    chart = line_chart([Line("", points)], title="t", x_label="x", y_label="y", logarithmic=True)
    drawn = [path for path in re.findall(r'd="M ([^"]+)"', chart) if path.count("L") == 2][-1]
    a, b, c = (float(pair.split()[1]) for pair in drawn.split("L"))
    assert b - a == pytest.approx(c - b, abs=0.2)
    assert b > a


def test_the_frontier_leaves_out_what_is_dearer_and_no_better():
    assert frontier([(50, 90.0), (60, 90.0), (40, 89.0), (100, 92.0)]) == [(40, 89.0), (50, 90.0), (100, 92.0)]


def test_charts_of_almost_nothing_are_drawn_and_the_same_twice():
    one = [line_chart([Line("one", ((1.0, 2.0),))], title="t", x_label="x", y_label="y") for _ in range(2)]
    assert one[0] == one[1]
    dots = dot_chart(
        [Dot("<a>", 40.0, 90.0, error=1.0), Dot("b", 100.0, 90.0, hollow=True)], title="t", x_label="x", y_label="y"
    )
    for chart in (one[0], dots, rank_bars({"x": [[0.0, 3]]}, {"x": [[0.0, 9]]})):
        ET.fromstring(chart)
    assert line_chart([Line("none", ())], title="t", x_label="x", y_label="y") == ""


# -- requests that cannot be met


def refused(done, *words):
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in done.stderr


def test_a_folder_that_is_absent_or_holds_no_run_is_refused(tmp_path):
    refused(report(tmp_path / "nowhere"), "no such run folder")
    refused(report(tmp_path), "holds no run")


def test_a_run_that_has_not_finished_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "metrics.json").unlink()
    refused(report(tmp_path / "run"), "has not finished", "--resume")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("metrics.json", '{"dense": {}}'),
        ("metrics.json", '{"dense": '),
        ("metrics.json", "[]"),
        ("metrics.json", b"\xff\xfe\x00"),
        ("log.csv", "epoch,loss\n1,0.5,3,4\n"),
        ("log.csv", "epoch,loss\n1,much\n"),
        ("model.safetensors", "nothing"),
        ("config.toml", "= 3"),
    ],
)
def test_a_damaged_file_is_named(folder, tmp_path, file, content):
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(report(tmp_path / "run", "--no-timing"), file)
    assert not (tmp_path / "run" / "report.html").exists()


def test_a_network_that_cannot_be_built_leaves_the_rest_of_the_page(folder, tmp_path, no_figures):
    shutil.copytree(folder, tmp_path / "run")
    config = tmp_path / "run" / "config.toml"
    config.write_text(config.read_text().replace('name = "resnet8"', 'name = "not.there:net"'))
    done = report(tmp_path / "run", "--no-timing", "--out", tmp_path / "page.html")
    assert done.exit_code == 0, done.output
    html = (tmp_path / "page.html").read_text()
    assert "Not timed: not.there:net is code, which runs only if you say --trust" in html and "layer1.0.conv1" in html
    assert "Every limit is kept." in html


# -- in a browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
MEASURE = """<script>addEventListener("load", () => { const boxes = [...document.querySelectorAll("svg")].map(f => {
  const b = f.getBoundingClientRect(); return [b.width, b.height] }); const out = document.createElement("pre");
  out.id = "found"; out.textContent = JSON.stringify({boxes, page: document.documentElement.scrollWidth, screen: innerWidth,
  texts: [...document.querySelectorAll("svg text")].filter(t => t.textContent && !t.getBoundingClientRect().width).length});
  document.body.append(out) })</script>"""


def looked_at(html: str, folder: Path, width: int) -> tuple[str, list[str]]:
    """The page after loading, as the browser has it, and what its console said."""
    file = folder / "page.html"
    file.write_text(html, encoding="utf-8")
    if BROWSER is not None:
        command = [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", f"--user-data-dir={folder / 'profile'}",
            f"--window-size={width},900", "--enable-logging=stderr", "--dump-dom", file.as_uri(),
        ]  # fmt: skip
    else:
        command = [sys.executable, str(Path(__file__).with_name("webengine.py")), str(width), file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


in_a_browser = pytest.mark.skipif(
    BROWSER is None and importlib.util.find_spec("PySide6") is None,
    reason="no Chromium is installed, nor PySide6, which has one: the page is not looked at in a browser",
)


@in_a_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_figures_show_in_a_browser_without_errors(html, tmp_path, width):
    shown, console = looked_at(html.replace("</body>", f"{MEASURE}</body>"), tmp_path, width)
    assert console == []
    found = json.loads(re.search(r'<pre id="found">(.*?)</pre>', shown)[1])
    assert len(found["boxes"]) >= 4
    assert min(min(box) for box in found["boxes"]) > 20
    assert found["texts"] == 0
    assert found["page"] <= found["screen"]


@in_a_browser
def test_an_error_in_the_console_would_be_seen(html, tmp_path):
    _, console = looked_at(html.replace("</body>", "<script>nothing.there()</script></body>"), tmp_path, 800)
    assert len(console) == 1 and "nothing is not defined" in console[0]


def test_the_style_closes_what_it_opens(html):
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)[1]
    depth = 0
    for part in re.findall(r"[{}]|@media", style):
        assert part != "@media" or depth == 0, "a rule for one medium stands inside another"
        depth += {"{": 1, "}": -1}.get(part, 0)
    assert depth == 0
