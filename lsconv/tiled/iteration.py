r"""Flexible conjugate gradients on fields, preconditioned by tiles.

H is the normal operator, g the gradient :math:`A^H W y - H x` and :math:`M^{-1}` the preconditioner
(:mod:`lsconv.tiled.passes`). That one need not be Hermitian, so a direction is made conjugate to several before it:

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
    """The directions p of the last steps, with their images Hp.

    Attributes:
        passes: the passes over the field, which apply H and the preconditioner.
        storage: the place of the vectors, in memory or in files.
        observed: ones where data were measured; None: everywhere.
        max_directions: the number of directions to which a new one is made conjugate.
        previous: (p, Hp, ``<p, Hp>``) of each of these.
    """

    passes: Passes
    storage: Storage
    observed: Field | None
    max_directions: int = 4
    previous: list[tuple[Field, Field, float]] = field(default_factory=list)

    def step(self, x: Field, x_new: Field, g: Field) -> tuple[float, float, float]:
        """Take one step from ``x`` to ``x_new``, and update g; return the norms of the step, ``x_new`` and g."""
        passes, number = self.passes, len(self.previous)
        if number == self.max_directions:
            p, w, _ = self.previous.pop(0)
        else:
            p, w = self.storage.vector(f"direction{number}"), self.storage.vector(f"image{number}")
        passes.precondition(g, p)
        passes.product(p, self.observed, w)
        fields = [p, w, g, *(f for old, image, _ in self.previous for f in (old, image))]
        beta, alpha, energy = self._scalars(fields)
        norms = torch.zeros(3, dtype=torch.float64, device=passes.A.device)

        def advance(x: Tensor, z: Tensor, hz: Tensor, residual: Tensor, *old: Tensor) -> list[Tensor | None]:
            for b, direction, image in zip(beta, old[::2], old[1::2], strict=True):
                z, hz = z - b * direction, hz - b * image
            new, residual = x + alpha * z, residual - alpha * hz
            norms.add_(torch.stack([(alpha * z).square().sum(), new.square().sum(), residual.square().sum()]))
            return [None, z, hz, residual, *[None] * len(old), new]

        passes.update([x, *fields, x_new], advance, reads=1 + len(fields))
        self.previous.append((p, w, energy))
        step_norm, x_norm, gradient_norm = passes.ranks.total(norms).sqrt().tolist()
        return step_norm, x_norm, gradient_norm

    def _scalars(self, fields: list[Field]) -> tuple[list[float], float, float]:
        """Return the beta of every previous direction, the step length alpha and ``<p, Hp>``, in one pass."""
        sums = torch.zeros(2 + 2 * len(self.previous), dtype=torch.float64, device=self.passes.A.device)

        def dots(z: Tensor, hz: Tensor, residual: Tensor, *old: Tensor) -> list[None]:
            pairs = [(z, residual), (z, hz)]
            for direction, image in zip(old[::2], old[1::2], strict=True):
                pairs += [(image, z), (direction, residual)]
            sums.add_(torch.stack([(a * b).sum() for a, b in pairs]))
            return [None] * (3 + len(old))

        self.passes.update(fields, dots)
        descent, energy, *pairs = self.passes.ranks.total(sums).tolist()
        beta = []
        # <p, g> and <p, Hp> of the conjugated direction follow from those of z, without another pass.
        for (_, _, old_energy), image_z, old_descent in zip(self.previous, pairs[::2], pairs[1::2], strict=True):
            beta.append(image_z / old_energy if old_energy else 0.0)
            energy, descent = energy - beta[-1] * image_z, descent - beta[-1] * old_descent
        return beta, descent / energy if energy > 0 else 0.0, energy


class Iteration:
    """The solve for one batch item: a first pass, then steps until the certificate holds and x is near its limit.

    Args:
        passes: the passes over the field, which apply H and the preconditioner.
        storage: the place of the vectors, in memory or in files.
        y: the data.
        observed: ones where data were measured; None: everywhere.
        judge: applies the tests of the certificate to norms.
        rtol: relative tolerance of x.
        first_pass_error: a bound of the relative error of the first x; 1 where none is known.

    Attributes:
        x: the present iterate; the answer, once :meth:`run` has returned.
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
        first_pass_error: float,
    ) -> None:
        self.passes, self.storage, self.y, self.observed, self.judge = passes, storage, y, observed, judge
        self.rtol, self.first_pass_error, self.work_dtype = 0.1 * rtol, first_pass_error, double(storage.dtype)
        self.directions = Directions(passes, storage, observed)
        self.x = storage.vector("x")

    def run(self, max_iter: int, write_first_x: Callable[[Field], float] | None = None) -> WholeCertificate:
        """Iterate, and return the certificate of :attr:`x`.

        Args:
            max_iter: limit on the steps.
            write_first_x: writes a first x and returns a bound of its relative error; None: each tile is solved for its
                data.
        """
        storage = self.storage
        patience = 60  # steps without a smaller gradient, after which the iteration gives up
        self.passes.step = 0
        step, distance = self._first_iterate(write_first_x)
        g = storage.vector("g", self.work_dtype)
        norms = self.passes.gradient(self.x, self.y, self.observed, g)
        certificate = self._certify(norms)
        distance = self.first_pass_error * norms.x if distance is None else distance
        step_norms, gradient_norms, best, stalled = [norms.x], [norms.gradient], math.inf, 0
        while step < max_iter and stalled < patience:
            self.passes.step = step + 1
            if certificate.holds and distance <= self.rtol * norms.x:
                rounded = self._certify_rounded(certificate)
                if rounded is not None:
                    return replace(rounded, iterations=step)
            name = "x-even" if step % 2 else "x-odd"
            x_new = storage.vector(name, self.work_dtype)
            step_norm, x_norm, gradient = self.directions.step(self.x, x_new, g)
            step, self.x = step + 1, x_new
            step_norms.append(step_norm)
            distance = min(
                self._predicted_distance(step_norms, x_norm),
                gradient / self.passes.smallest_eigenvalue if self.passes.smallest_eigenvalue else math.inf,
            )
            gradient_norms.append(gradient)
            slow = len(gradient_norms) > 3 and gradient_norms[-1] > 0.3 * gradient_norms[-4]
            # A Hermitian preconditioner, which costs more, is wanted only where the other converges slowly.
            if slow and distance > self.rtol * x_norm and not self.passes.symmetric:
                self.passes.symmetric = True
                self.directions.previous.clear()
            stalled = 0 if gradient < 0.9 * best else stalled + 1
            best = min(best, gradient)
            storage.save({"step": step, "x": name, "distance": distance})
            norms = replace(norms, gradient=gradient, x=x_norm)
            if (gradient <= certificate.gradient_bound and distance <= self.rtol * x_norm) or not stalled < patience:
                norms = self.passes.gradient(self.x, self.y, self.observed, g)
                certificate = self._certify(norms)
        certificate = self._certify(self.passes.gradient(self.x, self.y, self.observed, g))
        rounded = self._certify_rounded(certificate) if certificate.holds else None
        if rounded is None or distance > 100 * self.rtol * norms.x:
            limit = Status.ITERATION_LIMIT if step >= max_iter else Status.STAGNATION
            rounded = replace(certificate, status=limit)
        return replace(rounded, iterations=step)

    def _certify(self, norms: Norms) -> WholeCertificate:
        return WholeCertificate.of(self.judge, norms)

    def _first_iterate(self, write_first_x: Callable[[Field], float] | None) -> tuple[int, float | None]:
        """Make the first x, or read that of an earlier run.

        Returns:
            The number of its step, and the predicted distance to the solution, None where nothing is known of it.
        """
        storage, ranks = self.storage, self.passes.ranks
        state = storage.saved() or {"step": -1, "x": "x", "distance": None, "tiles": 0}
        # Ranks may have been stopped in different steps: their rows of x still serve as a start.
        lowest, highest = ranks.minimum(state["step"]), -ranks.minimum(-state["step"])
        if lowest >= 0:
            self.x = storage.vector(state["x"], storage.dtype if state["x"] == "x" else self.work_dtype)
            return lowest, state["distance"] if lowest == highest else math.inf
        self.x = storage.vector("x")
        if write_first_x is not None:
            self.first_pass_error = write_first_x(self.x)
        else:
            done = state["tiles"] if state["step"] < 0 else len(self.passes.tile_regions.all)
            count = itertools.count(done + 1)

            def written() -> None:
                storage.save({"step": -1, "x": "x", "distance": None, "tiles": next(count)})

            self.passes.solve_tiles(
                self.y, self.observed, self.x, max(0.1 * self.first_pass_error, self.rtol), done, written
            )
        storage.save({"step": 0, "x": "x", "distance": None})
        return 0, None

    def _predicted_distance(self, step_norms: list[float], x_norm: float) -> float:
        """Predict the distance to the solution by a geometric series of steps; 0 where rounding has stopped x."""
        if len(step_norms) > 4 and 0.9 * max(step_norms[-4:-1]) <= step_norms[-1] <= 100 * self.rtol * x_norm:
            return 0.0
        count = min(len(step_norms) - 1, 5)
        first = step_norms[-1 - count]
        ratio = min((step_norms[-1] / first) ** (1 / count), 0.99) if first else 0.0
        return step_norms[-1] * ratio / (1 - ratio)

    def _certify_rounded(self, certificate: WholeCertificate) -> WholeCertificate | None:
        """Certify x rounded to the dtype of the data; the status is ROUNDED where only the unrounded x passes."""
        dtype = self.storage.dtype
        if dtype == self.work_dtype or self.x.array.dtype == self.storage.vector("x").array.dtype:
            return certificate
        found = self._certify(
            self.passes.gradient(self.x, self.y, self.observed, None, lambda x: x.to(dtype).to(self.work_dtype))
        )
        return found if found.holds else replace(found, status=Status.ROUNDED)
