"""Problems drawn from the whole signature, each a function of one integer, small enough for a dense matrix."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import lsconv
from benchmarks.certificates.judge import Dense

__all__ = ["KINDS", "Problem", "draw"]

KINDS = ("random", "blur", "symbol zeros", "polynomial", "nearly deficient", "equal channels", "badly scaled", "one tap",
         "zero", "whole image")  # fmt: skip
_CHANCES = (0.16, 0.14, 0.12, 0.18, 0.12, 0.08, 0.09, 0.05, 0.01, 0.05)
_ZEROS = (-0.3, 0.3, -1, 1, 1.1, -1.1, 0.5, -2, 0.9, 0.05, 20, 1 + 1e-3, 1 - 1e-3, 1 + 1e-6, -1 - 1e-8, 1j, 0.6 + 0.8j)
_MOST = 150


@dataclass
class Problem:
    """An operator, its data and damping, and their dense counterparts.

    Attributes:
        seed: the integer it is drawn from.
        A: the operator.
        kind: the kind of its kernel.
        masked: the outputs are masked.
        y: the data, ``(items, *out_shape)``.
        items: the kind of each item.
        damp: the damping, a number or a tensor with one per item.
        rtol: the tolerance asked for; None: the method's own.
        matrix: the dense matrix, in double precision.
        prior: where the penalty pulls to, or None.
        stacks: decompositions of [A; damp L], by penalty and damping.
    """

    seed: int
    A: lsconv.LinearOperator
    kind: str
    masked: bool
    y: Tensor
    items: list[str]
    damp: float | Tensor
    rtol: float | None
    matrix: NDArray[Any]
    prior: Tensor | None
    dense: Dense = field(repr=False)
    stacks: dict[tuple[str, float], Dense] = field(default_factory=dict, repr=False)

    @property
    def bits(self) -> int:
        """32 or 64."""
        return int(torch.finfo(self.A.dtype).bits)

    def __str__(self) -> str:
        damp = self.damp if isinstance(self.damp, float) else [f"{d:.1e}" for d in self.damp.tolist()]
        return f"seed {self.seed}, {self.kind}: {self.A!r}, damp={damp}, rtol={self.rtol}, items {self.items}"


def draw(seed: int) -> Problem | None:
    """The problem of this seed; None where the kernel cancels itself, so that the matrix is all rounding."""
    rng = np.random.default_rng(seed)
    dtype = (torch.float32, torch.float64, torch.complex64, torch.complex128)[rng.choice(4, p=(0.4, 0.4, 0.1, 0.1))]
    weight, kind, layout = _convolution(rng, dtype)
    A: lsconv.LinearOperator = lsconv.Convolution(weight, **layout)
    matrix = _matrix(weight, layout)
    largest = float(np.abs(matrix).max(initial=0))
    taps = float(weight.abs().max())
    if taps > 0 and largest < 1e-6 * taps:
        return None
    masked = bool(rng.random() < 0.1)
    if masked:
        mask = torch.from_numpy(rng.random(A.out_shape) > rng.choice([0.1, 0.3, 0.7]))
        A = lsconv.Mask(mask, dtype=dtype) @ A
        matrix = matrix * mask.flatten().numpy()[:, None]
    dense = Dense(matrix)
    many = int(rng.choice([1, 4, 12, 24], p=(0.1, 0.2, 0.4, 0.3)))
    y, items = _data(rng, dense, many, dtype)
    damp = _damp(rng, dense.norm, many)
    single = torch.finfo(dtype).bits == 32
    rtol = None if rng.random() < 0.7 else float(10 ** rng.uniform(*((-5.5, -2) if single else (-11, -3))))
    prior = _numbers(rng, (1, *A.in_shape), dtype) if rng.random() < 0.3 else None
    if prior is not None and dense.norm > 0:
        prior = prior * float(np.linalg.norm(y[0].numpy()) / dense.norm / math.sqrt(prior.numel()))
        if not bool(torch.isfinite(prior).all()):
            prior = None
    return Problem(seed, A, kind, masked, y.reshape(many, *A.out_shape), items, damp, rtol, matrix, prior, dense)


def _numbers(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    values = rng.standard_normal(shape)
    if dtype.is_complex:
        values = values + 1j * rng.standard_normal(shape)
    return torch.from_numpy(values).to(dtype)


# ------------------------------------------------------------------ the operator


def _convolution(rng: np.random.Generator, dtype: torch.dtype) -> tuple[Tensor, str, dict[str, Any]]:
    ndim = int(rng.choice([1, 2, 3], p=(0.5, 0.35, 0.15)))
    mode = str(rng.choice(["zeros", "circular", "reflect", "replicate"], p=(0.56, 0.2, 0.12, 0.12)))
    groups = 2 if rng.random() < 0.15 else 1
    pairs = [(1, 1), (2, 2), (1, 2), (2, 1), (3, 2), (2, 3), (3, 3)]
    c_in, c_out = pairs[rng.choice(7, p=(0.5, 0.15, 0.1, 0.1, 0.05, 0.05, 0.05))]
    kind = KINDS[rng.choice(len(KINDS), p=_CHANCES)]
    if kind == "equal channels":
        c_in, c_out = pairs[1 + rng.choice(6)]
    plain = rng.random() < 0.5  # stride and dilation of one
    size, kernel, stride, dilation, padding = [], [], [], [], []
    cells = int(2 ** rng.uniform(3, math.log2(_MOST))) // (c_in * groups)
    spelling = str(
        rng.choice(["valid", "same", "full", "causal", "any", "wider"], p=(0.2, 0.4, 0.08, 0.08, 0.16, 0.08))
    )
    for axis in range(ndim):
        most = max(1, int(round(cells ** (1 / (ndim - axis)))))
        n = int(rng.integers(min(2, most), min(most, {1: 150, 2: 14, 3: 6}[ndim]) + 1))
        if ndim == 1:
            n = max(4, min(n, int(rng.choice([20, 40, 150]))))
        cells //= n
        k = int(rng.integers(1, {1: 8, 2: 6, 3: 4}[ndim]))
        if kind == "polynomial":
            k = int(rng.integers(2, 6 if ndim < 3 else 4))
        d, s = (1, 1) if plain else (int(rng.choice([1, 2, 3], p=(0.6, 0.3, 0.1))), int(rng.choice([1, 2, 3])))
        if kind == "whole image":
            k, d = n, 1
        if kind == "one tap" and rng.random() < 0.5:
            k = 1
        if spelling == "same":
            s = 1
        extent = d * (k - 1) + 1
        left, right = {
            "valid": (0, 0),
            "same": ((extent - 1) // 2, extent - 1 - (extent - 1) // 2),
            "full": (extent - 1, extent - 1),
            "causal": (extent - 1, 0),
            "any": (int(rng.integers(extent)), int(rng.integers(extent))),
            "wider": (extent + int(rng.integers(3)), extent + int(rng.integers(3))),
        }[spelling]
        limit = {"zeros": 10**6, "replicate": 10**6, "circular": n, "reflect": n - 1}[mode]
        left, right = min(left, limit), min(right, limit)
        if n + left + right < extent:
            d = 1
            k = extent = min(k, n)
            left, right = min(left, k), min(right, k)
        for values, value in zip((size, kernel, stride, dilation, padding), (n, k, s, d, (left, right)), strict=True):
            values.append(value)
    weight = _kernel(rng, kind, (groups * c_out, c_in, *kernel), groups)
    weight = weight * float(10 ** rng.uniform(-2, 2)) if rng.random() < 0.5 else weight
    if not dtype.is_complex:
        weight = weight.real
    elif rng.random() < 0.7:
        weight = weight * np.exp(2j * np.pi * rng.random(weight.shape[:2])).reshape(*weight.shape[:2], *(1,) * ndim)
    layout = {"in_size": tuple(size), "stride": tuple(stride), "padding": tuple(padding), "dilation": tuple(dilation),
              "groups": groups, "padding_mode": mode}  # fmt: skip
    return torch.from_numpy(np.ascontiguousarray(weight)).to(dtype), kind, layout


def _kernel(rng: np.random.Generator, kind: str, shape: tuple[int, ...], groups: int) -> NDArray[Any]:
    taps, (c_out, c_in) = shape[2:], shape[:2]
    random = rng.standard_normal(shape)
    if kind == "blur":
        axes = [np.arange(k) - (k - 1) / 2 for k in taps]
        r2 = sum(np.meshgrid(*(a**2 for a in axes), indexing="ij"))
        width = rng.uniform(0.5, 3)
        form = [np.exp(-r2 / 2 / width**2), np.ones(taps), (r2 <= max(1.0, max(taps) / 2) ** 2) * 1.0][rng.choice(3)]
        mix = np.abs(random[(..., *(0,) * len(taps))]) if rng.random() < 0.5 else np.eye(c_out, c_in) + 0.1
        return mix.reshape(c_out, c_in, *(1,) * len(taps)) * (form / form.sum())
    if kind == "symbol zeros":
        if rng.random() < 0.5:
            return random - random.mean(tuple(range(2, random.ndim)), keepdims=True)
        return random[(..., *(slice(0, 1),) * len(taps))] * _outer([_unit_zeros(rng, k) for k in taps])
    if kind == "polynomial":
        return random[(..., *(slice(0, 1),) * len(taps))] * _outer([_polynomial(rng, k) for k in taps])
    if kind in ("nearly deficient", "equal channels"):
        small = 10 ** rng.uniform(-15, -2) if kind == "nearly deficient" else 0.0
        if c_out > groups and (c_in == 1 or rng.random() < 0.5):
            grouped = random.reshape(groups, c_out // groups, c_in, *taps)
            return np.ascontiguousarray((grouped[:, :1] + small * grouped).reshape(shape))
        if c_in > 1:
            return random[:, :1] + small * random
        zero = 1 + rng.choice([-1, 1]) * small
        return random[(..., *(slice(0, 1),) * len(taps))] * _outer(
            [np.poly([zero * rng.choice([-1, 1]), *rng.choice([0.3, -0.3, 2, -2], max(k - 2, 0))])[:k] for k in taps]
        )
    if kind == "badly scaled":
        if rng.random() < 0.5:
            return random * 10.0 ** rng.choice([-12, 12])
        powers = 10.0 ** rng.uniform(-6, 6, (c_out, 1) if rng.random() < 0.5 else (1, c_in))
        return random * powers.reshape(*powers.shape, *(1,) * len(taps))
    if kind == "one tap":
        place = tuple(int(rng.integers(k)) for k in taps)
        kernel = np.zeros(shape)
        kernel[(..., *place)] = random[(..., *place)]
        return kernel
    return random * (kind != "zero")


def _outer(factors: list[NDArray[Any]]) -> NDArray[Any]:
    kernel = factors[0]
    for factor in factors[1:]:
        kernel = np.multiply.outer(kernel, factor)
    return kernel


def _unit_zeros(rng: np.random.Generator, k: int) -> NDArray[Any]:
    """k taps with zeros on the unit circle, of any order."""
    angles = rng.choice([0, np.pi, np.pi / 2, 2 * np.pi / 3, rng.uniform(0, np.pi)], k)
    kernel = np.ones(1)
    for angle in angles:
        factor = [1, -math.cos(angle)] if angle in (0, np.pi) else [1, -2 * math.cos(angle), 1]
        if kernel.size + len(factor) - 1 <= k:
            kernel = np.convolve(kernel, factor)
    return np.concatenate([kernel, np.zeros(k - kernel.size)])


def _polynomial(rng: np.random.Generator, k: int) -> NDArray[Any]:
    """k taps with given zeros, on the unit circle, near to it, and off it."""
    zeros: list[complex] = []
    while len(zeros) < k - 1:
        zero = complex(_ZEROS[rng.choice(len(_ZEROS))])
        zeros += [zero] if zero.imag == 0 or len(zeros) == k - 2 else [zero, zero.conjugate()]
    return np.real(np.poly([z if abs(np.imag(sum(zeros))) < 1e-12 else z.real or 0.5 for z in zeros]))


def _matrix(weight: Tensor, layout: dict[str, Any]) -> NDArray[Any]:
    """The dense matrix by torch's own padding and convolution, in double precision."""
    double = torch.complex128 if weight.is_complex() else torch.float64
    size, groups = layout["in_size"], layout["groups"]
    unit = torch.eye(weight.shape[1] * groups * math.prod(size), dtype=double)
    unit = unit.reshape(-1, weight.shape[1] * groups, *size)
    pads = [amount for pair in reversed(layout["padding"]) for amount in pair]
    mode = {"zeros": "constant"}.get(layout["padding_mode"], layout["padding_mode"])
    convolve = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)[len(size) - 1]
    padded = torch.nn.functional.pad(unit, pads, mode)
    y = convolve(padded, weight.to(double), stride=layout["stride"], dilation=layout["dilation"], groups=groups)
    return np.ascontiguousarray(y.flatten(1).T.numpy())


# ------------------------------------------------------------------ data and damping


def _data(rng: np.random.Generator, dense: Dense, many: int, dtype: torch.dtype) -> tuple[Tensor, list[str]]:
    rows, columns = dense.matrix.shape
    scale = dense.norm or 1.0
    kinds = ("consistent", "random", "noisy", "left null", "zero", "huge", "tiny", "spike", "near", "not finite")
    chances = np.array((0.27, 0.27, 0.12, 0.08, 0.04, 0.06, 0.06, 0.04, 0.04, 0.02 * (many > 1)))
    big = 10.0 if torch.finfo(dtype).bits == 32 else 60.0
    items, data = [], []
    for _ in range(many):
        kind = kinds[rng.choice(len(kinds), p=chances / chances.sum())]
        x, noise = (_numbers(rng, (n,), torch.complex128 if dtype.is_complex else torch.float64).numpy()
                    for n in (columns, rows))  # fmt: skip
        y = noise
        if kind == "consistent":
            y = dense.matrix @ x
        elif kind in ("noisy", "near"):
            y = dense.matrix @ x
            y = y + 10 ** rng.uniform(-12, -1) * scale * noise
        elif kind == "left null":
            y = noise - dense.U @ (dense.U.conj().T @ noise)
        elif kind == "zero":
            y = 0 * noise
        elif kind in ("huge", "tiny"):
            y = noise if rng.random() < 0.5 else dense.matrix @ x / scale
            y = y * 10 ** (big if kind == "huge" else -big)
        elif kind == "spike":
            y = 0 * noise
            y[rng.integers(rows)] = 1
        if kind not in ("zero", "huge", "tiny") and rng.random() < 0.2:
            y = y * 10 ** rng.uniform(-4, 4)
        if kind == "not finite":
            y[rng.integers(rows)] = rng.choice([np.nan, np.inf])
        items.append(kind)
        data.append(y)
    return torch.from_numpy(np.stack(data)).to(dtype), items


def _damp(rng: np.random.Generator, norm: float, many: int) -> float | Tensor:
    kind = rng.random()
    scale = norm or 1.0
    values = [0.0, *(scale * 10 ** rng.uniform(-13, 0) for _ in range(3)), scale * 10 ** rng.uniform(-3, 0), scale]
    if kind < 0.5:
        return 0.0
    if kind < 0.85 or many == 1:
        return float(values[1 + rng.choice(5)])
    some = (values if rng.random() < 0.4 else values[1:])[:: 1 if rng.random() < 0.5 else 2]
    return torch.tensor([some[i] for i in rng.choice(len(some), many)], dtype=torch.float64)


def first(seed: int) -> itertools.count[int]:
    """The seeds of the problems of a lane: a million apart from the next lane's."""
    return itertools.count(seed * 1_000_000)
