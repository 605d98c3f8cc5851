"""A least-squares problem with a penalty and a prior, as one with the operator ``[A; damp L]``, and its certificate."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lsconv.krylov.loop.batched_scalars import ItemSpace
from lsconv.krylov.loop.certificate import NullSpaceBound, Tolerances
from lsconv.krylov.loop.judge import Judge
from lsconv.krylov.loop.solution import Solution
from lsconv.operators.algebra import VStack
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import broadcast_shapes

__all__ = ["Penalised"]


@dataclass(frozen=True, eq=False)
class Penalised:
    r"""The problem :math:`\min_x \|Ax - y\|^2 + \mathrm{damp}^2\|L(x - x_{prior})\|^2` for many y.

    .. math:: x = x_{prior} + d, \qquad
              \min_d \left\|\begin{pmatrix} A \\ \mathrm{damp}\, L\end{pmatrix} d
                            - \begin{pmatrix} y - Ax_{prior} \\ 0\end{pmatrix}\right\|^2

    Without L that is damped least squares with A alone.

    Attributes:
        A: the operator, in the dtype to compute in.
        damp: the damping in float64, a number or one per batch item.
        L: the penalty, in the dtype of A; None: the identity.
    """

    A: LinearOperator
    damp: Tensor
    L: LinearOperator | None = None

    @functools.cached_property
    def stack(self) -> LinearOperator:
        """The operator ``[A; damp L]``; without L it is A."""
        A, L = self.A, self.L
        return A if L is None else VStack([A, L * torch.as_tensor(self.damp, dtype=A.dtype, device=A.device)])

    @functools.cached_property
    def identity_damp(self) -> Tensor:
        """The damping that is not in the stack: zero with L."""
        return self.damp if self.L is None else torch.zeros_like(self.damp)

    def data_without_prior(self, y: Tensor, x_prior: Tensor | None) -> Tensor:
        """Return the data of d, ``y - A x_prior``."""
        y = y.detach().to(self.A.dtype)
        return y if x_prior is None else y - self.A.apply(x_prior.detach().to(self.A.dtype))

    def data(self, y: Tensor, x_prior: Tensor | None = None) -> Tensor:
        """The data of the stack, ``[y - A x_prior; 0]``."""
        y = self.data_without_prior(y, x_prior)
        if not isinstance(self.stack, VStack):
            return y
        A, L = self.stack.operators
        batch = broadcast_shapes(y.shape[: y.ndim - len(A.out_shape)], self.stack.batch_shape)
        zero = y.new_zeros(()).expand(*batch, *L.out_shape)
        return self.stack.blocks.join([y.expand(*batch, *A.out_shape), zero])

    def judge(self, tolerances: Tolerances, dtype: torch.dtype, **evidence: Any) -> Judge:
        """Return the judge of the stack for an x returned in this dtype; with L it bounds no null-space part."""
        judge = Judge(self.stack, tolerances, self.identity_damp, dtype, **evidence)
        return judge if self.L is None else replace(judge, null_space=NullSpaceBound())

    def solution(self, judge: Judge, d: Tensor, y: Tensor, *, x_prior: Tensor | None = None, **how: Any) -> Solution:
        """The certified ``x = x_prior + d``, whose residual is that of A; ``how`` is as for :meth:`Judge.solution`."""
        prior = None if x_prior is None else x_prior.detach().to(self.A.dtype)
        solution = judge.solution(d, self.data(y, x_prior), prior=prior, **how)
        if self.L is None:
            return solution
        misfit = y.detach().to(self.A.dtype) - self.A.apply(solution.x.to(self.A.dtype))
        batch = solution.codes.shape
        norm = ItemSpace(self.A.out_shape, self.A.dtype, self.A.device).safe_norm(misfit)
        return replace(solution, residual_norm=norm.expand(batch), damp=self.damp.expand(batch))
