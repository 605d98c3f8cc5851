"""A convolution, and further rows below it, as a truncated block-circulant operator on a periodic grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lsconv.border.penalty import Penalty
from lsconv.border.reflected_padding import Mirror
from lsconv.fourier.batched_linalg import frobenius
from lsconv.fourier.embedding import Embedding
from lsconv.fourier.symbol import FrequencyMatrices, symbol
from lsconv.operators.convolution import Convolution

__all__ = ["Positions", "StrongestWave", "TruncatedCirculant", "truncated_circulant"]

Positions = list[list[list[int]]]  # per channel and axis, those that make a cell a border cell


@dataclass(frozen=True)
class TruncatedCirculant:
    r"""A truncated block-circulant operator :math:`R_{out} C R_{in}^T`, and what makes it one.

    Attributes:
        convolution: what is embedded; without the padding where a mirror or a penalty takes care of it.
        embedding: its grid.
        symbol: one matrix per frequency, for every block or one for all.
        out_border: positions of the outputs that the truncation removes.
        in_border: those of the inputs.
        form: "circulant", "valid" (outputs are removed), "full" (inputs are) or "saddle" (both).
        penalty: further rows below the convolution, if any.
        mirror: the reflect or replicate padding of the convolution, if any.
    """

    convolution: Convolution
    embedding: Embedding
    symbol: FrequencyMatrices
    out_border: Positions
    in_border: Positions
    form: str
    penalty: Penalty | None = None
    mirror: Mirror | None = None


def truncated_circulant(
    convolution: Convolution,
    batch_shape: tuple[int, ...],
    penalty: Penalty | None = None,
    mirror: Mirror | None = None,
    *,
    shortest: bool = False,
    missing: bool = False,
    symbol: Callable[[Convolution, Embedding], FrequencyMatrices] = symbol,
) -> TruncatedCirculant:
    """Put a convolution onto its grid.

    Args:
        convolution: the operator.
        batch_shape: of the damping.
        penalty: further rows below it.
        mirror: that of ``convolution``, whose padding is not zeros.
        shortest: on the shortest grid that holds it, not on one that transforms well.
        missing: further outputs are removed, which are not measured.
        symbol: the symbol of a convolution on a grid, or of some frequencies of it.
    """
    if penalty is not None:
        convolution, embedding = penalty.convolution, penalty.embedding(batch_shape)
        S = _per_block(symbol(convolution, embedding), embedding)
        more, blocks = penalty.rows(embedding, symbol).to(S.matrices.dtype), embedding.blocks
        S = S.map(lambda m: torch.cat([part.expand(blocks, *part.shape[1:]) for part in (m, more)], dim=-2))
        out_border = penalty.border(embedding)
    else:
        convolution = convolution if mirror is None else mirror.convolution
        minimal = (1,) * convolution.ndim if shortest else None
        constrained = None if mirror is None else (True,) * convolution.ndim
        embedding = Embedding(convolution, minimal, batch_shape, only_read=True, constrained=constrained)
        S = _per_block(symbol(convolution, embedding), embedding)
        out_border = embedding.output_border()
    in_border = embedding.input_border()
    form = _form(missing or _any(out_border), _any(in_border))
    if mirror is not None and (any(mirror.margin) or form == "valid"):
        form = "saddle"
    return TruncatedCirculant(convolution, embedding, S, out_border, in_border, form, penalty, mirror)


def _per_block(S: FrequencyMatrices, embedding: Embedding) -> FrequencyMatrices:
    """Repeat the groups' symbols for every batch item; a single one broadcasts as it is."""
    present = S.matrices.shape[0]
    if present in (1, embedding.blocks):
        return S
    return S.map(lambda m: m.repeat(embedding.blocks // present, *(1 for _ in m.shape[1:])))


def _form(has_out: bool, has_in: bool) -> str:
    if has_out and has_in:
        return "saddle"
    return "valid" if has_out else "full" if has_in else "circulant"


def _any(positions: Sequence[Sequence[Sequence[int]]]) -> bool:
    return any(places for axes in positions for places in axes)


@dataclass(frozen=True, eq=False)
class StrongestWave:
    """A plane wave of the largest singular value of a symbol, by block: A makes it nearly as long as anything.

    Attributes:
        frequencies: ``(blocks, axes)``.
        vectors: the right singular vectors there, ``(blocks, columns)``.
    """

    frequencies: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, S: FrequencyMatrices, squared: Tensor) -> StrongestWave:
        """Find it by the largest of the Gram matrices ``squared`` of S."""
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
