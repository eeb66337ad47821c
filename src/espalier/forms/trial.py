"""Does the forward take its layers factorised?  Tried before the first training step, not after the last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from espalier.carving import put_in_place
from espalier.forms.places import Place
from espalier.forms.sequences import blank
from espalier.forms.table import form_named
from espalier.graph.tracing import call_arguments, mode, private_copy
from espalier.graph.watch import first_line


def refused(model: nn.Module, example: Any, places: Mapping[str, Place], forms: Mapping[str, str]) -> dict[str, str]:
    """Layer -> why the forward of ``model`` fails once the layer has its form, at rank one; empty where all is well.

    On meta copies, or on the CPU where the model cannot run there.  Layers are tried together, and halves of them where that
    fails.
    """
    if not places or _fails(model, example, places, forms, "meta") is None:
        return {}
    device = next((d for d in ("meta", "cpu") if _fails(model, example, {}, {}, d) is None), None)
    if device is None:
        return {}
    found: dict[str, str] = {}
    waiting = [list(places)]
    while waiting:
        names = waiting.pop()
        error = _fails(model, example, {n: places[n] for n in names}, forms, device)
        if error is None:
            continue
        if len(names) == 1:
            found[names[0]] = f"the forward does not take it factorised ({error})"
        else:
            waiting += [names[len(names) // 2 :], names[: len(names) // 2]]
    return found


def _fails(
    model: nn.Module, example: Any, places: Mapping[str, Place], forms: Mapping[str, str], device: str
) -> str | None:
    """The error of one forward in which ``places`` have their forms."""
    private = private_copy(model, device)
    args, kwargs = call_arguments(example, device)
    for name, place in places.items():
        layer: Any = private.get_submodule(name)
        form = form_named(forms[name])
        put_in_place(private, layer, blank(place, form.sequence(place, [1] * form.ranks), layer))
    try:
        with torch.no_grad(), mode(private, training=False):
            private(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"
    return None
