"""lsconv inverts convolutions: least-squares, minimum-norm and regularised solutions of ``y = conv(x, K)``."""

# ruff: noqa: I001 - grouped as in the README

# operators: what A is
from lsconv.operators.base import LinearOperator
from lsconv.operators.convolution import Conv1d, Conv2d, Conv3d, Convolution
from lsconv.operators.elementary import Crop, Dense, Diagonal, FromFunctions, Identity, Mask
from lsconv.operators.padding import Pad
from lsconv.operators.difference import Gradient, Laplacian
from lsconv.operators.algebra import block_diag, hstack, vstack
from lsconv.operators.scipy import from_scipy

# solvers: how min ||Ax - y|| is iterated
from lsconv.krylov.gradients.methods import cg, cgls, craig, gmres, hybrid, lsmr, lsqr, minres
from lsconv.krylov.hybrid import HybridSelection
from lsconv.krylov.gradients.backward_solves import set_backward_failure_hook
from lsconv.krylov.refinement import refine
from lsconv.krylov.loop.solution import History, Solution, Status

# the structure of convolution
from lsconv.fourier.circulant_preconditioner import CirculantPreconditioner
from lsconv.fourier.spectrum import cond, singular_values

# functions of operators
from lsconv.inverse.functions.determinants import logdet, slogdet, trace_inverse
from lsconv.inverse.functions.spectral_norm import norm

# answers
from lsconv.inverse.lstsq import lstsq
from lsconv.inverse.pseudo_inverse import pinv
from lsconv.inverse.tikhonov import tikhonov
from lsconv.inverse.damping.choose_damp import Selection, choose_damp
from lsconv.inverse.plug_and_play import plug_and_play
from lsconv.inverse.total_variation import total_variation
from lsconv.inverse.deconvolve import blur_operator, deconvolve
from lsconv.inverse.uncertainty.evidence import log_evidence
from lsconv.inverse.uncertainty.posterior import noise_level, posterior_samples, posterior_std

# modules for networks

# errors
from lsconv.errors import ConvergenceError, ConvergenceWarning, LsconvError

__version__ = "0.1.0"

__all__ = [
    "CirculantPreconditioner",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvergenceError",
    "ConvergenceWarning",
    "Convolution",
    "Crop",
    "Dense",
    "Diagonal",
    "FromFunctions",
    "Gradient",
    "History",
    "HybridSelection",
    "Identity",
    "Laplacian",
    "LinearOperator",
    "LsconvError",
    "Mask",
    "Pad",
    "Selection",
    "Solution",
    "Status",
    "block_diag",
    "blur_operator",
    "cg",
    "cgls",
    "choose_damp",
    "cond",
    "craig",
    "deconvolve",
    "from_scipy",
    "gmres",
    "hstack",
    "hybrid",
    "log_evidence",
    "logdet",
    "lsmr",
    "lsqr",
    "lstsq",
    "minres",
    "nn",
    "noise_level",
    "norm",
    "pinv",
    "plug_and_play",
    "posterior_samples",
    "posterior_std",
    "refine",
    "set_backward_failure_hook",
    "singular_values",
    "slogdet",
    "tikhonov",
    "total_variation",
    "trace_inverse",
    "vstack",
]


def __getattr__(name: str) -> object:
    """``lsconv.nn``, imported when first asked for: torch's compiler, which it names, takes a second to load."""
    if name == "nn":
        import importlib

        return importlib.import_module("lsconv.nn")
    raise AttributeError(f"module 'lsconv' has no attribute {name!r}")
