"""What is said of files, data, networks and numbers that are not what they should be: one line, before anything is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import espalier as es
from espalier.present.edge import printable
from espalier.run.rundir import add_widths

X, Y = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(40) % 10
BATCHES = list(zip(X.split(10), Y.split(10), strict=True))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )  # fmt: skip


def weights() -> dict[str, Any]:
    return dict(net().state_dict())


def itself() -> dict[str, Any]:
    table: dict[str, Any] = {}
    table["state_dict"] = table
    return table


FILES: dict[str, tuple[Callable[[], Any], str]] = {
    "sparse": (lambda: {**weights(), "7.weight": weights()["7.weight"].to_sparse()}, r"'7\.weight' is sparse"),
    "on meta": (lambda: {**weights(), "7.weight": weights()["7.weight"].to("meta")}, r"'7\.weight' is on meta"),
    "names that are numbers": (lambda: {0: torch.zeros(3)}, "weights under 0, a int"),
    "some names that are numbers": (lambda: {**weights(), 0: torch.zeros(3)}, "weights under 0, a int"),
    "a table in itself": (itself, "holds no weights"),
}


@pytest.mark.parametrize("kind", FILES)
def test_weights_that_are_none_are_refused_and_leave_the_model_alone(kind: str, tmp_path: Path) -> None:
    make, words = FILES[kind]
    torch.save(make(), tmp_path / "w.pt")
    model = net()
    with torch.no_grad():
        model[0].weight.zero_()
    with pytest.raises(ValueError, match=rf"w\.pt.*{words}"):
        es.load_weights(model, tmp_path / "w.pt")
    assert not model[0].weight.any()


@pytest.mark.parametrize(("batch", "words"), [
    ((torch.zeros(10, 3, 8, 8), Y[:10]), r"images of shape \(10, 3, 8, 8\) after others of \(10, 1, 8, 8\)"),
    ((torch.zeros(10, 8, 8), Y[:10]), r"images of shape \(10, 8, 8\) after others"),
    ((torch.zeros(0, 1, 8, 8), Y[:0]), "yields an empty batch"),
], ids=["other channels", "fewer dimensions", "empty"])  # fmt: skip
def test_a_batch_of_another_shape_in_mid_run_is_named(batch: Any, words: str) -> None:
    data = es.Loaders([*BATCHES, batch], BATCHES, num_classes=10)
    with pytest.raises(ValueError, match=f"the train loader yields.*{words}|{words}"):
        es.compress(net(), data, budget=es.Budget(macs=0.5), recipe=es.Recipe(epochs=1, device="cpu"))


def test_an_empty_batch_at_the_beginning_is_named() -> None:
    with pytest.raises(ValueError, match="train loader yields an empty batch"):
        es.Loaders([(X[:0], Y[:0]), *BATCHES], BATCHES, num_classes=10)


def spoilt() -> nn.Module:
    model = net()
    with torch.no_grad():
        model[3].bias[0] = float("nan")
    return model


def misnamed() -> nn.Module:
    model = nn.Sequential()
    model.add_module("\udc80", net())
    return model


def sparse() -> nn.Module:
    model = net()
    model[3].bias = nn.Parameter(model[3].bias.detach().to_sparse())
    return model


def without_a_mean() -> nn.Module:
    model = net()
    model[1].running_mean[2] = float("nan")
    return model


def packed() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(net(), {nn.Linear}, dtype=torch.qint8)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a NaN among statistics": (without_a_mean, r"1\.running_mean has values that are NaN"),
    "weights that are packed": (packed, r"7 is a Linear of torch\.ao\.nn\.quantized.*quantised"),
    "sparse": (sparse, r"3\.bias is sparse"),
    "on meta": (lambda: net().to("meta"), "is on meta; give dense weights"),
    "NaN": (spoilt, r"3\.bias has values that are NaN"),
    "width zero": (
        lambda: nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 0, 3)),
        r"2\.weight is of shape \(0, 8",
    ),
    "a name that is not UTF-8": (misnamed, "not UTF-8"),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:torch.ao.quantization")
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_network_that_cannot_come_to_anything_is_refused_before_anything_is_written(
    kind: str, tmp_path: Path
) -> None:
    make, words = NETWORKS[kind]
    budget = es.Budget(macs=0.5)
    with pytest.raises(ValueError, match=words):
        es.compress(make(), X[:1], budget=budget, method=es.Magnitude(), out=tmp_path / "run")
    with pytest.raises(ValueError, match=words):
        es.attach(make(), X[:1], budget=budget, method=es.TCP())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", [es.TCP(), es.MGP(), es.DPRP()], ids=lambda m: m.name)
def test_a_rate_of_a_thousand_diverges_with_a_name(method: es.Method) -> None:
    data = es.Loaders(BATCHES, BATCHES, num_classes=10)
    with pytest.raises(es.TrainingDiverged, match="epoch"):
        es.compress(
            net(), data, budget=es.Budget(macs=0.5), method=method, recipe=es.Recipe(epochs=4, lr=1000.0, device="cpu")
        )


def test_a_multiple_wider_than_any_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="no layer is that wide"):
        es.Budget(macs=0.5, multiple_of=10**30)


@pytest.mark.parametrize("text", ["nothing\n1\n", "epoch,a\nx,1\n", "epoch,a\n1,2,3\n", "epoch,a\n1\n"])
def test_widths_that_were_damaged_are_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "widths.csv").write_text(text)
    with pytest.raises(ValueError, match=r"widths\.csv: damaged"):
        add_widths(tmp_path / "widths.csv", 3, {"a": 1})


def test_names_do_not_steer_the_terminal() -> None:
    assert printable("a\x1b[2Jb\nü\udc80") == "a\\x1b[2Jb\nü\\udc80"
