"""The decomposition of small problems where something is left free."""

from __future__ import annotations

import torch

import lsconv
from lsconv.inverse.damping.decomposed_path import DensePath

DOUBLE = torch.float64


def test_the_common_null_space_of_operator_and_penalty_is_left_out() -> None:
    A = lsconv.Dense(torch.cat([torch.randn(30, 20, dtype=DOUBLE), torch.zeros(30, 3, dtype=DOUBLE)], 1))
    L = lsconv.Dense(torch.eye(23, dtype=DOUBLE)[:20].diff(dim=0))
    y = A(torch.randn(23, dtype=DOUBLE)) + 0.1 * torch.randn(30, dtype=DOUBLE)
    B, P = (lsconv.Dense(operator.matrix[:, :20]) for operator in (A, L))
    one, all_rows = torch.ones((), dtype=DOUBLE), torch.tensor(30.0, dtype=DOUBLE)
    whole, seen = (DensePath(op, y[None], D, one, all_rows) for op, D in ((A, L), (B, P)))
    assert int(whole.nullity) == 1
    for damp in (1e-4, 0.1, 10.0):
        e, expected = (path.evaluate(torch.tensor(damp, dtype=DOUBLE)) for path in (whole, seen))
        for name in ("residual_norm_sq", "penalty_norm_sq", "trace", "penalty_slope", "trace_slope"):
            torch.testing.assert_close(getattr(e, name), getattr(expected, name), rtol=1e-6, atol=1e-12)
