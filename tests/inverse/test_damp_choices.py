"""The damps of small random problems against the curves of dense algebra, for every rule."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import lsconv
from lsconv.inverse.parameter import RULES, choose_damp
from lsconv.operators.base import LinearOperator

DOUBLE = torch.float64
_LOW, _HIGH, _POINTS = 1e-4, 8.0, 400


class Curve:
    """A rule's function of damp from a generalised eigendecomposition, with the measured rows alone."""

    def __init__(self, A: LinearOperator, y: Tensor, L: LinearOperator | None, measured: Tensor, noise: float) -> None:
        rows = measured.flatten()
        M, self.y, self.noise = A.to_dense()[rows], y.flatten()[rows], noise
        P = torch.eye(A.in_numel, dtype=DOUBLE) if L is None else L.to_dense()
        self.scale = float(torch.linalg.matrix_norm(M, 2) / torch.linalg.matrix_norm(P, 2))
        P = self.scale * P
        S = M.T @ M + P.T @ P
        sigma, W = torch.linalg.eigh(S)
        T = W[:, sigma > 1e-10 * sigma[-1]]
        T = T / sigma[sigma > 1e-10 * sigma[-1]].sqrt()
        self.p, V = torch.linalg.eigh(T.T @ (P.T @ P) @ T)
        self.p = torch.where(self.p < 1e-11, 0, self.p.clamp_max(1))
        self.w = (M @ T @ V).square().sum(0)
        self.d = (M @ T @ V).T @ self.y
        self.U = M @ T @ V
        self.m, self.nullity = len(self.y), int((self.p == 0).sum())
        self.damps = self.scale * torch.logspace(math.log10(_LOW), math.log10(_HIGH), _POINTS, dtype=DOUBLE)

    def parts(self, damp: Tensor) -> tuple[Tensor, ...]:
        """Residual, penalty, trace, determinant and the penalty's slope at damps ``(points,)``."""
        mu = (damp / self.scale).square()[:, None]
        both = self.w + mu * self.p
        x = self.d / both
        rss = (self.y - x @ self.U.T).square().sum(1)
        penalty, slope = (self.p * x.square()).sum(1), -2 * (self.p.square() * x.square() / both).sum(1)
        logdet = both.log().sum(1) - (self.p > 0).sum() * mu[:, 0].log()
        return rss, penalty, (self.w / both).sum(1), logdet, slope

    def value(self, rule: str, damp: Tensor) -> Tensor:
        """What the rule minimises; of the evidence its power that is homogeneous in y, Wahba's GML."""
        rss, penalty, trace, logdet, slope = self.parts(damp)
        mu = (damp / self.scale).square()
        if rule == "gcv":
            return rss / (self.m - trace) ** 2
        if rule == "upre":
            return rss + 2 * self.noise**2 * trace
        if rule == "discrepancy":
            return rss / (self.m * self.noise**2)
        if rule == "evidence":
            return (rss + mu * penalty) * (logdet / (self.m - self.nullity)).exp()
        q = mu * penalty / rss
        rise = 0.5 * mu * slope / penalty
        return -q * (1 + 2 * rise * (1 + q)) / ((1 + q * q) ** 1.5 * rise.abs())

    def excess(self, rule: str, damp: Tensor) -> float:
        """How far from the rule's aim ``damp`` is, relative."""
        curve, here = self.value(rule, self.damps), float(self.value(rule, damp.double().reshape(1)))
        if rule == "discrepancy":
            if float(curve[-1]) < 1:  # noise explains everything
                return 0.0 if float(damp) >= float(self.damps[-1]) else math.inf
            if float(curve[0]) > 1:  # or not even what no damp leaves
                return 0.0 if float(damp) <= 2 * float(self.damps[0]) else math.inf
            return abs(here - 1)
        if rule == "lcurve":
            dip = (curve[1:-1] <= curve[:-2]) & (curve[1:-1] <= curve[2:])
            best = float(curve[1:-1][dip].min()) if bool(dip.any()) else 0.0
            return 1 - here / best if best < 0 else 0.0  # a curve may have no corner
        return here / float(curve.min()) - 1


SMALL = ([30, 60, 90, 150], [9, 12, 16, 21], [5, 6, 7, 8])
LARGER = ([1100, 1300, 1500, 2100], [34, 40, 44, 48], [10, 11, 12, 13])


def random_problem(seed: int, sizes: tuple[list[int], ...] = SMALL) -> tuple[LinearOperator, Tensor, LinearOperator | None, Tensor, float]:
    """A blur of a smooth scene in one, two or three dimensions, some with a mask: A, y, L, what is measured, noise."""
    g = torch.Generator().manual_seed(seed)

    def draw(options: list) -> object:  # type: ignore[type-arg]
        return options[int(torch.randint(len(options), (), generator=g))]

    ndim = seed % 3 + 1
    size = [int(draw(sizes[ndim - 1])) for _ in range(ndim)]
    extent = [int(draw([1, 3, 5])) for _ in size] if ndim > 1 else [int(draw([3, 5, 9, 13]))]
    if math.prod(extent) == 1:
        extent[0] = 3
    kernel = torch.ones((), dtype=DOUBLE)
    width = 0.6 + 1.5 * float(torch.rand((), generator=g))
    for k in extent:
        kernel = kernel[..., None] * torch.exp(-((torch.arange(k, dtype=DOUBLE) - k // 2) ** 2) / (2 * width**2))
    if draw([True, False]):
        kernel = kernel * torch.rand(kernel.shape, generator=g, dtype=DOUBLE)
    mode = str(draw(["zeros", "zeros", "zeros", "circular", "reflect"]))
    pad = [int(draw([0, k // 2])) if mode == "zeros" else k // 2 for k in extent]
    A: LinearOperator = lsconv.Convolution(kernel[None, None] / kernel.sum(), size, padding=pad, padding_mode=mode)
    L = draw([None, lsconv.Gradient, lsconv.Laplacian])
    boundary = "periodic" if mode == "circular" else str(draw(["neumann", "neumann", "dirichlet"]))
    L = None if L is None else L(A.in_shape, ndim, boundary, dtype=DOUBLE)  # type: ignore[operator]
    x = torch.randn(A.in_shape, generator=g, dtype=DOUBLE)
    for _ in range(int(draw([0, 1, 3]))):
        for axis in range(1, ndim + 1):
            x = (x + x.roll(1, axis) + x.roll(-1, axis)) / 3
    x = x / x.std() + float(draw([0.0, 1.0]))
    clean = A(x)
    noise = float(draw([0.01, 0.02, 0.05, 0.1, 0.2])) * float(clean.square().mean().sqrt())
    y = clean + noise * torch.randn(clean.shape, generator=g, dtype=DOUBLE)
    share = float(draw([0.0, 0.0, 0.1, 0.3, 0.5]))
    measured = torch.rand(y.shape, generator=g) >= share
    if share:
        A = lsconv.Mask(measured, dtype=DOUBLE) @ A
        y = torch.where(measured, y, 100 * y)  # what stands there is not to be read
    return A, y, L, measured, noise
