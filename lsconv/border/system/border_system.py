"""A block-circulant operator restricted to a border, solved the way that has been the cheapest so far.

By iteration, conjugate gradients or GMRES with the Schwarz preconditioner of :mod:`lsconv.border.system.schwarz`; where
a solve turns out slow the crossings of the preconditioner are widened, for good, and where the factors of the whole
border would have cost no more the system says that it has been outgrown (:mod:`lsconv.border.system.cost_model`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lsconv.border.border_set import Border
from lsconv.border.direct.border_inverse import Cost, whole_cost
from lsconv.border.memory import allowed_bytes
from lsconv.border.system.cost_model import GLANCE, Effort, Way
from lsconv.border.system.cuda_graph import RecordedMap, recordable
from lsconv.border.system.grid_product import BorderProduct
from lsconv.border.system.krylov import Pause, conjugate_gradients, gmres
from lsconv.border.system.pruned_fft import PrunedProduct
from lsconv.border.system.recycling import Recycling
from lsconv.border.system.schwarz import Schwarz, crossing_unknowns
from lsconv.border.system.strip_product import Strips
from lsconv.fourier.symbol import FrequencyMatrices

__all__ = ["BorderSystem"]

# Basis vectors of GMRES.
_RESTART = 100
# An iteration that claims to have met its bound may have missed it by this factor.
_ROUNDING = 2.0
# From this damping on, by definiteness, dense matrices factorised in float32 cost no iteration more. The condition of
# the definite systems is damp^-2, of the others damp^-1.
_LEAST_DAMP_IN_SINGLE = {True: 3e-3, False: 1e-5}
# Shapes of vectors for which recordings of the iteration are kept.
_SHAPES = 2
# Of factors that cannot be made.
_NEVER = Cost(0.0, 0.0, 0)


class _Turn:
    """Ends an iteration for another way.

    Args:
        choose: the way, given how many iterations have been done, how many are to come, and their rate.

    Attributes:
        way: for which it was ended.
    """

    def __init__(self, choose: Callable[[int, float, float], Way]) -> None:
        self._choose, self.way = choose, Way.NONE

    def __call__(self, done: int, expected: float, rate: float) -> bool:
        """Whether it ends."""
        self.way = self._choose(done, expected, rate)
        return self.way is not Way.NONE


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
        preconditioner: as it is now: wider crossings are another one.
        record: whether to record them.
    """

    def __init__(self, product: _Product, preconditioner: Callable[[Tensor], Tensor], *, record: bool) -> None:
        self.current = preconditioner
        self.apply: Callable[[Tensor], Tensor] = RecordedMap(product) if record else product
        self.precondition = RecordedMap(preconditioner) if record else preconditioner


class BorderSystem:
    """The system on the border.

    Args:
        matrices: the block-circulant operator, Hermitian.
        border: the cells it is restricted to.
        blocks: independent systems, also where one block of ``matrices`` serves all.
        definite: whether it is positive definite on the border.
        damp: the least damping of ``matrices``, relative to sigma_max.
        crossings: precondition also the crossings of the border's slabs.
        restricted: precondition by the restricted Schwarz method, which needs GMRES.
        spare_bytes: what wider crossings and factors may take; None: 60 % of what is free then.
        direct: factorise the whole border instead of iterating.
        shortest: the border on the shortest grid, on which it would be factorised.
        exchange: the sums of the reflection that takes the first component of ``matrices`` to the second.

    Attributes:
        outgrown: whether the factors of the whole border are the way to go on.
    """

    def __init__(
        self,
        matrices: FrequencyMatrices,
        border: Border,
        *,
        blocks: int,
        definite: bool,
        damp: float,
        crossings: bool,
        restricted: bool,
        spare_bytes: int | None,
        direct: bool,
        shortest: Callable[[], Border],
        exchange: list[int] | None = None,
    ) -> None:
        self.matrices, self.border, self.outgrown = matrices, border, False
        self._spare_bytes = spare_bytes
        single = damp >= _LEAST_DAMP_IN_SINGLE[definite] and torch.finfo(matrices.matrices.dtype).bits == 64
        self.effort = Effort(
            blocks,
            math.prod(matrices.grid.sizes),
            matrices.rows,
            definite=definite,
            damp=damp,
            single=single,
            exchanged=exchange is not None,
        )
        self.schwarz = Schwarz(
            matrices,
            border,
            definite=definite,
            single=single,
            crossings=crossings,
            restricted=restricted,
            unknowns=crossing_unknowns(self.effort.first_crossing),
            spare_bytes=spare_bytes,
            whole=direct,
            exchange=exchange,
        )
        if self.schwarz.strips is not None:
            self.effort.cells = max(2, self.schwarz.strips.work // matrices.rows)
        self._flexible = self.schwarz.restricted or not definite  # by GMRES
        self._product = _Product(matrices, border, self.schwarz.strips)
        dtype = matrices.matrices.dtype
        item = (dtype.to_real() if matrices.grid.real else dtype.to_complex()).itemsize
        fits = spare_bytes is None or 2 * _RESTART * blocks * border.size * item <= spare_bytes
        self._recycling = Recycling(_RESTART if fits else 0)
        self._shortest, self._definite, self._exchanged = shortest, definite, exchange is not None
        self._maps: dict[torch.Size, _Maps] = {}  # recorded, by the shape of the vectors, the latest last
        # what the factors of the whole border cost; None until an iteration takes long enough to ask
        self._whole = _NEVER if self.schwarz.whole else None

    def __call__(self, u: Tensor) -> Tensor:
        """The operator times border vectors ``(rest, blocks, size)``."""
        return self._product(u)

    def solve(self, b: Tensor, tolerance: Tensor | float, max_iter: int, start: Tensor | None) -> tuple[Tensor, Tensor]:
        """The border unknowns to a relative residual of ``tolerance``, from ``start``, and the iterations.

        None of them where the system is :attr:`outgrown`.
        """
        way = self._way()
        if self.effort.overdue:
            self._outgrow()
        if self.outgrown:
            return torch.zeros_like(b), torch.zeros(b.shape[:2], dtype=torch.int64, device=b.device)
        if self.effort.due(way) and self.schwarz.strengthen():
            self.effort.widened()
        u, iterations = self._iterate(b, tolerance, max_iter, start)
        self.effort.remember(int(iterations.max()), b.shape[0], self._whole)
        return u, iterations

    def _iterate(
        self, b: Tensor, tolerance: Tensor | float, max_iter: int, start: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        r = b if start is None else b - self(start)
        u = start
        bound = tolerance * torch.linalg.vector_norm(b, dim=-1, keepdim=True)
        done = torch.zeros(b.shape[:2], dtype=torch.int64, device=b.device)
        effort, rest, maps = self.effort, b.shape[0], self._take_maps(b)
        check_every = 1 if b.device.type == "cpu" else 10
        widens = True  # until a widening is refused, for lack of memory or of more border
        while True:
            norm = torch.linalg.vector_norm(r, dim=-1, keepdim=True)
            left = torch.where(norm > bound, bound / norm.clamp_min(torch.finfo(norm.dtype).tiny), 2.0)
            already = int(done.max())
            remaining = max_iter - already
            turn = _Turn(functools.partial(self._choose, rest, already, widens))
            pause = Pause(GLANCE, turn) if self._whole is None or self._way(widens) is not Way.NONE else None
            if self._flexible:
                step, count = gmres(
                    maps.apply, maps.precondition, r, left, remaining, check_every, _RESTART, pause, self._recycling
                )
            else:
                step, count = conjugate_gradients(maps.apply, maps.precondition, r, left, remaining, check_every, pause)
            u, done = (step if u is None else u + step), done + count
            taken = int(count.max())
            effort.spent += taken * effort.iteration(rest)
            paused = turn.way is not Way.NONE
            if (taken < min(remaining, _RESTART) and not paused) or taken >= remaining:
                break
            r = b - self(u)
            if not bool((torch.linalg.vector_norm(r, dim=-1, keepdim=True) > _ROUNDING * bound).any()):
                break
            way = turn.way if paused else self._way(widens)
            if way is Way.WHOLE and (paused or effort.worth(int(done.max()), rest)):
                self._outgrow()
                if self.outgrown:
                    break
            elif way is Way.CROSSING:
                widens = self.schwarz.strengthen()
                if widens:
                    effort.widened()
                    maps = self._take_maps(b, maps)
                elif not paused:
                    break
            elif not paused:
                break
        self._keep_maps(b, maps)
        return u, done

    def maps(self, b: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """The operator and its preconditioner as an iteration on vectors like ``b`` calls them; the caller's own."""
        maps = self._take_maps(b)
        return maps.apply, maps.precondition

    def _choose(self, rest: int, already: int, widens: bool, done: int, expected: float, rate: float) -> Way:
        """The way from here, ``done`` iterations after the ``already`` ones of this solve."""
        if self._whole is None:
            self._whole = whole_cost(
                self.matrices, self.border, self._shortest(), definite=self._definite, exchanged=self._exchanged
            )
        self._way(widens)
        return self.effort.choose(rest, already, done, expected, rate)

    def _take_maps(self, b: Tensor, kept: _Maps | None = None) -> _Maps:
        """What an iteration on ``b`` calls, by one thread at a time; ``kept`` if that is it still."""
        cells = self.matrices.rows * math.prod(self.matrices.grid.sizes)
        record = recordable(b, b.shape[0] * b.shape[1] * cells * b.element_size())
        preconditioner = self.schwarz.current
        if record:
            kept = kept or self._maps.pop(b.shape, None)
            if kept is not None and kept.current is preconditioner:
                return kept
        return _Maps(self._product, preconditioner, record=record)

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

    def _way(self, widens: bool = True) -> Way:
        """What comes after the iteration as it is."""
        whole = 0.0 if self._whole is None else self.effort.whole(self._whole)
        return self.effort.next_way(self.schwarz.stronger_unknowns if widens else 0, whole)

    def _outgrow(self) -> None:
        """Go over to the factors of the whole border, if there is memory for them and what goes with them."""
        matrices = self.matrices.matrices
        assert self._whole is not None
        needed = len(matrices) * self._whole.entries * matrices.element_size() + 4 * self.nbytes
        self.outgrown = needed <= allowed_bytes(self._spare_bytes, matrices.device)
        if not self.outgrown:
            self._whole = _NEVER

    @property
    def nbytes(self) -> int:
        """Bytes of the operator and of what preconditions it."""
        return sum(part.nbytes for part in (self.matrices, self.schwarz, self._product, self._recycling))
