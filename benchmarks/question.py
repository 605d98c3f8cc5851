"""The question that began it: is the right answer as fast as the circular pseudo-inverse, which is not the answer?

Without padding the problem is solved to a residual of 1e-6 in float32 and 1e-10 in float64, and the best Krylov method
of another package has twelve times as long. With padding=1, as first asked, a random kernel leaves a square matrix with
singular values that fall exponentially with the size: there the Krylov methods have twelve times lsconv's seconds.
With circular padding the circular pseudo-inverse is the answer, and lsconv's the same one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import lsconv
from benchmarks import peers
from benchmarks.runner import Answer, Arrival, Table, race, reach, timed
from lsconv.border.plan import BorderPlan

BATCH = 8
TARGET = {torch.float32: 1e-6, torch.float64: 1e-10}
KRYLOV = {name: peers.FOREIGN[name] for name in ("scipy lsqr", "scipy lsmr", "pylops cgls")}
_LEAD = 12
LIMIT = ", limit"


def circular_pinv(weight: Tensor, y: Tensor, size: int, *, padding: int = 0, half: bool = False) -> Tensor:
    """The pseudo-inverse of the circular convolution, one ``pinv`` per frequency, applied to the zero-extended y.

    All frequencies, or the half that real tensors need.
    """
    kernel = weight.new_zeros(*weight.shape[:2], size, size)
    kernel[..., : weight.shape[-2], : weight.shape[-1]] = weight
    kernel = kernel.roll((-padding, -padding), (-2, -1))
    extended = torch.nn.functional.pad(y, (0, size - y.shape[-1], 0, size - y.shape[-2]))
    transform = torch.fft.rfft2 if half else torch.fft.fft2
    inverse = torch.linalg.pinv(transform(kernel).conj().permute(2, 3, 0, 1))
    spectrum = (inverse @ transform(extended).permute(1, 2, 0).unsqueeze(-1)).squeeze(-1).permute(2, 0, 1)
    return torch.fft.irfft2(spectrum, s=(size, size)) if half else torch.fft.ifft2(spectrum).real


def residual(A: lsconv.Convolution, y: Tensor, x: Tensor) -> float:
    """``||A x - y|| / ||y||`` in float64."""
    y = y.double()
    return float((A.to(dtype=torch.float64).apply(x.double()) - y).norm() / y.norm())


# ------------------------------------------------------------------ without padding


def best_peer(A: lsconv.Convolution, y: Tensor, target: float, seconds: float) -> tuple[str, Arrival]:
    """The Krylov method that is ahead after a tenth of the time, with what it does in all of it."""
    error = functools.partial(residual, A, y)

    def go(peer: peers.Peer, most: float) -> Arrival:
        return reach(functools.partial(peer, A, y, 0.0), error, target, seconds=most)

    heats = {name: go(peer, seconds / 10) for name, peer in KRYLOV.items()}
    best = min(heats, key=lambda name: (not heats[name].arrived, heats[name].seconds if heats[name].arrived
                                        else heats[name].error))  # fmt: skip
    return best, heats[best] if heats[best].arrived else go(KRYLOV[best], seconds)


def without_padding(channels: int, size: int, dtype: torch.dtype, repeats: int, most: float) -> list[dict[str, Any]]:
    """One row a contestant."""
    weight = torch.randn(channels, channels, 3, 3).to(dtype)
    A = lsconv.Conv2d(weight, in_size=(size, size))
    many = torch.stack([A.apply(torch.randn(A.in_shape).to(dtype)) for _ in range(BATCH)])
    y, plan, batch = many[0], BorderPlan(A), f"lsconv solve, batch of {BATCH}, per item"
    contestants: dict[str, Callable[[], Tensor]] = {
        "circular pinv, fft2": lambda: circular_pinv(weight, y, size),
        "circular pinv, rfft2": lambda: circular_pinv(weight, y, size, half=True),
        "lsconv setup + solve": lambda: BorderPlan(A).solve(y).x,
        "lsconv solve, plan kept": lambda: plan.solve(y).x,
        batch: lambda: plan.solve(many).x,
    }
    raced = race(contestants, repeats=repeats, patience=8.0)
    seconds = {name: timing.median / (BATCH if name == batch else 1) for name, timing in raced.items()}
    answers = {name: timing.result for name, timing in raced.items() if name != batch}
    ours = seconds["lsconv setup + solve"]
    peer, arrival = best_peer(A, y, TARGET[dtype], min(most, _LEAD * ours))
    name = f"{peer}, {arrival.answer.iterations} its" + ("" if arrival.arrived else LIMIT)
    seconds[name], answers[name] = arrival.seconds, arrival.answer.x
    null, difference = minimum_norm(A, y, answers)
    return [
        {
            "method": name,
            "seconds": taken,
            "/ circular fft2": taken / seconds["circular pinv, fft2"],
            "/ circular rfft2": taken / seconds["circular pinv, rfft2"],
            "/ lsconv": f"{'> ' if name.endswith(LIMIT) else ''}{taken / ours:.2g}",
            "residual": residual(A, many, raced[batch].result) if name == batch else residual(A, y, answers[name]),
            "null-space part": null.get(name),
            "difference": difference.get(name),
        }
        for name, taken in seconds.items()
    ]


def minimum_norm(A: lsconv.Convolution, y: Tensor, answers: dict[str, Tensor]) -> tuple[dict[str, float], ...]:
    """The part of every x in the null space of A, and its distance from the minimum-norm solution, both by float64."""
    precise = A.to(dtype=torch.float64)
    x = torch.stack([answer.double() for answer in answers.values()])
    # what the minimum-norm solve of A x leaves of x lies in the null space
    solved = BorderPlan(precise).solve(torch.cat([precise.apply(x), y.double()[None]])).x
    seen, exact = solved[:-1], solved[-1]
    norms = [torch.linalg.vector_norm(v, dim=(1, 2, 3)) for v in (x - seen, x, x - exact)]
    null, difference = norms[0] / norms[1], norms[2] / exact.norm()
    return tuple(dict(zip(answers, values.tolist(), strict=True)) for values in (null, difference))


# ------------------------------------------------------------------ with padding 1

# A Krylov method may take this many times the seconds of lsconv's setup and solve.
_PATIENCE = 12
_PADDED_TARGET = 1e-6
_PADDED = ("scipy lsqr", "scipy lsmr")


def own_lsmr(A: lsconv.Convolution, y: Tensor, damp: float, tolerance: float, max_iter: int | None) -> Answer:
    """``lsconv.lsmr``."""
    solution = lsconv.lsmr(A, y, damp=damp, rtol=tolerance, max_iter=max_iter)
    return Answer(solution.x, int(solution.iterations))


def with_padding(channels: int, size: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """One row a method: the circular recipe, lsconv as called, and Krylov methods with a multiple of its seconds."""
    weight = torch.randn(channels, channels, 3, 3).to(dtype)
    A = lsconv.Conv2d(weight, in_size=(size, size), padding=1)
    x = torch.randn(A.in_shape).to(dtype)
    y = A.apply(x)
    taken: dict[str, float] = {}
    answers: dict[str, Tensor] = {}
    for half in (False, True):
        name = f"circular pinv, {'rfft2' if half else 'fft2'}"
        recipe = functools.partial(circular_pinv, weight, y, size, padding=1, half=half)
        taken[name], answers[name] = timed(recipe)
    own, kept = "lsconv.lstsq, setup included", "lsconv.pinv, plan kept"
    taken[own], solution = timed(lambda: lsconv.lstsq(A, y))
    answers[own] = solution.x
    nullity = str(int(solution.nullity)) if solution.nullity is not None else "-"
    del solution
    taken[kept], answers[kept] = timed(functools.partial(lsconv.pinv(A), y))
    methods: dict[str, peers.Peer] = {"lsconv lsmr": own_lsmr, **{name: KRYLOV[name] for name in _PADDED}}
    for method, solve in methods.items():
        error = functools.partial(residual, A, y)
        run = functools.partial(solve, A, y, 0.0)
        arrival = reach(run, error, _PADDED_TARGET, seconds=_PATIENCE * taken[own])
        name = f"{method}, {arrival.answer.iterations} its" + ("" if arrival.arrived else LIMIT)
        taken[name], answers[name] = arrival.seconds, arrival.answer.x
    return [
        {
            "method": name,
            "seconds": seconds,
            "/ lsconv": f"{'> ' if name.endswith(LIMIT) else ''}{seconds / taken[own]:.2g}",
            "residual": residual(A, y, answers[name]),
            "error of x": float((answers[name].double() - x.double()).norm() / x.double().norm()),
            "singular values taken for 0": nullity if name == own else None,
        }
        for name, seconds in taken.items()
    ]


# ------------------------------------------------------------------ with circular padding


def circular(channels: int, size: int, dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    """One row a contestant; none of them iterates."""
    weight = torch.randn(channels, channels, 3, 3).to(dtype)
    A = lsconv.Conv2d(weight, in_size=(size, size), padding=1, padding_mode="circular")
    truth = torch.randn(BATCH, *A.in_shape).to(dtype)
    many = A.apply(truth)
    y, plan, batch = many[0], lsconv.pinv(A), f"lsconv solve, batch of {BATCH}, per item"
    contestants: dict[str, Callable[[], Tensor]] = {
        "circular pinv, fft2": lambda: circular_pinv(weight, y, size, padding=1),
        "circular pinv, rfft2": lambda: circular_pinv(weight, y, size, padding=1, half=True),
        "lsconv.lstsq, setup included": lambda: lsconv.lstsq(A, y).x,
        "lsconv solve, plan kept": lambda: plan.solve(y).x,
        batch: lambda: plan.solve(many).x,
    }
    raced = race(contestants, repeats=repeats, patience=8.0)
    seconds = {name: timing.median / (BATCH if name == batch else 1) for name, timing in raced.items()}
    return [
        {
            "method": name,
            "seconds": taken,
            "/ circular fft2": taken / seconds["circular pinv, fft2"],
            "/ circular rfft2": taken / seconds["circular pinv, rfft2"],
            "residual": residual(A, many if name == batch else y, raced[name].result),
            "error of x": float((x.double() - (known := truth if name == batch else truth[0])).norm() / known.norm()),
        }
        for name, taken in seconds.items()
        for x in [raced[name].result]
    ]


# ------------------------------------------------------------------ the tables


def tables(quick: bool) -> Iterator[Table]:
    """Valid in float32 and float64, circular, then padding=1."""
    channels, size = (4, 24) if quick else (32, 128)
    for dtype in (torch.float32, torch.float64):
        yield Table(
            f"{channels} -> {channels} channels, 3×3, {size}², no padding, {str(dtype)[6:]}, damp 0",
            without_padding(channels, size, dtype, 1 if quick else 3, 1.0 if quick else 45.0),
            "Residual: ‖Ax − y‖ / ‖y‖. Null-space part: what the minimum-norm solve of Ax leaves of x, over ‖x‖. "
            "Difference: the distance from the minimum-norm solution, relative. All by float64, the last two by "
            f"lsconv's. The last row is the best of {', '.join(KRYLOV)} after a tenth of its time; 'limit': it did not "
            f"arrive at {TARGET[dtype]:.0e}.",
        )
    for dtype in (torch.float32, torch.float64):
        yield Table(
            f"{channels} -> {channels} channels, 3×3, {size}², circular padding, {str(dtype)[6:]}, damp 0",
            circular(channels, size, dtype, 1 if quick else 3),
            "Every row is an exact answer. lsconv's rows include a certificate in float64, two products with A.",
        )
    for padded, edge in ((8, 64), (channels, size)) if not quick else ((channels, size),):
        for dtype in (torch.float64, torch.float32):
            yield Table(
                f"{padded} -> {padded} channels, 3×3, {edge}², padding=1, {str(dtype)[6:]}, damp 0",
                with_padding(padded, edge, dtype),
                f"The Krylov methods run until their residual is {_PADDED_TARGET:.0e}, or for {_PATIENCE} times "
                "lsconv's seconds ('limit'). A is square; singular values below 1e-12 ‖A‖ (float32: 1e-7) are zero.",
            )
