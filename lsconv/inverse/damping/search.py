"""The search for the best damp along a damp path, every batch item on its own.

:class:`Search` scans a logarithmic grid, then refines by parabolas or secants. :class:`LocalSearch` starts from the
damp that a surrogate chose, with Newton's steps towards the zero of a derivative and secants once it is enclosed.
"""

from __future__ import annotations

import math
from dataclasses import fields

import torch
from torch import Tensor

from lsconv.inverse.damping.paths import TOLERANCE, DampPath, Evaluation
from lsconv.inverse.damping.rules import Criterion

__all__ = ["PER_DECADE", "LocalSearch", "Search"]

# Points per decade of the first scan, because criteria vary slowly over half a decade.
PER_DECADE = 2
# The step of a scan, in log damp; also the longest step of a local search.
_SCAN_STEP = math.log(10) / PER_DECADE


class Search:
    """A search on a grid of damps, refined around the best one, for all batch items at once; ``t`` is log damp.

    Args:
        path: the damp path of the problem.
        criterion: the criterion of the rule.
        needs_trace: the criterion uses the trace.
        slope: the criterion uses the derivative of the penalty.
        surrogate_search: the search on a surrogate, from whose best damp this one starts; None: scan the range.
    """

    def __init__(
        self,
        path: DampPath,
        criterion: Criterion,
        *,
        needs_trace: bool,
        slope: bool,
        surrogate_search: Search | None = None,
    ) -> None:
        self.path, self.criterion = path, criterion
        self.needs_trace, self.slope = needs_trace, slope
        self.points: list[Tensor] = []
        self.evaluations: list[Evaluation] = []
        self.evaluated: int = 0 if surrogate_search is None else surrogate_search.evaluated
        self.low = self.high = torch.zeros(())
        self.may_extend = surrogate_search is not None
        self.step = 0.25 * _SCAN_STEP  # the half width of the first bracket around the surrogate's damp
        if surrogate_search is not None:
            self.low, self.high = surrogate_search.low, surrogate_search.high
            for step in (-self.step, self.step, 0.0):
                self.add(surrogate_search.best().expand(path.batch) + step)

    def add(self, t: Tensor, *, slope: bool = False) -> None:
        """Evaluate the path at ``t``, ``batch``; a damp that is equal for all items takes one set of factors."""
        batch = self.path.batch
        t = t.expand(batch)
        damp = t.exp()
        if batch and bool((damp == damp.flatten()[0]).all()):
            damp = damp.flatten()[0].reshape((1,) * len(batch))
        e = self.path.evaluate(damp, slope=self.slope or slope, trace=self.needs_trace)
        self.points.append(t)
        self.evaluations.append(Evaluation(*(getattr(e, f.name).expand(batch) for f in fields(Evaluation))))
        self.evaluated += 1

    def scan(self, low: Tensor, high: Tensor, points: int) -> None:
        """Evaluate a grid from ``high`` down to ``low``."""
        self.low, self.high = low.expand(self.path.batch), high.expand(self.path.batch)
        for step in torch.linspace(1, 0, points, dtype=torch.float64).tolist():
            self.add(self.low + step * (self.high - self.low))
            if not self.path.exact and not self.slope and self._is_past():
                break

    def _is_past(self) -> bool:
        """Tell whether every item's best damp is two decades above the smallest one; smaller ones are expensive."""
        two_decades = 2 * PER_DECADE
        if len(self.points) <= two_decades:
            return False
        t, values, root = self._curve()
        if root is not None:
            return bool(((root < 0) & (t < t[two_decades])).any(0).all())
        return bool((values.argmin(0) >= two_decades).all())

    def sorted(self) -> tuple[Tensor, Evaluation]:
        """The points in ascending order and the evaluations there, ``(points, *batch)``."""
        t, order = torch.stack(self.points).sort(0)
        stacked = (torch.stack([getattr(e, f.name) for e in self.evaluations]) for f in fields(Evaluation))
        return t, Evaluation(*(values.gather(0, order) for values in stacked))

    def values(self) -> Tensor:
        """The criterion at the points in ascending order."""
        return self._curve()[1]

    def _curve(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The points, the criterion there (infinite where it is not finite), and the root function if there is one."""
        t, e = self.sorted()
        values, root = self.criterion(e, t, self.path.data_count)
        values = torch.where(torch.isfinite(values), values, torch.inf)
        return t, values, None if root is None else root.nan_to_num(0.0)

    def _bracket(self, values: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
        """Find where the root function crosses zero upwards: the index below, and whether there is a crossing."""
        rises = (root[:-1] < 0) & (root[1:] >= 0)
        lowest = torch.where(rises, torch.minimum(values[:-1], values[1:]), torch.inf)
        # values may not be finite at the only crossing
        index = torch.where(rises.any(0), torch.where(rises, lowest.nan_to_num(1e300, 1e300), torch.inf).argmin(0), 0)
        return index, rises.any(0)

    def best(self) -> Tensor:
        """The best damp of every item by the parabola or the secant through its neighbours, ``batch``."""
        t, values, root = self._curve()
        if root is None:
            index = self._lowest(values)
            vertex, usable = self._parabola(t, values, index, margin=0.0)
            return torch.where(usable & (index > 0) & (index < len(t) - 1), vertex, _at(t, index))
        index, found = self._bracket(values, root)
        above = (index + 1).clamp_max(len(t) - 1)
        inside = _at(t, index) + self._fraction(root, index, above) * (_at(t, above) - _at(t, index))
        # A function with several minima may be lowest at an end of the range.
        low, high = (root[0] >= 0) & torch.isfinite(values[0]), root[-1] < 0
        lowest = torch.where(found, torch.minimum(_at(values, index), _at(values, above)), torch.inf)
        low, high = low & (values[0] < lowest), high & (values[-1] < lowest)
        low, high = low & ~(high & (values[-1] < values[0])), high & ~(low & (values[0] <= values[-1]))
        neither = torch.where(found, inside, torch.where(root[0] >= 0, t[0], t[-1]))
        return torch.where(low, t[0], torch.where(high, t[-1], neither))

    def smallest(self) -> Tensor:
        """The smallest point at which the criterion has a value, ``batch``."""
        t, values, _ = self._curve()
        return torch.where(torch.isfinite(values), t, torch.inf).amin(0).nan_to_num(posinf=0.0)

    def run(self) -> None:
        """Add a point where the bracket around the surrogate's damp does not enclose the best one."""
        t, values, root = self._curve()
        index = self._lowest(values)
        enclosed = self._bracket(values, root)[1] if root is not None else (index > 0) & (index < len(t) - 1)
        if not bool(enclosed.all()):
            self.refine(1)

    def _lowest(self, values: Tensor) -> Tensor:
        """The index of the lowest point; for the L-curve, whose curvature vanishes at both ends, of the lowest dip."""
        if not self.slope or len(values) < 3:
            return values.argmin(0)
        dip = (values[1:-1] <= values[:-2]) & (values[1:-1] <= values[2:]) & torch.isfinite(values[1:-1])
        inner = torch.where(dip, values[1:-1], torch.inf).argmin(0) + 1
        return torch.where(dip.any(0), inner, values.argmin(0))

    def refine(self, steps: int) -> None:
        """Add ``steps`` points, each where the best damp is expected."""
        for step in range(steps):
            t, values, root = self._curve()
            if root is None:
                self.add(self._vertex(t, values))
            else:
                self.add(self._secant(t, values, root, step))

    def _vertex(self, t: Tensor, values: Tensor) -> Tensor:
        """The vertex of the parabola through the best point and its neighbours, or else a golden section."""
        index = self._lowest(values)
        middle = index.clamp(1, len(t) - 2)
        a, b, c = (_at(t, middle + k) for k in (-1, 0, 1))
        vertex, usable = self._parabola(t, values, index, margin=0.02)
        golden = torch.where(c - b > b - a, b + 0.382 * (c - b), b - 0.382 * (b - a))
        vertex = torch.where(usable & ((vertex - b).abs() > 0.02 * (c - a)), vertex, golden)
        down, up = self._extension(t)
        return torch.where(index == 0, down, torch.where(index == len(t) - 1, up, vertex))

    @staticmethod
    def _parabola(t: Tensor, values: Tensor, index: Tensor, margin: float) -> tuple[Tensor, Tensor]:
        """The vertex of the parabola around a point, and whether it lies between the neighbours."""
        middle = index.clamp(1, len(t) - 2)
        (a, b, c), (fa, fb, fc) = ([_at(z, middle + k) for k in (-1, 0, 1)] for z in (t, values))
        # The logarithm of a positive criterion, which is steep on one side and flat on the other, is closer to a
        # parabola.
        positive = (fa > 0) & (fb > 0) & (fc > 0)
        fa, fb, fc = (torch.where(positive, f.clamp_min(1e-300).log(), f) for f in (fa, fb, fc))
        left, right = (fb - fa) / (b - a), (fc - fb) / (c - b)
        vertex = 0.5 * (a + b) - 0.5 * left * (c - a) / (right - left)
        usable = (vertex > a + margin * (c - a)) & (vertex < c - margin * (c - a)) & (right > left)
        return vertex.nan_to_num(0.0, 0.0, 0.0), usable & torch.isfinite(vertex)

    @staticmethod
    def _fraction(root: Tensor, index: Tensor, above: Tensor) -> Tensor:
        """The position of the secant's zero between two points, from 0 to 1."""
        below = _at(root, index)
        return (-below / (_at(root, above) - below)).nan_to_num(0.5).clamp(0.0, 1.0)

    def _secant(self, t: Tensor, values: Tensor, root: Tensor, step: int) -> Tensor:
        """The secant's zero, kept off the ends of the bracket; every third step halves the bracket."""
        index, found = self._bracket(values, root)
        above = (index + 1).clamp_max(len(t) - 1)
        fraction = self._fraction(root, index, above).clamp(0.02, 0.98)
        if step % 3 == 2:
            fraction = torch.full_like(fraction, 0.5)
        inside = _at(t, index) + fraction * (_at(t, above) - _at(t, index))
        down, up = self._extension(t)
        return torch.where(found, inside, torch.where(root[0] >= 0, down, up))

    def _extension(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The next point where the best one is the smallest so far, and where it is the largest."""
        if self.may_extend:
            return torch.maximum(t[0] - self.step, self.low), torch.minimum(t[-1] + self.step, self.high)
        return 0.5 * (t[0] + t[1]), 0.5 * (t[-1] + t[-2])


class LocalSearch(Search):
    """A search for the zero of :meth:`Criterion.root_function` near the damp of a surrogate, by Newton and secants.

    Args:
        path: the damp path of the problem.
        criterion: the criterion of any rule but the L-curve.
        needs_trace: the criterion uses the trace.
        surrogate_search: the search on the surrogate.

    Attributes:
        next_point: the log damp to evaluate next, ``batch``; at the end it is the answer.
    """

    def __init__(self, path: DampPath, criterion: Criterion, *, needs_trace: bool, surrogate_search: Search) -> None:
        super().__init__(path, criterion, needs_trace=needs_trace, slope=False)
        self.low, self.high, self.evaluated = surrogate_search.low, surrogate_search.high, surrogate_search.evaluated
        self.root_values: list[Tensor] = []
        self.next_point = surrogate_search.best().expand(path.batch)
        # The curvature of the whole problem is nearly that of the surrogate.
        before, after = (
            self._root_value(surrogate_search.path, self.next_point + step) for step in (-self.step, self.step)
        )
        self.curvature = (after - before) / (2 * self.step)

    def _root_value(self, path: DampPath, t: Tensor) -> Tensor:
        e = path.evaluate(t.exp(), slope=True, trace=self.needs_trace)
        return self.criterion.root_function(e, t, path.data_count).expand(self.path.batch)

    def run(self) -> None:
        """Evaluate until the predicted gain is within the tolerance, at most as often as a scan would."""
        for _ in range(round(float((self.high - self.low).max()) / _SCAN_STEP)):
            self.add(self.next_point, slope=self.criterion.needs_slope)
            self.root_values.append(
                self.criterion.root_function(self.evaluations[-1], self.points[-1], self.path.data_count)
            )
            zero = self.evaluations[0].residual_norm_sq == 0  # for data of zero every damp gives the same answer
            if bool((zero | (self._advance() <= 2 * TOLERANCE)).all()):
                return

    def _advance(self) -> Tensor:
        """Set :attr:`next_point` to the expected zero, and return the predicted gain of the criterion, ``batch``."""
        t, order = torch.stack(self.points).sort(0)
        rises = torch.stack(self.root_values).gather(0, order)
        # a root that is not finite shows a damp so small that m - tr H is below its error
        rises = torch.where(torch.isfinite(rises), rises, -torch.inf)
        above = (rises >= 0).to(torch.int64).argmax(0)  # the first point with a root value above zero
        above = torch.where((rises >= 0).any(0), above, len(t))
        high, low = above.clamp_max(len(t) - 1), (above - 1).clamp_min(0)
        enclosed = (above > 0) & (above < len(t))
        fraction = self._fraction(rises, low, high)
        fraction = torch.where(torch.isinf(_at(rises, low)), 0.5, fraction)
        inside = _at(t, low) + fraction * (_at(t, high) - _at(t, low))
        nearest = torch.where(fraction < 0.5, low, high)
        outer = torch.where(above > 0, len(t) - 1, 0)  # the outermost point, where all root values have one sign
        if len(t) > 1:
            beside = torch.where(above > 0, len(t) - 2, 1)
            secant = (_at(rises, outer) - _at(rises, beside)) / (_at(t, outer) - _at(t, beside))
            self.curvature = torch.where(torch.isfinite(secant) & ~enclosed, secant, self.curvature)
        newton = -_at(rises, outer) / self.curvature
        direction = torch.where(above > 0, 1.0, -1.0)
        step = torch.where((self.curvature > 0) & torch.isfinite(newton), newton, _SCAN_STEP * direction)
        outside = _at(t, outer) + step.clamp(-_SCAN_STEP, _SCAN_STEP)
        outside = torch.maximum(torch.minimum(outside, self.high), self.low)
        self.next_point = torch.where(enclosed, inside, outside)
        last = torch.where(enclosed, nearest, outer)
        rise, distance = _at(rises, last).abs(), (self.next_point - _at(t, last)).abs()
        gain = 0.5 * rise * (distance if self.criterion.rule != "discrepancy" else 1)
        return torch.where(distance > 0, gain, 0)

    def best(self) -> Tensor:
        """The best damp of every item, ``batch``."""
        return self.next_point

    def smallest(self) -> Tensor:
        """The log of the smallest damp that may be evaluated, ``batch``."""
        return self.low


def _at(z: Tensor, index: Tensor) -> Tensor:
    """Select one point per item of ``(points, *batch)``."""
    return z.gather(0, index.unsqueeze(0))[0]
