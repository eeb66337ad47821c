"""``docs/results.md``, the pages behind it and the blocks of results in README and docs, from ``benchmarks/results`` alone.

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

from benchmarks import architectures, proofs
from benchmarks.alignment import as_table as alignment_table
from benchmarks.blocks import BLOCK, families, fill
from benchmarks.common import RESULTS, ROOT, read_results, table
from benchmarks.gpu_throughput import PLACES
from benchmarks.int8 import NETWORKS
from benchmarks.peers import PEERS
from benchmarks.recipe import read_recipes
from benchmarks.run import results
from espalier.run.charts import Dot, Line, dot_chart, gap_curve, line_chart, rank_bars
from espalier.timing.profile import Profile, load_profile

DOCS, README, FIGURES = ROOT / "docs" / "results.md", ROOT / "README.md", ROOT / "docs" / "figures"
BEHIND = ROOT / "docs" / "results"  # a page per recipe, and one each for speed, graphs and networks
Rows = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--print", nargs="+", metavar="NAME", dest="names")
    options = parser.parse_args()
    if options.names:
        print(runs_part(read_recipes(), list(results().values()), options.names, short=False))
        return
    pages = rendered()
    for path in set(BEHIND.glob("*.md")) - pages.keys():
        if options.check:
            sys.exit(f"{path.relative_to(ROOT)} is of results that are not there: python -m benchmarks.tables")
        path.unlink()
    for path, content in pages.items():
        if options.check and not (path.exists() and path.read_text(encoding="utf-8") == content):
            sys.exit(f"{path.relative_to(ROOT)} is out of date: python -m benchmarks.tables")
        path.parent.mkdir(exist_ok=True)
        path.write_text(content, encoding="utf-8")


def rendered() -> dict[Path, str]:
    """What the files should hold, given the results."""
    recipes, found = read_recipes(), list(results().values())
    makers = {
        "headline": lambda: headline_table(recipes, found, folder="docs/"),
        "runs": lambda *names: runs_part(recipes, found, names),
        "across": lambda *names: across_part(recipes, found, names),
        "standing": lambda method: standing_part(recipes, found, method),
        "course": lambda key: course_part(key, found),
    }
    texts = {path: path.read_text(encoding="utf-8") for path in pages() if path != DOCS and path.parent != BEHIND}
    filled = {path: fill(text, makers) for path, text in texts.items() if BLOCK.search(text)}
    behind = {BEHIND / f"{name}.md": text for name, text in appendix(recipes, found).items()}
    pictures = {
        FIGURES / "accuracy-time.svg": accuracy_and_time(recipes, found),
        FIGURES / "staircase.svg": staircase(load_profile(RESULTS / "profile_resnet20.json")),
    }
    return {DOCS: document(recipes, found), **behind, **filled, **pictures, **figures(texts.values(), found)}


def accuracy_and_time(recipes: Mapping[str, Mapping[str, Any]], found: Rows) -> str:
    """ResNet-20 from the published weights, five epochs at most widths and budgets: accuracy against measured time."""
    dots, tones = [], {}
    for name, recipe in recipes.items():
        model, epochs = recipe["model"], recipe["recipe"].get("epochs")
        if (model["name"], recipe["data"]["name"], epochs) != ("resnet20a", "cifar10", 5) or chosen_by_holdout(recipe):
            continue
        for label, method in recipe["methods"].items():
            mine = _mine(_of(found, name), label)
            times = [100 / s for row in mine if (s := _speedup(row))]
            kind = method["name"]
            if times and kind != "dense":
                shown = "" if kind in tones else kind
                tone = tones.setdefault(kind, len(tones))
                dots.append(Dot(shown, statistics.mean(times), _level(mine), tone))
    dense = [r["accuracy"] for r in _of(found, "resnet20-half-5-epochs") if r["label"] == "dense"]
    dots += [Dot("dense", 100.0, statistics.mean(dense), hollow=True)] if dense else []
    x_label = "time left, per cent (ONNX Runtime, one image, one thread)"
    title = "Accuracy against measured time: ResNet-20, CIFAR-10, 5 epochs from the published weights"
    return dot_chart(dots, title=title, x_label=x_label, y_label="test accuracy, per cent")


def staircase(profile: Profile) -> str:
    """What three layers take at any number of outputs, with all inputs."""
    lines = []
    for tone, name in enumerate(("layer1.1.conv1", "layer2.1.conv1", "layer3.1.conv1")):
        layer = next(x for x in profile.layers if x.module == name)
        points = [(n, 1e3 * float(profile.tables[layer.signature].at([n, *layer.lengths[1:]])))
                  for n in range(1, layer.lengths[0] + 1)]  # fmt: skip
        lines.append(Line(f"{name}, {layer.lengths[1]} inputs", tuple(points), tone))
    own = profile.setting
    title = (
        f"ResNet-20 for CIFAR: what a layer takes, by its outputs, in {own.runtime} {own.version} on {own.processor}"
    )
    return line_chart(lines, title=title, x_label="outputs", y_label="microseconds, one image, one thread", low=0)


def chosen_by_holdout(recipe: Mapping[str, Any]) -> bool:
    """Such a recipe chooses between settings on held-out training images; it publishes nothing."""
    return bool(recipe["data"].get("choose_by") == "holdout")


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


TERMS = (
    "Accuracy is that of the last epoch on the test set, in per cent, mean ± standard deviation over seeds. A multiply-add "
    "is one MAC. *Speed-up* is over the dense network in ONNX Runtime, batch 1, one thread, in turns. It is left out where "
    "more ran than the machine had cores; `python -m benchmarks.run time NAME` measures it again. A dash: not run. "
    "A dagger (†): run before the method's present algorithm; its card says what has changed."
)
CHANGED = dict.fromkeys(("magnitude", "svd-oneshot"), "2026-11-29T13:12")
"""When a method began to compute something else: a one-shot cut looks at the data, and BatchNorm follows it."""


def older(rows: Rows) -> str:
    """A mark where one of ``rows`` is of an earlier algorithm than the method's present one."""
    names = [(row.get("setting", {}).get("method", {}).get("name"), row.get("date", "9")) for row in rows]
    return " †" if any(date < CHANGED.get(name, "") for name, date in names) else ""


DETAILS = (
    "*Trained* is the MACs of all training, that of the dense network before it included, in epochs of the dense network. "
    "*Training* is the time of all epochs over that of the dense row, left out where an epoch took twice as long as another; "
    "*cut* is what a method needs before and after."
)
OURS = ("tcp", "mgp", "dprp", "tt-lc", "joint")
SIDE_BY_SIDE = ("dense", "magnitude", "svd-oneshot", "torch-pruning", *OURS)


def document(recipes: Mapping[str, Mapping[str, Any]], found: Rows) -> str:
    """One page of five tables."""
    published = {n: r for n, r in recipes.items() if _any(n, found) and not chosen_by_holdout(r)}
    waiting = [f"`{n}`{' (needs a GPU)' if r.get('needs') else ''}" for n, r in recipes.items() if not _any(n, found)]
    parts = [
        "# Results",
        "Written by `python -m benchmarks.tables` from `benchmarks/results`; do not edit. Behind every recipe lies a page with "
        "all its rows, hardware and versions; `python -m benchmarks.run only NAME` repeats it.",
        TERMS,
        "## 1. Headline",
        headline_table(published, found),
        "## 2. Methods and budgets",
        "Accuracy of the same network at the same budget, after the same training.",
        budget_table(published, found),
        "Settings were chosen on held-out images: "
        + ", ".join(_link(n, r) for n, r in recipes.items() if _any(n, found) and chosen_by_holdout(r))
        + ".",
        "## 3. Real speed",
        "Speed-up in ONNX Runtime, one thread, one image, over the dense network in float. At half of the MACs by the multiple "
        "that widths are held to ([more](results/speed.md)), in eight bits, or where a share of the time was asked for.",
        speed_table(),
        "## 4. Networks and proofs",
        "What was checked on networks that nobody chose, and how often it failed ([all networks](results/networks.md), "
        "[the zoo](zoo.md)).",
        proof_table(),
        "## 5. Other tools",
        "Accuracy with each tool's cut, then the same training ([time and memory beside torch-pruning](results/structure.md)).",
        peer_table(recipes, found),
        f"Not run yet: {', '.join(waiting)}." if waiting else "",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _link(name: str, recipe: Mapping[str, Any], *, folder: str = "") -> str:
    return f"[{recipe['title'].removeprefix('All methods: ')}]({folder}results/{name}.md)"


def headline_table(recipes: Mapping[str, Mapping[str, Any]], found: Rows, *, folder: str = "") -> str:
    """Of every headline recipe the dense network, one-shot pruning and the best of our methods, beside what was published."""
    lines = []
    for name, recipe in recipes.items():
        if not recipe.get("headline"):
            continue
        rows = _of(found, name)
        dense, cut = (_scored(_mine(rows, label)) for label in ("dense", "magnitude"))
        best = max((_mine(rows, label) for label in OURS), key=lambda mine: _level(mine) if mine else 0.0)
        if best:
            lines.append([
                _link(name, recipe, folder=folder), dense, cut, best[0]["label"],
                _mean([r["accuracy"] for r in best], 2),
                _share([r["macs_left"] for r in best]), _faster(best), recipe.get("published"),
            ])  # fmt: skip
    head = ["recipe", "dense", "magnitude", "best method", "accuracy", "MACs left, %", "speed-up", "published"]
    return table(head, lines)


def budget_table(recipes: Mapping[str, Mapping[str, Any]], found: Rows) -> str:
    """Accuracy of what most recipes share; recipes that compare something else have pages only."""
    lines = []
    for name, recipe in recipes.items():
        rows = _of(found, name)
        cells = [_scored(_mine(rows, label)) for label in SIDE_BY_SIDE]
        if sum(cell is not None for cell in cells) > 1:
            lines.append([_link(name, recipe), *cells])
    used = [0, *(place for place in range(1, len(SIDE_BY_SIDE) + 1) if any(line[place] for line in lines))]
    head = ["recipe", *SIDE_BY_SIDE]
    return table([head[place] for place in used], [[line[place] for place in used] for line in lines])


def speed_table() -> str:
    """By network and processor: multiples of widths, budgets of time, eight bits."""
    lines: dict[tuple[str, str], dict[str, str]] = {}
    aligned = read_results("alignment")
    for row in aligned.get("rows", []):
        own = lines.setdefault((row["network"], aligned["processor"]), {})
        for r in row["rows"]:
            column = f"multiples of {r['multiple_of']}" if r["multiple_of"] > 1 else "half of the MACs, any width"
            own[column] = f"{r['speed-up']['1']:.2f}x"
    for row in read_results("latency").get("rows", []):
        if row["batch"] == 1 and row["runtime"].startswith("onnxruntime"):
            for budget in row["budgets"]:
                if share := budget.get("measured afresh"):
                    column = f"asked for {100 * budget['asked']:.0f} % of the time"
                    lines.setdefault((row["network"], row["processor"]), {})[column] = f"{1 / share:.2f}x"
    for processor, rows in read_results("int8").items():
        for label, row in rows.items():
            if label in NETWORKS:
                ms, column = row["milliseconds"], "half of the MACs, int8"
                lines.setdefault((label, processor), {})[column] = f"{ms['dense float'] / ms['small int8']:.2f}x"
    columns = list(dict.fromkeys(column for own in lines.values() for column in own))
    ordered = sorted(lines.items(), key=lambda line: line[0][1])
    return table(["network", "processor", *columns], [[*name, *map(own.get, columns)] for name, own in ordered])


def proof_table() -> str:
    """What was checked, on how many, and how many failed."""
    lines = []
    if found := read_results("families").get("summary"):
        what = f"networks, some of each of {found['files']} model files of timm, cut and proven"
        rest = f"{found['nothing can go']} stay whole" if found["nothing can go"] else None
        lines.append([what, found["networks"], found["failed"], rest, "`python -m benchmarks.families`"])
    if found := read_results("soak"):
        command = f"`python tests/soak.py {found['networks']} {found['first']}`"
        cut = f"{found['seen']['removed something']:,} were cut"
        lines.append(["random networks of modules", f"{found['networks']:,}", len(found["failed"]), cut, command])
    for found in read_results("soak_programs").get("runs", [])[-1:]:
        command = f"`python -m tests.soak_programs {found['programs']} {found['first']}`"
        bad = sum(found[key] for key in ("wrong", "crash", "cost"))
        note = f"{found['whole']} stay whole" + (f", in {n} nothing could go" if (n := found.get("rigid")) else "")
        lines.append(["random programs of operations", found["programs"], bad, note, command])
    if found := read_results("budgets").get("summary"):
        bad = sum(found[k] for k in ("above the budget", "with a block unused", "counted otherwise than planned"))
        what = "random budgets: never above, nothing unused that fits, cost as planned"
        lines.append([what, found["targets"], bad, None, "`python -m benchmarks.budgets`"])
    for row in read_results("removal").get("summary", []):
        off = f"logits off by {row['largest difference, float64']:.0e} of their size"
        what = f"removals while a network trains, {row['data']}"
        lines.append([what, row["removals in training"], 0, off, "`python -m benchmarks.removal`"])
    return table(["what", "how many", "failed", "note", "by"], lines)


def peer_table(recipes: Mapping[str, Mapping[str, Any]], found: Rows) -> str:
    """Tools and our methods in the recipes that have the tools."""
    names = [n for n, r in recipes.items() if _any(n, found) and any(m["name"] in PEERS for m in r["methods"].values())]
    names = [n for n in names if sum(bool(_mine(_of(found, n), p)) for p in PEERS) > 1]
    ours = ("dense", "magnitude", *OURS)
    labels = dict.fromkeys(label for n in names for label in recipes[n]["methods"] if label in ours or label in PEERS)
    lines = [
        [label, *(_mean([r["accuracy"] for r in _mine(_of(found, n), label)], 2) for n in names)] for label in labels
    ]
    heads = [f"[{recipes[n]['title'].removeprefix('Peers side by side: ')}](results/{n}.md)" for n in names]
    return table(["method", *heads], [line for line in lines if any(line[1:])])


def appendix(recipes: Mapping[str, Mapping[str, Any]], found: Rows) -> dict[str, str]:
    """The pages behind the five tables, by name: one for each recipe with a result, and for what is no recipe."""
    pages = {}
    for name, recipe in recipes.items():
        if rows := _of(found, name):
            pages[name] = [f"# {recipe['title']}", *_published(recipe), recipe_table(recipe, rows), _origin(rows)]
    strays = [row for row in found if row["recipe"] not in recipes]
    for name in sorted({row["recipe"] for row in strays}):
        rows = _of(strays, name)
        labels = {row["label"]: row["setting"]["method"] for row in rows}
        recipe = {"methods": labels, "budget": rows[0]["setting"]["budget"], "seeds": sorted({r["seed"] for r in rows})}
        pages[name] = [f"# {name} (no recipe any more)", recipe_table(recipe, rows), _origin(rows)]
    for name, parts in pages.items():
        parts.append(
            f"{TERMS} {DETAILS} Repeated by `python -m benchmarks.run only {name}`. [All results](../results.md)"
        )
    pages |= {
        "speed": ["# Speed", *alignment_part(), *gpu_part()],
        "structure": ["# Time and memory of the structure", *structure_part()],
        "networks": ["# Networks nobody chose", *families_part(), *architectures_part(), *soak_part(), *proofs_part()],
    }
    written = "*Written by `python -m benchmarks.tables`; do not edit.*"
    return {name: "\n\n".join([parts[0], written, *parts[1:]]) + "\n" for name, parts in pages.items()}


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


def architectures_part() -> list[str]:
    """Detectors, segmenters, film and volumes, network by network; empty without a result."""
    content = read_results(architectures.NAME)
    if not content:
        return []
    text = [architectures.summary(content), architectures.as_table(content), _origin([content["environment"]])]
    return ["## Networks that people bring", *text]


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


def proofs_part() -> list[str]:
    """What proofs cost; empty without a result."""
    content = read_results(proofs.NAME)
    if not content:
        return []
    return [
        "## What a proof costs",
        f"By `python -m benchmarks.proofs`. {proofs.as_table(content)}",
        _origin([content["environment"]]),
    ]


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
                _scored(oneshot),
                None if best is None else f"{others[best]:.2f} ({best}){older(_mine(rows, best))}",
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


def _scored(rows: Rows) -> str | None:
    """Accuracy, mean ± deviation, with its mark."""
    return f"{_mean([r['accuracy'] for r in rows], 2)}{older(rows)}" if rows else None


def _level(rows: Rows) -> float:
    return statistics.mean(r["accuracy"] for r in rows)


def recipe_table(recipe: Mapping[str, Any], rows: Rows, *, short: bool = False, gaps: bool = True) -> str:
    """One line per method, in the recipe's order; a method without a result says so, or with ``gaps=False`` is left out."""
    dense = next((_mine(rows, label) for label, m in recipe["methods"].items() if m["name"] == "dense"), [])
    lines, timed = [], "latency" in recipe["budget"]
    for label in recipe["methods"]:
        mine = _mine(rows, label)
        if not mine:
            if gaps:
                lines.append([label, "not run", *[None] * (6 if short else 8)])
            continue
        line = [
            label + older(mine),
            _mean([r["accuracy"] for r in mine], 2),
            _share([r["macs_left"] for r in mine]),
            _share([r["params_left"] for r in mine]),
            None if recipe["methods"][label]["name"] == "dense" else _time_left(mine) if timed else _faster(mine),
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
    speed = "time left, %" if timed else "speed-up"
    head = ["method", "accuracy", "MACs left, %", "parameters left, %", speed, "trained", "teacher", "seeds"]
    if not short:
        head[7:7] = ["training", "cut"]
    asked = ", ".join(f"{k} {100 * v:.4g} %" for k, v in recipe["budget"].items() if k != "multiple_of" and v <= 1)
    notes = [f"{r['label']}, seed {r['seed']}: {r['note']}." for r in rows if r.get("note")]
    if timed:
        notes.append("*Time left* is measured beside the dense network, in turns, at the end of every run.")
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


TIMED = "onnxruntime, batch 1"


def _time_left(rows: Rows) -> str:
    """Of the time of the dense network, measured in turns at the end of every run."""
    times = [r["time"]["small"] / r["time"]["dense"] if "time" in r else 1 / r["speedup"][TIMED] for r in rows]
    return _share(times)


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
    return row["speedup"].get(TIMED) if _alone(row.get("timed", row)) else None


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
