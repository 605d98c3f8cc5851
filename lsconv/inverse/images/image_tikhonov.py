"""Tikhonov restoration of an image under a quadratic prior around a constant; channels under one PSF share a setup."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lsconv.inverse.admm.proximal import Bounds
from lsconv.inverse.damping.choose_damp import choose_damp
from lsconv.inverse.images.identical_groups import EqualGroups
from lsconv.inverse.tikhonov import tikhonov
from lsconv.krylov.loop.solution import Solution, join_parts
from lsconv.operators.base import LinearOperator
from lsconv.operators.difference import Gradient

__all__ = ["image_tikhonov"]


def image_tikhonov(
    A: LinearOperator,
    y: Tensor,
    L: Gradient | None,
    x_prior: Tensor,
    bounds: Bounds | None,
    options: dict[str, Any],
    at_least: Tensor | None = None,
) -> Solution:
    """Solve by Tikhonov regularisation; channels under one PSF are one problem with many data and one damp.

    Args:
        A: the blur, with rows multiplied or masked.
        y: the data.
        L: the penalty; None: the identity.
        x_prior: the constant image in the penalty ``||L (x - x_prior)||``, ``(*batch, *in_shape)``.
        bounds: lowest and highest value of x, or None.
        options: the options of :func:`lsconv.tikhonov`, damp among them.
        at_least: True where the data are lower bounds; None: nowhere.
    """
    ndim, options = len(A.in_shape) - 1, dict(options)
    if isinstance(options["damp"], str):
        two_sided = None if at_least is None else ~at_least
        selection = choose_damp(
            A, y, options["damp"], L=L, x_prior=x_prior, noise_std=options.pop("noise_std"), observed=two_sided
        )
        found = image_tikhonov(A, y, L, x_prior, bounds, {**options, "damp": selection.damp}, at_least)
        return replace(found, selection=selection)
    equal = EqualGroups.of(A)
    if equal is not None:
        gradient = None if L is None else Gradient(equal.A.in_shape, ndim=ndim, boundary=L.boundary, dtype=A.dtype,
                                                device=A.device)  # fmt: skip
        rows = None if at_least is None else equal.split(at_least)
        found = image_tikhonov(equal.A, equal.split(y), gradient, equal.split(x_prior), bounds, options, rows)
        return join_parts(replace(found, x=equal.join(found.x)))
    if bounds is not None or at_least is not None:
        prior = x_prior.expand(*x_prior.shape[: -ndim - 1], *A.in_shape)
        return tikhonov(A, y, L=L, x_prior=prior, bounds=bounds, at_least=at_least, **options)
    # The residual of a constant image is rounding, which needs an absolute tolerance.
    norms = torch.linalg.vector_norm(y.flatten(-ndim - 1), dim=-1)
    options.setdefault("atol", 8 * torch.finfo(y.dtype).eps * float(norms.detach().min()))
    # The gradient of the constant x_prior is zero; solving for the difference to it keeps more digits.
    return tikhonov(A, y, L=L, x_prior=x_prior, **options)
