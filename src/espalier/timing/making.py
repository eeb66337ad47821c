"""Make a profile: measure a few dozen sub-networks of a network in a runtime, node by node."""

from __future__ import annotations

import importlib.util
import inspect
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from espalier.costs import CostModel
from espalier.graph import Graph, trace
from espalier.graph.tracing import call_arguments
from espalier.plan import Plan
from espalier.solver import timed_counts
from espalier.surgery.writing import check_place, write_beside
from espalier.timing import on_device
from espalier.timing.bits import check_precision
from espalier.timing.family import Family
from espalier.timing.marks import layer_of
from espalier.timing.profile import NOISY, Measured, Profile, ProfiledLayer, ProfileSetting, load_profile, save_profile

NETWORKS = 24  # measured for a profile
GRAINS = (4, 8, 16)  # multiples of channels that a runtime may like; at others, ONNX Runtime falls back to slower code
INT8_GRAINS = (*GRAINS, 64)  # four times as many eight bits are as wide as a float
LEVEL = 0.05
SECONDS = 0.3  # of measuring a network, at least

Progress = Callable[[int, int], None]  # networks measured, networks in all


def profile(
    model: nn.Module,
    example: Any,
    *,
    runtime: str = "onnxruntime",
    threads: int = 1,
    batch: int = 1,
    precision: str = "f32",
    networks: int | None = None,
    to: str | Path | None = None,
    progress: Progress | None = None,
) -> Profile:
    """Measure ``networks`` sub-networks of ``model`` in ``runtime``, with ``threads`` and ``batch`` inputs in one pass; returns
    what its layers take.

    Weights do not matter, structure does: widths of all groups of channels are spread evenly, from few to all.  ``example`` is
    what ``trace`` takes, tensors with the batch first, or lists of images where ``batch`` is 1.  With a file ``to``, every
    network is stored as soon as it is measured, and a profile that was interrupted goes on.  ``progress`` is called with
    networks measured and in all.

    ``precision="int8"`` profiles the network as ``export_int8`` writes it for that runtime: a budget of half of the time
    is then half of what the dense network takes in eight bits.

    Raises: ValueError for a runtime that is unknown or not installed, a precision that is not profiled there, or a file that
    cannot be written.
    """
    version = on_device.version(need_runtime(runtime))
    check_precision(runtime, precision)
    if to is not None:
        check_place(Path(to))
    setting = ProfileSetting(runtime, version, on_device.processor(), threads, batch, precision)
    graph, family = _family(model, example, setting)
    found = _begun(to, setting, family, graph)
    if not found.grain:
        found = replace(found, grain=find_grain(family, graph, setting))
    plans = sample(graph, networks or NETWORKS, found.grain)
    dense = family.file(plans[0])
    seen: dict[int, dict[str, Any]] = {}

    def look(number: int, pace: float) -> None:
        beside = dense if number else None
        file, how = family.file(plans[number]), asked(setting)
        seen[number] = on_device.measure(file, seconds=SECONDS, beside=beside, pace=pace, **how)

    def with_seen() -> Profile:
        whole = seen[0]["whole"] if 0 in seen else found.dense
        rows = dict(enumerate(found.networks))
        for number, times in seen.items():
            rows[number] = attributed(times, family, graph, plans[number], speed=whole / _of_dense(times))
        return replace(found, networks=tuple(rows.values()))

    for number in range(len(plans)):
        if number >= len(found.networks):
            look(number, found.dense if number else 0.0)
            found = with_seen()
            if to is not None:
                save_profile(found, to)
        if progress is not None:
            progress(number + 1, len(plans))
    pace = min(map(_of_dense, seen.values()), default=0.0)
    for number in [n for n, times in seen.items() if _of_dense(times) > (1 + on_device.PACE) * pace]:
        look(number, pace)  # the machine was busy then, as is known now
    found = with_seen()
    if to is not None:
        save_profile(found, to)
    if found.spread > NOISY:
        warnings.warn(f"profile: {found.describe()}; measure again when it is quiet", stacklevel=2)
    return found


def check_profile(profile: Profile, model: nn.Module, example: Any, *, networks: int = 6) -> list[tuple[float, float]]:
    """Predicted and measured milliseconds of networks that are not in the profile, in turns with the dense one."""
    graph, family = _family(model, example, profile.setting)
    plans = sample(graph, networks + 1, profile.grain, seed=1)
    dense = family.file(plans[0])
    found = []
    for plan in plans[1:]:
        files = [dense, family.file(plan)]
        whole, small = on_device.race(files, seconds=2 * SECONDS, pace=profile.dense, **asked(profile.setting))
        found.append((profile.predict(graph, plan.counts(graph)), small * profile.dense / whole))
    return found


def export_networks(
    model: nn.Module,
    example: Any,
    folder: str | Path,
    *,
    runtime: str = "onnxruntime",
    threads: int = 1,
    batch: int = 1,
    precision: str = "f32",
    networks: int = NETWORKS,
    grain: int = GRAINS[-1],
) -> Path:
    """Write the networks of a profile and a script that measures them, for another machine; ``collect`` reads what comes back.

    What the machine computes fastest is not known here, so ``grain`` says at which multiples widths are measured.
    """
    need_known(runtime)
    check_precision(runtime, precision)
    graph, family = _family(model, example, ProfileSetting(runtime, "", "", threads, batch, precision))
    place = Path(folder)
    check_place(place / on_device.SETTINGS)
    for number, plan in enumerate(sample(graph, networks, grain)):
        _write(place / f"{number:03d}{on_device.ENDINGS[runtime]}", family.file(plan))
    asked_for = {"runtime": runtime, "threads": threads, "batch": batch, "precision": precision, "seconds": SECONDS}
    settings = {**asked_for, "networks": networks, "grain": grain}
    _write(place / "measure.py", inspect.getsource(on_device).encode())
    _write(place / on_device.SETTINGS, json.dumps(settings, indent=1).encode())
    return place


def _write(path: Path, content: bytes) -> None:
    write_beside(path, lambda temporary: Path(temporary).write_bytes(content))


def collect(model: nn.Module, example: Any, folder: str | Path) -> Profile:
    """The profile of networks that were exported and measured on another machine.

    Raises: ValueError if something is missing or was measured elsewhere than the rest.
    """
    place = Path(folder)
    try:
        settings = json.loads((place / on_device.SETTINGS).read_text(encoding="utf-8"))
        files = [place / f"{number:03d}.json" for number in range(settings["networks"])]
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise ValueError(
                f"{place}: {len(missing)} networks are not measured yet ({missing[0]}); run: python measure.py ."
            )
        times = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        where = {(t["version"], t["processor"]) for t in times}
        if len(where) > 1:
            raise ValueError(f"{place}: measured on several machines or versions: {sorted(where)}")
        own = {key: settings[key] for key in ("runtime", "threads", "batch", "precision")}
        setting = ProfileSetting(version=times[0]["version"], processor=times[0]["processor"], **own)
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{place}: not a folder of exported and measured networks ({error})") from error
    graph, family = _family(model, example, setting)
    plans = sample(graph, settings["networks"], settings["grain"])
    found = replace(_begun(None, setting, family, graph), grain=settings["grain"])
    speeds = [times[0]["whole"] / t.get("beside", times[0]["whole"]) for t in times]
    rows = tuple(attributed(t, family, graph, plan, speed=s) for t, plan, s in zip(times, plans, speeds, strict=True))
    return replace(found, networks=rows)


def need_known(runtime: str) -> None:
    """Raises: ValueError for a runtime that is not known."""
    if runtime not in on_device.RUNTIMES:
        raise ValueError(f"runtime {runtime!r}: choose one of {', '.join(on_device.RUNTIMES)}")


def need_runtime(runtime: str) -> str:
    """Raises: ValueError for a runtime that is not known, or not installed."""
    need_known(runtime)
    needed = {runtime} if runtime == "torch" else {runtime, "onnx"}
    if any(importlib.util.find_spec(name) is None for name in needed):
        extra = "onnx" if runtime == "onnxruntime" else "onnx,openvino"
        raise ValueError(f"{runtime} is not installed here: pip install 'espalier[{extra}]'")
    return runtime


def sample(graph: Graph, networks: int, grain: int, *, seed: int = 0) -> list[Plan]:
    """The dense network, and others in which the widths of every group are spread evenly from few units to all."""
    random = np.random.default_rng(seed)
    strata = np.stack([random.permutation(networks - 1) for _ in graph.groups], axis=1) if graph.groups else None
    plans = [Plan.dense(graph)]
    for number in range(networks - 1):
        keep = {}
        for column, group in enumerate(graph.groups):
            assert strata is not None
            share = (strata[number, column] + random.random()) / (networks - 1)
            keep[group.name] = np.arange(_nearest(timed_counts(group, grain), share * group.size))
        plans.append(Plan(keep, {g.name: g.size for g in graph.groups}))
    return plans


def _nearest(counts: np.ndarray, wanted: float) -> int:
    return int(counts[np.abs(counts - wanted).argmin()])


def find_grain(family: Family, graph: Graph, setting: ProfileSetting) -> int:
    """The multiple of channels that this runtime computes fastest here: least time per multiply-accumulate of whole networks.

    Of those that are within ``LEVEL`` of the best, the smallest: it leaves more to choose from.
    """
    model = CostModel(graph)
    sizes = sorted(g.size for g in graph.groups) or [0]
    wide = sizes[len(sizes) // 2] >= 2 * INT8_GRAINS[-1]  # others could hardly be cut in steps of so many
    grains = INT8_GRAINS if setting.precision == "int8" and wide else GRAINS
    ratios: dict[int, list[float]] = {grain: [] for grain in grains}
    for share in (0.4, 0.6):
        random = np.random.default_rng(0)
        wanted = [float(share * random.uniform(0.7, 1.3) * g.size) for g in graph.groups]
        counts = [[_nearest(timed_counts(g, n), w) for g, w in zip(graph.groups, wanted, strict=True)] for n in grains]
        plans = [Plan({g.name: np.arange(c) for g, c in zip(graph.groups, own, strict=True)}) for own in counts]
        times = on_device.race([family.file(plan) for plan in plans], seconds=2 * SECONDS, **asked(setting))
        for grain, own, took in zip(grains, counts, times, strict=True):
            ratios[grain].append(took / max(model.cost(np.array(own)).macs, 1))
    found = {grain: float(np.mean(np.log(r))) for grain, r in ratios.items()}
    return min(grain for grain, level in found.items() if level <= min(found.values()) + LEVEL)


def _of_dense(times: Mapping[str, Any]) -> float:
    """Milliseconds of the dense network in a measurement of it, or beside it."""
    return float(times.get("beside", times["whole"]))


def attributed(times: Mapping[str, Any], family: Family, graph: Graph, plan: Plan, *, speed: float = 1.0) -> Measured:
    """Every node's time to its layer; what the runtime has added goes to the layer before, or after where it is an input's.

    All times ``speed`` times as long: machines are not always as fast as they were.
    """
    owners = [layer_of(name) for name, _, _ in times["nodes"]]
    ms, nodes, rest = [0.0] * len(family.layers), [0] * len(family.layers), 0.0
    for number, (_, kind, took) in enumerate(times["nodes"]):
        owner = owners[number]
        if owner is None:
            near = owners[number + 1 :] if kind == "ReorderInput" else owners[number::-1]
            owner = next((o for o in near if o is not None), -1)
        if owner < 0:
            rest += took
        else:
            ms[owner] += took
            nodes[owner] += 1
    counts = plan.counts(graph)
    lengths = tuple(
        tuple(graph.extents[e].length(counts) for e in graph.sites[layer.site].term.extents) for layer in family.layers
    )
    right = tuple(round(speed * t, 6) for t in ms)
    return Measured(lengths, right, tuple(nodes), round(speed * rest, 6), speed * times["whole"], times["spread"])


def batched(example: Any, batch: int) -> Any:
    """The arguments, or keywords, that ``example`` stands for, on the CPU, with another batch size.

    Raises: ValueError for what is not tensors, and for lists and tables of tensors where the batch is not one.
    """
    odd = sorted({type(leaf).__name__ for leaf in tree_leaves(example) if not isinstance(leaf, Tensor)})
    if odd or not tree_leaves(example):
        raise ValueError(
            f"profile: takes tensors, also in lists and tables; the example has {', '.join(odd) or 'none'}"
        )

    def resized(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.repeat(-(-batch // len(value)), *[1] * (value.dim() - 1))[:batch]
        if batch != 1:
            raise ValueError(
                f"profile(batch={batch}): the example has a {type(value).__name__} of tensors, in which it is not known what a "
                "batch is; give batch=1"
            )
        return value

    args, kwargs = call_arguments(example, "cpu")
    return {name: resized(v) for name, v in kwargs.items()} if kwargs else tuple(map(resized, args))


def _family(model: nn.Module, example: Any, setting: ProfileSetting) -> tuple[Graph, Family]:
    graph = trace(model, example)
    return graph, Family(model, graph, batched(example, setting.batch), setting=setting)


def asked(setting: ProfileSetting) -> dict[str, Any]:
    """What ``on_device.measure`` and ``race`` take."""
    return {key: value for key, value in asdict(setting).items() if key not in ("version", "processor")}


def profiled_layers(family: Family, graph: Graph) -> tuple[ProfiledLayer, ...]:
    """The layers of the network, in the order of the file."""
    return tuple(
        ProfiledLayer(
            graph.sites[x.site].module,
            x.signature,
            tuple(graph.extents[e].length(graph.sizes) for e in graph.sites[x.site].term.extents),
        )
        for x in family.layers
    )


def is_here(setting: ProfileSetting) -> bool:
    """Is this the machine that a profile was made on, and the runtime installed, so that networks can be measured?"""
    there = importlib.util.find_spec(setting.runtime) is not None
    return there and on_device.processor() == setting.processor


def need_here(profile: Profile) -> None:
    """Raises: ValueError where networks cannot be measured as those of ``profile`` were."""
    need_runtime(profile.setting.runtime)
    profile.need({"processor": on_device.processor(), "version": on_device.version(profile.setting.runtime)})


def _begun(to: str | Path | None, setting: ProfileSetting, family: Family, graph: Graph) -> Profile:
    """What an interrupted profile has stored, if it is one of the same; else none of it."""
    layers = profiled_layers(family, graph)
    fresh = Profile(setting, datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), 0, layers, ())
    if to is None or not Path(to).exists():
        return fresh
    stored = load_profile(to)
    if stored.layers != layers or stored.setting != setting:
        raise ValueError(f"{to}: holds a profile of another network or setting; remove it, or choose another file")
    return stored
