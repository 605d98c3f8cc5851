r"""Reflect and replicate padding: a valid convolution of an image whose margin copies its inside.

.. math:: A x = V z, \qquad z_I = x, \quad z_B = z_{s(B)},

with V the convolution without padding on the padded image, I its inside and B its margin, each cell of which copies a
cell s of the inside. On a periodic grid V is a block-circulant C whose outputs T are cropped. In
:math:`\min \|V z - y\|^2 + \mu \|z_I\|^2` the copies are constraints with multipliers :math:`\lambda`, and the margin
is not damped, which takes :math:`\zeta = z_B` as unknowns of their own:

.. math::
    \begin{pmatrix} -1 & C \\ C^H & \mu \end{pmatrix} \begin{pmatrix} r \\ z \end{pmatrix}
    = \begin{pmatrix} y + R_T^T u \\ (R_s - R_B)^T \lambda + \mu R_B^T \zeta \end{pmatrix}, \qquad
    r_T = 0, \quad z_{s(B)} - z_B = 0, \quad z_B - \zeta = 0.

With Q the inverse of the block-circulant left side and F the map from :math:`(u, \lambda, \zeta)` to the right side,
scaled to be symmetric, what remains is :math:`(F^T Q F - \mu^{-1/2} E_\zeta)\, w = -F^T Q (y, 0)`: one unknown per
cropped output and two per cell of the margin, one product with Q an iteration, as for zero padding. Grid cells beyond
the padded image are read by no output that is left; they are damped, so that the solution is zero there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lsconv.border.border_set import Border, BorderEntries, gathered
from lsconv.border.factored_capacitance import FactoredCapacitance
from lsconv.fourier.embedding import BorderPositions, Embedding
from lsconv.fourier.frequency_matrices import FrequencyMatrices
from lsconv.operators.base import LinearOperator
from lsconv.operators.convolution import Convolution
from lsconv.operators.padding import pad
from lsconv.operators.padding_modes import MODES

__all__ = ["CopiedPadding", "CopiedPaddingBorder", "CopiedPaddingEntries"]


class CopiedPadding:
    """A convolution with reflect or replicate padding, as a valid convolution V of an image whose margin copies cells.

    Args:
        A: a convolution of stride 1 whose padding copies cells of the inside, as "reflect" and "replicate" do.

    Attributes:
        pairs: the padding, ``(left, right)`` per axis.
        convolution: V, on the padded image.
        margin: the positions of the margin, a list per axis.
        sources: for every position of the padded image the position that it copies, one tensor per axis.
        norm: the norm of the padding.
        bound: a bound of the norm of A per batch item, the root of its largest row sum times its largest column sum.
    """

    def __init__(self, A: Convolution) -> None:
        self.pairs = A.padding
        sizes = tuple(n + left + right for n, (left, right) in zip(A.spatial_in, self.pairs, strict=True))
        self.convolution = Convolution(A.weight, sizes, dilation=A.dilation, groups=A.groups, check_finite=False)
        self.margin: list[list[int]] = []
        self.sources: list[Tensor] = []
        copies = 1
        for n, (left, right) in zip(A.spatial_in, self.pairs, strict=True):
            source = left + pad(torch.arange(n, dtype=torch.float64), [(left, right)], A.padding_mode).long()
            self.sources.append(source)
            self.margin.append([*range(left), *range(left + n, left + n + right)])
            copies *= int(source.bincount().max())
        self.norm = math.sqrt(copies)
        moduli = A.with_parameters([A.weight.detach().abs().to(A.dtype)])
        item = tuple(range(-A.ndim - 1, 0))
        rows, columns = (
            f(A.weight.new_ones(shape)).abs().double().amax(item)
            for f, shape in ((moduli.apply, A.in_shape), (moduli.adjoint, A.out_shape))
        )
        self.bound = (rows * columns).sqrt()

    @staticmethod
    def serves(A: LinearOperator) -> bool:
        """Tell whether A is a convolution of stride 1 whose padding copies inside cells."""
        return (
            isinstance(A, Convolution)
            and MODES[A.padding_mode].copies
            and any(map(any, A.padding))
            and set(A.stride) == {1}
        )

    def border(self, embedding: Embedding, root: Tensor) -> CopiedPaddingBorder:
        """The border of V's grid with its unknowns; ``root`` is the square root of mu, ``(blocks)``."""
        margins = [self.margin for _ in range(embedding.in_channels)]
        return CopiedPaddingBorder(embedding.grid, embedding.output_border(), margins, self.sources, root)

    def padded(self, x: Tensor) -> Tensor:
        """Pad x, ``(..., *spatial_in)``, with zeros in the margin."""
        return pad(x, self.pairs)

    def cropped(self, z: Tensor) -> Tensor:
        """Crop ``(..., *padded)`` to the field without its margins."""
        for a, (left, right) in enumerate(self.pairs):
            dim = a - len(self.pairs)
            z = z.narrow(dim, left, z.shape[dim] - left - right)
        return z


class CopiedPaddingBorder(Border):
    """The unknowns u, lambda and zeta, as the cells of a border of three kinds of channels.

    Args:
        grid: sizes of the periodic grid.
        outputs: the positions of the cropped outputs, a list per channel and axis.
        margins: the positions of the margin, a list per channel and axis.
        sources: for every position of the padded image the position that it copies, one tensor per axis.
        root: the square root of mu, ``(blocks)``.

    Attributes:
        diagonal: what is added to the diagonal of ``F^T Q F``, ``(blocks, size)``: ``-1 / sqrt(mu)`` for each zeta.
    """

    def __init__(
        self,
        grid: tuple[int, ...],
        outputs: BorderPositions,
        margins: BorderPositions,
        sources: list[Tensor],
        root: Tensor,
    ) -> None:
        super().__init__(grid, outputs + margins + margins, root.device)
        self.rows, self.columns = len(outputs), len(margins)
        self.cells = (self.rows + self.columns, *grid)
        self._sources = [
            torch.cat([source, torch.arange(len(source), n)]) for source, n in zip(sources, grid, strict=True)
        ]
        acted, source, sign = self.terms(tuple(range(len(grid))), self.mask.nonzero())
        self._acted, self._source = (self._numbers(cells).to(root.device) for cells in (acted, source))
        self._sign = sign.to(root)
        margin, outside = len(source), int((sign > 0).sum()) - len(source)
        self._multipliers = slice(outside, outside + margin)
        diagonal = root.new_zeros(len(root), self.size)
        diagonal[:, outside + margin :] = -1 / root[:, None]
        self.diagonal: Tensor = diagonal

    def terms(self, axes: tuple[int, ...], cells: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The cells of the saddle operator on which the unknowns act: rows of channel, *positions along the axes*.

        Returns:
            The own cell of each unknown; the second cell of each multiplier, which its own cell copies; the sign at the
            own cell (+1 at the second one).
        """
        channel = cells[:, 0]
        real = torch.where(channel >= self.rows + self.columns, channel - self.columns, channel)
        multiplier = (channel >= self.rows) & (channel < self.rows + self.columns)
        copied = torch.stack(
            [real, *(self._sources[a][cells[:, 1 + d]] for d, a in enumerate(axes))], dim=1
        )[multiplier]  # fmt: skip
        acted = torch.cat([real[:, None], cells[:, 1:]], dim=1)
        return acted, copied, torch.where(multiplier, -1.0, 1.0).double()

    def entries(self, Q: FrequencyMatrices | FactoredCapacitance) -> BorderEntries:
        """The entries of the system between the unknowns."""
        return CopiedPaddingEntries(Q, self)

    def _numbers(self, cells: Tensor) -> Tensor:
        numbers = cells[:, 0]
        for d, n in enumerate(self.grid):
            numbers = numbers * n + cells[:, 1 + d]
        return numbers

    def scatter(self, b: Tensor) -> Tensor:
        """F: ``(rhs, blocks, size)`` to ``(rhs, blocks, rows + columns, *grid)``."""
        z = b.new_zeros(*b.shape[:2], math.prod(self.cells))
        z.index_add_(-1, self._acted, b * self._sign)
        z.index_add_(-1, self._source, b[..., self._multipliers])
        return z.reshape(*b.shape[:2], *self.cells)

    def gather(self, z: Tensor) -> Tensor:
        """F^T: ``(rhs, blocks, rows + columns, *grid)`` to ``(rhs, blocks, size)``."""
        z = z.flatten(2)
        b = gathered(z, self._acted).mul_(self._sign)
        b[..., self._multipliers] += gathered(z, self._source)
        return b


class CopiedPaddingEntries(BorderEntries):
    """The entries of the system between unknowns; of those along a strip, copies across its ends are left out."""

    border: CopiedPaddingBorder

    def between(self, axes: tuple[int, ...], cells: Tensor) -> Tensor:
        """One matrix per frequency of the other axes: ``(blocks, *other frequencies, cells, cells)``."""
        border = self.border
        acted, copied, sign = border.terms(axes, cells)
        distinct, where = torch.cat([acted, copied]).unique(dim=0, return_inverse=True)
        entries = super().between(axes, distinct)
        device = entries.device
        at, at_copied = where[: len(acted)].to(device), where[len(acted) :].to(device)
        multipliers, signs = (sign < 0).nonzero().flatten().to(device), sign.to(device, entries.real.dtype)
        rows = entries.index_select(-2, at) * signs[:, None]
        rows.index_add_(-2, multipliers, entries.index_select(-2, at_copied))
        result = rows.index_select(-1, at) * signs
        result.index_add_(-1, multipliers, rows.index_select(-1, at_copied))
        margin = (cells[:, 0] >= border.rows + border.columns).nonzero().flatten().to(device)
        diagonal = border.diagonal[:, -1:] if border.columns else border.diagonal[:, :0]
        shape = (len(diagonal), *(1 for _ in range(result.ndim - 2)))
        result.diagonal(dim1=-2, dim2=-1).index_add_(
            -1, margin, torch.broadcast_to(diagonal.reshape(shape).to(result), (*result.shape[:-2], len(margin)))
        )
        return result

    def dense(self) -> Tensor:
        """All entries: ``(blocks, size, size)``."""
        return self.between(tuple(range(len(self.grid))), self.border.mask.nonzero())
