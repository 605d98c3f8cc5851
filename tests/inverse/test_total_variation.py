"""total_variation and plug_and_play against an independent first-order method, run long on small problems."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lsconv
from lsconv.errors import MethodError

DOUBLE = torch.float64


def primal_dual(A, y: Tensor, weight: float, *, group, huber=0.0, bounds=(None, None), L=None, steps=8000):
    """The primal-dual method of Chambolle and Pock (2011) on dense matrices, with nothing of lsconv's solvers in it.

    ``group(q)`` is the magnitude that the penalty measures, broadcastable to q.
    """
    penalty = lsconv.Gradient(A.in_shape, dtype=DOUBLE) if L is None else L
    matrix, G = A.to_dense(), penalty.to_dense()
    whole = torch.cat([matrix, G])
    step = 0.99 / torch.linalg.matrix_norm(whole, 2)
    x = torch.zeros(A.in_numel, dtype=DOUBLE)
    bar, p, q = x, torch.zeros(A.out_numel, dtype=DOUBLE), torch.zeros(penalty.out_numel, dtype=DOUBLE)
    data = y.flatten()
    for _ in range(steps):
        p = (p + step * (matrix @ bar - data)) / (1 + step)
        q = q + step * (G @ bar)
        q = q / (1 + step * huber / weight)
        size = group(q.reshape(penalty.out_shape)) / weight
        q = (q.reshape(penalty.out_shape) / size.clamp_min(1)).flatten()
        new = (x - step * (matrix.mT @ p + G.mT @ q)).clamp(*bounds) if bounds != (None, None) else (
            x - step * (matrix.mT @ p + G.mT @ q)
        )  # fmt: skip
        bar, x = 2 * new - x, new
    return x.reshape(A.in_shape)


def over_directions(q: Tensor) -> Tensor:
    return torch.linalg.vector_norm(q, dim=0, keepdim=True)


def over_directions_and_channels(q: Tensor) -> Tensor:
    return torch.linalg.vector_norm(q, dim=(0, 1), keepdim=True)


def problem(channels=1, **options):
    torch.manual_seed(5)
    A = lsconv.Conv2d(torch.rand(channels, 1, 3, 3, dtype=DOUBLE) / 5, (10, 11), groups=channels, **options)
    x = torch.zeros(channels, 10, 11, dtype=DOUBLE)
    x[:, 3:7, 4:9] = 1
    return A, A(x) + 0.03 * torch.randn(A.out_shape, dtype=DOUBLE)


@pytest.mark.parametrize(
    "padding",
    [
        {},
        *(
            pytest.param(p, marks=pytest.mark.slow)
            for p in ({"padding": 1}, {"padding": 1, "padding_mode": "circular"})
        ),
    ],
)
def test_isotropic_total_variation_reaches_the_optimum(padding):
    A, y = problem(**padding)
    solution = lsconv.total_variation(A, y, 0.05, rtol=1e-5)
    expected = primal_dual(A, y, 0.05, group=over_directions)
    assert bool(solution.converged)
    torch.testing.assert_close(solution.x, expected, rtol=0, atol=5e-4)


def test_anisotropic_total_variation_reaches_the_optimum():
    A, y = problem()
    solution = lsconv.total_variation(A, y, 0.05, isotropic=False, coupled=False, rtol=1e-5)
    torch.testing.assert_close(solution.x, primal_dual(A, y, 0.05, group=torch.abs), rtol=0, atol=5e-4)


def test_huber_total_variation_reaches_the_optimum():
    A, y = problem()
    solution = lsconv.total_variation(A, y, 0.05, huber=0.1, rtol=1e-5)
    torch.testing.assert_close(solution.x, primal_dual(A, y, 0.05, huber=0.1, group=over_directions), rtol=0, atol=5e-4)


@pytest.mark.slow
def test_colour_channels_share_their_edges_when_coupled():
    A, y = problem(channels=3)
    solution = lsconv.total_variation(A, y, 0.05, rtol=1e-5)
    expected = primal_dual(A, y, 0.05, group=over_directions_and_channels, steps=3000)
    torch.testing.assert_close(solution.x, expected, rtol=0, atol=5e-4)


def test_bounds_hold_and_the_bounded_optimum_is_reached():
    A, y = problem()
    solution = lsconv.total_variation(A, y, 0.02, bounds=(0.1, 0.8), rtol=1e-5)
    assert float(solution.x.min()) >= 0.1
    assert float(solution.x.max()) <= 0.8
    expected = primal_dual(A, y, 0.02, group=over_directions, bounds=(0.1, 0.8))
    torch.testing.assert_close(solution.x, expected, rtol=0, atol=5e-4)


def test_sparsity_of_a_general_operator():
    A, y = problem()
    L = lsconv.Identity(A.in_shape, dtype=DOUBLE)
    solution = lsconv.total_variation(A, y, 0.05, L=L, rtol=1e-5)
    torch.testing.assert_close(solution.x, primal_dual(A, y, 0.05, group=torch.abs, L=L), rtol=0, atol=5e-4)


@pytest.mark.slow
def test_reflect_padding_is_served_by_conjugate_gradients():
    A, y = problem(padding=1, padding_mode="reflect")
    solution = lsconv.total_variation(A, y, 0.05, rtol=1e-5)
    torch.testing.assert_close(solution.x, primal_dual(A, y, 0.05, group=over_directions), rtol=0, atol=5e-4)


def test_answers_scale_with_the_data():
    A, y = problem()
    x = lsconv.total_variation(A, y, 0.05).x
    for unit in (1e-6, 1e6):
        scaled = lsconv.total_variation(A, unit * y, unit * 0.05)
        torch.testing.assert_close(scaled.x / unit, x, rtol=0, atol=1e-9)


def test_flat_and_zero_pictures_stay_what_they_are():
    A = lsconv.blur_operator(torch.ones(3, 3) / 9, (20, 21))
    for level in (0.0, 0.7):
        solution = lsconv.total_variation(A, torch.full((1, 20, 21), level), 1e-3)
        assert bool(solution.converged)
        assert float((solution.x - level).abs().max()) <= 1e-5


def test_a_nearly_flat_picture_converges_in_float32():
    """Beside its level it has few digits; the iteration must not spend them on the level."""
    row, column = torch.meshgrid(torch.arange(36.0), torch.arange(36.0), indexing="ij")
    A = lsconv.blur_operator(torch.ones(5, 5) / 25, (32, 32))
    scene = 0.8 + 0.01 * torch.sin(row / 12) * torch.cos(column / 9)
    y = A(scene[None]) + 0.005 * torch.randn(A.out_shape, generator=torch.Generator().manual_seed(0))
    assert bool(lsconv.total_variation(A, y, 0.05).converged)


def test_poisson_data_of_a_strided_convolution_are_served():
    generator = torch.Generator().manual_seed(0)
    A = lsconv.Conv2d(torch.rand(1, 1, 3, 3, generator=generator) / 9, (13, 13), stride=2)
    counts = torch.poisson(5 * torch.rand(1, 6, 6, generator=generator))
    assert bool(lsconv.total_variation(A, counts, 0.1, noise="poisson", bounds=(0, None)).converged)


def test_where_it_starts_does_not_change_the_answer():
    A, y = problem()
    one = lsconv.total_variation(A, y, 0.05, rtol=1e-6).x
    other = lsconv.total_variation(A, y, 0.05, rtol=1e-6, x0=torch.full(A.in_shape, 5.0, dtype=DOUBLE)).x
    torch.testing.assert_close(one, other, rtol=0, atol=2e-4)


def test_sparsity_of_a_stack_of_operators():
    A, y = problem()
    L = lsconv.vstack([lsconv.Gradient(A.in_shape, dtype=DOUBLE), 0.3 * lsconv.Identity(A.in_shape, dtype=DOUBLE)])
    solution = lsconv.total_variation(A, y, 0.05, L=L, rtol=1e-5)
    expected = primal_dual(A, y, 0.05, group=torch.abs, L=L)
    torch.testing.assert_close(solution.x, expected, rtol=0, atol=5e-4)


def test_every_item_of_a_batch_gets_the_answer_it_has_alone():
    A, y = problem()
    both = torch.stack([y, 20 * y.flip(-1)])
    weights = torch.tensor([0.05, 0.4], dtype=DOUBLE)
    together = lsconv.total_variation(A, both, weights, rtol=1e-5)
    for item in range(2):
        alone = lsconv.total_variation(A, both[item], float(weights[item]), rtol=1e-5)
        torch.testing.assert_close(together.x[item], alone.x, rtol=0, atol=1e-3 * float(both[item].abs().max()))


def test_poisson_data_reach_the_optimum_of_the_likelihood():
    A, y = problem()
    counts = (50 * y.clamp_min(0)).round()
    solution = lsconv.total_variation(A, counts, 0.3, noise="poisson", background=2.0, bounds=(0, None), rtol=1e-5)
    # directional derivatives of the objective at the optimum are not negative along any feasible direction tried
    G = lsconv.Gradient(A.in_shape, dtype=DOUBLE)

    def objective(x: Tensor) -> float:
        t = A(x) + 2.0
        return float((t - torch.xlogy(counts, t)).sum() + 0.3 * torch.linalg.vector_norm(G(x), dim=0).sum())

    best = objective(solution.x)
    assert bool(solution.converged)
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        other = (
            solution.x + 10.0 ** (-(seed % 4)) * torch.randn(A.in_shape, dtype=DOUBLE, generator=generator)
        ).clamp_min(0)
        middle = solution.x + 0.05 * (other - solution.x)
        assert objective(middle) >= best - 1e-6 * abs(best)
    # and the smooth part is balanced: a uniform rescaling does not help either
    assert min(objective(c * solution.x) for c in (0.99, 1.01)) >= best - 1e-6 * abs(best)


def poisson_primal_dual(A, y: Tensor, weight: float, background: float, steps: int = 8000) -> Tensor:
    """The primal-dual method for ``sum t - y log t + weight TV(x)``, ``t = Ax + background``, ``x >= 0``."""
    matrix, G = A.to_dense(), lsconv.Gradient(A.in_shape, dtype=DOUBLE).to_dense()
    # the two dual variables have curvatures of 1 / counts and of 1: steps of their own (Pock and Chambolle 2011)
    sigma, tau = 0.02, 0.99 / (0.02 * torch.linalg.matrix_norm(torch.cat([matrix, G]), 2) ** 2)
    x = bar = torch.full((A.in_numel,), float(y.mean()), dtype=DOUBLE)
    p, q = torch.zeros(A.out_numel, dtype=DOUBLE), torch.zeros(G.shape[0], dtype=DOUBLE)
    data = y.flatten()
    for _ in range(steps):
        p = p + sigma * (matrix @ bar + background)
        p = 0.5 * (1 + p - torch.sqrt((p - 1) ** 2 + 4 * sigma * data))
        q = (q + sigma * (G @ bar)).reshape(2, -1)
        q = (q / (q.norm(dim=0) / weight).clamp_min(1)).flatten()
        new = (x - tau * (matrix.mT @ p + G.mT @ q)).clamp_min(0)
        bar, x = 2 * new - x, new
    return x.reshape(A.in_shape)


@pytest.mark.parametrize("padding", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_poisson_data_reach_the_optimum_of_an_independent_method(padding):
    A, y = problem(padding=padding)
    counts = (50 * y.clamp_min(0)).round()
    solution = lsconv.total_variation(A, counts, 0.3, noise="poisson", background=2.0, bounds=(0, None), rtol=1e-5)
    assert bool(solution.converged)
    expected = poisson_primal_dual(A, counts, 0.3, 2.0)
    torch.testing.assert_close(solution.x, expected, rtol=0, atol=1e-2)  # of values up to 60


def test_history_holds_objective_and_residuals_that_fall():
    A, y = problem()
    history = lsconv.total_variation(A, y, 0.05, rtol=1e-5).history
    assert history.objective[-1] <= history.objective[0]
    assert history.primal[-1] <= 1e-5
    assert history.dual[-1] <= 1e-5
    assert history.stationarity[-1] <= 1e-5
    assert history.complementarity[-1] <= 1e-5
    assert history.primal[-1] <= 1e-2 * history.primal[0]
    assert len(history.iterations) == len(history.objective) == len(history.rho)
    assert history.plot().get_ylabel() == "relative residual"


def test_plug_and_play_with_a_proximal_denoiser_solves_its_problem():
    A, y = problem()
    rho, weight = 0.3, 0.05
    solution = lsconv.plug_and_play(
        A, y, lambda v: torch.nn.functional.softshrink(v, weight / rho), rho, rtol=1e-6, max_iter=3000
    )
    L = lsconv.Identity(A.in_shape, dtype=DOUBLE)
    torch.testing.assert_close(solution.x, primal_dual(A, y, weight, group=torch.abs, L=L), rtol=0, atol=5e-4)


def test_bad_arguments_are_named():
    A, y = problem()
    for match, options in [
        ("weight", {"weight": -1.0}),
        ("huber", {"huber": -1.0}),
        ("bounds", {"bounds": (2.0, 1.0)}),
        ("bounds", {"bounds": (None, None)}),
        ("noise", {"noise": "salt"}),
        ("counts", {"noise": "poisson"}),
        ("L: in_shape", {"L": lsconv.Identity((1, 3, 3), dtype=DOUBLE)}),
    ]:
        with pytest.raises(lsconv.LsconvError, match=match):
            lsconv.total_variation(A, y - 1, **{"weight": 0.1, **options})
    with pytest.raises(lsconv.LsconvError, match="rho"):
        lsconv.plug_and_play(A, y, lambda v: v, 0.0)
    with pytest.raises(lsconv.LsconvError, match="denoiser"):
        lsconv.plug_and_play(A, y, lambda v: v[..., 1:], 1.0)


@pytest.mark.parametrize("padding", [{}, {"padding": 1, "padding_mode": "reflect"}])
@pytest.mark.parametrize("options", [{}, pytest.param({"noise": "poisson"}, marks=pytest.mark.slow)])
def test_where_nothing_is_measured_the_answer_is_zero(padding: dict[str, object], options: dict[str, str]) -> None:
    A = lsconv.Conv2d(torch.ones(1, 1, 3, 3, dtype=DOUBLE) / 9, in_size=(12, 12), **padding)
    y = torch.rand(2, *A.out_shape, dtype=DOUBLE)
    observed = torch.stack([torch.ones(A.out_shape, dtype=torch.bool), torch.zeros(A.out_shape, dtype=torch.bool)])
    given = [{"observed": observed}] + ([] if options else [{"weights": observed.to(DOUBLE)}])
    alone = lsconv.total_variation(A, y[0], 0.01, **options)
    for kept in given:
        solution = lsconv.total_variation(A, y, 0.01, **kept, **options)
        assert solution.status == [alone.status, lsconv.Status.ZERO]
        assert bool(solution.converged.all())
        assert not solution.x[1].any()
        torch.testing.assert_close(solution.x[0], alone.x, rtol=0, atol=1e-2)


def test_an_operator_of_zeros_is_answered_with_zero() -> None:
    A = lsconv.Conv2d(torch.zeros(1, 1, 3, 3), in_size=(8, 8))
    solution = lsconv.total_variation(A, torch.rand(A.out_shape), 0.3)
    assert bool(solution.converged)
    assert not solution.x.any()


def test_no_limit_on_the_iterations_is_the_usual_limit_and_none_at_all_is_refused() -> None:
    A, y = problem()
    for solve, usual in [
        (lambda **o: lsconv.total_variation(A, y, 0.05, rtol=0.0, **o), 1000),
        (lambda **o: lsconv.plug_and_play(A, y, lambda v: 0.5 * v, 0.1, rtol=0.0, **o), 100),
    ]:
        with pytest.warns(lsconv.ConvergenceWarning):
            assert int(solve(max_iter=None).iterations) == usual
        with pytest.raises(lsconv.LsconvError, match=r"^max_iter: expected an integer >= 1, got 0"):
            solve(max_iter=0)


@pytest.mark.parametrize("followed", ["y", "weight", "A", "L"])
def test_total_variation_refuses_a_gradient_that_it_does_not_have(followed: str) -> None:
    given = {
        "y": torch.rand(1, 6, 6),
        "weight": torch.tensor(0.1),
        "A": torch.rand(1, 1, 3, 3),
        "L": torch.rand(1, 1, 2, 2),
    }
    given[followed].requires_grad_()

    def solve() -> lsconv.Solution:
        A = lsconv.Conv2d(given["A"], in_size=(8, 8))
        L = lsconv.Conv2d(given["L"], in_size=(8, 8))
        return lsconv.total_variation(A, given["y"], given["weight"], L=L, rtol=0.1)

    with pytest.raises(MethodError, match=rf"^{followed}: .*torch.no_grad\(\).*detached.*tikhonov"):
        solve()
    with torch.no_grad():
        assert not solve().x.requires_grad
    given[followed] = given[followed].detach()
    assert not solve().x.requires_grad


@pytest.mark.parametrize("followed", ["y", "rho", "A"])
def test_plug_and_play_refuses_a_gradient_that_it_does_not_have(followed: str) -> None:
    given = {"y": torch.rand(1, 6, 6), "rho": torch.tensor(0.1), "A": torch.rand(1, 1, 3, 3)}
    given[followed].requires_grad_()

    def solve() -> lsconv.Solution:
        A = lsconv.Conv2d(given["A"], in_size=(8, 8))
        return lsconv.plug_and_play(A, given["y"], lambda v: 0.5 * v, given["rho"], rtol=0.1)

    with pytest.raises(MethodError, match=rf"^{followed}: .*torch.no_grad\(\).*detached.*tikhonov"):
        solve()
    with torch.no_grad():
        assert not solve().x.requires_grad


def test_plug_and_play_takes_a_network_whose_parameters_require_grad() -> None:
    network = torch.nn.Conv2d(1, 1, 3, padding=1, bias=False)
    torch.nn.init.constant_(network.weight, 1 / 9)
    A = lsconv.Conv2d(torch.rand(1, 1, 3, 3) / 9, in_size=(8, 8))
    solution = lsconv.plug_and_play(A, torch.rand(2, 1, 6, 6), network, 0.1, max_iter=500)
    assert bool(solution.converged.all())
    assert not solution.x.requires_grad
