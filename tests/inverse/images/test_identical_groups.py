"""Channels under one PSF: one set-up, one damp."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lsconv
from lsconv.border.normal_inverse import NormalInverse
from tests.inverse.images.pictures import asymmetric


@pytest.mark.parametrize("prior", ["gradient", "tikhonov"])
def test_channels_under_one_psf_share_a_damp_and_the_certificates(prior: str) -> None:
    """Three colours are solved as data of one operator: the answer is that of three operators side by side."""
    scene, psf = torch.rand(2, 3, 14, 15, dtype=torch.float64), torch.from_numpy(asymmetric(3, 4))
    apart = torch.stack([psf, psf, psf * (1 + 1e-12)])  # equal to rounding, not to the last bit
    chosen = lsconv.deconvolve(scene, psf, channels="first", prior=prior)
    chosen_beside = lsconv.deconvolve(scene, apart, channels="first", ndim=2, prior=prior)
    assert chosen.damp.shape == chosen.converged.shape == chosen.selection.damp.shape == (2,)
    # the gradient's trace is stochastic, by other probes
    torch.testing.assert_close(chosen.damp, chosen_beside.damp, rtol=1e-6 if prior == "tikhonov" else 0.05, atol=0)
    together = lsconv.deconvolve(scene, psf, channels="first", prior=prior, damp=chosen.damp)
    beside = lsconv.deconvolve(scene, apart, channels="first", ndim=2, prior=prior, damp=chosen.damp)
    assert bool(together.converged.all())
    torch.testing.assert_close(together.x, beside.x, rtol=0, atol=1e-7)
    torch.testing.assert_close(together.residual_norm, beside.residual_norm, rtol=1e-6, atol=0)


def test_colour_costs_one_setup() -> None:
    """Every factor made for a colour picture is that of one channel, for the choice of damp and for the answer."""
    made: list[int] = []
    original = NormalInverse.__init__

    def counting(self: NormalInverse, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        made.append(self.embedding.blocks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NormalInverse, "__init__", counting)
        lsconv.deconvolve(torch.rand(3, 60, 61), torch.ones(3, 3) / 9, channels="first")
    assert made
    assert set(made) == {1}
