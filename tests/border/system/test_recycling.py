"""Recycled Krylov spaces: what they hold, what they spare, and when there are none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lsconv
from lsconv.border.cost_model import Limits
from lsconv.border.normal_inverse import BorderInverse, normal_inverse
from lsconv.border.reflected_padding import Mirror
from lsconv.border.system.krylov import gmres
from lsconv.border.system.recycling import Recycling, deflate

F64 = torch.float64
SIZE = 300


def _same(v: Tensor) -> Tensor:
    return v


def _operator(values: Tensor, dtype: torch.dtype = F64, *, hermitian: bool = True) -> Tensor:
    """Two matrices with these singular values, ``(2, SIZE, SIZE)``; their vectors are near the unit vectors."""
    near = torch.eye(SIZE, dtype=dtype) + 0.2 / SIZE**0.5 * torch.randn(2, 2, SIZE, SIZE, dtype=dtype)
    left, right = torch.linalg.qr(near).Q
    return left @ (values.to(dtype)[:, None] * (left if hermitian else right).mH)


def _outliers() -> Tensor:
    values = torch.linspace(0.9, 1.1, SIZE, dtype=F64)
    values[:20] = torch.logspace(-3, -1, 20, dtype=F64)
    values[20:40] = -torch.logspace(1, 2, 20, dtype=F64)
    return values


def _solve(Q: Tensor, b: Tensor, recycling: Recycling | None, tolerance: float = 1e-9, **options: Any) -> int:
    def apply(v: Tensor) -> Tensor:
        return (Q @ v.unsqueeze(-1)).squeeze(-1)

    u, count = gmres(apply, _same, b, tolerance, 200, 1, 100, recycling=recycling, **options)
    left = torch.linalg.vector_norm(b - apply(u), dim=-1)
    if not options:
        assert bool((left <= 1.01 * tolerance * torch.linalg.vector_norm(b, dim=-1)).all())
    return int(count.max())


@pytest.mark.parametrize("dtype", [F64, torch.complex128])
def test_images_are_those_of_the_vectors_and_orthonormal(dtype: torch.dtype) -> None:
    Q, recycling = _operator(_outliers(), dtype, hermitian=False), Recycling(200)
    for rest in (1, 1, 3):
        _solve(Q, torch.randn(rest, 2, SIZE, dtype=dtype), recycling)
        assert recycling.pair is not None
        vectors, images = recycling.pair
        torch.testing.assert_close(vectors @ Q.mT, images, rtol=0, atol=1e-9)
        eye = torch.eye(images.shape[1], dtype=dtype).expand(2, -1, -1)
        torch.testing.assert_close(images.conj() @ images.mT, eye, rtol=0, atol=1e-10)
    assert recycling.nbytes == 2 * images.numel() * images.element_size()


def test_what_is_deflated_is_solved_for() -> None:
    Q, recycling = _operator(_outliers()), Recycling(100)
    _solve(Q, torch.randn(1, 2, SIZE, dtype=F64), recycling)
    assert recycling.pair is not None
    r = torch.randn(3, 2, SIZE, dtype=F64)
    u, left = deflate(recycling.pair, r)
    torch.testing.assert_close((Q @ u.unsqueeze(-1)).squeeze(-1) + left, r, rtol=0, atol=1e-9)
    assert float((recycling.pair[1] @ left.movedim(0, -1)).abs().max()) < 1e-13


@pytest.mark.parametrize("rest", [1, 4])
def test_later_systems_are_spared_the_outlying_values(rest: int) -> None:
    Q, recycling = _operator(_outliers()), Recycling(100)
    first = _solve(Q, torch.randn(1, 2, SIZE, dtype=F64), recycling)
    b = torch.randn(rest, 2, SIZE, dtype=F64)
    assert 3 * _solve(Q, b, recycling) < min(first, _solve(Q, b, None))


def test_the_same_system_again_takes_no_iteration() -> None:
    Q, recycling, b = _operator(_outliers()), Recycling(100), torch.randn(1, 2, SIZE, dtype=F64)
    _solve(Q, b, recycling)
    assert _solve(Q, 3 * b, recycling, tolerance=1e-8) == 0


def test_nothing_is_kept_where_the_values_lie_together() -> None:
    recycling = Recycling(100)
    _solve(_operator(torch.linspace(0.6, 1.9, SIZE, dtype=F64)), torch.randn(1, 2, SIZE, dtype=F64), recycling)
    assert recycling.pair is None


def test_nothing_is_kept_beyond_the_limit() -> None:
    Q, b = _operator(_outliers()), torch.randn(1, 2, SIZE, dtype=F64)
    small = Recycling(20)
    _solve(Q, b, small)
    assert small.pair is None


def test_what_spares_nothing_is_given_up() -> None:
    # a continuum: the vectors of one right-hand side do not serve the next
    Q, recycling = _operator(torch.linspace(0.3, 3.5, SIZE, dtype=F64)), Recycling(100)
    _solve(Q, torch.randn(1, 2, SIZE, dtype=F64), recycling, tolerance=1e-6)
    assert recycling.pair is not None
    _solve(Q, torch.randn(1, 2, SIZE, dtype=F64), recycling, tolerance=1e-6)
    assert recycling.pair is None
    _solve(Q, torch.randn(1, 2, SIZE, dtype=F64), recycling, tolerance=1e-6)
    assert recycling.pair is None


def test_a_plan_for_replicated_edges_recycles() -> None:
    profile = torch.exp(-((torch.arange(15, dtype=F64) - 7) ** 2) / 8)
    kernel = profile[:, None] * profile / profile.sum() ** 2
    A = lsconv.Conv2d(kernel[None, None], in_size=(128, 128), padding=7, padding_mode="replicate")
    options = {"floor": 1e-13, "mirror": Mirror(A), "limits": Limits(at_once=0, later=False)}
    inverse, plain = (normal_inverse(A, 1e-3, **options) for _ in range(2))
    counts = [int(inverse(torch.randn(A.in_shape, dtype=F64), 1e-6)[1]) for _ in range(3)]
    assert 2 * counts[2] < counts[0]
    assert isinstance(plain, BorderInverse)
    plain.on_border._recycling.most = 0
    f = torch.randn(A.in_shape, dtype=F64)
    expected = plain(f, 1e-10)[0]
    torch.testing.assert_close(inverse(f, 1e-10)[0], expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_a_cycle_whose_directions_have_overflowed_is_not_kept() -> None:
    recycling, k = Recycling(200), 40
    triangle = torch.eye(k, dtype=F64).expand(2, k, k).clone()
    triangle[1, 3, 5] = torch.inf
    basis, searched = torch.randn(2, k + 1, SIZE, dtype=F64), torch.randn(2, k, SIZE, dtype=F64)
    nothing, residuals = torch.zeros(2, 0, k, dtype=F64), torch.ones(2, k + 1, dtype=F64)
    recycling.learn(
        None, nothing, searched, basis, torch.eye(k + 1, k, dtype=F64).expand(2, -1, -1), triangle, residuals
    )
    assert recycling.pair is None
