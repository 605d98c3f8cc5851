r"""The FFT-diagonal preconditioner: a block-circulant approximation of the normal operator, inverted exactly.

T. Chan, "An optimal circulant preconditioner for Toeplitz systems" (1988), and Hanke, Nagy, Plemmons, "Preconditioned
iterative regularization for ill-posed problems" (1993), for the idea. Here the circulant operator is the one that A is
a truncation of, with the symbol S, and R restricts its periodic grid to the outputs (or inputs) of A:

.. math:: M = R\, F^{-1} \operatorname{diag}\big((S S^H + \delta^2)^{-1}\big) F\, R^T .

The restriction of a Hermitian positive definite operator is Hermitian positive definite, with the same bounds on its
eigenvalues. That of a *pseudo*-inverse can be singular, and would change the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lsconv.errors import ArgumentError, ArgumentTypeError, ShapeError
from lsconv.fourier.batched_linalg import frobenius, hermitian_inverse_
from lsconv.fourier.convolution_structure import Factor, factor_chain, gram_approximation
from lsconv.fourier.frequency_matrices import FrequencyMatrices
from lsconv.operators.algebra import HStack, VStack
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import broadcast_shapes
from lsconv.operators.dtypes import real_dtype
from lsconv.operators.elementary import Crop, Diagonal
from lsconv.operators.padding import Pad

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["CirculantPreconditioner"]

# The damping of the preconditioner, relative to the norm of A, where the solve has none, and the smallest entry of a
# diagonal that is inverted, relative to its largest. Less would help blurs and harm operators with a singular symbol.
_RELATIVE_FLOOR = 1e-3


class CirculantPreconditioner(LinearOperator):
    r"""An inverse preconditioner for Krylov methods, Hermitian positive definite, diagonal in Fourier.

    .. math:: M \approx (A A^H + \delta^2)^{-1}\ \text{(residual side)}, \qquad
              N \approx (A^H A + \delta^2)^{-1}\ \text{(solution side)}

    For a convolution that is block-circulant these are equalities. For zero padding, and for circular padding with
    cropped outputs, they hold on the periodic grid that A is a truncation of; for reflect and replicate padding the
    symbol is that of the same kernel with zero padding. Crops, masks and diagonals around the convolution, and stacks
    of it with gradients, are accounted for.

    ``delta**2`` is ``damp**2``, but at least ``100 eps sigma**2`` of the dtype, which keeps M positive definite in
    rounding. (``sigma`` is the norm of the block-circulant operator, from above, within the eighth root of the number
    of channels.)

    How many iterations it saves depends on how close A is to the periodic operator: most for zero padding, a factor of
    two for blurs with reflect and replicate padding, and none for random kernels with these, or where the symbol is
    singular (square "same" convolutions with random kernels). Give such operators a damping first.

    Args:
        A: a convolution, or an operator made of one: scaled, adjoint, in a product with Crop, Mask, Diagonal, Pad, or
            in ``vstack`` (solution side) or ``hstack`` (residual side) with others, with Gradient, Laplacian, Identity.
        damp: the damping that the solver is given, a number or a tensor with one per batch item; with another one
            the solver takes more iterations. None: ``1e-3 * sigma``, for a solve without damping.
        side: ``"residual"`` (give it to the solver as M) or ``"solution"`` (as N). None: residual when A is wide or
            square (``out_numel <= in_numel``), solution when it is tall. A vstack is always the solution's, an hstack
            the residual's.

    Attributes:
        side: ``"residual"`` or ``"solution"``.
        damp: ``delta``, the damping used, per batch item.
        norm: ``sigma``, per batch item.

    Raises:
        MethodError: A has no convolution in it, or has one behind something that hides its structure; the message
            says what is supported.
        ArgumentError: a negative damp, or an unknown side.
        ArgumentTypeError: A is no LinearOperator.
        DtypeError: A is in half precision.

    Example:
        >>> A = lsconv.Conv2d(torch.randn(2, 4, 3, 3), in_size=(16, 16))
        >>> M = lsconv.CirculantPreconditioner(A, damp=0.1)
        >>> M.side, M.in_shape
        ('residual', (2, 14, 14))
        >>> y = torch.randn(2, 14, 14)
        >>> solution = lsconv.lsqr(A, y, damp=0.1, M=M)
    """

    _only_torch = True

    @torch.no_grad()
    def __init__(self, A: LinearOperator, damp: float | Tensor | None = None, *, side: str | None = None) -> None:
        if not isinstance(A, LinearOperator):
            raise ArgumentTypeError(f"A: expected a LinearOperator, got {type(A).__name__}")
        if side not in (None, "residual", "solution"):
            raise ArgumentError(f"side: expected 'residual' (for M) or 'solution' (for N), got {side!r}")
        dtype = real_dtype(A.dtype)
        given_damp = None if damp is None else torch.as_tensor(damp, dtype=torch.float64, device=A.device)
        if given_damp is not None and not bool((torch.isfinite(given_damp) & (given_damp >= 0)).all()):
            raise ArgumentError(f"damp: expected finite numbers >= 0, got {damp}")
        try:
            batch_shape = broadcast_shapes(A.batch_shape, () if given_damp is None else given_damp.shape)
        except RuntimeError:
            raise ShapeError(
                f"damp: shape {tuple(torch.as_tensor(damp).shape)} does not broadcast with the operator's batch_shape "
                f"{A.batch_shape}"
            ) from None
        self.side = _side(A) if side is None else side
        shape = A.out_shape if self.side == "residual" else A.in_shape
        super().__init__(shape, shape, dtype=A.dtype, device=A.device, batch_shape=batch_shape)
        self._operator, self._damp_argument = A, damp
        chain = factor_chain(A, adjoint=self.side == "solution")
        approximation, self._embedding = gram_approximation(chain, tuple(batch_shape))
        self._on_inputs = chain.core.adjoint
        delta = self._damping(approximation.matrices, given_damp)
        shift = self._embedding.per_block(delta.square()).reshape(-1, *(1 for _ in approximation.matrices.shape[1:-1]))
        matrices = approximation.matrices.expand(self._embedding.blocks, *approximation.matrices.shape[1:])
        matrices = matrices.clone(memory_format=torch.contiguous_format)
        matrices.diagonal(dim1=-2, dim2=-1).add_(shift)
        single = torch.complex64 if dtype == torch.float32 else torch.complex128
        self._inverse = FrequencyMatrices(approximation.grid, hermitian_inverse_(matrices).to(single))
        self.damp = delta.to(dtype)
        self._windows = [_window(factor, delta) for factor in chain.windows]

    def _damping(self, gram_matrices: Tensor, given_damp: Tensor | None) -> Tensor:
        """Set :attr:`norm`, and return the damping delta that is used, of shape ``batch_shape``."""
        squared = frobenius(gram_matrices @ gram_matrices).flatten(1).amax(1).sqrt()
        norm = squared.expand(self._embedding.blocks).reshape(*self.batch_shape, -1).amax(-1).sqrt()
        if not bool((norm > 0).all()):
            norm = torch.where(norm > 0, norm, 1)  # the zero operator: any definite matrix serves
        self.norm = norm
        floor = 10 * torch.finfo(self.dtype).eps ** 0.5
        return torch.maximum(norm * _RELATIVE_FLOOR if given_damp is None else given_damp, norm * floor)

    def apply(self, x: Tensor) -> Tensor:
        """``M x``."""
        return self._through(0, x)

    def adjoint(self, y: Tensor) -> Tensor:
        """Apply M, which is Hermitian."""
        return self._through(0, y)

    def _through(self, depth: int, x: Tensor) -> Tensor:
        """Apply the preconditioner of the chain from the window of this number on, innermost the circulant inverse."""
        if depth < len(self._windows):
            return self._windows[depth](x, lambda z: self._through(depth + 1, z))
        embedding = self._embedding
        item = embedding.in_shape if self._on_inputs else embedding.out_shape
        batch, _ = embedding.split_batch(tuple(x.shape[: x.ndim - len(item)]))
        if self._on_inputs:
            return embedding.inputs_from_grid(self._inverse.on_grid(embedding.inputs_to_grid(x)), batch)
        return embedding.outputs_from_grid(self._inverse.on_grid(embedding.outputs_to_grid(x)), batch)

    def _map(
        self,
        function: Callable[[Tensor], Tensor],
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> Self:
        # A preconditioner has no parameters, since no gradient passes through it; another dtype or device needs a new
        # setup.
        if dtype is None and device is None:
            return self
        damp: Any = self._damp_argument.to(device) if isinstance(self._damp_argument, Tensor) else self._damp_argument
        return type(self)(self._operator.to(device, dtype), damp, side=self.side)


def _side(A: LinearOperator) -> str:
    """The side that is preconditioned by default."""
    if isinstance(A, (VStack, HStack)):
        return "solution" if isinstance(A, VStack) else "residual"
    return "residual" if A.out_numel <= A.in_numel else "solution"


def _window(factor: Factor, delta: Tensor) -> Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]:
    """Make a function (x, inner) that applies the preconditioner of ``L B``, L being the window and inner that of B."""
    operator = factor.operator
    if isinstance(operator, Diagonal):
        # (L B B^H L^H)^-1 = L^-H (B B^H)^-1 L^-1, with entries of L near zero raised, so that it has an inverse
        item = tuple(range(-len(operator.in_shape), 0))
        diagonal = operator.diagonal.detach()
        moduli = diagonal.abs()
        smallest = moduli.amax(item, keepdim=True) * _RELATIVE_FLOOR
        smallest = torch.where(smallest > 0, smallest, 1)
        inverse = torch.where(moduli >= smallest, diagonal.reciprocal(), smallest.reciprocal().to(diagonal.dtype))
        left, right = (inverse, inverse.conj()) if factor.adjoint else (inverse.conj(), inverse)
        return lambda x, inner: left * inner(right * x)
    if isinstance(operator, Pad if factor.adjoint else Crop):  # L L^H is the identity
        return lambda x, inner: factor.apply(inner(factor.apply_adjoint(x)))
    # L L^H is a projection, and on its complement L B B^H L^H + delta^2 is delta^2.
    inverse_shift = delta.square().reciprocal()
    dims = (1,) * len(operator.in_shape if factor.adjoint else operator.out_shape)

    def apply(x: Tensor, inner: Callable[[Tensor], Tensor]) -> Tensor:
        inside = factor.apply_adjoint(x)
        complement = x - factor.apply(inside)
        return factor.apply(inner(inside)) + complement * inverse_shift.reshape(*inverse_shift.shape, *dims).to(x.dtype)

    return apply
