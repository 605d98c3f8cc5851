r"""The step of flexible conjugate gradients on normal equations, whose preconditioner may change from step to step.

.. math:: p \leftarrow z + \frac{\langle z, g - g_{before}\rangle}{\rho_{before}} p, \qquad
          \alpha = \frac{\langle p, g\rangle}{\|Ap\|^2 + \mu\|p\|^2}, \qquad \rho = \langle z, g\rangle

with g the residual of the normal equations, z the preconditioned g, and ``before`` the previous step.

Notay, "Flexible conjugate gradients", SIAM J. Sci. Comput. 22 (2000).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lsconv.krylov.loop.batched_scalars import ItemSpace, divide

__all__ = ["FlexibleDirection"]


class FlexibleDirection:
    """The direction of the last step, to which the next one is made conjugate, item by item.

    Args:
        mu: the shift of the normal equations, one per batch item.

    Attributes:
        norm: the largest ``||A p|| / ||p||`` met, a lower bound of ``||A||``.
    """

    def __init__(self, mu: Tensor) -> None:
        self.mu = mu
        self.norm = torch.zeros_like(mu)
        self._p: Tensor | None = None
        self._g: Tensor | None = None
        self._rho: Tensor | None = None

    def step(
        self, z: Tensor, g: Tensor, space: ItemSpace, images: ItemSpace, apply: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the direction p, its image ``A p`` by ``apply``, and the length alpha of the step along it."""
        rho = space.inner(z, g)
        if self._p is None or self._g is None or self._rho is None:
            p = z
        else:
            change = rho - space.inner(z, self._g.to(z.dtype))
            p = z + space.broadcast(divide(change, self._rho)) * self._p.to(z.dtype)
        image = apply(p)
        length, p_norm = images.norm(image), space.norm(p)
        self.norm = torch.fmax(self.norm, divide(length, p_norm))
        self._p, self._g, self._rho = p, g, rho
        return p, image, divide(space.inner(p, g), length**2 + self.mu * p_norm**2)
