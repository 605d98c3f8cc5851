"""lstsq by the border: the minimum-norm (damped) least-squares solution, whatever the convolution."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import lsconv
from lsconv.border.cost_model import Limits
from lsconv.border.plan import BorderPlan
from lsconv.fourier.embedding import Embedding
from lsconv.krylov.loop.solution import Status

pytestmark = pytest.mark.filterwarnings("ignore::lsconv.errors.ConvergenceWarning")

every_method = pytest.mark.parametrize("method", ["border", "auto"])
thorough = hypothesis.settings(max_examples=150)
TIGHT = {torch.float64: 1e-8, torch.complex128: 1e-8, torch.float32: 1e-4, torch.complex64: 1e-4}
RTOL = {torch.float64: 1e-10, torch.complex128: 1e-10, torch.float32: 1e-6, torch.complex64: 1e-6}


def _check_against_dense(case: Any, reference: Any, method: str, by_border: Any, must_converge: str) -> None:
    A, y, damp = case.arguments
    assume(Embedding.serves(A))
    dense = reference(A, y, damp)
    assume(bool(dense.clear.all()) and bool((dense.norm > 0).all()))
    solution = by_border(A, y, damp) if method == "border" else lsconv.lstsq(A, y, damp=damp)
    assert solution.x.shape == dense.x.shape
    assert solution.x.dtype == A.dtype
    bound = (10 * RTOL[A.dtype] * dense.condition).clamp_min(TIGHT[A.dtype])
    if torch.finfo(A.dtype).bits == 32:
        # what the certificate's gradient g implies: the error is (A^H A + damp^2)^-1 g
        smallest = torch.where(dense.damp > 0, dense.damp, dense.norm / dense.condition).clamp_min(1e-300)
        x = dense._norms(dense.x).clamp_min(1e-300)
        bound = torch.maximum(bound, 1.01 * solution.gradient_norm / (smallest**2 * x))
    right = dense.error(solution.x) <= bound
    if must_converge == "always":
        assert (solution.converged & right).all()
    elif must_converge == "full rank" and all(
        n >= extent for n, extent in zip(A.spatial_in, A.kernel_extent, strict=True)
    ):  # a rank-deficient A may be left to others, as long as the status says so
        doubted = solution.converged | (solution.codes == Status.RANK_DEFICIENT.code)
        assert torch.where(dense.full_rank, doubted & right, ~solution.converged | right).all()
    else:
        assert (~solution.converged | right).all()
        easy = dense.full_rank & (dense.condition < 10)  # to doubt every answer is no way to be right
        assert (solution.converged | ~easy).all()


@every_method
@given(data=st.data())
def test_equals_the_dense_solution_where_the_rank_is_clear(
    cases: Any, reference: Any, by_border: Any, method: str, data: Any
) -> None:
    _check_against_dense(
        data.draw(cases()), reference, method, by_border, "always" if method == "auto" else "full rank"
    )


@pytest.mark.slow
@every_method
@thorough
@given(data=st.data())
def test_equals_the_dense_solution_where_the_rank_is_clear_thorough(
    cases: Any, reference: Any, by_border: Any, method: str, data: Any
) -> None:
    _check_against_dense(
        data.draw(cases()), reference, method, by_border, "always" if method == "auto" else "full rank"
    )


@given(data=st.data())
def test_a_solution_that_has_converged_in_single_precision_is_right(
    cases: Any, reference: Any, by_border: Any, data: Any
) -> None:
    case = data.draw(cases((torch.float32, torch.complex64)))
    dense = reference(*case.arguments)
    assume(bool((dense.condition < 1e3).all()))
    _check_against_dense(case, reference, "border", by_border, "well conditioned")


@given(data=st.data())
def test_a_solution_that_has_converged_with_an_iterative_border_is_right(
    cases: Any, reference: Any, by_border: Any, data: Any
) -> None:
    def iterative(A: lsconv.LinearOperator, y: torch.Tensor, damp: Any) -> lsconv.Solution:
        try:
            # what is well conditioned takes some tens; the rest has to say that it is not done
            return BorderPlan(A, damp, limits=Limits(dense_unknowns=0)).solve(y, max_iter=300)
        except lsconv.MethodError:
            return by_border(A, y, damp)

    _check_against_dense(data.draw(cases()), reference, "border", iterative, "well conditioned")


@given(data=st.data())
def test_certificate_is_what_a_recomputation_says(
    cases: Any, reference: Any, assert_certified: Any, by_border: Any, data: Any
) -> None:
    A, y, damp = data.draw(cases()).arguments
    assume(Embedding.serves(A))
    solution = by_border(A, y, damp)
    assert_certified(solution, reference(A, y, damp), 1e-10)


# ------------------------------------------------------------------ sizes whose border is solved by iteration

MIDDLE = {
    "valid 2->2": ((2, 2, 3, 3), (16, 17), 1, 0, 1, 1),
    "valid 3->2, 5x5": ((2, 3, 5, 5), (14, 15), 1, 0, 1, 1),
    "valid 1->3": ((3, 1, 3, 3), (17, 18), 1, 0, 1, 1),
    "valid, depthwise": ((3, 1, 3, 3), (13, 13), 1, 0, 1, 3),
    "valid, stride 2": ((4, 2, 4, 4), (19, 18), 2, 0, 1, 1),
    "same 1->2": ((2, 1, 3, 3), (17, 18), 1, 1, 1, 1),
    "same 2->1": ((1, 2, 3, 3), (17, 18), 1, 1, 1, 1),
    "same 2->3": ((3, 2, 3, 3), (13, 13), 1, 1, 1, 1),
    "same 1->2, dilation": ((2, 1, 3, 3), (17, 18), 1, 2, 2, 1),
    "asymmetric 1->2": ((2, 1, 4, 4), (17, 18), 1, ((0, 3), (2, 1)), 1, 1),
    "full 1->1": ((1, 1, 3, 3), (17, 18), 1, 2, 1, 1),
    "full 2->2": ((2, 2, 3, 3), (14, 15), 1, 2, 1, 1),
    "1-D": ((2, 3, 9), (130,), 1, 3, 1, 1),
    "3-D": ((2, 3, 2, 2, 2), (6, 6, 6), 1, 0, 1, 1),
}


@pytest.mark.parametrize(
    ("name", "damp", "dense_border"),
    [(name, damp, (k % 2 == 0) == (damp == 0)) for k, name in enumerate(MIDDLE) for damp in (0.0, 1e-2)],
)
def test_middle_sizes_equal_the_dense_solution(
    reference: Any, by_border: Any, limits: Any, name: str, damp: float, dense_border: bool
) -> None:
    shape, size, stride, padding, dilation, groups = MIDDLE[name]
    if not dense_border:
        limits(dense_unknowns=0)
    A = lsconv.Convolution(torch.randn(shape, dtype=torch.float64), size, stride, padding, dilation, groups)
    y = torch.randn(A.out_shape, dtype=torch.float64)
    dense = reference(A, y, damp)
    solution = by_border(A, y, damp)
    assert solution.converged
    assert dense.error(solution.x) <= max(1e-8, 1e-9 * float(dense.condition))
    assert dense.null_part(solution.x) <= 1e-8


# ------------------------------------------------------------------ batches


@given(data=st.data())
def test_every_item_is_answered_as_if_alone(cases: Any, by_border: Any, data: Any) -> None:
    A, y, damp = data.draw(cases()).arguments
    assume(Embedding.serves(A) and not A.batch_shape and y.ndim > len(A.out_shape))
    together = by_border(A, y, damp)
    flat = y.reshape(-1, *A.out_shape)
    damps = torch.as_tensor(damp, dtype=torch.float64).expand(y.shape[: y.ndim - len(A.out_shape)]).reshape(-1)
    one = by_border(A, flat[0], float(damps[0]))
    first = together.x.reshape(-1, *A.in_shape)[0]
    if one.converged:
        scale = float(one.x.abs().max())
        torch.testing.assert_close(first, one.x, rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("dense_border", [True, False])
@pytest.mark.parametrize("content", ["zero", "nan", "huge", "tiny"])
def test_neighbours_of_an_unusual_item_are_bit_identical(
    limits: Any, content: str, dense_border: bool, padding: int
) -> None:
    if not dense_border:
        limits(dense_unknowns=0)
    channels = (3, 2) if padding == 2 else (2, 3)  # a shape the border method serves
    A = lsconv.Conv2d(torch.randn(*channels, 3, 3, dtype=torch.float64), (9, 8), padding=padding)
    y = torch.randn(4, *A.out_shape, dtype=A.dtype)
    before = lsconv.lstsq(A, y, method="border")
    odd = y.clone()
    odd[1] = {"zero": 0.0, "nan": float("nan"), "huge": 1e100, "tiny": 1e-100}[content]
    after = lsconv.lstsq(A, odd, method="border", check_finite=False)
    for item in (0, 2, 3):
        assert torch.equal(before.x[item], after.x[item])
        assert before.iterations[item] == after.iterations[item]
    if content == "zero":
        assert after.status[1] is Status.ZERO
        assert not after.x[1].any()
        assert after.iterations[1] == 0
    if content == "nan":
        assert after.status[1] is Status.NON_FINITE
        assert after.x[1].isnan().all()


def test_zero_kernel_in_a_batch_leaves_the_other_kernel_alone() -> None:
    weight = torch.randn(2, 2, 3, 3, 3, dtype=torch.float64)
    weight[1] = 0
    y = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    solution = lsconv.lstsq(lsconv.Conv2d(weight, (8, 8)), y)
    assert solution.converged.all()
    assert not solution.x[1].any()
    alone = lsconv.lstsq(lsconv.Conv2d(weight[0], (8, 8)), y[0])
    torch.testing.assert_close(solution.x[0], alone.x, rtol=1e-9, atol=1e-11)


# ------------------------------------------------------------------ scaling

KINDS = {
    "valid": (2, 3, 0, "zeros"),
    "same": (3, 2, 1, "zeros"),
    "full": (3, 2, 2, "zeros"),
    "circular": (2, 2, 1, "circular"),
}
SCALES = [
    *((torch.float64, a, b) for a in (1e-14, 1.0, 1e14) for b in (1e-14, 1.0, 1e14)),
    *((torch.float32, a, b) for a, b in ((1e-14, 1.0), (1e14, 1.0), (1.0, 1e-14), (1.0, 1e14), (1e14, 1e14))),
    *((torch.float32, a, b) for a, b in ((1e-30, 1.0), (1e30, 1.0), (1.0, 1e-30), (1.0, 1e30), (1e-30, 1e-30))),
]
EXTREMES = [SCALES[k] for k in (0, 2, 6, 8)] + SCALES[-5:]


@pytest.mark.parametrize(
    ("kind", "dtype", "operator_scale", "data_scale"),
    [
        *(("valid", *scale) for scale in SCALES),
        *((kind, *scale) for kind in ("same", "full", "circular") for scale in EXTREMES),
    ],
)
def test_scaling_operator_and_data_only_scales_x(
    kind: str, dtype: torch.dtype, operator_scale: float, data_scale: float
) -> None:
    c_out, c_in, padding, mode = KINDS[kind]
    weight = torch.randn(c_out, c_in, 3, 3, dtype=dtype)
    # powers of two near the decimal ones, so that scaling rounds nothing
    a, b = (2.0 ** round(torch.tensor(v, dtype=torch.float64).log2().item()) for v in (operator_scale, data_scale))
    for damp in (0.0, 0.1):
        A, B = (lsconv.Conv2d(w, (8, 8), padding=padding, padding_mode=mode) for w in (weight, weight * a))
        y = torch.randn(2, *A.out_shape, dtype=dtype)
        plain = lsconv.lstsq(A, y, damp=damp)
        scaled = lsconv.lstsq(B, y * b, damp=damp * a)
        assert scaled.status == plain.status
        expected = plain.x.double()
        error = (scaled.x.double() * (a / b) - expected).norm() / expected.norm()
        assert error <= (1e-4 if dtype == torch.float32 else 1e-9)


# ------------------------------------------------------------------ torture


def _gauss(size: int, sigma: float) -> torch.Tensor:
    t = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    line = torch.exp(-(t**2) / (2 * sigma**2))
    kernel = line[:, None] * line
    return (kernel / kernel.sum())[None, None]


def _disk(radius: int) -> torch.Tensor:
    t = torch.arange(-radius, radius + 1, dtype=torch.float64)
    kernel = (t[:, None] ** 2 + t**2 <= radius**2).double()
    return (kernel / kernel.sum())[None, None]


def _motion() -> torch.Tensor:
    kernel = torch.zeros(7, 7, dtype=torch.float64)
    for i in range(7):
        kernel[i, i * 2 // 3] = 1 + 0.3 * i
    return (kernel / kernel.sum())[None, None]


PSF = {"gauss": _gauss(7, 1.5), "disk": _disk(3), "motion": _motion()}


@pytest.mark.parametrize(
    ("psf", "padding", "damp"),
    [  # every blur, and every padding, with every damp
        (psf, padding, damp)
        for i, psf in enumerate(PSF)
        for j, padding in enumerate((0, 3, 6))
        for damp in ((1e-1, 1e-4) if (i + j) % 2 else (1e-2, 1e-6))
    ],
)
def test_blurs_are_inverted_for_any_damp(reference: Any, psf: str, padding: int, damp: float) -> None:
    A = lsconv.Conv2d(PSF[psf], (20, 22), padding=padding)
    y = torch.randn(A.out_shape, dtype=A.dtype)
    dense = reference(A, y, damp)
    solution = lsconv.lstsq(A, y, damp=damp, method="border")
    assert solution.converged
    assert dense.error(solution.x) <= max(1e-8, 1e-10 * float(dense.condition))


def _basis(i: int, j: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(3 * i + j), 9).reshape(1, 1, 3, 3).double()


def _rank_one(c_out: int, c_in: int) -> torch.Tensor:
    return torch.einsum("o,c,ij->ocij", *(torch.randn(s, dtype=torch.float64) for s in (c_out, c_in)),
                        torch.randn(3, 3, dtype=torch.float64))  # fmt: skip


def _without_channel(c_out: int, c_in: int, dim: int) -> torch.Tensor:
    weight = torch.randn(c_out, c_in, 3, 3, dtype=torch.float64)
    weight.movedim(dim, 0)[1] = 0
    return weight


def _randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


TORTURE: dict[str, Any] = {
    "box blur, a grid that hits its zeros": lambda: (torch.ones(1, 1, 3, 3).double(), (15, 15)),
    "box blur, a grid that misses them": lambda: (torch.ones(1, 1, 3, 3).double(), (14, 16)),
    "box blur, same": lambda: (torch.ones(1, 1, 3, 3).double(), (10, 10), 1, 1),
    "box blur, full": lambda: (torch.ones(1, 1, 3, 3).double(), (10, 10), 1, 2),
    "delta, valid": lambda: (_basis(1, 1), (8, 8)),
    "delta, same": lambda: (_basis(1, 1), (8, 8), 1, 1),
    "delta in the corner, valid": lambda: (_basis(0, 0), (8, 8)),
    "delta in the corner, same": lambda: (_basis(0, 0), (8, 8), 1, 1),
    "delta in the corner, full": lambda: (_basis(0, 0), (8, 8), 1, 2),
    "zero kernel, valid": lambda: (torch.zeros(2, 3, 3, 3).double(), (8, 8)),
    "zero kernel, same": lambda: (torch.zeros(3, 2, 3, 3).double(), (8, 8), 1, 1),
    "rank-one mixing, valid 2->2": lambda: (_rank_one(2, 2), (8, 8)),
    "rank-one mixing, full 3->2": lambda: (_rank_one(2, 3), (5, 5), 1, 2),
    "a channel never read": lambda: (_without_channel(2, 3, 1), (8, 8)),
    "a channel never read, full": lambda: (_without_channel(3, 2, 1), (6, 6), 1, 2),
    "a channel never written": lambda: (_without_channel(3, 2, 0), (8, 8)),
    "1x1 kernel, 3->2": lambda: (_randn(2, 3, 1, 1), (5, 5)),
    "1x1 kernel, 2->3, padded": lambda: (_randn(3, 2, 1, 1), (5, 5), 1, 1),
    "1x1 kernel, 3->2, padded": lambda: (_randn(2, 3, 1, 1), (5, 5), 1, 1),
    "1x1 image, 3->2": lambda: (_randn(2, 3, 3, 3), (1, 1), 1, 1),
    "1x1 image, 2->3": lambda: (_randn(3, 2, 3, 3), (1, 1), 1, 1),
    "1x1 image, full 3->1": lambda: (_randn(1, 3, 3, 3), (1, 1), 1, 2),
    "stride larger than the kernel": lambda: (_randn(1, 1, 2, 2), (9, 9), 3),
    "stride larger than the kernel, 1->5": lambda: (_randn(5, 1, 2, 2), (9, 9), 3),
    "stride larger than the kernel, padded": lambda: (_randn(2, 1, 3, 3), (12, 12), 4, 1),
    "constant sign, valid": lambda: (_randn(1, 1, 5, 5).abs(), (16, 16)),
    "constant sign, full": lambda: (_randn(1, 1, 5, 5).abs(), (14, 14), 1, 4),
    "1xN image": lambda: (_randn(1, 1, 1, 5), (1, 200)),
    "1xN image, same": lambda: (_randn(2, 1, 3, 5), (1, 100), 1, (1, 2)),
    "Nx1 image, full": lambda: (_randn(1, 2, 5, 1), (120, 1), 1, (4, 0)),
    "2xN image": lambda: (_randn(1, 2, 3, 3), (2, 120), 1, (1, 0)),
    "kernel as large as the image": lambda: (_randn(2, 3, 5, 5), (5, 5)),
    "kernel larger than half of the image": lambda: (_randn(4, 3, 3, 5), (7, 5)),
}  # fmt: skip


@pytest.mark.parametrize("consistent", [True, False])
@pytest.mark.parametrize("name", TORTURE)
def test_degenerate_convolutions_have_their_pseudo_inverse(reference: Any, name: str, consistent: bool) -> None:
    A = lsconv.Convolution(*TORTURE[name]())
    y = A(_randn(*A.in_shape)) if consistent else _randn(*A.out_shape)
    dense = reference(A, y)
    assert dense.clear
    solution = lsconv.lstsq(A, y)
    assert solution.converged
    assert dense.error(solution.x) <= max(1e-8, 1e-9 * float(dense.condition)) or not dense.x.any()
    if not dense.x.any():
        assert not solution.x.any()


def test_pixels_that_no_output_reads_come_back_zero() -> None:
    A = lsconv.Conv2d(_randn(3, 1, 2, 2), (10, 11), stride=3)
    read = A.H(torch.ones(A.out_shape, dtype=A.dtype)) != 0
    x = lsconv.lstsq(A, A(_randn(*A.in_shape))).x
    assert not read.all()
    assert not x[~read].any()
