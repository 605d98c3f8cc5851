"""The plan of a convolution that is another one: smaller, or with an axis in its batch or its channels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lsconv.errors import unreported
from lsconv.factored.axis_channels import AxisAsChannels
from lsconv.factored.batch_axes import Reduction
from lsconv.factored.direct_plan import in_double
from lsconv.krylov.loop.batched_scalars import scalar_dtype
from lsconv.krylov.loop.certificate import Tolerances
from lsconv.krylov.loop.judge import Judge
from lsconv.krylov.loop.solution import Solution, Status, join_parts
from lsconv.krylov.plan import Plan
from lsconv.operators.batch_layout import over_items

__all__ = ["ReducedPlan"]


class ReducedPlan(Plan):
    """The plan of the convolution B in ``A = Q B P^H``, serving A.

    Args:
        reduction: what B, P and Q are; they only change shapes where an axis becomes channels.
        plan: the plan for B.
        damp: the damping of A, a number or one per batch item.
    """

    def __init__(self, reduction: Reduction | AxisAsChannels, plan: Plan, damp: Tensor | float) -> None:
        self.reduction, self.plan, self.A = reduction, plan, reduction.A
        self.damp = torch.as_tensor(damp, dtype=scalar_dtype(self.A.device), device=self.A.device)

    def with_damp(self, damp: Tensor | float) -> ReducedPlan | None:
        """The plan for another damping, with the factors of this one; None where B's plan has none to share."""
        plan = self.plan.with_damp(self.reduction.reshape_damp(damp))
        return None if plan is None else ReducedPlan(self.reduction, plan, damp)

    @torch.no_grad()
    def solve(
        self, y: Tensor, *, rtol: float | None = None, atol: float = 0.0, max_iter: int | None = None
    ) -> Solution:
        """The certified solution for ``y``, ``(*batch, *out_shape)``.

        Where axes of the image are batch axes of B, an item has converged if each of its slices has.
        """
        reduction = self.reduction
        with unreported():
            parts = self.plan.solve(reduction.restrict_outputs(y), rtol=rtol, atol=atol, max_iter=max_iter)
        solution = replace(parts, x=reduction.extend_inputs(parts.x))
        if reduction.folded:
            count = len(reduction.folded)
            flat: dict[str, Any] = {
                name: value.flatten(-count).movedim(-1, 0)
                for name, value in vars(parts).items()
                if isinstance(value, Tensor) and name not in ("x", "excused")
            }
            rank = flat.pop("rank", None)
            solution = replace(join_parts(replace(solution, **flat)), rank=None if rank is None else rank.sum(0))
        return self._with_dropped(solution, y, rtol, atol) if reduction.drops_outputs else solution

    def _with_dropped(self, solution: Solution, y: Tensor, rtol: float | None, atol: float) -> Solution:
        """The solution with the norms of A's own residual, which includes the outputs that read nothing."""
        precise = in_double(self.A)
        certificate = Judge(precise, self.tolerances(rtol, atol), solution.damp).certify(
            solution.x.to(precise.dtype), y.to(precise.dtype)
        )
        # the outputs that read nothing may be most of y
        unexplained = (solution.codes == Status.RESIDUAL.code) & ~certificate.residual_ok
        return replace(
            solution,
            codes=torch.where(unexplained, Status.GRADIENT.code, solution.codes),
            residual_norm=certificate.residual_norm,
            gradient_norm=certificate.gradient_norm,
        )

    @torch.no_grad()
    def apply(self, y: Tensor, *, rtol: float | None = None) -> Tensor:
        """The solution for ``y``, without a certificate."""
        return self.reduction.extend_inputs(self.plan.apply(self.reduction.restrict_outputs(y), rtol=rtol))

    @torch.no_grad()
    def adjoint(self, v: Tensor, *, rtol: float | None = None) -> Tensor:
        """The adjoint of :meth:`apply`."""
        return self.reduction.extend_outputs(self.plan.adjoint(self.reduction.restrict_inputs(v), rtol=rtol))

    @torch.no_grad()
    def normal_solve(self, g: Tensor, *, rtol: float | None = None) -> Tensor:
        """``(A^H A + damp^2)^{-1} g``, where ``damp > 0``."""
        reduction = self.reduction
        inner = reduction.restrict_inputs(g)
        x = reduction.extend_inputs(self.plan.normal_solve(inner, rtol=rtol))
        if reduction.reads_all:
            return x
        mu = over_items(self.damp.square().to(g.real.dtype), len(self.A.in_shape))
        unread = g - reduction.extend_inputs(inner)
        return x + torch.where(mu > 0, unread / torch.where(mu > 0, mu, 1), 0)

    @torch.no_grad()
    def gram_solve(self, g: Tensor, *, rtol: float | None = None) -> Tensor | None:
        """``(A^H A)^{-1} g`` where the plan for B has it, else None."""
        x = self.plan.gram_solve(self.reduction.restrict_inputs(g), rtol=rtol)
        return None if x is None else self.reduction.extend_inputs(x)

    def attempt_apply(self, y: Tensor) -> tuple[Tensor, Tensor] | None:
        """Compute :meth:`apply` of ``y``, where the plan for B misses no item; else None."""
        found = self.plan.attempt_apply(self.reduction.restrict_outputs(y))
        if found is None or bool(found[1].any()):
            return None
        return self.reduction.extend_inputs(found[0]), found[1].new_zeros(())

    def attempt_adjoint(self, v: Tensor) -> tuple[Tensor, Tensor] | None:
        """Compute :meth:`adjoint` of ``v``, where the plan for B misses no item; else None."""
        found = self.plan.attempt_adjoint(self.reduction.restrict_inputs(v))
        if found is None or bool(found[1].any()):
            return None
        return self.reduction.extend_outputs(found[0]), found[1].new_zeros(())

    def tolerances(self, rtol: float | None, atol: float = 0.0) -> Tolerances:
        """The tolerances of a solve, those of the plan for B."""
        return self.plan.tolerances(rtol, atol)

    @property
    def innermost(self) -> Plan:
        """The plan that solves for B, or what that one reduces to."""
        return self.plan.innermost

    def reasons(self) -> list[str]:
        """The reasons of this plan, and of the one inside it."""
        return [self.reduction.reason, *self.plan.reasons()]

    def __repr__(self) -> str:
        return f"ReducedPlan({self.A.in_shape} -> {self.A.out_shape}, {self.plan!r})"
