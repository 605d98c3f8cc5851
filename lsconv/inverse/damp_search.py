"""The search for a damp: a scan of a logarithmic grid, then parabolas or secants, every batch item on its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from lsconv.inverse.damp_path import DampPath, Evaluation

__all__ = ["Search"]

Criterion = Callable[[Evaluation, Tensor, int], tuple[Tensor, "Tensor | None"]]
# A scan with a stochastic path, whose small damps are dear, ends so many points after every item has seen its best.
_PATIENCE = 4
_STEP = 0.7  # of log damp: the first bracket around a damp known roughly


class Search:
    """Points on the curve of a criterion, and where its best one is; ``t`` is log damp.

    Args:
        path: the problem.
        criterion: values to minimise, and optionally a function that rises through the zero to find.
        needs_trace: whether the criterion looks at the trace.
        slope: whether it looks at the derivative of the penalty.
        around: an earlier search of a problem alike, whose best damp to start from.
    """

    def __init__(
        self, path: DampPath, criterion: Criterion, *, needs_trace: bool, slope: bool, around: Search | None = None
    ) -> None:
        self.path, self.criterion = path, criterion
        self.needs_trace, self.slope = needs_trace, slope
        self.points: list[Tensor] = []
        self.evaluations: list[Evaluation] = []
        self.count: int = 0 if around is None else around.count
        self.low = self.high = torch.zeros(())
        self.open = around is not None
        if around is not None:
            self.low, self.high = around.low, around.high
            start = around.best().expand(path.batch)
            for step in (-_STEP, 0.0, _STEP):
                self.add(start + step)

    def add(self, t: Tensor) -> None:
        """Evaluate at ``t`` of shape ``batch``; damps equal for all items share their factors."""
        batch = self.path.batch
        t = t.expand(batch)
        damp = t.exp()
        if batch and bool((damp == damp.flatten()[0]).all()):
            damp = damp.flatten()[0].reshape((1,) * len(batch))
        e = self.path.evaluate(damp, slope=self.slope, trace=self.needs_trace)
        self.points.append(t)
        self.evaluations.append(Evaluation(*(getattr(e, f.name).expand(batch) for f in fields(Evaluation))))
        self.count += 1

    def scan(self, low: Tensor, high: Tensor, points: int) -> None:
        """Evaluate a grid from ``high`` down to ``low``."""
        self.low, self.high = low.expand(self.path.batch), high.expand(self.path.batch)
        for step in torch.linspace(1, 0, points, dtype=torch.float64).tolist():
            self.add(self.low + step * (self.high - self.low))
            if not self.path.exact and not self.slope and len(self.points) > _PATIENCE and self._is_past():
                break

    def _is_past(self) -> bool:
        """Whether every item's best lies well above the smallest damp seen."""
        t, values, root = self._curve()
        if root is not None:
            below = root < 0
            return bool((below & (t < t[_PATIENCE])).any(0).all()) if len(t) > _PATIENCE else False
        return bool((values.argmin(0) >= _PATIENCE).all())

    def sorted(self) -> tuple[Tensor, Evaluation]:
        """Points in ascending order, ``(points, *batch)``."""
        t, order = torch.stack(self.points).sort(0)
        stacked = (torch.stack([getattr(e, f.name) for e in self.evaluations]) for f in fields(Evaluation))
        return t, Evaluation(*(values.gather(0, order) for values in stacked))

    def _curve(self) -> tuple[Tensor, Tensor, Tensor | None]:
        t, e = self.sorted()
        values, root = self.criterion(e, t, self.path.count)
        values = torch.where(torch.isfinite(values), values, torch.inf)
        return t, values, None if root is None else root.nan_to_num(0.0)

    def _bracket(self, values: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
        """Where the root function rises through zero: the index below, and whether there is such a place."""
        rises = (root[:-1] < 0) & (root[1:] >= 0)
        lowest = torch.where(rises, torch.minimum(values[:-1], values[1:]), torch.inf)
        # values may be infinite or NaN at a crossing that is the only one
        index = torch.where(rises.any(0), torch.where(rises, lowest.nan_to_num(1e300, 1e300), torch.inf).argmin(0), 0)
        return index, rises.any(0)

    def best(self) -> Tensor:
        """The best point of every item, ``batch``."""
        t, values, root = self._curve()
        if root is None:
            return _at(t, values.argmin(0))
        index, found = self._bracket(values, root)
        below, above = _at(root, index), _at(root, (index + 1).clamp_max(len(t) - 1))
        inside = torch.where(below.abs() < above.abs(), _at(t, index), _at(t, (index + 1).clamp_max(len(t) - 1)))
        return torch.where(found, inside, torch.where(root[0] >= 0, t[0], t[-1]))

    def refine(self, steps: int) -> None:
        """Add ``steps`` points where the best is expected."""
        for step in range(steps):
            t, values, root = self._curve()
            if root is None:
                self.add(self._vertex(t, values))
            else:
                self.add(self._secant(t, values, root, step))

    def _vertex(self, t: Tensor, values: Tensor) -> Tensor:
        """The vertex of the parabola through the best point and its neighbours; a golden section where it is no use."""
        index = values.argmin(0)
        middle = index.clamp(1, len(t) - 2)
        (a, b, c), (fa, fb, fc) = ([_at(z, middle + k) for k in (-1, 0, 1)] for z in (t, values))
        left, right = (fb - fa) / (b - a), (fc - fb) / (c - b)
        vertex = 0.5 * (a + b) - 0.5 * left * (c - a) / (right - left)
        margin = 0.02 * (c - a)
        golden = torch.where(c - b > b - a, b + 0.382 * (c - b), b - 0.382 * (b - a))
        usable = (vertex > a + margin) & (vertex < c - margin) & ((vertex - b).abs() > margin)
        vertex = torch.where(usable & torch.isfinite(vertex), vertex, golden)
        if self.open:
            down, up = torch.maximum(t[0] - _STEP, self.low), torch.minimum(t[-1] + _STEP, self.high)
        else:
            down, up = 0.5 * (t[0] + t[1]), 0.5 * (t[-1] + t[-2])
        return torch.where(index == 0, down, torch.where(index == len(t) - 1, up, vertex))

    def _secant(self, t: Tensor, values: Tensor, root: Tensor, step: int) -> Tensor:
        """The secant's zero, kept off the ends of the bracket; every third step halves the bracket."""
        index, found = self._bracket(values, root)
        above = (index + 1).clamp_max(len(t) - 1)
        (a, b), (fa, fb) = ([_at(z, i) for i in (index, above)] for z in (t, root))
        share = (-fa / (fb - fa)).nan_to_num(0.5).clamp(0.02, 0.98)
        if step % 3 == 2:
            share = torch.full_like(share, 0.5)
        inside = a + share * (b - a)
        if self.open:
            down, up = torch.maximum(t[0] - _STEP, self.low), torch.minimum(t[-1] + _STEP, self.high)
        else:
            down, up = 0.5 * (t[0] + t[1]), 0.5 * (t[-1] + t[-2])
        return torch.where(found, inside, torch.where(root[0] >= 0, down, up))


def _at(z: Tensor, index: Tensor) -> Tensor:
    return z.gather(0, index.unsqueeze(0))[0]
