r"""ADMM's quadratic step on an extended periodic grid: one division per frequency, whatever the boundary is.

A convolution A that is zero-padded or cropped is a crop of a block-circulant C on a larger periodic grid, and so is a
convolutional L (:mod:`lsconv.fourier.embedding`, :mod:`lsconv.fourier.penalty`). Splitting off the *uncropped* images,

.. math:: z_j = C_j x, \qquad g_j \text{ of the cells that } K_j \text{ has, nothing of the others},

leaves a quadratic step that is diagonal in Fourier,

.. math:: \Big(\sum_j \rho_j C_j^H C_j\Big) x = \sum_j \rho_j C_j^H r_j,

and the crop goes into the proximal step, where it costs nothing: cells without data are free there. Input cells that
the padding holds at zero are one more term. The alternative, an exact border solve in every iteration, needs as many
iterations and five times as many transforms (``python -m benchmarks total_variation``).

Almeida and Figueiredo, "Deconvolving images with unknown boundaries using the alternating direction method of
multipliers", IEEE Trans. Image Processing 22 (2013).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lsconv.errors import MethodError
from lsconv.fourier.embedding import Embedding
from lsconv.fourier.penalty import Penalty, as_convolutions
from lsconv.fourier.symbol import FrequencyMatrices, Grid, hermitian_inverse, symbol
from lsconv.inverse.proximal import Term
from lsconv.krylov.batch import ItemSpace
from lsconv.operators.convolution import Convolution
from lsconv.operators.difference import Gradient
from lsconv.operators.elementary import Identity
from lsconv.operators.fft_convolution import good_fft_length

__all__ = ["ExtendedGrid"]

# The least eigenvalue of the quadratic step, relative to the largest; the limit does not depend on it, because what it
# adds pulls to the last x.
_FLOOR = {torch.float32: 1e-6, torch.float64: 1e-12}


class ExtendedGrid:
    """The split images on the grid, and the quadratic step between them.

    Args:
        A: the convolution of the data term.
        terms: that of the data first, then penalties whose operators are Gradient, Identity or single convolutions.
        batch: the batch dimensions.

    Raises:
        MethodError: the operators are not crops of block-circulant ones on one grid.
    """

    def __init__(self, A: Convolution, terms: Sequence[Term], batch: tuple[int, ...]) -> None:
        if not isinstance(A, Convolution) or any(s != 1 for s in A.stride):
            raise MethodError("A: the extended grid needs a convolution of stride 1")
        self.A, self.batch, self.terms = A, batch, list(terms)
        parts = []
        for term in self.terms[1:]:
            found = as_convolutions(term.operator, A.ndim)
            if found is None or any(part.factor.numel() > 1 for part in found):
                raise MethodError(f"{term.operator!r} is no convolution beside {A!r}")
            parts.append(found)
        flat = [part for found in parts for part in found]
        if not Penalty.serves(A, flat):
            raise MethodError("A and L are no crops of block-circulant operators on one grid")
        penalty = Penalty(A, flat, torch.ones((), dtype=torch.float64, device=A.device))
        self.held = any(penalty.constrained)
        if A.padding_mode == "circular":
            if self.held:
                raise MethodError("A is circular and L reads beyond the edge")
            self.grid_sizes = A.spatial_in
        else:
            periodic = any(part.convolution.padding_mode == "circular" for part in flat)
            self.grid_sizes = tuple(
                n if periodic and not held else max(size, good_fft_length(max(n, m)))
                for n, m, size, held in zip(A.spatial_in, A.spatial_out, penalty.grid, penalty.constrained, strict=True)
            )
        if self.held and not any(isinstance(term.operator, Identity) for term in self.terms):
            identity = Identity(A.in_shape, dtype=A.dtype, device=A.device)
            self.terms.append(_nothing(identity))
        embedding = Embedding(A, self.grid_sizes, batch, only_read=True, constrained=penalty.constrained)
        self.embedding, self.groups = embedding, A.groups
        self.grid = Grid(self.grid_sizes, real=not A.is_complex)
        self.blocks, self.channels = embedding.blocks, A.in_shape[0]
        self.images = [self._image(term, k, embedding) for k, term in enumerate(self.terms)]
        dtype = A.dtype.to_real()
        self.floor = _FLOOR[dtype]
        shape = (*batch, self.channels, *self.grid_sizes)
        self._x = torch.zeros(shape, dtype=A.dtype, device=A.device)
        self._spectrum: Tensor | None = None

    def _image(self, term: Term, k: int, embedding: Embedding) -> _Image:
        K = term.operator
        if k == 0:
            return _Filtered(self, self.A, _repeated(symbol(self.A, embedding), embedding))
        if isinstance(K, Identity):
            return _Itself(self, held=self.held)
        if isinstance(K, Gradient):
            return _Differences(self, K)
        found = as_convolutions(K, self.A.ndim)
        if found is None or len(found) != 1:
            raise MethodError(f"{K!r} is no single convolution")
        rows = Penalty(self.A, found, torch.ones((), dtype=torch.float64, device=self.A.device)).rows(embedding)
        matrices = FrequencyMatrices(self.grid, rows.to(self.A.dtype.to_complex()))
        return _Filtered(self, found[0].convolution, _repeated(matrices, embedding))

    # ------------------------------------------------------------------ the step

    def set_penalties(self, rho: Sequence[Tensor]) -> None:
        """The inverse for other penalties, one per term and batch item."""
        self.rho = [value.to(self.A.dtype.to_real()) for value in rho]
        normal: Tensor | None = None
        for image, value in zip(self.images, self.rho, strict=True):
            weights = self._per_block(value, len(self.grid_sizes) + 2)
            part = image.normal() * weights
            if isinstance(image, _Filtered):
                image.weigh(2 * weights)
            normal = part if normal is None else normal + part
        assert normal is not None
        normal = normal.expand(self.blocks, *normal.shape[1:]).contiguous()
        diagonal = normal.diagonal(dim1=-2, dim2=-1).real
        mu = self.floor * diagonal.sum(-1).flatten(1).amax(-1)
        self._mu = mu.reshape(1, -1, *(1,) * (len(self.grid_sizes) + 1)).to(self.A.dtype.to_complex())
        diagonal.add_(mu.reshape(-1, *(1,) * (diagonal.ndim - 1)))
        self._inverse = FrequencyMatrices(self.grid, hermitian_inverse(normal))

    def step(self, reflected: Sequence[Tensor]) -> list[Tensor]:
        """The images ``C_j x`` of the minimiser, given the ``r_j / 2``."""
        spectrum: Tensor | None = None
        plain: Tensor | None = None
        for image, value, r in zip(self.images, self.rho, reflected, strict=True):
            if isinstance(image, _Filtered):
                part = image.adjoint_spectrum(r)
                spectrum = part if spectrum is None else spectrum.add_(part)
            else:
                back = image.adjoint(r).mul_(2 * value.reshape(*value.shape, *(1,) * (len(self.grid_sizes) + 1)))
                plain = back if plain is None else plain.add_(back)
        if plain is not None:
            part = self.grid.transform(self.blocked(plain))
            spectrum = part if spectrum is None else spectrum.add_(part)
        assert spectrum is not None
        if self._spectrum is not None:
            spectrum = spectrum.addcmul_(self._spectrum, self._mu)
        self._spectrum = self._inverse(spectrum)
        self._x = self.grid.inverse(self._spectrum).reshape(self._x.shape)
        return self._apply()

    def _apply(self) -> list[Tensor]:
        assert self._spectrum is not None
        return [image.apply(self._x, self._spectrum) for image in self.images]

    def begin(self, x: Tensor | None, y: Tensor, rho: Sequence[Tensor]) -> list[Tensor]:
        """The images of a first x: the one given, or the answer to quadratic terms with penalties ``rho``."""
        if x is not None:
            self._x = self._extended(x, self.A.in_shape)
            self._spectrum = self.grid.transform(self.blocked(self._x))
            return self._apply()
        data = self._extended(y, self.A.out_shape)
        self.set_penalties(rho)
        shapes = [image.shape for image in self.images[1:]]
        return self.step([data / 2, *(data.new_zeros(*self.batch, *shape) for shape in shapes)])

    @property
    def x(self) -> Tensor:
        """The last minimiser, ``(*batch, *in_shape)``."""
        return self.window(self._x, self.A.spatial_in)

    # ------------------------------------------------------------------ layouts

    def window(self, tensor: Tensor, sizes: Sequence[int]) -> Tensor:
        """A view of the cells that are there."""
        for a, n in enumerate(sizes):
            tensor = tensor.narrow(a - len(sizes), 0, n)
        return tensor

    def copy_outside(self, source: Tensor, target: Tensor, sizes: Sequence[int]) -> None:
        """Copy the cells outside the window."""
        ndim = len(sizes)
        for a, n in enumerate(sizes):
            beyond = source.shape[a - ndim] - n
            if beyond:
                target.narrow(a - ndim, n, beyond).copy_(source.narrow(a - ndim, n, beyond))
                source, target = source.narrow(a - ndim, 0, n), target.narrow(a - ndim, 0, n)

    def blocked(self, tensor: Tensor) -> Tensor:
        """``(*batch, channels, *grid)`` as ``(1, blocks, channels/groups, *grid)``."""
        return tensor.reshape(1, self.blocks, -1, *self.grid_sizes)

    def _per_block(self, values: Tensor, ones: int, dim: int = 0) -> Tensor:
        values = values.expand(self.batch).reshape(-1, 1).expand(-1, self.groups).reshape(-1)
        return values.reshape(*(1,) * dim, -1, *(1,) * ones)

    def _extended(self, values: Tensor, item_shape: tuple[int, ...]) -> Tensor:
        """Values on the grid: beyond their edge a ramp to the other side, or zero where cells are held at it."""
        values = values.expand(*self.batch, *item_shape)
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
            ramp = torch.zeros_like(t) * last if self.held else last * (1 - t) + first * t
            values = torch.cat([values, ramp], dim=axis)
        return values.contiguous()


# ---------------------------------------------------------------------- images


class _Image:
    """One split image ``C x`` of shape ``(*batch, *shape)``, and what of it the term's operator has."""

    shape: tuple[int, ...]

    def __init__(self, step: ExtendedGrid, sizes: Sequence[int]) -> None:
        self.owner, self.sizes = step, tuple(sizes)

    def proximal(self, term: Term, s: Tensor, rho: Tensor, out: Tensor) -> None:
        """The proximal step of ``s`` into ``out``; cells that the operator does not have are free."""
        window = self.owner.window
        term.prox(window(s, self.sizes), rho, window(out, self.sizes))
        self.owner.copy_outside(s, out, self.sizes)

    def item(self, z: Tensor) -> Tensor:
        """What the operator has of ``z``, ``(*batch, *K.out_shape)``."""
        return self.owner.window(z, self.sizes)

    def normal(self) -> Tensor:
        """``C^H C`` per frequency: ``(blocks or 1, *frequencies, columns, columns)``."""
        raise NotImplementedError

    def apply(self, x: Tensor, spectrum: Tensor) -> Tensor:
        """``C x``."""
        raise NotImplementedError

    def adjoint(self, r: Tensor) -> Tensor:
        """``C^H r`` on the grid; it may overwrite r."""
        raise NotImplementedError


class _Filtered(_Image):
    """A convolution, through its symbol."""

    def __init__(self, step: ExtendedGrid, convolution: Convolution, S: FrequencyMatrices) -> None:
        super().__init__(step, convolution.spatial_out)
        self.S = S
        self.back = S  # 2 rho times its adjoint, as soon as there is a rho
        self.shape = (convolution.out_shape[0], *step.grid_sizes)

    def weigh(self, weights: Tensor) -> None:
        """The factors of the adjoint."""
        self.back = FrequencyMatrices(self.S.grid, weights * self.S.matrices.mH)

    def normal(self) -> Tensor:
        m = self.S.matrices
        return m.abs().square().sum(-2, keepdim=True) if self.S.columns == 1 else m.mH @ m

    def apply(self, x: Tensor, spectrum: Tensor) -> Tensor:
        return self.owner.grid.inverse(self.S(spectrum)).reshape(*self.owner.batch, *self.shape)

    def adjoint_spectrum(self, r: Tensor) -> Tensor:
        return self.back(self.owner.grid.transform(self.owner.blocked(r)))


class _Itself(_Image):
    """x, for bounds and for cells held at zero."""

    def __init__(self, step: ExtendedGrid, *, held: bool) -> None:
        super().__init__(step, step.A.spatial_in)
        self.held = held
        self.shape = (step.channels, *step.grid_sizes)

    def proximal(self, term: Term, s: Tensor, rho: Tensor, out: Tensor) -> None:
        if not self.held:
            return super().proximal(term, s, rho, out)
        window = self.owner.window
        term.prox(window(s, self.sizes), rho, window(out.zero_(), self.sizes))
        return None

    def normal(self) -> Tensor:
        return _scalar_matrices(self.owner, 1.0)

    def apply(self, x: Tensor, spectrum: Tensor) -> Tensor:
        return x

    def adjoint(self, r: Tensor) -> Tensor:
        return r.clone()


class _Differences(_Image):
    """Periodic forward differences; those that a Neumann edge does not have are free."""

    def __init__(self, step: ExtendedGrid, gradient: Gradient) -> None:
        super().__init__(step, step.A.spatial_in)
        self.spacing, self.ndim = gradient.spacing, gradient.ndim
        self.free = gradient.boundary == "neumann"
        self.shape = (gradient.ndim, step.channels, *step.grid_sizes)

    def normal(self) -> Tensor:
        sizes = self.owner.grid_sizes
        total = torch.zeros(sizes, dtype=torch.float64, device=self.owner.A.device)
        for a, (n, h) in enumerate(zip(sizes, self.spacing, strict=True)):
            angle = torch.arange(n, dtype=torch.float64, device=self.owner.A.device) * (math.pi / n)
            shape = [1] * len(sizes)
            shape[a] = n
            total = total + ((2 * torch.sin(angle) / h) ** 2).reshape(shape)
        return _scalar_matrices(self.owner, total[..., : self.owner.grid.frequencies[-1]])

    def apply(self, x: Tensor, spectrum: Tensor) -> Tensor:
        out = x.new_empty(*self.owner.batch, *self.shape)
        for a, h in enumerate(self.spacing):
            axis, part = a - self.ndim, out.select(-self.ndim - 2, a)
            n = x.shape[axis]
            torch.sub(x.narrow(axis, 1, n - 1), x.narrow(axis, 0, n - 1), out=part.narrow(axis, 0, n - 1))
            torch.sub(x.narrow(axis, 0, 1), x.narrow(axis, n - 1, 1), out=part.narrow(axis, n - 1, 1))
            if h != 1:
                part.div_(h)
        return out

    def adjoint(self, r: Tensor) -> Tensor:
        total: Tensor | None = None
        for a, h in enumerate(self.spacing):
            axis, part = a - self.ndim, r.select(-self.ndim - 2, a)
            n = part.shape[axis]
            if h != 1:
                part.div_(h)
            total = part.neg() if total is None else total.sub_(part)
            total.narrow(axis, 1, n - 1).add_(part.narrow(axis, 0, n - 1))
            total.narrow(axis, 0, 1).add_(part.narrow(axis, n - 1, 1))
        assert total is not None
        return total

    def _edges(self, window: Tensor) -> list[Tensor]:
        """The last difference along every axis, which a Neumann edge does not have."""
        parts = [window.select(-self.ndim - 2, a) for a in range(self.ndim)]
        return [part.narrow(a - self.ndim, part.shape[a - self.ndim] - 1, 1) for a, part in enumerate(parts)]

    def proximal(self, term: Term, s: Tensor, rho: Tensor, out: Tensor) -> None:
        if not self.free:
            return super().proximal(term, s, rho, out)
        edges = self._edges(self.owner.window(s, self.sizes))
        given = [edge.clone() for edge in edges]
        for edge in edges:
            edge.zero_()
        super().proximal(term, s, rho, out)
        for edge, other, value in zip(edges, self._edges(self.owner.window(out, self.sizes)), given, strict=True):
            edge.copy_(value)
            other.copy_(value)
        return None

    def item(self, z: Tensor) -> Tensor:
        window = self.owner.window(z, self.sizes)
        if self.free:
            window = window.clone()
            for edge in self._edges(window):
                edge.zero_()
        return window


def _scalar_matrices(step: ExtendedGrid, values: Tensor | float) -> Tensor:
    """``values`` times the identity, per frequency."""
    columns = step.channels // step.groups
    dtype = step.A.dtype.to_real() if columns == 1 else step.A.dtype.to_complex()
    eye = torch.eye(columns, dtype=dtype, device=step.A.device)
    scale = torch.as_tensor(values, device=step.A.device).to(step.A.dtype.to_real()).expand(step.grid.frequencies)
    return (scale[..., None, None] * eye)[None]


def _repeated(S: FrequencyMatrices, embedding: Embedding) -> FrequencyMatrices:
    """The groups' symbols for every batch item; a single one broadcasts as it is."""
    present = S.matrices.shape[0]
    if present in (1, embedding.blocks):
        return S
    return S.map(lambda m: m.repeat(embedding.blocks // present, *(1 for _ in m.shape[1:])))


def _nothing(identity: Identity) -> Term:
    """No term, for the cells held at zero."""
    ndim = len(identity.out_shape)
    space = ItemSpace(identity.out_shape, identity.dtype, identity.device)

    def zero(v: Tensor) -> Tensor:
        return torch.zeros(v.shape[: v.ndim - ndim], dtype=space.scalar, device=v.device)

    return Term(
        identity, lambda v, rho, out: out.copy_(v), zero, lambda p, v: torch.zeros_like(p), lambda v, p: zero(v)
    )
