"""Error bars of a restored image: the standard deviations of its pixels, those of equal channels in one computation."""

from __future__ import annotations

import torch
from torch import Tensor

from lsconv.inverse.images.identical_groups import EqualGroups
from lsconv.inverse.uncertainty.posterior import noise_level, posterior_std
from lsconv.operators.base import LinearOperator

__all__ = ["error_bars"]


@torch.no_grad()
def error_bars(
    A: LinearOperator,
    y: Tensor,
    damp: Tensor,
    L: LinearOperator | None,
    x_prior: Tensor,
    noise_std: float | Tensor | None,
    count: int,
) -> Tensor:
    """The posterior standard deviations of ``tikhonov(A, y, damp, L=L, x_prior=x_prior)``.

    Args:
        A, y, damp, L, x_prior: the problem as solved.
        noise_std: standard deviation of the noise in the entries of y; None: estimated from the residual, for each
            channel where all channels have the same kernels.
        count: number of samples where the unknowns are too many for an exact map; their seed is fixed.

    Returns:
        ``(*batch, *in_shape)``.
    """
    # Where A and L treat all channels alike, one channel is the operator and the channels are a batch.
    equal = EqualGroups.of(A, L)
    if equal is not None and (L is None or equal.L is not None):
        prior = x_prior.expand(*x_prior.shape[: x_prior.ndim - len(A.in_shape)], *A.in_shape)
        bars = error_bars(equal.A, equal.split(y), damp, equal.L, equal.split(prior), noise_std, count)
        return equal.join(bars.expand(equal.groups, *bars.shape[-damp.ndim - len(A.in_shape) :]))
    sigma = noise_level(A, y, damp, L=L, x_prior=x_prior) if noise_std is None else noise_std
    generator = torch.Generator(A.device).manual_seed(0)
    std: Tensor = posterior_std(A, damp, noise_std=sigma, L=L, count=count, generator=generator)
    return std
