"""SolveRecord: one solve as the derivative rules see it, with its operators, damping, answer and backward solves."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from lsconv.errors import ConvergenceWarning, MethodError
from lsconv.krylov.gradients.backward_solves import Inverse, report_failure
from lsconv.krylov.gradients.parameters import any_requires_grad, no_autocast, parameters_of, rebuild
from lsconv.krylov.loop.batched_scalars import ItemSpace, binary_unit, scalar_dtype
from lsconv.krylov.loop.certificate import Tolerances
from lsconv.krylov.loop.entry import with_item_of, without_item
from lsconv.krylov.loop.lagrange_multipliers import collect_multipliers
from lsconv.krylov.loop.problem import check_damp
from lsconv.krylov.loop.solution import Solution
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import broadcast_shapes, over_items

__all__ = ["LeastSquares", "SolveRecord", "Solver"]

# The fields that every solution has as tensors; the optional ones are no output of the autograd function.
_TENSORS = tuple(field.name for field in fields(Solution) if field.default is MISSING)


@dataclass(frozen=True)
class LeastSquares:
    """The problem ``min ||A x - y||^2 + damp^2 ||L (x - x_prior)||^2``, L the identity and x_prior zero where None."""

    A: LinearOperator
    y: Tensor
    damp: Any = 0.0
    L: LinearOperator | None = None
    x_prior: Tensor | None = None


class Solver(Protocol):
    """The solver of a problem, with the options of one call."""

    def answer(self, problem: LeastSquares) -> tuple[Any, Inverse]:
        """The answer, a :class:`Solution` or a bare tensor, and the solves for the backward pass.

        It is called with grad mode off, on operators and tensors that autograd does not follow.
        """


class SolveRecord:
    """The record of one solve, which the derivative rules share; its tensors are detached from autograd.

    Attributes:
        A, L: the operators.
        A_param_count: the number of parameters of A; those of L come after them.
        square: A is square and regular.
        inverse: the solves of the backward pass, after :meth:`solve`.
        has_multipliers: the forward solve has found the multipliers too.
        damp: the damping, after :meth:`set_damping`.
        some_damped, all_damped: some, or all, items have one.
    """

    def __init__(self, solver: Solver | None, problem: LeastSquares, square: bool, rtol: float | None) -> None:
        self.solver, self.A, self.L, self.square, self.rtol = solver, problem.A, problem.L, square, rtol
        self.damp_given = problem.damp
        A_params = parameters_of(self.A)
        self.A_param_count, self._A_requires_grad = len(A_params), any_requires_grad(*A_params)
        self.inverse: Inverse | None = None
        self.solution: Solution | None = None
        self.has_multipliers = False

    def operators(self, params: Sequence[Tensor]) -> tuple[LinearOperator, LinearOperator | None]:
        """Return A and L with these tensors for parameters."""
        A = rebuild(self.A, params[: self.A_param_count])
        return A, None if self.L is None else rebuild(self.L, params[self.A_param_count :])

    def solve(self, y: Tensor, damp: Tensor | None, x_prior: Tensor | None, params: Sequence[Tensor]) -> Any:
        """Solve, keep the inverse and the damping, and return the tensors of the solution and any multipliers."""
        assert self.solver is not None
        A, L = self.operators([p.detach() for p in params])
        prior = None if x_prior is None else x_prior.detach()
        given = self.damp_given if damp is None else damp.detach()
        with torch.no_grad(), no_autocast(A), collect_multipliers(self._A_requires_grad and prior is None) as collected:
            problem = LeastSquares(A, y.detach(), given, L, prior)
            if y.numel() == 0:  # torch.func.vmap over nothing
                answer, self.inverse = _answer_empty_batch(self.solver, problem)
            else:
                answer, self.inverse = self.solver.answer(problem)
        chosen = isinstance(answer, Solution) and damp is None and bool((answer.damp != given).any())
        self.set_damping(answer.damp if chosen else given)
        z = collected.of(answer if isinstance(answer, Tensor) else answer.x)
        self.has_multipliers = z is not None
        more = () if z is None else (z,)
        if isinstance(answer, Tensor):
            return _own_memory(answer), *more
        # stored without tensors, because autograd's outputs refer to this object, and a cycle would keep both alive
        self.solution = replace(answer, **dict.fromkeys(_TENSORS))
        tensors = [getattr(answer, name) for name in _TENSORS]
        return _own_memory(tensors[0]), *tensors[1:], *more

    def set_damping(self, damp: Any) -> None:
        """Store the damping, and whether all or some items are damped."""
        self.damp = check_damp(damp, self.A)
        self.some_damped = not self.square and bool((self.damp > 0).any())
        self.all_damped = not self.square and bool((self.damp > 0).all())

    def result(self, outputs: tuple[Tensor, ...]) -> Any:
        """Return the outputs of :class:`Solve` as a :class:`Solution`, or the tensor that the solver answered with."""
        if self.solution is None:
            return outputs[0]
        found: dict[str, Any] = dict(zip(_TENSORS, outputs[: len(_TENSORS)], strict=True))
        return replace(self.solution, **found)

    def mask_items(self, g: Tensor, damped: bool, item_ndim: int | None = None) -> Tensor:
        """Return ``g`` with zeros for the items without damping (``damped``), or for those with one."""
        if self.all_damped == damped and (self.all_damped or not self.some_damped):
            return g
        mask = (self.damp > 0) == damped
        return torch.where(over_items(mask, len(self.A.in_shape) if item_ndim is None else item_ndim), g, 0)

    def scaled_solve(self, name: str, g: Tensor, item_ndim: int, result_ndim: int) -> Tensor | None:
        """Return ``inverse.name(g)``, by a solve for a scaled g; NaN stays in its item.

        Scaling keeps the digits of a cotangent of 1e-30.

        Args:
            name: of a method of :class:`Inverse`.
            g: the right-hand side.
            item_ndim: dimensions of an item of g.
            result_ndim: those of an item of the result.
        """
        if g.numel() == 0:
            batch = broadcast_shapes(g.shape[: g.ndim - item_ndim], self.A.batch_shape, self.damp.shape)
            return g.new_zeros(*batch, *(self.A.out_shape if name == "adjoint" else self.A.in_shape))
        with torch.no_grad(), no_autocast(self.A):
            g = g.detach()
            flat = g.flatten(g.ndim - item_ndim) if item_ndim else g.unsqueeze(-1)
            finite = torch.isfinite(flat).all(-1)
            size = torch.where(finite, flat.abs().amax(-1), 0).to(scalar_dtype(g.device))
            unit = binary_unit(size).to(g.real.dtype)
            scaled = torch.where(over_items(finite, item_ndim), g / over_items(unit, item_ndim), 0)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                answer: Tensor | None = getattr(self.inverse, name)(scaled, rtol=self.rtol)
            if answer is None:
                return None
            if bool((size == 0).all()):
                answer = torch.zeros_like(answer)
            answer = answer * over_items(unit, result_ndim)
            answer = torch.where(over_items(finite, result_ndim), answer, torch.nan)
        for warning in caught:
            if not issubclass(warning.category, ConvergenceWarning):
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
            else:
                report_failure(warning.message)
        return answer

    def check_unweighted(self) -> None:
        """Refuse a preconditioner that chooses among several answers, which Golub and Pereyra's rule does not know.

        Raises:
            MethodError: M with more rows than columns, or N with fewer.
        """
        A, inverse = self.A, self.inverse
        for name, more, fewer in (("M", A.out_numel, A.in_numel), ("N", A.in_numel, A.out_numel)):
            if more > fewer and getattr(inverse, name, None) is not None:
                raise MethodError(
                    f"{name}: without damping it chooses the answer, where A is {A.in_shape} -> {A.out_shape}, and "
                    f"there is no gradient by what A is made of (by the data there is); use damp > 0, or drop {name}"
                )

    def negligible(self, part: Tensor, total: Tensor, item_ndim: int) -> bool:
        """Tell whether ``part`` is within the tolerance of zero beside ``total``, in every item."""
        # a safe norm, because the squares of a cotangent of 1e-30 underflow in float32
        size, scale = (
            ItemSpace(t.shape[t.ndim - item_ndim :], t.dtype, t.device).safe_norm(t.detach()) for t in (part, total)
        )
        rtol = max(Tolerances.of(self.A.dtype, None, 0.0).rtol, self.rtol or 0.0)
        return bool((size <= 10 * rtol * scale).all())


def _own_memory(x: Tensor) -> Tensor:
    """Copy x if it is a view, because a tangent of a view has to have the layout of its base."""
    return x if x._base is None else x.clone()


def _answer_empty_batch(solver: Solver, problem: LeastSquares) -> tuple[Any, Inverse]:
    """The answer for a batch without items, in the shapes and dtypes of a solve for one item of zeros."""
    A = problem.A
    data: list[tuple[Any, int]] = [(problem.y, len(A.out_shape)), (problem.damp, 0), (problem.x_prior, len(A.in_shape))]
    batches = [t.shape[: t.ndim - ndim] for t, ndim in data if isinstance(t, Tensor)]
    y, damp, x_prior = (with_item_of(t, t.ndim - ndim) if isinstance(t, Tensor) else t for t, ndim in data)
    answer, inverse = solver.answer(LeastSquares(A, y, damp, problem.L, x_prior))
    return without_item(answer, broadcast_shapes(A.batch_shape, *batches)), inverse
