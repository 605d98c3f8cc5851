"""The inverses of dense matrices: of a block-circulant operator between border cells, or on the whole border."""

from __future__ import annotations

import torch
from torch import Tensor

from lsconv.fourier import batched_linalg
from lsconv.fourier.symbol import hermitian_inverse

__all__ = ["DenseInverse", "indefinite_inverse"]

# Smaller matrices are inverted, and so are those on a GPU, which waits for every row of a triangular solve; beyond the
# second limit that is still better than twice the memory.
_LEAST_FACTORED = 256
_LARGEST_INVERTED = 4096


class DenseInverse:
    """The inverses of Hermitian matrices, by their factors where these are cheaper.

    Args:
        matrices: ``(blocks, size, size)``; may be overwritten.
        definite: whether they are positive definite.
    """

    def __init__(self, matrices: Tensor, *, definite: bool) -> None:
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
        """The inverses times ``r`` of shape ``(rhs, blocks, size)``."""
        b = r.movedim(0, -1).to(self.factors.dtype)
        if self.kind == "inverse":
            z = self.factors @ b
        elif self.kind == "cholesky":
            # not cholesky_solve, which copies the factor
            z = torch.linalg.solve_triangular(self.factors, b, upper=False)
            z = torch.linalg.solve_triangular(self.factors.mH, z, upper=True)
        else:
            assert self.pivots is not None
            z = torch.linalg.lu_solve(self.factors, self.pivots, b)
        return z.movedim(-1, 0).to(r.dtype)

    @property
    def logdet(self) -> Tensor:
        """``log |det|`` of the matrices, ``(blocks,)``."""
        if self.kind == "inverse":
            return -torch.linalg.slogdet(self.factors)[1]
        diagonal = self.factors.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
        return 2 * diagonal if self.kind == "cholesky" else diagonal

    @property
    def nbytes(self) -> int:
        """Bytes of the factors."""
        return self.factors.numel() * self.factors.element_size()


def indefinite_inverse(matrices: Tensor) -> Tensor:
    """The inverses; of singular ones what a preconditioner can use."""
    inverses, info = batched_linalg.inverse(matrices)
    if bool((info > 0).any()):
        inverses[info > 0] = torch.linalg.pinv(matrices[info > 0], hermitian=True)
    return inverses
