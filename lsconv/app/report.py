r"""The report of a restoration: data, restoration, PSF, residual and how white it is, and how damp was chosen.

Where model and damping are right, the residual y - Ax is close to the noise. Its normalised autocorrelation

    rho[t] = sum_i r[i] r[i + t] / sum_i r[i]^2

is then small at every shift t but zero. Of white noise in N pixels, each of M shifts has a standard deviation of about
1/sqrt(N), so in 99 of 100 cases the largest stays below the normal quantile at 1 - 0.005/M over sqrt(N).

What is left of the image makes neighbours alike, rho > 0. The noise that the answer takes up, (I - H) n of the noise n
under the influence H, makes them differ, rho < 0; every answer takes up some, so that is no cause for alarm.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from lsconv.app.arguments import Kernel
from lsconv.app.image_io import Picture, atomically, write_picture
from lsconv.app.picture import quantised
from lsconv.app.spectra import draw_spectra

__all__ = ["Evidence", "Whiteness", "draw_pair", "draw_report", "report_figure", "whiteness"]


# A line under the curve of every rule.
_MEANINGS = {
    "gcv": "lowest where pixels left out are predicted best",
    "discrepancy": "where the residual is as large as the noise",
    "upre": "lowest where the blurred answer is predicted best",
    "lcurve": "highest at the corner of misfit and roughness",
    "evidence": "lowest where the data are likeliest",
}


@dataclass(frozen=True)
class Whiteness:
    """The distance of a residual from white noise.

    Attributes:
        correlation: the largest absolute normalised autocorrelation at a shift other than zero.
        shift: that shift, rows and columns.
        bound: what it stays below in 99 of 100 cases of white noise.
        alike: the largest autocorrelation with its sign at a shift other than zero.
    """

    correlation: float
    shift: tuple[int, int]
    bound: float
    alike: float

    @property
    def white(self) -> bool:
        """Tell whether white noise would do that, in 99 of 100 cases."""
        return self.correlation <= self.bound

    def __str__(self) -> str:
        row, column = self.shift
        figures = (
            f"autocorrelation up to {self.correlation:.3f}\nat shift {row}, {column}; of white noise {self.bound:.3f}"
        )
        if self.white:
            return f"looks like noise alone\n{figures}"
        if self.alike <= self.bound:
            return f"noise alone, some of it taken up by the answer\n{figures}"
        slight = self.alike < 0.1
        verdict = "nearly noise alone" if slight else "part of the image is left: damp less, or another PSF"
        return f"{verdict}\n{figures}"


def whiteness(residual: Tensor, reach: int = 16) -> Whiteness:
    """The largest autocorrelation of a residual at shifts of up to ``reach`` rows and columns.

    Args:
        residual: ``(..., height, width)``; the sums run over all pictures and channels, each less its mean.
        reach: the largest shift; a quarter of the picture where that is less.

    Example:
        >>> whiteness(torch.randn(100, 100)).white
        True
        >>> whiteness(torch.nn.functional.avg_pool2d(torch.randn(1, 101, 101), 2, stride=1)).white
        False
    """
    pictures = residual.detach().double().cpu().reshape(-1, *residual.shape[-2:])
    pictures = pictures - pictures.mean((-2, -1), keepdim=True)
    height, width = pictures.shape[-2:]
    down, across = min(reach, height // 4), min(reach, width // 4)
    power = torch.fft.rfft2(pictures, (height + down, width + across)).abs().square().sum(0)
    correlation = torch.fft.irfft2(power, (height + down, width + across))
    energy = correlation[0, 0].clone()
    right = torch.roll(correlation, across, 1)[: down + 1, : 2 * across + 1] / energy.clamp_min(1e-300)
    right[0, : across + 1] = 0  # shift zero, and those left of it in its row, which mirror the ones to the right
    largest = int(right.abs().argmax())
    shift = (largest // right.shape[1], largest % right.shape[1] - across)
    shifts = max(1, right.numel() - across - 1)
    quantile = float(torch.special.ndtri(torch.tensor(1 - 0.005 / shifts, dtype=torch.float64)))
    return Whiteness(float(right.abs().max()), shift, quantile / math.sqrt(pictures.numel()), float(right.max()))


@dataclass(frozen=True, eq=False)
class Evidence:
    """The parts of a report on one item.

    Attributes:
        data: the blurred image less background and offset, ``(channels, *size)``; of a stack the middle slice is shown.
        restored: the restoration, shaped like data.
        kernel: the point spread function.
        residual: data less the blurred restoration; NaN where pixels are missing.
        solution: what :func:`lsconv.deconvolve` returned.
        centre: the PSF's; None: the middle.
        standardised: whether the residual is in standard deviations of the noise.
        estimate: what :func:`lsconv.estimate_psf` returned, or None where the PSF was given.
        std: standard deviations of the restoration, shaped like it, or None.
        noise: root mean square of the residual in the image's units, where the residual is in others.
    """

    data: Tensor
    restored: Tensor
    kernel: Kernel
    residual: Tensor
    solution: Any
    centre: tuple[int, ...] | None = None
    standardised: bool = False
    estimate: Any = None
    std: Tensor | None = None
    noise: float | None = None

    @classmethod
    def of(
        cls,
        data: Tensor,
        A: Any,
        solution: Any,
        x: Tensor,
        kernel: Kernel,
        camera: Mapping[str, float],
        *,
        poisson: bool,
        centre: tuple[int, ...] | None = None,
        estimate: Any = None,
        std: Tensor | None = None,
    ) -> Evidence:
        """Gather the evidence about a restoration.

        Args:
            data: the blurred image, ``(channels, *size)``, NaN where pixels are missing.
            A: the blur of the whole field.
            solution: what :func:`lsconv.deconvolve` returned with ``crop=False``.
            x: the part of its answer that the image shows.
            kernel: the point spread function.
            camera: background, offset, gain and read noise as the solver had them.
            poisson: whether the noise is that of photons.
            centre, estimate, std: see the class.
        """
        level = data - camera["background"] - camera["offset"]
        residual = level - A(solution.x)
        noise = root_mean_square(residual)
        if poisson:  # in standard deviations, which photons make uneven
            photons = (data - residual - camera["offset"]) / camera["gain"] + camera["read_noise"] ** 2
            residual = residual / (camera["gain"] * photons.clamp_min(1e-6).sqrt())
        return cls(level.cpu(), x.cpu(), kernel, residual.cpu(), solution, centre, poisson, estimate, std, noise)


def root_mean_square(residual: Tensor) -> float:
    """The root mean square of what was measured of a residual."""
    return float(residual[torch.isfinite(residual)].double().square().mean().sqrt().nan_to_num())


def draw_report(path: Path, evidence: Evidence, title: str) -> Whiteness:
    """Draw the report and write it as PNG.

    Args:
        path: the file, written atomically.
        evidence: what to show.
        title: the line on top.

    Returns:
        The residual's whiteness.
    """
    figure, judged = report_figure(evidence, title)
    FigureCanvasAgg(figure)
    with atomically(path) as file:
        figure.savefig(file, format="png")
    return judged


def report_figure(evidence: Evidence, title: str) -> tuple[Figure, Whiteness]:
    """The report as a figure, and the residual's whiteness."""
    kernel, solution = evidence.kernel, evidence.solution
    data, restored, residual = (
        each.unsqueeze(-2) if kernel.ndim == 1 else each
        for each in (evidence.data, evidence.restored, evidence.residual)
    )
    judged = whiteness(torch.nan_to_num(residual))
    bars = evidence.std is not None and kernel.ndim > 1
    last = next((each for each in (solution.selection, solution.history) if hasattr(each, "plot")), None)
    curves = [each for each in (evidence.estimate, last) if each is not None]
    count = 3 + bars + len(curves)
    lines = 1 if count <= 4 else 2
    height, width = data.shape[-2:]
    upper = 5.0 * min(max(height / width, 0.4), 1.6)
    figure = Figure(figsize=(11.4, upper + 0.5 + 3.4 * lines), dpi=100, facecolor="white", layout="constrained")
    said = title.encode(errors="backslashreplace").decode()  # names of files need not be text
    figure.suptitle("\n".join(textwrap.wrap(said, 120)), fontsize=11, parse_math=False)
    rows: Any = figure.subfigures(2, 1, height_ratios=(upper, 3.4 * lines))
    _draw_images(rows[0], data, restored, kernel)
    panels = rows[1].subplots(lines, -(-count // lines), squeeze=False).ravel()
    for axes in panels[count:]:
        axes.set_axis_off()
    _draw_psf(panels[0], kernel, evidence.centre or tuple(k // 2 for k in kernel.size))
    _draw_residual(rows[1], panels[1], _middle(residual, kernel), judged)
    if evidence.standardised:
        panels[1].set_title("residual / standard deviation", fontsize=10)
    noise = root_mean_square(residual) if evidence.noise is None else evidence.noise
    draw_spectra(panels[2], _middle(data, kernel), _middle(restored, kernel), noise)
    panels[2].set_title("spectra", fontsize=10)
    if bars:
        assert evidence.std is not None
        _draw_deviations(rows[1], panels[3], _middle(evidence.std, kernel))
    for axes, curve in zip(panels[3 + bars :], curves, strict=False):
        curve.plot(axes)
        named = (f"choice of damp by {curve.rule}" if curve is solution.selection
                 else "estimate of the PSF" if curve is evidence.estimate else "convergence")  # fmt: skip
        axes.set_title(named, fontsize=10)
        if curve is solution.selection:
            axes.set_xlabel(_narrow(f"damp\n{_MEANINGS[curve.rule]}"))
    for axes in panels[2:]:
        axes.tick_params(which="both", labelsize=8)
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set_fontsize(8)
        if axes.get_legend() is not None:
            axes.legend(fontsize=7)
    return figure, judged


def draw_pair(folder: Path, name: str, evidence: Evidence) -> None:
    """Write data and restoration pixel by pixel and on one scale: ``NAME.data.png`` and ``NAME.restoration.png``."""
    if evidence.kernel.ndim == 1:
        return
    shown = [torch.nan_to_num(_middle(image, evidence.kernel)) for image in (evidence.data, evidence.restored)]
    low, high = _range(shown[0])
    for kind, image in zip(("data", "restoration"), shown, strict=True):
        image = image if image.shape[0] == 3 else image[:1]
        grey = quantised(((image - low) / (high - low)).clamp(0, 1).movedim(0, -1).numpy(), np.dtype(np.uint8))
        write_picture(folder / f"{name}.{kind}.png", Picture(grey))


def _draw_images(figure: Any, data: Tensor, restored: Tensor, kernel: Kernel) -> None:
    """Draw data and restoration on one scale, of a stack the middle slice, or both curves of a signal."""
    if kernel.ndim == 1:
        axes = figure.subplots()
        axes.plot(data[0, 0].numpy(), label="data", linewidth=0.8)
        axes.plot(restored[0, 0].numpy(), label="restoration", linewidth=0.8)
        axes.legend(fontsize=8)
        return
    low, high = _range(torch.nan_to_num(_middle(data, kernel)))
    for axes, image, name in zip(figure.subplots(1, 2), (data, restored), ("data", "restoration"), strict=True):
        _show(axes, (torch.nan_to_num(_middle(image, kernel)) - low) / (high - low))
        slices = f", slice {data.shape[-3] // 2 + 1} of {data.shape[-3]}" if kernel.ndim == 3 else ""
        missing = torch.isnan(_middle(image, kernel)).any(0)
        red = f", {int(missing.sum())} missing in red" if missing.any() else ""
        if missing.any():
            overlay = torch.tensor([1.0, 0.0, 0.0, 1.0]) * missing[..., None]
            axes.imshow(overlay.numpy(), interpolation="nearest")
        axes.set_title(f"{name}{slices}, {low:.3g} to {high:.3g}{red}", fontsize=10)


def _narrow(text: str) -> str:
    """The lines of a text broken to the width of a panel."""
    return "\n".join(textwrap.fill(line, 36) for line in text.splitlines())


def _middle(image: Tensor, kernel: Kernel) -> Tensor:
    """``(channels, height, width)``: the image itself, or the middle slice of a stack."""
    shown = image.detach().float().cpu()
    return shown[:, shown.shape[1] // 2] if kernel.ndim == 3 else shown


def _range(picture: Tensor) -> tuple[float, float]:
    """[0, 1] for pictures that lie in it, else the values of the data."""
    low, high = float(picture.min()), float(picture.max())
    return (0.0, 1.0) if low >= -0.05 and 0.05 < high <= 1.05 else (low, max(high, low + 1e-12))


def _show(axes: Any, picture: Tensor) -> None:
    picture = picture.clamp(0, 1)
    picture = picture if picture.shape[0] == 3 else picture[:1].expand(3, -1, -1)
    axes.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def _draw_psf(axes: Any, kernel: Kernel, centre: tuple[int, ...]) -> None:
    values = kernel.values.detach().float().cpu()
    values = values.reshape(-1, *kernel.size)[0]
    plane = values[len(values) // 2] if kernel.ndim == 3 else values.reshape(-1, values.shape[-1])
    if kernel.ndim == 1:
        axes.plot(plane[0].numpy(), marker=".", linewidth=0.8)
    else:
        axes.imshow(plane.numpy(), cmap="gray", vmin=0, interpolation="nearest")
    size = "×".join(map(str, kernel.size))
    axes.set_title(f"PSF, {size}, its centre at {', '.join(map(str, centre))}", fontsize=10)
    axes.plot(centre[-1], centre[-2] if kernel.ndim > 1 else float(plane[0, centre[-1]]), "+", color="tab:red")
    axes.tick_params(labelsize=8)


def _draw_deviations(figure: Any, axes: Any, std: Tensor) -> None:
    drawn = axes.imshow(std.mean(0).numpy(), cmap="magma", interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title("standard deviation", fontsize=10)
    figure.colorbar(drawn, ax=axes, shrink=0.8).ax.tick_params(labelsize=8)


def _draw_residual(figure: Any, axes: Any, residual: Tensor, judged: Whiteness) -> None:
    plane = residual.mean(0)
    channels = ", mean of the channels" if residual.shape[0] > 1 else ""
    axes.set_title(f"residual{channels}", fontsize=10)
    axes.set_xlabel(_narrow(str(judged)), fontsize=8)
    if len(plane) == 1:
        axes.plot(plane[0].numpy(), linewidth=0.5)
        axes.tick_params(labelsize=8)
        return
    measured = plane[torch.isfinite(plane)]
    limit = max(3 * float(measured.std()), 1e-12) if measured.numel() > 1 else 1.0
    drawn = axes.imshow(plane.numpy(), cmap="gray", vmin=-limit, vmax=limit, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    bar = figure.colorbar(drawn, ax=axes, shrink=0.8)
    bar.ax.tick_params(labelsize=8)
