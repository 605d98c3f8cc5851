"""The null space that a plan of the border knows is the whole one, and who does not know it does not certify."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lsconv
from lsconv.border import null_space
from lsconv.border.capacitance import Capacitance
from lsconv.border.capacitance_plan import CapacitancePlan
from lsconv.border.cost_model import plan_bytes
from lsconv.border.null_space import small_singular_vectors
from lsconv.border.plan import BorderPlan

F64 = torch.float64


def equal_channels(count: int) -> lsconv.Convolution:
    """One kernel a channel, each with one exact null vector."""
    weight = torch.zeros(count, count, 3, dtype=F64)
    weight[range(count), range(count)] = torch.tensor([1.0, 0.0, 1.0], dtype=F64)
    return lsconv.Conv1d(weight, 9, padding=1)


def uneven_extensions() -> lsconv.Convolution:
    """One null vector, beside border vectors whose extensions are of very different lengths."""
    taps = [0.2388419151456991, -5.29034865931915, 10.558011910522135, -5.769231966844716, 0.26272636938637567]
    return lsconv.Conv1d(torch.tensor([[taps]], dtype=F64), 15, padding=((0, 4),))


def assert_shortest(A: lsconv.Convolution, plan: CapacitancePlan, bound: float) -> None:
    """Nullity and answers are those of the dense pseudo-inverse."""
    matrix = A.to_dense()
    rank = int(torch.linalg.matrix_rank(matrix, rtol=plan.rcond))
    y = torch.randn(3, *A.out_shape, dtype=A.dtype, generator=torch.Generator().manual_seed(0))
    exact = (y.flatten(1) @ torch.linalg.pinv(matrix, rtol=plan.rcond).mT).reshape(3, *A.in_shape)
    solution = plan.solve(y)
    assert solution.nullity.tolist() == [A.in_numel - rank] * 3
    assert solution.converged.all()
    torch.testing.assert_close(solution.x, exact, rtol=0, atol=bound * float(exact.norm()))


def one_direction(capacitance: Capacitance, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The vectors of the smallest singular value, and random ones in place of the others."""
    sigma, *vectors = small_singular_vectors(capacitance, count)
    generator = torch.Generator().manual_seed(3)
    others = [torch.randn(v.shape, generator=generator, dtype=v.dtype) for v in vectors]
    left, right = (
        torch.linalg.qr(torch.cat([v[..., :1], o[..., 1:]], -1)).Q for v, o in zip(vectors, others, strict=True)
    )
    return sigma, left, right


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_candidates_that_show_one_direction_are_completed(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every eighth cell is a chain of its own, and two chains of odd length have a null vector in each channel."""
    monkeypatch.setattr(null_space, "small_singular_vectors", one_direction)
    weight = equal_channels(channels).weight
    A = lsconv.Conv1d(weight, 34, padding=8, dilation=8)
    plan = CapacitancePlan(A)
    assert plan.nullity.tolist() == [2 * channels]
    assert_shortest(A, plan, 1e-11)


@pytest.mark.parametrize("channels", [1, 4, 12])
def test_every_equal_null_direction_counts(channels: int) -> None:
    A = equal_channels(channels)
    assert_shortest(A, CapacitancePlan(A), 1e-11)


def test_extensions_of_different_lengths_hide_no_null_vector() -> None:
    """Data off the range lose digits through S here: the plan does not certify them, and lstsq has another way."""
    A = uneven_extensions()
    plan = CapacitancePlan(A)
    assert plan.nullity.tolist() == [1]
    y = torch.randn(3, *A.out_shape, dtype=F64, generator=torch.Generator().manual_seed(0))
    inverse = torch.linalg.pinv(A.to_dense(), rtol=plan.rcond)
    for data in (A(y), y):
        exact = (data.flatten(1) @ inverse.mT).reshape(3, *A.in_shape)
        direct, answer = plan.solve(data), lsconv.lstsq(A, data)
        error = (direct.x - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
        assert (~direct.converged | (error < 1e-8)).all()
        assert answer.converged.all()
        assert answer.nullity.tolist() == [1, 1, 1]
        torch.testing.assert_close(answer.x, exact, rtol=0, atol=1e-8 * float(exact.norm()))


def test_one_exact_null_vector_in_a_batch_is_certified_by_the_iteration_without_its_null_part() -> None:
    """The second of three kernels is singular; its answer is in doubt, and brought into the range of A^H."""
    weight = torch.tensor([[2.0, 7.0, 2.0], [1.0, 0.0, 1.0], [1.0, -5.0, 2.0]], dtype=F64)[:, None, None]
    A = lsconv.Conv1d(weight, 9, padding=1)
    ranks = torch.linalg.matrix_rank(A.to_dense(), rtol=1e-12).tolist()
    assert ranks == [9, 8, 9]
    y = A(torch.randn(3, 1, 9, dtype=F64, generator=torch.Generator().manual_seed(0)))
    solution = BorderPlan(A).solve(y)
    exact = torch.linalg.pinv(A.to_dense(), rtol=1e-12) @ y.mT
    for answer in (solution, lsconv.lstsq(A, y)):
        assert answer.converged.all()
        torch.testing.assert_close(answer.x, exact.mT, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [(2, 2, 2), (3, 2), (4,)])
def test_tiny_problems_need_little_memory(size: tuple[int, ...]) -> None:
    A = lsconv.Convolution(torch.ones(1, 1, *(2 for _ in size)), size, padding=(1,) * len(size))
    assert plan_bytes(A) < 2**20
