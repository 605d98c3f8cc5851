"""The factors of a whole border, and the change to them where iterating has cost as much."""

from __future__ import annotations

import math

import pytest
import torch

import lsconv
from lsconv.app import psf
from lsconv.border.border_set import Border, between_borders
from lsconv.border.direct.border_inverse import Cost
from lsconv.border.direct.dense_inverse import DenseInverse
from lsconv.border.normal_inverse import NormalInverse
from lsconv.border.plan import BorderPlan
from lsconv.border.system.cost_model import Effort, Way
from lsconv.fourier.embedding import Embedding
from lsconv.fourier.symbol import FrequencyMatrices, symbol

F64 = torch.float64


def symbol_of(A: lsconv.Convolution) -> tuple[FrequencyMatrices, Embedding]:
    embedding = Embedding(A)
    return symbol(A, embedding), embedding


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [F64, torch.complex128])
def test_restricted_is_the_block_of_the_circulant_matrix(stride: int, dtype: torch.dtype) -> None:
    A = lsconv.Conv2d(torch.randn(3, 2, 3, 3, dtype=dtype), (7, 6), padding=1, stride=stride)
    C, embedding = symbol_of(A)
    outer = Border(embedding.grid, embedding.output_border(), A.device)
    inner = Border(embedding.grid, embedding.input_border(), A.device)
    unit = torch.eye(inner.size, dtype=dtype).unsqueeze(1)
    expected = outer.gather(C.on_grid(inner.scatter(unit))).squeeze(1).mT
    torch.testing.assert_close(between_borders(C.kernel(), outer, inner)[0], expected)


@pytest.mark.parametrize(("definite", "size", "kind"), [(True, 9, "inverse"), (False, 9, "inverse"),
                                                        (True, 70, "cholesky"), (False, 70, "lu")])  # fmt: skip
def test_a_hermitian_operator_on_the_border_is_inverted(definite: bool, size: int, kind: str) -> None:
    A = lsconv.Conv2d(torch.randn(2, 2, 3, 3, dtype=F64), (size, size), padding=1)
    C, embedding = symbol_of(A)
    Q = C.map(lambda m: m @ m.mH if definite else m + m.mH)
    border = Border(embedding.grid, embedding.output_border(), A.device)
    kernel = Q.kernel()
    inverse = DenseInverse(between_borders(kernel, border, border), definite=definite)
    assert inverse.kind == kind
    u = torch.randn(3, 1, border.size, dtype=F64)
    torch.testing.assert_close(inverse(border.gather(Q.on_grid(border.scatter(u)))), u, rtol=1e-7, atol=1e-7)


def test_what_is_said_to_be_definite_and_is_not_gets_pivots() -> None:
    matrix = torch.diag(torch.linspace(-1, 1, 300, dtype=F64))[None]
    inverse = DenseInverse(matrix.clone(), definite=True)
    assert inverse.kind == "lu"
    torch.testing.assert_close(inverse(matrix.mT), torch.eye(300, dtype=F64)[None].mT)


def slow() -> tuple[lsconv.Convolution, float]:
    """Square, random and hardly damped: the border iteration takes thousands of steps, or does not arrive."""
    A = lsconv.Conv2d(
        torch.randn(8, 8, 3, 3, dtype=F64, generator=torch.Generator().manual_seed(0)), (40, 40), padding=1
    )
    return A, 18e-4


def test_a_slow_plan_goes_over_to_the_factors_for_good() -> None:
    A, damp = slow()
    plan = BorderPlan(A, damp)
    assert "grid=(42, 42)" in repr(plan)
    y = torch.randn(2, *A.out_shape, dtype=F64)
    first = plan.solve(y)
    assert bool(first.converged.all())
    assert "grid=(41, 41)" in repr(plan)
    again = plan.solve(y)
    assert int(again.iterations.max()) < 20 < int(first.iterations.max())
    gradient = A.adjoint(y - A(again.x)) - damp**2 * again.x
    assert bool((gradient.flatten(1).norm(dim=1) < 1e-9 * A.adjoint(y).flatten(1).norm(dim=1)).all())
    adjoint = plan.adjoint(y)
    assert abs(torch.vdot(adjoint.flatten(), y.flatten()) - torch.vdot(y.flatten(), again.x.flatten())) < 1e-9 * (
        adjoint.norm() * y.norm()
    )


def test_factors_that_memory_is_short_for_are_not_made() -> None:
    A, damp = slow()
    plan = BorderPlan(A, damp)
    limited = BorderPlan(A, damp, memory_limit=plan._needed(F64) + 2**20)
    limited.solve(torch.randn(A.out_shape, dtype=F64), max_iter=150)
    assert "grid=(42, 42)" in repr(limited)


def test_a_quick_plan_keeps_its_iteration() -> None:
    A, _ = slow()
    plan = BorderPlan(A, 2.0)
    for _ in range(3):
        plan.solve(torch.randn(A.out_shape, dtype=F64))
    assert "grid=(42, 42)" in repr(plan)


def _dense(unknowns: int) -> Cost:
    return Cost(2 / 3 * unknowns**3, 0.0, 0)


def test_solves_end_in_factors_that_would_have_spared_what_they_cost() -> None:
    effort = Effort(1, 10_000, 4, definite=False)
    whole, each = effort.whole(_dense(6000)), effort.iteration(1)
    assert whole > 4 * 96 * each
    effort.next_way(0, whole)
    longer, shorter = (Cost(0.0, 0.0, round(part * (30 / 2 / 3 - 2) * each / 12)) for part in (1.1, 0.9))
    for _ in range(1000):  # less than twice as fast by factors, which have to be read, three times
        effort.remember(30, 1, longer)
    assert effort.missed == 0
    for _ in range(math.ceil(whole / (15.9 * each))):
        assert not effort.overdue
        assert effort.choose(1, 0, 48, 50, 0.1) is Way.NONE
        effort.remember(30, 1, None)  # factors that no one has asked for
        effort.remember(30, 1, shorter)
    assert effort.overdue
    effort.missed = whole - 90 * each
    assert not effort.overdue
    assert effort.choose(1, 0, 96, 50, 0.1) is Way.WHOLE  # together with the solve under way


@pytest.mark.parametrize("spare", [None, 0])
def test_a_plan_that_is_used_again_and_again_goes_over_to_factors_before_a_solve(
    monkeypatch: pytest.MonkeyPatch, spare: int | None
) -> None:
    monkeypatch.setattr(Effort, "choose", lambda *_: Way.NONE)  # no solve is a reason by itself
    A = lsconv.Conv2d(psf.disk(3)[None, None], in_size=(96, 96))
    inverse = NormalInverse(A, 1e-3 * float(lsconv.norm(A)), floor=1e-13, spare_bytes=spare)
    f = torch.randn(A.out_shape, dtype=F64)
    counts = [int(inverse(f, 1e-8)[1]) for _ in range(40)]
    assert counts[0] > 12
    assert counts[-1] == counts[0] if spare == 0 else counts[-1] <= 1


def test_factors_that_the_iterations_to_come_would_cost_are_made_unless_they_leap_ahead() -> None:
    effort = Effort(1, 10_000, 4, definite=False)
    each = effort.iteration(1)
    effort.next_way(0, 24 * each)
    assert effort.choose(1, 0, 12, 13, 0.1) is Way.WHOLE
    assert effort.choose(1, 0, 12, 10, 0.1) is Way.NONE
    effort.next_way(0, 40 * each)
    assert effort.choose(1, 0, 12, 1000, 0.1) is Way.NONE
    assert effort.choose(1, 0, 24, 400, 0.1) is Way.NONE  # it gets faster
    assert effort.choose(1, 0, 48, 300, 0.1) is Way.WHOLE


def test_crossings_are_widened_before_the_factors_are_made_where_that_is_cheaper() -> None:
    effort = Effort(1, 10_000, 4, definite=False)
    each = effort.iteration(1)
    crossing = int((3 / 2 * 5 * each) ** (1 / 3))
    effort.next_way(crossing, 24 * each)
    assert effort.choose(1, 0, 12, 13, 0.1) is Way.CROSSING
    assert effort.choose(1, 0, 12, 100, 0.1) is Way.WHOLE
    effort.next_way(crossing, 200 * each)
    assert effort.choose(1, 0, 12, 100, 0.1) is Way.CROSSING
    assert effort.choose(1, 0, 12, 8, 0.1) is Way.NONE


def test_the_way_that_ends_the_iteration_may_cost_more_than_the_one_that_shortens_it() -> None:
    effort = Effort(1, 100, 3, definite=False)
    assert effort.next_way(1000, effort.whole(_dense(1400))) is Way.WHOLE
    assert effort.next_way(1000, effort.whole(_dense(1500))) is Way.CROSSING
    assert effort.next_way(0, effort.whole(_dense(10**6))) is Way.WHOLE
    assert effort.next_way(0, 0) is Way.NONE


def test_definite_systems_cost_less() -> None:
    definite, mixed = (Effort(2, 100, 3, definite=flag) for flag in (True, False))
    assert definite.factors(50) * 2 == mixed.factors(50)
    first, fourth = definite.iteration(2) - definite.iteration(1), definite.iteration(5) - definite.iteration(4)
    assert first == pytest.approx(fourth)
    assert 0 < first < definite.iteration(1) < mixed.iteration(1)


def test_the_inverse_of_a_singular_matrix_is_a_pseudo_inverse() -> None:
    g = torch.Generator().manual_seed(0)
    M = torch.randn(3, 6, 6, dtype=F64, generator=g)
    M = M + M.mT
    M[1, 4], M[1, :, 4] = 0.0, 0.0
    r = torch.randn(2, 3, 6, dtype=F64, generator=g)
    expected = torch.stack([r[:, b] @ torch.linalg.pinv(M[b]).mT for b in range(3)], dim=1)
    torch.testing.assert_close(DenseInverse(M.clone(), definite=False)(r), expected)


def test_what_one_widening_spared_decides_about_the_next() -> None:
    efforts = [Effort(1, 10_000, 2, definite=False) for _ in range(2)]
    for effort, rate in zip(efforts, (0.11, 0.9), strict=True):  # the fall after the widening, before it 0.1
        crossing = 1000
        effort.next_way(crossing, 0)
        its = 3 * effort.factors(crossing) / effort.iteration(1)
        assert effort.choose(1, 0, int(its), its, 0.1) is Way.CROSSING
        effort.widened()
        assert effort.spent == 0
        assert (effort.choose(1, 0, int(its), its, rate) is Way.CROSSING) is (rate == 0.9)
        assert effort.spared == pytest.approx(1 - 0.1 / rate)
        effort.latest, effort.spent = 50, 7 * effort.factors(crossing)
        assert effort.due(Way.CROSSING) is (rate == 0.9)


def test_factors_in_single_precision_take_half_as_long() -> None:
    precise, single = (Effort(1, 100, 3, definite=True, single=flag) for flag in (False, True))
    assert single.factors(50) * 2 == precise.factors(50)
    grid = precise.whole(Cost(0.0, 0.0, 1))  # and one entry
    assert (single.whole(_dense(50)) - grid) * 2 == pytest.approx(precise.whole(_dense(50)) - grid, rel=0.05)
    assert single.first_crossing == precise.first_crossing
