"""The choice of damp against singular value formulas, and against what the rules promise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import lsconv
from lsconv.errors import ArgumentError, MethodError, PlanMemoryError, ShapeError
from lsconv.inverse.damping.choose_damp import RULES, Selection, choose_damp
from lsconv.inverse.damping.rules import Criterion
from lsconv.inverse.damping.stochastic_paths import BorderPath, SolverPath
from lsconv.inverse.damping.subimages import as_windows
from lsconv.operators.base import LinearOperator

DOUBLE = torch.float64
NOISE = 0.1


class Dense:
    """Every rule's function of damp from the dense matrices, for one item: the oracle."""

    def __init__(self, A: LinearOperator, y: Tensor, L: LinearOperator | None = None) -> None:
        self.M, self.y = A.to_dense(), y.reshape(-1)
        self.L = torch.eye(A.in_numel, dtype=A.dtype) if L is None else L.to_dense()
        self.m = A.out_numel
        self.svd = torch.linalg.svd(self.M, full_matrices=False)[:2] if L is None else None
        rank = int(torch.linalg.matrix_rank(self.L))
        self.nullity = A.in_numel - rank
        # the Gaussian prior's logarithm of det lives on the range of L
        self.rank = rank

    def parts(self, damp: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Residual, penalty, trace of H, logarithm of det, and m - tr H, from the SVD where L is the identity."""
        mu = damp**2
        if self.svd is not None:
            U, s = self.svd
            c = (U.mH @ self.y).abs()
            rest = mu / (s**2 + mu)
            outside = (self.y - U @ (U.mH @ self.y)).abs().square().sum()
            rss, penalty = (rest * c).square().sum() + outside, (s * c / (s**2 + mu)).square().sum()
            free = rest.sum() + self.m - len(s)
            return rss, penalty, self.m - free, torch.log1p(s**2 / mu).sum(), free
        normal = self.M.mH @ self.M + mu * self.L.mH @ self.L
        x = torch.linalg.solve(normal, self.M.mH @ self.y)
        trace = torch.trace(torch.linalg.solve(normal, self.M.mH @ self.M)).real
        rss = (self.M @ x - self.y).abs().square().sum()
        logdet = torch.linalg.slogdet(normal).logabsdet - self.rank * math.log(mu)
        return rss, (self.L @ x).abs().square().sum(), trace, logdet, self.m - trace

    def value(self, rule: str, damp: float) -> float:
        rss, penalty, trace, logdet, free = self.parts(damp)
        if rule == "gcv":
            return float(self.m * rss / free**2)
        if rule == "upre":
            return float(rss + 2 * NOISE**2 * trace)
        if rule == "discrepancy":
            return float(rss)
        if rule == "evidence":
            dof = self.m - self.nullity
            return float(dof * ((rss + damp**2 * penalty) / dof).log() + logdet)
        return self.curvature(damp)

    def curvature(self, damp: float, step: float = 1e-3) -> float:
        """By differences, of the curve itself."""
        points = [self.parts(damp * math.exp(k * step)) for k in (-1, 0, 1)]
        X, Y = ([0.5 * point[k].log() for point in points] for k in (0, 1))
        (x1, x2), (y1, y2) = (((z[2] - z[0]) / (2 * step), (z[2] - 2 * z[1] + z[0]) / step**2) for z in (X, Y))
        return float((x1 * y2 - x2 * y1) / (x1**2 + y1**2) ** 1.5)

    def check(self, selection: Selection, item: tuple[int, ...] = (), rtol: float = 1e-7) -> None:
        """The curve is the rule's, and nothing around the damp chosen is better."""
        rule, chosen = selection.rule, float(selection.damp[item])
        curve = zip(selection.damps[(..., *item)].tolist(), selection.values[(..., *item)].tolist(), strict=True)
        # below, normal equations lose the digits, the oracle's own too
        least = 1e-3 * float(torch.linalg.matrix_norm(self.M, 2))
        values = [(damp, value, self.value(rule, damp)) for damp, value in curve if damp > least]
        got, want = (torch.tensor([v[k] for v in values], dtype=DOUBLE) for k in (1, 2))
        if rule == "lcurve":  # differences of log norms resolve no more
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)
        elif rule == "evidence":  # a constant is free
            torch.testing.assert_close(got - got[0], want - want[0], rtol=rtol, atol=1e-6)
        else:
            torch.testing.assert_close(got, want, rtol=rtol, atol=1e-12 * float(want.max()))
        if rule == "discrepancy":
            assert self.value(rule, chosen) == pytest.approx(self.m * NOISE**2, rel=1e-2)
            return
        sign = -1 if rule == "lcurve" else 1
        around = [sign * self.value(rule, chosen * 10**k) for k in (-0.3, 0.0, 0.3)]
        assert around[1] <= min(around) + 1e-9 * abs(around[1])
        if rule != "lcurve":  # its other local maxima, at the ends, are no corners
            scan = [self.value(rule, float(d)) for d in torch.logspace(-2.9, 0.5, 18)]
            assert around[1] <= min(scan) + 1e-3 * abs(min(scan))


def problem(
    padding: int = 0, mode: str = "zeros", dtype: torch.dtype = DOUBLE, batch: tuple[int, ...] = (), n: int = 14
) -> tuple[lsconv.Conv2d, Tensor]:
    """A blur of smoothed noise, and its data."""
    g = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], dtype=DOUBLE)
    weight = (g[:, None] * g / g.sum() ** 2).to(dtype).reshape(1, 1, 5, 5)
    A = lsconv.Conv2d(weight, in_size=(n, n), padding=padding, padding_mode=mode)
    x = torch.randn(*batch, 1, n, n, dtype=dtype)
    x = x + torch.roll(x, 1, -1) + torch.roll(x, 1, -2) + torch.roll(x, (1, 1), (-1, -2))
    y = A(x)
    return A, y + NOISE * torch.randn_like(y)


def noise_of(rule: str) -> float | None:
    return NOISE if rule in ("discrepancy", "upre") else None


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        *(("valid", rule) for rule in RULES),
        *((kind, rule) for kind in ("same", "full", "circular") for rule in ("gcv", "evidence")),
    ],
)
def test_exact_curves_and_choices_are_those_of_dense_algebra(kind: str, rule: str) -> None:
    padding = {"valid": 0, "same": 2, "full": 4, "circular": 2}[kind]
    A, y = problem(padding, "circular" if kind == "circular" else "zeros")
    Dense(A, y).check(choose_damp(A, y, rule, noise_std=noise_of(rule)))


@pytest.mark.parametrize("rule", RULES)
def test_a_circular_penalty_is_exact_too(rule: str) -> None:
    A, y = problem(2, "circular", n=10)
    L = lsconv.Gradient((1, 10, 10), boundary="periodic", dtype=DOUBLE)
    Dense(A, y, L).check(choose_damp(A, y, rule, L=L, noise_std=noise_of(rule)), rtol=1e-6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["reflect", "wide", "tall", "zeros"])
def test_a_small_problem_of_any_kind_is_exact(rule: str, kind: str) -> None:
    """Other paddings, matrices, penalties that with A leave something free: one decomposition serves all damps."""
    if kind in ("reflect", "zeros"):
        A: LinearOperator
        A, y = problem(2 if kind == "reflect" else 0, kind, n=10)
        L: LinearOperator = lsconv.Laplacian((1, 10, 10), dtype=DOUBLE)
    else:
        A = lsconv.Dense(torch.randn(*((30, 40) if kind == "wide" else (60, 40)), dtype=DOUBLE))
        y = A(torch.randn(40, dtype=DOUBLE)) + NOISE * torch.randn(A.out_shape, dtype=DOUBLE)
        L = lsconv.Dense(torch.eye(40, dtype=DOUBLE).diff(dim=0))
    selection = choose_damp(A, y, rule, L=L, noise_std=noise_of(rule), trace="exact")
    if rule != "lcurve" or kind in ("reflect", "zeros"):  # the matrices' curves have no corner
        Dense(A, y, L).check(selection, rtol=1e-6)


def test_complex_data_and_strides_are_served_exactly() -> None:
    A = lsconv.Conv1d(torch.randn(2, 1, 4, dtype=torch.complex128), in_size=40, stride=2)
    y = A(torch.randn(1, 40, dtype=torch.complex128))
    y = y + torch.randn_like(y)
    Dense(A, y).check(choose_damp(A, y, "gcv"))


@pytest.mark.parametrize("rule", RULES)
def test_items_of_a_batch_are_chosen_as_if_alone(rule: str) -> None:
    A, y = problem(batch=(2,))
    y = y * torch.tensor([1.0, 3.0], dtype=DOUBLE).reshape(2, 1, 1, 1)
    noise = None if noise_of(rule) is None else NOISE * torch.tensor([1.0, 3.0], dtype=DOUBLE)
    together = choose_damp(A, y, rule, noise_std=noise)
    for k in range(2):
        alone = choose_damp(A, y[k], rule, noise_std=None if noise is None else noise[k])
        torch.testing.assert_close(together.damp[k], alone.damp, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_scaling_data_and_operator_scales_the_choice(rule: str) -> None:
    A, y = problem()
    first = choose_damp(A, y, rule, noise_std=noise_of(rule))
    small = lsconv.Conv2d(A.weight * 1e-6, in_size=A.spatial_in)
    noise = None if noise_of(rule) is None else NOISE * 1e6
    second = choose_damp(small, y * 1e6, rule, noise_std=noise)
    torch.testing.assert_close(second.damp, first.damp * 1e-6, rtol=1e-6, atol=0)
    torch.testing.assert_close(second.damps, first.damps * 1e-6, rtol=1e-6, atol=0)
    if rule in ("gcv", "upre", "discrepancy"):
        resolved = first.damps > 1e-3
        torch.testing.assert_close(second.values[resolved], first.values[resolved] * 1e12, rtol=1e-6, atol=0)


def test_zero_data_leave_their_neighbours_alone() -> None:
    A, y = problem(batch=(2,))
    alone = choose_damp(A, y[1], "gcv").damp
    y[0] = 0
    selection = choose_damp(A, y, "gcv")
    torch.testing.assert_close(selection.damp[1], alone, rtol=1e-6, atol=0)
    assert bool(torch.isfinite(selection.damp).all())
    assert "1 item(s) are zero" in selection.message


def test_data_that_are_not_finite_leave_their_neighbours_alone() -> None:
    A, y = problem(batch=(2,))
    alone = choose_damp(A, y[1], "gcv").damp
    y[0, 0, 0, 0] = torch.nan
    selection = choose_damp(A, y, "gcv")
    assert bool(torch.isfinite(selection.damp).all())
    torch.testing.assert_close(selection.damp[1], alone, rtol=1e-6, atol=0)


def test_data_that_are_all_noise_get_the_largest_damp_of_the_discrepancy_principle() -> None:
    A, _ = problem()
    y = NOISE * torch.randn(A.out_shape, dtype=DOUBLE)
    selection = choose_damp(A, y, "discrepancy", noise_std=2 * NOISE)
    assert "noise_std explains all of y" in selection.message
    assert float(selection.damp) == pytest.approx(float(selection.damps.max()))
    assert float(choose_damp(A, y, "upre", noise_std=NOISE).damp) > 0.5


def test_data_without_noise_get_next_to_no_damp() -> None:
    A, _ = problem(4)
    y = A(torch.randn(A.in_shape, dtype=DOUBLE))
    selection = choose_damp(A, y, "gcv")
    assert "smallest damp" in selection.message
    assert float(Dense(A, y).parts(float(selection.damp))[0]) < 1e-8 * float(y.square().sum())


# ---------------------------------------------------------------------- stochastic paths


@pytest.mark.parametrize("kind", ["valid", "same", "full", "tall"])
def test_border_path_agrees_with_dense_algebra_within_its_error(kind: str) -> None:
    if kind == "tall":
        A = lsconv.Conv2d(torch.randn(2, 1, 3, 3, dtype=DOUBLE), in_size=(14, 14))
        y = torch.randn(A.out_shape, dtype=DOUBLE)
    else:
        A, y = problem({"valid": 0, "same": 2, "full": 4}[kind])
    path, dense = BorderPath(A, y.unsqueeze(0), torch.tensor(1.0), tolerance=1e-3), Dense(A, y)
    for damp in (0.01, 0.1, 1.0):
        e = path.evaluate(torch.tensor(damp, dtype=DOUBLE), slope=True)
        rss, penalty, trace, _, _ = dense.parts(damp)
        torch.testing.assert_close(e.residual_norm_sq, rss, rtol=1e-3, atol=0)
        torch.testing.assert_close(e.penalty_norm_sq, penalty, rtol=1e-3, atol=0)
        assert abs(float(e.trace - trace)) < 4 * float(e.trace_error) + 1e-3 * dense.m
        step = 1e-4
        more, less = (dense.parts(damp * math.sqrt(1 + s))[1] for s in (step, -step))
        torch.testing.assert_close(e.penalty_slope, (more - less) / (2 * step * damp**2), rtol=1e-2, atol=0)


@pytest.mark.parametrize("kind", ["valid", "same", "full"])
@pytest.mark.parametrize("boundary", ["neumann", "dirichlet"])
def test_border_path_with_a_penalty_agrees_with_dense_algebra(kind: str, boundary: str) -> None:
    A, y = problem({"valid": 0, "same": 2, "full": 4}[kind], n=12)
    L = lsconv.Gradient(A.in_shape, boundary=boundary, dtype=DOUBLE)
    path, dense = BorderPath(A, y.unsqueeze(0), torch.tensor(1.0), L), Dense(A, y, L)
    for damp in (0.03, 0.3):
        e = path.evaluate(torch.tensor(damp, dtype=DOUBLE), slope=True)
        rss, penalty, trace, _, _ = dense.parts(damp)
        torch.testing.assert_close(e.residual_norm_sq, rss, rtol=1e-3, atol=0)
        torch.testing.assert_close(e.penalty_norm_sq, penalty, rtol=1e-3, atol=0)
        assert abs(float(e.trace - trace)) < 4 * float(e.trace_error) + 1e-3 * dense.m
        more, less = (dense.parts(damp * math.sqrt(1 + s))[1] for s in (1e-4, -1e-4))
        torch.testing.assert_close(e.penalty_slope, (more - less) / (2e-4 * damp**2), rtol=1e-2, atol=0)


def test_one_probe_states_an_error_that_holds() -> None:
    A, y = problem()
    path, dense = BorderPath(A, y.unsqueeze(0), torch.tensor(1.0), probes=1), Dense(A, y)
    for damp in (0.01, 0.1, 1.0):
        e = path.evaluate(torch.tensor(damp, dtype=DOUBLE))
        assert abs(float(e.trace - dense.parts(damp)[2])) < 4 * float(e.trace_error)
        assert 0 < float(e.trace_error) < math.sqrt(2 * dense.m)


@pytest.mark.parametrize("rule", RULES)
def test_stochastic_choices_are_near_the_exact_ones(rule: str) -> None:
    A, y = problem(batch=(2,))
    exact = choose_damp(A, y, rule, noise_std=noise_of(rule)).damp
    selection = choose_damp(A, y, rule, noise_std=noise_of(rule), trace="stochastic")
    torch.testing.assert_close(selection.damp, exact, rtol=0.15, atol=0)
    assert selection.trace_error.shape == selection.damps.shape
    assert bool((selection.trace_error > 0).all()) == (rule in ("gcv", "upre", "evidence"))


@pytest.mark.parametrize("penalty", [False, True])
def test_any_operator_is_served_by_its_solver(penalty: bool) -> None:
    A = lsconv.Conv2d(torch.rand(1, 1, 3, 3, dtype=DOUBLE), in_size=(9, 9), padding=1, padding_mode="reflect")
    y = A(torch.randn(A.in_shape, dtype=DOUBLE)) + NOISE * torch.randn(A.out_shape, dtype=DOUBLE)
    L = lsconv.Gradient((1, 9, 9), dtype=DOUBLE) if penalty else None
    path, dense = SolverPath(A, y.unsqueeze(0), L, torch.tensor(1.0)), Dense(A, y, L)
    e = path.evaluate(torch.tensor(0.1, dtype=DOUBLE), slope=True)
    rss, norm, trace, _, _ = dense.parts(0.1)
    torch.testing.assert_close(e.residual_norm_sq, rss, rtol=1e-3, atol=0)
    torch.testing.assert_close(e.penalty_norm_sq, norm, rtol=1e-3, atol=0)
    assert abs(float(e.trace - trace)) < 4 * float(e.trace_error) + 1e-3 * dense.m


def test_a_prior_is_taken_out_of_the_data() -> None:
    A, y = problem()
    prior = torch.randn(A.in_shape, dtype=DOUBLE)
    shifted = choose_damp(A, y + A(prior), "gcv", x_prior=prior)
    torch.testing.assert_close(shifted.damp, choose_damp(A, y, "gcv").damp, rtol=1e-6, atol=0)


@pytest.mark.parametrize("penalty", [False, True])
def test_loose_solves_give_the_curves_of_precise_ones(penalty: bool) -> None:
    A, y = problem()
    L = lsconv.Gradient(A.in_shape, dtype=DOUBLE) if penalty else None
    loose, precise = (
        BorderPath(A, y.unsqueeze(0), torch.tensor(1.0), L, tolerance=rtol).evaluate(torch.tensor(0.1, dtype=DOUBLE))
        for rtol in (1e-3, 1e-9)
    )
    for name in ("residual_norm_sq", "penalty_norm_sq", "trace", "trace_slope"):
        torch.testing.assert_close(getattr(loose, name), getattr(precise, name), rtol=2e-3, atol=0)


@pytest.mark.parametrize(
    ("penalty", "padding", "damp"),
    [(False, 0, 1e-3), (False, 7, 1e-2), (True, 7, 1e-3), (True, 0, 1e-2), (True, 7, 0.1)],
)
def test_loose_solves_know_the_slope_of_the_criterion_at_every_damp(penalty: bool, padding: int, damp: float) -> None:
    """The residual of a nearly fitted image is the small difference of large numbers."""
    g = torch.exp(-((torch.arange(15.0) - 7) ** 2) / 8)
    A = lsconv.Conv2d((torch.outer(g, g) / g.sum() ** 2)[None, None], (64, 64), padding=padding).to(dtype=DOUBLE)
    y = A((torch.randn(1, 64, 64, dtype=DOUBLE).cumsum(-1) > 0).to(DOUBLE)) + 0.01 * torch.randn(A.out_shape)
    L = lsconv.Gradient(A.in_shape, dtype=DOUBLE) if penalty else None
    criterion, t = Criterion("gcv", None, 0), torch.tensor(damp, dtype=DOUBLE).log()
    loose, precise = (
        criterion.root_function(path.evaluate(t.exp(), slope=True), t, path.data_count)
        for path in (BorderPath(A, y[None], torch.tensor(1.0), L, probes=2, **how) for how in ({}, {"tolerance": 1e-9}))
    )
    torch.testing.assert_close(loose, precise, rtol=0.02, atol=5e-3)


# ---------------------------------------------------------------------- windows


def test_a_window_of_data_is_the_data_of_the_windowed_operator() -> None:
    A = lsconv.Conv2d(torch.randn(2, 1, 3, 4, dtype=DOUBLE), in_size=(50, 40), stride=(2, 1), padding=2)
    x = torch.randn(3, *A.in_shape, dtype=DOUBLE)
    windows = as_windows(A, A(x), None, data=6**2)
    assert windows is not None
    assert windows.y.shape[:2] == (4, 3)
    # every window's data are what the windowed operator makes of some patch of x, which holds nothing but pixels
    found = 0
    height, width = windows.A.spatial_in
    for i in range(50 - height + 1):
        for j in range(40 - width + 1):
            patch = windows.A(x[..., i : i + height, j : j + width])
            found += sum(bool(torch.allclose(patch, w)) for w in windows.y)
    assert found == 4


def test_large_data_searched_on_windows_choose_what_the_whole_chooses() -> None:
    A, y = problem(n=280, dtype=torch.float32)
    whole = choose_damp(A, y, "gcv", trace="stochastic", surrogate=False)
    quick = choose_damp(A, y, "gcv", trace="stochastic")
    assert "on a surrogate" in quick.message
    assert "on a surrogate" not in whole.message
    torch.testing.assert_close(quick.damp, whole.damp, rtol=0.2, atol=0)
    assert quick.damp.dtype == torch.float32


# ---------------------------------------------------------------------- the answer, and bad input


def test_the_selection_draws_its_curves() -> None:
    pytest.importorskip("matplotlib")
    A, y = problem(batch=(2,))
    for rule in RULES:
        ax = choose_damp(A, y, rule, noise_std=noise_of(rule)).plot()
        assert len(ax.lines) == 4
        assert ax.get_xlabel() == "damp"
        assert ax.get_legend() is None
    alone = choose_damp(A, y[0], "gcv")
    ax = alone.plot()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["exact", f"chosen: {float(alone.damp):.3g}"]


@pytest.mark.parametrize("rule", RULES)
def test_where_nothing_was_measured_there_is_no_choice_and_a_word(rule: str) -> None:
    A = lsconv.Conv2d(torch.ones(1, 1, 3, 3) / 9, (10, 10))
    y, measured = torch.randn(3, *A.out_shape), torch.ones(3, *A.out_shape, dtype=torch.bool)
    measured[1] = False
    noise = {"noise_std": NOISE} if rule in ("discrepancy", "upre") else {}
    with pytest.warns(lsconv.InputWarning, match=r"y: 1 of 3 item\(s\) have no measured entry"):
        choose_damp(A, y, rule, observed=measured, **noise)
    with pytest.raises(ArgumentError, match="y: no entry is measured"):
        choose_damp(lsconv.Mask(measured[1]) @ A, y, rule, **noise)
    with pytest.raises(ArgumentError, match="y: no entry"):
        lsconv.tikhonov(A, y[1], rule, observed=measured[1], **noise)


def test_an_argument_that_does_not_fit_is_named() -> None:
    A, y = problem()
    with pytest.raises(ArgumentError, match=r"damp: .*'gcv', 'discrepancy', 'upre', 'lcurve', 'evidence'.*'gvc'"):
        choose_damp(A, y, "gvc")
    with pytest.raises(ArgumentError, match="noise_std: 'upre' needs"):
        choose_damp(A, y, "upre")
    with pytest.raises(ArgumentError, match="noise_std: 'gcv' estimates"):
        choose_damp(A, y, "gcv", noise_std=0.1)
    with pytest.raises(ArgumentError, match="noise_std: expected positive"):
        choose_damp(A, y, "discrepancy", noise_std=-1.0)
    with pytest.raises(ShapeError, match="noise_std: shape"):
        choose_damp(A, y, "discrepancy", noise_std=torch.ones(3))
    with pytest.raises(ArgumentError, match="trace: expected"):
        choose_damp(A, y, trace="some")
    with pytest.raises(ShapeError, match="L: in_shape"):
        choose_damp(A, y, L=lsconv.Identity((3,)))
    with pytest.raises(MethodError, match='trace: "exact" needs'):
        choose_damp(lsconv.Diagonal(torch.ones(5000)), torch.ones(5000), L=lsconv.Identity((5000,)), trace="exact")
    with pytest.raises(PlanMemoryError, match="unknowns per block"):
        choose_damp(lsconv.Conv2d(torch.ones(1, 1, 9, 9), in_size=(300, 300)), torch.ones(1, 292, 292), trace="exact")


@pytest.mark.parametrize("prior", ["gradient", "tikhonov"])
def test_damp_and_restoration_of_single_precision_are_those_of_double(prior: str) -> None:
    rows, columns = (torch.linspace(-1, 1, n, dtype=torch.float64) for n in (474, 440))
    scene = 0.5 + 0.3 * torch.sin(9 * rows[:, None] * columns) + 0.2 * (rows[:, None] ** 2 + columns**2 < 0.4)
    profile = torch.exp(-0.5 * (torch.arange(-7, 8, dtype=torch.float64) / 2.5) ** 2)
    psf = profile[:, None] * profile / profile.sum() ** 2
    clean = lsconv.blur_operator(psf, (460, 426))(scene[None])[0]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    image = (clean + 0.01 * noise).float()

    def psnr(x: torch.Tensor) -> float:
        return -10 * math.log10(float((x - scene[7:-7, 7:-7]).square().mean()))

    quick = lsconv.deconvolve(image, psf.float(), prior=prior)
    precise = lsconv.deconvolve(image.double(), psf, prior=prior)
    torch.testing.assert_close(quick.damp.double(), precise.damp, rtol=2e-3, atol=0)
    assert abs(psnr(quick.x) - psnr(precise.x)) < 0.02  # dB
    assert bool(quick.converged)
    assert bool(precise.converged)
    torch.testing.assert_close(quick.residual_norm.double(), precise.residual_norm.double(), rtol=1e-4, atol=0)
