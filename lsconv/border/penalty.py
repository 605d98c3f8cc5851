r"""A convolutional penalty beside a truncated convolution: ``[A; damp L]`` as one truncated block-circulant operator.

The minimiser of :math:`\|Ax - y\|^2 + \mathrm{damp}^2 \|Lx\|^2` is the least-squares solution of the stacked system,
and when L is made of convolutions the stack is again a circulant with cropped rows: more output channels, each with
border positions of their own. Differences that stop at the edge of the image (Neumann) are cropped rows; zeros outside
the edge (Dirichlet, zero padding) are grid cells constrained to zero.

Where neither A nor L reads cells outside the inputs, the grid may still be longer, for a good FFT length. Rows that
read both inputs and outside cells are then cropped, and rows that read outside cells only have data of zero. So the
outside cells are decoupled from the inputs, and are zero in the solution. If they are at least as wide as the kernel of
A, their normal operator is as regular as that of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lsconv.errors import MethodError
from lsconv.fourier.embedding import BorderPositions, Embedding
from lsconv.fourier.frequency_matrices import FrequencyMatrices
from lsconv.fourier.symbol import symbol
from lsconv.operators.algebra import Scaled, VStack
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import broadcast_shapes
from lsconv.operators.convolution import Convolution
from lsconv.operators.difference import Gradient, Laplacian
from lsconv.operators.dtypes import double
from lsconv.operators.elementary import Identity
from lsconv.operators.fft_convolution import good_fft_length, short_fft_length, transform_cost
from lsconv.operators.padding_modes import MODES

__all__ = ["Filter", "Penalty", "Taps", "as_convolutions", "common_grid_filters"]


@dataclass(frozen=True)
class Filter:
    """One convolution of a penalty, with a factor that is a number or one per batch item."""

    convolution: Convolution
    factor: Tensor


def as_convolutions(L: LinearOperator, spatial_ndim: int) -> list[Filter] | None:
    """Take L apart into a stack of convolutions, up to rows of zeros; None where it is no such stack.

    Args:
        L: the penalty, on inputs ``(channels, *spatial)``.
        spatial_ndim: number of spatial axes.
    """
    one = torch.ones((), dtype=L.dtype, device=L.device)
    if isinstance(L, Scaled):
        inner = as_convolutions(L.operator, spatial_ndim)
        return None if inner is None else [Filter(term.convolution, term.factor * L.alpha) for term in inner]
    if isinstance(L, VStack):
        terms: list[Filter] = []
        for part in L.operators:
            inner = as_convolutions(part, spatial_ndim)
            if inner is None:
                return None
            terms += inner
        return terms
    if len(L.in_shape) != spatial_ndim + 1:
        return None
    if isinstance(L, Convolution):
        served = all(s == 1 for s in L.stride) and Embedding.serves(L)
        return [Filter(L, one)] if served else None
    if isinstance(L, Identity):
        weight = torch.ones(L.in_shape[0], *(1,) * (spatial_ndim + 1), dtype=L.dtype, device=L.device)
        return [Filter(Convolution(weight, L.in_shape[1:], groups=L.in_shape[0]), one)]
    if isinstance(L, (Gradient, Laplacian)) and L.ndim == spatial_ndim:
        return _differences(L, one)
    return None


def common_grid_filters(A: LinearOperator, L: LinearOperator | None) -> list[Filter]:
    """Take L apart into convolutions on one grid with A; no convolutions for L = None, the identity.

    Raises:
        MethodError: there is no such grid.
    """
    if L is None:
        return []
    terms = as_convolutions(L.to(dtype=A.dtype), A.ndim) if isinstance(A, Convolution) else None
    if not isinstance(A, Convolution) or terms is None or not Penalty.serves(A, terms):
        raise MethodError(f"L: {L!r} and {A!r} are not convolutions on one grid; use method='lsmr'")
    return terms


def _differences(L: Gradient | Laplacian, one: Tensor) -> list[Filter] | None:
    """The filters of a gradient or Laplacian, one per component; None where they are not crops of convolutions."""
    if isinstance(L, Laplacian) and L.boundary == "neumann":
        return None  # the rows at its edge are not those of a convolution
    terms = []
    for component, kernel in enumerate(L.kernels):
        padding = L.padding
        if isinstance(L, Gradient):  # the kernel extends along one axis only
            if L.boundary == "neumann" and L.in_shape[1 + component] == 1:
                continue  # one cell has no neighbour: rows of zeros
            cell = tuple(slice(None) if axis == component else slice(0, 1) for axis in range(L.ndim))
            kernel = kernel[cell]
            padding = tuple(
                (0, 1) if axis == component and L.boundary != "neumann" else (0, 0) for axis in range(L.ndim)
            )
        channels = L.in_shape[0]
        weight = kernel.expand(channels, 1, *kernel.shape)
        mode = "circular" if L.boundary == "periodic" else "zeros"
        terms.append(
            Filter(Convolution(weight, L.in_shape[1:], padding=padding, groups=channels, padding_mode=mode), one)
        )
    return terms or None


@dataclass(frozen=True)
class Taps:
    """One row of a stack with one input channel, as the taps of its kernel.

    Attributes:
        offsets: the offsets of the cells that the row reads, ``(taps, axes)``.
        weights: the weight of each, ``(blocks, taps)``.
    """

    offsets: Tensor
    weights: Tensor

    def cells(self, mask: Tensor) -> Tensor:
        """The numbers of the cells that the row reads at the marked places of a grid: ``(places, taps)``."""
        numbers = torch.arange(mask.numel()).reshape(mask.shape)
        places = (mask.nonzero()[:, None] + self.offsets) % torch.tensor(mask.shape)
        return numbers[places.unbind(-1)]


class Penalty:
    """The rows that ``damp L`` adds to the symbol of A, and their border.

    Args:
        convolution: A; stride 1.
        terms: L as :func:`as_convolutions` gives it.
        damp: factor of L, a number or one per batch item.
        tight: use the shortest grid, on which the cropped rows are the last ones of every axis.

    Attributes:
        convolution: A, as a crop of a block-circulant operator on that grid.
        grid: grid sizes for both A and L.
        constrained: per axis, whether the grid cells outside the inputs have to be constrained to zero.
        batch_shape: the batch dimensions of the factors.
    """

    def __init__(self, convolution: Convolution, terms: Sequence[Filter], damp: Tensor, *, tight: bool = False) -> None:
        self._given = convolution, terms, damp
        self.convolution = convolution = _unwrapped(convolution)
        terms = [Filter(_unwrapped(term.convolution), term.factor) for term in terms]
        self.terms = [(term.convolution, term.factor * damp.to(term.factor.real.dtype)) for term in terms]
        self.batch_shape = tuple(broadcast_shapes(*(factor.shape for _, factor in self.terms)))
        parts = [convolution, *(term.convolution for term in terms)]
        grid, constrained = [], []
        for a, n in enumerate(convolution.spatial_in):
            overhangs = [_overhang(part, a) for part in parts]
            before, after = max(b for b, _ in overhangs), max(b for _, b in overhangs)
            reads_beyond = before > 0 or after > 0
            constrained.append(reads_beyond)
            if reads_beyond:
                grid.append(short_fft_length(n + max(before, after)) if tight else good_fft_length(n + before + after))
            elif tight or any(map(_is_circular, parts)):
                grid.append(n)
            else:
                longer = short_fft_length(n + max(part.kernel_extent[a] for part in parts))
                grid.append(min(n, longer, key=lambda size: transform_cost((size,))))  # as for 1038 = 6 * 173
        self.grid, self.constrained = tuple(grid), tuple(constrained)

    @classmethod
    def of_terms(cls, A: Convolution, terms: Sequence[Filter], damp: float) -> Penalty | None:
        """The penalty of terms, converted to the dtype of A; None where there are none, for the identity."""
        if not terms:
            return None
        filters = [Filter(t.convolution.to(dtype=A.dtype), t.factor.to(A.dtype)) for t in terms]
        return cls(A, filters, torch.tensor(damp, dtype=torch.float64, device=A.device))

    def precise(self) -> Penalty:
        """The penalty in double precision, on a tight grid."""
        convolution, terms, damp = self._given
        dtype = double(convolution.dtype)
        return Penalty(
            convolution.to(dtype=dtype),
            [Filter(term.convolution.to(dtype=dtype), term.factor.to(double(term.factor.dtype))) for term in terms],
            damp,
            tight=True,
        )

    def embedding(self, batch_shape: tuple[int, ...]) -> Embedding:
        """The grid of A and L; ``batch_shape`` are more batch dimensions whose items get blocks of their own."""
        batch_shape = tuple(broadcast_shapes(batch_shape, self.batch_shape))
        return Embedding(
            self.convolution, self.grid, batch_shape, tapped_phases_only=True, constrained=self.constrained
        )

    @staticmethod
    def serves(convolution: Convolution, terms: Sequence[Filter]) -> bool:
        """Tell whether A and L are crops of block-circulant operators on one grid and with the same blocks."""
        if any(s != 1 for s in convolution.stride) or not Embedding.serves(convolution):
            return False
        parts = [_unwrapped(part) for part in (convolution, *(term.convolution for term in terms))]
        if any(part.groups % convolution.groups for part in parts[1:]) or any(part.batch_shape for part in parts[1:]):
            return False
        for a, n in enumerate(convolution.spatial_in):
            reads_beyond = any(_overhang(part, a) != (0, 0) for part in parts)
            wraps = any(_is_circular(part) for part in parts)  # then n is the period, of every axis
            if (reads_beyond and wraps) or (wraps and any(part.spatial_out[a] > n for part in parts)):
                return False
        return True

    def rows(
        self, embedding: Embedding, symbol_of: Callable[[Convolution, Embedding], FrequencyMatrices] = symbol
    ) -> Tensor:
        """The symbol's rows, ``(blocks, *frequencies, rows, columns)``, for the embedding of A."""
        parts = []
        for convolution, factor in self.terms:
            symbol_grid = Embedding(convolution, embedding.grid)
            matrices = symbol_of(convolution, symbol_grid).matrices
            groups, fine = embedding.groups, symbol_grid.groups // embedding.groups
            matrices = _block_diagonal(matrices.unflatten(0, (groups, fine)))
            scale = factor.expand(embedding.batch_shape).reshape(-1, 1, *(1 for _ in matrices.shape[1:]))
            parts.append((scale * matrices).flatten(0, 1))
        blocks = max(part.shape[0] for part in parts)
        return torch.cat([part.expand(blocks, *part.shape[1:]) for part in parts], dim=-2)

    def taps(self, embedding: Embedding) -> list[Taps]:
        """The taps of all rows, in the order of :meth:`rows`; only for blocks with one input channel."""
        rows = []
        for convolution, factor in self.terms:
            axes = [torch.tensor(_taps(convolution, a)) for a in range(convolution.ndim)]
            offsets = torch.cartesian_prod(*axes).reshape(-1, convolution.ndim)
            weight = convolution.weight.detach().reshape(embedding.groups, -1, len(offsets))
            scale = factor.expand(embedding.batch_shape).reshape(-1, 1, 1, 1).to(weight.dtype)
            rows += [Taps(offsets, weights) for weights in (scale * weight).flatten(0, 1).unbind(1)]
        return rows

    def border(self, embedding: Embedding) -> BorderPositions:
        """Border positions per row and axis: those of A, then in the order of :meth:`rows`."""
        positions = []
        for convolution in (self.convolution, *(convolution for convolution, _ in self.terms)):
            axes = [self._outside(convolution, embedding, a) for a in range(embedding.ndim)]
            positions += [axes] * (convolution.out_shape[0] // embedding.groups)
        return positions

    def _outside(self, convolution: Convolution, embedding: Embedding, a: int) -> list[int]:
        n, size = convolution.spatial_in[a], embedding.grid[a]
        if _is_circular(convolution):
            return list(range(convolution.spatial_out[a], size))
        taps = _taps(convolution, a)
        return [i for i in range(convolution.spatial_out[a], size) if any((i + tau) % size < n for tau in taps)]


def _taps(convolution: Convolution, a: int) -> list[int]:
    """The offsets, from the place of an output, of the cells that it reads along an axis."""
    left, dilation = convolution.padding[a][0], convolution.dilation[a]
    return [dilation * t - left for t in range(convolution.kernel_size[a])]


def _overhang(convolution: Convolution, a: int) -> tuple[int, int]:
    """The number of cells before and after the inputs that outputs read along a zero-padded axis."""
    if _is_circular(convolution):
        return 0, 0
    taps = _taps(convolution, a)
    return max(-min(taps), 0), max(convolution.spatial_out[a] - 1 + max(taps) - (convolution.spatial_in[a] - 1), 0)


def _is_circular(convolution: Convolution) -> bool:
    return MODES[convolution.padding_mode].periodic


def _unwrapped(convolution: Convolution) -> Convolution:
    """Return a circular convolution that reads across no edge as the same convolution without padding."""
    if not _is_circular(convolution) or any(_wraps(convolution, a) for a in range(convolution.ndim)):
        return convolution
    return Convolution(
        convolution.weight, convolution.spatial_in, convolution.stride, convolution.padding, convolution.dilation,
        convolution.groups, backend=convolution.backend, check_finite=False,
    )  # fmt: skip


def _wraps(convolution: Convolution, a: int) -> bool:
    """Tell whether some output of a circular convolution reads across the edge of an axis."""
    taps = _taps(convolution, a)
    return min(taps) < 0 or convolution.spatial_out[a] - 1 + max(taps) > convolution.spatial_in[a] - 1


def _block_diagonal(matrices: Tensor) -> Tensor:
    """``(groups, fine, *frequencies, rows, columns)`` to ``(groups, *frequencies, fine rows, fine columns)``."""
    fine, rows, columns = matrices.shape[1], matrices.shape[-2], matrices.shape[-1]
    if fine == 1:
        return matrices[:, 0]
    lead = (matrices.shape[0], *matrices.shape[2:-2])
    diagonal_blocks = matrices.new_zeros(*lead, fine, rows, fine, columns)
    diagonal_blocks.diagonal(dim1=-4, dim2=-2).copy_(matrices.movedim(1, -1))
    return diagonal_blocks.reshape(*lead, fine * rows, fine * columns)
