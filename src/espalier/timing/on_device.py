"""Measure exported networks, node by node, where they will run.  A script of its own: needs Python, numpy and the runtime.

    python measure.py FOLDER                # folder made by: espalier profile MODEL --export FOLDER

Every network gets a ``*.json`` beside it; what is there already is not measured again, so a stopped run goes on.
"""

from __future__ import annotations

import io
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

WARM_UP = 2
LEAST, MOST = 8, 4000  # runs of one network
BURST = 4  # runs in a row whose node times OpenVINO tells apart from those before
WATCHED = 32  # runs of a turn whose nodes are looked at, at most: what a runtime writes down of thousands takes longer to read
AGREE = 0.05  # halves of the runs whose fastest differ by more are run again
TURN = 0.02  # seconds of one network in turns with others
OPENINGS = 10  # of every network in a race, at most
SETTLED = 0.01  # shares that another opening changes by less are believed
FEW = 3  # turns at a network's best that have to be alike
PACE = 0.08  # turns that differ by less were of a machine at the same speed
WAIT = 1.5  # seconds for a machine to be as fast as it can be, at most
SETTINGS = "settings.json"

Forward = Callable[[], None]
Nodes = list[tuple[str, str, float]]  # name, operation, milliseconds of the fastest runs; in the order of execution
Opened = tuple[
    Forward, Forward, Callable[[], Nodes]
]  # the network alone, the network watched, and what was seen of its nodes


def measure(
    content: bytes,
    *,
    runtime: str,
    threads: int,
    batch: int,
    precision: str,
    seconds: float,
    beside: bytes | None = None,
    pace: float = 0.0,
) -> dict[str, Any]:
    """Milliseconds of the whole network and of every node, and how far two halves of the runs differ.

    Alone and watched in turns, because what else the machine does then meets both.  So is another network ``beside``, if one
    is given: what it takes says how fast the machine is now.  A turn is many runs: in service a network runs after itself, and
    caches that another one has filled take more than a few runs to forget it (VGG-16's hold its weights after some ten).

    A processor that is shared goes at one speed while its other half rests and at two thirds of it while it does not, for
    tenths of seconds to seconds at a time, and not every network loses as much.  So runs count while ``beside`` takes about
    its ``pace``, the milliseconds that it takes on a machine at rest; what is not known is looked for first.
    """
    if runtime in APART and not _Apart.serves:
        files = [content] if beside is None else [content, beside]
        how = {"runtime": runtime, "threads": threads, "batch": batch, "precision": precision}
        found: dict[str, Any] = _apart().ask("measure", files, {**how, "seconds": seconds, "pace": pace})
        return found
    alone, watched, nodes = RUNTIMES[runtime](content, threads, batch, precision)
    other = None if beside is None else RUNTIMES[runtime](beside, threads, batch, precision)[0]
    for _ in range(WARM_UP):
        for call in (alone, watched, *([] if other is None else [other])):
            call()
    clock, judge = _clock(threads), other or alone
    best = 1e-3 * pace * _slower[0] or _pace(judge, threads, 4 * seconds)
    waits = clock() + min(WAIT, 5 * seconds)
    times: list[float] = []
    others: list[float] = []
    for _ in range(3):
        begin, runs = clock(), 0
        while runs < LEAST or (runs < MOST and clock() - begin < seconds):
            now = _runs(judge, threads)
            while _warm(now) > (1 + PACE) * best and clock() < waits:
                begin, now = clock(), _runs(judge, threads)
            own = _runs(alone, threads)
            for _ in range(min(max(len(own) + 1, BURST), WATCHED)):
                watched()
            times, others, runs = times + own, others + now, runs + len(own)
        spread = _spread(times)
        if spread <= AGREE:
            break
    if pace:
        _slower[0] = max(1e3 * _fast(others or times) / pace, 1.0)
    found = {"whole": 1e3 * _fast(times), "spread": spread, "nodes": nodes()}
    return found if other is None else {**found, "beside": 1e3 * _fast(others)}


def race(
    contents: list[bytes], *, runtime: str, threads: int, batch: int, precision: str, seconds: float, pace: float = 0.0
) -> list[float]:
    """Milliseconds of several networks, in turns, because the speed of a machine drifts (see ``measure``).

    A turn is many runs, of which the first half does not count: in service a network runs after itself, with its own weights
    in the caches.  Of all turns a network's best ones count, once there are some that are alike: they are those of a machine
    at rest.  Opened anew, half of ``seconds`` each, until that is so, their shares stand, and the first network takes about
    its ``pace``, milliseconds on a machine at rest, if that is known: on a busy machine that takes longer, once.  One that
    did not come to rest in all that time is measured as it is, until it is seen at rest again.
    """
    if runtime in APART and not _Apart.serves:
        how = {"runtime": runtime, "threads": threads, "batch": batch, "precision": precision}
        shares_of: list[float] = _apart().ask("race", contents, {**how, "seconds": seconds, "pace": pace})
        return shares_of
    turns: list[list[float]] = [[] for _ in contents]
    clock, shares = _clock(threads), np.zeros(len(contents))
    for _ in range(OPENINGS):
        calls = [RUNTIMES[runtime](content, threads, batch, precision)[0] for content in contents]
        begin, rounds = clock(), 0
        while rounds < 5 or clock() - begin < seconds / 2:
            for own, call in zip(turns, calls, strict=True):
                own.append(_turn(call, threads))
            rounds += 1
        took = np.array([_level(own) for own in turns])
        before, shares = shares, took / took.sum()
        at_rest = all(_alike(own) for own in turns) and (not pace or 1e3 * took[0] <= (1 + PACE) * _slower[0] * pace)
        if at_rest and np.abs(before / shares - 1.0).max() <= SETTLED:
            break
    if pace:
        _slower[0] = max(1e3 * float(took[0]) / pace, 1.0)
    return [1e3 * float(t) for t in took]


_slower = [1.0]  # than at rest, by what factor: this machine as it was last seen


def version(runtime: str) -> str:
    """Of the runtime that is installed here."""
    if runtime == "onnxruntime":
        import onnxruntime

        return str(onnxruntime.__version__)
    if runtime == "torch":
        import torch

        return str(torch.__version__)
    import openvino

    return str(openvino.__version__).partition("-")[0]


def processor() -> str:
    """This machine's processor, with family and model where they are told: clouds have one name for several generations."""
    facts: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                key, _, value = line.partition(":")
                facts.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    names = (facts.get(key) for key in ("model name", "Hardware", "Model"))
    name = next(filter(None, names), platform.processor() or platform.machine())
    marks = (("cpu family", "family"), ("model", "model"), ("CPU part", "part"))
    return ", ".join([name, *(f"{what} {facts[key]}" for key, what in marks if key in facts)])


Clock = Callable[[], float]


def _clock(threads: int) -> Clock:
    """Seconds.  Of one thread those on the processor: what others take meanwhile is not its own."""
    return time.process_time if threads == 1 else time.perf_counter


def _once(call: Forward, threads: int) -> float:
    """Seconds of one call."""
    clock = _clock(threads)
    begin = clock()
    call()
    return clock() - begin


def _runs(call: Forward, threads: int) -> list[float]:
    """Seconds of every call of a turn, but for the first."""
    call()
    times = [_once(call, threads)]
    while sum(times) < TURN or len(times) < 2:
        times.append(_once(call, threads))
    return times


def _turn(call: Forward, threads: int) -> float:
    """Seconds of one call in a turn."""
    return _warm(_runs(call, threads))


def _warm(times: list[float]) -> float:
    """Of the calls of a turn the median of the later half: the first ones find the caches as others left them."""
    return float(np.median(times[len(times) // 2 :]))


def _pace(call: Forward, threads: int, seconds: float) -> float:
    """Seconds of one call on a machine at rest, as far as ``seconds`` show it."""
    clock, turns = _clock(threads), [_turn(call, threads)]
    begin = clock()
    while len(turns) < FEW or clock() - begin < seconds:
        turns.append(_turn(call, threads))
    return _level(turns)


def _level(turns: list[float]) -> float:
    """Of a network's turns the mean of the best few."""
    return float(np.mean(sorted(turns)[:FEW]))


def _alike(turns: list[float]) -> bool:
    best = sorted(turns)[:FEW]
    return best[-1] <= (1 + AGREE) * best[0]


def _fast(times: list[float]) -> float:
    """The mean over the fastest quarter, as others only add time, without the least of all, which come about by chance."""
    return float(np.mean(sorted(times)[len(times) // 20 : max(1, len(times) // 4)]))


Mean = dict[tuple[str, str], float]
Seen = dict[tuple[str, str], list[float]]  # name and operation of a node -> milliseconds of every run


def _fastest(seen: Seen) -> Nodes:
    return [(name, kind, _fast(times)) for (name, kind), times in seen.items()]


def _spread(times: list[float]) -> float:
    one, two = _fast(times[::2]), _fast(times[1::2])
    return abs(one - two) / max(min(one, two), 1e-9)  # coarse clocks say zero


# -- runtimes: how to run a network, and how to ask for the times of its nodes


def session(content: bytes, *, threads: int = 1, profile: str = "") -> Any:
    """An ONNX Runtime session on the CPU; errors are raised, not logged.  ``profile``: how the file of node times begins."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _onnxruntime(content: bytes, threads: int, batch: int, precision: str) -> Opened:
    folder = tempfile.TemporaryDirectory()

    @cache
    def ready(watched: bool) -> tuple[Any, dict[str, Any]]:
        prefix = os.path.join(folder.name, "profile") if watched else ""
        opened = session(content, threads=threads, profile=prefix)
        kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32}
        feeds = {i.name: _input(i.shape, kinds.get(i.type, np.float32), batch) for i in opened.get_inputs()}
        return opened, feeds

    plain, inputs = ready(False)

    def watch() -> None:
        opened, own = ready(True)
        opened.run(None, own)

    def nodes() -> Nodes:
        events = json.loads(Path(ready(True)[0].end_profiling()).read_text(encoding="utf-8"))
        folder.cleanup()
        seen: Seen = {}
        for event in events:  # a name stands for one node, the first run has all of them in the order of execution
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                key = (event["name"].removesuffix("_kernel_time"), event["args"].get("op_name", ""))
                seen.setdefault(key, []).append(1e-3 * event["dur"])
        return _fastest(seen)

    return lambda: plain.run(None, inputs), watch, nodes


def _between(early: Mean, late: Mean, first: int, last: int) -> Mean:
    """Mean milliseconds of the runs after ``first`` up to ``last``, from the means over all runs up to either.

    A reordering of data may be there in later runs only.
    """
    return {n: max(last * mean - first * early.get(n, 0.0), 0.0) / (last - first) for n, mean in late.items()}


def _openvino(content: bytes, threads: int, batch: int, precision: str) -> Opened:
    import openvino

    def request(watched: bool) -> tuple[Any, list[Any]]:
        core = openvino.Core()
        model = core.read_model(content)
        shapes = {
            i: [batch if number == 0 and d.is_dynamic else d.get_length() for number, d in enumerate(i.partial_shape)]
            for i in model.inputs
        }
        model.reshape(shapes)
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,  # pinned to a core that others use, it would wait for them
            "INFERENCE_PRECISION_HINT": "f32" if precision == "int8" else precision,  # eight bits stand in the file
            "PERF_COUNT": watched,
        }
        compiled = core.compile_model(model, "CPU", settings)
        kinds = [i.get_element_type().to_dtype() for i in compiled.inputs]
        inputs = [_input(list(i.shape), k, batch) for i, k in zip(compiled.inputs, kinds, strict=True)]
        return compiled.create_infer_request(), inputs

    plain, inputs = request(False)
    fresh: list[Any] = []  # requests whose node times have not been read
    seen: Seen = {}

    def watch() -> None:
        """The runtime tells means over all runs so far: of a new request, the runs after the first two, by difference."""
        if not fresh:
            fresh.append((*request(True), []))
        watched, own, means = fresh[0]
        watched.infer(own)
        means.append({(n.node_name, n.node_type): 1e3 * n.real_time.total_seconds()
                      for n in watched.get_profiling_info() if n.status == n.Status.EXECUTED})  # fmt: skip
        if len(means) == 2 + 2 * BURST:
            for first, last in ((2, 2 + BURST), (2 + BURST, 2 + 2 * BURST)):
                for node, took in _between(means[first - 1], means[last - 1], first, last).items():
                    seen.setdefault(node, []).append(took)
            fresh.clear()

    return lambda: plain.infer(inputs), watch, lambda: _fastest(seen)


def _torch(content: bytes, threads: int, batch: int, precision: str) -> Opened:
    """A program of ``torch.export``, operation by operation, on the CPU; its batch stands in it."""
    import torch
    from torch.utils import _pytree as pytree

    program = torch.export.load(io.BytesIO(content))
    module, example = program.module(), program.example_inputs
    args, kwargs = pytree.tree_map(lambda x: torch.from_numpy(_input(list(x.shape), x.numpy().dtype, batch)), example)
    inputs = pytree.tree_leaves((args, kwargs))
    seen: Seen = {}
    clock = _clock(threads)

    class Watched(torch.fx.Interpreter):
        def run_node(self, n: Any) -> Any:
            begin = clock()
            found = super().run_node(n)
            if n.op == "call_function":
                seen.setdefault((n.name, str(n.target)), []).append(1e3 * (clock() - begin))
            return found

    watched = Watched(module)

    def with_threads(call: Callable[[], Any]) -> Forward:
        def run() -> None:
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                with torch.inference_mode():
                    call()
            finally:
                torch.set_num_threads(before)

        return run

    return (
        with_threads(lambda: module(*args, **kwargs)),
        with_threads(lambda: watched.run(*inputs)),
        lambda: _fastest(seen),
    )


def _input(shape: list[Any], kind: Any, batch: int) -> np.ndarray:
    size = [d if isinstance(d, int) else batch for d in shape]
    if np.issubdtype(kind, np.integer):
        return np.zeros(size, dtype=kind)
    return np.random.default_rng(0).standard_normal(size).astype(kind)


RUNTIMES: dict[str, Callable[[bytes, int, int, str], Opened]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "torch": _torch,
}
ENDINGS = {"onnxruntime": ".onnx", "openvino": ".onnx", "torch": ".pt2"}  # of the files that a runtime reads


# -- a process of its own


# With ONNX Runtime in the same process, every call of OpenVINO takes 0.05 ms more (2026.4, glibc 2.36).
APART = ("openvino",)


class _Apart:
    """A process that has loaded nothing but the runtime, as a service would; it ends when this one does."""

    serves = False  # is this that process, or one that has loaded as little?

    def __init__(self) -> None:
        self.owner, self._lock = os.getpid(), threading.Lock()
        # -P: this file's folder has modules whose names the standard library has, too
        command = [sys.executable, "-P", __file__, "--serve"]
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, what: str, files: list[bytes], options: dict[str, Any]) -> Any:
        """``measure`` or ``race`` over there.  Raises: RuntimeError with what went wrong."""
        with self._lock:
            to, back = self.child.stdin, self.child.stdout
            assert to is not None and back is not None
            try:
                to.write(
                    json.dumps({"what": what, "sizes": list(map(len, files)), "options": options}).encode() + b"\n"
                )
                for file in files:
                    to.write(file)
                to.flush()
                line = back.readline()
            except BrokenPipeError:
                line = b""
            except BaseException:  # interrupted: the next question must not get the answer to this one
                self.child.kill()
                raise
        if not line:
            raise RuntimeError(f"{options['runtime']}: the process that measures ended with {self.child.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{options['runtime']}: {answer['error']}")
        return answer["found"]

    @classmethod
    def serve(cls) -> None:
        cls.serves = True
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who asks hears it
        answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)  # what a runtime prints is no answer
        while line := sys.stdin.buffer.readline():
            asked = json.loads(line)
            files = [sys.stdin.buffer.read(size) for size in asked["sizes"]]
            try:
                if asked["what"] == "race":
                    found: Any = race(files, **asked["options"])
                else:
                    found = measure(files[0], **asked["options"], beside=files[1] if len(files) > 1 else None)
                answer = {"found": found}
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


_running: list[_Apart] = []


def _apart() -> _Apart:
    """The one that runs, or a new one: a process that was forked has none, and one that has ended is replaced."""
    if not _running or _running[0].owner != os.getpid() or _running[0].child.poll() is not None:
        _running[:] = [_Apart()]
    return _running[0]


def main(folder: Path) -> None:
    """Measure every network in ``folder`` that has no times yet."""
    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    asked = {key: settings[key] for key in ("runtime", "threads", "batch", "precision", "seconds")}
    files = sorted(folder.glob(f"*{ENDINGS[asked['runtime']]}"))
    dense, pace = files[0].read_bytes() if files else b"", 0.0
    for number, file in enumerate(files):
        target = file.with_suffix(".json")
        if target.exists():
            pace = pace or json.loads(target.read_text(encoding="utf-8"))["whole"]
            continue
        found = measure(file.read_bytes(), **asked, beside=dense if number else None, pace=pace)
        found |= {"version": version(asked["runtime"]), "processor": processor()}
        beside = target.with_suffix(".part")
        beside.write_text(json.dumps(found), encoding="utf-8")
        beside.replace(target)
        pace = pace or found["whole"]
        sys.stdout.write(f"{number + 1} of {len(files)}: {found['whole']:.3f} ms\n")


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        _Apart.serve()
    else:
        _Apart.serves = True
        main(Path(sys.argv[1]))
