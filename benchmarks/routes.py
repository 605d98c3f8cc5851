"""Is the way that auto chooses the right one: its time and memory against the best of all other ways?"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor

import lsconv
from benchmarks.memory import forget_peak, resident
from benchmarks.runner import Table
from lsconv.inverse import route as routes
from lsconv.inverse.plans import lsmr_then_border, small_matrices
from lsconv.operators.dtypes import direct_rtol

T = TypeVar("T")
# What every problem is tried with; "plain" is LSMR without preconditioner.
WAYS = ("matrix", "separable", "normal", "fourier", "border", "plain", "lsmr", "cgls")
# A relative gradient up to which an answer counts: as many times the tolerance that all were given.
SLACK = 30
# Milliseconds and MiB added to both sides of a ratio, below which nothing is worth choosing.
FREE_SECONDS, FREE_MIB = 1e-3, 32
REPEATS = 3
# Processes in turn that the seconds of auto and of the fastest other way are the median of. The way that was fastest of
# all in one process owes some of that to chance, and two processes with the same work differ by up to a half.
ROUNDS = 3
# Solves, of two seconds at most together, after which a plan that is kept has made what it makes.
SETTLING = 12


@dataclass(frozen=True)
class Case:
    """A problem: a kernel, the size of the inputs, and how large the damping is, relative to ``||A||``."""

    name: str
    kernel: Callable[[], Tensor]
    size: tuple[int, ...]
    damp: float = 0.0
    batch: int = 1
    dtype: torch.dtype = torch.float32
    geometry: dict[str, Any] = field(default_factory=dict)
    quick: bool = False

    def problem(self) -> tuple[lsconv.Convolution, Tensor, float]:
        """The operator, data with one per cent of noise, and the damping."""
        torch.manual_seed(0)
        A = lsconv.Convolution(self.kernel().to(self.dtype), self.size, **self.geometry)
        y = self.data(A)
        v = torch.randn(A.in_shape, dtype=self.dtype)
        for _ in range(10):
            v = A.H(A(v / v.norm()))
        return A, y, self.damp * float(v.norm()) ** 0.5

    def data(self, A: lsconv.Convolution) -> Tensor:
        """Other data at every call."""
        y = A(torch.randn(self.batch, *A.in_shape, dtype=self.dtype))
        return y + 0.01 * y.std() * torch.randn_like(y)


def random(*shape: int) -> Callable[[], Tensor]:
    """A layer as it is initialised."""
    return lambda: torch.randn(*shape) / math.sqrt(math.prod(shape[1:]))


def separable(*axes: Tensor, channels: int = 1) -> Callable[[], Tensor]:
    """A blur of norm one, the same for every channel."""

    def kernel() -> Tensor:
        product = torch.ones(())
        for u in axes:
            product = product.unsqueeze(-1) * (u / u.sum())
        return product.expand(channels, 1, *product.shape).contiguous()

    return kernel


def gauss(taps: int, width: float) -> Tensor:
    """One axis of a Gaussian."""
    return torch.exp(-((torch.arange(taps, dtype=torch.float64) - taps // 2) ** 2) / (2 * width**2))


def disk(diameter: int) -> Tensor:
    """An out-of-focus blur."""
    a = torch.arange(diameter, dtype=torch.float64) - diameter // 2
    inside = (a[:, None] ** 2 + a**2 <= (diameter / 2) ** 2).double()
    return (inside / inside.sum())[None, None]


def motion(taps: int) -> Tensor:
    """A straight movement across the pixels, at 30 degrees."""
    kernel = torch.zeros(1, 1, taps, taps, dtype=torch.float64)
    for step in torch.linspace(-1, 1, 8 * taps):
        row, column = (round(float(taps // 2 * (1 + step * part))) for part in (0.5, 0.866))
        kernel[0, 0, row, column] += 1 / (8 * taps)
    return kernel


def ball(depth: int, diameter: int) -> Tensor:
    """A blur in three dimensions that is no product."""
    a, b = (torch.linspace(-1, 1, n, dtype=torch.float64) for n in (depth, diameter))
    inside = (a[:, None, None] ** 2 + b[:, None] ** 2 + b**2 <= 1).double()
    return (inside / inside.sum())[None, None]


def decaying(taps: int) -> Tensor:
    """An impulse response after a first strong one."""
    h = torch.randn(taps, dtype=torch.float64) * torch.exp(-3 * torch.arange(taps, dtype=torch.float64) / taps)
    h[0] = 6.0
    return (h.flip(0) / 6)[None, None]


def surrounded(kernel: Tensor, margin: int) -> Tensor:
    """A kernel in zeros."""
    return torch.nn.functional.pad(kernel, [margin] * 4)


F64, S2 = torch.float64, {"stride": 2}
REFLECT = {"padding_mode": "reflect"}
CASES = (
    Case("1x1 96-24 56², batch 8", random(24, 96, 1, 1), (56, 56), batch=8),
    Case("1x1 64-64 64²", random(64, 64, 1, 1), (64, 64), 0.1),
    Case("1x1 stride 2 64-128 56²", random(128, 64, 1, 1), (56, 56), geometry=S2),
    Case("1x1 512-2048 7²", random(2048, 512, 1, 1), (7, 7), 0.1),
    Case("1x1 padded 32-48 32²", random(48, 32, 1, 1), (32, 32), geometry={"padding": 1}),
    Case("2x2 stride 2 32-64 64²", random(64, 32, 2, 2), (64, 64), geometry=S2),
    Case("3x3 stride 3 padded 8-16 60²", random(16, 8, 3, 3), (60, 60), 0.1, geometry={"stride": 3, "padding": 1}),
    Case("patches 16x16 3-192 224²", random(192, 3, 16, 16), (224, 224), geometry={"stride": 16}),
    Case("patches 4x4 3-96 128², damped", random(96, 3, 4, 4), (128, 128), 0.1, geometry={"stride": 4}),
    Case("row blur 1x9 256²", separable(torch.ones(1), torch.ones(9)), (256, 256), 1e-2, dtype=F64),
    Case("column 3x1 32-32 48²", random(32, 32, 3, 1), (48, 48), 0.1, geometry={"padding": (1, 0)}),
    Case("spatial 1x3x3 8-8 8x24²", random(8, 8, 1, 3, 3), (8, 24, 24), 0.1, geometry={"padding": (0, 1, 1)}),
    Case("gauss15 valid 64²", separable(gauss(15, 2), gauss(15, 2)), (64, 64), 1e-3, dtype=F64),
    Case("gauss15 valid 256²", separable(gauss(15, 2), gauss(15, 2)), (256, 256), 1e-3, dtype=F64),
    Case("gauss15 valid 256², float32", separable(gauss(15, 2), gauss(15, 2)), (256, 256), 1e-2),
    Case("gauss15 valid 512²", separable(gauss(15, 2), gauss(15, 2)), (512, 512), 1e-1, dtype=F64),
    Case("gauss15 valid 1024²", separable(gauss(15, 2), gauss(15, 2)), (1024, 1024), 1e-1, dtype=F64),
    Case("gauss15 valid 192², damp 0", separable(gauss(15, 2), gauss(15, 2)), (192, 192), dtype=F64),
    Case("box9 same 256²", separable(torch.ones(9), torch.ones(9)), (256, 256), 1e-3, dtype=F64,
         geometry={"padding": 4}),
    Case("gauss15 reflect 256²", separable(gauss(15, 2), gauss(15, 2)), (256, 256), 1e-2, dtype=F64,
         geometry={"padding": 7, **REFLECT}),
    Case("gauss9 stride 2 256²", separable(gauss(9, 2), gauss(9, 2)), (256, 256), 1e-2, dtype=F64,
         geometry={"padding": 4, **S2}),
    Case("gauss9 3 colours valid 256²", separable(gauss(9, 2), gauss(9, 2), channels=3), (256, 256), 1e-2,
         geometry={"groups": 3}),
    Case("gauss 5x9x9 16x64²", separable(gauss(5, 1), gauss(9, 2), gauss(9, 2)), (16, 64, 64), 1e-2, dtype=F64),
    Case("sweep 4000 taps, 200 unknowns", lambda: decaying(4000), (200,), dtype=F64, geometry={"padding": 3999}),
    Case("PSF 15² from a picture of 128²", lambda: torch.rand(1, 1, 128, 128), (15, 15), 1e-2, dtype=F64,
         geometry={"padding": 113}),
    Case("1000 taps, 4000 unknowns", lambda: decaying(1000), (4000,), 1e-1, dtype=F64, geometry={"padding": 999}),
    Case("gauss9 in zeros 63² same 64²", lambda: surrounded(separable(gauss(9, 2), gauss(9, 2))(), 27), (64, 64), 1e-2,
         dtype=F64, geometry={"padding": 31}),
    Case("3x3 16²", random(1, 1, 3, 3), (16, 16), 0.1, quick=True),
    Case("disk13 valid 256²", lambda: disk(13), (256, 256), 1e-2, dtype=F64),
    Case("disk9 same 64²", lambda: disk(9), (64, 64), 1e-2, geometry={"padding": 4}),
    Case("circular 16-16 3x3 64²", random(16, 16, 3, 3), (64, 64), 0.1,
         geometry={"padding": 1, "padding_mode": "circular"}),
    Case("the question, 8-8 3x3 valid 64²", random(8, 8, 3, 3), (64, 64)),
    Case("stem 7x7 stride 2 3-64 64²", random(64, 3, 7, 7), (64, 64), 0.1, geometry={"padding": 3, **S2}),
    Case("mobilenet depthwise 3x3 stride 2 32 48²", random(32, 1, 3, 3), (48, 48), 0.1,
         geometry={"padding": 1, "groups": 32, **S2}),
    Case("audio k8 s4 16-16 2000", random(16, 16, 8), (2000,), 0.1, geometry={"stride": 4, "padding": 2}),
    Case("resnet 64-64 3x3 same 32²", random(64, 64, 3, 3), (32, 32), 0.1, geometry={"padding": 1}),
    Case("resnet 64-64 3x3 same 32², damp 1e-3", random(64, 64, 3, 3), (32, 32), 1e-3, geometry={"padding": 1}),
    Case("resnet 64-128 3x3 stride 2 32²", random(128, 64, 3, 3), (32, 32), geometry={"padding": 1, **S2}),
    Case("64-64 3x3 stride 2 64², batch 8", random(64, 64, 3, 3), (64, 64), 0.1, batch=8,
         geometry={"padding": 1, **S2}),
    Case("vgg 64-128 3x3 same 32²", random(128, 64, 3, 3), (32, 32), geometry={"padding": 1}),
    Case("vgg 3-64 3x3 same 64²", random(64, 3, 3, 3), (64, 64), 1e-3, geometry={"padding": 1}),
    Case("u-net 32-32 3x3 valid 64²", random(32, 32, 3, 3), (64, 64), 0.1),
    Case("u-net 64-32 3x3 same 32², batch 8", random(32, 64, 3, 3), (32, 32), 0.1, batch=8, geometry={"padding": 1}),
    Case("convnext depthwise 7x7 96 32²", random(96, 1, 7, 7), (32, 32), 0.1, geometry={"padding": 3, "groups": 96}),
    Case("efficientnet depthwise 5x5 stride 2 48 48²", random(48, 1, 5, 5), (48, 48), 0.1,
         geometry={"padding": 2, "groups": 48, **S2}),
    Case("mobilenet depthwise 3x3 64 32²", random(64, 1, 3, 3), (32, 32), 1e-3, geometry={"padding": 1, "groups": 64}),
    Case("dilated 2 32-32 3x3 32²", random(32, 32, 3, 3), (32, 32), 0.1, geometry={"padding": 2, "dilation": 2}),
    Case("grouped 4 32-32 3x3 48²", random(32, 8, 3, 3), (48, 48), 0.1, geometry={"padding": 1, "groups": 4}),
    Case("audio k10 s5 1-64 16000", random(64, 1, 10), (16000,), geometry={"stride": 5}),
    Case("audio k31 same 1-1 16000", random(1, 1, 31), (16000,), 1e-2, geometry={"padding": 15}),
    Case("conv3d 3x3x3 16-16 12x16²", random(16, 16, 3, 3, 3), (12, 16, 16), 0.1, geometry={"padding": 1}),
    Case("conv3d 3x3x3 1-8 16x32² stride 2", random(8, 1, 3, 3, 3), (16, 32, 32), 0.1, geometry={"padding": 1, **S2}),
    Case("ball 5x9x9 valid 16x64²", lambda: ball(5, 9), (16, 64, 64), 1e-2, dtype=F64),
    Case("ball 5x9x9 same 16x64²", lambda: ball(5, 9), (16, 64, 64), 1e-1, geometry={"padding": (2, 4, 4)}),
    Case("ball 3x7x7 valid 8x128²", lambda: ball(3, 7), (8, 128, 128), 1e-1),
    Case("ball 7x7x7 valid 32x48²", lambda: ball(7, 7), (32, 48, 48), 1e-2),
    Case("ball 3x5x5 same 12x40²", lambda: ball(3, 5), (12, 40, 40), 1e-2, geometry={"padding": (1, 2, 2)}),
    Case("ball 5x5x5 full 10x24², damp 1e-3", lambda: ball(5, 5), (10, 24, 24), 1e-3, geometry={"padding": 4}),
    Case("random 3x5x5 valid 8x32²", random(1, 1, 3, 5, 5), (8, 32, 32), dtype=F64),
    Case("disk13 same 256², float32", lambda: disk(13), (256, 256), 1e-1, geometry={"padding": 6}),
    Case("disk9 valid 512²", lambda: disk(9), (512, 512), 1e-1, dtype=F64),
    Case("disk9 valid 96², damp 1e-3", lambda: disk(9), (96, 96), 1e-3, dtype=F64),
    Case("disk13 valid 128², batch 8", lambda: disk(13), (128, 128), 1e-2, batch=8),
    Case("disk9 reflect 128²", lambda: disk(9), (128, 128), 1e-2, dtype=F64, geometry={"padding": 4, **REFLECT}),
    Case("disk31 valid 200x333", lambda: disk(31), (200, 333), 1e-2, dtype=F64),
    Case("disk9 circular 256²", lambda: disk(9), (256, 256), 1e-3, dtype=F64,
         geometry={"padding": 4, "padding_mode": "circular"}),
    Case("motion15 valid 256²", lambda: motion(15), (256, 256), 1e-2, dtype=F64),
    Case("motion15 same 256², 3 colours", lambda: motion(15).expand(3, 1, 15, 15).clone(), (256, 256), 1e-2,
         geometry={"padding": 7, "groups": 3}),
    Case("motion15 valid 64², damp 1e-1", lambda: motion(15), (64, 64), 1e-1),
    Case("disk5 stride 2 128²", lambda: disk(5), (128, 128), 1e-2, geometry={"padding": 2, **S2}),
    Case("PSF 65² of a picture of 64², same", lambda: disk(65), (64, 64), 1e-1, geometry={"padding": 32}),
    Case("circular 32-32 3x3 64²", random(32, 32, 3, 3), (64, 64), geometry={"padding": 1, "padding_mode": "circular"}),
    Case("the question, 16-16 3x3 valid 96²", random(16, 16, 3, 3), (96, 96)),
    Case("deep 8-8 3x3 same 32², damp 0", random(8, 8, 3, 3), (32, 32), geometry={"padding": 1}),
)  # fmt: skip


class _DecidedError(Exception):
    """Auto has chosen."""


def deciding(A: lsconv.Convolution, damp: float) -> float:
    """Seconds until auto has chosen; the setup that it chose is not made."""

    def stop(*_: object, **__: object) -> None:
        raise _DecidedError

    def choose() -> None:
        with contextlib.suppress(_DecidedError):
            routes.route(A, damp)

    with contextlib.ExitStack() as patched:
        chosen = (
            (small_matrices, ("PatchPlan", "SeparablePlan", "NormalEquationsPlan")),
            (lsmr_then_border, ("LsmrThenBorderPlan",)),
            (routes, ("FourierPlan", "KrylovPlan", "border_plan", "singular_value_plan")),
        )
        for module, names in chosen:
            for name in names:
                kind = getattr(module, name)
                target = mock.patch.object(kind, "__init__", stop) if isinstance(kind, type) else None
                patched.enter_context(target or mock.patch.object(module, name, stop))
        return statistics.median(_timed(choose)[0] for _ in range(REPEATS))


def _timed(run: Callable[[], T]) -> tuple[float, T]:
    """Processor seconds and result: the ways run one after the other, and a busy machine would meet some of them."""
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


def _measure(case: Case, way: str, first_only: bool, connection: Any) -> None:
    """What one way takes, in a process of its own."""
    A, y, damp = case.problem()
    options: dict[str, Any] = {"damp": damp, "method": way}
    if way == "plain":
        options |= {"method": "lsmr", "preconditioner": None}
    rtol, before = direct_rtol(case.dtype), forget_peak()
    firsts, kept = [], []
    while len(firsts) < REPEATS and sum(firsts) < 1.0:
        seconds, solution = _timed(lambda: lsconv.lstsq(A, y, rtol=rtol, **options))
        firsts.append(seconds)
    if first_only:
        connection.send(statistics.median(firsts))
        return
    memory = (resident()["peak"] - before) / 2**20
    inverse = lsconv.pinv(A, **options)
    settling = 0.0

    def another() -> float:  # what an iteration learns of one y would answer the same y at once
        other = case.data(A)
        return _timed(lambda: inverse.solve(other, rtol=rtol))[0]

    for _ in range(SETTLING):  # a plan that is kept makes its factors when its iterations have cost as much
        if settling + firsts[0] > 2.0:
            break
        settling += another()
    while len(kept) < REPEATS and sum(kept) < 1.0:
        kept.append(another())
    B = A.to(dtype=torch.float64)
    x, data = solution.x.double(), y.double()
    r = data - B(x)
    g = B.H(r) - damp**2 * x
    total = torch.hypot(r.norm(), damp * x.norm())
    size = max(float(B.H(r).norm() / r.norm()), float(B(x).norm() / x.norm()))
    error = min(float(total / data.norm()), float(g.norm() / (size * total)))
    connection.send((statistics.median(firsts), statistics.median(kept), memory, error, type(inverse.plan).__name__))


def measured(case: Case, way: str, limit: float) -> tuple[float, float, float, float, str] | None:
    """First seconds, kept seconds, MiB, relative gradient, plan; None: refused, failed, or longer than the limit."""
    return _in_a_process(case, way, False, limit)


def _in_a_process(case: Case, way: str, first_only: bool, limit: float) -> Any:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_quietly, args=(case, way, first_only, sender))
    process.start()
    result = receiver.recv() if receiver.poll(limit) else None
    process.kill()
    process.join()
    return result


def _quietly(case: Case, way: str, first_only: bool, connection: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _measure(case, way, first_only, connection)
        except lsconv.LsconvError:
            connection.send(None)


def raced(case: Case, rival: str, own: float, its: float) -> tuple[float, float]:
    """First seconds of auto and of its rival, medians of :data:`ROUNDS` processes each, in turn.

    Args:
        rival: the fastest other way.
        own, its: the seconds of the first process of each, which chose the rival; they do not count.
    """
    if own + its > 10:
        return own, its
    rounds = [[_in_a_process(case, way, True, 60.0) for way in ("auto", rival)] for _ in range(ROUNDS)]
    first, other = (statistics.median(seconds) for seconds in zip(*rounds, strict=True))
    return first, other


def row(case: Case) -> dict[str, Any]:
    """One row: auto, and the best of the ways that are as exact."""
    own = measured(case, "auto", 60.0)
    if own is None:
        return {"case": case.name, "damp/σ": case.damp, "way": "> 60 s"}
    first, kept, memory, _, plan = own
    others = {}
    for way in WAYS:
        found = measured(case, way, 4 * (first + kept) + 4.0)
        if found is not None and found[3] <= SLACK * direct_rtol(case.dtype):
            others[way] = found
    fastest = min(others, key=lambda way: others[way][0], default="-")
    best = others.get(fastest, own)
    its = best[0]
    if fastest in others:
        first, its = raced(case, fastest, first, its)
    best_kept = min((found[1] for found in others.values()), default=kept)
    A, _, damp = case.problem()
    return {
        "case": case.name,
        "damp/σ": f"{case.damp:g}",
        "way": plan.removesuffix("Plan"),
        "auto s": first,
        "kept s": kept,
        "MiB": max(memory, 0.0),
        "best other": fastest,
        "its s": its,
        "its MiB": max(best[2], 0.0),
        "ratio": (first + FREE_SECONDS) / (min(its, first) + FREE_SECONDS),
        "kept ratio": (kept + FREE_SECONDS) / (min(best_kept, kept) + FREE_SECONDS),
        "memory ratio": max(memory + FREE_MIB, FREE_MIB) / max(best[2] + FREE_MIB, FREE_MIB),
        "deciding s": deciding(A, damp),
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The last line."""
    scored = [r for r in rows if "ratio" in r]
    means = {
        name: statistics.geometric_mean(r[name] for r in scored) for name in ("ratio", "kept ratio", "memory ratio")
    }
    worst = {name: max(r[name] for r in scored) for name in means}
    within = sum(r["ratio"] <= 1.5 for r in scored)
    return {
        "case": f"geometric mean (worst); within 1.5: {within} of {len(rows)}",
        **{name: f"{means[name]:.2f} ({worst[name]:.1f})" for name in means},
    }


def tables(quick: bool) -> Iterator[Table]:
    """One table."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process has no threads of its parent's
    for padding, damp in ((0, 0.1), (1, 0.0)):  # what a first call loads and makes is not what is asked
        A = lsconv.Conv2d(torch.randn(2, 2, 3, 3), (24, 24), padding=padding)
        lsconv.lstsq(A, torch.randn(A.out_shape), damp=damp)
    try:
        rows = [row(case) for case in CASES if case.quick or not quick]
    finally:
        torch.set_num_threads(threads)
    yield Table(
        "auto against the best of all ways, processor seconds of one thread",
        [*rows, summary(rows)],
        f"First solve with its setup, one of other data with a plan that is kept, after {SETTLING} solves or two "
        f"seconds of them, and the peak of the first; the first solves of auto and of the fastest other "
        f"way are medians of {ROUNDS} processes in turn. Every way was given the same tolerance, and counts where A "
        f"itself finds the answer's relative gradient or residual within {SLACK} times it. Ratios to the best other "
        f"way (1 where auto is the best), {1e3 * FREE_SECONDS:.0f} ms and {FREE_MIB} MiB added to both sides. "
        f"Ways: {', '.join(WAYS)}.",
    )
