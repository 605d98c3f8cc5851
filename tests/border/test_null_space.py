"""The null vectors of a square convolution: the inner products of their extensions, and what is solved without them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import lsconv
from lsconv.border import capacitance_plan, null_space
from lsconv.border.border_set import Border
from lsconv.border.capacitance import Capacitance, static_lu
from lsconv.border.capacitance_plan import CapacitancePlan
from lsconv.border.null_space import ExtensionGram
from lsconv.fourier.embedding import Embedding
from lsconv.fourier.frequency_matrices import FrequencyMatrices
from lsconv.fourier.symbol import symbol

F64 = torch.float64


def well_conditioned(
    size: tuple[int, ...], dtype: torch.dtype, *, groups: int = 1, batch: tuple[int, ...] = (), stride: int = 1
) -> lsconv.Convolution:
    """Three channels a group (with the phases of a stride) to as many, near the identity."""
    generator = torch.Generator().manual_seed(0)
    columns, phases = 3, stride ** len(size)
    taps = (3,) * len(size)
    weight = 0.1 * torch.randn(*batch, groups * columns * phases, columns, *taps, generator=generator, dtype=F64)
    for output in range(weight.shape[-len(taps) - 2]):  # its own channel and phase
        place = torch.unravel_index(torch.tensor(output % phases), (stride,) * len(size))
        weight[(..., output, output // phases % columns, *(1 - p for p in place))] += 2.0
    make = {1: lsconv.Conv1d, 2: lsconv.Conv2d}[len(size)]
    return make(weight.to(dtype), size, padding=1, groups=groups, stride=stride)


def inverse_of(A: lsconv.Convolution) -> tuple[FrequencyMatrices, Tensor, Border]:
    """C^-1, the same as a dense matrix per block made by LAPACK in double precision, and the output border."""
    embedding = Embedding(A, (1,) * A.ndim, tapped_phases_only=True)
    C = symbol(A, embedding)
    cells = embedding.in_channels * math.prod(embedding.grid)
    wide = symbol(A.to(dtype=torch.complex128 if A.is_complex else F64), embedding)
    unit = torch.eye(cells, dtype=torch.complex128 if A.is_complex else F64)
    unit = unit.reshape(cells, 1, embedding.in_channels, *embedding.grid)
    dense = wide.on_grid(unit.expand(cells, embedding.blocks, *unit.shape[2:])).flatten(2).permute(1, 2, 0)
    border = Border(embedding.grid, embedding.output_border(), A.device)
    return C.map(torch.linalg.inv), torch.linalg.inv(dense), border


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.complex128, torch.complex64])
@pytest.mark.parametrize(
    ("size", "options"),
    [((9,), {}), ((6, 5), {}), ((6, 5), {"groups": 2}), ((5, 4), {"batch": (2,)}), ((6, 4), {"stride": 2})],
)
def test_extensions_have_the_inner_products_of_the_dense_inverse(
    size: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype
) -> None:
    inverse, dense, border = inverse_of(well_conditioned(size, dtype, **options))
    extension = dense[..., border.index]
    expected = extension.mH @ extension
    generator = torch.Generator().manual_seed(1)
    v = torch.randn(len(dense), border.size, border.channels + 2, generator=generator, dtype=dtype)
    tolerance = 20 * torch.finfo(dtype).eps * float(expected.abs().max())
    for k in (1, border.channels, border.channels + 2):  # the last by the dense matrix
        gram, part = ExtensionGram(inverse, border), v[..., :k]
        for got, wanted in ((gram.between(part), part.mH.to(expected) @ expected @ part.to(expected)),
                            (gram(part), expected @ part.to(expected))):  # fmt: skip
            scale = float(wanted.abs().max()) / float(expected.abs().max())
            torch.testing.assert_close(got.to(wanted), wanted, rtol=0, atol=tolerance * max(scale, 1.0))


def winding(dtype: torch.dtype, *, batch: tuple[int, ...] = ()) -> lsconv.Convolution:
    """Eight mixed channels of 14 pixels, two of which ``0.05 x_i + x_{i+1}``: two singular values are ``0.05^14``."""
    generator = torch.Generator().manual_seed(2)
    taps = torch.zeros(3, 8, dtype=F64)
    taps[1] = torch.linspace(1, 2, 8, dtype=F64)
    taps[0], taps[2] = 0.3, 0.2
    taps[:, :2] = torch.tensor([0.0, 0.05, 1.0], dtype=F64)[:, None]
    wide = torch.complex128 if dtype.is_complex else F64
    left, right = (
        torch.linalg.qr(torch.randn(*batch, 8, 8, generator=generator, dtype=wide)).Q for _ in range(2)
    )  # fmt: skip
    weight = torch.stack([left @ torch.diag_embed(tap).to(wide) @ right.mH for tap in taps], dim=-1)
    return lsconv.Conv1d(weight.to(dtype), 14, padding=1)


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("dtype", [F64, torch.complex128, torch.float32, torch.complex64])
def test_few_null_vectors_are_left_out_of_the_answers_without_another_matrix_of_the_border(
    dtype: torch.dtype, batch: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    A = winding(dtype, batch=batch)
    wide = torch.complex128 if dtype.is_complex else F64
    dense = A.to(dtype=wide).to_dense().reshape(*batch, 112, 112)
    small = 1e-12 if torch.finfo(dtype).bits == 64 else 1e-7
    values = torch.linalg.svdvals(dense)
    assert bool((values[..., -2] < 1e-1 * small * values[..., 0]).all())
    assert bool((values[..., -3] > 1e-2 * values[..., 0]).all())
    made = []
    for module in (capacitance_plan, null_space):
        real = module.between_borders
        monkeypatch.setattr(module, "between_borders", lambda *a, real=real: made.append(1) or real(*a))
    plan = CapacitancePlan(A)
    assert plan.nullity.tolist() == [2] * max(1, math.prod(batch))
    assert len(made) == 1
    inverse = torch.linalg.pinv(dense, rtol=small)
    y = torch.randn(3, *batch, 8, 14, dtype=dtype, generator=torch.Generator().manual_seed(3))
    for answer, M in ((plan.apply(y), inverse), (plan.adjoint(y), inverse.mH)):
        expected = (M @ y.to(wide).flatten(-2).unsqueeze(-1)).squeeze(-1)
        error = torch.linalg.vector_norm(answer.to(wide).flatten(-2) - expected)
        assert error < 100 * torch.finfo(dtype).eps * torch.linalg.vector_norm(expected)


def test_factors_of_a_singular_matrix_are_finite_and_find_its_null_vector() -> None:
    basis = torch.linalg.qr(torch.randn(2, 6, 6, dtype=F64, generator=torch.Generator().manual_seed(4))).Q
    values = torch.tensor([3.0, 2.0, 1.0, 0.5, 0.2, 0.0], dtype=F64)
    S = basis @ torch.diag_embed(values) @ basis.mT
    factors, pivots = static_lu(S.clone(), torch.full((2,), 3.0, dtype=F64))
    assert bool(factors.isfinite().all())
    sigma, left, right = null_space.small_singular_vectors(Capacitance(factors, pivots, directions=()), 2)
    assert bool((sigma[:, 0] < 1e-13).all())
    torch.testing.assert_close(sigma[:, 1], values[4].expand(2), rtol=0.05, atol=0)
    for vectors in (left, right):
        assert bool(((vectors.mT @ basis)[:, 0, -1].abs() > 1 - 1e-12).all())
