"""The inverses of dense matrices: of a block-circulant operator between border cells, or on the whole border."""

from __future__ import annotations

import torch
from torch import Tensor

from lsconv.border.border_set import gathered
from lsconv.fourier import batched_linalg
from lsconv.fourier.dtypes import single as single_precision
from lsconv.fourier.symbol import hermitian_inverse

__all__ = ["DenseInverse", "ExchangedInverse", "indefinite_inverse"]

# Smaller matrices are inverted, and so are those on a GPU, which waits for every row of a triangular solve; beyond the
# second limit that is still better than twice the memory. (1024 unknowns, float64, one CPU core, in ms: inverse 100,
# LU 29, Cholesky 12; applied 0.32 and 0.27.)
_LEAST_FACTORED = 256
_LARGEST_INVERTED = 4096


class DenseInverse:
    """The inverses of Hermitian matrices, by their factors where these are cheaper.

    Args:
        matrices: ``(blocks, size, size)``; may be overwritten.
        definite: whether they are positive definite.
        single: keep them in single precision, whatever that of the matrices and of the vectors.
    """

    def __init__(self, matrices: Tensor, *, definite: bool, single: bool = False) -> None:
        if single:
            matrices = matrices.to(single_precision(matrices.dtype))
        size, on_gpu = matrices.shape[-1], matrices.device.type != "cpu"
        self.pivots: Tensor | None = None
        self.kind = "inverse"
        if size < _LEAST_FACTORED or (on_gpu and size <= _LARGEST_INVERTED):
            self.factors = hermitian_inverse(matrices) if definite else indefinite_inverse(matrices)
            return
        if definite:
            self.factors, info = torch.linalg.cholesky_ex(matrices)
            if not bool((info > 0).any()):
                self.kind = "cholesky"
                return
        self.factors, self.pivots, _ = batched_linalg.lu_factor(matrices)
        self.kind = "lu"

    def __call__(self, r: Tensor) -> Tensor:
        """The inverses times ``r`` of shape ``(rest, blocks, size)``."""
        b = r.movedim(0, -1).to(self.factors.dtype)
        if self.kind == "inverse":
            z = self.factors @ b
        elif self.kind == "cholesky":
            # not cholesky_solve, which copies the factor (2560 unknowns: 30 ms, and 3 ms)
            z = torch.linalg.solve_triangular(self.factors, b, upper=False)
            z = torch.linalg.solve_triangular(self.factors.mH, z, upper=True)
        else:
            assert self.pivots is not None
            z = torch.linalg.lu_solve(self.factors, self.pivots, b)
        return z.movedim(-1, 0).to(r.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the factors."""
        return self.factors.numel() * self.factors.element_size()


class ExchangedInverse:
    r"""The inverse of a saddle operator of one channel as that of a complex symmetric matrix of half the size.

    See :mod:`lsconv.border.direct.reflection_symmetry`.

    Args:
        matrices: the rows of the first component, ``(blocks, size / 2, size)``.
        first: the numbers of the cells of the first component.
        second: those of what they are reflected to, in the second component.
        single: as for :class:`DenseInverse`.
    """

    def __init__(self, matrices: Tensor, first: Tensor, second: Tensor, *, single: bool = False) -> None:
        self.cells = torch.cat([first, second]).to(matrices.device)
        self.place = self.cells.argsort()
        real, imaginary = matrices.index_select(-1, self.cells).chunk(2, dim=-1)
        self.inverse = DenseInverse(
            torch.complex(real.contiguous(), imaginary.contiguous()), definite=False, single=single
        )

    def __call__(self, r: Tensor) -> Tensor:
        """The inverses times ``r`` of shape ``(rest, blocks, size)``."""
        real, imaginary = gathered(r, self.cells).chunk(2, dim=-1)
        z = self.inverse(torch.complex(real, imaginary))
        return gathered(torch.cat([z.real, -z.imag], dim=-1), self.place)

    @property
    def factors(self) -> Tensor:
        """Those of the complex matrices."""
        return self.inverse.factors

    @property
    def nbytes(self) -> int:
        """Bytes of the factors."""
        return self.inverse.nbytes


def indefinite_inverse(matrices: Tensor) -> Tensor:
    """The inverses; of singular ones what a preconditioner can use."""
    inverses, info = batched_linalg.inverse(matrices)
    if bool((info > 0).any()):
        inverses[info > 0] = torch.linalg.pinv(matrices[info > 0], hermitian=True)
    return inverses
