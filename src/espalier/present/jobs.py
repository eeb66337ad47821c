"""Whole jobs of the command line: compress or only train, with progress, into a run folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from espalier.copies import check_sound, unwrapped
from espalier.methods.agreement import once
from espalier.present.config import (
    Config,
    fit_model_to,
    job_example,
    make_budget,
    make_data,
    make_method,
    make_model,
    make_recipe,
    make_task,
)
from espalier.present.edge import stderr, stdout
from espalier.present.profiling import with_profile
from espalier.present.progress import RunProgress
from espalier.run.batches import Source
from espalier.run.checkpoint import seeded
from espalier.run.compress import compress
from espalier.run.data import Data, FolderData
from espalier.run.evaluate import pick_device
from espalier.run.loggers import Loggers
from espalier.run.loop import Epoch, History, OnEpoch, OnStep, check_fit, train
from espalier.run.models import load_weights
from espalier.run.processes import held, join
from espalier.run.recipe import Recipe
from espalier.run.report import circumstances
from espalier.run.rundir import (
    CHECKPOINT,
    LOG,
    METRICS,
    MODEL,
    begin_folder,
    check_folder,
    unfinished,
    write_log,
    write_sealed,
)
from espalier.run.suspect import suspicion
from espalier.solver import BudgetError
from espalier.surgery import load, save
from espalier.tasks import Classification, Task, to_device


def run_job(
    config: Config,
    *,
    out: Path,
    resume: bool = False,
    force: bool = False,
    download: bool = False,
    log: str = "",
    verify: bool = True,
    known: Mapping[str, float] | None = None,
    beat: Callable[[], None] | None = None,
) -> None:
    """Do what ``config`` says, into ``out``, and to the loggers that ``log`` names; without ``verify`` nothing is proven.

    ``known`` are the dense network's accuracy and loss, if they are; ``beat`` is called after every epoch.
    """
    recipe, method = make_recipe(config), make_method(config)
    own = join(recipe)
    stdout.quiet = not own.first
    timed = method is not None and "latency" in config["budget"]
    budget = None if method is None or timed else make_budget(config, method)
    if download and own.world > 1:
        once(lambda: bool(make_data(config, device="cpu", download=True)))
    data = make_data(config, device=pick_device(recipe.device), download=download and own.world == 1)
    config, task = fit_model_to(config, data), make_task(config)
    if isinstance(data, FolderData):
        stdout.print(data.told, markup=False, soft_wrap=True)
    network = starting_network(config, seed=recipe.seed)
    doubt = None
    if "weights" in config["model"] and isinstance(data, (Data, FolderData)) and task == Classification():
        doubt = suspicion(network.to(pick_device(recipe.device)), data)
    if doubt is not None:
        learns = method is not None and recipe.distill is None
        stderr.print(f"warning: {doubt}{'; it is not made a teacher' if learns else ''}", markup=False, soft_wrap=True)
        recipe = replace(recipe, distill=0.0) if learns else recipe
    network.cpu()
    if method is not None and timed:
        asked, example = config, to_device(job_example(data, task), "cpu")
        config = once(lambda: with_profile(asked, network, example, out=out, resume=resume))
        budget = make_budget(config, method)
    title = f"{config['model']['name']} on {config['data']['name']}"
    with RunProgress(stdout, epochs=recipe.epochs, title=title, metric=task.metric, beat=beat) as progress:
        if method is None:
            with held(out):
                settled = config
                check_fit(network, data, recipe, task=task)  # before a folder is made
                if once(lambda: check_folder(out, resume=resume, force=force)) is None:
                    once(lambda: begin_dense(out, settled, recipe))
                train_only(
                    network, data, recipe, task, out=out, log=log, on_epoch=progress.on_epoch, on_step=progress.on_step
                )
        else:
            options = multiples(config)
            for multiple in options:
                try:
                    compress(
                        network,
                        data,
                        budget=None if budget is None else replace(budget, multiple_of=multiple),
                        method=method,
                        recipe=recipe,
                        out=out,
                        resume=resume,
                        force=force,
                        verify=verify,
                        log=log,
                        dense_result=known,
                        config={n: config[n] for n in ("model", "data", "task") if config.get(n)},
                        task=task,
                        on_epoch=progress.on_epoch,
                        on_step=progress.on_step,
                        on_dense=progress.on_dense,
                    )
                    break
                except BudgetError:  # before anything is written
                    if multiple == options[-1]:
                        raise


def multiples(config: Config) -> list[int]:
    """What widths and ranks are multiples of: what was asked for, else what runs fast; the first that the budget allows.

    Measured (``benchmarks/results/alignment.json``): at any width, half of the MACs hardly save time in ONNX Runtime, and where
    convolutions are depthwise they take twice as long as all of them.  Multiples of 8 are no faster than of 4 there.
    """
    if "multiple_of" in config["budget"]:
        return [config["budget"]["multiple_of"]]
    if "latency" in config["budget"]:  # the profile knows what runs fast
        return [1]
    return [4, 1]


def starting_network(config: Config, *, seed: int) -> nn.Module:
    """The dense network: initial weights by the seed, or the weights that were given."""
    with seeded(seed, torch.device("cpu")):
        network = make_model(config)
    if "weights" in config["model"]:
        load_weights(network, config["model"]["weights"])
    check_sound(unwrapped(network, who=config["model"]["name"]), who=config["model"]["name"])
    return network


def begin_dense(out: Path, config: Config, recipe: Recipe) -> None:
    """The folder of a run that only trains."""
    tables = {**{n: config[n] for n in ("model", "data", "task") if config.get(n)}, "method": {"name": "none"}}
    begin_folder(out, {**tables, "recipe": recipe.to_config()})


def train_only(
    network: nn.Module,
    data: Source,
    recipe: Recipe,
    task: Task,
    *,
    out: Path,
    on_epoch: OnEpoch,
    on_step: OnStep,
    log: str = "",
) -> None:
    """Train ``network`` in place, as it is; from the checkpoint in ``out``, if there is one."""

    loggers = Loggers(log, out) if log else None

    def after_epoch(history: History) -> None:
        write_log(out / LOG, history.epochs, Epoch, metric=task.metric.name)
        if loggers is not None:
            loggers(history)
        on_epoch(history)

    checkpoint = out / CHECKPOINT
    train(
        network,
        data,
        recipe,
        task=task,
        checkpoint=checkpoint,
        resume=once(checkpoint.exists),
        on_epoch=after_epoch,
        on_step=on_step,
    )
    images = len(data.test) if isinstance(data, (Data, FolderData)) else 0
    once(lambda: write_sealed(out / METRICS, circumstances(images)))
    once(lambda: save(network, out / MODEL))


def open_network(path: Path, config: Config) -> nn.Module:
    """The network of a run folder, or of a file of weights with or without structure, in eval mode."""
    file = path / MODEL if path.is_dir() else path
    if path.is_dir() and not file.exists():
        raise unfinished(path)
    network = make_model(config)
    if _has_structure(file):
        return load(file, base=network).eval()
    load_weights(network, file)
    return network.eval()


def _has_structure(file: Path) -> bool:
    """Whether ``es.save`` wrote it; of what cannot be read, ``load_weights`` says what is wrong."""
    try:
        with safe_open(str(file), framework="pt") as content:
            return "espalier" in (content.metadata() or {})
    except (SafetensorError, OSError):
        return False
