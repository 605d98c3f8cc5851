"""Problems are functions of their seed alone, and reach every corner of the signature."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import torch

import lsconv


def test_a_problem_is_a_function_of_its_seed_alone() -> None:
    from benchmarks.certificates.problems import draw

    first = [draw(seed) for seed in (3, 4, 5)]
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002 - what another test may have done
    random.seed(7)
    for seed, before in zip((5, 4, 3), reversed(first), strict=True):
        again = draw(seed)
        assert before is not None
        assert again is not None
        assert str(again) == str(before)
        assert torch.equal(again.y.nan_to_num(), before.y.nan_to_num())
        assert np.array_equal(again.dense.matrices, before.dense.matrices)
        assert torch.equal(torch.as_tensor(again.damp), torch.as_tensor(before.damp))
    assert len({str(problem) for problem in first}) == 3


def test_the_dense_matrices_are_those_of_the_operator() -> None:
    from benchmarks.certificates.problems import draw

    for problem in filter(None, map(draw, range(40))):
        generator = torch.Generator().manual_seed(problem.seed)
        x = torch.randn(len(problem.items), *problem.A.in_shape, generator=generator, dtype=torch.float64)
        expected = (problem.dense.matrices @ x.flatten(1).numpy()[..., None])[..., 0]
        y = problem.A(x.to(problem.A.dtype)).flatten(1).numpy()
        tolerance = 100 * torch.finfo(problem.A.dtype).eps * problem.dense.norm.max() * float(x.norm())
        assert np.abs(y - expected).max(initial=0) <= tolerance, str(problem)


def test_the_draws_reach_every_corner_of_the_signature() -> None:
    from benchmarks.certificates import problems

    seen: Counter[str] = Counter()
    for problem in filter(None, map(problems.draw, range(160))):
        damps = torch.as_tensor(problem.damp)
        seen.update(problem.kinds[:1])
        seen.update(problem.items)
        seen[str(problem.A.dtype)] += 1
        seen["own kernels"] += problem.own
        seen["masked"] += problem.masked
        seen["damp per item, some zero"] += bool((damps == 0).any() and (damps > 0).any())
        A = problem.A
        if not isinstance(A, lsconv.Convolution):
            continue
        square = A.spatial_in == A.spatial_out and A.padding_mode == "zeros"
        seen[A.padding_mode] += 1
        seen[f"{A.ndim}-D"] += 1
        seen["grouped"] += A.groups > 1
        seen["strided"] += max(A.stride) > 1
        seen["dilated"] += max(A.dilation) > 1
        seen["kernel as large as the image"] += A.kernel_size == A.spatial_in
        seen["one tap"] += max(A.kernel_size) == 1
        seen["one-sided"] += any(0 in pair and max(pair) > 0 for pair in A.padding)
        seen["square, padded unequally"] += square and any(abs(left - right) > 1 for left, right in A.padding)
        seen["wider than the kernel"] += any(
            max(pair) >= extent for pair, extent in zip(A.padding, A.kernel_extent, strict=True)
        )
        null = (problem.dense.s < 1e-14 * problem.dense.norm[:, None]).sum(-1)
        seen["several null directions of a square matrix"] += square and bool((null > 1).any())
    corners = [*problems.KINDS, "torch.float32", "torch.float64", "torch.complex64", "torch.complex128", "own kernels",
               "masked", "damp per item, some zero", "zeros", "circular", "reflect", "replicate", "1-D", "2-D", "3-D",
               "grouped", "strided", "dilated", "kernel as large as the image", "one tap", "one-sided",
               "square, padded unequally", "wider than the kernel",
               "several null directions of a square matrix"]  # fmt: skip
    assert not [corner for corner in corners if not seen[corner]]
