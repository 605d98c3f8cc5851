"""Total variation: how long does a picture take, and what does the quadratic step of ADMM cost?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import lsconv
from benchmarks.restoration import Scene, scenarios
from benchmarks.runner import Table, race, timed
from lsconv.inverse.admm.proximal import Term, gaussian_term, sparsity_term
from lsconv.inverse.admm.sparse_problem import SparseProblem

_TRANSFORMS = {torch.fft.rfftn, torch.fft.irfftn, torch.fft.fftn, torch.fft.ifftn, torch.fft.rfft, torch.fft.irfft}


class Transforms(TorchFunctionMode):
    """Counts Fourier transforms, in units of one of the picture's size."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.pixels, self.count = pixels, 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _TRANSFORMS:
            self.count += max(args[0].numel(), result.numel()) / self.pixels
        return result


def photograph(size: int, colour: bool = False) -> Tensor:
    """``(channels, size, size)``: the bundled photograph or scikit-image's camera, enlarged where it must be."""
    import importlib.resources

    import numpy as np
    from PIL import Image

    if colour or size <= 256:
        source = importlib.resources.files("lsconv.app") / "data" / "astronaut-256.png"
        with importlib.resources.as_file(source) as path:
            picture = np.asarray(Image.open(path).convert("RGB" if colour else "L"), dtype=np.float32) / 255
        values = torch.from_numpy(picture.copy())
        values = values.movedim(-1, 0) if colour else values[None]
        return values[:, :size, :size].contiguous()
    from skimage import data

    values = torch.from_numpy(data.camera().astype(np.float32) / 255)
    return torch.nn.functional.interpolate(values[None, None], size=(size, size), mode="bicubic")[0].clamp(0, 1)


def scene(size: int, blur: str, *, colour: bool = False) -> tuple[Scene, float]:
    """A blurred, noisy picture of unknown surroundings, float32, and the standard deviation of its noise."""
    kernel, noise = scenarios()[blur]
    truth = photograph(size, colour)
    sizes = tuple(n - k + 1 for n, k in zip(truth.shape[1:], kernel.shape, strict=True))
    A = lsconv.blur_operator(kernel.float(), sizes, channels=truth.shape[0])
    blurred = A(truth)
    sigma = noise(blurred)
    y = blurred + sigma * torch.randn(blurred.shape, generator=torch.Generator().manual_seed(0))
    return Scene(f"{size}²{'×3' if colour else ''}, {blur}", truth, kernel, y, A), sigma


def weight_of(scene: Scene, sigma: float) -> float:
    """The variance of the noise over the mean slope of the truth."""
    slope = torch.linalg.vector_norm(lsconv.Gradient(scene.truth.shape)(scene.truth), dim=(0, 1)).mean()
    return float(sigma**2 / slope)


def psnr(scene: Scene, x: Tensor) -> float:
    """PSNR on the pixels that the picture shows."""
    (top, left), (height, width) = scene.before, scene.y.shape[-2:]
    error = (x - scene.truth)[..., top : top + height, left : left + width].double()
    return float(-10 * torch.log10(torch.mean(error**2)))


def pictures(quick: bool) -> Table:
    """A row for every picture: the default tolerance, and what ten times more would have given."""
    names = list(scenarios())
    asked = [(96, names[2], False), (64, names[0], True)]
    if not quick:
        asked = [(256, name, False) for name in names]
        asked += [(240, names[0], True), (512, names[2], False), (1024, names[2], False)]
    rows = []
    for size, blur, colour in asked:
        picture, sigma = scene(size, blur, colour=colour)
        weight = weight_of(picture, sigma)

        def solve(picture: Scene = picture, weight: float = weight, **options: Any) -> lsconv.Solution:
            return lsconv.total_variation(picture.A, picture.y, weight, **options)

        timing = race({"ours": solve}, repeats=1 if quick else 3, patience=1 if quick else 10)["ours"]
        found: lsconv.Solution = timing.result
        with Transforms(picture.truth[0].numel()) as transforms:
            solve(max_iter=9)
            few = transforms.count
            solve(max_iter=19)
        tight = solve(rtol=2e-4, max_iter=2000) if size <= 512 else None
        rows.append(
            {
                "picture": picture.name,
                "seconds": timing.median,
                "iterations": int(found.iterations),
                "ms / iteration": 1e3 * timing.median / int(found.iterations),
                # the look at the tenth iteration included
                "FFTs / iteration": (transforms.count - 2 * few) / 10 / picture.truth.shape[0],
                "certified": bool(found.converged),
                "PSNR dB": psnr(picture, found.x),
                "dB above rtol 2e-4": None if tight is None else psnr(picture, found.x) - psnr(picture, tight.x),
                "its at rtol 2e-4": None if tight is None else int(tight.iterations),
            }
        )
    return Table(
        "Pictures of unknown surroundings, float32, default tolerance",
        rows,
        "Weight: noise variance over mean slope. FFTs are those of one channel, the certificate every ten iterations "
        "included.",
    )


def steps(quick: bool) -> Table:
    """The same problem with either quadratic step."""
    rows = []
    names = list(scenarios())
    for blur in names[:1] if quick else names:
        picture, sigma = scene(64 if quick else 256, blur)
        weight = torch.tensor(weight_of(picture, sigma), dtype=torch.float64)

        def terms(A: lsconv.LinearOperator, y: Tensor, weight: Tensor = weight) -> list[Term]:
            return [gaussian_term(A, y), sparsity_term(lsconv.Gradient(A.in_shape, dtype=A.dtype), weight, (0, 1))]

        for name, extended in (("extended grid", True), ("border", False)):

            def run(extended: bool = extended, picture: Scene = picture, terms: Callable[..., Any] = terms) -> Any:
                return SparseProblem(picture.A, picture.y, terms, extended=extended).run(2e-3, 400, None)

            with Transforms(math.prod(picture.truth.shape)) as transforms:
                seconds, result = timed(run)
            rows.append(
                {
                    "picture": picture.name,
                    "quadratic step": name,
                    "seconds": seconds,
                    "iterations": int(result.iterations),
                    "FFTs": int(transforms.count),
                    "FFTs / iteration": transforms.count / int(result.iterations),
                    "certified": bool(result.met),
                    "PSNR dB": psnr(picture, result.x),
                }
            )
    return Table(
        "The quadratic step: one division per frequency on an extended grid, or the exact border solve, warm-started",
        rows,
    )


def tables(quick: bool) -> Iterator[Table]:
    """Pictures, and the two quadratic steps."""
    yield pictures(quick)
    yield steps(quick)
