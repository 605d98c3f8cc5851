"""The Schwarz preconditioner on a border."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import lsconv
from lsconv.border.border_set import Border
from lsconv.border.cost_model import CostModel, Factorise, Limits
from lsconv.border.normal_inverse import BorderInverse, normal_inverse
from lsconv.border.normal_problem import Request
from lsconv.border.penalty import common_grid_filters
from lsconv.border.plan import BorderPlan
from lsconv.border.system.border_system import BorderProblem, Schwarz, Subdomain, SubdomainSum
from lsconv.fourier.batched_linalg import DenseInverse
from lsconv.fourier.embedding import Embedding
from lsconv.fourier.frequency_matrices import FrequencyMatrices, Grid

F64 = torch.float64
WITHOUT_DENSE = Limits(factorise=Factorise.NEVER, dense_unknowns=0)


CASES = {
    "valid": ((2, 3, 3, 3), (14, 12), 0, 0.05),
    "full": ((3, 2, 3, 3), (12, 12), 2, 0.05),
    "valid, 3-D": ((1, 2, 2, 2, 2), (6, 5, 6), 0, 0.05),
}


def _inverse(name: str, limits: Limits | None = None) -> BorderInverse:
    shape, size, padding, damp = CASES[name]
    A = lsconv.Convolution(torch.randn(shape, dtype=torch.float64), size, padding=padding)
    inverse = normal_inverse(Request.of(A, damp, floor=1e-10, limits=limits))
    assert isinstance(inverse, BorderInverse)
    return inverse


def _matrix(function: Any, n: int) -> torch.Tensor:
    return function(torch.eye(n, dtype=torch.float64).reshape(n, 1, n)).reshape(n, n).T


@pytest.mark.parametrize("name", CASES)
def test_a_small_border_is_inverted_exactly(name: str) -> None:
    inverse = _inverse(name)
    n = inverse.border.size
    product = _matrix(inverse.begin_iteration(), n) @ _matrix(inverse.begin_iteration().schwarz, n)
    torch.testing.assert_close(product, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-7)


@pytest.mark.parametrize("corners", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_preconditioner_of_a_definite_border_is_hermitian_positive_definite(name: str, corners: bool) -> None:
    inverse = _inverse(name)
    problem = BorderProblem(inverse.Q, inverse.border, inverse.model, limits=replace(WITHOUT_DENSE, corners=corners))
    additive = Schwarz(problem)
    M = _matrix(additive, inverse.border.size)
    torch.testing.assert_close(M, M.T, rtol=0, atol=1e-9 * float(M.abs().max()))
    assert torch.linalg.eigvalsh(M)[0] > 0


@pytest.mark.parametrize("padding", [0, 1, 2])
def test_restricted_every_cell_takes_its_correction_from_one_subdomain(padding: int) -> None:
    A = lsconv.Conv2d(torch.randn(2, 2, 3, 3, dtype=torch.float64), (24, 20), padding=padding)
    inverse = normal_inverse(Request.of(A, 0.1, floor=1e-10, limits=WITHOUT_DENSE))
    assert isinstance(inverse, BorderInverse)
    schwarz = inverse.begin_iteration().schwarz
    assert schwarz.problem.restricted
    assert len(schwarz.subdomains) == 3
    owner, r = schwarz.owners(), torch.randn(2, 1, schwarz.border.size, dtype=torch.float64)
    own = [torch.full_like(r, torch.nan).index_copy_(-1, p.index, p(r[..., p.index])) for p in schwarz.subdomains]
    assert owner.unique().tolist() == [0, 1, 2]
    want = torch.stack(own).gather(0, owner.expand(1, *r.shape))[0]
    torch.testing.assert_close(schwarz(r), want, rtol=1e-12, atol=0)


def _iterations(A: lsconv.Convolution, damp: float, corners: bool) -> int:
    inverse = normal_inverse(Request.of(A, damp, floor=1e-10, limits=replace(WITHOUT_DENSE, corners=corners)))
    shape = A.out_shape if inverse.side == "residual" else A.in_shape
    _, iterations = inverse(torch.randn(shape, dtype=A.dtype), 1e-8)
    return int(iterations)


@pytest.mark.parametrize(
    ("channels", "padding", "damp", "form"),
    [((4, 4), 0, 1e-3, "valid"), ((4, 4), 2, 1e-2, "full"), ((3, 2), 1, 1e-2, "saddle"), ((4, 4), 1, 1.0, "saddle")],
)
def test_corners_save_iterations(channels: tuple[int, int], padding: int, damp: float, form: str) -> None:
    A = lsconv.Conv2d(torch.randn(*channels, 3, 3, dtype=torch.float64), (32, 32), padding=padding)
    assert normal_inverse(Request.of(A, damp, floor=1e-10)).form == form
    with_corners, strips_only = _iterations(A, damp, True), _iterations(A, damp, False)
    assert with_corners < strips_only


def test_a_border_along_one_axis_takes_at_most_two_iterations() -> None:
    A = lsconv.Conv1d(torch.randn(3, 4, 9, dtype=torch.float64), 300)
    assert Embedding(A).axes[0].border_out
    assert _iterations(A, 0.0, True) <= 2


# ------------------------------------------------------------------ the sum of the corrections, against them one by one

SIZE = 40


def _definite(*shape: int) -> Tensor:
    root = torch.randn(*shape, dtype=F64)
    return root @ root.mT + torch.eye(shape[-1], dtype=F64)


def _strip(cells: int, length: int, blocks: int) -> Subdomain:
    """On border cells taken at random."""
    grid = Grid((length,), real=True)
    matrices = _definite(blocks, length // 2 + 1, cells, cells).to(torch.complex128)
    return Subdomain(torch.randperm(SIZE)[: cells * length], (cells, length), FrequencyMatrices(grid, matrices))


def _dense(size: int, blocks: int) -> Subdomain:
    return Subdomain(torch.randperm(SIZE)[:size], (size,), DenseInverse(_definite(blocks, size, size), definite=True))


def _subdomains(kind: str, blocks: int) -> list[Subdomain]:
    if kind == "square":
        return [_strip(3, 8, blocks), _strip(3, 8, blocks), _dense(7, blocks)]
    if kind == "strips alone":
        return [_strip(5, 6, blocks), _strip(5, 6, blocks)]
    if kind == "oblong":
        return [_strip(3, 8, blocks), _strip(3, 10, blocks), _dense(7, blocks)]
    return [_dense(SIZE, blocks)]


KINDS = ["square", "strips alone", "oblong", "one"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("matrices", ["of every block", "one for all"])
def test_additive_is_the_sum_of_all(kind: str, blocks: int, matrices: str) -> None:
    subdomains = _subdomains(kind, blocks if matrices == "of every block" else 1)
    r = torch.randn(3, blocks, SIZE, dtype=F64)
    want = sum(torch.zeros_like(r).index_add_(-1, p.index, p(r[..., p.index])) for p in subdomains)
    torch.testing.assert_close(SubdomainSum(subdomains, SIZE, None)(r), want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("matrices", ["of every block", "one for all"])
def test_restricted_a_cell_has_the_correction_of_its_owner(kind: str, blocks: int, matrices: str) -> None:
    subdomains = _subdomains(kind, blocks if matrices == "of every block" else 1)
    r, size = torch.randn(3, blocks, SIZE, dtype=F64), SIZE
    reached = torch.stack([torch.zeros(size).index_fill_(0, p.index, 1.0) for p in subdomains])
    cells = reached.any(0).nonzero().flatten()  # what no subdomain reaches is no border
    owner = torch.multinomial(reached[:, cells].mT, 1).flatten()
    number = torch.full((size,), -1)
    number[cells] = torch.arange(len(cells))
    r, size = r[..., cells], len(cells)
    subdomains = [Subdomain(number[p.index], p.shape, p.inverse) for p in subdomains]
    own = torch.stack([torch.zeros_like(r).index_copy_(-1, p.index, p(r[..., p.index])) for p in subdomains])
    want = own.gather(0, owner.expand(1, *r.shape))[0]
    torch.testing.assert_close(SubdomainSum(subdomains, size, owner)(r), want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("channels", [1, 2])
def test_the_border_matrix_is_the_dense_operator_between_border_cells(channels: int, dtype: torch.dtype) -> None:
    grid = Grid((7, 6), real=not dtype.is_complex)
    kernel = torch.randn(2, channels, channels, 7, 6, dtype=dtype)
    matrices = FrequencyMatrices(grid, grid.transform(kernel).movedim((1, 2), (-2, -1)))
    border = Border((7, 6), [[[0, 1, 6], [4, 5]], [[2, 3], [0]]][:channels], torch.device("cpu"))
    cells = border.mask.nonzero()
    dense = torch.zeros(2, border.size, border.size, dtype=dtype)
    for i, (c, *p) in enumerate(cells.tolist()):
        for j, (d, *q) in enumerate(cells.tolist()):
            dense[:, i, j] = kernel[:, c, d, (p[0] - q[0]) % 7, (p[1] - q[1]) % 6]
    u = torch.randn(3, 2, border.size, dtype=dtype)
    torch.testing.assert_close(
        BorderProblem(matrices, border, CostModel(2, 42, channels, False)).product(u),
        torch.einsum("bij,rbj->rbi", dense, u),
    )


ITERATED = Limits(factorise=Factorise.NEVER)


@pytest.mark.parametrize("rtol", [1e-6, 1e-9])
def test_a_plan_that_iterates_solves_the_normal_equations(rtol: float) -> None:
    A = lsconv.Conv2d(torch.rand(1, 1, 5, 5, dtype=torch.float64), in_size=(120, 90))
    y = torch.randn(2, *A.out_shape, dtype=torch.float64)
    solution = BorderPlan(A, 20.0, limits=ITERATED).solve(y, rtol=rtol)
    assert bool(solution.converged.all())
    gradient = A.adjoint(y - A(solution.x)) - 400 * solution.x  # of curvature 400 and more
    assert torch.linalg.vector_norm(gradient / 400) < 10 * rtol * torch.linalg.vector_norm(solution.x)


@pytest.mark.parametrize("case", ["valid", "same", "gradient"])
def test_a_batch_has_the_answers_of_its_items_alone_and_goes_on_from_them(case: str) -> None:
    torch.manual_seed(0)
    A = lsconv.Conv2d(
        torch.rand(1, 1, 3, 5, dtype=torch.float64), in_size=(120, 90), padding=(1 if case == "same" else 0, 0)
    )
    L = lsconv.Gradient(A.in_shape, dtype=torch.float64) if case == "gradient" else None
    inverse = normal_inverse(Request.of(A, 4.0, common_grid_filters(A, L), floor=1e-10, limits=ITERATED))
    f = torch.randn(3, *(A.in_shape if inverse.side == "solution" else A.out_shape), dtype=torch.float64)
    batch, _, u = inverse.solve_from(f, 1e-12)
    alone = torch.stack([inverse.solve_from(item, 1e-12)[0] for item in f])
    torch.testing.assert_close(alone, batch, rtol=0, atol=1e-10 * float(batch.abs().max()))
    again, iterations, _ = inverse.solve_from(f, 1e-9, start=u)
    assert int(iterations.max()) == 0
    torch.testing.assert_close(again, batch, rtol=0, atol=1e-10 * float(batch.abs().max()))
