"""Files of networks: what was saved comes back, and anything else is one line that names the file and changes nothing."""

from __future__ import annotations

import copy
import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import espalier as es
from espalier.seals import SEAL


class Net(nn.Module):
    """Settings of PyTorch's layers and of one's own, whole numbers that follow nothing, and a counter."""

    def __init__(
        self, *, eps: float = 1e-3, slope: float = 0.1, stride: int = 2, scale: float = 0.5, act: Any = F.relu,
        skip: bool = True, mode: str = "nearest", step: int = 2, ceil: bool = False, drop: float = 0.1,
        leaky: type[nn.Module] = nn.LeakyReLU, gain: float = 1.0, floor: float = 0.0, bend: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16, eps=eps)
        self.l, self.p = leaky(slope), nn.MaxPool2d(2, stride, ceil_mode=ceil)
        self.b, self.d = nn.Conv2d(16, 8, 3, padding=1), nn.Dropout(drop)
        self.scale, self.act, self.skip, self.mode, self.step = scale, act, skip, mode, step
        self.gains, self.config = {"of b": gain}, SimpleNamespace(floor=floor)
        self.bent = functools.partial(F.leaky_relu, negative_slope=bend)
        self.calls = 0
        self.log_path = "/home/somebody/log"
        self.training_args = {"epochs": random.randint(0, 10**9)}

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.act(self.p(self.l(self.n(self.a(x)))))[:, :, :: self.step]
        y = self.bent(self.d(self.b(x)) * self.scale * self.gains["of b"] - self.config.floor)
        return F.interpolate(y, scale_factor=2, mode=self.mode) if self.skip else y


X = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def small() -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    net.n.running_var.fill_(1e-3)
    return es.compress(net, X, budget=es.Budget(macs=0.5), method=es.Magnitude()).model.eval()


@pytest.fixture
def file(small: nn.Module, tmp_path: Path) -> Path:
    es.save(small, tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors"


# -- onto another base


OTHER: dict[str, dict[str, Any]] = {
    "eps": {"eps": 1e-5}, "slope": {"slope": 0.3}, "stride": {"stride": 1}, "a number of one's own": {"scale": 1.0},
    "a function": {"act": F.gelu}, "a switch": {"skip": False}, "a word": {"mode": "bilinear"}, "ceil": {"ceil": True},
    "another activation": {"leaky": nn.ELU}, "a number in a table": {"gain": 2.0},
    "a number in a configuration": {"floor": 1.0}, "a function's own number": {"bend": 0.3},
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHER)
def test_a_base_that_computes_something_else_is_refused_and_untouched(kind: str, file: Path) -> None:
    base = Net(**OTHER[kind])
    before = {k: v.clone() for k, v in base.state_dict().items()}
    with pytest.raises(ValueError, match=r"small\.safetensors: structure: .* in the file and .* in the base model"):
        es.load(file, base=base)
    assert_same(before, base.state_dict())


@pytest.mark.parametrize("other", [{}, {"drop": 0.5}, {"step": 1}], ids=str)
def test_a_base_that_differs_in_nothing_that_is_computed_loads(
    other: dict[str, Any], file: Path, small: nn.Module
) -> None:
    """Dropout is for training; a whole number comes from the file, like every number that may follow a width."""
    base = Net(**other)
    base.calls, base.log_path = 7, "/elsewhere"
    before = torch.get_rng_state()
    again = es.load(file, base=base).eval()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(again(X), small(X))


def test_a_base_on_meta_gets_the_tensors_of_the_file(file: Path, small: nn.Module) -> None:
    with torch.device("meta"):
        base = Net()
    assert torch.equal(es.load(file, base=base).eval()(X), small(X))


# -- what a file may say


def rewritten(file: Path, change: Callable[[dict[str, Any]], Any], *, seal: bool = False) -> None:
    """The same tensors with another structure, as somebody who knows the format would write it."""
    with safe_open(str(file), framework="pt") as opened:
        metadata = dict(opened.metadata())
    table = json.loads(metadata["espalier"])
    changed = change(table)
    table = table if changed is None else changed
    if not seal:
        metadata.pop(SEAL)
        table.pop("sealed", None) if isinstance(table, dict) else None
    text = table if isinstance(table, str) else json.dumps(table)
    save_file(load_file(file), file, metadata={**metadata, "espalier": text})


def numbers(module: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda t: t["modules"][module].setdefault("numbers", {}).update(values)


def made(module: str, kind: str, *, frozen: Any = (), **values: Any) -> Callable[[dict[str, Any]], None]:
    def change(table: dict[str, Any]) -> None:
        entry = table["modules"][module]
        entry["frozen"] = list(frozen)
        entry.update(type=kind, make={**entry.get("make", {}), **values})

    return change


def at(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(table: dict[str, Any]) -> None:
        for key in path[:-1]:
            table = table[key]
        table[path[-1]] = value

    return change


BIG = 2**40
HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    **{f"sets {k}": numbers("a", **{k: 1}) for k in ("forward", "__class__", "__dict__", "training", "_parameters", "weight")},
    "sets eps": numbers("n", eps=5.0),
    "sets momentum": numbers("n", momentum=5),
    "sets a slope": numbers("l", negative_slope=5),
    "sets what is not there": numbers("p", new=5),
    "sets a number of the top": at("numbers", value={"forward": 1}),
    "sets a switch of the top": at("numbers", value={"skip": 0}),
    "a width that is no number": numbers("a", out_channels="8"),
    "a width that is a list": numbers("a", out_channels=[8]),
    "a width below zero": numbers("a", out_channels=-8),
    "a width too large": numbers("a", out_channels=BIG),
    "a width that no tensor has": numbers("a", out_channels=1000),
    "groups of nothing": numbers("b", groups=0),
    "a kernel that no tensor has": numbers("a", kernel_size=[9, 9]),
    "a layer too large": made("a", "Conv2d", out_channels=BIG, stride=[3, 3]),
    "a layer that no tensor has": made("a", "Conv2d", out_channels=100_000, in_channels=100_000, stride=[3, 3]),
    "a layer that nobody makes": made("a", "Embedding", num_embeddings=5),
    "a layer of a name with dots": made("a", "torch.nn.Conv2d"),
    "an argument that nobody takes": made("a", "Conv2d", hook=1, stride=[3, 3]),
    "an argument of another kind": made("a", "Conv2d", stride={"x": 1}),
    "an argument without end": made("a", "Conv2d", stride=[1] * 10_000),
    "a rank above all ranks": made("a", "LowRank", rank=BIG),
    "a low rank without arguments": made("a", "LowRank"),
    "a frozen parameter that is none": made("a", "Conv2d", stride=[3, 3], frozen=["x"]),
    "a shape too large": at("shapes", "a.weight", value=[BIG, 3, 3, 3]),
    "a shape that no tensor has": at("shapes", "a.weight", value=[100_000, 100_000, 3, 3]),
    "a shape of other dimensions": at("shapes", "a.weight", value=[4]),
    "a shape that is none": at("shapes", "a.weight", value="large"),
    "a module in no place": at("modules", "x.y.z", value={"type": "Sequential", "make": {}}),
    "a module in place of a method": at("modules", "forward", value={"type": "Sequential", "make": {}}),
    "an entry without a type": at("modules", "a", value={}),
    "an entry that is a list": at("modules", "a", value=[1]),
    "no modules": lambda t: t.pop("modules") and None,
    "no shapes": lambda t: t.pop("shapes") and None,
    "modules that are a list": at("modules", value=[]),
    "another format": at("format", value="espalier/9"),
    "a list": lambda t: [],
    "a word": lambda t: '"x"',
    "no JSON": lambda t: "{",
    "JSON without bottom": lambda t: "[" * 100_000,
    "a number without end": lambda t: '{"format": ' + "9" * 10_000 + "}",
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_structure_sets_what_its_layers_declare_and_allocates_what_the_file_holds(kind: str, file: Path) -> None:
    rewritten(file, HOSTILE[kind])
    base = Net()
    before, state = dict(vars(base)), {k: v.clone() for k, v in base.state_dict().items()}
    modules = [(n, m, type(m), sorted(vars(m))) for n, m in base.named_modules()]
    with pytest.raises(ValueError, match=r"small\.safetensors") as caught:
        es.load(file, base=base)
    assert type(caught.value) is ValueError and "\n" not in str(caught.value)
    assert vars(base) == before
    assert [(n, m, type(m), sorted(vars(m))) for n, m in base.named_modules()] == modules
    assert_same(state, base.state_dict())


@pytest.mark.parametrize("how", ["a tensor less", "a tensor more", "a tensor of another kind"])
def test_tensors_that_do_not_fit_leave_the_base_as_it_was(how: str, file: Path) -> None:
    tensors = load_file(file)
    with safe_open(str(file), framework="pt") as opened:
        metadata = dict(opened.metadata())
    metadata.pop(SEAL)
    metadata["espalier"] = metadata["espalier"].replace(', "sealed": true', "")
    if how == "a tensor less":
        del tensors["b.bias"]
    elif how == "a tensor more":
        tensors["c.bias"] = torch.zeros(3)
    else:
        tensors["b.bias"] = tensors["b.bias"].to(torch.int32)
    save_file(tensors, file, metadata=metadata)
    base = Net()
    state = {k: v.clone() for k, v in base.state_dict().items()}
    with pytest.raises(ValueError, match=r"small\.safetensors: .*\b[bc]\.bias"):
        es.load(file, base=base)
    assert_same(state, base.state_dict())


def test_files_of_the_earlier_release_load(file: Path, small: nn.Module) -> None:
    """They have neither settings nor numbers of one's own modules nor a checksum."""

    def earlier(table: dict[str, Any]) -> None:
        for entry in table["modules"].values():
            entry.pop("settings", None)
        for key in ("settings", "numbers"):
            del table[key]

    rewritten(file, earlier)
    assert torch.equal(es.load(file, base=Net()).eval()(X), small(X))


# -- integrity


def test_every_flipped_bit_is_found(file: Path, small: nn.Module) -> None:
    """Anywhere in the file: the header's length, its text, the checksum, every tensor."""
    whole = file.read_bytes()
    loaded = []
    for place in range(0, len(whole), max(1, len(whole) // 400)):
        changed = bytearray(whole)
        changed[place] ^= 1 << (place % 8)
        file.write_bytes(changed)
        try:
            es.load(file, base=Net())
        except ValueError as error:
            assert "small.safetensors" in str(error) and "\n" not in str(error)
        else:
            loaded.append(place)
    assert loaded == []


@pytest.mark.parametrize(
    "change", [at("class", value="Net2"), numbers("a", padding=[0, 0])], ids=["a name", "a number"]
)
def test_a_changed_structure_is_found(change: Callable[[dict[str, Any]], Any], file: Path) -> None:
    rewritten(file, change, seal=True)
    with pytest.raises(ValueError, match="checksum"):
        es.load(file, base=Net())


def test_further_strings_in_a_file_are_sealed_too(small: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    es.save(small, path, extra={"made by": "somebody"})
    assert torch.equal(es.load(path, base=copy.deepcopy(Net())).eval()(X), small(X))
    path.write_bytes(path.read_bytes().replace(b"somebody", b"nobody.."))
    with pytest.raises(ValueError, match="checksum"):
        es.load(path, base=Net())


def assert_same(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_loading_walks_through_the_model_as_often_whatever_its_depth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every parameter that is replaced took a walk of its own."""
    walks = []
    for depth in (2, 12):
        base = nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(depth)))
        small = nn.Sequential(nn.Conv2d(4, 3, 1), *(nn.Conv2d(3, 3, 1) for _ in range(depth - 2)), nn.Conv2d(3, 4, 1))
        es.save(small, tmp_path / "small.safetensors")
        counted: list[nn.Module] = []
        with monkeypatch.context() as patched:
            patched.setattr(
                base, "modules", lambda *, base=base, to=counted: to.append(base) or nn.Module.modules(base)
            )
            es.load(tmp_path / "small.safetensors", base=base)
        assert all(map(torch.equal, base.parameters(), small.parameters()))
        walks.append(len(counted))
    assert walks[0] == walks[1]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_network_with_a_scripted_part_is_loaded(tmp_path: Path) -> None:
    def built(width: int) -> nn.Module:
        scripted = torch.jit.script(nn.Conv2d(4, 4, 1))
        return nn.Sequential(nn.Conv2d(3, width, 1), nn.Conv2d(width, 4, 1), scripted)

    small = built(5)
    es.save(small, tmp_path / "small.safetensors")
    loaded = es.load(tmp_path / "small.safetensors", base=built(8))
    x = torch.randn(1, 3, 4, 4)
    assert torch.equal(loaded(x), small(x))
    other = built(8).append(nn.ReLU())
    before = {n: p.detach().clone() for n, p in other.named_parameters()}
    with pytest.raises(ValueError, match=r"small\.safetensors: ") as caught:
        es.load(tmp_path / "small.safetensors", base=other)
    assert "clear" not in str(caught.value)
    assert all(torch.equal(p, before[n]) for n, p in other.named_parameters())
