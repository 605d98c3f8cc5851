"""Modules: right answers, gradients, plans kept while nothing changes, and what torch expects of a module."""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Callable

import pytest
import torch

import lsconv


def test_bias_is_taken_off_and_the_size_inferred() -> None:
    conv, x = torch.nn.Conv2d(2, 4, 3, padding=1), torch.randn(3, 2, 9, 10)
    torch.testing.assert_close(lsconv.nn.PseudoInverse(conv)(conv(x)), x, rtol=1e-3, atol=1e-3)


def test_plan_is_made_again_only_when_the_weight_changed() -> None:
    layer = lsconv.nn.PseudoInverse(torch.nn.Conv1d(1, 2, 3))
    y = torch.randn(1, 2, 10)
    first = layer(y)
    plan = layer._cached[2]
    layer(y)
    assert layer._cached[2] is plan
    with torch.no_grad():
        layer.conv.weight.mul_(2)
        layer.conv.bias.zero_()
    expected = lsconv.lstsq(lsconv.Conv1d(layer.conv.weight.detach(), in_size=12), y).x
    torch.testing.assert_close(layer(y), expected, rtol=1e-4, atol=1e-5)
    assert layer._cached[2] is not plan
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


MODULES: dict[str, Callable[[torch.nn.Module], torch.nn.Module]] = {
    "PseudoInverse": lambda conv: lsconv.nn.PseudoInverse(conv),
    "Tikhonov": lambda conv: lsconv.nn.Tikhonov(conv, damp=0.3),
    "Tikhonov with L": lambda conv: lsconv.nn.Tikhonov(
        conv, damp=0.3, L=torch.nn.Conv1d(1, 2, 3, padding=1, bias=False, dtype=conv.weight.dtype)
    ),
    "RangeNull": lambda conv: lsconv.nn.RangeNull(conv),
}
every_module = pytest.mark.parametrize("name", MODULES)


def _module(name: str, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    layer = MODULES[name](torch.nn.Conv1d(1, 2, 3, padding=2, dtype=dtype))
    inputs = [torch.randn(2, 2, 10, dtype=dtype)]
    return layer, [*inputs, torch.randn(2, 1, 8, dtype=dtype)] if name == "RangeNull" else inputs


@every_module
def test_gradients_of_parameters_and_inputs_agree_with_differences(name: str) -> None:
    layer, inputs = _module(name, torch.float64)
    names, values = zip(*layer.named_parameters(), strict=True)

    def answer(*tensors: torch.Tensor) -> torch.Tensor:
        # copies: gradcheck writes through .data, a change that torch does not count
        parameters = {key: tensor.clone() for key, tensor in zip(names, tensors, strict=False)}
        return torch.func.functional_call(layer, parameters, tensors[len(names) :])

    everything = [t.detach().clone().requires_grad_() for t in (*values, *inputs)]
    assert torch.autograd.gradcheck(answer, everything, fast_mode=True)


@every_module
def test_an_item_that_is_not_finite_is_nan_with_a_warning_and_no_other_changes(name: str) -> None:
    layer, inputs = _module(name)
    with torch.no_grad():
        expected = layer(*inputs)
        inputs[0][1, 0, 3] = torch.nan
        with pytest.warns(lsconv.ConvergenceWarning, match="NaN"):
            x = layer(*inputs)
    assert x[1].isnan().all()
    torch.testing.assert_close(x[0], expected[0])


@pytest.mark.parametrize("penalty", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_a_prior_that_is_not_finite_makes_its_item_nan(penalty: bool, shared: bool) -> None:
    L = torch.nn.Conv1d(2, 2, 3, padding=1, bias=False) if penalty else None
    layer = lsconv.nn.Tikhonov(torch.nn.Conv1d(2, 2, 3, padding=1), 0.1, L=L)
    y, prior = torch.randn(2, 2, 10), torch.randn(2, 10) if shared else torch.randn(2, 2, 10)
    prior[..., 1, 3] = torch.nan
    if not shared:
        prior[0] = 1
    with pytest.warns(lsconv.ConvergenceWarning, match="NaN"):
        x = layer(y, prior)
    assert x[1].isnan().all()
    assert bool(x[0].isnan().all()) == shared


def test_the_damping_is_a_double_beside_doubles() -> None:
    for dtype in (torch.float32, torch.float64, torch.complex64, torch.complex128):
        layer = lsconv.nn.Tikhonov(torch.nn.Conv1d(2, 2, 3, dtype=dtype), damp=0.1)
        assert layer.log_damp.dtype == dtype.to_real()
    conv = torch.nn.Conv1d(2, 2, 3, padding=1, bias=False, dtype=torch.float64)
    y = torch.randn(2, 2, 10, dtype=torch.float64)
    expected = lsconv.lstsq(lsconv.Convolution.from_module(conv, (10,)), y, damp=0.1).x
    torch.testing.assert_close(lsconv.nn.Tikhonov(conv, 0.1)(y), expected, rtol=1e-12, atol=1e-12)


@every_module
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning")  # by torch
def test_torch_compile_around_a_module_changes_nothing(name: str) -> None:
    layer, inputs = _module(name)
    network = torch.nn.Sequential(torch.nn.Conv1d(2, 2, 1), torch.nn.ReLU())

    def run(y: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return layer(network(y), *rest).square() + 1

    compiled = torch.compile(run, backend="aot_eager")
    expected = run(*inputs)
    torch.testing.assert_close(compiled(*inputs), expected)
    parameters = [*layer.parameters(), *network.parameters()]
    found = torch.autograd.grad(compiled(*inputs).sum(), parameters, allow_unused=True)
    for one, other in zip(found, torch.autograd.grad(expected.sum(), parameters, allow_unused=True), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning")  # by torch
def test_torch_compile_with_inductor() -> None:
    layer, (y,) = _module("Tikhonov")
    compiled = torch.compile(lambda y: layer(torch.sin(y)).square())
    torch.testing.assert_close(compiled(y), layer(torch.sin(y)).square())


@every_module
@pytest.mark.parametrize("coarse", [torch.bfloat16, torch.float16])
def test_training_under_autocast_solves_in_float32(name: str, coarse: torch.dtype) -> None:
    layer, inputs = _module(name)
    expected = torch.autograd.grad(layer(*inputs).sum(), list(layer.parameters()), allow_unused=True)
    with torch.autocast("cpu", dtype=coarse):
        x = layer(*(t.to(coarse).float() for t in inputs))
        assert x.dtype == torch.float32
        x = layer(*inputs)
    found = torch.autograd.grad(x.sum(), list(layer.parameters()), allow_unused=True)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@every_module
def test_copies_pickles_and_dtypes_of_every_module(name: str) -> None:
    layer, inputs = _module(name)
    x = layer(*inputs)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(other(*inputs), x)
        other.load_state_dict(layer.state_dict())
        torch.testing.assert_close(other(*inputs), x)
    wide = layer.to(torch.float64)(*(t.double() for t in inputs))
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), x, rtol=1e-4, atol=1e-4)


def test_learned_damping_makes_a_new_plan_after_a_step_and_only_then() -> None:
    layer, (y,) = _module("Tikhonov")
    layer(y)
    plan = layer._cached[2]
    layer(y).sum().backward()  # a backward pass changes no weight
    layer(2 * y)
    assert layer._cached[2] is plan
    torch.optim.SGD([layer.log_damp], lr=0.1).step()
    expected = lsconv.lstsq(
        lsconv.Conv1d(layer.conv.weight.detach(), in_size=8, padding=2),
        y - layer.conv.bias.detach()[:, None],
        damp=layer.damp.item(),
    ).x
    torch.testing.assert_close(layer(y), expected, rtol=1e-4, atol=1e-5)
    assert layer._cached[2] is not plan


def test_plan_of_a_penalty_is_made_again_only_when_something_changed() -> None:
    penalty = torch.nn.Conv1d(1, 2, 3, padding=1, bias=False)
    layer = lsconv.nn.Tikhonov(torch.nn.Conv1d(1, 2, 3), damp=0.3, L=penalty)
    y, prior = torch.randn(2, 2, 10), torch.randn(1, 12)

    def expected() -> torch.Tensor:
        A = lsconv.Conv1d(layer.conv.weight.detach(), in_size=12)
        L = lsconv.Conv1d(penalty.weight.detach(), in_size=12, padding=1)
        data = y - layer.conv.bias.detach()[:, None]
        return lsconv.tikhonov(A, data, layer.damp.detach(), L=L, x_prior=prior).x

    torch.testing.assert_close(layer(y, prior), expected(), rtol=1e-4, atol=1e-5)
    plan = layer._cached[2]
    layer(2 * y).sum().backward()
    assert layer._cached[2] is plan
    for change in (penalty.weight, layer.conv.weight, layer.log_damp):
        with torch.no_grad():
            change.mul_(1.5)
        torch.testing.assert_close(layer(y, prior), expected(), rtol=1e-4, atol=1e-5)
        assert layer._cached[2] is not plan
        plan = layer._cached[2]


def test_another_penalty_without_tensors_is_another_plan() -> None:
    layer, y = lsconv.nn.Tikhonov(torch.nn.Conv1d(1, 2, 3), L=lsconv.Gradient((1, 12), ndim=1)), torch.randn(2, 10)
    first = layer(y)
    layer.L = lsconv.Laplacian((1, 12), ndim=1)
    second = layer(y)
    assert not torch.allclose(first, second, atol=1e-3)
    layer.refresh()
    torch.testing.assert_close(layer(y), second)


def test_method_of_a_module_is_that_of_its_penalised_solve() -> None:
    penalty = torch.nn.Conv1d(1, 2, 3, padding=1, bias=False)
    layer = lsconv.nn.Tikhonov(torch.nn.Conv1d(1, 2, 3), L=penalty, method="fourier")
    with pytest.raises(lsconv.errors.MethodError, match="fourier"):  # neither is circular
        layer(torch.randn(2, 10))


def test_a_rank_deficient_module_gets_the_answer_of_pinv() -> None:
    conv = torch.nn.Conv1d(2, 2, 3, dtype=torch.float64, bias=False)
    with torch.no_grad():
        conv.weight[1] = 2 * conv.weight[0]
    y = conv(torch.randn(2, 20, dtype=torch.float64)).detach()
    expected = torch.linalg.pinv(lsconv.Conv1d(conv.weight.detach(), in_size=20).to_dense(), rtol=1e-9) @ y.flatten()
    torch.testing.assert_close(lsconv.nn.PseudoInverse(conv)(y).flatten(), expected, rtol=1e-6, atol=1e-7)


@every_module
def test_ensembles_and_gradients_per_sample_by_torch_func(name: str) -> None:
    layers = [_module(name, torch.float64)[0] for _ in range(2)]
    with torch.no_grad():
        layers[1].conv.weight.mul_(1.5)
    _, inputs = _module(name, torch.float64)
    parameters, buffers = torch.func.stack_module_state(layers)

    def answer(parameters: dict[str, torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layers[0], (parameters, buffers), inputs)

    found = torch.func.vmap(answer, in_dims=(0, *(None for _ in inputs)))(parameters, *inputs)
    torch.testing.assert_close(found, torch.stack([layer(*inputs) for layer in layers]), rtol=1e-7, atol=1e-7)

    def loss(parameters: dict[str, torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        return answer(parameters, *inputs).square().sum()

    own = {key: value.detach() for key, value in layers[0].named_parameters()}
    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, *(0 for _ in inputs)))(own, *inputs)
    for sample in range(2):
        layers[0].zero_grad()
        layers[0](*(t[sample] for t in inputs)).square().sum().backward()
        for key, value in layers[0].named_parameters():
            torch.testing.assert_close(gradients[key][sample], value.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("module", [lsconv.nn.PseudoInverse, lsconv.nn.RangeNull])
def test_undamped_training_of_a_badly_conditioned_convolution_warns_once(module: type[torch.nn.Module]) -> None:
    torch.manual_seed(1)
    conv = torch.nn.Conv2d(4, 4, 3, padding=1)
    layer, y = module(conv), torch.randn(2, 4, 16, 16)
    more = (y,) if module is lsconv.nn.RangeNull else ()
    with torch.no_grad():
        layer(y, *more)  # nothing is trained
    with pytest.warns(UserWarning, match=rf"^{module.__name__}: .*conv.weight .*lsconv.nn.Tikhonov.*damp=") as caught:
        layer(y, *more).sum().backward()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    for _ in range(3):
        with torch.no_grad():
            conv.weight.mul_(1.01)
        layer(y, *more)


def test_a_convolution_that_training_makes_worse_is_noticed() -> None:
    conv = torch.nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular", bias=False)
    layer, y = lsconv.nn.PseudoInverse(conv), torch.randn(1, 16)
    for edge in (0.0, 0.1, 0.2, 0.3, 0.4, 0.49, 0.4999):
        with torch.no_grad():
            conv.weight.copy_(torch.tensor([[[edge, 1.0, edge]]]))
        layer(y)
    with torch.no_grad():
        conv.weight.mul_(2)
    with pytest.warns(UserWarning, match="^PseudoInverse: the smallest singular value"):
        layer(y)


@pytest.mark.parametrize("shape", [(6, 2, 3, 1, 1), (2, 6, 3, 2, 1), (3, 3, 1, 1, 0)])
def test_well_conditioned_or_damped_or_fixed_ones_do_not_warn(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    outputs, inputs, kernel, stride, padding = shape
    conv = torch.nn.Conv2d(inputs, outputs, kernel, stride, padding)
    y = conv(torch.randn(2, inputs, 16, 16)).detach()
    lsconv.nn.PseudoInverse(conv, in_size=(16, 16))(y).sum().backward()
    torch.manual_seed(1)
    bad = torch.nn.Conv2d(4, 4, 3, padding=1)
    y = torch.randn(2, 4, 16, 16)
    lsconv.nn.Tikhonov(bad, damp=0.1)(y).sum().backward()
    lsconv.nn.PseudoInverse(bad.requires_grad_(False))(y)
