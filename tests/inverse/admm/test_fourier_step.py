"""ADMM on the extended grid against the same problem with the operators themselves, and what it costs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lsconv
from lsconv.errors import MethodError
from lsconv.inverse.admm.fourier_step import ExtendedGrid
from lsconv.inverse.admm.proximal import Term, gaussian_term, sparsity_term
from lsconv.inverse.admm.sparse_problem import SparseProblem

DOUBLE = torch.float64


def kernel(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(1)) / 4


OPERATORS = {
    "valid": lambda: lsconv.Conv2d(kernel(1, 1, 3, 2), (9, 8)),
    "same, uneven": lambda: lsconv.Convolution(kernel(1, 1, 3, 2), (7, 8), padding=[(1, 1), (0, 1)]),
    "full": lambda: lsconv.Conv2d(kernel(1, 1, 3, 3), (6, 7), padding=2),
    "circular": lambda: lsconv.Conv2d(kernel(1, 1, 3, 3), (8, 7), padding=1, padding_mode="circular"),
    "dilated": lambda: lsconv.Conv2d(kernel(1, 1, 2, 2), (8, 9), dilation=2),
    "two channels to three": lambda: lsconv.Conv2d(kernel(3, 2, 2, 3), (7, 6)),
    "three groups": lambda: lsconv.Conv2d(kernel(3, 1, 3, 3), (7, 6), groups=3),
    "one dimension": lambda: lsconv.Conv1d(kernel(1, 1, 4), (20,)),
    "three dimensions": lambda: lsconv.Conv3d(kernel(1, 1, 2, 2, 2), (4, 5, 4)),
    "reflect": lambda: lsconv.Convolution(kernel(1, 1, 3, 4), (8, 9), padding=[(1, 1), (1, 2)], padding_mode="reflect"),
    "replicate": lambda: lsconv.Convolution(
        kernel(1, 1, 3, 4), (8, 9), padding=[(2, 0), (1, 2)], padding_mode="replicate"
    ),
    "reflect, one axis, three groups": lambda: lsconv.Convolution(
        kernel(3, 1, 3, 3), (7, 8), padding=[(0, 0), (2, 2)], groups=3, padding_mode="reflect"
    ),
    "a kernel per item": lambda: lsconv.Conv2d(kernel(2, 1, 1, 3, 3), (7, 7)),
}


def data_of(A: lsconv.Convolution) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    truth = (torch.rand(*A.batch_shape, *A.in_shape, dtype=DOUBLE, generator=generator) > 0.5).to(A.dtype)
    return A(truth) + 0.02 * torch.randn(*A.batch_shape, *A.out_shape, dtype=DOUBLE, generator=generator)


def both(A: lsconv.Convolution, L: lsconv.LinearOperator | None = None, weight: float = 0.02) -> list[SparseProblem]:
    y = data_of(A)
    L = lsconv.Gradient(A.in_shape, ndim=A.ndim, dtype=DOUBLE) if L is None else L
    groups = (0, 1) if isinstance(L, lsconv.Gradient) else ()

    def terms(A: lsconv.LinearOperator, y: Tensor) -> list[Term]:
        return [gaussian_term(A, y), sparsity_term(L, torch.full(A.batch_shape, weight, dtype=DOUBLE), groups)]

    return [SparseProblem(A, y, terms, extended=extended) for extended in (True, False)]


def agree(problems, results) -> None:
    """Both runs are certified, and at the same objective."""
    assert all(bool(result.met.all()) for result in results)
    ours, other = (
        problem.certificate(result.x, result.duals, problem.terms_double).objective
        for problem, result in zip(problems, results, strict=True)
    )
    torch.testing.assert_close(ours, other, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["valid", "circular", "two channels to three", "reflect", "a kernel per item"])
def test_the_extended_grid_reaches_the_optimum_of_the_uncropped_problem(name: str) -> None:
    """Objectives of two certified answers, whose quadratic steps have nothing in common; below, the step of each."""
    problems = both(OPERATORS[name]())
    assert isinstance(problems[0].step, ExtendedGrid)
    assert not isinstance(problems[1].step, ExtendedGrid)
    results = [problem.run(1e-5, 3000, None) for problem in problems]
    agree(problems, results)


@pytest.mark.parametrize(
    "make",
    [
        lambda shape: lsconv.Laplacian(shape, boundary="dirichlet", dtype=DOUBLE),
        lambda shape: lsconv.Identity(shape, dtype=DOUBLE),
        lambda shape: lsconv.Conv2d(kernel(2, 1, 2, 2), shape[1:]),
        lambda shape: lsconv.Gradient(shape, boundary="dirichlet", spacing=(1.0, 2.0), dtype=DOUBLE),
        lambda shape: lsconv.Gradient(shape, boundary="periodic", dtype=DOUBLE),
    ],
    ids=["Laplacian", "Identity", "convolution", "Dirichlet gradient", "periodic gradient"],
)
def test_penalties_of_every_kind_are_served(make) -> None:
    A = OPERATORS["valid"]()
    problems = both(A, make(A.in_shape))
    assert isinstance(problems[0].step, ExtendedGrid)
    results = [problem.run(1e-5, 5000, None) for problem in problems]
    agree(problems, results)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_quadratic_step_is_the_dense_one(name: str) -> None:
    """Of the images on the grid: C from the step itself, column by column; the minimiser by a dense solve."""
    A = OPERATORS[name]()
    gradient = lsconv.Gradient(A.in_shape, ndim=A.ndim, dtype=DOUBLE)
    one = torch.ones((), dtype=DOUBLE)  # a diagonal, so that the data term has an image too
    terms = [gaussian_term(A, data_of(A), one), sparsity_term(gradient, one.expand(A.batch_shape), (0, 1))]
    step = ExtendedGrid(A, terms, A.batch_shape, 0.1)
    assert step.data is None
    generator = torch.Generator().manual_seed(3)
    rho = [torch.full(step.batch, value, dtype=DOUBLE) for value in (0.7, 0.2, 0.4)[: len(step.terms)]]
    step.set_penalties(rho)
    shapes = [(*step.batch, *image.shape) for image in step.images]
    reflected = [torch.randn(shape, dtype=DOUBLE, generator=generator) for shape in shapes]
    for _ in range(3):  # what regularises the division pulls to the last x, and is gone after a few steps
        images = step.step([r / 2 for r in reflected], 1.8)
    left = [
        value.reshape(*value.shape, *(1,) * (image.ndim - value.ndim)) * (image - r)
        for value, image, r in zip(rho, list(images), reflected, strict=True)
    ]
    # stationarity: the weighted misfit is orthogonal to the images of every x
    start = step.x.clone()
    for _ in range(5):
        x = torch.randn(start.shape, dtype=DOUBLE, generator=generator)
        other = step.begin(x, x, rho)
        total = sum(float((a * b).sum()) for a, b in zip(left, other, strict=True))
        scale = sum(float(a.norm() * b.norm()) for a, b in zip(left, other, strict=True))
        assert abs(total) <= 1e-9 * scale


def test_operators_without_a_grid_are_refused() -> None:
    A = lsconv.Conv2d(kernel(1, 1, 3, 3), (9, 9), stride=2)
    with pytest.raises(MethodError, match="stride 1"):
        ExtendedGrid(A, [gaussian_term(A, torch.zeros(A.out_shape, dtype=DOUBLE))], (), 0.1)
    B = lsconv.Conv2d(kernel(1, 1, 3, 3), (9, 9))
    dense = lsconv.Dense(torch.eye(81, dtype=DOUBLE).reshape(81, 81), in_shape=(1, 9, 9), out_shape=(81,))
    term = sparsity_term(dense, torch.ones((), dtype=DOUBLE))
    with pytest.raises(MethodError, match="no convolution"):
        ExtendedGrid(B, [gaussian_term(B, torch.zeros(B.out_shape, dtype=DOUBLE)), term], (), 0.1)


WIDE = {
    "valid": lambda: lsconv.Conv2d(kernel(1, 1, 3, 2), (30, 33)),
    "same, uneven": lambda: lsconv.Convolution(kernel(1, 1, 4, 2), (40, 27), padding=[(1, 2), (0, 1)]),
    "full": lambda: lsconv.Conv2d(kernel(1, 1, 3, 3), (40, 31), padding=2),
    "circular": lambda: lsconv.Conv2d(kernel(1, 1, 3, 3), (8, 7), padding=1, padding_mode="circular"),
    "circular, cropped": lambda: lsconv.Convolution(
        kernel(1, 1, 3, 3), (30, 32), padding=[(1, 0), (0, 2)], padding_mode="circular"
    ),
    "dilated": lambda: lsconv.Conv2d(kernel(1, 1, 2, 2), (38, 39), dilation=3),
    "two channels to three": lambda: lsconv.Conv2d(kernel(3, 2, 2, 3), (37, 36)),
    "three groups": lambda: lsconv.Conv2d(kernel(3, 1, 3, 3), (37, 36), groups=3),
    "one dimension": lambda: lsconv.Conv1d(kernel(1, 1, 4), (60,), padding=1),
    "three dimensions": lambda: lsconv.Conv3d(kernel(1, 1, 2, 2, 2), (16, 15, 20)),
    "reflect": lambda: lsconv.Convolution(
        kernel(1, 1, 3, 4), (40, 41), padding=[(1, 1), (1, 2)], padding_mode="reflect"
    ),
    "a kernel per item": lambda: lsconv.Conv2d(kernel(2, 1, 1, 3, 3), (37, 30)),
    "complex": lambda: lsconv.Conv2d(torch.complex(kernel(1, 1, 3, 3), kernel(1, 1, 3, 3).mT), (37, 30)),
}


@pytest.mark.parametrize(("name", "given"), [*((name, False) for name in WIDE), ("valid", True)])
def test_a_data_image_kept_as_a_spectrum_changes_no_iterate(name: str, given: bool) -> None:
    """A diagonal of ones is the same problem, whose data term has its image on the grid."""
    A = WIDE[name]()
    items = 1 + 2**15 // data_of(A).numel()  # an image beyond the cache
    y = data_of(A) * torch.linspace(1, 2, items, dtype=DOUBLE).reshape(-1, *(1,) * (len(A.batch_shape) + A.ndim + 1))
    gradient = lsconv.Gradient(A.in_shape, ndim=A.ndim, dtype=A.dtype)
    x0 = torch.ones(A.in_shape, dtype=A.dtype).expand(items, *A.batch_shape, *A.in_shape) / 2 if given else None
    found = []
    for scale in (None, torch.ones((), dtype=DOUBLE)):

        def terms(A: lsconv.LinearOperator, y: Tensor, scale: Tensor | None = scale) -> list[Term]:
            return [gaussian_term(A, y, scale), sparsity_term(gradient, torch.tensor(0.02, dtype=DOUBLE), (0, 1))]

        problem = SparseProblem(A, y, terms, x0=x0)
        assert isinstance(problem.step, ExtendedGrid)
        assert (problem.step.data is None) == (scale is not None)
        found.append(problem._run(0.0, 12, None).x)
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9 * float(found[1].abs().max()))


@pytest.mark.parametrize("size", [270, 300])
@pytest.mark.parametrize("diagonal", [None, torch.ones(())], ids=["a quadratic term", "a diagonal"])
def test_an_iteration_takes_two_transforms_or_four(size: int, diagonal: Tensor | None, monkeypatch) -> None:
    """Of the whole grid: the image of a quadratic data term takes two narrow ones, there and back, for an axis."""
    A = lsconv.blur_operator(torch.ones(5, 5) / 25, (size, size))
    step = blurred(A, diagonal).step
    assert isinstance(step, ExtendedGrid)
    step.set_penalties([torch.ones(())] * len(step.images))
    images = [torch.zeros(*image.shape) for image in step.images]
    whole, narrow = step.grid.sizes, []
    counts = {"whole": 0}
    for name in ("rfftn", "irfftn"):
        original = getattr(torch.fft, name)

        def counting(tensor, *args, original=original, **options):
            result = original(tensor, *args, **options)
            sizes = max(tensor.shape[-2:], result.shape[-2:], key=lambda shape: shape[-1])
            if tuple(sizes) == whole:
                counts["whole"] += 1
            else:
                narrow.append(sizes)
            return result

        monkeypatch.setattr(torch.fft, name, counting)
    for _ in range(3):
        step.step(images, 1.8)
    assert counts["whole"] == 3 * (2 if diagonal is None else 4)
    assert len(narrow) == (3 * 2 * 4 if diagonal is None else 0)
    assert all(3 * sizes[0] * sizes[1] <= whole[0] * whole[1] for sizes in narrow)


def blurred(A: lsconv.Convolution, diagonal: Tensor | None = None) -> SparseProblem:
    y = torch.rand(A.out_shape, generator=torch.Generator().manual_seed(0))

    def terms(A: lsconv.LinearOperator, y: Tensor) -> list[Term]:
        gradient = lsconv.Gradient(A.in_shape, dtype=A.dtype)
        return [gaussian_term(A, y, diagonal), sparsity_term(gradient, torch.tensor(1e-2, dtype=DOUBLE), (0, 1))]

    return SparseProblem(A, y, terms)


@pytest.mark.parametrize("blur", ["box", "gauss"])
def test_a_picture_takes_at_most_two_hundred_iterations(blur: str) -> None:
    """To the default tolerance in float32, with unknown surroundings; most take about a hundred."""
    kernel = torch.ones(7, 7) / 49 if blur == "box" else torch.exp(-(torch.arange(-5, 6.0) ** 2) / 4)
    kernel = kernel if blur == "box" else kernel[:, None] * kernel / kernel.sum() ** 2
    row, column = torch.meshgrid(torch.arange(80.0), torch.arange(80.0), indexing="ij")
    scene = 0.2 + 0.5 * ((row - 40) ** 2 + (column - 30) ** 2 < 400) + 0.2 * torch.sin(row / 5) * (column > 50)
    A = lsconv.blur_operator(kernel, tuple(80 - k + 1 for k in kernel.shape))
    y = A(scene[None]) + 0.01 * torch.randn(A.out_shape, generator=torch.Generator().manual_seed(0))
    solution = lsconv.total_variation(A, y, 2e-3)
    assert bool(solution.converged)
    assert int(solution.iterations) <= 200


@pytest.mark.slow
@pytest.mark.parametrize("bounds", [(0.2, 0.8), (None, 0.7)])
@pytest.mark.parametrize("mode", [pytest.param("reflect", marks=pytest.mark.slow), "replicate"])
def test_bounds_hold_where_the_padding_repeats_cells(mode: str, bounds: tuple[float | None, float]) -> None:
    """The cells of a copy count once: the objective is that of an iteration on the operators themselves."""
    A = lsconv.Convolution(kernel(1, 1, 3, 4), (8, 9), padding=[(1, 1), (1, 2)], padding_mode=mode)
    generator = torch.Generator().manual_seed(2)
    y = A(torch.rand(A.in_shape, dtype=DOUBLE, generator=generator))
    L = lsconv.Gradient(A.in_shape, dtype=DOUBLE)

    def terms(A: lsconv.LinearOperator, y: Tensor) -> list[Term]:
        return [gaussian_term(A, y), sparsity_term(L, torch.tensor(0.01, dtype=DOUBLE), (0, 1))]

    problems = [SparseProblem(A, y, terms, bounds=bounds, extended=extended) for extended in (True, False)]
    assert isinstance(problems[0].step, ExtendedGrid)
    results = [problem.run(1e-5, 5000, None) for problem in problems]
    ours, other = (
        problem.certificate(result.x, result.duals, problem.terms_double).objective
        for problem, result in zip(problems, results, strict=True)
    )
    assert all(bool(result.met) for result in results)
    torch.testing.assert_close(ours, other, rtol=1e-5, atol=0)
    low, high = bounds
    assert float(results[0].x.max()) <= high
    assert low is None or float(results[0].x.min()) >= low


def test_entries_that_have_copies_count_once() -> None:
    A = OPERATORS["reflect"]()
    problems = both(A, lsconv.Identity(A.in_shape, dtype=DOUBLE))
    assert isinstance(problems[0].step, ExtendedGrid)
    results = [problem.run(1e-5, 5000, None) for problem in problems]
    agree(problems, results)


@pytest.mark.parametrize(
    "make",
    [
        lambda shape: lsconv.Laplacian(shape, boundary="dirichlet", dtype=DOUBLE),
        lambda shape: lsconv.Gradient(shape, boundary="periodic", dtype=DOUBLE),
    ],
    ids=["Laplacian", "periodic gradient"],
)
def test_penalties_that_read_something_else_beyond_the_edge_are_left_to_the_operators(make) -> None:
    A = OPERATORS["reflect"]()
    problem, _ = both(A, make(A.in_shape))
    assert not isinstance(problem.step, ExtendedGrid)


@pytest.mark.slow
@pytest.mark.parametrize("bounds", [pytest.param(None, marks=pytest.mark.slow), (0.1, 0.9)])
def test_items_that_copies_keep_from_converging_are_finished_by_the_operators(
    bounds: tuple[float, float] | None,
) -> None:
    """Half of the limit each; an item that the first half has solved keeps its answer."""
    A = OPERATORS["reflect"]()
    generator = torch.Generator().manual_seed(2)
    y = A(torch.rand(2, *A.in_shape, dtype=DOUBLE, generator=generator))
    weight = torch.tensor([1.0, 0.01], dtype=DOUBLE)
    L = lsconv.Gradient(A.in_shape, dtype=DOUBLE)

    def terms(A: lsconv.LinearOperator, y: Tensor) -> list[Term]:
        return [gaussian_term(A, y), sparsity_term(L, weight, (0, 1))]

    alone = SparseProblem(A, y, terms, bounds=bounds)._run(1e-4, 40, None)
    assert not bool(alone.met.all())
    problem = SparseProblem(A, y, terms, bounds=bounds)
    seen: list[int] = []
    result = problem.run(1e-4, 2 * 40, lambda k, x: seen.append(k))
    assert seen == list(range(10, 10 * len(seen) + 1, 10))
    assert len(seen) > 4
    assert result.history.iterations.tolist() == seen
    assert result.history.objective.shape == (len(seen), 2)
    verdict = problem.certificate(result.x, result.duals, problem.terms_double)
    assert bool((verdict.met(1e-4) | ~result.met).all())
    kept = alone.met
    assert torch.equal(result.x[kept], alone.x[kept])
    if bounds is not None:  # which are slow to an optimum
        assert float(result.x.min()) >= bounds[0]
        assert float(result.x.max()) <= bounds[1]
        return
    finished = problem.run(1e-3, 1000, None)
    assert bool(finished.met.all())
    reference = SparseProblem(A, y, terms, bounds=bounds, extended=False).run(1e-3, 1000, None)
    ours = problem.certificate(finished.x, finished.duals, problem.terms_double).objective
    other = problem.certificate(reference.x, [torch.zeros_like(y), *reference.duals], problem.terms_double).objective
    torch.testing.assert_close(ours, other, rtol=2e-3, atol=0)
