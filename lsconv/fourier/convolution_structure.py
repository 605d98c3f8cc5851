r"""The convolution in an operator made of operators: a chain of windows, one core, and weights.

A preconditioner needs only an approximation of :math:`A A^H`. So A is factorised as

.. math:: A = L_1 L_2 \cdots K \cdots E

with windows L on the output side (crops, masks, diagonals), which are kept exactly; a core K, whose Gram operator
:math:`K K^H` is replaced by a block-circulant one; and factors E on the input side, which are replaced by their root
mean square. The same factorisation of :math:`A^H` gives the approximation of :math:`A^H A`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lsconv.errors import MethodError
from lsconv.fourier.circulant import double_symbol
from lsconv.fourier.embedding import Embedding
from lsconv.fourier.frequency_matrices import FrequencyMatrices, Grid
from lsconv.fourier.symbol import symbol
from lsconv.operators.algebra import Adjoint, HStack, Product, Scaled, VStack
from lsconv.operators.base import LinearOperator
from lsconv.operators.convolution import Convolution
from lsconv.operators.difference import Gradient, Laplacian
from lsconv.operators.elementary import Crop, Diagonal, Identity, Mask
from lsconv.operators.padding import Pad
from lsconv.operators.padding_modes import MODES

__all__ = ["Chain", "Factor", "factor_chain", "gram_approximation"]

SUPPORTED = (
    "supported are convolutions, scaled, adjoint, multiplied by Crop, Mask, Diagonal and Pad, and stacked (vstack on "
    "the solution side, hstack on the residual side) with other convolutions, Gradient, Laplacian and Identity"
)


@dataclass(frozen=True)
class Factor:
    """One operator of a product, or its adjoint.

    Attributes:
        operator: the operator.
        adjoint: the product has the adjoint of the operator.
    """

    operator: LinearOperator
    adjoint: bool

    def apply(self, x: Tensor) -> Tensor:
        """Apply the factor to ``x``."""
        return self.operator.adjoint(x) if self.adjoint else self.operator.apply(x)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        """Apply the adjoint of the factor to ``y``."""
        return self.operator.apply(y) if self.adjoint else self.operator.adjoint(y)


@dataclass(frozen=True)
class Chain:
    """An operator as a product of windows, a core and a scalar weight.

    Attributes:
        windows: the factors on the output side, the outermost first.
        core: the factor whose Gram operator is replaced by a block-circulant one.
        weight: the mean square of all other factors, a real tensor that broadcasts with the batch dimensions.
    """

    windows: list[Factor]
    core: Factor
    weight: Tensor


def factor_chain(A: LinearOperator, adjoint: bool) -> Chain:
    """Split A, or its adjoint, into windows, core and weight.

    Raises:
        MethodError: there is no convolution in A, or a factor has no place in a chain.
    """
    factors, weight = _factors(A, adjoint)
    cores = [i for i, factor in enumerate(factors) if isinstance(factor.operator, (Convolution, VStack, HStack))]
    if not cores:
        cores = [i for i, factor in enumerate(factors) if isinstance(factor.operator, (Gradient, Laplacian, Identity))]
    if not cores:
        raise MethodError(f"CirculantPreconditioner: there is no convolution in {A!r}; {SUPPORTED}")
    core = cores[0]
    for factor in factors[:core]:
        is_window = isinstance(factor.operator, (Crop, Mask, Diagonal, Identity))
        if isinstance(factor.operator, Pad):
            is_window = factor.adjoint or MODES[factor.operator.mode].zero
        if not is_window:
            raise MethodError(
                f"CirculantPreconditioner: {factor.operator!r} stands between the convolution and the side that is "
                f"preconditioned; {SUPPORTED}"
            )
    for factor in factors[core + 1 :]:
        weight = weight * _mean_square(factor.operator)
    return Chain(factors[:core], factors[core], weight)


def _factors(A: LinearOperator, adjoint: bool) -> tuple[list[Factor], Tensor]:
    """The factors of a product, the outermost first, and the square of the scalars in it."""
    weight = torch.ones((), dtype=torch.float64, device=A.device)
    if isinstance(A, Adjoint):
        return _factors(A.operator, not adjoint)
    if isinstance(A, Scaled):
        factors, weight = _factors(A.operator, adjoint)
        return factors, weight * A.alpha.detach().abs().double().square()
    if isinstance(A, Product):
        parts = [_factors(part, adjoint) for part in (reversed(A.operators) if adjoint else A.operators)]
        for _, part_weight in parts:
            weight = weight * part_weight
        return [factor for factors, _ in parts for factor in factors], weight
    return [Factor(A, adjoint)], weight


def _mean_square(operator: LinearOperator) -> Tensor | float:
    """The mean of the squared entries of a factor on the input side of the core."""
    if isinstance(operator, (Crop, Identity, Pad)):
        return 1.0
    if isinstance(operator, (Mask, Diagonal)):
        entries = operator.mask.double() if isinstance(operator, Mask) else operator.diagonal.detach().abs().double()
        return entries.square().mean(tuple(range(-len(operator.in_shape), 0)))
    raise MethodError(
        f"CirculantPreconditioner: {operator!r} stands on the other side of the convolution, and only the mean square "
        f"of a Crop, Mask, Diagonal or Pad is accounted for there; {SUPPORTED}"
    )


@torch.no_grad()
def gram_approximation(chain: Chain, batch_shape: tuple[int, ...]) -> tuple[FrequencyMatrices, Embedding]:
    """Make the block-circulant approximation of ``weight K K^H``, K the core, in double precision, with its grid.

    Args:
        chain: the chain, from :func:`factor_chain`.
        batch_shape: batch dimensions whose items get blocks of their own.

    Raises:
        MethodError: a stack whose parts do not share a grid.
    """
    terms = _terms(chain)
    convolutions = [term for term, _ in terms if isinstance(term.operator, Convolution)]
    if not convolutions:
        raise MethodError(f"CirculantPreconditioner: there is no convolution in {chain.core!r}; {SUPPORTED}")
    grids = [_embedding(factor.operator).grid for factor in convolutions]
    common = tuple(max(sizes) for sizes in zip(*grids, strict=True))
    embeddings = [_embedding(factor.operator, common, batch_shape) for factor in convolutions]
    first, adjoint = embeddings[0], convolutions[0].adjoint
    if any(e.grid != first.grid or e.groups != first.groups or (adjoint and e.stride != first.stride)
           for e in embeddings):  # fmt: skip
        raise MethodError("CirculantPreconditioner: stacked convolutions must have equal groups, and equal strides and "
                          "boundaries on the side that they share")  # fmt: skip
    total: Tensor | None = None
    remaining = iter(embeddings)
    real = not convolutions[0].operator.is_complex
    for factor, weight in terms:
        if isinstance(factor.operator, Convolution):
            S = double_symbol(_block_circulant_of(factor.operator), next(remaining)).matrices
            part = S.mH @ S if adjoint else S @ S.mH
        else:
            part = _channelwise(factor.operator, first, adjoint, real)
        part = part * first.per_block(weight).reshape(-1, *(1 for _ in part.shape[1:]))
        total = part if total is None else total + part
    assert total is not None
    return FrequencyMatrices(Grid(first.grid, real=real), total), first


def _terms(chain: Chain) -> list[tuple[Factor, Tensor]]:
    """Operators, with weights, whose Gram operators add up to that of the core: the parts of a stack, or itself."""
    core, weight = chain.core, chain.weight
    if not isinstance(core.operator, (VStack, HStack)):
        return [(core, weight)]
    if isinstance(core.operator, VStack) != core.adjoint:
        kind, side = ("vstack", "solution") if isinstance(core.operator, VStack) else ("hstack", "residual")
        raise MethodError(f"CirculantPreconditioner: a {kind} can be preconditioned on the {side} side: side={side!r}")
    terms = []
    for operator in core.operator.operators:
        part = factor_chain(operator, core.adjoint)
        if part.windows or isinstance(part.core.operator, (VStack, HStack)):
            raise MethodError(
                f"CirculantPreconditioner: {operator!r} in a stack has no convolution facing the side that is "
                f"preconditioned; {SUPPORTED}"
            )
        terms.append((part.core, part.weight * weight))
    return terms


def _embedding(A: LinearOperator, grid: tuple[int, ...] | None = None, batch_shape: tuple[int, ...] = ()) -> Embedding:
    """The periodic grid of a convolution, with enough zeros that its two ends do not interact."""
    assert isinstance(A, Convolution)
    return Embedding(_block_circulant_of(A), grid, batch_shape, separate_margins=True)


def _block_circulant_of(A: Convolution) -> Convolution:
    """Return A, or the same convolution with zero padding where A is not a truncated block-circulant operator."""
    if Embedding.serves(A):
        return A
    return Convolution(A.weight, A.spatial_in, A.stride, A.padding, A.dilation, A.groups)


def _channelwise(A: LinearOperator, embedding: Embedding, adjoint: bool, real: bool) -> Tensor:
    """The Gram matrices, on a grid with polyphase channels, of an operator that treats every channel alike."""
    channels = embedding.in_channels if adjoint else embedding.out_channels
    dtype = torch.complex128
    if isinstance(A, Identity):
        return torch.eye(channels, dtype=dtype, device=A.device)[(None,) * (1 + embedding.ndim)]
    if not isinstance(A, (Gradient, Laplacian)) or not adjoint or A.ndim != embedding.ndim:
        raise MethodError(f"CirculantPreconditioner: {A!r} cannot stand beside a convolution here; {SUPPORTED}")
    fine = tuple(n * s for n, s in zip(embedding.grid, embedding.stride, strict=True))
    # One output per phase, the kernel shifted by it, makes the stride-1 kernel a convolution of the grid's stride.
    kernels = A.kernels.detach()
    size = [k + s - 1 for k, s in zip(kernels.shape[1:], embedding.stride, strict=True)]
    weight = kernels.new_zeros(len(embedding.phases), kernels.shape[0], *size)
    for kernels_of_phase, phase in zip(weight, embedding.phases, strict=True):
        window = [slice(f, f + k) for f, k in zip(phase, kernels.shape[1:], strict=True)]
        cells = (slice(None), *window)
        kernels_of_phase[cells] = kernels
    if any(k > n for k, n in zip(size, fine, strict=True)):
        raise MethodError(f"CirculantPreconditioner: {A!r} reaches beyond a grid of {fine}")
    weight = weight.flatten(0, 1).unsqueeze(1).to(torch.float64 if real else dtype)
    periodic = Convolution(weight, fine, embedding.stride,
                           tuple((0, k - 1) for k in size), padding_mode="circular")  # fmt: skip
    S = symbol(periodic).matrices
    of_one_channel = S.mH @ S
    eye = torch.eye(channels // len(embedding.phases), dtype=dtype, device=A.device)
    per_channel: Tensor = torch.einsum("ij,...kl->...ikjl", eye, of_one_channel)
    return per_channel.flatten(-4, -3).flatten(-2, -1)
