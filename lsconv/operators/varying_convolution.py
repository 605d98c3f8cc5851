r"""Convolution whose kernel varies over the field: a sum of convolutions with one kernel each, weighted by pixel.

.. math:: A = \sum_k \mathrm{diag}(w_k)\, H_k \quad\text{("after")} \qquad
          A = \sum_k H_k\, \mathrm{diag}(w_k) \quad\text{("before")}

In general all K kernels are one convolution of K times the channels. Where every weight is zero over most of the field,
as for PSFs measured on a grid, each kernel is applied only to a window around the pixels where its weight is not zero;
the windows have one size and are one batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lsconv.errors import ArgumentError, ArgumentTypeError, DeviceError, DtypeError, ShapeError
from lsconv.operators.arguments import check_weight, positive_ints, resolve_padding, spatial_dimensions
from lsconv.operators.base import LinearOperator
from lsconv.operators.checks import require_finite
from lsconv.operators.convolution import Convolution
from lsconv.operators.fft_convolution import short_fft_length, transform_cost
from lsconv.operators.padding import check_pairs, pad, pad_adjoint
from lsconv.operators.padding_modes import Pairs
from lsconv.operators.transforms import cached, may_cache, transforming
from lsconv.operators.windows import add_windows, read_windows, window_slices

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["VaryingConvolution"]

_FORMS = ("after", "before")


class VaryingConvolution(LinearOperator):
    r"""Convolution whose kernel varies over the field: a sum of convolutions, each with a weight at every pixel.

    .. math:: y = \sum_k w_k \cdot (h_k * x) \quad\text{("after")} \qquad
              y = \sum_k h_k * (w_k \cdot x) \quad\text{("before")}

    in torch's convention of a convolution (:class:`Convolution`). "after" says which kernel every output is made with,
    "before" where the light of every input goes. Both and the adjoint ``A.H`` are ordinary torch operations,
    differentiable with respect to their argument, the kernels and the weights.

    Args:
        kernels: ``(K, *kernel_size)``, the same for every channel, or the weights of K convolutions,
            ``(K, c_out, c_in, *kernel_size)``.
        weights: ``(K, *spatial_out)`` for "after", ``(K, *spatial_in)`` for "before".
        in_size: spatial size of the inputs, one, two or three numbers.
        form: "after" or "before".
        padding: as of a :class:`Convolution`.
        padding_mode: as of a :class:`Convolution`.
        channels: of inputs and outputs, for kernels without channels of their own.
        check_finite: refuse kernels and weights with NaN or infinity.

    Attributes:
        kernels: the kernels, the very tensor that was given.
        weights: the weights, the same.
        ndim: number of spatial dimensions.
        spatial_in: spatial size of inputs.
        spatial_out: spatial size of outputs.
        kernel_size: number of taps per axis.
        padding: ``(left, right)`` per axis.

    Raises:
        ArgumentTypeError: kernels or weights are no tensors.
        ShapeError: they do not fit each other, or the output would be empty.
        DtypeError, DeviceError: they are not of one dtype on one device.
        ArgumentError: an unknown form, channels beside kernels that have their own, or more padding than the mode
            allows.
        NonFiniteError: kernels or weights contain NaN or infinity.

    Source:
        Nagy and O'Leary, "Restoring images degraded by spatially variant blur", SIAM J. Sci. Comput. 19 (1998);
        Denis, Thiébaut, Soulez, Becker and Mourya, "Fast approximations of shift-variant blur", Int. J. Comput.
        Vision 115 (2015), for the two forms.

    Example:
        >>> kernels = torch.tensor([[0.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
        >>> weights = torch.tensor([[1.0, 1.0, 0.5, 0.0], [0.0, 0.0, 0.5, 1.0]])
        >>> A = lsconv.VaryingConvolution(kernels, weights, (4,), padding="same")
        >>> A(torch.tensor([[1.0, 2.0, 4.0, 8.0]]))
        tensor([[ 1.,  2.,  9., 12.]])
    """

    def __init__(
        self,
        kernels: Tensor,
        weights: Tensor,
        in_size: Sequence[int],
        form: str = "after",
        padding: int | str | Sequence[int | tuple[int, int]] = 0,
        padding_mode: str = "zeros",
        *,
        channels: int = 1,
        check_finite: bool = True,
    ) -> None:
        self.ndim = spatial_dimensions(None, in_size)
        self.spatial_in = positive_ints("in_size", in_size, self.ndim, ShapeError)
        _check_kernels(kernels, self.ndim, check_finite)
        if form not in _FORMS:
            raise ArgumentError(f"form: expected one of {', '.join(map(repr, _FORMS))}, got {form!r}")
        self.form = form
        self.shared = kernels.ndim == self.ndim + 1
        (channels,) = positive_ints("channels", channels, 1)
        if not self.shared and channels != 1:
            raise ArgumentError(f"channels: kernels {tuple(kernels.shape)} have channels of their own, got {channels}")
        self.kernel_size = tuple(kernels.shape[-self.ndim :])
        self.padding = resolve_padding(padding, self.kernel_size, (1,) * self.ndim)
        self.padding_mode = padding_mode
        check_pairs(self.padding, self.spatial_in, padding_mode)
        self.spatial_out = _output_size(self.spatial_in, self.padding, self.kernel_size)
        _check_weights(weights, kernels, self.spatial_out if form == "after" else self.spatial_in, form, check_finite)
        self.kernels, self.weights = kernels, weights
        c_out, c_in = (channels, channels) if self.shared else kernels.shape[1:3]
        super().__init__(
            (c_in, *self.spatial_in), (c_out, *self.spatial_out), dtype=kernels.dtype, device=kernels.device
        )

    @classmethod
    def from_grid(
        cls,
        kernels: Tensor,
        positions: Tensor | Sequence[Sequence[float]],
        in_size: Sequence[int],
        form: str = "after",
        padding: int | str | Sequence[int | tuple[int, int]] = 0,
        padding_mode: str = "zeros",
        *,
        channels: int = 1,
        check_finite: bool = True,
    ) -> Self:
        r"""The convolution with kernels known at the points of a grid, linear between them and constant beyond.

        Args:
            kernels: ``(K, *kernel_size)`` or ``(K, c_out, c_in, *kernel_size)``.
            positions: ``(K, ndim)``, the pixel at which each kernel was measured, in any order, whole or not, inside
                the field or not: pixels of the outputs for "after", of the inputs for "before". They are every
                combination of some coordinates per axis; of one coordinate only where nothing varies along an axis,
                so that kernels that vary with depth are ``(z, 0, 0)``.
            in_size, form, padding, padding_mode, channels, check_finite: as for the class.

        Raises:
            ShapeError, ArgumentError: the positions are no such points.

        Example:
            >>> kernels = torch.stack([torch.ones(3), torch.zeros(3)])
            >>> A = lsconv.VaryingConvolution.from_grid(kernels, [[1.0], [3.0]], (7,))
            >>> A.weights[0]
            tensor([1.0000, 1.0000, 0.5000, 0.0000, 0.0000])
        """
        ndim = spatial_dimensions(None, in_size)
        _check_kernels(kernels, ndim, check_finite)
        size = positive_ints("in_size", in_size, ndim, ShapeError)
        if form == "after":
            taps = tuple(kernels.shape[-ndim:])
            size = _output_size(size, resolve_padding(padding, taps, (1,) * ndim), taps)
        weights = _interpolation(positions, len(kernels), size).to(kernels.device, kernels.dtype)
        return cls(kernels, weights, in_size, form, padding, padding_mode, channels=channels, check_finite=check_finite)

    # ------------------------------------------------------------------ the operator

    def apply(self, x: Tensor) -> Tensor:
        """The sum of the convolutions of ``x``."""
        x = x.unsqueeze(-self.ndim - 1) if self.shared else x
        windows = self._windows()
        y = self._apply_stacked(x) if windows is None else self._apply_windows(windows, x)
        return y.squeeze(-self.ndim - 1) if self.shared else y

    def adjoint(self, y: Tensor) -> Tensor:
        """The sum of the transposed convolutions of ``y``, of the inputs' size."""
        y = y.unsqueeze(-self.ndim - 1) if self.shared else y
        windows = self._windows()
        x = self._adjoint_stacked(y) if windows is None else self._adjoint_windows(windows, y)
        return x.squeeze(-self.ndim - 1) if self.shared else x

    def _apply_stacked(self, x: Tensor) -> Tensor:
        core, each, weights = self._stacked(), -self.ndim - 2, self.weights.unsqueeze(1)
        if self.form == "before":
            return core.apply((x.unsqueeze(each) * weights).flatten(each, each + 1))
        return (core.apply(x).unflatten(each + 1, (len(weights), -1)) * weights).sum(each)

    def _adjoint_stacked(self, y: Tensor) -> Tensor:
        core, each, weights = self._stacked(), -self.ndim - 2, self.weights.unsqueeze(1).conj()
        if self.form == "before":
            return (core.adjoint(y).unflatten(each + 1, (len(weights), -1)) * weights).sum(each)
        return core.adjoint((y.unsqueeze(each) * weights).flatten(each, each + 1))

    def _apply_windows(self, windows: _Windows, x: Tensor) -> Tensor:
        """Apply A window by window."""
        parts = read_windows(pad(x, self.padding, self.padding_mode), windows.starts, windows.inputs)
        if self.form == "after":
            return add_windows(windows.core.apply(parts) * windows.weights, windows.starts, self.spatial_out)
        # The outputs of a window begin a kernel's length before it, which may be outside the field.
        margins = [k - 1 for k in self.kernel_size]
        padded_size = [n + 2 * m for n, m in zip(self.spatial_out, margins, strict=True)]
        y = add_windows(windows.core.apply(parts * windows.weights), windows.starts, padded_size)
        cells: tuple[Any, ...] = (..., *(slice(m, m + n) for n, m in zip(self.spatial_out, margins, strict=True)))
        return y[cells]

    def _adjoint_windows(self, windows: _Windows, y: Tensor) -> Tensor:
        """Apply the adjoint window by window."""
        weights = windows.weights.conj()
        padded = [n + sum(pair) for n, pair in zip(self.spatial_in, self.padding, strict=True)]
        if self.form == "after":
            parts = windows.core.adjoint(read_windows(y, windows.starts, windows.outputs) * weights)
        else:
            y = pad(y, [(k - 1, k - 1) for k in self.kernel_size], "zeros")
            parts = windows.core.adjoint(read_windows(y, windows.starts, windows.outputs)) * weights
        return pad_adjoint(add_windows(parts, windows.starts, padded), self.padding, self.padding_mode)

    @property
    def work(self) -> float:
        """The work of one application and one adjoint, in the unit of ``transform_cost``."""
        windows, count = self._windows(), len(self.kernels)
        if windows is not None:
            return 4 * count * transform_cost(list(map(short_fft_length, windows.core.spatial_in)))
        padded = [short_fft_length(n + sum(pair)) for n, pair in zip(self.spatial_in, self.padding, strict=True)]
        return 2 * (count + 1) * transform_cost(padded)

    # ------------------------------------------------------------------ cached convolutions and windows

    def _stacked(self) -> Convolution:
        """All kernels as one convolution."""

        def make() -> Convolution:
            kernels = self._weights_of_convolutions()
            axis = 0 if self.form == "after" else 1
            stacked = torch.cat(kernels.unbind(0), axis)
            return Convolution(
                stacked, self.spatial_in, padding=self.padding, padding_mode=self.padding_mode, check_finite=False
            )

        return cached(self, "whole", [self.kernels], make)

    def _weights_of_convolutions(self) -> Tensor:
        """The kernels ``(K, c_out, c_in, *kernel_size)``."""
        return self.kernels[:, None, None] if self.shared else self.kernels

    def _windows(self) -> _Windows | None:
        """The windows; None where they save nothing, or weights have derivatives, which zero weights have as well."""
        if not may_cache(self.weights) or transforming():
            return None
        place = cached(self, "place", [self.weights], self._place)
        if place is None:
            return None
        starts, size = place
        return cached(self, "windows", [self.kernels, self.weights], lambda: self._make_windows(starts, size))

    def _place(self) -> tuple[Tensor, tuple[int, ...]] | None:
        """The first cells ``(K, ndim)`` of the windows, and their size; None where they save nothing."""
        weights = self.weights.detach()
        if self.form == "before":
            weights = pad(weights, self.padding, self.padding_mode)
        first, size = [], []
        for axis in range(1, self.ndim + 1):
            others = [a for a in range(1, self.ndim + 1) if a != axis]
            used = (weights != 0).sum(others) > 0 if others else weights != 0
            n = used.shape[1]
            cells = torch.arange(n, device=used.device)
            low = torch.where(used, cells, n).amin(1).clamp_max(n - 1)
            high = torch.where(used, cells, -1).amax(1)
            longest = max(int((high - low).amax()) + 1, 1)
            first.append(low.clamp_max(n - longest))
            size.append(longest)
        # Windows take two transforms each, the whole field one of x and one for every kernel.
        count = len(weights)
        if 2 * count * math.prod(size) >= (count + 1) * math.prod(weights.shape[1:]):
            return None
        return torch.stack(first, 1), tuple(size)

    def _make_windows(self, starts: Tensor, size: tuple[int, ...]) -> _Windows:
        """Make the windows of ``size`` pixels that begin at ``starts``."""
        margins = [k - 1 for k in self.kernel_size]
        padded_size = tuple(n + m for n, m in zip(size, margins, strict=True))
        after = self.form == "after"
        weights = self.weights if after else pad(self.weights, self.padding, self.padding_mode)
        core = Convolution(
            self._weights_of_convolutions(), padded_size if after else size, padding=0 if after else margins,
            check_finite=False,
        )  # fmt: skip
        inside = zip(weights, window_slices(starts, size), strict=True)
        local_weights = torch.stack([weight[window] for weight, window in inside])
        return _Windows(
            core, local_weights.unsqueeze(1), starts, padded_size if after else size, size if after else padded_size
        )

    def __repr__(self) -> str:
        return (
            f"VaryingConvolution({self.in_shape} -> {self.out_shape}, {len(self.kernels)} kernels {self.kernel_size}, "
            f"{self.form!r}, {self.dtype}, {self.device})"
        )


@dataclass(frozen=True, eq=False)
class _Windows:
    """One window of the field per kernel, all of one size.

    Attributes:
        core: the convolution of a window with its kernel, of batch shape ``(K,)``.
        weights: the weights of each kernel in its window, ``(K, 1, *size)``.
        starts: the first cell of every window, ``(K, ndim)``.
        inputs: size of a window of inputs.
        outputs: size of a window of outputs.
    """

    core: Convolution
    weights: Tensor
    starts: Tensor
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def _output_size(size: tuple[int, ...], padding: Pairs, taps: tuple[int, ...]) -> tuple[int, ...]:
    found = tuple(n + sum(pair) - k + 1 for n, pair, k in zip(size, padding, taps, strict=True))
    if min(found) < 1:
        raise ShapeError(f"in_size: {size} with padding {padding} is smaller than the kernels {taps}: no output")
    return found


def _check_kernels(kernels: Any, ndim: int, check_finite: bool) -> None:
    """Refuse kernels of a wrong type or shape."""
    if not isinstance(kernels, Tensor):
        raise ArgumentTypeError(f"kernels: expected a torch.Tensor (K, *kernel_size), got {type(kernels).__name__}")
    if kernels.ndim not in (ndim + 1, ndim + 3) or kernels.numel() == 0:
        raise ShapeError(
            f"kernels: expected a non-empty tensor (K, *kernel_size) or (K, c_out, c_in, *kernel_size) with {ndim} "
            f"spatial axes, as in_size has, got shape {tuple(kernels.shape)}"
        )
    check_weight(kernels.unsqueeze(0), ndim, 1, False)
    if check_finite:
        require_finite(kernels, "kernels", kernels.ndim - 1)


def _check_weights(weights: Any, kernels: Tensor, size: tuple[int, ...], form: str, check_finite: bool) -> None:
    """Refuse weights of another type, shape, dtype or device than the kernels need."""
    if not isinstance(weights, Tensor):
        raise ArgumentTypeError(f"weights: expected a torch.Tensor (K, *size), got {type(weights).__name__}")
    wanted = (len(kernels), *size)
    if tuple(weights.shape) != wanted:
        where = "outputs" if form == "after" else "inputs"
        raise ShapeError(
            f"weights: expected {wanted}, a weight for each kernel at each of the {where}, which form={form!r} weighs, "
            f"got {tuple(weights.shape)}"
        )
    if weights.dtype != kernels.dtype:
        raise DtypeError(f"weights: dtype {weights.dtype} differs from that of kernels, {kernels.dtype}")
    if weights.device != kernels.device:
        raise DeviceError(f"weights: device {weights.device} differs from that of kernels, {kernels.device}")
    if check_finite:
        require_finite(weights, "weights", weights.ndim - 1)


def _interpolation(positions: Any, count: int, size: tuple[int, ...]) -> Tensor:
    """The weights ``(count, *size)`` of multilinear interpolation between grid points, constant outside the grid."""
    points = torch.as_tensor(positions, dtype=torch.float64).cpu()
    if points.shape != (count, len(size)):
        raise ShapeError(f"positions: expected shape ({count}, {len(size)}), a point for each kernel, got "
                         f"{tuple(points.shape)}")  # fmt: skip
    require_finite(points, "positions", 1)
    weights, total = torch.ones(count, *(1 for _ in size), dtype=torch.float64), 1
    for axis, n in enumerate(size):
        places, index = points[:, axis].unique(return_inverse=True)
        total *= len(places)
        cells = torch.arange(n, dtype=torch.float64)
        hat_functions = torch.ones(1, n, dtype=torch.float64)
        if len(places) > 1:
            right = torch.searchsorted(places, cells).clamp(1, len(places) - 1)
            fraction = ((cells - places[right - 1]) / (places[right] - places[right - 1])).clamp(0, 1)
            hat_functions = torch.zeros(len(places), n, dtype=torch.float64)
            hat_functions.scatter_(0, (right - 1)[None], 1 - fraction[None]).scatter_(0, right[None], fraction[None])
        weights = weights * hat_functions[index].reshape(count, *(n if a == axis else 1 for a in range(len(size))))
    if total != count or len(points.unique(dim=0)) != count:
        raise ArgumentError(
            f"positions: {count} points are no grid, which has every combination of its coordinates once (here "
            f"{total}); for scattered points give VaryingConvolution weights of your own"
        )
    return weights
