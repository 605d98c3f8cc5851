"""The inverse transform of what is large, a part at a time."""

from __future__ import annotations

import pytest
import torch

from lsconv.operators.inverse_transform import inverse_transform


@pytest.mark.parametrize("real", [True, False])
@pytest.mark.parametrize("lead", [(), (5,), (2, 3, 4), (1, 7, 1)])
@pytest.mark.parametrize("sizes", [(6,), (5, 4), (3, 4, 5)])
def test_parts_make_the_whole(lead: tuple[int, ...], sizes: tuple[int, ...], real: bool) -> None:
    x = torch.randn(*lead, *sizes, dtype=torch.float64 if real else torch.complex128)
    dims = tuple(range(-len(sizes), 0))
    spectra = (torch.fft.rfftn if real else torch.fft.fftn)(x, dim=dims)
    torch.testing.assert_close(inverse_transform(spectra, sizes, real=real, work_bytes=100), x)


def test_parts_have_gradients_and_can_be_batched() -> None:
    z = torch.randn(6, 5, 3, dtype=torch.complex128, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: inverse_transform(z, (5, 4), real=True, work_bytes=100), z)
    batched = torch.func.vmap(lambda z: inverse_transform(z, (5, 4), real=True, work_bytes=100))(z.detach())
    torch.testing.assert_close(batched, torch.fft.irfftn(z.detach(), s=(5, 4), dim=(-2, -1)))


def test_no_axes_are_no_transform() -> None:
    z = torch.randn(3)
    assert inverse_transform(z, (), real=True) is z
