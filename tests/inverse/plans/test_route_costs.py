"""The predicted cost of LSMR: the operations of an iteration, and how many a damping leaves."""

from __future__ import annotations

import torch

import lsconv
from lsconv.inverse.plans.route_costs import iteration_work, iterations_needed


def test_a_long_kernel_costs_transforms_and_a_short_one_its_taps() -> None:
    grids = [lsconv.Conv2d(torch.rand(1, 1, k, k), (64, 64)) for k in (3, 41, 61)]
    short, long, longer = (iteration_work(A) for A in grids)
    assert short < long
    assert longer < 2 * long  # not the ratio of the taps


def test_a_layer_in_double_precision_is_priced_by_what_it_gathers() -> None:
    A = lsconv.Conv2d(torch.randn(64, 64, 3, 3), (32, 32), padding=1)
    single, double = (iteration_work(B) for B in (A, A.to(dtype=torch.float64)))
    assert 2 * single < double


def test_more_iterations_are_never_taken_than_needed() -> None:
    kernel = torch.rand(1, 1, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    A = lsconv.Conv2d(kernel / kernel.sum(), (24, 24), padding=2)
    y = torch.randn(A.out_shape, dtype=A.dtype, generator=torch.Generator().manual_seed(1))
    norm = torch.linalg.matrix_norm(A.to_dense(), 2)
    for damp in (0.3, 0.1, 0.03):
        bound = float(iterations_needed(A, damp, norm))
        solution = lsconv.lsmr(A, y, damp=damp, rtol=1e-10)
        assert solution.converged.all()
        assert 0.2 * bound < int(solution.iterations.max()) <= bound
