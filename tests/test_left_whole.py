"""What used to stay whole, one kind a row: these channels go, and every obligation holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from proving import prove, sizes
from torch import Tensor, nn
from torch.nn import functional as F

IMAGE = torch.zeros(1, 3, 8, 8)


class Net(nn.Module):
    """Layers by name, and a forward that is a function of them."""

    def __init__(self, run: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            if isinstance(layer, Tensor):
                self.register_buffer(name, layer)
            else:
                setattr(self, name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def tokens(x: Tensor) -> Tensor:
    """The positions of the first picture, ``(positions, channels)``."""
    return x.flatten(2).transpose(1, 2)[0]


def detector(net: Any, x: Tensor) -> Tensor:
    """Boxes above a threshold: as many as there are."""
    y = tokens(net.head(net.b(net.a(x).relu()).relu()))
    return y[(y[:, 0] > 0.0).nonzero()[:, 0]]


def masked(net: Any, x: Tensor) -> Tensor:
    return net.b(tokens(net.a(x))[x[0, 0].flatten() > 0])


def recurrent(net: Any, x: Tensor) -> Tensor:
    state = torch.zeros(1, net.h.out_channels, 8, 8, dtype=x.dtype)
    for _ in range(2):
        state = torch.tanh(net.a(x) + net.h(state))
    return net.b(state)


def written(net: Any, x: Tensor) -> Tensor:
    y = tokens(net.a(x))
    rows = torch.zeros(64, y.shape[1], dtype=y.dtype)
    rows[torch.arange(64)] = y
    return net.b(rows)


def added(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    return net.b(y + y.new_ones(1, y.shape[1], 8, 8))


def reordered(net: Any, x: Tensor) -> Tensor:
    return net.b(net.a(x)[:, :, torch.arange(7, -1, -1)])


def map_of_vector(net: Any, x: Tensor) -> Tensor:
    return net.t(net.l(x.mean((2, 3))).relu().view(len(x), net.t.in_channels, 4, 4))


def sequence_of_vector(net: Any, x: Tensor) -> Tensor:
    return net.b(net.l(x.mean((2, 3))).relu().view(len(x), -1, 16))


def shuffled(net: Any, x: Tensor) -> Tensor:
    """ShuffleNet's first unit: convolutions of four groups, a shuffle and a depthwise one between them."""
    x = net.a(x)
    y = net.c1(x)
    b, c, h, w = y.shape
    y = y.view(b, 4, c // 4, h, w).transpose(1, 2).reshape(b, c, h, w)
    return net.f((x + net.c2(net.dw(y))).relu().mean((2, 3)))


def unpooled(net: Any, x: Tensor) -> Tensor:
    """SegNet."""
    y, places = F.max_pool2d(net.a(x), 2, return_indices=True)
    return net.b(F.max_unpool2d(y, places, 2))


def quantised(net: Any, x: Tensor) -> Tensor:
    weight = torch.fake_quantize_per_channel_affine(net.a.weight, net.scale, net.zero, 0, -128, 127)
    return net.b(
        torch.fake_quantize_per_tensor_affine(F.conv2d(x, weight, net.a.bias, padding=1).relu(), 0.01, 0, 0, 255)
    )


def read(net: Any, x: Tensor) -> Tensor:
    """CRNN: a convolution's columns are the steps of a recurrent layer."""
    y, _ = net.r(net.a(x)[:, :, :2, :3].permute(0, 3, 1, 2).flatten(2))
    return net.b(y)


def spread(net: Any, x: Tensor) -> Tensor:
    """A pixel shuffle by hand, as some write it: the factor of the channels comes last."""
    y = net.a(x)
    y = y.view(y.shape[0], 2, 2, y.shape[1] // 4, 8, 8).permute(0, 3, 4, 1, 5, 2)
    return net.b(y.reshape(y.shape[0], -1, 16, 16))


def moved(net: Any, x: Tensor) -> Tensor:
    y = net.a(x).flatten(2)
    places = (net.o(x).flatten(2).sigmoid() * 63).long().clamp(0, 63)
    return net.b(y.gather(2, places.expand(-1, y.shape[1], -1)).unflatten(2, (8, 8)))


def patches(net: Any, x: Tensor) -> Tensor:
    return net.b(F.fold(F.unfold(net.a(x), 2, stride=2).relu(), (8, 8), 2, stride=2))


def cut_where_joined(net: Any, x: Tensor) -> Tensor:
    y, z = net.a(x), net.c(x)
    both = torch.cat([y, z], 1).relu()
    return net.b(both[:, : y.shape[1]]) + net.d(both[:, y.shape[1] :])


def rolled(net: Any, x: Tensor) -> Tensor:
    return net.b(net.a(x).roll(1, 1).relu())


def every_other(net: Any, x: Tensor) -> Tensor:
    return net.b(net.a(x)[:, ::2].relu())


def padded(net: Any, x: Tensor) -> Tensor:
    """With constants as wide as itself, as a shortcut of ResNet for CIFAR is."""
    y = net.a(x)
    return net.b(torch.cat([y, torch.zeros(1, y.size(1), *y.shape[2:], dtype=y.dtype)], 1))


def joined_to_itself(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    rest = y.split([net.first, y.shape[1] - net.first], 1)[1]
    return net.b(torch.cat([rest, y], 1)[:, rest.shape[1] :])


def mirrored(net: Any, x: Tensor) -> Tensor:
    weight = net.c.weight
    return net.b(F.conv2d(net.a(x), weight - weight.flip(-1), padding=1))


def literal_groups(net: Any, x: Tensor) -> Tensor:
    return net.b(F.conv2d(net.a(x), net.c.weight, padding=1, groups=4))


def of_ones(net: Any, x: Tensor) -> Tensor:
    return net.b(net.a(x.new_ones(1, 2, 8, 8)))


def partly(net: Any, x: Tensor) -> Tensor:
    """FasterNet: a convolution of the first few channels, and a gate made of the last."""
    y = net.a(x)
    first = net.c(y[:, :4])
    y = torch.cat([first, y[:, 4:]], 1)
    return net.b(y * y[:, -1:].sigmoid())


def written_over(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    y[:, :8] = net.c(x)
    return net.b(y.relu())


def blurred(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    return net.b(F.conv2d(y, net.kernel.expand(y.shape[1], 1, 3, 3), padding=1, groups=y.shape[1]))


def blurred_as_often(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    return net.b(F.conv2d(y, net.kernel.repeat(net.width, 1, 1, 1), padding=1, groups=net.width))


def wavelets(net: Any, x: Tensor) -> Tensor:
    """Four fixed kernels for each channel."""
    y = net.a(x)
    return net.b(F.conv2d(y, net.kernels.repeat(y.shape[1], 1, 1, 1), stride=2, groups=y.shape[1]))


def turned_kernels(net: Any, x: Tensor) -> Tensor:
    """The same weight in four directions."""
    y = net.a(x)
    return net.b(torch.stack([F.conv2d(y, torch.rot90(net.w, n, (2, 3)), padding=1) for n in range(4)]).amax(0))


def one_by_one(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    return net.b(net.c(y.flatten(0, 1).unsqueeze(1)).view(len(y), -1, 8, 8))


def maxout(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    return net.b(y.view(len(y), -1, 2, 8, 8).amax(2))


def normed_by_hand(net: Any, x: Tensor) -> Tensor:
    """A group norm: whole groups can go."""
    y = net.a(x)
    z = y.reshape(len(y), net.groups, -1)
    z = (z - z.mean(2, keepdim=True)) / (z.var(2, keepdim=True) + 1e-5).sqrt()
    return net.b(z.view(y.shape))


def padded_to_match(net: Any, x: Tensor) -> Tensor:
    """A shortcut of ResNet for CIFAR, whose width is a difference of two."""
    y = net.a(x)
    z = net.c(y)
    return net.b(z + F.pad(y, (0, 0, 0, 0, 0, z.shape[1] - y.shape[1])))


def joined_to_match(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    z = net.c(y)
    return net.b(z + torch.cat([y, y.new_zeros(1, z.shape[1] - y.shape[1], 8, 8)], 1))


def gated_frequencies(net: Any, x: Tensor) -> Tensor:
    y = torch.fft.rfft2(net.a(x)) * torch.view_as_complex(net.w)
    return net.b(torch.fft.irfft2(y, s=(8, 8)))


def mixed_frequencies(net: Any, x: Tensor) -> Tensor:
    """A Fourier layer: complex weights for each of the lowest frequencies."""
    y = torch.fft.rfft2(net.a(x))
    z = torch.zeros(len(x), net.w.shape[1], 8, 5, dtype=y.dtype)
    z[:, :, :3, :3] = torch.einsum("bixy,ioxy->boxy", y[:, :, :3, :3], net.w)
    return net.b(torch.fft.irfft2(z, s=(8, 8)))


def convolved_frequencies(net: Any, x: Tensor) -> Tensor:
    """Real and imaginary parts as channels of a convolution."""
    y = torch.fft.rfft2(net.a(x))
    b, _, h, w = y.shape
    y = net.c(torch.view_as_real(y).permute(0, 1, 4, 2, 3).reshape(b, -1, h, w)).relu()
    y = y.view(b, -1, 2, h, w)
    return net.b(torch.fft.irfft2(torch.complex(y[:, :, 0], y[:, :, 1]), s=(8, 8)))


def branches_side_by_side(net: Any, x: Tensor) -> Tensor:
    """A dimension of branches that is put in, and taken out, in place."""
    both = torch.cat([net.a(x).unsqueeze_(1), net.c(x).unsqueeze_(dim=1)], 1)
    return net.b(both.sum(1, keepdim=True).squeeze_(1))


def standardised_by_hand(net: Any, x: Tensor) -> Tensor:
    return net.b(net.c(net.a(x)).relu())


class Standardised(nn.Conv2d):
    """Its statistics are spread over the weight before they meet it."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        deviation = weight.view(len(weight), -1).std(1).view(-1, 1, 1, 1) + 1e-5
        return F.conv2d(x, weight / deviation.expand_as(weight), self.bias, padding=self.padding)


def weights_added_up(net: Any, x: Tensor) -> Tensor:
    """A kernel of three by three and one of one, and a product of two thin matrices, as one weight."""
    thin = (net.p @ net.q).view(net.w.shape)
    return net.b(F.conv2d(net.a(x), net.w + F.pad(net.v, [1, 1, 1, 1]) + thin, padding=1))


def weights_mixed(net: Any, x: Tensor) -> Tensor:
    """A mixture of kernels, whose shares are learned."""
    shares = net.s.softmax(0).view(-1, 1, 1, 1, 1)
    return net.b(F.conv2d(net.a(x), (shares * net.w).sum(0), padding=1))


def inputs_before_outputs(net: Any, x: Tensor) -> Tensor:
    """Weights as others store them, positions first."""
    return net.b(F.conv2d(net.a(x), net.w.permute(3, 2, 0, 1), padding=1))


def in_windows(net: Any, x: Tensor) -> Tensor:
    """Windows of as many positions as there are channels."""
    y = net.a(x).permute(0, 2, 3, 1)
    b, h, w, c = y.shape
    y = (
        y.view(b, h // net.side, net.side, w // net.side, net.side, c)
        .transpose(2, 3)
        .reshape(-1, net.side * net.side, c)
    )
    y = net.m(y).view(b, h // net.side, w // net.side, net.side, net.side, -1).transpose(2, 3).reshape(b, h, w, -1)
    return net.b(y.permute(0, 3, 1, 2))


def kernel_of_each(net: Any, x: Tensor) -> Tensor:
    """A depthwise convolution as a sum over positions."""
    y = F.unfold(net.a(x), 3, padding=1).unflatten(1, (-1, 9))
    return net.b(torch.einsum("bckn,ck->bcn", y, net.w).unflatten(2, (8, 8)))


STEPS = {"scale": torch.rand(16) / 50 + 0.01, "zero": torch.zeros(16)}

CASES: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, int]]] = {
    "boxes above a threshold": (
        detector, {"a": conv(3, 16), "b": conv(16, 12), "head": conv(12, 6, 1)}, {"a": 16, "b": 12},
    ),
    "positions that a mask selects": (masked, {"a": conv(3, 16), "b": nn.Linear(16, 4)}, {"a": 16}),
    "a recurrent state of zeros": (recurrent, {"a": conv(3, 16), "h": conv(16, 16), "b": conv(16, 4)}, {"a": 16}),
    "rows written one by one": (written, {"a": conv(3, 16), "b": nn.Linear(16, 4)}, {"a": 16}),
    "ones of the same width": (added, {"a": conv(3, 16), "b": conv(16, 4)}, {"a": 16}),
    "a map made of a vector": (map_of_vector, {"l": nn.Linear(3, 12 * 16), "t": nn.ConvTranspose2d(12, 3, 4, 2, 1)}, {"l": 12}),
    "a sequence made of a vector": (sequence_of_vector, {"l": nn.Linear(3, 12 * 16), "b": nn.Conv1d(12, 3, 3)}, {"l": 12}),
    "convolutions of many groups with a shuffle between": (
        shuffled,
        {
            "a": conv(3, 48), "c1": nn.Conv2d(48, 48, 1, groups=4), "dw": conv(48, 48, groups=48),
            "c2": nn.Conv2d(48, 48, 1, groups=4), "f": nn.Linear(48, 5),
        },
        {"a": 12, "c1": 3},
    ),
    "maxima put back": (unpooled, {"a": conv(3, 16), "b": conv(16, 4)}, {"a": 16}),
    "weights quantised per channel": (quantised, {"a": conv(3, 16), "b": conv(16, 4), **STEPS}, {"a": 16}),
    "columns read by an LSTM": (
        read,
        {"a": conv(3, 8), "r": nn.LSTM(16, 6, 2, batch_first=True, bidirectional=True), "b": nn.Linear(12, 5)},
        {"a": 8, "r.weight_ih_l0": 6},
    ),
    "columns read by a GRU": (
        read, {"a": conv(3, 8), "r": nn.GRU(16, 6, 2, batch_first=True), "b": nn.Linear(6, 5)}, {"a": 8, "r.weight_ih_l0": 6},
    ),
    "a pixel shuffle by hand": (spread, {"a": conv(3, 16), "b": conv(4, 5)}, {"a": 4}),
    "positions that others choose": (moved, {"a": conv(3, 16), "o": conv(3, 1), "b": conv(16, 4)}, {"a": 16}),
    "patches put back": (patches, {"a": conv(3, 16), "b": conv(16, 4)}, {"a": 16}),
    "cut where it was joined": (
        cut_where_joined, {"a": conv(3, 6), "c": conv(3, 8), "b": conv(6, 4), "d": conv(8, 4)}, {"a": 6, "c": 8},
    ),
    "channels that are rolled": (rolled, {"a": conv(3, 8), "b": conv(8, 5)}, {"a": 7}),
    "every other channel": (every_other, {"a": conv(3, 16), "b": conv(8, 5)}, {"a": 8}),
    "constants as wide as what they are joined to": (padded, {"a": conv(3, 8), "b": conv(16, 5)}, {"a": 8}),
    "cut where it was joined to itself": (joined_to_itself, {"a": conv(3, 8), "b": conv(8, 5), "first": 2}, {"a": 2, "a~2": 6}),
    "a weight and the same turned round": (
        mirrored, {"a": conv(3, 9), "c": conv(9, 8, bias=False), "b": conv(8, 5)}, {"a": 9, "c": 8},
    ),
    "several filters for each channel of a picture": (
        lambda net, x: net.b(net.a(x)), {"a": conv(3, 12, groups=3), "b": conv(12, 5)}, {"a": 4},
    ),
    "a number of groups that is written down": (
        literal_groups, {"a": conv(3, 4), "c": conv(4, 12, groups=4, bias=False), "b": conv(12, 5)}, {"c": 3},
    ),
    "what reads a pair of constants": (of_ones, {"a": conv(2, 4), "b": conv(4, 5)}, {"a": 4}),
    "the first few channels and the last": (
        partly, {"a": conv(3, 16), "c": conv(4, 4), "b": conv(16, 5)}, {"c": 4, "a": 11},
    ),
    "the first half written over": (
        written_over, {"a": conv(3, 16), "c": conv(3, 8), "b": conv(16, 5)}, {"a": 8},
    ),
    "one kernel for every channel": (
        blurred, {"a": conv(3, 16), "kernel": torch.rand(3, 3), "b": conv(16, 5)}, {"a": 16},
    ),
    "one kernel as often as a module says": (
        blurred_as_often, {"a": conv(3, 16), "kernel": torch.rand(1, 1, 3, 3), "width": 16, "b": conv(16, 5)}, {"a": 16},
    ),
    "four kernels for every channel": (
        wavelets, {"a": conv(3, 12), "kernels": torch.rand(4, 1, 2, 2), "b": conv(48, 5)}, {"a": 12},
    ),
    "kernels that are turned": (
        turned_kernels, {"a": conv(3, 12), "w": nn.Parameter(torch.rand(16, 12, 3, 3)), "b": conv(16, 5)}, {"a": 12, "w": 16},
    ),
    "channels filtered one by one, as pictures": (
        one_by_one, {"a": conv(3, 16), "c": conv(1, 1), "b": conv(16, 5)}, {"a": 16},
    ),
    "two maps that a bilinear layer reads": (
        lambda net, x: net.b(net.l(net.a(x).mean((2, 3)), net.c(x).mean((2, 3))).relu()),
        {"a": conv(3, 8), "c": conv(3, 6), "l": nn.Bilinear(8, 6, 7), "b": nn.Linear(7, 5)},
        {"a": 8, "c": 6, "l": 7},
    ),
    "the larger of two neighbours": (maxout, {"a": conv(3, 16), "b": conv(8, 5)}, {"a": 8}),
    "a group norm by hand": (normed_by_hand, {"a": conv(3, 16), "b": conv(16, 5), "groups": 4}, {"a": 4}),
    "channels padded by a difference of widths": (
        padded_to_match, {"a": conv(3, 6), "c": conv(6, 16), "b": conv(16, 5)}, {"a": 6, "c": 10},
    ),
    "constants as wide as a difference": (
        joined_to_match, {"a": conv(3, 6), "c": conv(6, 16), "b": conv(16, 5)}, {"a": 6, "c": 10},
    ),
    "a vector as long as a number of channels times others": (
        lambda net, x: net.b(net.a(x).view(-1, net.a.out_channels * 8 * 8)),
        {"a": conv(3, 16), "b": nn.Linear(1024, 5)},
        {"a": 16},
    ),
    "a number of pieces that is as large as they are": (
        lambda net, x: net.b(sum(net.a(x).chunk(net.pieces, 1))), {"a": conv(3, 16), "b": conv(4, 5), "pieces": 4}, {"a": 4},
    ),
    "a gate for each frequency": (
        gated_frequencies, {"a": conv(3, 16), "w": nn.Parameter(torch.rand(16, 8, 5, 2)), "b": conv(16, 4)}, {"a": 16},
    ),
    "complex weights for each frequency": (
        mixed_frequencies,
        {"a": conv(3, 12), "w": nn.Parameter(torch.randn(12, 10, 3, 3, dtype=torch.cfloat)), "b": conv(10, 4)},
        {"a": 12, "w": 10},
    ),
    "weights that are added up": (
        weights_added_up,
        {
            "a": conv(3, 12), "w": nn.Parameter(torch.randn(16, 12, 3, 3)), "v": nn.Parameter(torch.randn(16, 12, 1, 1)),
            "p": nn.Parameter(torch.randn(16, 3)), "q": nn.Parameter(torch.randn(3, 108)), "b": conv(16, 4),
        },
        {"a": 12, "w": 16, "p": 3},
    ),
    "a mixture of weights": (
        weights_mixed,
        {
            "a": conv(3, 12), "s": nn.Parameter(torch.randn(3)), "w": nn.Parameter(torch.randn(3, 14, 12, 3, 3)),
            "b": conv(14, 4),
        },
        {"a": 12, "w": 14},
    ),
    "weights with their positions first": (
        inputs_before_outputs,
        {"a": conv(3, 12), "w": nn.Parameter(torch.randn(3, 3, 12, 16)), "b": conv(16, 4)},
        {"a": 12, "w": 16},
    ),
    "windows of as many positions as there are channels": (
        in_windows, {"a": conv(3, 16), "m": nn.Linear(16, 12), "b": conv(12, 4), "side": 4}, {"a": 16, "m": 12},
    ),
    "a convolution of frequencies": (
        convolved_frequencies, {"a": conv(3, 6), "c": conv(12, 20, 1), "b": conv(10, 4)}, {"a": 6, "c": 10},
    ),
    "branches along a dimension that is put in in place": (
        branches_side_by_side, {"a": conv(3, 16), "c": conv(3, 16), "b": conv(16, 4)}, {"a": 16},
    ),
    "weights standardised by hand": (
        standardised_by_hand, {"a": conv(3, 16), "c": Standardised(16, 12, 3, padding=1), "b": conv(12, 4)}, {"a": 16, "c": 12},
    ),
    "a product for each channel": (
        kernel_of_each, {"a": conv(3, 16), "w": nn.Parameter(torch.rand(16, 9)), "b": conv(16, 4)}, {"a": 15},
    ),
    "positions in another order": (reordered, {"a": conv(3, 16), "b": conv(16, 4)}, {"a": 16}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_is_cut_and_proven(name: str) -> None:
    run, layers, expected = CASES[name]
    torch.manual_seed(0)
    graph, _, _ = prove(Net(run, **layers), IMAGE)
    assert sizes(graph) == expected


def test_a_constant_that_is_only_joined_keeps_its_width() -> None:
    """Nothing says what its width follows: as a group of its own it would be cut apart from that."""

    def run(net: Any, x: Tensor) -> Tensor:
        y = net.a(x)
        return net.c(net.b(torch.cat([y, y.new_zeros(1, 2 * y.shape[1], 8, 8)], 1)))

    torch.manual_seed(0)
    graph, _, _ = prove(Net(run, a=conv(3, 2), b=conv(6, 4), c=conv(4, 5)), IMAGE, macs=0.9)
    assert "..made" not in str([s.tensor for g in graph.groups for s in g.slices])
