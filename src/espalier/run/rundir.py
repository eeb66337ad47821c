"""The folder of a run: what it holds, when it may be written, and its files in plain formats.

============================  ======================================================================
``config.toml``               what reproduces the run
``checkpoint.pt``             the last whole epoch, or the step at which SIGTERM came, to resume from
``log.csv``                   one row per epoch
``search.journal``            trials of a method that searches, stored by Optuna as they are finished
``widths.csv``                kept units of every group after every epoch, while a method is at work
``model.safetensors``         the small network: weights and structure
``model.onnx``                the same for ONNX Runtime, if the extra is installed
``preprocessing.json``        what turns a picture into an input, where the data says it
``plan.json``                 which units stayed
``graph.json``                the channel structure of the dense network, in whose units the plan counts
``profile.json``              what layers take in the runtime, where the budget is about time
``history.json``              what the method recorded on its way (ranks, kernels), to plot
``metrics.json``              dense and small side by side; of a run that only trains, when and where
``summary.md``                the same to read
``run.lock``, ``run.owner``   who is at work in the folder, while somebody is
``report.html``               the same with figures, written by ``espalier report``
============================  ======================================================================
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from espalier.methods.search import JOURNAL
from espalier.seals import opened_json, seal, sealed_json
from espalier.surgery.writing import cannot_write, write_beside

CONFIG, CHECKPOINT, LOG, METRICS, SUMMARY = ("config.toml", "checkpoint.pt", "log.csv", "metrics.json", "summary.md")
MODEL, ONNX, PLAN, HISTORY = "model.safetensors", "model.onnx", "plan.json", "history.json"
GRAPH = "graph.json"
WIDTHS, REPORT, PREPROCESSING = "widths.csv", "report.html", "preprocessing.json"
PROFILE = "profile.json"
FILES = (
    CONFIG, CHECKPOINT, LOG, WIDTHS, MODEL, ONNX, PLAN, GRAPH, HISTORY, JOURNAL, METRICS, SUMMARY,
    REPORT, PREPROCESSING, PROFILE,
)  # fmt: skip


def check_folder(folder: Path, *, resume: bool, force: bool) -> dict[str, Any] | None:
    """The configuration of the run to resume, or ``None`` if a new one may begin.  Changes nothing.

    Raises: ValueError if a run is in the way, or none is there to resume.
    """
    if resume and force:
        raise ValueError("resume goes on with the run, force begins a new one; choose one")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; give a folder for the run")
    present = _present(folder)
    if resume:
        if CONFIG not in present:
            raise ValueError(f"{folder}: holds no run to resume (no {CONFIG})")
        return read_config(folder / CONFIG)
    if present and not force:
        raise ValueError(
            f"{folder}: already holds a run ({', '.join(present)}); go on with it (--resume, resume=True), begin anew "
            "and keep the old files in a folder inside (--force, force=True), or choose another folder"
        )
    return None


def check_is_run(folder: Path) -> None:
    """Raises: ValueError if ``folder`` is absent or no run has begun in it."""
    if not (folder / CONFIG).is_file():
        what = f"holds no run (no {CONFIG})" if folder.exists() else "there is no such run folder"
        raise ValueError(f"{folder}: {what}; give a folder that espalier compress or es.compress(out=...) wrote")


def written_at(folder: Path) -> tuple[int, int] | None:
    """What tells the run in ``folder`` from an older one there; ``None`` if none has begun."""
    with contextlib.suppress(OSError):
        file = (folder / CONFIG).stat()
        return file.st_ino, file.st_mtime_ns
    return None


def unfinished(folder: Path) -> ValueError:
    """What to say where the results of a run are wanted and not there yet."""
    return ValueError(f"{folder}: this run has not finished; go on with: espalier compress --out {folder} --resume")


def begin_folder(folder: Path, config: Mapping[str, Any]) -> None:
    """Make the folder of a run with this configuration.  The files of an older run go to ``old-1`` inside it, or the next free
    number; no other is touched.

    Raises: ValueError for what TOML cannot hold, before anything is moved.
    """
    text = to_toml(config)
    folder.mkdir(parents=True, exist_ok=True)
    present, moved = _present(folder), []
    aside = next(p for n in range(1, 10**6) if not (p := folder / f"old-{n}").exists())
    try:
        if present:
            aside.mkdir()
        for name in present:
            (folder / name).rename(aside / name)
            moved.append(name)
        write_file(folder / CONFIG, text.encode())
    except OSError as error:  # the older run stays where it was
        with contextlib.suppress(OSError):
            for name in moved:
                (aside / name).rename(folder / name)
            aside.rmdir()
        raise error if error.filename is None else cannot_write(folder, error) from error


def _present(folder: Path) -> list[str]:
    return [name for name in FILES if (folder / name).exists()]


def read_config(path: Path) -> dict[str, Any]:
    """The tables of a ``config.toml``.  Raises: ValueError if it is absent or not TOML, or holds something else or nothing."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: there is no such file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not TOML ({error})") from error
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ValueError(f"{path}: {name} = {table!r}: must be a table, [{name}]")
    if not any(tables.values()):
        raise ValueError(f"{path}: holds no configuration; take that of another run, or begin this one anew")
    return tables


def write_sealed(path: Path, content: Any) -> None:
    """The same with a checksum, for what is read again: ``read_sealed``."""
    write_file(path, (sealed_json(_finite(content)) + "\n").encode())


def read_sealed(path: Path) -> dict[str, Any]:
    """Raises: ValueError if the file is damaged, or was changed after it was written."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: damaged ({error})") from error
    return opened_json(text, where=str(path))


def write_log(path: Path, epochs: Sequence[Any], columns: type, *, metric: str = "accuracy") -> None:
    """One row per epoch, columns as in the dataclass; empty where there is nothing to say.

    Another ``metric`` than accuracy takes the place of it under its own name.
    """
    spared = ("metric",) if metric == "accuracy" else ("accuracy", "train_accuracy")
    names = {f.name: metric if f.name == "metric" else f.name for f in fields(columns) if f.name not in spared}
    text = io.StringIO()
    rows = csv.DictWriter(text, list(names.values()), lineterminator="\n")
    rows.writeheader()
    for epoch in epochs:
        said = {names[k]: v for k, v in asdict(epoch).items() if k in names}
        rows.writerow({k: "" if v is None else f"{v:.6g}" if isinstance(v, float) else v for k, v in said.items()})
    write_file(path, text.getvalue().encode())


def add_widths(path: Path, epoch: int, widths: Mapping[str, int]) -> None:
    """Add the row of ``epoch``, which replaces those from it on that a killed run may have left.

    Empty where a group is not there: a method may give layers other forms, and so new groups, on the way.
    """
    rows: list[dict[str, Any]] = [row for row in read_rows(path, keys=("epoch",)) if float(row["epoch"]) < epoch]
    rows.append({"epoch": epoch, **widths})
    text = io.StringIO()
    table = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_file(path, text.getvalue().encode())


def read_rows(path: Path, *, keys: Sequence[str] = ()) -> list[dict[str, str]]:
    """Rows of numbers by column, each with ``keys``; none where there is no file.  Raises: ValueError if it is damaged."""
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, strict=True))
        for row in rows:
            if None in row or None in row.values():
                raise ValueError("a row of another length")
            for value in (*row.values(), *(row[key] or "none" for key in keys)):
                float(value or 0)
    except (csv.Error, UnicodeDecodeError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: damaged ({error}); move it away, and go on without") from error
    return rows


def write_file(path: Path, content: bytes) -> None:
    """Write beside and rename, so that a full disk leaves the old file whole."""

    def write(temporary: str) -> None:
        Path(temporary).write_bytes(content)

    write_beside(path, write)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -- TOML, which the standard library reads but does not write


def to_toml(tables: Mapping[str, Any]) -> str:
    """Plain values first, then one table for each mapping.  ``None`` is left out.

    Raises: ValueError for a value that TOML does not have.
    """
    plain = {k: v for k, v in tables.items() if not isinstance(v, Mapping)}
    lines = [_line(k, v) for k, v in plain.items() if v is not None]
    for name, table in tables.items():
        if isinstance(table, Mapping):
            lines += ["", f"[{_key(name)}]", *[_line(k, v) for k, v in table.items() if v is not None]]
    return "\n".join(lines).lstrip("\n") + "\n"


def _line(key: str, value: Any) -> str:
    return f"{_key(key)} = {_value(value, key)}"


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)


def _value(value: Any, key: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Real):  # also numpy's, which shows its type
        return repr(int(value) if isinstance(value, Integral) else float(value))
    if isinstance(value, (str, Path)):
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_value(v, key) for v in value)}]"
    raise ValueError(f"config: {key} is a {type(value).__name__}, which TOML has no notation for")


def metadata_of(folder: Path) -> dict[str, str]:
    """What ``folder`` says of its network's input, and the checksum of its plan: text by name, lists as JSON.

    For the metadata of ONNX files; empty for a folder that holds no run.  Raises: ValueError if one of them is damaged.
    """
    found = {}
    if (folder / PREPROCESSING).exists():
        said = read_sealed(folder / PREPROCESSING)
        found = {name: value for name, value in said.items() if name != "format" and value not in ([], "")}
    if (folder / PLAN).exists():
        found["plan_hash"] = seal(read_sealed(folder / PLAN))
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in found.items()}
