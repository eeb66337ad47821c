"""Prove that a small network is what was promised: equal to the masked or the composed one, at its cost, inside the budget."""

from __future__ import annotations

import functools
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from espalier.copies import copy_model, unwrapped
from espalier.costs import CostModel, cost
from espalier.forms import composed
from espalier.forms.shapes import rectangle_of
from espalier.graph import Graph
from espalier.graph.call import Call, mapped
from espalier.graph.graph import FORM
from espalier.graph.standins import StandIns
from espalier.graph.tracing import call_arguments, mode, observe, private_copy, same_random_numbers
from espalier.graph.watch import first_line, tensors_in
from espalier.plan import Budget, Plan, need_budget
from espalier.solver import unused_blocks
from espalier.surgery.files import load, save
from espalier.surgery.shrink import bake, mask, shrink


@dataclass(frozen=True)
class Check:
    """One obligation: what was claimed, whether it holds, and the numbers."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Proof:
    """The outcome of ``verify``."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(c.passed for c in self.checks)

    def __str__(self) -> str:
        return "\n".join(f"{'ok  ' if c.passed else 'FAIL'}  {c.name}: {c.detail}" for c in self.checks)

    def require(self) -> Proof:
        """Return self, or raise ``ValueError`` listing what failed."""
        if not self.passed:
            raise ValueError(
                "verification failed\n" + "\n".join(f"  {c.name}: {c.detail}" for c in self.checks if not c.passed)
            )
        return self


def verify(
    model: nn.Module,
    graph: Graph,
    plan: Plan,
    example: Any,
    *,
    small: nn.Module | None = None,
    trained: bool = False,
    budget: Budget | None = None,
    fills: bool = True,
    fresh: Callable[[], nn.Module] | None = None,
    tolerance: float = 1e-8,
) -> Proof:
    """Check the obligations on ``model`` and the small network that ``plan``, in units of ``graph``, makes of it (or
    ``small``).

    1. the plan that keeps everything changes no bit; 2. small equals masked, in float64, within ``tolerance`` relative to
    the largest output; where ``small`` has been ``trained`` since, or ``plan`` has layers in other forms (``run.dense_graph``
    and ``run.plan`` of a method), it equals ``model`` masked, with the weights of ``small`` in their places and those that
    other forms compose to; 3. planned
    cost equals the traced cost of the small network, its number of parameters, and torch's own FLOP counter (activation
    memory may be less than planned); 4. every limit of ``budget`` holds and, with ``fills``, no further block would fit (a
    run gives up units while its budget is still falling, and they do not come back); 5. saved and loaded
    onto ``fresh()`` (default: a copy of ``model``) it gives the same bits; 6. backward reaches every parameter it reached
    before.  Between 2 and 3: in train mode small equals masked as well, where training runs anything else (batch
    normalisation as in evaluation, random numbers replaced by one number); every operation of the delivered network, in both
    modes, gives the shapes, channels and numbers that were predicted of it (of networks that are cut, not factorised); and no
    group keeps only units that nothing reads and lost others that something read.
    A forward that breaks after surgery is reported with the line that broke.

    Raises: ValueError for arguments that do not go together; what fails is in the proof, and ``require()`` raises it.
    """
    model = unwrapped(model, who="verify")
    if budget is not None:
        need_budget(budget)
    checks: list[Check] = []

    def claim(name: str, check: Callable[[], tuple[bool, str]]) -> None:
        try:
            passed, detail = check()
        except (OSError, MemoryError):  # of the machine, not of the network: nothing is proven or refuted
            raise
        except Exception as error:
            passed, detail = False, f"{type(error).__name__}: {first_line(error)}{_line_of(error)}"
        checks.append(Check(name, passed, detail))

    forms = [g for g in graph.groups if g.kind == FORM]
    turned = [g.name for g in forms if len(plan.keep.get(g.name, range(g.size))) < g.size]
    if turned and small is None:
        raise ValueError(
            f"verify: the plan gives {len(turned)} layers another form, {turned[0]!r} first, which only the method can do; "
            "give what its finish() returned as small="
        )
    # of the model as it is given: a method that factorises makes computed weights plain before it begins
    watched = observe(model, example, taught_by=graph)
    own = watched.graph if turned else graph
    built = shrink(model, graph, plan) if small is None else small
    planned = cost(graph, plan)

    is_cut = not turned and not graph.absent(plan.keep) and _is_cut(model, built)
    delivered = functools.cache(
        lambda: watched.delivered(graph, {n: np.asarray(u) for n, u in plan.keep.items()}, built)
    )
    # of a detector that finds nothing the outputs are equal whatever it computes
    records = [record for run in watched.forwards for record in run.records]
    selects = any(record.by_values for record in records)
    ranks = any(record.op._schema.name in RANKING for record in records)
    draws = any(torch.Tag.nondeterministic_seeded in record.op.tags for record in records)
    still = NothingRandom if draws else nullcontext

    def same_bits(one: nn.Module, other: nn.Module, text: str) -> tuple[bool, str]:
        with still():
            given = forward(copy_model(one, {}), example, inside=selects)
            return _compare_bits(given, forward(other, example, inside=selects), text)

    def identity() -> tuple[bool, str]:
        dense = shrink(model, graph, Plan.dense(graph))
        return same_bits(model, dense, "a plan that keeps everything changes no bit")

    itself = turned or (trained and small is not None)

    def equal(training: bool) -> tuple[bool, str]:
        whole = _whole(model, graph, plan, built, own.baked) if itself else mask(model, graph, plan)
        with still(), RankedRoughly() if ranks else nullcontext():
            error, scale = difference(whole, built, example, training=training, inside=selects)
            text = f"largest difference {error:.2e} of {scale:.2e} in float64"
            text += ", also of what modules give, since values decide what comes out" if selects else ""
            if error <= tolerance * max(scale, 1e-30):
                return True, text
            if not selects and within_rounding(whole, built, example, training=training, tolerance=tolerance):
                return True, f"{text}, no more than rounding moves the masked one: there, all cancels"
        return False, text

    def equal_in_training() -> tuple[bool, str]:
        predicted = is_cut and not selects and delivered() is None  # then it does in either mode what the model does
        if watched.trains_alike and (predicted or observe(built, example).trains_alike):
            return True, "training runs what evaluation runs"
        if len(watched.forwards) < 2:
            return True, "not compared: the train-mode forward of the model fails on the example input"
        return equal(training=True)

    def operations() -> tuple[bool, str]:
        if (mismatch := delivered()) is not None:
            return False, f"{mismatch.text}: {mismatch.place}"
        count = sum(len(f.records) for f in watched.forwards)
        return True, f"{count:,} operations in {len(watched.forwards)} modes are those that were predicted"

    def alive() -> tuple[bool, str]:
        dead = _dead_groups(model, graph, plan)
        return not dead, f"only dead units were kept in {dead[:3]}" if dead else "no group keeps only dead units"

    def costs() -> tuple[bool, str]:
        counts = CostModel(again := observe(built, example, training=False).graph).cost(again.sizes)
        parameters = sum(p.numel() for p in built.parameters())
        counted = count_macs(built, example)
        # memory may be less than planned: a shuffle of one channel per group is a view, of several a copy
        agree = counts.params == planned.params == parameters and counts.macs == counted
        # of one channel torch makes a product element by element, which it does not count
        single = any(len(plan.keep.get(g.name, ())) == 1 < g.size for g in graph.groups)
        agree = agree and (counted == planned.macs or (single and counted < planned.macs))
        agree = agree and counts.activation_memory <= planned.activation_memory
        return agree, f"planned {planned}, built {counts}, parameters {parameters:,}, torch counts {counted:,} MACs"

    def budgets() -> tuple[bool, str]:
        assert budget is not None
        limits = budget.limits(CostModel(own).cost(own.sizes))
        over = [m for m, limit in limits.items() if getattr(planned, m) > limit]
        text = ", ".join(f"{m} {getattr(planned, m):,} of {limit:,}" for m, limit in limits.items())
        if not fills:
            return not over, text
        left = unused_blocks(graph, plan, replace(budget, **limits))  # type: ignore[arg-type]
        return not over and not left, text + (f"; would still fit: {left[:3]}" if left else "; nothing more fits")

    def files() -> tuple[bool, str]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "small.safetensors"
            save(built, path)
            base = fresh() if fresh is not None else copy_model(model, {})
            loaded = _laid_out_as(load(path, base=base).to(_device(built)), built)
            return same_bits(built, loaded, "saved, loaded, same bits")

    def backward() -> tuple[bool, str]:
        reached, failed = set[str](), None
        try:
            reached = gradients(built, example)
        except Exception as error:
            failed = error
        left = {n for n, _ in built.named_parameters()} - reached
        try:
            lost = sorted(gradients(model, example, of=left)) if left else []
        except Exception as error:
            return True, f"not compared: backward fails in the model itself, {first_line(error)}"
        if failed is not None:
            raise failed
        return not lost, f"gradients reach {len(reached)} parameters" + (f", but not {lost[:3]}" if lost else "")

    name = "small equals composed" if turned else "small equals masked"
    claim("identity", identity)
    claim(name, lambda: equal(training=False))
    claim(f"{name} in training", equal_in_training)
    if is_cut:
        claim("operations as predicted", operations)
    claim("kept units are alive", alive)
    claim("planned cost equals built cost", costs)
    if budget is not None:
        claim("budget", budgets)
    claim("save and load", files)
    claim("backward", backward)
    return Proof(tuple(checks))


def _dead_groups(model: nn.Module, graph: Graph, plan: Plan) -> list[str]:
    """Groups of which units went that something reads, while nothing reads those that stay: the wrong ones were kept."""
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    dead = []
    for group in graph.groups:
        kept = plan.keep.get(group.name, np.arange(group.size))
        read = [s for s in group.consumers if s.tensor in tensors]
        if group.options or len(kept) == group.size or not read:
            continue
        energy = np.zeros(group.size)
        for s in read:
            weight = tensors[s.tensor].detach().abs().double().cpu().movedim(s.dim, 0)
            squares = weight.reshape(len(weight), -1).square().sum(1).numpy()  # also of a vector
            energy += squares[s.index].reshape(group.size, -1).sum(1)
        if energy.any() and not energy[kept].any():
            dead.append(group.name)
    return dead


def _whole(model: nn.Module, graph: Graph, plan: Plan, small: nn.Module, baked: Iterable[str]) -> nn.Module:
    """``model`` in float64, in which what ``plan`` removes is read by nobody and all else has the weights of ``small``.

    A row of layers in ``small`` becomes the one it stands for, and a kernel that was cut lies in the one it was cut from.
    """
    absent = graph.absent(plan.keep)  # silent in ``mask``; ``small`` has nothing of them
    plain = copy_model(model, {})
    for name in baked:
        here = not any(b.holds(name) for b in absent)
        if here and type(small.get_submodule(name)) is not type(plain.get_submodule(name)):
            bake(plain, name)
    whole = _lengthened(mask(plain, graph, plan))
    kept = graph.kept({n: np.asarray(u) for n, u in plan.keep.items()})
    with torch.no_grad():
        for layer, module in whole.named_modules():
            own = {n: t for n, t in module.state_dict(keep_vars=True).items() if "." not in n}
            if any(b.holds(layer) for b in absent):
                continue
            values, kernel = _as_in(small, layer, module, own)
            for name, tensor in own.items():
                full = f"{layer}.{name}" if layer else name
                if kernel and name == "weight":
                    tensor.zero_()  # around the part that is left
                _put(tensor, values.get(name), {**kept.get(full, {}), **(kernel if name == "weight" else {})}, full)
    return whole


def _as_in(
    small: nn.Module, layer: str, module: nn.Module, own: Mapping[str, Tensor]
) -> tuple[Mapping[str, Tensor | None], dict[int, np.ndarray]]:
    """The tensors that ``small`` has for ``layer``, and which part of the kernel of ``module`` its weight is."""
    if not own:
        return {}, {}
    found = small.get_submodule(layer)
    if isinstance(module, (_ConvNd, nn.Linear)) and isinstance(found, nn.Sequential):
        weight, bias = composed(found, module)
        return {"weight": weight, "bias": bias}, {}
    part: dict[int, np.ndarray] = {}
    if isinstance(module, nn.Conv2d) and isinstance(found, nn.Conv2d) and found.kernel_size != module.kernel_size:
        r = rectangle_of(found, module)
        part = {2: np.arange(r.top, r.bottom + 1), 3: np.arange(r.left, r.right + 1)}
    return found.state_dict(), part


def _put(tensor: Tensor, value: Tensor | None, place: Mapping[int, np.ndarray], name: str) -> None:
    """Write ``value`` where ``place`` says, dimension by dimension; everywhere along those it does not name."""
    where = [torch.from_numpy(place[d]) if d in place else torch.arange(n) for d, n in enumerate(tensor.shape)]
    shape = tuple(map(len, where))
    if value is None or value.shape != shape:
        found = "is missing" if value is None else f"has shape {tuple(value.shape)}"
        raise ValueError(f"{name} {found} instead of {shape}")
    if not place:
        tensor.copy_(value)
    else:
        tensor[torch.meshgrid(*(w.to(tensor.device) for w in where), indexing="ij")] = value.to(tensor)


def _is_cut(model: nn.Module, small: nn.Module) -> bool:
    """Are the modules of ``small`` those of ``model``, only narrower?"""
    return [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in small.named_modules()]


class Seen(NamedTuple):
    """What a forward gave: its output tensors, and of modules inside some values of what they gave, by name, call and shape."""

    outputs: list[Tensor]
    inside: dict[tuple[str, int, torch.Size], Tensor]

    def pairs(self, other: Seen) -> Iterator[tuple[Tensor, Tensor]]:
        """Values of modules that gave the same shape in both: what is cut differs in its shape."""
        return ((tensor, other.inside[key]) for key, tensor in self.inside.items() if key in other.inside)


SOME = 2**14  # values of a tensor inside that are kept


def forward(model: nn.Module, example: Any, *, training: bool = False, inside: bool = False) -> Seen:
    """A forward without gradients of ``model``, a private copy; its mode is restored.

    In ``training`` batch normalisation takes its statistics as in evaluation, and random numbers are all the same.
    """
    args, kwargs = call_arguments(example, _device(model))
    seen: dict[tuple[str, int, torch.Size], Tensor] = {}
    calls: Counter[str] = Counter()

    def note(name: str, module: nn.Module, given: Any, output: Any) -> None:
        for tensor in tensors_in(output):
            seen[name, calls[name], tensor.shape] = tensor.reshape(-1)[:: 1 + tensor.numel() // SOME].clone()
            calls[name] += 1

    hooks = [m.register_forward_hook(functools.partial(note, n)) for n, m in model.named_modules() if inside and n]
    try:
        quiet = NothingRandom() if training else nullcontext()
        with torch.no_grad(), mode(model, training=training), same_random_numbers(), quiet:
            return Seen(list(tensors_in(model(*args, **kwargs))), seen)
    finally:
        for hook in hooks:
            hook.remove()


class NothingRandom(TorchDispatchMode):
    """Networks of two widths draw different numbers: let all of them be one, and nothing be dropped."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in op.tags:
            return op(*args, **kwargs)
        if "rrelu_with_noise" in op.name():
            return op(*args[:4], False)  # with the mean slope, as in evaluation
        made = op(*args, **kwargs)
        if op is torch.ops.aten.native_dropout.default:
            return args[0].clone(), torch.ones_like(made[1])
        if Call(op, args, kwargs, made).get("dropout_p", 1.0) == 0:  # attention, in which nothing else is random
            return made
        return tree_map_only(Tensor, lambda t: t.fill_(0.75 if t.is_floating_point() else 0), made)


def difference(
    one: nn.Module, other: nn.Module, example: Any, *, training: bool = False, inside: bool = False
) -> tuple[float, float]:
    """Largest absolute difference of the outputs in float64, and the largest output, on random inputs like ``example``.

    ``inside`` also of every module by itself: those numbers are given that differ most for their size.  What is not finite has
    to be so in both; ``ValueError`` if nothing is finite, or if there is nothing.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = mapped(example, lambda t: _noise(t, generator))
    error, scale = _apart(*(_in_double(m, inputs, training, inside) for m in (one, other)))
    if error > ROUNDING[0] * scale and error < ROUNDING[1] * scale:  # rounded otherwise, or another network?
        return _apart(*(_all_in_double(m, inputs, training, inside) for m in (one, other)))
    return error, scale


def within_rounding(one: nn.Module, other: nn.Module, example: Any, *, training: bool, tolerance: float) -> bool:
    """Does every output differ by no more than a few times what that of ``one`` does when its operations round otherwise?"""
    generator = torch.Generator().manual_seed(0)
    inputs = mapped(example, lambda t: _noise(t, generator))
    exact, again, found = (_in_double(m, inputs, training, False).outputs for m in (one, one, other))
    if not all(map(torch.equal, exact, again)):
        return False  # it is never the same
    far = [tolerance * x.abs().max() for x in exact]
    with RoundedOtherwise():
        for _ in range(ROUNDINGS):
            moved = _in_double(one, inputs, training, False).outputs
            far = [torch.maximum(f, MARGIN * (x - z).abs().max()) for f, x, z in zip(far, exact, moved, strict=True)]
    return all(bool((x - y).abs().max() <= f) for x, y, f in zip(exact, found, far, strict=True))


ROUNDINGS = 3  # forwards that are rounded otherwise
MARGIN = 4.0  # how much farther than these another network may be
DIGITS = 4e-15  # relative: more than sums in another order make of float64


class RoundedOtherwise(TorchDispatchMode):
    """The last digits of what every operation makes in float64 are others: of every number by itself, and of a whole channel
    together, as what a mean was rounded by that was taken from it."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        made = op(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tensors_in((args, kwargs))}
        for tensor in tensors_in(made):
            if tensor.dtype == torch.float64 and tensor.untyped_storage().data_ptr() not in given:
                tensor.mul_(1 + DIGITS * torch.randn_like(tensor))
                largest = tensor.abs().amax() if tensor.numel() else tensor.new_zeros(())
                if tensor.dim() > 1 and bool(largest.isfinite()):
                    channels = tensor.new_empty((*tensor.shape[:2], *[1] * (tensor.dim() - 2)))
                    tensor.add_(DIGITS * largest * torch.randn_like(channels))
        return made


RANKING = {
    *(
        f"aten::{n}"
        for n in ("topk", "sort", "argmax", "argmin", "max", "min", "kthvalue", "median", "mode", "searchsorted")
    ),
    *(f"aten::{n}" for n in ("gt", "ge", "lt", "le", "eq", "ne", "sign", "round", "floor", "ceil")),
    "torchvision::nms",
}
"""Operations by which the last digit of a number can decide on something else."""


class RankedRoughly(TorchDispatchMode):
    """What is ranked or compared is rounded to half of its digits first: equals that were rounded differently are equal."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        rough = tree_map_only(Tensor, _rough, args) if op._schema.name in RANKING else args
        return op(*rough, **(kwargs or {}))


def _rough(tensor: Tensor) -> Tensor:
    """The leading 29 of the 53 digits of float64."""
    if tensor.dtype != torch.float64:
        return tensor
    large = tensor * (2.0**24 + 1)
    return torch.where(large.isfinite(), large - (large - tensor), tensor)


ROUNDING = 1e-12, 1e-4  # relative: more than float64 makes of a sum, less than float32 makes of a network


def _apart(a: Seen, b: Seen) -> tuple[float, float]:
    """Largest difference of what two forwards gave, and the largest value of the first."""
    if [t.shape for t in a.outputs] != [t.shape for t in b.outputs]:
        shapes = [[tuple(t.shape) for t in seen.outputs] for seen in (b, a)]
        raise ValueError(f"outputs have shapes {shapes[0]} instead of {shapes[1]}")
    found = [_farthest([pair]) for pair in a.pairs(b)]
    found.append(_farthest(zip(a.outputs, b.outputs, strict=True)))
    compared = [numbers for numbers in found if numbers is not None]
    if not compared:
        raise ValueError("outputs are empty or not finite, so nothing can be compared")
    floor = 1e-6 * max(scale for _, scale in compared)  # what is less is rounding of what cancels
    return max(((error, max(scale, floor)) for error, scale in compared), key=lambda n: n[0] / max(n[1], 1e-30))


def _farthest(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float] | None:
    """Largest difference and largest value of pairs of tensors; ``None`` where nothing is finite."""
    error, scale = [], []
    for x, y in pairs:
        finite = x.isfinite()
        if not torch.equal(finite, y.isfinite()):
            raise ValueError("one output is finite where the other is not")
        if finite.any():
            x, y = (t[finite] if t.is_complex() else t[finite].double() for t in (x, y))
            error.append(float((x - y).abs().max()))
            scale.append(float(x.abs().max()))
    return (max(error), max(scale)) if error else None


LONG = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
}


def _lengthened(model: nn.Module) -> nn.Module:
    """``model.double()``, which would leave complex weights as they are."""
    return model._apply(lambda t: t.to(LONG.get(t.dtype, t.dtype)))


def _in_double(model: nn.Module, example: Any, training: bool, inside: bool) -> Seen:
    """A forward in float64, also where the model's own code asks for single precision (a grid of coordinates, say)."""
    try:
        return forward(_lengthened(copy_model(model, {})), example, training=training, inside=inside)
    except RuntimeError:
        return _all_in_double(model, example, training, inside)


def _all_in_double(model: nn.Module, example: Any, training: bool, inside: bool) -> Seen:
    """The same where modules have kept what a forward computes once, and nothing is made shorter on the way."""
    private = copy_model(model, {})
    own = next((p.dtype for p in private.parameters() if p.is_floating_point()), torch.float32)
    forward(private, mapped(example, lambda t: t.to(own) if t.is_floating_point() else t), training=training)
    with _DoubleForSingle():
        return forward(_lengthened(private), example, training=training, inside=inside)


class _DoubleForSingle(TorchDispatchMode):
    """What an operation would read or make in a shorter floating-point format is float64."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        args, kwargs = tree_map(self._lengthened, (args, kwargs or {}))
        if "fake_quantize" in op.name():  # its kernels take steps in single precision, whatever they are steps of
            args = (args[0], *tree_map_only(Tensor, lambda t: t.float() if t.is_floating_point() else t, args[1:]))
        made = op(*args, **kwargs)
        makes = any(argument.name == "dtype" for argument in op._schema.arguments)
        return tree_map_only(Tensor, self._lengthened, made) if makes else made

    def _lengthened(self, value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return LONG.get(value, value)
        return value.to(LONG[value.dtype]) if isinstance(value, Tensor) and value.dtype in LONG else value


def _noise(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)


def count_macs(model: nn.Module, example: Any) -> int:
    """Multiply-accumulates of an eval-mode forward by ``torch.utils.flop_counter``, halved; where values decide how many rows
    there are, of all of them (``graph.standins``)."""
    for device, everything in (("meta", StandIns), ("cpu", StandIns), ("cpu", nullcontext)):
        private = private_copy(model, device).eval()
        args, kwargs = call_arguments(example, device)
        try:
            with torch.no_grad(), FlopCounterMode(display=False) as counter, everything():
                private(*args, **kwargs)
        except Exception:
            if everything is nullcontext:
                raise
            continue
        return counter.get_total_flops() // 2
    raise AssertionError("unreachable")


def gradients(model: nn.Module, example: Any, *, of: set[str] | None = None) -> set[str]:
    """Names of parameters, or of those in ``of``, that a gradient of the sum of all outputs reaches, in eval mode; on meta
    tensors where it can, where every value passes (``graph.standins``)."""
    for device in ("meta", _device(model)):
        private = private_copy(model, device).eval()
        asked = {n: p.requires_grad_(True) for n, p in private.named_parameters() if of is None or n in of}
        args, kwargs = call_arguments(example, device)
        try:
            with StandIns() if device == "meta" else nullcontext():
                given = tensors_in(private(*args, **kwargs))
                outputs = [t for t in given if t.is_floating_point() and t.requires_grad]
                if not outputs:
                    return set()
                whole = torch.stack([t.float().sum() for t in outputs]).sum()
                found = torch.autograd.grad(whole, [*asked.values()], allow_unused=True)
        except Exception:
            if device != "meta":
                raise
            continue
        return {n for n, gradient in zip(asked, found, strict=True) if gradient is not None}
    raise AssertionError("unreachable")


def _compare_bits(a: Seen, b: Seen, text: str) -> tuple[bool, str]:
    """Are they the same?  ``text`` says so; not a number is the same as not a number."""
    shapes = [[(tuple(t.shape), t.dtype) for t in seen.outputs] for seen in (b, a)]
    if shapes[0] != shapes[1]:
        return False, f"outputs have shapes {[s for s, _ in shapes[0]]} instead of {[s for s, _ in shapes[1]]}"
    for x, y in (*zip(a.outputs, b.outputs, strict=True), *a.pairs(b)):
        if not torch.equal(_without_nan(x), _without_nan(y)):
            error = float((x.double() - y.double()).abs().nan_to_num().max())
            return False, f"outputs on the example differ by up to {error:.2e}"
    if any(not bool(t.isfinite().all()) for t in a.outputs):
        return True, f"{text}, though outputs on the example are not finite"
    return True, text


def _laid_out_as(model: nn.Module, other: nn.Module) -> nn.Module:
    """``model`` with its tensors in memory as in a copy of ``other``: torch's sums depend on strides and on alignment."""
    for own, like in (
        (model.named_parameters(), other.named_parameters()),
        (model.named_buffers(), other.named_buffers()),
    ):
        there = dict(like)
        for name, tensor in own:
            if name in there and tensor.shape == there[name].shape:
                tensor.data = torch.empty_strided(
                    tensor.shape, there[name].stride(), dtype=tensor.dtype, device=tensor.device
                ).copy_(tensor.data)
    return model


def _without_nan(tensor: Tensor) -> Tensor:
    """Every not-a-number replaced, and told apart from numbers by a row of its own."""
    where = tensor.isnan()
    return torch.stack([tensor.masked_fill(where, 0), where.to(tensor.dtype)]) if bool(where.any()) else tensor


def _device(model: nn.Module) -> str:
    first = next(model.parameters(), None)
    return "cpu" if first is None else str(first.device)


def _line_of(error: BaseException) -> str:
    """Where in the user's code an exception was raised."""
    import traceback

    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _internal(f.filename)]
    return f" (at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line})" if frames else ""


_ROOM = Path(__file__).parent
_INTERNAL = (f"{torch.__path__[0]}/", f"{_ROOM}/", f"{_ROOM.parent / 'graph'}/")


def _internal(path: str) -> bool:
    return path.startswith(_INTERNAL)
