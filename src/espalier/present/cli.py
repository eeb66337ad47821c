"""The ``espalier`` command: options become calls of the library, and what comes back is shown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from espalier import __version__
from espalier.costs import cost
from espalier.graph import trace
from espalier.graph.summary import overview, readable_bytes
from espalier.methods.tcp import TCP
from espalier.present import options as opt
from espalier.present.config import (
    Config,
    amounts,
    fit_model_to,
    given,
    hyper_parameters,
    job_example,
    make_data,
    make_model,
    make_recipe,
    make_task,
    merged_settings,
    task_section,
)
from espalier.present.demo import run_demo
from espalier.present.edge import Edge, stdout, stopped
from espalier.present.html import write_report
from espalier.present.jobs import open_network, run_job
from espalier.present.profiling import measured_profile, show_check, time_of
from espalier.present.ship import described, exported, exported_int8, input_of_run, time_told, times, times_table
from espalier.present.show import show_markdown, show_summary
from espalier.present.sweep import as_markdown, judged_by, numbers, points_of, sweep, with_shared_profile
from espalier.run.evaluate import evaluate as evaluate_model, pick_device
from espalier.run.images import Images
from espalier.run.models import load_weights, runs_code
from espalier.run.recipe import Recipe
from espalier.run.rundir import ONNX, PROFILE, SUMMARY, written_at
from espalier.timing.making import collect as collect_profile, export_networks
from espalier.timing.profile import save_profile

app = typer.Typer(
    cls=Edge,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train and prune a network until it fills a budget exactly: an ordinary, smaller PyTorch model.",
)


def _version(wanted: bool) -> None:
    if wanted:
        stdout.print(f"espalier {__version__}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of the program itself."""


BOTH = ("model", "data")


@app.command()
@opt.with_settings(shared=opt.JOB, data=(Images,), recipe=(Recipe,))
def compress(
    macs: opt.Macs = None,
    params: opt.Params = None,
    activation_memory: opt.ActivationMemory = None,
    latency: opt.Latency = None,
    profile: opt.Profile = None,
    runtime: opt.TimeRuntime = None,
    method: opt.Method = None,
    set: opt.Set = None,
    resume: opt.Resume = False,
    force: opt.Force = False,
    log: opt.Log = None,
    tensorboard: opt.Tensorboard = False,
    no_verify: opt.NoVerify = False,
    *,
    job: Mapping[str, Any],
    settings: Mapping[str, dict[str, Any]],
) -> None:
    """Train a network and prune it to a budget; leaves a run folder. With --method none, train only."""
    limits = amounts(macs=macs, params=params, activation_memory=activation_memory)
    time = given(latency=time_of(latency), profile=profile, runtime=runtime)
    wanted = _wanted(job, settings, budget={**limits, **time})
    wanted |= {"method": {**given(name=method), **hyper_parameters(set or [])}}
    out: Path = job["out"]
    own = f" --model {job['model']}" if job["model"] and runs_code(job["model"]) else " --trust" if job["trust"] else ""
    older = None if resume else written_at(out)
    with stopped(f"go on with: espalier compress --out {out} --resume{own}", begun=lambda: written_at(out) != older):
        merged = merged_settings(
            wanted, config=job["config"], out=out, resume=resume, trust=job["trust"], needs=BOTH, has_config=True
        )
        run_job(
            merged,
            out=out,
            resume=resume,
            force=force,
            download=job["download"],
            log=",".join(filter(None, (log, "tensorboard" if tensorboard else None))),
            verify=not no_verify,
        )
    if (out / SUMMARY).exists():
        show_markdown((out / SUMMARY).read_text(encoding="utf-8"), stdout)
    stdout.print(f"{out}", markup=False, soft_wrap=True)


def _wanted(
    job: Mapping[str, Any], settings: Mapping[str, dict[str, Any]], *, budget: Mapping[str, Any] | None = None
) -> Config:
    """Sections as the options have them that a run and a sweep share.  Raises: ValueError without a folder."""
    if job["out"] is None:
        raise ValueError("--out is missing: give the folder that receives the run, or all runs of a sweep")
    return {
        "model": given(name=job["model"], weights=job["weights"]),
        "data": {**given(name=job["data"], dir=job["data_dir"], holdout=job["holdout"]), **settings["data"]},
        "budget": {**(budget or {}), **given(multiple_of=job["multiple_of"], protect=job["protect"])},
        "method": {},
        "task": task_section(job["task"]),
        "recipe": {**settings["recipe"], **({"distill": 0.0} if job["no_distill"] else {})},
    }


@app.command(name="sweep")
@opt.with_settings(shared=opt.JOB, data=(Images,), recipe=(Recipe,))
def sweep_points(
    macs: opt.MacsList = None,
    params: opt.ParamsList = None,
    activation_memory: opt.ActivationMemoryList = None,
    latency: opt.LatencyList = None,
    profile: opt.Profile = None,
    runtime: opt.TimeRuntime = None,
    method: opt.Methods = None,
    seeds: opt.Seeds = 1,
    storage: opt.Storage = None,
    *,
    job: Mapping[str, Any],
    settings: Mapping[str, dict[str, Any]],
) -> None:
    """Run methods at several budgets and seeds: a run folder for each, a table, pictures. Started again, it goes on."""
    wanted, out = _wanted(job, settings, budget=given(profile=profile, runtime=runtime)), job["out"]
    merged = merged_settings(
        wanted, config=job["config"], out=None, resume=False, trust=job["trust"], needs=BOTH, has_config=True
    )
    limits = {"macs": macs, "params": params, "activation_memory": activation_memory}
    texts = {n: text for n, text in limits.items() if text is not None}
    budgets: dict[str, Sequence[float | str]] = {
        n: numbers(f"--{n.replace('_', '-')}", text) for n, text in texts.items()
    }
    if latency is not None:
        budgets["latency"] = [time_of(text) or text for text in latency.split(",")]
        merged = with_shared_profile(merged, out=out, download=job["download"])
    methods = (method or merged["method"].get("name", TCP.name)).split(",")
    points = points_of({**merged, "method": {}}, methods=methods, budgets=budgets, seeds=seeds)
    with stopped("go on with the same command", begun=out.exists):
        rows = sweep(points, out=out, storage=storage, download=job["download"])
    show_markdown(as_markdown(rows, judged_by(points)), stdout)
    stdout.print(f"{out}", markup=False, soft_wrap=True)
    if any(r["state"] == "fail" for r in rows):
        raise typer.Exit(1)


@app.command()
@opt.with_settings(data=(Images, "image_size", "grey"))
def inspect(
    model: opt.ModelArgument,
    data: opt.Data = None,
    data_dir: opt.DataDir = None,
    num_classes: opt.NumClasses = None,
    input: opt.Input = None,
    weights: opt.Weights = None,
    as_json: opt.AsJson = False,
    *,
    settings: Mapping[str, dict[str, Any]],
) -> None:
    """Show what can be removed from a network, what every layer costs, and what is frozen and why."""
    wanted: Config = {"model": given(name=model), "data": {**given(name=data, dir=data_dir), **settings["data"]}}
    if data is not None:
        source = make_data(wanted, device="cpu")
        inputs: tuple[torch.Tensor, ...] = (source.example(),)
        wanted = fit_model_to(wanted, source)
    else:
        wanted, inputs = described(wanted, input, num_classes)
    network = make_model(wanted)
    if weights is not None:
        load_weights(network, weights)
    summary = overview(trace(network, inputs))
    if as_json:
        stdout.print(json.dumps(asdict(summary), indent=1), markup=False, emoji=False, soft_wrap=True)
    else:
        show_summary(summary, stdout)


@app.command()
@opt.with_settings(data=(Images,), recipe=(Recipe, "precision", "device"))
def evaluate(
    path: opt.RunOrFile,
    model: opt.Model = None,
    data: opt.Data = None,
    data_dir: opt.DataDir = None,
    trust: opt.Trust = False,
    *,
    settings: Mapping[str, dict[str, Any]],
) -> None:
    """Accuracy and cost of the network in a run folder, or of a file of weights with --model and --data."""
    _check_holds_network(path, model)
    wanted: Config = {
        "model": given(name=model),
        "data": {**given(name=data, dir=data_dir), **settings["data"]},
        "recipe": settings["recipe"],
    }
    merged = merged_settings(wanted, config=None, out=path, resume=path.is_dir(), trust=trust, needs=BOTH)
    recipe = make_recipe(merged)
    source, task = make_data(merged, device=pick_device(recipe.device)), make_task(merged)
    network = open_network(path, fit_model_to(merged, source)).to(pick_device(recipe.device))
    precision = settings["recipe"].get("precision", "fp32")
    found = evaluate_model(network, source.test_batches(), precision=precision, task=task)
    example = job_example(source, task)
    used = cost(trace(network, example, rehearse=False))
    loss = f", loss {found['loss']:.4f}" if "loss" in found else ""
    stdout.print(f"{task.metric.said(found[task.metric.name])}{loss}")
    memory = readable_bytes(used.activation_memory)
    stdout.print(f"{used.macs:,} MACs, {used.params:,} parameters, {memory} of activations at the peak")
    stdout.print(time_told(path, network, example))


@app.command()
def export(
    path: opt.RunOrFile,
    to: opt.To = None,
    model: opt.Model = None,
    num_classes: opt.NumClasses = None,
    input: opt.Input = None,
    input_names: opt.InputNames = None,
    output_names: opt.OutputNames = None,
    opset: opt.Opset = None,
    dynamic: opt.Dynamic = None,
    int8: opt.Int8 = False,
    calibrate: opt.Calibrate = 4,
    most_lost: opt.MostLost = None,
    runtime: opt.Int8Runtime = "onnxruntime",
    data: opt.Data = None,
    data_dir: opt.DataDir = None,
    trust: opt.Trust = False,
) -> None:
    """Write the network in a run folder, or in a file with --model, for another program, and compare it with PyTorch."""
    _check_holds_network(path, model)
    wanted: Config = {"model": given(name=model), "data": given(name=data)}
    needs = BOTH if int8 else () if path.is_dir() else ("model",)  # of a folder, input_of_run says what is missing
    merged = merged_settings(wanted, config=None, out=path, resume=path.is_dir(), trust=trust, needs=needs)
    target = to or (path / ONNX if path.is_dir() else path.with_suffix(".onnx"))
    if int8:
        target = to or target.with_suffix(".int8.onnx")
        said = exported_int8(
            path, merged, target, batches=calibrate, most_lost=most_lost, runtime=runtime, data_dir=data_dir
        )
    else:
        if path.is_dir():
            input = input_of_run(path, merged["model"], input)
        merged, inputs = described(merged, input, num_classes)
        form = given(input_names=input_names, output_names=output_names, opset=opset, dynamic=dynamic)
        said = exported(path, merged, target, inputs, form=form)
    stdout.print(said, markup=False, soft_wrap=True)


@app.command()
def time(
    networks: Annotated[
        list[str], typer.Argument(help="Run folders, .onnx files or names of networks.", metavar="NETWORK...")
    ],
    runtime: opt.Runtime = "onnxruntime",
    threads: opt.TimeThreads = 1,
    batch: opt.Batch = None,
    input: opt.Input = None,
    trust: opt.Trust = False,
) -> None:
    """Milliseconds of one forward, of several networks in turns; the first is what the others are compared with."""
    found = times(networks, runtime=runtime, threads=threads, batches=batch or [1], given=input or [], trust=trust)
    stdout.print(times_table(found), markup=False, soft_wrap=True)


@app.command()
def profile(
    model: opt.ModelArgument,
    runtime: Annotated[str, typer.Option("--runtime", help="onnxruntime, openvino or torch.")] = "onnxruntime",
    threads: Annotated[int, typer.Option("--threads", help="Of the runtime.", min=1)] = 1,
    batch: Annotated[int, typer.Option("--batch", help="Images at a time.", min=1)] = 1,
    precision: Annotated[
        str, typer.Option("--precision", help="f32 or int8; bf16 or f16 in openvino.", metavar="NAME")
    ] = "f32",
    out: Annotated[Path, typer.Option("--out", help="The profile; one that was interrupted goes on.")] = Path(PROFILE),
    check: Annotated[bool, typer.Option("--check", help="Predict networks that are not in it.")] = False,
    export: Annotated[
        Path | None,
        typer.Option(
            "--export", help="Write networks and a script instead, to be measured on another machine.", metavar="DIR"
        ),
    ] = None,
    collect: Annotated[
        Path | None, typer.Option("--collect", help="Make the profile of what was measured there.", metavar="DIR")
    ] = None,
    num_classes: opt.NumClasses = None,
    input: opt.Input = None,
) -> None:
    """Measure what the layers of a network take in a runtime, at every width: what a budget of time is planned by."""
    config, inputs = described({"model": given(name=model)}, input, num_classes)
    network = make_model(config).eval()
    how: dict[str, Any] = {"runtime": runtime, "threads": threads, "batch": batch, "precision": precision}
    if export is not None:
        place = export_networks(network, inputs, export, **how)
        stdout.print(f"{place}: copy it there and run: python measure.py .", markup=False, soft_wrap=True)
        return
    if collect is not None:
        found = collect_profile(network, inputs, collect)
        save_profile(found, out)
    else:
        with stopped(f"go on with the same command, {out} keeps what was measured", begun=out.exists):
            found = measured_profile(network, inputs, to=out, **how)
    stdout.print(f"{out}: {found.describe()}", markup=False, soft_wrap=True)
    if check:
        show_check(found, network, inputs)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.", metavar="RUN...")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Where the page goes; default: into the first run.", metavar="FILE")
    ] = None,
    csv: Annotated[
        Path | None, typer.Option("--csv", help="The numbers as a table, a row per run.", metavar="FILE")
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option("--runtime", help="What times are of: onnxruntime (where it was there) or torch.", metavar="NAME"),
    ] = None,
    timing: Annotated[bool, typer.Option("--timing/--no-timing", help="Time every layer now.")] = True,
    trust: opt.Trust = False,
) -> None:
    """Write one HTML page about a run, or about several side by side; seeds of a setting are one row, dense runs one more."""
    page = write_report(runs, out=out, table=csv, runtime=runtime, timing=timing, trust=trust)
    stdout.print(f"{page}", markup=False, soft_wrap=True)


@app.command()
def demo(out: Annotated[Path, typer.Option("--out", help="Folder that receives the run.")] = Path("runs/demo")) -> None:
    """Train a ResNet-20 on real handwritten digits; compress it to half of its time on this machine."""
    with stopped("nothing is lost: start the demo again"):
        run_demo(out)


def _check_holds_network(path: Path, model: str | None) -> None:
    """Raises: ValueError unless ``path`` is a folder, or may be a file of weights of a ``model`` that is named."""
    if not path.exists():
        raise ValueError(f"{path}: there is no such run folder or file")
    if path.suffix in (".onnx", ".pt2"):
        also = "; espalier time measures it" if path.suffix == ".onnx" else ""
        raise ValueError(
            f"{path}: is a file for a runtime already{also}; give the run folder that it came from, or weights and --model"
        )
    if path.is_file() and model is None:
        raise ValueError(f"{path}: is a file; say with --model whose weights they are, or give a run folder")
