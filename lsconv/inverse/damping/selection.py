"""Selection: the damp that a rule has chosen, with the criterion at all damps that were evaluated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Selection"]

_LABELS = {
    "gcv": "generalised cross-validation",
    "discrepancy": "squared residual norm",
    "upre": "unbiased predictive risk",
    "lcurve": "curvature of the L-curve",
    "evidence": "-2 log marginal likelihood",
}


@dataclass(frozen=True, eq=False)
class Selection:
    """The damping that a rule has chosen, with the criterion at all damps that were evaluated.

    Attributes:
        rule: the rule.
        damp: the chosen damp, ``batch``.
        damps: the damps that were evaluated, ascending, ``(points, *batch)``.
        values: the criterion there: the function minimised ("gcv", "upre", "evidence"), the residual norm
            squared ("discrepancy"), or the curvature maximised ("lcurve"); ``(points, *batch)``.
        trace_error: standard error of the influence trace, 0 where it is exact and NaN where the rule needs none;
            ``(points, *batch)``.
        surrogate: ``(damps, values)`` of the surrogate that the search began with, or None.
        message: what was done, and which items met an end of the range.

    Example:
        >>> A = lsconv.Conv1d(torch.ones(1, 1, 3, dtype=torch.float64) / 3, in_size=50)
        >>> y = A(torch.linspace(0, 1, 50, dtype=torch.float64)[None]) + 0.01 * torch.randn(1, 48, dtype=torch.float64)
        >>> selection = lsconv.choose_damp(A, y, "gcv")
        >>> selection.rule, selection.damp.shape, selection.damps.shape == selection.values.shape
        ('gcv', torch.Size([]), True)
    """

    rule: str
    damp: Tensor
    damps: Tensor
    values: Tensor
    trace_error: Tensor
    surrogate: tuple[Tensor, Tensor] | None
    message: str

    def plot(self, ax: Any = None) -> Any:
        """Draw the curve of every batch item with the damp chosen, that of a surrogate thin; needs matplotlib.

        Where there is one item a legend names them.

        Args:
            ax: the axes to draw on; None: new ones.

        Returns:
            The axes.
        """
        if ax is None:
            from matplotlib.figure import Figure

            ax = Figure(figsize=(5, 3.5), layout="constrained").add_subplot()
        chosen = self.damp.reshape(-1).tolist()
        for (curve, value), damp in zip(_curves(self.damps, self.values), chosen, strict=True):
            (line,) = ax.plot(curve, value, marker=".", linewidth=1, label="exact")
            ax.axvline(damp, color=line.get_color(), linestyle="--", linewidth=1, label=f"chosen: {damp:.3g}")
        if self.surrogate is not None:
            for curve, value in _curves(*self.surrogate):
                ax.plot(curve, value, color="0.6", linewidth=0.8, zorder=1, label="surrogate")
        ax.set_xscale("log")
        if self.rule in ("gcv", "discrepancy", "upre") and bool((self.values > 0).all()):
            ax.set_yscale("log")
        ax.set_xlabel("damp")
        ax.set_ylabel(_LABELS[self.rule])
        if len(chosen) == 1:
            ax.legend(fontsize="small")
        return ax


def _curves(damps: Tensor, values: Tensor) -> list[tuple[list[float], list[float]]]:
    """Split ``(points, *batch)`` both into the points of every item."""
    points = damps.shape[0]
    columns = (t.reshape(points, -1).T.tolist() for t in (damps, values))
    return list(zip(*columns, strict=True))
