"""The end of an ADMM run: its history, its result, and the certified solution that is made of it."""

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
    """The certificate of an x."""

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
    """The history of ADMM, a row for every look at it.

    Attributes:
        iterations: the iteration of every row.
        primal: ``||K_j x - z_j||`` relative to the larger of the two norms, of the worst term, ``(rows, *batch)``.
        dual: the norm of ``sum_j rho_j K_j^H (z_j - z_j,old)`` relative to the largest force ``||K_j^H p_j||``.
        stationarity: what the forces leave, relative to the largest (the certificate; of plug-and-play: the fixed-point
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
    """The end of :func:`admm`: x, the dual variables, and how it went."""

    x: Tensor
    duals: list[Tensor]
    iterations: Tensor
    met: Tensor
    stopped: bool
    history: SplittingHistory


def concatenate(first: SplittingResult, second: SplittingResult, done: int) -> SplittingResult:
    """One result of two runs on the same terms: items that the first one has solved keep its answer.

    Args:
        first: after ``done`` iterations.
        second: that of a run from there; it may have fewer dual variables, the first ones.
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
    result: SplittingResult, verdict: ConvexCertificate, residual: Tensor, rtol: float, damp: Tensor
) -> Solution:
    """The solution that ADMM ended with; what is reported of it is recomputed, and the verdict alone decides.

    Args:
        result: the end of :func:`admm`.
        verdict: on ``result.x``.
        residual: norm of ``y - A x``, per batch item.
        rtol: the tolerance.
        damp: the strength of the prior.
    """
    finite = torch.isfinite(residual)
    met = verdict.met(rtol) & finite
    failed = Status.CALLBACK.code if result.stopped else Status.ITERATION_LIMIT.code
    codes = torch.where(met, Status.OPTIMALITY.code, failed)
    return Solution(
        x=result.x,
        codes=torch.where(finite, codes, Status.NON_FINITE.code),
        converged=met,
        iterations=result.iterations,
        residual_norm=residual,
        gradient_norm=verdict.gradient_norm,
        damp=damp,
        history=result.history,  # type: ignore[arg-type]
    )
