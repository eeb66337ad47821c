"""A field of settings is declared once; what it allows is checked, said in words, and offered on the command line."""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import pytest
from typer.testing import CliRunner

from espalier.present.cli import app
from espalier.run.recipe import Recipe
from espalier.settings import OneOf, Portion, Settings, described, settings_of

TABLE = {"red": 1, "blue": 2}


@dataclass(frozen=True)
class Some(Settings):
    count: Annotated[int, described("how many", ge=1)] = 3
    part: Portion | None = 0.5
    word: Literal["x", "y"] = "x"
    color: Annotated[str, OneOf(TABLE)] = "red"
    flag: bool = True
    names: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("count", 0, "a whole number at least 1"),
        ("count", 2.0, "a whole number at least 1"),
        ("count", True, "a whole number at least 1"),
        ("part", 1.0, "a number at least 0 and below 1, or left out"),
        ("part", float("nan"), "a number at least 0 and below 1, or left out"),
        ("word", "z", "one of x, y"),
        ("color", "green", "one of red, blue"),
        ("color", 3, "one of red, blue"),
        ("flag", 1, "true or false"),
        ("names", "one", "a list"),
    ],
)
def test_a_value_out_of_range_is_refused_in_one_line(field, value, words):
    with pytest.raises(ValueError) as error:
        Some(**{field: value})
    assert str(error.value) == f"Some({field}={value!r}): must be {words}"


def test_numbers_take_the_type_of_their_field():
    some = Some(count=np.int64(4), part=np.float32(0.25))
    assert (some.count, some.part) == (4, 0.25)
    assert (type(some.count), type(some.part), type(Some(part=0).part)) == (int, float, float)
    assert Some(part=None).part is None


def test_annotations_are_read_whether_or_not_they_are_strings():
    """This module has real annotations; that of ``Recipe`` has strings."""
    assert {s.name: s.choices for s in settings_of(Some)}["color"] == ("red", "blue")
    with pytest.raises(ValueError, match=r"Recipe\(schedule='linear'\): must be one of cosine, constant, wsd"):
        Recipe(schedule="linear")


def test_every_field_of_a_recipe_says_what_it_means_and_is_an_option():
    shown = CliRunner().invoke(app, ["compress", "--help"], env={"COLUMNS": "200"}).output
    for setting in settings_of(Recipe):
        assert setting.text, setting.name
        assert f"--{setting.name.replace('_', '-')}" in shown
