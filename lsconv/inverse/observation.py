r"""The ``observed=`` and ``weights=`` of the solvers: which data were measured, and how much they count.

.. math:: \sum_i w_i |(Ax)_i - y_i|^2 = \|W^{1/2} A x - W^{1/2} y\|^2

A datum that was not observed, or of weight zero, is not read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lsconv.errors import ArgumentError, ArgumentTypeError, DtypeError, NonFiniteError, ShapeError
from lsconv.operators.base import LinearOperator
from lsconv.operators.elementary import Diagonal, Mask
from lsconv.operators.transforms import hidden_by_vmap

__all__ = ["Observation", "mask_of_data"]


@dataclass(frozen=True, eq=False)
class Observation:
    """The data that count, checked.

    Attributes:
        observed: True where data were measured, ``(*batch, *out_shape)``; None: everywhere.
        root: the root of the weights, ``(*batch, *out_shape)``, zero where nothing was measured; None: ones.
    """

    observed: Tensor | None = None
    root: Tensor | None = None

    @classmethod
    def of(cls, A: LinearOperator, observed: Any = None, weights: Any = None) -> Observation:
        """The arguments of a solver for A.

        Raises:
            ArgumentTypeError, DtypeError: ``observed`` is no bool tensor, ``weights`` no real one.
            ShapeError: they do not broadcast with A's data.
            ArgumentError, NonFiniteError: a weight is negative or not finite.
        """
        if observed is not None:
            observed = mask_of_data("observed", observed, A, "data were measured")
        if weights is None and observed is not None and hidden_by_vmap(observed):
            # vmap maps the numbers of an operator, such as weights, and not its masks
            weights = torch.ones((), dtype=A.dtype.to_real(), device=A.device)
        if weights is None:
            return cls(observed)
        if not isinstance(weights, Tensor):
            got = type(weights).__name__
            raise ArgumentTypeError(f"weights: expected a torch.Tensor of numbers >= 0, got {got}; torch.as_tensor "
                                    f"makes one of an array or a list")  # fmt: skip
        if weights.is_complex() or weights.dtype == torch.bool:
            raise DtypeError(f"weights: expected real numbers, got {weights.dtype}; a mask goes to observed=")
        weights = _expanded("weights", weights.to(A.dtype.to_real()), A)
        known = weights if observed is None else torch.where(observed, weights, 0)
        if not hidden_by_vmap(known):
            if not bool(torch.isfinite(known).all()):
                raise NonFiniteError("weights: contains NaN or infinity; a pixel without a say has weight 0")
            if bool((known < 0).any()):
                raise ArgumentError(f"weights: expected numbers >= 0, got {float(known.min()):g}")
        # the derivative of the root is infinite at zero, where it is set to zero because the datum is missing
        positive = known > 0
        return cls(observed, torch.where(positive, torch.where(positive, known, 1).sqrt(), 0))

    def of_data(self, A: LinearOperator, y: Tensor) -> tuple[LinearOperator, Tensor]:
        """``W^{1/2} A`` and ``W^{1/2} y``."""
        return (A, y) if self.observed is self.root is None else (self.operator(A), self.weighted(y))

    def operator(self, A: LinearOperator) -> LinearOperator:
        """``W^{1/2} A``."""
        if self.root is not None:
            return Diagonal(self.root.to(A.dtype), self.root.ndim - len(A.out_shape)) @ A
        if self.observed is None:
            return A
        return Mask(self.observed, self.observed.ndim - len(A.out_shape), dtype=A.dtype) @ A

    def weighted(self, y: Tensor) -> Tensor:
        """``W^{1/2} y``; the mask of :meth:`operator` is applied where a solve begins (:func:`prepare`)."""
        return y if self.root is None else torch.where(self.root.detach() > 0, y, 0) * self.root


def mask_of_data(name: str, given: Any, A: LinearOperator, meaning: str) -> Tensor:
    """Check a bool argument that broadcasts with A's data, and expand it to ``(*batch, *out_shape)``.

    Args:
        name: what the user calls it.
        given: the argument.
        A: the operator.
        meaning: what True stands for.
    """
    if not isinstance(given, Tensor):
        raise ArgumentTypeError(f"{name}: expected a bool torch.Tensor, got {type(given).__name__}; torch.as_tensor "
                                f"makes one of an array or a list")  # fmt: skip
    if given.dtype != torch.bool:
        raise DtypeError(f"{name}: expected dtype torch.bool, True where {meaning}, got {given.dtype}; write "
                         f"{name} != 0")  # fmt: skip
    return _expanded(name, given, A)


def _expanded(name: str, given: Tensor, A: LinearOperator) -> Tensor:
    """Expand values that broadcast with A's data to ``(*batch, *out_shape)``."""
    shape, wanted = tuple(given.shape), A.out_shape
    inner = shape[max(0, len(shape) - len(wanted)) :]
    if any(n not in (1, m) for n, m in zip(reversed(inner), reversed(wanted), strict=False)):
        raise ShapeError(f"{name}: shape {shape} does not broadcast with A's out_shape {wanted}")
    return given.to(A.device).expand(*shape[: len(shape) - len(inner)], *wanted)
