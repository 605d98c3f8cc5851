"""A convolution, and further rows below it, as a truncated block-circulant operator on a periodic grid."""

from __future__ import annotations

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

__all__ = ["Positions", "TruncatedCirculant", "strongest_wave", "truncated_circulant"]

Positions = list[list[list[int]]]  # per channel and axis, those that make a cell a border cell


@dataclass(frozen=True)
class TruncatedCirculant:
    r"""A convolution, with or without a penalty below it, as :math:`R_{out} C R_{in}^T` with C block-circulant.

    Attributes:
        convolution: the convolution whose grid it is; without reflect or replicate padding.
        embedding: its periodic grid.
        symbol: C, one matrix per frequency; one set for all blocks, or one for each.
        out_border: the positions, per row of C and axis, of the outputs that R_out removes.
        in_border: those of the inputs that R_in removes, per column and axis.
        form: "circulant" (nothing is removed), "valid" (outputs are), "full" (inputs are) or "saddle" (both).
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
        penalty_rows, blocks = penalty.rows(embedding, symbol).to(S.matrices.dtype), embedding.blocks
        S = S.map(lambda m: torch.cat([part.expand(blocks, *part.shape[1:]) for part in (m, penalty_rows)], dim=-2))
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


def strongest_wave(S: FrequencyMatrices, squared: Tensor, embedding: Embedding) -> Tensor:
    """The inputs that a circulant makes longest, nearly: the plane wave of a large singular value.

    Args:
        S: the symbol.
        squared: its Gram matrices, by the largest of which the frequency is chosen.
        embedding: the inputs on the grid.

    Returns:
        ``(*batch, *in_shape)``.
    """
    flat, index = S.matrices.flatten(1, -3), frobenius(squared).flatten(1).argmax(1)
    chosen = torch.arange(len(flat), device=flat.device), index
    spectrum = flat.new_zeros(*flat.shape[:2], S.columns)
    spectrum[chosen] = torch.linalg.svd(flat[chosen])[2][:, 0].conj()
    wave = S.grid.inverse(spectrum.unflatten(1, S.grid.frequencies).movedim(-1, 1).unsqueeze(0))
    return embedding.inputs_from_grid(wave.expand(1, embedding.blocks, *wave.shape[2:]), embedding.batch_shape)
