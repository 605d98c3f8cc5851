"""The Golub-Kahan process: the bound of ||A|| that its bidiagonal matrix gives."""

from __future__ import annotations

import pytest
import torch

from lsconv.krylov.golub_kahan import GolubKahan
from lsconv.krylov.loop.problem import prepare


@pytest.mark.parametrize("host_scalars", [True, False])
@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e150])
def test_the_bound_of_the_norm_is_below_it_and_within_a_sixth_after_ten_steps(host_scalars: bool, scale: float) -> None:
    A = scale * torch.randn(60, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    b = torch.randn(60, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    problem = prepare(A, b, host_scalars=host_scalars)
    process = GolubKahan(problem, None, True if host_scalars else torch.tensor(True))
    norm = float(torch.linalg.matrix_norm(A, 2))
    bounds = []
    for _ in range(50):  # beyond the breakdown, where only rounding goes on
        process.step(1.0 if host_scalars else torch.tensor(1.0, dtype=torch.float64))
        bounds.append(float(process.operator_norm))
    assert bounds == sorted(bounds)
    assert bounds[9] > norm * 5 / 6
    assert bounds[-1] <= norm * (1 + 1e-12)
