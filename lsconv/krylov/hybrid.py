r"""Hybrid LSQR: the damping chosen on the projected problem, while the iteration runs.

.. math:: \min_x \|Ax - b\|^2 + \mathrm{damp}^2 \|x\|^2, \qquad x = V_k y, \quad
          \min_y \|B_k y - \beta_1 e_1\|^2 + \mathrm{damp}^2 \|y\|^2

After k steps of Golub-Kahan, with full reorthogonalisation, the problem is one of k unknowns whose singular value
decomposition is cheap, so every rule that needs one can be evaluated at every step.
O'Leary and Simmons, "A bidiagonalization-regularization procedure for large scale discretizations of ill-posed
problems", SIAM J. Sci. Stat. Comput. 2 (1981); the weighted GCV is that of Chung, Nagy and O'Leary, "A weighted-GCV
method for Lanczos-hybrid regularization", Electron. Trans. Numer. Anal. 28 (2008).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lsconv.errors import ArgumentError
from lsconv.krylov.loop.batched_scalars import ItemSpace, divide
from lsconv.krylov.loop.certificate import default_rtol
from lsconv.krylov.loop.damping import augmented_rows
from lsconv.krylov.loop.iteration import iterate
from lsconv.krylov.loop.method import Method
from lsconv.krylov.loop.options import IterationState, Options
from lsconv.krylov.loop.problem import Problem, prepare
from lsconv.krylov.loop.solution import Solution
from lsconv.krylov.lsmr import LSMR
from lsconv.operators.scipy import OperatorLike

__all__ = ["HybridSelection", "Projected", "hybrid"]


@dataclass(frozen=True, eq=False)
class HybridSelection:
    """The damping that :func:`hybrid` chose, with the value of the function that it minimised.

    Attributes:
        rule: "gcv" or "discrepancy".
        score: value of the weighted GCV function, or of the residual norm, at the damping chosen, ``batch``.
        weight: omega of the weighted GCV, ``batch``; NaN for the discrepancy principle.

    Example:
        >>> A = lsconv.Conv1d(torch.ones(1, 1, 5, dtype=torch.float64) / 5, in_size=40)
        >>> y = torch.randn(3, 1, 36, dtype=torch.float64)
        >>> selection = lsconv.hybrid(A, y).selection
        >>> selection.rule, selection.score.shape
        ('gcv', torch.Size([3]))
    """

    rule: str
    score: Tensor
    weight: Tensor


def hybrid(
    A: OperatorLike,
    b: Tensor,
    *,
    rule: str = "gcv",
    noise_std: float | Tensor | None = None,
    safety: float = 1.0,
    rtol: float | None = None,
    atol: float = 0.0,
    max_iter: int | None = None,
    callback: Callable[[IterationState], bool | None] | None = None,
    progress: bool = False,
    check_every: int | None = None,
    raise_on_failure: bool = False,
    check_finite: bool = True,
) -> Solution:
    r"""Damped least squares with the damping chosen on the way, every batch item on its own.

    .. math:: \min_x \|Ax - b\|^2 + \mathrm{damp}^2 \|x\|^2

    ``rule="gcv"`` minimises the weighted generalised cross validation function of the projected problem,

    .. math:: G(\mathrm{damp}) = \frac{\|B_k y - \beta_1 e_1\|^2}{\bigl(k + 1 - \omega \sum_i f_i\bigr)^2},
              \qquad f_i = \frac{\sigma_i^2}{\sigma_i^2 + \mathrm{damp}^2},

    with the weight :math:`\omega` averaged over the steps as in the paper. ``rule="discrepancy"`` takes the damping
    with :math:`\|Ax - b\| = \mathrm{safety} \cdot \mathrm{noise\_std} \sqrt m`. An item stops when x solves the damped
    problem.

    Gradients are those at the damping chosen, held fixed: how the choice depends on b and A is left out.

    Memory is that of ``max_iter`` vectors like x and as many like b. On a GPU every step waits for a small SVD.

    Args:
        A: a LinearOperator; or a dense tensor, a sparse tensor, a scipy LinearOperator.
        b: right-hand side ``(*batch, *out_shape)``.
        rule: "gcv" or "discrepancy".
        noise_std: standard deviation of the noise in each entry of b (of the whole complex number where b is complex),
            a number or one per batch item; for the discrepancy principle.
        safety: factor on the noise level of the discrepancy principle.
        rtol: relative tolerance of the damped problem; None: 1e-6, or ``10 eps^0.75`` where that is more.
        atol: absolute tolerance on the residual norm, in the units of b.
        max_iter: iteration limit, at most ``min(m, n)``; None: 100.
        callback: called with an :class:`IterationState` every ``check_every`` iterations; returning True stops.
        progress: show a progress bar (needs tqdm).
        check_every: how often the host looks at the device; None: 1 on the CPU, 10 on a GPU.
        raise_on_failure: raise instead of warning when an item does not converge.
        check_finite: refuse NaN and infinity in b; False gives such items :attr:`Status.NON_FINITE`.

    Returns:
        A :class:`Solution`; ``damp`` is the damping chosen, ``selection`` a :class:`HybridSelection`.

    Raises:
        LsconvError: for arguments that do not fit (ShapeError, DtypeError, DeviceError, ArgumentError, ...).
        ConvergenceError: with ``raise_on_failure``.

    Source:
        Chung, Nagy and O'Leary, Electron. Trans. Numer. Anal. 28 (2008), for the weighted GCV.

    Example:
        >>> A = torch.diag(torch.logspace(0, -6, 20, dtype=torch.float64))
        >>> b = A @ torch.ones(20, dtype=torch.float64) + 1e-3 * torch.randn(20, dtype=torch.float64)
        >>> from lsconv.krylov.hybrid import hybrid
        >>> solution = hybrid(A, b, rule="discrepancy", noise_std=1e-3)
        >>> f"{float(solution.residual_norm / 20**0.5):.1e}"
        '1.0e-03'
    """
    problem = prepare(A, b, check_finite=check_finite)
    if rule not in ("gcv", "discrepancy"):
        raise ArgumentError(f'rule: expected "gcv" or "discrepancy", got {rule!r}')
    target = _target(problem, rule, noise_std, safety)
    rtol = max(1e-6, default_rtol(problem.A.dtype)) if rtol is None else rtol
    rank_limit = min(math.prod(problem.A.in_shape), math.prod(problem.A.out_shape))
    max_iter = min(rank_limit, 100 if max_iter is None else max_iter)
    options = Options.of(problem, rtol=rtol, atol=atol, max_iter=max_iter, check_every=check_every, callback=callback,
                         progress=progress, raise_on_failure=raise_on_failure)  # fmt: skip
    chosen: list[_Hybrid] = []

    def start(x: Tensor | None, running: Tensor) -> Method:
        if x is None:
            chosen.append(_Hybrid(problem, running, max_iter, target))
            return chosen[0]
        # A restart keeps the damping that was chosen, and solves an ordinary damped problem.
        return LSMR(augmented_rows(replace(problem, damp=chosen[0].damp)), x, running)

    def selection() -> tuple[Tensor, HybridSelection]:
        method = chosen[0]
        return method.damp, HybridSelection(rule, method.score, method.weight)

    return iterate(problem, options, start, selection=selection, name="hybrid")


def _target(problem: Problem, rule: str, noise_std: float | Tensor | None, safety: float) -> Tensor | None:
    """The residual norm of the discrepancy principle: ``safety`` times the expected norm of the noise."""
    if rule == "gcv":
        return None
    if noise_std is None:
        raise ArgumentError("noise_std: the discrepancy principle needs the standard deviation of the noise")
    A = problem.A
    noise = torch.as_tensor(noise_std, dtype=problem.domain.scalar, device=A.device)
    if not bool((noise > 0).all()) or not safety > 0:
        raise ArgumentError(f"noise_std, safety: expected positive numbers, got {noise_std} and {safety}")
    return (safety * math.sqrt(math.prod(A.out_shape)) * noise).expand(problem.batch)


class _Hybrid(Method):
    """Golub-Kahan with stored bases; the projected problem is solved anew at every step.

    An item that has stopped keeps its damping, and its bidiagonal matrix grows by zeros, which leave its solution as it
    was.
    """

    def __init__(self, problem: Problem, running: Tensor, steps: int, target: Tensor | None) -> None:
        self.problem, self.A, self.target = problem, problem.A, target
        A = problem.A
        self.items, self.n, self.m = math.prod(problem.batch), math.prod(A.in_shape), math.prod(A.out_shape)
        self.codomain = ItemSpace((self.m,), A.dtype, A.device)
        self.domain = ItemSpace((self.n,), A.dtype, A.device)
        self.U = torch.empty(self.items, steps + 1, self.m, dtype=A.dtype, device=A.device)
        self.V = torch.empty(self.items, steps + 1, self.n, dtype=A.dtype, device=A.device)
        active = running.reshape(-1).to(self.codomain.scalar)
        r = problem.residual(None, running)
        self.beta_first = problem.codomain.safe_norm(r).reshape(-1)
        self.U[:, 0].copy_(r.reshape(self.items, self.m)).mul_(self.codomain.broadcast(divide(active, self.beta_first)))
        self.B = torch.zeros(self.items, steps + 1, steps, dtype=self.codomain.scalar, device=A.device)
        self.k = 0
        self.alpha = self._append(self.V, 0, self.A.adjoint(self._item(self.U, 0, A.out_shape)), self.domain, active)
        batch = problem.batch
        self.damp = torch.zeros(batch, dtype=self.codomain.scalar, device=A.device)
        self.score, self.weight = torch.full_like(self.damp, torch.nan), torch.full_like(self.damp, torch.nan)
        self.weights = torch.zeros_like(self.damp)
        self.residual = self.beta_first.reshape(batch)
        self.gradient: Tensor = (self.alpha * self.beta_first).reshape(batch)
        self.operator_norm = self.alpha.reshape(batch)

    def _item(self, basis: Tensor, index: int, shape: tuple[int, ...]) -> Tensor:
        return basis[:, index].reshape(*self.problem.batch, *shape)

    def _append(self, basis: Tensor, index: int, image: Tensor, space: ItemSpace, active: Tensor) -> Tensor:
        """Orthogonalise ``image`` against the basis, append it normalised, and return its norm."""
        slot = basis[:, index : index + 1]
        slot.copy_(image.reshape(slot.shape))
        before = space.norm(slot[:, 0])
        for _ in range(2 if index else 0):
            slot.baddbmm_(torch.bmm(slot, basis[:, :index].mH), basis[:, :index], alpha=-1)
        length = space.norm(slot[:, 0])
        # A remainder below the rounding of the projection shows that the Krylov space is exhausted.
        length = length * ~(length <= 10 * torch.finfo(space.dtype).eps * before)
        slot.mul_(space.broadcast(divide(active, length)).unsqueeze(1))
        return length * active

    def step(self, running: Tensor) -> None:
        """Append u_{k+1} and v_{k+1} to the bases and a column to B, and choose damp on the projected problem."""
        k, active, A = self.k, running.reshape(-1).to(self.codomain.scalar), self.A
        image = A.apply(self._item(self.V, k, A.in_shape))
        beta = self._append(self.U, k + 1, image, self.codomain, active)
        self.B[:, k, k], self.B[:, k + 1, k] = self.alpha * active, beta
        column = torch.hypot(self.alpha, beta).reshape(self.problem.batch)
        self.operator_norm = torch.maximum(self.operator_norm, column)
        image = A.adjoint(self._item(self.U, k + 1, A.out_shape))
        self.alpha = self._append(self.V, k + 1, image, self.domain, active)
        self.k = k + 1
        self._choose(running)

    def _choose(self, running: Tensor) -> None:
        """Choose the damping on the projected problem, and set the estimates of residual and gradient."""
        batch = self.problem.batch
        small = Projected(self.B[:, : self.k + 1, : self.k], self.beta_first)
        if self.target is None:
            self.weights = self.weights + small.weight().reshape(batch)
            weight = self.weights / self.k
            damp, score = small.weighted_gcv(weight.reshape(-1))
        else:
            weight = self.weight
            damp, score = small.discrepancy(self.target.reshape(-1))
        self.damp = torch.where(running, damp.reshape(batch), self.damp)
        self.score = torch.where(running, score.reshape(batch), self.score)
        self.weight = torch.where(running, weight, self.weight)
        self.y = small.solution(self.damp.reshape(-1))
        r = -(self.B[:, : self.k + 1, : self.k] @ self.y.unsqueeze(-1))[..., 0]
        r[:, 0] += self.beta_first
        total = torch.hypot(torch.linalg.vector_norm(r, dim=-1), small.norm(self.damp.reshape(-1)))
        # The gradient of the damped problem is the component along the next v, whose coefficient has the factor alpha.
        self.residual = total.reshape(batch)
        self.gradient = (self.alpha * r[:, -1].abs()).reshape(batch)

    def solution(self) -> Tensor:
        if self.k == 0:
            return self.problem.start(None)
        x = torch.bmm(self.y.to(self.V.dtype).unsqueeze(1), self.V[:, : self.k])
        return x.reshape(*self.problem.batch, *self.A.in_shape)


class Projected:
    """``min ||B y - beta e_1||^2 + damp^2 ||y||^2`` for a batch of ``(k + 1) x k`` matrices B, by their SVD.

    Args:
        B: ``(items, k + 1, k)``; an item with NaN or infinity is treated as zero.
        beta: ``(items,)``.

    Example:
        >>> small = Projected(torch.tensor([[[2.0], [0.0]]]), torch.tensor([4.0]))
        >>> small.solution(torch.tensor([0.0]))
        tensor([[2.]])
    """

    def __init__(self, B: Tensor, beta: Tensor) -> None:
        finite = torch.isfinite(B).all(-1).all(-1) & torch.isfinite(beta)
        B = torch.where(finite[:, None, None], B, 0)
        beta = torch.where(finite, beta, 0)
        u, self.sigma, self.vh = torch.linalg.svd(B, full_matrices=True)
        # beta e_1 in the left singular vectors: in the range of B, and along the one vector orthogonal to it.
        coefficients = beta.unsqueeze(-1) * u[:, 0, :]
        self.k = B.shape[-1]
        self.inside, self.outside = coefficients[:, : self.k], coefficients[:, self.k]
        self.largest = self.sigma[:, 0]

    def _filters(self, damp: Tensor) -> Tensor:
        """``sigma^2 / (sigma^2 + damp^2)``, for damp ``(items, ...)``; a zero singular value is filtered out."""
        sigma = self.sigma.reshape(-1, *(1 for _ in damp.shape[1:]), self.k)
        ratio = damp.unsqueeze(-1) / sigma
        return torch.where(sigma > 0, 1 / (1 + ratio * ratio), 0)

    def solution(self, damp: Tensor) -> Tensor:
        """The minimiser y, ``(items, k)``."""
        keep = self.sigma > torch.finfo(self.sigma.dtype).eps * self.largest.unsqueeze(-1)
        scaled = torch.where(keep, self._filters(damp) * self.inside / self.sigma, 0)
        return torch.bmm(scaled.unsqueeze(1), self.vh)[:, 0]

    def norm(self, damp: Tensor) -> Tensor:
        """``damp ||y||``."""
        return damp * torch.linalg.vector_norm(self.solution(damp), dim=-1)

    def residual(self, damp: Tensor) -> Tensor:
        """``||B y - beta e_1||`` for damp ``(items, ...)``; it grows with damp."""
        shape = (-1, *(1 for _ in damp.shape[1:]))
        inside = (1 - self._filters(damp)) * self.inside.reshape(*shape, self.k)
        return torch.hypot(torch.linalg.vector_norm(inside, dim=-1), self.outside.reshape(shape))

    # ------------------------------------------------------------------ weighted generalised cross validation

    def weight(self) -> Tensor:
        """The omega for which the weighted GCV function is stationary at the smallest singular value.

        While the projected problem is a good model no damping should exceed that singular value (section 4 of Chung,
        Nagy and O'Leary, 2008); the method takes the mean of these omegas over its steps.
        """
        sigma, damp = self.sigma, self.sigma[:, -1]
        f = self._filters(damp)
        # GCV is N / T^2 with N = ||B y - beta e_1||^2 and T = k + 1 - omega sum f. With a = damp^2
        # dN/da = 2 sum (1 - f)^2 f c^2 / a and dT/da = omega sum f (1 - f) / a, and a cancels in N' T = 2 N T'.
        N_slope = 2 * ((1 - f) ** 2 * f * self.inside**2).sum(-1)
        T_slope = (f * (1 - f)).sum(-1)
        N = self.residual(damp) ** 2
        denominator = 2 * N * T_slope + N_slope * f.sum(-1)
        omega = N_slope * (self.k + 1) / denominator
        usable = (denominator > 0) & (sigma[:, -1] > 0)
        return torch.where(usable, omega, 1.0).clamp(0.0, 1.0)

    def weighted_gcv(self, omega: Tensor) -> tuple[Tensor, Tensor]:
        """The damping that minimises the weighted GCV function, and the function's value there."""

        def score(damp: Tensor) -> Tensor:
            trace = self.k + 1 - omega.unsqueeze(-1) * self._filters(damp).sum(-1)
            return self.residual(damp) ** 2 / trace**2

        # The function may have several minima: a coarse grid is followed by finer ones around the lowest point.
        top = torch.log10(torch.where(self.largest > 0, self.largest, 1.0)) + 1
        low, high = top + math.log10(torch.finfo(top.dtype).eps), top
        steps = torch.linspace(0, 1, 64, dtype=top.dtype, device=top.device)
        best = top
        for _ in range(4):  # each 30 times as fine as the one before
            grid = low.unsqueeze(-1) + (high - low).unsqueeze(-1) * steps
            best = grid.gather(-1, score(10**grid).argmin(-1, keepdim=True))[:, 0]
            width = (high - low) / (len(steps) - 1)
            low, high = best - width, best + width
        damp = 10**best
        return damp, score(damp.unsqueeze(-1))[:, 0]

    # ------------------------------------------------------------------ discrepancy principle

    def discrepancy(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Find the damping whose residual norm is ``target`` (0 if that has a larger one); return it and the norm."""
        top = torch.log10(torch.where(self.largest > 0, self.largest, 1.0))
        decades = -math.log10(torch.finfo(top.dtype).eps)  # the range that double precision resolves
        low, high = top - decades, top + decades
        for _ in range(60):  # bisection to the last digit
            middle = 0.5 * (low + high)
            above = self.residual(10**middle) > target
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        damp = torch.where(self.residual(torch.zeros_like(target)) >= target, 0.0, 10**low)
        return damp, self.residual(damp)
