"""From a configuration - a run's ``config.toml``, the command line's options, or both - to objects."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from espalier.methods.base import NO_BUDGET, Method
from espalier.methods.dprp import DPRP
from espalier.methods.joint import Joint
from espalier.methods.magnitude import Magnitude
from espalier.methods.mgp import MGP
from espalier.methods.svd_oneshot import SVDOneShot
from espalier.methods.tcp import TCP
from espalier.methods.tt_lc import TTLC
from espalier.plan import Budget, amount_of
from espalier.run.batches import Source
from espalier.run.data import Loaders, load_data
from espalier.run.images import Images
from espalier.run.models import build_model, own_defaults, own_made, runs_code
from espalier.run.recipe import Recipe
from espalier.run.rundir import CONFIG, check_is_run, read_config
from espalier.settings import settings_of
from espalier.tasks import Classification, Detection, Regression, Segmentation, SuperResolution, Task, example_of

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (TCP, DPRP, TTLC, MGP, Joint, Magnitude, SVDOneShot)
}
"""What ``--method`` knows, besides ``none``: one row per method."""

TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "segmentation": Segmentation,
    "regression": Regression,
    "super-resolution": SuperResolution,
    "detection": Detection,
}
"""What ``--task`` knows, besides those of the user's own."""

SECTIONS = ("model", "data", "budget", "method", "recipe", "task")
RECORDED = ("start", "versions")  # what a run has found, beside what it was asked
Config = dict[str, dict[str, Any]]
"""Section -> name -> value, as in the file; a name that is absent has its default."""

_TEXT = ("text, in quotes", lambda value: isinstance(value, str))
_WHOLE = ("a whole number", lambda value: type(value) is int)  # true is none


def _up_to(most: int) -> tuple[str, Callable[[Any], bool]]:
    """Of what is allocated: a file that came from elsewhere must not fill the memory."""
    return f"a whole number from 1 to {most:,}", lambda value: type(value) is int and 1 <= value <= most


_CLASSES, _CHANNELS, _SIDE = _up_to(1_000_000), _up_to(10_000), _up_to(10_000)
_NAMES = (
    "names in quotes",
    lambda value: all(isinstance(n, str) for n in (value if isinstance(value, list) else [value])),
)
_KINDS: dict[str, dict[str, tuple[str, Callable[[Any], bool]]]] = {
    "model": {"name": _TEXT, "weights": _TEXT, "num_classes": _CLASSES, "in_channels": _CHANNELS, "image_size": _SIDE},
    "data": {"name": _TEXT, "dir": _TEXT, "image_size": _SIDE, "holdout": _WHOLE},
    "budget": {"protect": _NAMES},
    "method": {"name": _TEXT},
}
"""What a value of the file must be, where the object that it becomes does not check it."""


def given(**options: Any) -> dict[str, Any]:
    """The options that were given, as plain values; paths are made absolute, to be found from anywhere."""
    plain = {n: str(v.expanduser().resolve()) if isinstance(v, Path) else v for n, v in options.items()}
    return {n: v for n, v in plain.items() if v is not None and v != []}


def amounts(**limits: str | None) -> dict[str, float]:
    """What ``--macs`` and the like say, as numbers.  Raises: ValueError with the option's name."""
    return {n: amount_of(t, f"--{n.replace('_', '-')} {t}") for n, t in limits.items() if t is not None}


def hyper_parameters(pairs: Sequence[str]) -> dict[str, Any]:
    """``["energy=0.02", "form=channel"]`` as names and values; True and False in any case, else what is not a TOML
    value is a string.

    Raises: ValueError for what is not NAME=VALUE, and for the method's name.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name or not text:
            raise ValueError(f"--set {pair}: give NAME=VALUE, for example energy=0.02")
        if name == "name":
            raise ValueError(f"--set {pair}: is no hyper-parameter; choose the method with --method")
        try:
            found[name] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            found[name] = {"true": True, "false": False}.get(text.lower(), text)
    return found


def task_section(text: str | None) -> dict[str, Any]:
    """``segmentation:classes=21`` or ``file.py:make_task`` as a section.  Raises: ValueError for an unknown task."""
    if text is None:
        return {}
    name, *pairs = text.split(":")
    if name in TASKS:
        return {"name": name, **hyper_parameters(pairs)}
    if runs_code(text):
        return {"name": text}
    raise ValueError(f"--task {text}: choose one of {', '.join(TASKS)}, or your own: file.py:make_task")


def read_sections(file: Path) -> Config:
    """What a ``config.toml`` says, all sections there.  Raises: ValueError for a value that is not what it must be."""
    tables: Config = {**{name: {} for name in SECTIONS}, **read_config(file)}
    for section, kinds in _KINDS.items():
        for name, (kind, fits) in kinds.items():
            if name in tables[section] and not fits(tables[section][name]):
                raise ValueError(f"{file}: [{section}] {name} = {tables[section][name]!r}: must be {kind}")
    return tables


def merged_settings(
    options: Config,
    *,
    config: Path | None,
    out: Path | None,
    resume: bool,
    trust: bool,
    needs: Sequence[str] = (),
    has_config: bool = False,
) -> Config:
    """``options`` over ``config``, a file or a run's folder, or over the configuration of the run to resume.

    Raises: ValueError if the file, which anybody may have written, names code to run, unless ``trust``; or if a section that
    the command ``needs`` has no name, in words for a command that ``has_config``, the option of that name, or not.
    """
    file = config if config is not None else out if resume else None
    if config is None and file is not None:
        check_is_run(file)
    if file is not None and (config is None or file.is_dir()):
        file = file / CONFIG
    below = read_sections(file) if file is not None else {}
    if config is not None and file is not None:
        _check_spelling(below, file)
    if file is not None and not trust:
        check_runs_no_code({n: t for n, t in below.items() if "name" not in options.get(n, {})}, file)
    merged = merge({name: dict(below.get(name, {})) for name in SECTIONS}, options)
    if resume and merged["method"].get("name") != below.get("method", {}).get("name"):
        raise ValueError(f"{file}: cannot resume with another method; leave --method out")
    for section in needs:
        if "name" not in merged[section]:
            if file is not None:
                raise ValueError(f"{file}: [{section}] has no name; say it with --{section}")
            raise ValueError(f"--{section} is missing: give it{', or a --config that holds it' if has_config else ''}")
    return merged


def _check_spelling(tables: Config, file: Path) -> None:
    """Raises: ValueError for a table, or a name in one, that would be passed over in silence."""
    for section in tables:
        if section not in (*SECTIONS, *RECORDED):
            raise ValueError(f"{file}: [{section}]: there is no such table; there are {', '.join(SECTIONS)}")
    known = {"model": list(_KINDS["model"]), "data": [*_KINDS["data"], *(s.name for s in settings_of(Images))]}
    for section, names in known.items():
        _check_names(f"{file}: [{section}]", tables[section], list(dict.fromkeys(names)))


def check_runs_no_code(config: Config, file: Path) -> None:
    """Raises: ValueError if the configuration names a network, data or a task that would be imported."""
    for section, what in (("model", "network"), ("data", "data"), ("task", "task")):
        name = config.get(section, {}).get("name", "")
        if runs_code(name) and not name.startswith("imagefolder:"):
            raise ValueError(
                f"{file}: its {what} {name} is code that would be imported and run; if you know who wrote it, say --trust, "
                f"or name the {what} yourself: --{section} {name}"
            )


def merge(below: Config, above: Config) -> Config:
    """``above`` wins, name by name; another method drops the hyper-parameters of the one below."""
    merged = {name: {**below.get(name, {}), **above.get(name, {})} for name in SECTIONS}
    if merged["method"].get("name") != below.get("method", {}).get("name"):
        merged["method"] = dict(above.get("method", {}))
    return merged


def required(config: Config, section: str, name: str) -> Any:
    """The value, or a ``ValueError``; a command that may lack one says so before, where the file is known."""
    if name not in config[section]:
        raise ValueError(f"the configuration has no {name} in its section [{section}]")
    return config[section][name]


# -- objects


def make_task(config: Config) -> Task:
    """The task by name with the settings beside it; a classifier's where none is named."""
    options = {n: v for n, v in config.get("task", {}).items() if n != "name"}
    name = config.get("task", {}).get("name", "classification")
    known = {**TASKS, **{kind.__name__: kind for kind in TASKS.values()}}  # as runs in Python write it down
    if name in known:
        _check_names(f"task {name}", options, [f.name for f in fields(known[name])])  # type: ignore[arg-type]
        return known[name](**options)
    found = own_made(name, {}) if runs_code(name) else None
    if not isinstance(found, Task):
        what = "no task is called that" if found is None else f"returned a {type(found).__name__}"
        raise ValueError(f"task {name}: {what}; name one of {', '.join(TASKS)}, or a function that returns an es.Task")
    return found


def make_data(config: Config, *, device: str | torch.device, download: bool = False) -> Source:
    """The data set by name, or the loaders of the user's own."""
    section = config["data"]
    name = required(config, "data", "name")
    if runs_code(name) and not name.startswith("imagefolder:"):
        found = own_made(name, {})
        if not isinstance(found, Loaders):
            raise ValueError(f"data {name}: returned a {type(found).__name__}; return es.Loaders(train, test)")
        return replace(found, device=device)
    return load_data(
        name,
        data_dir=section.get("dir"),
        download=download,
        holdout=section.get("holdout", 0),
        image_size=section.get("image_size"),
        images=make_images(section),
        device=device,
    )


def make_images(section: Mapping[str, Any]) -> Images | None:
    """How pictures in folders are read, if the section says something of it.  Raises: ValueError that names the setting."""
    said = {s.name: section[s.name] for s in settings_of(Images) if s.name in section and s.name != "image_size"}
    return Images(**said) if said else None


def make_model(config: Config) -> nn.Module:
    """The network by name, untrained; its classes, channels and size stand in the section as well."""
    return build_model(
        required(config, "model", "name"),
        num_classes=required(config, "model", "num_classes"),
        in_channels=required(config, "model", "in_channels"),
        image_size=required(config, "model", "image_size"),
    )


def job_example(data: Source, task: Task) -> Any:
    """One input of the network, as the task takes a batch apart."""
    if data.num_classes is not None and isinstance(task, Classification):
        return data.example(1)
    return example_of(task.split(next(iter(data.calibration_batches(batch_size=1, batches=1))))[0])


def fit_model_to(config: Config, data: Source) -> Config:
    """``config`` with the data's classes, channels and size in the model's section; those of loaders as a batch has them.

    Where neither data nor task say how many classes there are, a factory of the user's own keeps its default.
    """
    task = make_task(config)
    first = next(t for t in tree_leaves(job_example(data, task)) if isinstance(t, torch.Tensor))
    name = config["model"].get("name", "")
    own = own_defaults(name) if runs_code(name) else {}
    shape = {
        "num_classes": data.num_classes or getattr(task, "classes", own.get("num_classes", 1)),
        "in_channels": first.shape[-3] if first.dim() > 2 else first.shape[-1],
        "image_size": first.shape[-1],
    }
    return {**config, "model": {**config["model"], **shape}}


def make_budget(config: Config, method: Method) -> Budget | None:
    """``None`` for a method that finds the size by itself.

    Raises: ValueError for a limit that makes no sense, or none at all.
    """
    if "latency" not in config["budget"] and (about := [n for n in ("profile", "runtime") if n in config["budget"]]):
        raise ValueError(f"--{about[0]}: is about a budget of time; give --latency as well, for example --latency 0.5")
    _check_names("budget", config["budget"], [f.name for f in fields(Budget)])
    if not {"macs", "params", "activation_memory", "latency"} & config["budget"].keys():
        if not method.needs_budget:
            return replace(NO_BUDGET, **config["budget"]) if config["budget"] else None
        raise ValueError(
            "there is no budget: give --macs, --params, --activation-memory or --latency, for example --macs 0.5"
        )
    return Budget(**config["budget"])


def make_method(config: Config) -> Method | None:
    """The method of that name with the hyper-parameters beside it, by their present or former names; ``None`` for "none"."""
    options = Method.as_of_now({n: v for n, v in config["method"].items() if n != "name"})
    name = config["method"].get("name", TCP.name)
    if name == "none":
        return None
    if name not in METHODS:
        raise ValueError(f"--method {name}: choose one of {', '.join(METHODS)}, none")
    _check_names(f"method {name}", options, [f.name for f in fields(METHODS[name])])
    return METHODS[name](**options)


def make_recipe(config: Config) -> Recipe:
    """Raises: ValueError that names the field and what it allows."""
    return Recipe.from_dict(config["recipe"])


def _check_names(where: str, section: Mapping[str, Any], known: list[str]) -> None:
    for name in section:
        if name not in known:
            raise ValueError(f"{where}: there is no {name!r}; it has {', '.join(known) or 'nothing to set'}")
