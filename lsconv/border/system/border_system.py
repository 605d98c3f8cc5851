"""A block-circulant operator restricted to a border, solved by iteration.

Conjugate gradients, or GMRES, with the Schwarz preconditioner of :mod:`lsconv.border.system.schwarz`. Where factors of
the whole border would cost no more, by :mod:`lsconv.border.system.cost_model`, the system says that it has been
outgrown.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lsconv.border.border_set import Border
from lsconv.border.direct.cost import Cost
from lsconv.border.free_memory import allowed_bytes
from lsconv.border.system.cost_model import FIRST_LOOK, Effort
from lsconv.border.system.cuda_graph import RecordedMap, recordable
from lsconv.border.system.grid_product import BorderProduct
from lsconv.border.system.krylov import Pause, conjugate_gradients, gmres
from lsconv.border.system.pruned_fft import PrunedProduct
from lsconv.border.system.recycling import Recycling
from lsconv.border.system.schwarz import Schwarz
from lsconv.border.system.strip_product import Strips
from lsconv.fourier.symbol import FrequencyMatrices

__all__ = ["BorderSystem"]

# Basis vectors of GMRES.
_RESTART = 100
# An iteration that claims to have met its bound may have missed it by this factor.
_ROUNDING = 2.0
# Shapes of vectors for which recordings of the iteration are kept.
_SHAPES = 2
# Where iterating does not arrive the factors may cost this many times what was spent on it.
_LAST_RESORT = 4


class _Product:
    """The operator times border vectors ``(rest, blocks, size)``, the cheapest way."""

    def __init__(self, matrices: FrequencyMatrices, border: Border, strips: Strips | None) -> None:
        self._strips, self._over_grid = strips, BorderProduct(matrices, border)
        self._pruned = PrunedProduct.of(matrices, border) if strips is None else None

    def __call__(self, u: Tensor) -> Tensor:
        if self._strips is not None:
            return self._strips(u)
        if self._pruned is not None and self._pruned.pays(u.shape[0]):
            return self._pruned(u)
        return self._over_grid(u)

    @property
    def nbytes(self) -> int:
        """Bytes of what it keeps, strips apart, which are the preconditioner's."""
        return self._over_grid.nbytes + (0 if self._pruned is None else self._pruned.nbytes)


class _Maps:
    """The operator and its preconditioner, recorded where that pays.

    Args:
        product: the operator.
        preconditioner: its preconditioner.
        record: whether to record them.
    """

    def __init__(self, product: _Product, preconditioner: Callable[[Tensor], Tensor], *, record: bool) -> None:
        self.apply: Callable[[Tensor], Tensor] = RecordedMap(product) if record else product
        self.precondition = RecordedMap(preconditioner) if record else preconditioner


class BorderSystem:
    """The system on the border.

    Args:
        matrices: the block-circulant operator, Hermitian.
        border: the cells it is restricted to.
        effort: its work, which knows the blocks, and whether it is definite.
        crossings: precondition also the crossings of the border's slabs.
        restricted: precondition by the restricted Schwarz method, which needs GMRES.
        spare_bytes: what factors may take; None: 60 % of what is free then.
        direct: factorise the whole border instead of iterating.
        cost: that of the factors of the whole border, for each block.

    Attributes:
        outgrown: whether the factors of the whole border are the way to go on.
    """

    def __init__(
        self,
        matrices: FrequencyMatrices,
        border: Border,
        effort: Effort,
        *,
        crossings: bool,
        restricted: bool,
        spare_bytes: int | None,
        direct: bool,
        cost: Cost,
    ) -> None:
        self.matrices, self.border, self.outgrown = matrices, border, False
        self._spare_bytes = spare_bytes
        self.effort, definite = effort, effort.definite
        self.schwarz = Schwarz(
            matrices,
            border,
            definite=definite,
            iteration=effort.iteration(1),
            crossings=crossings,
            restricted=restricted,
            whole=direct,
        )
        if self.schwarz.strips is not None:
            self.effort.cells = max(2, self.schwarz.strips.work // matrices.rows)
        self._flexible = self.schwarz.restricted or not definite  # by GMRES
        self._product = _Product(matrices, border, self.schwarz.strips)
        dtype = matrices.matrices.dtype
        item = (dtype.to_real() if matrices.grid.real else dtype.to_complex()).itemsize
        fits = spare_bytes is None or 2 * _RESTART * effort.blocks * border.size * item <= spare_bytes
        self._recycling = Recycling(_RESTART if fits else 0)
        self._maps: dict[torch.Size, _Maps] = {}  # recorded, by the shape of the vectors, the latest last
        self._cost = cost if self.schwarz.factors is None else None  # None: they are not to be made

    def __call__(self, u: Tensor) -> Tensor:
        """The operator times border vectors ``(rest, blocks, size)``."""
        return self._product(u)

    def solve(self, b: Tensor, tolerance: Tensor | float, max_iter: int, start: Tensor | None) -> tuple[Tensor, Tensor]:
        """The border unknowns to a relative residual of ``tolerance``, from ``start``, and the iterations.

        None of them where the system is :attr:`outgrown`.
        """
        cost = self._cost
        if cost is not None and self.effort.overdue(cost):
            self._outgrow(cost)
        if self.outgrown:
            return torch.zeros_like(b), torch.zeros(b.shape[:2], dtype=torch.int64, device=b.device)
        u, iterations = self._iterate(b, tolerance, max_iter, start)
        if cost is not None:
            self.effort.remember(int(iterations.max()), b.shape[0], cost)
        return u, iterations

    def _iterate(
        self, b: Tensor, tolerance: Tensor | float, max_iter: int, start: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        r = b if start is None else b - self(start)
        bound = tolerance * torch.linalg.vector_norm(b, dim=-1, keepdim=True)
        norm = torch.linalg.vector_norm(r, dim=-1, keepdim=True)
        left = torch.where(norm > bound, bound / norm.clamp_min(torch.finfo(norm.dtype).tiny), 2.0)
        maps, check_every, cost = self._take_maps(b), 1 if b.device.type == "cpu" else 10, self._cost
        pause = None if cost is None else Pause(FIRST_LOOK, functools.partial(self._ends, cost, b.shape[0]))
        if self._flexible:
            u, count = gmres(
                maps.apply, maps.precondition, r, left, max_iter, check_every, _RESTART, pause, self._recycling
            )
        else:
            u, count = conjugate_gradients(maps.apply, maps.precondition, r, left, max_iter, check_every, pause)
        self._keep_maps(b, maps)
        u, taken = (u if start is None else start + u), int(count.max())
        if cost is not None and not self.outgrown and _RESTART <= taken < max_iter:
            missed = torch.linalg.vector_norm(b - self(u), dim=-1, keepdim=True) > _ROUNDING * bound
            affordable = self.effort.factors(cost) <= _LAST_RESORT * self.effort.iteration(b.shape[0]) * taken
            if affordable and bool(missed.any()):
                self._outgrow(cost)
        return u, count

    def refuse_factors(self) -> None:
        """Iterate, whatever that costs."""
        self._cost, self.outgrown = None, False

    def maps(self, b: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """The operator and its preconditioner as an iteration on vectors like ``b`` calls them; the caller's own."""
        maps = self._take_maps(b)
        return maps.apply, maps.precondition

    def _ends(self, cost: Cost, rest: int, done: int, expected: float) -> bool:
        """Whether factors take over after ``done`` iterations."""
        if self.effort.ends(cost, rest, done, expected):
            self._outgrow(cost)
        return self.outgrown

    def _take_maps(self, b: Tensor) -> _Maps:
        """What an iteration on ``b`` calls, by one thread at a time."""
        cells = self.matrices.rows * math.prod(self.matrices.grid.sizes)
        record = recordable(b, b.shape[0] * b.shape[1] * cells * b.element_size())
        kept = self._maps.pop(b.shape, None) if record else None
        return kept or _Maps(self._product, self.schwarz, record=record)

    def _keep_maps(self, b: Tensor, maps: _Maps) -> None:
        """For the next vectors of that shape."""
        if isinstance(maps.apply, RecordedMap):
            others = [(shape, other) for shape, other in self._maps.items() if shape != b.shape]
            self._maps = dict([*others, (b.shape, maps)][-_SHAPES:])

    def __getstate__(self) -> dict[str, Any]:
        """All but recordings, which cannot be copied."""
        return {**self.__dict__, "_maps": {}}

    @property
    def work_vectors(self) -> int:
        """How many border vectors an iteration keeps for a right-hand side."""
        return 2 * _RESTART if self._flexible else 4

    def _outgrow(self, cost: Cost) -> None:
        """Go over to the factors of the whole border, if there is memory for them."""
        self.outgrown = self.effort.bytes(cost) <= allowed_bytes(self._spare_bytes, self.matrices.matrices.device)
        if not self.outgrown:
            self._cost = None

    @property
    def nbytes(self) -> int:
        """Bytes of the operator and of what preconditions it."""
        return sum(part.nbytes for part in (self.matrices, self.schwarz, self._product, self._recycling))
