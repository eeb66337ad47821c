"""Names that older scripts have still work and say what to write."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

import espalier as es
from espalier.present.config import make_method


def test_the_old_name_of_run_still_works():
    with pytest.warns(DeprecationWarning, match=r"es\.Process is called es\.Run now"):
        assert es.Process is es.Run


@pytest.mark.parametrize(("old", "new"), [("stayed", "plan"), ("left", "skipped")])
def test_old_members_of_a_run_still_work(old, new):
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    run = es.attach(net, torch.zeros(1, 8), budget=es.Budget(macs=0.5), method=es.Magnitude())
    with pytest.warns(DeprecationWarning, match=rf"run\.{old} is called run\.{new} now"):
        assert getattr(run, old) is getattr(run, new)


@pytest.mark.parametrize(("method", "old", "new"), [
    (es.TCP, "reach", "end_at"), (es.DPRP, "returns", "share_exponent"), (es.TTLC, "pull", "penalty_exponent"),
    (es.TTLC, "settle", "finetune_lr"), (es.TTLC, "rise", "finetune_warmup"), (es.TTLC, "beyond", "noise_weight"),
])  # fmt: skip
def test_former_names_of_settings_work_in_configurations_and_say_the_new_one_in_scripts(method, old, new):
    with pytest.raises(ValueError, match=f"{old}=0.4.*is called {new} now"):
        method(**{old: 0.4})
    assert getattr(make_method({"method": {"name": method.name, old: 0.4}}), new) == 0.4


def test_a_setting_that_was_dropped_is_refused_where_it_did_something():
    with pytest.raises(ValueError, match=r"MGP\(stripes=True\): is no setting any more; leave it out"):
        es.MGP(stripes=True)
    with pytest.raises(ValueError, match="there is no 'stripes'"):
        make_method({"method": {"name": "mgp", "stripes": True}})
    assert make_method({"method": {"name": "mgp", "stripes": False}}) == es.MGP()


def test_names_of_modules_carry_no_meaning():
    """``#`` marked the numbers that modules hold, and ``:`` the kind of a group."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)]
    odd = nn.Sequential(OrderedDict(zip(("a#1", "b:inputs#n", "c", "a#1:form"), layers, strict=True)))
    x, dense = torch.rand(2, 3, 12, 12), copy.deepcopy(odd)
    run = es.attach(odd, x, budget=es.Budget(macs=0.5), method=es.Magnitude())
    small = run.finish()
    es.verify(dense, run.dense_graph, run.plan, x, small=small).require()
    assert small.get_submodule("a#1").out_channels == small.get_submodule("b:inputs#n").num_features == 4
