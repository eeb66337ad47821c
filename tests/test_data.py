"""Data by name, batches that depend on seed and epoch alone, and the user's own loaders."""

import hashlib
import pickle
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch.utils.data import DataLoader, TensorDataset

from espalier.run import cifar
from espalier.run.batches import Normalise, crop_and_flip, epoch_seed, stratified_order
from espalier.run.data import Data, FolderData, Loaders, Split, identity, load_data

# ---------------------------------------------------------------- sources, and what holds for each of them


def write_images(folder, *, classes=("cat", "dog"), per_class=6, splits=("train", "val")):
    from PIL import Image

    random = np.random.RandomState(0)
    for split in splits:
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for i in range(per_class):
                pixels = random.randint(0, 256, (20 + i, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


def make_digits(_):
    return load_data("digits", holdout=37)


def make_folder(tmp_path):
    pytest.importorskip("PIL")
    return load_data(f"imagefolder:{write_images(tmp_path)}", image_size=16, holdout=2)


def make_loaders(_):
    images = torch.randn(30, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(30) % 3
    whole = TensorDataset(images, labels)
    return Loaders(DataLoader(whole, 4, shuffle=True), DataLoader(whole, 7), num_classes=3, holdout=[(images, labels)])


SOURCES = {"digits": make_digits, "folder": make_folder, "loaders": make_loaders}


@pytest.fixture(params=SOURCES)
def source(request, tmp_path):
    return SOURCES[request.param](tmp_path)


def epoch(source, *, epoch, seed=3):
    return list(source.train_batches(batch_size=4, epoch=epoch, seed=seed))


def same(left, right):
    return len(left) == len(right) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(left, right, strict=True)
    )


def test_batches_are_normalised_images_with_labels(source):
    for batches in (source.test_batches(5), source.holdout_batches(5), epoch(source, epoch=0)):
        x, y = next(iter(batches))
        assert x.dtype == torch.float32 and y.dtype == torch.int64
        assert x.shape == (len(y), source.in_channels, source.image_size, source.image_size)
        assert int(y.min()) >= 0 and int(y.max()) < source.num_classes


def test_an_epoch_depends_on_seed_and_epoch_alone(source):
    straight = [epoch(source, epoch=e) for e in range(3)]
    torch.manual_seed(99)
    torch.rand(7)
    assert same(epoch(source, epoch=2), straight[2])  # as a resumed run would ask for it
    assert not same(straight[1], straight[2])
    assert not same(epoch(source, epoch=2, seed=4), straight[2])


def test_batches_leave_the_global_generator_alone(source):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    epoch(source, epoch=0)
    list(source.calibration_batches(batch_size=4, batches=2))
    assert torch.equal(torch.get_rng_state(), state)


def test_an_epoch_has_the_announced_steps(source):
    assert len(epoch(source, epoch=0)) == source.steps(4)


def test_evaluation_sees_every_image_once_in_order(source):
    whole = torch.cat([y for _, y in source.test_batches(1000)])
    parts = torch.cat([y for _, y in source.test_batches(3)])
    assert torch.equal(whole, parts)
    assert same(list(source.test_batches(3)), list(source.test_batches(3)))


def test_the_example_is_always_the_same(source):
    assert source.example(3).shape == (3, source.in_channels, source.image_size, source.image_size)
    assert torch.equal(source.example(3), source.example(3))
    assert torch.equal(source.example(1000)[:3], source.example(3))  # longer than the data


def test_calibration_batches_are_as_many_as_asked(source):
    batches = list(source.calibration_batches(batch_size=4, batches=2))
    assert [len(y) for _, y in batches] == [4, 4]
    assert same(batches, list(source.calibration_batches(batch_size=4, batches=2)))


def test_channels_last_changes_the_layout_only(source):
    (x, y), (z, w) = next(source.test_batches(4)), next(source.test_batches(4, channels_last=True))
    assert torch.equal(x, z) and torch.equal(y, w)
    assert z.is_contiguous(memory_format=torch.channels_last)


def test_negative_seeds_are_refused(source):
    with pytest.raises(ValueError, match="0 or more"):
        epoch(source, epoch=0, seed=-1)


# ---------------------------------------------------------------- digits


def test_digits_are_the_real_ones_split_by_class():
    data = load_data("digits")
    assert (len(data.train), len(data.test), data.has_holdout) == (1437, 360, False)
    counts = data.test.labels.bincount()
    assert counts.min() >= 34 and counts.max() <= 38
    x = torch.cat([x for x, _ in data.calibration_batches(batch_size=1437, batches=1)])
    assert abs(float(x.mean())) < 1e-3 and abs(float(x.std()) - 1) < 1e-3


def test_held_out_images_leave_the_training_set():
    whole, parted = load_data("digits"), load_data("digits", holdout=200)
    assert (len(parted.train), len(parted.holdout)) == (1237, 200)
    rows = [*parted.train.images.flatten(1).tolist(), *parted.holdout.images.flatten(1).tolist()]
    assert sorted(rows) == sorted(whole.train.images.flatten(1).tolist())
    assert torch.equal(whole.test.images, parted.test.images)
    assert torch.equal(parted.holdout.images, load_data("digits", holdout=200).holdout.images)


def test_no_held_out_images_is_an_error_that_says_how():
    with pytest.raises(ValueError, match="holdout=N"):
        load_data("digits").holdout_batches()


@pytest.mark.parametrize("holdout", [-1, 1437])
def test_a_holdout_that_leaves_nothing_is_refused(holdout):
    with pytest.raises(ValueError, match=f"holdout={holdout}: .* of 1437"):
        load_data("digits", holdout=holdout)


def test_training_digits_are_shifted_but_not_mirrored():
    data = load_data("digits")
    alone = replace(data, train=data.train[:1], mean=(0.0,), std=(1.0,))
    picture = (data.train.images[0, 0] / 16).tolist()
    padded = torch.nn.functional.pad(torch.tensor(picture), (1, 1, 1, 1))
    shifts = [padded[i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    seen = set()
    for e in range(60):
        x, _ = next(alone.train_batches(batch_size=1, epoch=e, seed=0))
        seen.add(next(k for k, shift in enumerate(shifts) if torch.allclose(shift, x[0, 0])))
    assert seen == set(range(9))


def test_an_epoch_draws_no_image_twice():
    data = replace(load_data("digits"), pad=0)
    x = torch.cat([x for x, _ in data.train_batches(batch_size=100, epoch=0, seed=0)])
    assert len(x) == 1400  # whole batches only
    originals = Counter(row.tobytes() for row in data._normalise(data.train.images).numpy())
    assert Counter(row.tobytes() for row in x.numpy()) <= originals


def test_a_set_smaller_than_the_batch_gives_one_batch():
    data = load_data("digits")
    small = replace(data, train=data.train[:10])
    assert [len(y) for _, y in small.train_batches(batch_size=64, epoch=0, seed=0)] == [10]
    with pytest.raises(ValueError, match="batch size"):
        small.train_batches(batch_size=0, epoch=0, seed=0)


# ---------------------------------------------------------------- what Data refuses


def make_data(**changes):
    split = Split(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 2, 0]))
    sizes = {"name": "made", "num_classes": 3, "in_channels": 1, "image_size": 8}
    splits = {"train": split, "test": split, "holdout": split[:0]}
    return Data(**{**sizes, **splits, "mean": (0.5,), "std": (0.5,), **changes})


IMAGES = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": Split(IMAGES, torch.tensor([0, 3]))}, "made, train: label 3 lies outside the 3 classes"),
        ({"test": Split(IMAGES, torch.tensor([-1, 0]))}, "made, test: label -1"),
        ({"train": Split(IMAGES, torch.tensor([0.0, 1.0]))}, "class numbers"),
        ({"train": Split(IMAGES, torch.tensor([0]))}, "2 images have 1 labels"),
        ({"train": Split(IMAGES[:0], torch.tensor([], dtype=torch.int64))}, "there are no images"),
        ({"test": Split(IMAGES.float(), torch.tensor([0, 1]))}, "uint8"),
        ({"in_channels": 3, "mean": (0.5,) * 3, "std": (0.5,) * 3}, r"\(n, 3, 8, 8\)"),
        ({"mean": (0.5, 0.5)}, "mean and std"),
    ],
)
def test_data_that_cannot_be_right_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_data(**changes)


# ---------------------------------------------------------------- augmentation


def test_crop_and_flip_equals_the_slow_way():
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (20, 3, 6, 5), generator=random, dtype=torch.uint8)
    down, right = torch.randint(5, (2, 20), generator=random)
    flip = torch.rand(20, generator=random) < 0.5
    out = crop_and_flip(images, down=down, right=right, flip=flip, pad=2)
    for i in range(20):
        padded = torch.nn.functional.pad(images[i], (2, 2, 2, 2))
        expected = padded[:, down[i] : down[i] + 6, right[i] : right[i] + 5]
        assert torch.equal(out[i], expected.flip(-1) if flip[i] else expected)


def test_normalise_is_the_formula():
    images = torch.arange(24, dtype=torch.uint8).view(1, 2, 3, 4)
    out = Normalise((0.4, 0.5), (0.2, 0.25), levels=255, device=torch.device("cpu"))(images)
    mean, std = torch.tensor([0.4, 0.5]).view(1, 2, 1, 1), torch.tensor([0.2, 0.25]).view(1, 2, 1, 1)
    torch.testing.assert_close(out, (images / 255 - mean) / std)


@given(st.lists(st.integers(0, 4), min_size=2, max_size=60), st.data())
def test_stratified_order_parts_every_class_in_its_share(labels, data):
    labels = np.array(labels)
    size = data.draw(st.integers(0, len(labels) - 1))
    kept, aside = stratified_order(labels, size, seed=0)
    assert len(aside) == size
    assert sorted([*kept, *aside]) == list(range(len(labels)))
    for label in np.unique(labels):
        share = size * (labels == label).mean()
        assert abs((labels[aside] == label).sum() - share) <= len(np.unique(labels))


def test_epoch_seeds_do_not_collide():
    assert len({epoch_seed(seed, e) for seed in range(30) for e in range(100)}) == 3000


# ---------------------------------------------------------------- names


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'cifar11'.*digits, cifar10, cifar100"):
        load_data("cifar11")


def test_an_image_size_that_the_set_does_not_have_is_refused():
    with pytest.raises(ValueError, match="8x8"):
        load_data("digits", image_size=32)


# ---------------------------------------------------------------- CIFAR


def write_cifar100(folder, monkeypatch, *, content=None):
    """A tiny CIFAR-100 whose sums are declared to be the published ones."""
    files = {}
    (folder / "cifar-100-python").mkdir()
    for name, n in {"train": 6, "test": 2}.items():
        images = np.arange(n * 3072, dtype=np.uint32).astype(np.uint8).reshape(n, 3072)
        batch = content or {"data": images, "fine_labels": [i * 7 for i in range(n)], "filenames": ["x.png"] * n}
        written = pickle.dumps(batch, protocol=4)
        (folder / "cifar-100-python" / name).write_bytes(written)
        files[name] = hashlib.md5(written).hexdigest()
    layout = replace(cifar.LAYOUTS["cifar100"], train={"train": files["train"]}, test={"test": files["test"]})
    monkeypatch.setitem(cifar.LAYOUTS, "cifar100", layout)


@pytest.mark.parametrize("inside", [False, True])
def test_cifar100_is_read_from_its_folder_or_the_parent(tmp_path, monkeypatch, inside):
    write_cifar100(tmp_path, monkeypatch)
    data = load_data("cifar100", data_dir=tmp_path / "cifar-100-python" if inside else tmp_path)
    assert data.train.labels.tolist() == [0, 7, 14, 21, 28, 35]
    assert data.train.images.shape == (6, 3, 32, 32) and data.num_classes == 100
    assert data.train.images[1, 0, 0, :3].tolist() == [0, 1, 2]  # 3072 is a multiple of 256


def test_the_environment_names_the_data_folder(tmp_path, monkeypatch):
    write_cifar100(tmp_path, monkeypatch)
    monkeypatch.setenv("ESPALIER_DATA_DIR", str(tmp_path))
    assert len(load_data("cifar100").test) == 2


def test_absent_cifar_says_where_it_looked(tmp_path):
    with pytest.raises(ValueError, match=r"cifar-10-batches-py.*--download"):
        load_data("cifar10", data_dir=tmp_path)


def test_a_truncated_batch_is_named(tmp_path, monkeypatch):
    write_cifar100(tmp_path, monkeypatch)
    path = tmp_path / "cifar-100-python" / "test"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cifar-100-python/test is not the published file"):
        load_data("cifar100", data_dir=tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="test is missing"):
        load_data("cifar100", data_dir=tmp_path)


class Payload:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_batch_cannot_execute_code(tmp_path, monkeypatch, capsys):
    write_cifar100(tmp_path, monkeypatch, content={"data": Payload()})
    with pytest.raises(pickle.UnpicklingError, match="no business with"):
        load_data("cifar100", data_dir=tmp_path)
    assert "executed" not in capsys.readouterr().out


def test_the_real_cifar10(cifar_dir):
    data = load_data("cifar10", data_dir=cifar_dir, holdout=5000)
    assert (len(data.train), len(data.holdout), len(data.test)) == (45_000, 5000, 10_000)
    assert data.holdout.labels.bincount().tolist() == [500] * 10
    assert data.test.labels[:8].tolist() == [3, 8, 8, 0, 6, 6, 1, 6]
    assert data.test.images[0, :, 0, 0].tolist() == [158, 112, 49]
    x, _ = next(data.train_batches(batch_size=64, epoch=0, seed=0))
    assert x.shape == (64, 3, 32, 32)


# ---------------------------------------------------------------- image folders


def test_folders_are_classes(tmp_path):
    data = make_folder(tmp_path)
    assert isinstance(data, FolderData)
    assert (data.classes, data.num_classes, data.in_channels) == (("cat", "dog"), 2, 3)
    assert (len(data.train), len(data.holdout), len(data.test)) == (10, 2, 12)
    assert torch.cat([y for _, y in data.test_batches(5)]).tolist() == [0] * 6 + [1] * 6


def test_workers_do_not_change_the_batches(tmp_path):
    alone = make_folder(tmp_path)
    assert same(epoch(replace(alone, workers=2), epoch=1), epoch(alone, epoch=1))


def test_a_folder_of_images_is_the_same_wherever_it_is(tmp_path):
    here, there = (load_data(f"imagefolder:{write_images(tmp_path / name)}", image_size=16) for name in "ab")
    assert identity(here) == identity(there)
    assert identity(here) != identity(replace(here, image_size=8))
    assert identity(here) != identity(replace(here, train=here.train[:-1], test=here.test[:-1] + here.train[-1:]))


def test_loaders_without_a_length_are_told_apart_by_what_has_one():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([(X[0], Y[0])])

    source = Loaders([(X, Y)] * 3, DataLoader(Stream()), num_classes=3)
    assert identity(source) == {"training batches": 3}


def test_a_loader_whose_data_set_has_no_length_is_refused():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([(X[0], Y[0])])

    with pytest.raises(ValueError, match="train loader has no length"):
        Loaders(DataLoader(Stream()), [(X, Y)], num_classes=3).steps(1)


def test_a_test_folder_may_lack_a_class_but_not_add_one(tmp_path):
    write_images(tmp_path, classes=("a", "b", "c"), splits=("train",), per_class=1)
    write_images(tmp_path, classes=("b",), splits=("test",), per_class=1)
    data = load_data(f"imagefolder:{tmp_path}", image_size=8)
    assert [y.tolist() for _, y in data.test_batches()] == [[1]]
    (tmp_path / "test" / "z").mkdir()
    with pytest.raises(ValueError, match="train lacks: z"):
        load_data(f"imagefolder:{tmp_path}", image_size=8)


def test_a_damaged_image_is_named(tmp_path):
    write_images(tmp_path)
    (tmp_path / "val" / "dog" / "3.png").write_bytes(b"not a picture")
    data = load_data(f"imagefolder:{tmp_path}", image_size=8)
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"^\S*val/dog/3\.png cannot be decoded"):
            list(replace(data, workers=workers).test_batches())


def test_layouts_that_are_not_image_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        load_data(f"imagefolder:{tmp_path / 'absent'}")
    with pytest.raises(ValueError, match="needs the folders train and val"):
        load_data(f"imagefolder:{tmp_path}")
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    with pytest.raises(ValueError, match="no sub-folders"):
        load_data(f"imagefolder:{tmp_path}")
    (tmp_path / "train" / "cat").mkdir()
    with pytest.raises(ValueError, match="cat has no images"):
        load_data(f"imagefolder:{tmp_path}")


# ---------------------------------------------------------------- the user's own loaders

X, Y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 1])


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([], "train loader is empty"),
        (((x, y) for x, y in [(X, Y)]), "generator, which cannot be gone through again"),
        (7, "int, which"),
        ([X], "Tensor, not a pair"),
        ([(X, Y, Y)], "not a pair"),
        ([(X, Y + 1)], "label 3 lies outside the 3 classes"),
        ([(X, Y[:2])], "4 images with 2 labels"),
        ([(X.to(torch.uint8), Y)], "normalised floats"),
        ([(X.flatten(1), Y)], r"images are \(n, c, h, w\)"),
        ([(X, torch.nn.functional.one_hot(Y, 3))], "one integer per image"),
    ],
)
def test_loaders_that_cannot_serve_are_refused(train, message):
    with pytest.raises(ValueError, match=message):
        Loaders(train, [(X, Y)], num_classes=3)


def test_a_wrong_label_in_a_later_batch_is_found_when_it_comes():
    source = Loaders([(X, Y), (X, Y + 1)], [(X, Y)], num_classes=3)
    batches = source.train_batches(batch_size=4, epoch=0, seed=0)
    next(batches)
    with pytest.raises(ValueError, match="train loader: label 3"):
        next(batches)


def test_labels_of_a_batch_are_fetched_from_the_device_at_once(copied):
    source = Loaders([(X, Y)], [(X, Y)], num_classes=3)
    copied.clear()
    next(source.test_batches())
    assert copied == {"cpu": 1}


def test_an_empty_test_loader_is_found_when_it_is_used():
    with pytest.raises(ValueError, match="test loader is empty"):
        list(Loaders([(X, Y)], [], num_classes=3).test_batches())


def test_loaders_without_holdout_say_so():
    source = Loaders([(X, Y)], [(X, Y)], num_classes=3)
    assert not source.has_holdout
    with pytest.raises(ValueError, match="holdout=loader"):
        source.holdout_batches()
