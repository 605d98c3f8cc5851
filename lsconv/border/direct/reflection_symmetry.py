r"""Reflections that a block-circulant operator and its border have in common, and coordinates in which these are signs.

A reflection along an axis takes the position p of channel c to :math:`s_c - p` on the circle, with the sum :math:`s_c`
of the first and last of the channel's border positions, and so the border to itself. With symmetric kernels it takes
the operator to itself as well,

.. math:: q_{cd}(s_c - s_d - t) = q_{cd}(t),

and in the coordinates :math:`(u_x \pm u_{\sigma x}) / \sqrt 2` the operator has one block for each sign: a system half
as large twice, whose factors cost a quarter.

The saddle operator of one channel, :math:`((-a, b), (b^H, a))` with an even a, has another one, whatever the kernel: a
reflection :math:`\varphi` along all axes takes the border of its first component to that of the second. Read backwards
through it, the second component :math:`\xi_p = x_{\varphi(p)}` meets the first one as the imaginary part meets the
real one,

.. math:: Q (r, x) = (f, g) \iff (-a + i h)\, \overline{(r + i \xi)} = f + i\, g_{\varphi},
          \qquad h_{pq} = b(p - \varphi(q)) = h_{qp},

a complex system of half the size, whose factors cost half.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lsconv.border.border_set import Border
from lsconv.fourier.symbol import FrequencyMatrices, plane_waves

__all__ = ["Folding", "exchange", "reflection", "reflection_sums", "run_ends"]

# An operator this much off symmetry, relative to its norm, is taken for symmetric: a transform's rounding, divided by
# the damping, is. Whoever inverts the symmetric one makes an error of that size.
_ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-9}


def reflection_sums(matrices: FrequencyMatrices, border: Border) -> list[Tensor | None]:
    """The sums ``s_c`` of the reflection along each axis, or None where there is none.

    Args:
        matrices: the operator, real on the grid.
        border: its border.
    """
    axes = range(len(border.grid))
    if not matrices.grid.real or not matrices.elementwise:
        return [None for _ in axes]
    sums = [reflection(members) for members in border.members]
    return [s if s is not None and _symmetric(matrices, a, s) else None for a, s in enumerate(sums)]


def reflection(members: Tensor) -> Tensor | None:
    """Of ``(channels, positions)``: the sums of the ends of the run of marked positions, around the circle."""
    n, sums = members.shape[1], []
    for marked in members:
        places = marked.nonzero().flatten()
        if len(places) in (0, n):
            return None
        s = sum(run_ends(marked)) % n
        if not bool(marked[(s - places) % n].all()):
            return None
        sums.append(s)
    return torch.tensor(sums)


def exchange(members: list[Tensor]) -> list[int] | None:
    """The sums of the reflection that takes the border of the first of two channels to that of the second, per axis.

    None where their runs of marked positions differ in length.
    """
    sums = []
    for first, second in members:
        if not bool(first.any()) or not bool(second.any()):
            return None
        t = (run_ends(first)[0] + run_ends(second)[1]) % len(first)
        places = torch.arange(len(first))
        if not bool((second[(t - places) % len(first)] == first).all()):
            return None
        sums.append(t)
    return sums


def run_ends(marked: Tensor) -> tuple[int, int]:
    """The first and the last of a run of marked positions, around the circle."""
    places = marked.nonzero().flatten()
    last = int(torch.diff(places, append=places[:1] + len(marked)).argmax())
    return int(places[(last + 1) % len(places)]), int(places[last])


def _symmetric(matrices: FrequencyMatrices, axis: int, sums: Tensor) -> bool:
    """Whether the reflection takes the operator to itself, up to rounding."""
    m, n, ndim = matrices.matrices, matrices.grid.sizes[axis], len(matrices.grid.sizes)
    # reflected along all axes the spectrum of a real kernel is its conjugate
    others = [1 + a for a in range(ndim - 1) if a != axis]
    mirrored = m.conj() if axis == ndim - 1 else m
    for d in others if axis == ndim - 1 else [1 + axis]:
        mirrored = mirrored.flip(d).roll(1, d)
    frequencies = matrices.grid.frequencies[axis]
    waves = plane_waves(sums, n, frequencies).mT.to(m.device, m.dtype.to_complex())
    shape = [1, *(frequencies if a == axis else 1 for a in range(ndim)), -1]
    waves = waves.reshape(shape)
    off = torch.addcmul(m * waves.unsqueeze(-1), mirrored, waves.unsqueeze(-2), value=-1)
    return bool((_norms(off) <= _ROUNDING[m.dtype.to_real()] * _norms(m)).all())


def _norms(matrices: Tensor) -> Tensor:
    """Frobenius norms of the blocks; a complex reduction takes three times as long."""
    parts = torch.view_as_real(matrices.resolve_conj()) if matrices.is_complex() else matrices
    return torch.linalg.vector_norm(parts, dim=tuple(range(1, parts.ndim)))


class Folding:
    r"""Pairs of positions as their sums and differences, or the positions themselves where there is no reflection.

    Channels may have different numbers of pairs; places that a channel, or a difference, does not have are zero.

    Args:
        marked: the positions of each channel, ``(channels, n)``; the reflection keeps them.
        sums: the reflection; None for none.

    Attributes:
        signs: of the reflection; a single 0 without one.
        places: positions, ``(channels, pairs)``, 0 where there are none.
        mirrored: what they are reflected to.
        there: which of ``places`` there are, ``(channels, pairs)``.
        length: n.
        longest: the most positions that a channel has.
        twice: which of them have an image other than themselves.
        present: which pairs there are, ``(signs, channels, pairs)``, as 0 and 1.
        scale: what an entry of an operator between pairs has for each of them: ``scale[x] scale[y]`` times
            ``q[x, y] + sign q[x, mirrored y]``.
    """

    def __init__(self, marked: Tensor, sums: Tensor | None) -> None:
        channels, n = marked.shape
        self.length, self.longest = n, int(marked.sum(1).amax())
        positions = torch.arange(n).expand(channels, n)
        mirrored = positions if sums is None else (sums[:, None] - positions) % n
        chosen = marked & (positions <= mirrored)
        # those that are their own images after the others: the differences are the first so many
        late = torch.where(chosen, (positions == mirrored).long(), 2)
        order = late.argsort(dim=1, stable=True)[:, : int(chosen.sum(1).amax())]
        self.there = chosen.gather(1, order)
        self.places = torch.where(self.there, order, 0)
        self.mirrored = torch.where(self.there, mirrored.gather(1, order), 0)
        self.twice = self.there & (self.places != self.mirrored)
        self.signs = [0.0] if sums is None else [1.0, -1.0]
        self.present = torch.stack([self.twice if sign < 0 else self.there for sign in self.signs]).double()
        one = self.present.new_ones(())
        alone = one if sums is None else one / 2
        self.scale = self.present * torch.where(self.twice, one, alone.sqrt())
        self._sign = torch.tensor(self.signs, dtype=torch.float64)[:, None, None]
        self._toward = self.present * torch.where(self.twice, (one / 2).sqrt(), alone)
        self._back = self.present * torch.where(self.twice, (one / 2).sqrt(), one)

    @property
    def pairs(self) -> int:
        """How many there are, at most, of a channel."""
        return self.places.shape[1]

    def pairs_of(self, sign: int) -> int:
        """As many as the sign of this number has; they are the first ones."""
        return int(self.present[sign].any(0).sum())

    def exchanged(self, t: int) -> tuple[Tensor, Tensor]:
        """Where the pairs of the first channel are among those of the second, reflected, and their signs there.

        Args:
            t: the sum of a place and its image in the other channel.

        Returns:
            Numbers ``(pairs,)`` and signs ``(signs, pairs)``.
        """
        image = (t - self.places[0]) % self.length
        same, turned = ((image[:, None] == there) & self.there[1] for there in (self.places[1], self.mirrored[1]))
        found = self.there[0]
        number = torch.where(found, (same | turned).long().argmax(1), torch.arange(self.pairs))
        backwards = found & ~same.any(1)
        signs = torch.tensor(self.signs, dtype=torch.float64)[:, None]
        return number, torch.where(backwards, signs, 1.0)

    def toward(self) -> Tensor:
        """From the values at ``places`` and ``mirrored`` to those of the pairs: ``(2, signs, channels, pairs)``."""
        return torch.stack([self._toward, self._toward * self._sign])

    def back(self) -> Tensor:
        """From the pairs to the values at ``places``, and at ``mirrored`` where that is elsewhere; as ``toward``."""
        return torch.stack([self._back, self._back * self._sign * self.twice])
