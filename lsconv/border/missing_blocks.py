r"""A preconditioner for the system of the outputs that were not measured: dense blocks of neighbouring ones.

With E the embedding of the missing outputs, :math:`N = A^HA + \mu L^HL` and the influence matrix :math:`F = A N^{-1}
A^H` of the complete data, the answer x for the measured outputs is that for data completed by values t of the missing
ones, such that their residual vanishes:

.. math:: x = N^{-1} A^H (y + E t), \qquad E^H(A x) = t \iff E^H (I - F) E\, t = E^H F y .

The matrix is Hermitian, with eigenvalues between those of :math:`\mu (\|A\|^2 + \mu)^{-1}` and one (L the identity).
Away from the border of the grid :math:`I - F` is the block-circulant :math:`T = I - S (S^HS + \mu |S_L|^2)^{-1} S^H`,
whose entries decay with the distance, so that blocks of T between outputs near each other approximate it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lsconv.border.border_set import circulant_entries, largest_block, split_at_gaps
from lsconv.border.penalty import Penalty
from lsconv.border.truncated_circulant import truncated_circulant
from lsconv.fourier.batched_linalg import hermitian_inverse_
from lsconv.fourier.embedding import Embedding
from lsconv.fourier.frequency_matrices import FrequencyMatrices
from lsconv.fourier.symbol import gram, shifted
from lsconv.operators.convolution import Convolution

__all__ = ["MissingBlocks"]


class MissingBlocks:
    """The inverse of the blocks of T, applied to outputs that are zero where they were measured.

    Args:
        convolution: A; for other than zero or circular padding the same convolution with zero padding.
        damp: the damping, a number or one per batch item.
        missing: the outputs that were not measured, ``(*batch, *out_shape)``, bool.
        penalty: further rows ``damp L`` below A; None: L is the identity.
    """

    def __init__(self, convolution: Convolution, damp: Tensor, missing: Tensor, penalty: Penalty | None = None) -> None:
        batch = tuple(missing.shape[: missing.ndim - convolution.ndim - 1])
        if not Embedding.serves(convolution):
            convolution = Convolution(
                convolution.weight, convolution.spatial_in, convolution.stride, convolution.padding,
                convolution.dilation, convolution.groups, check_finite=False,
            )  # fmt: skip
        if tuple(damp.shape) != batch:  # all items share blocks, which is enough for a preconditioner
            damp = damp.log().mean().exp()
        batched = tuple(damp.shape) or convolution.batch_shape
        truncated = truncated_circulant(convolution, batch if batched else tuple(damp.shape), penalty)
        matrices = _complement(truncated.symbol.matrices, truncated.embedding, damp, penalty)
        kernel = FrequencyMatrices(truncated.symbol.grid, matrices).kernel()
        grid, clusters = truncated.embedding.grid, list[tuple[int, Tensor]]()
        self.embedding = Embedding(truncated.convolution, grid, batch)
        cells = self.embedding.outputs_to_grid(missing.to(torch.uint8))[0].cpu()
        count = int(cells.sum())
        most = largest_block(count, cells.numel())
        for number, mask in enumerate(cells):
            places = mask.nonzero()
            clusters += [(number, places[part]) for part in split_at_gaps(places, most)]
        size = max((len(places) for _, places in clusters), default=0)
        self.index = torch.full((len(clusters), size), cells.numel())  # one past the end, where zeros are appended
        eye = torch.eye(size, dtype=kernel.dtype, device=kernel.device)
        blocks = eye.repeat(len(clusters), 1, 1)
        for row, (number, places) in enumerate(clusters):
            flat = number
            for along, n in zip(places.mT, (self.embedding.out_channels, *grid), strict=True):
                flat = flat * n + along
            self.index[row, : len(places)] = flat
            entries = circulant_entries(kernel[number % len(kernel)].unsqueeze(0), places)
            blocks[row, : len(places), : len(places)] = entries
        self.index = self.index.to(kernel.device)
        self.inverses = hermitian_inverse_(blocks)
        # a block that rounding makes indefinite is replaced by the identity
        lost = self.inverses.isnan().flatten(1).any(1)
        self.inverses[lost] = eye

    def __call__(self, r: Tensor) -> Tensor:
        """Apply the inverses of the blocks to ``r`` of shape ``(*batch, *out_shape)``."""
        batch, _ = self.embedding.split_batch(tuple(r.shape[: r.ndim - self.embedding.ndim - 1]))
        z = self.embedding.outputs_to_grid(r)
        flat = torch.nn.functional.pad(z.flatten(1), (0, 1))
        parts = (self.inverses @ flat[:, self.index].movedim(0, -1)).movedim(-1, 0)
        solved = torch.zeros_like(flat)
        solved[:, self.index] = parts
        return self.embedding.outputs_from_grid(solved[:, :-1].reshape(z.shape), batch)


def _complement(S: Tensor, embedding: Embedding, damp: Tensor, penalty: Penalty | None) -> Tensor:
    """T per frequency, ``(blocks, *frequencies, rows, rows)`` with the rows of A."""
    if penalty is not None:
        rows = S[..., : embedding.out_channels, :]
        normal = gram(S, "solution")
        # a common null vector of A and L has no inverse
        normal.diagonal(dim1=-2, dim2=-1).add_(10 * torch.finfo(S.dtype).eps * float(normal.abs().amax()))
    else:
        rows = S
        mu = embedding.per_block(damp.to(S.real.dtype)).square().reshape(-1, *(1 for _ in range(S.ndim - 1)))
        if S.shape[-2] <= S.shape[-1]:
            return mu * hermitian_inverse_(shifted(gram(S, "residual"), mu).contiguous())
        normal = shifted(gram(S, "solution"), mu)
    T = -(rows @ hermitian_inverse_(normal.contiguous()) @ rows.mH)
    T.diagonal(dim1=-2, dim2=-1).add_(1)
    return T
