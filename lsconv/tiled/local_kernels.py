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
    r"""The mean kernel of every tile.

    Along every axis it is the mean over both ends and, twice, the middle of the core. The damping of a tile is raised
    where the transfer function varies more than the normal operator of the mean is large.

    Args:
        A: the operator.
        layout: the tiles.
        damp: the damping, a number or one per batch item.
        weights: of the data, ``(*batch, *out_shape)``; None: ones.
        terms: the penalty; none: the identity.

    Attributes:
        shares: of every kernel in the tile's, ``(tiles, K)``.
        weights: the mean weight of the data of every tile, ``(tiles,)``.
        damp: of every tile, for data of weight one, ``(*batch, tiles)``.
        factor: the largest by which it was raised.
        norm: the largest value of a transfer function.
        condition: that over the least damping.
        variation: the largest ratio of normal operators within a tile, in the eyes of a frequency.
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
        sampled = _samples(A.weights.detach().to(double(A.dtype)), self._places(A))  # tiles, samples, K
        shares = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64, device=A.device)
        counts = functools.reduce(lambda a, b: (a[:, None] * b).flatten(), [shares] * A.ndim)
        self.shares = (sampled * counts[:, None].to(sampled.dtype)).sum(1)
        self.weights = torch.ones(len(self.shares), dtype=torch.float64, device=A.device)
        if weights is not None:
            plane = weights.double().reshape(-1, weights.shape[-A.ndim - 1], *A.spatial_out).mean((0, 1))
            self.weights = self._means(plane, A)
        S = _transfer(A.kernels.detach().to(double(A.dtype)), A.ndim)
        functions = (sampled.to(S.dtype).flatten(0, 1) @ S).unflatten(0, sampled.shape[:2]).abs().square()
        mean = (self.shares.to(S.dtype) @ S).abs().square()
        if not A.shared:
            channels = A.kernels.shape[1] * A.kernels.shape[2]
            functions, mean = (t.unflatten(-1, (channels, -1)).sum(-2) for t in (functions, mean))
        spread = (functions * counts[:, None]).sum(1) - mean
        L = torch.ones((), dtype=torch.float64, device=A.device)
        if terms:
            L = sum(_size_of(term, A) for term in terms)  # type: ignore[assignment]
            L = L + 1e-3 * L.mean()
        wanted = damp.double().unsqueeze(-1).square() / self.weights
        # tiles of different damping would not fit together
        raised = torch.maximum(wanted, ((spread - mean) / L).amax())
        self.damp = raised.sqrt()
        self.factor = float((raised / wanted).amax().sqrt())
        self.norm = float(mean.amax().sqrt())
        self.condition = self.norm / float(wanted.amin().sqrt())
        mu = raised.amin() * L
        ratio = (functions + mu) / (mean + mu).unsqueeze(1)
        self.variation = float(torch.maximum(ratio, 1 / ratio).amax())

    @property
    def iterations(self) -> float:
        """The iterations to expect, roughly: for a raised damp, for kernels that vary, for a small damp."""
        vary = 2 + 2 * self.variation * (1 + self.variation / 20)
        # between tiles that overlap the inverse changes little by little, in one not at all
        alone = 1 + self.variation / 5 if len(self.layout.tiles) == 1 else 1
        return max(4 * self.factor**1.35, alone * vary, 0.07 * self.condition)

    def _places(self, A: VaryingConvolution) -> list[Tensor]:
        """The pixels of A's weights at both ends and in the middle of every core, ``(tiles, 3)`` per axis."""
        places, tiles = [], torch.tensor(self.layout.tiles)
        for a, axis in enumerate(self.layout.axes):
            edges = torch.tensor(axis.edges)
            ends = torch.stack([edges[:-1], (edges[:-1] + edges[1:]) // 2, edges[1:] - 1], 1)
            shift = A.padding[a][0] - (A.kernel_size[a] - 1) // 2 if A.form == "after" else 0
            places.append((ends + shift).clamp(0, A.weights.shape[a + 1] - 1)[tiles[:, a]].to(A.device))
        return places

    def _means(self, plane: Tensor, A: VaryingConvolution) -> Tensor:
        """The mean of values of the outputs over every tile; 1 where it is zero."""
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


def _samples(weights: Tensor, places: list[Tensor]) -> Tensor:
    """The weights ``(K, *size)`` at every combination of places ``(tiles, 3)``: ``(tiles, 3^ndim, K)``."""
    ndim = len(places)
    index = []
    for axis, place in enumerate(places):
        shape = [len(place), *(3 if a == axis else 1 for a in range(ndim))]
        index.append(place.reshape(shape))
    cells: tuple[Any, ...] = (slice(None), *torch.broadcast_tensors(*index))
    return weights[cells].movedim(0, -1).flatten(1, ndim)


def _transfer(kernels: Tensor, ndim: int) -> Tensor:
    """The transfer functions of kernels on a grid at least twice as long, ``(K, channels * frequencies)``."""
    axes = tuple(range(-ndim, 0))
    return torch.fft.fftn(kernels, s=_grid(kernels.shape[-ndim:]), dim=axes).flatten(1)


def _grid(kernel_size: Sequence[int]) -> list[int]:
    return [max(2 * k, 16) for k in kernel_size]


def _size_of(term: Filter, A: VaryingConvolution) -> Tensor:
    """``|L|^2`` of one term, summed over outputs and divided by inputs, on the grid of the transfer functions."""
    weight = term.convolution.weight.detach().to(double(A.dtype))
    axes = tuple(range(-A.ndim, 0))
    squares = torch.fft.fftn(weight, s=_grid(A.kernel_size), dim=axes).abs().square().flatten(-A.ndim)
    size = squares.sum((0, 1)) / weight.shape[0]
    return size * term.factor.detach().abs().double().square().amax()
