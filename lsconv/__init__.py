"""lsconv inverts convolutions: least-squares, minimum-norm and regularised solutions of ``y = conv(x, K)``.

=============  ====================================================================================================
operators      ``Conv1d``, ``Conv2d``, ``Conv3d``, ``Convolution``, ``VaryingConvolution``; ``Pad``, ``Crop``,
               ``Mask``, ``Diagonal``, ``Identity``, ``Dense``, ``FromFunctions``; ``Gradient``, ``Laplacian``;
               ``hstack``, ``vstack``, ``block_diag``; of a linear module or function ``as_operator``, of SciPy's
               ``from_scipy``; their interface ``LinearOperator``
answers        ``lstsq``, ``pinv``; ``tikhonov`` and ``choose_damp`` (a ``Selection``); ``total_variation``,
               ``plug_and_play``; for images ``deconvolve``, ``blur_operator``, ``saturation_level``; all are a
               ``Solution``, with its ``Status`` and ``History``
uncertainty    ``posterior_samples``, ``posterior_std``, ``noise_level``, ``log_evidence``; of an unknown
               blur ``estimate_psf`` (a ``PsfEstimate``, with its ``PsfStatus``)
structure      ``norm``, ``cond``, ``singular_values``, ``svd`` (a ``SingularValueDecomposition``),
               ``CirculantPreconditioner``; ``logdet``, ``slogdet``, ``trace_inverse``; what answers a problem and
               why, ``explain`` (an ``Explanation``)
iterations     ``lsmr``, ``lsqr``, ``cgls``, ``craig``; ``cg``, ``minres``, ``gmres``; ``hybrid`` (a
               ``HybridSelection``); ``refine``, ``set_backward_failure_hook``
tiled          ``tiled.Plan``, ``tiled_total_variation``: images larger than memory, by tiles, out of core and on
               many ranks
modules        ``nn.PseudoInverse``, ``nn.Tikhonov``, ``nn.RangeNull``, ``nn.InvertibleConv2d``,
               ``nn.spectral_norm``
psf            ``psf.gaussian``, ``psf.disk``, ``psf.motion``, ``psf.moffat``, ``psf.airy``, ``psf.box``
errors         ``LsconvError``, the base of all: ``ArgumentError``, ``ArgumentTypeError``, ``ShapeError``,
               ``DtypeError``, ``DeviceError``, ``NonFiniteError``, ``MethodError``, ``PreconditionerError``,
               ``PlanMemoryError``, ``RankError``, ``ConvergenceError``; and the warnings ``ConvergenceWarning``,
               ``InputWarning``
=============  ====================================================================================================
"""

# ruff: noqa: I001, RUF022 - grouped as in the index above

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # operators
    from lsconv.operators.base import LinearOperator
    from lsconv.operators.convolution import Conv1d, Conv2d, Conv3d, Convolution
    from lsconv.operators.varying_convolution import VaryingConvolution
    from lsconv.operators.elementary import Crop, Dense, Diagonal, FromFunctions, Identity, Mask
    from lsconv.operators.padding import Pad
    from lsconv.operators.difference import Gradient, Laplacian
    from lsconv.operators.algebra import block_diag, hstack, vstack
    from lsconv.operators.linear_function import as_operator
    from lsconv.operators.scipy import from_scipy

    # answers
    from lsconv.inverse.lstsq import lstsq
    from lsconv.inverse.pseudo_inverse import pinv
    from lsconv.inverse.tikhonov import tikhonov
    from lsconv.inverse.damping.choose_damp import Selection, choose_damp
    from lsconv.inverse.tiled_variation import tiled_total_variation
    from lsconv.inverse.total_variation import total_variation
    from lsconv.inverse.plug_and_play import plug_and_play
    from lsconv.inverse.images.deconvolve import deconvolve
    from lsconv.inverse.images.blur import blur_operator
    from lsconv.inverse.images.saturation import saturation_level
    from lsconv.krylov.loop.solution import History, Solution, Status

    # uncertainty
    from lsconv.inverse.uncertainty.evidence import log_evidence
    from lsconv.inverse.uncertainty.posterior import noise_level, posterior_samples, posterior_std

    from lsconv.inverse.uncertainty.psf_estimate import PsfEstimate, PsfStatus, estimate_psf

    # structure
    from lsconv.fourier.spectrum import cond, singular_values
    from lsconv.inverse.functions.decomposition import SingularValueDecomposition, svd
    from lsconv.inverse.functions.determinants import logdet, slogdet, trace_inverse
    from lsconv.inverse.functions.spectral_norm import norm
    from lsconv.fourier.circulant_preconditioner import CirculantPreconditioner
    from lsconv.inverse.explain import Explanation, explain

    # iterations
    from lsconv.krylov.gradients.methods import cg, cgls, craig, gmres, hybrid, lsmr, lsqr, minres
    from lsconv.krylov.hybrid import HybridSelection
    from lsconv.krylov.refinement import refine
    from lsconv.krylov.gradients.backward_solves import set_backward_failure_hook

    # tiled
    from lsconv import tiled

    # modules
    from lsconv import nn

    # psf
    from lsconv import psf

# errors
from lsconv.errors import (
    ArgumentError,
    ArgumentTypeError,
    ConvergenceError,
    ConvergenceWarning,
    DeviceError,
    DtypeError,
    InputWarning,
    LsconvError,
    MethodError,
    NonFiniteError,
    PlanMemoryError,
    PreconditionerError,
    RankError,
    ShapeError,
)

__version__ = "0.1.0"

__all__ = [
    # operators
    "LinearOperator",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Convolution",
    "VaryingConvolution",
    "Pad",
    "Crop",
    "Mask",
    "Diagonal",
    "Identity",
    "Dense",
    "FromFunctions",
    "Gradient",
    "Laplacian",
    "hstack",
    "vstack",
    "block_diag",
    "as_operator",
    "from_scipy",
    # answers
    "lstsq",
    "pinv",
    "tikhonov",
    "choose_damp",
    "Selection",
    "tiled_total_variation",
    "total_variation",
    "plug_and_play",
    "deconvolve",
    "blur_operator",
    "saturation_level",
    "Solution",
    "Status",
    "History",
    # uncertainty
    "posterior_samples",
    "posterior_std",
    "noise_level",
    "log_evidence",
    "estimate_psf",
    "PsfEstimate",
    "PsfStatus",
    # structure
    "norm",
    "cond",
    "singular_values",
    "svd",
    "SingularValueDecomposition",
    "CirculantPreconditioner",
    "logdet",
    "slogdet",
    "trace_inverse",
    "explain",
    "Explanation",
    # iterations
    "lsmr",
    "lsqr",
    "cgls",
    "craig",
    "cg",
    "minres",
    "gmres",
    "hybrid",
    "HybridSelection",
    "refine",
    "set_backward_failure_hook",
    # tiled
    "tiled",
    # modules
    "nn",
    # psf
    "psf",
    # errors
    "LsconvError",
    "ArgumentError",
    "ArgumentTypeError",
    "ShapeError",
    "DtypeError",
    "DeviceError",
    "NonFiniteError",
    "MethodError",
    "PreconditionerError",
    "PlanMemoryError",
    "RankError",
    "ConvergenceError",
    "ConvergenceWarning",
    "InputWarning",
]


# Names by the module that has them: each is imported when it is first asked for, so that `import lsconv` costs little.
_HOMES = {
    "lsconv.operators.base": ("LinearOperator",),
    "lsconv.operators.convolution": (
        "Conv1d",
        "Conv2d",
        "Conv3d",
        "Convolution",
    ),
    "lsconv.operators.varying_convolution": ("VaryingConvolution",),
    "lsconv.operators.elementary": (
        "Crop",
        "Dense",
        "Diagonal",
        "FromFunctions",
        "Identity",
        "Mask",
    ),
    "lsconv.operators.padding": ("Pad",),
    "lsconv.operators.difference": (
        "Gradient",
        "Laplacian",
    ),
    "lsconv.operators.algebra": (
        "block_diag",
        "hstack",
        "vstack",
    ),
    "lsconv.operators.linear_function": ("as_operator",),
    "lsconv.operators.scipy": ("from_scipy",),
    "lsconv.inverse.lstsq": ("lstsq",),
    "lsconv.inverse.pseudo_inverse": ("pinv",),
    "lsconv.inverse.tikhonov": ("tikhonov",),
    "lsconv.inverse.damping.choose_damp": (
        "Selection",
        "choose_damp",
    ),
    "lsconv.inverse.tiled_variation": ("tiled_total_variation",),
    "lsconv.inverse.total_variation": ("total_variation",),
    "lsconv.inverse.plug_and_play": ("plug_and_play",),
    "lsconv.inverse.images.deconvolve": ("deconvolve",),
    "lsconv.inverse.images.blur": ("blur_operator",),
    "lsconv.inverse.images.saturation": ("saturation_level",),
    "lsconv.krylov.loop.solution": (
        "History",
        "Solution",
        "Status",
    ),
    "lsconv.inverse.uncertainty.evidence": ("log_evidence",),
    "lsconv.inverse.uncertainty.posterior": (
        "noise_level",
        "posterior_samples",
        "posterior_std",
    ),
    "lsconv.inverse.uncertainty.psf_estimate": (
        "PsfEstimate",
        "PsfStatus",
        "estimate_psf",
    ),
    "lsconv.fourier.spectrum": (
        "cond",
        "singular_values",
    ),
    "lsconv.inverse.functions.decomposition": (
        "SingularValueDecomposition",
        "svd",
    ),
    "lsconv.inverse.functions.determinants": (
        "logdet",
        "slogdet",
        "trace_inverse",
    ),
    "lsconv.inverse.functions.spectral_norm": ("norm",),
    "lsconv.fourier.circulant_preconditioner": ("CirculantPreconditioner",),
    "lsconv.inverse.explain": (
        "Explanation",
        "explain",
    ),
    "lsconv.krylov.gradients.methods": (
        "cg",
        "cgls",
        "craig",
        "gmres",
        "hybrid",
        "lsmr",
        "lsqr",
        "minres",
    ),
    "lsconv.krylov.hybrid": ("HybridSelection",),
    "lsconv.krylov.refinement": ("refine",),
    "lsconv.krylov.gradients.backward_solves": ("set_backward_failure_hook",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    """The public name, from the module that has it."""
    import importlib

    if name in ("nn", "psf", "tiled"):
        return importlib.import_module(f"lsconv.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'lsconv' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
