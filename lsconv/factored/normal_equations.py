r"""The direct solve of a problem with few unknowns by its normal equations, refined with residuals of A.

.. math:: (A^H A + \mathrm{damp}^2)\, x = A^H y

The Gram matrix has the size of x, however long the kernel is. If the padding is so wide that every product of a tap and
an input enters some output, it is block Toeplitz, :math:`(A^HA)[i, j] = g[i - j]`, and formed by one application of A
and its adjoint. For other convolutions of stride one its blocks change along a diagonal by a term of low rank: a shift
of the inputs by one along the first axis shifts the outputs by one, except for one row of outputs at each end. The
condition number is squared: each step of refinement, :math:`x \leftarrow x + (A^HA + \mu)^{-1}(A^H(y - Ax) - \mu x)`,
multiplies the error by about :math:`\epsilon\, \kappa(A)^2`, and A is refused where that is not small.

Björck, "Numerical Methods for Least Squares Problems" (1996), section 6.6.5, for the refinement.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lsconv.errors import MethodError
from lsconv.factored.direct_plan import CONTRACTION, WORK_ARRAYS, RefinedPlan, refinements
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import broadcast_shapes, over_items
from lsconv.operators.convolution import Convolution
from lsconv.operators.dtypes import double
from lsconv.operators.padding_modes import MODES

__all__ = ["NormalEquationsPlan"]


class NormalEquationsPlan(RefinedPlan):
    """Setup of the normal equations for one operator and damping; :meth:`solve` answers right-hand sides.

    The arguments are those of :class:`~lsconv.factored.direct_plan.DirectPlan`, for any operator; where damp is 0 its
    smallest singular value has to exceed ``rcond`` times the largest.

    Raises:
        MethodError: A with its damping is too ill-conditioned.
        PlanMemoryError: the matrices would need more than ``allowed``.

    Example:
        >>> A = lsconv.Conv1d(torch.randn(1, 1, 1000, dtype=torch.float64), in_size=20, padding=999)
        >>> plan = NormalEquationsPlan(A, rcond=1e-12, rtol=1e-10)
        >>> bool(plan.solve(torch.randn(1, 1019, dtype=torch.float64)).converged)
        True
    """

    reason = "x has few unknowns: their normal equations are one small matrix"
    x_in_range_of_adjoint = False
    _factors_name = "the matrix of the normal equations"

    def _bytes(self) -> int:
        return self.bytes_for(self.A, tuple(self.damp.shape))

    def _factorise(self) -> None:
        """Form the Gram matrix of A, scaled, and its Cholesky factor; refuse A where refinement would not converge."""
        A = self.A
        form = _toeplitz_gram if _is_toeplitz(A) else _displaced_gram if _is_displaced(A) else _gram
        matrix = form(self.precise)
        self._batch = tuple(broadcast_shapes(A.batch_shape, self.damp.shape))
        # scaled, so that nothing under- or overflows, and a zero matrix is recognised
        largest_entry = matrix.diagonal(dim1=-2, dim2=-1).real.amax(-1)
        self._unit = torch.where(largest_entry > 0, largest_entry, 1.0)
        matrix = matrix / self._unit[..., None, None]
        mu = self.damp.square() / self._unit
        shifted = matrix.expand(*self._batch, *matrix.shape[-2:]).clone(memory_format=torch.contiguous_format)
        shifted.diagonal(dim1=-2, dim2=-1).add_(mu.expand(self._batch).unsqueeze(-1))
        self._factor, failed = torch.linalg.cholesky_ex(shifted)
        if bool(failed.any()):
            raise MethodError(f"the normal equations of {A!r} are singular to double precision")
        largest = torch.linalg.matrix_norm(matrix, 1)
        smallest = self._smallest_eigenvalue()
        condition = float(((largest + mu) / smallest).max())
        undamped = self.damp.expand(self._batch) == 0
        # ten times, because the smallest is an estimate from above
        near = smallest.sqrt() <= 10 * self.rcond * largest.expand(self._batch).sqrt()
        contraction = 10 * torch.finfo(matrix.real.dtype).eps * math.sqrt(A.in_numel) * condition
        if not contraction <= CONTRACTION or bool((undamped & near).any()):
            raise MethodError(f"the normal equations of {A!r} have the condition number {condition:.1e}")
        self._steps = max(1, refinements(contraction, self.rtol))
        self.norm = (largest * self._unit).sqrt()
        self.rank = torch.full(A.batch_shape, A.in_numel, device=A.device)
        self.undecided = torch.zeros(A.batch_shape, dtype=torch.bool, device=A.device)

    @staticmethod
    def flops(A: LinearOperator) -> float:
        """Floating-point operations of the setup for one item: the Gram matrix, and its factor."""
        n = A.in_numel
        return n**3 / 3 + 2.0 * n**2 * _dense_rows(A)

    @staticmethod
    def bytes_for(A: LinearOperator, damp_shape: tuple[int, ...] = ()) -> int:
        """Bytes that the matrices take."""
        itemsize = double(A.dtype).itemsize
        responses = (A.in_numel + A.out_numel) // A.in_shape[1] if _is_displaced(A) else 0
        systems = math.prod(broadcast_shapes(A.batch_shape, damp_shape))
        return WORK_ARRAYS * itemsize * systems * A.in_numel * (A.in_numel + _dense_rows(A) + responses)

    # ------------------------------------------------------------------ the maps

    def _smallest_eigenvalue(self) -> Tensor:
        """The smallest eigenvalue of the scaled matrices, from above, by inverse iteration."""
        n = self.A.in_numel
        # a fixed vector without special direction, because vmap allows no random numbers
        v = torch.arange(1, n + 1, dtype=torch.float64, device=self.A.device).square().cos()
        v = v.to(self._factor.dtype).unsqueeze(-1).expand(*self._batch, n, 1)
        for _ in range(6):
            v = torch.cholesky_solve(v / torch.linalg.vector_norm(v, dim=(-2, -1), keepdim=True), self._factor)
        growth: Tensor = torch.linalg.vector_norm(v, dim=(-2, -1))
        return growth.reciprocal()

    def _near_normal(self, g: Tensor) -> Tensor:
        item = self.A.in_shape
        batch = broadcast_shapes(g.shape[: g.ndim - len(item)], self._batch)
        columns = g.reshape(*g.shape[: g.ndim - len(item)], -1, 1)
        if not self._batch:  # all items as columns of one solve
            x = torch.cholesky_solve(columns.reshape(-1, self.A.in_numel).mT, self._factor).mT
        else:
            x = torch.cholesky_solve(columns.expand(*batch, *columns.shape[-2:]), self._factor)
        return x.reshape(*batch, *item) / over_items(self._unit, len(item))

    def _near_inverse(self, y: Tensor) -> Tensor:
        return self._near_normal(self.precise.adjoint(y))


def _is_toeplitz(A: LinearOperator) -> bool:
    """Tell whether the Gram matrix is block Toeplitz: every product of a tap and an input is part of an output."""
    return (
        isinstance(A, Convolution)
        and MODES[A.padding_mode].zero
        and all(stride == 1 for stride in A.stride)
        and all(min(pair) >= extent - 1 for pair, extent in zip(A.padding, A.kernel_extent, strict=True))
    )


def _is_displaced(A: LinearOperator) -> bool:
    """Tell whether the Gram matrix is formed by displacement along the first axis, of several."""
    return (
        isinstance(A, Convolution)
        and A.ndim > 1
        and MODES[A.padding_mode].zero
        and A.groups == 1
        and all(stride == 1 for stride in A.stride)
        and min(A.in_shape[1], A.out_shape[1]) > 2
    )


def _dense_rows(A: LinearOperator) -> int:
    """The rows of the dense matrices whose products make the Gram matrix."""
    if _is_toeplitz(A):
        return 0
    return 2 * A.out_numel // A.out_shape[1] if _is_displaced(A) else A.out_numel


def _gram(A: LinearOperator) -> Tensor:
    """``A^H A`` by the matrix of A."""
    matrix = A.to_dense().to(double(A.dtype))
    return matrix.mH @ matrix


def _toeplitz_gram(A: LinearOperator) -> Tensor:
    """``A^H A`` from the response to one impulse per channel, far from the ends of a longer field."""
    assert isinstance(A, Convolution)
    sizes = A.spatial_in
    padded = Convolution(
        A.weight, tuple(2 * n - 1 for n in sizes), 1, [(e - 1, e - 1) for e in A.kernel_extent], A.dilation, A.groups,
        check_finite=False,
    )  # fmt: skip
    impulses = torch.zeros(A.c_in, *(1 for _ in A.batch_shape), *padded.in_shape, dtype=A.dtype, device=A.device)
    for channel in range(A.c_in):
        centre: tuple[Any, ...] = (channel, ..., channel, *(n - 1 for n in sizes))
        impulses[centre] = 1
    lags = padded.adjoint(padded.apply(impulses))  # inputs, *batch, inputs, *lags
    lags = lags.movedim(0, len(A.batch_shape) + 1)  # *batch, inputs of row, inputs of column, *lags
    for a, n in enumerate(sizes):
        place = torch.arange(n, device=A.device)
        index = place[:, None] - place + n - 1
        axis = lags.ndim - A.ndim - a + 2 * a  # the axes before have become two
        lags = lags.index_select(axis, index.flatten()).unflatten(axis, (n, n))
    lead = len(A.batch_shape)
    rows, columns = range(lead + 2, lags.ndim, 2), range(lead + 3, lags.ndim, 2)
    n = A.in_numel
    return lags.permute(*range(lead), lead, *rows, lead + 1, *columns).reshape(*A.batch_shape, n, n)


def _displaced_gram(A: LinearOperator) -> Tensor:
    """``A^H A`` from the responses to the inputs that are first along the first axis, and what a shift changes."""
    assert isinstance(A, Convolution)
    batch, channels, (length, *others) = A.batch_shape, A.c_in, A.spatial_in
    width = math.prod(others)
    inputs = torch.zeros(channels * width, channels, length, width, dtype=A.dtype, device=A.device)
    number = torch.arange(channels * width, device=A.device)
    inputs[number, number // width, 0, number % width] = 1
    inputs = inputs.reshape(-1, *(1 for _ in batch), *A.in_shape)
    column = A.adjoint(A.apply(inputs)).movedim(0, -1).reshape(*batch, channels, length, width, channels, width)
    outputs = _outputs_at(A, (-1, A.spatial_out[0] - 1))  # those that a shift adds and removes
    signed = outputs * torch.tensor([1, -1], device=A.device)[:, None, None]
    change = outputs.flatten(len(batch), -2).mH @ signed.flatten(len(batch), -2)
    change = change.reshape(*batch, channels, length, width, channels, length, width)
    gram = torch.empty_like(change)
    gram[..., 0, :] = column
    gram[..., 0, :, :, :, :] = column.permute(*range(len(batch)), *(len(batch) + k for k in (3, 4, 0, 1, 2))).conj()
    # gram[i + 1, j + 1] = gram[i, j] + change[i, j], i and j being places along the first axis
    here, next_, changes = (z.narrow(-2, j, length - 1).unbind(-5) for z, j in ((gram, 0), (gram, 1), (change, 0)))
    for i in range(length - 1):
        torch.add(here[i], changes[i], out=next_[i + 1])
    return gram.reshape(*batch, A.in_numel, A.in_numel)


def _outputs_at(A: Convolution, places: tuple[int, ...]) -> Tensor:
    """The rows of A for outputs at places along the first axis, inside or beyond.

    Returns:
        ``(*batch, channels, places, outputs, columns)``.
    """
    lead, ndim = len(A.batch_shape), A.ndim
    matrix = torch.nn.functional.pad(A.weight.detach(), (0, 1) * ndim)  # a zero in place of taps outside the kernel
    for a, (taps, step, (left, _)) in enumerate(zip(A.kernel_size, A.dilation, A.padding, strict=True)):
        outputs = torch.tensor(places) if a == 0 else torch.arange(A.spatial_out[a])
        distance = torch.arange(A.spatial_in[a]) - outputs[:, None] + left
        tap = torch.where(distance % step == 0, distance // step, taps)
        tap = torch.where((tap >= 0) & (tap < taps), tap, taps).to(A.device)
        axis = lead + 2 + 2 * a
        matrix = matrix.index_select(axis, tap.flatten()).unflatten(axis, tuple(tap.shape))
    outputs_first = [lead, *range(lead + 2, lead + 2 + 2 * ndim, 2), lead + 1, *range(lead + 3, lead + 2 + 2 * ndim, 2)]
    matrix = matrix.permute(*range(lead), *outputs_first)
    return matrix.reshape(*A.batch_shape, A.c_out, len(places), -1, A.in_numel)
