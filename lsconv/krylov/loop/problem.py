"""The arguments of a solve, checked once and broadcast to one batch."""

from __future__ import annotations

import functools
import math
import numbers
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lsconv.errors import ArgumentError, ArgumentTypeError, DeviceError, DtypeError, PreconditionerError, ShapeError
from lsconv.krylov.loop.batched_scalars import ItemSpace, OneItem, Scalar, scalar_dtype
from lsconv.krylov.loop.lagrange_multipliers import multipliers_wanted
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import broadcast_shapes, over_items
from lsconv.operators.checks import require_finite
from lsconv.operators.dtypes import remedy
from lsconv.operators.observed import observed
from lsconv.operators.scipy import OperatorLike

__all__ = ["Problem", "accept_operator", "accept_penalty", "as_complex", "prepare"]


def accept_operator(A: OperatorLike, b: Any = None, name: str = "A") -> LinearOperator:
    """``A`` as a LinearOperator, on the device of the right-hand side, complex where that is.

    Args:
        A: a LinearOperator; a dense tensor ``(*batch, m, n)``; a sparse (CSR, CSC, COO) tensor ``(m, n)``; or a
            ``scipy.sparse.linalg.LinearOperator`` (so also a PyLops operator) or scipy.sparse matrix, which is applied
            on the host.
        b: the right-hand side.
        name: the argument's name in messages.

    Raises:
        ArgumentTypeError: for anything else.
        ShapeError: a tensor that looks like a kernel.
        DeviceError: A is on the meta device.

    Example:
        >>> accept_operator(torch.ones(3, 2))
        Dense((2,) -> (3,), torch.float32, cpu)
    """
    from lsconv.operators import scipy

    operator = scipy.to_operator(A, name)
    if isinstance(A, Tensor) and A.ndim > 2 and isinstance(b, Tensor) and b.shape[-1:] != operator.out_shape:
        raise ShapeError(
            f"{name}: a tensor is a matrix (*batch, m, n), and the {operator.out_shape[0]} rows of shape "
            f"{tuple(A.shape)} do not fit the data of shape {tuple(b.shape)}; a kernel goes into "
            f"lsconv.Conv{max(A.ndim - 2, 1)}d({name}, in_size=...)"
        )
    if operator.device.type == "meta":
        raise DeviceError(f"{name}: {operator!r} is on the meta device, which holds no values; solving needs them")
    if not isinstance(b, Tensor):
        return operator
    if not isinstance(A, (LinearOperator, Tensor)):
        operator = operator.to(b.device)
    return operator.for_dtype(b.dtype)


def accept_penalty(L: OperatorLike, A: LinearOperator) -> LinearOperator:
    """``L`` as a LinearOperator on the inputs of A, in A's dtype where it has none of its own.

    Raises:
        ShapeError: it takes other inputs.
        ArgumentTypeError, DeviceError: as :func:`accept_operator`.
    """
    L = accept_operator(L, name="L").for_dtype(A.dtype)
    if L.in_shape != A.in_shape:
        raise ShapeError(f"L: in_shape {L.in_shape} differs from that of A, {A.in_shape}")
    return L


def as_complex(tensor: Any, A: LinearOperator) -> Any:
    """Convert a real tensor to the complex dtype of A if that has the same precision; else return it unchanged."""
    fits = isinstance(tensor, Tensor) and A.is_complex and tensor.dtype == A.dtype.to_real()
    return tensor.to(A.dtype) if fits else tensor


@dataclass(frozen=True, eq=False)
class Problem:
    """One solve: every tensor has the full batch dimensions.

    Attributes:
        A: the operator.
        y: ``(*batch, *out_shape)``; zero for the items that cannot be solved.
        x0: ``(*batch, *in_shape)`` or None for zero.
        damp: ``batch``, or None when every entry is zero.
        M: inverse preconditioner on the residual side.
        N: inverse preconditioner on the solution side.
        batch: the batch dimensions.
        nonfinite: items whose data are not finite.
        host_scalars: there is one item, on the CPU, and the method's scalars are Python numbers.
        multipliers: find z with ``x = A^H z`` as well
            (:mod:`lsconv.krylov.loop.lagrange_multipliers`).
    """

    A: LinearOperator
    y: Tensor
    x0: Tensor | None
    damp: Tensor | None
    M: LinearOperator | None
    N: LinearOperator | None
    batch: torch.Size
    nonfinite: Tensor
    host_scalars: bool = False
    multipliers: bool = False

    @functools.cached_property
    def domain(self) -> ItemSpace:
        """Arithmetic on tensors shaped like x."""
        return (OneItem if self.host_scalars else ItemSpace)(self.A.in_shape, self.A.dtype, self.A.device)

    @functools.cached_property
    def codomain(self) -> ItemSpace:
        """Arithmetic on tensors shaped like y."""
        return (OneItem if self.host_scalars else ItemSpace)(self.A.out_shape, self.A.dtype, self.A.device)

    @functools.cached_property
    def zero(self) -> Tensor:
        """The items whose right-hand side is zero."""
        return self.tensor(self.codomain.safe_norm(self.y) == 0) & ~self.nonfinite

    def scalar(self, values: Tensor) -> Scalar:
        """Convert a tensor of shape ``batch`` to the methods' scalar: itself, or a Python number for one item."""
        return values.item() if self.host_scalars else values

    def tensor(self, scalar: Scalar) -> Tensor:
        """The inverse of :meth:`scalar`."""
        if isinstance(scalar, Tensor):
            return scalar.expand(self.batch)
        dtype = self.domain.scalar if isinstance(scalar, float) else None
        return torch.full(self.batch, scalar, dtype=dtype, device=self.A.device)

    def residual(self, x: Tensor | None, running: Scalar) -> Tensor:
        """Return ``y - A x`` in a new tensor, with zeros for the items that are not running."""
        r = self.y if x is None else self.y - self.A.apply(x)
        return r * self.codomain.broadcast(running)

    def start(self, x: Tensor | None) -> Tensor:
        """Return a new tensor to iterate on: a copy of ``x``, or zeros."""
        if x is None and type(self.y) is not Tensor:  # a DTensor, in parts on several devices as A lays it out
            return torch.zeros_like(self.A.adjoint(self.y), memory_format=torch.contiguous_format)
        if x is None:
            return torch.zeros(*self.batch, *self.A.in_shape, dtype=self.A.dtype, device=self.A.device)
        return x.clone(memory_format=torch.contiguous_format)


def prepare(
    A: OperatorLike,
    b: Any,
    *,
    damp: float | Tensor = 0.0,
    M: LinearOperator | None = None,
    N: LinearOperator | None = None,
    x0: Tensor | None = None,
    check_finite: bool = True,
    square: bool = False,
    name: str = "b",
    host_scalars: bool = False,
) -> Problem:
    """Check the arguments of a solver and broadcast them to one batch.

    With ``host_scalars`` the problem of a single item on the CPU is :attr:`Problem.host_scalars`.

    Raises:
        ArgumentError: for a negative or non-finite damp.
        ArgumentTypeError: for an argument of the wrong type.
        DtypeError, DeviceError, ShapeError: when A, b, x0, M, N or damp do not fit together.
        NonFiniteError: for NaN or infinity in b or x0, unless ``check_finite=False``.
        PreconditionerError: when M or N do not have the right shapes.
    """
    A = accept_operator(A, b)
    if square and A.in_shape != A.out_shape:
        raise ShapeError(f"A: this method needs a square operator, got {A.in_shape} -> {A.out_shape}; use lsconv.lsmr")
    if A.dtype in (torch.float16, torch.bfloat16):
        raise DtypeError(f"A: {A.dtype} is too coarse to iterate in; convert with A.to(dtype=torch.float32)")
    shapes = [A.check_output(b, name), A.batch_shape]
    b = observed(A, b)
    if check_finite:
        require_finite(b, name, len(A.out_shape))
    if x0 is not None:
        x0 = as_complex(x0, A)
        shapes.append(A.check_input(x0, "x0", finite=check_finite))
    M, N = _preconditioner("M", M, A.out_shape, A), _preconditioner("N", N, A.in_shape, A)
    shapes.extend(P.batch_shape for P in (M, N) if P is not None)
    damping = check_damp(damp, A)
    try:
        batch = broadcast_shapes(*shapes, damping.shape)
    except RuntimeError:
        raise ShapeError(f"{name}: the batch dimensions of {name}, x0, damp, M, N and the operator do not broadcast: "
                         f"{[tuple(shape) for shape in shapes]} and damp {tuple(damping.shape)}") from None  # fmt: skip
    y = b.detach().expand(*batch, *A.out_shape)
    nonfinite = torch.zeros(batch, dtype=torch.bool, device=A.device)
    if x0 is not None:
        x0 = x0.detach().expand(*batch, *A.in_shape)
    if not check_finite:
        nonfinite = ~_finite(y, len(A.out_shape))
        if x0 is not None:
            nonfinite = nonfinite | ~_finite(x0, len(A.in_shape))
            x0 = x0.masked_fill(over_items(nonfinite, len(A.in_shape)), 0)
        y = y.masked_fill(over_items(nonfinite, len(A.out_shape)), 0)
    damped = damping.expand(batch) if bool((damping > 0).any()) else None
    # values of a DTensor, or under a function transform, cannot be read on the host cheaply
    host_scalars = host_scalars and A.device.type == "cpu" and math.prod(batch) == 1 and type(y) is Tensor
    undisturbed = damped is None and M is None and N is None and x0 is None  # x is the answer of least norm
    multipliers = undisturbed and multipliers_wanted(A)
    return Problem(A, y, x0, damped, M, N, torch.Size(batch), nonfinite, host_scalars, multipliers)


def _preconditioner(name: str, P: Any, shape: tuple[int, ...], A: LinearOperator) -> LinearOperator | None:
    """Convert a preconditioner to an operator on items of this shape, of the dtype and device of A; None stays None."""
    if P is None:
        return None
    if not isinstance(P, LinearOperator):
        raise ArgumentTypeError(f"{name}: expected a LinearOperator that applies the inverse, got {type(P).__name__}")
    if P.in_shape != shape or P.out_shape != shape:
        raise PreconditionerError(f"{name}: expected a map of {shape} to itself, got {P.in_shape} -> {P.out_shape}")
    P = P.for_dtype(A.dtype)
    if P.dtype != A.dtype:
        raise DtypeError(f"{name}: dtype {P.dtype} differs from the operator's {A.dtype}; "
                         f"{remedy(name, P.dtype, 'A', A.dtype)}")  # fmt: skip
    if P.device != A.device:
        raise DeviceError(f"{name}: device {P.device} differs from the operator's {A.device}; move it with .to(device)")
    return P


def check_damp(damp: Any, A: LinearOperator) -> Tensor:
    """Check ``damp``, and return it as a tensor on A's device.

    Raises:
        ArgumentTypeError, DtypeError, ArgumentError: damp is no real number, or negative or not finite.
    """
    if not isinstance(damp, (numbers.Real, Tensor)):
        rule = "; tikhonov takes the name of a rule, and choose_damp finds the number" if isinstance(damp, str) else ""
        raise ArgumentTypeError(
            f"damp: expected a number or a tensor with one value per batch item, got {damp!r}{rule}"
        )
    if isinstance(damp, Tensor) and (damp.is_complex() or damp.dtype == torch.bool):
        raise DtypeError(f"damp: expected real numbers, got {damp.dtype}")
    try:
        damping = torch.as_tensor(damp, dtype=scalar_dtype(A.device), device=A.device).detach()
    except OverflowError:
        raise ArgumentError("damp: expected finite numbers >= 0, got one beyond double precision") from None
    values: Any = damping if isinstance(damp, Tensor) else damp
    inside = (values >= 0) & (values <= torch.finfo(damping.dtype).max)  # NaN is not
    if not (bool(inside.all()) if isinstance(inside, Tensor) else inside):
        raise ArgumentError(f"damp: expected finite numbers >= 0, got {damp}")
    return damping


def _finite(v: Tensor, item_ndim: int) -> Tensor:
    finite = torch.isfinite(v)
    return finite.flatten(v.ndim - item_ndim).all(-1) if item_ndim else finite
