"""Settings declared once: the type, range and meaning of a field stand beside it; checks, options and pages are derived.

>>> from dataclasses import dataclass
>>> @dataclass(frozen=True)
... class Pace(Settings):
...     every: Annotated[float, Field(gt=0, lt=1, description="time between two decisions")] = 0.1
>>> Pace(every=2)
Traceback (most recent call last):
ValueError: Pace(every=2): must be a number above 0 and below 1
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from numbers import Integral, Real
from typing import Annotated, Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

import annotated_types
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

__all__ = ["Fraction", "OneOf", "Portion", "Positive", "Setting", "Settings", "described", "settings_of"]

Portion = Annotated[float, Field(ge=0, lt=1)]  # from 0 to below 1
Fraction = Annotated[float, Field(gt=0, le=1)]  # above 0 and up to 1
Positive = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class OneOf:
    """The words that a field of text allows, where they are the names of a table: ``Annotated[str, OneOf(SCORES)]``."""

    names: Collection[str]


class Settings:
    """What a frozen dataclass of settings inherits: every value is checked against the annotation of its field.

    An annotation is a plain type, a ``Literal`` of words, or either with pydantic's ``Field(ge=..., gt=..., le=..., lt=...,
    description=...)`` in ``Annotated``.  Numbers of numpy become plain ones; nothing else is converted.

    ``formerly`` holds what fields were called before (old name -> name now), so that an old script is told what to write, and
    ``dropped`` those that there are no longer, with what they usually were.

    Raises: ValueError in one line, ``Class(field=value): must be ...``.
    """

    formerly: ClassVar[Mapping[str, str]] = {}
    dropped: ClassVar[Mapping[str, Any]] = {}

    def __new__(cls, *_: Any, **values: Any) -> Self:
        for name in values.keys() & cls.dropped.keys():
            raise ValueError(f"{cls.__name__}({name}={values[name]!r}): is no setting any more; leave it out")
        for name in values.keys() & cls.formerly.keys():
            raise ValueError(f"{cls.__name__}({name}={values[name]!r}): is called {cls.formerly[name]} now")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        owner: Any = type(self)
        for setting in settings_of(owner):
            value = setting.checked(getattr(self, setting.name))
            object.__setattr__(self, setting.name, value)


@dataclass(frozen=True)
class Setting:
    """One field of a class of settings."""

    owner: str  # the class, for messages
    name: str
    kind: Any  # the annotation without its range: ``int``, ``float | None``, ``Literal[...]``
    allowed: str  # in words
    text: str  # what it means; empty where nothing was written
    default: Any  # ``dataclasses.MISSING`` where there is none
    choices: tuple[str, ...]  # the words to choose from; empty for anything but a choice
    adapter: TypeAdapter[Any]

    @property
    def plain(self) -> type:
        """The type without what is optional about it: ``bool``, ``int``, ``float``, or ``str`` for all else."""
        parts = [p for p in (get_args(self.kind) or (self.kind,)) if p is not type(None)]
        return parts[0] if len(parts) == 1 and parts[0] in (bool, int, float) else str

    def checked(self, value: Any) -> Any:
        """``value`` as the field holds it.  Raises: ValueError that says what the field allows."""
        try:
            found = self.adapter.validate_python(_plain_number(value))
        except ValidationError:
            raise self.refusal(value) from None
        if self.choices and found is not None and found not in self.choices:
            raise self.refusal(value)
        return found

    def refusal(self, value: Any) -> ValueError:
        """The error for a value that is not allowed."""
        return ValueError(f"{self.owner}({self.name}={value!r}): must be {self.allowed}")


@cache
def settings_of(owner: Any) -> tuple[Setting, ...]:
    """All settings of a dataclass, in the order of its fields."""
    return tuple(_read(owner))


def described(text: str, **bounds: Any) -> Any:
    """``Field`` with what it means first: ``Annotated[int, described("passes over the data", ge=1)]``."""
    return Field(description=text, **bounds)


def _read(owner: Any) -> Iterator[Setting]:
    hints = get_type_hints(owner, include_extras=True)
    for own in fields(owner):
        hint = hints[own.name]
        config = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
        kind = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        notes = [n for n in getattr(hint, "__metadata__", ()) if hasattr(n, "metadata")]
        default = own.default if own.default_factory is MISSING else own.default_factory()
        named = [tuple(n.names) for n in getattr(hint, "__metadata__", ()) if isinstance(n, OneOf)]
        choices = named[0] if named else tuple(c for part in (kind, *get_args(kind)) for c in _literals(part))
        yield Setting(
            owner=owner.__name__,
            name=own.name,
            kind=_bare(kind),
            allowed=_words(kind, [b for n in (*_inner_notes(kind), *notes) for b in n.metadata], choices),
            text=next((n.description for n in reversed(notes) if n.description), ""),
            default=default,
            choices=choices,
            adapter=TypeAdapter(hint, config=config),
        )


def _inner_notes(kind: Any) -> list[Any]:
    """Ranges of a part of a union: ``Portion | None``."""
    return [n for part in get_args(kind) for n in getattr(part, "__metadata__", ()) if hasattr(n, "metadata")]


def _bare(kind: Any) -> Any:
    """A union without the ranges of its parts."""
    if get_origin(kind) is Annotated:
        return get_args(kind)[0]
    parts = [get_args(p)[0] if get_origin(p) is Annotated else p for p in get_args(kind)]
    bare = kind
    if parts and get_origin(kind) not in (Literal, tuple, list, dict):
        bare = parts[0]
        for part in parts[1:]:
            bare = bare | part
    return bare


def _literals(kind: Any) -> tuple[str, ...]:
    return tuple(map(str, get_args(kind))) if get_origin(kind) is Literal else ()


def _plain_number(value: Any) -> Any:
    if isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", type(None): "left out"}
_BOUNDS = (
    (annotated_types.Ge, "at least", "ge"),
    (annotated_types.Gt, "above", "gt"),
    (annotated_types.Lt, "below", "lt"),
    (annotated_types.Le, "at most", "le"),
)


def _words(kind: Any, bounds: list[Any], choices: tuple[str, ...]) -> str:
    """What is allowed, for people: "a number above 0 and at most 1, or left out"."""
    bare = _bare(kind)
    parts = [bare] if get_origin(bare) in (Literal, tuple, list, dict) else list(get_args(bare) or (bare,))
    named = [f"one of {', '.join(choices)}"] if choices else [_name(p) for p in parts if p is not type(None)]
    found = [
        f"{word} {_number(getattr(b, attribute))}"
        for b in bounds
        for kind_, word, attribute in _BOUNDS
        if isinstance(b, kind_)
    ]
    text = " or ".join(named) + (" " + " and ".join(found) if found else "")
    return text + (", or left out" if type(None) in parts else "")


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _name(part: Any) -> str:
    if get_origin(part) in (tuple, list):
        return "a list"
    return _KINDS.get(part, getattr(part, "__name__", str(part)))
