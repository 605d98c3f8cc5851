"""The physics for deepinv: deepinv's own operators and tests, dense oracles, and its algorithms end to end."""

from __future__ import annotations

import copy
import importlib.util
import warnings

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.deepinv
if importlib.util.find_spec("deepinv") is None:
    pytest.skip("deepinv is not installed", allow_module_level=True)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepinv

from lsconv.deepinv import Blur, SuperResolution  # noqa: E402

F64 = torch.float64
PADDINGS = ("valid", "circular", "replicate", "reflect", "constant")
pytestmark = [pytest.mark.deepinv, pytest.mark.filterwarnings("ignore")]


def taps(b: int, c: int, *size: int, dtype: torch.dtype = F64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    found = torch.rand(b, c, *size, dtype=dtype, generator=generator)
    return found / found.flatten(2).sum(-1).reshape(b, c, *(1 for _ in size))


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("size", [(5, 5), (4, 3), (3, 6)])
@pytest.mark.parametrize("lead", [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_a_blur_is_that_of_deepinv(lead: tuple[int, int], size: tuple[int, int], padding: str) -> None:
    theirs, ours = (cls(taps(*lead, *size), padding=padding) for cls in (deepinv.physics.Blur, Blur))
    x = torch.rand(2, 3, 17, 16, dtype=F64)
    y = theirs.A(x)
    torch.testing.assert_close(ours.A(x), y)
    torch.testing.assert_close(ours.A_adjoint(y), theirs.A_adjoint(y))


@pytest.mark.parametrize("padding", ["valid", "circular"])
def test_a_blur_of_volumes_is_that_of_deepinv(padding: str) -> None:
    theirs, ours = (cls(taps(2, 1, 3, 4, 5), padding=padding) for cls in (deepinv.physics.Blur, Blur))
    x = torch.rand(2, 2, 7, 9, 8, dtype=F64)
    y = theirs.A(x)
    torch.testing.assert_close(ours.A(x), y)
    torch.testing.assert_close(ours.A_adjoint(y), theirs.A_adjoint(y))


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("factor", [2, 3])
def test_super_resolution_is_that_of_deepinv(factor: int, padding: str) -> None:
    theirs = deepinv.physics.Downsampling(filter=taps(1, 1, 5, 5), img_size=(3, 18, 18), factor=factor, padding=padding)
    ours = SuperResolution(taps(1, 1, 5, 5), factor, img_size=(3, 18, 18), padding=padding)
    x = torch.rand(2, 3, 18, 18, dtype=F64)
    y = theirs.A(x)
    torch.testing.assert_close(ours.A(x), y)
    torch.testing.assert_close(ours.A_adjoint(y), theirs.A_adjoint(y))
    p = ours.prox_l2(x, y + 0.01, 1e4)
    torch.testing.assert_close(ours.A_adjoint(ours.A(p) - y - 0.01) + 1e-4 * (p - x), torch.zeros_like(x))


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize(
    "gamma", [1.0, torch.tensor(1e4), torch.tensor([1e2, 1e7]), torch.tensor([1.0, 1e7]).reshape(2, 1, 1, 1)]
)
def test_prox_is_the_minimiser(gamma: float | Tensor, dtype: torch.dtype, padding: str) -> None:
    physics = Blur(taps(1, 1, 5, 4, dtype=dtype), padding=padding)
    z, y = torch.rand(2, 3, 16, 14, dtype=dtype), None
    y = physics.A(torch.rand_like(z)) + 0.01
    found = physics.prox_l2(z, y, gamma)
    A = physics._operator((16, 14), dtype).to(dtype=F64).to_dense()
    weights = torch.as_tensor(gamma, dtype=F64).flatten().expand(2)
    for item, weight in enumerate(weights):
        normal = weight * A.mT @ A + torch.eye(A.shape[1], dtype=F64)
        right = weight * y[item].double().flatten(1) @ A + z[item].double().flatten(1)
        expected = torch.linalg.solve(normal, right.mT).mT.reshape(z[item].shape)
        error = torch.linalg.vector_norm(found[item] - expected) / torch.linalg.vector_norm(expected)
        assert error <= (1e-8 if dtype == F64 else 2e-5)


def test_gamma_of_zero_gives_z_and_negative_ones_are_refused() -> None:
    physics, z = Blur(taps(1, 1, 3, 3)), torch.rand(2, 1, 9, 9, dtype=F64)
    y = physics.A(z) + 1
    torch.testing.assert_close(physics.prox_l2(z, y, torch.tensor([0.0, 1.0]))[0], z[0])
    torch.testing.assert_close(physics.prox_l2(0.5, y, 0.0), torch.full_like(z, 0.5))
    with pytest.raises(ValueError, match="gamma: expected numbers >= 0"):
        physics.prox_l2(z, y, -1.0)


def test_pseudo_inverse_fits_the_data_and_is_of_least_norm() -> None:
    physics = Blur(taps(1, 1, 5, 5))
    A = physics._operator((14, 13), F64).to_dense()
    y = torch.rand(2, 3, 10, 9, dtype=F64)
    expected = (y.flatten(2) @ torch.linalg.pinv(A).mT).reshape(2, 3, 14, 13)
    torch.testing.assert_close(physics.A_dagger(y, solver="CG", max_iter=3), expected, rtol=1e-6, atol=1e-6)
    normal = A.mT @ A + 0.01 * torch.eye(A.shape[1], dtype=F64)
    damped = torch.linalg.solve(normal, y.flatten(2) @ A, left=False).reshape(2, 3, 14, 13)
    torch.testing.assert_close(physics.A_dagger(y, damp=0.1), damped)


def test_guidance_of_pigdm() -> None:
    physics = Blur(taps(1, 1, 3, 3))
    A = physics._operator((10, 9), F64).to_dense()
    x, y = torch.rand(1, 1, 10, 9, dtype=F64), torch.rand(1, 1, 8, 7, dtype=F64)
    covariance = 0.3**2 * A @ A.mT + 0.05**2 * torch.eye(56, dtype=F64)
    expected = A.mT @ torch.linalg.solve(covariance, y.flatten() - A @ x.flatten())
    torch.testing.assert_close(physics.pigdm_guidance(x, y, noise_std=0.05, r=0.3).flatten(), expected)


def test_a_new_filter_makes_new_plans_and_an_old_gamma_none(monkeypatch: pytest.MonkeyPatch) -> None:
    import lsconv

    made = []
    original = lsconv.pinv
    monkeypatch.setattr(lsconv, "pinv", lambda *a, **k: made.append(k["damp"]) or original(*a, **k))
    physics = Blur(taps(1, 1, 3, 3))
    z, y = torch.rand(1, 1, 9, 9, dtype=F64), torch.rand(1, 1, 7, 7, dtype=F64)
    for gamma in (1.0, 10.0, 1.0, 10.0):
        first = physics.prox_l2(z, y, gamma)
    assert len(made) == 1  # the second gamma has the factors of the first
    assert len(physics._plan_cache._plans) == 2
    physics.update_parameters(filter=taps(1, 1, 3, 3).flip(-1))
    assert not torch.allclose(physics.prox_l2(z, y, 10.0), first)
    physics.filter.mul_(0.5)
    other = physics.prox_l2(z, y, 10.0)
    torch.testing.assert_close(physics.clone().prox_l2(z, y, 10.0), other)
    torch.testing.assert_close(copy.deepcopy(physics).prox_l2(z, y, 10.0), other)


def test_gradients_in_everything() -> None:
    physics = Blur()
    kernel = taps(1, 1, 3, 2).requires_grad_()
    z, y = torch.rand(2, 1, 6, 5, dtype=F64, requires_grad=True), torch.rand(2, 1, 4, 4, dtype=F64, requires_grad=True)
    gamma = torch.tensor([3.0, 50.0], dtype=F64, requires_grad=True)

    def prox(f: Tensor, z: Tensor, y: Tensor, g: Tensor) -> Tensor:
        physics.filter = None
        return physics.prox_l2(z, y, g, filter=f)

    assert torch.autograd.gradcheck(prox, (kernel, z, y, gamma))


@pytest.mark.parametrize("padding", ["valid", "circular", "replicate", "reflect"])
def test_deepinvs_own_tests_of_a_physics(padding: str, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    theirs = pytest.importorskip("deepinv.tests.test_physics")
    size = (3, 16, 18)

    def find(name: str, device: object, **options: object) -> tuple[object, ...]:
        found = (Blur(taps(1, 1, 5, 5, dtype=torch.float32), padding=padding), size, 1.0, torch.float32)
        return (*found, ["filter"]) if options.get("get_physics_param") else found

    monkeypatch.setattr(theirs, "find_operator", find)
    monkeypatch.chdir(tmp_path)
    device, rng = torch.device("cpu"), torch.Generator().manual_seed(0)
    name = theirs.OPERATORS[0]
    theirs.test_operators_adjointness("blur", device, rng)
    theirs.test_adjointness_test("blur", 3, device, rng)
    theirs.test_pseudo_inverse("blur", device, rng, True)
    theirs.test_operators_differentiability("blur", device)
    theirs.test_adjoint_autograd("blur", device)
    theirs.test_physics_state_dict("blur", device)
    theirs.test_clone(name, device)
    physics, x = find("", device)[0], torch.rand(1, *size)
    norm = torch.linalg.matrix_norm(physics._operator(size[1:], F64).to_dense(), 2) ** 2  # type: ignore[attr-defined]
    torch.testing.assert_close(physics.compute_sqnorm(x).double(), norm, rtol=1e-3, atol=0)  # type: ignore[attr-defined]


def test_diffpir_runs_with_a_denoiser_that_needs_no_download() -> None:
    physics = Blur(taps(1, 1, 5, 5, dtype=torch.float32), noise_model=deepinv.physics.GaussianNoise(0.02))
    truth = torch.zeros(1, 1, 32, 32)
    truth[..., 8:20, 10:24] = 1.0
    torch.manual_seed(0)
    y = physics(truth)
    model = deepinv.models.MedianFilter(kernel_size=3)
    sampler = deepinv.sampling.DiffPIR(model, deepinv.optim.data_fidelity.L2(), sigma=0.02, max_iter=10, device="cpu")
    with torch.no_grad():
        x = sampler(y, physics)
    assert x.shape == truth.shape
    assert bool(torch.isfinite(x).all())


def test_half_quadratic_splitting_reaches_the_same_point_as_with_deepinvs_own_blur() -> None:
    kernel = taps(1, 1, 5, 5, dtype=torch.float32)
    ours, theirs = Blur(kernel), deepinv.physics.Blur(kernel, max_iter=500, tol=1e-7)
    truth = torch.zeros(1, 1, 24, 24)
    truth[..., 6:15, 8:18] = 1.0
    torch.manual_seed(0)
    y = ours.A(truth) + 0.01 * torch.randn(1, 1, 20, 20)
    results = []
    for physics in (ours, theirs):
        solver = deepinv.optim.optim_builder(
            iteration="HQS",
            prior=deepinv.optim.prior.PnP(deepinv.models.TVDenoiser(n_it_max=50)),
            data_fidelity=deepinv.optim.data_fidelity.L2(),
            params_algo={"stepsize": 50.0, "g_param": 0.02},
            max_iter=8,
        )
        with torch.no_grad():
            results.append(solver(y, physics))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=2e-3)


def test_an_unfolded_network_trains() -> None:
    torch.manual_seed(0)
    physics = Blur(taps(1, 1, 5, 5, dtype=torch.float32))
    denoiser = torch.nn.Conv2d(1, 1, 3, padding=1)

    class Denoiser(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = denoiser

        def forward(self, x: Tensor, sigma: object, **_: object) -> Tensor:
            return x + 0.1 * self.layer(x)

    model = deepinv.unfolded.unfolded_builder(
        iteration="HQS",
        prior=deepinv.optim.prior.PnP(Denoiser()),
        data_fidelity=deepinv.optim.data_fidelity.L2(),
        params_algo={"stepsize": [10.0, 100.0], "g_param": [0.1, 0.1]},
        trainable_params=["stepsize", "g_param"],
        max_iter=2,
    )
    truth = torch.rand(2, 1, 16, 16)
    y = physics.A(truth)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        optimiser.zero_grad()
        loss = torch.nn.functional.mse_loss(model(y, physics), truth)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    followed = [p for name, p in model.named_parameters() if "stepsize" in name or "layer" in name]
    assert len(followed) == 4  # two steps, a weight and a bias
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in followed)
    assert losses[-1] < losses[0]
