r"""The plan of a block-circulant operator: one small matrix per frequency, inverted once.

A convolution with circular padding whose outputs fill the grid is block-circulant,
:math:`A = F^{-1} \operatorname{diag}(S(\omega)) F`, and so is every function of it:

.. math:: A^+ = F^{-1} \operatorname{diag}(S^+) F, \qquad
          (A^H A + \lambda^2)^{-1} A^H = F^{-1} \operatorname{diag}((S^H S + \lambda^2)^{-1} S^H) F.

Strides, dilation, groups and a kernel per batch item are in the symbol (:mod:`lsconv.fourier.symbol`). The setup
computes in double precision whatever the operator's dtype, so that a float32 answer carries float32 rounding only once.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from lsconv.errors import ArgumentError, MethodError, ShapeError
from lsconv.fourier.batched_linalg import frobenius
from lsconv.fourier.damped_inverse import DampedInverse
from lsconv.fourier.embedding import Embedding
from lsconv.fourier.frequency_inverse import FactoredInverse, FrequencyInverse, invert
from lsconv.fourier.frequency_matrices import ELEMENTWISE_ENTRIES, FrequencyMatrices, repeat_for_items
from lsconv.fourier.symbol import symbol
from lsconv.krylov.gradients.backward_solves import normal_by_apply
from lsconv.krylov.loop.certificate import NormBounds, RankThreshold
from lsconv.krylov.loop.judge import Judge
from lsconv.krylov.loop.solution import Solution
from lsconv.krylov.plan import Plan
from lsconv.operators.base import LinearOperator
from lsconv.operators.convolution import Convolution
from lsconv.operators.dtypes import default_rcond, direct_rtol, double, real_dtype
from lsconv.operators.memory import allowed_bytes, check_fits
from lsconv.operators.padding_modes import MODES

__all__ = [
    "FourierPlan",
    "block_circulant",
    "circulant_embedding",
    "double_symbol",
]


_Inverse = FrequencyMatrices | FactoredInverse | None


def block_circulant(A: Any, batch_shape: tuple[int, ...] = (), *, name: str = "fourier") -> Embedding:
    """Find the periodic grid on which the convolution A is block-circulant without any cropping.

    Args:
        A: the operator.
        batch_shape: further batch dimensions whose items get blocks of their own.
        name: the name of the calling function, for error messages.

    Raises:
        MethodError: A is no convolution, or not block-circulant; the message names methods that solve it.
    """
    if not isinstance(A, Convolution):
        raise MethodError(
            f"{name}: needs a convolution, got {type(A).__name__}; "
            "use a Krylov method (lsqr, lsmr), which takes any operator"
        )
    embedding = circulant_embedding(A, batch_shape)
    if embedding is None:
        raise MethodError(_why_not(A, name))
    return embedding


def circulant_embedding(A: Any, batch_shape: tuple[int, ...] = ()) -> Embedding | None:
    """Find the grid as :func:`block_circulant` does; None where A is not block-circulant."""
    if not isinstance(A, Convolution) or not Embedding.serves(A):
        return None
    for grid in (None, (1,) * A.ndim):  # a pointwise convolution is circulant only on a grid of its own size
        embedding = Embedding(A, grid, batch_shape)
        if embedding.is_circulant:
            return embedding
    return None


def _why_not(A: Convolution, name: str) -> str:
    """Compose the message that says why A is not block-circulant, and which methods solve it."""
    if MODES[A.padding_mode].zero:
        return (
            f"{name}: {A!r} is not block-circulant: with zero padding the outputs at the edges differ from those "
            "inside; method 'border' serves zero padding of every kind exactly"
        )
    if not MODES[A.padding_mode].periodic:
        return f"{name}: padding_mode={A.padding_mode!r} is not block-circulant; use a Krylov method (lsqr, lsmr)"
    periodic = tuple(-(-n // s) for n, s in zip(A.spatial_in, A.stride, strict=True))
    return (
        f"{name}: a circular convolution is block-circulant when stride {A.stride} divides the input sizes "
        f"{A.spatial_in} and the padding makes the outputs fill the grid, {periodic} (here {A.spatial_out}); otherwise "
        "use a Krylov method (lsqr, lsmr)"
    )


@torch.no_grad()
def double_symbol(A: Convolution, embedding: Embedding) -> FrequencyMatrices:
    """The symbol of A on the grid of ``embedding``, in double precision, one block per block of the embedding."""
    S = symbol(A.to(dtype=double(A.dtype)), embedding)
    return S if S.blocks == embedding.blocks else S.map(lambda m: repeat_for_items(m, embedding.blocks))


class FourierPlan(Plan):
    r"""The setup of the exact solve of a block-circulant least-squares problem, for any number of right-hand sides.

    .. math:: \min_x \|Ax - y\|^2 + \mathrm{damp}^2 \|x\|^2, \qquad
              x(\omega) = (S^H S + \mathrm{damp}^2)^{-1} S^H\, y(\omega)

    Without damping x is the minimum-norm least-squares solution, :math:`x = A^+ y`. The matrices are factorised in the
    constructor, without gradients; :meth:`apply` is one FFT, one small product or solve per frequency and one inverse
    FFT, differentiable with respect to ``y``, and where :attr:`damped` serves, steps of refinement.

    Args:
        A: a convolution for which :func:`block_circulant` holds.
        damp: the damping, a number or a tensor with one per batch item (its shape broadcasts with the batch dimensions
            of ``y``; every entry has matrices of its own).
        rcond: where damp is 0, singular values of at most ``rcond`` times the largest one of the same batch item count
            as zero; None: :func:`~lsconv.operators.dtypes.default_rcond` of the operator's dtype.
        memory_limit: bytes that the plan may use; None: 60 % of what is free on A's device.

    Attributes:
        A: the operator.
        damp: the damping, as a tensor.
        batch_shape: batch dimensions of the plan, those of A and of damp; they broadcast with those of ``y``.
        norm: a lower bound of ``||A||``, per item of ``batch_shape``; exact for one channel.
        damped: the factors that the first answers with damping take; None where there are none, or no longer.
        inverse: the inverses per frequency, in double precision where single would lose digits of the answer; None as
            long as :attr:`damped` serves.
        rcond: the threshold of the rank, relative to the largest singular value.
        rank: how many singular values of A exceed it, per batch item; None where there is damping everywhere.
        undecided: the batch items where rounding decides that, as a singular value stands on the threshold.
        nbytes: bytes held.

    Raises:
        MethodError: A is not block-circulant.
        ArgumentError: a negative damp or rcond.
        ShapeError: damp does not broadcast with A's batch dimensions.
        DtypeError: A is in half precision.
        PlanMemoryError: the matrices need more than ``memory_limit``.

    Source:
        Hansen, Nagy, O'Leary, "Deblurring Images: Matrices, Spectra, and Filtering" (2006), chapter 4, for one channel.

    Example:
        >>> from lsconv.fourier.circulant import FourierPlan
        >>> A = lsconv.Conv1d(torch.tensor([[[1.0, 2.0, 3.0]]]), in_size=6, padding=1, padding_mode="circular")
        >>> x = torch.arange(6.0).reshape(1, 6)
        >>> torch.allclose(FourierPlan(A).apply(A(x)), x, atol=1e-5)
        True
    """

    never_misses = True
    reason = "nothing is cropped from a circular convolution: one small matrix per frequency"
    A: Convolution

    @torch.no_grad()
    def __init__(
        self,
        A: LinearOperator,
        damp: float | Tensor = 0.0,
        *,
        rcond: float | None = None,
        memory_limit: int | None = None,
    ) -> None:
        self.damp = torch.as_tensor(damp, dtype=real_dtype(A.dtype), device=A.device)
        if not bool((self.damp >= 0).all()) or not bool(torch.isfinite(self.damp).all()):
            raise ArgumentError(f"damp: expected finite numbers >= 0, got {damp}")
        try:
            self.embedding = block_circulant(A, tuple(self.damp.shape))
        except RuntimeError as error:
            raise ShapeError(
                f"damp: shape {tuple(self.damp.shape)} does not broadcast with A's batch_shape {A.batch_shape}"
            ) from error
        assert isinstance(A, Convolution)  # any other is refused by block_circulant
        self.A = A
        self.batch_shape, self.precise = self.embedding.batch_shape, A.to(dtype=double(A.dtype))
        if not (rcond is None or 0 <= rcond < 1):
            raise ArgumentError(f"rcond: expected a number in [0, 1), got {rcond}")
        self.rcond = default_rcond(A.dtype) if rcond is None else rcond
        entries = self.embedding.out_channels * self.embedding.in_channels
        symbol_bytes = torch.complex128.itemsize * self.embedding.blocks * math.prod(self.embedding.grid) * entries
        # the symbol, its inverse and as much work space
        check_fits(3 * symbol_bytes, allowed_bytes(memory_limit, A.device), A, "fourier")
        self.rank: Tensor | None = None
        self.inverse: _Inverse = None
        self.undecided = torch.zeros(self.batch_shape, dtype=torch.bool, device=A.device)
        self.damped = self._factorise() if bool((self.damp > 0).all()) else None
        self._answers = 0
        if self.damped is not None:
            norm, self._largest_norm = self.damped.norm, self.damped.largest_norm
        else:
            found = self._invert()
            self.inverse, norm, self._largest_norm = found.inverse, found.norm, found.largest_norm
            if bool((self.damp == 0).any()):
                self.rank = found.rank.reshape(self.batch_shape)
                self.undecided = found.undecided.reshape(self.batch_shape)
        self.norm = norm.reshape(*self.batch_shape, -1).amax(-1)
        self.inverse = self._round(self.inverse)
        self._inverse_adjoint: _Inverse = None

    def _factorise(self) -> DampedInverse | None:
        """Make the factors for the first answers; None where singular values or a scaling are better."""
        embedding = self.embedding
        rows, columns = embedding.out_channels, embedding.in_channels
        if min(rows, columns) == 1 or rows * columns <= ELEMENTWISE_ENTRIES:
            return None
        found = DampedInverse(self.precise, embedding, self.damp, self.A.dtype)
        return None if found.steps is None else found

    @property
    def _mu(self) -> Tensor:
        """``damp^2``, one per block."""
        return self.embedding.per_block(self.damp.double().square())

    def _invert(self) -> FrequencyInverse:
        """Make all inverses, and decide the rank."""
        make = functools.partial(double_symbol, self.A, self.embedding)
        items, rtol = math.prod(self.batch_shape), 0.1 * direct_rtol(self.A.dtype)
        return invert(make, self._mu, self.rcond, items=items, rtol=rtol)

    def _round(self, inverse: _Inverse) -> _Inverse:
        """Round the inverses to A's precision, where the rounding that the condition amplifies is within tolerance."""
        if not isinstance(inverse, FrequencyMatrices) or real_dtype(self.A.dtype) == torch.float64:
            return inverse
        condition = self._largest_norm * frobenius(inverse.matrices).flatten(1).amax(1)
        if bool((condition * torch.finfo(torch.float32).eps <= 0.5 * direct_rtol(torch.float32)).all()):
            return inverse.map(lambda matrices: matrices.to(torch.complex64))
        return inverse

    @torch.no_grad()
    def _inverse_for(self, batch: tuple[int, ...]) -> _Inverse:
        """The inverses for an answer with this batch; None where the factors give it.

        The factors give the first two answers, which are a solve and its derivatives; a third shows that the plan is
        kept. They give none for as many right-hand sides as the matrices have rows, which cost as much as the inverses.
        """
        if self.damped is not None:
            _, rhs = self.embedding.split_batch(batch)
            self._answers += 1
            if self._answers <= 2 and rhs < self.damped.size:
                return None
            if self.damped.steps == 0:
                self.inverse = self._round(self.damped.explicit(double_symbol(self.A, self.embedding)))
            else:
                self.inverse = self._round(self._invert().inverse)
            self.damped = None
        return self.inverse

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices held."""
        return sum(held.nbytes for held in (self.inverse, self.damped, self._inverse_adjoint) if held is not None)

    def solve(
        self, y: Tensor, *, rtol: float | None = None, atol: float = 0.0, max_iter: int | None = None
    ) -> Solution:
        """The certified solution for ``y``; nothing iterates, so ``max_iter`` has no effect."""
        x = self._apply(y.detach())
        judge = Judge(
            self.precise,
            self.tolerances(rtol, atol),
            self.damp,
            self.A.dtype,
            rounding=torch.finfo(self._dtype).eps,
            norm=NormBounds(self.norm),
            rank=RankThreshold(self.rcond, truncated=True),
        )
        solution = judge.solution(x.to(self.precise.dtype), y.to(self.precise.dtype))
        return solution if self.rank is None else solution.with_rank(self.rank, self.undecided)

    def apply(self, y: Tensor, *, rtol: float | None = None) -> Tensor:
        """The solution for ``y``, without a certificate."""
        self.A.check_output(y)
        return self._apply(y).to(self.A.dtype)

    def _apply(self, y: Tensor) -> Tensor:
        """:meth:`apply` in the precision of the matrices, for y of A's dtype or of double precision."""
        batch, _ = self.embedding.split_batch(tuple(y.shape[: y.ndim - len(self.A.out_shape)]))
        inverse = self._inverse_for(batch)
        y = y.to(self._dtype)
        if inverse is None:
            assert self.damped is not None
            return self.damped.solve(y)
        return self.embedding.inputs_from_grid(inverse.on_grid(self.embedding.outputs_to_grid(y)), batch)

    @property
    def _dtype(self) -> torch.dtype:
        """The dtype of the arithmetic: that of A, or double precision."""
        single = self.inverse is not None and self.inverse.dtype == torch.complex64
        return self.A.dtype if single else double(self.A.dtype)

    def adjoint(self, v: Tensor, *, rtol: float | None = None) -> Tensor:
        """The adjoint of :meth:`apply`."""
        self.A.check_input(v)
        batch, _ = self.embedding.split_batch(tuple(v.shape[: v.ndim - len(self.A.in_shape)]))
        inverse = self._inverse_for(batch)
        v = v.to(self._dtype)
        if inverse is None:
            assert self.damped is not None
            return self.damped.solve_adjoint(v).to(self.A.dtype)
        if self._inverse_adjoint is None:
            self._inverse_adjoint = inverse.H
        on_grid = self._inverse_adjoint.on_grid(self.embedding.inputs_to_grid(v))
        return self.embedding.outputs_from_grid(on_grid, batch).to(self.A.dtype)

    def normal_solve(self, g: Tensor, *, rtol: float | None = None) -> Tensor:
        """``(A^H A + damp^2)^{-1} g``, where ``damp > 0``."""
        return normal_by_apply(self.A, self.damp, lambda y, _: self.apply(y), g, rtol=rtol)

    def __repr__(self) -> str:
        return f"FourierPlan(grid={self.embedding.grid}, factors={self.nbytes / 2**20:.1f} MiB, {self.A.device})"
