r"""The kernel of every tile of a varying convolution, and the damping for which it stands for all kernels there."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lsconv.border.penalty import Filter
from lsconv.operators.dtypes import double
from lsconv.operators.varying_convolution import VaryingConvolution
from lsconv.tiled.layout import TileLayout

__all__ = ["LocalKernels"]


class LocalKernels:
    r"""One kernel for every tile, the mean of A's over the tile, with the damping of the tile.

    A blurs with K kernels, weighted pixel by pixel. The mean is taken over three points per axis, the two ends of the
    core and, counted twice, its middle. Where the transfer function h varies within a tile, the damping is raised until
    ``damp^2 |L|^2`` is no smaller than ``var |h| - |mean h|^2`` (see :mod:`lsconv.tiled.schwarz`).

    Args:
        A: the operator.
        layout: the tiles.
        damp: the damping, a number or one per batch item.
        weights: the weights W of the data, ``(*batch, *out_shape)``; None: ones.
        terms: the penalty L as convolutions; empty: the identity.

    Attributes:
        coefficients: the mean kernel of a tile as a combination of A's K kernels, ``(tiles, K)``.
        weights: the mean weight of the data of every tile, ``(tiles,)``.
        damp: the damping of every tile for data of weight one, ``(*batch, tiles)``.
        damp_ratio: the largest ratio of the raised damping to the wanted one.
        norm: the largest modulus of a mean transfer function, an estimate of the norm of A.
        condition: ``norm`` over the smallest wanted damping.
        variation: the largest ratio between ``|h|^2 + damp^2 |L|^2`` at a point of a tile and that of the mean kernel,
            over all frequencies.
    """

    def __init__(
        self,
        A: VaryingConvolution,
        layout: TileLayout,
        damp: Tensor,
        weights: Tensor | None = None,
        terms: Sequence[Filter] = (),
    ) -> None:
        self.layout = layout
        at_points = _weights_at(A.weights.detach().to(double(A.dtype)), self._points(A))  # tiles, points, K
        rule = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64, device=A.device)
        rule_nd = functools.reduce(lambda a, b: (a[:, None] * b).flatten(), [rule] * A.ndim)
        self.coefficients = (at_points * rule_nd[:, None].to(at_points.dtype)).sum(1)
        self.weights = torch.ones(len(self.coefficients), dtype=torch.float64, device=A.device)
        if weights is not None:
            plane = weights.double().reshape(-1, weights.shape[-A.ndim - 1], *A.spatial_out).mean((0, 1))
            self.weights = self._means(plane, A)
        S = _transfer(A.kernels.detach().to(double(A.dtype)), A.ndim)
        power = (at_points.to(S.dtype).flatten(0, 1) @ S).unflatten(0, at_points.shape[:2]).abs().square()
        mean_power = (self.coefficients.to(S.dtype) @ S).abs().square()
        if not A.shared:
            channels = A.kernels.shape[1] * A.kernels.shape[2]
            power, mean_power = (t.unflatten(-1, (channels, -1)).sum(-2) for t in (power, mean_power))
        variance = (power * rule_nd[:, None]).sum(1) - mean_power
        L = torch.ones((), dtype=torch.float64, device=A.device)
        if terms:
            L = sum(_penalty_power(term, A) for term in terms)  # type: ignore[assignment]
            L = L + 1e-3 * L.mean()  # a difference vanishes at frequency zero, where no damping would suffice
        wanted = damp.double().unsqueeze(-1).square() / self.weights
        # All tiles are raised to one value, because neighbours of different damping disagree where they overlap.
        raised = torch.maximum(wanted, ((variance - mean_power) / L).amax())
        self.damp = raised.sqrt()
        self.damp_ratio = float((raised / wanted).amax().sqrt())
        self.norm = float(mean_power.amax().sqrt())
        self.condition = self.norm / float(wanted.amin().sqrt())
        mu = raised.amin() * L
        ratio = (power + mu) / (mean_power + mu).unsqueeze(1)
        self.variation = float(torch.maximum(ratio, 1 / ratio).amax())

    @property
    def iterations(self) -> float:
        """Estimate the iterations, the largest of three numbers: for a raised damp, varying kernels and a small damp.

        The powers are fitted to iteration counts.
        """
        for_variation = 2 + 2 * self.variation * (1 + self.variation / 20)
        # Overlapping tiles blend their mean kernels; a single tile has one for the whole field, which fits less well.
        if len(self.layout.tiles) == 1:
            for_variation *= 1 + self.variation / 5
        return max(4 * self.damp_ratio**1.35, for_variation, 0.07 * self.condition)

    def _points(self, A: VaryingConvolution) -> list[Tensor]:
        """The pixels of A's weights at the first, middle and last cell of every core, ``(tiles, 3)`` per axis."""
        points, tiles = [], torch.tensor(self.layout.tiles)
        for a, axis in enumerate(self.layout.axes):
            edges = torch.tensor(axis.edges)
            ends = torch.stack([edges[:-1], (edges[:-1] + edges[1:]) // 2, edges[1:] - 1], 1)
            shift = A.padding[a][0] - (A.kernel_size[a] - 1) // 2 if A.form == "after" else 0
            points.append((ends + shift).clamp(0, A.weights.shape[a + 1] - 1)[tiles[:, a]].to(A.device))
        return points

    def _means(self, plane: Tensor, A: VaryingConvolution) -> Tensor:
        """The mean over every tile of ``plane``, one value per output pixel; 1 in place of a mean of zero."""
        found = []
        for tile in self.layout.tiles:
            cells = []
            for a, (i, axis) in enumerate(zip(tile, self.layout.axes, strict=True)):
                shift, n = A.padding[a][0] - (A.kernel_size[a] - 1) // 2, plane.shape[a]
                first = min(max(axis.edges[i] + shift, 0), n - 1)
                cells.append(slice(first, max(min(axis.edges[i + 1] + shift, n), first + 1)))
            found.append(plane[tuple(cells)].mean())
        means = torch.stack(found)
        return torch.where(means > 0, means, torch.ones_like(means))


def _weights_at(weights: Tensor, points: list[Tensor]) -> Tensor:
    """The weights ``(K, *size)`` at every combination of the points along the axes: ``(tiles, 3^ndim, K)``."""
    ndim = len(points)
    index = []
    for axis, point in enumerate(points):
        shape = [len(point), *(3 if a == axis else 1 for a in range(ndim))]
        index.append(point.reshape(shape))
    cells: tuple[Any, ...] = (slice(None), *torch.broadcast_tensors(*index))
    return weights[cells].movedim(0, -1).flatten(1, ndim)


def _transfer(kernels: Tensor, ndim: int) -> Tensor:
    """The transfer functions of kernels, sampled at twice their length at least, ``(K, channels * frequencies)``."""
    axes = tuple(range(-ndim, 0))
    return torch.fft.fftn(kernels, s=_grid(kernels.shape[-ndim:]), dim=axes).flatten(1)


def _grid(kernel_size: Sequence[int]) -> list[int]:
    """The size of the grid on which transfer functions are sampled."""
    return [max(2 * k, 16) for k in kernel_size]


def _penalty_power(term: Filter, A: VaryingConvolution) -> Tensor:
    """The squared modulus of the transfer function of one penalty term, on the grid of :func:`_transfer`."""
    weight = term.convolution.weight.detach().to(double(A.dtype))
    axes = tuple(range(-A.ndim, 0))
    squares = torch.fft.fftn(weight, s=_grid(A.kernel_size), dim=axes).abs().square().flatten(-A.ndim)
    size = squares.sum((0, 1)) / weight.shape[0]
    return size * term.factor.detach().abs().double().square().amax()
