r"""The report of a restoration: data, restoration, PSF, residual and how white it is, and how damp was chosen.

Where model and damping are right, the residual y - Ax is close to the noise. Its normalised autocorrelation

    rho[t] = sum_i r[i] r[i + t] / sum_i r[i]^2

is then small at every shift t but zero. Of white noise in N pixels, each of M shifts has a standard deviation of about
1/sqrt(N), so in 99 of 100 cases the largest stays below the normal quantile at 1 - 0.005/M over sqrt(N).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from lsconv.app.image_io import atomically
from lsconv.app.requests import Kernel

__all__ = ["Whiteness", "draw_report", "whiteness"]


@dataclass(frozen=True)
class Whiteness:
    """How far a residual is from white noise.

    Attributes:
        correlation: the largest absolute normalised autocorrelation at a shift other than zero.
        shift: that shift, rows and columns.
        bound: what it stays below in 99 of 100 cases of white noise.
    """

    correlation: float
    shift: tuple[int, int]
    bound: float

    @property
    def white(self) -> bool:
        """Tell whether white noise would do that, in 99 of 100 cases."""
        return self.correlation <= self.bound

    def __str__(self) -> str:
        row, column = self.shift
        verdict = "white noise: below" if self.white else "not white; white noise: below"
        return (
            f"autocorrelation up to {self.correlation:.3f} (shift {row}, {column})\n{verdict} {self.bound:.3f} in 99 %"
        )


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
    return Whiteness(float(right.abs().max()), shift, quantile / math.sqrt(pictures.numel()))


def draw_report(
    path: Path, data: Tensor, restored: Tensor, kernel: Kernel, residual: Tensor, solution: Any, title: str
) -> Whiteness:
    """Draw the report and write it as PNG.

    Args:
        path: the file, written atomically.
        data: the blurred picture, ``(..., channels, *size)``; of a stack the middle picture is shown.
        restored: the restoration, shaped like data.
        kernel: the point spread function.
        residual: data less the blurred restoration.
        solution: what :func:`lsconv.deconvolve` returned.
        title: the line on top.

    Returns:
        The residual's whiteness.
    """
    judged = whiteness(residual)
    last = next((each for each in (solution.selection, solution.history) if hasattr(each, "plot")), None)
    height, width = data.shape[-2:]
    upper = 5.0 * min(max(height / width, 0.4), 1.6)
    figure = Figure(figsize=(10.4, upper + 4.0), dpi=100, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    rows: Any = figure.subfigures(2, 1, height_ratios=(upper, 3.4))
    pair = rows[0].subplots(1, 2)
    shown = _middle(data, kernel), _middle(restored, kernel)
    low, high = _range(shown[0])
    for axes, picture, name in zip(pair, shown, ("data", "restoration"), strict=True):
        _show(axes, (picture - low) / (high - low))
        axes.set_title(name, fontsize=10)
    panels = rows[1].subplots(1, 2 if last is None else 3)
    _draw_psf(figure, panels[0], kernel)
    _draw_residual(rows[1], panels[1], _middle(residual, kernel), judged)
    if last is not None:
        last.plot(panels[2])
        chosen = last is solution.selection
        panels[2].set_title(f"choice of damp by {last.rule}" if chosen else "convergence", fontsize=10)
        panels[2].tick_params(which="both", labelsize=8)
        for label in (panels[2].xaxis.label, panels[2].yaxis.label):
            label.set_fontsize(9)
        if panels[2].get_legend() is not None:
            panels[2].legend(fontsize=8)
    with atomically(path) as file:
        figure.savefig(file, format="png")
    return judged


def _middle(pictures: Tensor, kernel: Kernel) -> Tensor:
    """``(channels, height, width)``: the picture itself, or the middle one of a stack."""
    pages = kernel.pages_of(pictures.detach().float().cpu())
    pages = pages.reshape(-1, *pages.shape[-3:])
    return pages[len(pages) // 2]


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


def _draw_psf(figure: Figure, axes: Any, kernel: Kernel) -> None:
    values = kernel.values.detach().float().cpu()
    values = values.reshape(-1, *values.shape[-2:])
    plane = values[len(values) // 2] if kernel.ndim == 3 else values[0]
    axes.imshow(plane.numpy(), cmap="gray", vmin=0, interpolation="nearest")
    size = "×".join(map(str, kernel.size))
    axes.set_title(f"PSF, {size}, its centre at {', '.join(str(k // 2) for k in kernel.size)}", fontsize=10)
    axes.plot(plane.shape[1] // 2, plane.shape[0] // 2, "+", color="tab:red")
    axes.tick_params(labelsize=8)


def _draw_residual(figure: Any, axes: Any, residual: Tensor, judged: Whiteness) -> None:
    plane = residual.mean(0)
    limit = max(3 * float(plane.std()), 1e-12) if plane.numel() > 1 else 1.0
    drawn = axes.imshow(plane.numpy(), cmap="gray", vmin=-limit, vmax=limit, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    channels = ", mean of the channels" if residual.shape[0] > 1 else ""
    axes.set_title(f"residual{channels}", fontsize=10)
    axes.set_xlabel(str(judged), fontsize=8)
    bar = figure.colorbar(drawn, ax=axes, shrink=0.8)
    bar.ax.tick_params(labelsize=8)
