r"""Flexible conjugate gradients on fields, preconditioned by tiles.

The preconditioner is not Hermitian, as long as that does not slow it down, so a direction is made conjugate to several
of those before it:

.. math:: p = z - \sum_j \frac{\langle H p_j, z\rangle}{\langle H p_j, p_j\rangle} p_j, \qquad
          x \leftarrow x + \frac{\langle p, g\rangle}{\langle p, Hp\rangle} p, \qquad z = M^{-1} g .

Notay, "Flexible conjugate gradients", SIAM J. Sci. Comput. 22 (2000).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lsconv.krylov.loop.certificate import Norms
from lsconv.krylov.loop.judge import Judge
from lsconv.krylov.loop.solution import Status
from lsconv.operators.dtypes import double
from lsconv.tiled.certificate import WholeCertificate
from lsconv.tiled.field import Field
from lsconv.tiled.passes import Passes
from lsconv.tiled.storage import Storage

__all__ = ["Directions", "Iteration"]


@dataclass
class Directions:
    """The directions of the last steps, with their images under H.

    Attributes:
        passes: over the field.
        storage: of the vectors.
        observed: ones where data were measured; None: everywhere.
        most: directions that are kept.
        former: direction, image and ``<p, Hp>`` of each.
    """

    passes: Passes
    storage: Storage
    observed: Field | None
    most: int = 4
    former: list[tuple[Field, Field, float]] = field(default_factory=list)

    def step(self, x: Field, to: Field, g: Field) -> tuple[float, float, float]:
        """Take one step from ``x`` to ``to``, and update g; returns the norms of the step, of x and of g."""
        passes, number = self.passes, len(self.former)
        if number == self.most:
            p, w, _ = self.former.pop(0)
        else:
            p, w = self.storage.vector(f"direction{number}"), self.storage.vector(f"image{number}")
        passes.correct(g, p)
        passes.product(p, self.observed, w)
        fields = [p, w, g, *(f for old, image, _ in self.former for f in (old, image))]
        beta, alpha, energy = self._scalars(fields)
        norms = torch.zeros(3, dtype=torch.float64, device=passes.A.device)

        def advance(at: Tensor, z: Tensor, hz: Tensor, residual: Tensor, *old: Tensor) -> list[Tensor | None]:
            for b, direction, image in zip(beta, old[::2], old[1::2], strict=True):
                z, hz = z - b * direction, hz - b * image
            new, residual = at + alpha * z, residual - alpha * hz
            norms.add_(torch.stack([(alpha * z).square().sum(), new.square().sum(), residual.square().sum()]))
            return [None, z, hz, residual, *[None] * len(old), new]

        passes.update([x, *fields, to], advance, reads=1 + len(fields))
        self.former.append((p, w, energy))
        step, length, gradient = passes.ranks.total(norms).sqrt().tolist()
        return step, length, gradient

    def _scalars(self, fields: list[Field]) -> tuple[list[float], float, float]:
        """Return the beta of every former direction, alpha, and ``<p, Hp>``."""
        sums = torch.zeros(2 + 2 * len(self.former), dtype=torch.float64, device=self.passes.A.device)

        def dots(z: Tensor, hz: Tensor, residual: Tensor, *old: Tensor) -> list[None]:
            pairs = [(z, residual), (z, hz)]
            for direction, image in zip(old[::2], old[1::2], strict=True):
                pairs += [(image, z), (direction, residual)]
            sums.add_(torch.stack([(a * b).sum() for a, b in pairs]))
            return [None] * (3 + len(old))

        self.passes.update(fields, dots)
        along, energy, *pairs = self.passes.ranks.total(sums).tolist()
        beta = []
        for (_, _, before), product, descent in zip(self.former, pairs[::2], pairs[1::2], strict=True):
            beta.append(product / before if before else 0.0)
            energy, along = energy - beta[-1] * product, along - beta[-1] * descent
        return beta, along / energy if energy > 0 else 0.0, energy


class Iteration:
    """The solve of one item: a first pass, then steps until the certificate holds and x has come to rest.

    Args:
        passes: over the field.
        storage: of the vectors.
        y: the data.
        observed: ones where they were measured; None: everywhere.
        judge: judges norms.
        rtol: relative tolerance of x.
        rate: the part of an error that the first pass is known to leave; 1 where it is not.

    Attributes:
        x: the answer.
    """

    def __init__(
        self,
        passes: Passes,
        storage: Storage,
        y: Field,
        observed: Field | None,
        judge: Judge,
        *,
        rtol: float,
        rate: float,
    ) -> None:
        self.passes, self.storage, self.y, self.observed, self.judge = passes, storage, y, observed, judge
        self.rtol, self.rate, self.wide = 0.1 * rtol, rate, double(storage.dtype)
        self.directions = Directions(passes, storage, observed)
        self.x = storage.vector("x")

    def run(self, max_iter: int, begin: Callable[[Field], float] | None = None, patience: int = 60) -> WholeCertificate:
        """Iterate; returns the certificate of :attr:`x`.

        Args:
            max_iter: limit on the steps.
            begin: writes a first x, and says which part of an error it is known to leave; None: the tiles do.
            patience: steps without a fall of the gradient after which it ends.
        """
        storage = self.storage
        self.passes.step = 0
        step, remaining = self._begin(begin)
        g = storage.vector("g", self.wide)
        norms = self.passes.gradient(self.x, self.y, self.observed, g)
        certificate = self._judged(norms)
        remaining = self.rate * norms.x if remaining is None else remaining
        moves, gradients, best, waited = [norms.x], [norms.gradient], math.inf, 0
        while step < max_iter and waited < patience:
            self.passes.step = step + 1
            if certificate.holds and remaining <= self.rtol * norms.x:
                rounded = self._rounded(certificate)
                if rounded is not None:
                    return replace(rounded, iterations=step)
            name = "x-even" if step % 2 else "x-odd"
            to = storage.vector(name, self.wide)
            moved, length, gradient = self.directions.step(self.x, to, g)
            step, self.x = step + 1, to
            moves.append(moved)
            remaining = min(
                self._remaining(moves, length),
                gradient / self.passes.smallest_eigenvalue if self.passes.smallest_eigenvalue else math.inf,
            )
            gradients.append(gradient)
            slow = len(gradients) > 3 and gradients[-1] > 0.3 * gradients[-4]
            if slow and remaining > self.rtol * length and not self.passes.symmetric:
                self.passes.symmetric = True
                self.directions.former.clear()
            waited = 0 if gradient < 0.9 * best else waited + 1
            best = min(best, gradient)
            storage.save({"step": step, "x": name, "left": remaining})
            norms = replace(norms, gradient=gradient, x=length)
            if (gradient <= certificate.gradient_bound and remaining <= self.rtol * length) or not waited < patience:
                norms = self.passes.gradient(self.x, self.y, self.observed, g)
                certificate = self._judged(norms)
        certificate = self._judged(self.passes.gradient(self.x, self.y, self.observed, g))
        rounded = self._rounded(certificate) if certificate.holds else None
        if rounded is None or remaining > 100 * self.rtol * norms.x:
            limit = Status.ITERATION_LIMIT if step >= max_iter else Status.STAGNATION
            rounded = replace(certificate, status=limit)
        return replace(rounded, iterations=step)

    def _judged(self, norms: Norms) -> WholeCertificate:
        return WholeCertificate.of(self.judge, norms)

    def _begin(self, begin: Callable[[Field], float] | None) -> tuple[int, float | None]:
        """Make the first x, or read that of an earlier run: its step, and the length of the steps to come."""
        storage, ranks = self.storage, self.passes.ranks
        state = storage.saved() or {"step": -1, "x": "x", "left": None, "tiles": 0}
        # ranks may have been stopped in different steps, and any x serves to go on from
        lowest, highest = ranks.minimum(state["step"]), -ranks.minimum(-state["step"])
        if lowest >= 0:
            self.x = storage.vector(state["x"], storage.dtype if state["x"] == "x" else self.wide)
            return lowest, state["left"] if lowest == highest else math.inf
        self.x = storage.vector("x")
        if begin is not None:
            self.rate = begin(self.x)
        else:
            done = state["tiles"] if state["step"] < 0 else len(self.passes.tiles.all)
            count = itertools.count(done + 1)

            def written() -> None:
                storage.save({"step": -1, "x": "x", "left": None, "tiles": next(count)})

            self.passes.first(self.y, self.observed, self.x, max(0.1 * self.rate, self.rtol), done, written)
        storage.save({"step": 0, "x": "x", "left": None})
        return 0, None

    def _remaining(self, moves: list[float], length: float) -> float:
        """Predict the length of the steps to come by the geometric series of those made; zero at rounding."""
        if len(moves) > 4 and 0.9 * max(moves[-4:-1]) <= moves[-1] <= 100 * self.rtol * length:
            return 0.0
        several = min(len(moves) - 1, 5)
        first = moves[-1 - several]
        rate = min((moves[-1] / first) ** (1 / several), 0.99) if first else 0.0
        return moves[-1] * rate / (1 - rate)

    def _rounded(self, certificate: WholeCertificate) -> WholeCertificate | None:
        """The certificate of x as it is returned: rounded to the dtype of the data."""
        narrow = self.storage.dtype
        if narrow == self.wide or self.x.array.dtype == self.storage.vector("x").array.dtype:
            return certificate
        found = self._judged(
            self.passes.gradient(self.x, self.y, self.observed, None, lambda x: x.to(narrow).to(self.wide))
        )
        return found if found.holds else replace(found, status=Status.ROUNDED)
