"""The cost model of the border: of one iteration, of the factors and of a solve with them, and the bytes of a plan.

The unit of work is one floating-point operation of a factorisation. Memory traffic counts as the operations that a
factorisation does in the same time.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lsconv.border.border_set import Border
from lsconv.border.direct.crossed_border import CrossedBorder, crossed_border, is_even, one_channel_saddle
from lsconv.border.direct.hodlr import HodlrSchur
from lsconv.border.penalty import Penalty
from lsconv.border.reflected_padding import CopiedPadding
from lsconv.border.truncated_circulant import TruncatedCirculant
from lsconv.fourier.embedding import BorderPositions, Embedding
from lsconv.fourier.frequency_matrices import FrequencyMatrices
from lsconv.operators.batch_layout import WORK_BYTES
from lsconv.operators.convolution import Convolution
from lsconv.operators.fft_convolution import transform_cost
from lsconv.operators.memory import free_bytes

__all__ = [
    "CALL_WORK",
    "DEFAULT_LIMITS",
    "CostModel",
    "FactorCost",
    "Factorise",
    "Limits",
    "PlanCost",
    "cheapest_grid",
    "dense_cost",
    "direct_pass_cost",
    "direct_plan_cost",
    "items_at_once",
    "plan_bytes",
    "spared",
    "whole_border_cost",
]

# The overhead of the calls of torch in one iteration, in operations; it dominates on small borders.
CALL_WORK = 3e7
# Assembling one entry of the matrix to factorise takes the time of this many operations.
_ENTRY_WORK = 150
# Reading one entry of the factors in a solve takes the time of this many (benchmarks/kept_plan.py prints both).
_READ_WORK = 12


class Factorise(enum.Enum):
    """The choices of when a border is factorised."""

    AUTO = enum.auto()  # before any iteration where that is expected to cost less, else as AFTER_ITERATIONS
    AT_ONCE = enum.auto()  # before any iteration
    AFTER_ITERATIONS = enum.auto()  # when the iterations have cost as much
    NEVER = enum.auto()


@dataclass(frozen=True)
class Limits:
    """The limits between solving a border by factors and by iteration, and of its preconditioner.

    Attributes:
        factorise: when the border is factorised.
        dense_unknowns: borders of up to this many unknowns are preconditioned by their dense inverse.
        corners: precondition with the corners too, where strips of the border cross.
        corner_unknowns: the overlap of a corner with its strips grows until the corner has this many unknowns.
        spare_bytes: bytes that factors may take; None: 60 % of the memory that is free when they are made.
    """

    factorise: Factorise = Factorise.AUTO
    dense_unknowns: int = 1024
    corners: bool = True
    corner_unknowns: int = 640
    spare_bytes: int | None = None


DEFAULT_LIMITS = Limits()


def spared(limits: Limits | None, memory_limit: int | None, needed: int) -> Limits:
    """Limit the bytes of the factors to those that a plan leaves of its memory limit.

    Args:
        limits: the other limits; None: the default.
        memory_limit: bytes that the plan may use; None: no limit.
        needed: bytes of the plan without factors.
    """
    limits = DEFAULT_LIMITS if limits is None else limits
    return limits if memory_limit is None else replace(limits, spare_bytes=memory_limit - needed)


@dataclass(frozen=True)
class FactorCost:
    """The cost of factors of a border.

    Attributes:
        setup: floating-point operations of making them.
        entries: the numbers that they consist of.
        peak: the numbers in memory at a time while they are made.
    """

    setup: float
    entries: float
    peak: float


@dataclass(frozen=True)
class CostModel:
    """The work of a border system.

    Attributes:
        blocks: independent systems.
        cells: grid cells, per channel, that one product with the system transforms.
        channels: its channels.
        definite: whether it is definite; elsewhere an iteration costs three times as much.
    """

    blocks: int
    cells: int
    channels: int
    definite: bool

    def iteration_work(self, rhs: int) -> float:
        """The work of one iteration for ``rhs`` right-hand sides a block (see benchmarks/border_iteration.py)."""
        each = self.channels * (20 * math.log2(self.cells) + 16 * self.channels)
        return CALL_WORK + float(self._indefinite_factor * rhs * self.blocks * self.cells * each)

    def factor_work(self, cost: FactorCost) -> float:
        """The work of making factors of this cost for each of the blocks."""
        return self.blocks * (cost.setup + _ENTRY_WORK * cost.entries)

    def peak_bytes(self, cost: FactorCost) -> float:
        """The peak bytes while the factors are made, in double precision."""
        return 8 * self.blocks * cost.peak

    def read_work(self, cost: FactorCost) -> float:
        """The work of reading the factors in one solve."""
        return self.blocks * _READ_WORK * cost.entries

    def solve_work(self, cost: FactorCost, transform: float) -> float:
        """The work of one solve with factors of this cost.

        Args:
            cost: that of the factors.
            transform: the cost of a transform of their grid, for all channels, as
                :func:`~lsconv.operators.fft_convolution.transform_cost` has it.
        """
        passes = 4 * self._indefinite_factor  # forward and inverse, of the data and of the border's correction
        return self.read_work(cost) + self.blocks * passes * (20 * transform + 16 * self.channels**2 * self.cells)

    @property
    def _indefinite_factor(self) -> int:
        """The cost of an iteration or pass relative to that of a definite system."""
        return 1 if self.definite else 3


def dense_cost(size: int, *, definite: bool) -> FactorCost:
    """The cost of factorising one matrix of so many unknowns."""
    return FactorCost((1 if definite else 2) / 3 * size**3, size**2, 3 * size**2)


def direct_pass_cost(border: CrossedBorder, *, definite: bool, real: bool, even: bool) -> FactorCost:
    """The cost, for each block, of the factors of :class:`~lsconv.border.direct.direct_pass.DirectInverse`.

    They are those of the border with its axes exchanged where V' is smaller then.

    Args:
        border: the border.
        definite: the operator is positive definite.
        real: it is real.
        even: it is even along both axes.
    """
    border = border.oriented
    channels, grid = len(border.rows), border.grid
    frequencies = grid[0] * (grid[1] // 2 + 1 if real else grid[1])
    saddle = real and one_channel_saddle(border, definite=definite)
    copies = 4 if real and even else 2 if real and channels == 1 else 1
    multiplications = 1.0 if real and not saddle else 4.0
    size = border.column_cells / (2 if saddle else 1) / copies
    factors = (1 if definite else 2) / 3 * multiplications * copies * size**3
    between = border.width * (channels * border.height) ** 2
    # real and imaginary parts are a factor of two; even operators need the real part of half of the rows, a half
    products = 4.0 * channels * (grid[1] // 2 + 1) * between * (0.5 if even else 2.0) if border.depth else 0.0
    entries = copies * size**2 * (1 if real and not saddle else 2)
    strip = (channels * border.depth) ** 2 * frequencies / grid[0] * 2
    spectra = 2 * frequencies * (channels**2 + 4 * channels**2)
    if HodlrSchur.serves(border, definite=definite, real=real, even=even):
        # a rank of half of a leaf: three products with each vector, and half of the matrix is assembled
        leaf = HodlrSchur.leaf(border, even=even)
        factors = copies * size**2 * (3 / 2 * leaf + _ENTRY_WORK / 2)
        entries = copies * size * leaf * (1 + math.log2(size / leaf) / 2)
        return FactorCost(factors + products, entries + strip, copies * size**2 / 2 + 2 * between + strip + spectra)
    return FactorCost(factors + products, entries + strip, 2 * entries + 2 * between + strip + spectra)


def cheapest_grid(
    truncated: TruncatedCirculant,
    Q: FrequencyMatrices,
    penalty: Penalty | None,
    model: CostModel,
    condition: float,
) -> tuple[bool, FactorCost]:
    """Choose between the shortest grid and one of a good FFT length, by the cost of factors there.

    Args:
        truncated: the truncated circulant.
        Q: the block-circulant operator whose border is factorised.
        penalty: further rows.
        model: the model of the work.
        condition: the condition of Q, which limits how exactly symmetries can be recognised.

    Returns:
        True for the shortest grid, and the cost of factors on the chosen grid.
    """
    definite, real = truncated.form != "saddle", Q.grid.real
    if penalty is not None:
        penalty = penalty.precise()
        embeddings = {False: penalty.embedding(truncated.embedding.batch_shape)}
    else:
        convolution = truncated.convolution
        shortest_grid = Embedding(
            convolution, (1,) * convolution.ndim, truncated.embedding.batch_shape, tapped_phases_only=True
        )
        embeddings = {False: truncated.embedding}
        if shortest_grid.grid != truncated.embedding.grid:
            embeddings[True] = shortest_grid
    borders = {
        shortest: crossed_border(truncated.form, embedding, penalty) for shortest, embedding in embeddings.items()
    }
    one = len(borders[False].rows) == 1 or one_channel_saddle(borders[False], definite=definite)
    even = one and real and len(Q.grid.sizes) == 2 and is_even(Q.matrices, condition)
    costs = {
        shortest: direct_pass_cost(border, definite=definite, real=real, even=even)
        for shortest, border in borders.items()
    }

    def price(shortest: bool) -> float:
        transform = Q.rows * transform_cost(embeddings[shortest].grid)
        # For a plan that solves ten times.
        return 10 * model.solve_work(costs[shortest], transform) + model.factor_work(costs[shortest])

    best = min(costs, key=price)
    return best, costs[best]


def whole_border_cost(embedding: Embedding, form: str, convolution: Convolution | None, border: Border) -> FactorCost:
    """Estimate the cost of factorising the whole border as one matrix.

    Args:
        embedding: the grid of the operator.
        form: "valid", "full" or "saddle".
        convolution: the operator, to factorise its border on its shortest grid; None: on that of ``embedding``.
        border: the border on that grid.
    """
    size = border.size
    if convolution is not None:
        shortest = Embedding(convolution, (1,) * embedding.ndim, embedding.batch_shape, tapped_phases_only=True)
        positions = shortest.output_border() if form != "full" else []
        size = _cells(shortest.grid, positions + (shortest.input_border() if form != "valid" else []))
    return dense_cost(size, definite=form != "saddle")


def _cells(grid: Sequence[int], positions: BorderPositions) -> int:
    """The number of cells of a border of these positions, per channel and axis."""
    inside = (math.prod(n - len(along) for n, along in zip(grid, axes, strict=True)) for axes in positions)
    return sum(math.prod(grid) - cells for cells in inside)


@dataclass(frozen=True)
class PlanCost:
    """The cost of a plan with factors.

    Attributes:
        setup_work: the work of making it.
        solve_work: the work of one solve.
        peak_bytes: the peak bytes while the factors are made.
    """

    setup_work: float
    solve_work: float
    peak_bytes: float


def direct_plan_cost(convolution: Convolution, damp_shape: tuple[int, ...] = ()) -> PlanCost:
    """Estimate the cost of a plan with factors, from the shapes alone and the evenness of the kernel.

    Args:
        convolution: one whose padding is zeros.
        damp_shape: the shape of the damping.
    """
    embedding = Embedding(convolution, (1,) * convolution.ndim, damp_shape, tapped_phases_only=True)
    sides = [border for border in (embedding.output_border(), embedding.input_border()) if any(map(any, border))]
    definite, channels, cells = len(sides) < 2, sum(map(len, sides)), math.prod(embedding.grid)
    positions, real = [axes for side in sides for axes in side], not convolution.is_complex
    # three matrices per frequency, and the elimination that inverts them
    operations, entries = 4.0 * cells * channels**3, 3 / 2 * cells * channels**2
    if convolution.ndim > 2:
        cost = dense_cost(_cells(embedding.grid, positions), definite=definite)
    else:
        border = CrossedBorder.of(embedding.grid, positions)
        even = _has_even_factors(convolution, border, definite)
        cost = direct_pass_cost(border, definite=definite, real=real, even=even)
        border = border.oriented
        # the strip is inverted at every frequency along it, which is all that there is in one dimension
        frequencies = border.grid[1] // 2 + 1 if real else border.grid[1]
        operations += (4 if definite else 8) * frequencies * (channels * border.depth) ** 3
    model = CostModel(embedding.blocks, cells, channels, definite)
    setup_work = model.factor_work(cost) + model.factor_work(FactorCost(operations, entries, 0))
    # the channels of a saddle are counted twice already, so that its factor of an iteration does not apply to a pass
    solve_work = CALL_WORK + replace(model, definite=True).solve_work(cost, channels * transform_cost(embedding.grid))
    return PlanCost(setup_work, solve_work, model.peak_bytes(cost))


def _has_even_factors(convolution: Convolution, border: CrossedBorder, definite: bool) -> bool:
    """Tell whether the factors split by the symmetry of a kernel that is even along both axes."""
    if convolution.ndim != 2 or convolution.is_complex:
        return False
    if not definite:
        centred = all(
            2 * left + 1 == n for (left, _), n in zip(convolution.padding, convolution.kernel_extent, strict=True)
        )
        if not (centred and one_channel_saddle(border, definite=definite)):
            return False
    elif len(border.rows) != 1:
        return False
    weight = convolution.weight.detach()
    rounding = 100 * torch.finfo(weight.dtype).eps * torch.linalg.vector_norm(weight)
    return all(bool(torch.dist(weight, weight.flip(axis)) <= rounding) for axis in (-2, -1))


def plan_bytes(convolution: Convolution, damp_shape: tuple[int, ...] = (), penalty: Penalty | None = None) -> int:
    """Estimate the peak bytes of a border plan's setup: symbol, normal inverse, border system, subdomains.

    Args:
        convolution: the operator, in the dtype of the factors.
        damp_shape: the shape of the damping.
        penalty: further rows below the convolution.
    """
    padding = CopiedPadding(convolution) if CopiedPadding.serves(convolution) else None
    if penalty is not None:
        embedding = penalty.embedding(damp_shape)
        out_border = penalty.border(embedding)
    else:
        constrained = None if padding is None else (True,) * convolution.ndim
        inner = convolution if padding is None else padding.convolution
        embedding = Embedding(inner, batch_shape=damp_shape, tapped_phases_only=True, constrained=constrained)
        out_border = embedding.output_border()
    rows, columns = len(out_border), embedding.in_channels
    cells = math.prod(embedding.grid)
    frequencies = cells if convolution.is_complex else cells // embedding.grid[-1] * (embedding.grid[-1] // 2 + 1)
    item = convolution.dtype.to_complex().itemsize
    in_border = embedding.input_border() if padding is None else 2 * [padding.margin for _ in range(columns)]
    has_out, has_in = (any(any(axes) for axes in border) for border in (out_border, in_border))
    size = rows + columns if (has_out and has_in) or padding is not None else rows if has_out else columns
    # the symbol, the inverse of the smaller normal operator with work space, the border system and its spatial kernel
    by_factors = penalty is not None and columns == 1 and size == rows and len(embedding.grid) > 2
    system = size if by_factors else size**2  # one row at a time, or all rows
    entries = rows * columns + 2 * min(rows, columns) ** 2 + 3 * system
    total = frequencies * entries
    positions = (out_border if has_out else []) + (in_border if has_in else [])
    # dense subdomains, a small border or the corners: the inverse, and the work space for it
    inside = [math.prod(n - len(along) for n, along in zip(embedding.grid, axes, strict=True)) for axes in positions]
    largest = max(DEFAULT_LIMITS.dense_unknowns, 2 * DEFAULT_LIMITS.corner_unknowns * len(embedding.grid))
    total += 3 * min(largest, sum(cells - n for n in inside)) ** 2
    for a, n in enumerate(embedding.grid):
        cells_along = sum(len(axes[a]) for axes in positions)
        total += 3 * cells_along**2 * (cells // n)
    return embedding.blocks * total * item


def items_at_once(arrays: int, vectors: int, device: torch.device) -> int:
    """The number of right-hand sides to solve for at once.

    On a CPU their arrays are limited to the size that the allocator reuses; elsewhere the six arrays of each that exist
    at a time may take half of the free memory.

    Args:
        arrays: bytes of a work array of one right-hand side.
        vectors: bytes of the border vectors that the iteration for one keeps.
        device: the device of the arrays.
    """
    if device.type == "cpu":
        return max(1, 2 * WORK_BYTES // arrays)
    return max(1, free_bytes(device) // 2 // (6 * arrays + vectors))
