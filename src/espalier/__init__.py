"""Espalier: compress convolutional networks to an exact budget, as ordinary, smaller PyTorch models.

>>> import espalier as es
>>> small = es.compress(model, example, budget=es.Budget(macs=0.5), method=es.Magnitude()).model   # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # the same table for type checkers
    from espalier.costs import Cost as Cost
    from espalier.costs import cost as cost
    from espalier.deploy.int8 import export_int8 as export_int8
    from espalier.deploy.torch_files import export_torch as export_torch
    from espalier.graph import Graph as Graph
    from espalier.graph import TraceError as TraceError
    from espalier.graph import find_blocks as find_blocks
    from espalier.graph import trace as trace
    from espalier.graph import with_blocks as with_blocks
    from espalier.methods.agreement import average_gradients as average_gradients
    from espalier.methods.base import Method as Method
    from espalier.methods.base import Run as Run
    from espalier.methods.base import attach as attach
    from espalier.methods.dprp import DPRP as DPRP
    from espalier.methods.joint import Joint as Joint
    from espalier.methods.magnitude import Magnitude as Magnitude
    from espalier.methods.mgp import MGP as MGP
    from espalier.methods.svd_oneshot import SVDOneShot as SVDOneShot
    from espalier.methods.tcp import TCP as TCP
    from espalier.methods.tt_lc import TTLC as TTLC
    from espalier.optional import MissingPackage as MissingPackage
    from espalier.plan import Budget as Budget
    from espalier.plan import Plan as Plan
    from espalier.present.ship import load_run as load_run
    from espalier.run.compress import ProofError as ProofError
    from espalier.run.compress import Result as Result
    from espalier.run.compress import compress as compress
    from espalier.run.data import Loaders as Loaders
    from espalier.run.data import load_data as load_data
    from espalier.run.ema import follow as follow
    from espalier.run.latency import latency as latency
    from espalier.run.loop import TrainingDiverged as TrainingDiverged
    from espalier.run.models import build_model as build_model
    from espalier.run.models import load_weights as load_weights
    from espalier.run.onnx import export_onnx as export_onnx
    from espalier.run.recipe import Recipe as Recipe
    from espalier.run.stopping import TrainingStopped as TrainingStopped
    from espalier.solver import BudgetError as BudgetError
    from espalier.solver import solve as solve
    from espalier.surgery import load as load
    from espalier.surgery import save as save
    from espalier.surgery import shrink as shrink
    from espalier.surgery import verify as verify
    from espalier.tasks import Classification as Classification
    from espalier.tasks import Detection as Detection
    from espalier.tasks import Metric as Metric
    from espalier.tasks import Regression as Regression
    from espalier.tasks import Segmentation as Segmentation
    from espalier.tasks import SuperResolution as SuperResolution
    from espalier.tasks import Task as Task
    from espalier.timing.making import profile as profile
    from espalier.timing.profile import Profile as Profile
    from espalier.timing.profile import load_profile as load_profile
    from espalier.timing.profile import save_profile as save_profile

_HOME = {
    "Task": "espalier.tasks",
    "SuperResolution": "espalier.tasks",
    "Segmentation": "espalier.tasks",
    "Regression": "espalier.tasks",
    "Metric": "espalier.tasks",
    "Detection": "espalier.tasks",
    "Classification": "espalier.tasks",
    "Budget": "espalier.plan",
    "BudgetError": "espalier.solver",
    "Cost": "espalier.costs",
    "DPRP": "espalier.methods.dprp",
    "Graph": "espalier.graph",
    "Joint": "espalier.methods.joint",
    "Loaders": "espalier.run.data",
    "MGP": "espalier.methods.mgp",
    "Magnitude": "espalier.methods.magnitude",
    "Method": "espalier.methods.base",
    "MissingPackage": "espalier.optional",
    "Plan": "espalier.plan",
    "Profile": "espalier.timing.profile",
    "ProofError": "espalier.run.compress",
    "Recipe": "espalier.run.recipe",
    "Result": "espalier.run.compress",
    "Run": "espalier.methods.base",
    "SVDOneShot": "espalier.methods.svd_oneshot",
    "TCP": "espalier.methods.tcp",
    "TTLC": "espalier.methods.tt_lc",
    "TraceError": "espalier.graph",
    "TrainingDiverged": "espalier.run.loop",
    "TrainingStopped": "espalier.run.stopping",
    "attach": "espalier.methods.base",
    "average_gradients": "espalier.methods.agreement",
    "build_model": "espalier.run.models",
    "compress": "espalier.run.compress",
    "cost": "espalier.costs",
    "export_int8": "espalier.deploy.int8",
    "export_onnx": "espalier.run.onnx",
    "export_torch": "espalier.deploy.torch_files",
    "latency": "espalier.run.latency",
    "find_blocks": "espalier.graph",
    "follow": "espalier.run.ema",
    "load": "espalier.surgery",
    "load_data": "espalier.run.data",
    "load_run": "espalier.present.ship",
    "load_profile": "espalier.timing.profile",
    "load_weights": "espalier.run.models",
    "profile": "espalier.timing.making",
    "save": "espalier.surgery",
    "save_profile": "espalier.timing.profile",
    "shrink": "espalier.surgery",
    "solve": "espalier.solver",
    "trace": "espalier.graph",
    "verify": "espalier.surgery",
    "with_blocks": "espalier.graph",
}

_RENAMED = {"Process": "Run"}

_MODULES = {"huggingface": "espalier.trainers.huggingface", "lightning": "espalier.trainers.lightning"}
"""Modules of their own, because they need a package that most do without."""

__all__ = [*sorted(_HOME), "__version__"]


def __getattr__(name: str) -> Any:
    """Names are imported when first used, so that ``import espalier`` costs nothing."""
    if name in _RENAMED:
        import warnings

        warnings.warn(f"es.{name} is called es.{_RENAMED[name]} now", DeprecationWarning, stacklevel=2)
        name = _RENAMED[name]
    if name in _MODULES:
        import importlib

        return importlib.import_module(_MODULES[name])
    if name not in _HOME:
        raise AttributeError(f"module 'espalier' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
