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
from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor

from lsconv.border.border_set import Border, Kernel
from lsconv.border.direct.border_inverse import WholeBorder
from lsconv.border.direct.dense_inverse import DenseInverse, ExchangedInverse, indefinite_inverse
from lsconv.border.free_memory import free_bytes
from lsconv.border.system.strip_product import Slab, Strips
from lsconv.border.system.subdomain_sum import Correction, PatchSum
from lsconv.fourier.symbol import FrequencyMatrices, Grid, hermitian_inverse

__all__ = ["Schwarz", "crossing_unknowns", "dense_entries"]

# A crossing is widened, up to the reach below, while its dense matrices stay under a limit of unknowns between these;
# when a solve turns out to be slow, up to twice as many, and so on to the most.
_LEAST_UNKNOWNS = 640
_MOST_UNKNOWNS = 4096
# (Motion, "same", 512², damp 1e-4, float64: 431 iterations at a reach of 32, 82 at one of 56.)
_CROSSING_REACH = 64
# A border this small is one dense patch, whose inverse is exact; the second limit is on the entries of all blocks.
_DENSE_UNKNOWNS = 1024
_DENSE_ENTRIES = 2**23


def dense_entries(ndim: int) -> int:
    """An upper bound of the entries of the dense patches of one block on a grid of ``ndim`` dimensions."""
    return max(_DENSE_UNKNOWNS, 2 * _LEAST_UNKNOWNS * ndim) ** 2


def crossing_unknowns(work: float) -> int:
    """How many unknowns a crossing may have so that factorising it costs no more than ``work``, per cube.

    At least 640, which are factorised in a few milliseconds.
    """
    unknowns = _LEAST_UNKNOWNS
    while 2 * unknowns <= _MOST_UNKNOWNS and (2 * unknowns) ** 3 <= work:
        unknowns *= 2
    return unknowns


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
        single: bool,
        exchange: list[int] | None = None,
        product: bool = False,
    ) -> None:
        self.axes = axes
        self.slab: Slab | None = None
        index = border_index(numbering, axes, cells)
        inverse: DenseInverse | ExchangedInverse | FrequencyMatrices
        if exchange is not None and len(axes) == len(border.grid):
            first = (cells[:, 0] == 0).nonzero().flatten()
            image = [(t - p) % n for t, p, n in zip(exchange, cells[first, 1:].T, border.grid, strict=True)]
            numbers, order = index.sort()
            second = order[torch.searchsorted(numbers, numbering[1][tuple(image)])]
            inverse = ExchangedInverse(kernel.within(cells, first), first, second, single=single)
        else:
            matrices = kernel.between(axes, cells).contiguous()
            others = Grid(tuple(n for a, n in enumerate(border.grid) if a not in axes), real=kernel.Q.grid.real)
            # of the products too, before the inverse overwrites them
            if product:
                self.slab = Slab(index.to(matrices.device), FrequencyMatrices(others, matrices.clone()))
            if others.sizes:
                inverses = hermitian_inverse(matrices) if definite else indefinite_inverse(matrices)
                inverse = FrequencyMatrices(others, inverses)
            else:
                inverse = DenseInverse(matrices, definite=definite, single=single)
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
        single: factorise the dense matrices in float32, which takes half as long, to make and to use.
        crossings: include the crossings of the slabs.
        restricted: every cell takes its correction from one patch; False: additive.
        unknowns: limit of the unknowns of a crossing.
        spare_bytes: what wider crossings may take, later; None: 60 % of what is free on the device then.
        whole: invert Q on the whole border, whatever its size.
        exchange: the sums of the reflection that takes the first component of Q to the second
            (:mod:`lsconv.border.direct.reflection_symmetry`); None where there is none.
    """

    def __init__(
        self,
        matrices: FrequencyMatrices,
        border: Border,
        *,
        definite: bool,
        single: bool = False,
        crossings: bool = True,
        restricted: bool = False,
        unknowns: int = 1024,
        spare_bytes: int | None = None,
        whole: bool = False,
        exchange: list[int] | None = None,
    ) -> None:
        self.spare_bytes, self._exchange = spare_bytes, exchange
        self.matrices, self.border = matrices, border
        self.definite, self.restricted = definite, restricted
        self.patches: list[_Patch] = []
        self.sum: PatchSum | None = None  # of their corrections; a new one with wider crossings
        self.limit = unknowns
        self._single = single
        small = border.size <= _DENSE_UNKNOWNS and border.size**2 * matrices.matrices.shape[0] <= _DENSE_ENTRIES
        self.whole = whole or small
        self.factors: WholeBorder | None = None
        self.strips: Strips | None = None  # the product with Q on the border, where it needs no whole grid
        self._crossings: list[tuple[int, ...]] = []
        if self.whole and not small:
            self.factors = WholeBorder(matrices, border, definite=definite, single=single, exchange=exchange)
            return
        self._numbering = border.numbering()
        kernel = border.kernel(matrices)
        if self.whole:
            self._make_whole(kernel)
            return
        used = [a for a, members in enumerate(border.members) if members.any()]
        product = matrices.elementwise and len(border.grid) == 2 and border.cellwise
        self.patches = [self._patch(kernel, (a,), border.crossing((a,), 0), product=product) for a in used]
        if product:
            self._find_strips(kernel)
        if crossings:
            self._crossings = [axes for n in range(2, len(used) + 1) for axes in combinations(used, n)]
        self._reaches: dict[tuple[int, ...], int] = {}
        self._cross(kernel)

    def _make_whole(self, kernel: Kernel) -> None:
        """One dense patch, the exact inverse."""
        self.patches = [self._patch(kernel, tuple(range(len(self.border.grid))), self.border.mask.nonzero())]
        self.sum = PatchSum(self.patches, self.border.size, torch.zeros(self.border.size, dtype=torch.int64))
        self.whole = True

    def _patch(
        self, kernel: Kernel, axes: tuple[int, ...], cells: Tensor, *, single: bool = False, product: bool = False
    ) -> _Patch:
        return _Patch(
            kernel,
            self.border,
            self._numbering,
            axes,
            cells,
            definite=self.definite,
            single=single,
            exchange=self._exchange,
            product=product,
        )

    def _find_strips(self, kernel: Kernel) -> None:
        """The product along the strips, which makes iterations cheap and wide crossings a waste."""
        slabs = [patch.slab for patch in self.patches if patch.slab is not None]
        for patch in self.patches:
            patch.slab = None
        self.strips = Strips.of(
            kernel.whole(), self._numbering, self.border.members, slabs, real=self.matrices.grid.real
        )
        if self.strips is not None:
            self.limit = min(self.limit, crossing_unknowns(0.0))

    def _cross(self, kernel: Kernel) -> None:
        """Make the crossings as wide as the limit allows, and share out the cells."""
        self._reaches = {axes: self._reach(axes) for axes in self._crossings}
        patches = [patch for patch in self.patches if len(patch.axes) == 1]
        for axes, reach in self._reaches.items():
            if reach:
                patches.append(self._patch(kernel, axes, self.border.crossing(axes, reach), single=self._single))
        self.patches = patches
        # a new one: another thread may be solving with the old one
        self.sum = PatchSum(patches, self.border.size, self._owners(patches) if self.restricted else None)

    def _reach(self, axes: tuple[int, ...]) -> int:
        reach = min(_CROSSING_REACH, min(self.border.grid[a] for a in axes) // 4)
        others = math.prod(n for a, n in enumerate(self.border.grid) if a not in axes)
        most = min(self.limit, 2 * self.limit // math.isqrt(others))
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

    def strengthen(self) -> bool:
        """Widen the crossings to twice the unknowns; False where they are as wide as they get, or memory is short."""
        matrices, unknowns = self.matrices.matrices, self.stronger_unknowns
        needed = 4 * unknowns**2 * matrices.shape[0] * matrices.element_size()
        spare = 0.6 * free_bytes(matrices.device) if self.spare_bytes is None else self.spare_bytes
        if not unknowns or needed > spare:
            return False
        self.limit = unknowns
        if self.border.size <= unknowns:
            self._make_whole(self.border.kernel(self.matrices))
            return True
        if all(self._reach(axes) == reach for axes, reach in self._reaches.items()):
            return False
        self._cross(self.border.kernel(self.matrices))
        return True

    @property
    def stronger_unknowns(self) -> int:
        """The unknowns of the crossings that :meth:`strengthen` would make, at most; 0 where it would make none."""
        if self.whole or not self._crossings or self.limit >= _MOST_UNKNOWNS:
            return 0
        return min(2 * self.limit, _MOST_UNKNOWNS)

    @property
    def nbytes(self) -> int:
        """Bytes of the inverses and of what goes with them."""
        more = sum(part.nbytes for part in (self.strips, self.factors, self.sum) if part is not None)
        return more + sum(patch.inverse.nbytes for patch in self.patches)

    @property
    def current(self) -> Callable[[Tensor], Tensor]:
        """The preconditioner as it is until the crossings are widened."""
        current = self.sum if self.factors is None else self.factors
        assert current is not None
        return current

    def __call__(self, r: Tensor) -> Tensor:
        """``M^{-1} r`` for border vectors ``(rest, blocks, size)``."""
        return self.current(r)
