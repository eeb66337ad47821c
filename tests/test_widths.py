"""What follows the widths without a shape that says so: numbers, branches, and what only training runs."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from proving import randomise, reasons, sizes
from test_graph import Net, conv
from torch import Tensor, nn

from espalier.costs import cost
from espalier.forms.places import find_places
from espalier.graph import Graph, hold, selectable, trace, tracing
from espalier.methods.base import attach
from espalier.methods.svd_oneshot import SVDOneShot
from espalier.plan import Budget, Plan
from espalier.surgery import shrink, verify
from espalier.surgery.verify import count_macs

IMAGE = torch.zeros(1, 3, 8, 8)

NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "tensor": lambda y: y / torch.tensor(float(y.shape[1]), device=y.device, dtype=y.dtype),
    "tensor on the cpu": lambda y: y * torch.tensor(1 / y.shape[1]),
    "as_tensor of a list": lambda y: y * torch.as_tensor([1.0, y.shape[1]], device=y.device, dtype=y.dtype)[1],
    "new_tensor": lambda y: y / y.new_tensor(y.shape[1]).sqrt(),
    "new_full": lambda y: y + y.new_full((1,), 1 / y.shape[1]),
    "full": lambda y: y / torch.full((1, 1, 1, 1), float(y.shape[1]), device=y.device, dtype=y.dtype),
    "full_like": lambda y: y + torch.full_like(y, 1 / y.shape[1]),
    "fill_": lambda y: y / torch.empty(1, device=y.device, dtype=y.dtype).fill_(y.shape[1]),
    "written into": lambda y: y * written(torch.ones(2, device=y.device, dtype=y.dtype), y.shape[1])[0],
    "where": lambda y: torch.where(y > 0.1, 1 / y.shape[1], y),
    "shape": lambda y: y / torch.tensor(y.shape, device=y.device)[1],
    "sum of ones": lambda y: y / torch.ones(y.shape[1], device=y.device, dtype=y.dtype).sum(),
    "numpy": lambda y: y * torch.from_numpy(np.array(1 / y.shape[1])).to(y.device, y.dtype),
    "alpha": lambda y: torch.add(y, y, alpha=1 / y.shape[1]),
    "batched alpha": lambda y: torch.baddbmm(
        y.flatten(2), y.flatten(2), torch.ones(len(y), 64, 64, device=y.device, dtype=y.dtype), alpha=1 / y.shape[1]
    ).view_as(y),
    "slope": lambda y: nn.functional.leaky_relu(y, 1 / y.shape[1]),
    "capped": lambda y: y * min(y.shape[1], 6) ** -0.5,
    "above a threshold": lambda y: y * 2 if y.shape[1] > 5 else y,
    "even": lambda y: y.relu() if y.shape[1] % 2 == 0 else y,
    "a large grid": lambda y: y + torch.full((1, 1, 64, 64), float(y.shape[1]), device=y.device, dtype=y.dtype)[..., :8, :8],
}  # fmt: skip


def written(tensor: Tensor, number: float) -> Tensor:
    tensor[0] = number
    return tensor


def every_width(graph: Graph) -> list[Plan]:
    """Plans with one unit, two, three, about half, and all but one of every group, and uneven ones."""
    draw = random.Random(0)
    keeps = [lambda n, k=k: min(k, n) for k in (1, 2, 3)] + [lambda n: (n + 1) // 2, lambda n: max(n - 1, 1)]
    keeps += [lambda n: draw.randint(1, n)] * 2
    of = {g.name: g.size for g in graph.groups}
    return [Plan({name: np.arange(keep(size)) for name, size in of.items()}, of) for keep in keeps]


def prove_every_width(model: nn.Module, example: Any) -> Graph:
    randomise(model).eval()
    graph = trace(model, example)
    for plan in every_width(graph):
        verify(model, graph, plan, example).require()
    return graph


@pytest.mark.parametrize("way", NUMBERS)
def test_a_number_that_follows_the_width_freezes_what_it_touches_and_nothing_else(way: str) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.c(m.b(NUMBERS[way](m.a(x))).relu().mean((2, 3)))

    model = randomise(Net(run, a=conv(3, 16), b=conv(16, 12), c=nn.Linear(12, 5))).eval()
    graph = trace(model, IMAGE)
    floor = {"capped": {"a": 11}, "above a threshold": {"a": 11}}.get(way, {})  # down to six
    assert sizes(graph) == {"b": 12, **floor}, reasons(graph)


@pytest.mark.parametrize(
    "constant",
    [
        lambda y: y / torch.tensor(float(y.shape[2] * y.shape[3]), device=y.device, dtype=y.dtype),
        lambda y: y + torch.tensor(y.shape, device=y.device)[2:].sum(),
        lambda y: y * torch.linspace(0, 1, y.shape[3], device=y.device, dtype=y.dtype),
        lambda y: y * max(y.shape[1] // 64, 4),
    ],
)
def test_a_number_that_does_not_follow_the_width_freezes_nothing(constant: Callable[[Tensor], Tensor]) -> None:
    model = Net(lambda m, x: m.b(constant(m.a(x))).relu(), a=conv(3, 16), b=conv(16, 5))
    assert sizes(prove_every_width(model, IMAGE)) == {"a": 16}


def test_a_number_of_another_tensor_freezes_that_one() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.c(m.b(y).relu() * torch.tensor(1 / y.shape[1], device=y.device))

    graph = prove_every_width(Net(run, a=conv(3, 16), b=conv(16, 12), c=conv(12, 5)), IMAGE)
    assert "a" not in sizes(graph)


def shortcut_where_it_fits(m: Any, x: Tensor) -> Tensor:
    x = m.a(x).relu()
    y = m.b(x).relu()
    if y.shape == x.shape:
        y = y + x
    return m.c(y)


@pytest.mark.parametrize(("first", "second", "free"), [(24, 16, {"a": 8, "b": 16}), (16, 24, {"a": 16, "b": 8})])
def test_a_shortcut_that_only_equal_widths_would_make_is_never_made(
    first: int, second: int, free: dict[str, int]
) -> None:
    model = Net(shortcut_where_it_fits, a=conv(3, first), b=conv(first, second), c=conv(second, 5))
    graph = prove_every_width(model, IMAGE)
    assert sizes(graph) == free
    model, graph = randomise(model), trace(model, IMAGE)
    narrow = min(first, second)
    plan = Plan({g.name: np.arange(min(g.size, narrow)) for g in graph.groups}, {g.name: g.size for g in graph.groups})
    verify(model, graph, plan, IMAGE).require()


def test_a_shape_that_may_equal_the_inputs_is_tried() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x).relu()
        return m.b(y + x if y.shape == x.shape else y)

    graph = trace(Net(run, a=conv(3, 16), b=conv(16, 5)), IMAGE)
    assert sizes(graph) == {"a": 13}, "one of them stays: four channels, because at three the input would be added"


def test_two_tensors_of_which_one_says_how_wide_the_other_is_are_cut_alike() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x).relu()
        b, c, h, w = y.shape
        return m.c(m.b(y.flatten(2)).view(b, c, h, w))

    graph = prove_every_width(Net(run, a=conv(3, 16), b=nn.Conv1d(16, 16, 3, padding=1), c=conv(16, 5)), IMAGE)
    assert sizes(graph) == {"a": 16} and {s.tensor for s in graph.groups[0].producers} >= {"a.weight", "b.weight"}


def test_two_tensors_that_a_branch_wants_equally_wide_are_cut_alike() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x).relu()
        z = m.b(y)
        return m.c(z * 2 if z.shape[1] == y.shape[1] else z)

    assert sizes(prove_every_width(Net(run, a=conv(3, 12), b=conv(12, 12), c=conv(12, 5)), IMAGE)) == {"a": 12}


def test_a_squeeze_keeps_two_channels_because_it_would_take_one_away() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.c(m.b(m.a(x).relu()).relu().mean((2, 3), keepdim=True).squeeze())

    graph = prove_every_width(Net(run, a=conv(3, 8), b=conv(8, 8), c=nn.Linear(8, 5)), IMAGE.expand(2, -1, -1, -1))
    assert sizes(graph) == {"a": 8, "b": 7}


def in_training_only(change: Callable[[Tensor], Tensor]) -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x).relu()
        return m.c(m.b(change(y) if m.training else y).relu().mean((2, 3)))

    return Net(run, a=conv(3, 16), b=conv(16, 12), c=nn.Linear(12, 5))


@pytest.mark.parametrize(
    "change",
    [
        lambda y: y * (torch.rand(16, device=y.device) > 0.1).to(y).view(1, 16, 1, 1),
        lambda y: y - y.mean(1, keepdim=True),
        lambda y: y.view(len(y), 16, -1).view_as(y),
        lambda y: y * y.shape[1] ** -0.5,
        lambda y: y if y.shape[1] > 7 else y.relu(),  # of nine that may go one stays
    ],
)
def test_what_only_training_runs_is_watched_and_rehearsed(change: Callable[[Tensor], Tensor]) -> None:
    model = randomise(in_training_only(change))
    graph = trace(model, IMAGE)
    assert sizes(graph) in ({"b": 12}, {"a": 9, "b": 12}), reasons(graph)
    for plan in every_width(graph):
        assert shrink(model, graph, plan).train()(IMAGE).shape == (1, 5)


def test_drawing_random_numbers_in_training_is_no_difference_between_widths() -> None:
    graph = trace(in_training_only(lambda y: y * 2 if random.random() < torch.rand(()).item() else y), IMAGE)
    assert sizes(graph) == {"a": 16, "b": 12}
    model = in_training_only(lambda y: y * random.random())
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    trace(model, IMAGE)
    assert state == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_a_train_mode_forward_that_needs_more_than_the_example_is_said() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        if m.training:
            raise ValueError("targets are needed in training")
        return m.b(m.a(x))

    graph = trace(Net(run, a=conv(3, 8), b=conv(8, 5)), IMAGE)
    assert sizes(graph) == {"a": 8}
    assert any("targets are needed in training" in note and "was not seen" in note for note in map(str, graph.notes))


@pytest.mark.parametrize(
    ("turn", "width"),
    [
        (lambda x: torch.roll(x, 3, 1), 4),
        (lambda x: torch.roll(x, 1, 1), 16),
        (lambda x: x[:, [1, 0, 3, 2]], 4),
        (lambda x: torch.cat([x[:, 2:], x[:, :2]], 1), 16),
    ],
)
def test_channels_that_change_places_by_a_fixed_number_stay(turn: Callable[[Tensor], Tensor], width: int) -> None:
    model = Net(lambda m, x: m.b(turn(m.a(x)).mean((2, 3))), a=conv(3, width), b=nn.Linear(width, 5))
    prove_every_width(model, IMAGE)


def test_channels_that_go_together_are_told_apart_when_they_change_places() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        y = torch.roll(x, 4, 1)
        return m.c(torch.cat([m.b(y), y, x], 1).mean((2, 3)))

    model = Net(run, a=conv(3, 8), b=nn.Conv2d(8, 8, 3, padding=1, groups=2), c=nn.Linear(24, 5))
    assert "a" not in sizes(prove_every_width(model, IMAGE))


@pytest.mark.parametrize(
    ("act", "least"), [(lambda y: y * min(y.shape[1], 8) ** -0.5, 8), (lambda y: y * (y.shape[1] > 5), 6)]
)
def test_a_width_that_has_to_be_large_enough_is_cut_to_that(act: Callable[[Tensor], Tensor], least: int) -> None:
    model = Net(
        lambda m, x: m.c(act(m.b(m.a(x).relu())).relu().mean((2, 3))), a=conv(3, 8), b=conv(8, 16), c=nn.Linear(16, 5)
    )
    graph = prove_every_width(model, IMAGE)
    assert sizes(graph) == {"a": 8, "b": 16 - least + 1}  # the last of a group stays as well


def test_what_roll_takes_round_the_end_stays_and_the_rest_may_go() -> None:
    """Channels go by twos, four apart: those of the last one stay."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        return m.c(m.b(x.roll(1, 1) * m.scale) * x.sigmoid())

    model = Net(run, a=conv(3, 8), b=conv(8, 8), c=nn.Conv2d(8, 4, 1, groups=2))
    model.scale = nn.Parameter(torch.rand(8, 1, 1))
    assert sizes(prove_every_width(model, IMAGE)) == {"scale": 3}


def test_a_flip_follows() -> None:
    model = Net(lambda m, x: m.b(m.a(x).flip(1).relu()), a=conv(3, 16), b=conv(16, 5))
    assert sizes(prove_every_width(model, IMAGE)) == {"a": 16}


def tampered(run_small: Callable[[Any, Tensor], Tensor]) -> tuple[nn.Module, Graph, Plan, nn.Module]:
    model = randomise(Net(lambda m, x: m.b(m.a(x).relu().clamp(max=50.0)), a=conv(3, 16), b=conv(16, 5))).eval()
    graph = trace(model, IMAGE)
    plan = Plan({"a": np.arange(7)}, {"a": 16})
    small = shrink(model, graph, plan)
    small.run = run_small
    return model, graph, plan, small


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: m.b(m.a(x).relu().clamp(max=60.0)),
        lambda m, x: m.b(m.a(x).relu().relu().clamp(max=50.0)),
        lambda m, x: m.b(m.a(x).relu().clamp(max=60.0 if m.training else 50.0)),
    ],
)
def test_a_delivered_network_that_runs_other_operations_is_not_proven(run: Callable[[Any, Tensor], Tensor]) -> None:
    model, graph, plan, small = tampered(run)
    proof = verify(model, graph, plan, IMAGE, small=small, fresh=lambda: model)
    assert "operations as predicted" in [c.name for c in proof.checks if not c.passed], proof


def test_what_only_training_computes_is_compared_in_training() -> None:
    change = lambda y: nn.functional.dropout(y * 0.5, 0.3, training=True)  # noqa: E731
    model = randomise(in_training_only(change))
    graph = trace(model, IMAGE)
    plan = every_width(graph)[3]
    proof = verify(model, graph, plan, IMAGE).require()
    assert "largest difference" in next(c.detail for c in proof.checks if c.name == "small equals masked in training")
    small = shrink(model, graph, plan)
    small.run = lambda m, x: m.c(m.b(m.a(x).relu() * (0.7 if m.training else 1.0)).relu().mean((2, 3)))
    wrong = verify(model, graph, plan, IMAGE, small=small, fresh=lambda: model)
    assert "small equals masked in training" in [c.name for c in wrong.checks if not c.passed]


def test_what_attention_was_given_in_training_is_compared() -> None:
    attention = nn.functional.scaled_dot_product_attention

    def run(factor: float) -> Callable[[Any, Tensor], Tensor]:
        def forward(m: Any, x: Tensor) -> Tensor:
            y = m.a(x).relu() * (factor if m.training else 1.0)
            q = m.q(y).flatten(2).transpose(1, 2)
            return m.c(attention(q, q, q))

        return forward

    model = randomise(Net(run(0.5), a=conv(3, 16), q=conv(16, 8), c=nn.Linear(8, 5))).eval()
    graph = trace(model, IMAGE)
    plan = Plan({"a": np.arange(7)}, {"a": 16})
    verify(model, graph, plan, IMAGE).require()
    small = shrink(model, graph, plan)
    small.run = run(0.7)
    wrong = verify(model, graph, plan, IMAGE, small=small, fresh=lambda: model)
    assert "small equals masked in training" in [c.name for c in wrong.checks if not c.passed]


@pytest.mark.parametrize(
    "draw",
    [
        lambda y: nn.functional.dropout(y, 0.5, training=True),
        lambda y: y + torch.randn_like(y),
        lambda y: nn.functional.rrelu(y, training=True),
        lambda y: y * random.random(),
    ],
)
def test_a_network_that_draws_random_numbers_in_evaluation_is_proven(draw: Callable[[Tensor], Tensor]) -> None:
    model = Net(lambda m, x: m.b(draw(m.a(x))), a=conv(3, 16), b=conv(16, 5))
    assert sizes(prove_every_width(model, IMAGE)) == {"a": 16}


def test_an_output_that_is_not_a_number_on_the_example_is_no_difference() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.c(m.b(y / y.abs().mean()).relu())

    model = Net(run, a=nn.Conv2d(3, 8, 3, bias=False), b=conv(8, 12), c=conv(12, 4))
    graph = trace(model, IMAGE)
    proof = verify(model, graph, Plan({"b": np.arange(5)}, {"b": 12}), IMAGE).require()
    assert "not finite" in next(c.detail for c in proof.checks if c.name == "identity")


def test_a_statistic_of_a_weight_that_is_returned_keeps_the_weight() -> None:
    def run(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return m.b(m.a(x).relu()), m.a.weight.square().sum()

    assert not trace(Net(run, a=conv(3, 8), b=conv(8, 4)), IMAGE).groups


def kept(m: Any, x: Tensor) -> Tensor:
    """Computed by the first forward, in single precision, and read by all that come."""
    if m.once is None:
        m.once = m.of(m).detach().float().clone()
    return m.b(m.a(x).relu() * m.once.to(x.dtype))


def test_a_value_that_a_module_keeps_holds_the_channels_that_it_was_computed_from() -> None:
    model = Net(kept, a=conv(3, 8), b=conv(8, 4), once=None, of=lambda m: m.a.bias[:, None, None])
    assert "a" not in sizes(trace(model, IMAGE))


def test_what_only_one_network_has_rounded_is_no_difference() -> None:
    model = randomise(Net(kept, a=conv(3, 8), b=conv(8, 4), once=None, of=lambda m: m.b.bias.sum() * 1.1))
    graph = trace(model, IMAGE)
    plan = Plan({"a": np.arange(5)}, {"a": 8})
    small = shrink(model, graph, plan)
    small(IMAGE)
    verify(model, graph, plan, IMAGE, small=small, fresh=lambda: model).require()


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: torch.stack([torch.dot(v, m.w) for v in m.a(x).relu().mean((2, 3))]),
        lambda m, x: torch.einsum("bchw,c->bhw", m.a(x).relu(), m.w),
    ],
)
def test_a_vector_that_reads_channels_is_cut_and_costs_what_torch_counts(run: Callable[[Any, Tensor], Tensor]) -> None:
    model = randomise(Net(run, a=conv(3, 6)))
    model.w = nn.Parameter(torch.rand(6))
    graph = trace(model, IMAGE)
    for keep in (1, 3):
        verify(model, graph, Plan({"a": np.arange(keep)}, {"a": 6}), IMAGE).require()


def test_a_mask_that_the_network_holds_selects_what_it_says() -> None:
    model = Net(lambda m, x: m.b(m.a(x)[:, m.mask]), a=conv(3, 8), b=conv(4, 5))
    model.mask = nn.Buffer(torch.arange(8) % 2 == 0)
    assert not trace(model, IMAGE).groups


def test_an_expert_that_the_example_does_not_reach_holds_what_may_feed_it() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        best = m.gate(y.mean((2, 3))).argmax(1)
        out = torch.zeros_like(y)
        for number, expert in enumerate((m.b, m.c)):
            if (best == number).any():
                out[best == number] = expert(y[best == number])
        return m.e(m.d(out).relu())

    layers = {
        "a": conv(3, 8),
        "gate": nn.Linear(8, 2),
        "b": conv(8, 8),
        "c": conv(8, 8),
        "d": conv(8, 12),
        "e": conv(12, 5),
    }
    model = Net(run, **layers)
    graph = prove_every_width(model, IMAGE)
    assert sizes(graph) == {"d": 12}
    assert "which the values of the example have not reached" in reasons(graph)


class Inferring(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.inner(x)


def test_inference_mode_hides_nothing() -> None:
    model = Net(lambda m, x: m.b(m.n(m.a(x)).relu()), a=conv(3, 16), n=nn.BatchNorm2d(16), b=conv(16, 5))
    expected = cost(trace(model, IMAGE, rehearse=False)).macs
    with torch.inference_mode():
        graph = trace(model, torch.zeros(1, 3, 8, 8))
    assert sizes(graph) == {"a": 16} and cost(graph).macs == expected
    graph = trace(Inferring(model), IMAGE)
    assert sizes(graph) == {"inner.a": 16} and cost(graph).macs == expected
    assert count_macs(Inferring(model), IMAGE) == expected


@pytest.mark.parametrize(
    "mix",
    [
        lambda m, y: y + m.mix(y),
        lambda m, y: m.mix(y.transpose(0, 1)).transpose(0, 1),
        lambda m, y: torch.matmul(y, m.mix.weight @ m.mix.weight),
    ],
)
def test_a_linear_layer_over_positions_costs_what_its_channels_cost(mix: Callable[[Any, Tensor], Tensor]) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.b(mix(m, m.a(x).flatten(2)).mean(2))

    model = Net(run, a=conv(3, 16), mix=nn.Linear(64, 64), b=nn.Linear(16, 5))
    assert sizes(prove_every_width(model, IMAGE)) == {"a": 16}


def test_a_linear_layer_over_positions_stays_dense_where_ranks_are_sought() -> None:
    model = Net(
        lambda m, x: m.b(m.mix(m.a(x).flatten(2)).mean(2)), a=conv(3, 64), mix=nn.Linear(64, 64), b=nn.Linear(64, 5)
    )
    run = attach(model, IMAGE, budget=Budget(macs=0.95), method=SVDOneShot())
    assert "among the rows" in run.skipped["mix"]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_cost_what_torch_counts(kind: type[nn.Module]) -> None:
    model = Net(
        lambda m, x: m.b(m.r(m.a(x).mean(2).transpose(1, 2))[0]), a=conv(3, 16), r=kind(16, 8), b=nn.Linear(8, 5)
    )
    graph = trace(model, IMAGE)
    assert cost(graph).macs == count_macs(model, IMAGE) > 8 * 3 * 16 * 9 * 8


def test_fused_attention_costs_what_torch_counts() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = Net(lambda m, x: m.b(m.t(m.a(x).flatten(2).transpose(1, 2))), a=conv(3, 16), t=layer, b=nn.Linear(16, 5))
    graph = trace(model, IMAGE)
    assert cost(graph).macs == count_macs(model, IMAGE)


def central_difference(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.c((m.b(y) - 0.7 * nn.functional.conv2d(y, m.b.weight.sum((2, 3), keepdim=True))).relu())


def test_a_weight_that_the_forward_reads_a_second_time_takes_no_other_form() -> None:
    model = Net(central_difference, a=conv(3, 16), b=conv(16, 12), c=conv(12, 5))
    graph = prove_every_width(model, IMAGE)
    assert graph.reread == ("b.weight",) and sizes(graph) == {"a": 16, "b": 12}
    places, reasons_ = find_places(model, IMAGE)
    assert set(places) == {"a", "c"} and "b" in reasons_
    assert selectable(hold(graph, ["a"], "test"), ["b", "c"]) == []


def test_a_layer_that_runs_once_is_read_once_and_a_tied_decoder_twice() -> None:
    once = Net(lambda m, x: m.b(m.a(x).flatten(1)), a=conv(3, 4), b=nn.Linear(256, 5))
    assert trace(once, IMAGE).reread == ()
    tied = Net(lambda m, x: nn.functional.linear(m.a(x).relu(), m.a.weight.t()), a=nn.Linear(8, 6))
    assert trace(tied, torch.zeros(1, 8)).reread == ("a.weight",)


def test_what_only_training_allocates_is_no_activation_memory() -> None:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x).relu()
        out = m.b(y.mean((2, 3)))
        return (out, m.head(y.repeat(1, 1, 4, 4))) if m.training else out

    plain = Net(lambda m, x: m.b(m.a(x).relu().mean((2, 3))), a=conv(3, 16), b=nn.Linear(16, 5))
    with_head = Net(run, a=conv(3, 16), b=nn.Linear(16, 5), head=conv(16, 5))
    memory = [cost(trace(m, IMAGE, rehearse=False)).activation_memory for m in (plain, with_head)]
    assert memory[0] == memory[1]


def test_boxes_that_depend_on_values_do_not_freeze_the_backbone() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.c(m.b(m.a(x).relu()).relu()).flatten(2).transpose(1, 2)[0]
        return y[(y[:, 0] > 0.0).nonzero()[:, 0]]

    torch.manual_seed(0)
    model = Net(run, a=conv(3, 16), b=conv(16, 12), c=conv(12, 6))
    graph = trace(model, torch.randn(1, 3, 8, 8))
    assert sizes(graph) == {"a": 16, "b": 12}
    frozen = Net(
        lambda m, x: run(m, m.z(x).view(1, 8, 8, 8)), z=conv(3, 8), a=conv(8, 16), b=conv(16, 12), c=conv(12, 6)
    )
    assert sizes(trace(frozen, torch.randn(1, 3, 8, 8))) == {"a": 16, "b": 12}


def test_a_training_that_runs_the_same_is_watched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    watched: list[bool] = []
    run = tracing._forward
    monkeypatch.setattr(
        tracing, "_forward", lambda watch, *rest, training: (
            watched.append(training) if watch.rehearsal is None else None, run(watch, *rest, training=training)
        )[1],
    )  # fmt: skip
    trace(Net(lambda m, x: m.b(m.a(x).view(-1, 2, 6, 8, 8).sum(1)), a=conv(3, 12), b=conv(6, 2)), IMAGE)
    assert watched.count(False) > 1
    assert watched.count(True) == 1


@pytest.mark.parametrize(("in_training", "alike"), [(1.0, True), (0.5, False)])
def test_a_training_that_computes_with_another_constant_is_another(in_training: float, alike: bool) -> None:
    model = Net(
        lambda m, x: m.b(m.a(x) * torch.tensor(in_training if m.training else 1.0)), a=conv(3, 12), b=conv(12, 2)
    )
    assert tracing.observe(model.eval(), IMAGE).trains_alike is alike


def test_a_buffer_that_activations_are_written_into_is_no_constant() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.b(m.a(x).relu())
        rows = 2 + int((y.mean() > 0).item()) + int(y.shape[1] == 0)
        page, empty = torch.zeros(8, 8), torch.empty(1, 1).fill_(0.5)  # a watch that asks for values runs on the CPU
        page[:rows, 1:4] = y[0, 0, :rows, 1:4]
        page[rows:, 1:4] += y[0, 0, rows:, 1:4]
        return torch.stack([page, page * empty])

    torch.manual_seed(0)
    model = Net(run, a=conv(3, 16), b=conv(16, 2)).eval()
    graph = trace(model, torch.randn(1, 3, 8, 8))
    assert sizes(graph) == {"a": 16}
    plan = Plan({"a": np.arange(0, 16, 3)})
    verify(model, graph, plan, torch.randn(1, 3, 8, 8)).require()


@pytest.mark.parametrize("how", ["select", "slice"])
def test_a_position_that_values_decide_holds_all_channels(how: str) -> None:
    def run(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = m.a(x).relu()
        at = int((m.head(y).abs().mean() * 20).item()) % 8
        part = y[:, at].unsqueeze(1) if how == "select" else y[:, : at + 1].sum(1, keepdim=True)
        return m.b(part), m.c(y)

    torch.manual_seed(1)
    model = Net(run, a=conv(3, 16), head=conv(16, 4), b=conv(1, 4), c=conv(16, 4)).eval()
    assert sizes(trace(model, torch.randn(1, 3, 8, 8))) == {}
