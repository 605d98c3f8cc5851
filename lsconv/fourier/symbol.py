r"""The symbol of a convolution: one small matrix per frequency, with stride and groups folded in.

A block-circulant operator is diagonal in Fourier, :math:`C = F^{-1} \operatorname{diag}(S(\omega)) F`. For torch's
cross-correlation the symbol is :math:`S(\omega) = \sum_\tau K[\tau] e^{i \omega \tau}`, of shape
``(out_channels, in_channels)`` with the polyphase input channels of :mod:`lsconv.fourier.embedding` for strides.
Real kernels keep half of the frequencies (the other half is the conjugate).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lsconv.errors import MethodError
from lsconv.fourier.batched_linalg import frobenius, hermitian_inverse
from lsconv.fourier.embedding import Embedding
from lsconv.operators.batch_layout import broadcast_shapes
from lsconv.operators.convolution import Convolution
from lsconv.operators.fft_convolution import FEW_WAVES, inverse_transform, plane_waves

__all__ = [
    "ELEMENTWISE_ENTRIES",
    "FactoredCapacitance",
    "FrequencyMatrices",
    "Grid",
    "from_taps",
    "gram",
    "largest_eigenvalue",
    "product",
    "saddle_inverse",
    "shifted",
    "symbol",
]

# Up to this many entries a matrix per frequency is multiplied elementwise in the layout of the FFT; above it, as a
# batched matrix product after moving the channels last.
ELEMENTWISE_ENTRIES = 16


class Grid:
    """The discrete Fourier transform of a periodic grid, real-to-complex for real tensors.

    Args:
        sizes: the grid sizes, the last dimensions of every tensor transformed.
        real: True when tensors on the grid are real.
    """

    def __init__(self, sizes: tuple[int, ...], *, real: bool) -> None:
        self.sizes = sizes
        self.real = real
        self.dims = tuple(range(-len(sizes), 0))
        self.frequencies = (*sizes[:-1], sizes[-1] // 2 + 1) if real and sizes else sizes

    def transform(self, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        """Transform from the grid to frequencies; into ``out`` where it is given."""
        if not self.sizes:
            return tensor
        if self.real and self.sizes[-1] > 1:
            return torch.fft.rfftn(tensor, dim=self.dims, out=out)
        return torch.fft.fftn(tensor, dim=self.dims, out=out)

    def inverse(self, tensor: Tensor) -> Tensor:
        """Transform from frequencies to the grid."""
        return inverse_transform(tensor, self.sizes, real=self.real)

    def weights(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The weights of stored frequencies in sums over all: 2 for one that stands for a conjugate pair, else 1."""
        weights = torch.ones(self.frequencies, device=device, dtype=dtype)
        if self.real:
            weights[..., 1 : (self.sizes[-1] + 1) // 2] = 2
        return weights


class FrequencyMatrices:
    """One matrix per block and frequency: a block-circulant operator.

    Args:
        grid: the periodic grid.
        matrices: shape ``(blocks, *grid.frequencies, rows, columns)``, complex (real where all are real).
        elementwise: multiply entry by entry in the layout of the transforms; None: only if the matrices are small.
    """

    def __init__(self, grid: Grid, matrices: Tensor, *, elementwise: bool | None = None) -> None:
        self.grid = grid
        self.rows, self.columns = matrices.shape[-2:]
        few = self.rows * self.columns <= ELEMENTWISE_ENTRIES
        self.elementwise = few if elementwise is None else elementwise
        if self.elementwise:  # the entries of one (row, column) contiguous over the frequencies
            matrices = matrices.movedim((-2, -1), (1, 2)).contiguous().movedim((1, 2), (-2, -1))
        else:  # a lazy conjugate would be computed again for every product
            matrices = matrices.contiguous().resolve_conj()
        self.matrices = matrices
        self.blocks, self.dtype, self.device = matrices.shape[0], matrices.dtype, matrices.device

    @property
    def H(self) -> FrequencyMatrices:  # noqa: N802 - the field's name for the adjoint
        """The adjoint operator."""
        return FrequencyMatrices(self.grid, self.matrices.mH)

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices."""
        return self.matrices.numel() * self.matrices.element_size()

    def __call__(self, spectra: Tensor) -> Tensor:
        """Multiply the matrices with ``spectra`` of shape ``(rhs, blocks, columns, *frequencies)``."""
        if self.elementwise:
            return self.multiply(spectra)
        vectors = spectra.movedim(0, -1).movedim(1, -1).contiguous()  # blocks, *frequencies, rhs, columns
        if vectors.is_complex() and not self.matrices.is_complex():
            pairs = torch.view_as_real(vectors).movedim(-1, -2).flatten(-3, -2)
            product = (pairs @ self.matrices.mT).unflatten(-2, (-1, 2)).movedim(-2, -1).contiguous()
            product = torch.view_as_complex(product)
        else:
            product = vectors @ self.matrices.mT
        return product.movedim(-1, 1).movedim(-1, 0)

    def multiply(self, spectra: Tensor, out: Tensor | None = None) -> Tensor:
        """Multiply entry by entry, in the layout of the transforms; into ``out`` where it is given."""
        factors = self.matrices.movedim((-2, -1), (1, 2))  # blocks, rows, columns, *frequencies
        product = torch.mul(factors[:, :, 0], spectra[:, :, :1], out=out)
        # Accumulated in place, because a sum over columns would store every product first.
        for column in range(1, self.columns):
            product.addcmul_(factors[:, :, column], spectra[:, :, column : column + 1])
        return product

    def on_grid(self, tensor: Tensor) -> Tensor:
        """Apply the operator to a tensor ``(rhs, blocks, columns, *grid.sizes)``."""
        if tensor.numel() == 0:  # which some FFTs refuse
            return tensor.new_zeros(*tensor.shape[:2], self.rows, *self.grid.sizes)
        return self.grid.inverse(self(self.grid.transform(tensor)))

    def block(self, rows: slice, columns: slice) -> FrequencyMatrices:
        """Some rows and columns of the matrices, as a view of them."""
        part = FrequencyMatrices.__new__(FrequencyMatrices)
        part.grid, part.elementwise, part.matrices = self.grid, self.elementwise, self.matrices[..., rows, columns]
        part.rows, part.columns = part.matrices.shape[-2:]
        part.blocks, part.dtype, part.device = self.blocks, self.dtype, self.device
        return part

    def map(self, function: Callable[[Tensor], Tensor]) -> FrequencyMatrices:
        """Make the operator whose matrices are ``function`` of these."""
        return FrequencyMatrices(self.grid, function(self.matrices))

    def repeated(self, blocks: int) -> FrequencyMatrices:
        """Repeat the matrices of all groups for every batch item, unless there is one block, which broadcasts."""
        if self.blocks in (1, blocks):
            return self
        return self.map(lambda m: m.repeat(blocks // self.blocks, *(1 for _ in m.shape[1:])))

    def reads_lags(self, axes: tuple[int, ...], lags: int) -> bool:
        """Tell whether :meth:`at_lags` costs less than :meth:`kernel` for so many lags along ``axes``."""
        return not self.elementwise and lags <= FEW_WAVES

    def at_lags(self, axes: tuple[int, ...], lags: list[Tensor]) -> Tensor:
        """The first block column at given lags along ``axes``, and at all frequencies of the other axes.

        Returns:
            ``(blocks, *other frequencies, *lags, rows, columns)``, the other frequencies halved as in the :class:`Grid`
            of the other axes, and real where there are none and the grid is real.
        """
        grid, ndim = self.grid, len(self.grid.sizes)
        others = [a for a in range(ndim) if a not in axes]
        m = self.matrices
        for a, places in zip(axes, lags, strict=True):
            waves = plane_waves(places.cpu(), grid.sizes[a], grid.frequencies[a]) / grid.sizes[a]
            # One frequency of each conjugate pair is summed; the other one is added below.
            if grid.real and a == ndim - 1:
                half = torch.ones(grid.frequencies[a], dtype=torch.float64)
                half[0] = 0.5
                if grid.sizes[a] % 2 == 0:
                    half[-1] = 0.5
                waves = waves * half
            shape = list(m.shape)
            m = waves.to(m) @ m.reshape(math.prod(shape[: 1 + a]), shape[1 + a], -1)
            shape[1 + a] = len(places)
            m = m.reshape(shape)
        m = m.permute(0, *(1 + a for a in others), *(1 + a for a in axes), -2, -1)
        if not grid.real or ndim - 1 not in axes:
            return m
        if not others:
            return 2 * m.real
        dims = [1 + d for d in range(len(others))]
        m = m + m.flip(dims).roll([1] * len(dims), dims).conj()
        return m.narrow(len(dims), 0, grid.sizes[others[-1]] // 2 + 1)

    def kernel(self) -> Tensor:
        """The first block column: ``(blocks, rows, columns, *grid.sizes)``."""
        return self.grid.inverse(self.matrices.movedim((-2, -1), (1, 2)))


class FactoredCapacitance:
    """``I - E P E^H`` for E of one column; P and E are stored, and a row of the product is computed when needed.

    Args:
        P: one number per frequency.
        E: one column per frequency.
    """

    def __init__(self, P: FrequencyMatrices, E: FrequencyMatrices) -> None:
        self.P, self.E, self.grid = P, E, E.grid
        self.rows = self.columns = E.rows
        self.blocks, self.dtype, self.device = E.blocks, E.dtype, E.device
        self.nbytes = 0  # P and E are counted by their owner

    def _row(self, row: int) -> FrequencyMatrices:
        """A row of ``-E P E^H``."""
        E = self.E.matrices
        row_of_EP = (E[..., row : row + 1, :] * self.P.matrices).neg_()
        return FrequencyMatrices(self.grid, row_of_EP * E.mH, elementwise=True)

    def kernel(self) -> Tensor:
        """The first block column: ``(blocks, rows, columns, *grid.sizes)``."""
        kernel = torch.cat([self._row(row).kernel() for row in range(self.rows)], dim=1)
        kernel.flatten(3)[..., 0].diagonal(dim1=1, dim2=2).add_(1)
        return kernel

    def reads_lags(self, axes: tuple[int, ...], lags: int) -> bool:
        """Tell whether :meth:`at_lags` costs less than :meth:`kernel`: always, but for lags along all axes."""
        return len(axes) < len(self.grid.sizes)

    def at_lags(self, axes: tuple[int, ...], lags: list[Tensor]) -> Tensor:
        """Compute as :meth:`FrequencyMatrices.at_lags`, a row at a time."""
        rows = torch.cat([self._row(row).at_lags(axes, lags) for row in range(self.rows)], dim=-2)
        at_zero = torch.ones((), dtype=torch.bool)
        for places in lags:
            at_zero = at_zero.unsqueeze(-1) & (places == 0)
        rows.diagonal(dim1=-2, dim2=-1).add_(at_zero.to(rows.device).unsqueeze(-1))
        return rows


def symbol(convolution: Convolution, embedding: Embedding | None = None) -> FrequencyMatrices:
    r"""The symbol of a convolution on its periodic grid.

    Args:
        convolution: padding mode "zeros" (embedded in a larger periodic grid) or "circular".
        embedding: the grid to use; by default the convolution's own.

    Returns:
        FrequencyMatrices of ``out_channels/groups`` rows and ``in_channels/groups * prod(stride)`` columns, one block
        per group and per kernel of a batch.

    Raises:
        MethodError: the convolution is not a truncated block-circulant operator.

    Source:
        Sedghi, Gupta, Long, "The singular values of convolutional layers", ICLR 2019, for stride 1.

    Example:
        >>> A = lsconv.Conv1d(torch.tensor([[[1.0, 2.0, 1.0]]]), in_size=(4,), padding=1, padding_mode="circular")
        >>> lsconv.fourier.symbol.symbol(A).matrices.flatten().abs()
        tensor([4., 2., 0.])
    """
    if embedding is None:
        if not Embedding.serves(convolution):
            raise MethodError(
                f"symbol: padding_mode={convolution.padding_mode!r} with stride {convolution.stride} on "
                f"{convolution.spatial_in} is not block-circulant"
            )
        embedding = Embedding(convolution)
    grid = Grid(embedding.grid, real=not convolution.is_complex)
    entries = embedding.out_channels * embedding.in_channels
    if entries > ELEMENTWISE_ENTRIES and set(embedding.stride) == {1} and max(embedding.kernel_size) <= FEW_WAVES:
        k = embedding.weight_blocks(convolution.weight).movedim((1, 2), (-2, -1))
        return FrequencyMatrices(
            grid, from_taps(k, [torch.tensor([tau for _, tau in a.taps]) for a in embedding.axes], grid)
        )
    kernel = embedding.kernel_to_grid(convolution.weight)
    # cross-correlation: the conjugate of the transform of the conjugate kernel
    matrices = grid.transform(kernel.conj().resolve_conj()).conj().resolve_conj()
    return FrequencyMatrices(grid, matrices.movedim((1, 2), (-2, -1)))


def from_taps(k: Tensor, positions: list[Tensor], grid: Grid) -> Tensor:
    """The symbol of a kernel of few taps, by a sum over the taps of one axis after the other.

    Args:
        k: ``(blocks, *taps, rows, columns)``.
        positions: along every axis those of the taps.
        grid: the periodic grid.
    """
    k = k.to(k.dtype.to_complex()).contiguous()
    shape = list(k.shape)
    for a in reversed(range(len(positions))):
        waves = plane_waves(positions[a], grid.sizes[a], grid.frequencies[a]).mT.to(k)
        k = waves @ k.reshape(math.prod(shape[: 1 + a]), shape[1 + a], -1)
        shape[1 + a] = grid.frequencies[a]
    return k.reshape(shape)


def gram(S: Tensor, side: str) -> Tensor:
    """``S S^H`` ("residual") or ``S^H S`` ("solution") per frequency."""
    return S @ S.mH if side == "residual" else S.mH @ S


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` per frequency; without a batched product where that only scales."""
    return a * b if a.shape[-1] == 1 else a @ b


def shifted(matrices: Tensor, mu: Tensor) -> Tensor:
    """``matrices + mu I``, as a copy."""
    shifted = matrices.expand(broadcast_shapes(matrices.shape, (mu.shape[0], *matrices.shape[1:]))).clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(mu[..., 0])
    return shifted


def largest_eigenvalue(squared: Tensor) -> Tensor:
    """Bound the largest eigenvalue of each block from above, to a factor of the fourth root of the matrix size."""
    flat = squared.flatten(1, -3)
    square = flat @ flat if squared.shape[-1] > 1 else flat.abs() ** 2
    return frobenius(square).amax(-1).sqrt()


def saddle_inverse(S: Tensor, squared: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
    r"""Invert the saddle-point form; return the inverse, and the smaller of W and V.

    .. math::
        \begin{pmatrix} -\sqrt\mu & S \\ S^H & \sqrt\mu \end{pmatrix}^{-1}
            = \begin{pmatrix} -\sqrt\mu\, W & W S \\ S^H W & \sqrt\mu\, V \end{pmatrix}, \qquad
        W = (S S^H + \mu)^{-1}, \quad V = (S^H S + \mu)^{-1}

    Only the smaller of W and V is factorised; the other follows from :math:`\mu V = I - S^H W S`.

    Args:
        S: the symbol, ``(blocks, *frequencies, rows, columns)``.
        squared: the smaller Gram matrix of S.
        mu: the damping squared, positive, of a shape that broadcasts with ``squared``.
    """
    rows, columns = S.shape[-2:]
    smaller = hermitian_inverse(shifted(squared, mu).contiguous())
    if rows <= columns:
        W = smaller
        WS = W @ S
        V = _complement_over_mu(S.mH @ WS, mu)
    else:
        V = smaller
        WS = S @ V
        W = _complement_over_mu(WS @ S.mH, mu)
    root = mu.sqrt()
    inverse = S.new_empty(*W.shape[:-2], rows + columns, rows + columns)
    torch.mul(W, -root, out=inverse[..., :rows, :rows])
    inverse[..., :rows, rows:] = WS
    inverse[..., rows:, :rows] = WS.mH
    torch.mul(V, root, out=inverse[..., rows:, rows:])
    return inverse, smaller


def _complement_over_mu(projected: Tensor, mu: Tensor) -> Tensor:
    """``(I - projected) / mu``; overwrites ``projected``."""
    projected.neg_().diagonal(dim1=-2, dim2=-1).add_(1)
    return projected.div_(mu)
