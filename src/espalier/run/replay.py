"""Training steps as CUDA graphs: recorded once, replayed with one launch.

A step of a narrow network is hundreds of kernels of some microseconds, and launching them takes longer than running them.
Forward and backward are recorded; the optimiser, the penalty of a method and what it does after a step stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from espalier.graph.watch import first_line

Computed = tuple[Tensor, Tensor]
"""Loss and number of right answers, both still on the device; gradients are in ``.grad``."""

Computation = Callable[[Tensor, Tensor], Computed]
WARM_UP = 2  # steps that run as they are before one is recorded: what is made at first use must not be part of it


class Recording(Protocol):
    """A step that was recorded; ``replay`` runs it again on what its inputs hold by then."""

    def replay(self) -> Computed: ...


class Recorder(Protocol):
    """Runs steps where they can be recorded, and records them."""

    def running(self) -> Any:
        """The context that all steps run in."""

    def record(self, step: Callable[[], Computed], parameters: list[nn.Parameter]) -> Recording: ...


class Replay:
    """Runs ``step``, forward and backward from gradients of nothing, by replaying it where that gives the same."""

    def __init__(self, step: Computation, model: nn.Module, *, recorder: Recorder) -> None:
        self.step, self.model, self.recorder = step, model, recorder
        self.forget()

    def forget(self) -> None:
        """The model computes something else than before: record anew."""
        self.recording: Recording | None = None
        self.inputs: tuple[Tensor, Tensor] | None = None
        self.seen = 0
        self.modules = list(self.model.modules())
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]

    def __call__(self, x: Tensor, y: Tensor, *, penalty: Tensor | None = None) -> Computed:
        """Gradients are those of the step and of ``penalty``; hooks on them are called when they are complete."""
        with _silent(self.parameters):
            found = self._run(x, y)
            if penalty is not None:
                penalty.backward()  # type: ignore[no-untyped-call]
        for parameter in self.parameters:
            if parameter.grad is not None:
                for hook in list(_hooks(parameter).values()):
                    hook(parameter)
        return found

    def _run(self, x: Tensor, y: Tensor) -> Computed:
        if self._watched() or not self._fits(x, y) or self.seen < WARM_UP:
            self.seen += 1
            self._clear()
            return self.step(x, y)
        if self.recording is None:
            self.inputs = (x.clone(), y.clone())
            self._clear()
            self.recording = self.recorder.record(lambda: self.step(*self._inputs()), self.parameters)
        for own, given in zip(self._inputs(), (x, y), strict=True):
            own.copy_(given)
        return self.recording.replay()

    def _inputs(self) -> tuple[Tensor, Tensor]:
        assert self.inputs is not None
        return self.inputs

    def _watched(self) -> bool:
        """Does somebody look at activations?  They would see those of the recording for ever."""
        return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in self.modules)

    def _fits(self, x: Tensor, y: Tensor) -> bool:
        if self.inputs is None:
            return True
        return all(own.shape == given.shape and own.dtype == given.dtype
                   for own, given in zip(self.inputs, (x, y), strict=True))  # fmt: skip

    def _clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def _hooks(parameter: nn.Parameter) -> dict[int, Callable[[Tensor], None]]:
    return parameter._post_accumulate_grad_hooks or {}


@contextmanager
def _silent(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Without the hooks on gradients: a replay does not call them, so the recording must not hold what they do."""
    kept = [(hooks, dict(hooks)) for p in parameters if (hooks := _hooks(p))]
    for hooks, _ in kept:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, own in kept:
            hooks.update(own)


class CudaRecorder:
    """Records CUDA graphs on a stream of its own, on which all steps run: backward stays on the stream of its forward."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)

    @contextmanager
    def running(self) -> Iterator[None]:
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    def record(self, step: Callable[[], Computed], parameters: list[nn.Parameter]) -> Recording:
        return _CudaRecording(step, parameters, self.stream)


class _CudaRecording:
    def __init__(self, step: Callable[[], Computed], parameters: list[nn.Parameter], stream: torch.cuda.Stream) -> None:
        self.step = step  # holds what the graph reads
        self.graph = torch.cuda.CUDAGraph()
        try:
            # Only this thread must keep to what can be recorded: that of a DataLoader pins memory meanwhile.
            with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                self.outputs = step()
        except RuntimeError as error:
            raise ValueError(
                "Recipe(graphs=True): a training step of this model cannot be recorded as a CUDA graph, most likely because "
                f"its forward waits for the device ({first_line(error)}); set graphs=False"
            ) from error
        self.gradients = [(p, p.grad) for p in parameters]

    def replay(self) -> Computed:
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        self.graph.replay()
        return self.outputs


def recorder_for(device: torch.device, *, wanted: bool) -> Recorder | None:
    return CudaRecorder(device) if wanted and device.type == "cuda" else None


def running(replay: Replay | None) -> Any:
    return nullcontext() if replay is None else replay.recorder.running()
