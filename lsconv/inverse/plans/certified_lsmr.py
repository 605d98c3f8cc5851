"""LSMR with the tolerance and the certificate of the direct methods, in double precision where rounding needs it."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lsconv.factored.direct_plan import in_double
from lsconv.fourier.circulant_preconditioner import CirculantPreconditioner
from lsconv.inverse.plans.krylov_plan import KrylovPlan
from lsconv.krylov.loop.batch_groups import in_groups
from lsconv.krylov.loop.batched_scalars import ItemSpace, divide
from lsconv.krylov.loop.certificate import (
    LENGTH_LIMIT,
    TALL_NULL_SHARE,
    NormBounds,
    NullSpaceBound,
    RankThreshold,
    Tolerances,
)
from lsconv.krylov.loop.judge import Judge
from lsconv.krylov.loop.solution import Solution, Status
from lsconv.krylov.lsmr import lsmr
from lsconv.operators.base import LinearOperator
from lsconv.operators.dtypes import direct_rtol

__all__ = ["CertifiedLsmrPlan"]


class CertifiedLsmrPlan(KrylovPlan):
    r"""LSMR with the tolerance and the certificate of the direct methods.

    Rounding adds to x a part in the null space of A, of length at most ``eps (||A|| / damp)^2 ||x||``, eps the unit
    roundoff. Where that may exceed what the certificate allows, LSMR runs in double precision.

    Args:
        A: the operator.
        damp: the damping, a number or one per batch item.
        preconditioned: precondition by the inverse of the circulant, in double precision throughout.
    """

    reason = "LSMR, judged as the direct methods are"
    options = frozenset()

    def __init__(self, A: LinearOperator, damp: Tensor | float, *, preconditioned: bool = False) -> None:
        precise = in_double(A)
        M = CirculantPreconditioner(precise, damp) if preconditioned else None
        sides = (M, None) if M is None or M.side == "residual" else (None, M)
        super().__init__(precise if preconditioned else A, damp, "lsmr", sides)
        self.precise, self.dtype, self._in_single = precise, A.dtype, self.A.dtype != precise.dtype
        self.rtol = direct_rtol(A.dtype)

    def solve(  # type: ignore[override]  # nothing else to choose
        self, y: Tensor, *, rtol: float | None = None, atol: float = 0.0, max_iter: int | None = None
    ) -> Solution:
        """The solution for ``y``, ``(*batch, *out_shape)``, with tolerance and certificate of the direct methods."""
        self.last_iterations = 0
        answer = functools.partial(self._answer, tolerances=self.tolerances(rtol, atol), max_iter=max_iter)
        return answer(y, self.damp) if self.M or self.N else in_groups(self.A, y, self.damp, answer)

    def _limits(self, max_iter: int | None, tolerances: Tolerances) -> dict[str, Any]:
        """The options of :func:`lsmr` that stop it before it has converged."""
        return {"max_iter": max_iter}

    def _answer(self, y: Tensor, damp: Tensor | float, *, tolerances: Tolerances, max_iter: int | None) -> Solution:
        """Solve by LSMR and certify with A in double precision."""
        precise = self.precise
        found, A, norm = self._run_lsmr(y, damp, tolerances, max_iter)
        ended = torch.where(found.codes == Status.CALLBACK.code, Status.ITERATION_LIMIT.code, found.codes)
        # with a preconditioner N on the side of x the iterates are not of the form A^H z, and no rounding bounds their
        # part in the null space of A
        rounding = torch.finfo(A.dtype).eps if self.N is None else None
        harmless, null_share = found.damp == 0, tolerances.null_share
        if rounding is None:
            null_share = null_share if A.in_numel > A.out_numel else TALL_NULL_SHARE
        elif norm is not None:
            harmless = _rounding_is_harmless(found.damp, norm, rounding, tolerances)
        judge = Judge(
            precise,
            tolerances,
            found.damp,
            self.dtype,
            rounding=Tolerances.of(A.dtype, tolerances.rtol, 0.0).rounding,
            norm=NormBounds(norm, sharper=None if norm is None or self.M or self.N else lambda: norm),
            rank=RankThreshold(length_limit=LENGTH_LIMIT),
            null_space=NullSpaceBound(torch.where(harmless, torch.inf, null_share), rounding),
        )
        judged = judge.solution(
            found.x.to(precise.dtype),
            y.to(precise.dtype),
            iterations=found.iterations,
            history=found.history,
            otherwise=torch.where(found.converged, Status.STAGNATION.code, ended),
        )
        # the certificate consists of norms, which do not show these three causes: there LSMR's status is returned
        status_of_lsmr = torch.zeros_like(found.converged)
        for status in (Status.RANK_DEFICIENT, Status.NON_FINITE, Status.ITERATION_LIMIT):
            status_of_lsmr = status_of_lsmr | (ended == status.code)
        return replace(
            judged,
            codes=torch.where(status_of_lsmr, ended, judged.codes),
            converged=judged.converged & ~status_of_lsmr,
        )

    def _run_lsmr(
        self, y: Tensor, damp: Tensor | float, tolerances: Tolerances, max_iter: int | None
    ) -> tuple[Solution, LinearOperator, Tensor | None]:
        """Run LSMR, in single precision where its rounding is harmless.

        Returns:
            The solution; the operator that was applied, A in single or double precision; the lower bound of ``||A||``
            per item that the iteration has found, None if none.
        """
        options = {**self._terms(self.M, self.N), "damp": damp, **self._limits(max_iter, tolerances)}
        # single precision may use a tenth of the null-space part that is allowed, because no certificate of an x in
        # single precision shows that part
        harmless = functools.partial(_rounding_is_harmless, damp, eps=0.1 * tolerances.eps, tolerances=tolerances)
        spent, in_single = 0, self._in_single and bool(harmless(self._norm_from_data(y)).all())
        while True:
            A = self.A if in_single else self.precise
            found = lsmr(A, y.to(A.dtype), rtol=tolerances.rtol, atol=tolerances.atol, **options)
            spent += int(found.iterations.max())
            norm = None if found.history is None else found.history.largest_norm
            if not in_single or norm is None or bool(harmless(norm).all()):
                self.last_iterations = max(self.last_iterations or 0, spent)
                return found, A, norm
            # the iteration has found a larger ||A|| than the data show, and is repeated in double precision
            self._in_single = in_single = False

    def _norm_from_data(self, y: Tensor) -> Tensor:
        """``||A^H y|| / ||y||``, a lower bound of ``||A||`` per item."""
        A = self.A
        y = y.to(A.dtype)
        inputs, outputs = (ItemSpace(shape, A.dtype, A.device) for shape in (A.in_shape, A.out_shape))
        return divide(inputs.safe_norm(A.adjoint(y)), outputs.safe_norm(y))

    def apply(self, y: Tensor, *, rtol: float | None = None) -> Tensor:
        """The solution for ``y``, ``(*batch, *out_shape)``, without a limit on the iterations."""
        return super().apply(y.to(self.A.dtype), rtol=rtol).to(self.dtype)

    def adjoint(self, v: Tensor, *, rtol: float | None = None) -> Tensor:
        """The adjoint of :meth:`apply`."""
        return super().adjoint(v.to(self.A.dtype), rtol=rtol).to(self.dtype)

    def normal_solve(self, g: Tensor, *, rtol: float | None = None) -> Tensor:
        """``(A^H A + damp^2)^{-1} g``, where ``damp > 0``; in double precision: it divides by damp^2."""
        precise = KrylovPlan(self.precise, self.damp, "lsmr", (self.M, self.N))
        rtol = self.rtol if rtol is None else rtol
        return precise.normal_solve(g.to(precise.A.dtype), rtol=rtol).to(g.dtype)

    def gram_solve(self, g: Tensor, *, rtol: float | None = None) -> Tensor | None:
        """``(A^H A)^{-1} g``."""
        v = super().gram_solve(g.to(self.A.dtype), rtol=rtol)
        return v if v is None else v.to(self.dtype)

    def tolerances(self, rtol: float | None, atol: float = 0.0) -> Tolerances:
        """The tolerances of a solve, those of the direct methods."""
        return Tolerances.of(self.dtype, self.rtol if rtol is None else rtol, atol)

    def __repr__(self) -> str:
        preconditioner = self.M if self.M is not None else self.N
        by = "" if preconditioner is None else f", preconditioner={type(preconditioner).__name__}"
        return f"{type(self).__name__}('lsmr'{by})"


def _rounding_is_harmless(damp: Tensor | float, norm: Tensor, eps: float, tolerances: Tolerances) -> Tensor:
    """Mark the items for which rounding adds less to the part of x in the null space of A than the certificate allows.

    Args:
        damp: the damping, a number or one per batch item.
        norm: ``||A||``, per item.
        eps: the unit roundoff of the arithmetic.
        tolerances: their ``null_share`` is the part in the null space that is allowed, relative to ``||x||``.
    """
    damping = torch.as_tensor(damp, dtype=torch.float64, device=norm.device)
    return (damping == 0) | (eps * norm.square() <= tolerances.null_share * damping.square())
