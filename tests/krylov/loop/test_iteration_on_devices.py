"""An iteration on a device waits for nothing on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import lsconv
from lsconv.krylov.cg import _CG
from lsconv.krylov.cgls import _CGLS
from lsconv.krylov.craig import _CRAIG
from lsconv.krylov.loop.certificate import Tolerances
from lsconv.krylov.loop.method import Method
from lsconv.krylov.loop.monitor import Monitor
from lsconv.krylov.loop.options import Options
from lsconv.krylov.loop.problem import Problem
from lsconv.krylov.lsmr import LSMR
from lsconv.krylov.lsqr import _LSQR
from lsconv.krylov.minres import _MINRES
from lsconv.operators.elementary import Diagonal

METHODS: dict[str, Callable[[Problem, Tensor], Method]] = {
    "cg": lambda problem, running: _CG(problem, None, running),
    "minres": lambda problem, running: _MINRES(problem, None, running),
    "cgls": lambda problem, running: _CGLS(problem, None, running),
    "lsqr": lambda problem, running: _LSQR(problem, None, running),
    "lsmr": lambda problem, running: LSMR(problem, None, running),
    "craig": lambda problem, running: _CRAIG(problem, None, running),
}


class Crossings(TorchDispatchMode):
    """Operations that bring values from the host to the device or back: the host waits for them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_flatten((args, kwargs, result))[0] if isinstance(t, Tensor)]
        if len({t.device.type for t in tensors}) > 1:
            self.found.append(str(func))
        return result


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("damped", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_an_iteration_on_a_device_never_touches_the_host(name: str, damped: bool, preconditioned: bool) -> None:
    """With tensors on the meta device, which have no values: reading one fails, and what crosses over is counted."""
    weight = torch.ones(3, 3, 3, 3)
    A = lsconv.Conv2d(weight, in_size=(6, 5), padding=1, padding_mode="circular").to("meta")
    P = Diagonal(torch.ones(3, 6, 5)).to("meta")
    batch, device = torch.Size((2,)), torch.device("meta")
    damp = torch.ones(batch, dtype=torch.float64, device=device) if damped else None
    M = P if preconditioned else None
    N = P if preconditioned and name not in ("cg", "minres", "craig") else None
    no = torch.zeros(batch, dtype=torch.bool, device=device)
    problem = Problem(A, torch.ones(2, 3, 6, 5, device=device), None, damp, M, N, batch, no)
    for space in (problem.domain, problem.codomain):
        space.safe_norm = space.norm  # type: ignore[method-assign] # the start may look at its norms; here it cannot
    options = Options(Tolerances.of(torch.float32, None, 1e-9), 1000, 10, None, False, False)
    with torch.no_grad():
        method = METHODS[name](problem, ~no)
        monitor = Monitor(problem, options, torch.ones(batch, dtype=torch.float64, device=device), square=False)
        with Crossings() as crossings:
            for _ in range(2):
                method.step(monitor.running)
                monitor.count()
                monitor.test(method)
    assert crossings.found == []


def test_crossings_are_noticed() -> None:
    with Crossings() as crossings:
        torch.ones(2, device="meta") * torch.tensor(2.0)
    assert len(crossings.found) == 1
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(torch.ones(2, device="meta").any())
