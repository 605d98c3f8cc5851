"""The wave that a convolution makes longest, nearly: a lower bound of its norm for the price of one product."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lsconv.fourier.embedding import Embedding
from lsconv.fourier.symbol import FrequencyMatrices, frobenius

__all__ = ["StrongestWave"]


@dataclass(frozen=True, eq=False)
class StrongestWave:
    """A plane wave of the largest singular value of a symbol, by block.

    Attributes:
        frequencies: ``(blocks, axes)``.
        vectors: the right singular vectors there, ``(blocks, columns)``.
    """

    frequencies: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, S: FrequencyMatrices, squared: Tensor) -> StrongestWave:
        """That of the largest of the Gram matrices ``squared`` of S."""
        sizes, flat = S.matrices.shape[1:-2], S.matrices.flatten(1, -3)
        index = frobenius(squared).flatten(1).argmax(1)
        chosen = flat[torch.arange(len(flat), device=flat.device), index]
        vectors = torch.linalg.svd(chosen)[2][:, 0].conj().resolve_conj()
        frequencies = [index]
        for n in reversed(sizes[1:]):
            frequencies[:1] = [frequencies[0] // n, frequencies[0] % n]
        return cls(torch.stack(frequencies, dim=1), vectors)

    def inputs(self, embedding: Embedding, *, real: bool) -> Tensor:
        """The wave on the inputs, ``(*batch, *in_shape)``."""
        wave = torch.ones(len(self.frequencies), 1, dtype=self.vectors.dtype, device=self.vectors.device)
        for a, n in enumerate(embedding.grid):
            turns = (self.frequencies[:, a, None] * torch.arange(n, device=wave.device)) % n
            phases = turns.to(wave.real.dtype) * (2 * math.pi / n)
            wave = (wave[..., None] * torch.polar(torch.ones_like(phases), phases)[:, None]).flatten(1)
        z = (self.vectors[..., None] * wave[:, None]).unflatten(-1, embedding.grid)
        z = (z.real if real else z).expand(1, embedding.blocks, *z.shape[1:])
        return embedding.inputs_from_grid(z, embedding.batch_shape)
