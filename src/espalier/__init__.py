"""Espalier: compress convolutional networks to an exact budget, as ordinary, smaller PyTorch models.

>>> import espalier as es
>>> small = es.compress(model, example, budget=es.Budget(macs=0.5), method=es.Magnitude()).model   # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # the same table for type checkers
    from espalier.costs import Cost as Cost, cost as cost
    from espalier.deploy.int8 import export_int8 as export_int8
    from espalier.deploy.torch_files import export_torch as export_torch
    from espalier.graph import (
        Graph as Graph,
        TraceError as TraceError,
        find_blocks as find_blocks,
        trace as trace,
        with_blocks as with_blocks,
    )
    from espalier.methods.agreement import average_gradients as average_gradients
    from espalier.methods.base import Method as Method, Run as Run, attach as attach
    from espalier.methods.dprp import DPRP as DPRP
    from espalier.methods.joint import Joint as Joint
    from espalier.methods.magnitude import Magnitude as Magnitude
    from espalier.methods.mgp import MGP as MGP
    from espalier.methods.svd_oneshot import SVDOneShot as SVDOneShot
    from espalier.methods.tcp import TCP as TCP
    from espalier.methods.tt_lc import TTLC as TTLC
    from espalier.optional import MissingPackage as MissingPackage
    from espalier.plan import Budget as Budget, Plan as Plan
    from espalier.present.ship import load_run as load_run
    from espalier.run.compress import ProofError as ProofError, Result as Result, compress as compress
    from espalier.run.data import Loaders as Loaders, load_data as load_data
    from espalier.run.ema import follow as follow
    from espalier.run.latency import latency as latency
    from espalier.run.loop import TrainingDiverged as TrainingDiverged
    from espalier.run.models import build_model as build_model, load_weights as load_weights
    from espalier.run.onnx import export_onnx as export_onnx
    from espalier.run.recipe import Recipe as Recipe
    from espalier.run.stopping import TrainingStopped as TrainingStopped
    from espalier.run.zeroed import remove_zeroed as remove_zeroed
    from espalier.solver import BudgetError as BudgetError, solve as solve
    from espalier.surgery import load as load, save as save, shrink as shrink, verify as verify
    from espalier.tasks import (
        Classification as Classification,
        Detection as Detection,
        Metric as Metric,
        Regression as Regression,
        Segmentation as Segmentation,
        SuperResolution as SuperResolution,
        Task as Task,
    )
    from espalier.timing.making import profile as profile
    from espalier.timing.profile import Profile as Profile, load_profile as load_profile, save_profile as save_profile

_HOME = {
    name: module
    for module, names in {
        "espalier.costs": "Cost cost",
        "espalier.deploy.int8": "export_int8",
        "espalier.deploy.torch_files": "export_torch",
        "espalier.graph": "Graph TraceError find_blocks trace with_blocks",
        "espalier.methods.agreement": "average_gradients",
        "espalier.methods.base": "Method Run attach",
        "espalier.methods.dprp": "DPRP",
        "espalier.methods.joint": "Joint",
        "espalier.methods.magnitude": "Magnitude",
        "espalier.methods.mgp": "MGP",
        "espalier.methods.svd_oneshot": "SVDOneShot",
        "espalier.methods.tcp": "TCP",
        "espalier.methods.tt_lc": "TTLC",
        "espalier.optional": "MissingPackage",
        "espalier.plan": "Budget Plan",
        "espalier.present.ship": "load_run",
        "espalier.run.compress": "ProofError Result compress",
        "espalier.run.data": "Loaders load_data",
        "espalier.run.ema": "follow",
        "espalier.run.latency": "latency",
        "espalier.run.loop": "TrainingDiverged",
        "espalier.run.models": "build_model load_weights",
        "espalier.run.onnx": "export_onnx",
        "espalier.run.recipe": "Recipe",
        "espalier.run.stopping": "TrainingStopped",
        "espalier.run.zeroed": "remove_zeroed",
        "espalier.solver": "BudgetError solve",
        "espalier.surgery": "load save shrink verify",
        "espalier.tasks": "Classification Detection Metric Regression Segmentation SuperResolution Task",
        "espalier.timing.making": "profile",
        "espalier.timing.profile": "Profile load_profile save_profile",
    }.items()
    for name in names.split()
}
"""Name -> the module that it is imported from."""

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
