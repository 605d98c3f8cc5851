"""Claims of the specification of the Krylov floor that no other file shows."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lsconv
from lsconv.krylov.hybrid import _Hybrid, hybrid
from lsconv.krylov.loop.certificate import Tolerances
from lsconv.krylov.loop.solution import Solution, Status

Solver = Callable[..., Solution]
quiet = pytest.mark.filterwarnings("ignore::lsconv.errors.ConvergenceWarning")
SOLVERS = [lsconv.cg, lsconv.minres, lsconv.gmres, lsconv.cgls, lsconv.lsqr, lsconv.lsmr, lsconv.craig, hybrid]


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---------------------------------------------------------------------- the methods


@quiet
@pytest.mark.parametrize("damp", [0.0, 0.05])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_the_gradient_of_lsmr_falls_monotonically_where_that_of_lsqr_does_not(dtype: torch.dtype, damp: float) -> None:
    u, _, vh = torch.linalg.svd(normal(40, 30, seed=1, dtype=dtype), full_matrices=False)
    A, b = u * torch.logspace(0, -4, 30, dtype=torch.float64) @ vh, normal(40, seed=2, dtype=dtype)
    rise = {}
    for solver in (lsconv.lsmr, lsconv.lsqr):
        norms: list[float] = []
        solver(A, b, damp=damp, max_iter=60, rtol=0,
               callback=lambda s, to=norms: to.append(float((A.mH @ (b - A @ s.x) - damp**2 * s.x).norm()))
               )  # fmt: skip
        falling = torch.tensor(norms)
        rise[solver] = float((falling[1:] / falling[:-1]).max())
    assert rise[lsconv.lsmr] < 1
    assert rise[lsconv.lsqr] > 2


def test_hybrid_keeps_both_bases_orthogonal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full reorthogonalisation: on singular values down to 1e-8 a plain process loses it within a few steps."""
    seen: list[_Hybrid] = []
    step = _Hybrid.step
    monkeypatch.setattr(_Hybrid, "step", lambda self, running: (seen.append(self), step(self, running))[1])
    u, _, vh = torch.linalg.svd(normal(40, 40, seed=1))
    A = u * torch.logspace(0, -8, 40, dtype=torch.float64) @ vh
    hybrid(A, normal(40, seed=2), rule="discrepancy", noise_std=1e-9, max_iter=35)
    k = seen[-1].k
    assert k > 20
    for basis in (seen[-1].U[0, :k], seen[-1].V[0, :k]):
        assert float((basis @ basis.mH - torch.eye(k, dtype=torch.float64)).abs().max()) < 1e-13


@pytest.mark.parametrize("solver", SOLVERS)
def test_verbose_is_no_word_of_a_solver(solver: Solver) -> None:
    """``progress=True`` shows a bar, and there is one word for it."""
    with pytest.raises(TypeError, match="verbose"):
        solver(torch.eye(3), torch.ones(3), verbose=True)


def test_the_condition_limit_follows_the_dtype() -> None:
    assert Tolerances.of(torch.float32, None, 0.0).conlim == pytest.approx(8.4e5, rel=0.01)
    assert Tolerances.of(torch.complex128, None, 0.0).conlim == 1e12


# ---------------------------------------------------------------------- memory, of a batch


@pytest.mark.parametrize("solver, n_vectors, m_vectors", [(lsconv.lsqr, 3, 1), (lsconv.lsmr, 4, 1)])
def test_vectors_of_a_batch_are_those_of_the_specification(solver: Solver, n_vectors: int, m_vectors: int) -> None:
    """In the middle of a solve, per item; a single item is counted in test_cost.py."""
    m, n = 6000, 5000
    diagonal = torch.logspace(0, -2, n)
    A = lsconv.FromFunctions((n,), (m,), lambda x: torch.nn.functional.pad(diagonal * x, (0, m - n)),
                             lambda y: diagonal * y[..., :n])  # fmt: skip
    b = torch.linspace(1, 2, 3 * m).reshape(3, m)
    counts: tuple[int, int] = (0, 0)

    def look(state: Any) -> bool:
        nonlocal counts
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // 4
            for t in gc.get_objects()
            if type(t) is Tensor and t.dtype == torch.float32
        }
        storages.pop(b.untyped_storage().data_ptr(), None)
        sizes = list(storages.values())
        counts = sizes.count(3 * n), sizes.count(3 * m)
        return bool(state.iteration >= 4)

    gc.collect()
    solver(A, b, callback=look, rtol=0)
    assert counts == (n_vectors, m_vectors)


# ---------------------------------------------------------------------- the faults, on the consistent systems of craig


def wide(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return normal(12, 20, seed=0).to(dtype), normal(4, 12, seed=1).to(dtype)


@quiet
@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_bad_item_leaves_the_neighbours_of_craig_bit_identical(bad: float) -> None:
    A, b = wide()
    spoiled = b.clone()
    spoiled[1] = bad
    solution, plain = lsconv.craig(A, spoiled, check_finite=False), lsconv.craig(A, b)
    for item in (0, 2, 3):
        assert torch.equal(solution.x[item], plain.x[item])
    assert solution.status[1] is (Status.ZERO if bad == 0 else Status.NON_FINITE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("a, b", [(1e-14, 1.0), (1e14, 1.0), (1.0, 1e-14), (1.0, 1e14), (1e-14, 1e14)])
def test_scaling_changes_only_the_scale_of_the_x_of_craig(a: float, b: float, dtype: torch.dtype) -> None:
    A, y = wide(dtype)
    scaled, plain = lsconv.craig(a * A, b * y), lsconv.craig(A, y)
    assert scaled.status == plain.status
    assert int((scaled.iterations - plain.iterations).abs().max()) <= 1
    torch.testing.assert_close(scaled.x * (a / b), plain.x, rtol=1e-3 if dtype == torch.float32 else 1e-9, atol=1e-4)


def test_craig_answers_zero_to_zero_and_copies_an_exact_start() -> None:
    A, b = wide()
    zero = lsconv.craig(A, torch.zeros(12, dtype=torch.float64), x0=normal(20, seed=3))
    assert zero.status is Status.ZERO
    assert int(zero.iterations) == 0
    assert not zero.x.any()
    x0 = torch.linalg.pinv(A) @ b[0]
    again = lsconv.craig(A, A @ x0, x0=x0)
    assert int(again.iterations) == 0
    assert torch.equal(again.x, x0)
    assert again.x.data_ptr() != x0.data_ptr()


def test_limits_of_craig_are_no_success() -> None:
    A, b = wide()
    with pytest.warns(lsconv.ConvergenceWarning):
        short = lsconv.craig(A, b[0], max_iter=3)
    assert short.status is Status.ITERATION_LIMIT
    assert not short.converged
    with pytest.warns(lsconv.ConvergenceWarning):
        limited = lsconv.craig(A, b[0], conlim=1.5)
    assert limited.status is Status.CONDITION_LIMIT
    assert not limited.converged
