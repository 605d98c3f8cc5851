r"""A normal operator of a truncated circulant: on inputs or on outputs, its shift, and bounds of it.

The side is that of the unknowns, ``residual`` for :math:`AA^H + \mu` on outputs and ``solution`` for
:math:`A^HA + \mu` on inputs. The shift :math:`\mu` is ``damp^2``, or a floor where that would make the matrices per
frequency singular for the precision of their dtype.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lsconv.border import cost_model
from lsconv.border.cost_model import Limits
from lsconv.border.penalty import Filter, Penalty
from lsconv.border.reflected_padding import CopiedPadding
from lsconv.border.truncated_circulant import TruncatedCirculant, leading_wave, truncated_circulant
from lsconv.fourier.batched_linalg import frobenius, hermitian_inverse_
from lsconv.fourier.embedding import Embedding
from lsconv.fourier.frequency_matrices import FrequencyMatrices, Grid
from lsconv.fourier.symbol import gram, largest_eigenvalue, product, saddle_inverse, shifted, symbol
from lsconv.krylov.loop.batched_scalars import binary_unit
from lsconv.operators.batch_layout import over_items
from lsconv.operators.convolution import Convolution, norm_bound
from lsconv.operators.dtypes import ROUNDING, double

__all__ = ["CirculantParts", "NormalProblem", "Request", "least_shift", "needs_double", "scaled_to_unit"]

# Factors in float32 lose a factor sigma_max^2 / damp^2 of accuracy. Below this damp / sigma_max the additional outer
# steps cost more than factors in float64.
_LEAST_DAMP = 0.03

# Without a damp the smallest singular value is unknown. A lower floor loses digits in the factors, and more iterations
# stagnate (with eps^(2/3) three times as many); a higher one costs outer steps.
_UNDAMPED_FLOOR = 1e-10


def least_shift(dtype: torch.dtype, *, damped: bool) -> float:
    """The least shift of factors, relative to the largest singular value squared, which bounds their rounding.

    Args:
        dtype: the type of the factors.
        damped: every item has a damp, or a penalty.
    """
    rounding = ROUNDING * torch.finfo(dtype).eps
    return rounding if damped else max(rounding, _UNDAMPED_FLOOR)


def scaled_to_unit(A: Convolution) -> tuple[Tensor, Convolution]:
    """The power of two next above the largest entry of each kernel, in float64, and A divided by it, detached."""
    weight = A.weight.detach()
    unit = binary_unit(weight.abs().flatten(-A.ndim - 2).amax(-1).double())
    return unit, A.with_parameters([weight / over_items(unit.to(weight.real.dtype), A.ndim + 2)])


@dataclass(frozen=True)
class Request:
    """The description of a normal operator.

    Attributes:
        convolution: A, in the dtype to compute in.
        damp: one per batch item, of a shape that is (broadcastable to) a batch shape.
        floor: the least mu, relative to the largest singular value squared.
        side: "residual" or "solution"; None chooses by the numbers of rows and columns.
        penalty: further rows ``damp L`` below A; then "solution" is the side.
        copied_padding: the padding of A, where it is reflect or replicate; then "solution" is the side, and damp > 0.
        limits: the limits for solving a border by factors, and of its preconditioner.
        shortest_grid: use the shortest grid, as factors do, instead of one of a good FFT length.
        missing: outputs that are not measured, ``out_shape``, the same for all items and groups; only without
            ``copied_padding``.
    """

    convolution: Convolution
    damp: Tensor
    floor: float
    side: str | None = None
    penalty: Penalty | None = None
    copied_padding: CopiedPadding | None = None
    limits: Limits = field(default_factory=Limits)
    shortest_grid: bool = False
    missing: Tensor | None = None

    @classmethod
    def of(
        cls,
        convolution: Convolution,
        damp: Tensor | float = 0.0,
        terms: Sequence[Filter] = (),
        *,
        floor: float,
        side: str | None = None,
        missing: Tensor | None = None,
        limits: Limits | None = None,
    ) -> Request:
        """Describe ``A^H A + damp^2 L^H L``, or the operator of the residual side, for any padding of A.

        Args:
            convolution: A, in the dtype to compute in.
            damp: the damping, a number or one per batch item.
            terms: L, as :func:`~lsconv.border.penalty.common_grid_filters` gives it; none: the identity.
            floor, side, missing: as the fields of these names.
            limits: as the field; None: the default of the cost model.
        """
        damp = torch.as_tensor(damp, dtype=torch.float64, device=convolution.device)
        penalty = Penalty(convolution, terms, damp) if terms else None
        shift = damp.new_zeros(()) if terms else damp  # with a penalty the damping is in its rows damp L
        copied_padding = CopiedPadding(convolution) if CopiedPadding.serves(convolution) else None
        limits = cost_model.DEFAULT_LIMITS if limits is None else limits
        return cls(convolution, shift, floor, side, penalty, copied_padding, limits, missing=missing)

    @property
    def has_whole_lines(self) -> bool:
        """Tell whether the border is made of whole lines of the grid: no copied margin, and no missing outputs."""
        return self.copied_padding is None and self.missing is None

    def precise(self) -> Request:
        """Convert the request to double precision, with the least shift of that precision."""
        damped = self.penalty is not None or bool((self.damp > 0).all())
        return replace(
            self,
            convolution=self.convolution.to(dtype=double(self.convolution.dtype)),
            penalty=None if self.penalty is None else self.penalty.precise(),
            floor=least_shift(torch.float64, damped=damped),
        )


@dataclass(frozen=True)
class CirculantParts:
    """The block-circulant operators from which the inverse of a normal operator is built.

    Attributes:
        inverse: P, that of the block-circulant normal operator, or of the saddle operator.
        to_border: E, the map from the side of the unknowns to that of the border; None where they are the same.
        deficient: the smaller Gram matrix is numerically singular at most frequencies.
    """

    inverse: FrequencyMatrices
    to_border: FrequencyMatrices | None = None
    deficient: bool = False

    @functools.cached_property
    def Q(self) -> FrequencyMatrices:  # noqa: N802 - the name of the operator in every equation
        """Q, which is restricted to the border: P, or the capacitance ``I - E P E^H``."""
        if self.to_border is None:
            return self.inverse
        E = self.to_border.matrices
        capacitance = product(product(E, self.inverse.matrices), E.mH).neg_()
        capacitance.diagonal(dim1=-2, dim2=-1).add_(1)
        return FrequencyMatrices(self.inverse.grid, capacitance)


class NormalProblem:
    """A normal operator on its grid.

    Args:
        request: the description of the operator.
        symbol_of: makes the symbol of a convolution on a grid; a rank of a tiled solve makes its own frequencies.

    Attributes:
        truncated: the truncated circulant.
        side: the side of the unknowns, "residual" or "solution".
        smaller_side: the side on which the symbol's Gram matrices are smaller, ``S S^H`` or ``S^H S``.
        gram_matrices: the Gram matrices of that side, one per frequency.
        norm_squared_bound: a bound of the largest singular value squared, per block.
        damp_squared: ``damp^2``, per block.
        mu: the shift that is used, ``damp^2`` or the floor, per block.
        norm_bound: a bound of ``||A||``, per batch item.
        relative_damp: the least root of mu, relative to the largest singular value.
        has_shift: mu > 0 in every block, be it damp^2 or the floor, and there is no penalty.
        exact: whether mu is the wanted one, up to rounding.
    """

    def __init__(
        self, request: Request, symbol_of: Callable[[Convolution, Embedding], FrequencyMatrices] = symbol
    ) -> None:
        damp, penalty, copied_padding = request.damp, request.penalty, request.copied_padding
        self.request = request
        self._parts: CirculantParts | None = None
        self.truncated = truncated_circulant(
            request.convolution,
            tuple(damp.shape),
            penalty,
            copied_padding,
            shortest=request.shortest_grid,
            missing=request.missing is not None,
            symbol_of=symbol_of,
        )
        embedding, S = self.embedding, self.truncated.symbol
        self.smaller_side = "residual" if S.rows <= S.columns else "solution"
        stacked = penalty is not None or copied_padding is not None
        self.side = "solution" if stacked else request.side or _choose_side(self.truncated)
        self.gram_matrices = gram(S.matrices, self.smaller_side)
        self.norm_squared_bound = largest_eigenvalue(self.gram_matrices)
        self.damp_squared = embedding.per_block(damp) ** 2
        floor = request.floor
        if S.rows != S.columns and self.side != self.smaller_side:
            # the larger Gram matrix is singular, so that its inverse has the eigenvalue 1 / mu at every frequency, and
            # the others next to it are to keep half of their digits
            floor = max(floor, ROUNDING * torch.finfo(torch.float64).eps ** 0.5)
        self.mu = torch.maximum(self.damp_squared, floor * self.norm_squared_bound.to(self.damp_squared))
        groups = self.norm_squared_bound.expand(embedding.blocks).reshape(*embedding.batch_shape, embedding.groups)
        self.norm_bound = groups.amax(-1).double().sqrt()
        if copied_padding is not None:
            self.norm_bound = torch.minimum(copied_padding.norm * self.norm_bound, copied_padding.bound)
        # a zero kernel has no shift of its own, and says nothing about that of the others
        relative_mu = (self.mu / self.norm_squared_bound.to(self.mu)).nan_to_num(nan=1.0, posinf=1.0)
        self.relative_damp = float(relative_mu.amin().sqrt())
        self.has_shift = penalty is None and self.relative_damp > 0
        self.exact = bool((self.mu == self.damp_squared).all()) or (
            penalty is not None and floor <= least_shift(torch.float64, damped=True)
        )

    @property
    def embedding(self) -> Embedding:
        """The grid."""
        return self.truncated.embedding

    def missing_cells(self) -> Tensor:
        """The outputs that are not measured, on the grid: ``(channels, *grid)``."""
        assert self.request.missing is not None
        return self.embedding.outputs_to_grid(self.request.missing.to(torch.uint8))[0, 0] > 0

    @property
    def form(self) -> str:
        """The form of the truncation: "circulant", "valid", "full" or "saddle"."""
        return self.truncated.form

    @property
    def symbol(self) -> FrequencyMatrices:
        """The symbol of the circulant."""
        return self.truncated.symbol

    @property
    def mu_for_matrices(self) -> Tensor:
        """``mu``, in the dtype of the matrices and of a shape that broadcasts with them."""
        return self.mu.to(self.gram_matrices.real.dtype).reshape(-1, *(1 for _ in self.gram_matrices.shape[1:]))

    @property
    def is_stacked_volume(self) -> bool:
        """Tell whether A is a volume of one channel with a penalty, so that [A; damp L] has one column."""
        return self.request.penalty is not None and self.embedding.ndim > 2 and self.symbol.columns == 1

    @property
    def circulant_parts(self) -> CirculantParts:
        """The inverse of the block-circulant operator, made once."""
        if self._parts is None:
            self._parts = self._make_parts()
        return self._parts

    def _make_parts(self) -> CirculantParts:
        S, side = self.symbol, self.side
        if self.form == "saddle":
            saddle, smaller = saddle_inverse(S.matrices, self.gram_matrices, self.mu_for_matrices)
            Q = FrequencyMatrices(S.grid, saddle)
            return CirculantParts(Q, deficient=self.rank_deficient(smaller))
        on_smaller_side = side == self.smaller_side
        gram_matrices = self.gram_matrices if on_smaller_side else gram(S.matrices, side)
        P = FrequencyMatrices(S.grid, hermitian_inverse_(shifted(gram_matrices, self.mu_for_matrices).contiguous()))
        deficient = on_smaller_side and self.rank_deficient(P.matrices)
        if self.form == "circulant" or (self.form == "valid") == (side == "residual"):
            return CirculantParts(P, deficient=deficient)
        return CirculantParts(P, S if side == "solution" else S.H, deficient)

    def condition(self, inverse: FrequencyMatrices) -> float:
        """A bound of the condition number of the block-circulant operator, from its inverse."""
        norm_squared = float(self.norm_squared_bound.amax())
        norm = math.sqrt(norm_squared) if self.form == "saddle" else norm_squared  # that of the operator inverted
        return float(frobenius(inverse.matrices).amax()) * norm

    def on_plane(self, *, transposed: bool) -> NormalProblem:
        """Lay the operator on a plane, a line being a plane of one row; with its axes exchanged if ``transposed``."""
        S = self.symbol
        if len(S.grid.sizes) == 2 and not transposed:
            return self
        plane = copy.copy(self)
        plane._parts = None
        if len(S.grid.sizes) == 1:
            S = FrequencyMatrices(Grid((1, *S.grid.sizes), real=S.grid.real), S.matrices.unsqueeze(1))
        if transposed:
            grid = Grid(S.grid.sizes[::-1], real=S.grid.real)
            S = FrequencyMatrices(grid, grid.transform(S.kernel().mT).movedim((1, 2), (-2, -1)))
        plane.truncated = replace(self.truncated, symbol=S)
        plane.gram_matrices = gram(S.matrices, self.smaller_side)
        return plane

    def leading_wave(self) -> Tensor:
        """The plane wave of the symbol's largest singular value on the inputs of A, ``(*batch, *in_shape)``."""
        return leading_wave(self.symbol, self.gram_matrices, self.embedding)

    def null_space_reason(self, *, deficient: bool) -> str:
        """Say why A or its adjoint has a null space by its structure, without damping; empty if it has none.

        Args:
            deficient: the smaller Gram matrix is singular at the majority of frequencies.
        """
        embedding, rows, columns = self.embedding, self.symbol.rows, self.symbol.columns
        excess = rows - columns
        axes = sum(axis.grid > 1 and (bool(axis.border_out) or bool(axis.border_in(0))) for axis in embedding.axes)
        m, n = math.prod(embedding.out_shape), math.prod(embedding.in_shape)
        # a generic (c + e) x c matrix polynomial in d variables loses rank somewhere when e < d
        if self.form == "valid" and excess > 0 and (excess < axes or m <= n):
            return f"A has {rows} rows and {columns} columns per frequency and therefore a null space"
        if self.form == "full" and excess < 0 and (-excess < axes or n <= m):
            return f"A has {rows} rows and {columns} columns per frequency, its adjoint therefore a null space"
        if self.side == "solution" and m < n:
            return (
                "A has fewer outputs than inputs, but more rows than columns per frequency, and therefore a null space"
            )
        if deficient:
            return "the symbol of A is rank-deficient at the majority of frequencies"
        return ""

    def rank_deficient(self, smaller_inverse: Tensor) -> bool:
        """Tell from its shifted inverse whether the smaller Gram matrix is singular at most frequencies."""
        if bool((self.mu == self.damp_squared).all()):
            return False
        singular_part = (self.mu_for_matrices[..., 0, 0] * frobenius(smaller_inverse)).flatten(1).median(-1).values
        return bool(((singular_part > 0.1) & (self.mu > self.damp_squared)).any())


def _choose_side(truncated: TruncatedCirculant) -> str:
    """The side of the unknowns: that of the smaller normal operator, but the solution side for a square saddle form."""
    embedding, rows, columns = truncated.embedding, truncated.symbol.rows, truncated.symbol.columns
    m, n = math.prod(embedding.out_shape), math.prod(embedding.in_shape)
    if m > n or rows > columns:
        return "solution"
    # z of the saddle form is -r / sqrt(mu), whose digits cancel where A is nearly singular; a square A has no null
    # space from which x would have to be kept away
    return "solution" if truncated.form == "saddle" and rows == columns and m == n else "residual"


def needs_double(A: Convolution, damp: Tensor, threshold: float = _LEAST_DAMP) -> bool:
    """Tell whether a damped problem with float32 data costs less with factors in float64.

    Args:
        A: the operator.
        damp: the damping, a number or one per batch item.
        threshold: the damp / ||A|| below which factors in float64 cost less.
    """
    return bool(((damp > 0) & (damp < threshold * norm_bound(A))).any() and (damp > 0).all())
