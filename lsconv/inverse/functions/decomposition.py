r"""svd: the singular value decomposition of a convolution, with the factors as operators.

A block-circulant :math:`A = F^{-1} \hat S(\omega) F`, with :math:`\hat S = \hat U \Sigma \hat V^H` per frequency, has

.. math:: A = U \operatorname{diag}(\Sigma)\, V^H, \qquad U = F^{-1} \hat U F\, W, \quad V = F^{-1} \hat V F\, W,

where W is unitary and diagonalises :math:`F^{-1} \Sigma F`. For a complex A it is the inverse Fourier transform. For a
real A it is the Hartley transform, and :math:`\hat U` and :math:`\hat V` are made complex conjugate at opposite
frequencies; then U and V are real.

A convolution with a separable kernel has the Kronecker products of the decompositions of its axes.

Sedghi, Gupta, Long, ICLR 2019; Bracewell, "Discrete Hartley transform" (1983).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lsconv.errors import MethodError
from lsconv.factored.kronecker import along_axes, separable_svd
from lsconv.fourier.circulant import block_circulant, double_symbol
from lsconv.fourier.embedding import Embedding
from lsconv.fourier.frequency_matrices import FrequencyMatrices
from lsconv.operators.convolution import Convolution
from lsconv.operators.dtypes import double, real_dtype
from lsconv.operators.elementary import FromFunctions

__all__ = ["SingularValueDecomposition", "svd"]


@dataclass(frozen=True)
class SingularValueDecomposition:
    r""":math:`A = U \operatorname{diag}(S) V^H`.

    Attributes:
        U: the left singular vectors, an operator from coefficients to ``A.out_shape`` with orthonormal columns.
        S: the singular values, in the shape of the coefficients and in no order.
        V: the right singular vectors, from coefficients to ``A.in_shape``.
    """

    U: FromFunctions
    S: Tensor
    V: FromFunctions


@torch.no_grad()
def svd(A: Convolution) -> SingularValueDecomposition:
    r"""The singular value decomposition of a block-circulant convolution or of one with a separable kernel.

    Functions of A for the price of a few transforms: the filtered solution is ``V(f(S) * U.H(y))``, a truncated one
    keeps ``S > threshold``. Computed in double precision; not differentiable.

    Args:
        A: a convolution with ``padding_mode="circular"`` whose stride divides the input and whose outputs fill the
            grid; or one with a separable kernel, whatever its padding. One kernel for all batch items.

    Returns:
        A :class:`SingularValueDecomposition` with the operators U and V, and their adjoints ``U.H`` and ``V.H``.

    Raises:
        MethodError: A is neither, or has a kernel per batch item.
        DtypeError: A is in half precision.

    Source:
        Sedghi, Gupta, Long, ICLR 2019; Van Loan, "The ubiquitous Kronecker product" (2000).

    Example:
        >>> A = lsconv.Conv2d(torch.randn(2, 2, 3, 3), (8, 8), padding=1, padding_mode="circular")
        >>> x, d = torch.randn(2, 8, 8), lsconv.svd(A)
        >>> torch.allclose(d.U(d.S * d.V.H(x)), A(x), atol=1e-4), torch.allclose(d.V.H(d.V(d.S)), d.S, atol=1e-4)
        (True, True)
    """
    real_dtype(A.dtype)
    if not isinstance(A, Convolution) or A.batch_shape:
        raise MethodError(f"svd: expected a convolution with one kernel for all batch items, got {A!r}")
    embedding = _uncropped_circulant(A)
    if embedding is not None:
        return _of_circulant(A, embedding)
    parts = separable_svd(A)
    if parts is None:
        raise MethodError(
            f"svd: {A!r} is neither block-circulant nor separable; torch.linalg.svd(A.to_dense()) serves small ones"
        )
    left, values, right = parts
    return _decomposition(
        A,
        values.flatten(0, 1),
        [partial(along_axes, left), partial(along_axes, [U.mH for U in left])],
        [partial(along_axes, right), partial(along_axes, [V.mH for V in right])],
    )


def _uncropped_circulant(A: Convolution) -> Embedding | None:
    """The grid of a block-circulant convolution whose cells are all inputs; None where A is not such a convolution."""
    try:
        embedding = block_circulant(A)
    except MethodError:
        return None
    uncropped = embedding.in_channels * math.prod(embedding.grid) * embedding.groups == A.in_numel
    return embedding if uncropped else None


Maps = Sequence[Callable[[Tensor], Tensor]]


def _decomposition(A: Convolution, values: Tensor, left: Maps, right: Maps) -> SingularValueDecomposition:
    """Make the operators U and V of pairs (map, its adjoint), which compute in double precision."""
    shape = tuple(values.shape)

    def operator(item: tuple[int, ...], maps: Maps) -> FromFunctions:
        forward, adjoint = ((lambda z, f=f: f(z.to(double(A.dtype))).to(A.dtype)) for f in maps)
        return FromFunctions(shape, item, forward, adjoint, dtype=A.dtype, device=A.device)

    return SingularValueDecomposition(
        operator(A.out_shape, left), values.to(real_dtype(A.dtype)), operator(A.in_shape, right)
    )


def _of_circulant(A: Convolution, embedding: Embedding) -> SingularValueDecomposition:
    """Decompose a block-circulant A by its symbol; for real A in the basis of the Hartley transform."""
    S = double_symbol(A, embedding)
    U, values, Vh = torch.linalg.svd(S.matrices, full_matrices=False)
    V = Vh.mH
    if S.grid.real:
        U, values, V = _conjugate_pairs(S, U, values, V)
        half = values.shape[-2]
        mirrored = _opposite(values, len(S.grid.sizes) - 1)[..., 1 : S.grid.sizes[-1] - half + 1, :].flip(-2)
        values = torch.cat([values, mirrored], -2)
    shape = (embedding.groups * values.shape[-1], *S.grid.sizes)
    dims = S.grid.dims

    def from_coefficients(z: Tensor) -> Tensor:
        if not S.grid.real:
            return torch.fft.ifftn(z, dim=dims, norm="ortho")
        spectrum = torch.fft.fftn(z, dim=dims, norm="ortho")
        return spectrum.real - spectrum.imag

    def to_coefficients(z: Tensor) -> Tensor:
        return from_coefficients(z) if S.grid.real else torch.fft.fftn(z, dim=dims, norm="ortho")

    def maps(matrices: Tensor, to_grid: Callable[..., Tensor], from_grid: Callable[..., Tensor]) -> Maps:
        operator = FrequencyMatrices(S.grid, matrices)
        operator_adjoint = operator.H

        def apply(z: Tensor) -> Tensor:
            batch = tuple(z.shape[: z.ndim - len(shape)])
            blocks = z.reshape(-1, embedding.groups, matrices.shape[-1], *S.grid.sizes)
            return from_grid(operator.on_grid(from_coefficients(blocks)), batch)

        def adjoint(x: Tensor) -> Tensor:
            batch = tuple(x.shape[: x.ndim - len(shape)])
            return to_coefficients(operator_adjoint.on_grid(to_grid(x))).reshape(*batch, *shape)

        return apply, adjoint

    return _decomposition(
        A,
        values.movedim(-1, 1).reshape(shape),
        maps(U, embedding.outputs_to_grid, embedding.outputs_from_grid),
        maps(V, embedding.inputs_to_grid, embedding.inputs_from_grid),
    )


def _conjugate_pairs(S: FrequencyMatrices, U: Tensor, values: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Make the factors at opposite frequencies conjugate, where the halved spectrum holds both.

    That is the case on the planes where the frequency of the last axis is zero or half of the sampling frequency. A
    frequency that is its own opposite gets real factors.
    """
    others = S.grid.sizes[:-1]
    index = torch.arange(math.prod(others), device=U.device).reshape(others)
    opposite = _opposite(index[None, ..., None, None], len(others))[0, ..., 0, 0]
    # One of each pair is computed, and the other one is its conjugate.
    first, self_conjugate = ((each[..., None, None]) for each in (index < opposite, index == opposite))
    U, values, V = U.clone(), values.clone(), V.clone()
    for plane in {0, S.grid.sizes[-1] // 2} if S.grid.sizes[-1] % 2 == 0 else {0}:
        at: Any = (slice(None), *(slice(None) for _ in others), plane)
        real_U, real_values, real_Vh = torch.linalg.svd(S.matrices[at].real, full_matrices=False)
        for vectors, real in ((U, real_U), (V, real_Vh.mT)):
            mirrored = _opposite(vectors[at].unsqueeze(-3), len(others)).squeeze(-3).conj()
            vectors[at] = torch.where(self_conjugate, real.to(vectors.dtype), torch.where(first, vectors[at], mirrored))
        mirrored = _opposite(values[at].unsqueeze(-2), len(others)).squeeze(-2)
        values[at] = torch.where(self_conjugate[..., 0], real_values, torch.where(first[..., 0], values[at], mirrored))
    return U, values, V


def _opposite(z: Tensor, count: int) -> Tensor:
    """Reorder ``(blocks, *frequencies, ...)`` so that k is replaced by -k along the first ``count`` axes."""
    dims = tuple(range(1, 1 + count))
    return z.flip(dims).roll((1,) * count, dims) if count else z
