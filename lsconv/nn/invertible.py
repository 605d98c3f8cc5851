r"""A convolution layer that is inverted, with its exact log-determinant: for normalizing flows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from lsconv.errors import ArgumentError
from lsconv.inverse.functions.determinants import slogdet
from lsconv.nn.inversion import Inversion
from lsconv.operators.arguments import positive_ints
from lsconv.operators.convolution import Conv2d
from lsconv.operators.transforms import untraced

__all__ = ["InvertibleConv2d"]


class InvertibleConv2d(Inversion):
    r"""A zero-padded "same" convolution with as many outputs as inputs, its inverse and its Jacobian determinant.

    No mask and no triangular order: every kernel is allowed whose convolution is regular. :math:`\log|\det J|` does not
    depend on x; it is exact, by the determinant of the capacitance matrix of the border (:func:`lsconv.slogdet`), and
    trained through. The layer starts as the identity plus a little noise.

    Args:
        channels: number of channels.
        kernel_size: taps per axis, odd, an int or a pair.
        bias: add a constant per channel.
        device, dtype: of the parameters.

    Attributes:
        conv: the ``torch.nn.Conv2d``.

    Shape:
        ``(*batch, channels, height, width)`` to the same, in both directions.

    Raises:
        ArgumentError: a kernel of even size.
        MethodError: (of the determinant) a border of more than 4096 unknowns that no frequency separates, or a kernel
            that is too badly conditioned.

    Source:
        Hoogeboom, van den Berg, Welling, "Emerging convolutions for generative normalizing flows", ICML 2019, who mask
        the kernel, or wrap it around the image.

    Example:
        >>> layer = lsconv.nn.InvertibleConv2d(3, 3, dtype=torch.float64)
        >>> x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        >>> torch.allclose(layer.inverse(layer(x)), x)
        True
        >>> A = lsconv.Conv2d.from_module(layer.conv, (8, 8)).to_dense()
        >>> torch.allclose(layer.log_abs_det((8, 8)), torch.linalg.slogdet(A).logabsdet)
        True
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | Sequence[int] = 3,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        taps = positive_ints("kernel_size", kernel_size, 2)
        if any(k % 2 == 0 for k in taps):
            raise ArgumentError(f"kernel_size: expected odd numbers, which have a middle, got {taps}")
        conv = nn.Conv2d(channels, channels, (taps[0], taps[1]), padding="same", bias=bias, device=device, dtype=dtype)
        with torch.no_grad():
            conv.weight.mul_(0.1)
            conv.weight[:, :, taps[0] // 2, taps[1] // 2] += torch.eye(channels, device=device, dtype=dtype)
        super().__init__(conv, None, "auto")

    def forward(self, x: Tensor) -> Tensor:
        """``conv(x)``."""
        y: Tensor = self.conv(x)
        return y

    @untraced
    def inverse(self, y: Tensor) -> Tensor:
        """The x with ``conv(x) = y``, both ``(*batch, channels, height, width)``; caches the plan of a weight."""
        with torch.autocast(y.device.type, enabled=False):
            A = self._operator(self._spatial_size(y))
            x = self._inverse(A, self._without_bias(y, A), 0.0)
        return self._result(x, y)

    def log_abs_det(self, in_size: int | Sequence[int]) -> Tensor:
        r""":math:`\log|\det J|` on images of ``in_size``, a scalar with derivatives by the weight."""
        return slogdet(Conv2d.from_module(self.conv, in_size)).logabsdet

    def transform(self) -> Transform:
        """The layer as a ``torch.distributions`` transform of images ``(channels, height, width)``.

        Example:
            >>> layer = lsconv.nn.InvertibleConv2d(1)
            >>> base = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(1, 6, 6), 1.0), 3)
            >>> flow = torch.distributions.TransformedDistribution(base, [layer.transform()])
            >>> flow.log_prob(flow.rsample((5,))).shape
            torch.Size([5])
        """
        return _ConvolutionTransform(self)


class _ConvolutionTransform(Transform):
    """The transform ``y = conv(x)`` of images ``(channels, height, width)``."""

    domain = codomain = constraints.independent(constraints.real, 3)
    bijective = True

    def __init__(self, layer: InvertibleConv2d) -> None:
        super().__init__()
        self.layer = layer

    def _call(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def _inverse(self, y: Tensor) -> Tensor:
        return self.layer.inverse(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """The log-determinant, ``x.shape[:-3]``: the same value for all items."""
        return self.layer.log_abs_det(x.shape[-2:]).expand(x.shape[:-3])
