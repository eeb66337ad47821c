"""Measured time and size, and ONNX files that compute what PyTorch computes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import espalier
from espalier.run import latency as measuring, onnx as onnx_room
from espalier.run.latency import latency, size_on_disk
from espalier.run.onnx import export_onnx, onnx_session


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 3),
    )  # fmt: skip


EXAMPLE = torch.zeros(1, 1, 8, 8)


def test_every_model_is_timed_at_every_batch_size_against_the_first():
    models = {"dense": small_net(), "small": small_net()}
    found = latency(models, EXAMPLE, batch_sizes=(1, 4), repeats=3)
    assert [(t.name, t.batch) for t in found] == [("dense", 1), ("small", 1), ("dense", 4), ("small", 4)]
    assert all(t.milliseconds > 0 and t.threads == 1 and t.backend == "torch" for t in found)
    assert [t.speedup for t in found if t.name == "dense"] == [1.0, 1.0]
    assert found[1].speedup == pytest.approx(found[0].milliseconds / found[1].milliseconds)


def test_models_take_turns_and_the_warm_up_does_not_count(monkeypatch):
    clock, log = [0.0], []
    duration = {"a": [0.5, 0.5, 0.5, 1.0, 3.0, 2.0], "b": [9.0, 4.0, 4.0, 4.0]}
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: clock[0])

    def caller(name):
        def call():
            log.append(name)
            clock[0] += duration[name].pop(0)

        return call

    found = measuring._race({"a": caller("a"), "b": caller("b")}, repeats=3, seconds=100)
    assert found == {"a": [1.0, 3.0, 2.0], "b": [4.0, 4.0, 4.0]}
    assert log[-6:] == ["a", "b"] * 3


def test_timing_changes_neither_the_models_nor_the_threads():
    model, before = small_net().train(), torch.get_num_threads()
    latency({"dense": model}, EXAMPLE, batch_sizes=(1,), repeats=1, threads=2)
    assert model.training and model[1].training and int(model[1].num_batches_tracked) == 0
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    "wrong", [{"backend": "abacus"}, {"repeats": 0}, {"threads": 0}, {"batch_sizes": ()}, {"batch_sizes": (0,)}]
)
def test_wrong_settings_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        latency({"dense": small_net()}, EXAMPLE, **wrong)


def test_no_model_is_an_error():
    with pytest.raises(ValueError, match="no model"):
        latency({}, EXAMPLE)


def test_the_size_on_disk_is_that_of_the_saved_file(tmp_path):
    from espalier.surgery import save

    model = small_net()
    save(model, tmp_path / "m.safetensors")
    assert size_on_disk(model) == (tmp_path / "m.safetensors").stat().st_size
    assert size_on_disk(nn.Linear(100, 100)) - size_on_disk(nn.Linear(100, 50)) == pytest.approx(4 * 50 * 101, abs=64)


# -- ONNX


@pytest.fixture(scope="module")
def onnx():
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    return pytest.importorskip("onnx", reason="the extra onnx is not installed")


def test_an_exported_file_computes_the_same_at_any_batch_size(onnx, tmp_path, capfd):
    model, path = small_net().train(), tmp_path / "m.onnx"
    assert export_onnx(model, path, EXAMPLE) < 1e-5
    assert model.training
    session = onnx_session(path.read_bytes())
    x = torch.randn(5, 1, 8, 8)
    expected = model.eval()(x)
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    assert torch.allclose(found, expected, atol=1e-5)
    assert capfd.readouterr() == ("", "")


def test_weights_that_processors_are_slow_at_are_zero_in_a_file(onnx, monkeypatch):
    monkeypatch.setattr(onnx_room, "_EXPORTERS", onnx_room._EXPORTERS[1:])
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1e-40, 2e-38, -3e-39], [0.0, 1.0, -1e-45]]))
    [weight] = [w for w in onnx.load_model_from_string(onnx_room.to_onnx_bytes(model, torch.zeros(1, 3))).graph.initializer
                if len(w.dims) == 2]  # fmt: skip
    stored = onnx.numpy_helper.to_array(weight)
    assert sorted(stored.ravel().tolist()) == [0.0, 0.0, 0.0, 0.0, np.float32(2e-38), 1.0]


def test_a_file_that_computes_something_else_is_not_written(onnx, tmp_path, monkeypatch):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"older")
    other = small_net()
    with torch.no_grad():
        other[-1].bias.add_(0.5)
    wrong = onnx_room.to_onnx_bytes(other, EXAMPLE)
    monkeypatch.setattr(onnx_room, "_EXPORTERS", (("liar", lambda *_: wrong),))
    with pytest.raises(ValueError, match=r"differ from PyTorch's by \d+\.\d+.*not written"):
        export_onnx(small_net(), path, EXAMPLE)
    assert path.read_bytes() == b"older"


def test_an_exporter_that_fails_makes_room_for_the_next(onnx, monkeypatch):
    def broken(*_):
        raise RuntimeError("no rule for this\nand a page of advice")

    exporters = onnx_room._EXPORTERS
    monkeypatch.setattr(onnx_room, "_EXPORTERS", (("broken", broken), exporters[1]))
    assert onnx_session(onnx_room.to_onnx_bytes(small_net(), EXAMPLE)) is not None
    monkeypatch.setattr(onnx_room, "_EXPORTERS", (("broken", broken),))
    with pytest.raises(ValueError, match=r"broken: no rule for this; broken with a fixed batch: no rule for this$"):
        onnx_room.to_onnx_bytes(small_net(), EXAMPLE)


def test_a_missing_package_names_the_extra(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ValueError, match=r"pip install '.\[onnx\]'"):
        export_onnx(small_net(), tmp_path / "m.onnx", EXAMPLE)


def test_onnx_runtime_is_timed_too(onnx):
    found = latency({"dense": small_net(), "small": small_net()}, EXAMPLE, backend="onnxruntime", repeats=3)
    assert [(t.name, t.batch) for t in found] == [("dense", 1), ("small", 1), ("dense", 64), ("small", 64)]
    assert all(t.milliseconds > 0 for t in found)


def test_names_open_sizes_opset_and_metadata_are_as_asked(onnx, tmp_path):
    path = tmp_path / "m.onnx"
    image = torch.randn(1, 3, 32, 32)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    export_onnx(
        net,
        path,
        image,
        input_names=["image"],
        output_names=["features"],
        opset=17,
        dynamic=("batch", "height", "width"),
        metadata={"classes": "cat,dog"},
    )
    found = onnx.load(path)
    assert [o.version for o in found.opset_import if not o.domain] == [17]
    assert {p.key: p.value for p in found.metadata_props} == {
        "espalier_version": espalier.__version__,
        "classes": "cat,dog",
    }
    wide = torch.randn(2, 3, 40, 48)
    [theirs] = onnx_session(path.read_bytes()).run(["features"], {"image": wide.numpy()})
    assert np.allclose(theirs, net(wide).detach().numpy(), atol=1e-5)


def test_inputs_and_outputs_in_tables_are_named_by_their_place(onnx, tmp_path):
    class Stereo(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 4, 3)

        def forward(self, images, scale):
            left, right = self.first(images["left"]), scale[0] * self.first(images["right"])
            return {"near": left - right, "far": [left + right]}

    x, path = torch.randn(1, 3, 8, 8), tmp_path / "m.onnx"
    export_onnx(Stereo(), path, {"images": {"left": x, "right": 2 * x}, "scale": [torch.ones(1, 1, 1, 1)]})
    session = onnx_session(path.read_bytes())
    assert [i.name for i in session.get_inputs()] == ["images.left", "images.right", "scale.0"]
    assert [o.name for o in session.get_outputs()] == ["near", "far.0"]


def test_what_cannot_be_written_as_asked_is_refused(onnx, tmp_path):
    file = tmp_path / "m.onnx"
    fixed = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 4))
    for options, words in (
        ({"dynamic": ("depth",)}, "'depth' is none of batch, height, width"),
        ({"input_names": ["a", "b"]}, "2 input names were given for 1 inputs"),
        ({"dynamic": ("batch", "height")}, "cannot be exported"),  # its linear layer knows one size of image
    ):
        with pytest.raises(ValueError, match=words):
            export_onnx(fixed, file, torch.zeros(1, 3, 8, 8), **options)
    with pytest.raises(ValueError, match=r"the second argument is the file to write.*got a Tensor"):
        export_onnx(fixed, torch.zeros(1, 3, 8, 8), file)
    assert not file.exists()


def test_files_are_timed_beside_models_and_alone(onnx, tmp_path):
    path = tmp_path / "m.onnx"
    export_onnx(small_net(), path, EXAMPLE)
    options = {"backend": "onnxruntime", "batch_sizes": (1,), "repeats": 3}
    assert [t.name for t in latency({"file": path, "model": small_net()}, EXAMPLE, **options)] == ["file", "model"]
    assert [t.name for t in latency(path, **options)] == ["model"]
    with pytest.raises(ValueError, match="is no ONNX file"):
        latency(Path(__file__), **options)
    with pytest.raises(ValueError, match="PyTorch does not run files"):
        latency(path, EXAMPLE)
    with pytest.raises(ValueError, match="give an example input"):
        latency(small_net(), **options)


def test_linear_layers_in_a_row_are_exported_as_one_where_that_is_cheaper_and_exact(onnx):
    torch.manual_seed(0)
    merged = [
        [nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1)],
        [nn.Conv2d(3, 16, 1, bias=False), nn.Conv2d(16, 4, 3, padding=1), nn.Conv2d(4, 2, 1)],
        [nn.Conv2d(3, 9, 1), nn.Conv2d(9, 4, 3)],
    ]
    kept = [
        [nn.Conv2d(3, 9, 1), nn.Conv2d(9, 4, 3, padding=1)],  # the edge would see another bias
        [nn.Conv2d(3, 1, 1), nn.Conv2d(1, 8, 1)],  # a low rank
        [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1, stride=2)],  # most of the first is never used
        [nn.Conv2d(3, 6, 3, groups=3), nn.Conv2d(6, 1, 1)],
        [nn.Conv2d(3, 9, 1), nn.ReLU(), nn.Conv2d(9, 4, 1)],
    ]

    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows = nn.ModuleList(nn.Sequential(*row) for row in (*merged, *kept))
            self.head = nn.Sequential(nn.Linear(3, 40), nn.Linear(40, 4))
            self.both = nn.Linear(4, 4)

        def forward(self, x):
            means = torch.cat([row(x).mean((2, 3)) for row in self.rows], 1)
            y = self.head(x.mean((2, 3)))
            return torch.cat([means, y, self.both(y)], 1)  # what is read twice stays

    content, difference = onnx_room.exported(Rows().eval(), torch.randn(2, 3, 8, 8))
    kinds = [node.op_type for node in onnx.load_model_from_string(content).graph.node]
    assert kinds.count("Conv") == len(merged) + 2 * len(kept) and kinds.count("Gemm") == 2
    assert difference < 1e-5
