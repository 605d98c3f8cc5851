r"""The direct solve of a square truncated convolution without damping, through the capacitance matrix of its border.

Where as many outputs as inputs are cropped from the periodic grid ("same" padding of as many channels as outputs) and
the block-circulant C is invertible, ``A x = y`` means that C maps x, extended by zeros on the input border, to y,
extended by unknown values w on the output border. The condition that x is zero on the input border determines w:

.. math:: x = R_{in} C^{-1} (R_{out}^T y + B_{out}^T w), \qquad G w = -B_{in} C^{-1} R_{out}^T y,
          \qquad G = B_{in} C^{-1} B_{out}^T .

On the shortest grid, N = n + p, the border of an n x n image is one cross of p rows and p columns, and G is small
enough to be factorised once (32 channels, 3x3, n = 128: 8224 unknowns of 524288). An iteration on the border converges
badly: where the determinant of the symbol along one axis winds around zero, A has singular values that fall
exponentially with n, and so has G. A direct solve is not affected, and finds them: singular vectors of G of small
singular values are the border values of vectors that A maps to nearly zero.

Vectors whose singular value of A is provably below ``rcond * ||C||`` count as the null spaces of A and A^H. With their
orthonormal bases X and Z the answer is the minimum-norm least-squares solution of :math:`(I - ZZ^H) A (I - XX^H)`,
which differs from A by no more than that.

Buzbee, Dorr, George and Golub, "The direct solution of the discrete Poisson equation on irregular regions", SIAM J.
Numer. Anal. 8 (1971), for the capacitance matrix. Gohberg and Feldman, "Convolution equations and projection methods
for their solution", AMS (1974), for the winding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lsconv.border.border_set import Border, between_borders
from lsconv.border.capacitance import Capacitance, Direction, static_lu
from lsconv.border.cost_model import CostModel, dense_cost
from lsconv.border.normal_problem import scaled_to_unit
from lsconv.border.null_space import NullSpaces
from lsconv.errors import MethodError, PlanMemoryError
from lsconv.fourier import batched_linalg
from lsconv.fourier.batched_linalg import frobenius
from lsconv.fourier.embedding import Embedding
from lsconv.fourier.frequency_matrices import FrequencyMatrices
from lsconv.fourier.symbol import symbol
from lsconv.krylov.loop.batched_scalars import ItemSpace
from lsconv.krylov.loop.certificate import NormBounds, RankThreshold
from lsconv.krylov.loop.judge import Judge
from lsconv.krylov.loop.solution import Solution
from lsconv.krylov.plan import FALLBACK_AFTER, Plan
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import broadcast_shapes, over_items
from lsconv.operators.convolution import Convolution
from lsconv.operators.dtypes import default_rcond, direct_rtol, double
from lsconv.operators.memory import allowed_bytes

__all__ = ["CapacitancePlan"]


class CapacitancePlan(Plan):
    """Setup of the direct border solve for one square truncated convolution and ``damp = 0``.

    Args:
        A: a convolution with as many rows as columns per frequency and an input border as large as the output border.
        damp_shape: more batch dimensions, of a damping that is zero everywhere.
        rcond: singular values up to this part of ``||C||`` count as zero; None: :func:`default_rcond`.
        memory_limit: bytes that the plan may use; None: 60 % of what is free on A's device.
        refuse_if_slower: refuse where an iteration on the border is expected to cost less.

    Attributes:
        nullity: the number of singular values of each block that count as zero.
        undecided: the blocks one of whose singular values stands on the threshold, up to rounding.

    Raises:
        MethodError: A is not of that kind, its symbol is singular, or the factorisation would not be worth its time.
        PlanMemoryError: the plan would need more than ``memory_limit``.

    Example:
        >>> A = lsconv.Conv2d(torch.randn(3, 3, 3, 3, dtype=torch.float64), in_size=(16, 16), padding=1)
        >>> x = torch.randn(3, 16, 16, dtype=torch.float64)
        >>> y = A(x)
        >>> bool(torch.dist(A(CapacitancePlan(A).solve(y).x), y) < 1e-10 * y.norm())
        True
    """

    reason = "a square convolution without damping: the capacitance matrix of its border is factorised"
    falls_back_on_lsmr = True

    def __init__(
        self,
        A: LinearOperator,
        damp_shape: tuple[int, ...] = (),
        *,
        rcond: float | None = None,
        memory_limit: int | None = None,
        refuse_if_slower: bool = False,
    ) -> None:
        embedding = _square_embedding(A)
        assert isinstance(A, Convolution)
        self.A, self.embedding = A, embedding
        device = A.device
        in_border = Border(embedding.grid, embedding.input_border(), device)
        out_border = Border(embedding.grid, embedding.output_border(), device)
        self._check(in_border, out_border, memory_limit, refuse_if_slower)
        self.damp = torch.zeros(damp_shape, dtype=torch.float64, device=device)
        self.rcond = default_rcond(A.dtype) if rcond is None else rcond
        with torch.no_grad():
            self.precise = A.with_parameters([A.weight.detach()]).to(dtype=double(A.dtype))
            self.unit, scaled = scaled_to_unit(self.precise)
            matrices = symbol(scaled, embedding)
            found = self._find(matrices, in_border, out_border, rcond is not None)
        self.capacitance, self.nullity, self.undecided = found.capacitance, found.nullity, found.undecided
        if not found.resolved:
            raise MethodError(f"{A!r}: the rounding of its border hides which singular values count as zero")
        if rcond is not None and found.largest > default_rcond(torch.float64):
            # the vectors found span the null space of a nearby A, not the singular vectors below the user's threshold
            raise MethodError(f"{A!r}: singular values up to {found.largest:.1e} ||A|| would count as zero")

    def _check(self, in_border: Border, out_border: Border, memory_limit: int | None, refuse_if_slower: bool) -> None:
        """Refuse borders of different sizes, and plans that are too slow or need too much memory."""
        embedding = self.embedding
        if not 0 < in_border.size == out_border.size or not _is_complement(in_border, out_border, embedding):
            raise MethodError(f"{self.A!r}: {out_border.size} unknowns and {in_border.size} equations on the border")
        cells, channels = math.prod(embedding.grid), embedding.in_channels
        if refuse_if_slower:
            # where singular values fall exponentially, as a blur's do, the iterations of another method do not suffice:
            # a factorisation is refused only where it costs more than twice as many
            iteration = CostModel(1, cells, channels, definite=False).iteration_work(1)
            if dense_cost(in_border.size, definite=False).setup > 2 * FALLBACK_AFTER * iteration:
                raise MethodError(
                    f"{self.A!r}: {in_border.size} border unknowns cost more to factorise than to iterate on"
                )
        itemsize = 16 if self.A.is_complex else 8
        needed = embedding.blocks * itemsize * (3 * in_border.size**2 + 6 * cells * channels**2)
        allowed = allowed_bytes(memory_limit, self.A.device)
        if needed > allowed:
            raise PlanMemoryError(
                f"the capacitance matrix of {self.A!r} needs about {needed:.3g} bytes, and {allowed:.3g} are allowed "
                f"(memory_limit=)"
            )

    def _find(self, matrices: FrequencyMatrices, in_border: Border, out_border: Border, user_rcond: bool) -> NullSpaces:
        """Factorise the capacitance matrix, set :attr:`norm_bound`, and find the null spaces.

        Raises:
            MethodError: the symbol is singular, or nearly so.
        """
        inverse, info = batched_linalg.inverse(matrices.matrices)
        norms = [frobenius(m).flatten(1).amax(-1) for m in (matrices.matrices, inverse)]
        condition = norms[0] * norms[1]
        # In a group of channels much smaller than others of its item, larger parts of its singular values count as
        # zero.
        groups = self.embedding.groups
        item_over_group = norms[0].reshape(-1, groups).amax(1).repeat_interleave(groups) / norms[0]
        # the inverse of the symbol has to keep half of the digits, and such a singular value to be one of the border
        served = (condition <= torch.finfo(torch.float64).eps ** -0.5) & (self.rcond * item_over_group * condition <= 1)
        if bool((info > 0).any()) or not bool(served.all()):
            raise MethodError(f"{self.A!r}: the symbol is singular, or nearly so (condition {condition.max():.1e})")
        self.norm_bound = norms[0]
        forward = FrequencyMatrices(matrices.grid, inverse)
        kernel = forward.kernel()
        largest = torch.linalg.vector_norm(kernel.flatten(1), math.inf, dim=-1)
        factors, pivots = static_lu(between_borders(kernel, in_border, out_border), largest)
        del kernel
        none = factors[..., :0]
        zero = [border.mask.to(inverse.device) for border in (in_border, out_border)]
        directions = (
            Direction(forward, in_border, out_border, zero[0], none, none),
            Direction(forward.H, out_border, in_border, zero[1], none, none),
        )
        found = Capacitance(factors, pivots, directions)
        return NullSpaces(found, matrices, norms[1], condition, self.rcond * item_over_group, user_rcond=user_rcond)

    # ------------------------------------------------------------------ answers

    def _once(self, data: Tensor, adjoint: bool) -> Tensor:
        embedding = self.embedding
        batch, _ = embedding.split_batch(tuple(data.shape[: data.ndim - len(self.A.in_shape)]))
        if adjoint:
            return embedding.outputs_from_grid(self.capacitance.on_grid(embedding.inputs_to_grid(data), True), batch)
        return embedding.inputs_from_grid(self.capacitance.on_grid(embedding.outputs_to_grid(data), False), batch)

    def _refined(self, data: Tensor, adjoint: bool, rtol: float | None) -> Tensor:
        """Solve in double precision, refining with residuals of A until the steps no longer halve."""
        rtol = direct_rtol(self.A.dtype, rtol)
        A = self.precise.H if adjoint else self.precise
        data = data.detach().to(self.precise.dtype)
        space = ItemSpace(A.in_shape, A.dtype, A.device)
        shape = broadcast_shapes(self.unit.shape, self.A.batch_shape)
        scale = space.broadcast((1 / self.unit).expand(shape))
        x = self._once(data, adjoint) * scale
        last = torch.full((), math.inf, dtype=torch.float64, device=data.device)
        while True:  # until the steps no longer halve
            step = self._once(data - A.apply(x), adjoint) * scale
            change = space.norm(step) / space.norm(x).clamp_min(torch.finfo(torch.float64).tiny)
            better = change < last / 2
            x = torch.where(over_items(better, len(A.in_shape)), x + step, x)
            last = torch.where(better, change, 0.0)
            if bool((last <= 1e-3 * rtol).all()):
                return x

    @torch.no_grad()
    def solve(
        self, y: Tensor, *, rtol: float | None = None, atol: float = 0.0, max_iter: int | None = None
    ) -> Solution:
        """The certified solution for ``y`` of shape ``(*batch, *out_shape)``; ``max_iter`` has no effect."""
        tolerances = self.tolerances(rtol, atol)
        x = self._refined(y, False, tolerances.rtol)
        judge = Judge(
            self.precise,
            tolerances,
            self.damp,
            self.A.dtype,
            norm=NormBounds(upper=self.norm_bound.reshape(*self.unit.shape, -1).amax(-1) * self.unit),
            rank=RankThreshold(self.rcond, truncated=True),
        )
        solution = judge.solution(x, y.detach().to(self.precise.dtype))
        items = self.embedding.batch_shape
        nullity, undecided = self.nullity.reshape(*items, -1).sum(-1), self.undecided.reshape(*items, -1).any(-1)
        return solution.with_rank(self.A.out_numel - nullity, undecided)

    @torch.no_grad()
    def apply(self, y: Tensor, *, rtol: float | None = None) -> Tensor:
        """``A^+ y``, without the certificate."""
        return self._refined(y, False, rtol).to(self.A.dtype)

    @torch.no_grad()
    def adjoint(self, v: Tensor, *, rtol: float | None = None) -> Tensor:
        """``A^{+H} v`` for ``v`` of shape ``(*batch, *in_shape)``."""
        return self._refined(v, True, rtol).to(self.A.dtype)

    @torch.no_grad()
    def gram_solve(self, g: Tensor, *, rtol: float | None = None) -> Tensor | None:
        """``(A^H A)^+ g`` for ``g`` of shape ``(*batch, *in_shape)``."""
        return self.normal_solve(g, rtol=rtol)

    def normal_solve(self, g: Tensor, *, rtol: float | None = None) -> Tensor:
        """``(A^H A + damp^2)^{-1} g``; the damping is zero here."""
        return self._refined(self._refined(g, True, rtol), False, rtol).to(self.A.dtype)

    @torch.no_grad()
    def attempt_apply(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Compute :meth:`apply` of ``y``, and mark the items that missed the tolerance."""
        solution = self.solve(y)
        return solution.x, ~solution.converged

    @torch.no_grad()
    def attempt_adjoint(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Compute :meth:`adjoint` of ``v``, and mark the items that missed the tolerance."""
        answer = self.adjoint(v)
        v64 = v.detach().to(self.precise.dtype)
        judge = Judge(self.precise.H, self.tolerances(None), rounding=torch.finfo(self.A.dtype).eps)
        back = judge.solution(answer.to(v64.dtype), v64)
        return answer, ~back.converged

    @property
    def nbytes(self) -> int:
        """Bytes of the factors kept."""
        return self.capacitance.nbytes

    def __repr__(self) -> str:
        size, most = self.capacitance.size, int(self.nullity.max())
        zeros = f", {most} singular values below {self.rcond:g} ||A|| taken for zero" if most else ""
        return (
            f"CapacitancePlan({self.A.in_shape} -> {self.A.out_shape}, grid={self.embedding.grid}, border={size}"
            f"{zeros}, factors={self.nbytes / 2**20:.1f} MiB in {self.capacitance.factors.dtype}, {self.A.device})"
        )


def _square_embedding(A: LinearOperator) -> Embedding:
    """The shortest grid of a convolution whose symbol is square."""
    if not (
        isinstance(A, Convolution) and Embedding.serves(A) and A.weight.real.dtype in (torch.float32, torch.float64)
    ):
        raise MethodError(f"{A!r} is no truncated block-circulant operator")
    embedding = Embedding(A, (1,) * A.ndim, tapped_phases_only=True)
    if embedding.in_channels != embedding.out_channels:
        raise MethodError(
            f"{A!r} has {embedding.out_channels} rows and {embedding.in_channels} columns per frequency, not as many"
        )
    return embedding


def _is_complement(in_border: Border, out_border: Border, embedding: Embedding) -> bool:
    """Tell whether inputs and input border make up the whole grid, and outputs and output border too."""
    axes = embedding.axes
    inputs = sum(
        math.prod(axis.inputs(phase) for axis, phase in zip(axes, phases, strict=True)) for phases in embedding.phases
    )
    outputs = math.prod(axis.n_out for axis in axes)
    cells = math.prod(embedding.grid)
    channels = embedding.in_channels // len(embedding.phases)
    return (
        in_border.size + channels * inputs == embedding.in_channels * cells
        and out_border.size + embedding.out_channels * outputs == embedding.out_channels * cells
    )
