r"""ADMM's quadratic step in the operators themselves: through the border, or by conjugate gradients.

.. math:: (A^HA + \rho \textstyle\sum_j K_j^H K_j)\, x = A^Hy + \rho \sum_j K_j^H r_j

does not split the quadratic data term. It serves operators that are no crops of block-circulant ones, and
plug-and-play, whose denoiser costs more than the step. Where A and the K are convolutions it is the border solve of
:mod:`lsconv.border.stacked_plan`, which keeps its factors and starts from the border unknowns of the last step;
otherwise it is done by conjugate gradients. The small shift mu that the factors need is compensated by a proximal term
:math:`\tfrac{\mu}{2}\|x - x_k\|^2`, so that the limit is exact.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from lsconv.border.stacked_plan import StackedPlan
from lsconv.errors import MethodError, PlanMemoryError, unreported
from lsconv.fourier.circulant_preconditioner import CirculantPreconditioner
from lsconv.inverse.admm.proximal import Term
from lsconv.krylov.cg import cg
from lsconv.krylov.loop.batched_scalars import ItemSpace
from lsconv.operators.algebra import VStack
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import over_items
from lsconv.operators.elementary import FromFunctions
from lsconv.operators.varying_convolution import VaryingConvolution
from lsconv.tiled.schwarz import SchwarzInverse

__all__ = ["NormalStep"]

# Conjugate gradients reduce the residual of the last x by this factor in every step.
_REDUCTION = 1e-2


class NormalStep:
    """``(A^H A + rho sum K_j^H K_j)^{-1}``, or without A ``(sum rho_j K_j^H K_j)^{-1}``.

    Args:
        A: operator of the quadratic data term; None: there is none.
        y: its data, ``(*batch, *out_shape)``.
        terms: the terms that are split off; with A all of them have the same penalty parameter.
        x: the start, ``(*batch, *in_shape)``.
    """

    def __init__(self, A: LinearOperator | None, y: Tensor | None, terms: Sequence[Term], x: Tensor) -> None:
        self.A, self.terms, self.x = A, list(terms), x
        self.one_penalty = A is not None
        self.operators = [term.operator for term in terms]
        self.images = [_OperatorImage() for _ in terms]
        self.h = None if A is None or y is None else A.adjoint(y)
        self.start: Tensor | None = None
        self.plan: StackedPlan | None = None

    def begin(self) -> list[Tensor]:
        """The images of the x to start from."""
        return [K.apply(self.x) for K in self.operators]

    def set_penalties(self, rho: Sequence[Tensor]) -> None:
        """Set new penalty parameters, and make the factors for them."""
        self.rho, self.plan = list(rho), None
        roots = [value.sqrt().to(K.dtype) for value, K in zip(rho, self.operators, strict=True)]
        if self.A is None:
            self.stack = VStack([K * root for K, root in zip(self.operators, roots, strict=True)])
        else:
            L = self.operators[0] if len(self.operators) == 1 else VStack(self.operators)
            self.stack = VStack([self.A, L * roots[0]])
            with contextlib.suppress(MethodError, PlanMemoryError):
                self.plan = StackedPlan(self.A, L, rho[0].sqrt())
        if self.plan is None:
            self.normal = self.stack.H @ self.stack
            self.preconditioner: LinearOperator | None = None
            with contextlib.suppress(MethodError):
                if isinstance(self.A, VaryingConvolution):
                    root = rho[0].detach().double().sqrt()
                    tiles = SchwarzInverse(self.A, root, L)
                    shape, apply = self.A.in_shape, lambda g: tiles(g, 1e-3)
                    self.preconditioner = FromFunctions(
                        shape, shape, apply, apply, dtype=self.A.dtype, device=self.A.device
                    )
                else:
                    self.preconditioner = CirculantPreconditioner(self.stack, side="solution")
            return
        self.tolerance = torch.finfo(self.plan.A.dtype).eps ** 0.5

    def step(self, reflected: Sequence[Tensor], relaxation: float) -> list[Tensor]:
        """The images of the minimiser, given half of the reflected images."""
        space = ItemSpace(self.operators[0].in_shape, self.x.dtype, self.x.device)
        g = torch.zeros_like(self.x) if self.h is None else self.h
        for K, rho, r in zip(self.operators, self.rho, reflected, strict=True):
            g = g + space.broadcast(2 * rho) * K.adjoint(r)
        self.x = self._solve(g)
        return [K.apply(self.x) for K in self.operators]

    def _solve(self, g: Tensor) -> Tensor:
        """Solve the normal equations for ``g`` to a few digits, starting from the previous x."""
        if self.plan is None:
            with unreported():
                gradient = g - self.normal.apply(self.x)
                return self.x + cg(self.normal, gradient, M=self.preconditioner, rtol=_REDUCTION, max_iter=50).x
        square = self.plan.unit.double() ** 2
        g = g / over_items(square, len(self.stack.in_shape)).to(g.dtype)
        inverse = self.plan.inverse  # its factors may be of higher precision than the data
        inverse.factorise_if_cheaper(tuple(g.shape[: g.ndim - len(self.stack.in_shape)]))
        embedding = inverse.embedding
        mu = inverse.mu.expand(embedding.blocks).reshape(*embedding.batch_shape, embedding.groups)
        g = g + self._per_channel(mu, self.x) * self.x
        x, _, self.start = inverse.solve_from(g.to(inverse.convolution.dtype), self.tolerance, 200, self.start)
        return x.to(g.dtype)

    def _per_channel(self, values: Tensor, x: Tensor) -> Tensor:
        """``(*batch, groups)`` shaped to multiply x."""
        channels = self.stack.in_shape[0]
        per_channel = values.repeat_interleave(channels // values.shape[-1], dim=-1).to(x.dtype)
        return over_items(per_channel, len(self.stack.in_shape) - 1)


class _OperatorImage:
    """A split image without further cells: ``K_j x`` itself."""

    def proximal(self, term: Term, s: Tensor, rho: Tensor, out: Tensor) -> None:
        """The proximal step of ``s`` into ``out``."""
        term.prox(s, rho, out)

    def item(self, z: Tensor) -> Tensor:
        """All of ``z``."""
        return z
