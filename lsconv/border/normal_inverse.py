r"""The exact inverse of a truncated block-circulant operator, through its border.

With :math:`A = R_{out} C R_{in}^T` (see :mod:`lsconv.fourier.embedding`) and :math:`\mu = damp^2` the normal operators
of A are principal submatrices, or low-rank changes, of block-circulant ones:

.. math::
    AA^H + \mu  &= (CC^H + \mu)_{II}              && \text{no input cell is cropped ("valid")} \\
    A^HA + \mu  &= (C^HC + \mu) - C_B^H C_B        && \text{the same, solved for x; B the cropped outputs} \\
    A^HA + \mu  &= (C^HC + \mu)_{II}              && \text{no output cell is cropped ("full")} \\
    AA^H + \mu  &= (CC^H + \mu) - C_B C_B^H        && \text{the same, solved for z} \\
    \begin{pmatrix} -\sqrt\mu & A \\ A^H & \sqrt\mu \end{pmatrix}
                &= \begin{pmatrix} -\sqrt\mu & C \\ C^H & \sqrt\mu \end{pmatrix}_{II} && \text{both ("mixed")}

With P the inverse of the block-circulant operator (one small matrix per frequency), the inverse of a principal
submatrix is :math:`P_{II} - P_{IB} (P_{BB})^{-1} P_{BI}`, and that of a low-rank change follows from the Woodbury
identity with the
capacitance matrix :math:`I - C_B P C_B^H`. Either way what remains to be solved is a system on the border, whose size
does not grow with the area and whose iteration count hardly grows at all.

Where the input is padded by reflected or replicated cells, the copies are further unknowns, held to what they copy by
multipliers: the mixed form, with a border of its own (:mod:`lsconv.border.reflected_padding`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lsconv.border.border_set import Border
from lsconv.border.direct.direct_pass import DirectInverse
from lsconv.border.factor_choice import cheapest_grid, whole_cost
from lsconv.border.free_memory import allowed_bytes, free_bytes
from lsconv.border.gram import gram, largest_eigenvalue, product, shifted
from lsconv.border.penalty import Penalty
from lsconv.border.reflected_padding import Mirror
from lsconv.border.saddle import saddle_inverse
from lsconv.border.strongest_wave import StrongestWave
from lsconv.border.system.border_system import BorderSystem
from lsconv.border.system.cost_model import Effort
from lsconv.border.system.schwarz import Schwarz
from lsconv.border.truncated_circulant import Embedded, embedded
from lsconv.fourier.symbol import FrequencyMatrices, frobenius, hermitian_inverse
from lsconv.operators.convolution import Convolution

__all__ = ["NormalInverse"]

# A floor of the stacked operator that is rounding.
_NEGLIGIBLE = 1e-12
# The floor where the normal operator of the side is singular at every frequency: its inverse is 1 / mu there, next to
# which the digits of all else are lost (cond(A) = 3 and 5, float64: with 1e-10 no digit of x, with 1e-8 all of them).
_DEFICIENT_FLOOR = 1e-7
# The floor of the factors in double precision that take the place of the iteration, by whether every item is damped; of
# a penalty the same as of a damping.
_DIRECT_FLOOR = {True: 1e-15, False: 1e-10}
# The condition, by definiteness, up to which factors in double precision have digits to spare: damp^-2 or damp^-1.
_CONDITION = {True: 2.5e9, False: 1e6}
# Factors that cost no more than so many iterations are made before any iteration.
AT_ONCE = 8
# Bytes of the work arrays of right-hand sides solved for together, on a CPU: larger ones (glibc: above 32 MiB) are
# mapped and unmapped page by page on every use.
_WORK_BYTES = 2**25
# Work arrays of a right-hand side that there are at a time.
_WORK_ARRAYS = 6


class NormalInverse:
    r"""The inverse of a normal operator of A, regularised by ``mu``, to the accuracy of its border iteration.

    ``side == "residual"``: :math:`f \mapsto (AA^H + \mu)^{-1} f` on outputs, for A with at least as many columns per
    frequency as rows. ``side == "solution"``: :math:`g \mapsto (A^HA + \mu)^{-1} g` on inputs, for the others.

    Args:
        convolution: the operator, in the dtype to compute in.
        damp: number, or tensor whose shape is (broadcastable to) a batch shape: one damp per batch item.
        floor: relative to the largest singular value squared, the least mu: below it the factors would be singular.
        side: None chooses by the numbers of rows and columns.
        penalty: further rows ``damp L`` below A; then "solution" is the side.
        mirror: that of ``convolution``, whose padding is not zeros; then "solution" is the side, and damp > 0.
        crossings: precondition also the crossings of the border's slabs.
        spare_bytes: what wider crossings, or the factors of the whole border, may take where a solve is slow; None:
            60 % of what is free then.
        direct: factorise the border, on the shortest grid, instead of iterating on it.

    Attributes:
        direct: the factors that have taken the place of the iteration, where they have.
    """

    def __init__(
        self,
        convolution: Convolution,
        damp: Tensor | float = 0.0,
        *,
        floor: float,
        side: str | None = None,
        crossings: bool = True,
        penalty: Penalty | None = None,
        mirror: Mirror | None = None,
        spare_bytes: int | None = None,
        direct: bool = False,
    ) -> None:
        damp = torch.as_tensor(damp, dtype=torch.float64, device=convolution.device)
        self.direct: NormalInverse | DirectInverse | None = None
        self.mirror = mirror
        what = embedded(convolution, tuple(damp.shape), penalty, mirror, shortest=direct)
        self.convolution, self.embedding, self.form = what.convolution, what.embedding, what.form
        embedding, S = what.embedding, what.symbol
        rows, columns = S.rows, S.columns
        self._rows, self._columns, self._rank_deficient = rows, columns, False
        self._smaller = "residual" if rows <= columns else "solution"
        stacked = penalty is not None or mirror is not None
        self.side = "solution" if stacked else side or self._choose_side(rows, columns)
        squared = gram(S.matrices, self._smaller)
        self.scale = largest_eigenvalue(squared, len(embedding.grid))  # blocks
        wanted = embedding.per_block(damp) ** 2
        if rows != columns and self.side != self._smaller:
            floor = max(floor, _DEFICIENT_FLOOR)
        self.mu = torch.maximum(wanted, floor * self.scale.to(wanted))
        groups = self.scale.expand(embedding.blocks).reshape(*embedding.batch_shape, embedding.groups)
        # an upper bound of ||A|| per batch item
        self.norm_bound = groups.amax(-1).double().sqrt()
        if mirror is not None:
            self.norm_bound = torch.minimum(mirror.gain * self.norm_bound, mirror.bound)
        self._wanted, self._strongest = wanted, StrongestWave.of(S, squared)
        # the least damping of the factors, relative to the largest singular value
        self.relative_damp = float((self.mu / self.scale.to(self.mu)).amin().sqrt())
        # whether that is the damping of A, and not a floor under a penalty
        self.damped = penalty is None and self.relative_damp > 0
        self._exact = bool((self.mu == wanted).all()) or (penalty is not None and floor <= _NEGLIGIBLE)
        mu = self.mu.to(squared.real.dtype).reshape(-1, *(1 for _ in range(len(embedding.grid) + 2)))
        # shaped to divide (rest, blocks, channels, *grid)
        self.root = self.mu.sqrt().to(squared.real.dtype).reshape(1, -1, *(1 for _ in range(len(embedding.grid) + 1)))
        self.outer: FrequencyMatrices | None = None
        self.border: Border  # and system: absent on a circulant, which has no border
        if self.form == "mixed":
            self._mixed(what, squared, mu)
        else:
            self._definite(what, squared, mu)
        if self.form == "circulant":
            return
        definite = self.form != "mixed"
        effort = Effort(
            embedding.blocks,
            math.prod(embedding.grid),
            self.system.rows,
            definite=definite,
        )
        # the factors that may take the place of the iteration, and what they cost
        self._factors: Callable[[], NormalInverse | DirectInverse]
        # of a penalty it is that of the wanted operator, which does not show in the floor
        scale = float(self.scale.amax()) if definite else float(self.scale.amax()) ** 0.5
        precise = penalty is not None or float(frobenius(self.inverse.matrices).amax()) * scale <= _CONDITION[definite]
        if mirror is None and precise and not direct and DirectInverse.serves(what.convolution):
            condition = max(self.relative_damp, 1e-3) ** (-2 if definite else -1)
            shortest, cost = cheapest_grid(what, self.system, penalty, effort, condition)
            least = _DIRECT_FLOOR[penalty is not None or bool((damp > 0).all())]
            self._factors = functools.partial(
                DirectInverse,
                convolution,
                damp,
                floor=least,
                side=self.side,
                penalty=penalty,
                shortest=shortest,
            )
        else:
            onto = None if stacked else what.convolution
            cost = whole_cost(embedding, self.form, onto, self.border)
            self._factors = functools.partial(
                NormalInverse,
                convolution,
                damp,
                floor=floor,
                side=self.side,
                penalty=penalty,
                mirror=mirror,
                spare_bytes=spare_bytes,
                direct=True,
            )
        self._effort, self._cost, self._spare_bytes = effort, cost, spare_bytes
        self._system = functools.partial(
            BorderSystem,
            self.system,
            self.border,
            effort,
            crossings=crossings,
            restricted=crossings and (self.exact or not definite),
            spare_bytes=spare_bytes,
            direct=direct,
            cost=cost,
        )

    def strongest(self) -> Tensor:
        """Inputs that A makes longest, nearly: the wave of the largest singular value, ``(*batch, *in_shape)``."""
        return self._strongest.inputs(self.embedding, real=not self.convolution.is_complex)

    @functools.cached_property
    def on_border(self) -> BorderSystem:
        """The system on the border; absent on a circulant."""
        return self._system()

    @property
    def shift(self) -> Tensor:
        """The shift of the normal operator, per block."""
        return self.direct.mu if isinstance(self.direct, DirectInverse) else self.mu

    @property
    def exact(self) -> bool:
        """Whether the factors are those of the wanted operator, up to rounding."""
        return self._exact or (isinstance(self.direct, DirectInverse) and self.direct.exact)

    @property
    def schwarz(self) -> Schwarz:
        """The preconditioner of the border system."""
        return self.on_border.schwarz

    def _choose_side(self, rows: int, columns: int) -> str:
        embedding = self.embedding
        wide = math.prod(embedding.out_shape) <= math.prod(embedding.in_shape) and rows <= columns
        square = rows == columns and math.prod(embedding.out_shape) == math.prod(embedding.in_shape)
        if wide and self.form == "mixed" and square:
            # z of the saddle form is -r / sqrt(mu), whose digits cancel where A is nearly singular; a square A has no
            # null space from which x would have to be kept away
            return "solution"
        return "residual" if wide else "solution"

    def _definite(self, what: Embedded, squared: Tensor, mu: Tensor) -> None:
        S = what.symbol
        factor = S if self.side == "residual" else S.H  # the normal operator is factor factor^H + mu
        if self.side != self._smaller:
            squared = gram(S.matrices, self.side)
        inverse = hermitian_inverse(shifted(squared, mu).contiguous())
        if self.side == self._smaller:
            self._note_rank(inverse)
        self.inverse = FrequencyMatrices(S.grid, inverse)
        if self.form == "circulant":
            return
        positions = what.out_border if self.form == "valid" else what.in_border
        self.border = Border(self.embedding.grid, positions, self.convolution.device)
        if (self.form == "valid") == (self.side == "residual"):
            self.system = self.inverse
            return
        # capacitance: I - E P E^H with E = factor^H, the map from the solved side to the border's
        self.outer = factor.H
        E = self.outer.matrices
        capacitance = product(product(E, self.inverse.matrices), E.mH).neg_()
        capacitance.diagonal(dim1=-2, dim2=-1).add_(1)
        self.system = FrequencyMatrices(S.grid, capacitance)

    def _mixed(self, what: Embedded, squared: Tensor, mu: Tensor) -> None:
        S = what.symbol
        saddle, smaller = saddle_inverse(S.matrices, squared, mu)
        self._note_rank(smaller)
        self.inverse = self.system = FrequencyMatrices(S.grid, saddle)
        if self.mirror is None:
            self.border = Border(self.embedding.grid, what.out_border + what.in_border, self.convolution.device)
        else:
            self.border = self.mirror.border(self.embedding, mu.sqrt().flatten())

    def nullity(self) -> str:
        """Why, without damping, A or its adjoint has a null space by its structure; empty if it has none."""
        embedding = self.embedding
        excess = self._rows - self._columns
        axes = sum(axis.grid > 1 and (bool(axis.border_out()) or bool(axis.border_in(0))) for axis in embedding.axes)
        m, n = math.prod(embedding.out_shape), math.prod(embedding.in_shape)
        # a generic (c + e) x c matrix polynomial in d variables loses rank somewhere when e < d
        if self.form == "valid" and excess > 0 and (excess < axes or m <= n):
            return f"A has {self._rows} rows and {self._columns} columns per frequency and therefore a null space"
        if self.form == "full" and excess < 0 and (-excess < axes or n <= m):
            return (
                f"A has {self._rows} rows and {self._columns} columns per frequency, its adjoint therefore a null space"
            )
        if self.side == "solution" and m < n:
            return (
                "A has fewer outputs than inputs, but more rows than columns per frequency, and therefore a null space"
            )
        if self._rank_deficient:
            return "the symbol of A is rank-deficient at most frequencies"
        return ""

    def _note_rank(self, inverse: Tensor) -> None:
        """Whether the smaller Gram matrix is singular at most frequencies, up to mu."""
        mu = self.mu.to(inverse.real.dtype).reshape(-1, *(1 for _ in range(inverse.ndim - 3)))
        share = (mu * frobenius(inverse)).flatten(1).median(-1).values
        self._rank_deficient = bool(((share > 0.1) & (self.mu > self._wanted)).any())

    # ------------------------------------------------------------------ use

    def __call__(self, f: Tensor, tolerance: Tensor | float, max_iter: int = 1000) -> tuple[Tensor, Tensor]:
        """The inverse applied to ``f`` (outputs or inputs by ``side``), and the border iterations per batch item."""
        z, iterations, _ = self.continued(f, tolerance, max_iter)
        return z, iterations

    def continued(
        self, f: Tensor, tolerance: Tensor | float, max_iter: int = 1000, start: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As calling it, from the border unknowns ``start`` of an earlier call; returns also those of this one."""
        if self.direct is not None:
            return self.direct.continued(f, tolerance, max_iter, start)
        embedding = self.embedding
        residual = self.side == "residual"
        if start is not None and self.form != "circulant" and start.shape[-1] != self.border.size:
            start = None  # the unknowns of another grid
        item_ndim = embedding.ndim + 1
        batch, _ = embedding.rest(tuple(f.shape[: f.ndim - item_ndim]))
        if self.mirror is None:
            t = embedding.outputs_to_grid(f) if residual else embedding.inputs_to_grid(f)
        else:
            t = embedding.inputs_to_grid(self.mirror.padded(f))
        solve = self._saddle_solve if self.form == "mixed" else self._definite_solve
        many = self._at_once(t)
        if many < t.shape[0] and isinstance(tolerance, float):
            starts: Sequence[Tensor | None] = [None] * t.shape[0]
            if start is not None:
                starts = start.split(many)
            found = [solve(part, tolerance, max_iter, u) for part, u in zip(t.split(many), starts, strict=False)]
            z, iterations = torch.cat([part[0] for part in found]), torch.cat([part[1] for part in found])
            u = None if self.form == "circulant" else torch.cat([part[2] for part in found if part[2] is not None])
        else:
            z, iterations, u = solve(t, tolerance, max_iter, start)
        if self.form != "circulant" and self.on_border.outgrown:
            self.go_direct()
            z, more, u = self.continued(f, tolerance, max_iter)
            return z, embedding.per_item(iterations, batch).amax(-1) + more, u
        z = embedding.outputs_from_grid(z, batch) if residual else embedding.inputs_from_grid(z, batch)
        z = z if self.mirror is None else self.mirror.cropped(z)
        return z, embedding.per_item(iterations, batch).amax(-1), u

    def go_direct(self) -> None:
        """Factorise the border, for good."""
        self.__dict__.pop("on_border", None)  # and what preconditions it
        self.direct = self._factors()

    def expect(self, batch: tuple[int, ...]) -> DirectInverse | None:
        """The factors for right-hand sides of this batch shape, which are made where they cost next to nothing."""
        if self.form != "circulant" and self.direct is None and "on_border" not in self.__dict__:
            _, rest = self.embedding.rest(batch)
            effort, cost = self._effort, self._cost
            cheap = effort.factors(cost) <= AT_ONCE * effort.iteration(rest)
            if cheap and effort.bytes(cost) <= allowed_bytes(self._spare_bytes, self.convolution.device):
                self.go_direct()
        return self.direct if isinstance(self.direct, DirectInverse) else None

    def iterate(self) -> None:
        """Do without factors, which have lost too many digits, for good."""
        self.direct = None
        self.on_border.refuse_factors()

    def _at_once(self, t: Tensor) -> int:
        """How many right-hand sides are solved for at once."""
        channels = max(self._rows, self._columns) if self.form != "mixed" else self._rows + self._columns
        one = self.embedding.blocks * channels * math.prod(self.embedding.grid) * t.element_size()
        vectors = 0 if self.form == "circulant" else self.on_border.work_vectors * self.border.size
        return _together(one, self.embedding.blocks * vectors * t.element_size(), t.device)

    def _definite_solve(
        self, f: Tensor, tolerance: Tensor | float, max_iter: int, start: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        grid = self.inverse.grid
        spectrum = grid.transform(f)
        t = self.inverse(spectrum)
        if self.form == "circulant":
            return grid.inverse(t), torch.zeros(f.shape[:2], dtype=torch.int64, device=f.device), None
        if self.outer is None:
            b = -self.border.gather(grid.inverse(t))
        else:
            b = self.border.gather(grid.inverse(self.outer(t)))
        u, iterations = self.on_border.solve(b, tolerance, max_iter, start)
        correction = grid.transform(self.border.scatter(u))
        if self.outer is not None:
            correction = self.outer.H(correction)
        return grid.inverse(self.inverse(spectrum + correction)), iterations, u

    def _saddle_solve(
        self, f: Tensor, tolerance: Tensor | float, max_iter: int, start: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        # [f; 0] gives z = -r / sqrt(mu), r the first block; [0; g] gives x = second block / sqrt(mu)
        every, residual = slice(None), self.side == "residual"
        own = slice(0, self._rows) if residual else slice(self._rows, None)
        t = self.inverse.block(every, own).on_grid(f)
        u, iterations = self.on_border.solve(-self.border.gather(t), tolerance, max_iter, start)
        z = self.inverse.block(own, every).on_grid(self.border.scatter(u)).add_(t[:, :, own])
        return z.div_(-self.root if residual else self.root), iterations, u

    def describe(self) -> str:
        """Grid, border, memory and precision, for the ``repr`` of a plan."""
        if self.direct is not None:
            return self.direct.describe()
        unknowns = 0 if self.form == "circulant" else self.border.size
        return (
            f"form={self.form!r}, side={self.side!r}, grid={self.embedding.grid}, border={unknowns} unknowns x "
            f"{self.embedding.blocks} block(s), factors={self.convolution.dtype} {self.nbytes / 2**20:.1f} MiB on "
            f"{self.convolution.device}"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the factors kept."""
        own = 0 if self.direct is None else self.direct.nbytes
        kept = {id(m): m.nbytes for m in (self.inverse, self.outer, getattr(self, "system", None)) if m is not None}
        return own + sum(kept.values()) + (self.on_border.nbytes if "on_border" in self.__dict__ else 0)


def _together(arrays: int, vectors: int, device: torch.device) -> int:
    """How many right-hand sides are solved for at once.

    On a CPU as many as have arrays that its allocator reuses, elsewhere as many as half of the free memory holds.

    Args:
        arrays: bytes of a work array of one of them.
        vectors: bytes of the border vectors that its iteration keeps.
        device: where they are.
    """
    if device.type == "cpu":
        return max(1, _WORK_BYTES // arrays)
    return max(1, free_bytes(device) // 2 // (_WORK_ARRAYS * arrays + vectors))
