"""What a Solution tells: status, text, history, certificate."""

from __future__ import annotations

import pytest
import torch

from lsconv.errors import ConvergenceError, ConvergenceWarning
from lsconv.krylov.loop.certificate import Tolerances, default_rtol
from lsconv.krylov.loop.judge import Judge
from lsconv.krylov.loop.solution import Status
from lsconv.krylov.lsqr import lsqr
from lsconv.operators.elementary import Dense

A = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
B = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_fields_have_the_batch_shape() -> None:
    solution = lsqr(A, B)
    fields = (solution.codes, solution.converged, solution.iterations, solution.residual_norm, solution.gradient_norm,
              solution.damp)  # fmt: skip
    assert all(field.shape == (2, 3) for field in fields)
    assert solution.status == [[Status.GRADIENT] * 3] * 2


def test_print_has_a_line_per_item() -> None:
    lines = str(lsqr(A, B)).splitlines()
    assert len(lines) == 2 + 6
    assert lines[2].startswith("(0, 0)  GRADIENT  yes")


def test_print_of_many_items_says_how_many_more() -> None:
    assert str(lsqr(A, B.repeat(3, 1, 1))).endswith("... and 10 more items")


def test_failures_name_cause_and_items() -> None:
    with pytest.warns(ConvergenceWarning):
        solution = lsqr(A, B[0], max_iter=1)
    with pytest.raises(ConvergenceError, match=r"iteration limit .*\(batch item\(s\) 0, 1, 2\)"):
        solution.raise_for_status()


def test_history_ends_where_the_item_stopped() -> None:
    b = torch.stack([B[0, 0], A[:, 0]])
    solution = lsqr(A, b)
    history = solution.history
    assert history is not None
    assert history.residual_norm.shape == (int(solution.iterations.max()) + 1, 2)
    for item in range(2):
        count = int(solution.iterations[item]) + 1
        assert history.residual_norm[:count, item].isfinite().all()
        assert history.residual_norm[count:, item].isnan().all()
    torch.testing.assert_close(history.residual_norm[0], b.norm(dim=-1))
    falling = history.residual_norm[: int(solution.iterations[0]) + 1, 0].diff()
    assert (falling <= 1e-12).all()


def test_operator_norm_is_a_lower_bound() -> None:
    solution = lsqr(A, B, damp=0.3)
    assert solution.history is not None
    bound = (torch.linalg.matrix_norm(A, 2) ** 2 + 0.09).sqrt()
    assert float(solution.history.operator_norm.nan_to_num().max()) <= float(bound) * (1 + 1e-12)


def test_history_is_drawn_without_a_display() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    history = lsqr(A, B[0]).history
    assert history is not None
    axes = history.plot()
    assert len(axes.lines) == 6
    assert axes.get_yscale() == "log"
    matplotlib.pyplot.close("all")


def test_progress_shows_the_residual(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    lsqr(A, B, progress=True)
    assert "residual=" in capsys.readouterr().err


def test_certificate_of_a_foreign_solution() -> None:
    b = B[0]
    tolerances = Tolerances.of(torch.float64, None, 0.0)
    good = Judge(Dense(A), tolerances).solution((torch.linalg.pinv(A) @ b.mT).mT, b)
    assert good.converged.all()
    assert good.status == [Status.GRADIENT] * 3
    wrong = Judge(Dense(A), tolerances).solution(torch.ones(3, 5, dtype=torch.float64), b)
    assert not wrong.converged.any()
    zero = Judge(Dense(A), tolerances).solution(torch.zeros(5, dtype=torch.float64), 0 * b[0])
    assert zero.status is Status.ZERO
    nonfinite = Judge(Dense(A), tolerances).solution(torch.full((5,), torch.nan, dtype=torch.float64), b[0])
    assert nonfinite.status is Status.NON_FINITE


def test_default_tolerance_follows_the_dtype() -> None:
    assert default_rtol(torch.float32) == pytest.approx(6.4e-5, rel=0.01)
    assert default_rtol(torch.complex128) == pytest.approx(1.8e-11, rel=0.02)


def test_every_status_has_its_own_code_and_sentence() -> None:
    assert len({status.code for status in Status}) == len({status.sentence for status in Status}) == len(Status)
    assert all(Status.from_code(status.code) is status for status in Status)
