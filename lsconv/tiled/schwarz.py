r"""An additive Schwarz preconditioner: the field in overlapping tiles, each solved with its own mean kernel.

.. math:: M^{-1} = \sum_t R_t^T \Phi_t\, (m_t A_t^H A_t + \mu_t L^H L)^{-1}\, \Phi_t R_t, \qquad
          \sum_t R_t^T \Phi_t^2 R_t = I

:math:`R_t` takes tile t out of the field, :math:`\Phi_t` is the root of a smooth partition of unity, :math:`A_t` the
convolution with the mean kernel of the tile, :math:`m_t` the mean weight of the data there. The square root keeps the
sum Hermitian, as conjugate gradients require. A tile that touches the edge of the field is solved exactly, through its
border; one inside is solved as a periodic field, whose error is along the edges of the tile, where the window is small.

Where the kernel varies within a tile, the zeros of the transfer function :math:`\hat h` vary too, and near a zero of
the mean :math:`\hat h_t` the inverse would be much too large for the kernels beside it. So the damping of a tile is
raised until the normal operator of the tile is no smaller than the variance of :math:`\hat h` within it:

.. math:: \mu_t |\hat L|^2 \ge \mathrm{Var}_t \hat h - |\hat h_t|^2 .

Dryja and Widlund, "An additive variant of the Schwarz alternating method" (1987); Nagy and O'Leary, "Restoring images
degraded by spatially variant blur", SIAM J. Sci. Comput. 19 (1998), for local kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lsconv.border.normal_inverse import NormalInverse, normal_inverse
from lsconv.border.normal_problem import Request, least_shift, needs_double
from lsconv.border.penalty import Filter, Penalty, as_convolutions
from lsconv.errors import MethodError
from lsconv.operators.base import LinearOperator
from lsconv.operators.convolution import Convolution
from lsconv.operators.dtypes import double
from lsconv.operators.fft_convolution import transform_cost
from lsconv.operators.padding import pad, pad_adjoint
from lsconv.operators.padding_modes import MODES
from lsconv.operators.varying_convolution import VaryingConvolution
from lsconv.operators.windows import add_windows, read_windows
from lsconv.tiled.layout import TileLayout, candidates
from lsconv.tiled.local_kernels import LocalKernels

__all__ = ["SchwarzInverse"]


class SchwarzInverse:
    """The preconditioner for ``A^H W A + damp^2 L^H L``.

    Args:
        A: the operator.
        damp: the damping, > 0, a number or one per batch item.
        L: the penalty; None: the identity.
        weights: W, ``(*batch, *out_shape)``, averaged over the batch and over each tile; None: ones.
        core: cells of a tile's core, per axis; None: the size with the least estimated work.
        refuse_if_slower: refuse where LSMR is estimated to take less time.

    Raises:
        MethodError: L is not made of convolutions, or shares no grid with A; or the tiles would not pay.
    """

    @torch.no_grad()
    def __init__(
        self,
        A: VaryingConvolution,
        damp: Tensor,
        L: LinearOperator | None = None,
        weights: Tensor | None = None,
        core: Sequence[int] | None = None,
        *,
        refuse_if_slower: bool = False,
    ) -> None:
        self.A, self.damp, self.L = A, damp, L
        self.terms = [] if L is None else _terms(A, L)
        wraps = MODES[A.padding_mode].periodic and any(map(any, A.padding))
        lengths = candidates(A.spatial_in, A.kernel_size) if core is None else [core]
        layouts = [TileLayout.of(A.spatial_in, A.kernel_size, cells, wraps=wraps) for cells in lengths]
        by_layout = [LocalKernels(A, layout, damp, weights, self.terms) for layout in layouts]
        self.local = min(by_layout, key=self._estimate)
        self.layout = self.local.layout
        if refuse_if_slower and L is None and self._estimate(self.local) > self._estimate_of_lsmr():
            raise MethodError("A: LSMR should take less time than tiles for this damp; method='border' insists on them")
        self.groups = self._groups()

    # ------------------------------------------------------------------ what it costs

    def _estimate(self, local: LocalKernels) -> float:
        """Estimate the work of a solve with its setup, in transforms."""
        layout, A = local.layout, self.A
        inside, edge = layout.counts
        valid = MODES[A.padding_mode].zero and not any(map(any, A.padding))
        # Padded tiles are solved in their saddle-point form, of twice the unknowns and indefinite.
        tiles = edge * transform_cost(layout.size(False)) * (10 if valid else 60)
        setup = 18 * tiles
        tiles += 5 * inside * transform_cost(layout.size(True))
        return setup + local.iterations * (tiles + A.work)

    def _estimate_of_lsmr(self) -> float:
        """Estimate the transforms of a solve by LSMR; the iterations grow nearly in proportion to ``||A|| / damp``."""
        local = self.local
        largest = local.norm * float(local.weights.amax()) ** 0.5
        return (6.5 + 4.2 * (largest / float(self.damp.amin())) ** 0.85) * self.A.work

    # ------------------------------------------------------------------ the inverse

    def __call__(self, g: Tensor, tolerance: float) -> Tensor:
        """Apply the preconditioner to ``g``, ``(*batch, *in_shape)``, the borders of tiles solved to ``tolerance``."""
        A = self.A
        margins = [(axis.margin, axis.margin) for axis in self.layout.axes]
        x = pad(g, margins, "circular")
        field = x.shape[-A.ndim :]
        x = x.unsqueeze(-A.ndim - 1) if A.shared else x
        z = torch.zeros_like(x)
        for group in self.groups:
            parts = read_windows(x, group.starts, group.windows.shape[-A.ndim :]) * group.windows
            found = group.inverse(parts.to(group.inverse.convolution.dtype), tolerance)[0].to(x.dtype)
            z = z + add_windows(found * group.windows * group.scale, group.starts, field)
        return pad_adjoint(z.squeeze(-A.ndim - 1) if A.shared else z, margins, "circular")

    # ------------------------------------------------------------------ the tiles

    def _groups(self) -> list[_Group]:
        """Group the tiles by the edges of the field that they touch, and invert each group as one batch."""
        layout, A, local = self.layout, self.A, self.local
        kinds: dict[Any, list[int]] = {}
        for t, tile in enumerate(layout.tiles):
            kinds.setdefault(self._padding(tile), []).append(t)
        groups = []
        for padding, chosen in kinds.items():
            periodic, tiles = padding is None, [layout.tiles[t] for t in chosen]
            starts = torch.tensor([layout.start(tile, periodic) for tile in tiles])
            windows = torch.stack([layout.window(tile, periodic) for tile in tiles]).unsqueeze(1)
            kernels = torch.tensordot(local.coefficients[chosen].to(A.dtype), A.kernels.detach(), 1)
            kernels = kernels[:, None, None] if A.shared else kernels
            scale = local.weights[chosen].reciprocal().reshape(-1, *(1,) * (A.ndim + 1))
            inverse = self._inverse(kernels, padding, local.damp[..., chosen])
            windows, scale = (t.to(A.device, A.dtype) for t in (windows, scale))
            groups.append(_Group(starts.to(A.device), windows, scale, inverse))
        return groups

    def _padding(self, tile: tuple[int, ...]) -> tuple[tuple[int, int], ...] | None:
        """The padding of a tile: that of A where it touches an edge, else none; None for a tile solved as periodic."""
        if self.layout.is_inside(tile):
            return None
        found = []
        for axis, i, (left, right) in zip(self.layout.axes, tile, self.A.padding, strict=True):
            start = axis.start(i, False)
            found.append((left if start == 0 else 0, right if start + axis.size(False) == axis.cells else 0))
        return tuple(found)

    def _inverse(self, kernels: Tensor, padding: tuple[tuple[int, int], ...] | None, damp: Tensor) -> NormalInverse:
        """The inverse of the normal operators of tiles with the same padding, with one kernel and damping each."""
        A, size = self.A, self.layout.size(padding is None)

        def convolution(weight: Tensor, around: Any, groups: int = 1) -> Convolution:
            mode = A.padding_mode
            if padding is None:
                around, mode = [(k - 1 - (k - 1) // 2, (k - 1) // 2) for k in weight.shape[-A.ndim :]], "circular"
            return Convolution(weight, size, padding=around, groups=groups, padding_mode=mode, check_finite=False)

        core = convolution(kernels, padding)
        damp = damp.unsqueeze(-2) if A.shared and damp.ndim > 1 else damp
        precise = padding is not None and needs_double(core, damp)
        core64 = core.to(dtype=double(core.dtype))
        core = core64 if precise else core64.to(dtype=torch.complex64 if core.is_complex else torch.float32)
        floor = least_shift(core.weight.real.dtype, damped=True)
        terms = []
        for term in self.terms:
            weight, groups = term.convolution.weight.to(core.dtype), term.convolution.groups
            local = convolution(weight[:1], 0) if A.shared else convolution(weight, 0, groups)
            terms.append(Filter(local, term.factor))
        if terms and not Penalty.serves(core, terms):
            raise MethodError(f"L: {self.L!r} and {A!r} are not convolutions on one grid")
        inverse = normal_inverse(Request.of(core, damp, terms, floor=floor, side="solution"))
        inverse.factorise_if_cheaper(tuple(inverse.embedding.batch_shape), math.ceil(self.local.iterations))
        return inverse

    def describe(self) -> str:
        """Tiles, overlap, the forecast and memory, for the ``repr`` of a plan."""
        count = " x ".join(str(axis.count) for axis in self.layout.axes)
        ratio = self.local.damp_ratio
        raised = f", damp raised up to {ratio:.2g} times" if ratio > 1 else ""
        nbytes = sum(group.inverse.nbytes for group in self.groups)
        return (
            f"{count} tiles overlapping by {self.layout.axes[0].overlap}{raised}, about {self.local.iterations:.0f} "
            f"iterations expected, factors={nbytes / 2**20:.1f} MiB"
        )


@dataclass(frozen=True, eq=False)
class _Group:
    """Tiles of one kind, as one batch of n.

    Attributes:
        starts: the first cell of each, ``(n, ndim)``.
        windows: the root of the partition of unity on each, ``(n, 1, *size)``.
        scale: one over the mean weight of the data of each, ``(n, 1, ...)``.
        inverse: the inverse of their normal operators.
    """

    starts: Tensor
    windows: Tensor
    scale: Tensor
    inverse: NormalInverse


def _terms(A: VaryingConvolution, L: LinearOperator) -> list[Filter]:
    """Take L apart into convolutions, channel by channel where A has the same kernels in all channels."""
    terms = as_convolutions(L.to(dtype=A.dtype), A.ndim)
    channels = A.in_shape[0]
    per_channel = terms is not None and all(term.convolution.groups == channels for term in terms)
    if terms is None or (A.shared and channels > 1 and not per_channel):
        raise MethodError(f"L: expected a penalty made of convolutions of each channel, got {L!r}")
    return terms
