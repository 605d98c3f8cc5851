r"""The spectral norm of a convolution layer, padding and stride included, held at one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lsconv.errors import ArgumentError
from lsconv.inverse.functions.spectral_norm import leading_vector
from lsconv.operators.convolution import Convolution, module_convolution
from lsconv.operators.modules import ConvModule, check_module, convolution_arguments

__all__ = ["spectral_norm"]


def spectral_norm(module: ConvModule, in_size: int | Sequence[int], *, steps: int = 6) -> ConvModule:
    r"""Divide the weight of a convolution module by the spectral norm of the convolution, as a parametrization.

    The norm is that of the linear map on images of ``in_size``, with stride, padding, dilation and groups, where
    ``torch.nn.utils.parametrizations.spectral_norm`` takes that of the weight reshaped to a matrix, which bounds
    nothing tightly. It is computed once, to 1e-4, and while the module trains followed by a few steps of Lanczos from
    the last singular vector: the largest singular values of a convolution lie close together, and power iterations lag
    behind. Gradients pass through the norm.

    Args:
        module: a ``torch.nn.Conv*d`` or ``ConvTranspose*d``.
        in_size: spatial size of its inputs.
        steps: steps of Lanczos at every use of the weight in training; each applies the convolution and its adjoint
            twice.

    Returns:
        The module; ``torch.nn.utils.parametrize.remove_parametrizations(module, "weight")`` undoes it.

    Raises:
        ArgumentTypeError: ``module`` is no convolution module.
        ArgumentError: ``steps`` is below one.

    Source:
        Miyato et al., "Spectral normalization for generative adversarial networks", ICLR 2018, for the weight that is
        divided in training.

    Example:
        >>> layer = lsconv.nn.spectral_norm(torch.nn.Conv2d(2, 4, 3, padding=1), in_size=(12, 12))
        >>> A = lsconv.Conv2d.from_module(layer, (12, 12))
        >>> bool((torch.linalg.matrix_norm(A.to_dense(), 2) - 1).abs() < 1e-3)
        True
    """
    check_module(module, "module")
    if steps < 1:
        raise ArgumentError(f"steps: expected at least one, got {steps}")
    parametrize.register_parametrization(module, "weight", _Normalised(module, in_size, steps))
    return module


class _Normalised(nn.Module):
    """The parametrization ``weight / norm``; its buffer v is the leading right singular vector."""

    v: Tensor

    def __init__(self, module: ConvModule, in_size: int | Sequence[int], steps: int) -> None:
        super().__init__()
        sizes = (in_size,) * len(module.kernel_size) if isinstance(in_size, int) else in_size
        self._given = convolution_arguments(module, sizes)
        # of a transposed module this is the adjoint, which has the same norm
        A = module_convolution(Convolution, module.weight, *self._given)
        self._given[0]["check_finite"] = False
        self.steps = steps
        # the relative error of the norm is the square of that of its singular vector
        self.register_buffer("v", leading_vector(A, rtol=1e-2, max_iter=500))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight divided by the norm."""
        A = module_convolution(Convolution, weight, *self._given)
        if self.training:
            self.v.copy_(leading_vector(A, rtol=0.0, max_iter=self.steps, start=self.v, warning=False))
        # a copy, because the backward pass reads v after the next use of the weight has overwritten it
        return weight / torch.linalg.vector_norm(A.apply(self.v.clone()))
