r"""Even kernels with reflect padding, solved in the basis of cosines by an iteration that transforms nothing.

Reflect padding continues x, of n cells along an axis, to an even signal of period 2n - 2, and a kernel that is even
along every axis keeps it even. With the weights :math:`W = \operatorname{diag}(1/2, 1, \dots, 1, 1/2)` of each axis, Q
the orthonormal discrete cosine transform of kind I, symmetric, and :math:`\Lambda` the symbol, which is real,

.. math:: A = W^{-1/2} Q \Lambda Q\, W^{1/2}, \qquad
          Q A Q = R \Lambda R^{-1}, \qquad R = Q W^{-1/2} Q = \bigotimes_a \big(1 + (\sqrt 2 - 1) P_a P_a^T\big),

all of them Kronecker products over the axes. The two columns of :math:`P_a` are those of Q at the ends of axis a, so
that in these coordinates A takes a few operations per cell. Its normal operator is bounded by what is diagonal but for
R, since :math:`1 \le R^2 \le 2^d` in d dimensions:

.. math:: R^{-1} (\Lambda^2 + \mu) R^{-1} \;\le\; (QAQ)^T QAQ + \mu \;\le\; 2^d\, R^{-1} (\Lambda^2 + \mu) R^{-1}.

Conjugate gradients with that preconditioner take some twenty steps, whatever kernel, size and damping are. Without
damping, and with a symbol that has no zeros, :math:`A^{-1} = Q R \Lambda^{-1} R^{-1} Q`.

A kernel that is even up to an error E is replaced by its even part, and the solve refined with residuals of A. Each
step multiplies the error by at most :math:`2 \|E\| / \sqrt{\mathrm{damp}^2 + \sigma_{min}^2}`.

Strang, "The discrete cosine transform", SIAM Review 41 (1999).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lsconv.errors import MethodError
from lsconv.factored.direct_plan import CONTRACTION, DirectPlan, refinements
from lsconv.inverse.plans.normal_iteration import NormalIteration
from lsconv.krylov.plan import FallbackKind
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import over_items
from lsconv.operators.convolution import Convolution
from lsconv.operators.dtypes import ROUNDING, double
from lsconv.operators.padding_modes import MODES

__all__ = ["CosinePlan"]


class CosinePlan(DirectPlan):
    """Setup of the solve in the basis of cosines; :meth:`solve` answers right-hand sides.

    The arguments are those of :class:`~lsconv.factored.direct_plan.DirectPlan`, for a convolution that
    :meth:`serves`.

    Raises:
        MethodError: the kernel is not even, or for this damping not closely enough; or without damping the symbol has
            values that count as zero, or may.
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
    fallback_kind = FallbackKind.BORDER
    _factors_name = "the symbol of the cosines"

    @staticmethod
    def serves(A: LinearOperator) -> bool:
        """Tell whether A is a real convolution of one channel a group that extends x evenly, and keeps its size."""
        return (
            isinstance(A, Convolution)
            and MODES[A.padding_mode].even
            and not A.is_complex
            and A.c_in == A.c_out == A.groups
            and set(A.stride) == {1}
            and all(left == right for left, right in A.padding)
            and A.spatial_in == A.spatial_out
        )

    def _bytes(self) -> int:
        return 16 * 8 * math.prod(self.A.batch_shape) * self.A.in_numel  # the symbol, and the vectors of the iteration

    def _factorise(self) -> None:
        A, d = self.A, self.A.ndim
        weight = A.weight.detach().to(double(A.dtype)).squeeze(-d - 1)
        even = weight
        for a in range(-d, 0):
            even = (even + even.flip(a)) / 2
        size, error = (k.abs().flatten(-d).sum(-1).amax(-1) * 2 ** (d / 2) for k in (weight, weight - even))
        self._error = torch.where(error <= ROUNDING * torch.finfo(even.dtype).eps * size, 0.0, error)
        self._operator = _InCosines(A, even)
        values = self._operator.symbol.abs().flatten(-d - 1)
        # the k-th largest singular value and the k-th largest of these differ by no more than this factor
        factor, threshold = 2 ** (d / 2), self.rcond * values.amax(-1, keepdim=True)
        self.norm, self._smallest = factor * values.amax(-1) + self._error, values.amin(-1) / factor
        self.rank = (values > factor**2 * threshold).sum(-1)
        self.undecided = ((values * factor**2 > threshold) & (values <= factor**2 * threshold)).any(-1)
        self._adapt()

    def _adapt(self) -> None:
        """Make the iteration for this damping, and choose the number of refinement steps."""
        self._undamped = self.damp == 0
        if bool((self._undamped & (self.rank < self.A.in_numel)).any()):
            raise MethodError(f"damp: some singular values count as zero, or may, and damp = 0; got {self.A!r}")
        worst = float((2 * self._error / torch.hypot(self.damp, self._smallest)).nan_to_num(0.0).max())
        if worst > CONTRACTION:
            raise MethodError(
                f"A: the kernel is even up to {float(self._error.max()):.1e}, too little for this damping"
            )
        self._steps = refinements(worst, self.rtol)
        # items without damping are solved directly, and take any damping in the iteration
        self._iteration = _CosineIteration(self._operator, torch.where(self._undamped, self.norm, self.damp))
        self._accuracy = 0.01 * self.rtol

    # ------------------------------------------------------------------ the maps

    def _inverse(self, y: Tensor) -> Tensor:
        x = self._in_cosines(y, self._iteration.apply, self._operator.solve)
        for _ in range(self._steps):
            gradient = self.precise.adjoint(y - self.precise.apply(x))
            x = x + self._even_normal(gradient - self._damped(x))
        return x

    def _inverse_adjoint(self, v: Tensor) -> Tensor:
        if self._steps:
            return self.precise.apply(self._normal(v))
        return self._in_cosines(v, self._iteration.adjoint, self._operator.solve_adjoint)

    def _normal(self, g: Tensor) -> Tensor:
        v = self._even_normal(g)
        for _ in range(self._steps):
            back = self.precise.adjoint(self.precise.apply(v))
            v = v + self._even_normal(g - back - self._damped(v))
        return v

    def _even_normal(self, g: Tensor) -> Tensor:
        """Solve the normal equations of the even part of the kernel."""
        operator = self._operator
        return self._in_cosines(g, self._iteration.normal_solve, lambda c: operator.solve(operator.solve_adjoint(c)))

    def _in_cosines(self, z: Tensor, damped: Callable[..., Tensor], undamped: Callable[[Tensor], Tensor]) -> Tensor:
        """Solve in the basis of cosines, each item by the function for its damping."""
        c = self._operator.transform(z)
        if bool(self._undamped.all()):
            c = undamped(c)
        else:
            iterated = damped(c, rtol=self._accuracy)
            without = over_items(self._undamped, self.A.ndim + 1)
            c = torch.where(without, undamped(c), iterated) if bool(self._undamped.any()) else iterated
        return self._operator.transform(c)


class _InCosines(LinearOperator):
    r"""The operator :math:`QAQ = R \Lambda R^{-1}` in the basis of cosines.

    Args:
        A: the convolution.
        kernel: its even kernels, ``(*batch, channels, *taps)``, in double precision.
    """

    def __init__(self, A: Convolution, kernel: Tensor) -> None:
        super().__init__(A.in_shape, A.out_shape, dtype=kernel.dtype, device=A.device, batch_shape=A.batch_shape)
        self._weights: list[Tensor] = []
        self._ends: list[Tensor] = []
        self.symbol = kernel
        for a, n in enumerate(A.spatial_in, start=-A.ndim):
            cells = torch.arange(n, device=A.device)
            weights = torch.ones_like(cells, dtype=kernel.dtype)
            weights[0] = weights[-1] = 0.5
            self._weights.append(weights.sqrt())
            column = (weights / max(n - 1, 1)).sqrt()
            self._ends.append(torch.stack([column, column * (1 - 2 * (cells % 2))], dim=-1))
            places = A.dilation[a] * torch.arange(A.kernel_size[a], device=A.device) - A.padding[a][0]
            # the period is 2n - 2, and integers are reduced exactly
            turns = (places[:, None] * cells) % max(2 * n - 2, 1)
            waves = (turns.to(kernel) * (math.pi / max(n - 1, 1))).cos()
            self.symbol = torch.tensordot(self.symbol, waves, ([a], [0])).movedim(-1, a)

    def transform(self, z: Tensor) -> Tensor:
        """Apply Q: the cosine transform of kind I along every axis, its own inverse."""
        for a, weights in enumerate(self._weights, start=-len(self._weights)):
            n = len(weights)
            if n > 1:
                z = z.movedim(a, -1) / weights
                z = torch.fft.rfft(torch.cat([z, z[..., 1:-1].flip(-1)], dim=-1), norm="ortho").real * weights
                z = z.movedim(-1, a)
        return z

    def apply(self, x: Tensor) -> Tensor:
        """``R Lambda R^-1 x``."""
        return self.root(self.symbol * self.root(x, inverse=True))

    def adjoint(self, y: Tensor) -> Tensor:
        """``R^-1 Lambda R y``."""
        return self.root(self.symbol * self.root(y), inverse=True)

    def solve(self, y: Tensor) -> Tensor:
        """``R Lambda^-1 R^-1 y``."""
        return self.root(self.root(y, inverse=True) / self.symbol)

    def solve_adjoint(self, x: Tensor) -> Tensor:
        """``R^-1 Lambda^-1 R x``."""
        return self.root(self.root(x) / self.symbol, inverse=True)

    def root(self, z: Tensor, *, inverse: bool = False) -> Tensor:
        """``R z``, or ``R^-1 z``."""
        factor = math.sqrt(0.5) - 1 if inverse else math.sqrt(2) - 1
        for a, P in enumerate(self._ends, start=-len(self._ends)):
            if len(P) > 1:
                shape = z.shape
                if a == -1:
                    z = z.reshape(-1, len(P))
                    z = torch.addmm(z, z @ P, P.mT, alpha=factor)
                else:
                    z = z.flatten(a + 1).reshape(-1, len(P), math.prod(shape[a + 1 :]))
                    z = torch.baddbmm(z, P.expand(len(z), *P.shape), P.mT @ z, alpha=factor)
                z = z.reshape(shape)
        return z


class _CosineIteration(NormalIteration):
    """Conjugate gradients in the basis of cosines, preconditioned by ``R (Lambda^2 + mu)^-1 R``."""

    wide = False

    def __init__(self, A: _InCosines, damp: Tensor) -> None:
        super().__init__(A, damp)
        total = A.symbol.square() + over_items(self.mu, len(A.in_shape))
        weights = torch.where(total > 0, 1 / total, 0.0)
        self.inverse = lambda g, tolerance: (A.root(weights * A.root(g)),)
        # by the bound of conjugate gradients the error is that of rounding after so many steps
        condition = math.sqrt(2 ** (len(A.in_shape) - 1))
        rate = (condition - 1) / (condition + 1)
        self._steps = math.ceil(math.log(torch.finfo(A.dtype).eps / 2) / math.log(rate))

    def _iterate(
        self,
        batch: torch.Size,
        residual: Callable[[Tensor, Tensor], Tensor],
        bound: Callable[[Tensor, Tensor, Tensor], Tensor],
        max_iter: int | None,
        error_bound: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return super()._iterate(batch, residual, bound, self._steps, error_bound)
