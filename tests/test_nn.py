"""Modules: right answers, gradients, plans kept while nothing changes, and what torch expects of a module."""

from __future__ import annotations

import copy
import pickle

import torch

import lsconv


def test_bias_is_taken_off_and_the_size_inferred() -> None:
    conv, x = torch.nn.Conv2d(2, 4, 3, padding=1), torch.randn(3, 2, 9, 10)
    torch.testing.assert_close(lsconv.nn.PseudoInverse(conv)(conv(x)), x, rtol=1e-3, atol=1e-3)


def test_plan_is_made_again_only_when_the_weight_changed() -> None:
    layer = lsconv.nn.PseudoInverse(torch.nn.Conv1d(1, 2, 3))
    y = torch.randn(1, 2, 10)
    first = layer(y)
    plan = layer._kept[2]
    layer(y)
    assert layer._kept[2] is plan
    with torch.no_grad():
        layer.conv.weight.mul_(2)
        layer.conv.bias.zero_()
    expected = lsconv.lstsq(lsconv.Conv1d(layer.conv.weight.detach(), in_size=12), y).x
    torch.testing.assert_close(layer(y), expected, rtol=1e-4, atol=1e-5)
    assert layer._kept[2] is not plan
    assert not torch.allclose(layer(y), first)


def test_copies_pickles_state_and_dtype() -> None:
    layer = lsconv.nn.Tikhonov(torch.nn.Conv1d(1, 2, 3), damp=0.3)
    y = torch.randn(2, 2, 10)
    x = layer(y)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(other(y), x)
    fresh = lsconv.nn.Tikhonov(torch.nn.Conv1d(1, 2, 3), damp=1.0)
    fresh.load_state_dict(layer.state_dict())
    torch.testing.assert_close(fresh(y), x)
    torch.testing.assert_close(layer.double()(y.double()).float(), x, rtol=1e-4, atol=1e-5)


def test_autocast_solves_in_float32() -> None:
    layer, y = lsconv.nn.Tikhonov(torch.nn.Conv1d(1, 2, 3), damp=0.3), torch.randn(2, 2, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = layer(y)
    torch.testing.assert_close(x, layer(y), rtol=0, atol=0)
    assert x.dtype == torch.float32


def test_range_null_keeps_the_data_and_the_null_space_part() -> None:
    conv = torch.nn.Conv2d(3, 1, 3, stride=2, padding=1)
    layer, y, z = lsconv.nn.RangeNull(conv), torch.randn(2, 1, 4, 4), torch.randn(2, 3, 8, 8)
    x = layer(y, z)
    torch.testing.assert_close(conv(x), y, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(layer(conv(z).detach(), z), z, rtol=1e-3, atol=1e-3)


def test_learning_damping_and_penalty_lowers_the_loss() -> None:
    rows = torch.arange(24.0)
    x = ((rows[:, None] // 6 + rows // 8) % 2)[None, None]
    conv = torch.nn.Conv2d(1, 1, 5, padding=2, padding_mode="circular", bias=False).requires_grad_(False)
    conv.weight.fill_(1 / 25)
    y = conv(x) + 0.02 * torch.randn(1, 1, 24, 24)
    penalty = torch.nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular", bias=False)
    layer = lsconv.nn.Tikhonov(conv, damp=0.3, L=penalty)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = (layer(y) - x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert layer.log_damp.grad is not None
    assert bool(penalty.weight.grad.abs().sum() > 0)
