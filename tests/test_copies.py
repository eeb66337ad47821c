"""``copy_model`` gives what ``copy.deepcopy`` gives."""

import copy

import pytest
import torch
from torch import nn

from benchmarks.common import build
from espalier.copies import copy_model, named_modules, named_tensors


class Odd(nn.Module):
    """Everything a module may hold: shared parameters and modules, lists, hooks' arguments, plain tensors, an own state."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 3)
        self.two = nn.Linear(3, 3)
        self.two.weight = self.one.weight
        self.again = self.one
        self.plain = [torch.ones(2), {"key": [1, 2]}]
        self.same = self.plain
        self.recurrent = nn.GRU(3, 3)
        self.hidden = (self.two,)
        self.register_buffer("none", None)
        self.register_buffer("steps", torch.tensor(3), persistent=False)


class Shouting(nn.Module):
    def __deepcopy__(self, memo):
        raise RuntimeError("cannot be copied")


def test_what_is_shared_stays_shared_and_nothing_is_shared_with_the_original():
    model = Odd()
    made = copy_model(model, {})
    assert made.two.weight is made.one.weight and made.again is made.one and made.same is made.plain
    assert made.hidden[0] is made.two and made.hidden[0] is not model.two
    assert made.plain[0] is not model.plain[0] and torch.equal(made.plain[0], model.plain[0])
    made.plain[1]["key"].append(3)
    assert model.plain[1]["key"] == [1, 2]
    made._non_persistent_buffers_set.clear()
    assert "steps" in model._non_persistent_buffers_set
    theirs = {t.data_ptr() for t in [*model.parameters(), *model.buffers()]}
    assert not theirs & {t.data_ptr() for t in [*made.parameters(), *made.buffers()]}
    x = torch.randn(2, 3)
    assert torch.equal(made.recurrent(x)[0], model.recurrent(x)[0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["cifar:resnet20a", "mobilenet_v3_small", "googlenet", "timm:test_nfnet"])
def test_the_copy_is_what_deepcopy_gives(name):
    model = build(name)
    made, expected = copy_model(model, {}), copy.deepcopy(model)
    assert repr(made) == repr(expected)
    for (n, a), (m, b) in zip(made.named_modules(), expected.named_modules(), strict=True):
        assert n == m and type(a) is type(b) and list(a.__dict__) == list(b.__dict__) and a.training == b.training
    ours, theirs = made.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert [p.requires_grad for p in made.parameters()] == [p.requires_grad for p in expected.parameters()]


def test_a_tensor_may_be_given_and_an_own_way_of_copying_is_respected():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    small = nn.Parameter(torch.zeros(2, 3))
    made = copy_model(model, {id(model[0].weight): small})
    assert made[0].weight is small and made[1].weight is not model[1].weight
    with pytest.raises(RuntimeError, match="cannot be copied"):
        copy_model(nn.Sequential(Shouting()), {})


def test_buffers_that_share_memory_share_it_in_the_copy():
    model = nn.Module()
    table = torch.arange(12.0)
    model.register_buffer("table", table)
    model.register_buffer("head", table[:4])
    model.register_buffer("turned", torch.arange(6.0).view(2, 3).t())
    new = copy_model(model, {})
    new.table[0] = 7.0
    assert new.head[0] == 7.0 and table[0] == 0.0
    assert new.turned.stride() == (1, 3) and torch.equal(new.turned, model.turned)


def test_names_are_those_of_torch():
    model = Odd()
    assert named_modules(model) == dict(model.named_modules())
    parameters, buffers = named_tensors(model)
    assert list(parameters) == [n for n, _ in model.named_parameters()]
    assert list(buffers) == [n for n, _ in model.named_buffers()]
