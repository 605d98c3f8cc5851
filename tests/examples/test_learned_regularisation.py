"""Example: learn a damping per colour and a small penalty from a photograph, and restore a part that was not seen."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lsconv
from lsconv.app.image_io import read_picture

CHANNEL_NOISE = torch.tensor([0.003, 0.01, 0.03])[:, None, None, None]


def _parts() -> tuple[Tensor, Tensor]:
    """Two parts of the bundled photograph side by side, the colours as batch items ``(3, 1, 48, 48)``."""
    with resources.as_file(resources.files("lsconv.app") / "data" / "astronaut-256.png") as path:
        pixels = read_picture(Path(path)).pixels.float()[:, None]
    return pixels[..., 80:128, 80:128], pixels[..., 80:128, 128:176]


def _blurred(A: lsconv.Convolution, x: Tensor, seed: int) -> Tensor:
    """The picture out of focus, each colour with noise of its own strength."""
    y = A(x)
    return y + CHANNEL_NOISE * torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))


def _restore(A: lsconv.Convolution, y: Tensor, log_damp: Tensor, penalty: Tensor) -> Tensor:
    """Tikhonov with a damp per colour and a convolution for L, drawn towards the mean colour."""
    L = lsconv.Conv2d(penalty, in_size=A.spatial_in, padding=1)
    middle = y.mean((-2, -1), keepdim=True).expand(-1, *A.in_shape)
    return lsconv.tikhonov(A, y, log_damp.exp(), L=L, x_prior=middle).x


def _psnr(x: Tensor, truth: Tensor) -> float:
    return float(-10 * torch.log10((x - truth).square().mean()))


@pytest.mark.slow
def test_learned_damping_and_penalty_restore_what_was_not_seen() -> None:
    seen, unseen = _parts()
    A = lsconv.Conv2d(torch.ones(1, 1, 5, 5) / 25, in_size=seen.shape[-2:])
    y, y_unseen = _blurred(A, seen, 0), _blurred(A, unseen, 1)
    log_damp = torch.full((3,), -2.0, requires_grad=True)
    penalty = torch.zeros(2, 1, 3, 3)
    penalty[:, 0, 1, 1] = 1.0  # both filters begin as the identity, and as good as equal
    penalty += 0.05 * torch.randn(penalty.shape, generator=torch.Generator().manual_seed(2))
    penalty.requires_grad_()

    with torch.no_grad():
        before = _psnr(_restore(A, y_unseen, log_damp, penalty), unseen)
    optimizer = torch.optim.Adam([log_damp, penalty], lr=0.15)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = (_restore(A, y, log_damp, penalty) - seen).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        after = _psnr(_restore(A, y_unseen, log_damp, penalty), unseen)

    assert losses[-1] < 0.5 * losses[0]
    assert after > before + 2  # decibels
    damp = log_damp.detach().exp()
    assert damp[0] < damp[1] < damp[2]  # in the order of the noise, of which nobody told
    assert bool(
        (penalty.detach().sum((-2, -1)).abs() < 0.5 * penalty.detach().abs().sum((-2, -1))).all()
    )  # differences
