r"""Exact blurs and super-resolution for deepinv: its physics, with lsconv behind ``prox_l2`` and ``A_dagger``.

deepinv's own blurs solve their least-squares problems by fifty steps of conjugate gradients. These give the minimiser,

.. math:: \mathrm{prox}(z) = \arg\min_x \frac{\gamma}{2} \|Ax - y\|^2 + \frac{1}{2} \|x - z\|^2,
          \qquad \gamma = \mathrm{damp}^{-2},

to the accuracy of the dtype, for every boundary and any gamma, with gradients by implicit differentiation, and they
keep what they have set up for the filter. They need the package ``deepinv``: ``pip install "lsconv[deepinv]"``.

The pseudo-inverse of an ordinary blur amplifies noise without bound; ``damp`` is the remedy. Song et al.,
"Pseudoinverse-guided diffusion models for inverse problems" (ICLR 2023), for :meth:`Blur.pigdm_guidance`; Zhu et al.,
"Denoising diffusion models for plug-and-play image restoration" (2023), for the proximal steps of DiffPIR.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

import lsconv

try:
    from deepinv.physics import LinearPhysics
except ModuleNotFoundError as error:
    if error.name != "deepinv":
        raise
    raise ModuleNotFoundError('lsconv.deepinv: needs deepinv; pip install "lsconv[deepinv]"', name="deepinv") from None

__all__ = ["Blur", "SuperResolution"]

_PADDINGS = {
    "valid": None,
    "circular": "circular",
    "replicate": "replicate",
    "reflect": "reflect",
    "constant": "zeros",
    "zeros": "zeros",
}
# A sampler goes through some dozens of gamma for each image, and asks for the same ones again with the next image.
_MOST_PLANS = 128


class _PlanCache:
    """The last set-ups for a filter; a copy of the physics starts with none."""

    def __init__(self) -> None:
        self._plans: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        self._filter_version: tuple[Tensor, int] | None = None

    def plan(self, taps: Tensor, operator: Any, damp: Tensor) -> Any:
        """``pinv(operator, damp)`` for these values of the filter, with the factors of another damping where it can."""
        known = self._filter_version
        if known is None or known[0] is not taps or known[1] != taps._version:
            self._plans.clear()
            self._filter_version = (taps, taps._version)
        kind = (operator.in_shape, operator.dtype, operator.device)
        key = (*kind, tuple(damp.shape), *damp.flatten().tolist())
        plan = self._plans.pop(key, None)
        if plan is None:
            other = next((p for k, p in self._plans.items() if k[: len(kind)] == kind), None)
            plan = lsconv.pinv(operator, damp=damp) if other is None else other.with_damp(damp)
        self._plans[key] = plan
        if len(self._plans) > _MOST_PLANS:
            self._plans.popitem(last=False)
        return plan

    def __reduce__(self) -> tuple[Any, ...]:
        return _PlanCache, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> _PlanCache:
        return _PlanCache()


class Blur(LinearPhysics):  # type: ignore[misc]
    r"""A blur, ``y = filter * x``, whose ``prox_l2`` and ``A_dagger`` are exact.

    It takes the place of :class:`deepinv.physics.Blur`. Images are ``(B, C, H, W)`` or ``(B, C, D, H, W)``.

    Args:
        filter: ``(b, c, h, w)`` or ``(b, c, d, h, w)``, b of them for the items of the batch or 1 for all, c for the
            channels or 1 for all; convolved with the image, not correlated. None: it comes with a call.
        padding: "valid" (no padding), "circular", "replicate", "reflect", or "constant" (zeros).
        device: where the filter lives.
        kwargs: noise_model and whatever else :class:`deepinv.physics.LinearPhysics` takes. What concerns its solvers
            (``solver``, ``max_iter``, ``tol``, ``implicit_backward_solver``) is accepted and has no effect.

    Raises:
        lsconv.LsconvError: for a filter or a padding that does not fit, naming it.

    Example:
        >>> import deepinv
        >>> x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
        >>> physics = Blur(torch.ones(1, 1, 5, 5, dtype=torch.float64) / 25)
        >>> y, z = physics.A(x), torch.rand_like(x)
        >>> p = physics.prox_l2(z, y, gamma=1e6)
        >>> bool((physics.A_adjoint(physics.A(p) - y) + 1e-6 * (p - z)).abs().max() < 1e-10)
        True
    """

    def __init__(
        self,
        filter: Tensor | None = None,  # noqa: A002  deepinv's name
        padding: str = "valid",
        *,
        device: torch.device | str = "cpu",
        **kwargs: Any,
    ) -> None:
        kwargs.pop("use_fft", None)
        super().__init__(device=device, **kwargs)
        if padding not in _PADDINGS:
            raise ValueError(f"padding: expected one of {', '.join(map(repr, _PADDINGS))}, got {padding!r}")
        if filter is not None and not isinstance(filter, Tensor):
            raise TypeError(f"filter: expected a torch.Tensor or None, got {type(filter).__name__}")
        self.padding = padding
        self.register_buffer("filter", filter)
        self._plan_cache = _PlanCache()
        self.to(device)

    # ------------------------------------------------------------------ deepinv's interface

    def A(self, x: Tensor, filter: Tensor | None = None, **kwargs: Any) -> Tensor:  # noqa: A002, N802
        """The blurred image; a ``filter`` that is given stays the current one."""
        self.update_parameters(filter=filter, **kwargs)
        operator = self._operator(tuple(x.shape[2:]), x.dtype)
        return self._channels_joined(operator(self._per_channel(x)))

    def A_adjoint(self, y: Tensor, filter: Tensor | None = None, **kwargs: Any) -> Tensor:  # noqa: A002, N802
        """The adjoint of :meth:`A`."""
        self.update_parameters(filter=filter, **kwargs)
        operator = self._operator(self._in_size(y), y.dtype)
        return self._channels_joined(operator.H(self._per_channel(y)))

    def prox_l2(
        self,
        z: Tensor | float | None,
        y: Tensor,
        gamma: float | Tensor,
        *args: Any,
        filter: Tensor | None = None,  # noqa: A002
        **kwargs: Any,
    ) -> Tensor:
        """The minimiser of ``gamma / 2 ||A x - y||^2 + ||x - z||^2 / 2``: ``tikhonov`` with ``damp = gamma^-1/2``.

        Args:
            z: what x is to be near to, an image, a number for all pixels, or None for 0.
            y: the measurements.
            gamma: >= 0; a number, or a tensor of no dimensions, ``(B,)`` or ``(B, 1, 1, 1)``.
            filter: as in :meth:`A`.
            args, kwargs: deepinv's solver arguments, which have no effect.
        """
        self.update_parameters(filter=filter)
        operator = self._operator(self._in_size(y), y.dtype)
        data = self._per_channel(y)
        if isinstance(z, Tensor):
            prior = self._per_channel(z)
        else:
            prior = data.new_full((*data.shape[:2], *operator.in_shape), float(z or 0))
        strength = torch.as_tensor(gamma, dtype=torch.float64, device=y.device)
        if bool((strength < 0).any()):
            raise ValueError(f"gamma: expected numbers >= 0, got {gamma}")
        without_data = strength == 0
        damp = torch.where(without_data, torch.ones_like(strength), strength) ** -0.5
        damp, without_data = (t.reshape(-1, 1) if t.numel() > 1 else t.reshape(()) for t in (damp, without_data))
        x = prior + self._inverse(operator, damp)(data - operator(prior))
        if bool(without_data.any()):
            x = torch.where(without_data.reshape(*without_data.shape, *(1 for _ in operator.in_shape)), prior, x)
        return self._channels_joined(x)

    def A_dagger(  # noqa: N802
        self,
        y: Tensor,
        *args: Any,
        damp: float | Tensor = 0.0,
        filter: Tensor | None = None,  # noqa: A002
        **kwargs: Any,
    ) -> Tensor:
        """The least-squares solution of least norm; with ``damp`` that of ``||A x - y||^2 + damp^2 ||x||^2``.

        Without damping it is the exact pseudo-inverse, which amplifies the noise in y.

        Args:
            y: the measurements.
            damp: the damping, a number or one per batch item.
            filter: as in :meth:`A`.
            args, kwargs: deepinv's solver arguments, which have no effect.
        """
        self.update_parameters(filter=filter)
        operator = self._operator(self._in_size(y), y.dtype)
        strength = torch.as_tensor(damp, dtype=torch.float64, device=y.device)
        strength = strength.reshape(-1, 1) if strength.numel() > 1 else strength.reshape(())
        return self._channels_joined(self._inverse(operator, strength)(self._per_channel(y)))

    def pigdm_guidance(self, x0: Tensor, y: Tensor, *, noise_std: float, r: float) -> Tensor:
        r"""The guidance of pseudo-inverse-guided diffusion, :math:`A^H (r^2 A A^H + \sigma^2)^{-1} (y - A x_0)`.

        Args:
            x0: the denoised image, of which the network's vector-Jacobian product is taken.
            y: the measurements.
            noise_std: sigma, the standard deviation of the noise in y.
            r: the standard deviation of x given the noisy image, r_t.
        """
        return self.A_dagger(y - self.A(x0), damp=noise_std / r) / r**2

    def compute_sqnorm(self, x0: Tensor, **kwargs: Any) -> Tensor:
        """The squared spectral norm of A, the largest of the filters; ``x0`` gives the size of the image."""
        operator = self._operator(tuple(x0.shape[-self._ndim :]), x0.dtype)
        return lsconv.norm(operator).amax() ** 2

    # ------------------------------------------------------------------ the operator and its inverses

    @property
    def _ndim(self) -> int:
        return int(self._current().ndim) - 2

    def _current(self) -> Tensor:
        if self.filter is None:
            raise ValueError("filter: there is none; give one to the constructor or to the call")
        return self.filter

    def _stride(self) -> int:
        return 1

    def _in_size(self, y: Tensor) -> tuple[int, ...]:
        """The size of the image that measurements of the shape of ``y`` are of."""
        if self.padding != "valid":
            return tuple(y.shape[2:])
        return tuple(n + k - 1 for n, k in zip(y.shape[2:], self._current().shape[2:], strict=True))

    def _operator(self, size: tuple[int, ...], dtype: torch.dtype) -> Any:
        """The blur of one channel, with the filters of items and channels as a batch."""
        taps = self._current()
        ndim = taps.ndim - 2
        if ndim not in (2, 3) or len(size) != ndim:
            raise ValueError(
                f"filter: expected (b, c, h, w) for images or (b, c, d, h, w) for volumes, got shape "
                f"{tuple(taps.shape)} for data with {len(size)} spatial dimensions"
            )
        weight = taps.to(dtype).flip(tuple(range(2, taps.ndim)))[:, :, None, None]
        if weight.shape[:2] == (1, 1):
            weight = weight[0, 0]
        mode = _PADDINGS[self.padding]
        both = [(0, 0) if mode is None else ((k - 1) // 2, k // 2) for k in taps.shape[2:]]
        make = lsconv.Conv2d if ndim == 2 else lsconv.Conv3d
        return make(weight, size, stride=self._stride(), padding=both, padding_mode=mode or "zeros")

    def _inverse(self, operator: Any, damp: Tensor) -> Any:
        """``pinv(operator, damp)``, kept unless autograd follows the filter or the damping."""
        taps = self._current()
        if (taps.requires_grad or damp.requires_grad) and torch.is_grad_enabled():
            return lsconv.pinv(operator, damp=damp)
        return self._plan_cache.plan(taps, operator, damp)

    @staticmethod
    def _per_channel(x: Tensor) -> Tensor:
        """Make every channel an item, ``(B, C, 1, *size)``."""
        return x.unsqueeze(2)

    @staticmethod
    def _channels_joined(x: Tensor) -> Tensor:
        """Undo :meth:`_per_channel`."""
        return x.squeeze(2)


class SuperResolution(Blur):
    r"""A blur of which every ``factor``-th pixel is kept along each axis, with exact ``prox_l2`` and ``A_dagger``.

    It takes the place of :class:`deepinv.physics.Downsampling`.

    Args:
        filter: as in :class:`Blur`.
        factor: the step.
        img_size: ``(C, H, W)`` or ``(C, D, H, W)``, of the fine image; None: ``factor`` times the size of the coarse
            one (for "valid" with the filter's extent).
        padding, device, kwargs: as in :class:`Blur`.

    Example:
        >>> filter = torch.tensor([[[[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]]], dtype=torch.float64) / 16
        >>> physics = SuperResolution(filter, factor=2, padding="circular")
        >>> y = torch.rand(1, 1, 16, 16, dtype=torch.float64)
        >>> x = physics.A_dagger(y)
        >>> x.shape, bool((physics.A(x) - y).abs().max() < 1e-8)
        (torch.Size([1, 1, 32, 32]), True)
    """

    def __init__(
        self,
        filter: Tensor | None = None,  # noqa: A002
        factor: int = 2,
        *,
        img_size: tuple[int, ...] | None = None,
        padding: str = "circular",
        device: torch.device | str = "cpu",
        **kwargs: Any,
    ) -> None:
        super().__init__(filter, padding, device=device, img_size=img_size, **kwargs)
        if isinstance(factor, bool) or not isinstance(factor, int) or factor < 1:
            raise ValueError(f"factor: expected an integer >= 1, got {factor!r}")
        self.factor = factor

    def _stride(self) -> int:
        return self.factor

    def _in_size(self, y: Tensor) -> tuple[int, ...]:
        if self.img_size is not None:
            return tuple(self.img_size[1:])
        if self.padding != "valid":
            return tuple(self.factor * n for n in y.shape[2:])
        taps = self._current().shape[2:]
        return tuple(self.factor * (n - 1) + k for n, k in zip(y.shape[2:], taps, strict=True))
