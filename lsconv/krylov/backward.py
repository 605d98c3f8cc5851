"""The solves of a backward pass: what a method must offer for it, and who hears when one did not converge."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lsconv.errors import ArgumentTypeError, ConvergenceWarning
from lsconv.krylov.batch import ItemSpace
from lsconv.krylov.problem import check_damp
from lsconv.krylov.solution import Solution
from lsconv.krylov.stopping import Tolerances
from lsconv.operators.base import LinearOperator

__all__ = ["Again", "Inverse", "normal_by_adjoint", "report_failure", "set_backward_failure_hook"]

Hook = Callable[[str], None]
_hook: Hook | None = None
_MOST_REFINEMENTS = 10


def set_backward_failure_hook(hook: Hook | None) -> Hook | None:
    """Say who hears of a backward solve that did not converge, and return who heard of it before.

    Args:
        hook: called with one sentence per failed solve; None: a :class:`ConvergenceWarning`, the default.

    Raises:
        ArgumentTypeError: ``hook`` cannot be called.

    Example:
        >>> heard = []
        >>> previous = lsconv.set_backward_failure_hook(heard.append)
        >>> lsconv.set_backward_failure_hook(previous) == heard.append
        True
    """
    global _hook
    if hook is not None and not callable(hook):
        raise ArgumentTypeError(f"hook: expected a function of one string or None, got {type(hook).__name__}")
    previous, _hook = _hook, hook
    return previous


def report_failure(message: object) -> None:
    """Tell the hook, or warn, that a backward solve did not converge."""
    if _hook is not None:
        _hook(f"backward solve: {message}")
    else:
        warnings.warn(f"backward solve: {message}", ConvergenceWarning, stacklevel=3)


class Inverse(Protocol):
    """What a backward pass needs of a solver; none of these is followed by autograd."""

    def apply(self, y: Tensor) -> Tensor:
        """The answer for ``y``."""

    def adjoint(self, v: Tensor) -> Tensor:
        """The adjoint of :meth:`apply`."""

    def normal_solve(self, g: Tensor) -> Tensor:
        """``(A^H A + damp^2 L^H L)^{-1} g``, for items with ``damp > 0``."""


@dataclass(frozen=True, eq=False)
class Again:
    """The backward solves of a Krylov method: by the same method, with the preconditioners' sides exchanged."""

    method: Callable[..., Solution]
    transposed: Callable[..., Solution]
    A: LinearOperator
    damp: Any
    options: dict[str, Any]

    def apply(self, y: Tensor) -> Tensor:
        """The answer for ``y``."""
        return self._run(self.method, self.A, y, self.options.get("M"), self.options.get("N"))

    def adjoint(self, v: Tensor) -> Tensor:
        """The adjoint of :meth:`apply`."""
        M, N = self.options.get("M"), self.options.get("N")
        if "N" not in inspect.signature(self.method).parameters:
            if M is not None and not isinstance(M, LinearOperator):
                M = None  # a function, whose adjoint nobody knows
            return self._run(self.transposed, self.A.H, v, None if M is None else M.H, None)
        return self._run(self.transposed, self.A.H, v, N, M)

    def normal_solve(self, g: Tensor) -> Tensor:
        """``(A^H A + damp^2)^{-1} g``."""
        return normal_by_adjoint(self.A, self.damp, self.adjoint, g, rtol=self.options.get("rtol"))

    def _run(self, method: Callable[..., Solution], A: LinearOperator, b: Tensor, M: Any, N: Any) -> Tensor:
        kept = {
            n: v
            for n, v in self.options.items()
            if n in ("rtol", "atol", "conlim", "max_iter", "check_every", "restart")
        }
        kept |= {} if M is None else {"M": M}
        kept |= {} if N is None else {"N": N}
        if "damp" in inspect.signature(method).parameters:
            kept["damp"] = self.damp
        return method(A, b, check_finite=False, **kept).x


def normal_by_adjoint(
    A: LinearOperator,
    damp: Any,
    adjoint: Callable[[Tensor], Tensor],
    g: Tensor,
    *,
    rtol: float | None = None,
) -> Tensor:
    r"""``v = (A^H A + mu)^{-1} g`` from ``u = A (A^H A + mu)^{-1} g``, which a solve for ``A^H`` gives.

    :math:`v = (g - A^H u) / \mu` loses the digits that the division brings forward; refining with the same solver gets
    them back: the residual :math:`g - (A^H A + \mu) v = A^H (u - A v)` is solved for again until it meets ``rtol``.
    """
    space = ItemSpace(A.in_shape, A.dtype, A.device)
    damping = check_damp(damp, A)
    mu = torch.where(damping > 0, damping, 1.0) ** 2
    rtol = Tolerances.of(A.dtype, rtol, 0.0).rtol
    bound = rtol * space.norm(g)
    v: Tensor | None = None
    rest, size = g, torch.full_like(bound, torch.inf)
    for _ in range(_MOST_REFINEMENTS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # what counts is the residual below
            u = adjoint(rest)
        step = (rest - A.adjoint(u)) * space.spread(1 / mu)
        trial = step if v is None else v + step
        left = g - A.adjoint(A.apply(trial)) - trial * space.spread(mu)
        norm = space.norm(left)
        better = norm < size
        spread = space.spread(better).real.bool()
        v = trial if v is None else torch.where(spread, trial, v)
        rest = torch.where(spread, left, 0)
        improving = better & (norm < 0.5 * size)
        size = torch.where(better, norm, size)
        if not bool(((size > bound) & improving).any()):
            break
        rest = rest * space.spread((size > bound) & improving)
    assert v is not None
    failed = size > 10 * bound.clamp_min(torch.finfo(bound.dtype).tiny)
    if bool(failed.any()):
        warnings.warn(
            f"{int(failed.sum())} of {failed.numel()} item(s) did not converge", ConvergenceWarning, stacklevel=2
        )
    return v
