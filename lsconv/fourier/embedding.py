r"""A convolution as a truncated block-circulant operator on a periodic grid.

Along every axis the input index is split into a phase and a position, ``u = s q + phi`` (``s`` the stride), so that a
strided convolution becomes a stride-1 convolution of ``s`` times as many channels, the polyphase channels,

.. math:: y[i] = \sum_{\phi,\tau} K_\phi[\tau]\, x_\phi[i + \tau].

On a periodic grid of ``N`` positions, so long that no output reads an input by wrapping around,

.. math:: A = R_{out}\, C\, R_{in}^T,

with C block-circulant; :math:`R_{out}` and :math:`R_{in}` restrict the grid to the outputs and inputs. Groups, and
kernels per batch item, are independent blocks of the same C.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from lsconv.errors import MethodError
from lsconv.operators.batch_layout import batch_order, broadcast_shapes, in_blocks, in_items
from lsconv.operators.convolution import Convolution
from lsconv.operators.fft_convolution import good_fft_length, short_fft_length
from lsconv.operators.padding_modes import MODES

__all__ = ["Axis", "BorderPositions", "Embedding"]

BorderPositions = list[list[list[int]]]  # per channel and axis; a cell with one of these coordinates is on the border


@dataclass(frozen=True)
class Axis:
    """One spatial axis of a convolution on a periodic grid of ``grid`` positions.

    Attributes:
        grid: number of grid positions, ``N``.
        stride: number of phases.
        n_in: number of inputs, all phases together.
        n_out: number of outputs; they are the grid positions ``0 .. n_out - 1``.
        taps: the (phase, tau) of every kernel tap.
        constrained: True when outputs read grid cells that are not inputs (zero padding): those cells must hold zeros.
    """

    grid: int
    stride: int
    n_in: int
    n_out: int
    taps: tuple[tuple[int, int], ...]
    constrained: bool

    def inputs(self, phase: int) -> int:
        """Number of inputs of one phase; they are the positions ``0 .. inputs(phase) - 1``."""
        return -(-(self.n_in - phase) // self.stride)

    def border_in(self, phase: int) -> list[int]:
        """The positions of one phase that hold a zero by constraint."""
        return list(range(self.inputs(phase), self.grid)) if self.constrained else []

    @functools.cached_property
    def border_out(self) -> list[int]:
        """The positions that are not outputs although they read an input."""
        if not self.constrained:
            return list(range(self.n_out, self.grid))
        return [
            i
            for i in range(self.n_out, self.grid)
            if any((i + tau) % self.grid < self.inputs(phase) for phase, tau in self.taps)
        ]


@functools.lru_cache(16)  # choosing a plan makes several embeddings of one convolution
def _axis(
    *,
    n_in: int,
    n_out: int,
    kernel_size: int,
    stride: int,
    dilation: int,
    left: int,
    periodic: bool,
    grid: int | None,
    constrained: bool,
    separate_margins: bool,
) -> Axis:
    """Make the axis of an embedding from numbers alone, which the cache can compare.

    Args:
        n_in: the number of inputs.
        n_out: the number of outputs.
        kernel_size: the number of taps.
        stride: the step between outputs.
        dilation: the step between taps.
        left: the padding on the left.
        periodic: the padding is circular; the grid is then the inputs.
        grid: the least length of the grid; None: chosen here.
        constrained: constrain the cells outside the inputs to zero even where no output reads them.
        separate_margins: without ``grid``, let the outputs at the two ends read different zeros.
    """
    taps = tuple(divmod(dilation * t - left, stride)[::-1] for t in range(kernel_size))
    if periodic:
        return Axis(n_in // stride, stride, n_in, n_out, taps, constrained=False)
    axis = Axis(1, stride, n_in, n_out, taps, constrained=False)
    before = max(-taps[0][1], 0)
    # Among the last ``stride`` taps is the farthest of every phase.
    after = max(max(n_out + tau - axis.inputs(phase) for phase, tau in taps[-stride:]), 0)
    # The outputs at both ends read the same zeros (N = n + p), because every further cell would enlarge the border.
    needed = max(axis.inputs(0) + max(before, after), n_out)
    if grid is not None:
        length = max(grid, needed)
    elif separate_margins:
        length = good_fft_length(max(axis.inputs(0) + before + after, n_out))
    else:
        length = short_fft_length(needed)
    return Axis(length, stride, n_in, n_out, taps, constrained=before > 0 or after > 0 or constrained)


@functools.lru_cache(16)
def _observed_inputs(axis: Axis) -> tuple[bool, ...] | None:
    """Mark the inputs of an axis that some output reads; None when all are read."""
    phase, tau = torch.tensor(axis.taps).mT
    first = tau % axis.grid
    # A tap reads a run of positions that may wrap around once; the sums over starts and ends of runs count the reads.
    ends = torch.zeros(axis.stride, 2 * axis.grid + 1, dtype=torch.int64)
    one = torch.ones_like(first)
    ends.index_put_((phase, first), one, accumulate=True)
    ends.index_put_((phase, first + axis.n_out), -one, accumulate=True)
    count = ends.cumsum(1)
    observed = (count[:, : axis.grid] + count[:, axis.grid : -1] > 0).mT.flatten()[: axis.n_in]
    return None if bool(observed.all()) else tuple(observed.tolist())


class Embedding:
    """The periodic grid of a convolution, and the transfer of tensors to and from it.

    On the grid a tensor has shape ``(rhs, blocks, channels, *grid)``: ``blocks`` are the independent symbols (kernels
    per batch item times groups) and ``rhs`` the remaining batch items.

    Args:
        convolution: the operator; padding mode "zeros" or "circular" (then the stride must divide every input size
            and the outputs must fit the grid).
        batch_shape: more batch dimensions whose items get blocks of their own (one damp per item), broadcast with the
            operator's.
        tapped_phases_only: leave out the phases that no tap reads, which occur where the stride exceeds the kernel;
            their inputs are zero in every least-norm answer.
        grid: grid sizes to use instead of the next good FFT lengths; raised where they are too small.
        constrained: per axis, constrain the grid cells outside the inputs to zero even where no output reads them.
        separate_margins: without ``grid``, make it so long (N = n + 2p) that the outputs at the two ends read different
            zeros; for uses of the block-circulant operator without a border.

    Raises:
        MethodError: the convolution is no truncated block-circulant operator.
    """

    def __init__(
        self,
        convolution: Convolution,
        grid: tuple[int, ...] | None = None,
        batch_shape: tuple[int, ...] = (),
        *,
        tapped_phases_only: bool = False,
        constrained: tuple[bool, ...] | None = None,
        separate_margins: bool = False,
    ) -> None:
        if not self.serves(convolution):
            raise MethodError(f"{convolution!r} is no truncated block-circulant operator")
        self.ndim = convolution.ndim
        self.axes = tuple(
            _axis(
                n_in=convolution.spatial_in[a],
                n_out=convolution.spatial_out[a],
                kernel_size=convolution.kernel_size[a],
                stride=convolution.stride[a],
                dilation=convolution.dilation[a],
                left=convolution.padding[a][0],
                periodic=MODES[convolution.padding_mode].periodic,
                grid=None if grid is None else grid[a],
                constrained=constrained is not None and constrained[a],
                separate_margins=separate_margins,
            )
            for a in range(self.ndim)
        )
        self.grid = tuple(axis.grid for axis in self.axes)
        self.stride = convolution.stride
        self.groups = convolution.groups
        self.kernel_size = convolution.kernel_size
        self.batch_shape = tuple(broadcast_shapes(convolution.batch_shape, batch_shape))
        self.blocks = math.prod(self.batch_shape) * self.groups
        self.in_shape, self.out_shape = convolution.in_shape, convolution.out_shape
        self.phases_by_axis = tuple(
            tuple(sorted({phase for phase, _ in axis.taps}) if tapped_phases_only else range(axis.stride))
            for axis in self.axes
        )
        self.phases = tuple(product(*self.phases_by_axis))
        self.in_channels = self.in_shape[0] // self.groups * len(self.phases)
        self.out_channels = self.out_shape[0] // self.groups

    @staticmethod
    def serves(convolution: Convolution) -> bool:
        """Tell whether the convolution is a truncated block-circulant operator."""
        mode = MODES[convolution.padding_mode]
        if not mode.periodic:
            return mode.zero or not any(map(any, convolution.padding))
        return all(
            n % s == 0 and m <= n // s
            for n, m, s in zip(convolution.spatial_in, convolution.spatial_out, convolution.stride, strict=True)
        )

    @property
    def is_circulant(self) -> bool:
        """True when nothing is cropped: the operator is the block-circulant operator itself."""
        return all(not axis.constrained and axis.n_out == axis.grid for axis in self.axes)

    @property
    def drops_phases(self) -> bool:
        """True where phases that no tap reads are left out."""
        return len(self.phases) < math.prod(self.stride)

    def observed_inputs(self) -> Tensor | None:
        """Mark the inputs that some output reads, in the spatial shape of the input; None when all are read.

        Some are not read where the stride exceeds the kernel or does not divide; x is zero there in least-norm answers.
        """
        by_axis = [_observed_inputs(axis) for axis in self.axes]
        if all(observed is None for observed in by_axis):
            return None
        mask = torch.ones((), dtype=torch.bool)
        for axis, observed in zip(self.axes, by_axis, strict=True):
            mask = mask.unsqueeze(-1) & torch.tensor(observed or (True,) * axis.n_in)
        return mask

    # ------------------------------------------------------------------ tensors

    def split_batch(self, batch: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
        """Return the batch dimensions broadcast with the operator's, and ``rhs``: the items that share each block."""
        full = tuple(broadcast_shapes(batch, self.batch_shape))
        shared, _ = batch_order(len(full), self.batch_shape)
        return full, math.prod(full[dim] for dim in shared)

    def inputs_to_grid(self, x: Tensor) -> Tensor:
        """``(*batch, *in_shape)`` to ``(rhs, blocks, in_channels, *grid)``, zero outside the inputs."""
        x = self._blocks(x, self.in_shape)
        pad = [size for axis in reversed(self.axes) for size in (0, axis.grid * axis.stride - axis.n_in)]
        x = torch.nn.functional.pad(x, pad)
        if all(s == 1 for s in self.stride):
            return x
        x = x.reshape(*x.shape[:3], *(size for axis in self.axes for size in (axis.grid, axis.stride)))
        for a, phases in enumerate(self.phases_by_axis):
            if len(phases) < self.stride[a]:
                x = x.index_select(4 + 2 * a, torch.tensor(phases, device=x.device))
        position_dims, phase_dims = range(3, 3 + 2 * self.ndim, 2), range(4, 4 + 2 * self.ndim, 2)
        return x.permute(0, 1, 2, *phase_dims, *position_dims).reshape(*x.shape[:2], self.in_channels, *self.grid)

    def inputs_from_grid(self, z: Tensor, batch: tuple[int, ...]) -> Tensor:
        """The inverse of :meth:`inputs_to_grid`, cropping to the inputs; ``batch`` is that of :meth:`split_batch`."""
        if any(s > 1 for s in self.stride):
            z = z.reshape(*z.shape[:2], -1, *map(len, self.phases_by_axis), *self.grid)
            for a, phases in enumerate(self.phases_by_axis):
                if len(phases) < self.stride[a]:
                    shape = list(z.shape)
                    shape[3 + a] = self.stride[a]
                    z = z.new_zeros(shape).index_copy(3 + a, torch.tensor(phases, device=z.device), z)
            order = [d for a in range(self.ndim) for d in (3 + self.ndim + a, 3 + a)]
            z = z.permute(0, 1, 2, *order)
            z = z.reshape(*z.shape[:3], *(axis.grid * axis.stride for axis in self.axes))
        for a, axis in enumerate(self.axes):
            z = z.narrow(3 + a, 0, axis.n_in)
        return in_items(z, batch, self.in_shape, self.batch_shape)

    def outputs_to_grid(self, y: Tensor) -> Tensor:
        """``(*batch, *out_shape)`` to ``(rhs, blocks, out_channels, *grid)``, zero outside the outputs."""
        y = self._blocks(y, self.out_shape)
        pad = [size for axis in reversed(self.axes) for size in (0, axis.grid - axis.n_out)]
        return torch.nn.functional.pad(y, pad)

    def outputs_from_grid(self, z: Tensor, batch: tuple[int, ...]) -> Tensor:
        """The inverse of :meth:`outputs_to_grid`, cropping to the outputs; ``batch`` is that of :meth:`split_batch`."""
        for a, axis in enumerate(self.axes):
            z = z.narrow(3 + a, 0, axis.n_out)
        return in_items(z, batch, self.out_shape, self.batch_shape)

    def _blocks(self, tensor: Tensor, item_shape: tuple[int, ...]) -> Tensor:
        """``(*batch, *item_shape)`` as ``(rhs, blocks, channels per group, *size)``."""
        tensor, batch = in_blocks(tensor, len(item_shape), self.batch_shape)
        _, rhs = self.split_batch(batch)
        return tensor.reshape(rhs, self.blocks, item_shape[0] // self.groups, *item_shape[1:])

    def per_item(self, values: Tensor, batch: tuple[int, ...]) -> Tensor:
        """Reorder values per right-hand side and block, ``(rhs, blocks)``, to ``(*batch, groups)``."""
        return in_items(values, batch, (self.groups,), self.batch_shape)

    def per_block(self, values: Tensor) -> Tensor:
        """Repeat values that broadcast with the batch dimensions, for the groups: one per block."""
        return values.expand(self.batch_shape).reshape(-1, 1).expand(-1, self.groups).reshape(-1)

    # ------------------------------------------------------------------ kernel and border

    def weight_blocks(self, weight: Tensor) -> Tensor:
        """``weight`` as ``(blocks, out_channels, in_channels/groups, *kernel_size)``; one block per group if shared."""
        batch = weight.shape[: weight.ndim - self.ndim - 2]
        weight = weight.expand(*(self.batch_shape if batch else ()), *weight.shape[len(batch) :])
        return weight.reshape(-1, self.out_channels, weight.shape[-self.ndim - 1], *self.kernel_size)

    def kernel_to_grid(self, weight: Tensor) -> Tensor:
        """``weight`` as the first block column of C: ``(blocks, out_channels, in_channels, *grid)``.

        A weight without batch dimensions gives one block per group, whatever ``batch_shape`` is.

        The entry at position ``tau`` (modulo the grid) multiplies ``x[i + tau]`` in ``y[i]``.
        """
        k = self.weight_blocks(weight)
        for a, axis in enumerate(self.axes):
            index = torch.tensor([phase * axis.grid + tau % axis.grid for phase, tau in axis.taps], device=k.device)
            shape = list(k.shape)
            shape[3 + a] = axis.stride * axis.grid
            k = k.new_zeros(shape).index_add(3 + a, index, k)
        if all(s == 1 for s in self.stride):
            return k
        k = k.reshape(*k.shape[:3], *(size for axis in self.axes for size in (axis.stride, axis.grid)))
        for a, phases in enumerate(self.phases_by_axis):
            if len(phases) < self.stride[a]:
                k = k.index_select(3 + 2 * a, torch.tensor(phases, device=k.device))
        phase_dims, position_dims = range(3, 3 + 2 * self.ndim, 2), range(4, 4 + 2 * self.ndim, 2)
        return k.permute(0, 1, 2, *phase_dims, *position_dims).reshape(
            -1, self.out_channels, self.in_channels, *self.grid
        )

    def output_border(self) -> BorderPositions:
        """Border positions per output channel and axis."""
        positions = [axis.border_out for axis in self.axes]
        return [positions for _ in range(self.out_channels)]

    def input_border(self) -> BorderPositions:
        """Border positions per polyphase input channel and axis."""
        per_phase = [[axis.border_in(phase) for axis, phase in zip(self.axes, p, strict=True)] for p in self.phases]
        return per_phase * (self.in_channels // len(self.phases))
