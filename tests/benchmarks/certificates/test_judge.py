"""The judge accepts what a dense decomposition gives, in either precision, and every planted fault is found."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

RNG = np.random.default_rng(0)
VALUES = np.array([3.0, 2.0, 1.0, 0.5, 1e-2, 1e-3])  # the last stands for what a cut at 1e-3 or above takes away
TOL = 1e-10


@pytest.fixture(autouse=True)
def _same_numbers_in_every_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "RNG", np.random.default_rng(0))


def _orthogonal(n: int, is_complex: bool) -> Any:
    numbers = RNG.standard_normal((n, n)) + 1j * is_complex * RNG.standard_normal((n, n))
    return np.linalg.qr(numbers if is_complex else numbers.real)[0]


def _matrix(rows: int, columns: int, *, is_complex: bool = False, values: Any = VALUES) -> Any:
    U, V = _orthogonal(rows, is_complex), _orthogonal(columns, is_complex)
    return (U[:, : len(values)] * values) @ V[:, : len(values)].conj().T


def _answers(A: Any, y: Any, rank: int = 6, damp: float = 0.0) -> Any:
    U, s, Vh = np.linalg.svd(A)
    c = (y @ U.conj())[:, :rank] * (s[:rank] / (s[:rank] ** 2 + damp**2))
    return c @ Vh[:rank].conj()


def _numbers(*shape: int, is_complex: bool = False) -> Any:
    return RNG.standard_normal(shape) + (1j * RNG.standard_normal(shape) if is_complex else 0.0)


def _null_vector(A: Any) -> Any:
    return np.linalg.svd(A)[2][-1].conj()


SHAPES = {"tall": (12, 6), "wide": (6, 12), "square": (9, 9)}


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("damp", [0.0, 1e-4, 0.1])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_dense_answer_is_right_and_known_to_be_well_posed(shape: str, damp: float, is_complex: bool) -> None:
    from benchmarks.certificates.judge import Dense

    A = _matrix(*SHAPES[shape], is_complex=is_complex)
    y = _numbers(8, SHAPES[shape][0], is_complex=is_complex)
    judged = Dense(A).judge(_answers(A, y, damp=damp), y, tol=TOL, bits=64, damp=damp)
    assert judged.right.all()
    assert judged.well_posed.all()
    assert (judged.merit < 1e-3).all()
    assert (judged.rank == 6).all()


def test_an_answer_rounded_to_float32_is_right_for_float32_and_wrong_for_float64() -> None:
    from benchmarks.certificates.judge import Dense

    A, y = _matrix(9, 9), _numbers(8, 9)
    x = _answers(A, y).astype(np.float32).astype(float)
    assert Dense(A).judge(x, y, tol=1e-6, bits=32).right.all()
    assert not Dense(A).judge(x, y, tol=1e-12, bits=64).right.any()


@pytest.mark.parametrize("damp", [0.0, 1e-4, 0.1])
@pytest.mark.parametrize("shape", ["wide", "square"])
def test_a_null_space_part_is_wrong_however_well_the_data_fit(shape: str, damp: float) -> None:
    from benchmarks.certificates.judge import Dense

    A, y = _matrix(*SHAPES[shape]), _numbers(8, SHAPES[shape][0])
    x = _answers(A, y, damp=damp)
    x = x + 1e-4 * np.linalg.norm(x, axis=1, keepdims=True) * _null_vector(A)
    judged = Dense(A).judge(x, y, tol=TOL, bits=64, damp=damp)
    assert not judged.right.any()
    assert judged.why == ["a part outside the row space"] * 8
    assert Dense(A).judge(x, y, tol=TOL, bits=64, damp=0.0, minimum_norm=False).right.all() == (damp == 0)


def test_an_x_of_which_only_the_size_passes_is_wrong() -> None:
    from benchmarks.certificates.judge import Dense

    A = _matrix(9, 9, values=np.array([3.0, 2.0, 1.0, 0.5, 1e-2, 1e-3, 3e-8]))
    y = _numbers(8, 9)
    direction = np.linalg.svd(A)[2][6]
    for length in (1e10, 1e14):  # the gradient is 1e-15 ||A||^2 ||x|| only
        x = _answers(A, y) + length * direction
        assert not Dense(A).judge(x, y, tol=1e-6, bits=32).right.any()


def test_between_two_plausible_ranks_either_is_right_and_a_mixture_is_not() -> None:
    from benchmarks.certificates.judge import Dense

    A = _matrix(9, 9, values=np.array([3.0, 2.0, 1.0, 0.5, 1e-2, 1e-3, 3e-9]))
    y = _numbers(8, 9)
    low, high = _answers(A, y, 6), _answers(A, y, 7)
    judged = [Dense(A).judge(x, y, tol=1e-14, bits=64) for x in (low, high, 0.5 * low + 0.5 * high)]
    assert judged[0].right.all()
    assert judged[1].right.all()
    assert not judged[2].right.any()
    assert not judged[0].well_posed.any()


@pytest.mark.parametrize(("rcond", "rank"), [(0.1, 4), (2e-3, 5), (1e-4, 6)])
def test_a_promised_threshold_leaves_one_rank(rcond: float, rank: int) -> None:
    from benchmarks.certificates.judge import Dense

    A, y = _matrix(9, 9), _numbers(8, 9)
    for given in (4, 5, 6):
        judged = Dense(A).judge(_answers(A, y, given), y, tol=TOL, bits=64, rcond=rcond)
        assert judged.right.all() == (given == rank)
        assert (judged.ranks == rank).all()


def test_a_singular_value_on_the_threshold_leaves_two_ranks() -> None:
    from benchmarks.certificates.judge import Dense

    A, y = _matrix(9, 9), _numbers(8, 9)
    s = np.linalg.svd(A)[1]
    for given in (4, 5, 6):
        judged = Dense(A).judge(_answers(A, y, given), y, tol=TOL, bits=64, rcond=s[4] / s[0])
        assert judged.right.all() == (given != 6)
        assert not judged.well_posed.any()


def test_a_wrong_cut_is_wrong_where_no_threshold_explains_it() -> None:
    from benchmarks.certificates.judge import Dense

    A, y = _matrix(9, 9), _numbers(8, 9)
    for rank in (1, 3, 5):
        assert not Dense(A).judge(_answers(A, y, rank), y, tol=TOL, bits=64).right.any()


def test_the_answer_of_another_damping_is_wrong() -> None:
    from benchmarks.certificates.judge import Dense

    A, y = _matrix(12, 6), _numbers(8, 12)
    damp = np.array([0.0, 1e-2, 0.1, 1.0] * 2)
    for given in damp[:4]:
        judged = Dense(A).judge(_answers(A, y, damp=float(given)), y, tol=TOL, bits=64, damp=damp)
        assert (judged.right == (damp == given)).all()


def test_zero_data_have_the_answer_zero_only() -> None:
    from benchmarks.certificates.judge import Dense

    A, y = _matrix(9, 9), np.zeros((2, 9))
    x = np.stack([np.zeros(9), 1e-12 * _null_vector(A)])
    assert Dense(A).judge(x, y, tol=TOL, bits=64).right.tolist() == [True, False]


def test_items_with_matrices_of_their_own_are_judged_as_each_alone() -> None:
    from benchmarks.certificates.judge import Dense

    matrices = np.stack([_matrix(9, 9), _matrix(9, 9, values=VALUES[:3]), np.zeros((9, 9))])
    y = _numbers(3, 9)
    x = np.concatenate([_answers(matrices[0], y[:1]), _answers(matrices[1], y[1:2], 3), np.ones((1, 9))])
    x[0] += 1e-4
    together = Dense(matrices).judge(x, y, tol=TOL, bits=64)
    assert together.right.tolist() == [False, True, False]
    for item in range(3):
        one = slice(item, item + 1)
        alone = Dense(matrices[item]).judge(x[one], y[one], tol=TOL, bits=64)
        assert alone.merit[0] == pytest.approx(together.merit[item])
        assert alone.well_posed[0] == together.well_posed[item]
