"""A convolution, and further rows below it, as a truncated block-circulant operator on a periodic grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lsconv.border.penalty import Penalty
from lsconv.border.reflected_padding import CopiedPadding
from lsconv.fourier.batched_linalg import frobenius
from lsconv.fourier.embedding import BorderPositions, Embedding
from lsconv.fourier.frequency_matrices import FrequencyMatrices
from lsconv.fourier.symbol import symbol
from lsconv.operators.convolution import Convolution

__all__ = ["TruncatedCirculant", "leading_wave", "truncated_circulant"]


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
        copied_padding: the reflect or replicate padding of the convolution, if any.
    """

    convolution: Convolution
    embedding: Embedding
    symbol: FrequencyMatrices
    out_border: BorderPositions
    in_border: BorderPositions
    form: str
    copied_padding: CopiedPadding | None = None


def truncated_circulant(
    convolution: Convolution,
    batch_shape: tuple[int, ...],
    penalty: Penalty | None = None,
    copied_padding: CopiedPadding | None = None,
    *,
    shortest: bool = False,
    missing: bool = False,
    symbol_of: Callable[[Convolution, Embedding], FrequencyMatrices] = symbol,
) -> TruncatedCirculant:
    """Put a convolution onto its grid.

    Args:
        convolution: the operator.
        batch_shape: the batch shape of the damping.
        penalty: further rows below the convolution.
        copied_padding: the padding of ``convolution``, if that is reflect or replicate.
        shortest: use the shortest grid instead of one of a good FFT length.
        missing: further outputs that are removed, because they are not measured.
        symbol_of: makes the symbol of a convolution on a grid; a rank of a tiled solve makes its own frequencies.
    """
    if penalty is not None:
        convolution, embedding = penalty.convolution, penalty.embedding(batch_shape)
        S = symbol_of(convolution, embedding).repeated(embedding.blocks)
        penalty_rows, blocks = penalty.rows(embedding, symbol_of).to(S.matrices.dtype), embedding.blocks
        S = S.map(lambda m: torch.cat([part.expand(blocks, *part.shape[1:]) for part in (m, penalty_rows)], dim=-2))
        out_border = penalty.border(embedding)
    else:
        convolution = convolution if copied_padding is None else copied_padding.convolution
        minimal = (1,) * convolution.ndim if shortest else None
        constrained = None if copied_padding is None else (True,) * convolution.ndim
        embedding = Embedding(convolution, minimal, batch_shape, tapped_phases_only=True, constrained=constrained)
        S = symbol_of(convolution, embedding).repeated(embedding.blocks)
        out_border = embedding.output_border()
    in_border = embedding.input_border()
    form = _form(missing or _any(out_border), _any(in_border))
    if copied_padding is not None and (any(copied_padding.margin) or form == "valid"):
        form = "saddle"
    return TruncatedCirculant(convolution, embedding, S, out_border, in_border, form, copied_padding)


def _form(has_out: bool, has_in: bool) -> str:
    """The form of a truncation that removes outputs, inputs, both or nothing."""
    if has_out and has_in:
        return "saddle"
    return "valid" if has_out else "full" if has_in else "circulant"


def _any(positions: BorderPositions) -> bool:
    """Tell whether any channel has border positions."""
    return any(places for axes in positions for places in axes)


def leading_wave(S: FrequencyMatrices, gram_matrices: Tensor, embedding: Embedding) -> Tensor:
    """The inputs whose image is nearly the longest: a plane wave of the largest singular value of the symbol.

    Args:
        S: the symbol.
        gram_matrices: its Gram matrices, by the largest of which the frequency is chosen.
        embedding: the inputs on the grid.

    Returns:
        ``(*batch, *in_shape)``.
    """
    flat, index = S.matrices.flatten(1, -3), frobenius(gram_matrices).flatten(1).argmax(1)
    chosen = torch.arange(len(flat), device=flat.device), index
    spectrum = flat.new_zeros(*flat.shape[:2], S.columns)
    spectrum[chosen] = torch.linalg.svd(flat[chosen])[2][:, 0].conj()
    wave = S.grid.inverse(spectrum.unflatten(1, S.grid.frequencies).movedim(-1, 1).unsqueeze(0))
    return embedding.inputs_from_grid(wave.expand(1, embedding.blocks, *wave.shape[2:]), embedding.batch_shape)
