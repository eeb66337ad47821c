"""What is public says what it is: every name of ``espalier``, its arguments, its errors, its members and its fields."""

import dataclasses
import inspect
import re

import pytest

import espalier as es
from espalier.run.batches import Source
from espalier.settings import Settings, settings_of

PUBLIC = {name: getattr(es, name) for name in es.__all__ if name != "__version__"}
PLAIN = {"model", "path", "example"}  # what they are, their name says


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
    text, source = inspect.cleandoc(cls.__doc__ or ""), inspect.getsource(cls)
    assert text and not text.startswith(f"{name}(")
    for member, found in inspect.getmembers_static(cls):
        found = getattr(found, "fget", None) or getattr(found, "func", None) or getattr(found, "__func__", found)
        if not member.startswith("_") and str(getattr(found, "__module__", "")).startswith("espalier"):
            where = [*cls.__mro__, Source] if cls is es.Loaders else cls.__mro__
            assert any(inspect.getdoc(vars(base).get(member)) for base in where), member
    for field in dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ():
        if issubclass(cls, Settings):
            assert next(s for s in settings_of(cls) if s.name == field.name).text, field.name
        elif not field.name.startswith("_"):
            line = re.split(rf"^    {field.name}:", source, flags=re.M)[-1]
            line = re.split(r"^    [\w@\"]", line, maxsplit=1, flags=re.M)[0]
            assert "#" in line or told(field.name, text), field.name
