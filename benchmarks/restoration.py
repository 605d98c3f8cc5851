"""Restoration: how good are pictures whose surroundings are unknown, against scikit-image and PyLops at their best?

Every scene is blurred and only the part whose pixels the blur knows is kept, so that nothing is periodic, zero or
mirrored beyond the picture. All methods are judged on the same pixels. Methods with a parameter get the best one, found
by looking at the truth ("oracle"); the rows called automatic are what lsconv reaches without looking.
"""

from __future__ import annotations

import importlib.resources
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lsconv
from benchmarks.runner import Table
from lsconv import psf

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Scene:
    """A truth, what a camera shows of it, and the pixels that methods are judged on."""

    name: str
    truth: Tensor
    kernel: Tensor
    y: Tensor
    A: lsconv.Convolution

    @property
    def before(self) -> tuple[int, ...]:
        """How far the picture's first pixel lies within the truth, for a PSF centred on its pixel ``size // 2``."""
        return tuple((size - 1) // 2 for size in self.kernel.shape)

    def framed(self, x: Tensor) -> Tensor:
        """The part of a field as large as the truth that the picture shows."""
        (top, left), (height, width) = self.before, self.y.shape
        return x[..., top : top + height, left : left + width]

    def psnr(self, picture: Tensor | Array, *, inside: bool = False) -> float:
        """PSNR of a picture as large as y; ``inside`` leaves out a margin as wide as the PSF."""
        x, truth = torch.as_tensor(picture).double(), self.framed(self.truth)
        if inside:
            margin = tuple(slice(size, -size) for size in self.kernel.shape)
            x, truth = x[margin], truth[margin]
        return float(-10 * torch.log10(torch.mean((x - truth) ** 2)))


# ------------------------------------------------------------------ scenes


def scenarios() -> dict[str, tuple[Tensor, Callable[[Tensor], float]]]:
    """The classical blurs, with the standard deviation of the noise given the blurred picture in [0, 1]."""
    square = (torch.arange(15, dtype=torch.float64) - 7) ** 2
    fading = 1 / (1 + square[:, None] + square)

    def at_bsnr(decibel: float) -> Callable[[Tensor], float]:
        return lambda blurred: float(blurred.std(correction=0)) * 10 ** (-decibel / 20)

    return {
        "box 9×9, BSNR 40 dB": (psf.box(9), at_bsnr(40)),
        "Gaussian σ=1.6, noise 2/255": (psf.gaussian(1.6), lambda _: 2 / 255),
        "1/(1+i²+j²) 15×15, noise √2/255": (fading / fading.sum(), lambda _: math.sqrt(2) / 255),
        "motion 15 at 30°, BSNR 30 dB": (psf.motion(15, 30), at_bsnr(30)),
    }


def pictures(quick: bool) -> dict[str, Tensor]:
    """The bundled photograph in grey and scikit-image's camera, in [0, 1]."""
    from PIL import Image
    from skimage import data

    source = importlib.resources.files("lsconv.app") / "data" / "astronaut-256.png"
    with importlib.resources.as_file(source) as path:
        photograph = np.asarray(Image.open(path).convert("L"), dtype=np.float64) / 255
    if quick:
        return {"photograph 64²": torch.from_numpy(photograph[72:136, 104:168].copy())}
    return {
        "photograph 256²": torch.from_numpy(photograph),
        "camera 512²": torch.from_numpy(data.camera().astype(np.float64) / 255),
    }


def scenes(quick: bool) -> Iterator[Scene]:
    """Every picture under every blur."""
    for picture, truth in pictures(quick).items():
        for number, (blur, (kernel, noise)) in enumerate(scenarios().items()):
            if quick and number:
                return
            # conv2d correlates: the turned kernel makes it a true convolution with the PSF
            A = lsconv.Conv2d(kernel.flip(0, 1)[None, None], in_size=tuple(truth.shape))
            blurred = A(truth[None])[0]
            generator = torch.Generator().manual_seed(number)
            y = blurred + noise(blurred) * torch.randn(blurred.shape, generator=generator, dtype=torch.float64)
            yield Scene(f"{picture}, {blur}", truth, kernel, y, A)


# ------------------------------------------------------------------ the best parameter


def oracle(
    scene: Scene, restore: Callable[[float], Tensor | Array], low: float, high: float, steps: int, halvings: int = 3
) -> Any:
    """``(picture, parameter, seconds of one run)`` of the largest PSNR: a grid in logarithms, then a finer one."""
    found: dict[float, tuple[float, Any, float]] = {}

    def look(value: float) -> float:
        start = time.perf_counter()
        picture = restore(10**value)
        seconds = time.perf_counter() - start
        found[value] = (scene.psnr(picture), picture, seconds)
        return found[value][0]

    grid = np.linspace(math.log10(low), math.log10(high), steps)
    centre = max(grid, key=look)
    step = grid[1] - grid[0]
    for _ in range(halvings):  # the best of three points, at half the distance every time
        step /= 2
        centre = max((centre - step, centre, centre + step), key=lambda v: found[v][0] if v in found else look(v))
    _, picture, seconds = found[centre]
    return picture, 10**centre, seconds


# ------------------------------------------------------------------ the contestants


def mirrored(y: Array, kernel: Array) -> tuple[Array, tuple[slice, ...]]:
    """The picture mirrored far beyond its edges, for methods with zeros there, and where in it the picture is."""
    margins = tuple((3 * size, 3 * size) for size in kernel.shape)
    return np.pad(y, margins, mode="symmetric"), tuple(slice(before, -after) for before, after in margins)


def doubled(y: Array, kernel: Array) -> tuple[Array, tuple[slice, ...]]:
    """The picture and its mirror images, which are periodic without a jump, for methods that take it as periodic."""
    return np.pad(y, [(0, size) for size in y.shape], mode="symmetric"), tuple(slice(size) for size in y.shape)


def peers(scene: Scene, steps: int) -> dict[str, Any]:
    """What scikit-image and PyLops give.

    The methods with a boundary of their own get the plain and an extended picture, and are shown with what turns out
    better. PyLops can also be given the field that is larger than the picture, which is the model of lsconv.
    """
    import pylops
    from skimage import restoration

    y, kernel = scene.y.numpy(), scene.kernel.numpy()
    centre = tuple(size // 2 for size in kernel.shape)

    def either(method: Callable[[Array], Array], extend: Callable[[Array, Array], Any]) -> Array:
        extended, inner = extend(y, kernel)
        return max(method(y), method(extended)[inner], key=scene.psnr)

    def wiener(balance: float) -> Array:
        return either(lambda z: restoration.wiener(z, kernel, balance, clip=False), doubled)

    def unsupervised() -> Array:
        return either(lambda z: restoration.unsupervised_wiener(z, kernel, clip=False, rng=0)[0], doubled)

    def richardson_lucy(count: float) -> Array:
        rounds = max(1, round(count))
        return either(
            lambda z: restoration.richardson_lucy(z.clip(1e-6), kernel, num_iter=rounds, clip=False), mirrored
        )

    def cgls(damp: float) -> Array:
        def method(z: Array) -> Array:
            blur = pylops.signalprocessing.Convolve2D(z.shape, h=kernel, offset=centre)
            return pylops.cgls(blur, z.ravel(), niter=50, damp=damp, tol=1e-10)[0].reshape(z.shape)

        return either(method, mirrored)

    field = tuple(scene.truth.shape)
    seen = np.zeros(field, dtype=bool)
    scene.framed(torch.from_numpy(seen))[:] = True
    blur = pylops.Restriction(math.prod(field), np.flatnonzero(seen)) @ pylops.signalprocessing.Convolve2D(
        field, h=kernel, offset=centre
    )
    gradient = pylops.Gradient(field, edge=True, kind="forward")

    def larger_field(damp: float) -> Tensor:
        x = pylops.optimization.leastsquares.regularized_inversion(
            blur, y.ravel(), [gradient], epsRs=[damp], iter_lim=100, atol=1e-6, btol=1e-6
        )[0]
        return scene.framed(torch.from_numpy(x.reshape(field)))

    start = time.perf_counter()
    automatic = unsupervised()
    automatic_seconds = time.perf_counter() - start
    few = 3 if steps < 6 else 4
    return {
        "skimage wiener (oracle)": oracle(scene, wiener, 1e-6, 1e1, 9),
        "skimage unsupervised_wiener": (automatic, None, automatic_seconds),
        "skimage richardson_lucy (oracle)": oracle(scene, richardson_lucy, 2, 200, few),
        "PyLops cgls (oracle)": oracle(scene, cgls, 1e-3, 1e0, few),
        "PyLops regularized_inversion, larger field, Gradient (oracle)": oracle(
            scene, larger_field, 1e-2, 3e-1, few, 2
        ),
    }


def ours(scene: Scene, steps: int) -> dict[str, Any]:
    """What lsconv gives in float32: every prior at its best parameter, and with the one that it chooses itself."""
    y, kernel = scene.y.float(), scene.kernel.float()

    def deconvolved(prior: str, rtol: float) -> Callable[..., Tensor]:
        def restore(value: float | None = None) -> Tensor:
            parameter: dict[str, Any] = {} if value is None else {"weight" if prior == "tv" else "damp": value}
            return lsconv.deconvolve(y, kernel, prior=prior, rtol=rtol, **parameter).x

        return restore

    methods = {
        "identity": (deconvolved("tikhonov", 1e-5), (1e-2, 5e-1, steps)),
        "gradient, the default": (deconvolved("gradient", 1e-5), (1e-2, 5e-1, steps)),
        "total variation": (deconvolved("tv", 1e-3), (2e-5, 2e-3, 4)),
    }
    found: dict[str, Any] = {}
    for name, (method, (low, high, points)) in methods.items():
        found[f"lsconv {name} (oracle)"] = oracle(scene, method, low, high, points, 2)
        start = time.perf_counter()
        picture = method()
        found[f"lsconv {name} (automatic)"] = (picture, None, time.perf_counter() - start)
    return found


def tables(quick: bool) -> Iterator[Table]:
    """A table for every scene."""
    steps = 5 if quick else 6
    summary = []
    for scene in scenes(quick):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            answers = {**peers(scene, steps), **ours(scene, steps)}
        blurred = scene.psnr(scene.y)
        rows = [
            {
                "method": name,
                "PSNR": f"{scene.psnr(picture):.2f}",
                "ISNR": f"{scene.psnr(picture) - blurred:.2f}",
                "PSNR inside": f"{scene.psnr(picture, inside=True):.2f}",
                "parameter": parameter,
                "seconds": seconds,
            }
            for name, (picture, parameter, seconds) in answers.items()
        ]
        yield Table(f"{scene.name}: blurred {blurred:.2f} dB", rows, "Seconds of one run, its parameter given.")
        psnr = {name: scene.psnr(picture) for name, (picture, _, _) in answers.items()}
        summary.append(
            {"scene": scene.name, "blurred": f"{blurred:.2f}"}
            | {name: f"{max(v for k, v in psnr.items() if k.startswith(name)):.2f}" for name in ("skimage", "PyLops")}
            | {"gradient, automatic": f"{psnr['lsconv gradient, the default (automatic)']:.2f}"}
            | {"TV, automatic": f"{psnr['lsconv total variation (automatic)']:.2f}"}
            | {"TV, oracle": f"{psnr['lsconv total variation (oracle)']:.2f}"}
            | {
                f"{short}: oracle less automatic": f"{psnr[f'{name} (oracle)'] - psnr[f'{name} (automatic)']:.2f}"
                for short, name in (("gradient", "lsconv gradient, the default"), ("identity", "lsconv identity"))
            }
        )
    yield Table(
        "In short, PSNR in dB",
        summary,
        "The best that each package reaches with its parameter chosen by the truth, unless called automatic.",
    )
