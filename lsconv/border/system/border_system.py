r"""The system on a border, solved by iteration with a Schwarz preconditioner, restricted or additive.

The border is the set of grid cells (channel, position) that a truncation removes. Near the faces of the image it looks
the same from cell to cell, so a block-circulant operator Q restricted to

* the cells within the border's width along one axis (a *strip*: in 2-D, the border rows over the whole width) or
* the border cells near the corner where several strips cross

is block-circulant along the remaining axes: an FFT along these leaves one dense matrix per frequency, inverted once.
The preconditioner adds the inverses of all these subdomains,

.. math:: M^{-1} = \sum_T R_T^T D_T\, Q_{TT}^{-1} R_T, \quad T \text{ over the non-empty subsets of axes.}

Strips alone neglect the coupling around the corners; including the corners halves the iterations. With :math:`D_T = I`
(*additive*) :math:`M^{-1}` is Hermitian, which conjugate gradients need, and overlapping corrections are counted more
than once. *Restricted*, the :math:`D_T` are a partition of the border: every cell takes its correction from one
subdomain, cells within half of the overlap of a corner from that corner. This halves the iterations again where the
corners limit them, and it is necessary for an indefinite Q, for which overlapping corrections cancel.

Cai and Sarkis, "A restricted additive Schwarz preconditioner for general sparse linear systems", SIAM J. Sci. Comput.
21 (1999).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import Tensor

from lsconv.border.border_set import Border, BorderEntries, gathered
from lsconv.border.cost_model import CostModel, Limits
from lsconv.border.factored_capacitance import FactoredCapacitance
from lsconv.border.stack_system import StackRows
from lsconv.border.system.border_krylov import RESTART, Allowance, Recycling, border_cg, border_gmres
from lsconv.fourier.batched_linalg import DenseInverse, inverse_of_hermitian
from lsconv.fourier.frequency_matrices import FrequencyMatrices, Grid

__all__ = ["BorderProblem", "BorderSystem", "Schwarz", "Subdomain", "SubdomainSum"]


@dataclass(frozen=True)
class BorderProblem:
    """A block-circulant operator restricted to a border.

    Attributes:
        Q: the Hermitian operator.
        border: the cells to which it is restricted.
        model: the cost model, with the number of blocks and whether Q is positive definite on the border.
        restricted: every cell takes its correction from one subdomain; False: additive.
        limits: on the preconditioner, and the bytes that the recycled subspace may take.
        stack: the rows of a stack of which Q is the capacitance by factors.
    """

    Q: FrequencyMatrices | FactoredCapacitance
    border: Border
    model: CostModel
    restricted: bool = False
    limits: Limits = field(default_factory=Limits)
    stack: StackRows | None = None

    def product(self, u: Tensor) -> Tensor:
        """``(Q u)`` on the border for border vectors ``(rhs, blocks, size)``, over the whole grid."""
        if self.stack is not None:
            return self.stack.product(u)
        assert isinstance(self.Q, FrequencyMatrices)
        product = self.border.gather(self.Q.on_grid(self.border.scatter(u)))
        return product if self.border.diagonal is None else product.addcmul_(self.border.diagonal, u)


class Subdomain:
    """A set of border cells on which Q is block-circulant, with the inverse of Q restricted to it.

    Args:
        index: the numbers of its border cells.
        shape: of the cells: those across the subdomain, and the other axes, along which it is block-circulant.
        inverse: the inverse there.
        axes: the axes across it.
    """

    def __init__(
        self,
        index: Tensor,
        shape: tuple[int, ...],
        inverse: DenseInverse | FrequencyMatrices,
        axes: tuple[int, ...] = (),
    ) -> None:
        self.index, self.shape, self.inverse, self.axes = index, shape, inverse, axes

    def __call__(self, cells: Tensor) -> Tensor:
        """The inverse times the values of the cells, ``(rhs, blocks, size)``."""
        if isinstance(self.inverse, FrequencyMatrices):
            return self.inverse.on_grid(cells.unflatten(-1, self.shape)).flatten(2)
        return self.inverse(cells)


class SubdomainSum:
    """The sum of the corrections of subdomains, with one gather and one scatter for all of them.

    Args:
        subdomains: those that are added.
        size: of the border.
        owner: for every border cell the number of the subdomain whose correction it takes; None: it takes all.
    """

    def __init__(self, subdomains: Sequence[Subdomain], size: int, owner: Tensor | None) -> None:
        self._index = torch.cat([subdomain.index for subdomain in subdomains])
        # the index of the correction of each cell in the concatenation of all corrections
        self._places: Tensor | None = None
        self._subdomains = list(subdomains)
        self._lengths = [len(subdomain.index) for subdomain in subdomains]
        if owner is not None:
            number = torch.repeat_interleave(torch.tensor(self._lengths))
            index = self._index.cpu()
            chosen = (owner[index] == number).nonzero().flatten()
            self._places = (
                torch.empty(size, dtype=torch.int64).index_copy_(0, index[chosen], chosen).to(self._index.device)
            )

    @property
    def nbytes(self) -> int:
        """Bytes of its indices."""
        return self._index.nbytes + (0 if self._places is None else self._places.nbytes)

    def __call__(self, r: Tensor) -> Tensor:
        """The sum for border vectors ``(rhs, blocks, size)``."""
        cells = gathered(r, self._index).split(self._lengths, dim=-1)
        z = torch.cat([solve(values) for solve, values in zip(self._subdomains, cells, strict=True)], dim=-1)
        if self._places is not None:
            return gathered(z, self._places)
        return torch.zeros_like(r).index_add_(-1, self._index, z)


class Schwarz:
    """The Schwarz preconditioner of a border problem.

    Args:
        problem: the border problem to be preconditioned.
    """

    def __init__(self, problem: BorderProblem) -> None:
        self.problem, self.border = problem, problem.border
        self.subdomains: list[Subdomain] = []
        self.sum: SubdomainSum | None = None  # adds the corrections of the subdomains
        self.full_inverse: DenseInverse | None = None  # the inverse on the whole border, if that is small
        border, Q, limits = problem.border, problem.Q, problem.limits
        entries = border.size**2 * Q.blocks
        small = border.size <= limits.dense_unknowns and entries <= 8 * limits.dense_unknowns**2
        border_entries = border.entries(Q)
        if small:
            self.full_inverse = DenseInverse(border_entries.dense(), definite=problem.model.definite)
            return
        numbering = border.numbering()
        used = [a for a, positions in enumerate(border.on_axis) if positions.any()]
        for a in used:
            self.subdomains.append(self._subdomain(border_entries, numbering, (a,), border.cross_section((a,), 0)))
        crossed = [axes for n in range(2, len(used) + 1) for axes in combinations(used, n)] if limits.corners else []
        self._overlaps = {axes: self._overlap(axes) for axes in crossed}
        for axes, overlap in self._overlaps.items():
            if overlap:
                self.subdomains.append(
                    self._subdomain(border_entries, numbering, axes, border.cross_section(axes, overlap))
                )
        for cells in border.clusters:
            self.subdomains.append(self._subdomain(border_entries, numbering, tuple(range(len(border.grid))), cells))
        self.sum = SubdomainSum(self.subdomains, border.size, self.owners() if problem.restricted else None)

    def _subdomain(
        self, border_entries: BorderEntries, numbering: Tensor, axes: tuple[int, ...], cells: Tensor
    ) -> Subdomain:
        """The subdomain of ``cells``, rows of channel, *positions along the axes*, over the whole of the other axes."""
        definite, grid, device = self.problem.model.definite, self.border.grid, border_entries.Q.device
        index = border_index(numbering, axes, cells)
        matrices = border_entries.between(axes, cells).contiguous()
        others = Grid(tuple(n for a, n in enumerate(grid) if a not in axes), real=border_entries.Q.grid.real)
        inverse: DenseInverse | FrequencyMatrices
        if others.sizes:
            inverses = inverse_of_hermitian(matrices, definite=definite)
            inverse = FrequencyMatrices(others, inverses)
        else:
            inverse = DenseInverse(matrices, definite=definite)
        return Subdomain(index.flatten().to(device), tuple(index.shape), inverse, axes)

    def _overlap(self, axes: tuple[int, ...]) -> int:
        """The overlap of a corner, the largest for which its dense factorisation costs no more than two iterations."""
        problem, grid = self.problem, self.border.grid
        limit = problem.limits.corner_unknowns
        if len(grid) == 2:  # in a volume a corner is a line, with one matrix per frequency
            flops = 2 * problem.model.iteration_work(1) / problem.Q.blocks
            limit = max(limit, round((flops * (3 if problem.model.definite else 1.5)) ** (1 / 3)))
        others = math.prod(n for a, n in enumerate(grid) if a not in axes)
        most = min(limit, 2 * limit // math.isqrt(others))
        overlap = min(grid[a] for a in axes) // 4
        while overlap > 0 and self.border.cross_section_size(axes, overlap) > most:
            overlap -= max(1, overlap // 8)
        return overlap

    def owners(self) -> Tensor:
        """The owner of every cell: the last corner within half of whose overlap it lies, or else its first strip."""
        owner, numbering = torch.full((self.border.size,), -1), self.border.numbering()
        parts = len(self.subdomains) - len(self.border.clusters)
        for number, subdomain in enumerate(self.subdomains):
            if len(subdomain.axes) == 1 or number >= parts:
                index = subdomain.index.cpu()
                owner[index] = torch.where(owner[index] < 0, number, owner[index])
            else:
                overlap = self._overlaps[subdomain.axes]
                cells = self.border.cross_section(subdomain.axes, overlap // 2 if overlap > 1 else overlap)
                owner[border_index(numbering, subdomain.axes, cells).flatten()] = number
        return owner

    @property
    def nbytes(self) -> int:
        """Bytes of the inverses and of what goes with them."""
        further = sum(part.nbytes for part in (self.full_inverse, self.sum) if part is not None)
        return further + sum(subdomain.inverse.nbytes for subdomain in self.subdomains)

    def __call__(self, r: Tensor) -> Tensor:
        """``M^{-1} r`` for border vectors ``(rhs, blocks, size)``."""
        apply = self.sum if self.full_inverse is None else self.full_inverse
        assert apply is not None
        return apply(r)


def border_index(numbering: Tensor, axes: tuple[int, ...], cells: Tensor) -> Tensor:
    """The numbers of ``cells`` over the whole of the other axes: ``(cells, *other axes)``."""
    return numbering.movedim([1 + a for a in axes], list(range(1, 1 + len(axes))))[cells.unbind(1)]


class BorderSystem:
    """The system on the border.

    Args:
        problem: the operator, its border, and how it is preconditioned.
    """

    def __init__(self, problem: BorderProblem) -> None:
        self.problem, self.schwarz = problem, Schwarz(problem)
        self._flexible = problem.restricted or not problem.model.definite  # solved by GMRES
        dtype, real = problem.Q.dtype, problem.Q.grid.real
        vectors = 2 * RESTART * problem.model.blocks * problem.border.size
        item = (dtype.to_real() if real else dtype.to_complex()).itemsize
        spare = problem.limits.spare_bytes
        self._recycling = Recycling(RESTART if spare is None or vectors * item <= spare else 0)

    def __call__(self, u: Tensor) -> Tensor:
        """The operator times border vectors ``(rhs, blocks, size)``."""
        return self.problem.product(u)

    def solve(
        self,
        b: Tensor,
        tolerance: Tensor | float,
        max_iter: int,
        start: Tensor | None = None,
        allowance: Allowance | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Solve to a relative residual, and return the unknowns and the iterations of every system.

        Args:
            b: right-hand sides, ``(rhs, blocks, size)``.
            tolerance: the residual relative to b.
            max_iter: limit on the iterations.
            start: the unknowns to start from; None: zeros.
            allowance: the iterations end, not converged, where it is exceeded; None: there is none.
        """
        r = b if start is None else b - self(start)
        bound = tolerance * torch.linalg.vector_norm(b, dim=-1, keepdim=True)
        norm = torch.linalg.vector_norm(r, dim=-1, keepdim=True)
        relative = torch.where(norm > bound, bound / norm.clamp_min(torch.finfo(norm.dtype).tiny), 2.0)
        check_every = 1 if b.device.type == "cpu" else 10
        if self._flexible:
            u, count = border_gmres(
                self, self.schwarz, r, relative, max_iter, check_every, recycling=self._recycling, allowance=allowance
            )
        else:
            u, count = border_cg(self, self.schwarz, r, relative, max_iter, check_every, allowance)
        return u if start is None else start + u, count

    @property
    def work_vectors(self) -> int:
        """The number of border vectors that an iteration keeps for a right-hand side."""
        return 2 * RESTART if self._flexible else 4

    @property
    def nbytes(self) -> int:
        """Bytes of the operator and of its preconditioner."""
        return sum(part.nbytes for part in (self.problem.Q, self.schwarz, self._recycling))
