r"""The damp path of a problem whose operator and penalty are diagonalised by the same decomposition.

With vectors X such that :math:`X^HA^HAX = \operatorname{diag}(w)` and :math:`X^HL^HLX = \operatorname{diag}(p)`, and
:math:`\beta = U^Hy` for the orthonormal U along AX, everything is a sum:

.. math::
    \|r\|^2 = \|y - U\beta\|^2 + \sum (1 - f)^2 |\beta|^2, \quad \operatorname{tr} H = \sum f, \quad
    \|Lx\|^2 = \sum \frac{p w |\beta|^2}{(w + \mu p)^2}, \qquad f = \frac{w}{w + \mu p}.

Hansen, "Rank-Deficient and Discrete Ill-Posed Problems" (1998), section 4.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lsconv.inverse.damping.paths import Evaluation

__all__ = ["DecomposedPath"]


class DecomposedPath:
    """A :class:`~lsconv.inverse.damping.paths.DampPath` of sums over the directions of a decomposition.

    Attributes:
        w: the squared singular values of the operator, ``(*batch, directions)``.
        p: the squared singular values of the penalty, ``(*batch, directions)``.
        energies: ``|beta|^2``, summed over the data that share a damp, ``(*batch, directions)``.
        outside: ``||y - U beta||^2``, ``batch``.
        rhs: the number of data vectors, such as channels, that share a damp.
        nullity: dimension of the part of the null space of the penalty on which A is not zero, ``batch``.
    """

    exact = True
    w: Tensor
    p: Tensor
    energies: Tensor
    outside: Tensor
    rhs: int
    nullity: Tensor
    data_count: int | Tensor
    batch: tuple[int, ...]
    scale: Tensor

    def evaluate(self, damp: Tensor, *, slope: bool = False, trace: bool = True) -> Evaluation:
        """Return residual, penalty and trace at ``damp``; see :class:`~lsconv.inverse.damping.paths.DampPath`."""
        mu = damp.double().square().unsqueeze(-1)
        w, p = self.w, self.p
        both = w + mu * p
        nonzero = both > 0
        both = torch.where(nonzero, both, 1)
        f, fitted = w / both, p * w * self.energies / both.square()

        def total(values: Tensor) -> Tensor:
            return values.sum(-1).expand(self.batch)

        logdet = torch.where(nonzero, both.log(), 0) - torch.where(p > 0, mu.log(), 0)
        return Evaluation(
            self.outside.expand(self.batch) + total((1 - f).square() * self.energies),
            total(fitted),
            self.rhs * total(f),
            torch.zeros(self.batch, dtype=torch.float64, device=w.device),
            self.rhs * total(logdet),
            -2 * total(p * fitted / both),
            -self.rhs * total(f * (1 - f)),
        )
