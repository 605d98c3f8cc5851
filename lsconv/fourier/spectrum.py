r"""Norms, condition numbers and singular values: exact where the operator is block-circulant.

The singular values of a block-circulant operator are those of its symbol, all frequencies together: Sedghi, Gupta,
Long, "The singular values of convolutional layers", ICLR 2019.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from lsconv.errors import ArgumentError, ConvergenceWarning, MethodError
from lsconv.factored.dense_svd import DENSE_ENTRIES
from lsconv.factored.kronecker import separable_singular_values
from lsconv.fourier.circulant import block_circulant, circulant_embedding, double_symbol
from lsconv.fourier.embedding import Embedding
from lsconv.fourier.frequency_inverse import singular_values_by_frequency
from lsconv.fourier.frequency_matrices import FrequencyMatrices
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import over_items
from lsconv.operators.convolution import Convolution
from lsconv.operators.dtypes import double, real_dtype

__all__ = ["cond", "norm", "singular_values"]


@torch.no_grad()
def singular_values(A: LinearOperator, k: int | None = None) -> Tensor:
    r"""The singular values, exactly, descending.

    A block-circulant convolution has those of its symbol, :math:`\bigcup_\omega \sigma(S(\omega))`; for real kernels
    the frequencies of a conjugate pair count twice. A convolution with a separable kernel, whatever its padding and
    stride, has the products of those of its axes. Other operators are written out as a matrix, when it has at most
    2**20 entries. Computed in double precision; not differentiable (:func:`lsconv.norm` is).

    Args:
        A: the operator.
        k: how many, the largest ones; None: all.

    Returns:
        Real tensor ``(*A.batch_shape, k)``, at most ``min(A.out_numel, A.in_numel)``.

    Raises:
        MethodError: A is neither block-circulant, nor separable, nor small.
        ArgumentError: k is below one.
        DtypeError: A is in half precision.

    Source:
        Sedghi, Gupta, Long, ICLR 2019, theorem 6; Van Loan, "The ubiquitous Kronecker product" (2000).

    Example:
        >>> A = lsconv.Conv1d(torch.tensor([[[1.0, 2.0, 1.0]]]), in_size=4, padding=1, padding_mode="circular")
        >>> lsconv.singular_values(A)
        tensor([4., 2., 2., 0.])
        >>> g = torch.tensor([1.0, 2.0, 1.0]) / 4
        >>> lsconv.singular_values(lsconv.Conv2d(torch.outer(g, g)[None, None], (30, 30), padding=1), k=2)
        tensor([0.9949, 0.9872])
    """
    dtype = real_dtype(A.dtype)
    if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
        raise ArgumentError(f"k: expected a number >= 1 of singular values, or None for all, got {k!r}")
    values: Tensor | None
    if circulant_embedding(A) is not None:
        assert isinstance(A, Convolution)
        values = _double_singular_values(A)
    else:
        values = separable_singular_values(A) if isinstance(A, Convolution) else None
        if values is None and A.in_numel * A.out_numel <= DENSE_ENTRIES:
            values = torch.linalg.svdvals(A.to_dense().to(double(A.dtype)))
    if values is None:
        raise MethodError(
            f"singular_values: {A!r} is neither block-circulant nor separable, and its matrix of {A.out_numel} x "
            f"{A.in_numel} is larger than the {DENSE_ENTRIES} entries that are worked out densely; lsconv.norm finds "
            "the largest one, and torch.linalg.svdvals(A.to_dense()) all of them at your risk"
        )
    return values[..., :k].to(dtype)


def _double_singular_values(A: Convolution, name: str = "singular_values") -> Tensor:
    """All singular values of a block-circulant convolution, float64, descending, ``(*batch, min(m, n))``."""
    embedding, S = _circulant(A, name)
    values = singular_values_by_frequency(S.matrices).flatten(1, -2)  # blocks, frequencies, min(rows, columns)
    weights = S.grid.weights(A.device, torch.float64).flatten().long()
    values = values.repeat_interleave(weights, dim=1)
    values = values.reshape(*embedding.batch_shape, -1).sort(dim=-1, descending=True).values
    # On the grid of a strided pointwise convolution some cells are no inputs; they add singular values of zero.
    return values[..., : min(A.out_numel, A.in_numel)]


def _circulant(A: Convolution, name: str) -> tuple[Embedding, FrequencyMatrices]:
    """The grid and the symbol of a block-circulant convolution; ``name``: the calling function, for messages."""
    real_dtype(A.dtype)
    try:
        embedding = block_circulant(A, name=name)
    except MethodError as error:
        raise MethodError(f"{error}; for a small operator there is also torch.linalg.svdvals(A.to_dense())") from None
    return embedding, double_symbol(A, embedding)


@torch.no_grad()
def norm(A: LinearOperator, *, rtol: float | None = None, max_iter: int = 500) -> Tensor:
    """The spectral norm of A without derivatives, ``A.batch_shape``; arguments as of :func:`lsconv.norm`."""
    dtype = real_dtype(A.dtype)
    rtol = torch.finfo(dtype).eps ** (1 / 3) if rtol is None else rtol
    if not rtol > 0:
        raise ArgumentError(f"rtol: expected a positive number, got {rtol}")
    if circulant_embedding(A) is not None:
        assert isinstance(A, Convolution)
        embedding, S = _circulant(A, "norm")
        largest = singular_values_by_frequency(S.matrices).flatten(1).amax(1)
        return largest.reshape(*embedding.batch_shape, -1).amax(-1).to(dtype)
    return _golub_kahan_norm(A, rtol, max_iter).to(dtype)


def _golub_kahan_norm(A: LinearOperator, rtol: float, max_iter: int) -> Tensor:
    """Estimate the norm of A, per item, by Golub-Kahan bidiagonalisation to a relative residual of ``rtol``."""
    batch, item = A.batch_shape, tuple(range(len(A.batch_shape), len(A.batch_shape) + len(A.in_shape)))
    out_item = tuple(range(len(batch), len(batch) + len(A.out_shape)))

    def unit(z: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The normalised vectors, and their norms."""
        largest = z.abs().amax(dims, keepdim=True)  # divided out, lest squares overflow or underflow
        z = z / torch.where(largest > 0, largest, 1)
        size = torch.linalg.vector_norm(z, dim=dims, keepdim=True)
        return z / torch.where(size > 0, size, 1), (size.double() * largest.double()).reshape(batch)

    generator, real = torch.Generator().manual_seed(0), real_dtype(A.dtype)
    v, _ = unit(torch.randn(*batch, *A.in_shape, dtype=A.dtype, generator=generator).to(A.device), item)
    u, alpha = unit(A.apply(v), out_item)
    alphas, betas = [alpha], []
    sigma: Tensor = alpha
    residual = torch.full_like(alpha, math.inf)
    for k in range(1, max_iter + 1):
        v, beta = unit(A.adjoint(u) - over_items(alphas[-1].to(real), len(item)) * v, item)
        betas.append(beta)
        if k % 10 == 0 or k == max_iter or k >= min(A.in_numel, A.out_numel):  # the SVD is not taken in every step
            bidiagonal = torch.diag_embed(torch.stack(alphas, -1))
            if k > 1:
                bidiagonal = bidiagonal + torch.diag_embed(torch.stack(betas[:-1], -1), offset=1)
            P, s, _ = torch.linalg.svd(bidiagonal)
            sigma, residual = s[..., 0], beta * P[..., -1, 0].abs()
            if bool((residual <= rtol * sigma).all()):
                return sigma
        u, alpha = unit(A.apply(v) - over_items(beta.to(real), len(out_item)) * u, out_item)
        alphas.append(alpha)
    worst = float((residual / sigma.clamp_min(torch.finfo(sigma.dtype).tiny)).max())
    warnings.warn(
        f"norm: after {max_iter} iterations the relative residual is {worst:.1e}, above rtol = {rtol:.1e}; the value "
        "returned is a lower bound",
        ConvergenceWarning,
        stacklevel=4,
    )
    return sigma


@torch.no_grad()
def cond(A: LinearOperator) -> Tensor:
    r"""The condition number :math:`\sigma_1 / \sigma_{\min(m, n)}`; infinity, or of the order of 1/eps, when A is
    rank deficient.

    Exact for block-circulant convolutions. Other operators are written out as a matrix, when it has at most 2**20
    entries. Not differentiable.

    Args:
        A: a block-circulant convolution, or a small operator.

    Returns:
        Real tensor of shape ``A.batch_shape``.

    Raises:
        MethodError: A is neither block-circulant nor small.
        DtypeError: A is in half precision.

    Example:
        >>> A = lsconv.Conv1d(torch.tensor([[[1.0, 3.0, 1.0]]]), in_size=4, padding=1, padding_mode="circular")
        >>> lsconv.cond(A)
        tensor(5.)
    """
    dtype = real_dtype(A.dtype)
    if circulant_embedding(A) is not None:
        assert isinstance(A, Convolution)
        values = _double_singular_values(A, "cond")
    elif A.in_numel * A.out_numel <= DENSE_ENTRIES:
        values = torch.linalg.svdvals(A.to_dense())
    else:
        raise MethodError(
            f"cond: {A!r} is not block-circulant, and its matrix of {A.out_numel} x {A.in_numel} is larger than the "
            f"{DENSE_ENTRIES} entries that are worked out densely; torch.linalg.svdvals(A.to_dense()) does it at your "
            "risk, and cond of the same convolution with padding_mode='circular' is exact at any size"
        )
    largest, smallest = values[..., 0], values[..., -1]
    return torch.where(smallest > 0, largest / smallest, math.inf).to(dtype)
