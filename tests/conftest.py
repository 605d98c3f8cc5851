"""Settings for the tests below this folder, and what several of them watch an iteration with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lsconv.border import cost_model
from lsconv.operators.convolution import Convolution


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    no_cuda = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(no_cuda)


class HostReads(TorchDispatchMode):
    """Counts the operations that make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.equal.default,
        )
        self.count += func in waits
        return func(*args, **(kwargs or {}))


@pytest.fixture
def host_reads() -> type[HostReads]:
    """What counts them."""
    return HostReads


# Convolutions of every kind, for the property tests of the Fourier floor.

Strategy = Callable[[], st.SearchStrategy[Convolution]]


def _weight(draw: Any, shape: tuple[int, ...], groups: int, dtype: torch.dtype) -> Tensor:
    """Random kernels, and kernels whose symbols are rank deficient: averages, differences, repeated channels."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    weight = torch.randn(shape, generator=generator, dtype=dtype)
    kind = draw(st.sampled_from(["random", "random", "average", "difference", "repeated"]))
    if kind == "average":
        return torch.ones_like(weight) / weight[0].numel()
    if kind == "difference":  # every kernel sums to zero: the symbol vanishes at the zero frequency
        taps = tuple(range(2 - weight.ndim, 0)) if weight.ndim > 2 else (-1,)
        return weight - weight.mean(taps, keepdim=True)
    if kind == "repeated":
        per_group = weight.unflatten(-len(shape) if groups == shape[0] else 0, (groups, -1))
        return per_group[:, :1].expand_as(per_group).flatten(0, 1).contiguous()
    return weight


@st.composite
def _circular(draw: Any) -> Convolution:
    ndim = draw(st.sampled_from([1, 1, 2, 2, 3]))
    largest = {1: 8, 2: 4, 3: 2}[ndim]
    groups = draw(st.integers(1, 2))
    c_in, c_out = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    size, stride, dilation, kernel, padding = [], [], [], [], []
    for _ in range(ndim):
        s = draw(st.integers(1, 3 if ndim < 3 else 2))
        n = s * draw(st.integers(1, largest))
        d, k = draw(st.integers(1, 2)), draw(st.integers(1, 4))
        extent = d * (k - 1) + 1
        if extent - s > 2 * n:
            k, extent = 1, 1
        total = draw(st.integers(max(0, extent - s), min(extent - 1, 2 * n)))
        left = draw(st.integers(max(0, total - n), min(total, n)))
        for values, value in zip(
            (size, stride, dilation, kernel, padding), (n, s, d, k, (left, total - left)), strict=True
        ):
            values.append(value)
    batch = draw(st.sampled_from([(), (), (2,), (2, 1)]))
    dtype = draw(st.sampled_from([torch.float64, torch.complex128]))
    weights = [_weight(draw, (groups * c_out, c_in, *kernel), groups, dtype) for _ in range(2 if batch else 1)]
    weight = torch.stack(weights).reshape(*batch, *weights[0].shape)
    A = Convolution(weight, size, stride, padding, dilation, groups, "circular", backend="direct")
    # a kernel that cancels itself as it wraps around a small grid leaves an operator that is all rounding
    sizes = A.to_dense().abs().flatten(-2).amax(-1)
    assume(bool(((sizes == 0) | (sizes > 1e-8 * weight.abs().max())).all()))
    return A


@st.composite
def _zero_padded(draw: Any) -> Convolution:
    ndim = draw(st.sampled_from([1, 1, 2, 2, 3]))
    largest = {1: 12, 2: 7, 3: 4}[ndim]
    groups = draw(st.integers(1, 2))
    c_in, c_out = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    size, stride, dilation, kernel, padding = [], [], [], [], []
    for _ in range(ndim):
        n = draw(st.integers(1, largest))
        s, d, k = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 4))
        extent = d * (k - 1) + 1
        # from valid over same to full, and beyond
        left, right = draw(st.integers(0, extent)), draw(st.integers(0, extent))
        if n + left + right < extent:
            left = extent - n
        for values, value in zip((size, stride, dilation, kernel, padding), (n, s, d, k, (left, right)), strict=True):
            values.append(value)
    batch = draw(st.sampled_from([(), (), (2,), (2, 1)]))
    dtype = draw(st.sampled_from([torch.float64, torch.complex128]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    weight = torch.randn(*batch, groups * c_out, c_in, *kernel, generator=generator, dtype=dtype)
    return Convolution(weight, size, stride, padding, dilation, groups, backend="direct")


@pytest.fixture(scope="session")
def circular_convolutions() -> Strategy:
    """Circular convolutions that are block-circulant, small enough for dense matrices."""
    return _circular


@pytest.fixture(scope="session")
def zero_padded_convolutions() -> Strategy:
    """Zero-padded convolutions with any stride, dilation, groups and (asymmetric) padding."""
    return _zero_padded


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``limits(name=value, ...)``: other limits for the plans of a test that it does not make itself."""
    return lambda **fields: monkeypatch.setattr(cost_model, "DEFAULT_LIMITS", cost_model.Limits(**fields))


@pytest.fixture
def iterated(limits: Callable[..., None]) -> None:
    """Plans that iterate on their border until it has taken too long."""
    limits(factorise=cost_model.Factorise.AFTER_ITERATIONS)
