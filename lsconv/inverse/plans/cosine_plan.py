r"""Even kernels with reflect padding, solved in the basis of cosines by an iteration without transforms inside.

Reflect padding continues x, of n cells along an axis, to an even signal of period 2n - 2, and a kernel that is even
along every axis keeps it even. With the weights :math:`W = \operatorname{diag}(1/2, 1, \dots, 1, 1/2)` of each axis, Q
the orthonormal discrete cosine transform of kind I, which is symmetric, and the real symbol :math:`\Lambda`,

.. math:: A = W^{-1/2} Q \Lambda Q\, W^{1/2} = Q\, R \Lambda R^{-1} Q, \qquad
          R^2 = Q W^{-1} Q = \bigotimes_a (1 + P_a P_a^T), \qquad P_a^T P_a = 1,

where the two columns of :math:`P_a` are those of Q at the ends of axis a: a power of R takes a few operations per cell.
The diagonal matrices c and s with :math:`c^2 + s^2 = 1` leave of the normal equations

.. math:: (A^TA + \mathrm{damp}^2)^{-1} = Q R\, h N^{-1} h\, R Q, \qquad
          N = c R^2 c + s R^2 s, \qquad h = (\Lambda^2 + \mathrm{damp}^2)^{-1/2}, \quad c = h \Lambda, \quad
          s = h\, \mathrm{damp}.

For :math:`AA^T` the same holds with R inverted. In d dimensions :math:`1 \le R^2 \le \kappa = 2^d`, which bounds N
alike, whatever kernel, size and damping are, and for its preconditioner :math:`M = c R^{-2} c + s R^{-2} s`
Kantorovich's inequality for operators says

.. math:: N^{-1} \le M \le \frac{(1 + \kappa)^2}{4 \kappa} N^{-1}:

a condition of 1.13, 1.57 or 2.54, for eleven, seventeen or twenty-five steps of conjugate gradients to rounding.
Without damping, which is solved as its limit, M is the inverse of N.

A kernel that is even up to an error E is replaced by its even part, and the solve refined with residuals of A. Each
step multiplies the error by at most :math:`2 \|E\| / \sqrt{\mathrm{damp}^2 + \sigma_{min}^2}`.

Strang, "The discrete cosine transform", SIAM Review 41 (1999). Marshall and Olkin, "Matrix versions of the Cauchy and
Kantorovich inequalities", Aequationes Math. 40 (1990).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lsconv.errors import MethodError, unreported
from lsconv.factored.direct_plan import CONTRACTION, RefinedPlan, refinements
from lsconv.krylov.cg import cg
from lsconv.operators.batch_layout import broadcast_shapes, over_items
from lsconv.operators.convolution import Convolution
from lsconv.operators.dtypes import ROUNDING, double
from lsconv.operators.elementary import FromFunctions

__all__ = ["CosinePlan"]


class CosinePlan(RefinedPlan):
    """Setup of the solve in the basis of cosines; :meth:`solve` answers right-hand sides.

    The arguments are those of :class:`~lsconv.factored.direct_plan.DirectPlan`, for a real convolution of one channel a
    group that extends x evenly and keeps its size.

    Raises:
        MethodError: the kernel is not even, or for this damping not closely enough; or without damping the symbol has
            values that are not zero and may count as zero.
        PlanMemoryError: the symbol would need more than ``allowed``.

    Example:
        >>> K = torch.tensor([[0.0, 1.0, 0.0], [1.0, 4.0, 1.0], [0.0, 1.0, 0.0]]) / 8
        >>> A = lsconv.Conv2d(K[None, None], (20, 30), padding=1, padding_mode="reflect")
        >>> plan = CosinePlan(A, 1e-2, rcond=1e-7, rtol=1e-6)
        >>> bool(plan.solve(torch.randn(5, *A.out_shape)).converged.all())
        True
    """

    A: Convolution
    reason = "reflect padding and an even kernel: cosines nearly diagonalise A, and an iteration on them does the rest"
    never_misses = False
    gives_way_to_border = True
    _factors_name = "the symbol in the basis of cosines"

    def _bytes(self) -> int:
        # the symbol, the factors made of it and the damping, and the vectors of the iteration
        return 16 * 8 * math.prod(broadcast_shapes(self.A.batch_shape, self.damp.shape)) * self.A.in_numel

    def _factorise(self) -> None:
        A, d = self.A, self.A.ndim
        weight = A.weight.detach().to(double(A.dtype)).squeeze(-d - 1)
        even = weight
        for a in range(-d, 0):
            even = (even + even.flip(a)) / 2
        size, error = (k.abs().flatten(-d).sum(-1).amax(-1) * 2 ** (d / 2) for k in (weight, weight - even))
        self._error = torch.where(error <= ROUNDING * torch.finfo(even.dtype).eps * size, 0.0, error)
        self._weights, self._ends, self._symbol = [], [], even
        for a, n in enumerate(A.spatial_in, start=-d):
            cells = torch.arange(n, device=A.device)
            weights = torch.ones_like(cells, dtype=even.dtype)
            weights[0] = weights[-1] = 0.5
            self._weights.append(weights.sqrt())
            column = (weights / max(n - 1, 1)).sqrt()
            self._ends.append(torch.stack([column, column * (1 - 2 * (cells % 2))], dim=-1))
            offsets = A.dilation[a] * torch.arange(A.kernel_size[a], device=A.device) - A.padding[a][0]
            multiples = (offsets[:, None] * cells) % max(2 * n - 2, 1)
            cosines = (multiples.to(even) * (math.pi / max(n - 1, 1))).cos()
            self._symbol = torch.tensordot(self._symbol, cosines, ([a], [0])).movedim(-1, a)
        values = self._symbol.abs().flatten(-d - 1)
        largest = values.amax(-1)
        # a zero is computed as rounding, which a tiny damp would amplify
        zero = self._symbol.abs() <= ROUNDING * torch.finfo(even.dtype).eps * over_items(largest, d + 1)
        self._symbol = torch.where(zero, 0.0, self._symbol)
        # the k-th largest singular value and the k-th largest of these differ by no more than this factor
        factor = 2 ** (d / 2)
        self.norm, self._smallest = factor * largest + self._error, values.amin(-1) / factor
        self.rank = (values > factor**2 * self.rcond * largest.unsqueeze(-1)).sum(-1)
        self._doubtful = self.rank + zero.flatten(-d - 1).sum(-1) < A.in_numel
        self.undecided = torch.zeros_like(self._doubtful)  # what is doubtful is refused
        self._limit = torch.finfo(even.dtype).eps ** 2 * torch.where(largest > 0, largest, 1.0)
        self._adapt()

    def _adapt(self) -> None:
        """Make h, c and s for this damping, and choose the number of refinement steps."""
        A = self.A
        self._undamped = self.damp == 0
        if bool((self._undamped & self._doubtful).any()):
            raise MethodError(f"damp: some singular values may count as zero, and damp = 0; got {A!r}")
        relative = 2 * self._error / torch.hypot(self.damp, self._smallest)
        worst = float(torch.where(self._error > 0, relative, 0.0).max())
        if worst > CONTRACTION:
            raise MethodError(
                f"A: the kernel is even up to {float(self._error.max()):.1e}, too little for this damping"
            )
        self._steps = refinements(worst, self.rtol)
        # the square of this damping is lost beside that of any singular value that does not count as zero
        damp = over_items(torch.where(self._undamped, self._limit, self.damp), A.ndim + 1)
        self._h = 1 / torch.hypot(self._symbol, damp)
        c, s = self._h * self._symbol, self._h * damp
        self._c = c
        self._normal_operators = {
            power: FromFunctions(A.in_shape, A.in_shape, function, function, dtype=c.dtype, device=A.device)
            for power, function in (
                (2, lambda u: c * self._power(c * u, 2) + s * self._power(s * u, 2)),
                (-2, lambda u: c * self._power(c * u, -2) + s * self._power(s * u, -2)),
            )
        }
        ratio = (1 + 2**A.ndim) / 2 ** (1 + A.ndim / 2)  # the root of the condition of M N
        self._max_steps = math.ceil(math.log(torch.finfo(c.dtype).eps / 2) / math.log((ratio - 1) / (ratio + 1)))

    # ------------------------------------------------------------------ the maps

    def _near_inverse(self, y: Tensor) -> Tensor:
        return self._solve_in_cosines(y, self._c, self._h)

    def _near_inverse_adjoint(self, v: Tensor) -> Tensor:
        return self._solve_in_cosines(v, self._c, self._h, -1)

    def _near_normal(self, g: Tensor) -> Tensor:
        """Solve the normal equations of the even part of the kernel; without damping ``A^+ (A^+)^H g``."""
        if not bool(self._undamped.any()):
            return self._solve_in_cosines(g, self._h, self._h)
        undamped = self._solve_in_cosines(self._solve_in_cosines(g, self._c, self._h, -1), self._c, self._h)
        if bool(self._undamped.all()):
            return undamped
        return torch.where(
            over_items(self._undamped, self.A.ndim + 1), undamped, self._solve_in_cosines(g, self._h, self._h)
        )

    def _solve_in_cosines(self, z: Tensor, before: Tensor, after: Tensor, power: int = 1) -> Tensor:
        """``Q R^p D_2 N_p^-1 D_1 R^p Q z``, p = ``power``, for the even part of the kernel.

        ``D_1`` is ``before``, ``D_2`` is ``after``, and ``N_1`` is N; ``N_-1`` is N with R inverted.
        """
        b = before * self._power(self._transform(z), power)
        N, M = self._normal_operators[2 * power], self._normal_operators[-2 * power]
        with unreported():  # rounding may exceed the tolerance
            # residuals of A down to a hundred-thousandth of the data meet rtol with it
            u = cg(N, b, M=M, rtol=1e-5 * self.rtol, max_iter=self._max_steps, check_finite=False).x
        return self._transform(self._power(after * u, power))

    def _transform(self, z: Tensor) -> Tensor:
        """``Q z``."""
        for a, weights in enumerate(self._weights, start=-self.A.ndim):
            if len(weights) > 1:
                z = z.movedim(a, -1) / weights
                z = torch.fft.rfft(torch.cat([z, z[..., 1:-1].flip(-1)], dim=-1), norm="ortho").real * weights
                z = z.movedim(-1, a)
        return z

    def _power(self, z: Tensor, power: int) -> Tensor:
        """Apply ``R^power``, which is ``1 + (2^(power/2) - 1) P P^T`` along each axis."""
        factor, shape = 2 ** (power / 2) - 1, z.shape
        for a, P in enumerate(self._ends, start=-self.A.ndim):
            if len(P) > 1 and a < -1:
                z = z.reshape(-1, len(P), math.prod(shape[a + 1 :]))
                z = torch.baddbmm(z, P.expand(len(z), *P.shape), P.mT @ z, alpha=factor)
            elif len(P) > 1:
                z = z.reshape(-1, len(P))
                z = torch.addmm(z, z @ P, P.mT, alpha=factor)
        return z.reshape(shape)
