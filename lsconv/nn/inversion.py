r"""Modules that invert a convolution module inside a network: pseudo-inverse, Tikhonov, range-null decomposition.

Every module wraps a ``torch.nn.Conv*d`` or ``ConvTranspose*d``, registers it as a submodule and follows its weight:
gradients reach it by implicit differentiation, and the setup of the solve (the plan) is made again only when the
weight, the damping, a size, the dtype or the device has changed. Writing through ``weight.data`` is a change that torch
does not count: call ``refresh()`` after it.

Solves run in float32 or better, whatever autocast says. Under torch.compile the solve is a graph break. Items that hold
NaN or infinity are NaN in the answer, with a :class:`lsconv.ConvergenceWarning`; others are not touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from lsconv.errors import ArgumentError, ArgumentTypeError, ShapeError, unreported, warn
from lsconv.inverse.lstsq import lstsq
from lsconv.inverse.pseudo_inverse import PseudoInverse as _Operator
from lsconv.inverse.pseudo_inverse import pinv
from lsconv.inverse.tikhonov import penalised_inverse, tikhonov
from lsconv.krylov.gradients.parameters import parameters_of
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import on_parts
from lsconv.operators.convolution import Convolution
from lsconv.operators.modules import ConvModule, TransposedModule, check_module, input_size
from lsconv.operators.transforms import untraced

__all__ = ["Inversion", "PseudoInverse", "RangeNull", "Tikhonov"]

# Without damping, x is linear in the weight only for relative changes below 1 / condition, which at this condition are
# no larger than a step of training.
_MOST_CONDITION = 1e3


class Inversion(nn.Module):
    """The base of the modules: the operator of a convolution module for data of a given size, and its plan."""

    def __init__(self, conv: ConvModule, in_size: int | Sequence[int] | None, method: str) -> None:
        super().__init__()
        self.conv = check_module(conv, "conv")
        self.method = method
        dimensions = len(conv.kernel_size)
        self.in_size: tuple[int, ...] | None = None
        if in_size is not None:
            self.in_size = (in_size,) * dimensions if isinstance(in_size, int) else tuple(in_size)
            if len(self.in_size) != dimensions:
                raise ShapeError(f"in_size: expected {dimensions} sizes, got {self.in_size}")
        self._plan_count, self._warned = 0, False
        self.refresh()

    def refresh(self) -> None:
        """Forget the plan; needed only after a change of the weight that torch does not count."""
        self._cached: tuple[Any, tuple[Tensor, ...], Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None}  # a copy or a pickle makes a plan of its own

    def _operator(self, spatial_out: Sequence[int], in_size: Sequence[int] | None = None) -> LinearOperator:
        size = self.in_size or in_size or input_size(self.conv, spatial_out)
        A = Convolution.from_module(self.conv, size)
        if A.dtype in (torch.float16, torch.bfloat16):
            A = A.to(dtype=torch.float32)
        if A.out_shape[1:] != tuple(spatial_out):
            raise ShapeError(f"y: spatial size {tuple(spatial_out)} is not what {self.conv} makes of in_size "
                             f"{A.in_shape[1:]}, which is {A.out_shape[1:]}")  # fmt: skip
        return A

    def _without_bias(self, y: Tensor, A: LinearOperator) -> Tensor:
        """``y - bias``, ``(*batch, c_out, *spatial_out)``, in the precision of the solve."""
        y = _in_precision(y, A)
        bias = self.conv.bias
        return y if bias is None else y - bias.to(A.dtype).reshape(-1, *(1 for _ in A.out_shape[1:]))

    def _inverse(self, A: LinearOperator, y: Tensor, damp: float | Tensor, *sources: Tensor) -> Tensor:
        """The solution, ``(*batch, *in_shape)``, for y, ``(*batch, *out_shape)``, by the cached plan if it holds."""
        sources = (self.conv.weight, *sources)
        if any(map(is_functorch_wrapped_tensor, sources)):
            # under torch.func values cannot be compared, so that no plan is cached
            return lstsq(A, y, damp=damp, method=self.method, check_finite=False).x
        fixed = damp.detach() if isinstance(damp, Tensor) else damp
        undamped = not isinstance(damp, Tensor) and damp == 0
        trained = undamped and self.conv.weight.requires_grad and torch.is_grad_enabled()

        # A^{H+} = (A^+)^H: a transposed module is inverted by the plan of the convolution that it transposes.
        transposed = isinstance(self.conv, TransposedModule)
        B = A.H if transposed else A

        def make() -> _Operator:
            inverse = pinv(B, damp=fixed, method=self.method)
            if trained:
                self._warn_if_ill_conditioned(B, inverse)
            return inverse

        inverse = self._cached_plan(B, sources, make, trained).with_gradients_by(B, damp)
        return (inverse.H if transposed else inverse)(y)

    @torch.no_grad()
    def _warn_if_ill_conditioned(self, A: LinearOperator, inverse: _Operator) -> None:
        """Warn once, where a small singular value that is inverted makes the gradient by the weight meaningless."""
        self._plan_count += 1
        if self._warned or self._plan_count & (self._plan_count - 1):  # at plans 1, 2, 4, 8, ... as training goes on
            return
        condition = _condition(A, inverse)
        if condition > _MOST_CONDITION:
            self._warned = True
            warn(
                f"{type(self).__name__}: the smallest singular value that is inverted is {1 / condition:.0e} of the "
                f"largest. Without damping the gradient by conv.weight grows with the square of their ratio and holds "
                f"for changes of the weight below it alone: training follows noise. Train with lsconv.nn.Tikhonov, "
                f"whose damp= of 1e-2 to 1e-1 of the largest singular value keeps it tame, or under torch.no_grad()",
                UserWarning,
            )

    def _cached_plan(
        self, A: LinearOperator, sources: tuple[Tensor, ...], make: Callable[[], Any], extra_key: Any = None
    ) -> Any:
        """Return ``make()``, cached until one of the sources or the key changes."""
        if any(not s.is_leaf or s.is_inference() for s in sources):
            return make()  # such a weight is another tensor at every call, or has no version counter
        state = [(s.data_ptr(), s._version, s.dtype, s.device) for s in sources]
        key = (state, A.in_shape, A.dtype, self.method, extra_key)
        cached = self._cached
        if (
            cached is None
            or cached[0] != key
            or len(cached[1]) != len(sources)
            or any(a is not b for a, b in zip(cached[1], sources, strict=True))
        ):
            # the sources stay alive with the plan, so that no other tensor can take their addresses
            self._cached = cached = key, sources, make()
        return cached[2]

    def _result(self, x: Tensor, y: Tensor) -> Tensor:
        """Convert x to the dtype of ``y``; under autocast it keeps that of the solve."""
        if torch.is_autocast_enabled(y.device.type):
            return x
        return x.to(y.dtype.to_complex() if x.is_complex() and not y.is_complex() else y.dtype)

    def _spatial_size(self, y: Tensor) -> tuple[int, ...]:
        dimensions = len(self.conv.kernel_size)
        if not isinstance(y, Tensor):
            raise ArgumentTypeError(f"y: expected a torch.Tensor, got {type(y).__name__}")
        if y.ndim <= dimensions or y.shape[-dimensions - 1] != self.conv.out_channels:
            raise ShapeError(f"y: expected (*batch, {self.conv.out_channels}, ...) with {dimensions} spatial "
                             f"dimension(s), got {tuple(y.shape)}")  # fmt: skip
        return tuple(y.shape[-dimensions:])


def _condition(A: LinearOperator, inverse: _Operator) -> float:
    """A lower bound of ``||A|| ||A^+||``, by power iterations: six products for ``||A||``, two for ``||A^+||``.

    It is within a third where the smallest singular value is well separated from the others.
    """
    generator = torch.Generator().manual_seed(0)

    def largest(B: LinearOperator, applications: int) -> float:
        v = torch.randn(*B.batch_shape, *B.in_shape, dtype=B.dtype, generator=generator).to(B.device)
        size = 0.0
        for _ in range(applications):
            v = B(v / torch.linalg.vector_norm(v).clamp_min(torch.finfo(B.dtype).tiny))
            size, B = float(torch.linalg.vector_norm(v)), B.H
        return size

    with unreported():
        return largest(A, 6) * largest(inverse, 2)


def _in_precision(t: Tensor, A: LinearOperator) -> Tensor:
    """Convert a tensor to the precision of A; a complex tensor stays complex."""
    return t.to(A.dtype.to_complex() if t.is_complex() else A.dtype)


class PseudoInverse(Inversion):
    r"""The minimum-norm least-squares solution of ``conv(x) = y``: :math:`x = A^+ (y - \mathrm{bias})`.

    It is for weights that are fixed, or whose convolution is well conditioned (fewer outputs than inputs, or more).
    Square convolutions ("same" padding, as many channels) have singular values that fall to next to nothing; noise in y
    is multiplied by their inverse, the gradient by the weight by its square. The module warns once when it is to be
    trained with one whose condition exceeds 1000: use :class:`Tikhonov` there.

    Args:
        conv: the convolution module.
        in_size: spatial size of x; None: the smallest that ``conv`` maps to the size of y.
        method: as in :func:`lsconv.lstsq`.

    Shape:
        ``(*batch, c_out, *spatial_out)`` to ``(*batch, c_in, *in_size)``.

    Raises:
        ArgumentTypeError: ``conv`` is no convolution module.
        ShapeError: y or ``in_size`` do not fit ``conv``.

    Example:
        >>> conv = torch.nn.Conv2d(4, 8, 3)
        >>> x = torch.randn(2, 4, 16, 16)
        >>> torch.allclose(lsconv.nn.PseudoInverse(conv)(conv(x)), x, atol=1e-3)
        True
    """

    def __init__(self, conv: ConvModule, in_size: int | Sequence[int] | None = None, *, method: str = "auto") -> None:
        super().__init__(conv, in_size, method)

    @untraced
    def forward(self, y: Tensor) -> Tensor:
        """The solution x, ``(*batch, c_in, *in_size)``, for ``y``, ``(*batch, c_out, *spatial_out)``."""
        with torch.autocast(y.device.type, enabled=False):
            A = self._operator(self._spatial_size(y))
            x = self._inverse(A, self._without_bias(y, A), 0.0)
        return self._result(x, y)


class Tikhonov(Inversion):
    r"""Regularised inversion with a damping that can be learned; it can be trained through for every weight.

    Singular values below damp are not inverted, so that x and its gradients are bounded by ``1 / damp`` and its square.
    With damp well below the smallest singular value it is :class:`PseudoInverse`.

    .. math:: \min_x \|\mathrm{conv}(x) - y\|^2 + \mathrm{damp}^2 \|L (x - x_{prior})\|^2

    Args:
        conv: the convolution module.
        damp: the damping to begin with, > 0.
        in_size: spatial size of x; None: the smallest that ``conv`` maps to the size of y.
        L: the penalty: a convolution module without bias (whose weight is then learned), or a LinearOperator, or None
            for the identity.
        learnable: make the damping a parameter. It is ``log_damp``, the logarithm, so that it stays positive.
        method: as in :func:`lsconv.lstsq`.

    Shape:
        ``(*batch, c_out, *spatial_out)`` to ``(*batch, c_in, *in_size)``.

    Raises:
        ArgumentError: ``damp`` is not positive, or L has a bias.
        ArgumentTypeError: ``conv`` is no convolution module.
        ShapeError: y or ``in_size`` do not fit ``conv``.

    Example:
        >>> layer = lsconv.nn.Tikhonov(torch.nn.Conv1d(2, 2, 5, padding=2), damp=0.1)
        >>> layer(torch.randn(3, 2, 32)).sum().backward()
        >>> layer.log_damp.grad is not None, layer.conv.weight.grad is not None
        (True, True)
    """

    def __init__(
        self,
        conv: ConvModule,
        damp: float = 0.1,
        in_size: int | Sequence[int] | None = None,
        *,
        L: ConvModule | LinearOperator | None = None,
        learnable: bool = True,
        method: str = "auto",
    ) -> None:
        super().__init__(conv, in_size, method)
        if not (damp > 0 and math.isfinite(damp)):
            raise ArgumentError(f"damp: expected a finite number > 0, got {damp}")
        if isinstance(L, ConvModule) and L.bias is not None:
            raise ArgumentError("L: expected a convolution without bias, got one with a bias (bias=False)")
        self.L = L
        double = conv.weight.dtype in (torch.float64, torch.complex128)
        logarithm = torch.tensor(math.log(damp), dtype=torch.float64 if double else torch.float32)
        self.log_damp = nn.Parameter(logarithm.to(conv.weight.device), requires_grad=learnable)

    @property
    def damp(self) -> Tensor:
        """The damping."""
        return self.log_damp.exp()

    @untraced
    def forward(self, y: Tensor, x_prior: Tensor | None = None) -> Tensor:
        """The solution x for ``y``, drawn towards ``x_prior``, which has the shape of x."""
        with torch.autocast(y.device.type, enabled=False):
            A = self._operator(self._spatial_size(y))
            data, damp = self._without_bias(y, A), self.damp
            prior = None if x_prior is None else _in_precision(x_prior, A)
            over_complex = not A.is_complex and any(t is not None and t.is_complex() for t in (data, prior))
            if self.L is not None and not over_complex:
                x = self._penalised(A, self.L, data, damp, prior)
            else:
                misfit = data if prior is None else data - A(prior)
                if self.L is None:
                    x = self._inverse(A, misfit, damp, self.log_damp)
                else:
                    L = self.L
                    x = on_parts(
                        lambda part: self._penalised(A, L, part, damp), misfit, len(A.out_shape), A.batch_shape
                    )
                x = x if prior is None else prior + x
        return self._result(x, y)

    def _penalised(
        self, A: LinearOperator, L: ConvModule | LinearOperator, y: Tensor, damp: Tensor, x_prior: Tensor | None = None
    ) -> Tensor:
        given = Convolution.from_module(L, A.in_shape[1:]) if isinstance(L, ConvModule) else L
        operator = given.to(A.device, A.dtype)
        sources = (self.conv.weight, self.log_damp, *([L.weight] if isinstance(L, ConvModule) else parameters_of(L)))
        if any(map(is_functorch_wrapped_tensor, sources)):
            return tikhonov(A, y, damp, L=operator, x_prior=x_prior, method=self.method).x
        solve = self._cached_plan(A, sources, lambda: penalised_inverse(A, operator, damp, method=self.method), L)
        x: Tensor = solve(A, y, operator, damp, x_prior)
        return x


class RangeNull(Inversion):
    r"""Range-null decomposition: the part of x that y determines, completed by the null-space part of z.

    .. math:: x = A^+ (y - \mathrm{bias}) + (I - A^+ A) z = z + A^+ (y - \mathrm{bias} - A z)

    Whatever z is, x reproduces y wherever ``conv`` can. Nothing is damped: it warns as :class:`PseudoInverse` does when
    the weight is to be trained and is badly conditioned. Wang, Yu and Zhang, "Zero-shot image restoration using
    denoising diffusion null-space model", ICLR (2023), for its use with generative models.

    Args:
        conv: the convolution module.
        in_size: spatial size of x; None: that of z.
        method: as in :func:`lsconv.lstsq`.

    Shape:
        y ``(*batch, c_out, *spatial_out)`` and z ``(*batch, c_in, *in_size)`` to ``(*batch, c_in, *in_size)``.

    Raises:
        ArgumentTypeError: ``conv`` is no convolution module.
        ShapeError: y or z do not fit ``conv``.

    Example:
        >>> conv = torch.nn.Conv2d(3, 1, 3, stride=2, padding=1)
        >>> y, z = torch.randn(2, 1, 8, 8), torch.randn(2, 3, 16, 16)
        >>> torch.allclose(conv(lsconv.nn.RangeNull(conv)(y, z)), y, atol=1e-3)
        True
    """

    def __init__(self, conv: ConvModule, in_size: int | Sequence[int] | None = None, *, method: str = "auto") -> None:
        super().__init__(conv, in_size, method)

    @untraced
    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """``A^+ (y - bias) + (I - A^+ A) z``, ``(*batch, c_in, *in_size)``."""
        spatial = self._spatial_size(y)
        with torch.autocast(y.device.type, enabled=False):
            A = self._operator(spatial, tuple(z.shape[-len(spatial) :]))
            z = _in_precision(z, A)
            x = z + self._inverse(A, self._without_bias(y, A) - A(z), 0.0)
        return self._result(x, y)
