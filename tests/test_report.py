"""The report: what it says is what the run measured, nothing comes from outside, and figures show in a real browser."""

import importlib.util
import itertools
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
from espalier.present.html import page
from espalier.present.runs import read_run
from espalier.run.anatomy import layers_of, timed
from espalier.run.charts import (
    Level,
    Line,
    Pair,
    decades,
    frontier,
    line_chart,
    pair_bars,
    silhouette,
    spread_out,
    ticks,
)
from espalier.run.report import COUNTED_NOTE, summary
from espalier.run.rundir import add_widths

EXAMPLE = torch.zeros(1, 1, 8, 8)
RESNET = {"name": "resnet20", "num_classes": 10, "in_channels": 1, "image_size": 8}


def report(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run of one epoch, with latency and without ONNX to keep it quick."""
    out = tmp_path_factory.mktemp("report") / "a run <&> more"
    recipe = es.Recipe(epochs=2, batch_size=256, lr=0.02, device="cpu", threads=1)
    es.compress(
        es.build_model("resnet20", num_classes=10, in_channels=1, image_size=8),
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


def test_a_limit_that_is_exceeded_is_not_called_kept(folder):
    run = read_run(folder)
    tight = {**run.metrics, "limits": {"macs": run.metrics["small"]["macs"] - 1}}
    assert "A LIMIT IS EXCEEDED." in page([replace(run, metrics=tight)], timing=False)


def test_what_is_counted_and_not_executed_is_called_that_and_carries_the_limit(folder):
    run = read_run(folder)
    dense, small = run.metrics["dense"], run.metrics["small"]
    counted = {
        "macs": small["macs"] // 2, "params": small["params"] // 2,
        "fraction": {n: small[n] // 2 / dense[n] for n in ("macs", "params")}, "note": COUNTED_NOTE,
    }  # fmt: skip
    limits = {"macs": small["macs"] // 2 + 1, "params": small["params"] // 2}
    html = page([replace(run, metrics={**run.metrics, "counted": counted, "limits": limits})], timing=False)
    assert "Every limit is kept. Limits are met as counted, not executed" in html
    row = re.search(r"<tr><td>multiply-adds \(MACs\), counted, not executed</td>.*?</tr>", html)[0]
    assert f"<td>{counted['macs']:,}</td>" in row and f"<td>{limits['macs']:,}</td>" in row
    executed = re.search(r"<tr><td>multiply-adds \(MACs\)</td>.*?</tr>", html)[0]
    assert f"<td>{small['macs']:,}</td>" in executed and f"{limits['macs']:,}" not in executed
    assert "of the MACs: counted, not executed" in html
    assert sum("counted, not executed" in figure for figure in figures(html)) == 1
    assert "limit of the count" in html
    above = {**counted, "macs": limits["macs"] + 1}
    assert "A LIMIT IS EXCEEDED." in page(
        [replace(run, metrics={**run.metrics, "counted": above, "limits": limits})], timing=False
    )
    assert "counted, not executed" not in page([run], timing=False)


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
def test_the_summary_says_what_the_costs_are_those_of(example, words, tmp_path, monkeypatch):
    def not_here(*arguments, **options):
        raise ValueError("not in this test")

    monkeypatch.setattr("espalier.run.report.latency", not_here)
    monkeypatch.setattr("espalier.run.report.export_onnx", not_here)
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
    addresses = re.findall(r"[a-z]+://[^\"' <]+", html.replace("http://www.w3.org/2000/svg", ""))
    assert addresses == []
    assert "<script" not in html
    assert "@import" not in html


def test_every_figure_is_whole_xml(html):
    found = figures(html)
    assert len(found) >= 7
    for figure in found:
        root = ET.fromstring(figure)
        assert root.find("{http://www.w3.org/2000/svg}title").text


def test_no_folder_of_the_machine_is_named(folder, html):
    assert str(folder.parent) not in html


def test_names_are_escaped(folder, tmp_path):
    other = tmp_path / "<script>alert(1)"
    shutil.copytree(folder, other)
    html = page([read_run(folder), read_run(other)], timing=False)
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)" in html


def test_the_silhouette_has_a_bar_for_every_layer(folder, html):
    run = read_run(folder)
    layers = layers_of(run.dense, run.small, EXAMPLE)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert sum(layer.dense_macs for layer in layers) == metrics["dense"]["macs"]
    assert sum(layer.small_macs for layer in layers) == metrics["small"]["macs"]
    drawing = figures(html)[1]
    assert drawing.count('class="before"') == len(layers)
    shrunk = [lr for lr in layers if lr.small[0].outputs < lr.dense.outputs]
    assert shrunk
    for layer in shrunk:
        assert f"{layer.small[0].outputs} of {layer.dense.outputs}" in drawing
    assert 'class="legend' not in html  # one tone is all there is


def test_a_factorised_layer_shows_its_ranks():
    dense = es.build_model("resnet20", num_classes=10, in_channels=1, image_size=8)
    small = es.build_model("resnet20", num_classes=10, in_channels=1, image_size=8)
    place = find_places(small, EXAMPLE)[0]["layer1.0.conv1"]
    small.layer1[0].conv1 = sequential(place, "spatial", [torch.zeros(5, 16, 1, 3), torch.zeros(16, 5, 3, 1)], None)
    changed = [layer for layer in layers_of(dense, small, EXAMPLE) if layer.changed]
    assert [layer.name for layer in changed] == ["layer1.0.conv1"]
    assert [(s.inputs, s.outputs, s.shape) for s in changed[0].small] == [(16, 5, "1×3"), (5, 16, "3×1")]
    assert changed[0].small_macs == 64 * (16 * 5 * 3 + 5 * 16 * 3)


def test_every_layer_is_timed(folder):
    run = read_run(folder)
    layers = timed(layers_of(run.dense, run.small, EXAMPLE), run.dense, run.small, example=EXAMPLE)
    assert all(layer.dense_ms > 0 and layer.small_ms > 0 for layer in layers)
    assert not any(module._forward_hooks for module in run.dense.modules())


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


def test_forms_and_inputs_that_were_left_out_are_drawn(tmp_path):
    """Runs of one epoch of a method that factorises, and of one that leaves out inputs of single layers."""

    def drawn(method, **budget):
        folder = tmp_path / method.name
        es.compress(
            es.build_model("resnet20", num_classes=10, in_channels=1, image_size=8),
            es.load_data("digits"),
            budget=es.Budget(**budget),
            method=method,
            recipe=es.Recipe(epochs=1, batch_size=256, lr=0.02, device="cpu", threads=1),
            out=folder,
            config={"model": RESNET, "data": {"name": "digits"}},
        )
        return page([read_run(folder)], timing=False)

    text = drawn(es.SVDOneShot(), macs=0.4)
    assert re.search(r">rank \d+: 1×3, 3×1<", text) and "from an untrained network, 1 epoch in" in text
    assert "factorised into several layers" in text and "another kernel" not in text
    assert re.search(r">(\d+ of )?\d+, reads \d+<", drawn(es.MGP(filters=False, shapes=False), macs=0.7))


# -- charts


def test_ticks_cover_what_they_are_for():
    for low, high in ((0, 1), (97.8, 99.7), (-3, 12), (5, 5), (0, 1e-7)):
        found = ticks(low, high)
        assert found[0] <= low
        assert found[-1] >= high
        assert 2 <= len(found) <= 12


def test_decades_cover_what_they_are_for():
    for low, high in ((0.03, 0.4), (0.05, 0.9), (1.0, 1.0), (1e-7, 2.0), (0.1, 100.0)):
        found = decades(low, high)
        assert found[0] <= low
        assert found[-1] >= high
        assert 2 <= len(found) <= 12


def test_a_logarithmic_axis_puts_equal_ratios_at_equal_distances():
    points = ((1.0, 1.0), (2.0, 0.1), (3.0, 0.01))
    chart = ET.fromstring(line_chart([Line("", points)], title="t", x_label="x", y_label="y", logarithmic=True))
    drawn = chart.find("{http://www.w3.org/2000/svg}polyline").get("points").split()
    a, b, c = (float(p.partition(",")[2]) for p in drawn)
    assert b - a == pytest.approx(c - b, abs=0.2)
    assert b > a


def test_labels_do_not_overlap():
    moved = spread_out([10, 11, 12, 90], apart=13, low=0, high=100)
    assert all(b - a >= 13 - 1e-9 for a, b in itertools.pairwise(moved))
    assert moved[3] == 90


def test_the_frontier_leaves_out_what_is_dearer_and_no_better():
    assert frontier([(50, 90.0), (60, 90.0), (40, 89.0), (100, 92.0)]) == [(40, 89.0), (50, 90.0), (100, 92.0)]


def test_bars_stand_in_proportion():
    chart = ET.fromstring(pair_bars([Pair("x", 100, 25, "")], title="t", unit="u", head="h"))
    before, after = (float(r.get("width")) for r in chart.iter("{http://www.w3.org/2000/svg}rect"))
    assert after / before == pytest.approx(0.25, abs=0.01)


def test_charts_of_almost_nothing_are_drawn():
    ET.fromstring(line_chart([Line("one", ((1.0, 2.0),))], title="t", x_label="x", y_label="y"))
    ET.fromstring(silhouette([], title="t"))
    ET.fromstring(silhouette([Level("gone", 8, (), "left out"), Level("here", 8, (4,), "4 of 8")], title="t"))


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


def test_a_network_that_cannot_be_built_leaves_the_rest_of_the_page(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run")
    config = tmp_path / "run" / "config.toml"
    config.write_text(config.read_text().replace('name = "resnet20"', 'name = "not.there:net"'))
    done = report(tmp_path / "run", "--no-timing", "--out", tmp_path / "page.html")
    assert done.exit_code == 0, done.output
    html = (tmp_path / "page.html").read_text()
    assert "Not drawn" in html
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
    assert len(found["boxes"]) >= 7
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
