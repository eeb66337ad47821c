"""Random programs of the second generator: none may be wrong, crash once cut, or cost another amount than was planned."""

from soak_programs import soak


def test_random_programs_are_cut_and_proven():
    found = soak(40, 0)
    assert not found["failed"], found
    assert found["whole"] <= 8 and found["median removable"] > 0.7, found
