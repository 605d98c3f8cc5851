"""The inverse of an operator on the whole border, and what it costs to make."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lsconv.border.border_set import Border
from lsconv.border.direct.block_elimination import Elimination, Layout
from lsconv.border.direct.dense_inverse import DenseInverse
from lsconv.border.direct.reflection_symmetry import exchange as exchange_of
from lsconv.border.direct.reflection_symmetry import reflection, reflection_sums
from lsconv.fourier.symbol import FrequencyMatrices

__all__ = ["Cost", "WholeBorder", "whole_cost"]


class WholeBorder:
    """The inverse on the whole border: by elimination where the border is one of rows and columns, else a dense one.

    Args:
        matrices: the block-circulant operator Q, Hermitian.
        border: the cells it is restricted to.
        definite: whether it is positive definite.
        single: keep dense factors in single precision.
        exchange: as for :class:`~lsconv.border.direct.block_elimination.Elimination`.
    """

    def __init__(
        self,
        matrices: FrequencyMatrices,
        border: Border,
        *,
        definite: bool,
        single: bool,
        exchange: list[int] | None = None,
    ) -> None:
        kernel = border.kernel(matrices)
        self._inverse: Elimination | DenseInverse
        if _crossed(border):
            self._inverse = Elimination(
                matrices, border, kernel.whole(), definite=definite, single=single, exchange=exchange
            )
        else:
            self._inverse = DenseInverse(kernel.dense(border), definite=definite, single=single)

    def __call__(self, r: Tensor) -> Tensor:
        """``Q^-1 r`` for border vectors ``(rest, blocks, size)``."""
        return self._inverse(r)

    @property
    def nbytes(self) -> int:
        """Bytes of the factors."""
        return self._inverse.nbytes


@dataclass(frozen=True)
class Cost:
    """What factors cost.

    Attributes:
        factors: flops of the factorisations.
        products: flops of the products before them.
        entries: numbers that there are at a time.
    """

    factors: float
    products: float
    entries: int


def whole_cost(
    matrices: FrequencyMatrices, border: Border, onto: Border, *, definite: bool, exchanged: bool = False
) -> Cost:
    """The cost of a :class:`WholeBorder` on ``onto``, for each block of the matrices.

    Args:
        matrices: the operator, from which its reflections are seen.
        border: its border.
        onto: the border of the same operator on a grid of other sizes.
        definite: whether it is positive definite.
        exchanged: whether an exchange halves it, where the border of the other grid has one too.
    """
    third = (1 if definite else 2) / 3
    if not _crossed(onto):
        return Cost(third * onto.size**3, 0.0, 3 * onto.size**2)
    reflected = reflection_sums(matrices, border)
    layout = Layout(
        onto, [None if s is None else reflection(members) for s, members in zip(reflected, onto.members, strict=True)]
    )
    strip, rows, columns, length = layout.strip, layout.rows, layout.columns, layout.columns.length
    signs, g, h = len(rows.signs), onto.channels * rows.pairs, onto.channels * strip.pairs
    sizes = [onto.channels * columns.pairs_of(s) * rows.pairs for s in range(len(columns.signs))]
    lags = columns.longest
    parts = 1 if layout.even else 2
    products = 2.0 * signs * lags * g**2 * (length // 2 + 1) * h * parts
    entries = signs * (3 * sum(n**2 for n in sizes) + parts * (lags * g**2 + 2 * g * h * length))
    factors = third * signs * sum(n**3 for n in sizes)
    if exchanged and exchange_of(onto.members) is not None:
        # complex ones of half the size, from half of the products where opposite distances come together
        return Cost(factors / 2, products / (2 if parts == 1 else 1), entries // 2)
    return Cost(factors, products, entries)


def _crossed(border: Border) -> bool:
    """Whether it is one of cells in rows and columns of a plane."""
    return len(border.grid) == 2 and border.cellwise and all(bool(m.any()) for m in border.members)
