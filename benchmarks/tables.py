"""``docs/results.md`` and the blocks of results in README and docs, from ``benchmarks/results`` and nothing else.

python -m benchmarks.tables            # write them
python -m benchmarks.tables --check    # exit code 1 if one is out of date
python -m benchmarks.tables --print NAME ...    # write nothing; show the tables of these recipes
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.alignment import as_table as alignment_table
from benchmarks.blocks import BLOCK, families, fill
from benchmarks.common import RESULTS, ROOT, read_results, table
from benchmarks.gpu_throughput import PLACES
from benchmarks.peers import PEERS
from benchmarks.recipe import read_recipes
from benchmarks.run import results
from espalier.run.charts import gap_curve, rank_bars

DOCS, README, FIGURES = ROOT / "docs" / "results.md", ROOT / "README.md", ROOT / "docs" / "figures"
Rows = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--print", nargs="+", metavar="NAME", dest="names")
    options = parser.parse_args()
    if options.names:
        print(runs_part(read_recipes(), list(results().values()), options.names, short=False))
        return
    for path, content in rendered().items():
        if options.check and not (path.exists() and path.read_text(encoding="utf-8") == content):
            sys.exit(f"{path.relative_to(ROOT)} is out of date: python -m benchmarks.tables")
        path.parent.mkdir(exist_ok=True)
        path.write_text(content, encoding="utf-8")


def rendered() -> dict[Path, str]:
    """What the files should hold, given the results."""
    recipes, found = read_recipes(), list(results().values())
    makers = {
        "headline": lambda: readme_part(recipes, found),
        "runs": lambda *names: runs_part(recipes, found, names),
        "across": lambda *names: across_part(recipes, found, names),
        "standing": lambda method: standing_part(recipes, found, method),
        "course": lambda key: course_part(key, found),
    }
    texts = {path: path.read_text(encoding="utf-8") for path in pages() if path != DOCS}
    filled = {path: fill(text, makers) for path, text in texts.items() if BLOCK.search(text)}
    return {DOCS: document(recipes, found), **filled, **figures(texts.values(), found)}


def figures(texts: Iterable[str], found: Rows) -> dict[Path, str]:
    """The pictures of all ``course`` blocks."""
    drawn = {}
    for key in {key for text in texts for key in re.findall(r"<!-- results: course (\S+) -->", text)}:
        for kind, chart in _charts(key, found).items():
            drawn[FIGURES / f"{key}.{kind}.svg"] = chart
    return drawn


def course_part(key: str, found: Rows) -> str:
    """Ranks at the end and gap over the iterations of one run, for a page in ``docs/methods``."""
    words = {"ranks": "Rank of every layer at the end", "gap": "Penalty gap after every C step"}
    return "\n\n".join(f"![{words[kind]}, {key}](../figures/{key}.{kind}.svg)" for kind in _charts(key, found))


def _charts(key: str, found: Rows) -> dict[str, str]:
    rows = [row for row in found if f"{row['recipe']}.{row['label']}-seed{row['seed']}" == key and row.get("course")]
    if not rows:
        raise ValueError(f"course {key}: no such run, or it recorded none")
    course = rows[0]["course"]
    charts = {
        "ranks": rank_bars(course.get("rank", {}), course.get("full rank", {})),
        "gap": gap_curve(course.get("gap", {})),
    }
    return {kind: chart for kind, chart in charts.items() if chart}


def pages() -> list[Path]:
    """Everything that a reader of the project reads."""
    return [README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.parent.rglob("*.md"))]


def document(recipes: Mapping[str, Mapping[str, Any]], found: Rows) -> str:
    """All tables; recipes without a result are listed at the end."""
    parts = [
        "# Results",
        "Written by `python -m benchmarks.tables` from `benchmarks/results/runs`; do not edit. Every row stands in a recipe of "
        "`benchmarks/recipes`, and `python -m benchmarks.run only NAME` repeats it.",
        "Accuracy is that of the last epoch on the test set, in per cent, mean ± standard deviation over seeds. One "
        "multiply-add is one MAC. *Trained* is the MACs of all training, that of the dense network before it included, in "
        "epochs of the dense network. *Speed-up* is over the dense network in ONNX Runtime, batch 1, one thread, in turns. "
        "*Training* is the time of all epochs over that of the dense row; *cut* is what a method needs before and after. Both "
        "ratios are left out where more ran than the machine had cores, because they would say nothing, training also where an "
        "epoch took twice as long as another; `python -m benchmarks.run time NAME` measures a speed-up again.",
    ]
    for name, recipe in recipes.items():
        rows = _of(found, name)
        if rows:
            parts += [f"## {recipe['title']}", *_published(recipe), recipe_table(recipe, rows), _origin(rows)]
    strays = [row for row in found if row["recipe"] not in recipes]
    for name in sorted({row["recipe"] for row in strays}):
        rows = [row for row in strays if row["recipe"] == name]
        labels = {row["label"]: row["setting"]["method"] for row in rows}
        recipe = {"methods": labels, "budget": rows[0]["setting"]["budget"], "seeds": sorted({r["seed"] for r in rows})}
        parts += [f"## {name} (no recipe any more)", recipe_table(recipe, rows), _origin(rows)]
    parts += alignment_part()
    parts += gpu_part()
    parts += structure_part()
    parts += families_part()
    parts += soak_part()
    waiting = [
        f"- `{n}`{' (needs a GPU)' if r.get('needs') else ''}: {r['title']}"
        for n, r in recipes.items()
        if not _any(n, found)
    ]
    if waiting:
        parts += ["## Not run yet", "\n".join(waiting)]
    return "\n\n".join(parts) + "\n"


def alignment_part() -> list[str]:
    """Speed by the multiple that widths are held to; empty without a result."""
    content = read_results("alignment")
    if not content:
        return []
    return [
        "## Widths that run fast",
        "By `python -m benchmarks.alignment`: speed-up over the dense network in ONNX Runtime, one thread, at half of "
        "the MACs, by the multiple that widths are held to; which units go is drawn by chance. The command line takes "
        "multiples of 4, if the budget allows, unless `--multiple-of` says "
        "otherwise; `Budget(multiple_of=...)` is 1 by default, as in papers, and so it is in every recipe that does "
        "not say otherwise.",
        alignment_table(content["rows"]),
        _origin([content["environment"]]),
    ]


def gpu_part() -> list[str]:
    """Speed of narrowed networks, of the training loop and of the methods on a GPU; without a result, nothing."""
    parts = []
    if content := read_results("alignment_gpu"):
        parts += [
            "By `python -m benchmarks.alignment --device cuda --name alignment_gpu`: the same in PyTorch, float16, channels "
            "last, on the small images of the zoo. They do not fill this GPU: the time is that of launching kernels, of which "
            "a narrower network has as many, and one with odd widths more. Take multiples of 8 or 16 for a GPU.",
            alignment_table(content["rows"]),
            _origin([content["environment"]]),
        ]
    if files := [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("gpu_throughput*.json"))]:
        rows = [
            (name, content["batch"], times) for content in files for name, times in content["seconds_per_epoch"].items()
        ]
        columns = list(dict.fromkeys(way for *_, times in rows for way in times))
        parts += [
            "By `python -m benchmarks.gpu_throughput [--batch N]`: seconds of an epoch of dense training, 50,000 images. "
            "*floor* is the same arithmetic at the speed of a large matrix product, *loop graphs* our training loop with "
            "`graphs`, *eager* bare steps, *graph* these as a replayed CUDA graph, *graph x3* three seeds together.",
            table(
                ["network", "batch", *columns],
                [
                    [n, str(batch), *[None if w not in row else f"{row[w]:.2f}" for w in columns]]
                    for n, batch, row in rows
                ],
            ),
            _origin(files),
        ]
    if content := read_results("gpu_steps"):
        lines = [
            [n, label, *[f"{v:.2f}x" for v in found]]
            for n, rows in content["steps"].items()
            for label, found in rows.items()
        ]
        parts += [
            "By `python -m benchmarks.gpu_throughput --ways methods`: a training step with a method, its penalty and its "
            "events included, relative to one without it, before anything is removed; *graphs*: both replayed. Launched one "
            "by one, steps this small take as long as their kernels are many: a factorised layer has more of them than a "
            "dense one, and so has one whose width is no multiple of 8.",
            table(["network", "method", *[f"{100 * place:.0f} % of the run" for place in PLACES]], lines),
            _origin([content]),
        ]
    return ["## On a GPU", *parts] if parts else []


def structure_part(folder: Path = RESULTS) -> list[str]:
    """Time and memory of graph, plan and surgery; empty without a result.  A list of networks may lie in several files."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("structure*.json"))]
    lines: list[list[str | None]] = []
    ratios: dict[str, float] = {}  # of a network that was measured twice, the second
    for row in (row for content in files for row in content["rows"]):
        ours, theirs = row["espalier"], row["torch-pruning"]
        ratio = theirs["cpu"] / ours["cpu"] if ours["handled"] and theirs["handled"] else None
        if ratio is not None:
            ratios[row["network"]] = ratio
        megabytes = [f"{m['extra'] / 1e6:.0f}" if (m := entry.get("memory")) else None for entry in (ours, theirs)]
        lines.append(
            [
                row["network"],
                f"{1e3 * ours['cpu']:.0f} ms" if ours["handled"] else "fails",
                f"{1e3 * theirs['cpu']:.0f} ms" if theirs["handled"] else "fails",
                None if ratio is None else f"{ratio:.2f}x",
                *megabytes,
                f"{100 * ours['delivered']:.2f}" if ours["handled"] else None,
                f"{100 * theirs['delivered']:.2f}" if theirs["handled"] else None,
            ]
        )
    if not lines:
        return []
    head = ["network", "ours", "torch-pruning", "ratio", "MB, ours", "MB, theirs", "MACs, ours", "MACs, theirs"]
    summary = (
        f"Median ratio {statistics.median(ratios.values()):.2f}x, least {min(ratios.values()):.2f}x." if ratios else ""
    )
    return [
        "## Graph, plan and surgery against torch-pruning",
        "By `python -m benchmarks.structure`: processor time from a model to a smaller one at half of the MACs (torch-pruning "
        "at the channel ratio that would halve a plain chain of convolutions), in turns in one process; memory beyond the "
        "model, the small model included; MACs delivered, in per cent. Networks that came close, or whose tracing changed, "
        "were measured a second time. "
        f"{summary}",
        table(head, lines),
        _origin([content["environment"] for content in files]),
    ]


def families_part() -> list[str]:
    """Network by network, what became of one to three of every model file of timm; empty without a result."""
    content = read_results("families")
    if not content:
        return []
    lines = []
    for row in content["rows"]:
        asked = f"{100 * row['asked']:.0f}" if row["proven"] else None
        outcome = "proven" if row["proven"] else row.get("error") or f"stays whole: {row['why']}"
        smallest = f"{100 * row['smallest']:.1f}" if "smallest" in row else None
        cells = [row["network"], row["file"], str(row["input"]), smallest, asked, outcome]
        lines.append([cell if cell is None else cell.replace("|", "/") for cell in cells])
    head = ["network", "file of timm", "input", "smallest, %", "MACs asked for, %", "outcome"]
    return ["## Networks nobody chose", families(), table(head, lines), _origin([content["environment"]])]


def soak_part() -> list[str]:
    """Random networks that were proven; empty without a result."""
    content = read_results("soak")
    if not content:
        return []
    seen = content["seen"]
    text = (
        f"By `python tests/soak.py {content['networks']} {content['first']} --record`: {content['networks']:,} networks of the "
        "generator that the tests use (adds, concatenations, splits, groups, shuffles, squeeze-and-excite), each cut at random "
        f"and proven by `verify`; {len(content['failed'])} failed. Something was removed from {seen['removed something']:,}; "
        f"{seen.get('frozen by rehearsal', 0):,} had channels that only the rehearsal found to be fixed."
    )
    return ["## Random networks", text, _origin([content["environment"]])]


def readme_part(recipes: Mapping[str, Mapping[str, Any]], found: Rows) -> str:
    """The tables of the headline recipes that have results, without their details."""
    names = [n for n, recipe in recipes.items() if recipe.get("headline") and _any(n, found)]
    return runs_part(recipes, found, names, gaps=False) if names else "No headline recipe has been run yet."


def runs_part(
    recipes: Mapping[str, Mapping[str, Any]],
    found: Rows,
    names: Sequence[str],
    *,
    short: bool = True,
    gaps: bool = True,
) -> str:
    """The tables of the recipes ``names``, with their details or without, and with what has not been run or without."""
    _known(recipes, names)
    lines = []
    for name in names:
        rows = _of(found, name)
        said = [*_published(recipes[name]), *_beginning(recipes[name], rows)]
        lines += [f"**{recipes[name]['title']}** (`{name}`)", *([" ".join(said)] if said else [])]
        lines.append(recipe_table(recipes[name], rows, short=short, gaps=gaps) if rows else "Not run yet.")
    return "\n\n".join(lines)


def across_part(recipes: Mapping[str, Mapping[str, Any]], found: Rows, names: Sequence[str]) -> str:
    """Accuracy of the methods that several recipes share, a recipe a column."""
    _known(recipes, names)
    labels = dict.fromkeys(label for name in names for label in recipes[name]["methods"])
    cells = [
        [_mean([r["accuracy"] for r in _mine(rows, label)], 2) for rows in (_of(found, n) for n in names)]
        for label in labels
    ]
    seeds = sorted({len(_mine(_of(found, n), label)) for n in names for label in labels})
    said = f"Seeds: {'all' if len(seeds) == 1 else f'{seeds[0]} to {seeds[-1]} of'} {len(recipes[names[0]]['seeds'])}."
    heads = [f"{recipes[n]['recipe']['epochs']} epochs (`{n}`)" for n in names]
    return said + "\n\n" + table(["method", *heads], [[n, *row] for n, row in zip(labels, cells, strict=True)])


def _of(found: Rows, name: str) -> Rows:
    return [row for row in found if row["recipe"] == name]


def _known(recipes: Mapping[str, Any], names: Sequence[str]) -> None:
    if unknown := [n for n in names if n not in recipes]:
        raise SystemExit(f"results: no such recipe: {', '.join(unknown)}")


def standing_part(recipes: Mapping[str, Mapping[str, Any]], found: Rows, method: str) -> str:
    """One method in every recipe that it has run in, beside the dense network, one-shot pruning and the best of the others."""
    lines = []
    for name, recipe in recipes.items():
        rows = _of(found, name)
        mine = _mine(rows, method)
        if not mine:
            continue
        base = {
            kind: [r for r in rows if recipe["methods"][r["label"]]["name"] == kind] for kind in ("dense", "magnitude")
        }
        others = {
            label: statistics.mean(r["accuracy"] for r in _mine(rows, label))
            for label, m in recipe["methods"].items()
            if m["name"] not in ("dense", "magnitude", method) and _mine(rows, label)
        }
        best = max(others, key=lambda label: others[label], default=None)
        oneshot = max((_mine(rows, label) for label in {r["label"] for r in base["magnitude"]}), key=_level, default=[])
        lines.append(
            [
                f"`{name}`",
                _mean([r["accuracy"] for r in base["dense"]], 2),
                _mean([r["accuracy"] for r in oneshot], 2),
                None if best is None else f"{others[best]:.2f} ({best})",
                _mean([r["accuracy"] for r in mine], 2),
                _share([r["macs_left"] for r in mine]),
                _share([r["params_left"] for r in mine]),
                _mean([v for r in mine if (v := _speedup(r))], 2, unit="x"),
                f"{len(mine)} of {len(recipe['seeds'])}",
            ]
        )
    if not lines:
        return "No recipe has been run yet."
    head = [
        "recipe",
        "dense",
        "one-shot",
        "best other",
        method,
        "MACs left, %",
        "parameters left, %",
        "speed-up",
        "seeds",
    ]
    return table(head, lines)


def _level(rows: Rows) -> float:
    return statistics.mean(r["accuracy"] for r in rows)


def recipe_table(recipe: Mapping[str, Any], rows: Rows, *, short: bool = False, gaps: bool = True) -> str:
    """One line per method, in the recipe's order; a method without a result says so, or with ``gaps=False`` is left out."""
    dense = next((_mine(rows, label) for label, m in recipe["methods"].items() if m["name"] == "dense"), [])
    lines = []
    for label in recipe["methods"]:
        mine = _mine(rows, label)
        if not mine:
            if gaps:
                lines.append([label, "not run", *[None] * (6 if short else 8)])
            continue
        line = [
            label,
            _mean([r["accuracy"] for r in mine], 2),
            _share([r["macs_left"] for r in mine]),
            _share([r["params_left"] for r in mine]),
            None if recipe["methods"][label]["name"] == "dense" else _faster(mine),
            _spent(recipe, label, mine),
            _taught(recipe, label, mine),
            f"{len(mine)} of {len(recipe['seeds'])}",
        ]
        if not short:
            line[7:7] = [
                _training(mine, dense),
                _mean([c for r in mine if (c := r["seconds"].get("cut"))], 1, unit=" s"),
            ]
        lines.append(line)
    head = ["method", "accuracy", "MACs left, %", "parameters left, %", "speed-up", "trained", "teacher", "seeds"]
    if not short:
        head[7:7] = ["training", "cut"]
    asked = ", ".join(f"{k} {100 * v:.4g} %" for k, v in recipe["budget"].items() if k != "multiple_of" and v <= 1)
    notes = [f"{r['label']}, seed {r['seed']}: {r['note']}." for r in rows if r.get("note")]
    return "\n\n".join([f"Budget: {asked}.", table(head, lines), *notes])


def _before(recipe: Mapping[str, Any], label: str) -> int:
    """Epochs of the dense network that the rows of ``label`` begin with and that was trained for them."""
    start = recipe.get("start", {})
    return int(start.get("epochs", 0)) if label in start.get("for", recipe["methods"]) else 0


def _spent(recipe: Mapping[str, Any], label: str, rows: Rows) -> str | None:
    """MACs of all training, in epochs of the dense network; ``None`` where a row did not record what it executed."""
    spent = []
    for row in rows:
        epochs = row.get("setting", {}).get("recipe", {}).get("epochs", 0)
        if row.get("macs_curve"):
            own = sum(row["macs_curve"])
        elif recipe["methods"][label]["name"] == "dense":
            own = epochs
        elif recipe["methods"][label]["name"] in ONE_SHOT:
            own = epochs * row["macs_left"]
        else:
            return None
        spent.append(_before(recipe, label) + own)
    return f"{statistics.mean(spent):.1f}"


ONE_SHOT = ("magnitude", "svd-oneshot", *PEERS)
"""Cut at once, so that all training after it is of the small network."""


def _taught(recipe: Mapping[str, Any], label: str, rows: Rows) -> str:
    """Whether the trained network that a row began with taught it."""
    setting = rows[0].get("setting", {})
    weight = setting.get("recipe", {}).get("distill")
    trained = "weights" in recipe.get("model", {}) or _before(recipe, label) > 0 or setting.get("trained", False)
    return "yes" if trained and weight != 0 else "no"


def _faster(rows: Rows) -> str | None:
    """Mean speed-up of the runs that were timed with nothing beside them; how many, where that is not all of them."""
    timed = [s for row in rows if (s := _speedup(row))]
    few = f" ({len(timed)} timed)" if 0 < len(timed) < len(rows) else ""
    return None if not timed else f"{_mean(timed, 2, unit='x')}{few}"


def _mine(rows: Rows, label: str) -> Rows:
    return [row for row in rows if row["label"] == label]


def _any(name: str, found: Rows) -> bool:
    return any(row["recipe"] == name for row in found)


def _published(recipe: Mapping[str, Any]) -> list[str]:
    return [f"Published: {recipe['published']}."] if "published" in recipe else []


def _beginning(recipe: Mapping[str, Any], rows: Rows) -> list[str]:
    """How good the trained network was that the methods, or some of them, begin with."""
    weights, labels = "weights" in recipe.get("model", {}), recipe.get("start", {}).get("for", recipe["methods"])
    before = [a for row in rows if row["label"] in labels and (a := row.get("dense_accuracy")) is not None]
    if not before or not (weights or "start" in recipe):
        return []
    if weights:
        return [f"The published weights: {statistics.mode(before):.2f}."]
    who = "all methods" if len(labels) == len(recipe["methods"]) else ", ".join(f"`{label}`" for label in labels)
    seeds = list({row["seed"]: row["dense_accuracy"] for row in rows if row["label"] in labels}.values())
    return [f"The trained network that {who} begin with: {_mean(seeds, 2)}."]


def _mean(values: list[float], digits: int, *, unit: str = "") -> str | None:
    if not values:
        return None
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}{unit}"


def _share(values: list[float]) -> str:
    """Per cent, with two decimals: whether a budget was met shows there."""
    return f"{100 * statistics.mean(values):.2f}"


def _training(mine: Rows, dense: Rows) -> str | None:
    """Time of the epochs over that of the dense row of the same seeds and hardware; of runs that had it to themselves only."""
    by_run = {(row["seed"], _device(row)): sum(row["epoch_seconds"]) for row in dense if _undisturbed(row)}
    ratios = [
        sum(row["epoch_seconds"]) / by_run[run]
        for row in mine
        if _undisturbed(row) and (run := (row["seed"], _device(row))) in by_run
    ]
    return f"{statistics.mean(ratios):.2f}x" if ratios else None


def _speedup(row: Mapping[str, Any]) -> float | None:
    """In ONNX Runtime, batch 1; ``None`` if other work shared the core while it was measured."""
    return row["speedup"].get("onnxruntime, batch 1") if _alone(row.get("timed", row)) else None


def _alone(where: Mapping[str, Any]) -> bool:
    """Was there a core for everything that ran, as far as the load average tells?"""
    hardware = where.get("hardware", {})
    return hardware.get("load_average", math.inf) <= hardware.get("cores", 0) + 0.5


def _undisturbed(row: Mapping[str, Any]) -> bool:
    """Alone at the end, and no epoch took twice as long as another, as it does when a run is paused or crowded."""
    seconds = row["epoch_seconds"]
    return _alone(row) and not row["hardware"].get("gpu_shared") and max(seconds) <= 2 * min(seconds)


def _device(row: Mapping[str, Any]) -> str:
    """What a row was trained on."""
    hardware = row["hardware"]
    return hardware.get("gpu") or f"{hardware['cpu']}, {hardware['threads']} thread"


def _origin(rows: Rows) -> str:
    """Hardware, versions and revisions, once each."""
    where = sorted({_device(row) for row in rows})
    torch = sorted({row["versions"]["torch"] for row in rows})
    revisions = sorted({row["revision"].split()[0] for row in rows})
    return f"*{'; '.join(where)}; PyTorch {', '.join(torch)}; revision {', '.join(revisions)}.*"


if __name__ == "__main__":
    main()
