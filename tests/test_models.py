"""Networks by name and their weights."""

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from espalier.layers import ChannelPad
from espalier.optional import MissingPackage, import_optional
from espalier.run.data import load_data
from espalier.run.models import CIFAR_MODELS, CifarResNet, CifarVgg, build_model, load_weights


def parameters(model):
    return sum(p.numel() for p in model.parameters())


# ---------------------------------------------------------------- the CIFAR networks


@pytest.mark.parametrize(("planes", "stride", "size"), [(16, 2, 32), (32, 2, 7), (8, 1, 5)])
def test_channel_pad_is_the_published_shortcut(planes, stride, size):
    x = torch.randn(2, planes, size, size)
    pad = planes // 2  # the stage doubles the planes, and a quarter of the new ones goes on either side
    expected = F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, pad, pad), "constant", 0)
    assert torch.equal(ChannelPad(pad, pad, stride=stride)(x), expected)


def test_channel_pad_rejects_negative_padding():
    with pytest.raises(ValueError, match="before=-1"):
        ChannelPad(-1, 0)


@pytest.mark.parametrize("name", CIFAR_MODELS)
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32)])
def test_cifar_networks_run_on_digits_and_cifar(name, channels, size):
    model = build_model(name, num_classes=7, in_channels=channels, image_size=size).eval()
    with torch.no_grad():
        assert model(torch.randn(2, channels, size, size)).shape == (2, 7)


@pytest.mark.parametrize(("name", "expected"), [("resnet20a", 269_722), ("resnet32a", 464_154), ("resnet56a", 853_018)])
def test_parameters_of_the_published_networks(name, expected):
    assert parameters(build_model(name, num_classes=10)) == expected


def test_option_b_adds_two_projections():
    projections = (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)
    assert parameters(CifarResNet(20)) - parameters(CifarResNet(20, shortcut="A")) == projections


@pytest.mark.parametrize(("size", "pools"), [(1, 0), (8, 3), (31, 4), (32, 5), (64, 5)])
def test_vgg_leaves_out_pools_that_would_empty_the_map(size, pools):
    model = CifarVgg(image_size=size).eval()
    assert sum(isinstance(m, nn.MaxPool2d) for m in model.modules()) == pools
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == 13
    assert sum(isinstance(m, nn.Linear) for m in model.modules()) == 1
    assert model(torch.randn(1, 3, size, size)).shape == (1, 10)


def test_a_depth_that_is_no_resnet_is_refused():
    with pytest.raises(ValueError, match="6n\\+2"):
        CifarResNet(21)
    with pytest.raises(ValueError, match="'C'"):
        CifarResNet(20, shortcut="C")


# ---------------------------------------------------------------- by name


def test_a_wrong_name_lists_close_ones():
    with pytest.raises(ValueError, match=r"'resnt56'.*resnet56"):
        build_model("resnt56", num_classes=10)


@pytest.mark.parametrize("name", ["torchvision:resnet1", "timm:resnet1"])
def test_a_wrong_name_of_a_package_lists_its_close_ones(name):
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=r"close matches: .*resnet1"):
        build_model(name, num_classes=10)


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("torchvision:shufflenet_v2_x0_5", 3),
        ("squeezenet1_1", 3),  # a bare name of torchvision
        ("torchvision:resnet18", 1),
        ("torchvision:mobilenet_v3_small", 4),
        ("timm:resnet10t", 1),
        ("ghostnet_050", 3),  # a bare name of timm
        ("timm:vit_tiny_patch16_224", 3),  # must be built for the image size
    ],
)
def test_networks_of_the_packages_are_built_for_the_data(name, channels):
    pytest.importorskip("timm")
    model = build_model(name, num_classes=5, in_channels=channels, image_size=64).eval()
    with torch.no_grad():
        assert model(torch.randn(2, channels, 64, 64)).shape == (2, 5)


def test_the_first_convolution_answers_grey_images_as_it_did_coloured_ones():
    pytest.importorskip("torchvision")
    torch.manual_seed(0)
    coloured = build_model("torchvision:resnet18", num_classes=10).conv1
    torch.manual_seed(0)
    grey = build_model("torchvision:resnet18", num_classes=10, in_channels=1).conv1
    image = torch.randn(4, 1, 32, 32)
    with torch.no_grad():
        one, three = grey(image), coloured(torch.randn(4, 3, 32, 32))
    assert grey.in_channels == 1 and one.shape == three.shape
    assert float(one.std()) == pytest.approx(float(three.std()), rel=0.1)


def test_a_torchvision_network_that_reads_no_flat_images_says_what_to_do():
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match="takes 3 input channels and the data has 1; use a network of timm"):
        build_model("torchvision:r3d_18", num_classes=10, in_channels=1)


def test_a_segmentation_network_downloads_no_backbone(monkeypatch):
    pytest.importorskip("timm")

    def refuse(*args, **kwargs):
        raise AssertionError("a download was tried")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    assert parameters(build_model("torchvision:lraspp_mobilenet_v3_large", num_classes=4)) > 0


def test_an_absent_package_names_its_extra():
    with pytest.raises(MissingPackage, match=r"pip install '\.\[models\]'"):
        import_optional("no_such_package_at_all.models", extra="models")


# ---------------------------------------------------------------- the user's own

OWN = """
from torch import nn

def plain(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))

def everything(**sizes):
    return nn.Linear(sizes["in_channels"], sizes["image_size"])

def wrong():
    return "a network"

def wants(depth, num_classes, *, width=3):
    return nn.Linear(depth, num_classes)

def by_place(num_classes, /):
    return nn.Linear(1, num_classes)

def lacks_a_key():
    return {}["width"]

def misbuilds():
    return nn.Conv2d(3, 4, 3, groups=2)
"""

BROKEN = {
    "half_written": "def net(:\n    pass\n",
    "raises_at_import": "import os\n\nraise RuntimeError('no licence\\nand more')\n",
    "lacks_a_package": "import no_such_package_at_all\n",
    "imports_half_written": "import half_written\n",
}


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_networks.py").write_text(OWN)
    for name, content in BROKEN.items():
        (tmp_path / f"{name}.py").write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield
    sys.modules.pop("own_networks", None)


def test_a_factory_in_the_current_folder_takes_what_it_names(own_module):
    model = build_model("own_networks:plain", num_classes=3, in_channels=1, image_size=8)
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
    assert build_model("own_networks:everything", num_classes=3, in_channels=1, image_size=8).weight.shape == (8, 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_networks:wrong", "returned a str"),
        ("own_networks:plane", "no function 'plane'; it has plain"),
        ("own_network:plain", "no module 'own_network'"),
        ("own_networks.sub:plain", "no module 'own_networks.sub'"),
        ("own_networks:wants", r"^own_networks:wants: takes depth, .*num_classes, in_channels, image_size.*default"),
        ("own_networks:by_place", r"^own_networks:by_place: takes num_classes, .*by name"),
        ("own_networks:lacks_a_key", r"^own_networks:lacks_a_key: KeyError: 'width' \(.*own_networks\.py:20\)$"),
        ("own_networks:misbuilds", r"^own_networks:misbuilds: ValueError: .*groups \(.*own_networks\.py:23\)$"),
        ("half_written:net", r"^half_written:net: SyntaxError: .*\(half_written\.py, line 1\)$"),
        ("imports_half_written:net", r"SyntaxError: .*\(half_written\.py, line 1\) \(.*imports_half_written\.py:1\)$"),
        ("raises_at_import:net", r"^raises_at_import:net: RuntimeError: no licence \(.*raises_at_import\.py:3\)$"),
        ("lacks_a_package:net", r"ModuleNotFoundError: .*no_such_package_at_all.* \(.*lacks_a_package\.py:1\)$"),
    ],
)
def test_a_wrong_factory_says_what_is_there(own_module, name, message):
    with pytest.raises(ValueError, match=message):
        build_model(name, num_classes=3)


# ---------------------------------------------------------------- weights


def assert_same_weights(left, right):
    pairs = zip(left.state_dict().items(), right.state_dict().items(), strict=True)
    assert all(name == other and torch.equal(a, b) for (name, a), (other, b) in pairs)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"state_dict": weights, "epoch": 3},
        lambda weights: {"model": {"state_dict": weights}},
        lambda weights: {f"module.{key}": value for key, value in weights.items()},
        lambda weights: {"state_dict": {f"module._orig_mod.{key}": value for key, value in weights.items()}},
        lambda weights: {"net": weights, "acc": np.float64(91.7), "epoch": np.int64(3), "best": np.float32(1.0)},
        lambda weights: {"model": weights, "args": argparse.Namespace(lr=0.1, out=Path("runs")), "optimizer": {}},
        lambda weights: {"model": {"name": "resnet20"}, "ema": {"decay": 0.99, "module": weights}},
    ],
    ids=["plain", "state_dict", "nested", "module", "compiled and parallel", "net", "argparse", "ema"],
)
def test_wrapped_checkpoints_load(tmp_path, wrap):
    saved, fresh = CifarResNet(20), CifarResNet(20)
    torch.save(wrap(saved.state_dict()), tmp_path / "w.pt")
    load_weights(fresh, tmp_path / "w.pt")
    assert_same_weights(saved, fresh)


def test_safetensors_load(tmp_path):
    saved, fresh = CifarResNet(20), CifarResNet(20)
    save_file(saved.state_dict(), tmp_path / "w.safetensors")
    load_weights(fresh, tmp_path / "w.safetensors")
    assert_same_weights(saved, fresh)


def test_a_prefix_that_the_network_itself_has_is_kept(tmp_path):
    saved, fresh = (nn.ModuleDict({"model": nn.Linear(2, 2)}) for _ in range(2))
    torch.save(saved.state_dict(), tmp_path / "w.pt")
    load_weights(fresh, tmp_path / "w.pt")
    assert_same_weights(saved, fresh)


def test_what_does_not_fit_is_listed_and_nothing_is_loaded(tmp_path):
    weights = CifarResNet(20, num_classes=100).state_dict()
    del weights["bn1.bias"]
    weights["extra"] = torch.zeros(1)
    torch.save(weights, tmp_path / "w.pt")
    model = CifarResNet(20)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        load_weights(model, tmp_path / "w.pt")
    message = str(caught.value)
    assert "1 missing in the file: bn1.bias" in message
    assert "1 not in the model: extra" in message
    assert "2 of another shape: linear.weight (100x64 in the file, 10x64 in the model)" in message
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_long_list_is_cut(tmp_path):
    torch.save({"other": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"missing in the file: .*, and \d+ more"):
        load_weights(CifarResNet(20), tmp_path / "w.pt")


@pytest.mark.parametrize(("given", "fitting"), [("resnet20", "resnet20a"), ("resnet32a", "resnet20a")])
def test_weights_without_shortcuts_name_the_network_they_fit(tmp_path, given, fitting):
    torch.save(build_model("resnet20a", num_classes=10).state_dict(), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=f"the network is {given}; these are weights of {fitting}"):
        load_weights(build_model(given, num_classes=10), tmp_path / "w.pt")


def test_weights_with_projections_name_the_network_they_fit(tmp_path):
    torch.save(CifarResNet(20).state_dict(), tmp_path / "w.pt")
    with pytest.raises(ValueError, match="the network is resnet20a; these are weights of resnet20, with option-B"):
        load_weights(CifarResNet(20, shortcut="A"), tmp_path / "w.pt")


class Payload:
    """Stands for whatever a pickle might execute."""


def broken_files(folder):
    torch.save(CifarResNet(20).state_dict(), folder / "whole.pt")
    save_file(CifarResNet(20).state_dict(), folder / "whole.safetensors")
    for name in ("whole.pt", "whole.safetensors"):
        content = (folder / name).read_bytes()
        (folder / f"cut.{name}").write_bytes(content[: len(content) // 2])
    (folder / "empty.pt").write_bytes(b"")
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "text.th").write_text("these are not weights")
    torch.save({"state_dict": Payload()}, folder / "code.pt")
    torch.save([1, 2], folder / "list.pt")
    torch.save({"epoch": 3}, folder / "numbers.pt")


@pytest.mark.parametrize(
    "name",
    [
        *("cut.whole.pt", "cut.whole.safetensors", "empty.pt", "empty.safetensors", "text.th"),
        *("code.pt", "list.pt", "numbers.pt", "absent.pt"),
    ],
)
def test_files_that_are_not_weights_are_named(tmp_path, name):
    broken_files(tmp_path)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load_weights(CifarResNet(20), tmp_path / name)


def test_a_pickled_object_is_named(tmp_path):
    torch.save({"model": CifarResNet(20).state_dict(), "ema": Payload()}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match=r"code\.pt.*pickled objects.*test_models\.Payload; save model\.state_dict"):
        load_weights(CifarResNet(20), tmp_path / "code.pt")


@pytest.mark.parametrize("file", ["resnet20-12fca82f.th", "resnet32-d509ac18.th", "resnet56-4bfd9763.th"])
def test_the_published_weights_fit_option_a(weights_dir, file):
    model = build_model(file.split("-")[0] + "a", num_classes=10)
    load_weights(model, weights_dir / file)
    published = torch.load(weights_dir / file, map_location="cpu", weights_only=True)["state_dict"]
    own = model.state_dict()
    assert all(torch.equal(own[key.removeprefix("module.")], value) for key, value in published.items())
    assert len(published) == sum(not key.endswith("num_batches_tracked") for key in own)


def test_resnet20_classifies_as_many_real_images_as_published(weights_dir, cifar_dir):
    """915 of the first 1000; all 10,000, measured once, give 9173, the published 91.73 %."""
    data = load_data("cifar10", data_dir=cifar_dir)
    model = build_model("resnet20a", num_classes=10).eval()
    load_weights(model, weights_dir / "resnet20-12fca82f.th")
    with torch.no_grad():
        batches = (next_batch for next_batch, _ in zip(data.test_batches(500), range(2), strict=False))
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    assert right == 915
