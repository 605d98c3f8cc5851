r"""The rules for damp, as functions of residual, penalty and influence trace.

With r the residual, :math:`\mu = damp^2`, H the influence matrix of :mod:`lsconv.inverse.damping.paths` and m measured
data (where A has a zero row nothing is measured, :mod:`lsconv.inverse.damping.measured`):

=================  ==================================================================================================
rule               damp
=================  ==================================================================================================
``"gcv"``          minimises :math:`m \|r\|^2 / (m - \operatorname{tr} H)^2`
``"discrepancy"``  solves :math:`\|r\|^2 = m\, \mathrm{noise\_std}^2`
``"upre"``         minimises :math:`\|r\|^2 + 2\, \mathrm{noise\_std}^2 \operatorname{tr} H`
``"lcurve"``       maximises the curvature of :math:`(\log\|r\|, \log\|Lx\|)`, which is computed from derivatives in
                   closed form
``"evidence"``     maximises the marginal likelihood of y under white noise and the Gaussian prior of precision
                   :math:`L^HL`, both scales estimated: minimises :math:`m \log(\|r\|^2 + \mu \|Lx\|^2) +
                   \log\det(I + AA^H/\mu)`, which is stationary where :math:`m \mu \|Lx\|^2 / (\|r\|^2 + \mu \|Lx\|^2)
                   = \operatorname{tr} H`
=================  ==================================================================================================

Golub, Heath, Wahba, "Generalized cross-validation as a method for choosing a good ridge parameter" (1979); Vogel,
"Computational Methods for Inverse Problems" (2002), chapter 7; Hansen, "Discrete Inverse Problems" (2010), chapter 5.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lsconv.inverse.damping.paths import Evaluation

__all__ = ["RULES", "WITH_NOISE", "WITH_TRACE", "Criterion"]

RULES = ("gcv", "discrepancy", "upre", "lcurve", "evidence")
WITH_NOISE = ("discrepancy", "upre")
WITH_TRACE = ("gcv", "upre", "evidence")


class Criterion:
    """The criterion of a rule: a function to minimise, and for some rules a function whose zero is the minimum.

    Args:
        rule: the rule.
        noise: standard deviation of the noise, ``batch``.
        nullity: dimension of the null space of L, for the evidence; a number or ``batch``.
    """

    def __init__(self, rule: str, noise: Tensor | None, nullity: int | Tensor) -> None:
        self.rule, self.noise, self.nullity = rule, noise, nullity

    def __call__(self, e: Evaluation, t: Tensor, count: int | Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the values, and for the root-finding rules an increasing function to find the zero of.

        ``t`` is log damp, ascending along the first dimension, and ``count`` the number of data.
        """
        function: Callable[..., tuple[Tensor, Tensor | None]] = getattr(self, f"_{self.rule}")
        return function(e, t, count)

    @property
    def needs_slope(self) -> bool:
        """Tell whether :meth:`root_function` uses the slopes of an evaluation."""
        return self.rule in ("gcv", "upre")

    def root_function(self, e: Evaluation, t: Tensor, count: int | Tensor) -> Tensor:
        """The function of log damp whose zero is the best damp; it uses the slopes of ``e``.

        It is the derivative of the logarithm of the function to minimise (for the evidence: of the likelihood's mth
        root); for the discrepancy principle it is the logarithm of the ratio of both sides of its equation.
        """
        mu = (2 * t).exp()
        residual_rise = -2 * mu.square() * e.penalty_slope
        if self.rule == "gcv":
            value, _ = self._gcv(e, t, count)
            free = torch.where(torch.isfinite(value), count - e.trace, torch.nan)
            return residual_rise / e.residual_norm_sq + 4 * e.trace_slope / free
        if self.rule == "upre":
            assert self.noise is not None
            value, _ = self._upre(e, t, count)
            return (residual_rise + 4 * self.noise**2 * e.trace_slope) / value
        if self.rule == "evidence":
            penalty, dof = mu * e.penalty_norm_sq, count - self.nullity
            return 2 * penalty / (e.residual_norm_sq + penalty) - 2 * (e.trace - self.nullity) / dof
        root: Tensor = self._discrepancy(e, t, count)[1]
        return root

    def _gcv(self, e: Evaluation, t: Tensor, count: int | Tensor) -> tuple[Tensor, None]:
        free = count - e.trace
        # Where A fits the data almost exactly m - tr H is smaller than the error of the trace.
        free = torch.where(
            (free > torch.finfo(free.dtype).eps ** 0.5 * count) & (free > 4 * e.trace_error), free, torch.nan
        )
        return count * e.residual_norm_sq / free**2, None

    def _upre(self, e: Evaluation, t: Tensor, count: int | Tensor) -> tuple[Tensor, None]:
        assert self.noise is not None
        return e.residual_norm_sq + 2 * self.noise**2 * e.trace, None

    def _discrepancy(self, e: Evaluation, t: Tensor, count: int | Tensor) -> tuple[Tensor, Tensor]:
        assert self.noise is not None
        return e.residual_norm_sq, (e.residual_norm_sq / (count * self.noise**2)).clamp_min(1e-300).log()

    def _lcurve(self, e: Evaluation, t: Tensor, count: int | Tensor) -> tuple[Tensor, None]:
        # With primes for d/dlog mu, X = log||r||, Y = log||Lx||: d||r||^2 = -mu d||Lx||^2, so X' = -q Y' with
        # q = mu ||Lx||^2 / ||r||^2, and the curvature (X'Y'' - X''Y') / (X'^2 + Y'^2)^(3/2) needs q' but not Y''.
        mu = (2 * t).exp()
        q = mu * e.penalty_norm_sq / e.residual_norm_sq
        slope = 0.5 * mu * e.penalty_slope / e.penalty_norm_sq
        return -q * (1 + 2 * slope * (1 + q)) / ((1 + q * q) ** 1.5 * slope.abs()), None

    def _evidence(self, e: Evaluation, t: Tensor, count: int | Tensor) -> tuple[Tensor, Tensor]:
        """Minus twice the log evidence at the best noise variance, and a logarithm that is zero at its minimum."""
        dof = count - self.nullity
        penalty = (2 * t).exp() * e.penalty_norm_sq
        quadratic = e.residual_norm_sq + penalty
        effective_parameters = e.trace - self.nullity
        logdet = e.logdet
        # Without the determinant its derivative by log mu, -effective_parameters, is integrated.
        if bool(torch.isnan(logdet).any()) and t.shape[0] > 1:
            steps = 0.5 * (effective_parameters[1:] + effective_parameters[:-1]) * 2 * (t[1:] - t[:-1])
            tail = steps.flip(0).cumsum(0).flip(0)
            logdet = torch.cat([tail, torch.zeros_like(tail[:1])])
        logdet = logdet.nan_to_num()  # for one damp alone the constant is arbitrary
        root = (dof * penalty / quadratic).clamp_min(1e-300).log() - effective_parameters.clamp_min(1e-300).log()
        return dof * (quadratic / dof).clamp_min(1e-300).log() + logdet, root
