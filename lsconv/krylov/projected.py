"""The small problem of the hybrid method, and the rules that choose its damping."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["Projected"]


class Projected:
    """``min ||B y - beta e_1||^2 + damp^2 ||y||^2`` for a batch of ``(k + 1) x k`` matrices B, by their SVD.

    Args:
        B: ``(items, k + 1, k)``; an item with NaN or infinity is treated as zero.
        beta: ``(items,)``.

    Example:
        >>> small = Projected(torch.tensor([[[2.0], [0.0]]]), torch.tensor([4.0]))
        >>> small.solution(torch.tensor([0.0]))
        tensor([[2.]])
    """

    def __init__(self, B: Tensor, beta: Tensor) -> None:
        finite = torch.isfinite(B).all(-1).all(-1) & torch.isfinite(beta)
        B = torch.where(finite[:, None, None], B, 0)
        beta = torch.where(finite, beta, 0)
        u, self.sigma, self.vh = torch.linalg.svd(B, full_matrices=True)
        coefficients = beta.unsqueeze(-1) * u[:, 0, :]
        self.k = B.shape[-1]
        self.inside, self.outside = coefficients[:, : self.k], coefficients[:, self.k]
        self.largest = self.sigma[:, 0]

    def _filters(self, damp: Tensor) -> Tensor:
        """``sigma^2 / (sigma^2 + damp^2)``, for damp ``(items, ...)``; a zero singular value is filtered out."""
        sigma = self.sigma.reshape(-1, *(1 for _ in damp.shape[1:]), self.k)
        ratio = damp.unsqueeze(-1) / sigma
        return torch.where(sigma > 0, 1 / (1 + ratio * ratio), 0)

    def solution(self, damp: Tensor) -> Tensor:
        """The minimiser y, ``(items, k)``."""
        keep = self.sigma > torch.finfo(self.sigma.dtype).eps * self.largest.unsqueeze(-1)
        scaled = torch.where(keep, self._filters(damp) * self.inside / self.sigma, 0)
        return torch.bmm(scaled.unsqueeze(1), self.vh)[:, 0]

    def norm(self, damp: Tensor) -> Tensor:
        """``damp ||y||``."""
        return damp * torch.linalg.vector_norm(self.solution(damp), dim=-1)

    def residual(self, damp: Tensor) -> Tensor:
        """``||B y - beta e_1||`` for damp ``(items, ...)``; it grows with damp."""
        shape = (-1, *(1 for _ in damp.shape[1:]))
        inside = (1 - self._filters(damp)) * self.inside.reshape(*shape, self.k)
        return torch.hypot(torch.linalg.vector_norm(inside, dim=-1), self.outside.reshape(shape))

    # ------------------------------------------------------------------ weighted generalised cross validation

    def weight(self) -> Tensor:
        """The omega for which the weighted GCV function is stationary at the smallest singular value.

        Section 4 of Chung, Nagy and O'Leary (2008): no damping should be larger than that value while the
        projected problem is still a good model, which is what averaging over the steps then encodes.
        """
        sigma, damp = self.sigma, self.sigma[:, -1]
        f = self._filters(damp)
        # With a = damp^2: dN/da = 2 sum (1 - f)^2 f c^2 / a, and dT/da = omega sum f (1 - f) / a; a cancels.
        slope = 2 * ((1 - f) ** 2 * f * self.inside**2).sum(-1)
        spread = (f * (1 - f)).sum(-1)
        residual = self.residual(damp) ** 2
        denominator = 2 * residual * spread + slope * f.sum(-1)
        omega = slope * (self.k + 1) / denominator
        usable = (denominator > 0) & (sigma[:, -1] > 0)
        return torch.where(usable, omega, 1.0).clamp(0.0, 1.0)

    def weighted_gcv(self, omega: Tensor) -> tuple[Tensor, Tensor]:
        """The damping that minimises the weighted GCV function, and the function's value there."""

        def score(damp: Tensor) -> Tensor:
            trace = self.k + 1 - omega.unsqueeze(-1) * self._filters(damp).sum(-1)
            return self.residual(damp) ** 2 / trace**2

        # The function may have several minima: a coarse grid is followed by finer ones around the lowest point.
        top = torch.log10(torch.where(self.largest > 0, self.largest, 1.0)) + 1
        low, high = top + math.log10(torch.finfo(top.dtype).eps), top
        steps = torch.linspace(0, 1, 64, dtype=top.dtype, device=top.device)
        best = top
        for _ in range(4):  # each 30 times as fine as the one before
            grid = low.unsqueeze(-1) + (high - low).unsqueeze(-1) * steps
            best = grid.gather(-1, score(10**grid).argmin(-1, keepdim=True))[:, 0]
            width = (high - low) / (len(steps) - 1)
            low, high = best - width, best + width
        damp = 10**best
        return damp, score(damp.unsqueeze(-1))[:, 0]

    # ------------------------------------------------------------------ discrepancy principle

    def discrepancy(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Find the damping whose residual norm is ``target`` (0 if that has a larger one); return it and the norm."""
        top = torch.log10(torch.where(self.largest > 0, self.largest, 1.0))
        decades = -math.log10(torch.finfo(top.dtype).eps)  # the range that double precision resolves
        low, high = top - decades, top + decades
        for _ in range(60):  # bisection to the last digit
            middle = 0.5 * (low + high)
            above = self.residual(10**middle) > target
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        damp = torch.where(self.residual(torch.zeros_like(target)) >= target, 0.0, 10**low)
        return damp, self.residual(damp)
