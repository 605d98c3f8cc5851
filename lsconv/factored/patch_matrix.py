r"""The exact solve of a convolution whose outputs read disjoint patches: one small matrix per group.

Where no input is read by two outputs of a channel (1x1 kernels, kernels no larger than the stride, a kernel of the
input's size) A is, up to the order of its rows and columns, a block diagonal matrix with the same block
:math:`K \in C^{c_{out} \times c_{in} k}` for every output position, so that

.. math:: x_{patch} = (K^H K + \mathrm{damp}^2)^+ K^H\, y_{position}

and zero in the inputs that nothing reads. With zero padding an output may read a part of its patch, or nothing: the
positions that read the same taps share a block.

Golub and Van Loan, Matrix Computations, 4th ed., section 5.5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from lsconv.factored.direct_plan import WORK_ARRAYS, DirectPlan, Rank, inverse_values
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import broadcast_shapes, in_blocks, in_items
from lsconv.operators.convolution import Convolution
from lsconv.operators.dtypes import double
from lsconv.operators.padding_modes import MODES

__all__ = ["PatchPlan"]


@dataclass(frozen=True)
class _Run:
    """A run of outputs along one axis that read the same taps.

    Attributes:
        first_output: the first output.
        outputs: the number of outputs.
        first_tap: the first tap that they read.
        taps: the number of taps.
        first_cell: the input that the first output reads by the first tap.
    """

    first_output: int
    outputs: int
    first_tap: int
    taps: int
    first_cell: int


class PatchPlan(DirectPlan):
    """Setup of the solve patch by patch; :meth:`solve` answers right-hand sides.

    The arguments are those of :class:`~lsconv.factored.direct_plan.DirectPlan`, for a convolution that :meth:`serves`.

    Raises:
        PlanMemoryError: the factors would need more than ``allowed``.

    Example:
        >>> A = lsconv.Conv2d(torch.randn(8, 3, 4, 4), in_size=(32, 32), stride=4)
        >>> plan = PatchPlan(A, rcond=1e-7, rtol=1e-6)
        >>> bool(plan.solve(torch.randn(5, *A.out_shape)).converged.all())
        True
    """

    A: Convolution
    reason = "the outputs read disjoint patches, or all of the input at once: one small matrix per group"
    _factors_name = "the matrix of the patches"

    def _bytes(self) -> int:
        return self.bytes_for(self.A, tuple(self.damp.shape))

    def _factorise(self) -> None:
        """Decompose the matrix of every kind of patch: whole ones, and those that the edges cut."""
        A = self.A
        self._batch = tuple(broadcast_shapes(A.batch_shape, self.damp.shape))
        self._stride, self._dilation = A.stride, A.dilation
        runs = [_runs(A, a) for a in range(A.ndim)]
        self._parts = [part for part in product(*runs) if all(run.taps for run in part)]
        kernel = A.weight.detach().to(double(A.dtype))
        kernel = kernel.unflatten(-A.ndim - 2, (A.groups, -1))  # *batch, groups, outputs, inputs, *taps
        self._factors: list[tuple[Tensor, Tensor, Tensor]] = []
        found: dict[tuple[tuple[int, int], ...], int] = {}
        self._factor_of: list[int] = []
        for part in self._parts:
            taps = tuple((run.first_tap, run.taps) for run in part)
            if taps not in found:
                block = kernel
                for a, (tap, count) in enumerate(taps, start=-A.ndim):
                    block = block.narrow(a, tap, count)
                found[taps] = len(self._factors)
                self._factors.append(torch.linalg.svd(block.flatten(-A.ndim - 1), full_matrices=False))
            self._factor_of.append(found[taps])
        self._decide()

    def _decide(self) -> None:
        """The rank, of all positions together, and the values that are kept."""
        A = self.A
        batch = A.batch_shape
        spectra = [values for _, values, _ in self._factors]
        size = max(A.c_out // A.groups, A.c_in // A.groups * math.prod(A.kernel_size))
        together = torch.cat([v.flatten(-2) for v in spectra], -1) if spectra else self.damp.new_zeros(*batch, 0)
        decided = Rank.of(together, 1, self.rcond, size)
        self.undecided, self.norm = decided.undecided, decided.largest
        self.rank = torch.zeros(batch, dtype=torch.int64, device=A.device)
        sizes = [v.shape[-1] * v.shape[-2] for v in spectra]
        values, kept = decided.values.split(sizes, -1), decided.kept.split(sizes, -1)
        self._values = [v.unflatten(-1, s.shape[-2:]) for v, s in zip(values, spectra, strict=True)]
        self._kept = [k.unflatten(-1, s.shape[-2:]) for k, s in zip(kept, spectra, strict=True)]
        for part, index in zip(self._parts, self._factor_of, strict=True):
            self.rank = self.rank + kept[index].sum(-1) * math.prod(run.outputs for run in part)

    @staticmethod
    def serves(A: LinearOperator) -> bool:
        """Tell whether the outputs of A read disjoint patches."""
        if not isinstance(A, Convolution) or (not MODES[A.padding_mode].zero and any(map(any, A.padding))):
            return False
        for stride, dilation, taps, outputs in zip(A.stride, A.dilation, A.kernel_size, A.spatial_out, strict=True):
            common = math.gcd(stride, dilation)
            # the nearest two taps and outputs that meet in one cell are so far apart
            if stride // common < taps and dilation // common < outputs:
                return False
        # an interior and a border on both sides
        return math.prod(len(_runs(A, a)) for a in range(A.ndim)) <= 3**A.ndim

    @staticmethod
    def bytes_for(A: Convolution, damp_shape: tuple[int, ...] = ()) -> int:
        """Bytes that the factors take."""
        itemsize = 16 if A.dtype.is_complex else 8
        parts = math.prod(len(_runs(A, a)) for a in range(A.ndim))
        systems = math.prod(broadcast_shapes(A.batch_shape, damp_shape))
        return (
            WORK_ARRAYS * itemsize * parts * systems * A.weight.shape[-A.ndim - 1] * A.c_out * math.prod(A.kernel_size)
        )

    # ------------------------------------------------------------------ the maps

    def _bases(self, index: int) -> tuple[Tensor, Tensor]:
        """Left and right singular vectors, one set per block."""
        U, _, Vh = self._factors[index]
        left, right = (M.expand(*self._batch, *M.shape[-3:]).flatten(0, -3) for M in (U, Vh.mH))
        return left, right

    def _filter(self, index: int, power: int) -> Tensor:
        """The filtered singular values per block, as a column."""
        mu = self.damp.square().reshape(*self.damp.shape, 1, 1)
        weight = inverse_values(self._values[index], self._kept[index], mu, power)
        return weight.expand(*self._batch, *weight.shape[-2:]).flatten(0, -2).unsqueeze(-1)

    # The bases are applied one after the other, because their product would lose small singular values in rounding.

    def _inverse(self, y: Tensor) -> Tensor:
        y, batch = self._blocks(y, self.A.out_shape)
        x = y.new_zeros(*y.shape[:2], self.A.in_shape[0] // self._groups, *self.A.in_shape[1:])
        for part, index in zip(self._parts, self._factor_of, strict=True):
            U, V = self._bases(index)
            patches, columns = self._patches(x, part), _columns(self._positions(y, part), len(part))
            patches.copy_((V @ ((U.mH @ columns) * self._filter(index, 1))).reshape(patches.shape))
        return in_items(x, batch, self.A.in_shape, self._batch)

    def _inverse_adjoint(self, v: Tensor) -> Tensor:
        v, batch = self._blocks(v, self.A.in_shape)
        y = v.new_zeros(*v.shape[:2], self.A.out_shape[0] // self._groups, *self.A.out_shape[1:])
        for part, index in zip(self._parts, self._factor_of, strict=True):
            U, V = self._bases(index)
            positions, columns = self._positions(y, part), _columns(self._patches(v, part), len(part))
            positions.copy_((U @ ((V.mH @ columns) * self._filter(index, 1))).reshape(positions.shape))
        return in_items(y, batch, self.A.out_shape, self._batch)

    def _normal(self, g: Tensor) -> Tensor:
        """``(A^H A + damp^2)^+ g`` for ``g`` of shape ``(*batch, *in_shape)``."""
        g, batch = self._blocks(g, self.A.in_shape)
        mu = self.damp.square().expand(self._batch).reshape(-1, 1).expand(-1, self._groups)
        mu = mu.reshape(-1, *(1 for _ in self.A.in_shape))
        # on inputs that no output reads, and on the null space of K, the inverse is 1 / damp^2
        unseen = torch.where(mu > 0, 1 / torch.where(mu > 0, mu, 1.0), 0.0)
        x = g * unseen
        for part, index in zip(self._parts, self._factor_of, strict=True):
            _, V = self._bases(index)
            patches, columns = self._patches(x, part), _columns(self._patches(g, part), len(part))
            seen = V.mH @ columns
            inside = V @ (seen * self._filter(index, 0))
            patches.copy_((inside + (columns - V @ seen) * unseen.reshape(-1, 1, 1)).reshape(patches.shape))
        return in_items(x, batch, self.A.in_shape, self._batch)

    # ------------------------------------------------------------------ tensors as columns

    @property
    def _groups(self) -> int:
        return self.A.groups

    def _blocks(self, tensor: Tensor, item: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
        """``(*batch, *item)`` as ``(items, blocks, channels of a group, *spatial)``."""
        tensor, batch = in_blocks(tensor, len(item), self._batch)
        blocks = math.prod(self._batch) * self._groups
        return tensor.reshape(math.prod(batch) // math.prod(self._batch), blocks, -1, *item[1:]), batch

    def _positions(self, y: Tensor, part: tuple[_Run, ...]) -> Tensor:
        """The outputs of a part, as a view ``(blocks, channels, items, *outputs)``."""
        for a, run in enumerate(part, start=-len(part)):
            y = y.narrow(a, run.first_output, run.outputs)
        return y.permute(1, 2, 0, *range(3, y.ndim))

    def _patches(self, x: Tensor, part: tuple[_Run, ...]) -> Tensor:
        """The inputs that a part reads, as a view ``(blocks, channels, *taps, items, *outputs)``."""
        for a, (run, stride, dilation) in enumerate(zip(part, self._stride, self._dilation, strict=True), start=3):
            extent = dilation * (run.taps - 1) + 1
            x = x.narrow(a, run.first_cell, stride * (run.outputs - 1) + extent)
            x = x.unfold(a, extent, stride)[..., ::dilation]
        ndim = len(part)
        return x.permute(1, 2, *range(3 + ndim, 3 + 2 * ndim), 0, *range(3, 3 + ndim))


def _columns(view: Tensor, ndim: int) -> Tensor:
    """A view ``(blocks, *rows, items, *outputs)`` as matrices."""
    return view.flatten(-1 - ndim).flatten(1, -2)


def _runs(A: Convolution, a: int) -> list[_Run]:
    """The outputs of one axis, in runs that read the same taps."""
    stride, dilation, taps, cells = A.stride[a], A.dilation[a], A.kernel_size[a], A.spatial_in[a]
    left = A.padding[a][0]
    first = stride * torch.arange(A.spatial_out[a]) - left
    begin = (-(first // dilation)).clamp(0, taps)  # the first tap whose cell is not negative
    end = ((cells - 1 - first) // dilation + 1).clamp(0, taps)
    end = torch.maximum(begin, end)
    _, counts = torch.stack([begin, end]).unique_consecutive(dim=1, return_counts=True)
    runs, output = [], 0
    for outputs in counts.tolist():
        tap = int(begin[output])
        cell = int(first[output]) + dilation * tap
        runs.append(_Run(output, outputs, tap, int(end[output]) - tap, cell))
        output += outputs
    return runs
