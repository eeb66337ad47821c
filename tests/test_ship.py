"""Out of the house: a run's network as files that run without Espalier, in eight bits too, and how long it takes."""

import importlib.util
import json
import sys

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import espalier as es
from espalier.deploy.int8 import export_int8
from espalier.layers import PaddedConv2d, PartConv2d
from espalier.optional import MissingPackage
from espalier.present.cli import app
from espalier.run.models import CIFAR_MODELS
from espalier.run.onnx import to_onnx_bytes
from espalier.timing.bits import quantised
from tests.forked import forked
from tests.steps import export_quickly, tiny

ONE_EPOCH = es.Recipe(epochs=1, batch_size=256, threads=1)


@pytest.fixture(scope="module", autouse=True)
def small_resnet8():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CIFAR_MODELS, "resnet8", tiny)
        yield


@pytest.fixture(scope="module")
def folder(small_resnet8, tmp_path_factory):
    """A finished run on the digits, moved to another place."""
    made = tmp_path_factory.mktemp("runs") / "made"
    with pytest.MonkeyPatch.context() as patch:
        export_quickly(patch)
        es.compress(
            es.build_model("resnet8", num_classes=10, in_channels=1, image_size=8),
            es.load_data("digits"),
            budget=es.Budget(macs=0.5, multiple_of=4),
            method=es.MGP(),
            recipe=ONE_EPOCH,
            out=made,
            config={
                "model": {"name": "resnet8", "num_classes": 10, "in_channels": 1, "image_size": 8},
                "data": {"name": "digits"},
            },
        )
    moved = made.parent / "elsewhere"
    made.rename(moved)
    return moved


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


def test_a_run_folder_gives_its_network_from_anywhere(folder):
    small = es.load_run(folder)
    again = es.load(
        folder / "model.safetensors", base=es.build_model("resnet8", num_classes=10, in_channels=1, image_size=8)
    ).eval()
    x = torch.randn(2, 1, 8, 8)
    assert not small.training
    assert torch.equal(small(x), again(x))


def test_what_is_no_run_says_what_to_give(tmp_path, folder):
    with pytest.raises(ValueError, match="there is no such run folder"):
        es.load_run(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"holds no run \(no config.toml\)"):
        es.load_run(tmp_path)
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.toml").write_text("[recipe]\nepochs = 1\n")
    with pytest.raises(ValueError, match=r"given in Python.*es.load\("):
        es.load_run(plain)
    (plain / "config.toml").write_text('[model]\nname = "os:abort"\nnum_classes = 2\nin_channels = 1\nimage_size = 8\n')
    with pytest.raises(ValueError, match="would be imported and run"):
        es.load_run(plain)


def test_the_folder_says_how_a_picture_becomes_an_input(folder):
    onnx = pytest.importorskip("onnx")
    said = json.loads((folder / "preprocessing.json").read_text())
    data = es.load_data("digits")
    assert (said["levels"], said["mean"], said["std"]) == (16, list(data.mean), list(data.std))
    assert said["classes"] == list("0123456789")
    in_file = {p.key: p.value for p in onnx.load(folder / "model.onnx").metadata_props}
    assert json.loads(in_file["mean"]) == list(data.mean)
    assert in_file["espalier_version"] == es.__version__
    assert in_file["plan_hash"] == json.loads((folder / "plan.json").read_text())["sha256"]
    assert run("export", folder, "--to", folder / "again.onnx", "--input-name", "digit").exit_code == 0
    again = onnx.load(folder / "again.onnx")
    assert again.graph.input[0].name == "digit"
    assert json.loads({p.key: p.value for p in again.metadata_props}["classes"]) == list("0123456789")


def test_files_of_pytorch_run_without_espalier(folder, tmp_path):
    for ending in (".pt2", ".pt"):
        assert run("export", folder, "--to", tmp_path / f"model{ending}").exit_code == 0
    x = torch.randn(3, 1, 8, 8)
    torch.save({"x": x, "y": es.load_run(folder)(x).detach()}, tmp_path / "pair.pth")

    def elsewhere():
        for name in [n for n in sys.modules if n.partition(".")[0] == "espalier"]:
            sys.modules[name] = None  # an import of it fails
        pair = torch.load("pair.pth")
        for network in (torch.export.load("model.pt2").module(), torch.jit.load("model.pt")):
            assert torch.allclose(network(pair["x"]), pair["y"], atol=1e-5)

    done = forked(elsewhere, folder=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_file_of_pytorch_is_what_its_ending_says(tmp_path):
    net, x = nn.Linear(8, 4), torch.zeros(1, 8)
    with pytest.raises(ValueError, match=r"end it in .onnx .*\.pt2 \(torch.export\), or .pt"):
        es.export_torch(net, tmp_path / "model.bin", x)
    with pytest.raises(ValueError, match="second argument is the file"):
        es.export_torch(net, x, tmp_path / "model.pt2")

    class Random(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    with pytest.raises(ValueError, match=r"was not written; .*differs from the network"):
        es.export_torch(Random(), tmp_path / "model.pt", x)
    assert not list(tmp_path.iterdir())


def test_eight_bits_are_calibrated_judged_and_refused_where_they_lose_too_much(folder, tmp_path):
    pytest.importorskip("onnxruntime")
    data, net = es.load_data("digits"), es.load_run(folder)
    batches = list(data.calibration_batches(batch_size=64, batches=2))
    test = list(data.test_batches())
    file = tmp_path / "int8.onnx"
    found = export_int8(net, file, batches, test, most_lost=100.0)
    assert file.exists()
    assert [t.name for t in found.timings] == ["float", "int8"]
    assert found.float_metric == pytest.approx(
        100 * sum(int((net(x).argmax(1) == y).sum()) for x, y in test) / sum(len(y) for _, y in test), abs=0.3
    )
    refused = tmp_path / "refused.onnx"
    with pytest.raises(ValueError, match="by more than -101 points"):
        export_int8(net, refused, batches, test, most_lost=-101.0)
    assert not refused.exists()
    with pytest.raises(ValueError, match="at least one batch"):
        export_int8(net, refused, [], test)
    with pytest.raises(ValueError, match="eight bits for runtime 'torch': choose onnxruntime or openvino"):
        export_int8(net, refused, batches, test, runtime="torch")


def test_eight_bits_are_judged_as_the_task_judges(tmp_path):
    pytest.importorskip("onnxruntime")

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 2)

        def forward(self, x):
            y = self.second(self.first(x).relu())
            return {"aux": -y, "out": y}

    class Out(es.Regression):
        def predict(self, model, inputs, targets):
            return model(inputs)["out"]

    torch.manual_seed(0)
    net, x = Two(), torch.randn(64, 8)
    batches = [(x, net(x)["out"].detach() + 1.0)]
    found = export_int8(net, tmp_path / "int8.onnx", batches, batches, task=Out())
    assert (found.judged_by.name, found.float_metric) == ("mae", pytest.approx(1.0, abs=1e-4))
    assert 0 < abs(found.lost) < 0.05
    with pytest.raises(
        ValueError, match=r"refused.onnx: was not written: .* mae goes from 1 to .*, by more than -0.5;"
    ):
        export_int8(net, tmp_path / "refused.onnx", batches, batches, most_lost=-0.5, task=Out())
    with pytest.raises(ValueError, match="inputs are one tensor, these are a dict"):
        export_int8(net, tmp_path / "refused.onnx", [({"x": x}, x)], batches, task=Out())


def test_sums_of_eight_bits_stay_inside_sixteen_on_every_processor():
    """Without instructions for eight bits, processors add two products in 16 bits and saturate: 255 * 64 * 2 is below 2**15."""
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 4)), torch.ones(1, 8, 3, 3)
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight.fill_(0.1)  # the largest everywhere, as are the inputs
    content = quantised(to_onnx_bytes(net, x), [(x.numpy(),)])
    weights = [onnx.numpy_helper.to_array(t) for t in onnx.load_model_from_string(content).graph.initializer]
    eight = [w for w in weights if w.dtype == np.int8 and w.ndim > 1]
    assert len(eight) == 2
    assert all(255 * 2 * abs(w.astype(int)).max() < 2**15 for w in eight)
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    [found] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.allclose(torch.from_numpy(found), net(x), rtol=0.02)


def test_eight_bits_for_openvino_need_nncf_and_are_judged_there(folder, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    data, net = es.load_data("digits"), es.load_run(folder)
    both = [next(iter(data.calibration_batches(batch_size=64, batches=1)))], list(data.test_batches())
    if importlib.util.find_spec("nncf") and importlib.util.find_spec("openvino"):
        found = export_int8(net, tmp_path / "int8.onnx", *both, most_lost=100.0, runtime="openvino")
        assert found.path.exists() and [t.backend for t in found.timings] == ["openvino"] * 2
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(MissingPackage, match="'nncf'"):
        export_int8(net, tmp_path / "refused.onnx", *both, runtime="openvino")
    assert not (tmp_path / "refused.onnx").exists()


def test_networks_are_timed_in_turns_from_the_command_line(folder):
    found = run("time", folder, folder / "model.onnx", "--batch", "1")
    assert found.exit_code == 0, found.output
    lines = [line.split() for line in found.output.strip().splitlines()]
    assert lines[0] == ["network", "batch", "ms", "speed-up"]
    assert [line[0].rpartition("/")[2] for line in lines[1:]] == ["elsewhere", "model.onnx"]
    assert lines[1][-1] == "1.00x"
    assert "weights alone have no structure" in run("time", folder / "model.safetensors").output
    assert "there is no such file" in run("time", folder / "none.onnx").output


LAYERS = {
    "all inputs": PartConv2d(8, 4, (3, 3), padding=(1, 1)),
    "some inputs": PartConv2d(8, 4, (3, 3), padding=(1, 1), selects=True),
    "a smaller kernel off the centre": PartConv2d(8, 4, (2, 3), padding=(1, 1), shift=(0, 0, 0, -1)),
    "cropped by more than there is": PartConv2d(8, 4, (1, 1), shift=(-12, 4, 0, 1)),
    "the rule of TensorFlow": PaddedConv2d(8, 4, (3, 3), stride=2),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_our_own_layers_are_scripted_by_torchscript(layer):
    x = torch.randn(2, 8, 9, 9)
    assert torch.equal(torch.jit.script(LAYERS[layer])(x), LAYERS[layer](x))


@pytest.mark.parametrize(
    "method",
    [es.TCP(), es.DPRP(), es.TTLC(search=0), es.MGP(), es.Joint(), es.Magnitude(), es.SVDOneShot()],
    ids=lambda m: m.name,
)
def test_what_a_method_leaves_is_scripted_and_traced_by_torchscript(method):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    x = torch.randn(2, 3, 8, 8)
    run = es.attach(net, x[:1], budget=es.Budget(macs=0.4), method=method)
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.01)
    for step in range(20):
        run.lr_scale((step + 1) / 20, default=1.0)
        (run.model(x).square().mean() + run.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        run.step(progress=(step + 1) / 20, optimizer=optimizer)
    small = run.finish().eval()
    for made in (torch.jit.script(small), torch.jit.trace(small, x)):
        torch.testing.assert_close(made(x), small(x))
