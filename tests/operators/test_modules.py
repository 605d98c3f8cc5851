"""Transposed convolution modules as operators: torch's own results, dense transposes, and refusals that help."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lsconv

# kind, channels in and out, size, and torch's further arguments; the last crops outputs of the convolution
TRANSPOSED = [
    (nn.ConvTranspose1d, 2, 3, (7,), {"kernel_size": 4}),
    (nn.ConvTranspose1d, 2, 2, (6,), {"kernel_size": 3, "stride": 3, "padding": 1, "output_padding": 2}),
    (nn.ConvTranspose2d, 3, 2, (4, 5), {"kernel_size": (3, 4), "stride": 2, "padding": 1, "output_padding": (1, 0)}),
    (nn.ConvTranspose2d, 4, 6, (4, 3), {"kernel_size": 2, "stride": (2, 1), "groups": 2}),
    (nn.ConvTranspose3d, 2, 1, (3, 2, 4), {"kernel_size": 2, "stride": 2, "output_padding": 1}),
    (nn.ConvTranspose2d, 1, 2, (4, 4), {"kernel_size": 3, "dilation": 3, "padding": 1, "output_padding": 2}),
]  # fmt: skip
each = pytest.mark.parametrize("kind, c_in, c_out, size, arguments", TRANSPOSED)


@each
def test_a_transposed_module_is_its_operator_and_its_bias(kind, c_in, c_out, size, arguments) -> None:
    module = kind(c_in, c_out, **arguments).double()
    A = lsconv.Convolution.from_module(module, size)
    x = torch.randn(2, c_in, *size, dtype=torch.float64)
    y = module(x)
    assert A.out_shape == y.shape[1:]
    torch.testing.assert_close(A(x), y - module.bias.reshape(-1, *(1 for _ in size)))
    torch.testing.assert_close(A.H.to_dense(), A.to_dense().mT, rtol=0, atol=1e-13)
    A(x).sum().backward()
    assert module.weight.grad is not None


@each
@pytest.mark.parametrize("damp", [0.0, 0.3])
def test_the_modules_of_nn_invert_a_transposed_module(kind, c_in, c_out, size, arguments, damp: float) -> None:
    module = kind(c_in, c_out, **arguments).double()
    matrix = lsconv.Convolution.from_module(module, size).to_dense().detach()
    y = module(torch.randn(2, c_in, *size, dtype=torch.float64)).detach()
    y += torch.randn_like(y)
    data = (y - module.bias.reshape(-1, *(1 for _ in size))).flatten(1)
    if damp:
        layer = lsconv.nn.Tikhonov(module, damp=damp)
        damp = float(layer.damp.detach())
        normal = matrix.mT @ matrix + damp**2 * torch.eye(matrix.shape[1], dtype=matrix.dtype)
        expected = torch.linalg.solve(normal, matrix.mT @ data.mT).mT
    else:
        module.requires_grad_(False)
        layer = lsconv.nn.PseudoInverse(module)
        expected = (torch.linalg.pinv(matrix) @ data.mT).mT
    torch.testing.assert_close(layer(y).flatten(1), expected.detach(), rtol=1e-6, atol=1e-8)


def test_range_null_keeps_what_a_transposed_module_hides() -> None:
    module = nn.ConvTranspose2d(3, 1, 4, stride=2, padding=1).double()
    y, z = torch.randn(2, 1, 12, 12, dtype=torch.float64), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    x = lsconv.nn.RangeNull(module.requires_grad_(False))(module(torch.randn_like(z)), z)
    matrix = lsconv.Conv2d.from_module(module, (6, 6)).to_dense()
    hidden = torch.eye(matrix.shape[1], dtype=y.dtype) - torch.linalg.pinv(matrix) @ matrix
    torch.testing.assert_close((hidden @ x.flatten(1).mT).mT, (hidden @ z.flatten(1).mT).mT, rtol=0, atol=1e-8)


@pytest.mark.parametrize("make", [lsconv.nn.PseudoInverse, lambda m: lsconv.nn.Tikhonov(m, damp=0.3)])
def test_gradients_reach_the_weight_of_a_transposed_module(make) -> None:
    module = nn.ConvTranspose1d(2, 1, 3, stride=2, padding=1, dtype=torch.float64)  # more unknowns than equations
    layer = make(module)
    names, values = zip(*layer.named_parameters(), strict=True)

    def answer(*tensors: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(
            layer, {name: t.clone() for name, t in zip(names, tensors, strict=False)}, tensors[-1]
        )

    y = torch.randn(2, 1, 11, dtype=torch.float64)
    inputs = [t.detach().double().requires_grad_() for t in (*values, y)]
    assert torch.autograd.gradcheck(answer, inputs, fast_mode=True)


@pytest.mark.parametrize("kind, c_in, c_out, size, arguments", [TRANSPOSED[2], TRANSPOSED[5]])
def test_spectral_norm_of_a_transposed_module_is_one(kind, c_in, c_out, size, arguments) -> None:
    layer = lsconv.nn.spectral_norm(kind(c_in, c_out, **arguments).double(), size)
    matrix = lsconv.Convolution.from_module(layer, size).to_dense()
    assert abs(float(torch.linalg.matrix_norm(matrix.detach(), 2)) - 1) < 1e-3


def test_other_modules_are_refused_with_what_serves_them() -> None:
    with pytest.raises(TypeError, match=r"got Linear; .* lsconv\.Dense\(module\.weight\)"):
        lsconv.Conv2d.from_module(nn.Linear(2, 2), (4, 4))
    with pytest.raises(TypeError, match=r"conv: .* got AvgPool2d; lsconv\.as_operator\(module, in_shape\)"):
        lsconv.nn.Tikhonov(nn.AvgPool2d(2))
    with pytest.raises(TypeError, match=r"got ConvTranspose1d; use lsconv\.Conv1d"):
        lsconv.Conv2d.from_module(nn.ConvTranspose1d(2, 2, 3), (4, 4))
    with pytest.raises(ValueError, match=r"LazyConv2d has no weight yet; call it once on data"):
        lsconv.Conv2d.from_module(nn.LazyConv2d(2, 3), (4, 4))
    with pytest.raises(lsconv.ShapeError, match=r"in_size: ConvTranspose1d.* empty output"):
        lsconv.Conv1d.from_module(nn.ConvTranspose1d(1, 1, 2, padding=3), 3)
    with pytest.raises(lsconv.ShapeError, match=r"y: spatial size \(12,\) is not what"):
        lsconv.nn.PseudoInverse(nn.ConvTranspose1d(1, 1, 3, stride=2))(torch.randn(1, 1, 12))
