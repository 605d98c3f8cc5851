"""Rows that are zero are no data: whatever stands there, the choice of damp is that of the rows left."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lsconv
from lsconv.inverse.damping.choose_damp import Selection, choose_damp
from lsconv.inverse.damping.measured import interpolated, zero_rows
from lsconv.inverse.damping.rules import RULES, WITH_NOISE
from lsconv.operators.base import LinearOperator

DOUBLE = torch.float64
NOISE = 0.1


def blur(n: int = 40, dtype: torch.dtype = DOUBLE) -> lsconv.Conv1d:
    return lsconv.Conv1d(torch.tensor([[[1.0, 4.0, 6.0, 4.0, 1.0]]], dtype=dtype) / 16, in_size=n)


def mask(share: float, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(5)) >= share


def compositions() -> dict[str, LinearOperator]:
    A = blur()
    whole, keep, other = A.out_shape, mask(0.3, *A.out_shape), mask(0.4, 1, 36).roll(3, -1)
    M = lsconv.Mask(keep, dtype=DOUBLE)
    crop = lsconv.Crop((1, 60), (10,), (36,), dtype=DOUBLE)
    return {
        "mask": M @ A,
        "masks": lsconv.Mask(other, dtype=DOUBLE) @ (2 * M) @ A,
        "diagonal": lsconv.Diagonal(keep * (1 + torch.rand(whole, dtype=DOUBLE))) @ A,
        "adjoint of a crop": crop.H @ A,
        "padding": lsconv.Pad((1, 36), ((3, 7),), dtype=DOUBLE) @ A,
        "stack": lsconv.vstack([M @ A, 0.5 * A]),
        "sum": M @ A + lsconv.Mask(keep & other, dtype=DOUBLE) @ A,
        "masked unknowns": A @ lsconv.Mask(torch.arange(40)[None] > 12, dtype=DOUBLE),
        "adjoint": (A.H @ M).H,
        "functions": lsconv.FromFunctions(
            A.in_shape, whole, lambda x: keep * A(x), lambda y: A.H(keep * y), dtype=DOUBLE
        ),
        "matrix": lsconv.Dense((M @ A).to_dense()),
        "padding beyond the kernel": lsconv.Conv1d(A.weight, 40, padding=9),
    }


@pytest.mark.parametrize("kind", compositions())
def test_zero_rows_are_those_of_the_matrix(kind: str) -> None:
    A = compositions()[kind]
    rows = zero_rows(A)
    assert rows is not None
    torch.testing.assert_close(rows.flatten(), (A.to_dense() == 0).all(1))


@pytest.mark.parametrize("kernel", [[1.0, -1.0], [1.0, 1.0], [1e-12, 0.0]])
def test_rows_that_may_cancel_are_none(kernel: list[float]) -> None:
    assert zero_rows(lsconv.Conv1d(torch.tensor([[kernel]]), in_size=200_000)) is None
    assert zero_rows(lsconv.Identity((200_000,))) is None


def check(A: LinearOperator, y: Tensor, rule: str, L: LinearOperator | None, **options: object) -> Selection:
    """The choice is that of the matrix of the measured rows."""
    rows = (A.to_dense() != 0).any(1)
    left, data = lsconv.Dense(A.to_dense()[rows]), y.flatten()[rows]
    penalty = None if L is None else lsconv.Dense(L.to_dense())
    noise = NOISE if rule in WITH_NOISE else None
    selection = choose_damp(A, y, rule, L=L, noise_std=noise, **options)  # type: ignore[arg-type]
    expected = choose_damp(left, data, rule, L=penalty, noise_std=noise)
    rtol = 0.1 if options else 1e-3
    torch.testing.assert_close(selection.damp.double(), expected.damp.double(), rtol=rtol, atol=0)
    return selection


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        *((kind, "gcv") for kind in compositions()),
        *((kind, rule) for kind in ("masks", "stack", "padding beyond the kernel") for rule in RULES if rule != "gcv"),
    ],
)
def test_the_choice_is_that_of_the_measured_rows(kind: str, rule: str) -> None:
    A = compositions()[kind]
    clean = A(torch.randn(A.in_shape, dtype=DOUBLE).cumsum(-1) / 4)
    y = clean + NOISE * torch.randn(clean.shape, dtype=DOUBLE)
    rows = zero_rows(A)
    assert rows is not None
    penalty = None if kind == "padding beyond the kernel" else lsconv.Gradient(A.in_shape, 1, dtype=DOUBLE)
    check(A, y.masked_fill(rows, torch.nan), rule, penalty)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule", ["gcv", *(pytest.param(r, marks=pytest.mark.slow) for r in ("upre", "discrepancy", "evidence"))]
)
def test_stochastic_traces_count_the_measured_rows(rule: str) -> None:
    A = blur(200)
    A = lsconv.Mask(mask(0.4, *A.out_shape), dtype=DOUBLE) @ A
    y = A(torch.randn(A.in_shape, dtype=DOUBLE).cumsum(-1) / 4)
    y = y + NOISE * torch.randn_like(y)
    check(A, y, rule, lsconv.Gradient(A.in_shape, 1, dtype=DOUBLE), trace="stochastic")


@pytest.mark.parametrize("rule", RULES)
def test_frames_with_a_mask_each_are_chosen_as_if_alone(rule: str) -> None:
    """One item has no data at all, and one is zero."""
    A, L = blur(), lsconv.Gradient((1, 40), 1, dtype=DOUBLE)
    keep = torch.stack([mask(0.2, 1, 36), mask(0.5, 1, 36), torch.zeros(1, 36, dtype=torch.bool), mask(0.3, 1, 36)])
    clean = A(torch.randn(4, 1, 40, dtype=DOUBLE).cumsum(-1) / 4)
    y = clean + NOISE * torch.randn_like(clean)
    y[3] = 0
    noise = torch.full((4,), NOISE, dtype=DOUBLE) if rule in WITH_NOISE else None
    with pytest.warns(lsconv.InputWarning, match=r"y: 1 of 4 item\(s\) have no measured entry"):
        selection = choose_damp(lsconv.Mask(keep, 1, dtype=DOUBLE) @ A, y, rule, L=L, noise_std=noise)
    assert selection.damp.shape == (4,)
    assert bool(torch.isfinite(selection.damp).all())
    assert "2 item(s) are zero" in selection.message
    for k in range(2):
        alone = choose_damp(
            lsconv.Mask(keep[k], dtype=DOUBLE) @ A, y[k], rule, L=L, noise_std=None if noise is None else noise[k]
        )
        # the norms that the grid begins from are estimates
        torch.testing.assert_close(selection.damp[k], alone.damp, rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128])
def test_single_precision_and_complex_data_are_served(dtype: torch.dtype) -> None:
    A = blur(dtype=dtype)
    keep = mask(0.3, *A.out_shape)
    y = A(torch.randn(A.in_shape, dtype=dtype).cumsum(-1) / 4)
    y = y + NOISE * torch.randn_like(y)
    selection = check(lsconv.Mask(keep, dtype=dtype) @ A, y, "gcv", lsconv.Gradient(A.in_shape, 1, dtype=dtype))
    assert selection.damp.dtype == torch.empty(0, dtype=dtype).real.dtype


@pytest.mark.parametrize("rule", ["gcv", "evidence"])
def test_tikhonov_restores_what_the_mask_hides(rule: str) -> None:
    A = blur(80)
    keep = mask(0.4, *A.out_shape)
    x = torch.randn(A.in_shape, dtype=DOUBLE).cumsum(-1) / 4
    y = lsconv.Mask(keep, dtype=DOUBLE)(A(x) + NOISE * torch.randn(A.out_shape, dtype=DOUBLE))
    solution = lsconv.tikhonov(
        lsconv.Mask(keep, dtype=DOUBLE) @ A, y, rule, L=lsconv.Gradient(A.in_shape, 1, dtype=DOUBLE)
    )
    assert bool(solution.converged)
    assert float((solution.x - x).norm() / x.norm()) < 0.1


@pytest.mark.parametrize("shape", [(1, 30), (2, 9, 11), (1, 5, 6, 7)])
def test_missing_data_are_interpolated_from_what_is_around_them(shape: tuple[int, ...]) -> None:
    ramp = torch.arange(shape[-1], dtype=torch.float64).expand(3, *shape).clone()
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.3
    keep[..., 2:5] = False
    given = torch.where(keep, ramp, torch.nan)
    found = interpolated(given, keep)
    assert torch.equal(found[..., keep], ramp[..., keep])
    assert float((found - ramp).abs().max()) < 4
    assert torch.allclose(interpolated(torch.complex(given, -given), keep), torch.complex(found, -found))


@pytest.mark.slow
def test_a_large_masked_image_is_searched_through_its_border_and_chooses_as_its_dense_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    kernel = torch.rand(5, 5, dtype=DOUBLE, generator=generator)
    A = lsconv.blur_operator(kernel / kernel.sum(), (42, 46))
    scene = torch.randn(A.in_shape, dtype=DOUBLE, generator=generator).cumsum(-1).cumsum(-2) / 40
    y = A(scene) + 0.05 * torch.randn(A.out_shape, dtype=DOUBLE, generator=generator)
    seen = torch.rand(A.out_shape, generator=generator) > 0.05
    L = lsconv.Gradient(A.in_shape, ndim=2, dtype=DOUBLE)
    chosen = choose_damp(A, torch.where(seen, y, torch.nan), "gcv", L=L, observed=seen, trace="stochastic")
    assert "searched on a surrogate first" in chosen.message
    exact = choose_damp(A, y, "gcv", L=L, observed=seen, trace="exact")
    assert abs(float(chosen.damp.log() - exact.damp.log())) < 0.3
