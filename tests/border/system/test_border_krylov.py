"""The two iterations on the border, against dense solves, and the Krylov spaces that GMRES recycles."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lsconv
from lsconv.border.cost_model import Factorise, Limits
from lsconv.border.normal_inverse import BorderInverse, normal_inverse
from lsconv.border.normal_problem import Request
from lsconv.border.system.border_krylov import Allowance, Recycling, border_cg, border_gmres, deflate

DTYPES = [torch.float64, torch.complex128]
every_iteration = pytest.mark.parametrize("iteration", [border_cg, border_gmres])


def _system(dtype: torch.dtype, n: int = 12, *, definite: bool = True, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Matrices ``(2 blocks, n, n)``, definite or Hermitian indefinite, and right-hand sides ``(3, 2 blocks, n)``."""
    g = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(2, n, n, generator=g, dtype=dtype))[0]
    values = torch.linspace(0.5, 4, n, dtype=torch.float64)
    if not definite:
        values = values * torch.tensor([1.0, -1.0]).repeat(n // 2)
    return (Q * values) @ Q.mH, torch.randn(3, 2, n, generator=g, dtype=dtype)


def _map(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    # one product per system, so that what a system sees does not depend on how many there are
    return lambda v: torch.stack([torch.stack([m @ x for m, x in zip(matrix, row, strict=True)]) for row in v])


def _same(v: Tensor) -> Tensor:
    return v.clone()


@every_iteration
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("check_every", [1, 5])
def test_solves_the_dense_system(iteration: Any, dtype: torch.dtype, check_every: int) -> None:
    A, b = _system(dtype)
    u, count = iteration(_map(A), _same, b, 1e-11, 100, check_every)
    torch.testing.assert_close(u, torch.linalg.solve(A, b.unsqueeze(-1)).squeeze(-1), rtol=1e-9, atol=1e-9)
    assert count.shape == (3, 2)
    assert (count <= 13).all()


@every_iteration
@pytest.mark.parametrize(("condition", "early"), [(1e6, True), (10.0, False)])
def test_an_iteration_ends_early_where_its_rate_promises_more_than_it_is_allowed(
    iteration: Any, condition: float, early: bool
) -> None:
    g = torch.Generator().manual_seed(3)
    Q = torch.linalg.qr(torch.randn(1, 200, 200, generator=g, dtype=torch.float64))[0]
    matrix = (Q * torch.logspace(0, -math.log10(condition), 200, dtype=torch.float64)) @ Q.mH
    b = torch.randn(2, 1, 200, generator=g, dtype=torch.float64)
    allowance = Allowance(60)
    _, count = iteration(_map(matrix), _same, b, 1e-10, 500, 1, allowance=allowance)
    assert allowance.exceeded == early
    assert int(count.max()) == 15 if early else 15 < int(count.max()) < 60


def test_data_that_are_not_finite_exceed_no_allowance_early() -> None:
    allowance, one = Allowance(8), torch.ones(1, 1, 1)
    assert not allowance.update(2, 0, one, torch.full_like(one, torch.nan), 1e-9 * one)
    assert allowance.update(2, 0, one, 2 * one, 1e-9 * one)  # a residual that grows


@pytest.mark.parametrize("dtype", DTYPES)
def test_gmres_solves_indefinite_and_unsymmetric_systems(dtype: torch.dtype) -> None:
    A, b = _system(dtype, definite=False)
    for matrix in (A, A + 0.3 * torch.randn(A.shape, dtype=dtype).triu(1)):
        u, _ = border_gmres(_map(matrix), _same, b, 1e-11, 100, 1)
        torch.testing.assert_close(u, torch.linalg.solve(matrix, b.unsqueeze(-1)).squeeze(-1), rtol=1e-8, atol=1e-8)


@every_iteration
@pytest.mark.parametrize("dtype", DTYPES)
def test_preconditioner_changes_the_iterations_and_not_the_solution(iteration: Any, dtype: torch.dtype) -> None:
    A, b = _system(dtype, 40)
    scale = torch.logspace(0, 3, 40, dtype=torch.float64)
    A = scale[:, None] * A * scale
    plain, slow = iteration(_map(A), _same, b, 1e-10, 400, 1)
    better, fast = iteration(_map(A), lambda r: r / scale**2, b, 1e-10, 400, 1)
    expected = torch.linalg.solve(A, b.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(better, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    assert (fast < slow).all()
    assert plain.isfinite().all()


@every_iteration
@pytest.mark.parametrize("tolerance", [1e-2, 1e-6])
def test_leaves_the_relative_residual_at_the_tolerance(iteration: Any, tolerance: float) -> None:
    A, b = _system(torch.float64, 40)
    u, count = iteration(_map(A), _same, b, tolerance, 400, 1)
    residual = (b - _map(A)(u)).norm(dim=-1) / b.norm(dim=-1)
    assert (residual <= 1.01 * tolerance).all()
    assert (count < 40).all()


@every_iteration
def test_zero_right_hand_side_takes_no_iterations(iteration: Any) -> None:
    A, b = _system(torch.float64)
    u, count = iteration(_map(A), _same, torch.zeros_like(b), 1e-8, 50, 1)
    assert not u.any()
    assert not count.any()


@every_iteration
@pytest.mark.parametrize("check_every", [1, 4])
@pytest.mark.parametrize("content", ["zero", "nan", "easy", "huge"])
def test_systems_do_not_see_their_neighbours(iteration: Any, content: str, check_every: int) -> None:
    A, b = _system(torch.float64, 24)
    before, count = iteration(_map(A), _same, b, 1e-9, 60, check_every)
    odd = b.clone()
    if content == "easy":  # an eigenvector: done after one iteration
        odd[1] = torch.linalg.eigh(A)[1][..., 0]
    else:
        odd[1] = {"zero": 0.0, "nan": float("nan"), "huge": 1e120}[content]
    after, count_after = iteration(_map(A), _same, odd, 1e-9, 60, check_every)
    for row in (0, 2):
        assert torch.equal(before[row], after[row])
        assert torch.equal(count[row], count_after[row])


@every_iteration
def test_eigenvector_is_solved_in_one_iteration_without_breakdown(iteration: Any) -> None:
    A, _ = _system(torch.float64)
    b = torch.linalg.eigh(A)[1][..., 3].expand(3, 2, 12).contiguous()
    u, count = iteration(_map(A), _same, b, 1e-10, 50, 7)
    assert (count == 1).all()
    torch.testing.assert_close(_map(A)(u), b)


def test_gmres_restarts() -> None:
    A, b = _system(torch.float64, 60)
    u, count = border_gmres(_map(A), _same, b, 1e-8, 400, 1, restart=10)
    assert ((b - _map(A)(u)).norm(dim=-1) <= 1.01e-8 * b.norm(dim=-1)).all()
    assert (count > 10).all()


@every_iteration
@pytest.mark.parametrize("limit", [1, 3, 7])
def test_iteration_limit_is_kept(iteration: Any, limit: int) -> None:
    A, b = _system(torch.float64, 40)
    _, count = iteration(_map(A), _same, b, 1e-14, limit, 1)
    assert (count == limit).all()


def test_gmres_ends_finite_on_a_singular_inconsistent_system() -> None:
    A = torch.diag(torch.tensor([1.0, 2.0, 3.0, 0.0], dtype=torch.float64)).expand(2, 4, 4)
    b = torch.ones(1, 2, 4, dtype=torch.float64)
    u, _ = border_gmres(_map(A), _same, b, 1e-10, 50, 1)
    assert u.isfinite().all()
    assert (b - _map(A)(u)).norm() <= 1.001 * b.norm()


@pytest.mark.parametrize("scale", [1e-5, 1e-6, 1e-8])
@pytest.mark.parametrize("check_every", [1, 5, 10])
def test_gmres_stays_finite_after_its_systems_have_ended(scale: float, check_every: int) -> None:
    """Then a column leaves nothing but rounding, whose squares float32 does not hold."""
    g = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(2, 3, 3, generator=g))[0]
    A = (Q * torch.tensor([1.0, 0.3, 0.1])) @ Q.mT * scale
    b = torch.stack([Q[..., 0], torch.randn(2, 3, generator=g), torch.zeros(2, 3)])
    u, count = border_gmres(_map(A), _same, b, 1e-2, 60, check_every, restart=7)
    assert count.tolist() == [[1, 1], [3, 3], [0, 0]]
    assert ((b - _map(A)(u)).norm(dim=-1) <= 1.01e-2 * b.norm(dim=-1)).all()


def test_gmres_keeps_its_promise_with_a_preconditioner_in_float32() -> None:
    Q, b = _system(torch.float64, 60, definite=False)
    rough = torch.linalg.inv(Q + 0.05 * torch.randn(60, 60, dtype=torch.float64)).float()
    u, _ = border_gmres(_map(Q), lambda v: (v.float().unsqueeze(-2) @ rough.mT).squeeze(-2).double(), b, 1e-11, 100, 1)
    left = torch.linalg.vector_norm(b - _map(Q)(u), dim=-1) / torch.linalg.vector_norm(b, dim=-1)
    assert float(left.max()) < 1.1e-11


# ---------------------------------------------------------------------- what waits for a device


def _inverse(name: str, corners: bool, device: str = "cpu") -> BorderInverse:
    shape, padding = {"valid": ((3, 3, 3, 3), 0), "full": ((3, 2, 3, 3), 2)}[name]
    weight = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    A = lsconv.Conv2d(weight.to(device), (24, 24), padding=padding)
    inverse = normal_inverse(
        Request.of(A, 0.05, floor=1e-6, limits=Limits(factorise=Factorise.NEVER, dense_unknowns=0, corners=corners))
    )
    assert isinstance(inverse, BorderInverse)
    return inverse


@every_iteration
@pytest.mark.parametrize("name", ["valid", "full"])
def test_the_host_reads_once_per_check(host_reads: Any, iteration: Any, name: str) -> None:
    inverse = _inverse(name, iteration is border_gmres)
    b = torch.randn(2, 1, inverse.border.size, dtype=torch.float64)
    system, counts = inverse.begin_iteration(), []
    for iterations in (20, 40):
        with host_reads() as reads:
            iteration(system, inverse.begin_iteration().schwarz, b, 0.0 * b[..., :1], iterations, 10)
        counts.append(reads.count)
    assert counts[1] - counts[0] == 2


@pytest.mark.gpu
@every_iteration
@pytest.mark.parametrize("name", ["valid", "full"])
def test_no_synchronisation_between_two_looks_on_a_gpu(iteration: Any, name: str) -> None:
    inverse = _inverse(name, iteration is border_gmres, "cuda")
    b = torch.randn(2, 1, inverse.border.size, dtype=torch.float64, device="cuda")
    applied = 0

    def apply(v: Tensor) -> Tensor:
        nonlocal applied
        applied += 1
        if applied == 11:  # the host has looked after ten, and will after twenty
            torch.cuda.set_sync_debug_mode("error")
        return inverse.begin_iteration()(v)

    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            iteration(apply, inverse.begin_iteration().schwarz, b, 0.0 * b[..., :1], 40, 10)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert applied == 20


F64 = torch.float64


SIZE = 300


def _identity(v: Tensor) -> Tensor:
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

    u, count = border_gmres(apply, _identity, b, tolerance, 200, 1, 100, recycling=recycling, **options)
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


def test_deflation_solves_for_the_recycled_part_of_a_residual() -> None:
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


def test_nothing_is_kept_beyond_the_limit() -> None:
    Q, b = _operator(_outliers()), torch.randn(1, 2, SIZE, dtype=F64)
    small = Recycling(20)
    _solve(Q, b, small)
    assert small.pair is None


def test_recycled_vectors_that_save_no_iterations_are_dropped() -> None:
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
    options = {"floor": 1e-13, "limits": Limits(factorise=Factorise.NEVER)}
    inverse, plain = (normal_inverse(Request.of(A, 1e-3, **options)) for _ in range(2))
    counts = [int(inverse(torch.randn(A.in_shape, dtype=F64), 1e-6)[1]) for _ in range(3)]
    assert 2 * counts[2] < counts[0]
    assert isinstance(plain, BorderInverse)
    plain.begin_iteration()._recycling.max_vectors = 0
    f = torch.randn(A.in_shape, dtype=F64)
    expected = plain(f, 1e-10)[0]
    torch.testing.assert_close(inverse(f, 1e-10)[0], expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_a_cycle_whose_directions_have_overflowed_is_not_kept() -> None:
    recycling, k = Recycling(200), 40
    triangle = torch.eye(k, dtype=F64).expand(2, k, k).clone()
    triangle[1, 3, 5] = torch.inf
    basis, preconditioned = torch.randn(2, k + 1, SIZE, dtype=F64), torch.randn(2, k, SIZE, dtype=F64)
    nothing, residuals = torch.zeros(2, 0, k, dtype=F64), torch.ones(2, k + 1, dtype=F64)
    unitary = torch.eye(k + 1, k, dtype=F64).expand(2, -1, -1)
    recycling.learn(None, nothing, preconditioned, basis, unitary, triangle, residuals)
    assert recycling.pair is None
