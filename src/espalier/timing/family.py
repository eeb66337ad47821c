"""Sub-networks of one network as ONNX files, whose nodes say to which layer they belong.

Exported once; the others are made by cutting the exported weights, because exporters are slow and a profile needs dozens.
Where that is not enough (sizes that are written into the file), every network is cut in PyTorch and exported by itself.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from espalier.copies import copy_model
from espalier.graph import Graph
from espalier.graph.graph import CHANNELS, FORM
from espalier.plan import Plan
from espalier.surgery import shrink
from espalier.timing.bits import in_precision
from espalier.timing.on_device import session
from espalier.timing.profile import ProfileSetting

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_MARK = re.compile(r"_L(\d+)_")


@dataclass(frozen=True)
class FileLayer:
    """A layer as the exported file has it: which site of the graph it is, and what makes others take the same time."""

    site: int
    signature: str


class Family:
    """All networks that plans make of one model, as ONNX files."""

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        example: Sequence[torch.Tensor],
        *,
        put: Callable[[nn.Module, Mapping[str, int]], None] | None = None,
        setting: ProfileSetting | None = None,
    ) -> None:
        """``put`` gives layers the forms that a plan has chosen among ``graph.alternatives``; files are for ``setting``."""
        self._put, self._setting = put, setting
        model = copy_model(model, {}).cpu().eval()
        self._model, self._graph, self._example = model, graph, tuple(example)
        self._dense = _exported(model, self._example)
        marked = _mark(self._dense, graph)
        self.layers = marked.layers
        self._cuttable = self._try_to_cut()

    @property
    def graph(self) -> Graph:
        """Of the model."""
        return self._graph

    @property
    def batch(self) -> int:
        """Of the inputs."""
        return len(self._example[0])

    def file(self, plan: Plan) -> bytes:
        """The network of ``plan``: its weights mean nothing, its nodes are marked by layer (``layer_of``)."""
        return in_precision(self._plain(plan), self._setting, [x.numpy() for x in self._example])

    def _plain(self, plan: Plan) -> bytes:
        kept = self._graph.kept({n: np.asarray(u) for n, u in plan.keep.items()})
        forms = {
            g.name: len(plan.keep[g.name])
            for g in self._graph.groups
            if g.kind == FORM and g.name in plan.keep and len(plan.keep[g.name]) < g.size
        }
        shorter = any(len(plan.keep.get(b.group, (0, 1))) < 2 for b in self._graph.blocks)
        selects = any(f"{n}.index" in kept for n in self._graph.selects)
        if shorter or forms or selects or (kept and not self._cuttable):
            small = shrink(self._model, self._graph, plan)
            if forms:
                assert self._put is not None, "a graph with alternatives needs someone who builds them"
                small = copy_model(small, {})
                self._put(small, forms)
            return _mark(_exported(small, self._example), self._graph).content
        return _mark(_cut(self._dense, kept, self._graph), self._graph).content

    def _try_to_cut(self) -> bool:
        """Does a file with cut weights compute what the cut network computes?"""
        if self._graph.baked:
            return False
        half = {g.name: np.arange(max(1, g.size // 2)) for g in self._graph.groups if g.kind == CHANNELS}
        plan = Plan(half)
        try:
            content = _cut(self._dense, self._graph.kept(half), self._graph).SerializeToString()
            found = _run(content, self._example)
        except Exception:  # whatever the runtime dislikes: the slow way will do
            return False
        with torch.inference_mode():
            small = shrink(self._model, self._graph, plan).eval()
            ours = small(*self._example)
        if not isinstance(ours, torch.Tensor):
            return len(found) > 0
        scale = float(ours.abs().max()) or 1.0
        return found[0].shape == tuple(ours.shape) and float(np.abs(found[0] - ours.numpy()).max()) <= 1e-3 * scale


def layer_of(name: str) -> int | None:
    """The layer that a runtime's node belongs to, by its name; ``None`` for nodes that the runtime has added."""
    found = _MARK.findall(name)
    return int(found[0]) - 1 if found else None


def _run(content: bytes, example: tuple[torch.Tensor, ...]) -> list[np.ndarray]:
    opened = session(content)
    names = [i.name for i in opened.get_inputs()]
    return opened.run(None, {n: t.numpy() for n, t in zip(names, example, strict=True)})


def _exported(model: nn.Module, example: tuple[torch.Tensor, ...]) -> Any:
    """With BatchNorm and names of weights as they are in the model: the runtime folds them when it loads the file."""
    import warnings

    import onnx

    file = io.BytesIO()
    names = [f"input{i}" for i in range(len(example))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, example, file, dynamo=False, do_constant_folding=False, input_names=names,  # type: ignore[arg-type]
            dynamic_axes={name: {0: "batch"} for name in names},
        )  # fmt: skip
    proto = onnx.load_from_string(file.getvalue())
    _own_copies(proto)
    return proto


def _own_copies(proto: Any) -> None:
    """Equal weights are stored once and passed through Identity nodes: give each its own, so that each can be cut by itself."""
    stored = {i.name: i for i in proto.graph.initializer}
    for node in list(proto.graph.node):
        if node.op_type == "Identity" and node.input[0] in stored:
            own = proto.graph.initializer.add()
            own.CopyFrom(stored[node.input[0]])
            own.name = node.output[0]
            stored[own.name] = own
            proto.graph.node.remove(node)


def _cut(proto: Any, kept: Any, graph: Graph) -> Any:
    """A copy of the file with smaller weights.  Raises: KeyError for what the file does not hold under its name."""
    import onnx
    from onnx import numpy_helper

    if not kept:
        return proto
    stored = {i.name: number for number, i in enumerate(proto.graph.initializer)}
    for name in kept:
        if name not in stored:
            raise KeyError(name)
    small = onnx.ModelProto()
    small.CopyFrom(_without_weights(proto))
    lengths = {}
    for weight in proto.graph.initializer:
        if weight.name not in kept:
            small.graph.initializer.add().CopyFrom(weight)
            continue
        array = numpy_helper.to_array(weight)
        for dim, stay in kept[weight.name].items():
            array = array.take(stay, axis=dim)
        lengths[weight.name] = array.shape
        small.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), weight.name))
    for node in small.graph.node:
        if node.op_type not in LAYERS or len(node.input) < 2:
            continue
        width = graph.group_width.get(node.input[1].rpartition(".")[0])
        if width and node.input[1] in lengths:
            for attribute in node.attribute:
                if attribute.name == "group":
                    attribute.i = lengths[node.input[1]][0] // width
    return small


def _without_weights(proto: Any) -> Any:
    import onnx

    bare = onnx.ModelProto()
    bare.ir_version = proto.ir_version
    bare.opset_import.extend(proto.opset_import)
    bare.graph.name = proto.graph.name
    bare.graph.node.extend(proto.graph.node)
    bare.graph.input.extend(proto.graph.input)
    bare.graph.output.extend(proto.graph.output)
    return bare


def fold_batchnorm(proto: Any) -> None:
    """Into the convolutions before, in place: runtimes do it as well, and call what comes out by names of their own."""
    from onnx import helper, numpy_helper

    stored = {i.name: i for i in proto.graph.initializer}
    used: dict[str, int] = {}
    for name in [o.name for o in proto.graph.output] + [i for n in proto.graph.node for i in n.input]:
        used[name] = used.get(name, 0) + 1
    made = {o: n for n in proto.graph.node for o in n.output}
    for norm in [n for n in proto.graph.node if n.op_type == "BatchNormalization"]:
        conv = made.get(norm.input[0])
        if conv is None or conv.op_type != "Conv" or used[norm.input[0]] > 1:
            continue
        if any(i not in stored or used[i] > 1 for i in (*conv.input[1:], *norm.input[1:])):
            continue
        epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
        gamma, beta, mean, variance = (numpy_helper.to_array(stored[i]) for i in norm.input[1:])
        weight = numpy_helper.to_array(stored[conv.input[1]])
        bias = numpy_helper.to_array(stored[conv.input[2]]) if len(conv.input) > 2 else 0.0
        scale = gamma / np.sqrt(variance + epsilon)
        shift = ((bias - mean) * scale + beta).astype(weight.dtype)
        scaled = (weight * scale.reshape(-1, *[1] * (weight.ndim - 1))).astype(weight.dtype)
        stored[conv.input[1]].CopyFrom(numpy_helper.from_array(scaled, conv.input[1]))
        stored[norm.input[2]].CopyFrom(numpy_helper.from_array(shift, norm.input[2]))  # beta is the bias now
        plain = helper.make_node("Conv", [*conv.input[:2], norm.input[2]], [norm.output[0]], name=conv.name)
        plain.attribute.extend(conv.attribute)
        conv.CopyFrom(plain)
        for unused in (norm.input[1], *norm.input[3:]):
            proto.graph.initializer.remove(stored.pop(unused))
        proto.graph.node.remove(norm)


@dataclass(frozen=True)
class _Marked:
    content: bytes
    layers: tuple[FileLayer, ...]


def _mark(proto: Any, graph: Graph) -> _Marked:
    """Name every node after the layer that it belongs to: itself, or the last one before it that it depends on."""
    import onnx

    marked = onnx.ModelProto()
    marked.CopyFrom(proto)
    fold_batchnorm(marked)
    nodes = list(marked.graph.node)
    weights = {i.name for i in marked.graph.initializer}
    made_of: dict[str, set[str]] = {w: {w} for w in weights}  # constants, and the weights they are computed from
    owner = {i.name: 0 for i in marked.graph.input}  # activation -> mark of its layer
    waiting: dict[str, list[int]] = {}
    for number, known in enumerate(graph.sites):
        waiting.setdefault(known.module, []).append(number)
    layers: list[FileLayer] = []
    heads: list[str] = []
    tails: list[list[str]] = [[]]
    renamed: dict[str, str] = {}
    for number, node in enumerate(nodes):
        inputs = [i for i in node.input if i]
        live = [i for i in inputs if i in owner]
        if not live:
            roots = set().union(*(made_of.get(i, set()) for i in inputs))
            made_of.update(dict.fromkeys(node.output, roots))
            continue
        mark = max(owner[i] for i in live)
        site = _site_of(node, made_of, waiting) if node.op_type in LAYERS else None
        if site is not None:
            mark = len(heads) + 1
            heads.append(_head(node))
            layers.append(FileLayer(site, ""))
            tails.append([])
        else:
            tails[mark].append(node.op_type)
        for place, output in enumerate(node.output):
            owner[output] = mark
            renamed[output] = f"n{number}_{place}_L{mark}_"
        node.name = f"n{number}_L{mark}_"
    for node in nodes:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                if name in renamed:
                    names[place] = renamed[name]
    for output in marked.graph.output:
        output.name = renamed.get(output.name, output.name)
    return _Marked(
        marked.SerializeToString(),
        tuple(FileLayer(layer.site, _signature(graph, layer.site, head, tail))
              for layer, head, tail in zip(layers, heads, tails[1:], strict=True)),
    )  # fmt: skip


def _site_of(node: Any, made_of: dict[str, set[str]], waiting: dict[str, list[int]]) -> int | None:
    """The site of the graph that a node computes: the next one of the module whose weight it reads."""
    for name in node.input[1:2]:
        for root in made_of.get(name, ()):
            module = root
            while module:
                module = module.rpartition(".")[0]
                if waiting.get(module):
                    return waiting[module].pop(0)
    return None


def _head(node: Any) -> str:
    settings = []
    for attribute in sorted(node.attribute, key=lambda a: a.name):
        if attribute.name in ("kernel_shape", "strides", "dilations", "pads"):
            settings.append(f"{attribute.name[0]}{'x'.join(map(str, attribute.ints))}")
    return " ".join([node.op_type, *settings])


def _signature(graph: Graph, number: int, head: str, tail: list[str]) -> str:
    """What layers that take the same time at the same lengths have in common."""
    term = graph.sites[number].term
    width = graph.group_width.get(graph.sites[number].module)
    groups = "" if width is None else f" in groups of {width}"
    return f"{head}{groups} at {term.coefficient:g} > {' '.join(tail)}"
