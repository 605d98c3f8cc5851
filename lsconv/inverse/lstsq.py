r"""lstsq: the (regularised) least-squares solution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lsconv.errors import MethodError
from lsconv.inverse.bounded import bounded_least_squares
from lsconv.inverse.fallback import Fallback
from lsconv.inverse.observation import Observation
from lsconv.inverse.plans.krylov_plan import KRYLOV_ONLY, KrylovPlan
from lsconv.inverse.route import route
from lsconv.inverse.sharded import solves_shards
from lsconv.inverse.solve import solve, with_start
from lsconv.krylov.gradients.attach import LeastSquares, attach, start_as_prior
from lsconv.krylov.loop.entry import checks_numbers, serves_empty_batches
from lsconv.krylov.loop.problem import accept_operator, as_complex, prepare
from lsconv.krylov.loop.solution import Solution
from lsconv.krylov.plan import Plan
from lsconv.operators.base import LinearOperator
from lsconv.operators.scipy import OperatorLike
from lsconv.operators.transforms import untraced

__all__ = ["lstsq"]


@untraced
@checks_numbers
@solves_shards
@serves_empty_batches()
def lstsq(
    A: OperatorLike,
    y: Tensor,
    *,
    damp: float | Tensor = 0.0,
    observed: Tensor | None = None,
    weights: Tensor | None = None,
    method: str = "auto",
    preconditioner: LinearOperator | str | None = "auto",
    rtol: float | None = None,
    atol: float = 0.0,
    max_iter: int | None = None,
    rcond: float | None = None,
    bounds: tuple[float | None, float | None] | None = None,
    memory_limit: int | None = None,
    raise_on_failure: bool = False,
    check_finite: bool = True,
    **options: Any,
) -> Solution:
    r"""The least-squares solution of ``A x = y`` of least norm, or its Tikhonov regularisation.

    .. math:: \min_x \|Ax - y\|^2 + \mathrm{damp}^2 \|x\|^2

    With ``damp=0`` and several minimisers, x is the one of least norm, :math:`A^+ y`. Where floating point cannot tell
    (a square convolution whose smallest singular values are below rounding) the status says so; it never regularises
    silently. With ``method="auto"`` and "border" the items that the method leaves in doubt get the answer of a dense
    singular value decomposition where A is small, else that of LSMR where LSMR converges within 500 iterations.

    ``solution.converged`` promises, of every item for which it is True, what A itself says of x, applied in double
    precision by the exact methods and in the dtype of the data by the Krylov methods, with norms in float64: the
    residual is within ``rtol`` of zero, or the gradient is within ``rtol``, or within rounding, of zero and the
    objective no larger than at x = 0. With damping x is then the minimiser, up to what these tolerances leave. Without,
    it is the shortest minimiser for the A whose singular values up to ``rcond ||A||`` are zero; where a direct method
    has decided that rank, ``solution.rank`` and ``solution.nullity`` tell it. An x that may have a part in the null
    space (:attr:`Status.RANK_DEFICIENT`), or depends on singular values that stand on the threshold
    (:attr:`Status.RANK_UNDECIDED`), is not converged.

    x is differentiable with respect to y, damp and every tensor A is made of (in reverse and in forward mode, under
    torch.func too) by implicit differentiation: one more solve of the same kind, to the same rtol, and memory that does
    not depend on the iterations. With ``damp=0`` the gradient is that of Golub and Pereyra, for changes of A that keep
    its rank. Where the symbol of A has zeros a change of the kernel turns singular values that are zero into small
    ones, :math:`A^+` jumps, and the gradient does not know: use ``damp > 0``, with which x is smooth in everything.
    A damping chosen by "hybrid" is held fixed. A preconditioner that chooses among several answers (``damp=0``; M with
    more rows than columns, N with fewer) leaves the gradient by y only. torch.compile does not look into the solve.

    Args:
        A: an operator; also a dense or sparse matrix, or a SciPy LinearOperator.
        y: right-hand side, ``(*batch, *out_shape)``; it may be complex where A is real, and the batch empty.
        damp: the damping, in the units of A (a number, or a tensor with one per batch item).
        observed: True where y was measured, a bool tensor that broadcasts with y (one mask for all items, or one per
            item). What stands elsewhere, NaN included, is not read.
        weights: the weights w >= 0 of :math:`\sum_i w_i |(Ax)_i - y_i|^2`, a tensor that broadcasts with y; data of
            weight 0 are missing, and the gradient by such a weight is 0. None: ones.
        method: "auto", "matrix" (exact; 1x1 kernels and others that read disjoint patches), "separable" (exact for
            every damp at once; a separable kernel with any padding mode, stride and dilation), "normal" (few unknowns
            that the data determine well), "fourier" (exact; circular padding), "border" (exact; zero padding, and
            circular whose outputs are cropped; reflect and replicate with stride 1 and damp > 0), "svd" (exact; any
            small operator, by its dense matrix), or a Krylov method: "lsmr", "lsqr", "cgls", "craig"; "cg", "minres",
            "gmres" (square A, ``damp=0``); "hybrid" (which chooses the damping). See
            :func:`lsconv.inverse.route.route` for the choice of "auto" and what each serves.
        preconditioner: for the Krylov methods: "auto", "circulant", None, or an operator.
        rtol: relative tolerance on residual or gradient. None: 1e-6 in float32 and 1e-10 in float64 for the exact
            methods, ``10 eps^0.75`` for the Krylov methods.
        atol: absolute tolerance on the residual norm, in the units of y.
        max_iter: limit on the iterations.
        rcond: singular values of A up to ``rcond ||A||`` count as zero where ``damp = 0``, as in
            ``torch.linalg.lstsq``; None: 1e-7 in float32, 1e-12 in float64. One of your own is for "auto", "matrix",
            "separable", "fourier", "border" where that is direct (square convolutions) and "svd"; the iterations
            decide no rank.
        bounds: ``(lowest, highest)`` for x, each a number or None: non-negative least squares with ``(0, None)``, for
            real A. Solved by gradient projection (:mod:`lsconv.inverse.bounded`) and certified by its optimality
            conditions (:attr:`Status.OPTIMALITY`); with several minimisers x is one of them. It takes x0, rtol (None:
            1e-4 in float32, 1e-8 in float64) and max_iter, and has no gradient.
        memory_limit: bytes the setup may use; None: 60 % of what is free on the device.
        raise_on_failure: raise instead of warning when an item does not converge.
        check_finite: refuse NaN and infinity in y; False gives such items :attr:`Status.NON_FINITE`.
        options: further options of the Krylov methods (x0, callback, progress, check_every, conlim; restart of
            "gmres"; rule, noise_std and safety of "hybrid").

    Returns:
        A :class:`Solution`; residual and gradient in it are recomputed with A, in float64 for the exact methods.

    Raises:
        LsconvError: for arguments that do not fit (ShapeError, DtypeError, ArgumentError, MethodError, ...).
        ConvergenceError: with ``raise_on_failure``.

    Source:
        Golub and Pereyra, SIAM J. Numer. Anal. 10 (1973), for the gradient without damping.

    Example:
        >>> A = lsconv.Conv2d(torch.randn(4, 8, 3, 3), in_size=(32, 32))
        >>> y = A(torch.randn(8, 32, 32))
        >>> solution = lsconv.lstsq(A, y)
        >>> bool(solution.converged), bool(torch.dist(A(solution.x), y) < 1e-4 * y.norm())
        (True, True)
    """
    A = accept_operator(A, y)
    A.check_output(y, "y")
    A, y = Observation.of(A, observed, weights).of_data(A, y)
    if bounds is not None:
        given = {"method": method != "auto", "preconditioner": preconditioner != "auto", "atol": atol, "rcond": rcond}
        taken = [name for name, value in given.items() if value] + sorted(set(options) - {"x0"})
        if taken:
            raise MethodError(f"{', '.join(taken)}: not with bounds, whose solver takes x0, rtol and max_iter")
        return bounded_least_squares(
            "lstsq", A, y, bounds, damp, rtol=rtol, max_iter=max_iter, raise_on_failure=raise_on_failure,
            check_finite=check_finite, **options,
        )  # fmt: skip
    options.update(rtol=rtol, atol=atol, max_iter=max_iter, raise_on_failure=raise_on_failure)
    start = None
    if "x0" in options:
        options["x0"] = as_complex(options["x0"], A)
        start = start_as_prior(A, damp, options["x0"])
    solver = _LstsqSolver(method, preconditioner, rcond, memory_limit, check_finite, options)
    return attach(solver, LeastSquares(A, y, damp, x_prior=start), rtol=rtol)


@dataclass(frozen=True)
class _LstsqSolver:
    """The solver that makes the plan of :func:`route` for a problem, and solves with it once."""

    method: str
    preconditioner: LinearOperator | str | None
    rcond: float | None
    memory_limit: int | None
    check_finite: bool
    options: dict[str, Any]

    def answer(self, problem: LeastSquares) -> tuple[Solution, Plan]:
        """The solution, and the plan of its backward pass."""
        A, damp, options = problem.A, problem.damp, with_start(self.options, problem)
        data = prepare(A, problem.y, damp=damp, check_finite=self.check_finite, name="y")
        damp = damp if isinstance(damp, Tensor) else float(damp)
        plan = route(
            A,
            damp,
            method=self.method,
            preconditioner=self.preconditioner,
            memory_limit=self.memory_limit,
            rcond=self.rcond,
            needs_krylov=any(options.get(name) is not None for name in KRYLOV_ONLY),
        )
        # a fallback ignores x0, a callback and max_iter: with these there is one only for a plan that does not iterate
        krylov_options = {name for name in ("x0", "callback", "max_iter") if options.get(name) is not None}
        may_fall_back = self.method in ("auto", "border") and (
            not krylov_options or (self.method == "auto" and not plan.innermost.iterates)
        )
        fallback = Fallback(A, damp, plan, self.rcond) if may_fall_back else None
        solution, backward = solve(plan, data.y, data.nonfinite, fallback=fallback, **options)
        if self.method == "hybrid":  # the backward pass holds the chosen damping fixed
            return solution, KrylovPlan(A, solution.damp, "lsmr")
        return solution, backward
