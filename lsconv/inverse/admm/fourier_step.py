r"""ADMM's quadratic step on an extended periodic grid: one division per frequency, whatever the boundary is.

A convolution A that is zero-padded or cropped is a crop of a block-circulant C on a larger periodic grid, and so is a
convolutional L (:mod:`lsconv.fourier.embedding`, :mod:`lsconv.border.penalty`). Splitting off the *uncropped* images,

.. math:: z_j = C_j x, \qquad g_j \text{ acts on the cells that } K_j \text{ has, and on no others},

leaves a quadratic step that is block-diagonal in Fourier,

.. math:: \Big(\sum_j \rho_j C_j^H C_j\Big) x = \sum_j \rho_j C_j^H r_j,

and moves the crop into the proximal step, which leaves the other cells as they are. The image of a quadratic data term
need not be formed (:mod:`lsconv.inverse.admm.spectral_image`); an iteration then takes two transforms of the grid.
Cells outside the inputs that the padding sets to zero are one more term, and so are those that reflect or replicate
padding makes copies of inputs, whose proximal step is the mean over the copies. The alternative, an exact border solve
in every iteration, takes up to 40 % fewer iterations of five times as many Fourier transforms (``python -m benchmarks
total_variation``).

Almeida and Figueiredo, "Deconvolving images with unknown boundaries using the alternating direction method of
multipliers", IEEE Trans. Image Processing 22 (2013).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lsconv.border.penalty import Penalty, as_convolutions
from lsconv.errors import MethodError
from lsconv.fourier.batched_linalg import hermitian_inverse_
from lsconv.fourier.embedding import Embedding
from lsconv.fourier.frequency_matrices import FrequencyMatrices, Grid
from lsconv.fourier.symbol import symbol
from lsconv.inverse.admm.proximal import Term
from lsconv.inverse.admm.spectral_image import SpectralImage
from lsconv.inverse.admm.split_images import (
    ConvolutionImage,
    DifferenceImage,
    GridLayout,
    IdentityImage,
    PaddedImage,
    SplitImage,
)
from lsconv.krylov.loop.batched_scalars import ItemSpace
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import over_items
from lsconv.operators.convolution import Convolution
from lsconv.operators.difference import Gradient
from lsconv.operators.dtypes import default_rcond
from lsconv.operators.elementary import Identity
from lsconv.operators.fft_convolution import good_fft_length
from lsconv.operators.padding_modes import MODES

__all__ = ["ExtendedGrid"]


class ExtendedGrid:
    """The split images on the grid, and the quadratic step between them.

    Args:
        A: the convolution of the data term.
        terms: the data term first, then penalties whose operators are Gradient, Identity or single convolutions.
        batch: the batch dimensions.
        rho: the penalty parameter of a quadratic data term, which is constant.

    Attributes:
        terms: the terms that the iteration splits off; without the data term where ``data`` is not None.
        data: the image of a quadratic data term, updated here; None: the iteration updates all images.

    Raises:
        MethodError: the operators are not crops of block-circulant ones on one grid.
    """

    one_penalty = False

    def __init__(self, A: Convolution, terms: Sequence[Term], batch: tuple[int, ...], rho: float) -> None:
        if not isinstance(A, Convolution) or any(s != 1 for s in A.stride):
            raise MethodError("A: the extended grid needs a convolution of stride 1")
        self.copied_padding = (A.padding, A.padding_mode) if MODES[A.padding_mode].copies else None
        if self.copied_padding is not None:  # A without its padding, whose cells are unknowns of their own on the grid
            A = Convolution(
                A.weight, A.spatial_in, A.stride, A.padding, A.dilation, A.groups, backend=A.backend, check_finite=False
            )
        self.A, self.batch, self.terms, self.data_term = A, batch, list(terms), terms[0]
        parts = []
        for term in self.terms[1:]:
            if self.copied_padding is not None and not _reads_inputs_alone(term.operator):
                raise MethodError(f"{term.operator!r} beside {self.copied_padding[1]!r} padding")
            found = as_convolutions(term.operator, A.ndim)
            if found is None or any(part.factor.numel() > 1 for part in found):
                raise MethodError(f"{term.operator!r} is no convolution beside {A!r}")
            parts.append(found)
        flat = [part for found in parts for part in found]
        if not Penalty.serves(A, flat):
            raise MethodError("A and L are no crops of block-circulant operators on one grid")
        penalty = Penalty(A, flat, torch.ones((), dtype=torch.float64, device=A.device))
        self.zero_outside = any(penalty.constrained)
        if MODES[A.padding_mode].periodic:
            if self.zero_outside:
                raise MethodError("A is circular and L reads beyond the edge")
            self.grid_sizes = A.spatial_in
        else:
            periodic = any(MODES[part.convolution.padding_mode].periodic for part in flat)
            self.grid_sizes = tuple(
                n if periodic and not zero_outside else max(size, good_fft_length(max(n, m)))
                for n, m, size, zero_outside in zip(
                    A.spatial_in, A.spatial_out, penalty.grid, penalty.constrained, strict=True
                )
            )
        if self.zero_outside and not any(self._constrains_outside(term) for term in self.terms):
            identity = Identity(A.in_shape, dtype=A.dtype, device=A.device)
            self.terms.append(_zero_constraint(identity))
        embedding = Embedding(A, self.grid_sizes, batch, tapped_phases_only=True, constrained=penalty.constrained)
        self.grid = Grid(self.grid_sizes, real=not A.is_complex)
        self.layout = GridLayout(self.grid, batch, A.in_shape[0], A.groups, A.spatial_in, A.dtype, A.device)
        S = symbol(self.A, embedding).repeated(embedding.blocks)
        self.data: SpectralImage | None = None
        if self.data_term.quadratic and SpectralImage.serves(self.A, self.grid, self.layout.blocks):
            self.data = SpectralImage(self.A, S, rho, self.layout.blocks)
            self.terms = self.terms[1:]
        self.images = [self._image(term, embedding, S) for term in self.terms]
        dtype = A.dtype.to_real()
        # A shift relative to the largest eigenvalue. The limit does not depend on it: it is a proximal term at the last
        # x.
        self.floor = 10 * default_rcond(dtype)
        shape = (*batch, self.layout.channels, *self.grid_sizes)
        self._x = torch.zeros(shape, dtype=A.dtype, device=A.device)
        self._spectrum: Tensor | None = None

    def _constrains_outside(self, term: Term) -> bool:
        """Tell whether the proximal step of a term can also constrain the cells outside the inputs."""
        return isinstance(term.operator, Identity) and (self.copied_padding is None or term.weight is None)

    def _image(self, term: Term, embedding: Embedding, S: FrequencyMatrices) -> SplitImage:
        """Make the split image of a term."""
        K = term.operator
        if term is self.data_term:
            return ConvolutionImage(self.layout, self.A, S)
        if isinstance(K, Identity):
            if self.copied_padding is None:
                return IdentityImage(self.layout, zero_outside=self.zero_outside)
            return (
                PaddedImage(self.layout, *self.copied_padding)
                if self._constrains_outside(term)
                else IdentityImage(self.layout, zero_outside=False)
            )
        if isinstance(K, Gradient):
            return DifferenceImage(self.layout, K)
        found = as_convolutions(K, self.A.ndim)
        if found is None or len(found) != 1:
            raise MethodError(f"{K!r} is no single convolution")
        rows = Penalty(self.A, found, torch.ones((), dtype=torch.float64, device=self.A.device)).rows(embedding)
        matrices = FrequencyMatrices(self.grid, rows.to(self.A.dtype.to_complex()))
        return ConvolutionImage(self.layout, found[0].convolution, matrices.repeated(embedding.blocks))

    # ------------------------------------------------------------------ the step

    def set_penalties(self, rho: Sequence[Tensor]) -> None:
        """Invert the quadratic step for new penalty parameters, one per term and batch item."""
        self.rho = [value.to(self.A.dtype.to_real()) for value in rho]
        normal = None if self.data is None else self.data.normal()
        for image, value in zip(self.images, self.rho, strict=True):
            weights = self._per_block(value, len(self.grid_sizes) + 2)
            part = image.normal() * weights
            if isinstance(image, ConvolutionImage):
                image.weigh(2 * weights)
            normal = part if normal is None else normal + part
        assert normal is not None
        normal = normal.expand(self.layout.blocks, *normal.shape[1:]).contiguous()
        diagonal = normal.diagonal(dim1=-2, dim2=-1).real
        mu = self.floor * diagonal.sum(-1).flatten(1).amax(-1)
        self._mu = mu.reshape(1, -1, *(1,) * (len(self.grid_sizes) + 1)).to(self.A.dtype.to_complex())
        diagonal.add_(mu.reshape(-1, *(1,) * (diagonal.ndim - 1)))
        # complex, because products of real and complex tensors are slow
        self._inverse = FrequencyMatrices(self.grid, hermitian_inverse_(normal).to(self.A.dtype.to_complex()))

    def step(self, reflected: Sequence[Tensor], relaxation: float) -> list[Tensor]:
        """Return the images ``C_j x`` of the minimiser, given the ``r_j / 2``."""
        spectrum = self._solve(self._right_hand_side(reflected))
        if self.data is not None:
            self.data.advance(self.layout.blocked(self._x), spectrum, relaxation)
        return self._apply()

    def _right_hand_side(self, reflected: Sequence[Tensor]) -> Tensor:
        """The spectrum of ``sum_j rho_j C_j^H r_j``, given the ``r_j / 2``."""
        spectrum: Tensor | None = None
        on_grid: Tensor | None = None
        for image, value, r in zip(self.images, self.rho, reflected, strict=True):
            if isinstance(image, ConvolutionImage):
                part = image.adjoint_spectrum(r)
                spectrum = part if spectrum is None else spectrum.add_(part)
            else:
                back = image.adjoint(r).mul_(2 * over_items(value, len(self.grid_sizes) + 1))
                on_grid = back if on_grid is None else on_grid.add_(back)
        force: Tensor | None = None
        if self.data is not None:
            on_grid = torch.zeros_like(self._x) if on_grid is None else on_grid
            force = self.data.force(self.layout.blocked(on_grid))
        if on_grid is not None:
            part = self.grid.transform(self.layout.blocked(on_grid))
            spectrum = part if spectrum is None else spectrum.add_(part)
        assert spectrum is not None
        return spectrum if force is None else spectrum.add_(force)

    def _solve(self, force: Tensor) -> Tensor:
        """Solve for the spectrum of the minimiser; the right-hand side ``force``, a spectrum, is overwritten."""
        if self._spectrum is not None:
            force = force.addcmul_(self._spectrum, self._mu)
        self._spectrum = self._inverse(force)
        self._x = self.grid.inverse(self._spectrum).reshape(self._x.shape)
        return self._spectrum

    def _apply(self) -> list[Tensor]:
        assert self._spectrum is not None
        return [image.apply(self._x, self._spectrum) for image in self.images]

    def begin(self, x: Tensor | None, y: Tensor, rho: Sequence[Tensor]) -> list[Tensor]:
        """Return the images of the first x: the given one, or the solution with quadratic terms of weights ``rho``."""
        if x is not None:
            self._x = self._extended(x, self.A.in_shape)
            self._spectrum = spectrum = self.grid.transform(self.layout.blocked(self._x))
        else:
            self.set_penalties(rho)
            data = self._extended(y, self.A.out_shape)
            if self.data is None:
                shapes = [image.shape for image in self.images[1:]]
                force = self._right_hand_side([data / 2, *(data.new_zeros(*self.batch, *shape) for shape in shapes)])
            else:
                force = self.data.adjoint_symbol(self.grid.transform(self.layout.blocked(data))).mul_(self.data.rho)
            spectrum = self._solve(force)
        if self.data is not None:
            padded_data = y.new_zeros(*self.batch, self.A.out_shape[0], *self.grid_sizes)
            self.layout.window(padded_data, self.A.spatial_out).copy_(y)
            self.data.begin(self.layout.blocked(self._x), spectrum, self.layout.blocked(padded_data))
        return self._apply()

    @property
    def x(self) -> Tensor:
        """The last minimiser, ``(*batch, *in_shape)``."""
        return self.layout.window(self._x, self.A.spatial_in)

    def _per_block(self, values: Tensor, ones: int, dim: int = 0) -> Tensor:
        values = values.expand(self.batch).reshape(-1, 1).expand(-1, self.layout.groups).reshape(-1)
        return values.reshape(*(1,) * dim, -1, *(1,) * ones)

    def _extended(self, values: Tensor, item_shape: tuple[int, ...]) -> Tensor:
        """Extend values to the grid, by a ramp from the last cell to the first, or by zeros if these are required."""
        values = values.expand(*self.batch, *item_shape)
        zero = self.zero_outside and self.copied_padding is None
        for a, size in enumerate(self.grid_sizes):
            axis = a - len(self.grid_sizes)
            outside = size - values.shape[axis]
            if outside == 0:
                continue
            shape = [1] * len(self.grid_sizes)
            shape[a] = outside
            t = (torch.arange(1, outside + 1, device=values.device, dtype=values.real.dtype) / (outside + 1)).reshape(
                shape
            )
            last, first = values.narrow(axis, values.shape[axis] - 1, 1), values.narrow(axis, 0, 1)
            ramp = torch.zeros_like(t) * last if zero else last * (1 - t) + first * t
            values = torch.cat([values, ramp], dim=axis)
        return values.contiguous()


def _reads_inputs_alone(L: LinearOperator) -> bool:
    """Tell whether a penalty reads inputs only: the identity, or differences that end at the edge.

    With reflect or replicate padding the grid serves only these, because others converge slowly on it.
    """
    return isinstance(L, Identity) or (isinstance(L, Gradient) and L.boundary == "neumann")


def _zero_constraint(identity: Identity) -> Term:
    """A term of value zero whose image constrains the cells outside the inputs to zero."""
    ndim = len(identity.out_shape)
    space = ItemSpace(identity.out_shape, identity.dtype, identity.device)

    def zero(v: Tensor) -> Tensor:
        return torch.zeros(v.shape[: v.ndim - ndim], dtype=space.scalar, device=v.device)

    return Term(
        identity,
        lambda v, rho, out: out.copy_(v),
        zero,
        lambda p, v: torch.zeros_like(p),
        lambda v, p: zero(v),
        follows=True,
    )
