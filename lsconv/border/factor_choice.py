"""The grid on which a border is factorised, and what that costs."""

from __future__ import annotations

import math

from lsconv.border.border_set import Border
from lsconv.border.direct.cost import Cost, crossed_cost, dense_cost
from lsconv.border.direct.direct_pass import crossed_border, is_even
from lsconv.border.direct.even_odd_basis import one_channel_saddle
from lsconv.border.penalty import Penalty
from lsconv.border.system.cost_model import Effort
from lsconv.border.truncated_circulant import Embedded
from lsconv.fourier.embedding import Embedding
from lsconv.fourier.symbol import FrequencyMatrices
from lsconv.operators.convolution import Convolution
from lsconv.operators.fft_convolution import transform_cost

__all__ = ["cheapest_grid", "whole_cost"]

# The grid of factors is the one that is best for so many solves with them.
_KEPT_SOLVES = 10


def cheapest_grid(
    what: Embedded, system: FrequencyMatrices, penalty: Penalty | None, effort: Effort, condition: float
) -> tuple[bool, Cost]:
    """Whether the factors are on the shortest grid, not on one that transforms well, and what they cost there.

    Args:
        what: the operator.
        system: the block-circulant operator whose border is factorised.
        penalty: further rows.
        effort: what an iteration and a solve with factors cost.
        condition: of the system, up to whose rounding it is even.
    """
    definite, real = what.form != "mixed", system.grid.real
    if penalty is not None:
        penalty = penalty.precise()
        embeddings = {False: penalty.embedding(what.embedding.batch_shape)}
    else:
        convolution = what.convolution
        least = Embedding(convolution, (1,) * convolution.ndim, what.embedding.batch_shape, only_read=True)
        embeddings = {False: what.embedding, True: least}
    borders = {shortest: crossed_border(what.form, embedding, penalty) for shortest, embedding in embeddings.items()}
    one = len(borders[False].rows) == 1 or one_channel_saddle(borders[False], definite=definite)
    even = one and real and len(system.grid.sizes) == 2 and is_even(system.matrices, condition)
    costs = {
        shortest: crossed_cost(border, definite=definite, real=real, even=even) for shortest, border in borders.items()
    }

    def price(shortest: bool) -> float:
        transform = system.rows * transform_cost(embeddings[shortest].grid)
        return effort.solve(costs[shortest], 1, transform) + effort.factors(costs[shortest]) / _KEPT_SOLVES

    best = min(costs, key=price)
    return best, costs[best]


def whole_cost(embedding: Embedding, form: str, convolution: Convolution | None, border: Border) -> Cost:
    """The cost of factorising the whole border as one matrix, on the shortest grid where the convolution is given."""
    size = border.size
    if convolution is not None:
        shortest = Embedding(convolution, (1,) * embedding.ndim, embedding.batch_shape, only_read=True)
        positions = shortest.output_border() if form != "full" else []
        positions = positions + (shortest.input_border() if form != "valid" else [])
        inside = (math.prod(n - len(along) for n, along in zip(shortest.grid, axes, strict=True)) for axes in positions)
        size = sum(math.prod(shortest.grid) - cells for cells in inside)
    return dense_cost(size, definite=form != "mixed")
