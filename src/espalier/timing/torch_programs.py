"""Sub-networks of one network as programs of ``torch.export``, which PyTorch runs operation by operation."""

from __future__ import annotations

import io
import warnings
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from espalier.graph import Graph
from espalier.graph.tracing import call_arguments
from espalier.graph.watch import first_line
from espalier.timing.marks import FileNode, Written, marked, marks_of

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution")
PRODUCTS = ("linear", "matmul", "mm", "bmm")
LAYERS = {**dict.fromkeys((*CONVOLUTIONS, *PRODUCTS), 1), "addmm": 2}  # where they take a layer's weight
SETTINGS = ("stride", "padding", "dilation")


class TorchPrograms:
    """All networks of one model as programs, each exported by itself."""

    def __init__(self, model: nn.Module, graph: Graph, example: Any) -> None:
        self._graph, self._example = graph, example
        self.layers = _mark(exported(model, example), graph).layers

    def written(self, model: nn.Module) -> bytes:
        """``model``, which is a network of this graph."""
        return _mark(exported(model, self._example), self._graph).content

    def cut(self, kept: Any) -> None:
        """Nothing: sizes stand in a program."""
        return


def exported(model: nn.Module, example: Any) -> Any:
    """The program of ``model`` in eval mode, for the batch of ``example``.

    Raises: ValueError where PyTorch does not export it.
    """
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            return torch.export.export(model, *call_arguments(example, "cpu"))
        except Exception as error:
            raise ValueError(f"profile: torch.export cannot export the model: {first_line(error)}") from error


def saved(program: Any) -> bytes:
    """The program as a file."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(program, file)
    return file.getvalue()


def _mark(program: Any, graph: Graph) -> Written:
    """Name every operation after the layer that it belongs to."""
    signature = program.graph_signature
    learnt = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    learnt |= getattr(signature, "inputs_to_lifted_tensor_constants", {})
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    marks, layers = marks_of(
        [_node(n, learnt) for n in calls], graph, given=signature.user_inputs, weights=learnt.values()
    )
    for number, (node, mark) in enumerate(zip(calls, marks, strict=True)):
        if mark is not None:
            before = node.name
            node._rename(marked(str(number), mark))
            signature.replace_all_uses(before, node.name)
    program.graph_module.recompile()
    return Written(saved(program), layers)


def _node(node: Node, learnt: dict[str, str]) -> FileNode:
    names = [learnt.get(n.name, n.name) for n in node.all_input_nodes]
    kind = str(node.target).removeprefix("aten.").partition(".")[0]
    weight = node.args[LAYERS[kind]] if kind in LAYERS else None
    if not isinstance(weight, Node):
        return FileNode(kind, tuple(names), (node.name,))
    words = [f"k{'x'.join(map(str, weight.meta['val'].shape[2:]))}"] if weight.meta["val"].dim() > 2 else []
    schema: Any = getattr(node.target, "_schema")  # noqa: B009
    for argument, value in zip(schema.arguments, node.args, strict=False):
        if argument.name in SETTINGS:
            words.append(f"{argument.name[0]}{'x'.join(map(str, value if isinstance(value, list) else [value]))}")
    return FileNode(kind, tuple(names), (node.name,), learnt.get(weight.name, weight.name), " ".join(words))
