"""Norms measured by tiles are judged as those of the whole."""

from __future__ import annotations

import pytest
import torch

import lsconv
from lsconv.krylov.loop.certificate import Tolerances
from lsconv.tiled.field import Field
from tests.tiled.problems import F64, exact, problem


def test_norms_measured_by_tiles_are_judged_as_those_of_the_whole() -> None:
    A, y = problem("box", "same", (83, 98))
    plan = lsconv.tiled.Plan(A, damp=0.1, tile=40, overlap=24)
    judge = plan._judge(Tolerances.of(F64, 1e-10, 0.0))
    answer = exact(A, y, 0.1)
    for x, converged in ((answer, True), (answer + 1e-6 * torch.cos(torch.arange(98.0)), False)):
        options = {"channels": True, "wraps": plan.wraps}
        fields = Field(x, A.spatial_in, **options), Field(y, A.spatial_out, **options)
        streamed = plan.passes.gradient(*fields, None, None)
        found, whole = judge.certificate_of(streamed), judge.certify(x, y, host_scalars=True)
        assert bool(found.converged) == bool(whole.converged) == converged
        for name in ("residual_norm", "objective"):
            assert getattr(found, name) == pytest.approx(getattr(whole, name), rel=1e-6)
        if not converged:  # that of the answer is rounding
            assert found.gradient_norm == pytest.approx(whole.gradient_norm, rel=1e-6)
