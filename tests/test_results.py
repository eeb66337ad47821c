"""Recipes, runs and tables: every number in the documents comes from a committed result."""

import dataclasses
import json
import re
from dataclasses import fields

import pytest
import torch

from benchmarks import gpu_throughput, run as running, tables
from benchmarks.blocks import fill, outside
from benchmarks.peers import PEERS, lacking
from benchmarks.recipe import Job, read_recipe, read_recipes
from espalier.costs import cost
from espalier.graph import trace
from espalier.plan import Budget
from espalier.present.config import METHODS
from espalier.run.data import load_data
from espalier.run.models import CIFAR_MODELS, build_model
from espalier.run.recipe import Recipe
from tests.steps import Again, tiny

RECIPES = read_recipes()

TINY = """
title = "Tiny"
seeds = [0, 1]
value = 1
[model]
name = "resnet8"
[start]
epochs = 1
batch_size = 256
[data]
name = "digits"
[budget]
macs = 0.5
[recipe]
epochs = 2
batch_size = 256
[methods.dense]
name = "dense"
[methods.tcp]
name = "tcp"
[methods.tucker]
name = "tensorly-tucker"
"""


@pytest.fixture
def bench(tmp_path, monkeypatch, unmeasured):
    """One tiny recipe, and folders of its own for results; returns them and how to call the program."""
    (tmp_path / "tiny.toml").write_text(TINY)
    monkeypatch.setattr(running, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(running, "WORK", tmp_path / "work")
    monkeypatch.setattr(running, "read_recipes", lambda: read_recipes(tmp_path))
    monkeypatch.setattr(running, "missing", lambda recipes: missing(recipes, tmp_path / "runs"))
    monkeypatch.setattr(running, "latency", lambda *a, **k: [])
    monkeypatch.setattr(running, "load_data", few_digits)
    monkeypatch.setitem(CIFAR_MODELS, "resnet8", tiny)
    return tmp_path


def few_digits(*given, **options):
    whole = load_data(*given, **options)
    return dataclasses.replace(whole, train=whole.train[:512], test=whole.test[:100])


missing = running.missing


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_makes_sense(name):
    content = RECIPES[name]
    Recipe.from_dict(content["recipe"])
    profile = {"profile": object()} if "latency" in content["budget"] else {}  # measured where it is run
    if "start" in content:
        assert set(content["start"].get("for", [])) <= content["methods"].keys()
        Recipe.from_dict({k: v for k, v in content["start"].items() if k != "for"})
    choice = content["data"].get("choose_by") == "holdout"  # chooses between settings; publishes nothing
    assert choice or content["methods"]["dense"] == {"name": "dense"}
    assert any(m["name"] in ("magnitude", "svd-oneshot") for m in content["methods"].values())
    for label, method in content["methods"].items():
        job = Job(name, label, 0, content)
        Recipe.from_dict(job.recipe)
        Budget(**job.budget, **profile)
        assert method.get("budget", {}).keys() <= {"multiple_of"}, "one table, one size"
        if (
            "start" in content
            and "weights" not in content["model"]
            and "dense" not in content["start"].get("for", ["dense"])
        ):
            total = job.recipe["epochs"] + (content["start"]["epochs"] if job.starts_trained else 0)
            assert total == content["recipe"]["epochs"], f"{label}: from scratch all train equally long"
        if method["name"] in METHODS:
            assert method.keys() - {"name", "recipe", "budget"} <= {f.name for f in fields(METHODS[method["name"]])}
        else:
            assert method["name"] in {"dense", "dprp", "tt-lc", "mgp", *PEERS}


def test_the_documents_say_what_the_results_say():
    pages = tables.rendered()
    for path, content in pages.items():
        assert path.read_text(encoding="utf-8") == content, "python -m benchmarks.tables"
    assert set(tables.BEHIND.glob("*.md")) <= pages.keys(), "python -m benchmarks.tables"
    assert len(re.findall(r"^## \d", pages[tables.DOCS], re.MULTILINE)) == 5


@pytest.mark.parametrize(
    "page",
    [p for p in tables.pages() if p.name not in ("results.md", "zoo.md") and p.parent != tables.BEHIND],
    ids=lambda p: p.name,
)
def test_measured_numbers_in_pages_are_written_from_results(page):
    """Accuracies and ratios of time stand in blocks that ``benchmarks.tables`` writes; prose only reads them."""
    said = outside(page.read_text(encoding="utf-8"))
    paper = re.compile(r"the paper's.*", re.IGNORECASE)  # what others report
    lines = [line for line in said.splitlines() if not paper.search(line)]
    found = [line for line in lines if re.search(r"\b\d\d\.\d{1,2}\b|\b\d+\.\d+ ?(x\b|times|points)", line)]
    assert not found


def test_a_block_that_nobody_writes_is_refused():
    text = "a\n<!-- results: {} -->\nold\n<!-- end of results -->\nb"
    assert fill(text.format("twice 3"), {"twice": lambda n: str(2 * int(n))}) == text.format("twice 3").replace(
        "old", "6"
    )
    assert outside(text.format("twice 3")) == "a\n\nb"
    with pytest.raises(SystemExit, match="no such block; there are"):
        fill(text.format("unheard-of"), {})
    with pytest.raises(SystemExit, match="no such recipe: what"):
        tables.runs_part(RECIPES, [], ["what"])


def test_a_method_stands_beside_the_better_cut_and_the_best_other():
    methods = {n: {"name": n} for n in ("dense", "magnitude", "tcp", "mgp", "dprp")}
    recipe = {"methods": {**methods, "share": {"name": "magnitude"}}, "seeds": [0]}
    accuracy = {"dense": 93.0, "magnitude": 90.0, "share": 91.0, "tcp": 91.5, "mgp": 92.0}
    rows = [
        {"recipe": "r", "label": n, "accuracy": a, "macs_left": 0.5, "params_left": 0.6, "speedup": {}}
        for n, a in accuracy.items()
    ]
    cells = [c.strip() for c in tables.standing_part({"r": recipe}, rows, "tcp").splitlines()[-1].split("|")]
    assert cells[1:6] == ["`r`", "93.00", "91.00", "92.00 (mgp)", "91.50"]
    assert tables.standing_part({"r": recipe}, rows, "dprp") == "No recipe has been run yet."


def test_one_table_across_lengths():
    recipes = {
        f"r{e}": {"methods": {"dense": {}, **({"tcp": {}} if e == 5 else {})}, "recipe": {"epochs": e}, "seeds": [0, 1]}
        for e in (5, 20)
    }
    rows = [{"recipe": n, "label": "dense", "accuracy": a} for n, a in (("r5", 90.0), ("r5", 92.0), ("r20", 95.0))]
    text = tables.across_part(recipes, [*rows, {"recipe": "r5", "label": "tcp", "accuracy": 80.0}], ["r5", "r20"])
    assert [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines()[-2:]] == [
        ["dense", "91.00 ± 1.41", "95.00"],
        ["tcp", "80.00", "-"],
    ]
    assert text.startswith("Seeds: 0 to 2 of 2.")


def test_every_committed_result_is_whole():
    for key, row in running.results().items():
        assert key.endswith(f"-seed{row['seed']}")
        assert row["macs_left"] <= 1
        assert len(row["curve"]) == row["setting"]["recipe"]["epochs"]
        assert row["accuracy"] == pytest.approx(row["curve"][-1], abs=0.02)  # the last epoch's, not the best one's
        assert row["revision"]
        assert row["hardware"]["cpu"]


def test_a_recipe_with_an_unknown_table_is_refused(tmp_path):
    (tmp_path / "x.toml").write_text(TINY + "\n[busget]\nmacs = 0.5\n")
    with pytest.raises(ValueError, match=r"x\.toml.*busget"):
        read_recipe(tmp_path / "x.toml")


def test_runs_fill_the_queue_and_are_not_repeated(bench, capsys):
    running.main(["queue", "--device", "cpu"])
    assert "6 missing" in capsys.readouterr().out
    running.main(["only", "tiny.dense", "--device", "cpu"])
    running.main(["only", "tiny.tucker", "--device", "cpu", "--seeds", "0"])
    written = {p.stem: json.loads(p.read_text()) for p in (bench / "runs").iterdir()}
    assert sorted(written) == ["tiny.dense-seed0", "tiny.dense-seed1", "tiny.tucker-seed0"]
    assert written["tiny.dense-seed0"]["macs_left"] == 1.0
    assert 0.45 < written["tiny.tucker-seed0"]["macs_left"] <= 0.5
    assert written["tiny.dense-seed0"]["dense_accuracy"] == written["tiny.tucker-seed0"]["dense_accuracy"]  # same start
    running.main(["queue", "--device", "cpu"])
    assert "3 missing" in capsys.readouterr().out
    job = Job("tiny", "dense", 0, read_recipe(bench / "tiny.toml"))
    with pytest.raises(ValueError, match="exists"):
        running.run(job, running.parse(["only", "tiny"]))


def test_a_dense_network_is_trained_once_for_all_budgets(bench):
    running.main(["only", "tiny.dense", "--device", "cpu", "--seeds", "0"])
    (bench / "small.toml").write_text(TINY.replace("macs = 0.5", "macs = 0.25"))
    (bench / "long.toml").write_text(TINY.replace("macs = 0.5", "macs = 0.25").replace("epochs = 2", "epochs = 1"))
    running.main(["only", "small.dense", "long.dense", "--device", "cpu", "--seeds", "0"])
    first, same, other = (
        json.loads((bench / "runs" / f"{name}.dense-seed0.json").read_text()) for name in ("tiny", "small", "long")
    )
    assert same["same_run_as"] == "tiny.dense-seed0"
    assert same["setting"]["budget"] == {"macs": 0.25}
    assert same["recipe"] == "small"
    assert [same[k] for k in ("accuracy", "curve", "revision")] == [first[k] for k in ("accuracy", "curve", "revision")]
    assert "same_run_as" not in other
    job = Job("small", "tcp", 0, read_recipe(bench / "small.toml"))
    assert running.dense_twin(job) is None


@pytest.mark.parametrize("label", ["dense", "tcp"])
def test_a_stopped_run_goes_on_and_ends_the_same(bench, monkeypatch, label):
    job = Job("tiny", label, 0, read_recipe(bench / "tiny.toml"))
    options = running.parse(["only", "tiny", "--device", "cpu"])
    whole = running.result_of(job, options)
    monkeypatch.setattr(running, "WORK", bench / "again")

    def stop(label, history):
        if label != "start":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(running, "say", stop)
        with pytest.raises(KeyboardInterrupt):
            running.result_of(job, options)
    resumed = running.result_of(job, options)
    assert resumed["curve"] == whole["curve"]
    assert resumed["accuracy"] == whole["accuracy"]
    assert resumed["widths"] == whole["widths"]


def test_next_runs_only_what_fits(bench, capsys, monkeypatch):
    monkeypatch.setattr(running, "minutes_on", lambda job, device, graphs: 1.0 if job.label == "dense" else 99.0)
    running.main(["next", "--minutes", "1.5", "--device", "cpu"])
    assert [p.stem for p in (bench / "runs").iterdir()][:1] == ["tiny.dense-seed0"]
    assert "tiny.tcp-seed0: 99 minutes" in capsys.readouterr().out


def test_minutes_are_those_of_runs_alone_with_such_batches_or_probed(bench, monkeypatch):
    content = read_recipe(bench / "tiny.toml")
    job = Job("tiny", "dense", 0, content)
    row = {"setting": job.setting, "epoch_seconds": [60.0], "hardware": dict.fromkeys(("cpu", "gpu"), "this")}
    others = [
        {**row, "epoch_seconds": [6000.0], "hardware": {**row["hardware"], "gpu_shared": True}},
        {**row, "epoch_seconds": [3.0], "setting": {**row["setting"], "recipe": {**job.recipe, "batch_size": 7}}},
        {**row, "epoch_seconds": [4.0], "hardware": dict.fromkeys(("cpu", "gpu"), "that")},
    ]
    monkeypatch.setattr(running, "environment", lambda: {"hardware": row["hardware"]})
    monkeypatch.setattr(running, "_probe", lambda job, device, graphs: 120.0 if graphs else 240.0)
    device = torch.device("cpu")
    monkeypatch.setattr(running, "results", lambda: dict(enumerate([*others, row])))
    epochs = job.recipe["epochs"] + content["start"]["epochs"]
    assert running.minutes_on(job, device) == epochs
    monkeypatch.setattr(running, "results", lambda: dict(enumerate(others)))
    assert running.minutes_on(job, device) == 4 * epochs
    assert running.minutes_on(job, device, graphs=True) == 2 * epochs


def test_side_by_side_hands_its_options_on(bench, monkeypatch):
    seen = {}

    def record(waiting, command, *, seconds, **given):
        seen.update({job.key: command(job) for job in waiting}, seconds=seconds, **given)
        return True

    monkeypatch.setattr(running, "run_side_by_side", record)
    monkeypatch.setattr(running, "minutes_on", lambda job, device, graphs: 99.0 if job.label == "magnitude" else 1.0)
    running.main(["next", "--minutes", "2", "--device", "cpu", "--side-by-side", "3", "--graphs", "--data-dir", "here"])
    assert (seen["places"], seen["seconds"]) == (3, 120.0)
    assert "tiny.tcp-seed0" in seen and "tiny.magnitude-seed0" not in seen  # what cannot end in that time is not begun
    assert seen["tiny.dense-seed0"][3:] == [
        "only", "tiny.dense", "--seeds", "0", "--device=cpu", "--threads=1", "--data-dir=here", "--graphs"
    ]  # fmt: skip
    seen.clear()
    running.main(["only", "tiny.tcp", "tiny.dense", "--side-by-side", "2", "--device", "cpu"])
    assert [k for k in seen if k.endswith("-seed0")] == ["tiny.tcp-seed0", "tiny.dense-seed0"]
    assert seen["seconds"] is None
    with pytest.raises(SystemExit, match="goes with --side-by-side"):
        running.main(["only", "tiny.tcp", "--minutes", "2", "--device", "cpu"])
    monkeypatch.setattr(running, "run_side_by_side", lambda *a, **k: False)
    with pytest.raises(SystemExit, match="not every run"):
        running.main(["only", "tiny", "--side-by-side", "2"])


def test_a_choice_never_sees_the_test_set(bench, monkeypatch):
    monkeypatch.setattr(running, "load_data", load_data)
    content = read_recipe(bench / "tiny.toml")
    job = Job("tiny", "dense", 0, {**content, "data": {"name": "digits", "holdout": 200, "choose_by": "holdout"}})
    data = running.make_data(job, None)
    whole = running.make_data(dataclasses.replace(job, content=content), None)
    assert len(data.test) == 200
    assert len(data.train) == len(whole.train) - 200
    assert not (data.test.images[:, None] == whole.test.images[None]).flatten(2).all(-1).any()


def test_fewer_training_images_are_gone_through_more_often():
    digits = load_data("digits")
    few = running.with_fewer_images(digits, 100)
    images = {bytes(image.numpy()) for image in few.train.images}
    assert len(images) <= 100 < len(few.train) and len(digits.train) - 100 < len(few.train) <= len(digits.train)
    assert few.train.labels.bincount().float().std() < 0.2 * len(few.train) / 10
    assert len(few.test) == len(digits.test)


def test_an_unknown_name_is_refused(bench):
    with pytest.raises(SystemExit, match="no such recipe: what"):
        running.main(["only", "what"])


def test_rows_of_the_older_format_are_taken_over_once(tmp_path):
    recipe = {**Recipe.from_dict(RECIPES["resnet20-half-20-epochs"]["recipe"]).to_dict(), "seed": 2}
    del recipe["device"]
    row = {
        "model": "resnet20a", "trained": True, "data": "cifar10", "method": "magnitude:taylor", "macs": 0.5,
        "multiple_of": 1, "settings": "", "recipe": recipe, "before_training": 30.0, "accuracy": 90.5, "macs_left": 0.4999,
        "params_left": 0.6, "forced": False, "seconds": 9.0, "curve": [90.5], "epoch_seconds": [1.0], "widths": {},
        "date": "d", "revision": "r", "versions": {"torch": "2"}, "hardware": {"cpu": "c", "threads": 1},
    }  # fmt: skip
    stray = {**row, "settings": "reach=0.4", "method": "tcp"}
    content = {"rows": {"a": row, "b": stray}}
    assert running.import_rows(content, RECIPES, tmp_path) == 2
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == [
        "resnet20-half-20-epochs.magnitude-seed2.json",
        "resnet20a-cifar10-50-20-epochs.tcp-reach0.4-seed2.json",
    ]
    assert running.import_rows(content, RECIPES, tmp_path) == 0
    pages = tables.appendix(RECIPES, list(running.results(tmp_path).values()))
    assert "90.50" in pages["resnet20-half-20-epochs"]
    assert "no recipe any more" in pages["resnet20a-cifar10-50-20-epochs"]


def test_tables_give_mean_and_spread():
    recipe = {
        "methods": {"dense": {"name": "dense"}, "tcp": {"name": "tcp"}},
        "budget": {"macs": 0.5},
        "seeds": [0, 1, 2],
    }
    base = {"label": "tcp", "macs_left": 0.49996, "params_left": 0.6, "speedup": {}, "seconds": {}, "epoch_seconds": []}
    rows = [{**base, "seed": s, "accuracy": a} for s, a in enumerate((90.0, 91.0))]
    text = tables.recipe_table(recipe, rows)
    assert "90.50 ± 0.71" in text
    assert "50.00" in text
    assert "2 of 3" in text
    assert "not run" in text
    assert "not run" not in tables.recipe_table(recipe, rows, gaps=False)


def test_tables_say_what_the_methods_begin_with():
    recipe = {
        "title": "t",
        "model": {"name": "resnet20"},
        "start": {"epochs": 1, "for": ["magnitude"]},
        "methods": {"dense": {"name": "dense"}, "magnitude": {"name": "magnitude"}},
        "budget": {"macs": 0.5},
        "seeds": [0, 1],
    }
    base = {"recipe": "r", "macs_left": 0.5, "params_left": 0.6, "speedup": {}, "accuracy": 80.0}
    rows = [{**base, "label": "dense", "seed": 0, "dense_accuracy": 10.0}]
    assert "begin" not in tables.runs_part({"r": recipe}, rows, ["r"])
    rows += [{**base, "label": "magnitude", "seed": s, "dense_accuracy": a} for s, a in enumerate((91.0, 92.0))]
    assert "network that `magnitude` begin with: 91.50 ± 0.71." in tables.runs_part({"r": recipe}, rows, ["r"])
    whole = {**recipe, "start": {"epochs": 1}}
    assert "The trained network that all methods begin with" in tables.runs_part({"r": whole}, rows[1:], ["r"])
    assert "published weights: 91.00" in tables.runs_part({"r": {**whole, "model": {"weights": "f"}}}, rows[1:], ["r"])


def test_ratios_of_time_are_shown_only_where_there_was_a_core_for_everything():
    recipe = {"methods": {"dense": {"name": "dense"}, "tcp": {"name": "tcp"}}, "budget": {"macs": 0.5}, "seeds": [0]}
    base = {"seed": 0, "accuracy": 90.0, "macs_left": 0.5, "params_left": 0.6, "seconds": {}}
    machine = {"cpu": "EPYC", "threads": 1, "cores": 2, "gpu": None}
    busy, calm = ({"hardware": {**machine, "load_average": load}} for load in (3.9, 1.8))
    shared, lent = ({"hardware": {**calm["hardware"], "gpu": "H200", "gpu_shared": others}} for others in (True, False))
    speed = {"onnxruntime, batch 1": 1.75}
    rows = [
        {**base, **calm, "label": "dense", "speedup": {}, "epoch_seconds": [10.0]},
        {**base, **busy, "label": "tcp", "speedup": speed, "epoch_seconds": [8.0]},
    ]
    crowded = tables.recipe_table(recipe, rows)
    assert "1.75x" not in crowded
    assert "0.80x" not in crowded
    assert "0.80x" in tables.recipe_table(recipe, [rows[0], {**rows[1], **calm}])
    assert "0.80x" in tables.recipe_table(recipe, [{**row, **lent} for row in rows])
    assert "0.80x" not in tables.recipe_table(recipe, [{**row, **shared} for row in rows])
    assert "0.80x" not in tables.recipe_table(
        recipe, [rows[0], {**rows[1], **lent}]
    )  # times on two devices have no ratio
    assert "1.75x" in tables.recipe_table(recipe, [rows[0], {**rows[1], "timed": calm}])


@pytest.mark.parametrize(("name", "multiple"), [(n, 4) for n in PEERS] + [("torch-pruning", 1), ("tensorly-tucker", 1)])
def test_a_peer_reaches_the_target(name, multiple):
    if package := lacking(name):
        pytest.skip(f"without {package}")
    torch.manual_seed(0)
    model = build_model("resnet8", num_classes=10, in_channels=1, image_size=8)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # equal scales would rank nothing
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    example = torch.zeros(1, 1, 8, 8)
    whole = cost(trace(model, example, rehearse=False)).macs
    batches = [(torch.randn(16, 1, 8, 8), torch.arange(16) % 10) for _ in range(60)]
    small = PEERS[name](model, example, 0.5, multiple, batches)
    assert cost(trace(small, example, rehearse=False)).macs <= 0.51 * whole  # torch-pruning counts a little differently
    assert small(example).shape == (1, 10)
    widths = [m.out_channels for m in small.modules() if isinstance(m, torch.nn.Conv2d)]
    assert all(width % multiple == 0 for width in widths)


def test_a_peer_that_is_not_installed_is_left_out(bench, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.peers.importlib.util.find_spec", lambda name: None)
    assert [lacking(n) for n in ("tensorly-tucker", "modelopt-fastnas", "tcp")] == ["tensorly", "modelopt", ""]
    running.main(["only", "tiny.tucker", "--device", "cpu"])
    assert "tiny.tucker-seed0: left out, it needs tensorly" in capsys.readouterr().out
    assert not list((bench / "runs").glob("*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_throughput_of_a_gpu_is_not_measured_without_one():
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu_throughput.main([])


def test_the_step_that_is_timed_trains():
    """In bfloat16, which many processors only emulate, ten times slower: few images."""
    step = gpu_throughput.eager_step("resnet8", 4, device="cpu")
    losses = [float(step()) for _ in range(20)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("name", ["dprp", "tcp"])
def test_steps_of_a_method_are_timed_with_and_without_graphs(name, graphs, monkeypatch):
    recorder = Again()
    monkeypatch.setattr(gpu_throughput, "recorder_for", lambda device, wanted: recorder if wanted else None)
    monkeypatch.setattr(gpu_throughput, "WARM_UP", 4)
    method = gpu_throughput.METHODS[name]
    found = gpu_throughput.method_steps("resnet8", method, batch=2, device="cpu", graphs=graphs, steps=2)
    assert len(found) == len(gpu_throughput.PLACES) and min(found) > 0
    assert (recorder.recorded > 1) == graphs  # anew when layers are split or cut
