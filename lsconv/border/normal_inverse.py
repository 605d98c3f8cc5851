r"""The exact inverse of a truncated block-circulant operator, through its border.

With :math:`A = R_{out} C R_{in}^T` (see :mod:`lsconv.fourier.embedding`) and :math:`\mu = damp^2` the normal operators
of A are principal submatrices, or low-rank changes, of block-circulant ones:

.. math::
    AA^H + \mu  &= (CC^H + \mu)_{II}              && \text{no input cell is cropped ("valid")} \\
    A^HA + \mu  &= (C^HC + \mu) - C_B^H C_B        && \text{the same, solved for x; B the cropped outputs} \\
    A^HA + \mu  &= (C^HC + \mu)_{II}              && \text{no output cell is cropped ("full")} \\
    AA^H + \mu  &= (CC^H + \mu) - C_B C_B^H        && \text{the same, solved for z} \\
    \begin{pmatrix} -\sqrt\mu & A \\ A^H & \sqrt\mu \end{pmatrix}
                &= \begin{pmatrix} -\sqrt\mu & C \\ C^H & \sqrt\mu \end{pmatrix}_{II} && \text{both ("saddle")}

With P the inverse of the block-circulant operator (one small matrix per frequency), the inverse of a principal
submatrix is :math:`P_{II} - P_{IB} (P_{BB})^{-1} P_{BI}`, and that of a low-rank change follows from the Woodbury
identity with the capacitance matrix :math:`I - C_B P C_B^H`. Either way what remains to be solved is a system on the
border, whose size does not grow with the area and whose iteration count hardly grows at all.

Where the input is padded by reflected or replicated cells, the copies are further unknowns, held to what they copy by
multipliers: the saddle form, with a border of its own (:mod:`lsconv.border.reflected_padding`).
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lsconv.border.border_set import Border
from lsconv.border.cost_model import CostModel, FactorCost, Factorise, cheapest_grid, items_at_once, whole_border_cost
from lsconv.border.direct.direct_pass import DirectInverse
from lsconv.border.factored_capacitance import FactoredCapacitance
from lsconv.border.factorisation_policy import FactorisationPolicy
from lsconv.border.normal_problem import NormalProblem, Request
from lsconv.border.stack_system import StackRows
from lsconv.border.system.border_system import BorderProblem, BorderSystem
from lsconv.errors import PlanMemoryError
from lsconv.fourier.frequency_matrices import FrequencyMatrices

__all__ = ["BorderInverse", "CirculantInverse", "DefiniteInverse", "NormalInverse", "SaddleInverse", "normal_inverse"]


def normal_inverse(request: Request) -> NormalInverse:
    r"""The inverse of a normal operator of A, regularised by ``mu``, to the accuracy of its border iteration.

    ``side == "residual"``: :math:`f \mapsto (AA^H + \mu)^{-1} f` on outputs, for A with at least as many columns per
    frequency as rows. ``side == "solution"``: :math:`g \mapsto (A^HA + \mu)^{-1} g` on inputs, for the others.
    """
    problem = NormalProblem(request)
    if problem.form == "circulant":
        return CirculantInverse(problem)
    return (SaddleInverse if problem.form == "saddle" else DefiniteInverse)(problem)


class NormalInverse(ABC):
    """The inverse of a normal operator; made by :func:`normal_inverse`.

    Args:
        problem: the normal operator.

    Attributes:
        inverse: that of the block-circulant operator, one matrix per frequency.
        direct: the factors of the border, once they have replaced the iteration; else None.
        dense: where the border has no such factors, the inverse by a border system that is preconditioned by its dense
            inverse, once that has replaced the iteration; else None.
    """

    inverse: FrequencyMatrices
    _deficient: bool  # the smaller Gram matrix is singular at the majority of frequencies

    def __init__(self, problem: NormalProblem) -> None:
        self.problem = problem
        self.direct: DirectInverse | None = None
        self.dense: NormalInverse | None = None
        self.embedding, self.form, self.side = problem.embedding, problem.form, problem.side
        self.convolution, self.leading_wave = problem.truncated.convolution, problem.leading_wave
        self.norm_bound, self.norm_squared_bound = problem.norm_bound, problem.norm_squared_bound
        self.relative_damp, self.has_shift = problem.relative_damp, problem.has_shift

    @property
    def mu(self) -> Tensor:
        """The shift of the normal operator, per block."""
        return self.problem.mu if self.direct is None else self.direct.mu

    @property
    def exact(self) -> bool:
        """Tell whether the factors are those of the wanted operator, up to rounding."""
        return self.problem.exact or (self.direct is not None and self.direct.exact)

    @property
    def _replacement(self) -> DirectInverse | NormalInverse | None:
        """The inverse that has replaced the iteration; None before."""
        return self.dense if self.direct is None else self.direct

    def null_space_reason(self) -> str:
        """Say why A or its adjoint has a null space by its structure, without damping; empty if it has none."""
        return self.problem.null_space_reason(deficient=self._deficient)

    def factorise_if_cheaper(self, batch: tuple[int, ...], solves: int = 1) -> DirectInverse | None:
        """Factorise if cheaper than ``solves`` solves by iteration; return the factors of a direct pass, if any.

        Args:
            batch: the batch shape.
            solves: the number of solves that are expected, one after the other.
        """
        return self.direct

    def give_up_factors(self) -> None:
        """Iterate from now on, because the factors have lost too many digits."""
        self.direct = None

    def __call__(self, f: Tensor, tolerance: Tensor | float, max_iter: int = 1000) -> tuple[Tensor, Tensor]:
        """Apply the inverse to ``f``, outputs or inputs by ``side``; return also the border iterations per item."""
        z, iterations, _ = self.solve_from(f, tolerance, max_iter)
        return z, iterations

    @abstractmethod
    def solve_from(
        self, f: Tensor, tolerance: Tensor | float, max_iter: int = 1000, start: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Apply the inverse, from the border unknowns ``start``; return also the iterations and the border unknowns."""

    def describe(self) -> str:
        """Grid, border, memory and precision, for the ``repr`` of a plan."""
        if self._replacement is not None:
            return self._replacement.describe()
        return (
            f"form={self.form!r}, side={self.side!r}, grid={self.embedding.grid}, border={self.unknowns} unknowns x "
            f"{self.embedding.blocks} block(s), factors={self.convolution.dtype} {self.nbytes / 2**20:.1f} MiB on "
            f"{self.convolution.device}"
        )

    @property
    def unknowns(self) -> int:
        """The number of unknowns on the border of one block."""
        return 0

    @property
    def nbytes(self) -> int:
        """Bytes of the factors kept."""
        return self.inverse.nbytes


class CirculantInverse(NormalInverse):
    """The inverse where nothing is truncated: one division per frequency."""

    def __init__(self, problem: NormalProblem) -> None:
        super().__init__(problem)
        parts = problem.circulant_parts
        self.inverse, self._deficient = parts.inverse, parts.deficient

    def solve_from(
        self, f: Tensor, tolerance: Tensor | float, max_iter: int = 1000, start: Tensor | None = None
    ) -> tuple[Tensor, Tensor, None]:
        """Divide by the symbol; there are no unknowns on a border."""
        embedding, residual = self.embedding, self.side == "residual"
        batch, _ = embedding.split_batch(tuple(f.shape[: f.ndim - embedding.ndim - 1]))
        t = embedding.outputs_to_grid(f) if residual else embedding.inputs_to_grid(f)
        many = items_at_once(math.prod(t.shape[1:]) * t.element_size(), 0, t.device)
        parts = [self.inverse.on_grid(part) for part in t.split(many)]
        z = parts[0] if len(parts) == 1 else torch.cat(parts)
        z = embedding.outputs_from_grid(z, batch) if residual else embedding.inputs_from_grid(z, batch)
        return z, torch.zeros(batch, dtype=torch.int64, device=f.device), None


class BorderInverse(NormalInverse):
    """The inverse through the system on a border.

    Attributes:
        policy: the choice between factors and iteration.
        border: the border cells.
        Q: the block-circulant operator whose system on the border is solved.
        stack: the rows of a volume with a penalty on the border; None of other problems.
        to_border: E, the map from the side of the unknowns to that of the border; None where they are the same.
        condition: a bound of the condition number of that operator.
    """

    definite: bool  # Q is positive definite on the border
    max_condition: float  # the largest condition for which factors in double precision are accurate enough
    max_even_condition: float  # the largest one at which rounding does not hide that a kernel is not even

    def __init__(self, problem: NormalProblem) -> None:
        super().__init__(problem)
        parts = problem.circulant_parts
        self.inverse, self.to_border, self._deficient = parts.inverse, parts.to_border, parts.deficient
        self.Q: FrequencyMatrices | FactoredCapacitance
        if problem.is_stacked_volume and parts.to_border is not None:
            self.Q = FactoredCapacitance(parts.inverse, parts.to_border)
        else:
            self.Q = parts.Q
        self.border = self._cells(problem)
        if problem.request.missing is not None:
            self.border = self.border.with_cells(problem.missing_cells())
        definite, request = self.definite, problem.request
        self.stack: StackRows | None = None
        if isinstance(self.Q, FactoredCapacitance):
            assert request.penalty is not None
            self.stack = StackRows(self.inverse, self.Q.E, self.border, request.penalty.taps(self.embedding))
        channels = self.Q.rows if self.stack is None else self.stack.transforms
        self.model = CostModel(self.embedding.blocks, math.prod(self.embedding.grid), channels, definite)
        self.condition = problem.condition(self.inverse)
        crossed = request.has_whole_lines and self.embedding.ndim <= 2
        self._has_direct_pass = crossed and (request.penalty is not None or self.condition <= self.max_condition)
        self._on_shortest_grid, self._cost = self._cost_of_factors()
        normal_condition = self.condition if definite else self.condition**2
        self.policy = FactorisationPolicy(self.model, self._cost, request.limits, normal_condition, self.inverse.device)
        self._border_system: BorderSystem | None = None

    @abstractmethod
    def _cells(self, problem: NormalProblem) -> Border:
        """The border cells that the truncation removes."""

    @abstractmethod
    def _solve(
        self, f: Tensor, tolerance: Tensor | float, max_iter: int, start: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Apply the inverse to ``f`` on the grid; return also the border iterations and the border unknowns."""

    def _cost_of_factors(self) -> tuple[bool, FactorCost]:
        """The cost of the factors that may replace the iteration, on the cheaper of two grids."""
        truncated, request = self.problem.truncated, self.problem.request
        if self._has_direct_pass:
            even_condition = min(self.condition, self.max_even_condition)
            assert isinstance(self.Q, FrequencyMatrices)
            return cheapest_grid(truncated, self.Q, request.penalty, self.model, even_condition)
        onto = truncated.convolution if request.has_whole_lines and request.penalty is None else None
        return True, whole_border_cost(self.embedding, self.form, onto, self.border)

    def factorise(self) -> None:
        """Factorise the border; if its ranks are large and dense factors do not fit in memory, iterate from now on."""
        self._border_system = None
        if self._has_direct_pass:
            given = self.problem.request
            precise = replace(given.precise(), side=self.side, shortest_grid=self._on_shortest_grid)
            same = given.convolution.dtype == precise.convolution.dtype and given.floor == precise.floor
            try:
                # the symbol anew, in double precision and on the grid of the factors, is a hundredth of large factors
                again = self._on_shortest_grid or not same
                self.direct = DirectInverse(NormalProblem(precise) if again else self.problem)
            except PlanMemoryError:
                self.give_up_factors()
        else:
            request = self.problem.request
            limits = replace(request.limits, dense_unknowns=sys.maxsize, factorise=Factorise.NEVER)
            self.dense = normal_inverse(replace(request, side=self.side, shortest_grid=True, limits=limits))

    def begin_iteration(self) -> BorderSystem:
        """Make the system on the border with its preconditioner, unless it exists."""
        if self._border_system is None:
            request = self.problem.request
            # For a stacked volume the additive form takes no more iterations, and conjugate gradients need few vectors.
            restricted = request.limits.corners and (self.exact or not self.definite) and self.stack is None
            problem = BorderProblem(self.Q, self.border, self.model, restricted, request.limits, self.stack)
            self._border_system = BorderSystem(problem)
            if self._border_system.schwarz.full_inverse is not None:
                self.policy.give_up()  # as the factors are made already, inside of the preconditioner
        return self._border_system

    @property
    def unknowns(self) -> int:
        """The number of unknowns on the border of one block."""
        return self.border.size

    def factorise_if_cheaper(self, batch: tuple[int, ...], solves: int = 1) -> DirectInverse | None:
        """Factorise if cheaper than ``solves`` solves by iteration; return the factors of a direct pass, if any."""
        undecided = self._replacement is None and self._border_system is None
        if undecided and self.policy.should_factorise(self.embedding.split_batch(batch)[1], solves):
            self.factorise()
        return self.direct

    def give_up_factors(self) -> None:
        """Iterate from now on, because the factors have lost too many digits."""
        super().give_up_factors()
        self._border_system = None
        self.policy.give_up()

    def solve_from(
        self, f: Tensor, tolerance: Tensor | float, max_iter: int = 1000, start: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Apply the inverse, from the border unknowns ``start``; return also the iterations and the border unknowns."""
        if self._replacement is not None:
            return self._replacement.solve_from(f, tolerance, max_iter, start)
        system, embedding, residual = self.begin_iteration(), self.embedding, self.side == "residual"
        copied_padding = self.problem.truncated.copied_padding
        if start is not None and start.shape[-1] != self.border.size:
            start = None  # the start belongs to another grid
        batch, _ = embedding.split_batch(tuple(f.shape[: f.ndim - embedding.ndim - 1]))
        f_in = f if copied_padding is None else copied_padding.padded(f)
        t = embedding.outputs_to_grid(f_in) if residual else embedding.inputs_to_grid(f_in)
        each = self.embedding.blocks * t.element_size()
        arrays = each * max(t.shape[2], self.Q.rows) * math.prod(t.shape[3:])
        many = items_at_once(arrays, each * system.work_vectors * self.border.size, t.device)
        if many < t.shape[0] and isinstance(tolerance, float):
            starts: Sequence[Tensor | None] = [None] * t.shape[0] if start is None else start.split(many)
            pairs = zip(t.split(many), starts, strict=False)
            found = [self._solve(part, tolerance, max_iter, u) for part, u in pairs]
            z, iterations, u = (torch.cat(parts) for parts in zip(*found, strict=True))
        else:
            z, iterations, u = self._solve(t, tolerance, max_iter, start)
        count = embedding.per_item(iterations, batch).amax(-1)
        if self.policy.due:
            self.factorise()
            z, further, unknowns = self.solve_from(f, tolerance, max_iter)
            return z, count + further, unknowns
        z = embedding.outputs_from_grid(z, batch) if residual else embedding.inputs_from_grid(z, batch)
        if residual and self.problem.request.missing is not None:
            z = z.masked_fill(self.problem.request.missing, 0)
        return z if copied_padding is None else copied_padding.cropped(z), count, u

    def _solve_border(
        self, b: Tensor, tolerance: Tensor | float, max_iter: int, start: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Solve the border system by iteration; the unknowns are not converged where the factors are due afterwards."""
        system, policy, rhs = self.begin_iteration(), self.policy, b.shape[0]
        if policy.is_due():
            return torch.zeros_like(b), torch.zeros(b.shape[:2], dtype=torch.int64, device=b.device)
        allowance = policy.allowance(rhs)
        u, count = system.solve(b, tolerance, max_iter, start, allowance)
        taken = int(count.max())
        exceeded = allowance is not None and allowance.exceeded and taken < max_iter
        policy.record(taken, rhs, exceeded=exceeded)
        if not exceeded or policy.is_due():
            return u, count
        u, further = system.solve(b, tolerance, max_iter - taken, u)
        return u, count + further

    @property
    def nbytes(self) -> int:
        """Bytes of the factors kept."""
        factors = 0 if self._replacement is None else self._replacement.nbytes
        matrices = [self.inverse, self.Q, *([] if self.to_border is None else [self.to_border])]
        distinct = {id(m): m.nbytes for m in matrices}
        return factors + sum(distinct.values()) + (0 if self._border_system is None else self._border_system.nbytes)


class DefiniteInverse(BorderInverse):
    """The inverse where outputs alone are cropped, or inputs alone: the system on the border is definite.

    It is ``P_BB`` of the inverse P where the side has the border, and otherwise the capacitance ``I - E P E^H``, with E
    the map from the side to that of the border.
    """

    definite = True
    max_condition, max_even_condition = 2.5e9, 1e6  # a condition is about damp^-2

    def _cells(self, problem: NormalProblem) -> Border:
        truncated = problem.truncated
        positions = truncated.out_border if self.form == "valid" else truncated.in_border
        return Border(self.embedding.grid, positions, self.convolution.device)

    def _solve(
        self, f: Tensor, tolerance: Tensor | float, max_iter: int, start: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        grid = self.inverse.grid
        spectrum = grid.transform(f)
        t = self.inverse(spectrum)
        if self.stack is not None:
            u, iterations = self._solve_border(self.stack.values(t), tolerance, max_iter, start)
            correction = self.stack.spectrum(u)
        else:
            b = self.border.gather(grid.inverse(t if self.to_border is None else self.to_border(t)))
            u, iterations = self._solve_border(b.neg() if self.to_border is None else b, tolerance, max_iter, start)
            correction = grid.transform(self.border.scatter(u))
            if self.to_border is not None:
                correction = self.to_border.H(correction)
        return grid.inverse(self.inverse(spectrum + correction)), iterations, u


class SaddleInverse(BorderInverse):
    """The inverse where outputs and inputs are cropped, or where the padding is reflect or replicate."""

    definite = False
    max_condition, max_even_condition = 1e6, 1e3  # a condition is about damp^-1

    def __init__(self, problem: NormalProblem) -> None:
        super().__init__(problem)
        root = problem.mu_for_matrices.sqrt()
        self._root = root[..., 0].unsqueeze(0)  # shaped to divide (rhs, blocks, channels, *grid)

    def _cells(self, problem: NormalProblem) -> Border:
        truncated = problem.truncated
        if truncated.copied_padding is not None:
            return truncated.copied_padding.border(self.embedding, problem.mu_for_matrices.sqrt().flatten())
        return Border(self.embedding.grid, truncated.out_border + truncated.in_border, self.convolution.device)

    def _solve(
        self, f: Tensor, tolerance: Tensor | float, max_iter: int, start: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        # [f; 0] gives z = -r / sqrt(mu), r the first block; [0; g] gives x = second block / sqrt(mu)
        every, rows, residual = slice(None), self.problem.symbol.rows, self.side == "residual"
        block = slice(0, rows) if residual else slice(rows, None)
        t = self.inverse.block(every, block).on_grid(f)
        u, iterations = self._solve_border(-self.border.gather(t), tolerance, max_iter, start)
        z = self.inverse.block(block, every).on_grid(self.border.scatter(u)).add_(t[:, :, block])
        return z.div_(-self._root if residual else self._root), iterations, u
