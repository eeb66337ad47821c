"""Fill the tables: run recipes (``benchmarks/recipes``) into ``benchmarks/results/runs/NAME.LABEL-seedN.json``.

    python -m benchmarks.run queue                     # what is missing, and how long each takes on this device
    python -m benchmarks.run next --minutes 30         # run the most valuable missing ones that fit
    python -m benchmarks.run only NAME[.LABEL] [...]   # run these in this order, all seeds that are missing (or --seeds 0)
    python -m benchmarks.run next --minutes 9 --side-by-side 6 --graphs     # six at a time, stopped when the time is up
    python -m benchmarks.run time NAME[.LABEL] [...]   # measure the speed-up again, of what was trained here, when all is quiet
    python -m benchmarks.run import accuracy.json      # take over rows of the older format

``ESPALIER_RUNS`` names another folder than ``benchmarks/results``, to repeat what is there already (``make bench-peers``).
A run that was stopped goes on at its last epoch.  Existing results are never overwritten.  Accuracy is that of the last
epoch on the test set, which is looked at for the curve and for nothing else; a recipe with ``data.choose_by = "holdout"``
trains without the held-out images, is judged by them, and never sees the test set.
"""

from __future__ import annotations

import argparse
import copy
import csv
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import RESULTS, environment, rounded, table, write_results
from benchmarks.peers import PEERS, Cut, lacking
from benchmarks.recipe import Job, jobs, read_recipes
from benchmarks.side_by_side import run_side_by_side
from espalier.costs import Cost, cost
from espalier.graph import trace
from espalier.plan import Budget
from espalier.present.config import METHODS, make_method
from espalier.run.batches import stratified_order
from espalier.run.checkpoint import seeded
from espalier.run.compress import compress
from espalier.run.data import Data, load_data
from espalier.run.evaluate import evaluate, pick_device
from espalier.run.latency import latency
from espalier.run.loop import Epoch, History, train
from espalier.run.models import build_model, load_weights
from espalier.run.recipe import WHERE, Recipe
from espalier.run.rundir import HISTORY, LOG, METRICS
from espalier.run.timed import time_kept
from espalier.surgery import load, save
from espalier.timing.making import profile as measured_profile

HOME = Path(os.environ.get("ESPALIER_RUNS", RESULTS))
RUNS = HOME / "runs"
WORK = HOME / "unfinished"  # checkpoints; git ignores them
IMAGES = {"digits": 1437, "cifar10": 50000, "cifar100": 50000}
PROBE_STEPS, GPU_PROBE_STEPS = 6, 60


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    try:
        if options.command == "import":
            print(f"{import_rows(json.loads(options.file.read_text()), read_recipes())} rows taken over")
        elif options.command == "queue":
            print(queue_table(missing(read_recipes()), options.device, graphs=options.graphs))
        elif options.command == "time":
            for job in jobs(read_recipes()):
                if {job.name, f"{job.name}.{job.label}"} & set(options.names):
                    time_again(job)
        elif options.command == "next":
            device = pick_device(options.device)
            able = [job for job in missing(read_recipes()) if not refusal(job, device)]
            if options.side_by_side > 1:  # alone, each takes at least as long beside others
                fit = [j for j in able if minutes_on(j, device, graphs=options.graphs) <= options.minutes]
                run_together(fit, options)
            else:
                run_next(able, options)
        else:
            wanted = [
                job for job in missing(read_recipes()) if {job.name, f"{job.name}.{job.label}"} & set(options.names)
            ]
            known = {n for r, c in read_recipes().items() for n in (r, *(f"{r}.{label}" for label in c["methods"]))}
            if unknown := set(options.names) - known:
                raise ValueError(f"no such recipe: {', '.join(sorted(unknown))}; there are {', '.join(read_recipes())}")
            run_only([job for job in wanted if options.seeds is None or job.seed in options.seeds], options)
    except ValueError as error:
        sys.exit(f"error: {error}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("queue", "next", "only"):
        command = commands.add_parser(name)
        command.add_argument("--device", default="auto")
        command.add_argument("--threads", type=int, default=1)
        command.add_argument("--graphs", action="store_true", help="on a GPU: replay steps as CUDA graphs")
        command.add_argument("--data-dir", default=os.environ.get("ESPALIER_DATA_DIR"))
        command.add_argument("--weights-dir", help="where the published weights lie; default: DATA_DIR/weights")
        if name != "queue":
            command.add_argument("--side-by-side", type=int, default=1, metavar="N", help="so many runs at a time")
        if name == "next":
            command.add_argument("--minutes", type=float, required=True)
        if name == "only":
            command.add_argument("--minutes", type=float, help="with --side-by-side: stop when they are over")
            command.add_argument("names", nargs="+", metavar="NAME[.LABEL]")
            command.add_argument("--seeds", type=int, nargs="+", help="only these of the recipe's seeds")
    commands.add_parser("time").add_argument("names", nargs="+", metavar="NAME[.LABEL]")
    commands.add_parser("import").add_argument("file", type=Path)
    return parser.parse_args(arguments)


# ---------------------------------------------------------------- the queue


def results(folder: Path = RUNS) -> dict[str, dict[str, Any]]:
    """All results by key."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def missing(recipes: dict[str, dict[str, Any]], folder: Path = RUNS) -> list[Job]:
    """Recipes x methods x seeds without a result, the most wanted first."""
    return [job for job in jobs(recipes) if not (folder / f"{job.key}.json").exists()]


def queue_table(waiting: list[Job], device: str, *, graphs: bool = False) -> str:
    where, rows, total = pick_device(device), [], 0.0
    for job in waiting:
        reason = refusal(job, where)
        minutes = None if reason else minutes_on(job, where, graphs=graphs)
        total += minutes or 0.0
        rows.append([job.key, job.content.get("value", 0), reason or f"{minutes:.0f}"])
    return (
        table(["run", "value", f"minutes on {where}"], rows) + f"\n\n{len(rows)} missing; {total / 60:.1f} hours here."
    )


def refusal(job: Job, device: torch.device) -> str:
    """Why this job does not run here; empty if it does."""
    if job.content.get("needs") == "cuda" and device.type != "cuda":
        return "needs a GPU"
    name = job.method["name"]
    if name != "dense" and name not in PEERS and name not in METHODS:
        return f"no method {name} yet"
    return f"needs {package}" if (package := lacking(name)) else ""


def run_next(waiting: list[Job], options: argparse.Namespace) -> None:
    """The most valuable ones that fit into the time that is left, one after another."""
    end, device = time.monotonic() + 60 * options.minutes, pick_device(options.device)
    for job in waiting:
        left = (end - time.monotonic()) / 60
        needed = minutes_on(job, device, graphs=options.graphs)
        if needed <= left:
            run(job, options)
        else:
            print(f"{job.key}: {needed:.0f} minutes, {left:.0f} are left", flush=True)


def run_only(wanted: list[Job], options: argparse.Namespace) -> None:
    """In the order in which they are named, each run for which there is everything."""

    def place(job: Job) -> int:
        return min(options.names.index(n) for n in (job.name, f"{job.name}.{job.label}") if n in options.names)

    for job in wanted:
        if package := lacking(job.method["name"]):
            print(f"{job.key}: left out, it needs {package}", flush=True)
    able = sorted((job for job in wanted if not lacking(job.method["name"])), key=place)
    if options.side_by_side > 1:
        run_together(able, options)
        return
    if options.minutes is not None:
        raise ValueError("only --minutes goes with --side-by-side; one run at a time goes on until it is done")
    for job in able:
        run(job, options)


def run_together(waiting: list[Job], options: argparse.Namespace) -> None:
    """As many at a time as asked for, in their order; those that run when the time is up go on another time."""
    flags = {"--device": options.device, "--threads": options.threads, "--data-dir": options.data_dir,
             "--weights-dir": options.weights_dir}  # fmt: skip
    common = [f"{flag}={value}" for flag, value in flags.items() if value is not None]

    def command(job: Job) -> list[str]:
        own = [sys.executable, "-m", "benchmarks.run", "only", f"{job.name}.{job.label}", "--seeds", str(job.seed)]
        return [*own, *common, *(["--graphs"] if options.graphs else [])]

    fine = run_side_by_side(
        waiting, command, places=options.side_by_side, start_file=start_file, logs=WORK / "logs",
        seconds=None if options.minutes is None else 60 * options.minutes,
    )  # fmt: skip
    if not fine:
        raise ValueError(f"not every run came to its end; see {WORK / 'logs'}")


_probed: dict[tuple[Any, ...], float] = {}


def minutes_on(job: Job, device: torch.device, *, graphs: bool = False) -> float:
    """From earlier runs alone on hardware of this name, or from a few steps of dense training now."""
    epochs = job.recipe["epochs"] + (job.content.get("start", {}).get("epochs", 0) if job.starts_trained else 0)
    here = environment()["hardware"]
    same = [
        row
        for row in results().values()
        if row["epoch_seconds"]
        and row["setting"]["model"]["name"] == job.content["model"]["name"]
        and row["setting"]["data"]["name"] == job.content["data"]["name"]
        and all(row["setting"]["recipe"].get(k) == job.recipe.get(k) for k in ("precision", "batch_size"))
        and not row["hardware"].get("gpu_shared")
        and [row["hardware"].get(k) for k in ("cpu", "gpu")] == [here[k] for k in ("cpu", "gpu")]
    ]
    of_method = [row for row in same if row["setting"]["method"]["name"] == job.method["name"]] or same
    seconds = [statistics.median(row["epoch_seconds"]) for row in of_method]
    return epochs * (statistics.median(seconds) if seconds else _probe(job, device, graphs)) / 60


def _probe(job: Job, device: torch.device, graphs: bool) -> float:
    """Seconds of an epoch of dense training on random images."""
    recipe = make_recipe(job, threads=1, device=str(device), graphs=graphs)
    data = job.content["data"]["name"]
    key = (job.content["model"]["name"], data, recipe.precision, recipe.batch_size, str(device), graphs)
    steps = PROBE_STEPS if device.type == "cpu" else GPU_PROBE_STEPS
    if key not in _probed:
        size, channels = (8, 1) if data == "digits" else (32, 3)
        classes = 100 if data == "cifar100" else 10
        images = torch.rand(recipe.batch_size, channels, size, size)
        labels = torch.randint(classes, (recipe.batch_size,))
        fake = _Steps([(images, labels)] * steps, classes)
        model = build_model(job.content["model"]["name"], num_classes=classes, in_channels=channels, image_size=size)
        quick = dataclasses.replace(recipe, epochs=2, warmup_epochs=0.0, distill=0.0)
        seconds = train(model, fake.loaders(), quick).last.seconds
        _probed[key] = seconds / steps * IMAGES[data] / recipe.batch_size
    return _probed[key]


@dataclasses.dataclass(frozen=True)
class _Steps:
    batches: list[Any]
    classes: int

    def loaders(self) -> Any:
        from espalier.run.data import Loaders

        return Loaders(self.batches, self.batches[:1], num_classes=self.classes)


# ---------------------------------------------------------------- one run


def run(job: Job, options: argparse.Namespace) -> None:
    """Run, and write the result; says what goes on."""
    target = RUNS / f"{job.key}.json"
    if target.exists():
        raise ValueError(f"{target.name} exists; move it away to run it again")
    print(f"== {job.key}", flush=True)
    if twin := dense_twin(job):
        write_results(job.key, twin, folder=RUNS)
        print(f"{job.key}: the same run as {twin['same_run_as']}", flush=True)
        return
    found = result_of(job, options)
    write_results(job.key, rounded({**found, **environment()}, 7), folder=RUNS)
    print(f"{job.key}: {found['accuracy']:.2f} % at {found['macs_left']:.4f} of the MACs", flush=True)


def dense_twin(job: Job) -> dict[str, Any] | None:
    """The row of a dense network that another recipe has trained in exactly this way; its budget changes nothing for it."""
    if job.method["name"] != "dense":
        return None
    for key, row in results(RUNS).items():
        if (
            (row["label"], row["seed"]) == (job.label, job.seed)
            and not row.get("imported")
            and {**row["setting"], "budget": job.setting["budget"]} == job.setting
        ):
            return {
                **row,
                "recipe": job.name,
                "hash": job.hash,
                "setting": job.setting,
                "same_run_as": row.get("same_run_as", key),
            }
    return None


def make_recipe(job: Job, *, threads: int, device: str, graphs: bool = False) -> Recipe:
    return Recipe.from_dict({**job.recipe, "seed": job.seed, "threads": threads, "device": device, "graphs": graphs})


def result_of(job: Job, options: argparse.Namespace) -> dict[str, Any]:
    """Everything that is measured, in plain numbers."""
    recipe = make_recipe(job, threads=options.threads, device=options.device, graphs=options.graphs)
    device = pick_device(options.device)
    data = make_data(job, options.data_dir).to(device)
    begun = time.perf_counter()
    dense = starting_network(job, data, options)
    prepared = time.perf_counter() - begun
    trainer = _with_espalier if job.method["name"] in METHODS else _with_loop
    found = trainer(job, dense, data, recipe)
    found["seconds"] = {"start": prepared, **found["seconds"], "all": time.perf_counter() - begun}
    return {"recipe": job.name, "label": job.label, "seed": job.seed, "hash": job.hash, "setting": job.setting, **found}


def make_data(job: Job, folder: str | None) -> Data:
    section = job.content["data"]
    data = load_data(section["name"], data_dir=folder, holdout=section.get("holdout", 0))
    assert isinstance(data, Data)
    if "train_images" in section:
        data = with_fewer_images(data, section["train_images"])
    if section.get("choose_by") == "holdout":
        if not data.has_holdout:
            raise ValueError(f"{job.name}: data.choose_by = 'holdout' needs data.holdout")
        return dataclasses.replace(data, test=data.holdout, holdout=data.holdout[:0])
    return data


def with_fewer_images(data: Data, images: int) -> Data:
    """Only so many training images, each class in its share; an epoch goes through them as often as it takes to see as many
    as before, each time augmented anew."""
    before = len(data.train)
    order = stratified_order(data.train.labels.cpu().numpy(), before - images, seed=0)[0]
    some = torch.from_numpy(order).to(data.train.labels.device)
    return dataclasses.replace(data, train=data.train[some.repeat(before // images)])


def starting_network(job: Job, data: Data, options: argparse.Namespace) -> nn.Module:
    """Initial weights by the seed, the published ones, or those of the recipe's ``start``, trained once per seed."""
    model = job.content["model"]
    with seeded(job.seed, torch.device("cpu")):
        network = build_model(
            model["name"], num_classes=data.num_classes, in_channels=data.in_channels, image_size=data.image_size
        )
    if "weights" in model:
        if options.weights_dir is None and options.data_dir is None:
            raise ValueError(
                f"{job.name}: needs the weights {model['weights']}; say where: --weights-dir or --data-dir"
            )
        folder = Path(options.weights_dir) if options.weights_dir else Path(options.data_dir) / "weights"
        load_weights(network, folder / model["weights"])
    elif "start" in job.content and job.starts_trained:
        finished = start_file(job)
        if finished.exists():
            return load(finished, base=network)
        values = {k: v for k, v in job.content["start"].items() if k != "for"}
        common = {"seed": job.seed, "threads": options.threads, "device": options.device, "graphs": options.graphs}
        _train(network, data, Recipe.from_dict({**values, **common}), folder=finished.parent, label="start")
        save(network.cpu(), finished)
    return network.cpu()


def start_file(job: Job) -> Path:
    """The dense network that the recipe's ``start`` has trained with this seed."""
    return WORK / f"{job.name}-start-seed{job.seed}" / "model.safetensors"


def _with_espalier(job: Job, dense: nn.Module, data: Data, recipe: Recipe) -> dict[str, Any]:
    """One of our methods, by the same call that the command line makes."""
    folder = WORK / job.key
    method = make_method({"method": job.method})
    assert method is not None
    budget = budget_of(job, dense, data)
    begun = time.perf_counter()
    compress(
        dense,
        data,
        budget=budget,
        method=method,
        recipe=recipe,
        out=folder,
        resume=(folder / "config.toml").exists(),
        trained=job.starts_trained,
        config={
            "model": {
                **job.content["model"],
                "num_classes": data.num_classes,
                "in_channels": data.in_channels,
                "image_size": data.image_size,
            },
            "data": job.content["data"],
        },
        on_epoch=lambda history: say(job.label, history),
    )
    metrics = json.loads((folder / METRICS).read_text())
    with (folder / LOG).open() as file:
        log = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    small = load(folder / "model.safetensors", base=copy.deepcopy(dense))
    timings = [t for t in metrics["latency"] if t["name"] == "small"]
    return {
        "dense_accuracy": metrics["dense"]["accuracy"],
        **_costs(_cost(metrics["dense"]), _cost(metrics["small"])),
        "accuracy": metrics["small"]["accuracy"],
        "loss": metrics["small"]["loss"],
        "speedup": {f"{t['backend']}, batch {t['batch']}": t["speedup"] for t in timings},
        **({"time": metrics["time"]} if metrics.get("time") else {}),
        "curve": [e["accuracy"] for e in log],
        "macs_curve": [e["macs"] / metrics["dense"]["macs"] for e in log if "macs" in e],
        "epoch_seconds": [e["seconds"] for e in log],
        "seconds": {
            "cut": metrics["cut_seconds"],
            "train": metrics["seconds"],
            "this_call": time.perf_counter() - begun,
        },
        "widths": _widths(small),
        "course": _course(folder / HISTORY),
    }


def budget_of(job: Job, dense: nn.Module, data: Data) -> Budget:
    """With the profile of the recipe's network on this machine, measured once, where it is about time."""
    budget = dict(job.budget)
    if "latency" not in budget:
        return Budget(**budget)
    WORK.mkdir(parents=True, exist_ok=True)
    profile = measured_profile(dense, data.example(), to=WORK / f"{job.name}.onnxruntime.json")
    return Budget(**budget, profile=profile)


def _course(path: Path) -> dict[str, Any]:
    """What a method that factorises has recorded, as far as the documents draw it: ranks at the end, gap after every C step."""
    if not path.exists():
        return {}
    history = json.loads(path.read_text())
    ends = {kind: {n: points[-1:] for n, points in history.get(kind, {}).items()} for kind in ("rank", "full rank")}
    return {kind: series for kind, series in {**ends, "gap": history.get("gap", {})}.items() if series}


def _with_loop(job: Job, dense: nn.Module, data: Data, recipe: Recipe) -> dict[str, Any]:
    """Plain training, after a peer's cut or none."""
    example = data.example().cpu()
    whole = cost(trace(dense, example, rehearse=False))
    model = copy.deepcopy(dense)
    begun = time.perf_counter()
    if job.method["name"] in PEERS:
        torch.manual_seed(job.seed)
        batches = list(data.calibration_batches(batch_size=min(64, len(data.train) // 80), batches=80, seed=job.seed))
        asked, peer = budget_of(job, dense, data), PEERS[job.method["name"]]
        if asked.latency is None:
            assert isinstance(asked.macs, float)
            model = peer(model.cpu(), example, asked.macs, asked.multiple_of, batches)
        else:
            model = within_time(peer, model.cpu(), example, asked, batches)
    cut = time.perf_counter() - begun
    teacher = copy.deepcopy(dense) if job.starts_trained and recipe.distill != 0 else None
    history = _train(model, data, recipe, folder=WORK / job.key, label=job.label, teacher=teacher)
    tested = _tested(model, data, recipe)
    model = model.cpu()
    if job.is_the_start:
        start_file(job).parent.mkdir(parents=True, exist_ok=True)
        save(model, start_file(job))
    return {
        "dense_accuracy": _tested(copy.deepcopy(dense), data, recipe)["accuracy"],
        **_costs(whole, cost(trace(model, example, rehearse=False))),
        "accuracy": tested["accuracy"],
        "loss": tested["loss"],
        "speedup": speed_up(dense, model, example),
        "curve": [e.accuracy for e in history.epochs],
        "macs_curve": [],
        "epoch_seconds": [e.seconds for e in history.epochs],
        "seconds": {"cut": cut, "train": history.seconds},
        "widths": _widths(model),
    }


def within_time(peer: Cut, model: nn.Module, example: torch.Tensor, budget: Budget, batches: list[Any]) -> nn.Module:
    """A peer plans by MACs: the largest share of them whose network is measured within the budget of time, by bisection.

    Raises: ValueError if no network that it makes is fast enough.
    """
    low, high, best = 0.0, 1.0, None
    for _ in range(7):
        share = (low + high) / 2
        try:
            small = peer(copy.deepcopy(model), example, share, budget.multiple_of, batches)
        except ValueError:  # it cannot give up so many
            low = share
            continue
        kept = time_kept(model, small, example, budget)
        assert kept is not None
        if kept.small <= kept.limit:
            low, best = share, small
        else:
            high = share
    if best is None:
        raise ValueError("the peer did not reach the time")
    return best


def speed_up(dense: nn.Module, small: nn.Module, example: torch.Tensor) -> dict[str, float]:
    """Of the small network over the dense one, in turns."""
    models = {"dense": dense, "small": small}
    timings = [t for b in ("torch", "onnxruntime") for t in latency(models, example, backend=b) if t.name == "small"]
    return {f"{t.backend}, batch {t.batch}": t.speedup for t in timings}


def time_again(job: Job) -> None:
    """Replace the speed-up in a result: training may have shared the machine, timing should not."""
    target, trained = RUNS / f"{job.key}.json", WORK / job.key / "model.safetensors"
    if not target.exists() or not trained.exists():
        return
    found = json.loads(target.read_text())
    size = 8 if job.content["data"]["name"] == "digits" else 32
    channels = 1 if size == 8 else 3
    classes = 100 if job.content["data"]["name"] == "cifar100" else 10
    dense = build_model(job.content["model"]["name"], num_classes=classes, in_channels=channels, image_size=size)
    small = load(trained, base=copy.deepcopy(dense))
    torch.set_num_threads(1)
    found["speedup"] = speed_up(dense.eval(), small.eval(), torch.zeros(1, channels, size, size))
    found["timed"] = environment()
    write_results(job.key, rounded(found, 7), folder=RUNS)
    print(f"{job.key}: {rounded(found['speedup'], 3)}", flush=True)


def _train(
    model: nn.Module, data: Data, recipe: Recipe, *, folder: Path, label: str, teacher: nn.Module | None = None
) -> History:
    folder.mkdir(parents=True, exist_ok=True)
    return train(
        model, data, recipe, teacher=teacher, checkpoint=folder / "checkpoint.pt", resume=True,
        on_epoch=lambda history: say(label, history),
    )  # fmt: skip


def say(label: str, history: History) -> None:
    last: Epoch = history.last
    print(
        f"{label} epoch {last.epoch} loss {last.loss:.3f} accuracy {last.accuracy:.2f} {last.seconds:.1f}s", flush=True
    )


def _tested(model: nn.Module, data: Data, recipe: Recipe) -> dict[str, float]:
    device = pick_device(recipe.device)
    batches = data.test_batches(500, channels_last=recipe.channels_last)
    return evaluate(model.to(device), batches, device=device)


def _cost(row: Mapping[str, Any]) -> Cost:
    return Cost(row["macs"], row["params"], row["activation_memory"])


def _costs(dense: Cost, small: Cost) -> dict[str, Any]:
    return {
        "dense": dataclasses.asdict(dense),
        "small": dataclasses.asdict(small),
        "macs_left": small.macs / dense.macs,
        "params_left": small.params / dense.params,
    }


def _widths(model: nn.Module) -> dict[str, int]:
    return {n: m.out_channels for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}


# ---------------------------------------------------------------- rows of the older format


def import_rows(content: Mapping[str, Any], recipes: dict[str, dict[str, Any]], folder: Path = RUNS) -> int:
    """Write every row of an ``accuracy.json`` that has no result yet; returns how many.

    A row goes to the recipe that asks for exactly that training; one that none asks for keeps its own name.
    """
    written = 0
    for row in content["rows"].values():
        name, _, score = row["method"].partition(":")
        method: dict[str, Any] = {"name": name}
        if score:
            method["score" if name == "magnitude" else "importance"] = score
        if name == "magnitude":
            method["share_exponent"] = 1.0  # the only way there was then
        method |= {k: float(v) for k, v in (pair.split("=") for pair in row["settings"].split(",") if pair)}
        budget = {"macs": row["macs"], **({"multiple_of": row["multiple_of"]} if row["multiple_of"] > 1 else {})}
        key = _imported_key(row, method, budget, recipes)
        if (folder / f"{key}.json").exists():
            continue
        recipe = {k: v for k, v in row["recipe"].items() if k != "seed"}
        setting = {
            "model": {"name": row["model"]}, "start": {}, "data": {"name": row["data"]}, "budget": budget,
            "recipe": recipe, "method": method, "trained": row["trained"],
        }  # fmt: skip
        kept = ("accuracy", "macs_left", "params_left", "curve", "epoch_seconds", "widths", "before_training", "forced")
        where = ("date", "revision", "versions", "hardware")
        label = key.rpartition("-seed")[0].partition(".")[2]
        write_results(
            key,
            {
                "recipe": key.partition(".")[0], "label": label, "seed": row["recipe"]["seed"], "imported": True,
                "setting": setting, "seconds": {"all": row["seconds"]}, "speedup": {},
                **{k: row[k] for k in (*kept, *where)},
            },
            folder=folder,
        )  # fmt: skip
        written += 1
    return written


def _imported_key(
    row: Mapping[str, Any], method: Mapping[str, Any], budget: Mapping[str, Any], recipes: dict[str, dict[str, Any]]
) -> str:
    for job in jobs(recipes):
        content = job.content
        asked = {k: v for k, v in Recipe.from_dict(content["recipe"]).to_dict().items() if k not in ("seed", *WHERE)}
        ran = {k: v for k, v in row["recipe"].items() if k not in ("seed", *WHERE)}
        if (
            content["model"]["name"] == row["model"] and ("weights" in content["model"]) == row["trained"]
            and content["data"] == {"name": row["data"]} and job.budget == dict(budget)
            and job.method == method and asked == ran and job.seed == row["recipe"]["seed"]
        ):  # fmt: skip
            return job.key
    label = "-".join(
        [row["method"].replace(":", "-"), *filter(None, [row["settings"].replace(",", "-").replace("=", "")])]
    )
    kind = f"{row['model']}-{row['data']}-{100 * row['macs']:.0f}-{row['recipe']['epochs']}-epochs"
    return f"{kind}.{label}-seed{row['recipe']['seed']}"


if __name__ == "__main__":
    main()
