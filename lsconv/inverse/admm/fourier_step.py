r"""ADMM's quadratic step on an extended periodic grid: one division per frequency, whatever the boundary is.

A convolution A that is zero-padded or cropped is a crop of a block-circulant C on a larger periodic grid, and so is a
convolutional L (:mod:`lsconv.fourier.embedding`, :mod:`lsconv.border.penalty`). Splitting off the *uncropped* images,

.. math:: z_j = C_j x, \qquad g_j \text{ of the cells that } K_j \text{ has, nothing of the others},

leaves a quadratic step that is diagonal in Fourier,

.. math:: \Big(\sum_j \rho_j C_j^H C_j\Big) x = \sum_j \rho_j C_j^H r_j,

and the crop goes into the proximal step, where it costs nothing: cells without data are free there. The image of a
quadratic data term need not even be formed (:mod:`lsconv.inverse.admm.spectral_image`), which leaves two transforms of
the grid to an iteration. Input cells that the padding holds at zero are one more term; so are those that reflecting or
replicating padding makes copies of others, whose proximal step is the mean over the copies. The alternative, an exact
border solve in every iteration, takes 0.6 to 1 times the iterations and five times as many Fourier transforms in each
(``python -m benchmarks total_variation``).

Almeida and Figueiredo, "Deconvolving images with unknown boundaries using the alternating direction method of
multipliers", IEEE Trans. Image Processing 22 (2013).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lsconv.border.penalty import Penalty, as_convolutions
from lsconv.errors import MethodError
from lsconv.fourier.batched_linalg import hermitian_inverse
from lsconv.fourier.embedding import Embedding
from lsconv.fourier.symbol import FrequencyMatrices, Grid, symbol
from lsconv.inverse.admm.proximal import Term
from lsconv.inverse.admm.spectral_image import SpectralImage
from lsconv.inverse.admm.split_images import Copies, Differences, Filtered, GridLayout, Itself, SplitImage
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
        terms: that of the data first, then penalties whose operators are Gradient, Identity or single convolutions.
        batch: the batch dimensions.
        rho: the penalty of a quadratic data term, which stays.

    Attributes:
        terms: the terms that the iteration splits off, which are not that of the data where ``data`` does it here.
        data: the image of a quadratic data term; None: the iteration has all images.

    Raises:
        MethodError: the operators are not crops of block-circulant ones on one grid.
    """

    one_penalty = False

    def __init__(self, A: Convolution, terms: Sequence[Term], batch: tuple[int, ...], rho: float) -> None:
        if not isinstance(A, Convolution) or any(s != 1 for s in A.stride):
            raise MethodError("A: the extended grid needs a convolution of stride 1")
        self.repeated = (A.padding, A.padding_mode) if MODES[A.padding_mode].copies else None
        if self.repeated is not None:  # without the padding, whose cells are then unknowns of their own
            A = Convolution(
                A.weight, A.spatial_in, A.stride, A.padding, A.dilation, A.groups, backend=A.backend, check_finite=False
            )
        self.A, self.batch, self.terms, self.first = A, batch, list(terms), terms[0]
        parts = []
        for term in self.terms[1:]:
            if self.repeated is not None and not _reads_inputs_alone(term.operator):
                raise MethodError(f"{term.operator!r} beside {self.repeated[1]!r} padding")
            found = as_convolutions(term.operator, A.ndim)
            if found is None or any(part.factor.numel() > 1 for part in found):
                raise MethodError(f"{term.operator!r} is no convolution beside {A!r}")
            parts.append(found)
        flat = [part for found in parts for part in found]
        if not Penalty.serves(A, flat):
            raise MethodError("A and L are no crops of block-circulant operators on one grid")
        penalty = Penalty(A, flat, torch.ones((), dtype=torch.float64, device=A.device))
        self.held = any(penalty.constrained)
        if MODES[A.padding_mode].periodic:
            if self.held:
                raise MethodError("A is circular and L reads beyond the edge")
            self.grid_sizes = A.spatial_in
        else:
            periodic = any(MODES[part.convolution.padding_mode].periodic for part in flat)
            self.grid_sizes = tuple(
                n if periodic and not held else max(size, good_fft_length(max(n, m)))
                for n, m, size, held in zip(A.spatial_in, A.spatial_out, penalty.grid, penalty.constrained, strict=True)
            )
        if self.held and not any(self._holds(term) for term in self.terms):
            identity = Identity(A.in_shape, dtype=A.dtype, device=A.device)
            self.terms.append(_nothing(identity))
        embedding = Embedding(A, self.grid_sizes, batch, only_read=True, constrained=penalty.constrained)
        self.grid = Grid(self.grid_sizes, real=not A.is_complex)
        self.layout = GridLayout(self.grid, batch, A.in_shape[0], A.groups, A.spatial_in, A.dtype, A.device)
        S = _repeated(symbol(self.A, embedding), embedding)
        self.data: SpectralImage | None = None
        if self.first.quadratic and SpectralImage.serves(self.A, self.grid, self.layout.blocks):
            self.data = SpectralImage(self.A, S, rho, self.layout.blocks)
            self.terms = self.terms[1:]
        self.images = [self._image(term, embedding, S) for term in self.terms]
        dtype = A.dtype.to_real()
        # relative to the largest eigenvalue; the limit does not depend on it, because what it adds pulls to the last x
        self.floor = 10 * default_rcond(dtype)
        shape = (*batch, self.layout.channels, *self.grid_sizes)
        self._x = torch.zeros(shape, dtype=A.dtype, device=A.device)
        self._spectrum: Tensor | None = None

    def _holds(self, term: Term) -> bool:
        """Tell whether the term's step can hold the cells beyond the inputs; one with a weight counts cells once."""
        return isinstance(term.operator, Identity) and (self.repeated is None or term.weight is None)

    def _image(self, term: Term, embedding: Embedding, S: FrequencyMatrices) -> SplitImage:
        """The way in which the split image of a term is made from the spectrum of x."""
        K = term.operator
        if term is self.first:
            return Filtered(self.layout, self.A, S)
        if isinstance(K, Identity):
            if self.repeated is None:
                return Itself(self.layout, held=self.held)
            return Copies(self.layout, *self.repeated) if self._holds(term) else Itself(self.layout, held=False)
        if isinstance(K, Gradient):
            return Differences(self.layout, K)
        found = as_convolutions(K, self.A.ndim)
        if found is None or len(found) != 1:
            raise MethodError(f"{K!r} is no single convolution")
        rows = Penalty(self.A, found, torch.ones((), dtype=torch.float64, device=self.A.device)).rows(embedding)
        matrices = FrequencyMatrices(self.grid, rows.to(self.A.dtype.to_complex()))
        return Filtered(self.layout, found[0].convolution, _repeated(matrices, embedding))

    # ------------------------------------------------------------------ the step

    def set_penalties(self, rho: Sequence[Tensor]) -> None:
        """The inverse for other penalties, one per term and batch item."""
        self.rho = [value.to(self.A.dtype.to_real()) for value in rho]
        normal = None if self.data is None else self.data.normal()
        for image, value in zip(self.images, self.rho, strict=True):
            weights = self._per_block(value, len(self.grid_sizes) + 2)
            part = image.normal() * weights
            if isinstance(image, Filtered):
                image.weigh(2 * weights)
            normal = part if normal is None else normal + part
        assert normal is not None
        normal = normal.expand(self.layout.blocks, *normal.shape[1:]).contiguous()
        diagonal = normal.diagonal(dim1=-2, dim2=-1).real
        mu = self.floor * diagonal.sum(-1).flatten(1).amax(-1)
        self._mu = mu.reshape(1, -1, *(1,) * (len(self.grid_sizes) + 1)).to(self.A.dtype.to_complex())
        diagonal.add_(mu.reshape(-1, *(1,) * (diagonal.ndim - 1)))
        # a product of real and complex numbers takes four times as long
        self._inverse = FrequencyMatrices(self.grid, hermitian_inverse(normal).to(self.A.dtype.to_complex()))

    def step(self, reflected: Sequence[Tensor], relaxation: float) -> list[Tensor]:
        """The images ``C_j x`` of the minimiser, given the ``r_j / 2``."""
        spectrum = self._solve(self._force(reflected))
        if self.data is not None:
            self.data.advance(self.layout.blocked(self._x), spectrum, relaxation)
        return self._apply()

    def _force(self, reflected: Sequence[Tensor]) -> Tensor:
        """The spectrum of ``sum_j rho_j C_j^H r_j``, given the ``r_j / 2``."""
        spectrum: Tensor | None = None
        plain: Tensor | None = None
        for image, value, r in zip(self.images, self.rho, reflected, strict=True):
            if isinstance(image, Filtered):
                part = image.adjoint_spectrum(r)
                spectrum = part if spectrum is None else spectrum.add_(part)
            else:
                back = image.adjoint(r).mul_(2 * over_items(value, len(self.grid_sizes) + 1))
                plain = back if plain is None else plain.add_(back)
        force: Tensor | None = None
        if self.data is not None:
            plain = torch.zeros_like(self._x) if plain is None else plain
            force = self.data.force(self.layout.blocked(plain))
        if plain is not None:
            part = self.grid.transform(self.layout.blocked(plain))
            spectrum = part if spectrum is None else spectrum.add_(part)
        assert spectrum is not None
        return spectrum if force is None else spectrum.add_(force)

    def _solve(self, force: Tensor) -> Tensor:
        """The spectrum of the minimiser, of that of the force, which is overwritten."""
        if self._spectrum is not None:
            force = force.addcmul_(self._spectrum, self._mu)
        self._spectrum = self._inverse(force)
        self._x = self.grid.inverse(self._spectrum).reshape(self._x.shape)
        return self._spectrum

    def _apply(self) -> list[Tensor]:
        assert self._spectrum is not None
        return [image.apply(self._x, self._spectrum) for image in self.images]

    def begin(self, x: Tensor | None, y: Tensor, rho: Sequence[Tensor]) -> list[Tensor]:
        """The images of a first x: the one given, or the answer to quadratic terms with penalties ``rho``."""
        if x is not None:
            self._x = self._extended(x, self.A.in_shape)
            self._spectrum = spectrum = self.grid.transform(self.layout.blocked(self._x))
        else:
            self.set_penalties(rho)
            data = self._extended(y, self.A.out_shape)
            if self.data is None:
                shapes = [image.shape for image in self.images[1:]]
                force = self._force([data / 2, *(data.new_zeros(*self.batch, *shape) for shape in shapes)])
            else:
                force = self.data.back(self.grid.transform(self.layout.blocked(data))).mul_(self.data.rho)
            spectrum = self._solve(force)
        if self.data is not None:
            known = y.new_zeros(*self.batch, self.A.out_shape[0], *self.grid_sizes)
            self.layout.window(known, self.A.spatial_out).copy_(y)
            self.data.begin(self.layout.blocked(self._x), spectrum, self.layout.blocked(known))
        return self._apply()

    @property
    def x(self) -> Tensor:
        """The last minimiser, ``(*batch, *in_shape)``."""
        return self.layout.window(self._x, self.A.spatial_in)

    def _per_block(self, values: Tensor, ones: int, dim: int = 0) -> Tensor:
        values = values.expand(self.batch).reshape(-1, 1).expand(-1, self.layout.groups).reshape(-1)
        return values.reshape(*(1,) * dim, -1, *(1,) * ones)

    def _extended(self, values: Tensor, item_shape: tuple[int, ...]) -> Tensor:
        """Extend values to the grid, by a ramp from their last cell to their first; by zeros where cells are held."""
        values = values.expand(*self.batch, *item_shape)
        zero = self.held and self.repeated is None
        for a, size in enumerate(self.grid_sizes):
            axis = a - len(self.grid_sizes)
            beyond = size - values.shape[axis]
            if beyond == 0:
                continue
            shape = [1] * len(self.grid_sizes)
            shape[a] = beyond
            t = (torch.arange(1, beyond + 1, device=values.device, dtype=values.real.dtype) / (beyond + 1)).reshape(
                shape
            )
            last, first = values.narrow(axis, values.shape[axis] - 1, 1), values.narrow(axis, 0, 1)
            ramp = torch.zeros_like(t) * last if zero else last * (1 - t) + first * t
            values = torch.cat([values, ramp], dim=axis)
        return values.contiguous()


def _reads_inputs_alone(L: LinearOperator) -> bool:
    """Tell whether a penalty reads cells inside the edge only: the identity, or differences that end at it.

    Beside reflect or replicate padding only these are served on the grid: other convolutions converge slowly there.
    """
    return isinstance(L, Identity) or (isinstance(L, Gradient) and L.boundary == "neumann")


def _repeated(S: FrequencyMatrices, embedding: Embedding) -> FrequencyMatrices:
    """The groups' symbols for every batch item; a single one broadcasts as it is."""
    present = S.matrices.shape[0]
    if present in (1, embedding.blocks):
        return S
    return S.map(lambda m: m.repeat(embedding.blocks // present, *(1 for _ in m.shape[1:])))


def _nothing(identity: Identity) -> Term:
    """Return a term of no weight, whose image holds the cells beyond the inputs at zero."""
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
