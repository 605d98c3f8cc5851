"""Plan: the interface of every method's setup, for one operator and damping."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lsconv.krylov.loop.certificate import Tolerances
from lsconv.krylov.loop.solution import Solution
from lsconv.operators.base import LinearOperator
from lsconv.operators.dtypes import direct_rtol

__all__ = ["FALLBACK_AFTER", "PenalisedPlan", "Plan"]

# The iterations after which a fallback solves for an item, and the limit of LSMR as the fallback.
FALLBACK_AFTER = 500


class Plan:
    r"""The setup of one method for :math:`\min_x \|Ax - y\|^2 + \mathrm{damp}^2\|x\|^2`, kept for many y.

    The choice among plans, :mod:`lsconv.inverse.route`, reads the attributes.

    Attributes:
        A: the operator.
        reason: why "auto" takes this plan, a sentence.
        options: the options of :meth:`solve` beyond rtol, atol and max_iter.
        iterates: its iterations apply A, and max_iter limits them; plans for products and adjoints of A then do not
            use it.
        never_misses: no iteration that could fail; every answer has the accuracy of the factors.
        gives_way_to_border: the border solves for the items that this plan leaves unconverged, and for all once it is
            :attr:`exhausted`.
        falls_back_on_lsmr: LSMR solves for the items of a large A that this plan leaves unconverged; False: nothing.
        fallback_after: the most iterations on an item before the fallback solves for it; None: no limit.
        exhausted: the solves so far have cost as much as the setup of the fallback, which solves from now on.
        solved: the number of right-hand sides so far, where the plan counts them.
        rtol: the relative tolerance of a solve that is given none; None: :meth:`default_rtol` of the dtype.
        x_in_range_of_adjoint: x is computed as ``A^H z``, so that only rounding leads out of the range of
            ``A^H``; asked only of plans that do not iterate.
    """

    A: LinearOperator
    reason: ClassVar[str] = ""
    options: frozenset[str] = frozenset()
    iterates: ClassVar[bool] = False
    never_misses: ClassVar[bool] = False
    gives_way_to_border: ClassVar[bool] = False
    falls_back_on_lsmr: ClassVar[bool] = False
    fallback_after: int | None = None
    exhausted: bool = False
    solved: int = 0
    rtol: float | None = None
    x_in_range_of_adjoint: bool = True

    def solve(
        self, y: Tensor, *, rtol: float | None = None, atol: float = 0.0, max_iter: int | None = None
    ) -> Solution:
        """Solve for ``y``, and certify the answer.

        Args:
            y: the data, ``(*batch, *out_shape)``.
            rtol: relative tolerance; None: :attr:`rtol` of the plan.
            atol: absolute tolerance on the residual norm, in the units of y.
            max_iter: iteration limit per item; None: the default of the method.
        """
        raise NotImplementedError

    def apply(self, y: Tensor, *, rtol: float | None = None) -> Tensor:
        """The solution ``(*batch, *in_shape)`` for ``y``, ``(*batch, *out_shape)``, without a certificate."""
        raise NotImplementedError

    def adjoint(self, v: Tensor, *, rtol: float | None = None) -> Tensor:
        """The adjoint of :meth:`apply`, on v, ``(*batch, *in_shape)``."""
        raise NotImplementedError

    def normal_solve(self, g: Tensor, *, rtol: float | None = None) -> Tensor:
        """``(A^H A + damp^2)^{-1} g`` for ``g`` of shape ``(*batch, *in_shape)``, where ``damp > 0``."""
        raise NotImplementedError

    def gram_solve(self, g: Tensor, *, rtol: float | None = None) -> Tensor | None:
        """``(A^H A)^{-1} g`` for A of full column rank; None where it would cost more than :meth:`adjoint`."""
        return None

    def gives_way(self, y: Tensor) -> bool:
        """Tell whether the fallback should solve for ``y``, ``(*batch, *out_shape)``, instead of this plan."""
        return self.exhausted

    def residual(self, y: Tensor, *, rtol: float | None = None) -> Tensor:
        """``y - A x``, ``(*batch, *out_shape)``, with x the solution for ``y``."""
        return y - self.A.apply(self.apply(y, rtol=rtol))

    def attempt_apply(self, y: Tensor) -> tuple[Tensor, Tensor] | None:
        """Compute :meth:`apply` of ``y``, and mark the items that missed the tolerance.

        None where only :meth:`solve` finds out which items missed it.
        """
        if not self.never_misses:
            return None
        return self.apply(y), torch.zeros((), dtype=torch.bool, device=y.device)

    def attempt_adjoint(self, v: Tensor) -> tuple[Tensor, Tensor] | None:
        """Compute :meth:`adjoint` of ``v``, and mark the items that missed the tolerance; None where unknown."""
        if not self.never_misses:
            return None
        return self.adjoint(v), torch.zeros((), dtype=torch.bool, device=v.device)

    def with_damp(self, damp: Tensor | float) -> Plan | None:
        """The plan for another damping that shares the factors of this one; None where these depend on the damping."""
        return None

    @staticmethod
    def default_rtol(dtype: torch.dtype) -> float:
        """The relative tolerance where neither the solve nor the plan has one."""
        return direct_rtol(dtype)

    def tolerances(self, rtol: float | None, atol: float = 0.0) -> Tolerances:
        """The tolerances of a solve."""
        dtype, rtol = self.A.dtype, self.rtol if rtol is None else rtol
        return Tolerances.of(dtype, self.default_rtol(dtype) if rtol is None else rtol, atol)

    @property
    def innermost(self) -> Plan:
        """The plan that does the work: this one, or that of a smaller problem to which this one reduces its data.

        The choice among plans reads its :attr:`iterates`, :attr:`falls_back_on_lsmr` and :attr:`fallback_after`.
        """
        return self

    def reasons(self) -> list[str]:
        """The reasons for which "auto" takes this plan, and those inside it, a sentence each."""
        return [self.reason]


class PenalisedPlan(Plan):
    r"""The setup of one method for :math:`\min_x \|Ax - y\|^2 + \mathrm{damp}^2\|L(x - x_{prior})\|^2`."""

    def solve(
        self,
        y: Tensor,
        *,
        x_prior: Tensor | None = None,
        rtol: float | None = None,
        atol: float = 0.0,
        max_iter: int | None = None,
    ) -> Solution:
        """Solve for ``y``, and certify the answer.

        Args:
            x_prior: what the penalty pulls to, ``(*batch, *in_shape)``; None: zero.
            y, rtol, atol, max_iter: as for :meth:`Plan.solve`.
        """
        raise NotImplementedError

    def normal_solve(self, g: Tensor, *, rtol: float | None = None) -> Tensor:
        """``(A^H A + damp^2 L^H L)^{-1} g`` for ``g`` of shape ``(*batch, *in_shape)``, where ``damp > 0``."""
        raise NotImplementedError
