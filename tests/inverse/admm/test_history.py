"""The certified solution that ADMM's run is made into."""

from __future__ import annotations

import pytest
import torch

import lsconv
from lsconv.inverse import plug_and_play as plug_and_play_module
from lsconv.inverse.admm import sparse_problem
from tests.inverse.admm.denoising import DOUBLE, WEIGHT, problem


def test_an_answer_that_was_tampered_with_is_not_called_converged(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the iteration believes of itself counts for nothing."""
    A, y = problem()

    def tampered(module, **changes):
        original = module.admm

        def admm(*args, **options):
            result = original(*args, **options)
            object.__setattr__(result, "x", 1.05 * result.x)
            return result

        monkeypatch.setattr(module, "admm", admm)

    assert bool(lsconv.total_variation(A, y, WEIGHT).converged)
    assert bool(lsconv.plug_and_play(A, y, lambda v: 0.8 * v, 0.5).converged)
    tampered(sparse_problem)
    tampered(plug_and_play_module)
    with pytest.warns(lsconv.ConvergenceWarning):
        assert not bool(lsconv.total_variation(A, y, WEIGHT).converged)
    with pytest.warns(lsconv.ConvergenceWarning):
        assert not bool(lsconv.plug_and_play(A, y, lambda v: 0.8 * v, 0.5).converged)


def test_the_reported_history_is_that_of_a_dense_computation() -> None:
    """The residual, and with a smooth penalty (Huber, everywhere below its threshold) the gradient too."""
    A, y = problem()
    huber = 100.0
    solution = lsconv.total_variation(A, y, WEIGHT, huber=huber, rtol=1e-4)
    x, matrix = solution.x.flatten(), A.to_dense()
    G = lsconv.Gradient(A.in_shape, dtype=DOUBLE).to_dense()
    left = matrix.mT @ (matrix @ x - y.flatten()) + WEIGHT / huber * (G.mT @ (G @ x))
    assert float(solution.residual_norm) == pytest.approx(float((matrix @ x - y.flatten()).norm()), rel=1e-12)
    assert float(left.norm()) <= 2e-3 * float((matrix.mT @ y.flatten()).norm())
    exact = torch.linalg.solve(matrix.mT @ matrix + WEIGHT / huber * G.mT @ G, matrix.mT @ y.flatten())
    assert float((x - exact).norm()) <= 2e-2 * float(exact.norm())
