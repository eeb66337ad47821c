"""Sub-networks of one network as files that a runtime measures, whose nodes say to which layer they belong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from torch import nn
from torch.utils._pytree import tree_leaves

from espalier.copies import copy_model
from espalier.graph import Graph
from espalier.graph.graph import FORM
from espalier.plan import Plan
from espalier.surgery import shrink
from espalier.timing.bits import in_precision
from espalier.timing.marks import FileLayer
from espalier.timing.onnx_files import OnnxFiles, arguments_in_order
from espalier.timing.profile import ProfileSetting
from espalier.timing.torch_programs import TorchPrograms


class Files(Protocol):
    """How networks of one graph are written for a runtime."""

    layers: tuple[FileLayer, ...]

    def written(self, model: nn.Module) -> bytes:
        """``model``, which is a network of this graph."""

    def cut(self, kept: Mapping[str, Mapping[int, np.ndarray]]) -> bytes | None:
        """The network of which ``kept`` is left, if a file can be had without the network; else ``None``."""


class Family:
    """All networks that plans make of one model, as files."""

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        example: Any,
        *,
        put: Callable[[nn.Module, Mapping[str, int]], None] | None = None,
        setting: ProfileSetting | None = None,
    ) -> None:
        """``example`` is what ``batched`` returns; ``put`` gives layers the forms that a plan has chosen among
        ``graph.alternatives``; files are for ``setting``."""
        self._put, self._setting = put, setting
        self._model, self._graph, self._example = copy_model(model, {}).cpu().eval(), graph, example
        files = TorchPrograms if setting is not None and setting.runtime == "torch" else OnnxFiles
        self._files: Files = files(self._model, graph, self._example)

    @property
    def layers(self) -> tuple[FileLayer, ...]:
        """In the order of the file."""
        return self._files.layers

    @property
    def graph(self) -> Graph:
        """Of the model."""
        return self._graph

    @property
    def batch(self) -> int:
        """Of the inputs."""
        return len(tree_leaves(self._example)[0])

    def file(self, plan: Plan) -> bytes:
        """The network of ``plan``: its weights mean nothing, its nodes are marked by layer (``layer_of``)."""
        inputs = tree_leaves(arguments_in_order(self._model, self._example))
        return in_precision(self._plain(plan), self._setting, [x.numpy() for x in inputs])

    def _plain(self, plan: Plan) -> bytes:
        kept = self._graph.kept({n: np.asarray(u) for n, u in plan.keep.items()})
        forms = {
            g.name: len(plan.keep[g.name])
            for g in self._graph.groups
            if g.kind == FORM and g.name in plan.keep and len(plan.keep[g.name]) < g.size
        }
        shorter = any(len(plan.keep.get(b.group, (0, 1))) < 2 for b in self._graph.blocks)
        selects = any(f"{n}.index" in kept for n in self._graph.selects)
        content = None if shorter or forms or selects else self._files.cut(kept)
        if content is not None:
            return content
        small = shrink(self._model, self._graph, plan)
        if forms:
            assert self._put is not None, "a graph with alternatives needs someone who builds them"
            small = copy_model(small, {})
            self._put(small, forms)
        return self._files.written(small)
