"""Times of layers in other forms than the dense one: ranks and kernel shapes, measured once a method asks for them.

A network whose layers have other forms is a network like any other: its ranks are widths.  So it is measured as such, and what
its layers take goes into the profile beside the times of the dense ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from espalier.copies import copy_model
from espalier.graph import Graph, trace
from espalier.graph.graph import FORM
from espalier.plan import Plan
from espalier.timing import on_device
from espalier.timing.family import Family
from espalier.timing.making import Progress, asked, attributed, batched, need_here, profiled_layers, sample
from espalier.timing.profile import Formed, Profile

NETWORKS = 8  # measured of every choice of forms
SECONDS = 0.2  # of measuring a network, at least

Put = Callable[[nn.Module, Mapping[str, int]], None]
"""Gives layers of a network of any widths the options of a plan, group of alternatives -> option; weights mean nothing."""


def measured(
    profile: Profile, model: nn.Module, example: Any, graph: Graph, put: Put, *, progress: Progress | None = None
) -> Profile:
    """``profile`` with the times of all forms that ``graph`` offers: those that are lacking are measured now.

    Of every layer that has several, each network has one; ``put`` builds them.  ``model`` is the dense network that was
    profiled: it is measured along, because machines are not always as fast as they were.

    Raises: ValueError if that has to be done on another machine, or with another version of the runtime.
    """
    waiting = _lacking(profile, graph)
    if not waiting:
        return profile
    need_here(profile)
    rounds = max(map(len, waiting.values()))
    grain = profile.grain
    whole = trace(model, batched(example, 1), rehearse=False)
    own_batch = batched(example, profile.setting.batch)
    dense = Family(model, whole, own_batch, setting=profile.setting).file(Plan.dense(whole))
    for number in range(rounds):
        # layers take turns: neighbours have different forms, and all forms of a layer are there in the end
        chosen = {g: forms[(number + place) % len(forms)] for place, (g, forms) in enumerate(waiting.items())}
        formed = copy_model(model, {}).cpu().eval()
        put(formed, {g: option for g, (_, option) in chosen.items()})
        own = trace(formed, batched(example, 1))
        family = Family(formed, own, own_batch, setting=profile.setting)
        by_layer = {graph.group(g).layer: form for g, (form, _) in chosen.items()}
        rows = []
        for count, plan in enumerate(sample(own, NETWORKS, grain, seed=number)):
            file, how = family.file(plan), asked(profile.setting)
            times = on_device.measure(file, seconds=SECONDS, beside=dense, pace=profile.dense, **how)
            rows.append(attributed(times, family, own, plan, speed=profile.dense / times["beside"]))
            if progress is not None:
                progress(number * NETWORKS + count + 1, rounds * NETWORKS)
        layers = tuple(replace(x, form=_form_of(x.module, by_layer)) for x in profiled_layers(family, own))
        profile = replace(profile, forms=(*profile.forms, Formed(layers, tuple(rows))))
    return profile


def _form_of(module: str, forms: Mapping[str, str]) -> str:
    """Of a layer, or of a stage of it, ``LAYER.0``."""
    return forms.get(module) or forms.get(module.rpartition(".")[0], "")


def _lacking(profile: Profile, graph: Graph) -> dict[str, list[tuple[str, int]]]:
    """Group of alternatives -> forms without times, each with the widest option that has it."""
    lacking = set(profile.lacking(graph))
    found: dict[str, dict[str, int]] = {}
    for site in graph.sites:
        if (site.module, site.form) not in lacking:
            continue
        for extent in site.term.extents:
            for number, lengths in graph.extents[extent].table:
                if graph.groups[number].kind == FORM:
                    forms = found.setdefault(graph.groups[number].name, {})
                    forms[site.form] = max(k for k, length in enumerate(lengths) if length)
    return {group: list(forms.items()) for group, forms in found.items()}
