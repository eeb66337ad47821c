"""Random programs of the second generator: none may be wrong, crash once cut, or cost another amount than was planned."""

import random

import pytest
from programs import Program, random_program
from soak_programs import goes_on, judge, soak, together

from espalier.costs import cost
from espalier.graph import trace


def test_random_programs_are_cut_and_proven():
    """Short ones with one plan each, so that 300 are cheap; ``python -m tests.soak_programs`` has long ones and three plans."""
    found = soak(300, 0, full=False, longest=7)
    assert not found["failed"], found
    assert found["whole"] <= 60 and found["median removable"] > 0.7, found


def test_what_has_a_maker_and_a_reader_of_channels_is_not_taken_to_be_rigid():
    first, second = "self.p0 = nn.Linear(4, 6)", "self.p1 = nn.Linear(6, 3)"
    made = "v0 = torch.cat([x0, torch.zeros(x0.shape[0], 2)], 1)"
    assert Program((second,), ("v0 = x0.relu()", "return self.p1(v0), v0"), ((6,),)).rigid
    assert not Program((first, second), ("v0 = self.p0(x0)", "return self.p1(v0)"), ((4,),)).rigid
    assert not Program((first, second), ("return self.p1(self.p0(x0))",), ((4,),)).rigid
    assert not Program((second,), (made, "return self.p1(v0)"), ((4,),)).rigid
    normed = ("v0 = self.p0(x0)", "v1 = F.layer_norm(v0, (6,))", "return self.p1(v1)")
    assert not Program((first, second), normed, ((4,),)).rigid, "a proof knows the module alone"


@pytest.mark.parametrize(
    ("statements", "rigid"),
    [
        (
            ("v0 = self.a(x0)", "v1 = self.b(v0)", "return torch.cat([v1.relu(), v0.tanh()], 1)"),
            True,
        ),  # all is returned
        (("v0 = self.a(x0)", "v1 = self.b(v0.relu())", "return v1"), False),
        (("v0 = self.a(x0)", "v1 = self.b(v0 + x0)", "return v1"), True),  # what is made is added to what is given
        (("v0 = self.a(x0)", "v1 = self.b(v0 + x0[:, :1])", "return v1"), False),  # to one channel of it, broadcast
        (
            ("v0 = self.a(x0)", "v1 = self.a(v0)", "v2 = self.b(v1)", "return v2"),
            True,
        ),  # reads what is given, makes as much
        (("v0 = self.a(x0)", "v1 = self.b(self.n(v0))", "return v1"), True),  # statistics over what is made
        (("v0 = self.a(x0)", "v1 = v0 * self.s", "return self.b(v1)"), False),
        (("v0 = self.a(x0)", "v0.add_(x0)", "return self.b(v0)"), False),  # not understood
        (("v0 = torch.cat([x0, torch.zeros(x0.shape[0], 2)], 1)", "return v0 * 2"), True),
    ],
)
def test_a_program_is_rigid_where_all_that_is_made_is_held(statements, rigid):
    layers = ("self.a = nn.Linear(4, 4)", "self.b = nn.Linear(4, 4)", "self.n = nn.LayerNorm(4)")
    program = Program((*layers, "self.s = nn.Parameter(torch.rand(4))"), statements, ((4,),))
    assert program.rigid == rigid
    free = [g for g in trace(program.build(), program.example()).groups if g.size > 1]
    assert bool(free) != rigid or "add_" in statements[1]


@pytest.mark.parametrize(
    "seed",
    [
        920002,  # a roll by one channel where two go together
        400132,  # a roll over channels that no rehearsal had made fewer: other groups had all the numbers
        409535,  # the same mean, by nothing but rounding once more
        702257,  # outputs that are nothing but what a mean was rounded by
        702619,  # beside others, the last unit of a group does not say where it belongs
        5040047,  # the mean of what is normalised: nothing but rounding, which is no difference
    ],
)
def test_programs_that_were_wrong_once(seed: int):
    assert judge(random_program(random.Random(seed).choice), seed).kind == "proven"


def test_costs_are_the_same_without_rehearsals():
    for seed in range(8):
        program = random_program(random.Random(seed).choice, longest=10)
        network, example = program.build(), program.example()
        assert cost(trace(network, example)) == cost(trace(network, example, rehearse=False)), seed


def test_two_runs_of_the_soak_are_recorded_as_one():
    one, two, whole = (soak(n, first, show=False, full=False, longest=7) for n, first in ((5, 0), (7, 5), (12, 0)))
    of = {"environment": {"revision": "a"}}
    assert goes_on({**one, **of}, {**two, **of}) and not goes_on({**two, **of}, {**one, **of})
    assert not goes_on({**one, **of}, {**two, "environment": {"revision": "b"}})
    found = together(one, two)
    rough = {"seconds", "median removable", "environment"}
    assert {k: v for k, v in found.items() if k not in rough} == {k: v for k, v in whole.items() if k not in rough}
    assert found["median removable"] == pytest.approx(whole["median removable"], abs=0.01)
