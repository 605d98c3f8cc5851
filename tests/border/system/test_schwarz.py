"""The border of a grid, and the Schwarz preconditioner on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lsconv
from lsconv.border.border_set import Border
from lsconv.border.normal_inverse import NormalInverse
from lsconv.border.system import schwarz as schwarz_module
from lsconv.border.system.cost_model import Effort
from lsconv.fourier.embedding import Embedding

pytestmark = pytest.mark.usefixtures("iterated")


@st.composite
def _borders(draw: Any) -> tuple[tuple[int, ...], list[list[list[int]]]]:
    grid = tuple(draw(st.lists(st.integers(2, 6), min_size=1, max_size=3)))
    places = st.tuples(*(st.lists(st.integers(0, n - 1), max_size=n - 1, unique=True).map(sorted) for n in grid))
    positions = [[list(p) for p in draw(places)] for _ in range(draw(st.integers(1, 3)))]
    return grid, positions


@given(case=_borders())
def test_border_is_every_cell_marked_along_any_axis(case: Any) -> None:
    grid, positions = case
    border = Border(grid, positions, torch.device("cpu"))
    expected = [
        (channel, *cell)
        for channel, axes in enumerate(positions)
        for cell in torch.cartesian_prod(*(torch.arange(n) for n in grid)).reshape(-1, len(grid)).tolist()
        if any(place in axes[a] for a, place in enumerate(cell))
    ]
    assert [tuple(cell) for cell in border.mask.nonzero().tolist()] == expected
    assert border.size == len(expected)


@given(case=_borders())
def test_gather_is_the_adjoint_and_the_left_inverse_of_scatter(case: Any) -> None:
    grid, positions = case
    border = Border(grid, positions, torch.device("cpu"))
    b = torch.randn(2, 3, border.size, dtype=torch.float64)
    z = torch.randn(2, 3, len(positions), *grid, dtype=torch.float64)
    assert torch.equal(border.gather(border.scatter(b)), b)
    torch.testing.assert_close((border.scatter(b) * z).sum(), (b * border.gather(z)).sum())
    assert border.scatter(b).count_nonzero() == b.count_nonzero()


CASES = {
    "valid": ((2, 3, 3, 3), (14, 12), 0, 0.05),
    "full": ((3, 2, 3, 3), (12, 12), 2, 0.05),
    "valid, 3-D": ((1, 2, 2, 2, 2), (6, 5, 6), 0, 0.05),
}


def _inverse(name: str, **options: Any) -> NormalInverse:
    shape, size, padding, damp = CASES[name]
    A = lsconv.Convolution(torch.randn(shape, dtype=torch.float64), size, padding=padding)
    return NormalInverse(A, damp, floor=1e-10, **options)


def _matrix(function: Any, n: int) -> torch.Tensor:
    return function(torch.eye(n, dtype=torch.float64).reshape(n, 1, n)).reshape(n, n).T


@pytest.mark.parametrize("name", CASES)
def test_a_small_border_is_inverted_exactly(name: str) -> None:
    inverse = _inverse(name)
    n = inverse.border.size
    product = _matrix(inverse.on_border, n) @ _matrix(inverse.schwarz, n)
    torch.testing.assert_close(product, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-7)


@pytest.mark.parametrize("crossings", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_preconditioner_of_a_definite_border_is_hermitian_positive_definite(
    monkeypatch: pytest.MonkeyPatch, name: str, crossings: bool
) -> None:
    monkeypatch.setattr(schwarz_module, "_DENSE_UNKNOWNS", 0)
    inverse = _inverse(name)
    additive = schwarz_module.Schwarz(inverse.system, inverse.border, definite=True, crossings=crossings)
    M = _matrix(additive, inverse.border.size)
    torch.testing.assert_close(M, M.T, rtol=0, atol=1e-9 * float(M.abs().max()))
    assert torch.linalg.eigvalsh(M)[0] > 0


@pytest.mark.parametrize("padding", [0, 1, 2])
def test_restricted_every_cell_takes_its_correction_from_one_patch(
    monkeypatch: pytest.MonkeyPatch, padding: int
) -> None:
    monkeypatch.setattr(schwarz_module, "_DENSE_UNKNOWNS", 0)
    A = lsconv.Conv2d(torch.randn(2, 2, 3, 3, dtype=torch.float64), (24, 20), padding=padding)
    schwarz = NormalInverse(A, 0.1, floor=1e-10).schwarz
    assert schwarz.restricted
    assert len(schwarz.patches) == 3
    owner, r = schwarz._owners(schwarz.patches), torch.randn(2, 1, schwarz.border.size, dtype=torch.float64)
    own = [torch.full_like(r, torch.nan).index_copy_(-1, p.index, p(r[..., p.index])) for p in schwarz.patches]
    assert owner.unique().tolist() == [0, 1, 2]
    want = torch.stack(own).gather(0, owner.expand(1, *r.shape))[0]
    torch.testing.assert_close(schwarz(r), want, rtol=1e-12, atol=0)


def _iterations(A: lsconv.Convolution, damp: float, crossings: bool) -> int:
    inverse = NormalInverse(A, damp, floor=1e-10, crossings=crossings)
    shape = A.out_shape if inverse.side == "residual" else A.in_shape
    _, iterations = inverse(torch.randn(shape, dtype=A.dtype), 1e-8)
    return int(iterations)


@pytest.mark.parametrize(
    ("channels", "padding", "damp", "form"),
    [((4, 4), 0, 1e-3, "valid"), ((4, 4), 2, 1e-2, "full"), ((3, 2), 1, 1e-2, "mixed"), ((4, 4), 1, 1.0, "mixed")],
)
def test_crossings_save_iterations(
    monkeypatch: pytest.MonkeyPatch, channels: tuple[int, int], padding: int, damp: float, form: str
) -> None:
    monkeypatch.setattr(schwarz_module, "_DENSE_UNKNOWNS", 0)
    monkeypatch.setattr(Effort, "ends", lambda *_: False)
    A = lsconv.Conv2d(torch.randn(*channels, 3, 3, dtype=torch.float64), (32, 32), padding=padding)
    assert NormalInverse(A, damp, floor=1e-10).form == form
    with_crossings, slabs_only = _iterations(A, damp, True), _iterations(A, damp, False)
    assert with_crossings < slabs_only


def test_one_axis_needs_no_iteration_worth_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schwarz_module, "_DENSE_UNKNOWNS", 0)
    A = lsconv.Conv1d(torch.randn(3, 4, 9, dtype=torch.float64), 300)
    assert Embedding(A).axes[0].border_out()
    assert _iterations(A, 0.0, True) <= 2
