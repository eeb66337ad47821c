"""A convolution or linear layer that is trained as its singular value decomposition, ``M = U diag(s) V^T``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espalier.forms.chains import stages
from espalier.forms.places import Place, out_size
from espalier.forms.svd import from_matrix, stage_weights, svd, to_matrix
from espalier.layers import OwnDecay

Pair = tuple[int, int]


class LowRank(OwnDecay):
    """``u`` is ``(m, r)``, ``s`` is ``(r,)``, ``v`` is ``(n, r)``; ``m`` and ``n`` follow from ``form`` (``forms.svd``).

    Near full rank it composes its weight and runs one convolution; below break-even it runs two small ones.  What is cheaper
    at the batch that comes decides: composing costs ``r m n`` however many images there are.  Both compute the same.

    While ``u`` and ``v`` are orthonormal, ``|M|^2 = |s|^2``: weight decay of ``s`` alone is weight decay of the layer.

    The gradients of ``u`` and ``v`` are those of the product times ``1 / (2 s^2)``, damped where ``s`` is small.  A step of
    plain gradients would move ``M`` by ``s^2`` times the step that dense training takes, which diverges for large weights; this
    way a step at full rank is that of dense training and a little more along ``s`` (Tong, Ma, Chi: Accelerating
    Ill-Conditioned Low-Rank Matrix Estimation via Scaled Gradient Descent, JMLR 22, 2021).
    """

    decayed = ("s",)
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        rank: int,
        form: str = "channel",
        kernel_size: Pair = (1, 1),
        stride: Pair = (1, 1),
        padding: Pair = (0, 0),
        dilation: Pair = (1, 1),
        linear: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.padding, self.dilation = kernel_size, stride, padding, dilation
        self.form, self.linear = form, linear
        rows, columns = matrix_size(self.shape, form)
        if not 1 <= rank <= min(rows, columns):
            raise ValueError(f"LowRank(rank={rank}): a {rows} x {columns} matrix has ranks 1 to {min(rows, columns)}")
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.u = nn.Parameter(torch.zeros(rows, rank, **kind))
        self.s = nn.Parameter(torch.zeros(rank, **kind))
        self.v = nn.Parameter(torch.zeros(columns, rank, **kind))
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_channels, **kind)) if bias else None)
        place = Place(
            "", out_channels, in_channels, kernel_size, stride, padding, dilation, (1, 1), 1, 1, linear=linear
        )
        self._stages = stages(place, form)

    @staticmethod
    def of(layer: nn.Conv2d | nn.Linear, place: Place, *, form: str) -> LowRank:
        """The same function as ``layer``, which stands at ``place``, at full rank; its bias is taken over as it is."""
        weight = layer.weight.detach()
        u, s, v = svd(to_matrix(weight, form), name=place.name)
        made = LowRank(
            place.in_channels, place.out_channels, rank=len(s), form=form, kernel_size=place.kernel, stride=place.stride,
            padding=place.padding, dilation=place.dilation, linear=place.linear, bias=layer.bias is not None,
            device=weight.device, dtype=weight.dtype,
        )  # fmt: skip
        with torch.no_grad():
            made.u.copy_(u)
            made.s.copy_(s)
            made.v.copy_(v)
        for factor in (made.u, made.s, made.v):
            factor.requires_grad_(layer.weight.requires_grad)
        made._parameters["bias"] = layer._parameters["bias"]  # the very same: whoever trains it goes on
        return made

    @property
    def rank(self) -> int:
        return self.s.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        ends = (self.out_channels, self.in_channels)
        return ends if self.linear else (*ends, *self.kernel_size)

    @property
    def weight(self) -> Tensor:
        """The composed weight, ``(O, I, kh, kw)`` or ``(O, I)``."""
        u, v = self._scaled()
        return from_matrix((u * self.s) @ v.T, self.shape, self.form)

    def stage_weights(self) -> list[Tensor]:
        """Weights of the two small layers, first to last."""
        u, v = self._scaled()
        return stage_weights(u * self.s, v, self.shape, self.form)

    def _scaled(self) -> tuple[Tensor, Tensor]:
        """``u`` and ``v``, with gradients that step like those of the dense weight."""
        if not (torch.is_grad_enabled() and self.u.requires_grad):
            return self.u, self.v
        squares = self.s.detach().square()
        factor = 0.5 / (squares + DAMPING * squares.max()).clamp_min(torch.finfo(squares.dtype).tiny)
        u, v = _ScaleGradient.apply(self.u, factor), _ScaleGradient.apply(self.v, factor)
        return u, v

    def composes(self, x: Tensor) -> bool:
        """Is one convolution, its weight composed first, cheaper for ``x`` than two small ones?"""
        rank, taps = self.rank, math.prod(self.kernel_size)
        whole = self.out_channels * self.in_channels * taps
        if self.linear:
            positions = x.numel() // x.shape[-1]
            return whole * (positions + rank) < positions * rank * (self.in_channels + self.out_channels)
        size, macs = (x.shape[-2], x.shape[-1]), 0
        for stage, pairs in zip(self._stages, (self.in_channels * rank, rank * self.out_channels), strict=True):
            size = out_size(size, stage.kernel, stage.stride, stage.padding, stage.dilation)
            macs += math.prod(size) * math.prod(stage.kernel) * pairs
        return whole * (x.shape[0] * math.prod(size) + rank) < x.shape[0] * macs

    def forward(self, x: Tensor) -> Tensor:
        if self.composes(x):
            return self._run(x)
        first, second = self.stage_weights()
        if self.linear:
            return F.linear(F.linear(x, first), second, self.bias)
        one, two = self._stages
        x = F.conv2d(x, first, None, one.stride, one.padding, one.dilation)
        return F.conv2d(x, second, self.bias, two.stride, two.padding, two.dilation)

    def _run(self, x: Tensor) -> Tensor:
        if self.linear:
            return F.linear(x, self.weight, self.bias)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation)

    def dense(self) -> nn.Conv2d | nn.Linear:
        """The plain layer with the composed weight."""
        made = self.dense_twin(device=self.u.device)
        with torch.no_grad():
            made.weight.copy_(self.weight)
        made.bias = self.bias
        return made

    def dense_twin(self, *, device: Any = "meta") -> nn.Conv2d | nn.Linear:
        """A plain layer of the same geometry, its weights undefined."""
        kind: dict[str, Any] = {"bias": self.bias is not None, "device": device, "dtype": self.u.dtype}
        if self.linear:
            return nn.utils.skip_init(nn.Linear, self.in_channels, self.out_channels, **kind)
        return nn.utils.skip_init(
            nn.Conv2d, self.in_channels, self.out_channels, self.kernel_size, stride=self.stride,
            padding=self.padding, dilation=self.dilation, **kind,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, rank={self.rank}, form={self.form}, "
            f"kernel_size={self.kernel_size}, stride={self.stride}, bias={self.bias is not None}"
        )


class _ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a factor per column."""

    @staticmethod
    def forward(context: Any, x: Tensor, factor: Tensor) -> Tensor:
        context.save_for_backward(factor)
        return x.view_as(x)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (factor,) = context.saved_tensors
        return gradients[0] * factor, None


DAMPING = 0.01  # of the largest squared singular value


def matrix_size(shape: tuple[int, ...], form: str) -> tuple[int, int]:
    """Rows and columns of a weight of ``shape`` as a matrix."""
    if form == "channel":
        return shape[0], math.prod(shape[1:])
    return shape[0] * shape[2], shape[1] * shape[3]


# -- the same matrix in an orthonormal basis ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """``U diag(s) V^T`` written anew as ``u diag(s) v^T`` with orthonormal ``u``, ``v`` and falling ``s``.

    ``left`` and ``right`` are the changes of basis, ``U left = u`` and ``V right = v``.  A change ``ds`` of the old values is
    ``above diag(ds) below`` in the new basis, both ``(r, r)``.
    """

    u: Tensor
    s: Tensor
    v: Tensor
    left: Tensor
    right: Tensor
    above: Tensor
    below: Tensor

    def tangent(self, du: Tensor, ds: Tensor, dv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The step ``(du, ds, dv)`` in the new factors: to first order the same step of the matrix.

        ``dU s V^T`` and ``U s dV^T`` only change basis.  ``U diag(ds) V^T`` becomes a full core: its diagonal is the new
        ``ds``, the rest ``D`` turns the factors by the smallest ``X``, ``Y`` with ``X diag(s) + diag(s) Y^T = D``.  Where two
        values are both below ``FLOOR`` of the largest, ``D`` is dropped: as turns of next to nothing it would be far too large
        for a first-order step (trained networks have dead filters, and it did make them explode).
        """
        core = (self.above * ds) @ self.below
        fresh = core.diagonal().clone()
        core = core - torch.diag(fresh)
        squares = self.s.square()
        pairs = squares[:, None] + squares[None, :]
        core = core * pairs / (pairs.square() + (FLOOR * self.s.max()) ** 4).clamp_min(torch.finfo(core.dtype).tiny)
        return (
            du @ self.left + self.u @ (core * self.s),
            fresh,
            dv @ self.right + self.v @ (core * self.s[:, None]).T,
        )

    def spread(self, du: Tensor, ds: Tensor, dv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Second moments in the new basis, the old coordinates taken as uncorrelated; exact where columns only swap."""
        return du @ self.left.square(), self.mixed(ds), dv @ self.right.square()

    def mixed(self, values: Tensor) -> Tensor:
        """Squares per singular value in the new basis, likewise."""
        return (self.above * self.below.T).square() @ values


FLOOR = 0.03


@torch.no_grad()
def orthonormalise(u: Tensor, s: Tensor, v: Tensor, *, name: str) -> Turn:
    """The singular value decomposition of ``u diag(s) v^T``, through ``(r, r)`` matrices only.

    ``U = Q R`` and ``V = P T`` in float64, then the decomposition of the core ``R diag(s) T^T``, whose factors are polished.
    ``ValueError`` naming the layer ``name`` if there is no finite result.
    """
    q, r = _qr(u.double())
    p, t = _qr(v.double())
    core = (r * s.double()) @ t.T
    a, values, b = svd(core.to(s.dtype), name=name)
    a, b = _polished(a.double()).to(s.dtype), _polished(b.double()).to(s.dtype)
    q, r, p, t = (x.to(s.dtype) for x in (q, r, p, t))
    left, right = (torch.linalg.solve_triangular(x, y, upper=True) for x, y in ((r, a), (t, b)))
    return Turn(q @ a, values, p @ b, left, right, a.T @ r, t.T @ b)


def _polished(matrix: Tensor) -> Tensor:
    """Orthonormal columns to twice as many digits: one step of Newton and Schulz."""
    return 1.5 * matrix - 0.5 * matrix @ (matrix.T @ matrix)


def _qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """By Cholesky where the columns are nearly orthonormal, as they are here: faster, and in float64 as exact."""
    factor, failed = torch.linalg.cholesky_ex(matrix.T @ matrix)
    diagonal = factor.diagonal()
    if int(failed) or not bool(diagonal.min() > 1e-3 * diagonal.max()):
        return torch.linalg.qr(matrix)
    r = factor.T
    return torch.linalg.solve_triangular(r, matrix, upper=True, left=False), r
