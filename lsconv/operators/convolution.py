r"""Convolution as a linear operator, in one, two and three dimensions, with torch's whole signature.

What torch calls convolution is a cross-correlation. With padding l on the left, stride s and dilation d, per axis,

    y[o, i] = sum_c sum_t weight[o, c, t] x[c, s i + d t - l],

x extended beyond its borders by the padding mode. The adjoint is the transposed convolution with the conjugate
kernel, of exactly the input's size, followed by the adjoint of the padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from lsconv.errors import ArgumentError, ArgumentTypeError, ShapeError
from lsconv.operators.arguments import check_weight, positive_ints, resolve_padding, spatial_dimensions
from lsconv.operators.base import LinearOperator
from lsconv.operators.fft_convolution import FrequencyGrid, direct_cost, fft_cost
from lsconv.operators.padding import Pairs, check_pairs, pad, pad_adjoint

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Conv1d", "Conv2d", "Conv3d", "Convolution"]

_CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_CONV_TRANSPOSE = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}
# The FFT is chosen when the model says that torch's convolution takes this many times as long.
_FFT_MARGIN = 1.3
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
            float16 and bfloat16 are always direct.
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
        super().__init__(
            (self.c_in, *self.spatial_in),
            (self.c_out, *self.spatial_out),
            dtype=weight.dtype,
            device=weight.device,
            batch_shape=weight.shape[: -self.ndim - 2],
        )

    @classmethod
    def from_module(cls, module: torch.nn.Module, in_size: int | Sequence[int]) -> Self:
        """The linear part of a ``torch.nn.Conv1d``, ``Conv2d`` or ``Conv3d``.

        A module computes ``A x + bias``. The bias is no part of a linear operator: to invert the module, invert
        ``A`` on ``y - module.bias`` (the bias shaped to broadcast along the channels). The operator holds the
        module's own weight, so gradients reach the module's parameter.

        Args:
            module: the convolution module.
            in_size: spatial size of the inputs.

        Raises:
            ArgumentTypeError: ``module`` is no convolution, or one of another number of dimensions.

        Example:
            >>> module = torch.nn.Conv2d(2, 4, 3, padding=1, bias=False)
            >>> x = torch.randn(5, 2, 8, 8)
            >>> torch.equal(lsconv.Conv2d.from_module(module, in_size=(8, 8))(x), module(x))
            True
        """
        modules = {torch.nn.Conv1d: 1, torch.nn.Conv2d: 2, torch.nn.Conv3d: 3}
        found = next((ndim for kind, ndim in modules.items() if isinstance(module, kind)), None)
        if found is None or cls._dimensions not in (None, found):
            expected = f"Conv{cls._dimensions}d" if cls._dimensions else "Conv1d, Conv2d or Conv3d"
            raise ArgumentTypeError(f"module: expected a torch.nn.{expected}, got {type(module).__name__}")
        assert isinstance(module, torch.nn.modules.conv._ConvNd)  # always true here; for the type checker
        return cls(
            module.weight,
            in_size,
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            groups=module.groups,
            padding_mode=module.padding_mode,
        )

    # ------------------------------------------------------------------ the operator

    def apply(self, x: Tensor) -> Tensor:
        """The convolution of ``x``."""
        items, batch = self._items_to_channels(x, self.in_shape)
        by_fft = self._uses_fft(len(items), transposed=False)
        y = self._grid.apply(items, self._spectrum()) if by_fft else self._direct(items)
        return self._channels_to_items(y, batch, self.out_shape)

    def adjoint(self, y: Tensor) -> Tensor:
        """The transposed convolution of ``y``, of the inputs' size, and the adjoint of the padding."""
        items, batch = self._items_to_channels(y, self.out_shape)
        by_fft = self._uses_fft(len(items), transposed=True)
        x = self._grid.adjoint(items, self._spectrum()) if by_fft else self._direct_adjoint(items)
        return self._channels_to_items(x, batch, self.in_shape)

    def _direct(self, x: Tensor) -> Tensor:
        """Torch's convolution of ``(items, kernels * c_in, *spatial_in)``, a group of channels for every kernel."""
        symmetric, extra = self._split_padding()
        x = pad(x, extra, self.padding_mode)
        weight, groups = self._grouped_weight()
        return _CONV[self.ndim](x, weight, None, self.stride, symmetric, self.dilation, groups)

    def _direct_adjoint(self, y: Tensor) -> Tensor:
        symmetric, extra = self._split_padding()
        if self._flips:
            margins = tuple(e - 1 - p for e, p in zip(self.kernel_extent, symmetric, strict=True))
            weight, groups = self._flipped_weight()
            x = _CONV[self.ndim](y, weight, None, 1, margins, self.dilation, groups)
            return pad_adjoint(x, extra, self.padding_mode)
        # Several input sizes give the same output size when stride > 1; output_padding restores the one we have.
        output_padding = [
            (size + left + right - extent) % stride
            for size, (left, right), extent, stride in zip(
                self.spatial_in, self.padding, self.kernel_extent, self.stride, strict=True
            )
        ]
        weight, groups = self._grouped_weight()
        x = _CONV_TRANSPOSE[self.ndim](
            y, weight.conj(), None, self.stride, symmetric, output_padding, groups, self.dilation
        )
        return pad_adjoint(x, extra, self.padding_mode)

    @property
    def _flips(self) -> bool:
        """Whether the adjoint is better written as a convolution with the flipped kernels.

        At stride 1 the two are the same sums. On CPUs torch's convolution is the faster one, by 1.5 to 10 times, as
        long as the channels to be gathered are few (measured by benchmarks/convolution_backend.py): float64 gathers
        them in memory, and so does everything in three dimensions.
        """
        symmetric, _ = self._split_padding()
        return (
            self.device.type == "cpu"
            and self.ndim <= 2
            and all(step == 1 for step in self.stride)
            and all(p < e for p, e in zip(symmetric, self.kernel_extent, strict=True))
            and (self.dtype.to_real() != torch.float64 or self.c_out <= self.c_in)
        )

    def _flipped_weight(self) -> tuple[Tensor, int]:
        """The kernels of the adjoint as a convolution, kept until the weight changes."""
        may_cache = _may_cache(self.weight)
        cached: tuple[Tensor, int, Tensor] | None = self.__dict__.get("_cached_flipped") if may_cache else None
        weight, groups = self._grouped_weight()
        if cached is None or cached[0] is not self.weight or cached[1] != self.weight._version:
            size = weight.shape[2:]
            flipped = weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2).flip(tuple(range(-self.ndim, 0)))
            flipped = flipped.conj().resolve_conj().reshape(groups * weight.shape[1], -1, *size)
            if not may_cache:
                return flipped, groups
            cached = (self.weight, self.weight._version, flipped)
            self._cached_flipped = cached
        return cached[2], groups

    def _split_padding(self) -> tuple[tuple[int, ...], Pairs]:
        """The padding that torch's convolution does itself, and what is left to be done before it.

        The split is the one of torch, whose result depends on it in the last bit.
        """
        if self.padding_mode != "zeros":
            return (0,) * self.ndim, self.padding
        symmetric = tuple(min(pair) for pair in self.padding)
        return symmetric, tuple((left - s, right - s) for (left, right), s in zip(self.padding, symmetric, strict=True))

    # ------------------------------------------------------------------ the FFT backend

    @property
    def _grid(self) -> FrequencyGrid:
        grid: FrequencyGrid | None = self.__dict__.get("_cached_grid")
        if grid is None:
            grid = FrequencyGrid.of(
                self.spatial_in, self.kernel_extent, self.padding, self.padding_mode, self.stride, self.dilation
            )
            self._cached_grid = grid
        return grid

    def _uses_fft(self, items: int, transposed: bool) -> bool:
        """Whether the FFT serves ``items`` batch items, by request or because it should be clearly faster."""
        if self.backend == "direct" or self.dtype in _HALF:
            return False
        if self.backend == "fft":
            return True
        key = (items, transposed, _may_cache(self.weight))
        choices: dict[tuple[int, bool, bool], bool] = self.__dict__.setdefault("_cached_choices", {})
        if key not in choices:
            groups = math.prod(self.batch_shape) * self.groups
            c_out, c_in = self.c_out // self.groups, self.c_in // self.groups
            # The model was measured on CPUs. Elsewhere float32's constants, the ones that favour torch, stand for all.
            dtype = self.dtype if self.device.type == "cpu" else torch.float32
            taps, cells = math.prod(self.kernel_size), math.prod(self.spatial_out)
            if transposed and self._flips:
                direct = direct_cost(dtype, groups, c_in, c_out, taps, math.prod(self.spatial_in), items, False)
            else:
                direct = direct_cost(dtype, groups, c_out, c_in, taps, cells, items, transposed)
            by_fft = fft_cost(dtype, groups, c_out, c_in, self._grid.grid, items, kernels_too=not key[2])
            choices[key] = by_fft * _FFT_MARGIN < direct
        return choices[key]

    def _spectrum(self) -> Tensor:
        """The symbol of the kernels, kept until the weight changes."""
        weight, groups = self._grouped_weight()
        weight = weight.reshape(groups, self.c_out // self.groups, *weight.shape[1:])
        if not _may_cache(self.weight):
            return self._grid.spectrum(weight)
        cached: tuple[Tensor, int, Tensor] | None = self.__dict__.get("_cached_spectrum")
        if cached is None or cached[0] is not self.weight or cached[1] != self.weight._version:
            cached = (self.weight, self.weight._version, self._grid.spectrum(weight))
            self._cached_spectrum = cached
        return cached[2]

    # ------------------------------------------------------------------ a kernel per batch item

    def _grouped_weight(self) -> tuple[Tensor, int]:
        """All kernels in one weight, one behind the other, and the number of groups that keeps them apart."""
        kernels = math.prod(self.batch_shape)
        weight = self.weight.reshape(kernels * self.c_out, *self.weight.shape[-self.ndim - 1 :])
        return weight, kernels * self.groups

    def _batch_order(self, batch_ndim: int) -> tuple[list[int], list[int]]:
        """The batch dimensions that share their kernels, and those along which the kernels differ."""
        first = batch_ndim - len(self.batch_shape)
        own = [first + dim for dim, size in enumerate(self.batch_shape) if size > 1]
        return [dim for dim in range(batch_ndim) if dim not in own], own

    def _items_to_channels(self, x: Tensor, item_shape: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
        """``(*batch, c, *spatial)`` as ``(items, kernels * c, *spatial)``, and the broadcast batch dimensions."""
        batch = tuple(x.shape[: x.ndim - len(item_shape)])
        if self.batch_shape:
            batch = tuple(torch.broadcast_shapes(batch, self.batch_shape))
            x = x.expand(*batch, *item_shape)
        shared, own = self._batch_order(len(batch))
        if own:
            x = x.permute(*shared, *own, *range(len(batch), x.ndim))
        items, kernels = math.prod([batch[dim] for dim in shared]), math.prod([batch[dim] for dim in own])
        return x.reshape(items, kernels * item_shape[0], *item_shape[1:]), batch

    def _channels_to_items(self, y: Tensor, batch: tuple[int, ...], item_shape: tuple[int, ...]) -> Tensor:
        """The inverse of :meth:`_items_to_channels`."""
        shared, own = self._batch_order(len(batch))
        order = shared + own
        y = y.reshape(*(batch[dim] for dim in order), *item_shape)
        if not own:
            return y
        return y.permute(*(order.index(dim) for dim in range(len(batch))), *range(len(batch), y.ndim))

    # ------------------------------------------------------------------ sizes and text

    def _output_size(self) -> tuple[int, ...]:
        sizes = tuple(
            (size + left + right - extent) // stride + 1
            for size, (left, right), extent, stride in zip(
                self.spatial_in, self.padding, self.kernel_extent, self.stride, strict=True
            )
        )
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


class Conv2d(Convolution):
    """Convolution of ``(*batch, c_in, height, width)``; see :class:`Convolution`.

    Example:
        >>> A = lsconv.Conv2d(torch.randn(8, 3, 5, 5), in_size=(32, 32), stride=2, padding=2)
        >>> x = torch.randn(10, 3, 32, 32)
        >>> torch.equal(A(x), torch.nn.functional.conv2d(x, A.weight, stride=2, padding=2))
        True
    """

    _dimensions = 2


class Conv3d(Convolution):
    """Convolution of ``(*batch, c_in, depth, height, width)``; see :class:`Convolution`.

    Example:
        >>> lsconv.Conv3d(torch.ones(1, 1, 3, 3, 3), in_size=(4, 4, 4), padding=1)
        Conv3d((1, 4, 4, 4) -> (1, 4, 4, 4), kernel=(3, 3, 3), padding=(1, 1, 1), torch.float32, cpu)
    """

    _dimensions = 3


def _may_cache(weight: Tensor) -> bool:
    """Whether what is computed from ``weight`` now may be used again.

    Not while autograd follows the weight, nor for inference tensors, which do not count their changes and cannot
    enter a graph later, nor while torch.compile traces, which cannot see either.
    """
    if torch.compiler.is_compiling():
        return False
    if weight.requires_grad and torch.is_grad_enabled():
        return False
    return not (weight.is_inference() or torch.is_inference_mode_enabled())
