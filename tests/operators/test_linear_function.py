"""as_operator against dense matrices: modules and functions, their gradients, and functions that are not linear."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lsconv

DOUBLE = torch.float64


def dense(function: Callable[[Tensor], Tensor], shape: tuple[int, ...], dtype: torch.dtype = DOUBLE) -> Tensor:
    """The matrix of a linear function, column by column."""
    n = torch.Size(shape).numel()
    columns = [function(e.reshape(1, *shape)).flatten() for e in torch.eye(n, dtype=dtype)]
    return torch.stack(columns, dim=1).detach()


CASES: dict[str, tuple[Callable[[], Callable[[Tensor], Tensor]], tuple[int, ...]]] = {
    "chain": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.AvgPool2d(2)), (2, 8, 6)),
    "upsampling": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), (1, 4, 5)),
    "linear": (lambda: nn.Linear(5, 3, bias=False), (4, 5)),
    "shuffle": (lambda: nn.PixelUnshuffle(2), (1, 4, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(2, 1, 3, stride=2, bias=False), (2, 4, 4)),
    "function": (lambda: lambda x: x.cumsum(-1).flip(-1)[..., 1:], (7,)),
}


@pytest.mark.parametrize("name", CASES)
def test_operator_and_adjoint_are_the_dense_matrix_and_its_transpose(name: str) -> None:
    make, shape = CASES[name]
    function = make()
    function = function.double() if isinstance(function, nn.Module) else function
    A = lsconv.as_operator(function, shape, dtype=DOUBLE)
    matrix = dense(function, shape)
    torch.testing.assert_close(A.to_dense(), matrix, rtol=0, atol=1e-13)
    torch.testing.assert_close(A.H.to_dense(), matrix.mT, rtol=0, atol=1e-13)
    for batch in ((), (3,), (2, 3), (0,)):
        x = torch.randn(*batch, *shape, dtype=DOUBLE)
        expected = (x.flatten(len(batch)) @ matrix.mT).reshape(*batch, *A.out_shape)
        torch.testing.assert_close(A(x), expected, rtol=0, atol=1e-13)
        assert A.H(A(x)).shape == x.shape


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("damp", [0.0, 0.5])
def test_lstsq_solves_with_it_as_with_the_matrix(name: str, damp: float) -> None:
    make, shape = CASES[name]
    function = make()
    function = function.double() if isinstance(function, nn.Module) else function
    A = lsconv.as_operator(function, shape, dtype=DOUBLE)
    matrix = dense(function, shape)
    y = torch.randn(2, *A.out_shape, dtype=DOUBLE)
    stacked = torch.cat([matrix, damp * torch.eye(matrix.shape[1], dtype=DOUBLE)])
    data = torch.cat([y.flatten(1), torch.zeros(2, matrix.shape[1], dtype=DOUBLE)], 1)
    expected = (torch.linalg.pinv(stacked, rtol=1e-10) @ data.mT).mT
    x = lsconv.lstsq(A, y, damp=damp).x
    torch.testing.assert_close(x.flatten(1), expected, rtol=1e-5, atol=1e-6)


def test_complex_functions_have_the_conjugate_transpose() -> None:
    weights = torch.randn(5, dtype=torch.complex128)
    function = lambda x: torch.fft.fft(x, norm="ortho") * weights
    A = lsconv.as_operator(function, (5,), dtype=torch.complex128)
    matrix = dense(function, (5,), torch.complex128)
    torch.testing.assert_close(A.to_dense(), matrix)
    torch.testing.assert_close(A.H.to_dense(), matrix.mH)
    real = lsconv.as_operator(lambda x: x.cumsum(-1), (5,), dtype=DOUBLE)
    y = torch.randn(5, dtype=torch.complex128)
    torch.testing.assert_close(real.H(y), real.to_dense().mT.to(y.dtype) @ y)


def test_a_convolution_module_keeps_its_structure() -> None:
    conv = nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect", bias=False)
    A = lsconv.as_operator(conv, (2, 8, 8))
    assert isinstance(A, lsconv.Convolution)
    assert A.weight is conv.weight
    assert isinstance(lsconv.as_operator(conv, (2, 8, 8), dtype=DOUBLE), lsconv.Convolution)

    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True))

    other = Standardised(2, 4, 3, bias=False).double()
    B = lsconv.as_operator(other, (2, 5, 5))
    torch.testing.assert_close(B.to_dense(), dense(other, (2, 5, 5)), rtol=0, atol=1e-13)


def test_gradients_of_a_solve_reach_the_parameters_of_a_module() -> None:
    module = nn.Sequential(nn.Conv1d(1, 2, 3, bias=False), nn.AvgPool1d(2)).double()
    y = torch.randn(3, 2, 4, dtype=DOUBLE)
    A = lsconv.as_operator(module, (1, 10))
    loss = lsconv.lstsq(A, y, damp=0.4, rtol=1e-12).x.square().sum()
    (gradient,) = torch.autograd.grad(loss, list(module.parameters()))
    weight = module[0].weight.detach().clone().requires_grad_()
    basis = torch.eye(10, dtype=DOUBLE)[:, None]
    matrix = nn.functional.avg_pool1d(nn.functional.conv1d(basis, weight), 2).flatten(1).mT
    normal = matrix.mT @ matrix + 0.16 * torch.eye(10, dtype=DOUBLE)
    expected = torch.linalg.solve(normal, matrix.mT @ y.flatten(1).mT).square().sum()
    torch.testing.assert_close(loss, expected, rtol=1e-8, atol=0)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, weight)[0], rtol=1e-6, atol=1e-8)


def test_the_operator_follows_what_an_optimiser_writes() -> None:
    module = nn.Linear(4, 3, bias=False).double()
    A = lsconv.as_operator(module, (4,))
    with torch.no_grad():
        module.weight.mul_(2)
    torch.testing.assert_close(A.to_dense(), module.weight)


def test_parameters_of_a_function_are_differentiated_converted_and_mapped() -> None:
    scale = torch.rand(4, dtype=DOUBLE) + 1
    A = lsconv.as_operator(lambda x, s: (s * x).cumsum(-1), (4,), parameters=(scale,))
    y = torch.randn(2, 4, dtype=DOUBLE)

    def answer(s: Tensor, y: Tensor) -> Tensor:
        return lsconv.lstsq(A.with_parameters([s]), y, damp=0.5, rtol=1e-12).x

    assert torch.autograd.gradcheck(
        answer, (scale.clone().requires_grad_(), y.clone().requires_grad_()), fast_mode=True
    )
    assert torch.autograd.gradgradcheck(A.H, (y.clone().requires_grad_(),), fast_mode=True)
    mapped = torch.func.vmap(lambda v: answer(scale, v))(y)
    torch.testing.assert_close(mapped, answer(scale, y))
    assert A.to(torch.float32)(y.float()).dtype == torch.float32


def test_the_adjoint_carries_no_graph_that_nothing_asked_for() -> None:
    A = lsconv.as_operator(nn.Upsample(scale_factor=2), (1, 3, 3))
    assert not A.H(torch.randn(1, 6, 6)).requires_grad
    with torch.inference_mode():
        y = torch.randn(1, 6, 6)
        torch.testing.assert_close(A.H(y), y.reshape(1, 3, 2, 3, 2).sum((2, 4)))


def test_affine_functions_are_refused_with_what_to_subtract_and_their_linear_part_is_had() -> None:
    module = nn.Sequential(nn.Conv1d(1, 2, 3), nn.BatchNorm1d(2).eval()).double()
    with pytest.raises(lsconv.ArgumentError, match=r"affine: .* linear_part=True, .* subtract f\(0\) from the data"):
        lsconv.as_operator(module, (1, 9))
    A = lsconv.as_operator(module, (1, 9), linear_part=True)
    offset = module(torch.zeros(1, 1, 9, dtype=DOUBLE))
    torch.testing.assert_close(A.to_dense(), dense(lambda x: module(x) - offset, (1, 9)), rtol=0, atol=1e-13)
    conv = nn.Conv1d(1, 2, 3)
    with pytest.raises(lsconv.ArgumentError, match="affine"):
        lsconv.as_operator(conv, (1, 9))
    assert isinstance(lsconv.as_operator(conv, (1, 9), linear_part=True), lsconv.Convolution)


@pytest.mark.parametrize(
    "function",
    [torch.relu, torch.abs, lambda x: x.clamp(-10, 10), lambda x: x + 1e-3 * x**3, lambda x: x / (1 + x.norm())],
    ids=["relu", "abs", "clamp", "cubic", "norm"],
)
def test_functions_that_are_not_linear_are_refused(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(lsconv.ArgumentError, match=r"not linear|two items"):
        lsconv.as_operator(function, (6,))
    with pytest.raises(lsconv.ArgumentError, match=r"not linear|two items"):
        lsconv.as_operator(lambda x: function(x[:, :1]), (6,), linear_part=True)  # one output: signs may agree


def test_conjugation_is_not_linear() -> None:
    with pytest.raises(lsconv.ArgumentError, match=r"f\(1j u\)"):
        lsconv.as_operator(torch.conj, (6,), dtype=torch.complex128)


def test_modules_that_mix_or_draw_are_refused_and_left_as_they_were() -> None:
    norm = nn.BatchNorm1d(2)
    before = norm.running_mean.clone()
    with pytest.raises(lsconv.ArgumentError, match=r"two items .* eval\(\)"):
        lsconv.as_operator(norm, (2, 5))
    assert torch.equal(norm.running_mean, before)
    with pytest.raises(lsconv.ArgumentError, match=r"or is random"):
        lsconv.as_operator(nn.Dropout(0.5), (50,))


def test_functions_that_autograd_does_not_see_are_refused() -> None:
    with pytest.raises(lsconv.ArgumentError, match=r"autograd does not give its adjoint .*FromFunctions"):
        lsconv.as_operator(lambda x: torch.from_numpy(2 * x.detach().numpy()), (3,))
    with pytest.raises(lsconv.ArgumentError, match=r"autograd does not give its adjoint"):
        lsconv.as_operator(lambda x: x + x.detach().cumsum(-1), (3,))


def test_results_that_no_operator_gives_are_refused() -> None:
    with pytest.raises(lsconv.ArgumentTypeError, match=r"return a torch\.Tensor, got tuple"):
        lsconv.as_operator(lambda x: (x, x), (3,))
    with pytest.raises(lsconv.ShapeError, match="one output item for each of the 2 items"):
        lsconv.as_operator(lambda x: x.sum(), (3,))
    with pytest.raises(lsconv.DtypeError, match=r"give dtype=torch\.complex64"):
        lsconv.as_operator(torch.fft.fft, (3,))
    with pytest.raises(lsconv.ArgumentTypeError, match="function: expected"):
        lsconv.as_operator(torch.eye(3), (3,))
    with pytest.raises(lsconv.ArgumentError, match="parameters: those of a module are found"):
        lsconv.as_operator(nn.Linear(2, 2), (2,), parameters=(torch.ones(2),))
