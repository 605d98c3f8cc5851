r"""The problems that ``lsconv demo`` solves by three methods, and the measures of each answer.

The reference is the minimum-norm solution :math:`A^+ A x_{true}`, the part of the truth that the data determine: the
orthogonal projection of :math:`x_{true}` onto the range of :math:`A^H`. It is solved for in float64 from noise-free
data and verified before anything is compared with it: it must reproduce the data, and the rest of the truth must
be orthogonal to it, :math:`\langle x_{mn}, x_{true} - x_{mn} \rangle = 0`.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lsconv
from lsconv.app.image_io import read_picture
from lsconv.app.plots import Panel, draw_comparison

__all__ = [
    "Answer",
    "Problem",
    "Reference",
    "circular_pseudo_inverse",
    "draw",
    "evaluate",
    "motion_kernel",
    "peak_signal_to_noise",
    "photograph_problem",
    "question_problem",
    "solve_reference",
    "solvers",
    "warm_up",
]


@dataclass(frozen=True)
class Problem:
    """Find x from ``y = A x + noise``, A being a convolution without padding ('valid').

    Attributes:
        title: one line about it.
        A: the convolution.
        weight: its kernel, ``(c_out, c_in, k, k)``.
        truth: the x that y was made from, ``(batch, c_in, height, width)``.
        y: the data, ``(batch, c_out, height - k + 1, width - k + 1)``.
        damp: the damping that suits the noise; 0 for the minimum-norm solution.
        budget: iterations given to plain LSQR.
        offset: the mean that was subtracted from truth and data, per batch item, and is added again for display.
    """

    title: str
    A: Any
    weight: Tensor
    truth: Tensor
    y: Tensor
    damp: float
    budget: int
    offset: Tensor | float = 0.0


@dataclass(frozen=True)
class Reference:
    r"""The verified minimum-norm solution in float64.

    Attributes:
        x: the solution, shaped like the truth.
        residual: :math:`\|A x - A x_{true}\| / \|A x_{true}\|`.
        inner_product: :math:`|\langle x, x_{true} - x \rangle| / \|x_{true}\|^2`, zero for the projection.
    """

    x: Tensor
    residual: float
    inner_product: float

    @property
    def verified(self) -> bool:
        """True when both deviations are far below every distance that the demonstration reports."""
        return self.residual < 1e-8 and self.inner_product < 1e-8


@dataclass(frozen=True)
class Answer:
    r"""A row of the table: what a method found, and how good it is.

    Attributes:
        method: the method in words.
        x: its answer.
        residual: :math:`\|A x - y\| / \|y\|`.
        distance: :math:`\|x - x_{mn}\| / \|x_{mn}\|`.
        error: :math:`\|x - x_{true}\| / \|x_{true}\|`.
        iterations: of the slowest batch item; None for a method that does not iterate.
        seconds: wall-clock time, setup included.
        converged: what the method says of itself; None when it says nothing.
    """

    method: str
    x: Tensor
    residual: float
    distance: float
    error: float
    iterations: int | None
    seconds: float
    converged: bool | None


Solver = Callable[[], tuple[Tensor, int | None, bool | None]]


def question_problem(device: torch.device, *, quick: bool = False) -> Problem:
    """The original question's problem, 32 channels of 128×128 under a random 3×3 kernel, in float32 and without noise.

    Args:
        device: where to compute.
        quick: 4 channels of 32×32 instead.

    Example:
        >>> question_problem(torch.device("cpu"), quick=True).y.shape
        torch.Size([1, 4, 30, 30])
    """
    channels, size = (4, 32) if quick else (32, 128)
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(channels, channels, 3, 3, generator=generator).to(device)
    truth = torch.randn(1, channels, size, size, generator=generator).to(device)
    A = lsconv.Conv2d(weight, in_size=(size, size))
    title = f"The question: {channels} channels, random 3×3 kernel, {size}×{size}, float32, no padding, no noise"
    return Problem(title, A, weight, truth, A(truth), damp=0.0, budget=60 if quick else 300)


def photograph_problem(device: torch.device, *, quick: bool = False) -> Problem:
    """The photograph, blurred by a motion of the camera, cropped to the pixels that need none outside it, 1% noise.

    The mean of the data is subtracted from data and truth (a kernel of sum 1 keeps it), so that the damping pulls
    towards the average colour and not towards black; every method is given the same data.

    Args:
        device: where to compute.
        quick: the middle 96×96 pixels instead of all.

    Example:
        >>> photograph_problem(torch.device("cpu"), quick=True).y.shape
        torch.Size([3, 1, 82, 82])
    """
    with resources.as_file(resources.files("lsconv.app") / "data" / "astronaut-256.png") as path:
        pixels = read_picture(Path(path)).pixels.float()
    if quick:
        pixels = pixels[:, 80:176, 80:176]
    photograph = pixels[:, None].to(device)
    weight = motion_kernel()[None, None].float().to(device)
    A = lsconv.Conv2d(weight, in_size=photograph.shape[-2:])
    noise = torch.randn(A.out_shape, generator=torch.Generator().manual_seed(3)).to(device)
    data = A(photograph) + 0.01 * noise
    offset = data.mean((-3, -2, -1), keepdim=True)
    size = f"{photograph.shape[-2]}×{photograph.shape[-1]}"
    title = f"The photograph: {size}, three colours, motion blur within 15×15, no padding, 1% noise, float32"
    return Problem(title, A, weight, photograph - offset, data - offset, damp=0.15, budget=300, offset=offset)


def motion_kernel(size: int = 15) -> Tensor:
    """The PSF of a camera that moves along an S whose end turns back: not symmetric, of sum 1, float64.

    Args:
        size: side of the kernel in pixels.

    Example:
        >>> kernel = motion_kernel()
        >>> kernel.shape, round(kernel.sum().item(), 12)
        (torch.Size([15, 15]), 1.0)
    """
    moment = torch.linspace(0, 1, 1000, dtype=torch.float64)
    row = 0.440 + 0.435 * torch.sin(3.6 * moment - 1.5)  # in units of the kernel's side
    column = 0.05 + 0.90 * moment**0.9
    places = torch.stack([row, column]) * (size - 1)
    corner = places.floor().long()
    part = places - corner
    kernel = torch.zeros(size, size, dtype=torch.float64)
    for down in (0, 1):
        for right in (0, 1):  # bilinear: the light of every moment is shared among the four nearest pixels
            light = (part[0] if down else 1 - part[0]) * (part[1] if right else 1 - part[1])
            kernel.index_put_((corner[0] + down, corner[1] + right), light, accumulate=True)
    return kernel / kernel.sum()


def circular_pseudo_inverse(weight: Tensor, y: Tensor, in_size: tuple[int, int], *, damp: float = 0.0) -> Tensor:
    r"""Invert as the original question did: y extended by zeros, a pseudo-inverse per frequency.

    This takes the convolution for a periodic one, and y for complete. It is written in plain torch, without lsconv, as
    published on the web.

    Args:
        weight: kernel, ``(c_out, c_in, k, k)``.
        y: data of the convolution without padding, ``(batch, c_out, height - k + 1, width - k + 1)``.
        in_size: height and width of x.
        damp: :math:`\lambda` of the Tikhonov filter :math:`(S^H S + \lambda^2)^{-1} S^H`; 0 for the pseudo-inverse.

    Returns:
        x, ``(batch, c_in, height, width)``.

    Example:
        >>> K, x = torch.randn(1, 1, 3, 3), torch.randn(1, 1, 16, 16)
        >>> periodic = torch.nn.functional.conv2d(torch.nn.functional.pad(x, (0, 2, 0, 2), mode="circular"), K)
        >>> bool((circular_pseudo_inverse(K, periodic, (16, 16)) - x).norm() < 1e-2 * x.norm())
        True
    """
    symbol = torch.fft.rfft2(weight, in_size).conj().permute(2, 3, 0, 1)  # conj: torch's conv2d is a cross-correlation
    data = torch.fft.rfft2(y, in_size).permute(2, 3, 1, 0)
    if damp:
        gram = symbol.mH @ symbol + damp**2 * torch.eye(symbol.shape[-1], dtype=symbol.dtype, device=symbol.device)
        x = torch.linalg.solve(gram, symbol.mH @ data)
    else:
        x = torch.linalg.pinv(symbol) @ data
    return torch.fft.irfft2(x.permute(3, 2, 0, 1), in_size)


def solvers(problem: Problem) -> dict[str, Solver]:
    """The methods to compare, by their name in the table.

    Each returns x, the iterations (None for a direct method) and whether it converged (None where it has no test).
    """
    in_size = (problem.truth.shape[-2], problem.truth.shape[-1])
    damped = ", damped" if problem.damp else ""

    def circular(damp: float) -> Solver:
        return lambda: (circular_pseudo_inverse(problem.weight, problem.y, in_size, damp=damp), None, None)

    def iterative(solve: Callable[[], Any]) -> Solver:
        def run() -> tuple[Tensor, int, bool]:
            solution = solve()
            return solution.x, int(solution.iterations.max()), bool(solution.converged.all())

        return run

    table = {"circular pinv": circular(0.0)}
    if problem.damp:
        table[f"circular pinv{damped}"] = circular(problem.damp)
    table[f"plain LSQR{damped}"] = iterative(
        lambda: lsconv.lsqr(problem.A, problem.y, damp=problem.damp, max_iter=problem.budget)
    )
    table[f"lsconv{damped}"] = iterative(lambda: lsconv.lstsq(problem.A, problem.y, damp=problem.damp))
    if not problem.damp:
        exact, y = problem.A.to(dtype=torch.float64), problem.y.double()
        table["lsconv in float64"] = iterative(lambda: lsconv.lstsq(exact, y, rtol=1e-6))
    return table


def warm_up(device: torch.device) -> None:
    """Run every method once on small problems, so that torch's initialisation is not timed as part of the first."""
    for problem in (question_problem(device, quick=True), photograph_problem(device, quick=True)):
        for solve in solvers(problem).values():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", lsconv.ConvergenceWarning)
                solve()


def solve_reference(problem: Problem) -> Reference:
    """Solve the noise-free problem for its minimum-norm solution in float64, and measure the two conditions on it."""
    A, truth = problem.A.to(dtype=torch.float64), problem.truth.double()
    data = A(truth)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lsconv.ConvergenceWarning)  # verified below instead
        x = lsconv.lstsq(A, data, rtol=1e-11).x
    inner_product = torch.sum(x * (truth - x)).abs() / torch.sum(truth**2)
    return Reference(x, _relative(A(x) - data, data), float(inner_product))


def evaluate(problem: Problem, reference: Reference, method: str, solve: Solver) -> Answer:
    """Run a method, time it, and measure its answer in float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lsconv.ConvergenceWarning)  # plain LSQR is expected to use up its budget
        _synchronise(problem.y)
        start = time.perf_counter()
        x, iterations, converged = solve()
        _synchronise(problem.y)
        seconds = time.perf_counter() - start
    exact, y, truth = x.double(), problem.y.double(), problem.truth.double()
    residual = _relative(problem.A.to(dtype=torch.float64)(exact) - y, y)
    distance = _relative(exact - reference.x, reference.x)
    return Answer(method, x, residual, distance, _relative(exact - truth, truth), iterations, seconds, converged)


def peak_signal_to_noise(x: Tensor, photograph: Tensor) -> float:
    """PSNR in decibels of ``x`` against ``photograph``, both in [0, 1] after clipping.

    Example:
        >>> round(peak_signal_to_noise(torch.full((4, 4), 0.1), torch.zeros(4, 4)), 3)
        20.0
    """
    return float(-10 * torch.log10(torch.mean((x.clamp(0, 1) - photograph.clamp(0, 1)).double() ** 2)))


def _relative(difference: Tensor, reference: Tensor) -> float:
    return float(torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(reference))


def _synchronise(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def draw(path: Path, problem: Problem, rows: Sequence[Answer]) -> tuple[int, int]:
    """Draw the photograph, the data and three answers, each with its PSNR on the pixels that the data cover.

    Args:
        path: the PNG file to write.
        problem: the photograph's.
        rows: the answers in the order of :func:`solvers`.

    Returns:
        Width and height of the file in pixels.
    """
    edge = (problem.weight.shape[-1] - 1) // 2
    photograph = problem.truth + problem.offset
    inner = photograph[..., edge:-edge, edge:-edge]

    def panel(row: Answer, name: str, enlarged: bool = False) -> Panel:
        pixels = row.x + problem.offset
        psnr = peak_signal_to_noise(pixels[..., edge:-edge, edge:-edge], inner)
        return Panel(name, f"PSNR {psnr:.1f} dB", pixels[:, 0], enlarged)

    data = problem.y + problem.offset
    blurred = torch.nn.functional.pad(data, (edge,) * 4, value=1.0)
    psnr = peak_signal_to_noise(data, inner)
    height, width = photograph.shape[-2:]
    panels = [
        Panel("photograph", f"{width}×{height}", photograph[:, 0], enlarged=True),
        Panel("blurred, cropped, 1% noise", f"PSNR {psnr:.1f} dB", blurred[:, 0]),
        panel(rows[0], "circular pseudo-inverse"),
        panel(rows[1], f"circular, damp={problem.damp:g}", enlarged=True),
        panel(rows[-1], f"lsconv, damp={problem.damp:g}", enlarged=True),
    ]
    strip = (slice(0, height // 5), slice(0, width * 3 // 5))
    caption = "PSNR against the photograph, on the middle pixels that the blurred picture covers."
    return draw_comparison(path, panels, problem.weight[0, 0], strip, caption)
