"""Solution: what every solver returns, with the reason it stopped, the history, and a recomputed certificate."""

from __future__ import annotations

import enum
import functools
import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lsconv.errors import ConvergenceError, warn
from lsconv.operators.batch_layout import select

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["History", "Solution", "Status", "join_parts", "report"]


class Status(enum.Enum):
    """The reason for which the solve of one batch item ended; ``status.sentence`` says it in words.

    Example:
        >>> Status.ZERO.sentence
        'The right-hand side is zero, so x = 0 is the answer.'
    """

    RESIDUAL = (0, "The residual y - Ax meets the tolerance.")
    GRADIENT = (1, "The gradient of the least-squares problem meets the tolerance.")
    ZERO = (2, "The right-hand side is zero, so x = 0 is the answer.")
    CONDITION_LIMIT = (
        3,
        "The estimated condition number passed its limit; going on would follow rounding.",
    )
    ITERATION_LIMIT = (4, "The iteration limit was reached before the tolerance was met.")
    STAGNATION = (5, "Iterating no longer improves the recomputed residual or gradient: in this precision, or with "
                     "this preconditioner, the tolerance is out of reach.")  # fmt: skip
    NON_FINITE = (6, "The data contain NaN or infinity, or the iteration overflowed; x is NaN.")
    NEGATIVE_CURVATURE = (7, "A direction p with p^H A p <= 0 was met: the operator is not positive definite.")
    CALLBACK = (8, "The callback asked to stop.")
    RANK_DEFICIENT = (9, "Residual or gradient meet the tolerance, but A is rank-deficient to the method's precision, "
                         "so x is not certified to be the minimum-norm solution; damp > 0 has only one.")  # fmt: skip
    ROUNDED = (11, "The solution meets the tolerance in double precision; what is left is the rounding of x to its "
                   "dtype.")  # fmt: skip
    RANK_UNDECIDED = (12, "Singular values of A stand on the threshold rcond: rounding decides which of them count as "
                          "zero, and x depends on it; another rcond decides, or damp > 0.")  # fmt: skip
    OPTIMALITY = (
        10,
        "The recomputed optimality conditions (stationarity and complementarity) meet the tolerance.",
    )

    def __init__(self, code: int, sentence: str) -> None:
        self.code = code
        self.sentence = sentence

    @classmethod
    def from_code(cls, code: int) -> Status:
        """The member whose ``code`` is given."""
        return _BY_CODE[code]

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"Status.{self.name}"


_BY_CODE = {status.code: status for status in Status}


@dataclass(frozen=True, eq=False)
class History:
    """The method's own estimates, iteration by iteration (row 0 is the start), NaN after an item has stopped.

    Attributes:
        residual_norm: ``(iterations + 1, *batch)``, the (damped) residual norm.
        gradient_norm: ``(iterations + 1, *batch)``, the norm of the gradient.
        operator_norm: ``(iterations + 1, *batch)``, a lower bound of ``||A||``, growing.

    Example:
        >>> A = lsconv.Conv1d(torch.ones(1, 1, 3), in_size=12)
        >>> history = lsconv.lsmr(A, torch.ones(2, 1, 10), damp=0.1).history
        >>> history.residual_norm.shape == history.gradient_norm.shape, history.residual_norm.shape[1:]
        (True, torch.Size([2]))
    """

    residual_norm: Tensor
    gradient_norm: Tensor
    operator_norm: Tensor

    @property
    def largest_norm(self) -> Tensor | None:
        """The largest lower bound of ``||A||`` met, ``batch``; None where no item had to iterate."""
        return self.operator_norm.nan_to_num().amax(0) if len(self.operator_norm) else None

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw residual and gradient norms, relative to their start, against the iteration.

        Args:
            ax: matplotlib axes to draw into; new ones by default.

        Returns:
            The axes.

        Raises:
            ImportError: when matplotlib is not installed.
        """
        if ax is None:
            from matplotlib import pyplot

            ax = pyplot.subplots()[1]
        for label, values, style in (("residual", self.residual_norm, "-"), ("gradient", self.gradient_norm, "--")):
            curves = values.reshape(values.shape[0], -1).cpu()
            curves = curves / curves[:1].clamp_min(torch.finfo(curves.dtype).tiny)
            for item, curve in enumerate(curves.T):
                text = label if curves.shape[1] == 1 else f"{label} [{item}]"
                ax.plot(curve.numpy(), style, label=text)
        ax.set_yscale("log")
        ax.set_xlabel("iteration")
        ax.set_ylabel("norm relative to the start")
        if values[0].numel() <= 8:
            ax.legend()
        return ax


@dataclass(frozen=True, eq=False)
class Solution:
    r"""The answer to :math:`\min_x \|Ax - y\|^2 + \mathrm{damp}^2 \|x\|^2`, an entry per batch item in every field.

    Attributes:
        x: the solution, ``(*batch, *in_shape)``; of a tiled plan the array that it was written to.
        codes: ``status`` as integers, ``batch``.
        converged: True where the *recomputed* residual or gradient meets the tolerance, ``batch``.
        iterations: iterations done, ``batch``.
        residual_norm: recomputed :math:`\|y - Ax\|`, ``batch``.
        gradient_norm: recomputed :math:`\|A^H(y - Ax) - \mathrm{damp}^2 x\|`, ``batch``.
        damp: the damping used, ``batch``.
        history: the method's estimates per iteration, or None for a direct method.
        selection: how the damping was chosen, or None when it was given.
        rank: how many singular values of A exceed ``rcond ||A||``, ``batch``; None where the method decides no rank
            (the Krylov methods, the iteration on the border, and damping, which needs none).
        std: standard deviations of x, where they were asked for.
        excused: the items whose gradient misses the tolerance by no more than its rounding; None: not known.

    Example:
        >>> solution = lsconv.cgls(torch.eye(3), torch.tensor([1.0, 2.0, 3.0]))
        >>> solution.status, bool(solution.converged), solution.x
        (Status.RESIDUAL, True, tensor([1.0000, 2.0000, 3.0000]))
    """

    x: Tensor
    codes: Tensor
    converged: Tensor
    iterations: Tensor
    residual_norm: Tensor
    gradient_norm: Tensor
    damp: Tensor
    history: History | None = None
    selection: Any = None
    rank: Tensor | None = None
    excused: Tensor | None = None
    std: Any = None

    @functools.cached_property
    def all_converged(self) -> bool:
        """True where every item converged; the host waits for the device once."""
        return bool(self.converged.all())

    @property
    def nullity(self) -> Tensor | None:
        """The dimension of the null space of A at this rank, which x is orthogonal to, ``batch``; None as for rank."""
        return None if self.rank is None else math.prod(self.x.shape[self.codes.ndim :]) - self.rank

    def with_rank(self, rank: Tensor, undecided: Tensor) -> Solution:
        """Add the rank of A, and :attr:`Status.RANK_UNDECIDED` where that is undecided and damp is zero."""
        if bool((self.damp > 0).all()):
            return self
        answered = (self.codes != Status.ZERO.code) & (self.codes != Status.NON_FINITE.code)
        undecided = undecided & (self.damp == 0) & answered
        codes = torch.where(undecided, Status.RANK_UNDECIDED.code, self.codes)
        return replace(self, codes=codes, converged=self.converged & ~undecided, rank=rank.expand(codes.shape))

    def replaced(self, items: Tensor, other: Solution) -> Solution:
        """Take the other's answer for these items."""
        names = ("x", "codes", "converged", "iterations", "residual_norm", "gradient_norm")
        fields: dict[str, Any] = {name: select(items, getattr(other, name), getattr(self, name)) for name in names}
        if other.rank is not None:
            fields["rank"] = other.rank if self.rank is None else select(items, other.rank, self.rank)
        return replace(self, **fields)

    @property
    def status(self) -> Any:
        """A :class:`Status`, or nested lists of them shaped like the batch."""
        return _statuses(self.codes.tolist())

    def raise_for_status(self) -> Solution:
        """Return self when every item converged.

        Raises:
            ConvergenceError: names the items that did not, and why.
        """
        if not self.all_converged:
            raise ConvergenceError(self.failure_text())
        return self

    def failure_text(self) -> str:
        """One sentence per cause of not converging, with the batch items concerned."""
        failed: Counter[int] = Counter()
        places: dict[int, list[str]] = {}
        codes, converged = self.codes.reshape(-1).tolist(), self.converged.reshape(-1).tolist()
        for index, (code, good) in enumerate(zip(codes, converged, strict=True)):
            if not good:
                failed[code] += 1
                places.setdefault(code, []).append(_index_text(index, tuple(self.codes.shape)))
        parts = []
        for code, _ in failed.most_common():
            where = f" (batch item(s) {_shortened(places[code])})" if self.codes.ndim else ""
            parts.append(f"{Status.from_code(code).sentence}{where}")
        return " ".join(parts)

    def __str__(self) -> str:
        head = f"Solution: {tuple(self.x.shape)}, {self.x.dtype}, {getattr(self.x, 'device', type(self.x).__name__)}"
        names = ("item", "status", "converged", "iterations", "residual", "gradient", "damp")
        columns = (self.codes, self.converged, self.iterations, self.residual_norm, self.gradient_norm, self.damp)
        lists = [column.reshape(-1)[:8].tolist() for column in columns]
        rows = [names]
        for index, (code, good, count, residual, gradient, damp) in enumerate(zip(*lists, strict=True)):
            place = _index_text(index, tuple(self.codes.shape))
            rows.append((place, str(Status.from_code(code)), "yes" if good else "no", str(count),
                         f"{residual:.3e}", f"{gradient:.3e}", f"{damp:.3g}"))  # fmt: skip
        widths = [max(len(row[column]) for row in rows) for column in range(len(names))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        more = self.codes.numel() - 8
        tail = [f"... and {more} more items"] if more > 0 else []
        nullity = self.nullity
        if nullity is not None and bool((shortest := (nullity > 0) & (self.damp == 0) & self.converged).any()):
            most = int(torch.where(shortest, nullity, 0).max())
            tail.append(
                f"A has a null space of {most} dimension(s); without damping x is the shortest of the solutions"
            )
        return "\n".join([head, *lines, *tail])

    def __repr__(self) -> str:
        good, total = int(self.converged.sum()), self.converged.numel()
        return f"Solution({tuple(self.x.shape)}, {self.x.dtype}, converged {good} of {total})"


def _statuses(codes: Any) -> Any:
    return [_statuses(code) for code in codes] if isinstance(codes, list) else Status.from_code(codes)


def _index_text(index: int, batch: tuple[int, ...]) -> str:
    if len(batch) <= 1:
        return str(index) if batch else "-"
    place = []
    for size in reversed(batch):
        index, last = divmod(index, size)
        place.append(last)
    return str(tuple(reversed(place)))


def _shortened(places: list[str]) -> str:
    more = f" and {len(places) - 8} more" if len(places) > 8 else ""
    return ", ".join(places[:8]) + more


def join_parts(parts: Solution) -> Solution:
    """Join the certificates of problems that are parts of one, along the first dimension, to the solution of the whole.

    Args:
        parts: the solution of all parts, with the ``x`` of the whole.
    """
    worst = (~parts.converged).to(torch.int64).argmax(0, keepdim=True)
    return replace(
        parts,
        codes=parts.codes.gather(0, worst)[0],
        converged=parts.converged.all(0),
        iterations=parts.iterations.amax(0),
        residual_norm=torch.linalg.vector_norm(parts.residual_norm, dim=0),
        gradient_norm=torch.linalg.vector_norm(parts.gradient_norm, dim=0),
        damp=parts.damp[0],
        history=None,
        excused=None,
    )


def report(solution: Solution, name: object, *, raise_on_failure: bool = False) -> None:
    """Warn of the items that did not converge, or raise; a callback that stopped one is no failure.

    Args:
        solution: the solution.
        name: of the method or plan.
        raise_on_failure: raise.

    Raises:
        ConvergenceError: with ``raise_on_failure``.
    """
    if solution.all_converged:
        return
    failed = ~solution.converged & (solution.codes != Status.CALLBACK.code)
    if bool(failed.any()):
        text = f"{name}: {int(failed.sum())} of {failed.numel()} item(s) did not converge. {solution.failure_text()}"
        if raise_on_failure:
            raise ConvergenceError(text)
        warn(text)
