"""``espalier sweep``: methods x budgets x seeds, each a run folder of its own, and one table and picture of all.

Points are taken from a ledger (``run.ledger``), so any number of processes may work on one sweep, be killed and started again.
What points share is done once: from given weights the accuracy of the dense network, which is everybody's teacher, and where
time is limited the profile.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from espalier.costs import COUNTS
from espalier.plan import amount_of, milliseconds_of
from espalier.present.config import (
    SECTIONS,
    Config,
    fit_model_to,
    hyper_parameters,
    job_example,
    make_budget,
    make_data,
    make_method,
    make_recipe,
    make_task,
)
from espalier.present.edge import stderr, stdout
from espalier.present.jobs import run_job, starting_network
from espalier.present.profiling import measured_profile
from espalier.run.charts import Dot, dot_chart
from espalier.run.ledger import SWEEP_JOURNAL, Entry, Ledger
from espalier.run.report import dense_score, metric_of, places
from espalier.run.rundir import CONFIG, METRICS, PROFILE, read_config, read_sealed, to_toml, write_file
from espalier.run.stopping import stop_within
from espalier.tasks import Metric, to_device

AXES = {"time": "measured time", "macs": "MACs", "params": "parameters"}


@dataclass(frozen=True)
class SweepPoint:
    """One run of a sweep; its name is that of its folder."""

    name: str
    method: str
    budget: str
    seed: int
    config: Config


def judged_by(points: Sequence[SweepPoint]) -> Metric:
    """What all points are judged by."""
    return make_task(points[0].config).metric


def columns(metric: Metric) -> tuple[str, ...]:
    """Of the table: costs and time as shares of the dense network."""
    scores = (metric.name, f"dense {metric.name}")
    return ("method", "budget", "seed", "state", *scores, *COUNTS, "time", "backend", "seconds", "error")


def points_of(
    config: Config, *, methods: Sequence[str], budgets: Mapping[str, Sequence[float | str]], seeds: int
) -> list[SweepPoint]:
    """Every method at every budget, ``seeds`` times.

    A method is ``NAME`` or ``NAME:KEY=VALUE:KEY=VALUE``.  Several limits are paired, one value with all.  A time is a fraction
    or a text such as "2ms"; the profile that all points share stands in the configuration as a file.

    Raises: ValueError for a method, budget or recipe that a run would refuse.
    """
    if seeds < 1:
        raise ValueError(f"--seeds {seeds}: must be 1 or more")
    lengths = {len(values) for values in budgets.values() if len(values) > 1}
    if len(lengths) > 1:
        raise ValueError("several limits are paired: give as many values of each, or one for all")
    rows = [{n: v[i] if len(v) > 1 else v[0] for n, v in budgets.items()} for i in range(max(lengths, default=1))]
    found = []
    first = config["recipe"].get("seed", 0)
    for text, row, number in product(methods, rows, range(seeds)):
        name, *pairs = text.split(":")
        own: Config = {n: dict(config.get(n, {})) for n in SECTIONS}
        own["method"] |= {"name": name, **hyper_parameters(pairs)}
        own["budget"] |= row
        own["recipe"]["seed"] = first + number
        method = make_method(own)
        if method is None:
            raise ValueError(
                "--method none: a sweep compares methods; the dense network is measured beside them anyway"
            )
        make_recipe(own)
        if "latency" in own["budget"]:  # whether it can be met, the profile says
            milliseconds_of(own["budget"]["latency"], 1.0)
        else:
            make_budget(own, method)
        budget = " ".join(f"{n} {_amount(v)}" for n, v in row.items())
        slug = "-".join(
            [_slug(text), *[f"{n.replace('_', '-')}{_amount(v)}" for n, v in row.items()], f"seed{first + number}"]
        )
        found.append(SweepPoint(slug, text, budget, first + number, own))
    if len({p.name for p in found}) < len(found):
        raise ValueError("sweep: two points are the same; list every method and every budget once")
    return found


def _amount(value: float | str) -> str:
    return value.replace(" ", "") if isinstance(value, str) else f"{value:g}"


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() or c in ".=_" else "-" for c in text)


def sweep(
    points: Sequence[SweepPoint], *, out: Path, storage: str | None, download: bool = False
) -> list[dict[str, Any]]:
    """Work on ``points`` until none is left for us, then write table and pictures; returns the rows of the table.

    Raises: ValueError if ``out`` holds a sweep whose points were other ones.
    """
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    if not alone or any(make_recipe(p.config).devices or make_recipe(p.config).nodes > 1 for p in points):
        raise ValueError(
            "sweep: a worker is one process; instead of torchrun or --devices start the command as often as there are GPUs"
        )
    for point in points:
        _same_as_before(out / point.name, point)
    metric = judged_by(points)
    ledger = Ledger(storage or str(out / SWEEP_JOURNAL), "espalier sweep", maximize=metric.higher_is_better)
    ledger.add(p.name for p in points)
    by_name = {p.name: p for p in points}
    known: dict[str, float] | None = None
    while (entry := ledger.take(by_name)) is not None:
        known = _work(ledger, entry, by_name[entry.point], out=out, known=known, download=download) or known
        write_tables(out, rows_of(ledger, points), metric)
    rows = rows_of(ledger, points)
    write_tables(out, rows, metric)
    return rows


def _same_as_before(folder: Path, point: SweepPoint) -> None:
    """Write down what the point is, or see that it is what it was: a sweep that goes on must not mix two recipes."""
    file = folder.with_name(f"{folder.name}.toml")
    text = to_toml({n: t for n, t in point.config.items() if t})
    if file.exists() and file.read_text(encoding="utf-8") != text:
        raise ValueError(f"{file}: this point was begun with other settings; choose another --out")
    if not file.exists():
        write_file(file, text.encode())


def _work(
    ledger: Ledger, entry: Entry, point: SweepPoint, *, out: Path, known: dict[str, float] | None, download: bool
) -> dict[str, float] | None:
    """One point, from where it was stopped; what fails is recorded.  Returns the dense network's results, if all share them."""
    folder = out / point.name
    stdout.print(f"{point.name}", markup=False, soft_wrap=True)
    try:
        if not (folder / METRICS).exists():  # else it had finished, and nobody was told
            run_job(
                point.config,
                out=folder,
                resume=(folder / CONFIG).exists(),
                download=download,
                known=known,
                beat=lambda: ledger.beat(entry),
            )
        metrics, config = read_sealed(folder / METRICS), read_config(folder / CONFIG)
    except OSError:  # a full disk is no fault of this point, and the next would fail as well
        with suppress(OSError):  # where the ledger is full too, the point is free as soon as this process is gone
            ledger.release(entry)
        raise
    except Exception as error:  # it diverged, cannot meet its budget, or fills the memory: the rest goes on
        if (stop := stop_within(error)) is not None:
            ledger.release(entry)
            raise stop from error
        text = str(error).strip() or type(error).__name__
        ledger.fail(entry, text)
        stderr.print(f"{point.name}: {text}", markup=False, soft_wrap=True)
        return None
    except BaseException:
        ledger.release(entry)
        raise
    ledger.note(entry, **facts_of(metrics, config))
    metric = judged_by([point])
    ledger.complete(entry, float(metrics["small"][metric.name]))
    dense = {n: metrics["dense"][n] for n in (metric.name, "loss") if n in metrics["dense"]}
    return dense if "weights" in point.config["model"] and metric.name in dense else None


def facts_of(metrics: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """What the table says of a run, from its ``metrics.json``; time is that of the runtime whose time was limited, else that of
    the last backend measured, at batch 1."""
    kept = metrics.get("time")
    timings = [t for t in metrics["latency"] if t["name"] == "small" and t["batch"] == 1]
    metric = metric_of(metrics)
    return {
        metric.name: metrics["small"].get(metric.name),
        f"dense {metric.name}": dense_score(metrics, config),  # none where the run began untrained
        **{name: metrics["fraction"][name] for name in COUNTS},
        "time": kept["small"] / kept["dense"] if kept else 1 / timings[-1]["speedup"] if timings else None,
        "backend": kept["setting"]["runtime"] if kept else timings[-1]["backend"] if timings else None,
        "seconds": metrics["seconds"],
    }


def rows_of(ledger: Ledger, points: Sequence[SweepPoint]) -> list[dict[str, Any]]:
    """The table, one row a point, in the order of ``points``."""
    entries = {e.point: e for e in ledger.entries()}
    found = []
    for point in points:
        entry = entries[point.name]
        row = {"method": point.method, "budget": point.budget, "seed": point.seed, "state": entry.state, **entry.facts}
        found.append({column: row.get(column) for column in columns(judged_by([point]))})
    return found


# -- what a sweep leaves behind ----------------------------------------------------------------------------------------


def write_tables(out: Path, rows: Sequence[Mapping[str, Any]], metric: Metric) -> None:
    """``sweep.csv``, every point; ``sweep.md``, means over seeds; and a picture against each of ``AXES`` that was measured."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns(metric), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(out / "sweep.csv", text.getvalue().encode())
    write_file(out / "sweep.md", as_markdown(rows, metric).encode())
    for axis, words in AXES.items():
        chart = picture(rows, axis, words, metric)
        if chart:
            write_file(out / f"sweep-{axis}.svg", chart.encode())


def as_markdown(rows: Sequence[Mapping[str, Any]], metric: Metric) -> str:
    """A line per method and budget, ± the spread over seeds; what failed says why."""
    head = ["method", "budget", metric.name, "MACs, %", "parameters, %", "time, %", "seeds"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    failed, digits = [], places(metric)
    for (method, budget), some in _by_setting(rows):
        done = [r for r in some if r["state"] == "complete"]
        cells = [_spread([r[metric.name] for r in done], digits=digits)]
        cells += [_spread([r[n] and 100 * r[n] for r in done], digits=1) for n in ("macs", "params", "time")]
        lines.append(f"| {' | '.join([method, budget, *cells, f'{len(done)} of {len(some)}'])} |")
        failed += [f"- {method}, {budget}, seed {r['seed']}: {r['error']}" for r in some if r["state"] == "fail"]
    dense = sorted({r[f"dense {metric.name}"] for r in rows} - {None})
    if dense:
        lines += ["", f"Dense: {', '.join(f'{a:.{digits}f}' for a in dense)}."]
    return "\n".join([*lines, *(["", "Failed:", "", *failed] if failed else [])]) + "\n"


def picture(rows: Sequence[Mapping[str, Any]], axis: str, words: str, metric: Metric) -> str:
    """The metric against ``axis``, means over seeds, a colour per method; empty where nothing was measured."""
    methods = list(dict.fromkeys(r["method"] for r in rows))
    dots = []
    for (method, budget), some in _by_setting(rows):
        found = [(100 * r[axis], r[metric.name]) for r in some if None not in (r[axis], r[metric.name])]
        if found:
            x, y = (mean(values) for values in zip(*found, strict=True))
            dots.append(Dot(f"{method} {budget}", x, y, methods.index(method) % 6))
    if not dots:
        return ""
    dots += [Dot("dense", 100.0, a, 5, hollow=True) for a in sorted({r[f"dense {metric.name}"] for r in rows} - {None})]
    x_label = f"{words} left, per cent of the dense network"
    title, unit = f"{metric.name} against {words}", metric.unit and f", {metric.unit}"
    return dot_chart(
        dots, title=title, x_label=x_label, y_label=f"{metric.name}{unit}", higher_is_better=metric.higher_is_better
    )


def _by_setting(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[tuple[str, str], list[Mapping[str, Any]]]]:
    for key in dict.fromkeys((r["method"], r["budget"]) for r in rows):
        yield key, [r for r in rows if (r["method"], r["budget"]) == key]


def _spread(values: Sequence[float | None], *, digits: int) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return "-"
    spread = f" ± {stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{mean(known):.{digits}f}{spread}"


def numbers(option: str, text: str) -> list[float]:
    """``"0.3,0.5"`` as numbers.  Raises: ValueError for anything else."""
    return [amount_of(part, f"{option} {text}, with commas between several") for part in text.split(",")]


def with_shared_profile(config: Config, *, out: Path, download: bool) -> Config:
    """``config`` whose budget names the profile that all points are planned by: the one given, or one that is measured now."""
    if "profile" in config["budget"]:
        return {**config, "budget": {**config["budget"], "profile": str(Path(config["budget"]["profile"]).resolve())}}
    recipe = make_recipe(config)
    data = make_data(config, device="cpu", download=download)
    network = starting_network(fit_model_to(config, data), seed=recipe.seed)
    budget = dict(config["budget"])
    runtime, file = budget.pop("runtime", "onnxruntime"), (out / PROFILE).resolve()
    found = measured_profile(network, to_device(job_example(data, make_task(config)), "cpu"), to=file, runtime=runtime)
    stdout.print(f"profile: {found.describe()}", markup=False, soft_wrap=True)
    return {**config, "budget": {**budget, "profile": str(file)}}
