"""What the search has found stays mended: no answer of these problems is certified and wrong, none is in doubt."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore::lsconv.ConvergenceWarning")

# the seed of a problem, and the ways that had it wrong, missed it, or raised a false alarm
FAULTS = [
    (40000097, "cgls"),  # the equations are met to rounding, which the gradient of a tiny damping is not
    (40000193, "craig"),
    pytest.param(
        31000164, "refine", marks=pytest.mark.slow
    ),  # ||A|| is not known from an x along small singular values
    (40000060, "cgls, circulant"),  # nor from few iterations
    (40000181, "tikhonov, Gradient"),  # the gradient of LSMR is no multiple of its last vector
    (40000193, "border, plan"),  # x is in the range of A^H, which the gradient does not show
    (40000163, "border, plan"),
    (40000268, "border, factored"),  # x is not in the range of A^H, and is brought there
    (40000243, "refine"),
    (40000350, "border"),  # a border that fails has a fallback
    (40000160, "border"),
    (40000054, "tikhonov, border"),
    (40000066, "tikhonov, lsmr"),  # M divides the residual by a damping below its rounding
    (31000024, "refine"),  # directions that were not taken
    (40000286, "gmres"),  # restarted where there was no need
    (40000320, "border, factored"),  # an empty block
    (30000108, "craig"),  # a residual that is small by chance
    (30000245, "cg, normal"),
    (20000518, "border"),  # a null part beside a tiny damping
    (10000845, "auto"),
    (33000065, "auto"),  # the null space of A^H was whole, that of A was not
    (51000048, "lsmr"),  # an error along small singular values hides in the rounding of the gradient
    (5000235, "tikhonov, lsmr"),
    (54000083, "refine"),  # and low precision does not see it
    pytest.param(55000077, "refine", marks=pytest.mark.slow),
    (64000012, "lsqr"),  # the equations are met, and what is left of the objective is the damping's
    (51000029, "cg, normal"),  # an eigenvalue of A^H A at its rounding, where the judge was wrong
    (52000043, "craig"),  # x is as long as float32 reaches
    (131000017, "craig"),  # a step along a singular value that rounding has made
    pytest.param(5000025, "tikhonov, Laplacian", marks=pytest.mark.slow),
    (55000028, "tikhonov, Gradient"),  # a small stack [A; damp L] is decomposed where LSMR does not serve
    (50000347, "tikhonov, Laplacian"),
    (200000791, "border, plan"),  # rounding as large as the gradient, in the plans of the border too
    (201000584, "tikhonov, Laplacian"),
    (201001173, "border"),
    (201000737, "minres, normal"),  # a part in the null space that the residual lies in
    (500000228, "auto"),  # x in the range of the whole A^H and not of the masked one
    (500000388, "auto"),
    (500001095, "tikhonov"),  # a null vector next to the rounding of the capacitance matrix
    (8200000105, "tikhonov, Laplacian"),  # an error along small singular values within the rounding of the gradient
    (510000684, "lsqr"),  # an x so long that only singular values which count as zero can have led to it
    (510000539, "border"),  # a part in the null space below the rounding of the gradient
    (527000201, "cg, normal"),  # the residual of a singular system does not see what x has in its null space
    (33000142, "svd"),  # data beside the range of A, where the judge was wrong
]


@pytest.mark.parametrize(("seed", "way"), FAULTS)
def test_a_fault_of_the_search_stays_mended(seed: int, way: str) -> None:
    from benchmarks.certificates.problems import draw
    from benchmarks.certificates.ways import solve

    torch.manual_seed(seed)
    problem = draw(seed)
    assert problem is not None
    cases = solve(problem, way)
    assert [case.text for case in cases if case.outcome == "crash"] == []
    assert [case.text for case in cases if case.wrong] == []
    assert [case.text for case in cases if case.well_posed and case.outcome != "certified"] == []
    assert any(case.outcome == "certified" for case in cases)


@pytest.mark.parametrize("seed", [700000250, 700000396])
def test_a_trial_that_its_limit_has_ended_is_not_certified_by_its_rounding(seed: int) -> None:
    from benchmarks.certificates.problems import draw
    from benchmarks.certificates.ways import solve

    problem = draw(seed)
    assert problem is not None
    cases = solve(problem, "trial")
    assert [case.text for case in cases if case.wrong] == []
    assert any(case.outcome == "uncertified" for case in cases)
