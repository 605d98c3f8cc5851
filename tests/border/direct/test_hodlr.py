"""The Schur complement of a border by hierarchical low-rank blocks, against dense matrices and the iteration."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lsconv
from lsconv.border.cost_model import Factorise, Limits
from lsconv.border.direct.crossed_border import crossed_border, is_even
from lsconv.border.direct.direct_pass import DirectInverse
from lsconv.border.direct.hodlr import HodlrInverse, HodlrSchur
from lsconv.border.direct.schur_complement import column_blocks
from lsconv.border.direct.strip import Strip
from lsconv.border.normal_problem import NormalProblem, Request
from lsconv.border.plan import BorderPlan
from lsconv.fourier.frequency_matrices import Grid

F64 = torch.float64


def hierarchical(matrices: Tensor, leaf: int) -> HodlrInverse:
    size = matrices.shape[-1]

    def block(first: int, second: int, count: int) -> Tensor:
        whole = torch.eye(2 * size + count, dtype=F64).repeat(len(matrices), 1, 1)
        whole[:, :size, :size] = matrices
        return whole[:, first : first + count, second : second + count]

    return HodlrInverse(block, size, 1, leaf)


def test_matrices_whose_halves_see_each_other_by_few_waves_are_inverted() -> None:
    x = torch.arange(203, dtype=F64)
    apart = (x[:, None] - x).abs()
    matrices = torch.stack([torch.exp(-apart / 9) + torch.eye(203), 1 / (1 + (apart / 4) ** 2) + 3 * torch.eye(203)])
    inverse = hierarchical(matrices, 20)
    assert inverse.low_rank
    r = torch.randn(3, 2, 203, dtype=F64)
    expected = torch.linalg.solve(matrices, r.movedim(0, -1)).movedim(-1, 0)
    assert torch.dist(inverse(r), expected) < 1e-7 * expected.norm()
    assert torch.allclose(inverse.logdet, torch.linalg.slogdet(matrices)[1], rtol=1e-10)


def test_matrices_of_full_rank_are_recognised() -> None:
    noise = torch.randn(1, 240, 240, dtype=F64, generator=torch.Generator().manual_seed(0))
    assert not hierarchical(noise @ noise.mT + torch.eye(240), 24).low_rank


def smooth(k: int, width: int, *, even: bool) -> Tensor:
    """A kernel of these sizes, even along both axes or not at all."""
    rows, columns = (torch.linspace(-3, 3, n, dtype=F64) for n in (k, width))
    weight = torch.exp(-rows.square()[:, None] - columns.square())
    return weight if even else weight * (1 + 0.4 * torch.sin(3 * rows)[:, None] + 0.3 * columns)


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize(("in_size", "kernel"), [((160, 8), (5, 4)), ((159, 9), (4, 5))])
def test_the_columns_are_solved_as_by_the_dense_border(
    even: bool, in_size: tuple[int, int], kernel: tuple[int, int]
) -> None:
    A = lsconv.Conv2d(smooth(*kernel, even=even)[None, None], in_size)
    damps = torch.tensor([0.3, 0.1], dtype=F64) * float(A.weight.sum())
    problem = NormalProblem(Request(A, damps, 1e-13, side="residual", shortest_grid=True))
    Q = problem.circulant_parts.Q
    border = crossed_border(problem.form, problem.embedding, None)
    row_kernels = torch.fft.ifft(Q.matrices, dim=1)
    strip = Strip(row_kernels, border, definite=True)
    along = Grid(border.grid[1:], real=True)
    assert is_even(Q.matrices, problem.condition(Q)) == even
    entries = column_blocks(Q.matrices, row_kernels, strip, border, along, definite=True, even=even)
    inverse = HodlrSchur(entries, border, even=even, leaf=border.column_cells // (4 if even else 2) // 9)
    assert inverse.low_rank

    n, m = border.grid
    cells = torch.cartesian_prod(torch.arange(n), torch.arange(m))
    first, second = border.rows[0], border.columns[0]
    held = cells[(cells[:, 0] >= first) | (cells[:, 1] >= second)]
    lags = (held[:, None] - held) % torch.tensor([n, m])
    kernels = Q.grid.inverse(Q.matrices.movedim((-2, -1), (1, 2))[:, 0])[:, 0]
    Q_BB = kernels[:, lags[..., 0], lags[..., 1]]
    at_columns = held[:, 0] < first
    assert int(at_columns.sum()) == border.column_cells
    whole = torch.linalg.inv(Q_BB)[:, at_columns][:, :, at_columns]
    values = torch.randn(3, 2, 1, border.width, border.height, dtype=F64)
    expected = (whole @ values.mT.flatten(2)[..., None]).view(3, 2, 1, border.height, border.width).mT
    assert torch.dist(inverse(values), expected) < 1e-6 * expected.norm()
    logdet = torch.linalg.slogdet(Q_BB)[1] + torch.linalg.slogdet(whole)[1]
    there = (strip.logdet() * along.weights(strip.inverse.device, F64)).sum(-1)
    assert torch.allclose(there, logdet, rtol=1e-8)
    assert torch.allclose(inverse.logdet(), -torch.linalg.slogdet(whole)[1], rtol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "in_size"), [(F64, (530, 524)), (torch.float32, (523, 531))])
def test_a_kept_plan_of_a_large_image_is_certified_after_one_pass(dtype: torch.dtype, in_size: tuple[int, int]) -> None:
    A = lsconv.Conv2d(smooth(9, 9, even=False)[None, None].to(dtype), in_size)
    damp = 1e-1 * float(A.weight.sum())
    plan = BorderPlan(A, damp)
    plan.inverse.factorise()
    direct = plan.inverse.direct
    assert isinstance(direct, DirectInverse)
    assert direct._border is not None
    assert isinstance(direct._border.schur, HodlrSchur)
    y = torch.randn(2, *A.out_shape, dtype=dtype)
    solution = plan.solve(y)
    assert bool(solution.converged.all())
    assert int(solution.iterations.max()) == 0
    iterated = BorderPlan(A, damp, limits=Limits(factorise=Factorise.NEVER)).solve(y)
    assert torch.dist(solution.x, iterated.x) < (1e-7 if dtype == F64 else 1e-3) * iterated.x.norm()


@pytest.mark.slow
@pytest.mark.parametrize("spare", [None, 0])
def test_large_ranks_leave_it_to_dense_factors_where_they_fit_and_to_the_iteration(spare: int | None) -> None:
    weight = torch.rand(1, 1, 9, 9, dtype=F64, generator=torch.Generator().manual_seed(0))
    A = lsconv.Conv2d(weight, (530, 524))
    damp = 1e-2 * float(A.weight.sum())
    plan = BorderPlan(A, damp, limits=Limits(factorise=Factorise.AFTER_ITERATIONS, spare_bytes=spare))
    plan.inverse.factorise()
    direct = plan.inverse.direct
    assert (direct is None) == (spare is not None)
    if isinstance(direct, DirectInverse):
        assert direct._border is not None
        assert not isinstance(direct._border.schur, HodlrSchur)
    y = torch.randn(A.out_shape, dtype=F64)
    solution = plan.solve(y)
    assert bool(solution.converged)
    gradient = A.adjoint(y - A(solution.x)) - damp**2 * solution.x
    assert gradient.norm() < 1e-9 * A.adjoint(y).norm()
