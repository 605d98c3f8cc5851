r"""A convex problem with sparsifying terms, in the form of :func:`~lsconv.inverse.admm.iteration.admm`.

The penalty parameters rho determine how fast ADMM converges, but not its limit. That of the data's image is a fraction
of the second derivative of the data term. That of a sparsifying term makes the first threshold, weight over rho, the
root mean square of its image, and is balanced from there on.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lsconv.errors import MethodError
from lsconv.inverse.admm.fourier_step import ExtendedGrid
from lsconv.inverse.admm.history import SplittingResult, concatenate, to_solution
from lsconv.inverse.admm.iteration import Image, admm
from lsconv.inverse.admm.operator_step import NormalStep
from lsconv.inverse.admm.optimality import Optimality, optimality
from lsconv.inverse.admm.proximal import Bounds, Term, box_term
from lsconv.krylov.loop.batched_scalars import ItemSpace, divide
from lsconv.krylov.loop.certificate import norm_from_below
from lsconv.krylov.loop.solution import Solution
from lsconv.operators.base import LinearOperator
from lsconv.operators.convolution import Convolution
from lsconv.operators.dtypes import double
from lsconv.operators.elementary import Identity

__all__ = ["SparseProblem"]

# The penalty parameter of the data's image relative to the second derivative, the best on photographs under four blurs.
_DATA_PENALTY = {"gaussian": 0.1, "poisson": 2.0}
# The penalty parameter of constraints, relative to the largest curvature that another term adds to the step.
_BOX_PENALTY = 0.3


class SparseProblem:
    """One problem: its terms, its quadratic step, its first penalty parameters, and its certificate.

    Args:
        A: the operator.
        y: its data, ``(*batch, *out_shape)``.
        terms: a function that makes the terms of an operator and its data, the data term first; it is called a second
            time in double precision, for the certificate.
        bounds: lowest and highest value of x.
        gaussian: the data term is quadratic.
        x0: the start, ``(*batch, *in_shape)``.
        centred: constants are in the null space of the penalties, so that the iteration may work without the mean level
            of x, beside which a nearly flat image has few digits in float32.
        extended: take the quadratic step on an extended grid where A and the penalties are convolutions; otherwise in
            the operators themselves.
        scale: the diagonal that the data term puts before A, which broadcasts with y; None: ones.

    Attributes:
        terms_in_step: the number of leading terms, 0 or 1, that the quadratic step treats itself.
    """

    def __init__(
        self,
        A: LinearOperator,
        y: Tensor,
        terms: Callable[[LinearOperator, Tensor], list[Term]],
        *,
        bounds: Bounds | None = None,
        gaussian: bool = True,
        x0: Tensor | None = None,
        extended: bool = True,
        centred: bool = False,
        scale: Tensor | None = None,
    ) -> None:
        self.A, self.y, self.bounds, self.gaussian = A, y, bounds, gaussian
        self.scale = scale
        self._in_operators = functools.partial(
            SparseProblem, A, y, terms, bounds=bounds, gaussian=gaussian, centred=centred, extended=False, scale=scale
        )
        self.batch = tuple(y.shape[: y.ndim - len(A.out_shape)])
        self.terms = terms(A, y)
        double_dtype = double(A.dtype)
        self.terms_double = (
            self.terms if A.dtype == double_dtype else terms(A.to(dtype=double_dtype), y.to(double_dtype))
        )
        # three power steps are accurate to about a tenth
        self.norms = [float(norm_from_below(term.operator, steps=3).amax()) for term in self.terms]
        split = list(self.terms)
        self.level = self._level() if centred and gaussian and bounds is None else None
        if self.level is not None:
            y = y - A.apply(self.level)
            split[0] = terms(A, y)[0]
            x0 = x0 if x0 is None else x0 - self.level
        self.data = split[0]
        self.box: int | None = None
        if bounds is not None:
            self.box = len(split)
            split.append(box_term(Identity(A.in_shape, dtype=A.dtype, device=A.device), bounds))
        self.step: ExtendedGrid | NormalStep
        try:
            if not (extended and isinstance(A, Convolution)):
                raise MethodError(f"{A!r} is no convolution")
            self.step = ExtendedGrid(A, split, self.batch, _DATA_PENALTY["gaussian"])
            self.images = self.step.begin(x0, y, [self._start_penalty(term) for term in self.step.terms])
            self.terms_in_step = int(self.step.data is not None)
        except MethodError:
            x = torch.zeros(*self.batch, *A.in_shape, dtype=A.dtype, device=A.device) if x0 is None else x0.clone()
            if x0 is None:
                x = A.adjoint(y) / max(self.norms[0], torch.finfo(A.dtype).tiny) ** 2
            # A quadratic data term is not split off unless its rows are weighted.
            self.terms_in_step = int(gaussian and scale is None)
            self.step = NormalStep(A if self.terms_in_step else None, y, split[self.terms_in_step :], x)
            self.images = self.step.begin()
        self.box = None if self.box is None else self.box - self.terms_in_step

    def _level(self) -> Tensor:
        """The constant x, per item, whose image is nearest to y, ``(*batch, *in_shape)``."""
        outputs = ItemSpace(self.A.out_shape, self.A.dtype, self.A.device)
        one = torch.ones(*self.batch, *self.A.in_shape, dtype=self.A.dtype, device=self.A.device)
        image = self.A.apply(one)
        inputs = ItemSpace(self.A.in_shape, self.A.dtype, self.A.device)
        return inputs.broadcast(divide(outputs.inner(image, self.y), outputs.norm(image) ** 2)) * one

    def _data_penalty(self) -> Tensor:
        """The penalty parameter of the data's image: a fraction of the mean second derivative of the data term."""
        square = torch.ones(self.batch, dtype=torch.float64, device=self.A.device)
        if self.scale is not None:
            rows = self.scale.double().expand(self.y.shape).flatten(len(self.batch)).square()
            square = rows.sum(-1) / (rows > 0).sum(-1).clamp_min(1)
            square = torch.where(square > 0, square, 1.0)  # nothing is measured, and any penalty serves
        if self.gaussian:
            return _DATA_PENALTY["gaussian"] * square
        mean = self.y.double().flatten(len(self.batch)).mean(-1)
        return _DATA_PENALTY["poisson"] * square * torch.where(mean > 0, 1 / mean, 1.0)

    def _start_penalty(self, term: Term) -> Tensor:
        """The penalty parameter of a term in the quadratic problem whose solution is the start."""
        data = self._data_penalty()
        square = (self.norms[0] or 1.0) ** 2
        if term.balanced:
            return data * 0.2 * square / self.norms[self.terms.index(term)] ** 2
        return data if term is self.data else data * 1e-3 * square

    def _penalties(self) -> list[Tensor]:
        """The first penalty parameters of all terms, by the root mean square of their images."""
        data = self._data_penalty()
        square = (self.norms[0] or 1.0) ** 2
        rho: list[Tensor] = []
        curvature = torch.zeros_like(data)  # the largest curvature that a sparsifying term adds to the quadratic step
        views: Sequence[Image] = self.step.images
        inputs = ItemSpace(self.A.in_shape, self.A.dtype, self.A.device)
        for term, view, image in zip(self.step.terms, views, self.images, strict=True):
            if term.weight is not None:
                K = term.operator
                image_norm = ItemSpace(K.out_shape, K.dtype, K.device).norm(view.item(image))
                # an image that is only rounding has no meaningful size
                recovered = self.step.x if self.level is None else self.step.x + self.level
                noise = 1e-4 * self.norms[self.terms.index(term)] * inputs.norm(recovered)
                size = torch.where(image_norm > noise, image_norm, torch.nan) / math.sqrt(term.entries)
                default = data * square / self.norms[self.terms.index(term)] ** 2
                value = term.weight / size  # the threshold weight / rho is the root mean square
                value = torch.where(torch.isfinite(value) & (value > 0), value, default)
                rho.append(torch.clamp(value, 1e-4 * default, 1e3 * default))
                curvature = torch.maximum(curvature, rho[-1] * self.norms[self.terms.index(term)] ** 2)
            elif term is self.data:
                rho.append(data)
            else:
                rho.append(_BOX_PENALTY * torch.maximum(data * square, curvature))
        if self.step.one_penalty:
            chosen = next(value for value, term in zip(rho, self.step.terms, strict=True) if term.balanced)
            rho = [chosen for _ in rho]
        return rho

    def run(self, rtol: float, max_iter: int, callback: Callable[[int, Tensor], bool | None] | None) -> SplittingResult:
        """Run ADMM until the certificate, in double precision, meets ``rtol``.

        With reflect or replicate padding the extended grid is usually faster than a step in the operators themselves,
        but may not converge on nearly flat images: the second half of the iterations is done in the operators.
        """
        if not (isinstance(self.step, ExtendedGrid) and self.step.copied_padding is not None and max_iter > 1):
            return self._run(rtol, max_iter, callback)
        first = self._run(rtol, max_iter // 2, callback)
        if first.stopped or bool(first.met.all()):
            return first
        done = max_iter // 2
        other = self._in_operators(x0=first.x)
        second = other.run(rtol, max_iter - done, callback and (lambda k, x: callback(k + done, x)))
        duals = [torch.zeros_like(self.y)] * (other.terms_in_step - self.terms_in_step) + second.duals
        return concatenate(first, replace(second, duals=duals), done)

    def _run(
        self, rtol: float, max_iter: int, callback: Callable[[int, Tensor], bool | None] | None
    ) -> SplittingResult:
        """Run ADMM, with certificates in double precision once those in the dtype of the data are met."""

        def judge(x: Tensor, duals: list[Tensor]) -> Optimality:
            certificate = self.certificate(x, duals, self.terms)
            if self.terms_double is not self.terms and bool(certificate.met(rtol).any()):
                certificate = self.certificate(x, duals, self.terms_double)
            return certificate

        def answer(x: Tensor, split: list[Tensor]) -> Tensor:
            if self.level is not None:
                return x + self.level
            return x if self.box is None else split[self.box]

        return admm(self.step, self.images, rho=self._penalties(), batch=self.batch, judge=judge, answer=answer,
                    rtol=rtol, max_iter=max_iter, balance=True, callback=callback)  # fmt: skip

    def certificate(self, x: Tensor, duals: list[Tensor], terms: list[Term]) -> Optimality:
        """The certificate of x in the precision of ``terms``."""
        dtype = terms[0].operator.dtype
        # A float32 certificate rounds as well, and only decides when the one in double precision is computed.
        rounding = torch.finfo(self.A.dtype).eps * (2 if terms is self.terms_double else 16)
        kept = [torch.zeros_like(self.y)] * self.terms_in_step + duals
        return optimality(terms, [p.to(dtype) for p in kept[: len(terms)]], x.to(dtype), bounds=self.bounds,
                          norms=self.norms, rounding=rounding)  # fmt: skip

    def solution(self, result: SplittingResult, rtol: float, weight: Tensor) -> Solution:
        """Make the certified solution; all that it reports is recomputed from x in double precision."""
        certificate = self.certificate(result.x, result.duals, self.terms_double)
        data = self.terms_double[0].operator
        outputs = ItemSpace(data.out_shape, data.dtype, data.device)
        residual = outputs.safe_norm(self.y.to(data.dtype) - data.apply(result.x.to(data.dtype)))
        return to_solution(result, certificate, residual, rtol, weight)
