"""What is inverted: a convolution, and what is stacked below it, on a periodic grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lsconv.border.penalty import Penalty
from lsconv.border.reflected_padding import Mirror
from lsconv.fourier.embedding import Embedding
from lsconv.fourier.symbol import FrequencyMatrices, symbol
from lsconv.operators.convolution import Convolution

__all__ = ["Embedded", "Positions", "embedded"]

Positions = list[list[list[int]]]  # per channel and axis, those that make a cell a border cell


@dataclass(frozen=True)
class Embedded:
    """A truncated block-circulant operator.

    Attributes:
        convolution: what is embedded; without the padding where a mirror or a penalty takes care of it.
        embedding: its grid.
        symbol: one matrix per frequency, for every block or one for all.
        out_border: positions of the outputs that the truncation removes.
        in_border: those of the inputs.
        form: "circulant", "valid" (outputs are removed), "full" (inputs are) or "mixed".
    """

    convolution: Convolution
    embedding: Embedding
    symbol: FrequencyMatrices
    out_border: Positions
    in_border: Positions
    form: str


def embedded(
    convolution: Convolution,
    batch_shape: tuple[int, ...],
    penalty: Penalty | None = None,
    mirror: Mirror | None = None,
    *,
    shortest: bool = False,
) -> Embedded:
    """Put a convolution onto its grid.

    Args:
        convolution: the operator.
        batch_shape: of the damping.
        penalty: further rows below it.
        mirror: that of ``convolution``, whose padding is not zeros.
        shortest: on the shortest grid that holds it, not on one that transforms well.
    """
    if penalty is not None:
        convolution, embedding = penalty.convolution, penalty.embedding(batch_shape)
        S = _per_block(symbol(convolution, embedding), embedding)
        more, blocks = penalty.rows(embedding).to(S.matrices.dtype), embedding.blocks
        S = S.map(lambda m: torch.cat([part.expand(blocks, *part.shape[1:]) for part in (m, more)], dim=-2))
        out_border = penalty.border(embedding)
    else:
        convolution = convolution if mirror is None else mirror.convolution
        least = (1,) * convolution.ndim if shortest else None
        held = None if mirror is None else (True,) * convolution.ndim
        embedding = Embedding(convolution, least, batch_shape, only_read=True, constrained=held)
        S = _per_block(symbol(convolution, embedding), embedding)
        out_border = embedding.output_border()
    in_border = embedding.input_border()
    form = _form(_any(out_border), _any(in_border))
    if mirror is not None and (any(mirror.margin) or form == "valid"):
        form = "mixed"
    return Embedded(convolution, embedding, S, out_border, in_border, form)


def _per_block(S: FrequencyMatrices, embedding: Embedding) -> FrequencyMatrices:
    """Repeat the groups' symbols for every batch item; a single one broadcasts as it is."""
    present = S.matrices.shape[0]
    if present in (1, embedding.blocks):
        return S
    return S.map(lambda m: m.repeat(embedding.blocks // present, *(1 for _ in m.shape[1:])))


def _form(has_out: bool, has_in: bool) -> str:
    if has_out and has_in:
        return "mixed"
    return "valid" if has_out else "full" if has_in else "circulant"


def _any(positions: Sequence[Sequence[Sequence[int]]]) -> bool:
    return any(places for axes in positions for places in axes)
