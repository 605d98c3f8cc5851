"""Gradients over a fuzz of convolution settings, against autograd through dense float64 formulas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import lsconv
from lsconv.errors import MethodError
from tests.oracles import dense_tikhonov

D = torch.float64
# what is ill conditioned is drawn as well, and left out
well_conditioned = [hypothesis.HealthCheck.filter_too_much]
few = hypothesis.settings(max_examples=12, suppress_health_check=well_conditioned)
thorough = hypothesis.settings(max_examples=60, suppress_health_check=well_conditioned)


def _compare(
    x: Tensor, expected: Tensor, inputs: Sequence[Tensor], tolerance: float = 1e-6, floor: float = 1e-10
) -> None:
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(expected.shape, generator=generator, dtype=expected.dtype)
    found = torch.autograd.grad(x, inputs, g)
    for got, wanted in zip(found, torch.autograd.grad(expected, inputs, g), strict=True):
        assert (got - wanted).norm() <= tolerance * wanted.norm() + floor * g.norm()


def _case(
    cases: Any, reference: Any, data: Any, damped: bool, dtypes: Sequence[torch.dtype] = (D, torch.complex128)
) -> tuple[lsconv.Convolution, Tensor, Any]:
    """A case whose gradient is well conditioned, everything in it requiring grad."""
    A, y, damp = data.draw(cases(tuple(dtypes), damped=damped)).arguments
    dense = reference(A, y, damp)
    assume(bool((dense.clear & (dense.condition < 30)).all()))
    # H^-1 g is computed to rtol ||A|| / damp
    assume(not damped or bool((dense.norm < 100 * dense.damp).all()))
    assume(bool((y.flatten(y.ndim - len(A.out_shape)).norm(dim=-1) > 0).all()))
    A = A.with_parameters([A.weight.requires_grad_()])
    if damped:
        damp = torch.as_tensor(damp, dtype=D).requires_grad_()
    return A, y.requires_grad_(), damp


METHODS: dict[str, Callable[..., Tensor]] = {
    "lstsq": lambda A, y, damp: lsconv.lstsq(A, y, damp=damp, rtol=1e-11).x,
    "pinv": lambda A, y, damp: lsconv.pinv(A, damp=damp)(y),
    "lsqr": lambda A, y, damp: lsconv.lsqr(A, y, damp=damp, rtol=1e-11).x,
    "lsmr": lambda A, y, damp: lsconv.lsmr(A, y, damp=damp, rtol=1e-11).x,
    "cgls": lambda A, y, damp: lsconv.cgls(A, y, damp=damp, rtol=1e-11).x,
    "tikhonov": lambda A, y, damp: lsconv.tikhonov(A, y, damp, rtol=1e-11).x,
}
every_method = pytest.mark.parametrize("name", METHODS)


def _damped(cases: Any, reference: Any, data: Any, name: str) -> None:
    A, y, damp = _case(cases, reference, data, True)
    _compare(METHODS[name](A, y, damp), dense_tikhonov(A, y, damp), [y, damp, A.weight])


def _undamped(cases: Any, reference: Any, data: Any, name: str) -> None:
    A, y, _ = _case(cases, reference, data, False)
    # Golub and Pereyra want a rank that perturbations keep: that of a generic matrix is full.
    assume(bool(reference(A.with_parameters([A.weight.detach()]), y.detach()).full_rank.all()))
    x, expected = METHODS[name](A, y, 0.0), dense_tikhonov(A, y, 0.0)
    assume(bool(((x - expected).norm() <= 1e-8 * expected.norm()).item()))  # of a wrong answer no gradient is right
    _compare(x, expected, [y, A.weight])


@every_method
@few
@given(data=st.data())
def test_damped_gradients_equal_the_dense_ones(cases: Any, reference: Any, name: str, data: Any) -> None:
    _damped(cases, reference, data, name)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "tikhonov"])
@few
@given(data=st.data())
def test_undamped_gradients_equal_the_dense_ones(cases: Any, reference: Any, name: str, data: Any) -> None:
    _undamped(cases, reference, data, name)


@pytest.mark.slow
@every_method
@thorough
@given(data=st.data())
def test_gradients_equal_the_dense_ones_thorough(cases: Any, reference: Any, name: str, data: Any) -> None:
    (_damped if name == "tikhonov" or data.draw(st.booleans()) else _undamped)(cases, reference, data, name)


@few
@given(data=st.data())
def test_gradients_with_penalty_and_prior_equal_the_dense_ones(cases: Any, reference: Any, data: Any) -> None:
    A, y, damp = _case(cases, reference, data, True, (D,))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31 - 1)))
    kernel = torch.randn(1, 1, *(min(2, n) for n in A.spatial_in), generator=generator, dtype=D)
    kernel.view(-1)[0] += 3  # no null space
    kernel = kernel.expand(A.c_in, *kernel.shape[1:]).contiguous().requires_grad_()
    padding = data.draw(st.sampled_from([0, 1]))
    L = lsconv.Convolution(kernel, A.spatial_in, padding=[(0, padding * (k - 1)) for k in kernel.shape[2:]],
                           groups=A.c_in)  # fmt: skip
    prior = torch.randn(*A.in_shape, generator=generator, dtype=D).requires_grad_()
    matrix, penalty = A.to_dense(), L.to_dense()
    H = matrix.mH @ matrix + damp[..., None, None] ** 2 * (penalty.mT @ penalty)
    assume(bool((torch.linalg.cond(H.detach()) < 1e4).all()))
    x = lsconv.tikhonov(A, y, damp, L=L, x_prior=prior, rtol=1e-12).x
    batch = x.shape[: x.ndim - len(A.in_shape)]
    rest = (y - A(prior)).expand(*batch, *A.out_shape).reshape(*batch, -1, 1)
    expected = prior + torch.linalg.solve(H, matrix.mH @ rest).reshape(x.shape)
    # a gradient that is zero is found to rtol ||A|| / damp <= 1e-10 of H^-1 g, which is as long as g / damp^2
    _compare(x, expected, [y, damp, prior, kernel, A.weight], floor=1e-10 * max(1.0, float(damp.detach().amin()) ** -2))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("damped", [True, False])
def test_padding_modes_without_a_direct_method(mode: str, damped: bool) -> None:
    weight = torch.randn(2, 1, 3, 3, dtype=D)
    weight[:, :, 1, 1] += 4
    A = lsconv.Conv2d(weight.requires_grad_(), in_size=(4, 5), padding=1, padding_mode=mode)
    y = torch.randn(2, *A.out_shape, dtype=D, requires_grad=True)
    if not damped:
        return _compare(lsconv.lstsq(A, y, rtol=1e-12).x, dense_tikhonov(A, y, 0.0), [y, A.weight])
    damp = torch.tensor([0.3, 2.0], dtype=D, requires_grad=True)
    return _compare(lsconv.lstsq(A, y, damp=damp, rtol=1e-12).x, dense_tikhonov(A, y, damp), [y, damp, A.weight])


@pytest.mark.parametrize("settings", [{}, {"padding": 1}, {"padding": 2}, {"stride": 2, "padding": 1}])
def test_three_dimensions(settings: dict[str, int]) -> None:
    def answer(weight: Tensor, y: Tensor, damp: Tensor) -> Tensor:
        return lsconv.lstsq(lsconv.Conv3d(weight, in_size=(3, 4, 3), **settings), y, damp=damp, rtol=1e-12).x

    A = lsconv.Conv3d(torch.zeros(2, 1, 3, 3, 3, dtype=D), in_size=(3, 4, 3), **settings)
    inputs = [torch.randn(shape, dtype=D) for shape in ((2, 1, 3, 3, 3), (2, *A.out_shape))]
    inputs.append(torch.tensor([0.5, 1.0], dtype=D))
    assert torch.autograd.gradcheck(answer, [t.requires_grad_() for t in inputs], fast_mode=True)


@pytest.mark.parametrize("padding_mode", ["circular", "reflect"])
def test_conjugate_gradients_on_a_convolution(padding_mode: str) -> None:
    side = torch.randn(1, dtype=D)

    def answer(side: Tensor, b: Tensor) -> Tensor:
        kernel = torch.cat([side, torch.full_like(side, 4), side])[None, None]
        A = lsconv.Conv1d(kernel, in_size=7, padding=1, padding_mode="circular")
        if padding_mode == "reflect":  # a product, square and positive definite
            B = lsconv.Conv1d(kernel, in_size=7, padding=1, padding_mode="reflect")
            A = B.H @ B
        return lsconv.cg(A, b, rtol=1e-13).x

    inputs = (side.requires_grad_(), torch.randn(2, 1, 7, dtype=D, requires_grad=True))
    assert torch.autograd.gradcheck(answer, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(answer, inputs, fast_mode=True)


@pytest.mark.parametrize("boundary", ["unknown", "zero", "periodic", "reflect"])
@pytest.mark.parametrize("prior", ["tikhonov", "gradient"])
def test_deconvolve_is_differentiable_by_picture_psf_and_damp(boundary: str, prior: str) -> None:
    def answer(image: Tensor, psf: Tensor, damp: Tensor) -> Tensor:
        return lsconv.deconvolve(image, psf, boundary=boundary, damp=damp, prior=prior, rtol=1e-12).x

    psf = torch.rand(3, 3, dtype=D)
    inputs = (torch.rand(6, 5, dtype=D), psf / psf.sum(), torch.tensor(0.3, dtype=D))
    assert torch.autograd.gradcheck(answer, [t.requires_grad_() for t in inputs], fast_mode=True)


def test_deconvolve_with_a_rule_holds_the_chosen_damp_fixed() -> None:
    psf = torch.ones(3, 3, dtype=D) / 9
    scene = torch.outer(torch.linspace(0, 1, 14, dtype=D), torch.linspace(1, 0, 14, dtype=D))
    image = lsconv.blur_operator(psf, (12, 12))(scene[None])[0] + 0.01 * torch.randn(12, 12, dtype=D)
    image.requires_grad_()
    chosen = lsconv.deconvolve(image, psf, damp="gcv", rtol=1e-12)
    fixed = lsconv.deconvolve(image, psf, damp=chosen.damp.detach(), rtol=1e-12)
    g = torch.randn_like(image)
    found, expected = (torch.autograd.grad(solution.x, image, g)[0] for solution in (chosen, fixed))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_deconvolve_says_which_priors_have_no_gradient() -> None:
    image, psf = torch.rand(8, 8, requires_grad=True), torch.ones(3, 3) / 9
    for prior in ("tv", lambda x: x):
        with pytest.raises(MethodError, match="has no gradient by image or psf"):
            lsconv.deconvolve(image, psf, prior=prior)
    with torch.no_grad():
        assert not lsconv.deconvolve(image, psf, damp=0.1, prior=lambda x: x).x.requires_grad


@pytest.mark.usefixtures("iterated")
def test_number_of_solves_is_the_forward_one_and_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    from lsconv.border import outer_iteration as module

    runs: list[int] = []
    run = module.outer_iteration
    monkeypatch.setattr(module, "outer_iteration", lambda equations: (runs.append(1), run(equations))[1])
    for weight_shape in ((1, 2, 3, 3), (2, 2, 3, 3), (3, 1, 3, 3)):
        for damp in (0.5, 0.0):
            A = lsconv.Conv2d(torch.randn(weight_shape, dtype=D, requires_grad=True), in_size=(9, 9))
            y = torch.randn(A.out_shape, dtype=D, requires_grad=True)
            runs.clear()
            x = lsconv.lstsq(A, y, damp=damp, method="border").x
            torch.autograd.grad(x, [y, A.weight], torch.randn_like(x))
            # without damping, fewer rows than columns need A^{+H} A^+ y as well, and others a look for a null space
            assert len(runs) == (3 if damp == 0 else 2)
