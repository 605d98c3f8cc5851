"""Padding against torch.nn.functional.pad, its adjoint against the transposed matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lsconv.errors import ArgumentError, ArgumentTypeError, ShapeError
from lsconv.operators.padding import Pad
from lsconv.operators.padding_modes import MODES


@st.composite
def pads(draw: st.DrawFn) -> tuple[Pad, list[int]]:
    """A padding and its amounts in the order of torch's own call."""
    mode = draw(st.sampled_from(tuple(MODES)))
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    widest = [MODES[mode].widest(n) for n in sizes]
    limits = [6 if limit is None else limit for limit in widest]
    pairs = [(draw(st.integers(0, limit)), draw(st.integers(0, limit))) for limit in limits]
    dtype = draw(st.sampled_from([torch.float64, torch.complex128]))
    channels = draw(st.sampled_from([(), (2,), (2, 3)]))
    return Pad((*channels, *sizes), pairs, mode, dtype=dtype), [a for pair in reversed(pairs) for a in pair]


@given(pads())
def test_padding_is_torchs(case: tuple[Pad, list[int]]) -> None:
    P, amounts = case
    x = torch.randn(2, *P.in_shape, dtype=P.dtype)
    axes = len(amounts) // 2
    image = x.reshape(1, -1, *x.shape[-axes:])
    expected = torch.nn.functional.pad(image, amounts, "constant" if P.mode == "zeros" else P.mode)
    assert torch.equal(P(x), expected.reshape(2, *P.out_shape))


@given(pads())
def test_adjoint_is_the_transposed_matrix(case: tuple[Pad, list[int]]) -> None:
    P, _ = case
    assert torch.equal(P.H.to_dense(), P.to_dense().mH)
    assert P.dot_test() <= 1e-12


@pytest.mark.parametrize("mode", MODES)
def test_adjoint_is_differentiable(mode: str) -> None:
    P = Pad((3, 4), (1, (2, 0)), mode, dtype=torch.float64)
    y = torch.randn(P.out_shape, dtype=P.dtype, requires_grad=True)
    assert torch.autograd.gradcheck(P.H, (y,))


def test_adjoint_leaves_its_argument_alone() -> None:
    P = Pad((4,), 1, "circular")
    y = torch.ones(6)
    P.H(y)
    assert torch.equal(y, torch.ones(6))


def test_refused_paddings() -> None:
    with pytest.raises(ArgumentError, match=r"'reflect' padding reads the inside, of which sizes \(4,\) .*\(3,\)"):
        Pad((4,), 4, "reflect")
    with pytest.raises(ArgumentError, match=r"'circular' padding reads the inside, .*got \(\(5, 0\),\)"):
        Pad((4,), ((5, 0),), "circular")
    with pytest.raises(ArgumentError, match=r"padding_mode: expected one of .*, got 'symmetric'"):
        Pad((4,), 1, "symmetric")
    with pytest.raises(ArgumentTypeError, match=r"padding: expected .*, got 'same'"):
        Pad((4,), "same")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"padding: 2 padded axes do not fit shape \(4,\)"):
        Pad((4,), (1, 1))
    with pytest.raises(ShapeError, match=r"'replicate' pads at most 3 axes, got 4"):
        Pad((2, 2, 2, 2), 1, "replicate")
    assert Pad((2, 2, 2, 2), 1).out_shape == (4, 4, 4, 4)
