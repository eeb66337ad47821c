"""Pictures in folders as a user has them: sizes, channels, normalisation, splits; and weights that expect other inputs."""

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import espalier as es
from espalier.present.cli import app
from espalier.run.data import load_data
from espalier.run.images import Images
from espalier.run.suspect import suspicion

PIL = pytest.importorskip("PIL.Image")


def write(folder, *, size=(16, 16), mode="RGB", splits=("train", "val"), per_class=6, level=0):
    """Two classes: dark and bright pictures with noise."""
    random = np.random.default_rng(0)
    for split in splits:
        for number, name in enumerate(("dark", "bright")):
            (folder / split / name).mkdir(parents=True)
            for i in range(per_class):
                pixels = random.integers(0, 60, (size[1], size[0], 3)) + 120 * number + level
                PIL.fromarray(pixels.astype(np.uint8)).convert(mode).save(folder / split / name / f"{i}.png")
    return folder


def read(folder, **settings):
    return load_data(f"imagefolder:{folder}", images=Images(**settings))


def test_the_size_is_that_of_the_files_and_they_are_not_cut(tmp_path):
    data = read(write(tmp_path), mean="0", std="1")
    assert (data.image_size, data.resize) == (16, 16)
    assert "all of 16x16" in data.told
    picture = np.asarray(PIL.open(data.test[0][0]))
    x = next(data.test_batches())[0][0]
    assert torch.allclose(x, torch.from_numpy(picture).permute(2, 0, 1) / 255, atol=1e-6)


def test_pictures_of_several_sizes_are_resized_and_cut(tmp_path):
    write(tmp_path, size=(20, 12))
    write(tmp_path / "more", size=(30, 30))
    for split in ("train", "val"):
        (tmp_path / "more" / split / "dark" / "0.png").rename(tmp_path / split / "dark" / "other.png")
    data = read(tmp_path, image_size=8)
    assert (data.image_size, data.resize) == (8, 9)
    assert "of several sizes" in data.told
    assert next(data.test_batches())[0].shape == (13, 3, 8, 8)


def test_grey_pictures_are_found_and_read_as_one_channel(tmp_path):
    write(tmp_path, mode="L")
    assert "grey (--grey reads them as one channel)" in read(tmp_path).told
    data = read(tmp_path, grey=True)
    assert data.in_channels == 1
    assert next(data.train_batches(batch_size=4, epoch=0, seed=0))[0].shape == (4, 1, 16, 16)
    assert data.preprocessing.channels == 1


def test_a_measured_mean_is_that_of_the_training_images(tmp_path):
    data = read(write(tmp_path), mean="measured", std="measured", augment="none")
    x = torch.cat([x for x, _ in data.calibration_batches(batch_size=12, batches=1)])
    assert torch.allclose(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-3)
    assert torch.allclose(x.flatten(2).transpose(0, 1).reshape(3, -1).std(1), torch.ones(3), atol=1e-2)


@pytest.mark.parametrize("augment", ["none", "flip", "crop", "randaugment"])
def test_augmentation_depends_on_seed_epoch_and_place_alone(tmp_path, augment):
    data = read(write(tmp_path), augment=augment)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    one = next(data.train_batches(batch_size=12, epoch=3, seed=5))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    two = next(data.train_batches(batch_size=12, epoch=3, seed=5))
    other = next(data.train_batches(batch_size=12, epoch=4, seed=5))
    assert torch.equal(one[0], two[0])
    plain = sorted(float(x.sum()) for x in one[0])
    assert (plain == sorted(float(x.sum()) for x in other[0])) is (augment == "none")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mean": "grey"}, r"Images\(mean='grey'\): must be imagenet, measured, or 3 numbers"),
        ({"mean": "0.1,0.2"}, "or 3 numbers"),
        ({"std": "0"}, "above 0"),
        ({"mean": "127"}, r"Images\(mean='127'\): .*from 0 to 1; .*divide by 255"),
        ({"std": "58,57,58"}, r"Images\(std='58,57,58'\): .*divide by 255"),
        ({"grey": True, "mean": "0.1,0.2"}, "or 1 number,"),
        ({"resize": 3}, r"must be at least the side of the inputs, 16"),
        ({"train_split": "learn"}, r"needs the folders learn and val \(or test\).*--train-split"),
        ({"test_split": "holdout"}, "needs the folders train and holdout,"),
    ],
)
def test_settings_that_do_not_fit_the_pictures_are_refused(tmp_path, settings, words):
    write(tmp_path)
    with pytest.raises(ValueError, match=words):
        read(tmp_path, **settings)


def test_one_class_is_none_to_tell_apart(tmp_path):
    write(tmp_path)
    for split in ("train", "val"):
        (tmp_path / split / "dark").rename(tmp_path / f"{split}-dark")
    with pytest.raises(ValueError, match=r"train has one sub-folder, bright; give one for each class, two or more"):
        read(tmp_path)


def test_splits_are_named_freely(tmp_path):
    write(tmp_path, splits=("fit", "check"))
    data = read(tmp_path, train_split="fit", test_split="check")
    assert len(data.train) == len(data.test) == 12


def test_settings_of_pictures_are_refused_for_data_that_has_its_own():
    with pytest.raises(ValueError, match="digits has its own size"):
        load_data("digits", images=Images(augment="none"))


@pytest.mark.parametrize(("top", "kind"), [(65535, np.uint16), (1.0, np.float32)])
def test_pictures_of_more_than_eight_bits_are_scaled(tmp_path, top, kind):
    write(tmp_path)
    half = np.full((16, 16), top / 2).astype(kind)
    ending = "png" if kind is np.uint16 else "tif"
    PIL.fromarray(half).save(tmp_path / "val" / "dark" / f"0-deep.{ending}")
    data = read(tmp_path, mean="0", std="1")
    place = next(i for i, (path, _) in enumerate(data.test) if "deep" in path.name)
    assert torch.allclose(next(data.test_batches())[0][place], torch.tensor(0.5), atol=0.01)


def test_floats_beyond_one_are_refused_by_name(tmp_path):
    write(tmp_path)
    PIL.fromarray(np.full((16, 16), 300.0, dtype=np.float32)).save(tmp_path / "val" / "dark" / "deep.tif")
    with pytest.raises(ValueError, match=r"deep.tif: its pixels go from 300 to 300, not from 0 to 1$"):
        list(read(tmp_path).test_batches())


class Threshold(nn.Module):
    """Classifies rightly what is normalised with mean 0.5 and std 0.5: bright is above -0.2."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 2)
        with torch.no_grad():
            self.linear.weight.copy_(torch.tensor([[10.0], [-10.0]]))
            self.linear.bias.copy_(torch.tensor([2.0, -2.0]))

    def forward(self, x):
        return self.linear(x.mean((1, 2, 3), keepdim=True).flatten(1))


def test_weights_that_expect_another_normalisation_are_found_out(tmp_path):
    write(tmp_path, level=60)  # with ImageNet's constants half of the dark ones would count as bright
    net = Threshold()
    right = read(tmp_path, mean="0.5", std="0.5")
    assert suspicion(net, right) is None
    wrong = read(tmp_path, mean="0", std="1")
    said = suspicion(net, wrong)
    assert said is not None
    assert "100.0 % with mean 0.5 and std 0.5" in said
    assert "--mean 0.5 --std 0.5" in said
    with torch.no_grad():
        net.linear.weight.neg_()  # wrong however the pictures are normalised
        net.linear.bias.neg_()
    assert "Were they trained on these classes in this order" in str(suspicion(net, right))


def test_the_command_line_says_what_was_found_and_warns_of_weights_that_do_not_fit(tmp_path, unmeasured):
    pictures = write(tmp_path / "pictures", mode="L", per_class=8)
    net = es.build_model("resnet8", num_classes=2, in_channels=1, image_size=16)
    es.save(net, tmp_path / "weights.safetensors")
    found = CliRunner().invoke(
        app,
        [
            *("compress", "--model", "resnet8", "--weights", str(tmp_path / "weights.safetensors"), "--grey"),
            *("--data", f"imagefolder:{pictures}", "--mean", "measured", "--std", "measured", "--augment", "none"),
            *(
                "--method",
                "magnitude",
                "--macs",
                "0.5",
                "--epochs",
                "0",
                "--batch-size",
                "8",
                "--out",
                str(tmp_path / "run"),
            ),
        ],
    )
    assert found.exit_code == 0, found.output
    assert "16 training and 16 test images of 2 classes, all of 16x16 and grey; inputs are 1x16x16" in found.output
    assert "warning: the given weights classify" in found.output
    assert "it is not made a teacher" in found.output
    assert "dense  test" in found.output
    config = (tmp_path / "run" / "config.toml").read_text()
    assert 'mean = "measured"' in config
    assert "grey = true" in config


def test_the_central_cut_is_named_as_in_training_scripts(tmp_path, unmeasured):
    pictures = write(tmp_path / "pictures", per_class=2)
    asked = (
        "--resize",
        "14",
        "--crop",
        "12",
        "--batch-size",
        "4",
        "--epochs",
        "0",
        "--method",
        "none",
        "--out",
        str(tmp_path / "run"),
    )
    found = CliRunner().invoke(app, ["compress", "--model", "resnet8", "--data", f"imagefolder:{pictures}", *asked])
    assert found.exit_code == 0 and "inputs are 3x12x12" in found.output, found.output
