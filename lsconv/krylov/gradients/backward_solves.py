"""The solves of a backward pass: their interface, two implementations of them, and the report of a failure."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from lsconv.errors import ArgumentTypeError, ConvergenceWarning, unreported, warn
from lsconv.krylov.cg import cg
from lsconv.krylov.loop.batched_scalars import ItemSpace, divide
from lsconv.krylov.loop.certificate import Tolerances
from lsconv.krylov.loop.problem import check_damp
from lsconv.operators.base import LinearOperator

__all__ = ["Inverse", "gram_by_cg", "normal_by_apply", "report_failure", "set_backward_failure_hook"]

Hook = Callable[[str], None]
_hook: Hook | None = None
# A recomputed residual may exceed the tolerance by this factor, because the solver stopped by a recurrence for it.
_SLACK = 10


def set_backward_failure_hook(hook: Hook | None) -> Hook | None:
    """Set the function that is told of backward solves that did not converge, and return the one before.

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
        warn(f"backward solve: {message}")


class Inverse(Protocol):
    """The interface of the solves of a backward pass, to the ``rtol`` of the forward solve and without autograd."""

    def apply(self, y: Tensor, *, rtol: float | None = None) -> Tensor:
        """The answer for ``y``."""

    def adjoint(self, v: Tensor, *, rtol: float | None = None) -> Tensor:
        """The adjoint of :meth:`apply`."""

    def normal_solve(self, g: Tensor, *, rtol: float | None = None) -> Tensor:
        """``(A^H A + damp^2 L^H L)^{-1} g``, for items with ``damp > 0``."""

    def gram_solve(self, g: Tensor, *, rtol: float | None = None) -> Tensor | None:
        """``(A^H A)^{-1} g`` for A of full column rank; None where it would cost more than :meth:`adjoint`."""


def normal_by_apply(
    A: LinearOperator,
    damp: Any,
    apply: Callable[[Tensor, float], Tensor],
    g: Tensor,
    *,
    rtol: float | None,
    extra_digits: float = 0.5,
) -> Tensor:
    r"""``v = (A^H A + mu)^{-1} g`` by one more solve of the same kind: that for the data ``A g``.

    With H for :math:`A^HA + \mu`, :math:`H^{-1} A^H (A g) = g - \mu H^{-1} g`, so :math:`v = (g - x) / \mu` with x the
    answer for ``A g``. What x leaves of its normal equations is :math:`\mu (H v - g)`: the test that stopped the
    forward solve, :math:`\|A^H r - \mu x\| \le \mathrm{rtol} \|A\| \|(r, \mathrm{damp}\,x)\|`, reads for v

    .. math:: \|g - H v\| \le \mathrm{rtol}\, \|A\|\, \|(A v,\ \mathrm{damp}\,(v - g / \mu))\| ,

    and is made here of what A itself says. Relative to g the right side is up to ``rtol ||A|| / damp``, so rtol is
    multiplied by ``(damp / ||A||)^extra_digits``. An answer that fails the test is refined by the same solver.

    Args:
        A: the operator.
        damp: the damping.
        apply: the answer for data, to a relative tolerance.
        g: right-hand sides.
        rtol: the forward's relative tolerance.
        extra_digits: the exponent of ``damp / ||A||`` by which rtol is smaller: 1 for a residual of ``rtol ||g||``, 0
            for the forward's test as it is.
    """
    domain, codomain = (ItemSpace(shape, A.dtype, A.device) for shape in (A.in_shape, A.out_shape))
    damping = check_damp(damp, A)
    damping = torch.where(damping > 0, damping, 1.0)  # items without damping get zero, and any shift serves them
    mu = damping**2
    rtol = Tolerances.of(A.dtype, rtol, 0.0).rtol
    g_norm = domain.norm(g)
    image = A.apply(g)
    norm_a = divide(codomain.norm(image), g_norm)
    rtol *= float((damping / torch.hypot(norm_a, damping)).min()) ** extra_digits
    v: Tensor | None = None
    best, passed = torch.full_like(g_norm + mu, torch.inf), torch.zeros_like(g_norm + mu, dtype=torch.bool)
    remainder = g
    while True:  # ends when no step halves the residual of an item any more
        # the residual is checked below
        with unreported():
            x = apply(image, rtol)
        step = (remainder - x) * domain.broadcast(1 / mu)
        v_new = step if v is None else v + step
        av = A.apply(v_new)
        gram_v = A.adjoint(av)
        residual = g - gram_v - v_new * domain.broadcast(mu)
        residual_norm, av_norm = domain.norm(residual), codomain.norm(av)
        norm_a = torch.maximum(
            norm_a, torch.fmax(divide(av_norm, domain.norm(v_new)), divide(domain.norm(gram_v), av_norm))
        )
        total = torch.hypot(av_norm, damping * domain.norm(v_new - g * domain.broadcast(1 / mu)))
        bound = _SLACK * torch.minimum(rtol * torch.hypot(norm_a, damping) * total, rtol**0.5 * g_norm)
        bound = torch.maximum(bound, 8 * torch.finfo(A.dtype).eps * g_norm)
        better = residual_norm < best
        accepted = domain.broadcast(better).real.bool()
        v = v_new if v is None else torch.where(accepted, v_new, v)
        passed = torch.where(better, residual_norm <= bound, passed)
        improving = better & (residual_norm < 0.5 * best) & ~passed
        best = torch.where(better, residual_norm, best)
        if not bool(improving.any()):
            break
        remainder = torch.where(accepted, residual, 0) * domain.broadcast(improving)
        image = A.apply(remainder)
    assert v is not None
    failed = ~passed & (g_norm > 0)
    if bool(failed.any()):
        text = f"{int(failed.sum())} of {failed.numel()} item(s) did not converge"
        warnings.warn(text, ConvergenceWarning, stacklevel=2)
    return v


def gram_by_cg(
    A: LinearOperator,
    g: Tensor,
    *,
    rtol: float | None,
    N: LinearOperator | None = None,
    forward_iterations: int | None = None,
    max_iter: int | None = None,
) -> Tensor:
    """Compute ``(A^H A)^{-1} g`` by conjugate gradients; the caller has to check whether they converged.

    Without full column rank they do not. So they stop after twice the iterations of the forward solve
    (``forward_iterations``), and the caller solves with ``A^H`` instead.
    """
    if forward_iterations is not None:
        max_iter = min(2 * forward_iterations + 20, 10_000 if max_iter is None else max_iter)
    with unreported():
        return cg(A.H @ A, g, M=N, rtol=rtol, max_iter=max_iter, check_finite=False).x
