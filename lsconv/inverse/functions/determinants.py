r"""Determinants and traces of operators, exact through the border where its factors fit, with derivatives."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lsconv.border.determinant import TruncatedNormal, truncated_normal
from lsconv.border.influence import EXACT_UNKNOWNS
from lsconv.border.penalty import Filter, Penalty, as_convolutions
from lsconv.errors import ArgumentError, ArgumentTypeError, MethodError, PlanMemoryError, ShapeError, warn
from lsconv.fourier.batched_linalg import slogdet as dense_slogdet
from lsconv.fourier.embedding import Embedding
from lsconv.inverse.functions.square import square_slogdet
from lsconv.inverse.functions.stochastic import Estimate, Probes, log_determinant, trace_of_inverse
from lsconv.inverse.functions.triangular import triangular_factor
from lsconv.krylov.gradients.parameters import any_requires_grad, parameters_of
from lsconv.krylov.loop.problem import accept_operator, accept_penalty
from lsconv.operators.algebra import Adjoint, Product
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import broadcast_shapes
from lsconv.operators.convolution import Convolution
from lsconv.operators.dtypes import double, real_dtype
from lsconv.operators.elementary import Crop, Mask
from lsconv.operators.transforms import hidden_by_vmap, untraced

__all__ = ["SignAndLog", "logdet", "slogdet", "trace_inverse"]


class SignAndLog(NamedTuple):
    """A determinant, as torch.linalg.slogdet gives it."""

    sign: Tensor
    logabsdet: Tensor


@untraced
def logdet(
    A: Any,
    damp: float | Tensor,
    L: Any = None,
    *,
    exact: bool | None = None,
    probes: int = 32,
    generator: torch.Generator | None = None,
    return_error: bool = False,
) -> Any:
    r"""The log-determinant of the normal operator, :math:`\log\det(A^HA + \mathrm{damp}^2 L^HL)`.

    Exact, in double precision, for zero-padded and circular convolutions, also under a Mask or a Crop of their outputs,
    with L the identity or convolutional, as long as the border has at most 4096 unknowns that no frequency separates
    (a 15 x 15 kernel on 256², 32 channels of 3 x 3 on 64²), and for every operator of up to 4096 unknowns. Everything
    else (other weights among it) is estimated by stochastic Lanczos quadrature; where only the border is too large the
    probes live on the border alone, and all else stays exact.

    Differentiable by damp and by every tensor A and L are made of, in reverse and forward mode and under vmap; exact
    values any number of times, estimates once.

    Args:
        A: an operator; also a matrix, or a SciPy LinearOperator.
        damp: the damping, positive, a number or a tensor that broadcasts with ``A.batch_shape``.
        L: the penalty, an operator on ``A.in_shape``; None: the identity.
        exact: True refuses where no exact value fits; False always estimates; None estimates where it has to, and warns
            with the standard error.
        probes: random vectors of an estimate.
        generator: their source; None: always the same ones.
        return_error: return the pair of the value and its standard error (zero where the value is exact).

    Returns:
        Real tensor of A's precision, of the broadcast shape of ``A.batch_shape``, ``L.batch_shape`` and damp.

    Raises:
        ArgumentError: damp is not positive, or ``probes`` is below two.
        MethodError: ``exact=True`` where there is none, or the normal operator is singular.
        ShapeError: L does not act on A's inputs.

    Source:
        Jacobi's identity for minors, see :mod:`lsconv.border.determinant`; Ubaru, Chen and Saad, "Fast estimation of
        tr f(A) via stochastic Lanczos quadrature" (2017).

    Example:
        >>> weight = torch.ones(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)
        >>> A = lsconv.Conv2d(weight, in_size=(16, 16), padding="same")
        >>> value = lsconv.logdet(A, damp=0.5)
        >>> torch.allclose(value, torch.logdet(A.to_dense().T @ A.to_dense() + 0.25 * torch.eye(256)))
        True
        >>> value.backward()
        >>> weight.grad.shape
        torch.Size([1, 1, 3, 3])
    """
    problem = _problem(A, damp, L)
    return _exact_or_estimated(
        problem, _exact_logdet, _stochastic_logdet, "logdet", exact, probes, generator, return_error
    )


@untraced
def trace_inverse(
    A: Any,
    damp: float | Tensor,
    L: Any = None,
    *,
    exact: bool | None = None,
    probes: int = 32,
    generator: torch.Generator | None = None,
    return_error: bool = False,
) -> Any:
    r"""The trace of the inverse of the normal operator, :math:`\operatorname{tr}(A^HA + \mathrm{damp}^2 L^HL)^{-1}`.

    Times the variance of the noise it is the sum of the posterior variances of x. It is the derivative of
    :func:`logdet` by a shift of the normal operator, and exact wherever that is. Estimates use random vectors of all
    unknowns.

    Args:
        A, damp, L, exact, probes, generator, return_error: as for :func:`logdet`.

    Returns:
        Real tensor of A's precision, of the broadcast shape of ``A.batch_shape``, ``L.batch_shape`` and damp.

    Raises:
        ArgumentError, MethodError, ShapeError: as :func:`logdet` does.

    Example:
        >>> A = lsconv.Conv2d(torch.ones(1, 1, 3, 3, dtype=torch.float64), in_size=(16, 16))
        >>> N = A.to_dense().T @ A.to_dense() + 0.25 * torch.eye(256)
        >>> torch.allclose(lsconv.trace_inverse(A, 0.5), torch.linalg.inv(N).trace())
        True
    """
    problem = _problem(A, damp, L)
    return _exact_or_estimated(
        problem, _exact_trace, _stochastic_trace, "trace_inverse", exact, probes, generator, return_error
    )


@untraced
def slogdet(A: Any) -> SignAndLog:
    r"""Sign and logarithm of the absolute value of the determinant of a square operator.

    Exact, in double precision, for square stride-1 convolutions: circular ones from the symbol, zero-padded ones
    (``padding="same"`` and as many channels) by the determinant of the capacitance matrix of their border,
    :math:`\det A = \det C \cdot \det (C^{-1})_{BB}`, with the frequencies of the periodic C shifted where its
    symbol has zeros. Up to half of the digits are lost to the condition of C, more are refused. Other square
    operators: up to 4096 unknowns, from the matrix. Differentiable in every way, under vmap too.

    Args:
        A: a square operator; for a convolution the row and the column of a number are those at the same place.

    Returns:
        ``(sign, logabsdet)``, both of shape ``A.batch_shape``; the sign is a complex phase where A is complex.

    Raises:
        ShapeError: A is not square.
        MethodError: A is neither such a convolution nor small, or C is too badly conditioned.

    Source:
        Hoogeboom, van den Berg, Welling, "Emerging convolutions for generative normalizing flows", ICML 2019, for
        circular padding.

    Example:
        >>> A = lsconv.Conv1d(torch.tensor([[[0.5, -2.0, 0.0]]], dtype=torch.float64), in_size=5, padding=1)
        >>> sign, logabsdet = lsconv.slogdet(A)
        >>> (sign * logabsdet.exp()).round()
        tensor(-32., dtype=torch.float64)
    """
    A = accept_operator(A)
    if A.in_numel != A.out_numel:
        raise ShapeError(f"A: expected a square operator, got {A.in_shape} -> {A.out_shape}; logdet(A, damp) takes it")
    real_dtype(A.dtype)
    A_double = A.to(dtype=double(A.dtype))
    found = square_slogdet(A_double) if isinstance(A_double, Convolution) else None
    if found is None:
        if A.in_numel > EXACT_UNKNOWNS:
            raise MethodError(
                f"A: determinants are exact for square convolutions of stride 1 with zero or circular padding, and for "
                f"up to {EXACT_UNKNOWNS} unknowns; got {A!r}"
            )
        found = dense_slogdet(A_double.to_dense())
    return SignAndLog(found[0].to(A.dtype), found[1].to(real_dtype(A.dtype)))


# ------------------------------------------------------------------------------------------------- the problem


@dataclass(frozen=True)
class _Problem:
    """The normal operator ``A^H A + damp^2 L^H L`` in double precision, with the shape and type of the answer.

    Attributes:
        A: the operator.
        L: the penalty; None: the identity.
        damp: the damping, float64.
        batch: the batch dimensions of the answer.
        dtype: the type of the answer.
    """

    A: LinearOperator
    L: LinearOperator | None
    damp: Tensor
    batch: tuple[int, ...]
    dtype: torch.dtype


def _problem(A: Any, damp: float | Tensor, L: Any) -> _Problem:
    """Check the arguments, and convert them to double precision."""
    A = accept_operator(A)
    dtype = real_dtype(A.dtype)
    if not isinstance(damp, (int, float, Tensor)) or (isinstance(damp, Tensor) and damp.is_complex()):
        raise ArgumentTypeError(f"damp: expected a real number or a tensor of them, got {damp!r}")
    strength = torch.as_tensor(damp, dtype=torch.float64, device=A.device)
    if not hidden_by_vmap(strength) and not bool(((strength > 0) & torch.isfinite(strength)).all()):
        raise ArgumentError(f"damp: expected finite positive numbers, got {damp}")
    L = None if L is None else accept_penalty(L, A)
    precise = torch.complex128 if A.is_complex or (L is not None and L.is_complex) else torch.float64
    A, L = A.to(dtype=precise), None if L is None else L.to(dtype=precise)
    try:
        batch = tuple(broadcast_shapes(A.batch_shape, strength.shape, *(() if L is None else (L.batch_shape,))))
    except RuntimeError:
        raise ShapeError(f"damp: shape {tuple(strength.shape)} does not broadcast with A's {A.batch_shape}") from None
    return _Problem(A, L, strength, batch, dtype)


def _exact_or_estimated(
    problem: _Problem,
    compute: Any,
    estimate: Any,
    name: str,
    exact: bool | None,
    probes: int,
    generator: torch.Generator | None,
    return_error: bool,
) -> Any:
    """Return the value of ``compute``, which is exact, or where it raises MethodError that of ``estimate``."""
    if probes < 2:
        raise ArgumentError(f"probes: expected at least two, which have a standard error, got {probes}")
    reason, value = "", None
    if exact is not False:
        try:
            value = compute(problem)
        except (MethodError, PlanMemoryError) as error:
            reason = str(error)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise MethodError(
                f"{name}: A^H A + damp^2 L^H L is singular to working precision ({error}); some x that A and L both "
                "ignore, often a constant, makes it so: a larger damp, or a penalty that sees it, helps"
            ) from None
    if value is not None:
        value = value.to(problem.dtype).expand(problem.batch)
        return (value, torch.zeros_like(value)) if return_error else value
    if exact:
        raise MethodError(f"{name}: {reason}")
    found = estimate(problem, Probes(probes, generator))
    value, std_error = (part.to(problem.dtype).expand(problem.batch) for part in (found.value, found.standard_error))
    if return_error:
        return value, std_error
    if exact is None:
        warn(
            f"{name}: estimated with {probes} probes, standard error {float(std_error.max()):.2g} ({reason}); "
            "exact=False or return_error=True asks for an estimate, exact=True refuses it",
            UserWarning,
        )
    return value


# ------------------------------------------------------------------------------------------------- exact


def _truncated(problem: _Problem, *, max_unknowns: int | None = EXACT_UNKNOWNS) -> TruncatedNormal | None:
    """The problem as a truncated circulant; None where L, or A without its mask or crop, is no convolution."""
    A, unmeasured = problem.A, None
    if isinstance(A, Product) and len(A.operators) == 2:
        window, convolution = A.operators
        if not isinstance(convolution, Convolution):
            return None
        if not isinstance(window, (Mask, Crop)) or window.batch_shape:
            return None
        # A row of zeros adds nothing to A^H A: an output that a mask hides is as if it were cropped.
        ones = torch.ones(convolution.out_shape, dtype=A.dtype, device=A.device)
        unmeasured = (window.adjoint(window.apply(ones)) == 0).unflatten(0, (convolution.groups, -1))
        A = convolution
        if not bool((unmeasured == unmeasured[:1]).all()):
            return None
        unmeasured = unmeasured[0]
    if not isinstance(A, Convolution) or not Embedding.serves(A):
        return None
    penalty: tuple[list[Filter], Tensor] | None = None
    if problem.L is not None:
        terms = as_convolutions(problem.L, A.ndim)
        if terms is None or not Penalty.serves(A, terms):
            return None
        penalty = terms, problem.damp
    return truncated_normal(A, problem.batch, penalty, unmeasured, max_unknowns=max_unknowns)


def _shift(problem: _Problem) -> Tensor:
    """The multiple of the identity in the normal operator: ``damp^2``, or 0 where there is a penalty L."""
    mu = problem.damp.square() if problem.L is None else torch.zeros_like(problem.damp)
    return mu.expand(problem.batch)


def _exact_logdet(problem: _Problem) -> Tensor:
    """The log-determinant by the border, or by a dense factor of a small problem; else MethodError."""
    A = problem.A
    if isinstance(A, Adjoint) and problem.L is None:  # A^H A and A A^H have the same eigenvalues but for zeros
        return _exact_logdet(replace(problem, A=A.operator)) + (A.in_numel - A.out_numel) * _shift(problem).log()
    truncated = _truncated(problem)
    if truncated is not None:
        return truncated.logdet(_shift(problem))
    R, surplus = _triangular(problem)
    return 2 * R.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1) + surplus * problem.damp.square().log()


def _exact_trace(problem: _Problem) -> Tensor:
    """The trace of the inverse by the border, or by a dense factor of a small problem; else MethodError."""
    A = problem.A
    if isinstance(A, Adjoint) and problem.L is None:
        return _exact_trace(replace(problem, A=A.operator)) + (A.in_numel - A.out_numel) / _shift(problem)
    truncated = _truncated(problem)
    if truncated is not None:  # the derivative of the log-determinant by a shift
        found: Tensor = torch.func.grad(lambda shift: truncated.logdet(shift).sum())(_shift(problem))
        return found
    R, surplus = _triangular(problem)
    inverse = torch.linalg.solve_triangular(R, torch.eye(R.shape[-1], dtype=R.dtype, device=R.device), upper=True)
    return inverse.abs().square().sum((-2, -1)) + surplus / problem.damp.square()


def _triangular(problem: _Problem) -> tuple[Tensor, int]:
    """The triangular factor of the normal operator, or of ``A A^H + damp^2`` if that is smaller, and by how much."""
    A, L = problem.A, problem.L
    surplus = max(A.in_numel - A.out_numel, 0) if L is None else 0
    if A.in_numel - surplus > EXACT_UNKNOWNS:
        raise MethodError(
            f"there are exact values for convolutions with zero or circular padding, masked or cropped, with "
            f"convolutional penalties, and for up to {EXACT_UNKNOWNS} unknowns"
        )
    return triangular_factor(A.H if surplus else A, L, problem.damp, problem.batch), surplus


# ------------------------------------------------------------------------------------------------- estimates


def _needs_gradient(problem: _Problem) -> bool:
    """Tell whether damp, or a tensor that A or L is made of, has derivatives."""
    L = () if problem.L is None else parameters_of(problem.L)
    return any_requires_grad(problem.damp, *parameters_of(problem.A), *L)


def _stochastic_logdet(problem: _Problem, probes: Probes) -> Estimate:
    """Estimate the log-determinant: that of the circulant is exact, that of the border is estimated from probes."""
    truncated = _truncated(problem, max_unknowns=None)
    if truncated is None:
        return _estimate_normal(problem, probes, log_determinant, lambda mu, surplus: surplus * mu.log())
    value, inverse = truncated.parts(_shift(problem))
    error = torch.zeros_like(value)
    if truncated.minor is not None:
        cells = truncated.minor.mask.flatten().nonzero().flatten().to(value.device)
        shape = tuple(truncated.minor.mask.shape)

        def apply(z: Tensor) -> Tensor:
            on_grid = z.new_zeros(*z.shape[:-1], math.prod(shape)).index_copy(-1, cells, z)
            return inverse.on_grid(on_grid.unflatten(-1, shape)).flatten(2).index_select(-1, cells)

        start = probes.draw((len(value), len(cells)), problem.A.parameters()[0])
        found = log_determinant(apply, start, 1, derivatives=_needs_gradient(problem))
        value, error = value + found.value, found.standard_error
    batch = (*truncated.embedding.batch_shape, -1)
    return Estimate(value.reshape(batch).sum(-1), error.reshape(batch).square().sum(-1).sqrt())


def _stochastic_trace(problem: _Problem, probes: Probes) -> Estimate:
    """Estimate the trace of the inverse."""
    return _estimate_normal(problem, probes, trace_of_inverse, lambda mu, surplus: surplus / mu)


def _estimate_normal(problem: _Problem, probes: Probes, function: Any, of_surplus: Any) -> Estimate:
    """Estimate a function of the normal operator, or of ``A A^H + damp^2`` where that is smaller.

    ``of_surplus`` takes ``damp^2`` and the number of eigenvalues ``damp^2`` that the smaller one lacks.
    """
    A, L = problem.A, problem.L
    damp = problem.damp.expand(problem.batch)
    smaller = L is None and A.out_numel < A.in_numel
    shape = A.out_shape if smaller else A.in_shape
    mu = damp.square().reshape(*problem.batch, *(1 for _ in shape))

    def apply(z: Tensor) -> Tensor:
        if smaller:
            return A.apply(A.adjoint(z)) + mu * z
        return A.adjoint(A.apply(z)) + mu * (z if L is None else L.adjoint(L.apply(z)))

    start = probes.draw((*problem.batch, *shape), torch.zeros((), dtype=A.dtype, device=A.device))
    found: Estimate = function(apply, start, len(shape), derivatives=_needs_gradient(problem))
    if not smaller:
        return found
    return Estimate(found.value + of_surplus(damp.square(), A.in_numel - A.out_numel), found.standard_error)
