"""The other ways to solve a damped least-squares problem, each as its documentation says and at its best.

All have the signature ``(A, y, damp, tolerance, max_iter) -> Answer`` and get the same operator A, whose products are
torch's or the FFT's, whichever is faster. BLAS is held to one thread: around a torch operator its thread pool and
torch's fight, which made SciPy's LSQR up to 25 times slower.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lsconv
from benchmarks.runner import Answer

__all__ = [
    "FOREIGN",
    "Peer",
    "foreign",
    "lineax_lsmr",
    "normal_cg",
    "one_blas_thread",
    "pylops_cgls",
    "pylops_lsqr",
    "relative_gradient",
    "scipy_lsmr",
    "scipy_lsqr",
]

_MANY = 100_000

Peer = Callable[[lsconv.Convolution, Tensor, float, float, int | None], Answer]


def relative_gradient(A: lsconv.Convolution, y: Tensor, damp: float, x: Tensor) -> float:
    r""":math:`\|A^H(y - Ax) - damp^2 x\| / \|A^H y\|`, in float64 whatever the method computed in."""
    A, y, x = A.to(dtype=torch.float64), y.double(), x.double()
    gradient = A.adjoint(y - A.apply(x)) - damp**2 * x
    return float(torch.linalg.vector_norm(gradient) / torch.linalg.vector_norm(A.adjoint(y)))


@contextlib.contextmanager
def one_blas_thread() -> Any:
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="blas"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # SciPy's condition estimate overflows in float32; unused here
        yield


def _back(A: lsconv.Convolution, x: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x)).to(A.dtype).reshape(A.in_shape)


def scipy_lsmr(A: lsconv.Convolution, y: Tensor, damp: float, tolerance: float, max_iter: int | None) -> Answer:
    """``scipy.sparse.linalg.lsmr``."""
    from scipy.sparse.linalg import lsmr

    with one_blas_thread():
        x, _, iterations, *_ = lsmr(
            A.to_scipy(), y.flatten().numpy(), damp, tolerance, tolerance, conlim=0, maxiter=max_iter or _MANY
        )
    return Answer(_back(A, x), iterations)


def scipy_lsqr(A: lsconv.Convolution, y: Tensor, damp: float, tolerance: float, max_iter: int | None) -> Answer:
    """``scipy.sparse.linalg.lsqr``."""
    from scipy.sparse.linalg import lsqr

    with one_blas_thread():
        x, _, iterations, *_ = lsqr(
            A.to_scipy(), y.flatten().numpy(), damp, tolerance, tolerance, conlim=0, iter_lim=max_iter or _MANY
        )
    return Answer(_back(A, x), iterations)


def pylops_cgls(A: lsconv.Convolution, y: Tensor, damp: float, tolerance: float, max_iter: int | None) -> Answer:
    """``pylops.cgls``, which stops when the squared norm of the gradient is at most ``tol``."""
    import pylops

    operator = pylops.aslinearoperator(A.to_scipy())
    scale = float(torch.linalg.vector_norm(A.adjoint(y)))
    with one_blas_thread():
        x, _, iterations, *_ = pylops.cgls(
            operator, y.flatten().numpy(), niter=max_iter or _MANY, damp=damp, tol=(tolerance * scale) ** 2
        )
    return Answer(_back(A, x), int(iterations))


def pylops_lsqr(A: lsconv.Convolution, y: Tensor, damp: float, tolerance: float, max_iter: int | None) -> Answer:
    """``pylops.lsqr``."""
    import pylops

    operator = pylops.aslinearoperator(A.to_scipy())
    with one_blas_thread(), contextlib.redirect_stdout(io.StringIO()):
        x, _, iterations, *_ = pylops.lsqr(
            operator, y.flatten().numpy(), damp=damp, atol=tolerance, btol=tolerance, conlim=0, niter=max_iter or _MANY
        )
    return Answer(_back(A, x), int(iterations))


@functools.cache
def _compiled_lsmr() -> Any:
    """Lineax's LSMR on ``[A; damp]`` for one channel and stride 1, its products by JAX's FFT, compiled once a shape."""
    import jax
    import lineax
    from jax import numpy as jnp

    @functools.partial(jax.jit, static_argnames=("before", "grid", "in_size", "out_size"))
    def solve(kernel: Any, y: Any, damp: Any, tolerance: Any, max_iter: Any, *, before: Any, grid: Any,
              in_size: Any, out_size: Any) -> Any:  # fmt: skip
        symbol = jnp.conj(jnp.fft.rfft2(kernel, grid))

        def product(x: Any) -> Any:
            shifted = jnp.pad(x, [(p, 0) for p in before])
            y = jnp.fft.irfft2(jnp.fft.rfft2(shifted, grid) * symbol, grid)
            return y[: out_size[0], : out_size[1]], damp * x

        operator = lineax.FunctionLinearOperator(product, jax.ShapeDtypeStruct(in_size, y.dtype))
        solver = lineax.LSMR(rtol=tolerance, atol=0.0 * tolerance, conlim=float("inf"), max_steps=max_iter)
        solution = lineax.linear_solve(operator, (y, jnp.zeros(in_size, y.dtype)), solver, throw=False)
        return solution.value, solution.stats["num_steps"]

    return solve


def lineax_lsmr(A: lsconv.Convolution, y: Tensor, damp: float, tolerance: float, max_iter: int | None) -> Answer:
    """``lineax.LSMR`` under ``jax.jit``, compiled before it is timed; one channel and stride 1 only."""
    import jax
    from scipy.fft import next_fast_len

    ends = [size + before + after for size, (before, after) in zip(A.spatial_in, A.padding, strict=True)]
    solve = _compiled_lsmr()
    scalar = y.numpy().dtype.type
    jax.config.update("jax_enable_x64", A.dtype == torch.float64)  # in its float64 mode it refuses float32
    x, iterations = solve(
        A.weight[0, 0].numpy(),
        y[0].numpy(),
        scalar(damp),
        scalar(tolerance),
        max_iter or _MANY,
        before=tuple(before for before, _ in A.padding),
        grid=tuple(next_fast_len(end, real=True) for end in ends),
        in_size=tuple(A.spatial_in),
        out_size=tuple(A.spatial_out),
    )
    return Answer(torch.from_numpy(np.array(x)).reshape(A.in_shape), int(iterations))


def normal_cg(A: lsconv.Convolution, y: Tensor, damp: float, tolerance: float, max_iter: int | None) -> Answer:
    """CG on the normal equations of the smaller side with the FFT-diagonal preconditioner, its setup included."""
    M = lsconv.CirculantPreconditioner(A, damp)
    if M.side == "residual":
        gram: lsconv.LinearOperator = A @ A.H + damp**2 * lsconv.Identity(A.out_shape, dtype=A.dtype)
        solution = lsconv.cg(gram, y, M=M, rtol=tolerance, max_iter=max_iter or _MANY)
        return Answer(A.adjoint(solution.x), int(solution.iterations))
    gram = A.H @ A + damp**2 * lsconv.Identity(A.in_shape, dtype=A.dtype)
    solution = lsconv.cg(gram, A.adjoint(y), M=M, rtol=tolerance, max_iter=max_iter or _MANY)
    return Answer(solution.x, int(solution.iterations))


# The methods of other packages; :func:`normal_cg` is lsconv's own, with lsconv's preconditioner.
FOREIGN: dict[str, Peer] = {
    "scipy lsmr": scipy_lsmr,
    "scipy lsqr": scipy_lsqr,
    "pylops cgls": pylops_cgls,
    "lineax lsmr": lineax_lsmr,
}


def foreign() -> dict[str, Peer]:
    """:data:`FOREIGN`, less what is not installed."""
    return {name: peer for name, peer in FOREIGN.items() if importlib.util.find_spec(name.split()[0])}
