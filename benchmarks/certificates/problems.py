"""Problems drawn from the whole signature, each a function of one integer, small enough for a dense matrix."""

from __future__ import annotations

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

KINDS = ("random", "blur", "symbol zeros", "polynomial", "square polynomial", "nearly deficient", "equal channels",
         "null directions", "badly scaled", "one tap", "pointwise", "zero", "whole image")  # fmt: skip
_CHANCES = (0.1, 0.09, 0.09, 0.08, 0.25, 0.1, 0.06, 0.06, 0.08, 0.03, 0.02, 0.01, 0.03)
_ZEROS = (-0.3, 0.3, -1, 1, 1.1, -1.1, 0.5, -2, 0.9, 0.05, 20, 1 + 1e-3, 1 - 1e-3, 1 + 1e-6, -1 - 1e-8)
_COMPLEX = (1j, 0.6 + 0.8j)
_MOST = 110
_MOST_OWN = 50  # where each item has a kernel of its own


@dataclass
class Problem:
    """An operator, its data and damping, and their dense counterparts.

    Attributes:
        seed: the integer it is drawn from.
        A: the operator.
        kinds: the kind of the kernel, per item.
        own: each item has a kernel of its own.
        masked: the outputs are masked.
        y: the data, ``(items, *out_shape)``.
        items: the kind of each item.
        damp: the damping, a number or a tensor with one per item.
        rtol: the tolerance asked for; None: the method's own.
        prior: where the penalty pulls to, or None.
        dense: the dense matrices, in double precision.
        stacks: decompositions of [A; damp L], by penalty.
    """

    seed: int
    A: lsconv.LinearOperator
    kinds: list[str]
    own: bool
    masked: bool
    y: Tensor
    items: list[str]
    damp: float | Tensor
    rtol: float | None
    prior: Tensor | None
    dense: Dense = field(repr=False)
    stacks: dict[str, Dense] = field(default_factory=dict, repr=False)

    @property
    def bits(self) -> int:
        """32 or 64."""
        return int(torch.finfo(self.A.dtype).bits)

    def __str__(self) -> str:
        damp = self.damp if isinstance(self.damp, float) else [f"{d:.1e}" for d in self.damp.tolist()]
        kinds = ", ".join(self.kinds if self.own else self.kinds[:1])
        return f"seed {self.seed}, {kinds}: {self.A!r}, damp={damp}, rtol={self.rtol}, items {self.items}"


def draw(seed: int) -> Problem | None:
    """The problem of this seed; None where the kernel cancels itself, so that the matrix is all rounding."""
    rng = np.random.default_rng(seed)
    dtype = (torch.float32, torch.float64, torch.complex64, torch.complex128)[rng.choice(4, p=(0.4, 0.4, 0.1, 0.1))]
    many = int(rng.choice([1, 6, 24, 48], p=(0.1, 0.2, 0.4, 0.3)))
    kind = KINDS[rng.choice(len(KINDS), p=_CHANCES)]
    own = many > 1 and bool(rng.random() < (0.1 if kind == "square polynomial" else 0.15))
    many = min(many, 24) if own else many
    kernel, groups, layout = _layout(rng, kind, _MOST_OWN if own else _MOST)
    # a kind that has decided the layout, and others of the same shape beside it
    kinds = [kind] * many
    if own and kind != "square polynomial":
        kinds[1:] = (KINDS[i] for i in rng.choice(len(KINDS), many - 1, p=_CHANCES))
    weight = torch.stack([_weight(rng, one, kernel, groups, dtype) for one in (kinds if own else kinds[:1])])
    matrices = np.stack([_matrix(one, layout) for one in weight])
    A: lsconv.LinearOperator = lsconv.Convolution(weight if own else weight[0], **layout)
    largest = np.abs(matrices).max((1, 2), initial=0)
    taps = weight.abs().flatten(1).amax(1).double().numpy()
    if bool(((taps > 0) & (largest < 1e-3 * taps)).any()):
        return None
    masked = bool(rng.random() < 0.1)
    if masked:
        mask = torch.from_numpy(rng.random(A.out_shape) > rng.choice([0.1, 0.3, 0.7]))
        A = lsconv.Mask(mask, dtype=dtype) @ A
        matrices = matrices * mask.flatten().numpy()[:, None]
        left = np.abs(matrices).max((1, 2), initial=0)  # which may be the rounding of sums of taps, and is no problem
        if bool(((left > 0) & (left < 1e-3 * taps)).any()):
            return None
    dense = Dense(matrices)
    y, items = _data(rng, dense, many, dtype)
    damp = _damp(rng, dense.norm, many, {"square polynomial": 0.85, "null directions": 0.7}.get(kind, 0.45))
    single = torch.finfo(dtype).bits == 32
    rtol = None if rng.random() < 0.7 else float(10 ** rng.uniform(*((-5.5, -2) if single else (-11, -3))))
    prior = _numbers(rng, (1, *A.in_shape), dtype) if rng.random() < 0.3 else None
    norm = float(dense.norm[0])
    if prior is not None and norm > 0:
        prior = prior * float(np.linalg.norm(y[0].numpy()) / norm / math.sqrt(prior.numel()))
        if not bool(torch.isfinite(prior).all()):
            prior = None
    return Problem(seed, A, kinds, own, masked, y.reshape(many, *A.out_shape), items, damp, rtol, prior, dense)


def _numbers(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    values = rng.standard_normal(shape)
    if dtype.is_complex:
        values = values + 1j * rng.standard_normal(shape)
    return torch.from_numpy(values).to(dtype)


# ------------------------------------------------------------------ the operator


def _layout(rng: np.random.Generator, kind: str, unknowns: int) -> tuple[tuple[int, ...], int, dict[str, Any]]:
    """Shape of the kernel, groups and all else that a convolution of at most so many unknowns is made of."""
    ndim = int(rng.choice([1, 2, 3], p=(0.5, 0.35, 0.15)))
    mode = str(rng.choice(["zeros", "circular", "reflect", "replicate"], p=(0.6, 0.18, 0.11, 0.11)))
    groups = 2 if rng.random() < 0.15 else 1
    pairs = [(1, 1), (2, 2), (1, 2), (2, 1), (3, 2), (2, 3), (3, 3)]
    c_in, c_out = pairs[rng.choice(7, p=(0.5, 0.15, 0.1, 0.1, 0.05, 0.05, 0.05))]
    if kind == "equal channels":
        c_in, c_out = pairs[1 + rng.choice(6)]
    plain = rng.random() < 0.5  # stride and dilation of one
    paddings = ("square", "same", "valid", "full", "causal", "one-sided", "any", "wider")
    padding = paddings[rng.choice(8, p=(0.2, 0.22, 0.15, 0.07, 0.07, 0.08, 0.14, 0.07))]
    if kind == "square polynomial":  # where singular values go to zero at every rate
        ndim, mode, groups, plain, padding = 1 + int(rng.random() < 0.1), "zeros", 1, True, "square"
        c_in = c_out = 1 + int(rng.random() < 0.25)
    cells = int(2 ** rng.uniform(3, math.log2(unknowns))) // (c_in * groups)
    axes = []
    for axis in range(ndim):
        most = max(1, round(cells ** (1 / (ndim - axis))))
        n = int(rng.integers(min(2, most), min(most, {1: 150, 2: 14, 3: 6}[ndim]) + 1))
        if ndim == 1:
            n = max(4, min(n, int(rng.choice([20, 40, 150]))))
        cells //= n
        k = int(rng.integers(1, {1: 8, 2: 6, 3: 4}[ndim]))
        if kind in ("polynomial", "null directions"):
            k = int(rng.integers(2, 6 if ndim < 3 else 4))
        if kind == "square polynomial":
            n, k = (
                (int(rng.integers(10, 31)), int(rng.choice([3, 4, 5, 6], p=(0.1, 0.2, 0.4, 0.3))))
                if ndim == 1
                else (int(rng.integers(4, 8)), 3)
            )
        d, s = (1, 1) if plain else (int(rng.choice([1, 2, 3], p=(0.6, 0.3, 0.1))), int(rng.choice([1, 2, 3])))
        if kind == "whole image":
            k, d = n, 1
        if kind == "pointwise" or (kind == "one tap" and rng.random() < 0.5):
            k = 1
        axes.append(_axis(rng, mode, padding, n, k, s, d))
    size, taps, stride, dilation, sides = zip(*axes, strict=True)
    layout = {"in_size": size, "stride": stride, "padding": sides, "dilation": dilation, "groups": groups,
              "padding_mode": mode}  # fmt: skip
    return (groups * c_out, c_in, *taps), groups, layout


def _axis(
    rng: np.random.Generator, mode: str, padding: str, n: int, k: int, s: int, d: int
) -> tuple[int, int, int, int, tuple[int, int]]:
    """Size, taps, stride, dilation and padding of an axis, mended where they do not go together."""
    if padding in ("same", "square"):
        s = 1
    extent = d * (k - 1) + 1
    some, more = int(rng.integers(extent)), int(rng.integers(extent))
    left, right = {
        "valid": (0, 0),
        "same": ((extent - 1) // 2, extent - 1 - (extent - 1) // 2),
        "square": (some, extent - 1 - some),
        "full": (extent - 1, extent - 1),
        "causal": (extent - 1, 0),
        "one-sided": (0, some) if more % 2 else (some, 0),
        "any": (some, more),
        "wider": (extent + some % 3, extent + more % 3),
    }[padding]
    limit = {"zeros": 10**6, "replicate": 10**6, "circular": n, "reflect": n - 1}[mode]
    left, right = min(left, limit), min(right, limit)
    if n + left + right < extent:
        d = 1
        k = extent = min(k, n)
        left, right = min(left, k), min(right, k)
    return n, k, s, d, (left, right)


def _weight(rng: np.random.Generator, kind: str, shape: tuple[int, ...], groups: int, dtype: torch.dtype) -> Tensor:
    weight = _kernel(rng, kind, shape, groups)
    weight = weight * float(10 ** rng.uniform(-2, 2)) if rng.random() < 0.5 else weight
    if not dtype.is_complex:
        weight = weight.real
    elif rng.random() < 0.7:
        weight = weight * np.exp(2j * np.pi * rng.random(shape[:2])).reshape(*shape[:2], *(1,) * len(shape[2:]))
    return torch.from_numpy(np.ascontiguousarray(weight)).to(dtype)


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
    if kind == "square polynomial":
        pairs = [_outer([_polynomial(rng, k) for k in taps]) for _ in range(c_out * c_in)]
        scale = 10.0 ** rng.uniform(-6, 0, (c_out, c_in)) if rng.random() < 0.5 else np.ones((c_out, c_in))
        return np.stack(pairs).reshape(shape) * scale.reshape(c_out, c_in, *(1,) * len(taps))
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
    if kind == "null directions":  # one axis maps several vectors to zero, and with each of them all of the others
        factors = [rng.standard_normal(k) for k in taps]
        axis = int(rng.choice(len(taps)))
        factors[axis] = np.zeros(taps[axis])
        factors[axis][[0, -1]] = 1, rng.choice([-1, 1])
        if rng.random() < 0.3:
            factors[axis][0] = 0
        return random[(..., *(slice(0, 1),) * len(taps))] * _outer(factors)
    if kind == "badly scaled":
        if rng.random() < 0.4:
            return random * 10.0 ** rng.choice([-12, 12])
        powers = 10.0 ** rng.uniform(-6, 6, ((c_out, 1), (1, c_in), (c_out, c_in))[rng.choice(3)])
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
    """Taps with zeros on the unit circle, of any order."""
    angles = rng.choice([0, np.pi, np.pi / 2, 2 * np.pi / 3, rng.uniform(0, np.pi)], k)
    kernel = np.ones(1)
    for angle in angles:
        factor = [1, -math.cos(angle)] if angle in (0, np.pi) else [1, -2 * math.cos(angle), 1]
        if kernel.size + len(factor) - 1 <= k:
            kernel = np.convolve(kernel, factor)
    return np.concatenate([kernel, np.zeros(k - kernel.size)])


def _polynomial(rng: np.random.Generator, k: int) -> NDArray[Any]:
    """Taps with given zeros, on the unit circle, near to it, and off it."""
    zeros = list(rng.choice(_ZEROS, k - 1))
    if k > 2 and rng.random() < 0.2:
        zero = _COMPLEX[rng.choice(len(_COMPLEX))]
        zeros[:2] = [zero, zero.conjugate()]
    return np.atleast_1d(np.real(np.poly(zeros)))


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
    rows, columns = dense.matrices.shape[1:]
    kinds = ("consistent", "random", "noisy", "left null", "zero", "huge", "tiny", "spike", "near", "not finite")
    chances = np.array((0.27, 0.27, 0.12, 0.08, 0.04, 0.06, 0.06, 0.04, 0.04, 0.02 * (many > 1)))
    big = 10.0 if torch.finfo(dtype).bits == 32 else 60.0
    items, data = [], []
    for item in range(many):
        which = item % len(dense)
        matrix, U, scale = dense.matrices[which], dense.U[which], float(dense.norm[which]) or 1.0
        kind = kinds[rng.choice(len(kinds), p=chances / chances.sum())]
        x, noise = (_numbers(rng, (n,), torch.complex128 if dtype.is_complex else torch.float64).numpy()
                    for n in (columns, rows))  # fmt: skip
        y = noise
        if kind == "consistent":
            y = matrix @ x
        elif kind in ("noisy", "near"):
            y = matrix @ x
            y = y + 10 ** rng.uniform(-12, -1) * scale * noise
        elif kind == "left null":
            y = noise - U @ (U.conj().T @ noise)
        elif kind == "zero":
            y = 0 * noise
        elif kind in ("huge", "tiny"):
            y = noise if rng.random() < 0.5 else matrix @ x / scale
            y = y * 10 ** (big if kind == "huge" else -big)
        elif kind == "spike":
            y = 0 * noise
            y[rng.integers(rows)] = 1
        if kind not in ("zero", "huge", "tiny") and rng.random() < 0.2:
            y = y * 10 ** rng.uniform(-4, 4)
        if kind == "not finite":
            measured = np.flatnonzero(np.abs(dense.matrices).max((0, 2)))  # NaN under a mask is none
            if len(measured):
                y[rng.choice(measured)] = rng.choice([np.nan, np.inf])
            else:
                kind, y = "zero", 0 * y
        items.append(kind)
        data.append(y)
    return torch.from_numpy(np.stack(data)).to(dtype), items


def _damp(rng: np.random.Generator, norms: NDArray[np.float64], many: int, undamped: float) -> float | Tensor:
    """Zero, one damping or one per item, from zero to the norm; with kernels of its own each in the units of its A."""
    scales = np.where(norms > 0, norms, 1.0)
    values = [0.0, *10 ** rng.uniform(-13, 0, 3), 10 ** rng.uniform(-3, 0), 1.0]
    if rng.random() < undamped:
        return 0.0
    if many == 1 or rng.random() < 0.6:
        value = values[1 + rng.choice(5)]
        return float(value * scales[0]) if len(scales) == 1 else torch.from_numpy(value * scales)
    some = (values if rng.random() < 0.4 else values[1:])[:: 1 if rng.random() < 0.5 else 2]
    return torch.from_numpy(np.array(some)[rng.choice(len(some), many)] * scales)
