r"""The report of a restoration: data, restoration, PSF, the residual and its whiteness, and the choice of damp.

Where model and damping are right, the residual y - Ax is close to the noise. Its normalised autocorrelation

    rho[t] = sum_i r[i] r[i + t] / sum_i r[i]^2

is then small at every shift t but zero. Of white noise in N pixels, each of M shifts has a standard deviation of about
1/sqrt(N), so in 99 of 100 cases the largest stays below the normal quantile at 1 - 0.005/M over sqrt(N).

Parts of the image that remain in the residual make neighbours alike, rho > 0. An answer also fits part of the noise n:
under the influence matrix H the residual is (I - H) n, whose neighbours differ, rho < 0. Every answer does, so that a
negative correlation is no sign of a wrong PSF or damping.
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
from lsconv.app.plots import hide_ticks, show_image
from lsconv.app.spectra import draw_spectra

__all__ = ["Evidence", "Whiteness", "draw_pair", "draw_report", "report_figure", "whiteness"]

# The line below the curve of each rule, which says where on the curve the damp was chosen.
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
        correlation: the largest absolute value of the normalised autocorrelation at a shift other than zero.
        shift: that shift, rows and columns.
        bound: the 99 % quantile of ``correlation`` for white noise.
        positive: the largest value, with its sign, of the normalised autocorrelation at a shift other than zero.
    """

    correlation: float
    shift: tuple[int, int]
    bound: float
    positive: float

    @property
    def white(self) -> bool:
        """True where the correlation is within the bound for white noise."""
        return self.correlation <= self.bound

    def __str__(self) -> str:
        row, column = self.shift
        figures = (
            f"autocorrelation up to {self.correlation:.3f}\nat shift {row}, {column}; of white noise {self.bound:.3f}"
        )
        if self.white:
            return f"looks like noise alone\n{figures}"
        if self.positive <= self.bound:
            return f"noise alone, some of it taken up by the answer\n{figures}"
        if self.positive < 0.1:
            return f"nearly noise alone\n{figures}"
        return f"part of the image is left: damp less, or another PSF\n{figures}"


def whiteness(residual: Tensor, max_shift: int = 16) -> Whiteness:
    """Measure the largest autocorrelation of a residual at shifts of a few rows and columns.

    Args:
        residual: ``(..., height, width)``; the sums run over all images and channels, each less its mean.
        max_shift: the largest shift in rows and columns; a quarter of the size where that is less.

    Example:
        >>> whiteness(torch.randn(100, 100)).white
        True
        >>> whiteness(torch.nn.functional.avg_pool2d(torch.randn(1, 101, 101), 2, stride=1)).white
        False
    """
    images = residual.detach().double().cpu().reshape(-1, *residual.shape[-2:])
    images = images - images.mean((-2, -1), keepdim=True)
    height, width = images.shape[-2:]
    down, across = min(max_shift, height // 4), min(max_shift, width // 4)
    power = torch.fft.rfft2(images, (height + down, width + across)).abs().square().sum(0)
    correlation = torch.fft.irfft2(power, (height + down, width + across))
    energy = correlation[0, 0].clone()
    # rho[-t] = rho[t], so that one half of the shifts suffices: downwards, and to the right in the row of shift zero
    half = torch.roll(correlation, across, 1)[: down + 1, : 2 * across + 1] / energy.clamp_min(1e-300)
    half[0, : across + 1] = 0
    largest = int(half.abs().argmax())
    shift = (largest // half.shape[1], largest % half.shape[1] - across)
    shifts = max(1, half.numel() - across - 1)
    quantile = float(torch.special.ndtri(torch.tensor(1 - 0.005 / shifts, dtype=torch.float64)))
    return Whiteness(float(half.abs().max()), shift, quantile / math.sqrt(images.numel()), float(half.max()))


@dataclass(frozen=True, eq=False)
class Evidence:
    """The parts of a report on one item.

    Attributes:
        data: the blurred image less background and offset, ``(channels, *size)``; of a stack the middle slice is shown.
        restored: the restoration, shaped like data.
        kernel: the point spread function.
        residual: data less the blurred restoration; NaN where pixels are missing.
        solution: the result of :func:`lsconv.deconvolve`.
        centre: the index of the PSF's centre; None: the middle.
        standardised: whether the residual is in standard deviations of the noise.
        estimate: the result of :func:`lsconv.estimate_psf`, or None where the PSF was given.
        std: standard deviations of the restoration, shaped like it, or None.
        noise: root mean square of the residual in the image's units; None: computed from ``residual``.
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
            solution: the result of :func:`lsconv.deconvolve` with ``crop=False``.
            x: the part of the answer within the image.
            kernel: the point spread function.
            camera: "background", "offset", "gain" and "read_noise" as :func:`lsconv.deconvolve` had them.
            poisson: whether the noise is that of photons.
            centre, estimate, std: see the class.
        """
        level = data - camera["background"] - camera["offset"]
        residual = level - A(solution.x)
        noise = root_mean_square(residual)
        if poisson:  # the variance of photons follows the brightness
            photons = (data - residual - camera["offset"]) / camera["gain"] + camera["read_noise"] ** 2
            residual = residual / (camera["gain"] * photons.clamp_min(1e-6).sqrt())
        return cls(level.cpu(), x.cpu(), kernel, residual.cpu(), solution, centre, poisson, estimate, std, noise)


def root_mean_square(residual: Tensor) -> float:
    """The root mean square of a residual over the pixels that are not missing."""
    return float(residual[torch.isfinite(residual)].double().square().mean().sqrt().nan_to_num())


def draw_report(path: Path, evidence: Evidence, title: str) -> Whiteness:
    """Draw the report and write it as PNG.

    Args:
        path: the file, written atomically.
        evidence: the parts of the report.
        title: the line on top.

    Returns:
        The residual's whiteness.
    """
    figure, white = report_figure(evidence, title)
    FigureCanvasAgg(figure)
    with atomically(path) as file:
        figure.savefig(file, format="png")
    return white


def report_figure(evidence: Evidence, title: str) -> tuple[Figure, Whiteness]:
    """Draw the report as a figure.

    Args:
        evidence: the parts of the report.
        title: the line on top.

    Returns:
        The figure, and the residual's whiteness.
    """
    kernel, solution = evidence.kernel, evidence.solution
    data, restored, residual = (
        each.unsqueeze(-2) if kernel.ndim == 1 else each
        for each in (evidence.data, evidence.restored, evidence.residual)
    )
    white = whiteness(torch.nan_to_num(residual))
    bars = evidence.std is not None and kernel.ndim > 1
    last = next((each for each in (solution.selection, solution.history) if hasattr(each, "plot")), None)
    curves = [each for each in (evidence.estimate, last) if each is not None]
    count = 3 + bars + len(curves)
    lines = 1 if count <= 4 else 2
    height, width = data.shape[-2:]
    upper = 5.0 * min(max(height / width, 0.4), 1.6)
    figure = Figure(figsize=(11.4, upper + 0.5 + 3.4 * lines), dpi=100, facecolor="white", layout="constrained")
    title = title.encode(errors="backslashreplace").decode()  # names of files need not be valid text
    figure.suptitle("\n".join(textwrap.wrap(title, 120)), fontsize=11, parse_math=False)
    rows: Any = figure.subfigures(2, 1, height_ratios=(upper, 3.4 * lines))
    _draw_images(rows[0], data, restored, kernel)
    panels = rows[1].subplots(lines, -(-count // lines), squeeze=False).ravel()
    for axes in panels[count:]:
        axes.set_axis_off()
    _draw_psf(panels[0], kernel, evidence.centre or tuple(k // 2 for k in kernel.size))
    _draw_residual(rows[1], panels[1], _middle(residual, kernel), white)
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
        heading = (f"choice of damp by {curve.rule}" if curve is solution.selection
                 else "estimate of the PSF" if curve is evidence.estimate else "convergence")  # fmt: skip
        axes.set_title(heading, fontsize=10)
        if curve is solution.selection:
            axes.set_xlabel(_wrapped(f"damp\n{_MEANINGS[curve.rule]}"))
    for axes in panels[2:]:
        axes.tick_params(which="both", labelsize=8)
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set_fontsize(8)
        if axes.get_legend() is not None:
            axes.legend(fontsize=7)
    return figure, white


def draw_pair(folder: Path, name: str, evidence: Evidence) -> None:
    """Write data and restoration on one grey scale, in their own pixels: NAME.data.png and NAME.restoration.png.

    Nothing is written of a signal; of a stack the middle slice is.
    """
    if evidence.kernel.ndim == 1:
        return
    shown = [torch.nan_to_num(_middle(image, evidence.kernel)) for image in (evidence.data, evidence.restored)]
    low, high = _grey_range(shown[0])
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
    low, high = _grey_range(torch.nan_to_num(_middle(data, kernel)))
    for axes, image, name in zip(figure.subplots(1, 2), (data, restored), ("data", "restoration"), strict=True):
        show_image(axes, (torch.nan_to_num(_middle(image, kernel)) - low) / (high - low))
        slices = f", slice {data.shape[-3] // 2 + 1} of {data.shape[-3]}" if kernel.ndim == 3 else ""
        missing = torch.isnan(_middle(image, kernel)).any(0)
        remark = ""
        if missing.any():
            remark = f", {int(missing.sum())} missing in red"
            overlay = torch.tensor([1.0, 0.0, 0.0, 1.0]) * missing[..., None]
            axes.imshow(overlay.numpy(), interpolation="nearest")
        axes.set_title(f"{name}{slices}, {low:.3g} to {high:.3g}{remark}", fontsize=10)


def _wrapped(text: str) -> str:
    """The text with its lines wrapped to the width of a panel."""
    return "\n".join(textwrap.fill(line, 36) for line in text.splitlines())


def _middle(image: Tensor, kernel: Kernel) -> Tensor:
    """``(channels, height, width)``: the image itself, or the middle slice of a stack."""
    shown = image.detach().float().cpu()
    return shown[:, shown.shape[1] // 2] if kernel.ndim == 3 else shown


def _grey_range(data: Tensor) -> tuple[float, float]:
    """The values shown as black and white: 0 and 1 for data about in [0, 1], else the lowest and highest."""
    low, high = float(data.min()), float(data.max())
    return (0.0, 1.0) if low >= -0.05 and 0.05 < high <= 1.05 else (low, max(high, low + 1e-12))


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
    hide_ticks(axes)
    axes.set_title("standard deviation", fontsize=10)
    figure.colorbar(drawn, ax=axes, shrink=0.8).ax.tick_params(labelsize=8)


def _draw_residual(figure: Any, axes: Any, residual: Tensor, white: Whiteness) -> None:
    plane = residual.mean(0)
    channels = ", mean of the channels" if residual.shape[0] > 1 else ""
    axes.set_title(f"residual{channels}", fontsize=10)
    axes.set_xlabel(_wrapped(str(white)), fontsize=8)
    if len(plane) == 1:
        axes.plot(plane[0].numpy(), linewidth=0.5)
        axes.tick_params(labelsize=8)
        return
    measured = plane[torch.isfinite(plane)]
    limit = max(3 * float(measured.std()), 1e-12) if measured.numel() > 1 else 1.0
    drawn = axes.imshow(plane.numpy(), cmap="gray", vmin=-limit, vmax=limit, interpolation="nearest")
    hide_ticks(axes)
    bar = figure.colorbar(drawn, ax=axes, shrink=0.8)
    bar.ax.tick_params(labelsize=8)
