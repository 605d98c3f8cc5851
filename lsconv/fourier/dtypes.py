"""The precision in which the factors of a plan are made."""

from __future__ import annotations

import torch
from torch import Tensor

from lsconv.operators.convolution import Convolution, norm_bound

__all__ = ["default_rcond", "direct_rtol", "needs_double"]

# Factors in float32 lose a factor sigma_max^2 / damp^2 of their seven digits. Where damp is below this part of
# sigma_max they make so many more steps that factors in float64, for the same float32 data, are faster.
_LEAST_DAMP = 0.03


def direct_rtol(dtype: torch.dtype) -> float:
    """The default relative tolerance of the direct methods: 1e-6 in float32, 1e-10 in float64."""
    return 1e-6 if torch.finfo(dtype).bits == 32 else 1e-10


def default_rcond(dtype: torch.dtype) -> float:
    """The part of ``||A||`` up to which singular values count as zero: 1e-7 in float32, 1e-12 in float64.

    Rounding the data to float32 changes them by 6e-8: what a smaller singular value makes of that would drown the rest
    of x. In float64 the factors themselves are not known better.
    """
    return 1e-7 if torch.finfo(dtype).bits == 32 else 1e-12


def needs_double(A: Convolution, damp: Tensor, least: float = _LEAST_DAMP) -> bool:
    """Tell whether a damped problem with float32 data is better served by factors in float64."""
    return bool(((damp > 0) & (damp < least * norm_bound(A))).any() and (damp > 0).all())
