"""InvertibleConv2d and spectral_norm against dense matrices, alone and in torch.distributions."""

from __future__ import annotations

import pytest
import torch

import lsconv
from lsconv.nn import InvertibleConv2d, spectral_norm

DOUBLE = torch.float64


def layer(channels: int = 3, kernel_size: int | tuple[int, int] = 3) -> InvertibleConv2d:
    torch.manual_seed(0)
    return InvertibleConv2d(channels, kernel_size, dtype=DOUBLE)


def test_the_inverse_inverts_and_the_determinant_is_that_of_the_jacobian() -> None:
    flow = layer(2, (3, 5))
    x = torch.randn(2, 6, 7, dtype=DOUBLE)
    torch.testing.assert_close(flow.inverse(flow(x)), x, rtol=1e-10, atol=1e-10)
    jacobian = torch.func.jacrev(flow)(x).reshape(84, 84)
    torch.testing.assert_close(flow.log_abs_det((6, 7)), torch.linalg.slogdet(jacobian).logabsdet, rtol=0, atol=1e-10)


def test_the_density_of_transformed_white_noise_is_that_of_its_covariance() -> None:
    flow = layer()
    base = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(3, 5, 6, dtype=DOUBLE), 1.0), 3)
    images = torch.distributions.TransformedDistribution(base, [flow.transform()])
    y = images.rsample((4,)).detach()
    M = lsconv.Conv2d.from_module(flow.conv, (5, 6)).to_dense()
    mean = flow.conv.bias[:, None].expand(3, 30).flatten()
    expected = torch.distributions.MultivariateNormal(mean, M @ M.T)
    torch.testing.assert_close(images.log_prob(y), expected.log_prob(y.flatten(1)), rtol=1e-9, atol=1e-9)
    (ours,) = torch.autograd.grad(images.log_prob(y).sum(), flow.conv.weight)
    (dense,) = torch.autograd.grad(expected.log_prob(y.flatten(1)).sum(), flow.conv.weight)
    torch.testing.assert_close(ours, dense, rtol=1e-8, atol=1e-8)


def test_an_even_kernel_is_refused() -> None:
    with pytest.raises(lsconv.errors.ArgumentError, match="odd"):
        InvertibleConv2d(1, 4)


@pytest.mark.parametrize("options", [{"padding": 1}, {"stride": 2}, {"padding": 2, "padding_mode": "reflect"}])
def test_a_normalised_layer_has_norm_one_while_it_trains(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    module = spectral_norm(torch.nn.Conv2d(2, 3, 3, bias=False, dtype=DOUBLE, **options), (8, 9))

    @torch.no_grad()
    def size() -> torch.Tensor:
        return torch.linalg.matrix_norm(lsconv.Conv2d.from_module(module, (8, 9)).to_dense(), 2)

    assert abs(float(size()) - 1) < 1e-3
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        module(torch.randn(4, 2, 8, 9, dtype=DOUBLE)).square().mean().neg().backward()
        optimizer.step()
    module(torch.zeros(1, 2, 8, 9, dtype=DOUBLE))  # the norm is that of the last weight used in training
    module.eval()
    assert abs(float(size()) - 1) < 1e-2


def test_gradients_pass_through_the_norm() -> None:
    torch.manual_seed(0)
    module = torch.nn.Conv2d(1, 1, 3, padding=1, bias=False, dtype=DOUBLE)
    weight, x = module.weight.detach().clone().requires_grad_(), torch.randn(1, 6, 6, dtype=DOUBLE)
    spectral_norm(module, 6, steps=36)
    module(x).square().sum().backward()
    A = lsconv.Conv2d(weight, 6, padding=1)
    (A(x) / torch.linalg.matrix_norm(A.to_dense(), 2)).square().sum().backward()
    torch.testing.assert_close(module.parametrizations.weight.original.grad, weight.grad, rtol=1e-6, atol=1e-8)


def test_a_module_that_is_no_convolution_is_not_normalised() -> None:
    with pytest.raises(lsconv.errors.ArgumentTypeError, match="Linear"):
        spectral_norm(torch.nn.Linear(2, 2), 4)  # type: ignore[type-var]
