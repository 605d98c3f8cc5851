"""Gradients of every answer by implicit differentiation: one more solve of the same kind, no graph through iterations.

:func:`attach` is the entry point, for a solve made of anything. The mathematics is in
:mod:`lsconv.krylov.gradients.damped_rule`, derivatives by what an operator is made of in
:mod:`lsconv.krylov.gradients.parameters`, the backward's solves in :mod:`lsconv.krylov.gradients.backward_solves`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lsconv.krylov.gradients.backward_solves import Inverse
from lsconv.krylov.gradients.damped_rule import NormalSolve, Solve
from lsconv.krylov.gradients.parameters import any_requires_grad, no_autocast, parameters_of
from lsconv.krylov.gradients.pseudo_inverse_rule import PseudoSolve
from lsconv.krylov.gradients.solve_record import LeastSquares, Solver, SolveRecord
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import over_items
from lsconv.operators.observed import observed
from lsconv.operators.transforms import hidden_by_vmap

__all__ = ["LeastSquares", "Solver", "adjoint_answer", "attach", "needs_gradient", "start_as_prior"]


def attach(solver: Solver, problem: LeastSquares, *, square: bool = False, rtol: float | None = None) -> Any:
    """Solve, and give the x of the answer its gradients.

    Args:
        solver: solves, and provides the solves of the backward pass.
        problem: the problem; y, damp, x_prior and the parameters of A and L receive gradients where they require them.
        square: A is square and regular, so that ``x = A^{-1} y``.
        rtol: relative tolerance of the forward solve, which the backward solves use too.
    """
    params = (*parameters_of(problem.A), *(() if problem.L is None else parameters_of(problem.L)))
    damp = problem.damp if isinstance(problem.damp, Tensor) else None
    if not any_requires_grad(problem.y, damp, problem.x_prior, *params):
        with torch.no_grad(), no_autocast(problem.A):
            return solver.answer(problem)[0]
    # The rules multiply with y, and unmeasured data may be NaN.
    problem = replace(problem, y=observed(problem.A, problem.y))
    record = SolveRecord(solver, problem, square, rtol)
    outputs = Solve.apply(record, problem.y, damp, problem.x_prior, *params)
    return record.result(outputs)


def adjoint_answer(inverse: Inverse, A: LinearOperator, v: Tensor, damp: Any) -> Tensor:
    """``A (A^H A + damp^2)^+ v``, the adjoint of ``inverse.apply``, with its gradients."""
    record = SolveRecord(None, LeastSquares(A, v, damp), False, None)
    record.inverse = inverse
    record.set_damping(damp)
    given, params = damp if isinstance(damp, Tensor) else None, parameters_of(A)
    answer: Any = 0
    if record.some_damped:
        answer = A.apply(NormalSolve.apply(record, record.mask_items(v, True), given, *params))
    if not record.all_damped:
        answer = answer + PseudoSolve.apply(record, True, None, record.mask_items(v, False), *params)
    return answer


def start_as_prior(A: LinearOperator, damp: Any, x0: Any) -> Tensor | None:
    """The prior that a start is: x0 for the items without damping, zero for the others.

    Without damping the answer is ``x0 + A^+ (y - A x0)``, so that it has a gradient by x0; with damping it does not
    depend on x0.

    Returns:
        ``x_prior`` for :func:`attach`; None where there is no such item.
    """
    if not isinstance(x0, Tensor):
        return None
    if not isinstance(damp, Tensor):
        return x0 if damp == 0 else None
    undamped = damp.detach() == 0
    if not (hidden_by_vmap(undamped) or bool(undamped.any())):
        return None
    return torch.where(over_items(undamped, len(A.in_shape)), x0, 0)


def needs_gradient(A: LinearOperator, *values: Any) -> bool:
    """Tell whether autograd, or a torch.func transform, follows any of the tensors given or those that A is made of."""
    return any_requires_grad(*(value for value in values if isinstance(value, Tensor)), *parameters_of(A))
