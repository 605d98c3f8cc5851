"""The steps of the tiled iteration: conjugate directions, the gradient carried along, and every step the best one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import lsconv
from lsconv.krylov.loop.certificate import Tolerances
from lsconv.tiled.field import Field
from lsconv.tiled.iteration import Directions, Iteration
from lsconv.tiled.storage import Storage
from tests.tiled.problems import F64, error, exact, problem

DAMP = 0.1


def steps(count: int) -> tuple[Any, Tensor, Tensor, Directions, Field, Field]:
    """So many steps from zero, with tiles that hardly overlap; matrix and right-hand side of the normal equations."""
    A, y = problem("box", "valid", (24, 25))
    plan = lsconv.tiled.Plan(A, damp=DAMP, tile=12, overlap=2)
    storage = Storage(None, "", A.in_shape, F64, size=A.spatial_in, channels=True, wraps=(False, False), first=0,
                      device=A.device)  # fmt: skip
    g, x = storage.vector("g"), storage.vector("x")
    every = {"channels": True, "wraps": (False, False), "first": 0, "device": A.device}
    plan.passes.gradient(x, Field(y.clone(), A.spatial_out, **every), None, g)
    directions = Directions(plan.passes, storage, None)
    for number in range(count):
        to = storage.vector(f"x-{number % 2}")
        directions.step(x, to, g)
        x = to
    D = A.to_dense()
    return A, D.mT @ D + DAMP**2 * torch.eye(A.in_numel, dtype=F64), D.mT @ y.flatten(), directions, x, g


def values(field: Field) -> Tensor:
    return field.read((0, 0), field.size, F64).flatten()


def test_the_gradient_that_is_carried_along_is_that_of_x() -> None:
    _, H, b, _, x, g = steps(4)
    torch.testing.assert_close(values(g), b - H @ values(x), rtol=1e-9, atol=1e-10)


def test_directions_are_conjugate_and_their_images_are_those_of_the_normal_operator() -> None:
    _, H, _, directions, _, g = steps(4)
    P = torch.stack([values(p) for p, _, _ in directions.previous])
    W = torch.stack([values(w) for _, w, _ in directions.previous])
    energies = torch.tensor([energy for *_, energy in directions.previous], dtype=F64)
    torch.testing.assert_close(W, P @ H, rtol=1e-9, atol=1e-12)
    scaled = P @ H @ P.mT / (energies[:, None] * energies).sqrt()
    torch.testing.assert_close(scaled, torch.eye(len(P), dtype=F64), rtol=0, atol=1e-8)
    # no step along a direction that is kept is left to be taken
    torch.testing.assert_close(P @ values(g) / energies.sqrt(), torch.zeros(len(P), dtype=F64), rtol=0, atol=1e-9)


def test_no_more_directions_are_kept_than_said_and_every_step_lowers_the_error() -> None:
    errors = []
    for count in (1, 3, 6):
        _, H, b, directions, x, _ = steps(count)
        assert len(directions.previous) == min(count, directions.max_directions)
        off = values(x) - torch.linalg.solve(H, b)
        errors.append(float(off @ H @ off))
    assert errors[0] > errors[1] > errors[2] > 0


def test_the_iteration_ends_at_the_dense_answer_or_says_that_it_has_not() -> None:
    A, y = problem("box", "valid", (24, 25))
    plan = lsconv.tiled.Plan(A, damp=DAMP, tile=12, overlap=2)
    storage = Storage(None, "", A.in_shape, F64, size=A.spatial_in, channels=True, wraps=(False, False), first=0,
                      device=A.device)  # fmt: skip
    data = Field(y.clone(), A.spatial_out, channels=True, wraps=(False, False), first=0, device=A.device)
    tolerances = Tolerances.of(F64, 1e-8, 0.0)
    iteration = Iteration(
        plan.passes, storage, data, None, plan._judge(tolerances), rtol=tolerances.rtol, first_pass_error=1.0
    )
    early = iteration.run(1)
    assert early.status is lsconv.Status.ITERATION_LIMIT
    certificate = iteration.run(200)
    assert certificate.holds
    assert error(values(iteration.x), exact(A, y, DAMP).flatten()) < 1e-8
