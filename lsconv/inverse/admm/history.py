"""The record of an ADMM run: its history, its result, and the certified solution made from it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lsconv.krylov.loop.solution import Solution, Status
from lsconv.operators.batch_layout import select

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ConvexCertificate", "SplittingHistory", "SplittingResult", "concatenate", "to_solution"]


class ConvexCertificate(Protocol):
    """The interface of a certificate of x, which :class:`Optimality` and that of plug-and-play have."""

    @property
    def stationarity(self) -> Tensor:
        """The residual of the conditions, relative to their terms."""
        ...

    @property
    def complementarity(self) -> Tensor:
        """The gaps, relative to the objective."""
        ...

    @property
    def objective(self) -> Tensor:
        """The objective at x."""
        ...

    @property
    def gradient_norm(self) -> Tensor:
        """The residual of the conditions, in the units of the gradient."""
        ...

    def met(self, rtol: float) -> Tensor:
        """Tell whether it meets the tolerance, per batch item."""
        ...


@dataclass(frozen=True, eq=False)
class SplittingHistory:
    """The history of an ADMM run, one row per certificate.

    Attributes:
        iterations: the iteration of every row.
        primal: ``||K_j x - z_j||`` relative to the larger of the two norms, of the worst term, ``(rows, *batch)``.
        dual: the norm of ``sum_j rho_j K_j^H (z_j - z_j,old)`` relative to the largest force ``||K_j^H p_j||``.
        stationarity: norm of the sum of all ``K_j^H p_j`` relative to the largest (of plug-and-play: the fixed-point
            residual).
        complementarity: the Fenchel-Young gaps relative to the objective (the certificate; of plug-and-play: 0).
        objective: the objective at x, ``(rows, *batch)``.
        rho: the penalty of the sparsifying term, ``(rows, *batch)``.
    """

    iterations: Tensor
    primal: Tensor
    dual: Tensor
    stationarity: Tensor
    complementarity: Tensor
    objective: Tensor
    rho: Tensor

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the relative residuals and the certificate against the iteration.

        Args:
            ax: matplotlib axes to draw into; new ones by default.
        """
        if ax is None:
            from matplotlib import pyplot

            ax = pyplot.subplots()[1]
        for label, style in (("primal", "-"), ("dual", "--"), ("stationarity", "-."), ("complementarity", ":")):
            values = getattr(self, label)
            for item, curve in enumerate(values.reshape(values.shape[0], -1).cpu().T):
                text = label if values[0].numel() == 1 else f"{label} [{item}]"
                ax.plot(self.iterations.cpu().numpy(), curve.numpy(), style, label=text)
        ax.set_yscale("log")
        ax.set_xlabel("iteration")
        ax.set_ylabel("relative residual")
        if self.primal[0].numel() <= 8:
            ax.legend()
        return ax


@dataclass(frozen=True, eq=False)
class SplittingResult:
    """The result of :func:`admm`: x, the dual variables, and the record of the iteration."""

    x: Tensor
    duals: list[Tensor]
    iterations: Tensor
    met: Tensor
    stopped: bool
    history: SplittingHistory


def concatenate(first: SplittingResult, second: SplittingResult, done: int) -> SplittingResult:
    """Join the results of two runs on the same terms; items that the first run solved keep its answer.

    Args:
        first: the result after ``done`` iterations.
        second: the result of a run from there; it may have only the first of the dual variables.
        done: iterations of the first run.
    """
    rows = {
        field.name: torch.cat([getattr(first.history, field.name), getattr(second.history, field.name)])
        for field in fields(SplittingHistory)
        if field.name != "iterations"
    }
    return SplittingResult(
        select(first.met, first.x, second.x),
        [select(first.met, before, after) for before, after in zip(first.duals, second.duals, strict=False)],
        first.iterations + torch.where(first.met, 0, second.iterations),
        first.met | second.met,
        second.stopped,
        SplittingHistory(torch.cat([first.history.iterations, done + second.history.iterations]), **rows),
    )


def to_solution(
    result: SplittingResult, certificate: ConvexCertificate, residual: Tensor, rtol: float, damp: Tensor
) -> Solution:
    """Make a :class:`Solution` of the result of ADMM; it has converged where the recomputed certificate is met.

    Args:
        result: the end of :func:`admm`.
        certificate: the certificate of ``result.x``, recomputed.
        residual: norm of ``y - A x``, per batch item.
        rtol: the tolerance.
        damp: the strength of the prior.
    """
    finite = torch.isfinite(residual)
    met = certificate.met(rtol) & finite
    failed = Status.CALLBACK.code if result.stopped else Status.ITERATION_LIMIT.code
    codes = torch.where(met, Status.OPTIMALITY.code, failed)
    return Solution(
        x=result.x,
        codes=torch.where(finite, codes, Status.NON_FINITE.code),
        converged=met,
        iterations=result.iterations,
        residual_norm=residual,
        gradient_norm=certificate.gradient_norm,
        damp=damp,
        history=result.history,  # type: ignore[arg-type]
    )
