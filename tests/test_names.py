"""Names that older scripts have still work and say what to write."""

import pytest
import torch
from torch import nn

import espalier as es


def test_the_old_name_of_run_still_works():
    with pytest.warns(DeprecationWarning, match=r"es\.Process is called es\.Run now"):
        assert es.Process is es.Run


@pytest.mark.parametrize(("old", "new"), [("stayed", "plan"), ("left", "skipped")])
def test_old_members_of_a_run_still_work(old, new):
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    run = es.attach(net, torch.zeros(1, 8), budget=es.Budget(macs=0.5), method=es.Magnitude())
    with pytest.warns(DeprecationWarning, match=rf"run\.{old} is called run\.{new} now"):
        assert getattr(run, old) is getattr(run, new)
