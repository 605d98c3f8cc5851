r"""Finite differences as operators: the L of ``||A x - y||^2 + damp^2 ||L x||^2``.

Both are convolutions with small kernels, and say so: ``kernels``, ``padding`` and ``padding_mode`` are those of the
convolution that gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lsconv.errors import ArgumentError, ShapeError
from lsconv.operators.base import LinearOperator

__all__ = ["Gradient", "Laplacian"]

# The padding mode for each boundary: the border cell repeated, the other side, or zero.
_PADDING_MODES = {"neumann": "replicate", "periodic": "circular", "dirichlet": "zeros"}


class _Difference(LinearOperator):
    """The base of gradient and Laplacian: the axes, the boundary and the spacing."""

    def __init__(
        self,
        shape: Sequence[int],
        ndim: int,
        boundary: str,
        spacing: float | Sequence[float],
        dtype: torch.dtype | None,
        device: torch.device | str,
        components: tuple[int, ...],
    ) -> None:
        shape = tuple(int(size) for size in shape)
        if not 1 <= ndim <= len(shape):
            raise ShapeError(f"ndim: {ndim} spatial axes do not fit shape {shape}; pass ndim=1 to {len(shape)}")
        if boundary not in _PADDING_MODES:
            raise ArgumentError(f"boundary: expected one of {', '.join(map(repr, _PADDING_MODES))}, got {boundary!r}")
        steps = (spacing,) * ndim if isinstance(spacing, (int, float)) else tuple(spacing)
        if len(steps) != ndim or min(steps) <= 0:
            raise ArgumentError(f"spacing: expected a positive number or {ndim} of them, got {spacing!r}")
        super().__init__(
            shape,
            (*components, *shape),
            dtype=dtype,
            device=device,
        )
        self.ndim = ndim
        self.boundary = boundary
        self.spacing = tuple(float(step) for step in steps)

    @property
    def padding_mode(self) -> str:
        """The boundary in the words of a convolution: ``"replicate"``, ``"circular"`` or ``"zeros"``."""
        return _PADDING_MODES[self.boundary]

    def _axes(self) -> list[tuple[int, float]]:
        """The differenced axes, counted from the last, with their spacings."""
        return list(zip(range(-self.ndim, 0), self.spacing, strict=True))

    def _beyond(self, x: Tensor, axis: int, right: bool) -> Tensor:
        """Return the cells one step outside the right (or left) border along ``axis``."""
        last = x.shape[axis] - 1
        if self.boundary == "dirichlet":
            return torch.zeros_like(x.narrow(axis, 0, 1))
        return x.narrow(axis, last if right == (self.boundary == "neumann") else 0, 1)

    def _neighbour(self, x: Tensor, axis: int, right: bool) -> Tensor:
        """Return for every cell its right (or left) neighbour."""
        inside = x.narrow(axis, 1 if right else 0, x.shape[axis] - 1)
        beyond = self._beyond(x, axis, right)
        return torch.cat([inside, beyond] if right else [beyond, inside], dim=axis)


class Gradient(_Difference):
    r"""Forward differences along the last ``ndim`` axes, one component per axis.

    .. math:: (G x)_a[i] = (x[i + e_a] - x[i]) / h_a

    Beyond the border x continues as ``boundary`` says: ``"neumann"`` repeats the border cell (the last difference is
    zero), ``"periodic"`` wraps around, ``"dirichlet"`` is zero.

    Args:
        shape: shape of one input item, channels included.
        ndim: number of spatial axes, the last ones of ``shape``.
        boundary: ``"neumann"``, ``"periodic"`` or ``"dirichlet"``.
        spacing: distance h of neighbouring cells, a number or one per spatial axis.
        dtype: dtype of inputs and outputs; when omitted that of what it meets, and torch's default until then.
        device: device of inputs and outputs.

    Attributes:
        kernels: the convolution kernels, ``(ndim, *(2,) * ndim)``.
        padding: their padding, ``((0, 1),) * ndim``.
        padding_mode: their padding mode.

    Raises:
        ShapeError: ``shape`` has fewer than ``ndim`` axes.
        ArgumentError: an unknown boundary or a spacing that is not positive.

    Source:
        Chambolle, "An algorithm for total variation minimization and applications" (2004), for the Neumann case.

    Example:
        >>> G = lsconv.Gradient((2, 3))
        >>> G(torch.tensor([[1.0, 2.0, 4.0], [1.0, 3.0, 6.0]]))
        tensor([[[0., 1., 2.],
                 [0., 0., 0.]],
        <BLANKLINE>
                [[1., 2., 0.],
                 [2., 3., 0.]]])
    """

    _only_torch = True

    def __init__(
        self,
        shape: Sequence[int],
        ndim: int = 2,
        boundary: str = "neumann",
        spacing: float | Sequence[float] = 1.0,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(shape, ndim, boundary, spacing, dtype, device, (ndim,))
        self.padding = ((0, 1),) * ndim

    @property
    def kernels(self) -> Tensor:
        """The kernel of every component."""
        kernels = torch.zeros(self.ndim, *(2,) * self.ndim, dtype=self.dtype, device=self.device)
        origin = (0,) * self.ndim
        for component, step in enumerate(self.spacing):
            right = tuple(int(axis == component) for axis in range(self.ndim))
            kernels[component][origin] = -1 / step
            kernels[component][right] = 1 / step
        return kernels

    def apply(self, x: Tensor) -> Tensor:
        """The differences of ``x``, stacked in front of the item's axes."""
        component = -len(self.out_shape)
        result = torch.stack([x] * self.ndim, component).neg_()
        for index, (axis, step) in enumerate(self._axes()):
            part, last = result.select(component, index), x.shape[axis] - 1
            part.narrow(axis, 0, last).add_(x.narrow(axis, 1, last))
            part.narrow(axis, last, 1).add_(self._beyond(x, axis, right=True))
            part.div_(step)
        return result

    def adjoint(self, y: Tensor) -> Tensor:
        """The negative divergence of ``y``."""
        parts = y.unbind(dim=-len(self.out_shape))
        total = torch.zeros_like(parts[0])
        for part, (axis, step) in zip(parts, self._axes(), strict=True):
            n = part.shape[axis]
            inside, last = part.narrow(axis, 0, n - 1), part.narrow(axis, n - 1, 1)
            # The adjoint adds difference i to x[i + 1] and subtracts it from x[i]; the last one depends on the
            # boundary.
            total.narrow(axis, 1, n - 1).add_(inside, alpha=1 / step)
            total.narrow(axis, 0, n - 1).sub_(inside, alpha=1 / step)
            if self.boundary != "neumann":
                total.narrow(axis, n - 1, 1).sub_(last, alpha=1 / step)
            if self.boundary == "periodic":
                total.narrow(axis, 0, 1).add_(last, alpha=1 / step)
        return total


class Laplacian(_Difference):
    r"""The sum of the second differences along the last ``ndim`` axes; self-adjoint, negative semi-definite.

    .. math:: (\Delta x)[i] = \sum_a (x[i + e_a] - 2 x[i] + x[i - e_a]) / h_a^2

    Beyond the border x continues as in :class:`Gradient`. For ``"neumann"`` and ``"periodic"`` it is ``-G^H G``.

    Args:
        shape: shape of one input item, channels included.
        ndim: number of spatial axes, the last ones of ``shape``.
        boundary: ``"neumann"``, ``"periodic"`` or ``"dirichlet"``.
        spacing: distance h of neighbouring cells, a number or one per spatial axis.
        dtype: dtype of inputs and outputs; when omitted that of what it meets, and torch's default until then.
        device: device of inputs and outputs.

    Attributes:
        kernels: the convolution kernel, ``(1, *(3,) * ndim)``.
        padding: its padding, ``((1, 1),) * ndim``.
        padding_mode: its padding mode.

    Raises:
        ShapeError: ``shape`` has fewer than ``ndim`` axes.
        ArgumentError: an unknown boundary or a spacing that is not positive.

    Source:
        Strang, "The discrete cosine transform" (SIAM Review, 1999), for the boundaries.

    Example:
        >>> lsconv.Laplacian((4,), ndim=1, boundary="dirichlet").to_dense()
        tensor([[-2.,  1.,  0.,  0.],
                [ 1., -2.,  1.,  0.],
                [ 0.,  1., -2.,  1.],
                [ 0.,  0.,  1., -2.]])
    """

    _only_torch = True

    def __init__(
        self,
        shape: Sequence[int],
        ndim: int = 2,
        boundary: str = "neumann",
        spacing: float | Sequence[float] = 1.0,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(shape, ndim, boundary, spacing, dtype, device, ())
        self.padding = ((1, 1),) * ndim

    @property
    def kernels(self) -> Tensor:
        """The kernel of the second differences."""
        kernels = torch.zeros(1, *(3,) * self.ndim, dtype=self.dtype, device=self.device)
        for axis, step in enumerate(self.spacing):
            for offset, factor in ((0, 1.0), (1, -2.0), (2, 1.0)):
                cell = tuple(offset if other == axis else 1 for other in range(self.ndim))
                kernels[0][cell] += factor / step**2
        return kernels

    def apply(self, x: Tensor) -> Tensor:
        """The Laplacian of ``x``."""
        total = torch.zeros_like(x)
        for axis, step in self._axes():
            neighbours = self._neighbour(x, axis, right=True) + self._neighbour(x, axis, right=False)
            total = total + (neighbours - 2 * x) / step**2
        return total

    def adjoint(self, y: Tensor) -> Tensor:
        """Apply the operator, which is its own adjoint."""
        return self.apply(y)
