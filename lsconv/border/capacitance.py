"""The factorised capacitance matrix of the border, and the solutions by it for a convolution and its adjoint."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lsconv.border.border_set import Border
from lsconv.fourier.batched_linalg import lu_factor_in_place
from lsconv.fourier.frequency_matrices import FrequencyMatrices

__all__ = ["FEW_VECTORS", "Capacitance", "Direction", "static_lu"]

# Products with so many vectors on the grid cost less than the transforms that make them.
FEW_VECTORS = 8


def static_lu(matrices: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The LU factors and pivots of matrices ``(blocks, size, size)``, which may be singular, in their storage.

    Pivots below the rounding of ``scale``, one per block, are raised to it (static pivoting), so that a solve with a
    singular matrix gives large components along its null vectors, by which these are found, and no infinities.
    """
    factors, pivots, _ = lu_factor_in_place(matrices)
    diagonal = factors.diagonal(dim1=-2, dim2=-1)
    size = diagonal.abs()
    smallest_pivot = torch.finfo(factors.dtype).eps * scale[:, None]
    diagonal.copy_(torch.where(size < smallest_pivot, smallest_pivot.to(diagonal.dtype), diagonal))
    return factors, pivots


@dataclass(frozen=True)
class Direction:
    """The direction of a solve by the capacitance matrix, ``A x = y`` or ``A^H x = y``: its borders and null spaces.

    Attributes:
        inverse: C^-1, or for the adjoint C^-H.
        constrained: the border where the solution is zero.
        free: the border where the image under C is unknown.
        zero: the mask of ``constrained`` on the grid.
        null: coordinates on ``free`` whose extensions, R C^-1 B^T null, are an orthonormal basis of the null space.
        coupling: B_constrained C^-1 of the basis of the null space of the adjoint, which is removed from the data.
        extensions: the basis itself on the grid, ``(blocks, k, numbers)``, where its vectors are few; None: a transform
            of ``null`` makes it anew for every product.
    """

    inverse: FrequencyMatrices
    constrained: Border
    free: Border
    zero: Tensor
    null: Tensor
    coupling: Tensor
    extensions: Tensor | None = None

    def with_null_space(self, null: Tensor, coupling: Tensor) -> Direction:
        """The direction with these coordinates of its null space, and this coupling with the other one's."""
        few = null.shape[-1] <= FEW_VECTORS
        extensions = self.extend(null.movedim(-1, 0)).flatten(2).movedim(0, 1).contiguous() if few else None
        return replace(self, null=null, coupling=coupling, extensions=extensions)

    def extend(self, coordinates: Tensor) -> Tensor:
        """Extend values on ``free``, ``(rhs, blocks, size)``, to C^-1 of them on the grid, zero on ``constrained``."""
        return self.solution(self.free.scatter(coordinates))

    def restrict(self, vectors: Tensor) -> Tensor:
        """G times vectors on ``free``, ``(blocks, size, k)``: their extensions on ``constrained``."""
        extensions = self.inverse.on_grid(self.free.scatter(vectors.movedim(-1, 0)))
        return self.constrained.gather(extensions).movedim(0, -1)

    def null_part(self, x: Tensor, back: Direction) -> Tensor:
        """The orthogonal projection of x, on the grid, on the null space; ``back`` is the direction of the adjoint."""
        if self.extensions is None:
            part = self.null.mH @ back.constrained.gather(back.inverse.on_grid(x)).movedim(0, -1)
        else:
            part = self.extensions.conj() @ x.flatten(2).movedim(0, -1)
        return self.null_combination(part)

    def null_combination(self, part: Tensor) -> Tensor:
        """The basis of the null space times ``part``, ``(blocks, k, rhs)``, on the grid."""
        if self.extensions is None:
            return self.extend((self.null @ part).movedim(-1, 0))
        return (part.mT @ self.extensions).movedim(1, 0).unflatten(-1, self.zero.shape)

    def solution(self, image: Tensor) -> Tensor:
        """C^-1 times an image on the grid, zero on ``constrained``."""
        return self.inverse.on_grid(image).masked_fill_(self.zero, 0)


@dataclass(frozen=True)
class Capacitance:
    """The factorised capacitance matrix G, with the known null vectors of A and A^H.

    Attributes:
        factors: the LU factors of G, ``(blocks, size, size)``.
        pivots: the pivots of the factors.
        directions: one for A, and one for its adjoint.
    """

    factors: Tensor
    pivots: Tensor
    directions: tuple[Direction, Direction]

    @property
    def size(self) -> int:
        """Unknowns on the border."""
        return self.factors.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of the factors and null vectors."""
        tensors = [self.factors, *(t for d in self.directions for t in (d.null, d.coupling, d.extensions))]
        inverses = sum(direction.inverse.nbytes for direction in self.directions)
        return inverses + sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def solve(self, b: Tensor, *, adjoint: bool) -> Tensor:
        """G^-1, or G^-H, times ``b`` of shape ``(blocks, size, columns)``."""
        return torch.linalg.lu_solve(self.factors, self.pivots, b, adjoint=adjoint)

    def on_grid(self, data: Tensor, adjoint: bool) -> Tensor:
        """The solution on the grid for data on the grid, both ``(rhs, blocks, channels, *grid)``."""
        direction, back = reversed(self.directions) if adjoint else self.directions
        b = direction.constrained.gather(direction.inverse.on_grid(data)).movedim(0, -1)
        if back.null.shape[-1]:  # data in the null space of the adjoint have no solution
            lost = back.null.mH @ b
            b = b - direction.coupling @ lost
            data = data - back.null_combination(lost)
        w = -self.solve(b, adjoint=adjoint).movedim(-1, 0)
        x = direction.solution(data + direction.free.scatter(w))
        if direction.null.shape[-1]:  # the minimum-norm solution is orthogonal to the null space
            x = x - direction.null_part(x, back)
            # The part that a singular G leaves can be so large that its rounding has to be removed as well.
            x = x - direction.null_part(x, back)
        return x
