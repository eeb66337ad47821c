"""Espalier: compress convolutional networks to an exact budget, as ordinary, smaller PyTorch models.

>>> import espalier as es
>>> small = es.compress(model, example, budget=es.Budget(macs=0.5), method=es.Magnitude()).model   # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from espalier.costs import Cost, cost
    from espalier.graph import Graph, trace
    from espalier.methods.base import attach
    from espalier.methods.magnitude import Magnitude
    from espalier.methods.tcp import TCP
    from espalier.plan import Budget, Plan
    from espalier.run.compress import Result, compress
    from espalier.run.data import load_data
    from espalier.run.models import build_model, load_weights
    from espalier.run.onnx import export_onnx
    from espalier.run.recipe import Recipe
    from espalier.solver import BudgetError, solve
    from espalier.surgery import load, save, shrink, verify

_HOME = {
    "Budget": "espalier.plan",
    "BudgetError": "espalier.solver",
    "Cost": "espalier.costs",
    "Graph": "espalier.graph",
    "Magnitude": "espalier.methods.magnitude",
    "Plan": "espalier.plan",
    "Recipe": "espalier.run.recipe",
    "Result": "espalier.run.compress",
    "TCP": "espalier.methods.tcp",
    "attach": "espalier.methods.base",
    "build_model": "espalier.run.models",
    "compress": "espalier.run.compress",
    "cost": "espalier.costs",
    "export_onnx": "espalier.run.onnx",
    "load": "espalier.surgery",
    "load_data": "espalier.run.data",
    "load_weights": "espalier.run.models",
    "save": "espalier.surgery",
    "shrink": "espalier.surgery",
    "solve": "espalier.solver",
    "trace": "espalier.graph",
    "verify": "espalier.surgery",
}

__all__ = [*sorted(_HOME), "__version__"]


def __getattr__(name: str) -> Any:
    """Names are imported when first used, so that ``import espalier`` costs nothing."""
    if name not in _HOME:
        raise AttributeError(f"module 'espalier' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
