"""What does one more solve with a kept plan cost, in transforms of the image?

The unit is a pair: one forward and one inverse real transform of as many channels as the image has, in the dtype of the
data, timed in the same rounds. Every solve comes with its certificate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import lsconv
from benchmarks import deblurring
from benchmarks.routes import ball
from benchmarks.runner import Table, race, timed
from lsconv import psf
from lsconv.border.cost_model import Factorise, Limits
from lsconv.border.plan import BorderPlan
from lsconv.factored.axis_channels import AxisAsChannels
from lsconv.inverse.plans.reduced_plan import ReducedPlan
from lsconv.inverse.plans.route_costs import Planes
from lsconv.krylov.plan import Plan

_SOLVES = 60  # of a plan before it is timed, at most; with factors no more


def kernels() -> dict[str, Tensor]:
    """The kernels of the deblurring benchmark, a wide defocus and a random bank."""
    known = deblurring.kernels()
    bank = torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {name: known[name][None, None] for name in ("gaussian", "disk", "motion", "box")} | {
        "defocus 31": psf.disk(15)[None, None],
        "bank 8 to 8": bank,
    }


def operator(kernel: str, size: tuple[int, ...], same: bool, dtype: torch.dtype, channels: int = 1) -> Any:
    """The convolution of a case; ``channels`` share a kernel of one."""
    weight = ball(5, 9) if len(size) == 3 else kernels()[kernel]
    if channels > 1:
        weight = weight.expand(channels, *weight.shape[1:])
    padding = tuple(k // 2 for k in weight.shape[2:]) if same else 0
    return lsconv.Convolution(weight.to(dtype), size, padding=padding, groups=channels)


def _pair(A: lsconv.Convolution) -> Callable[[], Tensor]:
    x, dims = torch.randn(A.in_shape, dtype=A.dtype), tuple(range(-A.ndim, 0))
    return lambda: torch.fft.irfftn(torch.fft.rfftn(x, dim=dims), s=A.spatial_in, dim=dims)


def measure(case: str, A: lsconv.Convolution, relative_damp: float, repeats: int) -> dict[str, Any]:
    """One row."""
    damp = relative_damp * float(lsconv.norm(A, rtol=1e-3))
    pair, y = _pair(A), torch.randn(8, *A.out_shape, dtype=A.dtype, generator=torch.Generator().manual_seed(1))

    first_seconds, plan = timed(lambda: _solved(A, damp, y[0]))
    again, _ = timed(lambda: _solved(A, damp, y[0]))
    setup = math.nan
    inverse: Any = plan.innermost.inverse  # type: ignore[attr-defined]
    for _ in range(_SOLVES):
        if inverse.direct is None and inverse.dense is None:
            plan.solve(y[0])
    if inverse.direct is not None or inverse.dense is not None:
        setup, _ = timed(inverse.factorise)
    iterating = border_plan(A, damp, Limits(factorise=Factorise.NEVER))
    times = race(
        {
            "pair": lambda: [pair() for _ in range(4)],
            "kept": lambda: plan.solve(y[0]),
            "many": lambda: plan.solve(y),
            "iterated": lambda: iterating.solve(y[0]),
        },
        repeats=repeats,
        patience=5.0,
    )
    unit = times["pair"].median / 4
    solution: Any = times["kept"].result
    return {
        "case": case,
        "dtype": str(A.dtype)[6:],
        "damp": relative_damp,
        "pair ms": 1e3 * unit,
        "setup": setup / unit,
        "first": min(first_seconds, again) / unit,
        "iterated": times["iterated"].median / unit,
        "kept": times["kept"].median / unit,
        "kept, of 8": times["many"].median / 8 / unit,
        "MiB": inverse.nbytes / 2**20,
        "iterations": int(solution.iterations.max()),
        "gradient": float(solution.gradient_norm / solution.residual_norm),
        "converged": bool(solution.converged.all()),
    }


def border_plan(A: lsconv.Convolution, damp: float, limits: Limits | None = None) -> Plan:
    """The border's plan of an image, or of the planes of a volume."""
    volume = Planes.of(A, damp)
    if volume is None:
        return BorderPlan(A, damp, limits=limits)
    image = AxisAsChannels.of(A, volume.axis)
    return ReducedPlan(image, BorderPlan(image.B, damp, limits=limits), damp)


def _solved(A: lsconv.Convolution, damp: float, y: Tensor) -> Plan:
    plan = border_plan(A, damp)
    plan.solve(y)
    return plan


def tables(quick: bool) -> Iterator[Table]:
    """Blurs of one channel, valid and same; then channels and a volume."""
    f32, f64 = torch.float32, torch.float64
    repeats = 3 if quick else 5
    rows = []
    if quick:
        plain = [("gaussian", (48, 48), False, f64, 1e-2), ("disk", (40, 64), True, f32, 1e-2)]
    else:
        names = ("gaussian", "disk", "motion", "box", "defocus 31")
        plain = [(k, (256, 256), same, f64, d) for k in names for same in (False, True) for d in (1e-1, 1e-3)]
        plain += [(k, (n, n), False, f64, 1e-2) for k in names[:4] for n in (128, 512)]
        plain += [(k, (n, n), True, f64, 1e-2) for k in names[:4] for n in (128, 512)]
        plain += [(k, (256, 256), False, f64, d) for k in ("gaussian", "motion") for d in (1e-4, 1e-5)]
        plain += [(k, (300, 777), same, f64, 1e-2) for k in ("disk", "motion") for same in (False, True)]
        plain += [(k, (1024, 1024), False, f64, 1e-2) for k in ("disk", "box")]
        plain += [("gaussian", size, False, f64, 1e-2) for size in ((4096, 300), (2048, 2048))]
        plain += [(k, (256, 256), same, f32, 1e-2) for k in ("gaussian", "motion") for same in (False, True)]
    for kernel, size, same, dtype, damp in plain:
        case = f"{kernel} {'×'.join(map(str, size))} {'same' if same else 'valid'}"
        rows.append(measure(case, operator(kernel, size, same, dtype), damp, repeats))
    notes = (
        "In pairs, all but the milliseconds of one: the setup of the factors, the first solve with the setup of its "
        "plan, one more solve that iterates, one more solve of a plan that has been used, and an image of eight in one "
        "call. MiB: of the kept plan. Iterations: of the kept plan; 0 with factors. Gradient: relative to the residual."
    )
    yield Table("A kept plan, one channel", rows, notes)
    if quick:
        return
    rows = [
        measure("gaussian, 3 channels, 256² valid", operator("gaussian", (256, 256), False, f64, 3), 1e-2, repeats),
        measure("bank 8 to 8, 128² valid", operator("bank 8 to 8", (128, 128), False, f64), 1e-2, repeats),
        measure("bank 8 to 8, 256² valid", operator("bank 8 to 8", (256, 256), False, f64), 1e-2, repeats),
        measure("bank 8 to 8, 128² same", operator("bank 8 to 8", (128, 128), True, f64), 1e-1, repeats),
        *(
            measure(f"ball, {'×'.join(map(str, size))} valid", operator("ball", size, False, dtype), damp, repeats)
            for size, dtype, damp in (
                ((8, 32, 32), f64, 1e-2),
                ((16, 64, 64), f64, 1e-1),
                ((16, 64, 64), f64, 1e-2),
                ((16, 64, 64), f64, 1e-3),
                ((16, 64, 64), f32, 1e-2),
                ((32, 96, 96), f32, 1e-2),
            )
        ),
    ]
    yield Table("A kept plan, channels and volumes", rows, notes)
