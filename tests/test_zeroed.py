"""What masks have set to zero is gone afterwards, and nothing else is another."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import espalier as es
from espalier.run.models import build_model


def convs(*widths, norm=False):
    layers = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, padding=1), *([nn.BatchNorm2d(after)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 4))


def widths_of(model):
    return [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]


X = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def same(one, two):
    with torch.no_grad():
        return torch.allclose(one.eval()(X), two.eval()(X), atol=1e-6)


def test_channels_that_nothing_reads_go():
    net = convs(3, 8, 6)
    net[2].weight.data[:, [1, 4]] = 0
    net[6].weight.data[:, 5] = 0
    small = es.remove_zeroed(net, X)
    assert widths_of(small) == [6, 5] and same(net, small)
    assert widths_of(net) == [8, 6], "the network that was given is as it was"


def test_filters_that_masks_set_to_zero_go_with_what_only_they_were_for():
    """The bias is masked too, so zero is what arrives; without its only reader the first channel is useless as well."""
    net = convs(3, 8, 6)
    for name in ("weight", "bias"):
        prune.custom_from_mask(net[2], name, torch.ones_like(getattr(net[2], name)))
    net[2].weight_mask[3] = 0
    net[2].bias_mask[3] = 0
    net[2].weight_mask[:, 0] = 0
    net[2].weight_mask[[0, 1, 2, 4, 5], 7] = 0  # only the filter that goes reads the last channel
    for name in ("weight", "bias"):
        prune.remove(net[2], name)
    small = es.remove_zeroed(net, X)
    assert widths_of(small) == [6, 5] and same(net, small)


def test_a_constant_behind_a_zero_filter_counts():
    """BatchNorm makes a constant of it: above zero it is read, below zero the rectifier ends it."""
    torch.manual_seed(0)
    net = convs(3, 8, 6, norm=True).eval()
    net[0].weight.data[:4] = 0
    net[0].bias.data.zero_()
    net[1].bias.data = torch.tensor([1.0, -1.0, 2.0, -2.0, 0.1, 0.1, 0.1, 0.1])
    small = es.remove_zeroed(net, X)
    assert widths_of(small) == [6, 6] and same(net, small)


def test_a_scale_of_zero_in_batchnorm_is_as_good_as_a_zero_filter():
    """As network slimming leaves it, where the shift is zero as well, or below."""
    torch.manual_seed(0)
    net = convs(3, 8, 6, norm=True).eval()
    net[1].weight.data[:5] = 0
    net[1].bias.data = torch.tensor([0.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    small = es.remove_zeroed(net, X)
    assert widths_of(small) == [4, 6] and same(net, small)


def test_what_is_read_before_batchnorm_scales_it_stays():
    """The convolution's own output is read too: a scale of zero says nothing of it; nor does a rectifier that is shut."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.one, self.two = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            x = self.first(x)
            return self.one(self.norm(x)) + self.two(x)

    torch.manual_seed(0)
    net = Twice().eval()
    net.norm.weight.data[:2] = 0
    assert widths_of(es.remove_zeroed(net, X)) == [4, 2, 2]
    shut = convs(3, 8, 6)
    shut[0].bias.data[0] = -100.0  # never open on such inputs, but no filter is zero
    assert widths_of(es.remove_zeroed(shut, X)) == [8, 6]


def test_a_residual_block_that_adds_nothing_goes():
    torch.manual_seed(0)
    net = build_model("resnet20", num_classes=10)
    nn.init.zeros_(net.layer2[1].bn2.weight)
    nn.init.zeros_(net.layer2[1].bn2.bias)
    image = torch.rand(2, 3, 32, 32)
    small = es.remove_zeroed(net, image)
    assert len(widths_of(small)) == len(widths_of(net)) - 2
    with torch.no_grad():
        assert torch.allclose(net.eval()(image), small.eval()(image), atol=1e-5)


def test_where_nothing_is_zero_nothing_goes_and_one_channel_always_stays():
    net = convs(3, 8, 6).train()
    small = es.remove_zeroed(net, X)
    assert widths_of(small) == [8, 6] and net.training and small.training
    net[2].weight.data.zero_()
    net[2].bias.data.zero_()
    small = es.remove_zeroed(net, X)
    assert widths_of(small) == [1, 1] and same(net, small)


def test_what_would_compute_something_else_is_refused(monkeypatch):
    net = convs(3, 8, 6)
    net[2].weight.data[:, 1] = 0
    monkeypatch.setattr("espalier.run.zeroed.difference", lambda *_: 0.1)
    with pytest.raises(ValueError, match=r"without what is zero the outputs differ by 0\.1"):
        es.remove_zeroed(net, X)
