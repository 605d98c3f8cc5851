r"""Samples of the posterior of x by perturbation and optimisation, and its standard deviations.

Under the model

.. math:: y = Ax + e, \quad e \sim N(0, \sigma^2), \qquad x \sim N(x_{prior}, (\sigma / \mathrm{damp})^2 (L^HL)^{-1}),

with a prior that is flat on the null space of L, the posterior of x is Gaussian with the mean that
:func:`lsconv.tikhonov` computes and
the covariance :math:`\sigma^2 N^{-1}`, :math:`N = A^HA + \mathrm{damp}^2 L^HL`. A sample is the solution for perturbed
data and a perturbed prior,

.. math:: N (x - \bar x) = \sigma (A^H \epsilon_1 + \mathrm{damp}\, L^H \epsilon_2),

since the right-hand side has the covariance :math:`\sigma^2 N`: one solve a sample, with a plan that is made once.

Papandreou and Yuille, "Gaussian sampling by local perturbations" (2010); Orieux, Féron and Giovannelli, "Sampling
high-dimensional Gaussian distributions for general linear inverse problems" (2012).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lsconv.border.influence import EXACT_UNKNOWNS
from lsconv.errors import ArgumentError, MethodError
from lsconv.inverse.damping.measured import zero_rows
from lsconv.inverse.functions.determinants import logdet
from lsconv.inverse.functions.triangular import triangular_factor
from lsconv.inverse.pseudo_inverse import pinv
from lsconv.inverse.route import penalty_plan
from lsconv.inverse.tikhonov import tikhonov
from lsconv.krylov.loop.problem import accept_operator, accept_penalty
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import broadcast_shapes, over_items
from lsconv.operators.dtypes import double, real_dtype
from lsconv.operators.transforms import untraced

__all__ = ["noise_level", "positive", "posterior_samples", "posterior_std"]


@torch.no_grad()
@untraced
def posterior_samples(
    A: Any,
    y: Tensor,
    damp: float | Tensor,
    *,
    noise_std: float | Tensor | None,
    L: Any = None,
    x_prior: Tensor | None = None,
    count: int = 16,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Independent samples of x given y, under Gaussian noise and the Gaussian prior of :func:`lsconv.tikhonov`.

    .. math:: x \mid y \sim N\bigl(\bar x,\; \sigma^2 (A^HA + \mathrm{damp}^2 L^HL)^{-1}\bigr)

    with :math:`\bar x` the solution of ``tikhonov(A, y, damp, L=L, x_prior=x_prior)``. A sample costs one solve, with
    a plan made once. Measurements of unequal noise: ``Diagonal(w) @ A`` and ``w * y`` with ``w = noise_std / sigma_i``;
    missing ones: ``Mask(mask) @ A``.

    Args:
        A: an operator; also a matrix, or a SciPy LinearOperator.
        y: data ``(*batch, *out_shape)``.
        damp: the damping, positive, a number or one per batch item: the noise over the prior's standard deviation of
            the entries of Lx.
        noise_std: standard deviation :math:`\sigma` of the noise in every entry of y (of the whole complex number), in
            the units of y, a number or one per batch item; None: estimated by :func:`noise_level` at this damp.
        L: the penalty, an operator on ``A.in_shape``; None: the identity.
        x_prior: the mean of the prior, ``(*batch, *in_shape)``; None: zero.
        count: how many samples.
        generator: source of the random numbers, on A's device.

    Returns:
        ``(count, *batch, *in_shape)``.

    Raises:
        ArgumentError: damp or ``noise_std`` is not positive, or ``count`` below one.
        LsconvError: for tensors that do not fit, as :func:`lsconv.tikhonov`.

    Source:
        The papers named in the module.

    Example:
        >>> A = lsconv.Conv2d(torch.ones(1, 1, 3, 3) / 9, in_size=(16, 16))
        >>> y = A(torch.linspace(0, 1, 16).expand(1, 16, 16)) + 0.01 * torch.randn(A.out_shape)
        >>> samples = lsconv.posterior_samples(A, y, 0.1, noise_std=0.01, L=lsconv.Gradient((1, 16, 16)), count=8)
        >>> samples.shape
        torch.Size([8, 1, 16, 16])
    """
    A = accept_operator(A, y)
    if count < 1:
        raise ArgumentError(f"count: expected at least one sample, got {count}")
    posterior = _Posterior.of(A, damp, L)
    mean = tikhonov(A, y, damp, L=posterior.L, x_prior=x_prior).x
    sigma = noise_level(A, y, damp, L=posterior.L, x_prior=x_prior) if noise_std is None else positive(noise_std, A)
    batch = tuple(mean.shape[: mean.ndim - len(A.in_shape)])
    deviations = posterior.deviations((count, *batch), generator)
    return mean + over_items(sigma.to(mean.real.dtype), len(A.in_shape)) * deviations


@torch.no_grad()
@untraced
def posterior_std(
    A: Any,
    damp: float | Tensor,
    *,
    noise_std: float | Tensor | None,
    L: Any = None,
    y: Tensor | None = None,
    exact: bool | None = None,
    count: int = 128,
    generator: torch.Generator | None = None,
    return_error: bool = False,
) -> Any:
    r"""The standard deviation of every entry of x given the data, :math:`\sigma \sqrt{(N^{-1})_{ii}}`.

    Exact, in double precision, up to 4096 unknowns. Larger maps come from ``count`` samples of the posterior, one solve
    each, with the same relative standard error
    :math:`1 / \sqrt{2\, \mathrm{count}}` in every pixel. The data do
    not enter, but for the noise where it is not given.

    Args:
        A, damp, noise_std, L, generator: as for :func:`posterior_samples`.
        y: data ``(*batch, *out_shape)``, needed where ``noise_std`` is None.
        exact: True refuses where no exact map fits, False always samples, None samples where it has to.
        count: number of samples.
        return_error: return the pair of the map and its relative standard error, a number (zero where it is exact).

    Returns:
        Real tensor ``(*batch, *in_shape)``, batch being that of A, damp, L and ``noise_std``; of complex entries the
        root of the mean square modulus.

    Raises:
        ArgumentError: damp or ``noise_std`` is not positive, ``count`` is below one, or neither ``noise_std`` nor y is
            given.
        MethodError: ``exact=True`` with more than 4096 unknowns.

    Example:
        >>> A = lsconv.Conv1d(torch.ones(1, 1, 3, dtype=torch.float64) / 3, in_size=8)
        >>> std = lsconv.posterior_std(A, 0.5, noise_std=0.1)
        >>> N = A.to_dense().T @ A.to_dense() + 0.25 * torch.eye(8)
        >>> torch.allclose(std.flatten(), 0.1 * torch.linalg.inv(N).diagonal().sqrt())
        True
    """
    A = accept_operator(A) if y is None else accept_operator(A, y)
    if count < 1:
        raise ArgumentError(f"count: expected at least one sample, got {count}")
    if noise_std is None and y is None:
        raise ArgumentError("noise_std: expected a number, or y= to estimate it from, got neither")
    posterior = _Posterior.of(A, damp, L)
    if noise_std is not None:
        sigma = positive(noise_std, A)
    else:
        assert y is not None
        sigma = noise_level(A, y, damp, L=posterior.L)
    if exact and A.in_numel > EXACT_UNKNOWNS:
        raise MethodError(
            f"exact: A has {A.in_numel} unknowns, and variances are exact up to {EXACT_UNKNOWNS}; exact=None samples"
        )
    sampled = exact is False or A.in_numel > EXACT_UNKNOWNS
    if sampled:
        samples = posterior.deviations((count, *posterior.batch), generator)  # their mean is known to be zero
        values = samples.abs().double().square().mean(0).sqrt()
    else:
        values = posterior.exact()
    std = over_items(sigma, len(A.in_shape)) * values
    std = std.to(real_dtype(A.dtype))
    return (std, (2 * count) ** -0.5 if sampled else 0.0) if return_error else std


@torch.no_grad()
@untraced
def noise_level(A: Any, y: Tensor, damp: float | Tensor, *, L: Any = None, x_prior: Tensor | None = None) -> Tensor:
    r"""Estimate the standard deviation of the noise in y from the residual.

    .. math:: \hat\sigma^2 = \|y - Ax\|^2 / (m - \operatorname{tr} H), \qquad
              \operatorname{tr} H = n - \tfrac12\, \mathrm{damp}\, \partial_{\mathrm{damp}} \log\det N,

    the residual's mean square per degree of freedom of the noise, with x the Tikhonov solution and m the measured data.
    It is as good as damp is: generalised cross-validation chooses the damp with it in mind.

    Args:
        A, y, damp, L, x_prior: as for :func:`posterior_samples`.

    Returns:
        float64 tensor, one per batch item.

    Source:
        Wahba, "Spline Models for Observational Data" (1990), section 4.9.

    Example:
        >>> A = lsconv.Conv1d(torch.ones(1, 1, 3, dtype=torch.float64) / 3, in_size=400)
        >>> x = torch.linspace(0, 1, 400, dtype=torch.float64)[None]
        >>> y = A(x) + 0.05 * torch.randn(A.out_shape, dtype=torch.float64)
        >>> 0.04 < lsconv.noise_level(A, y, 3.0, L=lsconv.Gradient((1, 400), 1)) < 0.06
        tensor(True)
    """
    A = accept_operator(A, y)
    solution = tikhonov(A, y, damp, L=L, x_prior=x_prior)
    posterior = _Posterior.of(A, damp, L)
    with torch.enable_grad():
        strength = posterior.damp.detach().expand(posterior.batch).clone().requires_grad_()
        A_double = A.to(dtype=double(A.dtype))
        value, _ = logdet(A_double, strength, posterior.L, return_error=True)
        (slope,) = torch.autograd.grad(value.sum(), strength)
    degrees_of_freedom = A.in_numel - strength.detach() * slope / 2
    zero = zero_rows(A)
    measured = A.out_numel if zero is None else A.out_numel - zero.flatten(-len(A.out_shape)).sum(-1)
    return solution.residual_norm.double() / (measured - degrees_of_freedom).sqrt()


@dataclass(frozen=True)
class _Posterior:
    """The posterior covariance ``N^-1`` for noise of standard deviation one, ``N = A^H A + damp^2 L^H L``.

    Attributes:
        A: the operator.
        L: the penalty; None: the identity.
        damp: the damping, float64.
        batch: the batch dimensions of A, L and damp together.
    """

    A: LinearOperator
    L: LinearOperator | None
    damp: Tensor
    batch: tuple[int, ...]

    @classmethod
    def of(cls, A: LinearOperator, damp: float | Tensor, L: Any) -> _Posterior:
        """Check the arguments of a public function."""
        real_dtype(A.dtype)
        L = None if L is None else accept_penalty(L, A)
        strength = positive(damp, A, "damp")
        batch = broadcast_shapes(A.batch_shape, strength.shape, () if L is None else L.batch_shape)
        return cls(A, L, strength, tuple(batch))

    def deviations(self, batch: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        """Samples of ``N(0, N^-1)``, of shape ``(*batch, *in_shape)``."""
        A, L = self.A, self.L
        solve = self._solver()

        def noise(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(*batch, *shape, dtype=A.dtype, device=A.device, generator=generator)

        damp = self.damp.to(noise(()).real.dtype)
        damp = over_items(damp, len(A.in_shape))
        prior = noise(A.in_shape if L is None else L.out_shape)
        return solve(noise(A.out_shape), prior / damp if L is None else damp * L.adjoint(prior))

    def _solver(self) -> Callable[[Tensor, Tensor], Tensor]:
        """A function of noise in the data and a sample of the prior that solves for a sample of the posterior.

        The second argument is a sample x of the prior where L is the identity, else ``damp L^H`` of noise.
        """
        A, L = self.A, self.L
        if L is None:
            inverse = pinv(A, damp=self.damp)
            return lambda data, prior: prior + inverse(data - A.apply(prior))
        plan = penalty_plan(A, L, self.damp)
        return lambda data, prior: plan.normal_solve(A.adjoint(data) + prior)

    def exact(self) -> Tensor:
        """``sqrt((N^-1)_ii)`` in double precision."""
        R = triangular_factor(self.A, self.L, self.damp, self.batch)
        inverse = torch.linalg.solve_triangular(R, torch.eye(R.shape[-1], dtype=R.dtype, device=R.device), upper=True)
        return torch.linalg.vector_norm(inverse, dim=-1).reshape(*self.batch, *self.A.in_shape)


def positive(value: Any, A: LinearOperator, name: str = "noise_std") -> Tensor:
    """Check that an argument is a positive number, or one per batch item, and return it in double precision.

    Raises:
        ArgumentError: it is not positive, is the name of a rule, or has an entry for every datum.
    """
    if isinstance(value, str):
        raise ArgumentError(f"{name}: expected positive numbers, got {value!r}; choose_damp finds a damp by a rule")
    if isinstance(value, Tensor) and value.shape[-len(A.out_shape) :] == A.out_shape and value.ndim:
        raise ArgumentError(
            f"{name}: expected one number per batch item, got a map of shape {tuple(value.shape)}; for noise that "
            f"varies give Diagonal(1 / {name}) @ A for A, y / {name} for y, and {name}=1"
        )
    values = torch.as_tensor(value, dtype=torch.float64, device=A.device)
    if not bool(((values > 0) & torch.isfinite(values)).all()):
        raise ArgumentError(f"{name}: expected finite positive numbers, got {value}")
    return values
