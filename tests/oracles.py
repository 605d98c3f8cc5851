"""The answers that others are compared with: dense algebra in double precision, by torch.linalg."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import lsconv
from lsconv.operators.dtypes import double


def dense_tikhonov(
    A: lsconv.LinearOperator,
    y: Tensor,
    damp: Any = 0.0,
    L: lsconv.LinearOperator | None = None,
    x_prior: Tensor | None = None,
) -> Tensor:
    """Minimise ``||Ax - y||^2 + damp^2 ||L (x - x_prior)||^2``, of least norm without damp; differentiable.

    Args:
        A: the operator.
        y: ``(*batch, *A.out_shape)``.
        damp: a number, or a tensor of positive ones that broadcasts with the batch.
        L: the penalty; None: the identity.
        x_prior: ``(*batch, *A.in_shape)``; None: zero.
    """
    matrix = A.to_dense().to(double(A.dtype))
    prior = torch.zeros(A.in_shape, dtype=matrix.dtype) if x_prior is None else x_prior.to(matrix.dtype)
    batch = torch.broadcast_shapes(
        y.shape[: y.ndim - len(A.out_shape)], prior.shape[: prior.ndim - len(A.in_shape)], A.batch_shape,
        torch.as_tensor(damp).shape,
    )  # fmt: skip
    data = y.to(matrix.dtype).expand(*batch, *A.out_shape).reshape(*batch, -1, 1)
    if not isinstance(damp, Tensor) and damp == 0:
        x = torch.linalg.pinv(matrix, rtol=1e-9) @ data
    else:
        mu = torch.as_tensor(damp, dtype=matrix.real.dtype)[..., None, None] ** 2
        penalty = torch.eye(A.in_numel, dtype=matrix.dtype) if L is None else L.to_dense().to(matrix.dtype)
        pull = mu * (penalty.mH @ penalty)
        target = prior.expand(*batch, *A.in_shape).reshape(*batch, -1, 1)
        x = torch.linalg.solve(matrix.mH @ matrix + pull, matrix.mH @ data + pull @ target)
    return x.reshape(*batch, *A.in_shape)
