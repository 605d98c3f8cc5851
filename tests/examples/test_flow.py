"""Example: a flow of four convolutions, trained by its exact likelihood on two-dimensional toy images."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor
from torch.distributions import AffineTransform, Independent, Normal, TransformedDistribution
from torch.distributions.transforms import IndependentTransform, Transform

import lsconv

SIZE = 12


def _textures(count: int, seed: int) -> Tensor:
    """White noise under a short blur, bent by sinh: ``(count, 1, 12, 12)``, neither white nor Gaussian."""
    noise = torch.randn(count, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    kernel = torch.tensor([[0.05, 0.2, 0.05], [0.2, 1.0, 0.3], [0.05, 0.2, 0.05]])
    return torch.sinh(0.7 * torch.nn.functional.conv2d(noise, kernel[None, None], padding=1))


class _Bend(Transform):
    """``sinh(s x) / s`` entry by entry, s learned."""

    domain = codomain = torch.distributions.constraints.independent(torch.distributions.constraints.real, 3)
    bijective = True

    def __init__(self, log_s: Tensor) -> None:
        super().__init__()
        self.log_s = log_s

    def _call(self, x: Tensor) -> Tensor:
        return torch.sinh(self.log_s.exp() * x) / self.log_s.exp()

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.asinh(self.log_s.exp() * y) / self.log_s.exp()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cosh(self.log_s.exp() * x).log().sum((-3, -2, -1))


@pytest.mark.slow
def test_a_flow_of_four_convolutions_learns_textures(capsys: pytest.CaptureFixture[str]) -> None:
    """The likelihood rises to within a twentieth of a nat per pixel of the truth, and what it makes noise is undone."""
    torch.manual_seed(0)
    layers = [lsconv.nn.InvertibleConv2d(1) for _ in range(4)]
    bends = [torch.nn.Parameter(torch.tensor(-1.0)) for _ in range(3)]
    parameters = [p for layer in layers for p in layer.parameters()] + bends
    base = Independent(Normal(torch.zeros(1, SIZE, SIZE), 1.0), 3)

    def log_prob(x: Tensor) -> Tensor:
        """Data to noise: only forward convolutions, as a flow is trained."""
        total: Tensor = torch.zeros(len(x))
        for number, layer in enumerate(layers):
            if number:
                bend = _Bend(bends[number - 1])
                z = bend.inv(x)
                total, x = total - bend.log_abs_det_jacobian(z, x), z
            x = layer(x)
            total = total + layer.log_abs_det((SIZE, SIZE))
        return total + base.log_prob(x)

    optimizer = torch.optim.Adam(parameters, lr=0.01)
    images, test = _textures(512, seed=0), _textures(256, seed=1)
    with torch.no_grad():
        before = float(log_prob(test).mean()) / SIZE**2
    for step in range(200):
        optimizer.zero_grad()
        loss = -log_prob(images[64 * (step % 8) : 64 * (step % 8 + 1)]).mean() / SIZE**2
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        after = float(log_prob(test).mean()) / SIZE**2
    gaussian = TransformedDistribution(base, [IndependentTransform(AffineTransform(0.0, float(images.std())), 3)])
    white = float(gaussian.log_prob(test).mean()) / SIZE**2
    # of white noise under a linear map and an entrywise function the density is known
    kernel = torch.tensor([[0.05, 0.2, 0.05], [0.2, 1.0, 0.3], [0.05, 0.2, 0.05]])[None, None]
    A = lsconv.Conv2d(kernel, (SIZE, SIZE), padding=1)
    linear = torch.asinh(test) / 0.7
    jacobian = (0.7 * torch.cosh(0.7 * linear)).log().sum((-3, -2, -1))
    truth = float((base.log_prob(lsconv.lstsq(A, linear).x) - lsconv.slogdet(A).logabsdet - jacobian).mean()) / SIZE**2
    start = time.process_time()
    layers[0].log_abs_det((SIZE, SIZE))
    middle = time.process_time()
    layers[0](images)
    forward = time.process_time() - middle
    with capsys.disabled():
        print(f"\nnats per pixel: untrained {before:.3f}, white {white:.3f}, flow {after:.3f}, truth {truth:.3f}; "
              f"logdet / forward pass of 512 images: {(middle - start) / max(forward, 1e-9):.1f}")  # fmt: skip
    assert after > max(before, white) + 0.2
    assert truth - 0.05 < after < truth + 0.02
    x = images[:4]
    z = x
    for layer in layers:
        z = layer(z)
    for layer in reversed(layers):
        z = layer.inverse(z)
    torch.testing.assert_close(z, x, rtol=1e-3, atol=1e-3)
