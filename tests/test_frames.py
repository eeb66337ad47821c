"""How far it is from ``es.compress`` to the mathematics, as a reader goes: frames of this package on the stack."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import espalier as es
from espalier.methods.base import Method
from tests.test_contract import Net, batch

MOST = 5
HOME = Path(es.__file__).parent
SOLVE, SENSITIVITY = "espalier.methods.base.solve", "espalier.methods.importance.Sensitivity.batch_done"
WEIGHTS = "espalier.methods.importance.BY_WEIGHT"  # a table of them
PROX = "espalier.methods.units.Units.consumer_energy"
RUNS: dict[str, tuple[Method, list[str]]] = {
    "tcp": (es.TCP(), [SOLVE, SENSITIVITY, PROX]),
    "tcp-scale": (es.TCP(importance="scale"), [WEIGHTS]),
    "mgp": (es.MGP(), [SOLVE, SENSITIVITY, PROX]),
    "joint": (es.Joint(), [SOLVE, SENSITIVITY, PROX]),
    "dprp": (
        es.DPRP(once=True),
        [SOLVE, *(f"espalier.methods.dprp.{name}" for name in ("change_bases", "cut_ranks", "_OffIdentity.forward"))],
    ),
    "tt-lc": (
        es.TTLC(search=0, iterations=3),
        [SOLVE, "espalier.methods.tt_lc.factorise", "espalier.methods.lc._Pull.forward"],
    ),
    "magnitude": (es.Magnitude(), [SOLVE, WEIGHTS]),
    "svd-oneshot": (es.SVDOneShot(), [SOLVE, "espalier.methods.svd_oneshot._factors"]),
}


def path_to(frame: FrameType | None) -> list[str]:
    """Functions of this package on the stack, from ``compress`` on."""
    found: list[str] = []
    while frame is not None:
        if Path(frame.f_code.co_filename).is_relative_to(HOME):
            found.append(frame.f_code.co_name)
            if frame.f_code is es.compress.__code__:
                return found[::-1]
        frame = frame.f_back
    return []


@pytest.mark.parametrize("name", RUNS)
def test_from_compress_to_the_mathematics_it_is_five_frames(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, mathematics = RUNS[name]
    longest: dict[str, list[str]] = {}

    def trapped(where: str, owner: Any) -> Any:
        @functools.wraps(owner)
        def trap(*arguments: Any, **options: Any) -> Any:
            longest[where] = max(longest.get(where, []), path_to(sys._getframe(1)), key=len)
            return owner(*arguments, **options)

        return staticmethod(trap) if where.endswith(".forward") else trap

    for where in mathematics:
        owner: Any = sys.modules[".".join(where.split(".")[:3])]
        for part in where.split(".")[3:]:
            owner = getattr(owner, part)
        table = isinstance(owner, dict)
        trap = {n: trapped(where, f) for n, f in owner.items()} if table else trapped(where, owner)
        monkeypatch.setattr(where, trap)
    x, y = map(torch.cat, zip(*(batch(n) for n in range(2)), strict=True))
    data = es.Loaders(DataLoader(TensorDataset(x, y), batch_size=16), [(x, y)], num_classes=10)
    recipe = es.Recipe(epochs=12, batch_size=16, lr=0.01)
    es.compress(Net(), data, budget=es.Budget(macs=0.6), method=method, recipe=recipe, trained=False, verify=False)
    assert longest.keys() == set(mathematics) and all(longest.values())
    assert not {where: " > ".join(path) for where, path in longest.items() if len(path) > MOST}
