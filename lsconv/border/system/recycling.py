r"""Krylov spaces of GMRES, recycled for the systems with the same operator that follow.

A cycle leaves vectors :math:`U` whose images :math:`C = QU` are orthonormal. A later residual loses its part in the
span of C at once, by :math:`U C^H r`, and the iteration goes on in the complement. The border systems of reflect and
replicate padding, which no factors of a plane serve, have a few dozen singular values far from those of the rest,
preconditioned; a cycle spends most of its iterations on these, and every later step of the outer iteration, and every
later solve, would again. Without the recycling they take up to twice the iterations. Where the values form a continuum,
as for a box or a disk, nothing would be gained, and nothing is kept.

Parks, de Sturler, Mackey, Johnson and Maiti, "Recycling Krylov subspaces for sequences of linear systems", SIAM J. Sci.
Comput. 28 (2006); de Sturler, "Nested Krylov methods based on GCR", J. Comput. Appl. Math. 67 (1996).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["Pair", "Recycling", "deflate"]

Pair = tuple[Tensor, Tensor]  # vectors and their images, (blocks, vectors, size) each

# A cycle is kept if at least this part of the singular values that it has seen is as far from one as this factor.
# That takes a few iterations to see.
_SHARE = 0.2
_FAR = 2.0
_LEAST = 12
# What is kept has to spare this part of the iterations that the first cycle took, to the same relative residual.
_SPARED = 0.3


class Recycling:
    """Vectors and their orthonormal images, one set for every block.

    Args:
        most: vectors kept, at most.

    Attributes:
        pair: the vectors and their images; None as long as there are none.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.pair: Pair | None = None
        self._history: Tensor | None = None  # the relative residuals of the first cycle

    def learn(
        self,
        known: Pair | None,
        deflated: Tensor,
        preconditioned: Tensor,
        basis: Tensor,
        unitary: Tensor,
        triangle: Tensor,
        residuals: Tensor,
    ) -> None:
        """Keep a cycle if it is worth it.

        Args:
            known: what had been kept when it began.
            deflated: the coefficients of ``Q Z`` on the images of that, ``(blocks, vectors, k)``.
            preconditioned: ``Z``, ``(blocks, k, size)``.
            basis: ``V`` with ``Q Z = V H``, up to these images, ``(blocks, k + 1, size)``.
            unitary: ``G`` of ``H = G R``, ``(blocks, k + 1, k)``.
            triangle: ``R``, ``(blocks, k, k)``.
            residuals: relative, before the cycle's iterations and after the last, ``(blocks, k + 1)``.
        """
        k = triangle.shape[-1]
        if known is not None and self._history is not None:
            undeflated = int((self._history > residuals[:, -1:]).sum(-1).amax())
            if k > (1 - _SPARED) * undeflated + 1:
                self.pair, self.most = None, 0
                return
        if k < _LEAST or deflated.shape[-2] + k > self.most or not bool(triangle.isfinite().all()):
            return
        values = torch.linalg.svdvals(triangle)
        far = ((values < 1 / _FAR) | (values > _FAR)).to(torch.float64).mean()
        # where the condition is worse the images would not be those of the vectors
        sound = (values[..., -1] > math.sqrt(torch.finfo(values.dtype).eps) * values[..., 0]).all()
        if not bool(sound & (far >= _SHARE)):
            return
        if known is not None:
            preconditioned = preconditioned - deflated.mT @ known[0]
        vectors = torch.linalg.solve_triangular(triangle.mT, preconditioned, upper=False)
        images = unitary.mT @ basis
        if known is not None:
            vectors, images = (torch.cat(both, dim=1) for both in zip(known, (vectors, images), strict=True))
        else:
            self._history = residuals.clone()
        if self.pair is known:  # and no other thread has been here
            self.pair = (vectors, images)

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        return 0 if self.pair is None else sum(t.nbytes for t in self.pair)


def deflate(pair: Pair, r: Tensor) -> tuple[Tensor, Tensor]:
    """A solution for the part of ``r`` in the span of the images, and the rest of r; ``(rhs, blocks, size)``."""
    vectors, images = pair
    left = r.movedim(0, -1)
    parts = images.conj() @ left
    left = left - images.mT @ parts
    more = images.conj() @ left
    left = left - images.mT @ more
    return (vectors.mT @ (parts + more)).movedim(-1, 0), left.movedim(-1, 0).contiguous()
