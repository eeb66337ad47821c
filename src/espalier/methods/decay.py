"""Frobenius decay: weight decay of what a row of layers composes to, in place of the decay of each of its weights.

Khodak, Tenenholtz, Mackey, Fusi: "Initialization and Regularization of Factorized Neural Layers", ICLR 2021.  Decay of every
factor amounts to a nuclear norm of the product (two balanced factors): it empties the small singular values.  ``|D|^2 / 2`` is
what the dense layer decayed by.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from espalier.layers import compose_row


def decay_products(rows: Iterable[Any], optimizer: torch.optim.Optimizer, *, steps: int) -> None:
    """Make the decay by ``optimizer`` of the weights of ``rows`` in the last ``steps`` steps one of ``|D|^2 / 2``.

    A step moves a weight ``w`` by ``-e w`` on its own account, ``e`` being the rate times the decay, over what momentum leaves
    of a step: that is given back, and ``e`` times the gradient of ``|D(w)|^2 / 2`` taken.
    """
    pace = {}
    for group in optimizer.param_groups:
        e = group["lr"] * group.get("weight_decay", 0.0) / (1.0 - group.get("momentum", 0.0))
        pace.update({id(p): e for p in group["params"]})
    for row in rows:
        weights = [layer.weight for layer in row]
        with torch.enable_grad():
            gradients = torch.autograd.grad(0.5 * compose_row(weights).square().sum(), weights)
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.add_(weight - gradient, alpha=steps * pace[id(weight)])
