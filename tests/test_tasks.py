"""Networks for other tasks than classification: what is minimised, what is reported, and that the budget is met."""

import csv
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import espalier as es
from espalier.run.evaluate import evaluate
from espalier.tasks import MeanIoU, example_of, image_count


class UNet(nn.Module):
    """Down, up, and a skip between; ``aux`` is a second head, as torchvision's have it."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.BatchNorm2d(16), nn.ReLU())
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.head = nn.Conv2d(16, classes, 1)
        self.aux = nn.Conv2d(8, classes, 1)

    def forward(self, x):
        fine = self.first(x)
        found = torch.cat([fine, self.up(self.down(fine))], 1)
        return {"out": self.head(found), "aux": self.aux(fine)}


class Detector(nn.Module):
    """torchvision's interface on images of one size: one box an image."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        )  # fmt: skip
        self.box = nn.Linear(32, 4)

    def forward(self, images, targets=None):
        boxes = self.box(self.body(torch.stack(images))) * 8
        if self.training:
            return {"box": F.l1_loss(boxes, torch.stack([t["boxes"][0] for t in targets]))}
        one = torch.ones(1)
        return [{"boxes": b[None], "scores": one, "labels": one.long()} for b in boxes]


RECIPE = es.Recipe(epochs=6, lr=0.05)
HALF = es.Budget(macs=0.5)


@pytest.fixture(scope="module")
def maps():
    """Images whose pixels are of class 0, 1 or 2 by brightness, with a border to be ignored."""
    torch.manual_seed(0)
    x = F.interpolate(torch.randn(24, 1, 4, 4), size=8, mode="nearest")
    y = (x[:, 0] > -0.4).long() + (x[:, 0] > 0.4).long()
    y[:, 0] = 255
    batches = [(x[i : i + 8], y[i : i + 8]) for i in (0, 8, 16)]
    return es.Loaders(batches * 3, batches[:1])


def test_a_segmenter_is_halved_and_judged_by_its_mean_iou(maps, tmp_path, unmeasured):
    torch.manual_seed(0)
    result = es.compress(
        UNet(), maps, budget=HALF, task=es.Segmentation(classes=3), recipe=RECIPE, out=tmp_path / "run"
    )
    assert result.cost.macs <= 0.5 * result.dense.macs
    assert result.accuracy is None and result.dense_metric is not None
    assert result.metric > max(60, result.dense_metric)
    assert "mean_iou" in repr(result) and "Conv2d" not in repr(result)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["small"]["mean_iou"] == result.metric and metrics["metric"]["name"] == "mean_iou"
    assert "| test mean iou, % |" in (tmp_path / "run" / "summary.md").read_text()
    header, *rows = (tmp_path / "run" / "log.csv").read_text().splitlines()
    assert "mean_iou" in header.split(",") and "accuracy" not in header.split(",") and len(rows) == 6
    assert 'name = "Segmentation"' in (tmp_path / "run" / "config.toml").read_text()
    other = es.Segmentation(classes=3, label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"cannot resume: task.label_smoothing was 0.0 and is 0.1"):
        es.compress(UNet(), maps, budget=HALF, task=other, recipe=RECIPE, out=tmp_path / "run", resume=True)


def test_a_trained_segmenter_teaches_its_small_copy_pixel_by_pixel(maps):
    torch.manual_seed(0)
    net, task = UNet(), es.Segmentation(classes=3)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(15):
        for x, y in maps.train_batches(batch_size=8, epoch=0, seed=0):
            optimizer.zero_grad()
            task.loss(net(x), y).backward()
            optimizer.step()
    taught = []
    es.compress(
        net,
        maps,
        budget=HALF,
        task=task,
        recipe=es.Recipe(epochs=1),
        on_dense=lambda found, teaches: taught.append(teaches),
    )
    es.compress(
        UNet(),
        maps,
        budget=HALF,
        task=task,
        recipe=es.Recipe(epochs=1),
        on_dense=lambda found, teaches: taught.append(teaches),
    )
    assert taught == [True, False]
    x, y = next(maps.test_batches())
    assert float(task.follow(net(x), net(x), 4.0).detach()) == pytest.approx(0.0, abs=1e-6)
    assert float(task.follow(net(x), UNet()(x), 4.0).detach()) > 0.1


def test_mean_iou_is_that_of_its_definition_and_ignores_what_is_to_be_ignored():
    meter = MeanIoU(es.Segmentation(classes=3))
    predicted, true = torch.tensor([[[0, 0, 1, 1]]]), torch.tensor([[[0, 1, 1, 255]]])
    meter.update(F.one_hot(predicted, 3).movedim(-1, 1).float(), true)
    assert meter.compute() == pytest.approx(50.0)  # 1/2 of each of two classes; the third occurs nowhere


def test_pixels_that_are_all_ignored_cost_nothing():
    loss = es.Segmentation(classes=2).loss(torch.randn(1, 2, 3, 3), torch.full((1, 3, 3), 255))
    assert float(loss) == 0.0


@pytest.mark.parametrize("target", [torch.zeros(6), torch.zeros(6, 2)])
def test_numbers_of_another_shape_are_refused_and_not_broadcast(target):
    with pytest.raises(ValueError, match="one shape"):
        es.Regression().loss(torch.zeros(6, 1), target)


def regression_loaders(named: bool = False):
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    y = x[:, :1] - x[:, 1:2]
    pairs = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 64, 16)]
    batches = [({"x": a}, b) for a, b in pairs] if named else pairs
    return es.Loaders(batches * 4, batches)


def regressor() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))


def test_a_regression_is_halved_and_judged_by_its_mean_absolute_error():
    result = es.compress(regressor(), regression_loaders(), budget=HALF, task=es.Regression(), recipe=RECIPE)
    assert result.cost.macs <= 0.5 * result.dense.macs
    assert result.judged_by == es.Metric("mae", higher_is_better=False)
    assert result.metric < 0.5 * result.dense_metric


def test_a_network_with_inputs_by_name_is_trained():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = regressor()

        def forward(self, x):
            return self.net(x)

    result = es.compress(Named(), regression_loaders(named=True), budget=HALF, task=es.Regression(), recipe=RECIPE)
    assert result.metric < result.dense_metric


def test_super_resolution_reports_decibels():
    found = evaluate(
        nn.Identity(), [(torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.1))], task=es.SuperResolution()
    )
    assert found == {"psnr": pytest.approx(20.0), "loss": pytest.approx(0.1)}


def test_several_labels_an_image_are_judged_by_average_precision():
    scores = torch.tensor([[3.0, 0.0], [2.0, 1.0], [1.0, 2.0]])
    targets = torch.tensor([[1, 0], [0, 0], [1, 1]])
    found = evaluate(nn.Identity(), [(scores, targets)], task=es.Classification(multi_label=True))
    assert found["mean_ap"] == pytest.approx(100 * ((1 + 2 / 3) / 2 + 1) / 2)


def detection_batches():
    torch.manual_seed(0)
    corners = torch.randint(0, 4, (16, 2))
    boxes = torch.cat([corners, corners + 6], 1).float()
    images = torch.zeros(16, 1, 16, 16)
    for image, (x, y) in zip(images, corners.tolist(), strict=True):
        image[:, y : y + 6, x : x + 6] = 1
    targets = [{"boxes": b[None], "labels": torch.ones(1, dtype=torch.int64)} for b in boxes]
    return [(tuple(images[i : i + 8]), tuple(targets[i : i + 8])) for i in (0, 8)]


def test_a_detector_is_halved_by_its_own_losses():
    torch.manual_seed(0)
    data = es.Loaders(detection_batches() * 4, detection_batches())
    result = es.compress(
        Detector(), data, budget=HALF, task=es.Detection(by_loss=True), recipe=es.Recipe(epochs=6, lr=0.02)
    )
    assert result.cost.macs <= 0.5 * result.dense.macs
    assert result.metric < 0.5 * result.dense_metric
    boxes = result.model.eval()(list(detection_batches()[0][0]))
    assert len(boxes) == 8


@pytest.mark.parametrize("method", [es.Magnitude(score="taylor", blocks=True), es.TTLC(search=2, iterations=2)])
def test_methods_that_measure_a_loss_measure_that_of_the_task(method, maps):
    data = es.Loaders(detection_batches(), detection_batches()[:1])
    for model, loaders, task in (
        (UNet(), maps, es.Segmentation(classes=3)),
        (Detector(), data, es.Detection(by_loss=True)),
    ):
        result = es.compress(model, loaders, budget=HALF, task=task, method=method, recipe=es.Recipe(epochs=1))
        assert result.proof.passed and result.cost.macs <= 0.5 * result.dense.macs


def test_a_loop_of_ones_own_says_what_its_batches_are_for(maps):
    small = es.attach(
        UNet(), torch.zeros(1, 1, 8, 8), budget=HALF, method=es.Magnitude(score="taylor"), batches=maps.train,
        task=es.Segmentation(classes=3),
    ).finish()  # fmt: skip
    assert small(torch.zeros(1, 1, 8, 8))["out"].shape == (1, 3, 8, 8)


def test_boxes_are_judged_by_cocos_mean_average_precision():
    pytest.importorskip("pycocotools")
    target = {"boxes": torch.tensor([[0.0, 0.0, 8.0, 8.0]]), "labels": torch.ones(1, dtype=torch.int64)}
    found = {**target, "scores": torch.ones(1)}
    half = {**found, "boxes": torch.tensor([[0.0, 0.0, 8.0, 6.0]])}  # IoU 0.75: right at 6 of COCO's 10 thresholds
    for boxes, expected in ((found, 100.0), (half, 60.0)):
        meter = es.Detection().meter()
        meter.update([boxes], [target])
        assert meter.compute() == pytest.approx(expected)


class Depth(es.Task):
    """What the page calls a task of one's own."""

    metric = es.Metric("error", higher_is_better=False)

    def loss(self, output, targets):
        return F.smooth_l1_loss(output, targets)

    def meter(self):
        from espalier.optional import import_torchvision

        import_torchvision()  # torchmetrics imports it, and its build need not match torch's
        return pytest.importorskip("torchmetrics").MeanAbsoluteError()


def test_a_task_of_ones_own_is_judged_by_a_metric_of_torchmetrics():
    x, y = torch.zeros(4, 1), torch.arange(4.0)[:, None]
    assert evaluate(nn.Identity(), [(x, y)], task=Depth())["error"] == pytest.approx(1.5)


def test_what_does_not_fit_is_said_before_training():
    data = regression_loaders()
    with pytest.raises(ValueError, match=r"not logits.*task="):
        evaluate(nn.Conv2d(1, 2, 1), [(torch.zeros(1, 1, 4, 4), torch.zeros(1, 4, 4))])
    with pytest.raises(ValueError, match="follows no teacher"):
        es.compress(regressor(), data, budget=HALF, task=Depth(), recipe=es.Recipe(epochs=1, distill=0.5), trained=True)
    with pytest.raises(ValueError, match="no labels to smooth"):
        es.compress(
            regressor(), data, budget=HALF, task=es.Regression(), recipe=es.Recipe(epochs=1, label_smoothing=0.1)
        )
    with pytest.raises(ValueError, match="leave num_classes out"):
        es.Loaders([(torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4))], [], num_classes=2)


def test_examples_and_counts_of_nested_inputs():
    x = torch.zeros(4, 3)
    assert image_count({"a": x}) == image_count((x, 1)) == image_count([x[0]] * 4) == 4
    assert example_of({"a": x})["a"].shape == (1, 3) and len(example_of([x, x, x])[0]) == 1


OWN_JOB = """
import torch
import torch.nn.functional as F
from torch import nn

import espalier as es


def build(num_classes=3, in_channels=1):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(in_channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, num_classes, 3, padding=1)
    )


def make_data():
    torch.manual_seed(0)
    x = F.interpolate(torch.randn(24, 1, 4, 4), size=8, mode="nearest")
    y = (x[:, 0] > -0.4).long() + (x[:, 0] > 0.4).long()
    batches = [(x[i : i + 8], y[i : i + 8]) for i in (0, 8, 16)]
    return es.Loaders(batches * 3, batches[:1])


def make_task():
    return es.Segmentation(classes=3, ignore_index=9)
"""


def test_a_task_on_the_command_line_is_trained_judged_and_remembered(tmp_path, monkeypatch, unmeasured):
    from typer.testing import CliRunner

    from espalier.present.cli import app

    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.py").write_text(OWN_JOB)
    own = ["--model", "job.py:build", "--data", "job.py:make_data"]
    command = [
        "compress",
        *own,
        "--task",
        "job.py:make_task",
        "--macs",
        "50%",
        "--epochs",
        "2",
        "--lr",
        "0.05",
        "--out",
        "run",
    ]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "test mean_iou" in done.output
    told = CliRunner().invoke(app, ["evaluate", "run", "--trust"])
    assert told.exit_code == 0, told.output
    assert told.output.startswith("mean_iou ") and " ms for a batch of one in " in told.output
    refused = CliRunner().invoke(app, ["evaluate", "run", "--model", "job.py:build"])
    assert refused.exit_code == 2 and "its data job.py:make_data is code" in refused.output


def test_a_sweep_takes_a_task_and_its_table_tells_the_metric(tmp_path, monkeypatch, unmeasured):
    from typer.testing import CliRunner

    from espalier.present.cli import app

    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.py").write_text(OWN_JOB)
    own = ["--model", "job.py:build", "--data", "job.py:make_data", "--task", "segmentation:classes=3"]
    limits = ["--method", "magnitude", "--macs", "0.5,0.8", "--epochs", "1", "--out", "all"]
    done = CliRunner().invoke(app, ["sweep", *own, *limits])
    assert done.exit_code == 0, done.output
    rows = list(csv.DictReader((tmp_path / "all" / "sweep.csv").open()))
    assert [float(row["macs"]) <= most for row, most in zip(rows, (0.5, 0.8), strict=True)] == [True, True]
    assert all(0 < float(row["mean_iou"]) <= 100 for row in rows) and "accuracy" not in rows[0]
    assert (tmp_path / "all" / "sweep.md").read_text().startswith("| method | budget | mean_iou |")


def test_an_unknown_task_and_a_setting_that_it_does_not_have_are_refused():
    from espalier.present.config import make_task, task_section

    with pytest.raises(ValueError, match="--task segmenting: choose one of classification, segmentation"):
        task_section("segmenting")
    with pytest.raises(ValueError, match="there is no 'class'"):
        make_task({"task": task_section("segmentation:class=3")})
    assert make_task({"task": es.Segmentation(classes=3).to_dict()}) == es.Segmentation(classes=3)


def test_in_python_a_line_per_epoch_is_written_where_somebody_looks(capsys, monkeypatch):
    def run(**options):
        es.compress(
            regressor(), regression_loaders(), budget=HALF, task=es.Regression(), recipe=es.Recipe(epochs=2), **options
        )
        return capsys.readouterr()

    quiet = run()
    assert quiet.out == quiet.err == ""  # a log file is no terminal
    told = run(progress=True)
    assert told.out == ""
    assert [line.split()[0] for line in told.err.splitlines()] == ["dense", "epoch", "epoch"]
    assert "test mae" in told.err
    monkeypatch.setattr("espalier.run.progress.sys.stderr.isatty", lambda: True, raising=False)
    assert run().err and not run(progress=False).err
