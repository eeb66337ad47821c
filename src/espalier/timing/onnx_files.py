"""Sub-networks of one network as ONNX files: exported once, the others are made by cutting the exported weights.

Exporters are slow and a profile needs dozens.  Where cutting is not enough (sizes that are written into the file), every
network is cut in PyTorch and exported by itself.
"""

from __future__ import annotations

import inspect
import io
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from espalier.graph import Graph
from espalier.graph.graph import CHANNELS
from espalier.graph.tracing import call_arguments
from espalier.graph.watch import first_line
from espalier.layers import PartConv2d
from espalier.plan import Plan
from espalier.surgery import shrink
from espalier.timing.marks import FileNode, Written, marked, marks_of
from espalier.timing.on_device import session

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class OnnxFiles:
    """All networks of one model as ONNX files."""

    def __init__(self, model: nn.Module, graph: Graph, example: Any) -> None:
        self._model, self._graph, self._example = model, graph, example
        self._dense = _exported(model, example)
        self.layers = _mark(self._dense, graph).layers
        self._cuttable = self._try_to_cut()

    def written(self, model: nn.Module) -> bytes:
        """``model``, which is a network of this graph."""
        return _mark(_exported(model, self._example), self._graph).content

    def cut(self, kept: Any) -> bytes | None:
        """The network of which ``kept`` is left, parameter -> dimension -> units; ``None`` where cutting does not give it."""
        if kept and not self._cuttable:
            return None
        return _mark(_cut(self._dense, kept, self._graph), self._graph).content

    def _try_to_cut(self) -> bool:
        """Does a file with cut weights compute what the cut network computes?"""
        if self._graph.baked:
            return False
        half = {g.name: np.arange(max(1, g.size // 2)) for g in self._graph.groups if g.kind == CHANNELS}
        plan = Plan(half)
        try:
            content = _cut(self._dense, self._graph.kept(half), self._graph).SerializeToString()
            args, kwargs = arguments_in_order(self._model, self._example)
            found = _run(content, tree_leaves((args, kwargs)))
        except Exception:  # whatever the runtime dislikes: the slow way will do
            return False
        with torch.inference_mode():
            small = shrink(self._model, self._graph, plan).eval()
            ours = small(*args, **kwargs)
        if not isinstance(ours, torch.Tensor):
            return len(found) > 0
        scale = float(ours.abs().max()) or 1.0
        return found[0].shape == tuple(ours.shape) and float(np.abs(found[0] - ours.numpy()).max()) <= 1e-3 * scale


def _run(content: bytes, inputs: list[torch.Tensor]) -> list[np.ndarray]:
    opened = session(content)
    names = [i.name for i in opened.get_inputs()]
    return opened.run(None, {n: t.numpy() for n, t in zip(names, inputs, strict=True)})


def arguments_in_order(model: nn.Module, example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Of a call with ``example``, in the order of the signature, in which the exporter puts them."""
    args, kwargs = call_arguments(example, "cpu")
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    return bound.args, bound.kwargs


def _exported(model: nn.Module, example: Any) -> Any:
    """With BatchNorm and names of weights as they are in the model: the runtime folds them when it loads the file.

    Raises: ValueError where PyTorch does not export it.
    """
    import warnings

    import onnx

    file = io.BytesIO()
    args, kwargs = arguments_in_order(model, example)
    given = [*args, *kwargs.values()]
    names = {f"input{i}": tensor for i, tensor in enumerate(tree_leaves(given))}
    batches = [name for name, tensor in names.items() if any(tensor is g for g in given)]  # lists keep their sizes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                model, args, file, kwargs=kwargs, dynamo=False, do_constant_folding=False,  # type: ignore[arg-type]
                input_names=list(names), dynamic_axes={name: {0: "batch"} for name in batches},
            )  # fmt: skip
        except Exception as error:
            raise ValueError(
                f"profile: the model cannot be exported to ONNX by tracing: {first_line(error)}; runtime='torch' needs no ONNX"
            ) from error
    proto = onnx.load_from_string(file.getvalue())
    _own_copies(proto)
    _fold_padding(proto, model)
    return proto


def _fold_padding(proto: Any, model: nn.Module) -> None:
    """Into convolutions whose kernel sits off the centre, in place: the file that is delivered has no node for it either."""
    used = _uses(proto.graph)
    made = {o: n for n in proto.graph.node for o in n.output}
    modules = dict(model.named_modules())
    for conv in (n for n in proto.graph.node if n.op_type == "Conv"):
        part, pad = modules.get(conv.input[1].rpartition(".")[0]), made.get(conv.input[0])
        if not isinstance(part, PartConv2d) or pad is None or pad.op_type != "Pad" or used[conv.input[0]] > 1:
            continue
        left, right, top, bottom = part.shift
        if min(part.shift) < 0:  # cropped
            continue
        for attribute in (a for a in conv.attribute if a.name == "pads"):
            both = [a + b for a, b in zip(attribute.ints, (top, left, bottom, right), strict=True)]
            del attribute.ints[:]
            attribute.ints.extend(both)
            conv.input[0] = pad.input[0]
    _sweep(proto.graph)


def _sweep(graph: Any) -> None:
    """Take out what nothing reads."""
    read, live = {o.name for o in graph.output}, []
    for node in reversed(graph.node):
        if read.intersection(node.output):
            live.append(node)
            read.update(_reads(node))
    if len(live) < len(graph.node):
        kept = [type(n).FromString(n.SerializeToString()) for n in reversed(live)]
        del graph.node[:]
        graph.node.extend(kept)


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
        weight = node.input[1]  # of a functional convolution, which has no name but this
        width = graph.group_width.get(weight, graph.group_width.get(weight.rpartition(".")[0]))
        if width and weight in lengths:
            for attribute in node.attribute:
                if attribute.name == "group":
                    attribute.i = lengths[weight][0] // width
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
    used = _uses(proto.graph)
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


def _mark(proto: Any, graph: Graph) -> Written:
    """Name every node after the layer that it belongs to, and what it makes: runtimes name their own nodes after that."""
    import onnx

    own = onnx.ModelProto()
    own.CopyFrom(proto)
    fold_batchnorm(own)
    nodes = [_node(n) for n in own.graph.node]
    marks, layers = marks_of(
        nodes, graph, given=(i.name for i in own.graph.input), weights=[i.name for i in own.graph.initializer]
    )
    renamed: dict[str, str] = {}
    for number, (node, mark) in enumerate(zip(own.graph.node, marks, strict=True)):
        if mark is None:
            continue
        for place, output in enumerate(node.output):
            renamed[output] = marked(f"{number}_{place}", mark)
        node.name = marked(f"{number}", mark)
    for node in _everywhere(own.graph):
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                if name in renamed:
                    names[place] = renamed[name]
    for output in own.graph.output:
        output.name = renamed.get(output.name, output.name)
    return Written(own.SerializeToString(), layers)


def _node(node: Any) -> FileNode:
    weight = node.input[1] if node.op_type in LAYERS and len(node.input) > 1 else None
    settings = [
        f"{attribute.name[0]}{'x'.join(map(str, attribute.ints))}"
        for attribute in sorted(node.attribute, key=lambda a: a.name)
        if attribute.name in ("kernel_shape", "strides", "dilations", "pads")
    ]
    return FileNode(node.op_type, tuple(i for i in _reads(node) if i), tuple(node.output), weight, " ".join(settings))


def _uses(graph: Any) -> Counter[str]:
    """How often every tensor is read, or is an output."""
    return Counter([o.name for o in graph.output] + [name for node in graph.node for name in _reads(node)])


def _reads(node: Any) -> list[str]:
    """What a node reads; branches and loops inside of it read by name what lies around them."""
    return [*node.input, *(name for graph in _branches(node) for inner in _everywhere(graph) for name in inner.input)]


def _everywhere(graph: Any) -> Iterator[Any]:
    """The nodes of a graph, and those inside of its branches and loops."""
    for node in graph.node:
        yield node
        for inner in _branches(node):
            yield from _everywhere(inner)


def _branches(node: Any) -> Iterator[Any]:
    """The graphs that a node of control flow runs."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
