r"""The evidence: the likelihood of the data under Gaussian noise and a Gaussian prior, x integrated out.

Completing the square, with :math:`\mu = \mathrm{damp}^2`, m measured data, n unknowns, q the dimension of the null
space of L, :math:`{\det}_+` the product of the positive eigenvalues and :math:`\bar x` the Tikhonov solution,

.. math:: -2 \log p(y) = (m - q) \log(2\pi\sigma^2) + \frac{\|A\bar x - y\|^2 + \mu \|L\bar x\|^2}{\sigma^2}
          + \log\det(A^HA + \mu L^HL) - (n - q) \log\mu - \log {\det}_+ L^HL ,

where for q > 0 it is the restricted likelihood: the null space of L, on which the prior is flat, is integrated over.
Harville, "Bayesian inference for variance components using only error contrasts" (1974).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lsconv.errors import ArgumentError, DtypeError, NonFiniteError
from lsconv.inverse.damping.choose_damp import null_dimension
from lsconv.inverse.damping.measured import zero_rows
from lsconv.inverse.functions.determinants import logdet
from lsconv.inverse.tikhonov import tikhonov
from lsconv.inverse.uncertainty.posterior import positive
from lsconv.krylov.loop.problem import accept_operator
from lsconv.operators.dtypes import real_dtype
from lsconv.operators.observed import observed
from lsconv.operators.transforms import untraced

__all__ = ["log_evidence"]


@untraced
def log_evidence(
    A: Any,
    y: Tensor,
    damp: float | Tensor,
    *,
    noise_std: float | Tensor | None = None,
    L: Any = None,
    x_prior: Tensor | None = None,
    exact: bool | None = None,
) -> Tensor:
    r"""The logarithm of the evidence :math:`p(y \mid A, \mathrm{damp}, \sigma)`, up to a constant of L.

    The model is that of :func:`lsconv.posterior_samples`. What is left out is :math:`\frac12 \log\det_+ L^HL`, which is
    zero for the identity and depends on L alone, so that values for one L compare kernels, damps and noises. For a
    singular L it is the restricted likelihood. Its maximum over damp, with the noise profiled out, is the damp of
    ``choose_damp(A, y, "evidence", L=L)``.

    Differentiable by y, ``x_prior``, damp, ``noise_std`` and every tensor A and L are made of, twice where the
    determinant is exact: the standard errors of a maximum come from the Hessian.

    Args:
        A: a real operator; also a matrix, or a SciPy LinearOperator.
        y: data ``(*batch, *out_shape)``. Rows of A that are zero (under a Mask) are not measured, and do not count.
        damp: the damping, positive, a number or one per batch item.
        noise_std: standard deviation :math:`\sigma` of the noise in every entry of y; None: the one that maximises the
            evidence, :math:`\sigma^2 = (\|A\bar x - y\|^2 + \mathrm{damp}^2 \|L(\bar x - x_{prior})\|^2) / (m - q)`.
        L: the penalty; None: the identity. Its null space is taken to be what is constant along its last axes, or
            nothing, whichever its action shows.
        x_prior: the mean of the prior, ``(*batch, *in_shape)``; None: zero.
        exact: as for :func:`lsconv.logdet`.

    Returns:
        float64 tensor, one per batch item.

    Raises:
        DtypeError: A or y is complex.
        ArgumentError: damp or ``noise_std`` is not positive, or no data are left beside the null space of L.
        LsconvError: as :func:`lsconv.tikhonov` and :func:`lsconv.logdet`.

    Source:
        Harville (1974); MacKay, "Bayesian interpolation", Neural Computation 4 (1992).

    Example:
        >>> A = lsconv.Conv1d(torch.tensor([[[0.5, 1.0, 0.5]]], dtype=torch.float64), in_size=8)
        >>> y, M = torch.randn(1, 6, dtype=torch.float64), A.to_dense()
        >>> C = 0.1**2 * torch.eye(6, dtype=torch.float64) + (0.1 / 0.3) ** 2 * M @ M.T
        >>> normal = torch.distributions.MultivariateNormal(torch.zeros(6, dtype=torch.float64), C)
        >>> torch.allclose(lsconv.log_evidence(A, y, 0.3, noise_std=0.1), normal.log_prob(y.flatten()))
        True
    """
    A = accept_operator(A, y)
    real_dtype(A.dtype)
    if A.is_complex or (isinstance(y, Tensor) and y.is_complex()):
        raise DtypeError("A: the evidence is that of real data; give the real and the imaginary part as two channels")
    A.check_output(y, "y")
    positive(damp, A, "damp")
    if noise_std is not None:
        positive(noise_std, A)
    A, y = A.to(dtype=torch.float64), y.double()
    if not bool(torch.isfinite(observed(A, y)).all()):
        raise NonFiniteError("y: contains NaN or infinity where it is measured; put lsconv.Mask(isfinite) before A")
    L = None if L is None else accept_operator(L, name="L").to(dtype=torch.float64)
    prior = None if x_prior is None else x_prior.double()
    mu = torch.as_tensor(damp, dtype=torch.float64, device=A.device).square()
    log_determinant = logdet(A, damp, L, exact=exact)
    x = tikhonov(A, y, damp, L=L, x_prior=prior).x
    offset = x if prior is None else x - prior
    quadratic = _square(observed(A, y) - A.apply(x), len(A.out_shape))
    penalised, ndim = (offset, len(A.in_shape)) if L is None else (L.apply(offset), len(L.out_shape))
    quadratic = quadratic + mu * _square(penalised, ndim)
    zero, nullity = zero_rows(A), null_dimension(L)
    measured = A.out_numel if zero is None else A.out_numel - zero.flatten(zero.ndim - len(A.out_shape)).sum(-1)
    degrees_of_freedom = torch.as_tensor(measured - nullity, dtype=torch.float64, device=A.device)
    if not bool((degrees_of_freedom > 0).all()):
        least = int(degrees_of_freedom.min()) + nullity
        raise ArgumentError(
            f"y: {least} of {A.out_numel} data are measured, and the penalty leaves {nullity} constants free: "
            "none is left to judge by"
        )
    if noise_std is None:
        variance = quadratic / degrees_of_freedom
        if not bool((variance.detach() > 0).all()):
            raise ArgumentError("y: is fitted exactly, so the noise cannot be found from it; give noise_std")
    else:
        variance = torch.as_tensor(noise_std, dtype=torch.float64, device=A.device).square()
    value = degrees_of_freedom * (2 * math.pi * variance).log() + quadratic / variance
    return -(value + log_determinant - (A.in_numel - nullity) * mu.log()) / 2


def _square(z: Tensor, item_ndim: int) -> Tensor:
    """``||z||^2`` of every batch item."""
    return z.square().flatten(z.ndim - item_ndim).sum(-1)
