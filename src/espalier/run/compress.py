"""The whole job in one call: a trained or untrained network and a budget in, a smaller network out."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espalier import __version__
from espalier.copies import check_sound, copy_model, device_of, unwrapped
from espalier.costs import LATENCY, Cost, cost
from espalier.graph import Graph, files, trace
from espalier.graph.watch import TraceError, TraceTimeout
from espalier.methods.agreement import check_run, once, share, take_from_first
from espalier.methods.base import Method, Run, budget_for, need_method, to_go_on
from espalier.methods.scoring import buffers_kept, modes_kept
from espalier.methods.tcp import TCP
from espalier.plan import Budget, Plan
from espalier.run.batches import Batch, Source
from espalier.run.checkpoint import check_entries, fingerprint, read_checkpoint, seeded, take_over
from espalier.run.data import Data, set_aside
from espalier.run.evaluate import evaluate, pick_device
from espalier.run.latency import ms_said
from espalier.run.loggers import Log, Loggers
from espalier.run.loop import Epoch, History, OnEpoch, OnStep, check_fit, train
from espalier.run.processes import held, is_shared, join, tested
from espalier.run.progress import Lines, watched
from espalier.run.recipe import ADDED, WHERE, Recipe
from espalier.run.report import Outcome, write_results
from espalier.run.rundir import (
    CHECKPOINT,
    GRAPH,
    HISTORY,
    LOG,
    PLAN,
    PROFILE,
    WIDTHS,
    add_widths,
    begin_folder,
    check_folder,
    read_sealed,
    write_file,
    write_log,
    write_sealed,
)
from espalier.run.timed import TimeKept, time_kept
from espalier.surgery.verify import Proof, verify as proof_of
from espalier.tasks import Classification, Metric, Task, TaskBatches, example_of, need_task, to_device
from espalier.timing.profile import Profile, save_profile

OnDense = Callable[[Mapping[str, float], bool], None]
"""What to do with accuracy and loss of the dense network, and whether it is the teacher."""


@dataclass(frozen=True)
class Result:
    """A compressed network, the cost that it and the ``dense`` one have, and what became of it on the way (``history``).

    ``limits`` are those of the budget, absolute: MACs, elements, bytes, milliseconds.  ``dense_accuracy`` and ``accuracy`` are
    in percent, ``None`` where there was no data; ``folder`` is where the run was written to.

    ``metric`` and ``dense_metric`` are what the task is judged by, which ``judged_by`` names; for classifiers the accuracies.

    ``cost`` is what ``model`` executes.  ``plan`` says which units of ``graph``, that of the dense network, stayed; ``proof``
    is what ``verify`` found of ``model``, ``None`` if it was not asked.
    """

    model: nn.Module
    dense: Cost
    cost: Cost
    limits: dict[str, float]
    history: History
    dense_accuracy: float | None = None
    accuracy: float | None = None
    folder: Path | None = None
    plan: Plan | None = None
    graph: Graph | None = None
    proof: Proof | None = None
    time: TimeKept | None = None  # what came of a budget of time, measured
    metric: float | None = None
    dense_metric: float | None = None
    judged_by: Metric | None = None

    def __repr__(self) -> str:
        """What was asked, met and lost; the network is ``result.model``."""
        share = self.cost.fraction_of(self.dense)
        parts = [f"{self.cost.macs:,} MACs ({share['macs']:.1%} of {self.dense.macs:,})"]
        parts += [f"{self.cost.params:,} parameters ({share['params']:.1%})"]
        parts += [f"{name} limit {limit:,.0f}" for name, limit in self.limits.items() if name != LATENCY]
        if self.time is not None:
            parts.append(
                f"{ms_said(self.time.small)} of {ms_said(self.time.dense)} ms, limit {ms_said(self.time.limit)} ms"
            )
        if self.judged_by is not None and self.metric is not None:
            before = "" if self.dense_metric is None else f" (dense {self.judged_by.said(self.dense_metric)})"
            parts.append(f"{self.judged_by.said(self.metric)}{before}")
        if self.proof is not None:
            parts.append("proven" if self.proof.passed else "NOT PROVEN")
        if self.folder is not None:
            parts.append(f"in {self.folder}")
        return f"Result({', '.join(parts)})"


class ProofError(ValueError):
    """A finished network is not what was promised.  ``result`` has it, and so has the run's folder."""

    def __init__(self, message: str, result: Result) -> None:
        super().__init__(message)
        self.result = result


def compress(
    model: nn.Module,
    data: Any,
    *,
    budget: Budget | None = None,
    method: Method | None = None,
    recipe: Recipe | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    force: bool = False,
    trained: bool | None = None,
    verify: bool = True,
    dense_result: Mapping[str, float] | None = None,
    config: Mapping[str, Mapping[str, Any]] | None = None,
    on_epoch: OnEpoch | None = None,
    on_step: OnStep | None = None,
    on_dense: OnDense | None = None,
    progress: bool | None = None,
    task: Task | None = None,
    log: Log = (),
) -> Result:
    """Compress a copy of ``model`` to ``budget``; ``model`` itself is not touched.

    Only methods that find the size by themselves go without a ``budget``, for example ``DPRP(energy=0.01)``.

    ``data`` is what ``load_data`` returns, or ``Loaders`` around your own; a one-shot method with data is followed by
    ``recipe.epochs`` of fine-tuning, which may be 0 (``recipe``: how to train, ``Recipe()`` unless given).  For a method that
    needs no training it may also be calibration batches, a list or ``DataLoader`` of inputs or of pairs (inputs, labels), of
    which up to 64 are used to choose by and to estimate BatchNorm anew, or a single example input (a tensor, a tuple of
    arguments, a dictionary of keywords): nothing is trained then.  ``method`` defaults to ``TCP()``.

    ``task`` says what the network is for: ``Classification()`` unless given; see ``espalier.tasks``.

    A ``trained`` network becomes the teacher of its small copy, unless ``recipe.distill`` is 0; ``None``
    means to find out: trained is what classifies training images far better than chance.

    ``progress`` writes a line per epoch to stderr; ``None`` does where that is a terminal or a notebook and no ``on_epoch`` is
    given.

    ``out`` is a folder that receives the run: network, plan, metrics, configuration, log, summary,
    checkpoints.  It is refused if it holds a run already, unless ``resume`` goes on with that run (exactly,
    also after a kill) or ``force`` begins anew and moves the old files aside.  ``config`` adds tables to its
    ``config.toml``, to say where model and data came from.  ``on_dense`` is called once with accuracy and loss of the network
    as it was given, before anything is trained, and with whether it is the teacher.

    ``log``: loggers beside the folder, by name ("tensorboard,wandb,mlflow") or as objects of Lightning Fabric.

    The finished network is proven (``espalier.verify``): it computes what the dense architecture computes when what the plan
    removes reads zero, at the cost that was planned, inside the budget.  ``verify=False`` goes without.  ``on_epoch`` and
    ``on_step`` are called after every epoch and step, with what happened so far.  ``dense_result`` are
    accuracy and loss of ``model``, where an earlier run has them: it is not evaluated again.

    Raises: ValueError if something does not fit together or the budget cannot be met; TrainingDiverged; ProofError if the
    proof fails, after everything is written.

    >>> import torch, espalier as es
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    >>> es.compress(net, torch.zeros(1, 8), budget=es.Budget(macs=0.5), method=es.Magnitude()).cost.macs
    192
    """
    unwrapped(model, who="compress")
    method = method or TCP()
    need_method(method)
    task = need_task(task)
    source, example, calibration = _data_or_example(data, method, task)
    recipe = recipe or Recipe()
    own = join(recipe) if source is not None else share()
    told = own.first and (progress or (progress is None and on_epoch is None and watched()))
    lines = Lines(epochs=recipe.epochs, metric=task.metric) if told else None
    shows = None if lines is None else lines.on_epoch
    if source is not None and method.trains and recipe.epochs == 0:
        raise ValueError(f"{method.name} works while the network trains: give Recipe(epochs=1) or more")
    if out is None and (resume or force):
        raise ValueError("compress(resume=True or force=True): say which run: out=FOLDER")
    folder = None if out is None else Path(out)
    loggers = Loggers(log, folder) if log else None
    with held(folder):
        earlier = None if folder is None else once(lambda: check_folder(folder, resume=resume, force=force))
        job = _Job(model, source, example, budget, method, recipe, calibration, task)
        job.judge(earlier, trained, dense_result)
        job.describe(earlier, config or {})
        with seeded(recipe.seed, job.device):
            job.place(folder, resumes=earlier is not None)
            if job.cuts:
                with job.cutting():
                    run = method.start(job.small, example, job.budget_now, batches=job.few_batches())
                job.started(run)
            if not own.first:
                job.folder = None  # one writes
            job.write_down(resumes=earlier is not None)
            for hears in (None if lines is None else lines.on_dense, on_dense):
                if hears is not None and job.dense_result and own.first:
                    hears(job.dense_result, job.teacher is not None)
            if job.source is not None and recipe.epochs:
                history = train(
                    job.small,
                    job.source,
                    recipe,
                    run=job.run,
                    teacher=job.teacher,
                    task=task,
                    checkpoint=job.checkpoint,
                    resume=job.goes_on,
                    on_epoch=job.logged(*(each for each in (shows, loggers, on_epoch) if each is not None)),
                    on_step=on_step,
                )
                job.history = _with_cost(history, job.constant)
                if loggers is not None:
                    loggers.close()
            if job.run is not None:
                with job.cutting():
                    job.small = job.run.finish()
                job.finished(job.run)
        return job.result(verify=verify)


class _Job:
    """What one call of ``compress`` has to do and has found; ``compress`` itself goes step by step."""

    def __init__(
        self,
        model: nn.Module,
        source: Source | None,
        example: Any,
        budget: Budget | None,
        method: Method,
        recipe: Recipe,
        calibration: list[Batch] | None,
        task: Task,
    ) -> None:
        model = unwrapped(model, who="compress")
        check_sound(model, who="compress")
        self.own = share()  # of every batch, where several processes train
        if self.own.world > 1:
            model = copy_model(model, {})
            take_from_first(model)
        if source is not None:
            source = set_aside(source, method.withholds)
        self.model, self.source, self.example = model, source, example
        self.budget, self.method, self.recipe = budget_for(method, budget), method, recipe
        self.limited = budget is not None
        self.calibration, self.task = calibration, task
        self.home = device_of(model)
        self.device = pick_device(recipe.device) if source is not None else self.home
        graph = self._traced()  # within a limit, which a forward that is run has not
        if source is not None:
            check_fit(model, source, replace(recipe, distill=None), task=task)
        self.dense = cost(self.budget.timed(graph))
        self.limits = {} if budget is None else budget.limits(self.dense)
        self.teacher: nn.Module | None = None
        self.run: Run | None = None  # of a method that works while the network trains
        self.history = History()
        self.plan: Plan | None = None
        self.graph: Graph | None = None
        self.test_images = 0
        self.course: dict[str, Any] = {}
        self.skipped: dict[str, str] = {}
        self.predicted: float | None = None  # milliseconds
        self.step_above: float | None = None
        self.dense_result: dict[str, float] = {}
        self.cut_seconds = 0.0

    def _traced(self) -> Graph:
        """Raises: TraceError; where the data is what the network does not take, ValueError in those words."""
        try:
            return trace(self.model, self.example, rehearse=self.budget.latency is not None)
        except TraceTimeout:
            raise
        except TraceError:
            if self.source is not None:
                check_fit(self.model, self.source, replace(self.recipe, distill=None), task=self.task)
            raise

    def judge(self, earlier: Mapping[str, Any] | None, trained: bool | None, known: Mapping[str, float] | None) -> None:
        """Evaluate the dense network, and find out whether its small copy can learn from it."""
        self.trained = bool(trained)
        if self.source is None:
            return
        reference = copy_model(self.model, {}).to(self.device)
        if isinstance(self.source, Data):
            self.source = self.source.to(self.device)
        self.dense_result = self._tested(reference) if known is None else dict(known)
        if trained is None and earlier is not None:
            trained = earlier.get("start", {}).get("trained")
        source, task = self.source, self.task
        self.trained = once(lambda: _is_trained(reference, source, task)) if trained is None else bool(trained)
        if self.trained and self.recipe.distill != 0 and self.task.follows:
            self.teacher = reference
        check_fit(reference, self.source, self.recipe, teacher=self.teacher, task=self.task)

    def place(self, folder: Path | None, *, resumes: bool) -> None:
        """A copy of the network where it is going to be trained, as it is or as the checkpoint has it."""
        self.folder = folder
        self.checkpoint = None if folder is None else folder / CHECKPOINT
        content = once(lambda: _checkpoint(self.checkpoint) if resumes else None)
        self.goes_on = content is not None
        if content is not None:
            check_entries(content, where=str(self.checkpoint))
        self.state = (content or {}).get("process") or {}  # of the run that goes on
        self.small = copy_model(self.model, {}).to(self.device)
        if content is not None:
            take_over(self.small, content, where=str(self.checkpoint))
            if not self.method.trains:
                self.plan, self.graph, self.course, self.skipped = once(lambda: _recalled(folder))

    @property
    def cuts(self) -> bool:
        """Whether the method has something to do still."""
        return self.method.trains or not self.goes_on

    @property
    def budget_now(self) -> Budget:
        """Fractions are of the network that the run began with, not of what is left of it by now."""
        return to_go_on(self._absolute_budget(), self.state) if self.goes_on and self.limited else self.budget

    @contextmanager
    def cutting(self) -> Iterator[None]:
        """Inside it is the method's time."""
        begun = time.perf_counter()
        yield
        self.cut_seconds += time.perf_counter() - begun

    def started(self, run: Run) -> None:
        """The method has begun, or is through with everything."""
        check_run(run)
        if not self.method.trains:
            self.small = run.finish()
            self._take_from(run)
            return
        self.run, run.folder = run, self.folder
        if self.method.withholds and self.source is not None and self.source.has_holdout:
            run.held_out = TaskBatches(_HeldOut(self.source, self.device), self.task)

    def few_batches(self) -> TaskBatches | None:
        """A few training batches on the device, for methods that measure before they cut."""
        if self.source is None:
            return None if self.calibration is None else TaskBatches(to_device(self.calibration, self.home), self.task)
        source, recipe = self.source, self.recipe
        chosen = source.calibration_batches(batch_size=recipe.batch_size, batches=8, seed=recipe.seed)
        if is_shared(source):  # everybody measures on the same
            chosen = iter(once(lambda: list(chosen)))
        return TaskBatches(to_device(list(chosen), self.device), self.task)

    def describe(self, earlier: Mapping[str, Any] | None, more: Mapping[str, Mapping[str, Any]]) -> None:
        """Say what is going to be done, and see that it is what was done so far."""
        self.config = {
            **{name: dict(table) for name, table in more.items()},
            "budget": self.budget.settings if self.limited else {},
            "method": {"name": self.method.name, **asdict(self.method)},
            "recipe": self.recipe.to_config() if self.source is not None else {},
            **({} if self.task == Classification() else {"task": {**self.task.to_dict(), **more.get("task", {})}}),
            "start": {"trained": self.trained, "weights": fingerprint(self.model)},
            "versions": {"espalier": __version__, "torch": str(torch.__version__), "python": platform.python_version()},
        }
        if earlier is not None:
            _check_same(earlier, self.config)

    def write_down(self, *, resumes: bool) -> None:
        """What is going to be done, and the plan of a method that is through."""
        if self.folder is not None and not resumes:
            begin_folder(self.folder, self.config)
            timed = self.budget if self.run is None else self.run.budget
            if isinstance(timed.profile, Profile):
                save_profile(timed.profile, self.folder / PROFILE)
            self._write_plan()

    def logged(self, *then: OnEpoch) -> OnEpoch:
        """Write the log, and then the others."""
        constant = self.constant

        def after_epoch(history: History) -> None:
            history = _with_cost(history, constant)
            if self.folder is not None:
                write_log(self.folder / LOG, history.epochs, Epoch, metric=self.task.metric.name)
                if self.run is not None:
                    add_widths(self.folder / WIDTHS, history.last.epoch, self.run.widths)
            for each in then:
                each(history)

        return after_epoch

    @cached_property
    def constant(self) -> dict[str, int]:
        """The cost where training does not change it."""
        return {} if self.method.trains else cost(trace(self.small, self.example, rehearse=False)).counts

    def finished(self, run: Run) -> None:
        self._take_from(run)
        self._write_plan()

    def _take_from(self, run: Run) -> None:
        self.plan, self.graph = run.plan, run.dense_graph
        self.course, self.skipped = run.history, run.skipped
        self.predicted, self.step_above = run.cost.latency, run.step_above

    def _write_plan(self) -> None:
        if self.folder is not None and self.plan is not None:
            write_file(self.folder / PLAN, self.plan.to_json().encode())
            if self.graph is not None:
                write_file(self.folder / GRAPH, files.to_json(self.graph).encode())
            if self.course or self.skipped:
                write_sealed(self.folder / HISTORY, {**self.course, "skipped": self.skipped})

    def result(self, *, verify: bool) -> Result:
        """Evaluate, check what was promised, write the results, and only then complain."""
        found = replace(cost(trace(self.small, self.example, rehearse=False)), latency=self.predicted)
        small_result = self._tested(self.small) if self.source is not None else {}
        small = _in_modes_of(self.model, self.small.to(self.home))
        proof = once(lambda: self._proof(small)) if verify else None
        time_of = once(lambda: time_kept(self.model, small, self.example, self.budget, above=self.step_above))
        result = Result(
            model=small,
            dense=self.dense,
            cost=found,
            limits=self.limits,
            history=self.history,
            dense_accuracy=self.dense_result.get("accuracy"),
            accuracy=small_result.get("accuracy"),
            metric=small_result.get(self.task.metric.name),
            dense_metric=self.dense_result.get(self.task.metric.name),
            judged_by=self.task.metric,
            folder=self.folder,
            plan=self.plan,
            graph=self.graph,
            proof=proof,
            time=time_of,
        )
        if self.folder is not None:
            outcome = Outcome(
                result=result,
                dense_model=self.model,
                example=self.example,
                dense_result=self.dense_result,
                small_result=small_result,
                cut_seconds=self.cut_seconds,
                skipped=self.skipped,
                config=self.config,
                preprocessing=None if self.source is None else getattr(self.source, "preprocessing", None),
                test_images=self.test_images,
            )
            write_results(self.folder, outcome)
        self._require(result)
        return result

    def _proof(self, small: nn.Module) -> Proof | None:
        """``None`` where the plan is not known, of a one-shot run that an older version began."""
        if self.plan is None or self.graph is None:
            return None
        budget = self._absolute_budget().counted if self.limited else None
        # what was trained, or measured on data, has weights of its own
        own = self.source is not None or self.calibration is not None or self.method.trains
        return proof_of(
            self.model, self.graph, self.plan, self.example, small=small, trained=own, budget=budget, fills=False
        )

    def _require(self, result: Result) -> None:
        """Raises: ProofError unless every limit and the proof hold."""
        found = result.cost.counts  # time is measured
        over = {m: found[m] for m, limit in self.limits.items() if m in found and found[m] > limit}
        failed = [f"{m}={amount:,}, above the budget of {self.limits[m]:,}" for m, amount in over.items()]
        failed += [f"{c.name}: {c.detail}" for c in result.proof.checks if not c.passed] if result.proof else []
        if failed:
            where = "its result" if result.folder is None else str(result.folder)
            raise ProofError(
                f"{self.method.name}: the finished network is not what was promised, which is a fault of the method or of "
                f"surgery; everything is kept in {where}\n  " + "\n  ".join(failed),
                result,
            )

    def _absolute_budget(self) -> Budget:
        macs, params = self.limits.get("macs"), self.limits.get("params")
        memory = self.limits.get("activation_memory")
        return replace(self.budget, macs=macs, params=params, activation_memory=memory)

    def _tested(self, model: nn.Module) -> dict[str, float]:
        assert self.source is not None
        found, self.test_images = tested(
            model, self.source, self.own,
            device=self.device, task=self.task, channels_last=self.recipe.channels_last,
        )  # fmt: skip
        return found


def _checkpoint(path: Path | None) -> dict[str, Any] | None:
    return None if path is None or not path.exists() else read_checkpoint(path)


def _recalled(folder: Path | None) -> tuple[Plan | None, Graph | None, dict[str, Any], dict[str, str]]:
    """What a method that acted at once has decided and recorded: the checkpoint does not hold it."""
    plan, graph, course, skipped = None, None, {}, {}
    if folder is not None and (folder / PLAN).exists() and (folder / GRAPH).exists():  # older runs wrote no graph
        plan = Plan.from_json((folder / PLAN).read_text(encoding="utf-8"))
        graph = files.from_json((folder / GRAPH).read_text(encoding="utf-8"))
    if folder is not None and (folder / HISTORY).exists():
        course = read_sealed(folder / HISTORY)
        skipped = course.pop("skipped", None) or course.pop("left", {})  # older runs: "left"
    return plan, graph, course, skipped


class _HeldOut:
    """The held-out images on the device, batch by batch, as often as they are gone through."""

    def __init__(self, source: Source, device: torch.device) -> None:
        self.source, self.device = source, device

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.source.holdout_batches():
            yield to_device(batch, self.device)


def _data_or_example(data: Any, method: Method, task: Task) -> tuple[Source | None, Any, list[Batch] | None]:
    """Where training batches come from, an example, and batches to calibrate by where there is no training."""
    batches = isinstance(data, (list, torch.utils.data.DataLoader))
    if batches or isinstance(data, (Tensor, tuple, dict)):
        if method.trains:
            raise ValueError(
                f"{method.name} works while the network trains, so it needs data: give load_data(...) or "
                "Loaders(train, test, num_classes=...); Magnitude() needs only an example or a few batches"
            )
        if not batches:
            return None, data, None
        calibration = [_pair(item, number, task) for number, item in enumerate(islice(data, CALIBRATION))]
        if not calibration:
            raise ValueError("compress: there are no calibration batches; give one or more, or an example input")
        return None, example_of(calibration[0][0]), calibration
    if isinstance(data, (str, os.PathLike)):
        name = os.fspath(data)
        name = f"imagefolder:{name}" if Path(name).is_dir() else name
        raise ValueError(f"compress: data is not a name; give load_data({name!r})")
    try:
        return data, data.example(1) if _is_plain(data, task) else _example(data, task), None
    except AttributeError as error:
        raise ValueError(
            f"compress: data is a {type(data).__name__}; give load_data(...), Loaders(...), calibration batches (a list or a "
            "DataLoader) or an example"
        ) from error


def _pair(item: Any, number: int, task: Task) -> Batch:
    """Inputs and targets; none where the batch is of inputs only."""
    if isinstance(item, Tensor):
        return item, torch.empty(0, dtype=torch.int64)
    if task != Classification():
        return task.split(item)
    if isinstance(item, (tuple, list)) and len(item) == 2 and all(isinstance(t, Tensor) for t in item):
        return item[0], item[1]
    raise ValueError(
        f"compress: calibration batch {number} is a {type(item).__name__}; give tensors of inputs, or pairs (inputs, labels); "
        "the arguments of one call are a tuple"
    )


CALIBRATION = 64  # batches at most that a method without training is given


def _is_plain(source: Source, task: Task) -> bool:
    """Whether batches are images and class numbers, as methods know them."""
    return source.num_classes is not None and task == Classification()


def _example(source: Source, task: Task) -> Any:
    """The first input of the first training batch, as the task takes it apart."""
    batch = next(iter(source.calibration_batches(batch_size=1, batches=1)))
    return example_of(task.split(batch)[0])


def _is_trained(model: nn.Module, source: Source, task: Task) -> bool:
    """A quarter of the way from chance to perfect, on up to 1024 training images; of a task in which chance is not known, half
    of the loss that the same network has with new weights."""
    batches = source.calibration_batches(batch_size=256, batches=4)
    if source.num_classes is None or not _is_plain(source, task):
        seen = list(batches)
        fresh = copy_model(model, {})
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for module in fresh.modules():
                reset = getattr(module, "reset_parameters", None)
                if callable(reset):
                    reset()
            own, new = (_training_loss(network, seen, task) for network in (model, fresh))
        return own < 0.5 * new
    found = evaluate(model, batches)
    chance = 100.0 / source.num_classes
    return found["accuracy"] > chance + 0.25 * (100.0 - chance)


def _training_loss(model: nn.Module, batches: list[Any], task: Task) -> float:
    """In train mode, in which every task has a loss, and statistics of BatchNorm that were never estimated do not matter."""
    device = device_of(model)
    with modes_kept(model), buffers_kept(model), torch.no_grad():
        model.train()
        pairs = [to_device(task.split(batch), device) for batch in batches]
        return sum(float(task.loss(task.forward(model, x, y), y)) for x, y in pairs) / len(pairs)


def _with_cost(history: History, constant: dict[str, int]) -> History:
    """Fine-tuning does not change the cost; the log says it all the same."""
    return History(tuple(replace(e, **constant) for e in history.epochs)) if constant else history


def _in_modes_of(model: nn.Module, small: nn.Module) -> nn.Module:
    """Every module of ``small`` in train or eval mode as that of ``model``; what is new, as what it is part of."""
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in small.named_modules():  # what it is part of comes first
        module.training = modes.setdefault(name, modes[name.rpartition(".")[0]])
    return small


ORIGIN = {"model": ("name", "num_classes", "in_channels", "image_size"), "data": ("name", "holdout", "image_size")}
"""What a configuration may say of where model and data came from, and has to stay; files may be moved."""


def _check_same(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """A run goes on as it began: same method, budget and recipe, and as far as is known model, data and weights."""
    for table in ("method", "budget", "recipe", "task", *ORIGIN, "start"):
        then, new = _said(earlier, table), _said(now, table)
        for key in _compared(table, then, new):
            if then.get(key) != new.get(key):
                raise ValueError(
                    f"cannot resume: {table}.{key} was {then.get(key)} and is {new.get(key)} now; "
                    "give what the run began with, or begin a new one"
                )


def _compared(table: str, then: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    if table in ORIGIN:
        return [key for key in ORIGIN[table] if key in then and key in new]
    if table == "start":
        return [key for key in then if key != "weights" or new.get("trained")]
    return [key for key in {**new, **then} if key not in WHERE]


def _said(config: Mapping[str, Any], table: str) -> dict[str, Any]:
    said = _plain(config.get(table, {}))
    if table == "recipe":
        return {**ADDED, **said}
    if table == "method":
        return Method.as_of_now(said)
    if table == "data" and "name" in said:
        return {"holdout": 0, **said, "name": str(said["name"]).partition(":")[0]}  # imagefolder:PATH
    return said


def _plain(table: Mapping[str, Any]) -> dict[str, Any]:
    """As the table reads once it has been through TOML."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in table.items() if v is not None}
