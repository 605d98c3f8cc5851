r"""The exact solve of a convolution with a separable kernel, through the singular values of its axes.

A kernel :math:`K[o, i, t_1, t_2, \dots] = M[o, i]\, u_1[t_1]\, u_2[t_2] \cdots` makes A a Kronecker product of small
matrices, whatever padding, stride and dilation are: M, and one one-dimensional convolution per axis. With
:math:`A_a = U_a \Sigma_a V_a^H` for each,

.. math:: A = \bigotimes_a A_a = \Big(\bigotimes_a U_a\Big) \Big(\bigotimes_a \Sigma_a\Big) \Big(\bigotimes_a V_a\Big)^H

is the singular value decomposition of A: one setup for every damping, exact, with the rank and the null space.

A kernel that was rounded when it was stored is separable up to an error E. With damp > 0 the solve is then refined with
residuals of A; each step multiplies the error by at most :math:`2 \|E\| / \mathrm{damp}`.

Van Loan, "The ubiquitous Kronecker product", J. Comput. Appl. Math. 123 (2000).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lsconv.errors import MethodError
from lsconv.factored.direct_plan import CONTRACTION, WORK_ARRAYS, Rank, RefinedPlan, inverse_values, refinements
from lsconv.operators.batch_layout import broadcast_shapes, in_blocks, in_items, over_items
from lsconv.operators.convolution import Convolution
from lsconv.operators.dtypes import ROUNDING, double

__all__ = ["Factors", "SeparablePlan", "along_axes", "separable_singular_values", "separable_svd"]


@dataclass(frozen=True)
class Factors:
    """A separable kernel as the product of a channel matrix and one vector per axis.

    Attributes:
        channels: the matrices M, ``(kernels, groups, outputs, inputs)``; one group if all groups are equal.
        axes: the vectors u of norm one, ``(kernels, groups, taps)`` for each axis.
        error: a bound of ``||A - product||`` per kernel, ``(kernels)``; zero where it is rounding in double precision.
    """

    channels: Tensor
    axes: tuple[Tensor, ...]
    error: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, A: Convolution) -> Factors | None:
        """Factorise the kernels of A; None where one of them is not separable in the precision of its dtype."""
        tolerance = ROUNDING * torch.finfo(A.dtype).eps
        weight = A.weight.detach().to(double(A.dtype))
        kernel = weight.reshape(math.prod(A.batch_shape), A.groups, A.c_out // A.groups, *weight.shape[-A.ndim - 1 :])
        if not bool(torch.isfinite(kernel).all()):
            return None
        if A.groups > 1 and bool((kernel == kernel[:, :1]).all()):
            kernel = kernel[:, :1]
        axes: list[Tensor] = []
        channels = kernel  # summed over one axis after the other
        for a in range(4, kernel.ndim):
            unfolded = kernel.movedim(a, 2).flatten(3)
            if not _rank_one(unfolded, tolerance):
                return None
            u = _leading_vectors(unfolded)
            axes.append(u)
            channels = torch.einsum("kgoit...,kgt->kgoi...", channels, u.conj())
        product = over_items(channels, len(axes))
        for a, u in enumerate(axes, start=4):
            product = product * u.reshape(*u.shape[:2], *(u.shape[2] if b == a else 1 for b in range(2, kernel.ndim)))
        error, size = _norm_bound(kernel - product), _norm_bound(kernel)
        rounding = ROUNDING * torch.finfo(kernel.dtype).eps
        return cls(channels, tuple(axes), torch.where(error <= rounding * size, 0.0, error))


@torch.no_grad()
def separable_singular_values(A: Convolution) -> Tensor | None:
    """All singular values of a convolution, descending, in double precision; None where a kernel is not separable.

    They are the products of those of its channels and axes, ``(*A.batch_shape, min(A.out_numel, A.in_numel))``.
    """
    factors = Factors.of(A)
    if factors is None:
        return None
    values = _products(list(map(torch.linalg.svdvals, _matrices(A, factors)))).flatten(2)
    values = values.expand(-1, A.groups, -1).reshape(*A.batch_shape, -1).sort(dim=-1, descending=True).values
    count = min(A.out_numel, A.in_numel)
    return torch.nn.functional.pad(values, (0, count - values.shape[-1]))


@torch.no_grad()
def separable_svd(A: Convolution, factors: Factors | None = None) -> tuple[list[Tensor], Tensor, list[Tensor]] | None:
    """The decompositions ``U, values, V`` of a convolution's axes, channels first; None where it is not separable.

    U and V have a factor per axis, ``(1, groups, ...)``, and the values, of a convolution with one kernel for all batch
    items, are ``(groups, *ranks)``, the products along all axes. ``factors`` are those of the kernel, where
    they are known.
    """
    factors = Factors.of(A) if factors is None else factors
    if factors is None:
        return None
    parts = _svds(_matrices(A, factors))
    values = _products([spectrum for _, spectrum, _ in parts])[0]
    left = [U.expand(1, A.groups, *U.shape[-2:]) for U, _, _ in parts if U is not None]
    right = [V.expand(1, A.groups, *V.shape[-2:]) for _, _, V in parts if V is not None]
    return left, values.expand(A.groups, *values.shape[1:]), right


def along_axes(factors: list[Tensor], z: Tensor) -> Tensor:
    """Apply matrices ``(1, groups, r, n)``, one per axis, channels first, to ``(*batch, groups * n, ...)``."""
    groups = factors[0].shape[1]
    batch = z.shape[: z.ndim - len(factors)]
    z = z.reshape(-1, 1, groups, z.shape[len(batch)] // groups, *z.shape[len(batch) + 1 :])
    for axis, factor in enumerate(factors, start=3):
        z = _apply_along(z, factor, axis)
    return z.reshape(*batch, groups * z.shape[3], *z.shape[4:])


class SeparablePlan(RefinedPlan):
    """Setup of the solve axis by axis; :meth:`solve` answers right-hand sides.

    The arguments are those of :class:`~lsconv.factored.direct_plan.DirectPlan`, for a convolution whose kernel is
    separable, and ``factors``, those of its kernel, where they are known.

    Raises:
        MethodError: the kernel is not separable, or for this damping not closely enough.
        PlanMemoryError: the factors would need more than ``allowed``.

    Example:
        >>> g = torch.tensor([1.0, 2.0, 1.0]) / 4
        >>> A = lsconv.Conv2d(torch.outer(g, g)[None, None], (20, 30), padding=1, padding_mode="reflect")
        >>> plan = SeparablePlan(A, 1e-2, rcond=1e-7, rtol=1e-6)
        >>> bool(plan.solve(torch.randn(5, *A.out_shape)).converged.all())
        True
    """

    @torch.no_grad()
    def __init__(
        self,
        A: Convolution,
        damp: Tensor | float = 0.0,
        *,
        rcond: float,
        rtol: float,
        allowed: int | None = None,
        factors: Factors | None = None,
    ) -> None:
        factors = Factors.of(A) if factors is None else factors
        if factors is None:
            raise MethodError(f'method="separable" needs a separable kernel, got {A!r}; use method="border" or "lsmr"')
        self._product = factors
        super().__init__(A, damp, rcond=rcond, rtol=rtol, allowed=allowed)

    A: Convolution
    reason = "the kernel is a product of one kernel per axis: the singular values of each axis give all others"
    _factors_name = 'method="separable": the factors'

    def _bytes(self) -> int:
        return self.bytes_for(self.A)

    def _factorise(self) -> None:
        """Decompose channels and axes, each once: their singular vectors, and the products of their singular values."""
        A, factors = self.A, self._product
        self._kernels = math.prod(A.batch_shape)
        matrices = _matrices(A, factors)
        one_channel = factors.channels.shape[-2:] == (1, 1)
        # the first axis has vectors in any case, because it takes the sign of the one channel
        multiples = ([0] if one_channel else []) + [a + 1 for a in range(1, A.ndim) if _is_identity(A, a)]
        parts = _svds(matrices, multiples)
        self._left, self._right = [U for U, _, _ in parts], [V for _, _, V in parts]
        if one_channel and self._left[1] is not None:
            self._left[1] = self._left[1] * torch.where(factors.channels == 0, 1, factors.channels.sgn())
        values = _products([spectrum for _, spectrum, _ in parts])
        size = max(max(matrix.shape[-2:]) for matrix in matrices)
        decided = Rank.of(values, values.ndim - 1, self.rcond, size)
        self._values, self._kept = decided.values, decided.kept
        copies = A.groups // values.shape[1]
        self.rank = (decided.rank * copies).reshape(A.batch_shape)
        self.undecided = decided.undecided.reshape(A.batch_shape)
        self.norm = (decided.largest + factors.error).reshape(A.batch_shape)
        self._adapt()

    def _adapt(self) -> None:
        """Choose the number of refinement steps that compensates for the error of the factors."""
        error = self._product.error.reshape(self.A.batch_shape)
        worst = float(torch.where(error > 0, 2 * error / self.damp, 0.0).max())
        if worst > CONTRACTION:
            largest = float(error.max())
            raise MethodError(
                f'method="separable": the kernel is separable up to {largest:.1e}, which needs damp > '
                f'{2 * largest / CONTRACTION:.1e}, got {self.A!r}; give a float64 kernel, or use method="border" or '
                f'"lsmr"'
            )
        self._steps = refinements(worst, self.rtol)

    @staticmethod
    def flops(A: Convolution, factors: Factors) -> tuple[float, float]:
        """Floating-point operations of the setup, and of one solve for one item."""
        sizes = [(A.c_in // A.groups, A.c_out // A.groups)]
        sizes += [
            side for a, side in enumerate(zip(A.spatial_in, A.spatial_out, strict=True)) if not _is_identity(A, a)
        ]
        blocks = factors.channels.shape[0] * factors.channels.shape[1]
        setup = blocks * sum(20 * min(size) ** 2 * max(size) for size in set(sizes))
        width = max(A.in_numel, A.out_numel)
        return setup, 4 * width * sum(min(size) for size in sizes if max(size) > 1)

    @staticmethod
    def bytes_for(A: Convolution) -> int:
        """Bytes of the factors, and of the work arrays of one item."""
        itemsize = 16 if A.dtype.is_complex else 8
        sides = [(A.c_in // A.groups, A.c_out // A.groups), *zip(A.spatial_in, A.spatial_out, strict=True)]
        factors = A.groups * sum(n * m for n, m in sides)
        return WORK_ARRAYS * itemsize * math.prod(A.batch_shape) * (factors + A.in_numel + A.out_numel)

    # ------------------------------------------------------------------ the maps

    def _near_inverse(self, y: Tensor) -> Tensor:
        return self._map(y, self.A.out_shape, self._left, self._right, self.A.in_shape)

    def _near_inverse_adjoint(self, v: Tensor) -> Tensor:
        return self._map(v, self.A.in_shape, self._right, self._left, self.A.out_shape)

    def _near_normal(self, g: Tensor) -> Tensor:
        """Solve the normal equations of the separable kernel, without refinement."""
        filtered = functools.partial(self._map, g, self.A.in_shape, self._right, self._right, self.A.in_shape)
        damped = self.damp > 0
        if all(V is None or V.shape[-1] == V.shape[-2] for V in self._right) or not bool(damped.any()):
            return filtered(power=0)
        # On the null space of A the inverse is 1 / mu: (A^H A + mu)^-1 = (1 - A^H A (A^H A + mu)^-1) / mu.
        undamped = 0.0 if bool(damped.all()) else filtered(power=0)
        mu = over_items(self.damp.square(), len(self.A.in_shape))
        return torch.where(mu > 0, (g - filtered(power=2)) / torch.where(mu > 0, mu, 1.0), undamped)

    def _map(
        self,
        z: Tensor,
        item_from: tuple[int, ...],
        basis_from: list[Tensor | None],
        basis_to: list[Tensor | None],
        item_to: tuple[int, ...],
        power: int = 1,
    ) -> Tensor:
        """``basis_to f(values) basis_from^H z``, f being :func:`inverse_values`."""
        A = self.A
        full = broadcast_shapes(z.shape[: z.ndim - len(item_from)], self.damp.shape)
        z, batch = in_blocks(z.expand(*full, *item_from), len(item_from), A.batch_shape)
        z = z.reshape(-1, self._kernels, A.groups, item_from[0] // A.groups, *item_from[1:])
        for a, factor in enumerate(basis_from, start=3):
            z = z if factor is None else _apply_along(z, factor.mH, a)
        mu, _ = in_blocks(self.damp.square().expand(batch).unsqueeze(-1), 1, A.batch_shape)
        mu = mu.reshape(-1, self._kernels, *(1 for _ in range(z.ndim - 2)))
        mu = mu[:1] if self.damp.ndim == 0 else mu
        z = z * inverse_values(self._values, self._kept, mu, power)
        for a, factor in enumerate(basis_to, start=3):
            z = z if factor is None else _apply_along(z, factor, a)
        return in_items(z, batch, item_to, A.batch_shape)


def _rank_one(unfolded: Tensor, tolerance: float) -> bool:
    """Tell whether matrices ``(..., taps, others)`` are of rank one within ``tolerance``."""
    taps, others = unfolded.shape[-2:]
    if min(taps, others) == 1:
        return True
    if others > taps:  # squares rule out matrices far from rank one at little cost
        squares = torch.linalg.eigvalsh(unfolded @ unfolded.mH)
        if bool((squares[..., -2] > 1e-12 * squares[..., -1]).any()):
            return False
    values = torch.linalg.svdvals(unfolded)
    return bool((values[..., 1] <= tolerance * values[..., 0]).all())


def _leading_vectors(unfolded: Tensor) -> Tensor:
    """The leading left singular vectors of matrices that are close to rank one."""
    if unfolded.shape[-2] == 1:
        return torch.ones_like(unfolded[..., 0])
    longest = torch.linalg.vector_norm(unfolded, dim=-2).argmax(-1, keepdim=True).unsqueeze(-2)
    start = unfolded.gather(-1, longest.expand(*unfolded.shape[:-1], 1))
    u = unfolded @ (unfolded.mH @ start)  # one step of the power method, whose error is the square of the second value
    u = u.squeeze(-1)
    size = torch.linalg.vector_norm(u, dim=-1, keepdim=True)
    return torch.where(size > 0, u / torch.where(size > 0, size, 1.0), 0.0)


def _matrices(A: Convolution, factors: Factors) -> list[Tensor]:
    """The matrices ``(kernels, groups, outputs, inputs)`` of the channels and of every axis."""
    along = [
        Convolution(
            u[:, :, None, None], (A.spatial_in[a],), A.stride[a], [A.padding[a]], A.dilation[a],
            padding_mode=A.padding_mode, check_finite=False,
        )
        for a, u in enumerate(factors.axes)
    ]  # fmt: skip
    return [factors.channels, *(convolution.to_dense() for convolution in along)]


def _svds(matrices: list[Tensor], multiples: Sequence[int] = ()) -> list[tuple[Tensor | None, Tensor, Tensor | None]]:
    """The decompositions ``U, values, V``; a matrix that equals the one before, as for square images, shares them.

    Args:
        matrices: the matrices.
        multiples: which of them are multiples of the identity, and get no U and V.
    """
    parts: list[tuple[Tensor | None, Tensor, Tensor | None]] = []
    for k, matrix in enumerate(matrices):
        if k in multiples:
            parts.append((None, matrix.abs().amax(-1), None))
        elif k > 1 and torch.equal(matrix, matrices[k - 1]):
            parts.append(parts[-1])
        else:
            U, values, Vh = torch.linalg.svd(matrix, full_matrices=False)
            parts.append((U, values, Vh.mH))
    return parts


def _products(spectra: list[Tensor]) -> Tensor:
    """The products of values ``(kernels, groups, ranks)`` along all axes: ``(kernels, groups, *ranks)``."""
    values = spectra[0]
    for spectrum in spectra[1:]:
        values = values.unsqueeze(-1) * spectrum.reshape(*spectrum.shape[:2], *(1 for _ in values.shape[2:]), -1)
    return values


def _norm_bound(kernel: Tensor) -> Tensor:
    """An upper bound of the norm of a convolution with kernels ``(kernels, groups, outputs, inputs, *taps)``."""
    size = kernel.abs().flatten(4).sum(-1)
    return (size.sum(-1).amax(-1) * size.sum(-2).amax(-1)).sqrt().amax(-1)


def _is_identity(A: Convolution, a: int) -> bool:
    """Tell whether A acts as the identity along an axis, so that its factor is one."""
    return A.kernel_size[a] == 1 and A.stride[a] == 1 and not any(A.padding[a])


def _apply_along(z: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Apply matrices ``(kernels, groups, r, n)`` along one axis of ``(items, kernels, groups, ...)``."""
    before, after = math.prod(z.shape[3:axis]), math.prod(z.shape[axis + 1 :])
    flat = z.reshape(*z.shape[:3], before, z.shape[axis], after)
    out = torch.einsum("ikgpnq,kgrn->ikgprq", flat, matrix)
    return out.reshape(*z.shape[:axis], matrix.shape[-2], *z.shape[axis + 1 :])
