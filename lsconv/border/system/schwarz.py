r"""The border of a periodic grid, and an additive Schwarz preconditioner for operators restricted to it.

The border is the set of grid cells (channel, position) that a truncation removes. Near the faces of the image it looks
the same from cell to cell, so a block-circulant operator Q restricted to

* the cells within the border's width along one axis (a *slab*: in 2-D, the border rows over the whole width) or
* the border cells near the crossing of several slabs (an *edge*, a *corner*)

is block-circulant along the remaining axes: an FFT along these leaves one dense matrix per frequency, inverted once.
The preconditioner adds the inverses of all of them,

.. math:: M^{-1} = \sum_T R_T^T D_T\, Q_{TT}^{-1} R_T, \quad T \text{ over the non-empty subsets of axes.}

Slabs alone leave the coupling around the crossings, which is what the iteration then spends its time on: with the
corners, half of the iterations remain. With :math:`D_T = I` (*additive*) :math:`M^{-1}` is Hermitian, which conjugate
gradients need, and overlapping corrections are counted more than once. *Restricted*, the :math:`D_T` are a partition of
the border: every cell takes its correction from one patch, a crossing's cells from the crossing as far as half of its
reach. That halves the iterations again where the crossings decide about them, and is what makes the corners work for an
indefinite Q, whose overlapping corrections cancel (Gaussian 9x9, "same", 64², damp 1e-3 of sigma_max, to 1e-9: 24
iterations additive without corners, 9 restricted with them; for asymmetric motion at 1e-2, 224 and 59).

Cai and Sarkis, "A restricted additive Schwarz preconditioner for general sparse linear systems", SIAM J. Sci. Comput.
21 (1999).
"""

from __future__ import annotations

import math
from itertools import combinations

import torch
from torch import Tensor

from lsconv.border.border_set import Border, Kernel
from lsconv.border.direct.dense_inverse import DenseInverse, indefinite_inverse
from lsconv.border.system.strip_product import Slab, Strips
from lsconv.border.system.subdomain_sum import Correction, PatchSum
from lsconv.fourier.symbol import FrequencyMatrices, Grid, hermitian_inverse

__all__ = ["Schwarz", "dense_entries"]

# A crossing is as wide as this reach while its dense matrix has no more unknowns than this, or than are factorised in
# the time of two iterations.
_CROSSING_UNKNOWNS = 640
_CROSSING_REACH = 64
# A border this small is one dense patch, whose inverse is exact; the second limit is on the entries of all blocks.
_DENSE_UNKNOWNS = 1024
_DENSE_ENTRIES = 2**23


def dense_entries(ndim: int) -> int:
    """An upper bound of the entries of the dense patches of one block on a grid of ``ndim`` dimensions."""
    return max(_DENSE_UNKNOWNS, 2 * _CROSSING_UNKNOWNS * ndim) ** 2


class _Patch(Correction):
    """One term of the Schwarz sum: a set of border cells on which Q is block-circulant, and the inverse there."""

    def __init__(
        self,
        kernel: Kernel,
        border: Border,
        numbering: Tensor,
        axes: tuple[int, ...],
        cells: Tensor,
        *,
        definite: bool,
        product: bool = False,
    ) -> None:
        self.axes = axes
        self.slab: Slab | None = None
        index = border_index(numbering, axes, cells)
        inverse: DenseInverse | FrequencyMatrices
        matrices = kernel.between(axes, cells).contiguous()
        others = Grid(tuple(n for a, n in enumerate(border.grid) if a not in axes), real=kernel.Q.grid.real)
        # of the products too, before the inverse overwrites them
        if product:
            self.slab = Slab(index.to(matrices.device), FrequencyMatrices(others, matrices.clone()))
        if others.sizes:
            inverses = hermitian_inverse(matrices) if definite else indefinite_inverse(matrices)
            inverse = FrequencyMatrices(others, inverses)
        else:
            inverse = DenseInverse(matrices, definite=definite)
        super().__init__(index.flatten().to(kernel.Q.matrices.device), tuple(index.shape), inverse)


def border_index(numbering: Tensor, axes: tuple[int, ...], cells: Tensor) -> Tensor:
    """The numbers of ``cells`` over the whole of the other axes: ``(cells, *other axes)``."""
    return numbering.movedim([1 + a for a in axes], list(range(1, 1 + len(axes))))[cells.unbind(1)]


class Schwarz:
    """The Schwarz preconditioner of ``Q`` restricted to a border.

    Args:
        matrices: the block-circulant operator Q, Hermitian.
        border: the cells it is restricted to.
        definite: True when Q is positive definite on the border; the additive preconditioner then is too.
        iteration: flops in the time of one iteration.
        crossings: include the crossings of the slabs.
        restricted: every cell takes its correction from one patch; False: additive.
        whole: invert Q on the whole border, whatever its size.
    """

    def __init__(
        self,
        matrices: FrequencyMatrices,
        border: Border,
        *,
        definite: bool,
        iteration: float = 0.0,
        crossings: bool = True,
        restricted: bool = False,
        whole: bool = False,
    ) -> None:
        self.matrices, self.border = matrices, border
        affordable = 2 * iteration / len(matrices.matrices) * (3 if definite else 1.5)  # flops of Cholesky or LU
        # in volumes a crossing is a line of such matrices
        self._limit = max(_CROSSING_UNKNOWNS, round(affordable ** (1 / 3)) if len(border.grid) == 2 else 0)
        self.definite, self.restricted = definite, restricted
        self.patches: list[_Patch] = []
        self.sum: PatchSum | None = None  # of their corrections
        self.strips: Strips | None = None  # the product with Q on the border, where it needs no whole grid
        self.factors: DenseInverse | None = None  # of the whole border
        small = border.size <= _DENSE_UNKNOWNS and border.size**2 * matrices.matrices.shape[0] <= _DENSE_ENTRIES
        kernel = border.kernel(matrices)
        if whole or small:
            self.factors = DenseInverse(kernel.dense(border), definite=definite)
            return
        self._numbering = border.numbering()
        used = [a for a, members in enumerate(border.members) if members.any()]
        product = matrices.elementwise and len(border.grid) == 2 and border.cellwise
        self.patches = [self._patch(kernel, (a,), border.crossing((a,), 0), product=product) for a in used]
        if product:
            self._find_strips(kernel)
        crossed = [axes for n in range(2, len(used) + 1) for axes in combinations(used, n)] if crossings else []
        self._reaches = {axes: self._reach(axes) for axes in crossed}
        self._cross(kernel)

    def _patch(self, kernel: Kernel, axes: tuple[int, ...], cells: Tensor, *, product: bool = False) -> _Patch:
        return _Patch(kernel, self.border, self._numbering, axes, cells, definite=self.definite, product=product)

    def _find_strips(self, kernel: Kernel) -> None:
        """The product along the strips, which makes iterations cheap and wide crossings a waste."""
        slabs = [patch.slab for patch in self.patches if patch.slab is not None]
        for patch in self.patches:
            patch.slab = None
        self.strips = Strips.of(
            kernel.whole(), self._numbering, self.border.members, slabs, real=self.matrices.grid.real
        )

    def _cross(self, kernel: Kernel) -> None:
        """Make the crossings, and share out the cells."""
        patches = [patch for patch in self.patches if len(patch.axes) == 1]
        for axes, reach in self._reaches.items():
            if reach:
                patches.append(self._patch(kernel, axes, self.border.crossing(axes, reach)))
        self.patches = patches
        self.sum = PatchSum(patches, self.border.size, self._owners(patches) if self.restricted else None)

    def _reach(self, axes: tuple[int, ...]) -> int:
        reach = min(_CROSSING_REACH, min(self.border.grid[a] for a in axes) // 4)
        others = math.prod(n for a, n in enumerate(self.border.grid) if a not in axes)
        most = min(self._limit, 2 * self._limit // math.isqrt(others))
        while reach > 0 and self.border.crossing_size(axes, reach) > most:
            reach -= max(1, reach // 8)
        return reach

    def _owners(self, patches: list[_Patch]) -> Tensor:
        """A cell belongs to the last crossing within half of whose reach it lies, or else to its first slab."""
        owner = torch.full((self.border.size,), -1)
        for number, patch in enumerate(patches):
            if len(patch.axes) == 1:
                index = patch.index.cpu()
                owner[index] = torch.where(owner[index] < 0, number, owner[index])
            else:
                reach = self._reaches[patch.axes]
                cells = self.border.crossing(patch.axes, reach // 2 if reach > 1 else reach)
                owner[border_index(self._numbering, patch.axes, cells).flatten()] = number
        return owner

    @property
    def nbytes(self) -> int:
        """Bytes of the inverses and of what goes with them."""
        more = sum(part.nbytes for part in (self.strips, self.factors, self.sum) if part is not None)
        return more + sum(patch.inverse.nbytes for patch in self.patches)

    def __call__(self, r: Tensor) -> Tensor:
        """``M^{-1} r`` for border vectors ``(rest, blocks, size)``."""
        apply = self.sum if self.factors is None else self.factors
        assert apply is not None
        return apply(r)
