r"""The damped inverse of a symbol by LU factors of its Gram matrices, refined by residuals of the operator.

.. math:: x = (A^H A + \mu)^{-1} A^H y = A^H (A A^H + \mu)^{-1} y

The smaller of :math:`S^H S + \mu` and :math:`S S^H + \mu` is factorised at every frequency. These matrices are the
symbol of a convolution too, with the autocorrelation of A's kernel, so that S itself is not needed: the products are
those of A. Their condition number is at most their trace over :math:`\mu`. It says by how much the factors amplify
rounding, and how many steps of refinement remove that.

Björck, BIT 7 (1967), for the refinement, whose residual is that of the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lsconv.fourier.batched_linalg import chunks, lu_factor_in_place
from lsconv.fourier.embedding import Embedding
from lsconv.fourier.frequency_inverse import FactoredInverse, largest_matrices
from lsconv.fourier.frequency_matrices import FrequencyMatrices, Grid, repeat_for_items
from lsconv.fourier.symbol import from_taps, symbol
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import over_items
from lsconv.operators.convolution import Convolution
from lsconv.operators.dtypes import ROUNDING, direct_rtol
from lsconv.operators.fft_convolution import FEW_WAVES

__all__ = ["DampedInverse"]


class DampedInverse:
    r""":math:`(A^H A + \mu)^{-1} A^H` of a block-circulant A.

    Args:
        A: the operator, in double precision.
        embedding: its grid, on which nothing is cropped.
        damp: the root of mu, positive; its shape broadcasts with the batch dimensions.
        dtype: the dtype of the answers, for which the accuracy has to suffice.

    Attributes:
        steps: the steps of refinement that an answer takes; None where they would be many, and nothing is solved.
        norm: a lower bound of the largest singular value of each block.
        largest_norm: the largest Frobenius norm of the symbol of each block.
    """

    def __init__(self, A: Convolution, embedding: Embedding, damp: Tensor, dtype: torch.dtype) -> None:
        self.embedding, self._mu = embedding, damp.double().square()
        self._wide = embedding.out_channels < embedding.in_channels
        self._B: LinearOperator = A.H if self._wide else A  # has no more columns than rows
        self._to_grid: Callable[[Tensor], Tensor] = embedding.inputs_to_grid
        self._from_grid: Callable[[Tensor, tuple[int, ...]], Tensor] = embedding.inputs_from_grid
        if self._wide:
            self._to_grid, self._from_grid = embedding.outputs_to_grid, embedding.outputs_from_grid
        matrices = _transposed_gram(A, embedding, wide=self._wide)
        if matrices.shape[0] != embedding.blocks:  # one kernel for all batch items
            matrices = repeat_for_items(matrices, embedding.blocks)
        flat = matrices.flatten(1, -3)
        squares, mu = flat.diagonal(dim1=-2, dim2=-1).real.sum(-1), embedding.per_block(self._mu)
        self.largest_norm = squares.amax(1).clamp_min(0).sqrt()
        self.norm = torch.linalg.eigvalsh(largest_matrices(flat, squares)).amax((1, 2)).clamp_min(0).sqrt()
        self.steps = _steps(1 + float((squares.amax(1) / mu).amax()), dtype)
        if self.steps is None:
            return
        flat.diagonal(dim1=-2, dim2=-1).add_(mu[:, None, None])
        factors, pivots, _ = lu_factor_in_place(matrices.flatten(0, -3).mT)  # LAPACK's order
        none = torch.empty(0, dtype=torch.int64, device=mu.device)
        self._gram_inverse = FactoredInverse(_grid(A, embedding), factors, pivots, none, factors[:0])

    @property
    def size(self) -> int:
        """The number of rows of the matrices."""
        return self._gram_inverse.factors.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of the factors."""
        return self._gram_inverse.nbytes

    def solve(self, y: Tensor) -> Tensor:
        """The solutions ``(*batch, *in_shape)`` for ``(*batch, *out_shape)``, in double precision."""
        return self._adjoint_solve_tall(y) if self._wide else self._solve_tall(y)

    def solve_adjoint(self, x: Tensor) -> Tensor:
        """The adjoint of :meth:`solve`."""
        return self._solve_tall(x) if self._wide else self._adjoint_solve_tall(x)

    def explicit(self, S: FrequencyMatrices) -> FrequencyMatrices:
        """The inverses as matrices, for many right-hand sides, as accurate as answers that are not refined.

        Args:
            S: the symbol, one block for each of the embedding.
        """
        factors, pivots = self._gram_inverse.factors, self._gram_inverse.pivots
        flat = S.matrices.flatten(0, -3)
        found = flat.new_empty(len(flat), S.columns, S.rows)
        for part in chunks(flat):
            Z = torch.linalg.lu_solve(factors[part], pivots[part], _tall(flat[part], self._wide).mH)
            found[part] = Z.mH if self._wide else Z
        return FrequencyMatrices(S.grid, found.reshape(*S.matrices.shape[:-2], S.columns, S.rows))

    def _solve_tall(self, y: Tensor) -> Tensor:
        """``(B^H B + mu)^-1 B^H y``."""
        B = self._B
        return self._refined(B.adjoint(y), lambda z: B.adjoint(y - B.apply(z)))

    def _adjoint_solve_tall(self, x: Tensor) -> Tensor:
        """``B (B^H B + mu)^-1 x``."""
        B = self._B
        return B.apply(self._refined(x, lambda z: x - B.adjoint(B.apply(z))))

    def _refined(self, g: Tensor, residual: Callable[[Tensor], Tensor]) -> Tensor:
        """``z = (B^H B + mu)^-1 g`` by the factors, refined; ``residual(z)`` is ``g - B^H B z``."""
        mu = over_items(self._mu, len(self._B.in_shape))
        z = self._gram_solve(g)
        for _ in range(self.steps or 0):
            z = z + self._gram_solve(residual(z) - mu * z)
        return z

    def _gram_solve(self, z: Tensor) -> Tensor:
        """``(B^H B + mu)^-1 z``, by the factors."""
        batch, _ = self.embedding.split_batch(tuple(z.shape[: z.ndim - len(self._B.in_shape)]))
        return self._from_grid(self._gram_inverse.on_grid(self._to_grid(z)), batch)


def _steps(condition: float, dtype: torch.dtype) -> int | None:
    """The steps of refinement that answers in ``dtype`` need; None where they would be many.

    Factors and steps each leave ``contraction`` of the error. What may be left is the rounding of the answer, which for
    every method is amplified by the root of the condition, and a gradient within the tolerance. That is relative to the
    norms of residual and damped solution, which together are at least ``||y||`` over that root.

    Args:
        condition: that of the normal equations.
    """
    eps = torch.finfo(torch.float64).eps
    contraction, root = ROUNDING * eps * condition, math.sqrt(condition)
    tolerance = min(max(torch.finfo(dtype).eps, eps * root), direct_rtol(dtype) / root)
    if not contraction**5 <= eps:  # more than four steps cost no less than singular values
        return None
    return max(0, math.ceil(math.log(tolerance) / math.log(contraction)) - 1)


def _grid(A: Convolution, embedding: Embedding) -> Grid:
    """The grid of the embedding with the frequencies of A's symbol, half of them where A is real."""
    return Grid(embedding.grid, real=not A.is_complex)


def _transposed_gram(A: Convolution, embedding: Embedding, *, wide: bool) -> Tensor:
    """The transposes of ``S^H S``, or where A is wide of ``S S^H``: ``(blocks, *frequencies, size, size)``."""
    size, taps = min(embedding.in_channels, embedding.out_channels), math.prod(embedding.kernel_size)
    lags = 2 * max(embedding.kernel_size) - 1
    frequencies = math.prod(_grid(A, embedding).frequencies)
    # fewer terms than in the products of the matrices, and pairs of taps than frequencies
    if set(embedding.stride) == {1} and lags <= min(size, FEW_WAVES) and taps**2 <= frequencies:
        return _gram_from_taps(A, embedding, wide=wide)
    S = symbol(A, embedding).matrices
    gram = S.new_empty(*S.shape[:-2], size, size)
    flat, found = S.flatten(0, -3), gram.view(-1, size, size)
    for part in chunks(flat):
        B = _tall(flat[part], wide)
        torch.matmul(B.mT, B.conj(), out=found[part])
    return gram


def _tall(matrices: Tensor, wide: bool) -> Tensor:
    """The matrices of A, or where A is wide those of its adjoint."""
    return matrices.mH if wide else matrices


def _gram_from_taps(A: Convolution, embedding: Embedding, *, wide: bool) -> Tensor:
    """Compute :func:`_transposed_gram` by a sum over the autocorrelation of the kernel."""
    k = embedding.weight_blocks(A.weight).flatten(3).movedim(-1, 1)  # blocks, taps, rows, columns
    steps = A.dilation
    if wide:  # the adjoint reads in the other direction
        k, steps = k.mH, tuple(-step for step in steps)
    blocks, count, _, size = k.shape
    columns = k.movedim(1, 2).flatten(2)
    pairs = (columns.mT @ columns.conj()).unflatten(2, (count, size)).unflatten(1, (count, size))
    lags = [2 * n - 1 for n in embedding.kernel_size]
    # taps as cells of the array of lags: a difference of two cells and the last tap give the cell of their lag
    cells = torch.arange(math.prod(lags)).reshape(lags)[tuple(slice(n) for n in embedding.kernel_size)].flatten()
    cell = (cells[:, None] - cells + cells[-1]).flatten().to(k.device)
    sums = pairs.new_zeros(blocks, math.prod(lags), size, size)
    sums.index_add_(1, cell, pairs.transpose(2, 3).flatten(1, 2))  # K_t^T conj(K_s) belongs to the lag t - s
    positions = [step * torch.arange(1 - n, n) for step, n in zip(steps, embedding.kernel_size, strict=True)]
    return from_taps(sums.unflatten(1, lags), positions, _grid(A, embedding))
