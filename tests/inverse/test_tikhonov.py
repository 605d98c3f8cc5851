"""tikhonov against the dense normal equations in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lsconv
from lsconv.border import outer_iteration as module
from lsconv.border.cost_model import plan_bytes
from lsconv.border.outer_iteration import NormalEquations, OuterSolution
from lsconv.border.penalty import Penalty, as_convolutions
from lsconv.border.stacked_plan import StackedPlan
from lsconv.errors import ConvergenceWarning, PlanMemoryError
from lsconv.inverse.plans.krylov_plan import KrylovStack
from lsconv.inverse.route import penalty_plan
from tests.oracles import dense_tikhonov

DOUBLE = torch.float64


def convolution(out: int, channels: int, size=(13, 15), kernel=5, dtype=DOUBLE, **options):
    torch.manual_seed(3)
    return lsconv.Conv2d(
        torch.randn(out, channels // options.get("groups", 1), kernel, kernel, dtype=dtype), size, **options
    )


CASES = {
    "valid, gradient": (convolution(1, 1), lambda A: lsconv.Gradient(A.in_shape, dtype=A.dtype)),
    "same, gradient": (convolution(1, 1, padding=2), lambda A: lsconv.Gradient(A.in_shape, dtype=A.dtype)),
    "full, Dirichlet Laplacian": (
        convolution(1, 1, padding=4),
        lambda A: lsconv.Laplacian(A.in_shape, boundary="dirichlet", dtype=A.dtype),
    ),
    "valid, periodic Laplacian": (
        convolution(1, 1),
        lambda A: lsconv.Laplacian(A.in_shape, boundary="periodic", dtype=A.dtype),
    ),
    "valid, Dirichlet gradient": (
        convolution(1, 1),
        lambda A: lsconv.Gradient(A.in_shape, boundary="dirichlet", dtype=A.dtype),
    ),
    "circular, Neumann gradient": (
        convolution(1, 1, padding=2, padding_mode="circular"),
        lambda A: lsconv.Gradient(A.in_shape, dtype=A.dtype),
    ),
    "circular, periodic gradient": (
        convolution(2, 2, padding=2, padding_mode="circular"),
        lambda A: lsconv.Gradient(A.in_shape, boundary="periodic", dtype=A.dtype),
    ),
    "channels mix": (convolution(3, 2), lambda A: lsconv.Gradient(A.in_shape, dtype=A.dtype)),
    "channels mix, same": (convolution(3, 2, padding=2), lambda A: lsconv.Gradient(A.in_shape, dtype=A.dtype)),
    "depthwise": (convolution(4, 4, groups=4), lambda A: lsconv.Gradient(A.in_shape, dtype=A.dtype)),
    "groups, finer in L": (convolution(4, 4, groups=2), lambda A: lsconv.Gradient(A.in_shape, dtype=A.dtype)),
    "dilated, asymmetric": (
        convolution(1, 1, kernel=3, dilation=2, padding=((1, 3), (0, 2))),
        lambda A: lsconv.Gradient(A.in_shape, dtype=A.dtype),
    ),
    "stack of a gradient and the identity": (
        convolution(2, 3, padding=1),
        lambda A: lsconv.vstack(
            [lsconv.Gradient(A.in_shape, dtype=A.dtype), 0.3 * lsconv.Identity(A.in_shape, dtype=A.dtype)]
        ),
    ),
    "a convolution as penalty": (
        convolution(1, 1),
        lambda A: lsconv.Conv2d(torch.tensor([[[[1.0, -2.0, 1.0]]]], dtype=A.dtype), A.in_shape[1:], padding=(0, 1)),
    ),
    "complex": (
        convolution(1, 1, dtype=torch.complex128),
        lambda A: lsconv.Gradient(A.in_shape, dtype=A.dtype),
    ),
}
ELSEWHERE = {
    "strided": (convolution(1, 1, kernel=3, stride=2), lambda A: lsconv.Gradient(A.in_shape, dtype=A.dtype)),
    "reflect": (
        convolution(1, 1, padding=2, padding_mode="reflect"),
        lambda A: lsconv.Gradient(A.in_shape, dtype=A.dtype),
    ),
    "Neumann Laplacian": (
        convolution(1, 1),
        lambda A: lsconv.vstack(
            [lsconv.Laplacian(A.in_shape, dtype=A.dtype), lsconv.Gradient(A.in_shape, dtype=A.dtype)]
        ),
    ),
    "a penalty that is no convolution": (
        convolution(1, 1),
        lambda A: lsconv.Diagonal(torch.linspace(1, 2, A.in_numel, dtype=A.dtype).reshape(A.in_shape)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_convolutional_penalty_is_solved_exactly_through_the_border(name):
    A, penalty = CASES[name][0], CASES[name][1](CASES[name][0])
    damp = 0.05 * float(torch.linalg.matrix_norm(A.to_dense(), 2))
    assert isinstance(penalty_plan(A, penalty, damp), StackedPlan)
    y, prior = torch.randn(2, *A.out_shape, dtype=A.dtype), torch.randn(A.in_shape, dtype=A.dtype)
    solution = lsconv.tikhonov(A, y, damp, L=penalty, x_prior=prior, rtol=1e-12)
    expected = dense_tikhonov(A, y, damp, penalty, prior)
    assert torch.linalg.norm(solution.x - expected) <= 1e-8 * torch.linalg.norm(expected)
    residual = torch.linalg.vector_norm((y - A(expected)).flatten(1), dim=1)
    torch.testing.assert_close(solution.residual_norm, residual, rtol=1e-6, atol=0)
    assert bool(solution.converged.all())


@pytest.mark.parametrize("name", ELSEWHERE)
def test_other_operators_and_penalties_go_to_lsmr_on_the_stack(name):
    A, penalty = ELSEWHERE[name][0], ELSEWHERE[name][1](ELSEWHERE[name][0])
    damp = 0.1 * float(torch.linalg.matrix_norm(A.to_dense(), 2))
    assert isinstance(penalty_plan(A, penalty, damp), KrylovStack)
    y = torch.randn(2, *A.out_shape, dtype=A.dtype)
    solution = lsconv.tikhonov(A, y, damp, L=penalty, rtol=1e-13)
    expected = dense_tikhonov(A, y, damp, penalty)
    assert torch.linalg.norm(solution.x - expected) <= 1e-6 * torch.linalg.norm(expected)


def test_a_small_problem_with_a_penalty_that_defeats_lsmr_is_decomposed():
    s = torch.logspace(0, -9, 40, dtype=DOUBLE)
    U, V = (torch.linalg.qr(torch.randn(40, 40, dtype=DOUBLE)).Q for _ in range(2))
    A, L = lsconv.Dense(U * s @ V.mH), lsconv.Gradient((40,), ndim=1, dtype=DOUBLE)
    y, prior, damp = torch.randn(3, 40, dtype=DOUBLE), torch.randn(40, dtype=DOUBLE), torch.tensor([1e-7, 1e-3, 1.0])
    assert not bool(KrylovStack(A, L, damp).solve(y, x_prior=prior).converged.all())
    solution = lsconv.tikhonov(A, y, damp, L=L, x_prior=prior)
    assert bool(solution.converged.all())
    matrix, penalty = A.to_dense(), L.to_dense()
    for x, data, strength in zip(solution.x, y, damp, strict=True):
        stack, rest = (
            torch.cat([matrix, strength * penalty]),
            torch.cat([data - matrix @ prior, torch.zeros(len(penalty), dtype=DOUBLE)]),
        )
        expected = prior + torch.linalg.lstsq(stack, rest[:, None], driver="gelsd").solution[:, 0]
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-7 * float(expected.abs().max()))


def test_gradients_of_a_small_problem_with_a_penalty_that_defeats_lsmr():
    s = torch.logspace(0, -7, 12, dtype=DOUBLE)
    U, V = (torch.linalg.qr(torch.randn(12, 12, dtype=DOUBLE)).Q for _ in range(2))
    A, L = lsconv.Dense(U * s @ V.mH), lsconv.Gradient((12,), ndim=1, dtype=DOUBLE)
    y = torch.randn(12, dtype=DOUBLE, requires_grad=True)
    solution = lsconv.tikhonov(A, y, 1e-4, L=L)
    weights = torch.randn(12, dtype=DOUBLE)
    (got,) = torch.autograd.grad((solution.x * weights).sum(), y)
    matrix, penalty = A.to_dense(), L.to_dense()
    expected = matrix @ torch.linalg.solve(matrix.mH @ matrix + 1e-8 * penalty.mH @ penalty, weights)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("penalised", [False, True])
def test_damp_per_item_gives_every_item_its_own_answer(penalised):
    A = convolution(1, 1)
    L = lsconv.Gradient(A.in_shape, dtype=A.dtype) if penalised else None
    damp = torch.tensor([0.1, 3.0, 40.0], dtype=DOUBLE)
    y = torch.randn(2, 3, *A.out_shape, dtype=DOUBLE)
    solution = lsconv.tikhonov(A, y, damp, L=L, rtol=1e-13)
    expected = dense_tikhonov(A, y, damp, L)
    torch.testing.assert_close(solution.x, expected, rtol=0, atol=1e-8 * float(expected.abs().max()))
    assert solution.damp.shape == (2, 3)


@pytest.mark.parametrize(
    "mode", [{}, {"padding": 2}, {"padding": 2, "padding_mode": "circular"}, {"padding": 2, "padding_mode": "reflect"}]
)
def test_prior_without_penalty_is_what_the_identity_pulls_to(mode):
    A = convolution(1, 1, **mode)
    y, prior = torch.randn(A.out_shape, dtype=DOUBLE), torch.randn(3, *A.in_shape, dtype=DOUBLE)
    solution = lsconv.tikhonov(A, y, 2.0, x_prior=prior, rtol=1e-12)
    for item in range(3):
        expected = dense_tikhonov(A, y, 2.0, None, prior[item])
        assert torch.linalg.norm(solution.x[item] - expected) <= 1e-8 * torch.linalg.norm(expected)


def test_a_prior_leaves_the_krylov_methods_their_own_default_tolerance():
    A = convolution(1, 1, padding=2, padding_mode="reflect", dtype=torch.float32)
    y, prior = torch.randn(A.out_shape), torch.randn(A.in_shape)
    assert bool(lsconv.tikhonov(A, y, 2.0, x_prior=prior).converged)  # a warning is an error here


def test_a_warm_start_does_not_move_the_answer():
    A, L = ELSEWHERE["reflect"][0], lsconv.Gradient((1, 13, 15), dtype=DOUBLE)
    y = torch.randn(A.out_shape, dtype=DOUBLE)
    far = 100 * torch.randn(A.in_shape, dtype=DOUBLE)
    for penalty in (None, L):
        cold = lsconv.tikhonov(A, y, 3.0, L=penalty, rtol=1e-12).x
        warm = lsconv.tikhonov(A, y, 3.0, L=penalty, rtol=1e-12, x0=far).x
        assert torch.linalg.norm(warm - cold) <= 1e-7 * torch.linalg.norm(cold)


def test_without_damping_the_answer_is_the_least_squares_solution_nearest_to_the_prior():
    A = convolution(1, 1)
    y, prior = torch.randn(A.out_shape, dtype=DOUBLE), torch.randn(A.in_shape, dtype=DOUBLE)
    solution = lsconv.tikhonov(A, y, 0.0, x_prior=prior, rtol=1e-12)
    matrix = A.to_dense()
    expected = prior.flatten() + torch.linalg.pinv(matrix) @ (y.flatten() - matrix @ prior.flatten())
    assert torch.linalg.norm(solution.x.flatten() - expected) <= 1e-7 * torch.linalg.norm(expected)


def test_float32_reaches_its_tolerance_on_a_hard_blur():
    t = torch.arange(15.0) - 7
    kernel = torch.exp(-(t**2) / 8)
    weight = kernel[:, None] * kernel
    weight = (weight / weight.sum())[None, None]
    for padding in (0, 7):
        A = lsconv.Conv2d(weight, (96, 100), padding=padding)
        y = A(torch.rand(1, 96, 100))
        solution = lsconv.tikhonov(A, y, 1e-3, L=lsconv.Gradient(A.in_shape))
        x, precise, L = solution.x.double(), A.to(dtype=DOUBLE), lsconv.Gradient(A.in_shape, dtype=DOUBLE)
        gradient = precise.H(y.double() - precise(x)) - 1e-6 * L.H(L(x))
        assert bool(solution.converged)
        assert gradient.norm() < 1e-5 * precise.H(y.double()).norm()


def test_bad_arguments_are_named():
    A = convolution(1, 1)
    y = torch.randn(A.out_shape, dtype=DOUBLE)
    with pytest.raises(lsconv.LsconvError, match="L: in_shape"):
        lsconv.tikhonov(A, y, 1.0, L=lsconv.Gradient((1, 9, 9), dtype=DOUBLE))
    with pytest.raises(lsconv.LsconvError, match="L: dtype"):
        lsconv.tikhonov(A, y, 1.0, L=lsconv.Gradient(A.in_shape, dtype=torch.float32))
    with pytest.raises(lsconv.LsconvError, match="x_prior"):
        lsconv.tikhonov(A, y, 1.0, x_prior=torch.zeros(2, 2, dtype=DOUBLE))
    with pytest.raises(lsconv.LsconvError, match="noise_std"):
        lsconv.tikhonov(A, y, 1.0, noise_std=0.1)
    with pytest.raises(lsconv.LsconvError, match="damp"):
        lsconv.tikhonov(A, y, -1.0)
    with pytest.raises(lsconv.LsconvError, match='method: "fourier"'):
        lsconv.tikhonov(A, y, 1.0, L=lsconv.Gradient(A.in_shape, dtype=DOUBLE), method="fourier")


@pytest.mark.parametrize("size", [(37, 37), (37, 12)])
@pytest.mark.parametrize("kind", ["gradient", "convolution and identity"])
def test_a_grid_longer_than_the_inputs_changes_nothing(size: tuple[int, int], kind: str) -> None:
    """37 is a slow length: the grid grows to 40, and the cells beyond form a strip that no input row reads."""
    A = lsconv.Conv2d(torch.randn(1, 1, 3, 2, dtype=DOUBLE), in_size=size)
    L = lsconv.Gradient(A.in_shape, dtype=DOUBLE)
    if kind != "gradient":
        valid = lsconv.Conv2d(torch.randn(1, 1, 3, 3, dtype=DOUBLE), in_size=size)
        L = lsconv.vstack([valid, 0.1 * lsconv.Identity(A.in_shape, dtype=DOUBLE)])
    y = torch.randn(2, *A.out_shape, dtype=DOUBLE)
    plan = StackedPlan(A, L, 0.3)
    assert plan.inverse.embedding.grid[0] == 40
    assert plan.inverse.form == "valid"
    M, P = A.to_dense(), L.to_dense()
    expected = torch.linalg.solve(M.T @ M + 0.09 * P.T @ P, M.T @ y.flatten(1).T).T.reshape(2, *A.in_shape)
    torch.testing.assert_close(plan.solve(y, rtol=1e-12).x, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("penalty", [False, True])
@pytest.mark.parametrize("noise", [0.0, 1e-6, 0.3])
def test_a_prior_that_explains_the_data_is_no_stagnation(dtype: torch.dtype, penalty: bool, noise: float) -> None:
    """What a prior leaves of y may be rounding: the tolerance is then that of storing x and y, not of their rest."""
    A = lsconv.Conv2d(torch.ones(1, 1, 3, 3, dtype=dtype), in_size=(10, 10))
    L = lsconv.Gradient(A.in_shape, dtype=dtype) if penalty else None
    prior = 1 + torch.rand(20, *A.in_shape, dtype=dtype)
    y = A(prior) + noise * torch.randn(20, *A.out_shape, dtype=dtype)
    solution = lsconv.tikhonov(A, y, 0.1, L=L, x_prior=prior)
    assert bool(solution.converged.all())
    expected = dense_tikhonov(A.to(dtype=DOUBLE), y.double(), 0.1, L and L.to(dtype=DOUBLE), prior.double())
    torch.testing.assert_close(solution.x.double(), expected, rtol=0, atol=2e-4 if dtype == torch.float32 else 1e-8)


@pytest.mark.parametrize(
    ("size", "options", "kind"),
    [
        ((1, 3), {"kernel": (1, 3)}, "held"),  # A circular by name, reading across no edge
        ((7, 9), {"kernel": (3, 4)}, "held"),
        ((7, 9), {"kernel": (3, 4)}, "cropped"),
        ((7, 9), {"kernel": (3, 4)}, "gradient"),
        ((7, 9), {"kernel": (3, 1), "padding": (1, 0)}, "across"),  # A wraps along one axis, L is held along the other
        ((7, 9), {"kernel": (3, 3), "padding": (1, 0)}, "gradient"),
        ((7, 107), {"kernel": (3, 3), "padding": (1, 0)}, "gradient"),  # 107: a prime that zero padding goes around
        ((7, 107), {"kernel": (3, 3)}, "gradient"),
    ],
)
@pytest.mark.parametrize("prior", [False, True])
def test_a_circular_convolution_with_any_penalty_is_dense_algebra(size, options, kind, prior) -> None:
    torch.manual_seed(5)
    kernel, padding = options["kernel"], options.get("padding", 0)
    A = lsconv.Conv2d(torch.randn(2, 1, *kernel, dtype=DOUBLE), size, padding=padding, padding_mode="circular")
    L = {
        "held": lambda: lsconv.Conv2d(torch.randn(1, 1, 1, 2, dtype=DOUBLE), size, padding=[(0, 0), (0, 1)]),
        "cropped": lambda: lsconv.Conv2d(torch.randn(1, 1, 2, 3, dtype=DOUBLE), size, padding_mode="circular"),
        "across": lambda: lsconv.Conv2d(torch.randn(1, 1, 1, 3, dtype=DOUBLE), size, padding=(0, 2)),
        "gradient": lambda: lsconv.Gradient(A.in_shape, dtype=DOUBLE),
    }[kind]()
    y = torch.randn(3, *A.out_shape, dtype=DOUBLE)
    x_prior = torch.randn(*A.in_shape, dtype=DOUBLE) if prior else None
    damp = torch.tensor([0.3, 1.0, 2.0], dtype=DOUBLE)
    expected = dense_tikhonov(A, y, damp, L, x_prior)
    solution = lsconv.tikhonov(A, y, damp, L=L, x_prior=x_prior)
    assert bool(solution.converged.all())
    torch.testing.assert_close(solution.x, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.usefixtures("iterated")
@pytest.mark.parametrize("with_prior", [False, True])
def test_items_solved_one_by_one_have_the_answers_of_all_together(
    with_prior: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    A = lsconv.Conv2d(torch.rand(1, 1, 3, 3, dtype=torch.float64), in_size=(12, 11))
    plan = StackedPlan(A, lsconv.Gradient(A.in_shape, dtype=torch.float64), torch.tensor([0.1, 0.3]))
    y = torch.randn(3, 1, *A.out_shape, dtype=torch.float64)
    prior = torch.randn(2, *A.in_shape, dtype=torch.float64) if with_prior else None
    together = plan.solve(y, x_prior=prior, rtol=1e-12)
    plan.work_bytes = 0
    calls = 0
    run = module.outer_iteration

    def counted(equations: NormalEquations) -> OuterSolution:
        nonlocal calls
        calls += 1
        return run(equations)

    monkeypatch.setattr(module, "outer_iteration", counted)
    apart = plan.solve(y, x_prior=prior, rtol=1e-12)
    assert calls == 3
    for name in ("x", "residual_norm", "damp"):
        torch.testing.assert_close(getattr(apart, name), getattr(together, name), rtol=1e-10, atol=1e-10)
    assert torch.equal(apart.converged, torch.ones(3, 2, dtype=torch.bool))
    assert apart.iterations.shape == apart.codes.shape == apart.gradient_norm.shape == (3, 2)


def test_a_plan_with_a_penalty_keeps_to_the_memory_allowed() -> None:
    A = lsconv.Conv2d(torch.rand(1, 1, 5, 5, dtype=torch.float64), in_size=(40, 40))
    L = lsconv.Gradient(A.in_shape, dtype=torch.float64)
    y = torch.randn(A.out_shape, dtype=torch.float64)
    expected = lsconv.tikhonov(A, y, 0.5, L=L)
    with pytest.raises(PlanMemoryError, match=r"bytes.*lsmr"):
        lsconv.tikhonov(A, y, 0.5, L=L, method="border", memory_limit=1000)
    with pytest.warns(ConvergenceWarning, match="falling back to LSMR"):
        solution = lsconv.tikhonov(A, y, 0.5, L=L, memory_limit=1000, rtol=1e-12)
    torch.testing.assert_close(solution.x, expected.x, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_estimate_of_a_plan_with_a_penalty_covers_what_it_keeps(padding: int, dtype: torch.dtype) -> None:
    A = lsconv.Conv2d(torch.rand(2, 2, 5, 5, dtype=dtype), in_size=(90, 80), padding=padding)
    L = lsconv.Gradient(A.in_shape, dtype=dtype)
    plan = StackedPlan(A, L, 0.5)
    terms = as_convolutions(L, 2)
    assert terms is not None
    factors = A.to(dtype=plan.factor_dtype)
    assert plan.inverse.nbytes <= plan_bytes(factors, penalty=Penalty(factors, terms, plan.damp))


def test_float32_data_have_float32_factors_where_those_in_float64_would_not_fit() -> None:
    A = lsconv.Conv2d(torch.rand(1, 1, 5, 5) / 25, in_size=(64, 64))
    L = lsconv.Gradient(A.in_shape)
    assert StackedPlan(A, L, 1e-4).factor_dtype == torch.float64
    terms = as_convolutions(L, 2)
    assert terms is not None
    needed = plan_bytes(A, penalty=Penalty(A, terms, torch.tensor(1e-4)))
    assert StackedPlan(A, L, 1e-4, memory_limit=needed).factor_dtype == torch.float32


def with_penalty_data(L_of):
    A = convolution(1, 1, size=(7, 6), kernel=3)
    L = L_of(A)
    y, w = torch.randn(2, *A.out_shape, dtype=DOUBLE), torch.randn(2, *L.out_shape, dtype=DOUBLE)
    return A, L, y, w


TARGETS = {
    "Neumann gradient": lambda A: lsconv.Gradient(A.in_shape, dtype=DOUBLE),
    "periodic gradient": lambda A: lsconv.Gradient(A.in_shape, boundary="periodic", dtype=DOUBLE),
    "Laplacian": lambda A: lsconv.Laplacian(A.in_shape, boundary="dirichlet", dtype=DOUBLE),
    "matrix": lambda A: lsconv.Dense(torch.randn(50, A.in_numel, dtype=DOUBLE), in_shape=A.in_shape),
}


@pytest.mark.parametrize("name", TARGETS)
def test_penalty_data_are_data_of_the_stacked_matrix(name: str) -> None:
    A, L, y, w = with_penalty_data(TARGETS[name])
    prior = torch.randn(A.in_shape, dtype=DOUBLE)
    stacked = torch.cat([A.to_dense(), 0.7 * L.to_dense()])
    target = 0.7 * (w.flatten(1) + L.to_dense() @ prior.flatten())
    expected = torch.linalg.lstsq(stacked, torch.cat([y.flatten(1), target], 1).mT).solution.mT
    found = lsconv.tikhonov(A, y, 0.7, L=L, penalty_data=w, x_prior=prior)
    assert bool(found.converged.all())
    torch.testing.assert_close(found.x.flatten(1), expected, rtol=1e-8, atol=1e-8)


def test_penalty_data_of_the_identity_are_a_prior() -> None:
    A = convolution(1, 1, size=(7, 6), kernel=3)
    y, w = torch.randn(A.out_shape, dtype=DOUBLE), torch.randn(A.in_shape, dtype=DOUBLE)
    given, prior = lsconv.tikhonov(A, y, 0.7, penalty_data=w), lsconv.tikhonov(A, y, 0.7, x_prior=w)
    assert torch.equal(given.x, prior.x)


@pytest.mark.slow
def test_gradients_by_penalty_data_damp_and_kernel_are_right() -> None:
    A, L, y, w = with_penalty_data(TARGETS["Neumann gradient"])
    damp = torch.tensor(0.7, dtype=DOUBLE)

    def solve(y: Tensor, w: Tensor, damp: Tensor, weight: Tensor) -> Tensor:
        return lsconv.tikhonov(lsconv.Conv2d(weight, (7, 6)), y, damp, L=L, penalty_data=w, rtol=1e-12).x

    inputs = [t.detach().clone().requires_grad_() for t in (y[0], w[0], damp, A.weight)]
    # steps of 1e-5: differences over 1e-6 are of the size of the rounding of x, and x is linear in most of these
    assert torch.autograd.gradcheck(solve, inputs, eps=1e-5, atol=1e-6, fast_mode=True)


def test_an_empty_batch_of_penalty_data_has_an_empty_answer() -> None:
    A, L, y, w = with_penalty_data(TARGETS["Neumann gradient"])
    assert lsconv.tikhonov(A, y[:0], 0.7, L=L, penalty_data=w[:0]).x.shape == (0, *A.in_shape)
    assert lsconv.tikhonov(A, y[:0], 0.7, L=L, penalty_data=w[0]).x.shape == (0, *A.in_shape)


def test_penalty_data_that_do_not_fit_are_refused() -> None:
    A, L, y, w = with_penalty_data(TARGETS["Neumann gradient"])
    with pytest.raises(lsconv.ShapeError, match="penalty_data"):
        lsconv.tikhonov(A, y, 0.7, L=L, penalty_data=w[..., 1:])
    with pytest.raises(lsconv.ArgumentError, match="penalty_data: needs damp > 0"):
        lsconv.tikhonov(A, y, 0.0, L=L, penalty_data=w)
    with pytest.raises(lsconv.ArgumentTypeError, match="penalty_data"):
        lsconv.tikhonov(A, y, 0.7, L=L, penalty_data=3.0)
