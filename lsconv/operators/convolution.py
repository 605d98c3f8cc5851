r"""Convolution as a linear operator, in one, two and three dimensions, with torch's whole signature.

What torch calls convolution is a cross-correlation. With padding l on the left, stride s and dilation d, per axis,

    y[o, i] = sum_c sum_t weight[o, c, t] x[c, s i + d t - l],

x extended beyond its borders by the padding mode. The adjoint is the transposed convolution with the conjugate
kernel, of exactly the input's size, followed by the adjoint of the padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, overload

import torch
from torch import Tensor

from lsconv.errors import ArgumentError, ShapeError
from lsconv.operators.arguments import check_weight, positive_ints, resolve_padding, spatial_dimensions
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import batch_order, in_blocks, in_items, on_parts
from lsconv.operators.convolution_cost import ConvolutionCost
from lsconv.operators.direct_convolution import DirectConvolution
from lsconv.operators.elementary import Crop
from lsconv.operators.fft_convolution import FrequencyGrid
from lsconv.operators.modules import PlainModule, TransposedModule, check_module, convolution_arguments
from lsconv.operators.padding import check_pairs
from lsconv.operators.padding_modes import MODES
from lsconv.operators.transforms import cached, may_cache

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Conv1d", "Conv2d", "Conv3d", "Convolution", "module_convolution", "norm_bound"]

_BACKENDS = ("auto", "direct", "fft")
_HALF = (torch.float16, torch.bfloat16)


class Convolution(LinearOperator):
    r"""Convolution ``y = A x`` of tensors ``(*batch, c_in, *spatial_in)``, in torch's convention.

    Use :class:`Conv1d`, :class:`Conv2d` or :class:`Conv3d`, or this class, which takes the number of spatial
    dimensions from ``in_size``.

    .. math:: y[o, i] = \sum_c \sum_t K[o, c, t]\, x[c, s\,i + d\,t - l]

    with stride s, dilation d and left padding l on every axis. ``A(x)`` equals ``torch.nn.functional.conv*`` on the
    same arguments, bit for bit where the backend is direct and to rounding where it is the FFT; ``A.H`` is its exact
    adjoint. Both are ordinary torch operations, differentiable
    with respect to their argument and to ``weight``. float16 and bfloat16 weights can be applied, not inverted.

    Args:
        weight: kernel of shape ``(*batch_shape, c_out, c_in // groups, *kernel_size)``. Leading dimensions give every
            batch item its own kernel; they broadcast with the batch dimensions of the inputs.
        in_size: spatial size of the inputs.
        stride: step between outputs, an int or one per axis.
        padding: ``"valid"``, ``"same"`` (stride 1; the odd cell of an even kernel goes to the right), an int, one
            int per axis, or one ``(left, right)`` pair per axis. Pairs are an extension of torch's signature.
        dilation: step between the taps of the kernel, an int or one per axis.
        groups: number of blocks into which the channels are split.
        padding_mode: ``"zeros"``, ``"circular"``, ``"reflect"`` or ``"replicate"``.
        backend: ``"direct"`` (torch's convolution), ``"fft"`` (for large kernels), or ``"auto"``, which takes the FFT
            where a measured cost model says that it is clearly faster, for the operator and its adjoint separately.
            float16 and bfloat16 are always direct, on the CPU computed in float32 and rounded.
        check_finite: refuse a weight that contains NaN or infinity.

    Attributes:
        weight: the kernel, the very tensor that was given.
        ndim: number of spatial dimensions.
        c_in: number of input channels.
        c_out: number of output channels.
        spatial_in: spatial size of inputs.
        spatial_out: spatial size of outputs.
        kernel_size: number of taps per axis.
        kernel_extent: cells that the dilated kernel spans, ``dilation * (kernel_size - 1) + 1`` per axis.
        stride: step between outputs per axis.
        dilation: step between the taps per axis.
        padding: ``(left, right)`` per axis.

    Raises:
        ShapeError: ``weight`` has too few dimensions, or the output would be empty.
        ArgumentError: channels not divisible by ``groups``, or more padding than the mode allows.
        DtypeError: ``weight`` is not floating-point or complex.
        NonFiniteError: ``weight`` contains NaN or infinity.

    Source:
        Dumoulin and Visin, "A guide to convolution arithmetic for deep learning" (2016), for the sizes and for
        transposed convolution as the adjoint.

    Example:
        >>> A = lsconv.Convolution(torch.ones(1, 1, 3), in_size=(5,), stride=2)
        >>> A(torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]]))
        tensor([[ 6., 12.]])
        >>> A.H(torch.tensor([[1.0, 10.0]]))
        tensor([[ 1.,  1., 11., 10., 10.]])
    """

    _dimensions: ClassVar[int | None] = None
    _only_torch = True

    def __init__(
        self,
        weight: Tensor,
        in_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int | tuple[int, int]] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        backend: str = "auto",
        *,
        check_finite: bool = True,
    ) -> None:
        self.ndim = spatial_dimensions(self._dimensions, in_size)
        self.spatial_in = positive_ints("in_size", in_size, self.ndim, ShapeError)
        self.stride = positive_ints("stride", stride, self.ndim)
        self.dilation = positive_ints("dilation", dilation, self.ndim)
        (self.groups,) = positive_ints("groups", groups, 1)
        self.padding_mode = padding_mode
        if backend not in _BACKENDS:
            raise ArgumentError(f"backend: expected one of {', '.join(map(repr, _BACKENDS))}, got {backend!r}")
        self.backend = backend
        check_weight(weight, self.ndim, self.groups, check_finite)
        self.weight = weight
        self.kernel_size = tuple(weight.shape[-self.ndim :])
        self.kernel_extent = tuple(d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True))
        self.padding = resolve_padding(padding, self.kernel_extent, self.stride)
        check_pairs(self.padding, self.spatial_in, padding_mode)
        self.spatial_out = self._output_size()
        self.c_out = int(weight.shape[-self.ndim - 2])
        self.c_in = int(weight.shape[-self.ndim - 1]) * self.groups
        self._direct = DirectConvolution(
            self.spatial_in, self.kernel_extent, self.padding, padding_mode, self.stride, self.dilation
        )
        super().__init__(
            (self.c_in, *self.spatial_in),
            (self.c_out, *self.spatial_out),
            dtype=weight.dtype,
            device=weight.device,
            batch_shape=weight.shape[: -self.ndim - 2],
        )

    @overload
    @classmethod
    def from_module(cls, module: PlainModule, in_size: int | Sequence[int]) -> Self: ...

    @overload
    @classmethod
    def from_module(cls, module: torch.nn.Module, in_size: int | Sequence[int]) -> LinearOperator: ...

    @classmethod
    def from_module(cls, module: torch.nn.Module, in_size: int | Sequence[int]) -> LinearOperator:
        """The linear part of a ``torch.nn.Conv*d``, or of a ``ConvTranspose*d``: the adjoint of a convolution.

        A module computes ``A x + bias``. The bias is no part of a linear operator: to invert the module, invert
        ``A`` on ``y - module.bias`` (the bias shaped to broadcast along the channels). The operator holds the
        module's own weight, so gradients reach the module's parameter.

        Args:
            module: the convolution module, with any padding, padding_mode and output_padding.
            in_size: spatial size of the inputs.

        Raises:
            ArgumentTypeError: ``module`` is no convolution, or one of another number of dimensions.

        Example:
            >>> module = torch.nn.Conv2d(2, 4, 3, padding=1, bias=False)
            >>> x = torch.randn(5, 2, 8, 8)
            >>> torch.equal(lsconv.Conv2d.from_module(module, in_size=(8, 8))(x), module(x))
            True
            >>> upwards = torch.nn.ConvTranspose2d(2, 1, 4, stride=2, padding=1, bias=False)
            >>> torch.allclose(lsconv.Conv2d.from_module(upwards, in_size=(8, 8))(x), upwards(x), atol=1e-6)
            True
        """
        checked = check_module(module, "module", cls._dimensions)
        C = module_convolution(cls, checked.weight, *convolution_arguments(checked, in_size))
        return C.H if isinstance(checked, TransposedModule) else C

    def apply(self, x: Tensor) -> Tensor:
        """The convolution of ``x``."""
        if x.is_complex() and not self.is_complex:
            return on_parts(self.apply, x, len(self.in_shape), self.batch_shape)
        items, batch = self._items_to_channels(x, self.in_shape)
        if self._uses_fft(len(items), transposed=False):
            y = self._grid.apply(items, self._spectrum())
        else:
            y = self._direct.apply(items, *self._grouped_weight())
        return in_items(y, batch, self.out_shape, self.batch_shape)

    def adjoint(self, y: Tensor) -> Tensor:
        """The transposed convolution of ``y``, of the inputs' size, and the adjoint of the padding."""
        if y.is_complex() and not self.is_complex:
            return on_parts(self.adjoint, y, len(self.out_shape), self.batch_shape)
        items, batch = self._items_to_channels(y, self.out_shape)
        weight, groups = self._grouped_weight()
        if self._uses_fft(len(items), transposed=True):
            x = self._grid.adjoint(items, self._spectrum())
        elif self._flips:
            flipped = cached(self, "flipped", [self.weight], lambda: self._direct.flipped(weight, groups))
            x = self._direct.adjoint_by_flipped(items, flipped, groups)
        else:
            x = self._direct.adjoint(items, weight, groups)
        return in_items(x, batch, self.in_shape, self.batch_shape)

    @property
    def _flips(self) -> bool:
        """Tell whether the adjoint is computed as a convolution with the flipped kernels, the same sums."""
        # in float64 torch copies a column for every tap and input channel, of which the flipped convolution has c_out
        pays = self.dtype.to_real() != torch.float64 or self.c_out <= self.c_in
        return self.device.type == "cpu" and self._direct.reversible and pays

    @property
    def _grid(self) -> FrequencyGrid:
        """The grid of the FFT backend."""
        if "_cached_grid" not in self.__dict__:
            self._cached_grid = FrequencyGrid.of(
                self.spatial_in, self.kernel_extent, self.padding, self.padding_mode, self.stride, self.dilation
            )
        return self._cached_grid

    def _uses_fft(self, items: int, transposed: bool) -> bool:
        """Tell whether ``items`` batch items are convolved by FFT: by request, or because it should be faster."""
        if self.backend == "direct" or self.dtype in _HALF or items == 0:  # some FFTs refuse empty tensors
            return False
        if self.backend == "fft":
            return True
        key = (items, transposed, may_cache(self.weight))
        choices: dict[tuple[int, bool, bool], bool] = self.__dict__.setdefault("_cached_choices", {})
        if key not in choices:
            cost = self._cost
            by_fft = cost.by_fft(items, self._grid.grid, cached=key[2])
            choices[key] = by_fft < cost.direct(items, transposed=transposed)
        return choices[key]

    @property
    def _cost(self) -> ConvolutionCost:
        # The model was measured on CPUs. Elsewhere float32's constants, the ones that favour torch, stand for all.
        dtype = self.dtype if self.device.type == "cpu" else torch.float32
        taps, inside, outside = map(math.prod, (self.kernel_size, self.spatial_in, self.spatial_out))
        channels = math.prod(self.batch_shape) * self.groups, self.c_out // self.groups, self.c_in // self.groups
        return ConvolutionCost(dtype, *channels, taps, inside, outside, self._flips)

    def nanoseconds(self, *, transposed: bool) -> float:
        """The predicted time of A, or of its adjoint, for one item, beyond a call of torch's convolution."""
        if self._uses_fft(1, transposed):
            return self._cost.by_fft(1, self._grid.grid, cached=True)
        return self._cost.direct(1, transposed=transposed)

    def _spectrum(self) -> Tensor:
        """The symbol of the kernels."""
        weight, groups = self._grouped_weight()
        weight = weight.reshape(groups, self.c_out // self.groups, *weight.shape[1:])
        return cached(self, "spectrum", [self.weight], lambda: self._grid.spectrum(weight))

    # ------------------------------------------------------------------ a kernel per batch item

    def with_parameters(self, parameters: Sequence[Tensor], *, per_item: bool = False) -> Self:
        """Rebuild the convolution with another weight; ``per_item`` lets it have other batch dimensions."""
        kernel = self.weight.shape[-self.ndim - 2 :]
        same = [p.shape[-self.ndim - 2 :] for p in parameters] == [kernel]
        if not (per_item and same) or parameters[0].shape == self.weight.shape:
            return super().with_parameters(parameters)
        geometry = (self.spatial_in, self.stride, self.padding, self.dilation, self.groups, self.padding_mode)
        return type(self)(parameters[0], *geometry, self.backend, check_finite=False)

    def _grouped_weight(self) -> tuple[Tensor, int]:
        """Return the kernels of all batch items as the groups of one weight, and the number of groups."""
        kernels = math.prod(self.batch_shape)
        weight = self.weight.reshape(kernels * self.c_out, *self.weight.shape[-self.ndim - 1 :])
        return weight, kernels * self.groups

    def _items_to_channels(self, x: Tensor, item_shape: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
        """``(*batch, c, *spatial)`` as ``(items, kernels * c, *spatial)``, and the broadcast batch dimensions."""
        x, batch = in_blocks(x, len(item_shape), self.batch_shape)
        shared, differing = batch_order(len(batch), self.batch_shape)
        items, kernels = math.prod([batch[dim] for dim in shared]), math.prod([batch[dim] for dim in differing])
        return x.reshape(items, kernels * item_shape[0], *item_shape[1:]), batch

    # ------------------------------------------------------------------ sizes and text

    def _output_size(self) -> tuple[int, ...]:
        """The spatial size of the outputs."""
        geometry = zip(self.spatial_in, self.padding, self.kernel_extent, self.stride, strict=True)
        sizes = tuple((n + left + right - extent) // step + 1 for n, (left, right), extent, step in geometry)
        if any(size <= 0 for size in sizes):
            raise ShapeError(
                f"in_size: {self.spatial_in} with padding {self.padding} is smaller than the kernel's extent "
                f"{self.kernel_extent} (kernel {self.kernel_size}, dilation {self.dilation}): the output would be empty"
            )
        return sizes

    def __repr__(self) -> str:
        details = [f"{self.in_shape} -> {self.out_shape}", f"kernel={self.kernel_size}"]
        if any(s != 1 for s in self.stride):
            details.append(f"stride={self.stride}")
        if any(map(any, self.padding)):
            symmetric = all(left == right for left, right in self.padding)
            details.append(f"padding={tuple(pair[0] for pair in self.padding) if symmetric else self.padding}")
        if any(d != 1 for d in self.dilation):
            details.append(f"dilation={self.dilation}")
        if self.groups != 1:
            details.append(f"groups={self.groups}")
        if self.padding_mode != "zeros":
            details.append(f"padding_mode={self.padding_mode!r}")
        if self.batch_shape:
            details.append(f"batch_shape={self.batch_shape}")
        return f"{type(self).__name__}({', '.join(details)}, {self.dtype}, {self.device})"


class Conv1d(Convolution):
    """Convolution of ``(*batch, c_in, length)``; see :class:`Convolution`.

    Example:
        >>> A = lsconv.Conv1d(torch.tensor([[[1.0, -1.0]]]), in_size=4, padding="same")
        >>> A(torch.tensor([[1.0, 3.0, 6.0, 10.0]]))
        tensor([[-2., -3., -4., 10.]])
    """

    _dimensions = 1
    _only_torch = True


class Conv2d(Convolution):
    """Convolution of ``(*batch, c_in, height, width)``; see :class:`Convolution`.

    Example:
        >>> A = lsconv.Conv2d(torch.randn(8, 3, 5, 5), in_size=(32, 32), stride=2, padding=2)
        >>> x = torch.randn(10, 3, 32, 32)
        >>> torch.equal(A(x), torch.nn.functional.conv2d(x, A.weight, stride=2, padding=2))
        True
    """

    _dimensions = 2
    _only_torch = True


class Conv3d(Convolution):
    """Convolution of ``(*batch, c_in, depth, height, width)``; see :class:`Convolution`.

    Example:
        >>> lsconv.Conv3d(torch.ones(1, 1, 3, 3, 3), in_size=(4, 4, 4), padding=1)
        Conv3d((1, 4, 4, 4) -> (1, 4, 4, 4), kernel=(3, 3, 3), padding=(1, 1, 1), torch.float32, cpu)
    """

    _dimensions = 3
    _only_torch = True


def module_convolution(
    kind: type[Convolution], weight: Tensor, arguments: dict[str, Any], outputs: tuple[int, ...] | None
) -> LinearOperator:
    """Make the operator of a module from the arguments and outputs that ``convolution_arguments`` returns."""
    C = kind(weight, **arguments)
    if outputs in (None, C.spatial_out):
        return C
    return Crop(C.out_shape, (0,) * C.ndim, outputs, dtype=C.dtype, device=C.device) @ C


def norm_bound(A: Convolution) -> Tensor:
    """An upper bound of the spectral norm: the root of the largest row sum times the largest column sum, Schur's test.

    Args:
        A: a convolution.

    Returns:
        Real tensor of shape ``A.batch_shape``.
    """
    size = A.weight.detach().abs().double().flatten(-A.ndim).sum(-1)  # *batch, outputs, inputs of a group
    rows = size.sum(-1).amax(-1)
    columns = size.unflatten(-2, (A.groups, -1)).sum(-2).flatten(-2).amax(-1)
    axes = zip(A.spatial_in, A.padding, A.stride, A.spatial_out, strict=True)
    mode = MODES[A.padding_mode]
    sums = [mode.column_sum(*axis) * (mode.row_sum if any(axis[1]) else 1) for axis in axes]
    return (rows * columns * math.prod(sums)).sqrt()
