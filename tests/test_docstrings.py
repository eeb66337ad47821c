"""What is public says what it is: every name of ``espalier``, its arguments, its errors, its members and its fields; of tensors
the shape, of amounts the unit, of methods the source."""

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest

import espalier as es
from espalier.run.batches import Source
from espalier.settings import Settings, settings_of

PUBLIC = {name: getattr(es, name) for name in es.__all__ if name != "__version__"}
PLAIN = {"model", "path", "example"}  # what they are, their name says

SHAPE = re.compile(r"``\([\w ,*+]*,[\w ,*+]*\)``|\bscalar\b".replace("\\\\", "\\"))
UNITS = {
    r"macs": r"multiply-accumulate",
    r"params": r"element",
    r"(activation_)?memory|bytes": r"\bbytes\b",
    r"latency|overhead|milliseconds": r"milliseconds|\bms\b",
    r"seconds|time_limit": r"\bseconds\b",
    r"(dense_)?accuracy": r"percent",
    r"most_lost": r"points",
    r"image_size": r"pixels",
    r"holdout": r"images|pairs",
    r"batch_sizes?|batch": r"images|inputs|one pass",
    r"threads": r"threads",
    r"tolerance": r"relative",
    r"start_at|end_at|fade|every|stagger|progress": r"fractions?\b|shares?\b|from 0 to 1",
}
"""Names of amounts -> the unit that has to stand where they are told of, or for all of a class in what it says of itself."""


def members_of(cls: type) -> Iterator[tuple[str, Any, str]]:
    """Public members of ours: name, function behind it, and what is said of it, here or where it is inherited from."""
    for member, found in inspect.getmembers_static(cls):
        found = getattr(found, "fget", None) or getattr(found, "func", None) or getattr(found, "__func__", found)
        if not member.startswith("_") and str(getattr(found, "__module__", "")).startswith("espalier"):
            where = [*cls.__mro__, Source] if cls is es.Loaders else cls.__mro__
            said = (inspect.getdoc(vars(base).get(member)) for base in where)
            yield member, found, next((text for text in said if text), "")


def fields_of(cls: type) -> Iterator[tuple[str, str]]:
    """Public fields, and what is said of each: in the settings, behind it, or in a paragraph about the class."""
    text, source = inspect.cleandoc(cls.__doc__ or ""), inspect.getsource(cls)
    for field in dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ():
        if issubclass(cls, Settings):
            yield field.name, next(s for s in settings_of(cls) if s.name == field.name).text
        elif not field.name.startswith("_"):
            line = re.split(rf"^    {field.name}:", source, flags=re.M)[-1]
            line = re.split(r"^    [\w@\"]", line, maxsplit=1, flags=re.M)[0]
            yield field.name, f"{line.partition('#')[2]}\n{about(field.name, text)}".strip()


def about(name: str, text: str) -> str:
    """The paragraphs in which ``name`` is spoken of."""
    return "\n\n".join(part for part in text.split("\n\n") if told(name, part))


def no_unit(name: str, text: str) -> bool:
    """Is ``name`` an amount of which ``text`` does not say what it is counted in?"""
    return any(re.fullmatch(n, name) and not re.search(unit, text, re.I) for n, unit in UNITS.items())


def no_shape(function: Any, text: str) -> bool:
    """Does ``function`` take or return arrays whose shape ``text`` does not say?  Networks take what they like."""
    signature = str(inspect.signature(function)) if inspect.isfunction(function) else ""
    return bool(re.search("Tensor|ndarray", signature.replace("example_inputs: 'Tensor", ""))) and not SHAPE.search(
        text
    )


def numbers_of(function: Any) -> list[str]:
    """Arguments that are numbers."""
    found = inspect.signature(function).parameters.values() if inspect.isfunction(function) else ()
    return [a.name for a in found if re.search("int|float", str(a.annotation))]


def told(name: str, text: str) -> bool:
    """Is ``name`` spoken of?"""
    return re.search(rf"``(Recipe\()?{re.escape(name)}\b|``[^`]*\b{re.escape(name)}=", text) is not None


@pytest.mark.parametrize("name", [n for n, o in PUBLIC.items() if inspect.isfunction(o)])
def test_a_function_says_what_its_arguments_are_and_what_it_raises(name):
    text = inspect.getdoc(PUBLIC[name]) or ""
    arguments = inspect.signature(PUBLIC[name]).parameters.keys() - PLAIN
    assert not [a for a in arguments if not told(a, text)]
    assert "Raises" in text


@pytest.mark.parametrize("name", [n for n, o in PUBLIC.items() if inspect.isclass(o)])
def test_a_class_says_what_it_is_and_what_its_members_and_fields_are(name):
    cls = PUBLIC[name]
    text = inspect.cleandoc(cls.__doc__ or "")
    assert text and not text.startswith(f"{name}(")
    assert not [member for member, _, said in members_of(cls) if not said]
    assert not [field for field, said in fields_of(cls) if not said]


@pytest.mark.parametrize("name", [n for n, o in PUBLIC.items() if inspect.isfunction(o)])
def test_a_function_says_the_shapes_of_tensors_and_the_units_of_amounts(name):
    text, function = inspect.getdoc(PUBLIC[name]) or "", PUBLIC[name]
    assert not no_shape(function, text)
    assert not [a for a in numbers_of(function) if no_unit(a, about(a, text))]


@pytest.mark.parametrize("name", [n for n, o in PUBLIC.items() if inspect.isclass(o)])
def test_a_class_says_the_shapes_of_tensors_and_the_units_of_amounts(name):
    cls = PUBLIC[name]
    text = inspect.cleandoc(cls.__doc__ or "")
    assert not [f for f, said in fields_of(cls) if no_unit(f, f"{said}\n{text}")]
    members = [*members_of(cls)]
    assert not [member for member, function, said in members if no_shape(function, said)]
    assert not [member for member, _, said in members if no_unit(member, said)]
    assert not [(m, a) for m, f, said in members for a in numbers_of(f) if no_unit(a, f"{about(a, said)}\n{text}")]


@pytest.mark.parametrize("name", [n for n, o in PUBLIC.items() if inspect.isclass(o) and issubclass(o, es.Method)])
def test_a_method_cites_its_source(name):
    said = inspect.cleandoc(PUBLIC[name].__doc__ or "")
    cited = said.partition("Source: ")[2]
    assert name == "Method" or re.search(r"\b(19|20)\d\d\b", cited)
