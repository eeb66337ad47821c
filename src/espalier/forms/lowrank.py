"""A convolution or linear layer that is trained as its singular value decomposition, ``M = U diag(s) V^T``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from espalier.forms.places import CONVOLUTIONS, Place, Sizes, out_size
from espalier.forms.svd import svd
from espalier.forms.table import matrix_form
from espalier.layers import Composed, OwnDecay

CONVOLVE: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class LowRank(OwnDecay):
    """``u`` is ``(m, r)``, ``s`` is ``(r,)``, ``v`` is ``(n, r)``; ``m`` and ``n`` follow from ``form`` (``forms.svd``).

    Near full rank it composes its weight and runs one convolution; below break-even it runs two small ones.  What is cheaper
    at the batch that comes decides: composing costs ``r m n`` however many images there are.  Both compute the same.

    At full rank it may be ``whole``: one of ``u`` and ``v`` is the matrix itself, the other the identity, which rests as ``s``
    does.  A step is then that of dense training; ``surgery.split_layers`` makes it a singular value decomposition before its
    rank falls.

    While ``u`` and ``v`` are orthonormal, ``|M|^2 = |s|^2``: weight decay of ``s`` alone is weight decay of the layer.

    The gradients of ``u`` and ``v`` are those of the product times ``1 / (2 s^2)``, damped where ``s`` is small.  A step of
    plain gradients would move ``M`` by ``s^2`` times the step that dense training takes, which diverges for large weights; this
    way a step at full rank is that of dense training and a little more along ``s`` (Tong, Ma, Chi: Accelerating
    Ill-Conditioned Low-Rank Matrix Estimation via Scaled Gradient Descent, JMLR 22, 2021).
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        rank: int,
        form: str = "channel",
        kernel_size: Sizes = (1, 1),
        stride: Sizes = (1, 1),
        padding: Sizes = (0, 0),
        dilation: Sizes = (1, 1),
        linear: bool = False,
        bias: bool = True,
        whole: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.padding, self.dilation = kernel_size, stride, padding, dilation
        self.form, self.linear = form, linear
        self._matrix = matrix_form(form)
        # what a forward may read of the layer that was here
        self.groups, self.padding_mode, self.transposed = 1, "zeros", False
        self.output_padding = (0,) * len(kernel_size)
        if linear:
            self.in_features, self.out_features = in_channels, out_channels
        rows, columns = self._matrix.size(self.shape)
        if not 1 <= rank <= min(rows, columns):
            raise ValueError(f"LowRank(rank={rank}): a {rows} x {columns} matrix has ranks 1 to {min(rows, columns)}")
        if whole and rank < min(rows, columns):
            raise ValueError(
                f"LowRank(rank={rank}, whole=True): below full rank, {min(rows, columns)}, nothing is whole"
            )
        self.whole, self.tall = whole, rows >= columns
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.u = nn.Parameter(torch.zeros(rows, rank, **kind))
        self.s = nn.Parameter(torch.zeros(rank, **kind))
        self.v = nn.Parameter(torch.zeros(columns, rank, **kind))
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_channels, **kind)) if bias else None)
        size = (1,) * len(kernel_size)
        place = Place("", out_channels, in_channels, kernel_size, stride, padding, dilation, size, 1, 1, linear=linear)
        self._stages = self._matrix.stages(place)

    @staticmethod
    def of(layer: Any, place: Place, *, form: str, whole: bool = False) -> LowRank:
        """The same function as ``layer``, which stands at ``place``, at full rank; its bias is taken over as it is."""
        matrix = matrix_form(form).matrix(layer.weight.detach())
        made = LowRank(
            place.in_channels, place.out_channels, rank=min(matrix.shape), form=form, kernel_size=place.kernel,
            stride=place.stride, padding=place.padding, dilation=place.dilation, linear=place.linear,
            bias=layer.bias is not None, whole=whole, device=matrix.device, dtype=matrix.dtype,
        )  # fmt: skip
        if whole:
            identity = torch.eye(made.rank, device=matrix.device, dtype=matrix.dtype)
            ones = matrix.new_ones(made.rank)
            factors = (matrix, ones, identity) if made.tall else (identity, ones, matrix.T)
        else:
            factors = svd(matrix, name=place.name)
        with torch.no_grad():
            for factor, value in zip((made.u, made.s, made.v), factors, strict=True):
                factor.copy_(value)
                factor.requires_grad_(layer.weight.requires_grad)
        made._parameters["bias"] = layer._parameters["bias"]  # the very same: whoever trains it goes on
        return made

    @property
    def decayed(self) -> tuple[str, ...]:
        return (("u" if self.tall else "v") if self.whole else "s",)

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
        """The composed weight, ``(O, I, *kernel)`` or ``(O, I)``; computed when it is used."""
        return Composed.of(self, self.shape, self.u)

    def composed(self) -> Tensor:
        """The weight, computed now, in the precision of autocast."""
        if self.whole:
            matrix = self.matrix.to(self._dtype)
            return self._matrix.weight(matrix if self.tall else matrix.T, self.shape)
        left, right = self._sides()
        return self._matrix.weight(left @ right.T, self.shape)

    @property
    def matrix(self) -> nn.Parameter:
        """The factor that holds the matrix, or its transpose, while the layer is whole."""
        return self.u if self.tall else self.v

    def stage_weights(self) -> list[Tensor]:
        """Weights of the two small layers, first to last."""
        return self._matrix.stage_weights(*self._sides(), self.shape)

    def _sides(self) -> tuple[Tensor, Tensor]:
        """``U diag(s)`` and ``V``, in the precision of autocast, with gradients that step like those of the dense weight."""
        squares = self.s.detach().square()
        factor = 0.5 / (squares + DAMPING * squares.max()).clamp_min(torch.finfo(squares.dtype).tiny)
        sides: tuple[Tensor, Tensor] = _Sides.apply(self.u, self.s, self.v, factor, self._dtype)
        return sides

    @property
    def _dtype(self) -> torch.dtype:
        """What convolutions run in now."""
        dtype, device = self.u.dtype, self.u.device.type
        return (
            torch.get_autocast_dtype(device) if dtype == torch.float32 and torch.is_autocast_enabled(device) else dtype
        )

    def composes(self, x: Tensor) -> bool:
        """Is one convolution, its weight composed first, cheaper for ``x`` than two small ones?"""
        if self.whole:
            return True
        rank, taps = self.rank, math.prod(self.kernel_size)
        whole = self.out_channels * self.in_channels * taps
        if self.linear:
            positions = x.numel() // x.shape[-1]
            return whole * (positions + rank) < positions * rank * (self.in_channels + self.out_channels)
        size, macs = tuple(x.shape[2:]), 0
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
        first, second = _laid_out(first, x), _laid_out(second, x)
        convolve = CONVOLVE[len(self.kernel_size)]
        x = convolve(x, first, None, one.stride, one.padding, one.dilation)
        return convolve(x, second, self.bias, two.stride, two.padding, two.dilation)  # type: ignore[no-any-return]

    def _run(self, x: Tensor) -> Tensor:
        if self.linear:
            return F.linear(x, self.composed(), self.bias)
        convolve, weight = CONVOLVE[len(self.kernel_size)], _laid_out(self.composed(), x)
        return convolve(x, weight, self.bias, self.stride, self.padding, self.dilation)  # type: ignore[no-any-return]

    def dense(self) -> Any:
        """The plain layer with the composed weight."""
        made = self.dense_twin(device=self.u.device)
        with torch.no_grad():
            made.weight.copy_(self.composed())
        made.bias = self.bias
        return made

    def dense_twin(self, *, device: Any = "meta") -> Any:
        """A plain layer of the same geometry, its weights undefined."""
        kind: dict[str, Any] = {"bias": self.bias is not None, "device": device, "dtype": self.u.dtype}
        if self.linear:
            return nn.utils.skip_init(nn.Linear, self.in_channels, self.out_channels, **kind)
        return nn.utils.skip_init(
            CONVOLUTIONS[len(self.kernel_size)], self.in_channels, self.out_channels, self.kernel_size, stride=self.stride,
            padding=self.padding, dilation=self.dilation, **kind,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, rank={self.rank}, form={self.form}, "
            f"kernel_size={self.kernel_size}, stride={self.stride}, bias={self.bias is not None}"
        )


def _laid_out(weight: Tensor, x: Tensor) -> Tensor:
    """``weight`` in the memory format of ``x``: the convolution would copy it into that, forward and again backward."""
    if x.ndim != 4:
        return weight.contiguous()
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return weight.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


class _Sides(torch.autograd.Function):
    """``U diag(s)`` and ``V`` in ``dtype``; the gradients of ``U`` and ``V`` are multiplied by ``factor``, one per column.

    By hand because every pass over the factors counts: each rounding, product and scaling is one, and writes what is kept.
    """

    @staticmethod
    def forward(context: Any, u: Tensor, s: Tensor, v: Tensor, factor: Tensor, dtype: torch.dtype) -> Any:
        context.save_for_backward(u, s, factor)
        left = torch.mul(u, s, out=torch.empty_like(u, dtype=dtype))
        return left, v.view_as(v) if dtype == v.dtype else v.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(context: Any, left: Tensor, right: Tensor) -> Any:
        u, s, factor = context.saved_tensors
        du = torch.mul(left, s * factor, out=torch.empty_like(u))
        dv = torch.mul(right.contiguous(), factor, out=factor.new_empty(right.shape))
        return du, (left * u).sum(0), dv, None, None


DAMPING = 0.01  # of the largest squared singular value


# -- the same matrix in an orthonormal basis ---------------------------------------------------------------------------


@dataclass(frozen=True)
class BasisChange:
    """``U diag(s) V^T`` written anew as ``u diag(s) v^T`` with orthonormal ``u``, ``v`` and falling ``s``; one or a batch.

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
        fresh, du_of_core, dv_of_core = self._parted((self.above * ds[..., None, :]) @ self.below)
        return du @ self.left + du_of_core, fresh, dv @ self.right + dv_of_core

    def follow(self, u: Tensor, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Other factors in the old basis, near to these as an average over steps is, in the new one: as a tangent step away."""
        device = s.device
        left, right, above, below = (f.to(device) for f in (self.left, self.right, self.above, self.below))
        fresh, du, dv = self._parted(((above * s) @ below).to(self.s.device))
        return u @ left + du.to(device), fresh.to(device), v @ right + dv.to(device)

    def _parted(self, core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The diagonal of ``U core V^T``, and the rest as turns of ``u`` and of ``v``."""
        fresh = core.diagonal(dim1=-2, dim2=-1).clone()
        core = core - torch.diag_embed(fresh)
        squares = self.s.square()
        pairs = squares[..., :, None] + squares[..., None, :]
        floor = (FLOOR * self.s.amax(-1)[..., None, None]) ** 4
        core = core * pairs / (pairs.square() + floor).clamp_min(torch.finfo(core.dtype).tiny)
        return fresh, self.u @ (core * self.s[..., None, :]), self.v @ (core * self.s[..., :, None]).mT

    def spread(self, du: Tensor, ds: Tensor, dv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Second moments in the new basis, the old coordinates taken as uncorrelated; exact where columns only swap."""
        return du @ self.left.square(), self.mixed(ds), dv @ self.right.square()

    def mixed(self, values: Tensor) -> Tensor:
        """Squares per singular value in the new basis, likewise."""
        return ((self.above * self.below.mT).square().to(values) @ values[..., None])[..., 0]

    @staticmethod
    def alone(u: Tensor, s: Tensor, v: Tensor) -> BasisChange:
        """A decomposition that is its own old basis."""
        same = torch.eye(len(s), dtype=s.dtype)
        return BasisChange(u, s, v, same, same, same, same)

    def seen_from(self, old: BasisChange) -> BasisChange:
        """The change of basis from ``old``, the decomposition of a matrix that has been trained since, to this one."""
        above, below = self.u.T @ old.u, old.v.T @ self.v
        return BasisChange(self.u, self.s, self.v, above.T, below, above, below)

    def split(self) -> list[BasisChange]:
        """Those of a batch, one by one."""
        return [
            BasisChange(*row)
            for row in zip(*(getattr(self, field.name).unbind() for field in fields(self)), strict=True)
        ]


FLOOR = 0.03


@torch.no_grad()
def orthonormalise(u: Tensor, s: Tensor, v: Tensor, *, name: str) -> BasisChange:
    """The singular value decomposition of ``u diag(s) v^T``, through ``(r, r)`` matrices only.

    ``ValueError`` naming the layer ``name`` if there is no finite result.
    """
    return orthonormalise_batch(u[None], s[None], v[None], names=[name]).split()[0]


@torch.no_grad()
def orthonormalise_batch(u: Tensor, s: Tensor, v: Tensor, *, names: Sequence[str]) -> BasisChange:
    """``orthonormalise`` for layers of one shape: ``u`` is ``(k, m, r)``, ``s`` is ``(k, r)``, ``v`` is ``(k, n, r)``.

    ``u`` is orthonormal but for a drift, so that float32 has the digits for its Gram matrix.  With ``V = P T`` (Cholesky of
    ``V^T V``), ``M^T M = P (T s U^T U s T^T) P^T``: the eigenvectors ``B`` of that core give ``v = V T^-1 B`` and
    ``u = M v / s``.  In float64, which has the digits that squaring costs, this is less work than an SVD, and the product is
    exact whatever the Gram matrices are off by.  Where the digits do not suffice: ``_with_care``.
    """
    dtype = s.dtype
    u, s, v = (
        f.to(torch.promote_types(dtype, torch.float32)) for f in (u, s, v)
    )  # bfloat16 has too few digits for this
    gram = (u.mT @ u).double()
    values = s.double()
    factor, failed = torch.linalg.cholesky_ex((v.mT @ v).double())  # T^T, lower
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    scaled = factor.mT * values[..., None, :]
    well = (failed == 0) & (diagonal.amin(-1) > WELL_CONDITIONED * diagonal.amax(-1))
    fresh, basis, good = _eigen(scaled @ gram @ scaled.mT, well)
    below = factor @ basis
    left = below * values[..., :, None] / fresh[..., None, :]
    good &= _straight(left, fresh, metric=gram)
    right = torch.linalg.solve_triangular(factor.mT.to(s.dtype), basis.to(s.dtype), upper=True)
    above, left, below = (left.mT @ gram).to(s.dtype), left.to(s.dtype), below.to(s.dtype)
    found = BasisChange(u @ left, fresh.to(s.dtype), v @ right, left, right, above, below)
    for number in torch.nonzero(~good).flatten().tolist():
        exact = _with_care(u[number], s[number], v[number], name=names[number])
        for field in fields(found):
            getattr(found, field.name)[number] = getattr(exact, field.name)
    return BasisChange(*(getattr(found, field.name).to(dtype) for field in fields(found)))


@torch.no_grad()
def decompose_batch(matrices: Tensor, *, names: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """``U (k, m, n)``, falling ``s (k, n)`` and ``V (k, n, n)`` of ``matrices (k, m, n)``, ``m >= n``, in the same way.

    ``ValueError`` naming the layer, one of ``names``, if there is no finite result.
    """
    precise = matrices.double()
    gram = precise.mT @ precise
    fresh, basis, good = _eigen(gram.clone(), torch.ones(len(matrices), dtype=torch.bool, device=matrices.device))
    left = basis / fresh[..., None, :]
    good &= _straight(left, fresh, metric=gram)
    dtype = torch.promote_types(matrices.dtype, torch.float32)
    found = matrices.to(dtype) @ left.to(dtype), fresh.to(dtype), basis.to(dtype)
    for number in torch.nonzero(~good).flatten().tolist():
        for factor, exact in zip(found, svd(precise[number], name=names[number]), strict=True):
            factor[number] = exact
    u, s, v = (factor.to(matrices.dtype) for factor in found)
    return u, s, v


def _eigen(cores: Tensor, usable: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Roots of the eigenvalues of ``cores``, largest first, the eigenvectors, and which cores could be used: none of zeros."""
    good = usable & cores.sum((-2, -1)).isfinite()
    if not good.all():  # the rest must not fail with them
        cores[~good] = torch.eye(cores.shape[-1], dtype=cores.dtype, device=cores.device)
    squares, basis = torch.linalg.eigh(cores)
    squares, basis = squares.flip(-1), basis.flip(-1)
    tiny = torch.finfo(squares.dtype).tiny
    return squares.clamp_min(tiny).sqrt(), basis, good & (squares[..., 0] > tiny)


def _straight(left: Tensor, values: Tensor, *, metric: Tensor) -> Tensor:
    """Polish, in place, the columns that rounding has left less than orthonormal in ``metric``; was that enough?"""
    small = int((values < SMALL * values[..., :1]).sum(-1).max())
    if not small:
        return torch.ones(len(left), dtype=torch.bool, device=left.device)
    tail, off = _polished(left[..., -small:], metric=metric)
    left[..., -small:] = tail
    return off < NEARLY


SMALL = 1e-4  # of the largest singular value: above, columns are orthonormal to float32 without more ado
NEARLY = 1e-4  # orthonormal: polishing leaves the square of what is off
WELL_CONDITIONED = 1e-3  # the diagonal of a Cholesky factor of nearly orthonormal columns, least by largest


def _with_care(u: Tensor, s: Tensor, v: Tensor, *, name: str) -> BasisChange:
    """The same for any matrix: ``U = Q R`` and ``V = P T``, then the SVD of the core ``R diag(s) T^T``, polished."""
    q, r = torch.linalg.qr(u.double())
    p, t = torch.linalg.qr(v.double())
    a, values, b = svd((r * s.double()) @ t.T, name=name)
    a, b = _polished(a)[0], _polished(b)[0]
    left, right = (torch.linalg.solve_triangular(x, y, upper=True) for x, y in ((r, a), (t, b)))
    return BasisChange(*(x.to(s.dtype) for x in (q @ a, values, p @ b, left, right, a.T @ r, t.T @ b)))


def _polished(matrix: Tensor, *, metric: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Orthonormal columns to twice as many digits, by one step of Newton and Schulz; and how far off they were, at most."""
    off = matrix.mT @ (matrix if metric is None else metric @ matrix)
    off.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    return matrix - 0.5 * matrix @ off, off.abs().amax((-2, -1))
