"""The oracle of the answers: dense float64 linear algebra, and convolutions of every kind to ask it about."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import lsconv
from lsconv.errors import MethodError
from lsconv.krylov.loop.solution import Solution
from lsconv.operators.base import LinearOperator
from lsconv.operators.convolution import Convolution

# A singular value between these two, relative to the largest, leaves open what the rank is.
NOISE, SIGNAL = 1e-13, 1e-4


@dataclass(frozen=True)
class Reference:
    """The minimum-norm (damped) least-squares solution by a dense SVD, and what the SVD says about it.

    Attributes:
        x: ``(*batch, *in_shape)``, double precision.
        condition: of the problem, null space left out, ``batch``.
        clear: True where the numerical rank is beyond doubt, ``batch``.
        norm: the spectral norm of A, ``batch``.
        full_rank: True where no singular value is (numerically) zero, ``batch``.
        row_space: the projection of a tensor like x onto the row space of A.
    """

    A: LinearOperator
    y: Tensor
    damp: Tensor
    x: Tensor
    condition: Tensor
    clear: Tensor
    norm: Tensor
    V: Tensor
    full_rank: Tensor

    def row_space(self, x: Tensor) -> Tensor:
        flat = x.to(self.V.dtype).reshape(*self.condition.shape, -1, 1)
        return (self.V.mH @ (self.V @ flat)).reshape(x.shape)

    def error(self, x: Tensor) -> Tensor:
        """The relative distance of x to the reference, ``batch``."""
        return self._norms(x.to(self.x.dtype) - self.x) / self._norms(self.x).clamp_min(1e-300)

    def null_part(self, x: Tensor) -> Tensor:
        """The relative size of the part of x in the null space of A, ``batch``."""
        x = x.to(self.x.dtype)
        return self._norms(x - self.row_space(x)) / self._norms(x).clamp_min(1e-300)

    def norms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Residual and gradient norm of x, computed here."""
        x = x.to(self.x.dtype)
        residual = self.y - self.A(x)
        gradient = self.A.H(residual) - self.damp.reshape(*self.damp.shape, *(1 for _ in self.A.in_shape)) ** 2 * x
        return self._norms(residual), self._norms(gradient)

    def _norms(self, t: Tensor) -> Tensor:
        return t.reshape(*self.condition.shape, -1).norm(dim=-1)


def _reference(A: LinearOperator, y: Tensor, damp: float | Tensor = 0.0) -> Reference:
    double = torch.complex128 if A.dtype.is_complex else torch.float64
    A, y = A.to(dtype=double), y.to(double)
    m, n = math.prod(A.out_shape), math.prod(A.in_shape)
    damp = torch.as_tensor(damp, dtype=torch.float64)
    batch = torch.broadcast_shapes(y.shape[: y.ndim - len(A.out_shape)], A.batch_shape, damp.shape)
    y, damp = y.expand(*batch, *A.out_shape), damp.expand(batch)
    U, s, V = torch.linalg.svd(A.to_dense().reshape(*A.batch_shape, m, n), full_matrices=False)
    largest = s.amax(-1, keepdim=True)
    kept = s > 1e-9 * largest
    d = damp[..., None]
    s, kept, largest = (t.expand(*batch, t.shape[-1]) for t in (s, kept, largest))
    factor = torch.where(kept, s / (s**2 + d**2).clamp_min(1e-300), 0).to(double)
    coefficients = (U.mH @ y.reshape(*batch, m, 1)) * factor[..., None]
    smallest = torch.where(kept, s, torch.inf).amin(-1)
    condition = torch.hypot(largest[..., 0], damp) / torch.hypot(smallest, damp)
    clear = ((s <= NOISE * largest) | (s > SIGNAL * largest)).all(-1)
    x = (V.mH @ coefficients).reshape(*batch, *A.in_shape)
    V = V.expand(*batch, *V.shape[-2:]) * kept[..., None]
    return Reference(A, y, damp, x, condition.nan_to_num(1.0), clear, largest[..., 0], V, kept.all(-1))


@pytest.fixture(scope="session")
def reference() -> Any:
    """``reference(A, y, damp)``: the dense answer."""
    return _reference


@dataclass(frozen=True)
class Case:
    """A problem: operator, data, damping."""

    A: Convolution
    y: Tensor
    damp: float | Tensor

    @property
    def arguments(self) -> tuple[Convolution, Tensor, float | Tensor]:
        return self.A, self.y, self.damp


def _padding(style: str, extent: int, draw: Any) -> tuple[int, int]:
    if style == "valid":
        return 0, 0
    if style == "same":
        return (extent - 1) // 2, extent - 1 - (extent - 1) // 2
    if style == "full":
        return extent - 1, extent - 1
    return draw(st.integers(0, extent - 1)), draw(st.integers(0, extent - 1))


@st.composite
def _convolution(draw: Any, dtypes: tuple[torch.dtype, ...]) -> Convolution:
    ndim = draw(st.sampled_from([1, 1, 2, 2, 2, 3]))
    largest, reach = {1: (14, 5), 2: (7, 4), 3: (4, 3)}[ndim]
    depthwise = draw(st.booleans())
    groups = draw(st.integers(1, 3))
    c_in, c_out = (1, draw(st.integers(1, 2))) if depthwise else (draw(st.integers(1, 3)), draw(st.integers(1, 4)))
    mode = draw(st.sampled_from(["zeros", "zeros", "zeros", "zeros", "circular"]))
    style = draw(st.sampled_from(["valid", "same", "full", "any", "any"]))
    size, stride, dilation, kernel, padding = [], [], [], [], []
    for _ in range(ndim):
        n, s = draw(st.integers(1, largest)), draw(st.sampled_from([1, 1, 1, 2, 3]))
        d, k = draw(st.sampled_from([1, 1, 2])), draw(st.integers(1, reach))
        extent = d * (k - 1) + 1
        left, right = _padding(style, extent, draw)
        if mode == "circular":  # the stride divides the grid, and the outputs fit it
            n = s * max(1, n // s)
            left = min(left, n)
            right = min(right, n, max(0, extent - 1 - left))
        if n + left + right < extent:
            n = s * -(-(extent - left - right) // s)
        for values, value in zip((size, stride, dilation, kernel, padding), (n, s, d, k, (left, right)), strict=True):
            values.append(value)
    batch = draw(st.sampled_from([(), (), (2,), (2, 1)]))
    dtype = draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    weight = torch.randn(*batch, groups * c_out, c_in, *kernel, generator=generator, dtype=dtype)
    return Convolution(weight, size, stride, padding, dilation, groups, mode)


@st.composite
def _case(
    draw: Any, dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.complex128), damped: bool | None = None
) -> Case:
    A = draw(_convolution(dtypes))
    batch = draw(st.sampled_from([(), (3,), (2, 2)])) if not A.batch_shape else draw(
        st.sampled_from([A.batch_shape, (3, *A.batch_shape), ()])
    )  # fmt: skip
    full = torch.broadcast_shapes(batch, A.batch_shape)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    if draw(st.booleans()):
        y = A(torch.randn(*batch, *A.in_shape, generator=generator, dtype=A.dtype))
    else:
        y = torch.randn(*batch, *A.out_shape, generator=generator, dtype=A.dtype)
    kinds = {None: ["none", "none", "number", "tensor"], False: ["none"], True: ["number", "tensor"]}[damped]
    kind = draw(st.sampled_from(kinds))
    if kind == "none":
        return Case(A, y, 0.0)
    if kind == "number":
        return Case(A, y, 10 ** draw(st.floats(-3, 1)))
    damp = 10 ** (4 * torch.rand(full, generator=generator, dtype=torch.float64) - 3)
    if damped is None:  # zero for some items
        damp = damp * (torch.rand(full, generator=generator) < 0.7)
    return Case(A, y, damp)


@pytest.fixture(scope="session")
def cases() -> Any:
    """Strategy: zero-padded or circular convolutions of every kind with data and damping."""
    return _case


@pytest.fixture(scope="session")
def assert_certified() -> Any:
    """``assert_certified(solution, reference, rtol, eps)``: the certificate is true, and so is ``converged``."""

    def check(solution: Solution, reference: Reference, rtol: float, eps: float = 2.3e-16) -> None:
        residual, gradient = reference.norms(solution.x)
        y = reference._norms(reference.y)
        x = reference._norms(solution.x.to(reference.x.dtype))
        scale = reference.norm * x + y  # rounding is relative to what the residual is the difference of
        assert (solution.residual_norm - residual).abs().le(1e-13 * scale).all()
        assert (
            (solution.gradient_norm - gradient).abs().le(1e-13 * (reference.norm * scale + reference.damp**2 * x)).all()
        )
        total = torch.hypot(residual, reference.damp * x)
        norm = torch.hypot(reference.norm, reference.damp)
        by_residual = total <= 1.001 * rtol * y
        by_gradient = gradient <= norm * (1.001 * rtol * total + 100 * eps * (norm * x + y))
        assert (by_residual | by_gradient)[solution.converged].all()

    return check


@pytest.fixture(scope="session")
def by_border() -> Any:
    """``by_border(A, y, damp)``: lstsq by the border method, or by "auto" where the border method refuses A."""

    def solve(A: LinearOperator, y: Tensor, damp: float | Tensor = 0.0, **options: Any) -> Solution:
        try:
            return lsconv.lstsq(A, y, damp=damp, method="border", **options)
        except MethodError:
            return lsconv.lstsq(A, y, damp=damp, **options)

    return solve
