r"""The spectral norm with its derivative, from the leading right singular vector."""

from __future__ import annotations

import torch
from torch import Tensor

from lsconv.errors import ArgumentError, ConvergenceWarning, MethodError, warn
from lsconv.fourier import spectrum
from lsconv.fourier.circulant import block_circulant
from lsconv.fourier.frequency_inverse import singular_values_by_frequency
from lsconv.fourier.symbol import symbol
from lsconv.krylov.gradients.attach import needs_gradient
from lsconv.krylov.lanczos import Lanczos
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import over_items
from lsconv.operators.convolution import Convolution
from lsconv.operators.dtypes import double, real_dtype
from lsconv.operators.transforms import untraced

__all__ = ["leading_vector", "norm"]


@untraced
def norm(A: LinearOperator, *, rtol: float | None = None, max_iter: int = 500) -> Tensor:
    r"""The spectral norm of A, its largest singular value, differentiable by the tensors that A is made of.

    Block-circulant convolutions: exact, from the symbol. Every other operator, zero-padded convolutions among them: the
    Lanczos process from a fixed random start, a lower bound that grows to the norm. It stops when the residual of its
    singular triplet, :math:`\|A^H u - \sigma v\|` with :math:`Av = \sigma u`, is at most ``rtol * sigma``. A singular
    value then lies within that distance, and where the largest one stands apart by a relative gap g the error is about
    ``rtol**2 / g``, that of the derivative, :math:`d\sigma = \mathrm{Re}\, u^H\, dA\, v`, about ``rtol / g``. First
    derivatives, in reverse and forward mode.

    Args:
        A: any operator.
        rtol: tolerance of the residual; None: ``eps ** (1/3)``, which is 6e-6 in float64 and 5e-3 in float32.
        max_iter: limit on the applications of A and of its adjoint; when it is met, a ConvergenceWarning tells the
            residual.

    Returns:
        Real tensor of shape ``A.batch_shape``.

    Raises:
        ArgumentError: ``rtol`` is not positive.
        DtypeError: A is in half precision.

    Source:
        Golub and Kahan (1965); Kuczyński and Wozniakowski (1992) for the random start.

    Example:
        >>> weight = torch.tensor([[[1.0, 2.0, 1.0]]], dtype=torch.float64, requires_grad=True)
        >>> value = lsconv.norm(lsconv.Conv1d(weight, in_size=20, padding=1))
        >>> value.backward()
        >>> torch.allclose(value, 2 + 2 * torch.cos(torch.tensor(torch.pi / 21, dtype=torch.float64)))
        True
    """
    if not needs_gradient(A):
        return spectrum.norm(A, rtol=rtol, max_iter=max_iter)
    dtype = real_dtype(A.dtype)
    rtol = torch.finfo(dtype).eps ** (1 / 3) if rtol is None else rtol
    if not rtol > 0:
        raise ArgumentError(f"rtol: expected a positive number, got {rtol}")
    try:
        embedding = block_circulant(A)
    except MethodError:
        v = leading_vector(A, rtol=rtol, max_iter=max_iter)
        return torch.linalg.vector_norm(A.apply(v).flatten(len(A.batch_shape)), dim=-1)
    assert isinstance(A, Convolution)
    A_double = A.to(dtype=double(A.dtype))
    values = singular_values_by_frequency(symbol(A_double, embedding).matrices)
    return values.reshape(*embedding.batch_shape, -1).amax(-1).to(dtype)


@torch.no_grad()
def leading_vector(
    A: LinearOperator, *, rtol: float, max_iter: int, start: Tensor | None = None, warning: bool = True
) -> Tensor:
    """The leading right singular vector, ``(*batch_shape, *in_shape)``, by Lanczos on ``A^H A``; without derivative.

    Args:
        A: the operator.
        rtol: tolerance of the residual, relative to the norm.
        max_iter: limit on the iterations.
        start: the start of the process; None: a fixed random vector.
        warning: warn when the limit is met.
    """
    if start is None:
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(*A.batch_shape, *A.in_shape, dtype=A.dtype, generator=generator).to(A.device)
    lanczos = Lanczos(lambda v: A.adjoint(A.apply(v)), start, len(A.in_shape))
    while True:
        lanczos.advance(min(10, max_iter - lanczos.steps))
        values, vectors = torch.linalg.eigh(lanczos.tridiagonal())
        # After an invariant subspace the tridiagonal matrix goes on with arbitrary entries; these eigenvectors have no
        # part of the start.
        genuine = vectors[..., 0, :].abs() > torch.finfo(values.dtype).eps
        best = torch.where(genuine, values, 0).argmax(-1, keepdim=True)
        largest = values.gather(-1, best)[..., 0]
        top = vectors.gather(-1, best[..., None, :].expand(*vectors.shape[:-1], 1))[..., 0]
        # ||A^H A v - sigma^2 v|| is sigma times the residual ||A^H u - sigma v|| of the singular triplet.
        residual = (lanczos.remainder * top[..., -1]).abs()
        if bool((residual <= rtol * largest).all()):
            break
        if lanczos.steps >= max_iter:
            if warning:
                worst = float((residual / largest).max())
                warn(
                    f"norm: after {max_iter} iterations the relative residual is {worst:.1e}, above rtol = {rtol:.1e}; "
                    "the value returned is a lower bound",
                    ConvergenceWarning,
                )
            break
    v = lanczos.combination(top)
    size = torch.linalg.vector_norm(v.flatten(len(A.batch_shape)), dim=-1).clamp_min(torch.finfo(v.dtype).tiny)
    return v / over_items(size, len(A.in_shape))
