"""The forms that are known.  A new one is a file beside this one and a row here (``docs/add_a_form.md``)."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from espalier.forms.form import Form
from espalier.forms.matrix import Channel, MatrixForm, Spatial
from espalier.forms.tucker import TT, Tucker

FORMS: dict[str, Form] = {form.name: form for form in (Channel(), Spatial(), Tucker(), TT())}
"""Name -> form, in the order in which they are offered."""

ALWAYS = Channel()  # possible everywhere


def form_named(name: str) -> Form:
    """The form of that name; a ``ValueError`` lists what exists."""
    if name not in FORMS:
        raise ValueError(f"form {name!r} does not exist; choose one of {', '.join(FORMS)}")
    return FORMS[name]


def matrix_form(name: str) -> MatrixForm:
    """The same, of forms that are a product of two matrices."""
    form = form_named(name)
    if not isinstance(form, MatrixForm):
        known = ", ".join(n for n, f in FORMS.items() if isinstance(f, MatrixForm))
        raise ValueError(f"form {name!r} is no product of two matrices; choose one of {known}")
    return form


def possible(shape: Sequence[int], forms: Collection[str] | None = None) -> tuple[str, ...]:
    """Those of ``forms`` (all without) that make sense for a weight ``(O, I, kh, kw)``; "channel" where none does."""
    asked = tuple(FORMS) if forms is None else forms
    return tuple(n for n in asked if form_named(n).possible(shape)) or (ALWAYS.name,)
